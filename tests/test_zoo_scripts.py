"""The zoo's scripts for real, short: train, continue, watch, record, plot, benchmark."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rl_zoo3 import ALGOS

from sb3_ppo_ewma import PPG, PPOEWMA, ImpalaCNN, SmallGridCNN, zoo
from sb3_ppo_ewma.zoo import child_processes
from sb3_ppo_ewma.zoo.patches import script_patches

pytestmark = pytest.mark.long

# Small, on one environment, with an evaluation and a checkpoint every 64 steps
SHORT = ["-n", "128", "--eval-freq", "64", "--eval-episodes", "2", "--save-freq", "64", "--seed", "0"]
SMALL = ["n_envs:1", "n_steps:32", "batch_size:16", "n_epochs:1"]
# With phases of three of the four rollouts
PHASE = ("n_policy_iterations:3", "n_aux_epochs:2", "aux_batch_size:16")


def train(folder: Path, *params: str, algo: str = "ppo_ewma", env: str = "CartPole-v1", options: tuple[str, ...] = ()):
    arguments = ["--algo", algo, "--env", env, "-f", str(folder), *SHORT, *options]
    zoo.main(["train", *arguments, "-params", *SMALL, *params])
    runs = sorted((folder / algo).glob(f"{env}_*"))
    return runs[-1]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs of ppo_ewma, ppo and ppg each, one of ppo_lstm_ewma and ppg_ewma."""
    folder = tmp_path_factory.mktemp("logs")
    for _ in range(2):
        train(folder, "prox_decay:0.95", "kl_coef:1.0", options=("-P",))
        train(folder, algo="ppo")
        train(folder, *PHASE, algo="ppg", options=("-P",))
    train(folder, *PHASE, algo="ppg_ewma")
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


@pytest.mark.parametrize(("algo", "prox_decay"), [("ppg", None), ("ppg_ewma", "auto")])
def test_train_ppg(algo, prox_decay, logs):
    run = logs / algo / "CartPole-v1_1"
    config = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
    assert config["n_policy_iterations"] == 3
    assert config["aux_learning_rate"] == "lin_0.001"  # from zoo_hyperparams
    model = ALGOS[algo].load(run / "CartPole-v1.zip")
    assert (model.n_policy_iterations, model.n_aux_epochs, model.prox_decay) == (3, 2, prox_decay)
    assert model.aux_lr_schedule(0.5) == 0.0005
    # Two epochs of the only phase, each with six minibatches of its 96 samples
    steps = {float(state["step"]) for state in model.aux_optimizer.state_dict()["state"].values()}
    assert steps == {12.0}


def test_continue_as_ppo(logs, tmp_path):
    agent = str(logs / "ppo_ewma" / "CartPole-v1_1" / "CartPole-v1.zip")
    before = ALGOS["ppo"].load(agent)
    after = ALGOS["ppo"].load(train(tmp_path, algo="ppo", options=("-i", agent)) / "CartPole-v1.zip")
    # Four rollouts of one epoch, then four more
    assert (before._n_updates, after._n_updates) == (4, 8)


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


def continued(folder: Path, agent: Path) -> tuple[int, float]:
    """
    Continue a run of ppg for four rollouts.

    :return: rollouts of the phase it ends in, and steps of the auxiliary optimiser in all
    """
    run = train(folder, *PHASE, algo="ppg", options=("-i", str(agent), "--save-replay-buffer"))
    model = PPG.load(run / "CartPole-v1.zip")
    model.load_replay_buffer(run / "replay_buffer.pkl")
    assert model.replay_buffer is not None
    (buffer,) = model.replay_buffer.values()
    (steps,) = {float(state["step"]) for state in model.aux_optimizer.state_dict()["state"].values()}
    return len(buffer), steps


def test_continue_a_phase(tmp_path, capsys):
    first = train(tmp_path, *PHASE, algo="ppg", options=("--save-replay-buffer",))
    capsys.readouterr()
    # Four rollouts of which one belongs to the second phase, then four more without a gap: the second phase is complete
    # after two of them. Each phase has 12 gradient steps.
    assert continued(tmp_path, first / "CartPole-v1.zip") == (2, 24)
    assert "Loading replay buffer" in capsys.readouterr().out
    # A checkpoint does not fit the rollouts of the end of the run.
    with pytest.raises(SystemExit, match="belongs to num_timesteps=128 and 4 rollouts, the model is at 64 and 1"):
        continued(tmp_path, first / "rl_model_64_steps.zip")
    # Without them the phase starts anew: it is complete after three rollouts.
    (first / "replay_buffer.pkl").unlink()
    with pytest.warns(UserWarning, match="the phase starts anew"):
        assert continued(tmp_path, first / "CartPole-v1.zip") == (1, 24)


def test_continue_a_phase_from_a_checkpoint(tmp_path):
    callback = "stable_baselines3.common.callbacks.CheckpointCallback"
    arguments = "{save_freq: 64, save_path: checkpoints, save_replay_buffer: true}"
    # γ and λ are those of the entry that it goes on with.
    settings = "n_timesteps: 128, policy: MlpPolicy, gamma: 0.98, gae_lambda: 0.8"
    Path("my.yml").write_text(f"CartPole-v1: {{{settings}, callback: [{callback}: {arguments}]}}")
    train(tmp_path, *PHASE, algo="ppg", options=("-conf", "my.yml"))
    # Where the zoo looks for it
    shutil.copy("checkpoints/rl_model_replay_buffer_64_steps.pkl", "checkpoints/replay_buffer.pkl")
    # One rollout was trained on, the second one is lost. Four more: the first phase is complete after two of them.
    assert continued(tmp_path, Path("checkpoints/rl_model_64_steps.zip")) == (2, 12)


@pytest.mark.parametrize("algo", ["ppo", "dqn", "ppo_ewma", "ppg_ewma"])
@pytest.mark.parametrize("extractor", [ImpalaCNN, SmallGridCNN])
def test_features_extractors_by_name(algo, extractor, tmp_path):
    pytest.importorskip("minatar")
    network = f"'dict(features_extractor_class={extractor.__name__})'"
    Path("my.yml").write_text(f"MinAtar/Breakout-v1: {{n_timesteps: 32, policy: CnnPolicy, policy_kwargs: {network}}}")
    arguments = ["--algo", algo, "--env", "MinAtar/Breakout-v1", "-f", "logs", "-conf", "my.yml", "--eval-freq", "-1"]
    zoo.main(["train", *arguments, "-params", "learning_rate:0.1" if algo == "dqn" else "n_steps:32"])
    policy = ALGOS[algo].load(f"logs/{algo}/MinAtar-Breakout-v1_1/MinAtar-Breakout-v1.zip").policy
    assert isinstance((policy.q_net if algo == "dqn" else policy).features_extractor, extractor)


def test_save_replay_buffer_without_staleness(tmp_path):
    first = train(tmp_path, options=("--save-replay-buffer",))
    train(tmp_path, options=("-i", str(first / "CartPole-v1.zip")))


@pytest.mark.parametrize(
    ("algo", "env"),
    [
        *((algo, "CartPole-v1") for algo in ("ppo_ewma", "ppo", "ppg", "ppg_ewma")),
        ("ppo_lstm_ewma", "CartPoleNoVel-v1"),
    ],
)
@pytest.mark.parametrize("which", [[], ["--load-best"], ["--load-last-checkpoint"]], ids=["last", "best", "checkpoint"])
def test_enjoy(algo, env, which, logs, capsys):
    arguments = ["--algo", algo, "--env", env, "-f", str(logs), "-n", "600", "--no-render", *which]
    zoo.main(["enjoy", *arguments])
    assert "Mean reward:" in capsys.readouterr().out


@pytest.mark.parametrize("algo", ["ppo_ewma", "ppg"])
def test_record_video(algo, logs, tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    zoo.main(["record_video", "--algo", algo, "-f", str(logs), "-o", str(tmp_path / "videos"), "-n", "10"])
    assert (tmp_path / "videos" / f"final-model-{algo}-CartPole-v1-step-0-to-step-10.mp4").stat().st_size > 0


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


def test_a_failing_ffmpeg_raises_an_error(tmp_path):
    with script_patches(), pytest.raises(OSError, match=r"ffmpeg failed .*missing\.mp4"):
        os.system("ffmpeg -loglevel quiet -i missing.mp4 out.mp4")
    with script_patches():
        assert os.system("exit 3") != 0  # other commands behave as before


def test_other_child_processes_are_left_alone():
    with child_processes.redirect_child_scripts(), script_patches():
        assert subprocess.call(["sh", "-c", "exit 3"]) == 3


def test_plots(logs, tmp_path, capsys):
    pytest.importorskip("seaborn")
    for algo in ("ppo_ewma", "ppg"):
        zoo.main(["plot_train", "-a", algo, "-e", "CartPole", "-f", str(logs), "-w", "1"])
    algorithms = ["-a", "ppo_ewma", "ppo", "ppg", "-e", "CartPole-v1", "-f", str(logs), "-l", "run"]
    zoo.main(["all_plots", *algorithms, "-o", "results", "--no-display", "--no-million"])
    assert "|CartPole-v1 |" in capsys.readouterr().out
    zoo.main(["plot_from_file", "-i", "results", "-l", "PPO-EWMA", "PPO", "PPG", "-o", "figure.svg"])
    assert Path("figure.svg").stat().st_size > 0


def test_plot_from_file_of_single_runs(logs, tmp_path):
    pytest.importorskip("seaborn")
    shutil.copytree(logs / "ppo" / "CartPole-v1_1", tmp_path / "logs" / "ppo" / "CartPole-v1_1")
    zoo.main(["all_plots", "-a", "ppo", "-e", "CartPole-v1", "-f", "logs", "-o", "results", "--no-display"])
    with pytest.raises(SystemExit, match="two runs of every algorithm"):
        zoo.main(["plot_from_file", "-i", "results", "-o", "figure.svg"])


def test_benchmark(logs, tmp_path):
    # enjoy runs as a child process.
    for algo in ("ppo_ewma", "ppg"):
        shutil.copytree(logs / algo, tmp_path / "logs" / algo)
    arguments = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "--num-threads", "1"]
    zoo.main(["benchmark", *arguments, "-n", "600"])
    table = Path("benchmark", "benchmark.md").read_text().replace(" ", "")
    assert "|ppo_ewma|CartPole-v1|" in table
    assert "|ppg|CartPole-v1|" in table


def test_benchmark_without_agents():
    Path("logs").mkdir()
    with pytest.raises(SystemExit, match="none of the agents could be evaluated"):
        zoo.main(["benchmark", "--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algo", ["ppo_ewma", "ppg", "ppg_ewma"])
def test_cartpole_is_solved(algo, seed, tmp_path):
    zoo.main(["train", "--algo", algo, "--seed", str(seed), "--eval-freq", "10000", "-f", str(tmp_path)])
    evaluations = np.load(tmp_path / algo / "CartPole-v1_1" / "evaluations.npz")
    assert evaluations["timesteps"][-1] <= 1e5
    assert evaluations["results"].mean(axis=1).max() == 500
