"""The metrics against independent oracles: prdc, NumPy's correlation matrices, scikit-learn on the plain problem, pairs counted one by one."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from gemmgan_nb.condition import condition_scores, condition_test, crps, gene_correlation, spread_ratio
from gemmgan_nb.metrics import correlation_mse, detectability, in_span, precision_recall, standardised, utility, varying
from gemmgan_nb.workspace import rng


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


def test_identical_distributions_score_at_the_ceiling():
    a, b, c, d = (correlated(s, 150) for s in range(4))
    assert precision_recall(a, b)['precision'] > .9 and precision_recall(a, b)['recall'] > .9
    assert abs(detectability(a, b, c, d)['auc'] - .5) < .12


def test_utility_ceiling_and_floor():
    kinds = np.arange(90) % 3
    centres = 2*rng(0, 'centres').normal(size=(3, 50))
    draw = lambda s: centres[kinds] + rng(s, 'x').normal(size=(90, 50))
    good, mixed = utility(draw(0), kinds, draw(1), kinds), utility(draw(0), rng(0, 'p').permutation(kinds), draw(1), kinds)
    assert min(good.values()) > .95 and max(mixed.values()) < .6
    assert good == utility(draw(0), kinds, draw(1), kinds)
    named = utility(draw(0), np.array(list('abc'))[kinds], draw(1), np.array(list('abc'))[kinds])
    assert named['rf_accuracy'] == good['rf_accuracy']


def test_nothing_moves_the_global_random_state():
    np.random.seed(0); torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    x, kinds = correlated(1, 40), np.arange(40) % 2
    precision_recall(x, x); correlation_mse(x, x); detectability(x, x, x, x); utility(x, kinds, x, kinds)
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
