"""
Batch normalisation and dropout: training mode while training, evaluation mode otherwise.
"""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from tests.battery.algorithms import Algorithm
from tests.battery.helpers import assert_same, assert_trained, copy_parameters

ENV_IDS = ["CartPole-v1", "Pendulum-v1"]


class NoisyExtractor(BaseFeaturesExtractor):
    """
    Batch normalisation and dropout. Writes down in which mode it was called, and whether with gradients.

    :param observation_space: of the environment
    """

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.features_dim), nn.Dropout(0.5))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.modes.append((self.training, th.is_grad_enabled()))
        features: th.Tensor = self.layers(observations)
        return features


POLICY_KWARGS = {"features_extractor_class": NoisyExtractor, "net_arch": [8]}


def noisy_extractor(policy: Any) -> NoisyExtractor:
    """
    :param policy: a policy with the noisy extractor, perhaps with layers behind it
    :return: the extractor
    """
    return next(module for module in policy.features_extractor.modules() if isinstance(module, NoisyExtractor))


def statistics(policy: nn.Module) -> dict[str, th.Tensor]:
    """
    :param policy: a policy with the noisy extractor
    :return: a copy of the running statistics
    """
    return {name: value.clone() for name, value in policy.named_buffers()}


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_training_moves_the_statistics(algo: Algorithm, env_id: str) -> None:
    model = algo.make(env_id, policy_kwargs=POLICY_KWARGS)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_modes(algo: Algorithm, env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = algo.make(env_id, policy_kwargs=POLICY_KWARGS)
    modes = noisy_extractor(model.policy).modes
    phases: list[tuple[str, set[tuple[bool, bool]]]] = []

    def observe(phase: str) -> None:
        method = getattr(model, phase)

        def observed(*args: Any, **kwargs: Any) -> Any:
            modes.clear()
            result = method(*args, **kwargs)
            phases.append((phase, set(modes)))
            return result

        monkeypatch.setattr(model, phase, observed)

    observe("collect_rollouts")
    observe("train")
    model.learn(32)
    assert [phase for phase, _ in phases] == ["collect_rollouts", "train"] * 2
    training, evaluation = (True, True), (False, False)
    assert all(seen == {evaluation} for phase, seen in phases if phase == "collect_rollouts")
    # The proximal policy is evaluated as the behaviour policy was: dropout in it would make the ratio to it random.
    # Advantages that are computed anew are predictions, and so is the policy before an auxiliary phase.
    predicts = [algo.has_average or getattr(model, "recompute_advantages", False), algo.has_phases]
    expected = [{training, evaluation} if any(predicts[:n]) else {training} for n in (1, 2)]
    assert [seen for phase, seen in phases if phase == "train"] == expected


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_collection_leaves_the_statistics_alone(algo: Algorithm, env_id: str) -> None:
    model = algo.make(env_id, policy_kwargs=POLICY_KWARGS)
    before = statistics(model.policy)
    _, callback = model._setup_learn(total_timesteps=32)
    for _ in range(2):
        model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
    assert_same(before, statistics(model.policy))


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_predictions_are_deterministic(algo: Algorithm, env_id: str) -> None:
    model = algo.make(env_id, policy_kwargs=POLICY_KWARGS).learn(16)
    before = statistics(model.policy)
    observation = np.ones(model.observation_space.shape, np.float32)
    first, _ = model.predict(observation, deterministic=True)
    assert all(np.array_equal(first, model.predict(observation, deterministic=True)[0]) for _ in range(5))
    with th.no_grad():  # the mode is that of the last prediction
        values = {model.policy.predict_values(th.ones(1, *observation.shape)).item() for _ in range(5)}
    assert len(values) == 1
    assert_same(before, statistics(model.policy))


def test_the_average_keeps_the_statistics_of_the_policy(average_algo: Algorithm) -> None:
    model = average_algo.make("CartPole-v1", policy_kwargs=POLICY_KWARGS).learn(32)
    assert_same(statistics(model.proximal_policy), statistics(model.policy))
    assert not model.proximal_policy.training
