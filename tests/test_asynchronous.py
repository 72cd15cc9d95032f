"""Rollouts from another process: the numbers of collection in this one, what callbacks see, errors, and no leaks."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_ppo_ewma import (
    PPGEWMA,
    PPOEWMA,
    EnvPoolVecEnv,
    MaskablePPG,
    MaskablePPOEWMA,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPOEWMA,
)

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


LSTM = {"policy_kwargs": {"lstm_hidden_size": 8}}
PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 1}
CASES: dict[str, Any] = {
    "cartpole": lambda: (PPOEWMA, "MlpPolicy", normalized("CartPole-v1"), {}),
    "sde": lambda: (PPOEWMA, "MlpPolicy", normalized("Pendulum-v1"), {"use_sde": True, "sde_sample_freq": 4}),
    "stale": lambda: (PPOEWMA, "MlpPolicy", make_vec_env("Acrobot-v1", N_ENVS, seed=0), {"staleness": 1}),
    "phasic": lambda: (PPGEWMA, "MlpPolicy", normalized("CartPole-v1"), PHASES),
    "recurrent": lambda: (RecurrentPPOEWMA, "MlpLstmPolicy", make_vec_env("CartPole-v1", N_ENVS, seed=0), {}),
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
    "dictionary": lambda: (PPOEWMA, "MultiInputPolicy", normalized(SimpleMultiObsEnv, norm_obs_keys=["vec"]), {}),
    "processes": lambda: (
        PPOEWMA,
        "MlpPolicy",
        make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}),
        {},
    ),
}


def make(case: str, **kwargs: Any) -> Any:
    set_random_seed(0)  # some environments draw when they are made
    algorithm, policy, env, settings = CASES[case]()
    return algorithm(policy, env, **{**SETTINGS, **settings, **kwargs})


class Watch(BaseCallback):
    """What SB3 promises to callbacks."""

    NAMES = ("n_steps", "obs_tensor", "actions", "clipped_actions", "values", "log_probs", "new_obs", "rewards",
             "dones", "infos")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.events: list[str] = []

    def _on_step(self) -> bool:
        venv = self.model.get_vec_normalize_env()
        original = None if venv is None else venv.get_original_reward().copy()
        local = {name: self.locals[name] for name in self.NAMES if name in self.locals}
        self.seen.append({"num_timesteps": self.num_timesteps, "original": original, **plain(local)})
        return True

    def _on_rollout_start(self) -> None:
        self.events.append(f"start {self.model.num_timesteps}")

    def _on_rollout_end(self) -> None:
        self.events.append(f"end {self.model.num_timesteps}")

    def _on_training_end(self) -> None:
        self.events.append("training end")


def plain(value: Any) -> Any:
    """Copies, without tensors and without the time that episodes took."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name != "t"}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, th.Tensor):
        return value.numpy().copy()
    return value.copy() if isinstance(value, np.ndarray) else value


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = a.keys() | b.keys()
        return [line for name in sorted(names) for line in differences(a.get(name), b.get(name), f"{path}/{name}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    return [] if np.array_equal(a, b) else [path]


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
    for async_rollouts in (None, 0):
        model, watch = make(case, async_rollouts=async_rollouts), Watch()
        model.learn(4 * N_ENVS * N_STEPS, watch)
        model.learn(2 * N_ENVS * N_STEPS, watch, reset_num_timesteps=False)  # goes on in the middle of episodes
        found.append({"state": state_of(model), "seen": watch.seen, "events": watch.events})
        model.env.close()
    alone, other = found
    assert len(alone["seen"]) == 6 * N_STEPS
    if case.startswith("maskable"):  # discrete actions, which sb3-contrib has no reason to clip
        other["seen"] = [{name: step[name] for name in step if name != "clipped_actions"} for step in other["seen"]]
    assert differences(alone, other) == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("case", ["cartpole", "recurrent", "phasic", "both, phasic"])
def test_a_rollout_lacks_no_more_trainings_than_allowed(case: str) -> None:
    model = make(case, async_rollouts=1)
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
    assert lags[0] == 0
    assert set(lags[1:]) <= {0, 1}
    assert 1 in lags
    model.env.close()


@pytest.mark.parametrize(
    ("mode", "is_prox_recent", "is_behav_recent"),
    [("decoupled", True, False), ("behavior", False, False), ("proximal", True, True)],
)
def test_policies_of_late_rollouts(mode: str, is_prox_recent: bool, is_behav_recent: bool) -> None:
    kwargs = {"prox_decay": None, "n_epochs": 1, "batch_size": N_ENVS * N_STEPS, "learning_rate": 0.02}
    model = make("cartpole", async_rollouts=1, staleness_mode=mode, **kwargs)
    log = TrainingsByLag()
    model.learn(12 * N_ENVS * N_STEPS, log)
    model.env.close()
    # How many come late is a matter of time, but not that some do.
    assert log.late
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
    model = PPOEWMA("MlpPolicy", env, async_rollouts=1, **SETTINGS)
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
    model.async_rollouts = 1
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
        "MlpLstmPolicy" if algorithm is MaskableRecurrentPPOEWMA else "MlpPolicy", env, async_rollouts=1, **SETTINGS
    )
    with pytest.raises(ValueError, match="valid action, environment 0 at step 20 of the rollout has none"):
        model.learn(64)
    model.env.close()
    assert not multiprocessing.active_children()


class Stops(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 40


def test_a_callback_that_stops() -> None:
    model = make("cartpole", async_rollouts=1)
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

    def reset(self, **kwargs: Any) -> Any:
        return np.array([self.n_steps], dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        return np.array([self.n_steps], dtype=np.float32), 0.0, False, False, {}


def test_collection_goes_on_where_it_is_after_a_callback_that_stops() -> None:
    model = PPOEWMA("MlpPolicy", DummyVecEnv([Counter]), async_rollouts=1, **SETTINGS)
    model.learn(1024, Stops())
    model.learn(N_STEPS, reset_num_timesteps=False)
    # Behind the rollout in which it stopped, and another one that nobody needs
    np.testing.assert_array_equal(model.rollout_buffer.observations.flatten(), np.arange(3 * N_STEPS, 4 * N_STEPS))
    assert model.env is not None
    model.env.close()


def test_closed_environments_serve_again() -> None:
    model = make("cartpole", async_rollouts=1)
    model.learn(128)
    model.env.close()
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 256
    model.env.close()
    model.async_rollouts = None
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
        ("hang", RuntimeError, "no step for 1 seconds \\(async_timeout\\)"),
    ],
)
def test_a_worker_that_fails(what: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: Failing(gym.make("CartPole-v1"), what)])
    model = PPOEWMA("MlpPolicy", env, async_rollouts=1, async_timeout=1.0, **SETTINGS)
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
PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=1, async_rollouts=1, device="cpu").learn(
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
def test_fifty_starts_leave_nothing_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("/dev/zero")

    counts = []
    for start in range(51):
        model = PPOEWMA("MlpPolicy", "CartPole-v1", async_rollouts=1, **{**SETTINGS, "n_steps": 16, "batch_size": 16})
        model.learn(32)
        if start % 2:  # the other half only goes out of scope
            assert model.env is not None
            model.env.close()
        del model
        gc.collect()
        counts.append((open_files(), mappings(), len(list(Path("/dev/shm").iterdir()))))
        assert not multiprocessing.active_children()
    assert counts[-1] == counts[0]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"async_rollouts": -1}, ValueError, "async_rollouts must be >= 0, got -1"),
        ({"async_rollouts": True}, TypeError, "async_rollouts must be an integer >= 0, got True"),
        ({"async_timeout": -1.0}, ValueError, "async_timeout must be >= 0, got -1.0"),
    ],
)
def test_values_out_of_range(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PPOEWMA("MlpPolicy", "CartPole-v1", **kwargs)
