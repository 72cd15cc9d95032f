"""
Another number of environments, with the settings that people use: SB3's PPO with nothing else changed, SB3's PPO with
`n_steps` divided by hand, and PPO-EWMA and PPG-EWMA with `tuned_for_n_envs`. From the root of the repository:

    python -m benchmarks.experiments.n_envs --jobs 2

Runs that are in results/n_envs.csv are not repeated.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import QUICK_ENV, Variant, execute, parser, zoo_settings

N_SEEDS = 5
N_ENVS = [1, 4, 16, 64, 256]
# Steps of a run, which end before returns stop to rise
N_TIMESTEPS = {
    "CartPole-v1": 25_000,
    "Acrobot-v1": 60_000,
    "LunarLander-v3": 200_000,
    "Pendulum-v1": 50_000,
    "Hopper-v5": 100_000,
    "HalfCheetah-v5": 100_000,
    "MinAtar/SpaceInvaders-v1": 300_000,
    "MinAtar/Breakout-v1": 300_000,
}
PHASIC = ("CartPole-v1", QUICK_ENV)
N_TEST_EPISODES = 20
UNTRAINED = "untrained"
NAIVE, BY_HAND = "PPO, only n_envs changed", "PPO, as many samples"
PPO_EWMA, PPG_EWMA = "PPO-EWMA, tuned_for_n_envs", "PPG-EWMA, tuned_for_n_envs"


def name_of(method: str, n_envs: int) -> str:
    return f"{method}, {n_envs}"


def variants() -> list[Variant]:
    """
    :return: every method with every number of environments, and with the number of the zoo
    """
    found = []
    for env, n_timesteps in N_TIMESTEPS.items():
        ours = {**zoo_settings("ppo_ewma", env), "n_timesteps": n_timesteps}
        ppo = {name: value for name, value in ours.items() if name != "prox_decay"}  # our file has the zoo's entries
        tuned = ours["n_envs"]
        untrained = {**ppo, "learning_rate": 0.0, "n_epochs": 1, "n_timesteps": 1}
        found.append(Variant(env, UNTRAINED, "ppo", untrained, N_TEST_EPISODES))
        for n_envs in sorted({*N_ENVS, tuned}):
            same_samples = {"n_envs": n_envs, "n_steps": max(1, tuned * ours["n_steps"] // n_envs)}
            methods: dict[str, tuple[str, dict[str, Any]]] = {NAIVE: ("ppo", {**ppo, "n_envs": n_envs})}
            if n_envs != tuned:
                methods[BY_HAND] = ("ppo", {**ppo, **same_samples})
            methods[PPO_EWMA] = ("ppo_ewma", {**ours, "n_envs": n_envs, "tuned_for_n_envs": tuned})
            if env in PHASIC:
                phasic = {**zoo_settings("ppg_ewma", env), "n_timesteps": n_timesteps}
                methods[PPG_EWMA] = ("ppg_ewma", {**phasic, "n_envs": n_envs, "tuned_for_n_envs": phasic["n_envs"]})
            found += [
                Variant(env, name_of(method, n_envs), algo, settings, N_TEST_EPISODES)
                for method, (algo, settings) in methods.items()
            ]
    return found


def report(file: Path) -> None:
    pass


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "n_envs", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
