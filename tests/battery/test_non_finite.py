"""
NaN and Inf end training with an error that names the quantity, and the parameters stay the last good ones.
"""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.distributions import Categorical

from sb3_ppo_ewma import PPOEWMA
from tests.battery.algorithms import QUICK, Algorithm, policy_name
from tests.battery.envs import VECTOR, BrokenEnv, SpaceEnv
from tests.battery.helpers import assert_same, assert_trained, copy_parameters, record_log

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


class RolloutStart(BaseCallback):
    """
    Keeps the parameters that every rollout starts with.
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.last_good = copy_parameters(self.model)


def assert_finite(model: Any) -> None:
    """Policy and average are."""
    policies = [model.policy, model.proximal_policy]
    assert all(th.isfinite(p).all() for policy in policies if policy is not None for p in policy.parameters())


@pytest.mark.long
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantity", ["observation", "reward"])
@pytest.mark.parametrize("step", [3, 16 + 5, 16 + 15, 32])
def test_environment(own_algo: Algorithm, quantity: str, value: float, step: int) -> None:
    # In the first rollout, in the second one, in its last step but one, in the last
    model = own_algo.make(BrokenEnv(quantity, value, step))
    start = RolloutStart()
    with pytest.raises(ValueError, match=f"NaN or Inf in .*{quantity}"):
        model.learn(64, callback=start)
    assert model.num_timesteps <= 32
    assert model._n_updates == 2 * (model.num_timesteps > 16)
    assert_same(copy_parameters(model), start.last_good)
    assert_finite(model)
    # Nothing is broken: training goes on in an environment that works.
    model.set_env(SpaceEnv())
    assert model.learn(16).num_timesteps == 16


class NanEnv(SpaceEnv):
    """
    Every second observation has NaN in its last entry.

    :param key: of a dictionary of two vectors, which has the NaN; ``None``: the observation is a vector
    """

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        super().__init__(VECTOR if key is None else spaces.Dict({"first": VECTOR, "second": VECTOR}))

    def observation(self) -> Any:
        observation = super().observation()
        if self.n_steps % 2 == 1:
            (observation if self.key is None else observation[self.key])[-1] = np.nan
        return observation


class FirstExtractor(BaseFeaturesExtractor):
    """Reads one of two vectors."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, 3)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return observations["first"]


class NanToNum(BaseFeaturesExtractor):
    """Replaces NaN by 0."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layer(th.nan_to_num(observations))
        return features


@pytest.mark.parametrize(("key", "extractor"), [("second", FirstExtractor), (None, NanToNum)])
def test_nan_that_does_not_reach_the_losses(algo: Algorithm, key: str | None, extractor: Any) -> None:
    policy_kwargs = {"features_extractor_class": extractor, "features_extractor_kwargs": {}}
    model = algo.make(NanEnv(key), policy_kwargs=policy_kwargs)
    before = copy_parameters(model)
    model.learn(32)
    assert_trained(model, before)
    if not algo.own:
        return
    # As SB3's PPO, to the bit
    policy_kwargs["net_arch"] = [8]
    name = policy_name(NanEnv(key).observation_space)
    ppo, own = (
        cls(name, NanEnv(key), **QUICK, policy_kwargs=policy_kwargs, **kwargs).learn(48)
        for cls, kwargs in ((PPO, {}), (PPOEWMA, {"prox_decay": None, "engine": "reference"}))
    )
    assert_same(copy_parameters(ppo), copy_parameters(own))


@pytest.mark.parametrize("key", ["first", "second"])
def test_nan_in_a_dictionary_that_reaches_the_network(own_algo: Algorithm, key: str) -> None:
    model = own_algo.make(NanEnv(key))
    before = copy_parameters(model)
    with pytest.raises(ValueError, match=r"NaN or Inf in .*observations.* the environment"):
        model.learn(32)
    assert_same(copy_parameters(model), before)


class Breaking(ActorCriticPolicy):
    """
    Returns NaN in training, from some call on.
    """

    def __init__(self, *args: Any, quantity: int, call: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantity, self.call, self.good = quantity, call, []

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        if not th.is_grad_enabled():
            return super().evaluate_actions(obs, actions)
        self.good.append({name: value.clone() for name, value in self.state_dict().items()})
        result = list(super().evaluate_actions(obs, actions))
        if len(self.good) >= self.call:
            result[self.quantity] = result[self.quantity] * float("nan")
        return result


@pytest.mark.parametrize(
    ("quantity", "name"), [(0, "values"), (1, "log-probabilities"), (2, "entropy")], ids=lambda value: str(value)
)
@pytest.mark.parametrize("call", [1, 3])
def test_network_in_training(own_algo: Algorithm, quantity: int, name: str, call: int) -> None:
    policy_kwargs = {"quantity": quantity, "call": call}
    # Every minibatch has all three losses.
    kwargs = {"n_epochs_value": None, "ent_coef": 0.01, "policy_kwargs": policy_kwargs}
    model = own_algo.make(SpaceEnv(), policy=own_algo.derived(Breaking), **kwargs)
    with pytest.raises(ValueError, match=f"NaN or Inf in {name}"):
        model.learn(64)
    assert len(model.policy.good) == call
    assert_same(copy_parameters(model), model.policy.good[-1])
    assert_finite(model)


class BreakingInPhase(ActorCriticPolicy):
    """
    Returns NaN in the auxiliary phase, from some call on.
    """

    def __init__(self, *args: Any, quantity: int, call: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantity, self.call, self.good = quantity, call, []

    def evaluate_auxiliary(self, obs: Any) -> Any:
        self.good.append({name: value.clone() for name, value in self.state_dict().items()})
        result = list(super().evaluate_auxiliary(obs))
        if len(self.good) >= self.call:
            if self.quantity == 0:
                # As the forward pass returns it, not as it left it in the policy
                logits = th.full_like(result[0].distribution.logits, float("nan")).requires_grad_()
                result[0] = CategoricalDistribution(logits.shape[-1])
                result[0].distribution = Categorical(logits=logits, validate_args=False)
            else:
                result[self.quantity] = result[self.quantity] * float("nan")
        return result


@pytest.mark.parametrize(
    ("quantity", "name"),
    [(0, "KL divergence of the auxiliary phase"), (1, "values"), (2, "auxiliary values")],
    ids=["distribution", "values", "auxiliary"],
)
@pytest.mark.parametrize("call", [1, 3])
def test_network_in_auxiliary_phase(phasic_algo: Algorithm, quantity: int, name: str, call: int) -> None:
    policy = phasic_algo.derived(BreakingInPhase)
    model = phasic_algo.make(SpaceEnv(), policy=policy, policy_kwargs={"quantity": quantity, "call": call})
    with pytest.raises(ValueError, match=f"NaN or Inf in {name} after"):
        model.learn(64)
    assert model.num_timesteps == 32
    assert len(model.policy.good) == call
    assert_same(copy_parameters(model), model.policy.good[-1])
    assert_finite(model)
    # The model is intact: training continues once the parameters are finite again.
    model.policy.call = 1000
    assert model.learn(48).num_timesteps == 48


@pytest.mark.parametrize("network", ["action_net", "value_net"])
def test_network_in_collection(own_algo: Algorithm, network: str) -> None:
    model = own_algo.make(SpaceEnv()).learn(16)
    with th.no_grad():
        getattr(model.policy, network).bias[0] = np.nan
    before = copy_parameters(model)
    # A value that is NaN first shows in the rewards of truncated episodes, which it is added to.
    quantity = {"action_net": "parameter 'action_net.bias'", "value_net": "value"}[network]
    with pytest.raises(ValueError, match=f"NaN or Inf in .*{quantity}"):
        model.learn(16)
    after = copy_parameters(model)
    assert all(th.equal(th.nan_to_num(value), th.nan_to_num(before[name])) for name, value in after.items())


def test_gradients_that_overflow(own_algo: Algorithm) -> None:
    model = own_algo.make(SpaceEnv(), learning_rate=1e-3)
    with th.no_grad():  # finite values whose squared error is not
        model.policy.value_net.weight.fill_(1e25)
    before = copy_parameters(model)
    with pytest.raises(ValueError, match="NaN or Inf in"):
        model.learn(16)
    assert_same(copy_parameters(model), before)


@pytest.mark.parametrize("action_space", ["discrete", "multidiscrete", "multibinary"])
def test_probabilities_that_underflow(own_algo: Algorithm, action_space: str) -> None:
    """Huge steps make actions so unlikely that float32 has no probability for them; training goes on."""
    model = own_algo.make(SpaceEnv(action_space=action_space), learning_rate=30.0, n_epochs=4, max_grad_norm=1e9)
    rows = record_log(model)
    model.learn(64)
    trained = [row for _, row in rows if "train/loss" in row]
    # The mean of -log(π_θ/π_behav), nearly; exp(-88) is the smallest normal number of float32.
    assert max(row["train/approx_kl"] for row in trained) > 88
    assert all(np.isfinite(row["train/loss"]) for row in trained)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
