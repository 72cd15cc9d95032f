"""
Turn results/evaluations.csv into results/README.md and a plot, with rliable's statistics. From the root of the
repository:

    python -m benchmarks.comparison.report

It takes what is there, also of a comparison that is not finished.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from rliable import metrics
from scipy.integrate import trapezoid

from benchmarks.metadata import command
from benchmarks.statistics import Estimate, estimate, iqm_at_every_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend

HERE = Path(__file__).parent
BASELINE = "ppo"
NAMES = {"ppo": "PPO", "ppo_ewma": "PPO-EWMA", "ppg": "PPG", "ppg_ewma": "PPG-EWMA"}
# Of Okabe and Ito, told apart by the colour-blind too
COLORS = {"ppo": "#000000", "ppo_ewma": "#0072B2", "ppg": "#E69F00", "ppg_ewma": "#CC79A7"}
FINAL_PART = 0.1
# For the statistics that take long, as in rliable's own examples
FEW_REPS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of evaluations.csv")
    parser.add_argument("--reps", type=int, default=10_000, help="resamples of the bootstrap (default: 10000)")
    args = parser.parse_args()
    evaluations = pd.read_csv(args.results / "evaluations.csv")
    metadata = json.loads((args.results / "metadata.json").read_text())
    plot(evaluations, args.results / "learning_curves.png", args.reps)
    text = report(evaluations, metadata, args.reps)
    (args.results / "README.md").write_text(text)
    print(text)


# === Statistics ===


def final_performance(run: pd.DataFrame) -> float:
    """
    :param run: evaluations of one run
    :return: mean over those in the last tenth of training
    """
    last = run.timesteps > (1 - FINAL_PART) * run.timesteps.max()
    return float(run.mean_reward[last].mean())


def area_under_curve(run: pd.DataFrame) -> float:
    """
    :param run: evaluations of one run
    :return: area by the trapezoidal rule, divided by the steps from the first evaluation to the last
    """
    length = run.timesteps.max() - run.timesteps.min()
    return float(trapezoid(run.mean_reward, run.timesteps) / length) if length else float(run.mean_reward.mean())


def scores(evaluations: pd.DataFrame, score: Callable[[pd.DataFrame], float]) -> pd.DataFrame:
    """
    :param evaluations: of all runs
    :param score: of a run
    :return: a row per algorithm and seed, in this order, a column per environment; NaN where a run is missing
    """
    sorted_evaluations = evaluations.sort_values("timesteps")
    values = {key: score(run) for key, run in sorted_evaluations.groupby(["algo", "seed", "env"])}
    return pd.Series(values).rename_axis(["algo", "seed", "env"]).unstack("env")


def estimate_in(table: pd.Series, statistic: Callable[[np.ndarray], float], reps: int) -> dict[str, Estimate]:
    """
    :param table: a score of every run in one environment
    :param statistic: of the scores (runs, 1) of an algorithm
    :param reps: number of resamples
    :return: of each algorithm
    """
    score_dict = {algo: values.to_numpy()[:, None] for algo, values in table.dropna().groupby("algo")}
    return {algo: estimates[0] for algo, estimates in estimate(score_dict, statistic, reps).items()}


def probabilities_of_improvement(table: pd.DataFrame, reps: int) -> dict[str, Estimate]:
    """
    :param table: a score of every run, a column per environment; runs that lack one are left out
    :param reps: number of resamples
    :return: of each algorithm but the baseline, the probability that a run of it has a higher score than one of the
        baseline's, averaged over the environments
    """
    arrays = {algo: values.to_numpy() for algo, values in table.dropna().groupby("algo")}
    if BASELINE not in arrays:
        return {}
    pairs = {algo: (arrays[algo], arrays[BASELINE]) for algo in NAMES if algo in arrays and algo != BASELINE}
    found = estimate(pairs, metrics.probability_of_improvement, min(reps, FEW_REPS))
    return {algo: estimates[0] for algo, estimates in found.items()}


# === Text ===


def report(evaluations: pd.DataFrame, metadata: dict[str, Any], reps: int) -> str:
    """
    :param evaluations: of all runs
    :param metadata: of metadata.json
    :param reps: number of resamples
    :return: Markdown
    """
    finals, areas = scores(evaluations, final_performance), scores(evaluations, area_under_curve)
    episodes = ", ".join(map(str, sorted(evaluations.n_episodes.unique())))
    lines = [
        "# PPO, PPO-EWMA, PPG and PPG-EWMA",
        "",
        f"Written by `{command()}` from `evaluations.csv` and `metadata.json`; not edited. How it is done and which "
        "settings the algorithms have: [../../README.md](../../README.md).",
        "",
        f"Final performance: mean reward of the evaluations ({episodes} episodes each, deterministic actions) in the "
        "last tenth of training. Area: under the curve of evaluations, divided by its length. IQM: interquartile mean "
        f"of the runs. In brackets: 95 % interval of a stratified bootstrap with {reps} resamples "
        f"({min(reps, FEW_REPS)} for probabilities and curves); with so few runs, rather too narrow than too wide. "
        "The runs are the sample: intervals tell about other seeds, not about other environments or settings.",
        "",
        "![Learning curves](learning_curves.png)",
    ]
    for env in finals.columns:
        final_iqm = estimate_in(finals[env], metrics.aggregate_iqm, reps)
        columns = {
            "runs": finals[env].dropna().groupby("algo").size().to_dict(),
            "final, IQM": final_iqm,
            "final, mean": estimate_in(finals[env], metrics.aggregate_mean, reps),
            "area, IQM": estimate_in(areas[env], metrics.aggregate_iqm, reps),
            "seconds per run": wall_seconds(evaluations[evaluations.env == env]),
        }
        lines += ["", f"## {env}", "", *markdown_table("algorithm", columns), ""]
        lines += verdicts(final_iqm, probabilities_of_improvement(finals[[env]], reps))
    lines += ["", "## All environments", "", *overall(finals, reps)]
    return "\n".join([*lines, "", "## How it was measured", "", *provenance(evaluations, metadata), ""])


def markdown_table(first: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """
    :param first: heading of the algorithms
    :param columns: heading -> algorithm -> cell
    :return: lines of Markdown
    """
    rows = [[NAMES[algo], *(str(column.get(algo, "")) for column in columns.values())] for algo in NAMES]
    rows = [row for row in rows if any(row[1:])]
    return ["| " + " | ".join(row) + " |" for row in [[first, *columns], ["---"] * (len(columns) + 1), *rows]]


def wall_seconds(evaluations: pd.DataFrame) -> dict[str, str]:
    per_run = evaluations.groupby(["algo", "seed"]).wall_seconds.first()
    return {algo: f"{seconds.mean():.0f}" for algo, seconds in per_run.groupby("algo")}


def verdicts(final_iqm: dict[str, Estimate], improvements: dict[str, Estimate]) -> list[str]:
    """
    :param final_iqm: of the final performance, of all algorithms
    :param improvements: probability of improvement over the baseline
    :return: a sentence for each algorithm but the baseline, which says no more than the intervals do
    """
    relations = {
        "above": f"the interval of the IQM is above {NAMES[BASELINE]}'s",
        "below": f"the interval of the IQM is below {NAMES[BASELINE]}'s",
        "overlap": f"the intervals of the IQM and of {NAMES[BASELINE]}'s overlap",
    }
    return [
        f"- {NAMES[algo]}: {relations[final_iqm[algo].against(final_iqm[BASELINE])]}. Probability that a run ends "
        f"better than one of {NAMES[BASELINE]}: {improvements[algo]}, {one_half(improvements[algo])}."
        for algo in NAMES
        if algo in improvements
    ]


def one_half(probability: Estimate) -> str:
    relation = probability.against(Estimate(0.5, 0.5, 0.5))
    return {"above": "above one half", "below": "below one half", "overlap": "not told apart from one half"}[relation]


def overall(finals: pd.DataFrame, reps: int) -> list[str]:
    """
    :param finals: final performance of every run
    :param reps: number of resamples
    :return: lines of Markdown about all environments together
    """
    improvements = probabilities_of_improvement(finals, reps)
    if not improvements:
        return [f"No seed has runs of {NAMES[BASELINE]} and of another algorithm in all environments."]
    return [
        f"Probability that a run ends better than one of {NAMES[BASELINE]}, averaged over the environments (the "
        "rewards themselves have no common scale):",
        "",
        *(f"- {NAMES[algo]}: {found}, {one_half(found)}" for algo, found in improvements.items()),
    ]


def provenance(evaluations: pd.DataFrame, metadata: dict[str, Any]) -> list[str]:
    """
    :param evaluations: of all runs
    :param metadata: of metadata.json
    :return: lines of Markdown: seeds, and for every start of the comparison its command, date, versions and hardware
    """
    seeds = ", ".join(map(str, sorted(evaluations.seed.unique())))
    lines = [f"Seeds: {seeds}. `metadata.json` has the hyper-parameters and tells which start made which run."]
    for start in metadata["starts"]:
        if not start["runs"]:
            continue
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        hardware = start["hardware"]
        changes = ", with uncommitted changes" if start["uncommitted_changes"] else ""
        lines += [
            "",
            f"- `{start['command']}`, begun {start['date']}: {len(start['runs'])} runs",
            f"  - commit {start['commit']}{changes}; {versions}",
            f"  - {hardware['cpu']}, {hardware['cores']} cores, {hardware['system']}; {start['jobs']} runs at a time, "
            f"{start['threads_per_run']} thread each",
        ]
    return lines


# === Plot ===


def plot(evaluations: pd.DataFrame, file: Path, reps: int) -> None:
    """
    :param evaluations: of all runs
    :param file: image to write
    :param reps: number of resamples of the bands
    """
    envs = sorted(evaluations.env.unique())
    figure, axes = plt.subplots(1, len(envs), figsize=(4.6 * len(envs), 3.4), squeeze=False, layout="constrained")
    for axis, env in zip(axes[0], envs, strict=True):
        for algo in NAMES:
            runs = evaluations[(evaluations.env == env) & (evaluations.algo == algo)]
            if len(runs):
                curve = runs.pivot(index="timesteps", columns="seed", values="mean_reward").dropna()
                band = estimate({algo: curve.to_numpy().T[:, None]}, iqm_at_every_step, min(reps, FEW_REPS))[algo]
                axis.plot(curve.index, [point.value for point in band], color=COLORS[algo], label=NAMES[algo])
                low, high = [point.low for point in band], [point.high for point in band]
                axis.fill_between(curve.index, low, high, color=COLORS[algo], alpha=0.15, linewidth=0)
        axis.set(title=env, xlabel="steps", ylabel="mean reward, IQM of the runs")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes[0][0].legend(frameon=False)
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
