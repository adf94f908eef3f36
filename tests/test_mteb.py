"A model in MTEB: conformance, passport, FinMTEB's classes on small data of the real columns, averages, resume, faults."
import json
from collections import Counter
from types import SimpleNamespace

import datasets, numpy as np, pytest, torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from chroma_moe import mteb_tasks
from chroma_moe.config import ChromaError, load_config
from chroma_moe.encoder import ASK, ChromaMoE
from chroma_moe.metrics import average_precision, ndcg_at, spearman
from chroma_moe.model import ChromaModel
from chroma_moe.mteb_tasks import (DOUBLED, FINMTEB, MtebEncoder, finmteb_tasks, means, model_meta, offline, run_finmteb, run_mteb,
                                   score_tasks, stand_ins, trained_on)
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

torch.set_num_threads(1)

@pytest.fixture(scope='module')
def h(tmp_path_factory):
    "A small model, small data in the columns of the real sets, and one run of all of it."
    home = tmp_path_factory.mktemp('mteb')
    before,datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE,home/'cache'
    tokenizer = ChromaTokenizer.train([r['text'] for r in World().texts('200')], 800)
    make = lambda seed=0, **kw: ChromaMoE(seeded(tokenizer, seed), tokenizer, 64, **kw)
    names = stand_ins(home/'data', 20)
    encoder = make()
    seen = counted(encoder)
    rows = score_tasks(encoder, finmteb_tasks(names, home/'data'), home/'out', 'finmteb')
    yield SimpleNamespace(home=home, make=make, encoder=encoder, seen=seen, first=len(seen), names=names, rows=rows,
        value={r['task']: r['value'] for r in rows},
        read=lambda name, file='test': [json.loads(l) for l in (home/'data'/name/f'{file}.jsonl').read_text().splitlines()])
    datasets.config.HF_DATASETS_CACHE = before

def seeded(tokenizer, seed):
    model = ChromaModel(load_config(profile='tiny', sets=[f'model.vocab_size={len(tokenizer)}']).model)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))*.02)
    return model

def counted(encoder):
    "The texts that `encode` is given, with the role and the words before them."
    seen,plain = [],encoder.encode
    def encode(texts, prompt_name='document', prompt=None, **kw):
        seen.extend((t, prompt_name, prompt) for t in texts)
        return plain(texts, prompt_name=prompt_name, prompt=prompt, **kw)
    encoder.encode = encode
    return seen

def vectors(h, texts, role='document'): return type(h.encoder).encode(h.encoder, texts, prompt_name=role).astype(np.float64)
def cosines(h, a, b): return (vectors(h, a)*vectors(h, b)).sum(-1)

# ------------------------------------------------------------------------------------------------------------------- the table

def test_counts():
    assert Counter(t.type for t in FINMTEB.values())==dict(STS=2, Retrieval=10, Classification=8, Clustering=6,
                                                           Reranking=3, PairClassification=3, Summarization=3)
    tasks = finmteb_tasks()
    assert [t.metadata.name for t in tasks]==list(FINMTEB) and len(tasks)==35
    for t in tasks:
        f,m = FINMTEB[t.metadata.name],t.metadata
        assert (m.type, m.main_score, m.eval_splits, m.dataset)==(f.type, f.metric, [f.split], dict(path=f.data, revision=f.revision))
    assert len({(t.data, t.split) for t in FINMTEB.values()})==34                       # one data set counts twice
    print('35 tasks, by type 2, 10, 8, 6, 3, 3, 3, on 34 data sets')

# ------------------------------------------------------------------------------------------- values, from a file to a score

def test_similarity_types(h):
    sts,text,pairs = h.read('Final'),h.read('ECTsum'),h.read('HeadlinePDU-PairClassification')
    assert h.value['FINAL']==pytest.approx(spearman(cosines(h, *zip(*((r['sentence1'], r['sentence2']) for r in sts))), [r['score'] for r in sts]), abs=2e-6)
    assert h.value['Ectsum']==pytest.approx(spearman(cosines(h, *zip(*((r['text'], r['summary']) for r in text))), [r['score'] for r in text]), abs=2e-6)
    a,b = (vectors(h, [r[k] for r in pairs]) for k in ('sent1','sent2'))
    best = max(average_precision_score([r['labels'] for r in pairs], s) for s in ((a*b).sum(-1), -np.abs(a-b).sum(-1)))
    assert h.value['HeadlinePDUPairClassification']==h.value[DOUBLED]==pytest.approx(best, abs=2e-6)
    print(f"STS {h.value['FINAL']:.3f}, summaries {h.value['Ectsum']:.3f}, pairs {best:.3f}: as computed from the files")

def test_retrieval_and_reranking(h):
    corpus,queries,qrels = ({r.get('_id'): r['text'] for r in h.read('FiQA', f)} if f!='qrels' else h.read('FiQA', f) for f in ('corpus','queries','qrels'))
    s = vectors(h, list(queries.values()), 'query') @ vectors(h, list(corpus.values())).T
    grades = {q: {r['corpus-id']: r['score'] for r in qrels if r['query-id']==q} for q in queries}
    ours = [ndcg_at([list(corpus)[i] for i in np.argsort(-row)], grades[q]) for q,row in zip(queries, s) if grades[q]]
    assert h.value['FiQA2018Retrieval']==pytest.approx(np.mean(ours), abs=1e-5)
    aps = []
    for r in h.read('FinFact-reranking'):
        if not (r['positive'] and r['negative']): continue
        texts = r['positive']+r['negative']
        order = np.argsort(-(vectors(h, [r['query']], 'query') @ vectors(h, texts).T)[0])
        aps.append(average_precision(order.tolist(), {i: float(i<len(r['positive'])) for i in range(len(texts))}))
    assert h.value['FinFactReranking']==pytest.approx(np.mean(aps), abs=1e-5)
    print(f'nDCG@10 {np.mean(ours):.4f} of {len(ours)} queries, MAP {np.mean(aps):.4f} of {len(aps)}: as ours')

def test_classification_and_clustering(h):
    train,test = h.read('FOMC', 'train'),h.read('FOMC')
    assert set(train[0])=={'sentence','label','label_text'} and 0.5<h.value['FOMCClassification']<=1
    result, = (h.home/'out'/'finmteb').rglob('FOMCClassification.json')
    runs = [e['accuracy'] for e in json.loads(result.read_text())['scores']['test'][0]['scores_per_experiment']]
    x = LogisticRegression(max_iter=100).fit(vectors(h, [r['sentence'] for r in train]), [r['label'] for r in train])
    whole = x.score(vectors(h, [r['sentence'] for r in test]), [r['label'] for r in test])
    assert len(runs)==10 and np.mean(runs)==pytest.approx(h.value['FOMCClassification'], abs=1e-5) and abs(whole-np.mean(runs))<.25
    result, = (h.home/'out'/'finmteb').rglob('FinanceArxivS2SClustering.json')
    v = json.loads(result.read_text())['scores']['test'][0]['v_measures']
    assert len(v)==len(h.read('FinanceArxiv-s2s')) and np.mean(v)==pytest.approx(h.value['FinanceArxivS2SClustering'], abs=1e-5)
    print(f'accuracy {np.mean(runs):.3f} over 10 samples of 8 a class ({whole:.3f} on all of them); v-measure over {len(v)} sets')

def test_every_class_reads_its_columns(h, tmp_path):
    "The tasks of a type differ in name and columns only: one with other columns says so in its row."
    folder = tmp_path/'FinSTS'; folder.mkdir()
    (folder/'test.jsonl').write_text(''.join(json.dumps(dict(a='x', b='y', score=.5))+'\n' for _ in range(4)))
    bad,none = score_tasks(h.encoder, finmteb_tasks(['FinSTS'], tmp_path), tmp_path/'out', 'finmteb')+score_tasks(
        h.encoder, finmteb_tasks(['FLSClassification'], tmp_path), tmp_path/'out', 'finmteb')
    assert bad['value'] is None and 'sentence1' in bad['note'] and 'check its columns' in bad['note']
    assert none['value'] is None and 'there is no copy in' in none['note'] and 'FLS' in none['note']
    print(bad['note'].partition(': ')[2])

# ---------------------------------------------------------------------------------------------------------------------- averages

def test_averages():
    rows = [dict(task=n, value=(i%7)/7, note='') for i,n in enumerate(FINMTEB)]
    value = {r['task']: r['value'] for r in rows}
    by_type = {k: [value[t.name] for t in FINMTEB.values() if t.type==k] for k in dict.fromkeys(t.type for t in FINMTEB.values())}
    got = {r['task']: r['value'] for r in means(rows)}
    assert len(got)==9 and got['average']==pytest.approx(np.mean([np.mean(v) for v in by_type.values()]), abs=1e-12)
    by_type['PairClassification'] = [value[t.name] for t in FINMTEB.values() if t.type=='PairClassification' and t.name!=DOUBLED]
    assert got[f'average without {DOUBLED}']==pytest.approx(np.mean([np.mean(v) for v in by_type.values()]), abs=1e-12)!=got['average']
    gone = means([r|dict(value=None) if r['task']==DOUBLED else r for r in rows])
    assert [r['value'] is None for r in gone]==[False]*5+[True,False,True,False]
    print(f"average {got['average']:.4f}, without the doubled set {got[f'average without {DOUBLED}']:.4f}; a missing task leaves no average")

# ------------------------------------------------------------------------------------------------------------------------ resume

def test_second_run_computes_nothing(h):
    assert h.first>0 and score_tasks(h.encoder, finmteb_tasks(h.names, h.home/'data'), h.home/'out', 'finmteb')==h.rows and len(h.seen)==h.first
    (next((h.home/'out').rglob('FINAL.json'))).unlink()                                             # as after a kill before its last task
    assert score_tasks(h.encoder, finmteb_tasks(h.names, h.home/'data'), h.home/'out', 'finmteb')==h.rows
    once = len(h.seen)-h.first
    assert once==2*len(h.read('Final'))
    changed = h.home/'changed'; (changed/'Final').mkdir(parents=True)
    lines = (h.home/'data/Final/test.jsonl').read_text().splitlines(True)
    (changed/'Final/test.jsonl').write_text(''.join(lines[:9]))
    fewer, = score_tasks(h.encoder, finmteb_tasks('FINAL', changed), h.home/'out', 'finmteb')
    assert fewer['value']!=h.value['FINAL'] and len(h.seen)==h.first+once+18                            # other data are not the same task
    other = h.make(1); seen = counted(other)
    assert score_tasks(other, finmteb_tasks('FINAL', h.home/'data'), h.home/'out', 'finmteb')[0]['value']!=h.value['FINAL'] and seen
    print(f'{h.first} texts, then 0; {once} for one lost file; other data and other weights are scored anew')

def test_two_tasks_of_one_name(h):
    "MTEB has a FinQARetrieval of its own; their results must not be taken for each other."
    import mteb
    theirs,ours = mteb.get_task('FinQARetrieval').metadata,finmteb_tasks('FinQARetrieval')[0].metadata
    assert theirs.name==ours.name and theirs.dataset!=ours.dataset
    assert theirs.dataset['revision'][:12]!=ours.dataset['revision'][:12]
    print(theirs.dataset['path'], 'and', ours.dataset['path'], 'lie in two folders')

@pytest.mark.long
def test_other_libraries(h):
    "A folder in sentence-transformers scores as the same model here, and two such folders are not taken for each other."
    import chroma_moe.hf                                                                            # noqa: F401
    from sentence_transformers import SentenceTransformer
    values = {}
    for seed in (0, 1):
        folder = h.home/f'st{seed}'; h.make(seed).save_pretrained(folder)
        row, = score_tasks(SentenceTransformer(str(folder), device='cpu'), finmteb_tasks('FINAL', h.home/'data'), h.home/'out', 'finmteb')
        values[seed] = row['value']
    assert values[0]==pytest.approx(h.value['FINAL'], abs=1e-4) and abs(values[1]-values[0])>1e-4 and row['system']=='SentenceTransformer'
    print('spearman', values)

# ------------------------------------------------------------------------------------------------------------ protocol and passport

@pytest.mark.long
def test_conformance(h, tmp_path):
    row, = run_mteb(h.make(), tmp_path, debug=True)
    assert row['value']==1 and row['items']>=20 and 'failed' not in row['note']
    print(f"all {row['items']} mock tasks ran")

def test_passport(h):
    from mteb.models.models_protocols import EncoderProtocol
    about = dict(training=[dict(phase='pre-training', data=['edgar:2020','world']), dict(phase='tuning', data=['esci:small@/x','nq'])])
    e = h.make(about=about, prompts=dict(Retrieval=ASK.format('find')))
    m,model = model_meta(e, 'me/mine'),MtebEncoder(e)
    assert isinstance(model, EncoderProtocol) and not isinstance(e, EncoderProtocol)
    assert m.training_datasets=={'edgar','world','ESCIReranking','NQ'} and trained_on(h.make()) is None
    assert m.n_parameters==sum(p.numel() for p in e.model.parameters())>m.n_active_parameters==m.n_active_parameters_override
    assert (m.name, m.revision, m.embed_dim, m.max_tokens, m.similarity_fn_name.value, m.languages)==('me/mine', e.fingerprint, 128, 64, 'cosine', ['eng-Latn'])
    assert m.memory_usage_mb==pytest.approx(m.n_parameters*4/2**20) and m.use_instructions and m.license=='mit' and 'PyTorch' in m.framework
    v = e.encode(['a','b','c'])
    assert torch.allclose(model.similarity(v, v[:2]), torch.tensor(v@v[:2].T), atol=1e-6)
    assert torch.allclose(model.similarity_pairwise(v, v[::-1].copy()), torch.tensor((v*v[::-1]).sum(-1)), atol=1e-6)
    print(f'{m.n_parameters:,} parameters, {m.n_active_parameters:,} active, trained on {", ".join(sorted(m.training_datasets))}')

def test_roles_and_instructions(h):
    e = h.make(prompts=dict(Retrieval='Find: ', query='Ask: ')); seen = counted(e)
    score_tasks(e, finmteb_tasks(['FiQA2018Retrieval','FinFactReranking','FINAL'], h.home/'data'), h.home/'roles', 'x', prompts=dict(STS='Like: '))
    queries = {r['text'] for r in h.read('FiQA', 'queries')}
    used = {(role, words) for t,role,words in seen if t in queries}
    assert used=={('query','Find: '), ('query','Ask: ')}                                     # retrieval, reranking
    assert {(role, words) for t,role,words in seen if t in {r['sentence1'] for r in h.read('Final')}}>={('query','Like: ')}
    assert {(role, words) for t,role,words in seen if t in {r['text'] for r in h.read('FiQA', 'corpus')}}-{('query','Like: ')}=={('document',None)}
    score_tasks(e, finmteb_tasks('FINAL', h.home/'data'), h.home/'roles', 'x'); n = len(seen)
    score_tasks(e, finmteb_tasks('FINAL', h.home/'data'), h.home/'roles', 'x'); assert len(seen)==n          # other words, other results
    assert {(role, words) for t,role,words in seen if t in {r['sentence1'] for r in h.read('Final')}}>={('query','Like: '), ('document',None)}
    print('queries behind their instruction, documents behind none')

def test_not_finite_is_refused(h):
    class Broken(MtebEncoder):
        def __init__(self, encoder):
            super().__init__(encoder)
            self.encoder = SimpleNamespace(encode=lambda texts, **kw: np.full((len(texts), 4), np.nan))
    for task in ('FiQA2018Retrieval','FINAL'):
        with pytest.raises(ChromaError, match=f'{task}: .* embeddings are not finite'):
            score_tasks(Broken(h.make()), finmteb_tasks(task, h.home/'data'), h.home/'nan', 'x')
    e = h.make()
    with torch.no_grad(): next(e.model.parameters()).fill_(float('inf'))
    with pytest.raises(ChromaError, match='not finite'): run_finmteb(e, h.home/'nan', debug=True)
    with pytest.raises(ChromaError, match="precision is 'binary'"):
        MtebEncoder(h.make()).encode([dict(text=['a'])], task_metadata=None, hf_split='', hf_subset='', precision='binary')
    assert not list((h.home/'nan').rglob('FINAL.json'))
    print('a broken model ends the run, and nothing of it is kept')

# ------------------------------------------------------------------------------------------------------------------- without a hub

def test_no_hub(h, monkeypatch):
    from huggingface_hub import constants
    asked,offline_before = [],constants.HF_HUB_OFFLINE
    def gone(*a, **k): asked.append(1); raise ConnectionError('no route')
    monkeypatch.setattr(mteb_tasks, 'hub', gone)
    rows = run_finmteb(h.encoder, h.home/'hub')
    assert len(rows)==35+9 and {r['value'] for r in rows}=={None} and len(asked)==1
    for r in rows[:35]: assert FINMTEB[r['task']].data in r['note'] and 'the hub cannot be reached' in r['note'] and 'hf download' in r['note']
    general = run_mteb(h.encoder, h.home/'hub', tasks=['STSBenchmark','NanoFiQA2018Retrieval'])
    assert [r['value'] for r in general]==[None]*2 and 'mteb/stsbenchmark-sts: the hub cannot be reached' in general[0]['note']
    before = constants.HF_HUB_OFFLINE
    assert before==offline_before
    with offline(): assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE==before
    print(rows[0]['note'])

def test_missing_library(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'mteb', None)
    with pytest.raises(ChromaError, match="pip install 'mteb"): run_finmteb(object(), '.')
    print('without mteb: one sentence')

def test_names():
    for call,says in ((lambda: finmteb_tasks('FinST'), "did you mean 'FinSTS'"),
                      (lambda: mteb_tasks.mteb_tasks(['FiQA2019']), "'FiQA2019' is no task or benchmark")):
        with pytest.raises(ChromaError, match=says): call()
    assert [t.metadata.name for t in mteb_tasks.mteb_tasks()[1]]==list(mteb_tasks.MTEB_DEFAULT)
    print('misspelt names get a hint')

@pytest.mark.long
def test_whole_benchmarks():
    name,tasks = mteb_tasks.mteb_tasks('RTEB(fin, beta)')
    assert name=='RTEB(fin, beta)' and {'FinQARetrieval','FinanceBenchRetrieval'}<={t.metadata.name for t in tasks}
    assert len(mteb_tasks.mteb_tasks('MTEB(eng, v2)')[1])==41
    with pytest.raises(ChromaError, match="'MTEB.eng, v9.' is no task or benchmark"): mteb_tasks.mteb_tasks('MTEB(eng, v9)')
    print(name, 'has', len(tasks), 'tasks')
