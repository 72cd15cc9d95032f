"""Rollouts from another process: the numbers of collection in this one, what callbacks see, errors, and no leaks."""

import copy
import csv
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_ppo_ewma import (
    PPGEWMA,
    PPOEWMA,
    EnvPoolVecEnv,
    EwmaMixin,
    MaskablePPG,
    MaskablePPOEWMA,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPOEWMA,
    RemoteVecEnv,
)
from tests.watching import Watch, differences, plain

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork()"),
]

ROOT = Path(__file__).parents[1]
N_ENVS, N_STEPS = 2, 32
SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


def normalized(env_id: Any, **kwargs: Any) -> VecNormalize:
    return VecNormalize(make_vec_env(env_id, N_ENVS, seed=0), **kwargs)


def masked() -> VecEnv:
    return make_vec_env(lambda: InvalidActionEnvDiscrete(dim=5, n_invalid_actions=2), N_ENVS, seed=0)


class IntegerActions(gym.Env):  # type: ignore[type-arg]
    """Actions are integers of a box; the sum of all is observed and truncates episodes."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-3, 3, (2,), np.int64)

    def reset(self, **kwargs: Any) -> Any:
        self.total = 0.0
        return np.array([0.0], dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.total += float(np.sum(action)) + 0.5
        observation = np.array([self.total], dtype=np.float32)
        return observation, float(np.sin(self.total)), False, abs(self.total) > 5, {}


LSTM = {"policy_kwargs": {"lstm_hidden_size": 8}}
PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 1}
CASES: dict[str, Any] = {
    "cartpole": lambda: (PPOEWMA, "MlpPolicy", normalized("CartPole-v1"), {}),
    "sde": lambda: (PPOEWMA, "MlpPolicy", normalized("Pendulum-v1"), {"use_sde": True, "sde_sample_freq": 4}),
    "stale": lambda: (PPOEWMA, "MlpPolicy", make_vec_env("Acrobot-v1", N_ENVS, seed=0), {"staleness": 1}),
    "phasic": lambda: (PPGEWMA, "MlpPolicy", normalized("CartPole-v1"), PHASES),
    "recurrent": lambda: (RecurrentPPOEWMA, "MlpLstmPolicy", make_vec_env("CartPole-v1", N_ENVS, seed=0), {}),
    "recurrent, reference": lambda: (
        RecurrentPPOEWMA,
        "MlpLstmPolicy",
        make_vec_env("CartPole-v1", N_ENVS, seed=0),
        {**LSTM, "engine": "reference"},  # whose minibatches leave arrays of sequences in the rollout buffer
    ),
    "maskable": lambda: (MaskablePPOEWMA, "MlpPolicy", masked(), {}),
    "maskable, phasic": lambda: (MaskablePPG, "MlpPolicy", masked(), PHASES),
    "recurrent, phasic": lambda: (RecurrentPPG, "MlpLstmPolicy", normalized("CartPole-v1"), {**LSTM, **PHASES}),
    "both": lambda: (MaskableRecurrentPPOEWMA, "MlpLstmPolicy", masked(), {**LSTM, "staleness": 1}),
    "both, phasic": lambda: (
        MaskableRecurrentPPGEWMA,
        "MlpLstmPolicy",
        VecNormalize(masked(), norm_obs=False),
        {**LSTM, **PHASES},
    ),
    "integers": lambda: (PPOEWMA, "MlpPolicy", DummyVecEnv([IntegerActions] * N_ENVS), {}),
    "dictionary": lambda: (PPOEWMA, "MultiInputPolicy", normalized(SimpleMultiObsEnv, norm_obs_keys=["vec"]), {}),
    "processes": lambda: (
        PPOEWMA,
        "MlpPolicy",
        make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}),
        {},
    ),
}


def make(case: str, wrapper: Any = None, **kwargs: Any) -> Any:
    set_random_seed(0)  # some environments draw when they are made
    algorithm, policy, env, settings = CASES[case]()
    base: Any = env.unwrapped
    if wrapper is not None and isinstance(base, DummyVecEnv):
        base.envs = [wrapper(each) for each in base.envs]
    return algorithm(policy, env, **{**SETTINGS, **settings, **kwargs})


def state_of(model: Any) -> dict[str, Any]:
    venv = model.get_vec_normalize_env()
    statistics = [] if venv is None else [venv.ret_rms.mean, venv.ret_rms.var, venv.ret_rms.count]
    return plain(
        {
            "parameters": model.get_parameters(),
            "statistics": statistics,
            "episodes": list(model.ep_info_buffer),
            "last_obs": model._last_obs,
            "num_timesteps": model.num_timesteps,
            "log": {name: each for name, each in model.logger.name_to_value.items() if name.startswith("train/")},
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_without_lag_the_numbers_are_those_of_one_process(case: str) -> None:
    found = []
    for max_policy_lag in (None, 0):
        model, watch = make(case, max_policy_lag=max_policy_lag), Watch(sees_original_obs=False)
        model.learn(4 * N_ENVS * N_STEPS, watch)
        model.learn(2 * N_ENVS * N_STEPS, watch, reset_num_timesteps=False)  # goes on in the middle of episodes
        found.append({"state": state_of(model), "seen": watch.seen, "events": watch.events})
        model.env.close()
    alone, other = found
    assert len(alone["seen"]) == 6 * N_STEPS
    assert differences(alone, other) == []
    assert not multiprocessing.active_children()


class Slow(gym.Wrapper):  # type: ignore[type-arg]
    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        return super().step(action)


class SlowTraining(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        time.sleep(0.15)


def saved(model: Any, path: Path) -> dict[str, Any]:
    """All of the saved file that is not time."""
    model.save(path)
    times = {"start_time", "ep_info_buffer", "ep_success_buffer", "rollout_buffer_kwargs"}
    with zipfile.ZipFile(path.with_suffix(".zip")) as archive:
        found: dict[str, Any] = {name: archive.read(name) for name in archive.namelist() if name != "data"}
        data = json.loads(archive.read("data"))
    return {**found, **{name: str(value) for name, value in data.items() if name not in times}}


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("case", ["cartpole", "sde", "recurrent", "phasic", "processes", "stale"])
def test_the_same_seed_gives_the_same_numbers_whoever_is_slow(case: str, lag: int, tmp_path: Path) -> None:
    found = []
    for callback, wrapper in ((SlowTraining(), None), (None, Slow)):
        model = make(case, max_policy_lag=lag, wrapper=wrapper)
        model.learn(5 * N_ENVS * N_STEPS, callback)
        model.learn(3 * N_ENVS * N_STEPS, callback, reset_num_timesteps=False)
        found.append(saved(model, tmp_path / f"agent{len(found)}"))
        model.env.close()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    assert not multiprocessing.active_children()


def test_chunks_and_resumed_runs_draw_new_numbers(tmp_path: Path) -> None:
    def noise() -> np.ndarray:
        """What the worker drew last: actions without what the policy knows of the state."""
        return model.rollout_buffer.actions.flatten().copy()

    env = DummyVecEnv([Still] * N_ENVS)
    model: Any = PPOEWMA("MlpPolicy", env, max_policy_lag=1, learning_rate=0.0, **SETTINGS)
    drawn = []
    for _ in range(2):
        model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
        drawn.append(noise())
    env.close()  # a new process
    model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
    drawn.append(noise())
    model.save(tmp_path / "agent")
    for _ in range(2):  # the one that goes on, and the one that is loaded
        model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
        drawn.append(noise())
        env.close()
        env = DummyVecEnv([Still] * N_ENVS)
        model = PPOEWMA.load(tmp_path / "agent", env, device="cpu")
    assert not any(np.array_equal(a, b) for i, a in enumerate(drawn[:4]) for b in drawn[:i])
    np.testing.assert_array_equal(drawn[3], drawn[4])
    for _ in range(2):
        model.set_random_seed(1)
        model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
        drawn.append(noise())
    np.testing.assert_array_equal(drawn[-1], drawn[-2])
    assert not any(np.array_equal(drawn[-1], each) for each in drawn[:-2])
    env.close()


class Still(gym.Env):  # type: ignore[type-arg]
    """Nothing happens."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, dtype=np.float32), 1.0, False, False, {}


# === What callbacks change ===


class NewWeights(BaseCallback):
    """Changes the policy where a rollout begins."""

    def _on_rollout_start(self) -> None:
        with th.no_grad():
            self.model.policy.action_net.weight.mul_(1.5)

    def _on_step(self) -> bool:
        return True


class NewHead(BaseCallback):
    """Replaces a layer by another one, once by one of another kind."""

    n_rollouts = 0

    def _on_rollout_start(self) -> None:
        self.n_rollouts += 1
        policy: Any = self.model.policy
        if self.n_rollouts == 2:
            policy.mlp_extractor.policy_net = th.nn.Sequential(th.nn.Linear(4, 64), th.nn.ELU())
        if self.n_rollouts == 3:
            policy.action_net.register_forward_hook(lambda module, inputs, output: 0.5 * output)

    def _on_step(self) -> bool:
        return True


class NewSettings(BaseCallback):
    """Changes what collection reads."""

    def _on_rollout_start(self) -> None:
        self.model.gamma *= 0.9  # type: ignore[attr-defined]
        self.model.rollout_buffer.gae_lambda *= 0.9  # type: ignore[attr-defined]
        self.model.get_env().clip_obs *= 0.5  # type: ignore[union-attr]

    def _on_step(self) -> bool:
        return True


class NumpysNumbers(BaseCallback):
    """Changes settings to numbers that are not Python's."""

    def _on_rollout_start(self) -> None:
        self.model.gamma = self.model.rollout_buffer.gamma = np.float64(0.5)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


class NewStatistics(BaseCallback):
    """Changes running statistics in place."""

    def _on_rollout_end(self) -> None:
        self.model.get_env().obs_rms.mean[:] = 0.5  # type: ignore[union-attr]

    def _on_step(self) -> bool:
        return True


class Evaluates(BaseCallback):
    """Evaluates in the training environments, with and without normalising."""

    def _on_rollout_end(self) -> None:
        env: Any = self.model.get_env()
        env.norm_reward = not env.norm_reward
        self.logger.record("train/return", evaluate_policy(self.model, env, n_eval_episodes=2)[0])
        self.logger.record("train/original", env.get_original_reward().sum())
        self.logger.record("train/count", env.obs_rms.count)

    def _on_step(self) -> bool:
        return True


class Curious(BaseCallback):
    """Adds to rewards, in place, as intrinsic rewards are."""

    def _on_step(self) -> bool:
        self.locals["rewards"] += np.float32(0.25) * np.abs(self.locals["new_obs"][:, 0])
        return True


class Cuts(BaseCallback):
    """Ends episodes, in place."""

    def _on_step(self) -> bool:
        if self.n_calls % 7 == 0:
            self.locals["dones"][0] = True
        return True


class OtherActions(BaseCallback):
    """Says that other actions were taken, with other values and probabilities."""

    def _on_step(self) -> bool:
        if self.n_calls % 5 == 0:
            self.locals["actions"][:] = 0
            self.locals["values"][:] += 1
            self.locals["log_probs"][:] -= 0.1
        return True


class Rewrites(BaseCallback):
    """Changes steps of the rollout buffer before the present one."""

    def _on_step(self) -> bool:
        buffer = self.locals["rollout_buffer"]
        if buffer.pos >= 1:
            buffer.rewards[buffer.pos - 1] -= 0.5
        return True

    def _on_rollout_end(self) -> None:
        self.model.rollout_buffer.advantages *= 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "callback",
    [NewWeights, NewHead, NewSettings, NumpysNumbers, NewStatistics, Evaluates, Curious, Cuts, OtherActions, Rewrites],
)
@pytest.mark.parametrize("settings", [{}, {"recompute_advantages": True}], ids=["", "recomputed"])
def test_without_lag_callbacks_have_the_effect_that_they_have_in_one_process(
    callback: Any, settings: dict[str, Any]
) -> None:
    found = []
    for lag in (None, 0):
        # Whether a faster way takes a policy that changes is decided at another time in another process.
        model = make("cartpole", max_policy_lag=lag, engine="reference", **settings)
        model.learn(4 * N_ENVS * N_STEPS, callback())
        found.append(state_of(model))
        model.env.close()
    assert differences(*found) == []


class Rises(VecEnvWrapper):
    """Rewards that rise with a number, which it and others change."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.level = 0.0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.level += 0.01 * dones.sum()
        return observations, rewards * (1 + self.level), dones, infos

    def rise(self, level: float) -> None:
        self.level += level


def test_attributes_that_both_processes_change_are_those_of_one_process() -> None:
    class Raises(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            env: Any = self.training_env
            levels.append(env.level)
            env.rise(0.1)
            levels.append(env.level)
            env.level += 1.0

    found = []
    for lag in (None, 0):
        levels: list[float] = []
        env = Rises(make_vec_env("CartPole-v1", N_ENVS, seed=0))
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, **SETTINGS)
        model.learn(4 * N_ENVS * N_STEPS, Raises())
        found.append({"levels": levels, **state_of(model)})
        env.close()
    assert differences(*found) == []


class Bounded:
    """No class of environments."""

    maximum = np.inf

    def bound(self, maximum: float) -> None:
        self.maximum = maximum


class Curriculum(Bounded, VecEnvWrapper):
    """Rewards that depend on arrays, containers and objects, some of which it changes itself."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.weights = np.ones(venv.num_envs, np.float32)
        self.levels, self.bonus, self.shape = [0.0], {"done": 0.0}, Shape(1.0)
        self.shared = self.levels  # the same list
        self.n_done = np.zeros(venv.num_envs)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.n_done += dones
        rewards = self.shape(rewards) * self.weights + self.bonus["done"] * dones + sum(self.shared) + self.n_done
        return observations, np.minimum(rewards, self.maximum).astype(np.float32), dones, infos


class Shape:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        return self.factor * rewards


class Teaches(BaseCallback):
    """Changes a curriculum, in place and with new objects."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        env: Any = self.training_env
        self.seen.append(env.n_done.copy())
        n = len(self.seen)
        env.weights[n % 2] = 2.0 + n
        env.levels.append(0.25)
        env.bonus["done"] -= 1.0
        if n == 2:
            env.shape, env.weights = Shape(0.5), env.weights * 2
        env.bound(10.0 - n)


def test_what_callbacks_change_of_wrappers_acts_as_in_one_process() -> None:
    found = []
    for lag in (None, 0):
        env = Curriculum(make_vec_env("CartPole-v1", N_ENVS, seed=0))
        model, teaches = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, **SETTINGS), Teaches()
        model.learn(4 * N_ENVS * N_STEPS, teaches)
        own = {
            name: plain(getattr(env, name)) for name in ("weights", "levels", "shared", "bonus", "n_done", "maximum")
        }
        found.append({"seen": teaches.seen, "env": own, "rewards": model.rollout_buffer.rewards, **state_of(model)})
        env.close()
    assert differences(*found) == []


@pytest.mark.parametrize("cls", [DummyVecEnv, RemoteVecEnv])
def test_with_lag_what_callbacks_change_of_wrappers_acts_a_rollout_later(cls: Any) -> None:
    class Sets(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            env: Any = self.training_env
            rewards.append(self.model.rollout_buffer.rewards.mean(axis=0))  # type: ignore[attr-defined]
            env.weights[:] = [10.0, 20.0]
            env.levels[:] = [100.0]

    rewards: list[np.ndarray] = []
    env = Curriculum(cls([NeverEnds] * N_ENVS))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, learning_rate=0.0, **SETTINGS)
    model.learn(4 * N_ENVS * N_STEPS, Sets())
    env.close()
    expected = [[1.0, 1.0]] * 2 + [[110.0, 120.0]] * 2
    np.testing.assert_allclose(rewards, expected)


class Counts(VecEnvWrapper):
    """Counts its steps in attributes of several kinds."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.n_steps, self.by_env, self.marks = 0, np.zeros(venv.num_envs, np.int64), [0]

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.n_steps += 1
        self.by_env += 1
        self.marks[0] += 1
        return self.venv.step_wait()


class Novelty(VecEnvWrapper):
    """Adds what a network says, which callbacks train; another one changes in the worker."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        th.manual_seed(0)
        self.network, self.counter = th.nn.Linear(4, 1), th.nn.BatchNorm1d(4)

    def reset(self) -> Any:
        return self.venv.reset()

    @th.no_grad()
    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.counter(th.as_tensor(observations))
        return observations, rewards + self.network(th.as_tensor(observations)).numpy().flatten(), dones, infos


class TrainsNovelty(BaseCallback):
    """Trains the network in place, then grows it, then replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        return True

    @th.no_grad()
    def _on_rollout_end(self) -> None:
        env: Any = self.training_env
        self.seen.append(plain(dict(env.counter.state_dict())))
        if len(self.seen) == 2:
            env.network = th.nn.Sequential(env.network)
        if len(self.seen) == 3:
            env.network.append(th.nn.Linear(1, 1))
        for parameter in env.network.parameters():
            parameter.data += 0.1


def test_networks_of_wrappers_are_those_of_one_process() -> None:
    found = []
    for lag in (None, 0):
        env = Novelty(make_vec_env("CartPole-v1", N_ENVS, seed=0))
        model, trains = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, **SETTINGS), TrainsNovelty()
        th.manual_seed(0)
        model.learn(5 * N_ENVS * N_STEPS, trains)
        found.append({"seen": trains.seen, "rewards": model.rollout_buffer.rewards, **state_of(model)})
        env.close()
    assert differences(*found) == []


class Predicts(PPO):
    """A loop of its own, with a network that training changes, a list and a log."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.network, self.levels = th.nn.Linear(4, 1), [0.0]

    @th.no_grad()
    def collect_rollouts(self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        continues = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        predicted = self.network(th.as_tensor(rollout_buffer.observations)).numpy()[..., 0]
        rollout_buffer.advantages += predicted + sum(self.levels)
        self.logger.record("rollout/predicted", predicted.mean())
        self.logger.record_mean("rollout/level", sum(self.levels))
        return continues


class PredictsEWMA(EwmaMixin, Predicts):
    @th.no_grad()
    def train(self) -> None:
        super().train()
        self.levels.append(0.5)
        for parameter in self.network.parameters():
            parameter += 0.1


def test_a_loop_of_an_algorithm_below_logs_and_has_what_training_changes(tmp_path: Path) -> None:
    found = []
    for lag in (None, 0):
        env = make_vec_env("CartPole-v1", N_ENVS, seed=0)
        model = PredictsEWMA("MlpPolicy", env, max_policy_lag=lag, **SETTINGS)
        model.set_logger(configure(str(tmp_path / str(lag)), ["csv"]))
        model.learn(4 * N_ENVS * N_STEPS)
        with (tmp_path / str(lag) / "progress.csv").open() as file:
            log = [{name: row[name] for name in row if not name.startswith("time/")} for row in csv.DictReader(file)]
        assert len({row["rollout/predicted"] for row in log}) == len({row["rollout/level"] for row in log}) == 4
        found.append({"log": log, "advantages": model.rollout_buffer.advantages, **state_of(model)})
        env.close()
    assert differences(*found) == []


def test_infos_that_environments_use_again_are_those_of_the_step() -> None:
    class Reuses(VecEnvWrapper):
        def __init__(self, venv: VecEnv) -> None:
            super().__init__(venv)
            self.n_steps, self.array = 0, np.zeros(1)
            self.infos = tuple({} for _ in range(venv.num_envs))  # type: ignore[var-annotated]

        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            self.n_steps += 1
            self.array += 1
            for own, info in zip(self.infos, infos, strict=True):
                own.clear()
                own.update(info, n_steps=self.n_steps, array=self.array)
            return observations, rewards, dones, self.infos

    found = []
    for lag in (None, 0):
        env = Reuses(make_vec_env("CartPole-v1", N_ENVS, seed=0))
        watch = Watch()
        PPOEWMA("MlpPolicy", env, max_policy_lag=lag, **SETTINGS).learn(2 * N_ENVS * N_STEPS, watch)
        found.append(watch.seen)
        env.close()
    assert differences(*found) == []


def test_what_is_set_here_replaces_what_the_worker_has_changed_meanwhile() -> None:
    class Sets(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            env: Any = self.training_env
            seen.append([env.n_steps, env.by_env.tolist(), list(env.marks)])
            if len(seen) == 2:
                env.n_steps, env.marks = 1000, [1000]
                env.by_env[:] = 1000

    seen: list[Any] = []
    env = Counts(DummyVecEnv([NeverEnds] * N_ENVS))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    with pytest.warns(UserWarning, match="of Counts was set here while the process that collects") as warned:
        model.learn(6 * N_ENVS * N_STEPS, Sets())
    # After two rollouts the worker has begun the third one, in which it did not know of 1000.
    numbers = [N_STEPS, 2 * N_STEPS, 1000, 1000 + N_STEPS, 1000 + 2 * N_STEPS, 1000 + 3 * N_STEPS]
    assert seen == [[n, [n] * N_ENVS, [n]] for n in numbers]
    assert len([each for each in warned if "was set here" in str(each.message)]) == 3
    env.close()


def test_what_the_worker_did_in_vain_is_taken_back() -> None:
    class StopsInTheMiddle(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < N_STEPS + 3

    env = Counts(DummyVecEnv([NeverEnds] * N_ENVS))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=2, **SETTINGS)
    model.learn(10_000, StopsInTheMiddle())
    model.learn(3 * N_ENVS * N_STEPS, reset_num_timesteps=False)
    assert (env.n_steps, env.by_env.tolist(), env.marks) == (5 * N_STEPS, [5 * N_STEPS] * N_ENVS, [5 * N_STEPS])
    env.close()


def test_objects_that_cannot_be_sent_are_named() -> None:
    env: Any = Counts(DummyVecEnv([NeverEnds] * N_ENVS))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    model.learn(N_ENVS * N_STEPS)
    env.guard = threading.Lock()
    with pytest.raises(TypeError, match=r"guard=.* cannot be sent to the process with the environments"):
        model.learn(N_ENVS * N_STEPS)
    env.guard = None
    model.learn(N_ENVS * N_STEPS)
    env.close()


class NeverEnds(gym.Env):  # type: ignore[type-arg]
    """Rewards of 1."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, dtype=np.float32), 1.0, False, False, {}


def test_expanded_and_empty_buffers_reach_the_worker() -> None:
    env = make_vec_env("CartPole-v1", N_ENVS, seed=0)
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=0, prox_decay=None, **SETTINGS)
    model.policy.register_buffer("expanded", th.ones(1, dtype=th.bfloat16).expand(5))
    model.policy.register_buffer("empty", th.zeros(0, 3))
    model.learn(N_ENVS * N_STEPS)
    env.close()


@pytest.mark.parametrize("callback", [Curious, Cuts])
def test_with_lag_callbacks_change_rewards_and_ends(callback: Any) -> None:
    found = []
    for each in (None, callback()):
        model = make("cartpole", max_policy_lag=1, learning_rate=0.0)
        model.learn(3 * N_ENVS * N_STEPS, each)
        found.append(model.rollout_buffer.advantages.copy())
        model.env.close()
    assert not np.allclose(*found)


def test_dones_of_an_lstm_cannot_be_changed() -> None:
    model = make("recurrent", max_policy_lag=1)
    with pytest.raises(ValueError, match=r"changed locals\['dones'\].*use max_policy_lag=None"):
        model.learn(256, Cuts())
    model.env.close()


class Truncates(BaseCallback):
    """Says that every episode was truncated, or that it ended elsewhere."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__()
        self.key, self.value = key, value

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "terminal_observation" in info:
                info[self.key] = self.value
        return True


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("cartpole", "TimeLimit.truncated", True),
        ("integers", "TimeLimit.truncated", False),
        ("integers", "terminal_observation", np.ones(1, np.float32)),
        ("integers", "terminal_observation", None),
    ],
)
def test_what_is_added_to_rewards_cannot_be_changed(case: str, key: str, value: Any, lag: int) -> None:
    model = make(case, max_policy_lag=lag)
    with pytest.raises(ValueError, match=r"changed 'TimeLimit\.truncated' or 'terminal_observation'"):
        model.learn(4 * N_ENVS * N_STEPS, Truncates(key, value))
    model.env.close()


def test_observations_cannot_be_changed() -> None:
    class Changes(BaseCallback):
        def _on_step(self) -> bool:
            self.locals["new_obs"][:] = 0
            return True

    model = make("cartpole", max_policy_lag=1)
    with pytest.raises(ValueError, match="read-only"):
        model.learn(256, Changes())
    model.env.close()


def test_a_policy_that_changes_while_it_collects_is_refused() -> None:
    class Counts(th.nn.Tanh):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n_calls", th.zeros(()))

        def forward(self, inputs: th.Tensor) -> th.Tensor:
            self.n_calls += 1
            return super().forward(inputs)

    model = make("cartpole", max_policy_lag=1, policy_kwargs={"activation_fn": Counts})
    with pytest.raises(ValueError, match=r"changes its buffer 'mlp_extractor.*n_calls' while it collects"):
        model.learn(256)
    model.env.close()


def test_a_policy_that_cannot_be_pickled_is_refused() -> None:
    model = make("cartpole", max_policy_lag=1)
    model.policy.lock = threading.Lock()
    with pytest.raises(TypeError, match="a policy that can be pickled, this one cannot"):
        model.learn(256)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("lag", [None, 1])
def test_arrays_that_callbacks_keep_stay_what_they_were(lag: int | None) -> None:
    class Keeps(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Any] = []

        def _on_step(self) -> bool:
            names = ("new_obs", "actions", "dones")
            self.kept += [(self.locals[name], self.locals[name].copy()) for name in names]
            return True

    model, keeps = make("cartpole", max_policy_lag=lag), Keeps()
    model.learn(5 * N_ENVS * N_STEPS, keeps)
    model.env.close()
    assert all(np.array_equal(each, copy) for each, copy in keeps.kept)


class Shifted(PPOEWMA):
    """Changes every rollout."""

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        continues = super().collect_rollouts(*args, **kwargs)
        self.rollout_buffer.advantages += 1
        return continues


def test_an_override_of_collection_acts_once() -> None:
    found = []
    for lag in (None, 0):
        env = make_vec_env("CartPole-v1", N_ENVS, seed=0)
        model = Shifted("MlpPolicy", env, max_policy_lag=lag, **SETTINGS).learn(3 * N_ENVS * N_STEPS)
        found.append({**state_of(model), "advantages": model.rollout_buffer.advantages})
        env.close()
    assert differences(*found) == []


def test_switches_of_wrappers_act_at_the_next_call() -> None:
    """As one evaluates with the environments of the training."""
    found = []
    for lag in (None, 1):
        env: Any = normalized("CartPole-v1")
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, learning_rate=0.0, **SETTINGS)
        model.learn(N_ENVS * N_STEPS)
        env.training = env.norm_reward = False
        mean, _ = evaluate_policy(model, env, n_eval_episodes=4, warn=False)
        found.append([env.obs_rms.count, mean % 1, env.ret_rms.count])
        env.training = True
        env.reset()
        found[-1].append(env.obs_rms.count)  # what the worker does comes back
        env.close()
    assert found[0] == found[1]


def test_copies_of_a_model_that_collects() -> None:
    model = make("cartpole", max_policy_lag=1)
    model.learn(2 * N_ENVS * N_STEPS)
    first = model.env
    model.set_env(make_vec_env("CartPole-v1", N_ENVS))
    copied = copy.deepcopy(model)
    first.close()
    model.env.close()
    copied.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
    assert copied.num_timesteps == 3 * N_ENVS * N_STEPS
    copied.env.close()


# === Lag ===


@pytest.mark.parametrize("case", ["cartpole", "both, phasic"])
@pytest.mark.parametrize(("lag", "mode"), [(1, "fixed"), (2, "fixed"), (1, "newest"), (2, "newest")])
def test_how_many_trainings_a_rollout_lacks(case: str, lag: int, mode: str) -> None:
    model = make(case, max_policy_lag=lag, lag_mode=mode)
    lags = []

    class Lags(BaseCallback):
        def _on_rollout_end(self) -> None:
            log = self.logger.name_to_value
            lags.append(log["time/policy_lag"])
            assert log["time/collector_idle_s"] >= 0
            assert log["time/learner_idle_s"] >= 0

        def _on_step(self) -> bool:
            return True

    model.learn(6 * N_ENVS * N_STEPS, Lags())
    assert model.num_timesteps == 6 * N_ENVS * N_STEPS
    assert len(lags) == 6
    most = [min(i, lag) for i in range(6)]
    if mode == "fixed":
        assert lags == most
    else:
        assert all(0 <= each <= bound for each, bound in zip(lags, most, strict=True))
    model.env.close()


@pytest.mark.parametrize(
    ("mode", "is_prox_recent", "is_behav_recent"),
    [("decoupled", True, False), ("behavior", False, False), ("proximal", True, True)],
)
def test_policies_of_late_rollouts(mode: str, is_prox_recent: bool, is_behav_recent: bool) -> None:
    kwargs = {"prox_decay": None, "n_epochs": 1, "batch_size": N_ENVS * N_STEPS, "learning_rate": 0.02}
    model = make("cartpole", max_policy_lag=1, staleness_mode=mode, **kwargs)
    log = TrainingsByLag()
    model.learn(12 * N_ENVS * N_STEPS, log)
    model.env.close()
    assert len(log.late) == 10
    # The first and only step of an iteration: the policy is the recent one. A step may also change hardly anything, but
    # not all of them.
    assert all(abs(training["train/approx_kl_prox"]) < 1e-6 for training in log.late) == is_prox_recent
    assert all(abs(training["train/importance_ratio_max"] - 1) < 1e-4 for training in log.late) == is_behav_recent


class TrainingsByLag(BaseCallback):
    """What was logged of trainings on rollouts whose policy lacked one."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[dict[str, Any]] = []
        self.lag = 0

    def _on_rollout_end(self) -> None:
        self.lag = self.logger.name_to_value["time/policy_lag"]

    def _on_rollout_start(self) -> None:  # after the training before
        if self.lag == 1:
            self.late.append(dict(self.logger.name_to_value))

    def _on_step(self) -> bool:
        return True


def test_evaluation_checkpoints_and_calls_reach_the_environments(tmp_path: Path) -> None:
    env = normalized("CartPole-v1")
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    evaluation = EvalCallback(VecNormalize(make_vec_env("CartPole-v1", 1), training=False), eval_freq=64, verbose=0)
    checkpoints = CheckpointCallback(64, str(tmp_path), save_vecnormalize=True)
    model.learn(256, [evaluation, checkpoints])
    assert np.isfinite(evaluation.last_mean_reward)
    assert env.obs_rms.count > 256
    saved = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_256_steps.pkl"), make_vec_env("CartPole-v1", 1))
    np.testing.assert_array_equal(saved.obs_rms.mean, env.obs_rms.mean)
    assert saved.reset().shape == (1, 4)
    env.set_attr("tau", 0.5)
    assert env.get_attr("tau") == [0.5, 0.5]
    assert env.env_method("get_wrapper_attr", "gravity") == [9.8, 9.8]
    assert evaluate_policy(model, env, n_eval_episodes=2)[0] > 0
    env.close()
    # Those of this process, which were never changed
    assert env.get_attr("tau") == [0.02, 0.02]


def test_envpool_after_a_reset_in_this_process() -> None:
    pytest.importorskip("envpool")
    env = EnvPoolVecEnv("CartPole-v1", N_ENVS, seed=0)
    model = PPOEWMA("MlpPolicy", env, **SETTINGS)
    model.learn(64)
    model.max_policy_lag = 1
    model.learn(192, reset_num_timesteps=False)
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 384
    assert len(model.ep_info_buffer) > 0
    env.close()


@pytest.mark.parametrize("algorithm", [MaskablePPOEWMA, MaskableRecurrentPPOEWMA])
def test_a_step_without_valid_action_is_refused(algorithm: Any) -> None:
    class DeadEnd(InvalidActionEnvDiscrete):
        def action_masks(self) -> list[bool]:
            return [self.current_step != 20] * 5

    env = DummyVecEnv([lambda: DeadEnd(dim=5)])
    model = algorithm(
        "MlpLstmPolicy" if algorithm is MaskableRecurrentPPOEWMA else "MlpPolicy", env, max_policy_lag=1, **SETTINGS
    )
    with pytest.raises(ValueError, match="valid action, environment 0 at step 20 of the rollout has none"):
        model.learn(64)
    model.env.close()
    assert not multiprocessing.active_children()


class Stops(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 40


def test_a_callback_that_stops() -> None:
    model = make("cartpole", max_policy_lag=1)
    model.learn(1024, Stops())
    assert model.num_timesteps == 40 * N_ENVS
    model.learn(256, reset_num_timesteps=False)
    assert model.num_timesteps == 40 * N_ENVS + 256
    model.env.close()


class Counter(gym.Env):  # type: ignore[type-arg]
    """Observes how many steps it has made."""

    observation_space = gym.spaces.Box(0, np.inf, (1,))
    action_space = gym.spaces.Discrete(2)
    n_steps = 0
    seconds = 0.0

    def reset(self, **kwargs: Any) -> Any:
        return np.array([self.n_steps], dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        time.sleep(self.seconds)
        return np.array([self.n_steps], dtype=np.float32), 0.0, False, False, {}


def test_without_lag_collection_goes_on_where_it_is_after_a_callback_that_stops() -> None:
    model = PPOEWMA("MlpPolicy", DummyVecEnv([Counter]), max_policy_lag=0, **SETTINGS)
    model.learn(1024, Stops())
    model.learn(N_STEPS, reset_num_timesteps=False)
    # Behind the rollout in which it stopped
    np.testing.assert_array_equal(model.rollout_buffer.observations.flatten(), np.arange(2 * N_STEPS, 3 * N_STEPS))
    assert model.env is not None
    model.env.close()


def test_a_loop_of_ones_own_may_go_on_beyond_the_number_of_steps() -> None:
    env = make_vec_env("CartPole-v1", N_ENVS)
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=10.0, **SETTINGS)
    _, callback = model._setup_learn(0)
    for _ in range(3):
        model.collect_rollouts(env, callback, model.rollout_buffer, N_STEPS)
        model.train()
    assert model.num_timesteps == 3 * N_ENVS * N_STEPS
    env.close()


def test_copies_of_a_model_begin_with_environments_of_their_own() -> None:
    env = DummyVecEnv([Counter])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    model.learn(2 * N_STEPS)
    copied = copy.deepcopy(model)
    copied.learn(N_STEPS, reset_num_timesteps=False)
    np.testing.assert_array_equal(copied.rollout_buffer.observations.flatten(), np.arange(N_STEPS))
    model.learn(N_STEPS, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.observations.flatten(), np.arange(2 * N_STEPS, 3 * N_STEPS))
    for each in (model, copied):
        assert each.env is not None
        each.env.close()


def test_closed_environments_serve_again() -> None:
    model = make("cartpole", max_policy_lag=1)
    model.learn(128)
    model.env.close()
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 256
    model.env.close()
    model.max_policy_lag = None
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 384
    assert not multiprocessing.active_children()


# === Errors ===


class Failing(gym.Wrapper):  # type: ignore[type-arg]
    """Does something bad in its fiftieth step."""

    def __init__(self, env: gym.Env, what: str) -> None:  # type: ignore[type-arg]
        super().__init__(env)
        self.what, self.n_steps = what, 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if self.n_steps == 50:
            if self.what == "raise":
                raise KeyError("the reason why")
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().step(action)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("raise", KeyError, "the reason why"),
        ("die", RuntimeError, "has ended \\(signal SIGKILL\\)"),
        ("hang", RuntimeError, "no step for 3 seconds \\(collector_timeout\\)"),
    ],
)
def test_a_worker_that_fails(what: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: Failing(gym.make("CartPole-v1"), what)])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=3.0 if what == "hang" else 60.0, **SETTINGS)
    with pytest.raises(error, match=message) as raised:
        model.learn(1024)
    if what == "raise":  # where it came from
        assert "in step" in str(raised.value.__cause__)
    assert not multiprocessing.active_children()
    assert model.num_timesteps == 32
    model.save(tmp_path / "agent")
    assert PPOEWMA.load(tmp_path / "agent", device="cpu").num_timesteps == 32
    # With other environments it goes on.
    model.set_env(make_vec_env("CartPole-v1", 1))
    model.learn(64, reset_num_timesteps=False)
    model.env.close()


SCRIPT = """
import multiprocessing, signal
from stable_baselines3.common.callbacks import BaseCallback
from sb3_ppo_ewma import PPOEWMA

class Tells(BaseCallback):
    def _on_rollout_end(self):
        print("collects", multiprocessing.active_children()[0].pid, flush=True)
    def _on_step(self):
        return True

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background would have ignored
PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=1, max_policy_lag=1, device="cpu").learn(
    10**9, Tells()
)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize("how", ["ctrl_c", "kill"])
def test_the_end_of_training_is_that_of_all_processes(how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    assert is_running(pid)
    if how == "ctrl_c":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (how == "ctrl_c")
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_ten_starts_leave_nothing_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("sb3-ppo-ewma")

    counts = []
    for start in range(11):
        model = PPOEWMA("MlpPolicy", "CartPole-v1", max_policy_lag=1, **{**SETTINGS, "n_steps": 16, "batch_size": 16})
        model.learn(32)
        if start % 2:  # the other half only goes out of scope
            assert model.env is not None
            model.env.close()
        del model
        gc.collect()
        counts.append((open_files(), mappings()))
        assert not multiprocessing.active_children()
    assert counts[-1] == counts[0]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_policy_lag": -1}, ValueError, "max_policy_lag must be >= 0, got -1"),
        ({"max_policy_lag": True}, TypeError, "max_policy_lag must be an integer >= 0, got True"),
        ({"collector_timeout": -1.0}, ValueError, "collector_timeout must be >= 0, got -1.0"),
        ({"collector_timeout": 0}, ValueError, "collector_timeout must be > 0, got 0"),
        ({"lag_mode": "oldest"}, ValueError, "lag_mode must be one of 'fixed', 'newest', got 'oldest'"),
    ],
)
def test_values_out_of_range(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PPOEWMA("MlpPolicy", "CartPole-v1", **kwargs)
