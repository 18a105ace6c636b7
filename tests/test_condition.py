"""Does the condition matter: every score against brute force or a known value, and real tables as a cohort."""
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from gemmgan_nb.condition import (attainable_correlation, benjamini_hochberg, bootstrap_correlation, bootstrap_weights, by_metric, condition_scores, condition_test, counts_of,
                                  crps_cases, energy_score, gene_correlation, genes_beyond, r2_over_mean, retrieval, seen_under, spread_ratio, views_of)
from gemmgan_nb.data import Cohort, own_cohort
from gemmgan_nb.summaries import summarise
from gemmgan_nb.training import crps
from gemmgan_nb.workspace import load_profile, rng, torch_rng

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'tcga_expression_xena'
real_tables = pytest.mark.skipif(not REAL.is_dir(), reason='real tables are not here (../shared/data/tcga_expression_xena)')


def normal(key, *shape): return torch.from_numpy(rng(0, key).normal(size=shape))


def test_scores_equal_brute_force():
    samples, real = normal('s', 6, 7, 9), normal('r', 7, 9)
    for i in range(7):
        x, y = samples[:, i].numpy(), real[i].numpy()
        between = np.mean([np.abs(a - b).mean() for k, a in enumerate(x) for b in x[k + 1:]])
        assert crps_cases(samples, real)[i] == pytest.approx(np.abs(x - y).mean() - between/2, abs=1e-6)
    distance = lambda x, y: np.mean([np.linalg.norm(a - y) for a in x]) - np.mean([np.linalg.norm(a - b) for k, a in enumerate(x) for b in x[k + 1:]])/2
    energy = [distance(samples[:, i].numpy(), real[i].numpy()) for i in range(7)]
    assert energy_score(samples, real) == pytest.approx(np.mean(energy), abs=1e-6)
    found = condition_scores(samples, real)
    assert found['crps'] == pytest.approx(crps(samples, real).mean().item(), abs=1e-6)
    assert found['spread_ratio'] == pytest.approx(spread_ratio(samples, real), abs=1e-6)
    assert found['correlation'] == pytest.approx(gene_correlation(samples.mean(0), real).mean().item(), abs=1e-6)
    assert found['r2'] == pytest.approx(r2_over_mean(samples.mean(0), real, samples.var(0).sum()/6), abs=1e-6)
    assert r2_over_mean(samples.mean(0), real) == pytest.approx(1 - ((real - samples.mean(0))**2).sum().item()/(real**2).sum().item(), abs=1e-9)


def test_benjamini_hochberg_equals_scipy():
    for k in range(20):
        p = rng(k, 'p').random(50)**(1 + k/5)
        assert benjamini_hochberg(torch.from_numpy(p)).tolist() == (stats.false_discovery_control(p) <= .05).tolist()


def test_retrieval_equals_brute_force_and_shares_ties():
    pred, real = normal('p', 30, 12), normal('r', 30, 12)
    d = np.array([[1 - np.corrcoef(p, r)[0, 1] for r in real.numpy()] for p in pred.numpy()])
    assert retrieval(pred, real)['retrieval'] == pytest.approx(np.mean([(d[i] < d[i, i]).sum() < 3 for i in range(30)]))
    for same in (torch.zeros(30, 12), torch.ones(30, 12), real[4].expand(30, -1)): assert retrieval(same, real) == dict(retrieval=pytest.approx(.1), retrieval_chance=.1)
    twins = torch.cat([real[:15], real[:15]])
    assert retrieval(twins, twins, nearest=1/30)['retrieval'] == pytest.approx(.5)   # each has a double: one place for two
    assert retrieval(3*real + 1, real)['retrieval'] == 1


def test_nothing_is_found_where_nothing_is():
    shares = [genes_beyond(normal(('p', k), 60, 200), normal(('r', k), 60, 200)) for k in range(20)]
    assert np.mean(np.array(shares) > 0) <= .15
    condition = normal('c', 200, 4)
    untrained = lambda key: condition @ normal(key, 4, 500)
    real = condition @ normal('load', 4, 500) + 2*normal('e', 200, 500)
    found = [genes_beyond(untrained(('u', k)), real, untrained(('t', k))) for k in range(20)]
    assert np.mean(found) < .02 and genes_beyond(untrained('u'), real) > .05   # permuted cases credit an untrained network
    assert genes_beyond(condition @ normal('load', 4, 500), real, untrained('t')) > .1


def test_at_zero_signal_every_view_lies_in_its_null_band():
    "Nineteen of twenty seeds at least: the true condition is no better than five shuffles of it."
    inside = []
    for k in range(20):
        told, real, noise = (rng(k, w).normal(size=s) for w, s in (('told', (60, 40)), ('real', (60, 40)), ('noise', (3, 60, 40))))
        sample = lambda view, repeat, told=told, noise=noise, k=k: torch.from_numpy((told if view == 'true' else told[rng(k, repeat).permutation(60)]) + noise)
        found = condition_test(sample, torch.from_numpy(real), ['true', 'wrong_patient'], shuffles=8)
        width = stats.t.ppf(.975, 7)*found['wrong_patient']['correlation_sd']*(1 + 1/8)**.5
        inside.append(abs(found['true']['correlation'] - found['wrong_patient']['correlation']) < width)
    assert sum(inside) >= 19


def test_shuffled_views_are_averaged_over_different_exchanges():
    real, asked = normal('r', 40, 5), []
    def sample(view, repeat): asked.append((view, repeat)); return normal((view, repeat), 3, 40, 5)
    found = condition_test(sample, real, ['true', 'shuffled_image', 'zeroed_image'], shuffles=4)
    assert asked == [('true', 0), *(('shuffled_image', k) for k in range(4)), ('zeroed_image', 0)]
    each = [condition_scores(normal(('shuffled_image', k), 3, 40, 5), real)['correlation'] for k in range(4)]
    assert found['shuffled_image']['correlation'] == pytest.approx(np.mean(each)) and found['shuffled_image']['correlation_sd'] == pytest.approx(np.std(each, ddof=1))
    flat = by_metric(found)
    assert {'correlation', 'crps', 'energy', 'genes_fdr', 'r2', 'retrieval', 'retrieval_chance', 'spread_ratio', 'correlation_median', 'crps_shuffled_image', 'r2_zeroed_image'} <= set(flat)
    assert 'correlation_sd' not in flat and 'correlation_sd_zeroed_image' not in flat


def test_bootstrap_equals_repeated_rows_and_draws_whole_patients():
    pred, real = normal('p', 24, 11), normal('r', 24, 11); pred[:, 3] = 1.
    groups = np.repeat(list('abcdef'), 4); w = bootstrap_weights(24, 40, 1, groups)
    assert w.shape == (40, 24) and (w.reshape(40, 6, 4).std(2) == 0).all() and (w.sum(1) == 24).all()
    assert torch.equal(w, bootstrap_weights(24, 40, 1, groups)) and not torch.equal(w, bootstrap_weights(24, 40, 2, groups))
    found = bootstrap_correlation(pred, real, w, chunk=4)
    for b in range(40):
        rows = torch.arange(24).repeat_interleave(w[b].long())
        assert found[b].item() == pytest.approx(gene_correlation(pred[rows], real[rows]).mean().item(), abs=1e-9)


def test_bootstrap_at_the_size_of_the_tables():
    found = bootstrap_correlation(normal('p', 300, 2000).float(), normal('r', 300, 2000).float(), bootstrap_weights(300, 1000))
    assert found.shape == (1000,) and abs(found.mean()) < .02


def test_bootstrap_interval_covers_the_known_value():
    hits = 0
    for k in range(40):
        x, e = rng(k, 'x').normal(size=(80, 30)), rng(k, 'e').normal(size=(80, 30))
        lo, hi = bootstrap_correlation(torch.from_numpy(x), torch.from_numpy(x + e), bootstrap_weights(80, 300, k)).quantile(torch.tensor([.025, .975], dtype=torch.float64))
        hits += bool(lo - .004 < .5**.5 < hi + .004)
    assert hits >= 34


def test_attainable_correlation_is_that_of_the_true_rate():
    for depth, level in ((2000, .001), (8000, .001), (8000, .004)):
        reads = torch.full((400,), float(depth)); rate = level*(.6*normal('rate', 400, 60)).exp()
        counts = torch.poisson(rate*reads[:, None], generator=torch_rng(0, depth))
        X = (counts/reads[:, None]*1e4).log1p()
        assert attainable_correlation(counts, reads).mean().item() == pytest.approx(gene_correlation((rate*1e4).log1p(), X).mean().item(), abs=.04)
        assert torch.equal(counts_of(X.float().numpy(), reads.numpy()), counts.float())
    deep = attainable_correlation(torch.poisson(1e5*(.5*normal('d', 200, 5)).exp()), torch.full((200,), 1e7))
    assert deep.min() > .99


def test_depth_is_not_taken_for_attainable():
    reads = torch.from_numpy(np.exp(rng(0, 'depth').normal(7, 1.2, 300)).round() + 200)
    rate = torch.logspace(-4, -2.5, 80)*(.5*normal('rate', 300, 80)).exp()
    counts = torch.poisson(rate*reads[:, None], generator=torch_rng(0))
    reached = gene_correlation((rate*1e4).log1p(), (counts/reads[:, None]*1e4).log1p())
    assert attainable_correlation(counts, reads).mean().item() == pytest.approx(reached.mean().item(), abs=.05)
    flat = torch.poisson(torch.logspace(-4, -2.5, 80)*reads[:, None], generator=torch_rng(1))
    assert attainable_correlation(flat, reads).mean() < .15


VIEW = """
import torch
from gemmgan_nb.condition import condition_scores
from gemmgan_nb.workspace import torch_rng
samples, real = torch.empty(32, 120, 6000).normal_(generator=torch_rng(0)), torch.empty(120, 6000).normal_(generator=torch_rng(1))
before = peak(); condition_scores(samples, real); print((peak() - before)/samples.nbytes)
"""

def test_one_view_stays_small(in_a_process_of_its_own): assert float(in_a_process_of_its_own(VIEW)) < 2.5


# ---- a cohort of one's own
@pytest.fixture(scope='module')
def xena(tmp_path_factory):
    out, settings = tmp_path_factory.mktemp('xena'), load_profile('xena')['cohort']
    return out, own_cohort(REAL, out, **{k: v for k, v in settings.items() if k not in ('source', 'folder', 'text')})


@real_tables
def test_real_tables_become_a_cohort_by_profile_alone(xena):
    out, facts = xena
    cohort = Cohort.load(out)
    assert cohort.X.shape == (1164, 1577) and cohort.unit == 'log2(tpm+1)' and cohort.modalities == {'text', 'labels'} and cohort.patches is None
    assert facts['patients'] == cohort.obs.group.nunique() == 1160 and facts['missing_filled'] == facts['repeats_dropped'] == 0 and facts['gene_ids'] == 'symbol'
    assert cohort.obs.project.value_counts().to_dict() == dict(BLCA=360, STAD=336, COADREAD=320, UCEC=148)
    assert cohort.obs.groupby('group', observed=True).split.nunique().max() == 1
    assert cohort.obs.disease_type.nunique() == cohort.obs.primary_site.nunique() == 4 and facts['uneven_columns']['grade'] == ['COADREAD']
    shares = pd.crosstab(cohort.obs.project, cohort.obs.split, normalize='index')
    assert (shares.test - .2).abs().max() < .02


@real_tables
def test_real_unit_is_converted_exactly(xena):
    cohort = Cohort.load(xena[0])
    table = pd.read_csv(REAL/'xena_stad_log2tpm.csv.gz', index_col=0)
    case = table.index[7]; at = list(cohort.obs.index).index(case)
    np.testing.assert_allclose(cohort.X[at], np.log2(np.maximum(2.**table.loc[case] - .001, 0) + 1), atol=1e-5)
    assert cohort.X.min() == 0


@real_tables
def test_real_texts_with_and_without_labels(xena):
    cohort = Cohort.load(xena[0])
    told, untold = ([summarise(c, labels=labels) for c in cohort.cases] for labels in (True, False))
    assert told[0] == 'Male patient, aged 75 years. The disease type is bladder urothelial carcinoma and the primary site is bladder. The diagnosis is bladder urothelial carcinoma. Stage III, grade G2.'
    assert untold[0] == 'Male patient, aged 75 years. Stage III, grade G2.'
    words = 'carcinoma bladder stomach colon rect uter endometri colorectal'.split()
    assert all(any(w in t.lower() for w in words) for t in told) and not any(w in t.lower() for t in untold for w in words)
    assert not any(w in str(cohort.cases) for w in ('survival', 'censor', 'TCGA-2F-A9KO-01Z'))


@real_tables
def test_views_of_a_cohort_without_slides(xena):
    test = Cohort.load(xena[0]).split('test')
    assert views_of(test, ('image', 'text')) == ['true'] and views_of(test, ('labels',)) == ['true', 'wrong_patient']
    wrong = seen_under(test, 'wrong_patient', 2)
    assert (wrong.text_of != test.text_of).all() and sorted(wrong.obs.disease_type) == sorted(test.obs.disease_type)
    with pytest.raises(ValueError, match='no view'): seen_under(test, 'shuffled_genes')


@pytest.mark.parametrize('kind', ['csv', 'tsv.gz', 'parquet', 'h5ad'])
def test_every_kind_of_table(tmp_path, kind):
    if kind == 'parquet': pytest.importorskip('pyarrow')
    frame = pd.DataFrame(rng(0).normal(3, 1, (8, 3)), index=[f'P{i}' for i in range(8)], columns=['ENSG01.3', 'ENSG02', 'ENSG03'])
    path = tmp_path/f'expression.{kind}'
    if kind == 'parquet': frame.to_parquet(path)
    elif kind == 'h5ad': ad.AnnData(frame).write_h5ad(path)
    else: frame.to_csv(path, sep=',' if kind == 'csv' else '\t')
    facts = own_cohort(tmp_path, tmp_path/'out', f'expression.{kind}', 'zscore')
    cohort = Cohort.load(tmp_path/'out')
    np.testing.assert_allclose(cohort.X, frame, rtol=1e-5)
    assert facts['gene_ids'] == 'ensembl' and list(cohort.var.index) == ['ENSG01', 'ENSG02', 'ENSG03'] and cohort.modalities == set()


def test_wrong_tables_are_named(tmp_path):
    frame = pd.DataFrame(rng(0).normal(3, 1, (8, 3)), index=[f'P{i}' for i in range(8)], columns=list('ABC')); frame.to_csv(tmp_path/'e.csv')
    pd.DataFrame(dict(who=frame.index, age=50)).to_csv(tmp_path/'c.csv', index=False)
    frame.assign(D='high').to_csv(tmp_path/'words.csv')
    for says, kind, extra in (("no column 'case_id'", ValueError, dict(clinical=['c.csv'])), ('no file x.csv', FileNotFoundError, dict(clinical=['x.csv'])),
                              ('No clinical table has a column sex', ValueError, dict(clinical=['c.csv'], id='who', columns=dict(sex='demographic.gender'))),
                              ('Choose one of', ValueError, dict(unit='rpkm')), ("'D' does not hold numbers", ValueError, dict(expression='words.csv'))):
        with pytest.raises(kind, match=says): own_cohort(tmp_path, tmp_path/'out', **(dict(expression='e.csv') | extra))
        assert not (tmp_path/'out'/'cohort.h5ad').exists()
    facts = own_cohort(tmp_path, tmp_path/'out', 'e.csv', clinical=['c.csv'], id='who')
    assert facts['without_clinical_row'] == 0 and Cohort.load(tmp_path/'out').cases[0]['demographic'] == dict(age_at_index='50')
