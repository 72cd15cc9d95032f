"""
Batch size-invariance: PPO-EWMA and PPG-EWMA with fewer and fewer environments, with all hyper-parameters adjusted, with
all but one, and with none; beside them SB3's PPO. From the root of the repository:

    python -m benchmarks.experiments.invariance --jobs 2

Runs that are in results/invariance.csv are not repeated.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.runs import QUICK_ENV, Variant, execute, parser
from sb3_ppo_ewma import PPGEWMA, PPOEWMA
from sb3_ppo_ewma.batch_scaling import rescale, with_defaults

N_SEEDS = 3
N_ENVS = [64, 16, 4, 1]
LARGEST, SMALLEST = N_ENVS[0], N_ENVS[-1]
# One epoch of 8 minibatches and no clipping of gradients, as in the paper
COMMON: dict[str, Any] = {
    "policy": "MlpPolicy",
    "n_envs": LARGEST,
    "n_steps": 32,
    "batch_size": 256,
    "n_epochs": 1,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "max_grad_norm": float("inf"),
    "advantage_decay": 0.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "MinAtar/SpaceInvaders-v1": {
        **COMMON,
        "policy_kwargs": "dict(activation_fn=nn.ReLU, net_arch=dict(pi=[64, 64], vf=[64, 64]))",
        "n_timesteps": 400_000,
        "learning_rate": 1e-3,
        "ent_coef": 0.01,
    },
    "Pendulum-v1": {
        **COMMON,
        "normalize": True,
        "n_timesteps": 600_000,
        "learning_rate": 2e-3,
        "gamma": 0.9,
        "ent_coef": 0.0,
    },
}
# 12 and 18 phases of 16 * 2048 samples
PHASE: dict[str, dict[str, Any]] = {
    env: {"n_policy_iterations": 16, "aux_batch_size": aux_batch_size, "aux_learning_rate": 1e-3}
    for env, aux_batch_size in (("MinAtar/SpaceInvaders-v1", 128), ("Pendulum-v1", 512))
}
# As SB3's users have it: nothing but the number of environments changes, SB3 clips gradients and has several epochs.
SB3 = {"n_epochs": 4, "learning_rate": 5e-4, "max_grad_norm": 0.5}
ABLATIONS = {
    "learning rate": "learning_rate",
    "centre of mass": "prox_decay",
    "advantage span": "advantage_decay",
    "policy iterations": "n_policy_iterations",
}
PHASES_ONLY = "policy iterations"  # PPO-EWMA has none
GRADIENT_NORM = "max_grad_norm"
UNTRAINED = "untrained"
# Episodes of Pendulum-v1 all have 200 steps: these are 8 of every environment, the last of which end at the very end.
N_UNTRAINED = {"MinAtar/SpaceInvaders-v1": 50_000, "Pendulum-v1": 8 * 200 * LARGEST}
PPO, PPO_EWMA, PPG_EWMA, CLIPPED = "PPO", "PPO-EWMA", "PPG-EWMA", "PPO-EWMA with clipped gradients"


def name_of(algorithm: str, adjustment: str, n_envs: int) -> str:
    return f"{algorithm}, {adjustment}, {n_envs}"


QUICK_NAMES = [
    UNTRAINED,
    *(name_of(algorithm, "adjusted", LARGEST) for algorithm in (PPO_EWMA, PPG_EWMA, CLIPPED)),
    *(name_of(algorithm, "unadjusted", SMALLEST) for algorithm in (PPO_EWMA, PPG_EWMA, PPO)),
    name_of(PPO, "unadjusted", LARGEST),
]


def adjusted(algorithm: str, settings: dict[str, Any], n_envs: int, kept: set[str]) -> dict[str, Any]:
    """
    :param algorithm: PPO-EWMA or PPG-EWMA
    :param settings: for the largest number of environments
    :param n_envs: number of environments
    :param kept: hyper-parameters that are not adjusted
    :return: settings for that number
    """
    if algorithm == PPO:
        return {**settings, "n_envs": n_envs}
    cls = PPGEWMA if algorithm == PPG_EWMA else PPOEWMA
    complete = with_defaults(cls, {name: value for name, value in settings.items() if name != "policy_kwargs"})
    old = rescale(complete, 1, strategy="paper").hyperparameters  # with numbers
    new = rescale(complete, n_envs / settings["n_envs"], strategy="paper").hyperparameters
    names = [name for name in ("n_envs", "batch_size", *ABLATIONS.values(), GRADIENT_NORM) if name in new]
    return {**settings, **{name: old[name] if name in kept else new[name] for name in names}}


def variants() -> list[Variant]:
    """
    :return: the largest number of environments, and fewer with all adjustments; the fewest with all but one adjustment
        and without any
    """
    everything = {*ABLATIONS.values()}
    down = [("adjusted", n, set[str]()) for n in N_ENVS]
    unadjusted = ("unadjusted", SMALLEST, everything)
    without = {name: (f"all but the {name}", SMALLEST, {each}) for name, each in ABLATIONS.items()}
    runs = {
        PPO_EWMA: [*down, unadjusted, *(each for name, each in without.items() if name != PHASES_ONLY)],
        PPG_EWMA: [*down, unadjusted, *without.values()],
        PPO: [("unadjusted", n, everything) for n in N_ENVS],
        CLIPPED: [down[0], down[-1], ("all but the gradient norm", SMALLEST, {GRADIENT_NORM})],
    }
    found = []
    for env, base in SETTINGS.items():
        settings = {
            PPO_EWMA: {**base, "prox_decay": "auto"},
            PPG_EWMA: {**base, "prox_decay": "auto", **PHASE[env]},
            PPO: {name: value for name, value in {**base, **SB3}.items() if name != "advantage_decay"},
        }
        settings[CLIPPED] = {**settings[PPO_EWMA], GRADIENT_NORM: 0.5}
        zoo = {PPO: "ppo", PPO_EWMA: "ppo_ewma", PPG_EWMA: "ppg_ewma", CLIPPED: "ppo_ewma"}
        untrained = {**settings[PPO_EWMA], "learning_rate": 0.0, "n_timesteps": N_UNTRAINED[env]}
        found.append(Variant(env, UNTRAINED, "ppo_ewma", untrained))
        for algorithm in runs if env == QUICK_ENV else (PPO_EWMA, PPG_EWMA, PPO):
            for adjustment, n_envs, kept in runs[algorithm]:
                complete = adjusted(algorithm, settings[algorithm], n_envs, kept)
                if algorithm != PPO and n_envs == LARGEST:
                    complete["callback"] = [{"sb3_ppo_ewma.NoiseScaleCallback": {"every": 10}}]  # changes no training
                found.append(Variant(env, name_of(algorithm, adjustment, n_envs), zoo[algorithm], complete))
    return found


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    import pandas as pd

    from benchmarks.experiments import report as common

    runs = common.load(file)
    parts = runs[runs.variant != UNTRAINED].variant.str.rsplit(", ", n=2, expand=True)
    parts.columns = ["algorithm", "adjustment", "n_envs"]
    untrained = runs[runs.variant == UNTRAINED]
    lines: list[str] = []
    panels: dict[str, tuple[str, Any]] = {}
    for (env, algorithm), group in runs.join(parts, how="inner").groupby(["env", "algorithm"], sort=False):
        first = "unadjusted" if algorithm == PPO else "adjusted"
        largest = name_of(algorithm, first, LARGEST)
        if largest not in set(group.variant) or env not in set(untrained.env):
            continue
        scored = common.normalized(pd.concat([group, untrained[untrained.env == env]]), UNTRAINED, largest)
        panels[f"{algorithm}, {env}"] = (first, scored)
        means, scores = common.means(scored), common.scores(scored)
        rows = [
            [
                adjustment,
                n_envs,
                len(scores[name]),
                means[name],
                common.difference(scores[largest], scores[name]) if name != largest else "",
            ]
            for (adjustment, n_envs, name) in sorted(
                {(row.adjustment, int(row.n_envs), row.variant) for row in group.itertuples()},
                key=lambda row: (row[0] != first, row[0] != "unadjusted", row[0], -row[1]),
            )
        ]
        headings = [
            "adjusted",
            "environments",
            "runs",
            "normalised final return",
            f"less that of {LARGEST} environments",
        ]
        lines += ["", f"## {algorithm} in {env}", "", *common.table(headings, rows)]
        noise = group[group.variant == largest][["noise_scale_policy", "noise_scale_joint"]].mean()
        if algorithm != PPO and noise.notna().all():
            lines += [
                "",
                f"Gradient noise scale with {LARGEST} environments, mean of training: {noise.iloc[0]:.0f} samples for "
                f"the policy loss, {noise.iloc[1]:.0f} for the joint loss; a minibatch has "
                f"{SETTINGS[str(env)]['batch_size']}.",
            ]
    figure, axes = common.panels(panels)
    for name, axis in axes.items():
        first, scored = panels[name]
        algorithm = name.partition(",")[0]
        names = {name_of(algorithm, first, n): f"{n} environment{'s'[: n - 1]}" for n in N_ENVS}
        if first == "adjusted":
            names[name_of(algorithm, "unadjusted", SMALLEST)] = f"{SMALLEST}, unadjusted"
        common.plot_curves(axis, scored, names)
        axis.legend(frameon=False, fontsize="small")
    images = [common.save(figure, file)]
    figure, axes = common.panels(panels)
    for name, axis in axes.items():
        plot_ablations(axis, *panels[name])
    images.append(common.save(figure, file, "_ablations"))
    intro = [
        "Final return of the training episodes in the last tenth of training, normalised: 0 is the untrained policy, 1 "
        f"the mean of the algorithm with {LARGEST} environments. PPO is SB3's, where nothing but the number of "
        "environments changes.",
        "",
        images[0],
        "",
        images[1],
    ]
    headings = ["algorithm", "adjusted", "tasks", "runs of each", f"return with {SMALLEST} less that with {LARGEST}"]
    headings.append("either way")
    table = common.table(headings, overall(panels))
    title = f"## From {LARGEST} environments to {SMALLEST}, mean of the tasks"
    common.write(file, "Batch size-invariance", [*intro, "", title, "", *table, *lines])


def overall(panels: dict[str, tuple[str, Any]]) -> list[list[Any]]:
    """
    :param panels: by algorithm and environment, name of the adjustment of its largest batch, normalised runs
    :return: by algorithm and adjustment, how many tasks and seeds all of them have, the mean difference, and that of
        the tasks' differences without their signs
    """
    from benchmarks.experiments import report as common

    both = [PPO_EWMA, PPG_EWMA]
    adjustments = [(both, "adjusted"), ([PPO_EWMA], "adjusted"), ([PPG_EWMA], "adjusted"), (both, "unadjusted")]
    for name in ABLATIONS:
        adjustments.append(([PPG_EWMA] if name == PHASES_ONLY else both, f"all but the {name}"))
    adjustments.append(([PPO], "unadjusted"))
    rows = []
    for algorithms, adjustment in adjustments:
        pairs = []
        for name, (first, scored) in panels.items():
            algorithm = name.partition(", ")[0]
            wanted = [name_of(algorithm, first, LARGEST), name_of(algorithm, adjustment, SMALLEST)]
            by_seed = scored.pivot(index="seed", columns="variant", values="score")
            if algorithm in algorithms and set(wanted) <= set(by_seed.columns):
                pairs.append(by_seed[wanted].dropna())
        seeds = set.intersection(*(set(pair.index) for pair in pairs)) if pairs else set()
        if seeds:
            largest, smallest = np.array([pair.loc[sorted(seeds)] for pair in pairs]).transpose(2, 1, 0)
            comparisons = common.difference(largest, smallest), common.distance(largest, smallest)
            rows.append([" and ".join(algorithms), adjustment, len(pairs), len(seeds), *comparisons])
    return rows


def plot_ablations(axis: Any, first: str, scored: Any) -> None:
    """
    :param axis: to draw on
    :param first: name of the adjustment that is a line
    :param scored: runs of an algorithm in an environment
    """
    from benchmarks.experiments import report as common

    rest = [name for name in scored.adjustment.dropna().unique() if name != first]
    for index, (adjustment, color) in enumerate(zip([first, *rest], common.COLORS, strict=False)):
        means = scored[scored.adjustment == adjustment].groupby("n_envs").score.agg(["mean", "min", "max"])
        means = means.loc[sorted(means.index, key=int, reverse=True)]
        mean, low, high = means.to_numpy().T
        places = [N_ENVS.index(int(n)) + 0.1 * index for n in means.index]
        axis.errorbar(
            places, mean, yerr=[mean - low, high - mean], marker="o", capsize=2, color=color, label=adjustment
        )
    axis.set(
        xticks=range(len(N_ENVS)),
        xticklabels=N_ENVS,
        xlabel="environments",
        ylabel="normalised final return, mean and range",
    )
    axis.legend(frameon=False, fontsize="small")


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "invariance", N_SEEDS).parse_args(), variants(), quick, report, QUICK_NAMES)


if __name__ == "__main__":
    main()
