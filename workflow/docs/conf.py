"""Settings of the documentation, for Sphinx. Equations become MathML while the site is built; a page loads nothing from elsewhere."""
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
settings = ConfigParser()
settings.read(ROOT/'settings.ini')

project, release = 'GeMM-GAN companion', settings['DEFAULT']['version']
html_title = f'{project} {release}'
copyright = 'The GeMM-GAN companion authors'
extensions = ['myst_nb', 'sphinx.ext.viewcode']
nb_execution_mode = 'off'
nb_ipywidgets_js = {}                # else pages with live controls would ask a CDN
nb_code_prompt_show, nb_code_prompt_hide = 'An answer', 'Hide the answer'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
viewcode_follow_imported_members = False
add_module_names = False
python_maximum_signature_line_length = 90
html_theme, html_static_path, html_css_files = 'furo', ['static'], ['site.css']
html_math_renderer = 'mathml'
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False     # summaries are fetched, which a browser forbids on a page opened from disk
exclude_patterns = ['figures/*/README.md']
log = logging.getLogger(__name__)


# ---- links to the source
@cache
def source_of(app, module):
    "Source and places of a module, read, not imported."
    path = ROOT/f"{module.replace('.', '/')}.py"
    if not path.exists(): return None
    analyzer = ModuleAnalyzer.for_string(path.read_text(), module)
    return analyzer.code, analyzer.find_tags()


# ---- equations
def sized(tex):
    "The equation with brackets of a stated size as an opening or a closing one."
    return re.sub(r'\\([bB]igg?)(?![a-zA-Z])(\s*)(\\\{|\\[lr]?[vV]ert|[(\[])?', lambda m: rf'\{m[1]}{"l" if m[3] else "r"}{m[2]}{m[3] or ""}', tex)


def mathml(tex, block, where):
    "MathML, which browsers render by themselves; the formula as it was written, with a warning, where it cannot be read."
    try: return latex2mathml.tex2mathml(sized(tex), as_block=block)
    except Exception as e:
        log.warning('%s in the equation %s', e, tex, location=where)
        return f'<code>{tex.replace("&", "&amp;").replace("<", "&lt;")}</code>'


def inline(self, node):
    self.body.append(mathml(node.astext(), False, node))
    raise SkipNode


def display(self, node):
    self.body.append(f'<div class="math">{mathml(node.astext(), True, node)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (inline, None), (display, None))
    app.connect('viewcode-find-source', source_of)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
