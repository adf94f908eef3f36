"""What does each part of the small model's second half buy? One change at a time, from the same bag, on real text.

    python benchmarks/probe_mini.py --run runs/mini --data DIR --out F                      all variants, three seeds; F is resumable
    python benchmarks/probe_mini.py --run runs/mini --data DIR --out F --seeds 0 --variants base,dense
    python benchmarks/probe_mini.py --run runs/mini --data DIR --out F --gpu --steps 100    fourteen times the tokens a step

RUN is a folder of recipes/mini/run.py --transformer that is past its stage `mined`; DIR is what that run was made from. Each variant begins as the joined bag
and takes --steps steps with the recipe's settings. Scores: mean nDCG@10 over the dev sets, each with at most --queries queries and --documents documents, of
which all that are judged for them; differences to the bag come from the same queries.
"""
import argparse, json, time
from dataclasses import replace
from pathlib import Path

import numpy as np, torch

from chroma_moe.config import load_config
from chroma_moe.encoder import ASK, ChromaMoE
from chroma_moe.evaluation import local_tasks
from chroma_moe.metrics import paired_bootstrap, score_queries
from chroma_moe.model import ChromaModel, writes_stream
from chroma_moe.parallel import start
from chroma_moe.pretrain import load_texts, pretrain
from chroma_moe.systems import Dense
from chroma_moe.training import tune_cpu
from chroma_moe.tune import load_pairs, tune

GPU = ['tune.batch_tokens=0', 'tune.negatives=1', 'tune.lr=5e-4', 'train.micro_tokens=131072', 'train.precision=auto', 'pretrain.batch_tokens=131072']
ASKED = 'Given a title, a question or a product, find the text that it is about'
VARIANTS = dict(                                           # model sections to replace, settings
    base=({}, []), dense=(dict(moe=dict(dense='twin')), []), total=(dict(moe=dict(experts=0, shared=0, dense_dim=896)), []), four=(dict(layers=4), []),
    latent=(dict(pooling=dict(kind='latent_nv', latents=64, heads=4)), []), negatives=({}, ['tune.negatives=0']),
    small=({}, ['tune.batch_pairs=256', 'tune.batch_tokens=4000']), matryoshka=({}, ['tune.matryoshka=[64,256]']), symmetric=({}, ['tune.symmetric=true']),
    instruction=({}, [f'tune.instructions=["{ASKED}"]']), phase1=({}, []), pairs=({}, ['tune.often=["*/crop=0.001","*/keywords=0.001"]']),
    fast=({}, ['tune.lr=1e-3', 'tune.min_lr=5e-5']), frozen=({}, ['optim.embedding=0']))

def smaller(task, queries, documents):
    "A retrieval task with fewer queries and documents, the judged ones among them."
    rng,d = np.random.default_rng(0),task.data
    asked = sorted(rng.permutation(sorted(d['queries']))[:queries].tolist())
    others = rng.permutation(sorted(d['corpus']))[:documents].tolist()
    judged = {k: sorted(d['qrels'][k], key=lambda x: -d['qrels'][k][x])[:20] for k in asked}
    keep = {*others, *(x for of in judged.values() for x in of)}
    qrels = {k: {x: g for x,g in d['qrels'][k].items() if x in keep} for k in asked}
    return task._replace(data=dict(corpus={k: d['corpus'][k] for k in d['corpus'] if k in keep}, queries={k: d['queries'][k] for k in asked}, qrels=qrels))

def scores(chroma, tasks):
    "Set -> nDCG@10 of each query."
    system = Dense(chroma)
    def one(d): return score_queries(system.rank(d['corpus'], d['queries'], 10), d['qrels'])['ndcg@10'].round(4).tolist()
    return {t.name.split('/')[-1]: one(t.data) for t in tasks}

def begun(bag, changes, seed):
    "A model of another shape that begins as the bag."
    m = bag.model.m
    m = replace(m, **{k: replace(getattr(m, k), **v) if isinstance(v, dict) else v for k,v in changes.items()})
    model = ChromaModel(m, seed)
    with torch.no_grad():
        model.embedding.weight.copy_(bag.model.embedding.weight); model.pool.project.weight.copy_(bag.model.pool.project.weight)
        for name,p in model.named_parameters():
            if writes_stream(name): p.zero_()
    return model

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for k in ('run','data','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    parser.add_argument('--seeds', default='0,1,2'); parser.add_argument('--variants', default=','.join(VARIANTS))
    parser.add_argument('--gpu', action='store_true', help='whole batches of a thousand pairs, on a GPU')
    for k,v in (('steps',100), ('queries',150), ('documents',600), ('length',384)): parser.add_argument(f'--{k}', type=int, default=v)
    a = parser.parse_args(); torch.set_num_threads(1); tune_cpu()
    settings = dict(steps=a.steps, queries=a.queries, documents=a.documents, length=a.length, gpu=a.gpu)
    kept = json.loads(a.out.read_text()) if a.out.exists() else dict(settings=settings, found=[])
    if kept['settings']!=settings: parser.error(f"{a.out} was measured with {kept['settings']}: give another --out")
    tasks = [smaller(t, a.queries, a.documents) for t in local_tasks(a.data) if t.kind=='retrieval']
    bag = ChromaMoE.from_pretrained(a.run/'joined'); bag.max_length = a.length
    recipe = Path(__file__).parents[1]/'recipes'/'mini'/'mini.yaml'
    def keep(**row): kept['found'].append(row); a.out.write_text(json.dumps(kept)+'\n')
    if not any(f['variant']=='bag' for f in kept['found']): keep(variant='bag', seed=0, seconds=0, scores=scores(bag, tasks))
    base = [f'tokenizer.path={a.run}/tokenizer', f'data.pairs=[{a.run}/mined.jsonl,{a.run}/own.jsonl]', f'tune.steps={a.steps}', 'train.save_every=-1',
            'train.log_every=20', f'data.texts=[{a.run}/data/texts.jsonl]', f'pretrain.steps={a.steps}', *GPU*a.gpu]
    ready = {}
    for seed in map(int, a.seeds.split(',')):
        for name in a.variants.split(','):
            if any((f['variant'],f['seed'])==(name,seed) for f in kept['found']): continue
            changes,sets = VARIANTS[name]
            c = load_config(recipe, sets=[*base, f'tune.seed={seed}', *(s for s in sets if not (a.gpu and 'batch_tokens' in s))])
            key = c.tune.negatives,c.tune.instructions
            if key not in ready: ready = {key: load_pairs(c, bag.tokenizer)[0]}
            ranks = start(c.train.precision)
            model = begun(bag, changes, seed).to(ranks.device); began = time.process_time()
            if name=='phase1':                              # the blocks learn to fill gaps first, beside the bag's word vectors
                first = replace(c, optim=replace(c.optim, embedding=0.))
                pretrain(first, load_texts(c, bag.tokenizer)[0], progress=False, model=model, ranks=ranks)
            tune(c, model, ready[key], progress=False, ranks=ranks)
            spent = time.process_time()-began
            prompts = dict(query=ASK.format(ASKED)) if c.tune.instructions else {}
            keep(variant=name, seed=seed, seconds=round(spent), scores=scores(ChromaMoE(model, bag.tokenizer, a.length, prompts), tasks))
            print(f'{name} {seed}: {np.mean([np.mean(v) for v in kept["found"][-1]["scores"].values()]):.4f} in {spent:.0f} s of one core', flush=True)

    first = next(f for f in kept['found'] if f['variant']=='bag')['scores']
    print(f"\n{'variant':12}{'seeds':>6}{'mean':>8}  difference to the bag, by seed [95% interval]")
    for name in dict.fromkeys(f['variant'] for f in kept['found']):
        mine = [f for f in kept['found'] if f['variant']==name]
        weigh = lambda s: np.concatenate([np.array(v)*len(first)**-1*1000/len(v) for v in s.values()])    # each set counts the same
        said = [paired_bootstrap(weigh(f['scores']).tolist(), weigh(first).tolist()) for f in mine] if name!='bag' else []
        n = sum(map(len, first.values()))/1000
        print(f"{name:12}{len(mine):>6}{np.mean([np.mean([np.mean(v) for v in f['scores'].values()]) for f in mine]):8.4f}  " +
              '; '.join(f'{d*n:+.4f} [{lo*n:+.4f}, {hi*n:+.4f}]' for d,lo,hi,_ in said))

if __name__=='__main__': main()
