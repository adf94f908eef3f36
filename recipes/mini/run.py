"""A small embedding model from a folder of finance and shop text: from raw rows to a model folder with its scores, in one command.

    python recipes/mini/run.py --data DIR --out runs/mini                       everything; killed and started again it goes on
    python recipes/mini/run.py --data DIR --out runs/mini --strict --licensed   what the shipped model was made with
    python recipes/mini/run.py --data DIR --out runs/trial --steps 0.02         two percent of the steps, to see it run

DIR is laid out as `prepare.py` says; every dev set in it is scored at the end. Each stage is a command that also works by hand, and is printed.
"""
import argparse, json, os, shlex, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chroma_moe.config import load_config
from chroma_moe.encoder import ChromaMoE

HERE = Path(os.path.relpath(Path(__file__).parent))         # so that commands say the same on every machine
STAGES = ('data', 'tokenizer', 'own', 'bags', 'joined', 'mined', 'tuned', 'averaged', 'model', 'evaluate')
TRANSFORMER = ('mined', 'tuned', 'averaged')                 # stages that are left out without --transformer

def stage(name, done, command, log):
    "Run a command, unless what it makes is there."
    if done.exists(): return print(f'[{name}] is there', flush=True)
    print(f'[{name}] {shlex.join(map(str, command))}', flush=True)
    with open(log/f'{name}.log', 'a', encoding='utf-8') as f:
        code = subprocess.run([sys.executable, *map(str, command)], stdout=f, stderr=subprocess.STDOUT).returncode
    if code or not done.exists(): sys.exit(f'[{name}] ended with code {code}: its last words are in {log/name}.log; start the same command again to go on')

def ship(source, folder, weights, length):
    "The tuned model with small weights, under its final name only when it is whole."
    new = folder.with_name(folder.name+'.new'); shutil.rmtree(new, ignore_errors=True)
    chroma = ChromaMoE.from_pretrained(source); chroma.max_length = length
    chroma.save_pretrained(new, weights)
    os.replace(new, folder)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--data', type=Path, required=True, help='a folder with corpus/, train/ and retrieval/')
    parser.add_argument('--out', type=Path, default=Path('runs/mini'))
    parser.add_argument('--config', type=Path, default=HERE/'mini.yaml')
    parser.add_argument('--set', action='append', default=[], help='section.key=value for every stage (may be repeated)')
    parser.add_argument('--strict', action='store_true', help='train on nothing that the dev sets are judged on')
    parser.add_argument('--licensed', action='store_true', help='train on sources with clear terms only')
    parser.add_argument('--without', action='append', default=[], help='a source of pairs to leave out (may be repeated)')
    parser.add_argument('--bags', type=int, default=4, help='bags of token vectors, from as many seeds, that are joined into one')
    parser.add_argument('--surprise', type=float, default=.8, help='model.pooling.surprise of the joined bag')
    parser.add_argument('--transformer', action='store_true', help='go on from the joined bag with the transformer, and average the two')
    parser.add_argument('--at_once', type=int, default=1, help='bags that are trained side by side')
    parser.add_argument('--steps', type=float, default=1., help='share of the steps of each stage')
    parser.add_argument('--crops', type=int, default=1, help='pairs of each kind that a text gives; more for more steps, so that none comes again')
    parser.add_argument('--least', type=int, default=24_000, help='pairs of each kind that a source gives: where texts are few, each gives more than --crops')
    parser.add_argument('--until', choices=STAGES, default=STAGES[-1], help='the last stage')
    parser.add_argument('--weights', default='int8', help='of the final folder: float32, bfloat16 or int8')
    parser.add_argument('--length', type=int, default=1024, help='tokens of a text that the final model reads')
    a = parser.parse_args(); out = a.out
    if a.bags<2 or a.at_once<1: parser.error(f'--bags is {a.bags} and --at_once {a.at_once}: give two bags at least, and one at once')
    out.mkdir(parents=True, exist_ok=True)
    data,log = out/'data',out
    final,scores = (out/(k+'_transformer'*a.transformer) for k in ('model', 'scores'))      # beside those of the bag, in one folder
    def module(name, *more, sets=(), config=a.config):      # a command of the package with the recipe's settings
        every = [f'tokenizer.path={out}/tokenizer', f'data.texts={data}/texts.jsonl', f'data.valid_pairs={data}/valid.jsonl', *sets, *a.set]
        return ['-m', f'chroma_moe.{name}', '--config', config, *(x for s in every for x in ('--set', s)), *map(str, more)]
    def tuned(name, folder, files, start=None, config=a.config, seed=0):
        steps = load_config(config).tune.steps
        sets = [f'tune.steps={max(2, round(steps*a.steps))}', f'tune.seed={seed}', f'data.pairs=[{",".join(map(str, files))}]']
        begin = ['--pretrained', start] if start else []
        resume = ['--resume'] if (folder/'checkpoints').exists() else []
        stage(folder.name, folder/'model.safetensors', module(name, *begin, '--out', folder, '--no_progress', *resume, sets=sets, config=config), log)

    flags = [f'--{k}' for k in ('strict','licensed') if getattr(a, k)] + [x for w in a.without for x in ('--without', w)]
    own,mined,bags = out/'own.jsonl',out/'mined.jsonl',[out/f'bag{i}' for i in range(a.bags)]
    def bag(i): tuned('bag', bags[i], [data/'pairs.jsonl', own], config=HERE/'bag.yaml', seed=i)
    def side_by_side(f, n):
        with ThreadPoolExecutor(a.at_once) as pool: list(pool.map(f, range(n)))
    work = dict(
        data=lambda: stage('data', data/'pairs.jsonl', [HERE/'prepare.py', '--data', a.data, '--out', data, *flags], log),
        tokenizer=lambda: stage('tokenizer', out/'tokenizer', module('tokenizer', '--source', data/'texts.jsonl', '--out', out/'tokenizer',
                                                                     '--no_progress'), log),
        own=lambda: stage('own', own, module('crops', '--source', data/'texts.jsonl', '--times', a.crops, '--least', a.least, '--out', own), log),
        bags=lambda: side_by_side(bag, a.bags),
        joined=lambda: stage('joined', out/'joined'/'model.safetensors', ['-m', 'chroma_moe.joining', *(x for b in bags for x in ('--model', b)), '--source',
                                                                          data/'texts.jsonl', '--surprise', a.surprise, '--out', out/'joined'], log),
        mined=lambda: stage('mined', mined, module('mining', '--source', data/'pairs.jsonl', '--retriever', 'dense', '--model', out/'joined', '--out', mined,
                                                   '--negatives', 2, '--last', 30, '--pick', 'random', '--relative', 0.97, '--no_keep', '--no_progress'), log),
        tuned=lambda: tuned('tune', out/'tuned', [mined, own], out/'joined'),
        averaged=lambda: stage('averaged', out/'averaged'/'model.safetensors', ['-m', 'chroma_moe.averaging', '--model', out/'joined', '--model', out/'tuned',
                                                                                '--out', out/'averaged'], log),
        model=lambda: final.exists() or ship(out/('averaged' if a.transformer else 'joined'), final, a.weights, a.length),
        evaluate=lambda: stage('evaluate', scores/'results.json', ['-m', 'chroma_moe.evaluate', '--model', final, '--benchmark', f'local:{a.data}',
                               '--baselines', 'bm25,bag,hybrid:0.5,hybrid:0.7,hybrid:0.8', '--out', scores], log))
    for name in STAGES[:STAGES.index(a.until)+1]:
        if a.transformer or name not in TRANSFORMER: work[name]()
    if (scores/'results.json').exists():
        rows = json.loads((scores/'results.json').read_text(encoding='utf-8'))['rows']
        print(f'{len(rows)} figures in {scores}; the model is {final}')

if __name__=='__main__': main()
