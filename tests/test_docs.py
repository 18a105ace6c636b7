"""The documentation: links that lead somewhere, equations that can be read, and a site that asks nobody for anything."""
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT/n for n in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'workflow/docs/reading.md')]
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
BUILD = [sys.executable, str(ROOT/'workflow/docs/build.py')]


def prose(path):
    "What a page says, without code; of a notebook, its markdown cells."
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown'] if path.suffix == '.ipynb' else [dict(source=[path.read_text()])]
    text = '\n\n'.join(''.join(c['source']) for c in cells)
    return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)


def anchors(path):
    "Headings of a markdown page, as its anchors."
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^#+ (.+)$', path.read_text(), re.M)}


def broken(path, target):
    "Why a link of a page leads nowhere; None when it does lead somewhere."
    url = urlparse(target)
    if url.scheme in ('http', 'https'): return None if re.fullmatch(r'[\w.-]+\.[a-z]{2,}(:\d+)?', url.netloc) and not re.search(r'\s', target) else 'is no address'
    if url.scheme: return f'has the scheme {url.scheme}'
    at = path.parent/unquote(url.path) if url.path else path
    if not at.exists(): return 'leads to no file'
    return 'leads to no heading' if url.fragment and at.suffix == '.md' and url.fragment not in anchors(at) else None


@pytest.mark.parametrize('path', PAGES + NOTEBOOKS, ids=lambda p: p.name)
def test_every_link_leads_somewhere(path):
    links = re.findall(r'\]\(\s*<?([^)\s>]+)', prose(path))
    assert not {t: why for t in links if (why := broken(path, t))}


def test_broken_links_are_seen(tmp_path):
    (tmp_path/'a.md').write_text('# One heading\n')
    says = {t: broken(tmp_path/'a.md', t) for t in ('b.md', '#one-heading', '#two', 'a.md#one-heading', 'https://x', 'https://x.org/a b', 'https://x.org/a', 'ftp://x.org')}
    assert [t for t, why in says.items() if why is None] == ['#one-heading', 'a.md#one-heading', 'https://x.org/a']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_equations_can_be_read(path):
    pytest.importorskip('sphinx', reason="no Sphinx here: pip install 'gemmgan_nb[docs]'")
    inside = dict(__file__=str(ROOT/'workflow/docs/conf.py')); exec((ROOT/'workflow/docs/conf.py').read_text(), inside)
    for block, inline in re.findall(r'\$\$(.+?)\$\$|(?<![\\$\d])\$([^$\s][^$]*?)\$(?!\d)', prose(path), re.S):
        tex = block or inline
        assert not re.search(r'\\\\[a-zA-Z]', tex) or 'begin' in tex, f'a back slash too many: {tex}'
        inside['latex2mathml'].tex2mathml(inside['sized'](tex), as_block=bool(block))


def test_the_reading_path_knows_every_chapter():
    text = (ROOT/'workflow/docs/reading.md').read_text()
    assert not [p.stem for p in NOTEBOOKS if f'(../../nbs/{p.name})' not in text]
    rows = re.findall(r'^\|[^|]*\| \[(\d\d) .*\| (.+) \|$', text.split('## The course')[1], re.M)
    assert all(asked.count('?') == 2 for _, asked in rows) and [n for n, _ in rows] == sorted(n for n, _ in rows)


def test_the_readme_says_what_the_runs_say():
    made, readme, drawn = {}, (ROOT/'README.md').read_text(), 0
    for cell in json.loads((ROOT/'nbs/index.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        *body, last = ast.parse(''.join(cell['source'])).body
        exec(compile(ast.Module(body, []), 'index', 'exec'), made)
        if isinstance(last, ast.Expr):
            drawn += 1; assert eval(compile(ast.Expression(last.value), 'index', 'eval'), made).data in readme, 'the files in figures say something else: make readme'
        else: exec(compile(ast.Module([last], []), 'index', 'exec'), made)
    assert drawn >= 4
    assert len(made['judged']) + made['open_'] + len(made['alone']) + len(made['built']) == sum(c['on'] != 'reading' for c in made['first'].values())


def test_chapters_that_take_long_are_named():
    inside = dict(__name__='times'); exec((ROOT/'workflow/chapter_times.py').read_text(), inside)
    report = 'Success.\n24_generate.ipynb: 75 secs\n15_metrics.ipynb: 61 secs\n11_film.ipynb: 60 secs\n00_tour.ipynb: 9 secs\n'
    assert inside['slow'](report) == {'24_generate.ipynb': 75, '15_metrics.ipynb': 61}
    with pytest.raises(ValueError, match='No chapter was timed'): inside['slow']('Success.\n')
    run = lambda text, *words: subprocess.run([sys.executable, ROOT/'workflow/chapter_times.py', *words], input=text, capture_output=True, text=True)
    assert [run(t, *w).returncode for t, w in ((report, ()), (report, ['--fail']), (report[-50:], ()), ('Success.\n11_film.ipynb: 4 secs\n', ['--fail']))] == [0, 1, 1, 0]
    assert report in run(report).stdout and '15_metrics.ipynb 61 s' in run(report).stdout


def test_licence_and_citation():
    text, cff = (ROOT/'LICENSE').read_text(), yaml.safe_load((ROOT/'CITATION.cff').read_text())
    config = ConfigParser(); config.read(ROOT/'settings.ini')
    assert 'Apache License' in text and 'Version 2.0, January 2004' in text and 'END OF TERMS AND CONDITIONS' in text and '[yyyy]' not in text
    assert cff['license'] == 'Apache-2.0' and str(cff['version']) == config['DEFAULT']['version']
    assert {'cff-version', 'message', 'title', 'authors'} <= cff.keys() and f"## {cff['version']}" in (ROOT/'CHANGELOG.md').read_text()


# ---- the site
class Page(HTMLParser):
    "Ids and addresses of a page."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.errors = set(), [], [], 0
        self.feed(path.read_text())
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        elif tag in ('script', 'img', 'link', 'iframe', 'source'): self.loads += [a[k] for k in ('src', 'href') if a.get(k) and not a[k].startswith('data:')]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('myst_nb', reason="nothing to build the site with: pip install 'gemmgan_nb[docs]'")
    out = tmp_path_factory.mktemp('docs')/'html'
    ran = subprocess.run([*BUILD, '--strict', str(out)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_site_is_whole(site):
    pages = {p: Page(p) for p in site.rglob('*.html')}
    assert all((site/f'nbs/{p.stem}.html').exists() for p in NOTEBOOKS) and (site/'CONTRIBUTING.html').exists()
    wrong = []
    for path, page in pages.items():
        wrong += [(path.name, a) for a in page.loads if urlparse(a).netloc or not (path.parent/unquote(urlparse(a).path)).exists()]      # nothing is loaded from elsewhere
        for a in page.links:
            url = urlparse(a)
            if url.scheme or a == '#': continue
            at = (path.parent/unquote(url.path)).resolve() if url.path else path.resolve()
            if not at.exists() or url.fragment and at.suffix == '.html' and unquote(url.fragment) not in pages[site/at.relative_to(site.resolve())].ids: wrong.append((path.name, a))
    assert not wrong


@pytest.mark.slow
def test_the_library_is_documented_with_its_comments(site):
    text = re.sub(r'<[^>]+>', '', (site/'api/training.html').read_text())
    for says in ('train_network', 'score(model, val), smaller is better; default CRPS', 'Raises LeakError', 'n_critic'): assert says in text
    source = (site/'_modules/gemmgan_nb/training.html').read_text()
    assert 'id="train_network"' in source and '_modules/gemmgan_nb/training.html#train_network' in (site/'api/training.html').read_text()


@pytest.mark.slow
def test_saved_outputs_are_shown_and_nothing_else(site):
    for path in NOTEBOOKS:
        outputs = [o for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code' and '#| hide' not in ''.join(c['source']) for o in c['outputs']]
        pictures = sum(bool({'image/png', 'image/jpeg'} & o.get('data', {}).keys()) for o in outputs)
        page = (site/f'nbs/{path.stem}.html').read_text()
        assert len(re.findall(r'<img [^>]*_images/', page)) >= pictures, path.stem
        assert '#| export' not in re.sub(r'<[^>]+>', '', page).replace('&gt;', '>')


@pytest.mark.slow
def test_pages_open_from_disk_without_a_request(site, browser):
    page, asked, said = browser.new_page(viewport=dict(width=1300, height=1000)), [], []
    page.on('request', lambda r: asked.append(r.url)); page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None); page.on('pageerror', lambda e: said.append(str(e)))
    for name in ('index', 'nbs/00_tour', 'nbs/13_wgan_gp', 'nbs/20_pathgen', 'api/training', 'CONTRIBUTING', 'genindex', '_modules/gemmgan_nb/film'):
        if not (site/f'{name}.html').exists(): continue
        page.goto((site/f'{name}.html').as_uri()); page.wait_for_load_state('networkidle')
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)"), name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), f'{name} is wider than the window'
    page.goto((site/'nbs/13_wgan_gp.html').as_uri())
    assert page.locator('math').count() > 10 and page.locator('merror').count() == 0
    assert page.locator('math').first.bounding_box()['width'] > 5
    page.goto((site/'search.html').as_uri() + '?q=gradient_penalty'); page.wait_for_selector('#search-results li a')
    assert any('wgan_gp' in (a.get_attribute('href') or '') for a in page.locator('#search-results li a').all())
    assert not [u for u in asked if not u.startswith(('file:', 'data:'))] and not said
