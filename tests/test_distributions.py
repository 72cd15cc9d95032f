"""The torch distributions behind SB3's policies, and their parameters."""

from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ewma import PPGPolicy, losses
from sb3_ppo_ewma.distributions import distribution_parameters, torch_distributions, with_parameters
from tests.battery.envs import VECTOR

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


def test_masks_are_part_of_the_parameters() -> None:
    obs = th.zeros(3, 3)
    policy, _ = evaluated("maskable", obs)
    masks = th.tensor([[True, False, True, True, True]] * 3)
    policy.get_distribution(obs, action_masks=masks.numpy())
    distributions = torch_distributions(policy.action_dist, "this test")
    again = with_parameters(distributions, distribution_parameters(distributions))
    assert again[0].probs[:, 1].max().item() == 0
    assert losses.analytic_kl(again, distributions).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_other_distributions_are_refused() -> None:
    beta = th.distributions.Beta(th.ones(3, 2), th.ones(3, 2))
    for refused in (lambda: distribution_parameters([beta]), lambda: with_parameters([beta], [])):
        with pytest.raises(ValueError, match="must be Categorical, Bernoulli, Normal or derived from one, got Beta"):
            refused()


def test_missing_distributions_are_said() -> None:
    with pytest.raises(ValueError, match=r"the auxiliary phase needs the distribution .* left none in its object"):
        torch_distributions(object(), "the auxiliary phase")
