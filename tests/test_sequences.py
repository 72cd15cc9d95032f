"""Which recurrent policies are trained on sequences without padding, and why others are not."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.recurrent import buffers as recurrent_buffers
from sb3_contrib.common.recurrent.buffers import RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ppo_ewma import MaskableRecurrentPPGEWMA, RecurrentPPG, RecurrentPPOEWMA
from sb3_ppo_ewma.contrib import policies
from sb3_ppo_ewma.contrib.evaluation import RecurrentEvaluation
from sb3_ppo_ewma.contrib.masking import MaskedRecurrentRolloutBuffer
from tests.battery.envs import SpaceEnv, copies
from tests.battery.helpers import copy_parameters
from tests.engines import MaskedEnv

QUICK = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "seed": 0, "device": "cpu"}


def make(cls: Any = RecurrentPPOEWMA, policy: Any = "MlpLstmPolicy", env: Any = SpaceEnv, **kwargs: Any) -> Any:
    """:return: a small model"""
    policy_kwargs = {"net_arch": [8], "lstm_hidden_size": 4, **kwargs.pop("policy_kwargs", {})}
    envs = DummyVecEnv(copies(lambda: env(episode_length=5), kwargs.pop("n_envs", 1)))
    return cls(policy, envs, policy_kwargs=policy_kwargs, **{**QUICK, **kwargs})


@pytest.mark.parametrize("cls", [RecurrentPPOEWMA, RecurrentPPG, MaskableRecurrentPPGEWMA])
def test_own_policies_are_recognised(cls: Any) -> None:
    model = make(cls, env=MaskedEnv)
    assert model.current_engine == "sequences"
    assert model.learn(32).current_engine == "sequences"
    assert make(cls, env=MaskedEnv, engine="reference").current_engine == "reference"


class BatchNormExtractor(BaseFeaturesExtractor):
    """Samples depend on each other, also on padding."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, int(np.prod(observation_space.shape)))
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.features_dim))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


class OwnLstm(nn.LSTM):
    """Computes what it is derived from does, but nobody knows."""


class OwnBuffer(RecurrentRolloutBuffer):
    """Nobody knows its minibatches."""


class OwnEvaluation(RecurrentEvaluation):
    """Values are others."""

    def evaluate_actions(self, policy: Any, samples: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(policy, samples, actions)
        return values + 1.0, log_prob, entropy


class NoisyEntropy(CategoricalDistribution):
    """Its entropy is random."""

    def entropy(self) -> th.Tensor:
        entropy = super().entropy()
        return entropy + th.randn_like(entropy)


class NoisyPolicy(RecurrentActorCriticPolicy):
    """Has the distribution."""

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = NoisyEntropy(self.action_space.n)
        super()._build(lr_schedule)


class NoisyExtractor(BaseFeaturesExtractor):
    """Draws random numbers also in evaluation."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, int(np.prod(observation_space.shape)))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return observations.flatten(1) + 0.1 * th.randn(len(observations), self.features_dim)


class OwnExtractor(BaseFeaturesExtractor):
    """Takes the place of the one that a policy was built with."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, int(np.prod(observation_space.shape)))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return 2 * observations.flatten(1)


def replace_extractor(model: Any) -> None:
    model.policy.features_extractor = OwnExtractor(model.observation_space)


class OwnRecurrentPPOEWMA(RecurrentPPOEWMA):
    """Evaluates policies in its own way."""

    policy_evaluation = OwnEvaluation()


def overridden(name: str) -> Any:
    """:return: a policy that overrides a method of sb3-contrib's"""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(RecurrentActorCriticPolicy, name)(self, *args, **kwargs)

    return type("Own", (RecurrentActorCriticPolicy,), {name: method})


def process_sequence(features: th.Tensor, states: Any, episode_starts: th.Tensor, lstm: nn.LSTM) -> Any:
    return RecurrentActorCriticPolicy._process_sequence(features, states, episode_starts, lstm)


OWN_SEQUENCES = type("Own", (RecurrentActorCriticPolicy,), {"_process_sequence": staticmethod(process_sequence)})


def replace_lstm(model: Any) -> None:
    lstm = model.policy.lstm_actor
    model.policy.lstm_actor = OwnLstm(lstm.input_size, lstm.hidden_size)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), eps=1e-5)


def hook_lstm(model: Any) -> None:
    model.policy.lstm_critic.register_forward_hook(lambda module, inputs, outputs: None)


def patch_lstm(model: Any) -> None:
    lstm = model.policy.lstm_actor
    lstm.forward = lambda *args: nn.LSTM.forward(lstm, *args)


def own_buffer(model: Any) -> None:
    model.rollout_buffer.__class__ = OwnBuffer


DECLINED: dict[str, tuple[dict[str, Any], Callable[[Any], None], str]] = {
    "evaluate_actions": ({"policy": overridden("evaluate_actions")}, lambda model: None, "Own overrides"),
    "extract_features": ({"policy": overridden("extract_features")}, lambda model: None, "Own overrides"),
    "process_sequence": ({"policy": OWN_SEQUENCES}, lambda model: None, "Own overrides _process_sequence"),
    "LSTM of another class": ({}, replace_lstm, "the LSTM is a OwnLstm"),
    "own evaluation": ({"cls": OwnRecurrentPPOEWMA}, lambda model: None, "policies are evaluated by OwnEvaluation"),
    "own distribution": (
        {"policy": NoisyPolicy, "ent_coef": 0.1},
        lambda model: None,
        "the distribution is a NoisyEntropy",
    ),
    "random numbers": (
        {"policy_kwargs": {"features_extractor_class": NoisyExtractor, "share_features_extractor": False}},
        lambda model: None,
        "NoisyExtractor is not one of the layers known",
    ),
    "extractor replaced": ({}, replace_extractor, "features_extractor was replaced without"),
    "hook of an LSTM": ({}, hook_lstm, "a LSTM has hooks"),
    "patched LSTM": ({}, patch_lstm, "forward of a LSTM was replaced"),
    "own buffer": ({}, own_buffer, "the rollout buffer is a OwnBuffer"),
    "dropout": (
        {"policy_kwargs": {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}},
        lambda model: None,
        "the LSTM has dropout",
    ),
    "samples depend on each other": (
        {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}},
        lambda model: None,
        "BatchNormExtractor is not one of the layers known",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_others_are_trained_as_sb3_contrib_does(name: str) -> None:
    kwargs, change, reason = DECLINED[name]
    trained = []
    for engine in ("auto", "reference"):
        model = make(engine=engine, **kwargs)
        change(model)
        if engine == "auto":
            assert model.current_engine == "fused"
            assert f"- not 'sequences': {reason}" in model.explain_engine()
        trained.append(copy_parameters(model.learn(32)))
    th.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


INHERITED: list[tuple[Any, str]] = [
    (policies.MaskedRecurrentPPGPolicy, "evaluate_actions"),
    (policies.MaskedRecurrentPPGPolicy, "extract_features"),
    (policies.MaskedRecurrentPPGPolicy, "_auxiliary_outputs"),
    (MaskedRecurrentRolloutBuffer, "_get_samples"),
    (recurrent_buffers, "create_sequencers"),
]


@pytest.mark.parametrize(("owner", "name"), INHERITED)
def test_a_patch_of_what_a_class_inherits_is_noticed(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    model = make(MaskableRecurrentPPGEWMA, env=MaskedEnv)
    assert model.current_engine == "fused"
    assert f"{name} was replaced" in model.explain_engine()


def test_an_overridden_head_is_noticed() -> None:
    class Own(policies.RecurrentHeadMixin, RecurrentActorCriticPolicy):
        def evaluate_auxiliary(self, *args: Any, **kwargs: Any) -> Any:
            distribution, values, aux_values = super().evaluate_auxiliary(*args, **kwargs)
            return distribution, values, aux_values + 1.0

    model = make(RecurrentPPG, Own)
    assert model.current_engine == "fused"
    assert "Own overrides evaluate_auxiliary" in model.explain_engine()


def test_a_patched_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    assert model.current_engine == "sequences"
    monkeypatch.setattr(RecurrentActorCriticPolicy, "_process_sequence", staticmethod(process_sequence))
    assert model.current_engine == "fused"
    assert "RecurrentActorCriticPolicy._process_sequence was replaced" in model.explain_engine()


@pytest.mark.parametrize("batch_size", [None, 1, 5, 16, 64])
def test_minibatches_of_any_size(batch_size: int | None) -> None:
    trained = []
    for engine in ("auto", "reference"):
        model = make(engine=engine, advantage_decay=0.0)
        model.batch_size = batch_size
        trained.append(copy_parameters(model.learn(48)))
    th.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


class Probe(BaseCallback):
    """
    Changes the actor's LSTM in the middle of the second rollout, and keeps what is collected.

    :param change: makes the change
    """

    def __init__(self, change: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.change = change
        self.log_probs: list[np.ndarray] = []

    def _on_step(self) -> bool:
        if self.num_timesteps == 24:
            self.change(self.model.policy.lstm_actor)
        return True

    def _on_rollout_end(self) -> None:
        self.log_probs.append(self.model.rollout_buffer.log_probs.copy())


def double_output(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return 2 * outputs[0], outputs[1]


def patch_forward(lstm: nn.Module) -> None:
    lstm.forward = lambda *args: double_output(lstm, args, nn.LSTM.forward(lstm, *args))


def zero_weights(lstm: nn.Module) -> None:
    with th.no_grad():
        lstm.weight_hh_l1.zero_()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda lstm: None,
    "hook": lambda lstm: lstm.register_forward_hook(double_output),
    "forward": patch_forward,
    "weights": zero_weights,
}


@pytest.mark.parametrize("name", CHANGES)
def test_collection_is_the_same_whatever_a_callback_changes(name: str) -> None:
    collected = []
    for engine in ("auto", "reference"):
        model = make(engine=engine, policy_kwargs={"n_lstm_layers": 2})
        model.learn(32, probe := Probe(CHANGES[name]))
        collected.append(np.concatenate(probe.log_probs))
    np.testing.assert_allclose(*collected, rtol=1e-4, atol=1e-5)


class OwnGet(RecurrentRolloutBuffer):
    """Makes minibatches of a copy, and stays as it was collected."""

    def get(self, batch_size: int | None = None) -> Any:
        return RecurrentRolloutBuffer.get(copy.copy(self), batch_size)


def test_phases_take_a_buffer_as_it_was_collected() -> None:
    trained = []
    for own in (False, True):
        model = make(RecurrentPPG, n_policy_iterations=1, n_aux_epochs=1, aux_batch_size=16, n_envs=2)
        if own:
            model.rollout_buffer.__class__ = OwnGet
        trained.append(copy_parameters(model.learn(64)))
    th.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


class ReadsMinibatches(BaseCallback):
    """Looks at the minibatches before they are trained on."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        state = np.random.get_state()
        list(self.model.rollout_buffer.get(8))
        np.random.set_state(state)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_advantages_are_recomputed_after_a_callback_read_minibatches(engine: str) -> None:
    trained = [
        copy_parameters(make(engine=engine, n_envs=2, n_epochs=2, recompute_advantages=True).learn(64, callback))
        for callback in (None, ReadsMinibatches())
    ]
    th.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)
