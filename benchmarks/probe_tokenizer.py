"""Which tokenizer retrieves best? Capitals folded or kept, digits whole or split, with or without terms: mean nDCG@10 over local sets.

A folder given as --data holds
    corpus/*.jsonl.zst                  `text`: what the tokenizers are trained on
    train/pairs.jsonl.zst               `query`, `positive`, `negatives`: trained on too, and what a bag of tokens learns from
    retrieval/SET/corpus.jsonl.zst      `_id`, `text`
    retrieval/SET/queries.jsonl         `_id`, `text`
    retrieval/SET/qrels.tsv             a header, then query, document, grade
Each tokenizer is judged twice: by BM25 over its tokens, and by the mean of token vectors that a short contrastive run has trained."""
import argparse, io, json, random, time
from pathlib import Path

import bm25s, numpy as np, torch, zstandard
from chroma_moe.config import load_config
from chroma_moe.metrics import ndcg_at
from chroma_moe.packing import pack, token_batches
from chroma_moe.terms import TERMS
from chroma_moe.tokenizer import DOCUMENT, QUERY, ChromaTokenizer
from chroma_moe.tune import TokenBag, tokenise_pairs, tune

VARIANTS = {'folded, whole': dict(), 'folded, split': dict(digits='split'), 'cased, whole': dict(lowercase=False),
            'cased, split': dict(lowercase=False, digits='split'), 'folded, whole, terms': dict(terms=TERMS)}

def rows(path):
    if path.suffix=='.jsonl': yield from map(json.loads, open(path, encoding='utf-8')); return
    with open(path, 'rb') as f: yield from map(json.loads, io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), 'utf-8'))

def read_set(folder):
    "corpus, queries, grades."
    grades = {}
    for line in open(folder/'qrels.tsv', encoding='utf-8').read().splitlines()[1:]:
        q,d,g = line.split('\t'); grades.setdefault(q, {})[d] = float(g)
    corpus,queries = ({r['_id']: r['text'] for r in rows(folder/name)} for name in ('corpus.jsonl.zst', 'queries.jsonl'))
    return corpus, {q: t for q,t in queries.items() if q in grades}, grades

def ndcg(ids, queries, order, grades): return float(np.mean([ndcg_at([ids[i] for i in o], grades[q]) for q,o in zip(queries, order)]))

def by_words(tok, corpus, queries, grades):
    "BM25 over token ids, without stop words or stems."
    spell = lambda texts, marker: [[str(i) for i in t[1:-1]] for t in tok.encode(texts, marker, 4096)]
    index = bm25s.BM25(k1=1.2, b=0.75, method='lucene'); index.index(spell(list(corpus.values()), DOCUMENT), show_progress=False)
    order,_ = index.retrieve(spell(list(queries.values()), QUERY), k=10, show_progress=False)
    return ndcg(list(corpus), queries, order, grades)

@torch.no_grad()
def by_bag(tok, bag, corpus, queries, grades):
    def vectors(texts, marker):
        ids = tok.encode(list(texts), marker, 512)
        return torch.cat([bag.embed(pack([ids[i] for i in b], prompt=1))[0] for b in token_batches([len(i) for i in ids], 65536)])
    order = (vectors(queries.values(), QUERY) @ vectors(corpus.values(), DOCUMENT).T).topk(10).indices.tolist()
    return ndcg(list(corpus), queries, order, grades)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--vocab_size', type=int, default=32000)
    parser.add_argument('--steps', type=int, default=300, help='of the contrastive run')
    parser.add_argument('--max_length', type=int, default=128, help='tokens of a training text')
    parser.add_argument('--seeds', type=int, default=1, help='bags a tokenizer; their mean is shown')
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = list(rows(args.data/'train'/'pairs.jsonl.zst')); random.Random(0).shuffle(pairs)
    def texts():
        for p in sorted((args.data/'corpus').glob('*.jsonl.zst')): yield from (r['text'] for r in rows(p))
        for r in pairs: yield r['query']; yield r['positive']
    sets = {p.name: read_set(p) for p in sorted((args.data/'retrieval').iterdir()) if p.is_dir()}
    print(f"{'':24}{'':6}{''.join(f'{n[:10]:>11}' for n in sets)}{'mean':>8}")
    for name,kwargs in VARIANTS.items():
        start = time.perf_counter()
        tok = ChromaTokenizer.train(texts(), args.vocab_size, **kwargs)
        scores = dict(BM25=[by_words(tok, *s) for s in sets.values()])
        p,runs = tokenise_pairs(pairs, tok, args.max_length),[]
        for seed in range(args.seeds):
            bag = TokenBag(len(tok), 128, seed)
            c = load_config(profile='tiny', sets=[f'tune.steps={args.steps}', 'tune.batch_pairs=256', 'tune.lr=0.05', 'tune.min_lr=0.0005',
                                                  f'tune.seed={seed}'])
            tune(c, bag, p, progress=False); runs.append([by_bag(tok, bag, *s) for s in sets.values()])
        scores['bag'] = np.mean(runs, 0).tolist()
        for how,values in scores.items(): print(f"{name:24}{how:6}{''.join(f'{v:11.3f}' for v in values)}{np.mean(values):8.3f}", flush=True)
        print(f'{time.perf_counter()-start:.0f} s')

if __name__=='__main__': main()
