"""
Two ways to make the proximal policy hold back the policy more: an older one, and a larger KL coefficient. PPO-EWMA
with the KL penalty instead of the clip, on a grid of both. From the root of the repository:

    python -m benchmarks.experiments.center_of_mass --jobs 2

Runs that are in results/center_of_mass.csv are not repeated.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.invariance import LARGEST, SETTINGS
from benchmarks.experiments.runs import QUICK_ENV, Variant, execute, parser
from sb3_ppo_ewma.ewma import decay_from_center_of_mass

N_SEEDS = 3
ENV = QUICK_ENV
# In gradient steps; the paper's default is 8, the minibatches of an iteration
CENTERS = [0.5, 2, 8, 32, 128]
COEFFICIENTS = [0.0625, 0.25, 1.0, 4.0, 16.0]


def name_of(center: float, coefficient: float) -> str:
    return f"centre {center:g}, coefficient {coefficient:g}"


QUICK_NAMES = [name_of(center, coefficient) for center in CENTERS[:2] for coefficient in COEFFICIENTS[-2:]]


def variants() -> list[Variant]:
    """
    :return: the grid
    """
    settings = {**SETTINGS[ENV], "n_envs": LARGEST, "clip_range": -1.0}  # no clip
    return [
        Variant(
            ENV,
            name_of(center, coefficient),
            "ppo_ewma",
            {**settings, "prox_decay": decay_from_center_of_mass(center), "kl_coef": coefficient},
        )
        for center in CENTERS
        for coefficient in COEFFICIENTS
    ]


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    final = runs.groupby("variant").final_return.mean()
    grid = np.array([[final.get(name_of(center, each), np.nan) for each in COEFFICIENTS] for center in CENTERS])
    figure, axes = common.panels([ENV])
    axis = axes[ENV]
    image = axis.imshow(grid, origin="lower", cmap="viridis")
    for (row, column), value in np.ndenumerate(grid):
        color = "black" if image.norm(value) > 0.6 else "white"
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize="small")
    axis.set(
        xlabel="KL coefficient",
        ylabel="centre of mass, gradient steps",
        xticks=range(len(COEFFICIENTS)),
        xticklabels=[f"{each:g}" for each in COEFFICIENTS],
        yticks=range(len(CENTERS)),
        yticklabels=[f"{center:g}" for center in CENTERS],
    )
    figure.colorbar(image, label="final return, mean of the runs")
    means = common.means(runs.assign(score=runs.final_return))
    kl = runs.groupby("variant").approx_kl_prox.mean()
    rows = [
        [center, coefficient, means[name], f"{kl[name]:.2g}"]
        for center in CENTERS
        for coefficient in COEFFICIENTS
        if (name := name_of(center, coefficient)) in means
    ]
    intro = [
        f"PPO-EWMA in {ENV} with the KL penalty instead of the clip, one epoch of 8 minibatches. Final return: of the "
        "training episodes in the last tenth of training.",
        "",
        common.save(figure, file),
        "",
    ]
    headings = ["centre of mass", "KL coefficient", "final return", "KL from π_prox"]
    common.write(file, "Centre of mass against KL coefficient", [*intro, *common.table(headings, rows)])


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "center_of_mass", N_SEEDS).parse_args(), variants(), quick, report, QUICK_NAMES)


if __name__ == "__main__":
    main()
