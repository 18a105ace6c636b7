"""How sure, and may it be used: coverage, split conformal and the reliability card against known answers, their guards and their memory."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from gemmgan_nb.condition import (calibration, calibration_genes, calibration_rows, calibration_types, central_interval, conformal_band, conformal_fit, conformal_interval, covers,
                                  gene_slices, mark_genes, pack_card, patient_weights, pit, pit_error, pit_floor, rank_correlation, reliability, reliability_rows, unpack_card,
                                  verdicts, widening)
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.workspace import torch_rng


def normal(key, *shape): return torch.randn(*shape, generator=torch_rng(0, key))


@pytest.mark.parametrize('n', [1, 2, 7, 64])
def test_ranks_are_uniform_for_any_number_of_draws(n):
    u = pit(normal(f's{n}', n, 100, 60), normal(f'r{n}', 100, 60))
    assert stats.kstest(u.flatten().numpy(), 'uniform').pvalue > 1e-3
    for level in (.5, .8, .95): assert covers(u, level).double().mean().item() == pytest.approx(level, abs=.03)


def test_ranks_equal_counting_and_pieces_change_nothing(monkeypatch):
    samples, real = normal('s', 9, 5, 7).round(), normal('r', 5, 7).round()    # many ties
    u, chance = pit(samples, real, 3), torch.rand(5, 7, generator=torch_rng(3, 'pit'))
    for i in range(5):
        for g in range(7): assert u[i, g].item() == pytest.approx(((samples[:, i, g] < real[i, g]).sum() + chance[i, g]*(1 + (samples[:, i, g] == real[i, g]).sum())).item()/10, abs=1e-6)
    ends = central_interval(samples, .8)
    monkeypatch.setattr('gemmgan_nb.condition.gene_slices', lambda s: gene_slices(s, 90))
    assert pit(samples, real, 3).equal(u) and all(a.equal(b) for a, b in zip(central_interval(samples, .8), ends, strict=True))


def test_pit_error_of_the_calibrated_is_its_floor_and_knows_the_extremes():
    for patients in (30, 300): assert pit_error(torch.rand(patients, 2000, generator=torch_rng(0))).mean().item() == pytest.approx(pit_floor(patients), rel=.05)
    assert pit_error(torch.tensor([[0.], [1.]]).repeat(500, 1)).item() == pytest.approx(.25, abs=1e-3) and pit_error(torch.ones(500, 1)).item() == pytest.approx(.5, abs=1e-3)


def test_patients_count_alike_however_many_spots_they_own():
    groups = np.repeat(['a', 'b', 'c'], [1, 4, 10])
    w = patient_weights(15, groups)
    assert w.sum().item() == pytest.approx(1) and w[:1].sum() == pytest.approx(1/3) and w[5:].sum().item() == pytest.approx(1/3)
    inside = torch.tensor([True]*1 + [False]*14)[:, None]
    assert calibration_types(torch.rand(15, 1), groups=groups, also=dict(x=inside)).x['all'] == pytest.approx(1/3)
    assert calibration_genes(torch.rand(15, 1), groups, dict(x=inside)).x[0] == pytest.approx(1/3)


@pytest.mark.parametrize('n', [9, 10, 37, 100])
def test_widening_is_the_textbook_quantile_without_groups_and_one_a_patient_with_them(n):
    outside = normal('o', n, 20)
    k = int(np.ceil(.9*(n + 1)))
    assert widening(outside).equal(outside.kthvalue(k, 0).values)
    assert widening(outside.repeat_interleave(5, 0), groups=np.repeat(np.arange(n), 5)).equal(widening(outside))
    assert widening(outside[:8]).isinf().all()
    assert widening(outside.repeat_interleave(5, 0)[:40], groups=np.repeat(np.arange(8), 5)).isinf().all()    # forty spots of eight patients promise nothing


@pytest.mark.parametrize('spread', [.05, .6, 1., 3.])
def test_the_promise_is_kept_for_sure_and_hedging_generators(spread):
    side = lambda key, patients: (spread*normal(f'{key} s {spread}', 19, patients, 400), normal(f'{key} r {spread}', patients, 400))
    found = calibration(*side('cal', 120), *side('test', 150))
    assert found['conformal_90'] == pytest.approx(109/121, abs=.012) and found['conformal_90_genes_in_band'] > .9
    assert (found['coverage_80'] < .7) == (spread < .7) and (found['pit_error'] > 1.5*found['pit_error_floor']) == (spread != 1)


def test_the_band_is_that_of_repeated_experiments():
    low, high = conformal_band(50, .8, test=80)
    counted = []
    for k in range(300):
        x = torch.randn(130, generator=torch_rng(k, 'band'))
        counted.append((x[50:] <= x[:50].kthvalue(int(np.ceil(.8*51))).values).double().mean().item())
    assert np.mean([low <= c <= high for c in counted]) == pytest.approx(.96, abs=.03)
    with pytest.raises(ValueError, match='3 calibration patients cannot promise 80%; it takes 4'): conformal_band(3, .8)


def test_a_point_prediction_gets_intervals_too():
    real = normal('truth', 200, 50); guess = .8*real + .6*normal('noise', 200, 50)
    found = calibration(guess[None, :100], real[:100], guess[None, 100:], real[100:])
    assert found['conformal_90'] == pytest.approx(.9, abs=.02) and found['conformal_90_width'] == pytest.approx(2*1.645*(.2**2 + .6**2)**.5, rel=.1)


def test_a_type_is_widened_alone_only_where_it_has_patients():
    kinds = np.array(['big']*40 + ['small']*10)
    samples, real = normal('s', 19, 50, 5), normal('r', 50, 5)
    fitted = conformal_fit(samples, real, types=kinds)
    assert set(fitted) == {'', 'big'} and fitted['big'].equal(conformal_fit(samples[:, :40], real[:40])[''])
    low, _ = conformal_interval(samples, fitted, types=kinds); plain, _ = central_interval(samples)
    assert torch.allclose(plain[0] - low[0], fitted['big'], atol=1e-6) and torch.allclose(plain[45] - low[45], fitted[''], atol=1e-6)


def test_too_few_patients_are_nan_and_unlike_sides_refused():
    s, r = normal('s', 9, 30, 5), normal('r', 30, 5)
    few = calibration(s[:, :5], r[:5], s, r)
    assert all(np.isnan(v) for k, v in few.items() if k.startswith('conformal') and not k.endswith('patients')) and few['conformal_90_patients'] == 5 and np.isfinite(few['coverage_80'])
    assert set(few) == set(calibration(s, r, s, r))
    with pytest.raises(ValueError, match='9 draws a calibration case and 4 a test case'): calibration(s, r, s[:4], r)


class Row:
    "Knows a share of every patient's profile."
    def __init__(self, cohort, about=None): self.X, self.about = dict(zip(cohort.obs.index, torch.from_numpy(cohort.X), strict=True)), about or dict(slides=[], groups=[])
    scaler = type('Same', (), dict(transform=staticmethod(lambda X: X)))()
    def sample(self, cases, n, seed): return .7*torch.stack([self.X[c] for c in cases.obs.index]) + .5*torch.randn(n, len(cases), 12, generator=torch_rng(seed))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder, names = tmp_path_factory.mktemp('cohort'), [f'c{i}' for i in range(160)]
    obs = pd.DataFrame(dict(group=[f'p{i}' for i in range(160)], project='X', disease_type=['A', 'B']*80, primary_site='', slide=names,
                            split=np.repeat(['train', 'val', 'cal', 'test'], 40)), index=pd.Index(names, name='case_id'))
    write_cohort(folder, normal('X', 160, 12).numpy(), obs, pd.DataFrame(dict(symbol=[f'G{i}' for i in range(12)]), index=[f'E{i}' for i in range(12)]), 'zscore', ['image'],
                 pd.DataFrame(dict(slide=names, path='none', mpp=.5)))
    pack(folder/'patches.safetensors', {c: np.zeros((1, 2)) for c in names}, {c: [(c, None)] for c in names})
    return Cohort.load(folder)


def test_only_calibration_cases_calibrate_and_only_validation_cases_make_the_card(cohort):
    row, cal, test = Row(cohort), cohort.split('cal'), cohort.split('test')
    found = calibration_rows(row, cal, test, samples=16)
    assert found == calibration_rows(row, cal, test, row.sample(test, 16, 0)) and found['conformal_90'] > .75
    for side in ('train', 'val', 'test'):
        with pytest.raises(LeakError, match='Split conformal would see 40 cases that are not calibration'): calibration_rows(row, cohort.split(side), test)
    with pytest.raises(LeakError, match='not test cases'): calibration_rows(row, cal, cal)
    with pytest.raises(LeakError, match='not calibration cases, c79'): calibration_rows(row, cohort[[*range(80, 120), 79]], test)
    for side in ('train', 'cal', 'test'):
        with pytest.raises(LeakError, match='reliability card would see 40'): reliability_rows(row, cohort.split(side))
    assert list(reliability_rows(row, cohort.split('val'), samples=16).columns) == ['all', 'A', 'B']


def test_calibration_cases_that_were_trained_on_or_are_tested_are_refused(cohort):
    cal, test = cohort.split('cal'), cohort.split('test')
    with pytest.raises(LeakError, match='p90'): calibration_rows(Row(cohort, dict(slides=[], groups=['p90'])), cal, test)
    shared = cohort.split('cal'); shared.obs = shared.obs.assign(group=['p130', *shared.obs.group[1:]])
    with pytest.raises(LeakError, match='p130 calibrates and is tested'): calibration_rows(Row(cohort), shared, test)


def test_rank_correlation_equals_scipy_with_ties():
    a, b = normal('a', 40, 6).round(), (normal('a', 40, 6) + normal('b', 40, 6)).round()
    assert rank_correlation(a, b).numpy() == pytest.approx([stats.spearmanr(a[:, g], b[:, g]).statistic for g in range(6)])


@pytest.mark.parametrize('patients, heavy', [(20, False), (60, False), (60, True)])
def test_false_entries_of_the_card_stay_below_the_rate(patients, heavy):
    share, wrong = torch.tensor([.85, 0.]).repeat_interleave(300), []
    for k in range(15):
        draw = lambda what, k=k: torch.randn(patients, 600, generator=torch_rng(k, what))
        real = draw('r'); pred = share*real + (1 - share**2)**.5*draw('p')
        if heavy: real, pred = real**5, pred.exp()
        v = verdicts(rank_correlation(pred, real), patients)
        wrong.append([(v[300:] >= level).sum()/max(1, (v >= level).sum()) for level in (1, 2)])
        assert (v[:300] > 0).mean() > (.8 if patients == 20 else .99)
    assert np.mean(wrong, 0).max() <= .05


def test_usable_means_above_the_line_not_above_zero():
    share = .25; wrong = []
    for k in range(15):
        real = torch.randn(80, 400, generator=torch_rng(k, 'r')); pred = share*real + (1 - share**2)**.5*torch.randn(80, 400, generator=torch_rng(k, 'p'))
        wrong.append((verdicts(rank_correlation(pred, real), 80) == 2).mean())
    assert np.mean(wrong) < .01


def test_the_card_travels_as_json_and_an_unknown_type_is_not_to_be_used():
    real = normal('r', 90, 50); card = reliability(.9*real + .4*normal('p', 90, 50), real, ['A', 'B', 'rare']*2 + ['A', 'B']*42, genes=[f'E{i}' for i in range(50)])
    again = unpack_card(json.loads(json.dumps(pack_card(card))), card.index)
    assert again.equals(card) and again.attrs == card.attrs and list(card.columns) == ['all', 'A', 'B'] and len(json.dumps(pack_card(card))) < 600
    assert set(mark_genes(again, 'rare')) == {'do not use'} and (mark_genes(again, 'A') == 'usable').all() and mark_genes(again).equals(card['all'].rename('all'))
    with pytest.raises(ValueError, match='speaks of 50 genes, the model of 3'): unpack_card(pack_card(card), ['a', 'b', 'c'])


WIDE = """
import torch
from gemmgan_nb.condition import conformal_fit, conformal_interval, pit
from gemmgan_nb.workspace import torch_rng
samples, real = torch.empty(96, 60, 18868).normal_(generator=torch_rng(0)), torch.empty(60, 18868).normal_(generator=torch_rng(1))
before = peak()
conformal_interval(samples, conformal_fit(samples, real)); pit(samples, real)
print((peak() - before)/samples.nbytes)
"""

def test_wide_profiles_are_not_copied(in_a_process_of_its_own): assert float(in_a_process_of_its_own(WIDE)) < .6      # what is returned, and slices; a copy adds 1


class Whole(Row):
    "As much as `evaluate` needs of a row."
    def __init__(self, cohort):
        from gemmgan_nb.training import ModelSpec
        super().__init__(cohort); self.spec = ModelSpec('gemmgan', 'GeMM-GAN', ('image',))
    def save(self, folder): pass


def test_types_and_genes_reach_the_tables_with_the_panels_numbers(cohort, tmp_path):
    from gemmgan_nb.experiment import evaluate
    from gemmgan_nb.tables import calibrations, write_calibration
    frame, patients = evaluate(Whole(cohort), cohort, generations=1, samples=16, shuffles=1, blocks=('calibration',), bounds={}); by = frame.set_index('metric').value
    assert {k: tuple(v.shape) for k, v in patients.items() if k.startswith('calibrated')} == {'calibrated.cases': (40, 4), 'calibrated.genes': (12, 5), 'calibrated.pit': (3,)}
    stored = {f'gemmgan/{s}/{k}': v.numpy() for s in (0, 1) for k, v in patients.items()} | dict(real=np.zeros((40, 12)))
    opened = calibrations(stored, frame, cohort.split('test')); at = opened.set_index(['group', 'level'])
    assert [at.coverage['all', k] for k in ('50 %', '80 %', '95 %', '90 %, conformal', 'PIT')] == pytest.approx([by[k] for k in ('coverage_50', 'coverage_80', 'coverage_95', 'conformal_90', 'pit_error')])
    assert at.loc[['A', 'B']].n.eq(20).all() and opened[opened.group.isin(['A', 'B']) & (opened.level == '90 %, conformal')].coverage.min() == pytest.approx(by['conformal_90_worst_type'])
    covered = opened[opened.level.ne('PIT') & opened.group.isin(['all', 'A', 'B'])]; assert (covered.low <= covered.coverage).all() and (covered.coverage <= covered.high).all() and (covered.low < covered.high).all()
    write_calibration(opened, tmp_path); text = (tmp_path/'calibration.md').read_text(); names = set(map(str, cohort.obs.index)) | set(cohort.obs.group)
    assert pd.read_csv(tmp_path/'calibration.csv').shape == (30, 8) and 'GeMM-GAN' in text and f'{at.coverage["A", "80 %"]:.3f}' in text and not names & set(text.replace('|', ' ').split())
    assert not len(calibrations({k: v for k, v in stored.items() if 'calibrated' not in k}, frame, cohort.split('test')))


def test_the_audit_says_what_each_number_means():
    from gemmgan_nb.tables import AUDIT, MEANING, MEANS, draw, latex, markdown, plausible, sheet, webpage
    rows = pd.DataFrame([(m, s, 0, k, .5 + .1*s) for m in ('gemmgan', 'ridge') for s in (0, 1) for k in AUDIT], columns=['model', 'seed', 'run', 'metric', 'value'])
    s = sheet(rows, plausible(rows), 'audit')
    assert s.text[MEANS].tolist() == [MEANING[k] for k in AUDIT] and all(len(x) > 20 for x in MEANING.values())
    assert all(MEANING['dcr_share'] in write(s) for write in (markdown, webpage)) and MEANING['dcr_share'] not in latex(s) and len(draw(s).axes) == 1
    headed = [h for h, d, _ in AUDIT.values() if not d and not h.startswith('...')]; assert headed == ['Nearest over second nearest training patient']      # to be read beside the next line, as its phrase says
