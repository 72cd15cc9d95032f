"""Mistakes at the command line are named, options are obeyed, and a user's own project works in every script."""

import argparse
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_ppo_ewma import PPOEWMA, zoo
from sb3_ppo_ewma.zoo import child_processes, command_line, options, python_values, rendering
from sb3_ppo_ewma.zoo.patches import integer_options

pytestmark = pytest.mark.long

TRAIN = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--device", "cpu", "-f", "logs"]
SHORT = ["-n", "64", "--eval-freq", "32", "--eval-episodes", "1", "--seed", "0"]
SMALL = ["-params", "n_envs:1", "n_steps:32", "batch_size:16", "n_epochs:1"]

PACKAGE = {
    "__init__": """
        import gymnasium as gym

        gym.register("mine/Walk-v0", entry_point="PACKAGE.envs:Walk", max_episode_steps=20)
    """,
    "envs": """
        import gymnasium as gym
        import numpy as np

        class Walk(gym.Env):
            metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
            observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
            action_space = gym.spaces.Discrete(2)

            def __init__(self, length=5, render_mode=None):
                self.length, self.render_mode = length, render_mode

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.at = -self.length
                return np.zeros(3, np.float32), {}

            def step(self, action):
                self.at += 2 * int(action) - 1
                return np.full(3, self.at / 50, np.float32), float(self.at), self.at >= 0, False, {}

            def render(self):
                return np.zeros((64, 64, 3), np.uint8)
    """,
    "nets": """
        import torch as th
        from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

        class Extractor(BaseFeaturesExtractor):
            def __init__(self, observation_space, features_dim=8):
                super().__init__(observation_space, features_dim)
                self.layer = th.nn.Linear(observation_space.shape[0], features_dim)

            def forward(self, observations):
                return self.layer(observations)
    """,
    "callbacks": """
        from stable_baselines3.common.callbacks import BaseCallback

        class Counter(BaseCallback):
            def __init__(self, every=10, verbose=0):
                super().__init__(verbose)
                self.every = every

            def _on_step(self):
                if self.n_calls % self.every == 0:
                    print("counted", self.n_calls)
                return True
    """,
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the child processes
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in (command_line.TRACEBACK_VARIABLE, "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says before it exits with an error: one sentence."""
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    code = refused.value.code
    assert code not in (0, None)
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.rindex("sb3-ppo-ewma ") :].strip()


@pytest.fixture
def package(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A package in the current folder that registers mine/Walk-v0, with a network and a callback. Its name is new."""
    name = f"package_{abs(hash(request.node.nodeid))}"
    (tmp_path / name).mkdir()
    for module, source in PACKAGE.items():
        (tmp_path / name / f"{module}.py").write_text(textwrap.dedent(source).replace("PACKAGE", name))
    importlib.invalidate_caches()
    yield name
    gym.registry.pop("mine/Walk-v0", None)
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[module]


def forget(package: str) -> None:
    """As in a new process: nothing of the package is imported."""
    gym.registry.pop("mine/Walk-v0", None)
    for module in [each for each in sys.modules if each.partition(".")[0] == package]:
        del sys.modules[module]


# --------------------------------------------------------------------------------------------------- a whole project


def configuration(package: str, kind: str) -> str:
    """Write the hyper-parameters of mine/Walk-v0 as a file or module; what -conf names."""
    entry = {"n_timesteps": 64, "policy": "MlpPolicy", "n_steps": 32, "batch_size": 16, "n_epochs": 1}
    if kind == "yml":
        entry |= {
            "policy_kwargs": f"dict(features_extractor_class={package}.nets.Extractor, activation_fn=torch.nn.ReLU)"
        }
        entry |= {"callback": [{f"{package}.callbacks.Counter": {"every": 32}}], "normalize": True}
        Path("my.yml").write_text(yaml.safe_dump({"mine/Walk-v0": entry}))
        return "my.yml"
    source = f"""
        import torch
        from {package}.callbacks import Counter
        from {package}.nets import Extractor

        class Own(Extractor):
            pass

        policy_kwargs = dict(features_extractor_class=Own, activation_fn=torch.nn.ReLU)
        hyperparams = {{"mine/Walk-v0": dict(policy_kwargs=policy_kwargs, callback=Counter, **{entry!r})}}
    """
    name = f"{package}_config" if kind == "file" else "config"
    Path(f"{name}.py" if kind == "file" else f"{package}/config.py").write_text(textwrap.dedent(source))
    importlib.invalidate_caches()
    return f"{name}.py" if kind == "file" else f"{package}.config"


@pytest.mark.parametrize("kind", ["yml", "file", "module"])
def test_a_users_own_project_works_in_every_script(kind: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--algo", "ppo_ewma", "--env", "mine/Walk-v0", "-f", "logs", "--device", "cpu", *SHORT]
    train += ["--gym-packages", package, "-conf", configuration(package, kind)]
    zoo.main(train)
    assert "counted" in capsys.readouterr().out
    model = PPOEWMA.load("logs/ppo_ewma/mine-Walk-v0_1/mine-Walk-v0.zip")
    assert type(model.policy.features_extractor).__name__ == ("Extractor" if kind == "yml" else "Own")
    assert model.policy.activation_fn is th.nn.ReLU
    zoo.main([*train, "-i", "logs/ppo_ewma/mine-Walk-v0_1/mine-Walk-v0.zip"])
    # From here on nothing names the package but args.yml.
    agent = ["--algo", "ppo_ewma", "--env", "mine/Walk-v0", "-f", "logs", "-n", "30"]
    for command in (["enjoy", *agent, "--no-render"], ["record_video", *agent, "-o", "videos"]):
        forget(package)
        zoo.main(command)
    assert list(Path("videos").glob("*.mp4"))
    zoo.main(["plot_train", "-a", "ppo_ewma", "-e", "mine/Walk-v0", "-f", "logs", "-w", "2", "-o", "train.png"])
    assert Path("train.png").stat().st_size > 0
    zoo.main(["all_plots", "-a", "ppo_ewma", "-e", "mine/Walk-v0", "-f", "logs", "-o", "all", "--no-display"])
    assert "|mine-Walk-v0|" in capsys.readouterr().out


def test_benchmark_evaluates_an_environment_with_a_slash(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--algo", "ppo_ewma", "--env", "mine/Walk-v0", "-f", "logs", "--device", "cpu", *SHORT]
    zoo.main([*train, "--gym-packages", package, "-conf", configuration(package, "yml")])
    forget(package)
    arguments = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "--num-threads", "1", "-n", "60"]
    zoo.main(["benchmark", *arguments, "--gym-packages", package])
    table = Path("benchmark", "benchmark.md").read_text().replace(" ", "")
    assert "|ppo_ewma|mine/Walk-v0|" in table


def test_packages_that_are_gone_are_named(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--algo", "ppo_ewma", "--env", "mine/Walk-v0", "-f", "logs", "--device", "cpu", *SHORT]
    zoo.main([*train, "--gym-packages", package, *SMALL])
    forget(package)
    Path(package).rename("elsewhere")
    enjoy = ["enjoy", "--algo", "ppo_ewma", "--env", "mine/Walk-v0", "-f", "logs", "--no-render"]
    said = refusal(enjoy, capsys)
    assert f"trained with --gym-packages {package}: No module named '{package}'" in said
    assert "pip install" not in said


@pytest.mark.parametrize("script", ["record_video", "record_training", "benchmark", "push_to_hub"])
def test_gym_packages_of_every_script(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"push_to_hub": ["--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", "logs", "-orga", "me"]}
    message = refusal([script, *required.get(script, []), "--gym-packages", "no_such_package"], capsys)
    assert "--gym-packages no_such_package: No module named 'no_such_package'" in message


def test_children_of_scripts_are_told_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.call", lambda command: called.append(command) or 0)
    new = options.Options(gym_packages=["my_envs", "others"])
    with options.replaced(new), child_processes.redirect_child_scripts():
        subprocess.call(["python", "-m", "rl_zoo3.enjoy", "-n", "1"])
    assert called[0][-5:] == ["-n", "1", "--gym-packages", "my_envs", "others"]


def test_modules_of_the_current_folder_are_found_as_with_python_m(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder_envs.py").write_text("raise ValueError('it was imported')")
    before = list(sys.path)
    assert "it was imported" in refusal([*TRAIN, "--gym-packages", "folder_envs"], capsys)
    assert sys.path == before


# ---------------------------------------------------------------------------------------- modules that are not there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gym-packages", "my_envs"], "No module named 'my_envs'. Python looks in the current folder"),
        (["--gym-packages", "here.py"], "give the name of a module, such as my_envs or my_package.envs, not of a file"),
        (["-conf", "my.json"], "-conf my.json is neither a file that ends in .yml, .yaml or .py nor a module"),
        (["-conf", "here.py"], "-conf here.py has no dictionary 'hyperparams'"),
        (["-conf", "sub/here.py"], "-conf sub/here.py has no dictionary 'hyperparams'"),
        (["-conf", "json"], "-conf json has no dictionary 'hyperparams'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_module_is_no_package_to_install(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here.py").touch()
    Path("sub").mkdir()
    Path("sub/here.py").touch()
    message = refusal([*TRAIN, *arguments], capsys)
    assert said in message
    assert "pip install" not in message
    sys.modules.pop("here", None)


def test_a_class_that_enjoy_would_not_find_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    Path("sub/own.py").write_text(
        "import torch\nclass Own(torch.nn.ReLU): ...\n"
        "hyperparams = {'CartPole-v1': dict(n_timesteps=64, policy='MlpPolicy', policy_kwargs=dict(activation_fn=Own))}"
    )
    assert "policy_kwargs: Own cannot be saved for enjoy" in refusal([*TRAIN, "-conf", "sub/own.py"], capsys)
    given = "policy_kwargs:dict(activation_fn=lambda: torch.nn.ELU())"
    assert "policy_kwargs: <lambda> cannot be saved for enjoy" in refusal([*TRAIN, "-params", given], capsys)
    assert not list(Path("logs").glob("*/*"))


# ------------------------------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    "text",
    ["dict(activation_fn=torch.nn.ELU)", "'dict(activation_fn=torch.nn.ELU)'", "dict(activation_fn='torch.nn.ELU')"],
)
def test_classes_with_their_module(text: str) -> None:
    zoo.main([*TRAIN, *SHORT, *SMALL, f"policy_kwargs:{text}"])
    assert PPOEWMA.load("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip").policy.activation_fn is th.nn.ELU


def test_python_values() -> None:
    assert python_values.evaluate("dict(a=collections.abc.Sized, b=one)", {"one": 1}) == {
        "a": importlib.import_module("collections.abc").Sized,
        "b": 1,
    }
    assert python_values.evaluate("[x.real for x in (1, 2)]", {}) == [1, 2]
    for text in ("no_such_module.nets.Net", "dict(a=no_such_name)"):
        with pytest.raises(NameError, match="there is no module or name no_such"):
            python_values.evaluate(text, {})
    with pytest.raises(AttributeError, match="no attribute 'Sizd'"):
        python_values.evaluate("collections.abc.Sizd", {})


CALLBACKS = "stable_baselines3.common.callbacks"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (["callback:'Counter'"], "callback must be named with its module, as in my_module.Counter, got 'Counter'"),
        (["callback:no_module.Counter"], "callback names 'no_module.Counter', but there is no module no_module"),
        ([f"callback:{CALLBACKS}.EvalCalback"], f"{CALLBACKS} has no 'EvalCalback'. Did you mean 'EvalCallback'?"),
        ([f"callback:{CALLBACKS}.CheckpointCallback"], "missing a required argument: 'save_freq'"),
        (["callback:{'sb3_ppo_ewma.AdviceCallback': {'evry': 2}}"], "got an unexpected keyword argument 'evry'"),
        (["callback:{'sb3_ppo_ewma.AdviceCallback': 2}"], "must be names with values, got 2"),
        (["callback:{'a.B': {}, 'c.D': {}}"], "callback must be a name, or a name with its arguments"),
        (["callback:torch.nn.ReLU"], "callback must name subclasses of BaseCallback, got 'torch.nn.ReLU'"),
        (["env_wrapper:'FlattenObservation'"], "env_wrapper must be named with its module"),
        (["env_wrapper:gymnasium.wrappers.FlatenObservation"], "Did you mean 'FlattenObservation'?"),
        (["env_wrapper:gymnasium.wrappers.RescaleAction"], "missing a required argument: 'min_action'"),
        (["vec_env_wrapper:gymnasium.no_such.Wrapper"], "there is no module gymnasium.no_such"),
        (["policy:MlpPolcy"], "policy of ppo_ewma must be one of MlpPolicy, CnnPolicy"),
        (["policy:my_policies.Mine"], "policy names 'my_policies.Mine', but there is no module my_policies"),
        (["policy:5"], "policy must be a name or a class, got 5"),
        (["policy:MultiInputPolicy"], "use MlpPolicy or CnnPolicy"),
        (["policy_kwargs:'dict(activation_fn=torch.nn.Relu)'"], "policy_kwargs: cannot read 'dict(activation_fn=torch"),
        (["policy_kwargs:dict(activation_fn=torch.nn.Relu)"], "module 'torch.nn' has no attribute 'Relu'"),
        (["policy_kwargs:dict(activation_fn=my_nets.Act)"], "there is no module or name my_nets"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_misspelled_classes(params: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal([*TRAIN, *SHORT, *SMALL, *params], capsys)
    assert not list(Path("logs").glob("*/*"))


class Observing(gym.Env[Any, Any]):
    action_space = gym.spaces.Discrete(2)

    def __init__(self, observation_space: gym.spaces.Space[Any]) -> None:
        self.observation_space = observation_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


BOX = gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("algo", "space", "said"),
    [
        ("ppo_ewma", gym.spaces.Tuple([BOX, BOX]), "takes Box, Discrete, MultiDiscrete"),
        ("ppg_lstm", gym.spaces.Dict(a=gym.spaces.Dict(b=BOX)), "takes Box, Discrete, MultiDiscrete"),
        ("ppo", gym.spaces.Dict(a=BOX, b=gym.spaces.Text(5)), "takes Box, Discrete, MultiDiscrete"),
        ("ppo_lstm_ewma", gym.spaces.Dict(a=BOX), "use MultiInputLstmPolicy (-params policy:MultiInputLstmPolicy)"),
        ("ppo_ewma", gym.spaces.Dict(a=BOX), "use MultiInputPolicy (-params policy:MultiInputPolicy)"),
    ],
    ids=str,
)
def test_observations_without_a_policy(
    algo: str,
    space: gym.spaces.Space[Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = gym.envs.registration.EnvSpec("Observing-v0", entry_point=Observing, kwargs={"observation_space": space})
    monkeypatch.setitem(gym.registry, "Observing-v0", spec)
    message = refusal(["train", "--algo", algo, "--env", "Observing-v0", "-f", "logs", "--device", "cpu"], capsys)
    assert said in message
    assert "Observing-v0" in message


def test_a_trained_agent_keeps_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dicts(Observing):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.observation_space.sample(), 1.0, True, False, {}

    kwargs = {"observation_space": gym.spaces.Dict(a=BOX)}
    spec = gym.envs.registration.EnvSpec("Dicts-v0", entry_point=Dicts, kwargs=kwargs)
    monkeypatch.setitem(gym.registry, "Dicts-v0", spec)
    train = ["train", "--algo", "ppo_ewma", "--env", "Dicts-v0", "-f", "logs", "--device", "cpu", *SHORT]
    zoo.main([*train, *SMALL, "policy:MultiInputPolicy"])
    zoo.main([*train, "-i", "logs/ppo_ewma/Dicts-v0_1/Dicts-v0.zip", *SMALL])
    assert Path("logs/ppo_ewma/Dicts-v0_2/Dicts-v0.zip").exists()


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("script", "given", "allowed"),
    [
        ("train", "--log-interval 0", "must be -2 or -1 or >= 1, got 0"),
        ("train", "--eval-episodes 0", "must be >= 1, got 0"),
        ("train", "--n-eval-envs 0", "must be >= 1, got 0"),
        ("train", "-n 0", "-n/--n-timesteps: must be >= 1, got 0"),
        ("train", "-n -3", "must be >= 1, got -3"),
        ("train", "--seed -2", "must be in [0, 4294967295], got -2"),
        ("train", "--seed 4294967296", "must be in [0, 4294967295]"),
        ("train", "--num-threads 0", "must be -1 or >= 1, got 0"),
        ("train", "--n-trials 0", "must be >= 1, got 0"),
        ("train", "--n-jobs 0", "must be -1 or >= 1, got 0"),
        ("train", "--trial-id -1", "must be >= 0, got -1"),
        ("train", "--n-evaluations 0", "must be >= 1, got 0"),
        ("train", "--n-startup-trials -1", "must be >= 0, got -1"),
        ("train", "--max-total-trials 0", "must be >= 1, got 0"),
        ("train", "--verbose -1", "must be >= 0, got -1"),
        ("enjoy", "--n-timesteps 0", "must be >= 1, got 0"),
        ("enjoy", "--n-envs 0", "must be >= 1, got 0"),
        ("enjoy", "--exp-id -2", "must be -1 or >= 0, got -2"),
        ("enjoy", "--load-checkpoint -1", "must be >= 0, got -1"),
        ("record_video", "--n-envs -1", "must be >= 1, got -1"),
        ("benchmark", "-n 0", "must be >= 1, got 0"),
        ("plot_train", "-a a -e b -f c -w 0", "must be >= 1, got 0"),
        ("plot_train", "-a a -e b -f c --figsize 1 0", "must be >= 1, got 0"),
    ],
)
def test_numbers_out_of_range(script: str, given: str, allowed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        zoo.main([script, *given.split()])
    assert allowed in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train", "enjoy", "record_video", "push_to_hub", "load_from_hub", "plot_train"])
def test_every_integer_option_has_a_range(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[argparse.Action] = []
    parse_args = argparse.ArgumentParser.parse_args

    def note(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        if parser.prog == command_line.PROG:  # ours, which chooses the script
            return parse_args(parser, *args, **kwargs)
        found.extend(action for action in parser._actions if action.type is int)
        raise SystemExit(1)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    with pytest.raises(SystemExit):
        zoo.main([script])
    assert found
    assert {action.dest for action in found} <= integer_options._RANGES.keys() | {"eval_freq", "save_freq"}


def test_what_is_documented_as_a_number_is_taken() -> None:
    zoo.main([*TRAIN, *SHORT, "--log-interval", "-2", "--save-freq", "0", "--eval-freq", "-1", "--seed", "-1", *SMALL])
    assert Path("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip").exists()


# ------------------------------------------------------------------------------------------- watching and rendering


@pytest.mark.parametrize(("kind", "n_envs", "cls"), [("subproc", "1", SubprocVecEnv), ("dummy", "2", DummyVecEnv)])
def test_enjoy_uses_the_kind_of_environment_that_is_asked_for(
    kind: str, n_envs: str, cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.main([*TRAIN, *SHORT, *SMALL])
    made: list[type] = []
    for each in (SubprocVecEnv, DummyVecEnv):
        init = each.__init__
        monkeypatch.setattr(
            each, "__init__", lambda self, *a, init=init, **k: made.append(type(self)) or init(self, *a, **k)
        )
    agent = ["--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", "logs", "-n", "10", "--no-render"]
    zoo.main(["enjoy", *agent, "--vec-env", kind, "--n-envs", n_envs])
    assert made == [cls]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such variable")
def test_rendering_without_a_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main([*TRAIN, *SHORT, *SMALL])
    agent = ["--algo", "ppo_ewma", "--env", "CartPole-v1", "-f", "logs", "-n", "10"]
    # Its library opens no window then, and goes on.
    zoo.main(["enjoy", *agent])
    assert "there is no screen to render to (DISPLAY is not set): give --no-render" in capsys.readouterr().out
    zoo.main(["enjoy", *agent, "--no-render"])
    assert "no screen" not in capsys.readouterr().out
    monkeypatch.setattr("stable_baselines3.common.vec_env.DummyVecEnv.render", raises(cv2_error("imshow failed")))
    said = refusal(["enjoy", *agent], capsys)
    assert "rendering failed without a screen (DISPLAY is not set): imshow failed. Give --no-render" in said
    # MuJoCo's would end the process.
    pytest.importorskip("mujoco")
    with pytest.raises(ValueError, match="there is no screen"):
        rendering.check_screen("HalfCheetah-v5")
    monkeypatch.setenv("DISPLAY", ":0")
    rendering.check_screen("HalfCheetah-v5")


def raises(error: Exception) -> Any:
    def function(*args: Any, **kwargs: Any) -> None:
        raise error

    return function


def cv2_error(message: str) -> Exception:
    return type("error", (Exception,), {"__module__": "cv2"})(message)


# ------------------------------------------------------------------------------------------------- agents of others


def test_an_agent_of_another_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main([*TRAIN, *SHORT, "--save-replay-buffer", *SMALL, "staleness:1"])
    agent = "logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip"
    ppo = ["train", "--algo", "ppo", "--env", "CartPole-v1", "-f", "logs", "--device", "cpu", *SHORT, "-i", agent]
    said = refusal(ppo, capsys)
    assert f"{agent} is an agent of PPO-EWMA or PPG, which ppo cannot load" in said
    assert "to_ppo()" in said


# ------------------------------------------------------------------------------------------------------------ plots


def evaluations(run: str, timesteps: list[int], n_episodes: int = 2, result: float = 1.0) -> None:
    folder = Path("logs", run)
    folder.mkdir(parents=True)
    results = result + np.zeros((len(timesteps), n_episodes))
    np.savez(folder / "evaluations.npz", timesteps=timesteps, results=results, ep_lengths=results)


def all_plots(*more: str) -> dict[str, Any]:
    arguments = ["-a", "ppo", "-e", "ns/X-v0", "-f", "logs", "-o", "all", "--no-display", "--no-million"]
    zoo.main(["all_plots", *arguments, *more])
    with open("all.pkl", "rb") as file:
        return dict(pickle.load(file)["ns-X-v0"].get("PPO-logs", {}))


def test_unequal_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("seaborn")
    evaluations("ppo/ns-X-v0_1", [10, 20, 30], n_episodes=3, result=4.0)
    evaluations("ppo/ns-X-v0_2", [10, 20, 30], n_episodes=1, result=2.0)
    evaluations("ppo/ns-X-v0_3", [10, 20], result=9.0)
    found = all_plots()
    assert list(found["mean"]) == [3.0, 3.0, 3.0]  # each run counts once, whatever its number of episodes
    assert found["std_error_last_eval"] == pytest.approx(1 / np.sqrt(2))
    out = capsys.readouterr().out
    assert "logs/ppo/ns-X-v0_3 is left out: it has 2 evaluations, ns-X-v0_1 3 (-min 1 keeps it)" in out
    assert list(all_plots("-min", "1")["mean"]) == [5.0, 5.0]
    assert list(all_plots("-max", "20")["mean"]) == [5.0, 5.0]
    assert "left out" not in capsys.readouterr().out
    evaluations("ppo/ns-X-v0_4", [5, 15, 25])
    all_plots()
    assert "ns-X-v0_4 was evaluated after other numbers of timesteps than ns-X-v0_1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-max", "5"], "--max-timesteps leaves no evaluation: logs/ppo has them from 10 to 30"),
        (["-min", "50"], "--min-timesteps leaves no evaluation"),
        (["-k", "successes"], "evaluations.npz has timesteps, results, ep_lengths, not 'successes'"),
        (["-l", "one", "two"], "-l needs a label for each of the 1 folders of -f"),
        (["-e", "ns/Y-v0"], "no evaluations of ns-Y-v0 in logs/ppo: it has no runs there"),
    ],
    ids=" ".join,
)
def test_plots_that_would_be_empty(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("seaborn")
    evaluations("ppo/ns-X-v0_1", [10, 20, 30])
    arguments = ["-a", "ppo", "-e", "ns/X-v0", "-f", "logs", "--no-display"]
    assert said in refusal(["all_plots", *arguments, *more], capsys)


def test_a_table_has_no_numbers_of_runs_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("seaborn")
    evaluations("ppo/ns-X-v0_1", [10, 20, 30])
    all_plots("-a", "ppo", "a2c")
    assert "|ns-X-v0     |1 +/- 0|-   |" in capsys.readouterr().out


def test_plot_train_without_runs_or_screen(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("seaborn")
    zoo.main([*TRAIN, *SHORT, *SMALL])
    plot = ["plot_train", "-a", "ppo_ewma", "-f", "logs"]
    assert "no run of ns-X-v0 in logs/ppo_ewma, which has CartPole-v1_1" in refusal([*plot, "-e", "ns/X-v0"], capsys)
    assert "there is nothing to plot" in refusal([*plot, "-e", "CartPole-v1", "-o", "plot.png"], capsys)
    assert not Path("plot.png").exists()
    zoo.main([*plot, "-e", "CartPole-v1", "-w", "1"])
    assert "there is no screen to show the plot on: save it with -o FILE" in capsys.readouterr().out
    zoo.main([*plot, "-e", "CartPole-v1", "-w", "1", "-o", "plot.png"])
    assert Path("plot.png").stat().st_size > 0
    assert "no screen" not in capsys.readouterr().out
