"""From a folder of corpus, pairs and dev sets to the files that the recipe trains on: clean rows, and what each source may be used for.

    python recipes/mini/prepare.py --data DIR --out runs/mini/data [--strict] [--licensed] [--without SOURCE]

The folder holds `corpus/*.jsonl.zst` (text, domain, source), `train/*.jsonl.zst` (query, positive, negatives, source, domain) and the dev sets
`retrieval/*/` (corpus, queries.jsonl, qrels.tsv). With --strict everything goes that is, or nearly is, a judged document or a query of a dev set.
"""
import argparse, json
from collections import Counter
from pathlib import Path

from chroma_moe.evaluation import local_tasks
from chroma_moe.files import write_whole
from chroma_moe.leaks import LeakGuard
from chroma_moe.mixing import pairs, texts

# sources whose terms are reciprocal or not stated, as prefixes of their names
UNCLEAR = ('docs_merch', 'howto_heading_merch', 'howto_title_merch', 'products_', 'product_match_')
SHARED = 'banking77' # its documents are the training messages themselves, in the held-out test too: they stay

def guard_of(folder):
    "What a strict run may not have seen: judged documents, and queries."
    sets = {}
    for t in local_tasks(folder):
        if t.kind!='retrieval': continue
        name,judged = t.name.split('/')[-1], {d for found in t.data['qrels'].values() for d in found}
        sets[f'{name} queries'] = list(t.data['queries'].values())
        if not name.startswith(SHARED): sets[f'{name} documents'] = [v for k,v in t.data['corpus'].items() if k in judged]
    return LeakGuard(sets)

def intents(rows):
    "Message -> the name of its intent, from the pairs that say so."
    return {r['query']: r['positive'] for r in rows if r['source']=='banking77_intent_name'}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--data', type=Path, required=True); parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--strict', action='store_true', help='leave out what the dev sets are judged on')
    parser.add_argument('--licensed', action='store_true', help='only sources with clear terms')
    parser.add_argument('--without', action='append', default=[], help='a source of pairs to leave out, by the beginning of its name (may be repeated)')
    a = parser.parse_args(); a.out.mkdir(parents=True, exist_ok=True)
    unclear = UNCLEAR if a.licensed else ()
    kept = dict(texts=[r for r in texts(str(a.data/'corpus')) if not r['source'].startswith(unclear)],
                pairs=[r for r in pairs(str(a.data/'train')) if not r['source'].startswith((*unclear, *a.without))])
    said = {k: len(v) for k,v in kept.items()}
    if a.strict:
        for k in kept:
            guard = guard_of(a.data); kept[k] = guard.clean(kept[k]); print(f'{k}\n{guard.table()}\n')
    intent = intents(kept['pairs'])
    for r in kept['pairs']:                                # two messages of one intent ask the same: neither is wrong for the other
        if r['source'].startswith(SHARED) and r['query'] in intent: r['query_id'] = intent[r['query']]
    kept['valid'] = kept['pairs'][99::200]; del kept['pairs'][99::200]
    said['valid'] = said['pairs']
    for k,rows in kept.items():
        write_whole(a.out/f'{k}.jsonl', ''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in rows))
        print(f'{k}: {len(rows):,} of {said[k]:,} rows')
        for s,n in sorted(Counter(r['source'] for r in rows).items()): print(f'  {s:24}{n:8,}')

if __name__=='__main__': main()
