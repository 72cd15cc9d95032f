"""
Predictions.
"""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import get_device

from tests.battery.algorithms import Algorithm
from tests.battery.envs import ACTION_SPACES, OBSERVATION_SPACES, SpaceEnv
from tests.battery.helpers import assert_same, auxiliary_head


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("observation_space", ["vector", "discrete", "image_channels_last", "dict"])
def test_shapes(algo: Algorithm, observation_space: str, action_space: str) -> None:
    env = SpaceEnv(OBSERVATION_SPACES[observation_space], action_space)
    model = algo.make(env)
    observation = env.observation()
    action, state = model.predict(observation)
    assert isinstance(action, np.ndarray)
    assert action.shape == env.action_space.shape
    assert state is None
    if isinstance(observation, dict):
        batch = {key: np.stack([value, value]) for key, value in observation.items()}
    else:
        batch = np.stack([observation, observation])
    for deterministic in (False, True):
        actions, state = model.predict(batch, deterministic=deterministic)
        assert actions.shape == (2, *env.action_space.shape)
        assert state is None
    assert np.allclose(actions[0], actions[1])  # the last one was deterministic


def test_state_is_passed_through(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv())
    state = (np.zeros(3), np.ones(2))
    _, after = model.predict(np.zeros(3, np.float32), state=state, episode_start=np.ones(1, bool))
    assert after is state


def test_deterministic_actions_are_the_mode(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv()).learn(16)
    observation = np.ones(3, np.float32)
    with th.no_grad():
        probabilities = model.policy.get_distribution(th.ones(1, 3)).distribution.probs
    assert model.predict(observation, deterministic=True)[0] == probabilities.argmax().item()
    samples, _ = model.predict(np.ones((4000, 3), np.float32))
    shares = np.bincount(samples, minlength=3) / 4000
    # Five standard deviations of a share of 4000 samples are at most 0.04.
    assert shares == pytest.approx(probabilities.numpy()[0], abs=0.04)


def test_values_and_distribution_agree(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv(action_space="box")).learn(16)
    observations, actions = th.rand(5, 3), th.rand(5, 2)
    with th.no_grad():
        values, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
        assert th.allclose(values, model.policy.predict_values(observations))
        distribution = model.policy.get_distribution(observations)
        assert th.allclose(log_prob, distribution.log_prob(actions))
        assert th.allclose(entropy, distribution.entropy())


def test_wrong_observations_are_refused(algo: Algorithm) -> None:
    env = SpaceEnv()
    model = algo.make(env)
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.predict(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(env.reset())


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda"])
@pytest.mark.filterwarnings("ignore:You are trying to run")
def test_device(algo: Algorithm, device: str) -> None:
    if device == "cuda" and not th.cuda.is_available():
        pytest.skip("no CUDA device")
    model = algo.make(SpaceEnv(), device=device).learn(16)
    assert model.device.type == model.policy.device.type == get_device(device).type
    assert model.predict(np.zeros(3, np.float32))[0].shape == ()


def test_average_can_be_predicted_with(average_algo: Algorithm) -> None:
    for space in ("vector", "image_channels_last", "dict"):
        env = SpaceEnv(OBSERVATION_SPACES[space], "box")
        start = average_algo.make(env).policy.state_dict()
        model = average_algo.make(env).learn(48)
        average = model.proximal_policy
        assert type(average) is type(model.policy)
        action, _ = average.predict(env.observation(), deterministic=True)
        assert env.action_space.contains(action)
        # It lags behind the policy, but it has moved away from the start as well.
        now = model.policy.state_dict()
        for name, value in average.state_dict().items():
            assert not th.equal(value, start[name]), name
            # The last auxiliary phase was after 32 steps, and the average then began anew.
            assert th.equal(value, now[name]) == (name in auxiliary_head(now)), name


def test_average_without_memory_is_the_policy(own_algo: Algorithm) -> None:
    model = own_algo.make(SpaceEnv(action_space="box"), prox_decay=0.0).learn(32)
    assert_same(dict(model.proximal_policy.state_dict()), dict(model.policy.state_dict()))
