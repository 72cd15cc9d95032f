"""The dense networks of SB3's MlpPolicy with a backward pass of their own: the results of autograd up to rounding."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from sb3_ppo_ewma import PPGEWMA, PPOEWMA, losses
from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma._engine.flat_mlp import FlatMlp
from sb3_ppo_ewma._engine.mlp import MlpPolicy, is_mlp_policy
from tests.battery.envs import ACTION_SPACES, OBSERVATION_SPACES, VECTOR, SpaceEnv
from tests.battery.helpers import copy_parameters, record_log, unchanged

ARCHITECTURES: dict[str, Any] = {
    "default": None,
    "none": [],
    "one": [5],
    "different": {"pi": [7, 6], "vf": [4]},
    "no actor layer": {"pi": [], "vf": [4]},
}
N = 9


def build(actions: str = "discrete", **kwargs: Any) -> Any:
    """:return: a policy, far from uniform"""
    th.manual_seed(0)
    policy = ActorCriticPolicy(VECTOR, ACTION_SPACES[actions], lambda _: 0.01, **{"net_arch": [6], **kwargs})
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    return policy


def chosen_actions(actions: str, dtype: th.dtype) -> th.Tensor:
    """:return: as training has them"""
    if actions == "discrete":
        return th.arange(N) % 3
    return th.randn((N, *ACTION_SPACES[actions].shape), dtype=dtype).reshape(N, -1)


# ---------------------------------------------------------------------- one backward pass


@pytest.mark.parametrize("dtype", [th.float32, th.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("actions", ["discrete", "box", "box_matrix"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ent_coef", [None, 0.3])
def test_gradients(
    architecture: str, activation: type[nn.Module], actions: str, dtype: th.dtype, ent_coef: float | None
) -> None:
    policy = build(actions, net_arch=ARCHITECTURES[architecture], activation_fn=activation).to(dtype)
    obs, chosen = th.randn(N, 3, dtype=dtype), chosen_actions(actions, dtype)
    weights, value_weights = th.randn(2, N, dtype=dtype)

    # It casts to float32
    with (
        patch("stable_baselines3.common.policies.preprocess_obs", lambda obs, *_, **__: obs),
        patch("sb3_ppo_ewma._engine.forward.preprocessing", lambda *_: lambda obs: obs),
    ):
        mlp = MlpPolicy(policy)
        values, log_prob, entropy = policy.evaluate_actions(obs, chosen)
        objective = (
            (weights * log_prob).sum() + (value_weights * values.flatten()).sum() + (ent_coef or 0) * entropy.sum()
        )
        reference = th.autograd.grad(objective, list(policy.parameters()))

        with th.no_grad():
            actor, critic, _ = mlp.networks(mlp.parameters, quick=True)
            flat = FlatMlp(mlp, None)
            outputs, state_values = actor.forward(mlp.features(obs)), critic.forward(mlp.features(obs))
            parameters = forward.distribution(policy, outputs[-1])
            own_entropy = forward.entropy(policy, parameters)
            # It takes the derivative of a loss
            action_gradients = flat._action_gradients(parameters, chosen, weights, ent_coef and -ent_coef * N)
            value_gradients = value_weights.unsqueeze(1)
            gradient = flat._backward((actor, outputs, *action_gradients), (critic, state_values, value_gradients))
            assert mlp.outputs(obs)[0].dtype == dtype
            own_log_prob = mlp.log_prob(obs, chosen)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == th.float64 else {"rtol": 1e-4, "atol": 2e-5}
    th.testing.assert_close((own_log_prob, own_entropy, state_values[-1]), (log_prob, entropy, values), **tolerance)
    by_parameter = dict(zip(map(id, mlp.parameters), flat._views(gradient), strict=True))
    own = [by_parameter[id(parameter)] for parameter in policy.parameters()]
    th.testing.assert_close(own, list(reference), **tolerance)


@pytest.mark.parametrize("clip_range_vf", [None, 0.5])
def test_gradient_of_the_value_loss(clip_range_vf: float | None) -> None:
    th.manual_seed(0)
    values, old_values, returns = th.randn(3, 50, dtype=th.float64)
    values.requires_grad_()
    bounds: dict[str, Any] = {"old_values": old_values, "clip_range_vf": clip_range_vf}
    losses.value_loss(values, returns, **bounds).backward()
    errors, half_gradient = losses.value_errors(values.detach(), returns, **bounds)
    th.testing.assert_close(2 * half_gradient / 50, values.grad, rtol=1e-12, atol=1e-12)
    th.testing.assert_close((errors**2).mean(), losses.value_loss(values.detach(), returns, **bounds))
    assert (half_gradient == 0).any() == (clip_range_vf is not None)


# ---------------------------------------------------------------------- whole runs


def train(cls: Any = PPOEWMA, actions: str = "discrete", observations: str = "vector", **kwargs: Any) -> Any:
    """:return: the model after some iterations, its log"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 6, "n_epochs": 2, "learning_rate": 0.01, "seed": 0}
    defaults["policy_kwargs"] = {"net_arch": [6]}
    env = SpaceEnv(OBSERVATION_SPACES[observations], actions, episode_length=5)
    model = cls("MlpPolicy", env, **{**defaults, **kwargs})
    rows = record_log(model)
    return model.learn(64), rows


def logged(rows: list[tuple[int, dict[str, Any]]]) -> list[dict[str, float]]:
    """:return: what was logged of training"""
    return [{key: value for key, value in row.items() if key.startswith("train/")} for _, row in rows]


# The divergence's gradient is 0 at first, and Adam enlarges rounding errors: hence the small learning rate
PHASIC = {"cls": PPGEWMA, "n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 7, "aux_learning_rate": 5e-5}
RUNS: dict[str, dict[str, Any]] = {
    "discrete": {},
    "box": {"actions": "box"},
    "box_matrix": {"actions": "box_matrix", "observations": "matrix"},
    "discrete observations": {"observations": "discrete"},
    "float64 observations": {"observations": "vector_float64"},
    "relu": {"policy_kwargs": {"activation_fn": nn.ReLU, "net_arch": {"pi": [6], "vf": [5, 4]}}, "actions": "box"},
    "no layers": {"policy_kwargs": {"net_arch": []}},
    "default layers": {"policy_kwargs": {}},
    "unshared extractors": {"policy_kwargs": {"net_arch": [6], "share_features_extractor": False}},
    "entropy": {"ent_coef": 0.1, "vf_coef": 0.9},
    "entropy box": {"ent_coef": 0.1, "actions": "box", "vf_coef": 0.9},
    "clip_range_vf": {"clip_range_vf": 0.1, "ent_coef": 0.05},
    "penalty": {"kl_coef": 0.5, "clip_range": None, "actions": "box"},
    "both": {"kl_coef": 0.5, "clip_range": 0.01},
    "no EWMA": {"prox_decay": None, "clip_range": 0.01},
    "value epochs": {"n_epochs_value": 3, "actions": "box"},
    "small norm": {"max_grad_norm": 0.05},
    "target_kl": {"target_kl": 1e-4, "n_epochs": 5},
    "advantages": {"advantage_decay": 0.5, "recompute_advantages": True},
    "stale": {"staleness": 1, "staleness_mode": "proximal", "prox_decay": None},
    "phasic": {**PHASIC, "actions": "box"},
    "phasic detached": {**PHASIC, "policy_kwargs": {"net_arch": [6], "critic_arch": "detach"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_training_as_with_autograd(name: str) -> None:
    with patch.object(FlatMlp, "loss_terms", autospec=True, side_effect=FlatMlp.loss_terms) as loss_terms:
        own, own_rows = train(**RUNS[name])
        n_calls = loss_terms.call_count
        with patch("sb3_ppo_ewma.ppo_ewma.is_mlp_policy", lambda *_, **__: False):
            reference, rows = train(**RUNS[name])
        assert (n_calls > 0) == (name != "value epochs")
        assert loss_terms.call_count == n_calls
    th.testing.assert_close(copy_parameters(own), copy_parameters(reference), rtol=1e-4, atol=1e-5)
    if own.policy_ewma is not None:
        averages = [dict(model.policy_ewma.state_dict()) for model in (own, reference)]
        th.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
    assert [row.keys() for row in logged(own_rows)] == [row.keys() for row in logged(rows)]
    for own_row, row in zip(logged(own_rows), logged(rows), strict=True):
        assert own_row == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert own._n_updates == reference._n_updates


# ---------------------------------------------------------------------- which policies


class LinearExtractor(BaseFeaturesExtractor):
    """Has parameters."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layer = nn.Linear(3, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layer(observations)
        return features


def share_weights(policy: Any) -> None:
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight


def share_layers(policy: Any) -> None:
    policy.mlp_extractor.value_net = policy.mlp_extractor.policy_net


def leave_out_a_bias(policy: Any) -> None:
    policy.action_net = nn.Linear(6, 3, bias=False)


def add_a_layer(policy: Any) -> None:
    policy.mlp_extractor.policy_net.append(nn.Dropout(0.5))


def layer(policy: Any) -> nn.Linear:
    first: nn.Linear = policy.mlp_extractor.policy_net[0]
    return first


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on the policy": lambda policy: policy.register_forward_hook(lambda *_: None),
    "hook on a layer": lambda policy: layer(policy).register_forward_hook(lambda *_: None),
    "hook before a layer": lambda policy: layer(policy).register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda policy: policy.value_net.register_full_backward_hook(lambda *_: None),
    "hook before backward": lambda policy: policy.value_net.register_full_backward_pre_hook(lambda *_: None),
    "hook of a parameter": lambda policy: layer(policy).weight.register_hook(lambda gradient: gradient),
    "hook after accumulation": lambda policy: layer(policy).bias.register_post_accumulate_grad_hook(lambda _: None),
    "shared weights": share_weights,
    "shared layers": share_layers,
    "no bias": leave_out_a_bias,
    "another layer": add_a_layer,
    "spectral norm": lambda policy: parametrizations.spectral_norm(layer(policy)),
    "weight norm": lambda policy: weight_norm(layer(policy)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_policies_are_left_to_autograd(change: str) -> None:
    policy = build()
    assert is_mlp_policy(policy)
    CHANGES[change](policy)
    assert not is_mlp_policy(policy)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"activation_fn": nn.LeakyReLU},
        {"activation_fn": nn.ELU},
        {"actions": "multidiscrete"},
        {"actions": "multibinary"},
        {"actions": "box", "use_sde": True},
        {"features_extractor_class": LinearExtractor},
    ],
    ids=str,
)
def test_other_policies_are_left_to_autograd(kwargs: dict[str, Any]) -> None:
    assert not is_mlp_policy(build(**kwargs))


FROZEN = {
    "layer": ["mlp_extractor.policy_net.0.weight", "mlp_extractor.policy_net.0.bias"],
    "head": ["action_net.weight", "action_net.bias"],
    "log_std": ["log_std"],
    "critic's layers": ["mlp_extractor.value_net.0.weight", "mlp_extractor.value_net.0.bias"],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("policy_kwargs", [{}, {"optimizer_kwargs": {"eps": 1e-5}}], ids=["default", "given"])
def test_frozen_parameters_stay(policy_kwargs: dict[str, Any], frozen: list[str]) -> None:
    env, policy_kwargs = SpaceEnv(action_space="box"), {"net_arch": [6], **policy_kwargs}
    model = PPOEWMA("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=1, seed=0, policy_kwargs=policy_kwargs)
    for name in frozen:
        model.policy.get_parameter(name).requires_grad_(False)
    before = copy_parameters(model)
    model.learn(32)
    assert unchanged(model, before) == frozen


def test_a_hook_on_gradients_is_applied() -> None:
    model = PPOEWMA("MlpPolicy", SpaceEnv(), n_steps=16, batch_size=8, n_epochs=1, seed=0)
    layer(model.policy).weight.register_hook(th.zeros_like)
    before = copy_parameters(model)
    after = copy_parameters(model.learn(16))
    name = "mlp_extractor.policy_net.0.weight"
    assert th.equal(before.pop(name), after.pop(name))
    assert not any(th.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("trained", ["value", "policy"])
@pytest.mark.parametrize("action_space", ["box", "multidiscrete"])
@pytest.mark.parametrize("policy_kwargs", [{}, {"optimizer_kwargs": {"eps": 1e-5}}], ids=["default", "given"])
def test_only_one_network_is_trained(trained: str, action_space: str, policy_kwargs: dict[str, Any]) -> None:
    env = SpaceEnv(action_space=action_space)
    model = PPOEWMA("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=1, seed=0, policy_kwargs=policy_kwargs)
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(("value" in name) == (trained == "value"))
    frozen = [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad]
    before = copy_parameters(model)
    model.learn(32)
    assert unchanged(model, before) == frozen
