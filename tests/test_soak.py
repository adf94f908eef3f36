"The soak: its arithmetic, the figures that are committed, and with --long a short run of it."
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
import soak  # noqa: E402

FIGURES = ROOT/'benchmarks/soak.json'

def test_a_slope_is_found():
    "36 MB an hour under noise that is larger; none where there is none; what happens in the first third does not count."
    t,rng = np.arange(0, 1200, 3.),np.random.default_rng(0)
    noise = rng.normal(0, 2, len(t)); start = 300*np.exp(-t/60)
    hits = {rise: [] for rise in (0,36)}
    for rise,inside in hits.items():
        for _ in range(200):
            found,half = soak.slope(t, rng.normal(0, 2, len(t))+rise*t/3600); inside.append(abs(found-rise)<half)
    assert all(.88<np.mean(h)<=1 for h in hits.values()), {k: np.mean(h) for k,h in hits.items()}       # of a 95% interval
    found,half = soak.slope(t, 300+start+36*t/3600+noise); assert 20<found<45 and half<15
    assert soak.slope(t[:20], noise[:20])==(None, None)
    print(f'{found:.0f} ± {half:.0f} MB an hour where it is 36; intervals hold in {np.mean(hits[0]):.0%} and {np.mean(hits[36]):.0%}')

def test_figures():
    "The committed figures are without a fault, and show nothing that grows; those from before memory was given back show what did."
    f = json.loads(FIGURES.read_text()); before = f.pop('before')
    assert {*f}>={'serving','encoding','pretraining'}
    assert min(f[k]['minutes'] for k in ('serving','encoding'))>19 and f['pretraining']['minutes']>9
    assert f['serving']['failed']==f['serving']['exit']==0 and not f['serving']['faults'] and f['pretraining']['evaluations']>2
    assert f['serving']['at_rest']['files'][0]==f['serving']['at_rest']['files'][1], 'a server at rest has the files open that it had before'
    for name,x in f.items():
        assert abs(x['mb_an_hour'])<=max(2*x['interval'], .1*x['mb_most']), f'{name}: {x["mb_an_hour"]} ± {x["interval"]} MB an hour'
        for k in ('files','threads'): assert x[k]['last']<=x[k]['middle']+3, (name, k, x[k])
    assert all(x['mb_an_hour']-x['interval']>400 for x in before.values())
    print('; '.join(f"{k} {x['mb_an_hour']:+.0f} ± {x['interval']:.0f} MB an hour" for k,x in f.items()))

@pytest.mark.long
def test_short_form(tmp_path):
    "Everything runs, for ten seconds each."
    r = subprocess.run([sys.executable, ROOT/'benchmarks/soak.py', '--seconds', '10', '--out', tmp_path/'soak.json'],
                       capture_output=True, text=True, timeout=600)
    assert r.returncode==0, r.stderr
    f = json.loads((tmp_path/'soak.json').read_text())
    assert f['serving']['served']>50 and f['serving']['refused']>20 and f['serving']['failed']==0 and f['pretraining']['steps']>10 and f['tuning']['steps']>5
    print(f"{f['serving']['served']} requests served, {f['serving']['refused']} refused, {f['pretraining']['steps']} and {f['tuning']['steps']} steps")
