"""
PPO with and without an EWMA, and how old the proximal policy should be when there are several epochs per rollout. From
the root of the repository:

    python -m benchmarks.experiments.ewma --jobs 2

Runs that are in results/ewma.csv are not repeated.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import Variant, execute, parser, zoo_settings
from sb3_ppo_ewma.ewma import default_center_of_mass

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
NAMES = {
    "none": "no EWMA (PPO)",
    "epoch": "one epoch's minibatches",
    "quarter iteration": "a quarter of an iteration's",
    "half iteration": "half an iteration's",
    "iteration": "an iteration's",
}
AUTO, AUTO_NAME = "auto", "one epoch's, with more than five epochs half an iteration's (`prox_decay=\"auto\"`)"


def ages(env: str, settings: dict[str, Any]) -> list[Variant]:
    """
    :param env: environment
    :param settings: of PPO-EWMA
    :return: without EWMA, and with a centre of mass of as many gradient steps as an epoch, half an iteration and an
        iteration have, and a quarter of an iteration where that is more than an epoch
    """
    n_samples = settings["n_steps"] * settings["n_envs"]
    epoch = math.ceil(n_samples / settings.get("batch_size", 64))
    iteration = epoch * settings.get("n_epochs", 10)
    centers = {"none": None, "epoch": epoch, "half iteration": iteration / 2, "iteration": iteration}
    if iteration / 4 > epoch:
        centers["quarter iteration"] = iteration / 4
    return [
        Variant(env, name, "ppo_ewma", {**settings, "prox_decay": None if com is None else com / (com + 1)})
        for name, com in centers.items()
    ]


def auto(settings: dict[str, Any]) -> str:
    """
    :param settings: of PPO-EWMA
    :return: name of the age that ``prox_decay="auto"`` means with these
    """
    n_samples, batch_size = settings["n_steps"] * settings["n_envs"], settings.get("batch_size", 64)
    epoch = default_center_of_mass(n_samples, batch_size)
    found = default_center_of_mass(n_samples, batch_size, settings.get("n_epochs", 10))
    return "epoch" if found == epoch else "half iteration"


def variants() -> list[Variant]:
    """
    :return: all ages with the zoo's settings
    """
    settings = {env: {**zoo_settings("ppo_ewma", env), "n_timesteps": n} for env, n in N_TIMESTEPS.items()}
    return [variant for env, each in settings.items() for variant in ages(env, each)]


def report(file: Path) -> None:
    intro = "the settings of `zoo_hyperparams/ppo_ewma.yml` and smaller budgets"
    report_ages(file, variants(), "EWMA against none", intro)


def report_ages(file: Path, variants: Sequence[Variant], title: str, settings: str) -> None:
    """
    :param file: CSV
    :param variants: of the experiment
    :param title: of the report
    :param settings: what these are
    """
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    there = set(runs.env)
    figure, axes = common.panels(dict.fromkeys(variant.env for variant in variants if variant.env in there))
    lines = []
    for env, axis in axes.items():
        in_env = runs[runs.env == env]
        common.plot_curves(axis, in_env, NAMES)
        lines += ["", f"## {env}", "", *common.table_of_returns("centre of mass", in_env, NAMES)]
    next(iter(axes.values())).legend(frameon=False, fontsize="small")
    image = common.save(figure, file)
    default = {variant.env: auto(variant.settings) for variant in variants}
    final, mean = (improvements(runs, measure, default) for measure in ("final_return", "mean_return"))
    if final:
        rows = [[NAMES.get(name, AUTO_NAME), final[name], mean[name]] for name in final]
        headings = ["centre of mass", "final return", "mean return"]
        lines += [
            "",
            "## All environments",
            "",
            "Probability that a run has a higher return than one without EWMA, mean of the environments:",
            "",
            *common.table(headings, rows),
        ]
    intro = [
        f"PPO-EWMA with {settings}, without EWMA and with several centres of mass, counted in gradient steps. Final "
        "return: mean of the training episodes that ended in the last tenth of training; mean return: of all of "
        "training.",
        "",
        image,
    ]
    common.write(file, title, [*intro, *lines])


def improvements(runs: Any, measure: str, default: dict[str, str]) -> dict[str, Any]:
    """
    :param runs: a row per run
    :param measure: column of the returns
    :param default: by environment, name of the age that is the default
    :return: by variant, probability that a run is better than one without EWMA, mean of the environments in which all
        variants have the same seeds
    """
    import pandas as pd
    from rliable import metrics

    from benchmarks.experiments.report import REPS
    from benchmarks.statistics import estimate

    if len(set(default.values())) > 1:  # or else it is one of the others
        chosen = runs[runs.variant == runs.env.map(default)]
        runs = pd.concat([runs, chosen.assign(variant=AUTO)])
    complete = runs.pivot(index=["variant", "seed"], columns="env", values=measure).dropna()
    present = complete.index.get_level_values(0)
    arrays = {name: complete.loc[name].to_numpy() for name in (*NAMES, AUTO) if name in present}
    if "none" not in arrays:
        return {}
    pairs = {name: (array, arrays["none"]) for name, array in arrays.items() if name != "none"}
    return {name: found[0] for name, found in estimate(pairs, metrics.probability_of_improvement, REPS).items()}


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16, "n_epochs": 2}
    execute(parser(__doc__, "ewma", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
