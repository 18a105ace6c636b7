"""The documentation site: `make docs`, or `python workflow/docs/build.py [--strict] [folder]`. No notebook is run, and nothing is fetched.

Chapters come with the outputs they were saved with. The library has a page a module: signatures, the comments of the parameters, the source.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fastcore.nbio import write_nb
from nbdev.process import NBProcessor, Processor
from nbdev.processors import clean_magics, hide_line, strip_ansi

from api import module_page

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
STAGED = ROOT/'_proc/docs'
PAGES = ('workflow/docs/reading.md', 'CONTRIBUTING.md', 'CHANGELOG.md')
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))


def documented(module):
    "Functions and classes of a module that its users see, in order."
    tree = ast.parse((ROOT/f'gemmgan_nb/{module}.py').read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != '_']


MODULES = {p.stem[3:]: p.stem for p in CHAPTERS if (ROOT/f'gemmgan_nb/{p.stem[3:]}.py').exists()}   # module -> its chapter
NAMES = {m: documented(m) for m in MODULES}


def place_of(name, chapter):
    "Where a name in prose leads: into the chapter's own module, else to the only module that has it, when the name looks like code."
    if name in NAMES.get(chapter, ()): return f'gemmgan_nb.{chapter}.{name}'
    homes = [m for m, names in NAMES.items() if name in names]
    return f'gemmgan_nb.{homes[0]}.{name}' if len(homes) == 1 and ('_' in name or not name.islower()) else None


class Site(Processor):
    "A chapter for reading: cells that only serve the tests are left out, answers are folded, names in prose lead to the library."
    def begin(self):
        self.exercises, self.titled, self.chapter, self.asked = False, False, Path(self.nb.path_).stem[3:], ''
    def cell(self, cell):
        if cell.cell_type == 'markdown': return self.markdown(cell)
        if cell.cell_type != 'code': return None
        tags = cell.metadata.setdefault('tags', [])
        if any('image' in kind for o in cell.get('outputs', []) for kind in o.get('data', {})): cell.metadata['mystnb'] = dict(image=dict(alt=self.asked))
        if 'export' in cell.directives_: tags.append('export')
        if 'hide' in cell.directives_ and self.exercises: tags.append('hide-cell')
        elif 'hide' in cell.directives_ or not cell.source.strip(): del cell['source']
    def markdown(self, cell):
        source = cell.source.lstrip()
        if self.titled and source.startswith('# '): cell.source = f'#{source}'     # a part of a chapter is no page of its own
        self.titled |= source.startswith('# ')
        self.exercises |= bool(re.search(r'^## Exercises', cell.source, re.M))
        self.asked = re.split(r'(?<=[.?!:]) +', re.sub(r'[*`$\\]|\]\([^)]*\)|\[|^#+ ', '', cell.source.strip().split('\n')[-1]))[-1][:200]     # the sentence before a picture says what it shows
        link = lambda m: f'{{py:obj}}`{m[1]} <{place}>`' if (place := place_of(m[1], self.chapter)) else m[0]
        parts = re.split(r'(```.*?```|\$\$.*?\$\$|^#.*?$|^\|.*?$)', cell.source, flags=re.S | re.M)        # not in code, equations, headings, tables
        cell.source = ''.join(p if i % 2 else re.sub(r'(?<![`\w}\[])`(\w+)`(?!`)', link, p) for i, p in enumerate(parts))


def stage_chapter(path):
    "One chapter, as Sphinx shall read it."
    done = NBProcessor(path, [strip_ansi, hide_line, clean_magics, Site], process=True).nb
    write_nb(done, STAGED/'nbs'/path.name)


def stage_module(module, chapter):
    "The page of one module."
    source = (ROOT/f'gemmgan_nb/{module}.py').read_text()
    made_in = f'Written in :doc:`chapter {chapter[:2]} </nbs/{chapter}>`.'
    (STAGED/f'api/{module}.rst').write_text(module_page(source, f'gemmgan_nb.{module}', made_in))


def stage_table(path):
    "A table that a run left: it gets a heading, and no place in the side bar."
    what = path.stem.replace('table', 'Table ').capitalize()
    together = re.sub(r'(?<=[\d±)]) (?=[\d(±])', '\u00a0', path.read_text())      # a number and its deviations stay on a line
    path.write_text(f'---\norphan: true\n---\n\n# {what} of `{path.parent.name}`\n\n{together}')


def titled(path):
    "An entry of the side bar: number and heading of a chapter."
    text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    return f'{path.stem[:2]} {re.search("^# (.+)", text, re.M)[1]} <nbs/{path.stem}>'


def toctree(caption, pages):
    "What the side bar lists."
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', ''])


def stage():
    "Everything that Sphinx reads, in one folder."
    shutil.rmtree(STAGED, ignore_errors=True)
    for name in ('nbs', 'api'): (STAGED/name).mkdir(parents=True)
    shutil.copytree(ROOT/'figures', STAGED/'figures')
    pages = [p for p in PAGES if (ROOT/p).exists()]
    for name in (*pages, 'LICENSE', 'CITATION.cff', 'workflow/profiles/own.yaml'):
        (STAGED/name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT/name).exists(): shutil.copy(ROOT/name, STAGED/name)
    for path in (STAGED/'figures').glob('*/[!R]*.md'): stage_table(path)
    for path in CHAPTERS: stage_chapter(path)
    for module, chapter in MODULES.items(): stage_module(module, chapter)
    trees = [toctree('Chapters', map(titled, CHAPTERS)), toctree('Library', [f'{m} <api/{m}>' for m in MODULES]), toctree('Project', [p.removesuffix('.md') for p in pages])]
    (STAGED/'index.md').write_text('\n'.join([(ROOT/'README.md').read_text(), *trees]))


def build(out=ROOT/'_docs/html', strict=False):
    "Stages and renders. Leaves with Sphinx's exit code when it fails; `strict` takes a warning for a failure."
    stage()
    command = [sys.executable, '-m', 'sphinx', '-q', '-b', 'html', '-c', HERE, '-d', ROOT/'_proc/doctrees', *(['-W', '--keep-going'] if strict else []), STAGED, out]
    if code := subprocess.run(list(map(str, command)), cwd=ROOT).returncode: sys.exit(code)
    return Path(out)/'index.html'


if __name__ == '__main__':
    strict, folders = '--strict' in sys.argv, [a for a in sys.argv[1:] if not a.startswith('-')]
    print(f'The documentation is {build(*map(Path, folders), strict=strict)}')
