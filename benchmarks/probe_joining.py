"""What does joining bags buy, and what do its settings? Full dev sets, no training.

    python benchmarks/probe_joining.py --data DIR --texts runs/mini/data/texts.jsonl --out F runs/mini/bag0 runs/mini/bag1 ...

The folders are bags of recipes/mini/run.py that differ in their seed. Scores: nDCG@10 on the full dev sets, of each bag alone, of the first two,
three, ... joined, and of all with other settings. The last lines compare with all joined as the recipe does it.
"""
import argparse, json
from pathlib import Path

import numpy as np, torch

from chroma_moe.encoder import ChromaMoE, encode_texts
from chroma_moe.evaluation import local_tasks
from chroma_moe.files import write_whole
from chroma_moe.gradcache import cut
from chroma_moe.indexing import nearest
from chroma_moe.joining import as_bag, join_bags
from chroma_moe.metrics import paired_bootstrap, score_queries
from chroma_moe.mixing import texts
from chroma_moe.tokenizer import DOCUMENT, QUERY
from chroma_moe.training import tune_cpu

def packed(lists):
    "Batches of similar lengths, and where each text is in them."
    return cut(lists, [1]*len(lists), 1<<17)

class Judge:
    "nDCG@10 of bags on dev sets that are tokenised once."
    def __init__(self, tasks, tokenizer, length):
        self.sets = {}
        for t in tasks:
            d = t.data; place,asked = {x: str(i) for i,x in enumerate(d['corpus'])},[q for q in d['queries'] if q in d['qrels']]
            docs = tokenizer.encode(list(d['corpus'].values()), DOCUMENT, length)
            queries = encode_texts(tokenizer, [d['queries'][q] for q in asked], QUERY, length, '')[0]
            right = {q: {place[x]: g for x,g in d['qrels'][q].items() if x in place} for q in asked}
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

def summed(found, base='surprise 0.8'):
    "variant -> the mean of each set over its seeds, and the difference of the mean of all sets to `base`, with its interval over queries."
    by = {}
    for f in found: by.setdefault(f['variant'], []).append(f['scores'])
    many = {v: {k: np.mean([s[k] for s in seeds], 0) for k in seeds[0]} for v,seeds in by.items()}
    weigh = lambda s: np.concatenate([np.array(v)/len(v) for v in s.values()])*sum(map(len, s.values()))/len(s)    # each set counts the same
    def difference(s): return [round(x, 4) for x in paired_bootstrap(weigh(s).tolist(), weigh(many[base]).tolist())[:3]]
    out = [dict(variant=v, seeds=len(by[v]), scores={k: round(float(x.mean()), 4) for k,x in s.items()}, difference=difference(s)) for v,s in many.items()]
    for r in out:
        d,low,high = r['difference']; print(f"{r['variant']:14}{r['seeds']:3} {np.mean([*r['scores'].values()]):.4f}  {d:+.4f} [{low:+.4f}, {high:+.4f}]")
    return out

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
    write_whole(a.out, json.dumps(dict(settings=dict(size=a.size, length=a.length, bags=n), found=summed(found)), separators=(',',':'))+'\n')

if __name__=='__main__': main()
