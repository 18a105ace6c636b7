"""Spreads, marks, intervals over patients, the five ways a table is written, and the sentences under it."""
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from gemmgan_nb.condition import gene_correlation
from gemmgan_nb.data import Cohort, write_cohort
from gemmgan_nb.experiment import ENTRIES
from gemmgan_nb.paper import load_paper_values
from gemmgan_nb.tables import (COLUMNS, CONDITION, HEADLINE, PANEL, ROWS, best, bounds, cohort_name, differences, draw, fixed, gather, headline, interval, joined, kind_of,
                               latex, markdown, ordered, plausible, read_patients, resampled, sheet, spreads, table, verdict_lines, webpage, write_tables)
from gemmgan_nb.workspace import read_json, rng

EVIL = ['<script>alert("x")</script>', r'50% of {R&D}_#1 \input{/etc/passwd} $x^2$ ~', 'a|b']


def tidy(rows): return pd.DataFrame(rows, columns=['model', 'seed', 'run', 'metric', 'value'])


def spread_toy(seed=0, between=.05, within=.01, **means):
    "Two metrics; seeds scatter by `between`, generation runs by `within`."
    r = rng(seed, 'toy')
    return tidy([(m, s, i, k, x + shift + within*r.normal()) for m, x in means.items() for s in range(5) for shift in [between*r.normal()] for i in range(10) for k in ('precision', 'c_mse')])


@pytest.fixture(scope='module')
def paper(): return load_paper_values()


@pytest.fixture(scope='module')
def patients():
    "60 patients; ridge follows them well, gemmgan less, vanilla not at all."
    r = rng(0, 'patients'); hidden = r.normal(size=(60, 30)); real = hidden + r.normal(size=(60, 30)); found = {'real': real}
    for model, share in (('ridge', .5), ('gemmgan', .25), ('vanilla', 0.)):
        for s in range(1 if model == 'ridge' else 3):
            mean = share*hidden + .3*r.normal(size=(60, 30)); found |= {f'{model}/{s}/mean': mean, f'{model}/{s}/crps': np.abs(real - mean).mean(1)}
    return {k: v.astype(np.float32) for k, v in found.items()}


def scores_of(patients):
    import torch
    rows = []
    for key, x in patients.items():
        if key == 'real': continue
        model, seed, what = key.rsplit('/', 2)
        rows.append((model, int(seed), 0, 'crps', float(x.mean())) if what == 'crps' else
                    (model, int(seed), 0, 'correlation', gene_correlation(torch.as_tensor(x), torch.as_tensor(patients['real'])).mean().item()))
    return tidy(rows)


def test_the_two_spreads_are_kept_apart():
    s = spreads(spread_toy(between=.2, within=.01, gemmgan=.5, vanilla=.4)).loc['precision']
    assert (s.over_seeds > .08).all() and s.over_runs.between(.005, .015).all() and (s.runs == 10).all() and (s.seeds == 5).all()
    exact = tidy([('gemmgan', s, r, 'recall', s + r/10) for s in (0, 1, 2) for r in (0, 1)])
    assert spreads(exact).loc[('recall', 'gemmgan'), ['mean', 'over_seeds', 'over_runs']].tolist() == pytest.approx([1.05, 1., .1/2**.5])
    one = tidy([('gemmgan', 0, 0, 'recall', .5)])
    assert spreads(one).loc[('recall', 'gemmgan'), ['over_seeds', 'over_runs']].isna().all()


def test_interval_over_seeds_is_students():
    from scipy import stats
    scores = spread_toy(gemmgan=.5, vanilla=.4)
    x = scores[(scores.metric == 'precision') & (scores.model == 'gemmgan')].groupby('seed').value.mean()
    assert interval(plausible(scores, B=2000)['precision', 'gemmgan']) == pytest.approx(stats.t.interval(.95, 4, x.mean(), stats.sem(x)), rel=.02)


def test_exchanges_of_patients_scatter_too():
    quiet = tidy([('gemmgan', s, 0, 'correlation_wrong_patient', -.003 + .0001*s) for s in range(3)])
    noisy = pd.concat([quiet, tidy([('gemmgan', s, 0, 'correlation_sd_wrong_patient', .02) for s in range(3)])])
    low, high = interval(plausible(noisy, shuffles=4)['correlation_wrong_patient', 'gemmgan'])
    assert interval(plausible(quiet)['correlation_wrong_patient', 'gemmgan'])[1] < 0 and high - low == pytest.approx(2*1.96*.01, rel=.05)


def test_only_a_significant_best_is_marked():
    far, near = spread_toy(gemmgan=.9, vanilla=.3, noise=.99), spread_toy(gemmgan=.42, vanilla=.40, noise=.99)
    assert [best('precision', ['gemmgan', 'vanilla', 'noise'], plausible(s)) for s in (far, near)] == ['gemmgan', None]
    assert best('c_mse', ['gemmgan', 'vanilla'], plausible(far)) == 'vanilla'                       # lower is better
    assert best('precision', ['gemmgan', 'noise'], plausible(far)) is None                          # nothing to be better than but a floor
    s = sheet(far, plausible(far), 1)
    assert s.marks.sum().sum() == 2 and s.marks.loc[('Unsupervised', 'Precision ↑'), 'GeMM-GAN'] and s.marks.loc[('Unsupervised', 'C. MSE ↓'), 'Vanilla WGAN-GP']
    assert not sheet(near, plausible(near), 1).marks.to_numpy().any()


def test_one_training_seed_is_never_marked():
    far = spread_toy(gemmgan=.9, vanilla=.3, mean_image=.2)
    one = far[far.seed == 0]
    assert not sheet(one, plausible(one), 1).marks.to_numpy().any()
    assert not fixed(one, 'gemmgan') and fixed(tidy([('ridge', 0, 0, 'precision', .5)]), 'ridge') and not fixed(tidy([('unknown', 0, 0, 'precision', .5)]), 'unknown')


@pytest.mark.parametrize('seed', range(3))
def test_equal_models_are_seldom_marked(seed):
    "Two models without a difference, 60 metrics: about 5 % marked."
    r = rng(seed, 'null'); keys = [f'{w}_{m}_{k}' for w in ('disease_type', 'primary_site') for m in ('rf', 'mlp') for k in ('accuracy', 'f1')]
    marked = [best(k, ['gemmgan', 'vanilla'], plausible(tidy([(m, s, 0, k, .5 + .1*r.normal()) for m in ('gemmgan', 'vanilla') for s in range(5)]))) is not None for k in keys*8]
    assert np.mean(marked) < .17


def test_the_bootstrap_is_paired(patients):
    moved = resampled(patients, 400)
    apart = moved['crps', 'gemmgan', 0] - moved['crps', 'vanilla', 0]
    assert apart.std() < .8*np.hypot(moved['crps', 'gemmgan', 0].std(), moved['crps', 'vanilla', 0].std())
    x = patients['gemmgan/0/crps']
    assert moved['crps', 'gemmgan', 0].std() == pytest.approx(x.std()/len(x)**.5, rel=.12)
    groups = np.repeat(np.arange(12), 5)
    assert resampled(patients, 50, groups).keys() == moved.keys() and resampled({}) == {}


def test_intervals_over_patients_and_seeds(patients):
    scores = scores_of(patients); draws = plausible(scores, patients)
    gap = differences(scores, draws).set_index(['metric', 'other'])
    assert gap.loc[('correlation', 'ridge'), 'high'] < 0 < gap.loc[('correlation', 'vanilla'), 'low'] and gap.sure.all()
    assert best('correlation', ['ridge', 'gemmgan', 'vanilla'], draws) == 'ridge' and best('crps', ['ridge', 'gemmgan'], draws) == 'ridge'
    only_seeds = plausible(scores)
    assert np.ptp(interval(draws['correlation', 'gemmgan'])) > np.ptp(interval(only_seeds['correlation', 'gemmgan']))*.9 and np.isnan(interval(only_seeds['correlation', 'ridge'])[0])


def test_a_simple_row_that_wins_is_named(patients):
    scores = scores_of(patients); lines = verdict_lines(scores, plausible(scores, patients))
    assert 'Ridge beats GeMM-GAN' in lines[0] and lines[0].startswith('Correlation')
    swapped = scores.replace({'model': {'ridge': 'gemmgan', 'gemmgan': 'ridge'}})
    moved = {k.replace('ridge', 'X').replace('gemmgan', 'ridge').replace('X', 'gemmgan'): v for k, v in patients.items()}
    assert 'beats' not in verdict_lines(swapped, plausible(swapped, moved))[0]
    floor = spread_toy(gemmgan=.3, noise=.99)
    assert 'a floor, so this number alone proves nothing' in next(x for x in verdict_lines(floor, plausible(floor)) if x.startswith('Precision'))


def test_the_papers_layout(paper):
    scores = spread_toy(**{m: .5 for m in ('noise', 'real', 'ridge', *reversed(COLUMNS), *reversed(ROWS[:-1]))})
    one, two = (sheet(scores, plausible(scores), k, paper) for k in (1, 2))
    mine = [c for c in one.text.columns if '(paper' not in c]
    assert mine[:4] == [ENTRIES.get(m, {}).get('spec', {}).get('title', m) for m in COLUMNS] and mine[-2:] == ['Noise', 'Real profiles']
    assert [c for c in one.text.columns if '(paper' in c] == [f'{paper["headings"][m]} (paper, TCGA)' for m in COLUMNS]
    v = paper['values'].query('table == 1 and model == "gemmgan"')
    assert [f'{h} {dict(up="↑", down="↓")[d]}' for h, d in zip(v.heading, v.direction, strict=True)] == [i[1] for i in one.text.index]
    assert len(two.text) == 6 + 2 and not {'Vanilla WGAN-GP', 'Ridge'} & set(two.text.index.get_level_values(1)) and two.text.shape[1] == 14
    assert two.text.loc[:, 'Recall ↑ (paper, TCGA)'].tolist()[:6] == ['0.7026', '0.5205', '0.7821', '0.8821', '0.8346', '0.8190'] and set(two.text.iloc[6:, -1]) == {'-'}
    assert two.marks.shape == two.values.shape == two.text.shape and not one.marks.filter(like='(paper').to_numpy().any()


def test_the_condition_table_has_intervals(patients):
    scores = scores_of(patients); s = sheet(scores, plausible(scores, patients), 'condition', patients={('correlation', 'gemmgan')})
    assert re.fullmatch(r'0\.\d{4} ± 0\.\d{4} \[0\.\d{3}, 0\.\d{3}\]', s.text.loc[('Condition', 'Correlation with the patient ↑'), 'GeMM-GAN'])
    assert '[' not in s.text.loc[('Condition', 'Correlation with the patient ↑'), 'Vanilla WGAN-GP']     # its patients were not resampled
    assert '[' not in table(scores, CONDITION).to_string()


class Balanced(HTMLParser):
    "Open tags, and every tag seen."
    def __init__(self): super().__init__(); self.open, self.seen = [], []
    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != 'meta': self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


@pytest.fixture
def hostile(paper):
    scores = spread_toy(**{EVIL[0]: .9, EVIL[1]: .3, EVIL[2]: .2})
    return sheet(scores, plausible(scores), 1, paper, notes=['less < more & 5 %', EVIL[0]])


def test_html_escapes_hostile_names(hostile):
    page, parser = webpage(hostile), Balanced()
    parser.feed(page)
    assert not parser.open and 'script' not in parser.seen and 'http' not in page
    assert '&lt;script&gt;' in page and '<b>' in page and page.count('<tr>') == len(hostile.text) + 1 + len(set(hostile.text.index.get_level_values(0)))


def test_latex_is_balanced_and_escaped(hostile):
    text = latex(hostile)
    assert text.count('{') - text.count(r'\{') == text.count('}') - text.count(r'\}')
    for env in ('table', 'tabular'): assert text.count(rf'\begin{{{env}}}') == text.count(rf'\end{{{env}}}') == 1
    assert r'\input' not in text.replace(r'\textbackslash{}input', '') and not re.search(r'(?<!\\)[%#_]', text.replace('{!}{%', '')) and text.isascii()
    rows = [line for line in text.splitlines() if line.endswith(r'\\') and 'multicolumn' not in line]
    assert {len(re.findall(r'(?<!\\)&', line)) for line in rows} == {hostile.text.shape[1]} and text.count(r'\toprule') == text.count(r'\bottomrule') == 1
    assert r'\textbf{' in text and re.search(r'(?<!\\)\$(?!\\(uparrow|downarrow|to|pm)\$|[^a-z]|$)', text) is None


def test_markdown_is_a_table(hostile):
    lines = [line for line in markdown(hostile).splitlines() if line.startswith('|')]
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in lines} == {hostile.text.shape[1] + 3} and '<script>' not in markdown(hostile) and '**' in markdown(hostile)


def test_headline_and_bounds(patients):
    scores = pd.concat([scores_of(patients), spread_toy(gemmgan=.6, vanilla=.5, noise=.1, train_mean=.2, real=.95), tidy([(m, s, 0, 'correlation', 0.) for m in ('real', 'noise') for s in range(3)])])
    top = headline(scores, plausible(scores, patients))
    assert len(HEADLINE) <= 9 >= len(top) and top.loc['Precision ↑', ['floor', 'ceiling']].tolist() == pytest.approx([.2, .95], abs=.1)
    assert np.isnan(top.loc['Correlation with the patient ↑', 'ceiling']) and top.loc['Correlation with the patient ↑', 'floor'] == 0   # real profiles know nothing of the patient
    j = joined(scores); assert len(j) == len(scores) and set(j.columns) == {*scores.columns, 'floor', 'ceiling'} and j.floor[(j.metric == 'crps').to_numpy()].isna().all()
    assert bounds(spreads(scores), 'c_mse')[0] < bounds(spreads(scores), 'precision')[0] + .2 and np.isnan(bounds(spreads(scores), 'nosuch')[0])


@pytest.fixture(scope='module')
def folder(tmp_path_factory, patients):
    f = tmp_path_factory.mktemp('run'); names = [f'c{i}' for i in range(80)]
    obs = pd.DataFrame(dict(group=names, project='TOY', disease_type='', primary_site='', slide='', split=['train']*15 + ['val']*5 + ['test']*60), index=names)
    write_cohort(f, np.zeros((80, 30)), obs, pd.DataFrame(dict(symbol=[f'G{j}' for j in range(30)]), index=[f'E{j}' for j in range(30)]), 'zscore', ['image'],
                 pd.DataFrame(dict(slide=[], path=[], mpp=[])))
    return f


@pytest.mark.parametrize('with_patients', [True, False])
def test_everything_is_written(folder, patients, paper, with_patients, tmp_path):
    if with_patients: save_file(patients, tmp_path/'cases.safetensors')
    scores = pd.concat([scores_of(patients), spread_toy(gemmgan=.6, vanilla=.5, noise=.1, **{EVIL[0]: .3})]).assign(split='test')
    found = write_tables(tmp_path, scores, Cohort.load(folder), read_patients([tmp_path, tmp_path/'nosuch']), paper, resamples=100)
    for name in ('table1', 'table2', 'condition'):
        for suffix in ('csv', 'md', 'tex', 'html'): assert (tmp_path/f'{name}.{suffix}').stat().st_size > 200
    assert all((tmp_path/f'{n}.png').stat().st_size > 5000 for n in ('table1', 'table2', 'condition_table'))
    assert {'Vanilla WGAN-GP', 'GeMM-GAN', 'Ridge', 'Noise'} <= set(pd.read_csv(tmp_path/'table1.csv').columns)
    assert len(read_json(tmp_path/'claims.json')) > 30 and 'Ridge' in ' '.join(found['lines'])
    notes = (tmp_path/'table1.md').read_text()
    assert 'Ridge beats GeMM-GAN' in notes      # in words, under the table
    assert 'not comparable' in notes and ('over test patients' in notes) == with_patients and '(paper, TCGA)' in notes and '<script>' not in (tmp_path/'table1.html').read_text()
    assert ('[' in (tmp_path/'condition.csv').read_text()) == with_patients
    (tmp_path/'figure2.png').write_bytes(b'x'); (tmp_path/'provenance.json').write_text('{}')
    kept = gather(tmp_path, tmp_path/'figures', simulated=False)
    assert 'claims.json' in kept and 'table2.html' in kept and not {'figure2.png', 'provenance.json', 'cases.safetensors'} & set(kept)


def test_without_the_paper(folder, patients, tmp_path):
    write_tables(tmp_path, scores_of(patients), Cohort.load(folder), resamples=50)
    assert not (tmp_path/'claims.json').exists() and 'paper, TCGA' not in (tmp_path/'table1.csv').read_text()


def test_names(folder):
    cohort = Cohort.load(folder)
    assert cohort_name(cohort) == 'TOY'
    cohort.obs['project'] = 'TCGA-BRCA'; assert cohort_name(cohort) == 'TCGA'
    cohort.modalities = {'text'}; assert cohort_name(cohort) != 'TCGA'
    cohort.uns['simulated'] = True; assert cohort_name(cohort) == 'simulated patients'
    assert ordered(['nobody', 'real', 'noise', 'gemmgan'], COLUMNS) == ['gemmgan', 'nobody', 'noise', 'real'] and kind_of('nobody') == 'row'
    assert list(PANEL)[:3] == ['precision', 'recall', 'c_mse']
    import matplotlib.pyplot as plt
    s = spread_toy(gemmgan=.5, nobody=.2); plt.close(draw(sheet(s, plausible(s), 1)))
