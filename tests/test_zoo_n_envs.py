"""The script ``n-envs``: what it measures and prints, what it recommends and refuses, and that it cleans up."""

import multiprocessing
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from sb3_ppo_ewma import PPGEWMA, PPOEWMA, zoo
from sb3_ppo_ewma.zoo import measuring, options
from sb3_ppo_ewma.zoo.measuring import Impossible, Measurement, Stopwatch, recommend, table

pytestmark = pytest.mark.long

ENTRY = {
    "n_envs": 4,
    "n_timesteps": 1e5,
    "policy": "MlpPolicy",
    "n_steps": 16,
    "batch_size": 16,
    "n_epochs": 1,
    "learning_rate": "lin_1e-3",
    "policy_kwargs": "dict(net_arch=[8])",
}
N_ENVS = ["n-envs", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--conf-file", "entries.yml", "--seconds", "0.2"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("entries.yml").write_text(yaml.safe_dump({"CartPole-v1": ENTRY}))


def rows(printed):
    """Cells of the table, without its header."""
    header, *lines = printed.partition("\n\n")[0].splitlines()
    assert re.split(r"  +", header) == list(measuring._HEADERS)
    return [re.split(r"  +", line) for line in lines]


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    assert refused.value.code not in (0, None)
    printed = capsys.readouterr()
    assert "Measuring" not in printed.err
    return refused.value.code if isinstance(refused.value.code, str) else printed.err


# === What it prints ===


def test_a_row_for_every_number_and_a_command(capsys):
    zoo.main([*N_ENVS, "--n-envs", "16", "2", "3", "-params", "n_epochs:2"])
    printed = capsys.readouterr()
    two, three, own, many = rows(printed.out)
    # 64 samples; 16 environments take 8 steps each, the fewest
    assert [row[:3] for row in (two, own, many)] == [["dummy", "2", "32"], ["dummy", "4", "16"], ["dummy", "16", "8"]]
    assert three[:2] == ["dummy", "3"]
    assert three[2].startswith("not possible: n_envs=4 times n_steps=16 are 64 samples")
    assert own[-1] == "1.00"
    for row in (two, own, many):
        collection, training, both, ratio = map(float, row[3:])
        assert 1 / both == pytest.approx(1 / collection + 1 / training, rel=0.02)
        assert ratio == pytest.approx(both / float(own[5]), abs=0.006)
    _, advice = printed.out.split("\n\n")
    sentence, command = advice.strip().splitlines()
    n_envs = re.match(r"Train with (2|4) environments \(dummy\)", sentence)[1]  # 16 of them have iterations of 128
    assert command == (
        "sb3-ppo-ewma train --algo ppo_ewma --env CartPole-v1 --conf-file entries.yml -params n_epochs:2 "
        f"--n-envs {n_envs}"
    )
    assert printed.err.count("Measuring") == 4
    assert sorted(path.name for path in Path().iterdir()) == ["entries.yml"]  # no logs
    assert options.current == options.Options()
    zoo.main([*shlex.split(command)[1:], "-n", "64", "--eval-freq", "-1", "-f", "logs", "--device", "cpu"])
    assert PPOEWMA.load("logs/ppo_ewma/CartPole-v1_1/CartPole-v1.zip").n_envs == int(n_envs)


def test_kinds_of_environments_and_no_process_is_left(capsys):
    zoo.main([*N_ENVS, "--n-envs", "2", "--vec-env", "subproc", "dummy"])
    found = rows(capsys.readouterr().out)
    assert [row[:3] for row in found] == [
        ["subproc", "2", "32"], ["subproc", "4", "16"], ["dummy", "2", "32"], ["dummy", "4", "16"],
    ]  # fmt: skip
    assert found[1][-1] == "1.00"  # of the first kind
    assert multiprocessing.active_children() == []


def test_envpool(capsys):
    pytest.importorskip("envpool")
    zoo.main([*N_ENVS, "--n-envs", "2", "--vec-env", "envpool"])
    printed = capsys.readouterr().out
    assert [row[:3] for row in rows(printed)] == [["envpool", "2", "32"], ["envpool", "4", "16"]]
    assert printed.strip().endswith(" --vec-env envpool")
    wrapped = [*N_ENVS, "--n-envs", "2", "--vec-env", "dummy", "envpool", "-params"]
    zoo.main([*wrapped, "env_wrapper:'gymnasium.wrappers.TimeAwareObservation'"])
    reasons = [row[2] for row in rows(capsys.readouterr().out)]
    assert reasons[:2] == ["32", "16"]
    assert all("cannot wrap EnvPool's environments" in reason for reason in reasons[2:])


def test_noise_scale_and_plot(capsys):
    zoo.main([*N_ENVS, "--n-envs", "2", "--noise-scale", "640", "--plot", "speed.png"])
    printed = capsys.readouterr().out
    assert re.search(r"^Critical batch size after 640 steps, in samples: policy .+, joint .+\. A minibatch has 16\.$",
                     printed, re.M)  # fmt: skip
    assert Path("speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_without_the_entrys_own_number():
    found = table([Impossible("envpool", 8, "why"), Measurement("dummy", 16, 8, 300.0, 600.0)], None).splitlines()
    assert found[1] == "envpool             8  not possible: why"
    assert found[2].split() == ["dummy", "16", "8", "300", "600", "200", "–"]


# === What it recommends ===


def fast(n_envs, both, n_steps=None, kind="dummy"):
    return Measurement(kind, n_envs, n_steps or 256 // n_envs, 2.0 * both, 2.0 * both)


def test_the_smallest_number_within_5_percent_of_the_fastest():
    measured = [fast(1, 100), fast(4, 940), fast(8, 951), fast(16, 1000)]
    chosen, text = recommend(measured, 256)
    assert chosen.n_envs == 8
    assert text == (
        "Train with 8 environments (dummy): the smallest number within 5 % of the fastest with iterations of 256 "
        "samples."
    )


def test_a_larger_number_with_longer_iterations_is_named():
    chosen, text = recommend([fast(8, 500), fast(16, 400), fast(64, 1000, n_steps=8)], 256)
    assert chosen.n_envs == 8
    assert "64 environments (dummy) are 2.00 times as fast, but an iteration then has 2 times its samples." in text
    _, text = recommend([fast(8, 500), fast(64, 499, n_steps=8)], 256)
    assert "64" not in text


def test_the_faster_of_two_kinds_with_the_same_number():
    measured = [fast(8, 960), fast(8, 1000, kind="envpool"), fast(16, 990)]
    assert recommend(measured, 256)[0] == measured[1]


# === The stopwatch ===


@pytest.mark.parametrize(("cls", "n_iterations"), [(PPOEWMA, 1), (PPGEWMA, 3)])
def test_whole_iterations_and_phases(cls, n_iterations):
    phases = {"n_policy_iterations": 3} if cls is PPGEWMA else {}
    model = cls("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu", **phases)
    stopwatch = Stopwatch(1e-9, n_warm_up=2, multiple_of=n_iterations)
    model.learn(10**6, stopwatch)
    assert stopwatch.n_iterations == n_iterations
    assert stopwatch.is_done
    assert model._n_rollouts == 2 + n_iterations
    assert model.num_timesteps == 32 * (2 + n_iterations) + 1  # one step to end it


def test_times(monkeypatch):
    clock = iter([0.0, 10.0, 30.0, 31.0, 33.0, 34.0, 36.0])  # start and end of rollouts in turn
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(6.0)
    for continues in (True, True, True, False):  # 30 s of warm-up, then 3 s an iteration
        stopwatch._on_rollout_start()
        assert stopwatch._on_step() is continues
        if continues:
            stopwatch._on_rollout_end()
    assert (stopwatch.collection_seconds, stopwatch.training_seconds) == (2.0, 4.0)


# === What it refuses ===


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n-envs", "2", "0"], "n_envs must be >= 1, got 0"),
        (["--n-envs", "2", "4", "2"], "--n-envs must be different values, got 2 4 2"),
        (["--vec-env", "dummy", "dummy"], "--vec-env must be different values, got dummy dummy"),
        (["--vec-env", "thread"], "invalid choice: 'thread'"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0.0"),
        (["--noise-scale", "0"], "--noise-scale must be >= 1, got 0"),
        (["--plot", "missing/a.png"], "in an existing folder, got missing/a.png"),
        (["--plot", "a.txt"], "--plot must be a file ."),
        (["--env", "Nowhere-v0"], "Nowhere-v0 not found in gym registry"),
        (["--algo", "ppo"], "invalid choice: 'ppo'"),
        (["--conf-file", "missing.yml"], "missing.yml: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_before_anything_is_measured(arguments, said, capsys):
    assert said in refusal([*N_ENVS, *arguments], capsys)


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'sb3-ppo-ewma[plots]'" in refusal([*N_ENVS, "--plot", "a.png"], capsys)


def test_hyperparameters_that_no_number_can_use(capsys):
    with pytest.raises(SystemExit, match="prox_decay must be"):
        zoo.main([*N_ENVS, "--n-envs", "2", "--vec-env", "subproc", "-params", "prox_decay:1.5"])
    assert multiprocessing.active_children() == []


def test_an_error_in_training_leaves_no_process(monkeypatch):
    def fail(self):
        assert multiprocessing.active_children()
        raise ValueError("no such training")

    monkeypatch.setattr(PPOEWMA, "train", fail)
    with pytest.raises(SystemExit, match="no such training"):
        zoo.main([*N_ENVS, "--n-envs", "2", "--vec-env", "subproc"])
    assert multiprocessing.active_children() == []
