"Phase 2 as whole commands and on several processes: the gradient of one, two and four must be that of one batch in one piece."
import json, re, signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chroma_moe.checkpoints import Checkpoints
from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.gradcache import GradCache
from chroma_moe.losses import Contrast
from chroma_moe.model import ChromaModel
from chroma_moe.moe import routing_loss
from chroma_moe.packing import pack
from chroma_moe.parallel import Ranks, sum_gradients
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.tune import PairBatches, load_pairs, tokenise_pairs
from chroma_moe.world import World

from test_training import EXACT, Home, assert_same, furthest, last_step, rows, saved, text_of, wait_for, weights

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    h = Home(tmp_path_factory.mktemp('home'))
    h.first = h.folder/'first'
    ChromaMoE(ChromaModel(load_config(profile='tiny', sets=MODEL).model), ChromaTokenizer.load(h.folder/'tokenizer'), 64).save_pretrained(h.first)
    yield h
    h.nursery.stdin.close(); h.nursery.wait(60)

MODEL = 'model.vocab_size=1024','model.dim=64','model.layers=2'
TUNE = *EXACT, 'data.size=150', 'tune.steps=12', 'tune.instructions=[find what answers]', 'tune.matryoshka=[16,32]', 'train.save_every=3', 'train.log_every=1'

# The exact step

CASES = dict(
    infonce=('tune.losses=[infonce]', 'tune.matryoshka=[8,16]', 'model.moe.balance=1', 'train.micro_tokens=150'),
    mixed=('tune.losses=[infonce,rare=own+listwise]', 'tune.symmetric=true', 'tune.too_good=0.2', 'tune.retain=0.5', 'train.micro_tokens=150'),
    order=('tune.losses=[cosent,rare=distil]', 'model.checkpoint=true', 'model.moe.score=sigmoid', 'model.moe.z_loss=0.01', 'train.micro_tokens=200'),
    apart=('tune.mix=source', 'tune.batches=2', 'tune.negatives=0', 'train.micro_tokens=100'))

def case(sets, folder):
    "A configuration, its model and pairs; sources, grades and lengths are uneven, and queries ask the same."
    c = load_config(profile='tiny', sets=[*MODEL, 'tune.batch_pairs=10', 'tune.negatives=2', *sets])
    data = [r|dict(source='rare' if i%5==4 else 'often', query_id=r['query_id'] if i%3 else 'the same', score=.1*(i%11),
                   scores=[1.,.5,.2][:1+len(r['negatives'])],
                   positive=r['positive'] if i%7 else 'one text for many') for i,r in enumerate(World().pairs('40'))]
    p = tokenise_pairs(data, ChromaTokenizer.load(f'{folder}/tokenizer'), 64, c.tune.negatives, 32, c.tune.losses)
    model = ChromaModel(c.model).double().train()
    for k,x in model.named_parameters():
        if x.abs().max()==0: x.data.add_(.3*torch.randn(x.shape, generator=torch.Generator().manual_seed(len(k)), dtype=x.dtype))
    t = c.tune
    loss = Contrast(.1, True, t.matryoshka, symmetric=t.symmetric, too_good=None if t.too_good>=2 else t.too_good).double()
    return c, p, model, loss

def cached(name, folder, ranks):
    "Gradients of a step, summed over processes."
    c,p,model,loss = case(CASES[name], folder)
    parts = next(PairBatches(p, c, ranks))
    got = GradCache(loss, c.tune.retain)(parts, model.embed, ranks, c.model.moe)
    named = [*model.named_parameters(), *loss.named_parameters()]
    sum_gradients(ranks, [x for _,x in named])
    out = {k: x.grad for k,x in named if x.grad is not None}
    value,balance = ranks.total(float(got['loss']), float(got['balance']))
    shape = [parts[0].terms, len(parts[0].batch.chunks), *(len(r.query) for r in parts[0].batch.rows)]
    return out|{'the loss': torch.tensor([value/got['terms'], balance], dtype=torch.float64)}, shape

ON_RANKS = '''
sys.path[:0] = [{tests!r}]
from test_tune import CASES, cached
from safetensors.torch import save_file
from chroma_moe.parallel import start
ranks = start()
for name in CASES:
    got,shape = cached(name, {folder!r}, ranks)
    shapes = ranks.collect(shape)
    if ranks.main: save_file(got, '{out}.'+name, dict(shapes=json.dumps(shapes)))
ranks.end()
os._exit(0)
'''

def one_shot(name, folder):
    "All texts in one packed batch with its graph; nothing cached, nothing cut."
    c,p,model,loss = case([*CASES[name], 'train.micro_tokens=0', 'model.checkpoint=false'], folder)
    [(batch,n,_)] = next(PairBatches(p, c)); [chunk] = batch.chunks
    e,stats = model.embed(chunk)
    value = sum(loss(r.loss, e[r.query], e[r.doc], r.group)[0] for r in batch.rows)/n
    (value+routing_loss(stats, c.model.moe)).backward()
    return {k: x.grad for k,x in [*model.named_parameters(), *loss.named_parameters()] if x.grad is not None}, value.item()

def test_ranks_equal_one_shot(home):
    "1, 2 and 4 processes with unequal shares, in float64."
    tests = str(Path(__file__).parent)
    for n in (1,2,4):
        out = home.folder/f'grads{n}'
        home.start(out, ranks=n, name='', first=ON_RANKS.format(tests=tests, folder=str(home.folder), out=out)).end()
        for name in CASES:
            want,value = one_shot(name, home.folder); got = load_file(f'{out}.{name}'); said = got.pop('the loss')
            assert got.keys()==want.keys() and abs(said[0].item()-value)<1e-10
            off = max((got[k]-want[k]).abs().max().item() for k in want); assert off<1e-10, (n, name, off)
            shapes = json.loads(safe_open(f'{out}.{name}', 'pt').metadata()['shapes'])
            print(f'{n} processes, {name}: pairs {[s[0] for s in shapes]}, chunks {[s[1] for s in shapes]}: gradients within {off:.0e}')
            assert n==1 or name!='mixed' or any(0 in s[2:] for s in shapes) or n==2       # somebody has nothing of the rare source
            assert got['log_scale'].abs()>0

def test_half_precision(home):
    "Autocast: two passes give the vectors of one, so that only sums in another order differ."
    class Half(Ranks):
        def __init__(self): super().__init__(precision='bf16')
    grads = {}
    for budget in (0,150):
        c,p,model,loss = case(['model.dropout=0.1', f'train.micro_tokens={budget}'], home.folder); model.float(); loss.float()
        torch.manual_seed(0); got = GradCache(loss)(next(PairBatches(p, c)), model.embed, Half(), c.model.moe)
        assert torch.isfinite(got['loss']); grads[budget] = model.embedding.weight.grad
    exact = {}
    for retain in (0.,1.):                                                                # the same chunks: kept or run again, the same bits
        c,p,model,loss = case(['model.dropout=0.1','train.micro_tokens=150'], home.folder); model.float(); loss.float()
        torch.manual_seed(0); GradCache(loss, retain)(next(PairBatches(p, c)), model.embed, Half(), c.model.moe); exact[retain] = model.embedding.weight.grad
    off = ((exact[0.]-exact[1.]).norm()/exact[0.].norm()).item(); assert off<1e-2, off
    assert all(g.isfinite().all() for g in grads.values())
    print(f'bf16 with dropout: chunks run again or kept, gradients within {off:.0e}')

# The command

def tuned(home, out, *sets, **kw): return home.start(out, *TUNE, *sets, name='chroma_tune', before=['--pretrained',home.first], **kw)

@pytest.fixture(scope='module')
def whole(home):
    out = home.folder/'tuned'; said = tuned(home, out).end(); assert re.search(r'world: nDCG@10 0\.\d+ on 20 held-out queries', said), said
    return out

def test_log(home, whole):
    "What is logged, and what is kept."
    steps,judged = [r for r in rows(whole) if 'loss' in r],[r for r in rows(whole) if 'eval_ndcg' in r]
    last = steps[-1]; assert {'accuracy','temperature','routing','lr','grad_norm'}<=last.keys() and .01<=last['temperature']<=.5
    assert abs(sum(last['right_cosines'])-1)<1e-3 and abs(sum(last['wrong_cosines'])-1)<.3
    best = Checkpoints(whole/'checkpoints').best(); kept = Checkpoints(whole/'checkpoints').load(best)['model']
    assert all(torch.equal(v, weights(whole)[k]) for k,v in kept.items())
    top = max(judged, key=lambda r: r['eval_ndcg']); assert best.name==f"step-{top['step']:08d}"
    print(f"nDCG@10 on held-out pairs {[round(r['eval_ndcg'], 3) for r in judged]}: {best.name} is kept")

def test_words_before_a_query(home, whole):
    "A tuned model asks as it was trained."
    m = ChromaMoE.from_pretrained(whole)
    assert m.prompts=={'query': 'Instruction: find what answers Query: ', 'world': 'Instruction: find what answers Query: '}
    p = tokenise_pairs([dict(query='cheap kicks', positive='sneakers', instruction='find what answers')], m.tokenizer, 64)
    with torch.no_grad(): e = m.model.embed(pack(p.queries, p.prompt))[0][0]
    off = abs(e.numpy()-m.encode_query('cheap kicks')).max(); assert off<1e-6
    assert abs(m.encode_query('cheap kicks')-m.encode_query('cheap kicks', prompt='')).max()>1e-3
    print(f'a query encoded as in training, within {off:.0e}')

def test_chunks_change_nothing(home, tmp_path, whole):
    tuned(home, tmp_path/'few', 'train.micro_tokens=100', 'tune.retain=0.3').end()
    off = furthest(tmp_path/'few', whole); assert off<1e-4, off
    print(f'12 steps in chunks of 100 tokens: weights within {off:.0e} of a run in one piece')

def test_two_processes_equal_one(home, tmp_path, whole):
    "By accelerate, for real."
    launch = 'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m chroma_moe.tune'.split()
    said = text_of(home.shell(launch, '--pretrained', home.first, *home.args(tmp_path/'two', *TUNE, 'train.micro_tokens=200')))
    off = furthest(tmp_path/'two', whole); assert off<1e-4 and 'held-out queries' in said, (off, said)
    a,b = rows(tmp_path/'two'),rows(whole); assert len(a)==len(b) and all(abs(x[k]-y[k])<1e-3 for x,y in zip(a, b) for k in ('loss','eval_loss') if k in x)
    print(f'accelerate launch with 2 processes: weights within {off:.0e} of one')

def test_killed(home, tmp_path, whole):
    "Two processes killed, then one goes on."
    out = tmp_path/'run'; p = tuned(home, out, ranks=2); assert wait_for(p, lambda: last_step(out)>=7); p.kill(); p.end(-9, -9)
    at = saved(out)[-1]; said = tuned(home, out, resume=True).end()
    assert 'saved by 2 processes, resumed by 1' in said and f'resumed at step {int(at[5:])} ' in said
    off = furthest(out, whole); assert off<1e-4, off
    print(f'two processes killed after {at}, one went on: weights within {off:.0e}')

@pytest.mark.long
def test_signal(home, tmp_path, whole):
    out = tmp_path/'run'; p = tuned(home, out, 'train.micro_tokens=100', 'tune.retain=0.5', 'tune.mix=source', 'tune.batches=2')
    assert wait_for(p, lambda: last_step(out)>=4); p.kill(signal.SIGTERM); assert 'stopped by SIGTERM' in p.end(143)
    again = tmp_path/'again'
    for o,resume in ((out,True), (again,False)):
        tuned(home, o, 'train.micro_tokens=100', 'tune.retain=0.5', 'tune.mix=source', 'tune.batches=2', resume=resume).end()
    assert_same(out, again, log=False)
    print('stopped by SIGTERM and resumed: the same bits as never stopped')

def test_own_data(home, tmp_path):
    "A file without a valid split: every hundredth pair is held out, with all that ask the same."
    f = tmp_path/'mine.jsonl'
    f.write_text('\n'.join(json.dumps(dict(query=f'question {i//2}', positive=f'answer {i}', negatives=[f'wrong {i}', f'answer {i}'], score=1-.5*(i%2)))
                           for i in range(400)))
    c = load_config(profile='tiny', sets=[f'data.pairs=[{f}]','tune.losses=[cosent]','tune.negatives=3'])
    p,held = load_pairs(c, ChromaTokenizer.load(home.folder/'tokenizer'))
    assert len(held.queries)==8 and len(p.queries)==392                                     # four questions, each with both of its rows
    assert all(len(d)==2 for d in p.docs) and p.labels[1]==[.5,0.]                           # the copy of the answer is no negative
    print(f'{len(p.queries)} pairs to train on, {len(held.queries)} held out')

@pytest.mark.parametrize('sets,says', [(['tune.matryoshka=[999]'], 'give smaller widths'), (['tune.losses=[nce]'], "the loss is 'nce'"),
                                       (['tune.losses=[shop=own]'], "names the source 'shop'"), (['tune.batch_pairs=9999'], 'lower it'),
                                       (['data.pairs=[none.jsonl]'], 'none.jsonl')])
def test_refused(home, tmp_path, sets, says):
    said = tuned(home, tmp_path/'x', *sets).end(1); assert says in said and 'Traceback' not in said, said
    print(said.strip().splitlines()[-1])
