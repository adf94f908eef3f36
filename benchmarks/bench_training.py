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

VOCAB,TEXTS,STEPS,ROUNDS = 8192,4000,3,2
RUN = 1000     # steps of the run whose shares are given: 100 lines of metrics, 10 checkpoints, 10 evaluations with a picture

def speeds(home, ranks, runs):
    "Tokens a second of some runs side by side, each of so many processes: the sum of their medians over the steps after the first."
    sets = ['tokenizer.path='+str(home/'tokenizer'), f'data.size={TEXTS}', f'pretrain.steps={STEPS}', 'train.log_every=1', 'train.save_every=-1', 'train.eval_size=8']
    launch = ['torch.distributed.run','--standalone','--nproc_per_node',str(ranks),'-m'] if ranks>1 else []
    outs = [home/f'run{ranks}{i}' for i in range(runs)]
    def start(out): return subprocess.Popen([sys.executable, '-m', *launch, 'chroma_moe.pretrain', '--no_progress', '--profile', 'debug', '--out', str(out),
                                             *(w for s in sets for w in ('--set', s))], env=os.environ|dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL)
    for p in [start(out) for out in outs]: assert p.wait()==0
    rows = [[json.loads(line) for line in open(out/'metrics.jsonl')] for out in outs]
    for out in outs: subprocess.run(['rm', '-r', out], check=True)
    return sum(median(r['tokens_per_second'] for r in run if 'tokens_per_second' in r and r['step']>1) for run in rows)

def two_processes(home):
    both = [(speeds(home, 2, 1), speeds(home, 1, 2)) for _ in range(ROUNDS)]        # in turn, so that a busy machine slows both
    ours,peer = (median(x) for x in zip(*both))
    batch = load_config(profile='debug').pretrain.batch_tokens
    return dict(name='two processes', ours=ours, peer=peer, ratio=ours/peer, target=0.85, conditions=f'debug, one thread each, {batch} tokens a step, gloo; peer: '
                f'two runs of one process side by side, {batch} tokens a step each; tokens a second, median of steps 2 to {STEPS}, {ROUNDS} times in turn')

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
    t,later = shares(home, ids, profile, steps, False),shares(home, ids, profile, 1+(profile=='debug'), True)
    whole = t['step']+t['data']
    parts = [('data loading', t['data'], 0.97, f"waiting {t['data']*1000:.2f} ms a step; a batch takes its thread {t['batch']*1000:.0f} ms"),
             ('logging and monitoring', (RUN/10*t['line']+RUN*t['bar']+11*t['picture'])/RUN, 0.98, f"{t['line']*1000:.1f} ms for a line of metrics every ten steps, "
              f"{t['picture']:.2f} s for each of 11 pictures of routing"),
             ('checkpoints', 10*t['checkpoint']/RUN, 0.95, f"{t['checkpoint']:.2f} s each, ten in the run"),
             ('checkpoints written in the background', 10*later['checkpoint']/RUN, None, f"{later['checkpoint']:.2f} s each until training goes on, ten in the run")]
    return [dict(name=f'{name}, {profile}', ours=whole, peer=whole+(0 if name=='data loading' else s), ratio=1-s/(whole if name=='data loading' else whole+s),
                 target=target if profile=='debug' else None, conditions=f'{s/(whole if name=="data loading" else whole+s):.2%} of a run of {RUN} steps: {what}; '
                 'seconds a step without and with it') for name,s,target,what in parts]

def bench():
    texts = [r['text'] for r in World().texts(TEXTS)]
    tokenizer = ChromaTokenizer.train(texts, VOCAB)
    with tempfile.TemporaryDirectory() as d:
        tokenizer.save(Path(d)/'tokenizer'); ids = tokenizer.encode(texts, max_length=512)
        rows = [r for profile,steps in (('tiny', 12), ('debug', 4)) for r in rows_of(Path(d), [[min(x, 4095) for x in t] for t in ids] if profile=='tiny' else ids, profile, steps)]
        return [two_processes(Path(d)), *rows]
