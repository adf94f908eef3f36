"""Our layer of experts against transformers' DeepSeek-V2 MoE (same weights, same output) and against the limit, a dense network of
equal active FLOPs. `ratio` is peer/ours, so a layer that may take 1.12 times the dense network has the target 1/1.12.

    python benchmarks/run.py moe                     all sizes (several minutes)
    CHROMA_BENCH=small python benchmarks/run.py moe  fewer tokens and rounds, to see that it runs
"""
import os
import torch
from torch import nn
from run import medians

from chroma_moe.config import load_config
from chroma_moe.experts import SwiGLU, run_experts
from chroma_moe.moe import MoE

SMALL = os.environ.get('CHROMA_BENCH')=='small'
ROUNDS = 3 if SMALL else 9
SIZES = {                # dim, experts, width of an expert, top-k, shared width, tokens; the share of dense time that is allowed; gain over the peer
    'debug':        (512, 8, 128, 2, 1024, 4096, 1.12, 1.),
    'full':         (2048, 64, 192, 6, 1536, 2048, 1.30, 1.),
    'fine-grained': (512, 64, 64, 6, 0, 4096, 1.50, 1.15)}

def layer_of(dim, experts, width, top_k, shared):
    "Our layer with random weights, and options under which transformers computes the same."
    m = load_config(profile='debug', sets=[f'model.dim={dim}', 'model.moe.renormalise=false', f'model.moe.experts={experts}', f'model.moe.top_k={top_k}',
                                           f'model.moe.expert_dim={width}', 'model.moe.shared=1', f'model.moe.shared_dim={shared}']).model
    layer,g = MoE(m), torch.Generator().manual_seed(0)
    for p in layer.parameters(): nn.init.normal_(p, std=p.shape[-1]**-0.5, generator=g)
    return layer

class Nothing(nn.Module):
    def forward(self, x): return 0.

def peer_of(layer, shared):
    "transformers' block with the weights of `layer`."
    from transformers.models.deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    (E,F2,D),K = layer.gate_up.shape, layer.e.top_k
    c = DeepseekV2Config(hidden_size=D, moe_intermediate_size=F2//2, num_experts_per_tok=K, n_routed_experts=E, n_shared_experts=1, topk_method='greedy',
                         routed_scaling_factor=1., num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=10)
    c._experts_implementation = 'eager'
    block = DeepseekV2Moe(c)
    block.gate.weight,block.experts.gate_up_proj,block.experts.down_proj = layer.router,layer.gate_up,layer.down
    both = block.shared_experts
    if shared:
        gate,up = layer.shared.gate_up.weight.detach().chunk(2)
        both.gate_proj.weight,both.up_proj.weight,both.down_proj.weight = nn.Parameter(gate.clone()), nn.Parameter(up.clone()), layer.shared.down.weight
    else: block.shared_experts = Nothing()
    return block

def training(f, leaves, up):
    "A step: forward, backward, gradients of everything."
    def step():
        for p in leaves: p.grad = None
        f().backward(up)
    return step

def fastest(block, x, leaves, up):
    "The peer's quickest way, forward and with backward. One that would copy more than 2 GB of weights is left out."
    E,F2,D = block.experts.gate_up_proj.shape
    ways = ['eager', 'grouped_mm'] + ['batched_mm']*(len(x)*block.gate.top_k*F2*D*6 < 2e9)
    def run(way):
        def f(): block.experts.config._experts_implementation = way; return block(x[None])[0]
        return f
    with torch.no_grad(): forward = dict(zip(ways, medians(*map(run, ways), rounds=3)))
    both = dict(zip(ways, medians(*(training(run(w), leaves, up) for w in ways), rounds=3)))
    return [(run(w), w) for w in (min(forward, key=forward.get), min(both, key=both.get))]

def skew(layer, x):
    "Move half of the tokens towards what the first expert listens for: all of these, and some of the others, visit it."
    with torch.no_grad():
        one = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(9)); one /= one.norm()
        x[::2] += 6*one - (x[::2] @ one)[:,None]*one; layer.router[0] = 4*one
    return x

def bench():
    for name,(D,E,f,K,shared,T,allowed,gain) in SIZES.items():
        T = T//4 if SMALL else T
        for skewed in (False, True):
            layer = layer_of(D, E, f, K, shared); g = torch.Generator().manual_seed(1)
            x,up = torch.randn(T, D, generator=g), torch.randn(T, D, generator=g)
            if skewed: x = skew(layer, x)
            gates,i,stats = layer.choose(x); load = stats.count.max().item()/T
            x.requires_grad_()
            block,dense,routed = peer_of(layer, shared), SwiGLU(D, shared+K*f), SwiGLU(D, K*f)
            gates = gates.detach().requires_grad_()
            leaves = [x, gates, *layer.parameters(), *block.parameters(), *dense.parameters(), *routed.parameters()]
            ours = lambda: layer(x)[0]
            (quick,way),(quick_both,way_both) = fastest(block, x, leaves, up)
            torch.testing.assert_close(quick(), ours(), atol=2e-4, rtol=1e-3)
            rivals = [ours, quick, lambda: dense(x), lambda: run_experts(x, gates, i, layer.gate_up, layer.down), lambda: routed(x)]
            with torch.no_grad(): forward = medians(*rivals, rounds=ROUNDS)
            rivals[1] = quick_both
            both = medians(*(training(r, leaves, up) for r in rivals), rounds=ROUNDS)
            sizes = f'{T} tokens, D {D}, {E} experts of {f}, top-{K}, shared {shared}, busiest expert met by {load:.0%} of the tokens, float32; seconds'
            tag = f"{name}{', skewed' if skewed else ''}"
            for what,(mine,peer,limit,part,part_limit),used in (('forward', forward, way), ('fwd+bwd', both, way_both)):
                yield dict(name=f'MoE {tag}, {what}', ours=mine, peer=peer, ratio=peer/mine, target=gain,
                           conditions=f'{sizes}; peer: transformers DeepseekV2Moe, {used}')
                yield dict(name=f'MoE {tag}, {what}, of dense', ours=mine, peer=limit, ratio=limit/mine, target=1/allowed,
                           conditions=f'{sizes}; limit: SwiGLU of width {shared+K*f}, ours may take {allowed} of its time and takes {mine/limit:.2f}')
                if not shared: continue
                yield dict(name=f'experts {tag}, {what}, of dense', ours=part, peer=part_limit, ratio=part_limit/part, target=1/allowed,
                           conditions=f'{sizes}; routed experts alone, choice given; limit: SwiGLU of width {K*f}, ours takes {part/part_limit:.2f} of it')
