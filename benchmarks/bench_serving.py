"32 clients of `chroma_serve` at once: texts of different requests in one batch, against the same server with one request at a time."
import asyncio, base64, json, os, re, subprocess, sys, tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np, torch

from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import ChromaTokenizer
from chroma_moe.world import World

CLIENTS,ROUNDS = 32,7
REQUESTS = dict(tiny=20, debug=5) # of each client in a round

def save_model(profile, rows, folder):
    "A model with random weights, and a tokenizer that has read the corpus."
    c = load_config(profile=profile)
    tokenizer = ChromaTokenizer.train((t for r in rows for t in (r['query'], r['positive'])), c.model.vocab_size)
    torch.manual_seed(0)
    chroma = ChromaMoE(ChromaModel(c.model), tokenizer, c.data.max_length); chroma.save_pretrained(folder)
    return chroma

def start(folder, batch_texts):
    "A server in a process of its own, and the port it took."
    p = subprocess.Popen([sys.executable, '-m', 'chroma_moe.serving', '--model', folder, '--port', '0', '--batch_texts', str(batch_texts)],
                         stdout=subprocess.PIPE, text=True, env=os.environ|dict(OMP_NUM_THREADS='1', CHROMA_API_KEY=''))
    return p, int(re.search(r':(\d+)/v1', p.stdout.readline())[1])

def request(text):
    body = json.dumps(dict(model='chroma-moe', input=text, input_type='query', encoding_format='base64')).encode()
    return b'POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n' % len(body) + body

class Client(asyncio.Protocol):
    "Asks for one text after the other on one connection."
    def __init__(self, texts, done): self.texts,self.requests,self.done,self.bodies,self.got = texts,[request(t) for t in texts],done,[],b''
    def connection_made(self, transport): self.transport = transport; transport.write(self.requests[0])
    def data_received(self, data):
        self.got += data
        head,end,body = self.got.partition(b'\r\n\r\n')
        if not end or len(body)<int(re.search(rb'content-length: (\d+)', head)[1]): return
        assert head.startswith(b'HTTP/1.1 200'), self.got
        self.bodies.append(body); self.got = b''
        if len(self.bodies)<len(self.requests): self.transport.write(self.requests[len(self.bodies)])
        else: self.transport.close(); self.done.set_result(self)

async def load(port, texts):
    "Seconds until every client has all its answers, and the clients."
    loop,done = asyncio.get_running_loop(),[]
    start = perf_counter()
    for ts in texts:
        done.append(loop.create_future())
        await loop.create_connection(lambda: Client(ts, done[-1]), '127.0.0.1', port)
    clients = await asyncio.gather(*done)
    return perf_counter()-start, clients

def check(chroma, clients):
    "Every answer is that of its own text."
    for c in clients:
        got = [np.frombuffer(base64.b64decode(json.loads(b)['data'][0]['embedding']), '<f4') for b in c.bodies]
        assert np.abs(np.stack(got)-chroma.encode_query(c.texts)).max()<1e-5

def compare(profile, rows, folder):
    chroma = save_model(profile, rows, folder)
    n = REQUESTS[profile]; queries = [r['query'] for r in rows[:CLIENTS*n]]
    texts = [queries[i*n:(i+1)*n] for i in range(CLIENTS)]
    servers = [start(folder, b) for b in (256, 1)]
    try:
        times = [[], []]
        for i in range(ROUNDS+1):
            for (_,port),t in zip(servers, times):
                seconds,clients = asyncio.run(load(port, texts)); t.append(seconds)
                if not i: check(chroma, clients); t.clear()
    finally:
        for p,_ in servers: p.terminate()
        assert [p.wait(20) for p,_ in servers]==[0, 0]
    tokens = median(map(len, chroma.tokenizer.encode(queries)))
    return [CLIENTS*n/median(t) for t in times], median(o/b for b,o in zip(*times)), tokens

def bench():
    out,corpus = [],list(World().pairs('2000'))
    for profile in ('tiny', 'debug'):
        with tempfile.TemporaryDirectory() as d: (ours,alone),ratio,tokens = compare(profile, corpus, Path(d)/'model')
        out.append(dict(name=f'endpoint, {CLIENTS} clients, {profile}', ours=ours, peer=alone, ratio=ratio, target=2., conditions=
            f'{CLIENTS} connections, one query a request (median {tokens:g} tokens), base64, random weights, float32, server on one thread and clients in '
            f'another process; requests a second, median of {ROUNDS} rounds in turn; peer: the same server with --batch_texts 1'))
    return out
