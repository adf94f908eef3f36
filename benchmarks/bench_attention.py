"Packed attention against the same attention on sorted, padded batches with a mask; latent attention against plain attention."
import numpy as np, torch
from run import medians
from torch import nn
from torch.nn import functional as F

from chroma_moe.attention import make_attention, packed_attention, rope_frequencies, rope_table
from chroma_moe.config import load_config
from chroma_moe.packing import pack

N,H,D = 256,8,64

def lengths_like_texts(n=N):
    "Lengths as in real corpora: log-normal, median 57, at most 512; longest first."
    rng = np.random.default_rng(0)
    return np.sort(np.clip(np.round(np.exp(rng.normal(np.log(57), 1., n))), 4, 512).astype(int))[::-1]

def pad(x, mask): # (tokens, H, D), (B, longest) -> (B, H, longest, D)
    out = torch.zeros(*mask.shape, H, D); out[mask] = x
    return out.transpose(1, 2).contiguous()

def train(f, leaves):
    "`f` with its backward pass, gradients made anew."
    def step():
        for x in leaves: x.grad = None
        f().backward()
    return step

def packed_against_padded(size):
    lengths = lengths_like_texts()
    b = pack([np.zeros(n, dtype=int) for n in lengths])
    generator = torch.Generator().manual_seed(0)
    q,k,v = (torch.randn(len(b.ids), H, D, generator=generator) for _ in range(3))

    # the peer gets its batches padded beforehand, so that only attention is measured
    padded = []
    for i in range(0, N, size):
        part = torch.tensor(lengths[i:i+size].copy()); start = int(lengths[:i].sum())
        mask = torch.arange(int(part.max()))<part[:,None]
        padded.append((*(pad(x[start:start+int(part.sum())], mask) for x in (q,k,v)), mask))
    def peer(): return [F.scaled_dot_product_attention(q, k, v, attn_mask=m[:,None,None]) for q,k,v,m in padded]
    def ours(): return packed_attention(q, k, v, b)
    torch.testing.assert_close(torch.cat([o.transpose(1, 2)[m] for o,(_,_,_,m) in zip(peer(), padded)]), ours(), atol=1e-5, rtol=1e-4)

    what = f'{N} texts, {len(b.ids)} tokens, {H} heads of {D}, float32; peer: SDPA on batches of {size} sorted by length, padded, masked; seconds'
    with torch.no_grad(): o,p = medians(ours, peer)
    rows = [dict(name=f'attention forward, peer pads {size} texts', ours=o, peer=p, ratio=p/o, target=2. if size==64 else None, conditions=what)]
    own,theirs = [q,k,v],[x for *qkv,_ in padded for x in qkv]
    for x in own+theirs: x.requires_grad_()
    o,p = medians(train(lambda: ours().sum(), own), train(lambda: sum(x.sum() for x in peer()), theirs))
    return rows + [dict(name=f'attention forward and backward, peer pads {size} texts', ours=o, peer=p, ratio=p/o, target=3. if size==64 else None,
                        conditions=what)]

def latent_against_plain(profile, target, n):
    "Whole layers: projections, rotation, attention."
    b = pack([range(l) for l in lengths_like_texts(n)])
    x = torch.randn(len(b.ids), load_config(profile=profile).model.dim, generator=torch.Generator().manual_seed(0))
    def layer(*sets):
        m = load_config(profile=profile, sets=list(sets)).model; made = make_attention(m)
        for p in made.parameters():
            if p.ndim>1: nn.init.normal_(p, std=p.shape[-1]**-0.5, generator=torch.Generator().manual_seed(0))
        turn = rope_table(512, rope_frequencies(m.attention.turned)).float()[b.positions]
        return (lambda: made(x, b, turn)), [x, *made.parameters()], m.attention
    (latent,own,a),(plain,theirs,_) = layer(),layer('model.attention.kind=mha')
    what = f'{n} texts, {len(x)} tokens, width {x.shape[1]}, {a.heads} heads of {a.width}, float32; peer: the same with kind mha; seconds'
    with torch.no_grad(): o,p = medians(latent, plain)
    rows = [dict(name=f'latent attention forward, {profile} width', ours=o, peer=p, ratio=p/o, target=1/target, conditions=what)]
    x.requires_grad_()
    o,p = medians(train(lambda: latent().sum(), own), train(lambda: plain().sum(), theirs))
    return rows + [dict(name=f'latent attention forward and backward, {profile} width', ours=o, peer=p, ratio=p/o, target=1/target, conditions=what)]

def bench():
    return [row for size in (32,64) for row in packed_against_padded(size)] + latent_against_plain('debug', 0.85, 64) + latent_against_plain('full', 0.95, 16)
