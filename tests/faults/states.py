"What a folder holds, whether every file under a final name is whole, and whether two folders are the same but for what a clock says."
import json, re
from pathlib import Path

import numpy as np, yaml
from safetensors import SafetensorError, safe_open

from chroma_moe.checkpoints import verify_checkpoint

TIMES = re.compile(rb'"(seconds|tokens_per_second|mfu)": [-+\d.e]+')

def temporary(name):
    "Does a path say that it is not finished?"
    return any(p.startswith('.') or p.endswith(('.new','.tmp','.part')) for p in Path(name).parts)

def files(w):
    "Every file below a folder, by its path there."
    return {str(p.relative_to(w)): p for p in sorted(w.rglob('*')) if p.is_file()}

def content(w):
    "What the files under final names hold."
    return {n: p.read_bytes() for n,p in files(w).items() if not temporary(n)}

def on_disk(content):
    "Bytes that files take on a disk."
    return sum(-(-len(data)//4096)*4096 + 4096 for data in content.values())

def _json_lines(data, cut=False):
    "Lines as values; one that was cut short by a kill or a full disk is passed over where that is allowed."
    for line in filter(None, data.split(b'\n')):
        try: yield json.loads(line)
        except ValueError:
            if not cut: raise

def _open_safetensors(path):
    with safe_open(path, 'np') as f: return [f.get_slice(k).get_shape() for k in f.keys()]

# For a file that is neither as at the end nor as before: is it whole?
WHOLE = {'.json': lambda p: json.loads(p.read_bytes()), '.jsonl': lambda p: [*_json_lines(p.read_bytes(), p.name=='metrics.jsonl')],
         '.answers': lambda p: [*_json_lines(p.read_bytes(), True)], '.safetensors': _open_safetensors,
         '.npy': lambda p: np.load(p, allow_pickle=False), '.yaml': lambda p: yaml.safe_load(p.read_text()) or 1/0,
         '.png': lambda p: p.read_bytes()[-8:-4]==b'IEND' or 1/0, '.html': lambda p: '</html>' in p.read_text()[-20:] or 1/0,
         '.md': lambda p: len(p.read_text())>50 or 1/0}
CHANGING = '.png','.html','.md','metrics.jsonl','about.json','.answers','stages.json'      # have whole states that are not the last

def _fault_of(name, path, same):
    "What is wrong with a file, where it is not one of those known."
    try:
        if same and not name.endswith(CHANGING): return f'{name} is not what the undisturbed run wrote'
        WHOLE[path.suffix](path)
    except (ValueError, KeyError, ArithmeticError, SafetensorError, yaml.YAMLError, EOFError) as e:
        return f'{name} is not whole ({type(e).__name__}: {str(e)[:80]})'

def check(w, end, before, exact):
    "Faults among the files under final names: `end` and `before` are contents, `exact` the names whose bytes are promised."
    out = []
    for n,p in files(w).items():
        if temporary(n) or 'checkpoints/' in n: continue
        if p.read_bytes() in (end.get(n), before.get(n)): continue
        if fault := _fault_of(n, p, n in exact): out.append(fault)
    for d in w.rglob('checkpoints/step-*'): out += verify_checkpoint(d)
    gone = [n for n in before if not (w/n).exists()]
    replaced = all((w/n).exists() for n in end) or any(p.name.endswith('.old') for p in w.iterdir())       # the next run puts the old one back
    return out + [f'{n} is gone' for n in gone if not replaced]

def _answers(data):
    "What a journal of answers has, whatever the order and however often."
    return sorted({json.dumps(r, sort_keys=True) for r in _json_lines(data, True)})

def without_times(name, data):
    return _answers(data) if name.endswith('.answers') else TIMES.sub(b'', data)

def differences(w, end, exact, free=()):
    "What is not as the undisturbed run left it."
    now,there = content(w),files(w)
    here,want = ({n for n in x if 'checkpoints/' not in n} for x in (now, end))
    out = [f'{n} is missing' for n in sorted(want-here)] + [f'{n} should not be there' for n in sorted(here-want)]
    for n in sorted(here&want):
        if n not in free and now[n]!=end[n] and (n in exact or without_times(n, now[n])!=without_times(n, end[n])): out.append(f'{n} differs')
    out += [f for d in w.rglob('checkpoints/step-*') for f in verify_checkpoint(d)]
    return out + [f'{n} is left behind' for n in there if temporary(n)]
