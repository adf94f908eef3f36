"Watching must not hurt what is watched: kills, full disks, dead networks, broken libraries; what it costs; and chroma_plot."
import errno, json, math, os, random, resource, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch

from chroma_moe.config import ChromaError, WandbConfig, load_config
from chroma_moe.curves import chroma_plot, last_values, plot_runs, read_curves
from chroma_moe.moe import RoutingStats, routing_summary
from chroma_moe.monitor import MetricsLog, Monitor, mfu, peak_flops, read_metrics, routing_warnings
from chroma_moe.sink import flat, start_wandb

ROOT = Path(__file__).parents[1]

def layers(layers=4, experts=8, seed=0):
    count = torch.randint(100, 200, (layers, experts), generator=torch.Generator().manual_seed(seed))
    return routing_summary(RoutingStats(count))

def row(step, phase='pretrain'):
    return dict(phase=phase, step=step, loss=8/step, lr=1e-3, grad_norm=1.0, tokens=step*100, tokens_per_second=1e4, routing=layers(seed=step))

# ---- the log

def test_kills_leave_whole_lines(tmp_path):
    path,r,kept = tmp_path/'metrics.jsonl', random.Random(0), 0
    for _ in range(8):
        log = MetricsLog(path); start = len(log.rows)
        if not (pid := os.fork()):
            while True: start += 1; log.add(**row(start))
        time.sleep(0.02+0.1*r.random()); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        with open(path, 'ab') as f: f.write(b'{"step": 1, "lo'*r.randint(0, 1))          # as a kill in the middle of the write would
        rows = read_metrics(path); kept = len(rows)
        assert [x['step'] for x in rows]==list(range(1, kept+1))
    log = MetricsLog(path); log.add(step=kept+1)
    assert len(read_metrics(path))==kept+1
    print(f'8 kills while writing: {kept} rows, none lost, none broken')

def test_a_whole_last_line_without_its_end_stays(tmp_path):
    path = tmp_path/'m.jsonl'; path.write_bytes(b'{"step": 1}\n{"step": 2}')
    log = MetricsLog(path); log.add(step=3)
    assert [r['step'] for r in log]==[1,2,3]
    path.write_bytes(b'{"step": 1}\n'+b'\0'*100); log = MetricsLog(path); log.add(step=2)   # power was lost
    assert [r['step'] for r in log]==[1,2]
    path.write_bytes(b''); MetricsLog(path).add(step=1); assert len(read_metrics(path))==1

def test_resume_reads_as_if_never_interrupted(tmp_path):
    a,b = MetricsLog(tmp_path/'a.jsonl'), MetricsLog(tmp_path/'b.jsonl')
    for log in (a, b):
        for s in range(1, 11): log.add(**row(s, 'tune'))                               # another phase of the same run, not to be touched
    for s in range(1, 41): a.add(**row(s))
    for s in range(1, 34): b.add(**row(s))
    b = MetricsLog(b.path); b.resume(25, 'pretrain')
    for s in range(26, 41): b.add(**row(s))
    assert a.path.read_bytes()==b.path.read_bytes() and sorted(os.listdir(tmp_path))==['a.jsonl','b.jsonl']
    b.resume(0, 'pretrain'); assert {r['phase'] for r in b}=={'tune'} and len(b.rows)==10
    MetricsLog(tmp_path/'new.jsonl').resume(5)                                          # nothing there yet
    print('resumed at 25 of 33 steps, then equal to the uninterrupted file, byte for byte')

def test_resume_that_fails_keeps_the_file(tmp_path, capsys, monkeypatch):
    log = MetricsLog(tmp_path/'m.jsonl')
    for s in (1,2,3): log.add(step=s)
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full); log.resume(1)
    assert len(log.rows)==3 and os.listdir(tmp_path)==['m.jsonl'] and 'cannot be cut back (No space left' in capsys.readouterr().err
    monkeypatch.undo()
    with open(log.path, 'a') as f: f.write('garbage\n{"step": 4}\n')
    with pytest.raises(ChromaError, match='line 4 is not JSON'): read_metrics(log.path)
    log.resume(2); assert [r['step'] for r in log]==[1,2] and '1 lines were not JSON' in capsys.readouterr().err

def test_full_disk_is_said_once_and_nothing_is_lost(tmp_path, capsys):
    log = MetricsLog(tmp_path/'m.jsonl'); log.add(**row(1)); one = log.path.stat().st_size
    old,handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (one+100, old[1]))                   # room for part of a line
        for s in range(2, 6): log.add(**row(s))
        assert log.path.stat().st_size==one and [r['step'] for r in log]==[1,2,3,4,5]
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old); signal.signal(signal.SIGXFSZ, handler)
    log.add(**row(6))
    said = capsys.readouterr().err.splitlines()
    assert len(said)==1 and 'cannot be written' in said[0] and [r['step'] for r in read_metrics(log.path)]==list(range(1, 7))
    print(said[0].replace(str(tmp_path), '...'))

def test_what_json_cannot_hold(tmp_path):
    log = MetricsLog(tmp_path/'m.jsonl')
    log.add(step=torch.tensor(3), loss=math.nan, eval=dict(shop=dict(loss=-math.inf)), grads=[1.0, math.inf], a=np.float64('nan'), n=np.arange(2), p=Path('x'))
    (r,) = log
    assert r==dict(step=3, loss=None, eval=dict(shop=dict(loss=None)), grads=[1.0, None], a=None, n=[0,1], p='x',
                   not_finite={'loss': 'nan', 'eval.shop.loss': '-inf', 'grads.1': 'inf', 'a': 'nan'})
    text = log.path.read_text(); assert 'NaN' not in text and 'Infinity' not in text
    print(text.strip())

# ---- W&B

STUB = '''
import os, pathlib, time
log = pathlib.Path(os.environ['STUB_LOG']); how = os.environ['STUB']
def note(*w): log.open('a').write(' '.join(map(str, w))+'\\n')
if how=='import': raise RuntimeError('bad install')
class Settings(dict): pass
class Image:
    def __init__(self, path): self.path = path
class Run:
    def define_metric(self, *a, **k): pass
    def log(self, row):
        if how=='log': raise ValueError('bad\\nrow')
        note('log', sorted(row))
    def finish(self):
        if how=='hang_at_end': time.sleep(100)
        note('finish')
def init(settings, **k):
    note('init', k['mode'], k['id'])
    if how=='init': raise RuntimeError('503')
    if how=='hang': time.sleep(100)
    if how=='die': os._exit(9)
    return Run()
'''

@pytest.fixture
def stub(tmp_path, monkeypatch):
    "A library in the place of W&B's that behaves as told; returns (start, its diary, what was said)."
    (tmp_path/'lib'/'wandb').mkdir(parents=True); (tmp_path/'lib'/'wandb'/'__init__.py').write_text(STUB)
    monkeypatch.setenv('PYTHONPATH', f"{tmp_path/'lib'}:{ROOT}"); monkeypatch.setenv('STUB_LOG', str(tmp_path/'diary'))
    said = []
    def start(how, mode='offline', **kw):
        monkeypatch.setenv('STUB', how)
        return start_wandb(WandbConfig(enabled=True, mode=mode), tmp_path/'run', {}, tell=said.append, **kw)
    return start, (lambda: (tmp_path/'diary').read_text() if (tmp_path/'diary').exists() else ''), said

@pytest.mark.parametrize('how,says', [('import','RuntimeError: bad install'), ('init','RuntimeError: 503'), ('log','ValueError: bad row'),
                                      ('die','its process ended with code 9')])
def test_a_broken_library_is_switched_off(stub, tmp_path, how, says):
    start,diary,said = stub
    sink = start(how); log = MetricsLog(tmp_path/'m.jsonl', sink)
    for s in range(1, 4): log.add(**row(s))
    sink.finish(20); log.add(**row(4)); sink.log(row(5)); sink.picture('x', 'y'); sink.finish()
    assert len(said)==1 and says in said[0] and not sink.on and len(log.rows)==4
    print(said[0])

@pytest.mark.parametrize('how', ['hang','hang_at_end'])
def test_a_library_that_hangs_is_not_waited_for(stub, how):
    start,diary,said = stub
    begin,one = time.perf_counter(), row(1); sink = start(how)
    for _ in range(3000): sink.log(one)
    logged = time.perf_counter()-begin; sink.finish(1)
    assert len(said)==1 and 'has not taken everything yet' in said[0]
    os.killpg(sink._child.pid, signal.SIGKILL); sink._child.wait()
    print(f'3,000 rows into a library that hangs: {logged:.2f} s, then {said[0]}')

def test_a_queue_that_is_full_switches_off(stub):
    start,diary,said = stub
    sink = start('hang')
    for s in range(6000): sink.log(dict(step=s, **dict.fromkeys('abcdefghij', 1/3)))
    assert not sink.on and 'has not taken a row for a long time' in said[0]
    os.killpg(sink._child.pid, signal.SIGKILL); sink._child.wait()

def test_a_killed_run_still_ends_its_wandb_run(stub, tmp_path):
    diary = stub[1]
    code = ('import os,signal; from chroma_moe.sink import start_wandb; from chroma_moe.config import WandbConfig\n'
            f's = start_wandb(WandbConfig(enabled=True, mode="offline"), {str(tmp_path/"run")!r}, {{}}, "ab12")\n'
            's.log(dict(step=1, loss=2.)); import time; time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)')
    r = subprocess.run([sys.executable, '-c', code], env=os.environ|dict(STUB='well'))
    assert r.returncode==-signal.SIGKILL
    for _ in range(200):
        if 'finish' in diary(): break
        time.sleep(0.05)
    assert diary().splitlines()==['init offline ab12', "log ['run/loss', 'run/step']", 'finish']
    print('killed after its first row; the other process sent it and finished')

def quiet_network(monkeypatch, url, key=True):
    for k in ('WANDB_MODE','HTTP_PROXY','HTTPS_PROXY','http_proxy','https_proxy','WANDB_API_KEY'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('WANDB_BASE_URL', url); monkeypatch.setenv('NETRC', '/nonexistent')
    if key: monkeypatch.setenv('WANDB_API_KEY', 'a'*40)

@pytest.fixture
def mute_server():
    "A host that accepts connections and never says a word."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(50)
        yield f'http://127.0.0.1:{s.getsockname()[1]}'

@pytest.mark.parametrize('where', ['mute','refused','unknown name'])
def test_a_key_without_a_network(stub, mute_server, monkeypatch, where):
    "Under 5 s, with a wide margin: the probe gives up after 2."
    quiet_network(monkeypatch, {'mute': mute_server, 'refused': 'http://127.0.0.1:9', 'unknown name': 'http://nowhere.invalid'}[where])
    start,diary,said = stub
    begin = time.perf_counter(); sink = start('well', 'auto', run_id='ab12'); took = time.perf_counter()-begin
    sink.finish(20)
    assert took<5 and diary().startswith('init offline ab12') and len(said)==1 and 'does not answer' in said[0]
    print(f'{where}: {took:.2f} s, {said[0].split(";")[0]}')

def test_modes(stub, tmp_path, monkeypatch):
    "No login is offline even where online was asked for; a login in netrc counts; WANDB_MODE decides for auto; any answer is an answer."
    import http.server, threading
    start,diary,said = stub
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self): self.send_error(404)
        def log_message(self, *a): pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Refuse); threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    def mode(asked):
        (tmp_path/'diary').unlink(missing_ok=True); start('well', asked).finish(20)
        return diary().split()[1]
    quiet_network(monkeypatch, url, key=False)
    assert mode('online')==mode('auto')=='offline' and len(said)==2 and 'there is no login' in said[0]
    (tmp_path/'netrc').write_text('machine 127.0.0.1 login user password '+'b'*40); monkeypatch.setenv('NETRC', str(tmp_path/'netrc'))
    assert mode('auto')=='online'
    monkeypatch.setenv('WANDB_API_KEY', 'a'*40); assert mode('auto')=='online' and mode('offline')=='offline'
    monkeypatch.setenv('WANDB_MODE', 'disabled'); assert mode('auto')=='disabled' and mode('online')=='online'
    assert len(said)==2; server.shutdown()
    print(said[0].replace(str(tmp_path), '...'))

def test_the_real_library_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb'); quiet_network(monkeypatch, 'http://127.0.0.1:9', key=False)
    said,c = [],WandbConfig(enabled=True, tags=('a','b'))
    begin = time.perf_counter(); sink = start_wandb(c, tmp_path/'run', dict(model=dict(dim=8)), tell=said.append); took = time.perf_counter()-begin
    log = MetricsLog(tmp_path/'run'/'metrics.jsonl', sink); monitor = Monitor(wandb=sink)
    for s in range(1, 11): log.add(**row(s)); monitor.add(**row(s))
    log.add(phase='pretrain', step=10, eval_loss=3., eval=dict(shop=dict(loss=3., accuracy=0.5, routing=layers())))
    monitor.save(tmp_path/'run'); sink.finish(60)
    assert len(said)==1 and 'there is no login' in said[0], said
    (folder,) = (tmp_path/'run'/'wandb').glob('offline-run-*')
    assert folder.name.endswith(sink.run_id) and (folder/f'run-{sink.run_id}.wandb').stat().st_size>1000 and list(folder.rglob('routing*.png'))
    again = start_wandb(c, tmp_path/'run', {}, sink.run_id, said.append); again.log(row(11)); again.finish(60)
    assert again.run_id==sink.run_id and len(said)==2
    print(f'started in {took:.3f} s; {sum(1 for _ in folder.rglob("*"))} files, a picture among them; resumed under the same id')

# ---- the monitor

@pytest.mark.parametrize('experts,top_k,even', [(4,2,0.5), (8,2,0.25), (64,6,6/64), (2,2,1.), (8,1,0.25), (16,4,0.25)])
def test_balance_is_silent_and_collapse_is_not(experts, top_k, even):
    flat_load,g = np.full(experts, 1/experts), np.random.default_rng(0)
    for _ in range(200):
        noisy = flat_load*g.uniform(0.7, 1.3, experts)
        assert not routing_warnings([dict(load=(noisy/noisy.sum()).tolist())], top_k)
    n = max(2, top_k); gone = np.zeros(experts); gone[:n] = 1/n
    said = routing_warnings([dict(load=gone.tolist())], top_k)
    assert (experts<=n and not said) or (f"{'two' if n==2 else n} experts take most" in said[0] and f'{experts-n} of {experts}' in said[1])
    print(f'E={experts} K={top_k}: {said[0] if said else "all experts are always on, nothing to say"}')

def test_many_layers_are_one_sentence():
    load = [dict(load=[0.5,0.5]+[0.]*6)]*28
    said = routing_warnings(load, names=list(range(1, 29)))
    assert len(said)==2 and all(len(s)<300 for s in said) and 'layer 1 ' in said[0] and 'and 25 more layers' in said[0]
    print(said[0])

def test_monitor_goes_on_when_it_cannot_draw(tmp_path, monkeypatch):
    said = []; monitor = Monitor(load_config(profile='tiny').model, tell=said.append)
    assert monitor.save(tmp_path) is None and not said                                  # nothing to draw is no fault
    for s in range(1, 8): monitor.add(**dict(row(s), routing=layers(2)))
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert monitor.save(tmp_path) is None and monitor.save(tmp_path) is None
    assert len(said)==1 and 'pip install matplotlib' in said[0]
    monkeypatch.undo()
    for s in range(8, 12): monitor.add(**row(s))                                        # other layers: a dense start was upcycled
    assert monitor.save(tmp_path)==tmp_path/'routing.png' and os.listdir(tmp_path)==['routing.png']
    assert (tmp_path/'routing.png').read_bytes()[:4]==b'\x89PNG'
    print(said[0])

def test_what_watching_costs(tmp_path):
    "Microseconds of a logged step, printed and not gated."
    out = []
    for profile in ('tiny','debug','full'):
        m = load_config(profile=profile).model
        rows = [dict(row(s), routing=layers(len(m.moe_layers), m.moe.experts, s), mfu=0.4) for s in range(1, 41)]
        log,monitor = MetricsLog(tmp_path/f'{profile}.jsonl'), Monitor(m, tell=lambda w: None)
        mfu(1e4, m); parts = {}
        for name,f in dict(log=lambda r: log.add(**r), monitor=lambda r: monitor.add(**r), flat=flat, mfu=lambda r: mfu(1e4, m)).items():
            times = []
            for r in rows: t = time.perf_counter(); f(r); times.append(time.perf_counter()-t)
            parts[name] = 1e6*sorted(times)[len(times)//2]
        t = time.perf_counter(); monitor.save(tmp_path); picture = time.perf_counter()-t
        each = ' + '.join(f'{k} {v:.0f}' for k,v in parts.items())
        out.append(f'{profile} {each} = {sum(parts.values()):.0f} us, picture {picture:.2f} s')
    print('a logged step:', '; '.join(out))

def test_peak_and_mfu():
    m = load_config(profile='tiny').model
    p = peak_flops(); assert 1e8<p<1e14 and peak_flops()==p                             # measured once
    assert mfu(2000., m)==pytest.approx(2*mfu(1000., m)) and mfu(1000., m, masked=0)<mfu(1000., m)
    print(f'{p/1e9:.0f} GFLOP/s on {torch.get_num_threads()} thread')

# ---- curves

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp('runs')
    for name,pace in (('a',1.0),('b',0.7)):
        log = MetricsLog(home/name/'metrics.jsonl')
        for s in range(10, 201, 10):
            log.add(**dict(row(s), loss=3+5*math.exp(-pace*s/50), balance=1.0))
            if s%50==0: log.add(phase='pretrain', step=s, eval_loss=3.2, eval_accuracy=0.4, eval=dict(shop=dict(loss=3.1, accuracy=0.5, routing=layers())))
    MetricsLog(home/'b'/'metrics.jsonl').add(phase='tune', step=1, loss=math.nan, tokens=5, accuracy=0.1)
    return home

def plot(*args):
    return subprocess.run([sys.executable, '-m', 'chroma_moe.curves', *map(str, args)], capture_output=True, text=True,
                          env=os.environ|dict(PYTHONPATH=str(ROOT), MPLBACKEND='agg'))

def test_plot_command(runs):
    r = plot(runs/'a', runs/'b', '--out', runs/'out'/'c.png', '--smooth', 0.5)
    assert r.returncode==0, r.stderr
    assert (runs/'out'/'c.png').read_bytes()[:4]==b'\x89PNG'
    for w in ('eval_accuracy', f'{runs}/b pretrain', f'{runs}/b tune'): assert w in r.stdout
    print(r.stdout.splitlines()[1].replace(str(runs), 'runs'))

def refused(*args):
    with pytest.raises(SystemExit) as e: chroma_plot.main([str(a) for a in args])
    return str(e.value.code)

def test_plot_refusals(runs, tmp_path):
    said = [refused(tmp_path), refused(runs/'nowhere'), refused(runs/'a', '--metric', 'perplexity'), refused(runs/'a', '--by', 'hour'),
            refused(runs/'a', '--smooth', '1'), refused(runs/'a', '--phase', 'tune'), refused(runs/'a', '--out', 'x.exe'),
            refused(runs/'a', '--out', '/proc/nowhere/x.png')]
    (tmp_path/'metrics.jsonl').touch(); said.append(refused(tmp_path))
    for s,w in zip(said, ('has no metrics.jsonl', 'has no metrics.jsonl', "no metric 'perplexity': there are balance, dead, entropy, eval.shop.accuracy",
                          'give step or tokens', 'in [0, 1)', "no rows of phase 'tune'", 'ends in .png', 'cannot be written', 'has no rows yet')):
        assert w in s and 'chroma_plot: ' in s, s
    print(said[2].replace(str(runs), 'runs'))

def test_curves_of_odd_runs(runs, tmp_path):
    "A run that is still written, steps that stand twice, values that are missing, by tokens, one point, domains."
    log = MetricsLog(tmp_path/'metrics.jsonl')
    for s,v in ((1,9.), (2,8.), (3,math.nan), (2,7.), (4,6.)): log.add(phase='p', step=s, loss=v)
    with open(log.path, 'a') as f: f.write('{"ph')
    c = read_curves(tmp_path)['p']['loss']
    assert c[2]==7. and math.isnan(c[3]) and sorted(c)==[1,2,3,4]
    assert '6' in last_values([tmp_path]).splitlines()[1]
    plot_runs([tmp_path], smooth=0.9)
    with pytest.raises(ChromaError, match='no tokens: use --by step'): plot_runs([tmp_path], by='tokens')
    fig = plot_runs([runs/'a'], ['eval.shop.loss','dead','max_share','loss'], by='tokens', phase='pretrain')
    x = fig.axes[0].lines[0].get_xdata(); assert list(x)==[5000,10000,15000,20000]      # an evaluation stands at the tokens of its step
    held = [line for line in fig.axes[3].lines if line.get_linestyle()=='--']; assert len(held)==1
    plot_runs([runs/'a', runs/'b', tmp_path])

def test_it_reads_a_row_as_json_elsewhere(runs):
    for line in (runs/'b'/'metrics.jsonl').read_text().splitlines(): json.loads(line, parse_constant=lambda c: pytest.fail(c))
