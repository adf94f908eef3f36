"Checkpoints under attack: kills at random moments and before every change to the disk, full disks, flipped bits, snapshots that go stale."
import copy, errno, os, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from chroma_moe import checkpoints
from chroma_moe.checkpoints import Checkpoints, verify_checkpoint
from chroma_moe.config import ChromaError

ROOT = Path(__file__).parents[1]
ENV = os.environ|dict(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT/'tests'))), OMP_NUM_THREADS='1')
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def make_state(step, attempt=0, size=1000):
    "What the checkpoint of a step must hold: all kinds of tensors and plain values."
    g = torch.Generator().manual_seed(step*10+attempt)
    weight = torch.randn(size, 8, generator=g)
    return dict(model=dict(weight=weight, tied=weight, turned=weight[:5].T, half=weight[:3].bfloat16()),
                optimizer=dict(state={0: dict(step=torch.tensor(float(step)), exp_avg=torch.randn(size, 8, generator=g, dtype=torch.float64))},
                               param_groups=[dict(lr=1/(step+1), betas=(.9,.95), foreach=None, params=[0])]),
                rng=[g.get_state(), torch.tensor([True,False]), torch.zeros(0, 4, dtype=torch.int64)],
                step=step, attempt=attempt, position=dict(epoch=0, rows=[1,2,3], name='é\ud800'))

def same(a, b):
    "Equal in structure, types and every bit?"
    if isinstance(a, torch.Tensor): return a.dtype==b.dtype and a.shape==b.shape and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a,b)))
    if type(a) is not type(b) or isinstance(a, (dict,list,tuple)) and len(a)!=len(b): return False
    if isinstance(a, dict): return list(a)==list(b) and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, (list,tuple)) else repr(a)==repr(b)

def names(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []
def check_newest(folder, size=1000, **kw):
    "Open a folder, and see that everything in it verifies and the newest holds what it must; return step and attempt."
    ck = Checkpoints(folder, **kw)
    assert all(verify_checkpoint(p)==[] for p in ck.paths()) and all(n.startswith('step-') for n in names(folder)), names(folder)
    newest = ck.newest()
    if newest is None: return -1,-1
    state = ck.load(newest)
    assert same(state, make_state(state['step'], state['attempt'], size)) and newest.name==f"step-{state['step']:08d}"
    return state['step'],state['attempt']

# Kills

SAVES = '''
import sys
from test_checkpoints import *
torch.set_num_threads(1)
ck,step = Checkpoints(sys.argv[1], keep=2, background=sys.argv[2]=='1'),int(sys.argv[3])
while True:
    for attempt in (0,1):                  # each step twice: the second takes the place of the first
        ck.save(step, make_state(step, attempt, 50_000), score=(step*7)%5)
        if sys.argv[2]=='0': print(step, attempt, flush=True)
    step += 1
'''
def kills(folder, times):
    "SIGKILL a process that does nothing but save, `times` times; no checkpoint that it reported may be lost."
    rng,middle,saved = random.Random(0),0,0
    step,attempt = -1,-1
    for k in range(times):
        background = k%3==2
        p = subprocess.Popen([sys.executable, '-c', SAVES, folder, str(int(background)), str(step+1)], stdout=subprocess.PIPE, text=True, env=ENV)
        reached,deadline = (lambda: len(names(folder))>1) if background else (lambda: p.stdout.readline()),time.monotonic()+60
        while not reached() and p.poll() is None and time.monotonic()<deadline: time.sleep(.01)
        time.sleep(rng.uniform(0, .4))
        p.send_signal(signal.SIGKILL); rest = p.stdout.read().split('\n'); p.wait(); p.stdout.close()
        assert p.returncode==-signal.SIGKILL
        middle += any(n.startswith('.') for n in names(folder))
        last = max((step,attempt), *(tuple(map(int, line.split())) for line in rest[:-1]), (-1,-1))
        step,attempt = check_newest(folder, 50_000, keep=2)
        assert (step,attempt)>=last, (step,attempt,last)
        saved = step
    print(f'{times} kills, {middle} of them in the middle of a save; {saved+1} steps saved twice each, none lost, every visible checkpoint sound')

def test_kills(tmp_path): kills(tmp_path/'run', 3)

@pytest.mark.long
def test_many_kills(tmp_path): kills(tmp_path/'run', 20)

DYING = ('open','os.mkdir','os.rename','os.remove','os.rmdir')
def die_at(n, work):
    "Do `work` in a child process that ends, without a word, before its n-th change to the disk; did it come to its own end?"
    pid = os.fork()
    if pid: code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]); assert code in (0,9); return code==0
    count = 0
    def audit(event, args):
        nonlocal count
        if event in DYING and (event!='open' or args[2]&os.O_WRONLY or args[1]=='wb'): count += 1
        if count==n: os._exit(9)
    try: sys.addaudithook(audit); work()
    except BaseException: os._exit(1)
    os._exit(0)

@pytest.mark.parametrize('again', [False, True], ids=['next step','same step'])
def test_death_before_every_change(tmp_path, again):
    "keep=1, so that each save also removes one; then the process dies before its 1st, 2nd, ... change to the disk."
    folder,n,found,done = tmp_path/'run',0,[],False
    def work(): Checkpoints(folder, keep=1).save(1 if again else 2, make_state(1, 1) if again else make_state(2))
    while not done:
        n += 1; shutil.rmtree(folder, ignore_errors=True)
        Checkpoints(folder, keep=1).save(1, make_state(1))
        done = die_at(n, work)
        found.append(check_newest(folder, keep=1))
        assert found[-1] in [(1,0), (1,1) if again else (2,0)] and len(names(folder))<=2
    old = found.count((1,0))
    assert n>12 and found==[(1,0)]*old+[found[-1]]*(n-old) and 0<old<n-1
    print(f'{n-1} places to die: the old checkpoint after the first {old}, the new after the others')

# Disks

def failing(monkeypatch, name, at):
    "Let the `at`-th call of `os.name` fail for want of room."
    calls,real = [],getattr(os, name)
    def call(*a, **kw):
        calls.append(a)
        if len(calls)==at: raise copy.copy(NO_ROOM)
        return real(*a, **kw)
    monkeypatch.setattr(checkpoints.os, name, call)
    return calls

@pytest.mark.parametrize('background', [False, True], ids=['','background'])
@pytest.mark.parametrize('name', ['fsync','rename'])
def test_disk_full(tmp_path, monkeypatch, name, background):
    failed = 0
    for at in range(1, 20):
        folder = tmp_path/str(at); ck = Checkpoints(folder, keep=1, background=background)
        ck.save(1, make_state(1)); ck.wait()
        with monkeypatch.context() as m:
            calls = failing(m, name, at)
            try: ck.save(1, make_state(1, 1)); ck.wait()
            except ChromaError as e: message = str(e)
            else: break
        failed += 1
        assert message.startswith(f"'{folder}/step-00000001' cannot be saved (No space left on device): make room there"), message
        assert len(calls)>=at and check_newest(folder) in [(1,0), (1,1)] and names(folder)==['step-00000001']
        if name=='fsync' and at<=6: assert check_newest(folder)==(1,0)        # five files and their folder
        ck.save(2, make_state(2)); ck.wait()                                  # there is room again
        assert check_newest(folder)==(2,0) and names(folder)==['step-00000002']
    assert failed==(7 if name=='fsync' else 2)
    print(f'{failed} calls of {name} that may fail:', message.replace(str(folder), '...'))

def test_file_too_large(tmp_path):
    "The system refuses to let a file grow, in the middle of a tensor."
    ck = Checkpoints(tmp_path/'run'); ck.save(1, make_state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(ChromaError, match=r'cannot be saved \(File too large\)') as e: ck.save(2, make_state(2, size=10_000))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert check_newest(tmp_path/'run')==(1,0) and names(tmp_path/'run')==['step-00000001']
    print(str(e.value).replace(str(tmp_path), '...'))

def test_real_small_disk(tmp_path):
    disk = tmp_path/'disk'; disk.mkdir()
    mount = subprocess.run(['mount','-t','tmpfs','-o','size=1m','tmpfs',disk], capture_output=True)
    if mount.returncode: pytest.skip('mounting a small disk is not allowed here')
    try:
        ck = Checkpoints(disk/'run', keep=1); ck.save(1, make_state(1))
        with pytest.raises(ChromaError, match='No space left on device'): ck.save(2, make_state(2, size=20_000))
        assert check_newest(disk/'run')==(1,0) and names(disk/'run')==['step-00000001']
        ck.save(2, make_state(2)); assert check_newest(disk/'run')==(2,0)
    finally: subprocess.run(['umount','-l',disk], check=True)
    print('a disk of 1 MB is full: the last checkpoint is whole, and a smaller one fits afterwards')

def test_interrupt(tmp_path, monkeypatch):
    "Ctrl-C while the old checkpoint of the same step is out of sight: it comes back."
    ck = Checkpoints(tmp_path/'run'); ck.save(1, make_state(1)); real = os.rename
    def rename(a, b):
        if Path(b).name=='step-00000001' and not a.name.endswith('.gone'): raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr(checkpoints.os, 'rename', rename)
    with pytest.raises(KeyboardInterrupt): ck.save(1, make_state(1, 1))
    assert names(tmp_path/'run')==['step-00000001'] and check_newest(tmp_path/'run')==(1,0)
    print('the old checkpoint stands where it stood')

# Damage

def test_any_bit_is_found(tmp_path, capsys):
    "One bit of every byte of the small files, and 300 of each large one."
    ck,rng = Checkpoints(tmp_path/'run'),random.Random(0)
    for step in (1,2): ck.save(step, make_state(step, size=40))
    newest,tried = ck.newest(),0
    for f in sorted(newest.iterdir()):
        data = f.read_bytes()
        for at in range(len(data)) if len(data)<4000 else rng.sample(range(len(data)), 300):
            changed = bytearray(data); changed[at] ^= 1<<rng.randrange(8); f.write_bytes(changed); tried += 1
            faults = verify_checkpoint(newest); assert len(faults)==1 and str(f) in faults[0], (f.name, at, faults)
        assert Checkpoints(tmp_path/'run').newest().name=='step-00000001'
        said = capsys.readouterr().err; assert said.count('\n')==1 and str(f) in said and 'going back to' in said, said
        with pytest.raises(ChromaError, match=f.name): Checkpoints(tmp_path/'run').load(newest)
        f.write_bytes(data)
    assert verify_checkpoint(newest)==[]
    print(f'{tried} flipped bits in {len(names(newest))} files: each found by name')

@pytest.mark.parametrize('how', [Path.unlink, lambda f: os.truncate(f, f.stat().st_size-1), lambda f: os.truncate(f, 0),
                                 lambda f: f.write_bytes(f.read_bytes()+b' '), lambda f: (f.unlink(), f.mkdir())],
                         ids=['missing','one byte short','empty','one byte long','a folder'])
def test_other_damage(tmp_path, how):
    ck = Checkpoints(tmp_path/'run'); ck.save(1, make_state(1))
    path,said = ck.newest(),[]
    for name in names(path):
        copied = tmp_path/'copy'; shutil.copytree(path, copied); how(copied/name)
        faults = verify_checkpoint(copied); said += faults; shutil.rmtree(copied)
        assert len(faults)==1 and name in faults[0], faults
    print(said[-1].replace(str(tmp_path), '...'))

# Which stay, and what is refused

def test_keep_and_best(tmp_path):
    rng,written = random.Random(0),{}
    ck = Checkpoints(tmp_path/'run', keep=3)
    for step in range(40):
        score = rng.choice([None, float('nan'), float('inf'), rng.random(), rng.random()])
        ck.save(step, dict(x=torch.tensor(step)), score)
        if score is not None and score<9: written[step] = score
        best = min(written, key=written.get) if written else None
        expected = sorted({*range(max(0, step-2), step+1), *([best] if written else [])})
        assert names(tmp_path/'run')==[f'step-{s:08d}' for s in expected]
        assert ck.best()==(tmp_path/f'run/step-{best:08d}' if written else None)
    shutil.rmtree(ck.best()); written = {s: v for s,v in written.items() if s in expected and s!=best}
    assert ck.best()==(tmp_path/f'run/step-{min(written, key=written.get):08d}' if written else None)
    print(f'40 saves: always the newest 3 and the best, at the end {expected}')

def test_going_back(tmp_path, capsys):
    "A run that goes back behind a damaged checkpoint is not led astray by it, not even with keep=1."
    ck = Checkpoints(tmp_path/'run', keep=1)
    for step in (500,1000): ck.keep = 2; ck.save(step, make_state(step))
    os.truncate(tmp_path/'run/step-00001000/model.safetensors', 50)
    ck = Checkpoints(tmp_path/'run', keep=1); assert ck.newest().name=='step-00000500'
    ck.save(600, make_state(600)); assert check_newest(tmp_path/'run')==(600,0) and names(tmp_path/'run')==['step-00000600']
    (tmp_path/'run/step-00000600/manifest.json').write_text('{"format": 2}')
    ck.save(700, make_state(700)); assert names(tmp_path/'run')==['step-00000600','step-00000700']
    assert Checkpoints(tmp_path/'run').newest().name=='step-00000700' and 'format 2' in capsys.readouterr().err
    print('600 after a damaged 1000 is the newest; a checkpoint of a later version is left alone')

def test_snapshot(tmp_path):
    "What is written in the background is the state at the call, whatever happens to it afterwards."
    state,ck = make_state(1, size=50_000),Checkpoints(tmp_path/'run', background=True)
    ck.save(1, state)
    for t in (state['model']['weight'], state['optimizer']['state'][0]['exp_avg'], state['rng'][0]): t.zero_()
    state['optimizer']['param_groups'][0]['lr'] = 0; state['rng'].clear(); state['position']['rows'].append(4)
    pending = ck.pending
    ck.save(2, make_state(2)); assert pending.done()                      # the second waits for the first
    ck.wait()
    first = ck.load(tmp_path/'run/step-00000001')
    assert same(first, make_state(1, size=50_000)) and first['model']['weight'] is first['model']['tied'] and check_newest(tmp_path/'run')==(2,0)
    print('both saved as they were; tied tensors are tied again')

def test_error_in_the_background_surfaces_at_the_next_save(tmp_path, monkeypatch):
    ck = Checkpoints(tmp_path/'run', background=True); ck.save(1, make_state(1)); ck.wait()
    failing(monkeypatch, 'fsync', 2)
    ck.save(2, make_state(2))
    with pytest.raises(ChromaError, match='step-00000002.*No space left'): ck.save(3, make_state(3))
    ck.save(3, make_state(3)); ck.wait()
    assert names(tmp_path/'run')==['step-00000001','step-00000003']
    print('said once, at the next save; then saving goes on')

def test_last_save_is_finished_at_exit(tmp_path):
    code = "import sys; from test_checkpoints import *; Checkpoints(sys.argv[1], background=True).save(1, make_state(1, size=50_000))"
    subprocess.run([sys.executable, '-c', code, tmp_path/'run'], env=ENV, check=True)
    assert check_newest(tmp_path/'run', 50_000)==(1,0)
    print('a process that ends right after a save in the background has written it')

@pytest.mark.parametrize('state,says', [([1], 'state is [1]: it must be a dictionary'), ({'a/b': 1}, 'a/b'), ({'..': 1}, 'can be file names'),
    (dict(a={1: {(1,2): 3}}), "dict with odd keys at '1'"),
    (dict(a=[object()]), "object at '0'"), (dict(a=torch.ones(1, dtype=torch.complex64)), "complex64 at 'a'"),
    (dict(a=dict(b=len)), "builtin_function_or_method at 'b'")])
def test_refusals(tmp_path, state, says):
    with pytest.raises(ChromaError) as e: Checkpoints(tmp_path/'run').save(1, state)
    assert says in str(e.value) and not (tmp_path/'run').exists()
    print(e.value)

def test_odd_names(tmp_path):
    "Names that could be taken for one another, or for our own notes."
    state = dict(a={'b.c': torch.ones(1), 'b': {'c': torch.zeros(2)}, '__metadata__': torch.ones(3), '': torch.ones(4), '$tensor': 'x', '$items': [1]},
                 b={None: 1, True: 2, 1.5: (torch.ones(5), ({},)), 7: {}}, c=torch.tensor(1, dtype=torch.int8), d=None, e=[[], (), float('nan'), -0., 2**200])
    ck = Checkpoints(tmp_path/'run'); ck.save(0, state)
    assert same(ck.load(ck.newest()), state) and 'd.safetensors' not in names(ck.newest())
    print('a tree of odd names, keys and numbers, there and back')
