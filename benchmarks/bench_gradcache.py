"""A contrastive step in chunks: its memory and time as the batch grows, its price beside a step in one piece, the loss beside the naive one,
and the whole beside sentence-transformers' CachedMultipleNegativesRankingLoss.

Memory is the peak of the resident set of a fresh process above what stood there before, in MB, with the allocator set as in a real run
(tune_cpu). Times are of forward and backward pass, without the optimizer, measured in turn.

    python benchmarks/run.py gradcache                     (about a quarter of an hour)
    CHROMA_BENCH=small python benchmarks/run.py gradcache  smaller batches and fewer rounds, to see that it runs
"""
import gc, json, os, pickle, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np, torch
from torch.nn import functional as F
from run import medians

from chroma_moe.blockwise import Matches, blockwise_cross_entropy
from chroma_moe.config import load_config
from chroma_moe.gradcache import GradCache
from chroma_moe.losses import Contrast, Group
from chroma_moe.model import ChromaModel
from chroma_moe.moe import add_stats, routing_loss
from chroma_moe.parallel import Ranks
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import Part, tune_cpu
from chroma_moe.tune import PairBatches, Pairs, make_batch, tokenise_pairs
from chroma_moe.world import World

SMALL = os.environ.get('CHROMA_BENCH')=='small'
FEW,MANY = (128,1024) if SMALL else (1024,16384) # pairs
BUDGET = 8192                                    # tokens in a chunk
ROUNDS = 3 if SMALL else 7
PAIRS = 64 if SMALL else 512                     # of a step that fits in one piece
WIDTH = 512                                      # of the vectors that the bare loss is given

# In a process of its own

def status(key):
    "A line of the kernel's account of this process, in MB."
    return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))/1024

def peak(f):
    "How far the resident set rises while `f` runs, in MB, and what `f` returns."
    gc.collect(); idle = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')                                  # the peak begins anew
    out = f()
    return status('VmHWM')-idle, out

def setting(pairs, n, budget, retain=0.):
    "`tiny`, batches of `n` world pairs, and a function that makes a step of one."
    c = load_config(profile='tiny', sets=[f'tune.batch_pairs={n}', f'train.micro_tokens={budget}'])
    model,loss = ChromaModel(c.model).train(), Contrast()
    both = [*model.parameters(), *loss.parameters()]
    def step(parts, retain=retain):
        for x in both: x.grad = None
        return GradCache(loss, retain)(parts, model.embed, Ranks(), c.model.moe)
    return c, model, loss, PairBatches(pairs, c), step

def step_memory(file, n):
    "Peak of making a batch and its step, the vectors and their gradients aside; both in MB, and tokens, texts, chunks."
    _,model,_,feed,step = setting(Pairs(*pickle.loads(Path(file).read_bytes())), n, BUDGET)
    def run():
        parts = next(feed); step(parts)
        return parts[0]
    high,part = peak(run)
    texts = sum(map(len, part.batch.chunks))
    return high-2*texts*model.embed_dim*4/2**20, 2*texts*model.embed_dim*4/2**20, part.tokens, texts, len(part.batch.chunks)

def step_times(file):
    "Seconds of the clock and of the processor for a pair of a large batch, and of small ones of as many pairs, half before and half after it."
    pairs = Pairs(*pickle.loads(Path(file).read_bytes()))
    few,many = (setting(pairs, n, BUDGET) for n in (FEW, MANY))
    def seconds(kind, n):
        parts = next(kind[3]); wall,cpu = time.perf_counter(),time.process_time(); kind[4](parts)
        return (time.perf_counter()-wall)/n, (time.process_time()-cpu)/n
    seconds(few, FEW); half = MANY//FEW//2
    small = [seconds(few, FEW) for _ in range(half)]; large = seconds(many, MANY); small += [seconds(few, FEW) for _ in range(half)]
    return *large, *(median(x) for x in zip(*small))

def loss_memory(N, M):
    "Peak of the bare loss, its gradients aside, in MB."
    x,w,target,left = vectors(N, M)
    def run(): blockwise_cross_entropy(x, w, target, left)[0].backward()
    return peak(run)[0]-(x.numel()+w.numel())*4/2**20

def alone(*args, **env):
    "What a function of this file returns in a fresh process."
    env = os.environ|dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS') or '1')|env
    done = subprocess.run([sys.executable, __file__, *map(str, args)], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

# 1. As the batch grows

# glibc keeps small free blocks aside for each thread; these split the heap, whose holes then fit nothing large
WAYS = {'': {}, ', no thread cache': dict(GLIBC_TUNABLES='glibc.malloc.tcache_count=0')}

def growth(file):
    what = f'tiny, float32, world pairs, chunks of at most {BUDGET} tokens'
    for way,env in WAYS.items():
        (large,aside,tokens,texts,chunks),(small,_,_,_,fewer) = (alone('step_memory', file, n, **env) for n in (MANY, FEW))
        yield dict(name=f'cached step, memory of {MANY:,} pairs{way}', ours=large, peer=small, ratio=small/large, target=1/1.15,
                   conditions=f'{what}: {chunks} chunks, {tokens} tokens, {texts} texts; peer: {FEW} pairs, {fewer} chunks; MB above the idle process, less '
                              f'the vectors and their gradients ({aside:.1f} MB); ours may take 1.15 of the peer and takes {large/small:.2f}'
                              + ''.join(f'; {k}={v}' for k,v in env.items()))
    wall,cpu,wall_few,cpu_few = alone('step_times', file)
    yield dict(name=f'cached step, time of a pair, {MANY:,} pairs', ours=wall, peer=wall_few, ratio=wall_few/wall, target=1/1.1,
               conditions=f'{what}; peer: median of {MANY//FEW//2*2} steps of {FEW} pairs, half before and half after; seconds a pair; '
                          f'ours may take 1.1 of the peer and takes {wall/wall_few:.2f}, {cpu/cpu_few:.2f} in seconds of the processor')

# 2. Beside a step in one piece

def price(pairs):
    c,model,loss,whole,step = setting(pairs, PAIRS, 0)
    budget = BUDGET//2
    [one],[cut] = next(whole), next(setting(pairs, PAIRS, budget)[3])
    e = c.model.moe
    def uncached(part=one):
        "All chunks with their graphs, then one backward pass; no cache."
        for x in (*model.parameters(), *loss.parameters()): x.grad = None
        vectors,stats = zip(*map(model.embed, part.batch.chunks))
        vectors = torch.cat(vectors)
        value = sum(loss(r.loss, vectors[r.query], vectors[r.doc], r.group)[0] for r in part.batch.rows)/part.terms
        (value + sum(routing_loss(s, e, add_stats(stats)) for s in stats)).backward()
    kinds = {'uncached': uncached, 'uncached in chunks': lambda: uncached(cut), 'retain 0': lambda: step([cut], 0.), 'retain 0.5': lambda: step([cut], .5),
             'retain 1': lambda: step([cut], 1.), 'one chunk': lambda: step([one], 0.)}
    t = dict(zip(kinds, medians(*kinds.values(), rounds=ROUNDS)))
    what = f'tiny, {PAIRS} world pairs, {one.tokens} tokens; forward and backward, seconds'
    for kind,allowed in (('retain 0', 1.33), ('retain 0.5', 1.17), ('retain 1', None), ('one chunk', 1.)):
        n = 1 if kind=='one chunk' else len(cut.batch.chunks)
        yield dict(name=f'cached step, {kind}', ours=t[kind], peer=t['uncached'], ratio=t['uncached']/t[kind], target=allowed and 1/allowed,
                   conditions=f'{what}; {n} chunk(s); peer: one piece with its graph; ours ' + (f'may take {allowed} of it and ' if allowed else '')
                   + f"takes {t[kind]/t['uncached']:.3f}, and {t[kind]/t['uncached in chunks']:.3f} of the same {len(cut.batch.chunks)} chunks without cache")

# 3. The bare loss

def vectors(N, M):
    "Rows, columns, targets, and columns left out: a tenth of the rows ask what others ask."
    g = torch.Generator().manual_seed(0)
    x,w = (F.normalize(torch.randn(n, WIDTH, generator=g), dim=-1).requires_grad_() for n in (N, M))
    target,key = torch.randperm(M, generator=g)[:N], torch.arange(N)
    key[:N//10] = torch.randint(N//20, (N//10,), generator=g)
    return x, w, target, [Matches(key, key, target)]

def bare(N, M):
    x,w,target,left = vectors(N, M)
    mask = torch.zeros(N, M, dtype=torch.bool)
    for m in left: mask[m.block(slice(0, N))] = True
    mask.scatter_(1, target[:,None], False)
    def naive(mask=None):
        x.grad = w.grad = None
        s = (x*20)@w.T
        loss = F.cross_entropy(s if mask is None else s.masked_fill(mask, -float('inf')), target); loss.backward()
        return loss.item()
    def ours(left=()):
        x.grad = w.grad = None
        loss,_ = blockwise_cross_entropy(x*20, w, target, left); loss.backward()
        return loss.item()
    kinds = [ours, naive, lambda: ours(left), lambda: naive(mask)]
    a,b,c,d = (f() for f in kinds)
    assert abs(a-b)<1e-5 and abs(c-d)<1e-5, f'{a} and {b}, {c} and {d}'
    mine,peer,mine_left,peer_left = medians(*kinds, rounds=ROUNDS)
    what = f'{N} rows, {M} columns, width {WIDTH}, float32, forward and backward; seconds'
    for name,o,p,more in (('', mine, peer, ''), (', some left out', mine_left, peer_left, ' on scores masked by a table made before')):
        yield dict(name=f'blockwise loss {N} x {M}{name}', ours=o, peer=p, ratio=p/o, target=1/1.05,
                   conditions=f'{what}; peer: F.cross_entropy{more}; ours may take 1.05 of it and takes {o/p:.2f}')

def large_loss():
    N,M = (2048,4096) if SMALL else (16384,32768)
    ours = alone('loss_memory', N, M)
    return dict(name=f'blockwise loss {N} x {M}, memory', ours=ours, peer=300, ratio=300/ours, target=1.,
                conditions=f'width {WIDTH}, float32, with left-out columns; MB above rows, columns and their gradients in a fresh process; limit 300')

# 4. Beside sentence-transformers

def sizes_of(size):
    "A dense BERT of ours: normal size of `tiny` or of `classic`."
    dim,layers,heads,vocab = dict(tiny=(128,2,4,4096), classic=(256,6,8,10000))[size]
    return load_config(profile='classic', sets=[f'model.dim={dim}', f'model.layers={layers}', f'model.vocab_size={vocab}', f'model.attention.heads={heads}',
        f'model.attention.head_dim={dim//heads}', f'model.moe.dense_dim={4*dim}', f'model.pooling.out_dim={dim}', 'model.dropout=0.']).model

def peer_of(m):
    "The same sizes as a SentenceTransformer: transformers' BertModel with mean pooling."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel
    config = BertConfig(vocab_size=m.vocab_size, hidden_size=m.dim, num_hidden_layers=m.layers, num_attention_heads=m.attention.heads,
                        intermediate_size=m.moe.dense_dim, max_position_embeddings=m.max_length, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    config._attn_implementation = 'sdpa'
    class Bert(torch.nn.Module):
        def __init__(self): super().__init__(); self.bert = BertModel(config, add_pooling_layer=False)
        def forward(self, features, **_):
            out = self.bert(input_ids=features['input_ids'], attention_mask=features['attention_mask'])
            return features|dict(token_embeddings=out.last_hidden_state)
    return SentenceTransformer(modules=[Bert(), Pooling(m.dim, 'mean')], device='cpu').train()

def long_pairs(n, vocab):
    "World pairs with one negative, whose documents run on into other texts: log-normal lengths, median 64, at most 256 tokens."
    world = World()
    more = [r['text'] for r in world.texts(3000)]
    tok = ChromaTokenizer.train(more, vocab)
    p = tokenise_pairs((r for r in world.pairs(2*n) if r['negatives']), tok, 256, 1)
    rng,more = np.random.default_rng(0), tok.encode(more, max_length=256)
    lengths = np.clip(np.round(np.exp(rng.normal(np.log(64), .6, len(p.tokens)))), 12, 256).astype(int)
    for i,n_tokens in enumerate(lengths):
        t = p.tokens[i][:-1]
        while len(t)<n_tokens: t = t+more[rng.integers(len(more))][1:-1]
        p.tokens[i] = t[:n_tokens-1]+p.tokens[i][-1:]
    keep = [i for i,d in enumerate(p.docs) if len(d)==2]
    return p._replace(**{k: [getattr(p, k)[i] for i in keep] for k in ('queries','prompt','docs','labels','query_key','source')})

def same_loss(m):
    "The largest difference of the two losses on the same vectors."
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    g,n = torch.Generator().manual_seed(0), 200
    q,pos,neg = (F.normalize(torch.randn(n, m.dim, generator=g)+torch.randn(1, m.dim, generator=g), dim=-1) for _ in range(3))
    pos = F.normalize(q+pos, dim=-1)
    row,key = torch.arange(n).repeat_interleave(2), torch.arange(2*n)
    ours = Contrast(.05)('infonce', q, torch.stack([pos, neg], 1).flatten(0, 1), Group(row, torch.zeros(2*n), torch.arange(n), key))[0].item()/n
    peer = peer_of(m)
    theirs = [CachedMultipleNegativesRankingLoss(peer, scale=20., mini_batch_size=64).calculate_loss([list(x.split(64)) for x in (q,pos,neg)]).item(),
              MultipleNegativesRankingLoss(peer, scale=20.).compute_loss_from_embeddings([q,pos,neg], None).item()]
    return max(abs(ours-t) for t in theirs)

def beside(size, n, chunks, rounds):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    m = sizes_of(size)
    off = same_loss(m); assert off<1e-5, f'the losses differ by {off}'
    p = long_pairs(n, m.vocab_size); rows = range(n)
    columns = [[p.queries[i] for i in rows], *([p.tokens[p.docs[i][k]] for i in rows] for k in (0, 1))]
    features = []
    for texts in columns:
        ids = torch.zeros(n, max(map(len, texts)), dtype=torch.long); mask = torch.zeros_like(ids)
        for a,b,t in zip(ids, mask, texts): a[:len(t)] = torch.tensor(t); b[:len(t)] = 1
        features.append(dict(input_ids=ids, attention_mask=mask))
    def padded(chunk): return sum(len(part)*max(map(len, part)) for column in columns for part in (column[i:i+chunk] for i in range(0, n, chunk)))
    model,loss,peer = ChromaModel(m).train(), Contrast(), peer_of(m)
    ours_n = sum(x.numel() for x in model.parameters())-model.pool.project.weight.numel(); peer_n = sum(x.numel() for x in peer.parameters())
    total = sum(len(t) for column in columns for t in column); mean_tokens = total/(3*n)
    for chunk in chunks:
        part = Part(make_batch(p, [('infonce', list(rows))], round(chunk*mean_tokens)), n, total)
        texts = sum(map(len, part.batch.chunks)); assert texts==3*n, f'{texts} texts of {3*n}'
        cached = CachedMultipleNegativesRankingLoss(peer, scale=20., mini_batch_size=chunk)
        def ours():
            for x in (*model.parameters(), *loss.parameters()): x.grad = None
            GradCache(loss)([part], model.embed, Ranks())
        def theirs():
            for x in peer.parameters(): x.grad = None
            cached([dict(f) for f in features], None).backward()
        o,t = medians(ours, theirs, rounds=rounds)
        assert all(x.grad.abs().sum()>0 for x in (model.embedding.weight, peer[0].bert.embeddings.word_embeddings.weight)), 'a step made no gradient'
        yield dict(name=f'cached step, {size} dense, chunks of {chunk}', ours=n/o, peer=n/t, ratio=t/o, target=1.3,
                   conditions=f'{n} pairs with a hard negative each, {3*n} texts, {total} tokens, {ours_n:,} and {peer_n:,} parameters, no dropout, float32; '
                   f'peer: sentence-transformers CachedMultipleNegativesRankingLoss, BertModel, sdpa, mini-batches of {chunk} '
                   f'texts, {padded(chunk)} places with padding; ours: '
                   f'{len(part.batch.chunks)} chunks of at most {round(chunk*mean_tokens)} tokens, as many texts on average; on the same vectors the losses '
                   f'differ by {off:.0e}; pairs a second')

def bench():
    with tempfile.TemporaryDirectory() as d:
        tok = ChromaTokenizer.train([r['text'] for r in World().texts(4000)], 4096)
        pairs = tokenise_pairs(World().pairs(MANY), tok, 256, 1)
        file = Path(d)/'pairs'; file.write_bytes(pickle.dumps(tuple(pairs)))
        yield from growth(file)
        yield from price(pairs)
    for N,M in ((512,1024),) if SMALL else ((2048,4096), (4096,8192)): yield from bare(N, M)
    yield large_loss()
    yield from beside('tiny', PAIRS, (32,) if SMALL else (32,128), ROUNDS)
    if not SMALL: yield from beside('classic', 128, (32,), 3)

if __name__=='__main__':
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS') or 1)); tune_cpu()
    name,*args = sys.argv[1:]
    print(json.dumps(dict(step_memory=step_memory, step_times=step_times, loss_memory=loss_memory)[name](*(int(a) if a.isdigit() else a for a in args))))
