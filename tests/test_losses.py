"""Losses on numbers worked out in the open."""

import math

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_ppo_ewma import losses


def log(*ratios: float, dtype: th.dtype = th.float64) -> th.Tensor:
    return th.tensor([math.log(ratio) for ratio in ratios], dtype=dtype)


def policy_loss(current, prox, behav, advantages, **kwargs):
    log_prob = log(*current).requires_grad_()
    loss, stats = losses.decoupled_policy_loss(
        log_prob, log(*prox), log(*behav), th.tensor(advantages, dtype=th.float64), **kwargs
    )
    (gradient,) = th.autograd.grad(loss, log_prob)
    return loss.item(), stats, gradient.tolist()


def test_decoupled_clip_weighs_the_clipped_ratio_by_prox_over_behav():
    # π_θ/π_prox = 0.5/0.25 = 2, clipped to 1.2; π_prox/π_behav = 0.25/0.5 = 0.5; objective 0.5 · 1.2 · 3 = 1.8
    loss, stats, gradient = policy_loss([0.5], [0.25], [0.5], [3.0], clip_range=0.2)
    assert loss == pytest.approx(-1.8)
    assert gradient == [0.0]
    assert stats.clip_fraction.item() == 1.0
    assert stats.importance_ratio_max.item() == pytest.approx(1.0)


def test_negative_advantage_outside_the_clip_keeps_its_gradient():
    # min(2 · 0.5 · −3, 1.2 · 0.5 · −3) = −3: the unclipped branch, gradient of the loss 3 · d(ratio)/d(log π_θ) = 3
    loss, _, gradient = policy_loss([0.5], [0.25], [0.5], [-3.0], clip_range=0.2)
    assert loss == pytest.approx(3.0)
    assert gradient == pytest.approx([3.0])


def test_without_clip_the_proximal_policy_disappears():
    # mean of 2·1 and 0.5·(−4) = 0, whatever π_prox
    for prox in ([0.1, 0.9], [0.7, 0.2]):
        loss, stats, gradient = policy_loss([0.4, 0.2], prox, [0.2, 0.4], [1.0, -4.0], clip_range=None)
        assert loss == pytest.approx(0.0)
        assert gradient == pytest.approx([-1.0, 1.0])
        assert stats.clip_fraction.item() == 0.0


def test_kl_penalty_is_half_the_mean_squared_log_ratio():
    # log-ratios to π_prox: log 2 and −log 2; ½·(log 2)² each, times β = 3
    loss, stats, _ = policy_loss([0.4, 0.2], [0.2, 0.4], [0.4, 0.2], [0.0, 0.0], clip_range=None, kl_coef=3.0)
    assert loss == pytest.approx(1.5 * math.log(2) ** 2)
    assert stats.kl_loss.item() == pytest.approx(loss)
    assert stats.approx_kl_prox.item() == pytest.approx(0.5 * math.log(2) ** 2)


def test_clip_and_penalty_add_up():
    clip, _, _ = policy_loss([0.5], [0.25], [0.5], [3.0], clip_range=0.2)
    both, stats, _ = policy_loss([0.5], [0.25], [0.5], [3.0], clip_range=0.2, kl_coef=2.0)
    assert both == pytest.approx(clip + math.log(2) ** 2)
    assert stats.policy_gradient_loss.item() == pytest.approx(clip)


def test_capped_ratio_is_the_cap_and_keeps_a_gradient():
    # π_θ/π_behav = 0.5/0.001 = 500 is capped at 100: the objective is 100·2, and so is its derivative
    loss, stats, gradient = policy_loss([0.5], [0.5], [0.001], [2.0], clip_range=None, max_importance_ratio=100.0)
    assert loss == pytest.approx(-200.0)
    assert gradient == pytest.approx([-200.0])
    assert stats.importance_cap_fraction.item() == 1.0
    assert stats.importance_ratio_max.item() == pytest.approx(500.0)
    loss, stats, _ = policy_loss([0.5], [0.5], [0.001], [2.0], clip_range=None, max_importance_ratio=None)
    assert loss == pytest.approx(-1000.0)
    assert stats.importance_cap_fraction.item() == 0.0


def test_effective_sample_size():
    # Weights 3, 1, 1, 1: (3 + 1 + 1 + 1)² / (4 · (9 + 1 + 1 + 1)) = 36/48; the cap changes nothing
    for cap in (None, 2.0):
        _, stats, _ = policy_loss([0.3] * 4, [0.3] * 4, [0.1, 0.3, 0.3, 0.3], [1.0] * 4, max_importance_ratio=cap)
        assert stats.importance_ess.item() == pytest.approx(36 / 48)
    _, stats, _ = policy_loss([0.9], [0.3], [0.1], [1.0])
    assert stats.importance_ess.item() == 1.0
    # Two equal weights far above the others, whatever their size: 2² / (4 · 2), in each of the rows
    rows = th.tensor([[2e4, 2e4, 0.0, -2e4], [-9e4, -8e4, -9e4, -8e4]])
    ratios = losses.ratio_statistics(rows, rows, losses.RatioLimits.of(0.2, 100.0))
    assert ratios.importance_ess.tolist() == [0.5, 0.5]


def test_padding_does_not_count():
    mask = th.tensor([True, False, True])
    loss, stats, gradient = policy_loss([0.4, 0.9, 0.1], [0.4] * 3, [0.2, 0.1, 0.2], [1.0, 99.0, 2.0], mask=mask)
    # ratios 2 and 0.5 to π_behav, 1 and 0.25 to π_prox: min(2, 2) and min(0.5·2, 0.8·2·2) = 1; the mean is 1.5
    assert loss == pytest.approx(-1.5)
    assert gradient[1] == 0.0
    assert stats.importance_ratio_max.item() == pytest.approx(2.0)
    assert losses.masked_mean(th.tensor([1.0, 50.0, 3.0]), mask).item() == 2.0


EXTREMES = {
    th.float32: [-3e38, -1e20, -800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0, 1e20, 3e38],
    th.float64: [-1e308, -1e150, -800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0, 1e150, 1e308],
}


@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("clip_range", [0.0, 0.2, None])
@pytest.mark.parametrize("max_importance_ratio", [100.0, None])
@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_loss_and_gradient_are_finite_for_all_finite_log_probs(dtype, clip_range, max_importance_ratio, kl_coef):
    values = th.tensor(EXTREMES[dtype], dtype=dtype)
    current, prox, behav = (grid.flatten() for grid in th.meshgrid(values, values, values, indexing="ij"))
    for advantage in (-5.0, 0.0, 5.0):
        log_prob = current.clone().requires_grad_()
        loss, stats = losses.decoupled_policy_loss(
            log_prob,
            prox,
            behav,
            th.full_like(current, advantage),
            clip_range=clip_range,
            kl_coef=kl_coef,
            max_importance_ratio=max_importance_ratio,
        )
        (gradient,) = th.autograd.grad(loss, log_prob)
        assert th.isfinite(loss)
        assert th.isfinite(gradient).all()
        assert all(th.isfinite(value) for value in stats)


def test_inside_the_bounds_nothing_is_clamped():
    # exp(39) in float32, without cap
    log_prob = th.tensor([39.0])
    loss, _ = losses.decoupled_policy_loss(
        log_prob, log_prob, th.zeros(1), th.ones(1), clip_range=None, max_importance_ratio=None
    )
    assert loss.item() == pytest.approx(-math.exp(39), rel=1e-5)


def test_value_loss_with_and_without_clipping():
    values, returns = th.tensor([2.0, 0.0]), th.tensor([0.0, 0.0])
    assert losses.value_loss(values, returns).item() == 2.0  # (4 + 0)/2
    # kept within 0.5 of the old value 1: 1.5² / 2 and, from 0 within 0.5 of −1: (−0.5)² / 2
    clipped = losses.value_loss(values, returns, old_values=th.tensor([1.0, -1.0]), clip_range_vf=0.5)
    assert clipped.item() == pytest.approx((1.5**2 + 0.5**2) / 2)
    mask = th.tensor([True, False])
    assert losses.value_loss(values, returns, mask=mask).item() == 4.0
    with pytest.raises(ValueError, match="old_values"):
        losses.value_loss(values, returns, clip_range_vf=0.5)


def test_entropy_without_closed_form_is_estimated_by_log_prob():
    assert losses.entropy_loss(th.tensor([1.0, 3.0]), th.zeros(2)).item() == -2.0
    assert losses.entropy_loss(None, th.tensor([-1.0, -3.0])).item() == -2.0


def test_normalisation_of_a_minibatch():
    # mean 2, unbiased standard deviation 1
    assert losses.normalize_advantages(th.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
    masked = losses.normalize_advantages(th.tensor([1.0, 2.0, 3.0, 100.0]), th.tensor([True, True, True, False]))
    assert masked[:3].tolist() == pytest.approx([-1.0, 0.0, 1.0])
    assert losses.normalize_advantages(th.tensor([7.0])).tolist() == [7.0]


def test_analytic_kl_is_summed_over_action_dimensions():
    # KL(N(0,1) ‖ N(1,1)) = ½ for each of two dimensions
    kl = losses.analytic_kl(Normal(th.zeros(3, 2), th.ones(3, 2)), Normal(th.ones(3, 2), th.ones(3, 2)))
    assert kl.tolist() == pytest.approx([1.0] * 3)
    # KL of (½, ½) from (¼, ¾): ½ log 2 + ½ log ⅔, for one categorical, two of them, and three Bernoulli variables
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    half, quarter = Categorical(th.tensor([[0.5, 0.5]])), Categorical(th.tensor([[0.25, 0.75]]))
    assert losses.analytic_kl(half, quarter).tolist() == pytest.approx([expected])
    assert losses.analytic_kl([half, half], [quarter, quarter]).tolist() == pytest.approx([2 * expected])
    coins = Bernoulli(th.full((1, 3), 0.5)), Bernoulli(th.full((1, 3), 0.25))
    assert losses.analytic_kl(*coins).tolist() == pytest.approx([3 * expected])


def test_analytic_kl_is_finite_where_probabilities_underflow():
    for distribution, shape in ((Categorical, (1, 2)), (Bernoulli, (1, 1))):
        for logit in (20.0, 200.0, 1e4, 1e30):
            first = th.zeros(shape)
            first[0, 0] = -logit
            second = (-first).requires_grad_()
            kl = losses.analytic_kl(distribution(logits=first), distribution(logits=second))
            # All of the mass is moved to where the other one has e^−logit or, for two categories, e^−logit of it
            assert kl.item() == pytest.approx(logit, rel=1e-5)
            (gradient,) = th.autograd.grad(kl.sum(), second)
            assert th.isfinite(gradient).all()


def test_analytic_kl_of_impossible_actions():
    """Masks give −1e8 or −Inf as logits; an action impossible for both policies counts for nothing."""
    for low in (-1e8, -math.inf):
        p, q = (th.tensor([[0.0, 0.0, low]]), th.tensor([[0.0, math.log(3.0), low]], requires_grad=True))
        kl = losses.analytic_kl(Categorical(logits=p), Categorical(logits=q))
        # KL of (½, ½) from (¼, ¾)
        assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
        (gradient,) = th.autograd.grad(kl.sum(), q)
        assert th.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_range": 1.0}, "clip_range must be in"),
        ({"clip_range": -0.1}, "clip_range must be in"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"kl_coef": math.nan}, "kl_coef must be >= 0"),
        ({"max_importance_ratio": 0.5}, "max_importance_ratio must be >= 1"),
        ({"kl": th.zeros(2, 1)}, r"kl has shape \(2, 1\), expected \(2,\)"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    zeros = th.zeros(2)
    with pytest.raises(ValueError, match=message):
        losses.decoupled_policy_loss(zeros, zeros, zeros, zeros, **kwargs)


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"advantages has shape \(2, 1\), expected \(2,\)"):
        losses.decoupled_policy_loss(th.zeros(2), th.zeros(2), th.zeros(2), th.zeros(2, 1))
    with pytest.raises(ValueError, match="returns has shape"):
        losses.value_loss(th.zeros(2, 1), th.zeros(2))
