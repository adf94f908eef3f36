"Which trial is which, and the figures of all that were made."
import random, subprocess, tempfile
from collections import Counter

from .cases import CASES

def mountable():
    "May this process mount a small disk? Else there is no full and no read-only one."
    with tempfile.TemporaryDirectory() as d:
        if subprocess.run(['mount','-t','tmpfs','-o','size=4k','tmpfs',d], capture_output=True).returncode: return False
        subprocess.run(['umount', d], check=True); return True

FAULTS = { # how often each is drawn, and what it is
    'kill': (4, 'killed (SIGKILL)'), 'term': (2, 'asked to end (SIGTERM)'), 'disk': (1.5, 'disk full'), 'fsize': (1, 'no file may grow further'),
    'readonly': (.7, 'disk read-only'), 'blocked': (.3, 'a file in the way'), 'memory': (1, 'out of memory'), 'clock': (.7, 'clock jumps'),
    'times': (.5, 'files of another time'), 'twice': (1.2, 'two at once'), 'rank': (3, 'one rank killed'), 'launch': (.6, 'one rank killed, accelerate launch'),
    'cut': (4, 'connections cut'), 'wandb': (.5, 'W&B out of reach'), 'hub': (.2, 'hub out of reach')}

def applies(fault, name, mounts=True, clock=True):
    "Can this be done to that here?"
    ranks = CASES[name].ranks
    if fault in ('rank','launch'): return ranks>1 and (fault=='rank' or name!='encode, two ranks')
    if fault in ('cut','wandb','hub'): return name in dict(cut=['synthesise'], wandb=['pretrain'], hub=['encode','data'])[fault]
    if name=='demo' and fault not in ('kill','term','disk'): return False            # it is long
    if fault in ('disk','readonly') and not mounts or fault=='clock' and not clock: return False
    return ranks==1 or fault in ('kill','term')

def draw(seed, trial, pairs):
    "The trial with this number: case, fault, how it is started, and its random numbers."
    rng = random.Random(f'{seed} {trial}')
    name,fault = rng.choices(pairs, [CASES[c].weight*FAULTS[f][0] for c,f in pairs])[0]
    return name,fault,'shell' if fault in ('kill','term') and rng.random()<.08 else 'fork',rng

def summary(records):
    "Figures by case and fault: injections that met their command, clean continuations, equal ends, faults found."
    hit,by = [r for r in records if r['hit']],{}
    for r in hit:
        n = by.setdefault(r['case'], {}).setdefault(r['fault'], [0]*4)
        for k,x in enumerate((True, r['clean'], r['equal'], bool(r['found']))): n[k] += x
    order = lambda d,keys: {k: d[k] for k in keys if k in d}
    return dict(injections=len(hit), late=len(records)-len(hit), trials=len({(r['seed'],r['trial']) for r in records}), how=Counter(r['how'] for r in hit),
                faults={f: what for f,(_,what) in FAULTS.items()}, cases={c: order(f, FAULTS) for c,f in order(by, CASES).items()})

def table(s):
    "A summary as lines of text."
    row = lambda name,n: f'{name:38}' + ''.join(f'{x:12,}' for x in n)
    total = lambda rows: [sum(x) for x in zip(*rows)]
    out = [f"{'':38}" + ''.join(f'{x:>12}' for x in ('injections','went on','equal','faults'))]
    out += [row(c, total(f.values())) for c,f in s['cases'].items()] + ['']
    out += [row(what, total(rows)) for f,what in s['faults'].items() if (rows := [n[f] for n in s['cases'].values() if f in n])]
    return '\n'.join([*out, '', f"{s['injections']:,} injections in {s['trials']:,} trials; {s['late']:,} more came after the end of their command"])
