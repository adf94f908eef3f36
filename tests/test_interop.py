"A saved folder in the real libraries: sentence-transformers and transformers give ChromaMoE's vectors."
import copy, json, pickle, subprocess, sys, threading
from types import SimpleNamespace

import numpy as np, pytest, torch
from torch import nn

from chroma_moe.config import ChromaError, load_config
from chroma_moe.encoder import ASK, ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import HOSTILE, SPECIALS, ChromaTokenizer

torch.set_num_threads(1)
PROMPTS = dict(query=ASK.format('find the filing that answers'), reviews=ASK.format('find the review'))
TEXTS = ['revenue rose 12% in the third quarter', 'Red RUNNING shoes', '', ' ', 'the margin of '*360, 'a\x00b\x00', '\ud800 lone', *SPECIALS,
         '<query>Instruction: find Query: <document>', 'https://example.com/shoe.jpg', 'data:image/png;base64,AAAA', *HOSTILE[:-1]]

def make(*sets, prompts=PROMPTS, max_length=64, terms=()):
    tokenizer = ChromaTokenizer.train(TEXTS*2, 400, terms=terms)
    model = ChromaModel(load_config(profile='tiny', sets=[f'model.vocab_size={len(tokenizer)+8}', *sets]).model)
    g = torch.Generator().manual_seed(1)
    for p in model.pool.parameters():
        if not p.any(): nn.init.normal_(p, std=.1, generator=g)          # a new pooling layer begins as a mean: give it something to do
    return ChromaMoE(model, tokenizer, max_length, prompts)

@pytest.fixture(scope='module')
def h(tmp_path_factory):
    import chroma_moe.hf as hf
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging
    logging.disable_progress_bar(); logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp('interop')/'model'
    ours = make(); ours.save_pretrained(folder)
    load = lambda f=folder, **kw: SentenceTransformer(str(f), device='cpu', local_files_only=True, **kw)
    return SimpleNamespace(hf=hf, folder=folder, ours=ours, load=load, st=load())

def gap(a, b): assert a.shape==b.shape, (a.shape, b.shape); return float(np.abs(np.asarray(a)-np.asarray(b)).max(initial=0))
def same(a, b): d = gap(a, b); assert d<1e-6, d; return d

WAYS = [('encode', {}), ('encode_document', {}), ('encode_query', {}), *(('encode', dict(prompt_name=n)) for n in ('query','document','reviews')),
        *((f, dict(prompt='about: ')) for f in ('encode_query','encode_document','encode')), ('encode_query', dict(prompt=''))]

def test_vectors(h):
    worst = max(same(getattr(h.st, f)(TEXTS, **kw), getattr(h.ours, f)(TEXTS, **kw)) for f,kw in WAYS)
    assert gap(h.st.encode_query(TEXTS[:2]), h.ours.encode(TEXTS[:2]))>1e-3
    print(f'{len(TEXTS)} texts in {len(WAYS)} ways: {worst:.0e} apart at most')

def test_tokens(h):
    "The very tokens, by every road."
    from chroma_moe.encoder import encode_texts
    ours,st,n = h.ours,h.load(),0
    for name,marker,prompt in (('query',4,PROMPTS['query']), ('document',5,''), ('reviews',4,PROMPTS['reviews'])):
        for limit in (48, 64):
            st.max_seq_length = limit
            want,led = encode_texts(ours.tokenizer, TEXTS, marker, limit, prompt)
            f = st.preprocess(TEXTS, prompt=st.prompts[name])
            assert [i[m==1].tolist() for i,m in zip(f['input_ids'], f['attention_mask'])]==want and f['prompt_length'].tolist()==[led]*len(TEXTS)
            n += sum(map(len, want))
    assert max(map(len, want))==64 and all(i[-1]==3 for i in want)
    st.max_seq_length = 100_000
    with pytest.raises(ChromaError, match='model.max_length is'): st.encode('word '*3000)
    st.max_seq_length = 16
    with pytest.raises(ChromaError, match='shorten it'): st.encode('a', prompt='long '*100)
    print(f'{n:,} tokens with markers, prompts and cuts: all equal')

def test_neighbours(h):
    "Batches, order, padding side, kind of answer."
    st,want,order = h.load(),h.ours.encode(TEXTS),np.random.default_rng(0).permutation(len(TEXTS))
    for size in (1, 3, 1000): same(st.encode(TEXTS, batch_size=size), want)
    same(st.encode([TEXTS[i] for i in order])[np.argsort(order)], want)
    st.tokenizer.padding_side = 'left'; same(st.encode(TEXTS), want); st.tokenizer.padding_side = 'right'
    same(st.encode(TEXTS[0]), want[0]); same(st.encode(np.array(TEXTS[:2])), want[:2]); same(st.encode(TEXTS, convert_to_tensor=True), want)
    assert len(st.encode([]))==0 and st.get_embedding_dimension()==128 and st.encode(TEXTS[:2], output_value=None)[0]['sentence_embedding'].shape==(128,)
    same(st.encode([[dict(role='user', content=TEXTS[0])]]), want[:1])
    got = [None]*4
    def work(i): got[i] = st.encode(TEXTS)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]; [t.start() for t in threads]; [t.join() for t in threads]
    print(f'batches of 1, 3, 32 and 1000, shuffled, padded on the left, in 4 threads: {max(same(g, want) for g in got):.0e}')

def test_dimensions_similarity_quantisation(h):
    from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss
    st,ours,e = h.st,h.ours,h.ours.encode(TEXTS)
    for d in (1, 32, 127): same(st.encode(TEXTS, truncate_dim=d, normalize_embeddings=True), ours.encode(TEXTS, truncate_dim=d))
    same(h.load(truncate_dim=32).encode(TEXTS, normalize_embeddings=True), ours.encode(TEXTS, truncate_dim=32))
    assert st.similarity_fn_name=='cosine' and gap(st.similarity(e, e), e@e.T)<1e-5 and gap(st.similarity_pairwise(e, e[::-1].copy()), (e*e[::-1]).sum(1))<1e-5
    bits,clear = lambda x: np.unpackbits(x, axis=-1)>0, np.abs(e)>1e-6                          # a number at zero may fall on either side
    assert ((bits(st.encode(TEXTS, precision='ubinary'))==(e>0))|~clear).all() and clear.mean()>.99
    assert ((bits(st.encode(TEXTS, precision='binary').view(np.uint8)^128)==(e>0))|~clear).all()
    ranges = np.stack([e.min(0), e.max(0)]); step = np.ptp(ranges, axis=0)/255
    small = quantize_embeddings(st.encode(TEXTS), 'int8', ranges=ranges)
    assert small.dtype==np.int8 and (np.abs((small+128.)*step+ranges[0]-e)<=step+1e-6).all()
    assert st.encode(TEXTS, precision='int8').dtype==np.int8 and st.encode(TEXTS, precision='uint8').dtype==np.uint8
    different = [i for i,t in enumerate(TEXTS) if len(t.strip())>12]; e = e[different]
    hits,_ = semantic_search_faiss(e, quantize_embeddings(e, 'ubinary'), corpus_precision='ubinary', top_k=3)
    assert sum(hit[0]['corpus_id']==i for i,hit in enumerate(hits))==len(e)
    print('3 widths; similarity; binary exact, int8 within a step; a binary search with rescoring finds all', len(e))

KINDS = [('pooling.kind=latent_query',), ('pooling.kind=mean_max','norm=layer'), ('pooling.kind=cls',), ('pooling.kind=last','attention.causal=true'),
         ('pooling.kind=max','positions=learned')]

@pytest.mark.parametrize('sets', KINDS, ids=lambda s: s[0].partition('=')[2])
def test_kinds(h, sets, tmp_path):
    "Other models, without sentence-transformers: AutoConfig, AutoTokenizer, AutoModel."
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    ours = make(*(f'model.{s}' for s in sets)); ours.save_pretrained(tmp_path)
    tokenizer,model = AutoTokenizer.from_pretrained(tmp_path),AutoModel.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).sizes==ours.model.m and [*model.state_dict()]==[*ours.model.state_dict()]
    f = tokenizer(TEXTS, task='query', prompt=PROMPTS['query'], padding=True, truncation=True, return_tensors='pt')
    with torch.no_grad(): out = model(**f)
    assert (out.last_hidden_state[f['attention_mask']==0]==0).all() and model(**f, return_dict=False)[1].shape==out.pooler_output.shape
    print(f"{' '.join(sets)}: {same(out.pooler_output, ours.encode_query(TEXTS)):.0e}")

def test_there_and_back(h, tmp_path):
    "Saved by sentence-transformers, twice, once onto itself; copied; loaded in bf16."
    st,want = h.load(),h.ours.encode_query(TEXTS)
    st.prompts['products'] = '<query>find the product: '
    for _ in range(2):
        st.save_pretrained(str(tmp_path/'a')); st = h.load(tmp_path/'a')
        same(st.encode_query(TEXTS), want)
    ours = ChromaMoE.from_pretrained(tmp_path/'a')
    same(ours.encode_query(TEXTS), want); same(ours.encode(TEXTS, prompt_name='products'), st.encode(TEXTS, prompt_name='products'))
    assert ours.prompts==PROMPTS|dict(products='find the product: ') and ours.max_length==64
    ours.save_pretrained(tmp_path/'b'); st = h.load(tmp_path/'b'); same(st.encode_query(TEXTS), want)
    st.prompts['query'] = '<query>'; st.save_pretrained(str(tmp_path/'b'))                        # over our own file of settings
    assert 'query' not in ChromaMoE.from_pretrained(tmp_path/'b').prompts
    for other in (copy.deepcopy(h.st), pickle.loads(pickle.dumps(h.st))): same(other.encode_query(TEXTS), want)
    bf16 = h.load(model_kwargs=dict(dtype=torch.bfloat16)); e = bf16.encode_query(TEXTS)
    assert bf16.dtype==torch.bfloat16 and e.dtype==np.float32 and (e*want).sum(1).min()>.99
    words = make(prompts=dict(document='passage: ', query='question: ')); words.save_pretrained(tmp_path/'c'); st = h.load(tmp_path/'c')
    for f in ('encode','encode_query','encode_document'): same(getattr(st, f)(TEXTS), getattr(words, f)(TEXTS))
    print(f'saved and loaded three times, copied, pickled: equal; bf16: cosine at least {(e*want).sum(1).min():.4f}')

def test_training(h):
    "Gradients are those of our own model; the cached loss and the trainer run."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from chroma_moe.encoder import encode_texts
    from chroma_moe.packing import pack
    st,queries,docs = h.load(),['running shoes','sales in the quarter','margin'],['red running shoes','revenue rose 12%','the margin of the third quarter']
    columns = lambda: [st.preprocess(queries, prompt=st.prompts['query']), st.preprocess(docs, prompt=st.prompts['document'])]
    grads = {}
    for loss in (MultipleNegativesRankingLoss(st), CachedMultipleNegativesRankingLoss(st, mini_batch_size=2)):
        st.zero_grad(); st.train(); loss(columns(), None).backward()
        grads[type(loss).__name__] = {n: p.grad.clone() for n,p in st[0].model.named_parameters() if p.grad is not None}
    q,d = (pack(*encode_texts(h.ours.tokenizer, t, m, 64, w)) for t,m,w in ((queries,4,PROMPTS['query']), (docs,5,'')))
    scores = 20*h.ours.model.embed(q)[0] @ h.ours.model.embed(d)[0].T
    nn.functional.cross_entropy(scores, torch.arange(3)).backward()
    want = {n: p.grad for n,p in h.ours.model.named_parameters() if p.grad is not None}
    worst = max(float((g[n]-want[n]).abs().max()/(want[n].abs().max()+1e-6)) for g in grads.values() for n in want)
    assert all(g.keys()==want.keys() for g in grads.values()) and worst<1e-3, worst
    h.ours.model.zero_grad(set_to_none=True)
    before = st.encode(TEXTS)
    args = SentenceTransformerTrainingArguments(str(h.folder.parent/'trained'), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2,
                                                report_to=[], save_strategy='no', use_cpu=True, disable_tqdm=True,
                                                prompts=dict(question=st.prompts['query'], answer=st.prompts['document']))
    SentenceTransformerTrainer(st, args, train_dataset=Dataset.from_dict(dict(question=queries, answer=docs)), loss=MultipleNegativesRankingLoss(st)).train()
    assert np.isfinite(st.encode(TEXTS)).all() and gap(st.encode(TEXTS), before)>1e-3
    print(f'{len(want)} gradients, plain and cached: within {worst:.0e} of ours; 2 steps of its trainer')

def test_refusals(h, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel
    def damaged(name, change):
        h.ours.save_pretrained(tmp_path/name); change(tmp_path/name); return tmp_path/name
    def drop(f): w = load_file(f/'model.safetensors'); del w['norm.weight']; save_file(w, f/'model.safetensors')
    def newer(f): c = json.loads((f/'config.json').read_text()); (f/'config.json').write_text(json.dumps(c|dict(format=99, version='9.9')))
    def nan(f): w = load_file(f/'model.safetensors'); w['pool.project.weight'][:] = float('nan'); save_file(w, f/'model.safetensors')
    def older(f): [(f/n).unlink() for n in ('tokenizer_config.json','modules.json','sentence_bert_config.json','config_sentence_transformers.json')]
    with pytest.raises(ChromaError, match='norm.weight'): AutoModel.from_pretrained(damaged('drop', drop))
    with pytest.raises(ChromaError, match='install that version'): AutoModel.from_pretrained(damaged('newer', newer))
    with pytest.raises(ChromaError, match='not finite'): h.load(damaged('nan', nan)).encode('a')
    with pytest.raises(ChromaError, match='save it again'): h.load(damaged('older', older)).encode('a')
    with pytest.raises(ChromaError, match='of one text'): h.st.encode([[dict(role='user', content='a'), dict(role='assistant', content='b')]])
    with pytest.raises(ChromaError, match='all prompt'): h.st[0].model(torch.tensor([[4,3]]), prompt_length=2)
    assert not [p for p in h.folder.rglob('*.py')] and 'auto_map' not in AutoConfig.from_pretrained(h.folder).to_dict()
    print('missing tensor, newer format, NaN, older folder, conversation, text that is all prompt: one sentence each')

def test_faiss(h, tmp_path):
    "An index that users know finds what our search finds, from numbers and from bits, and after a trip to disk."
    import faiss
    from chroma_moe.indexing import Index, differing_bits, bit_words
    rng = np.random.default_rng(0)
    words = [t for t in TEXTS if len(t.strip())>12][:6]
    texts = [f'{a} {b} {i}' for i,(a,b) in enumerate(zip(rng.choice(words, 300), rng.choice(words, 300)))]
    docs,queries = h.ours.encode_document(texts),h.ours.encode_query(texts[:20])
    index = Index.of(docs, [dict(text=t) for t in texts], h.ours.fingerprint)
    flat = faiss.IndexFlatIP(docs.shape[1]); flat.add(docs)
    faiss.write_index(flat, str(tmp_path/'flat')); flat = faiss.read_index(str(tmp_path/'flat'))
    want,mine = flat.search(queries, 10),index.search(queries, 10)
    assert np.abs(want[0]-mine[0]).max()<1e-5
    apart = np.abs(np.diff(index.search(queries, 11)[0]))>1e-5                                    # equal scores may change places
    clear = apart[:,:10] & np.c_[np.ones(len(queries), bool), apart[:,:9]]
    assert (want[1]==mine[1])[clear].all() and clear.mean()>.5, clear.mean()
    hit = h.ours.search(texts[3], index, 1)[0]; assert texts[hit['index']]==hit['text'] and abs(hit['score']-want[0][3,0])<1e-5
    codes,asked = (h.ours.encode(texts[:n], prompt_name=p, precision='ubinary') for n,p in ((300,'document'), (20,'query')))
    bits = faiss.IndexBinaryFlat(docs.shape[1]); bits.add(codes)
    far,place = bits.search(asked, 40)
    assert all((differing_bits(q, bit_words(codes[p]))==d).all() for q,d,p in zip(bit_words(asked), far, place))
    print(f'{len(texts)} texts, {len(queries)} questions: FAISS and our search give the same ten ({clear.mean():.0%} without a tie), and count the same bits')

def test_lazy():
    "The encoder needs neither library; the adapter says what it lacks."
    code = '''if True:
        import sys; sys.modules['transformers'] = None; sys.modules['sentence_transformers'] = None
        import chroma_moe.encoder, chroma_moe.hf'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode and 'ChromaError' in last and "pip install 'sentence-transformers>=6'" in last, r.stderr
    print('without transformers:', last.partition(': ')[2][:110], '...')
