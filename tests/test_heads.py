"""The denoising heads and the strong simple rows: what they recover where the truth is known, what they refuse, and that they keep to the common machinery."""
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from gemmgan_nb import baselines as B
from gemmgan_nb.condition import gene_correlation, spread_ratio
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.training import WGAN, Feed, ModelSpec, load_network, ready, train_network
from gemmgan_nb.workspace import rng, torch_rng
from test_rows import BOTH, FUSION, LABELS, SMALL, keeps_the_protocol, sides, toy

ROWS = {'diffusion': (B.DiffusionHead, BOTH, FUSION), 'diffusion, linear': (B.DiffusionHead, BOTH, FUSION | dict(schedule='linear')), 'diffusion, x0': (B.DiffusionHead, BOTH, FUSION | dict(target='x0')),
        'diffusion, image': (B.DiffusionHead, ('image',), FUSION), 'diffusion, labels': (B.DiffusionHead, LABELS), 'diffusion, blind': (B.DiffusionHead,),
        'flow': (B.FlowHead, BOTH, FUSION), 'flow, euler': (B.FlowHead, BOTH, FUSION | dict(solver='euler')), 'flow, all three': (B.FlowHead, BOTH + LABELS, FUSION),
        'copula': (B.GaussianCopula, LABELS), 'tiles': (B.TopTiles, ('image',)), 'regions': (B.Regions, ('image',))}
HEADS = (B.DiffusionHead, B.FlowHead)
FEW = dict(sampling_steps=6)


def make(kind, uses=(), switches=None, **budget):
    few = FEW if issubclass(kind, B.Denoising) else {}
    return kind(ModelSpec(kind.__name__, kind.__name__, uses), replace(SMALL, **budget), few | (switches or {}))


@pytest.mark.parametrize('name', ROWS)
def test_protocol(name, tmp_path):
    keeps_the_protocol(lambda: make(*ROWS[name]), tmp_path)
    train, val, _ = sides(toy())
    with pytest.raises(LeakError): make(*ROWS[name]).fit(toy().split('train', 'test'), val, 0)
    kind = ROWS[name][0]
    with pytest.raises(ValueError, match='holds a'): (load_network if hasattr(kind, 'parts') else B.load_arrays)(WGAN if hasattr(kind, 'parts') else B.Noise, tmp_path)


@pytest.mark.parametrize('kind', [*HEADS, B.TopTiles])
def test_killed_and_taken_up_again_it_ends_in_the_same_weights(kind, tmp_path):
    train, val, _ = sides(toy())
    uses, switches = (('image',), None) if kind is B.TopTiles else (BOTH, FUSION)
    fresh = lambda work: kind(ModelSpec('h', 'H', uses), replace(SMALL, steps=6, score_every=2, dropout=.2, checkpoint_seconds=0), switches and switches | FEW, work=work)
    sizes = dict(left_out=2) if kind is B.TopTiles else {}
    def run(work, score):
        m = fresh(work); ready(m, train, 0, **sizes); train_network(m, train, val, 0, m.budget, work, score); return m
    looks = []
    def dies(m, v):
        looks.append(1)
        if len(looks) == 2: raise RuntimeError('killed')
        return 1.
    whole = run(None, lambda m, v: 1.)
    with pytest.raises(RuntimeError, match='killed'): run(tmp_path, dies)
    again = run(tmp_path, lambda m, v: 1.)
    assert all(torch.equal(a, b) for a, b in zip(whole.state()['g'].values(), again.state()['g'].values(), strict=True))


@cache
def known_truth(n=420, genes=6):
    """Genes are normal around a mean that image and text name without error: deviation 0.3 for even genes, 0.9 for odd ones; genes 1 and 3 share their noise."""
    folder, r = Path(mkdtemp()), rng(0, 'truth')
    image, text = r.normal(size=(2, n))
    mean = np.stack([image, image, text, text, image + text, image - text], 1)[:, :genes]
    width = np.array([.3, .9]*3)[:genes]; noise = r.normal(size=(n, genes)); noise[:, 3] = noise[:, 1]
    X, names = mean + width*noise, [f'c{i}' for i in range(n)]
    obs = pd.DataFrame(dict(group=names, project='T', disease_type='', primary_site='', slide=names, split=np.repeat(['train', 'val', 'test'], [300, 40, n - 340])), index=names)
    write_cohort(folder, X, obs, pd.DataFrame(dict(symbol=list('abcdef')), index=list('abcdef')), 'zscore', ['image', 'text'], pd.DataFrame(dict(slide=names, path='-', mpp=.5)))
    bags = {c: [(c, None)] for c in names}
    for name, x in (('patches', image), ('tokens', text)): pack(folder/f'{name}.safetensors', {c: np.stack([[v, 1.]]*2) for c, v in zip(names, x, strict=True)}, bags)
    return Cohort.load(folder), mean, width


@cache
def learned(kind, **budget):
    cohort, _, _ = known_truth()
    m = kind(ModelSpec('h', 'H', BOTH), replace(SMALL, **dict(steps=250, batch=64, patches=2, dim=32, hidden=64, lr=3e-3, ema=.98, dropout=0., score_every=125, score_samples=8) | budget), FUSION)
    m.fit(cohort.split('train'), cohort.split('val'), 0)
    return m


@pytest.mark.parametrize('kind', HEADS)
def test_mean_spread_and_company_are_recovered_where_they_are_known(kind):
    cohort, mean, width = known_truth()
    m, test = learned(kind), cohort.split('test')
    drawn = m.scaler.inverse(m.sample(test, 100, 0).numpy())
    true = mean[(cohort.obs.split == 'test').to_numpy()]
    assert np.sqrt(((drawn.mean(0) - true)**2).mean()) < .35*true.std()
    spread = drawn.std(0).mean(0)
    assert (spread[1::2].mean() > 1.5*spread[::2].mean()) and abs(spread[1::2].mean()/.9 - 1) < .25 and spread[::2].mean() < .55, spread
    within = (drawn - drawn.mean(0)).reshape(-1, 6)
    assert np.corrcoef(within[:, 1], within[:, 3])[0, 1] > .5 > abs(np.corrcoef(within[:, 1], within[:, 5])[0, 1])
    assert .75 < spread_ratio(m.sample(test, 32, 1), torch.from_numpy(m.scaler.transform(test.X))) < 1.25


def test_guidance_zero_is_the_unconditional_model_and_one_the_model_itself():
    cohort, _, _ = known_truth()
    m, test = learned(B.FlowHead, modality_dropout=.3), cohort.split('test')
    real = torch.from_numpy(m.scaler.transform(test.X))
    nothing = B.guided(m, 0.).sample(test, 4, 0)
    batch = Feed(test, None, 2, BOTH, scales=m.scales)(torch.arange(20), torch_rng(0))
    with torch.no_grad(): torch.testing.assert_close(B.guided(m, 0.).draw(batch, 20, 2, torch_rng(0)), m.draw(B.without(B.without(batch, 'image'), 'text'), 20, 2, torch_rng(0)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nothing, B.guided(m, 0.).sample(test.shuffled('image', 0).shuffled('text', 1), 4, 0), atol=1e-4, rtol=1e-4)
    assert torch.equal(B.guided(m, 1.).sample(test, 2, 0), m.sample(test, 2, 0))
    with torch.no_grad(): torch.testing.assert_close(B.guided(m, dict(image=0., text=1.)).draw(batch, 20, 2, torch_rng(0)), m.draw(B.without(batch, 'image'), 20, 2, torch_rng(0)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(B.guided(m, dict(image=2., text=2.)).sample(test, 2, 0), B.guided(m, 2.).sample(test, 2, 0), atol=1e-4, rtol=1e-4)
    follow = lambda s, genes: gene_correlation(B.guided(m, s).sample(test, 16, 0).mean(0), real)[genes].mean().item()
    assert abs(follow(0., [0, 1, 2, 3])) < .3 and follow(1., [0, 1, 2, 3]) > .7
    assert follow(dict(image=0., text=1.), [2, 3]) > .6 > .4 > follow(dict(image=0., text=1.), [0, 1])
    curve = B.guidance_curve(m, test, (0., 1., 2.), n=8)
    assert list(curve.columns) == ['scale', 'correlation', 'spread_ratio', 'crps', 'precision', 'recall'] and curve.crps.idxmin() == 1
    assert m.option('guidance') == 1. and B.plot_guidance(curve).axes


def test_guidance_survives_a_checkpoint(tmp_path):
    cohort, _, _ = known_truth()
    strong, test = B.guided(learned(B.FlowHead, modality_dropout=.3), 2.), cohort.split('test')
    strong.save(tmp_path)
    assert torch.equal(B.FlowHead.load(tmp_path).sample(test, 2, 0), strong.sample(test, 2, 0))


@pytest.mark.parametrize('switches,word', [(dict(schedule='sigmoid'), 'cosine, linear'), (dict(target='noise'), 'v, x0'), (dict(sampling_steps=0), 'at least 1'), (dict(levels=0), 'at least 1'),
                                           (dict(shift=-2), 'above 0'), (dict(guidance=3.), 'modality_dropout above 0'), (dict(guidance=dict(image=1.)), 'one for image and one for text')])
def test_settings_that_are_no_choice_are_refused_at_once(switches, word):
    with pytest.raises(ValueError, match=word): make(B.DiffusionHead, BOTH, switches)


def test_more_settings_are_refused():
    with pytest.raises(ValueError, match='euler, heun'): make(B.FlowHead, BOTH, dict(solver='rk4'))
    with pytest.raises(ValueError, match='cosine, straight, linear'): B.angles('sigmoid', torch.rand(2))
    train, val, test = sides(toy())
    m = make(B.DiffusionHead, BOTH, FUSION); m.fit(train, val, 0)
    with pytest.raises(ValueError, match='modality_dropout'): B.guided(m, 2.)
    with pytest.raises(ValueError, match='have no image'): m.sample(toy(patches=False).split('test'), 1, 0)
    for kind in (B.TopTiles, B.Regions):
        with pytest.raises(ValueError, match='reads slides only'): make(kind, BOTH).fit(train, val, 0)
        with pytest.raises(ValueError, match='features of none'): make(kind, ('image',)).fit(*sides(toy(patches=False))[:2], 0)


def test_half_precision_trains_the_same_head():
    train, val, test = sides(toy())
    drawn = []
    for precision in ('fp32', 'bf16'):
        m = make(B.FlowHead, BOTH, FUSION, precision=precision); m.fit(train, val, 0); drawn.append(m.sample(test, 2, 0))
        assert m.weights()['head.net.0.weight'].dtype == torch.float32
    assert not torch.equal(*drawn) and (drawn[0] - drawn[1]).abs().mean() < .05


def test_a_condition_that_is_not_told_cannot_matter():
    train, val, test = sides(toy())
    m = make(B.DiffusionHead, ('image',), FUSION); m.fit(train, val, 0)
    assert torch.equal(m.sample(test, 2, 0), m.sample(test.shuffled('text', 0), 2, 0)) and not torch.equal(m.sample(test, 2, 0), m.sample(test.shuffled('image', 0), 2, 0))


def test_mixing_turns_and_turns_back():
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 9, 4, generator=g, dtype=torch.float64); angle = torch.rand(9, generator=g, dtype=torch.float64)*torch.pi/2
    z, v = B.mixture(x, e, angle)
    for a, b in zip(B.unmixed(z, v, angle), (x, e), strict=True): torch.testing.assert_close(a, b)
    torch.testing.assert_close(z.square() + v.square(), x.square() + e.square())


def test_a_walk_with_the_true_slope_ends_in_the_true_distribution():
    mean, tau = 2., .5      # x ~ N(2, 0.5^2): the slope in closed form
    def slope(z, a):
        c, s = a.cos()[:, None], a.sin()[:, None]; share = tau**2*c/(tau**2*c**2 + s**2)
        x = mean + share*(z - c*mean)
        return (c*z - x)/s
    start = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    for kind in ('cosine', 'linear', 'straight'):
        out = B.walk(slope, start, B.angles(kind, torch.linspace(1, 0, 101)), heun=True)
        assert abs(out.mean() - mean) < .03 and abs(out.std()/tau - 1) < .05, kind


def test_x0_is_read_as_a_profile():
    m = make(B.DiffusionHead, (), dict(target='x0')); m.about = {}; m._build(dict(patch_dim=None, token_dim=None, genes=3))
    z, a = torch.randn(4, 3), torch.full((4,), .7)
    x, _ = B.unmixed(z, m.velocity(z, a, None), a)
    torch.testing.assert_close(x, m.g.head(z, a, None))


def test_copula_keeps_quantiles_and_ranks_class_by_class():
    r, n = rng(1, 'copula'), 1200
    y = r.normal(size=(n, 3)); y[:, 1] = .8*y[:, 0] + .6*y[:, 1]; kind = np.repeat([0, 1], n//2)
    y[kind == 1, 1] *= -1
    X = np.stack([np.exp(y[:, 0]), np.maximum(y[:, 1], 0), y[:, 2]**3], 1); names = [f'c{i}' for i in range(n)]
    obs = pd.DataFrame(dict(group=names, project='T', disease_type=np.array(['A', 'B'])[kind], primary_site='x', slide=names, split='train'), index=names); obs.loc[names[-1], 'split'] = 'val'
    write_cohort(folder := Path(mkdtemp()), X, obs, pd.DataFrame(dict(symbol=list('abc')), index=list('abc')), 'zscore', ['labels'], pd.DataFrame(dict(slide=names, path='-', mpp=.5)))
    cohort = Cohort.load(folder); train = cohort.split('train')
    m = B.GaussianCopula(ModelSpec('c', 'C', LABELS)); m.fit(train, cohort.split('val'), 0)
    for name, sign in (('A', 1), ('B', -1)):
        mine = (train.obs.disease_type == name).to_numpy()
        drawn, data = m.scaler.inverse(m.sample(train[mine][:1], 5000, 0)[:, 0].numpy()), train.X[mine]
        for j in (0, 2): np.testing.assert_allclose((drawn[:, j, None] < np.quantile(data[:, j], [.1, .5, .9])).mean(0), [.1, .5, .9], atol=.025)
        assert abs((drawn[:, 1] < 1e-6).mean() - (data[:, 1] < 1e-6).mean()) < .05 and drawn.min() >= data.min() - 1e-4
        assert sign*spearmanr(drawn[:, 0], drawn[:, 1]).statistic > .5


def test_quantiles_go_there_and_back():
    x = rng(0, 'q').normal(size=(50, 4))
    places = (x.argsort(0).argsort(0) + .5)/50
    np.testing.assert_allclose(B.quantiles(np.sort(x, 0), places), x)
    np.testing.assert_allclose(B.quantiles(np.sort(x, 0), np.array([[0.]*4, [1.]*4])), [x.min(0), x.max(0)])


def test_top_means_are_those_of_a_sort_and_padding_never_counts():
    g = torch.Generator().manual_seed(0)
    scores, mask = torch.randn(5, 9, 3, generator=g), torch.arange(9) < torch.tensor([9, 4, 1, 0, 6])[:, None]
    for k in (1, 3, 50):
        found = B.top_mean(torch.where(mask[..., None], scores, 1e6), mask, (k,))
        for i, n in enumerate(mask.sum(1).tolist()):
            torch.testing.assert_close(found[i], scores[i, :n].sort(0, descending=True).values[:k].mean(0) if n else torch.zeros(3))
    torch.testing.assert_close(B.top_mean(scores, mask, (1, 3)), (B.top_mean(scores, mask, (1,)) + B.top_mean(scores, mask, (3,)))/2)


def test_tiles_in_parts_give_the_gradient_of_the_whole(monkeypatch):
    train, val, _ = sides(toy())
    weights = []
    for few in (B.TopTiles.few, lambda self, batch: [batch[i:i + 3] for i in range(0, len(batch), 3)]):
        monkeypatch.setattr(B.TopTiles, 'few', few)
        m = make(B.TopTiles, ('image',), steps=2); m.fit(train, val, 0); weights.append(m.weights())
    for k in weights[0]: torch.testing.assert_close(weights[0][k], weights[1][k], atol=1e-4, rtol=1e-3)


def test_regions_stand_for_patches_and_nothing_of_the_cohort_changes():
    cohort = toy()
    counts = cohort.patches.counts.clone()
    view = B.regional(cohort, 2)
    assert (view.patches.counts == 2).all() and torch.equal(cohort.patches.counts, counts) and view.patches.dim == cohort.patches.dim
    swapped = cohort.shuffled('image', 0)
    torch.testing.assert_close(B.regional(swapped, 2).patches.mean(), view.patches[swapped.image_of].mean())
    assert B.regional(toy(patches=False), 2).patches is None and B.regional(view, 2).patches.counts.max() == 2
    assert B.regional(cohort, 50).patches.counts.tolist() == counts.tolist()
    train, val, test = sides(cohort)
    m = make(B.Regions, ('image',), patches=2); m.fit(train, val, 0)
    assert m.sample(test.zeroed('image'), 1, 0).isfinite().all()


def test_at_the_papers_sizes_the_head_is_no_larger_than_the_gans_two():
    from gemmgan_nb.wgan_gp import Critic, Generator
    size = lambda net: sum(p.numel() for p in net.parameters())
    assert .9*(size(Generator(18_868)) + size(Critic(18_868))) < size(B.Velocity(18_868, 256)) < size(Generator(18_868)) + size(Critic(18_868))
