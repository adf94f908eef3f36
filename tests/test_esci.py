"ESCI on small files of the real columns: figures by hand under both tables, doubles, order of rows, a run that is cut off, faults."
import itertools, json, math, random
from functools import partial

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest

from chroma_moe import esci
from chroma_moe.config import ChromaError
from chroma_moe.esci import esci_rows, judge, judgements, random_ndcg, run_esci
from chroma_moe.mteb_tasks import offline

@pytest.fixture(autouse=True)
def few_resamples(monkeypatch): monkeypatch.setattr(esci, 'bootstrap', partial(esci.bootstrap, n=20))

# query id, country, query, [(product, title, label, small version, split)]
LISTS = [
    (1, 'us', 'red shoes', [('B1','red running shoes','Exact',1,'test'), ('B2','red sandals','Substitute',1,'test'),
                            ('B3','shoe polish, red','Complement',1,'test'), ('B4','garden hose','Irrelevant',1,'test')]),
    (2, 'us', 'lamp', [('B5','desk lamp','Exact',1,'test'), ('B6','light bulb','Complement',1,'test'), ('B7','floor lamp','Exact',1,'test')]),
    (2, 'es', 'lampara', [('B5','lampara de mesa','Exact',1,'test'), ('B9','mesa','Irrelevant',1,'test')]),
    (3, 'jp', '赤い靴', [('B8','青い靴','Irrelevant',1,'test'), ('BA','赤い帽子','Irrelevant',1,'test')]),
    (4, 'us', 'easy one', [('BB','easy one','Exact',0,'test')]),
    (5, 'us', 'seen in training', [('BC','seen','Exact',1,'train')])]

def rows_of(lists=LISTS):
    return [dict(example_id=i, query=q, query_id=n, product_id=p, product_locale=l, esci_label=label, small_version=small, large_version=1, split=split,
                 product_title=t, product_description=None, product_bullet_point=None, product_brand='Acme', product_color=None)
            for i,(n,l,q,products) in enumerate(lists) for p,t,label,small,split in products]

def write(path, rows):
    if path.suffix=='.parquet': pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else: path.write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='utf-8')
    return path

class Planned:
    "A system whose cosines are what the test says: product title -> cosine."
    name,fingerprint = 'planned','0'*64
    def __init__(self, **cosine): self.cosine,self.asked = cosine,[]
    def vectors(self, texts, role='document'):
        self.asked += texts
        c = np.array([1. if role=='query' else self.cosine.get(t.partition('\n')[0].replace(' ','_'), 0.) for t in texts])
        return np.stack([c, np.sqrt(1-c**2)*(role!='query')], 1).astype(np.float32)

WORST = dict(garden_hose=.9, **{'shoe_polish,_red': .8}, red_sandals=.7, red_running_shoes=.6,
             light_bulb=.9, desk_lamp=.5, floor_lamp=.4, mesa=.5, lampara_de_mesa=.1)

def value(rows, **want):
    found, = [r for r in rows if all(r[k]==v for k,v in want.items())]
    return found['value']

def dcg(*g): return sum(x/math.log2(i+2) for i,x in enumerate(g))

def test_figures_by_hand(tmp_path):
    rows = run_esci(Planned(**WORST), tmp_path, data=write(tmp_path/'a.jsonl', rows_of()))
    for name,s,c in (('paper',.1,.01), ('official_script',.01,.1)):
        us = [dcg(0, c, s, 1)/dcg(1, .1, .01, 0), dcg(c, 1, 1)/dcg(1, 1, c)]              # the best order of the first: the larger of S and C second
        es = dcg(0, 1)/dcg(1, 0)
        for k in ('', '@10'):
            got = lambda place: value(rows, task=place, system='planned', metric=f'ndcg{k} gains={name}')
            assert abs(got('us')-np.mean(us))<1e-12 and abs(got('es')-es)<1e-12 and got('jp')==0
            assert abs(got('all')-np.mean([*us, es, 0]))<1e-12
    assert {r['items'] for r in rows if r['task']=='us'}=={2} and len(rows)==4*4*3
    print(f"{len(rows)} rows; us {value(rows, task='us', system='planned', metric='ndcg gains=paper'):.4f}, by hand the same")

def test_perfect_order_is_below_one_under_the_swapped_table(tmp_path):
    best = Planned(red_running_shoes=.9, red_sandals=.8, **{'shoe_polish,_red': .7}, desk_lamp=.9, floor_lamp=.8, lampara_de_mesa=.9)
    rows = run_esci(best, tmp_path, data=write(tmp_path/'a.jsonl', rows_of()), locales='us')
    paper,script = (value(rows, task='us', system='planned', metric=f'ndcg gains={g}') for g in esci.GAINS)
    assert paper==1 and script==pytest.approx((dcg(1, .01, .1, 0)/dcg(1, .1, .01, 0) + 1)/2, abs=1e-12) and script<1
    print(f'E>S>C>I: {paper} under the paper, {script:.4f} under the script')

def test_cut(tmp_path):
    many = [(1, 'us', 'q', [(f'B{i:02}', f't{i}', 'Exact' if i==11 else 'Irrelevant', 1, 'test') for i in range(12)])]
    rows = run_esci(Planned(**{f't{i}': .9-i/100 for i in range(12)}), tmp_path, data=write(tmp_path/'a.jsonl', rows_of(many)), locales='us', gains='paper')
    assert value(rows, system='planned', metric='ndcg@10 gains=paper')==0
    assert value(rows, system='planned', metric='ndcg gains=paper')==pytest.approx(1/math.log2(13))
    assert value(rows, system='chance', metric='ndcg@10 gains=paper')==pytest.approx(sum(1/math.log2(i+2) for i in range(10))/12)
    print('an exact product in place 12: 0 at 10, 1/log2(13) in the whole list')

def test_baselines(tmp_path):
    rows = run_esci(Planned(), tmp_path, data=write(tmp_path/'a.jsonl', rows_of()), gains='paper', locales=('us','jp'))
    g = [1, .1, .01, 0]
    exact = np.mean([dcg(*p)/dcg(*g) for p in itertools.permutations(g)])
    assert random_ndcg(g)==pytest.approx(exact, abs=1e-12)
    assert value(rows, task='us', system='BM25', metric='ndcg gains=paper')>value(rows, task='us', system='chance', metric='ndcg gains=paper')
    assert value(rows, task='jp', system='BM25', metric='ndcg gains=paper')==0                                     # nothing to gain: 0, not left out
    print(f'chance {exact:.4f} is the mean over all 24 orders')

def test_doubles_order_and_formats(tmp_path):
    rows = rows_of(); doubled = rows+[r|dict(esci_label='Irrelevant') for r in rows[:3]]+[rows[0]|dict(product_id='BX', esci_label=None)]
    random.Random(1).shuffle(head := doubled[len(rows):])
    figures = [run_esci(Planned(**WORST), tmp_path/str(i), data=write(tmp_path/f'x{i}{s}', r)) for i,(s,r) in enumerate(
        [('.jsonl', rows), ('.parquet', rows), ('.jsonl', rows+head), ('.jsonl', rows[::-1]), ('.jsonl', rows[::2]+rows[1::2])])]
    plain = [[(r['task'], r['metric'], r['system'], r['value']) for r in f] for f in figures]
    assert all(p==plain[0] for p in plain[1:3])
    assert all(a[:3]==b[:3] and abs(a[3]-b[3])<1e-12 for p in plain[3:] for a,b in zip(p, plain[0]))
    assert sum(1 for _ in judgements(tmp_path/'x2.jsonl'))==11
    folder = tmp_path/'copy'/'data'; folder.mkdir(parents=True)
    write(folder/'test-00000-of-00001.parquet', rows); write(folder/'train-00000-of-00001.parquet', rows_of([LISTS[-1]]))
    assert [r['product_id'] for r in judgements(tmp_path/'copy')]==[r['product_id'] for r in judgements(tmp_path/'x0.jsonl')]
    print('jsonl = parquet = folder; doubles, unjudged products and the order of rows change nothing')

def test_small_version_and_ties(tmp_path):
    path = write(tmp_path/'a.jsonl', rows_of())
    small,large = (judge(Planned(), judgements(path, small=s)) for s in (True, False))
    assert set(large)-set(small)=={('us','4')} and not [k for k in large if k[1]=='5']
    rows = esci_rows(small, locales=('us',))
    assert value(rows, system='ChromaMoE', metric='ndcg gains=paper')==pytest.approx((1 + dcg(1, .01, 1)/dcg(1, 1, .01))/2)     # all tie: by product id
    print('small: 4 queries, large: 5; the split train is never read; ties go by product id')

def test_resumes(tmp_path):
    path,first = write(tmp_path/'a.jsonl', rows_of()),Planned(**WORST)
    whole = run_esci(first, tmp_path, data=path)
    kept = next(tmp_path.glob('esci-*.jsonl')); text = kept.read_text(); lines = text.splitlines(True)
    again = Planned(**WORST)
    assert run_esci(again, tmp_path, data=path)==whole and not again.asked
    kept.write_text(''.join(lines[:4])+lines[4][:9])
    half = Planned(**WORST)
    assert run_esci(half, tmp_path, data=path)==whole and 0<len(half.asked)<len(first.asked)
    other = Planned(**WORST); other.fingerprint = '1'*64
    run_esci(other, tmp_path, data=path); assert len(other.asked)==len(first.asked)
    changed = Planned(**WORST); rows = rows_of(); rows[0]['product_title'] = 'red boots'
    run_esci(changed, tmp_path, data=write(path, rows)); assert sorted(changed.asked)==['red boots\nBrand: Acme','red shoes']
    print(f'{len(first.asked)} texts, then 0; after a cut {len(half.asked)}; all for other weights; 2 for one changed product')

def test_faults(tmp_path):
    def refused(rows, says, **kw):
        with pytest.raises(ChromaError) as e: run_esci(Planned(), tmp_path, data=write(tmp_path/'f.jsonl', rows), **kw)
        assert says in str(e.value), e.value
    rows = rows_of()
    refused([{k: v for k,v in r.items() if k!='esci_label'} for r in rows], "there is no column 'esci_label'")
    refused([{k: v for k,v in r.items() if k!='small_version'} for r in rows], "there is no column 'small_version'")
    refused([r|dict(esci_label='Great') for r in rows], "'esci_label' is 'Great': it must be one of Exact")
    refused([r|dict(split='train') for r in rows], 'none is a judged one of the test split')
    refused(rows, "there is no country 'fr'", locales='fr')
    refused(rows, "gains is 'swapped': give paper or official_script", gains='swapped')
    with pytest.raises(ChromaError, match='no file or folder'): run_esci(Planned(), tmp_path, data=tmp_path/'none.parquet')
    none = [r for r in run_esci(Planned(), tmp_path, data=write(tmp_path/'f.jsonl', rows_of(LISTS[:2])), locales=('us','jp')) if r['task']=='jp']
    assert {(r['value'], r['note']) for r in none}=={(None, "no query of country 'jp' was read")}
    print('columns, labels, splits, countries, gains: each refused in one sentence')

def test_no_hub(tmp_path, monkeypatch):
    def gone(*a, **k): raise ConnectionError('no route')
    monkeypatch.setattr('chroma_moe.sources.hub', gone)
    row, = run_esci(Planned(), tmp_path)
    assert row['value'] is None and 'tasksource/esci' in row['note'] and 'the hub cannot be reached' in row['note'] and 'as data' in row['note']
    monkeypatch.undo()
    with offline(): assert 'switched off by HF_HUB_OFFLINE' in run_esci(Planned(), tmp_path)[0]['note']
    rows = run_esci(Planned(), tmp_path, debug=True)
    assert {r['note'] for r in rows}=={'a stand-in from the built-in world, not ESCI'} and all(0<r['value']<1 for r in rows)
    print(row['note'])
