"Every kind of file that is read, damaged some hundred times: a clear error or a right answer, and nothing else. `make fuzz` does it by the thousand."
import logging, os, subprocess, sys
from pathlib import Path

import pytest, torch
from fuzz import TARGETS, Fuzz, where

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def quiet():
    "Libraries log what they cannot read, and pytest-xdist cannot send half a character."
    logging.disable(logging.CRITICAL); yield; logging.disable(logging.NOTSET)

@pytest.mark.parametrize('name', TARGETS)
def test_fuzz(name, request):
    f = Fuzz(name, seed=1)
    try: c = f.run(2000 if request.config.getoption('--long') else f.t.cases)
    finally: f.close()
    bad = [f'case {i}, {file}: {type(e).__name__} at {where(e)}: {str(e)[:200]!r}' for i,file,e in f.faults]
    assert not bad, f'{len(bad)} faults; python tests/fuzz.py --target "{name}" --seed 1 --case {f.faults[0][0]} shows one\n' + '\n'.join(bad[:5])
    assert c['cases']-c['untouched']>f.t.cases*.8 and c['refused']+c['same']+c['other']>0
    print(f"{c['cases']} damaged files: {c['refused']} clear errors, {c['same']+c['other']} answers")

def test_faults_are_found():
    "The harness itself: an exception of another class, an endless loop, endless memory and a wrong answer each count as a fault."
    from fuzz import Target
    def make(folder): (folder/'x.json').write_text('{"a": 1}')
    def slow(folder):
        while (folder/'x.json').read_bytes()!=b'{"a": 1}': pass
    def large(folder): return len(bytearray(1 if (folder/'x.json').read_bytes()==b'{"a": 1}' else 1<<36))
    reads = dict(other=(lambda f: __import__('json').loads((f/'x.json').read_text()), {}), slow=(slow, {}), large=(large, {}),
                 wrong=(lambda f: (f/'x.json').read_bytes(), dict(sealed=('*',))))
    for kind,(read,more) in reads.items():
        TARGETS['harness'] = Target(make, read, **more)
        try: f = Fuzz('harness'); f.run(1 if kind=='slow' else 8, seconds_a_case=1); f.close()
        finally: del TARGETS['harness']
        assert f.faults, kind

@pytest.mark.long
def test_command():
    "The command as it is typed: figures, and 0 where there is no fault."
    p = subprocess.run([sys.executable, Path(__file__).with_name('fuzz.py'), '--target', 'requests,checkpoint', '--cases', '200'], capture_output=True,
                       text=True, env=os.environ|dict(PYTHONPATH=str(Path(__file__).parents[1])))
    assert p.returncode==0 and 'requests' in p.stdout and '0 faults' in p.stdout, p.stdout+p.stderr
