"""SB3's policies without distribution objects: the same values, gradients and random numbers as from their methods."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from torch.distributions import kl_divergence

from sb3_ppo_ewma import PPOEWMA, PPGPolicy
from sb3_ppo_ewma._engine import forward
from tests.battery.envs import ACTION_SPACES, OBSERVATION_SPACES, VECTOR, SpaceEnv

IMAGE = OBSERVATION_SPACES["image_channels_first"]
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR, "discrete": spaces.Discrete(4)})
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 6}}
SMALL_CNNS = {"features_extractor_kwargs": {"cnn_output_dim": 6}}
POLICIES: dict[str, tuple[type[ActorCriticPolicy], spaces.Space, dict[str, Any]]] = {
    "vector": (ActorCriticPolicy, VECTOR, {}),
    "discrete": (ActorCriticPolicy, OBSERVATION_SPACES["discrete"], {"share_features_extractor": False}),
    "image": (ActorCriticCnnPolicy, IMAGE, SMALL_CNN),
    "unshared image": (ActorCriticCnnPolicy, IMAGE, {**SMALL_CNN, "share_features_extractor": False}),
    "dict": (MultiInputActorCriticPolicy, DICT, SMALL_CNNS),
    "unshared dict": (MultiInputActorCriticPolicy, DICT, {**SMALL_CNNS, "share_features_extractor": False}),
    "dual": (PPGPolicy, VECTOR, {"critic_arch": "dual", "trunk_arch": [5]}),
    "detach": (PPGPolicy, VECTOR, {"critic_arch": "detach", "trunk_arch": [5]}),
    "shared": (PPGPolicy, VECTOR, {"critic_arch": "shared", "trunk_arch": [5]}),
    "softplus": (PPGPolicy, VECTOR, {"std_activation": "softplus"}),
}
ACTIONS = ["box", "box_matrix", "discrete", "multidiscrete", "multibinary"]
PHASIC = ["dual", "detach", "shared"]
N = 7


def combinations(*names: str) -> Any:
    """:return: marks a test to run with these policies and all their actions"""
    pairs = [(name, actions) for name in names for actions in (ACTIONS if name != "softplus" else ["box"])]
    return pytest.mark.parametrize(("name", "actions"), pairs)


def build(name: str, actions: str, seed: int = 0, **kwargs: Any) -> Any:
    """:return: a small policy, far from uniform"""
    cls, space, own_kwargs = POLICIES[name]
    th.manual_seed(seed)
    kwargs = {"net_arch": {"pi": [6], "vf": [4]}, **own_kwargs, **kwargs}
    policy = cls(space, ACTION_SPACES[actions], lambda _: 0.01, **kwargs)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    return policy


def as_batch(samples: list[Any]) -> Any:
    """:return: samples of a space as tensors, (len(samples), ...)"""
    if isinstance(samples[0], dict):
        return {key: as_batch([sample[key] for sample in samples]) for key in samples[0]}
    return th.as_tensor(np.stack(samples))


def batch(name: str, actions: str) -> tuple[Any, th.Tensor]:
    """:return: observations, and actions as training has them"""
    observation_space, action_space = POLICIES[name][1], ACTION_SPACES[actions]
    observation_space.seed(0)
    action_space.seed(0)
    obs = as_batch([observation_space.sample() for _ in range(N)])
    if isinstance(obs, th.Tensor) and obs.dim() == 4:
        obs = obs.to(th.uint8)
    chosen = as_batch([action_space.sample() for _ in range(N)]).reshape(N, -1).float()
    return obs, chosen.long().flatten() if actions == "discrete" else chosen


def gradients(policy: Any, *outputs: th.Tensor) -> list[th.Tensor]:
    """:return: by the policy's parameters, of a weighted sum of all outputs"""
    weights = th.linspace(-1, 2, N)
    total = th.stack([((i + 1) * weights * output.flatten()).sum() for i, output in enumerate(outputs)]).sum()
    return list(th.autograd.grad(total, list(policy.parameters()), allow_unused=True, materialize_grads=True))


def assert_close(own: Any, reference: Any, name: str = "vector") -> None:
    """
    Up to some units of the last place of float32. Convolutions add some thousand terms in the order that they have in
    memory, here that of the pixels, there that of the channels.
    """
    has_images = "image" in name or "dict" in name
    rtol, atol = (1e-3, 1e-3) if has_images else (2e-5, 2e-6)
    th.testing.assert_close(own, reference, rtol=rtol, atol=atol)


def kl_of_torch(policy: Any, old: Any, obs: Any) -> th.Tensor:
    """:return: (N,) KL(old ‖ policy) by torch"""
    pairs = [[p.get_distribution(obs).distribution for p in (old, policy)]]
    if isinstance(pairs[0][0], list):
        pairs = list(zip(*pairs[0], strict=True))
    terms = [kl_divergence(*pair).reshape(N, -1).sum(dim=1) for pair in pairs]
    return th.stack(terms).sum(dim=0)


def actor_distribution(policy: Any, obs: Any) -> list[th.Tensor]:
    """:return: its parameters"""
    return forward.distribution(policy, forward.StandardPolicy(policy).action_outputs(obs))


# ---------------------------------------------------------------------- values and gradients


@combinations(*POLICIES)
def test_evaluation(name: str, actions: str) -> None:
    policy = build(name, actions)
    assert forward.is_standard(policy)
    obs, chosen = batch(name, actions)
    reference = policy.evaluate_actions(obs, chosen)
    own = forward.StandardPolicy(policy).evaluate_actions(obs, chosen)
    assert [tensor.shape for tensor in own] == [tensor.shape for tensor in reference] == [(N, 1), (N,), (N,)]
    assert_close(own, reference, name)
    assert_close(gradients(policy, *own), gradients(policy, *reference), name)


@combinations(*POLICIES)
def test_distribution_of_the_actor(name: str, actions: str) -> None:
    policy = build(name, actions)
    obs, chosen = batch(name, actions)
    distribution = policy.get_distribution(obs)
    reference = distribution.log_prob(chosen), distribution.entropy()
    parameters = actor_distribution(policy, obs)
    own = forward.log_prob(policy, parameters, chosen), forward.entropy(policy, parameters)
    assert_close(own, reference, name)
    assert_close(gradients(policy, *own), gradients(policy, *reference), name)


@combinations("vector", "dict", "softplus")
def test_divergence(name: str, actions: str) -> None:
    policy, old = build(name, actions), build(name, actions, seed=1)
    obs, _ = batch(name, actions)
    reference = kl_of_torch(policy, old, obs)
    with th.no_grad():
        old_parameters = actor_distribution(old, obs)
    own = forward.kl_divergence(policy, old_parameters, actor_distribution(policy, obs))
    assert reference.min() > 1e-3
    th.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
    th.testing.assert_close(gradients(policy, own), gradients(policy, reference), rtol=1e-3, atol=1e-4)


@combinations(*PHASIC, "softplus")
def test_auxiliary_evaluation(name: str, actions: str) -> None:
    policy = build(name, actions)
    obs, chosen = batch(name, actions)
    distribution, *heads = policy.evaluate_auxiliary(obs)
    reference = distribution.log_prob(chosen), *heads
    parameters, *own_heads = forward.StandardPolicy(policy).evaluate_auxiliary(obs)
    own = forward.log_prob(policy, parameters, chosen), *own_heads
    assert_close(own, reference)
    assert_close(gradients(policy, *own), gradients(policy, *reference))


@pytest.mark.parametrize("actions", ["discrete", "multidiscrete", "multibinary"])
def test_probabilities_that_underflow(actions: str) -> None:
    policy = build("vector", actions)
    obs, chosen = batch("vector", actions)
    with th.no_grad():
        policy.action_net.weight.mul_(1000)
        own = forward.StandardPolicy(policy).evaluate_actions(obs, chosen)
        assert_close(own, policy.evaluate_actions(obs, chosen))
        parameters = actor_distribution(policy, obs)
        assert_close(forward.kl_divergence(policy, parameters, parameters), th.zeros(N))


@pytest.mark.parametrize("actions", ["discrete", "multidiscrete"])
def test_actions_that_are_ruled_out(actions: str) -> None:
    policy = build("vector", actions)
    obs, _ = batch("vector", actions)
    with th.no_grad():
        policy.action_net.bias[1] = -th.inf
        parameters = actor_distribution(policy, obs)
        assert parameters[0][:, 1].tolist() == [-th.inf] * N
        assert_close(forward.entropy(policy, parameters), policy.get_distribution(obs).entropy())
        assert_close(forward.kl_divergence(policy, parameters, parameters), th.zeros(N))


# ---------------------------------------------------------------------- sampling


@combinations(*POLICIES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_same_seed_same_actions(name: str, actions: str, deterministic: bool) -> None:
    policy = build(name, actions)
    obs, _ = batch(name, actions)
    standard = forward.StandardPolicy(policy)
    for seed in range(5):
        with th.no_grad():
            th.manual_seed(seed)
            reference, state = policy(obs, deterministic), th.get_rng_state()
            th.manual_seed(seed)
            own = standard.forward(obs, deterministic)
        assert_close(own, reference, name)  # dtypes are compared as well
        assert th.equal(th.get_rng_state(), state)


# ---------------------------------------------------------------------- which policies


class OwnEvaluation(ActorCriticPolicy):
    """Overrides what training calls."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        return super().evaluate_actions(obs, actions)


class OwnDistribution(DiagGaussianDistribution):
    """Another distribution."""


def policy_of_class(cls: type[ActorCriticPolicy], **kwargs: Any) -> Any:
    """:return: a policy of continuous actions"""
    return cls(VECTOR, ACTION_SPACES["box"], lambda _: 0.01, **kwargs)


def test_which_policies_are_called_as_they_are() -> None:
    assert forward.is_standard(policy_of_class(ActorCriticPolicy))
    assert not forward.is_standard(policy_of_class(OwnEvaluation))
    assert not forward.is_standard(policy_of_class(ActorCriticPolicy, use_sde=True))
    assert not forward.is_standard(th.compile(policy_of_class(ActorCriticPolicy)))
    for method in ("forward", "evaluate_actions", "extract_features", "get_distribution"):
        policy = policy_of_class(ActorCriticPolicy)
        setattr(policy, method, getattr(policy, method))
        assert not forward.is_standard(policy)
    policy = policy_of_class(ActorCriticPolicy)
    policy.action_dist = OwnDistribution(2)
    assert not forward.is_standard(policy)


@pytest.mark.parametrize("fused", [True, False])
def test_overridden_evaluation_is_called(fused: bool) -> None:
    calls = []

    class Recording(OwnEvaluation):
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            calls.append(len(actions))
            return super().evaluate_actions(obs, actions)

    make(Recording, policy_kwargs={"net_arch": [4], "optimizer_kwargs": {"fused": fused}}, prox_decay=None).learn(16)
    assert calls == [8, 8]


# ---------------------------------------------------------------------- in the algorithm


def make(policy: Any = "MlpPolicy", env: Any = None, cls: Any = PPOEWMA, **kwargs: Any) -> Any:
    """:return: a small model"""
    defaults = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "seed": 0, "policy_kwargs": {"net_arch": [4]}}
    return cls(policy, env or SpaceEnv(action_space="box"), **{**defaults, **kwargs})


class LooksAtForward(BaseCallback):
    """Records whether the policy's method is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: list[bool] = []

    def _on_step(self) -> bool:
        self.replaced.append("forward" in vars(self.model.policy))
        return True


@pytest.mark.parametrize(
    ("policy_kwargs", "replaced"), [({}, True), ({"optimizer_kwargs": {"eps": 1e-5}}, False)], ids=["default", "given"]
)
def test_the_method_is_replaced_in_collection_only(policy_kwargs: dict[str, Any], replaced: bool) -> None:
    model, callback = make(policy_kwargs=policy_kwargs), LooksAtForward()
    model.learn(32, callback)
    assert callback.replaced == [replaced] * 32
    assert "forward" not in vars(model.policy)


def test_the_method_is_back_after_an_error() -> None:
    class Failing(SpaceEnv):
        def step(self, action: Any) -> Any:
            if len(self.actions) == 3:
                raise RuntimeError("broken")
            return super().step(action)

    model = make(env=Failing(action_space="box"))
    with pytest.raises(RuntimeError, match="broken"):
        model.learn(16)
    assert "forward" not in vars(model.policy)


def calls_of_hooks(cls: Any, hooked: str, **kwargs: Any) -> Counter:
    """:return: number of calls of a hook in collection and in training"""
    model = make(cls=cls, **kwargs)
    calls: Counter = Counter()
    model.policy.get_submodule(hooked).register_forward_hook(lambda *_: calls.update([phase[-1]]))
    phase = ["collection"]
    train = model.train

    def train_with_name() -> None:
        phase.append("training")
        train()
        phase.append("collection")

    model.train = train_with_name
    model.learn(32)
    return calls


@pytest.mark.parametrize(
    "hooked",
    ["", "features_extractor", "mlp_extractor", "mlp_extractor.policy_net", "mlp_extractor.value_net.0", "action_net"],
)
def test_hooks_are_called_as_in_ppo(hooked: str) -> None:
    own = calls_of_hooks(PPOEWMA, hooked, prox_decay=None)
    assert own == calls_of_hooks(PPO, hooked)
    assert own["collection"] >= 32
