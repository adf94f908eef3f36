"Two processes that hold half of the experts of each layer each, against two runs of one process side by side. One thread each, `debug`-sized layers."
import json, os, socket, subprocess, sys
from pathlib import Path
from statistics import median

TOKENS,ROUNDS = 4096,5

WORKER = '''
import sys, time
import torch
from chroma_moe.config import load_config
from chroma_moe.model import ChromaModel
from chroma_moe.parallel import Ranks, start
from chroma_moe.pretrain import MaskedParts, masked_loss
from chroma_moe.training import Trainer, tune_cpu
tune_cpu(1)
both,spread,tokens = start(),sys.argv[1]=='spread',int(sys.argv[2])
ranks = Ranks(both.accelerator, expert=2) if spread else Ranks()
c = load_config(profile='debug', sets=['model.vocab_size=8192', f'pretrain.batch_tokens={tokens*ranks.n}'])
rng = torch.Generator().manual_seed(ranks.rank)
ids = [[2, *torch.randint(6, 8000, (int(k),), generator=rng).tolist(), 3] for k in torch.randint(20, 240, (600,), generator=rng)]
data,run = MaskedParts(ids, c, ranks),Trainer(ChromaModel(c.model), masked_loss, c, 'pretrain', ranks=ranks, progress=False)
run.model.train()
for line in sys.stdin:
    both.wait(); began,used = time.perf_counter(),time.process_time(); parts = next(data); run.advance(parts)
    tokens = sum(p.tokens for p in parts)
    print(tokens/(time.perf_counter()-began), (time.process_time()-used)/tokens, flush=True)
both.end()
'''

class Pair:
    "Two processes that make a step when they are told."
    def __init__(self, kind):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        env = os.environ|dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1',
                              PYTHONPATH=str(Path(__file__).parents[1]))
        self.both = [subprocess.Popen([sys.executable, '-c', WORKER, kind, str(TOKENS)], env=env|dict(RANK=str(r), LOCAL_RANK=str(r)), text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for r in range(2)]

    def step(self):
        "Tokens a second of both together, and seconds of a core that a token takes."
        for p in self.both: p.stdin.write('\n'); p.stdin.flush()
        said = [[float(x) for x in p.stdout.readline().split()] for p in self.both]
        return sum(s for s,_ in said), sum(u for _,u in said)/2

    def end(self):
        for p in self.both: p.stdin.close()
        for p in self.both: p.wait(60)

def bench():
    pairs = [Pair('spread'), Pair('alone')]
    try:
        for p in pairs: p.step()                                                        # warms up
        both = [tuple(p.step() for p in pairs) for _ in range(ROUNDS)]                  # in turn, so that a busy machine slows both
    finally:
        for p in pairs: p.end()
    ours,peer = (median(speed) for speed in zip(*((a[0], b[0]) for a,b in both)))
    ratios,work = sorted(a[0]/b[0] for a,b in both),median(a[1]/b[1] for a,b in both)
    return [dict(name='two processes, experts spread', ours=ours, peer=peer, ratio=median(ratios), target=0.8,
                 conditions=f'debug with a vocabulary of 8,192, one thread each, {TOKENS} tokens a process and step, gloo; peer: two runs of one '
                 f'process side by side; tokens a second, median of {ROUNDS} steps in turn, {ratios[0]:.2f} to {ratios[-1]:.2f}, with {work:.2f} times the '
                 f'work of a core for a token; load of the machine {os.getloadavg()[0]:.1f}')]

if __name__=='__main__': print(json.dumps(bench(), indent=1))
