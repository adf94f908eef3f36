"Everything about the package is written once, in settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup,find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['=']); cfg.read(here/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']
readme = here/'README.md'

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='MIT',
      author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
      long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
      long_description_content_type='text/markdown', python_requires='>='+cfg['min_python'],
      packages=find_packages(include=[cfg['lib_path'],cfg['lib_path']+'.*']),
      install_requires=cfg['requirements'].split(),
      extras_require=dict(dev=' '.join(cfg[k+'_requirements'] for k in ('dev','faiss','serve')).split(), faiss=cfg['faiss_requirements'].split(),
                          serve=cfg['serve_requirements'].split()),
      entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]))
