"""
Policies with other networks, optimisers and overridden methods.
"""

import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from torch import nn

from tests.battery.algorithms import Algorithm
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv, box_env
from tests.battery.helpers import assert_trained, copy_parameters


def assert_trains(algo: Algorithm, env: Any = None, **kwargs: Any) -> Any:
    """:return: the trained model"""
    model = algo.make(env or SpaceEnv(), **kwargs)
    before = copy_parameters(model)
    model.learn(48)
    assert_trained(model, before)
    return model


@pytest.mark.parametrize(
    "net_arch",
    [[], [4], [4, 4], {"vf": [16], "pi": [8]}, {"vf": [8, 4], "pi": [8]}, {"vf": [8], "pi": [8, 4]}, {"pi": [8]}, {}],
    ids=str,
)
def test_net_arch(algo: Algorithm, net_arch: Any) -> None:
    assert_trains(algo, policy_kwargs={"net_arch": net_arch})


def test_net_arch_of_the_old_format(algo: Algorithm) -> None:
    with pytest.warns(UserWarning, match="shared layers in the mlp_extractor are removed"):
        assert_trains(algo, policy_kwargs={"net_arch": [{"vf": [8], "pi": [4]}]})


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"),
    [
        (th.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3}),
        (th.optim.AdamW, None),
        (th.optim.AdamW, {"weight_decay": 0.1}),
        (th.optim.RMSprop, {"alpha": 0.9, "momentum": 0.5}),
        (th.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (RMSpropTFLike, {"eps": 1e-5}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_optimizer(algo: Algorithm, optimizer_class: Any, optimizer_kwargs: Any) -> None:
    policy_kwargs = {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = assert_trains(algo, policy_kwargs=policy_kwargs)
    assert type(model.policy.optimizer) is optimizer_class
    for key, value in (optimizer_kwargs or {}).items():
        assert model.policy.optimizer.param_groups[0][key] == value


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU, nn.ELU])
@pytest.mark.parametrize("ortho_init", [True, False])
def test_network_arguments(algo: Algorithm, activation_fn: type[nn.Module], ortho_init: bool) -> None:
    policy_kwargs = {"activation_fn": activation_fn, "ortho_init": ortho_init, "log_std_init": -1.0, "net_arch": [32]}
    model = assert_trains(algo, box_env(), policy_kwargs=policy_kwargs)
    assert isinstance(model.policy.mlp_extractor.policy_net[1], activation_fn)


class ScaledExtractor(BaseFeaturesExtractor):
    """
    A linear layer and a constant that is no parameter.

    :param observation_space: of the environment
    :param features_dim: number of features
    :param scale: of the observations
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int, scale: float) -> None:
        super().__init__(observation_space, features_dim)
        self.scale = scale
        self.layer = nn.Linear(observation_space.shape[0], features_dim)
        self.register_buffer("offset", th.ones(1), persistent=False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(self.scale * observations) + self.offset)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_features_extractor(algo: Algorithm, share: bool) -> None:
    policy_kwargs = {
        "features_extractor_class": ScaledExtractor,
        "features_extractor_kwargs": {"features_dim": 5, "scale": 2.0},
        **algo.sharing(share),
    }
    model = assert_trains(algo, policy_kwargs=policy_kwargs)
    assert (model.policy.pi_features_extractor is model.policy.vf_features_extractor) == share
    assert model.policy.pi_features_extractor.scale == 2.0


@pytest.mark.long
@pytest.mark.parametrize("space", ["image_channels_last", "dict"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_extractors_of_images(algo: Algorithm, space: str, share: bool) -> None:
    env = SpaceEnv(OBSERVATION_SPACES[space])
    model = assert_trains(algo, env, policy_kwargs=algo.sharing(share))
    actor, critic = (
        list(e.parameters()) for e in (model.policy.pi_features_extractor, model.policy.vf_features_extractor)
    )
    assert all(th.equal(a, b) == share for a, b in zip(actor, critic, strict=True))


def test_extractor_of_another_kind(algo: Algorithm) -> None:
    env = SpaceEnv(OBSERVATION_SPACES["image_channels_last"])
    policy_kwargs = {"features_extractor_class": FlattenExtractor, "features_extractor_kwargs": {}}
    assert_trains(algo, env, policy="MlpPolicy", policy_kwargs=policy_kwargs)
    policy_kwargs = {"features_extractor_class": NatureCNN, "features_extractor_kwargs": {"features_dim": 8}}
    assert_trains(algo, env, policy="MlpPolicy", policy_kwargs=policy_kwargs)


class Counting(ActorCriticPolicy):
    """
    Overrides the methods that collection and training call, and counts the calls.
    """

    def __init__(self, *args: Any, offset: float = 0.0, **kwargs: Any) -> None:
        self.offset = offset
        super().__init__(*args, **kwargs)
        self.calls = {"forward": 0, "evaluate_actions": 0, "predict_values": 0}

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        self.calls["forward"] += 1
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + self.offset, log_prob

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        self.calls["evaluate_actions"] += 1
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values + self.offset, log_prob, entropy

    def predict_values(self, obs: Any) -> th.Tensor:
        self.calls["predict_values"] += 1
        return super().predict_values(obs) + self.offset


def test_overridden_methods_are_called(algo: Algorithm) -> None:
    model = assert_trains(algo, policy=algo.derived(Counting), policy_kwargs={"offset": 3.0})
    calls = model.policy.calls
    assert model.policy.offset == 3.0
    assert calls["forward"] == 48
    # Three iterations of at least two epochs of two minibatches; the end of each rollout and of six episodes
    assert calls["evaluate_actions"] >= 3 * 2 * 2
    assert calls["predict_values"] >= 3 + 6


def test_overridden_evaluation_decides_what_is_learned(algo: Algorithm) -> None:
    # Values that are 100 too high for the rewards of 0 must come down in training, and only there.
    class Wrong(Counting):
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values + 100.0, log_prob, entropy

    losses = []
    for policy in (Counting, Wrong):
        model = algo.make(SpaceEnv(reward=0.0), policy=algo.derived(policy)).learn(16)
        losses.append(model.logger.name_to_value["train/value_loss"])
    assert losses[0] < 10
    assert 80**2 < losses[1] < 120**2


class WithOwnNetworks(ActorCriticPolicy):
    """
    Builds its own networks.
    """

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnNetworks(self.features_dim)


class OwnNetworks(nn.Module):
    """
    :param features_dim: number of features
    """

    latent_dim_pi, latent_dim_vf = 6, 4

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(features_dim, 6)
        self.critic = nn.Linear(6, 4)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.trunk(features))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.critic(th.tanh(self.trunk(features))))


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}], ids=["plain", "sde"])
def test_own_networks(algo: Algorithm, kwargs: dict[str, Any]) -> None:
    policy_kwargs = algo.sharing(True)  # it is the own networks that would have to detach
    model = assert_trains(algo, box_env(), policy=algo.derived(WithOwnNetworks), policy_kwargs=policy_kwargs, **kwargs)
    assert isinstance(model.policy.mlp_extractor, OwnNetworks)


class PartlyFrozen(ActorCriticPolicy):
    """
    Has parameters that are not trained and modules that are not used.
    """

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.unused = nn.Linear(2, 2)
        self.mlp_extractor.value_net[0].requires_grad_(False)


def test_frozen_and_unused_parameters_stay(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv(), policy=algo.derived(PartlyFrozen))
    before = copy_parameters(model)
    model.learn(32)
    after = model.policy.state_dict()
    still = {name for name, value in before.items() if th.equal(value, after[name])}
    frozen = {"mlp_extractor.value_net.0.weight", "mlp_extractor.value_net.0.bias"}
    assert still == frozen | {"unused.weight", "unused.bias"}
    if algo.has_average:
        average = model.proximal_policy.state_dict()
        assert all(th.allclose(before[name], average[name]) for name in still)


def test_policy_object_is_pickled(algo: Algorithm) -> None:
    model = algo.make(SpaceEnv(), policy=algo.derived(Counting)).learn(16)
    copy = pickle.loads(cloudpickle.dumps(model.policy))  # as SB3 does with the class
    observation = np.ones((5, 3), np.float32)
    assert np.array_equal(
        copy.predict(observation, deterministic=True)[0], model.predict(observation, None, None, True)[0]
    )
