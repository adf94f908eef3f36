"""What does joining bags buy, and what do its settings? Full dev sets, no training.

    python benchmarks/probe_joining.py --data DIR --texts runs/mini/data/texts.jsonl --out F runs/mini/bag0 runs/mini/bag1 ...

The folders are bags of recipes/mini/run.py that differ in their seed. Scores: nDCG@10 of each query of each dev set, of each bag alone, of the first two,
three, ... joined, and of all with other settings. The last lines compare with the mean of the single bags, and with all joined as the recipe does it.
"""
import argparse, json
from pathlib import Path

import numpy as np, torch

from chroma_moe.encoder import ChromaMoE, encode_texts
from chroma_moe.evaluation import local_tasks
from chroma_moe.files import write_whole
from chroma_moe.indexing import nearest
from chroma_moe.joining import as_bag, join_bags
from chroma_moe.metrics import paired_bootstrap, score_queries
from chroma_moe.mixing import texts
from chroma_moe.packing import pack, token_batches
from chroma_moe.tokenizer import DOCUMENT, QUERY
from chroma_moe.training import tune_cpu

def packed(lists, budget=1<<17):
    "Batches of similar lengths, and where each text is in them."
    order = sorted(range(len(lists)), key=lambda i: -len(lists[i]))
    return [pack([lists[order[j]] for j in g], 1) for g in token_batches([len(lists[i]) for i in order], budget)], torch.tensor(order).argsort()

class Judge:
    "nDCG@10 of bags on dev sets that are tokenised once."
    def __init__(self, tasks, tokenizer, length):
        self.sets = {}
        for t in tasks:
            d = t.data; ids,asked = list(d['corpus']),[q for q in d['queries'] if q in d['qrels']]
            docs = tokenizer.encode([d['corpus'][i] for i in ids], DOCUMENT, length)
            queries = encode_texts(tokenizer, [d['queries'][q] for q in asked], QUERY, length, '')[0]
            right = {q: {str(ids.index(x)): g for x,g in d['qrels'][q].items() if x in d['corpus']} for q in asked}
            self.sets[t.name.split('/')[-1]] = packed(docs), packed(queries), asked, right

    @torch.no_grad()
    def __call__(self, bag, width=None):
        out = {}
        for name,(docs,queries,asked,right) in self.sets.items():
            def vectors(batches, place): return torch.nn.functional.normalize(torch.cat([bag.embed(b)[0][:,:width] for b in batches])[place], dim=-1)
            _,found = nearest(vectors(*queries), vectors(*docs), 10)
            out[name] = score_queries({q: [str(i) for i in row] for q,row in zip(asked, found.tolist())}, right)['ndcg@10'].round(4).tolist()
        return out

def mean(s): return np.mean([np.mean(v) for v in s.values()])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('bags', nargs='+', type=Path)
    for k in ('data','texts','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    parser.add_argument('--size', type=int, default=10000); parser.add_argument('--length', type=int, default=1024)
    a = parser.parse_args(); tune_cpu(); found = []
    chromas = [ChromaMoE.from_pretrained(f) for f in a.bags]; tokenizer = chromas[0].tokenizer
    bags = [as_bag(c, str(f)) for f,c in zip(a.bags, chromas)]; n,width = len(bags),bags[0].embed_dim
    judge = Judge([t for t in local_tasks(a.data) if t.kind=='retrieval'], tokenizer, a.length)
    rows = [r['text'] for r in texts([str(a.texts)])]
    batches,_ = packed(tokenizer.encode([rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:a.size]], DOCUMENT, a.length))
    def keep(variant, bag, seed=0, width=None):
        found.append(dict(variant=variant, seed=seed, scores=judge(bag, width)))
        by = ' '.join(f'{k[:9]} {np.mean(v):.3f}' for k,v in found[-1]['scores'].items())
        print(f'{variant:14}{seed:3} {by} | {mean(found[-1]["scores"]):.4f}', flush=True)
    def strange(bag, s): bag.surprise = s; return bag
    for i,b in enumerate(bags): keep('alone', b, i)
    for i,b in enumerate(bags): keep('surprise', strange(b, .8), i); b.surprise = 0.
    for k in range(2, n): keep(f'join {k}', join_bags(bags[:k], batches, width))
    for p in (0.,.1): keep(f'power {p:g}', join_bags(bags, batches, width, p))
    joined = join_bags(bags, batches, width); keep(f'join {n}', joined)
    for s in (.4,.8,1.2): keep(f'surprise {s:g}', strange(joined, s))
    for w in (64,128,256,512): keep(f'first {w}', strange(joined, .8), width=w)
    write_whole(a.out, json.dumps(dict(settings=dict(size=a.size, length=a.length, bags=n), found=found), separators=(',',':'))+'\n')

    base = next(f['scores'] for f in found if f['variant']==f'surprise {.8:g}')
    weigh = lambda s: np.concatenate([np.array(v)*len(base)**-1*1000/len(v) for v in s.values()])            # each set counts the same
    m = sum(map(len, base.values()))/1000
    print(f"\nthe mean of all sets against {n} joined with surprise 0.8, by seed [95% interval]")
    for name in dict.fromkeys(f['variant'] for f in found):
        said = [paired_bootstrap(weigh(f['scores']).tolist(), weigh(base).tolist()) for f in found if f['variant']==name]
        print(f'{name:14}' + '; '.join(f'{d*m:+.4f} [{lo*m:+.4f}, {hi*m:+.4f}]' for d,lo,hi,_ in said))

if __name__=='__main__': main()
