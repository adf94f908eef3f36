"""How long does a query wait for its vector, and how long do documents? Folders of models beside a BERT of MiniLM's shape, on the texts of the dev sets.

    python benchmarks/probe_latency.py --data DIR --model models/chroma-mini --out F
    python benchmarks/probe_latency.py --data DIR --model models/chroma-mini --model runs/mini/model_transformer --out F

All read the same texts with the same tokenizer, on one thread: --queries queries one at a time, as a server meets them, and --documents documents at once, as
an index is built. The BERT has six layers of 384 and twelve heads, random weights, mean pooling, in sentence-transformers. The systems take turns, query by
query and eight times over the documents, so that a busy machine slows all of them alike. F holds the median time of each over that of the BERT.
"""
import argparse, json, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np, torch

from chroma_moe.encoder import ChromaMoE
from chroma_moe.evaluation import local_tasks
from chroma_moe.training import tune_cpu

def bert_of(tokenizer, folder):
    "A BERT of the shape of all-MiniLM-L6-v2, with our tokens."
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    shape = BertConfig(vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(shape).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.tok, pad_token='<pad>', model_max_length=512).save_pretrained(folder)
    return SentenceTransformer(modules=[models.Transformer(str(folder), max_seq_length=512), models.Pooling(384)], device='cpu')

def timed(f, x):
    began = time.perf_counter(); f(x); return time.perf_counter()-began

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for k in ('data','out'): parser.add_argument(f'--{k}', type=Path, required=True)
    parser.add_argument('--model', action='append', required=True, help='a model folder (may be repeated)')
    for k,v in (('queries',300), ('documents',512)): parser.add_argument(f'--{k}', type=int, default=v)
    a = parser.parse_args(); torch.set_num_threads(1); tune_cpu()
    tasks,rng = [t for t in local_tasks(a.data) if t.kind=='retrieval'],np.random.default_rng(0)
    def some(key, n): return [x for t in tasks for x in rng.permutation(sorted(t.data[key].values()))[:max(1, n//len(tasks))].tolist()]
    queries,documents = some('queries', a.queries),some('corpus', a.documents)
    ours = {m: ChromaMoE.from_pretrained(m) for m in a.model}
    for m in ours.values(): m.max_length = 512
    with tempfile.TemporaryDirectory() as d:
        bert = bert_of(next(iter(ours.values())).tokenizer, d)
        encode = {'bert': lambda x: bert.encode(x, show_progress_bar=False), **{k: m.encode for k,m in ours.items()}}
        for f in encode.values(): f(queries[:8]); f(documents[:8])
        waits = {k: ([], []) for k in encode}
        for q in queries:
            for k,f in encode.items(): waits[k][0].append(timed(f, [q]))
        for _ in range(8):
            for k,f in encode.items(): waits[k][1].append(timed(f, documents))
        found = [dict(model=Path(k).name, bytes=sum(f.stat().st_size for f in Path(d if k=='bert' else k).rglob('*') if f.is_file()),
                      query=round(median(one)/median(waits['bert'][0]), 4), documents=round(median(many)/median(waits['bert'][1]), 4))
                 for k,(one,many) in waits.items()]
    a.out.write_text(json.dumps(dict(queries=len(queries), documents=len(documents), found=found))+'\n')
    print(f"{'':24}{'MB':>8}{'query':>10}{'documents':>12}   (times of the BERT)")
    for f in found: print(f"{f['model']:24}{f['bytes']/1e6:8.1f}{f['query']:10.3f}{f['documents']:12.3f}")

if __name__=='__main__': main()
