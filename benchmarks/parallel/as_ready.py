"""
How many more steps per second does training make when environments do not wait for the slowest one? From the root of
the repository:

    python -m benchmarks.parallel.as_ready

PPO-EWMA trains in 16 environments of a process each, once with collect="together" and once with "as_ready". What an
environment costs is slept, so that its processes need no cores of their own. Both are built once and take turns, an
iteration each. The ratio of a round is that of their steps per second.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import SubprocVecEnv

from benchmarks.metadata import metadata

HERE = Path(__file__).parent
TOGETHER, AS_READY = "together", "as_ready"
SETTINGS: dict[str, Any] = {"n_envs": 16, "n_steps": 256, "batch_size": 256, "n_epochs": 4}


class Case(NamedTuple):
    """
    How long the steps of an environment take.

    :param title: in words
    :param step_ms: duration of most steps, in milliseconds
    :param slow_ms: duration of the others
    :param slow_share: share of the others
    :param target: ratio aimed at, ``None``: none
    """

    title: str
    step_ms: float
    slow_ms: float
    slow_share: float
    target: float | None


CASES = {
    "contacts": Case("A tenth of the steps ten times as slow", 5, 50, 0.1, 3.0),
    "resets": Case("One of 100 steps a reset of half a second", 2, 500, 0.01, None),
    "even": Case("All steps equally slow", 5, 5, 0.0, None),
    "instant": Case("Steps that take no time", 0, 0, 0.0, None),
}


class Sleeping(gym.Wrapper[Any, Any, Any, Any]):
    """
    An environment whose steps take longer, some of them much longer.

    :param env: the environment
    :param step_ms: added to most steps, in milliseconds
    :param slow_ms: added to the others
    :param slow_share: share of the others
    """

    def __init__(self, env: gym.Env[Any, Any], step_ms: float, slow_ms: float, slow_share: float) -> None:
        super().__init__(env)
        self._step_ms, self._slow_ms, self._slow_share = step_ms, slow_ms, slow_share
        self._generator = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        milliseconds = self._slow_ms if self._generator.random() < self._slow_share else self._step_ms
        if milliseconds > 0:
            time.sleep(milliseconds / 1000)
        return self.env.step(action)


def build(case: Case, collect: str, settings: dict[str, Any]) -> Any:
    """
    :param case: how long steps take
    :param collect: parameter of the algorithm
    :param settings: number of environments, and the algorithm's
    :return: a model
    """
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_ppo_ewma import PPOEWMA

    sleeps = {"step_ms": case.step_ms, "slow_ms": case.slow_ms, "slow_share": case.slow_share}
    env = make_vec_env("CartPole-v1", settings["n_envs"], seed=0, wrapper_class=Sleeping, wrapper_kwargs=sleeps,
                       vec_env_cls=SubprocVecEnv)  # fmt: skip
    own = {name: value for name, value in settings.items() if name != "n_envs"}
    return PPOEWMA("MlpPolicy", env, **own, collect=collect, seed=0, device="cpu")


def steps_per_second(model: Any) -> float:
    """
    :param model: model, which trains for an iteration
    :return: steps of all environments per second
    """
    before, began = model.num_timesteps, time.perf_counter()
    model.learn(1, reset_num_timesteps=False)
    return float((model.num_timesteps - before) / (time.perf_counter() - began))


def measure(name: str, rounds: int, is_quick: bool) -> dict[str, Any]:
    """
    :param name: of a case
    :param rounds: in each of which both take their turn; one more that does not count goes before
    :param is_quick: whether it only shows that everything runs
    :return: settings, steps per second, ratios
    """
    import torch as th

    th.set_num_threads(1)
    case = CASES[name]
    settings = {**SETTINGS, "n_envs": 2, "n_steps": 8, "batch_size": 8} if is_quick else SETTINGS
    models = {kind: build(case, kind, settings) for kind in (TOGETHER, AS_READY)}
    speeds = [{kind: steps_per_second(model) for kind, model in models.items()} for _ in range(rounds + 1)][1:]
    for model in models.values():
        model.env.close()
    return {
        "case": name,
        **case._asdict(),
        "settings": settings,
        "steps_per_second": {kind: [round(each[kind]) for each in speeds] for kind in models},
        "ratios": [round(each[AS_READY] / each[TOGETHER], 3) for each in speeds],
    }


def tell(result: dict[str, Any]) -> None:
    """
    :param result: of a case
    """
    print(f"{result['title']}: steps per second, median (least to greatest) of {len(result['ratios'])} rounds")
    for kind, speeds in result["steps_per_second"].items():
        print(f"  {kind:<9} {statistics.median(speeds):>7.0f} ({min(speeds)} to {max(speeds)})")
    ratios, target = result["ratios"], result["target"]
    aim = "" if target is None else f", target at least {target}"
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}){aim}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/as_ready.json, with --quick none)")
    args = parser.parse_args()
    results = []
    for name in args.cases:
        results.append(measure(name, args.rounds, args.quick))
        tell(results[-1])
    output = args.output or (None if args.quick else HERE / "results" / "as_ready.json")
    if output is not None:
        output.write_text(json.dumps({**metadata(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
