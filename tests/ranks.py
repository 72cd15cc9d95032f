"""
What the processes of data-parallel trainings do in the tests, and how they are started::

    python -m tests.ranks NAME FOLDER RANK WORLD_SIZE

runs one of the functions below in a process group; what it returns goes to ``FOLDER/NAME_RANK.pkl``.
"""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_ppo_ewma
from sb3_ppo_ewma import PPOEWMA, zoo
from sb3_ppo_ewma.batch_scaling import settings_of

ROOT = Path(__file__).parents[1]
# Of the trainings on the same data: environments and steps of all processes, and what each is built with
N_ENVS, N_STEPS, N_ITERATIONS = 4, 32, 4
CASES: dict[str, dict[str, Any]] = {
    # Normalised per minibatch; the policy is trained as one long vector
    "ppo_ewma": {"algorithm": "PPOEWMA", "n_epochs": 3, "batch_size": 32},
    "ppo_ewma_adam": {  # to SB3's bit, one by one
        "algorithm": "PPOEWMA",
        "n_epochs": 2,
        "batch_size": 48,  # the last minibatch is smaller
        "policy_kwargs": {"optimizer_kwargs": {"eps": 1e-5}},
        "n_epochs_value": 3,
        "recompute_advantages": True,
        "advantage_decay": 0.5,
    },
    "ppo_ewma_target_kl": {
        "algorithm": "PPOEWMA",
        "n_epochs": 20,
        "batch_size": 32,
        "target_kl": 0.002,
        "learning_rate": 3e-3,
    },
    "ppo_ewma_stale": {"algorithm": "PPOEWMA", "n_epochs": 1, "batch_size": 32, "staleness": 1, "kl_coef": 0.1},
    "ppg_ewma": {"algorithm": "PPGEWMA", "n_policy_iterations": 2, "n_aux_epochs": 2, "batch_size": 64},
    # Whole rollouts, since recurrent minibatches are ranges of them; two sequences, one of each process
    "maskable_recurrent_ppg_ewma": {
        "algorithm": "MaskableRecurrentPPGEWMA",
        "policy": "MlpLstmPolicy",
        "policy_kwargs": {"lstm_hidden_size": 8},
        "n_epochs": 3,
        "batch_size": 128,
        "n_policy_iterations": 2,
        "n_aux_epochs": 2,
        "aux_batch_size": 64,
        "kl_coef": 0.1,
        "kl_estimator": "analytic",
    },
}
LSTM_STATES = ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf")


def start(name: str, folder: Path, world_size: int = 2, **env: str) -> list[subprocess.Popen[str]]:
    """
    :param name: of a function of this module
    :param folder: for what the processes write
    :param world_size: number of processes
    :param env: further variables of the environment
    :return: the processes, by rank
    """
    arguments = [sys.executable, "-m", "tests.ranks", name, str(folder)]
    return [
        subprocess.Popen(
            [*arguments, str(rank), str(world_size)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def results(name: str, folder: Path, world_size: int = 2) -> list[Any]:
    """
    :param name: of a function of this module
    :param folder: for what the processes write
    :param world_size: number of processes
    :return: what it returned in each, by rank
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(name, folder, world_size)
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()  # if it waits for another one
    return [pickle.loads((folder / f"{name}_{rank}.pkl").read_bytes()) for rank in range(world_size)]


def parameters_of(model: Any) -> np.ndarray:
    """
    :param model: of any algorithm
    :return: all parameters, those of the average too
    """
    averages = [] if model.policy_ewma is None else model.policy_ewma.averages
    return np.concatenate([each.detach().numpy().ravel() for each in (*model.policy.parameters(), *averages)])


def digest(array: np.ndarray) -> str:
    """
    :param array: any array
    :return: hash of its bytes
    """
    return hashlib.sha256(array.tobytes()).hexdigest()


# === The same data ===


class Recording:
    """Rollouts of one process with all environments, of which several get their parts."""

    def __init__(self) -> None:
        self.rollouts: list[dict[str, Any]] = []


def trained_on(
    case: str, recording: Recording, rank: int, world_size: int
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """
    :param case: name of a training
    :param recording: filled where one process trains, else read
    :param rank: of this process
    :param world_size: number of processes
    :return: parameters and log after every iteration
    """
    settings = dict(CASES[case])
    algorithm = getattr(sb3_ppo_ewma, settings.pop("algorithm"))
    for name in ("batch_size", "aux_batch_size"):
        if name in settings:
            settings[name] //= world_size
    policy = settings.pop("policy", "MlpPolicy")
    history: list[np.ndarray] = []
    log: list[dict[str, Any]] = []
    n_envs = N_ENVS // world_size
    mine = slice(rank * n_envs, (rank + 1) * n_envs)

    class OfRecording(algorithm):  # type: ignore[misc, valid-type]
        def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
            result = super().collect_rollouts(*args, **kwargs)
            buffer: RolloutBuffer = self.rollout_buffer
            names = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages")
            names = (*names, "returns", *(name for name in ("action_masks", *LSTM_STATES) if hasattr(buffer, name)))
            if world_size == 1:
                arrays = {name: getattr(buffer, name).copy() for name in names}
                last = {"_last_obs": self._last_obs.copy(), "_last_episode_starts": self._last_episode_starts.copy()}
                recording.rollouts.append({"buffer": arrays, "last": last})
            else:
                recorded = recording.rollouts[len(history)]
                for name in names:
                    array = recorded["buffer"][name]
                    setattr(buffer, name, (array[:, :, mine] if name in LSTM_STATES else array[:, mine]).copy())
                for name, array in recorded["last"].items():
                    setattr(self, name, array[mine].copy())
            return result

        def train(self) -> None:
            super().train()
            log.append(dict(self.logger.name_to_value))
            history.append(parameters_of(self))

    env = make_vec_env(
        "CartPole-v1", n_envs, seed=0, wrapper_class=ActionMasker, wrapper_kwargs={"action_mask_fn": masks}
    )
    model = OfRecording(policy, env, n_steps=N_STEPS, seed=0, device="cpu", **settings)
    with permutations(rank, world_size, N_ENVS if policy == "MlpLstmPolicy" else N_ENVS * N_STEPS):
        model.learn(N_ITERATIONS * N_ENVS * N_STEPS)
    assert model.num_timesteps == N_ITERATIONS * N_ENVS * N_STEPS
    return history, log


def masks(env: Any) -> np.ndarray:
    """:return: masks of CartPole: on one side of the middle, both actions are valid"""
    return np.array([True, env.unwrapped.state[0] > 0])


@contextmanager
def permutations(rank: int, world_size: int, n_of_rollout: int) -> Iterator[None]:
    """
    Within the context, minibatches of one process are those of two together, and recurrent ones begin where the rollout
    does.

    :param rank: of this process
    :param world_size: 1 or 2
    :param n_of_rollout: number of samples, or of sequences, of a rollout of all processes
    """
    n_calls = 0
    part = n_of_rollout // 2

    def of_part(n_samples: int, which: int) -> np.ndarray:
        return np.random.RandomState(1000 * n_calls + which).permutation(n_samples)

    def permutation(n_samples: int) -> np.ndarray:
        nonlocal n_calls
        n_calls += 1
        if world_size == 2:
            return of_part(n_samples, rank)
        # Every second sample is one of the other process, whose environments come behind those of the first within
        # a rollout.
        both = [of_part(n_samples // 2, which) for which in range(2)]
        both = [each // part * 2 * part + which * part + each % part for which, each in enumerate(both)]
        return np.stack(both, axis=1).flatten()

    originals = np.random.permutation, np.random.randint
    np.random.permutation, np.random.randint = permutation, lambda n: 0
    try:
        yield
    finally:
        np.random.permutation, np.random.randint = originals


def same_data(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    recordings = pickle.loads((folder / "recordings.pkl").read_bytes())
    return {case: trained_on(case, recording, rank, world_size) for case, recording in recordings.items()}


# === Data of their own ===


class Watch(BaseCallback):
    """Runs in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.hashes: list[str] = []
        self.buffers: list[dict[str, np.ndarray]] = []
        self.divergences: list[float] = []
        self.observations: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.steps.append(self.num_timesteps)
        return True

    def _on_rollout_start(self) -> None:
        # Of what the training before left
        self.hashes.append(digest(parameters_of(self.model)))
        self.buffers.append(buffers_of(self.model))
        if "train/approx_kl" in self.logger.name_to_value:
            self.divergences.append(self.logger.name_to_value["train/approx_kl"])

    def _on_rollout_end(self) -> None:
        self.observations.append(self.model.rollout_buffer.observations.copy())


class StopsAt(BaseCallback):
    def __init__(self, n_calls: int, of_rank: int) -> None:
        super().__init__()
        self._at, self._of_rank = n_calls, of_rank

    def _on_step(self) -> bool:
        return not (dist.get_rank() == self._of_rank and self.n_calls == self._at)


def training(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Everything around: environments, statistics, callbacks, log."""
    del world_size
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    raw: list[np.ndarray] = []
    reset, step_wait = env.venv.reset, env.venv.step_wait

    def recorded_reset() -> Any:
        raw.append(reset())
        return raw[-1]

    def recorded_step() -> Any:
        result = step_wait()
        raw.append(result[0])
        return result

    env.venv.reset, env.venv.step_wait = recorded_reset, recorded_step
    watch = Watch()
    evaluation = EvalCallback(VecNormalize(make_vec_env("CartPole-v1", 1), training=False), eval_freq=32, verbose=0)
    callbacks = [
        watch,
        CheckpointCallback(64, str(folder / "checkpoints"), save_replay_buffer=True, save_vecnormalize=True),
        EveryNTimesteps(128, CheckpointCallback(1, str(folder / "every"))),
    ]
    model = sb3_ppo_ewma.PPGEWMA(
        "MlpPolicy",
        env,
        n_steps=32,
        batch_size=32,
        n_policy_iterations=3,
        n_aux_epochs=1,
        seed=7,
        device="cpu",
        tensorboard_log=None,
    )
    model.set_logger(configure(str(folder / f"log_{rank}"), ["csv"]))
    model.learn(4 * 128, [*callbacks, evaluation])
    return {
        "steps": watch.steps,
        "hashes": watch.hashes,
        "observations": watch.observations,
        "statistics": [(each.mean, each.var, each.count) for each in (env.obs_rms, env.ret_rms)],
        "raw": np.concatenate(raw),
        "n_evaluations": evaluation.n_calls // 32,
        "lengths": [episode["l"] for episode in model.ep_info_buffer],
        "seeds": [each.unwrapped.np_random_seed for each in env.venv.envs],
    }


def stopping(folder: Path, rank: int, world_size: int) -> list[int]:
    """A callback of the second process stops in the middle of a rollout; episodes of one process count alone."""
    del folder, rank, world_size
    found = []
    for callback in (StopsAt(40, of_rank=1), StopTrainingOnMaxEpisodes(1)):
        model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=32, batch_size=32, seed=0, device="cpu")
        model.learn(1024, callback)
        found.append(model.num_timesteps)
    return found


def differing(folder: Path, rank: int, world_size: int) -> tuple[str, dict[str, Any]]:
    """Settings that are not the same, and what they are of all processes."""
    del folder, world_size
    env = make_vec_env("CartPole-v1", 2)
    model = PPOEWMA("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1 + rank, device="cpu")
    try:
        model.learn(64)
    except ValueError as error:
        return str(error), settings_of(model)
    return "", {}


class ChangesInOneRank(BaseCallback):
    """In the second process, something of the model changes in the second rollout."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self._change = change

    def _on_step(self) -> bool:
        if dist.get_rank() == 1 and self.n_calls == 40:
            self._change(self.model)
        return True


def changes_in_one_rank(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """By what changes: engine, parameters and what is against the fastest engine; or the error."""
    del folder, rank, world_size
    changes: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "hook": (PPOEWMA, lambda model: model.policy.action_net.register_forward_hook(lambda *_: None)),
        "hook, phasic": (
            sb3_ppo_ewma.PPGEWMA,
            lambda model: model.policy.value_net.register_forward_hook(lambda *_: None),
        ),
        "method": (PPOEWMA, lambda model: setattr(model.policy, "evaluate_actions", model.policy.evaluate_actions)),
        "n_epochs": (PPOEWMA, lambda model: setattr(model, "n_epochs", 3)),
        "frozen": (PPOEWMA, lambda model: model.policy.action_net.requires_grad_(False)),
    }
    found: dict[str, Any] = {}
    phases = {"n_policy_iterations": 2, "n_aux_epochs": 1}
    for name, (algorithm, change) in changes.items():
        settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
        settings |= phases if algorithm is not PPOEWMA else {}
        model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 2), **settings)
        try:
            model.learn(4 * 128, ChangesInOneRank(change))
        except ValueError as error:
            found[name] = str(error)
        else:
            (reason, _) = model._engines.choice.declined.get("dense", ("", ""))
            found[name] = model.current_engine, digest(parameters_of(model)), reason
    return found


def resuming(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """From a checkpoint with the rollouts of a phase, then from one in which those of a process are missing."""
    del world_size
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_policy_iterations": 4, "device": "cpu"}
    model = sb3_ppo_ewma.PPGEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, **settings)
    model.learn(3 * 64)
    if rank == 0:
        model.save(folder / "agent")
    model.save_replay_buffer(folder / "rollouts")
    dist.barrier()
    for has_rollouts in (True, False):
        model = sb3_ppo_ewma.PPGEWMA.load(folder / "agent", make_vec_env("CartPole-v1", 2, seed=rank), device="cpu")
        if has_rollouts or rank == 0:
            model.load_replay_buffer(folder / "rollouts")
        model.learn(64, reset_num_timesteps=False)
        found[f"n_phases_{has_rollouts}"] = model._n_phases
        found[f"actions_{has_rollouts}"] = model.rollout_buffer.actions.flatten().tolist()
    return found


def families(folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """Other families, spaces and ways to collect: parameters at the end."""
    del folder, rank, world_size
    discrete = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    cartpole = make_vec_env("CartPole-v1", 2)
    masked = make_vec_env(lambda: InvalidActionEnvDiscrete(dim=5, n_invalid_actions=2), 2)
    phases = {"n_policy_iterations": 2, "n_aux_epochs": 1}
    lstm = {**discrete, "policy_kwargs": {"lstm_hidden_size": 8}}
    dictionary = VecNormalize(make_vec_env(SimpleMultiObsEnv, 2), norm_obs_keys=["vec"])
    models = {
        "recurrent": sb3_ppo_ewma.RecurrentPPOEWMA("MlpLstmPolicy", cartpole, **lstm),
        "maskable": sb3_ppo_ewma.MaskablePPOEWMA("MlpPolicy", masked, **discrete),
        "recurrent, phasic": sb3_ppo_ewma.RecurrentPPGEWMA("MlpLstmPolicy", cartpole, **lstm, **phases),
        "maskable, phasic": sb3_ppo_ewma.MaskablePPG("MlpPolicy", masked, **discrete, **phases),
        "both": sb3_ppo_ewma.MaskableRecurrentPPOEWMA("MlpLstmPolicy", masked, **lstm),
        "both, phasic": sb3_ppo_ewma.MaskableRecurrentPPG("MlpLstmPolicy", masked, **lstm, **phases),
        "dictionary": PPOEWMA("MultiInputPolicy", dictionary, **discrete),
        "sde": PPOEWMA("MlpPolicy", make_vec_env("Pendulum-v1", 2), use_sde=True, **discrete),
    }
    return {name: digest(parameters_of(model.learn(3 * 128))) for name, model in models.items()}


def compiled(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """
    By case, parameters and logged KL divergence after training compiled and not compiled; and what happens where one
    process cannot compile.
    """
    del folder, world_size
    phases = {"n_policy_iterations": 2, "n_aux_epochs": 1, "aux_batch_size": 32}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "compiled dense": (PPOEWMA, {"ent_coef": 0.1}),
        "compiled": (sb3_ppo_ewma.PPGEWMA, {"n_epochs": 4, "target_kl": 1e-6, **phases}),
    }
    found: dict[str, Any] = {}
    for name, (algorithm, settings) in cases.items():
        found[name] = []
        for is_compiled in (True, False):
            model = algorithm(
                "MlpPolicy",
                make_vec_env("CartPole-v1", 2, seed=rank),
                **{"n_steps": 36, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", **settings},
                policy_kwargs={"net_arch": [4]},
                torch_compile=is_compiled,
            )
            watch = Watch()
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                warnings.filterwarnings("ignore", "You have specified a mini-batch size")
                model.learn(4 * 144, watch)
            assert model.current_engine.startswith(name) == is_compiled, model.explain_engine()
            found[name].append((parameters_of(model), [*watch.divergences, model._n_updates]))
    if rank == 1:
        th.compile = refuse_to_compile
    model = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=32, batch_size=32, torch_compile=True, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model.learn(2 * 128)
    found["in one rank only"] = (
        model.current_engine,
        digest(parameters_of(model)),
        [str(each.message) for each in caught],
    )
    return found


def refuse_to_compile(function: Any, **_: Any) -> Any:
    """In the place of ``torch.compile``, where it cannot compile."""

    from torch import _dynamo

    def call(*_: Any) -> Any:
        raise _dynamo.exc.TorchDynamoException("there is no compiler")

    return call


# === Networks with buffers ===


class Normalized(BaseFeaturesExtractor):
    """Of vectors, with BatchNorm."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        size = observation_space.shape[0]
        self.layers = nn.Sequential(nn.BatchNorm1d(size), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        output: th.Tensor = self.layers(observations)
        return output


def buffers(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Of networks with BatchNorm: parameters and buffers before every rollout."""
    del folder, world_size
    phases = {"n_policy_iterations": 2, "n_aux_epochs": 1}
    found: dict[str, Any] = {}
    for algorithm, settings in ((PPOEWMA, {}), (sb3_ppo_ewma.PPGEWMA, phases)):
        env = make_vec_env("CartPole-v1", 2, seed=rank)
        settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu", **settings}
        model = algorithm("MlpPolicy", env, policy_kwargs={"features_extractor_class": Normalized}, **settings)
        watch = Watch()
        model.learn(4 * 128, watch)
        found[algorithm.__name__] = [watch.hashes, watch.buffers, buffers_of(model)]
    model.policy.features_extractor.layers[0].num_batches_tracked += rank
    try:
        model._data_parallel.end_training()
    except ValueError as error:
        found["other integers"] = str(error)
    return found


def collectors(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Each process has another one that collects: parameters before every rollout, observations of the last one."""
    del folder, world_size
    found: dict[str, Any] = {}
    for lag in (None, 0, 1):
        env = make_vec_env("Pendulum-v1", 2, seed=rank)
        env = env if lag == 1 else VecNormalize(env)
        settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
        model = PPOEWMA("MlpPolicy", env, max_policy_lag=lag, **settings)
        watch = Watch()
        model.learn(4 * 128, watch)
        found[str(lag)] = [watch.hashes, model.rollout_buffer.observations.copy()]
        model.learn(128, reset_num_timesteps=False)
        found[f"goes on, {lag}"] = [model.rollout_buffer.episode_starts.copy(), watch.hashes]
        env.close()
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    try:
        PPOEWMA("MlpPolicy", env, n_steps=32, max_policy_lag=1).learn(128)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def buffers_of(model: Any) -> dict[str, np.ndarray]:
    """
    :param model: of any algorithm
    :return: buffers of its policy, by name
    """
    return {name: each.numpy().copy() for name, each in model.policy.named_buffers()}


def stored_of(model: Any) -> list[dict[str, np.ndarray]]:
    """
    :param model: of an algorithm with auxiliary phases
    :return: what is stored for the next phase
    """
    return [{name: array.copy() for name, array in piece.items()} for piece in model.phase_buffer.pieces()]


def sequences(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Goes on within a phase of sequences where one process stopped, with its environments divided."""
    del world_size
    model = sb3_ppo_ewma.RecurrentPPGEWMA.load(folder / "sequences", make_vec_env("CartPole-v1", 2, seed=rank))
    model.load_replay_buffer(folder / "sequences_rollouts")
    stored = stored_of(model)
    model.learn(4 * 16, reset_num_timesteps=False)
    return {"stored": stored, "phases": model._n_phases}


def write_sequences(folder: Path) -> list[dict[str, np.ndarray]]:
    """
    :param folder: for the files that :func:`sequences` reads
    :return: the rollouts in them
    """
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_policy_iterations": 3, "tuned_for_n_envs": 4}
    settings["policy_kwargs"] = {"lstm_hidden_size": 8}
    environments = make_vec_env("CartPole-v1", 4, seed=0)
    model = sb3_ppo_ewma.RecurrentPPGEWMA("MlpLstmPolicy", environments, device="cpu", seed=0, **settings)
    model.learn(2 * 4 * 16)
    model.save(folder / "sequences")
    model.save_replay_buffer(folder / "sequences_rollouts")
    return stored_of(model)


def refusals(folder: Path, rank: int, world_size: int) -> list[str]:
    """What the zoo says of what cannot be shared."""
    del rank, world_size
    zoo.register()
    (folder / "entries.yml").write_text("CartPole-v1: {n_envs: 4, n_timesteps: 64, policy: MlpPolicy}")
    train = ["train", "--env", "CartPole-v1", "--conf-file", str(folder / "entries.yml"), "-f", str(folder / "logs")]
    found = []
    for arguments in (
        ["--algo", "ppo_ewma", "-params", "n_envs:3"],
        ["--algo", "ppo"],
        ["--algo", "ppo_ewma", "-optimize"],
        ["--algo", "ppo_ewma", "-params", "data_parallel:False"],
    ):
        try:
            zoo.main([*train, *arguments])
        except SystemExit as refused:
            found.append(str(refused.code))
    return [*found, *(path.name for path in folder.glob("logs/*"))]


def short(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """One after the other, since it takes longer to start processes."""
    return {
        each.__name__: each(folder, rank, world_size)
        for each in (
            stopping,
            differing,
            changes_in_one_rank,
            resuming,
            sequences,
            families,
            buffers,
            collectors,
            refusals,
        )
    }


# An elastic training: of all processes, whatever their number
ELASTIC: dict[str, Any] = {"n_steps": 32, "batch_size": 64, "n_epochs": 2, "n_policy_iterations": 8, "device": "cpu",
                           "tuned_for_n_envs": 8, "seed": 0}  # fmt: skip


def counters(model: Any) -> dict[str, Any]:
    """
    :param model: PPG-EWMA
    :return: how far its training is
    """
    return {
        "steps": model.num_timesteps,
        "epochs": model._n_updates,
        "phases": model._n_phases,
        "rollouts of the phase": len(model.phase_buffer),
        "gradient steps": int(model.policy.optimizer.state_dict()["state"][0]["step"]),
        "weight of the average": model.policy_ewma.total_weight,
        "prox_decay": model.current_prox_decay,
        "samples of an iteration": model.n_steps * model.n_envs,
    }


def elastic(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Goes on for three iterations where one process stopped."""
    env = make_vec_env("CartPole-v1", 4, seed=rank)
    model = sb3_ppo_ewma.PPGEWMA.load(folder / "first", env, device="cpu")
    model.load_replay_buffer(folder / "first_rollouts")
    model.learn(3 * 256, reset_num_timesteps=False)
    if rank == 0:
        model.save(folder / "second")
    model.save_replay_buffer(folder / "second_rollouts")
    return {**counters(model), "n_steps": model.n_steps, "batch_size": model.batch_size}


# === Groups of their own ===


def groups(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Two trainings of two processes each, then one of all four, then four of one."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    number, of_pair = rank // 2, rank % 2
    mine, others = pairs[number], pairs[1 - number]
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_policy_iterations": 3, "n_aux_epochs": 1}
    settings |= {"device": "cpu", "tuned_for_n_envs": 4}
    for name, choice in {"pair": mine, "all": True, "alone": False}.items():
        env = make_vec_env("CartPole-v1", 2)
        seed = 100 * number + 1000 * rank * (choice is False)
        model = sb3_ppo_ewma.PPGEWMA("MlpPolicy", env, data_parallel=choice, seed=seed, **settings).learn(2 * 128)
        found[name] = {
            "parameters": digest(parameters_of(model)),
            "seeds": [each.unwrapped.np_random_seed for each in env.envs],
            "n_steps": model.n_steps,
            "batch_size": model.batch_size,
            "batch_size of all": settings_of(model)["batch_size"],
            "num_timesteps": model.num_timesteps,
            "rollouts": len(model.phase_buffer),
        }
        if choice is not mine:
            continue
        for copied in (copy.copy(model), copy.deepcopy(model)):
            assert copied.data_parallel is mine
        assert pickle.loads(pickle.dumps(model)).data_parallel is None
        model.to_ppo()
        path = folder / f"pair{number}"
        if of_pair == 0:
            model.save(path)
        model.save_replay_buffer(f"{path}_rollouts")
        dist.barrier()
        assert sb3_ppo_ewma.PPGEWMA.load(path).data_parallel is None
        loaded = sb3_ppo_ewma.PPGEWMA.load(path, make_vec_env("CartPole-v1", 2, seed=rank), data_parallel=mine)
        loaded.load_replay_buffer(f"{path}_rollouts")
        loaded.learn(128, reset_num_timesteps=False)
        found["loaded"] = {"parameters": digest(parameters_of(loaded)), "phases": loaded._n_phases}
    try:
        PPOEWMA("MlpPolicy", "CartPole-v1", data_parallel=others)
    except ValueError as error:
        found["message"] = str(error)
    return found


# === Ends ===


class Breaks(BaseCallback):
    """In one process, something goes wrong in the second rollout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def _on_step(self) -> bool:
        if self.n_calls == 40:
            if self._kind == "observation":
                self.locals["new_obs"][:] = np.nan
            elif self._kind == "environment":
                raise OSError("the simulator has crashed")
        return True

    def _on_rollout_end(self) -> None:
        if self._kind == "memory" and self.n_calls >= 40:
            raise th.OutOfMemoryError("none left")


class BreaksInStep(PPOEWMA):
    """In one process, the shapes of a loss do not fit, in the second training."""

    def extra_loss(self, evaluation: Any, minibatch: Any) -> th.Tensor:
        is_broken = dist.get_rank() == 1 and self._n_rollouts == 2
        result: th.Tensor = 0.0 * minibatch.advantages @ (evaluation.values[:-1] if is_broken else evaluation.values)
        return result


def failing(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """One process fails, in its own way; what both say, and how long the other one has waited."""
    found: dict[str, Any] = {}
    for kind in ("observation", "environment", "memory", "loss"):
        group = dist.new_group(list(range(world_size)))
        env = make_vec_env("CartPole-v1", 2)
        algorithm = BreaksInStep if kind == "loss" else PPOEWMA
        model = algorithm("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu", data_parallel=group)
        began = time.monotonic()
        try:
            model.learn(100_000, Breaks(kind) if rank == 1 else None)
        except Exception as error:
            found[kind] = type(error).__name__, str(error), time.monotonic() - began
        model.save(folder / f"{kind}_{rank}")
        assert PPOEWMA.load(folder / f"{kind}_{rank}").num_timesteps == model.num_timesteps
        # The same processes train on in another group, without hearing of the failure again.
        again = dist.new_group(list(range(world_size)))
        PPOEWMA("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu", data_parallel=again).learn(128)
    return found


def dying(folder: Path, rank: int, world_size: int) -> None:
    """The second process is killed when it has made a checkpoint's steps."""
    del world_size

    class Dies(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps >= 512 and rank == 1:
                os.kill(os.getpid(), 9)
            return True

    env = make_vec_env("CartPole-v1", 2)
    model = PPOEWMA("MlpPolicy", env, n_steps=32, batch_size=32, device="cpu")
    model.learn(100_000, [CheckpointCallback(64, str(folder)), Dies()])


FUNCTIONS: dict[str, Callable[[Path, int, int], Any]] = {
    function.__name__: function for function in (same_data, training, short, compiled, elastic, groups, failing, dying)
}


def main() -> None:
    name, folder, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    th.set_num_threads(1)
    store = f"file://{folder / f'{name}_store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    result = FUNCTIONS[name](folder, rank, world_size)
    (folder / f"{name}_{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
