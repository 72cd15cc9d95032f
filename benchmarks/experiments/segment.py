"""
One segment of an elastic run: loads the checkpoint of the segment before, trains, and writes its own.
`benchmarks.experiments.elastic` starts it, with `torchrun` for several processes.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from benchmarks.experiments.training import N_TEST_ENVS, TEST_SEED
from sb3_ppo_ewma import PPOEWMA

# Files in the folder of a run
JOB, MODEL, STATISTICS, TESTS = "job.json", "model.zip", "vecnormalize.pkl", "tests.json"
# Tests of a run, evenly spaced, and the episodes of each
N_TESTS = 10
N_EPISODES, N_FINAL_EPISODES = 10, 50
# Settings that are not arguments of the algorithm
_OF_THE_RUN = ("n_envs", "n_timesteps", "n_processes", "normalize")


class Tests(BaseCallback):
    """
    Tests the policy, with sampled actions, after every tenth of the run but the last.

    :param envs: for the test episodes
    :param returns: mean return of each test so far; new ones are appended
    :param n_timesteps: steps of the whole run
    :param until: steps at the end of this segment; the run loses later ones
    """

    rank_0_only = True

    def __init__(self, envs: VecEnv, returns: list[float], n_timesteps: int, until: int) -> None:
        super().__init__()
        self.envs, self.returns, self.n_timesteps, self.until = envs, returns, n_timesteps, until

    def _on_step(self) -> bool:
        n_due = min(self.num_timesteps * N_TESTS // self.n_timesteps, N_TESTS - 1)
        if self.num_timesteps <= self.until and len(self.returns) < n_due:
            self.test(N_EPISODES)
        return True

    def test(self, n_episodes: int) -> None:
        if isinstance(self.envs, VecNormalize):
            sync_envs_normalization(self.training_env, self.envs)
        mean, _ = evaluate_policy(self.model, self.envs, n_episodes, deterministic=False)
        self.returns.append(float(mean))


class LastCheckpoint(BaseCallback):
    """
    Saves the model after the last iteration of a segment, and stops. The run loses the rollout that begins then.

    :param folder: of the run
    :param until: steps at the end of this segment
    :param is_first: whether this is rank 0, which writes
    """

    def __init__(self, folder: Path, until: int, is_first: bool) -> None:
        super().__init__()
        self.folder, self.until, self.is_first = folder, until, is_first
        self.is_over = False

    def _on_rollout_start(self) -> None:
        self.is_over = self.model.num_timesteps >= self.until
        if self.is_over and self.is_first:
            self.model.save(self.folder / MODEL)
            normalization = self.model.get_vec_normalize_env()
            if normalization is not None:
                normalization.save(str(self.folder / STATISTICS))

    def _on_step(self) -> bool:
        return not self.is_over


def normalized(envs: VecEnv, settings: dict[str, Any], file: Path | None = None, **kwargs: Any) -> VecEnv:
    """
    :param envs: environments
    :param settings: of the run
    :param file: with the statistics of the segment before
    :param kwargs: of ``VecNormalize``
    :return: the environments, normalised if ``normalize`` is true
    :raises ValueError: if ``normalize`` is neither true nor false
    """
    if not settings.get("normalize"):
        return envs
    if settings["normalize"] is not True:
        raise ValueError(f"normalize must be true or false, got {settings['normalize']!r}")
    if file is not None and file.is_file():
        return VecNormalize.load(str(file), envs)
    return VecNormalize(envs, gamma=settings["gamma"], **kwargs)


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """
    :param settings: of the run, as an entry of the zoo's files
    :return: arguments of the algorithm
    """
    return {
        name: LinearSchedule(float(value[4:]), 0.0, 1.0) if str(value).startswith("lin_") else value
        for name, value in settings.items()
        if name not in _OF_THE_RUN
    }


def run(folder: Path, until: int, rank: int) -> None:
    """
    :param folder: of the run, with its job and the checkpoint of the segment before, if there was one
    :param until: steps at the end of this segment
    :param rank: of this process
    """
    job = json.loads((folder / JOB).read_text())
    env_id, settings, seed = job["env"], job["settings"], job["seed"]
    n_timesteps = settings["n_timesteps"]
    env = normalized(make_vec_env(env_id, settings["n_envs"]), settings, folder / STATISTICS)
    if (folder / MODEL).is_file():
        model = PPOEWMA.load(folder / MODEL, env, device="cpu")
    else:
        model = PPOEWMA(env=env, seed=seed, device="cpu", **arguments(settings))
    test_envs = make_vec_env(env_id, N_TEST_ENVS, seed=seed + TEST_SEED)
    test_envs = normalized(test_envs, settings, training=False, norm_reward=False)
    returns = json.loads((folder / TESTS).read_text()) if (folder / TESTS).is_file() else []
    tests = Tests(test_envs, returns, n_timesteps, until)
    callbacks = [tests, LastCheckpoint(folder, until, rank == 0)]
    # SB3 adds num_timesteps, so schedules cover the whole run.
    model.learn(n_timesteps - model.num_timesteps, callbacks, reset_num_timesteps=False)
    if rank == 0:
        if until == n_timesteps:
            tests.test(N_FINAL_EPISODES)
        (folder / TESTS).write_text(json.dumps(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("until", type=int)
    args = parser.parse_args()
    th.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        run(args.folder, args.until, 0)
        return
    dist.init_process_group("gloo")
    run(args.folder, args.until, int(os.environ["RANK"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
