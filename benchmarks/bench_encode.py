"""`ChromaMoE.encode` against sentence-transformers' `encode`: texts of realistic lengths, one thread, the same process and allocator.

Three peers, all in sentence-transformers. `same weights` is the same folder through chroma_moe.hf: it pads, and the adapter takes the padding out before
the model runs, so that only tokenising, batches and copies differ. `twin` is the same shape without our adapter: transformers' DeepseekV2Model with the
same attention and experts, padded; it is causal, which saves it work. `bert` is what most have: a BertModel of the same width and layers whose inner width
is such that a token meets as many parameters as in ours, padded. The last two have random weights and mean pooling, and read the same tokens.

A pass over 5,000 texts is measured in groups: the texts are sorted by length, as both sides sort them, and cut into runs of 256 or so. All systems take one
group after another, so that a busy machine slows all of them alike; the time of a pass is the sum over groups of the median over rounds. Batches are those of
the whole pass but for the borders of the groups. The times are kept in runs/bench_encode.json, and a run that was cut off goes on there.

    python benchmarks/run.py encode                       1, 100 and 5,000 texts; tiny and debug (an hour on one core)
    CHROMA_BENCH=small python benchmarks/run.py encode    fewer texts and rounds, tiny only, to see that it runs
    CHROMA_PROFILES=debug CHROMA_SECONDS=600 ...          one profile; no new round is begun after so many seconds
"""
import functools, json, os, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np, torch
from bench_step import peer_model
from run import medians

SMALL = os.environ.get('CHROMA_BENCH')=='small'
N,GROUP,ROUNDS = (512, 128, 1) if SMALL else (5000, 256, 3)
PROFILES = os.environ.get('CHROMA_PROFILES', 'tiny' if SMALL else 'tiny,debug').split(',')
SECONDS = float(os.environ.get('CHROMA_SECONDS', 120 if SMALL else 3600))
SIZES = (32, 128) if SMALL else (8, 16, 32, 64, 128, 256)
KEPT = Path(__file__).parents[1]/'runs'/f'bench_encode{"_small"*SMALL}.json'
PEERS = ('same weights','twin','bert')
TARGETS = {('float32','default'): 1.6, ('float32','best'): 1.15, ('bfloat16','best'): 1.8}

@functools.cache
def tokenizer():
    from chroma_moe.terms import TERMS
    from chroma_moe.tokenizer import ChromaTokenizer
    from chroma_moe.world import World
    return ChromaTokenizer.train([r['text'] for r in World().texts(4000)], 4096, terms=TERMS)

@functools.cache
def texts(n=N):
    "Texts whose token counts are log-normal, median 60, at most 512, longest first."
    from chroma_moe.world import World
    rng,tok = np.random.default_rng(0),tokenizer()
    stream = [i for ids in tok.encode([r['text'] for r in World(1).texts(3000)], max_length=512) for i in ids[1:-1]]
    lengths = np.clip(np.round(np.exp(rng.normal(np.log(60), 1., n))), 4, 512).astype(int)
    starts = rng.integers(0, len(stream)-512, n)
    return [tok.decode(stream[s:s+l-2]) for l,s in sorted(zip(lengths.tolist(), starts.tolist()), reverse=True)]

def in_library(model, width, folder, dtype):
    "A model of transformers with our tokens and mean pooling."
    from sentence_transformers import SentenceTransformer, models
    from transformers import PreTrainedTokenizerFast
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer().tok, pad_token='<pad>', model_max_length=512).save_pretrained(folder)
    body = models.Transformer(str(folder), max_seq_length=512, model_kwargs=dict(dtype=dtype))
    body.auto_model.config._experts_implementation = 'grouped_mm'
    return SentenceTransformer(modules=[body, models.Pooling(width)], device='cpu')

def bert(m, folder, dtype):
    "A padded encoder with as many active parameters, in sentence-transformers; words about it."
    from transformers import BertConfig, BertModel
    from chroma_moe.config import count_params
    def make(inner):
        return BertConfig(vocab_size=m.vocab_size, hidden_size=m.dim, num_hidden_layers=m.layers, num_attention_heads=m.attention.heads,
                          intermediate_size=inner, max_position_embeddings=512, type_vocab_size=1)
    def count(c):
        with torch.device('meta'): b = BertModel(c, add_pooling_layer=False)
        return sum(p.numel() for p in b.encoder.parameters())
    asked = count_params(m, True) - m.dim*m.vocab_size
    inner = 1 + round((asked-count(make(1)))/(count(make(2))-count(make(1))))
    torch.manual_seed(0)
    return in_library(BertModel(make(inner), add_pooling_layer=False), m.dim, folder, dtype), \
        f'BertModel, inner width {inner}, {count(make(inner))/1e6:.2f}M parameters met by a token'

def systems(profile, folder):
    "name -> (texts -> vectors), for both number formats; and words about the padded peer."
    import chroma_moe.hf  # noqa: F401  (registers the model with transformers)
    from sentence_transformers import SentenceTransformer
    from chroma_moe.config import load_config
    from chroma_moe.encoder import ChromaMoE
    from chroma_moe.model import ChromaModel
    from transformers.utils import logging
    logging.disable_progress_bar(); logging.set_verbosity_error()
    m = load_config(profile=profile).model
    ours = ChromaMoE(ChromaModel(m), tokenizer(), 512); ours.save_pretrained(folder/'ours')
    out,words = {},''
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix('torch.')
        mine = ours if dtype==torch.float32 else ChromaMoE(ChromaModel(m).to(dtype), tokenizer(), 512)
        same = SentenceTransformer(str(folder/'ours'), device='cpu', local_files_only=True, model_kwargs=dict(dtype=dtype))
        padded,words = bert(m, folder/f'bert {kind}', dtype)
        torch.manual_seed(0); twin = in_library(peer_model(m), m.dim, folder/f'twin {kind}', dtype)
        out[kind,'ours',0] = mine.encode
        for name,st in (('same weights',same), ('twin',twin), ('bert',padded)):
            for size in SIZES: out[kind,name,size] = functools.partial(st.encode, batch_size=size)
    few = texts()[::max(1, N//40)]
    gap = np.abs(out['float32','ours',0](few)-out['float32','same weights',32](few)).max()
    assert gap<1e-5, f'the two do not give the same vectors: {gap}'
    return out, words

class Times:
    "Seconds by system, group and round, on disk after each group."
    def __init__(self, profile):
        self.all = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        self.mine = self.all.setdefault(f'{profile}, {N} texts, torch {torch.__version__}', {})

    def measure(self, systems, groups, round_, until):
        "Let each system encode each group, in turn."
        for g,part in groups:
            for name,f in systems:
                key = json.dumps([*name, g, round_])
                if key in self.mine: continue
                if time.perf_counter()>until: return
                start = time.perf_counter(); f(part); self.mine[key] = time.perf_counter()-start
            KEPT.parent.mkdir(exist_ok=True, parents=True)
            new = KEPT.with_suffix('.new'); new.write_text(json.dumps(self.all)); new.replace(KEPT)

    def total(self, name, groups):
        "Seconds of a pass over some groups; None if one of them was not measured."
        found = [[v for k,v in self.mine.items() if json.loads(k)[:4]==[*name, g]] for g,_ in groups]
        return sum(map(median, found)) if all(found) else None

def passes(profile, systems, until):
    "Seconds of ours and of each peer at its default and its best batch size, over all texts; float32 first, should time run out."
    out = {}
    for kind in ('float32','bfloat16'): out |= one_kind(profile, {n: f for n,f in systems.items() if n[0]==kind}, until)
    return out

def one_kind(profile, systems, until):
    every = [(g, texts()[i:i+GROUP]) for g,i in enumerate(range(0, N, GROUP))]
    for _,f in systems.items(): f(texts()[-8:])                                         # first calls are slower
    times,sample = Times(profile), every[::max(1, len(every)//4)]
    times.measure(systems.items(), sample, 0, until)                                    # all batch sizes on some groups, to choose the best
    found = {name: t for name in systems if (t := times.total(name, sample)) is not None}
    best = {(kind,peer): min((n for n in found if n[:2]==(kind,peer)), key=found.get) for kind,peer,_ in found}
    chosen = {**{(k,p,'best'): n for (k,p),n in best.items()}, **{(n[0],n[1],'default'): n for n in systems if n[2]==32}}
    for r in range(ROUNDS): times.measure([(n, systems[n]) for n in {**dict.fromkeys(chosen.values())}], every, r, until)
    return {k: (n[2], t) for k,n in chosen.items() if (t := times.total(n, every)) is not None}

def few(systems, n, rounds=15):
    "Seconds to encode n texts of usual lengths, at default settings."
    rng,size = np.random.default_rng(n), 32
    part = [texts()[i] for i in rng.choice(np.arange(N//4, 3*N//4) if n==1 else N, n, replace=False)]
    part = part[0] if n==1 else part
    names = [(k,p,0 if p=='ours' else size) for k in ('float32','bfloat16') for p in ('ours',*PEERS)]
    return dict(zip(names, medians(*(lambda f=systems[x]: f(part) for x in names), rounds=3 if SMALL else rounds)))

def bench():
    began = time.perf_counter()
    for k,profile in enumerate(PROFILES):
        until = began + SECONDS*(k+1)/len(PROFILES)
        with tempfile.TemporaryDirectory() as folder: found,words = systems(profile, Path(folder))
        lengths = [len(i) for i in tokenizer().encode(texts())]
        what = f'{profile}; tokens a text: median {int(median(lengths))}, longest {max(lengths)}; texts a second'
        def row(kind, peer, ours, theirs, n, when, how, target, what=what):
            told = {'same weights': 'the same folder, unpadded by our adapter', 'bert': f'{words}, padded',
                    'twin': 'DeepseekV2Model of the same sizes, grouped_mm experts, padded'}[peer]
            return dict(name=f'encode {profile} {kind}, {n} texts, {peer}, {when}', ours=n/ours, peer=n/theirs, ratio=theirs/ours, target=target,
                        conditions=f'{what}; peer: sentence-transformers, {told}, {how}')
        for n in (1, 100):
            t = few(found, n)
            for kind in ('float32','bfloat16'):
                for peer in PEERS:
                    yield row(kind, peer, t[kind,'ours',0], t[kind,peer,32], n, 'default', 'batches of 32', None)
        t = passes(profile, found, until)
        for (kind,peer,when),(size,seconds) in sorted(t.items()):
            if peer=='ours' or (kind,'ours','best') not in t: continue
            yield row(kind, peer, t[kind,'ours','best'][1], seconds, N, when, f'batches of {size}', TARGETS.get((kind,when)))
