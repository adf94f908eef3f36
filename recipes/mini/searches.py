"""Searches to read: queries that the model answers far better than BM25, and far worse, with what each found.

    python recipes/mini/searches.py --run runs/mini --data DIR --out recipes/mini/searches.json

Needs the scores of the run. Sets of many long documents are left out, as each is encoded again.
"""
import argparse, json
from pathlib import Path

from chroma_moe.encoder import ChromaMoE
from chroma_moe.evaluation import local_tasks
from chroma_moe.files import write_whole
from chroma_moe.systems import BM25, Dense
from chroma_moe.training import tune_cpu

SETS = ('tatqa', 'finqa', 'prodmatch', 'retail_catalog', 'banking77_intent')

def cut(text, n=160): return text if len(text)<=n else text[:n].rsplit(' ', 1)[0]+' …'

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for k in ('run','data','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    a = parser.parse_args(); tune_cpu(1)
    rows = json.loads((a.run/'scores'/'results.json').read_text(encoding='utf-8'))['rows']
    values = {(r['task'], r['system']): r['values'] for r in rows if r['kind']=='retrieval' and r['metric']=='ndcg@10'}
    systems = dict(mini=Dense(ChromaMoE.from_pretrained(a.run/'model')), bm25=BM25()); out = []
    for t in (t for t in local_tasks(a.data) if t.name.split('/')[-1] in SETS):
        gap = [m-b for m,b in zip(values[t.name, 'model'], values[t.name, 'BM25'])]
        ids,order = list(t.data['queries']),sorted(range(len(gap)), key=lambda i: gap[i])
        chosen = {ids[i]: kind for kind,some in (('worse', order[:2]), ('better', order[-2:])) for i in some}
        asked = {q: t.data['queries'][q] for q in chosen}
        found = {k: s.rank(t.data['corpus'], asked, 100) for k,s in systems.items()}
        for q,kind in chosen.items():
            right = t.data['qrels'][q]; best = max(right, key=right.get)
            place = {k: next((i for i,d in enumerate(f[q], 1) if right.get(d)), None) for k,f in found.items()}
            first = {k: cut(t.data['corpus'][f[q][0]]) if f[q] else '' for k,f in found.items()}
            out.append(dict(set=t.name.split('/')[-1], kind=kind, query=cut(asked[q], 200), right=cut(t.data['corpus'][best]), place=place, **first))
    write_whole(a.out, json.dumps(out, indent=1, ensure_ascii=False)+'\n')
    for r in out: print(f"{r['kind']} {r['set']} {r['place']}\n  Q {r['query']}\n  = {r['right']}\n  mini {r['mini']}\n  bm25 {r['bm25']}")

if __name__=='__main__': main()
