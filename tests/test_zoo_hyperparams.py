"""Every entry of zoo_hyperparams: it is there, it builds a model as it stands, and a small run of it trains."""

from argparse import Namespace
from math import ceil
from pathlib import Path

import gymnasium as gym
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, hyperparameter_file

zoo.register()
FILES = {algo: yaml.safe_load(hyperparameter_file(algo).read_text()) for algo in ALGORITHMS}
ZOO_PPO = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
# A task for the entries that are no task
TASKS = {"atari": "PongNoFrameskip-v4", "default": "CliffWalking-v1"}
ENTRIES = [pytest.param(algo, entry, id=f"{algo}-{entry}") for algo, entries in FILES.items() for entry in entries]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log to the current one


def require(env_id: str) -> None:
    """Skip the test where the packages of the task are missing."""
    if env_id not in gym.registry:
        pytest.skip(f"{env_id} is not registered")
    try:
        gym.make(env_id).close()
    except gym.error.DependencyNotInstalled as error:
        pytest.skip(str(error))


def test_the_tasks_that_are_promised():
    mujoco = {name for name, spec in gym.registry.items() if "gymnasium.envs.mujoco" in str(spec.entry_point)}
    games = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    assert set(FILES["ppo_ewma"]) == {
        *("default", "atari", "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"),
        *("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"),
        *(name for name in mujoco if name.endswith("-v5")),
        *(name for name in ZOO_PPO if name.startswith("MiniGrid-")),
        *(f"MinAtar/{game}-v{version}" for game in games for version in (0, 1)),
    }
    assert len([name for name in FILES["ppo_ewma"] if name.endswith("-v5")]) == 11


@pytest.mark.parametrize(("algo", "entry"), ENTRIES)
def test_entry_builds_its_model(algo, entry, tmp_path):
    env_id = TASKS.get(entry, entry)
    require(env_id)
    manager = ExperimentManager(Namespace(), algo, env_id, str(tmp_path), eval_freq=-1, verbose=0, device="cpu")
    model, _ = manager.setup_experiment()
    settings = FILES[algo][entry]
    assert manager.n_timesteps == settings["n_timesteps"]
    assert type(model) is ALGORITHMS[algo]
    assert model.n_envs == settings.get("n_envs", 1)
    # The center of mass of "auto" is the number of minibatches of an epoch.
    minibatches = ceil(model.n_envs * model.n_steps / model.batch_size)
    assert model.current_prox_decay == pytest.approx(1 - 1 / (1 + minibatches))
    for name in {"gamma", "gae_lambda", "n_epochs", "ent_coef", "vf_coef", "max_grad_norm"} & set(settings):
        assert getattr(model, name) == settings[name]
    model.get_env().close()


@pytest.mark.parametrize(("algo", "entry"), ENTRIES)
def test_entry_trains(algo, entry, tmp_path, capsys):
    env_id = TASKS.get(entry, entry)
    require(env_id)
    arguments = [
        "--algo",
        algo,
        "--env",
        env_id,
        "-f",
        str(tmp_path),
        "-n",
        "64",
        "--eval-freq",
        "-1",
        "--device",
        "cpu",
    ]
    zoo.main(["train", *arguments, "-params", "n_envs:2", "n_steps:16", "batch_size:8", "n_epochs:1"])
    assert "prox_center_of_mass" in capsys.readouterr().out
