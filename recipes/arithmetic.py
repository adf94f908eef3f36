"What the recipes cost, from their own config files. `python recipes/arithmetic.py` prints the tables of README.md."
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from chroma_moe.blockwise import ROOM
from chroma_moe.config import count_params, flops_per_token, load_config
from chroma_moe.model import ChromaModel
from chroma_moe.packing import pack
from chroma_moe.sharding import shard_bytes

HERE = Path(__file__).parent
# config file -> devices, what one is, its peak in operations a second, the share of it that a run is assumed to reach
RECIPES = dict(laptop=(1, 'two CPU cores', 0.1e12, 0.35), one_gpu=(1, 'H100', 990e12, 0.05), eight_gpus=(8, 'H100', 990e12, 0.25),
               sixty_four_gpus=(64, 'H100', 990e12, 0.25))
QUERY,DOCUMENT = 12,120                                    # tokens of a query and of a document in phase 2, on average

VECTORS = 5                                                # what the loss holds, in sizes of all vectors: them, their gradient, and copies by rows and columns

def saved_bytes(m, run):
    "Bytes a token that a pass keeps for the backward pass in float32, with one layer of the true width."
    one = ChromaModel(replace(m, layers=1, vocab_size=256, checkpoint=False))
    weights,kept,batch = {p.untyped_storage().data_ptr() for p in one.parameters()},{},pack([list(range(6, 134))]*2)
    def keep(t):
        s = t.untyped_storage()
        if s.data_ptr() not in weights: kept[s.data_ptr()] = s.nbytes(),t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): _ = run(one, batch)
    return sum(n for n,_ in kept.values())/len(batch.ids)

@cache
def kept_bytes(m, pooled=False):
    "Bytes a token of the whole model, in phase 2 with the pooling."
    layer = saved_bytes(m, ChromaModel.hidden)
    pool = saved_bytes(m, ChromaModel.embed)-layer if pooled else 0
    return 4*m.dim*m.layers + max(layer, pool) if m.checkpoint else m.layers*layer + pool # checkpointed: the stream, and one part at a time

def memory(m, tokens, devices=1, sharded=False, half=True, parts=1, pooled=False):
    "Bytes of one device: weights, gradients and moments; copies in half precision; what a pass keeps."
    state = shard_bytes(m, devices, parts) if sharded else 16*count_params(m)
    if sharded:                                            # the root and two blocks are whole at a time
        with torch.device('meta'): net = ChromaModel(m)
        block = sum(p.numel() for p in net.blocks[0].parameters())
        state += 4*(sum(p.numel() for p in net.parameters()) - (m.layers-2)*block)
    return state, 2*count_params(m)*half, round(tokens*kept_bytes(m, pooled))

def contrast(m, t):
    "Bytes of the loss of a step of phase 2 on each device: the vectors of all devices, and a block of scores."
    vectors,documents = t.batch_pairs*(2+t.negatives),t.batch_pairs*(1+t.negatives)
    return VECTORS*4*vectors*m.pooling.out_dim + 4*min(ROOM, t.batch_pairs*documents)

def figures(name, sharded=False):
    "All figures of a recipe."
    c = load_config(HERE/f'{name}.yaml'); n,device,peak,reached = RECIPES[name]; m,p,t = c.model,c.pretrain,c.tune
    tokens,pair = p.steps*p.batch_tokens, QUERY+(1+t.negatives)*DOCUMENT
    per_device = p.batch_tokens/n; parts = -(-p.batch_tokens//(n*c.train.micro_tokens)) if c.train.micro_tokens else 1
    hours = lambda tokens,length,devices: tokens*flops_per_token(m, length, training=True)/(peak*reached*devices)/3600
    half,tuned,share = device!=RECIPES['laptop'][1],t.steps*t.batch_pairs*pair,t.batch_pairs*pair/n
    chunks = -(-share//c.train.micro_tokens) if c.train.micro_tokens else 1
    graphs = max(1, round(t.retain*chunks))                # chunks that keep their graph; the others run forward twice
    passes = 1+(chunks-graphs)/(3*chunks)                  # a step costs three forward passes
    memories,chunk = memory(m, per_device/parts, n, sharded, half, parts),memory(m, graphs*share/chunks, half=half, pooled=True)
    return dict(recipe=name, device=device, devices=n, reached=reached, steps=p.steps, batch_tokens=p.batch_tokens, tokens=tokens, parts=parts,
                hours=hours(tokens, c.data.max_length, n), state=memories[0], half=memories[1], kept=memories[2], memory=sum(memories),
                checkpoint=12*count_params(m), pairs=t.batch_pairs, chunks=int(chunks), tune_steps=t.steps, tune_tokens=tuned,
                passes=passes, tune_hours=passes*hours(tuned, DOCUMENT, n),
                tune_kept=chunk[2], contrast=contrast(m, t), tune_memory=sum(chunk)+contrast(m, t))

def amount(x): return next(f'{x/s:.3g} {u}' for s,u in ((1e12,'T'), (1e9,'G'), (1e6,'M'), (1e3,'k'), (1,'')) if x>=s)
def told(h): return f'{h/24:.1f} days' if h>=48 else f'{h:.1f} h' if h>=2 else f'{h*60:.0f} min'

def table():
    "Both phases, as Markdown."
    rows = ['| phase 1 | devices | tokens a step | parts | steps | tokens | MFU assumed | time | a checkpoint |', '|---|---|---|---|---|---|---|---|---|']
    all_ = {name: figures(name) for name in RECIPES}
    for f in all_.values():
        rows.append(f"| `{f['recipe']}` | {f['devices']} x {f['device']} | {f['batch_tokens']:,} | {f['parts']} | {f['steps']:,} | {amount(f['tokens'])} "
                    f"| {f['reached']:.0%} | {told(f['hours'])} | {f['checkpoint']/1e9:.2g} GB |")
    rows += ['', '| GB on each device | weights, gradients, moments | half precision | kept for the backward pass | in all |', '|---|---|---|---|---|']
    for f,word in [*((f, '') for f in all_.values()), (figures('eight_gpus', True), ', sharded')]:
        rows.append(f"| `{f['recipe']}`{word} | {f['state']/1e9:.2f} | {f['half']/1e9:.2f} | {f['kept']/1e9:.2f} | {f['memory']/1e9:.2f} |")
    rows += ['', '| phase 2 | pairs a step | chunks | steps | tokens | operations | time |', '|---|---|---|---|---|---|---|']
    for f in all_.values():
        rows.append(f"| `{f['recipe']}` | {f['pairs']:,} | {f['chunks']} | {f['tune_steps']:,} | {amount(f['tune_tokens'])} | x {f['passes']:.2f} "
                    f"| {told(f['tune_hours'])} |")
    rows += ['', '| GB on each device, phase 2 | weights, gradients, moments | half precision | one chunk | all vectors, scores | in all |',
             '|---|---|---|---|---|---|']
    for f in all_.values():
        rows.append(f"| `{f['recipe']}` | " + ' | '.join(f'{f[k]/1e9:.2f}' for k in ('state','half','tune_kept','contrast','tune_memory')) + ' |')
    return '\n'.join(rows)

if __name__=='__main__': sys.stdout.write(table()+'\n')
