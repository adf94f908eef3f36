"Experts spread over processes: the same numbers in every layout, checkpoints that go from one layout to another, a process that dies, encoding, evaluation."
import json, os, re, shutil, signal, socket
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.indexing import Index
from chroma_moe.model import ChromaModel
from chroma_moe.parallel import Ranks
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

from expert_program import CASES, three_steps
from test_sharding import FSDP
from test_training import EXACT, ROOT, Home, furthest, last_step, rows, saved, text_of, wait_for, wait_for_step, workers

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    h = Home(tmp_path_factory.mktemp('home'))
    h.first = h.folder/'first'
    c = load_config(profile='tiny', sets=['model.vocab_size=1024','model.dim=64','model.layers=2'])
    ChromaMoE(ChromaModel(c.model), ChromaTokenizer.load(h.folder/'tokenizer'), 64).save_pretrained(h.first)
    yield h
    h.nursery.stdin.close(); h.nursery.wait(60)

# Exactness

FEW = 'masked','pairs','pairs.sharded','kept'

@pytest.mark.parametrize('n,what', [(4, FEW), pytest.param(2, ('all',), marks=pytest.mark.long), pytest.param(4, ('all',), marks=pytest.mark.long)],
                         ids=['four','two, every case','four, every case'])
def test_layouts(home, tmp_path, n, what):
    "Loss, gradients and weights of three steps in float64, by accelerate launch, for real."
    launch = ['accelerate.commands.launch','--multi_gpu','--num_processes',n,'--num_machines',1,'--mixed_precision','no','--dynamo_backend','no']
    text_of(home.shell(map(str, launch), Path(__file__).with_name('expert_program.py'), home.folder, tmp_path, *what))
    said,worst,alone = json.loads((tmp_path/'said.json').read_text()),{},cache(lambda name: three_steps(name, home.folder, Ranks())[0])
    for key,held in said.items():
        if key.startswith('layer'): assert held<1e-10, (key, held); continue                # idle experts, a process without tokens
        name,expert,*sharded = key.split('.'); got,want = load_file(tmp_path/key),alone(name)
        assert got.keys()==want.keys(), set(got)^set(want)
        for k in want:
            a,b = (got[k],want[k]) if k!='loss' or name not in ('parts','kept') else (got[k][:,0],want[k][:,0])   # routing is counted by parts there
            off = (a-b).abs().max().item(); assert off<1e-9, (key, k, off)
            worst[k.partition('.')[0]] = max(off, worst.get(k.partition('.')[0], 0.))
        m = load_config(profile='tiny', sets=[s for s in ('model.dim=64','model.layers=2',*CASES[name][1:]) if s.startswith('model.')]).model
        whole = len(m.moe_layers)*3*m.dim*m.moe.expert_dim*m.moe.experts
        assert held==[whole//int(expert) if expert!='1' else 0]*n, (key, held)
    layouts = {k.partition('.')[2] for k in said if not k.startswith('layer')}
    assert {f'{e}' for e in (2,4) if n%e==0}<=layouts and any('sharded' in l for l in layouts)
    print(f"{n} processes, layouts {', '.join(sorted(layouts))}: " + ', '.join(f'{k} {v:.0e}' for k,v in sorted(worst.items())))

# Whole commands

def test_checkpoint_changes_layout(home, tmp_path):
    "Four processes with a quarter of the experts each, killed; one, killed; two with half of the experts and the rest cut, killed; two without cuts."
    sets = *EXACT, 'pretrain.steps=10', 'train.save_every=2', 'model.moe.balance=0'
    one = home.whole(*sets); out,said = tmp_path/'run',''
    for ranks,until,first in ((4,3,''), (1,5,''), (2,7,FSDP), (2,0,'')):
        p = home.start(out, *sets, f'parallel.expert={ranks}', ranks=ranks, resume=out.exists(), first=first)
        if until: assert wait_for(p, lambda: last_step(out)>=until); p.kill(); p.end(*[-signal.SIGKILL]*ranks); at = saved(out)
        else: p.end()
        said += p.said_at.read_text()
        assert all(load_file(out/'checkpoints'/name/'model.safetensors')['blocks.0.moe.down'].shape[0]==8 for name in saved(out)), 'a checkpoint is whole'
    assert 'saved by 4 processes, resumed by 1' in said and 'saved by 1 processes, resumed by 2' in said and 'another run' not in said, said
    assert said.count('resumed at step')==3, said
    off = furthest(out, one); assert off<1e-5, off
    a,b = rows(out),rows(one); assert all(abs(x[k]-y[k])<3e-5 for x,y in zip(a, b) for k in ('loss','eval_loss') if k in x)
    assert ChromaMoE.from_pretrained(out).encode(['red wool socks']).shape==(1,128)
    print(f'4 processes, 1, 2 with the rest cut, 2 (checkpoints {at[-1]} and before): weights within {off:.0e} of one process that ran through')

def test_one_process_dies(home, tmp_path):
    "SIGKILL one of two that hold each other's experts: the launcher ends the other within a minute."
    out = tmp_path/'run'; sets = *EXACT, 'parallel.expert=2'
    p = home.shell(('torch.distributed.run','--standalone','--nproc_per_node','2','-m','chroma_moe.pretrain'), *home.args(out, *sets)); wait_for_step(p, out, 5)
    pids = workers(p); os.kill(pids[1], signal.SIGKILL); said = text_of(p, None, 60)
    assert 'SIGKILL' in said or 'exitcode  : -9' in said, said
    gone = [not Path(f'/proc/{pid}').exists() for pid in pids]; assert all(gone) and saved(out)
    print(f'one of two killed: both gone, exit code {p.returncode}, checkpoint {saved(out)[-1]} is there')

@pytest.mark.long
def test_two_machines(home, tmp_path):
    "Two launchers of two processes each that meet over TCP, as on two machines, with the recipe's file; families lie within a machine."
    sets = *EXACT, 'pretrain.steps=6', 'model.moe.balance=0'
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    launch = ['accelerate.commands.launch','--config_file',ROOT/'recipes'/'accelerate_64gpu.yaml','--num_machines',2,'--num_processes',4,
              '--main_process_port',port]
    machines = [home.shell(map(str, [*launch, '--machine_rank', r, '-m', 'chroma_moe.pretrain']), *home.args(tmp_path/'four', *sets, 'parallel.expert=2'))
                for r in range(2)]
    said = [text_of(p) for p in machines]; assert 'model written to' in said[0] and 'model written to' not in said[1], said
    off = furthest(tmp_path/'four', home.whole(*sets)); assert off<1e-5, off
    print(f'2 launchers with 2 processes each: weights within {off:.0e} of one process')

def test_check_processes(home, tmp_path):
    said = home.start(tmp_path, 'parallel.expert=2', ranks=2, before=['--test-ddp']).end()
    line = next(line for line in said.splitlines() if 'agree' in line); assert '2 processes, 2 to the experts of a layer, and one agree' in line
    print(line)

def test_tune(home, tmp_path):
    "Phase 2 with held-out pairs, of which the processes have unequal shares."
    sets = *EXACT, 'model.moe.balance=0', 'data.size=100', 'tune.steps=6', 'train.micro_tokens=150', 'train.eval_size=9', 'train.eval_every=3'
    start = lambda out, *more, **kw: home.start(out, *sets, *more, name='chroma_tune', before=['--pretrained',home.first], **kw).end()
    start(tmp_path/'one'); said = start(tmp_path/'two', 'parallel.expert=2', ranks=2); assert 'held-out queries' in said
    off = furthest(tmp_path/'two', tmp_path/'one'); assert off<1e-3, off
    # a share of the largest weight: the pooling's last matrices began at zero, and are small
    a,b = rows(tmp_path/'two'),rows(tmp_path/'one'); assert len(a)==len(b)
    assert all(abs(x[k]-y[k])<1e-3 for x,y in zip(a, b) for k in ('loss','eval_loss') if k in x)
    print(f'chroma_tune, experts on two processes: weights within {off:.0e} of one')

# Encoding and evaluating

def call(home, ranks, *args, command='encode', codes=()):
    "A command on several processes."
    first = f'from chroma_moe.{command} import chroma_{command}\nchroma_{command}.main({[*map(str, args)]!r})\nos._exit(0)'
    return home.start('', name='', ranks=ranks, first=first).end(*codes)

@pytest.fixture(scope='module')
def corpus(home):
    texts = [r['text'] for r in World().texts('150')]
    (home.folder/'corpus.jsonl').write_text(''.join(json.dumps(dict(_id=f'd{i}', text=t))+'\n' for i,t in enumerate(texts)))
    args = '--model', home.first, '--input', home.folder/'corpus.jsonl', '--part', 8, '--no_progress'
    call(home, 1, *args, '--output', home.folder/'one')
    return args

def same_bytes(a, b):
    names = sorted(p.name for p in a.iterdir() if not p.name.startswith('.')); assert names==sorted(p.name for p in b.iterdir() if not p.name.startswith('.'))
    return all((a/n).read_bytes()==(b/n).read_bytes() for n in names)

def test_encode(home, tmp_path, corpus):
    "Over two processes, killed and gone on with by four: the bytes of one process. With spread experts: its vectors."
    out,one = tmp_path/'two',home.folder/'one'; shutil.copytree(one, out); head = json.loads((out/'index.json').read_text()); head.pop('files')
    (out/'index.json').unlink(); (out/'begun.json').write_text(json.dumps(head))             # as a kill leaves it, with gaps
    for i in (0,3,4,11): (out/f'vectors-{i:05}.npy').unlink()
    (out/'rows-00011.jsonl').unlink(); kept = (out/'vectors-00005.npy').stat().st_mtime_ns
    said = call(home, 2, *corpus, '--output', out)
    assert said.count('150 texts')==1 and same_bytes(out, one) and (out/'vectors-00005.npy').stat().st_mtime_ns==kept
    call(home, 4, *corpus, '--output', tmp_path/'four'); assert same_bytes(tmp_path/'four', one)
    call(home, 2, *corpus, '--output', tmp_path/'spread', '--expert', 2)
    a,b = Index.open(tmp_path/'spread', verify=True),Index.open(one); off = np.abs(a.take(range(150))-b.take(range(150))).max()
    assert off<1e-6 and [a.rows[i] for i in range(150)]==[b.rows[i] for i in range(150)] and a.fingerprint==b.fingerprint
    said = call(home, 2, *corpus[:-3], '--part', 9, '--no_progress', '--output', out, codes=(1,1))
    assert 'give the same settings to go on' in said and 'Traceback' not in said, said
    print(f'150 texts on 2 and 4 processes: the bytes of one; with spread experts vectors within {off:.0e}')

@pytest.mark.long
def test_encode_launched(home, tmp_path, corpus):
    "By accelerate, for real, and killed for real."
    launch = 'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m chroma_moe.encode'.split()
    out = tmp_path/'out'; p = home.shell(launch, *corpus, '--output', out)
    while p.poll() is None and len([*out.glob('vectors-*')])<4: pass
    os.killpg(p.pid, signal.SIGKILL); p.communicate(); done = len([*out.glob('vectors-*')]); assert done>=4 and not (out/'index.json').exists()
    text_of(home.shell(launch, *corpus, '--output', out)); assert same_bytes(out, home.folder/'one')
    print(f'killed after {done} parts of 19; then the bytes of one process')

TOGETHER = '''
import numpy as np
from chroma_moe.config import ChromaError
from chroma_moe.encoder import ChromaMoE
from chroma_moe.parallel import start
from chroma_moe.shared_encoding import encode_together
ranks,texts = start('fp32', 2), ['wool '*(1+i%7) for i in range(41)]
alone = ChromaMoE.from_pretrained({first!r}); want,mark = alone.encode(texts, batch_tokens=40), alone.fingerprint
with encode_together(ChromaMoE.from_pretrained({first!r}), ranks) as encoder:
    assert (encoder is not None)==ranks.main
    if encoder:
        assert np.abs(encoder.encode(texts, batch_tokens=40)-want).max()<1e-6 and encoder.fingerprint==mark
        assert np.abs(encoder.encode_document(texts[:1])-want[:1]).max()<1e-6 and encoder.encode([]).shape==(0,128)  # one has a text, the other none
        for bad in (dict(prompt_name='poem'), dict(truncate_dim=999)):
            try: encoder.encode(texts, **bad)
            except ChromaError as e: print(e)
            else: raise AssertionError
        assert encoder.search('wool', texts, top_k=2)[0]['text'].startswith('wool')
ranks.end(); os._exit(0)
'''

def test_encode_together(home):
    "One process asks, two with half of the experts each encode; a refusal ends nothing."
    said = home.start('', name='', ranks=2, first=TOGETHER.format(first=str(home.first))).end()
    assert said.count("prompt_name is 'poem'")==said.count('truncate_dim is 999')==1, said
    print('41 texts, one text and none: the vectors of one process; two refusals of one sentence')

@pytest.mark.long
def test_evaluate(home, tmp_path):
    "One process evaluates, two encode with half of the experts each: the scores of one."
    args = '--model', home.first, '--benchmark', 'world', '--debug', '--no_card'
    call(home, 1, *args, '--out', tmp_path/'one', command='evaluate'); call(home, 2, *args, '--expert', 2, '--out', tmp_path/'two', command='evaluate')
    a,b = (json.loads((tmp_path/n/'results.json').read_text()) for n in ('one','two'))
    assert a['fingerprint']==b['fingerprint'] and len(a['rows'])==len(b['rows'])>3
    off = max(abs(x['value']-y['value']) for x,y in zip(a['rows'], b['rows'])); assert off<1e-5, off
    print(f"{len(a['rows'])} figures within {off:.0e}")

@pytest.mark.parametrize('ranks,sets,says', [(1, ('parallel.expert=2',), 'parallel.expert is 2 and there is 1 process: start 2 or a multiple'),
    (2, ('parallel.expert=4',), 'parallel.expert is 4 and there are 2 processes'), (1, ('parallel.expert=3',), 'has 8 experts in a layer: give a divisor'),
    (2, ('parallel.expert=2','model.moe.experts=0'), 'has 0 experts in a layer')])
def test_refused(home, tmp_path, ranks, sets, says):
    said = home.start(tmp_path/'x', *sets, ranks=ranks).end(*[1]*ranks); assert says in said and 'Traceback' not in said, said
    print(re.sub(r'\n.*', '', said, flags=re.S))
