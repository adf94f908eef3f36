"""What a cache costs and what it buys: bytes a token of MHA, GQA, MQA and MLA at equal widths, and the speed of a step against the length so far.

Memory is what the process grows by (its resident set) when caches for some thousand tokens are made and filled, in a process of its own for each kind."""
import subprocess, sys, time
from functools import cache
from pathlib import Path
from statistics import median

import torch

from chroma_moe.caches import cache_bytes
from chroma_moe.config import load_config
from chroma_moe.model import ChromaModel
from chroma_moe.packing import pack

KINDS = dict(mha=['model.attention.kind=mha'], gqa=['model.attention.kind=gqa','model.attention.kv_heads=2'], mqa=['model.attention.kind=mqa'], mla=[])
LENGTHS,B = (128, 512, 2048, 8000), 4
WHAT = f'debug shape (8 heads of 64, 4 layers, experts), {B} texts, float32, CPU seconds'

def shaped(kind): return load_config(profile='debug', sets=['model.vocab_size=4096','pretrain.objective=clm', *KINDS[kind]]).model

@cache
def built(kind): return ChromaModel(shaped(kind)).eval()

def medians(*functions, rounds=7):
    "Median CPU seconds of each function, measured in turn: what others do on the machine counts less than in time on the wall."
    for f in functions: f()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for f,t in zip(functions, times):
            start = time.process_time(); f(); t.append(time.process_time()-start)
    return [median(t) for t in times]

def resident():
    "Bytes of this process in memory."
    return int(Path('/proc/self/statm').read_text().split()[1])*4096

def grown(kind, texts=8, length=4096):
    "Bytes a token by which the process grows."
    model = ChromaModel(shaped(kind)); before = resident()
    caches = model.new_caches(texts, length)
    for c in caches: c.kept.fill_(1.)                                     # fresh pages are not real before they are written
    return (resident()-before)/(texts*length)

def stepper(kind, length):
    "A step of `B` texts that have `length` tokens already."
    model = built(kind); caches = model.new_caches(B, length+1)
    ids = torch.arange(B)+6
    for c in caches: c.kept.normal_(generator=torch.Generator().manual_seed(0))
    def step():
        for c in caches: c.lengths.fill_(length); c.longest = length
        with torch.no_grad(): return model.step(ids, caches)
    return step

def again(kind, length):
    "The same token without a cache: the whole texts once more."
    model = built(kind); batch = pack([[i+6]*length for i in range(B)])
    def read():
        with torch.no_grad(): return model.hidden(batch, rows=batch.cu_seqlens[1:].long()-1)
    return read

def bench():
    rows,said = [],{}
    for kind in KINDS:
        out = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True).stdout
        said[kind] = float(out)
        rows.append(dict(name=f'cache bytes a token, {kind}, measured and counted', ours=said[kind], peer=float(cache_bytes(shaped(kind), 4)),
                         ratio=cache_bytes(shaped(kind), 4)/said[kind], target=0.95,
                         conditions=f'{WHAT}; ours is the growth of the process, peer what cache_bytes counts'))
    for length in LENGTHS:
        seconds = dict(zip(KINDS, medians(*(stepper(kind, length) for kind in KINDS))))
        for kind in KINDS:
            rows.append(dict(name=f'decoding step, {kind}, after {length} tokens', ours=seconds[kind], peer=seconds['mha'],
                             ratio=seconds['mha']/seconds[kind], target=None, conditions=f'{WHAT}; peer: mha'))
    cached,whole = medians(stepper('mla', 512), again('mla', 513), rounds=3)
    rows.append(dict(name='a token with the cache, after 512', ours=cached, peer=whole, ratio=whole/cached, target=10.,
                     conditions=f'{WHAT}, mla; peer: the text read again'))
    return rows

if __name__=='__main__': print(grown(sys.argv[1]))
