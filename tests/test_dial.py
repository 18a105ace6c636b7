"""A test of the yardstick itself: where nothing can be known, every condition score lies in its null band; where much can be known, none does."""
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from gemmgan_nb.baselines import Ridge
from gemmgan_nb.condition import case_scores, gene_correlation, retrieval
from gemmgan_nb.data import Cohort, pack, write_cohort
from gemmgan_nb.simulation import HIDDEN, draw_cases, drivers, make_law
from gemmgan_nb.training import WGAN, Budget, ModelSpec
from gemmgan_nb.workspace import rng, torch_rng

BUDGET = Budget(steps=120, batch=32, patches=4, dim=32, hidden=64, latent=16, lr=1e-3, lr_critic=1e-3, score_every=20, ema=.9, dropout=0.)


def world(folder, seed, signal):
    "120 simulated patients whose features are the very factors of the law, a little blurred; expression follows them as far as the dials say."
    law, who, g = make_law(300, seed, signal, signal), draw_cases(120, seed), rng(seed, 'world')
    x = drivers(who)
    X = law.log_tpm(law.counts(law.level(x | dict(hidden=g.normal(size=(120, HIDDEN)))), g))
    names, sides = list(who.index), g.permutation(['train']*80 + ['val']*16 + ['test']*24)
    obs = pd.DataFrame(dict(group=names, project='SIM', disease_type='a', primary_site='b', slide=names, split=sides), index=names)
    genes = law.genes.gene_id.str.split('.').str[0]
    write_cohort(folder, X, obs, pd.DataFrame(dict(symbol=law.genes.gene_name.to_numpy()), index=genes), 'log2(tpm+1)', ['image', 'text'],
                 pd.DataFrame(dict(slide=names, path='none', mpp=.5)))
    image, text = (np.nan_to_num((v - v.mean(0))/(v.std(0) + 1e-9)) for v in (x['image'], np.concatenate([x['type'], x['text']], 1)))
    pack(folder/'patches.safetensors', {n: image[i] + .3*g.normal(size=(4, image.shape[1])) for i, n in enumerate(names)}, {n: [(n, None)] for n in names})
    pack(folder/'tokens.safetensors', {n: text[[i]] for i, n in enumerate(names)}, {n: [(n, None)] for n in names})
    return Cohort.load(folder)


def scores(samples, real):
    of = case_scores(samples, real); mean = of['mean']
    return dict(correlation=gene_correlation(mean, real).mean().item(), crps=of['crps'].mean().item(), energy=of['energy'].mean().item(),
                r2=1 - ((real - mean)**2).mean().item()/(real**2).mean().item(), retrieval=retrieval(mean, real)['retrieval'])


def place(model, cohort, seed):
    "Where each score stands among those of 99 exchanges of patients: the share of exchanges below it."
    test = cohort.split('test')
    model.fit(cohort.split('train'), cohort.split('val'), seed)
    real, samples = torch.from_numpy(model.scaler.transform(test.X)), model.sample(test, 8, seed)
    own = scores(samples, real)
    stream = torch_rng(seed, 'exchange')
    null = pd.DataFrame([scores(samples[:, torch.randperm(len(test), generator=stream)], real) for _ in range(99)])
    return {k: ((null[k] < v).mean() + (null[k] <= v).mean())/2 for k, v in own.items()}


def ridge(): return Ridge(ModelSpec('ridge', 'Ridge', ('image', 'text')))
def gemmgan(): return WGAN(ModelSpec('gemmgan', 'GeMM-GAN', ('image', 'text')), BUDGET, dict(heads=2, layers=1, ff=64))


def places_without_signal(row, folder):
    "Where each score stands in twenty worlds without signal, and in how many it lies in its 95 % band."
    places = pd.DataFrame([place(row(), world(folder/str(s), s, 0.), s) for s in range(20)])
    return places, ((places >= .025) & (places <= .975)).sum()


def test_without_signal_every_score_lies_in_its_null_band_in_19_of_20_seeds(tmp_path):
    places, inside = places_without_signal(ridge, tmp_path)
    assert (inside >= 19).all(), places.round(3).to_string()


@pytest.mark.slow
def test_without_signal_gemmgan_stands_where_chance_puts_it(tmp_path):
    "19 of 20 is what a 95 % band holds on average, so a score that knows nothing misses it in every fourth try; here are counts and mean places that it misses once in a thousand."
    places, inside = places_without_signal(gemmgan, tmp_path)
    assert (inside >= stats.binom.ppf(.001, 20, .95)).all() and ((places.mean() - .5).abs() < stats.norm.ppf(.9995)/240**.5).all(), places.round(3).to_string()


@pytest.mark.parametrize('row', [ridge, gemmgan])
def test_with_signal_every_score_leaves_it(tmp_path, row):
    places = pd.DataFrame([place(row(), world(tmp_path/str(s), s, 1.), s) for s in range(2)])
    assert (places[['correlation', 'r2', 'retrieval']] > .975).all(axis=None) and (places[['crps', 'energy']] < .025).all(axis=None), places.to_string()
