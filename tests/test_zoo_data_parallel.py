"""One training of the zoo in two processes, which ``torchrun`` starts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3.common.monitor import load_results

from sb3_ppo_ewma import PPOEWMA, zoo

pytestmark = pytest.mark.long

zoo.register()

ENTRY: dict[str, Any] = {
    "n_envs": 4,
    "n_timesteps": 512,
    "policy": "MlpPolicy",
    "n_steps": 16,
    "batch_size": 32,
    "n_epochs": 1,
    "advantage_decay": 0.5,
    "normalize": True,
}
TRAIN = ["train", "--env", "CartPole-v1", "--conf-file", "entries.yml", "-f", "logs", "--device", "cpu"]


def in_two_processes(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "entries.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*torchrun, "-m", "sb3_ppo_ewma.zoo", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_train_leaves_what_one_process_leaves(tmp_path: Path) -> None:
    frequencies = ["--eval-freq", "128", "--save-freq", "256", "--seed", "3"]
    rescaling = ["--n-envs", "8"]
    result = in_two_processes(tmp_path, *TRAIN, "--algo", "ppo_ewma", *frequencies, *rescaling)
    assert result.returncode == 0, result.stderr
    runs = list((tmp_path / "logs" / "ppo_ewma").iterdir())
    assert [run.name for run in runs] == ["CartPole-v1_1"]
    names = {path.name for path in runs[0].iterdir()}
    # 8 environments are of both, with a file each
    assert names == {
        *(f"{i}.monitor.csv" for i in range(8)),
        *(f"rl_model_{steps}_steps.zip" for steps in (256, 512)),
        *(f"rl_model_vecnormalize_{steps}_steps.pkl" for steps in (256, 512)),
        *("CartPole-v1.zip", "CartPole-v1", "best_model.zip", "best_model_vecnormalize.pkl", "evaluations.npz"),
    }
    saved = dict(yaml.unsafe_load((runs[0] / "CartPole-v1" / "config.yml").read_text()))
    assert (saved["n_envs"], saved["batch_size"], saved["tuned_for_n_envs"]) == (8, 32, 4)
    model = PPOEWMA.load(runs[0] / "CartPole-v1.zip", device="cpu")
    assert (model.n_envs, model.n_steps, model.batch_size) == (4, 8, 16)
    assert (model.num_timesteps, model.seed) == (512, 3)
    assert list(np.load(runs[0] / "evaluations.npz")["timesteps"]) == [128, 256, 384, 512]
    # Only the first process prints.
    assert result.stdout.count("Log path:") == 1
    assert load_results(str(runs[0]))["l"].sum() <= 512


def test_processes_share_a_folder_that_no_other_run_has(tmp_path: Path) -> None:
    # Another run takes the number that the first process found.
    (tmp_path / "other_run.py").write_text("""
import os
from rl_zoo3.exp_manager import ExperimentManager

setup = ExperimentManager.setup_experiment

def setup_experiment(manager):
    if os.environ["RANK"] == "0":
        os.makedirs(manager.save_path)
    return setup(manager)

ExperimentManager.setup_experiment = setup_experiment
""")
    options = ["--eval-freq", "-1", "-n", "64", "--gym-packages", "other_run"]
    result = in_two_processes(tmp_path, *TRAIN, "--algo", "ppo_ewma", *options)
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "logs" / "ppo_ewma"
    assert not list((runs / "CartPole-v1_1").iterdir())
    names = {path.name for path in (runs / "CartPole-v1_2").iterdir()}
    assert names == {*(f"{i}.monitor.csv" for i in range(4)), "CartPole-v1", "CartPole-v1.zip"}
