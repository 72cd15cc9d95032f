"""
PPO-EWMA with one epoch of small minibatches instead of the several epochs of rl-zoo3's settings, in as many gradient
steps. With one epoch, hyper-parameters can be rescaled to another number of environments. From the root of the
repository:

    python -m benchmarks.experiments.one_epoch --jobs 2

Runs that are in results/one_epoch.csv are not repeated.
"""

import math
from pathlib import Path
from typing import Any

from benchmarks.experiments import ewma
from benchmarks.experiments.runs import Variant, execute, parser, zoo_settings
from sb3_ppo_ewma.ewma import decay_from_span

N_SEEDS = 3
NAMES = {
    "same rate": "one epoch, the same learning rate",
    "rate / sqrt(epochs)": "one epoch, the rate divided by the root of the epochs",
    ewma.AUTO: "several epochs, PPO-EWMA",
    "none": "several epochs, PPO",
}
# Advantages are normalised over as many samples at least, and over as many iterations as leave one of them when the
# number of environments is raised to this one.
NORMALIZED, SCALABLE = 2048, 8


def one_epoch(settings: dict[str, Any]) -> dict[str, Any]:
    """
    :param settings: of several epochs
    :return: of one epoch with about as many gradient steps: minibatches of the power of two next to
        batch_size/n_epochs, above it where it lies between two
    """
    n_samples = settings["n_steps"] * settings["n_envs"]
    batch_size = min(settings.get("batch_size", 64), n_samples) / settings.get("n_epochs", 10)
    span = max(1, NORMALIZED // n_samples, SCALABLE // settings["n_envs"])
    return {
        **settings,
        "n_epochs": 1,
        "batch_size": 2 ** max(0, math.ceil(math.log2(batch_size))),
        "prox_decay": "auto",
        "advantage_decay": math.ceil(decay_from_span(span) * 1e4) / 1e4,
    }


def scaled(learning_rate: Any, factor: float) -> Any:
    if isinstance(learning_rate, str):
        return f"lin_{float(learning_rate.removeprefix('lin_')) * factor:.6g}"
    return learning_rate * factor


def variants() -> list[Variant]:
    """
    :return: one epoch with the zoo's learning rate, and with it divided by the square root of the number of epochs, as
        the rule of the paper has it for minibatches that are smaller by that factor
    """
    found = []
    for env, n_timesteps in ewma.N_TIMESTEPS.items():
        settings = {**zoo_settings("ppo_ewma", env), "n_timesteps": n_timesteps}
        factors = {"same rate": 1.0, "rate / sqrt(epochs)": settings.get("n_epochs", 10) ** -0.5}
        found += [
            Variant(
                env,
                name,
                "ppo_ewma",
                {**one_epoch(settings), "learning_rate": scaled(settings.get("learning_rate", 3e-4), factor)},
            )
            for name, factor in factors.items()
        ]
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    import pandas as pd

    from benchmarks.experiments import report as common

    runs = common.load(file)
    several = file.with_name("ewma.csv")
    if several.is_file():
        before = common.load(several)
        before = before[before.n_timesteps == before.env.map(runs.groupby("env").n_timesteps.first())]
        default = {env: ewma.auto(zoo_settings("ppo_ewma", env)) for env in ewma.N_TIMESTEPS}
        averaged = before[before.variant == before.env.map(default)].assign(variant=ewma.AUTO)
        runs = pd.concat([runs, before[before.variant == "none"], averaged])
    figure, axes = common.panels(env for env in ewma.N_TIMESTEPS if env in set(runs.env))
    lines = []
    for env, axis in axes.items():
        there = runs[runs.env == env]
        common.plot_curves(axis, there, NAMES)
        lines += ["", f"## {env}", "", *common.table_of_returns("settings", there, NAMES)]
    next(iter(axes.values())).legend(frameon=False, fontsize="small")
    intro = [
        "PPO-EWMA with one epoch of smaller minibatches, in as many gradient steps as the settings of "
        "`zoo_hyperparams/ppo_ewma.yml` make in several epochs; beside it runs with those settings, of `ewma.csv`. "
        "Final return: mean of the training episodes that ended in the last tenth of training; mean return: of all of "
        "training.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "One epoch instead of several", [*intro, *lines])


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "one_epoch", N_SEEDS).parse_args(), variants(), quick, report)


if __name__ == "__main__":
    main()
