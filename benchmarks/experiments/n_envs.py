"""
Another number of environments, with the settings that people use: SB3's PPO with nothing else changed, SB3's PPO with
`n_steps` divided by hand, and PPO-EWMA and PPG-EWMA with `tuned_for_n_envs`. From the root of the repository:

    python -m benchmarks.experiments.n_envs --jobs 2

Runs that are in results/n_envs.csv are not repeated.
"""

import math
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import QUICK_ENV, Variant, execute, parser, zoo_settings
from sb3_ppo_ewma import batch_scaling as scaling
from sb3_ppo_ewma.ewma import (
    MOST_CENTERS_OF_MASS,
    decay_from_center_of_mass,
    default_center_of_mass,
)

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
# Where as many samples leave rollouts of one or two steps to the most environments
SHORT = ("CartPole-v1", "Hopper-v5", "HalfCheetah-v5")
LENGTHS = [1, 2, 4, 16, 32]
N_TEST_EPISODES = 20
UNTRAINED = "untrained"
NAIVE, BY_HAND = "PPO, only n_envs changed", "PPO, as many samples"
PPO_EWMA, PPG_EWMA = "PPO-EWMA, tuned_for_n_envs", "PPG-EWMA, tuned_for_n_envs"


def name_of(method: str, n_envs: int) -> str:
    return f"{method}, {n_envs}"


def with_rollouts(settings: dict[str, Any], n_steps: int) -> dict[str, Any]:
    """
    :param settings: of PPO-EWMA, with the zoo's number of environments
    :param n_steps: length of a rollout
    :return: settings for the most environments with rollouts of this length, by the rules of ``strategy="samples"``
    """
    n_samples, n_new = settings["n_envs"] * settings["n_steps"], N_ENVS[-1] * n_steps
    size = min(settings["batch_size"], n_samples)
    center = default_center_of_mass(n_samples, size, settings["n_epochs"])
    iteration = settings["n_epochs"] * n_new / size
    center = max(center, min(center * n_new / n_samples, iteration / MOST_CENTERS_OF_MASS))
    changed = {"n_envs": N_ENVS[-1], "n_steps": n_steps, "batch_size": size}
    return {**settings, **changed, "prox_decay": decay_from_center_of_mass(center)}


def with_grown_minibatches(settings: dict[str, Any], n_steps: int) -> dict[str, Any]:
    """
    :param settings: of PPO-EWMA, with the zoo's number of environments
    :param n_steps: length of a rollout
    :return: settings for the most environments with rollouts of this length, by the rules of ``strategy="paper"`` for
        the growth of an iteration
    """
    n_samples = settings["n_envs"] * settings["n_steps"]
    growth = N_ENVS[-1] * n_steps / n_samples
    size = min(settings["batch_size"], n_samples)
    rate: Any = settings.get("learning_rate", 3e-4)
    decay = decay_from_center_of_mass(default_center_of_mass(n_samples, size, settings["n_epochs"]))
    return {
        **settings,
        "n_envs": N_ENVS[-1],
        "n_steps": n_steps,
        "batch_size": round(size * growth),
        "learning_rate": f"lin_{float(rate[4:]) * math.sqrt(growth)}"
        if isinstance(rate, str)
        else scaling.adam_learning_rate(rate, growth),
        "max_grad_norm": scaling.max_grad_norm(settings.get("max_grad_norm", 0.5), growth),
        "prox_decay": scaling.prox_decay(decay, growth),
    }


def rule_variants(env: str, settings: dict[str, Any]) -> list[Variant]:
    """
    :param env: environment
    :param settings: of PPO-EWMA, with the zoo's number of environments
    :return: for the most environments, other lengths of a rollout and larger minibatches
    """
    shortest = settings["n_envs"] * settings["n_steps"] // N_ENVS[-1]
    found = {f"PPO-EWMA, rollouts of {n}, {N_ENVS[-1]}": with_rollouts(settings, n) for n in LENGTHS if n >= shortest}
    found[name_of("PPO-EWMA, larger minibatches", N_ENVS[-1])] = with_grown_minibatches(settings, 8)
    return [Variant(env, name, "ppo_ewma", each, N_TEST_EPISODES) for name, each in found.items()]


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
        if env in SHORT:
            found += rule_variants(env, ours)
    return found


def report(file: Path) -> None:
    pass


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "n_envs", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
