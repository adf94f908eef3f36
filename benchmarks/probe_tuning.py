"""What does each part of phase 2 buy? One change at a time, on the built-in corpus, on companies and products that were never seen.

Each seed has its own corpus, tokenizer, bag of token vectors and phase 1; every variant starts there. A step is 64 pairs unless it says otherwise.

    python benchmarks/probe_tuning.py --out F                  all variants, seeds 0, 1, 2 (a resumable JSON file)
    python benchmarks/probe_tuning.py --out F --seeds 1 --variants base,none
    python benchmarks/probe_tuning.py --out F --variants stages    a second stage: hard negatives only and scored pairs, against more of the first
"""
import argparse, copy, json, tempfile
from pathlib import Path
from statistics import mean, stdev

import torch

from chroma_moe.averaging import last_checkpoints, average
from chroma_moe.config import load_config
from chroma_moe.demo import bag_config, demo_config, demo_texts
from chroma_moe.encoder import ASK, ChromaMoE
from chroma_moe.evaluation import evaluate_world, world_tests
from chroma_moe.metrics import spearman
from chroma_moe.mixing import pairs
from chroma_moe.model import ChromaModel
from chroma_moe.pretrain import pretrain
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import tune_cpu
from chroma_moe.tune import TokenBag, start_from_bag, tokenise_pairs, tune
from chroma_moe.world import DOMAINS, World

ASKED = {'world/finance': 'Given a question about a company, find the filing or the news that answers it',
         'world/shop': "Given a shopper's words, find a product that fits"}
VARIANTS = dict(                       # sets that differ from the base
    base=[], none=['tune.negatives=0'],
    batch_16=['tune.batch_pairs=16', 'steps*4'], batch_256=['tune.batch_pairs=256', 'steps/4'],
    cache_256=['tune.batch_pairs=256', 'train.micro_tokens=8192', 'steps/2'],
    instructions=[f'tune.instructions={[f"{s}={t}" for s,t in ASKED.items()]}'], matryoshka=['tune.matryoshka=[16,32,64]'],
    symmetric=['tune.symmetric=true'], source=['tune.mix=source'])

class Cut:
    "An encoder whose vectors are cut."
    def __init__(self, chroma, dim): self.chroma,self.dim = chroma,dim
    def encode_query(self, x): return self.chroma.encode_query(x, truncate_dim=self.dim)
    def encode_document(self, x): return self.chroma.encode_document(x, truncate_dim=self.dim)

def figures(encoder, tests, asked=False):
    "nDCG@10 by domain and accuracy of the order part, which has one for each domain too."
    if not asked:
        s = evaluate_world(encoder, tests)
        a,b = (encoder.encode_document([r[k] for r in tests['sts']]) for k in 'ab')
        return {**{d: s[d]['ndcg@10'] for d in DOMAINS}, 'order': s['order'], 'sts': spearman((a*b).sum(-1), [r['score'] for r in tests['sts']])}
    out = {}
    for d in DOMAINS:                                                                 # each domain is asked in its own words
        encoder.prompts = dict(query=ASK.format(ASKED[f'world/{d}'])); s = evaluate_world(encoder, tests); out[d] = s[d]['ndcg@10']
        out[f'order_{d}'] = evaluate_world(encoder, tests|dict(order=[i for i in tests['order'] if i['domain']==d]))['order']
    return {**{d: out[d] for d in DOMAINS}, 'order': mean(out[f'order_{d}'] for d in DOMAINS)}

def stages(model, c, config, rows, tokenizer, ready, tests, seed, keep):
    "A first stage, then the same number of further steps: more of it, or retrieval without in-batch negatives blended with scored pairs."
    tune(c, model, ready(c), progress=False)
    keep(variant='stage one', seed=seed, **figures(ChromaMoE(model, tokenizer, 256), tests))
    scored = [dict(query=r['a'], positive=r['b'], score=r['score']/5, source='sts') for r in World(seed).sts(3000, 'train')]
    for name,more,data in (('one, longer', [], rows), ('stage two', ['tune.losses=[own,sts=cosent]'], [*rows[-9600:], *scored])):
        after = config('tune.lr=1e-3', *more, steps=c.tune.steps//3); m = copy.deepcopy(model)
        tune(after, m, tokenise_pairs(data, tokenizer, 64, after.tune.negatives, losses=after.tune.losses), progress=False)
        keep(variant=name, seed=seed, **figures(ChromaMoE(m, tokenizer, 256), tests))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--steps', type=int, default=300); parser.add_argument('--pretrain_steps', type=int, default=130)
    parser.add_argument('--seeds', default='0,1,2'); parser.add_argument('--variants', default=','.join(['bag', 'random', *VARIANTS]))
    parser.add_argument('--out', type=Path, required=True, help='a JSON file; what it holds already is not measured again')
    a = parser.parse_args()
    torch.set_num_threads(1); tune_cpu()
    settings = dict(steps=a.steps, pretrain_steps=a.pretrain_steps)
    before = json.loads(a.out.read_text()) if a.out.exists() else dict(settings=settings, found=[])
    if before['settings']!=settings: parser.error(f'{a.out} was measured with {before["settings"]}: give another --out')
    found = before['found']
    def keep(**row):
        found.append(row); a.out.write_text(json.dumps(dict(settings=settings, found=found), indent=1)); print(row, flush=True)
    def done(name, seed): return any((f['variant'],f['seed'])==(name,seed) for f in found)

    for seed in map(int, a.seeds.split(',')):
        wanted = [v for v in a.variants.split(',') if not done('stage two' if v=='stages' else v, seed)]
        if not wanted: continue
        base = demo_config(4.5, seed); sets = [f'pretrain.steps={a.pretrain_steps}', 'pretrain.batch_tokens=4096', 'pretrain.lr=2e-3', f'data.seed={seed}',
                                               f'pretrain.seed={seed}', f'tune.seed={seed}', 'tune.batch_pairs=64', 'train.save_every=-1']
        def config(*more, steps=a.steps): return load_config(profile='tiny', sets=[*sets, f'tune.steps={steps}', *more])
        c = config(); words = demo_texts(base); tests = world_tests(base)|dict(sts=World(seed).sts(600))
        rows = list(pairs(['world/finance','world/shop'], a.steps*64, seed, strategy='equal'))
        tokenizer = ChromaTokenizer.train([*words, *(r['query'] for r in rows[::4])], c.model.vocab_size)
        def ready(c): return tokenise_pairs(rows, tokenizer, 64, c.tune.negatives, 80, c.tune.losses, c.tune.instructions)
        bag = TokenBag(c.model.vocab_size, c.model.dim, seed); tune(bag_config(c), bag, ready(c), name='bag', progress=False)
        if 'bag' in wanted: keep(variant='bag', seed=seed, **figures(ChromaMoE(bag, tokenizer, 256), tests))
        first = ChromaModel(c.model, seed); start_from_bag(first, bag)
        pretrain(c, tokenizer.encode(words, max_length=256), progress=False, model=first)
        for name in wanted:
            if name=='bag': continue
            more = VARIANTS.get(name, [])
            steps = next((n for mark,n in (('steps*4', a.steps*4), ('steps/2', a.steps//2), ('steps/4', a.steps//4)) if mark in more), a.steps)
            c = config(*(m for m in more if not m.startswith('steps')), steps=steps)
            model = ChromaModel(c.model, seed) if name=='random' else copy.deepcopy(first)
            if name=='stages': stages(model, c, config, rows, tokenizer, ready, tests, seed, keep); continue
            with tempfile.TemporaryDirectory() as folder:
                if name=='base': c = config(f'train.save_every={max(1, steps//20)}', 'train.keep=5', steps=steps)   # for the average
                tune(c, model, ready(c), progress=False, folder=folder if name=='base' else None)
                row = figures(ChromaMoE(model, tokenizer, 256), tests, bool(c.tune.instructions))
                if name in ('base','matryoshka'):
                    row['cut'] = {str(k): mean(figures(Cut(ChromaMoE(model, tokenizer, 256), k), tests)[d] for d in DOMAINS) for k in (16,32,64)}
                keep(variant=name, seed=seed, **row)
                if name=='base':
                    model.load_state_dict(average(last_checkpoints(folder, 5)))
                    keep(variant='averaged', seed=seed, **figures(ChromaMoE(model, tokenizer, 256), tests))

    print(f"\n{'variant':14}{'seeds':>6}{'finance':>18}{'shop':>18}{'order':>18}{'sts':>18}")
    for name in dict.fromkeys(f['variant'] for f in found):
        mine = [f for f in found if f['variant']==name]
        found_of = {k: [f[k] for f in mine] for k in (*DOMAINS, 'order', 'sts') if all(k in f for f in mine)}
        said = ''.join(f'{mean(v):>10.3f} ± {stdev(v) if len(v)>1 else 0:.3f}' for v in found_of.values())
        print(f'{name:14}{len(mine):>6}{said}')

if __name__=='__main__': main()
