"Files under final names: no room for them, a death before every change to the disk, and two who write one card."
import json, os, resource, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np, pytest, torch
from test_checkpoints import die_at, names

from chroma_moe.card import add_scores, read_about
from chroma_moe.config import ChromaError, load_config
from chroma_moe.curves import chroma_plot
from chroma_moe.encoder import ChromaMoE
from chroma_moe.indexing import Index, IndexWriter
from chroma_moe.mining import Corpus
from chroma_moe.model import ChromaModel, save_model
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.training import check_out

ROOT = Path(__file__).parents[1]
M = load_config(profile='tiny', sets=['model.vocab_size=400', 'model.dim=64', 'model.layers=1']).model

@contextmanager
def no_larger(size):
    "The system refuses to let a file grow beyond a size, as it does when a disk or a quota is full."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])); yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

@pytest.fixture(scope='module')
def chroma(): return ChromaMoE(ChromaModel(M), ChromaTokenizer.train(['red running shoes', 'revenue rose 12%']*20, 400), 64)

@pytest.mark.parametrize('rows', [60, 3000])                                  # less and more than the buffer of a C library
def test_no_room_for_an_index(tmp_path, rows):
    "numpy, left to itself, does not notice: the part would be cut short, and its checksum that of what is left."
    v = np.eye(8, dtype=np.float32)[np.arange(rows)%8]
    w = IndexWriter(tmp_path/'i', 'abc', 'float32', 8, {})
    with no_larger(v.nbytes-100), pytest.raises(ChromaError, match=r'vectors-00000.npy.*cannot be written \(File too large\)'): w.add(v, [{}]*rows)
    assert not [n for n in names(tmp_path/'i') if n.startswith('vectors')] and not w.done
    w.add(v, [{}]*rows); w.finish(); assert len(Index.open(tmp_path/'i', verify=True))==rows
    print('refused, and written when there was room')

@pytest.mark.parametrize('texts', [40, 4000])
def test_no_room_for_a_corpus(tmp_path, texts):
    with no_larger(8*texts-50), pytest.raises(OSError, match='File too large'): Corpus.build([[f'{i}' for i in range(texts)]], tmp_path)

def test_no_room_for_a_model(chroma, tmp_path):
    "A model that is there is not touched."
    chroma.save_pretrained(tmp_path/'m'); before = {n: (tmp_path/'m'/n).read_bytes() for n in names(tmp_path/'m')}
    other = ChromaMoE(ChromaModel(M, seed=5), chroma.tokenizer, 64)
    for folder in ('m','new'):
        with no_larger(50_000), pytest.raises(ChromaError, match='cannot be written.*File too large.*make room there'): other.save_pretrained(tmp_path/folder)
    assert {n: (tmp_path/'m'/n).read_bytes() for n in names(tmp_path/'m')}==before and 'model.safetensors' not in names(tmp_path/'new')
    (tmp_path/'file').write_text('x')
    with pytest.raises(ChromaError, match='cannot be written.*Not a directory'): save_model(other.model, tmp_path/'file'/'m')

def test_no_room_for_a_picture(tmp_path):
    run,out = tmp_path/'run',tmp_path/'c.png'; run.mkdir()
    (run/'metrics.jsonl').write_text(''.join(json.dumps(dict(phase='pretrain', step=i, loss=9/(i+1), tokens=i))+'\n' for i in range(9)))
    out.write_text('the old one')
    with no_larger(3000), pytest.raises(SystemExit, match='cannot be written'): chroma_plot.main([str(run), '--out', str(out)])
    assert out.read_text()=='the old one' and names(tmp_path)==['c.png','run']
    chroma_plot.main([str(run), '--out', str(out)]); assert out.read_bytes()[-8:-4]==b'IEND'

def test_death_while_a_model_is_saved(chroma, tmp_path):
    "Wherever it dies, there is a whole model, or none that would keep a new run out."
    n,found,done = 0,[],False
    while not done:
        n += 1; folder = tmp_path/str(n)
        done = die_at(n, lambda folder=folder: chroma.save_pretrained(folder))
        check_out(folder, False) if 'model.safetensors' not in names(folder) else found.append(n)
        again = ChromaMoE.from_pretrained(folder).model.state_dict() if found else {}
        assert all(torch.equal(w, chroma.model.state_dict()[k]) for k,w in again.items())
        if done: assert not [x for x in names(folder) if x.startswith('.')]
        elif found: chroma.save_pretrained(folder); assert not [x for x in names(folder) if x.startswith('.')]
    assert n>15 and found
    print(f'{n-1} places to die: no model before the last {len(found)} of them, a whole one then')

ADD = '''
import sys
from chroma_moe.card import add_scores
for i in range(6): add_scores(sys.argv[1], [dict(benchmark='b', task=f'{sys.argv[2]}{i}', metric='m', system='s', value=.5)], 's')
'''
def test_two_evaluations_of_one_model(chroma, tmp_path):
    "Both write to its card at once: no score is lost."
    chroma.save_pretrained(tmp_path)
    two = [subprocess.Popen([sys.executable, '-c', ADD, tmp_path, who], env=os.environ|dict(PYTHONPATH=str(ROOT))) for who in 'ab']
    assert [p.wait(120) for p in two]==[0,0]
    assert {r['task'] for r in read_about(tmp_path)['scores']}=={f'{w}{i}' for w in 'ab' for i in range(6)} and '.lock' not in names(tmp_path)
    add_scores(tmp_path, [dict(benchmark='b', task='x', metric='m', system='s', value=.1)], 's')
