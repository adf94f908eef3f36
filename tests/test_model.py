"The whole model: its sizes, its promises about neighbours, checkpointing, narrow numbers and compiling, and the folder it lives in."
import json, pickle
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chroma_moe import attention, config
from chroma_moe.attention import prepare
from chroma_moe.config import ChromaError, PROFILES, attention_params, count_params, feed_forward_params, flops_per_token, load_config
from chroma_moe.model import Block, ChromaModel, load_model, save_model
from chroma_moe.moe import routing_loss
from chroma_moe.packing import pack

def sized(profile='tiny', *sets): return load_config(profile=profile, sets=[f'model.{s}' for s in sets]).model
def generator(seed=0): return torch.Generator().manual_seed(seed)
def some(vocab, lengths, seed=0):
    g = generator(seed); return [torch.randint(vocab, (n,), generator=g).tolist() for n in lengths]

SMALL = dict(tiny=sized(), t4=sized('t4', 'layers=2', 'dim=64', 'vocab_size=512', 'moe.dense_dim=128', 'attention.head_dim=16'),
             classic=sized('classic', 'layers=2', 'dim=64', 'vocab_size=512', 'moe.dense_dim=128', 'attention.head_dim=8'),
             alternating=sized('tiny', 'layers=4', 'moe.every=2', 'moe.first_dense=1', 'attention.q_rank=24'))

# Sizes

COUNTS = dict(full=(2_804_043_776, 888_295_424), debug=(50_846_208, 46_127_616), tiny=(1_225_792, 930_880), t4=(32_078_336, 32_078_336),
              classic=(7_478_528, 7_478_528), blues=(424_434_432, 254_565_120), mini=(18_551_136, 17_666_400))

@pytest.mark.parametrize('profile', PROFILES)
def test_profile_has_exactly_its_parameters(profile):
    m = sized(profile)
    with torch.device('meta'): model = ChromaModel(m)
    n = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel()*(1-m.moe.top_k/m.moe.experts) for k,p in model.named_parameters() if k.endswith(('moe.gate_up','moe.down')))
    assert (n, n-routed)==COUNTS[profile]==(count_params(m), count_params(m, True))
    print(f'{n:,} parameters, {n-int(routed):,} of them used by a token')

def test_parts_of_the_full_layer():
    m = sized('full')
    assert attention_params(m)==9_044_992 and m.dim*m.moe.experts==131_072
    assert feed_forward_params(m, 0)==131_072+75_497_472+9_437_184 and feed_forward_params(m, 0, active=True)==131_072+7_077_888+9_437_184
    assert count_params(sized('t4', 'ffn=swiglu'))==38_369_792
    dense = [count_params(replace(m, moe=replace(m.moe, dense=d))) for d in ('twin','start')]
    assert dense[0]==count_params(m, True)-m.layers*131_072 and m.moe.active_width==2688 and m.moe.shared_width==1536
    print(f'dense twin of full {dense[0]:,}, dense start {dense[1]:,} parameters')

def test_flops_are_those_of_the_products():
    "Counted by torch while the model runs, for a text of 64 tokens."
    for profile in ('tiny','classic','alternating'):
        m = SMALL[profile]; m = replace(m, pooling=replace(m.pooling, kind='mean'))
        model,b = ChromaModel(m).eval(),pack(some(m.vocab_size, [64]*4))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: model.embed(b)
        ours = flops_per_token(m, 64)*len(b.ids) - 2*m.dim*m.pooling.out_dim*(len(b.ids)-4)  # the projection is once a text
        assert abs(counter.get_total_flops()/ours-1)<0.01, (profile, counter.get_total_flops(), ours)
    print('forward FLOPs of three models agree with what torch counts, to 1%')

def test_a_full_layer_runs():
    m = sized('full'); block,b = Block(m),pack([range(60), range(33)])
    for p in block.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-0.5 if p.ndim>1 else 1, generator=generator())
    turn = attention.rope_table(64, attention.rope_frequencies(64)).float()[b.positions]
    h = torch.randn(len(b.ids), m.dim, generator=generator(), requires_grad=True)
    y,stats = block(h, b, turn); y.square().mean().backward()
    assert y.isfinite().all() and h.grad.isfinite().all() and stats.count.sum()==6*len(b.ids)
    print(f'{sum(p.numel() for p in block.parameters()):,} parameters, forwards and backwards on {len(b.ids)} tokens')

def test_building_moves_no_random_state():
    torch.manual_seed(1); before = torch.get_rng_state()
    one,two,other = ChromaModel(SMALL['tiny']),ChromaModel(SMALL['tiny']),ChromaModel(SMALL['tiny'], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (k,a),b,c in zip(one.named_parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b) and (a.ndim==1 or 'pool.' in k or not torch.equal(a, c)), k
    print('the same seed gives the same weights, another seed others')

# First weights

@pytest.mark.parametrize('sets', [(), ('attention.q_rank=24',), ('attention.kind=mqa',), ('moe.dense=twin',), ('norm=layer','positions=learned'),
    ('moe.experts=0','moe.shared=0','moe.dense_dim=256','ffn=gelu')], ids=lambda s: ' '.join(s) or 'default')
def test_signals_through_28_layers(sets):
    m = sized('tiny', 'layers=28', *sets); model,b = ChromaModel(m),pack(some(4096, [64]*4))
    (h,turn),streams,parts = model.enter(b.ids, b.positions),[],[]
    for block in model.blocks:
        h.retain_grad(); streams.append(h)
        before = h; h,_ = block(h, b, turn); parts.append((h-before).detach().std().item())
    scores = F.linear(*model.words(h)); F.cross_entropy(scores, b.ids).backward()
    sizes,grads = [s.std().item() for s in streams],[s.grad.std().item() for s in streams]
    assert 0.9<sizes[0]<1.1 and max(sizes)<1.6 and max(parts)<0.5 and 0.8<scores.std()<1.25
    assert max(grads)<2*min(grads)
    by_layer = torch.tensor([[p.grad.norm() for p in block.parameters() if p.ndim>1] for block in model.blocks])
    assert (by_layer.amax(0)<4*by_layer.amin(0)).all(), 'each matrix learns at every depth'
    print(f'stream {sizes[0]:.2f} to {sizes[-1]:.2f}, gradient varies by {max(grads)/min(grads):.2f}, scores {scores.std():.2f}')

# Exactness

@pytest.mark.parametrize('name', SMALL)
def test_neighbours_have_no_influence(name):
    "The same embedding in whatever company and place: 1e-6 in float32."
    m = SMALL[name]; model,worst,g = ChromaModel(m).eval(),0.,generator(9)
    mine = some(m.vocab_size, [31, 1, 31, 8], seed=1)
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([t]))[0] for t in mine])
        for trial in range(8):
            company = some(m.vocab_size, torch.randint(1, 90, (12,), generator=g).tolist(), seed=trial)
            order = torch.randperm(16, generator=g).tolist()
            e = model.embed(pack([(mine+company)[i] for i in order]))[0]
            worst = max(worst, (e[[order.index(i) for i in range(4)]]-alone).abs().max().item())
    assert worst<1e-6
    print(f'{worst:.1e} over 8 random batches')

@pytest.mark.parametrize('name', SMALL)
def test_gradients_of_a_batch_are_those_of_its_texts(name):
    m = SMALL[name]; model = ChromaModel(replace(m, dropout=0.)).double()
    texts = some(m.vocab_size, [9,9,30,2,17])
    def gradients(batches):
        model.zero_grad()
        for b in batches: model.embed(b)[0][:,0].sum().backward()
        return {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}
    together,alone = gradients([pack(texts)]),gradients([pack([t]) for t in texts])
    worst = max((together[k]-alone[k]).abs().max().item() for k in together)
    assert together.keys()==alone.keys() and worst<1e-12
    print(f'{len(together)} gradients, apart by {worst:.0e}')

@pytest.mark.parametrize('sets', [(), ('attention.kind=gqa','attention.kv_heads=2'), ('positions=learned','norm=layer'), ('moe.every=2','layers=4')],
                         ids=lambda s: ' '.join(s) or 'default')
def test_writing_token_by_token(sets):
    "Cached steps equal the full forward pass, and what is ahead of a token has no influence on it."
    m = sized('tiny', 'attention.causal=true', *sets); model,texts = ChromaModel(m).double(),some(4096, [5,16,9])
    with torch.no_grad():
        b = pack(texts); ends = b.cu_seqlens[1:].long()-1
        whole = b.restore(model.hidden(b)[0][ends])
        caches = model.new_caches(3, 16)
        model.hidden(pack([t[:-4] for t in texts]), caches)
        for i in (-4,-3,-2,-1): h = model.step(torch.tensor([t[i] for t in texts]), caches)
        ahead = [t[:-1]+[(t[-1]+1)%4096] for t in texts]
        b2 = pack(ahead); same = b2.restore(model.hidden(b2)[0][b2.cu_seqlens[1:].long()-2]) - b.restore(model.hidden(b)[0][ends-1])
    assert (h-whole).abs().max()<1e-12 and same.abs().max()<1e-13
    kept = sum(c.kept.shape[-1] for c in caches)
    print(f'{(h-whole).abs().max():.0e}; a token keeps {kept} numbers in all layers')

# Training

def one_step(m, b, ids):
    model = ChromaModel(m).train(); torch.manual_seed(7)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        h,stats = model.hidden(b); loss = F.cross_entropy(F.linear(*model.words(h)), ids) + routing_loss(stats, m.moe)
    loss.backward()
    return loss.item(), stats, {k: p.grad for k,p in model.named_parameters() if p.grad is not None}, sum(saved)

@pytest.mark.parametrize('name', SMALL)
def test_checkpointing_changes_memory_alone(name):
    m = replace(SMALL[name], dropout=0.2, layers=4, moe=replace(SMALL[name].moe, noise=1., z_loss=1e-3))
    b = pack(some(m.vocab_size, [40,33,33,12,1]))
    (loss,stats,grads,plain),(loss2,stats2,grads2,less) = (one_step(replace(m, checkpoint=c), b, b.ids) for c in (False,True))
    assert loss==loss2 and grads.keys()==grads2.keys() and all(torch.equal(grads[k], grads2[k]) for k in grads)
    if stats is None: assert not m.moe_layers
    else: assert torch.equal(stats.count, stats2.count) and stats.count.sum(-1).tolist()==[m.moe.top_k*len(b.ids)]*len(m.moe_layers)
    assert less<plain/2
    print(f'{len(grads)} gradients bit for bit, nothing counted twice; {plain/less:.1f} times fewer numbers kept')

def test_rows_asked_for_alone():
    m = sized('tiny', 'layers=3'); model,b = ChromaModel(m).double(),pack(some(4096, [40,33,12]))
    rows = torch.randperm(len(b.ids), generator=generator())[:11]
    def step(ask):
        model.zero_grad(); h,stats = model.hidden(b, rows=rows if ask else None)
        F.cross_entropy(F.linear(*model.words(h if ask else h[rows])), b.ids[rows]).backward()
        return stats, {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}
    (few,g1),(all_,g2) = step(True),step(False)
    worst = max((g1[k]-g2[k]).abs().max().item() for k in g2); assert g1.keys()==g2.keys() and worst<1e-12
    assert few.count.sum(-1).tolist()==[170,170,22] and all_.count.sum(-1).tolist()==[170]*3
    print(f'the last experts see {len(rows)} of {len(b.ids)} tokens; gradients apart by {worst:.0e}')

@pytest.mark.parametrize('name', ('tiny','t4','classic'))
def test_narrow_numbers(name):
    "Under autocast to bfloat16, and in bfloat16 weights: close to float32, and embeddings in float32."
    m = replace(SMALL[name], dropout=0.); model,b = ChromaModel(m).eval(),pack(some(m.vocab_size, [40,33,1]))
    with torch.no_grad():
        e = model.embed(b)[0]
        with torch.autocast('cpu', torch.bfloat16): auto = model.embed(b)[0]
        half = model.bfloat16().embed(b)[0]
    assert auto.dtype==half.dtype==torch.float32
    cosines = [F.cosine_similarity(x, e).min().item() for x in (auto,half)]
    assert min(cosines)>0.995
    print(f'cosines with float32: autocast {cosines[0]:.5f}, bfloat16 weights {cosines[1]:.5f}')

# Compiling: traced with a backend that generates no code

@pytest.mark.parametrize('sets', [('moe.dense=twin',), ('moe.dense=twin','attention.kind=gqa','attention.kv_heads=2','norm=layer')], ids=' '.join)
def test_a_layer_is_one_graph(sets):
    m = sized('tiny', *sets); model,b = ChromaModel(m),prepare(pack(some(4096, [9,9,4])))
    h,turn = model.enter(b.ids, b.positions)
    traced,_ = torch.compile(model.blocks[0], backend='eager', fullgraph=True)(h.detach().requires_grad_(), b, turn)
    error = (traced-model.blocks[0](h, b, turn)[0]).abs().max().item(); assert error<1e-5
    print(f'no graph break; apart from the plain layer by {error:.0e}')

def test_batches_of_a_gpu_share_a_graph(monkeypatch):
    "With the variable-length kernel, on the meta device: sizes become symbols, and later batches compile nothing."
    monkeypatch.setattr(attention, 'attention_way', lambda *a: 'varlen')
    torch._dynamo.reset(); counter = torch._dynamo.testing.CompileCounter()
    with torch.device('meta'): block = Block(sized('tiny', 'moe.dense=twin')).bfloat16()
    compiled,counts = torch.compile(block, backend=counter, fullgraph=True),[]
    for n in (3,4,5,6,9,14):
        b = prepare(pack([range(5+n)]*n+[range(9)]).to('meta')); t = len(b.ids)
        compiled(torch.randn(t, 128, device='meta', dtype=torch.bfloat16), b, torch.randn(t, 8, 2, device='meta')); counts.append(counter.frame_count)
    assert counts[2:]==[counts[2]]*4, counts
    print(f'{counts[-1]} compilations for 6 batches of different sizes')

# The folder

@pytest.fixture
def folder(tmp_path):
    save_model(ChromaModel(SMALL['tiny'], seed=4), tmp_path/'model'); return tmp_path/'model'

def test_round_trip(tmp_path, monkeypatch):
    def refuse(*a, **kw): raise AssertionError('something was unpickled')
    for where,name in ((pickle,'load'), (pickle,'loads'), (pickle,'Unpickler'), (torch,'load')): monkeypatch.setattr(where, name, refuse)
    for name,m in SMALL.items():
        m = replace(m, moe=replace(m.moe, bias_rate=1e-3)); model = ChromaModel(m, seed=5)
        save_model(model, tmp_path/name); again = load_model(tmp_path/name)
        assert again.m==m and all(torch.equal(v, again.state_dict()[k]) for k,v in model.state_dict().items())
        assert all(p.requires_grad and not p.is_meta for p in again.parameters()) and not any(p.name.endswith('.new') for p in (tmp_path/name).iterdir())
    print(len(SMALL), 'models saved and loaded, bit for bit, nothing unpickled')

def edit(name, f):
    def change(d): (d/name).write_bytes(f((d/name).read_bytes()))
    return change
def edit_config(f):
    def change(d): c = json.loads((d/'config.json').read_text()); f(c); (d/'config.json').write_text(json.dumps(c))
    return change

BROKEN = {
    'no folder': (lambda d: [p.unlink() for p in d.iterdir()], 'has no config.json'),
    'no weights': (lambda d: (d/'model.safetensors').unlink(), 'has no model.safetensors'),
    'half the weights': (edit('model.safetensors', lambda b: b[:len(b)//2]), 'cut short or damaged, copy it again'),
    'one byte short': (edit('model.safetensors', lambda b: b[:-1]), 'cut short or damaged'),
    'empty weights': (edit('model.safetensors', lambda b: b''), 'cut short or damaged'),
    'a pickle': (edit('model.safetensors', lambda b: pickle.dumps(dict(a=1))), 'cut short or damaged'),
    'cut config': (edit('config.json', lambda b: b[:100]), 'is not valid JSON'),
    'config of another kind': (edit('config.json', lambda b: b'[1, 2]'), 'holds a list, not an object'),
    'config without sizes': (edit_config(lambda c: c.pop('model')), 'must be a section'),
    'wider model': (edit_config(lambda c: c['model'].update(dim=64)), "tensors do not fit config.json, such as"),
    'more layers': (edit_config(lambda c: c['model'].update(layers=3)), "is None and config.json asks for"),
    'fewer layers': (edit_config(lambda c: c['model'].update(layers=1)), "and config.json asks for None"),
    'unknown key': (edit_config(lambda c: c['model']['moe'].update(topk=2)), "unknown setting 'model.moe.topk': did you mean 'model.moe.top_k'?"),
    'impossible value': (edit_config(lambda c: c['model']['moe'].update(top_k=99)), 'model.moe.top_k is 99'),
    'newer format': (edit_config(lambda c: c.update(format=99, version='9.9')), 'written by chroma_moe 9.9'),
}
@pytest.mark.parametrize('name', BROKEN)
def test_broken_folder_is_refused(name, folder):
    change,says = BROKEN[name]; change(folder)
    with pytest.raises(ChromaError) as e: load_model(folder)
    assert says in str(e.value) and str(folder) in str(e.value) and '\n' not in str(e.value), e.value
    print(str(e.value).replace(str(folder), '…')[:150])

def test_folders_from_before_an_option_still_load(folder):
    "Whatever has been added to the configuration since has a default."
    first = dict(vocab_size=4096, dim=128, layers=2, max_length=2048, norm_eps=1e-6,
        attention=dict(heads=4, q_rank=0, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=32, rope_theta=10000.),
        moe=dict(experts=8, top_k=2, expert_dim=64, shared=2, shared_dim=64, routed_scale=1., balance=0.01),
        pooling=dict(kind='latent_nv', latents=16, heads=4, out_dim=128))
    (folder/'config.json').write_text(json.dumps(dict(model_type='chroma_moe', model=first)))
    assert load_model(folder).m==SMALL['tiny']==config.build(config.ModelConfig, first)
    print('a config.json with the fields of the first version')
