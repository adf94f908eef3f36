"The plan against what one, two and four processes keep and send, to the byte; and the command."
import json
from pathlib import Path

import pytest

from chroma_moe.parallel import Ranks
from chroma_moe.plan import Layout, chroma_plan, exchange_kept, state_bytes, traffic

from expert_program import measure, planned
from test_training import Home

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    h = Home(tmp_path_factory.mktemp('home'))
    yield h
    h.nursery.stdin.close(); h.nursery.wait(60)

ON_RANKS = '''
import json; sys.path[:0] = [{tests!r}]
from expert_program import measure
from chroma_moe.parallel import start
ranks = start(); got = measure(ranks)
if ranks.main: open({out!r}, 'w').write(json.dumps(got))
ranks.end()
os._exit(0)
'''

@pytest.mark.parametrize('n', [1,2,4])
def test_bytes(home, tmp_path, n):
    "Weights, gradients, moments, what autograd keeps, and every collective."
    if n==1: found = measure(Ranks())
    else:
        home.start('', ranks=n, name='', first=ON_RANKS.format(tests=str(Path(__file__).parent), out=str(tmp_path/'out'))).end()
        found = json.loads((tmp_path/'out').read_text())
    sent = 0
    for key,ranks in found.items():
        name,p,*cut = key.split('.'); c,l = planned(name),Layout(n, int(p), bool(cut)); m = c.model
        assert ranks[0]['kept']==state_bytes(c, l), (key, ranks[0]['kept'], state_bytes(c, l))
        assert all(r['kept'][k]<=v for r in ranks for k,v in state_bytes(c, l).items())
        sizes = dict(all=n, family=l.expert, twins=n//l.expert)
        for r in ranks:
            want = {}
            for s in traffic(c, l, r['tokens'], arrived=r['came']): want[s.how, sizes[s.over]] = want.get((s.how, sizes[s.over]), 0) + s.bytes
            got = {(how,size): v for how,size,v in r['sent']}; assert got==want, (key, got, want); sent += sum(got.values())
        if l.expert>1:
            visits = sum(sum(r['tokens']) for r in ranks)*m.moe.top_k*len(m.moe_layers); assert sum(r['came'] for r in ranks)==visits
            mean = {s.what: s.bytes for s in traffic(c, l, [sum(sum(r['tokens']) for r in ranks)])}['visits']      # as many come as leave
            assert mean==(1+m.checkpoint)*2*visits*4*m.dim
            for r in ranks:
                if 'more' not in r: continue
                tokens,came = r['first']; layers = len(m.moe_layers)
                ends = 4*layers*(m.moe.experts-m.moe.experts//l.expert)                            # where the rows of each expert end: fewer experts
                more = exchange_kept(m, False, layers*tokens*m.moe.top_k, came) - ends
                assert r['more']==more, (key, r['more'], more)
    assert n==1 or sent>0
    print(f'{n} processes, {len(found)} cases and layouts: what is kept and {sent/1e6:.1f} MB that are sent are what the plan says, to the byte')

def test_command(capsys):
    "The recipe for 64 GPUs; the sentences; numbers for programs."
    recipe = Path(__file__).parents[1]/'recipes'/'sixty_four_gpus.yaml'
    chroma_plan.main(['--config', str(recipe), '--gpus', '64']); said = capsys.readouterr().out
    assert '1,500,000,000,000 tokens' in said and 'best that fits: ' in said and 'estimates that no GPU has confirmed' in said
    chroma_plan.main(['--config', str(recipe), '--gpus', '64', '--json', '--price', '3']); d = json.loads(capsys.readouterr().out)
    best = d['layouts'][0]; assert best['fits'] and best['cost']==pytest.approx(best['hours']*64*3) and len(d['layouts'])==14
    assert all(a['step']<=b['step'] for a,b in zip(d['layouts'], d['layouts'][1:]) if a['fits']==b['fits'])
    for args,says in ((['--gpus','0'], 'gpus is 0'), (['--reached','2'], 'reached is 2.0')):
        with pytest.raises(SystemExit) as e: chroma_plan.main(args)
        assert says in e.value.code and '\n' not in e.value.code
    print(said.splitlines()[-1])
