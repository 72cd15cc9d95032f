"""Search for hyper-parameters: the space, bad trials, studies on disk, re-training of a trial."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from torch import nn

from sb3_ppo_ewma import SmallGridCNN, zoo
from sb3_ppo_ewma.ewma import center_of_mass_from_decay
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS

pytestmark = pytest.mark.long

SEARCH = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-n", "64", "-optimize", "--n-evaluations", "1"]
QUICK = ["--no-optim-plots", "--eval-episodes", "1", "--device", "cpu", "--seed", "0", "-f", "logs"]
STUDY = ["--study-name", "study"]
STORAGES = ["study.log", "sqlite:///study.db"]
GRID = "dict(features_extractor_class=SmallGridCNN)"
# What the sampler draws in a trial that takes a moment
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
    "prox_center_of_mass": 3.0,
    "objective": "kl",
    "kl_coef": 2.0,
}
# What the sampler of ppg_ewma draws beyond that of ppo, but for the length of a phase, which the budget gives
PPG_TRIAL = {
    "n_policy_iterations_pow": 2,
    "n_aux_epochs": 2,
    "aux_batch_size_pow": 6,
    "aux_learning_rate": 1e-3,
    "beta_clone": 0.5,
    "critic_arch": "detach",
    "trunk_layers": 1,
    "prox_center_of_mass": 3.0,
}
# What the samplers of recurrent algorithms draw
LSTM_TRIAL = {"lstm_hidden_size": 16, "critic_lstm": "shared"}
# TRIAL in the constructor's words
HYPERPARAMS = {
    "batch_size": 16,
    "n_steps": 32,
    "gamma": 0.98,
    "gae_lambda": 0.95,
    "learning_rate": 3e-4,
    "ent_coef": 0.01,
    "clip_range": -1,
    "n_epochs": 1,
    "max_grad_norm": 0.5,
    "prox_decay": 0.75,
    "kl_coef": 2.0,
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.register()


def journal(file: str) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(JournalFileBackend(file))


def new_study(storage, trials: list[dict]) -> None:
    """A study whose next trials are given."""
    study = optuna.create_study(storage=storage, study_name="study", direction="maximize")
    for trial in trials:
        study.enqueue_trial(trial)


def states(storage) -> list[TrialState]:
    return [trial.state for trial in optuna.load_study(storage=storage, study_name="study").trials]


def draw(algo: str, n_envs: int = 1, n_timesteps: int | None = None, count: int = 300) -> list[dict]:
    """Draw at random what the constructor gets, and check what holds for all samplers and converters."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled = []
    for _ in range(count):
        trial = study.ask()
        if n_timesteps is not None:
            trial.set_user_attr("n_timesteps", n_timesteps)
        sampled.append(HYPERPARAMS_SAMPLER[algo](trial, 0, n_envs, {}))
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled[-1]
    spaces = {tuple(sorted(trial.distributions.items())) for trial in study.trials}
    assert len(spaces) == 1, "TPE models parameters jointly only if every trial draws the same ones"
    return sampled


def check_center_of_mass(sampled: list[dict]) -> None:
    centers = np.array([center_of_mass_from_decay(params["prox_decay"]) for params in sampled])
    assert centers.min() >= 1
    assert centers.max() <= 1000.001
    for low, high in ((1, 10), (10, 100), (100, 1001)):  # log scale: a third in each
        assert 70 < ((low <= centers) & (centers < high)).sum() < 130


@pytest.mark.parametrize("algo", [name for name in ALGORITHMS if name.startswith("ppo")])
def test_space_of_ppo_ewma(algo):
    sampled = draw(algo)
    with_clip = [params for params in sampled if params["clip_range"] > 0]
    with_kl = [params for params in sampled if params["kl_coef"] > 0]
    assert len(with_clip) + len(with_kl) == 300, "one objective each"
    assert min(len(with_clip), len(with_kl)) > 100
    check_center_of_mass(sampled)


@pytest.mark.parametrize("algo", [name for name in ALGORITHMS if name.startswith("ppg")])
def test_space_of_ppg(algo):
    sampled = draw(algo, n_timesteps=10**8)
    assert {params["n_policy_iterations"] for params in sampled} == {2, 4, 8, 16, 32}
    assert {params["n_aux_epochs"] for params in sampled} == set(range(1, 10))
    assert {params["aux_batch_size"] for params in sampled} == {2**power for power in range(5, 13)}
    for name, low, high in (("aux_learning_rate", 1e-5, 2e-3), ("beta_clone", 0.1, 10)):
        values = np.array([params[name] for params in sampled])
        assert low <= values.min() < 1.2 * low
        assert high / 1.2 < values.max() <= high
    if "lstm" in algo:
        assert not any({"critic_arch", "trunk_arch"} & set(params["policy_kwargs"]) for params in sampled)
    else:
        assert {params["policy_kwargs"]["critic_arch"] for params in sampled} == {"dual", "shared", "detach"}
        networks = {str([params["policy_kwargs"][name] for name in ("trunk_arch", "net_arch")]) for params in sampled}
        assert len(networks) == 6  # of three sizes, with and without a trunk
    if algo.endswith("_ewma"):
        check_center_of_mass(sampled)
    else:
        assert not any("prox_decay" in params for params in sampled)


@pytest.mark.parametrize("algo", [name for name in ALGORITHMS if "lstm" in name])
def test_space_of_lstms(algo):
    switches = ("lstm_hidden_size", "enable_critic_lstm", "shared_lstm")
    drawn = {tuple(params["policy_kwargs"][name] for name in switches) for params in draw(algo)}
    critics = [(True, False), (False, True), (False, False)]  # an LSTM of its own, the policy's, none
    assert drawn == {(size, *critic) for size in (16, 32, 64, 128, 256, 512) for critic in critics}


def test_masks_change_no_space():
    for algo in ALGORITHMS:
        if "mask" in algo:
            assert draw(algo, count=20) == draw(algo.replace("_mask", ""), count=20)
    assert draw("ppo_mask", count=20) == draw("ppo", count=20)


@pytest.mark.parametrize(("n_envs", "n_timesteps"), [(1, 20_000), (8, 50_000), (64, 10**7), (4, None)])
def test_four_phases_fit_into_the_budget(n_envs, n_timesteps):
    for params in draw("ppg", n_envs, n_timesteps, count=100):
        longest = (n_timesteps or 100_000) / 4
        rollout = n_envs * params["n_steps"]
        assert 1 <= params["n_policy_iterations"] <= 32
        assert params["n_policy_iterations"] * rollout <= longest or params["n_policy_iterations"] == 1


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")  # larger than the rollout
def test_the_constructor_takes_all_that_is_sampled(algo):
    policy = "MlpLstmPolicy" if "lstm" in algo else "MlpPolicy"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        params = HYPERPARAMS_SAMPLER[algo](study.ask(), 0, 1, {})
        ALGORITHMS[algo](policy, "CartPole-v1", device="cpu", **params)


def test_conversion_by_hand():
    converted = HYPERPARAMS_CONVERTER["ppo_ewma"](TRIAL)
    assert {name: converted[name] for name in HYPERPARAMS} == pytest.approx(HYPERPARAMS)
    clipped = HYPERPARAMS_CONVERTER["ppo_ewma"]({**TRIAL, "objective": "clip"})
    assert (clipped["clip_range"], clipped["kl_coef"]) == (0.1, 0.0)


def test_conversion_of_ppg_by_hand():
    ppo_trial = {name: value for name, value in TRIAL.items() if name not in ("objective", "kl_coef")}
    converted = HYPERPARAMS_CONVERTER["ppg_ewma"]({**ppo_trial, **PPG_TRIAL, "longest_phase": 96, "net_arch": "small"})
    policy_kwargs = {
        "activation_fn": nn.ReLU,
        "critic_arch": "detach",
        "trunk_arch": [64],
        "net_arch": {"pi": [64], "vf": [64]},
    }
    assert converted.pop("policy_kwargs") == policy_kwargs
    expected = {
        **{name: value for name, value in HYPERPARAMS.items() if name != "kl_coef"},
        "clip_range": 0.1,
        "n_policy_iterations": 3,  # of the 4 drawn, 3 fit into 96 steps of each environment
        "n_aux_epochs": 2,
        "aux_batch_size": 64,
        "aux_learning_rate": 1e-3,
        "beta_clone": 0.5,
    }
    assert converted == pytest.approx(expected)


def test_bad_trials_do_not_end_a_study(monkeypatch, capsys):
    good = HYPERPARAMS_SAMPLER["ppo_ewma"]
    # Refused by the constructor: value, type; NaN in training; out of memory; nothing wrong
    memory = {"policy_kwargs": {"net_arch": [2**50]}}
    bad = [{"prox_decay": 2.0}, {"prox_decay": [0.5]}, {"learning_rate": 1e38}, memory, {}]

    def sampler(trial: optuna.Trial, *args):
        return {**good(trial, *args), **bad[trial.number]}

    monkeypatch.setitem(HYPERPARAMS_SAMPLER, "ppo_ewma", sampler)
    new_study(journal("study.log"), [TRIAL] * 5)
    zoo.main([*SEARCH, *QUICK, *STUDY, "--storage", "study.log", "--n-trials", "5"])
    assert states(journal("study.log")) == [TrialState.PRUNED] * 4 + [TrialState.COMPLETE]
    assert "Trial 0 is pruned: prox_decay must be" in capsys.readouterr().out


@pytest.mark.parametrize("storage", [[], ["--storage", "study.log"], ["--storage", "sqlite:///study.db"]])
def test_a_study_without_a_completed_trial(storage):
    options = [*storage, "--n-trials", "2", "-params", "staleness:-1", "n_envs:1"]
    with pytest.raises(SystemExit, match="no trial was completed"):
        zoo.main([*SEARCH, *QUICK, *STUDY, *options])


@pytest.mark.parametrize(
    ("algo", "storage"),
    [
        *((algo, storage) for algo in ("ppo_ewma", "ppo_lstm_ewma", "ppo") for storage in STORAGES),
        ("ppg", STORAGES[0]),
        ("ppg_ewma", STORAGES[0]),
    ],
)
def test_search_and_train_the_trial_again(algo, storage, tmp_path):
    env = ["--env", "CartPoleNoVel-v1" if algo == "ppo_lstm_ewma" else "CartPole-v1"]
    drawn = {**TRIAL, **(PPG_TRIAL if algo.startswith("ppg") else {}), **(LSTM_TRIAL if "lstm_ewma" in algo else {})}
    trials = [drawn, {**drawn, "objective": "clip", "one_minus_gamma": 0.01}]
    new_study(journal(storage) if storage.endswith(".log") else storage, trials)
    options = ["--algo", algo, *env, *STUDY, "--storage", storage]
    zoo.main([*SEARCH, *QUICK, *options, "--n-trials", "2"])
    assert list((tmp_path / "logs" / algo).glob("report_*.csv"))
    for trial, gamma in ((0, 0.98), (1, 0.99)):
        again = ["-n", "64", "--eval-freq", "-1", "-f", f"trial_{trial}", "--trial-id", str(trial)]
        zoo.main(["train", *options, *again, "-params", "ent_coef:0.25", "n_envs:1"])
        (file,) = (tmp_path / f"trial_{trial}").rglob("config.yml")
        config = yaml.unsafe_load(file.read_text())
        assert config["gamma"] == pytest.approx(gamma)
        assert config["ent_coef"] == 0.25  # the command line overrides the trial
        if algo.endswith("_ewma"):
            assert config["prox_decay"] == pytest.approx(0.75)
        if algo in ("ppo_ewma", "ppo_lstm_ewma"):
            assert config["clip_range"] == (-1 if trial == 0 else 0.1)
        if algo.startswith("ppg"):
            assert config["n_policy_iterations"] == 1  # in a budget of 64 steps
            assert config["policy_kwargs"]["critic_arch"] == "detach"


# The file of PPG gives MinAtar games a features extractor by name, that of PPO-EWMA does not.
@pytest.mark.parametrize(("algo", "params"), [("ppg", []), ("ppo_ewma", ["policy:CnnPolicy", f"policy_kwargs:{GRID}"])])
def test_a_features_extractor_is_kept_in_a_search(algo, params, tmp_path):
    pytest.importorskip("minatar")
    drawn = {**TRIAL, **(PPG_TRIAL if algo == "ppg" else {})}
    new_study(journal("study.log"), [drawn])
    options = ["--algo", algo, "--env", "MinAtar/Breakout-v1", *STUDY, "--storage", "study.log"]
    zoo.main([*SEARCH, *QUICK, *options, "--n-trials", "1", "-params", "n_envs:1", *params])
    assert states(journal("study.log")) == [TrialState.COMPLETE]
    again = ["-n", "64", "--eval-freq", "-1", "-f", "again", "--trial-id", "0", "-params", "n_envs:1", *params]
    zoo.main(["train", *options, *again])
    (file,) = (tmp_path / "again").rglob("*.zip")
    policy = ALGOS[algo].load(file).policy
    trunk = policy.features_extractor
    assert isinstance(trunk.extractor if algo == "ppg" else trunk, SmallGridCNN)
    assert policy.activation_fn is nn.ReLU  # of the trial


def test_a_trial_completes_the_policy_kwargs_of_the_task(tmp_path):
    new_study(journal("study.log"), [TRIAL])
    options = [*STUDY, "--storage", "study.log", "-n", "64", "-params", "n_envs:1"]
    Path("my.yml").write_text(
        "CartPole-v1: {policy: MlpPolicy, policy_kwargs: 'dict(ortho_init=False)', n_timesteps: 64}"
    )
    zoo.main([*SEARCH, *QUICK, "-conf", "my.yml", "--n-trials", "1", *options])
    train = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--eval-freq", "-1", "-f", "again"]
    zoo.main([*train, "-conf", "my.yml", "--trial-id", "0", *options])
    (file,) = (tmp_path / "again").rglob("config.yml")
    assert yaml.unsafe_load(file.read_text())["policy_kwargs"] == {
        "ortho_init": False,
        "net_arch": {"pi": [64], "vf": [64]},
        "activation_fn": nn.ReLU,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trial-id", "1"], "study study has no trial 1"),
        (["--trial-id", "0", "--study-name", "other"], "study.log has no study other"),
        (["--trial-id", "0"], "trial 0 of study study has no 'one_minus_gamma'"),
    ],
)
def test_a_trial_that_cannot_be_trained_again(options, said):
    new_study(journal("study.log"), [TRIAL])  # not started
    with pytest.raises(SystemExit, match=said):
        zoo.main(["train", "--algo", "ppo_ewma", *STUDY, "--storage", "study.log", *options])


def test_two_processes_share_a_study():
    new_study(journal("study.log"), [TRIAL] * 4)
    command = [sys.executable, "-m", "sb3_ppo_ewma.zoo", *SEARCH, *QUICK, *STUDY, "--storage", "study.log"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([*command, "--n-trials", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert states(journal("study.log")) == [TrialState.COMPLETE] * 4
    ran = [sorted(number for number in range(4) if f"Trial {number} finished".encode() in err) for _, err in outputs]
    assert [len(numbers) for numbers in ran] == [2, 2]
    assert sorted(ran[0] + ran[1]) == [0, 1, 2, 3], "every trial once"
