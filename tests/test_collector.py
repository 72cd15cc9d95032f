"""The process that collects: calls that reach it, errors that come back, its end, and environments made in it."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_ppo_ewma import PPOEWMA, RecurrentPPOEWMA, RemoteVecEnv
from sb3_ppo_ewma._parallel.channel import Channel
from tests.test_asynchronous import N_ENVS, N_STEPS, ROOT, SETTINGS, Counter, is_running, state_of
from tests.watching import differences

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork()"),
]

KINDS: dict[str, Callable[[Any], VecEnv]] = {
    "dummy": lambda make: DummyVecEnv([make] * N_ENVS),
    "subproc": lambda make: SubprocVecEnv([make] * N_ENVS, start_method="fork"),
    "remote": lambda make: RemoteVecEnv([make] * N_ENVS, start_method="fork"),
}


class Steps(gym.Wrapper):  # type: ignore[type-arg]
    """
    Counts steps and closings in files, which all processes see.

    :param folder: where the files are
    :param what: called at the fiftieth step
    :param seconds: duration of a step
    """

    def __init__(self, folder: Path, what: Callable[[], Any] = int, seconds: float = 0.0) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.folder, self.what, self.seconds, self.n_steps = folder, what, seconds, 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        with (self.folder / f"steps-{os.getpid()}").open("ab") as file:
            file.write(b".")
        if self.n_steps == 50:
            self.what()
        time.sleep(self.seconds)
        return super().step(action)

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()
        super().close()


def n_steps_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("steps-*"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Processes end in any case."""
    yield
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


# === Calls ===


class Asks(BaseCallback):
    """Makes calls that fail, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        env = self.training_env
        self.found.append([env.has_attr("gravity"), env.has_attr("nope"), env.get_attr("gravity")])
        for call in (
            lambda: env.get_attr("nope"),
            lambda: env.env_method("nope"),
            lambda: env.env_method("reset", seed="x"),
        ):
            try:
                call()
            except Exception as error:
                self.found.append(type(error).__name__)


@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_a_call_that_fails_raises_in_the_caller(kind: str) -> None:
    found = []
    for lag in (None, 1):
        model = PPOEWMA("MlpPolicy", KINDS[kind](lambda: gym.make("CartPole-v1")), max_policy_lag=lag, **SETTINGS)
        asks = Asks()
        model.learn(3 * N_ENVS * N_STEPS, asks)
        found.append(asks.found)
        assert model.env is not None
        model.env.close()
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_the_cause_of_a_failed_call_is_told() -> None:
    env = make_vec_env("CartPole-v1", 1)
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    model.learn(64)
    with pytest.raises(AttributeError) as raised:
        env.env_method("nope")
    assert "in env_method" in str(raised.value.__cause__)  # the worker's traceback
    env.close()


def test_results_that_cannot_be_pickled_are_named() -> None:
    class Locked(gym.Wrapper):  # type: ignore[type-arg]
        def lock(self) -> Any:
            return threading.Lock()

    env = DummyVecEnv([lambda: Locked(gym.make("CartPole-v1"))])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    model.learn(64)
    with pytest.raises(TypeError, match=r"the result of env_method\(\) cannot be sent from its process: .*lock"):
        env.env_method("lock")
    with pytest.raises(TypeError, match="lock"):
        env.set_attr("lock", threading.Lock())
    model.learn(64)
    env.close()


class UnreadableError(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first + second)

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Unreadables(gym.Wrapper):  # type: ignore[type-arg]
    n_steps = 0

    def unreadable(self) -> UnreadableError:
        return UnreadableError(1, 2)

    def step(self, action: Any) -> Any:
        *others, info = super().step(action)
        self.n_steps += 1
        return *others, {**info, "error": UnreadableError(1, 2) if self.n_steps == N_STEPS + 3 else None}


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_collection_goes_on_after_what_cannot_be_unpickled(kind: str, lag: int) -> None:
    env = KINDS[kind](lambda: Unreadables(gym.make("CartPole-v1")))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, collector_timeout=20.0, **SETTINGS)
    with pytest.raises(TypeError, match="second"):
        model.learn(1024)
    model.learn(2 * N_ENVS * N_STEPS, reset_num_timesteps=False)
    assert model.num_timesteps == 3 * N_ENVS * N_STEPS
    n_steps = env.get_attr("n_steps")
    with pytest.raises(TypeError, match="second"):
        env.env_method("unreadable")
    with pytest.raises(TypeError, match="second"):
        env.set_attr("x", UnreadableError(1, 2))
    assert env.get_attr("n_steps") == n_steps  # of the same process
    env.close()


def test_words_are_answered_from_the_beginning() -> None:
    def answer(channel: Channel, word: str) -> bool:
        channel.send(("answer", word))
        return False

    own, theirs = multiprocessing.Pipe()
    asks = Channel(own)
    asks.say("where")
    answers = Channel(theirs, answer)
    assert asks.receive(10) == ("answer", "where")
    answers.flush(10)
    theirs.close()
    asks.close(10)


def test_calls_of_inner_wrappers_reach_the_process() -> None:
    inner = make_vec_env("CartPole-v1", 2)
    middle = VecNormalize(inner)
    env = VecFrameStack(middle, 2)
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    model.learn(64)
    middle.set_attr("tau", 0.5)
    assert inner.get_attr("tau") == env.get_attr("tau") == [0.5, 0.5]
    assert inner.reset().shape == (2, 4)
    assert env.reset().shape == (2, 8)
    env.close()
    assert inner.get_attr("tau") == [0.02, 0.02]  # those of this process, which were never changed


# === The end ===


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["returns False", "raises", "Ctrl+C"])
def test_collection_ends_within_a_step(kind: str, how: str, tmp_path: Path) -> None:
    class Ends(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls < N_STEPS + 3:
                return True
            if how == "returns False":
                return False
            raise KeyboardInterrupt if how == "Ctrl+C" else KeyError("why")

    model = PPOEWMA(
        "MlpPolicy", KINDS[kind](lambda: Steps(tmp_path, seconds=0.03)), max_policy_lag=2, **{**SETTINGS, "n_epochs": 1}
    )
    if how == "returns False":
        model.learn(10_000, Ends())
    else:
        with pytest.raises((KeyError, KeyboardInterrupt)):
            model.learn(10_000, Ends())
    stopped = n_steps_in(tmp_path)
    time.sleep(0.5)
    assert n_steps_in(tmp_path) <= stopped + N_ENVS
    # Where the collection stood depends on timing, so the environments begin again, with seeds that do not.
    model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
    assert model.env is not None
    model.env.close()
    assert len(list(tmp_path.glob("closed-*"))) >= 1


@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_handlers_of_signals_are_those_of_the_process_that_trains(kind: str) -> None:
    class Handled(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == N_STEPS:
                pid = self.training_env.env_method("get_wrapper_attr", "pid")[0]
                os.kill(pid, signal.SIGUSR1)
            return True

    class Pid(gym.Wrapper):  # type: ignore[type-arg]
        @property
        def pid(self) -> int:
            return os.getpid()

    def stop(*_: Any) -> None:
        raise KeyError("stopped")

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        env = KINDS[kind](lambda: Pid(gym.make("CartPole-v1")))
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
        model.learn(4 * N_ENVS * N_STEPS, Handled())
        env.close()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert model.num_timesteps == 4 * N_ENVS * N_STEPS


@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_errors_of_closing_are_raised(kind: str) -> None:
    class Fails(gym.Wrapper):  # type: ignore[type-arg]
        n_steps = 0

        def step(self, action: Any) -> Any:
            self.n_steps += 1
            return super().step(action)

        def close(self) -> None:
            super().close()
            if self.n_steps > 0:  # only where it was used
                raise KeyError("not closed")

    env = VecNormalize(KINDS[kind](lambda: Fails(gym.make("CartPole-v1"))))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS).learn(N_ENVS * N_STEPS)
    with pytest.raises(KeyError, match="not closed"):
        env.close()
    del model


def test_a_stopped_training_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < N_STEPS + 3

    class StopsLater(Stops):
        def _on_step(self) -> bool:
            time.sleep(0.005)
            return super()._on_step()

    found = []
    for seconds, callback in ((0.0, StopsLater()), (0.005, Stops())):
        functions = [lambda seconds=seconds: Steps(tmp_path, seconds=seconds)]  # type: ignore[misc]
        env = VecNormalize(DummyVecEnv(functions))
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=2, **SETTINGS)
        model.learn(10_000, callback)
        time.sleep(0.1)
        model.learn(3 * N_STEPS, reset_num_timesteps=False)
        found.append(state_of(model))
        env.close()
    assert differences(*found) == []


def test_after_an_interruption_the_policy_sees_where_the_environments_are() -> None:
    env = DummyVecEnv([Counter])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=0, **SETTINGS)
    model.learn(N_STEPS)
    env.set_attr("seconds", 0.05)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.learn(N_STEPS, reset_num_timesteps=False)
    finally:
        signal.signal(signal.SIGALRM, previous)
    env.set_attr("seconds", 0.0)
    model.learn(N_STEPS, reset_num_timesteps=False)
    seen = model.rollout_buffer.observations.flatten()
    np.testing.assert_array_equal(seen, np.arange(seen[0], seen[0] + N_STEPS))
    env.close()


def test_closing_waits_for_a_slow_step_and_closes(tmp_path: Path) -> None:
    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2

    env = DummyVecEnv([lambda: Steps(tmp_path, seconds=0.7)])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **{**SETTINGS, "n_steps": 2, "batch_size": 2})
    model.learn(100, Stops())  # the worker is in a step of the next rollout
    worker = next(tmp_path.glob("steps-*")).name.split("-")[1]
    env.close()
    assert (tmp_path / f"closed-{worker}").exists()


HANGS = """
import os, sys, time
from pathlib import Path
import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3_ppo_ewma import PPOEWMA, RemoteVecEnv

class Hangs(gym.Wrapper):
    n_steps = 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == 40:
            Path(sys.argv[2], str(os.getpid())).touch()
            time.sleep(1000)
        return super().step(action)

functions, fork = [lambda: Hangs(gym.make("CartPole-v1"))] * 2, {"start_method": "fork"}
if sys.argv[1] == "subproc":
    env = SubprocVecEnv(functions, **fork)
else:
    env = RemoteVecEnv(functions, "fork", SubprocVecEnv, fork)
model = PPOEWMA("MlpPolicy", env, n_steps=32, batch_size=32, max_policy_lag=1, device="cpu", collector_timeout=100.0)
model.learn(64)
model.collector_timeout = 5.0
model.learn(10**6)
"""


@pytest.mark.parametrize("kind", ["subproc", "remote"])
def test_hanging_processes_of_environments_end_with_a_killed_training(kind: str, tmp_path: Path) -> None:
    (tmp_path / "hanging").mkdir()
    command = [sys.executable, "-c", HANGS, kind, str(tmp_path / "hanging")]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors)
    hanging: list[int] = []
    deadline = time.monotonic() + 60
    while len(hanging) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        hanging = [int(path.name) for path in (tmp_path / "hanging").iterdir()]
    process.kill()
    process.wait()
    assert len(hanging) == 2, (tmp_path / "errors").read_text()
    assert all(map(is_running, hanging))
    deadline = time.monotonic() + 30
    while any(map(is_running, hanging)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, hanging))


class TwoArguments(Exception):  # noqa: N818
    def __init__(self, first: int, second: int) -> None:
        super().__init__(first)


def test_a_result_that_cannot_be_opened_does_no_harm() -> None:
    class Odd(gym.Wrapper):  # type: ignore[type-arg]
        def odd(self) -> Any:
            return TwoArguments(1, 2)

        def fails(self) -> Any:
            raise TwoArguments(1, 2)

    env = DummyVecEnv([lambda: Odd(gym.make("CartPole-v1"))])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=20.0, **SETTINGS)
    model.learn(64)
    with pytest.raises(TypeError):
        env.env_method("odd")
    with pytest.raises(RuntimeError, match="TwoArguments: 1"):
        env.env_method("fails")
    assert env.get_attr("gravity") == [9.8]
    env.close()


def raises(error: BaseException) -> Callable[[], None]:
    def what() -> None:
        raise error

    return what


@pytest.mark.parametrize("error", [EOFError("why"), BrokenPipeError("why"), ConnectionResetError("why"), SystemExit(3)])
def test_errors_of_environments_keep_their_names(error: BaseException, tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", DummyVecEnv([lambda: Steps(tmp_path, raises(error))]), max_policy_lag=1, **SETTINGS)
    with pytest.raises(type(error), match=str(error)) as raised:
        model.learn(1024)
    assert "in what" in str(raised.value.__cause__)
    model.learn(N_STEPS, reset_num_timesteps=False)  # the environments of this process are whole


@pytest.mark.parametrize("what", [raises(ValueError("why")), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_what_a_failing_subprocess_leaves_is_said(what: Any, tmp_path: Path) -> None:
    env = KINDS["subproc"](lambda: Steps(tmp_path, what))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    with pytest.raises((EOFError, ConnectionResetError)) as raised:
        model.learn(1024)
    assert "subproc_vec_env.py" in str(raised.value.__cause__)
    model.save(tmp_path / "agent")
    with pytest.raises(RuntimeError, match=r"reset\(\) of these environments cannot be called any more.*set_env"):
        model.learn(1024)
    model.set_env(make_vec_env("CartPole-v1", N_ENVS))
    model.learn(N_ENVS * N_STEPS)
    env.close()
    assert model.env is not None
    model.env.close()


@pytest.mark.parametrize("kind", KINDS)
def test_environments_whose_process_was_killed_can_be_closed(kind: str, tmp_path: Path) -> None:
    class Kills(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            for process in multiprocessing.active_children():
                if process.name == "collector":
                    process.kill()

    env = KINDS[kind](lambda: Steps(tmp_path))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"has ended \(signal SIGKILL\)"):
        model.learn(10_000, Kills())
    env.close()
    env.close()


def test_where_a_process_hangs_is_said(tmp_path: Path) -> None:
    def sleeps() -> None:
        time.sleep(1000)

    env = DummyVecEnv([lambda: Steps(tmp_path, sleeps)])
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=3.0, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"no step for 3 seconds \(collector_timeout\)[^$]*in sleeps"):
        model.learn(1024)


@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_a_timeout_that_is_changed_counts_at_once(kind: str, tmp_path: Path) -> None:
    def sleeps() -> None:
        time.sleep(1000)

    env = KINDS[kind](lambda: Steps(tmp_path, sleeps))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=300.0, **SETTINGS)
    model.learn(N_ENVS * N_STEPS)
    model.collector_timeout = 3.0
    with pytest.raises(RuntimeError, match="no step for 3 seconds"):
        model.learn(1024)


@pytest.mark.parametrize("kind", ["dummy", "remote"])
def test_closing_waits_as_long_as_the_timeout_says(kind: str, tmp_path: Path) -> None:
    class StopsWhenItHangs(BaseCallback):
        def _on_step(self) -> bool:
            deadline = time.monotonic() + 60
            while n_steps_in(tmp_path) < 50 + 49 and time.monotonic() < deadline:
                time.sleep(0.05)
            return False

    env = KINDS[kind](lambda: Steps(tmp_path, lambda: time.sleep(1000)))
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **{**SETTINGS, "n_steps": 16, "batch_size": 16})
    model.learn(2 * N_ENVS * 16)
    model.collector_timeout = 4.0
    model.learn(1024, StopsWhenItHangs())  # the worker is in a step of the next rollout that does not end
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn before it waits for long
        env.close()


def test_large_observations_and_an_interrupted_call(tmp_path: Path) -> None:
    class Large(gym.Env):  # type: ignore[type-arg]
        observation_space = gym.spaces.Box(0, 255, (3, 640, 640), np.uint8)
        action_space = gym.spaces.Discrete(2)

        def reset(self, **kwargs: Any) -> Any:
            return np.zeros((3, 640, 640), np.uint8), {"large": np.zeros(2**20, np.uint8)}

        def step(self, action: Any) -> Any:
            return np.ones((3, 640, 640), np.uint8), 1.0, False, False, {"large": np.zeros(2**20, np.uint8)}

        def slow(self) -> Any:
            time.sleep(2)
            return np.zeros(2**22, np.uint8)

    policy_kwargs = {"features_extractor_class": Mean}
    env = DummyVecEnv([Large])
    model = PPOEWMA(
        "MlpPolicy", env, max_policy_lag=1, policy_kwargs=policy_kwargs, **{**SETTINGS, "n_steps": 4, "batch_size": 4}
    )
    model.learn(8)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            env.env_method("slow")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert env.get_attr("spec") == [None]  # not what the other call returned
    model.learn(8, reset_num_timesteps=False)
    env.close()


class Mean(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 3)

    def forward(self, observations: Any) -> Any:
        return observations.float().mean((2, 3))


# === The beginning ===


def test_forking_beside_threads_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def as_in_python_3_12() -> int:
        pid = fork()
        if pid:
            message = "is multi-threaded, use of fork() may lead to deadlocks in the child."
            warnings.warn(f"This process (pid={os.getpid()}) {message}", DeprecationWarning, stacklevel=1)
        return pid

    monkeypatch.setattr(os, "fork", as_in_python_3_12)
    env = make_vec_env("CartPole-v1", 1)
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        filters = list(warnings.filters)
        model.learn(N_STEPS)
        assert warnings.filters == filters
    env.close()


def in_a_pool(_: int) -> str:
    try:
        PPOEWMA("MlpPolicy", "CartPole-v1", max_policy_lag=1, **SETTINGS).learn(64)
    except RuntimeError as error:
        return str(error)
    return ""


def test_in_a_daemonic_process_it_says_what_to_do() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "use concurrent.futures.ProcessPoolExecutor" in pool.map(in_a_pool, [0])[0]


def test_several_threads_train_at_once() -> None:
    def train(seed: int) -> int:
        env = make_vec_env("CartPole-v1", N_ENVS, seed=seed)
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **{**SETTINGS, "seed": seed})
        model.learn(4 * N_ENVS * N_STEPS)
        env.close()
        return model.num_timesteps

    with ThreadPoolExecutor(3) as executor:
        assert list(executor.map(train, range(6))) == [4 * N_ENVS * N_STEPS] * 6


# === Environments made in the process ===


def wrapped(env: VecEnv) -> VecEnv:
    return VecNormalize(VecFrameStack(env, 2))


@pytest.mark.parametrize(
    ("start_method", "lag", "algorithm"),
    [
        ("forkserver", 1, PPOEWMA),
        ("spawn", 0, RecurrentPPOEWMA),
        *itertools.product(["fork"], [0, 1], [PPOEWMA, RecurrentPPOEWMA]),
    ],
)
def test_the_numbers_do_not_depend_on_where_environments_are_made(start_method: str, lag: int, algorithm: Any) -> None:
    found = []
    for cls, kwargs in ((DummyVecEnv, {}), (RemoteVecEnv, {"start_method": start_method})):
        env = wrapped(make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=cls, vec_env_kwargs=kwargs))
        policy = "MlpPolicy" if algorithm is PPOEWMA else "MlpLstmPolicy"
        model = algorithm(policy, env, max_policy_lag=lag, **SETTINGS)
        model.learn(4 * N_ENVS * N_STEPS)
        model.learn(2 * N_ENVS * N_STEPS, reset_num_timesteps=False)
        found.append(state_of(model))
        env.close()
    assert differences(*found) == []


def test_environments_in_another_process_work_without_collection_there(tmp_path: Path) -> None:
    found = []
    for cls in (DummyVecEnv, RemoteVecEnv):
        env = make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=cls)  # type: ignore[arg-type]
        model = PPOEWMA("MlpPolicy", env, **SETTINGS)
        model.learn(4 * N_ENVS * N_STEPS)
        env.set_attr("tau", 0.5, indices=1)
        found.append({**state_of(model), "tau": env.get_attr("tau")})
        env.close()
    assert differences(*found) == []
    assert found[0]["tau"] == [0.02, 0.5]


def test_one_process_serves_several_models() -> None:
    env = make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=RemoteVecEnv)  # type: ignore[arg-type]
    first = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **SETTINGS).learn(128)
    second = PPOEWMA("MlpPolicy", env, max_policy_lag=1, **{**SETTINGS, "n_steps": 16}).learn(128)
    second.max_policy_lag = None
    second.learn(128)
    first.learn(128)
    assert first.num_timesteps == second.num_timesteps == 128
    env.close()
    with pytest.raises(RuntimeError, match="process of these environments has ended"):
        env.reset()


def test_what_a_model_that_has_gone_asked_for_is_not_for_the_next() -> None:
    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < N_STEPS + 3

    env = make_vec_env("CartPole-v1", N_ENVS, seed=0, vec_env_cls=RemoteVecEnv)  # type: ignore[arg-type]
    PPOEWMA("MlpPolicy", env, max_policy_lag=2, **SETTINGS).learn(1024, Stops())
    gc.collect()
    model = PPOEWMA("MlpPolicy", env, max_policy_lag=2, **{**SETTINGS, "n_steps": 16, "batch_size": 16})
    model.learn(4 * N_ENVS * 16)
    assert model.num_timesteps == 4 * N_ENVS * 16
    env.close()


NOTEBOOK = """
import gymnasium as gym
from stable_baselines3.common.torch_layers import FlattenExtractor
from sb3_ppo_ewma import PPOEWMA, RemoteVecEnv

class Wrapper(gym.Wrapper):
    pass

class Extractor(FlattenExtractor):
    pass

env = RemoteVecEnv([lambda: Wrapper(gym.make("CartPole-v1"))])
kwargs = {"features_extractor_class": Extractor}
model = PPOEWMA("MlpPolicy", env, n_steps=64, batch_size=64, max_policy_lag=1, device="cpu", policy_kwargs=kwargs)
model.learn(128)
print(env.env_is_wrapped(Wrapper))
env.close()
"""


def test_classes_of_a_notebook_reach_the_process() -> None:
    # As a notebook's, the main module of a command is in no file.
    command = [sys.executable, "-c", NOTEBOOK]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[True]\n"


def test_errors_of_functions_come_from_the_process() -> None:
    def make() -> Any:
        raise KeyError("not made")

    with pytest.raises(KeyError, match="not made"):
        RemoteVecEnv([make])
    with pytest.raises(ValueError, match=r"start_method must be one of .*, got 'thread'"):
        RemoteVecEnv([make], start_method="thread")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"start_methode": "fork"},
            TypeError,
            r"RemoteVecEnv\(\) .*'start_methode'. Did you mean 'start_method'",
        ),
        (
            {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"startmethod": "fork"}},
            TypeError,
            r"SubprocVecEnv\(\) .*'startmethod'. Did you mean 'start_method'",
        ),
        (
            {"vec_env_cls": "subproc"},
            TypeError,
            "vec_env_cls must be a class .*, got 'subproc'",
        ),
        ({"env_fns": []}, ValueError, r"env_fns must make at least one environment, got \[\]"),
        ({"env_fns": [3]}, TypeError, "env_fns must be functions that make environments, got 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RemoteVecEnv(**{"env_fns": [lambda: gym.make("CartPole-v1")], **arguments})
