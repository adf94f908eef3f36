"A whole masked-prediction step of `debug` against transformers' DeepseekV2Model of the same sizes, padded."
import numpy as np, torch
from run import medians
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV2Model

from chroma_moe.blockwise import blockwise_cross_entropy
from chroma_moe.config import OptimConfig, load_config
from chroma_moe.model import ChromaModel
from chroma_moe.optim import make_optimizer
from chroma_moe.packing import pack

TEXTS,MASKED,ROUNDS = 64,0.15,3

def texts(m, n=TEXTS):
    "Token ids with lengths as in real corpora: log-normal, median 57, at most 512; and the masked positions of each."
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(np.exp(rng.normal(np.log(57), 1., n))), 4, 512).astype(int)
    ids = [rng.integers(0, m.vocab_size, l) for l in lengths]
    return ids, [np.sort(rng.choice(l, max(1, round(MASKED*l)), replace=False)) for l in lengths]

def peer_model(m):
    "DeepseekV2Model of the sizes of `m`, with its fastest experts on this machine."
    a,e = m.attention,m.moe
    config = DeepseekV2Config(vocab_size=m.vocab_size, hidden_size=m.dim, num_hidden_layers=m.layers, num_attention_heads=a.heads,
        num_key_value_heads=a.heads, q_lora_rank=a.q_rank or None, kv_lora_rank=a.kv_rank, qk_nope_head_dim=a.nope_dim, qk_rope_head_dim=a.rope_dim,
        v_head_dim=a.v_dim, n_routed_experts=e.experts, num_experts_per_tok=e.top_k, moe_intermediate_size=e.expert_dim,
        n_shared_experts=e.shared_width//e.expert_dim, first_k_dense_replace=0, topk_method='greedy', n_group=1, topk_group=1,
        max_position_embeddings=512, rms_norm_eps=m.norm_eps, pad_token_id=0, use_cache=False)
    config._attn_implementation,config._experts_implementation = 'sdpa','grouped_mm'
    return DeepseekV2Model(config)

def padded(ids, where, size):
    "Batches of `size` texts sorted by length: ids, a mask that sees both ways, masked positions, their words."
    order,out = sorted(range(len(ids)), key=lambda i: -len(ids[i])),[]
    for part in (order[i:i+size] for i in range(0, len(order), size)):
        x = torch.zeros(len(part), len(ids[part[0]]), dtype=torch.long)
        for row,i in zip(x, part): row[:len(ids[i])] = torch.from_numpy(ids[i])
        real = torch.arange(x.shape[1]) < torch.tensor([len(ids[i]) for i in part])[:,None]
        flat = torch.cat([torch.from_numpy(where[i])+r*x.shape[1] for r,i in enumerate(part)])
        out.append((x, real[:,None,None].expand(-1, 1, x.shape[1], -1), flat, x.flatten()[flat]))
    return out

def steps(m):
    "Our step, and the peer's for a size of its batches."
    ids,where = texts(m)
    masked = sum(map(len, where))
    model = ChromaModel(m).train(); opt = make_optimizer(list(model.named_parameters()), OptimConfig())
    b = pack(ids); starts = np.cumsum([0, *b.lengths])
    flat = torch.cat([torch.from_numpy(where[i]+s) for i,s in zip(b.order.tolist(), starts)])
    def ours(asked=True):
        h = model.hidden(b, rows=flat)[0] if asked else model.hidden(b)[0][flat]
        blockwise_cross_entropy(*model.words(h), b.ids[flat])[0].backward()
        opt.step(); opt.zero_grad()
    peer = peer_model(m).train(); peer_opt = make_optimizer(list(peer.named_parameters()), OptimConfig())
    def step_of(size):
        batches = padded(ids, where, size)
        def step():
            for x,mask,at,word in batches:
                h = peer(input_ids=x, attention_mask=mask).last_hidden_state.flatten(0, 1)
                (F.cross_entropy(F.linear(h[at], peer.embed_tokens.weight), word, reduction='sum')/masked).backward()
            peer_opt.step(); peer_opt.zero_grad()
        return step
    count = lambda model: sum(p.numel() for n,p in model.named_parameters() if not n.startswith('pool.'))
    return ours, step_of, b, count(model), count(peer)

def bench(sizes=(8,16,32)):
    ours,step_of,b,n,peer_n = steps(load_config(profile='debug').model)
    assert n==peer_n, f'{n} parameters against {peer_n}'
    o,every,*peers = medians(ours, lambda: ours(asked=False), *map(step_of, sizes), rounds=ROUNDS)
    what = (f'{TEXTS} texts, {len(b.ids)} tokens, the same words masked, {n:,} parameters each, float32, no dropout, fused AdamW; peer: DeepseekV2Model, '
            'grouped_mm experts, sdpa, words scored at masked positions only, texts sorted by length and padded in batches of ')
    rows = [dict(name=f'masked-prediction step, peer pads {size} texts', ours=TEXTS/o, peer=TEXTS/p, ratio=p/o, target=1.8 if size==32 else None,
                 conditions=f'{what}{size}; texts a second') for size,p in zip(sizes, peers)]
    best = min(peers)
    return rows + [dict(name='masked-prediction step, all rows', ours=TEXTS/every, peer=TEXTS/best, ratio=best/every, target=None,
        conditions=f'{what}{sizes[peers.index(best)]}, its best; ours without asking the last block for masked positions only; texts a second')]
