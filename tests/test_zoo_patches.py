"""
Every module of ``sb3_ppo_ewma.zoo.patches`` repairs a defect of the installed libraries. When a ``test_defect_NAME``
fails, upstream works: remove the patch of that name and the test.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import huggingface_hub
import huggingface_sb3
import numpy as np
import optuna
import pytest
import rl_zoo3.utils
import torch as th
import yaml
from huggingface_hub.errors import EntryNotFoundError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import ALGOS, exp_manager
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import StoreDict
from sb3_contrib.common.wrappers import action_masker
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.zoo import patches
from sb3_ppo_ewma.zoo.patches import _replace, child_commands
from tests import masked_envs  # noqa: F401  # registers environments

pytestmark = pytest.mark.long

zoo.register()
push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
# A trial of the zoo's search space for PPO
TRIAL = {
    "batch_size_pow": 4,
    "n_steps_pow": 5,
    "one_minus_gamma": 0.02,
    "one_minus_gae_lambda": 0.05,
    "learning_rate": 3e-4,
    "ent_coef": 0.01,
    "clip_range": 0.1,
    "n_epochs": 1,
    "max_grad_norm": 0.5,
    "net_arch": "tiny",
    "activation_fn": "relu",
}


def works(patch: str) -> str:
    return f"upstream works now: remove patches/{patch}.py"


def raised_by(function: Callable[[], Any]) -> type[BaseException]:
    """:return: class of the exception, ``type(None)`` if there was none"""
    try:
        function()
    except Exception as error:
        return type(error)
    return type(None)  # type: ignore[return-value]


def original(function: Any) -> Any:
    """:return: the function without our replacements"""
    while inspect.isfunction(function) and function.__code__.co_filename == _replace.__file__:
        function = function.__wrapped__
    return function


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries as installed, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    libraries = (exp_manager, rl_zoo3.utils, huggingface_sb3)
    classes = (ExperimentManager, StoreDict, JournalFileBackend, JournalStorage, VecNormalize)
    for owner in (*libraries, *classes):
        for name, value in list(vars(owner).items()):
            is_static = isinstance(value, staticmethod)
            function = value.__func__ if is_static else value
            if original(function) is not function:
                unpatched = original(function)
                monkeypatch.setattr(owner, name, staticmethod(unpatched) if is_static else unpatched)
    if push_to_hub.generate_metadata.__module__ != push_to_hub.__name__:
        monkeypatch.delattr(push_to_hub, "generate_metadata")
    monkeypatch.setattr(exp_manager, "yaml", yaml)
    for callback in (CheckpointCallback, SaveVecNormalizeCallback):
        monkeypatch.setattr(exp_manager, callback.__name__, callback)
    masker = next(cls for cls in action_masker.ActionMasker.__mro__ if cls.__module__ == action_masker.__name__)
    monkeypatch.setattr(action_masker, "ActionMasker", masker)


def new_manager(folder: Path, **arguments: Any) -> ExperimentManager:
    """Of ppo, on a small task, in one environment unless ``hyperparams`` are given."""
    Path("my.yml").write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 64}")
    given = {"hyperparams": {"n_envs": 1}, "config": "my.yml", "eval_freq": -1, "verbose": 0, "device": "cpu"}
    return ExperimentManager(Namespace(), "ppo", "CartPole-v1", str(folder), **(given | arguments))


def new_study(storage: Any = None, n_trials: int = 1) -> optuna.Study:
    study = optuna.create_study(storage=storage, study_name="study")
    for _ in range(n_trials):
        study.add_trial(
            optuna.trial.create_trial(
                params=TRIAL,
                distributions={name: optuna.distributions.CategoricalDistribution([v]) for name, v in TRIAL.items()},
                value=0.0,
            )
        )
    return study


def run_script(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_module(f"rl_zoo3.{name}", run_name="__main__")


def test_defect_unregistered_env(upstream):
    assert raised_by(lambda: ExperimentManager.entry_point("Gone-v1")) is KeyError, works("unregistered_env")


def test_defect_action_masker(upstream):
    refused = raised_by(lambda: action_masker.ActionMasker(gym.make("Unmasked-v0"), "valid_actions"))
    assert refused is AttributeError, works("action_masker")


def test_defect_bare_words(upstream):
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    refused = raised_by(lambda: parser.parse_args(["-params", "prox_decay:auto"]))
    read = parser.parse_args(["-params", "mode:max"]).params["mode"]
    assert (refused, read) == (NameError, max), works("bare_words")


def test_defect_schedule_none(upstream):
    refused = raised_by(lambda: ExperimentManager._preprocess_schedules({"clip_range_vf": None}))
    assert refused is ValueError, works("schedule_none")


def test_defect_missing_trial(upstream, tmp_path):
    manager = new_manager(tmp_path)
    errors = [raised_by(lambda: manager.load_trial("gone.log", "study", 0))]
    assert Path("gone.log").exists(), works("missing_trial")
    new_study(JournalStorage(JournalFileBackend("study.log")))
    errors.append(raised_by(lambda: manager.load_trial("study.log", "study", 1)))
    assert errors == [KeyError, IndexError], works("missing_trial")


def test_defect_trial_zero(upstream, tmp_path):
    new_study(JournalStorage(JournalFileBackend("study.log")), n_trials=2)
    read = [
        new_manager(tmp_path, storage="study.log", study_name="study", trial_id=i).read_hyperparameters()[0]
        for i in (0, 1)
    ]
    assert read[1]["n_steps"] == 32
    assert "n_steps" not in read[0], works("trial_zero")


def test_defect_policy_kwargs(upstream, tmp_path, monkeypatch):
    built: list[dict[str, Any]] = []

    def model(**kwargs):
        built.append(kwargs["policy_kwargs"])
        raise KeyError("built")

    monkeypatch.setitem(ALGOS, "ppo", model)
    of_task = {"n_envs": 1, "policy_kwargs": {"features_extractor_class": FlattenExtractor}}
    manager = new_manager(tmp_path, hyperparams=of_task, optimize_hyperparameters=True)
    manager.setup_experiment()
    assert raised_by(lambda: manager.objective(optuna.create_study().ask())) is KeyError
    assert "features_extractor_class" not in built[0], works("policy_kwargs")


def test_defect_search_unknown_hyperparams(upstream, tmp_path):
    manager = new_manager(tmp_path, hyperparams={"gama": 0.9}, optimize_hyperparameters=True)
    assert raised_by(manager.setup_experiment) is type(None), works("search_unknown_hyperparams")


def test_defect_failed_run_folder(upstream, tmp_path):
    manager = new_manager(tmp_path / "logs", hyperparams={"gama": 0.9})
    assert raised_by(manager.setup_experiment) is not type(None)
    assert Path(manager.save_path).is_dir(), works("failed_run_folder")


def test_defect_constructor_errors(upstream, tmp_path, monkeypatch):
    sampler = HYPERPARAMS_SAMPLER["ppo"]
    monkeypatch.setitem(HYPERPARAMS_SAMPLER, "ppo", lambda *args: {**sampler(*args), "n_steps": 1, "batch_size": 1})
    manager = new_manager(tmp_path, optimize_hyperparameters=True)
    manager.setup_experiment()
    refused = raised_by(lambda: manager.objective(optuna.create_study().ask()))
    assert refused is AssertionError, works("constructor_errors")  # not TrialPruned


def test_defect_constructor_errors_of_others(upstream, tmp_path, monkeypatch):
    def learn(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug in the environment")

    monkeypatch.setattr(PPO, "learn", learn)
    manager = new_manager(tmp_path, optimize_hyperparameters=True)
    manager.setup_experiment()
    refused = raised_by(lambda: manager.objective(optuna.create_study().ask()))
    assert refused is optuna.TrialPruned, works("constructor_errors")


def test_defect_strict_yaml(upstream, tmp_path):
    Path("twice.yml").write_text("CartPole-v1: {policy: MlpPolicy, gamma: 0.9, gamma: 0.99, learning_rate: 1e-3}")
    hyperparams, _ = new_manager(tmp_path, config="twice.yml").read_hyperparameters()
    assert (hyperparams["gamma"], hyperparams["learning_rate"]) == (0.99, "1e-3"), works("strict_yaml")


def test_defect_unchecked_entry(upstream):
    schedules = ExperimentManager._preprocess_schedules({"learning_rate": "exp_0.1", "clip_range": True})
    assert (schedules["learning_rate"](0.5), schedules["clip_range"](0.5)) == (0.05, 1.0), works("unchecked_entry")


def test_defect_env_kwargs(upstream, tmp_path):
    Path("kwargs.yml").write_text("CartPole-v1: {policy: MlpPolicy, env_kwargs: {sutton_barto_reward: true}}")
    manager = new_manager(tmp_path, config="kwargs.yml")
    manager.read_hyperparameters()
    given = new_manager(tmp_path, config="kwargs.yml", env_kwargs={"render_mode": "rgb_array"})
    hyperparams, _ = given.read_hyperparameters()
    replaced = hyperparams["env_kwargs"]
    assert (manager.eval_env_kwargs, replaced) == ({}, {"render_mode": "rgb_array"}), works("env_kwargs")


def test_defect_ignored_options(upstream, tmp_path):
    manager = new_manager(tmp_path, storage="study.log", study_name="study")
    assert raised_by(manager.read_hyperparameters) is type(None), works("ignored_options")


def test_defect_trial_normalization(upstream, tmp_path):
    made: list[VecNormalize] = []
    normalize = {"n_envs": 1, "normalize": True, "gamma": 0.5}
    manager = new_manager(tmp_path, hyperparams=normalize, optimize_hyperparameters=True)
    manager.setup_experiment()
    create_envs = manager.create_envs

    def create(*args: Any, **kwargs: Any) -> Any:
        made.append(create_envs(*args, **kwargs))
        return made[-1]

    manager.create_envs = create  # type: ignore[method-assign]
    study = optuna.create_study()
    study.enqueue_trial(TRIAL)
    manager.objective(study.ask())
    assert [env.gamma for env in made] == [0.5, 0.5], works("trial_normalization")  # that of the trial is 0.98


def test_defect_continued_statistics(upstream, tmp_path):
    Path("CartPole-v1").mkdir()
    VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), gamma=0.123).save("CartPole-v1/vecnormalize.pkl")
    env = new_manager(tmp_path).create_envs(1)  # of a new agent without normalisation
    assert getattr(env, "gamma", None) == 0.123, works("continued_statistics")


def test_defect_checkpoint_statistics(upstream, tmp_path):
    manager = new_manager(tmp_path, save_freq=1)
    manager.create_callbacks()
    (callback,) = manager.callbacks
    assert isinstance(callback, CheckpointCallback)
    assert not callback.save_vecnormalize, works("checkpoint_statistics")


def test_defect_search_run_folder(upstream, tmp_path):
    manager = new_manager(tmp_path / "logs", optimize_hyperparameters=True)
    manager.setup_experiment()
    assert Path(manager.save_path).is_dir(), works("search_run_folder")


def test_defect_shared_run_folder(upstream, tmp_path):
    managers = [new_manager(tmp_path / "logs") for _ in range(2)]
    for manager in managers:
        manager.create_log_folder()
    assert managers[0].save_path == managers[1].save_path, works("shared_run_folder")


def test_defect_no_completed_trial(upstream, tmp_path, monkeypatch):
    manager = new_manager(tmp_path, optimize_hyperparameters=True, n_trials=0, no_optim_plots=True)
    with pytest.raises(ValueError, match=r".") as error:
        manager.hyperparameters_optimization()
    assert str(error.value) == "No trials are completed yet.", works("no_completed_trial")


def test_defect_dead_trials(upstream, tmp_path):
    study = optuna.create_study(storage="sqlite:///study.db", study_name="study", direction="maximize")
    study.ask()  # of a process that has ended
    options = {"n_timesteps": 32, "max_total_trials": 1, "no_optim_plots": True}
    storage = {"storage": "sqlite:///study.db", "study_name": "study"}
    manager = new_manager(tmp_path, optimize_hyperparameters=True, **options, **storage)
    manager.setup_experiment()
    assert raised_by(manager.hyperparameters_optimization) is ValueError, works("dead_trials")  # nothing was tried


def test_defect_journal_lock(upstream):
    Path("logs").mkdir()
    backend = JournalFileBackend("logs/study.log")
    backend._lock.acquire()
    with pytest.raises(FileNotFoundError):  # nobody can see its age
        os.stat("logs/study.log.lock")
    assert Path("logs/study.log.lock").is_symlink(), works("journal_lock")


def test_defect_torn_journal(upstream):
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend("study.log")), study_name="study")
    with open("study.log", "ab") as file:
        file.write(b'{"op_code":5,"worker')
    study.set_user_attr("a", 1)
    refused = raised_by(lambda: study.set_user_attr("b", 2))
    assert refused is json.JSONDecodeError, works("torn_journal")


def test_defect_vec_normalize_save(upstream):
    venv: Any = VecNormalize(make_vec_env("CartPole-v1"))
    venv.save("statistics.pkl")
    venv.epsilon = lambda: None  # cannot be pickled
    assert raised_by(lambda: venv.save("statistics.pkl")) is not type(None)
    assert raised_by(lambda: VecNormalize.load("statistics.pkl", venv.venv)) is not type(None), works(
        "vec_normalize_save"
    )


def test_defect_generate_metadata(upstream):
    error = raised_by(lambda: runpy.run_module("rl_zoo3.push_to_hub", run_name="imported"))
    assert error is ImportError, works("generate_metadata")


def test_defect_hub_missing_file(upstream, monkeypatch, tmp_path):
    def hf_hub_download(filename: str, **kwargs: Any) -> str:
        if filename == "vec_normalize.pkl":
            raise EntryNotFoundError("missing")
        return filename

    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    download = runpy.run_module("rl_zoo3.load_from_hub", run_name="imported")["download_from_hub"]
    error = raised_by(lambda: download("ppo", huggingface_sb3.EnvironmentName("CartPole-v1"), 0, "logs", "me"))
    assert error is EntryNotFoundError, works("hub_missing_file")


def test_defect_class_names(upstream):
    named = [lambda: exp_manager.get_class_by_name("Counter"), lambda: exp_manager.get_class_by_name("os.Counter")]
    assert [raised_by(each) for each in named] == [ValueError, AttributeError], works("class_names")
    with pytest.raises(ValueError, match=r".") as error:
        named[0]()
    assert str(error.value) == "Empty module name", works("class_names")


def test_defect_dotted_names(upstream, tmp_path):
    manager = new_manager(tmp_path, hyperparams={"policy_kwargs": "dict(activation_fn=torch.nn.ReLU)"})
    assert raised_by(manager.setup_experiment) is NameError, works("dotted_names")


def test_defect_observation_spaces(upstream):
    class Texts(gym.Env):
        observation_space = gym.spaces.Dict(text=gym.spaces.Text(3))
        action_space = gym.spaces.Discrete(2)

    assert raised_by(lambda: DummyVecEnv([Texts])) is TypeError, works("observation_spaces")


def test_defect_policy_names(upstream, tmp_path):
    manager = new_manager(tmp_path, hyperparams={"policy": "MlpPolcy"})
    with pytest.raises(ValueError, match=r".") as error:
        manager.setup_experiment()
    assert str(error.value) == "Policy MlpPolcy unknown", works("policy_names")


def test_defect_python_config(upstream, tmp_path):
    Path("conf.py").write_text("class Own: ...\nhyperparams = {'CartPole-v1': {'own': Own}}")
    hyperparams, _ = new_manager(tmp_path, config="conf.py").read_hyperparameters()
    assert hyperparams["own"].__module__ == "builtins", works("python_config")


def test_defect_saved_objects(upstream, tmp_path):
    policy_kwargs = {"activation_fn": lambda: th.nn.ReLU()}
    manager = new_manager(tmp_path, hyperparams={"n_envs": 1, "policy_kwargs": policy_kwargs})
    manager.setup_experiment()
    saved = Path(manager.params_path, "config.yml").read_text()
    assert raised_by(lambda: yaml.unsafe_load(saved)) is yaml.constructor.ConstructorError, works("saved_objects")


def test_defect_integer_options(upstream, monkeypatch):
    arguments = [
        "--algo",
        "ppo",
        "-n",
        "8",
        "--eval-freq",
        "-1",
        "--log-interval",
        "0",
        "-f",
        "logs",
        "--device",
        "cpu",
    ]
    params = ["-params", "n_envs:1", "n_steps:8", "batch_size:8"]
    error = raised_by(lambda: run_script("train", *arguments, *params, monkeypatch=monkeypatch))
    assert error is ZeroDivisionError, works("integer_options")


def test_defect_unfound_runs(upstream, monkeypatch):
    pytest.importorskip("seaborn")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    Path("logs/ppo/other").mkdir(parents=True)
    arguments = ["-a", "ppo", "-e", "ns/X-v0", "-f", "logs"]
    error = raised_by(lambda: run_script("plots.plot_train", *arguments, monkeypatch=monkeypatch))
    assert error is type(None), works("unfound_runs")


def test_defect_unequal_runs(upstream, monkeypatch):
    pytest.importorskip("seaborn")
    run = Path("logs/ppo/X-v0_1")
    run.mkdir(parents=True)
    np.savez(run / "evaluations.npz", timesteps=[10, 20], results=[[1.0], [2.0]])
    arguments = ["-a", "ppo", "-e", "X-v0", "-f", "logs", "--no-display"]
    error = raised_by(lambda: run_script("plots.all_plots", *arguments, monkeypatch=monkeypatch))
    assert issubclass(error, IndexError), works("unequal_runs")  # numpy's AxisError


def commands_of_scripts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """:return: what benchmark and record_training start first, for an agent that need not exist"""
    commands: list[list[str]] = []

    def call(command: list[str], *args: Any, **kwargs: Any) -> int:
        commands.append(command)
        return 1

    monkeypatch.setattr(subprocess, "call", call)
    run = Path("logs/ppo/CartPole-v1_1")
    (run / "CartPole-v1").mkdir(parents=True)
    (run / "CartPole-v1.zip").touch()
    (run / "CartPole-v1" / "args.yml").write_text(yaml.safe_dump({"env": "CartPole-v1"}))
    Path("benchmark").mkdir()
    run_script("benchmark", "--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", monkeypatch=monkeypatch)
    with pytest.raises(AssertionError, match="Failed to record"):
        run_script("record_training", "-f", "logs", monkeypatch=monkeypatch)
    return commands


def test_defect_child_commands(upstream, monkeypatch):
    benchmark, record_training = commands_of_scripts(monkeypatch)
    assert benchmark[:2] == ["python", "enjoy.py"], works("child_commands")
    assert record_training[:3] == ["python", "-m", "rl_zoo3.record_video"], works("child_commands")


def test_defect_ffmpeg_status(upstream, monkeypatch, capsys):
    Path("logs/ppo/CartPole-v1_1").mkdir(parents=True)
    monkeypatch.setattr(os, "system", lambda command: 1)
    run_script("record_training", "-f", "logs", monkeypatch=monkeypatch)
    assert "Saving video to" in capsys.readouterr().out, works("ffmpeg_status")


MAKE_FOLDER = "!!python/object/apply:os.mkdir [made]"


def test_defect_unsafe_yaml(upstream, monkeypatch):
    run = Path("logs/ppo/CartPole-v1_1")
    (run / "CartPole-v1").mkdir(parents=True)
    (run / "CartPole-v1.zip").touch()
    (run / "CartPole-v1" / "args.yml").write_text(f"env_kwargs: {MAKE_FOLDER}")
    with contextlib.suppress(Exception):  # the agent is an empty file
        run_script("enjoy", "-f", "logs", "--no-render", monkeypatch=monkeypatch)
    assert Path("made").exists(), works("unsafe_yaml")


ALL = [module.name for module in pkgutil.iter_modules(patches.__path__) if not module.name.startswith("_")]


def patch_module(name: str) -> ModuleType:
    return importlib.import_module(f"{patches.__name__}.{name}")


@pytest.mark.parametrize("name", ALL)
def test_every_patch_is_applied_where_upstream_needs_it(name, upstream):
    patch = patch_module(name)
    assert patch in (*patches.PATCHES, *patches.SCRIPT_PATCHES)
    assert f"test_defect_{name}" in globals()
    assert patch.is_needed(), works(name)


@pytest.mark.parametrize(
    "name",
    [
        "unregistered_env",
        "bare_words",
        "schedule_none",
        "strict_yaml",
        "generate_metadata",
        "action_masker",
        "class_names",
    ],
)
def test_a_function_that_works_is_not_patched(name):
    # The patched one works.
    assert not patch_module(name).is_needed()


# What upstream's source would no longer contain
@pytest.mark.parametrize(
    ("name", "defect", "repaired"),
    [
        ("missing_trial", "        if trial_id is not None:", "        try: ...\n        except KeyError: ..."),
        ("trial_zero", "and self.trial_id:", "and self.trial_id is not None:"),
        ("policy_kwargs", "kwargs.update(sampled_hyperparams)", "merge(kwargs, sampled_hyperparams)"),
        ("env_kwargs", '{"env_kwargs": self.env_kwargs}', "{}"),
        ("unchecked_entry", '.split("_")', ".check()"),
        ("ignored_options", "if self.storage and self.study_name and", "if self.trial_id is not None and"),
        ("trial_normalization", "kwargs.update(sampled_hyperparams)", 'self.normalize_kwargs["gamma"] = 0.9'),
        ("continued_statistics", "os.path.dirname(self.trained_agent)", "self.find()"),
        ("checkpoint_statistics", 'name_prefix="rl_model",', 'name_prefix="rl_model", save_vecnormalize=True,'),
        ("search_run_folder", "        self.create_log_folder()", "        pass"),
        ("shared_run_folder", "exist_ok=True", ""),
        ("search_unknown_hyperparams", "            return None", "            self.check()\n            return None"),
        ("failed_run_folder", "        self.create_log_folder()", "        pass"),
        ("constructor_errors", "        model = ALGOS", "        try: ...\n        model = ALGOS"),
        ("no_completed_trial", "        trial = study", "        self.check()\n        trial = study"),
        ("dead_trials", "TrialState.RUNNING", "TrialState.WAITING"),
        ("journal_lock", "os.stat(self._lock_file)", "os.lstat(self._lock_file)"),
        ("torn_journal", "f.flush()", "self._truncate(f)"),
        ("vec_normalize_save", 'open(save_path, "wb")', 'replaced(save_path, "wb")'),
        ("hub_missing_file", "requests.exceptions", "huggingface_hub.errors"),
        ("child_commands", '"python"', "sys.executable"),
        ("ffmpeg_status", "os.system(", "self.run("),
        ("dotted_names", "= eval(hyperparams[kwargs_key])", "= self.evaluate(hyperparams[kwargs_key])"),
        ("observation_spaces", "np.zeros((self.num_envs, *tuple(shapes[k]))", "self.new_buffer(k)"),
        ("policy_names", 'unknown")', 'unknown, must be one of {names}")'),
        ("python_config", "exec(", "runpy.run_path("),
        ("saved_objects", "yaml.dump(saved_hyperparams, f)", "yaml.dump(self.checked(saved_hyperparams), f)"),
        ("integer_options", "default=5, type=int)", "default=5, type=positive)"),
        ("unfound_runs", "env", "folder"),
        ("unequal_runs", ".squeeze()", ""),
        ("unsafe_yaml", "yaml.UnsafeLoader", "yaml.SafeLoader"),
    ],
)
def test_a_version_without_the_defect_is_not_patched(name, defect, repaired, monkeypatch):
    patch = patch_module(name)
    assert patch.is_needed()
    for reader in ("upstream_source", "script_source"):
        read = getattr(_replace, reader)

        def repaired_source(code: Any, read: Any = read) -> str:
            return read(code).replace(defect, repaired)

        monkeypatch.setattr(patch, reader, repaired_source, raising=False)
    assert not patch.is_needed()


def test_child_commands_run_our_interpreter(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command: commands.append(command))
    before = subprocess.call
    with child_commands.apply():
        subprocess.call(["python", "enjoy.py", "-n", "1"])
        subprocess.call(["python", "-m", "rl_zoo3.record_video"])
        subprocess.call(["python", "my.py"])
    assert subprocess.call is before
    assert commands == [
        [sys.executable, "-m", "rl_zoo3.enjoy", "-n", "1"],
        [sys.executable, "-m", "rl_zoo3.record_video"],
        ["python", "my.py"],
    ]


def test_script_patches_are_undone_after_an_error():
    before = subprocess.call, os.system, yaml.load
    with contextlib.suppress(ZeroDivisionError), patches.script_patches():
        assert subprocess.call is not before[0]
        assert os.system is not before[1]
        assert yaml.load is not before[2]
        _ = 1 / 0
    assert (subprocess.call, os.system, yaml.load) == before


@pytest.mark.parametrize("file", ["args.yml", "config.yml"])
@pytest.mark.parametrize("script", ["enjoy", "record_video"])
def test_files_of_a_run_cannot_run_code(script, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("logs/ppo/CartPole-v1_1")
    ALGOS["ppo"]("MlpPolicy", "CartPole-v1", n_steps=64).save(run / "CartPole-v1")
    (run / "CartPole-v1").mkdir()
    (run / "CartPole-v1" / "args.yml").write_text("{env: CartPole-v1, env_kwargs: null}")
    (run / "CartPole-v1" / file).write_text(f"env: CartPole-v1\nenv_kwargs: {MAKE_FOLDER}")
    with pytest.raises(SystemExit) as end:
        zoo.main([script, "-f", "logs", "--algo", "ppo", "--env", "CartPole-v1", "-n", "1"])
    assert not Path("made").exists()
    assert f'{file}", line 2' in str(end.value)
    assert "an object (object/apply:os.mkdir) is not read, since it could run code" in str(end.value)


def test_replacements_nest_and_keep_static_methods():
    class Owner:
        @staticmethod
        def double(number: int) -> int:
            """Documented."""
            return 2 * number

        def name(self) -> str:
            return type(self).__name__

    _replace.replace_function(Owner, "double", lambda upstream, number: upstream(number) + 1)
    _replace.replace_function(Owner, "double", lambda upstream, number: 10 * upstream(number))
    _replace.replace_function(Owner, "name", lambda upstream, owner: upstream(owner).lower())
    assert Owner.double(3) == Owner().double(3) == 70
    assert Owner.double.__doc__ == "Documented."
    assert Owner().name() == "owner"
