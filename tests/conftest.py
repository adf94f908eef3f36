"What every test shares: the `long` marker, the one-line reports beside the test names, and the list of what was not run."
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

def pytest_addoption(parser): parser.addoption('--long', action='store_true', help='run the tests marked `long` too')

def pytest_configure(config):
    config.addinivalue_line('markers', 'long: takes more than some seconds; runs with --long (make test-long)')
    from hypothesis import HealthCheck, settings
    shared = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))     # a busy machine is no fault; a fixture holds files only
    settings.register_profile('ci', derandomize=True, max_examples=25, **shared); settings.register_profile('long', max_examples=2000, **shared)
    settings.load_profile('long' if config.getoption('--long') else 'ci')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--long'): return
    for item in items:
        if 'long' in item.keywords: item.add_marker(pytest.mark.skip(reason='long: make test-long runs it'))

def pytest_report_teststatus(report, config):
    "Put the last line that a passing test printed beside its name."
    said = report.capstdout.strip().rpartition('\n')[2]
    if report.when=='call' and report.passed and said: return 'passed', '.', (f'PASSED: {said}', dict(green=True))

def flagged_cells(flag):
    "Names of notebooks, one for each cell that carries `#| flag`."
    books = {p: json.loads(p.read_text(encoding='utf-8')) for p in ROOT.glob('nbs/**/[!.]*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    return [p.stem for p,nb in books.items() for c in nb['cells'] if c['cell_type']=='code' and f'#| {flag}\n' in ''.join(c['source'])+'\n']

def pytest_terminal_summary(terminalreporter, config):
    "Say what neither these tests nor nbdev_test ran."
    from torch.cuda import is_available
    long = config.getoption('--long')
    for flag,run,remedy in (('slow', long, 'make test-long'), ('gpu', long and is_available(), 'make test-long where there is a GPU')):
        names = [] if run else flagged_cells(flag)
        if names: terminalreporter.write_line(f'not run: {len(names)} {flag} cells ({", ".join(sorted(set(names)))}): {remedy}')
