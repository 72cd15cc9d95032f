"""Rescaling through the zoo: the script, training, trials of a study, and what is not searched."""

import re
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sb3_ppo_ewma import PPOEWMA, zoo
from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.algorithms import ONE_EPOCH, hyperparameter_file
from sb3_ppo_ewma.zoo.rescaling import as_yaml, rescaled

pytestmark = pytest.mark.long

zoo.register()

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
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "1"])
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


def test_warnings_are_printed(capsys):
    zoo.main(["rescale", "--algo", "ppo_ewma", *CARTPOLE, "--n-envs", "8"])
    assert "\nWarning: A minibatch now has 16 samples; that may be more than the critical" in capsys.readouterr().out


def test_parameters_of_the_command_line(capsys):
    arguments = ["rescale", "--algo", "ppg_ewma", *CARTPOLE, "--n-envs", "2", "--adam-betas"]
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
    odd = [*arguments, "--n-envs", "3", "-params", "batch_size:6"]
    assert "batch_size=6 times 3/4 is 4.5, not a whole number of samples" in refusal(odd, capsys)
    many = [*arguments, "--n-envs", "2", "-params", "n_epochs:4"]
    assert "n_epochs=4 cannot be rescaled, only one policy epoch: --conf-file ppo_ewma_one" in refusal(many, capsys)
    many[2] = "ppg_ewma"
    assert "n_epochs=4 cannot be rescaled: with several policy epochs" in refusal(many, capsys)
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
    new = rescaled("ppo_ewma", {**entry, "policy_kwargs": text}, 1).hyperparameters
    assert new["policy_kwargs"] == text
    assert new["learning_rate"] == "lin_0.00025"  # of SGD


# === Training ===


def test_train_with_another_number_of_environments(capsys):
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--rescale-to-n-envs", "2"])
    printed = capsys.readouterr().out
    assert "Rescaled from 4 environments:" in printed
    assert "Using 2 environments" in printed
    config = saved_config("ppo_ewma")
    assert list(config) == sorted(config)
    assert (config["n_envs"], config["batch_size"]) == (2, 4)
    model = PPOEWMA.load("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip")
    assert model.batch_size == 4
    assert model.lr_schedule(1.0) == pytest.approx(1e-3 / 2**0.5)
    assert model.current_prox_decay == pytest.approx(8 / 9)


def test_train_says_why_not(capsys):
    assert "n_epochs=4 cannot be rescaled" in refusal(
        [*TRAIN, "--algo", "ppo_ewma", "--rescale-to-n-envs", "2", "-params", "n_epochs:4"], capsys
    )
    assert not list(Path("logs").glob("*/*"))
    upstream = [*TRAIN, "--algo", "ppo", "--rescale-to-n-envs", "2", "-params", "advantage_decay:0"]
    assert "hyper-parameters of ppo cannot be rescaled" in refusal(upstream, capsys)
    searching = [*TRAIN, "--algo", "ppo_ewma", "--rescale-to-n-envs", "2", "-optimize"]
    assert "--rescale-to-n-envs does not go with -optimize" in refusal(searching, capsys)


def test_options_do_not_outlive_their_command():
    zoo.main([*TRAIN, "--algo", "ppo_ewma", "--rescale-to-n-envs", "2"])
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
    assert printed.index("--trained-agent") < printed.index("--rescale-to-n-envs N")


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
    zoo.main([*SEARCH, "--algo", algo, "-params", "n_envs:2", "advantage_decay:0.8", *SMALL])
    assert [trial.state for trial in trials()] == [TrialState.COMPLETE] * 2
    assert {trial.params["n_epochs"] for trial in trials()} == {1}
    assert len({trial.params["learning_rate"] for trial in trials()}) == 2
    chosen = trials()[1]
    # The file has 4 environments, the trial had 2.
    again = [*TRAIN, "--algo", algo, *STUDY, "--trial-id", "1", "-params", "advantage_decay:0.8", "policy:MlpPolicy"]
    zoo.main([*again, "--rescale-to-n-envs", "1"])
    config = saved_config(algo, 2)
    assert (config["n_envs"], config["batch_size"], config["n_steps"]) == (1, 4, 32)
    assert config["learning_rate"] == pytest.approx(chosen.params["learning_rate"] / 2**0.5)
    assert config["prox_decay"] / (1 - config["prox_decay"]) == pytest.approx(2 * chosen.params["prox_center_of_mass"])
    if algo == "ppg_ewma":
        phases = [config["n_policy_iterations"], chosen.user_attrs["n_policy_iterations"]]
        assert phases[0] == 2 * phases[1]
    capsys.readouterr()
    zoo.main(["rescale", *CARTPOLE, "--algo", algo, *STUDY, "--trial-id", "1", "--n-envs", "1",
              "-params", "advantage_decay:0.8"])  # fmt: skip
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n\n")[2])["CartPole-v1"]
    assert printed["learning_rate"] == config["learning_rate"]
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

FILES = {"ppg_ewma": hyperparameter_file("ppg_ewma"), "ppo_ewma": hyperparameter_file(ONE_EPOCH)}


@pytest.mark.parametrize("algo", FILES)
@pytest.mark.filterwarnings("ignore:A minibatch now has")
def test_every_entry_can_be_rescaled(algo):
    entries = yaml.safe_load(FILES[algo].read_text())
    assert entries
    for entry in entries.values():
        n_envs = entry.get("n_envs", 1)
        for new in {8, max(1, n_envs // 4)} - {n_envs}:
            settings = rescaled(algo, entry, new).hyperparameters
            assert settings["n_envs"] == new
            assert settings["batch_size"] * n_envs == entry["batch_size"] * new
