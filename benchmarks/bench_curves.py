"""What a layer costs as its input grows: time and peak memory against tokens, experts and the length of texts, forward and backward.

Each curve is fitted by a power: time ~ size^exponent. The picture goes beside this file, as curves.png."""
import ctypes, gc
from pathlib import Path
import numpy as np, torch
from matplotlib.figure import Figure
from run import medians

from chroma_moe.attention import make_attention, prepare, rope_frequencies, rope_table
from chroma_moe.config import load_config
from chroma_moe.model import ChromaModel
from chroma_moe.moe import MoE
from chroma_moe.packing import pack

ROUNDS = 5
TOKENS,EXPERTS,LENGTHS = [1024*2**i for i in range(5)], [8,16,32,64], [64*2**i for i in range(8)]

def debug(*sets): return load_config(profile='debug', sets=[*sets]).model

def model_step(model, lengths):
    "All blocks on packed texts of these lengths."
    b = pack([np.arange(n)%1000 for n in lengths])
    def step(): model.zero_grad(); model.hidden(b)[0].sum().backward()
    return step

def experts_step(experts, tokens=4096):
    "A layer of `experts`, of which each token meets two: the arithmetic is the same for any number, and each sees 128 tokens or more."
    layer = MoE(debug(f'model.moe.experts={experts}')); x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(0))
    for p in layer.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-0.5)
    def step(): layer.zero_grad(); layer(x)[0].sum().backward()
    return step

def attention_step(length, tokens=8192):
    "Attention over `tokens` tokens in texts of one length."
    m = debug(); layer,b = make_attention(m),prepare(pack([range(length)]*(tokens//length)))
    for p in layer.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-0.5)
    x,turn = torch.randn(tokens, m.dim, generator=torch.Generator().manual_seed(0)), rope_table(length, rope_frequencies(m.attention.turned))[b.positions]
    def step(): layer.zero_grad(); layer(x, b, turn).sum().backward()
    return step

def of_status(key): return next(int(line.split()[1])/1024 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))

def peak(step):
    "MB that `step` needs on top of what the process holds; not a number where the system does not tell."
    if not Path('/proc/self/clear_refs').exists(): return float('nan')
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')          # the high-water mark starts anew
    before = of_status('VmRSS'); step()
    return of_status('VmHWM')-before

def exponent(sizes, values): return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

def picture(curves, path):
    fig = Figure((9,5)); axes = fig.subplots(2, len(curves), sharex='col')
    for (name,sizes,seconds,memory),column in zip(curves, axes.T):
        for ax,values,unit in zip(column, (seconds,memory), ('ms','MB')):
            values = np.array(values)*(1000 if unit=='ms' else 1)
            ax.loglog(sizes, values, 'o-', label=f'exponent {exponent(sizes, values):.2f}'); ax.set_ylabel(unit); ax.set_ylim(values.min()/2, values.max()*2)
            ax.legend(frameon=False, fontsize=8)
        column[1].set_xlabel(name); column[1].set_xticks(sizes, sizes, rotation=60, fontsize=7); column[1].minorticks_off()
    fig.tight_layout(); fig.savefig(path, dpi=100)

def bench():
    model = ChromaModel(debug()).train()
    drawn = np.clip(np.round(np.exp(np.random.default_rng(0).normal(np.log(57), 1., 99))), 4, 512).astype(int)
    mix = drawn[:np.searchsorted(drawn.cumsum(), TOKENS[0])]                 # more tokens are more texts of the same lengths
    mix = [*mix, TOKENS[0]-mix.sum()]
    def texts(tokens): return mix*(tokens//TOKENS[0])
    plans = [('tokens', TOKENS, lambda n: model_step(model, texts(n))), ('experts', EXPERTS, experts_step), ('length of texts', LENGTHS, attention_step)]
    curves = []
    for name,sizes,make in plans:
        steps = [make(n) for n in sizes]
        curves.append((name, sizes, medians(*steps, rounds=ROUNDS), [peak(s) for s in steps]))
    picture(curves, Path(__file__).parent/'curves.png')
    (_,n,t,mt),(_,_,e,me),(_,l,a,ma) = curves
    told = lambda sizes,times,memory: ', '.join(f'{s}: {x*1000:.0f} ms {m:.0f} MB' for s,x,m in zip(sizes, times, memory))
    return [
        dict(name='time against tokens, exponent', ours=exponent(n, t), peer=1., ratio=1/exponent(n, t), target=0.95,
             conditions=f'debug model, forward and backward, texts of log-normal length; linear is 1; {told(n, t, mt)}'),
        dict(name='time against experts, most by least', ours=max(e), peer=min(e), ratio=min(e)/max(e), target=1/1.15,
             conditions=f'MoE layer at debug width, top-2 of experts of width 128, 4096 tokens; seconds; {told(EXPERTS, e, me)}'),
        dict(name='time against length, exponent', ours=exponent(l[-3:], a[-3:]), peer=2., ratio=2/exponent(l[-3:], a[-3:]), target=None,
             conditions=f'attention at debug width, 8192 tokens in texts of one length, so quadratic cost in a text is linear here; the last three; '
                        f'over all {exponent(l, a):.2f}; {told(l, a, ma)}')]
