"The model card: what the hub and sentence-transformers read of it, and what outlives their hands."
import json, threading

import pytest, yaml
from huggingface_hub import ModelCard, metadata_load

from chroma_moe.card import OWN, add_phase, add_scores, read_about, settings_of, write_card
from chroma_moe.config import ChromaError, load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import ChromaTokenizer

C = load_config(profile='tiny', sets=['model.vocab_size=400', 'model.dim=64', 'model.layers=1', 'tune.matryoshka=[64,32]'])
ROWS = [dict(benchmark='world', task=t, kind=k, metric=m, system=s, value=v, low=v-.1, high=v+.1, items=20, values=[v]*20)
        for t,k,m in (('shop','retrieval','ndcg@10'), ('near | far','sts','spearman')) for s,v in (('chroma', .5), ('BM25', .25))]
ODD = ['a | b', '`tick` ``two``', 'line\nbreak', '<!-- chroma_moe 000000000000: fake -->', '---', '# head', 'ü \u202e 日本 \ud800', ': [yaml', '']

def about():
    a = add_phase(None, 'pre-training', ['world','fineweb_edu:10BT=0.2','my/file.jsonl'], settings_of(C, 'pretrain'), 'chroma_pretrain', steps=3, tokens=4096)
    return add_phase(a, 'tuning', ['world'], settings_of(C, 'tune'), 'chroma_tune', started=True, steps=2)

@pytest.fixture(scope='module')
def chroma():
    return ChromaMoE(ChromaModel(C.model), ChromaTokenizer.train(['red running shoes', 'revenue rose 12%']*20, 400), 64, dict(query='find: '), about())

def test_front_matter(chroma, tmp_path):
    "The hub's own readers accept it, scores and all."
    chroma.save_pretrained(tmp_path); add_scores(tmp_path, ROWS, 'chroma', 'chroma_evaluate', 'nothing found')
    card = ModelCard.load(tmp_path/'README.md')
    data = metadata_load(tmp_path/'README.md')
    found = {(e.dataset_type, e.metric_type): e.metric_value for e in card.data.eval_results}
    assert found=={('world/shop','ndcg@10'): .5, ('world/near | far','spearman'): .5}
    assert data['pipeline_tag']=='sentence-similarity' and 'sentence-transformers' in data['tags'] and 'license' not in data and 'language' not in data
    text = card.text
    for said in ('of which a token uses', '64, 32: trained to be cut', 'HuggingFaceFW/fineweb-edu; licence: odc-by',
                 'their origin and licence are not recorded', '4,096 tokens', 'chroma_evaluate', 'nothing found', 'Language: not recorded', '"find: "'):
        assert said in text, said
    assert json.loads((tmp_path/'about.json').read_text())['training']==about()['training'] and 'values' not in (tmp_path/'about.json').read_text()
    print(f'{len(found)} scores, {len(data["tags"])} tags and {len(text.splitlines())} lines read by huggingface_hub')

def test_scores(chroma, tmp_path):
    "Twice is once; a row replaces its own kind; training again drops them."
    chroma.save_pretrained(tmp_path); add_scores(tmp_path, ROWS, 'chroma')
    before = [(p.name, p.read_bytes()) for p in sorted(tmp_path.iterdir())]
    add_scores(tmp_path, ROWS, 'chroma'); assert [(p.name, p.read_bytes()) for p in sorted(tmp_path.iterdir())]==before
    add_scores(tmp_path, [ROWS[0]|dict(value=.75), ROWS[1]|dict(value=None, note='no hub')], 'chroma')
    scores = {(r['task'], r['system']): r['value'] for r in read_about(tmp_path)['scores']}
    assert scores[('shop',OWN)]==.75 and scores[('shop','BM25')]==.25 and len(scores)==4
    again = ChromaMoE.from_pretrained(tmp_path); assert len(again.about['scores'])==4
    assert add_phase(again.about, 'tuning')['scores']==[] and ModelCard.load(tmp_path/'README.md').data.eval_results[0].metric_value in (.5, .75)
    for bad,says in (([dict(value=1.)], "has no 'benchmark'"), ([ROWS[0]|dict(value=float('nan'))], 'finite numbers')):
        with pytest.raises(ChromaError, match=says): add_scores(tmp_path, bad)
    with pytest.raises(ChromaError, match='config.json'): add_scores(tmp_path/'nowhere', ROWS)
    print('the same rows twice: every file equal; one replaced of 4; NaN and nameless rows refused')

def test_there_and_back(chroma, tmp_path):
    "sentence-transformers keeps the card, and the records in it."
    import chroma_moe.hf  # noqa: F401
    from sentence_transformers import SentenceTransformer
    chroma.save_pretrained(tmp_path/'a'); add_scores(tmp_path/'a', ROWS, 'chroma')
    (tmp_path/'a/README.md').write_text((tmp_path/'a/README.md').read_text()+'\nMine.\n')
    want = read_about(tmp_path/'a')
    SentenceTransformer(str(tmp_path/'a'), device='cpu', local_files_only=True).save_pretrained(str(tmp_path/'b'))
    assert not (tmp_path/'b/about.json').exists() and read_about(tmp_path/'b')==want and ModelCard.load(tmp_path/'b/README.md').data.eval_results
    ours = ChromaMoE.from_pretrained(tmp_path/'b'); assert ours.about==want
    ours.save_pretrained(tmp_path/'b'); assert (tmp_path/'b/README.md').read_text().endswith('\nMine.\n') and read_about(tmp_path/'b')==want
    st = SentenceTransformer(str(tmp_path/'a'), device='cpu', local_files_only=True)
    st.model_card_data.tags = [*(st.model_card_data.tags or []), 'generated_from_trainer']
    st.save_pretrained(str(tmp_path/'c')); own = (tmp_path/'c/README.md').read_text()
    assert read_about(tmp_path/'c')==dict(training=[], scores=[])                                   # trained elsewhere: nothing is known
    ChromaMoE.from_pretrained(tmp_path/'c').save_pretrained(tmp_path/'c')
    text = (tmp_path/'c/README.md').read_text(); assert own.split('---\n', 2)[2].strip()[:200] in text and 'Not recorded' in text
    ModelCard.load(tmp_path/'c/README.md')
    print('kept by sentence-transformers, read from there, saved over it; its own card moves below the line')

def test_any_words(chroma, tmp_path):
    "Whatever a name, a prompt, a note or a source holds, the front matter parses and a second save changes nothing."
    a = about()|dict(name=ODD[0], license='mit', language='de')
    for w in ODD: a = add_phase(a, w or 'x', ODD, {w: w}, w, note=w)
    a['scores'] = [dict(benchmark=w, task=w, metric=w, system=OWN, value=1, note=w, command=w, leaks=w) for w in ODD]
    for _ in range(2):
        write_card(tmp_path, a, C.model, 64, {w: w for w in ODD if w})
        first = locals().get('first') or (tmp_path/'README.md').read_bytes()
        assert (tmp_path/'README.md').read_bytes()==first
    front = yaml.safe_load(first.decode().split('---\n')[1]); assert front['language']==['de'] and front['license']=='mit'
    assert [r['task'] for r in read_about(tmp_path)['scores']]==ODD and sorted(p.name for p in tmp_path.iterdir())==['README.md','about.json']
    (tmp_path/'about.json').unlink(); assert len(read_about(tmp_path)['training'])==2+len(ODD)
    print(len(ODD), 'odd texts in every place: written, parsed, read back')

def test_many_writers(chroma, tmp_path):
    "Whoever reads while others write finds a whole card."
    chroma.save_pretrained(tmp_path); stop,faults = threading.Event(),[]
    def read():
        while not stop.is_set():
            try: assert len(read_about(tmp_path)['training'])==2 and metadata_load(tmp_path/'README.md')['library_name']=='chroma_moe'
            except Exception as e: faults.append(e)
    reader = threading.Thread(target=read); reader.start()
    for _ in range(25): write_card(tmp_path, about(), C.model, 64)
    stop.set(); reader.join(); assert not faults, faults[0]
    print('25 writes under a reader: each whole')
