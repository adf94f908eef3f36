"Sphinx builds the site from doc_src/, which prep.py writes; names and versions come from settings.ini."
from nbdev.config import get_config

cfg = get_config()
project,author,release,copyright = cfg.title, cfg.author, cfg.version, cfg.copyright
html_title = cfg.title
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx-mathjax-offline']
nb_execution_mode,nb_merge_streams,nb_render_markdown_format = 'off', True, 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block']
myst_heading_anchors = 4
html_theme,html_static_path,html_css_files = 'furo', ['_static'], ['custom.css']
html_show_sourcelink = html_copy_source = False
html_use_index = False
html_show_search_summary = False  # the summaries are fetched page by page, which browsers refuse for files on disk

def setup(app): # the extension writes one path into a page and says nothing about parallel reading
    app.extensions['sphinx-mathjax-offline'].parallel_read_safe = True
