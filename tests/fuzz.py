"""Damage every kind of file that the package reads, by the thousand, and watch: a clear error or a right answer, and nothing else.

python tests/fuzz.py --cases 10000 --seed 0 --target store      # or --target all; --write FILE keeps the figures
A case is told by its target, seed and number alone: --case 4711 runs one again and shows what it raises."""
import argparse, faulthandler, gzip, hashlib, json, logging, os, random, resource, shutil, signal, sys, tempfile, time, traceback, warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np, torch

from chroma_moe.config import ChromaError, load_config, to_dict, to_yaml
from nasty import BYTES, VALUES

# damage ---------------------------------------------------------------------------------------------------------------------------------

def _span(rng, n, most=64):
    a = rng.randrange(n+1); return a, min(n, a+rng.choice((1, 2, 4, rng.randrange(1, most+1), n)))

def flip(rng, b):
    out = bytearray(b)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if b else 0): out[rng.randrange(len(b))] ^= 1<<rng.randrange(8)
    return bytes(out)
def cut(rng, b): return b[:rng.randrange(len(b)+1)]
def drop(rng, b): x,y = _span(rng, len(b)); return b[:x]+b[y:]
def repeat(rng, b): x,y = _span(rng, len(b)); return b[:y]+b[x:y]*rng.choice((1, 1, 3, 50))+b[y:]
def swap(rng, b): x,y = sorted(rng.randrange(len(b)+1) for _ in range(2)); n = rng.randrange(1, 9); return b[:x]+b[y:y+n]+b[x+n:y]+b[x:x+n]+b[y+n:]
def insert(rng, b): x = rng.randrange(len(b)+1); return b[:x]+rng.choice(BYTES)+b[x:]
def overwrite(rng, b): x,new = rng.randrange(len(b)+1), rng.choice(BYTES); return b[:x]+new+b[x+len(new):]
def noise(rng, b): x,y = _span(rng, len(b)); return b[:x]+rng.randbytes(y-x)+b[y:]
def number(rng, b):
    "Another number in the place of one."
    found = [i for i in range(len(b)) if b[i:i+1].isdigit() and not b[max(0, i-1):i].isdigit()]
    if not found: return insert(rng, b)
    x = y = rng.choice(found)
    while b[y:y+1].isdigit(): y += 1
    return b[:x]+rng.choice((b'0', b'-1', b'1', b'7', b'4294967296', b'9223372036854775808', b'9'*400, b'1e999', b'1.5', b'NaN', b'"3"', b'null', b'[]'))+b[y:]
def deep(rng, b): x = rng.randrange(len(b)+1); n = rng.choice((500, 5000, 100_000)); return b[:x]+rng.choice((b'[', b'{"a":', b'{', b'- ', b'('))*n+b[x:]
def nothing(rng, b): return rng.choice((b'', b'\n', b'{}', b'[]', b'null', b'0', b'""', b'\x00'*len(b[:4096])))
RAW = (flip, flip, flip, cut, cut, drop, repeat, swap, insert, insert, overwrite, noise, number, number, deep, nothing)

def raw(rng, b): return rng.choice(RAW)(rng, b)

def _places(x, path=()):
    yield path
    for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from _places(v, (*path, k))

def tree(rng, x):
    "Plain values with one place changed."
    if not isinstance(x, (dict,list)): return rng.choice(VALUES)
    x = json.loads(json.dumps(x)); places = [*_places(x)]; at = x
    if len(places)==1: return rng.choice(VALUES)
    *head,last = rng.choice(places[1:])
    for k in head: at = at[k]
    how = rng.randrange(8)
    if not isinstance(at, (dict,list)) or last not in at and not isinstance(at, list): return rng.choice(VALUES)
    if how==0: del at[last]
    elif how==1 and isinstance(at, dict): at[rng.choice(('', 'unknown', '../x', '\ud800', '$tensor', '__class__'))] = at.pop(last)
    elif how==2 and isinstance(at, dict): at[rng.choice(('unknown', '', 'self', 'auto_map', 'code'))] = rng.choice(VALUES)
    elif how==3:
        other = x
        for k in rng.choice(places): other = other[k]
        at[last] = json.loads(json.dumps(other))
    elif how==4 and isinstance(at[last], (int,float)): at[last] = rng.choice((-at[last], at[last]+1, at[last]-1, at[last]*2**16, at[last]/2, str(at[last]),
        bool(at[last])))
    elif how==5: at[last] = [at[last]] if rng.random()<.5 else {'a': at[last]}
    elif how==6: at[last] = '@deep@'
    else: at[last] = rng.choice(VALUES)
    return x

def dumped(rng, x, **kw):
    n = rng.choice((200, 3000, 100_000)); o,c = rng.choice((('[',']'), ('{"a":', '}')))
    return json.dumps(x, **kw).replace('"@deep@"', o*n+'1'+c*n).encode()

def as_json(rng, b): return dumped(rng, tree(rng, json.loads(b)), indent=rng.choice((None, 1)))

def as_lines(rng, b):
    "One line of JSON changed, dropped, doubled, or put elsewhere."
    lines = b.split(b'\n'); i,how = rng.randrange(len(lines)), rng.randrange(5)
    if how==0: del lines[i]
    elif how==1: lines.insert(rng.randrange(len(lines)), lines[i])
    elif how==2: lines[i] = raw(rng, lines[i])
    else: lines[i] = as_json(rng, lines[i]) if lines[i].strip() else raw(rng, b'')
    return b'\n'.join(lines)

BOMB = b'a: &a [x,x,x,x,x,x,x,x,x]\n' + b''.join(b'%c: &%c [%s]\n' % (98+i, 98+i, b','.join([b'*%c' % (97+i)]*9)) for i in range(12))
YAML = (BOMB, b'a: &a [*a]\n', b'&a {a: *a}\n', b'? [a, b]\n: 1\n', b'? {a: b}\n: 1\n', b'x: 2001-99-99\n', b'x: 2001-02-30T25:61:61Z\n', b'x: !!int abc\n',
    b'x: !!float abc\n', b'x: 0b\n',
        b'x: !!timestamp abc\n', b'x: !!python/object/apply:os.system ["true"]\n', b'x: !!python/name:os.system\n', b'<<: 3\n', b'<<: [1]\n',
        b'<<: {seed: 1}\n', b'x: !!set {a}\n',
        b'x: !!omap [a]\n', b'x: !!pairs [a: b]\n', b'x: !!binary "//8="\n', b'x: 190:20:30\n', b'x: .nan\n', b'x: !!bool maybe\n', b'%YAML 9.9\n---\n',
        b'---\na: 1\n---\nb: 2\n',
        b'x: '+b'9'*5000+b'\n', b'x: "\\ud800"\n', b'x: "\\U00110000"\n', b'x: !!null 3\n', b'!!set {a: 1}\n', b'x: !!map [a]\n', b'x: !!seq {a: b}\n',
        b'x: !!str {a: b}\n', b'2: 3\n', b'null: 3\n',
        b'"": 3\n', b'x: 0o9\n', b'x: 1_000_\n', b'x: 0x_\n', b'x: -\n', b'\tx: 1\n')

def as_yaml(rng, b):
    import yaml
    how = rng.randrange(4)
    if how==0: lines = b.split(b'\n'); lines.insert(rng.randrange(len(lines)), rng.choice(YAML).rstrip(b'\n')); return b'\n'.join(lines)
    if how==1: return rng.choice(YAML) + (b if rng.random()<.5 else b'')
    if how==2: return raw(rng, b)
    text = yaml.safe_dump(tree(rng, yaml.safe_load(b)))
    return text.replace("'@deep@'", '@deep@').replace('@deep@', '['*3000+']'*3000).encode('utf-8', 'surrogatepass')

def as_safetensors(rng, b):
    "The header changed, with its length; or the rest."
    if rng.random()<.4: return raw(rng, b)
    n = int.from_bytes(b[:8], 'little'); head = dumped(rng, tree(rng, json.loads(b[8:8+n]))); head += b' '*(-len(head)%8)
    return rng.choice((len(head), len(head), len(head), 2**40, 0)).to_bytes(8, 'little')+head+b[8+n:]

def as_npy(rng, b):
    if rng.random()<.4: return raw(rng, b)
    n = int.from_bytes(b[8:10], 'little'); head = b[10:10+n].decode('latin1')
    a,c = rng.choice((("'<f4'", "'<f8'"), ("'<f4'", "'<i4'"), ("'<f4'", "'|O'"), ("'<f4'", "'<c8'"), ("'<f4'", "[('a','<f4')]"), ('False', 'True'),
        ("'<f4'", "'>f4'"), ('(', '(-'), ('(', '(9'*3000), (', ', '0000000, '),
                      ("'shape': (", "'shape': (2**99, "), ('{', '{**'), ('}', "'x': 1}"), ("'<f4'", "'<M8[s]'"), ("'<f4'", '__import__("os")'), ('(', '[')))
    head = head.replace(a, c, 1).encode('latin1')
    return b[:8]+min(len(head), 65535).to_bytes(2, 'little')+head+b[10+n:]

MUTATORS = {'.json': as_json, '.jsonl': as_lines, '.answers': as_lines, '.yaml': as_yaml, '.safetensors': as_safetensors, '.npy': as_npy}
def damage(rng, name, b):
    "A file with something wrong in it."
    how = MUTATORS.get(Path(name).suffix, raw) if rng.random()<.6 else raw
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try: b = how(rng, b)
        except Exception: b = raw(rng, b)                    # too broken to be changed with care
    return b[:4<<20]

# running --------------------------------------------------------------------------------------------------------------------------------

class Hang(BaseException): "A case took too long."

@dataclass
class Target:
    "One kind of file and what reads it."
    make:Callable              # folder -> None: whole files
    read:Callable              # folder -> plain values, arrays and text
    files:str = '*'            # glob of those that are damaged
    sealed:tuple = ()          # globs of files that a checksum covers: another answer is then a wrong one
    sound:Callable|None = None # (answer) -> whether it can be right, where another one is allowed
    damage:Callable = damage   # (rng, name, bytes) -> bytes
    writes:bool = False        # does reading change the folder?
    after:Callable|None = None # (rng, folder) -> None, once the damage is done: seal it again
    cases:int = 150            # in CI; each takes some milliseconds

TARGETS = {}

def digest(x):
    "A word for an answer."
    def flat(x):
        if isinstance(x, np.ndarray): return [str(x.dtype), x.shape, hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()]
        if isinstance(x, torch.Tensor): return [str(x.dtype), flat(x.detach().reshape(-1).view(torch.uint8).numpy()), tuple(x.shape)]
        if isinstance(x, dict): return [[repr(k), flat(v)] for k,v in x.items()]
        if isinstance(x, (list,tuple)): return [flat(v) for v in x]
        return repr(x)
    return hashlib.sha256(repr(flat(x)).encode('utf-8', 'replace')).hexdigest()

@contextmanager
def bounds(seconds=10, megabytes=2048):
    "Memory that a case may take beside what is taken, and an alarm."
    old = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    def ring(*_): raise Hang(f'no end after {seconds} s')
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (now+(megabytes<<20), old[1]))
    try: yield lambda on: signal.setitimer(signal.ITIMER_REAL, seconds if on else 0)
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before); resource.setrlimit(resource.RLIMIT_AS, old)

def put(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name,b in files.items(): p = folder/name; p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(b)

class Fuzz:
    "The cases of one target."
    def __init__(self, name, seed=0):
        self.name,self.seed,self.t = name,seed,TARGETS[name]
        self.home = Path(tempfile.mkdtemp(prefix=f'fuzz-{name}-', dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None)); self.folder = self.home/'x'
        self.folder.mkdir(); self.t.make(self.folder)
        self.files = {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(self.folder.rglob('*')) if p.is_file()}
        self.names = [n for n in self.files if any(Path(n).match(g) for g in self.t.files.split())]
        self.right = digest(self.t.read(self.folder)); put(self.folder, self.files)
        assert digest(self.t.read(self.folder))==self.right, f'{name}: reading twice gives two answers'
        put(self.folder, self.files)
        self.count = dict(cases=0, refused=0, same=0, other=0, untouched=0, faults=0); self.faults = []

    def close(self): shutil.rmtree(self.home, ignore_errors=True)

    def case(self, i, alarm=lambda on: None):
        "Run case `i`: how it ended, and for a fault what it raised."
        rng = random.Random(f'{self.name} {self.seed} {i}')
        name = rng.choice(self.names); b = self.t.damage(rng, name, self.files[name])
        if b==self.files[name] and not self.t.after: return 'untouched', None, name
        (self.folder/name).write_bytes(b)
        if self.t.after: self.t.after(rng, self.folder)
        alarm(True)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
                warnings.simplefilter('ignore'); found = self.t.read(self.folder)
            alarm(False)
            if digest(found)==self.right: return 'same', None, name
            if any(Path(name).match(g) for g in self.t.sealed): return 'faults', AssertionError('another answer, though a checksum covers the file'), name
            if self.t.sound and not self.t.sound(found): return 'faults', AssertionError(f'an answer that cannot be right: {found!r:.300}'), name
            return 'other', None, name
        except ChromaError as e:
            alarm(False)
            odd = 'an error of no words' if not str(e).strip() else f'an error of {len(str(e)):,} characters' if len(str(e))>3000 else ''
            return ('faults', AssertionError(odd), name) if odd else ('refused', e, name)
        except (Exception, Hang) as e: alarm(False); return 'faults', e, name
        except BaseException as e:
            alarm(False)
            if type(e).__name__!='PanicException': raise
            return 'faults', e, name
        finally:
            if self.t.writes or self.t.after: put(self.folder, self.files)
            else: (self.folder/name).write_bytes(self.files[name])

    def run(self, cases, first=0, seconds=None, seconds_a_case=10):
        "Many cases, within bounds; the faults with their numbers."
        start = time.monotonic()
        with bounds(seconds_a_case) as alarm:
            for i in range(first, first+cases):
                if seconds and time.monotonic()-start>seconds: break
                end,e,name = self.case(i, alarm)
                self.count['cases'] += 1; self.count[end] += 1
                if end=='faults': self.faults.append((i, name, e))
        return self.count

def where(e):
    "The last line of ours that an exception came through."
    frames = [f for f in traceback.extract_tb(e.__traceback__) if '/chroma_moe/' in f.filename]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}' if frames else '-'

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--target', default='all', help=', '.join(TARGETS)); p.add_argument('--cases', type=int, default=1000); p.add_argument('--seed',
        type=int, default=0)
    p.add_argument('--case', type=int, help='run this one alone, and show what it raises'); p.add_argument('--seconds', type=float,
        help='for a target, at most')
    p.add_argument('--write', help='JSON file that the figures are added to')
    a = p.parse_args()
    faulthandler.enable(); logging.disable(logging.CRITICAL); torch.set_num_threads(1); bad = 0
    for name in TARGETS if a.target=='all' else a.target.split(','):
        start = time.monotonic(); f = Fuzz(name, a.seed)
        if a.case is not None:
            end,e,file = f.case(a.case); print(name, a.case, file, end); (f.home/'x').exists()
            if e is not None: traceback.print_exception(e)
            f.close(); continue
        faulthandler.dump_traceback_later((a.seconds or 3000)+600, exit=True)
        c = f.run(a.cases, seconds=a.seconds); f.close(); bad += c['faults']; faulthandler.cancel_dump_traceback_later()
        print(f"{name:18}" + ''.join(f'{c[k]:8} {k}' for k in c) + f'  {time.monotonic()-start:.0f} s', flush=True)
        kinds = {}
        for i,file,e in f.faults: kinds.setdefault((type(e).__name__, where(e)), []).append((i, file, str(e)[:140]))
        for (kind,at),cases in sorted(kinds.items(),
            key=lambda x: -len(x[1]))[:40]: print(f'    {len(cases)} x {kind} at {at}: case {cases[0][0]}, {cases[0][1]}: {cases[0][2]!r}')
        if a.write:
            out = Path(a.write); held = json.loads(out.read_text()) if out.exists() else dict(figures={}, mended={})
            held['figures'][name] = c|dict(seed=a.seed); out.write_text(json.dumps(held, indent=1)+'\n')
    sys.exit(bad>0)

# what is read ---------------------------------------------------------------------------------------------------------------------------

WORDS = 'revenue margin plant quarter red wool shoe sock bond yield fell rose the of in café 12% naïve'.split()
ASKED = ['red wool sock', 'revenue rose 12%', '']
def lines(rng, n, k=9): return [' '.join(rng.choices(WORDS, k=rng.randrange(1, k))) for _ in range(n)]

def small_model():
    "A model of some kilobytes."
    from chroma_moe.encoder import ChromaMoE
    from chroma_moe.model import ChromaModel
    from chroma_moe.tokenizer import ChromaTokenizer
    torch.manual_seed(0)
    sizes = 'vocab_size=300 dim=16 max_length=64 attention.heads=2 attention.kv_rank=8 attention.nope_dim=4 attention.rope_dim=4 attention.v_dim=8 ' \
            'moe.experts=4 moe.expert_dim=8 moe.shared=1 moe.shared_dim=8 pooling.latents=4 pooling.heads=2 pooling.out_dim=16'
    model = ChromaModel(load_config(profile='tiny', sets=[f'model.{s}' for s in sizes.split()]).model)
    about = dict(training=[dict(phase='tuning', data=['world'], settings={'tune.lr': .1}, command='chroma_tune')],
                 scores=[dict(benchmark='world', task='shop', metric='ndcg@10', system='model', value=.5)])
    return ChromaMoE(model, ChromaTokenizer.train(lines(random.Random(0), 400), 300), 32, dict(query='find: '), about)

def unit(v): return v.shape==(len(ASKED), 16) and bool(np.isfinite(v).all()) and bool(np.abs(np.linalg.norm(v, axis=1)-1).max()<1e-3)

def read_model(folder):
    from chroma_moe.encoder import ChromaMoE
    return ChromaMoE.from_pretrained(folder).encode(ASKED, prompt_name='query')

def make_model(folder): small_model().save_pretrained(folder)

def make_config(folder): (folder/'config.yaml').write_text(to_yaml(load_config(profile='tiny')), encoding='utf-8')
def read_config(folder):
    c = load_config(folder/'config.yaml'); again = folder.parent/'again.yaml'
    again.write_text(to_yaml(c), encoding='utf-8')
    assert load_config(again)==c, 'what is written is not what was read'
    return to_dict(c)
TARGETS['config'] = Target(make_config, read_config, cases=40)

for name,files in dict(sizes='config.json', weights='model.safetensors', tokenizer='tokenizer.json', settings='encoder.json',
    card='about.json README.md').items():
    TARGETS[name] = Target(make_model, read_model, files, sound=unit, sealed=('model.safetensors',), cases=40)

def make_adopted(folder): make_model(folder); (folder/'encoder.json').unlink()            # as another library leaves it
TARGETS['settings of others'] = Target(make_adopted, read_model, 'config_sentence_transformers.json tokenizer_config.json', sound=unit, cases=40)

def texts_of(n=60): return [dict(text=t, domain=('finance','shop')[i%2], source='fuzz') for i,t in enumerate(lines(random.Random(1), n))]
def make_store(folder):
    from chroma_moe.store import build_store
    build_store(texts_of(), small_model().tokenizer, folder/'store', 1, 500)
def read_store(folder):
    from chroma_moe.store import TokenStore, describe, verify_store
    faults = verify_store(folder/'store'); s = TokenStore(folder/'store'); reader,out = s.batches(64, 16), []
    for _ in range(20): b = next(reader); out.append([[t.tolist() for t in b.texts], b.keys])
    assert not faults, f'batches come out of a store that verify_store calls damaged: {faults[:2]}'
    return [describe(s.manifest), s.texts, s.tokens, out]
def read_store_alone(folder):
    "Without a look at its tokenizer, which training brings itself."
    from chroma_moe.store import TokenStore
    reader = TokenStore(folder/'store').batches(64, 16)
    return [[t.tolist() for t in next(reader).texts] for _ in range(20)]
TARGETS['store'] = Target(make_store, read_store_alone, 'manifest.json *.tokens *.index', ('*',))
def check_store(folder):
    from chroma_moe.store import verify_store
    return verify_store(folder/'store') or read_store(folder)
def refuse_store(folder):
    found = check_store(folder)
    if found and all(isinstance(x, str) for x in found) and not found[0].startswith('domain'): raise ChromaError(found[0])
    return found
TARGETS['store verified'] = Target(make_store, refuse_store, '*', ('*.tokens','*.index','manifest.json'))

def seal_store(rng, folder):
    "A manifest that fits: its own checksum, and at times those of the files."
    from chroma_moe.store import _canonical, _sha
    store = folder/'store'; p = store/'manifest.json'
    try: m = json.loads(p.read_bytes()); m = tree(rng, m) if rng.random()<.7 else m; m.pop('sha256', None)
    except (ValueError, TypeError, AttributeError, RecursionError): return
    if not isinstance(m, dict): return
    if rng.random()<.5:
        for c in m['chunks'] if isinstance(m.get('chunks'), list) else ():
            for kind in ('tokens','index'):
                try:
                    b = (store/f"{c['name']}.{kind}").read_bytes(); c['sha256'][kind] = _sha(b)
                    c['tokens' if kind=='tokens' else 'texts'] = len(b)//(2 if kind=='tokens' else 12)
                except (OSError, KeyError, TypeError, ValueError): pass
    try: p.write_text(json.dumps(m|dict(sha256=_sha(_canonical(m)))))
    except ValueError: pass
def sound_store(batches): return all(max(t)<2**16 and t[0]==2 and t[-1]==3 and len(t)<=16 for b in batches for t in b)
TARGETS['store resealed'] = Target(make_store, read_store_alone, 'manifest.json *.tokens *.index', sound=sound_store, after=seal_store)

def make_log(folder):
    from chroma_moe.store import build_store
    def stops():
        yield from texts_of()
        raise KeyboardInterrupt
    try: build_store(stops(), small_model().tokenizer, folder/'store', 1, 300)
    except KeyboardInterrupt: pass
def read_log(folder):
    from chroma_moe.store import build_store, unfinished
    unfinished(folder/'store')
    s = build_store(texts_of(), small_tokenizer(), folder/'store', 1, 300)
    return [s.chunk(k)[0].tobytes()+s.chunk(k)[1].tobytes() for k in range(len(s.chunks))]
_TOKENIZER = []
def small_tokenizer():
    if not _TOKENIZER: _TOKENIZER.append(small_model().tokenizer)
    return _TOKENIZER[0]
TARGETS['unfinished build'] = Target(make_log, read_log, '*.jsonl *.tokens *.index *.json', ('*',), writes=True, cases=60)

STATE = dict(model={'a.weight': torch.arange(12.).reshape(3, 4), 'b': torch.ones(2, dtype=torch.bfloat16)}, optim=dict(step=3,
    groups=[dict(lr=.1, on=True)], m=(torch.zeros(3), None)),
             place=dict(epoch=1, at=7), rng=torch.arange(5, dtype=torch.uint8))
def make_checkpoint(folder):
    from chroma_moe.checkpoints import Checkpoints
    Checkpoints(folder/'ck').save(3, STATE, .5)
def read_checkpoint(folder):
    from chroma_moe.checkpoints import Checkpoints
    c = Checkpoints(folder/'ck'); p = c.newest(); c.best()
    if p is None: raise ChromaError('no sound checkpoint')
    return c.load(p)
TARGETS['checkpoint'] = Target(make_checkpoint, read_checkpoint, '*', ('*',), writes=True)

def seal_checkpoint(rng, folder):
    from chroma_moe.checkpoints import _sealed
    step = folder/'ck'/'step-00000003'; p = step/'manifest.json'
    try: m = json.loads(p.read_bytes())
    except (ValueError, RecursionError): return
    if not isinstance(m, dict) or not isinstance(m.get('files'), dict): return
    if rng.random()<.6: m = tree(rng, m)
    if not isinstance(m, dict): return
    for name,f in m['files'].items() if isinstance(m.get('files'), dict) else ():
        if rng.random()<.8 and isinstance(f, dict):
            try: b = (step/name).read_bytes(); f.update(bytes=len(b), sha256=hashlib.sha256(b).hexdigest())
            except (OSError, ValueError): pass
    m = dict(format=m.get('format'))|{k: v for k,v in m.items() if k not in ('sha256','format')}
    try: p.write_bytes(_sealed(m))
    except ValueError: pass
TARGETS['checkpoint resealed'] = Target(make_checkpoint, read_checkpoint, '*', after=seal_checkpoint)

def make_metrics(folder):
    rows = [dict(phase='pretrain', step=s, loss=5.-s/9, lr=.1, tokens=100*s, routing=[dict(load=[.25]*4, entropy=1., dead=0)]) for s in range(8)]
    rows += [dict(phase='tune', step=s, loss=2., accuracy=.5, eval_loss=1.9) for s in range(4)]
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
def read_metrics(folder):
    from chroma_moe.curves import last_values, read_curves, smoothed
    from chroma_moe.monitor import MetricsLog, read_metrics
    p = folder/'metrics.jsonl'; rows = None
    try: rows = read_metrics(p); curves = read_curves(p); [smoothed(list(v.values()), .5) for c in curves.values() for v in c.values()]; last_values([folder])
    finally:
        log = MetricsLog(p); log.add(phase='tune', step=9, loss=1.); log.resume(2, 'pretrain')   # a run goes on, whatever the file holds
        again = read_metrics(p); assert again[-1]['step']==9 and not any(r.get('phase')=='pretrain' and r.get('step', 0)>2 for r in again)
    return rows
TARGETS['metrics'] = Target(make_metrics, read_metrics, writes=True)

def make_index(folder):
    m = small_model(); texts = lines(random.Random(2), 40)
    m.index(texts).save(folder/'index')
def read_index(folder):
    from chroma_moe.indexing import Index
    i = Index.open(folder/'index'); q = np.eye(2, 16, dtype=np.float32); s,p = i.search(q, 5)
    return [s, p, [i.rows[int(x)] for x in p.flat], i.width, i.precision, i.fingerprint, i.about]
TARGETS['index'] = Target(make_index, read_index, '*.npy *.jsonl', ('*',))
def sound_index(found): return np.isfinite(found[0]).all() and (np.diff(found[0], axis=1)<=0).all() and found[0].shape==found[1].shape==(2, 5)
def seal_index(rng, folder):
    p = folder/'index'/'index.json'
    try: d = json.loads(p.read_bytes())
    except (ValueError, RecursionError): return
    if not isinstance(d, dict) or not isinstance(d.get('files'), dict): return
    for name,f in d['files'].items():
        try: b = (folder/'index'/name).read_bytes(); f.update(size=len(b), sha256=hashlib.sha256(b).hexdigest())
        except (OSError, ValueError, AttributeError): pass
    p.write_text(json.dumps(d))
TARGETS['index resealed'] = Target(make_index, read_index, '*', sound=sound_index, after=seal_index)

BEGUN = dict(fingerprint='f', precision='float32', width=16, about=dict(a=1))
def make_begun(folder):
    from chroma_moe.indexing import IndexWriter
    w = IndexWriter(folder/'index', **BEGUN); w.add(np.eye(2, 16), [dict(id=i, text='x') for i in range(2)]); w.held.close()
def read_begun(folder):
    from chroma_moe.indexing import IndexWriter
    w = IndexWriter(folder/'index', **BEGUN); w.add(np.eye(1, 16), [dict(id=9, text='y')]); i = w.finish()
    return [i.fingerprint, i.width, i.search(np.eye(3, 16), 2), [i.rows[n] for n in range(len(i))]]
TARGETS['unfinished index'] = Target(make_begun, read_begun, writes=True)

def make_sets(folder):
    rng = random.Random(3); docs,asked = lines(rng, 12),lines(rng, 4)
    (folder/'corpus.jsonl').write_text(''.join(json.dumps(dict(_id=f'd{i}', title='T', text=t))+'\n' for i,t in enumerate(docs)))
    (folder/'queries.jsonl').write_text(''.join(json.dumps(dict(_id=f'q{i}', text=t))+'\n' for i,t in enumerate(asked)))
    (folder/'qrels.tsv').write_text('query-id\tcorpus-id\tscore\n'+''.join(f'q{i}\td{i}\t1\n' for i in range(4)))
    for part,head,body in (('sts', 'sentence1\tsentence2\tscore', 'red\twool\t0.5'), ('pairs', 'sentence1\tsentence2\tlabel', 'red\twool\t1'),
        ('clustering', 'text\tlabel', 'red wool\ta'),
                           ('classification/c', 'text\tlabel', 'red wool\ta')):
        (folder/part).mkdir(parents=True)
        for split in ('train','test'): (folder/part/f'{split}.tsv').write_text('\n'.join([head, body, body.replace('1', '0').replace('\ta', '\tb'), body,
            body.replace('\ta', '\tb')])+'\n')
def read_sets(folder):
    from chroma_moe.evaluation import local_tasks
    return [[t.name, t.kind, t.data] for t in local_tasks(folder)]
def sound_sets(tasks): return all(kind!='sts' or all(np.isfinite(data['score'])) for _,kind,data in tasks)
TARGETS['evaluation sets'] = Target(make_sets, read_sets, '*.jsonl *.tsv', sound=sound_sets)

def score_sets(folder):
    "BM25 on what was read: a table that is odd but whole must not stop it."
    from chroma_moe.evaluation import local_tasks, run_task
    from chroma_moe.systems import BM25
    return [[r['metric'], r['value']] for t in local_tasks(folder) for r in run_task(t, BM25())]
TARGETS['evaluation sets scored'] = Target(make_sets, score_sets, '*.jsonl *.tsv', cases=30)

def make_files(folder):
    import pyarrow as pa, pyarrow.parquet as pq
    from zstandard import ZstdCompressor
    rows = [dict(id=f'a{i}', text=t, title='t' if i%3 else None) for i,t in enumerate(lines(random.Random(4), 30))]
    jsonl = ''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in rows).encode()
    table = [('id','text')]+[(r['id'], r['text'].replace('12%', 'a, "b"')) for r in rows]
    (folder/'a.jsonl').write_bytes(jsonl); (folder/'b.json').write_text(json.dumps(rows)); (folder/'c.txt').write_text('\n'.join(r['text'] for r in rows))
    (folder/'d.csv').write_text('\n'.join(','.join('"'+c.replace('"',
        '""')+'"' for c in r) for r in table)); (folder/'e.tsv').write_text('\n'.join('\t'.join(r) for r in table))
    pq.write_table(pa.Table.from_pylist(rows), folder/'f.parquet', row_group_size=8); pq.write_table(pa.Table.from_pylist(rows), folder/'g.parquet',
        compression='zstd')
    (folder/'h.jsonl.gz').write_bytes(gzip.compress(jsonl)); (folder/'i.jsonl.zst').write_bytes(ZstdCompressor().compress(jsonl))
def one_file(read):
    "Read the one file that was damaged, by its bytes, and the others not at all."
    def f(folder):
        for p in sorted(folder.iterdir()):
            b = p.read_bytes()
            if _SEEN.get((read.__name__, p.name))!=b:
                if (read.__name__, p.name) not in _SEEN: _SEEN[read.__name__, p.name] = b; continue
                return read(p)
        return []
    return f
_SEEN = {}
def read_rows(p):
    "Records of a file, and the same from the middle on; what a Reader makes of them."
    from chroma_moe.rows import DataFile, check_row, records
    from chroma_moe.sources import open_source
    file = DataFile(str(p)); found = list(records(file))
    assert [r[0] for r in records(file, 5)]==[r[0] for r in found if r[0]>=5], 'from the middle on, other records'
    assert all((r is None) or not fault or isinstance(fault, str) for _,_,r,fault in found)
    rows = list(open_source(str(p), max_bad=.5)); assert not any(check_row(r, 'text') for r in rows)
    return [found, rows]
def files_target(read, files): return Target(make_files, one_file(read), files)
for end in ('jsonl','json','txt','csv','tsv','parquet','gz','zst'): TARGETS[f'rows .{end}'] = files_target(read_rows, f'*.{end}')

RECORD = dict(section_1A='We make shoes and sell them to people. '*9, section_7='Revenue rose. '*30, filename='f', cik='1', year='2020',
    sentence='Revenue rose.', section=1, docID='d', sentenceID=1,
    Article_title='Shoes', Article='They rose.', Date='x', text='red wool', date='x', pre_text=['a','b'], post_text='c', table=[['a','b'],['c','d']],
        question='why', answer='so', extra_fields='{}',
    query='red sock', query_id=1, product_id='p', product_locale='us', esci_label='Exact', product_title='sock', product_brand='b', product_color=None,
        product_bullet_point='<b>x</b>',
    product_description='&amp;', small_version=1, title='t', rating=5., parent_asin='x', features=['a','b'], description=['c'],
        passages=dict(is_selected=[1, 0], passage_text=['p','q']),
    anchor='a', positive='b', negative='c', sentence1='a', sentence2='b', score=.9, set=['a','b','c'], split='test')
def make_records(folder):
    from chroma_moe.registry import SOURCES
    for s in SOURCES.values():
        if s.columns and s.training!='evaluation only': (folder/f'{s.name}.jsonl').write_text(''.join(json.dumps({k: RECORD[k] for k in (*s.columns,
            *s.extra) if k in RECORD})+'\n' for _ in range(4)))
def read_records(p):
    from chroma_moe.rows import check_row
    from chroma_moe.sources import open_source
    rows = list(open_source(f'{p.stem}@{p}', max_bad=.9)); assert not any(check_row(r, 'pair' if 'positive' in r else 'text') for r in rows)
    return rows
TARGETS['data sets'] = Target(make_records, one_file(read_records))
def read_texts(p):
    from chroma_moe.encode import Texts, _files
    return [[x for x in Texts(_files([p]), skip_bad=skip) if x] for skip in (True, False)]
TARGETS['texts to encode'] = files_target(read_texts, '*.jsonl *.json *.csv *.tsv *.txt')
def read_leaks(p):
    from chroma_moe.data import guard_of
    g = guard_of([str(p)]); g.clean([dict(text=t) for t in ('red wool sock', 'revenue')]); return g.table()
TARGETS['texts to guard'] = files_target(read_leaks, '*.jsonl *.json *.csv *.tsv *.txt')

CHAT = [dict(role='user', content='write')]
def small_endpoint():
    from chroma_moe.synthesis import Endpoint
    return Endpoint('http://127.0.0.1:9/v1', 'm', retries=0, wait=0)
def make_answers(folder):
    from chroma_moe.synthesis import Answer, Answers
    a = Answers(folder/'q.jsonl.answers')
    for i in range(6): a.add(f'{i:020x}', Answer(['red sock', 'wool'] if i else None, '' if i else 'odd', 10+i, 5))
    a.close()
def read_answers(folder):
    from chroma_moe.synthesis import Answer, Answers, clean_queries, Dropped
    a = Answers(folder/'q.jsonl.answers'); a.add('f'*20, Answer(['late'], '', 1, 1)); a.close()
    b = Answers(folder/'q.jsonl.answers', write=False); assert b.found['f'*20].queries==['late'] and all(isinstance(v, int) for v in b.spent.values())
    found = [b.found[k] for k in sorted(b.found)]
    clean_queries([x.queries for x in found], ['a text']*len(found), 3, 200, Dropped())
    return [found, dict(b.spent)]
TARGETS['answers'] = Target(make_answers, read_answers, writes=True)

REPLY = dict(id='x', choices=[dict(index=0, message=dict(role='assistant', content='["red sock", "wool shoe"]'), finish_reason='stop')],
    usage=dict(prompt_tokens=9, completion_tokens=4))
def make_reply(folder): (folder/'reply.json').write_text(json.dumps(REPLY)); (folder/'error.json').write_text(json.dumps(dict(error=dict(message='no',
    type='x'))))
def read_reply(folder):
    "What a server may answer, good or bad."
    from chroma_moe.synthesis import NoAnswer, ask_passage
    e,out = small_endpoint(),[]
    for status,name in ((200, 'reply.json'), (400, 'error.json'), (429, 'error.json'), (500, 'error.json')):
        e._post = lambda data, status=status, name=name: (status, {'Retry-After': name}, (folder/name).read_bytes())
        try: a = ask_passage(e, CHAT); out.append(list(a)); assert a.queries is None or all(isinstance(q, str) for q in a.queries)
        except (ChromaError, NoAnswer) as x: out.append(str(x)[:20])
    return out
TARGETS['replies'] = Target(make_reply, read_reply)
def make_prompts(folder): (folder/'p.yaml').write_text('finance:\n  text: "Write {n} for {passage}"\n  instruction: find\nshop:\n  text: "{passage}"\n')
def read_prompts(folder):
    from chroma_moe.synthesis import make_chats, read_prompts
    return make_chats([dict(text='t', domain=d) for d in ('finance','shop','x')], read_prompts(folder/'p.yaml'), small_endpoint(), 3, 100)
TARGETS['prompts'] = Target(make_prompts, read_prompts)

def make_kept(folder):
    from chroma_moe.esci import judge, judgements, stand_in
    stand_in(folder/'esci.jsonl', 3); judge(Fake(), judgements(folder/'esci.jsonl'), folder/'kept')
class Fake:
    "Something with a fingerprint that makes vectors."
    fingerprint = 'f'*64
    def vectors(self, texts, role): v = np.array([[len(t)%7+1, t.count('e')+1., 3] for t in texts]); return v/np.linalg.norm(v, axis=1, keepdims=True)
def read_kept(folder):
    from chroma_moe.esci import judge, judgements
    return [[k, [list(j) for j in v]] for k,v in judge(Fake(), judgements(folder/'esci.jsonl'), folder/'kept').items()]
def sound_kept(found): return all(isinstance(j[2], float) and abs(j[2])<=1.001 for _,js in found for j in js)
TARGETS['kept cosines'] = Target(make_kept, read_kept, 'esci-*.jsonl', sound=sound_kept, writes=True)

ROWS = [dict(benchmark='world', task='shop', metric='ndcg@10', system='m', value=.5, values=[.1, .9], items=2)]
def make_results(folder):
    from chroma_moe.evaluate import Results
    Results(folder/'rows').once('world-shop', ['k'], lambda: ROWS)
def read_results(folder):
    from chroma_moe.evaluate import Results
    rows,_ = Results(folder/'rows').once('world-shop', ['k'], lambda: ROWS)
    return [[r['metric'], float(r['value'])] for r in rows]
TARGETS['kept scores'] = Target(make_results, read_results, sealed=('*',), writes=True)

def make_request(folder): (folder/'body.json').write_text(json.dumps(dict(model='m', input=['red', 'wool'], dimensions=8, encoding_format='float',
    input_type='query', user='u')))
def read_request(folder):
    from chroma_moe.serving import Offer, parse_request
    r = parse_request((folder/'body.json').read_bytes(), Offer(dict(m='document'), ('query','document'), 16)); assert 0<r.width<=16 and all(isinstance(t,
        str) for t in r.texts)
    return list(r)
TARGETS['requests'] = Target(make_request, read_request)
def make_keys(folder): (folder/'keys').write_text('sk-one\nsk-two\n')
def read_keys(folder):
    from chroma_moe.serving import read_keys
    return list(read_keys(str(folder/'keys')))
TARGETS['key file'] = Target(make_keys, read_keys, sound=lambda keys: all(k.isascii() and k.isprintable() for k in keys))

def make_stages(folder):
    from chroma_moe.demo import Stages
    (folder/'run').mkdir(); s = Stages(folder/'run', load_config(profile='tiny')); s.run('tokenizer', lambda f: (f/'x').write_text('y'))
def read_stages(folder):
    from chroma_moe.demo import Stages
    s = Stages(folder/'run', load_config(profile='tiny')); s.run('bag', lambda f: (f/'x').write_text('y')); return [sorted(s.seconds)]
TARGETS['stages'] = Target(make_stages, read_stages, 'config.yaml stages.json', writes=True)

PAIRS = [dict(query=q, positive=t) for q,t in zip(lines(random.Random(5), 20, 4), lines(random.Random(6), 20, 12))]
def make_mining(folder):
    (folder/'pairs.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in PAIRS)); os.utime(folder/'pairs.jsonl', (1e9, 1e9))
    for name in ('out.jsonl','.out.jsonl.mining'): shutil.rmtree(folder/name, ignore_errors=True)
    from chroma_moe import mining
    class Stop(Exception): pass
    done = []
    original = mining._mined_bytes
    def some(*a, **kw):
        if len(done)==2: raise Stop
        done.append(1); return original(*a, **kw)
    mining._mined_bytes = some
    try: mine(folder)
    except Stop: pass
    finally: mining._mined_bytes = original
def mine(folder):
    from chroma_moe.mining import mine_pairs
    here = os.getcwd(); os.chdir(folder)
    try: os.utime('pairs.jsonl', (1e9, 1e9)); mine_pairs(['pairs.jsonl'], 'out.jsonl', size='all', block=5)
    finally: os.chdir(here)
def read_mining(folder): mine(folder); return (folder/'out.jsonl').read_bytes()
TARGETS['unfinished mining'] = Target(make_mining, read_mining, 'settings.json log.jsonl rows', writes=True)

if __name__=='__main__': main()
