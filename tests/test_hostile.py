"Any text, any bytes, any setting: what is promised of a good input holds for a nasty one, or it is refused in a sentence."
import csv, gzip, io, json, os, random, subprocess, sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints
from unicodedata import category

import numpy as np, pytest, torch, zstandard
from fuzz import lines, small_model
from hypothesis import assume, example, given, strategies as st
from nasty import BYTES, SHORT, TEXTS, VALUES, WRITABLE

from chroma_moe.config import ChromaError, Config, build, chroma_config, load_config, read_yaml, to_dict, to_yaml, visible
from chroma_moe.curves import chroma_plot
from chroma_moe.data import chroma_data
from chroma_moe.encode import chroma_encode
from chroma_moe.evaluate import chroma_evaluate
from chroma_moe.indexing import nearest
from chroma_moe.mining import chroma_mine
from chroma_moe.rows import SUFFIXES, DataFile, check_row, records
from chroma_moe.searching import chroma_search
from chroma_moe.sources import open_source
from chroma_moe.synthesis import chroma_synthesise
from chroma_moe.tokenizer import SPECIALS, ChromaTokenizer, as_read, chroma_tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
any_text = st.one_of(st.text(st.characters(exclude_categories=()), max_size=60), st.text(max_size=60), st.sampled_from(list(SHORT.values())))
any_bytes = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(BYTES), max_size=12).map(b''.join))

@pytest.fixture(scope='module')
def h(tmp_path_factory):
    "A small model in a folder, and tokenizers of other kinds."
    home,model = tmp_path_factory.mktemp('hostile'),small_model(); model.save_pretrained(home/'model')
    texts = lines(random.Random(0), 200)
    others = [ChromaTokenizer.train(texts, 300, lowercase=False), ChromaTokenizer.train(texts, 400, digits='split', terms=('gross margin',))]
    return SimpleNamespace(home=home, model=model, tokenizers=[model.tokenizer, *others])

# texts ----------------------------------------------------------------------------------------------------------------------------------

def back(t, text):
    "What must come back: by Python's tables, or by the library's own where it may know more of Unicode than this Python."
    if all(category(c)!='Cn' for c in text): return as_read(t.tok, text)
    return t.tok.normalizer.normalize_str(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'))

@given(text=any_text)
def test_tokens_give_the_text_back(h, text):
    for t in h.tokenizers:
        ids = t.encode([text], max_length=1<<30)[0]
        assert ids[0]==2 and ids[-1]==3 and all(len(SPECIALS)<=i<len(t) for i in ids[1:-1])       # no text can write a special token
        assert t.decode(ids[1:-1])==back(t, text)
        at = t.starts([text])[0]; assert len(at)==len(ids)-2 and (np.diff(at)>=0).all() and (not len(at) or 0<=at[0] and at[-1]<len(text))

def test_tokens_of_the_corpus(h):
    for t in h.tokenizers:
        for name,text in TEXTS.items(): assert t.decode(t.encode([text], max_length=1<<30)[0][1:-1])==back(t, text), name
        assert t.encode(list(SHORT.values()), max_length=99)==[t.encode([x], max_length=99)[0] for x in SHORT.values()]
    print(f'{len(TEXTS)} nasty texts, {len(h.tokenizers)} tokenizers: each text comes back')

def test_vectors_of_the_corpus(h):
    "Finite unit vectors, the same alone and among others, whatever the texts are."
    texts = list(TEXTS.values()); e = h.model.encode(texts); assert e.shape==(len(texts), 16) and np.isfinite(e).all()
    assert np.abs(np.linalg.norm(e, axis=1)-1).max()<1e-5
    alone = np.stack([h.model.encode(t) for t in texts]); back = h.model.encode(texts[::-1], batch_size=3)[::-1]
    for other in (alone, back): assert np.abs(other-e).max()<1e-5, list(TEXTS)[int(np.abs(other-e).max(1).argmax())]
    for precision in ('int8','ubinary'): assert len(h.model.encode(texts, precision=precision))==len(texts)
    print(f'{len(texts)} nasty texts: the same alone and in a batch within {np.abs(alone-e).max():.0e}')

@given(texts=st.lists(any_text, min_size=1, max_size=6), name=st.sampled_from(['query','document']), prompt=st.one_of(st.none(), st.text(max_size=4)))
def test_vectors(h, texts, name, prompt):
    e = h.model.encode(texts, prompt_name=name, prompt=prompt)
    assert e.shape==(len(texts), 16) and np.isfinite(e).all() and np.abs(np.linalg.norm(e, axis=1)-1).max()<1e-5
    i = len(texts)//2; assert np.abs(h.model.encode(texts[i], prompt_name=name, prompt=prompt)-e[i]).max()<1e-5

@given(texts=st.lists(any_text, min_size=1, max_size=3), size=st.integers(8, 30), overlap=st.integers(0, 4))
def test_passages(h, texts, size, overlap):
    "They are what stands where they say, in order, and leave out nothing but white space."
    v,rows = h.model.encode_passages(texts, passage_tokens=size, overlap=overlap)
    assert len(v)==len(rows) and np.isfinite(v).all() and {r['id'] for r in rows}==set(range(len(texts)))
    for i,t in enumerate(texts):
        mine,upto = [r for r in rows if r['id']==i],0
        for r in mine: assert r['text']==t[r['start']:r['end']] and not t[upto:max(upto, r['start'])].strip() and r['end']>=upto; upto = r['end']
        assert not t[upto:].strip()

@given(docs=st.lists(any_text, min_size=1, max_size=8), query=any_text, k=st.integers(1, 12), first=st.sampled_from([None,'int8','binary']))
def test_search(h, docs, query, k, first):
    found = h.model.search(query, h.model.index(docs), top_k=k, first=first)
    scores,places = [f['score'] for f in found],[f['index'] for f in found]
    assert len(found)==min(k, len(docs)) and len(set(places))==len(places) and set(places)<=set(range(len(docs))) and scores==sorted(scores, reverse=True)
    assert all(f['text']==docs[f['index']] and -1.001<f['score']<1.001 for f in found)

@given(seed=st.integers(0, 2**32), n=st.integers(1, 40), k=st.integers(1, 50), same=st.booleans())
def test_nearest(seed, n, k, same):
    "As sorting by hand has it, ties to the earlier."
    rng = np.random.default_rng(seed); docs,q = rng.integers(-2, 3, (n, 4)).astype(np.float32), rng.integers(-2, 3, (3, 4)).astype(np.float32)
    if same: docs[:] = docs[0]
    s,p = nearest(q, docs, k, block=7); want = np.argsort(-(q@docs.T), axis=1, kind='stable')[:,:k]
    assert (p==want).all() and (s==np.take_along_axis(q@docs.T, want, 1)).all()

# files ----------------------------------------------------------------------------------------------------------------------------------

def read(path, kind='text', **kw):
    "Records and rows of a file, or the refusal, which names the file."
    try: found = list(records(DataFile(str(path))))
    except ChromaError as e: assert path.name in str(e); found = None
    try: rows = list(open_source(str(path), kind=kind, **kw))
    except ChromaError as e: assert path.name in str(e); rows = None
    assert all(isinstance(n, int) and isinstance(line, int) and isinstance(fault, str) and (r is None)<=bool(fault) for n,line,r,fault in found or ())
    assert not any(check_row(r, kind) for r in rows or ())
    return found, rows

@given(content=any_bytes, suffix=st.sampled_from([s+z for s in SUFFIXES for z in ('', '.gz', '.zst')]), packed=st.booleans())
@example(content=b'a\rb\rc', suffix='.txt', packed=False)
@example(content=b'text\r"a"\rb', suffix='.csv', packed=False)
@example(content=b'\xef\xbb\xbf'*3, suffix='.jsonl', packed=False)
def test_any_bytes(h, content, suffix, packed):
    if packed: content = gzip.compress(content) if suffix.endswith('gz') else zstandard.compress(content) if suffix.endswith('zst') else content
    p = h.home/f'any{suffix}'; p.write_bytes(content); read(p, max_bad=.5); p.unlink()

@given(texts=st.lists(any_text, min_size=1, max_size=5))
def test_what_is_written_is_read(h, texts):
    "JSON lines, a JSON array and CSV of any texts, plain or packed: the good ones come back, the others are told by their line."
    good = [t for t in texts if t.strip() and t==t.encode('utf-8', 'replace').decode()]
    made = dict(jsonl=''.join(json.dumps(dict(text=t))+'\n' for t in texts), json=json.dumps([dict(text=t) for t in texts]))
    for suffix,content in made.items():
        for z,pack in (('', bytes), ('.gz', gzip.compress), ('.zst', zstandard.compress)):
            p = h.home/f'w.{suffix}{z}'; p.write_bytes(pack(content.encode())); reader = open_source(str(p), max_bad=1.); rows = []
            try: rows += reader
            except ChromaError as e: assert not good and 'holds no rows' in str(e)
            assert [r['text'] for r in rows]==good and reader.report.bad==len(texts)-len(good)
            assert all(f', line {i+1}:' in ' '.join(reader.report.first) for i,t in enumerate(texts) if suffix=='jsonl' and t not in good)
    plain = [t for t in good if '\r' not in t and '\0' not in t]; assume(plain)
    f = io.StringIO(); csv.writer(f, quoting=csv.QUOTE_ALL).writerows([['text'], *([t] for t in plain)]); p = h.home/'w.csv'; p.write_text(f.getvalue(),
        newline='')
    assert [r['text'] for r in open_source(str(p))]==plain

@given(value=st.sampled_from(VALUES), key=st.sampled_from(['text','query','positive','negatives','grades','domain','query_id']),
    kind=st.sampled_from(['text','pair']))
def test_values_of_other_types(h, value, key, kind):
    row = dict(text='a') if kind=='text' else dict(query='a', positive='b', negatives=['c'], grades=[.5])
    p = h.home/'v.jsonl'; p.write_text(json.dumps(row|{key: value})+'\n'); found,rows = read(p, kind, max_bad=1.); assert found is not None

# settings -------------------------------------------------------------------------------------------------------------------------------

def leaves(cls, name=''):
    for f in fields(cls):
        kind = get_type_hints(cls)[f.name]
        if is_dataclass(kind): yield from leaves(kind, f'{name}{f.name}.')
        else: yield f'{name}{f.name}', kind
LEAVES = dict(leaves(Config))
def value_of(kind):
    if kind is bool: return st.booleans()
    if kind is int: return st.one_of(st.integers(0, 9), st.integers())
    if kind is float: return st.one_of(st.floats(0, 1), st.floats(allow_nan=False))
    return st.text(max_size=9) if kind is str else st.lists(st.text(max_size=5) if str in kind.__args__ else st.floats(0, 1), max_size=3)
changes = st.lists(st.sampled_from(sorted(LEAVES)), max_size=4,
    unique=True).flatmap(lambda names: st.fixed_dictionaries({n: value_of(LEAVES[n]) for n in names}))

@example(changes={'model.layers': 10**18, 'parallel.expert': 2}, profile='tiny')     # no list that long is made
@example(changes={'tokenizer.max_samples': '\U00010000'}, profile='tiny')     # JSON writes it as a pair of escapes
@given(changes=changes, profile=st.sampled_from(['tiny','debug','t4']))
def test_settings_come_back(h, changes, profile):
    "A configuration that is accepted is the same after it was written and read, and given by --set."
    nested = {}
    for name,v in changes.items():
        at = nested
        for k in name.split('.')[:-1]: at = at.setdefault(k, {})
        at[name.split('.')[-1]] = v
    p = h.home/'c.yaml'; p.write_text(json.dumps(nested|dict(active_model_profile=profile)))
    try: c = load_config(p)
    except ChromaError as e: assert any(n.split('.')[-1] in str(e) for n in changes) or 'not valid YAML' in str(e); return
    p.write_text(to_yaml(c), encoding='utf-8'); assert load_config(p)==c==build(Config, to_dict(c))

@given(text=st.one_of(any_text, st.recursive(st.sampled_from([str(v) for v in VALUES if not isinstance(v, int) or abs(v)<1e99]), lambda x: st.lists(x,
    max_size=3).map(str))))
def test_any_yaml(text):
    try: read_yaml(text)
    except ChromaError as e: assert str(e)

# commands -------------------------------------------------------------------------------------------------------------------------------

def said(command, *args):
    "What a command that ran or refused prints; anything else fails."
    out,err = io.StringIO(),io.StringIO(); old = sys.stdout,sys.stderr; sys.stdout,sys.stderr = out,err
    try: command.main([str(a) for a in args]); code = 0
    except SystemExit as e: code = e.code
    finally: sys.stdout,sys.stderr = old
    assert code in (0, None, 2) or isinstance(code, str) and code.startswith('chroma_') and len(code)<3000, code
    return out.getvalue(), err.getvalue() if code in (0, None, 2) else code

CONTENTS = (b'', b'\n\n', b'\xff\xfe\x00', b'{"text": 3}\n', b'['*99_999, b'{"text": "a\\ud800"}\n', b'\xef\xbb\xbf{"text": "bom"}\n', b'text\n"open',
    b'a\rb\r', 'é\u202e\x1b[2J\n'.encode())

def test_commands_on_nasty_files(h, tmp_path, request):
    model,n,every = h.home/'model',0,request.config.getoption('--long')
    for turn,content in enumerate(CONTENTS):
        for suffix in ('.jsonl','.csv','.txt')[:] if every else ('.jsonl','.csv','.txt')[turn%3:turn%3+1]:
            p = tmp_path/f'x{suffix}'; p.write_bytes(content); out = tmp_path/f'o{n}'; n += 1
            said(chroma_encode, '--model', model, '--input', p, '--output', out/'i', '--no_progress')
            said(chroma_search, '--model', model, '--input', p, '--query', 'red')
            said(chroma_data, 'peek', p); said(chroma_mine, '--source', p, '--out', out/'m.jsonl', '--no_progress')
            said(chroma_synthesise, '--source', p, '--model', 'm', '--estimate'); said(chroma_tokenizer, '--source', p, '--vocab_size', 300, '--out', out/'t')
        p = tmp_path/'c.yaml'; p.write_bytes(content)
        for command in (chroma_config, chroma_synthesise): said(command, '--config', p)
        (tmp_path/'run').mkdir(exist_ok=True); (tmp_path/'run'/'metrics.jsonl').write_bytes(content); said(chroma_plot, tmp_path/'run', '--out',
            tmp_path/'p.png')
        (tmp_path/'set').mkdir(exist_ok=True); (tmp_path/'set'/'corpus.jsonl').write_bytes(content); (tmp_path/'set'/'queries.jsonl').write_bytes(content)
        (tmp_path/'set'/'qrels.tsv').write_bytes(content); said(chroma_evaluate, '--model', model, '--benchmark', f'local:{tmp_path/"set"}', '--out',
            tmp_path/'e')
        for name in ('config.json','model.safetensors','tokenizer.json','encoder.json','about.json')[0 if every else turn%5:5 if every else turn%5+1]:
            whole = (model/name).read_bytes(); (model/name).write_bytes(content)
            try: said(chroma_search, '--model', model, '--input', ROOT/'README.md', '--query', 'a')
            finally: (model/name).write_bytes(whole)
    print(f'{n*6} runs of six commands on nasty files, and three more: no traceback')

def test_commands_on_nasty_words(h, tmp_path, request):
    "As names, paths, settings and questions."
    p = tmp_path/'x.txt'; p.write_text('\n'.join(t for t in WRITABLE.values() if len(t)<200), encoding='utf-8')
    words = [t for t in TEXTS.values() if len(t)<2000 and '\0' not in t]
    for w in words[::1 if request.config.getoption('--long') else 4]:
        for command,args in ((chroma_config, ('--set', w)), (chroma_config, ('--config', w)), (chroma_config, ('--profile', w)), (chroma_data, ('peek', w)),
            (chroma_plot, (w,)),
                             (chroma_search, ('--model', w, '--input', p))): said(command, *args)
    found,_ = said(chroma_search, '--model', h.home/'model', '--input', p, *(x for w in words[::3] for x in ('--query', w)), '--top_k', 3)
    assert found and not set(found)&set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])), 'characters that steer a terminal'
    lines_ = said(chroma_search, '--model', h.home/'model', '--input', p, *(x for w in words[::3] for x in ('--query', w)), '--json')[0].splitlines()
    one = lambda t: t.encode('utf-16', 'surrogatepass')                                  # JSON joins the halves of a character
    assert [one(json.loads(l)['query']) for l in lines_]==[one(w) for w in words[::3]]

def test_plain_terminals_and_closed_pipes(h):
    "A terminal that knows only ASCII, words that are no UTF-8, and a reader who leaves."
    env = os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONIOENCODING='ascii')
    (h.home/'t.txt').write_text('café 日本\n'*40, encoding='utf-8')
    args = [sys.executable, '-m', 'chroma_moe.searching', '--model', h.home/'model', '--input', h.home/'t.txt', '--top-k', '40', '--query', b'caf\xe9 \xff']
    p = subprocess.run(args, env=env, capture_output=True,
        timeout=100); assert p.returncode==0 and rb'caf\xe9' in p.stdout and b'Traceback' not in p.stderr, p.stderr
    p = subprocess.Popen([*args, *['--query', 'red']*100], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE); p.stdout.read(10); p.stdout.close()
    err = p.stderr.read(); assert p.wait(100) in (141, 0) and not err, err

@given(text=any_text)
def test_visible(text):
    seen = visible(text); seen.encode()
    assert not set(seen)&set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
