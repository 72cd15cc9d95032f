"""
How many more steps per second does training make when rollouts are collected at the same time? From the root of the
repository:

    python -m benchmarks.parallel.asynchronous

PPO-EWMA trains with rollouts of its own process, with those of another process but none at the same time (a lag of 0),
and with lags of 1 and 2, fixed or as bounds for the newest policy. All have one thread, are built once and take turns,
a few iterations each, while the others sleep. The ratio of a round is that of steps per second to those of training in
one process.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.metadata import metadata
from benchmarks.speed.cases import CASES, case_settings, entry_settings, quick

HERE = Path(__file__).parent
# Names of cases of benchmarks/speed, the first of which takes about as long to collect as to train; ratio aimed at
TARGETS: dict[str, float | None] = {"halfcheetah": 1.6, "cartpole": None}
ONE_PROCESS = "one process"
KINDS: dict[str, dict[str, Any]] = {
    ONE_PROCESS: {},
    **{f"max_policy_lag={lag}": {"max_policy_lag": lag} for lag in (0, 1, 2)},
    **{f"max_policy_lag={lag}, newest": {"max_policy_lag": lag, "lag_mode": "newest"} for lag in (1, 2)},
}


class Training:
    """
    A process that trains, from the outside. Unless it is measured, it sleeps.

    :param settings: of case and entry, see benchmarks/speed/cases.py
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings))
        self._process.start()
        theirs.close()

    def measure(self) -> dict[str, float]:
        """
        :return: of one chunk of training: steps per second, mean lag, seconds within collection and training
        """
        self._connection.send("train")
        result: dict[str, float] = self._connection.recv()
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(20)
        self._process.kill()


def _serve(connection: Connection, settings: dict[str, Any]) -> None:
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.speed.worker import build_model

    class Lags(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.lags: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.lags.append(float(self.logger.name_to_value.get("time/policy_lag", 0)))

    th.set_num_threads(1)
    model = build_model(settings, "cpu")
    n_steps = settings["n_iterations"] * model.n_steps * model.n_envs
    seconds = {"collect_rollouts": 0.0, "train": 0.0}

    def timed(name: str) -> Any:
        method = getattr(model, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[name] += time.perf_counter() - began
            return result

        return measured

    if settings["kwargs"].get("max_policy_lag") is None:
        for name in seconds:
            setattr(model, name, timed(name))
    with contextlib.suppress(EOFError):  # the parent has gone
        while connection.recv():
            seconds.update(dict.fromkeys(seconds, 0.0))
            callback, began = Lags(), time.perf_counter()
            model.learn(n_steps, callback, reset_num_timesteps=False)
            passed = time.perf_counter() - began
            connection.send({"speed": n_steps / passed, "lag": statistics.mean(callback.lags), **seconds})
    model.env.close()


def measure(name: str, rounds: int, n_iterations: int, is_quick: bool) -> dict[str, Any]:
    """
    :param name: of a case
    :param rounds: in each of which all take their turn; one more that does not count goes before
    :param n_iterations: of a turn
    :param is_quick: whether it only shows that everything runs
    :return: settings, steps per second, ratios
    """
    case = quick(CASES[name]) if is_quick else CASES[name]
    settings = {**case_settings(case), **entry_settings(case, "ppo_ewma"), "n_iterations": n_iterations}
    trainings = {kind: Training({**settings, "kwargs": kwargs}) for kind, kwargs in KINDS.items()}
    try:
        found = [{kind: each.measure() for kind, each in trainings.items()} for _ in range(rounds + 1)][1:]
    finally:
        for each in trainings.values():
            each.close()
    alone = [each[ONE_PROCESS] for each in found]
    return {
        "case": name,
        "title": case.title,
        "settings": settings,
        "steps_per_second": {kind: [round(each[kind]["speed"]) for each in found] for kind in KINDS},
        "ratios": {
            kind: [round(each[kind]["speed"] / each[ONE_PROCESS]["speed"], 3) for each in found] for kind in KINDS
        },
        "mean_lags": {kind: round(statistics.mean(each[kind]["lag"] for each in found), 2) for kind in KINDS},
        "collect_share": round(
            statistics.median(each["collect_rollouts"] / (each["collect_rollouts"] + each["train"]) for each in alone),
            3,
        ),
        "target": TARGETS[name],
    }


def tell(result: dict[str, Any]) -> None:
    """
    :param result: of a case
    """
    n_rounds, share = len(result["ratios"][ONE_PROCESS]), result["collect_share"]
    print(f"{result['title']}: median (least to greatest) of {n_rounds} rounds; {share:.0%} of the time is collection")
    for kind, speeds in result["steps_per_second"].items():
        ratios, lag = result["ratios"][kind], result["mean_lags"][kind]
        print(
            f"  {kind:<24} {statistics.median(speeds):>7.0f} steps per second ({min(speeds)} to {max(speeds)}), "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), mean lag {lag}"
        )
    print("" if result["target"] is None else f"  target at least {result['target']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=32, help="of every turn")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/asynchronous.json, with --quick none)")
    args = parser.parse_args()
    results = []
    for name in args.cases:
        results.append(measure(name, args.rounds, args.iterations, args.quick))
        tell(results[-1])
    output = args.output or (None if args.quick else HERE / "results" / "asynchronous.json")
    if output is not None:
        output.write_text(json.dumps({**metadata(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
