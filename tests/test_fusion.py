"""The fusion network, the GAN's parts and the penalty, beyond what their chapters check."""
import copy

import pytest
import torch
from torch import nn

from gemmgan_nb.cross_attention import Attention, MultimodalFusion, PatchTransformer, plot_architecture
from gemmgan_nb.wgan_gp import Critic, Generator, critic_loss, generator_loss, gradient_penalty, sample

TABLE2 = {'mean image': dict(transformer=False, text=False), 'text cls': dict(image=False), 'patch transformer': dict(text=False), 'film': dict(cross=False),
          'cross attention': dict(film=False), 'ours': {}, 'ours without transformer': dict(transformer=False), 'ours, norm first': dict(norm_first=True),
          'as coded': dict(raw_film=True, sequential=True), 'for whoever comes': dict(nulls=True)}
rows = pytest.mark.parametrize('switches', TABLE2.values(), ids=TABLE2)


def fusion_and_inputs(switches, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    fusion = MultimodalFusion(12, 10, 32, **switches).to(dtype).eval()
    patches, tokens = torch.randn(5, 7, 12, dtype=dtype), torch.randn(5, 6, 10, dtype=dtype)
    return fusion, patches, torch.tensor([7, 4, 1, 0, 3])[:, None] > torch.arange(7), tokens, torch.tensor([6, 6, 3, 1, 2])[:, None] > torch.arange(6)


@rows
def test_neither_order_nor_padding_nor_company_matters(switches):
    fusion, p, pm, t, tm = fusion_and_inputs(switches)
    e, order = fusion(p, pm, t, tm), torch.randperm(7)
    dirty_p, dirty_t = p.masked_fill(~pm[..., None], 1e4), t.masked_fill(~tm[..., None], -1e4)
    torch.testing.assert_close(fusion(dirty_p[:, order], pm[:, order], dirty_t, tm), e, rtol=1e-9, atol=1e-9)
    for i in range(5):      # each case alone, cut to its real rows
        alone = fusion(p[i:i + 1, :pm[i].sum()], None, t[i:i + 1, :tm[i].sum()], None)
        torch.testing.assert_close(alone[0], e[i], rtol=1e-9, atol=1e-9)


@rows
def test_gradients_are_finite_even_for_empty_bags_and_reach_every_parameter(switches):
    fusion, p, pm, t, tm = fusion_and_inputs(switches)
    fusion.train()
    fusion(p, pm, t, tm).square().sum().backward()
    for name, w in fusion.named_parameters():
        assert w.grad is not None and w.grad.isfinite().all(), name
        if not name.endswith(('qkv.bias', 'no_text')): assert w.grad.abs().max() > 0, name


def test_a_batch_without_any_patch_and_a_text_without_any_token():
    fusion, p, pm, t, tm = fusion_and_inputs({})
    assert fusion(p[:, :0], pm[:, :0], t, tm).isfinite().all()
    assert fusion(p, torch.zeros_like(pm), t, torch.zeros_like(tm)).isfinite().all()


def test_equations_3_and_4_are_bidirectional_not_sequential():
    fusion, p, pm, t, tm = fusion_and_inputs({})
    text = fusion.tokens(t)
    image, mask = fusion.bag(fusion.film(fusion.patches(p), text[:, 0]), pm)
    cross = fusion.cross
    expected = cross.t2i(text[:, :1], image, mask) + cross.i2t(image[:, :1], text, tm)     # keys and values of every row
    torch.testing.assert_close(fusion(p, pm, t, tm), expected[:, 0])
    e, over_patches, over_tokens = fusion(p, pm, t, tm, return_weights=True)
    torch.testing.assert_close(e, expected[:, 0])
    assert over_patches.shape == (5, 4, 8) and over_tokens.shape == (5, 4, 6)
    torch.testing.assert_close(over_patches.sum(-1), torch.ones(5, 4, dtype=torch.float64))
    assert (over_tokens.sum(1)[~tm] == 0).all()


def test_as_coded_the_second_attention_is_asked_by_the_first_and_film_sees_raw_features():
    fusion, p, pm, t, tm = fusion_and_inputs(dict(raw_film=True, sequential=True))
    text, raw = fusion.tokens(t), fusion.film.affine(t[:, 0])
    modulated = raw[:, None, :12].tanh()*p + raw[:, None, 12:].clamp(-5, 5)
    image, mask = fusion.bag(fusion.patches(modulated), pm)
    found = fusion.cross.t2i(text[:, :1], image, mask)
    torch.testing.assert_close(fusion(p, pm, t, tm), (found + fusion.cross.i2t(found, text, tm))[:, 0])


@pytest.mark.parametrize('switches', [{}, dict(cross=False), dict(film=False), dict(transformer=False), dict(raw_film=True, sequential=True)])
def test_a_missing_modality_is_a_learned_row_whatever_the_padding(switches):
    fusion, p, pm, t, tm = fusion_and_inputs(dict(nulls=True) | switches)
    no_image, no_text = torch.zeros_like(pm), torch.zeros_like(tm)
    torch.testing.assert_close(fusion(p + 9, no_image, t, tm), fusion(p[:, :0], no_image[:, :0], t, tm))
    if 'raw_film' not in switches: torch.testing.assert_close(fusion(p, pm, t + 9, no_text), fusion(p, pm, t, no_text))      # there the trainer's zeros do it
    before = fusion(p, no_image, t, no_text)
    with torch.no_grad(): fusion.no_image += 1
    assert not torch.allclose(fusion(p, no_image, t, no_text), before)
    with torch.no_grad(): fusion.no_text += 1
    torch.testing.assert_close(fusion(p, pm | True, t, tm | True), fusion(p, None, t, None))


def test_the_weights_that_are_shown_are_the_weights_that_are_used():
    from gemmgan_nb.cross_attention import attention_weights, project
    torch.manual_seed(0)
    a, x, y, mask = Attention(16, 4), torch.randn(3, 2, 16), torch.randn(3, 5, 16), torch.tensor([5, 3, 1])[:, None] > torch.arange(5)
    by_hand = a.out((attention_weights(a, x, y, mask) @ project(a, x, y)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(a(x, y, mask), by_hand)


@pytest.mark.parametrize('norm_first', [False, True])
def test_patch_transformer_equals_pytorchs(norm_first):
    torch.manual_seed(0)
    ours = PatchTransformer(16, 4, 2, 32, norm_first=norm_first).eval()
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16) if norm_first else None, enable_nested_tensor=False).eval()
    for o, t in zip(list(ours.parameters())[1:], theirs.parameters(), strict=True): t.data.copy_(o.data)
    x, mask = torch.randn(3, 5, 16), torch.tensor([5, 3, 0])[:, None] > torch.arange(5)
    full, keep = torch.cat([ours.cls.expand(3, 1, -1), x], 1), torch.cat([torch.ones(3, 1, dtype=torch.bool), mask], 1)
    torch.testing.assert_close(ours(x, mask)[0][keep], theirs(full, src_key_padding_mask=~keep)[keep], rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training():
    fusion, *inputs = fusion_and_inputs(dict(dropout=.5))
    torch.testing.assert_close(fusion(*inputs), fusion(*inputs))
    fusion.train()
    assert not torch.allclose(fusion(*inputs), fusion(*inputs))


@pytest.mark.parametrize('switches,text', [(dict(image=False, text=False), 'nothing to condition on'), (dict(film=False, cross=False), 'ignored'), (dict(heads=5), 'divisor')])
def test_impossible_switches_are_refused(switches, text):
    with pytest.raises(ValueError, match=text): MultimodalFusion(8, 8, 32, **switches)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError): MultimodalFusion(8, 8, 32, depth=3)


def test_paper_sizes():
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert [size(m) for m in (MultimodalFusion(1024, 768), Generator(18_868), Critic(18_868))] == [2_171_648, 5_046_196, 4_962_049]


@pytest.mark.parametrize('slope', [0., .2])
def test_penalty_against_finite_differences_and_its_parameter_gradients(slope):
    torch.manual_seed(1)
    critic, cond = Critic(6, 3, 8, slope=slope).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    real, fake, share = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.rand(4, 1).double()
    penalty = lambda c: gradient_penalty(c, c.enter(real), c.enter(fake), cond, share)
    value = penalty(critic)
    grads = torch.autograd.grad(value, [critic.profile.weight, cond], allow_unused=True)
    assert grads[1] is None or (grads[1] == 0).all()      # the condition's path is not penalised
    h, w = 1e-6, critic.profile.weight
    for i, j in ((0, 0), (3, 5), (7, 2)):
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(critic)
            with torch.no_grad(): moved.profile.weight[i, j] += sign*h
            values.append(penalty(moved).item())
        assert abs((values[0] - values[1])/(2*h) - grads[0][i, j].item()) < 1e-6
    assert w.grad is None                                  # measuring leaves no gradient behind


def test_penalty_is_zero_at_slope_one_and_differs_between_points():
    real, fake = torch.randn(8, 5), torch.randn(8, 5)
    plane = Critic(5, cond_dim=0, hidden=1, slope=1.)
    with torch.no_grad(): plane.profile.weight.copy_(torch.eye(1, 5)); plane.second.weight.fill_(1); plane.last.weight.fill_(1)
    assert gradient_penalty(plane, plane.enter(real), plane.enter(fake), None, torch.rand(8, 1)) < 1e-12
    critic = Critic(5, cond_dim=0, hidden=8)
    a, b, again = (gradient_penalty(critic, critic.enter(real), critic.enter(fake), None, torch.rand(8, 1, generator=torch.Generator().manual_seed(s))) for s in (0, 1, 0))
    assert a == again and a != b


def test_losses_pull_in_opposite_directions():
    fake = torch.zeros(3, requires_grad=True)
    g1, = torch.autograd.grad(critic_loss(torch.ones(3), fake), fake)
    g2, = torch.autograd.grad(generator_loss(fake), fake)
    assert (g1 == -g2).all()


def test_sample_is_a_function_of_its_stream_and_leaves_the_global_one_alone():
    g, cond = Generator(7, 3, 4, 8), torch.randn(2, 3)
    before = torch.get_rng_state()
    one, two = (sample(g, cond, 5, torch.Generator().manual_seed(0)) for _ in range(2))
    assert one.shape == (5, 2, 7) and (one == two).all() and not one.requires_grad and (torch.get_rng_state() == before).all()
    assert (one[0] != one[1]).any() and sample(Generator(7, 0, 4, 8), None, 5, cases=3).shape == (5, 3, 7)


@rows
def test_figure_1_shows_the_numbers_of_the_modules(switches):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fusion, g, c = MultimodalFusion(12, 10, 32, **switches), Generator(99, 32), Critic(99, 32)
    fig = plot_architecture(fusion, g, c)
    words = {t.get_text() for t in fig.axes[0].texts}
    sizes = {f'{sum(p.numel() for p in m.parameters()):,}' for m in (fusion.patches, fusion.tokens, fusion.film, g, c) if m is not None}
    assert sizes <= words and ('Eq. 3' in words) == (fusion.cross is not None) and ('n × 12' in words) == (fusion.patches is not None)
    assert any(f'{sum(p.numel() for p in fusion.parameters()):,} parameters' in w for w in words)
    plt.close(fig)
