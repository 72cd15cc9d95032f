"""
How fast are EnvPool's environments beside those of Gymnasium in SB3's DummyVecEnv and SubprocVecEnv? Atari's Breakout
with the same preprocessing, frames as the network takes them. From the root of the repository:

    python -m benchmarks.envpool

All kinds are stepped in turn with random actions, some seconds each, round after round, so that what else the machine
does meets all of them. The ratio of a round is EnvPool's steps per second by those of the better of the other two; once
as it is, once with its threads pinned to cores. Then a PPO-EWMA with the zoo's settings for Atari trains on each of
them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecTransposeImage

from benchmarks.metadata import metadata
from sb3_ppo_ewma import PPOEWMA, make_envpool_vec_env

gym.register_envs(ale_py)
HERE = Path(__file__).parent
TARGET = 2.0
OURS = "EnvPoolVecEnv"
# Each of its threads on a core of its own
PINNED = "EnvPoolVecEnv, pinned"
# As SB3's AtariWrapper has them
ATARI = {"episodic_life": True, "reward_clip": True}
# The zoo's for Atari; those of a rollout depend on the number of environments
SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "learning_rate": 2.5e-4,
    "clip_range": 0.1,
}


def gymnasium_envs(n_envs: int, vec_env_cls: type[DummyVecEnv] | type[SubprocVecEnv], **kwargs: Any) -> VecEnv:
    env = make_atari_env("BreakoutNoFrameskip-v4", n_envs, seed=0, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)
    return VecTransposeImage(VecFrameStack(env, 4))


KINDS: dict[str, Callable[[int], VecEnv]] = {
    OURS: lambda n_envs: make_envpool_vec_env("Breakout-v5", n_envs, seed=0, **ATARI),
    PINNED: lambda n_envs: make_envpool_vec_env("Breakout-v5", n_envs, seed=0, thread_affinity_offset=0, **ATARI),
    "DummyVecEnv": lambda n_envs: gymnasium_envs(n_envs, DummyVecEnv),
    # Not SB3's default start method, with which every process imports torch: too much memory for 64 of them
    "SubprocVecEnv": lambda n_envs: gymnasium_envs(n_envs, SubprocVecEnv, start_method="fork"),
}


def steps_per_second(env: VecEnv, seconds: float) -> float:
    """
    :param env: after a reset
    :param seconds: to step at least
    :return: steps of single environments per second
    """
    rng = np.random.default_rng(0)
    n_steps, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        env.step(rng.integers(env.action_space.n, size=env.num_envs))  # type: ignore[attr-defined]  # Discrete
        n_steps += env.num_envs
    return n_steps / passed


def learning_speed(env: VecEnv, n_iterations: int) -> float:
    """
    :param env: environments
    :param n_iterations: rollouts
    :return: steps per second of training
    """
    model = PPOEWMA("CnnPolicy", env, seed=0, device="cpu", **SETTINGS)
    n_steps = n_iterations * SETTINGS["n_steps"] * env.num_envs
    began = time.perf_counter()
    model.learn(n_steps)
    return n_steps / (time.perf_counter() - began)


def measure(n_envs: int, rounds: int, seconds: float, n_iterations: int) -> dict[str, Any]:
    """
    :param n_envs: number of environments
    :param rounds: of all kinds in turn
    :param seconds: of each
    :param n_iterations: rollouts of a training
    :return: steps per second, ratios
    """
    envs = {kind: make(n_envs) for kind, make in KINDS.items()}
    for env in envs.values():
        env.reset()
        steps_per_second(env, seconds / 4)
    stepping = [{kind: steps_per_second(env, seconds) for kind, env in envs.items()} for _ in range(rounds)]
    learning = {kind: learning_speed(env, n_iterations) for kind, env in envs.items()} if n_iterations else {}
    for env in envs.values():
        env.close()
    return {
        "n_envs": n_envs,
        "steps_per_second": {kind: [round(each[kind]) for each in stepping] for kind in KINDS},
        "ratios": [round(ratio(each), 2) for each in stepping],
        "pinned_ratios": [round(ratio(each, PINNED), 2) for each in stepping],
        "learning_steps_per_second": {kind: round(value) for kind, value in learning.items()},
        "learning_ratio": round(ratio(learning), 2) if learning else None,
    }


def ratio(speeds: dict[str, float], kind: str = OURS) -> float:
    return speeds[kind] / max(speed for other, speed in speeds.items() if other not in (OURS, PINNED))


def tell(result: dict[str, Any]) -> None:
    """
    :param result: of a number of environments
    """
    print(f"{result['n_envs']} environments, steps per second: median (least to greatest) of rounds; while training")
    for kind, speeds in result["steps_per_second"].items():
        learning = result["learning_steps_per_second"].get(kind, "")
        print(f"  {kind:<22} {statistics.median(speeds):>8.0f} ({min(speeds)} to {max(speeds)})   {learning}")
    for name in ("ratios", "pinned_ratios"):
        values = result[name]
        print(f"  {name} to the better of the others: {statistics.median(values):.2f} ({min(values)} to {max(values)})")
    print(f"  target at least {TARGET}; while training {result['learning_ratio']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-envs", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--iterations", type=int, default=2, help="rollouts of a training; 0: none")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "envpool.json")
    args = parser.parse_args()
    th.set_num_threads(1)
    results = []
    for n_envs in args.n_envs:
        results.append(measure(n_envs, args.rounds, args.seconds, args.iterations))
        tell(results[-1])
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"results": results, "target": TARGET, "settings": settings, **metadata()}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
