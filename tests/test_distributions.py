"""Closed forms of SB3's action distributions; the torch distributions behind any of them, and their parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Beta, Categorical, Gamma, Independent, Normal, kl_divergence

from sb3_ppo_ewma import PPGPolicy, losses
from sb3_ppo_ewma.distributions import (
    ClosedForm,
    GaussianForm,
    SoftplusDiagGaussianDistribution,
    closed_form,
    distribution_parameters,
    standard_deviation,
    to_policy_actions,
    torch_distributions,
    with_parameters,
)
from tests.battery.envs import VECTOR

# === Closed forms ===

# SB3's distribution, number of outputs of the action net, whether it has log_std
FORMS: dict[str, tuple[Callable[[], Distribution], int, bool]] = {
    "categorical": (lambda: CategoricalDistribution(4), 4, False),
    "multicategorical": (lambda: MultiCategoricalDistribution([3, 2, 4]), 9, False),
    "bernoulli": (lambda: BernoulliDistribution(3), 3, False),
    "gaussian": (lambda: DiagGaussianDistribution(2), 2, True),
    "softplus": (lambda: SoftplusDiagGaussianDistribution(2), 2, True),
}
N = 6
# Standard deviations of random outputs; the last one gives probabilities that underflow in single precision
SCALES = [0.0, 1.0, 10.0, 300.0]


class Sb3:
    """
    SB3's distribution with random parameters, and the closed form for the same ones.

    :param name: of the distribution
    :param scale: standard deviation of its parameters
    :param dtype: of its parameters
    :param seed: of them
    """

    def __init__(self, name: str, scale: float = 1.0, dtype: th.dtype = th.float64, seed: int = 0) -> None:
        make, n_outputs, has_log_std = FORMS[name]
        generator = th.Generator().manual_seed(seed)
        self.outputs = scale * th.randn(N, n_outputs, dtype=dtype, generator=generator)
        self.log_std = th.randn(n_outputs, dtype=dtype, generator=generator) if has_log_std else None
        self.leaves = [self.outputs] if self.log_std is None else [self.outputs, self.log_std]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.distribution: Any = make()
        self.distribution.proba_distribution(*self.leaves)
        form = closed_form(self.distribution)
        assert form is not None
        self.form: ClosedForm = form
        log_std = None if self.log_std is None else self.log_std.detach()
        self.parameters = form.parameters(self.outputs.detach(), log_std)
        th.manual_seed(seed)
        self.actions = self.distribution.sample().detach()


every_form = pytest.mark.parametrize("name", FORMS)


@every_form
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_closed_forms_equal_those_of_sb3(name: str, scale: float, dtype: th.dtype) -> None:
    sb3 = Sb3(name, scale, dtype)
    form, distribution, parameters = sb3.form, sb3.distribution, sb3.parameters
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == th.float32 else {"rtol": 1e-12, "atol": 1e-12}
    th.testing.assert_close(form.log_prob(parameters, sb3.actions), distribution.log_prob(sb3.actions), **tolerance)
    th.testing.assert_close(form.entropy(parameters), distribution.entropy(), **tolerance)
    th.testing.assert_close(form.mode(parameters), distribution.mode(), rtol=0, atol=0)
    rare = sb3.actions.flip(0)
    th.testing.assert_close(form.log_prob(parameters, rare), distribution.log_prob(rare), **tolerance)


@every_form
def test_closed_forms_draw_the_same_actions_from_the_same_random_numbers(name: str) -> None:
    sb3 = Sb3(name, dtype=th.float32)
    for seed in range(20):
        th.manual_seed(seed)
        expected = sb3.distribution.sample()
        state = th.get_rng_state()
        th.manual_seed(seed)
        th.testing.assert_close(sb3.form.sample(sb3.parameters), expected.detach(), rtol=1e-6, atol=1e-6)
        assert th.equal(th.get_rng_state(), state)


@every_form
@pytest.mark.parametrize("scale", SCALES[:3])
def test_kl_equals_that_of_torch(name: str, scale: float) -> None:
    old, new = Sb3(name, scale, seed=1), Sb3(name, scale, seed=2)
    pairs = zip(
        torch_distributions(old.distribution, "this test"),
        torch_distributions(new.distribution, "this test"),
        strict=True,
    )
    terms = [kl_divergence(p, q) for p, q in pairs]
    expected = sum(term if term.dim() == 1 else term.sum(-1) for term in terms)
    kl = old.form.kl(old.parameters, new.parameters)
    th.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)
    assert kl.shape == (N,)
    assert old.form.kl(old.parameters, old.parameters).tolist() == pytest.approx([0.0] * N, abs=1e-12)


@every_form
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("entropy_weight", [None, 0.7])
def test_gradients_equal_those_of_autograd(name: str, scale: float, entropy_weight: float | None) -> None:
    sb3 = Sb3(name, scale)
    for actions in (sb3.actions, sb3.actions.flip(0)):  # likely ones and rare ones
        weights = th.randn(N, dtype=th.float64, generator=th.Generator().manual_seed(3))
        objective = (weights * sb3.distribution.log_prob(actions)).sum()
        objective = objective + (entropy_weight or 0.0) * sb3.distribution.entropy().sum()
        expected = th.autograd.grad(objective, sb3.leaves, retain_graph=True)
        outputs, log_std = sb3.form.gradients(sb3.parameters, actions, weights, entropy_weight)
        th.testing.assert_close(outputs, expected[0], rtol=1e-10, atol=1e-10)
        if log_std is None:
            assert len(expected) == 1
        else:
            th.testing.assert_close(log_std, expected[1], rtol=1e-10, atol=1e-10)


@every_form
def test_several_batches_are_computed_at_once(name: str) -> None:
    first, second = Sb3(name, seed=1), Sb3(name, seed=2)
    log_std = None
    if first.log_std is not None and second.log_std is not None:
        log_std = th.stack([first.log_std, second.log_std]).unsqueeze(1)
    both = first.form.parameters(th.stack([first.outputs, second.outputs]), log_std)
    log_prob, entropy = first.form.log_prob(both, first.actions), first.form.entropy(both)
    for row, each in enumerate((first, second)):
        th.testing.assert_close(log_prob[row], each.distribution.log_prob(first.actions))
        th.testing.assert_close(entropy[row], each.distribution.entropy())


def test_gaussian_forms_need_log_std() -> None:
    with pytest.raises(ValueError, match="log_std must be given for a Gaussian distribution, got None"):
        GaussianForm().parameters(th.zeros(2, 2), None)


class Derived(DiagGaussianDistribution):
    """Computes something else, for all that is known."""


class WithForm(DiagGaussianDistribution):
    closed_form = GaussianForm()


class DerivedFromThat(WithForm):
    pass


@pytest.mark.parametrize(
    "distribution",
    [Derived(2), DerivedFromThat(2), StateDependentNoiseDistribution(2), object()],
    ids=lambda each: type(each).__name__,
)
def test_other_distributions_have_no_closed_form(distribution: Any) -> None:
    assert closed_form(distribution) is None


def test_classes_may_bring_a_closed_form() -> None:
    assert closed_form(WithForm(2)) is WithForm.closed_form


@pytest.mark.parametrize(("kwargs", "expected"), [({}, 2.0), ({"std_activation": "softplus"}, 2.0)])
def test_standard_deviation_is_that_of_the_distribution(kwargs: dict[str, Any], expected: float) -> None:
    policy = PPGPolicy(VECTOR, BOX, lambda _: 0.0, log_std_init=0.6931471805599453, **kwargs)
    assert standard_deviation(policy).tolist() == pytest.approx([expected] * 2)
    policy.get_distribution(th.zeros(1, 3))
    assert policy.action_dist.distribution.stddev.flatten().tolist() == pytest.approx([expected] * 2)


def test_actions_take_the_form_that_distributions_expect() -> None:
    discrete = to_policy_actions(spaces.Discrete(3), th.tensor([[0.0], [2.0]]))
    assert discrete.tolist() == [0, 2]
    assert discrete.dtype == th.int64
    continuous = th.zeros(2, 2)
    assert to_policy_actions(BOX, continuous) is continuous


# === Torch distributions ===

BOX = spaces.Box(-1, 1, (2,))
MULTI = spaces.MultiDiscrete([3, 2])

# policy, action space, arguments; shapes of the parameters of three states
CASES: dict[str, tuple[type[ActorCriticPolicy], spaces.Space, dict[str, Any], list[tuple[int, ...]]]] = {
    "box": (ActorCriticPolicy, BOX, {}, [(3, 2), (3, 2)]),
    "softplus": (PPGPolicy, BOX, {"std_activation": "softplus"}, [(3, 2), (3, 2)]),
    "sde": (ActorCriticPolicy, BOX, {"use_sde": True}, [(3, 2), (3, 2)]),
    "squashed": (ActorCriticPolicy, BOX, {"use_sde": True, "squash_output": True}, [(3, 2), (3, 2)]),
    "discrete": (ActorCriticPolicy, spaces.Discrete(4), {}, [(3, 4)]),
    "multidiscrete": (ActorCriticPolicy, MULTI, {}, [(3, 3), (3, 2)]),
    "multibinary": (ActorCriticPolicy, spaces.MultiBinary(5), {}, [(3, 5)]),
    "maskable": (MaskableActorCriticPolicy, MULTI, {}, [(3, 3), (3, 2)]),
    "maskable_discrete": (MaskableActorCriticPolicy, spaces.Discrete(4), {}, [(3, 4)]),
    "maskable_multibinary": (MaskableActorCriticPolicy, spaces.MultiBinary(2), {}, [(3, 2), (3, 2)]),
}


def evaluated(case: str, obs: th.Tensor) -> tuple[Any, list[th.distributions.Distribution]]:
    """:return: a policy that has just seen some observations, and its distributions"""
    cls, action_space, kwargs, _ = CASES[case]
    th.manual_seed(0)
    policy = cls(VECTOR, action_space, lambda _: 0.0, ortho_init=False, **kwargs)
    with th.no_grad():
        policy.get_distribution(obs)
    return policy, torch_distributions(policy.action_dist, "this test")


@pytest.mark.parametrize("case", CASES)
def test_parameters_determine_the_distributions(case: str) -> None:
    obs = th.tensor([[0.0, 1.0, -1.0], [1.0, 0.5, 0.0], [-1.0, -1.0, 1.0]])
    policy, distributions = evaluated(case, obs)
    parameters = distribution_parameters(distributions)
    assert [tuple(tensor.shape) for tensor in parameters] == CASES[case][-1]
    again = with_parameters(distributions, parameters)
    assert losses.analytic_kl(again, distributions).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    for old, new in zip(distributions, again, strict=True):
        action = old.sample()
        assert th.allclose(old.log_prob(action), new.log_prob(action), atol=1e-6)

    # Rows of them belong to the rows of the observations, also when the policy has seen other ones since.
    with th.no_grad():
        policy.get_distribution(obs[[2, 0]])
    rows = torch_distributions(policy.action_dist, "this test")
    again = with_parameters(rows, [tensor[[2, 0]] for tensor in parameters])
    assert losses.analytic_kl(again, rows).tolist() == pytest.approx([0, 0], abs=1e-6)
    other = with_parameters(rows, [tensor[[1, 2]] for tensor in parameters])
    assert (losses.analytic_kl(other, rows) > 1e-4).all()


def test_probabilities_that_underflow_come_back() -> None:
    """In float32 there is no probability for a logit of -200; log-probabilities of rare actions must not be lost."""
    logits = th.tensor([[0.0, -200.0], [-200.0, 0.0]])
    distributions = [th.distributions.Categorical(logits=logits), th.distributions.Bernoulli(logits=logits)]
    categorical, bernoulli = with_parameters(distributions, distribution_parameters(distributions))
    assert categorical.log_prob(th.tensor([1, 0])).tolist() == [-200, -200]
    assert bernoulli.log_prob(th.ones(2, 2))[0, 1].item() == bernoulli.log_prob(th.ones(2, 2))[1, 0].item() == -200


@pytest.mark.parametrize("case", ["maskable", "maskable_discrete", "maskable_multibinary"])
def test_masks_are_part_of_the_parameters(case: str) -> None:
    obs = th.zeros(3, 3)
    policy, distributions = evaluated(case, obs)
    masks = th.ones(3, sum(each.probs.shape[1] for each in distributions), dtype=th.bool)
    masks[:, 1] = False
    policy.get_distribution(obs, action_masks=masks.numpy())
    distributions = torch_distributions(policy.action_dist, "this test")
    again = with_parameters(distributions, distribution_parameters(distributions))
    assert type(again[0]) is Categorical  # whose masks are in its logits
    assert again[0].probs[:, 1].max().item() == 0
    assert losses.analytic_kl(again, distributions).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


POSITIVE = th.tensor([[0.5, 2.0], [3.0, 1.0], [1.5, 0.1]])


@pytest.mark.parametrize(
    "distribution", [Beta(POSITIVE, POSITIVE.flip(0)), Gamma(POSITIVE, POSITIVE.flip(0)), Normal(-POSITIVE, POSITIVE)]
)
def test_other_distributions_that_name_their_parameters(distribution: Any) -> None:
    parameters = distribution_parameters([distribution])
    assert [tuple(parameter.shape) for parameter in parameters] == [(3, 2), (3, 2)]
    (again,) = with_parameters([distribution], parameters)
    assert type(again) is type(distribution)
    action = distribution.sample()
    assert th.equal(again.log_prob(action), distribution.log_prob(action))
    (rows,) = with_parameters([distribution], [parameter[[2, 0]] for parameter in parameters])
    assert th.equal(rows.log_prob(action[[2, 0]]), distribution.log_prob(action)[[2, 0]])
    assert losses.analytic_kl(again, distribution).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_distributions_without_named_parameters_are_refused() -> None:
    nested = Independent(Normal(th.zeros(3, 2), th.ones(3, 2)), 1)
    for refused in (lambda: distribution_parameters([nested]), lambda: with_parameters([nested], [])):
        with pytest.raises(ValueError, match=r"Independent of the actions does not name its parameters"):
            refused()


def test_missing_distributions_are_said() -> None:
    with pytest.raises(ValueError, match=r"the auxiliary phase needs the distribution .* left none in its object"):
        torch_distributions(object(), "the auxiliary phase")
