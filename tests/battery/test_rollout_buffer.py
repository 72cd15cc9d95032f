"""
Rollout buffers, returns and advantages.
"""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from tests.battery.algorithms import Algorithm
from tests.battery.envs import EpisodeEnv, SpaceEnv
from tests.battery.helpers import assert_trained, copy_parameters


class OrderedBuffer(RolloutBuffer):
    """
    Gives its minibatches in the order of collection, and counts.

    :param label: an argument of its own
    """

    def __init__(self, *args: Any, label: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label
        self.sizes: list[int] = []

    def get(self, batch_size: int | None = None) -> Any:
        super().get(batch_size).__next__()  # flattens the arrays
        for start in range(0, self.buffer_size * self.n_envs, batch_size):
            samples = self._get_samples(np.arange(start, start + batch_size))
            self.sizes.append(len(samples.advantages))
            yield samples


def test_own_buffer(algo: Algorithm) -> None:
    kwargs = {"rollout_buffer_class": OrderedBuffer, "rollout_buffer_kwargs": {"label": "mine"}}
    model = algo.make(SpaceEnv(), **kwargs)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    assert type(model.rollout_buffer) is OrderedBuffer
    assert model.rollout_buffer.label == "mine"
    assert set(model.rollout_buffer.sizes) == {8}
    assert len(model.rollout_buffer.sizes) >= 2 * 2 * 2  # iterations, epochs, minibatches


class ConstantValue(ActorCriticPolicy):
    """
    :param value: that it predicts for every state during collection
    """

    def __init__(self, *args: Any, value: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value = value

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, th.full_like(values, self.value), log_prob

    def predict_values(self, obs: Any) -> th.Tensor:
        return th.full_like(super().predict_values(obs), self.value)


class BufferCopy(BaseCallback):
    """
    Keeps returns and advantages as they were collected.
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.returns, self.advantages = buffer.returns.flatten().copy(), buffer.advantages.flatten().copy()


# Episodes of four steps, a reward of 1 in the last one, γ = 0.5.
GAE_CASES: dict[str, tuple[bool, float, float, list[float]]] = {
    # truncated, λ, value V, returns of the four steps
    "rewards_only": (False, 1.0, 0.0, [0.125, 0.25, 0.5, 1.0]),
    "value_does_not_matter": (False, 1.0, 1.0, [0.125, 0.25, 0.5, 1.0]),
    # One-step returns: 0 + 0.5 V, three times, then 1
    "one_step": (False, 0.0, 2.0, [1.0, 1.0, 1.0, 1.0]),
    # δ = 0.5·2 − 2 = −1 three times, then 1 − 2 = −1; λγ = 0.25: −1, −1.25, −1.3125, −1.328125 from the end
    "between": (False, 0.5, 2.0, [2 - 1.328125, 2 - 1.3125, 2 - 1.25, 2 - 1.0]),
    # The reward of a truncated episode gets γ V on top: 1 + 0.5·2 = 2, then halved
    "truncated": (True, 1.0, 2.0, [0.25, 0.5, 1.0, 2.0]),
}


@pytest.mark.parametrize("case", GAE_CASES)
@pytest.mark.parametrize("n_episodes", [1, 3])
def test_returns_and_advantages(algo: Algorithm, case: str, n_episodes: int) -> None:
    truncates, gae_lambda, value, returns = GAE_CASES[case]
    model = algo.make(
        EpisodeEnv(truncates),
        policy=algo.derived(ConstantValue),
        policy_kwargs={"value": value},
        n_steps=4 * n_episodes,
        batch_size=4,
        gamma=0.5,
        gae_lambda=gae_lambda,
    )
    collected = BufferCopy()
    model.learn(4 * n_episodes, callback=collected)
    assert collected.returns == pytest.approx(returns * n_episodes)
    assert collected.advantages == pytest.approx(np.array(returns * n_episodes) - value)


def test_an_unfinished_episode_is_bootstrapped(algo: Algorithm) -> None:
    model = algo.make(
        EpisodeEnv(),
        policy=algo.derived(ConstantValue),
        policy_kwargs={"value": 8.0},
        n_steps=3,
        batch_size=3,
        gamma=0.5,
    )
    collected = BufferCopy()
    model.gae_lambda = model.rollout_buffer.gae_lambda = 1.0
    model.learn(3, callback=collected)
    assert collected.returns == pytest.approx([1.0, 2.0, 4.0])


@pytest.mark.long
def test_infinite_horizon(algo: Algorithm) -> None:
    # One state, a reward of 1 in every step, episodes cut after 8 steps: the value is 1/(1 − γ) = 5 only if the
    # cut is no end.
    env = SpaceEnv(spaces.Discrete(1), reward=1.0)
    model = algo.make(env, gamma=0.8, batch_size=16, learning_rate=0.05, n_epochs=4, policy_kwargs={"net_arch": []})
    model.learn(640)
    assert model.policy.predict_values(th.zeros(1, 1)).item() == pytest.approx(5, abs=0.5)
