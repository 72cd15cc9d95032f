"""The zoo's scripts for real, short: train, continue, watch, record, plot, benchmark."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from sb3_ppo_ewma import PPOEWMA, zoo
from sb3_ppo_ewma.zoo import child_processes

# Small, on one environment, with an evaluation and a checkpoint every 64 steps
SHORT = ["-n", "128", "--eval-freq", "64", "--eval-episodes", "2", "--save-freq", "64", "--seed", "0"]
SMALL = ["n_envs:1", "n_steps:32", "batch_size:16", "n_epochs:1"]


def train(folder: Path, *params: str, algo: str = "ppo_ewma", env: str = "CartPole-v1", options: tuple[str, ...] = ()):
    arguments = ["--algo", algo, "--env", env, "-f", str(folder), *SHORT, *options]
    zoo.main(["train", *arguments, "-params", *SMALL, *params])
    runs = sorted((folder / algo).glob(f"{env}_*"))
    return runs[-1]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs of ppo_ewma and ppo each, one of ppo_lstm_ewma."""
    folder = tmp_path_factory.mktemp("logs")
    for _ in range(2):
        train(folder, "prox_decay:0.95", "kl_coef:1.0", options=("-P",))
        train(folder, algo="ppo")
    train(folder, algo="ppo_lstm_ewma", env="CartPoleNoVel-v1")
    return folder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the child processes
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def test_train_leaves_what_the_zoo_leaves(logs):
    run = logs / "ppo_ewma" / "CartPole-v1_1"
    checkpoints = {"rl_model_64_steps.zip", "rl_model_128_steps.zip"}
    assert checkpoints | {"best_model.zip", "CartPole-v1.zip", "evaluations.npz"} <= set(os.listdir(run))
    config = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
    assert config["prox_decay"] == 0.95
    assert config["kl_coef"] == 1.0
    assert config["gamma"] == 0.98  # from zoo_hyperparams
    model = PPOEWMA.load(run / "CartPole-v1.zip")
    assert (model.prox_decay, model.kl_coef, model.num_timesteps) == (0.95, 1.0, 128)
    assert list(np.load(run / "evaluations.npz")["timesteps"]) == [64, 128]


@pytest.mark.parametrize("clip_range", ["None", "-1"])
def test_train_without_a_clip(clip_range, tmp_path):
    run = train(tmp_path, f"clip_range:{clip_range}", "kl_coef:1.0", "prox_decay:auto")
    model = PPOEWMA.load(run / "CartPole-v1.zip")
    assert model.clip_range(1.0) < 0
    assert model.prox_decay == "auto"


def test_clip_range_null_in_a_file(tmp_path):
    Path("my.yml").write_text("CartPole-v1: {n_timesteps: 64, policy: MlpPolicy, clip_range: null, kl_coef: 1}")
    run = train(tmp_path, options=("-conf", "my.yml"))
    assert PPOEWMA.load(run / "CartPole-v1.zip").clip_range(1.0) < 0


def test_continue_with_the_rollouts_that_wait(tmp_path, capsys):
    first = train(tmp_path, "staleness:1", options=("--save-replay-buffer",))
    assert (first / "replay_buffer.pkl").is_file()
    capsys.readouterr()
    agent = str(first / "CartPole-v1.zip")
    second = train(tmp_path, "staleness:1", "clip_range:None", options=("-i", agent, "--save-replay-buffer"))
    assert "Loading replay buffer" in capsys.readouterr().out
    assert second.name == "CartPole-v1_2"
    before, after = PPOEWMA.load(first / "CartPole-v1.zip"), PPOEWMA.load(second / "CartPole-v1.zip")
    # Four rollouts of which the first waits, then four more without a gap; each has two minibatches.
    assert before._n_updates == 3
    assert after._n_updates == 3 + 4


def test_save_replay_buffer_without_staleness(tmp_path):
    first = train(tmp_path, options=("--save-replay-buffer",))
    train(tmp_path, options=("-i", str(first / "CartPole-v1.zip")))


@pytest.mark.parametrize(
    ("algo", "env"), [("ppo_ewma", "CartPole-v1"), ("ppo", "CartPole-v1"), ("ppo_lstm_ewma", "CartPoleNoVel-v1")]
)
@pytest.mark.parametrize("which", [[], ["--load-best"], ["--load-last-checkpoint"]], ids=["last", "best", "checkpoint"])
def test_enjoy(algo, env, which, logs, capsys):
    arguments = ["--algo", algo, "--env", env, "-f", str(logs), "-n", "600", "--no-render", *which]
    zoo.main(["enjoy", *arguments])
    assert "Mean reward:" in capsys.readouterr().out


def test_record_video(logs, tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    zoo.main(["record_video", "--algo", "ppo_ewma", "-f", str(logs), "-o", str(tmp_path / "videos"), "-n", "10"])
    assert (tmp_path / "videos" / "final-model-ppo_ewma-CartPole-v1-step-0-to-step-10.mp4").stat().st_size > 0


def test_record_training(logs, tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    # Its scripts run as child processes; one model is enough.
    run = tmp_path / "logs" / "ppo_ewma" / "CartPole-v1_1"
    shutil.copytree(logs / "ppo_ewma" / "CartPole-v1_1", run)
    for model in [*run.glob("rl_model_*"), run / "best_model.zip"]:
        model.unlink()
    zoo.main(["record_training", "--algo", "ppo_ewma", "-f", "logs", "-n", "10", "--gif"])
    assert (run / "videos" / "training.mp4").stat().st_size > 0
    assert (run / "videos" / "training.gif").stat().st_size > 0


def test_record_training_without_ffmpeg_keeps_old_videos(logs, tmp_path, monkeypatch):
    run = tmp_path / "logs" / "ppo_ewma" / "CartPole-v1_1"
    (run / "videos").mkdir(parents=True)
    (run / "videos" / "training.mp4").touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit, match="ffmpeg was not found: install it"):
        zoo.main(["record_training", "--algo", "ppo_ewma", "-f", "logs"])
    assert (run / "videos" / "training.mp4").exists()


def test_a_failing_ffmpeg_is_said(tmp_path):
    with child_processes.brought_home(), pytest.raises(OSError, match=r"ffmpeg failed .*missing\.mp4"):
        os.system("ffmpeg -loglevel quiet -i missing.mp4 out.mp4")
    assert os.system("exit 3") != 0  # others are not our business


def test_other_child_processes_are_left_alone():
    with child_processes.brought_home():
        assert subprocess.call(["sh", "-c", "exit 3"]) == 3


def test_plots(logs, tmp_path, capsys):
    pytest.importorskip("seaborn")
    zoo.main(["plot_train", "-a", "ppo_ewma", "-e", "CartPole", "-f", str(logs), "-w", "1"])
    algorithms = ["-a", "ppo_ewma", "ppo", "-e", "CartPole-v1", "-f", str(logs), "-l", "run"]
    zoo.main(["all_plots", *algorithms, "-o", "results", "--no-display", "--no-million"])
    assert "|CartPole-v1 |" in capsys.readouterr().out
    zoo.main(["plot_from_file", "-i", "results", "-l", "PPO-EWMA", "PPO", "-o", "figure.svg"])
    assert Path("figure.svg").stat().st_size > 0


def test_plot_from_file_of_single_runs(logs, tmp_path):
    pytest.importorskip("seaborn")
    shutil.copytree(logs / "ppo" / "CartPole-v1_1", tmp_path / "logs" / "ppo" / "CartPole-v1_1")
    zoo.main(["all_plots", "-a", "ppo", "-e", "CartPole-v1", "-f", "logs", "-o", "results", "--no-display"])
    with pytest.raises(SystemExit, match="two runs of every algorithm"):
        zoo.main(["plot_from_file", "-i", "results", "-o", "figure.svg"])


def test_benchmark(logs, tmp_path):
    # enjoy runs as a child process.
    shutil.copytree(logs / "ppo_ewma", tmp_path / "logs" / "ppo_ewma")
    arguments = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "--test-mode", "--num-threads", "1"]
    zoo.main(["benchmark", *arguments, "-n", "600"])
    table = Path("benchmark", "benchmark.md").read_text().splitlines()[-1]
    assert "|ppo_ewma|CartPole-v1|" in table.replace(" ", "")


def test_benchmark_without_agents():
    Path("logs").mkdir()
    with pytest.raises(SystemExit, match="none of the agents could be evaluated"):
        zoo.main(["benchmark", "--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_is_solved(seed, tmp_path):
    zoo.main(["train", "--algo", "ppo_ewma", "--seed", str(seed), "--eval-freq", "10000", "-f", str(tmp_path)])
    evaluations = np.load(tmp_path / "ppo_ewma" / "CartPole-v1_1" / "evaluations.npz")
    assert evaluations["timesteps"][-1] <= 1e5
    assert evaluations["results"].mean(axis=1).max() == 500
