"""Search for hyper-parameters: the space, bad trials, studies on disk, re-training of a trial."""

import os
import subprocess
import sys

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_ppo_ewma import PPOEWMA, RecurrentPPOEWMA, zoo
from sb3_ppo_ewma.ewma import center_of_mass_from_decay

SEARCH = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-n", "64", "-optimize", "--n-evaluations", "1"]
QUICK = ["--no-optim-plots", "--eval-episodes", "1", "--device", "cpu", "--seed", "0", "-f", "logs"]
STUDY = ["--study-name", "study"]
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
# The same in the constructor's words
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


@pytest.mark.parametrize("algo", ["ppo_ewma", "ppo_lstm_ewma"])
def test_converter_returns_what_the_sampler_returned(algo):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sampled = []
    for _ in range(300):
        trial = study.ask()
        sampled.append(HYPERPARAMS_SAMPLER[algo](trial, 0, 1, {}))
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled[-1]
    spaces = {tuple(sorted(trial.distributions.items())) for trial in study.trials}
    assert len(spaces) == 1, "TPE models parameters jointly only if every trial draws the same ones"
    with_clip = [params for params in sampled if params["clip_range"] > 0]
    with_kl = [params for params in sampled if params["kl_coef"] > 0]
    assert len(with_clip) + len(with_kl) == 300, "one objective each"
    assert min(len(with_clip), len(with_kl)) > 100
    centers = np.array([center_of_mass_from_decay(params["prox_decay"]) for params in sampled])
    assert centers.min() >= 1
    assert centers.max() <= 1000.001
    for low, high in ((1, 10), (10, 100), (100, 1001)):  # log scale: a third in each
        assert 70 < ((low <= centers) & (centers < high)).sum() < 130


@pytest.mark.parametrize(
    ("algo", "algorithm", "policy"),
    [("ppo_ewma", PPOEWMA, "MlpPolicy"), ("ppo_lstm_ewma", RecurrentPPOEWMA, "MlpLstmPolicy")],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")  # larger than the rollout
def test_the_constructor_takes_all_that_is_sampled(algo, algorithm, policy):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        params = HYPERPARAMS_SAMPLER[algo](study.ask(), 0, 1, {})
        algorithm(policy, "CartPole-v1", device="cpu", **params)


def test_conversion_by_hand():
    converted = HYPERPARAMS_CONVERTER["ppo_ewma"](TRIAL)
    assert {name: converted[name] for name in HYPERPARAMS} == pytest.approx(HYPERPARAMS)
    clipped = HYPERPARAMS_CONVERTER["ppo_ewma"]({**TRIAL, "objective": "clip"})
    assert (clipped["clip_range"], clipped["kl_coef"]) == (0.1, 0.0)


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


@pytest.mark.parametrize("algo", ["ppo_ewma", "ppo_lstm_ewma", "ppo"])
@pytest.mark.parametrize("storage", ["study.log", "sqlite:///study.db"])
def test_search_and_train_the_trial_again(algo, storage, tmp_path):
    env = ["--env", "CartPoleNoVel-v1" if algo == "ppo_lstm_ewma" else "CartPole-v1"]
    if storage.endswith(".log"):
        new_study(journal(storage), [TRIAL, {**TRIAL, "objective": "clip", "one_minus_gamma": 0.01}])
    else:
        new_study(storage, [TRIAL, {**TRIAL, "objective": "clip", "one_minus_gamma": 0.01}])
    options = ["--algo", algo, *env, *STUDY, "--storage", storage]
    zoo.main([*SEARCH, *QUICK, *options, "--n-trials", "2"])
    assert list((tmp_path / "logs" / algo).glob("report_*.csv"))
    for trial, gamma in ((0, 0.98), (1, 0.99)):
        again = ["-n", "64", "--eval-freq", "-1", "-f", f"trial_{trial}", "--trial-id", str(trial)]
        zoo.main(["train", *options, *again, "-params", "ent_coef:0.25", "n_envs:1"])
        (file,) = (tmp_path / f"trial_{trial}").rglob("config.yml")
        config = yaml.unsafe_load(file.read_text())
        assert config["gamma"] == pytest.approx(gamma)
        assert config["ent_coef"] == 0.25  # the command line goes before the trial
        if algo != "ppo":
            assert config["prox_decay"] == pytest.approx(0.75)
            assert config["clip_range"] == (-1 if trial == 0 else 0.1)


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
