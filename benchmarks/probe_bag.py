"""What does each part of a bag of token vectors buy? One change at a time, on real text.

    python benchmarks/probe_bag.py --run runs/mini --data DIR --out F                       all variants, three seeds; F is resumable
    python benchmarks/probe_bag.py --run runs/mini --data DIR --out F --seeds 0 --variants base,letters

RUN is a folder of recipes/mini/run.py --least 0 that is past its stage `own`; DIR is what that run was made from. Each variant takes --steps steps with the
settings of recipes/mini/bag.yaml, but that pairs from text alone, one of a kind from a text, are drawn less often. Scores as in probe_mini.py: mean nDCG@10
over samples of the dev sets; differences are to `base`, on the same queries.
"""
import argparse, json, time
from pathlib import Path

import numpy as np, torch

from chroma_moe.bag import token_importance
from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.evaluation import local_tasks
from chroma_moe.metrics import paired_bootstrap
from chroma_moe.parallel import start
from chroma_moe.pretrain import load_tokenizer
from chroma_moe.training import tune_cpu
from chroma_moe.tune import TokenBag, load_pairs, tune
from probe_mini import scores, smaller

class SpelledOnce(TokenBag):
    "Letters at the start only: what one word learns, others do not."
    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad(): self.embedding.weight.copy_(self.table)
        self.letters = None

def spelled(c, tokenizer): return [tokenizer.decode([i]) for i in range(len(tokenizer))]
def worth(p, c, power=.5): return token_importance(p.tokens, c.model.vocab_size, power)

def made(c, p, tokenizer, kind=TokenBag, power=.5, words=True):
    m = c.model
    return kind(m.vocab_size, m.dim, c.tune.seed, worth(p, c, power), m.pooling.early, m.pooling.surprise, spelled(c, tokenizer) if words else None)

def some(p, share):
    "A share of the rows, whatever their source."
    at = np.sort(np.random.default_rng(0).permutation(len(p.queries))[:round(len(p.queries)*share)])
    return p._replace(**{k: [getattr(p, k)[i] for i in at] for k in ('queries','prompt','docs','labels','query_key','source')})

VARIANTS = dict(                                           # how the bag is made, settings
    base=({}, []), letters=(dict(words=False), []), once=(dict(kind=SpelledOnce), []), late=({}, ['model.pooling.early=0']),
    early3=({}, ['model.pooling.early=0.3']), early9=({}, ['model.pooling.early=0.9']), neither=(dict(words=False), ['model.pooling.early=0']),
    flat=(dict(power=0.), []), idf=(dict(power=1.), []), narrow=({}, ['model.dim=384', 'model.pooling.out_dim=384']),
    negatives=({}, ['tune.negatives=0']), small=({}, ['tune.batch_pairs=256']), pairs=({}, ['tune.often=["*/crop=0.001","*/keywords=0.001"]']),
    texts=({}, ['tune.often=["*/crop=0.4","*/keywords=0.3"]']), cold=({}, ['tune.temperature=0.02']), warm=({}, ['tune.temperature=0.08']),
    half=(dict(share=1/2), []), quarter=(dict(share=1/4), []), eighth=(dict(share=1/8), []), narrower=({}, ['model.dim=192', 'model.pooling.out_dim=192']))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for k in ('run','data','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    parser.add_argument('--seeds', default='0,1,2'); parser.add_argument('--variants', default=','.join(VARIANTS))
    for k,v in (('steps',150), ('queries',300), ('documents',2000)): parser.add_argument(f'--{k}', type=int, default=v)
    a = parser.parse_args(); torch.set_num_threads(1); tune_cpu()
    settings = dict(steps=a.steps, queries=a.queries, documents=a.documents)
    kept = json.loads(a.out.read_text()) if a.out.exists() else dict(settings=settings, found=[])
    if kept['settings']!=settings: parser.error(f"{a.out} was measured with {kept['settings']}: give another --out")
    tasks = [smaller(t, a.queries, a.documents) for t in local_tasks(a.data) if t.kind=='retrieval']
    recipe = Path(__file__).parents[1]/'recipes'/'mini'/'bag.yaml'
    base = [f'tokenizer.path={a.run}/tokenizer', f'data.pairs=[{a.run}/data/pairs.jsonl,{a.run}/own.jsonl]', f'data.valid_pairs={a.run}/data/valid.jsonl',
            f'tune.steps={a.steps}', 'train.save_every=-1', 'train.log_every=50', f'train.eval_every={a.steps}', 'tune.often=["*/crop=0.25","*/keywords=0.2"]']
    ready,ranks = {},start('fp32')
    for seed in map(int, a.seeds.split(',')):
        for name in a.variants.split(','):
            if any((f['variant'],f['seed'])==(name,seed) for f in kept['found']): continue
            how,sets = dict(VARIANTS[name][0]),VARIANTS[name][1]; share = how.pop('share', 1)
            c = load_config(recipe, sets=[*base, f'tune.seed={seed}', *sets]); tokenizer = load_tokenizer(c)
            if c.tune.negatives not in ready: ready = {c.tune.negatives: load_pairs(c, tokenizer)[0]}
            p = some(ready[c.tune.negatives], share); bag = made(c, p, tokenizer, **how).to(ranks.device); began = time.process_time()
            tune(c, bag, p, progress=False, ranks=ranks)
            spent = time.process_time()-began
            kept['found'].append(dict(variant=name, seed=seed, seconds=round(spent), scores=scores(ChromaMoE(bag, tokenizer, 1024), tasks)))
            a.out.write_text(json.dumps(kept)+'\n')
            print(f'{name} {seed}: {np.mean([np.mean(v) for v in kept["found"][-1]["scores"].values()]):.4f} in {spent:.0f} s of one core', flush=True)

    by = {(f['variant'],f['seed']): f['scores'] for f in kept['found']}
    print(f"\n{'variant':12}{'seeds':>6}{'mean':>8}  difference to base, by seed [95% interval]")
    for name in dict.fromkeys(v for v,_ in by):
        mine = {s: x for (v,s),x in by.items() if v==name}; said = []
        for s,x in mine.items():
            if name=='base' or ('base',s) not in by: continue
            flat = lambda x: [q*1000/len(x)/len(v) for v in x.values() for q in v]                             # each set counts the same
            n = sum(map(len, x.values()))/1000; d,lo,hi,_ = paired_bootstrap(flat(x), flat(by['base',s])); said.append(f'{d*n:+.4f} [{lo*n:+.4f}, {hi*n:+.4f}]')
        print(f"{name:12}{len(mine):>6}{np.mean([np.mean([np.mean(v) for v in x.values()]) for x in mine.values()]):8.4f}  " + '; '.join(said))

if __name__=='__main__': main()
