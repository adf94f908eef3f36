"The glue between nbdev and Sphinx in pieces, then the built site: its files, and what a browser makes of them."
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from urllib.parse import unquote, urlsplit

import chrome
import pytest
from fastcore.basics import AttrDict
from nbdev.config import get_config

from chroma_moe._modidx import d as modidx

ROOT = Path(__file__).parents[1]
DOCS = ROOT/'_docs'
sys.path.insert(0, str(ROOT/'nbs/_site'))
import prep  # noqa: E402

def cell(kind, source, **kw): return AttrDict(cell_type=kind, source=source, **kw)

# The glue

def test_callouts():
    box = '::: {.callout-tip}\n## Look\nOne.\n\nTwo.\n:::'
    assert prep.callouts(f'a\n\n{box}\n\nb')=='a\n\n:::{admonition} Look\n:class: tip\nOne.\n\nTwo.\n:::\n\nb'
    assert prep.callouts(':::{.callout-note}\nNo title.\n:::').startswith(':::{admonition} Note\n:class: note\nNo title.')
    assert prep.callouts('no box')=='no box'

def test_links():
    labels,names = {'config.need','moe.moe'},{'05_attention':'attention'}
    f = lambda s: prep.links(s, labels, names)
    assert f(f'[`need`]({prep.base}/config.html#need)')=='[`need`](#config.need)'
    assert f(f'[`MoE.forward`]({prep.base}/moe.html#moe.forward)')=='[`MoE.forward`](#moe.moe)', 'a method opens the card of its class'
    assert f(f'[`_private`]({prep.base}/moe.html#_private)')=='`_private`'
    assert f('[`L`](https://fastcore.fast.ai/foundation.html#l) [`L`](https://example.com)')=='`L` [`L`](https://example.com)'
    assert f('[a](05_attention.ipynb#rotary) [b](../05_attention.ipynb)')=='[a](attention.ipynb#rotary) [b](../attention.ipynb)'
    assert f('[c](99_missing.ipynb)')=='[c](99_missing.ipynb)', 'left for Sphinx to refuse'

def test_card():
    label,text = prep.card('need', 'config')
    assert label=='config.need'
    assert text.startswith('(config.need)=\n## need\n\n```python\ndef need(') and 'ok:bool, # the condition' in text
    assert '[in the book](#book.config.need)' in text
    assert '/config.html#configerror)' in text, 'names in a docstring are links'
    assert '# H, attention heads' in prep.card('AttentionConfig', 'config')[1], 'fields of a dataclass have their comments'

def test_convert():
    exported = '#| code-fold: show\n#| code-summary: "Exported source"\n'
    nb = AttrDict(cells=[cell('raw', '---\ntitle: Thing\ndescription: What it is\noutput-file: config.html\n---\n'),
        cell('markdown', '<!-- WARNING: made -->'), cell('markdown', 'Why.'), cell('code', exported+'import torch'),
        cell('code', '#| echo: false\n#| output: asis\nshow_doc(need)'), cell('code', exported+'def need(): "Do."\ndef _g(): pass'),
        cell('code', 'import torch')])
    page,title,cells,cards = prep.convert(nb, '00_config')
    assert (page,title)==('config','Thing') and [c[0] for c in cards]==['config.need']
    assert [c.source for c in cells]==['# Thing\n\n> What it is\n', 'Why.', '(book.config.need)=',
                                       'def need(): "Do."\ndef _g(): pass', 'import torch']

def test_readme():
    links = f'[`need`]({prep.base}/config.html#need) [a](05_attention.ipynb) ![p](images/p.svg) [c](../config.yaml) [w](https://x.y/z.png)'
    s = prep.readme([cell('markdown', f'# T\n\n{links}'), cell('markdown', ':::{admonition} Note\n:class: note\nOne.\nTwo.\n:::'),
        cell('code', 'print(1)', outputs=[dict(text=['1\n'])])])
    assert '`need` [a](nbs/05_attention.ipynb) ![p](nbs/images/p.svg) [c](config.yaml) [w](https://x.y/z.png)' in s
    assert '> **Note.** One.\n> Two.' in s and s.endswith('```python\nprint(1)\n```\n\n```\n1\n```\n')

def test_commands_page():
    names,page = [o.partition('=')[0] for o in get_config().console_scripts.split()],prep.commands()
    for name in names: assert f'\n## {name}\n' in page and f'usage: {name}' in page
    print('help of', *names)

# The files of the built site

class Page(HTMLParser):
    "What a page loads, where it links, and the ids in it."
    def __init__(self, path):
        super().__init__(); self.loads,self.hrefs,self.ids = [],[],set()
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids.update(filter(None, (a.get('id'), a.get('name'))))
        if tag=='a': self.hrefs.append(a.get('href') or '')
        elif 'src' in a or tag=='link': self.loads.append(a.get('src') or a.get('href') or '')

@pytest.fixture(scope='module')
def pages():
    if not (DOCS/'index.html').exists(): pytest.skip('the site is not built: run make docs')
    return {p: Page(p) for p in sorted(DOCS.rglob('*.html')) if '_static' not in p.parts}

def test_no_external_assets(pages):
    loads = [(p.name,s) for p,page in pages.items() for s in page.loads if re.match(r'(https?:)?//', s)]
    css = [p.name for p in DOCS.glob('_static/*.css') if re.search(r'(url\(|@import\s*)["\']?(https?:)?//', p.read_text(encoding='utf-8'))]
    assert not loads and not css
    print(f'{len(pages)} pages load', len({s for p in pages.values() for s in p.loads}), 'files, all local')

def test_links_resolve(pages):
    broken,n = [],0
    for p,page in pages.items():
        for href in page.hrefs:
            u = urlsplit(href)
            if u.scheme or not href: continue
            n += 1; target = (p.parent/unquote(u.path)).resolve() if u.path else p
            lost = u.fragment and target in pages and unquote(u.fragment) not in pages[target].ids
            if lost or not target.exists(): broken.append((p.name, href))
    assert not broken
    print(f'{n} links, none broken')

# The site in a browser

@pytest.fixture(scope='module')
def browser(pages):
    if not chrome.find(): pytest.skip('there is no Chromium: apt-get install chromium')
    b = chrome.Chrome(); yield b; b.close()

def complaint(method, x):
    "What a browser event has to complain about, if anything."
    if method=='Runtime.exceptionThrown': return 'exception', x['exceptionDetails']['text']
    if method=='Runtime.consoleAPICalled' and x['type']=='error': return 'console', str(x['args'])[:200]
    if method=='Log.entryAdded' and x['entry']['level']=='error': return 'log', x['entry']['text'], x['entry'].get('url')
    if method=='Network.requestWillBeSent' and not x['request']['url'].startswith(('file:','data:','blob:')):
        return 'request', x['request']['url']

def test_every_page_in_browser(browser, pages, request):
    "No console errors, no request that leaves the disk, maths drawn, nothing wider than a phone; of the reference every fourth page without --long."
    wrong,times,maths = [],[],0
    if not request.config.getoption('--long'): pages = [p for i,p in enumerate(pages) if p.parent.name!='api' or i%4==0]
    for p in pages:
        wrong += [(p.name, w) for e in browser.open(p.as_uri()) if (w := complaint(e['method'], e['params']))]
        times.append(browser.js('performance.timing.loadEventEnd - performance.timing.navigationStart')/1000)
        count = lambda s: browser.js(f'document.querySelectorAll("{s}").length')
        found,drawn,bad = count('span.math, div.math'), count('.math mjx-container'), count('mjx-merror')
        maths += drawn
        if drawn<found or bad: wrong.append((p.name, f'{drawn} of {found} formulas drawn, {bad} with errors'))
        browser.size(390, 800)
        width = browser.js("Math.max(...[...document.querySelectorAll('html, .content')].map(o => o.scrollWidth))")
        if width>390: wrong.append((p.name, f'{width} pixels wide on a phone of 390'))
    assert not wrong
    assert maths and median(times)<5
    print(f'{len(pages)} pages, {maths} formulas, {median(times):.2f} s a page at median, {max(times):.2f} s at most')

def test_sidebar_reaches_every_page(browser, pages):
    browser.open((DOCS/'index.html').as_uri())
    seen = set(browser.js("[...document.querySelectorAll('.sidebar-tree a, .sidebar-brand')].map(a => a.href.split('#')[0])"))
    missing = [p.name for p in pages if p.as_uri() not in seen and p.name not in ('search.html','index.html')]
    assert not missing
    print(len(seen), 'pages in the sidebar')

def test_search(browser):
    names = [n.rpartition('.')[2] for syms in modidx['syms'].values() for n in syms]
    name = 'LatentPooling' if 'LatentPooling' in names else next(n for n in names if n[0].isupper())
    browser.open((DOCS/'search.html').as_uri()+f'?q={name}')
    hits = browser.wait("[...document.querySelectorAll('#search-results ul.search li a')].map(a => a.textContent)")
    assert hits
    print(f'{name} is found in', *[repr(h) for h in hits[:4]])

def test_dark_mode(browser):
    page = (DOCS/'index.html').as_uri()
    colours = []
    for scheme in ('light','dark'):
        browser.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        browser.open(page); colours.append(browser.js("getComputedStyle(document.body).backgroundColor"))
    browser.send('Emulation.setEmulatedMedia', features=[])
    assert colours[0]!=colours[1]
    print('background', ' and '.join(colours))
