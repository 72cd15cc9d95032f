"""``save_checkpoint``, ``load_checkpoint``, ``RunCheckpoint``: an interrupted run equals one that was not."""

import gc
import json
import random
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ppo_ewma import (
    PPGEWMA,
    PPOEWMA,
    EnvStateWrapper,
    MaskablePPOEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPOEWMA,
    RunCheckpoint,
    newest_checkpoint,
)
from tests.masked_envs import Masked

N_STEPS = 16
SETTINGS: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "device": "cpu", "seed": 0}
PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 1, "aux_batch_size": 16, "staleness": 1}


class SaveAt(BaseCallback):
    """Saves the run in one of its steps."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path, self.step = path, step

    def _on_step(self) -> bool:
        if self.n_calls == self.step:
            self.model.save_checkpoint(self.path)
        return True


class SaveAtRolloutEnd(SaveAt):
    """Saves the run when a rollout is complete and not yet trained on."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.n_calls == self.step:
            self.model.save_checkpoint(self.path)


class DictEnv(gym.Env):
    """Dictionary observations, steps that draw random numbers, episodes that a time limit cuts."""

    observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Discrete(3)})
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self._observation(), {}

    def _observation(self) -> dict[str, Any]:
        return {"a": self.place.clip(-9, 9), "b": int(self.np_random.integers(3))}

    def step(self, action: Any) -> Any:
        self.place = self.place + self.np_random.normal(size=2).astype(np.float32) * float(np.sum(action))
        return self._observation(), float(self.place.sum()), False, False, {}


class OwnStateEnv(gym.Env):
    """Holds what cannot be read, and says itself what its state is, if it is asked to."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def __init__(self) -> None:
        self.opaque, self.n = memoryview(b"x"), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.n = int(self.np_random.integers(5))
        return np.array([self.n / 9], np.float32), {}

    def step(self, action: Any) -> Any:
        self.n += int(action) + 1
        return np.array([self.n / 99], np.float32), float(action), self.n > 20, False, {}


class SayingEnv(OwnStateEnv):
    def get_state(self) -> Any:
        return {"n": self.n, "random": self.np_random.bit_generator.state}

    def set_state(self, state: Any) -> None:
        self.n = state["n"]
        self.np_random.bit_generator.state = state["random"]


def normalized(env_id: Any, **kwargs: Any) -> Callable[[], VecEnv]:
    return lambda: VecNormalize(make_vec_env(env_id, n_envs=2, **kwargs))


def time_limited() -> gym.Env:
    return gym.wrappers.TimeLimit(DictEnv(), 7)


def parameters(model: Any) -> dict[str, th.Tensor]:
    average = {} if model.policy_ewma is None else model.policy_ewma.state_dict()
    optimizer = [value for state in model.policy.optimizer.state.values() for value in state.values()]
    return {**model.policy.state_dict(), **average, **{f"optimizer {i}": each for i, each in enumerate(optimizer)}}


def assert_same_run(first: Any, second: Any) -> None:
    a, b = parameters(first), parameters(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not th.equal(th.as_tensor(a[name]), th.as_tensor(b[name]))] == []
    assert first.num_timesteps == second.num_timesteps
    assert [each["r"] for each in first.ep_info_buffer] == [each["r"] for each in second.ep_info_buffer]


def interrupt_and_continue(
    folder: Path, cls: Any, policy: str, make_env: Callable[[], VecEnv], save: BaseCallback, **kwargs: Any
) -> tuple[Any, Any]:
    """
    :return: the run that went on, and the one that was continued from its file
    """
    model = cls(policy, make_env(), **{**SETTINGS, **kwargs})
    model.learn(130, save)
    random.random(), np.random.random(), th.rand(1)
    continued = cls.load_checkpoint(folder / "run.zip", make_env(), device="cpu")
    continued.learn(continued.remaining_timesteps, reset_num_timesteps=False)
    for each in (model, continued):
        each.env.close()
    return model, continued


CASES: dict[str, tuple[Any, str, Callable[[], VecEnv], dict[str, Any]]] = {
    "mujoco": (PPOEWMA, "MlpPolicy", normalized("Hopper-v5"), {"staleness": 1}),
    "gsde": (PPOEWMA, "MlpPolicy", normalized("Pendulum-v1"), {"use_sde": True, "sde_sample_freq": 3}),
    "reference": (PPOEWMA, "MlpPolicy", normalized("CartPole-v1"), {"engine": "reference", "advantage_decay": 0.9}),
    "dictionary": (PPOEWMA, "MultiInputPolicy", lambda: make_vec_env(time_limited, 2), {"n_epochs_value": 1}),
    "frames": (PPOEWMA, "MlpPolicy", lambda: VecFrameStack(VecMonitor(make_vec_env("CartPole-v1", 2)), 3), {}),
    "phases": (PPGEWMA, "MlpPolicy", normalized("CartPole-v1"), PHASES),
    "lstm": (RecurrentPPOEWMA, "MlpLstmPolicy", normalized("CartPole-v1"), {}),
    "masks": (MaskablePPOEWMA, "MlpPolicy", lambda: make_vec_env(Masked, 2), {}),
    "lstm with masks": (MaskableRecurrentPPOEWMA, "MlpLstmPolicy", lambda: make_vec_env(Masked, 2), {}),
    "own state": (PPOEWMA, "MlpPolicy", lambda: make_vec_env(SayingEnv, 2), {}),
    "rescaled": (PPOEWMA, "MlpPolicy", normalized("CartPole-v1"), {"tuned_for_n_envs": 4}),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 23, pytest.param(3 * N_STEPS, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES)
def test_continues_to_the_bit(case: str, step: int, tmp_path: Path) -> None:
    cls, policy, make_env, kwargs = CASES[case]
    save = SaveAt(tmp_path / "run.zip", step)
    assert_same_run(*interrupt_and_continue(tmp_path, cls, policy, make_env, save, **kwargs))


def test_continues_from_a_complete_rollout(tmp_path: Path) -> None:
    save = SaveAtRolloutEnd(tmp_path / "run.zip", 2 * N_STEPS)
    make_env = normalized("CartPole-v1")
    assert_same_run(*interrupt_and_continue(tmp_path, PPOEWMA, "MlpPolicy", make_env, save))


@pytest.mark.long
def test_continues_environments_in_processes(tmp_path: Path) -> None:
    make_env = normalized("Pendulum-v1", vec_env_cls=SubprocVecEnv, wrapper_class=EnvStateWrapper)
    save = SaveAt(tmp_path / "run.zip", 23)
    assert_same_run(*interrupt_and_continue(tmp_path, PPOEWMA, "MlpPolicy", make_env, save))


def test_continues_between_calls_of_learn(tmp_path: Path) -> None:
    make_env = normalized("CartPole-v1")
    model = PPOEWMA("MlpPolicy", make_env(), **SETTINGS).learn(100)
    model.save_checkpoint(tmp_path / "run")
    model.learn(100, reset_num_timesteps=False)
    continued = PPOEWMA.load_checkpoint(tmp_path / "run", make_env(), device="cpu")
    assert_same_run(model, continued.learn(100, reset_num_timesteps=False))


def test_environments_without_state_begin_anew(tmp_path: Path) -> None:
    def make_env() -> VecEnv:
        return VecNormalize(make_vec_env(OwnStateEnv, 2))

    model = PPOEWMA("MlpPolicy", make_env(), **SETTINGS)
    model.learn(4 * N_STEPS, SaveAt(tmp_path / "run.zip", N_STEPS + 5))
    env = make_env()
    with pytest.warns(UserWarning, match=r"begin new episodes: env\.venv\.envs\[0\].*opaque is a builtins\.memoryview"):
        continued = PPOEWMA.load_checkpoint(tmp_path / "run.zip", env, device="cpu")
    assert env.obs_rms.count > 2 * N_STEPS  # of the run, not of the new environments alone
    starts: list[np.ndarray] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            starts.append(self.model.rollout_buffer.episode_starts.copy())

    continued.learn(continued.remaining_timesteps, Watch(), reset_num_timesteps=False)
    assert continued.num_timesteps == 4 * N_STEPS
    assert starts[0][5].all()  # the row after the last one before the interruption


def test_callbacks_go_on(tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[BaseCallback]:
        env = VecNormalize(make_vec_env("CartPole-v1", 1, seed=5), training=False)
        evaluation = EvalCallback(env, eval_freq=20, log_path=str(tmp_path / folder))
        evaluation.verbose = 0
        return [evaluation, RunCheckpoint(tmp_path / folder, every=40, keep=9)]

    make_env = normalized("CartPole-v1")
    model = PPOEWMA("MlpPolicy", make_env(), **SETTINGS).learn(150, callbacks("a"))
    continued = PPOEWMA.load_checkpoint(tmp_path / "a" / "checkpoint_80_steps.zip", make_env(), device="cpu")
    continued.learn(continued.remaining_timesteps, callbacks("b"), reset_num_timesteps=False)
    assert_same_run(model, continued)
    names = [{path.name for path in (tmp_path / each).glob("*.zip")} for each in "ab"]
    assert names[1] == names[0] - {"checkpoint_40_steps.zip", "checkpoint_80_steps.zip"}
    first, second = (np.load(tmp_path / each / "evaluations.npz") for each in "ab")
    assert first["timesteps"].tolist() == second["timesteps"].tolist() == [40, 80, 120, 160]
    np.testing.assert_array_equal(first["results"], second["results"])


def test_keeps_the_newest(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(200, CallbackList([RunCheckpoint(tmp_path, every=30)]))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_210_steps.zip", "checkpoint_224_steps.zip"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint_224_steps.zip"
    damaged = (tmp_path / "checkpoint_224_steps.zip").read_bytes()
    for data in (damaged[:-100], damaged[:5000] + b"x" + damaged[5001:], b""):
        (tmp_path / "checkpoint_224_steps.zip").write_bytes(data)
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint_210_steps.zip"
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PPOEWMA, "save", fail)
    with pytest.warns(UserWarning, match="could not be saved.*No space left on device"):
        model.learn(64, RunCheckpoint(tmp_path, every=20))
    assert model.num_timesteps == 64
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
@pytest.mark.parametrize("kwargs", [{"max_policy_lag": 1}, {"collect": "as_ready"}])
def test_waits_for_the_end_of_a_rollout(kwargs: dict[str, Any], tmp_path: Path) -> None:
    def make_env() -> VecEnv:
        in_processes = {} if "max_policy_lag" in kwargs else {"vec_env_cls": SubprocVecEnv}
        return make_vec_env("CartPole-v1", 2, **in_processes)

    model = PPOEWMA("MlpPolicy", make_env(), **SETTINGS, **kwargs)
    with pytest.raises(ValueError, match="in the middle of a rollout"):
        model.learn(64, SaveAt(tmp_path / "run.zip", 5))
    model.learn(200, RunCheckpoint(tmp_path, every=50, keep=9))
    model.env.close()
    steps = sorted(int(path.name.split("_")[1]) for path in tmp_path.glob("checkpoint*"))
    assert steps == [64, 128, 160, 224]
    with pytest.warns(UserWarning, match="begin new episodes: (another process|.* not wrapped with EnvStateWrapper)"):
        continued = PPOEWMA.load_checkpoint(tmp_path / "checkpoint_128_steps.zip", make_env(), device="cpu")
    assert continued.learn(continued.remaining_timesteps, reset_num_timesteps=False).num_timesteps == 224
    continued.env.close()


def test_a_model_is_not_held_by_its_callbacks(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(32, RunCheckpoint(tmp_path, every=20))
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_is_a_zip_of_sb3(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS).learn(32)
    model.save_checkpoint(tmp_path / "run.zip")
    observation = np.ones((1, 4), np.float32)
    expected = model.predict(observation, deterministic=True)[0]
    for cls in (PPO, PPOEWMA):
        assert cls.load(tmp_path / "run.zip").predict(observation, deterministic=True)[0] == expected


def test_refuses_other_files(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2)
    model = PPOEWMA("MlpPolicy", VecNormalize(env), **SETTINGS).learn(32)
    model.save(tmp_path / "model.zip")
    (tmp_path / "garbage.zip").write_bytes(b"garbage")
    for name in ("model", "garbage"):
        with pytest.raises(ValueError, match=rf"{name}\.zip is damaged or not a file of save_checkpoint"):
            PPOEWMA.load_checkpoint(tmp_path / name, env)
    model.save_checkpoint(tmp_path / "run.zip")
    with pytest.raises(ValueError, match=r"wrapped as it was.*VecNormalize"):
        PPOEWMA.load_checkpoint(tmp_path / "run.zip", env)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2)
    PPOEWMA("MlpPolicy", env, **SETTINGS).learn(32).save_checkpoint(tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "hostile.npz", "w") as archive, archive.open("0.npy", "w") as member:
        np.lib.format.write_array(member, np.array([print], dtype=object))
        member.close()
        archive.writestr("data.json", json.dumps({"array": 0}))
    with zipfile.ZipFile(tmp_path / "run.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("sb3_ppo_ewma_checkpoint/environments", (tmp_path / "hostile.npz").read_bytes())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        PPOEWMA.load_checkpoint(tmp_path / "run.zip", env)


def test_a_new_count_of_steps_drops_the_rollout(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), **SETTINGS)
    model.learn(64, SaveAt(tmp_path / "run.zip", 20))
    continued = PPOEWMA.load_checkpoint(tmp_path / "run.zip", make_vec_env("CartPole-v1", 2), device="cpu")
    with pytest.warns(UserWarning, match="rollout in progress is dropped"):
        assert continued.learn(64).num_timesteps == 64


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("keep", 0), ("every", 1.5)])
def test_bad_settings_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        RunCheckpoint(tmp_path, **{"every": 10, name: value})


def test_needs_our_algorithms(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RunCheckpoint needs an algorithm of sb3_ppo_ewma, got PPO"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16).learn(16, RunCheckpoint(tmp_path, every=10))
