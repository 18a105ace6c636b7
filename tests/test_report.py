"""The report of a run: one page that loads nothing, in which whatever came from data is only ever text."""
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from gemmgan_nb.data import Cohort, pack, write_cohort
from gemmgan_nb.experiment import entries_of, fit_job
from gemmgan_nb.paper import VERDICTS, load_paper_values
from gemmgan_nb.report import (MADE_BY, SECTIONS, Complaints, Markup, Read, RunFolder, beside, cell_of, decided, drawn, el, embed, hardest, histories, origin, plain, sheet_table,
                               stages, telling, tried, write_report)
from gemmgan_nb.tables import AUDIT, CONDITION, PANEL, write_tables
from gemmgan_nb.workspace import Stage, read_json, rng, write_json

ROOT = Path(__file__).parents[1]
EVIL = ['<script>document.title="taken"</script>', '"><img src=x onerror=document.title="taken">', "Gliomas' $x_{2 & \\frac \u202e </table></section>"]
MODEL = '<svg onload=document.title="taken">'   # somebody's own row


def scores_of(models):
    "Three seeds of every metric that a sheet shows."
    r = rng(0, 'scores')
    return pd.DataFrame([(m, s, 0, 'test', k, x + .01*r.normal()) for m, x in models.items() for s in range(3) for k in [*PANEL, *CONDITION, *AUDIT]], columns=['model', 'seed', 'run', 'split', 'metric', 'value'])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A made-up run in which everything is named to do harm; its GeMM-GAN took four steps."
    folder, n, genes, r = tmp_path_factory.mktemp('report')/'runs'/'to<y>&', 48, 12, rng(0, 'run')
    names = [f'<a href=javascript:taken>{i}' for i in range(n)]
    obs = pd.DataFrame(dict(group=names, project='TOY', disease_type=[EVIL[i % 3] for i in range(n)], primary_site='<b>', slide=names, split=['train']*20 + ['val']*8 + ['cal']*4 + ['test']*16), index=names)
    X = r.normal(size=(n, genes)).astype(np.float32)
    write_cohort(folder/'cohort', X, obs, pd.DataFrame(dict(symbol=[f'G{j}' for j in range(genes)]), index=[f'E{j}' for j in range(genes)]), 'zscore', ['image', 'text', 'labels'],
                 pd.DataFrame(dict(slide=names, path='none', mpp=.5)), uns=dict(simulated=True))
    for name, width in (('patches', 3), ('tokens', 4)): pack(folder/'cohort'/f'{name}.safetensors', {s: r.normal(size=(3, width)) for s in names}, {c: [(c, None)] for c in names})
    cohort, budget = Cohort.load(folder/'cohort'), dict(steps=4, batch=8, dim=16, hidden=16, latent=8, patches=2, score_every=2, dropout=0.)
    with Stage(folder/'fit'/'gemmgan', source=EVIL[0], budget=budget): fit_job(entries_of(['gemmgan']), cohort, [0], budget, folder/'fit'/'gemmgan', code='x')
    (folder/'evaluate'/'gemmgan').mkdir(parents=True)
    patients = {'real': X[-16:], 'gemmgan/0/mean': X[-16:]/2, 'gemmgan/0/crps': np.arange(16, dtype=np.float32)}
    save_file(patients, folder/'evaluate'/'gemmgan'/'cases.safetensors')
    scores = scores_of({'gemmgan': .6, 'ridge': .5, MODEL: .4, 'noise': .1, 'real': .9})
    scores.to_csv(folder/'evaluate'/'gemmgan'/'metrics.csv', index=False)
    (folder/'tables').mkdir(); scores.to_csv(folder/'tables'/'metrics.csv', index=False)
    write_tables(folder/'tables', scores, cohort, patients, load_paper_values(), 50, 1)
    claims = read_json(folder/'tables'/'claims.json')
    claims[0].update(claim=EVIL[0], reason=EVIL[1] + '\x00', cohort=EVIL[1], verdict=EVIL[0], where=EVIL[1], notebook=EVIL[0]); write_json(folder/'tables'/'claims.json', claims)
    (folder/'tables'/'README.md').write_text(f'Made by `{EVIL[0]}`.\n')
    pd.DataFrame(dict(item=[EVIL[1]], problem=[EVIL[0]])).to_csv(folder/'cohort'/'problems.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def made(run, tmp_path_factory): return write_report(run, tmp_path_factory.mktemp('page'))


class Seen(HTMLParser):
    "Every tag with its attributes, the text, and what would be loaded."
    def __init__(self, text):
        super().__init__(); self.tags, self.text = [], ''
        self.feed(text); self.close()
        self.loads = [a[k] for _, a in self.tags for k in ('src', 'srcset', 'data', 'poster', 'action') if a.get(k)]
        self.links = [a['href'] for _, a in self.tags if a.get('href')]
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data
    def of(self, tag): return [a for t, a in self.tags if t == tag]


def test_values_are_text_whatever_they_hold():
    for evil in EVIL:
        seen = Seen(el('p', evil, el('b', evil), title=evil))
        assert [t for t, _ in seen.tags] == ['p', 'b'] and list(seen.tags[0][1]) == ['title']
    assert el('b', Markup('<i>') + EVIL[0]).count('<') == 2      # joined to a plain string it is plain again
    assert el('p', None, 0, class_=None) == '<p>None0</p>'


def test_the_page_loads_nothing_and_holds_no_script(made):
    path, missing = made; text = path.read_text(); seen = Seen(text)
    assert Complaints(text).found == [] and set(missing) == {'dial', 'outcome', 'spots'}
    assert seen.loads and all(x.startswith('data:image/png;base64,') for x in seen.loads) and all(x.startswith('#') for x in seen.links)
    assert not {t for t, _ in seen.tags} & {'script', 'link', 'iframe', 'object', 'form', 'base', 'svg'} and not [k for _, a in seen.tags for k in a if k.startswith('on')]
    assert 'url(' not in text and '@import' not in text and not re.search(r'https?://', re.sub(r'data:[^"]+', '', text))
    assert "default-src 'none'" in seen.of('meta')[1]['content'] and path.stat().st_size < 5e6


def test_unfriendly_names_are_shown_as_they_are(made, run):
    seen = Seen(made[0].read_text())
    for name in (MODEL, EVIL[0], EVIL[1], '<a href=javascript:taken>47', run.name, "Gliomas' $x_{2 & \\frac"): assert name in seen.text or any(name in (i['alt'] or '') for i in seen.of('img')), name
    assert MODEL in seen.text and '<a href=javascript:taken>47' in seen.text and EVIL[1] in seen.text     # a row, a case, a reason


def test_it_can_be_heard(made):
    seen = Seen(made[0].read_text()); heads = [int(t[1]) for t, _ in seen.tags if re.fullmatch(r'h[1-6]', t)]
    assert heads[0] == 1 and heads.count(1) == 1 and all(b <= a + 1 for a, b in zip(heads, heads[1:], strict=False))
    assert all(len(i['alt']) > 40 for i in seen.of('img')) and len(seen.of('img')) >= 7
    assert len(seen.of('table')) == len(seen.of('caption')) and all(a.get('scope') in ('col', 'row', 'rowgroup') for a in seen.of('th'))
    frames = [a for a in seen.of('div') if a.get('class') == 'scroll']
    assert frames and all(a['tabindex'] == '0' and a['role'] == 'region' and a['aria-label'] for a in frames)
    assert next(a for t, a in seen.tags if t == 'html')['lang'] == 'en' and seen.of('a')[0]['href'] == '#verdicts'


def test_every_claim_has_its_row_its_number_and_its_reason(made, run):
    claims, seen = read_json(run/'tables'/'claims.json'), Seen(made[0].read_text())
    assert [x for x in seen.links if x.startswith('#why-')].__len__() == len(claims) == len([a for a in seen.of('h3') if str(a.get('id')).startswith('why-')])
    assert all(c['reason'].replace('\x00', '\ufffd') in seen.text for c in claims) and all(decided(c) in seen.text for c in claims)
    assert len([a for a in seen.of('span') if 'badge' in str(a.get('class'))]) == 2*len(claims) and set(VERDICTS.values()) <= {c['verdict'] for c in claims} | {'not testable here'}


@pytest.mark.parametrize('gone, section, says', [
    ('tables/claims.json', 'verdicts', 'tables stage'), ('tables/table1.html', 'table1', 'tables stage'), ('tables/audit.html', 'audit', 'evaluation.blocks'), ('tables/headline.csv', 'bounds', 'headline.csv'),
    ('fit/gemmgan/gemmgan/seed0/history.csv', 'training', 'trained in steps'), ('fit/gemmgan/gemmgan/seed0/model.safetensors', 'profiles', 'was not trained'), ('cohort/cohort.h5ad', 'table2', 'cohort')])
def test_what_is_missing_is_said(run, tmp_path, gone, section, says):
    copy = tmp_path/'run'; shutil.copytree(run, copy); (copy/gone).unlink()
    text, why = tried(section, RunFolder(copy))
    assert why.startswith('Not here.') and says in why and why in Seen(text).text and Complaints(f'<h1>{text}</h1>').found == []


@pytest.mark.parametrize('file, content, section', [('tables/claims.json', '{"a": 1}', 'verdicts'), ('tables/claims.json', 'nonsense', 'why'), ('tables/headline.csv', 'a,b\n1,2\n', 'bounds'),
                                                     ('fit/gemmgan/provenance.json', '[', 'timeline'), ('tables/differences.csv', '', 'rivals'), ('fit/gemmgan/gemmgan/seed0/model.safetensors', 'no tensors', 'profiles')])
def test_a_broken_file_empties_its_section_only(run, tmp_path, file, content, section):
    copy = tmp_path/'run'; shutil.copytree(run, copy); (copy/file).write_text(content)
    text, why = tried(section, RunFolder(copy))
    assert 'could not be read' in why and why in Seen(text).text and tried('condition', RunFolder(copy))[1] == ''


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    (tmp_path/'run').mkdir(); path, missing = write_report(tmp_path/'run')
    assert path == tmp_path/'run'/'report'/'index.html' and set(SECTIONS) - set(missing) == {'figures'} and Complaints(path.read_text()).found == []


def test_real_tissue_stays_in_the_run(run, tmp_path):
    (tmp_path/'workflow'/'profiles').mkdir(parents=True)
    with pytest.raises(ValueError, match='for anyone to see'): write_report(run, tmp_path/'figures'/'toy')
    assert not (tmp_path/'figures').exists()
    with pytest.raises(FileNotFoundError, match='There is no run'): write_report(tmp_path/'nosuch')


def test_sheets_come_back_as_they_were_written(run):
    read = Read((run/'tables'/'table1.html').read_text()); wide = pd.read_csv(run/'tables'/'table1.csv', keep_default_na=False)
    assert [t for t, *_ in read.rows[0]] == wide.columns[1:].tolist()
    assert [[t for t, *_ in r] for r in read.rows[1:] if len(r) > 1] == wide.iloc[:, 1:].astype(str).to_numpy().tolist()
    assert any(b for r in read.rows for *_, b in r) and read.notes
    heads = [t for t, *_ in read.rows[0]]; order = [heads[i] for i in beside(heads)]
    assert sorted(order) == sorted(heads) and order[order.index('GeMM-GAN') + 1].startswith('Proposed (paper, TCGA)')
    assert 'onload' not in [k for _, a in Seen(sheet_table(read)).tags for k in a]


def test_profiles_axes_are_those_of_training_patients(run):
    train, real, fake, kinds = drawn(RunFolder(run)); assert real.shape == fake.shape == (16, 12) and len(train) == 20 and len(kinds) == 16
    one, other = (next(iter(embed(train, real, f).values())) for f in (fake, fake + 9))
    assert np.allclose(one[:16], other[:16], atol=1e-4) and not np.allclose(one[16:], other[16:], atol=1)     # what is generated does not move the axes
    state = np.random.get_state()[1].copy(); embed(train, real, fake); assert (np.random.get_state()[1] == state).all()
    assert hardest(RunFolder(run), 2).iloc[:, 0].tolist() == ['<a href=javascript:taken>47', '<a href=javascript:taken>46'] and len(histories(RunFolder(run))) == 2


def test_pauses_are_cut_out(tmp_path):
    import os
    for name, end, took in (('a', 100, 10), ('b', 108, 4), ('c', 9000, 20)):
        write_json(tmp_path/name/'provenance.json', dict(seconds=took)); os.utime(tmp_path/name/'provenance.json', (end, end))
    frame = stages(RunFolder(tmp_path))
    assert frame.start.tolist() == [0., 10., 14.] and frame.stage.tolist() == ['a', 'b', 'c']


def test_every_number_has_a_cell():
    keys = [*PANEL, *CONDITION, *AUDIT, 'mlp_auc', 'precision_l1', 'correlation_sd_wrong_patient', 'unheard_of']
    cells = {k: cell_of(origin(k)) for k in keys}
    assert all(re.fullmatch(r'\d\d_\w+ #\w+', c) for c in cells.values()), cells
    for chapter, cell in (c.split(' #') for c in {cell_of(f) for f in MADE_BY.values()}):
        source = next(''.join(c['source']) for c in json.loads((ROOT/f'nbs/{chapter}.ipynb').read_text())['cells'] if c['id'] == cell)
        assert any(f'def {f.__name__}(' in source for f in MADE_BY.values() if cell_of(f) == f'{chapter} #{cell}')


def test_small_things():
    assert [plain(x) for x in (.123456, np.nan, 'a', np.float64(2))] == ['0.1235', '-', 'a', '2']
    assert [decided(dict(number=n, low=a, high=b)) for n, a, b in ((.5, .4, .6), (.5, None, None), (None, 1, 2))] == ['0.5 [0.4, 0.6]', '0.5', '']
    top = pd.DataFrame(dict(floor=[.1, .5, .9], ceiling=[.8, .56, 1.]), index=['a ↑', 'LR (AUC) ↓', 'b → 1'])
    assert telling(top).tolist() == [True, False, True]      # a floor that is better than the ceiling leaves no way between them
    assert len(Complaints('<h1>a</h1><h3>b</h3><img src="https://x"><th>c</th><a href="#no">d</a><p id=i><p id=i>').found) >= 6
    assert tried('dial', RunFolder(Path('nosuch')))[1].startswith('Not here. dial.csv')


def test_a_browser_opens_it_from_disk(made, browser, tmp_path):
    for width, height in ((1400, 900), (390, 844)):
        view, asked, said = browser.new_page(viewport=dict(width=width, height=height)), [], []
        view.on('request', lambda r, asked=asked: asked.append(r.url) if not r.url.startswith(('file:', 'data:')) else None)
        view.on('console', lambda m, said=said: said.append(m.text)); view.on('pageerror', lambda e, said=said: said.append(str(e)))
        view.goto(made[0].as_uri()); view.wait_for_load_state('networkidle')
        assert not asked and not said and view.title().startswith('GeMM-GAN: the run')      # no unfriendly name renamed it
        assert view.evaluate('document.documentElement.scrollWidth <= innerWidth + 1'), f'wider than a window of {width}'
        assert view.evaluate('[...document.images].every(i => i.naturalWidth > 50)')
        assert view.locator('.badge').first.bounding_box()['y'] < height                      # verdicts stand on the first screen
        view.keyboard.press('Tab'); assert view.evaluate('document.activeElement.className') == 'skip'
        view.screenshot(path=tmp_path/f'{width}.png'); view.close()


def test_it_prints_whole(made, browser):
    view = browser.new_page(viewport=dict(width=1032, height=700)); view.goto(made[0].as_uri()); view.emulate_media(media='print')
    assert not view.locator('nav').is_visible() and view.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == 'visible'
    assert view.evaluate("[...document.querySelectorAll('table')].every(t => t.getBoundingClientRect().right <= innerWidth + 1)")
    assert view.pdf(prefer_css_page_size=True)[:4] == b'%PDF'
    view.close()
