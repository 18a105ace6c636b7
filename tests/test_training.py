"""The loop when it is told to leave, and when it is not even told."""
import os
import signal
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemmgan_nb.training import WGAN, Batch, Budget, ModelSpec, feature_scale, leaving, ready, train_network
from gemmgan_nb.workspace import rng, torch_rng
from test_rows import BOTH, FUSION, SMALL, sides, toy


def test_told_to_leave_it_writes_a_checkpoint_and_goes_on_from_there(tmp_path):
    train, val, test = sides(toy())
    budget = replace(SMALL, steps=6, score_every=3, dropout=.3)
    fresh = lambda: WGAN(ModelSpec('g', 'G', BOTH), budget, FUSION, work=tmp_path)
    told = fresh(); ready(told, train, 0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match='step 3.*goes on from there'):
        train_network(told, train, val, 0, budget, tmp_path, lambda m, v: os.kill(os.getpid(), signal.SIGTERM) or 1.)
    assert signal.getsignal(signal.SIGTERM) == before and torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 3
    assert [r['step'] for r in fresh().fit(train, val, 0).rows] == [3, 6]
    whole = WGAN(ModelSpec('g', 'G', BOTH), budget, FUSION, work=tmp_path/'whole'); whole.fit(train, val, 0)
    ends = [torch.load(folder/'checkpoint.pt', weights_only=True) for folder in (tmp_path, tmp_path/'whole')]
    for k in ('g', 'c'): assert all(torch.equal(a, b) for a, b in zip(*(end['model'][k].values() for end in ends), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*(end['average'].values() for end in ends), strict=True))


def test_without_work_it_says_that_nothing_was_kept():
    train, val, test = sides(toy())
    m = WGAN(ModelSpec('g', 'G', BOTH), SMALL, FUSION); ready(m, train, 0)
    with pytest.raises(SystemExit, match='Nothing was kept'): train_network(m, train, val, 0, SMALL, None, lambda m, v: os.kill(os.getpid(), signal.SIGTERM) or 1.)


def test_a_checkpoint_serves_nobody_else(tmp_path):
    "The same seed and budget, other patients: the training begins anew, and does not hand out the first one's weights."
    train, val, _ = sides(toy())
    def fitted(cohort, work): m = WGAN(ModelSpec('g', 'G', BOTH), replace(SMALL, steps=6, checkpoint_seconds=0.), FUSION, work=work); m.fit(cohort, val, 0); return m.weights()
    fitted(train, tmp_path/'work'); half = train[np.arange(len(train)) < len(train)//2]
    again, fresh = fitted(half, tmp_path/'work'), fitted(half, tmp_path/'other')
    assert all(torch.equal(again[k], fresh[k]) for k in fresh)


def test_the_listening_ends():
    before = signal.getsignal(signal.SIGTERM)
    with leaving() as told: assert not told and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def trained_in_a_child(folder, budget):
    """A process that trains in `folder` and leaves its last checkpoint there; its id."""
    train, val, _ = sides(toy())
    if child := os.fork(): return child
    try:
        WGAN(ModelSpec('g', 'G', BOTH), budget, FUSION, work=folder).fit(train, val, 0)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.mark.parametrize('kills,resident', [(10, 'disk'), pytest.param(100, 'auto', marks=pytest.mark.slow)])      # batches made ahead, and not
def test_killed_at_any_moment_it_ends_in_the_same_weights(tmp_path, kills, resident):
    budget, random, done = replace(SMALL, steps=25, score_every=5, dropout=.3, checkpoint_seconds=0., threads=1, resident=resident), rng(0, 'kills'), 0
    torch.set_num_threads(1)        # a child that is forked from a process with a pool of threads would wait for them for ever
    ended = lambda folder: torch.load(folder/'checkpoint.pt', weights_only=True)
    assert os.waitpid(trained_in_a_child(tmp_path/'whole', budget), 0)[1] == 0
    begun = time.monotonic(); assert os.waitpid(trained_in_a_child(tmp_path/'timed', budget), 0)[1] == 0
    whole, span, n = ended(tmp_path/'whole'), time.monotonic() - begun, 0
    while n < kills:
        folder, status, done = tmp_path/f'run{done}', 9, done + 1
        while status == 9:                       # killed: the same command again
            child = trained_in_a_child(folder, budget)
            time.sleep(random.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]; n += status == 9
        assert status == 0
        last = ended(folder)
        assert last['step'] == 25 and last['best']['score'] == whole['best']['score'] and last['rows'] == whole['rows']
        for k in ('g', 'c'): assert all(torch.equal(a, b) for a, b in zip(last['model'][k].values(), whole['model'][k].values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(last['best']['weights'].values(), whole['best']['weights'].values(), strict=True))
    assert n >= kills


def iterations(compile, steps=3):
    "Losses of a tiny GeMM-GAN whose fusion networks are compiled, or not."
    model = WGAN(ModelSpec('gemmgan', 'GeMM-GAN', ('image', 'text')), Budget(batch=8, dim=16, hidden=16, latent=8, dropout=0., compile=compile), device='cpu')
    model.about = dict(labels=None); model._build(dict(patch_dim=20, token_dim=10, genes=50))
    g = torch.Generator().manual_seed(0)
    bag = lambda n, width: (torch.randn(8, n, width, generator=g), torch.arange(n) < torch.randint(n//2, n + 1, (8, 1), generator=g))
    batch, stream = Batch(torch.randn(8, 50, generator=g), *bag(12, 20), *bag(9, 10)), torch.Generator().manual_seed(1)
    return [float(v) for _ in range(steps) for v in model.iteration(lambda: batch, stream).values()], list(model.g.state_dict())


@pytest.mark.slow
def test_a_compiled_network_computes_the_same_and_keeps_its_names():
    (plain, names), (compiled, same) = iterations('off'), iterations('on')
    assert compiled == pytest.approx(plain, rel=1e-4) and names == same
    assert not torch._dynamo.utils.counters['graph_break']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('budget', [dict(precision='fp32', compile='off'), dict(precision='bf16', compile='off'), dict()])
def test_on_a_gpu_the_condition_is_the_same_and_training_stays_finite(budget):
    models = {}
    for device in ('cpu', 'cuda'):
        model = models[device] = WGAN(ModelSpec('gemmgan', 'GeMM-GAN', ('image', 'text')), Budget(batch=8, dim=16, hidden=16, latent=8, dropout=0., **budget), device=device)
        model.about = dict(labels=None); model._build(dict(patch_dim=20, token_dim=10, genes=50))
    models['cuda'].g.load_state_dict(models['cpu'].g.state_dict())
    g = torch.Generator().manual_seed(0)
    bag = lambda n, width: (torch.randn(8, n, width, generator=g), torch.arange(n) < torch.randint(n//2, n + 1, (8, 1), generator=g))
    batch = Batch(torch.randn(8, 50, generator=g), *bag(12, 20), *bag(9, 10))
    there = Batch(*(v.cuda() for v in vars(batch).values() if v is not None))
    with torch.no_grad(), models['cuda'].cast(): cond = models['cuda'].conditions(models['cuda'].g, there)
    with torch.no_grad(): torch.testing.assert_close(cond.float().cpu(), models['cpu'].conditions(models['cpu'].g, batch), rtol=5e-2, atol=5e-2)
    stream = torch.Generator('cuda').manual_seed(1)
    assert all(torch.isfinite(v) for _ in range(5) for v in models['cuda'].iteration(lambda: there, stream).values())


def test_a_channel_that_is_silent_in_training_does_not_shout_in_a_test():
    x = torch.randn(200, 5, generator=torch_rng(0)); x[:, 2] = 0; x[:, 4] *= 1e-9
    bank = SimpleNamespace(rows=torch.arange(200), starts=torch.tensor([0]), counts=torch.tensor([200]), features=x)
    mean, deviation = feature_scale(bank)
    assert torch.allclose(deviation[[0, 1, 3]], x.std(0)[[0, 1, 3]]) and ((.01 - mean[[2, 4]])/deviation[[2, 4]]).max() < 1.5
    bank.features = torch.zeros(200, 5); assert (feature_scale(bank)[1] > 0).all()


def test_a_loss_that_runs_away_stops_before_it_is_no_number():
    train, val, _ = sides(toy())
    m = WGAN(ModelSpec('g', 'G', BOTH), SMALL, FUSION)
    m.iteration = lambda draw, stream: dict(critic=torch.tensor(1e20), penalty=torch.tensor(0.), generator=torch.tensor(0.))
    with pytest.raises(FloatingPointError, match='Lower training.lr'): m.fit(train, val, 0)
