"The recipes as they are shipped: files that load, commands that parse, and a README whose arithmetic is what the code computes."
import importlib.util, re, shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest, torch

from chroma_moe.config import count_params, flops_per_token, load_config, memory_bytes

HOME = Path(__file__).parents[1]/'recipes'
TEXT = (HOME/'README.md').read_text()
RUNS = sorted(p.stem for p in HOME.glob('*.yaml') if not p.stem.startswith('accelerate_'))
LAUNCHES = dict(accelerate_1gpu=('NO', 1, 1), accelerate_8gpu=('MULTI_GPU', 1, 8), accelerate_64gpu=('MULTI_GPU', 8, 64), accelerate_fsdp=('FSDP', 1, 8))

@pytest.fixture(scope='module')
def arithmetic():
    spec = importlib.util.spec_from_file_location('arithmetic', HOME/'arithmetic.py'); module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_run_configs(arithmetic):
    assert RUNS==sorted(arithmetic.RECIPES)
    c = {name: load_config(HOME/f'{name}.yaml') for name in RUNS}
    assert [c[n].active_model_profile for n in ('laptop','one_gpu','eight_gpus','sixty_four_gpus')]==['tiny','debug','full','full']
    for x in c.values():
        profile = load_config(profile=x.active_model_profile)
        for phase in ('pretrain','tune'):
            for k in ('lr','min_lr','warmup'): assert getattr(getattr(x, phase), k)==getattr(getattr(profile, phase), k)   # a recipe invents no rates
        assert x.pretrain.dense_start==(0.1 if x.active_model_profile=='full' else 0)
    print(f'{len(c)} configurations load')

def test_launch_configs():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    assert sorted(LAUNCHES)==sorted(p.stem for p in HOME.glob('accelerate_*.yaml'))
    for name,(kind,machines,processes) in LAUNCHES.items():
        c = load_config_from_file(str(HOME/f'{name}.yaml')); assert (c.distributed_type, c.num_machines, c.num_processes)==(kind, machines, processes)
        args,*_ = _validate_launch_command(launch_command_parser().parse_args(['--config_file', str(HOME/f'{name}.yaml'), '--main_process_port', '0', 'x.py']))
        if machines>1: args.machine_rank = 1                                                     # machine 0 would look for its port
        if processes>1:
            env = prepare_multi_gpu_env(args); assert args.nproc_per_node=='8' and env['ACCELERATE_MIXED_PRECISION']=='no'
            assert (env.get('ACCELERATE_USE_FSDP'), env.get('FSDP_VERSION'))==(('true','2') if kind=='FSDP' else (None, None))
            assert kind!='FSDP' or env['FSDP_OFFLOAD_PARAMS']==env['FSDP_ACTIVATION_CHECKPOINTING']=='false' and env['FSDP_RESHARD_AFTER_FORWARD']=='true'
    print(f'{len(LAUNCHES)} config files of accelerate: as many processes as they say')

def test_arithmetic(arithmetic):
    "The README's tables are the script's, and the script's figures are those of the configuration."
    table = arithmetic.table(); assert table in TEXT, table
    f,m = arithmetic.figures('eight_gpus'),load_config(HOME/'eight_gpus.yaml').model
    assert f['state']==memory_bytes(m)['training'] and f['checkpoint']==12*count_params(m) and f['tokens']==20_000_000_000
    assert f['hours']==pytest.approx(20e9*flops_per_token(m, 2048, training=True)/(8*990e12*0.25)/3600)
    assert max(f['memory'], f['tune_memory']) < 0.9*80e9 and arithmetic.figures('eight_gpus', True)['memory'] < 0.9*40e9
    assert arithmetic.figures('sixty_four_gpus')['tokens']==1_500_000_000_000
    cut = arithmetic.figures('eight_gpus', True)['memory']
    print(f"full on 8 H100: {arithmetic.told(f['hours'])}, {f['memory']/1e9:.0f} GB each; sharded {cut/1e9:.0f} GB")

def test_phase_2(arithmetic):
    "Its time is shared by the GPUs; the second forward pass costs a third at most, and nothing where a step is one chunk."
    few,many,laptop = (arithmetic.figures(n) for n in ('eight_gpus','sixty_four_gpus','laptop'))
    m = load_config(HOME/'eight_gpus.yaml').model
    assert few['pairs']==many['pairs']==16384 and laptop['chunks']==laptop['passes']==1
    for f in (few, many):
        share = 16384*252/f['devices']; assert (f['chunks']-1)*32768 < share <= f['chunks']*32768
        assert f['passes']==pytest.approx((4*f['chunks']-1)/(3*f['chunks'])) and 1 < f['passes'] < 4/3
        assert f['tune_hours']==pytest.approx(f['passes']*f['tune_tokens']*flops_per_token(m, 120, training=True)/(f['devices']*990e12*0.25)/3600)
        assert f['tune_memory']==f['state']+f['half']+f['tune_kept']+f['contrast'] < 0.9*80e9
    print(f"16,384 pairs a step, 8 H100: {few['chunks']} chunks, {arithmetic.told(few['tune_hours'])}, {few['tune_memory']/1e9:.0f} GB each")

@dataclass(frozen=True)
class Slice:
    start:int
    stop:int
    def __len__(self): return self.stop-self.start

class Part(NamedTuple):
    batch:object
    terms:int
    tokens:int

@pytest.mark.parametrize('pairs,negatives', [(512,1), (1024,0), (512,3)])
def test_memory_of_the_loss(arithmetic, pairs, negatives):
    "A step of GradCache without a model allocates what the script says."
    from chroma_moe.gradcache import Batch, GradCache, Rows
    from chroma_moe.losses import Contrast, Group
    from chroma_moe.parallel import Ranks
    c = load_config(profile='debug', sets=[f'tune.batch_pairs={pairs}', f'tune.negatives={negatives}', 'model.pooling.out_dim=512'])
    documents,one = pairs*(1+negatives),torch.nn.Parameter(torch.ones(1))
    e = torch.nn.functional.normalize(torch.randn(pairs+documents, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    row = torch.arange(pairs).repeat_interleave(1+negatives)
    rows = Rows('infonce', torch.arange(pairs), torch.arange(documents)+pairs, Group(row, torch.ones(documents), torch.arange(pairs), torch.arange(documents)))
    batch = Batch([Slice(0, pairs), Slice(pairs, pairs+documents)], [rows])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        GradCache(Contrast())([Part(batch, pairs, 0)], lambda s: (e[s.start:s.stop]*one, None), Ranks())
    now = peak = 0
    for _,n in sorted((x.start_ns(), x.nbytes()) for x in seen.profiler.kineto_results.events() if x.name()=='[memory]'): now += n; peak = max(peak, now)
    said = arithmetic.contrast(c.model, c.tune)
    assert 0.9*said < peak < 1.02*said, (peak, said)
    print(f'{pairs} pairs, {negatives} negatives each: {peak/1e6:.1f} MB, counted {said/1e6:.1f}')

def test_commands():
    "Every command in the README is one that its parser takes, with files that exist."
    from accelerate.commands.launch import launch_command_parser
    from chroma_moe.pretrain import chroma_pretrain
    from chroma_moe.data import chroma_data
    from chroma_moe.tokenizer import chroma_tokenizer
    from chroma_moe.tune import chroma_tune
    from chroma_moe.averaging import chroma_average
    from chroma_moe.bag import chroma_bag
    from chroma_moe.mining import chroma_mine
    ours = {f.__name__: f for f in (chroma_pretrain, chroma_data, chroma_tokenizer, chroma_tune, chroma_bag, chroma_mine, chroma_average)}; n = 0
    for line in (line for block in re.findall(r'```sh\n(.*?)```', TEXT, re.S) for line in block.splitlines()):
        name,*words = shlex.split(line)
        if name=='python': assert (HOME.parent/words[0]).is_file(); continue                     # tests/test_mini.py runs it
        if name=='accelerate':
            args = launch_command_parser().parse_args(words[1:]); assert args.module and (HOME.parent/args.config_file).is_file()
            name,words = {'chroma_moe.pretrain': 'chroma_pretrain', 'chroma_moe.tune': 'chroma_tune'}[args.training_script],args.training_script_args
        args = vars(ours[name].parser().parse_args(words)); n += 1
        if not args.get('config'): continue                                                      # mining and averaging need none
        assert (HOME.parent/args['config']).is_file()
        c = load_config(HOME.parent/args['config'], sets=args['set'])
        if name=='chroma_data': assert args['out']==c.data.store
    print(f'{n} commands parse')
