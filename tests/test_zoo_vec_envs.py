"""``--vec-env envpool`` in the zoo's scripts."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_ppo_ewma import EnvPoolVecEnv, zoo
from sb3_ppo_ewma.zoo import options
from tests.test_envpool_vec_env import needs_procgen

pytestmark = pytest.mark.long

pytest.importorskip("envpool")
zoo.register()

ATARI_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
SMALL = ["n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:1"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[EnvPoolVecEnv]:
    """All environments of EnvPool that are made."""
    found: list[EnvPoolVecEnv] = []
    init = EnvPoolVecEnv.__init__

    def noted(self: EnvPoolVecEnv, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(EnvPoolVecEnv, "__init__", noted)
    return found


def train(env: str, *params: str, arguments: tuple[str, ...] = ()) -> Path:
    command = ["train", "--algo", "ppo_ewma", "--env", env, "--vec-env", "envpool", "-f", "logs", "-n", "64"]
    command += ["--seed", "1", "--eval-freq", "64", "--eval-episodes", "1", "--device", "cpu", *arguments]
    zoo.main([*command, "-params", *SMALL, *params])
    assert options.current == options.Options()
    return sorted(Path("logs/ppo_ewma").glob(f"{env}_*"))[-1]


def option(env: EnvPoolVecEnv, name: str) -> Any:
    return env._pool_options.get(name)


def refusal(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    assert isinstance(refused.value.code, str)
    return refused.value.code


def test_training_and_evaluation_use_envpool(made: list[EnvPoolVecEnv]) -> None:
    run = train("Pendulum-v1", arguments=("--env-kwargs", "max_episode_steps:20", "--n-eval-envs", "3"))
    assert [env.task_id for env in made] == ["Pendulum-v1"] * 2
    assert sorted(env.num_envs for env in made) == [2, 3]
    assert [option(env, "max_episode_steps") for env in made] == [20, 20]
    # The learning curve, as plot_train reads it: 64 steps are two episodes of two environments that end, and a rest.
    results = load_results(str(run))
    assert list(results.l) == [20, 20]
    assert list(np.load(run / "evaluations.npz")["timesteps"]) == [64]
    assert yaml.unsafe_load((run / "Pendulum-v1" / "args.yml").read_text())["vec_env"] == "envpool"


def test_normalisation_is_on_top(made: list[EnvPoolVecEnv], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("Pendulum-v1", "normalize:True", arguments=("--env-kwargs", "max_episode_steps:20"))
    statistics = VecNormalize.load(str(run / "Pendulum-v1" / "vecnormalize.pkl"), made[0])
    assert statistics.obs_rms.count > 60  # type: ignore[union-attr]
    # enjoy takes what the training took, and these statistics.
    made.clear()
    zoo.main(["enjoy", "--algo", "ppo_ewma", "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "25"])
    assert len(made) == 1
    assert "Loading running average" in capsys.readouterr().out
    made.clear()
    arguments = ["--algo", "ppo_ewma", "--env", "Pendulum-v1", "-f", "logs", "--no-render", "-n", "25"]
    # Gymnasium's own, where max_episode_steps is no option of the environment but of gym.make
    zoo.main(["enjoy", *arguments, "--vec-env", "dummy"])
    assert not made
    assert options.current == options.Options()


@pytest.mark.parametrize("env", ["Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_atari_takes_the_zoos_settings(env: str, made: list[EnvPoolVecEnv], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ale_py")
    run = train(env, arguments=("--env-kwargs", "max_episode_steps:30"))
    out = capsys.readouterr().out
    config = yaml.unsafe_load((run / env / "config.yml").read_text())
    assert config["frame_stack"] == 4  # of the entry "atari"
    assert "Stacking" not in out  # a second time
    for each in made:
        assert each.task_id == "Breakout-v5"
        assert each.observation_space.shape == (4, 84, 84)
        assert option(each, "episodic_life") is True
        assert option(each, "reward_clip") is True
    made.clear()
    zoo.main(["enjoy", "--algo", "ppo_ewma", "--env", env, "-f", "logs", "--no-render", "-n", "40"])
    assert "Atari Episode Score" in capsys.readouterr().out
    assert made[0].observation_space.shape == (4, 84, 84)


def test_arguments_of_the_atari_wrapper_are_options(made: list[EnvPoolVecEnv]) -> None:
    arguments = {
        "noop_max": 5,
        "screen_size": 42,
        "clip_reward": False,
        "terminal_on_life_loss": False,
        "frame_skip": 2,
    }
    entry = {"n_timesteps": 64, "policy": "MlpPolicy", "env_wrapper": [{ATARI_WRAPPER: arguments}]}
    Path("my.yml").write_text(yaml.safe_dump({"Pong-v5": entry}))
    train("Pong-v5", arguments=("-conf", "my.yml", "--env-kwargs", "max_episode_steps:30"))
    names = ["noop_max", "img_height", "img_width", "reward_clip", "episodic_life", "frame_skip", "stack_num"]
    assert [option(made[0], name) for name in names] == [5, 42, 42, False, False, 2, 1]
    assert made[0].observation_space.shape == (1, 42, 42)


def test_a_misspelled_argument_of_the_atari_wrapper_is_refused() -> None:
    entry = {"n_timesteps": 64, "policy": "MlpPolicy", "env_wrapper": [{ATARI_WRAPPER: {"noop": 5}}]}
    Path("my.yml").write_text(yaml.safe_dump({"Pong-v5": entry}))
    command = [
        "train",
        "--algo",
        "ppo_ewma",
        "--env",
        "Pong-v5",
        "--vec-env",
        "envpool",
        "-f",
        "logs",
        "-conf",
        "my.yml",
    ]
    assert "AtariWrapper has noop_max, frame_skip, screen_size" in refusal(command)


def test_others_are_stacked_by_sb3(monkeypatch: pytest.MonkeyPatch, made: list[EnvPoolVecEnv]) -> None:
    shapes = []
    reset = VecFrameStack.reset
    monkeypatch.setattr(VecFrameStack, "reset", lambda self: shapes.append(self.observation_space.shape) or reset(self))
    train("CartPole-v1", "frame_stack:3")
    assert made[0].observation_space.shape == (4,)
    assert set(shapes) == {(12,)}


@pytest.mark.parametrize("n_jobs", ["1", "2"])
def test_a_search_uses_it(n_jobs: str, made: list[EnvPoolVecEnv]) -> None:
    command = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--vec-env", "envpool", "-n", "64", "-optimize"]
    command += ["--n-trials", "2", "--n-jobs", n_jobs, "--storage", "study.log", "--study-name", "s"]
    command += ["--n-evaluations", "1", "--seed", "0"]
    command += ["--fix", "n_steps_pow:5", "n_epochs:1", "--no-optim-plots", "--eval-episodes", "1", "--device", "cpu"]
    zoo.main(command)
    assert len(made) == 1 + 2 * 2
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    assert all(trial.value > 0 for trial in optuna.load_study(study_name="s", storage=storage).trials)


def test_information_of_episodes(made: list[EnvPoolVecEnv]) -> None:
    run = train("CartPole-v1", "monitor_kwargs:dict(info_keywords=('elapsed_step',))")
    results = load_results(str(run))
    assert (results.elapsed_step == results.l).all()
    command = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--vec-env", "envpool", "-f", "logs", "-n", "64"]
    message = refusal([*command, "-params", "monitor_kwargs:dict(allow_early_resets=False)"])
    assert "EnvPool's statistics know info_keywords, not allow_early_resets" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "Breakot-v5"], "Breakot-v5 not found in gym registry, you maybe meant Breakout-v5?"),
        (["--env", "MinAtar/Breakout-v1"], "EnvPool has no task 'MinAtar/Breakout-v1'. Similar: .*Breakout-v5"),
        (
            ["--env", "CartPole-v1", "-params", "env_wrapper:'gymnasium.wrappers.FlattenObservation'"],
            "env_wrapper gymnasium.wrappers.FlattenObservation cannot wrap EnvPool's environments.*--vec-env dummy",
        ),
        (["--env", "CartPole-v1", "--env-kwargs", "gravity:3"], "CartPole-v1 has no option 'gravity'"),
    ],
)
def test_what_envpool_has_not_is_refused(arguments: list[str], message: str) -> None:
    refused = refusal(["train", "--algo", "ppo_ewma", "--vec-env", "envpool", "-f", "logs", "-n", "64", *arguments])
    assert re.search(message, refused)
    assert "Traceback" not in refused
    assert not list(Path("logs").glob("*/*"))


def test_other_kinds_are_the_zoos(made: list[EnvPoolVecEnv], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", "logs", "-n", "64", "--eval-freq", "-1"]
    zoo.main([*command, "--vec-env", "subproc", "-params", *SMALL])
    assert not made
    saved = yaml.unsafe_load(Path("logs/ppo_ewma/CartPole-v1_1/CartPole-v1/args.yml").read_text())
    assert saved["vec_env"] == "subproc"
    with pytest.raises(SystemExit):
        zoo.main([*command, "--vec-env", "envpol"])
    assert "invalid choice: 'envpol'" in capsys.readouterr().err


@needs_procgen
@pytest.mark.parametrize("arguments", [["--vec-env", "envpool"], []], ids=["together", "one by one"])
def test_procgen(arguments: list[str], made: list[EnvPoolVecEnv]) -> None:
    command = ["train", "--algo", "ppo_ewma", "--env", "CoinrunEasy-v0", *arguments, "-f", "logs", "-n", "32"]
    command += ["--seed", "1", "--eval-freq", "32", "--eval-episodes", "1", "--device", "cpu"]
    command += ["--env-kwargs", "num_levels:5", "max_episode_steps:20"]
    entry = {"n_timesteps": 32, "policy": "MlpPolicy"}
    Path("my.yml").write_text(yaml.safe_dump({"CoinrunEasy-v0": entry}))
    zoo.main([*command, "-conf", "my.yml", "-params", *SMALL])
    assert [env.num_envs for env in made] == ([1, 2] if arguments else [1, 1, 1])
    assert all(option(env, "num_levels") == 5 for env in made)
    assert Path("logs/ppo_ewma/CoinrunEasy-v0_1/CoinrunEasy-v0.zip").exists()
    made.clear()
    watched = ["--algo", "ppo_ewma", "--env", "CoinrunEasy-v0", "-f", "logs", "-n", "8"]
    zoo.main(["enjoy", *watched, "--no-render"])
    zoo.main(["record_video", *watched, "-o", "videos"])
    assert len(made) == 2
    assert list(Path("videos").glob("*.mp4"))
