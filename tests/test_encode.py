"`chroma_encode` and `chroma_search` as a user runs them, kills among them; small weights and codes in sentence-transformers; the hub out of reach."
import json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

from chroma_moe.config import ChromaError, load_config
from chroma_moe.encode import chroma_encode
from chroma_moe.encoder import ChromaMoE
from chroma_moe.indexing import Index
from chroma_moe.model import ChromaModel
from chroma_moe.precision import dequantise
from chroma_moe.searching import chroma_search
from chroma_moe.tokenizer import HOSTILE, ChromaTokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
ENV = os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
WORDS = 'revenue margin plant quarter red wool shoe sock bond yield fell rose the of in'.split()

def command(name, *args): return [sys.executable, '-m', f'chroma_moe.{name}', *map(str, args)]
def run(name, *args, stdin=''): return subprocess.run(command(name, *args), capture_output=True, text=True, env=ENV, input=stdin, timeout=120)

@pytest.fixture(scope='module')
def h(tmp_path_factory):
    "A model and a collection of 600 texts."
    home = tmp_path_factory.mktemp('encode'); rng = random.Random(0)
    texts = [' '.join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(600)]
    tokenizer = ChromaTokenizer.train(texts, 300)
    ours = ChromaMoE(ChromaModel(load_config(profile='tiny', sets=['model.vocab_size=300']).model), tokenizer, 64, dict(query='find: '))
    ours.save_pretrained(home/'model')
    (home/'texts.jsonl').write_text(''.join(json.dumps(dict(_id=f'd{i}', text=t))+'\n' for i,t in enumerate(texts)))
    return SimpleNamespace(home=home, texts=texts, ours=ours, args=('--model', home/'model', '--input', home/'texts.jsonl'))

def test_killed_run_goes_on(h, capsys):
    "Killed twice while it writes, and tried by two at once: the same bytes in the end."
    args = [*map(str, (*h.args, '--part', 12, '--passage_tokens', 24, '--overlap', 6, '--precision', 'int8', '--output'))]
    chroma_encode.main([*args, str(h.home/'whole')]); whole,out,kills = capsys.readouterr().out,h.home/'parts',0
    for parts in (5, 25):
        p = subprocess.Popen(command('encode', *args, out), env=ENV, stdout=subprocess.DEVNULL)
        while p.poll() is None and len([*out.glob('vectors-*.npy')])<parts: time.sleep(.002)
        p.send_signal(signal.SIGSTOP)                                    # it stands still while another one tries
        with pytest.raises(SystemExit, match='another process is writing'): chroma_encode.main([*args, str(out)])
        p.send_signal(signal.SIGKILL); kills += p.wait()==-signal.SIGKILL
    assert kills==2
    chroma_encode.main([*args, str(out)]); assert capsys.readouterr().out.replace('parts','whole')==whole
    files = {p.name for p in (h.home/'whole').iterdir()}
    assert files=={p.name for p in out.iterdir() if not p.name.startswith('.')}
    assert all((out/n).read_bytes()==(h.home/'whole'/n).read_bytes() for n in files)
    index = Index.open(out, verify=True)
    assert all(h.texts[int(r['id'][1:])][r['start']:r['end']]==r['text'] for r in (index.rows[i] for i in range(0, len(index), 7)))
    print(f'{kills} kills, {len(index)} passages, the same bytes')

def test_search_command(h, capsys, monkeypatch):
    "What the shell prints is what Python finds."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    out = h.home/'index'; chroma_encode.main([*map(str, (*h.args, '--output', out))])
    asked = ['wool sock', 'bond yield fell']
    found = run('searching', '--model', h.home/'model', '--index', out, '--top-k', 3, '--json', stdin='\n'.join(asked))
    assert found.returncode==0, found.stderr
    for line,q in zip(found.stdout.splitlines(), asked):
        want = h.ours.search(q, Index.open(out), 3)
        assert [x['id'] for x in json.loads(line)['hits']]==[x['id'] for x in want] and json.loads(line)['query']==q
    chroma_search.main([*map(str, h.args), '--query', 'wool sock', '--top-k', '1'])
    assert f" d{h.ours.search('wool sock', h.texts, 1)[0]['index']}\n" in capsys.readouterr().out
    for name,args,said in (('search', ('--index', h.home/'none'), 'there is no index'), ('search', (), 'give --index, or --input'),
                           ('encode', ('--input', h.home/'texts.jsonl', '--output', out, '--precision', 'int8'), 'was begun with precision float32'),
                           ('encode', ('--input', h.home/'texts.jsonl', '--output', h.home/'x', '--text', 'body'), "line 1: has no text in 'body'"),
                           ('encode', ('--input', h.home/'texts.jsonl', '--output', h.home/'x', '--model', 'some/model'), 'the hub cannot be reached')):
        f = dict(search=chroma_search, encode=chroma_encode)[name]
        with pytest.raises(SystemExit) as e: f.main([*map(str, () if '--model' in args else ('--model', h.home/'model')), *map(str, args)])
        assert said in str(e.value.code) and '\n' not in e.value.code, e.value.code
    print(f'{len(asked)} questions, 5 refusals of one line')

def test_small_weights_and_codes_in_sentence_transformers(h, tmp_path):
    "bf16 and int8 folders load there too, and its quantisation agrees with ours."
    import chroma_moe.hf                       # noqa: F401, makes the folder known
    from sentence_transformers import SentenceTransformer, quantize_embeddings
    texts,gaps = h.texts[:40],{}
    for weights in ('float32','bfloat16','int8'):
        h.ours.save_pretrained(tmp_path/weights, weights)
        st = SentenceTransformer(str(tmp_path/weights), device='cpu', local_files_only=True, model_kwargs=dict(dtype=torch.float32))
        gaps[weights] = float(np.abs(st.encode(texts)-ChromaMoE.from_pretrained(tmp_path/weights).encode(texts)).max()); assert gaps[weights]<1e-6, gaps
    e = h.ours.encode(texts)
    for p in ('binary','ubinary'): assert (quantize_embeddings(e, p)==h.ours.encode(texts, precision=p)).all()
    assert (dequantise(h.ours.encode(texts, precision='int8'), 'int8')*e).sum(1).min()>.999
    print('gaps', {k: f'{v:.0e}' for k,v in gaps.items()})

def test_threads(h):
    "Eight threads, texts of their own, one model: each gets what it would alone."
    every = [h.texts[i:120:8]+list(HOSTILE[:-1]) for i in range(8)]
    want,got,faults = [h.ours.encode(t) for t in every],[None]*8,[]
    def work(i):
        try:
            for _ in range(2): got[i] = h.ours.encode(every[i], batch_tokens=512); assert np.abs(got[i]-want[i]).max()<1e-5
        except Exception as e: faults.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not faults, faults[0]
    print(f'{8*2} calls, {sum(map(len, every))} texts')

def test_hub_out_of_reach(h, monkeypatch):
    "A name on the hub, loaded and pushed with no hub: one sentence."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for f,said in ((lambda: ChromaMoE.from_pretrained('some/model'), 'give the path of a folder'),
                   (lambda: h.ours.push_to_hub('some/model'), 'could not be put on the hub')):
        with pytest.raises(ChromaError, match=said): f()
    print('both refused')
