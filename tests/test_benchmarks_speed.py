"""benchmarks/speed/: it takes turns, keeps what was measured, mixes no settings and computes what it says."""

import json
import os
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch as th
import yaml
from sb3_contrib import RecurrentPPO

from benchmarks.metadata import REPOSITORY
from benchmarks.speed import report, run, worker
from benchmarks.speed.cases import CASES, ENTRIES, case_settings, entry_settings, quick
from benchmarks.speed.worker import Chunk, EntryError
from sb3_ppo_ewma import RecurrentPPOEWMA

pytestmark = pytest.mark.long


def settings_of(case: str, entry: str) -> dict:
    small = quick(CASES[case])
    return {**case_settings(small), **entry_settings(small, entry)}


# === Measurement ===


def test_quick_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["--quick", "--cases", "cartpole", "--entries", "sb3", "ppo_ewma", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.speed.run", *arguments]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert f"python -m benchmarks.speed.report --results {tmp_path}" in ended.stdout
    chunks = pd.read_csv(tmp_path / "chunks.csv")
    assert sorted(zip(chunks.entry, chunks["round"], strict=True)) == [
        ("ppo_ewma", 0),
        ("ppo_ewma", 1),
        ("sb3", 0),
        ("sb3", 1),
    ]
    assert set(chunks.steps) == {2 * 2 * 16}  # iterations, environments, steps
    assert (chunks[["collect_seconds", "train_seconds", "cpu_seconds"]] > 0).all(axis=None)
    assert (chunks.collect_seconds + chunks.train_seconds < chunks.seconds).all()
    workers = json.loads((tmp_path / "metadata.json").read_text())["starts"][0]["workers"]
    assert set(workers) == {"cartpole sb3", "cartpole ppo_ewma"}
    assert all(facts["threads"] == 1 and facts["peak_memory_bytes"] > 50e6 for facts in workers.values())


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Starts the measurement with workers that only pretend; tells who was asked, in this order."""
    asked = []
    names = {str(entry_settings(CASES["cartpole"], name)): name for name in ENTRIES}

    class Pretender:
        def __init__(self, settings, device):
            self.name = names[str({name: settings[name] for name in ("algorithm", "kwargs")})]
            self.n_chunks = 0

        def wait(self):
            return {"threads": 1}

        def measure(self):
            asked.append(self.name)
            self.n_chunks += 1
            if self.name == "ppg" and self.n_chunks == 2:
                raise EntryError("the reason why")
            return Chunk(64, 4.0, 1.0, 2.0, 4.0, 1000 * self.n_chunks)

        def dismiss(self):
            pass

        def close(self):
            asked.append(f"{self.name} ends")

    def start(*options):
        asked.clear()
        arguments = ["--cases", "cartpole", "--rounds", 2, "--results", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", ["run", *map(str, arguments)])
        run.main()
        return list(asked)

    monkeypatch.setattr(run, "Worker", Pretender)
    return start


def test_entries_take_turns_in_another_order_in_each_round(pretend, tmp_path):
    asked = pretend("--entries", "sb3", "ppo_ewma", "ppg_ewma")
    warm_up, first, second, ends = asked[:3], asked[3:6], asked[6:9], asked[9:]
    assert warm_up == ["sb3", "ppo_ewma", "ppg_ewma"]
    assert first == ["ppo_ewma", "ppg_ewma", "sb3"]
    assert second == ["ppg_ewma", "sb3", "ppo_ewma"]
    assert sorted(ends) == ["ppg_ewma ends", "ppo_ewma ends", "sb3 ends"]
    chunks = pd.read_csv(tmp_path / "chunks.csv")
    assert list(chunks.columns) == run.COLUMNS
    assert list(chunks["round"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert set(chunks.train_seconds) == {2.0}


def test_rounds_are_added(pretend, tmp_path):
    pretend("--entries", "sb3")
    pretend("--entries", "sb3", "ppo_ewma", "--rounds", 1)
    chunks = pd.read_csv(tmp_path / "chunks.csv")
    assert list(chunks[chunks.entry == "sb3"]["round"]) == [0, 1, 2, 0, 3]
    assert list(chunks[chunks.entry == "ppo_ewma"]["round"]) == [0, 3]  # beside sb3's of the same start
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    peaks = [start["workers"]["cartpole sb3"]["peak_memory_bytes"] for start in metadata["starts"]]
    assert peaks == [3000, 2000]
    assert all(start["command"] and start["date"] and start["commit"] for start in metadata["starts"])


@pytest.mark.parametrize("options", [["--quick"], ["--device", "cuda"]], ids=["sizes", "device"])
def test_other_settings_are_not_mixed_in(pretend, options, tmp_path):
    pretend("--entries", "sb3")
    before = (tmp_path / "chunks.csv").read_text()
    with pytest.raises(SystemExit, match="other settings"):
        pretend("--entries", "sb3", *options)
    assert (tmp_path / "chunks.csv").read_text() == before


def test_other_versions_are_not_mixed_in(pretend, tmp_path):
    pretend("--entries", "sb3")
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    metadata["conditions"]["versions"]["torch"] = "1.0"
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(SystemExit, match="versions"):
        pretend("--entries", "sb3")


def test_other_code_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    (tmp_path / "sb3_ppo_ewma").mkdir()
    code = tmp_path / "sb3_ppo_ewma" / "ewma.py"
    code.write_text("decay = 0.9\n")
    before = run.conditions("cpu")
    assert run.conditions("cpu") == before
    code.write_text("decay = 0.8\n")
    assert run.conditions("cpu")["code"] != before["code"]


def test_an_entry_that_fails_is_told_and_the_others_go_on(pretend, tmp_path, capsys):
    with pytest.raises(SystemExit, match="failed: cartpole ppg"):
        pretend("--entries", "ppg", "sb3")
    assert "the reason why" in capsys.readouterr().err
    chunks = pd.read_csv(tmp_path / "chunks.csv")
    assert list(chunks[chunks.entry == "sb3"]["round"]) == [0, 1, 2]
    assert list(chunks[chunks.entry == "ppg"]["round"]) == [0]


def test_what_is_not_installed_is_left_out_and_told(pretend, monkeypatch, capsys):
    monkeypatch.setattr(run, "missing", lambda packages: list(packages))
    asked = pretend("--cases", "cartpole", "breakout", "--entries", "sb3", "sbx")
    assert set(asked) == {"sb3", "sb3 ends"}
    told = capsys.readouterr().out
    assert "cartpole sbx: left out, not installed: sbx\n" in told
    assert "breakout: left out, not installed: ale_py, cv2\n" in told


def test_time_is_told_apart(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Model:
        n_steps, n_envs = 5, 3

        def learn(self, total_timesteps, reset_num_timesteps):
            assert not reset_num_timesteps
            for _ in range(total_timesteps // 15):
                self.collect_rollouts()
                self.train()
                clock.now += 0.5

        def collect_rollouts(self):
            clock.now += 3

        def train(self):
            clock.now += 4

    monkeypatch.setattr(worker, "build_model", lambda settings, device: Model())
    times = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: 2 * clock.now)
    monkeypatch.setattr(worker, "time", times)
    stopwatch = worker.Stopwatch({**settings_of("cartpole", "sb3"), "n_iterations": 2}, "cpu")
    for _ in range(2):  # the second does not add to the first
        assert stopwatch.chunk()[:5] == (30, 15.0, 6.0, 8.0, 30.0)


def test_passes_of_the_lstms_alone(monkeypatch):
    settings = settings_of("cartpole_lstm", "lstm_only")
    model = worker.build_model(settings, "cpu")
    shapes, train = [], model.train

    def recorded():
        shapes.append([tuple(sequences.shape) for batch in model._inputs for _, sequences, _ in batch])
        train()

    model.train = recorded
    drawn = []
    get = model._model.rollout_buffer.get
    monkeypatch.setattr(
        model._model.rollout_buffer,
        "get",
        lambda size: (drawn.append(samples) or samples for samples in get(size)),
    )
    model.learn(2 * 2 * 16, reset_num_timesteps=False)
    assert model._model.num_timesteps == 2 * 2 * 16
    # Of two iterations: two epochs of two minibatches of 16 samples, for actor and critic
    assert [len(each) for each in shapes] == [8, 8]
    assert all(steps * sequences >= 16 and features == 4 for steps, sequences, features in shapes[0])
    # The model trained on the minibatches that were measured
    measured, trained = drawn[:4], drawn[4:8]
    for one, other in zip(measured, trained, strict=True):
        assert th.equal(one.observations, other.observations)


def test_a_case_with_classes_of_its_own(monkeypatch):
    monkeypatch.setattr(run, "missing", lambda packages: [])
    plan = run.available({name: CASES[name] for name in ("cartpole", "cartpole_lstm")}, list(ENTRIES))
    assert plan["cartpole_lstm"] == ["sb3", "lstm_only", "ppo_ewma_none", "ppo_ewma", "ppg", "ppg_ewma"]
    assert "lstm_only" not in plan["cartpole"]
    built = {name: type(worker.build_model(settings_of("cartpole_lstm", name), "cpu")) for name in ("sb3", "ppo_ewma")}
    assert built == {"sb3": RecurrentPPO, "ppo_ewma": RecurrentPPOEWMA}


def test_a_compiled_entry_that_is_not_compiled_fails():
    settings = settings_of("cartpole", "ppo_ewma_compiled")
    settings["policy_kwargs"] = {"optimizer_kwargs": {"amsgrad": True}}  # which cannot be compiled
    with pytest.raises(UserWarning, match="torch_compile=True has no effect"):
        worker.Stopwatch(settings, "cpu").chunk()


# === Cases ===


@pytest.mark.parametrize(
    ("case", "layer", "shape"),
    [
        ("cartpole", "mlp_extractor.policy_net.0.weight", (64, 4)),
        ("halfcheetah", "mlp_extractor.policy_net.2.weight", (256, 256)),
        ("impala", "features_extractor.cnn.0.weight", (16, 3, 3, 3)),
    ],
)
def test_networks_are_the_same(case, layer, shape):
    if case == "halfcheetah":
        pytest.importorskip("mujoco")
    networks = []
    for entry in ("sb3", "ppo_ewma", "ppo_ewma_none", "ppo_ewma_compiled", "ppg"):
        model = worker.build_model(settings_of(case, entry), "cpu")
        networks.append({name: tuple(value.shape) for name, value in model.policy.state_dict().items()})
    ppo, *others, ppg = networks
    assert ppo[layer] == shape
    assert all(other == ppo for other in others)
    # PPG has its head, and may have a trunk for the critic.
    assert ppo.items() <= ppg.items()
    assert {name.split(".")[0] for name in ppg.keys() - ppo.keys()} <= {"aux_value_net", "vf_features_extractor"}


@pytest.mark.parametrize(
    ("case", "zoo_name"), [("cartpole_zoo", "CartPole-v1"), ("halfcheetah", "HalfCheetah-v4"), ("breakout", "atari")]
)
def test_settings_are_those_of_the_zoo(case, zoo_name):
    (file,) = (file for file in files("rl_zoo3") if str(file) == "rl_zoo3/hyperparams/ppo.yml")
    zoo = yaml.safe_load(Path(file.locate()).read_text())[zoo_name]
    ours = CASES[case]
    assert (ours.n_envs, ours.policy, ours.normalize) == (zoo["n_envs"], zoo["policy"], zoo.get("normalize", False))
    assert ours.atari == ("env_wrapper" in zoo)
    others = ("n_envs", "policy", "normalize", "policy_kwargs", "n_timesteps", "env_wrapper", "frame_stack")
    assert ours.ppo == {name: value for name, value in zoo.items() if name not in others}


@pytest.mark.parametrize("case", CASES)
def test_chunks_have_whole_phases(case):
    for settings in (CASES[case], quick(CASES[case])):
        assert settings.n_iterations % settings.phase["n_policy_iterations"] == 0
        # Without a smaller last minibatch, so that minibatches can be counted
        assert settings.ppo["n_steps"] * settings.n_envs % settings.ppo["batch_size"] == 0


# === Report ===


def chunks_of(
    seconds: dict[str, list[float]], case: str = "cartpole", steps: int = 1000, first_round: int = 1
) -> pd.DataFrame:
    """Rounds that took that long, four parts in five of it for training, the rest for collection."""
    rows = [
        (case, entry, number, steps, value, 0.2 * value, 0.8 * value, 1.5 * value)
        for entry, values in seconds.items()
        for number, value in enumerate(values, start=first_round)
    ]
    return pd.DataFrame(rows, columns=run.COLUMNS)


METADATA = {
    "conditions": {
        "code": "abc",
        "device": "cpu",
        "cores": 2,
        "flags": {"OMP_NUM_THREADS": "1"},
        "versions": {"torch": "2.13"},
        "hardware": {"cpu": "A CPU", "cores": 4, "system": "Linux"},
    },
    "settings": {name: case_settings(case) for name, case in CASES.items()},
    "starts": [
        {
            "command": "python -m benchmarks.speed.run",
            "date": "2020-01-01 00:00 UTC",
            "commit": "def",
            "uncommitted_changes": False,
            "workers": {"cartpole sb3": {"threads": 1, "peak_memory_bytes": 300 * 2**20}},
        }
    ],
}


def section(chunks: pd.DataFrame, heading: str) -> str:
    return report.report(chunks, METADATA, reps=1000).partition(f"\n## {heading}")[2].partition("\n## ")[0]


def cells(text: str, row: str, heading: str) -> str:
    """The cell of the table in which there is this heading."""
    tables = [table.splitlines() for table in text.split("\n\n") if table.startswith("|")]
    (lines,) = (lines for lines in tables if f"| {heading} |" in lines[0])
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (found,) = (line for line in split if line[0] == row)
    return found[split[0].index(heading)]


def test_ratio_of_medians():
    # 100, 100 and 100 steps per second against 200, 250 and 200. Of three rounds drawn from these, the second comes
    # at least twice with the probability 7/27, and its number is the median then.
    text = section(chunks_of({"sb3": [10, 10, 10], "ppo_ewma": [5, 4, 5]}), "CartPole-v1, SB3's")
    for part in ("learn", "collection", "training"):
        assert cells(text, "PPOEWMA", f"{part} ÷ PPO of SB3") == "2.00 [2.00, 2.50]"
    assert cells(text, "PPOEWMA", "learn, steps/s") == "200"
    assert cells(text, "PPOEWMA", "training, steps/s") == "250"  # in four fifths of the time
    assert cells(text, "PPOEWMA", "cores used") == "1.50"


def test_a_slow_round_is_slow_for_all():
    # The machine is half as fast in the second round. The ratio is 2 in every round.
    table = report.rates(chunks_of({"sb3": [10, 20, 11], "ppo_ewma": [5, 10, 5.5]}), "learn")
    found = report.ratio(table, "ppo_ewma", "sb3", reps=1000)
    assert [found.value, found.low, found.high] == pytest.approx([2, 2, 2])


def test_only_common_rounds_are_compared():
    early, late = chunks_of({"sb3": [10, 10]}), chunks_of({"sb3": [40], "ppo_ewma": [10]}, first_round=3)
    table = report.rates(pd.concat([early, late]), "learn")
    assert report.ratio(table, "ppo_ewma", "sb3", reps=10).value == pytest.approx(4)
    table = report.rates(pd.concat([early, late[late.entry == "ppo_ewma"]]), "learn")
    assert report.ratio(table, "ppo_ewma", "sb3", reps=10) is None
    assert report.ratio(table, "ppo_ewma", "sbx", reps=10) is None


def test_ratio_to_sbx():
    text = section(chunks_of({"sb3": [10], "sbx": [5], "ppo_ewma": [4]}), "CartPole-v1, SB3's")
    assert cells(text, "PPOEWMA", "learn ÷ PPO of SBX") == "1.25"  # of one round, without an interval
    assert cells(text, "PPO of SB3", "learn ÷ PPO of SBX") == "0.50"


def test_cost_of_the_ewma():
    text = section(
        chunks_of({"ppo_ewma_none": [5, 5], "ppo_ewma": [5.5, 5.5], "ppg": [8, 8], "ppg_ewma": [8.2, 8.2]}), "What the"
    )
    assert cells(text, "learn, PPOEWMA ÷ PPOEWMA, prox_decay=None", "`cartpole`") == "10.0 %"
    assert cells(text, "training, PPGEWMA ÷ PPG", "`cartpole`") == "2.5 %"


def test_the_first_chunk_does_not_count():
    first = chunks_of({"sb3": [10.5], "ppo_ewma_compiled": [35]}, first_round=0)
    chunks = pd.concat([first, chunks_of({"sb3": [10, 10, 10], "ppo_ewma_compiled": [2, 2, 2.5]})])
    text = section(chunks, "CartPole-v1, SB3's")
    assert cells(text, "PPOEWMA, compiled", "learn ÷ PPO of SB3") == "5.00 [4.00, 5.00]"
    assert cells(text, "PPOEWMA, compiled", "first chunk, extra s") == "33.0"
    assert cells(text, "PPO of SB3", "first chunk, extra s") == "0.5"
    assert cells(text, "PPO of SB3", "peak memory, MiB") == "300"
    assert "Rounds: 3," in text


def test_time_of_a_gradient_step():
    # 8192 steps are 4 iterations of 32 minibatches in 10 epochs, 1280 gradient steps; 0.8 · 3.2 s / 1280 = 2 ms
    text = section(chunks_of({"sb3": [3.2], "ppg": [6.4]}, steps=8192), "CartPole-v1, SB3's")
    assert cells(text, "PPO of SB3", "training, µs per gradient step") == "2000"
    assert cells(text, "PPG", "training, µs per gradient step") == ""  # some of its gradient steps are others


def test_what_collects_nothing_is_only_compared_in_training():
    chunks = chunks_of({"sb3": [10], "torchrl": [8]})
    chunks.loc[chunks.entry == "torchrl", "collect_seconds"] = 0.0
    text = section(chunks, "CartPole-v1, SB3's")
    row = "PPO-EWMA's update in TorchRL"
    assert cells(text, row, "training ÷ PPO of SB3") == "1.25"
    assert cells(text, row, "learn ÷ PPO of SB3") == cells(text, row, "collection, steps/s") == ""


def test_part_of_the_lstms():
    text = section(
        chunks_of({"sb3": [10], "lstm_only": [4], "ppo_ewma": [8]}, "cartpole_lstm"), "CartPole-v1 with LSTMs"
    )
    heading = "`training`, part that forward and backward passes of the LSTMs alone would take"
    assert cells(text, "PPO of SB3", heading) == "0.40"
    assert cells(text, "PPOEWMA", heading) == "0.50"
    assert "PPOEWMA: `RecurrentPPOEWMA`." in text


def test_files_of_the_report(tmp_path, monkeypatch):
    cases = [chunks_of({"sb3": [4, 5], "ppo_ewma": [2, 2]}, case) for case in ("cartpole", "impala")]
    pd.concat(cases).to_csv(tmp_path / "chunks.csv", index=False)
    (tmp_path / "metadata.json").write_text(json.dumps(METADATA))
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--reps", "20"])
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert cells(text.partition("## Whole")[2], "PPOEWMA", "`impala`") == "2.22 [2.00, 2.50]"  # 500 / 225
    for fact in ("`python -m benchmarks.speed.run`", "2020-01-01", "commit def", "torch 2.13", "A CPU, 4 cores"):
        assert fact in text
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "speed.svg").read_text()
