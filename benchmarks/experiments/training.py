"""One training through rl-zoo3 in a process of its own, and what its episodes returned."""

import argparse
import contextlib
import io
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# Parts of a training whose episodes are averaged
N_PARTS = 20
FINAL_PARTS = 2
# Shares of a training after which the policy is tested, besides its end
TESTS = (0.8, 0.85, 0.9, 0.95)
# Environments of a test, an episode in each
N_TEST_ENVS = 10
# Added to the seed of a run for its test episodes
TEST_SEED = 10_000
# What is logged of training, averaged over its iterations
DIAGNOSTICS = ("train/clip_fraction", "train/approx_kl", "train/approx_kl_prox", "train/importance_cap_fraction",
               "train/entropy_loss", "noise_scale/policy", "noise_scale/joint")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """
    What one training gave.

    :param returns: (N_PARTS,) mean return of the episodes that ended in each part of the training, NaN where none did
    :param diagnostics: by name
    :param wall_seconds: that it took
    :param test_return: mean return of the test episodes, NaN without any
    """

    returns: list[float]
    diagnostics: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = math.nan
    test_return: float = math.nan

    @property
    def final_return(self) -> float:
        """Mean of the test episodes or, without any, of the last tenth of training."""
        if not math.isnan(self.test_return):
            return self.test_return
        return float(np.nanmean(self.returns[-FINAL_PARTS:]))


def train(algo: str, env_id: str, settings: dict[str, Any], seed: int, is_tested: bool = False) -> Result:
    """
    :param algo: name of an algorithm of the zoo, or of a class of this package
    :param env_id: environment
    :param settings: as an entry of the zoo's files; ``vec_env_type``: as for the zoo's ``--vec-env``
    :param seed: of the run
    :param is_tested: whether the policy plays test episodes in the last fifth of training, with the actions it samples
    :return: what its training and its test episodes returned
    """
    # Here, so that the libraries are not imported to read results.
    import torch as th
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.utils import ALGOS
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.utils import set_random_seed
    from stable_baselines3.common.vec_env import sync_envs_normalization, unwrap_vec_normalize

    import sb3_ppo_ewma
    from benchmarks.experiments import environments  # noqa: F401  # registers them
    from sb3_ppo_ewma.zoo import register

    class Recorder(BaseCallback):
        def __init__(self, n_timesteps: int) -> None:
            super().__init__()
            self.n_timesteps = n_timesteps
            self.sums, self.counts = np.zeros(N_PARTS), np.zeros(N_PARTS)
            self.logged: dict[str, list[float]] = {name: [] for name in DIAGNOSTICS}

        def _on_step(self) -> bool:
            if is_tested and len(tests) < len(TESTS) and self.num_timesteps >= TESTS[len(tests)] * self.n_timesteps:
                tests.append(tested())
            part = min(N_PARTS - 1, (self.num_timesteps - 1) * N_PARTS // self.n_timesteps)
            for info in self.locals["infos"]:
                if "episode" in info:  # before any normalisation of rewards
                    self.sums[part] += info["episode"]["r"]
                    self.counts[part] += 1
            return True

        # Training logs before a rollout starts, callbacks when it ends; then SB3 forgets both.
        def _on_rollout_start(self) -> None:
            self._take("train/")

        def _on_rollout_end(self) -> None:
            self._take("noise_scale/")

        def _take(self, prefix: str) -> None:
            for name, values in self.logged.items():
                if name.startswith(prefix) and name in self.logger.name_to_value:
                    values.append(float(self.logger.name_to_value[name]))

    th.set_num_threads(1)
    register()
    if algo not in ALGOS:
        ALGOS[algo] = getattr(sb3_ppo_ewma, algo)
    tests: list[float] = []
    began = time.monotonic()
    set_random_seed(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = Path(folder, "settings.yml")
        own = {name: value for name, value in settings.items() if name != "vec_env_type"}
        config.write_text(yaml.safe_dump({env_id: own}))
        manager = ExperimentManager(
            argparse.Namespace(), algo, env_id, folder, eval_freq=-1, seed=seed, verbose=0, device="cpu",
            config=str(config), log_interval=-1, vec_env_type=settings.get("vec_env_type", "dummy"),
        )  # fmt: skip
        model, _ = manager.setup_experiment()
        if is_tested:
            test_envs = manager.create_envs(N_TEST_ENVS, eval_env=True, no_log=True)
            test_envs.seed(seed + TEST_SEED)

        def tested() -> float:
            statistics = unwrap_vec_normalize(test_envs)
            if statistics is not None:
                sync_envs_normalization(model.get_env(), test_envs)
                statistics.training = statistics.norm_reward = False
            mean, _ = evaluate_policy(model, test_envs, N_TEST_ENVS, deterministic=False)
            return float(mean)

        recorder = Recorder(manager.n_timesteps)
        manager.callbacks.append(recorder)
        manager.learn(model)
        if is_tested:
            tests += [tested()] * (1 + len(TESTS) - len(tests))
        with np.errstate(invalid="ignore"):
            returns = recorder.sums / recorder.counts
        diagnostics = {
            name.removeprefix("train/").replace("/", "_"): float(np.mean(values))
            for name, values in recorder.logged.items()
            if values
        }
    test_return = float(np.mean(tests)) if tests else math.nan
    return Result([float(value) for value in returns], diagnostics, time.monotonic() - began, test_return)


def use_one_thread() -> None:
    """Before torch is imported: as many runs as cores are quicker than one run on all cores."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
