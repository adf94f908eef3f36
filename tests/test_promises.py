"The page of promises names tests that there are, and marks those that are long."
import ast, json, re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ''.join(''.join(c['source'])+'\n' for c in json.loads((ROOT/'nbs/promises.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
NAMED = re.findall(r'`([\w/]+\.py)::(\w+)`(\*?)', PAGE)

def marks(file):
    "Name -> is it marked long, of the tests in a file; of its fixtures and helpers nothing."
    tree = ast.parse((ROOT/'tests'/file).read_text(encoding='utf-8'))
    found = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith('test_')]
    return {f.name: any('mark.long' in ast.unparse(d) for d in f.decorator_list) for f in found}

def test_each_test_exists():
    known = {f: marks(f) for f in {f for f,_,_ in NAMED} if (ROOT/'tests'/f).exists()}
    assert not (gone := [f'{f}::{t}' for f,t,_ in NAMED if t not in known.get(f, ())]), f'promised, and not there: {gone}'
    assert not (wrong := [f'{f}::{t}' for f,t,star in NAMED if known[f][t]!=(star=='*')]), f'a star stands where a test is long, and only there: {wrong}'
    assert PAGE.count('::')==len(NAMED)+1, 'a test is named in a way that is not understood (one `::` explains the others)'
    print(f'{len(NAMED)} tests named, {len(set(NAMED))} of them different, in {len(known)} files')

def test_each_promise_is_held():
    "Each row of the tables names a test."
    rows = [l for l in PAGE.splitlines() if l.startswith('|') and not l.startswith(('|---','| promise'))]
    assert len(rows)>30 and not (bare := [r[:80] for r in rows if not re.search(r'::\w+`', r)]), bare
    print(f'{len(rows)} promises')
