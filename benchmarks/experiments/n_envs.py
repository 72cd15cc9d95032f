"""
Another number of environments, with the settings that people use: SB3's PPO with nothing else changed, SB3's PPO with
`n_steps` divided by hand, and PPO-EWMA and PPG-EWMA with `tuned_for_n_envs`. From the root of the repository:

    python -m benchmarks.experiments.n_envs --jobs 2

Runs that are in results/n_envs.csv are not repeated.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

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
    "MinAtar/SpaceInvaders-v1": 100_000,
    "MinAtar/Breakout-v1": 100_000,
}
PHASIC = ("CartPole-v1", QUICK_ENV)
# Where as many samples leave rollouts of one or two steps to the most environments
SHORT = ("CartPole-v1", "Hopper-v5", "HalfCheetah-v5")
LENGTHS = [1, 2, 4, 16, 32]
UNTRAINED = "untrained"
NAIVE, BY_HAND = "PPO, only n_envs changed", "PPO, as many samples"
PPO_EWMA, PPG_EWMA = "PPO-EWMA, tuned_for_n_envs", "PPG-EWMA, tuned_for_n_envs"


def name_of(method: str, n_envs: int) -> str:
    return f"{method}, {n_envs}"


QUICK_NAMES = [
    UNTRAINED,
    name_of(BY_HAND, 16),
    *(name_of(method, n_envs) for method in (NAIVE, PPO_EWMA, PPG_EWMA) for n_envs in (16, 64)),
]


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
    return [Variant(env, name, "ppo_ewma", each, is_tested=True) for name, each in found.items()]


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
        found.append(Variant(env, UNTRAINED, "ppo", untrained, is_tested=True))
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
                Variant(env, name_of(method, n_envs), algo, settings, is_tested=True)
                for method, (algo, settings) in methods.items()
            ]
        if env in SHORT:
            found += rule_variants(env, ours)
    return found


def reference_of(method: str, tuned: int) -> str:
    """
    :param method: of some runs
    :param tuned: number of environments that the settings are for
    :return: name of the variant that they are compared with
    """
    method = {BY_HAND: NAIVE}.get(method, method)
    return name_of(method if method in (NAIVE, PPG_EWMA) else PPO_EWMA, tuned)


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    import pandas as pd

    from benchmarks.experiments import report as common

    runs = common.load(file)
    parts = runs[runs.variant != UNTRAINED].variant.str.rsplit(", ", n=1, expand=True)
    parts.columns = ["method", "n_envs"]
    untrained = runs[runs.variant == UNTRAINED]
    lines: list[str] = []
    panels: dict[str, Any] = {}
    tuned = {env: zoo_settings("ppo_ewma", env)["n_envs"] for env in N_TIMESTEPS}
    scored_by: dict[tuple[str, str], Any] = {}
    for env, group in runs.join(parts, how="inner").groupby("env", sort=False):
        group = group.assign(n_envs=group.n_envs.astype(int))
        rows = []
        for method, of_method in group.groupby("method", sort=False):
            one = reference_of(str(method), tuned[str(env)])
            reference = group[group.variant == one]
            if reference.empty or not (untrained.env == env).any():
                continue
            both = pd.concat([of_method, reference, untrained[untrained.env == env]]).drop_duplicates(
                ["variant", "seed"]
            )
            scored = common.normalized(both, UNTRAINED, one)
            scored_by[str(method), str(env)] = scored
            scores, means = common.scores(scored), common.means(scored)
            for n_envs in sorted(of_method.n_envs.unique()):
                name = name_of(str(method), n_envs)
                returns = of_method[of_method.variant == name].final_return
                less = common.difference(scores[one], scores[name]) if name != one else ""
                rows.append([method, n_envs, len(returns), f"{returns.mean():.4g}", means[name], less])
        if rows:
            panels[str(env)] = rows
            headings = ["", "environments", "runs", "final return", "normalised", f"less that of {tuned[str(env)]}"]
            lines += ["", f"## {env}, tuned for {tuned[str(env)]}", "", *common.table(headings, rows)]
    figure, axes = common.panels(panels, n_columns=4)
    for env, axis in axes.items():
        plot(axis, panels[env], tuned[env])
    next(iter(axes.values())).legend(frameon=False, fontsize="small")
    intro = [
        "What the policy returns in test episodes, with sampled actions: ten each after 80, 85, 90, 95 and 100 % "
        "of training, which has as many environment steps whatever the number of environments. Normalised: 0 is the "
        "untrained policy, 1 the mean of the method with the number of environments that the zoo's settings are for. "
        "Where as many samples leave rollouts of a step or two, other choices than those of `tuned_for_n_envs` are "
        "compared: other lengths of a rollout, and larger minibatches instead of more of them.",
        "",
        common.save(figure, file),
    ]
    title = "## How far a run is from the tuned number of environments, mean of the tasks"
    headings = ["", "environments", "tasks", "runs of each", "normalised return less that of the tuned", "either way"]
    common.write(
        file,
        "Another number of environments",
        [*intro, "", title, "", *common.table(headings, overall(scored_by, tuned)), *lines],
    )


def overall(scored_by: dict[tuple[str, str], Any], tuned: dict[str, int]) -> list[list[Any]]:
    """
    :param scored_by: by method and environment, normalised runs
    :param tuned: by environment, the number of environments of the zoo
    :return: by method and numbers of environments, how far the mean is from that of the tuned number
    """
    from benchmarks.experiments import report as common

    rows = []
    for method in (NAIVE, BY_HAND, PPO_EWMA, PPG_EWMA):
        for label, numbers in (*((str(n), [n]) for n in N_ENVS), ("1 to 64", N_ENVS[:-1])):
            pairs = []
            for (name, env), scored in scored_by.items():
                base = reference_of(name, tuned[env])
                wanted = [name_of(method, n) for n in numbers if n != tuned[env]]
                by_seed = scored.pivot(index="seed", columns="variant", values="score")
                if name == method and {base, *wanted} <= set(by_seed.columns):
                    pairs += [by_seed[[base, each]].dropna().to_numpy() for each in wanted]
            n_runs = min(map(len, pairs), default=0)
            if n_runs:
                ones, others = np.stack([pair[:n_runs] for pair in pairs], axis=1).transpose(2, 0, 1)
                comparisons = common.difference(ones, others), common.distance(ones, others)
                rows.append([method, label, len(pairs), n_runs, *comparisons])
    return rows


def plot(axis: Any, rows: list[list[Any]], tuned: int) -> None:
    """
    :param axis: to draw on
    :param rows: of the table of an environment
    :param tuned: number of environments of the zoo
    """
    from benchmarks.experiments import report as common

    for method, color in zip((PPO_EWMA, PPG_EWMA, BY_HAND, NAIVE), common.COLORS[1:], strict=False):
        chosen = {row[1]: row[4] for row in rows if row[0] == method}
        if method == BY_HAND:
            chosen |= {row[1]: row[4] for row in rows if row[0] == NAIVE and row[1] == tuned}
        if chosen:
            numbers = sorted(chosen)
            axis.plot(numbers, [chosen[n].value for n in numbers], marker="o", color=color, label=method)
            low, high = [chosen[n].low for n in numbers], [chosen[n].high for n in numbers]
            axis.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
    axis.axvline(tuned, color="gray", linestyle=":", linewidth=1)
    axis.set(xscale="log", xticks=N_ENVS, xticklabels=N_ENVS, xlabel="environments", ylabel="normalised final return")
    axis.minorticks_off()


def main() -> None:
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16}
    execute(parser(__doc__, "n_envs", N_SEEDS).parse_args(), variants(), quick, report, QUICK_NAMES)


if __name__ == "__main__":
    main()
