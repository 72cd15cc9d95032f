"""One training on a Procgen game through rl-zoo3, which goes on from its last checkpoint."""

import argparse
import contextlib
import inspect
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from benchmarks.metadata import REPOSITORY
from benchmarks.procgen.curves import COLUMNS, Curve
from benchmarks.procgen.network import steps_per_second
from sb3_ppo_ewma.zoo import options, register

CONFIG = REPOSITORY / "zoo_hyperparams" / "procgen"
AGENT, CURVE = "agent.zip", "curve"
MIXED_PRECISION = "dict(features_extractor_kwargs=dict(mixed_precision=True))"
_CHECKPOINT = "checkpoint_"


@dataclass(frozen=True)
class Run:
    """
    What is trained.

    :param algorithm: name of an algorithm of the zoo, perhaps with ``_kl`` behind it
    :param n_envs: number of environments for which there is a file of hyper-parameters
    :param game: in lower case
    :param seed: of the run
    """

    algorithm: str
    n_envs: int
    game: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.algorithm}_{self.n_envs}_{self.game}_{self.seed}"

    @property
    def algo(self) -> str:
        return self.algorithm.removesuffix("_kl")

    @property
    def env_id(self) -> str:
        return f"{self.game.capitalize()}Hard-v0"


@dataclass(frozen=True)
class Plan:
    """
    How it is trained.

    :param settings: hyper-parameters, a complete entry of the zoo's files
    :param n_steps: steps of all environments at which it ends, rounded up to whole iterations
    :param row_steps: steps of a row of the curve
    :param checkpoint_steps: steps from one checkpoint to the next, at least
    :param seconds: after which it stops early
    :param device: of the network
    :param n_threads: for the network and the environments on the CPU; ``None``: as many as the libraries take
    :param logs: folder of checkpoints and output
    :param results: folder of the curves, written with every checkpoint
    :param start: command, versions and hardware
    """

    settings: dict[str, Any]
    n_steps: int
    row_steps: int
    checkpoint_steps: int
    seconds: float
    device: str
    n_threads: int | None
    logs: Path
    results: Path
    start: dict[str, Any]


@dataclass
class Checkpoints:
    """
    Folders with agent, statistics of rewards and curve; the last one is kept.

    :param folder: of a run
    :param env_id: of its environment
    """

    folder: Path
    env_id: str

    def folders(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_CHECKPOINT}*"), key=lambda path: int(path.name.removeprefix(_CHECKPOINT)))

    @property
    def last(self) -> Path | None:
        return next(reversed(self.folders()), None)

    def curve(self) -> Curve:
        return Curve.read(self.last / CURVE) if self.last else Curve()

    def save(self, model: Any, curve: Curve) -> None:
        """
        :param model: between two iterations
        :param curve: up to now
        """
        older = self.folders()
        new = self.folder / "unfinished"
        shutil.rmtree(new, ignore_errors=True)
        (new / self.env_id).mkdir(parents=True)
        model.save(new / AGENT)
        if model.get_vec_normalize_env() is not None:
            model.get_vec_normalize_env().save(new / self.env_id / "vecnormalize.pkl")  # where the zoo looks for it
        curve.write(new / CURVE)
        new.rename(self.folder / f"{_CHECKPOINT}{model.num_timesteps}")  # whole, or not there
        for path in older:
            shutil.rmtree(path)


def settings_of(run: Run, changes: dict[str, Any], mixed_precision: bool) -> dict[str, Any]:
    """
    :param run: a run
    :param changes: hyper-parameters that are not those of its file, where its algorithm has them
    :param mixed_precision: whether the network computes in bfloat16
    :return: its hyper-parameters, but for the number of steps
    """
    file = CONFIG / f"{run.algorithm}_{run.n_envs}.yml"
    settings: dict[str, Any] = yaml.safe_load(file.read_text())[run.env_id]
    del settings["n_timesteps"]
    if mixed_precision:
        settings["policy_kwargs"] = MIXED_PRECISION
    register()
    known = {"n_envs", *inspect.signature(ALGOS[run.algo]).parameters}
    return settings | {name: value for name, value in changes.items() if name in known}


class TimedVecEnv(VecEnvWrapper):
    """Adds up the time that its environments take for their steps, without what wraps it."""

    def __init__(self, venv: Any) -> None:
        super().__init__(venv)
        self.stepping_seconds = 0.0

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._began = time.perf_counter()
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        result = self.venv.step_wait()
        self.stepping_seconds += time.perf_counter() - self._began
        return result


class Recorder(BaseCallback):
    """
    Keeps the curve, saves checkpoints, and ends training when its time is over.

    :param plan: of the run
    :param checkpoints: of the run
    :param curve: up to now
    """

    def __init__(self, plan: Plan, checkpoints: Checkpoints, curve: Curve) -> None:
        super().__init__()
        self.results = plan.results / checkpoints.folder.name
        self.plan, self.checkpoints, self.curve = plan, checkpoints, curve
        self.began = time.perf_counter()
        self.is_over = False

    def _on_training_start(self) -> None:
        self.n_saved = self.model.num_timesteps
        self._begin_row()

    def _begin_row(self) -> None:
        self.n_before = self.model.num_timesteps
        self.returns: list[float] = []
        self.training_seconds = 0.0
        self.rollout_ended: float | None = None
        self.row_began = time.perf_counter()
        self.stepping_before: float = self._stepping_seconds()

    def _stepping_seconds(self) -> float:
        return float(self.training_env.stepping_seconds)  # of the TimedVecEnv under other wrappers

    def _on_step(self) -> bool:
        # Before any normalisation of rewards
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return not self.is_over

    def _on_rollout_end(self) -> None:
        self.rollout_ended = time.perf_counter()

    def _on_rollout_start(self) -> None:
        self._after_training()
        n_steps = self.model.num_timesteps
        self.is_over = time.perf_counter() - self.began >= self.plan.seconds
        if self.is_over or n_steps // self.plan.row_steps > self.n_before // self.plan.row_steps:
            self._end_row()
        if self.is_over or n_steps - self.n_saved >= self.plan.checkpoint_steps:
            self._save()

    def _on_training_end(self) -> None:
        # SB3 trains once more after the last rollout, but not after one that a callback has ended.
        if not self.is_over:
            self._after_training()
            self._end_row()
            self._save()

    def _after_training(self) -> None:
        if self.rollout_ended is not None:
            self.training_seconds += time.perf_counter() - self.rollout_ended
            self.rollout_ended = None

    def _end_row(self) -> None:
        if self.model.num_timesteps == self.n_before:
            return
        seconds = time.perf_counter() - self.row_began
        stepping_seconds = self._stepping_seconds() - self.stepping_before
        mean = float(np.mean(self.returns)) if self.returns else float("nan")
        numbers = [self.model.num_timesteps, mean, len(self.returns), seconds, stepping_seconds, self.training_seconds]
        self.curve.rows.append(dict(zip(COLUMNS, map(float, numbers), strict=True)))
        self.curve.starts[-1]["to_step"] = self.model.num_timesteps
        self._begin_row()

    def _save(self) -> None:
        # A phase of PPG, in the middle of which a checkpoint would need its observations too, some GB: after it.
        is_in_phase = bool(len(getattr(self.model, "phase_buffer", None) or ()))
        if not is_in_phase and self.model.num_timesteps > self.n_saved:
            self._end_row()
            self.checkpoints.save(self.model, self.curve)
            self.curve.write(self.results)
            self.n_saved = self.model.num_timesteps
            self._begin_row()


def train(run: Run, plan: Plan) -> None:
    """
    Train from the last checkpoint, or the beginning, to the end or until the time is over.

    :param run: a run
    :param plan: how it is trained
    :raises ValueError: if there is a checkpoint of other settings
    """
    if plan.n_threads is not None:
        th.set_num_threads(plan.n_threads)
    th.backends.cudnn.benchmark = True  # sizes of minibatches do not change
    register()
    checkpoints = Checkpoints(plan.logs / run.name, run.env_id)
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    curve = checkpoints.curve()
    if curve.settings not in (None, plan.settings):
        raise ValueError(f"{checkpoints.last} is of a run with other settings: give another folder with --logs")
    curve.settings = plan.settings
    # Other levels and actions than those of the beginning
    seed = int(np.random.SeedSequence([run.seed, curve.n_steps]).generate_state(1)[0] // 2)
    set_random_seed(seed)
    with (checkpoints.folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
        model = _model(run, plan, checkpoints, seed)
        curve.starts.append(
            {
                **plan.start,
                "device": _hardware(model.device),
                "network_steps_per_second": round(steps_per_second(model), 1),
                "from_step": curve.n_steps,
                "to_step": curve.n_steps,
            }
        )
        recorder = Recorder(plan, checkpoints, curve)
        try:
            model.learn(
                plan.n_steps - model.num_timesteps, recorder, log_interval=None, reset_num_timesteps=not curve.rows
            )
        finally:
            model.get_env().close()
    curve.write(plan.results / run.name)


def _model(run: Run, plan: Plan, checkpoints: Checkpoints, seed: int) -> Any:
    """
    :param run: a run
    :param plan: how it is trained
    :param checkpoints: of it
    :param seed: of levels and actions
    :return: a new model, or that of the last checkpoint
    """
    config = checkpoints.folder / "settings.yml"
    wrapper = {"vec_env_wrapper": f"{__name__}.{TimedVecEnv.__name__}"}
    config.write_text(yaml.safe_dump({run.env_id: {"n_timesteps": plan.n_steps, **plan.settings, **wrapper}}))
    with options.taken_from(["--vec-env", options.ENVPOOL], "train", ""):
        manager = ExperimentManager(
            argparse.Namespace(), run.algo, run.env_id, str(checkpoints.folder / "zoo"), eval_freq=-1, verbose=0,
            config=str(config), seed=seed, device=plan.device,
            trained_agent=str(checkpoints.last / AGENT) if checkpoints.last else "",
            env_kwargs={} if plan.n_threads is None else {"num_threads": plan.n_threads},
        )  # fmt: skip
        model, _ = manager.setup_experiment()
    return model


def _hardware(device: th.device) -> str:
    return th.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {th.get_num_threads()}"
