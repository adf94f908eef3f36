"Mining as a user runs it: kills and a second run, what it refuses, ESCI grades end to end, and memory against the number of pairs."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch

from chroma_moe import mining
from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.mining import chroma_mine, text_keys
from chroma_moe.mixing import pairs
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
ENV = os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')

def command(*args): return [sys.executable, '-m', 'chroma_moe.mining', *map(str, args), '--no_progress']
def run(*args): return subprocess.run(command(*args), capture_output=True, text=True, env=ENV, timeout=300)
def here(*args): chroma_mine.main([*map(str, args), '--no_progress'])
def read(path): return [json.loads(l) for l in open(path, encoding='utf-8')]

def said(*args):
    "What `chroma_mine` says when it refuses, run in this process."
    with pytest.raises(SystemExit) as e: here(*args)
    return str(e.value.code)

def killed_when(condition, *args, meanwhile=lambda: None):
    "Start the command, kill it when the condition holds, with all its processes."
    p = subprocess.Popen(command(*args), env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    for _ in range(6000):
        if condition() or p.poll() is not None: break
        time.sleep(0.01)
    meanwhile()
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert p.returncode==-signal.SIGKILL

def size(path): return path.stat().st_size if path.exists() else 0

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A file of pairs and a small model."
    home = tmp_path_factory.mktemp('mining')
    rows = [dict(query=r['query'], positive=r['positive'], negatives=r['negatives'], query_id=r['query_id']) for r in World().pairs('700')]
    (home/'pairs.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='utf-8')
    tokenizer = ChromaTokenizer.train([r['positive'] for r in rows[:400]], 512)
    torch.manual_seed(0)
    ChromaMoE(ChromaModel(load_config(profile='tiny', sets=['model.vocab_size=512','model.layers=1']).model), tokenizer, 64).save_pretrained(home/'model')
    return home

def test_killed_run_goes_on(home):
    args = ['--source', home/'pairs.jsonl', '--block', 64, '--pick', 'random', '--workers', 2]
    here(*args, '--out', home/'whole.jsonl')
    out,folder = home/'parts.jsonl', home/'.parts.jsonl.mining'
    busy = []
    killed_when(lambda: size(folder/'log.jsonl')>1000, *args, '--out', out, meanwhile=lambda: busy.append(said(*args, '--out', out)))
    assert 'another process is writing' in busy[0], busy
    done = mining._last_entry((folder/'log.jsonl').read_bytes())
    assert not out.exists() and 0<done['rows']<700
    with open(folder/'log.jsonl', 'ab') as f: f.write(b'\n{"bytes": 1')      # a kill at the worst moment: half a line here,
    with open(folder/'rows', 'ab') as f: f.write(b'{"query": "half')         # and rows that no line speaks of
    assert 'relative was 0.95 and is now 0.8' in said(*args, '--out', out, '--relative', 0.8)
    r = run(*args, '--out', out)
    assert r.returncode==0 and 'too near the positive' in r.stdout and 'Traceback' not in r.stderr, r.stderr
    assert out.read_bytes()==(home/'whole.jsonl').read_bytes() and not folder.exists()
    assert (home/'parts.jsonl.report').read_bytes()==(home/'whole.jsonl.report').read_bytes()
    print(f"killed after {done['rows']:,} of 700 rows; the run that went on ends in the same {out.stat().st_size:,} bytes; two at once are refused")

def test_what_comes_out(home):
    before,after,report = read(home/'pairs.jsonl'), read(home/'whole.jsonl'), json.loads((home/'whole.jsonl.report').read_text())
    right = {}
    for r in before:
        for k in (r['query_id'], r['query']): right.setdefault(k, set()).update(text_keys([r['positive']]).tolist())
    for b,a in zip(before, after, strict=True):
        assert all(a[k]==b[k] for k in ('query','positive','query_id')) and a['negatives'][:len(b['negatives'])]==b['negatives']
        keys = text_keys(a['negatives']).tolist()
        assert len(a['grades'])==len(keys)==len(set(keys)) and not set(keys)&(right[b['query_id']]|right[b['query']])
    assert report['mined']==sum(len(a['negatives'])-len(b['negatives']) for a,b in zip(after, before))
    assert [r['negatives'] for r in pairs(home/'whole.jsonl')]==[r['negatives'] for r in after]
    print(f"{report['mined_per_row']} negatives a row, none of them a positive of its question; a source of pairs again")

def test_killed_encoding_goes_on(home):
    args = ['--source', home/'pairs.jsonl', '--set', 'data.size=400', '--retriever', 'dense', '--retriever', 'bm25', '--model', home/'model',
            '--block', 150, '--last', 20]
    out,folder = home/'dense.jsonl.zst', home/'.dense.jsonl.zst.mining'
    before,mining.encode_corpus = mining.encode_corpus,lambda *a,**kw: encode(*a, **kw|dict(block=64))
    encode = before
    try:
        here(*args, '--out', home/'dense0.jsonl.zst')
        code = 'from functools import partial; from chroma_moe import mining as m; m.encode_corpus = partial(m.encode_corpus, block=64); m.chroma_mine.main()'
        plain = command(*args, '--out', out); plain[1:3] = ['-c', code]
        p = subprocess.Popen(plain, env=ENV, stdout=subprocess.DEVNULL)
        for _ in range(6000):
            if size(folder/'vectors')>0 or p.poll() is not None: break
            time.sleep(0.01)
        p.send_signal(signal.SIGKILL); p.wait()
        half = size(folder/'vectors')
        assert p.returncode==-signal.SIGKILL and half>0
        with open(folder/'vectors', 'ab') as f: f.write(b'half a vector')
        here(*args, '--out', out)
    finally: mining.encode_corpus = before
    assert out.read_bytes()==(home/'dense0.jsonl.zst').read_bytes()
    print(f'killed with {half//512:,} vectors on disk; the rows are the same bytes, {out.stat().st_size:,} of them compressed')

def test_esci_grades(tmp_path):
    "Judgements in one row are known in the others of the query, whatever lies between them."
    judge = lambda q,product,label,text: dict(query=q, query_id=1 if q[0]=='r' else 2, product_id=product, product_locale='us', esci_label=label,
        product_title=text, product_description='', product_bullet_point='', product_brand='', product_color='', small_version=1, split='train')
    rows = [judge('red shoe', *x) for x in (('a','E','red shoe one'), ('b','E','red shoe two'), ('c','S','red boot'), ('d','C','shoe polish red'),
                                            ('e','I','red car'))]
    rows += [judge('green shoe', *x) for x in (('f','E','green shoe'), ('g','I','red shoe laces and hat'))]
    (tmp_path/'train.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    here('--source', f'esci@{tmp_path}/train.jsonl', '--out', tmp_path/'mined.jsonl', '--relative', 0)
    got = read(tmp_path/'mined.jsonl')
    for r in got[:2]:
        assert r['grades'][:3]==[.1, .01, 0.] and r['negatives'][:3]==['red boot','shoe polish red','red car'] and 'red shoe laces and hat' in r['negatives']
        assert not {'red shoe one','red shoe two'}&set(r['negatives'])
    assert 'red shoe one' in got[2]['negatives']
    here('--source', f'esci@{tmp_path}/train.jsonl', '--out', tmp_path/'anew.jsonl', '--relative', 0, '--no_keep')
    anew = dict(zip(read(tmp_path/'anew.jsonl')[0]['negatives'], read(tmp_path/'anew.jsonl')[0]['grades']))
    assert anew['red boot']==.1 and anew['shoe polish red']==.01 and anew['red shoe laces and hat']==0
    print('substitute 0.1, complement 0.01 and irrelevant 0 in front; mined anew they carry the same grades')

def test_refusals(home, tmp_path, monkeypatch):
    source = ['--source', home/'pairs.jsonl']
    (tmp_path/'bad.jsonl').write_text('{"query": "a b", "positive": "c d"}\n{"query": "half\n'*30)
    (tmp_path/'folder').mkdir(); (tmp_path/'there.jsonl').write_text('x')
    cases = [(['--source', tmp_path/'none.jsonl'], 'no file or folder'), (['--source', tmp_path/'bad.jsonl'], 'records are bad'),
             ([*source, '--out', tmp_path/'x.csv'], 'ends in .jsonl or .jsonl.zst'), ([*source, '--out', tmp_path/'there.jsonl'], '--overwrite to replace it'),
             ([*source, '--retriever', 'tfidf'], 'give bm25 or dense'), ([*source, '--retriever', 'dense'], 'dense retrieval needs a model'),
             ([*source, '--retriever', 'dense', '--model', tmp_path/'nowhere'], 'there is no model folder'),
             ([*source, '--relative', '95'], 'share of the score'),
             ([*source, '--absolute', 'dense=far'], "'far' is not a number"), ([*source, '--first', 9, '--last', 3], 'the smaller one first'),
             ([*source, '--negatives', 0], 'negatives is 0'), ([*source, '--corpus', tmp_path/'none'], 'no file or folder'),
             ([*source, '--retriever', 'dense', '--workers', 2], 'leave it at 1 for dense'), (['--source', 'stsbenchmark'], 'must not be trained on'),
             ([*source, '--corpus', home/'pairs.jsonl'], "no column 'text'"), ([*source, '--index', 'annoy'], 'give exact or faiss')]
    for args,says in cases:
        message = said('--out', tmp_path/'out.jsonl', *args)
        assert says in message, message
        assert not [p.name for p in tmp_path.iterdir() if '.out.jsonl' in p.name], args
    monkeypatch.setitem(sys.modules, 'faiss', None)
    assert "pip install 'chroma-moe[faiss]'" in said('--out', tmp_path/'out.jsonl', *source, '--index', 'faiss')
    r = run(*source, '--out', tmp_path/'there.jsonl')
    assert r.returncode and 'Traceback' not in r.stderr and (tmp_path/'there.jsonl').read_text()=='x', r.stderr
    print(len(cases)+1, 'refusals in one sentence each, nothing left behind:', r.stderr.strip()[-60:])

def test_faiss_finds_what_the_exact_search_finds(home):
    pytest.importorskip('faiss')
    args = ['--source', home/'pairs.jsonl', '--set', 'data.size=300', '--retriever', 'dense', '--model', home/'model', '--relative', 0]
    here(*args, '--out', home/'exact.jsonl'); here(*args, '--out', home/'near.jsonl', '--index', 'faiss', '--probes', 1000)
    exact,near = ([set(r['negatives']) for r in read(home/f'{k}.jsonl')] for k in ('exact','near'))
    same = sum(len(a&b) for a,b in zip(exact, near))/sum(map(len, exact))
    assert same>0.9
    print(f'{same:.1%} of the negatives are the same')

MEMORY = '''
import json, sys
from chroma_moe.mining import Rules, mine_pairs
peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])/1024   # ru_maxrss begins with that of our parent
for n in (1_000, 6_000):
    with open('p.jsonl', 'w') as f:
        for i in range(n): f.write(json.dumps(dict(query=f'question {i} about subject{i%97}', positive=f'subject{i%97} text{i%211}'))+'\\n')
    mine_pairs('p.jsonl', 'out.jsonl', rules=Rules(negatives=2, last=5), block=256, overwrite=True)
    print(peak())
'''
@pytest.mark.long
def test_memory_does_not_grow_with_the_pairs(tmp_path):
    r = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=300)
    assert r.returncode==0, r.stderr
    few,many = map(float, r.stdout.split())
    assert many-few<24, r.stdout
    print(f'peak memory {few:.0f} MB after 1,000 pairs, {many:.0f} MB after 6,000')
