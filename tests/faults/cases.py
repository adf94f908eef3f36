"What is run: every command that writes, on inputs so small that a run takes seconds, and the inputs themselves."
import json
from typing import NamedTuple

from chroma_moe.world import World

class Case(NamedTuple):
    "A command line; {w} is the folder that it writes to."
    command:str
    words:str
    before:str = ''     # a folder of the inputs that lies in {w} beforehand, as NAME or NAME:NAME THERE
    ranks:int = 1       # processes
    weight:float = 1.   # how often it is drawn

    def line(self, w): return self.words.format(w=w).split()

def train(command, more='', **kw): return Case(command, f'{more} --profile tiny --config c.yaml --no_progress --out {{w}}/run', **kw)
STORE = 'build --source texts.jsonl --tokenizer tokenizer --chunk_chars 3000 --no_progress --out {w}/store'
MINE = '--source pairs.jsonl --block 16 --no_progress --out {w}/mined.jsonl'
BAG = '--set model.pooling.log_counts=true'
ENCODE = '--model base --input texts.jsonl --part 8 --passage_tokens 24 --overlap 6 --no_progress --output {w}/index'
CASES = {
    'tokenizer': Case('chroma_tokenizer', '--config c.yaml --source texts.jsonl --no_progress --out {w}/tokenizer'),
    'data': Case('chroma_data', f'{STORE} --workers 1'),
    'data, two workers': Case('chroma_data', f'{STORE} --workers 2', weight=.5),
    'data, overwrite': Case('chroma_data', f'{STORE} --workers 1 --overwrite', before='store:store', weight=.5),
    'crop': Case('chroma_crop', '--source texts.jsonl --out {w}/own.jsonl'),
    'mine': Case('chroma_mine', MINE),
    'mine, dense': Case('chroma_mine', f'{MINE} --retriever bm25 --retriever dense --model base', weight=.5),
    'mine, overwrite': Case('chroma_mine', f'{MINE} --overwrite', before='mined.jsonl:mined.jsonl', weight=.5),
    'synthesise': Case('chroma_synthesise', '--source texts.jsonl --model any --url {url} --concurrency 2 --retries 1 --wait 0.01 --timeout 5 --no_progress '
                       '--out {w}/queries.jsonl'),
    'bag': train('chroma_bag', BAG),
    'pretrain': train('chroma_pretrain', weight=2),
    'pretrain, async': train('chroma_pretrain', '--set train.async_save=true', weight=.5),
    'pretrain, two ranks': train('chroma_pretrain', ranks=2, weight=.5),
    'tune': train('chroma_tune', '--pretrained base', weight=2),
    'tune, two ranks': train('chroma_tune', '--pretrained base', ranks=2, weight=.5),
    'average': Case('chroma_average', '--run base --last 2 --out {w}/averaged'),
    'join': Case('chroma_join', '--model bag0 --model bag1 --source texts.jsonl --out {w}/joined'),
    'encode': Case('chroma_encode', ENCODE),
    'encode, two ranks': Case('chroma_encode', ENCODE, ranks=2, weight=.5),
    'plot': Case('chroma_plot', 'base --out {w}/curves.png', weight=.25),
    'evaluate': Case('chroma_evaluate', '--model {w}/model --benchmark local:judged --baselines bm25 --out {w}/scores', before='base:model'),
    'demo': Case('chroma_demo', '--minutes 0.1 --no_progress --out {w}/demo', weight=.15),
}
SETTINGS = dict(model=dict(vocab_size=700, dim=64, layers=1, dropout=.1, moe=dict(noise=.1), pooling=dict(out_dim=64)),
                tokenizer=dict(path='tokenizer', terms=False),
                data=dict(texts=['texts.jsonl'], pairs=['pairs.jsonl'], max_length=64), pretrain=dict(steps=16, batch_tokens=500),
                tune=dict(steps=16, batch_pairs=8), train=dict(save_every=3, log_every=2, eval_every=5, eval_size=20))

def _lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True); path.write_text(''.join(json.dumps(r)+'\n' for r in rows))

def write_inputs(home):
    "Texts, pairs, settings and a small set of judgements, from the built-in corpus."
    world = World(); texts = [*world.texts('160')]
    for name,rows in dict(texts=texts, older=texts[:40], pairs=world.pairs('160'), mined=world.pairs('8')).items(): _lines(home/f'{name}.jsonl', rows)
    (home/'c.yaml').write_text(json.dumps(SETTINGS))
    for domain in ('shop','finance'):
        t,at = world.retrieval(domain, queries=12),home/'judged'/'retrieval'/domain
        for kind in ('corpus','queries'): _lines(at/f'{kind}.jsonl', [dict(_id=k, text=v) for k,v in t[kind].items()])
        grades = ''.join(f'{q}\t{d}\t{round(g)}\n' for q,of in t['qrels'].items() for d,g in of.items() if g>=1)
        (at/'qrels.tsv').write_text('query-id\tcorpus-id\tscore\n'+grades)

# What the inputs need of the commands themselves, in this order: command and words
MADE = [('chroma_tokenizer', '--config c.yaml --source texts.jsonl --no_progress --out tokenizer'),
        ('chroma_data', 'build --source older.jsonl --tokenizer tokenizer --chunk_chars 3000 --no_progress --workers 1 --out store'),
        ('chroma_pretrain', '--profile tiny --config c.yaml --no_progress --out base'),
        *(('chroma_bag', f'{BAG} --profile tiny --config c.yaml --set tune.seed={i} --no_progress --out bag{i}') for i in range(2))]
