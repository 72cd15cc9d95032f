"""Every entry of zoo_hyperparams: it exists, it builds a model unchanged, and a small run of it trains."""

from argparse import Namespace
from math import ceil
from pathlib import Path

import gymnasium as gym
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager

from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES, SHARED_FILES, hyperparameter_file
from tests import masked_envs  # noqa: F401  # registers environments

pytestmark = pytest.mark.long

zoo.register()
FILES = {algo: yaml.safe_load(hyperparameter_file(algo).read_text()) for algo in {**ALGORITHMS, **BASELINES}}
ONE_EPOCH, TUNED = (
    yaml.safe_load(hyperparameter_file(name).read_text()) for name in ("ppo_ewma_one_epoch", "ppo_ewma_tuned")
)
ZOO_PPO = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
ENTRIES = [pytest.param(algo, entry, id=f"{algo}-{entry}") for algo, entries in FILES.items() for entry in entries]


def is_trained(algo: str, entry: str) -> bool:
    """Entries that are those of another file, as tests make sure, are not all trained."""
    some = ("default", "atari", "CartPole-v1", "Pendulum-v1", "PendulumNoVel-v1", "MiniGrid-MemoryS7-v0", "Taxi-v4")
    return entry in some or algo in ("ppo_ewma", "ppo_lstm_ewma", "ppg")


TRAINED = [each for each in ENTRIES if each.values[0] not in SHARED_FILES and is_trained(*each.values)]


def task(algo: str, entry: str) -> str:
    """A task for the entries that are no task"""
    if entry == "default":
        return "Masked-v0" if "mask" in algo else "CliffWalking-v1"
    return "PongNoFrameskip-v4" if entry == "atari" else entry


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
    assert (
        set(FILES["ppo_ewma"])
        == set(FILES["ppg"])
        == {
            *(
                "default",
                "atari",
                "CartPole-v1",
                "Acrobot-v1",
                "MountainCar-v0",
                "MountainCarContinuous-v0",
                "Pendulum-v1",
            ),
            *("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"),
            *(name for name in mujoco if name.endswith("-v5")),
            *(name for name in ZOO_PPO if name.startswith("MiniGrid-")),
            *(f"MinAtar/{game}-v{version}" for game in games for version in (0, 1)),
        }
    )
    assert len([name for name in FILES["ppo_ewma"] if name.endswith("-v5")]) == 11


def test_ppg_ewma_has_the_entries_of_ppg_and_an_ewma():
    assert FILES["ppg_ewma"] == {name: {**entry, "prox_decay": "auto"} for name, entry in FILES["ppg"].items()}


def test_other_files_have_the_same_entries():
    names = ("n_policy_iterations", "aux_batch_size", "aux_learning_rate")
    for ppg, ppo in (("ppg_lstm", "ppo_lstm_ewma"), ("ppg_mask_lstm", "ppo_mask_lstm_ewma")):
        policy_phase = {
            entry: {**{name: value for name, value in settings.items() if name not in names}, "prox_decay": "auto"}
            for entry, settings in FILES[ppg].items()
        }
        assert policy_phase == FILES[ppo]
    for masked in ("ppo_mask_lstm_ewma", "ppg_mask_lstm"):
        for entry, settings in FILES[masked].items():
            unmasked = FILES[masked.replace("_mask", "")][entry]
            assert {**settings, "env_wrapper": None} == {**unmasked, "env_wrapper": None}
    changed = {
        "n_policy_iterations",
        "aux_batch_size",
        "aux_learning_rate",
        "n_epochs",
        "batch_size",
        "advantage_decay",
    }
    for entry, settings in FILES["ppg_mask"].items():
        assert {name: value for name, value in settings.items() if name not in changed} == FILES["ppo_mask"][entry]
    # Those that are shared are for two algorithms, which differ in this default.
    assert not any("prox_decay" in settings for name in SHARED_FILES for settings in FILES[name].values())


@pytest.mark.parametrize("entry", ONE_EPOCH)
def test_one_epoch_makes_as_many_gradient_steps(entry):
    several, one = FILES["ppo_ewma"][entry], ONE_EPOCH[entry]
    changed = ("n_epochs", "batch_size", "advantage_decay")
    assert {k: v for k, v in one.items() if k not in changed} == {k: v for k, v in several.items() if k not in changed}
    assert one["n_epochs"] == 1
    n_samples = one.get("n_envs", 1) * one.get("n_steps", 2048)
    steps = several.get("n_epochs", 10) * max(1, n_samples / several.get("batch_size", 64))
    assert steps / 2 < n_samples / one["batch_size"] <= steps
    span = (1 + one["advantage_decay"]) / (1 - one["advantage_decay"])
    assert span == pytest.approx(max(1, 2048 / n_samples, 8 / one.get("n_envs", 1)), rel=0.02)


@pytest.mark.parametrize("entry", FILES["ppg"])
def test_ppg_has_the_policy_phase_of_ppo_ewma_with_one_epoch(entry):
    settings, others = FILES["ppg"][entry], dict(ONE_EPOCH[entry])
    if entry.startswith("MinAtar/"):  # another network
        others |= {name: settings[name] for name in ("policy", "policy_kwargs")}
    auxiliary = {name for name in settings if name.startswith("aux_")} | {"n_policy_iterations"}
    policy_phase = {name: value for name, value in settings.items() if name not in auxiliary}
    del others["prox_decay"]
    assert policy_phase == others


@pytest.mark.parametrize(("algo", "entry"), ENTRIES)
def test_entry_builds_its_model(algo, entry, tmp_path):
    env_id = task(algo, entry)
    require(env_id)
    manager = ExperimentManager(Namespace(), algo, env_id, str(tmp_path), eval_freq=-1, verbose=0, device="cpu")
    model, _ = manager.setup_experiment()
    settings = FILES[algo][entry]
    assert manager.n_timesteps == settings["n_timesteps"]
    assert type(model) is {**ALGORITHMS, **BASELINES}[algo]
    assert model.n_envs == settings.get("n_envs", 1)
    if not algo.endswith("_ewma"):
        assert getattr(model, "current_prox_decay", None) is None
    else:
        # The center of mass of "auto" is the number of minibatches of an epoch, or of half of more than five.
        minibatches = ceil(model.n_envs * model.n_steps / model.batch_size)
        minibatches *= 1 if model.n_epochs <= 5 else model.n_epochs / 2
        assert model.current_prox_decay == pytest.approx(1 - 1 / (1 + minibatches))
    if algo.startswith("ppg"):
        check_phase(model, manager.n_timesteps, algo, entry)
    for name in {"gamma", "gae_lambda", "n_epochs", "ent_coef", "vf_coef", "max_grad_norm"} & set(settings):
        assert getattr(model, name) == settings[name]
    model.get_env().close()


def check_phase(model, n_timesteps: int, algo: str, entry: str) -> None:
    n_phases = n_timesteps / (model.n_envs * model.n_steps * model.n_policy_iterations)
    assert n_phases >= 6
    # As many rollouts as the paper has, unless twice as many would leave too few phases
    assert model.n_policy_iterations == 32 or n_phases / 2 < 6
    policy_phase = FILES[f"{algo.removesuffix('_ewma').replace('ppg', 'ppo')}_ewma"][entry]
    batch_size = policy_phase.get("batch_size", 128 if "lstm" in algo else 64)
    # A sequence at least
    assert model.aux_batch_size == max(batch_size, model.n_steps if "lstm" in algo else 1)
    for progress in (1.0, 0.5):
        assert model.aux_lr_schedule(progress) == model.lr_schedule(progress)


@pytest.mark.parametrize(("algo", "entry"), TRAINED)
def test_entry_trains(algo, entry, tmp_path, capsys):
    env_id = task(algo, entry)
    require(env_id)
    folder, device = ("-f", str(tmp_path)), ("--device", "cpu")
    arguments = ["--algo", algo, "--env", env_id, *folder, "-n", "64", "--eval-freq", "-1", *device]
    small = ["n_envs:2", "n_steps:16", "batch_size:8", "n_epochs:1"]
    # After the first of two rollouts, since what the second one logs is not printed
    has_phases = algo.startswith("ppg")
    phase = ["n_policy_iterations:1", "aux_batch_size:16"] if has_phases else []
    zoo.main(["train", *arguments, "-params", *small, *phase])
    printed = capsys.readouterr().out
    assert ("prox_center_of_mass" in printed) is algo.endswith("_ewma")
    assert ("policy_kl" in printed) is has_phases


def test_tuned_entries_by_name(tmp_path):
    assert TUNED.keys() == {"CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MinAtar/SpaceInvaders-v1"}
    for env_id, settings in TUNED.items():
        if env_id not in gym.registry:
            continue
        manager = ExperimentManager(
            Namespace(),
            "ppo_ewma",
            env_id,
            str(tmp_path),
            eval_freq=-1,
            verbose=0,
            device="cpu",
            config="ppo_ewma_tuned.yml",
        )
        model, _ = manager.setup_experiment()
        assert manager.n_timesteps == settings["n_timesteps"]
        for name in ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "kl_coef"):
            assert getattr(model, name) == settings[name]
        assert model.n_envs == settings["n_envs"]
        assert model.current_prox_decay == settings["prox_decay"]
        model.learn(model.n_envs)
        model.get_env().close()
