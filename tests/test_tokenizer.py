"The tokenizer as a user meets it: the command and its exit codes, hostile text, tokenizers of others, memory, determinism."
import json, os, random, socket, subprocess, sys
from pathlib import Path
from unicodedata import normalize

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from chroma_moe.config import ChromaError
from chroma_moe.terms import TERMS, forms
from chroma_moe.tokenizer import BOS, EOS, HOSTILE, SPECIALS, ChromaTokenizer, verify
from chroma_moe.world import World

ROOT = Path(__file__).parents[1]
TEXTS = [r['text'] for r in World().texts('1k')]

def run(*args, **env):
    "The command in a process of its own."
    return subprocess.run([sys.executable, '-m', 'chroma_moe.tokenizer', *map(str, args)], capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1') | env)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder from `chroma_tokenizer --debug`, and what the command said."
    out = tmp_path_factory.mktemp('trained')/'tokenizer'
    r = run('--debug', '--max_samples', 'all', '--vocab_size', 4096, '--out', out, TOKENIZERS_PARALLELISM='false')
    assert r.returncode==0, r.stderr
    return out, r

def test_train_and_its_bar(trained):
    out,r = trained
    tok = ChromaTokenizer.load(out)
    assert r.stdout.startswith(f'{len(tok):,} tokens written to') and [p.name for p in out.iterdir()]==['tokenizer.json']
    assert '1000/1000' in r.stderr and 'learning the vocabulary' in r.stderr       # a thousand, whatever --max_samples says
    assert all(tok.tok.token_to_id(s)==i for i,s in enumerate(SPECIALS))
    print(r.stdout.strip().replace(str(out), 'DIR'))

def test_same_bytes_again(trained, tmp_path):
    r = run('--debug', '--vocab_size', 4096, '--out', tmp_path/'again', '--no_progress', TOKENIZERS_PARALLELISM='true', RAYON_NUM_THREADS='2')
    assert r.returncode==0 and not r.stderr, r.stderr
    a,b = ((p/'tokenizer.json').read_bytes() for p in (trained[0], tmp_path/'again'))
    assert a==b
    print(f'{len(a):,} bytes, the same in two processes with one thread and two')

def test_sizes(tmp_path):
    "Sizes are exact where the texts suffice, and said where they do not."
    (tmp_path/'mine.jsonl').write_text(''.join(json.dumps(dict(text=f'{t} {i}'))+'\n' for i,t in enumerate(TEXTS)))
    (tmp_path/'other.jsonl').write_text(''.join(json.dumps(dict(text=t.upper()))+'\n' for t in TEXTS))
    r = run('--source', f'{tmp_path}/mine.jsonl=0.7', '--source', f'{tmp_path}/other.jsonl=0.3', '--vocab_size', 3000, '--out', tmp_path/'a', '--no_progress',
            '--cased', '--digits', 'split', '--set', 'tokenizer.terms=false')
    assert r.returncode==0 and r.stdout.startswith('3,000 tokens'), r.stderr
    tok = ChromaTokenizer.load(tmp_path/'a')
    assert len(tok)==3000 and tok.decode(tok.encode(['Net 1999'])[0])=='Net 1999' and len(tok.encode(['1999'])[0])==6
    r = run('--source', tmp_path/'mine.jsonl', '--vocab_size', 98304, '--max_samples', 50, '--out', tmp_path/'b', '--no_progress')
    assert r.returncode==0 and '98,304 were asked for' in r.stdout, r.stderr
    print('two weighted sources, cased, single digits: 3,000 tokens; 98,304 on 50 texts:', r.stdout.split(' tokens')[0])

def test_verify(trained, tmp_path):
    out,_ = trained
    r = run('--verify', out)
    lines = {line[:14].strip(): line[14:] for line in r.stdout.splitlines()}
    assert r.returncode==0 and list(lines)==['terms','inside words','round trip','finance','shop','general'], r.stdout+r.stderr
    assert all(v.startswith('ok') for v in lines.values()) and 'a general one of' in lines['shop']
    state = json.loads((out/'tokenizer.json').read_text()); del state['model']['vocab']['Ġwacc']
    (tmp_path/'tokenizer.json').write_text(json.dumps(state))
    r = run('--verify', tmp_path)
    assert r.returncode==1 and "fails on terms: 'WACC', written ' wacc', is" in r.stderr and 'Traceback' not in r.stderr, r.stderr
    print(r.stderr.strip().replace(str(tmp_path), 'DIR'))

@pytest.mark.parametrize('args,says', [
    (['--vocab_size', 100],                 'vocab_size is 100'),
    (['--vocab_size', 700, '--debug'],      'more than a quarter'),
    (['--digits', 'some'],                  "digits is 'some': give whole or split"),
    (['--source', 'nowhere.jsonl'],         'nowhere.jsonl'),
    (['--verify', 'nowhere'],               "no tokenizer at 'nowhere'"),
    (['--adopt', 'nowhere/tokenizer.json'], "no tokenizer at 'nowhere/tokenizer.json'"),
    (['--adopt', 'o200k_base'],             'o200k_base.tiktoken is not at hand')])
def test_refusals(args, says, tmp_path):
    r = run(*args, '--out', tmp_path/'out', '--no_progress', TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert r.returncode and says in r.stderr and len(r.stderr.strip().splitlines())==1, r.stderr
    assert not (tmp_path/'out').exists()
    print(r.stderr.strip().replace(str(tmp_path), 'DIR'))

@pytest.fixture(scope='module')
def variants():
    return {(lowercase,digits,bool(terms)): ChromaTokenizer.train(TEXTS, 8192, lowercase, digits=digits, terms=terms)
            for lowercase in (True, False) for digits in ('whole','split') for terms in ((), TERMS)}

def test_hostile_text(variants):
    rng = random.Random(0)
    points = [c for c in range(0x110000) if not 0xd800<=c<0xe000]
    alphabet = [chr(c) for c in rng.sample(points, 300)] + list("aA1$'-. \n\r\t\0\u0301\u200d\u202e👍🏽") + ['\ud800', '10-K', 'Q3', *SPECIALS]
    strings = [*HOSTILE, *(''.join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(500))]
    for (lowercase,_,_),tok in variants.items():
        for s,ids in zip(strings, tok.encode(strings, max_length=10**7)):
            assert ids[0]==BOS and ids[-1]==EOS and min(ids[1:-1], default=9)>=len(SPECIALS) and max(ids)<len(tok)
            s = s.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            assert tok.decode(ids)==normalize('NFC', ''.join(c.lower() for c in s) if lowercase else s), repr(s)[:80]
    print(f'{len(strings)} strings, one of a million characters, {len(variants)} tokenizers: all came back')

def test_terms_are_whole_and_stay_outside(variants):
    for lowercase in (True, False):
        for digits in ('whole','split'):
            with_,without = variants[lowercase,digits,True],variants[lowercase,digits,False]
            every = [f for t in TERMS for f in forms(t, lowercase)]
            assert all(len(i)==3 for i in with_.encode(every)) and [with_.decode(i) for i in with_.encode(every)]==every
            assert all(c.ok for c in verify(with_, {})) and not verify(without, {})[0].ok
            for word in ('heroic', 'heroes', 'Heroic', 'xebitda', 'skunk', '2010-K', '10-KSB', '$4K', '2.4K', 'Q34', 'AS&P'):
                assert not {i for f in every for i in with_.encode([f])[0][1:-1] if len(f.strip())>2 and not f.strip().isdigit()} \
                    & set(with_.encode([word])[0][1:-1]) or word in ('skunk',), word
    print(f'{len(TERMS)} terms, {len(every)} forms with case kept: one token each, and none inside another word')

def test_verify_finds_a_term_inside(variants):
    class Leaky(ChromaTokenizer):
        def encode(self, texts, *args, **kwargs):
            return [[2, self.tok.token_to_id('wacc'), 99, 3] if t=='waccic' else i for t,i in zip(texts, super().encode(texts, *args, **kwargs))]
    found = verify(Leaky(variants[True,'whole',True].tok), {})
    assert [c.name for c in found if not c.ok]==['inside words']
    print(found[1].said)

def foreign(model, trainer, pre, normalizer=None):
    t = Tokenizer(model); t.pre_tokenizer,t.normalizer = pre,normalizer
    t.train_from_iterator(TEXTS[:300], trainer)
    t.add_special_tokens(['<pad>', '[EXTRA]'])
    t.post_processor = processors.TemplateProcessing('[CLS] $A', special_tokens=[('[CLS]', t.token_to_id('[CLS]'))])
    t.enable_truncation(5); t.enable_padding(length=99)
    return t

common = dict(special_tokens=['[UNK]','[CLS]','<mask>'], show_progress=False, vocab_size=600)
KINDS = dict(
    bpe = lambda: foreign(models.BPE(), trainers.BpeTrainer(**common, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()), pre_tokenizers.ByteLevel()),
    wordpiece = lambda: foreign(models.WordPiece(unk_token='[UNK]'), trainers.WordPieceTrainer(**common), pre_tokenizers.BertPreTokenizer(),
                                normalizers.BertNormalizer()),
    unigram = lambda: foreign(models.Unigram(), trainers.UnigramTrainer(**common, unk_token='[UNK]'), pre_tokenizers.Metaspace(), normalizers.NFKC()),
    wordlevel = lambda: foreign(models.WordLevel(unk_token='[UNK]'), trainers.WordLevelTrainer(**common), pre_tokenizers.WhitespaceSplit()))

@pytest.mark.parametrize('kind', KINDS)
def test_adopt(kind, tmp_path):
    theirs = KINDS[kind](); theirs.save(str(tmp_path/'tokenizer.json'))
    ours = ChromaTokenizer.load(tmp_path)
    ours.save(tmp_path/'ours'); again = ChromaTokenizer.load(tmp_path/'ours')
    theirs.no_truncation(); theirs.no_padding(); theirs.encode_special_tokens = True
    strings = [s.encode('utf-16','surrogatepass').decode('utf-16','replace') for s in HOSTILE[:-1] if '<' not in s] + TEXTS[300:500] + ['a [EXTRA] b']
    want = [[BOS, *(i+6 for i in e.ids), EOS] for e in theirs.encode_batch(strings, add_special_tokens=False)]
    assert ours.encode(strings, max_length=10**6)==want and again.encode(strings, max_length=10**6)==want
    assert len(ours)==theirs.get_vocab_size()+6 and all(ours.tok.token_to_id(s)==i for i,s in enumerate(SPECIALS))
    for s in ('<pad>', '<mask> <query>', 'x<eos>y'): assert min(ours.encode([s])[0][1:-1], default=9)>=len(SPECIALS)
    assert (tmp_path/'ours'/'tokenizer.json').read_text()==again.tok.to_str()
    print(f'{kind}: {len(strings)} strings, foreign ids plus six, saved and loaded again')

def test_adopt_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    letters = 'abcdefghijklmnopqrstuvwxyz'
    (tmp_path/'vocab.txt').write_text('\n'.join(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*letters,*('##'+c for c in letters),'net','sales']))
    theirs = transformers.BertTokenizerFast(str(tmp_path/'vocab.txt')); theirs.save_pretrained(tmp_path/'bert')
    ours = ChromaTokenizer.load(tmp_path/'bert')
    for s in ('Net sales rose', 'naïve SALES!', ''):
        assert ours.encode([s])[0]==[BOS, *(i+6 for i in theirs(s, add_special_tokens=False)['input_ids']), EOS]
    print('a BERT tokenizer as transformers saves it:', len(ours), 'tokens')

def test_gaps_and_bad_files(tmp_path):
    t = Tokenizer(models.WordLevel({'a': 0, 'b': 7, '[UNK]': 3}, unk_token='[UNK]')); t.pre_tokenizer = pre_tokenizers.Whitespace()
    state = json.loads(t.to_str())
    state['added_tokens'] = [dict(id=20, content='far', single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)]
    p = tmp_path/'tokenizer.json'; p.write_text(json.dumps(state))
    with pytest.raises(ChromaError, match="added token 'far' the id 20, which the tokenizers library does not keep"): ChromaTokenizer.load(p)
    t.save(str(p)); ours = ChromaTokenizer.load(p)
    assert ours.encode(['a b far c'])[0]==[BOS, 6, 13, 9, 9, EOS] and len(ours)==14      # as large as its highest id needs
    for bad in ('', '{', '[]', '{"model": {"type": "Magic"}}', 'version https://git-lfs'):
        p.write_text(bad)
        with pytest.raises(ChromaError, match='cannot be read'): ChromaTokenizer.load(p)
    print('ids with gaps keep their places or are refused; five kinds of broken file are refused')

def test_tiktoken(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip('tiktoken')
    def no_network(*_, **__): raise AssertionError('went to the network')
    monkeypatch.setattr(socket, 'create_connection', no_network); monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(ChromaError, match='o200k_base.tiktoken is not at hand'): ChromaTokenizer.from_tiktoken()
    with pytest.raises(ChromaError, match='no such file'): ChromaTokenizer.from_tiktoken('cl100k_base', tmp_path/'x.tiktoken')
    (tmp_path/'x.tiktoken').write_text('IQ== 0\n')
    with pytest.raises(ChromaError, match='is not the file of'): ChromaTokenizer.from_tiktoken('cl100k_base', tmp_path/'x.tiktoken')

    ranks = {bytes([b]): i for i,b in enumerate(random.Random(0).sample(range(256), 256))}        # bytes in any order
    for piece in (b' a', b'in', b'th', b'the', b' the', b'--', b'---', b'------', b'  ', b'    ', b'12', b'123', b'\n\n', b"'s", 'é'.encode(),
                  '日'.encode()[:2], '日'.encode(), b'ne', b'net', b' ne', b' net', b' sal', b'al', b'es', b' sa', b'ales', b' sales'):
        ranks.setdefault(piece, len(ranks))
    rule = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?i:'s|'t|'ll)?|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n/]*+|\s++$|\s*[\r\n]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding('small', pat_str=rule, mergeable_ranks=ranks, special_tokens={'<|end|>': len(ranks)})
    ours = ChromaTokenizer.from_tiktoken(theirs)
    rng = random.Random(1)
    strings = [s.encode('utf-16','surrogatepass').decode('utf-16','replace') for s in HOSTILE] + TEXTS[:100] + ['<|end|>', "The net sales'S 123456 \n\n x \n"]
    strings += [''.join(rng.choices("theinsale 123-'\n\r é日🙂\u0301", k=40)) for _ in range(3000)] + [c*n for c in '- \n1a' for n in range(1, 50)]
    assert [[i-6 for i in ids[1:-1]] for ids in ours.encode(strings, max_length=10**7)]==theirs.encode_ordinary_batch(strings, num_threads=1)
    ours.save(tmp_path/'ours'); assert ChromaTokenizer.load(tmp_path/'ours').encode(strings[-300:])==ours.encode(strings[-300:])
    assert all(ours.decode(ours.encode([s], max_length=10**7)[0])==s for s in strings)
    print(f'{len(strings)} strings as tiktoken has them; nothing asked of the network')

def test_an_interrupted_save_keeps_the_old(variants, tmp_path, monkeypatch):
    a,b = list(variants.values())[:2]
    a.save(tmp_path); before = (tmp_path/'tokenizer.json').read_bytes()
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ChromaError, match='cannot be written'): b.save(tmp_path)
    assert (tmp_path/'tokenizer.json').read_bytes()==before and len(ChromaTokenizer.load(tmp_path))==len(a)
    assert [p.name for p in tmp_path.iterdir()]==['tokenizer.json']
    print('a full disk while saving: the old tokenizer is whole, nothing is left beside it')

@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = ('import sys; from chroma_moe.tokenizer import ChromaTokenizer; from chroma_moe.world import World\n'
            'texts = [r["text"] for r in World().texts("2k")]; n = int(sys.argv[1])\n'
            'ChromaTokenizer.train((t for _ in range(n) for t in texts), 2048)\n'
            'print(int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])//1024)')  # ru_maxrss begins with our parent's
    peaks = [int(subprocess.run([sys.executable, '-c', code, str(n)], capture_output=True, text=True, check=True,
                                env=os.environ | dict(PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM='false')).stdout) for n in (1, 12)]
    assert peaks[1]-peaks[0]<12, peaks
    print(f'peak memory {peaks[0]} MB on 2,000 texts, {peaks[1]} MB on 24,000')
