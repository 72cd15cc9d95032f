"""
With the EWMA off and ``engine="reference"``, the algorithms compute what the ones they extend compute, to the bit, in a
training step of their own; with the EWMA on, they still do when π_prox is replaced by π_behav, and only then. PPG
computes what PPO-EWMA computes until its first auxiliary phase, with any engine. Masks and LSTM together compute what
one of them computes if the other does nothing.
"""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    AuxiliaryPhaseMixin,
    EwmaMixin,
    MaskablePPG,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPG,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPGEWMA,
    RecurrentPPOEWMA,
)
from sb3_ppo_ewma._engine.reference import ReferenceEngine
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, MaskedSpaceEnv, SpaceEnv, copies
from tests.battery.helpers import assert_same, auxiliary_head, record_log

ITERATIONS = 4
# A learning rate and a clip range that ratios leave within a rollout
COMMON: dict[str, Any] = {
    "learning_rate": 0.02,
    "clip_range": 0.05,
    "n_steps": 16,
    "batch_size": 8,
    "n_epochs": 3,
    "seed": 0,
    "device": "cpu",
    "policy_kwargs": {"net_arch": [8]},
}
CNN = {
    "policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}},
    "learning_rate": 3e-3,
}
CNNS = {
    "policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
    "learning_rate": 3e-3,
}
SQUASHED = {
    "use_sde": True,
    "learning_rate": 3e-3,
    "policy_kwargs": {"net_arch": [8], "squash_output": True, "full_std": False, "use_expln": True},
}
LSTM = {"net_arch": [8], "lstm_hidden_size": 4}

Case = tuple[Callable[[], Any], str | type[ActorCriticPolicy], dict[str, Any]]


def env(action_space: str = "discrete", observation_space: Any = VECTOR) -> Callable[[], SpaceEnv]:
    """:return: makes environments with these spaces; their episodes of 5 steps end within the rollout of 16"""
    return lambda: SpaceEnv(observation_space, action_space, episode_length=5)


class AllowingEnv(SpaceEnv):
    """All actions are valid."""

    def action_masks(self) -> np.ndarray:
        return np.ones(5 if isinstance(self.action_space, spaces.MultiDiscrete) else 3, bool)


def allowing(action_space: str = "discrete", observation_space: Any = VECTOR) -> Callable[[], SpaceEnv]:
    """:return: makes environments as those of :func:`env`, with masks"""
    return lambda: AllowingEnv(observation_space, action_space, episode_length=5)


def normalized_envs() -> VecEnv:
    """:return: three environments, normalised: 48 samples in a rollout"""
    return VecNormalize(DummyVecEnv(copies(env("box"), 3)))


class DropoutExtractor(BaseFeaturesExtractor):
    """Draws random numbers and moves running statistics in training."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


class ScaledValuePolicy(ActorCriticPolicy):
    """Overrides what training calls."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return 3 * values, log_prob, entropy


class OrderedBuffer(RolloutBuffer):
    """Does not shuffle."""

    def get(self, batch_size: int | None = None) -> Any:
        next(super().get(batch_size))  # flattens the arrays
        size = self.buffer_size * self.n_envs
        return (self._get_samples(np.arange(i, min(i + batch_size, size))) for i in range(0, size, batch_size))


CASES: dict[str, Case] = {
    "box": (env("box"), "MlpPolicy", {}),
    "box_matrix": (env("box_matrix"), "MlpPolicy", {}),
    "discrete": (env("discrete"), "MlpPolicy", {}),
    "multidiscrete": (env("multidiscrete"), "MlpPolicy", {}),
    "multibinary": (env("multibinary"), "MlpPolicy", {}),
    "cartpole": (lambda: "CartPole-v1", "MlpPolicy", {}),
    "pendulum": (lambda: "Pendulum-v1", "MlpPolicy", {}),
    "dict": (env("multidiscrete", OBSERVATION_SPACES["dict"]), "MultiInputPolicy", CNNS),
    "cnn": (env("discrete", OBSERVATION_SPACES["image_channels_last"]), "CnnPolicy", CNN),
    "unshared": (
        env("box", OBSERVATION_SPACES["image_channels_first"]),
        "CnnPolicy",
        {**CNN, "policy_kwargs": {**CNN["policy_kwargs"], "share_features_extractor": False}},
    ),
    "sde": (env("box"), "MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "sde_squashed": (env("box"), "MlpPolicy", SQUASHED),
    # Its entropy has no closed form: PPO takes the mean of the log-probabilities, which then enter the loss twice.
    "sde_squashed_ent_coef": (env("box"), "MlpPolicy", {**SQUASHED, "ent_coef": 0.1}),
    "clip_range_vf": (env("box"), "MlpPolicy", {"clip_range_vf": 0.1}),
    "target_kl": (env("discrete"), "MlpPolicy", {"target_kl": 0.01, "n_epochs": 6}),
    "schedules": (
        env("box"),
        "MlpPolicy",
        {
            "learning_rate": lambda progress: 0.01 + 0.02 * progress,
            "clip_range": lambda progress: 0.05 + 0.2 * progress,
            "clip_range_vf": lambda progress: 0.05 + 0.5 * progress,
        },
    ),
    "ent_coef": (env("multibinary"), "MlpPolicy", {"ent_coef": 0.1, "vf_coef": 0.9, "max_grad_norm": 0.2}),
    "advantages_not_normalized": (env("box"), "MlpPolicy", {"normalize_advantage": False}),
    "minibatches_of_one": (env("discrete"), "MlpPolicy", {"normalize_advantage": False, "batch_size": 1}),
    "ragged_minibatch": (env("discrete"), "MlpPolicy", {"batch_size": 6}),
    "ragged_minibatch_of_one": (env("discrete"), "MlpPolicy", {"batch_size": 5}),
    "one_minibatch": (env("discrete"), "MlpPolicy", {"batch_size": 64}),
    "several_normalized_envs": (normalized_envs, "MlpPolicy", {"batch_size": 16}),
    "adamw_with_settings": (
        env("box"),
        "MlpPolicy",
        {
            "policy_kwargs": {
                "net_arch": [8],
                "optimizer_class": th.optim.AdamW,
                "optimizer_kwargs": {"eps": 1e-4, "weight_decay": 0.1, "betas": (0.8, 0.99)},
            }
        },
    ),
    "rmsprop": (
        env("box"),
        "MlpPolicy",
        {
            "policy_kwargs": {
                "net_arch": [8],
                "optimizer_class": th.optim.RMSprop,
                "optimizer_kwargs": {"alpha": 0.9, "momentum": 0.5},
            }
        },
    ),
    "dropout_and_batch_norm": (
        env("discrete"),
        "MlpPolicy",
        {"policy_kwargs": {"net_arch": [8], "features_extractor_class": DropoutExtractor}},
    ),
    "own_policy": (env("box"), ScaledValuePolicy, {}),
    "own_buffer": (env("discrete"), "MlpPolicy", {"rollout_buffer_class": OrderedBuffer}),
}
RECURRENT_CASES: dict[str, Case] = {
    "discrete": (env("discrete"), "MlpLstmPolicy", {"policy_kwargs": LSTM}),
    "box": (env("box"), "MlpLstmPolicy", {"policy_kwargs": {**LSTM, "enable_critic_lstm": False, "shared_lstm": True}}),
    "without_critic_lstm": (env("box"), "MlpLstmPolicy", {"policy_kwargs": {**LSTM, "enable_critic_lstm": False}}),
    "two_layers_of_three_envs": (
        lambda: DummyVecEnv(copies(env("multidiscrete"), 3)),
        "MlpLstmPolicy",
        {"batch_size": 16, "policy_kwargs": {**LSTM, "n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.5}}},
    ),
    "dict": (
        env("multidiscrete", OBSERVATION_SPACES["dict"]),
        "MultiInputLstmPolicy",
        {**CNNS, "policy_kwargs": {**LSTM, **CNNS["policy_kwargs"]}},
    ),
    "cnn": (
        env("discrete", OBSERVATION_SPACES["image_channels_last"]),
        "CnnLstmPolicy",
        {"learning_rate": 0.01, "policy_kwargs": {**LSTM, **CNN["policy_kwargs"]}},
    ),
    "sde": (env("box"), "MlpLstmPolicy", {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": LSTM}),
    "clip_range_vf": (env("box"), "MlpLstmPolicy", {"clip_range_vf": 0.1, "ent_coef": 0.01, "policy_kwargs": LSTM}),
    "target_kl": (env("discrete"), "MlpLstmPolicy", {"target_kl": 1e-3, "n_epochs": 6, "policy_kwargs": LSTM}),
    "advantages_not_normalized": (
        env("discrete"),
        "MlpLstmPolicy",
        {"normalize_advantage": False, "policy_kwargs": LSTM},
    ),
    "ragged_minibatch": (env("discrete"), "MlpLstmPolicy", {"batch_size": 6, "policy_kwargs": LSTM}),
}
MASKABLE_CASES: dict[str, Case] = {
    "discrete": (lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3, ep_length=5), "MlpPolicy", {}),
    "multidiscrete": (lambda: InvalidActionEnvMultiDiscrete([2, 3], n_invalid_actions=1, ep_length=5), "MlpPolicy", {}),
    "multibinary": (lambda: InvalidActionEnvMultiBinary(3, n_invalid_actions=1, ep_length=5), "MlpPolicy", {}),
    "clip_range_vf": (
        lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3, ep_length=5),
        "MlpPolicy",
        {"clip_range_vf": 0.1, "ent_coef": 0.1, "normalize_advantage": False},
    ),
    "target_kl": (
        lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3, ep_length=5),
        "MlpPolicy",
        {"target_kl": 0.01, "n_epochs": 6},
    ),
    "ragged_minibatch": (
        lambda: InvalidActionEnvMultiDiscrete([2, 3], n_invalid_actions=1, ep_length=5),
        "MlpPolicy",
        {"batch_size": 6},
    ),
}
# With masks that allow everything
ALLOWING_CASES: dict[str, Case] = {
    "discrete": (allowing(), *RECURRENT_CASES["discrete"][1:]),
    "shared": (allowing("multidiscrete"), *RECURRENT_CASES["box"][1:]),
    "without_critic_lstm": (allowing(), *RECURRENT_CASES["without_critic_lstm"][1:]),
    "two_layers_of_three_envs": (
        lambda: DummyVecEnv(copies(allowing("multidiscrete"), 3)),
        *RECURRENT_CASES["two_layers_of_three_envs"][1:],
    ),
    "dict": (allowing("multidiscrete", OBSERVATION_SPACES["dict"]), *RECURRENT_CASES["dict"][1:]),
    "clip_range_vf": (allowing(), *RECURRENT_CASES["clip_range_vf"][1:]),
    "target_kl": (allowing(), *RECURRENT_CASES["target_kl"][1:]),
    "ragged_minibatch": (allowing("multidiscrete"), *RECURRENT_CASES["ragged_minibatch"][1:]),
}
FAMILIES: dict[str, tuple[type[OnPolicyAlgorithm], type[EwmaMixin], dict[str, Case]]] = {
    "PPO": (PPO, PPOEWMA, CASES),
    "RecurrentPPO": (RecurrentPPO, RecurrentPPOEWMA, RECURRENT_CASES),
    "MaskablePPO": (MaskablePPO, MaskablePPOEWMA, MASKABLE_CASES),
    "RecurrentPPO with masks": (RecurrentPPO, MaskableRecurrentPPOEWMA, ALLOWING_CASES),
}
ALL_CASES = [(family, name) for family, (_, _, cases) in FAMILIES.items() for name in cases]
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


class Run:
    """
    A short training.

    :param cls: the algorithm
    :param case: makes the environment; policy; arguments
    :param own: arguments of this package's algorithms
    """

    def __init__(self, cls: type[OnPolicyAlgorithm], case: Case, **own: Any) -> None:
        make_env, policy, kwargs = case
        environment = make_env()
        if isinstance(
            environment, (InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete, InvalidActionEnvMultiBinary)
        ):
            np.random.seed(0)  # their masks are drawn from the global generator, before the model is seeded
        self.model = cls(policy, environment, **deepcopy({**COMMON, **kwargs}), **own)
        self.rows = record_log(self.model)
        self.model.learn(ITERATIONS * 16 * self.model.n_envs)
        values = [*(row for _, row in self.rows), self.model.logger.name_to_value]
        self.updates: list[dict[str, Any]] = [
            {key: row[key] for key in row if key.startswith("train/")} for row in values if "train/loss" in row
        ]
        self.random_state = th.get_rng_state(), np.random.get_state()

    def state(self) -> dict[str, Any]:
        """:return: all that training changes"""
        return {
            "policy": dict(self.model.policy.state_dict()),
            "optimizer": self.model.policy.optimizer.state_dict(),
            "n_updates": self.model._n_updates,
            "num_timesteps": self.model.num_timesteps,
            "random_state": self.random_state,
        }

    def values(self, key: str) -> list[float]:
        """:return: what was logged under ``train/<key>`` in every update"""
        return [row[f"train/{key}"] for row in self.updates]


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, the training step of the extended algorithms must not be used."""

    def train(self: Any) -> None:
        raise AssertionError(f"{type(self).__name__} used the training step of the algorithm it extends")

    for base, _, _ in FAMILIES.values():
        monkeypatch.setattr(base, "train", train)


def assert_equal_runs(own: Run, reference: Run) -> None:
    """
    Equal to the bit. What is logged may differ in the last digits: means over minibatches are taken in float64.
    """
    assert_same(own.state(), reference.state())
    assert len(own.updates) == len(reference.updates) == ITERATIONS
    for row, reference_row in zip(own.updates, reference.updates, strict=True):
        for key, value in reference_row.items():
            assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
    # Ratios stayed below the cap, and left the clip range: both say that the comparison means something.
    assert max(own.values("importance_ratio_max")) < 100
    assert max(own.values("importance_cap_fraction")) == 0
    assert max(own.values("clip_fraction")) > 0


@functools.cache
def reference_run(family: str, name: str) -> Run:
    """:return: the run of the algorithm that is extended, made before its training step is forbidden"""
    base, _, cases = FAMILIES[family]
    return Run(base, cases[name])


@pytest.mark.parametrize(("family", "name"), ALL_CASES)
def test_without_ewma(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cls, cases = FAMILIES[family]
    reference = reference_run(family, name)
    forbid_training(monkeypatch)
    own = Run(cls, cases[name], prox_decay=None, engine="reference")
    assert own.model.current_engine == "reference"
    assert own.model.proximal_policy is None
    assert_equal_runs(own, reference)
    if name == "target_kl":  # some iterations end early, and count the epoch that they ended in
        assert ITERATIONS <= reference.model._n_updates < ITERATIONS * reference.model.n_epochs


@pytest.mark.long
@pytest.mark.parametrize(("family", "name"), ALL_CASES)
def test_with_ewma_and_the_behavior_policy_in_its_place(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cls, cases = FAMILIES[family]
    reference = reference_run(family, name)
    forbid_training(monkeypatch)
    decoupled = Run(cls, cases[name], engine="reference")
    monkeypatch.setattr(
        ReferenceEngine, "log_prob_under", lambda self, average, minibatch: minibatch.samples.old_log_prob
    )
    replaced = Run(cls, cases[name], engine="reference")
    assert_equal_runs(replaced, reference)
    # The average was kept all along; without the replacement it changes what is learned.
    assert replaced.model.policy_ewma.total_weight > 1
    parameters = zip(decoupled.model.policy.parameters(), reference.model.policy.parameters(), strict=True)
    assert not all(th.equal(a, b) for a, b in parameters)


def test_the_training_step_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    for base, _, cases in FAMILIES.values():
        with pytest.raises(AssertionError, match="used the training step"):
            Run(base, cases["discrete"])


def test_early_stopping_decides_the_run() -> None:
    make_env, policy, kwargs = CASES["target_kl"]
    stopped = Run(PPO, CASES["target_kl"])
    free = Run(PPO, (make_env, policy, {**kwargs, "target_kl": None}))
    assert free.model._n_updates == ITERATIONS * 6
    assert not th.equal(stopped.model.policy.action_net.weight, free.model.policy.action_net.weight)


@pytest.mark.parametrize(
    "own",
    [
        {"kl_coef": 0.5},
        {"kl_coef": 0.5, "kl_estimator": "analytic"},
        {"advantage_decay": 0.0},
        {"n_epochs_value": 1},
        {"recompute_advantages": True},
        {"staleness": 1},
        {"max_importance_ratio": 1.01},
        {"clip_range": None},
    ],
    ids=str,
)
def test_every_switch_changes_the_run(own: dict[str, Any]) -> None:
    """The comparison above would notice any of them."""
    make_env, policy, kwargs = CASES["box"]
    plain = Run(PPOEWMA, (make_env, policy, kwargs), prox_decay=None)
    switched = Run(PPOEWMA, (make_env, policy, {**kwargs, **own}), prox_decay=None)
    assert not th.equal(plain.model.policy.action_net.weight, switched.model.policy.action_net.weight)


# ---------------------------------------------------------------------- PPG

# Own parameters that PPG has in common with PPO-EWMA
EVERY_SWITCH: dict[str, Any] = {
    "kl_coef": 0.5,
    "kl_estimator": "analytic",
    "n_epochs_value": 1,
    "recompute_advantages": True,
    "advantage_decay": 0.5,
    "staleness": 1,
}
SMALL_IMPALA = {
    "net_arch": [8],
    "features_extractor_kwargs": {"channels": (4,), "n_blocks": 1, "features_dim": 8},
}
IMAGES = env("discrete", OBSERVATION_SPACES["image_channels_last"])
PHASIC_CASES: dict[str, Case] = {
    **{name: CASES[name] for name in ("box", "multidiscrete", "multibinary", "dict", "cnn", "sde", "target_kl")},
    **{name: CASES[name] for name in ("schedules", "several_normalized_envs", "dropout_and_batch_norm")},
    "switches": (env("box"), "MlpPolicy", EVERY_SWITCH),
    "impala": (IMAGES, "ImpalaPolicy", {"learning_rate": 3e-3, "policy_kwargs": SMALL_IMPALA}),
}


def phasic_run(cls: type[AuxiliaryPhaseMixin], case: Case, critic_arch: str | None = "shared", **own: Any) -> Run:
    """:return: a run whose only differences from one of PPO-EWMA should be the auxiliary head and phases"""
    make_env, policy, kwargs = case
    policy_kwargs = {**COMMON["policy_kwargs"], **kwargs.get("policy_kwargs", {})}
    if critic_arch is not None:
        policy_kwargs["critic_arch"] = critic_arch
    return Run(cls, (make_env, policy, {"advantage_decay": None, **kwargs, "policy_kwargs": policy_kwargs}), **own)


def without_head(run: Run) -> dict[str, Any]:
    """:return: the state of a run, without the auxiliary head's part; that of the optimiser by name of the parameter"""
    state = run.state()
    head = auxiliary_head(state["policy"])
    names = dict(enumerate(name for name, _ in run.model.policy.named_parameters()))
    (group,) = state["optimizer"]["param_groups"]
    # It has none of the head, as there was no gradient.
    optimizer = {names[index]: each for index, each in state["optimizer"]["state"].items()}
    return {
        **state,
        "policy": {name: value for name, value in state["policy"].items() if name not in head},
        "optimizer": {"state": optimizer, "settings": {**group, "params": len(group["params"]) - len(head)}},
    }


def assert_equal_until_phase(own: Run, reference: Run) -> None:
    """Equal to the bit, logs included, but for the auxiliary head."""
    assert auxiliary_head(own.state()["policy"]) == ["aux_value_net.weight", "aux_value_net.bias"]
    assert_same(without_head(own), without_head(reference))
    assert_equal_logs(own, reference)


def assert_equal_logs(own: Run, reference: Run) -> None:
    """Equal to the bit, but for the time and the auxiliary phase."""
    logs = [
        [{key: row[key] for key in row if not key.startswith(("time/", "aux/"))} for _, row in run.rows]
        for run in (own, reference)
    ]
    assert logs[0] == logs[1]
    assert own.updates == reference.updates


@pytest.mark.parametrize("name", PHASIC_CASES)
def test_ppg_before_the_first_phase(name: str) -> None:
    reference = Run(PPOEWMA, PHASIC_CASES[name], prox_decay=None)
    own = phasic_run(PPG, PHASIC_CASES[name], n_policy_iterations=ITERATIONS + 1)
    assert_equal_until_phase(own, reference)
    assert max(own.values("clip_fraction")) > 0


@pytest.mark.parametrize("name", ["box", "cnn", "switches"])
def test_ppg_ewma_before_the_first_phase(name: str) -> None:
    reference = Run(PPOEWMA, PHASIC_CASES[name])
    own = phasic_run(PPGEWMA, PHASIC_CASES[name], n_policy_iterations=ITERATIONS + 1)
    assert_equal_until_phase(own, reference)
    averages = [dict(run.model.proximal_policy.state_dict()) for run in (own, reference)]
    assert_same({name: averages[0][name] for name in averages[1]}, averages[1])


# Of sb3-contrib's families: PPO-EWMA, PPG and PPG-EWMA
PHASIC_FAMILIES: dict[str, tuple[type[EwmaMixin], type[AuxiliaryPhaseMixin], type[AuxiliaryPhaseMixin]]] = {
    "recurrent": (RecurrentPPOEWMA, RecurrentPPG, RecurrentPPGEWMA),
    "maskable": (MaskablePPOEWMA, MaskablePPG, MaskablePPGEWMA),
    "both": (MaskableRecurrentPPOEWMA, MaskableRecurrentPPG, MaskableRecurrentPPGEWMA),
}


def masked_env(action_space: str, observation_space: Any = VECTOR) -> Callable[[], SpaceEnv]:
    """:return: makes environments as those of :func:`env`, with invalid actions"""
    return lambda: MaskedSpaceEnv(observation_space, action_space, episode_length=5)


def with_lstm(share_features_extractor: bool, **policy_kwargs: Any) -> dict[str, Any]:
    """:return: arguments of a recurrent policy, which PPG's has other defaults for"""
    return {"policy_kwargs": {**LSTM, "share_features_extractor": share_features_extractor, **policy_kwargs}}


SHARED_LSTM = with_lstm(True, shared_lstm=True, enable_critic_lstm=False)
ONE_LSTM = with_lstm(False, enable_critic_lstm=False, n_lstm_layers=2, **CNN["policy_kwargs"])
DICTIONARY = masked_env("multidiscrete", OBSERVATION_SPACES["dict"])
FURTHER_PHASIC_CASES: dict[tuple[str, str], Case] = {
    ("recurrent", "shared_features"): (env("box"), "MlpLstmPolicy", {**with_lstm(True), "use_sde": True}),
    ("recurrent", "switches"): (env("box"), "MlpLstmPolicy", {**with_lstm(False), **EVERY_SWITCH}),
    ("recurrent", "shared_lstm"): (env("multibinary"), "MlpLstmPolicy", SHARED_LSTM),
    ("recurrent", "images"): (IMAGES, "CnnLstmPolicy", {**ONE_LSTM, "learning_rate": 0.01}),
    ("maskable", "multidiscrete"): MASKABLE_CASES["multidiscrete"],
    ("maskable", "switches"): (masked_env("multibinary"), "MlpPolicy", EVERY_SWITCH),
    ("both", "shared_features"): (masked_env("discrete"), "MlpLstmPolicy", with_lstm(True)),
    ("both", "switches"): (masked_env("multibinary"), "MlpLstmPolicy", {**with_lstm(False), **EVERY_SWITCH}),
    ("both", "dict"): (DICTIONARY, "MultiInputLstmPolicy", with_lstm(False, **CNNS["policy_kwargs"])),
}


@pytest.mark.parametrize("is_average", [False, True], ids=["PPG", "PPGEWMA"])
@pytest.mark.parametrize(("family", "name"), FURTHER_PHASIC_CASES)
def test_other_families_before_the_first_phase(family: str, name: str, is_average: bool) -> None:
    case = FURTHER_PHASIC_CASES[family, name]
    ppo_ewma, ppg, ppg_ewma = PHASIC_FAMILIES[family]
    reference = Run(ppo_ewma, case, **({} if is_average else {"prox_decay": None}))
    critic_arch = "shared" if family == "maskable" else None
    cls = ppg_ewma if is_average else ppg
    assert_equal_until_phase(phasic_run(cls, case, critic_arch, n_policy_iterations=ITERATIONS + 1), reference)
    # The phase comes at the end of the last update.
    after_phase = phasic_run(cls, case, critic_arch, n_policy_iterations=len(reference.updates), n_aux_epochs=1)
    assert_equal_logs(after_phase, reference)
    weights = [run.model.policy.value_net.weight for run in (after_phase, reference)]
    assert not th.equal(*weights)


def test_ppg_with_a_critic_of_its_own_before_the_first_phase() -> None:
    """It is PPO with a features extractor each."""
    make_env, policy, kwargs = CASES["unshared"]
    reference = Run(PPOEWMA, CASES["unshared"], prox_decay=None)
    case = make_env, policy, {**kwargs, "policy_kwargs": CNN["policy_kwargs"]}
    own = phasic_run(PPG, case, critic_arch="dual", n_policy_iterations=ITERATIONS + 1)
    assert_equal_until_phase(own, reference)


@pytest.mark.parametrize("name", ["box", "cnn"])
def test_the_first_phase_makes_the_difference(name: str) -> None:
    reference = Run(PPOEWMA, PHASIC_CASES[name], prox_decay=None)
    # The phase comes at the end of the last update.
    own = phasic_run(PPG, PHASIC_CASES[name], n_policy_iterations=ITERATIONS, n_aux_epochs=1)
    assert_equal_logs(own, reference)
    state, reference_state = own.state(), reference.state()
    assert not any(th.equal(state["policy"][name], value) for name, value in reference_state["policy"].items())
    assert_same(without_head(own)["optimizer"], without_head(reference)["optimizer"])  # the phase has its own
    # Its minibatches are drawn from numpy's generator.
    assert not np.array_equal(state["random_state"][1][1:3], reference_state["random_state"][1][1:3])
    # Without epochs there is none.
    own = phasic_run(PPG, PHASIC_CASES[name], n_policy_iterations=1, n_aux_epochs=0)
    assert_equal_until_phase(own, reference)


@pytest.mark.parametrize("critic_arch", ["dual", "detach"])
def test_critic_architectures_differ(critic_arch: str) -> None:
    """The comparison above would notice."""
    runs = [phasic_run(PPG, CASES["cnn"], arch, n_policy_iterations=ITERATIONS + 1) for arch in ("shared", critic_arch)]
    weights = [run.state()["policy"]["features_extractor.cnn.0.weight"] for run in runs]
    assert not th.equal(*weights)


def test_ppo_is_given_back() -> None:
    """A model trained without the EWMA, handed back as plain PPO, goes on as PPO would have."""
    reference = Run(PPO, CASES["box"]).model
    exact = {"prox_decay": None, "engine": "reference"}
    own = [Run(PPOEWMA, CASES["box"], **exact), phasic_run(PPG, CASES["box"], **exact)]
    ppos = [run.model.to_ppo() for run in own]
    for model in (reference, *ppos):
        model.set_env(env("box")(), force_reset=True)
        model.set_random_seed(1)
        model.learn(32)
    expected = dict(reference.policy.state_dict())
    for ppo in ppos:
        assert type(ppo) is PPO
        assert_same({name: ppo.policy.state_dict()[name] for name in expected}, expected)
        assert_same(ppo.policy.optimizer.state_dict()["state"], reference.policy.optimizer.state_dict()["state"])


# ---------------------------------------------------------------------- masks and LSTM


class IdentityLstm(nn.Module):
    """
    An LSTM that remembers nothing.

    :param size: number of features
    """

    num_layers = 1

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_size = self.hidden_size = size

    def forward(self, features: th.Tensor, states: Any) -> tuple[th.Tensor, Any]:
        return features, states


def without_memory(base: Any) -> Any:
    """:return: the class of a recurrent policy for VECTOR, with the layers of one that is not"""

    class WithoutMemory(base):  # type: ignore[misc]  # of any policy
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, lstm_hidden_size=3, share_features_extractor=True, **kwargs)
            self.lstm_actor, self.lstm_critic = IdentityLstm(3), IdentityLstm(3)
            self.optimizer = self.optimizer_class(self.parameters(), lr=self.optimizer.param_groups[0]["lr"])

    return WithoutMemory


@pytest.mark.parametrize("action_space", ["discrete", "multidiscrete", "multibinary"])
@pytest.mark.parametrize(
    ("base", "cls", "kwargs"),
    [
        (MaskablePPO, MaskableRecurrentPPOEWMA, {"prox_decay": None}),
        (MaskablePPOEWMA, MaskableRecurrentPPOEWMA, {"kl_coef": 0.5, "kl_estimator": "analytic"}),
        (MaskablePPGEWMA, MaskableRecurrentPPGEWMA, {"n_policy_iterations": 2, "n_aux_epochs": 2}),
    ],
    ids=["MaskablePPO", "MaskablePPOEWMA", "MaskablePPGEWMA"],
)
def test_an_lstm_without_memory_is_none(base: Any, cls: Any, kwargs: dict[str, Any], action_space: str) -> None:
    """Up to rounding, if a minibatch is the whole rollout: their order is another one in sb3-contrib's families."""
    n_envs, n_samples = 2, 32
    common = {**COMMON, "batch_size": n_samples, "clip_range": 0.01, "learning_rate": 0.2, "ent_coef": 0.05}
    # SGD: Adam makes steps of one size of any gradient, of rounding too.
    policy_kwargs: dict[str, Any] = {"net_arch": [8], "optimizer_class": th.optim.SGD, "ortho_init": False}
    if issubclass(cls, AuxiliaryPhaseMixin):
        kwargs = {**kwargs, "aux_batch_size": 2 * n_samples, "aux_learning_rate": 0.1}
    models = []
    for algorithm in (base, cls):
        policy: Any = "MlpPolicy"
        own = {} if algorithm is MaskablePPO else {"engine": "reference", **kwargs}
        arguments = dict(policy_kwargs)
        if algorithm is MaskablePPGEWMA:
            arguments["critic_arch"] = "shared"
        if algorithm is cls:
            policy = without_memory(cls.policy_aliases["MlpLstmPolicy"])
        environments = DummyVecEnv(copies(masked_env(action_space), n_envs))
        models.append(algorithm(policy, environments, **{**common, "policy_kwargs": arguments}, **own))
    reference, own_model = models
    start = deepcopy(dict(reference.policy.state_dict()))
    own_model.policy.load_state_dict(start)
    if own_model.policy_ewma is not None:
        own_model.policy_ewma.reset()
    for model in models:
        model.set_random_seed(1)
        model.learn(ITERATIONS * n_samples)
    actions = [model.rollout_buffer.actions.reshape(n_samples, -1) for model in models]
    assert np.array_equal(*actions)
    for name, value in reference.policy.state_dict().items():
        th.testing.assert_close(own_model.policy.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        assert (value - start[name]).abs().max() > 1e-3, name
