"Synthetic queries as a user makes them: the command in a process of its own, against a server that misbehaves in every way we know."
import json, os, re, signal, socket, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chroma_moe.rows import check_row, complete

ROOT = Path(__file__).parents[1]
KEY = 'sk-planted-c0ffee-0123456789'
THINGS = 'lamp chair kettle wallet mirror basket candle carpet drawer hammer ladder pillow racket saddle teapot tunnel violin zipper'.split()
TEXTS = [f'The {t} of firm {chr(97+i)*4} is number {i*37+11} in its series. It was made by hand.' for i,t in enumerate(THINGS)]

def queries(text):
    "What the model of these tests writes: the same for the same text."
    thing,firm,number = re.search(r'The (\w+) of firm (\w+) is number (\w+)', text).groups()
    return [f'{thing} by {firm}', f'{firm} {thing} {number}']

def number_of(text): return TEXTS.index(text)

class Server:
    "An OpenAI-compatible server; `faults` has a list of answers for some texts, which come before the good one; after `hold_after` requests it falls silent."
    def __init__(self, faults=None, answer=queries, hold_after=10**9, key=KEY):
        self.faults,self.answer,self.hold_after,self.key,self.heard,self.lock = faults or {}, answer, hold_after, key, [], threading.Lock()
        self.closing = threading.Event()
        outer = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass
            def handle(self):
                try: super().handle()
                except OSError: pass                        # the client left
            def do_POST(self): outer.serve(self)
            do_GET = do_POST
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler); self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'

    def __enter__(self): return self
    def __exit__(self, *args): self.closing.set(); self.http.shutdown(); self.http.server_close()

    def serve(self, h):
        chat = json.loads(h.rfile.read(int(h.headers['Content-Length'] or 0)) or '{}')
        i = number_of(re.search(r'<text>\n(.*)\n</text>', chat['messages'][0]['content'], flags=re.S)[1])
        with self.lock:
            self.heard.append((i, time.monotonic(), len(chat['messages']), h.headers['Authorization'] or ''))
            fault = self.faults[i].pop(0) if self.faults.get(i) else None
        if self.key and h.headers['Authorization']!=f'Bearer {self.key}': fault = 401,f"Incorrect API key provided: {h.headers['Authorization']}"
        if len(self.heard)>self.hold_after: self.closing.wait(60)
        usage,said = dict(prompt_tokens=200, completion_tokens=20), json.dumps(self.answer(TEXTS[i]))
        if fault=='gone': return h.connection.shutdown(socket.SHUT_RDWR)
        if fault=='slow': self.closing.wait(30)
        if fault=='uncounted': usage = None
        if isinstance(fault, str) and fault.startswith('say '): said = fault[4:]
        body = json.dumps(dict(choices=[dict(message=dict(content=said), finish_reason='stop')], usage=usage)).encode()
        if fault=='page': body = b'<html>A proxy is pleased to meet you</html>'
        status,headers = 200,{}
        if isinstance(fault, tuple):
            status,words,*headers = fault; headers = headers[0] if headers else {}
            body = json.dumps(dict(error=dict(message=words))).encode()
        h.send_response(status); h.send_header('Content-Length', str(len(body)))
        for k,v in headers.items(): h.send_header(k, v)
        h.end_headers()
        h.wfile.write(body[:len(body)//2] if fault=='cut' else body)
        if fault=='cut': h.wfile.flush(); h.connection.shutdown(socket.SHUT_RDWR)

def command(server, *args):
    url = server.url if isinstance(server, Server) else server
    return [sys.executable, '-m', 'chroma_moe.synthesis', '--source', 'texts.jsonl', '--model', 'm', '--url', url, '--no_progress', '--out', 'out/q.jsonl',
            '--wait', '0.02', *map(str, args)]

def environment(key=KEY): return os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', no_proxy='127.0.0.1', OPENAI_API_KEY=key)

def run(home, server, *args, key=KEY, ok=True):
    r = subprocess.run(command(server, *args), cwd=home, capture_output=True, text=True, timeout=120, env=environment(key))
    assert (r.returncode==0)==ok and 'Traceback' not in r.stderr, r.stdout+r.stderr
    seen = [r.stdout, r.stderr, *(p.read_text() for p in home.rglob('*') if p.is_file())]
    assert not key or not any(key in s for s in seen), 'the key got out'
    return r

def rows(home): return [json.loads(line) for line in open(home/'out/q.jsonl')]

@pytest.fixture
def home(tmp_path):
    (tmp_path/'texts.jsonl').write_text(''.join(json.dumps(dict(text=t, domain='shop'))+'\n' for t in TEXTS))
    return tmp_path

def test_every_fault_of_a_network(home):
    faults = {0: [(429, 'slow down', {'Retry-After': '1'})], 1: [(500, 'oops'), (503, 'oops')], 2: ['cut'], 3: ['slow'], 4: ['say I would rather not.'],
              5: ['say No.', 'say ["half a', 'say never asked'], 6: ['say 1. candle gggg\n2. "candle 233"'], 7: ['uncounted'], 8: ['gone'], 9: ['say []'],
              10: ['page'], 11: ['say ```json\n' + json.dumps(queries(TEXTS[11])) + '\n```']}
    with Server(faults) as s:
        r = run(home, s, '--timeout', 3, '--concurrency', 4, '--report', 'report.json')
    report = json.loads((home/'report.json').read_text())
    assert report['tried_again']=={'HTTP 429': 1, 'HTTP 500': 1, 'HTTP 503': 1, 'Remote end closed connection without response': 1, 'no chat completion': 1,
                                   'the answer was cut off': 1, 'timed out': 1}
    assert (report['answered'], report['skipped'], report['asked_twice'], report['without_a_query'], report['uncounted'])==(len(TEXTS), 1, 2, 1, 1)
    assert report['requests']==len(s.heard)==len(TEXTS)+7+2 and "skipped: 'The hammer" not in r.stderr and f'skipped: {TEXTS[5][:50]!r}' in r.stderr
    asked = [t for i,t,*_ in s.heard if i==0]
    assert asked[1]-asked[0]>=0.99                                   # Retry-After was one second
    assert [n for i,_,n,_ in s.heard if i==4]==[1, 3] and faults[5]==['say never asked']   # a malformed answer is shown to the model, once
    expected = [(q, t) for i,t in enumerate(TEXTS) if i not in (5, 9) for q in (['candle gggg', 'candle 233'] if i==6 else queries(t))]
    got = rows(home)
    assert [(r['query'], r['positive']) for r in got]==expected
    assert all(not check_row(complete(r, 'pair', ''), 'pair') and r['domain']=='shop' and r['source']=='synthetic:texts.jsonl' for r in got)
    print(f"{len(faults)} kinds of trouble, {report['requests']} requests, {len(got)} rows")

def test_kill_and_resume(home, tmp_path_factory):
    other = tmp_path_factory.mktemp('undisturbed'); (other/'texts.jsonl').write_bytes((home/'texts.jsonl').read_bytes())
    with Server() as s: run(other, s)
    journal = home/'out/q.jsonl.answers'
    with Server(hold_after=8) as s:
        p = subprocess.Popen(command(s, '--concurrency', 2), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        try:
            while p.poll() is None and (not journal.exists() or journal.read_bytes().count(b'\n')<8): time.sleep(.02)
            assert 'another process is writing' in run(home, s, '--timeout', 5, '--retries', 0, ok=False).stderr
        finally: p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode==-signal.SIGKILL and not (home/'out/q.jsonl').exists()
    kept = journal.read_bytes().count(b'\n'); first = {i for i,*_ in s.heard}
    assert kept==8
    with open(journal, 'ab') as f: f.write(b'{"key": "torn in the mid')
    with Server() as s: r = run(home, s, '--concurrency', 3)
    assert len(s.heard)==len(TEXTS)-kept and len(first & {i for i,*_ in s.heard})<=2       # only what was in the air is asked again
    assert f'{kept} were answered before' in r.stdout
    assert (home/'out/q.jsonl').read_bytes()==(other/'out/q.jsonl').read_bytes()
    with Server() as s: run(home, s, '--top_k', 1); assert not s.heard                     # another filter costs nothing
    print(f'killed after {kept} of {len(TEXTS)} texts, {len(TEXTS)-kept} were asked afterwards, the same rows byte for byte')

def test_refusals_and_the_key(home):
    wrong = 'sk-this-one-is-wrong-987654321'
    with Server() as s:
        r = run(home, s, '--concurrency', 2, key=wrong, ok=False)
        assert len(s.heard)<=2 and 'the key is refused, check OPENAI_API_KEY' in r.stderr and '***' in r.stderr and len(r.stderr.strip().splitlines())==1
        r = run(home, s, key=KEY[:8]+'\n'+KEY[8:], ok=False); assert 'at position 8 that no key has' in r.stderr and KEY[8:] not in r.stderr
    with Server(key='') as stranger, Server({0: [(307, 'moved', {'Location': stranger.url+'/chat/completions'})]}) as s:
        r = run(home, s, '--concurrency', 1, ok=False); assert 'give that address with --url' in r.stderr and len(s.heard)==1 and not stranger.heard
    with Server({0: [(400, 'max_tokens is not known')]}) as s:
        r = run(home, s, '--concurrency', 1, ok=False); assert 'max_tokens is not known' in r.stderr and '--body' in r.stderr and len(s.heard)==1
    with Server(answer=lambda t: [*queries(t)[:1], f'{KEY} {queries(t)[1]}']) as s: run(home, s)    # a server that answers with the key
    print('401, 400 and a redirect: one request and one sentence each; the key is in no output and no file')

def test_endpoint_down(home):
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    r = run(home, f'http://127.0.0.1:{port}/v1', '--retries', 2, ok=False)
    assert 'no answer after 3 tries (last: Connection refused): check that the server runs' in r.stderr and len(r.stderr.strip().splitlines())==1
    with Server({3: [(500, 'oops')]*3}) as s: r = run(home, s, '--retries', 2, ok=False)    # one text fails, the others are kept
    assert f'1 of {len(TEXTS)} texts got no answer' in r.stderr and len({r['positive'] for r in rows(home)})==len(TEXTS)-1
    with Server() as s: run(home, s); assert [i for i,*_ in s.heard]==[3] and len({r['positive'] for r in rows(home)})==len(TEXTS)
    print('nobody there: one sentence; one text without an answer: asked alone the next time')

def test_estimate_sends_nothing(home):
    prices = '--price_in', 1000, '--price_out', 2000
    with Server() as s:
        r = run(home, s, '--estimate', *prices, key='')
        assert not s.heard and not (home/'out').exists() and re.search(rf'requests +{len(TEXTS)} ', r.stdout)
        tokens,cost = (float(re.search(rf'{k} +([\d.,]+)', r.stdout)[1].replace(',', '')) for k in ('tokens in','cost'))
        out = float(re.search(r'tokens out +([\d.,]+)', r.stdout)[1].replace(',', ''))
        assert abs(cost-(tokens*1000+out*2000)/1e6)<1e-3
        # worst of a text: two requests and two full answers
        run(home, s, *prices, '--max_cost', 4, '--concurrency', 3, '--answer_tokens', 50)
        report = len(s.heard); spent = report*(200*1000+20*2000)/1e6
        assert 0<report<len(TEXTS) and spent<=4 and len({r['positive'] for r in rows(home)})==report
        r = run(home, s, '--estimate', '--answer_tokens', 50, *prices)
        assert len(s.heard)==report and f'{report} more are answered already' in r.stdout
        run(home, s, '--answer_tokens', 50, '--requests_per_minute', 240, *prices, '--max_cost', 20)
    assert Counter(i for i,*_ in s.heard)==Counter(range(len(TEXTS)))
    times = [t for _,t,*_ in s.heard[report:]]
    assert times[-1]-times[0] >= .15*(len(times)-1)                   # four a second, at most; arrivals may be late
    print(f'nothing was sent for an estimate; {spent:.2f} of 4.00 were spent on {report} texts, no text was paid for twice')

def test_round_trip_drops_planted_queries(home):
    planted = {i: queries(TEXTS[(i+5)%len(TEXTS)])[1] for i in range(0, len(TEXTS), 3)}     # a query of another text
    with Server(answer=lambda t: [queries(t)[0], planted.get(number_of(t), queries(t)[1])]) as s: run(home, s, '--top_k', 1, '--report', 'report.json')
    got,report = [(r['query'], r['positive']) for r in rows(home)], json.loads((home/'report.json').read_text())
    assert got==[(q, t) for i,t in enumerate(TEXTS) for q in queries(t)[:2-(i in planted)]]     # what was planted is gone, and nothing else
    assert report['dropped']=={'does not find its text': len(planted)} and set(report['dropped_examples']['does not find its text'])<=set(planted.values())
    print(f"{len(planted)} planted queries of other texts, all dropped; {len(got)} right ones kept")

def test_a_model_as_the_retriever(home):
    script = """
import sys
from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.synthesis import chroma_synthesise, texts
from chroma_moe.tokenizer import ChromaTokenizer
tokenizer = ChromaTokenizer.train((r['text'] for r in texts('texts.jsonl')), 400)
sizes = [f'model.vocab_size={len(tokenizer)}', 'model.layers=1', 'model.moe.experts=0', 'model.pooling.kind=mean']
ChromaMoE(ChromaModel(load_config(None, 'tiny', sizes).model), tokenizer).save_pretrained('model')
chroma_synthesise.main(sys.argv[1:])
"""
    with Server(answer=lambda t: [*queries(t), queries(TEXTS[(number_of(t)+5)%len(TEXTS)])[1]]) as s:
        args = [*command(s)[3:], '--retriever', 'model', '--top_k', '3', '--tokenizer', 'model', '--report', 'report.json']
        r = subprocess.run([sys.executable, '-c', script, *args], cwd=home, capture_output=True, text=True, timeout=120, env=environment())
        assert r.returncode==0, r.stderr
    right = [(r['query'], r['positive']) for r in rows(home) if r['query'] in queries(r['positive'])]
    report = json.loads((home/'report.json').read_text())
    assert report['retriever']=='model' and len(right)>=1.8*len(TEXTS) and len(rows(home))-len(right)<=.2*len(TEXTS)
    print(f"an untrained model as retriever: {len(right)} of {2*len(TEXTS)} right queries kept, {len(rows(home))-len(right)} of {len(TEXTS)} wrong ones")
