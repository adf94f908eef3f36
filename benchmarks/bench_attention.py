"Packed attention against the same attention on sorted, padded batches with a mask."
import numpy as np, torch
from run import medians
from torch.nn import functional as F

from chroma_moe.attention import packed_attention
from chroma_moe.packing import pack

N,H,D,BATCH = 256,8,64,32

def texts(n=N):
    "Lengths as in real corpora: log-normal, median 57, at most 512."
    rng = np.random.default_rng(0)
    return np.clip(np.round(np.exp(rng.normal(np.log(57), 1., n))), 4, 512).astype(int)

def pad(x, mask): # (tokens, H, D), (B, longest) -> (B, H, longest, D)
    out = torch.zeros(*mask.shape, H, D); out[mask] = x
    return out.transpose(1, 2).contiguous()

def bench():
    lengths = np.sort(texts())[::-1]
    b = pack([np.zeros(n, dtype=int) for n in lengths])
    generator = torch.Generator().manual_seed(0)
    q,k,v = (torch.randn(len(b.ids), H, D, generator=generator) for _ in range(3))

    # the peer gets its batches padded beforehand, so that only attention is measured
    padded = []
    for i in range(0, N, BATCH):
        part = torch.tensor(lengths[i:i+BATCH].copy()); start = int(lengths[:i].sum())
        mask = torch.arange(int(part.max()))<part[:,None]
        padded.append((*(pad(x[start:start+int(part.sum())], mask) for x in (q,k,v)), mask))
    def peer(): return [F.scaled_dot_product_attention(q, k, v, attn_mask=m[:,None,None]) for q,k,v,m in padded]
    def ours(): return packed_attention(q, k, v, b)
    torch.testing.assert_close(torch.cat([o.transpose(1, 2)[m] for o,(_,_,_,m) in zip(peer(), padded)]), ours(), atol=1e-5, rtol=1e-4)

    what = f'{N} texts, {len(b.ids)} tokens, {H} heads of {D}, float32; peer: SDPA on batches of {BATCH} sorted by length, padded, masked; seconds'
    with torch.no_grad(): o,p = medians(ours, peer)
    rows = [dict(name='attention forward', ours=o, peer=p, ratio=p/o, target=2.0, conditions=what)]
    leaves = [q,k,v] + [x for *qkv,_ in padded for x in qkv]
    for x in leaves: x.requires_grad_()
    def train(f):
        def step():
            for x in leaves: x.grad = None
            r = f(); (r.sum() if torch.is_tensor(r) else sum(x.sum() for x in r)).backward()
        return step
    o,p = medians(train(ours), train(peer))
    return rows + [dict(name='attention forward and backward', ours=o, peer=p, ratio=p/o, target=2.0, conditions=what)]
