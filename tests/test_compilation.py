"""Compiled gradient steps: those of the ordinary ones up to rounding."""

import copy
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import _dynamo, nn

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, MaskablePPOEWMA, RecurrentPPOEWMA
from sb3_ppo_ewma._engine.compilation import CompiledSteps
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv
from tests.battery.helpers import assert_same, copy_parameters, record_log
from tests.golden_data import case_ids, load_case
from tests.golden_runs import GoldenRun

COMPILERS = (os.environ.get("CXX", "g++"), "clang++")
pytestmark = pytest.mark.skipif(
    not hasattr(_dynamo.config, "trace_autograd_ops") or not any(map(shutil.which, COMPILERS)),
    reason="needs a C++ compiler and a torch that can compile a backward pass",
)


def make(cls: Any = PPOEWMA, policy: str = "MlpPolicy", env: Any = None, **kwargs: Any) -> Any:
    """:return: a small model; the last of three minibatches is smaller"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 6, "n_epochs": 2, "learning_rate": 0.01, "seed": 0}
    defaults["policy_kwargs"] = {"net_arch": [4]}
    env = SpaceEnv(action_space="box", episode_length=5) if env is None else env
    return cls(policy, env, **{**defaults, **kwargs})


def train(total_timesteps: int = 64, **kwargs: Any) -> tuple[Any, list[dict[str, float]]]:
    """:return: a trained model, what it logged"""
    return go_on(make(**kwargs), total_timesteps)


def go_on(model: Any, total_timesteps: int = 64) -> tuple[Any, list[dict[str, float]]]:
    """:return: the model after more training, what it logged"""
    rows = record_log(model)
    model.learn(total_timesteps)
    parts = ("train/", "aux/")
    return model, [{key: value for key, value in row.items() if key.startswith(parts)} for _, row in rows]


def assert_equal_training(compiled: Any, eager: Any) -> None:
    """Up to rounding; the second one was made without a graph."""
    (model, rows), (reference, reference_rows) = compiled, eager
    assert model._compiled_steps.n_steps > 0
    assert reference._compiled_steps is None
    assert model._n_updates == reference._n_updates
    th.testing.assert_close(copy_parameters(model), copy_parameters(reference), rtol=1e-4, atol=1e-5)
    for name in ("optimizer", "value_optimizer", "aux_optimizer"):
        holder = model.policy if name == "optimizer" else model
        reference_holder = reference.policy if name == "optimizer" else reference
        if getattr(holder, name, None) is not None:
            assert_close_states(getattr(holder, name).state_dict(), getattr(reference_holder, name).state_dict())
    if model.policy_ewma is not None:
        averages = [dict(each.policy_ewma.state_dict()) for each in (model, reference)]
        th.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
    assert len(rows) == len(reference_rows) > 0
    for row, reference_row in zip(rows, reference_rows, strict=True):
        assert row == pytest.approx(reference_row, rel=1e-3, abs=1e-4)


def assert_close_states(own: dict[str, Any], reference: dict[str, Any]) -> None:
    """Of optimisers."""
    assert own["param_groups"] == reference["param_groups"]
    assert own["state"].keys() == reference["state"].keys()
    for index, state in reference["state"].items():
        assert own["state"][index].keys() == state.keys()
        assert own["state"][index]["step"] == state["step"]
        th.testing.assert_close(dict(own["state"][index]), dict(state), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- the same results


def test_cartpole_with_schedules() -> None:
    kwargs: dict[str, Any] = {
        "env": "CartPole-v1",
        "learning_rate": lambda progress: 0.001 + 0.01 * progress,
        "clip_range": lambda progress: 0.02 + 0.2 * progress,
    }
    before = _dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = train(torch_compile=True, **kwargs)
    # One for each size of minibatch
    assert _dynamo.utils.counters["stats"]["unique_graphs"] - before <= 3
    assert compiled[0]._compiled_steps.n_steps == 4 * 2 * 3
    assert_equal_training(compiled, train(**kwargs))


class DropoutExtractor(BaseFeaturesExtractor):
    """Draws random numbers in training."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


class OwnBuffer(RolloutBuffer):
    """Minibatches come from its own ``get()``."""


PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 16, "aux_learning_rate": 1e-4}
CASES: dict[str, dict[str, Any]] = {
    "box": {"ent_coef": 0.1, "clip_range_vf": 0.2, "vf_coef": 0.9, "max_grad_norm": 0.05},
    "multidiscrete": {"env": SpaceEnv(action_space="multidiscrete")},
    "multibinary": {"env": SpaceEnv(action_space="multibinary")},
    "dict": {"env": SpaceEnv(OBSERVATION_SPACES["dict"]), "policy": "MultiInputPolicy", "learning_rate": 1e-3},
    "cnn": {"env": SpaceEnv(OBSERVATION_SPACES["image_channels_last"]), "policy": "CnnPolicy", "learning_rate": 1e-3},
    "impala": {
        "env": SpaceEnv(OBSERVATION_SPACES["image_channels_last"]),
        "policy": "ImpalaPolicy",
        "learning_rate": 1e-3,
        "policy_kwargs": {"features_extractor_kwargs": {"channels": (4,), "n_blocks": 1, "features_dim": 8}},
    },
    "own buffer": {"rollout_buffer_class": OwnBuffer},
    "dropout": {"policy_kwargs": {"net_arch": [4], "features_extractor_class": DropoutExtractor}},
    "no EWMA": {"prox_decay": None, "clip_range": 0.01, "advantage_decay": 0.5},
    "penalty": {"kl_coef": 0.5, "clip_range": None, "max_importance_ratio": None},
    "value epochs": {"n_epochs_value": 3, "recompute_advantages": True},
    "weight decay": {
        "policy_kwargs": {"net_arch": [4], "optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.5, 0.8)}}
    },
    "stale decoupled": {"staleness": 1, "prox_decay": None},
    "stale behavior": {"staleness": 1, "staleness_mode": "behavior"},
    "stale proximal": {"staleness": 1, "staleness_mode": "proximal", "prox_decay": None},
    "PPG dual": {"cls": PPG, **PHASES},
    "PPG shared": {
        "cls": PPG,
        **PHASES,
        "policy_kwargs": {"critic_arch": "shared", "trunk_arch": [4], "net_arch": [4]},
    },
    "PPGEWMA detach": {
        "cls": PPGEWMA,
        **PHASES,
        "policy_kwargs": {"critic_arch": "detach", "trunk_arch": [4], "net_arch": [4], "std_activation": "softplus"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_same_results(name: str) -> None:
    kwargs = {"batch_size": 8, **CASES[name]}
    assert_equal_training(train(torch_compile=True, **copy.deepcopy(kwargs)), train(**copy.deepcopy(kwargs)))


@pytest.mark.slow
def test_every_training_of_a_long_run() -> None:
    """Runs drift apart by rounding; from the same state, a training does not, however long the run."""
    compiled = make(env="CartPole-v1", torch_compile=True).learn(16)
    eager = make(env="CartPole-v1").learn(16)
    train = compiled.train

    def train_both() -> None:
        state = {**copy.deepcopy(compiled.get_parameters()), "generators": eager.generators.state_dict()}
        eager.rollout_buffer = copy.deepcopy(compiled.rollout_buffer)
        generator = np.random.get_state()
        train()
        np.random.set_state(generator)
        eager.set_parameters(state)
        eager.train()
        th.testing.assert_close(copy_parameters(compiled), copy_parameters(eager), rtol=1e-5, atol=1e-6)
        average, reference = (dict(model.policy_ewma.state_dict()) for model in (compiled, eager))
        th.testing.assert_close(average, reference, rtol=1e-5, atol=1e-6)

    compiled.train = train_both
    compiled.learn(640)
    assert compiled._compiled_steps.n_steps == 41 * 2 * 3


@pytest.mark.slow
def test_a_saved_model_goes_on_compiled() -> None:
    model, _ = train(torch_compile=True, batch_size=8)
    file = io.BytesIO()
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        assert "_compiled_steps" not in json.loads(archive.read("data"))
    results = []
    for given in ({}, {"torch_compile": False}):
        file.seek(0)
        loaded = PPOEWMA.load(file, env=SpaceEnv(action_space="box", episode_length=5), **given)
        assert loaded.torch_compile == (not given)
        loaded.set_random_seed(1)
        results.append(go_on(loaded))
    assert_equal_training(*results)


# ---------------------------------------------------------------------- steps that are not made


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_steps_that_are_not_made() -> None:
    kwargs = {"batch_size": 8, "target_kl": 1e-3, "n_epochs": 5}
    compiled, eager = (train(torch_compile=torch_compile, **kwargs) for torch_compile in (True, False))
    assert_equal_training(compiled, eager)
    model, _ = compiled
    assert model._compiled_steps.n_steps < 4 * 5 * 2  # otherwise target_kl stopped nothing

    with th.no_grad():
        model.policy.value_net.bias.fill_(1e30)  # its square overflows
    before = copy.deepcopy(
        [dict(part.state_dict()) for part in (model.policy, model.policy.optimizer, model.policy_ewma)]
    )
    with pytest.raises(ValueError, match=r"NaN or Inf in values .* the update was not made"):
        model.learn(16, reset_num_timesteps=False)
    after = [dict(part.state_dict()) for part in (model.policy, model.policy.optimizer, model.policy_ewma)]
    after[1]["param_groups"] = before[1]["param_groups"]
    assert_same(after, before)


class Spike(gym.Wrapper[Any, Any, Any, Any]):
    """The reward of one step is so large that the square of its error overflows."""

    n_calls = 0

    def step(self, action: Any) -> Any:
        self.n_calls += 1
        observation, reward, *rest = self.env.step(action)
        return observation, 1e25 if self.n_calls == 6 else reward, *rest


# Four minibatches are one graph, a smaller one follows
GROUPED: dict[str, Any] = {"n_steps": 36, "batch_size": 8, "ent_coef": 0.1, "kl_coef": 0.5}


def test_several_steps_in_a_graph() -> None:
    before = _dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = train(144, torch_compile=True, **GROUPED)
    assert _dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert compiled[0]._compiled_steps.n_steps == 4 * 2 * 5
    assert_equal_training(compiled, train(144, **GROUPED))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_no_step_is_made_after_one_that_cannot_be() -> None:
    models = []
    for torch_compile in (True, False):
        # Of a single sample, since nothing is carried over to others
        model = make(env=Spike(SpaceEnv(action_space="box")), torch_compile=torch_compile, gamma=0.0, **GROUPED)
        with pytest.raises(ValueError, match="the update was not made"):
            model.learn(36)
        models.append(model)
    steps = [{float(state["step"]) for state in model.policy.optimizer.state.values()} for model in models]
    assert steps[0] == steps[1]
    assert steps[0] == {2}  # of four in a graph
    th.testing.assert_close(*map(copy_parameters, models), rtol=1e-4, atol=1e-5)
    assert models[0].policy_ewma.total_weight == models[1].policy_ewma.total_weight > 1


# ---------------------------------------------------------------------- what cannot be compiled


SGD = {"policy_kwargs": {"net_arch": [4], "optimizer_class": th.optim.SGD}}
FALLBACKS: dict[str, dict[str, Any]] = {
    "optimizer": SGD,
    "settings": {"policy_kwargs": {"net_arch": [4], "optimizer_kwargs": {"amsgrad": True}}},
    "analytic penalty": {"kl_coef": 0.5, "kl_estimator": "analytic"},
    "lstm": {"cls": RecurrentPPOEWMA, "policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 4}},
    "maskable": {"cls": MaskablePPOEWMA, "env": InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)},
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_training_goes_on_without_a_graph(name: str) -> None:
    kwargs = FALLBACKS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model, _ = train(torch_compile=True, **copy.deepcopy(kwargs))
    messages = [str(warning.message) for warning in caught if "torch_compile" in str(warning.message)]
    assert len(messages) == 1
    assert messages[0].startswith("torch_compile=True has no effect, training goes on without it: ")
    reference, _ = train(**kwargs)
    th.testing.assert_close(copy_parameters(model), copy_parameters(reference), rtol=1e-4, atol=1e-5)
    assert_close_states(model.policy.optimizer.state_dict(), reference.policy.optimizer.state_dict())


def test_a_copy_makes_its_own_graphs() -> None:
    steps = CompiledSteps("max-autotune")
    steps.n_steps = 5
    for copied in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert copied.n_steps == 0
        assert copied._mode == "max-autotune"


@pytest.mark.slow
def test_models_do_not_share_a_limit_of_graphs() -> None:
    with _dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            assert make(torch_compile=True, seed=seed).learn(32)._compiled_steps.n_steps == 2 * 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize("case_id", [case_ids("e2e_ppo")[0]])
def test_reference_trajectory(case_id: str, default_dtype: Any) -> None:
    case = load_case("e2e_ppo", case_id)
    default_dtype(case.dtype)
    run = GoldenRun("e2e_ppo", case, feed=True, fused=True, torch_compile=True)
    run.run()
    assert run.model._compiled_steps.n_steps == len(run.params)
    steps = case.arrays["mb_mask"].any(axis=(1, 2))
    np.testing.assert_allclose(run.params, case.arrays["params"][steps], rtol=1e-6, atol=1e-8)
