"The token store under attack: kills, damage, full disks, other tokenizers, hostile text; and the memory of a reader."
import errno, json, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from chroma_moe import store as stores
from chroma_moe.config import ChromaError
from chroma_moe.data import chroma_data
from chroma_moe.store import INDEX, TokenStore, build_store, merge_stores, unfinished, verify_store
from chroma_moe.tokenizer import BOS, EOS, SPECIALS, ChromaTokenizer
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
ENV = os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')

def command(*args): return [sys.executable, '-m', 'chroma_moe.data', *map(str, args)]
def run(*args, **kw): return subprocess.run(command(*args), capture_output=True, text=True, env=ENV, timeout=300, **kw)
def contents(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}
def ids_of(store): return np.concatenate([store.chunk(k)[0] for k in range(len(store.chunks))])

def said(*args):
    "What `chroma_data` says when it refuses, run in this process."
    with pytest.raises(SystemExit) as e: chroma_data.main([str(a) for a in args])
    return str(e.value.code)

def wait_for(condition, seconds=60):
    for _ in range(seconds*50):
        if condition(): return
        time.sleep(0.02)
    raise TimeoutError

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tokenizer, another one, and a store of 4,000 texts in many chunks."
    home = tmp_path_factory.mktemp('home')
    rows = list(World().texts('4k'))
    tokenizer = ChromaTokenizer.train([r['text'] for r in rows], 1024); tokenizer.save(home/'tokenizer')
    ChromaTokenizer.train([r['text'] for r in rows[:500]], 1024).save(home/'other')
    build_store(rows, tokenizer, home/'store', workers=2, chunk_chars=50_000)
    return home

def build_args(home, out, size='6k', *more):
    return ['build','--set',f'data.size={size}','--tokenizer',home/'tokenizer','--chunk_chars','20k','--workers','2','--no_progress','--out',out,*more]

# Kills

def test_killed_build_goes_on(home, tmp_path, capsys):
    out,log = tmp_path/'store', tmp_path/'.store.building'/'chunks.jsonl'
    p = subprocess.Popen(command(*build_args(home, out)), env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: (unfinished(out) or 0)>=8 or p.poll() is not None)
    p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode==-signal.SIGKILL and not out.exists()
    # the log of a kill at the worst moment: its last line half written
    with open(log, 'ab') as f: f.write(b'\n{"name": "chunk_0')
    done = unfinished(out); stamp = (log.parent/'chunk_00000.tokens').stat().st_mtime_ns
    def alive(): # workers of the killed build
        for stat in Path('/proc').glob('[0-9]*/stat'):
            try: fields = stat.read_text().rpartition(')')[2].split()
            except OSError: continue
            if fields[2]==str(p.pid) and fields[0]!='Z': return True
    wait_for(lambda: not alive(), 10)
    # and a finished chunk that was damaged in between
    (log.parent/'chunk_00002.tokens').write_bytes(b'xx')
    r = run(*build_args(home, out))
    assert r.returncode==0 and f'{done} chunks done before' in r.stdout, r.stderr
    assert (out/'chunk_00000.tokens').stat().st_mtime_ns==stamp
    chroma_data.main([*map(str, build_args(home, tmp_path/'undisturbed')), '--workers','1'])
    assert contents(out)==contents(tmp_path/'undisturbed') and verify_store(out)==[]
    capsys.readouterr()
    print(f'killed after {done} of {len(TokenStore(out).chunks)} chunks; no worker outlived it; the continued store equals an undisturbed one, byte for byte')

READER = '''
import hashlib, json, sys
from chroma_moe.store import TokenStore
reader = TokenStore(sys.argv[1]).batches(1024, 64, seed=5, rank=1, ranks=2)
while True:
    b = next(reader)
    digest = hashlib.sha256(repr([(t.tolist(), k) for t,k in zip(b.texts, b.keys)]).encode()).hexdigest()
    print(json.dumps([digest, reader.state()]), flush=True)
'''
def digests(path, n, state=None):
    import hashlib
    reader = TokenStore(path).batches(1024, 64, seed=5, rank=1, ranks=2)
    if state: reader.load(state)
    return [hashlib.sha256(repr([(t.tolist(), k) for t,k in zip(b.texts, b.keys)]).encode()).hexdigest() for b in (next(reader) for _ in range(n))], reader

def test_killed_reader_goes_on(home, tmp_path):
    out = tmp_path/'log'
    with open(out, 'wb') as f: p = subprocess.Popen([sys.executable, '-c', READER, str(home/'store')], env=ENV, stdout=f)
    wait_for(lambda: out.stat().st_size>2000 or p.poll() is not None)
    p.send_signal(signal.SIGKILL); p.wait()
    lines = out.read_text().splitlines(keepends=True); lines = [json.loads(l) for l in lines if l.endswith('\n')]
    state = lines[-1][1]
    undisturbed,_ = digests(home/'store', len(lines)+400)
    rest,reader = digests(home/'store', 400, state)
    assert [d for d,_ in lines]+rest==undisturbed and reader.epoch>state['epoch']
    print(f'killed after {len(lines)} batches, in epoch {state["epoch"]}; the next 400, into epoch {reader.epoch}, are those of an undisturbed reader')

def test_old_store_stays_until_the_new_one_is_whole(home, tmp_path):
    out = tmp_path/'store'; shutil.copytree(home/'store', out); before = contents(out)
    p = subprocess.Popen(command(*build_args(home, out, '6k', '--overwrite')), env=ENV, stdout=subprocess.DEVNULL)
    wait_for(lambda: (unfinished(out) or 0)>=3 or p.poll() is not None)
    p.send_signal(signal.SIGSTOP)                                                     # it shall not end while the other one looks
    busy = run(*build_args(home, out, '6k', '--overwrite'))
    assert busy.returncode and 'another process is writing' in busy.stderr and 'Traceback' not in busy.stderr, busy.stderr
    p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode==-signal.SIGKILL and contents(out)==before and verify_store(out)==[]
    out.rename(tmp_path/'.store.old')       # a kill between the two renames of the swap
    r = run(*build_args(home, out))
    assert r.returncode and 'already holds a token store' in r.stderr and contents(out)==before, r.stderr
    r = run(*build_args(home, out, '6k', '--overwrite'))
    assert r.returncode==0 and TokenStore(out).texts==6_000 and sorted(p.name for p in tmp_path.iterdir())==['store'], r.stderr
    print('a second builder is refused; the old store is whole after a kill, and after one between the two renames; then replaced')

# Damage

def flip(p, at=200): b = bytearray(p.read_bytes()); b[at] ^= 1; p.write_bytes(b)
def swap(p): q = p.with_name('chunk_00000.tokens'); a,b = p.read_bytes(),q.read_bytes(); p.write_bytes(b); q.write_bytes(a)
def edit(p): p.write_text(p.read_text().replace('"texts": 4000', '"texts": 4001'))

@pytest.mark.parametrize('name,how', [('chunk_00003.tokens',flip), ('chunk_00001.index',flip), ('chunk_00002.tokens',lambda p: os.truncate(p, 100)),
    ('chunk_00002.index',lambda p: os.truncate(p, 0)), ('chunk_00004.tokens',Path.unlink), ('chunk_00004.index',Path.unlink), ('chunk_00001.tokens',swap),
    ('chunk_00099.tokens',lambda p: p.write_bytes(b'12')), ('.hidden',Path.touch), ('manifest.json',flip), ('manifest.json',edit),
    ('manifest.json',lambda p: p.write_bytes(b'')), ('tokenizer.json',flip), ('tokenizer.json',Path.unlink)])
def test_damage_is_found(home, tmp_path, capsys, name, how):
    shutil.copytree(home/'store', tmp_path/'store')
    how(tmp_path/'store'/name)
    message = said('verify', tmp_path/'store', '--no_progress'); out = capsys.readouterr().out
    assert name in out and 'fault' in message, out
    print(out.splitlines()[0].replace(str(tmp_path), '...'))

def test_damage_never_reaches_training(home, tmp_path):
    shutil.copytree(home/'store', tmp_path/'store'); flip(tmp_path/'store'/'chunk_00003.tokens')
    reader = TokenStore(tmp_path/'store').batches(1024, 64)
    with pytest.raises(ChromaError, match='chunk_00003.tokens has changed'):
        while reader.epoch==0: next(reader)
    with pytest.raises(ChromaError, match='chunk_00003.tokens has changed'): merge_stores([tmp_path/'store'], tmp_path/'merged')
    os.truncate(tmp_path/'store'/'chunk_00001.index', 12)
    with pytest.raises(ChromaError, match='chunk_00001.index has 12 bytes'): TokenStore(tmp_path/'store')
    assert sorted(p.name for p in tmp_path.iterdir())==['store']
    print('a flipped bit stops reading and merging, a short file stops opening')

def crafted(folder, tokenizer, ids, index, **changes):
    "A store whose checksums are right and whose contents are not."
    folder.mkdir(); tokenizer.save(folder)
    entry = stores._write_chunk(folder, 0, np.array(ids, '<u2'), np.array(index, INDEX), ['a'], ['b'], empty=0)
    stores._write_manifest(folder, [entry|changes], made={}, domains=['a'], sources=['b'], dtype='<u2', vocab_size=1024,
                           tokenizer=stores.fingerprint(tokenizer))
    return verify_store(folder)

def test_wrong_contents_under_right_checksums(home, tmp_path):
    t = ChromaTokenizer.load(home/'tokenizer')
    assert crafted(tmp_path/'0', t, [500,501,502], [(1,1,0,0), (3,1,0,0)])==[]
    wrong = [crafted(tmp_path/'1', t, [500,1024,502], [(3,1,0,0)]), crafted(tmp_path/'2', t, [500,501,502], [(2,1,0,0)]),
             crafted(tmp_path/'3', t, [500,501,502], [(1,1,0,0), (3,1,0,0)], table=[dict(domain='a', source='b', texts=1, tokens=3, bytes=2, lengths=[0,1])])]
    says = ('id 1,024 lies outside the vocabulary', 'the ends of the texts do not rise to 3', 'its statistics are not those')
    for faults,s in zip(wrong, says): assert len(faults)==1 and s in faults[0], faults
    print('; '.join(f[0] for f in wrong))

# Disks

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 1 MB, where mounting is allowed."
    disk = tmp_path/'disk'; disk.mkdir()
    mount = subprocess.run(['mount','-t','tmpfs','-o','size=1m','tmpfs',disk], capture_output=True)
    if mount.returncode: pytest.skip('mounting a small disk is not allowed here')
    yield disk
    subprocess.run(['umount','-l',disk], check=True)

def test_disk_full(home, small_disk):
    t = ChromaTokenizer.load(home/'tokenizer'); out = small_disk/'store'
    build_store(World().texts(200), t, out, workers=1); before = contents(out)
    (small_disk/'films').write_bytes(bytes(500_000))
    build = build_args(home, out, '4k', '--overwrite', '--chunk_chars', '40k')
    r = run(*build)
    assert r.returncode and 'cannot be written (No space left on device)' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert contents(out)==before and verify_store(out)==[] and not list(small_disk.rglob('*.part'))
    done = unfinished(out); assert done
    for p in [home/'store', out]: assert verify_store(p)==[]
    r2 = run('merge','--store',home/'store','--out',small_disk/'merged','--no_progress')
    assert r2.returncode and 'No space left on device' in r2.stderr and 'Traceback' not in r2.stderr and not (small_disk/'merged').exists(), r2.stderr
    assert not (small_disk/'.merged.building').exists()
    (small_disk/'films').unlink()
    again = run(*build)
    assert again.returncode==0 and f'{done} chunks done before' in again.stdout and verify_store(out, t)==[], again.stderr
    print(r.stderr.strip().rpartition(': make room')[0].replace(str(small_disk), '...'), f'; the old store was whole, and the build went on from {done} chunks')

def test_file_too_large(home, tmp_path):
    "The same where nothing can be mounted: the system refuses to let a file grow."
    r = run(*build_args(home, tmp_path/'store', '4k', '--chunk_chars','1m'),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert r.returncode and f'cannot be written ({os.strerror(errno.EFBIG)})' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not (tmp_path/'store').exists() and not list(tmp_path.rglob('*.part'))
    print(r.stderr.strip().replace(str(tmp_path), '...')[:150])

# Tokenizers and text

def test_other_tokenizer_is_refused(home, tmp_path, capsys):
    said('verify', home/'store', '--tokenizer', home/'other', '--no_progress'); assert 'was built with the tokenizer' in capsys.readouterr().out
    with pytest.raises(ChromaError, match='was built with the tokenizer'): TokenStore(home/'store', ChromaTokenizer.load(home/'other'))
    build_store(World().texts(50), ChromaTokenizer.load(home/'other'), tmp_path/'other', workers=1)
    message = said('merge', '--store', home/'store', '--store', tmp_path/'other', '--out', tmp_path/'x')
    assert str(home/'store') in message and str(tmp_path/'other') in message and 'build one of them again' in message
    from chroma_moe.pretrain import chroma_pretrain
    with pytest.raises(SystemExit) as e: chroma_pretrain.main(['--profile','tiny','--set',f'tokenizer.path={home}/other','--set',f'data.store={home}/store',
                                                               '--out',str(tmp_path/'model')])
    assert 'was built with the tokenizer' in str(e.value.code)
    print('refused by verify, by opening, by merge, by chroma_pretrain:', str(e.value.code)[:60].replace(str(home), '...'), '...')

HOSTILE = ['', ' ', 'a'*1_000_000, 'word '*200_000, 'null\0bytes\0', '\ud800 lone \udfff', '😀👩‍👩‍👧', 'שלום عالم', '\u202eevil',
           '<mask><pad> <eos>', '\n\n', 'plain']

def test_hostile_text(home, tmp_path):
    t = ChromaTokenizer.load(home/'tokenizer')
    s = build_store([dict(text=x, domain='d', source='s') for x in HOSTILE], t, tmp_path/'store', workers=2, chunk_chars=1000)
    expected = [x[1:-1] for x in t.encode(HOSTILE, max_length=10**7)]
    assert verify_store(s.path, t)==[] and s.texts+s.manifest['empty']==len(HOSTILE) and s.manifest['empty']==sum(not x for x in expected)
    ids = ids_of(s); assert ids.min()>=len(SPECIALS) and np.array_equal(ids, np.concatenate([np.array(x, '<u2') for x in expected if x]))
    reader,pieces = s.batches(4096, 512, ranks=1), {}
    while reader.epoch==0:
        b = next(reader)
        for text,(e,place) in zip(b.texts, b.keys):
            if e==0: assert place not in pieces and len(text)<=512 and (text[0],text[-1])==(BOS,EOS); pieces[place] = text[1:-1]
    assert np.array_equal(np.concatenate([pieces[p] for p in sorted(pieces)]), ids)
    print(f'{len(HOSTILE)} texts, {s.manifest["empty"]} without a token; {s.tokens:,} tokens read back as {len(pieces):,} pieces, none lost')

def test_rows_that_are_no_texts(home, tmp_path):
    t = ChromaTokenizer.load(home/'tokenizer')
    for text in (None, 5, b'bytes', ['a']):
        with pytest.raises(ChromaError, match='row 1 of the stream has the text'): build_store([dict(text='a'), dict(text=text)], t, tmp_path/'s', workers=1)
    (tmp_path/'bad.jsonl').write_text('{"text": "fine"}\n{"text": \n')
    message = said('build', '--source', tmp_path/'bad.jsonl', '--tokenizer', home/'tokenizer', '--out', tmp_path/'s', '--no_progress')
    assert 'bad.jsonl, line 2' in message and not (tmp_path/'s').exists()
    print(message.replace(str(tmp_path), '...')[:120])

# Commands

@pytest.mark.parametrize('args,says', [
    (['build','--tokenizer','{home}/tokenizer','--out','{home}/store'],                 'already holds a token store'),
    (['build','--tokenizer','{home}/tokenizer','--out','{home}'],                       'is not a token store'),
    (['build','--tokenizer','{home}/nowhere','--out','{home}/x'],                       'there is no tokenizer'),
    (['build','--tokenizer','{home}/tokenizer','--out','{home}/x','--chunk_chars','0'], 'chunk_chars is 0'),
    (['build','--tokenizer','{home}/tokenizer','--out','{home}/x','--source','no.txt'], "'no.txt'"),
    (['build','--tokenizer','{home}/tokenizer','--out','{home}/x','--source','finmteb'],'must not be trained on'),
    (['merge','--out','{home}/x'],                                                      'there are no stores to merge'),
    (['merge','--store','{home}/store','--store','{home}/nowhere','--out','{home}/x'],  'there is no token store'),
    (['merge','--store','{home}/store','--store','{home}/store','--out','{home}/x'],    'each once'),
    (['merge','--store','{home}/store','--strategy','fair','--out','{home}/x'],         "strategy is 'fair': give one of"),
    (['merge','--store','{home}/store=2','--strategy','equal','--out','{home}/x'],      'leave the weights out'),
    (['merge','--store','{home}/store','--tokens','900m','--out','{home}/x'],           'without reading a text twice'),
    (['verify','{home}/nowhere'],                                                       'there is no token store'),
    (['peek','nothing_of_that_name'],                                                   'no source of that name'),
    (['list','--kind','video'],                                                         "kind is 'video'")])
def test_refusals(home, args, says):
    message = said(*(a.format(home=home) for a in args))
    assert says in message and not (home/'x').exists(), message
    print(message.replace(str(home), '...')[:140])

def test_config_merge_section(home, tmp_path, capsys):
    t = ChromaTokenizer.load(home/'tokenizer')
    for half in (0,1): build_store(list(World().texts(1000))[half::2], t, tmp_path/str(half), workers=1)
    (tmp_path/'c.yaml').write_text(f'merge:\n  stores: [{tmp_path}/0, {tmp_path}/1]\n  weights: [1, 3]\n  strategy: weighted\n')
    chroma_data.main(['merge','--config',str(tmp_path/'c.yaml'),'--out',str(tmp_path/'m'),'--no_progress'])
    chroma_data.main(['merge','--store',f'{tmp_path}/0=1','--store',f'{tmp_path}/1=3','--out',str(tmp_path/'n'),'--no_progress'])
    a,b = TokenStore(tmp_path/'m'),TokenStore(tmp_path/'n')
    assert a.manifest['sha256']==b.manifest['sha256'] and verify_store(a.path, t)==[]
    shares = [round(s['used_tokens']/a.tokens, 3) for s in a.manifest['made']['stores']]
    assert shares==pytest.approx([.25,.75], abs=.01)
    print('shares from the configuration and from options:', shares)

# Memory

MEMORY = '''
import json, sys
from chroma_moe.store import TokenStore
def anon(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])*1024
s = TokenStore(sys.argv[1]); s.sound.update(range(len(s.chunks)))       # checksums are measured elsewhere
reader = s.batches(16384, 512); first = [next(reader) for _ in range(3)]
start,peak,n = anon(),0,0
while reader.epoch==0:
    n += sum(map(len, next(reader).texts))
    peak = max(peak, anon())
print(json.dumps([n, start, peak]))
'''
def memory_of_reading(tmp_path, tokenizer, megabytes):
    "Size of a store of random ids, and what the anonymous memory of a process grows by while it reads one epoch of it."
    folder = tmp_path/'store'; folder.mkdir(); tokenizer.save(folder); rng,entries = np.random.default_rng(0),[]
    for k in range(megabytes//4):
        ends = np.append(np.sort(rng.choice(2_000_000, 9999, replace=False))+1, 2_000_000+1)
        index = np.zeros(len(ends), INDEX); index['end'] = ends
        entries.append(stores._write_chunk(folder, k, rng.integers(6, 1024, ends[-1], '<u2'), index, ['d'], ['s'], empty=0))
    stores._write_manifest(folder, entries, made={}, domains=['d'], sources=['s'], dtype='<u2', vocab_size=1024, tokenizer=stores.fingerprint(tokenizer))
    r = subprocess.run([sys.executable, '-c', MEMORY, str(folder)], capture_output=True, text=True, env=ENV)
    n,start,peak = json.loads(r.stdout)
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert n>=TokenStore(folder).tokens
    print(f'{size/1e6:.0f} MB read; anonymous memory {start/1e6:.0f} MB at the start, {peak/1e6:.0f} MB at most')
    return size, peak-start

def test_memory_stays_flat(home, tmp_path):
    size,growth = memory_of_reading(tmp_path, ChromaTokenizer.load(home/'tokenizer'), 64)
    assert growth<size/10

@pytest.mark.long
def test_memory_stays_flat_for_a_large_store(home, tmp_path):
    size,growth = memory_of_reading(tmp_path, ChromaTokenizer.load(home/'tokenizer'), 600)
    assert growth<size/60
