"Building a token store against the bare tokenizer; reading one against training the `debug` model."
import os, tempfile
from dataclasses import replace
from pathlib import Path
from run import medians

from chroma_moe.config import load_config
from chroma_moe.masking import mask_batch
from chroma_moe.model import ChromaModel
from chroma_moe.optim import make_optimizer
from chroma_moe.packing import pack
from chroma_moe.pretrain import MaskedParts, masked_loss
from chroma_moe.store import build_store
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

TEXTS,VOCAB,SLICE,READ = 40_000,8192,1000,400_000

def building(rows, tokenizer, home):
    "Seconds of a build, and of encoding alone with as many threads as the build has processes."
    cores,texts = os.cpu_count(),[r['text'] for r in rows]
    os.environ.pop('TOKENIZERS_PARALLELISM', None)   # the bare tokenizer uses its threads
    def ours(): return build_store(rows, tokenizer, home/'store', cores, chunk_chars=500_000, overwrite=True)
    def peer():
        for i in range(0, len(texts), SLICE): tokenizer.tok.encode_batch(texts[i:i+SLICE], add_special_tokens=False)
    store = ours(); o,p = medians(ours, peer, rounds=5)
    what = (f'{TEXTS} texts of world, {store.tokens} tokens, vocabulary {VOCAB}; {cores} processes to files that are synced; peer: encode_batch '
            f'alone, {cores} threads, {SLICE} texts at a time; tokens a second')
    return store, dict(name='store build', ours=store.tokens/o, peer=store.tokens/p, ratio=p/o, target=0.8, conditions=what)

def reading(store, c):
    "Tokens a second of reading (packed, and with masks), and of training."
    p,reader,model = c.pretrain,store.batches(c.pretrain.batch_tokens, c.data.max_length),ChromaModel(c.model)
    optimizer = make_optimizer([*model.named_parameters()], c.optim)
    some,seen = MaskedParts(store, replace(c, pretrain=replace(p, batch_tokens=2048))),dict(packed=0, masked=0, trained=0)
    def read(kind, make):
        def f():
            seen[kind] = 0
            while seen[kind]<READ: seen[kind] += len(make(next(reader)))
        return f
    def train():
        [part] = next(some); (masked_loss(model, part.batch).sum/part.terms).backward()
        optimizer.step(); optimizer.zero_grad(); seen['trained'] = part.tokens
    seconds = medians(read('packed', lambda b: pack(b.texts).ids), train, rounds=5), \
              medians(read('masked', lambda b: mask_batch(b.texts, [(0,*k) for k in b.keys], p.mask_ratio, p.mean_span).batch.ids), train, rounds=3)
    rows = []
    for kind,(r,t),target in zip(('packed','masked'), seconds, (20.0, None)):
        what = (f'batches of {p.batch_tokens} tokens, {kind}; peer: one step of the debug model on about 2048 tokens, float32, AdamW; tokens a second')
        rows.append(dict(name=f'store reading, {kind}', ours=seen[kind]/r, peer=seen['trained']/t, ratio=seen[kind]/r/(seen['trained']/t), target=target,
                         conditions=what))
    return rows

def bench():
    rows = list(World().texts(TEXTS))
    tokenizer = ChromaTokenizer.train([r['text'] for r in rows[:10_000]], VOCAB)
    with tempfile.TemporaryDirectory() as d:
        store,built = building(rows, tokenizer, Path(d))
        return [built, *reading(store, load_config(profile='debug'))]
