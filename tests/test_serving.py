"`chroma_serve` as a user starts it: the official client, many clients at once, hostile and slow ones, a signal in the middle."
import base64, http.client, json, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

from chroma_moe import serving
from chroma_moe.config import ChromaError, load_config
from chroma_moe.encoder import ASK, ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import HOSTILE, ChromaTokenizer

pytest.importorskip('uvicorn'); pytest.importorskip('starlette')
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
KEY = 'sk-planted-c0ffee-0123456789'
WORDS = 'red blue kettle lamp shoes revenue margin quarter profit chair wallet mirror basket candle carpet drawer hammer ladder'.split()
TEXTS = [f'{a} {b} {i}' for i,(a,b) in enumerate((a,b) for a in WORDS for b in WORDS)]

@pytest.fixture(scope='module')
def h(tmp_path_factory):
    home = tmp_path_factory.mktemp('serving')
    tokenizer = ChromaTokenizer.train(TEXTS, 400)
    model = ChromaModel(load_config(profile='tiny', sets=['model.vocab_size=400']).model)
    chroma = ChromaMoE(model, tokenizer, 64, dict(query=ASK.format('find it'), reviews='about: '))
    chroma.save_pretrained(home/'model'); (home/'keys').write_text(f'sk-other\n\n{KEY}\n')
    args = ['--model', home/'model', '--port', 0, '--alias', 'text-embedding-3-small', '--alias', 'questions=query', '--api-key-file', home/'keys',
            *(w for l in ('body=1000000','read=1.5','idle=2') for w in ('--limit', l))]
    with open(home/'stderr', 'w') as stderr:
        p = subprocess.Popen([sys.executable, '-m', 'chroma_moe.serving', *map(str, args)], stdout=subprocess.PIPE, stderr=stderr, text=True,
                             env=os.environ|dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    said = p.stdout.readline()
    assert said, (home/'stderr').read_text()
    yield SimpleNamespace(home=home, chroma=chroma, p=p, said=said, port=int(re.search(r'127\.0\.0\.1:(\d+)/v1', said)[1]))
    p.kill(); p.wait(); p.stdout.close()

def client(h, key=KEY):
    openai = pytest.importorskip('openai')
    return openai.OpenAI(base_url=f'http://127.0.0.1:{h.port}/v1', api_key=key, max_retries=0, timeout=30)

def ask(h, body, method='POST', path='/v1/embeddings', **headers):
    "Status, headers and JSON of an answer."
    c = http.client.HTTPConnection('127.0.0.1', h.port, timeout=30)
    heads = {'Content-Type': 'application/json', 'Authorization': f'Bearer {KEY}'} | {k.replace('_','-'): v for k,v in headers.items()}
    try: c.request(method, path, body, {k: v for k,v in heads.items() if v is not None})
    except (BrokenPipeError,ConnectionResetError): pass                                    # refused before all was sent: the answer is there
    r = c.getresponse(); found = json.loads(r.read()); c.close()
    return r.status, r.headers, found

def vectors(answer): return np.float32([d.embedding for d in answer.data])
def apart(a, b): assert a.shape==b.shape, (a.shape, b.shape); d = float(np.abs(a-b).max()); assert d<1e-5, d; return d

def test_official_client(h):
    import openai
    c,texts = client(h),TEXTS[:5]+[t for t in HOSTILE[:-1] if '\ud800' not in t]            # which this client cannot send
    make = lambda texts, model='chroma-moe', **kw: c.embeddings.create(model=model, input=texts, **kw)
    want = h.chroma.encode(texts)
    worst = [apart(vectors(a), w) for a,w in [(make(texts[0]), want[:1]), (make(texts), want), (make(texts, encoding_format='float'), want),
        (make(texts, 'text-embedding-3-small', user='me'), want), (make(texts, dimensions=32), h.chroma.encode(texts, truncate_dim=32)),
        (make(texts, 'questions'), h.chroma.encode_query(texts))]]
    for name in ('query','document','reviews'):
        for field in ('input_type','prompt_name'): worst.append(apart(vectors(make(texts, extra_body={field: name})), h.chroma.encode(texts, prompt_name=name)))
    raw = make(texts, encoding_format='base64').data[0].embedding
    worst.append(apart(np.frombuffer(base64.b64decode(raw), '<f4'), h.chroma.encode(texts[0])))
    one,tokens = make('red shoes'),len(h.chroma.tokenizer.encode(['red shoes'])[0])
    assert one.usage.prompt_tokens==one.usage.total_tokens==tokens and one.model=='chroma-moe'
    assert make('red shoes', 'questions').usage.total_tokens>one.usage.total_tokens         # the instruction counts
    assert [m.id for m in c.models.list()]==['chroma-moe','text-embedding-3-small','questions'] and c.models.retrieve('questions').id=='questions'
    for error,f in [(openai.NotFoundError, lambda: make('a', 'gpt-4')), (openai.NotFoundError, lambda: c.models.retrieve('a/b')),
                    (openai.BadRequestError, lambda: make([])), (openai.BadRequestError, lambda: make([[1,2]])),
                    (openai.BadRequestError, lambda: make('a', dimensions=4096)), (openai.BadRequestError, lambda: make(['a']*3000)),
                    (openai.BadRequestError, lambda: make('a', extra_body=dict(inputtype='query'))),
                    (openai.AuthenticationError, lambda: client(h, 'sk-wrong').models.list())]:
        with pytest.raises(error) as e: f()
        assert e.value.body['message'] and e.value.body['type']=='invalid_request_error' and 'sk-wrong' not in str(e.value)
    print(f'openai {openai.__version__}: {len(worst)} ways within {max(worst):.0e} of encode, 8 errors of the right class')

def test_many_clients(h):
    "32 clients at once, different texts, numbers of texts, prompts, widths and formats: each gets its own."
    c,rng = client(h),np.random.default_rng(0)
    jobs = [[dict(texts=[TEXTS[i] for i in rng.integers(0, len(TEXTS), rng.choice([1,1,1,3,20]))], prompt=str(rng.choice(['query','document','reviews'])),
                  width=int(rng.choice([128,128,32])), form=str(rng.choice(['base64','float']))) for _ in range(6)] for _ in range(32)]
    want = {p: dict(zip(TEXTS, h.chroma.encode(TEXTS, prompt_name=p))) for p in ('query','document','reviews')}
    start = threading.Barrier(32)
    def run(mine):
        start.wait(); worst = 0
        for j in mine:
            extra = dict(dimensions=j['width'])|(dict(encoding_format='float') if j['form']=='float' else {})
            got = vectors(c.embeddings.create(model='chroma-moe', input=j['texts'], extra_body=dict(input_type=j['prompt']), **extra))
            worst = max(worst, apart(got, serving.cut(np.stack([want[j['prompt']][t] for t in j['texts']]), j['width'])))
        return worst
    before = ask(h, None, 'GET', '/health')[2]
    with ThreadPoolExecutor(32) as pool: worst = max(pool.map(run, jobs))
    after = ask(h, None, 'GET', '/health')[2]; new = {k: after[k]-before[k] for k in ('served','texts','batches','failed')}
    assert new['served']==192 and new['texts']==sum(len(j['texts']) for js in jobs for j in js) and new['failed']==0 and new['batches']<192
    print(f"32 clients, 192 requests, {new['texts']} texts in {new['batches']} batches: within {worst:.0e} of encode, none mixed up")

def body(**kw): return json.dumps(dict(model='chroma-moe', input='a')|kw).encode()

HOSTILE_BODIES = [(400, b) for b in (
    b'', b'{', b'\x00', b'\xff\xfe', b'null', b'[]', b'"a"', b'7', b'{"a": NaN}', b'{"model": Infinity}', b'['*400_000, b'{"a":'*100_000,
    b'{"dimensions": '+b'9'*5000+b'}', body()[:-1], body()+b'x', '{"model": "chroma-moe", "input": "é"}'.encode('utf-16'),
    b'{"input":"a\x00b","model":"chroma-moe"}', body(model=None), body(model=['chroma-moe']), body(input=None), body(input=[]), body(input=7),
    body(input=1.5), body(input=True), body(input={}), body(input=[True]), body(input=['a',None]), body(input=[1,2,3]), body(input=[[1,2]]),
    body(input=['a']*10_000), body(input='a'*200_001), body(dimensions=0), body(dimensions=-1), body(dimensions=1e99), body(dimensions='8'),
    body(dimensions=False), body(encoding_format=7), body(encoding_format='hex'), body(input_type={}), body(input_type='q'),
    body(prompt_name='query', input_type='document'), body(extra=1), body(**{'\ud800'*99: 1}))] + [
    (404, body(model='\ud800')), (404, body(model='x'*100_000)), (413, body(input='a'*1_000_001)), (413, b' '*3_000_000)]

def test_hostile_bodies(h):
    for status,b in HOSTILE_BODIES:
        got,heads,found = ask(h, b)
        assert got==status and found['error']['message'] and set(found['error'])=={'message','type','param','code'}, (b[:60], got, found)
        assert len(found['error']['message'])<400 and heads['Content-Type']=='application/json'
    others = [(415, ask(h, body(), Content_Type='text/plain')), (415, ask(h, body(), Content_Type=None)), (415, ask(h, body(), Content_Encoding='gzip')),
              (401, ask(h, body(), Authorization=None)), (401, ask(h, body(), Authorization=f'Basic {KEY}')),
              (401, ask(h, b' '*3_000_000, Authorization='Bearer no')), (401, ask(h, None, 'GET', '/v1/models', Authorization=None)),
              (405, ask(h, None, 'GET')), (405, ask(h, body(), 'POST', '/health')), (404, ask(h, body(), path='/embeddings')),
              (404, ask(h, None, 'GET', '/v1/models/gpt'))]
    for status,(got,_,found) in others: assert got==status and found['error']['message'], (status, got, found)
    def piece(n): return b'%x\r\n'%n+b' '*n+b'\r\n'
    endless = raw(h, head('transfer-encoding: chunked')+piece(60_000)*20)                 # says nothing of its length
    assert endless.startswith(b'HTTP/1.1 413'), endless[:200]
    for junk in (b'\x16\x03\x01\x02\x00\x01\xff', b'GET / HTTP/9\r\n\r\n', b'POST /'+b'a'*200_000, head('content-length: -5'),
                 head('content-length: 5', 'content-length: 6')):
        assert b' 400 ' in raw(h, junk).partition(b'\r\n')[0], junk[:40]
    _,_,odd = ask(h, body(input=list(HOSTILE[:-1]), encoding_format='float'))               # any string is a text
    apart(np.float32([d['embedding'] for d in odd['data']]), h.chroma.encode(list(HOSTILE[:-1]))); assert h.p.poll() is None
    print(f'{len(HOSTILE_BODIES)+len(others)+6} hostile requests: 4xx with a sentence; the server lives')

def head(*lines):
    first = 'POST /v1/embeddings HTTP/1.1', 'host: x', 'content-type: application/json', f'authorization: Bearer {KEY}'
    return '\r\n'.join([*first, *lines, '', '']).encode()

def raw(h, *pieces, pause=0):
    "What the server says: the head of an answer, or with a pause everything until it closes."
    with socket.create_connection(('127.0.0.1', h.port), timeout=10) as s:
        out = b''
        try:
            for p in pieces: s.sendall(p); time.sleep(pause)
            while got := s.recv(65536):
                out += got
                if b'\r\n\r\n' in out and not pause: break
        except (BrokenPipeError,ConnectionResetError): pass
        return out

def test_slow_and_leaving_clients(h):
    "Each holds its connection as long as it may; meanwhile the others are served."
    def timed(*pieces, **kw): start = time.monotonic(); out = raw(h, *pieces, **kw); return out, time.monotonic()-start
    length = f'content-length: {len(body())}'
    with ThreadPoolExecutor(6) as pool:
        drip  = pool.submit(timed, head(length), *[body()[i:i+1] for i in range(30)], pause=.1)     # 30 of the bytes, one each tenth of a second
        stuck = pool.submit(timed, head(length)+body()[:9], pause=.01)
        half  = pool.submit(timed, *[head(length)[i:i+1] for i in range(50)], pause=.1)
        silent = pool.submit(timed, pause=.01)
        kept = pool.submit(timed, head(length)+body(), pause=.01)                                  # answered, then silent
        for _ in range(20):                                                                        # ask and leave
            with socket.create_connection(('127.0.0.1', h.port)) as s: s.sendall(head(length)+body())
        start = time.monotonic(); assert ask(h, body())[0]==200; quick = time.monotonic()-start
    assert stuck.result()[0].startswith(b'HTTP/1.1 408') and kept.result()[0].startswith(b'HTTP/1.1 200')
    assert drip.result()[0][9:12] in (b'408', b'')                                                 # one that still sends may not hear the answer
    assert not half.result()[0] and not silent.result()[0]
    assert max(f.result()[1] for f in (drip, stuck, half, silent, kept))<9                         # of 1.5 and 2 seconds, on a busy machine
    for _ in range(100):
        found = ask(h, None, 'GET', '/health')[2]
        if not found['open']: break
        time.sleep(.05)
    assert not found['open'] and not found['waiting'] and not found['failed'], found
    print(f'five slow clients cut off, 20 left before their answer; another was answered {"meanwhile" if quick<1.5 else "late"}')

def test_busy():
    "More waiting than allowed is refused with 503, and a model that fails costs nobody else an answer."
    go = threading.Event()
    class Slow:
        tokenizer,max_length,prompts = ChromaTokenizer.train(TEXTS, 400),64,{}
        def encode(self, texts, prompt_name):
            if isinstance(texts, str): return np.ones(4, np.float32)
            assert go.wait(20) and 'bad' not in texts; return np.full((len(texts), 4), .5, np.float32)
    service = serving.Service(Slow(), limits=serving.Limits(requests=4))
    with serving.serving(service) as url:
        h = SimpleNamespace(port=int(url.rpartition(':')[2]))
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(ask, h, body(input=t)) for t in ('a','bad','b','c')]
            while service.open<4: time.sleep(.01)
            status,heads,found = ask(h, body()); assert status==503 and heads['Retry-After']=='1' and found['error']['type']=='server_error'
            assert ask(h, None, 'GET', '/health')[2]['open']==4
            go.set(); got = [w.result()[0] for w in waiting]
        assert got==[200,500,200,200] and service.health()['failed']==1 and ask(h, body())[0]==200
    print('four at work, the fifth refused with Retry-After; of a batch with a bad text the others were answered')

def test_command(h, capsys, monkeypatch, tmp_path):
    "What it says at the start, and what it refuses."
    assert 'chroma-moe is served at http://127.0.0.1' in h.said and '128 numbers' in h.said and 'with API key' in h.said and KEY not in h.said
    monkeypatch.setattr(serving, '_serve_until_told', lambda service, listening: (service.batcher.stop(), listening.close()))
    monkeypatch.delenv('CHROMA_API_KEY', raising=False)
    model = str(h.home/'model')
    serving.chroma_serve(model=model, host='0.0.0.0', port=0); assert 'set CHROMA_API_KEY' in capsys.readouterr().err
    monkeypatch.setenv('CHROMA_API_KEY', KEY)
    serving.chroma_serve(model=model, host='0.0.0.0', port=0); out,err = capsys.readouterr(); assert not err and 'with API key' in out and KEY not in out
    (tmp_path/'none').write_text('\n'); (tmp_path/'odd').write_text('a b\n')
    for says,kw in [(f'port {h.port}', dict(port=h.port)), ('holds no key', dict(api_key_file=str(tmp_path/'none'))),
                    ('with spaces', dict(api_key_file=str(tmp_path/'odd'))),
                    ('batch_texts is 0', dict(batch_texts=0)), ("prompt 'quary'", dict(alias=['q=quary'])), ('limit read is -1', dict(limit=['read=-1']))]:
        with pytest.raises(ChromaError, match=re.escape(says)): serving.chroma_serve(**(dict(model=model, port=0)|kw))
    for missing in ('starlette.applications', 'uvicorn'):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, missing, None)
            with pytest.raises(ChromaError, match=re.escape("pip install 'chroma-moe[serve]'")): serving.chroma_serve(model=model, port=0)
    print(h.said.strip())

def test_sigterm(h):
    "The last test of this server: what is at work is finished, then it ends with 0."
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(ask, h, body(input=(TEXTS*7)[:2000]))
        while ask(h, None, 'GET', '/health')[2]['open']==0 and not large.done(): time.sleep(.01)
        early = not large.done(); h.p.send_signal(signal.SIGTERM)
        status,_,found = large.result()
    assert status==200 and len(found['data'])==2000 and h.p.wait(20)==0
    with pytest.raises(OSError): socket.create_connection(('127.0.0.1', h.port), timeout=2)
    seen = h.said+h.p.stdout.read()+(h.home/'stderr').read_text()
    assert KEY not in seen and 'Traceback' not in seen, seen
    print(f'SIGTERM {"in the middle of" if early else "after"} 2000 texts: all answered, rc 0, the key in no output')
