"""PathGen: the walk back, the network's claims, bad input, the statistics of grade and survival, and real patients."""
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pandas as pd
import pytest
import torch

from gemmgan_nb import pathgen as P
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.encoders import load_image_encoder
from gemmgan_nb.simulation import draw_cases
from gemmgan_nb.training import Batch, Budget, ModelSpec
from gemmgan_nb.workspace import read_json, rng, torch_rng

pytest.importorskip('lifelines', reason='the survival extra is not installed')
REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'pathgen_porpoise'
COGNOMA, REGIONS = REAL.parent/'tcga_clinical'/'cognoma'/'complete_samples.tsv.gz', REAL.parent/'tcga_he_tiles'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real tables are not here (../shared/data/pathgen_porpoise)')
recorded = pytest.mark.skipif(not (REAL.is_dir() and COGNOMA.exists()), reason='real tables are not here (../shared/data/pathgen_porpoise, tcga_clinical/cognoma)')
pictured = pytest.mark.skipif(not (REAL.is_dir() and (REGIONS/'index.csv').exists()), reason='real regions are not here (../shared/data/pathgen_porpoise, tcga_he_tiles)')
SMALL = Budget(steps=4, batch=16, patches=3, dim=16, heads=2, score_every=2, score_samples=2)


@cache
def toy(n=60, genes=12, tokens=True):
    """One hidden number drives patches and genes; gene 11 is constant."""
    folder, r = Path(mkdtemp()), rng(0, 'toy'); hidden, names = r.normal(size=n), [f'c{i}' for i in range(n)]
    X = np.outer(hidden, r.normal(size=genes)) + .5*r.normal(size=(n, genes)) + 5; X[:, -1] = 1.
    obs = pd.DataFrame(dict(group=names, project='TOY', disease_type='A', primary_site='B', slide=names, split=np.repeat(['train', 'val', 'cal', 'test'], [n//2, n//6, n//6, n//6])), index=names)
    write_cohort(folder, X, obs, pd.DataFrame(dict(symbol=[f'G{j}' for j in range(genes)]), index=[f'ENSG{j}' for j in range(genes)]), 'log2(tpm+1)', ['image', 'text'], pd.DataFrame(dict(slide=names, path='none', mpp=.5)))
    bags = {c: [(c, None)] for c in names}
    pack(folder/'patches.safetensors', {c: hidden[i] + r.normal(size=(5, 3)) for i, c in enumerate(names)}, bags)
    if tokens: pack(folder/'tokens.safetensors', {c: r.normal(size=(4, 6)) for c in names}, bags)
    return Cohort.load(folder)


def sides(): return [toy().split(s) for s in ('train', 'val', 'test')]


def make(uses=('image',), budget=SMALL, **switches): return P.PathGen(ModelSpec('p', 'P', uses), budget, switches, device='cpu')


VARIANTS = {'corrected': {}, 'as described': dict(preset='as_described', steps=6), 'v': dict(target='v', steps=5), 'eps without a skip': dict(target='eps', skip=False, steps=5), 'one group': dict(groups=1, steps=5),
            'residual scale': dict(residual_scale=True, steps=5), 'ancestral': dict(sampler='ancestral', steps=5), 'with text': dict(steps=5)}


@pytest.mark.parametrize('name', VARIANTS)
def test_protocol(name, tmp_path):
    train, val, test = sides(); uses = ('image', 'text') if name == 'with text' else ('image',)
    model, twin = make(uses, **VARIANTS[name]), make(uses, **VARIANTS[name])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    model.fit(train, val, 3); twin.fit(train, val, 3); drawn = model.sample(test, 3, 5)
    assert drawn.shape == (3, len(test), 12) and drawn.dtype == torch.float32 and drawn.isfinite().all()
    assert torch.equal(drawn, model.sample(test, 3, 5)) and torch.equal(drawn, twin.sample(test, 3, 5)) and not torch.equal(drawn, model.sample(test, 3, 6))
    assert (torch.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()
    assert drawn[..., -1].abs().max() == 0      # the constant gene
    model.save(tmp_path)
    assert torch.equal(P.PathGen.load(tmp_path, device='cpu').sample(test, 3, 5), drawn)
    assert set(read_json(tmp_path/'config.json')['about']['cases']) == set(train.obs.index)


def test_leaks_are_refused():
    train, val, test = sides()
    for groups in (6, 1):
        with pytest.raises(LeakError): make(groups=groups).fit(toy(), val, 0)
    with pytest.raises(LeakError): make().fit(train, test, 0)
    with pytest.raises(LeakError): P.correlation_groups(toy())
    model = make(steps=5); model.fit(train, val, 0)
    with pytest.raises(LeakError, match='residual scale'): P.fit_spread(model, test, 0)


def test_a_fresh_object_goes_on_from_a_checkpoint(tmp_path):
    train, val, test = sides()
    whole, first = make(steps=5), make(steps=5); first.work = tmp_path
    whole.fit(train, val, 0); first.fit(train, val, 0)
    again = make(steps=5); again.work = tmp_path; again.fit(train, val, 0)
    assert torch.equal(whole.sample(test, 2, 0), again.sample(test, 2, 0))


def test_without_a_slide_and_with_guidance():
    train, val, test = sides(); model = make(budget=Budget(**vars(SMALL) | dict(modality_dropout=.3)), steps=5); model.fit(train, val, 0)
    assert model.sample(test.zeroed('image'), 2, 0).isfinite().all()
    net, x, mask = model.parts['g'].eval(), torch.randn(4, 3, 3, generator=torch_rng(0, 'x')), torch.ones(4, 3, dtype=torch.bool)
    def drawn(w, mask): return P.drawn(net, Batch(None, x, mask, None, None), 2, model.settings | dict(guidance=w), torch_rng(1, 'walk'))
    torch.testing.assert_close(drawn(0., mask), drawn(1., ~mask), atol=1e-4, rtol=1e-4); assert not torch.allclose(drawn(1., mask), drawn(1., ~mask), atol=1e-3)
    torch.testing.assert_close(drawn(2., ~mask), drawn(1., ~mask), atol=1e-4, rtol=1e-4)


def test_the_order_of_genes_in_groups_changes_nothing_outside():
    train, val, test = sides(); codes = P.group_codes(3, train, 0); assert np.argsort(codes, kind='stable').tolist() != list(range(12))
    net = P.Denoiser(dict(image=3), codes, SMALL, P.settings_of(dict(skip=True))); Z = torch.randn(50, 12, generator=torch_rng(0, 'z')); Z[:, 3] += 9
    P.fit_scaling(net, Z, 'minmax')
    torch.testing.assert_close(net.low[net.back], Z.amin(0)); torch.testing.assert_close((net.low + net.span)[net.back], Z.amax(0))


@pytest.mark.parametrize('kind,steps,sampler,eps', [('linear', 1000, 'ancestral', .06), ('cosine', 1000, 'ancestral', .06), ('cosine', 100, 'ddim', .12), ('linear', 1000, 'ddim', .05)])
def test_the_walk_gives_back_a_known_gaussian(kind, steps, sampler, eps):
    bar, level, width, g = P.schedule(kind), .4, .7, torch_rng(0, 'walk')
    def best(x, t): a2 = bar[t].item(); return level + a2**.5*width**2/(a2*width**2 + 1 - a2)*(x - a2**.5*level)
    x = P.walk_back(best, torch.randn(2000, generator=g), bar, steps, sampler, stream=g)
    assert abs(x.mean() - level) < .05 and abs(x.std()/width - 1) < eps


def test_the_skip_is_the_best_guess_for_independent_genes():
    net = P.Denoiser(dict(image=3), [0, 1, 0, 1], SMALL, P.settings_of({})).eval(); w = torch.tensor([.1, .5, 1., 2.])
    with torch.no_grad(): net.unknown.copy_((w**2).log()/40)
    for m in net.outward.nets: torch.nn.init.zeros_(m[-1].weight); torch.nn.init.zeros_(m[-1].bias)
    x, a, s = torch.randn(1, 3, 4), torch.tensor(.6), torch.tensor(.8)
    said = P.guess(net, 'x0', x, torch.full((1, 3), .5), a, s, (torch.zeros(1, 1, 16), torch.ones(1, 1, dtype=torch.bool)))
    torch.testing.assert_close(said, x*a*w**2/(a**2*w**2 + s**2))


@pytest.mark.parametrize('text,error', [('', 'the file'), ('A,B\n', 'holds no symbols'), ('A,B\nG1,\n', "B holds no symbols")])
def test_bad_group_files(tmp_path, text, error):
    (tmp_path/'g.csv').write_text(text)
    with pytest.raises(ValueError, match=error): P.groups_of(tmp_path/'g.csv', ['G1'])


def test_groups_by_exact_symbol(tmp_path):
    (tmp_path/'g.csv').write_text('A,B\nAPC,TP53\nKIT,APC\n')
    assert {k: v.tolist() for k, v in P.groups_of(tmp_path/'g.csv', ['APC2', 'TP53', 'APC', 'APC']).items()} == dict(A=[2, 3], B=[1], rest=[0])      # a symbol of two genes brings both
    with pytest.raises(ValueError, match='case matters'): P.groups_of(tmp_path/'g.csv', ['apc', 'kit', 'TP53'])
    with pytest.raises(ValueError, match='KIT of group'): P.groups_of(tmp_path/'g.csv', ['APC', 'TP53'], strict=True)
    with pytest.raises(FileNotFoundError, match='group file'): make(groups=str(tmp_path/'none.gmt')).fit(*sides()[:2], 0)


def test_pooled_scores_pay_a_constant_and_by_gene_correlation_does_not():
    g = rng(0, 'pool'); X = np.exp(g.normal(size=(80, 60))*g.uniform(.2, 1.2, 60)); Z = (X - X.mean(0))/X.std(0); low, high = Z[:40].min(0), Z[:40].max(0)
    floor = P.pooled_scores(np.zeros((40, 60)), Z[40:], low, high)
    assert floor['spearman_pooled'] > .2 and floor['correlation'] == 0
    exact = P.pooled_scores(Z[40:], Z[40:], low, high); assert exact == pytest.approx(dict(spearman_pooled=1, nmae=0, correlation=1), abs=1e-6)


def test_outcomes_follow_known_factors_and_repeat():
    obs = draw_cases(400, 1); t = P.outcomes(obs, 3); pd.testing.assert_frame_equal(t, P.outcomes(obs, 3)); P.check_followup(t.months, t.event)
    assert P.c_index(t.months, t.event, t.risk) > .7 and t.groupby('grade').risk.mean().is_monotonic_increasing and .2 < t.event.mean() < .95
    assert (t.grade.value_counts(normalize=True) > .1).all() and len(t.grade.unique()) == 3
    stage, necrosis = (np.corrcoef(obs[k], t.risk)[0, 1] for k in ('stage', 'necrosis')); assert stage > .2 and necrosis > .2
    with pytest.raises(ValueError, match='factors of a simulated cohort'): P.outcomes(obs[['age']])


def test_a_column_the_wrong_way_round():
    months, event = np.array([2., 4., 9., 60., 60., 60.]), np.array([1, 1, 1, 0, 0, 0])      # three deaths, three alive at the end
    P.check_followup(months, event)
    with pytest.raises(ValueError, match='turned round'): P.check_followup(months, 1 - event)
    P.check_followup([5., 6.], [1, 1]); P.check_followup([3., 5., 7.], [0, 1, 0])
    with pytest.raises(ValueError, match='Nobody died'): P.time_bins(np.array([1., 2.]), np.array([0, 0]))


def test_hazard_likelihood_by_hand():
    logits = torch.randn(6, 4, generator=torch_rng(0, 'h')); h = logits.sigmoid(); bin, event = torch.tensor([0, 1, 2, 3, 0, 3]), torch.tensor([1, 0, 1, 0, 0, 1])
    each = [torch.stack([1 - h[i, j] for j in range(b)] + [h[i, b] if e else 1 - h[i, b]]).log().sum() for i, (b, e) in enumerate(zip(bin.tolist(), event.tolist(), strict=True))]
    torch.testing.assert_close(P.hazard_loss(logits, bin, event), -torch.stack(each).mean())


def test_scores_know_nothing_at_chance_and_all_at_best():
    g = rng(0, 'scores'); months, event = g.exponential(30, 300), (g.random(300) < .6).astype(int)
    assert abs(P.c_index(months, event, g.normal(size=300)) - .5) < .06 and P.c_index(months, event, -months) == 1
    assert abs(P.survival_brier(months, event, np.full(300, .5), 20.).mean() - .25) < .03
    assert P.survival_brier(months[event == 1], event[event == 1], months[event == 1] > 20, 20.).mean() == 0
    grade = g.integers(3, size=300); assert P.macro_auc(grade, np.eye(3)[grade]) == 1 and np.isnan(P.macro_auc(np.zeros(5, int), np.ones((5, 3))/3))


def test_the_bootstrap_draws_patients():
    group = np.array(['a', 'a', 'b', 'c', 'c', 'c'])
    for at in P.patient_draws(group, 20): assert all(np.isin(np.flatnonzero(group == group[i]), at).all() for i in at)


def test_conformal_limits():
    score = np.arange(1., 10.)          # nine patients
    assert P.conformal_limit(score, .1) == 9 and P.conformal_limit(score, .2) == 8 and np.isinf(P.conformal_limit(score, .05))
    for bad in (score[:1], ): pytest.raises(ValueError, P.conformal_limit, bad)
    with pytest.raises(ValueError, match='holds 1 patient'): P.conformal_intervals(np.zeros((3, 2)), np.ones((3, 2)), np.zeros((4, 2)), group=['p', 'p', 'p'])
    low, high = P.conformal_intervals(np.zeros((9, 2)), np.c_[score, 2*score], np.zeros((1, 2)), .1); assert high.tolist() == [[9, 18]] and low.tolist() == [[-9, -18]]


@cache
def porpoise(name): return P.read_porpoise(REAL/f'tcga_{name}_mutsig_all_clean.csv.zip')


@real
@pytest.mark.parametrize('name,patients,least', [('gbmlgg', 569, .7), ('kirc', 345, .55), ('brca', 956, None)])
def test_expression_to_survival_on_real_patients(name, patients, least):
    genes, truth = porpoise(name); assert genes.index.is_unique and len(genes) <= patients and np.isfinite(genes.to_numpy()).all()
    groups = P.groups_of(REAL/'signatures.csv', list(genes.columns)); codes = np.zeros(genes.shape[1], int)
    for i, at in enumerate(groups.values()): codes[at] = i
    assert sum(map(len, groups.values())) == genes.shape[1] and list(groups) == list(P.read_groups(REAL/'signatures.csv'))
    p, said = P.expression_to_survival(genes, truth, codes.tolist(), steps=40)
    c = P.c_index(p.months, p.event, said.risk); assert .4 < c < 1 and (least is None or c > least)     # BRCA: an interval that holds 0.5


def codes_of(genes): return P.list_codes(REAL/'signatures.csv', list(genes.columns))


@recorded
@pytest.mark.parametrize('name,defined,grades,n', [('gbmlgg', None, ['G2', 'G3'], 478), ('gbmlgg', dict(GBM='G4'), ['G2', 'G3', 'G4'], 568), ('kirc', None, ['G1', 'G2', 'G3', 'G4'], 338)])
def test_grades_of_real_patients(name, defined, grades, n):
    truth = P.with_records(porpoise(name)[1], COGNOMA, defined)
    assert truth.attrs['grades'] == grades and (truth.grade >= 0).sum() == n and set(truth.grade) == {-1, *range(len(grades))}
    assert {'White', 'Black Or African American', 'not recorded'} <= set(truth.race) and not truth.race.str.contains(r'\[').any()


@recorded
def test_breast_cancer_has_no_recorded_grade():
    with pytest.raises(ValueError, match='BRCA has none there'): P.with_records(porpoise('brca')[1], COGNOMA)


def test_records_that_differ_are_none(tmp_path):
    truth = pd.DataFrame(dict(months=[1., 2.], event=[1, 0], grade=-1), index=['a', 'b'])
    pd.DataFrame(dict(patient_id=['a', 'a', 'b', 'b', 'z'], acronym='LGG', race=['White', 'White', 'Asian', 'White', 'White'], histological_grade=['G2', 'G3', 'G2', 'G2', 'G4'])).to_csv(tmp_path/'t.tsv', sep='\t', index=False)
    out = P.with_records(truth, tmp_path/'t.tsv'); assert out.grade.tolist() == [-1, 0] and out.race.tolist() == ['White', 'not recorded'] and out.attrs['grades'] == ['G2']


@recorded
def test_expression_to_grade_on_real_patients():
    "One cohort in few steps; all of them: test_grade_tables."
    genes, truth = porpoise('kirc')[0], P.with_records(porpoise('kirc')[1], COGNOMA)
    said = P.told_by_others(genes, truth, codes_of(genes), folds=3, steps=25); table = P.fold_scores(said, 10); auc = table.grade_auc.str[:5].astype(float)
    assert auc['+ mean'] == .5 and auc['+ real'] > .58 and auc['+ real'] > auc['+ noise'] and (table.n == 338).all()
    assert (said.groupby('arm').patient.nunique() == len(genes)).all() and said.covered.isna().sum() == 3*(len(genes) - 338)


@recorded
@pytest.mark.slow
def test_grade_tables(capsys):
    "Grade and survival from expression, six groups and all genes in one, then error, coverage and C-index of subgroups; printed with -s."
    for name, defined in (('gbmlgg', None), ('gbmlgg', dict(GBM='G4')), ('kirc', None)):
        genes, truth = porpoise(name)[0], P.with_records(porpoise(name)[1], COGNOMA, defined)
        for title, codes in (('six groups', codes_of(genes)), ('all genes in one', [0]*genes.shape[1])):
            said = P.told_by_others(genes, truth, codes); table = P.fold_scores(said)
            with capsys.disabled(): print(f'\n{name}, {" ".join(truth.attrs["grades"])}, {title}\n{table.to_string()}')
            assert float(table.grade_auc['+ mean'][:5]) == .5 < float(table.grade_auc['+ real'].split('[')[1][:5])
        mine = said[(said.arm == '+ real') & (said.grade >= 0)]; t = truth.loc[mine.patient]; chance = mine.filter(regex=r'^grade\d').to_numpy()
        groups = P.by_subgroup(mine.assign(error=1 - chance[np.arange(len(mine)), mine.grade], sex=np.where(t.female == 1, 'female', 'male'), age=t.age.to_numpy(float), race=t.race.to_numpy()), ['sex', 'age', 'race'])
        with capsys.disabled(): print(groups.to_string())
        assert groups.loc['sex'].n.sum() == len(mine)


def pictured_patients(folder, encoder): return P.pictured_patients({k.upper(): porpoise(k) for k in ('gbmlgg', 'kirc', 'brca')}, REGIONS, folder, encoder)


@pictured
def test_sixteen_real_patients_have_images(tmp_path):
    cohort, truth = pictured_patients(tmp_path, load_image_encoder('efficientnet_lite0')); t = truth.loc[cohort.obs.index]
    assert len(cohort) == 16 and t.event.sum() == 3 and cohort.patches.counts.min() > 0 and len(P.comparable(t.months.to_numpy(), t.event.to_numpy())) == 32
    table = P.left_out_pairs(make, cohort, truth, codes_of(pd.DataFrame(columns=cohort.var.symbol)), P.comparable(t.months.to_numpy(), t.event.to_numpy())[:2], steps=3)
    assert list(table.columns) == ['i', 'j', *P.ARMS] and table[list(P.ARMS)].isin([0, .5, 1]).all(axis=None)
    scores = P.pair_scores(table); assert (scores.deaths == 1).all() and (scores.pairs == 2).all()


@pictured
@pytest.mark.slow
def test_image_arms_of_sixteen_real_patients(tmp_path, capsys):
    "All 32 comparable pairs of 16 patients, three of whom died; printed with -s. Intervals, not winners."
    cohort, truth = pictured_patients(tmp_path, load_image_encoder('efficientnet_lite0'))
    codes = codes_of(pd.DataFrame(columns=cohort.var.symbol)); budget = Budget(steps=60, batch=11, patches=8, dim=32, lr=3e-3, score_every=20, score_samples=4)
    table = P.left_out_pairs(lambda: make(budget=budget), cohort, truth, codes, steps=60)
    within = table[[cohort.obs.project.iloc[i] == cohort.obs.project.iloc[j] for i, j in table[['i', 'j']].to_numpy()]]
    with capsys.disabled(): print(f'\nall pairs\n{P.pair_scores(table).to_string()}\npairs of one cohort\n{P.pair_scores(within).to_string()}')
    width = P.pair_scores(table).c_index.str.extract(r'\[(.*), (.*)\]').astype(float).diff(axis=1)[1]; assert (width > .15).all() and len(table) == 32 and len(within) == 11


@recorded
@pytest.mark.parametrize('name', ['gbmlgg', 'kirc', 'brca'])
def test_turned_censoring_of_real_patients_is_seen(name):
    """Nothing in times and events alone gives it away; the other record of deaths does."""
    truth = porpoise(name)[1]
    with pytest.raises(ValueError, match='turned round'): P.with_records(truth.assign(event=1 - truth.event), COGNOMA)


def test_ages_are_cut_into_bands_and_gaps_have_one_of_their_own():
    r = np.random.default_rng(0)
    table = pd.DataFrame(dict(patient=[f'P{i}' for i in range(60)], months=r.uniform(1, 60, 60), event=r.integers(0, 2, 60), risk=r.normal(size=60), error=1., covered=True,
                              age=r.integers(40, 80, 60).astype(float), years=r.integers(40, 80, 60)))
    table.loc[:4, 'age'] = np.nan
    found = P.by_subgroup(table, ['age', 'years'], n=20)
    assert len(found.loc['age']) == 4 and found.loc[('age', 'not recorded'), 'n'] == 5 and len(found.loc['years']) == 3


def test_a_conformal_limit_counts_patients():
    score = np.repeat(np.arange(5.), 10)
    assert np.isinf(P.conformal_limit(score, .1, np.repeat(list('abcde'), 10))) and P.conformal_limit(score, .1) == 4


def test_a_row_uses_the_groups_of_a_file_and_its_weights_live_without_it(tmp_path):
    train, val, test = sides(); (tmp_path/'g.csv').write_text('A,B\nG1,G2\nG3,G99\n'); m = make(groups=str(tmp_path/'g.csv')); m.fit(train, val, 0)
    assert [m.sizes['groups'][i] for i in (1, 3, 2, 0)] == [0, 0, 1, 2] and P.group_report(tmp_path/'g.csv', train.var.symbol.tolist()).loc['B', ['listed', 'found', 'such_as']].tolist() == [2, 1, 'G99']
    before = m.sample(test, 2, 0); m.save(tmp_path/'fit'); (tmp_path/'g.csv').unlink()
    assert torch.equal(P.PathGen.load(tmp_path/'fit', device='cpu').sample(test, 2, 0), before)
    with pytest.raises(FileNotFoundError, match='There is no group file'): make(groups=str(tmp_path/'g.csv')).fit(train, val, 0)
    (tmp_path/'g.csv').write_text('A,B\nG1,G2\nG3,X\n,\n'.replace('G2', 'Y'))
    with pytest.raises(ValueError, match="of group 'B' is not in the cohort"): make(groups=str(tmp_path/'g.csv')).fit(train, val, 0)
