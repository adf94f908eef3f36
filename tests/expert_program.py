"What test_expert_parallel.py starts on several processes: the same three steps of both phases in every layout, in float64."
import json, os, sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import chroma_moe.tune
from chroma_moe import expert_parallel, training
from chroma_moe.config import load_config
from chroma_moe.expert_parallel import collect_state, run_apart, spread
from chroma_moe.experts import run_experts
from chroma_moe.losses import Contrast
from chroma_moe.model import ChromaModel
from chroma_moe.monitor import MetricsLog
from chroma_moe.moe import MoE, route
from chroma_moe.parallel import Ranks, of_some, start
from chroma_moe.plan import saved_bytes, watch_traffic
from chroma_moe.pretrain import MaskedParts, masked_loss, pretrain
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import Trainer
from chroma_moe.tune import tokenise_pairs, tune
from chroma_moe.world import World

MODEL = ('model.vocab_size=1024','model.dim=64','model.layers=2','model.moe.z_loss=0.01','optim.eps=1e-5','optim.clip=0.5','train.log_every=1',
         'train.save_every=-1','train.micro_tokens=0','pretrain.steps=3','pretrain.batch_tokens=600','tune.steps=3','tune.batch_pairs=10')
CASES = dict(
    masked=('pretrain', 'model.moe.balance=1', 'model.moe.bias_rate=0.01'),
    parts=('pretrain', 'model.moe.balance=0', 'model.moe.z_loss=0', 'train.micro_tokens=60', 'model.checkpoint=true', 'model.moe.every=2', 'model.layers=4'),
    muon=('pretrain', 'optim.name=muon'),
    pairs=('tune', 'model.moe.balance=1', 'tune.negatives=0', 'train.micro_tokens=100', 'tune.matryoshka=[16]'),
    kept=('tune', 'model.moe.balance=0', 'model.moe.z_loss=0', 'train.micro_tokens=70', 'tune.retain=0.6', 'model.moe.score=sigmoid', 'model.checkpoint=true'))
# `pairs` has no text twice in a batch: one process embeds such a text once and two perhaps twice, so that routing counts other tokens
SHARDED = 'masked','parts','pairs'                                   # muon is refused there

def watched():
    "Keep the gradients and norms of every step."
    kept,clip,use = dict(grads=[], norms=[]),training.clip_gradients,Trainer.use
    def clipped(parameters, largest, ranks=None):
        run = kept['run']
        kept['grads'].append(collect_state({n: p.grad.detach().clone() for n,p in run.named if p.grad is not None}, run.ranks, everywhere=True))
        kept['norms'].append(clip(parameters, largest, ranks)); return kept['norms'][-1]
    def used(self, *args, **kw):
        use(self, *args, **kw); kept['run'] = self
        kept['held'] = sum(p.numel() for p in self.model.parameters() if of_some(p))
    training.clip_gradients,Trainer.use,chroma_moe.tune.Contrast = clipped,used,lambda *args, **kw: Contrast(*args, **kw).double()
    def undo(): training.clip_gradients,Trainer.use,chroma_moe.tune.Contrast = clip,use,Contrast
    return kept, undo

def three_steps(name, folder, ranks):
    "Losses, gradients and weights of a case, as tensors."
    phase,*sets = CASES[name]
    c = load_config(profile='tiny', sets=[*MODEL, *sets])
    model,log = ChromaModel(c.model).double(),MetricsLog()
    for k,x in model.named_parameters():
        if x.abs().max()==0: x.data.add_(.3*torch.randn(x.shape, generator=torch.Generator().manual_seed(len(k)), dtype=x.dtype))
    kept,undo = watched()
    try:
        if phase=='pretrain':
            ids = [[2, *((7*i+j*j)%290+6 for j in range(2+i%40)), 3] for i in range(80)]
            model = pretrain(c, ids, log, False, model, ranks=ranks)
        else:
            data = [r|dict(positive='one text for many') if i%7==0 and name=='kept' else r for i,r in enumerate(World().pairs('40'))]
            model = tune(c, model, tokenise_pairs(data, ChromaTokenizer.load(f'{folder}/tokenizer'), 64), log, progress=False, ranks=ranks)
    finally: undo()
    out = {f'weight.{k}': v for k,v in model.state_dict().items()}|{f'grad{i}.{k}': v for i,g in enumerate(kept['grads']) for k,v in g.items()}
    rows = [r for r in log.rows if 'loss' in r]
    out['norms'] = torch.tensor(kept['norms'], dtype=torch.float64)
    out['loss'] = torch.tensor([[r['loss'], r['balance']] for r in rows], dtype=torch.float64)         # rounded, as they are logged
    return {k: v.contiguous().clone() for k,v in out.items()}, kept['held']

def layer(ranks):
    "One layer where experts are idle and a process has no tokens; how far outputs and gradients are from those of a layer that is not spread."
    m,off = load_config(profile='tiny').model,0.
    for idle in (False, True):
        make = lambda: MoE(m).double()
        rng = torch.Generator().manual_seed(0); random = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
        plain,mine = make(),make()
        for p in plain.parameters(): p.data.copy_(random(*p.shape)/8)
        mine.load_state_dict(plain.state_dict()); spread(mine, ranks)
        texts = [random(0 if r==1 else 7*r+3, m.dim) for r in range(ranks.n)]                     # of every process; number 1 has none
        def run(layer, x, how):
            g,i,_ = route(x, layer.router, m.moe.top_k)
            return how(x, g, i%2 if idle else i, layer.gate_up, layer.down)                       # idle: only two experts are visited
        x,xs = texts[ranks.rank].clone().requires_grad_(),[t.clone().requires_grad_() for t in texts]
        y = run(mine, x, partial(run_apart, group=ranks.family)); y.square().sum().backward()
        ys = [run(plain, t, run_experts) for t in xs]; sum(t.square().sum() for t in ys).backward()
        own = lambda p: expert_parallel.keep_own(p, ranks, True)
        grads = [p.grad.clone() for p in (mine.gate_up, mine.down)]; ranks.add(grads, ranks.twins)
        pairs = [(y, ys[ranks.rank]), (x.grad, xs[ranks.rank].grad), (grads[0], own(plain.gate_up.grad)), (grads[1], own(plain.down.grad))]
        off = max([off, *((a-b).abs().max().item() for a,b in pairs if a.numel())])
    return max(ranks.collect(off))

# What is kept and sent, for test_plan.py

PLANNED = dict(parts=('train.micro_tokens=150', 'model.checkpoint=true'), muon=('optim.name=muon', 'model.layers=3', 'model.moe.first_dense=1'))

def planned(name): return load_config(profile='tiny', sets=['model.vocab_size=304','model.dim=64','pretrain.batch_tokens=2000', *PLANNED[name]])

def local(x): return x.to_local() if hasattr(x, 'to_local') else x
def size(tensors): return sum(local(x).nbytes for x in tensors)

def measured(name, ranks):
    "What this process keeps and sends in a step of phase 1, and what autograd keeps more where experts are spread."
    c,came,kept = planned(name),[],{}
    def counted(x, *args): came.append(len(x)); return run_experts(x, *args)
    def clipped(parameters, *args): kept['gradients'] = size(p.grad for p in parameters if p.grad is not None); return clip(parameters, *args)
    clip,training.clip_gradients,expert_parallel.run_experts = training.clip_gradients,clipped,counted
    try:
        ids = [[2, *((7*i+j*j)%290+6 for j in range(2+i%40)), 3] for i in range(120)]
        data,run = MaskedParts(ids, c, ranks),Trainer(ChromaModel(c.model), masked_loss, c, 'pretrain', ranks=ranks, progress=False)
        run.model.train(); run.advance(next(data)); came.clear(); parts = next(data)                   # the first step makes the moments
        with watch_traffic() as w: run.advance(parts)
        kept |= dict(weights=size(run.model.parameters()), moments=sum(size(x for x in s.values()) for s in run.opt.state.values()))
        out = dict(tokens=[p.tokens for p in parts], came=sum(came)//(1+c.model.checkpoint), kept=kept, sent=[[*k, v] for k,v in w.total().items()])
        if ranks.sharded or c.model.checkpoint: return out
        batch,model = parts[0].batch.batch,ChromaModel(c.model); came.clear()
        more = saved_bytes(lambda: run.model.hidden(batch), run.model)-saved_bytes(lambda: model.hidden(batch), model)
        return out|dict(more=more, first=[len(batch.ids), sum(came)])
    finally: training.clip_gradients,expert_parallel.run_experts = clip,run_experts

def measure(ranks):
    "All that is to be measured, by case and layout."
    out = {}
    for expert in (e for e in (1,2,4) if ranks.n%e==0):
        for sharded in (False,True)[:ranks.n]:
            where = Ranks(ranks.accelerator, sharded=sharded, expert=expert)
            for name in PLANNED:
                if not (sharded and name=='muon'): out[f'{name}.{expert}{".sharded"*sharded}'] = ranks.collect(measured(name, where))
    return out

def main(folder, out, *only):
    "With names, such as masked and masked.sharded, those alone, where experts are spread."
    ranks,said,every = start(),{},only==('all',)
    for expert in (e for e in (1,2,4)[not every:] if ranks.n%e==0):
        for sharded in (False,True)[:1+(every or expert==2)]:
            where = Ranks(ranks.accelerator, sharded=sharded, expert=expert)
            for name in SHARDED if sharded else CASES:
                if not every and f'{name}{".sharded"*sharded}' not in only: continue
                got,held = three_steps(name, folder, where)
                if ranks.main: save_file(got, f'{out}/{name}.{expert}{".sharded"*sharded}')
                said[f'{name}.{expert}{".sharded"*sharded}'] = ranks.collect(held)
            if expert>1 and not sharded: said[f'layer.{expert}'] = layer(where)
    if ranks.main: Path(f'{out}/said.json').write_text(json.dumps(said))
    ranks.end()

if __name__=='__main__':
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    os._exit(0)
