"The causal language model: the objective in the same loop, cached against uncached, sampling against transformers, perplexity against the loss, the command."
import io, json, math, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch.nn import functional as F

from chroma_moe.caches import cache_bytes, cache_width
from chroma_moe.config import ChromaError, count_params, load_config, pooling_params
from chroma_moe.directions import turn_attention
from chroma_moe.generation import ChromaLM, Sampling, Tail, Writer, draw, find_stop, next_probabilities
from chroma_moe.masking import noise
from chroma_moe.model import ChromaModel, load_model
from chroma_moe.monitor import MetricsLog
from chroma_moe.next_tokens import next_batch
from chroma_moe.packing import pack
from chroma_moe.perplexity import read_tokens, together
from chroma_moe.generate import chroma_generate
from chroma_moe.pretrain import MaskedParts, chroma_pretrain, masked_loss, pretrain
from chroma_moe.store import TokenStore, build_store, merge_stores
from chroma_moe.tokenizer import BOS, EOS, SPECIALS, ChromaTokenizer
from chroma_moe.tune import chroma_tune
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
TWIN = ['model.vocab_size=512','model.dim=32','model.layers=4','model.max_length=96','model.attention.heads=4','model.attention.head_dim=8',
        'model.moe.expert_dim=16','model.moe.dense_dim=16','model.pooling.heads=4','model.pooling.out_dim=32'] # of blues
KINDS = dict(mla=[], mla_latent_queries=['model.attention.q_rank=24'], gqa=['model.attention.kind=gqa','model.attention.kv_heads=2'],
             mqa=['model.attention.kind=mqa'], mha=['model.attention.kind=mha'],
             learned=['model.attention.kind=mha','model.positions=learned','model.norm=layer'],
             yarn=['model.attention.yarn_factor=4','model.attention.yarn_original=64'], dense=['model.moe.experts=0'],
             sigmoid=['model.moe.score=sigmoid','model.moe.bias_rate=0.01'])

def small(*sets):
    return load_config(profile='tiny', sets=['pretrain.objective=clm','model.vocab_size=512','model.dim=32','model.max_length=128','model.layers=3',
                                             *sets]).model
def some(seed, *lengths):
    g = torch.Generator().manual_seed(seed)
    return [[BOS, *torch.randint(6, 512, (n,), generator=g).tolist()] for n in lengths]

# The profile

def test_blues():
    "768 wide, 12 layers of which every second has 8 experts, one key and value for 12 heads, 200k tokens; counted, and built on the meta device."
    c = load_config(profile='blues'); m = c.model
    assert (m.dim, m.layers, m.attention.heads, m.attention.kind, m.attention.causal, m.moe.experts, m.moe.top_k)==(768, 12, 12, 'mqa', True, 8, 2)
    assert m.moe_layers==[1,3,5,7,9,11] and m.moe.noise>0 and c.pretrain.objective=='clm' and m.vocab_size>=200_019+len(SPECIALS)
    with torch.device('meta'): model = ChromaModel(m)
    assert sum(p.numel() for p in model.parameters())==count_params(m)==424_434_432 and count_params(m, True)==254_565_120
    attention,expert = 768*64*(12+2)+768*768, 3*768*2048
    by_hand = 200_064*768 + 12*(attention+2*768) + 6*expert + 6*(8*expert+768*8) + 768
    assert by_hand==count_params(m)-pooling_params(m)
    print(f'{by_hand:,} parameters and {pooling_params(m):,} of the pooling; {cache_bytes(m):,} bytes of cache a token in bf16')

# Training

def test_trains_on_merged_stores(tmp_path):
    "The twin learns next tokens from two stores made into one, by each strategy, in the loop of phase 1, with router noise on."
    texts,said = {d: [r['text'] for r in World().texts('200') if r['domain']==d] for d in ('finance','shop')},[]
    tokenizer = ChromaTokenizer.train([t for v in texts.values() for t in v], 512)
    for d,v in texts.items(): build_store(({'text': t, 'domain': d, 'source': d} for t in v), tokenizer, tmp_path/d, 1)
    c = load_config(profile='blues', sets=[*TWIN, 'data.max_length=64','pretrain.steps=10','pretrain.batch_tokens=512','pretrain.lr=0.03','train.log_every=2'])
    for strategy in ('equal','weighted','proportional'):
        merge_stores([tmp_path/d for d in texts], tmp_path/strategy, strategy, [.7,.3] if strategy=='weighted' else ())
        log = MetricsLog(); model = pretrain(c, TokenStore(tmp_path/strategy, tokenizer), log, progress=False)
        losses = [r['loss'] for r in log.rows if 'loss' in r]; said.append(f'{strategy} {losses[0]:.2f} to {losses[-1]:.2f}')
        assert losses[-1] < losses[0]-0.5 and len(log.rows[0]['routing'])==2 and model.m.attention.causal
    print('loss: ' + ', '.join(said))

def test_every_profile_predicts_next_tokens():
    "A step of each profile's own build, small: finite, and the last token changes nothing before it."
    small_sets = dict(full=['model.dim=32','model.layers=2','model.attention.heads=4','model.attention.q_rank=16','model.attention.kv_rank=8',
                            'model.attention.nope_dim=8','model.attention.rope_dim=8','model.attention.v_dim=16','model.moe.expert_dim=8','model.moe.shared_dim=8'],
                      debug=['model.dim=32','model.moe.expert_dim=8','model.moe.shared_dim=8'], t4=['model.dim=32','model.moe.dense_dim=32'],
                      classic=['model.dim=32','model.moe.dense_dim=32','model.dropout=0'], tiny=['model.dim=32'], blues=TWIN)
    for profile,sets in small_sets.items():
        m = load_config(profile=profile, sets=['pretrain.objective=clm', *sets, 'model.vocab_size=512','model.max_length=64','model.pooling.heads=4',
                                               'model.attention.yarn_factor=1']).model
        model = ChromaModel(m).double().eval(); a,b = some(1, 9)[0],some(1, 9)[0]; b[-1] = 7 if a[-1]!=7 else 8
        with torch.no_grad(): x,y = (model.hidden(pack([t]))[0] for t in (a,b))
        assert torch.allclose(x[:-1], y[:-1], atol=1e-12) and not torch.allclose(x[-1], y[-1]), profile
        got = masked_loss(model, next_batch([a])); got.sum.backward()
        assert got.sum.isfinite() and len(next_batch([a]).target)==9
    print(f'{len(small_sets)} profiles')

def test_parts_and_ranks_ask_each_token_once():
    "Every token but the first of each text is asked for exactly once a pass, whatever the parts; the gradients of parts sum to that of the whole."
    c = load_config(profile='tiny', sets=['pretrain.objective=clm','model.vocab_size=512','model.dim=32','pretrain.batch_tokens=85','model.moe.balance=0'])
    texts = some(2, 5, 1, 0, 30, 17, 17, 8)
    whole = next(iter_parts(c, texts)); cut = next(iter_parts(replace(c, train=replace(c.train, micro_tokens=40)), texts))
    assert len(cut)>1 and sum(p.terms for p in cut)==sum(p.terms for p in whole)==sum(len(t)-1 for t in texts)
    def gradient(parts):
        model = ChromaModel(c.model).double()
        for p in parts: masked_loss(model, p.batch).sum.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(gradient(cut), gradient(whole), atol=1e-10)

def iter_parts(c, texts):
    source = MaskedParts(texts, c)
    while True: yield next(source)

def test_contradictions_are_refused():
    for sets,says in ((['pretrain.objective=clm','model.attention.causal=false'], 'leave model.attention.causal out'),
                      (['model.attention.causal=true'], 'set pretrain.objective=clm'), (['pretrain.objective=clm','pretrain.corrupt=0.1'],
                       'set pretrain.corrupt=0'),
                      (['pretrain.objective=next'], 'give mlm or clm')):
        with pytest.raises(ChromaError) as e: pretrain(load_config(profile='tiny', sets=sets), [[2,7,3]], progress=False)
        assert says in str(e.value); print(e.value)

# Writing

def slowly(model, ids, s, length, number):
    "Without a cache, one text at a time: tokens, and what each was drawn from."
    ids,ps = list(ids),[]
    for made in range(length):
        z = F.linear(*model.words(model.hidden(pack([ids]))[0][-1:])); seen = torch.zeros_like(z, dtype=torch.bool); seen[0,ids] = True
        ps.append(next_probabilities(z, s, seen)[0]); ids.append(draw(ps[-1][None], torch.from_numpy(noise([[s.seed,number]], [made]))).item())
    return ids, ps

@pytest.mark.parametrize('kind', KINDS)
def test_cached_equals_uncached(kind):
    model,prompts = ChromaModel(small(*KINDS[kind]), seed=2).double().eval(), some(3, 7, 0, 19, 7)
    s = Sampling(temperature=1.1, top_k=200, top_p=.98, penalty=1.3, seed=9)
    with torch.no_grad():
        want = [slowly(model, t, s, 12, n) for n,t in enumerate(prompts)]
        w,far = Writer(model, prompts, s, 12),0.
        for step in range(12):
            for n,token in w.step().items(): assert token==want[n][0][len(prompts[n])+step]
            for n,p in zip(w.live, w.p): far = max(far, (p-want[n][1][step]).abs().max().item())
            if step in (2,7): w.drop({2} if step==2 else {0,3})
    assert far<1e-12 and w.live==[1]
    print(f'{kind}: same tokens, probabilities off by {far:.0e}')

def test_cache_is_as_small_as_counted():
    for kind in ('mla','gqa','mqa','mha'):
        m = small(*KINDS[kind]); caches = ChromaModel(m).new_caches(2, 50)
        assert sum(c.kept.untyped_storage().nbytes() for c in caches)==2*50*cache_bytes(m, 4) and len(caches)==m.layers
    latent,plain = (load_config(profile='full', sets=['pretrain.objective=clm', *KINDS[k]]).model for k in ('mla','mha'))
    assert 1-cache_width(latent)/cache_width(plain)==pytest.approx(.859, abs=1e-3)            # and not 93%, which 32 heads would give
    print('MLA keeps 14.1% of what MHA does, at the widths of full')

def test_sampling_against_transformers():
    "The same distributions as transformers' processors, in their order; and as a plain loop that knows no sorting."
    tf = pytest.importorskip('transformers')
    g = torch.Generator().manual_seed(0)
    for t,k,p,r in ((1.,0,1.,1.), (.7,5,1.,1.), (1.,0,.8,1.), (.8,50,.9,1.), (1.5,20,.5,1.3), (.3,3,.99,2.)):
        z,ids = torch.randn(4, 300, generator=g)*3, torch.randint(300, (4,20), generator=g)
        seen = torch.zeros(4, 300, dtype=torch.bool).scatter(1, ids, True)
        theirs = tf.RepetitionPenaltyLogitsProcessor(r)(ids, z.clone()); theirs = tf.TemperatureLogitsWarper(t)(ids, theirs)
        if k: theirs = tf.TopKLogitsWarper(k)(ids, theirs)
        if p<1: theirs = tf.TopPLogitsWarper(p)(ids, theirs)
        ours = next_probabilities(z, Sampling(t, k, p, r), seen)
        assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6), (t, k, p, r)
    for row in range(4):                                                                       # nucleus by hand: the fewest that reach p
        q = z[row].softmax(-1).tolist(); kept,mass = set(),0.
        for i in sorted(range(300), key=lambda i: -q[i]):
            if mass>=.7: break
            kept.add(i); mass += q[i]
        assert kept=={i for i,x in enumerate(next_probabilities(z[row:row+1], Sampling(1., 0, .7))[0].tolist()) if x}

def test_draws_follow_the_probabilities():
    p = next_probabilities(torch.randn(1, 8, generator=torch.Generator().manual_seed(1)), Sampling(1., 6, .95))
    n = 20_000; found = draw(p.expand(n, -1), torch.from_numpy(noise([[4,1]]*n, range(n)))).bincount(minlength=8)/n
    assert (found[p[0]==0]==0).all() and (found-p[0]).abs().max() < 4*(.25/n)**.5

@pytest.fixture(scope='module')
def lm():
    "A language model that has read for some seconds."
    rows = [r['text'] for r in World().texts('1500')]
    tokenizer = ChromaTokenizer.train(rows, 512, lowercase=False)
    c = load_config(profile='blues', sets=[*TWIN, 'model.dim=64','pretrain.steps=50','pretrain.batch_tokens=768','pretrain.lr=0.01','model.max_length=200'])
    held = tokenizer.encode([r['text'] for r in World().texts('60', split='valid')], max_length=128)
    log = MetricsLog(); model = pretrain(c, tokenizer.encode(rows, max_length=128), log, progress=False, valid=dict(world=held))
    made = ChromaLM(model, tokenizer, 128, about=dict(training=[dict(phase='pre-training')])); made.log,made.held = log,held
    return made

def test_perplexity_is_the_loss(lm):
    judged = [r['eval_loss'] for r in lm.log.rows if 'eval' in r]
    read = together(read_tokens(lm.model, lm.held))
    assert read.loss/read.tokens==pytest.approx(judged[-1], abs=2e-5) and judged[-1] < judged[0]-.5
    text = lm.tokenizer.decode(lm.held[0]); one, = lm.perplexity([text])
    long, = lm.perplexity([' '.join([text]*9)]); cut, = lm.perplexity([' '.join([text]*9)], window=12, stride=11)
    assert one.bytes==len(text.encode()) and long.tokens==cut.tokens>200 and long.loss<cut.loss   # more context, less surprise
    print(f'perplexity {math.exp(judged[0]):.0f} to {read.perplexity:.1f}; of a long text {long.perplexity:.1f}, in windows side by side {cut.perplexity:.1f}')

def test_same_seed_same_text(lm):
    prompts = ['Net sales at','Q:','','This pair of']; a = lm.generate(prompts, max_length=15, seed=1)
    assert lm.generate(prompts, max_length=15, seed=1, batch_size=3)==a and [lm.generate(p, max_length=15, seed=1) for p in prompts[:1]]==a[:1]
    assert lm.generate(prompts, max_length=15, seed=2)!=a
    got = list(lm.stream(prompts, max_length=15, seed=1))
    assert [''.join(p.text for p in got if p.number==n) for n in range(4)]==[w.text for w in a] and sum(p.end!='' for p in got)==4
    assert all(w.tokens<=15 and w.end in ('eos','length') for w in a)
    greedy = [lm.generate(prompts, max_length=15, temperature=0, seed=n) for n in (1,2)]; assert greedy[0]==greedy[1]

def test_only_words_are_written(lm):
    "No special token but the end, no row that the tokenizer lacks, even when the model wants nothing else."
    model = ChromaModel(replace(lm.model.m, vocab_size=600)).eval(); wild = ChromaLM(model, lm.tokenizer)
    assert wild.allowed.nonzero().flatten().tolist()==[EOS, *range(len(SPECIALS), len(lm.tokenizer))]
    w = Writer(model, some(1, 4)*8, Sampling(5., 0, 1.), 20, wild.allowed)
    assert all(t==EOS or len(SPECIALS)<=t<len(lm.tokenizer) for _ in range(20) for t in w.step().values())

def test_stop_strings_in_pieces(lm):
    "Whatever the stop string and however it is cut into tokens, the text ends before its first appearance."
    whole = lm.generate('Net sales', max_length=40, seed=3).text
    for a in range(0, len(whole)-6, 5):
        stop = whole[a:a+6]; w = lm.generate('Net sales', max_length=40, seed=3, stop=[stop,'never there'])
        assert (w.text, w.end)==(whole[:find_stop(whole, [stop])[0]], 'stop')
    tail = Tail(lm.tokenizer, [BOS], ['zz']); text = 'naïve € 日本語 👩‍👩‍👧 x'
    pieces = [tail.add(t) for t in lm.tokenizer.encode([text], max_length=500)[0][1:-1]] + [tail.rest()]
    assert ''.join(pieces)==lm.tokenizer.decode(lm.tokenizer.encode([text], max_length=500)[0]) and '\ufffd' not in ''.join(pieces)

@pytest.mark.parametrize('kw,says', [
    (dict(top_p=0), 'set temperature to 0'), (dict(top_p=1.1), 'top_p is 1.1'), (dict(temperature=-1), 'temperature is -1'),
    (dict(temperature=math.inf), 'temperature is inf'), (dict(top_k=-3), 'top_k is -3'), (dict(repetition_penalty=0), 'repetition_penalty is 0'),
    (dict(max_length=0), 'at least 1'), (dict(stop=['']), 'a stop string is empty'), (dict(max_length=500), 'write at most')])
def test_refusals(lm, kw, says):
    with pytest.raises(ChromaError) as e: lm.generate('Net sales', **kw)
    assert says in str(e.value); print(e.value)

def test_unknown_tokens_are_refused(lm):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordPiece({'[UNK]': 0, 'net': 1, 'sales': 2}, unk_token='[UNK]')); tok.pre_tokenizer = pre_tokenizers.Whitespace()
    from chroma_moe.tokenizer import adopt
    foreign = ChromaLM(lm.model, ChromaTokenizer(adopt(tok)))
    assert foreign.generate('net sales', max_length=5).tokens>0 and not foreign.allowed[6]
    with pytest.raises(ChromaError, match='does not know a part of prompt 0'): foreign.generate('net profit')
    with pytest.raises(ChromaError, match='of another tokenizer'): Writer(lm.model, [[2, 5000]], Sampling(), 3)

def test_no_head_no_text(lm, tmp_path):
    from chroma_moe.encoder import ChromaMoE
    ChromaMoE(turn_attention(lm.model), lm.tokenizer).save_pretrained(tmp_path/'encoder')
    with pytest.raises(ChromaError, match='no head that writes'): ChromaLM.from_pretrained(tmp_path/'encoder')
    ChromaMoE(lm.model, lm.tokenizer, about=dict(training=[dict(phase='tuning')])).save_pretrained(tmp_path/'tuned')
    with pytest.raises(ChromaError, match='its head writes no more'): ChromaLM.from_pretrained(tmp_path/'tuned')

# From one to the other, and the commands

def test_commands(tmp_path, lm, monkeypatch, capsys):
    "Pre-train on next tokens, write, measure, tune, as a user does it; what was tuned writes no more."
    monkeypatch.chdir(tmp_path); lm.tokenizer.save('tok')
    sets = [x for s in [*TWIN,'data.size=120','data.max_length=64','tokenizer.path=tok','pretrain.steps=3','pretrain.batch_tokens=512','tune.steps=2',
                        'tune.batch_pairs=4','train.eval_size=10','train.save_every=-1','tune.both_ways=true'] for x in ('--set', s)]
    def said(f, *args, stdin=''):
        monkeypatch.setattr('sys.stdin', io.StringIO(stdin)); capsys.readouterr(); f.main([str(a) for a in args]); return capsys.readouterr().out
    assert 'perplexity' in said(chroma_pretrain, '--profile', 'blues', *sets, '--out', 'lm', '--no_progress')
    assert load_model('lm').m.attention.causal and 'next tokens' in Path('lm/README.md').read_text()
    want = ChromaLM.from_pretrained('lm').generate('Net sales', max_length=8, seed=3)
    assert json.loads(said(chroma_generate, '--checkpoint', 'lm', '--prompt', 'Net sales', '--max_length', 8, '--seed', 3, '--json'))==dict(
        prompt='Net sales', **want._asdict())
    out = said(chroma_generate, '--checkpoint', 'lm', '--interactive', '--max-length', 4, '--eval_text', 'Net sales rose', '--experts', stdin='Net\n\n')
    assert 'perplexity' in out and 'experts of layer 2' in out and '\nNet' in out
    said(chroma_tune, '--pretrained', 'lm', '--profile', 'blues', *sets, '--out', 'encoder', '--no_progress')
    assert not load_model('encoder').m.attention.causal
    with pytest.raises(SystemExit, match='no head that writes'): said(chroma_generate, '--checkpoint', 'encoder', '--prompt', 'x')

def run(name, *args, cwd):
    return subprocess.run([sys.executable, '-m', f'chroma_moe.{name}', *map(str, args)], capture_output=True, text=True, timeout=600, cwd=cwd,
                          env=os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))

@pytest.mark.long
def test_killed_and_resumed(tmp_path, lm):
    "A run on next tokens that is stopped goes on to the same weights."
    lm.tokenizer.save(tmp_path/'tok')
    args = ['--profile','blues','--no_progress', *(x for s in [*TWIN,'data.size=300','data.max_length=64','tokenizer.path=tok','pretrain.steps=30',
            'pretrain.batch_tokens=512','train.save_every=5','train.eval_size=20'] for x in ('--set', s))]
    assert run('pretrain', *args, '--out', 'whole', cwd=tmp_path).returncode==0
    p = subprocess.Popen([sys.executable,'-m','chroma_moe.pretrain', *args, '--out','cut'], cwd=tmp_path,
                         env=os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    for _ in range(1200):
        if list((tmp_path/'cut').glob('checkpoints/step-*')) or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGTERM); p.wait()
    r = run('pretrain', *args, '--out', 'cut', '--resume', cwd=tmp_path); assert r.returncode==0, r.stderr
    a,b = (load_model(tmp_path/n).state_dict() for n in ('whole','cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)
