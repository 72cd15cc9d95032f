"""What rl-zoo3 and gymnasium know after ``register()``."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import rl_zoo3
from rl_zoo3 import exp_manager, hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib import MaskablePPO

from sb3_ppo_ewma import PPOEWMA, MaskableRecurrentPPGEWMA, zoo
from sb3_ppo_ewma.zoo import algorithms

pytestmark = pytest.mark.long


def test_register_changes_the_shared_dictionaries_once():
    zoo.register()
    assert exp_manager.ALGOS is rl_zoo3.ALGOS
    assert rl_zoo3.ALGOS["ppo_ewma"] is PPOEWMA
    assert rl_zoo3.ALGOS["ppg_mask_lstm_ewma"] is MaskableRecurrentPPGEWMA
    assert rl_zoo3.ALGOS["ppo_mask"] is MaskablePPO
    assert {"ppo", "ppo_lstm", "sac"} < set(rl_zoo3.ALGOS)
    ours = {*algorithms.ALGORITHMS, *algorithms.BASELINES}
    for dictionary in (rl_zoo3.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER):
        assert ours < set(dictionary)
    state = dict(rl_zoo3.ALGOS), dict(vars(ExperimentManager)), set(gym.registry)
    zoo.register()
    assert (dict(rl_zoo3.ALGOS), dict(vars(ExperimentManager)), set(gym.registry)) == state


def test_names_and_classes_follow_one_rule():
    # {ppo, ppg}[_mask][_lstm][_ewma]
    words = {"mask": "Maskable", "lstm": "Recurrent"}
    for name, cls in algorithms.ALGORITHMS.items():
        kind, *parts = name.split("_")
        prefix = "".join(word for part, word in words.items() if part in parts)
        assert cls.__name__ == prefix + kind.upper() + ("EWMA" if parts[-1:] == ["ewma"] else "")
    assert len(algorithms.ALGORITHMS) == 12


def test_register_keeps_what_the_user_put_in_its_place(monkeypatch):
    zoo.register()
    dictionaries = (rl_zoo3.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER)
    for dictionary in dictionaries:
        monkeypatch.setitem(dictionary, "ppo_ewma", "theirs")
    zoo.register()
    assert [dictionary["ppo_ewma"] for dictionary in dictionaries] == ["theirs"] * 3


def test_a_script_of_ones_own(tmp_path):
    # It holds what it needs of the zoo already when it registers.
    script = tmp_path / "my_train.py"
    script.write_text(
        "from rl_zoo3.exp_manager import ExperimentManager\n"
        "from rl_zoo3.train import train\n"
        "import sb3_ppo_ewma.zoo\n"
        "if __name__ == '__main__':\n"
        "    sb3_ppo_ewma.zoo.register()\n"
        "    train()\n"
    )
    arguments = ["--algo", "ppo_ewma", "--env", "CartPole-v1", "-n", "200", "--eval-freq", "100", "-params", "n_envs:2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_minatar_is_registered_as_by_its_own_function():
    minatar_gym = pytest.importorskip("minatar.gym")
    zoo.register()
    ours = {name: spec for name, spec in gym.registry.items() if name.startswith("MinAtar/")}
    assert len(ours) == 10
    for name in ours:
        del gym.registry[name]
    minatar_gym.register_envs()
    theirs = {name: spec for name, spec in gym.registry.items() if name.startswith("MinAtar/")}
    assert ours == theirs


def test_hyperparameters_of_the_installed_package_go_before_those_of_the_repository(tmp_path, monkeypatch):
    assert algorithms.hyperparameter_file("ppo_ewma").is_file()
    monkeypatch.setattr(algorithms, "__file__", str(tmp_path / "package" / "zoo" / "algorithms.py"))
    in_repository = tmp_path / "zoo_hyperparams" / "ppo_ewma.yml"
    installed = tmp_path / "package" / "zoo_hyperparams" / "ppo_ewma.yml"
    for file in (in_repository, installed):
        assert algorithms.hyperparameter_file("ppo_ewma") == in_repository
        file.parent.mkdir(parents=True)
        file.touch()
    assert algorithms.hyperparameter_file("ppo_ewma") == installed


@pytest.mark.parametrize("conf", [[], ["-conf"], ["--conf-file"]])
def test_the_users_own_hyperparameters_go_before_ours(conf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.yml").write_text("CartPole-v1:\n  n_timesteps: 64\n  policy: 'MlpPolicy'\n  n_steps: 64\n")
    arguments = ["--algo", "ppo_ewma", "-n", "64", "--eval-freq", "-1", *conf, *(["my.yml"] if conf else [])]
    zoo.main(["train", *arguments])
    expected = "my.yml" if conf else str(algorithms.hyperparameter_file("ppo_ewma"))
    assert f"Loading hyperparameters from: {expected}\n" in capsys.readouterr().out
