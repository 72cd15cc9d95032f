"""
PPO with and without an EWMA, and how old the proximal policy should be when there are several epochs per rollout. From the
root of the repository:

    python -m benchmarks.experiments.ewma --jobs 2

Runs that are in results/ewma.csv are not repeated.
"""

import math
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser, zoo_settings

# Steps of a run: rl-zoo3's, or fewer where learning is over before or a run would take more than some minutes
N_TIMESTEPS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 200_000,
    "Pendulum-v1": 100_000,
    "LunarLander-v3": 400_000,
    "Hopper-v5": 300_000,
    "MinAtar/SpaceInvaders-v1": 600_000,
}
N_SEEDS = 5


def variants() -> list[Variant]:
    """
    :return: PPO-EWMA with the zoo's settings: without EWMA, and with a centre of mass of as many gradient steps as an
        epoch, half an iteration and an iteration have
    """
    found = []
    for env, n_timesteps in N_TIMESTEPS.items():
        settings = {**zoo_settings("ppo_ewma", env), "n_timesteps": n_timesteps}
        n_samples = settings["n_steps"] * settings["n_envs"]
        epoch = math.ceil(n_samples / settings.get("batch_size", 64))
        iteration = epoch * settings.get("n_epochs", 10)
        centers = {"none": None, "epoch": epoch, "half iteration": iteration / 2, "iteration": iteration}
        found += [
            Variant(env, name, "ppo_ewma", {**settings, "prox_decay": None if com is None else com / (com + 1)})
            for name, com in centers.items()
        ]
    return found


def report(file: Path) -> None:
    print(file)


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 100, "n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 2}
    execute(parser(__doc__, "ewma", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
