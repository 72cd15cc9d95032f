"""A process that builds the model of one entry and, whenever it is told to, trains it for a chunk and says how long."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_STOP_SECONDS = 20


class EntryError(Exception):
    """Says why an entry cannot be measured."""


class Chunk(NamedTuple):
    """
    One measurement.

    :param steps: of the environments
    :param seconds: that ``learn()`` took
    :param collect_seconds: of these, in ``collect_rollouts()``
    :param train_seconds: of these, in ``train()``
    :param cpu_seconds: of all threads of the process
    :param peak_bytes: greatest resident set size since the process began
    """

    steps: int
    seconds: float
    collect_seconds: float
    train_seconds: float
    cpu_seconds: float
    peak_bytes: int


class Worker:
    """
    The process, from the outside. Unless it is measuring, it sleeps.

    :param settings: of case and entry, see cases.py
    :param device: of the model
    """

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, settings, device))
        self._process.start()
        other.close()

    def wait(self) -> dict[str, Any]:
        """
        Wait until the model is built; to be called once.

        :return: its number of threads
        :raises EntryError: if it cannot be built
        """
        return self._receive()

    def measure(self) -> Chunk:
        """
        :return: of one chunk
        :raises EntryError: if training failed
        """
        with contextlib.suppress(ConnectionError):  # found out below
            self._connection.send("measure")
        return self._receive()

    def dismiss(self) -> None:
        """Let the process end, without waiting for it."""
        self._connection.close()

    def close(self) -> None:
        """End the process."""
        self.dismiss()
        self._process.join(_STOP_SECONDS)
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise EntryError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise EntryError(answer)
        return answer


def _serve(connection: Connection, settings: dict[str, Any], device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError, OSError):  # the parent has gone
        # Empty, so that the time of compilation is not that of reading what was compiled in the past
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        os.environ["SB3_LOGDIR"] = str(Path(folder, "sb3"))
        if device == "cpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or it takes most of an accelerator's memory
        import torch as th

        th.set_num_threads(1)
        try:
            stopwatch = Stopwatch(settings, device)
            connection.send(_threads(settings))
            while connection.recv():
                connection.send(stopwatch.chunk())
        except EOFError:
            raise
        except Exception:
            connection.send(traceback.format_exc())


def _threads(settings: dict[str, Any]) -> dict[str, Any]:
    if _is_jax(settings):
        import jax

        # It does not tell. On a CPU it makes as many as there are cores, unless flags say otherwise.
        return {"threads": "chosen by JAX", "jax_backend": jax.default_backend()}
    import torch as th

    return {"threads": th.get_num_threads()}


class Stopwatch:
    """
    A model whose training is timed.

    :param settings: of case and entry, see cases.py
    :param device: of the model
    """

    def __init__(self, settings: dict[str, Any], device: str) -> None:
        # Trained without compilation, the entry would not be what it says.
        warnings.filterwarnings("error", message="torch_compile=.* has no effect")
        self._model = build_model(settings, device)
        self._steps = settings["n_iterations"] * self._model.n_steps * self._model.n_envs
        self._wait = _device_barrier(self._model, settings, device)
        self._seconds = defaultdict[str, float](float)
        for name in ("collect_rollouts", "train"):
            if hasattr(self._model, name):
                setattr(self._model, name, self._timed(name, getattr(self._model, name)))

    def chunk(self) -> Chunk:
        """
        :return: measurement of one chunk of training
        """
        self._seconds.clear()
        cpu_began = time.process_time()
        with self._measured("learn"):
            self._model.learn(self._steps, reset_num_timesteps=False)
        cpu_seconds = time.process_time() - cpu_began
        seconds = self._seconds
        return Chunk(
            self._steps, seconds["learn"], seconds["collect_rollouts"], seconds["train"], cpu_seconds, _peak_bytes()
        )

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._measured(name):
                return method(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self._seconds[name] += time.perf_counter() - began


def _device_barrier(model: Any, settings: dict[str, Any], device: str) -> Callable[[], Any]:
    """
    :return: waits until the device has done what was asked of it
    """
    if _is_jax(settings):
        import jax

        return lambda: jax.block_until_ready((model.policy.actor_state.params, model.policy.vf_state.params))
    if device.startswith("cuda"):
        import torch as th

        return lambda: th.cuda.synchronize(device)
    return lambda: None


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# === The model ===


def build_model(settings: dict[str, Any], device: str) -> Any:
    """
    :param settings: of case and entry, see cases.py
    :param device: of the model
    :return: the algorithm with its environments
    """
    module, _, name = settings["algorithm"].rpartition(".")
    algorithm = getattr(importlib.import_module(module), name)
    return algorithm(
        settings["policy"],
        make_env(settings),
        seed=settings["seed"],
        device=device,
        policy_kwargs=_policy_kwargs(settings),
        **{name: _schedule(value) for name, value in settings["ppo"].items()},
        **settings["kwargs"],
    )


def make_env(settings: dict[str, Any]) -> Any:
    """
    :param settings: of case and entry, see cases.py
    :return: the same environments for every entry of a case
    """
    from stable_baselines3.common.atari_wrappers import AtariWrapper
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    env_id = settings["env"]
    if env_id == "RandomFrames":
        from benchmarks.memory import RandomFrames

        env_id = RandomFrames
    if settings["atari"]:
        import ale_py
        import gymnasium as gym

        gym.register_envs(ale_py)
    wrapper_class = AtariWrapper if settings["atari"] else None
    env: Any = make_vec_env(env_id, settings["n_envs"], seed=settings["seed"], wrapper_class=wrapper_class)
    if settings["atari"]:
        env = VecFrameStack(env, 4)
    return VecNormalize(env, gamma=settings["ppo"]["gamma"]) if settings["normalize"] else env


def _policy_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(settings["policy_kwargs"])
    if "activation_fn" in kwargs:
        layers = importlib.import_module("flax.linen" if _is_jax(settings) else "torch.nn")
        name = kwargs["activation_fn"]
        kwargs["activation_fn"] = getattr(layers, name.lower() if _is_jax(settings) else name)
    if "features_extractor_class" in kwargs:
        from sb3_ppo_ewma.networks import features_extractor_class

        kwargs["features_extractor_class"] = features_extractor_class(kwargs["features_extractor_class"])
    return kwargs


def _schedule(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    from stable_baselines3.common.utils import LinearSchedule

    return LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)


def _is_jax(settings: dict[str, Any]) -> bool:
    return bool(settings["algorithm"].startswith("sbx."))
