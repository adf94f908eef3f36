"The recipe of the small model, on a small folder of the layout it reads: every stage, a kill, and what it leaves out."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, zstandard

from chroma_moe.encoder import ChromaMoE
from chroma_moe.world import World

HOME = Path(__file__).parents[1]
SMALL = ['model.vocab_size=1500', 'model.dim=48', 'model.pooling.out_dim=48', 'model.attention.heads=2', 'model.attention.kv_rank=16',
         'model.attention.nope_dim=8', 'model.attention.rope_dim=8', 'model.attention.v_dim=16', 'model.moe.shared_dim=32', 'model.moe.expert_dim=16',
         'tune.batch_pairs=64', 'train.save_every=4', 'train.precision=fp32', 'tokenizer.terms=false']

def lines(path, rows):
    text = ''.join(json.dumps(r)+'\n' for r in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(text) if path.suffix=='.zst' else text)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A corpus of two sources, pairs of three, one dev set; one judged document stands in the corpus, and one is the answer of a training pair."
    home,world = tmp_path_factory.mktemp('mini'),World()
    texts = [dict(text=r['text'], domain='finance', source='uscode_x' if i%2 else 'products_x') for i,r in enumerate(world.texts('300'))]
    source = ['product_match_x', 'howto_x', 'howto_x']
    rows = [dict(query=r['query'], positive=r['positive'], negatives=r['negatives'][:2], source=source[i%3], domain='shop')
            for i,r in enumerate(world.pairs('300'))]
    names = ['card lost', 'card stolen']
    rows += [dict(query=f'my card is gone, case {i}', positive=names[i%2], negatives=[], source='banking77_intent_name', domain='finance') for i in range(80)]
    test = world.retrieval('shop', queries=30); first,second = list(test['corpus'])[:2]
    judged = {**test['qrels'], 'q': {first: 1., second: 1.}}
    texts.append(dict(text=test['corpus'][first], domain='retail', source='uscode_x')); rows.append(rows[1]|dict(positive=test['corpus'][second]))
    lines(home/'corpus'/'pretrain.jsonl.zst', texts); lines(home/'train'/'pairs.jsonl.zst', rows)
    at = home/'retrieval'/'shop'
    lines(at/'corpus.jsonl.zst', [dict(_id=k, text=v) for k,v in test['corpus'].items()])
    lines(at/'queries.jsonl', [dict(_id=k, text=v) for k,v in {**test['queries'], 'q': 'something to wear in winter'}.items()])
    grades = ''.join(f'{q}\t{d}\t{max(1, round(g))}\n' for q,of in judged.items() for d,g in of.items() if g>0)
    (at/'qrels.tsv').write_text('query-id\tcorpus-id\tscore\n' + grades)
    return home, test['corpus'][first], test['corpus'][second]

def command(folder, out, *more):
    sets = [x for s in SMALL for x in ('--set', s)]
    short = ['--steps', '0.02', '--bags', '2', '--least', '0']
    return [sys.executable, str(HOME/'recipes'/'mini'/'run.py'), '--data', str(folder), '--out', str(out), *short, *sets, *more]

def rows_of(path): return [json.loads(l) for l in path.read_text().splitlines()]

def test_strict_and_licensed(folder, tmp_path):
    "What the dev sets are judged on goes, as text and as answer; sources without clear terms go by name; messages of one intent ask the same."
    home,text,answer = folder
    subprocess.run(command(home, tmp_path/'all', '--until', 'data'), check=True, capture_output=True)
    subprocess.run(command(home, tmp_path/'strict', '--until', 'data', '--strict', '--licensed', '--without', 'tatqa'), check=True, capture_output=True)
    texts,rows = rows_of(tmp_path/'all'/'data'/'texts.jsonl'),rows_of(tmp_path/'all'/'data'/'pairs.jsonl')
    assert len(texts)==301 and len(rows)==379 and text in {r['text'] for r in texts} and answer in {r['positive'] for r in rows}
    texts,rows = rows_of(tmp_path/'strict'/'data'/'texts.jsonl'),rows_of(tmp_path/'strict'/'data'/'pairs.jsonl')
    assert text not in {r['text'] for r in texts} and answer not in {r['positive'] for r in rows}
    assert {r['source'] for r in texts}=={'uscode_x'} and {r['source'] for r in rows}=={'howto_x', 'banking77_intent_name'}
    assert {r['query_id'] for r in rows if r['source'].startswith('banking77')}=={'card lost', 'card stolen'}

def test_from_rows_to_scores(folder, tmp_path):
    "One command, killed in the middle and started again, ends with a model folder, its card and its scores."
    out,env = tmp_path/'run',os.environ|dict(OMP_NUM_THREADS='1')
    with open(tmp_path/'said', 'w') as said:
        run = subprocess.Popen(command(folder[0], out, '--crops', '2', '--least', '500'), stdout=said, stderr=said, env=env, start_new_session=True)
        while run.poll() is None and not (out/'bag1'/'checkpoints').exists(): time.sleep(.1)
        time.sleep(.3); assert run.poll() is None, (tmp_path/'said').read_text()
        os.killpg(run.pid, signal.SIGKILL); run.wait()
    assert (out/'bag0'/'model.safetensors').exists(), (tmp_path/'said').read_text()
    before = (out/'bag0'/'model.safetensors').stat().st_mtime_ns
    again = subprocess.run(command(folder[0], out, '--crops', '2', '--least', '500'), capture_output=True, text=True, env=env)
    assert again.returncode==0, again.stdout+again.stderr
    assert '[bag0] is there' in again.stdout and (out/'bag0'/'model.safetensors').stat().st_mtime_ns==before
    own = rows_of(out/'own.jsonl'); assert len(own)>2000 and len({r['query'] for r in own})>1900   # 151 and 150 texts: four turns each
    chroma = ChromaMoE.from_pretrained(out/'model')
    assert chroma.max_length==1024 and [p['phase'] for p in chroma.about['training']]==['bag of token vectors']*2+['joining']
    card = (out/'model'/'README.md').read_text(); assert '| shop |' in card and 'ndcg@10' in card and 'BM25' in card
    found = {r['system'] for r in json.loads((out/'scores'/'results.json').read_text())['rows']}
    assert {'model', 'BM25', 'hybrid 0.5'} <= found

@pytest.mark.long
def test_with_the_transformer(folder, tmp_path):
    "The transformer goes on from the joined bag, and the model is the mean of the two; bags are trained side by side."
    out,env = tmp_path/'run',os.environ|dict(OMP_NUM_THREADS='1')
    subprocess.run(command(folder[0], out, '--transformer', '--at_once', '2', '--until', 'model'), check=True, capture_output=True, env=env)
    chroma = ChromaMoE.from_pretrained(out/'model_transformer')
    assert [p['phase'] for p in chroma.about['training']]==['bag of token vectors']*2+['joining','tuning','averaging']
    assert not chroma.model.blocks[0].silent

def test_bad_folder(tmp_path):
    "A folder without the files is refused in a sentence, by the stage that wanted them."
    run = subprocess.run(command(tmp_path, tmp_path/'out'), capture_output=True, text=True)
    assert run.returncode!=0 and '[data] ended with code' in run.stderr and 'there is no file or folder' in (tmp_path/'out'/'data.log').read_text()

def test_shipped(tmp_path):
    "The model that lies in the repository loads, searches, and says what it was made of and under which terms."
    where = HOME/'models'/'chroma-mini'; card = (where/'README.md').read_text(encoding='utf-8')
    assert sum(p.stat().st_size for p in where.iterdir()) <= 20e6
    chroma = ChromaMoE.from_pretrained(where); about = chroma.about
    assert about['license']=='cc-by-4.0' and [r['phase'] for r in about['training']]==['bag of token vectors']*4+['joining']
    assert '--strict --licensed' in card and 'CC BY 4.0' in card and not any(p in card for p in ('/work','/tmp','/home','/root'))
    texts = dict(card='I ordered a debit card two weeks ago and it is still not here',
                 claim='A creditor may file a proof of claim; the court may disallow it if it is late.',
                 shoe='Lightweight trainers for runners, breathable mesh, cushioned sole',
                 sales='Revenues of the segment rose by 12% to $48 million in fiscal 2018.')
    asked = dict(card='my new card has not arrived', claim='disallowance of claims of creditors', shoe='running shoes',
                 sales='how much did segment revenue grow in 2018?')
    for k,q in asked.items(): assert chroma.search(q, list(texts.values()), top_k=1)[0]['text']==texts[k], q
    lines(tmp_path/'texts.jsonl', [dict(text=t) for t in texts.values()])
    said = subprocess.run([sys.executable, '-m', 'chroma_moe.searching', '--model', str(where), '--input', str(tmp_path/'texts.jsonl'),
                           '--query', 'running shoes', '--top_k', '1', '--json'], capture_output=True, text=True)
    assert 'trainers' in said.stdout, said.stderr
