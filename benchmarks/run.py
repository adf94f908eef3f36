"""Ours against peers and limits: runs benchmarks/bench_*.py, prints a table, writes benchmarks/results.json.

A script defines `bench() -> list[dict]`, one dict a measurement:
    name        what is measured, unique
    ours, peer  numbers of one unit, given in conditions (times: less is better)
    ratio       how many times better ours is: peer/ours for times, ours/peer for rates and scores
    target      the ratio we aim for, or None
    conditions  one line: sizes, settings, unit; both sides get the same"""
import argparse, importlib, json, os, sys, time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # so that bench_*.py can say `from run import medians`

def medians(*functions, rounds=7):
    "Median seconds of each function, measured in turn so that a busy machine slows all of them alike."
    for f in functions: f()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for f,t in zip(functions, times):
            start = time.perf_counter(); f(); t.append(time.perf_counter()-start)
    return [median(t) for t in times]

def machine():
    "What the figures depend on beside the code, without naming the machine."
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    return f'torch {torch.__version__}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, {gpu}, large blocks kept by the allocator (tune_cpu)'

def main():
    parser = argparse.ArgumentParser(description='Run the benchmarks.', allow_abbrev=False)
    parser.add_argument('names', nargs='*', help='only these, such as attention for bench_attention.py')
    parser.add_argument('--out', type=Path, default=HERE/'results.json', help='where the results go')
    args = parser.parse_args()
    scripts = [p for p in sorted(HERE.glob('bench_*.py')) if not args.names or p.stem.removeprefix('bench_') in args.names]
    known = [p.stem.removeprefix('bench_') for p in sorted(HERE.glob('bench_*.py'))]
    if unknown := set(args.names)-set(known): parser.error(f'no benchmark {", ".join(sorted(unknown))}: there are {", ".join(known)}')
    from chroma_moe.training import tune_cpu
    import torch
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS') or 1)); tune_cpu()
    print(machine())
    results = json.loads(args.out.read_text()) if args.names and args.out.exists() else {}
    print(f"{'':44}{'ours':>11}{'peer':>11}{'ratio':>8}{'target':>8}")
    for script in scripts:
        for r in importlib.import_module(script.stem).bench():
            name = r.pop('name'); results[name] = {k: r[k] for k in ('ours','peer','ratio','target','conditions')}
            target = '' if r['target'] is None else f"{r['target']:.2f}"
            met = '' if r['target'] is None else ('  met' if r['ratio']>=r['target'] else '  not met')
            print(f"{name:44}{r['ours']:11.4g}{r['peer']:11.4g}{r['ratio']:8.2f}{target:>8}{met}\n    {r['conditions']}", flush=True)
    args.out.write_text(json.dumps(results, indent=1)+'\n')
    print(f'written to {args.out}')

if __name__=='__main__': main()
