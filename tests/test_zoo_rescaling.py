"""Rescaling through the zoo: the script, training, trials of a study, and what is not searched."""

import re
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sb3_ppo_ewma import PPOEWMA, zoo
from sb3_ppo_ewma.batch_scaling import with_defaults
from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS
from sb3_ppo_ewma.zoo.rescaling import as_yaml, rescaled

pytestmark = pytest.mark.long

zoo.register()
FILES = sorted((Path(__file__).parents[1] / "zoo_hyperparams").glob("*.yml"))

ENTRY = {
    "n_envs": 4,
    "n_timesteps": 1e5,
    "policy": "MlpPolicy",
    "n_steps": 8,
    "batch_size": 8,
    "n_epochs": 1,
    "learning_rate": "lin_1e-3",
    "advantage_decay": 0.5,
    "policy_kwargs": "dict(net_arch=[8], activation_fn=nn.ReLU)",
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("entries.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))


CARTPOLE = ["--env", "CartPole-v1", "--conf-file", "entries.yml"]
PAPER = ["--strategy", "paper"]
TRAIN = ["train", *CARTPOLE, "-f", "logs", "--eval-freq", "-1", "--device", "cpu", "-n", "64"]


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    assert refused.value.code not in (0, None)
    return refused.value.code if isinstance(refused.value.code, str) else capsys.readouterr().err


def saved_config(algo, number=1):
    text = Path(f"logs/{algo}/CartPole-v1_{number}/CartPole-v1/config.yml").read_text()
    return dict(yaml.unsafe_load(text))


# === The script ===


def test_it_prints_a_table_and_an_entry_that_can_be_used(capsys):
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "1", *PAPER])
    table, _, text = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == [
        "n_envs", "batch_size", "learning_rate", "prox_decay", "advantage_decay", "max_grad_norm",
    ]  # fmt: skip
    entry = yaml.safe_load(text)["CartPole-v1"]
    kept = {
        name: value for name, value in ENTRY.items() if name in ("policy", "policy_kwargs", "n_steps", "n_timesteps")
    }
    # 4 minibatches of 8 samples, and a span of 3 iterations
    assert entry == pytest.approx(
        {**kept, "n_envs": 1, "batch_size": 2, "n_epochs": 1, "learning_rate": "lin_0.0005"}
        | {"prox_decay": 16 / 17, "advantage_decay": 11 / 13, "max_grad_norm": 1.0}
    )
    Path("entries.yml").write_text(text)
    zoo.main([*TRAIN, "--algo", "ppo_ewma"])
    assert saved_config("ppo_ewma") == entry


def test_by_default_an_iteration_keeps_its_samples(capsys):
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "2", "-params", "n_epochs:4"])
    table, _, text = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["n_envs", "n_steps"]
    assert yaml.safe_load(text)["CartPole-v1"] == {**ENTRY, "n_envs": 2, "n_steps": 16, "n_epochs": 4}


def test_warnings_are_printed(capsys):
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "8", *PAPER])
    assert "\nWarning: A minibatch now has 16 samples; that may be more than the critical" in capsys.readouterr().out


def test_parameters_of_the_command_line(capsys):
    arguments = ["rescale", "--algo", "ppg_ewma", *CARTPOLE, "--n-envs", "2", "--adam-betas", *PAPER]
    zoo.main([*arguments, "-params", "learning_rate:1e-4", "n_policy_iterations:5"])
    entry = yaml.safe_load(capsys.readouterr().out.partition("\n\n")[2])["CartPole-v1"]
    assert entry["learning_rate"] == pytest.approx(1e-4 / 2**0.5)
    assert entry["n_policy_iterations"] == 10
    assert entry["aux_batch_size"] == 2  # of None, a sixteenth of a rollout
    assert "aux_learning_rate" not in entry  # the default, before and after
    assert entry["policy_kwargs"].startswith("dict(net_arch=[8], activation_fn=nn.ReLU, optimizer_kwargs=dict(eps=")


def test_what_cannot_be_rescaled(capsys):
    arguments = ["rescale", "--algo", "ppo_ewma", *CARTPOLE]
    assert "n_envs must be >= 1, got 0" in refusal([*arguments, "--n-envs", "0"], capsys)
    assert "nearest possible: 2 and 4" in refusal([*arguments, "--n-envs", "3"], capsys)
    odd = [*arguments, "--n-envs", "3", "-params", "batch_size:6", *PAPER]
    assert "batch_size=6 times 3/4 is 4.5, not a whole number of samples" in refusal(odd, capsys)
    many = [*arguments, "--n-envs", "2", "-params", "n_epochs:4", *PAPER]
    assert "n_epochs=4 cannot be rescaled with strategy='paper'" in refusal(many, capsys)
    betas = [*arguments, "--n-envs", "2", "--adam-betas"]
    assert "adam_betas belongs to strategy='paper'" in refusal(betas, capsys)
    assert "invalid choice: 'ppo'" in refusal(["rescale", "--algo", "ppo", *CARTPOLE, "--n-envs", "2"], capsys)
    assert "--n-envs" in refusal(arguments, capsys)
    unknown = ["rescale", "--algo", "ppo_ewma", "--env", "Nowhere-v0", "--n-envs", "2"]
    assert "Nowhere-v0 not found in gym registry" in refusal(unknown, capsys)


def test_entries_with_one_epoch_by_name(capsys):
    arguments = ["--algo", "ppo_ewma", "--env", "CartPole-v1", "--conf-file", "ppo_ewma_one_epoch.yml"]
    zoo.main(["rescale", *arguments, "--n-envs", "2"])
    assert "8 → 2  " in capsys.readouterr().out
    Path("ppo_ewma_one_epoch.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))  # the user's file
    zoo.main(["rescale", *arguments, "--n-envs", "2"])
    assert "4 → 2" in capsys.readouterr().out


def test_policy_kwargs_of_python_become_text():
    from torch import nn, optim

    kwargs = {"net_arch": {"pi": [4], "vf": [8]}, "activation_fn": nn.Tanh, "optimizer_class": optim.SGD}
    entry = {**ENTRY, "policy_kwargs": kwargs}
    text = yaml.safe_load(as_yaml("X", entry))["X"]["policy_kwargs"]
    assert text == "dict(net_arch=dict(pi=[4], vf=[8]), activation_fn=nn.Tanh, optimizer_class=th.optim.SGD)"
    new = rescaled("ppo_ewma", {**entry, "policy_kwargs": text}, 1, "paper").hyperparameters
    assert new["policy_kwargs"] == text
    assert new["learning_rate"] == "lin_0.00025"  # of SGD


# === Training ===


def test_train_with_another_number_of_environments(capsys):
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "2", "-params", "n_epochs:4", "-n", "64"])
    printed = capsys.readouterr().out
    assert "Hyper-parameters tuned for 4 environments, for 2:" in printed
    assert "Using 2 environments" in printed
    config = saved_config("ppo_ewma")
    assert list(config) == sorted(config)
    assert config == {**ENTRY, "n_envs": 2, "n_epochs": 4, "tuned_for_n_envs": 4}
    model = PPOEWMA.load("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip")
    assert (model.n_envs, model.n_steps, model.batch_size) == (2, 16, 8)
    # 64 steps are 2 iterations of 32 samples, with 4 epochs
    assert (model.num_timesteps, model._n_updates) == (64, 8)


def test_an_agent_is_trained_further_with_another_number_of_environments():
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "2"])
    agent = "logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip"
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "-i", agent, "--n-envs", "1", "-params", "batch_size:16"])
    model = PPOEWMA.load("logs/ppo_ewma/CartPole-v1_2/CartPole-v1.zip")
    assert (model.n_envs, model.n_steps, model.batch_size) == (1, 32, 16)
    assert model.tuned_hyperparameters["n_steps"] == 8


def test_an_entry_that_is_for_another_number(capsys):
    entry = {**ENTRY, "n_envs": 1, "tuned_for_n_envs": 4}
    Path("entries.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "2"])
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n\n")[2])["CartPole-v1"]
    assert printed == {**ENTRY, "n_envs": 2, "n_steps": 16}
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "2"])
    assert saved_config("ppo_ewma") == {**entry, "n_envs": 2}
    assert PPOEWMA.load("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip").n_steps == 16
    # A search is for the number that it is made with
    zoo.main([*SEARCH, "--algo", "ppo_ewma", *SMALL])
    zoo.main([*TRAIN, "--algo", "ppo_ewma", *STUDY, "--trial-id", "1", "-params", "policy:MlpPolicy"])
    again = saved_config("ppo_ewma", 2)
    assert (again["n_envs"], again["n_steps"], "tuned_for_n_envs" in again) == (1, 32, False)


def test_train_says_why_not(capsys):
    assert "nearest possible: 2 and 4" in refusal([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "3"], capsys)
    assert not list(Path("logs").glob("*/*"))
    upstream = [*TRAIN, "--algo", "ppo", "--n-envs", "2", "-params", "advantage_decay:0"]
    assert "--n-envs rescales hyper-parameters of ppo_ewma" in refusal(upstream, capsys)
    assert "n_envs must be >= 1, got 0" in refusal([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "0"], capsys)


def test_options_do_not_outlive_their_command():
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--n-envs", "2"])
    assert options.current == options.Options()
    zoo.main([*TRAIN, "--algo", "ppo_ewma"])
    assert [saved_config("ppo_ewma", number)["n_envs"] for number in (1, 2)] == [2, 4]


@pytest.mark.parametrize("given", [None, {"sb3_ppo_ewma.NoiseScaleCallback": {"n_batches": 2}}])
def test_advice(given, capsys):
    entry = {**ENTRY, "learning_rate": 0.0} | ({} if given is None else {"callback": given})
    Path("entries.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--advice", "-n", "1280"])  # 40 iterations
    assert "Advice after" in capsys.readouterr().out
    assert saved_config("ppo_ewma")["callback"] == [*([] if given is None else [given]), "sb3_ppo_ewma.AdviceCallback"]
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "-n", "1280"])
    assert "Advice after" not in capsys.readouterr().out


def test_help_has_them(capsys):
    with pytest.raises(SystemExit) as ended:
        zoo.main(["train", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.index("--trained-agent") < printed.index("--n-envs N")


# === Trials ===

STUDY = ["--study-name", "study", "--storage", "study.log"]
SEARCH = [*TRAIN, "-optimize", *STUDY, "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1",
          "--no-optim-plots", "--seed", "0"]  # fmt: skip
SMALL = ["--fix", "n_epochs:1", "batch_size_pow:3", "n_steps_pow:5", "net_arch:tiny"]


def trials():
    storage = optuna.storages.JournalStorage(JournalFileBackend("study.log"))
    return optuna.load_study(study_name="study", storage=storage).trials


@pytest.mark.parametrize("algo", ["ppo_ewma", "ppg_ewma"])
def test_a_trial_is_trained_again_with_more_environments(algo, capsys):
    zoo.main([*SEARCH, "--algo", algo, "--n-envs", "2", *SMALL])
    assert [trial.state for trial in trials()] == [TrialState.COMPLETE] * 2
    assert {trial.params["n_epochs"] for trial in trials()} == {1}
    assert len({trial.params["learning_rate"] for trial in trials()}) == 2
    chosen = trials()[1]
    # The file has 4 environments, the trial had 2.
    again = [*TRAIN, "--algo", algo, *STUDY, "--trial-id", "1", "-params", "policy:MlpPolicy"]
    zoo.main([*again, "--n-envs", "4"])
    config = saved_config(algo)
    assert (config["n_envs"], config["tuned_for_n_envs"], config["n_steps"]) == (4, 2, 32)
    assert config["learning_rate"] == chosen.params["learning_rate"]
    model = zoo.algorithms.ALGORITHMS[algo].load(f"logs/{algo}/CartPole-v1_1/CartPole-v1.zip")
    assert (model.n_envs, model.n_steps, model.batch_size) == (4, 16, 8)
    capsys.readouterr()
    zoo.main(["rescale", *CARTPOLE, "--algo", algo, *STUDY, "--trial-id", "1", "--n-envs", "4"])
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n\n")[2])["CartPole-v1"]
    assert (printed["n_envs"], printed["n_steps"], printed["learning_rate"]) == (4, 16, config["learning_rate"])
    assert "activation_fn=nn." in printed["policy_kwargs"]


@pytest.mark.parametrize(
    ("fixed", "reason"),
    [
        ("n_epoch:1", "--fix n_epoch: the search of ppo_ewma has .*n_epochs"),
        ("n_epochs:2", "--fix n_epochs: 2 is not within"),
        ("learning_rate:1.0", "--fix learning_rate: 1.0 is not within"),
        ("learning_rate:fast", "--fix learning_rate: 'fast' is not within"),
    ],
)
def test_what_cannot_be_fixed(fixed, reason, capsys):
    assert re.search(reason, refusal([*SEARCH, "--algo", "ppo_ewma", "--fix", fixed], capsys), re.S)
    assert not Path("study.log").exists()


# === The entries ===


@pytest.mark.filterwarnings("ignore:Rollouts of .* environments have")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_entry_can_be_rescaled(file):
    entries = yaml.safe_load(file.read_text())
    assert entries
    if file.stem == "ppo_mask":  # also read by an algorithm that is not ours
        algo = "ppo_mask_ewma"
    else:
        algo = next(algo for algo in sorted(ALGORITHMS, key=len, reverse=True) if file.stem.startswith(algo))
    for env_id, entry in entries.items():
        complete = with_defaults(ALGORITHMS[algo], entry)
        n_samples = complete["n_envs"] * complete["n_steps"]
        for n_envs in (1, 4, 16, 64, 256):
            if not algo.endswith("_ewma") and n_envs > n_samples:
                with pytest.raises(ValueError, match=f"{n_samples} samples, fewer than environments.*nearest"):
                    rescaled(algo, entry, n_envs)
                continue
            new = {**complete, **rescaled(algo, entry, n_envs).hyperparameters}
            assert new["n_envs"] == n_envs, env_id
            n_new = n_envs * new["n_steps"]
            assert n_new >= n_samples
            if n_new > n_samples:  # in minibatches of the same size
                assert new["n_steps"] <= 8
                assert new["batch_size"] == min(complete["batch_size"], n_samples)
            if "n_policy_iterations" in complete:  # a phase of the same samples
                assert new["n_policy_iterations"] * n_new == complete["n_policy_iterations"] * n_samples
