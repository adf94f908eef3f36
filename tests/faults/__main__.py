"Disturb the commands at random, and see whether they go on; run it again with the same --out, and it goes on too, and adds up."
import argparse, json, subprocess, sys, time
from pathlib import Path

from .cases import CASES
from .process import with_clock
from .schedule import FAULTS, applies, draw, mountable, summary, table

def parser():
    p = argparse.ArgumentParser('python -m tests.faults', description=__doc__)
    p.add_argument('--out', type=Path, default=Path('runs/faults'), help='folder for results.jsonl, the inputs and the undisturbed runs')
    p.add_argument('--minutes', type=float, default=20., help='begin no trial after so many minutes, undisturbed runs not counted')
    p.add_argument('--trials', type=int, default=10**9, help='at most so many')
    p.add_argument('--seed', type=int, default=0, help='of the schedule')
    p.add_argument('--only', action='append', metavar='CASE', help='only this case, or CASE:FAULT, or :FAULT of every case (may be repeated)')
    p.add_argument('--summary', type=Path, help='file for the figures, as JSON')
    return p

def pairs_of(only, clock):
    "Cases and faults that can be had here."
    asked = [(c, f) for o in only or CASES for name,_,f in [o.partition(':')] for c in ([name] if name else CASES)]
    mounts = mountable()
    pairs = [(c,f) for c,g in asked for f in FAULTS if g in ('',f) and applies(f, c, mounts, clock)]
    if not mounts: print('not here: full and read-only disks, because mount is not allowed')
    if not clock: print('not here: a clock that moves, because there is no C compiler')
    return pairs

def main():
    a = parser().parse_args(); out = a.out.resolve(); out.mkdir(parents=True, exist_ok=True)
    path,records = out/'results.jsonl',[]
    if path.exists(): records = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = pairs_of(a.only, with_clock(out))                                 # which may start this program again
    from .harness import Ground, Trial                                        # the imports that take time
    ground = Ground(out/'inputs', dict.fromkeys(c for c,_ in pairs))
    print(f'{len(ground.ends)} undisturbed runs: '+', '.join(f'{c} {e.seconds:.1f} s' for c,e in ground.ends.items()), flush=True)
    began = time.monotonic(); subprocess.run([sys.executable, '-c', 'import chroma_moe.tune'], check=True); lead = time.monotonic()-began
    first,began = 1+max((r['trial'] for r in records if r['seed']==a.seed), default=-1),time.monotonic()
    for trial in range(first, first+a.trials):
        if time.monotonic()-began>60*a.minutes: break
        name,fault,how,rng = draw(a.seed, trial, pairs)
        start = time.monotonic(); new = Trial(ground, name, fault, rng, how, lead if how=='shell' or fault=='launch' else 0).run()
        new = [r|dict(seed=a.seed, trial=trial, seconds=round((time.monotonic()-start)/len(new), 2)) for r in new]
        with open(path, 'a') as f: f.writelines(json.dumps(r)+'\n' for r in new)
        for r in new:
            if r['found']: print(f"trial {trial}, {name}, {r['fault']} at {r['moment']}: {'; '.join(r['found'])}", flush=True)
        records += new
    ground.writer.close()
    s = summary(records); print(table(s))
    if a.summary: a.summary.write_text(json.dumps(s, indent=1)+'\n')
    sys.exit(any(r['found'] for r in records))

if __name__=='__main__': main()
