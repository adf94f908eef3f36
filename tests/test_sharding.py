"Phase 1 with sharded weights (FSDP2), as whole commands on two CPU processes: the end must be that of one process, or of an undisturbed run."
import re, shutil

import pytest
import yaml

from test_training import EXACT, ROOT, Home, assert_same, furthest, last_step, rows, saved, text_of, wait_for

FSDP = "import os; os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')"                  # what accelerate's config file becomes
# no chance; a dense start, so that a sharded model gets its experts; several parts a step and recomputed blocks; eps so that AdamW does not
# make whole steps of the last digits of gradients that are nearly zero
SETS = (*EXACT, 'model.layers=2', 'pretrain.steps=10', 'pretrain.dense_start=0.4', 'train.micro_tokens=200', 'model.moe.balance=0', 'model.checkpoint=true',
        'optim.eps=1e-3', 'train.keep=9')

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    h = Home(tmp_path_factory.mktemp('home'))
    yield h
    h.nursery.stdin.close(); h.nursery.wait(60)

def sharded(home, out, *sets, resume=False, **kw): return home.start(out, *SETS, *sets, resume=resume, ranks=2, first=FSDP, **kw)

@pytest.fixture(scope='module')
def two(home):
    "The undisturbed sharded run."
    out = home.folder/'two'; said = sharded(home, out).end(); assert 'model written to' in said, said
    return out

def test_equals_one(home, two):
    one = home.whole(*SETS); off = furthest(two, one); assert off<1e-5, off
    a,b = rows(two),rows(one); assert len(a)==len(b) and all(abs(x[k]-y[k])<3e-5 for x,y in zip(a, b) for k in ('loss','eval_loss') if k in x)
    print(f'2 processes with half of the weights each, after {a[-1]["step"]} steps: weights within {off:.0e} of one process')

def test_launched(home, tmp_path):
    "By accelerate, with the recipe's config file, for real; with the check in float64."
    c = yaml.safe_load((ROOT/'recipes'/'accelerate_fsdp.yaml').read_text()); c['num_processes'] = 2
    (tmp_path/'fsdp.yaml').write_text(yaml.safe_dump(c))
    launch = ['accelerate.commands.launch','--config_file',tmp_path/'fsdp.yaml','--main_process_port','0','-m','chroma_moe.pretrain']
    said = text_of(home.shell(launch, '--test_ddp', *home.args(tmp_path/'out')))
    off = re.search('2 processes, sharded, and one agree to (\\S+)', said); assert off and float(off[1])<1e-12, said
    print(off[0])

def test_killed(home, tmp_path, two):
    out = tmp_path/'run'; p = sharded(home, out)
    assert wait_for(p, lambda: last_step(out)>=6); p.kill(); p.end(-9, -9)
    shutil.copytree(out, tmp_path/'alone')
    said = sharded(home, out, resume=True).end(); step = int(re.search(r'resumed at step (\d+) ', said)[1])
    assert_same(out, two)
    said = home.start(tmp_path/'alone', *SETS, resume=True).end(); assert 'saved by 2 processes, resumed by 1' in said and f'resumed at step {step} ' in said
    off = furthest(tmp_path/'alone', two); assert off<1e-5, off
    print(f'killed after step {step}: resumed sharded, the same bits; resumed by one process, within {off:.0e}')

def test_resumed_sharded(home, tmp_path, two):
    "A checkpoint of one process, from before the experts came, goes on sharded."
    out = tmp_path/'run'; shutil.copytree(home.whole(*SETS), out)
    (out/'model.safetensors').unlink(); (out/'config.yaml').unlink(); first = saved(out)[0]
    for name in saved(out)[1:]: shutil.rmtree(out/'checkpoints'/name)
    said = sharded(home, out, resume=True).end(); assert 'saved by 1 processes, resumed by 2' in said and 'resumed at step 3 ' in said, said
    off = furthest(out, two); assert off<1e-5, off
    print(f'saved by one process at {first}, resumed sharded: within {off:.0e}')

def test_refused(home, tmp_path):
    for sets,ranks,first,says in (((), 1, "import os; os.environ['ACCELERATE_USE_DEEPSPEED'] = 'true'", 'use distributed_type: FSDP with fsdp_version: 2'),
                            (('optim.name=muon',), 2, FSDP, 'set optim.name=adamw')):
        said = home.start(tmp_path/'x', *sets, ranks=ranks, first=first).end(*[1]*ranks); assert says in said and 'Traceback' not in said, said
    print(said.strip().splitlines()[-1])
