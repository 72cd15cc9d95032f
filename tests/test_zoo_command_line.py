"""The command line: help, and one sentence for every mistake and everything missing."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import StoreDict

from sb3_ppo_ewma import ImpalaCNN, zoo
from sb3_ppo_ewma.zoo import command_line

pytestmark = pytest.mark.long

TRAIN = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1"]
PPG = ["train", "--algo", "ppg", "--env", "CartPole-v1"]
SCRIPTS = [
    "train",
    "enjoy",
    "export",
    "record_video",
    "record_training",
    "plot_train",
    "all_plots",
    "plot_from_file",
    "benchmark",
    "push_to_hub",
    "load_from_hub",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(command_line.TRACEBACK_VARIABLE, raising=False)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says before it exits with an error."""
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    assert refused.value.code not in (0, None)
    if isinstance(refused.value.code, str):  # Python prints it
        return refused.value.code
    return capsys.readouterr().err


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_refused_run_leaves_no_folder(capsys, tmp_path):
    assert "prox_decay must be" in refusal([*TRAIN, "-params", "prox_decay:1.5"], capsys)
    assert list((tmp_path / "logs" / "ppo_ewma").iterdir()) == []


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_all_scripts(option, capsys):
    with pytest.raises(SystemExit) as finished:
        zoo.main([option])
    assert finished.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in SCRIPTS] == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script_is_upstreams(script, capsys):
    with pytest.raises(SystemExit) as finished:
        zoo.main([script, "--help"])
    assert finished.value.code == 0
    out = capsys.readouterr().out
    if script in ("train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub"):
        assert {"ppo_ewma", "ppg_mask_lstm", "ppo_mask", "ppg_ewma", "sac"} <= set(re.findall(r"\w+", out))
    elif script == "export":
        assert {"ppo_ewma", "ppg_mask_lstm", "ppo_mask", "a2c"} <= set(re.findall(r"\w+", out))
    else:
        assert "usage:" in out


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--algo", "ppo_ewma"]], ids=["none", "unknown", "option"])
def test_without_a_known_script(arguments, capsys):
    message = refusal(arguments, capsys)
    assert "SCRIPT" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--algo", "ppo_emwa"], "invalid choice: 'ppo_emwa'"),
        (["train", "--algo", "ppo_ewma", "--env", "CartPol-v1"], "maybe meant CartPole-v1?"),
        (["train", "--algo", "ppo_ewma", "--env", "MinAtar/Pong-v1"], "--gym-packages"),
        ([*TRAIN, "--gym-packages", "no_such_package"], "No module named 'no_such_package'"),
        ([*TRAIN, "-conf", "missing.yml"], "missing.yml: No such file"),
        ([*TRAIN, "-i", "missing.zip"], "must be a valid path to a .zip file"),
        ([*TRAIN, "--trial-id", "0"], "--trial-id 0 needs --storage and --study-name"),
        ([*TRAIN, "--storage", "a.log", "--study-name", "s", "--trial-id", "0"], "a.log does not exist"),
        ([*TRAIN, "-params", "prox_decay=0.9"], "expected NAME:VALUE, got 'prox_decay=0.9'"),
        ([*TRAIN, "-params", "prox_decay:0..9"], "cannot read the value of 'prox_decay:0..9'"),
        ([*TRAIN, "-params", "prox_decay:1.5"], "prox_decay must be"),
        ([*TRAIN, "-params", "porx_decay:0.9"], "Did you mean 'prox_decay'?"),
        ([*TRAIN, "-params", "porx_decay:0.9", "-optimize"], "porx_decay"),
        (
            [*TRAIN, "-params", "clip_range:wide"],
            "clip_range must be a number, or lin_NUMBER for a schedule to 0, got 'wide'",
        ),
        ([*PPG, "-params", "aux_learning_rate:-1"], "aux_learning_rate must be"),
        ([*PPG, "-params", "aux_learning_rate:wide"], "aux_learning_rate must be a number, or lin_NUMBER"),
        ([*PPG, "-params", "aux_learning_rate:None"], "aux_learning_rate must be"),
        ([*PPG, "-params", "n_policy_iterations:0"], "n_policy_iterations must be"),
        ([*PPG, "-params", "policy_kwargs:dict(critic_arch='duel')"], "critic_arch must be one of 'dual'"),
        ([*PPG, "-params", "policy_kwargs:dict(features_extractor_class='SmalGridCNN')"], "SmallGridCNN, got 'SmalGri"),
        (["enjoy", "--algo", "ppo_ewma", "-f", "logs"], "logs/ppo_ewma folder was not found"),
        (["enjoy", "--algo", "ppo_ewma"], "no trained ppo_ewma agent for CartPole-v1 in rl-trained-agents"),
        (["export", *TRAIN[1:], "-o", "agent.onnx"], "logs/ppo_ewma folder was not found"),
        (["export", *TRAIN[1:], "-o", "agent.zip"], "must end in .onnx or .pt2, got agent.zip"),
        (["record_video", "--algo", "ppo_ewma", "-f", "logs"], "logs/ppo_ewma folder was not found"),
        (["record_training", "--algo", "ppo_ewma", "-f", "logs"], "logs/ppo_ewma folder was not found"),
        (["load_from_hub", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", "logs"], "TRUST_REMOTE_CODE"),
        (["push_to_hub", "--algo", "ppo_ewma"], "the following arguments are required"),
        (["benchmark", "--no-hub", "--log-dir", "logs"], "logs: No such file"),
        (["plot_train", "-a", "ppo_ewma", "-e", "CartPole-v1", "-f", "logs"], "logs/ppo_ewma: No such file"),
        (["all_plots"], "required: -a/--algos, -e/--env, -f/--exp-folders"),
        (["all_plots", "--algo", "ppo_ewma", "-e", "CartPole-v1"], "required: -f/--exp-folders"),
        (["plot_from_file"], "required: -i/--input"),
        (["plot_from_file", "-i", "missing"], "missing.pkl: No such file"),
    ],
    ids=lambda value: " ".join(value[:8]) if isinstance(value, list) else "",
)
def test_one_sentence_for_every_mistake(arguments, said, capsys):
    message = refusal(arguments, capsys)
    assert said in message
    assert "Traceback" not in message
    # argparse writes its usage first, then one line; we write one line.
    assert len(message[message.rindex("sb3-ppo-ewma ") :].strip().splitlines()) == 1


def test_an_environment_that_is_not_registered_when_its_agent_is_loaded(capsys):
    Path("logs/ppo_ewma/Gone-v1_1").mkdir(parents=True)
    Path("logs/ppo_ewma/Gone-v1_1/Gone-v1.zip").touch()
    message = refusal(["enjoy", "--algo", "ppo_ewma", "--env", "Gone-v1", "-f", "logs"], capsys)
    assert "Gone-v1 not found in gym registry" in message


@pytest.mark.parametrize(
    ("module", "arguments", "command"),
    [
        ("seaborn", ["all_plots", "-a", "ppo_ewma", "-e", "CartPole-v1", "-f", "logs"], "'sb3-ppo-ewma[plots]'"),
        ("requests", ["load_from_hub", "--help"], "'sb3-ppo-ewma[zoo]'"),
    ],
)
def test_a_missing_extra(module, arguments, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.exceptions", raising=False)
    message = refusal(arguments, capsys)
    assert f"the package {module} is not installed: pip install {command}" in message


def test_a_task_whose_package_is_missing(monkeypatch, capsys):
    def lacking(**kwargs):
        raise gym.error.DependencyNotInstalled("box is not installed, run `pip install box`")

    monkeypatch.setitem(gym.registry, "Lacking-v0", EnvSpec("Lacking-v0", entry_point=lacking))
    message = refusal(["train", "--algo", "ppo_ewma", "--env", "Lacking-v0"], capsys)
    assert message == "sb3-ppo-ewma train: box is not installed, run `pip install box`"


def test_without_rl_zoo3():
    block = "import sys; sys.modules['rl_zoo3'] = None; from sb3_ppo_ewma import zoo; "
    train = run_python(block + "zoo.main(['train'])")
    assert train.returncode == 1
    assert train.stderr.strip().endswith("the package rl_zoo3 is not installed: pip install 'sb3-ppo-ewma[zoo]'")
    assert "Traceback" not in train.stderr
    register = run_python(block + "zoo.register()")
    assert register.stderr.strip().endswith("ImportError: " + train.stderr.strip().partition(": ")[2])


def test_importing_the_zoo_module_imports_no_zoo():
    code = "import sys, sb3_ppo_ewma.zoo; print({'rl_zoo3', 'optuna', 'sb3_contrib', 'minatar'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_the_traceback_is_a_variable_away(monkeypatch):
    monkeypatch.setenv(command_line.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="not found in gym registry"):
        zoo.main(["train", "--algo", "ppo_ewma", "--env", "CartPol-v1"])


@pytest.mark.parametrize("error", [KeyError("bug"), ZeroDivisionError("bug"), AssertionError()])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("runpy.run_module", broken)
    with pytest.raises(type(error)):
        zoo.main(["train"])


def test_arguments_of_the_process_are_restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "train", "--help"])
    with pytest.raises(SystemExit) as finished:
        zoo.main()
    assert finished.value.code == 0
    assert sys.argv == ["program", "train", "--help"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("prox_decay:0.95", 0.95),
        ("prox_decay:auto", "auto"),
        ("prox_decay:'auto'", "auto"),
        ("prox_decay:None", None),
        ("clip_range:-1", -1),
        ("learning_rate:lin_3e-4", "lin_3e-4"),
        ("learning_rate:lin_.5", "lin_.5"),
        ("kl_estimator:analytic", "analytic"),
        ("policy:my.policies.MyPolicy", "my.policies.MyPolicy"),
        ("policy_kwargs:dict(net_arch=[8])", {"net_arch": [8]}),
        ("policy_kwargs:dict(features_extractor_class=ImpalaCNN)", {"features_extractor_class": ImpalaCNN}),
        ("url:'http://a:80/'", "http://a:80/"),
    ],
)
def test_values_on_the_command_line(text, value):
    zoo.register()
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    parsed = parser.parse_args(["-params", text, "gamma:0.5"]).params
    assert parsed == {text.partition(":")[0]: value, "gamma": 0.5}


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:dict(b=c)", "a:1/0", "a:1e-3x", "a:nn.NoSuchLayer"])
def test_values_that_cannot_be_read(text, capsys):
    zoo.register()
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    with pytest.raises(SystemExit):
        parser.parse_args(["-params", text])
    assert repr(text) in capsys.readouterr().err


def test_none_passes_the_schedules():
    zoo.register()
    given = {"clip_range": None, "clip_range_vf": None, "learning_rate": "lin_0.5", "gamma": None}
    schedules = ExperimentManager._preprocess_schedules(given)
    assert schedules["clip_range"] is schedules["clip_range_vf"] is schedules["gamma"] is None
    assert schedules["learning_rate"](0.5) == 0.25


def test_schedules_of_both_phases():
    zoo.register()
    given = {"learning_rate": "lin_0.5", "aux_learning_rate": "lin_0.25", "gamma": 0.9}
    schedules = ExperimentManager._preprocess_schedules(given)
    assert [schedules[name](0.5) for name in ("learning_rate", "aux_learning_rate")] == [0.25, 0.125]
    assert schedules["gamma"] == 0.9
    assert ExperimentManager._preprocess_schedules({"aux_learning_rate": 0.1})["aux_learning_rate"](0.5) == 0.1
