"The commands as a user starts them: separate processes, exit codes, one-sentence refusals, a kill in the middle."
import importlib, json, os, re, signal, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
commands = dict(e.split('=') for e in cfg['DEFAULT']['console_scripts'].split())

def module(name): return commands[name].partition(':')[0]
def run(name, *args, cwd=None):
    "A command by its module, as `python -m` and launchers start it."
    return subprocess.run([sys.executable, '-m', module(name), *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=600,
                          env=os.environ|dict(PYTHONPATH=str(ROOT)))

def test_help(capsys):
    "Every console script is one of ours and explains itself; one of them as the shell starts it."
    lines = 0
    for name,target in commands.items():
        home,_,path = target.partition(':'); f = importlib.import_module(home)
        for part in path.split('.'): f = getattr(f, part)
        with pytest.raises(SystemExit) as e: f(['--help'])
        said = capsys.readouterr().out; lines += len(said.splitlines())
        assert e.value.code==0 and name in said, name
    script = Path(sys.executable).with_name(name)
    r = subprocess.run([script, '--help'], capture_output=True, text=True) if script.exists() else run(name, '--help')
    assert r.returncode==0 and r.stdout==said, r.stderr
    print(f'{len(commands)} commands, {lines} lines of help')

def test_config_command():
    figures = json.loads(run('chroma_config', '--profile', 'full', '--json').stdout)
    assert (figures['total_params'], figures['active_params']) == (2_804_043_776, 888_295_424)
    sample = run('chroma_config', '--config', ROOT/'config.yaml')
    assert sample.returncode==0 and '1,225,792' in sample.stdout, sample.stderr
    print('full profile as JSON, and the sample config.yaml')

@pytest.mark.parametrize('args,says', [
    (['--set','model.moe.topk=2'],       "did you mean 'model.moe.top_k'?"),
    (['--set','model.moe.top_k=99'],     'moe.top_k is 99'),
    (['--set','model.attention.kv_rank=0'], 'attention.kv_rank is 0'),
    (['--set','pretrain.lr=fast'],       "pretrain.lr is 'fast': it must be a number"),
    (['--config','nowhere.yaml'],        "no config file 'nowhere.yaml'"),
    (['--prof','tiny'],                  'unrecognized arguments: --prof')])
def test_refusals(args, says):
    r = run('chroma_config', *args)
    assert r.returncode and says in r.stderr and 'Traceback' not in r.stderr, r.stderr
    print(r.stderr.strip().splitlines()[-1])

def test_launcher_is_refused(tmp_path):
    r = subprocess.run([sys.executable, '-m', module('chroma_pretrain'), '--out', str(tmp_path)], capture_output=True, text=True,
                       env=os.environ|dict(PYTHONPATH=str(ROOT), WORLD_SIZE='2'))
    assert r.returncode and 'WORLD_SIZE is 2' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    print(r.stderr.strip())

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "A demo that was killed in phase 2 and started again."
    home = tmp_path_factory.mktemp('home')
    args = ['--minutes','0.1','--no_progress']
    p = subprocess.Popen([sys.executable, '-m', module('chroma_demo'), *args], cwd=home, env=os.environ|dict(PYTHONPATH=str(ROOT)),
                         stdout=subprocess.DEVNULL)
    out = home/'runs'/'demo'
    for _ in range(1200):
        if (out/'.model.tmp').exists() or p.poll() is not None: break
        time.sleep(0.1)
    p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode==-signal.SIGKILL and not (out/'model').exists() and not (out/'summary.json').exists()
    r = run('chroma_demo', *args, cwd=home)
    assert r.returncode==0, r.stderr
    return home, r.stdout

def test_demo_goes_on_after_a_kill(demo):
    home,said = demo
    assert 'tokenizer: done before' in said and 'pretrained: done before' in said and 'model: done before' not in said
    steps = [r['step'] for l in open(home/'runs/demo/metrics.jsonl') if (r := json.loads(l))['phase']=='tune']
    assert len(steps)==len(set(steps))
    print('killed in phase 2; the earlier stages were kept, no row of the log stands twice')

def test_demo_writes_what_it_says(demo):
    out = demo[0]/'runs'/'demo'
    s = json.loads((out/'summary.json').read_text())
    for half in ('finance','shop'):
        assert set(s[half])=={'bm25','untrained','bag','trained'}
        for scores in s[half].values(): assert set(scores)=={'ndcg@10','mrr@10','recall@100'} and all(0<=v<=1 for v in scores.values())
    assert s['order_part']['bag']==0.5 and 0<=s['order_part']['trained']<=1 and s['seconds']>0 and s['tokens_per_second']>0
    page = (out/'report.html').read_text()
    assert page.lower().startswith('<!doctype html') and not re.search(r'(src|href)="https?:', page)
    assert not [p.name for p in out.iterdir() if p.name.startswith('.')]
    print('summary, report and', len(list((out/'model').iterdir())), 'files of the model')

def test_same_seed_same_model(demo, tmp_path):
    r = run('chroma_demo', '--minutes', '0.1', '--no_progress', '--out', tmp_path/'again')
    assert r.returncode==0, r.stderr
    assert (tmp_path/'again/model/model.safetensors').read_bytes() == (demo[0]/'runs/demo/model/model.safetensors').read_bytes()
    print('a killed and continued run equals an undisturbed one, byte for byte')

def test_readme_example(demo):
    "The Python lines of the README run on the demo's model."
    block = '\n'.join(b for b in re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), flags=re.S) if 'runs/demo/model' in b)
    assert 'from_pretrained' in block and 'SentenceTransformer(' in block
    r = subprocess.run([sys.executable, '-c', block], cwd=demo[0], capture_output=True, text=True, env=os.environ|dict(PYTHONPATH=str(ROOT)))
    assert r.returncode==0 and r.stdout.count('score')==2, r.stderr
    print(len(block.splitlines()), 'lines of the README')
