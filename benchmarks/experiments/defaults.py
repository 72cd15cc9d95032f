"""
How old the proximal policy should be with the defaults of Stable-Baselines3's PPO, ten epochs among them: what one gets
who gives no hyper-parameters. From the root of the repository:

    python -m benchmarks.experiments.defaults --jobs 2

Runs that are in results/defaults.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.ewma import ages, report_ages
from benchmarks.experiments.runs import Variant, execute, parser

N_SEEDS = 3
# Those of stable_baselines3.PPO that the ages are computed from
DEFAULTS: dict[str, Any] = {"policy": "MlpPolicy", "n_envs": 1, "n_steps": 2048, "batch_size": 64, "n_epochs": 10}
# Steps of a run, and whether observations and rewards are normalised, as is usual with MuJoCo
TASKS = {
    "CartPole-v1": (100_000, False),
    "LunarLander-v3": (300_000, False),
    "MinAtar/SpaceInvaders-v1": (300_000, False),
    "Hopper-v5": (300_000, True),
    "HalfCheetah-v5": (300_000, True),
}


def variants() -> list[Variant]:
    """
    :return: all ages with SB3's defaults
    """
    found = []
    for env, (n_timesteps, normalize) in TASKS.items():
        settings = {**DEFAULTS, "n_timesteps": n_timesteps, **({"normalize": True} if normalize else {})}
        found += ages(env, settings)
    return found


def report(file: Path) -> None:
    settings = "the defaults of SB3's PPO: one environment, 2048 steps, ten epochs of minibatches of 64 samples"
    report_ages(file, variants(), "EWMA against none with SB3's defaults", settings)


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16, "n_epochs": 2}
    execute(parser(__doc__, "defaults", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
