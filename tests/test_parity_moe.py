"Our layer of experts against those of transformers, with copied weights, in float64."
import pytest, torch
from torch import nn

from chroma_moe.config import load_config
from chroma_moe.experts import Experts, run_experts, sort_by_expert
from chroma_moe.moe import MoE, RoutingStats, feed_forward, routing_loss

D,E,K,f,T = 32,8,3,24,200

class Wide:
    "The torch that a module of transformers sees, in which float32 is float64: nothing is rounded down on the way."
    float32 = float = torch.float64
    def __getattr__(self, name): return getattr(torch, name)

def peer(kind):
    "A block of transformers, the options of ours that mean the same, and its module."
    sizes = dict(hidden_size=D, moe_intermediate_size=f, num_experts_per_tok=K, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                 vocab_size=10, hidden_act='silu')
    if kind=='deepseek_v3':
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module, DeepseekV3Config
        c = DeepseekV3Config(**sizes, n_routed_experts=E, n_shared_experts=2, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
        block,ours = module.DeepseekV3MoE(c), ['score=sigmoid','routed_scale=2.5','bias_rate=0.001']
    if kind=='deepseek_v2':
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module, DeepseekV2Config
        c = DeepseekV2Config(**sizes, n_routed_experts=E, n_shared_experts=2, topk_method='greedy', routed_scaling_factor=1.5)
        block,ours = module.DeepseekV2Moe(c), ['renormalise=false','routed_scale=1.5']
    if kind=='qwen2_moe':
        from transformers.models.qwen2_moe import modeling_qwen2_moe as module, Qwen2MoeConfig
        c = Qwen2MoeConfig(**sizes, num_experts=E, norm_topk_prob=True, shared_expert_intermediate_size=2*f)
        block,ours = module.Qwen2MoeSparseMoeBlock(c), []
    c._experts_implementation = 'eager'
    generator = torch.Generator().manual_seed(0)
    for t in (*block.parameters(), *block.buffers()): nn.init.normal_(t.data, std=0.5 if t.ndim>1 else 0.05, generator=generator)
    return block.double(), ours, module

def copied(block, ours):
    "Our layer with the weights of `block`."
    m = load_config(profile='tiny', sets=[f'model.dim={D}', *(f'model.moe.{s}' for s in
                    (f'experts={E}', f'top_k={K}', f'expert_dim={f}', 'shared=2', f'shared_dim={f}', *ours))]).model
    layer,shared = MoE(m).double(), getattr(block, 'shared_experts', None) or block.shared_expert
    with torch.no_grad():
        layer.router.copy_(block.gate.weight)
        layer.gate_up.copy_(block.experts.gate_up_proj); layer.down.copy_(block.experts.down_proj)
        layer.shared.gate_up.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        layer.shared.down.weight.copy_(shared.down_proj.weight)
        if layer.bias is not None: layer.bias.copy_(block.gate.e_score_correction_bias)
        if hasattr(block, 'shared_expert_gate'):           # Qwen weighs its shared expert; with a gate of zero, by a half
            block.shared_expert_gate.weight.zero_(); layer.shared.down.weight /= 2
    return layer

def off(a, b): return ((a-b).abs().max()/b.abs().max()).item()

@pytest.mark.parametrize('wide', [False, True], ids=['as it is', 'nothing cast down'])
@pytest.mark.parametrize('kind', ['deepseek_v3','deepseek_v2','qwen2_moe'])
def test_same_as_transformers(kind, wide, monkeypatch):
    block,ours,module = peer(kind)
    layer = copied(block, ours)
    if wide: monkeypatch.setattr(module, 'torch', Wide())
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine,theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y,stats = layer(mine); z = block(theirs[None])[0]
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(up); z.backward(up)
    errors = dict(output=off(y, z), tokens=off(mine.grad, theirs.grad), router=off(layer.router.grad, block.gate.weight.grad),
                  gate_up=off(layer.gate_up.grad, block.experts.gate_up_proj.grad), down=off(layer.down.grad, block.experts.down_proj.grad))
    assert stats.count.sum()==T*K and max(errors.values())<(1e-10 if wide else 1e-5), errors
    print(f'{kind}: output and gradients differ by at most', f'{max(errors.values()):.0e}')

def test_bias_chooses_but_does_not_weigh():
    "The case that tells a bias on the choice from a bias on the gates: V3's block with a large bias."
    block,ours,_ = peer('deepseek_v3')
    block.gate.e_score_correction_bias.copy_(torch.linspace(-5, 5, E))
    layer = copied(block, ours)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(): (y,stats),z = layer(x), block(x[None])[0]
    assert off(y, z)<1e-5 and stats.count[-K:].sum()==T*K
    print('all tokens go where a large bias says, heard at their raw scores')

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('skew', [False, True], ids=['even', 'skewed'])
def test_grouped_products_equal_the_loop(dtype, skew):
    "The path of a GPU, run here: outputs and gradients; half of the visits on one expert, others idle."
    g = torch.Generator().manual_seed(0)
    i = torch.stack([torch.randperm(E-2, generator=g)[:K] for _ in range(T)])                         # two experts stay alone
    if skew: i[:T//2,0],i[:T//2,1],i[:T//2,2] = 0,1,2
    leaves = [(torch.randn(*s, generator=g)/4).to(dtype).requires_grad_() for s in ((T,D),(T,K),(E,2*f,D),(E,D,f))]
    results = []
    for grouped in (False, True):
        y = run_experts(leaves[0], leaves[1], i, *leaves[2:], grouped=grouped)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    errors = [off(a.float(), b.float()) for a,b in zip(results[1], results[0])]
    assert max(errors)<(1e-5 if dtype==torch.float32 else 4e-2), errors
    assert not results[1][3][-2:].any() and not results[1][4][-2:].any()
    print(f'{dtype}: at most {max(errors):.0e} apart; idle experts get zero gradients')

def test_grouped_products_honour_what_is_wanted():
    g = torch.Generator().manual_seed(0)
    i = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    shapes,whole = ((T,D),(T,K),(E,2*f,D),(E,D,f)), None
    values = [torch.randn(*s, generator=g) for s in shapes]
    for wanted in ((1,1,1,1), (1,0,0,0), (0,1,0,0), (0,0,1,0), (0,0,0,1), (0,1,0,1)):
        leaves = [v.clone().requires_grad_(bool(w)) for v,w in zip(values, wanted)]
        Experts.apply(*leaves, *sort_by_expert(i, E, loop=False)).sum().backward()
        whole = whole or [l.grad for l in leaves]
        assert all((l.grad is None)==(not w) and (not w or torch.equal(l.grad, full)) for l,w,full in zip(leaves, wanted, whole))
    print('a gradient is computed where it is wanted, and is the same whatever else is')

def test_layer_compiles_in_one_piece():
    "The path of a GPU under torch.compile: one graph, forwards and backwards."
    m = load_config(profile='tiny', sets=['model.moe.noise=0.1','model.moe.z_loss=0.01','model.moe.bias_rate=0.01']).model
    layer = feed_forward(m, 0); g = torch.Generator().manual_seed(0)
    for p in layer.parameters(): nn.init.normal_(p, std=0.1, generator=g)
    layer = layer.bfloat16(); layer.bias = layer.bias.float()                                  # compiled grouped products take bfloat16 only
    x = torch.randn(64, m.dim, generator=g).bfloat16()
    def step(x):
        gates,i,stats = layer.choose(x)
        y = run_experts(x, gates, i, layer.gate_up, layer.down, grouped=True) + layer.shared(x)
        return y.float().square().mean() + routing_loss(stats, m.moe), stats.count
    def grads(run):
        torch.manual_seed(0); layer.zero_grad()
        loss,count = run(x); loss.backward()
        return [loss.detach(), count, *(p.grad.clone() for p in layer.parameters())]
    torch._dynamo.reset()
    plain,compiled = grads(step), grads(torch.compile(step, backend='aot_eager', fullgraph=True))
    for a,b in zip(plain, compiled): assert off(a.float(), b.float())<0.02, (a, b)
    print('one graph; loss, counts and gradients as without compiling')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    "No wait for the device in a layer, forwards and backwards; the same sums every time; as the CPU says."
    m = load_config(profile='debug', sets=['model.moe.z_loss=0.01','model.moe.bias_rate=0.01']).model
    layer = MoE(m); g = torch.Generator().manual_seed(0)
    for p in layer.parameters(): nn.init.normal_(p, std=p.shape[-1]**-0.5, generator=g)
    x = torch.randn(4096, m.dim, generator=g)
    with torch.no_grad(): expected = layer(x)[0]
    layer,x = layer.cuda().bfloat16(), x.cuda().bfloat16().requires_grad_(); layer.bias = layer.bias.float()
    def step():
        y,stats = layer(x)
        (y.float().square().mean() + routing_loss(stats, m.moe)).backward()
        return y.detach(), stats
    step(); torch.cuda.set_sync_debug_mode('error')
    y,stats = step(); again,_ = step()
    torch.cuda.set_sync_debug_mode('default')
    assert torch.equal(y, again) and isinstance(stats, RoutingStats) and stats.count.sum()==4096*m.moe.top_k
    near = (y.cpu().float()-expected).norm()/expected.norm()
    assert near<0.1, near                              # a few tokens are near the border between two experts
    print(f'no synchronisation; {near:.1%} from float32 on the CPU')
