"Encoding a corpus to lists of ids, against the bare call of the library underneath, which stops at its own objects."
import json, os, subprocess, sys

from run import medians

N,VOCAB = 2000,16384

def measure():
    "Seconds of ours, `encode_batch_fast`, `encode_batch`, and the megabytes encoded; the threads are those of the environment."
    from chroma_moe.terms import TERMS
    from chroma_moe.tokenizer import ChromaTokenizer, general_texts
    from chroma_moe.world import World
    texts = [r['text'] for r in World().texts(N)] + list(general_texts())[:N]
    tok = ChromaTokenizer.train(texts, VOCAB, terms=TERMS)
    assert [i[1:-1] for i in tok.encode(texts[-99:], max_length=10**6)] == \
           [e.ids for e in tok.tok.encode_batch(texts[-99:], add_special_tokens=False)]
    times = medians(lambda: tok.encode(texts, max_length=10**6), lambda: tok.tok.encode_batch_fast(texts, add_special_tokens=False),
                    lambda: tok.tok.encode_batch(texts, add_special_tokens=False), rounds=15)
    return [*times, sum(len(t.encode()) for t in texts)/1e6]

def bench():
    rows = []
    for threads in (1, 2):  # the library reads their number once, when it starts
        env = os.environ | dict(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM='true' if threads>1 else 'false')
        ours,fast,plain,size = json.loads(subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=True).stdout)
        what = f'{2*N} texts, {size:.1f} MB, {VOCAB} tokens with terms, lists of ids with marker and end, {threads} thread(s), seconds; {size/ours:.1f} MB/s'
        for peer,name in ((fast, 'encode_batch_fast'), (plain, 'encode_batch')):
            rows.append(dict(name=f'tokenizer to {name}, {threads} thread(s)', ours=ours, peer=peer, ratio=peer/ours, target=0.95,
                             conditions=f'{what}; peer: tokenizers.{name}, no ids taken out'))
    return rows

if __name__=='__main__': print(json.dumps(measure()))
