"""Does anything grow while a server answers, texts are encoded and a model is trained? Memory, open files and threads of each, over time.

    make soak                                  # 20 minutes of serving and encoding, then 20 of training: benchmarks/soak.json
    python benchmarks/soak.py --seconds 10     # the short form, to see that it works

Each process is watched from outside, every so many seconds: its own share of memory (PSS, with that of its children), its open files, its
threads. The first third is left out (caches fill, the allocator finds its size); a line through the means of 24 equal stretches of the rest
gives the slope, and its spread around that line the 95% interval."""
import argparse, http.client, json, os, random, re, signal, socket, subprocess, sys, tempfile, threading, time
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import numpy as np, psutil

HERE = Path(__file__).parent
STRETCHES,T95 = 24,2.074                        # of the rest; Student's t for 22 degrees of freedom
ENV = os.environ|dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', CHROMA_API_KEY='', PYTHONPATH=str(HERE.parent))

def watch(pid):
    "MB, open files and threads of a process and its children."
    tree = [p:=psutil.Process(pid), *p.children(recursive=True)]
    return [sum(p.memory_full_info().pss for p in tree)/1e6, sum(p.num_fds() for p in tree), sum(p.num_threads() for p in tree)]

def slope(times, values):
    "Rise an hour and half its 95% interval, of what comes after the first third; times in seconds."
    keep = times>=times[0]+(times[-1]-times[0])/3
    parts = [p for p in np.array_split(np.stack([times, values])[:,keep], STRETCHES, axis=1) if p.shape[1]]
    if len(parts)<STRETCHES: return None,None
    x,y = np.array([p.mean(1) for p in parts]).T
    x = (x-x.mean())/3600; rise = (x*y).sum()/(x*x).sum()
    left = y-y.mean()-rise*x
    return rise, T95*((left@left)/(STRETCHES-2)/(x*x).sum())**.5

def figures(seen, latency=None):
    "What the samples of one process say: (seconds, MB, files, threads) each."
    t,mb,files,threads = np.array(seen, float).T
    rise,half = slope(t, mb)
    out = dict(minutes=round((t[-1]-t[0])/60, 1), samples=len(t), mb_first=round(mb[0], 1), mb_last=round(mb[-1], 1), mb_most=round(mb.max(), 1),
               mb_an_hour=_round(rise, 2), interval=_round(half, 2))
    third = len(t)//3
    for name,x in (('files',files), ('threads',threads)):
        out[name] = dict(zip(('middle','last'), (int(x[third:2*third].max()), int(x[2*third:].max()))), slope=_round(slope(t, x)[0], 2))
    return out | (dict(latency={k: waits(v, t[0], t[-1]) for k,v in sorted(latency.items())}) if latency else {})

def _round(x, n): return None if x is None else round(float(x), n)

def waits(calls, first, last):
    "Milliseconds of calls, (when, seconds) each, in the middle and the last third."
    thirds = [[s*1000 for w,s in calls if first+(last-first)*i/3<=w<first+(last-first)*(i+1)/3] for i in (1,2)]
    return dict(calls=len(calls), **{f'{name}_p50': round(median(x), 1) for name,x in zip(('middle','last'), thirds) if x},
                **{f'{name}_p95': round(quantiles(x, n=20)[-1], 1) for name,x in zip(('middle','last'), thirds) if len(x)>1})

def sample(processes, seconds, until=lambda: False):
    "Samples of each process while `seconds` pass; a process that ends is a fault."
    seen,start,every = {k: [] for k in processes},time.monotonic(),max(.05, seconds/400)
    while time.monotonic()-start<seconds and not until():
        for k,p in processes.items():
            if p.poll() is not None: raise SystemExit(f'{k} ended with {p.returncode} after {time.monotonic()-start:.0f} s')
            seen[k].append([time.monotonic(), *watch(p.pid)])
        time.sleep(every)
    return seen

# serving ------------------------------------------------------------------------------------------------------------------------------
def make_model(folder, profile='tiny'):
    "A model with random weights, and texts of the built-in corpus."
    from chroma_moe.config import load_config
    from chroma_moe.encoder import ChromaMoE
    from chroma_moe.model import ChromaModel
    from chroma_moe.tokenizer import ChromaTokenizer
    from chroma_moe.world import World
    c,texts = load_config(profile=profile),[r['text'] for r in World().texts(2000)]
    ChromaMoE(ChromaModel(c.model), ChromaTokenizer.train(texts, c.model.vocab_size), c.data.max_length).save_pretrained(folder)
    return texts

def body(texts, **kw): return json.dumps(dict(model='chroma-moe', input=texts)|kw).encode()

def requests(texts, rng):
    "One request after the other: what it is, its body, and the status that is right."
    some = lambda n: rng.sample(texts, n)
    kinds = dict(short=lambda: (body(rng.choice(texts)[:40], input_type='query'), 200), batch=lambda: (body(some(32), encoding_format='base64'), 200),
                 long=lambda: (body(' '.join(some(60))), 200), narrow=lambda: (body(some(3), dimensions=32), 200),
                 broken=lambda: (rng.choice([b'', b'{', b'\xff\xfe', b'['*9000, body([]), body([1,2]), body('a', dimensions=0), body('a', extra=1)]), 400),
                 large=lambda: (b' '*600_000, 413), unknown=lambda: (body('a').replace(b'chroma-moe', os.urandom(8).hex().encode()), 404),
                 cancelled=lambda: (body(some(64)), None), slow=lambda: (body('a'), 408))
    names,weights = [*kinds],[10,4,2,4,4,1,2,2,.2]
    while True:
        name = rng.choices(names, weights)[0]
        yield name, *kinds[name]()

def client(port, texts, seed, stop, calls, faults):
    "Asks until told to stop."
    c = None
    for name,what,right in requests(texts, random.Random(seed)):
        if stop.is_set(): break
        if name in ('cancelled','slow'):                                         # leave before the answer; send half and wait to be cut off
            if c: c.close(); c = None                                            # it would be silent for too long
            head = f'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(what)}\r\n\r\n'.encode()
            with socket.create_connection(('127.0.0.1', port), timeout=60) as s:
                s.sendall(head+what[:len(what) if right is None else 5])
                got = s.recv(4096) if right else b''
            if right and not got.startswith(b'HTTP/1.1 408'): faults.append((name, got[:60]))
            calls[name].append((time.monotonic(), 0.)); continue
        c,start = c or http.client.HTTPConnection('127.0.0.1', port, timeout=60), time.monotonic()
        try:
            c.request('POST', '/v1/embeddings', what, {'Content-Type': 'application/json'})
            r = c.getresponse(); found = r.read(); status = r.status
        except (http.client.HTTPException, OSError) as e: status,found = (413 if right==413 else 0),repr(e).encode() # refused before all was sent
        if status!=right: faults.append((name, status, found[:200]))
        if status!=200: c.close(); c = None
        calls[name].append((time.monotonic(), time.monotonic()-start))
    if c: c.close()

@contextmanager
def started(*args, **kw):
    "A process that is ended when the block is left."
    p = subprocess.Popen([sys.executable, *map(str, args)], env=ENV, text=True, **kw)
    try: yield p
    finally: p.kill(); p.wait()

def health(port):
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=60); c.request('GET', '/health')
    try: return json.loads(c.getresponse().read())
    finally: c.close()

def at_rest(port, pid):
    "Files and threads when nothing is asked."
    deadline = time.monotonic()+30
    busy = lambda: health(port)['open'] or any(k.status=='ESTABLISHED' for k in psutil.Process(pid).net_connections('tcp'))
    while busy() and time.monotonic()<deadline: time.sleep(.1)
    return watch(pid)[1:]

def soak_serving(home, seconds, clients=6):
    "`chroma_serve` under a mixed load, while another process encodes."
    texts = make_model(home/'model')
    (home/'texts.txt').write_text('\n'.join(' '.join(t.split()) for t in texts[:200])+'\n', encoding='utf-8')
    serve = started('-m', 'chroma_moe.serving', '--model', home/'model', '--port', 0, '--limit', 'read=2', '--limit', 'idle=3', '--limit', 'body=500000',
                    stdout=subprocess.PIPE)
    with serve as server, started(__file__, '--encode', home, stdout=subprocess.PIPE) as encoder:
        port = int(re.search(r':(\d+)/v1', server.stdout.readline())[1])
        calls,faults,stop,done = {k: [] for k in ('short','batch','long','narrow','broken','large','unknown','cancelled','slow')},[],threading.Event(),{}
        before = at_rest(port, server.pid)
        def read():
            for line in encoder.stdout:
                k,s = line.split(); done.setdefault(k, []).append((time.monotonic(), float(s)))
        threads = [threading.Thread(target=client, args=(port, texts, i, stop, calls, faults)) for i in range(clients)]
        threading.Thread(target=read, daemon=True).start()
        for t in threads: t.start()
        try: seen = sample(dict(server=server, encoder=encoder), seconds)
        finally:
            stop.set()
            for t in threads: t.join()
        after,h = at_rest(port, server.pid),health(port)
        server.send_signal(signal.SIGTERM); code = server.wait(60)
    out = dict(serving=figures(seen['server'], calls)|dict(at_rest=dict(files=[before[0], after[0]], threads=[before[1], after[1]]), served=h['served'],
                                                           refused=h['refused'], failed=h['failed'], exit=code), encoding=figures(seen['encoder'], done))
    out['serving']['faults'] = [str(f) for f in faults[:5]]
    return out

def encode_for_ever(home):
    "Every way to vectors in turn; a line for each call: what it was, and its seconds."
    import itertools, shutil, torch
    from chroma_moe.config import ChromaError
    from chroma_moe.encode import chroma_encode
    from chroma_moe.encoder import ChromaMoE
    from chroma_moe.world import World
    torch.set_num_threads(1)
    model,texts,rng = ChromaMoE.from_pretrained(home/'model'),[r['text'] for r in World().texts(2000)],random.Random(0)
    def refused():
        for wrong in ([1], None, b'a', ['a', None]):
            try: model.encode(wrong)
            except ChromaError: continue
            raise SystemExit(f'{wrong!r} was encoded')
    def command():
        shutil.rmtree(home/'index', ignore_errors=True)
        chroma_encode(str(home/'model'), [str(home/'texts.txt')], str(home/'index'), precision='int8', part=50, progress=False)
    some = lambda n: rng.sample(texts, n)
    ways = dict(short=lambda: model.encode(rng.choice(texts)[:40], prompt_name='query'), batch=lambda: model.encode(some(64)),
                long=lambda: model.encode([' '.join(some(60)) for _ in range(2)]), int8=lambda: model.encode(some(16), precision='int8', truncate_dim=64),
                passages=lambda: model.encode_passages(some(8), passage_tokens=32), search=lambda: model.search('cheap kicks', model.index(some(32))),
                stream=lambda: next(model.encode_stream(itertools.cycle(some(8)), window=32)), refused=refused, command=command)
    home_out = sys.stdout; sys.stdout = open(os.devnull, 'w')                   # what the command says goes nowhere
    while True:
        for name,way in ways.items():
            if name=='command' and rng.random()>.1: continue
            start = time.monotonic(); way(); print(name, time.monotonic()-start, file=home_out, flush=True)

# training -----------------------------------------------------------------------------------------------------------------------------
SMALL = ['data.size=2000', 'model.vocab_size=1000', 'data.max_length=64', 'train.eval_size=32', 'train.log_every=5']

def settings(*more): return [w for s in [*SMALL, *more] for w in ('--set', s)]

def soak_training(home, seconds):
    "Both phases of training, half of the time each, with evaluations and checkpoints."
    from chroma_moe.tokenizer import ChromaTokenizer
    from chroma_moe.world import World
    ChromaTokenizer.train((r['text'] for r in World().texts(2000)), 1000).save(home/'tokenizer')
    small = '--profile', 'tiny', *settings(f'tokenizer.path={home}/tokenizer', 'train.eval_every=25', 'train.save_every=25')
    first = '-m', 'chroma_moe.pretrain', *small, '--set', 'pretrain.batch_tokens=1024'
    subprocess.run([sys.executable, *map(str, first), '--set', 'pretrain.steps=20', '--out', home/'start', '--no_progress'], check=True, env=ENV,
                   stdout=subprocess.DEVNULL)
    phases = dict(pretraining=(*first, '--set', 'pretrain.steps=1000000', '--out', home/'pretrain'),
                  tuning=('-m', 'chroma_moe.tune', *small, '--set', 'tune.batch_pairs=32', '--set', 'tune.steps=1000000', '--pretrained', home/'start',
                          '--out', home/'tune'))
    out = {}
    for name,args in phases.items():
        log = Path(args[-1])/'metrics.jsonl'
        with started(*args, '--no_progress', stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
            while not log.exists() and p.poll() is None: time.sleep(.05)
            seen = sample({name: p}, seconds/2)
            p.send_signal(signal.SIGTERM); said = p.communicate(timeout=120)[1]
            if p.returncode!=128+signal.SIGTERM: raise SystemExit(f'{name} ended with {p.returncode}: {said[-500:]}')
        rows = [json.loads(l) for l in open(log)]
        steps = [r for r in rows if 'loss' in r]
        third = lambda i: steps[len(steps)*i//3:len(steps)*(i+1)//3] or steps
        out[name] = figures(seen[name])|dict(steps=steps[-1]['step'], evaluations=sum('eval_loss' in r for r in rows), loss_first=steps[0]['loss'],
            loss_last=steps[-1]['loss'], tokens_per_second={k: round(median(r['tokens_per_second'] for r in third(i))) for i,k in ((1,'middle'), (2,'last'))})
    return out

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--seconds', type=float, default=1200., help='of each of the two')
    parser.add_argument('--only', choices=('serving','training'), help='one of the two')
    parser.add_argument('--out', type=Path, default=HERE/'soak.json', help='where the figures go')
    parser.add_argument('--encode', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.encode: return encode_for_ever(args.encode)
    found = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    for name,soak in (('serving',soak_serving), ('training',soak_training)):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as home: found |= soak(Path(home), args.seconds)
            args.out.write_text(json.dumps(found, indent=1)+'\n')
    if bad := [n for n,f in found.items() if f.get('faults') or f.get('failed') or f.get('exit')]: raise SystemExit(f'faults in {bad}: see {args.out}')
    for name,f in found.items():
        rise = 'too short for a slope' if f['mb_an_hour'] is None else f'{f["mb_an_hour"]:+.1f} ± {f["interval"]:.1f} MB an hour'
        print(f'{name:12} {f["minutes"]:5} minutes, {f["mb_most"]:7.1f} MB at most, {rise}; files {f["files"]["middle"]}, {f["files"]["last"]}; '
              f'threads {f["threads"]["middle"]}, {f["threads"]["last"]}')

if __name__=='__main__': main()
