"""From a language model to an encoder: which phase 1 is the better start for phase 2? On the built-in corpus, on unseen companies and products.

The same network, texts, steps and pairs each time. `mlm` predicts hidden spans; `clm` predicts next tokens and is then turned to look both ways;
`clm, kept causal` is tuned as it is; `none` begins with first weights. There is no bag of token vectors, which would hide the difference.

    python benchmarks/probe_directions.py --out F                      seeds 0, 1 (a resumable JSON file)
    python benchmarks/probe_directions.py --out F --seeds 2 --variants mlm,clm
"""
import argparse, copy, json, math, time
from pathlib import Path
from statistics import mean, stdev

import torch

from chroma_moe.config import load_config
from chroma_moe.directions import turn_attention
from chroma_moe.encoder import ChromaMoE
from chroma_moe.evaluation import evaluate_world, world_tests
from chroma_moe.metrics import spearman
from chroma_moe.mixing import pairs
from chroma_moe.model import ChromaModel
from chroma_moe.monitor import MetricsLog
from chroma_moe.pretrain import pretrain
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import tune_cpu
from chroma_moe.tune import tokenise_pairs, tune
from chroma_moe.world import DOMAINS, World

VARIANTS = {'mlm': 'mlm', 'clm': 'clm', 'clm, kept causal': 'clm', 'none': None}   # what comes before phase 2

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--steps', type=int, default=200); parser.add_argument('--pretrain_steps', type=int, default=200)
    parser.add_argument('--seeds', default='0,1'); parser.add_argument('--variants', default=';'.join(VARIANTS), help='separated by ;')
    parser.add_argument('--out', type=Path, required=True, help='a JSON file; what it holds already is not measured again')
    a = parser.parse_args()
    torch.set_num_threads(1); tune_cpu()
    settings = dict(steps=a.steps, pretrain_steps=a.pretrain_steps)
    before = json.loads(a.out.read_text()) if a.out.exists() else dict(settings=settings, found=[])
    if before['settings']!=settings: parser.error(f'{a.out} was measured with {before["settings"]}: give another --out')
    found = before['found']
    def keep(**row): found.append(row); a.out.write_text(json.dumps(dict(settings=settings, found=found), indent=1)); print(row, flush=True)

    for seed in map(int, a.seeds.split(',')):
        wanted = [v for v in a.variants.split(';') if not any((f['variant'],f['seed'])==(v,seed) for f in found)]
        if not wanted: continue
        sets = [f'data.seed={seed}', f'pretrain.seed={seed}', f'tune.seed={seed}', f'pretrain.steps={a.pretrain_steps}', 'pretrain.batch_tokens=4096',
                f'tune.steps={a.steps}', 'tune.batch_pairs=64', 'train.save_every=-1']
        c = {o: load_config(profile='tiny', sets=[*sets, f'pretrain.objective={o}']) for o in ('mlm','clm')}
        words = [r['text'] for r in World(seed).texts('20k')]
        rows = list(pairs(['world/finance','world/shop'], a.steps*64, seed, strategy='equal'))
        tokenizer = ChromaTokenizer.train([*words[::2], *(r['query'] for r in rows[::4])], c['mlm'].model.vocab_size)
        ids,ready = tokenizer.encode(words, max_length=256), tokenise_pairs(rows, tokenizer, 64, 1, 80)
        valid = {d: tokenizer.encode([r['text'] for r in World(seed).texts('200', split='valid') if r['domain']==d], max_length=256) for d in DOMAINS}
        tests = world_tests(c['mlm'])|dict(sts=World(seed).sts(600))
        starts,told = {},{}
        for o in sorted({VARIANTS[v] for v in wanted}-{None}):
            log,began = MetricsLog(),time.process_time()
            starts[o] = pretrain(c[o], ids, log, progress=False, valid=valid)
            told[o] = dict(eval_loss=next(r for r in reversed(log.rows) if 'eval' in r)['eval_loss'], cpu_seconds=round(time.process_time()-began))
            print(o, told[o], flush=True)
        for v in wanted:
            o = VARIANTS[v]
            model = copy.deepcopy(starts[o]) if o else ChromaModel(c['mlm'].model, seed)
            if v=='clm': model = turn_attention(model)
            tune(load_config(profile='tiny', sets=sets), model, ready, progress=False)
            encoder = ChromaMoE(model, tokenizer, 256); s = evaluate_world(encoder, tests)
            x,y = (encoder.encode_document([r[k] for r in tests['sts']]) for k in 'ab')
            keep(variant=v, seed=seed, **{d: s[d]['ndcg@10'] for d in DOMAINS}, order=s['order'],
                 sts=spearman((x*y).sum(-1), [r['score'] for r in tests['sts']]), **told.get(o, {}))

    figures = (*DOMAINS, 'order', 'sts')
    print(f"\n{'phase 1':18}{'seeds':>6}" + ''.join(f'{k:>18}' for k in figures) + f"{'perplexity':>12}")
    for v in dict.fromkeys(f['variant'] for f in found):
        mine = [f for f in found if f['variant']==v]
        said = ''.join(f"{mean(f[k] for f in mine):>10.3f} ± {stdev(f[k] for f in mine) if len(mine)>1 else 0:.3f}" for k in figures)
        print(f'{v:18}{len(mine):>6}{said}' + (f"{math.exp(mean(f['eval_loss'] for f in mine)):>12.1f}" if VARIANTS[v]=='clm' else ''))

if __name__=='__main__': main()
