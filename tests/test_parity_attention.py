"""Attention against Hugging Face transformers, with copied weights, in float64.

As it is, the library casts norms, rotation and softmax down to float32: outputs agree to 1e-5. With those pieces replaced by ones that
stay in float64, they agree to 1e-10: what is left is the same function."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip('transformers', minversion='5.0')
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

from chroma_moe import attention  # noqa: E402
from chroma_moe.attention import Cache, attention_loop, make_attention, packed_attention, rope_frequencies, rope_table, score_scale  # noqa: E402
from chroma_moe.config import AttentionConfig, MoEConfig, ModelConfig, PoolingConfig  # noqa: E402
from chroma_moe.model import ChromaModel  # noqa: E402
from chroma_moe.packing import pack  # noqa: E402

D,LENGTHS = 48,(9,23,1,9,14)
YARN = dict(yarn_factor=8., yarn_original=64)
MLA = AttentionConfig(heads=4, kv_rank=24, nope_dim=8, rope_dim=16, v_dim=24)
GQA = AttentionConfig(kind='gqa', heads=4, kv_heads=2, head_dim=16)

def generator(seed=0): return torch.Generator().manual_seed(seed)
def sizes(a, **kw): return ModelConfig(vocab_size=64, dim=D, layers=2, max_length=512, attention=a, pooling=PoolingConfig(heads=4, out_dim=8), **kw)

def ours(a):
    "A layer with random weights, norms among them."
    layer,g = make_attention(sizes(a)).double(),generator()
    for p in layer.parameters(): nn.init.normal_(p, mean=p.ndim==1, std=0.3 if p.ndim==1 else p.shape[-1]**-0.5, generator=g)
    return layer

def theta(a): return rope_frequencies(a.turned, a.rope_theta, a.yarn_factor, a.yarn_original)

def packed(layer, texts):
    "Our output for each text, all in one packed batch."
    b = pack([range(len(t)) for t in texts])
    y = layer(torch.cat([texts[i] for i in b.order]), b, rope_table(64, theta(layer.a))[b.positions])
    parts = y.split(list(b.lengths))
    return [parts[b.order.tolist().index(i)] for i in range(len(texts))]

def texts(dtype=torch.float64): return [torch.randn(n, D, generator=generator(n), dtype=dtype) for n in LENGTHS]

# The library's side

def rope_parameters(a, both=True):
    if a.yarn_factor==1: return dict(rope_type='default', rope_theta=a.rope_theta)
    return dict(rope_type='yarn', rope_theta=a.rope_theta, factor=a.yarn_factor, original_max_position_embeddings=a.yarn_original,
                beta_fast=32, beta_slow=1) | (dict(mscale=1., mscale_all_dim=1.) if both else {})

def deepseek(module, config_class, a):
    "The library's latent attention with its configuration."
    config = config_class(hidden_size=D, num_attention_heads=a.heads, num_key_value_heads=a.heads, q_lora_rank=a.q_rank or None,
        kv_lora_rank=a.kv_rank, qk_nope_head_dim=a.nope_dim, qk_rope_head_dim=a.rope_dim, v_head_dim=a.v_dim, max_position_embeddings=512,
        rope_parameters=rope_parameters(a))
    config._attn_implementation = 'eager'
    return getattr(module, config_class.__name__.replace('Config','Attention'))(config, 0).double(), config

def copy_latent(layer, ref):
    "Our fused matrices, cut into theirs."
    q,c,r = layer.widths
    with torch.no_grad():
        (ref.q_a_proj if layer.a.q_rank else ref.q_proj).weight.copy_(layer.down.weight[:q])
        ref.kv_a_proj_with_mqa.weight.copy_(layer.down.weight[q:])
        if layer.a.q_rank: ref.q_a_layernorm.weight.copy_(layer.q_norm.weight); ref.q_b_proj.weight.copy_(layer.q_up.weight)
        ref.kv_a_layernorm.weight.copy_(layer.kv_norm.weight); ref.kv_b_proj.weight.copy_(layer.kv_up.weight); ref.o_proj.weight.copy_(layer.out.weight)

def halves(weight, heads, width):
    "Rows of interleaved pairs in the order of the half layout: 0,2,4,... then 1,3,5,..."
    return weight.unflatten(0, (heads, width//2, 2)).transpose(1, 2).flatten(0, 2)

def copy_grouped(layer, ref):
    a = layer.a; q,k,v = layer.qkv.weight.split([a.heads*a.width, a.groups*a.width, a.groups*a.width])
    with torch.no_grad():
        ref.q_proj.weight.copy_(halves(q, a.heads, a.width)); ref.k_proj.weight.copy_(halves(k, a.groups, a.width))
        ref.v_proj.weight.copy_(v); ref.o_proj.weight.copy_(layer.out.weight)

def exact_norms(module):
    "Every RMSNorm of the library replaced by torch's, which keeps float64."
    for name,child in list(module.named_children()):
        if 'RMSNorm' in type(child).__name__:
            norm = nn.RMSNorm(len(child.weight), child.variance_epsilon).double(); norm.weight = child.weight
            setattr(module, name, norm)
        else: exact_norms(child)

def exact_rotation(xq, xk, turn):
    "The library's rotation without its cast to float32."
    f = lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())*turn.unsqueeze(1)).flatten(3)
    return f(xq), f(xk)

def mask(n, causal): return torch.full((n,n), -math.inf, dtype=torch.float64).triu(1)[None,None] if causal else None
def angles(a, n): return torch.outer(torch.arange(n, dtype=torch.float64), theta(a))[None]
def cos_sin(a, n): x = angles(a, n).repeat(1, 1, 2); return x.cos(), x.sin()

def apart(xs, ys): return max((x-y).abs().max().item() for x,y in zip(xs, ys))

LATENT = [MLA, replace(MLA, q_rank=20), replace(MLA, causal=True), replace(MLA, q_rank=20, **YARN)]

@pytest.mark.parametrize('a', LATENT, ids=['plain','q_rank','causal','yarn'])
@pytest.mark.parametrize('version', (2,3))
def test_latent_attention(a, version, monkeypatch):
    module,config_class = (v2, transformers.DeepseekV2Config) if version==2 else (v3, transformers.DeepseekV3Config)
    layer,(ref,config),xs = ours(a),deepseek(module, config_class, a),texts()
    copy_latent(layer, ref)
    rotary = getattr(module, f'DeepseekV{version}RotaryEmbedding')(config)
    mine = packed(layer, xs)
    as_is = [ref(x[None], attention_mask=mask(len(x), a.causal), position_embeddings=rotary(x[None], torch.arange(len(x))[None]))[0][0] for x in xs]
    assert apart(mine, as_is) < 1e-5
    exact_norms(ref)
    if version==2: monkeypatch.setattr(v2, 'apply_rotary_emb', exact_rotation)
    config._attn_implementation = 'sdpa'; ref.is_causal = False
    turn = lambda n: torch.polar(torch.ones((), dtype=torch.float64), angles(a, n)) if version==2 else cos_sin(a, n)
    exact = [ref(x[None], attention_mask=mask(len(x), a.causal), position_embeddings=turn(len(x)))[0][0] for x in xs]
    assert apart(mine, exact) < 1e-10
    print(f'DeepSeek-V{version}: {apart(mine, as_is):.1e} as it is, {apart(mine, exact):.1e} in float64 throughout')

@pytest.mark.parametrize('a', [GQA, replace(GQA, kind='mha', kv_heads=0), replace(GQA, kind='mqa', kv_heads=0), replace(GQA, causal=True),
                               replace(GQA, **YARN)], ids=['gqa','mha','mqa','causal','yarn'])
def test_grouped_attention(a):
    config = transformers.LlamaConfig(hidden_size=D, num_attention_heads=a.heads, num_key_value_heads=a.groups, head_dim=a.width,
        max_position_embeddings=512, rope_parameters=rope_parameters(a, both=False))
    config._attn_implementation = 'eager'
    layer,ref,xs = ours(a),llama.LlamaAttention(config, 0).double(),texts()
    copy_grouped(layer, ref); rotary = llama.LlamaRotaryEmbedding(config)
    mine = packed(layer, xs)
    as_is = [ref(x[None], rotary(x[None], torch.arange(len(x))[None]), mask(len(x), a.causal))[0][0] for x in xs]
    assert apart(mine, as_is) < 1e-5
    config._attn_implementation = 'sdpa'; ref.is_causal = False
    m = 0.1*math.log(a.yarn_factor)+1  # the library puts it on cosine and sine, which is the same where all is rotated
    exact = [ref(x[None], tuple(m*t for t in cos_sin(a, len(x))), mask(len(x), a.causal))[0][0] for x in xs]
    assert apart(mine, exact) < 1e-10
    print(f'Llama, {a.kind}: {apart(mine, as_is):.1e} as it is, {apart(mine, exact):.1e} in float64 throughout')

@pytest.mark.parametrize('factor,original,dim,base', [(4.,512,64,1e4), (16.,4096,64,1e4), (40.,4096,128,5e5), (2.,8192,32,1e4)])
def test_yarn(factor, original, dim, base):
    a = AttentionConfig(nope_dim=dim, rope_dim=dim, v_dim=2*dim, rope_theta=base, yarn_factor=factor, yarn_original=original)
    config = transformers.LlamaConfig(hidden_size=4*dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=int(factor*original),
                                      rope_parameters=rope_parameters(a, both=False))
    inv_freq,m = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS['yarn'](config)
    torch.testing.assert_close(theta(a).float(), inv_freq, rtol=1e-6, atol=0)
    assert score_scale(a)==pytest.approx(a.width**-0.5*m**2, rel=1e-12)
    config = transformers.DeepseekV3Config(hidden_size=4*dim, num_attention_heads=4, rope_parameters=rope_parameters(a), qk_nope_head_dim=dim,
                                           qk_rope_head_dim=dim, v_head_dim=2*dim, max_position_embeddings=int(factor*original))
    assert v3.DeepseekV3Attention(config, 0).scaling==pytest.approx(score_scale(a), rel=1e-12)
    assert v3.DeepseekV3RotaryEmbedding(config).attention_scaling==1, 'mscale is not on cosine and sine as well'
    print(f'{original} to {int(factor*original):,} tokens: frequencies and scale are those of transformers, mscale {m:.4f} once squared')

def encoder(m):
    model,g = ChromaModel(m).double(),generator(3)
    for p in model.parameters():
        if p.ndim==1: nn.init.normal_(p, mean=1, std=0.2, generator=g)
    return model

def whole(model, ref, ids, exact):
    "Largest difference between our normed stream and the library's last hidden state, text by text."
    b = pack(ids)
    with torch.no_grad():
        h = model.norm(model.hidden(b)[0]).split(list(b.lengths))
        words = [model.embedding(torch.tensor(ids[i]))[None]*D**0.5 for i in b.order]
        see = [torch.zeros(1, 1, len(ids[i]), len(ids[i]), dtype=torch.float64) for i in b.order]
        if exact: exact_norms(ref)
        return apart(h, [ref(inputs_embeds=w, attention_mask=s, use_cache=False).last_hidden_state[0] for w,s in zip(words, see)])

def test_whole_llama_encoder():
    m = sizes(GQA, moe=MoEConfig(experts=0, shared=0, dense_dim=80))
    model,ids = encoder(m),[torch.randint(64, (n,), generator=generator(n)).tolist() for n in LENGTHS]
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=D, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=m.norm_eps, max_position_embeddings=512, attn_implementation='sdpa', pad_token_id=None)
    ref = llama.LlamaModel(config).double().eval()
    with torch.no_grad():
        for block,layer in zip(model.blocks, ref.layers):
            copy_grouped(block.attention, layer.self_attn)
            gate,up = block.moe.shared.gate_up.weight.chunk(2)
            for to,w in ((layer.mlp.gate_proj,gate), (layer.mlp.up_proj,up), (layer.mlp.down_proj,block.moe.shared.down.weight),
                         (layer.input_layernorm,block.norm_a.weight), (layer.post_attention_layernorm,block.norm_m.weight)): to.weight.copy_(w)
        ref.norm.weight.copy_(model.norm.weight)
    error = whole(model, ref, ids, exact=False); assert error < 1e-5
    ref.rotary_emb.forward = lambda x, position_ids: cos_sin(GQA, position_ids.shape[1])
    exact = whole(model, ref, ids, exact=True); assert exact < 1e-10
    print(f'a dense encoder of two layers equals LlamaModel to {error:.1e} as it is, {exact:.1e} in float64 throughout')

def test_whole_deepseek_encoder(monkeypatch):
    m = sizes(MLA, moe=MoEConfig(experts=8, top_k=2, expert_dim=16, shared=2, shared_dim=16, renormalise=False, routed_scale=1.5))
    model,ids = encoder(m),[torch.randint(64, (n,), generator=generator(n)).tolist() for n in LENGTHS]
    config = transformers.DeepseekV2Config(vocab_size=64, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, n_shared_experts=2, first_k_dense_replace=0, topk_method='greedy', routed_scaling_factor=1.5,
        rms_norm_eps=m.norm_eps, max_position_embeddings=512, attn_implementation='sdpa', experts_implementation='eager', pad_token_id=None)
    ref = v2.DeepseekV2Model(config).double().eval()
    with torch.no_grad():
        for block,layer in zip(model.blocks, ref.layers):
            copy_latent(block.attention, layer.self_attn)
            gate,up = block.moe.shared.gate_up.weight.chunk(2); shared = layer.mlp.shared_experts
            for to,w in ((shared.gate_proj,gate), (shared.up_proj,up), (shared.down_proj,block.moe.shared.down.weight),
                         (layer.input_layernorm,block.norm_a.weight), (layer.post_attention_layernorm,block.norm_m.weight),
                         (layer.mlp.gate,block.moe.router)): to.weight.copy_(w)
            layer.mlp.experts.gate_up_proj.copy_(block.moe.gate_up); layer.mlp.experts.down_proj.copy_(block.moe.down)
        ref.norm.weight.copy_(model.norm.weight)
    error = whole(model, ref, ids, exact=False); assert error < 1e-5
    monkeypatch.setattr(v2, 'apply_rotary_emb', exact_rotation)
    ref.rotary_emb.forward = lambda x, positions: torch.polar(torch.ones((), dtype=torch.float64), angles(MLA, positions.shape[1]))
    def exact_router(self, x):
        weights,chosen = F.linear(x.flatten(0, 1), self.weight).softmax(-1).topk(self.top_k, -1)
        return None, weights*self.routed_scaling_factor, chosen
    monkeypatch.setattr(v2.DeepseekV2TopkRouter, 'forward', exact_router)
    exact = whole(model, ref, ids, exact=True); assert exact < 1e-10
    print(f'an encoder of two layers with experts equals DeepseekV2Model to {error:.1e} as it is, {exact:.1e} in float64 throughout')

# Ours against ours

KINDS = [MLA, replace(MLA, q_rank=20), replace(GQA, kind='mha', kv_heads=0), GQA, replace(GQA, kind='mqa', kv_heads=0), replace(MLA, **YARN)]
def name(a): return f'{a.kind}{a.q_rank or ""}{"-yarn" if a.yarn_factor>1 else ""}'

@pytest.mark.parametrize('causal', (False,True), ids=['both ways','causal'])
@pytest.mark.parametrize('a', KINDS, ids=name)
def test_packed_absorbed_cached(a, causal):
    layer,xs = ours(replace(a, causal=causal)),texts()
    together = packed(layer, xs)
    alone = [packed(layer, [x])[0] for x in xs]; assert apart(together, alone) < 1e-12
    table,said = rope_table(64, theta(a)), f'packed = alone to {apart(together, alone):.0e}'
    if a.kind=='mla':
        b = pack([range(len(x)) for x in xs])
        y = layer.absorbed(torch.cat([xs[i] for i in b.order]), b, table[b.positions])
        error = apart([y], [torch.cat([together[i] for i in b.order])]); assert error < 1e-12
        said += f', absorbed = naive to {error:.0e}'
    if causal:
        cache = Cache(len(xs), 24, layer.keeps, xs[0])
        grow = [x if len(x)>1 else x.repeat(3, 1) for x in xs]  # a prompt keeps at least one token
        whole,b = packed(layer, grow),pack([range(len(x)-2) for x in grow])
        layer(torch.cat([grow[i][:-2] for i in b.order]), b, table[b.positions], cache)
        for back in (-2,-1):
            y = layer.step(torch.stack([x[back] for x in grow]), cache, table[cache.lengths])
            error = apart(y, [w[back] for w in whole]); assert error < 1e-12
        said += f', cached = whole to {error:.0e}'
    print(said)

@pytest.mark.parametrize('a', KINDS, ids=name)
def test_neighbours_have_no_influence(a):
    layer,rng,worst = ours(a).float(),generator(5),0.
    x = texts(torch.float32)[1]; mine = packed(layer, [x])[0]
    for _ in range(20):
        n = torch.randint(1, 40, (6,), generator=rng).tolist()
        company = [100*torch.randn(l, D, generator=rng) for l in n]
        at = int(torch.randint(7, (1,), generator=rng))
        worst = max(worst, (packed(layer, company[:at]+[x]+company[at:])[at]-mine).abs().max().item())
    assert worst < 1e-6*max(1, mine.abs().max().item())
    print(f'20 random companies, a hundred times as loud: {worst:.1e}')

# The code for a GPU, as far as a CPU can judge it

@pytest.mark.parametrize('options', [('scale','window_size','enable_gqa'), ('is_causal',), ('window_size','scale')], ids=' '.join)
@pytest.mark.parametrize('causal', (False,True))
@pytest.mark.parametrize('groups', (4,2))
def test_variable_length_kernel_is_called_right(options, causal, groups, monkeypatch):
    "A stand-in with the options of one version of torch, which takes what it is told literally."
    def stand_in(q, k, v, ends, ends_k, longest, longest_k, **given):
        assert set(given) <= set(options) and ends.dtype==torch.int32 and torch.equal(ends, ends_k) and longest==longest_k==max(LENGTHS)
        assert given.get('enable_gqa', False)==(q.shape[1]!=k.shape[1])
        class Texts: cu_seqlens = ends
        return attention_loop(q, k, v, Texts, given.get('scale'), given.get('window_size')==(-1,0) or given.get('is_causal', False))
    monkeypatch.setattr(attention, 'varlen_attn', stand_in); monkeypatch.setattr(attention, '_OPTIONS', options)
    g,b = generator(1),pack([range(n) for n in LENGTHS])
    q,k,v = (torch.randn(sum(LENGTHS), h, 8, generator=g, dtype=torch.float64) for h in (4,groups,groups))
    torch.testing.assert_close(packed_attention(q, k, v, b, 0.7, causal, 'varlen'), attention_loop(q, k, v, b, 0.7, causal), atol=1e-12, rtol=0)
    print('scale, direction and key heads arrive with', ' '.join(options))

@pytest.mark.parametrize('dtype,tolerance', [(torch.float32,1e-5), (torch.bfloat16,2e-2)])
def test_ways_agree_in_narrow_numbers(dtype, tolerance):
    g,b = generator(2),pack([range(n) for n in (130,128,127,64,63,5,5,1)])
    q,k,v = (torch.randn(len(b.ids), h, 16, generator=g) for h in (4,2,2))
    slow,worst = attention_loop(*(x.double() for x in (q,k,v)), b),0.
    for way in ('runs','padded'):
        fast = packed_attention(*(x.to(dtype) for x in (q,k,v)), b, way=way)
        assert fast.dtype==dtype; worst = max(worst, (fast.double()-slow).abs().max().item())
    assert worst < tolerance
    print(f'runs and padding against float64: {worst:.1e}')

def test_long_text():
    "YaRN to 8,192 tokens: the last token of a long text, against its definition."
    a = replace(MLA, yarn_factor=16., yarn_original=512, heads=2)
    layer,x = ours(a),torch.randn(8192, D, generator=generator(), dtype=torch.float64)
    b = pack([range(8192), range(40)]); table = rope_table(8192, theta(a))
    with torch.no_grad():
        y = layer(torch.cat([x, x[:40]]), b, table[b.positions])
        q_nope,q_rope,c,k_rope = layer.parts(x, table)
        k,v = layer.kv_up(c).unflatten(-1, (2,-1)).split([8, 24], -1)
        q,k = torch.cat([q_nope, q_rope], -1)[-1], torch.cat([k, k_rope[:,None].expand(-1, 2, -1)], -1)
        p = (torch.einsum('hd,shd->hs', q, k)*score_scale(a)).softmax(-1)
        expected = F.linear(torch.einsum('hs,shd->hd', p, v).flatten(), layer.out.weight)
    error = (y[8191]-expected).abs().max().item(); assert error < 1e-10
    print(f'token 8,192 of a text beside a short one: {error:.0e}')
