"""The loop when it is told to leave."""
import os
import signal
from dataclasses import replace

import pytest
import torch

from gemmgan_nb.training import WGAN, ModelSpec, leaving, ready, train_network
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


def test_the_listening_ends():
    before = signal.getsignal(signal.SIGTERM)
    with leaving() as told: assert not told and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
