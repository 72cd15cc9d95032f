"""Losses on numbers worked out in the open."""

import math

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_ppo_ewma import PPOEWMA, losses
from tests.battery.envs import SpaceEnv


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


def test_sampled_kl_is_half_the_mean_squared_log_ratio():
    # log-ratios to π_prox: log 2, −log 2 and, without counting, log 9
    log_prob = log(0.4, 0.2, 0.9).requires_grad_()
    mask = th.tensor([True, True, False])
    kl = losses.sampled_kl(log_prob, log(0.2, 0.4, 0.1), mask)
    assert kl.item() == pytest.approx(0.5 * math.log(2) ** 2)
    (gradient,) = th.autograd.grad(kl, log_prob)
    assert gradient.tolist() == pytest.approx([math.log(2) / 2, -math.log(2) / 2, 0.0])
    _, stats, _ = policy_loss([0.4, 0.2, 0.9], [0.2, 0.4, 0.1], [0.4, 0.2, 0.9], [0.0] * 3, mask=mask)
    assert stats.approx_kl_prox.item() == pytest.approx(kl.item())


@pytest.mark.parametrize("clip_range", [1.0, 1.5])
def test_clip_range_from_one_on_has_no_lower_bound(clip_range):
    # r = 0.001 is not clipped: 0.001 · −1; r = 4 is, at 1 + ε. Both have π_prox = π_behav.
    loss, stats, gradient = policy_loss([0.0005, 0.8], [0.5, 0.2], [0.5, 0.2], [-1.0, 1.0], clip_range=clip_range)
    assert loss == pytest.approx((0.001 - (1 + clip_range)) / 2)
    assert gradient == pytest.approx([0.001 / 2, 0.0])
    assert stats.clip_fraction.item() == 0.5
    assert losses.log_clip_limits(clip_range) == (-math.inf, math.log1p(clip_range))
    # Just below, there is a bound: max(0.001, 1 − 0.99) · −1, which has no gradient
    loss, _, gradient = policy_loss([0.0005], [0.5], [0.5], [-1.0], clip_range=0.99)
    assert loss == pytest.approx(0.01)
    assert gradient == [0.0]


@pytest.mark.parametrize("engine", ["reference", "dense"])
def test_schedules_of_the_clip_range_may_reach_one(engine):
    model = PPOEWMA(
        "MlpPolicy",
        SpaceEnv(),
        n_steps=16,
        batch_size=8,
        clip_range=lambda progress_remaining: 1.5 - progress_remaining,
        engine="reference" if engine == "reference" else "auto",
    )
    model.learn(32)
    assert model.current_engine == engine
    assert model.logger.name_to_value["train/clip_range"] == 1.5
    assert math.isfinite(model.logger.name_to_value["train/loss"])


@pytest.mark.parametrize(("clip_range", "cap"), [(0.0, 1.0), (0.2, 1.5), (1.0, 2.0), (1.7, 100.0)])
def test_coefficients_may_be_tensors(clip_range, cap):
    probs = [0.5, 0.3, 0.001, 0.9], [0.25, 0.6, 0.5, 0.3], [0.1, 0.5, 0.5, 0.3]
    advantages = [3.0, -1.0, -2.0, 1.0]
    numbers = policy_loss(*probs, advantages, clip_range=clip_range, max_importance_ratio=cap)
    tensors = [th.tensor(each, dtype=th.float64) for each in (clip_range, cap)]
    others = policy_loss(*probs, advantages, clip_range=tensors[0], max_importance_ratio=tensors[1])
    assert others[0] == pytest.approx(numbers[0], rel=1e-12)
    assert list(map(float, others[1])) == pytest.approx(list(map(float, numbers[1])), rel=1e-12)
    assert others[2] == pytest.approx(numbers[2], rel=1e-12)


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
    statistics = losses.ratio_statistics(rows, rows, 0.2, 100.0)
    assert statistics["importance_ess"].tolist() == [0.5, 0.5]
    # In the second row exp(−80000) and less underflow.
    assert statistics["importance_ratio_max"].tolist() == pytest.approx([math.exp(40), 0.0], rel=1e-5)
    assert statistics["importance_cap_fraction"].tolist() == [0.5, 0.0]
    assert statistics["clip_fraction"].tolist() == [0.75, 1.0]
    assert losses.ratio_statistics(rows, rows, None, None)["clip_fraction"].tolist() == [0.0, 0.0]


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
@pytest.mark.parametrize("clip_range", [0.0, 0.2, 1.0, None])
@pytest.mark.parametrize("max_importance_ratio", [100.0, None])
def test_loss_and_gradient_are_finite_for_all_finite_log_probs(dtype, clip_range, max_importance_ratio):
    values = th.tensor(EXTREMES[dtype], dtype=dtype)
    if clip_range == 1.0:
        values = values[1:-1]  # differences of the others are infinite, which a clip with two bounds makes finite
    current, prox, behav = (grid.flatten() for grid in th.meshgrid(values, values, values, indexing="ij"))
    for advantage in (-5.0, 0.0, 5.0):
        log_prob = current.clone().requires_grad_()
        loss, stats = losses.decoupled_policy_loss(
            log_prob,
            prox,
            behav,
            th.full_like(current, advantage),
            clip_range=clip_range,
            max_importance_ratio=max_importance_ratio,
        )
        (gradient,) = th.autograd.grad(loss, log_prob)
        assert th.isfinite(loss)
        assert th.isfinite(gradient).all()
        assert all(th.isfinite(value) for value in stats)
    kl = losses.sampled_kl(log_prob, prox)
    (gradient,) = th.autograd.grad(kl, log_prob)
    assert th.isfinite(kl)
    assert th.isfinite(gradient).all()
    assert th.isfinite(losses.approximate_kl(values[2:-2]))


@pytest.mark.parametrize("dtype", EXTREMES)
def test_old_log_ratios_keep_their_gradient_at_the_cap(dtype):
    """The policy has moved far from the one that collected: e^400 times as likely, which float32 does not have."""
    log_prob = th.tensor([-1.0], dtype=dtype, requires_grad=True)
    old = th.full((1,), -401.0, dtype=dtype)
    loss, stats = losses.decoupled_policy_loss(log_prob, log_prob.detach(), old, th.full((1,), 2.0, dtype=dtype))
    (gradient,) = th.autograd.grad(loss, log_prob)
    assert (loss.item(), gradient.item()) == pytest.approx((-200.0, -200.0), rel=1e-4)
    assert stats.importance_ratio_max.item() == pytest.approx(math.exp(40 if dtype == th.float32 else 300), rel=1e-4)


def test_approximate_kl_is_that_of_sb3_and_finite():
    # (2 − 1) − log 2 and (½ − 1) + log 2: the mean is ¼
    log_ratio = th.tensor([math.log(2), -math.log(2)])
    assert losses.approximate_kl(log_ratio).item() == pytest.approx(0.25)
    assert losses.approximate_kl(th.stack([log_ratio, th.zeros(2)])).tolist() == pytest.approx([0.25, 0.0])
    assert losses.approximate_kl(th.tensor([1000.0])).item() == pytest.approx(math.exp(40) - 1001, rel=1e-6)
    assert losses.approximate_kl(th.tensor([-1000.0])).item() == pytest.approx(999.0)
    assert losses.approximate_kl(th.tensor([1000.0], dtype=th.float64)).item() == pytest.approx(math.exp(300))


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


def test_auxiliary_loss():
    kl, returns = th.tensor([1.0, 3.0]), th.tensor([0.0, 1.0])
    values, aux_values = th.tensor([2.0, 1.0]), th.tensor([1.0, 0.0])
    # ½·c_aux·1 + β·2 + ½·c_vf·2
    loss, stats = losses.auxiliary_loss(kl, values, aux_values, returns)
    assert loss.item() == 0.5 + 2.0 + 1.0
    assert (stats.policy_kl, stats.value_loss, stats.aux_value_loss) == (2.0, 2.0, 1.0)
    weighted, stats = losses.auxiliary_loss(
        kl, values, aux_values, returns, beta_clone=3.0, vf_true_coef=0.5, vf_aux_coef=0.0
    )
    assert weighted.item() == 6.0 + 0.5
    assert stats.aux_value_loss == 1.0


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
        ({"clip_range": -0.1}, "clip_range must be >= 0 or None, got -0.1"),
        ({"clip_range": math.nan}, "clip_range must be >= 0 or None, got nan"),
        ({"max_importance_ratio": 0.5}, "max_importance_ratio must be >= 1 or None, got 0.5"),
        ({"max_importance_ratio": math.nan}, "max_importance_ratio must be >= 1 or None, got nan"),
    ],
)
def test_bad_coefficients_are_named(kwargs, message):
    zeros = th.zeros(2)
    with pytest.raises(ValueError, match=message):
        losses.decoupled_policy_loss(zeros, zeros, zeros, zeros, **kwargs)


@pytest.mark.parametrize("name", ["beta_clone", "vf_true_coef", "vf_aux_coef"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_bad_coefficients_of_the_auxiliary_loss_are_named(name, value):
    zeros = th.zeros(2)
    with pytest.raises(ValueError, match=f"{name} must be >= 0 and finite, got {value}"):
        losses.auxiliary_loss(zeros, zeros, zeros, zeros, **{name: value})


N, COLUMN = th.zeros(2), th.zeros(2, 1)
MASK = th.ones(2, 1, dtype=th.bool)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("log_prob_prox", lambda: losses.decoupled_policy_loss(N, COLUMN, N, N)),
        ("log_prob_behav", lambda: losses.decoupled_policy_loss(N, N, COLUMN, N)),
        ("advantages", lambda: losses.decoupled_policy_loss(N, N, N, COLUMN)),
        ("mask", lambda: losses.decoupled_policy_loss(N, N, N, N, mask=MASK)),
        ("log_prob_prox", lambda: losses.sampled_kl(N, COLUMN)),
        ("mask", lambda: losses.sampled_kl(N, N, MASK)),
        ("returns", lambda: losses.value_loss(N, COLUMN)),
        ("old_values", lambda: losses.value_loss(N, N, old_values=COLUMN, clip_range_vf=0.1)),
        ("mask", lambda: losses.value_loss(N, N, mask=MASK)),
        ("values", lambda: losses.auxiliary_loss(N, COLUMN, N, N)),
        ("aux_values", lambda: losses.auxiliary_loss(N, N, COLUMN, N)),
        ("returns", lambda: losses.auxiliary_loss(N, N, N, COLUMN)),
    ],
)
def test_shapes_are_not_broadcast(name, function):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 1\), expected \(2,\)"):
        function()
