"Phase 1 as it runs: two processes against two runs of one, and what data, logging and checkpoints take from a step of `debug`."
import json, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

from chroma_moe import training
from chroma_moe.config import load_config
from chroma_moe.model import ChromaModel
from chroma_moe.monitor import MetricsLog
from chroma_moe.pretrain import MaskedParts, masked_loss
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import Feed, Trainer
from chroma_moe.world import World

VOCAB,TEXTS,STEPS,ROUNDS = 8192,4000,2,2
RUN = 1000     # steps of the run whose shares are given: 100 lines of metrics, 10 checkpoints, 10 evaluations with a picture

def speeds(home, ranks, runs):
    "Tokens a second of some runs side by side, each of so many processes: the sum of their medians over the steps after the first."
    sets = [f'tokenizer.path={home}/tokenizer', f'data.size={TEXTS}', f'pretrain.steps={STEPS}', 'train.log_every=1', 'train.save_every=-1',
            'train.eval_size=8']
    launch = ['torch.distributed.run','--standalone','--nproc_per_node',str(ranks),'-m'] if ranks>1 else []
    outs = [home/f'run{ranks}{i}' for i in range(runs)]
    def start(out): return subprocess.Popen([sys.executable, '-m', *launch, 'chroma_moe.pretrain', '--no_progress', '--profile', 'debug', '--out', str(out),
                                             *(w for s in sets for w in ('--set', s))], env=os.environ|dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL)
    running = [start(out) for out in outs]
    try: assert all([p.wait()==0 for p in running])
    finally:
        for p in running: p.terminate()
    rows = [[json.loads(line) for line in open(out/'metrics.jsonl')] for out in outs]
    for out in outs: subprocess.run(['rm', '-r', out], check=True)
    return sum(median(r['tokens_per_second'] for r in run if 'tokens_per_second' in r and r['step']>1) for run in rows)

def two_processes(home):
    both = [(speeds(home, 2, 1), speeds(home, 1, 2)) for _ in range(ROUNDS)]        # in turn, so that a busy machine slows both
    ours,peer = (median(x) for x in zip(*both))
    batch = load_config(profile='debug').pretrain.batch_tokens
    return dict(name='two processes', ours=ours, peer=peer, ratio=ours/peer, target=0.85,
                conditions=f'debug, one thread each, {batch} tokens a step, gloo; peer: two runs of one process side by side, {batch} tokens a step each; '
                f'tokens a second in step 2, {ROUNDS} times in turn')

def timed(f, seconds):
    def timing(*args, **kwargs):
        start = time.perf_counter()
        try: return f(*args, **kwargs)
        finally: seconds.append(time.perf_counter()-start)
    return timing

def shares(home, ids, profile, steps, background):
    "Seconds of a step; of waiting for data, of a line of metrics, of the progress line, of a picture, of a checkpoint; of making a batch."
    c = load_config(profile=profile, sets=[f'pretrain.steps={RUN}', 'train.log_every=1', 'train.save_every=-1'])
    t = dict(step=[], data=[], line=[], bar=[], picture=[], checkpoint=[], batch=[])
    out = home/profile
    run = Trainer(ChromaModel(c.model), masked_loss, c, 'pretrain', log=MetricsLog(out/'metrics.jsonl'), folder=out, head=c.pretrain.mask_ratio, progress=False)
    class Waiting(Feed): __next__ = timed(Feed.__next__, t['data'])
    class Bar(training.Progress): step = timed(training.Progress.step, t['bar'])
    plain,training.Progress = training.Progress,Bar
    run.advance,run.note = timed(run.advance, t['step']),timed(run.note, t['line'])
    feed = Waiting(MaskedParts(ids, c))
    try: run.fit(feed, steps)
    finally: training.Progress = plain
    for _ in range(3):
        timed(run.monitor.save, t['picture'])(out)
        run.checkpoints = training.Checkpoints(out/'checkpoints', 1, background); timed(run.save, t['checkpoint'])(feed.place); run.checkpoints.wait()
    feed.close(); source = MaskedParts(ids, c)
    for _ in range(3): timed(source.__next__, t['batch'])()
    return {k: median(v[1:] if k in ('step','data','line') else v) for k,v in t.items()}

def rows_of(home, ids, profile, steps):
    "A row for each share, of the time of a step that has it."
    t,later = shares(home, ids, profile, steps, False),shares(home, ids, profile, 2, True)
    bare = t['step']                                                               # seconds
    parts = [('data loading', t['data'], 0.97, f"waiting {t['data']*1000:.2f} ms a step; a batch takes its thread {t['batch']*1000:.0f} ms"),
             ('logging and monitoring', t['line']/10+t['bar']+11*t['picture']/RUN, 0.98, f"{t['line']*1000:.1f} ms for a line of metrics every ten steps, "
              f"{t['picture']:.2f} s for each of 11 pictures of routing"),
             ('checkpoints', 10*t['checkpoint']/RUN, 0.95, f"{t['checkpoint']:.2f} s each, ten in the run"),
             ('checkpoints in the background', 10*later['checkpoint']/RUN, None, f"{later['checkpoint']:.2f} s each until training goes on")]
    return [dict(name=f'{name}, {profile}', ours=bare+part, peer=bare, ratio=bare/(bare+part), target=target if profile=='debug' else None, conditions=
                 f'{part/(bare+part):.2%} of a run of {RUN} steps: {what}; seconds a step with it, and without') for name,part,target,what in parts]

def bench():
    texts = [r['text'] for r in World().texts(TEXTS)]
    tokenizer = ChromaTokenizer.train(texts, VOCAB)
    with tempfile.TemporaryDirectory() as d:
        tokenizer.save(Path(d)/'tokenizer'); ids = tokenizer.encode(texts, max_length=512)
        small = [[min(x, 4095) for x in t] for t in ids]                            # the vocabulary of tiny
        return [two_processes(Path(d)), *rows_of(Path(d), small, 'tiny', 12), *rows_of(Path(d), ids, 'debug', 4)]
