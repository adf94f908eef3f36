"Data sets as they lie on a disk or on the hub: mappings, bad rows, refusals, a stream that is killed in mid-epoch, leaks."
import csv, gzip, itertools, json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq, pytest, zstandard

from chroma_moe import sources
from chroma_moe.config import ChromaError
from chroma_moe.leaks import LeakGuard, evaluation_texts
from chroma_moe.mixing import pairs, texts
from chroma_moe.sources import SOURCES, open_source, check_row
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]

def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ''.join(json.dumps(r)+'\n' for r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix=='.gz' else zstandard.compress(data) if path.suffix=='.zst' else data)

def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)

def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)

# ---------------------------------------------------------------------------------------------------------------- mappings
# Every data set with the columns and the file names it has on the hub, and made-up rows: (writer, path, records, rows wanted, notes wanted)

LONG = 'Demand for our products may fall, and our costs may rise, in ways that we cannot foresee. ' * 4
DOCS = dict(
    edgar=(jsonl, '2020/train.jsonl', [
        dict(filename='1_2020.htm', cik='1', year='2020', section_1='We sell.', section_1A=LONG, section_7='Item 7. ' + LONG),
        dict(filename='2_2020.htm', cik='2', year='2020', section_1='', section_1A='Not applicable.', section_7='1,024 | 2,048 | ' * 50)],
        [dict(text=LONG.strip()), dict(text='Item 7. ' + LONG.strip())], {'section_1A under 200 characters': 1, 'section_7 mostly figures': 1}),
    sec_sentences=(jsonl, 'data/large/train/shard_0.jsonl', [
        dict(cik='1', sentence=s, section=sec, labels=dict(a=1), filingDate='2020-01-01', docID=doc, sentenceID=f'{doc}_{i}', sentenceCount=9)
        for i,(doc,sec,s) in enumerate([('A',0,'Sales rose. '), ('A',0,'Costs fell.'), ('A',1,'No risk.'), ('B',1,'Some risk.')])],
        [dict(text='Sales rose. Costs fell.'), dict(text='No risk.'), dict(text='Some risk.')], {}),
    fnspid=(table, 'Stock_news/nasdaq_exteral_data.csv', [
        dict(Date='2020-01-01', Article_title=title, Stock_symbol='A', Url='u', Publisher='', Author='', Article=text, Lsa_summary='')
        for title,text in (('Shares rise','They rose,\n"a lot".'), ('Shares fall',''), ('',''))],
        [dict(text='Shares rise\nThey rose,\n"a lot".'), dict(text='Shares fall')], {'neither headline nor article': 1}),
    financial_news=(parquet, 'data/reuters/0000.parquet', [
        dict(date='2020-01-01', text='Rates were cut.', extra_fields='{"source": "x"}'), dict(date='2020-01-01', text=' ', extra_fields='{}')],
        [dict(text='Rates were cut.')], {'empty article': 1}),
    convfinqa=(parquet, 'data/train-00000-of-00001.parquet', [
        dict(pre_text=['Sales grew .', 'Costs fell .'], post_text=['See note 2 .'], table=[['', '2019'], ['sales', '12']],
             question='what were sales in 2019?', answer='12')],
        [dict(query='what were sales in 2019?', positive='Sales grew . Costs fell .\n| 2019\nsales | 12\nSee note 2 .')], {}),
    ecom_niverse=(jsonl, 'part-0001.jsonl', [dict(text='How to choose a kettle.')], [dict(text='How to choose a kettle.')], {}),
    amazon_reviews=(jsonl, 'raw/review_categories/All_Beauty.jsonl', [
        dict(rating=5.0, title='Good', text='Works.<br />Well &amp; fast', images=[], asin='B1', parent_asin='B0', timestamp=1),
        dict(rating=1.0, title='', text='', asin='B1', parent_asin='B0')],
        [dict(text='Good\nWorks. Well & fast')], {'empty review': 1}),
    amazon_products=(jsonl, 'raw/meta_categories/meta_All_Beauty.jsonl', [
        dict(main_category='All Beauty', title='Soap', features=['Mild', 'Vegan'], description=['A bar of soap.'],
             price=None, store='S', parent_asin='B0', details={})],
        [dict(text='Soap\nMild\nVegan\nA bar of soap.')], {}),
    fineweb_edu=(parquet, 'sample/10BT/000_00000.parquet', [
        dict(text='Water boils at 100 °C.', id='i', url='u', language_score=.9, token_count=7, score=3.2)], [dict(text='Water boils at 100 °C.')], {}),
    wikipedia=(parquet, '20231101.en/train-00000-of-00041.parquet', [dict(id='1', url='u', title='Kettle', text='A kettle boils water.')],
        [dict(text='Kettle\nA kettle boils water.')], {}),
    msmarco=(parquet, 'v2.1/train-00000-of-00007.parquet', [
        dict(answers=['a'], passages=dict(is_selected=[0, 1, 0], passage_text=['x', 'y', 'z'], url=['', '', '']),
             query='what is y', query_id=7, query_type='NUMERIC', wellFormedAnswers=[]),
        dict(answers=[], passages=dict(is_selected=[0], passage_text=['x'], url=['']),
             query='what is q', query_id=8, query_type='NUMERIC', wellFormedAnswers=[])],
        [dict(query='what is y', positive='y', negatives=['x', 'z'], grades=[0., 0.], query_id='msmarco/7')], {'question without a selected passage': 1}),
    nq=(parquet, 'pair/train-00000-of-00001.parquet', [dict(query='who sells', answer='They do.')],
        [dict(query='who sells', positive='They do.', query_id='who sells')], {}),
    nli=(parquet, 'triplet/train-00000-of-00001.parquet', [dict(anchor='A man runs.', positive='A man moves.', negative='A man sleeps.')],
        [dict(query='A man runs.', positive='A man moves.', negatives=['A man sleeps.'], grades=[0.])], {}),
    stsb=(parquet, 'data/train-00000-of-00001.parquet', [dict(sentence1='A plane.', sentence2='An air plane.', score=1.),
        dict(sentence1='A dog.', sentence2='A plane.', score=.1)],
        [dict(query='A plane.', positive='An air plane.')], {'sentences with a score under 0.8': 1}),
    stsb_scores=(parquet, 'data/train-00000-of-00001.parquet', [dict(sentence1='A plane.', sentence2='An air plane.', score=1.),
        dict(sentence1='A dog.', sentence2='A plane.', score=.1)],
        [dict(query='A plane.', positive='An air plane.', score=1.), dict(query='A dog.', positive='A plane.', score=.1)], {}),
    quora=(parquet, 'triplet/train-00000-of-00001.parquet', [dict(anchor='How to save?', positive='How do I save?', negative='How to lend?')],
        [dict(query='How to save?', positive='How do I save?', negatives=['How to lend?'])], {}),
    wikianswers=(jsonl, 'WikiAnswers.jsonl.gz', [dict(set=['a ?', 'b ?', 'c ?']), dict(set=['d ?'])],
        [dict(query='a ?', positive='b ?', query_id='wikianswers/a ?'), dict(query='c ?', positive='a ?', query_id='wikianswers/a ?')],
        {'set of a single question': 1}))

@pytest.mark.parametrize('name', DOCS)
def test_mapping(name, tmp_path):
    write,path,raw,wanted,notes = DOCS[name]
    write(tmp_path/path, raw)
    r = open_source(f'{name}@{tmp_path}')
    got = list(r)
    assert all(check_row(g, r.kind)=='' and g['source']==name and g['domain']==SOURCES[name].domain for g in got)
    assert [{k: g[k] for k in w} for g,w in zip(got, wanted)]==wanted and len(got)==len(wanted)
    assert (r.report.read, r.report.bad, r.report.notes)==(len(raw), 0, notes)
    assert {c for c in raw[0]}>=set(SOURCES[name].columns)
    print(r.report)

def test_every_source_has_a_mapping_test():
    assert {n for n,s in SOURCES.items() if s.id and s.training!='evaluation only'}==set(DOCS)|{'esci'}
    print(len(DOCS)+1, 'data sets')

def judgement(q, product, label, locale='us', **other):
    return dict(example_id=0, query=f'query {q}', query_id=q, product_id=product, product_locale=locale, esci_label=label,
        small_version=int(q%2), large_version=1,
        product_title=f'title {product}', product_description='<p>Made of&nbsp;steel</p>', product_bullet_point=None,
        product_brand='Kelda', product_color='red', product_text='') | other

def test_esci(tmp_path):
    rows = [judgement(1,'A','Exact'), judgement(1,'B','Substitute'), judgement(1,'C','Complement'),
            judgement(1,'D','Irrelevant'), judgement(1,'E','E'), judgement(1,'F','S'),
            judgement(1,'A','Exact'),                                                    # the same judgement again
            judgement(1,'A','Exact','jp'),                                               # the same number in another locale is another query
            judgement(2,'A','Irrelevant'), judgement(4,'G','Exact', product_title='', product_description=None, product_brand=None, product_color=None)]
    for split,half in (('train', rows), ('test', [judgement(9,'Z','Exact')])): parquet(tmp_path/f'data/{split}-00000-of-00001.parquet', half)
    r = open_source(f'esci@{tmp_path}'); got = list(r)
    assert [g['query_id'] for g in got]==['esci/us/1', 'esci/us/1', 'esci/jp/1']
    assert [g['grades'] for g in got]==[[.1, .1, .01, 0.]]*2 + [[]]
    assert got[0]['positive']=='title A\nBrand: Kelda\nColor: red\nMade of steel'
    assert [g['negatives'][0][:7] for g in got[:2]]==['title B', 'title F']         # rows of a query begin with different negatives
    assert r.report.notes=={'product judged twice for a query': 1, 'query without an exact product': 2, 'product without text': 1}
    assert [g['query_id'] for g in open_source(f'esci:small+jp@{tmp_path}')]==['esci/jp/1']
    assert [g['query'] for g in open_source(f'esci@{tmp_path}', 'test')]==['query 9']
    parquet(tmp_path/'data/train-00000-of-00001.parquet', [*rows[:6], judgement(1,'X','Great')])
    with pytest.raises(ChromaError, match="line 7: 'esci_label' is 'Great'"): list(open_source(f'esci@{tmp_path}'))
    print(r.report)

# ---------------------------------------------------------------------------------------------------------------- refusals

def test_wrong_columns_and_empty_sets(tmp_path):
    parquet(tmp_path/'pair/train-0.parquet', [dict(question='q', answer='a')]*30)
    with pytest.raises(ChromaError, match="there is no column 'query', only answer"): list(open_source(f'nq@{tmp_path}'))
    parquet(tmp_path/'data/train-0.parquet', [dict(sentence1='a', sentence2='b', score=.1)])
    with pytest.raises(ChromaError, match='stsb.*holds no rows.*score under 0.8'): list(open_source(f'stsb@{tmp_path/"data"}'))
    with pytest.raises(ChromaError, match="no data files for split 'test'"): open_source(f'stsb@{tmp_path/"data"}', 'test')
    with pytest.raises(ChromaError, match="no file or folder.*and no source of that name"): open_source('wikipedai')
    print('wrong column, nothing left, absent split, unknown name')

def test_bad_rows_are_counted_and_stop_the_run(tmp_path):
    good = '{"text": "revenue rose"}\n'
    bad = [b'{"text": ', b'{"text": null}', b'{"text": 3}', b'[]', b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}', b'{"text": ""}', b'{"txt": "a"}', b'nothing']
    p = tmp_path/'mine.jsonl'; p.write_bytes(good.encode()*20_000 + b'\n'.join(bad) + b'\n' + good.encode()*5)
    r = open_source(p)
    assert sum(1 for _ in r)==20_005 and r.report.bad==9 and 'mine.jsonl, line 20001: not valid JSON' in r.report.first[0]
    p.write_bytes(good.encode()*5000 + b'\n'.join(bad) + b'\n' + good.encode()*100_000)
    r = open_source(p)
    with pytest.raises(ChromaError, match=r'6 of 5,006 records are bad, and 0.10% is allowed.*line 5001'): list(r)
    assert r.report.rows==5000                        # it stopped at once, not at the end of the file
    assert sum(1 for _ in open_source(p, max_bad=.5))==105_000
    print(r.report)

def test_hostile_text_passes(tmp_path):
    hostile = ['a'*1_000_000, 'null \x00 byte', '\u202eright to left\u202c שלום مرحبا', '👩‍👩‍👧 \U0001f9f6',
        'line\u2028separator \x85 \x1c end', '{"not": "json"}', '"quoted", tab\t', '\ufeffmark']
    jsonl(tmp_path/'a.jsonl', [dict(text=t) for t in hostile]); jsonl(tmp_path/'a.jsonl.zst', [dict(text=t) for t in hostile])
    table(tmp_path/'a.csv', [dict(text=t) for t in hostile]); parquet(tmp_path/'a.parquet', [dict(text=t) for t in hostile])
    for name in ('a.jsonl', 'a.jsonl.zst', 'a.csv', 'a.parquet'): assert [r['text'] for r in open_source(tmp_path/name)]==hostile, name
    guard = LeakGuard(dict(all=hostile)); assert [l.score for l in guard.check_many(hostile) if l]==[1.]*sum(any(c.isalnum() for c in t) for t in hostile)
    print(len(hostile), 'hostile texts through four formats and the guard, unchanged')

def test_memory_does_not_grow_with_the_file(tmp_path):
    script = ('import re,sys; from chroma_moe.sources import open_source\n'
              'n = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])//1024\n'
              'r = open_source(sys.argv[1]); m = [n() for k,_ in enumerate(r) if k%1000==999]; print(m[1], max(m[2:]))')
    rng,words = random.Random(0),'revenue rose by ten percent and costs fell'.split()
    some = [json.dumps(dict(text=' '.join(rng.choices(words, k=150))))+'\n' for _ in range(500)]
    (tmp_path/'big.jsonl').write_text(''.join(some)*100); size = (tmp_path/'big.jsonl').stat().st_size>>20
    (tmp_path/'big.jsonl.zst').write_bytes(zstandard.compress((tmp_path/'big.jsonl').read_bytes()))
    for name in ('big.jsonl', 'big.jsonl.zst'):
        before,after = map(int, subprocess.run([sys.executable, '-c', script, tmp_path/name], capture_output=True, text=True, check=True,
            env=os.environ|dict(PYTHONPATH=str(ROOT))).stdout.split())
        assert after-before<20, (before, after)
    packed = (tmp_path/name).stat().st_size>>10
    print(f'{size} MB of text, {packed} kB of Zstandard: {before} MB of own memory after 2,000 rows, {after} MB at most until the end')

# ----------------------------------------------------------------------------------------------------------------- the hub

class FakeHub:
    "A folder that answers as the hub's file system does."
    def __init__(self, root): self.root = root
    def find(self, path): return sorted(p.relative_to(self.root).as_posix() for p in (self.root/path).rglob('*') if p.is_file())
    def open(self, path, mode): return open(self.root/path, mode)
    def size(self, path): return (self.root/path).stat().st_size

def test_hub_is_read_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'hub', lambda: FakeHub(tmp_path))
    for name in DOCS:
        write,path,raw,wanted,_ = DOCS[name]
        write(tmp_path/'datasets'/SOURCES[name].id/path, raw)
        (tmp_path/'datasets'/SOURCES[name].id/'README.md').write_text('a card')
        assert len(list(open_source(name)))==len(wanted), name
    (tmp_path/'datasets/eloukas/edgar-corpus/edgar_corpus.py').write_text('import datasets')
    assert len(list(open_source('edgar:2020')))==2                   # its script is not needed
    for p in (tmp_path/'datasets/thebajajra/Ecom-niverse').iterdir(): p.unlink()
    (tmp_path/'datasets/thebajajra/Ecom-niverse/ecom.py').write_text('import datasets')
    with pytest.raises(ChromaError, match='it is made by a script, ecom.py, and holds no data files: run the script yourself'): open_source('ecom_niverse')
    print(len(DOCS), 'data sets through a file system object')

def test_hub_faults_are_one_sentence(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
    class Response: headers,request,status_code,url = {},None,403,'u'
    for error,says in ((GatedRepoError, 'it is gated: ask for access at https://huggingface.co/datasets/Brianferrell787'),
                           (RepositoryNotFoundError, 'no such data set'),
                       (EntryNotFoundError, 'no such files'), (ConnectionError, 'the hub cannot be reached'), (TimeoutError, 'the hub cannot be reached')):
        def hub():
            try: e = error('refused', response=Response())
            except TypeError: e = error('refused')
            raise e
        monkeypatch.setattr(sources, 'hub', hub)
        with pytest.raises(ChromaError) as e: open_source('financial_news')
        said = str(e.value)
        assert said.startswith("financial_news (Brianferrell787/financial-news-multisource, config 'default', split 'train'): ")
        assert says in said and 'financial_news@FOLDER' in said and '\n' not in said
    print(said)

def test_unreachable_hub_fails_fast():
    t = time.time()
    r = subprocess.run([sys.executable, '-c', "from chroma_moe.mixing import texts; texts(['edgar=0.5', 'fineweb_edu=0.5'])"], capture_output=True, text=True,
        env=os.environ|dict(PYTHONPATH=str(ROOT), HF_ENDPOINT='http://127.0.0.1:9'))
    assert r.returncode and "edgar (eloukas/edgar-corpus, config 'default', split 'train'): the hub cannot be reached" in r.stderr, r.stderr
    print(f'{r.stderr.strip().splitlines()[-1][:150]} ... after {time.time()-t:.1f} s, Python and libraries included')

def test_evaluation_sets_are_refused(tmp_path):
    for place in ('stsbenchmark', 'finmteb', 'FinanceMTEB/FinSTS', 'mteb/nq', 'mteb/stsbenchmark-sts', 'FinMTEB/x'):
        with pytest.raises(ChromaError, match='must not be trained on'): open_source(place)
    copy = tmp_path/'hub/datasets--FinanceMTEB--FinSTS/train.jsonl'; jsonl(copy, [dict(text='a')])
    bench = tmp_path/'bench/corpus.jsonl'; jsonl(bench, [dict(text='a')]); (tmp_path/'bench/qrels.tsv').touch()
    marked = tmp_path/'marked/deep/a.jsonl'; jsonl(marked, [dict(text='a')]); (tmp_path/'marked/EVALUATION_ONLY').touch()
    for p in (copy, bench, bench.parent, marked, marked.parent):
        with pytest.raises(ChromaError, match='must not be trained on'): texts(str(p))
        assert len(list(open_source(p, purpose='evaluate')))==1
    with pytest.raises(ChromaError, match='must not be trained on'): texts([f'ecom_niverse@{marked.parent}'])
    print('six names and five local copies')

# ------------------------------------------------------------------------------------------------------------------ streams

MAKE = '''
import json, os, signal, sys
from chroma_moe.mixing import texts
def make(): return texts(['a.jsonl.zst=0.5', 'b.csv=0.3', 'c.parquet=0.2'], size=3000, seed=3, shuffle=500)
'''

@pytest.fixture
def three(tmp_path):
    rng = random.Random(0)
    make = lambda name, n, w: [dict(text=f'{name} {i} ' + 'word '*rng.randrange(1, w)) for i in range(n)]
    jsonl(tmp_path/'a.jsonl.zst', make('a', 3000, 40)); table(tmp_path/'b.csv', make('b', 2000, 10)); parquet(tmp_path/'c.parquet', make('c', 700, 200))
    return tmp_path

def test_killed_in_mid_epoch(three, monkeypatch):
    "A process that writes down its position every 100 rows is killed; another goes on. Together they read what one would have read."
    env = os.environ|dict(PYTHONPATH=str(ROOT))
    one = MAKE + '''
s = make(); s_epochs = 0
with open('seen.txt', 'a') as f:
    if os.path.exists('position.json'): s.load(json.load(open('position.json')))
    kill = int(sys.argv[1]); n = s.drawn
    for epoch in range(s.epoch, 2):
        for k,r in enumerate(s):
            print(f"{epoch} {r['text'][:12]}", file=f)
            if k%100==99:
                f.flush(); open('kept.txt', 'w').write(str(f.tell()))
                json.dump(s.state(), open('new.json', 'w')); os.replace('new.json', 'position.json')
            if k==kill: os.kill(os.getpid(), signal.SIGKILL)
'''
    monkeypatch.chdir(three)
    subprocess.run([sys.executable, '-c', one, '-1'], env=env, check=True)
    whole = Path('seen.txt').read_text()
    for f in ('seen.txt', 'position.json', 'kept.txt'): Path(f).unlink()
    for k in (750, 1999, 2500):
        p = subprocess.run([sys.executable, '-c', one, str(k)], env=env)
        assert p.returncode==-signal.SIGKILL
        with open('seen.txt', 'r+') as f: f.truncate(int(Path('kept.txt').read_text()))      # what came after the last position was not kept
    subprocess.run([sys.executable, '-c', one, '-1'], env=env, check=True)
    assert Path('seen.txt').read_text()==whole
    print(f'killed three times; {whole.count(chr(10)):,} rows of two epochs in the same order')

def test_ranks_and_workers_share_one_sequence(three, monkeypatch):
    monkeypatch.chdir(three)
    make = lambda **kw: texts(['a.jsonl.zst=0.5', 'b.csv=0.3', 'c.parquet=0.2'], '3001', 3, shuffle=500, **kw)
    whole = [r['text'] for r in make()]; assert len(whole)==3001
    for ranks,workers in ((1,1), (2,1), (3,1), (4,1), (1,2), (2,2), (3,4)):
        parts = [[r['text'] for r in make(rank=r, ranks=ranks, worker=w, workers=workers)] for r in range(ranks) for w in range(workers)]
        assert sum(map(len, parts))==3001 and [t for row in itertools.zip_longest(*parts) for t in row if t]==whole
    print('1 to 12 processes, 3,001 rows, none lost or read twice')

def test_strategies_lose_nothing(three, monkeypatch):
    monkeypatch.chdir(three)
    counts = dict(a=3000, b=2000, c=700)
    for strategy in ('weighted', 'equal', 'proportional'):
        s = texts(['a.jsonl.zst=0.5', 'b.csv=0.3', 'c.parquet=0.2'], strategy=strategy)
        seen = {}
        for r in s: seen[r['text'].split(' word')[0]] = seen.get(r['text'].split(' word')[0], 0) + 1
        assert len({k for k in seen})==5700
        if strategy=='proportional': assert set(seen.values())=={1}
        else: assert all(abs(r['share']-w)<.01 for r,w in zip(s.last, (.5, .3, .2) if strategy=='weighted' else (1/3, 1/3, 1/3)))
        assert all(r['passes']>=1 and r['rows']>=n for r,n in zip(s.last, counts.values()))
    print('every row of three sources under three strategies')

def test_world_is_what_it_was():
    assert [r['text'] for r in texts(size=300, seed=2)]==[r['text'] for r in World(2).texts(300)]
    assert [(r['query'], r['positive'], r['negatives']) for r in pairs(size=300)]==[(r['query'], r['positive'], r['negatives']) for r in World().pairs(300)]
    assert sum(1 for _ in texts())==20_000
    print('the built-in corpus alone keeps its rows and their order')

# -------------------------------------------------------------------------------------------------------------------- leaks

def test_leaks_are_found_and_kept_out(tmp_path):
    sets = evaluation_texts('world', ('queries',))
    asked = [q for qs in sets.values() for q in qs if len(q.split())>=8]
    jsonl(tmp_path/'mine.jsonl.zst', [dict(query=r['query'], positive=r['positive']) for r in World().pairs(2000)]
          + [dict(query=q.upper()+'!', positive='a') for q in asked])
    guard = LeakGuard(sets); t = time.time()
    kept = list(guard.filter(pairs(str(tmp_path/'mine.jsonl.zst'), shuffle=300)))
    assert len(asked)<=guard.dropped<=len(asked)+4 and not {q.upper()+'!' for q in asked} & {r['query'] for r in kept}
    assert sum(h['whole'] for h in guard.report())==len(asked)
    print(f'{len(asked)} planted questions dropped and {guard.dropped-len(asked)} near ones, of {guard.seen:,} rows; {guard.seen/(time.time()-t):,.0f} rows/s')

def test_guard_memory_is_bounded():
    rng = random.Random(0); words = [f'w{i}' for i in range(5000)]
    guard = LeakGuard(dict(a=[' '.join(rng.choices(words, k=2000)) for _ in range(500)]))
    assert len(guard.owner)==500*64
    text = ' '.join(guard.texts[7].split()[500:900]); assert guard.check(text).text==guard.texts[7]
    assert guard.check(' '.join(rng.choices(words, k=2000))) is None
    size = sum(a.nbytes for a in vars(guard).values() if hasattr(a, 'nbytes'))
    print(f'{sum(map(len, guard.texts))>>20} MB guarded by {len(guard.owner):,} runs; {size>>10} kB of arrays')
