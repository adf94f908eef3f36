"""From the notebooks, through nbdev's own processing, to the pages that Sphinx reads (doc_src/) and to README.md.

nbdev hides cells, follows its directives and links every name in backticks. What is left to do here: show exported code where it
stands, gather the reference cards on one page a module, turn links into ones that Sphinx checks, and write the command pages."""
import ast, os, re, shutil, tempfile
from importlib import import_module
from operator import attrgetter
from pathlib import Path
import yaml
from execnb.nbio import read_nb, write_nb, new_nb, mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.serve import proc_nbs
from nbdev.showdoc import show_doc, showdoc_nm

cfg = get_config()
PYTHON = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python'))
root,base = cfg.config_path, cfg.doc_host + cfg.doc_baseurl
foreign = r'https://(?:\w+\.fast\.ai|answerdotai\.github\.io)/' # nbdev also links words that other packages use as names

def processed(nbs):
    "nbdev's processing of a copy in which every `export` is an `exports`, so that exported code stays visible."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(shutil.copytree(nbs, Path(tmp)/'nbs', ignore=shutil.ignore_patterns('_*','.*')))
        for f in copy.rglob('*.ipynb'): f.write_bytes(re.sub(rb'("|\\n)#\|\s*export\b', rb'\1#| exports', f.read_bytes()))
        shutil.rmtree(root/'_proc', ignore_errors=True)
        return proc_nbs(path=copy, n_workers=2)

def callouts(s):
    "Quarto's `::: {.callout-note}` boxes as MyST admonitions."
    def box(m):
        head,body = re.match(r'(?:#+ (.*)\n+)?((?:.|\n)*)', m[2].strip('\n')).groups()
        return f':::{{admonition}} {head or m[1].title()}\n:class: {m[1]}\n{body}\n:::'
    return re.sub(r'^:{3,} *\{\.callout-(\w+)[^}]*\}\n(.*?)^:{3,} *$', box, s, flags=re.M|re.S)

def links(s, labels=(), names=None):
    "nbdev's site addresses as labels, and notebook names as page names; Sphinx then checks both."
    def symbol(m):
        label = f'{m[2]}.{m[3]}'
        while label not in labels and label.count('.')>1: label = label.rpartition('.')[0]  # a method has the card of its class
        return f'[{m[1]}](#{label})' if label in labels else m[1]
    s = re.sub(rf'\[(`[^`]+`)\]\((?:{base}/(?:\w+/)*(\w+)\.html#([\w.]+)|{foreign}[^)]*)\)', symbol, s)
    return re.sub(r'\]\((?!https?:)([\w./-]*?)([\w-]+)\.ipynb', lambda m: f']({m[1]}{(names or {}).get(m[2], m[2])}.ipynb', s)

def card(name, page):
    "The reference of one name: its label and its text."
    text = NbdevLookup().linkify(show_doc(attrgetter(name)(import_module(f'{cfg.lib_name}.{page}')))._repr_markdown_())
    label,text = f'{page}.{name.lower()}', re.sub(r'.*?^#+ \S+\n', '', text, count=1, flags=re.M|re.S)
    return label, f'({label})=\n## {name}\n{text}\n\n{{.in-book}}\n[in the book](#book.{label})\n'

def convert(nb, page):
    "Name, title, cells and reference cards of one processed notebook."
    meta,cells,cards = {},[],[]
    for c in nb.cells:
        s = c.source
        if c.cell_type=='raw': meta = yaml.safe_load(s.strip().strip('-')); page = Path(meta['output-file']).stem
        elif c.cell_type=='markdown': cells += [] if s.startswith('<!-- WARNING') else [mk_cell(callouts(s), 'markdown')]
        elif 'show_doc(' not in s:
            exported,c.source = 'Exported source' in s, re.sub(r'^#\|.*\n?', '', s, flags=re.M)
            tree = ast.parse(c.source).body if exported else []
            if exported and all(isinstance(o, ast.Import|ast.ImportFrom) for o in tree): continue
            new = [card(showdoc_nm(o), page) for o in tree if isinstance(o, ast.FunctionDef|ast.ClassDef) and o.name[0]!='_']
            if new: cells.append(mk_cell('\n'.join(f'(book.{label})=' for label,_ in new), 'markdown'))
            cards += new
            c.metadata = {}; cells.append(c)
    title = meta.get('title', page)
    head = f"# {title}\n" + (f"\n> {meta['description']}\n" if meta.get('description') else '')
    return page, title, [mk_cell(head, 'markdown')]+cells, cards

def commands():
    "A page with the help of every command in settings.ini."
    os.environ.update(COLUMNS='88', NO_COLOR='1')
    out = '# The commands\n\n> What each prints for `--help`, made from the same comments as the reference.\n'
    for entry in cfg.get('console_scripts','').split():
        name,_,place = entry.partition('='); module,_,f = place.partition(':'); f = f.removesuffix('.main')
        out += f'\n## {name}\n\n[`{f}`](#{module.rpartition(".")[2]}.{f.lower()})\n\n' + help_of(getattr(import_module(module), f).parser())
    return out

def help_of(p):
    "The help of a parser and of its subcommands."
    subs = [q for a in p._actions if isinstance(a.choices, dict) for q in a.choices.values()]
    return f'```text\n{p.format_help()}```\n' + ''.join(map(help_of, subs))

def readme(cells):
    "README.md from the cells of the index page."
    box,quote = r':::\{admonition\} (.*)\n:class: .*\n((?:.|\n)*?)\n:::', lambda m: f'> **{m[1]}.** ' + m[2].replace('\n','\n> ')
    out = []
    for c in cells:
        out.append(re.sub(box, quote, c.source) if c.cell_type=='markdown' else f'```python\n{c.source}\n```')
        for o in c.get('outputs',[]):
            t = o.get('text') or o['data'].get('text/markdown') or o['data']['text/plain']
            out.append('```\n' + ''.join(t).rstrip() + '\n```')
    s = links('\n\n'.join(o.strip('\n') for o in out))
    return re.sub(r'(\]\(|src=")((?!https?:|#|\.\./)[\w./-]+\.(?:ipynb|svg|png))', r'\1nbs/\2', s).replace('](../', '](') + '\n'

def build(out=root/'doc_src'):
    "Write every page and the tables of contents; return the names of the pages by section."
    for o in (out, cfg.doc_path): shutil.rmtree(o, ignore_errors=True)
    for o in ('api','howto'): (out/o).mkdir(parents=True)
    cache,done,labels,names = processed(cfg.nbs_path),[],set(),{}
    for f in sorted(o for o in cache.rglob('*') if o.is_file()):
        folder = f.parent.relative_to(cache); (out/folder).mkdir(parents=True, exist_ok=True)
        if f.suffix!='.ipynb': shutil.copy(f, out/folder); continue
        page,title,cells,cards = convert(read_nb(f), f.stem)
        done.append((folder, f.stem, page, title, cells, cards)); names[f.stem] = page; labels.update(dict(cards))
    toc = {'The book':[], 'Tutorials':[], 'How-to':[], 'Reference':[], 'Project':[]}
    for folder,stem,page,title,cells,cards in done:
        if page=='index': (root/'README.md').write_text(readme(cells), encoding='utf-8'); index = cells
        for c in cells: c.source = links(c.source, labels, names) if c.cell_type=='markdown' else c.source
        section = {'tutorials':'Tutorials', 'howto':'How-to'}.get(str(folder), 'The book' if stem[0].isdigit() else 'Project')
        number = f'{stem.partition("_")[0].removeprefix("0")} · ' if section=='The book' else ''
        if page!='index': toc[section].append(f'{number}{title} <{folder/page}>'); write_nb(new_nb(cells, meta=PYTHON), out/folder/f'{page}.ipynb')
        if cards:
            toc['Reference'].append(f'api/{page}')
            head = f'# {cfg.lib_name}.{page}\n\n> The names that the chapter [{title}](../{stem}.ipynb) defines, in its order.'
            (out/f'api/{page}.md').write_text(links('\n\n'.join([head]+[text for _,text in cards]), labels, names), encoding='utf-8')
    (out/'howto/commands.md').write_text(commands(), encoding='utf-8'); toc['How-to'].append('howto/commands')
    for name in ('CHANGELOG','CITATION'): shutil.copy(root/f'{name}.md', out/f'{name.lower()}.md'); toc['Project'].append(name.lower())
    tree = '\n\n'.join(f'```{{toctree}}\n:hidden:\n:caption: {k}\n\n' + '\n'.join(v) + '\n```' for k,v in toc.items() if v)
    write_nb(new_nb(index+[mk_cell(tree, 'markdown')], meta=PYTHON), out/'index.ipynb')
    return toc

if __name__=='__main__':
    for section,pages in build().items(): print(f'{section:10}', len(pages), 'pages')
