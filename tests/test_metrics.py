"Every ranking figure against pytrec_eval, query by query, to 1e-12."
import numpy as np
import pytest
import pytrec_eval

from chroma_moe.metrics import by_score, score_queries, score_run

THEIRS = {'ndcg@10': 'ndcg_cut_10', 'ndcg@3': 'ndcg_cut_3', 'ndcg': 'ndcg', 'mrr': 'recip_rank', 'map': 'map', 'map@10': 'map_cut_10', 'map@100': 'map_cut_100',
          'precision@5': 'P_5', 'precision@10': 'P_10', 'recall@10': 'recall_10', 'recall@100': 'recall_100'}
ASK = {'ndcg_cut.3,10', 'ndcg', 'recip_rank', 'map', 'map_cut.10,100', 'P.5,10', 'recall.10,100'}

def compare(scores, qrels):
    "Largest difference between our figures and theirs, over queries and figures."
    theirs = pytrec_eval.RelevanceEvaluator(qrels, ASK).evaluate(scores)
    ours = score_queries({q: by_score(s) for q,s in scores.items()}, qrels, tuple(THEIRS))
    return max(abs(ours[f][i]-theirs[q][t]) for i,q in enumerate(qrels) for f,t in THEIRS.items() if q in theirs), theirs

def judgements(rng, queries=150, docs=200, judged=30, grades=4):
    names = np.array([f'd{i}' for i in range(docs)])
    return names, {f'q{i}': {d: int(g) for d,g in zip(rng.choice(names, judged, replace=False), rng.integers(0, grades, judged))} for i in range(queries)}

@pytest.mark.parametrize('what', ['graded', 'ties', 'all_equal', 'short', 'yes_or_no'])
def test_against_pytrec_eval(what):
    rng = np.random.default_rng(dict(graded=0, ties=1, all_equal=2, short=3, yes_or_no=4)[what])
    names,qrels = judgements(rng, grades=2 if what=='yes_or_no' else 4)
    n = 7 if what=='short' else 150
    draw = {'ties': lambda: rng.integers(0, 5, n)/4., 'all_equal': lambda: np.ones(n)}.get(what, lambda: rng.permutation(n)*1.)
    scores = {q: {d: float(s) for d,s in zip(rng.choice(names, n, replace=False), draw())} for q in qrels}
    worst,_ = compare(scores, qrels)
    assert worst<=1e-12
    print(f'{what}: {len(qrels)} queries, {len(THEIRS)} figures, largest difference {worst:.1e}')

def test_unjudged_documents():
    names,qrels = judgements(np.random.default_rng(5), judged=3)
    scores = {q: {d: float(-i) for i,d in enumerate(names)} for q in qrels}
    worst,_ = compare(scores, qrels)
    assert worst<=1e-12
    print(f'197 of 200 ranked documents unjudged: largest difference {worst:.1e}')

def test_queries_without_a_right_document():
    qrels = dict(a=dict(x=0, y=0), b=dict(x=2))
    worst,theirs = compare(dict(a=dict(x=1., y=.5), b=dict(x=1.)), qrels)
    assert worst<=1e-12 and theirs['a']['ndcg']==0
    print('a query with no right document is 0 in both')

def test_missing_rankings():
    "pytrec_eval leaves a query that the run forgot out of its answer; here it counts 0, as with trec_eval's -c."
    names,qrels = judgements(np.random.default_rng(6), queries=40)
    scores = {q: {d: float(-i) for i,d in enumerate(names)} for q in list(qrels)[::2]}
    worst,theirs = compare(scores, qrels)
    ours = score_queries({q: by_score(s) for q,s in scores.items()}, qrels, tuple(THEIRS))
    assert worst<=1e-12 and len(theirs)==20
    for f in THEIRS: assert all(v==0 for v in ours[f][1::2])
    mean = score_run({q: by_score(s) for q,s in scores.items()}, qrels, figures=('ndcg@10',))['ndcg@10']
    assert abs(mean - sum(t['ndcg_cut_10'] for t in theirs.values())/40)<=1e-12
    print('20 of 40 queries without a ranking: they are 0, the mean is over 40')

def test_empty():
    qrels = dict(a=dict(x=1))
    assert set(score_run({}, qrels, figures=tuple(THEIRS)).values())=={0.} and set(score_run(dict(a=[]), qrels, figures=tuple(THEIRS)).values())=={0.}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, ASK).evaluate(dict(a={}))
    assert all(v==0 for q in theirs.values() for v in q.values())
    print('an empty run and an empty ranking are 0 in every figure')

def test_order_of_ties():
    "The one difference: we take an order, they make one from scores, and of equal scores take the larger id first."
    qrels,scores = dict(a=dict(d1=1)), dict(a=dict(d1=.5, d2=.5))
    assert pytrec_eval.RelevanceEvaluator(qrels, ASK).evaluate(scores)['a']['recip_rank']==.5
    assert score_run(dict(a=list(scores['a'])), qrels, figures=('mrr',))['mrr']==1.
    assert score_run(dict(a=by_score(scores['a'])), qrels, figures=('mrr',))['mrr']==.5
    print('ties: a ranking is taken as it stands, by_score gives the order that trec_eval would make')
