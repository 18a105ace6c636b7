"""The four worked examples of CONTRIBUTING.md, run as a contributor would add them."""
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gemmgan_nb import baselines, encoders, experiment, metrics, tables
from gemmgan_nb.data import Cohort, pack, write_cohort
from gemmgan_nb.workspace import rng

PAGE = (Path(__file__).parents[1]/'CONTRIBUTING.md').read_text()
CHAPTERS = dict(re.findall(r'^## (An? \w+)\n(.*?)(?=^## |\Z)', PAGE, re.M | re.S))
BLOCKS = {title: re.findall(r'```python\n(.*?)```', text, re.S) for title, text in CHAPTERS.items()}


@pytest.fixture
def added(monkeypatch):
    "Runs a block inside a module of the library, as its export would; taken back after the test."
    def add(module, code):
        inside = dict(vars(module)); exec(code, inside)
        for name in inside.keys() - vars(module).keys():
            if hasattr(inside[name], '__module__'): inside[name].__module__ = module.__name__
            monkeypatch.setattr(module, name, inside[name], raising=False)
    return add


@pytest.fixture
def toy(tmp_path):
    "Sixty cases whose genes follow two hidden numbers, so that genes are correlated."
    r, names = rng(0, 'contributing'), [f'c{i}' for i in range(60)]
    obs = pd.DataFrame(dict(group=names, project='TOY', disease_type='Gliomas', primary_site='Brain', slide=names, split=['train']*30 + ['val']*10 + ['test']*20), index=names)
    var = pd.DataFrame(dict(symbol=[f'G{j}' for j in range(12)]), index=[f'ENSG{j}' for j in range(12)])
    write_cohort(tmp_path/'toy', r.normal(size=(60, 2)) @ r.normal(size=(2, 12)) + .3*r.normal(size=(60, 12)), obs, var, 'zscore', ['image', 'labels'], pd.DataFrame(dict(slide=names, path='none', mpp=.5)))
    pack(tmp_path/'toy'/'patches.safetensors', {c: r.normal(size=(3, 4)) for c in names}, {c: [(c, None)] for c in names})
    return Cohort.load(tmp_path/'toy')


def test_the_page_has_the_four_examples_and_is_one_page():
    assert {k: len(v) for k, v in BLOCKS.items()} == {'A model': 2, 'An encoder': 1, 'A metric': 3, 'A cohort': 1}
    assert len(PAGE.split()) < 900


def test_a_model(added, toy, tmp_path, monkeypatch):
    code, line = BLOCKS['A model']
    added(baselines, code)
    row = eval(line, vars(experiment))
    monkeypatch.setitem(experiment.ENTRIES, row['spec']['name'], row)
    rows = experiment.entries_of(['marginals', 'noise', 'real'])
    experiment.fit_job(rows, toy, [0], {}, tmp_path/'fit')
    found = experiment.evaluate_job(rows, toy, tmp_path/'fit', tmp_path, generations=1, samples=8, shuffles=1).groupby(['metric', 'model']).value.mean()
    c_mse = found['c_mse']
    assert c_mse['marginals'] > 3*c_mse['real'] and abs(c_mse['marginals']/c_mse['noise'] - 1) < .3      # as the page says
    assert abs(found['correlation']['marginals']) < .25
    model = experiment.model_class('baselines.Marginals').load(tmp_path/'fit'/'marginals'/'seed0')
    drawn, known = model.sample(toy.split('test'), 9, 0).numpy(), model.arrays['profiles']
    assert all(np.isin(drawn[..., g], known[:, g]).all() for g in range(12))      # every value is a training value of that gene
    assert 'marginals' in experiment.jobs_of(['marginals'])['untrained'][0]['spec'].values() and tables.kind_of('marginals') == 'floor'


def test_an_encoder(added, monkeypatch):
    monkeypatch.setattr(encoders, 'ENCODERS', dict(encoders.ENCODERS))
    added(encoders, BLOCKS['An encoder'][0])
    encoder = encoders.load_image_encoder('colour')
    tiles = rng(0, 'tiles').integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    assert encoder.dim == 3 and encoder.id.startswith('colour-')
    np.testing.assert_allclose(encoder(tiles), (tiles.mean((1, 2)) - 127.5)/127.5, atol=2e-3)


def test_a_metric(added, toy, monkeypatch):
    code, body, line = BLOCKS['A metric']
    added(metrics, code)
    x = rng(0, 'shift').normal(size=(50, 6))
    assert metrics.mean_shift(x, x) == 0 and metrics.mean_shift(x, x + 2) == pytest.approx(2)
    with pytest.raises(ValueError, match='not finite'): metrics.mean_shift(x, x*np.nan)
    monkeypatch.setattr(tables, 'PANEL', dict(tables.PANEL))
    exec(line, vars(tables))
    scores = pd.DataFrame([(m, s, 0, 'test', 'mean_shift', v + .01*s) for m, v in (('noise', 1.), ('gemmgan', .2)) for s in (0, 1)], columns=['model', 'seed', 'run', 'split', 'metric', 'value'])
    text = tables.sheet(scores, tables.plausible(scores), 1).text
    assert text.loc[('Beyond the paper', 'Shift of the means ↓'), 'GeMM-GAN'].startswith('0.2050')
    inside = dict(found={}, real=dict(test=x), fake=dict(test=x + 1), mean_shift=metrics.mean_shift); exec(body, inside)
    assert inside['found'] == dict(mean_shift=pytest.approx(1))


def test_a_cohort(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = {}; exec(BLOCKS['A cohort'][0], inside)
    cohort = inside['cohort']
    assert cohort.modalities == {'text', 'labels'} and len(cohort) == 30 and set(cohort.var.symbol) == {'TP53', 'EGFR', 'KRAS', 'MYC', 'PTEN'}
    assert cohort.unit == 'log2(tpm+1)' and {'train', 'val', 'test'} <= set(cohort.obs.split)
