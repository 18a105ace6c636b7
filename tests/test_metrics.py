"""The metrics against independent oracles: prdc, NumPy's correlation matrices, scikit-learn on the plain problem, pairs counted one by one."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gemmgan_nb.condition import condition_scores, condition_test, crps, gene_correlation, spread_ratio
from gemmgan_nb.metrics import (PROBES, augmentation_curve, coded_probe, correlation_mse, detectability, detectability_as_coded, detection_scores,
                                distances, in_span, panel, precision_recall, standardised, utility, utility_views, varying)
from gemmgan_nb.workspace import rng, torch_rng


def correlated(seed, n, genes=150, rank=12):
    "Profiles of `rank` shared factors and some noise."
    factors = rng(0, 'factors').normal(size=(rank, genes))
    return rng(seed, 'cases').normal(size=(n, rank)) @ factors + rng(seed, 'noise').normal(size=(n, genes))


@pytest.mark.parametrize('n, m, k', [(80, 80, 10), (120, 60, 5), (30, 90, 3)])
def test_precision_recall_equals_prdc(n, m, k):
    from prdc import compute_prdc
    real, fake = correlated(1, n), .9*correlated(2, m) + .2
    ours, theirs = precision_recall(real, fake, k), compute_prdc(real, fake, k)
    for name in ('precision', 'recall', 'density', 'coverage'): assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name


@pytest.mark.parametrize('n, m, k, genes', [(80, 80, 10, 150), (50, 90, 3, 700)])
def test_manhattan_equals_prdc_on_absolute_differences(monkeypatch, n, m, k, genes):
    "The authors' variant: prdc with its distance exchanged, pair by pair in float64."
    from prdc import prdc
    from scipy.spatial.distance import cdist
    monkeypatch.setattr(prdc, 'compute_pairwise_distance', lambda x, y=None: cdist(x, x if y is None else y, 'cityblock'))
    real, fake = correlated(1, n, genes), .9*correlated(2, m, genes) + .2
    ours, theirs = precision_recall(real, fake, k, norm='manhattan'), prdc.compute_prdc(real, fake, k)
    for name in ('precision', 'recall', 'density', 'coverage'): assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert np.abs(distances(real, fake, 'manhattan').numpy()/cdist(real, fake, 'cityblock') - 1).max() < 1e-6


def test_more_neighbours_than_profiles():
    real, fake = correlated(1, 6), correlated(2, 9)
    found = precision_recall(real, fake, k=50)
    assert found['k'] == 5 and found == precision_recall(real, fake, k=5)
    with pytest.raises(ValueError, match='k=0'): precision_recall(real, fake, k=0)
    with pytest.raises(ValueError, match='too few'): precision_recall(real[:1], fake)


def test_duplicates_count_as_in_prdc():
    "Radii of 0 hold nothing, since the comparison is strict."
    from prdc import compute_prdc
    real = np.repeat(correlated(1, 20), 3, 0)
    ours, theirs = precision_recall(real, real, 2), compute_prdc(real, real, 2)
    assert theirs['precision'] <= 1 and ours['precision'] == pytest.approx(0)


def test_far_from_the_origin():
    "A common offset must not cost digits."
    real, fake = correlated(1, 60), correlated(2, 60)
    assert precision_recall(real + 1e4, fake + 1e4) == precision_recall(real, fake)


def test_correlation_mse_equals_brute_force():
    real, fake = correlated(1, 50), correlated(2, 70)
    brute = ((np.corrcoef(real.T) - np.corrcoef(fake.T))**2).mean()
    assert abs(correlation_mse(real, fake) - brute) < 1e-10
    assert abs(correlation_mse(torch.from_numpy(real).float().numpy(), fake.astype(np.float32)) - brute) < 1e-6


@pytest.mark.parametrize('genes', [1023, 1024, 1025, 2500])
def test_correlation_mse_adds_up_over_blocks(genes):
    real, fake = correlated(1, 40, genes).astype(np.float32), correlated(2, 30, genes).astype(np.float32)
    fake[:, genes - 1], real[:, 5] = 3, 0
    with np.errstate(all='ignore'): gap = np.corrcoef(real.T.astype(float)) - np.corrcoef(fake.T.astype(float))
    brute = np.square(np.delete(np.delete(gap, [5, genes - 1], 0), [5, genes - 1], 1)).mean()
    assert abs(correlation_mse(real, fake)/brute - 1) < 1e-6


def test_near_copies_keep_their_digits():
    "A small difference of large sums: strongly correlated genes, sets that differ by a thousandth."
    real = correlated(1, 50, rank=2); fake = real + .001*correlated(5, 50)
    brute = ((np.corrcoef(real.T) - np.corrcoef(fake.T))**2).mean()
    assert brute < 1e-5 and abs(correlation_mse(real, fake)/brute - 1) < 1e-6


def test_constant_genes_are_masked():
    real, fake = correlated(1, 40), correlated(2, 40)
    real[:, 3], fake[:, 9], real[:, 11] = 0, 5., 1e6
    assert (~varying(real, fake)).nonzero()[0].tolist() == [3, 9, 11]
    assert correlation_mse(real, fake) == pytest.approx(correlation_mse(*(np.delete(x, [3, 9, 11], 1) for x in (real, fake))), abs=1e-12)


@pytest.mark.parametrize('genes', [40, 400])
def test_detectability_equals_plain_scikit_learn(genes):
    parts = [correlated(s, 60, genes) + .15*(s in (2, 4)) for s in (1, 2, 3, 4)]
    real, fake, real_test, fake_test = parts
    train, test = standardised(np.r_[real, fake], np.r_[real_test, fake_test])
    plain = LogisticRegression(max_iter=20000, tol=1e-8).fit(train, np.repeat([0, 1], 60))
    small, small_test = in_span(train, test)
    ours = LogisticRegression(max_iter=20000, tol=1e-8).fit(small, np.repeat([0, 1], 60)).decision_function(small_test)
    assert np.abs(ours - plain.decision_function(test)).max() < 1e-2*np.abs(ours).max()
    found = detectability(real, fake, real_test, fake_test)
    assert abs(found['accuracy'] - plain.score(test, np.repeat([0, 1], 60))) <= 1/60


def test_detection_scores_equal_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
    a, b = rng(0, 'a').normal(size=40).round(1) - .4, rng(0, 'b').normal(size=55).round(1) + .4     # rounded: with ties
    truth, score = np.repeat([0, 1], [40, 55]), np.r_[a, b]
    found = detection_scores(a, b)
    assert found['accuracy'] == pytest.approx(accuracy_score(truth, score > 0)) and found['f1'] == pytest.approx(f1_score(truth, score > 0))
    assert found['auc'] == pytest.approx(roc_auc_score(truth, score))
    assert found == detection_scores(a, b) and found['auc_low'] != detection_scores(a, b, seed=1)['auc_low']


def test_bootstrap_intervals_equal_resampling_by_hand():
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
    a, b, r = rng(0, 'a').normal(size=50) - .4, rng(0, 'b').normal(size=50) + .4, rng(0, 'hand')
    truth, byhand = np.repeat([0, 1], 50), []
    for _ in range(400):
        i = r.integers(0, 50, 50); score = np.r_[a[i], b[i]]
        byhand.append([accuracy_score(truth, score > 0), f1_score(truth, score > 0), roc_auc_score(truth, score)])
    found = detection_scores(a, b, draws=2000)
    for k, values in zip(('accuracy', 'f1', 'auc'), np.transpose(byhand), strict=True):
        assert [found[f'{k}_low'], found[f'{k}_high']] == pytest.approx(np.quantile(values, [.025, .975]), abs=.025)


def test_the_coded_probe_is_two_outputs_and_two_softmaxes():
    "The network written out as the authors describe it, from the same start and the same batches."
    x, is_fake, test = correlated(1, 300, 40).astype(np.float32), np.repeat([0, 1], 150), correlated(2, 20, 40).astype(np.float32)
    x[150:] += .3
    stream, X, y = torch_rng(7, 'as coded'), torch.from_numpy(x), torch.from_numpy(is_fake)
    W, b = ((2*torch.rand(2, n, generator=stream) - 1)/40**.5 for n in (40, 1))
    layer = torch.nn.Linear(40, 2); layer.weight.data, layer.bias.data = W, b[:, 0]
    net, loss = torch.nn.Sequential(layer, torch.nn.Softmax(1)), torch.nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(30):
        for i in torch.randperm(300, generator=stream).split(256): opt.zero_grad(); loss(net(X[i]), y[i]).backward(); opt.step()
    plain = layer(torch.from_numpy(test)).detach().diff(dim=1)[:, 0].numpy()
    assert np.abs(coded_probe(x, is_fake, test, seed=7, epochs=30) - plain).max() < 1e-4


def test_the_coded_probe_is_blind_where_converged_ones_see():
    move = .3*rng(0, 'move').normal(size=600)
    parts = [rng(s, 'x').normal(size=(150, 600)) + move*(s in (1, 3)) for s in range(4)]
    coded, lr, mlp = detectability_as_coded(*parts), detectability(*parts), detectability(*parts, probe='mlp')
    assert lr['accuracy'] > .97 and mlp['accuracy'] > .9 and coded['accuracy'] < .87
    assert coded['accuracy_high'] < lr['accuracy_low']


def test_identical_distributions_score_at_the_ceiling():
    a, b, c, d = (correlated(s, 150) for s in range(4))
    assert precision_recall(a, b)['precision'] > .9 and precision_recall(a, b)['recall'] > .9
    for probe in PROBES: assert abs(detectability(a, b, c, d, probe=probe)['auc'] - .5) < .12
    assert abs(detectability_as_coded(a, b, c, d)['auc'] - .5) < .12


def test_utility_ceiling_and_floor():
    kinds = np.arange(90) % 3
    centres = 2*rng(0, 'centres').normal(size=(3, 50))
    draw = lambda s: centres[kinds] + rng(s, 'x').normal(size=(90, 50))
    good, mixed = utility(draw(0), kinds, draw(1), kinds), utility(draw(0), rng(0, 'p').permutation(kinds), draw(1), kinds)
    assert min(good.values()) > .95 and max(mixed.values()) < .6
    assert good == utility(draw(0), kinds, draw(1), kinds)
    named = utility(draw(0), np.array(list('abc'))[kinds], draw(1), np.array(list('abc'))[kinds])
    assert named['rf_accuracy'] == good['rf_accuracy']
    assert utility(draw(0), kinds, draw(1), kinds, views=utility_views(draw(0), draw(1))) == good


def test_utility_scores_rare_types_as_scikit_learn_does():
    "A type that is never guessed: weighted F1 hardly notices, macro F1 does."
    from sklearn.metrics import f1_score
    kinds = np.repeat([0, 1, 2], [40, 40, 3])
    x = 3*kinds[:, None].clip(0, 1) + rng(0, 'x').normal(size=(83, 5))
    found = utility(x[:80], kinds[:80], x, kinds)
    assert found['rf_accuracy'] == pytest.approx(80/83) and found['rf_f1'] > found['rf_macro_f1'] + .2
    assert found['rf_f1'] == pytest.approx(f1_score(kinds, kinds.clip(0, 1), average='weighted'))
    with pytest.raises(ValueError, match='at least two labels'): utility(x, kinds*0, x, kinds)


def test_augmentation_curve_ends():
    "At all real cases without generated ones it is the ceiling; every size has both halves."
    kinds = np.arange(60) % 2
    draw = lambda s: kinds[:, None] + rng(s, 'x').normal(size=(60, 8))
    curve = augmentation_curve(draw(0), kinds, draw(1), kinds, draw(2), kinds, sizes=(20, 500))
    assert sorted(curve['size'].unique()) == [20, 60] and (curve.groupby(['size', 'with_generated']).size() == 6).all()
    order = rng(0, 'augmentation').permutation(60)
    ceiling = utility(draw(0)[order], kinds[order], draw(2), kinds)
    last = curve[(curve['size'] == 60) & ~curve.with_generated]
    assert {f'{c}_{m}': v for c, m, v in zip(last.classifier, last.metric, last.value, strict=True)} == ceiling


def small_panel(seed=0, as_coded=True, move=0.):
    kinds = dict(train=np.arange(60) % 2, test=np.arange(40) % 2)
    draw = lambda s, part: kinds[part][:, None]*2. + correlated(s, len(kinds[part]), 90) + move*(s > 2)
    real, fake = dict(train=draw(1, 'train'), test=draw(2, 'test')), dict(train=draw(3, 'train'), test=draw(4, 'test'))
    return real, fake, panel(real, fake, dict(disease_type=kinds, primary_site={k: v*0 for k, v in kinds.items()}), seed, as_coded)


def test_panel_is_its_parts_and_repeats():
    real, fake, found = small_panel()
    assert found == small_panel()[2]
    parts = real['train'], fake['train'], real['test'], fake['test']
    for name, scores in dict(lr=detectability(*parts), mlp=detectability(*parts, probe='mlp')).items():
        assert {k: found[f'{name}_{k}'] for k in scores} == scores
    assert found['precision_l1'] == precision_recall(real['test'], fake['test'], norm='manhattan')['precision']
    assert found['c_mse'] == correlation_mse(real['test'], fake['test']) and found['c_mse_genes'] == 90
    assert found['as_coded_lr_f1'] == detectability_as_coded(*parts)['f1']
    kinds = [f'{c}_{m}' for c in ('rf', 'mlp') for m in ('accuracy', 'f1', 'macro_f1')]
    assert [k for k in found if k.startswith(('disease', 'primary'))] == [f'disease_type_{k}' for k in kinds]      # one site: left out
    assert all(isinstance(v, (int, float)) and np.isfinite(v) for v in found.values())


def test_panel_without_labels_and_without_the_authors_versions():
    real, fake, _ = small_panel()
    found = panel(real, fake, as_coded=False)
    assert not [k for k in found if 'coded' in k or 'l1' in k or 'rf' in k] and {'precision', 'lr_auc_low', 'mlp_f1'} <= set(found)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_named(bad):
    x, y, kinds = correlated(1, 20, 30), correlated(2, 20, 30), np.arange(20) % 2
    y[3, 7] = bad
    calls = [lambda: precision_recall(x, y), lambda: correlation_mse(x, y), lambda: detectability(x, y, x, x), lambda: detectability_as_coded(x, x, x, y),
             lambda: utility(y, kinds, x, kinds), lambda: panel(dict(train=x, test=x), dict(train=x, test=y))]
    for call in calls:
        with pytest.raises(ValueError, match='generated.*: gene 7 of case 3 is'): call()
    with pytest.raises(ValueError, match='real_test: gene 7 of case 3'): utility(x, kinds, y, kinds)
    with pytest.raises(ValueError, match=r'real \(20, 30\), generated \(20, 29\)'): correlation_mse(x, x[:, 1:])


def test_nothing_moves_the_global_random_state():
    np.random.seed(0); torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    x, kinds = correlated(1, 40), np.arange(40) % 2
    panel(dict(train=x, test=x), dict(train=x, test=x), dict(disease_type=dict(train=kinds, test=kinds)))
    augmentation_curve(x, kinds, x, kinds, x, kinds, sizes=(20,))
    condition_scores(torch.from_numpy(np.stack([x, x + .1])), torch.from_numpy(x))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


def test_gene_correlation_equals_numpy():
    a, b = correlated(1, 30), correlated(1, 30) + correlated(2, 30)
    b[:, 5] = 1.
    r = gene_correlation(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert r[5] == 0
    assert np.abs(r[:5] - [np.corrcoef(a[:, g], b[:, g])[0, 1] for g in range(5)]).max() < 1e-10


def test_crps_equals_all_pairs():
    samples, real = torch.from_numpy(np.stack([correlated(s, 8, 6) for s in range(7)])), torch.from_numpy(correlated(9, 8, 6))
    pairs = sum((samples[i] - samples[j]).abs() for i in range(7) for j in range(7))/(7*6)/2
    assert torch.allclose(crps(samples, real), ((samples - real).abs().mean(0) - pairs).mean(0))


@pytest.mark.parametrize('n', [2, 3, 16])
def test_spread_ratio_is_one_when_truth_and_samples_are_exchangeable(n):
    means, noise = rng(0, 'm').normal(size=(400, 30)), rng(n, 'n').normal(size=(n + 1, 400, 30))
    draws = torch.from_numpy(means + noise)
    assert spread_ratio(draws[1:], draws[0]) == pytest.approx(1, abs=.04)
    assert spread_ratio(torch.from_numpy(means + 2*noise[1:]), draws[0]) > 1.5


def test_shuffling_the_condition_removes_the_correlation():
    hidden = rng(0, 'h').normal(size=(300, 40))
    real = torch.from_numpy(hidden + rng(0, 'e').normal(size=(300, 40)))
    noise = rng(0, 's').normal(size=(16, 300, 40))
    sample = lambda view: torch.from_numpy((hidden if view == 'true' else np.roll(hidden, 1, 0)) + noise)
    found = condition_test(sample, real, ['true', 'shuffled'])
    assert found['true']['correlation'] > .6 and abs(found['shuffled']['correlation']) < .03
    assert found['shuffled']['crps'] > found['true']['crps'] and found['shuffled']['spread_ratio'] < found['true']['spread_ratio']
