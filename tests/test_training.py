"Phase 1 and 2 under attack, as whole commands: several processes, kills, signals, full disks, damage, NaN; the end must be that of an undisturbed run."
import json, os, random, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chroma_moe.checkpoints import verify_checkpoint
from chroma_moe.store import build_store
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
ENV = os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
STEPS = 16
SETS = dict(model=dict(vocab_size=1024, dim=64, layers=1, dropout=.1, moe=dict(noise=.1)), tokenizer=dict(path='tokenizer'), data=dict(size=250, max_length=64),
            pretrain=dict(steps=STEPS, batch_tokens=500), tune=dict(steps=STEPS, batch_pairs=8),
            train=dict(save_every=3, log_every=2, eval_every=5, eval_size=20))   # so that saving, logging and evaluating are seldom due together
# No chance, and an epsilon that keeps AdamW from blowing up the last digits of gradients that are nearly zero: the number of processes must not matter.
EXACT = 'model.dropout=0','model.moe.noise=0','optim.eps=1e-5'

# The command's own `main` in a child of a process that has done the imports, without the picture at the end: what `python -m` does, in a fifth of the time.
# Some tests below start it for real.
NURSERY = '''
import json, os, sys
import accelerate
from chroma_moe.pretrain import chroma_pretrain
from chroma_moe.tune import chroma_tune
from chroma_moe.monitor import Monitor
Monitor.save = lambda *args, **kwargs: None
for line in sys.stdin:
    what,*rest = json.loads(line)
    if what=='poll':
        done,status = os.waitpid(rest[0], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
        continue
    pid = os.fork()
    if not pid: break
    print(pid, flush=True)
else: sys.exit()
name,args,env,first,said = rest
os.environ.update(env)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for fd in (1,2): os.dup2(os.open(said, os.O_WRONLY|os.O_CREAT|os.O_APPEND), fd)
exec(first)
if name: globals()[name].main(args)
'''

class Child:
    "A run in a child process; with several ranks, their processes."
    def __init__(self, home, pids, said): self.home,self.pids,self.said_at,self.codes = home,pids,said,[None]*len(pids)
    def running(self):
        for i,pid in enumerate(self.pids):
            if self.codes[i] is None: self.codes[i] = self.home.ask('poll', pid)
        return None in self.codes
    def kill(self, number=signal.SIGKILL, ranks=None):
        for i,pid in enumerate(self.pids):
            if self.codes[i] is None and (ranks is None or i in ranks): os.kill(pid, number)
    def end(self, *codes):
        "Wait for the end; what was said. The exit codes must be these, or 0."
        until = time.monotonic()+300
        while self.running() and time.monotonic()<until: time.sleep(.02)
        if self.running(): self.kill()
        said = self.said_at.read_text()
        assert self.codes==list(codes or [0]*len(self.pids)), (self.codes, said)
        return said

class Home:
    "A folder with a tokenizer, and the process that runs start from."
    def __init__(self, folder):
        self.folder,self.n,self.ended = folder,0,{}
        ChromaTokenizer.train([r['text'] for r in World().texts('250')], 1024).save(folder/'tokenizer')
        (folder/'c.yaml').write_text(json.dumps(SETS))
        self.nursery = subprocess.Popen([sys.executable, '-c', NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=ENV)

    def ask(self, *words):
        self.nursery.stdin.write(json.dumps(words)+'\n'); self.nursery.stdin.flush()
        return json.loads(self.nursery.stdout.readline())

    def args(self, out, *sets, resume=False):
        return ['--profile','tiny','--config','c.yaml','--no_progress','--out',str(out), *(w for s in sets for w in ('--set', s)), *['--resume']*resume]

    def start(self, out, *sets, resume=False, ranks=1, first='', name='chroma_pretrain', before=()):
        "Start a run in its own processes."
        self.n += 1; said = self.folder/f'said{self.n}'; said.touch()
        env = [{}]
        if ranks>1:
            with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
            env = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
                   for r in range(ranks)]
        args = [*map(str, before), *self.args(out, *sets, resume=resume)]
        return Child(self, [self.ask('start', name, args, e, first, str(said)) for e in env], said)

    def shell(self, launcher, *args, **kw):
        "Start a launcher, or Python, for real, in a session of its own."
        return subprocess.Popen([sys.executable, '-m', *launcher, *map(str, args)], cwd=self.folder, env=ENV|kw, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)

    def whole(self, *sets, ranks=1):
        "The folder of the undisturbed run with these settings, made once."
        if (sets,ranks) not in self.ended:
            out = self.folder/f'whole{len(self.ended)}'
            self.start(out, *sets, ranks=ranks).end()
            self.ended[sets,ranks] = out
        return self.ended[sets,ranks]

    def stopped(self, out):
        "A copy of a run that SIGTERM stopped between two checkpoints."
        if 'stopped' not in self.ended:
            p = self.start(self.folder/'stopped'); wait_for(p, lambda: last_step(self.folder/'stopped')>=7); p.kill(signal.SIGTERM)
            self.ended['stopped'] = p.end(128+signal.SIGTERM)
        shutil.copytree(self.folder/'stopped', out)
        return self.ended['stopped']

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    h = Home(tmp_path_factory.mktemp('home'))
    yield h
    h.nursery.stdin.close(); h.nursery.wait(60)

def wait_for(p, happens, seconds=120):
    "Wait until something happens, or the run ends; did it happen?"
    until = time.monotonic()+seconds
    while time.monotonic()<until:
        if happens(): return True
        if not p.running(): return happens()
        time.sleep(.002)
    p.kill(); raise AssertionError(f'nothing happened in {seconds} s: {p.said_at.read_text()}')

def rows(out):
    "Rows of the log, without what a clock says."
    p = out/'metrics.jsonl'
    if not p.exists(): return []
    whole = p.read_bytes().rpartition(b'\n')[0]
    return [{k: v for k,v in json.loads(line).items() if k not in ('tokens_per_second','seconds','mfu')} for line in whole.splitlines()]
def last_step(out): return max((r['step'] for r in rows(out)), default=0)
def weights(out): return load_file(out/'model.safetensors')
def saved(out): return sorted(p.name for p in (out/'checkpoints').glob('step-*')) if out.exists() else []
def hidden(out): return [*(out/'checkpoints').glob('.step-*')]

def assert_same(out, expected, log=True):
    "The same model, bit for bit, and the same log."
    a,b = weights(out),weights(expected)
    assert list(a)==list(b) and not (off := [k for k in a if not torch.equal(a[k], b[k])]), off
    assert not log or rows(out)==rows(expected), [(x,y) for x,y in zip(rows(out), rows(expected)) if x!=y][:1]

def furthest(out, expected):
    "The largest difference between two models' weights, as a share of the largest weight of the tensor."
    a,b = weights(out),weights(expected); assert list(a)==list(b)
    return max(((a[k]-b[k]).abs().max()/b[k].abs().max().clamp(min=1e-9)).item() for k in a)

def sentence(said):
    "The one line that a refusal is."
    assert 'Traceback' not in said, said
    return said.strip().splitlines()[-1]

# Kills

def kills(home, out, *sets, times=1, ranks=1, seed=0, expected=None):
    "SIGKILL a run `times` times, every other time in the middle of a save, and let it go on; runs that reach their end are compared and begun anew."
    rng,killed,middle,expected = random.Random(seed),0,0,expected or home.whole(*sets, ranks=ranks)
    at = []
    while True:
        p = home.start(out, *sets, resume=out.exists(), ranks=ranks)
        if killed<times and (began := last_step(out))<STEPS:
            further,pause = rng.randint(1, 6),rng.uniform(0, .05)
            how = rng.choice(['save','step','soon'] if killed>3 else ['save','step'])
            if how=='save': old = saved(out); wait_for(p, lambda: hidden(out) and (saved(out)!=old or further<4))
            elif how=='step': wait_for(p, lambda: last_step(out)>=min(STEPS, began+further)); time.sleep(pause)
            else: time.sleep(20*pause)
            if p.running():
                p.kill(); p.end(*[-signal.SIGKILL]*ranks)
                killed += 1; middle += bool(hidden(out)); at.append(last_step(out))
                assert all(verify_checkpoint(c)==[] for c in (out/'checkpoints').glob('step-*'))
                if not (out/'config.yaml').exists(): continue                     # or else all was done
            else: p.end()
        else: p.end()
        assert_same(out, expected)
        if killed==times: break
        shutil.rmtree(out)
    return f'{killed} kills, {middle} in the middle of a save, after steps {at}: the same weights and log as never stopped'

def test_kills(home, tmp_path): print(kills(home, tmp_path/'run', times=3))
def test_kills_async(home, tmp_path):
    print(kills(home, tmp_path/'run', 'train.async_save=true', times=2, seed=1, expected=home.whole()))
def test_kills_two_processes(home, tmp_path): print(kills(home, tmp_path/'run', times=1, ranks=2, seed=2))

GROWN = 'pretrain.dense_start=0.5','model.moe.bias_rate=0.01','model.moe.balance=0'
def test_kills_dense_start_bias(home, tmp_path): print(kills(home, tmp_path/'run', *GROWN, times=2, seed=3))

@pytest.fixture(scope='module')
def from_store(home):
    build_store(World().texts('250'), ChromaTokenizer.load(home.folder/'tokenizer'), home.folder/'store', workers=1, chunk_chars=20_000)
    return 'data.store=store','optim.name=muon'
def test_kills_store_muon(home, from_store, tmp_path): print(kills(home, tmp_path/'run', *from_store, times=2, seed=4))

@pytest.mark.long
@pytest.mark.parametrize('sets,ranks', [((),1), (('train.async_save=true',),1), ((),2), (GROWN,1), ((*GROWN,'train.micro_tokens=150'),2)],
                         ids=['','async','two','dense start','two, dense start, rounds'])
def test_many_kills(home, tmp_path, sets, ranks): print(kills(home, tmp_path/'run', *sets, times=20, ranks=ranks, seed=5))
@pytest.mark.long
def test_many_kills_store(home, from_store, tmp_path): print(kills(home, tmp_path/'run', *from_store, times=20, seed=6))

def test_kill_at_the_end(home, tmp_path):
    "Death while the model itself is written: the weights are there, the rest is not."
    out = tmp_path/'run'; shutil.copytree(home.whole(), out)
    for name in ('config.yaml','config.json','encoder.json'): (out/name).unlink()
    home.start(out, resume=True).end()
    assert_same(out, home.whole()); assert (out/'config.yaml').exists()
    says = sentence(home.start(out, resume=True).end(1)); assert 'already holds a model' in says
    print('written again; after that:', says.replace(str(tmp_path), '...'))

def test_tune(home, tmp_path):
    "Phase 2, killed twice."
    first,out,whole = home.whole(),tmp_path/'tuned',tmp_path/'whole'
    start = lambda out, resume=False: home.start(out, 'data.size=100', name='chroma_tune', before=['--pretrained',first], resume=resume)
    start(whole).end()
    for step in (5,11):
        p = start(out, out.exists()); assert wait_for(p, lambda: last_step(out)>=step); p.kill(); p.end(-signal.SIGKILL)
    assert 'resumed at step' in start(out, True).end()
    assert_same(out, whole)
    print('phase 2 killed twice: the same weights and log')

def test_two_at_once(home, tmp_path):
    "The second of two is refused while the first stands still, and changes nothing; killed, the first keeps nobody out."
    out = tmp_path/'run'; p = home.start(out); assert wait_for(p, lambda: last_step(out)>=6); p.kill(signal.SIGSTOP)
    before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    says = [sentence(home.start(out, resume=resume).end(1)) for resume in (False, True)]
    assert all('another process is writing' in s for s in says) and {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}==before
    p.kill(); p.end(-signal.SIGKILL); home.start(out, resume=True).end(); assert_same(out, home.whole()); assert not (out/'.lock').exists()
    print(says[0].replace(str(tmp_path), '...'))

# Several processes

def text_of(p, code=0, seconds=300):
    "What a real command said; its exit code must be `code` (None: any but 0)."
    try: said,_ = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); raise
    assert p.returncode==code or code is None and p.returncode, (p.returncode, said)
    return said

TORCHRUN = 'torch.distributed.run','--standalone','--nproc_per_node','2','-m','chroma_moe.pretrain'
ACCELERATE = (*'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m'.split(),
              'chroma_moe.pretrain')

def test_check_processes(home, tmp_path):
    said = home.start(tmp_path, ranks=2, before=['--test-ddp']).end()
    assert re.search('process 1: .*\n', said) and '2 processes and one agree' in said and 'the set-up is sound' in said, said
    print(next(line for line in said.splitlines() if 'agree' in line))

def counts(home, *sets):
    "Masked tokens of each of two processes in the first step."
    from chroma_moe.config import load_config
    from chroma_moe.parallel import Ranks
    from chroma_moe.pretrain import MaskedParts, load_texts
    c = load_config(home.folder/'c.yaml', 'tiny', [*sets, f'tokenizer.path={home.folder}/tokenizer'])
    ids,_ = load_texts(c, ChromaTokenizer.load(c.tokenizer.path)); out = []
    for r in range(2):
        ranks = Ranks(); ranks.rank,ranks.n = r,2
        out.append([p.terms for p in next(MaskedParts(ids, c, ranks))])
    return out

@pytest.mark.parametrize('sets', [('pretrain.batch_tokens=300',), ('pretrain.batch_tokens=900','train.micro_tokens=120','model.moe.balance=0')],
                         ids=['balance','rounds'])
def test_two_processes_equal_one(home, tmp_path, sets):
    "Launched by torchrun, for real; without chance, so that only the order of sums differs."
    sets = (*EXACT, *sets, 'pretrain.steps=10')
    terms = counts(home, *sets); assert terms[0]!=terms[1] and (len(terms[0])>1)==('balance=0' in sets[-2])
    if 'balance=0' in sets[-2]: home.start(tmp_path/'two', *sets, ranks=2).end()
    else: text_of(home.shell(TORCHRUN, *home.args(tmp_path/'two', *sets)))
    one = home.whole(*[s for s in sets if 'micro' not in s])
    off = furthest(tmp_path/'two', one); assert off<1e-5, off
    a,b = rows(tmp_path/'two'),rows(one); assert len(a)==len(b) and all(abs(x['loss']-y['loss'])<3e-5 for x,y in zip(a, b) if 'loss' in x)
    print(f'masked tokens of the first step {terms[0]} and {terms[1]}: after 10 steps weights within {off:.0e} of one process')

@pytest.mark.long
def test_accelerate(home, tmp_path):
    text_of(home.shell(ACCELERATE, *home.args(tmp_path/'two', *EXACT)))
    off = furthest(tmp_path/'two', home.whole(*EXACT)); assert off<1e-5, off
    print(f'accelerate launch --multi_gpu on CPUs: weights within {off:.0e} of one process')

DEBUG = '''
from accelerate import debug_launcher, notebook_launcher
def train(args):
    from chroma_moe.pretrain import chroma_pretrain
    chroma_pretrain(**args)
'''
def test_launched_from_python(home, tmp_path):
    "As from a notebook: the same function, in processes that accelerate makes."
    args = dict(config='c.yaml', profile='tiny', set=list(EXACT), progress=False)
    for name,launch in (('debug','debug_launcher(train, ({},), num_processes=2)'), ('notebook','notebook_launcher(train, ({},), num_processes=1)')):
        call = launch.format(dict(args, out=str(tmp_path/name)))
        home.start('', name='', first=DEBUG+call).end()
    off = furthest(tmp_path/'debug', home.whole(*EXACT)); assert off<1e-5, off
    assert_same(tmp_path/'notebook', home.whole(*EXACT))
    print(f'debug_launcher with 2 processes within {off:.0e} of one; notebook_launcher the same bits')

@pytest.mark.parametrize('launcher,env,sets,says', [
    (('accelerate.commands.launch','--cpu','--num_processes','2','-m','chroma_moe.pretrain'), {}, (),
     'started one: use torchrun --standalone --nproc_per_node 2'),
    (None, dict(WORLD_SIZE='2'), (), 'WORLD_SIZE is 2, but RANK or MASTER_ADDR is missing'),
    (None, {}, ('train.precision=fp16',), 'train.precision is fp16, which a CPU would run as float32')], ids=['accelerate --cpu','WORLD_SIZE','fp16'])
def test_refused_launches(home, tmp_path, launcher, env, sets, says):
    if launcher: said = text_of(home.shell(launcher, *home.args(tmp_path/'x', *sets), **env), None)
    else: said = home.start(tmp_path/'x', *sets, first=f'os.environ.update({env})').end(1)
    line = next(s for s in said.splitlines() if s.startswith('chroma_pretrain: '))
    assert says in line and not (tmp_path/'x').exists(), said
    print(line)

def workers(launcher):
    "Pids of the processes that a launcher started."
    found = subprocess.run(['ps','-o','pid=','--ppid',str(launcher.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))

def wait_for_step(p, out, step, seconds=120):
    until = time.monotonic()+seconds
    while last_step(out)<step and p.poll() is None and time.monotonic()<until: time.sleep(.01)
    if last_step(out)<step: os.killpg(p.pid, signal.SIGKILL); raise AssertionError(p.communicate()[0])

def test_one_process_dies(home, tmp_path):
    "SIGKILL one of two; the launcher ends the other, says so, and the run goes on from its checkpoint."
    out = tmp_path/'run'
    p = home.shell(TORCHRUN, *home.args(out)); wait_for_step(p, out, 7)
    os.kill(workers(p)[1], signal.SIGKILL); said = text_of(p, None, 60)
    assert 'SIGKILL' in said or 'exitcode  : -9' in said, said
    home.start(out, resume=True, ranks=2).end()
    assert_same(out, home.whole(ranks=2))
    print(f'one of two killed: all had ended within a minute, exit code {p.returncode}, and the run went on to the same end')

# Signals

def test_sigterm(home, tmp_path):
    out = tmp_path/'run'; said = home.stopped(out); line = said.strip().splitlines()[-1]
    step = int(re.search(r'stopped by SIGTERM after step (\d+) of 16; a checkpoint is in .*, go on with --resume', line)[1])
    assert saved(out)[-1]==f'step-{step:08d}' and not (out/'model.safetensors').exists()
    assert f'resumed at step {step} of 16' in home.start(out, resume=True).end()
    assert_same(out, home.whole(), log=False)
    print(line.replace(str(home.folder), '...'))

@pytest.mark.parametrize('number', [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT], ids=['SIGTERM','Ctrl-C'])
def test_signal_to_one_of_two(home, tmp_path, number):
    "One process hears of it, both end with a checkpoint; then one process goes on where two were."
    out = tmp_path/'run'; p = home.start(out, ranks=2)
    assert wait_for(p, lambda: last_step(out)>=6); p.kill(number, ranks=[0])
    said = p.end(128+number, 128+signal.SIGTERM)
    assert f'stopped by {number.name} after step' in said and 'Traceback' not in said, said
    said = home.start(out, resume=True).end()
    assert 'saved by 2 processes, resumed by 1' in said and (out/'model.safetensors').exists()
    print(next(line for line in said.splitlines() if line.startswith('saved by')))

@pytest.mark.long
def test_sigterm_torchrun(home, tmp_path):
    out = tmp_path/'run'; p = home.shell(TORCHRUN, *home.args(out)); wait_for_step(p, out, 6)
    p.send_signal(signal.SIGTERM); said = text_of(p, None)
    assert 'stopped by SIGTERM after step' in said and not (out/'model.safetensors').exists(), said
    p = home.shell(TORCHRUN, *home.args(out, resume=True)); assert 'resumed at step' in text_of(p)
    assert_same(out, home.whole(ranks=2), log=False)
    print('torchrun passes SIGTERM on; both processes ended with a checkpoint, and went on to the same end')

# Disks and damage

def test_disk_full(home, tmp_path):
    "No file may grow beyond 300 kB from here on, so the next checkpoint does not fit."
    out = tmp_path/'run'; home.stopped(out); before = saved(out)
    limit = 'from resource import *; setrlimit(RLIMIT_FSIZE, (300_000, getrlimit(RLIMIT_FSIZE)[1]))'
    said = home.start(out, resume=True, first=limit).end(1)
    says = sentence(said); assert 'cannot be saved (File too large): make room there' in says
    assert saved(out)==before and not hidden(out) and all(verify_checkpoint(p)==[] for p in (out/'checkpoints').iterdir())
    home.start(out, resume=True).end(); assert_same(out, home.whole(), log=False)
    print(says.replace(str(tmp_path), '...'))

@pytest.mark.long
def test_real_small_disk(home, tmp_path):
    disk = tmp_path/'disk'; disk.mkdir()
    mount = subprocess.run(['mount','-t','tmpfs','-o','size=5m','tmpfs',disk], capture_output=True)
    if mount.returncode: pytest.skip('mounting a small disk is not allowed here')
    try:
        says = sentence(home.start(disk/'run', 'train.keep=9').end(1)); assert 'cannot be saved (No space left on device)' in says
        left = saved(disk/'run'); assert left and not hidden(disk/'run') and all(verify_checkpoint(p)==[] for p in (disk/'run/checkpoints').iterdir())
        shutil.copytree(disk/'run', tmp_path/'run')
    finally: subprocess.run(['umount','-l',disk], check=True)
    home.start(tmp_path/'run', resume=True).end(); assert_same(tmp_path/'run', home.whole())
    print(f'{len(left)} checkpoints fit, the next did not; with room the run went on to the same end')

@pytest.mark.parametrize('damage', ['truncated','a flipped bit'])
def test_damaged_checkpoint(home, tmp_path, damage):
    out = tmp_path/'run'; home.stopped(out); newest = out/'checkpoints'/saved(out)[-1]; f = newest/'optimizer.safetensors'
    if damage=='truncated': os.truncate(f, 1000)
    else: data = bytearray(f.read_bytes()); data[-100] ^= 4; f.write_bytes(data)
    said = home.start(out, resume=True).end(); word = next(line for line in said.splitlines() if line.startswith('passed over'))
    assert str(f) in word and 'going back to' in word and f'resumed at step {int(saved(home.folder/"stopped")[-2][5:])} ' in said
    assert_same(out, home.whole())
    print(word.replace(str(tmp_path), '...'))

# Numbers that are none

def test_not_finite(home, tmp_path):
    bad = 'pretrain.lr=1e30','pretrain.warmup=0'
    says = sentence(home.start(tmp_path/'stop', *bad).end(1))
    assert re.search(r'the loss of pretrain is \S+ and its gradient nan at step \d+ \(data after .*epoch.*\): lower pretrain.lr=1e\+30', says), says
    said = home.start(tmp_path/'skip', *bad, 'train.non_finite=skip').end(1)
    assert said.count('this step is left out')==5 and '6 steps in a row were like this' in sentence(said)
    print(says)

# Other settings

def test_changed_settings(home, tmp_path):
    out = tmp_path/'run'; home.stopped(out)
    says = sentence(home.start(out, 'model.dropout=0.2', resume=True).end(1)); assert 'made with model.dropout=0.1, and now it is 0.2: give the same' in says
    says = sentence(home.start(out, 'data.size=240', resume=True).end(1)); assert 'now n=' in says and 'give the same data' in says
    said = home.start(out, 'pretrain.lr=0.002', 'train.keep=1', resume=True).end()
    word = next(line for line in said.splitlines() if 'pretrain.lr' in line)
    assert word=='pretrain.lr was 0.003 and is now 0.002: from here on it is another run' and 'train.keep' not in said
    print(word)
