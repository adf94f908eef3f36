"A short campaign: a fixed schedule of faults against the commands that are quickest to run. `make faults` runs the long one."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest

from .states import check, content, differences

ROOT = Path(__file__).parents[2]
QUICK = 'tokenizer','data','data, overwrite','crop','mine','synthesise','average','encode'

def campaign(out, *args):
    "Run one; its figures, and what it printed. It fails where a fault was found."
    r = subprocess.run([sys.executable, '-m', 'tests.faults', '--out', str(out), '--summary', str(out/'summary.json'), *map(str, args)], cwd=ROOT,
                       capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    assert r.returncode==0, r.stdout+r.stderr
    return json.loads((out/'summary.json').read_text()), r.stdout

def test_short_campaign(tmp_path):
    "All kinds of fault that one process can meet, on commands that take a second."
    s,_ = campaign(tmp_path, *(w for c in QUICK for w in ('--only', c)), '--seed', 1495, '--trials', 15)
    kinds = {f for of in s['cases'].values() for f in of}
    assert s['injections']>8 and len(kinds)>6
    print(f"{s['injections']} injections of {len(kinds)} kinds on {len(s['cases'])} commands, and every end is that of an undisturbed run")

@pytest.mark.long
def test_long_campaign(tmp_path):
    "Everything, training on several processes and the demo among it."
    s,said = campaign(tmp_path, '--minutes', 30, '--seed', 8)
    print(said.strip().splitlines()[-1])

# A harness that finds nothing may be blind: what it must see, shown to it

DAMAGE = {'half a file': ('a.json is not whole', lambda w: (w/'a.json').write_bytes(b'{"x": [1, 2')),
          'half a line': ('rows.jsonl is not whole', lambda w: (w/'rows.jsonl').write_bytes(b'{"x": 1}\n{"x"')),
          'a cut array': ('v.npy is not what', lambda w: os.truncate(w/'v.npy', 100)),
          'a file of another': ('notes.txt is not what', lambda w: (w/'notes.txt').write_text('ours')),
          'a lost file': ('notes.txt is gone', lambda w: (w/'notes.txt').unlink())}
AFTER = {'another number': ('v.npy differs', lambda w: np.save(w/'v.npy', np.ones(30))),
         'another figure': ('metrics.jsonl differs', lambda w: (w/'metrics.jsonl').write_text('{"loss": 3, "seconds": 9}\n')),
         'one too many': ('b.json should not be there', lambda w: (w/'b.json').write_text('1')),
         'one too few': ('v.npy is missing', lambda w: (w/'v.npy').unlink()),
         'a scrap': ('.a.json.new is left behind', lambda w: (w/'.a.json.new').write_text('x'))}

def whole(w):
    "A small output; what a second run of it may have otherwise is not exact."
    w.mkdir(); (w/'notes.txt').write_text('not ours'); (w/'a.json').write_text('{"x": 1}'); (w/'rows.jsonl').write_text('{"x": 1}\n')
    np.save(w/'v.npy', np.zeros(30)); (w/'metrics.jsonl').write_text('{"loss": 2, "seconds": 1}\n')
    return content(w)

@pytest.mark.parametrize('what', [*DAMAGE, *AFTER])
def test_it_sees(tmp_path, what):
    w = tmp_path/'w'; end = whole(w); exact,before = {*end}-{'metrics.jsonl','a.json','rows.jsonl'},{'notes.txt': b'not ours'}
    look = lambda: check(w, end, before, exact) if what in DAMAGE else differences(w, end, exact)
    (w/'metrics.jsonl').write_text('{"loss": 2, "seconds": 7}\n'); assert look()==[]                       # another time is no difference
    says,harm = (DAMAGE|AFTER)[what]; harm(w)
    assert len(found := look())==1 and found[0].startswith(says), found
