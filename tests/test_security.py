"What a file, a name or a client cannot make this package do: run code, leave its folder, take all memory, tell a secret, or keep the others waiting."
import ast, io, json, os, pickle, re, socket, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from fuzz import TARGETS, make_checkpoint, make_index, make_model, make_store, read_checkpoint, read_index, read_model, read_store_alone, small_model

from chroma_moe.config import ChromaError, load_config, read_yaml, veiled
from chroma_moe.encoder import ChromaMoE
from chroma_moe.indexing import Index

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]

# nothing runs ---------------------------------------------------------------------------------------------------------------------------

ALLOWED = { # (file, call): why it may be there
    ('sink.py', 'subprocess.Popen'): 'the W&B process: our own interpreter and our own words, no shell',
    ('config.py', 'yaml.load'): 'with a loader made from SafeLoader, which builds plain values only',
    ('training.py', 'ctypes.CDLL'): "malloc's own settings, by the C library that Python runs on",
    ('indexing.py', 'np.load'): 'with allow_pickle=False',
    ('evaluate.py', 'importlib.import_module'): 'a module of this package, from a table in that file'}
RUNS = re.compile(r'pickle|marshal|\bshelve\b|\bdill\b|joblib|\beval$|\bexec$|compile$|__import__|import_module|runpy|os\.system|os\.popen|os\.exec|os\.spawn'
                  r'|subprocess|yaml\.(load|unsafe_load|full_load)|torch\.load|numpy\.load|np\.load|ctypes|fromfile|jit\.load|extractall|unpack_archive|tarfile|zipfile')

def calls():
    "(file, dotted name, call) of every call in the package."
    for p in sorted((ROOT/'chroma_moe').glob('*.py')):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if isinstance(n, ast.Call): yield p.name, ast.unparse(n.func), n
            if isinstance(n, ast.Import|ast.ImportFrom):
                for a in n.names: yield p.name, f"import {getattr(n, 'module', None) or ''}.{a.name}", n

def test_no_code_from_data():
    "Whatever could run code is called in the listed places, in the listed ways, and in no other."
    found = {}
    for file,name,call in calls():
        if isinstance(call, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert given.get('shell', 'False')=='False' and given.get('allow_pickle', 'False')=='False', (file, name)
            assert given.get('trust_remote_code', 'False')=='False' and given.get('weights_only', 'True')=='True', file
        if RUNS.search(name) and not name.endswith(('re.compile', 'torch.compile', '.eval')) and not name.startswith('import '):
            found.setdefault((file, name), []).append(call)
        assert not re.match(r'import \.?(pickle|marshal|\bshelve\b|\bdill\b|joblib|runpy|tarfile|zipfile)', name), (file, name)
    extra = {k: v for k,v in found.items() if k not in ALLOWED}
    assert not extra, f'{sorted(extra)} are not in the list of this test: say there why they are safe'
    assert not set(ALLOWED)-set(found), f'{sorted(set(ALLOWED)-set(found))} are gone: take them out of the list'
    for (_,name),uses in found.items():
        for c in uses:
            given = {k.arg: ast.unparse(k.value) for k in c.keywords}
            if name=='np.load': assert given['allow_pickle']=='False'
            if name=='yaml.load': assert ast.unparse(c.args[1])=='_Loader'
    print(f'{len(found)} kinds of call that could run code, each in the list with its reason')

class Bomb:
    "Unpickled, it would make a file."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mknod, (self.path,)

@pytest.fixture
def mark(tmp_path): return tmp_path/'the bomb went off'

NAMES = ('pytorch_model.bin','model.pt','model.pkl','optimizer.pt','training_args.bin','scheduler.pt','rng_state.pth','model.ckpt','adapter_model.bin',
    'data.pickle')

@pytest.mark.parametrize('make,read', [(make_model, read_model), (make_checkpoint, read_checkpoint), (make_store, read_store_alone), (make_index, read_index)],
                         ids=['model','checkpoint','store','index'])
def test_pickles_are_not_opened(tmp_path, mark, make, read):
    "Beside the files, and in their place."
    home = tmp_path/'x'; home.mkdir(); make(home)
    right,bomb = read(home),pickle.dumps(Bomb(mark))
    folders = {p.parent for p in home.rglob('*') if p.is_file()}
    for f in folders:
        for name in NAMES: (f/name).write_bytes(bomb); torch.save(Bomb(mark), f/('torch_'+name))
    assert str(read(home))==str(right) or make is make_checkpoint
    for p in [p for p in home.rglob('*') if p.is_file() and not p.name.endswith(NAMES)]:
        whole = p.read_bytes()
        for content in (bomb, pickle.dumps({'a': Bomb(mark)}, 0), torch_bytes(Bomb(mark))):
            p.write_bytes(content)
            try: read(home)
            except ChromaError: pass
        p.write_bytes(whole)
    assert not mark.exists()
    pickle.loads(bomb); assert mark.exists()                                              # it was a live one

def torch_bytes(x): b = io.BytesIO(); torch.save(x, b); return b.getvalue()

def test_numpy_objects(tmp_path, mark):
    "An array of objects is a pickle too; and a header that lies about its size takes no memory."
    make_index(tmp_path); v = tmp_path/'index'/'vectors-00000.npy'
    for content in (npy(np.array([[Bomb(mark)]*16]*40, object), True), npy(np.zeros((40, 16)), shape=(2**40, 2**20)), npy(np.zeros((40, 16)), shape=(-1, 16)),
                    npy(np.zeros((40, 16)), descr="__import__('os').mknod('x')")):
        v.write_bytes(content); TARGETS['index resealed'].after(SimpleNamespace(), tmp_path)
        with pytest.raises(ChromaError): read_index(tmp_path)
    assert not mark.exists()

def npy(a, pickled=False, **head):
    b = io.BytesIO(); np.save(b, a, allow_pickle=pickled); b = b.getvalue()
    if not head: return b
    h = {'descr': '<f8', 'fortran_order': False, 'shape': a.shape}|head
    text = (repr(h) if 'import' not in str(h) else "{'descr': %s, 'fortran_order': False, 'shape': (40, 16), }" % head['descr']).encode()
    text += b' '*(-(len(text)+11)%64)+b'\n'
    return b[:8]+len(text).to_bytes(2, 'little')+text+a.tobytes()

def test_lying_sizes(tmp_path):
    "A header of weights that promises more than the file holds."
    make_model(tmp_path); p = tmp_path/'model.safetensors'; whole = p.read_bytes(); n = int.from_bytes(whole[:8], 'little'); head = json.loads(whole[8:8+n])
    name = next(k for k in head if k!='__metadata__')
    for new in (dict(shape=[2**40, 2**20]), dict(shape=[2**63]), dict(shape=[-1]), dict(data_offsets=[0, 2**50]), dict(data_offsets=[0, 2]),
        dict(dtype='OBJECT')):
        text = json.dumps(head|{name: head[name]|new}).encode(); p.write_bytes(len(text).to_bytes(8, 'little')+text+whole[8+n:])
        with pytest.raises(ChromaError, match='model.safetensors'): ChromaMoE.from_pretrained(tmp_path)
    p.write_bytes((2**60).to_bytes(8, 'little')+whole[8:])
    with pytest.raises(ChromaError, match='model.safetensors'): ChromaMoE.from_pretrained(tmp_path)

def test_foreign_modules(tmp_path, mark, monkeypatch):
    "A model folder that names code, its own or another's, is read without a look at it."
    make_model(tmp_path); right = read_model(tmp_path)
    (tmp_path/'evil.py').write_text(f'import os; os.mknod({str(mark)!r})'); monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path/'modules.json').write_text(json.dumps([dict(idx=0, name='0', path='../../..', type='evil.Module'), dict(idx=1, name='1', path='/etc',
        type='os.system')]))
    config = json.loads((tmp_path/'config.json').read_text())
    (tmp_path/'config.json').write_text(json.dumps(config|dict(auto_map=dict(AutoModel='evil.Module', AutoConfig='evil--x.y'), custom_code=True,
        trust_remote_code=True)))
    assert (read_model(tmp_path)==right).all() and not mark.exists() and 'evil' not in sys.modules

@pytest.mark.parametrize('text', ['!!python/object/apply:os.mknod ["{}"]', '!!python/object/new:os.mknod ["{}"]', '!!python/name:os.mknod',
    '!!python/module:os',
                                  '!!python/object/apply:subprocess.call [["touch", "{}"]]', '!<tag:yaml.org,2002:python/object/apply:os.mknod> ["{}"]'])
def test_yaml_tags(text, tmp_path, mark):
    "In settings, in --set, in prompts and on a card."
    from chroma_moe.card import take_apart
    from chroma_moe.synthesis import read_prompts
    text = text.replace('{}', str(mark)); p = tmp_path/'c.yaml'; p.write_text(f'train:\n  seed: {text}\n')
    for f in (lambda: load_config(p), lambda: load_config(sets=[f'train.seed={text}']), lambda: read_prompts(p), lambda: read_yaml(text)):
        with pytest.raises(ChromaError, match='not valid YAML'): f()
    assert take_apart(f'---\na: {text}\n---\nbody')[0]=={} and not mark.exists()

def test_yaml_bombs(tmp_path):
    start = time.process_time()
    bomb = 'a: &a [x,x,x,x,x,x,x,x,x]\n'+''.join(f'{chr(98+i)}: &{chr(98+i)} [{",".join([f"*{chr(97+i)}"]*9)}]\n' for i in range(20))
    with pytest.raises(ChromaError, match='write it out'): read_yaml(bomb)
    assert time.process_time()-start<2

def test_code_of_a_hub(monkeypatch):
    "What is fetched of a model is weights, JSON and a card; no code, no pickle."
    asked = {}
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, **kw: asked.update(kw) or '/tmp')
    from chroma_moe.encoder import fetch
    fetch('someone/model'); assert asked['allow_patterns']==['*.json','*.safetensors','README.md']

def test_baselines_bring_no_code(tmp_path, mark):
    "sentence-transformers would import what lies in a local folder; we refuse it first."
    from chroma_moe.systems import library_model
    (tmp_path/'evil.py').write_text(f'import os; os.mknod({str(mark)!r})')
    for modules in ([dict(idx=0, name='0', path='', type='evil.Module')], [dict(type='os.system')], [3], {}, 'x'):
        (tmp_path/'modules.json').write_text(json.dumps(modules))
        with pytest.raises(ChromaError, match='modules.json'): library_model(tmp_path)
    assert not mark.exists()

# nothing leaves its folder --------------------------------------------------------------------------------------------------------------

PATHS = ('../secret', '../../secret', '/etc/passwd', 'a/../../secret', './x', 'chunk_00000/../../secret', '..', '.', '', 'x\0y', '~/secret', 'C:\\secret',
    '\\\\host\\share')

def test_names_in_manifests(tmp_path):
    "A store, a checkpoint and an index whose lists name files elsewhere, with checksums that fit."
    from chroma_moe.checkpoints import Checkpoints, _sealed, verify_checkpoint
    from chroma_moe.store import TokenStore, _canonical, _sha
    make_store(tmp_path); make_checkpoint(tmp_path); make_index(tmp_path); store,step,index = tmp_path/'store', tmp_path/'ck'/'step-00000003', tmp_path/'index'
    for kind in ('tokens','index'): (tmp_path/f'secret.{kind}').write_bytes((store/f'chunk_00000.{kind}').read_bytes())
    for name in PATHS:
        m = json.loads((store/'manifest.json').read_text()); m.pop('sha256'); m['chunks'][0]['name'] = name
        with changed(store/'manifest.json', json.dumps(m|dict(sha256=_sha(_canonical(m))))), pytest.raises(ChromaError,
            match='not what this package writes'): TokenStore(store)
        m = json.loads((step/'manifest.json').read_text()); m.pop('sha256'); m['files'][name] = m['files'].pop('model.safetensors')
        with changed(step/'manifest.json', _sealed(m).decode()):
            assert verify_checkpoint(step)
            with pytest.raises(ChromaError): Checkpoints(tmp_path/'ck').load(step)
        d = json.loads((index/'index.json').read_text()); d['files'][name] = d['files'].pop('rows-00000.jsonl')
        with changed(index/'index.json', json.dumps(d)), pytest.raises(ChromaError): Index.open(index)

class changed:
    "A file with other content for a while."
    def __init__(self, path, text): self.path,self.whole = path,path.read_bytes(); path.write_text(text)
    def __enter__(self): return self.path
    def __exit__(self, *_): self.path.write_bytes(self.whole)

def test_links(tmp_path):
    "A file that is written replaces a link and leaves alone what it points to; a folder that is cleared loses links, not what is behind them."
    from chroma_moe.files import write_whole
    outside = tmp_path/'outside'; outside.mkdir(); precious = outside/'precious'; precious.write_text('mine')
    model = tmp_path/'model'; model.mkdir()
    for name in ('config.json','model.safetensors','tokenizer.json','README.md','about.json'): (model/name).symlink_to(precious)
    small_model().save_pretrained(model); assert precious.read_text()=='mine' and not any(p.is_symlink() for p in model.iterdir())
    (tmp_path/'f').symlink_to(precious); write_whole(tmp_path/'f', 'new'); assert precious.read_text()=='mine'
    from chroma_moe.demo import Stages
    (run := tmp_path/'run').mkdir(); Stages(run, load_config(profile='tiny'))
    for name in ('tokenizer','model'): (run/name).symlink_to(outside)
    (run/'metrics.jsonl').symlink_to(precious); s = Stages(run, load_config(profile='tiny'), overwrite=True)
    assert precious.read_text()=='mine' and outside.is_dir() and s.out.is_dir()

# nothing is told ------------------------------------------------------------------------------------------------------------------------

SECRETS = dict(HF_TOKEN='hf_plantedAAAAAAAAAAAAAAAAAAAAAAAAAAAAA', WANDB_API_KEY='b7'*20, OPENAI_API_KEY='sk-planted-0123456789abcdef',
    CHROMA_API_KEY='sk-served-0123456789abcdef',
               WANDB_BASE_URL='http://someone:pw-planted-1@127.0.0.1:9', HF_ENDPOINT='http://someone:pw-planted-2@127.0.0.1:9',
                   HTTPS_PROXY='http://someone:pw-planted-3@127.0.0.1:9',
               OPENAI_BASE_URL='', WANDB_MODE='offline')
TOLD = [s for k,s in SECRETS.items() if k.endswith(('KEY','TOKEN'))]+['pw-planted-1','pw-planted-2','pw-planted-3','pw-planted-4','someone:']

def leaks(text): return [s for s in TOLD if s in text]
def run(home, module, *args, **env):
    "Output and files of a command with secrets in its environment."
    p = subprocess.run([sys.executable, '-m', f'chroma_moe.{module}', *map(str, args)], cwd=home, capture_output=True, text=True, timeout=400,
                       env=os.environ|SECRETS|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MPLBACKEND='agg')|env)
    assert 'Traceback' not in p.stderr and not leaks(p.stdout+p.stderr), (module, leaks(p.stdout+p.stderr), p.stdout[-500:], p.stderr[-1500:])
    return p
def held(home):
    "Files that hold a secret."
    return [(p, leaks(p.read_bytes().decode('latin1'))) for p in home.rglob('*') if p.is_file() and leaks(p.read_bytes().decode('latin1'))]

class Rude(BaseHTTPRequestHandler):
    "A server that repeats every secret it hears in its complaints."
    def do_POST(self):
        said = f"wrong: {self.headers.get('Authorization')} {self.path}".encode(); self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(self.server.status); self.send_header('Content-Length', str(len(said))); self.end_headers(); self.wfile.write(said)
    def log_message(self, *_): pass

def test_secrets(tmp_path):
    "Commands with secrets in the environment, answered by servers that shout them: no output and no file has one."
    make_model(tmp_path); (tmp_path/'t.jsonl').write_text('{"text": "red wool socks for cold days"}\n')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Rude); threading.Thread(target=server.serve_forever, daemon=True).start(); port = server.server_port
    args = ('--source', 't.jsonl', '--model', 'm', '--retries', 0, '--timeout', 5, '--no_progress', '--report', 'report.json')
    server.status = 401; p = run(tmp_path, 'synthesis', *args, '--url', f'http://127.0.0.1:{port}/v1')
    assert p.returncode and 'HTTP 401 (wrong: Bearer ***' in p.stderr, p.stderr
    p = run(tmp_path, 'synthesis', *args, '--url', f'http://someone:pw-planted-4@127.0.0.1:{port}/v1'); assert 'holds a user or a password' in p.stderr
    server.shutdown(); server.server_close()
    p = run(tmp_path, 'searching', '--model', 'nobody/nothing', '--input', 't.jsonl', '--query', 'red'); assert 'cannot be' in p.stderr
    run(tmp_path, 'encode', '--model', '.', '--input', 't.jsonl', '--output', 'index', '--no_progress')
    assert not held(tmp_path), held(tmp_path)
    print(f'{len(TOLD)} planted secrets, four commands: in no output and no file')

@pytest.mark.long
def test_secrets_of_training(tmp_path):
    "Both phases at debug size with W&B switched on, and everything they leave behind: logs, settings, checkpoints, cards, W&B's own folder."
    small = [w for s in ('pretrain.steps=4', 'train.log_every=1', 'data.size=200', 'wandb.enabled=true', 'tune.steps=2',
        'tune.batch_pairs=8') for w in ('--set', s)]
    run(tmp_path, 'tokenizer', '--profile', 'tiny', '--debug', '--out', 'tok')
    p = run(tmp_path, 'pretrain', '--profile', 'tiny', *small, '--set', 'tokenizer.path=tok', '--out', 'pre'); assert not p.returncode, p.stderr
    p = run(tmp_path, 'tune', '--profile', 'tiny', *small, '--pretrained', 'pre', '--out', 'tuned'); assert not p.returncode, p.stderr
    assert (tmp_path/'tuned'/'model.safetensors').is_file() and not held(tmp_path), held(tmp_path)

def test_addresses_in_messages(capsys):
    from chroma_moe.sink import say
    for text in ('http://me:pw@host/x', 'cannot reach https://me:p%40w@host:80/y?z=a@b.',
        'a hf://me:pw@x and b ftp://u:p@h/'): assert 'pw' not in veiled(text) and 'me:' not in veiled(text)
    assert str(ChromaError('http://me:pw@host'))=='http://***@host' and veiled('mail me@host, see http://host/a@b')=='mail me@host, see http://host/a@b'
    say('http://me:pw@host does not answer'); assert 'pw' not in capsys.readouterr().err

# nobody keeps the others waiting --------------------------------------------------------------------------------------------------------

def test_slow_clients_make_room():
    "Ninety clients that send a byte now and then, on forty places, with and without a body: another is answered at once, and memory and files stay bounded."
    from chroma_moe import serving
    pytest.importorskip('uvicorn'); pytest.importorskip('starlette'); import http.client
    service = serving.Service(small_model(), limits=serving.Limits(connections=40, requests=8, read=60,
        idle=60)); body = json.dumps(dict(model='chroma-moe', input='red')).encode()
    head = lambda n: f'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {n}\r\n\r\n'.encode()
    with serving.serving(service) as url:
        port,slow,stop = int(url.rpartition(':')[2]),[],threading.Event()
        def ask():
            c = http.client.HTTPConnection('127.0.0.1', port, timeout=20); c.request('POST', '/v1/embeddings', body,
                {'Content-Type': 'application/json'}); r = c.getresponse(); r.read(); c.close(); return r.status
        for i in range(90): # half stop in the head, half in the body
            s = socket.create_connection(('127.0.0.1', port)); s.sendall(head(99)[:30] if i%2 else head(99)+b'{"mod'); slow.append(s)
        def drip():
            while not stop.wait(.2):
                for s in slow:
                    try: s.sendall(b'x' if s else b'')
                    except OSError: pass
        t = threading.Thread(target=drip); t.start(); times = []
        try:
            for _ in range(5): start = time.monotonic(); assert ask()==200; times.append(time.monotonic()-start)
            junk = socket.create_connection(('127.0.0.1', port)); junk.sendall(b'\x00\xffGET GET / \r\n\r\n'); assert b' 400 ' in junk.recv(200); junk.close()
            assert ask()==200 and service.health()['open']==0
        finally: stop.set(); t.join(); [s.close() for s in slow]
    assert max(times)<10, times
    print(f'90 slow clients on 40 places: others answered in {max(times):.2f} s at most')

def test_loopback_by_default():
    import inspect
    from chroma_moe.serving import Limits, chroma_serve
    assert inspect.signature(chroma_serve).parameters['host'].default=='127.0.0.1'
    assert all(0<getattr(Limits(), k)<1e8 for k in ('body','texts','characters','total','read','answer','idle','connections','requests','waiting'))
