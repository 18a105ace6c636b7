"""Gene-DML on made-up spots and on real ones: what it may see, what must fail, and that its parts do what they say."""
import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gemmgan_nb.condition import gene_correlation
from gemmgan_nb.data import Cohort, LeakError, pack, write_cohort
from gemmgan_nb.encoders import encode_images, load_image_encoder
from gemmgan_nb.experiment import ENTRIES
from gemmgan_nb.gene_dml import GeneDML, group_loss, instance_loss, places, section_scores, smoothed, surrounded, top_genes, window
from gemmgan_nb.her2st import build_her2st, neighbourhoods, read_section, tiny_sections
from gemmgan_nb.training import Budget, ModelSpec
from gemmgan_nb.workspace import Problems, read_json, rng

REAL = Path(__file__).parents[1]/'..'/'shared'/'data'/'her2st'
real = pytest.mark.skipif(not REAL.is_dir(), reason='real sections are not here (../shared/data/her2st)')
BUDGET = Budget(steps=6, batch=16, patches=9, dim=16, hidden=16, heads=2, layers=1, dropout=0., score_every=3, ema=.5)


def packed(folder, dim=6):
    "Features for a cohort made by `build_her2st`: random, but one number is the spot's own first gene."
    cohort, bags, r = Cohort.load(folder), read_json(folder/'bags.json'), rng(0, 'features')
    size = {s: 1 + max(max(rows) for slide, rows in bags.values() if slide == s) for s in cohort.obs.slide.unique()}
    pack(folder/'patches.safetensors', {s: r.normal(size=(n, dim)) for s, n in size.items()}, {c: [(s, rows)] for c, (s, rows) in bags.items()})
    return Cohort.load(folder)


@pytest.fixture(scope='module')
def spots(tmp_path_factory):
    out = tmp_path_factory.mktemp('spots')
    build_her2st(tiny_sections(out/'sections'), out/'cohort', ['X1'], ['Y1'], ['Z1'], n_genes=20)
    return packed(out/'cohort')


def model(uses=('image',), budget=BUDGET, **switches):
    return GeneDML(ModelSpec('gene_dml', 'Gene-DML', uses), budget, dict(groups=4) | switches, device='cpu')


def fitted(cohort, **switches):
    m = model(**switches); m.history = m.fit(cohort.split('train'), cohort.split('val'), 0); return m


def test_window_is_that_of_the_bags(spots):
    "The 3 x 3 window by coordinates holds the same tiles, in the same slots, as the bags of the her2st chapter."
    bank, x = spots.patches, surrounded(spots).patches.sample(torch.arange(len(spots)), 0)
    for i in range(0, len(spots), 7):
        bag = bank.first([i], int(bank.counts[i]))[0][0]
        torch.testing.assert_close(x[0][i, :9][x[1][i, :9]], bag)


def test_surroundings_stay_in_the_section(spots):
    "Other images in one section change nothing in another, and expression changes nothing at all."
    before = surrounded(spots).patches.sample(torch.arange(len(spots)), 0)[0]
    other = copy.copy(spots); other._banks = {}; other.X = spots.X*0 + 7
    bank = other.patches; changed = copy.copy(other._banks['patches'])
    changed.features = bank.features.clone(); last = spots.obs.slide == 'Z1'
    changed.features[bank.rows[bank.starts[np.flatnonzero(last)]]] = 9.; other._banks['patches'] = changed
    after = surrounded(other).patches.sample(torch.arange(len(spots)), 0)[0]
    same = (before == after).flatten(1).all(1).numpy()
    assert same[~last].all() and not same[last].any()


def test_a_spot_alone_is_the_spot_among_others(spots):
    m, test = fitted(spots), spots.split('test')
    torch.testing.assert_close(m.sample(test[[5]], 1, 0)[0, 0], m.sample(test, 1, 0)[0, 5], rtol=1e-4, atol=1e-5)


def test_shuffled_and_empty_images(spots):
    m, test = fitted(spots), spots.split('test')
    other = test.shuffled('image', 0); at = [list(test.obs.index).index(spots.obs.index[i]) for i in other.image_of]
    torch.testing.assert_close(m.sample(other, 1, 0)[0], m.sample(test, 1, 0)[0, at], rtol=1e-4, atol=1e-5)
    assert m.sample(test.zeroed('image'), 1, 0)[0].std(0).max() < 1e-5     # one profile for all


@pytest.mark.parametrize('switches', [dict(), dict(instance=0., group=0.), dict(scales=['local']), dict(head=False, group=0.), dict(residual=True), dict(own_heads=.3), dict(instance_of='case', regions=3)])
def test_every_row_resumes_from_its_checkpoint(spots, tmp_path, switches):
    m, test = fitted(spots, **switches), spots.split('test'); m.save(tmp_path)
    assert torch.equal(GeneDML.load(tmp_path).sample(test, 2, 3), m.sample(test, 2, 3))
    assert (m.sample(test, 3, 0).std(0).max() > 0) == bool(switches.get('residual') or switches.get('instance_of') == 'case' and BUDGET.patches < 9)
    assert m.history.frame().score.iloc[-1] < np.inf and len(m.history.rows) == 2


def test_smoothing_moves_targets_and_not_the_scale(spots):
    soft, plain = fitted(spots), fitted(spots, smooth=False)
    assert np.array_equal(soft.scaler.mean, plain.scaler.mean)
    assert not torch.equal(soft.sample(spots.split('test'), 1, 0), plain.sample(spots.split('test'), 1, 0))
    assert smoothed(spots).X.var(0).mean() < spots.X.var(0).mean()


def test_leaks_are_refused(spots):
    with pytest.raises(LeakError, match='not training cases'): model().fit(spots, spots.split('val'), 0)
    with pytest.raises(LeakError, match='not validation cases'): model().fit(spots.split('train'), spots.split('test'), 0)
    with pytest.raises(LeakError, match='not validation cases'): top_genes(torch.zeros(len(spots), 20), spots)


def test_spots_without_coordinates(tmp_path):
    names = [f'c{i}' for i in range(12)]
    obs = pd.DataFrame(dict(group=names, project='T', disease_type='', primary_site='', slide=names, split=['train']*8 + ['val']*2 + ['test']*2), index=names)
    write_cohort(tmp_path, rng(0).normal(size=(12, 3)), obs, pd.DataFrame(dict(symbol=list('ABC')), index=list('ABC')), 'zscore', ['image'], pd.DataFrame(dict(slide=names, path='none', mpp=.5)))
    pack(tmp_path/'patches.safetensors', {c: np.ones((2, 4)) for c in names}, {c: [(c, None)] for c in names})
    cohort = Cohort.load(tmp_path)
    with pytest.raises(ValueError, match='obs lacks x, y.*gene_dml_bulk'): fitted(cohort)
    with pytest.raises(ValueError, match='no coordinates'): smoothed(cohort)
    (tmp_path/'patches.safetensors').unlink()
    with pytest.raises(ValueError, match='no packed features of patches. Run the encode stage'): fitted(Cohort.load(tmp_path))


def test_switches_are_refused_by_name(spots):
    with pytest.raises(ValueError, match='no switch temprature'): fitted(spots, temprature=.1)
    with pytest.raises(ValueError, match='choose spot or case'): fitted(spots, instance_of='patient')
    with pytest.raises(ValueError, match='16 rows cannot make 40 groups'): fitted(spots, groups=40)


def test_losses_have_gradients_that_pull_partners_together():
    g = torch.Generator().manual_seed(0); image = torch.randn(24, 8, generator=g).requires_grad_(); gene = torch.randn(24, 8, generator=g)
    near = lambda: torch.nn.functional.cosine_similarity(image, gene).mean().item()
    by, before = torch.optim.Adam([image], .05), near()
    for _ in range(60): by.zero_grad(); (instance_loss(image, gene) + .5*group_loss(image, gene, 4)).backward(); by.step()
    assert near() > before + .5


def test_scores_by_section(spots):
    m = fitted(spots); cases = spots[(spots.obs.split != 'train').to_numpy()]; pred = m.sample(cases, 1, 0)[0]
    table = section_scores(pred, cases, m.scaler, [0, 1, 2], B=50)
    assert set(table.section) == {'Y1', 'Z1'} and set(table.metric) == {'pcc', 'pcc_top', 'mse', 'mae'}
    z = cases[(cases.obs.slide == 'Z1').to_numpy()]; mine = torch.from_numpy(m.scaler.transform(z.X)); p = m.sample(z, 1, 0)[0].numpy()
    by_hand = np.mean([np.corrcoef(p[:, j], mine[:, j])[0, 1] if p[:, j].std() > 1e-7 else 0 for j in range(20)])
    assert abs(table[(table.section == 'Z1') & (table.metric == 'pcc')].value.item() - by_hand) < 1e-3
    assert (table.low <= table.high).all()


@real
def test_real_sections(tmp_path):
    "On real sections the window by coordinates is the bag, but for spots that were left out for few counts."
    build_her2st(REAL, tmp_path, ['B4', 'C2'], ['C3'], ['C4'], n_genes=30, within_patient=True)
    cohort = packed(tmp_path); at = places(cohort); near = window(at)
    assert ((near >= 0).sum(1) <= np.asarray(cohort.patches.counts)).all()
    spots = read_section(REAL, 'C4').spots; bags = neighbourhoods(spots); rows = np.flatnonzero(at.slide == 'C4')
    for i in rows[::20]:
        mine = {spots.index[r] for r in bags[cohort.obs.index[i].split('_')[1]]}
        assert {cohort.obs.index[j].split('_')[1] for j in near[i] if j >= 0} <= mine
    m = fitted(cohort); assert m.sample(cohort.split('test'), 1, 0).isfinite().all()


def finds_own(m, cohort):
    "How often a spot's own profile is among the ten nearest of its section, in the common space."
    net, c = m.parts['g'].eval(), m.shown(smoothed(cohort)); x, mask = c.patches.sample(torch.arange(len(c)), 0); mean, deviation = m.scales['image']
    batch = type('B', (), dict(patches=(x - mean)/deviation*mask[..., None], patch_mask=mask, tokens=None, token_mask=None))
    with torch.no_grad(): near = sum(torch.nn.functional.normalize(v, dim=-1) for v in net(batch)[0]) @ torch.nn.functional.normalize(net.gene(torch.from_numpy(m.scaler.transform(c.X))), dim=-1).T
    return float(((near > near.diag()[:, None]).sum(1) < 10).float().mean())


@real
@pytest.mark.slow
def test_what_discrimination_adds_on_real_sections(tmp_path, capsys):
    "Validation section C3 alone: Gene-DML against its own ablation from the same start; printed with -s. C4, the test section, is not looked at."
    build_her2st(REAL, tmp_path/'cohort', ['B4', 'C2'], ['C3'], ['C4'], within_patient=True)
    encode_images(tmp_path/'cohort', tmp_path/'cohort'/'tiles', tmp_path/'cohort'/'slides.csv', tmp_path/'features', load_image_encoder('efficientnet_lite0'), Problems(), workers=1)
    cohort = Cohort.load(tmp_path/'cohort'); train, val = cohort.split('train'), cohort.split('val'); rows, found = [], []
    for seed in range(3):
        for name in ('gene_dml', 'gene_dml_mse'):
            e = ENTRIES[name]; m = GeneDML(ModelSpec(name, name, ('image',)), Budget(**dict(steps=600, batch=32, patches=9, score_every=50) | e['budget']), e['switches'], device='cpu'); m.fit(train, val, seed)
            p, y = m.sample(val, 1, 0)[0], torch.from_numpy(m.scaler.transform(val.X)); rows.append(dict(row=name, seed=seed, pcc=gene_correlation(p, y).mean().item(), mse=(p - y).square().mean().item()))
            if name == 'gene_dml': found.append({s: finds_own(m, cohort[(cohort.obs.slide == s).to_numpy()]) for s in ('B4', 'C2', 'C3')})
    table, found = pd.DataFrame(rows).pivot(index='seed', columns='row'), pd.DataFrame(found)
    with capsys.disabled(): print(f'\n{table.round(4).to_string()}\nown profile among the ten nearest\n{found.round(2).to_string()}')
    assert (table.pcc > .1).all(axis=None) and (found[['B4', 'C2']] > .9).all(axis=None) and (found.C3 < .6).all()
