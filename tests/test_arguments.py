"""Every public name and every command refuses wrong arguments in a sentence that names the argument and shows its value.

The package is walked, so that no name can be forgotten: a function, a constructor or a method is checked (its arguments are made up from what its
signature says, one wrong at a time), or it is a record, or EXEMPT lists it with a reason. Which numbers may be negative or zero, and what words
there are to choose from, is said here, by the name of the argument: it is not taken from the code under test."""
import collections.abc, dataclasses, importlib, inspect, os, pkgutil, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np, pytest, torch
from fastcore.docments import docments

import chroma_moe
from chroma_moe.config import ChromaError, checked, load_config
from chroma_moe.encoder import ChromaMoE
from chroma_moe.model import ChromaModel
from chroma_moe.tokenizer import ChromaTokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
COMMANDS = dict(e.split('=') for e in cfg['DEFAULT']['console_scripts'].split())
MODULES = [importlib.import_module(f'chroma_moe.{m.name}') for m in pkgutil.iter_modules(chroma_moe.__path__) if m.name[0]!='_']

# what needs no check, and why: module.name, or module.* and module.Class.* for all of it
EXEMPT = {n: reason for reason,names in {
    'runs in every layer, for every loss, part or step, on what our own modules made: a check would cost time, and restate torch': '''
        attention.* blockwise.* experts.* moe.* pooling.* gradcache.* expert_parallel.* losses.Group losses.firsts losses.infonce losses.Answered.*
        losses.own_cosines losses.own losses.listwise losses.distil losses.triplet losses.contrastive losses.cosine losses.cosent losses.likeness
        losses.Contrast.forward losses.Contrast.clamp masking.noise masking.mask_flat model.make_norm model.Block model.writes_stream
        model.ChromaModel.hidden model.ChromaModel.enter model.ChromaModel.words model.ChromaModel.embed model.ChromaModel.step model.ChromaModel.forward
        optim.decays optim.newton_schulz optim.matrix_parts optim.muon_direction optim.is_hidden_matrix optim.Muon sharding.shard sharding.is_cut
        sharding.gather sharding.share sharding.load_whole sharding.unshard sharding.send_after sharding.clip_gradients parallel.Ranks.total
        parallel.Ranks.add parallel.Ranks.gather parallel.Ranks.collect parallel.Ranks.say parallel.of_some parallel.sum_gradients parallel.whole_stats
        parallel.asked_of_launcher shared_encoding.after_main shared_encoding.SharedEncoder.work training.accumulate training.seed_step
        training.optimizer_state training.load_optimizer training.Trainer.use training.Trainer.advance training.Trainer.check training.Trainer.note
        training.Trainer.write training.Trainer.state training.Trainer.load training.Trainer.resume training.Trainer.fit training.Trainer.judge
        training.Trainer.save training.Trainer.leave training.Feed.load training.epochs.load generation.next_probabilities generation.draw
        generation.Writer.step generation.Writer.drop generation.find_stop generation.Tail.add pretrain.masked_loss pretrain.TextBatches.load
        tune.TokenBag.embed tune.PairBatches.load tune.PairBatches.tokens tune.PairBatches.rows tune.classes indexing.bit_words
        indexing.differing_bits packing.pack packing.Packed hf.unpad plan.saved_bytes plan.Layout.numbers plan.Layout.spreads config.MoEConfig.dense_width
        store.StoreReader store.TokenStore.chunk monitor.MetricsLog.add monitor.in_words monitor.Progress.step monitor.Monitor.add
        monitor.Monitor.replay monitor.peak_flops sink.serve sink.WandbSink.log sink.WandbSink.picture sink.WandbSink.finish''',
    'is called for each row, word or request with what a reader, a parser or the generator made; what people bring is checked before it gets there': '''
        registry.as_is registry.register registry.letters registry.edgar_rows registry.sentence_rows registry.news_rows registry.multisource_rows
        registry.flat registry.convfinqa_rows registry.plain registry.esci_product registry.esci_check registry.esci_keep registry.esci_rows
        registry.review_rows registry.product_rows registry.article_rows registry.marco_rows registry.answer_rows registry.triplet_rows
        registry.similar_rows registry.scored_rows registry.paraphrase_rows registry.Source.rows rows.shown rows.text_fault rows.check_row rows.complete
        leaks.normal leaks.word_hashes leaks.gram_hashes leaks.text_hashes leaks.LeakGuard.filter crops.split crops.crop crops.keywords esci.words
        esci.judgement esci.bm25_scores serving.Job serving.Job.finish serving.Batcher.submit serving.Service.run serving.Service.wait
        serving.Service.embed serving.Offer.check_model serving.read_body sources.explain sources.hub_files sources.Report sources.Report.fault
        sources.Reader.finish mining.choose mining.Rules.margins mining.WordSearch.queries mining.VectorSearch.queries mining.VectorSearch.asked
        mining.Corpus.find synthesis.Dropped.add synthesis.Pace.take synthesis.Pace.settle synthesis.Pace.hold synthesis.Endpoint.request
        synthesis.Endpoint.guess synthesis.Endpoint.ask synthesis.quarter synthesis.Answers.add synthesis.make_report synthesis.Prompt.filled
        systems.Bag.fit systems.Hybrid.fit indexing.Rows indexing.IndexWriter.add tokenizer.ChromaTokenizer.decode tokenizer.general_texts
        mteb_tasks.sentence files.parse_json files.seal files.unseal''',
    'is a part of the generator of the built-in corpus: each text takes dozens of such calls, all of them from `World`, which is checked': '''
        world.stream world.check_split world.split_of world.stem world.owns world.draw world.lexicon world.say world.Frames world.Frames.pick
        world.sentence world.make_company world.make_fact world.amount world.fact_words world.body world.tail world.finance_document
        world.make_product world.attribute_words world.shop_document world.review world.finance_query world.shop_query world.grade world.answers
        world.near_facts world.near_products world.order_item''',
    'takes arrays, or whatever numpy makes one of: numpy says what it cannot be made of': '''
        labels.pair_scores metrics.pearson metrics.average_ranks metrics.spearman monitor.load_entropy pictures.principal indexing.Index.numbers
        indexing.Index.check indexing.Index.take''',
    'takes anything that can be printed, or any dataclass': '''
        charts.Markup charts.escape charts.join charts.tag charts.finite charts.number charts.mean config.to_dict config.to_yaml''',
    'hands its arguments on to one that checks them': '''
        encoder.ChromaMoE.encode_query encoder.ChromaMoE.encode_document encoder.ChromaMoE.find_similar generation.ChromaLM generation.ChromaLM.generate
        shared_encoding.SharedEncoder.encode mteb_tasks.mteb_tasks''',
    'takes several kinds of things, and is tried in test_by_hand': '''
        encoder.ChromaMoE.similarity encoder.ChromaMoE.similarity_pairwise evaluate.parse_benchmarks evaluate.parse_baselines
        world.parse_size encoder.check_device long_context.reading_limit''',
    'has an interface that belongs to another library': '''
        hf.ChromaMoEModel hf.ChromaMoETokenizer.* mteb_tasks.MtebEncoder.encode mteb_tasks.MtebEncoder.similarity mteb_tasks.MtebEncoder.similarity_pairwise
        mteb_tasks.MtebSystem hf.ChromaMoEModel.*''',
    'is the check itself, or what it raises': '''
        config.ChromaError config.ConfigError config.need config.check_value config.checked config.check_fields config.cli config.veiled
        config.visible config.read_text serving.Refusal synthesis.NoAnswer''',
}.items() for n in names.split()}

# what arguments may be, by their names. Numbers may be zero and not negative, but for these
NEGATIVE = 'relevant difference every low high top bottom save_every'.split()
COUNTS = """k n block batch_size batch_tokens window budget max_length part passage_tokens chunk items passage expert ranks queries tile probes dim width
    keep limit vocab_size concurrency chunk_chars chunk_tokens max_chars depth bins batch_texts top_k oversample per_machine gpus""".split()
WHICH = """long_context.plant long_context.filler long_context.fill training.epochs tokenizer.train_bpe tokenizer.ChromaTokenizer.train parallel.how
    tokenizer.chroma_tokenizer sources.Reader""".split()                         # here 0 is a number like others, or what follows refuses it with more to say
SHARES = 'max_bad masked ratio corrupt smooth share head reached'.split()       # 1.5 is refused
EITHER = ('text','pair')
WORDS = dict(precision=('float32','int8','uint8','binary','ubinary'), weights=('float32','bfloat16','int8'), first=('int8','binary'), spans=('geometric','t5'),
    strategy=('weighted','equal','proportional'), digits=('whole','split'), by=('step','tokens'), purpose=('train','evaluate'), how=('scores','places'),
    pick=('hardest','random'), role=('query','document'), dtype=('float32','bfloat16'), retrievers=('bm25','dense'), retriever=('bm25','dense'),
    kinds=('crop','keywords'))
WORDS_OF = {'parallel.start.precision': ('auto','fp32','bf16','fp16'), 'sources.open_source.split': ('train','valid','test'),
    'esci.list_scores.gains': ('paper','official_script'), 'crops.chroma_crop.kind': ('crop','keywords'),
    'card.settings_of.section': ('pretrain','tune'), 'pictures.map_of.kind': ('pca','tsne'), 'model.save_model.kind': ('float32','bfloat16','int8'),
    'precision.shrink_weights.kind': ('bfloat16','int8'), **{f'mining.{f}.index': ('exact','faiss') for f in ('prepare','mine_pairs','chroma_mine')},
    'sources.Reader.kind': EITHER, 'sources.open_source.kind': EITHER, 'data.source_table.kind': EITHER,
    **{f'data.chroma_data.{f}.kind': EITHER for f in ('peek','leaks','list')},
    **dict.fromkeys('parallel.Ranks.precision mteb_tasks.find_prompt.role monitor.mfu.dtype mixing.Stream.weights precision.shrink_weights.weights '
                    'registry.Source.purpose store.merge_stores.weights synthesis.chroma_synthesise.retriever'.split())} # these are something else
FREE = {k: what for what,names in {                                                # arguments without a kind in the signature
    'arrays, texts, rows': 'a b x values vectors point points positive scores right wrong at ids lengths table shares labels queries docs query sentences rows',
    'objects that only have to act alike': '''encoder tokenizer tok system model dense words bag index app file world accelerator wandb source phase device
        dtype trouble refusal''',
    'several kinds of things': 'data default encoding parts tasks terms config split score'}.items() for k in names.split()}

def is_checked(f):
    "Does a `checked` stand anywhere around `f`?"
    while f is not None:
        code = getattr(f, '__code__', None)
        if code and 'rules' in code.co_freevars and code.co_filename==checked.__code__.co_filename: return True
        f = getattr(f, '__wrapped__', None)

def everything():
    "Name and object of all that people can call: functions, classes and their methods."
    for m in MODULES:
        for n in m.__all__:
            o,name = getattr(m, n),f"{m.__name__.partition('.')[2]}.{n}"
            if not callable(o): continue
            yield name, o
            for k in vars(o) if inspect.isclass(o) else ():
                if k[0]!='_' and callable(getattr(o, k)) and k not in ('parser','main'): yield f'{name}.{k}', getattr(o, k)

def listed(name): # by itself, with its class, or with its module
    module,_,rest = name.partition('.'); cls = f"{module}.{rest.partition('.')[0]}"
    return any(k in EXEMPT for k in (name, cls, cls+'.*', module+'.*'))

def kind_of(name, f):
    "checked, fields (a dataclass that checks its fields), record, nothing (there are no arguments), exempt, or None."
    if listed(name): return 'exempt'
    if inspect.isclass(f):
        if issubclass(f, tuple): return 'record'
        if dataclasses.is_dataclass(f): return 'fields' if 'check_fields' in inspect.getsource(f) else None
        f = f.__init__
        if f is object.__init__: return 'nothing'
    elif '.'.join(name.split('.')[:2]) in RECORDS: return 'record'
    if is_checked(f): return 'checked'
    return 'nothing' if not [k for k in inspect.signature(f).parameters if k not in ('self','cls')] else None

RECORDS = {name for name,f in everything() if inspect.isclass(f) and issubclass(f, tuple)}

def test_nothing_is_forgotten():
    "Every name is checked, a record, without arguments, or listed with a reason; and nothing is listed that is not there, or is checked after all."
    kinds,of = {n: kind_of(n, f) for n,f in everything()},dict(everything())
    assert not (left := [n for n,k in kinds.items() if k is None]), f'neither checked nor listed in EXEMPT: {left}'
    there = {*kinds} | {p for n in kinds for p in (n+'.*', n.rpartition('.')[0]+'.*')}
    assert not (gone := {*EXEMPT}-there), f'listed in EXEMPT, and not in the package: {sorted(gone)}'
    twice = [n for n in EXEMPT if n in of and is_checked(getattr(of[n], '__init__', of[n]) if inspect.isclass(of[n]) else of[n])]
    assert not twice, f'checked, and listed in EXEMPT: {twice}'
    print(', '.join(f'{v} {k}' for k,v in Counter(kinds.values()).most_common()))

class Anything: "Stands for an object of any class."

GOOD = {int: 1, float: .5, str: 'a', bool: True, Path: 'a', os.PathLike: 'a',
    dict: {}, collections.abc.Mapping: {}, collections.abc.Callable: print, bytes: b'a'}
BAD = {int: ['three', 2.5, True, None, [1], -1], float: ['half', None, [.5], True, float('nan'), float('inf'), -1.], str: [5, None, b'a', ['a'], True],
       bool: ['yes', 1, None], Path: [5, None, ['a']], os.PathLike: [5, None, ['a']], dict: [5, 'a', ['a'], None], collections.abc.Mapping: [5, 'a', None],
       collections.abc.Callable: [5, 'a', None], bytes: ['a', None], list: ['a', 5, None, {}]}

def parts(kind): return get_args(kind) if (get_origin(kind) or kind) in (Union, UnionType) else (kind,)
def plain(kind): return get_origin(kind) or kind
def is_many(kind): return plain(kind) in (list,tuple,set) or getattr(plain(kind), '__module__', '')=='collections.abc' and plain(kind) not in GOOD
def element(kind): return next((k for k in get_args(kind) if k is not ...), Any)

def good(kind, name, words):
    "A value that fits."
    if words: return words[0]
    k = parts(kind)[0]
    if is_many(k): return []
    if k in (np.ndarray, torch.Tensor): return np.zeros((1,1))
    return GOOD.get(plain(k), Anything())

def bad(kind, default):
    "Values that do not fit."
    kinds = [plain(k) for k in parts(kind)]
    if Any in kinds or object in kinds: return []
    many,one = is_many(parts(kind)[0]),plain(element(parts(kind)[0]))
    tried = [*BAD.get(kinds[0], BAD[list][:3 if kinds[0] is collections.abc.Iterable else 4] if many else [5, 'a', None, [1], {}])]
    if many and one in (str,int,float,dict): tried.append([BAD[one][0]])         # an element that does not fit
    also = {float: (float,int), NoneType: (NoneType,), Path: (str,), os.PathLike: (str,), collections.abc.Mapping: (dict,)}
    fine = lambda v: any(type(v) in ((list,tuple) if is_many(k) else also.get(k, (k,))) for k in kinds[1:])
    return [v for v in tried if not fine(v) and v is not default]

def arguments(name, f):
    "(argument, its kind, wrong values) of what is checked."
    g = f.__init__ if inspect.isclass(f) else f
    hints = get_type_hints(inspect.unwrap(g)) if not dataclasses.is_dataclass(f) else get_type_hints(f)
    for k,p in inspect.signature(f).parameters.items():
        if k=='self' or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        yield k, hints.get(k, Any), p.default

def about(f, k): # what the signature says of an argument
    return (docments(f, full=True).get(k) or {}).get('docment') if not dataclasses.is_dataclass(f) else '0'

@pytest.mark.parametrize('module', [m.__name__.partition('.')[2] for m in MODULES])
def test_wrong_arguments(module):
    "Of each argument in turn everything that does not fit."
    tried,names = 0,0
    for name,f in everything():
        if not name.startswith(module+'.') or kind_of(name, f) not in ('checked','fields'): continue
        args,names = {k: (kind, default) for k,kind,default in arguments(name, f)},names+1
        words = {k: WORDS_OF.get(f'{name}.{k}', WORDS.get(k)) for k in args}
        base = {k: good(kind, k, words[k]) for k,(kind,default) in args.items() if default is inspect.Parameter.empty}
        if 'self' in inspect.signature(f).parameters: base['self'] = Anything()
        for k,(kind,default) in args.items():
            wrong = bad(kind, default)
            numeric = {int,float} & {*parts(kind)}
            if k in NEGATIVE: wrong = [v for v in wrong if not (numeric and isinstance(v, (int,float)) and v==-1)]
            if words[k]: wrong.append(['nonsense'] if is_many(parts(kind)[0]) else 'nonsense')
            if numeric and k in SHARES: wrong.append(1.5)
            if int in numeric and k in COUNTS and name not in WHICH and default!=0 and '0' not in (about(f, k) or ''): wrong.append(0)
            for v in wrong:
                try: f(**base|{k: v}); said = 'it was taken'
                except ChromaError as e: said = str(e)
                except Exception as e: said = f'{type(e).__name__}: {e}'
                tried += 1
                shown = f'{v!r:.60}' if not (isinstance(v, list) and len(v)==1 and (f'{k}[0]' in said or v==['nonsense'])) else f'{v[0]!r:.60}'
                assert k in said and shown in said and '\n' not in said and len(said)<400, f'{name}({k}={v!r}): {said}'
        unknown = [k for k,(kind,_) in args.items() if kind is Any and k not in FREE]
        assert not unknown, f'{name}: {unknown} have no kind in the signature, and FREE does not list them'
    print(f'{module}: {names} names, {tried} wrong values refused')

def refusal(main, argv, capsys):
    "The sentence with which a command ends."
    with pytest.raises(SystemExit) as e: main(argv)
    err = capsys.readouterr().err
    assert e.value.code not in (0, None) and 'Traceback' not in err, (argv, e.value.code, err)
    return e.value.code if isinstance(e.value.code, str) else err.strip().splitlines()[-1]

def functions(command):
    "(words in front, function) of a command: one, or one for each subcommand."
    home,_,path = COMMANDS[command].partition(':'); f = getattr(importlib.import_module(home), path.partition('.')[0])
    if not isinstance(f, type): return f.main, [([], f)]
    return f.main, [([k], v.__func__) for k,v in vars(f).items() if isinstance(v, staticmethod) and k not in ('parser','main')]

@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_options(command, capsys, tmp_path, monkeypatch):
    "Of each option in turn everything that does not fit, as strings; and one that there is not."
    monkeypatch.chdir(tmp_path); main,runs = functions(command); tried = 0
    for front,f in runs:
        module = f.__module__.partition('.')[2]; args = {k: (kind, default) for k,kind,default in arguments(command, f)}
        base = [*front, *(WORDS_OF.get(f'{module}.{command}.{k}', ['a'])[0] for k,(_,default) in args.items() if default is inspect.Parameter.empty)]
        for k,(kind,_) in args.items():
            words = WORDS_OF.get(f"{module}.{'.'.join([command, *front])}.{k}", WORDS.get(k))
            for v in [*(['three','2.5','-1'] if int in parts(kind) else ['half','nan','-1'] if float in parts(kind) else []), *(['nonsense'] if words else [])]:
                said = refusal(main, [*base, f'--{k}={v}'], capsys); tried += 1
                assert k in said and v in said, f'{command} --{k}={v}: {said}'
        assert '--nonsense' in refusal(main, [*base, '--nonsense=1'], capsys)
    print(f'{command}: {tried+len(runs)} wrong options refused')

# what each command says of names and places that there are not: command line | part of the sentence
SAYS = [[x.strip() for x in l.split('|')] for l in """
chroma_config --set dim | write it as section.key=value
chroma_tokenizer --source nowhere.txt | nowhere.txt
chroma_tokenizer --max_samples few | 'few'
chroma_tokenizer --verify nowhere | nowhere
chroma_tokenizer --adopt nowhere | nowhere
chroma_data peek nowhere.csv | nowhere.csv
chroma_data peek world --split middle | split is 'middle'
chroma_data verify nowhere | nowhere
chroma_data merge --store nowhere | nowhere
chroma_data build --source nowhere.txt --tokenizer nowhere | nowhere
chroma_data leaks nowhere.jsonl | nowhere.jsonl
chroma_data list --kind video | kind is 'video'
chroma_pretrain --set tokenizer.path=nowhere | nowhere
chroma_mine --source nowhere.jsonl | nowhere.jsonl
chroma_mine --retriever sparse | retriever is 'sparse'
chroma_mine --relative 2 | relative is 2
chroma_crop --source nowhere.txt | nowhere.txt
chroma_crop --kind whole | kind is 'whole'
chroma_tune --pretrained nowhere | no model folder 'nowhere'
chroma_bag --profile mini --set tokenizer.path=nowhere | nowhere
chroma_bag | model.pooling.log_counts is False
chroma_average | --model
chroma_average --model nowhere | nowhere
chroma_average --run nowhere | nowhere
chroma_join | two bags at least
chroma_join --model nowhere --model other --source nowhere.txt | nowhere
chroma_join --model model --model model | there are no texts
chroma_join --model model --model model --source texts.txt | is more than a bag
chroma_join --power 2 | power is 2
chroma_plot nowhere | nowhere
chroma_demo --minutes 0 | minutes is 0
chroma_synthesise --source nowhere.txt --model m --url http://localhost:9 | nowhere.txt
chroma_synthesise --model m --url nowhere | nowhere
chroma_serve --model nowhere | no model folder 'nowhere'
chroma_serve --limit few=1 | few
chroma_serve --limit texts=0 | limit texts is 0
chroma_serve --port 70000 | port is 70000
chroma_serve --api_key_file nowhere | nowhere
chroma_serve --host nowhere.invalid | nowhere.invalid
chroma_encode | no --input
chroma_encode --input nowhere.txt | no file or folder 'nowhere.txt'
chroma_encode --input texts.txt --model nowhere | no model folder 'nowhere'
chroma_encode --input texts.txt --model model --device nowhere | device is 'nowhere'
chroma_encode --input texts.txt --model model --prompt_name nonsense | prompt_name is 'nonsense'
chroma_encode --input texts.txt --model model --truncate_dim 9999 | truncate_dim is 9999
chroma_search --query a | --index
chroma_search --query a --index nowhere | no model folder 'runs/demo/model'
chroma_search --query a --model model --index nowhere | 'nowhere'
chroma_search --query a --model model --input nowhere.txt | no file or folder 'nowhere.txt'
chroma_evaluate --model nowhere | no model folder 'nowhere'
chroma_evaluate --benchmark nonsense | nonsense
chroma_evaluate --baselines nonsense | nonsense
chroma_evaluate --model model --device nowhere | device is 'nowhere'
chroma_generate | nothing to do
chroma_generate --checkpoint nowhere --prompt a | no model folder 'nowhere'
chroma_generate --checkpoint model --prompt a | clm
chroma_generate --checkpoint model --prompt a --device nowhere | device is 'nowhere'
chroma_plan --gpus 0 | gpus is 0
""".strip().splitlines()]
CONFIG = [l.split(' | ') for l in """
--profile nonsense | active_model_profile is 'nonsense'
--set model.dim=-1 | model.dim is -1
--set model.nonsense=1 | 'model.nonsense'
--config nowhere.yaml | no config file 'nowhere.yaml'
""".strip().splitlines()]                                                         # of every command that has the option

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A tiny model in memory and in a folder, beside a file of texts."
    home = tmp_path_factory.mktemp('arguments'); texts = ['red shoes and a blue kettle', 'net income rose 12% in the quarter']*20
    chroma = ChromaMoE(ChromaModel(load_config(profile='tiny', sets=['model.vocab_size=300']).model), ChromaTokenizer.train(texts, 300), 64)
    chroma.save_pretrained(home/'model'); (home/'texts.txt').write_text('\n'.join(texts)+'\n')
    return home, chroma

@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_names_and_places(command, model, capsys, monkeypatch):
    "A command that is refused says why, and leaves no file behind."
    monkeypatch.chdir(model[0]); monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    files = lambda: {p for p in model[0].rglob('*') if p.is_file()}; there = files()
    main,runs = functions(command); cases = [(line.removeprefix(command), says) for line,says in SAYS if line.split()[0]==command]
    assert cases, f'SAYS has no line for {command}'
    for front,f in runs:
        known = inspect.signature(f).parameters; first = [*front, *('a' for p in known.values() if p.default is p.empty)]
        cases += [(' '.join([*first, words]), says) for words,says in CONFIG if words.split()[0][2:] in known]
    for words,says in cases:
        said = refusal(main, words.split(), capsys)
        assert says in said and said.count('\n')==0 and said.startswith(command), f'{command} {words}: {said}'
        assert not (new := files()-there), f'{command} {words} leaves {new}'
    print(f'{command}: {len(cases)} refusals')

def test_by_hand(model):
    "Arguments that take several kinds of things, or whose words depend on the model."
    from chroma_moe import evaluate, world
    from chroma_moe.encoder import check_device
    _,chroma = model; index = chroma.index(['a','b'])
    refused = {
        '5 is of type int': lambda: chroma.encode(5), 'text 1 is of type int': lambda: chroma.encode(['a',5]), 'type bytes': lambda: chroma.encode(b'a'),
        "prompt_name is 'nonsense': give one of query, document": lambda: chroma.encode('a', prompt_name='nonsense'),
        'truncate_dim is 9999': lambda: chroma.encode('a', truncate_dim=9999), "device is 'nowhere'": lambda: chroma.encode('a', device='nowhere'),
        'passage_tokens is 999': lambda: chroma.encode_passages(['a'], passage_tokens=999), '6 is of type int': lambda: chroma.encode_query(6),
        '1 texts were given 2 ids': lambda: chroma.encode_passages(['a'], ['x','y']), '7 is of type int': lambda: chroma.find_similar(7, ['a']),
        'index of no texts': lambda: chroma.index([]), 'top_k is 0': lambda: chroma.search('a', index, top_k=0),
        "first is 'bits'": lambda: chroma.search('a', index, first='bits'), 'vectors are of type int64': lambda: chroma.similarity([1,2], 'a'),
        'vectors of 3 numbers': lambda: chroma.similarity(np.ones(3, np.float32), 'a'),
        'two lists of one length': lambda: chroma.similarity_pairwise(['a'], ['a','b']),
        "no model folder 'nowhere'": lambda: chroma.from_pretrained('nowhere'), "dtype is 'float8'": lambda: chroma.from_pretrained('nowhere', dtype='float8'),
        "'benchmark'": lambda: evaluate.parse_benchmarks(['benchmark']), "'baseline'": lambda: evaluate.parse_baselines(['baseline']),
        "'few'": lambda: world.parse_size('few'), "device is 'there'": lambda: check_device('there')}
    for says,f in refused.items():
        with pytest.raises(ChromaError) as e: f()
        assert says in str(e.value) and '\n' not in str(e.value), (says, str(e.value))
    print(f'{len(refused)} refusals')

def test_one_as_the_shell_starts_it(tmp_path):
    r = subprocess.run([sys.executable, '-m', 'chroma_moe.encode', '--part', '0'],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ|dict(PYTHONPATH=str(ROOT)))
    assert r.returncode==1 and r.stderr=='chroma_encode: part is 0: it must be at least 1\n' and not r.stdout, r
    print(r.stderr.strip())
