"""Every row of the tables on a tiny cohort: the protocol, the leak guard, and what each row claims of itself."""
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from gemmgan_nb import baselines as B
from gemmgan_nb.ablations import TABLE2, VARIANTS
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.experiment import realism
from gemmgan_nb.training import AS_CODED, WGAN, Budget, ModelSpec, label_codes, load_network, ready, train_network
from gemmgan_nb.workspace import read_json, rng

SMALL = Budget(steps=4, batch=16, patches=3, dim=16, hidden=16, latent=4, n_critic=1, score_every=2, score_samples=4)
FUSION = dict(heads=2, layers=1, ff=16)
BOTH, LABELS = ('image', 'text'), ('labels',)


@cache
def toy(n=80, genes=12, seed=0, tokens=True, patches=True):
    """Three types, two sites; patches follow one hidden number, tokens tell the type; the truth is written beside it."""
    folder, r = Path(mkdtemp()), rng(seed, 'toy')
    kind, site, hidden = r.integers(3, size=n), r.integers(2, size=n), r.normal(size=n)
    mean = r.normal(size=(3, genes))[kind] + hidden[:, None]*r.normal(size=genes) + 5
    X, names = mean + .5*r.normal(size=(n, genes)), [f'c{i}' for i in range(n)]
    X[:, -1] = 1.       # a constant gene
    obs = pd.DataFrame(dict(group=names, project='TOY', disease_type=np.array(list('AGM'))[kind], primary_site=np.array(list('BL'))[site], slide=names,
                            split=np.repeat(['train', 'val', 'test'], [n//2, n//4, n - n//2 - n//4])), index=names)
    var = pd.DataFrame(dict(symbol=[f'G{j}' for j in range(genes)]), index=[f'ENSG{j}' for j in range(genes)])
    write_cohort(folder, X, obs, var, 'log2(tpm+1)', ['image', 'text', 'labels'], pd.DataFrame(dict(slide=names, path='none', mpp=.5)), uns=dict(truth='truth.h5ad'))
    ad.AnnData(np.float32(X), obs[['project']], var, layers=dict(mean=np.float32(mean), variance=np.full(X.shape, .25, np.float32))).write_h5ad(folder/'truth.h5ad')
    bags = {c: [(c, None)] for c in names}
    if patches: pack(folder/'patches.safetensors', {c: (hidden[i] + r.normal(size=(5, 3))) for i, c in enumerate(names)}, bags)
    if tokens: pack(folder/'tokens.safetensors', {c: np.eye(3)[kind[i]] + .3*r.normal(size=(4, 3)) for i, c in enumerate(names)}, bags)
    return Cohort.load(folder)


def sides(cohort): return [cohort.split(s) for s in ('train', 'val', 'test')]


def make(kind, uses=(), switches=None, **budget): return kind(ModelSpec(kind.__name__, kind.__name__, uses), replace(SMALL, **budget), switches)


ROWS = {'noise': (B.Noise,), 'train mean': (B.TrainMean,), 'class mean': (B.ClassMean,), 'class gaussian': (B.ClassGaussian,), 'knn': (B.KNN, BOTH), 'ridge': (B.Ridge, BOTH),
        'real': (B.Real,), 'oracle': (B.Oracle,), 'attention': (B.AttentionMIL, BOTH), 'attention, image': (B.AttentionMIL, ('image',)), 'attention, text': (B.AttentionMIL, ('text',)),
        'cvae': (B.CVAE, LABELS), 'cvae as coded': (B.CVAE, LABELS, dict(as_coded=True)), 'vanilla': (WGAN,), 'cond. wgan': (WGAN, LABELS), 'all three': (WGAN, BOTH + LABELS, FUSION)}
POINT = ('train mean', 'class mean')
every_row = pytest.mark.parametrize('name', ROWS)


def keeps_the_protocol(new, folder, point=False):
    """Fit, draw, save and load; `new()` makes the row, `point` says that it draws the same profile each time."""
    train, val, test = sides(toy())
    model, twin = new(), new()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    model.fit(train, val, seed=3); twin.fit(train, val, seed=3)
    drawn = model.sample(test, 3, seed=5)
    assert drawn.shape == (3, len(test), 12) and drawn.dtype == torch.float32 and drawn.isfinite().all()
    assert torch.equal(drawn, model.sample(test, 3, seed=5)) and torch.equal(drawn, twin.sample(test, 3, seed=5))
    assert (torch.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(drawn[0], drawn[1]) == point == torch.equal(drawn, model.sample(test, 3, seed=6))
    model.save(folder)
    assert torch.equal(type(model).load(folder).sample(test, 3, seed=5), drawn)
    assert set(read_json(folder/'config.json')['about']['cases']) == set(train.obs.index)


@every_row
def test_protocol(name, tmp_path): keeps_the_protocol(lambda: make(*ROWS[name]), tmp_path, name in POINT)


@every_row
def test_other_than_training_cases_are_refused(name):
    train, val, _ = sides(toy())
    with pytest.raises(LeakError): make(*ROWS[name]).fit(toy().split('train', 'test'), val, 0)


@pytest.mark.parametrize('name', ['real', 'noise', 'class gaussian'])
def test_a_checkpoint_of_another_kind_is_refused(name, tmp_path):
    train, val, _ = sides(toy())
    model = make(*ROWS[name]); model.fit(train, val, 0); model.save(tmp_path)
    with pytest.raises(ValueError, match='holds a'): B.TrainMean.load(tmp_path)


def test_real_profiles_are_of_different_patients():
    "A sample with doubles would look less like real patients than real patients do."
    train, val, test = sides(toy())
    m = make(*ROWS['real']); m.fit(train, val, 0)
    for one in m.sample(test, 3, 0): assert len(one.unique(dim=0)) == len(test)


def test_a_generator_that_is_right_cannot_be_told_from_real():
    "Patients who are noise, and noise drawn for them: were it the same noise for training and test cases, a detector would know it again."
    like = toy(400, 200)
    cohort, r = Cohort.of(np.float32(rng(0, 'patients').normal(size=(400, 200))), like.obs, like.var), make(*ROWS['noise'])
    r.fit(cohort.split('train'), cohort.split('val'), 0)
    found = realism(r, cohort, 0)
    for probe in ('lr', 'mlp'): assert found[f'{probe}_auc_low'] < .5 < found[f'{probe}_auc_high'] and .4 < found[f'{probe}_auc'] < .6, found


def test_the_constant_gene_stays_constant():
    train, val, test = sides(toy())
    for name in ('noise', 'class gaussian', 'knn', 'real', 'oracle'):
        m = make(*ROWS[name]); m.fit(train, val, 0)
        assert m.sample(test, 4, 0)[..., -1].abs().max() == 0, name


def test_class_mean_by_hand_and_its_fallbacks():
    train, val, test = sides(toy())
    m = make(B.ClassMean); m.fit(train, val, 0)
    Z, case = m.scaler.transform(train.X), test[:1]
    def expect(mask): np.testing.assert_allclose(m.sample(case, 1, 0)[0, 0], Z[mask].mean(0), atol=1e-5)
    same_type = (train.obs.disease_type == case.obs.disease_type.iloc[0]).to_numpy()
    expect(same_type & (train.obs.primary_site == case.obs.primary_site.iloc[0]).to_numpy())
    case.obs = case.obs.assign(primary_site='elsewhere'); expect(same_type)
    case.obs = case.obs.assign(disease_type='other'); expect(np.ones(len(Z), bool))


def test_class_gaussian_recovers_means_and_covariances():
    r, n, genes = rng(1, 'gauss'), 3000, 5
    roots, means, kind = r.normal(size=(2, genes, genes)), 2*r.normal(size=(2, genes)), np.repeat([0, 1], n//2)
    X, names = means[kind] + np.einsum('ng,ngh->nh', r.normal(size=(n, genes)), roots[kind]), [f'c{i}' for i in range(n)]
    obs = pd.DataFrame(dict(group=names, project='T', disease_type=np.array(['A', 'B'])[kind], primary_site='x', slide=names, split='train'), index=names)
    obs.loc[names[-1], 'split'] = 'val'
    write_cohort(folder := Path(mkdtemp()), X, obs, pd.DataFrame(dict(symbol=list('abcde')), index=list('abcde')), 'zscore', ['labels'], pd.DataFrame(dict(slide=names, path='-', mpp=.5)))
    cohort = Cohort.load(folder)
    m = make(B.ClassGaussian); m.fit(cohort.split('train'), cohort.split('val'), 0)
    for k, name in enumerate('AB'):
        drawn = m.scaler.inverse(m.sample(cohort[(cohort.obs.disease_type == name).to_numpy()][:1], 20_000, 0)[:, 0].numpy())
        np.testing.assert_allclose(drawn.mean(0), means[k], atol=.25)
        np.testing.assert_allclose(np.cov(drawn.T), roots[k].T @ roots[k], atol=.12*np.abs(roots[k].T @ roots[k]).max())


def test_a_small_class_borrows_and_an_unknown_one_gets_the_pooled_gaussian():
    train, val, test = sides(toy())
    m = make(B.ClassGaussian); m.fit(train, val, 0)
    stranger = test[:1]; stranger.obs = stranger.obs.assign(disease_type='other')
    drawn = m.sample(stranger, 4000, 0)[:, 0]
    assert drawn.mean(0).abs().max() < .1 and abs(drawn[:, :-1].std(0).mean() - 1) < .05
    assert all(B.members(m.arrays['codes'], k).sum() >= 8 for k in m.arrays['keys'])


def test_shrinkage_is_ledoit_and_wolfs_and_many_genes_cost_no_square_matrix():
    from sklearn.covariance import ledoit_wolf
    r = rng(0, 'lw')
    for n, p in ((12, 40), (60, 20)):
        x = r.normal(size=(n, p)) @ r.normal(size=(p, p)); x -= x.mean(0)
        assert abs(B.shrinkage(x) - ledoit_wolf(x, assume_centered=True)[1]) < 1e-8
    assert B.shrinkage(r.normal(size=(20, 50_000))) > .9      # 20 GB if squared


def test_knn_draws_real_profiles_of_others():
    train, val, test = sides(toy())
    m = make(B.KNN, BOTH); m.fit(train, val, 0)
    Z, k = m.arrays['Z'], int(m.arrays['k'][0])
    d = torch.cdist(torch.from_numpy(B.features_of(m, test)), torch.from_numpy(m.arrays['F']))
    for i, drawn in enumerate(m.sample(test, 8, 0).unbind(1)):
        allowed = Z[d[i].topk(k, largest=False).indices]
        assert all((np.abs(allowed - z.numpy()).max(1) < 1e-6).any() for z in drawn)
    own = m.sample(train, 20, 0)
    assert not (own == torch.from_numpy(Z)).all(-1).any()


def test_ridge_and_knn_refuse_cases_without_their_features():
    train, val, _ = sides(toy())
    lone = toy(tokens=False).split('test')
    for kind in (B.KNN, B.Ridge):
        m = make(kind, BOTH); m.fit(train, val, 0)
        with pytest.raises(ValueError, match='features'): m.sample(lone, 1, 0)


def test_attention_keeps_a_fifth_for_its_errors_and_knows_everybody_it_saw():
    train, val, test = sides(toy())
    m = make(B.AttentionMIL, BOTH, steps=60, lr=3e-3); m.fit(train, val, 0)
    errors = m.parts['g'].residual
    assert errors.shape == (len(train)//5, 12) and errors.abs().max() > 0
    drawn, real = m.sample(test, 200, 0), torch.from_numpy(m.scaler.transform(test.X))
    ratio = drawn.var(0)[:, :-1].mean()/(drawn.mean(0) - real)[:, :-1].square().mean()
    assert .4 < ratio < 2.5, ratio


@pytest.fixture(scope='module')
def vaes():
    train, val, _ = sides(toy(240))
    found = {}
    for coded in (False, True):
        m = make(B.CVAE, LABELS, dict(as_coded=coded), steps=150, batch=64, dim=64, hidden=64, latent=32, lr=2e-3, score_every=150, ema=.9); m.fit(train, val, 0)
        floor = make(B.ClassMean); floor.fit(train, val, 0)
        Z = m.scaler.transform(train.X)
        with torch.no_grad(): deviation = (m.parts['g'].encode(torch.from_numpy(Z), torch.from_numpy(label_codes(train, m.labels)))[1]/2).exp().mean(0)
        within = (Z - floor.sample(train, 1, 0)[0].numpy()).std(0)[:-1].mean()
        found[coded] = deviation, m.sample(train, 64, 0).std(0)[:, :-1].mean().item()/within
    return found


def test_correct_cvae_rests_unused_latents_at_one_and_spreads_as_the_data(vaes):
    deviation, spread = vaes[False]
    assert deviation.max() > .9 and deviation.median() > .8 and .7 < spread < 1.3, (deviation, spread)


def test_cvae_as_coded_collapses(vaes):
    deviation, spread = vaes[True]
    assert deviation.max() < .4 and spread < .4, (deviation, spread)


def test_divergence_is_the_normal_one_and_the_slip_is_the_slip():
    mean, v = torch.randn(6, 4), torch.randn(6, 4)
    normal = torch.distributions.Normal
    torch.testing.assert_close(B.divergence(mean, v), torch.distributions.kl_divergence(normal(mean, (v/2).exp()), normal(0., 1.)).sum(1))
    torch.testing.assert_close(B.divergence(mean, v, as_coded=True), B.divergence(mean, v.exp()))


def test_an_unseen_label_is_an_error_that_names_it(tmp_path):
    train, val, test = sides(toy())
    m = make(WGAN, LABELS); m.fit(train, val, 0); m.save(tmp_path)
    again = load_network(WGAN, tmp_path)
    assert again.labels == dict(disease_type=['A', 'G', 'M'], primary_site=['B', 'L'])
    stranger = test[:2]; stranger.obs = stranger.obs.assign(disease_type='Lipomas')
    with pytest.raises(ValueError, match="'Lipomas', which no training case has"): again.sample(stranger, 1, 0)
    val.obs = val.obs.assign(disease_type=['Lipomas'] + list(val.obs.disease_type[1:]))
    make(WGAN, LABELS).fit(train, val, 0)      # a validation case of an unknown class does not select


def test_labels_change_the_draws_of_a_label_conditioned_row_only():
    train, val, test = sides(toy())
    other = test[:]; other.obs = other.obs.assign(disease_type='A', primary_site='B')
    for uses, changes in ((LABELS, True), ((), False)):
        m = make(WGAN, uses); m.fit(train, val, 0)
        assert torch.equal(m.sample(test, 1, 0), m.sample(other, 1, 0)) != changes


def test_a_score_that_is_no_number_says_so():
    train, val, _ = sides(toy())
    m = make(WGAN); ready(m, train, 0)
    with pytest.raises(FloatingPointError, match='Lower training.lr'): train_network(m, train, val, 0, m.budget, None, lambda m, v: float('nan'))


def test_oracle_has_the_true_moments_and_needs_a_truth():
    train, val, test = sides(toy())
    m = make(B.Oracle); m.fit(train, val, 0)
    drawn, truth = m.sample(test, 4000, 0).numpy(), ad.read_h5ad(test.folder/'truth.h5ad')[list(test.obs.index)]
    np.testing.assert_allclose(m.scaler.inverse(drawn.mean(0))[:, :-1], truth.layers['mean'][:, :-1], atol=.06)
    np.testing.assert_allclose((drawn.std(0)*m.scaler.std)[:, :-1], .5, atol=.04)
    blind = sides(toy(seed=1))
    for c in blind: c.uns = {k: v for k, v in c.uns.items() if k != 'truth'}
    with pytest.raises(ValueError, match='simulated cohorts only'): make(B.Oracle).fit(*blind[:2], 0)


def test_halves_share_no_patient_and_leave_nobody_out():
    cohort = toy()
    a, b = B.halves(cohort.split('test'), 0)
    assert not set(a.obs.group) & set(b.obs.group) and len(a) + len(b) == len(cohort.split('test'))
    cut = B.real_halves(cohort, 0)
    assert set(cut) == {'real_train', 'fake_train', 'real_test', 'fake_test'} and cut['real_test'].shape[1] == 12


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_reads_what_it_says_and_nothing_else(name, tmp_path):
    train, val, test = sides(toy())
    title, uses, switches, changes = VARIANTS[name]
    m = WGAN(ModelSpec(name, title, uses), replace(SMALL, **changes), FUSION | switches); m.fit(train, val, 0)
    drawn = m.sample(test, 2, 0)
    assert [not torch.equal(drawn, m.sample(test.shuffled(s, 0), 2, 0)) for s in BOTH] == [s in uses for s in BOTH]
    m.save(tmp_path); assert torch.equal(WGAN.load(tmp_path).sample(test, 2, 0), drawn)


def test_table_2_has_the_papers_rows():
    assert [VARIANTS[k][0] for k in TABLE2] == ['Mean image', 'Text CLS', 'Patch transformer', 'FiLM', 'Cross attention', 'GeMM-GAN']


def test_as_coded_is_configuration():
    train, val, _ = sides(toy())
    m = make(WGAN, BOTH, FUSION | AS_CODED['switches'], **AS_CODED['budget'] | dict(steps=10)); m.fit(train, val, 0)
    f, opt = m.g.fusion, m.parts['opt_g']
    assert f.film.affine.in_features == 3 and f.film.affine.out_features == 2*3 and f.cross.sequential and isinstance(opt, torch.optim.RMSprop)
    assert opt.param_groups[0]['lr'] == 5e-4/2**4 and m.g.head.net[1].negative_slope == 0 and all((s[0] == 0).all() and (s[1] == 1).all() for s in m.scales.values())


def test_fewer_tokens_means_that_the_others_do_not_matter():
    train, val, test = sides(toy())
    few = make(WGAN, ('text',), FUSION, tokens=1); few.fit(train, val, 0)
    from gemmgan_nb.training import Feed
    for tokens, rows in ((1, 1), (3, 3), (9, 4), (0, 4)):
        assert Feed(test, uses=('text',), tokens=tokens)(torch.arange(5), None).tokens.shape[1] == rows


def test_one_model_serves_whoever_comes():
    train, val, test = sides(toy())
    m = make(WGAN, BOTH, FUSION, modality_dropout=.4); m.fit(train, val, 0)
    views = [test, test.zeroed('image'), test.zeroed('text'), test.zeroed('image').zeroed('text')]
    drawn = [m.sample(v, 2, 0) for v in views]
    assert all(d.isfinite().all() for d in drawn) and not any(torch.equal(drawn[0], d) for d in drawn[1:])
    torch.testing.assert_close(m.sample(toy(tokens=False).split('test'), 2, 0), drawn[2])      # a file that is not there equals empty bags
    assert m.sample(toy(patches=False).split('test'), 2, 0).isfinite().all() and m.sample(toy(patches=False, tokens=False).split('test'), 2, 0).isfinite().all()
    plain = make(WGAN, BOTH, FUSION); plain.fit(train, val, 0)
    with pytest.raises(ValueError, match='have no text'): plain.sample(toy(tokens=False).split('test'), 1, 0)
