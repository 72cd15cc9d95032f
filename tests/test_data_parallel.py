"""Data-parallel training: two processes against one, and what they have to agree on."""

import csv
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_ppo_ewma import PPGEWMA, PPOEWMA
from sb3_ppo_ewma._parallel.normalization import pooled
from sb3_ppo_ewma._parallel.process_group import ProcessGroup
from tests import ranks
from tests.engines import needs_compiler

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def on_same_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters and log after every iteration, of one process and of two."""
    folder = tmp_path_factory.mktemp("same_data")
    recordings = {case: ranks.Recording() for case in ranks.CASES}
    alone = {case: ranks.trained_on(case, recording, 0, 1) for case, recording in recordings.items()}
    (folder / "recordings.pkl").write_bytes(pickle.dumps(recordings))
    return alone, ranks.results("same_data", folder)


@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_two_ranks_are_one_process(case: str, on_same_data: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    (alone, _), by_rank = on_same_data[0][case], [rank[case][0] for rank in on_same_data[1]]
    assert len(alone) == ranks.N_ITERATIONS
    for one, first, second in zip(alone, *by_rank, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one, rtol=0, atol=2e-6)
    assert np.abs(alone[-1] - alone[0]).max() > 1e-3


@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_log_of_two_ranks_is_that_of_one(case: str, on_same_data: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    (_, alone), first = on_same_data[0][case], on_same_data[1][0][case][1]
    # Of the rollouts, not of minibatches: with these, means over processes are something else than of one.
    others = {"train/explained_variance", "train/advantage_std"}
    for one, two in zip(alone, first, strict=True):
        compared = {name for name in one if name.startswith(("train/", "aux/"))} - others
        assert two == pytest.approx(two | {name: one[name] for name in compared}, rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder, and what each of two processes found."""
    folder = tmp_path_factory.mktemp("training")
    return folder, ranks.results("training", folder)


def test_parameters_are_the_same_after_every_iteration(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = trained[1]
    assert first["hashes"] == second["hashes"]
    assert len(set(first["hashes"])) == 4  # also through an auxiliary phase


def test_steps_count_all_ranks(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in trained[1]:
        assert rank["steps"] == list(range(4, 4 * 128 + 4, 4))


def test_ranks_see_other_environments(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = trained[1]
    # Those of four environments of one process
    assert first["seeds"] == [7, 8]
    assert second["seeds"] == [9, 10]
    assert not np.array_equal(first["observations"][0], second["observations"][0])


def test_normalization_is_that_of_all_observations(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = trained[1]
    for ours, others in zip(first["statistics"], second["statistics"], strict=True):
        for one, other in zip(ours, others, strict=True):
            np.testing.assert_array_equal(one, other)
    mean, variance, count = first["statistics"][0]
    seen = np.concatenate([first["raw"], second["raw"]])
    assert count == pytest.approx(len(seen), abs=1e-3)
    np.testing.assert_allclose(mean, seen.mean(0), atol=1e-5)
    np.testing.assert_allclose(variance, seen.var(0), rtol=1e-4)


def test_pooled_statistics_do_not_cancel() -> None:
    before, own = RunningMeanStd(shape=()), [RunningMeanStd(shape=()) for _ in range(3)]
    rng = np.random.RandomState(0)
    past, new = rng.normal(1e6, 1e-2, 1000), rng.normal(1e6, 1e-2, (3, 100))
    before.update(past)
    for each, samples in zip(own, new, strict=True):
        each.combine(before)
        each.update(samples)
    alone = before.copy()
    alone.update(new.flatten())
    start = (before.mean, before.var, before.count)
    for each in own:  # combine() adds what an empty one counts
        each.mean, each.var, each.count = start
    for each, samples in zip(own, new, strict=True):
        each.update(samples)
    by_process = [{"returns": (each.mean, each.var, each.count)} for each in own]
    mean, variance, count = pooled({"returns": start}, by_process)["returns"]
    assert count == pytest.approx(alone.count)
    assert mean == pytest.approx(alone.mean, abs=1e-7)
    assert variance == pytest.approx(alone.var, rel=1e-6)


def test_first_rank_evaluates_and_saves(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = trained
    assert first["n_evaluations"] == 4
    assert second["n_evaluations"] == 0
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".zip", ".pkl")}
    written = {name for name in files if "/" in name}
    expected = set()
    for steps in (256, 512):
        expected |= {
            f"checkpoints/rl_model_{steps}_steps.zip",
            f"checkpoints/rl_model_vecnormalize_{steps}_steps.pkl",
            f"checkpoints/rl_model_replay_buffer_{steps}_steps.pkl",
            f"checkpoints/rl_model_replay_buffer_{steps}_steps.rank1.pkl",
        }
    assert {name for name in written if name.startswith("checkpoints")} == expected
    every = {name for name in written if name.startswith("every")}
    assert every == {f"every/rl_model_{steps}_steps.zip" for steps in (128, 256, 384, 512)}


def test_log_is_of_all_ranks(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, by_rank = trained
    assert not (folder / "log_1" / "progress.csv").read_text()
    with (folder / "log_0" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    iterations = [row for row in rows if row["time/iterations"]]
    assert [int(row["time/total_timesteps"]) for row in iterations] == [128, 256, 384, 512]
    lengths = [length for rank in by_rank for length in rank["lengths"]]
    assert float(iterations[-1]["rollout/ep_len_mean"]) == pytest.approx(np.mean(lengths))
    assert np.mean(lengths) != pytest.approx(np.mean(by_rank[0]["lengths"]))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By name of what two processes did, what each found."""
    folder = tmp_path_factory.mktemp("short")
    written = ranks.write_sequences(folder)
    by_rank = ranks.results("short", folder)
    return {"sequences of one process": written} | {name: [rank[name] for rank in by_rank] for name in by_rank[0]}


def test_a_wish_to_stop_ends_all(short: dict[str, list[Any]]) -> None:
    first, second = short["stopping"]
    # Both at the end of the rollout with the step in question
    assert first == second
    assert first[0] == 2 * 128
    assert first[1] % 128 == 0
    assert first[1] < 1024


def test_settings_must_agree(short: dict[str, list[Any]]) -> None:
    for message, settings in short["differing"]:
        assert message == (
            "all processes of a data-parallel training need the same n_epochs: rank 0 has 1, rank 1 has 2"
        )
        assert (settings["n_envs"], settings["batch_size"], settings["n_steps"]) == (4, 64, 32)


def test_what_changes_in_one_rank_is_agreed_on_or_refused(short: dict[str, list[Any]]) -> None:
    first, second = short["changes_in_one_rank"]
    for name, engine in (("hook", "standard"), ("hook, phasic", "standard"), ("method", "fused")):
        assert first[name][0] == second[name][0] == engine
        assert first[name][1] == second[name][1]  # parameters
        assert first[name][2] == f"{second[name][2]} (in rank 1)"
    for name, what in (
        ("n_epochs", "n_epochs: rank 0 has 2, rank 1 has 3"),
        ("frozen", "requires_grad of the policy's action_net.weight: rank 0 has True, rank 1 has False"),
    ):
        message = f"all processes of a data-parallel training need the same {what}"
        assert first[name] == second[name] == message


def test_a_phase_goes_on_from_a_checkpoint(short: dict[str, list[Any]]) -> None:
    first, second = short["resuming"]
    for rank in (first, second):
        assert rank["n_phases_True"] == 1  # the fourth rollout
        assert rank["n_phases_False"] == 0  # it begins anew, in both
    # The same generators were loaded
    assert first["actions_True"] != second["actions_True"]


def test_sequences_are_divided_whole(short: dict[str, list[Any]]) -> None:
    written, by_rank = short["sequences of one process"], short["sequences"]
    assert len(written) == 2
    for rank, found in enumerate(by_rank):
        assert found["phases"] == 1
        for whole, part in zip(written, found["stored"], strict=True):
            for name, array in whole.items():
                # Those of the first two environments, then those of the others
                half = len(array) // 2
                assert half == (2 if "states" in name else 2 * 16)
                np.testing.assert_array_equal(part[name], array[rank * half :][:half])


def test_one_process_then_two_then_one_count_as_one(tmp_path: Path) -> None:
    def envs(n_envs: int) -> Any:
        return make_vec_env("CartPole-v1", n_envs, seed=0)

    constant = PPGEWMA("MlpPolicy", envs(8), **ranks.ELASTIC).learn(5 * 256)
    first = PPGEWMA("MlpPolicy", envs(4), **ranks.ELASTIC).learn(2 * 256)
    first.save(tmp_path / "first")
    first.save_replay_buffer(tmp_path / "first_rollouts")
    for found in ranks.results("elastic", tmp_path):
        # 8 environments together
        assert (found.pop("n_steps"), found.pop("batch_size")) == (32, 32)
        assert found.pop("samples of an iteration") == 128
        expected = ranks.counters(constant)
        assert expected.pop("samples of an iteration") == 256
        assert found == pytest.approx(expected)
    second = PPGEWMA.load(tmp_path / "second", envs(2), device="cpu")
    second.load_replay_buffer(tmp_path / "second_rollouts")
    assert second.phase_buffer is not None
    assert second.phase_buffer.n_samples == 5 * 256
    second.learn(3 * 256, reset_num_timesteps=False)
    constant.learn(3 * 256, reset_num_timesteps=False)
    assert ranks.counters(second) == pytest.approx(ranks.counters(constant))
    assert ranks.counters(second)["phases"] == 1


def test_all_families_train_in_two_ranks(short: dict[str, list[Any]]) -> None:
    first, second = short["families"]
    assert first == second
    assert len(first) == 8


def test_buffers_are_the_same_after_every_iteration(short: dict[str, list[Any]]) -> None:
    first, second = short["buffers"]
    for algorithm in ("PPOEWMA", "PPGEWMA"):  # the second one also through auxiliary phases
        (hashes, before, after), (other_hashes, other_before, other_after) = first[algorithm], second[algorithm]
        assert hashes == other_hashes
        assert len(set(hashes)) == 4
        for ours, others in zip([*before, after], [*other_before, other_after], strict=True):
            assert ours.keys() == others.keys()
            for name, buffer in ours.items():
                np.testing.assert_array_equal(buffer, others[name])
        name = "features_extractor.layers.0.running_mean"
        assert len({each[name].tobytes() for each in before}) == 4
    assert "the same buffer 'features_extractor.layers.0.num_batches_tracked' of the policy" in first["other integers"]
    assert first["other integers"] == second["other integers"]


def test_each_process_has_its_collector(short: dict[str, list[Any]]) -> None:
    first, second = short["collectors"]
    for lag in ("None", "0", "1"):
        (hashes, observations), (other_hashes, other_observations) = first[lag], second[lag]
        assert hashes == other_hashes
        assert len(set(hashes)) == 4
        assert not np.array_equal(observations, other_observations)
        assert not first[f"goes on, {lag}"][0].any()  # nothing begins again
    assert first["None"][0] == first["0"][0]
    np.testing.assert_array_equal(second["None"][1], second["0"][1])
    assert "max_policy_lag=1 cannot be combined with data-parallel VecNormalize" in first["refused"]


@needs_compiler
@pytest.mark.slow
def test_compiled_ranks_train_as_others(tmp_path: Path) -> None:
    first, second = ranks.results("compiled", tmp_path)
    found = [each.pop("in one rank only") for each in (first, second)]
    assert [engine for engine, *_ in found] == ["dense"] * 2
    assert len({parameters for _, parameters, _ in found}) == 1
    for rank, (_, _, warned) in enumerate(found):
        where = " (in rank 1)" if rank == 0 else ""
        reason = f"there is no compiler{where}"
        assert warned == [f"torch_compile=True has no effect, training goes on without it: {reason}"]
    for name, results in first.items():
        for (parameters, _), (others, _) in zip(results, second[name], strict=True):
            np.testing.assert_array_equal(parameters, others)
        (compiled, log), (eager, eager_log) = results
        np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-5)
        assert log == pytest.approx(eager_log, rel=1e-3, abs=1e-5)
    # target_kl ended epochs, of both ranks at once
    assert first["compiled"][0][1][-1] < 4 * 4


def test_groups_train_for_themselves(tmp_path: Path) -> None:
    by_rank = ranks.results("groups", tmp_path, world_size=4)

    def column(case: str, name: str) -> list[Any]:
        return [found[case][name] for found in by_rank]

    for case in ("pair", "loaded"):
        a, b, c, d = column(case, "parameters")
        assert a == b != c == d
    assert len(set(column("all", "parameters"))) == 1
    assert len(set(column("alone", "parameters"))) == 4
    assert column("pair", "seeds") == [[0, 1], [2, 3], [100, 101], [102, 103]]
    assert column("alone", "seeds") == [[0, 1], [1000, 1001], [2100, 2101], [3100, 3101]]
    # Tuned for 4 environments: a pair has them, all have twice as many, and one has half of them
    for case, n_steps, batch_size, of_all in (("pair", 16, 16, 32), ("all", 8, 8, 32), ("alone", 32, 32, 32)):
        assert column(case, "n_steps") == [n_steps] * 4
        assert column(case, "batch_size") == [batch_size] * 4
        assert column(case, "batch_size of all") == [of_all] * 4
        assert column(case, "num_timesteps") == [2 * 128] * 4
    assert column("pair", "rollouts") == [1] * 4
    assert column("loaded", "phases") == [2] * 4  # which it would not have without them
    files = {f"pair{pair}_rollouts{rank}.pkl" for pair in range(2) for rank in ("", ".rank1")}
    assert {path.name for path in tmp_path.glob("pair*.pkl")} == files
    for found in by_rank:
        assert found["message"] == "data_parallel is a process group that this process does not belong to"


def test_an_error_in_one_rank_ends_all(tmp_path: Path) -> None:
    first, second = ranks.results("failing", tmp_path)
    messages = {
        "observation": ("ValueError", "NaN or Inf in observations of the rollout"),
        "environment": ("OSError", "the simulator has crashed"),
        "memory": ("OutOfMemoryError", "none left"),
        "loss": ("RuntimeError", "inconsistent tensor size"),
    }
    for kind, (name, message) in messages.items():
        assert second[kind][0] == name
        assert message in second[kind][1]
        assert first[kind][:2] == ("RuntimeError", f"Rank 1 ended with {name}: {second[kind][1]}")
    assert max(seconds for _, _, seconds in first.values()) < 20


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (True, ValueError, "data_parallel=True needs a default process group of several processes"),
        (1, TypeError, "data_parallel must be True, False, None or a process group of torch.distributed, got 1"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "a process group that this process does not belong to"),
    ],
)
def test_process_groups_that_are_not_there_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PPOEWMA("MlpPolicy", "CartPole-v1", data_parallel=given)


def test_what_rank_0_hands_out_arrives_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = ProcessGroup(dist.group.WORLD)
        monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as of tensors of rank 0's
        (tensor,) = group.from_first([th.arange(3.0)])
    finally:
        dist.destroy_process_group()
    assert tensor.device.type == "cpu"
    assert tensor.tolist() == [0, 1, 2]


def test_a_destroyed_group_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, data_parallel=dist.new_group([0]))
        model.learn(32)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="data_parallel is a process group that was destroyed"):
        model.learn(32)


def test_a_model_for_several_processes_predicts_in_one(tmp_path: Path) -> None:
    model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, data_parallel=False)
    model.data_parallel = True  # as if it was built in one of several
    model.save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", make_vec_env("CartPole-v1"))
    assert loaded.data_parallel is True
    loaded.predict(loaded.observation_space.sample())
    with pytest.raises(ValueError, match="data_parallel=True needs a default process group"):
        loaded.learn(32)


def test_the_zoo_refuses_what_cannot_be_shared(short: dict[str, list[Any]]) -> None:
    for not_divided, other, search, alone, *folders in short["refusals"]:
        assert not_divided.endswith(
            "n_envs=3 environments cannot be divided between 2 processes: it must be a multiple of 2"
        )
        assert "ppo cannot train in several processes, only ppo_ewma" in other
        assert "processes that have the same --storage share a search" in search
        assert "data_parallel=False cannot be combined with torchrun, whose processes train one model" in alone
        assert not folders


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    processes = ranks.start("dying", tmp_path)
    assert processes[1].wait(timeout=120) == -9
    died = time.monotonic()
    _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert time.monotonic() - died < 60
    assert "Another process of the data-parallel training has ended" in errors
    checkpoints = sorted(tmp_path.glob("*.zip"))
    assert checkpoints
    for path in checkpoints:
        assert PPOEWMA.load(path, device="cpu").num_timesteps == int(path.stem.split("_")[2])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_script_of_the_documentation_goes_on_after_a_crash(tmp_path: Path) -> None:
    page = (ranks.ROOT / "docs" / "data_parallel.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[-1]
    for old, new in (("total_timesteps=100_000", "total_timesteps=24_576"), ("save_freq=1024", "save_freq=256")):
        assert old in code
        code = code.replace(old, new)
    code += "\nPath(f'result_{rank}').write_text(f'{checkpoints[-1].stem} {model.num_timesteps}')\n"
    (tmp_path / "train.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "train.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while not list(tmp_path.glob("checkpoints/*.zip")):
            assert process.poll() is None
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.terminate()  # and its workers
    assert process.returncode == 0, output
    for rank in range(2):
        began, ended = re.findall(r"\d+", (tmp_path / f"result_{rank}").read_text())
        assert 2048 <= int(began) < 24_576 <= int(ended)
