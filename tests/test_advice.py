"""When AdviceCallback gives advice, what it prints and logs, and when it stays silent."""

import copy
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from rl_zoo3.utils import get_callback_list
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_ppo_ewma import PPG, PPOEWMA, AdviceCallback, zoo
from sb3_ppo_ewma.callbacks.advice import FINDINGS

PAGE = (Path(__file__).parents[1] / "docs" / "advice.md").read_text()
NAMES = [finding.name for finding in FINDINGS]

# By name of a finding: logs that trigger it, logs just inside the threshold, attributes of the model
Log = dict[str, float]
CASES: dict[str, tuple[list[Log], list[Log], dict[str, Any]]] = {
    "clip_fraction_low": ([{"clip_fraction": 0.0009}], [{"clip_fraction": 0.001}], {}),
    "clip_fraction_high_1_epoch": (
        [{"clip_fraction": 0.21}, {"clip_fraction": 0.9}],
        [{"clip_fraction": 0.2}],
        {"n_epochs": 1},
    ),
    "clip_fraction_high": ([{"clip_fraction": 0.41}], [{"clip_fraction": 0.4}], {"n_epochs": 2}),
    "advantage_std_swings": (
        [{"advantage_std": 1.0}, {"advantage_std": 11.0}],
        [{"advantage_std": 1.0}, {"advantage_std": 10.0}],
        {},
    ),
    "importance_cap": ([{"importance_cap_fraction": 0.0011}], [{"importance_cap_fraction": 0.001}], {}),
    "importance_ess_low": ([{"importance_ess": 0.49}], [{"importance_ess": 0.5}], {}),
    "kl_high": ([{"approx_kl_prox": 0.21, "approx_kl": 0.0}], [{"approx_kl_prox": 0.2, "approx_kl": 9.0}], {}),
    "entropy_collapse": ([{"entropy_loss": -0.034}], [{"entropy_loss": -0.036}], {}),  # 5 % of log 2 is 0.0347
    "std_collapse": ([{"std": 0.009}], [{"std": 0.011}], {"action_space": spaces.Box(-1, 1)}),
    "explained_variance_low": ([{"explained_variance": 0.0}], [{"explained_variance": 0.01}], {}),
}
START = {"entropy_loss": -math.log(2), "std": 1.0, "clip_fraction": 0.1, "explained_variance": 0.5}
SLOW = ("clip_fraction_low", "explained_variance_low")


class Rows(KVWriter):
    """Stores the rows of the log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


class Run:
    """
    A stand-in for a training run: model, logger and the calls that SB3 makes to a callback.

    :param callback: the callback under test
    :param model: attributes of the model
    """

    def __init__(self, callback: AdviceCallback, **model: Any) -> None:
        self.callback, self.writer, self.n_updates = callback, Rows(), 0
        attributes = {"num_timesteps": 0, "_current_progress_remaining": 1.0, "n_epochs": 4}
        attributes |= {"action_space": spaces.Discrete(2), **model}
        self.model = SimpleNamespace(logger=Logger(None, [self.writer]), **attributes)
        callback.init_callback(self.model)
        self.start()

    def start(self) -> None:
        self.callback.on_training_start({}, {})

    def train(self, *logs: Log) -> "Run":
        for log in logs:
            self.callback.on_rollout_start()
            self.model.logger.dump()
            self.model.num_timesteps += 100
            self.n_updates += 1
            for name, value in {**log, "n_updates": self.n_updates}.items():
                self.model.logger.record(f"train/{name}", value)
        return self

    def end(self) -> AdviceCallback:
        self.callback.on_training_end()
        self.model.logger.dump()
        return self.callback


def repeated(logs: list[Log], n: int) -> list[Log]:
    return [logs[i % len(logs)] for i in range(n)]


def test_there_is_a_case_for_every_finding() -> None:
    assert list(CASES) == NAMES


def trainings_until_found(name: str, patience: int = 10) -> int:
    """:return: number of calls of train(); the first one logs START, which counts only if it has the value"""
    (key, *_) = CASES[name][0][0]
    n_without = 0 if key in START else 1
    n_without += name == "advantage_std_swings"  # needs two iterations
    return (3 * patience if name in SLOW else patience) + n_without


@pytest.mark.parametrize("name", NAMES)
def test_is_said_once_after_enough_iterations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ill, _, model = CASES[name]
    run = Run(AdviceCallback(), **model).train(START, *repeated(ill, 60))
    assert list(run.end().found) == [name]
    (line,) = capsys.readouterr().out.splitlines()
    assert run.callback.found == {name: line}
    n = trainings_until_found(name)
    found = re.fullmatch(rf"Advice after {n}00 steps: .+ is ([\d.e-]+) \(.+ in (\d+) of (\d+) iterations\): .+\.", line)
    assert found is not None
    assert float(found[1]) > 0 or name == "explained_variance_low"
    # SB3 writes a row after the next rollout; the first row is before any training
    lines = [row.get(f"advice/{name}") for row in run.writer.rows]
    assert lines == [None] * n + [1] * (len(lines) - n)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_at_the_threshold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, good, model = CASES[name]
    run = Run(AdviceCallback(), **model).train(START, *repeated(good, 70))
    assert run.end().found == {}
    assert capsys.readouterr().out == ""
    assert not any(key.startswith("advice/") for row in run.writer.rows for key in row)


@pytest.mark.parametrize("name", NAMES)
def test_share_of_the_iterations(name: str) -> None:
    ill, good, model = CASES[name]
    n = 8 if name in SLOW else 5
    for n_ill, found in ((n - 1, []), (n, [name])):
        mixed = [*repeated(ill, n_ill), *repeated(good, 10 - n_ill)]
        if name == "advantage_std_swings":  # a spike is two changes
            mixed = [*[{"advantage_std": 1.0}] * (3 if found else 4), {"advantage_std": 11.0}]
        assert list(Run(AdviceCallback(), **model).train(START, *repeated(mixed, 90)).end().found) == found


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_and_patience(name: str) -> None:
    ill, good, model = CASES[name]
    run = Run(AdviceCallback(thresholds={name: None}), **model)
    assert run.train(START, *repeated(ill, 60)).end().found == {}
    (finding,) = (finding for finding in FINDINGS if finding.name == name)
    laxer = finding.threshold * (0.9 if finding.is_high else 1.1)
    run = Run(AdviceCallback(patience=2, thresholds={name: laxer}), **model)
    *logs, last = START, *repeated(good, trainings_until_found(name, patience=2) - 1)
    assert run.train(*logs).end().found == {}
    assert list(run.train(last).end().found) == [name]


def test_missing_values_and_nan_say_nothing() -> None:
    everything = {key: value for ill, *_ in CASES.values() for key, value in ill[0].items()}
    for key in everything:
        others = {other: value for other, value in everything.items() if other != key}
        for log in ({key: everything[key]}, others, {**others, key: math.nan}):
            Run(AdviceCallback(patience=1)).train(*[log] * 5).end()
    assert Run(AdviceCallback(patience=1)).train(*[{}] * 5).end().found == {}
    assert Run(AdviceCallback(patience=1)).train(*[dict.fromkeys(everything, math.nan)] * 5).end().found == {}
    # Iterations without a value are not counted
    good = [{"approx_kl": 1.0}, {"approx_kl": math.nan}, {}]
    assert Run(AdviceCallback()).train(*good * 9).end().found == {}
    assert list(Run(AdviceCallback()).train(*good * 10).end().found) == ["kl_high"]


def test_infinite_values_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    logs = [{"approx_kl": math.inf, "advantage_std": float(i % 2)} for i in range(12)]
    assert set(Run(AdviceCallback()).train(*logs).end().found) == {"kl_high", "advantage_std_swings"}
    assert "advantages is inf (above 10 in" in capsys.readouterr().out
    assert Run(AdviceCallback()).train(*[{"advantage_std": 0.0}] * 12).end().found == {}


def test_clip_fractions_that_are_small_on_purpose_say_nothing() -> None:
    start = {"learning_rate": 1e-3, "clip_fraction": 0.1, "entropy_loss": -0.69, "std": 1.0}
    discrete, box = {"action_space": spaces.Discrete(2)}, {"action_space": spaces.Box(-1, 1)}
    for log, model, is_silent in (
        ({"learning_rate": 4.9e-4}, discrete, True),
        ({"learning_rate": 5.1e-4}, discrete, False),
        ({"entropy_loss": -0.034}, discrete, True),
        ({"entropy_loss": -0.036}, discrete, False),
        ({"entropy_loss": 9.0}, box, False),
        ({"std": 0.009}, box, True),
    ):
        later = {**start, "clip_fraction": 0.0, **log}
        found = Run(AdviceCallback(thresholds={"entropy_collapse": None, "std_collapse": None}), **model)
        assert (found.train(start, *[later] * 40).end().found == {}) == is_silent, log


def test_a_critic_that_has_learnt_says_nothing() -> None:
    good, ill = {"explained_variance": 0.5}, {"explained_variance": -9.0}
    run = Run(AdviceCallback()).train(*[good] * 20, *[ill] * 79)
    assert run.end().found == {}
    assert list(run.train(ill).end().found) == ["explained_variance_low"]  # 80 of 100


def test_clip_fractions_that_are_large_on_purpose_say_nothing() -> None:
    for n_epochs, name in ((1, "clip_fraction_high_1_epoch"), (10, "clip_fraction_high")):
        for clip_range, found in ((0.11, [name]), (0.09, [])):
            logs = {"clip_range": 0.2}, *[{"clip_range": clip_range, "clip_fraction": 0.9}] * 10
            assert list(Run(AdviceCallback(), n_epochs=n_epochs).train(*logs).end().found) == found


def test_a_policy_may_become_deterministic_in_the_second_half() -> None:
    for remaining, found in ((0.5, ["entropy_collapse"]), (0.49, [])):
        run = Run(AdviceCallback(), _current_progress_remaining=remaining)
        assert list(run.train(START, *[{"entropy_loss": 0.0}] * 20).end().found) == found


@pytest.mark.parametrize(
    ("space", "largest"),
    [
        (spaces.Discrete(8), 3 * math.log(2)),
        (spaces.MultiDiscrete([4, 2]), 3 * math.log(2)),
        (spaces.MultiBinary(3), 3 * math.log(2)),
        (spaces.Discrete(1), None),
        (spaces.Box(-1, 1), None),  # differential, may be negative
    ],
)
def test_largest_entropy(space: spaces.Space[Any], largest: float | None) -> None:
    for share, found in ((0.049, ["entropy_collapse"]), (0.051, [])):
        log = {"entropy_loss": 3.0 if largest is None else -share * largest}
        run = Run(AdviceCallback(), action_space=space).train(*[log] * 10)
        assert list(run.end().found) == (found if largest is not None else [])


@pytest.mark.parametrize(
    ("space", "valid", "largest"),
    [
        (spaces.Discrete(8), [1] + 7 * [0], 0.0),
        (spaces.Discrete(8), [1, 1] + 6 * [0], math.log(2)),
        (spaces.MultiDiscrete([2, 3]), [1, 0, 1, 1, 1], math.log(3)),
        (spaces.MultiBinary(2), [1, 1, 0, 1], math.log(2)),
    ],
)
def test_largest_entropy_among_valid_actions(space: spaces.Space[Any], valid: list[int], largest: float) -> None:
    # Half of the states have the mask, the others no valid choice: one value of each action.
    sizes = {spaces.Discrete: [8], spaces.MultiDiscrete: [2, 3], spaces.MultiBinary: [2, 2]}[type(space)]
    forced = [float(i == 0) for size in sizes for i in range(size)]
    masks = np.array([[valid, forced]] * 16, np.float32)
    for share, found in ((0.049, ["entropy_collapse"]), (0.051, [])):
        run = Run(AdviceCallback(), action_space=space, rollout_buffer=SimpleNamespace(action_masks=masks))
        run.callback.on_rollout_end()
        log = {"entropy_loss": -share * largest / 2}
        assert list(run.train(*[log] * 10).end().found) == (found if largest else [])


def test_verbose_0_only_logs(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(AdviceCallback(verbose=0)).train(*[{"approx_kl": 1.0}] * 11)
    assert list(run.end().found) == ["kl_high"]
    assert run.writer.rows[-1]["advice/kl_high"] == 1
    assert capsys.readouterr().out == ""


def test_a_training_counts_once() -> None:
    run = Run(AdviceCallback()).train(*[{"approx_kl": 1.0}] * 5)
    for _ in range(10):  # the zoo calls it twice, and without a dump the values stay
        run.callback.on_training_end()
    run.start()
    run.callback.on_rollout_start()
    assert run.callback.found == {}
    # Values of an earlier learn(), seen by another callback
    new = AdviceCallback(patience=1)
    new.init_callback(run.model)
    new.on_training_start({}, {})
    new.on_rollout_start()
    assert new.found == {}


def test_continues_with_reset_num_timesteps_false_and_starts_afresh_otherwise() -> None:
    run = Run(AdviceCallback()).train(*[{"approx_kl": 1.0}] * 5)
    run.end()
    run.start()
    assert list(run.train(*[{"approx_kl": 1.0}] * 5).end().found) == ["kl_high"]
    run.model.num_timesteps = 0
    run.start()
    assert run.train(*[{"approx_kl": 1.0}] * 9).end().found == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience must be >= 1, got 0"),
        ({"patience": 2.5}, TypeError, r"patience must be an integer >= 1, got 2\.5"),
        ({"verbose": -1}, ValueError, "verbose must be >= 0, got -1"),
        ({"thresholds": 0.1}, TypeError, r"thresholds must be .* or None, got 0\.1"),
        ({"thresholds": {"kl_hihg": 0.1}}, ValueError, "no finding 'kl_hihg'. Did you mean 'kl_high'?"),
        ({"thresholds": {"xyz": 0.1}}, ValueError, r"no finding 'xyz'. There are clip_fraction_low, .*"),
        ({"thresholds": {"kl_high": -1}}, ValueError, "threshold of kl_high must be >= 0, got -1"),
        ({"thresholds": {"kl_high": "0.1"}}, TypeError, "threshold of kl_high must be a number .* got '0.1'"),
        ({"thresholds": {"clip_fraction_low": 1.5}}, ValueError, r"clip_fraction_low must be in \[0, 1\], got 1\.5"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdviceCallback(**arguments)


def test_is_copied_and_pickled() -> None:
    callback = AdviceCallback(patience=3, thresholds={"kl_high": 0.5})
    for same in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (same.patience, same.thresholds) == (3, callback.thresholds)
        assert list(Run(same).train(*[{"approx_kl": 1.0}] * 3).end().found) == ["kl_high"]


# ---------------------------------------------------------------------- real runs


class NoiseEnv(gym.Env[Any, int]):
    """
    Observations and rewards are noise.

    :param block: length of a block in steps; every third block has rewards a thousand times as large
    """

    observation_space = spaces.Box(-1, 1, (4,))
    action_space = spaces.Discrete(2)

    def __init__(self, block: int) -> None:
        self.block, self.n_steps = block, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(self.np_random.normal())
        if self.n_steps // self.block % 3 == 0:
            reward *= 1000
        self.n_steps += 1
        return self._observation(), reward, False, self.n_steps % 50 == 0, {}

    def _observation(self) -> Any:
        return self.np_random.uniform(-1, 1, 4).astype("float32")


def advice(cls: type[PPO], env: Any, n_iterations: int, **kwargs: Any) -> set[str]:
    """:return: names of the findings in a small run"""
    small = {"n_steps": 64, "batch_size": 32, "n_epochs": 4, "policy_kwargs": {"net_arch": [16]}, "seed": 1}
    model = cls("MlpPolicy", make_vec_env(env, seed=1), device="cpu", **{**small, **kwargs})
    callback = AdviceCallback()
    model.learn(model.n_steps * n_iterations, callback)
    return set(callback.found)


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPO, PPOEWMA])
def test_learning_rate_too_low(cls: type[PPO]) -> None:
    assert advice(cls, "CartPole-v1", 30, learning_rate=1e-7) == {"clip_fraction_low"}


def test_learning_rate_too_high() -> None:
    ill = {"learning_rate": 0.1, "prox_decay": 0.99}
    assert "clip_fraction_high" in advice(PPOEWMA, "Pendulum-v1", 12, n_epochs=10, **ill)
    assert advice(PPOEWMA, "Pendulum-v1", 12, n_epochs=1, **ill) == {"clip_fraction_high_1_epoch"}


@pytest.mark.parametrize(("advantage_decay", "found"), [(None, {"advantage_std_swings"}), (0.9, set())])
def test_rewards_that_are_large_now_and_then(advantage_decay: float | None, found: set[str]) -> None:
    # The advice helps
    assert advice(PPOEWMA, lambda: NoiseEnv(64), 12, advantage_decay=advantage_decay) == found


@pytest.mark.long
def test_stale_data() -> None:
    ill = {"learning_rate": 0.03, "n_epochs": 10, "max_importance_ratio": 10.0, "staleness": 16}
    young = advice(PPOEWMA, "Pendulum-v1", 28, **ill, prox_decay=0.5)
    assert {"importance_cap", "importance_ess_low", "kl_high"} <= young
    # The advice helps: the default prox_decay averages over an iteration.
    old = advice(PPOEWMA, "Pendulum-v1", 28, **ill)
    assert not {"importance_cap", "kl_high"} & old


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPO, PPOEWMA])
def test_large_steps_of_a_gaussian_policy(cls: type[PPO]) -> None:
    found = advice(cls, "Pendulum-v1", 40, learning_rate=0.03, n_epochs=10, ent_coef=-1.0)
    assert {"std_collapse", "kl_high", "clip_fraction_high"} <= found


@pytest.mark.long
def test_entropy_collapses() -> None:
    assert "entropy_collapse" in advice(PPOEWMA, "CartPole-v1", 24, learning_rate=0.1, ent_coef=-10.0)


@pytest.mark.long
@pytest.mark.parametrize(("cls", "arguments"), [(PPG, {"n_policy_iterations": 99}), (PPOEWMA, {})])
def test_critic_that_learns_nothing(cls: type[PPO], arguments: dict[str, Any]) -> None:
    # Returns of −500, values that begin at 0
    assert "explained_variance_low" in advice(cls, "Pendulum-v1", 32, n_steps=256, batch_size=128, **arguments)


@pytest.mark.long
@pytest.mark.parametrize("cls", [PPO, PPOEWMA])
def test_nothing_is_said_of_a_good_run(cls: type[PPO], capsys: pytest.CaptureFixture[str]) -> None:
    env = make_vec_env("CartPole-v1", 8, seed=1)
    settings = {"n_steps": 64, "batch_size": 128, "n_epochs": 4, "learning_rate": 1e-3, "seed": 1, "device": "cpu"}
    model = cls("MlpPolicy", env, **settings)
    callback = AdviceCallback()
    model.learn(30_000, callback)
    assert callback.found == {}
    assert capsys.readouterr().out == ""
    assert model.ep_info_buffer is not None
    assert sum(info["r"] for info in model.ep_info_buffer) / len(model.ep_info_buffer) > 150


def test_save_and_continue(tmp_path: Path) -> None:
    arguments = {"n_steps": 64, "learning_rate": 0.0, "device": "cpu"}
    callback = AdviceCallback(patience=2)
    model = PPOEWMA("MlpPolicy", "CartPole-v1", **arguments)
    model.learn(4 * 64, [callback, CheckpointCallback(128, str(tmp_path))])
    assert callback.found == {}
    assert (tmp_path / "rl_model_256_steps.zip").exists()
    model.save(tmp_path / "model")
    # The same callback continues, a new one starts with empty windows
    model = PPOEWMA.load(tmp_path / "model", env=model.get_env())
    new = AdviceCallback(patience=2)
    model.learn(2 * 64, [callback, new], reset_num_timesteps=False)
    assert "clip_fraction_low" in callback.found
    assert new.found == {}


def test_log_interval_and_order_of_the_log() -> None:
    for log_interval in (1, 3, None):
        writer = Rows()
        callback = AdviceCallback(patience=2, thresholds={"explained_variance_low": None})
        model = PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=64, learning_rate=0.0, device="cpu")
        model.set_logger(Logger(None, [writer]))
        model.learn(8 * 64, callback, log_interval=log_interval)
        assert list(callback.found) == ["clip_fraction_low"]
        assert callback.found["clip_fraction_low"].startswith("Advice after 384 steps:")
        lines = ["advice/clip_fraction_low" in row for row in writer.rows]
        assert lines == {1: [False] * 6 + [True] * 2, 3: [False] * 2, None: []}[log_interval]


@pytest.mark.long
def test_from_a_yaml_file_of_the_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (default,) = get_callback_list({"callback": "sb3_ppo_ewma.AdviceCallback"})
    assert isinstance(default, AdviceCallback)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    Path("my.yml").write_text(example)
    small = ["n_envs:1", "n_steps:32", "batch_size:16", "learning_rate:0.0"]
    arguments = ["-conf", "my.yml", "-f", "logs", "-n", "512", "--eval-freq", "-1", "--seed", "0"]
    for algo in ("ppo_ewma", "ppo"):
        zoo.main(["train", "--algo", algo, "--env", "CartPole-v1", *arguments, "-params", *small])
        assert "Advice after 480 steps: the clip fraction is 0 (below 0.002 in 15 of 15" in capsys.readouterr().out


def test_the_page_has_every_finding_with_its_threshold() -> None:
    rows = re.findall(r"^\| `advice/(\w+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == NAMES
    for finding, (_, what, threshold, says, source) in zip(FINDINGS, rows, strict=True):
        assert threshold == f"{'>' if finding.is_high else '<'} {finding.threshold:g}"
        assert bool(re.search(r"80 % of .*30", what)) == (finding.name in SLOW)
        assert source in ("paper, §6.2", "ours")
        parameters = {"learning_rate", "n_steps", "prox_decay", "n_epochs", "advantage_decay", "staleness", "ent_coef"}
        parameters |= {"kl_coef", "vf_coef", "n_epochs_value", "VecNormalize"}
        assert {name for name in parameters if name in says} == {name for name in parameters if name in finding.advice}
