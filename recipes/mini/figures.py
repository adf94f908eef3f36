"""Scores of several runs of the recipe in one small file, which the chapter of results reads.

    python recipes/mini/figures.py --data DIR --out recipes/mini/results.json NAME=RUN [NAME=RUN ...]

RUN is the --out of run.py, or any folder that chroma_evaluate wrote results.json to. For each system: nDCG@10 by dev set with its interval, and on the
queries that hold a number or an identifier; learning curves of each stage; bytes of the model folder; which experts read the texts
of each source; how well the joined bag ranks the pairs that it was trained on.
"""
import argparse, json, re
from pathlib import Path

import numpy as np, torch

from chroma_moe.encoder import ChromaMoE, encode_texts
from chroma_moe.evaluation import local_tasks
from chroma_moe.files import write_whole
from chroma_moe.metrics import bootstrap, score_run
from chroma_moe.monitor import read_metrics
from chroma_moe.packing import pack
from chroma_moe.systems import Dense
from chroma_moe.tokenizer import DOCUMENT

NUMBER = re.compile(r'(?<![\w])\$?\d[\d,.]*%?(?!\w)')       # 12, 4.1, 2019
CODE = re.compile(r'\b(?=\w*\d)(?=\w*[A-Za-z])[\w-]{4,}\b') # a model number: letters and digits in one word

def slices(queries):
    "Name -> which queries belong to it."
    return dict(all=[True]*len(queries), number=[bool(NUMBER.search(q)) for q in queries], code=[bool(CODE.search(q)) for q in queries])

def scores(path, tasks):
    "system -> set -> slice -> mean, low, high, queries."
    out = {}
    for r in json.loads(path.read_text(encoding='utf-8'))['rows']:
        name = r['task'].split('/')[-1]
        if r['kind']=='retrieval' and r['metric']=='ndcg@10' and r.get('values'):
            v = np.array(r['values'])
            for s,mine in slices(list(tasks[r['task']].data['queries'].values())).items():
                few = v[np.array(mine)]
                if len(few)>=30: out.setdefault(r['system'], {}).setdefault(name, {})[s] = [*(round(float(x), 4) for x in bootstrap(few)), len(few)]
        elif r['value'] is not None and r['metric'] in ('spearman','knn_accuracy'):
            found = [round(r[k], 4) if r.get(k) is not None else None for k in ('value','low','high')]
            out.setdefault(r['system'], {})[r['task']] = dict(all=[*found, r['items']])
    return out

def curves(run):
    "stage -> step, loss or held-out nDCG."
    out = {}
    for stage in ('bag0', 'tuned'):
        if not (run/stage/'metrics.jsonl').exists(): continue
        rows = read_metrics(run/stage/'metrics.jsonl')
        out[stage] = dict(loss=[[r['step'], round(r['loss'], 3)] for r in rows if 'loss' in r][::5],
                          ndcg=[[r['step'], round(r['eval_ndcg'], 4)] for r in rows if 'eval_ndcg' in r],
                          tokens=max((r.get('tokens', 0) for r in rows), default=0))
    return out

def few_texts(run, n=8):
    "source -> some short texts, from all over."
    out = {}
    for line in open(run/'data'/'texts.jsonl', encoding='utf-8'):
        r = json.loads(line)
        if 60<=len(r['text'])<=220: out.setdefault(r['source'], []).append(r['text'])
    return {s: t[::max(1, len(t)//n)][:n] for s,t in sorted(out.items()) if len(t)>=n}

def memory(run, n=2000):
    "source -> nDCG@10 of training pairs by the joined bag, among the answers of their source, and pairs asked."
    chroma,by = ChromaMoE.from_pretrained(run/'joined'),{}
    for line in open(run/'data'/'pairs.jsonl', encoding='utf-8'): r = json.loads(line); by.setdefault(r['source'], []).append(r)
    out = {}
    for s,rows in sorted(by.items()):
        rows = rows[::max(1, len(rows)//n)][:n]
        docs = {t: str(i) for i,t in enumerate(dict.fromkeys(r['positive'] for r in rows))}
        right = {}
        for r in rows: right.setdefault(r['query'], {})[docs[r['positive']]] = 1.
        found = Dense(chroma).rank({i: t for t,i in docs.items()}, {q: q for q in right}, 10)
        out[s] = [round(score_run(found, right)['ndcg@10'], 4), len(right)]
    return out

def atlas(run):
    "source -> share of the visits to each expert of the first mixture, for the short texts."
    chroma = ChromaMoE.from_pretrained(run/'model')
    with torch.no_grad():
        by = {s: chroma.model.hidden(pack(encode_texts(chroma.tokenizer, texts, DOCUMENT, 256)[0]))[1] for s,texts in few_texts(run, 40).items()}
    return {s: [round(x, 4) for x in (v.count[0]/v.count[0].sum()).tolist()] for s,v in by.items() if v}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='NAME=RUN')
    for k in ('data','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    a = parser.parse_args(); tasks = {t.name: t for t in local_tasks(a.data)}; found = {}
    for name,_,run in (x.partition('=') for x in a.runs):
        run = Path(run); place = run/'scores'/'results.json' if (run/'scores').is_dir() else run/'results.json'
        found[name] = dict(scores=scores(place, tasks), curves=curves(run))
        if (run/'joined').is_dir(): found[name]['memory'] = memory(run)
        if (run/'model').is_dir():
            found[name]['atlas'] = atlas(run)
            found[name]['bytes'] = {p.name: p.stat().st_size for p in sorted((run/'model').iterdir()) if p.is_file()}
    write_whole(a.out, json.dumps(found, indent=None, separators=(',', ':'))+'\n')
    for name,f in found.items():
        for system,by in f['scores'].items():
            means = [v['all'][0] for k,v in by.items() if any(t.kind=='retrieval' and t.name.split('/')[-1]==k for t in tasks.values())]
            print(f'{name:12}{system:14}' + ' '.join(f"{k[:12]} {v['all'][0]:.3f}" for k,v in by.items()) + f' | mean {np.mean(means):.4f}')

if __name__=='__main__': main()
