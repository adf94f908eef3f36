"""Do experts pay? The mixture against its dense twin (equal active parameters), in phase 1, for the same tokens.

Each model gets its best of three learning rates, then three seeds; the figure is the masked loss on held-out text. Then the trained mixture is
read with its routing shuffled: if that does not hurt, the choice of experts means nothing.

    python benchmarks/probe_experts.py                                    on the built-in corpus
    python benchmarks/probe_experts.py --data DIR --steps 500 --out F     on DIR/corpus/pretrain.jsonl.zst
"""
import argparse, copy, itertools, json, math
from pathlib import Path
from statistics import mean, stdev
import torch

from chroma_moe.config import load_config
from chroma_moe.mixing import texts
from chroma_moe.monitor import MetricsLog
from chroma_moe.pretrain import Validation, pretrain
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import tune_cpu

def by_domain(rows, tokenizer, length):
    out = {}
    for r in rows: out.setdefault(r['domain'], []).append(tokenizer.encode([r['text']], max_length=length)[0])
    return out

def shuffled(model, seed=0):
    "The same model, with other experts behind each choice."
    other,g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for b in other.blocks:
        order = torch.randperm(len(b.moe.router), generator=g)
        b.moe.router.data = b.moe.router.data[order]
    return other

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--data', help='folder with corpus/pretrain.jsonl.zst; by default the built-in corpus')
    parser.add_argument('--steps', type=int, default=300); parser.add_argument('--batch_tokens', type=int, default=4096)
    parser.add_argument('--rates', type=float, nargs='+', default=[5e-3, 1e-2, 2e-2]); parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--optimizer', default='muon', help='muon or adamw (its rates are smaller: --rates 1e-3 3e-3 1e-2)')
    parser.add_argument('--out', type=Path, help='a JSON file; what it holds already is not measured again')
    a = parser.parse_args()
    torch.set_num_threads(1); tune_cpu()
    c = load_config(profile='tiny', sets=[f'pretrain.steps={a.steps}', f'pretrain.batch_tokens={a.batch_tokens}', f'train.eval_every={a.steps}'])
    rows = list(texts(f'{a.data}/corpus/pretrain.jsonl.zst' if a.data else 'world', 'all' if a.data else '30k'))
    held = rows[::51][:1000]; rows = [r for i,r in enumerate(rows) if i%51 or i//51>=1000]        # an odd stride: domains may alternate
    tokenizer = ChromaTokenizer.train((r['text'] for r in rows), c.model.vocab_size)
    ids,valid = tokenizer.encode([r['text'] for r in rows], max_length=c.data.max_length), by_domain(held, tokenizer, c.data.max_length)
    mean_length = sum(map(len, ids))/len(ids)
    print(f'{len(ids)} texts of {mean_length:.0f} tokens on average, {len(held)} held out; {a.steps} steps of {a.batch_tokens} tokens', flush=True)
    settings = dict(data=a.data, steps=a.steps, batch_tokens=a.batch_tokens, optimizer=a.optimizer)
    before = json.loads(a.out.read_text()) if a.out and a.out.exists() else dict(settings=settings, found=[])
    if before['settings']!=settings: parser.error(f'{a.out} was measured with {before["settings"]}: give another --out')
    found = before['found']
    def run(kind, rate, seed):
        known = next((f for f in found if (f['kind'],f['rate'],f['seed'])==(kind,rate,seed)), None)
        if known: return known['loss']
        sets = [f'pretrain.steps={a.steps}', f'pretrain.batch_tokens={a.batch_tokens}', f'train.eval_every={a.steps}', f'pretrain.seed={seed}',
                f'pretrain.lr={rate}', f'pretrain.min_lr={rate/10}',
                f'optim.name={a.optimizer}', *(['model.moe.dense=twin'] if kind=='dense twin' else [])]
        c = load_config(profile='tiny', sets=sets)
        log = MetricsLog(); model = pretrain(c, ids, log, progress=False, valid=valid)
        last = [r for r in log.rows if 'eval_loss' in r][-1]
        found.append(dict(kind=kind, rate=rate, seed=seed, loss=last['eval_loss'], accuracy=last['eval_accuracy'],
                          guess=mean(v['guess'] for v in last['eval'].values()), domains={d: v['accuracy'] for d,v in last['eval'].items()}))
        print(f"{kind:12} lr {rate:<7g} seed {seed}: loss {last['eval_loss']:.4f}, {last['eval_accuracy']:.1%} right", flush=True)
        if kind=='experts':
            judge = Validation(valid, c)
            model.eval()
            with torch.no_grad(): worse = [judge(shuffled(model, s))['eval_loss'] for s in range(3)]
            print(f'             routing shuffled: loss {mean(worse):.4f}', flush=True); found[-1]['shuffled'] = mean(worse)
        if a.out: a.out.write_text(json.dumps(dict(settings=settings, found=found), indent=1))
        return last['eval_loss']
    kinds = ('experts','dense twin')
    best = {k: min(a.rates, key=lambda r: run(k, r, 0)) for k in kinds}
    for seed,k in itertools.product(range(1, a.seeds), kinds): run(k, best[k], seed)
    for k in kinds:
        of = [run(k, best[k], s) for s in range(a.seeds)]
        print(f'{k:12} at its best rate {best[k]:g}: {mean(of):.4f} +- {stdev(of) if len(of)>1 else math.nan:.4f} over {a.seeds} seeds')

if __name__=='__main__': main()
