"""The zoo's scripts do what was said: words on the command line, keys of a file, options, folders."""

import argparse
import os
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import StoreDict
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_ppo_ewma import PPOEWMA, SmallGridCNN, zoo
from sb3_ppo_ewma.zoo.patches import strict_yaml
from sb3_ppo_ewma.zoo.rescaling import as_yaml
from sb3_ppo_ewma.zoo.values import Parameter, check_value, parameters_of

pytestmark = pytest.mark.long

zoo.register()


class Wordy(gym.Env[np.ndarray, int]):
    """Observations far from 0, of a size that its arguments decide; raises errors on request."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array"], "render_fps": 30}
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self, is_slippery=True, size: int = 2, mode: str = "plain", fault: str = "", render_mode: str | None = None
    ) -> None:
        self.made.append({"is_slippery": is_slippery, "size": size, "mode": mode})
        self.fault, self.render_mode, self.size = fault, render_mode, size
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)  # type: ignore[assignment]  # numpy's integers

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.fault == "type":
            raise TypeError("a bug in step")
        if self.fault == "value":
            raise ValueError("a bug in step")
        if self.fault == "shape":
            return np.zeros(self.size + 1, np.float32), 0.0, False, False, {}
        return self._observation(), 100.0, False, False, {}

    def render(self) -> Any:
        return np.zeros((32, 32, 3), np.uint8)

    def _observation(self) -> np.ndarray:
        return self.np_random.normal(1000, 10, self.size).astype(np.float32)


gym.register("Wordy-v0", entry_point="tests.test_zoo_words:Wordy", max_episode_steps=8)


class Failing(BaseCallback):
    """A callback with a bug."""

    def _on_step(self) -> bool:
        raise ValueError("a bug in the callback")


class Extractor(FlattenExtractor):
    """A features extractor with a bug."""

    def forward(self, observations):
        raise RuntimeError("a bug in the network")


ENTRY = {"policy": "MlpPolicy", "n_timesteps": 32, "n_steps": 16, "batch_size": 8, "n_epochs": 1}
FILE = ["--env", "Wordy-v0", "-conf", "my.yml"]
RUN = ["--algo", "ppo_ewma", *FILE, "-f", "logs", "--device", "cpu", "--seed", "0"]
TRAIN = ["train", *RUN, "--eval-freq", "-1"]
ENJOY = ["enjoy", "--algo", "ppo_ewma", "--env", "Wordy-v0", "-f", "logs", "-n", "20", "--no-render"]
STUDY = ["--study-name", "study", "--storage", "study.log"]
SEARCH = [*TRAIN, "-optimize", "--no-optim-plots", "--n-evaluations", "1", "--eval-episodes", "1", *STUDY]
# Values of a trial that takes a moment
QUICK = ["--fix", "n_epochs:1", "batch_size_pow:4", "n_steps_pow:5", "net_arch:tiny", "learning_rate:1e-4"]
QUICK += ["one_minus_gamma:0.02", "--n-trials", "1"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Wordy.made.clear()
    write_entry()


def write_entry(**changes: Any) -> None:
    entry = {name: value for name, value in {**ENTRY, **changes}.items() if value != "absent"}
    Path("my.yml").write_text(yaml.dump({"Wordy-v0": entry}, Dumper=strict_yaml.Dumper))


def run_folder(number: int = 1, algo: str = "ppo_ewma") -> Path:
    return Path(f"logs/{algo}/Wordy-v0_{number}")


def saved(name: str, number: int = 1) -> dict[str, Any]:
    return dict(yaml.unsafe_load((run_folder(number) / "Wordy-v0" / f"{name}.yml").read_text()))


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    with pytest.raises(SystemExit) as refused:
        zoo.main(list(arguments))
    assert refused.value.code not in (0, None)
    if isinstance(refused.value.code, str):
        return refused.value.code
    assert capsys is not None
    return capsys.readouterr().err


def trials() -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend("study.log"))).trials


# === Words on the command line ===


def read(*pairs: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    return dict(parser.parse_args(["-params", *pairs]).params)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE", "yes", "on")),
        *((word, False) for word in ("false", "False", "FALSE", "no", "off")),
        *((word, None) for word in ("null", "Null", "none", "None", "~")),
        *(
            (word, word)
            for word in ("auto", "max", "type", "list", "os", "PPO", "lin_1e-3", "lin_0.1", "a-b", "max-pool")
        ),
        ("my_module.MyCallback", "my_module.MyCallback"),
        (".inf", float("inf")),
        ("-.inf", -float("inf")),
        ("'true'", "true"),
        ('"max"', "max"),
        ("1e-3", 0.001),
        ("-1", -1),
        ("[1,2]", [1, 2]),
        ("max(1,2)", 2),
        ("nn.ReLU", nn.ReLU),
        ("dict(net_arch=[8])", {"net_arch": [8]}),
    ],
)
def test_words_are_read_as_in_a_file(word, value):
    found = read(f"x:{word}")["x"]
    assert found == value
    assert type(found) is type(value)


def test_an_option_that_is_given_again_completes_the_first():
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    given = ["-params", "a:1", "b:2", "-params", "b:3", "c:4"]
    assert parser.parse_args(given).params == {"a": 1, "b": 3, "c": 4}


@pytest.mark.parametrize(("word", "value"), [("false", False), ("true", True), ("False", False)])
def test_a_switch_is_what_was_said(word, value):
    zoo.main([*TRAIN, "-params", f"normalize_advantage:{word}", "advantage_decay:null"])
    assert saved("config")["normalize_advantage"] is value
    assert PPOEWMA.load(run_folder() / "Wordy-v0.zip").normalize_advantage is value


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("use_sde:maybe", "-params: use_sde must be True or False, got 'maybe'"),
        ("use_sde:'false'", "-params: use_sde must be True or False, got 'false'"),
        ("n_steps:max", "-params: n_steps must be an integer, got 'max'"),
        ("n_steps:true", "-params: n_steps must be an integer, got True"),
        ("gamma:type", "-params: gamma must be a number, got 'type'"),
        ("prox_decay:off", "-params: prox_decay must be a number or 'auto' or None, got False"),
        ("prox_decay:atuo", "-params: prox_decay must be a number or 'auto' or None, got 'atuo'"),
        ("collect:list", "-params: collect must be 'together' or 'as_ready', got 'list'"),
        ("policy:yes", "-params: policy must be text"),
        (
            "learning_rate:cos_1e-3",
            "-params: learning_rate must be a number, or lin_NUMBER for a schedule to 0, got 'cos",
        ),
        ("n_envs:0", "-params: n_envs must be >= 1, got 0"),
        ("normalize:5", "-params: normalize must be True, False, or a mapping"),
        ("normalize:id", "-params: normalize must be True, False, or a mapping"),
    ],
)
def test_a_value_that_is_none_of_the_parameter_is_refused(pair, said):
    assert said in refusal(*TRAIN, "-params", pair)
    assert not run_folder().exists()


@pytest.mark.parametrize("option", ["--env-kwargs", "--eval-env-kwargs"])
def test_arguments_of_the_environment_are_what_was_said(option):
    frequency = ["--eval-freq", "16", "--eval-episodes", "1"]
    zoo.main(["train", *RUN, *frequency, option, "is_slippery:false", "mode:max"])
    evaluated, trained = Wordy.made  # the environment for evaluation is made first
    changed = {"is_slippery": False, "size": 2, "mode": "max"}
    assert evaluated == changed
    assert trained == (changed if option == "--env-kwargs" else {"is_slippery": True, "size": 2, "mode": "plain"})


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("is_slippery:maybe", "env_kwargs of Wordy-v0: is_slippery must be True or False, got 'maybe'"),
        ("size:len", "env_kwargs of Wordy-v0: size must be an integer, got 'len'"),
        ("size:true", "env_kwargs of Wordy-v0: size must be an integer, got True"),
        ("mode:off", "env_kwargs of Wordy-v0: mode must be text, got False"),
    ],
)
def test_arguments_that_the_environment_does_not_take_are_refused(pair, said):
    for option in ("--env-kwargs", "--eval-env-kwargs"):
        assert said in refusal(*TRAIN, option, pair)
    assert Wordy.made == []
    zoo.main(TRAIN)
    assert said in refusal(*ENJOY, "--env-kwargs", pair)
    name, _, word = pair.partition(":")
    write_entry(env_kwargs={name: yaml.safe_load(word)})
    assert said in refusal(*TRAIN)


class Base:
    def __init__(self, switch=False, anything=None, number=1, *, unknown: "Nowhere" = 0) -> None:  # noqa: F821
        pass


class PassesOn(Base):
    def __init__(self, own: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_what_is_not_known_of_a_parameter_is_not_refused():
    parameters = parameters_of(PassesOn)
    for name in ("anything", "number", "unknown"):
        check_value(name, "text", parameters[name])
    for name in ("anything", "number", "unknown", "switch", "own"):
        check_value(name, True, parameters[name])
    for name in ("own", "switch"):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 'text'"):
            check_value(name, "text", parameters[name])
    with pytest.raises(ValueError, match="must be 'a' or 1, got 'b'"):
        check_value("x", "b", Parameter(Literal["a", 1], 1))


# === env_kwargs of a file ===


def test_arguments_of_a_file_reach_every_environment():
    write_entry(env_kwargs={"size": 3, "mode": "file"})
    zoo.main(["train", *RUN, "--eval-freq", "16", "--eval-episodes", "1", "--env-kwargs", "is_slippery:false"])
    complete = {"is_slippery": False, "size": 3, "mode": "file"}
    assert Wordy.made == [complete] * 2
    assert saved("config")["env_kwargs"] == {"size": 3, "mode": "file", "is_slippery": False}
    Wordy.made.clear()
    zoo.main(ENJOY)
    zoo.main([*ENJOY, "--env-kwargs", "mode:shown"])
    assert Wordy.made == [complete, {**complete, "mode": "shown"}]


def test_arguments_for_evaluation_complete_those_of_the_file():
    write_entry(env_kwargs={"size": 3, "mode": "file"})
    zoo.main(["train", *RUN, "--eval-freq", "16", "--eval-episodes", "1", "--eval-env-kwargs", "mode:evaluated"])
    assert [made["mode"] for made in Wordy.made] == ["evaluated", "file"]
    assert {made["size"] for made in Wordy.made} == {3}


def test_arguments_of_a_file_reach_a_search():
    write_entry(env_kwargs={"size": 3})
    zoo.main([*SEARCH, *QUICK])
    assert [trial.state for trial in trials()] == [TrialState.COMPLETE]
    assert {made["size"] for made in Wordy.made} == {3}
    assert len(Wordy.made) == 3  # to look at the spaces, to train, to evaluate


@pytest.mark.parametrize("has_patch", [True, False], ids=["agent", "agent of upstream"])
def test_arguments_of_a_file_reach_a_video(has_patch):
    pytest.importorskip("moviepy")
    write_entry(env_kwargs={"size": 3})
    zoo.main(TRAIN)
    if not has_patch:
        arguments = run_folder() / "Wordy-v0" / "args.yml"
        arguments.write_text(yaml.dump({**saved("args"), "env_kwargs": None}))
    Wordy.made.clear()
    zoo.main(["record_video", "--algo", "ppo_ewma", "--env", "Wordy-v0", "-f", "logs", "-o", "videos", "-n", "5"])
    assert {made["size"] for made in Wordy.made} == {3}


# === Statistics of VecNormalize ===


def train_normalized(*options: str, **changes: Any) -> Path:
    write_entry(normalize=True, **changes)
    zoo.main([*TRAIN, "--save-freq", "16", *options])
    write_entry()
    return run_folder()


def statistics(file: Path) -> VecNormalize:
    return VecNormalize.load(str(file), DummyVecEnv([lambda: gym.make("Wordy-v0")]))


def test_statistics_of_an_agent_are_kept(capsys):
    before = statistics(train_normalized() / "Wordy-v0" / "vecnormalize.pkl")
    zoo.main([*TRAIN, "-i", "logs/ppo_ewma/Wordy-v0_1/Wordy-v0.zip"])
    assert "normalize=True, as in the statistics of the agent" in capsys.readouterr().out
    after = statistics(run_folder(2) / "Wordy-v0" / "vecnormalize.pkl")
    assert after.obs_rms.count == pytest.approx(2 * before.obs_rms.count, rel=0.1)
    assert saved("config", 2)["normalize"] is True
    capsys.readouterr()
    zoo.main(ENJOY)
    assert "Loading running average" in capsys.readouterr().out


def test_settings_of_the_statistics_are_kept():
    write_entry(normalize="dict(norm_reward=False)")
    zoo.main(TRAIN)
    write_entry()
    zoo.main([*TRAIN, "-i", "logs/ppo_ewma/Wordy-v0_1/Wordy-v0.zip"])
    assert saved("config", 2)["normalize"] == {"norm_obs": True, "norm_reward": False}
    assert not statistics(run_folder(2) / "Wordy-v0" / "vecnormalize.pkl").norm_reward


def test_settings_of_the_entry_act_on_the_statistics():
    train_normalized()
    agent = "logs/ppo_ewma/Wordy-v0_1/Wordy-v0.zip"
    zoo.main([*TRAIN, "-i", agent, "-params", "normalize:dict(norm_reward=False)", "gamma:0.5"])
    after = statistics(run_folder(2) / "Wordy-v0" / "vecnormalize.pkl")
    assert (after.norm_obs, after.norm_reward, after.gamma) == (True, False, 0.5)
    said = refusal(*TRAIN, "-i", agent, "-params", "normalize:dict(norm_obs=False)")
    assert "norm_obs=False does not fit the agent, trained with True" in said
    assert "no argument 'norm'" in refusal(*TRAIN, "-i", agent, "-params", "normalize:dict(norm=False)")
    assert not run_folder(3).exists()


def test_an_agent_is_not_continued_without_its_statistics():
    run = train_normalized()
    agent = f"{run}/Wordy-v0.zip"
    said = refusal(*TRAIN, "-i", agent, "-params", "normalize:false")
    assert "normalize=False does not fit" in said
    assert "vecnormalize.pkl" in said
    (run / "Wordy-v0" / "vecnormalize.pkl").unlink()
    said = refusal(*TRAIN, "-i", agent, "-params", "normalize:true")
    assert f"there is no {run}/Wordy-v0/vecnormalize.pkl" in said
    assert "-params normalize:False" in said
    assert not run_folder(2).exists()


def test_a_checkpoint_has_its_statistics(capsys):
    run = train_normalized()
    checkpoints = {each.name for each in run.glob("rl_model_*")}
    assert checkpoints == {
        f"rl_model_{name}_steps.{suffix}"
        for steps in (16, 32)
        for name, suffix in ((f"{steps}", "zip"), (f"vecnormalize_{steps}", "pkl"))
    }
    for steps in (16, 32):  # and those of the first observation
        assert statistics(run / f"rl_model_vecnormalize_{steps}_steps.pkl").obs_rms.count == pytest.approx(
            steps + 1, abs=1
        )
    capsys.readouterr()
    zoo.main([*TRAIN, "-i", f"{run}/rl_model_16_steps.zip"])
    assert "rl_model_vecnormalize_16_steps.pkl" in capsys.readouterr().out
    # 16 steps before and 32 now
    count = statistics(run_folder(2) / "Wordy-v0" / "vecnormalize.pkl").obs_rms.count
    assert count == pytest.approx(16 + 32 + 2, abs=2)


def test_a_checkpoint_without_statistics_is_named():
    run = train_normalized()
    (run / "rl_model_vecnormalize_16_steps.pkl").unlink()
    with pytest.warns(UserWarning, match=r"rl_model_16_steps\.zip has no statistics of its own"):
        zoo.main([*TRAIN, "-i", f"{run}/rl_model_16_steps.zip"])
    (run / "Wordy-v0" / "vecnormalize.pkl").unlink()
    said = refusal(*TRAIN, "-i", f"{run}/rl_model_16_steps.zip", "-params", "normalize:true")
    assert f"there is no {run}/rl_model_vecnormalize_16_steps.pkl" in said


@pytest.fixture
def shown(monkeypatch) -> list[float]:
    """Numbers of observations in the statistics that are loaded."""
    counts: list[float] = []
    load = VecNormalize.load

    def loaded(path: str, venv: Any) -> VecNormalize:
        normalized = load(path, venv)
        counts.append(normalized.obs_rms.count)
        return normalized

    monkeypatch.setattr(VecNormalize, "load", staticmethod(loaded))
    return counts


def test_enjoy_shows_a_checkpoint_with_its_statistics(shown):
    run = train_normalized()
    zoo.main([*ENJOY, "--load-checkpoint", "16"])
    zoo.main(ENJOY)
    assert shown == pytest.approx([17, 33], abs=1)
    (run / "rl_model_vecnormalize_16_steps.pkl").unlink()
    with pytest.warns(UserWarning, match="may be of another step"):
        zoo.main([*ENJOY, "--load-checkpoint", "16"])


def test_the_best_model_keeps_its_statistics(shown):
    # All evaluations are the same: the first one, after 16 steps, is the best.
    run = train_normalized("--eval-freq", "16", "--eval-episodes", "1")
    zoo.main([*ENJOY, "--load-best"])
    zoo.main([*TRAIN, "-i", f"{run}/best_model.zip"])
    assert shown == pytest.approx([17, 17], abs=1)
    (run / "best_model_vecnormalize.pkl").unlink()
    with pytest.warns(UserWarning, match="may be of another step"):
        zoo.main([*ENJOY, "--load-best", "--exp-id", "1"])


def test_an_agent_is_written_after_its_statistics(monkeypatch):
    """A run that is killed while it writes a checkpoint leaves none, or one with statistics."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(VecNormalize, "save", fail)
    with pytest.raises(SystemExit, match="no space left"):
        train_normalized()
    assert not list(run_folder().glob("rl_model_*"))


def test_statistics_of_the_current_folder_are_not_used(monkeypatch):
    train_normalized()
    monkeypatch.chdir(run_folder())
    write_entry(normalize=True)
    zoo.main(TRAIN)
    assert statistics(run_folder() / "Wordy-v0" / "vecnormalize.pkl").obs_rms.count == pytest.approx(33, abs=1)


# === Searches ===


def test_a_search_leaves_no_run():
    zoo.main(TRAIN)
    zoo.main([*SEARCH, *QUICK])
    assert [each.name for each in Path("logs/ppo_ewma").iterdir() if each.is_dir()] == ["Wordy-v0_1"]
    zoo.main(ENJOY)


@pytest.mark.parametrize("fault", ["type", "value", "shape"])
def test_a_bug_of_the_environment_ends_a_search(fault):
    with pytest.raises(RuntimeError, match="trial 0 failed, not because of its hyper-parameters") as failed:
        zoo.main([*SEARCH, *QUICK, "--n-trials", "3", "--env-kwargs", f"fault:{fault}"])
    assert failed.value.__cause__ is not None
    frames = traceback.extract_tb(failed.value.__cause__.__traceback__)
    assert frames[-1].name == ("step" if fault != "shape" else "_save_obs")
    assert [trial.state for trial in trials()] == [TrialState.FAIL]


@pytest.mark.parametrize(
    "params",
    [
        "callback:tests.test_zoo_words.Failing",
        "policy_kwargs:dict(features_extractor_class=__import__('tests.test_zoo_words').test_zoo_words.Extractor)",
    ],
)
def test_a_bug_of_the_users_code_ends_a_search(params):
    with pytest.raises(RuntimeError, match=r"failed, not because of its hyper-parameters: .*a bug in"):
        zoo.main([*SEARCH, *QUICK, "--n-trials", "3", "-params", params])
    assert [trial.state for trial in trials()] == [TrialState.FAIL]


def test_what_the_constructor_refuses_is_a_bad_trial(monkeypatch, capsys):
    good = HYPERPARAMS_SAMPLER["ppo_ewma"]
    bad = [{"prox_decay": 2.0}, {"n_steps": "many"}, {"learning_rate": 1e38}, {}]
    monkeypatch.setitem(
        HYPERPARAMS_SAMPLER, "ppo_ewma", lambda trial, *args: {**good(trial, *args), **bad[trial.number]}
    )
    zoo.main([*SEARCH, *QUICK, "--n-trials", "4"])
    assert [trial.state for trial in trials()] == [TrialState.PRUNED] * 3 + [TrialState.COMPLETE]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--storage", "study.log", "--study-name", "study"], "--storage and --study-name needs --trial-id"),
        (["--storage", "study.log"], "without -optimize, which searches, --storage needs --trial-id"),
        (["--study-name", "study"], "--study-name needs --trial-id"),
        (["-optimize", "-i", "logs/ppo_ewma/Wordy-v0_1/Wordy-v0.zip"], "-optimize searches with new agents, -i"),
        (["--fix", "n_epochs:1"], "--fix keeps parameters of a search at a value, and needs -optimize"),
    ],
)
def test_options_without_effect_are_refused(options, said):
    zoo.main(TRAIN)
    assert said in refusal(*TRAIN, *options)
    assert not run_folder(2).exists()


def test_none_is_a_choice_of_some_parameters():
    lstm = [each if each != "ppo_ewma" else "ppo_lstm_ewma" for each in SEARCH]
    write_entry(policy="MlpLstmPolicy")
    zoo.main([*lstm, *QUICK[:-2], "critic_lstm:none", "lstm_hidden_size:16", "--n-trials", "1"])
    assert trials()[0].params["critic_lstm"] == "none"


def test_a_search_keeps_the_policy_kwargs_of_the_task():
    write_entry(policy_kwargs="dict(ortho_init=False, net_arch=[8])")
    for algo in ("ppo_ewma", "ppo"):
        command = [each if each != "ppo_ewma" else algo for each in SEARCH]
        command[command.index("study.log")] = f"{algo}.log"
        fixed = [each for each in QUICK if algo == "ppo_ewma" or not each.startswith("prox")]
        zoo.main([*command, *fixed])
        again = [each if each != "ppo_ewma" else algo for each in TRAIN]
        zoo.main([*again, "--study-name", "study", "--storage", f"{algo}.log", "--trial-id", "0"])
        policy = ALGOS[algo].load(run_folder(1, algo) / "Wordy-v0.zip").policy
        assert policy.ortho_init is False
        assert policy.net_arch == {"pi": [64], "vf": [64]}  # of the trial


def test_a_trial_has_its_own_normalization(monkeypatch):
    gammas = []
    original = VecNormalize.__init__

    def initialize(self: VecNormalize, *args: Any, **kwargs: Any) -> None:
        gammas.append(kwargs.get("gamma"))
        original(self, *args, **kwargs)

    monkeypatch.setattr(VecNormalize, "__init__", initialize)
    write_entry(gamma=0.5)
    zoo.main([*SEARCH, *QUICK, "-params", "normalize:dict(norm_obs=False)"])
    assert gammas[1:] == pytest.approx([0.98, 0.98])  # after that of the environment whose spaces are looked at
    gammas.clear()
    zoo.main([*TRAIN, *STUDY, "--trial-id", "0"])
    assert gammas == pytest.approx([0.98])
    assert saved("config")["normalize"] == {"norm_obs": False, "gamma": pytest.approx(0.98)}
    zoo.main([*TRAIN, *STUDY, "--trial-id", "0", "-params", "normalize:false"])
    assert saved("config", 2)["normalize"] is False


# === Files of hyper-parameters ===


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "my.yml is empty"),
        ("# nothing", "my.yml is empty"),
        ("[1, 2]", "my.yml must map names of environments to their hyper-parameters, got [1, 2]"),
        ("Wordy-v0:", "my.yml: the entry Wordy-v0 must map names of hyper-parameters to values, got None"),
        ("default: 5", "my.yml: the entry default must map"),
        ("Wordy-v0: {gamma: 0.9,\n gamma: 0.99}", "my.yml: the entry Wordy-v0 gives gamma twice (lines 1 and 2)"),
        ("Wordy-v0: {env_kwargs: {size: 2, size: 3}}", "the entry Wordy-v0 gives env_kwargs.size twice"),
        ("Wordy-v0: {}\nWordy-v0: {}", "my.yml: Wordy-v0 twice (lines 1 and 2)"),
    ],
)
def test_a_file_that_is_none(text, said):
    Path("my.yml").write_text(text)
    assert said in refusal(*TRAIN)
    assert not run_folder().exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "learning_rate",
            "exp_0.1",
            "learning_rate must be a number, or lin_NUMBER for a schedule to 0, got 'exp_0.1'",
        ),
        ("learning_rate", "cos_1e-3", "learning_rate must be a number, or lin_NUMBER"),
        ("learning_rate", "lin_fast", "learning_rate must be a number, or lin_NUMBER"),
        ("learning_rate", "lin_-1", "learning_rate must be a number, or lin_NUMBER"),
        ("learning_rate", "lin_nan", "learning_rate must be a number, or lin_NUMBER"),
        ("learning_rate", True, "learning_rate must be a number, or lin_NUMBER for a schedule to 0, got True"),
        ("learning_rate", [1e-3], "learning_rate must be a number, or lin_NUMBER"),
        ("clip_range", "exp_0.1", "clip_range must be a number, or lin_NUMBER"),
        ("normalize", 5, "normalize must be True, False, or a mapping of VecNormalize's arguments, got 5"),
        ("normalize", "false", "normalize must be True, False, or a mapping of VecNormalize's arguments, got 'false'"),
        ("n_timesteps", 0, "n_timesteps must be a number of steps, at least 1, got 0"),
        ("n_timesteps", True, "n_timesteps must be a number of steps, at least 1, got True"),
        ("n_timesteps", "many", "n_timesteps must be a number of steps, at least 1, got 'many'"),
        ("n_timesteps", "absent", "n_timesteps is missing: add it, or give the number of steps with -n"),
        ("n_envs", 0, "n_envs must be >= 1, got 0"),
        ("n_envs", "four", "n_envs must be an integer >= 1, got 'four'"),
        ("frame_stack", 0, "frame_stack must be >= 1, got 0"),
        ("use_sde", "false", "use_sde must be True or False, got 'false'"),
        ("policy_kwargs", [64], "policy_kwargs must be a mapping of names to values, got [64]"),
        ("env_kwargs", "dict(size=3)", "env_kwargs must be a mapping of names to values, got 'dict(size=3)'"),
    ],
)
@pytest.mark.parametrize("algo", ["ppo_ewma", "ppo"])
def test_a_value_of_a_file_is_refused_with_its_place(name, value, said, algo):
    write_entry(**{name: value})
    command = [each if each != "ppo_ewma" else algo for each in TRAIN]
    message = refusal(*command)
    assert said in message
    assert "my.yml" in message
    assert "Wordy-v0" in message or name == "env_kwargs"
    assert not run_folder(1, algo).exists()


def test_an_entry_without_a_number_of_steps_trains_for_the_given_one():
    write_entry(n_timesteps=0)
    assert "n_timesteps must be" in refusal(*TRAIN, "-n", "16")
    write_entry(n_timesteps="absent")
    zoo.main([*TRAIN, "-n", "16"])
    assert PPOEWMA.load(run_folder() / "Wordy-v0.zip").num_timesteps == 16


def test_numbers_with_an_exponent_are_numbers():
    Path("my.yml").write_text(
        "Wordy-v0: {policy: MlpPolicy, n_timesteps: 1e2, n_steps: 32, batch_size: 8, learning_rate: 1e-3,\n"
        "  ent_coef: 1.5E3,  policy_kwargs: {optimizer_kwargs: {eps: 2e-6}}, clip_range: lin_1e-1}"
    )
    zoo.main([*TRAIN, "-n", "32"])
    model = PPOEWMA.load(run_folder() / "Wordy-v0.zip")
    assert (model.lr_schedule(1.0), model.ent_coef, model.clip_range(0.5)) == (0.001, 1500.0, 0.05)
    assert model.policy.optimizer.param_groups[0]["eps"] == 2e-6
    assert strict_yaml.load("{text: '1e-3', negative: -1E+2, word: e5, hash: 1e, dots: .5e1}") == {
        "text": "1e-3", "negative": -100.0, "word": "e5", "hash": "1e", "dots": 5.0,
    }  # fmt: skip


def test_merged_keys_and_anchors_are_no_duplicates():
    text = "base: &base {a: 1, b: {c: 2}}\nx: {<<: *base, a: 3}\ny: {<<: *base, a: 4}\nz: *base"
    assert strict_yaml.load(text) == yaml.safe_load(text)


def test_every_file_of_the_zoo_can_still_be_read(tmp_path):
    folder = Path(rl_zoo3.__file__).parent / "hyperparams"
    files = sorted(folder.glob("*.yml"))
    assert files
    for file in files:
        if file.stem not in ALGOS:
            continue
        for env_id in yaml.safe_load(file.read_text()):
            if env_id in gym.registry:
                manager = ExperimentManager(Namespace(), file.stem, env_id, str(tmp_path), verbose=0)
                manager.read_hyperparameters()


# === What rescale prints ===


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env_kwargs", {"size": 3, "mode": "1e-3", "x": float("inf")}),
        ("env_wrapper", [{"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 4}}]),
        ("env_wrapper", {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 4}}),
        ("callback", ["sb3_ppo_ewma.AdviceCallback", {"sb3_ppo_ewma.NoiseScaleCallback": {"n_batches": 2}}]),
        ("normalize", {"norm_obs": True, "norm_reward": False}),
        ("normalize", "dict(norm_reward=False)"),
        ("monitor_kwargs", {"info_keywords": ["x"]}),
        ("policy_kwargs", {"net_arch": [8], "optimizer_kwargs": {"eps": 1e-7}}),
        ("learning_rate", 1e-7),
        ("prox_decay", "auto"),
        ("clip_range", None),
    ],
)
def test_rescale_prints_what_can_be_read_back(name, value, capsys):
    write_entry(**{name: value})
    zoo.main(["rescale", "--algo", "ppo_ewma", *FILE, "--n-envs", "2"])
    printed = capsys.readouterr().out.partition("\n\n")[2]
    assert strict_yaml.load(printed)["Wordy-v0"][name] == value


@pytest.mark.parametrize(
    ("value", "evaluated"),
    [
        (
            {"activation_fn": nn.Tanh, "net_arch": {"pi": [8], "vf": []}},
            "dict(activation_fn=nn.Tanh, net_arch=dict(pi=[8], vf=[]))",
        ),
        ({"features_extractor_class": SmallGridCNN}, "dict(features_extractor_class=SmallGridCNN)"),
        ({"a-b": (1,), "x": float("nan")}, "{'a-b': (1,), 'x': float('nan')}"),
    ],
)
def test_classes_and_tuples_are_printed_as_python(value, evaluated):
    assert strict_yaml.load(as_yaml("X", {"policy_kwargs": value}))["X"]["policy_kwargs"] == evaluated


def test_classes_are_printed_by_their_names():
    entry = {
        "env_wrapper": [{gym.wrappers.TimeAwareObservation: {"normalize_time": np.bool_(True)}}],
        "callback": Failing,
    }
    assert strict_yaml.load(as_yaml("X", entry))["X"] == {
        "env_wrapper": [{"gymnasium.wrappers.stateful_observation.TimeAwareObservation": {"normalize_time": True}}],
        "callback": "tests.test_zoo_words.Failing",
    }


def test_what_cannot_be_printed_is_refused():
    for name, value in (("callback", Failing()), ("learning_rate", abs), ("policy_kwargs", {"x": object()})):
        with pytest.raises(ValueError, match=f"{name} cannot be written to a file of hyper-parameters"):
            as_yaml("X", {name: value})


# === Run folders ===


def new_manager(**arguments: Any) -> ExperimentManager:
    given = {"config": "my.yml", "eval_freq": -1, "verbose": 0, "device": "cpu", "seed": 0}
    return ExperimentManager(Namespace(), "ppo_ewma", "Wordy-v0", "logs", **(given | arguments))


def test_trainings_that_start_at_once_have_a_folder_each():
    managers = [new_manager() for _ in range(3)]
    assert len({manager.save_path for manager in managers}) == 1
    for manager in managers:
        model, _ = manager.setup_experiment()
        manager.save_trained_model(model)
    assert [manager.save_path for manager in managers] == [str(run_folder(number)) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        assert {each.name for each in run_folder(number).iterdir()} == {"Wordy-v0", "Wordy-v0.zip", "0.monitor.csv"}
        assert (run_folder(number) / "Wordy-v0" / "config.yml").is_file()


@pytest.mark.parametrize("refused", [{"prox_decay": 2.0}, {"n_envs": 0}], ids=["with a folder", "without"])
def test_a_run_that_is_refused_removes_only_its_own_folder(refused):
    bad, good = new_manager(hyperparams=refused), new_manager()
    assert bad.save_path == good.save_path
    good.setup_experiment()
    with pytest.raises(ValueError, match=next(iter(refused))):
        bad.setup_experiment()
    assert [each.name for each in Path("logs/ppo_ewma").iterdir()] == ["Wordy-v0_1"]


def test_processes_that_start_at_once_have_a_folder_each():
    # Each waits for the others before it creates its folder.
    script = """
import pathlib, sys, time
from argparse import Namespace
import tests.test_zoo_words
from rl_zoo3.exp_manager import ExperimentManager
manager = ExperimentManager(Namespace(), "ppo_ewma", "Wordy-v0", "logs", config="my.yml", eval_freq=-1, device="cpu")
pathlib.Path(f"ready_{sys.argv[1]}").touch()
while len(list(pathlib.Path().glob("ready_*"))) < 3:
    time.sleep(0.01)
manager.setup_experiment()
print(manager.save_path)
"""
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    found = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert found == {str(run_folder(number)) for number in (1, 2, 3)}
