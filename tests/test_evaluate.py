"chroma_evaluate as a user starts it: a folder with tasks of every kind, baselines, a kill in the middle, broken files, no network."
import io, json, os, re, signal, subprocess, sys, time
from contextlib import redirect_stdout
from html.parser import HTMLParser
from math import log2
from pathlib import Path

import pytest

from chroma_moe.config import ChromaError, load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.evaluate import chroma_evaluate, parse_benchmarks
from chroma_moe.evaluation import local_tasks
from chroma_moe.metrics import paired_bootstrap
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
ASKED = ['finance', 'shop', 'classes', 'sts/news', 'pair/same', 'clustering/subjects']

def start(*args):
    return subprocess.Popen([sys.executable, '-m', 'chroma_moe.evaluate', *map(str, args)], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
def run(*args):
    p = start(*args); out,err = p.communicate(timeout=300)
    return p.returncode, out, err

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tiny random model that names its training data, and a folder with a task of every kind."
    home,world = tmp_path_factory.mktemp('home'),World()
    def write(path, text): (home/path).parent.mkdir(parents=True, exist_ok=True); (home/path).write_text(text, encoding='utf-8')
    def tsv(path, head, rows): write(path, '\n'.join(['\t'.join(head), *('\t'.join(' '.join(str(c).split()) for c in r) for r in rows)])+'\n')
    lines = lambda rows: ''.join(json.dumps(r)+'\n' for r in rows)
    for d in ('finance','shop'):
        r = world.retrieval(d, 'test', 12)
        at = f'sets/retrieval/{d}'
        write(f'{at}/corpus.jsonl', lines(dict(_id=k, title=v[:5], text=v[5:]) for k,v in r['corpus'].items()))
        write(f'{at}/queries.jsonl', lines(dict(_id=k, text=v) for k,v in r['queries'].items()))
        tsv(f'{at}/qrels/test.tsv', ('query-id','corpus-id','score'), [(q,k,g) for q,gs in r['qrels'].items() for k,g in gs.items()])
    train,test = ([(r['label'], r['text']) for r in world.texts(60, s)] for s in ('train','test'))
    tsv('sets/classification/classes/train.tsv', ('label','text'), train); tsv('sets/classification/classes/test.tsv', ('label','text'), test)
    tsv('sets/clustering/subjects.tsv', ('label','text'), test)
    pairs = world.sts(40)
    tsv('sets/sts/news.tsv', ('score','sentence1','sentence2'), [(p['score'], p['a'], p['b']) for p in pairs])
    tsv('sets/pairs/same.tsv', ('label','sentence1','sentence2'), [(int(p['score']>2.5), p['a'], p['b']) for p in pairs])
    write('train.jsonl', lines([dict(query=world.retrieval('shop', 'test', 12)['queries']['q0'], positive='something else entirely, of other words')]))
    c = load_config(profile='tiny').model
    about = dict(training=[dict(phase='tuning', data=[str(home/'train.jsonl')], settings={})])
    ChromaMoE(ChromaModel(c), ChromaTokenizer.train([t for _,t in train], 600), 64, about=about).save_pretrained(home/'model')
    return home

def here(*args):
    "The command in this process, which has imported everything; what it printed."
    with redirect_stdout(io.StringIO()) as said: chroma_evaluate.main([str(a) for a in args])
    return said.getvalue()

@pytest.fixture(scope='module')
def done(home):
    args = ['--model', home/'model', '--benchmark', f"local:{home/'sets'}", '--baselines', 'bm25,bag,hybrid', '--no_card']
    said = here(*args, '--out', home/'out')
    return args, json.loads((home/'out/results.json').read_text()), said

def value(results, task, system, metric): return next(r for r in results['rows'] if (r['task'],r['system'],r['metric'])==(task,system,metric))

def test_every_kind(done):
    _,r,_ = done
    assert list(dict.fromkeys(x['task'] for x in r['rows']))==ASKED and r['systems']==['model','BM25','bag of words','hybrid 0.5']
    for x in r['rows']: assert x['value'] is None or (-1<=x['value']<=1 and (x['low'] is None or x['low']<=x['value']+1e-9 and x['value']<=x['high']+1e-9)), x
    without = {(x['task'],x['system']) for x in r['rows'] if x['value'] is None}
    assert without=={(t,'BM25') for t in ASKED[2:]}
    print(f"{len(ASKED)} tasks of {len({x['kind'] for x in r['rows']})} kinds, {len(r['systems'])} systems, {len(r['rows'])} figures")

def test_by_hand(home, done):
    "nDCG@10 of the model from its own vectors, with nothing of the evaluation's."
    _,r,_ = done
    model = ChromaMoE.from_pretrained(home/'model')
    task = next(t for t in local_tasks(home/'sets') if t.name=='shop').data
    ids,docs = list(task['corpus']),model.encode_document(list(task['corpus'].values()))
    found = value(r, 'shop', 'model', 'ndcg@10')
    for i,(q,text) in enumerate(task['queries'].items()):
        s = docs@model.encode_query(text)
        grade = [task['qrels'][q].get(ids[j], 0) for j in sorted(range(len(ids)), key=lambda j: -s[j])[:10]]
        dcg = lambda g: sum(x/log2(n+2) for n,x in enumerate(g))
        assert abs(found['values'][i]-dcg(grade)/dcg(sorted(task['qrels'][q].values(), reverse=True)[:10]))<1e-6
    assert abs(found['value']-sum(found['values'])/12)<1e-12
    print('nDCG@10 of 12 queries by hand')

def test_comparisons(done):
    _,r,_ = done
    c = next(c for c in r['comparisons'] if (c['task'],c['against'])==('finance','BM25'))
    a,b = (value(r, 'finance', s, 'ndcg@10')['values'] for s in ('model','BM25'))
    assert (c['difference'],c['low'],c['high'],c['wins'])==paired_bootstrap(a, b)
    s = next(c for c in r['comparisons'] if (c['task'],c['against'])==('sts/news','bag of words'))
    assert s['low']<=s['difference']<=s['high']
    print(f"model - BM25 {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})")

def test_leaks(done):
    said = {l['task']: l['said'] for l in done[1]['leaks']}
    assert said['shop'].startswith('1 of 12 queries and 0 of') and said['finance'].startswith('0 of 12 queries and 0 of'), said
    print(said['shop'])

class Reader(HTMLParser):
    def __init__(self, page): super().__init__(); self.names,self.risks = set(),[]; self.feed(page)
    def handle_starttag(self, name, attributes):
        self.names.add(name); self.risks += [(name,k,v) for k,v in attributes if k.startswith('on') or k in ('src','href','action') and v!='data:,']

def test_pages(home, done):
    page,text = (home/'out/results.html').read_text(), (home/'out/results.md').read_text()
    reader = Reader(page)
    assert not reader.risks and not reader.names & {'script','iframe','object','embed','img','form','link '} and not re.search(r'https?:|url\(|@import', page)
    assert 'prefers-color-scheme:dark' in page and 'width=device-width' in page
    shown = f"{value(done[1], 'shop', 'BM25', 'ndcg@10')['value']:.3f}"
    assert f'<span>{shown}<small>[' in page and f'{shown} [' in text and '1 of 12 queries' in page and '1 of 12 queries' in text
    print(f'one page of {len(page):,} characters that loads nothing')

def test_kill_and_continue(home, done):
    args,out = done[0], home/'again'
    p = start(*args, '--out', out)
    for _ in range(2400):
        if list((out/'rows').glob('*.json')) or p.poll() is not None: break
        time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()
    kept = len(list((out/'rows').glob('*.json')))
    assert p.returncode==-signal.SIGKILL and not (out/'results.json').exists()
    assert here(*args, '--out', out).count('(kept)')>=kept>=1
    for name in ('results.json','results.md','results.html'): assert (out/name).read_bytes()==(home/'out'/name).read_bytes(), name
    print(f'killed after {kept} results; continued to the same bytes')

@pytest.mark.parametrize('path,text,says', [
    ('retrieval/shop/corpus.jsonl', '{"_id": "a", "text": "x"}\n{"_id": "b", "te', 'corpus.jsonl, line 2: not valid JSON'),
    ('retrieval/shop/queries.jsonl', '{"text": "x"}\n', "queries.jsonl, line 1: there is no '_id'"),
    ('retrieval/shop/qrels/test.tsv', 'query-id\tcorpus-id\tscore\nq0\tnowhere\t1\n', "test.tsv, line 2: corpus-id 'nowhere' does not stand in"),
    ('sts/news.tsv', 'score\tsentence1\tsentence2\nhigh\ta\tb\n', "news.tsv, line 2: score is 'high'"),
    ('pairs/same.tsv', 'label\tsentence1\tsentence2\nyes\ta\tb\n', "same.tsv, line 2: label is 'yes'"),
    ('classification/classes/test.tsv', 'text\nx\n', "test.tsv, line 2: there is no 'label'")])
def test_broken_files(home, path, text, says):
    file = home/'sets'/path; before = file.read_text()
    try:
        file.write_text(text)
        with pytest.raises(SystemExit) as e: here('--model', home/'model', '--benchmark', f"local:{home/'sets'}", '--out', home/'broken')
    finally: file.write_text(before)
    assert says in str(e.value) and '\n' not in str(e.value)
    print(str(e.value).replace(str(home), '…'))

def test_wrong_names():
    for given,says in ((['worlds'], "did you mean 'world'?"), (['local'], 'local:FOLDER')):
        with pytest.raises(ChromaError, match=re.escape(says)): parse_benchmarks(given)
    with pytest.raises(SystemExit) as e: chroma_evaluate.main(['--benchmark', 'finmtb'])
    assert "did you mean 'finmteb'?" in str(e.value)
    print(e.value)

def test_without_a_network(home):
    "What needs the hub says so in a sentence, and the rest is scored."
    code,out,err = run('--model', home/'model', '--benchmark', 'esci', '--benchmark', f"local:{home/'sets/retrieval/shop'}",
                       '--baselines', 'st:someone/some-model', '--out', home/'offline', '--no_card')
    assert code==0, err
    r = json.loads((home/'offline/results.json').read_text())
    esci,*local = r['rows']
    assert esci['benchmark']=='esci' and esci['value'] is None and len(esci['note'])>20 and '\n' not in esci['note']
    assert "cannot load 'someone/some-model'" in r['failed'][0] and local[0]['task']=='shop' and local[0]['value'] is not None
    print(esci['note'][:150])

def test_nothing_scored(home):
    with pytest.raises(SystemExit) as e: here('--model', home/'model', '--benchmark', 'esci:no/such/folder', '--out', home/'nothing', '--no_card')
    assert 'nothing was scored' in str(e.value) and (home/'nothing/results.md').read_text().count('no/such/folder')
    print(e.value)

def test_trial_and_card(home, capsys):
    "A trial run says so everywhere and leaves the card alone; a real one adds to it."
    args = ['--model', str(home/'model'), '--benchmark', f"local:{home/'sets/retrieval/shop'}", '--baselines', 'bm25']
    chroma_evaluate.main([*args, '--out', str(home/'trial'), '--debug'])
    assert 'TRIAL RUN' in capsys.readouterr().out and all('TRIAL RUN' in (home/'trial'/f'results.{e}').read_text() for e in ('md','html'))
    r = json.loads((home/'trial/results.json').read_text())
    assert r['debug'] and r['rows'][0]['items']==5 and not json.loads((home/'model/about.json').read_text())['scores']
    chroma_evaluate.main([*args, '--out', str(home/'real')])
    scores = json.loads((home/'model/about.json').read_text())['scores']
    assert [s['system'] for s in scores] and all(s['leaks'].startswith('1 of 12 queries') for s in scores) and '1 of 12' in (home/'model/README.md').read_text()
    print(f'a trial of 5 queries; {len(scores)} scores on the card')

def test_jax_is_left_alone(tmp_path):
    "A library that would start JAX, which takes three quarters of a GPU's memory, does without it."
    (tmp_path/'jax').mkdir(); (tmp_path/'jax'/'__init__.py').write_text('raise SystemExit("JAX was imported")')
    code = 'import sys, chroma_moe.evaluate, chroma_moe.mining, chroma_moe.synthesis; print("jax" in sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|dict(PYTHONPATH=str(tmp_path)))
    assert (run.returncode, run.stdout)==(0, 'False\n'), run.stderr
