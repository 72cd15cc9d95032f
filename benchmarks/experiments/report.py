"""What the reports of the experiments have in common: everything is made from the CSV and the JSON beside it."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from rliable import metrics

from benchmarks.experiments.runs import RETURNS
from benchmarks.metadata import command
from benchmarks.statistics import Estimate, estimate, iqm_at_every_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REPS = 2000
# Of Okabe and Ito, told apart by the colour-blind too
COLORS = ["#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442"]


def load(file: Path) -> pd.DataFrame:
    """
    :param file: CSV of an experiment
    :return: a row per run, with its mean return of all of training as ``mean_return``
    """
    runs = pd.read_csv(file).sort_values(["env", "variant", "seed"], ignore_index=True)
    return runs.assign(mean_return=runs[RETURNS].mean(axis=1))


def scores(runs: pd.DataFrame) -> dict[str, np.ndarray]:
    """
    :param runs: with a column ``score``
    :return: by variant, (runs, 1) scores
    """
    return {str(name): group.score.to_numpy()[:, None] for name, group in runs.groupby("variant")}


def means(runs: pd.DataFrame) -> dict[str, Estimate]:
    """
    :param runs: with a column ``score``
    :return: by variant, the mean
    """
    found = estimate(scores(runs), metrics.aggregate_mean, REPS)
    return {name: estimates[0] for name, estimates in found.items()}


def difference(runs: np.ndarray, others: np.ndarray) -> Estimate:
    """
    :param runs: (runs, envs) scores
    :param others: (runs, envs) scores
    :return: mean of the others less that of the runs, with the 95 % interval of a bootstrap within each environment
    """
    return _comparison(lambda a, b: metrics.aggregate_mean(b) - metrics.aggregate_mean(a), runs, others)


def distance(runs: np.ndarray, others: np.ndarray) -> Estimate:
    """
    :param runs: (runs, envs) scores
    :param others: (runs, envs) scores
    :return: mean over the environments of how far the means are apart, in whatever direction, with an interval as of
        :func:`difference`; chance alone makes it larger than 0
    """
    return _comparison(lambda a, b: float(np.abs(b.mean(axis=0) - a.mean(axis=0)).mean()), runs, others)


def share(runs: np.ndarray, others: np.ndarray) -> Estimate:
    """
    :param runs: (runs, envs) scores
    :param others: (runs, envs) scores
    :return: mean of the others as a share of that of the runs, with an interval as of :func:`difference`
    """
    return _comparison(lambda a, b: metrics.aggregate_mean(b) / metrics.aggregate_mean(a), runs, others)


def _comparison(statistic: Callable[[np.ndarray, np.ndarray], float], *scores: np.ndarray) -> Estimate:
    return estimate({"": scores}, lambda *arrays: np.array([statistic(*arrays)]), REPS)[""][0]


def normalized(runs: pd.DataFrame, zero: str, one: str, measure: str = "final_return") -> pd.DataFrame:
    """
    :param runs: a row per run
    :param zero: variant whose mean is 0 in each environment
    :param one: variant whose mean is 1
    :param measure: column of the returns
    :return: the same with a column ``score``
    """
    mean = runs.groupby(["env", "variant"])[measure].mean().unstack("variant")
    low, high = runs.env.map(mean[zero]), runs.env.map(mean[one])
    return runs.assign(score=(runs[measure] - low) / (high - low))


def curves(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """
    :param runs: of one variant in one environment
    :return: (parts,) steps in the middle of each part of training, (runs, parts) returns; gaps are interpolated
    """
    steps = (np.arange(len(RETURNS)) + 0.5) / len(RETURNS) * runs.n_timesteps.iloc[0]
    returns = runs[RETURNS].interpolate(axis=1, limit_direction="both").to_numpy()
    return steps, returns


def plot_curves(axis: Axes, runs: pd.DataFrame, names: Mapping[str, str], colors: Sequence[str] = COLORS) -> None:
    """
    :param axis: to draw on
    :param runs: of one environment
    :param names: label of each variant that is drawn
    :param colors: one for each
    """
    for (variant, label), color in zip(names.items(), colors, strict=False):
        group = runs[runs.variant == variant]
        if len(group) == 0:
            continue
        steps, returns = curves(group)
        band = estimate({variant: returns[:, None]}, iqm_at_every_step, REPS)[variant]
        axis.plot(steps, [point.value for point in band], color=color, label=label)
        low, high = [point.low for point in band], [point.high for point in band]
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlabel="steps", ylabel="return, IQM of the runs")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))


def panels(envs: Iterable[str], n_columns: int = 3) -> tuple[Figure, dict[str, Axes]]:
    """
    :param envs: environments
    :param n_columns: at most
    :return: a figure with a panel for each
    """
    names = list(envs)
    n_columns = min(n_columns, len(names))
    n_rows = -(-len(names) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(4.6 * n_columns, 3.4 * n_rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    found = dict(zip(names, axes.flat, strict=False))
    for name, axis in found.items():
        axis.set_title(name)
    return figure, found


def save(figure: Figure, file: Path, suffix: str = "") -> str:
    """
    :param figure: to write beside the CSV, as PNG and SVG
    :param file: CSV
    :param suffix: of the name
    :return: its line of Markdown
    """
    name = file.with_name(f"{file.stem}{suffix}")
    matplotlib.rcParams["svg.hashsalt"] = "0"  # the same file again
    figure.savefig(name.with_suffix(".png"), dpi=100, metadata={"Software": None})
    figure.savefig(name.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return f"![{name.stem}]({name.stem}.png)"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """
    :param headings: of the columns
    :param rows: cells
    :return: lines of Markdown
    """
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def table_of_returns(heading: str, runs: pd.DataFrame, names: Mapping[str, str]) -> list[str]:
    """
    :param heading: of the variants
    :param runs: of one environment
    :param names: label of each variant that is shown
    :return: lines of Markdown: final and mean return, and how far the policy moved
    """
    finals = means(runs.assign(score=runs.final_return))
    areas = means(runs.assign(score=runs.mean_return))
    moved = runs.groupby("variant")[["clip_fraction", "approx_kl_prox"]].mean()
    rows = [
        [label, len(runs[runs.variant == name]), finals[name], areas[name]]
        + [f"{value:.2g}" if np.isfinite(value) else "" for value in moved.loc[name]]  # without a clip, no fraction
        for name, label in names.items()
        if name in finals
    ]
    return table([heading, "runs", "final return", "mean return", "clip fraction", "KL from π_prox"], rows)


def write(file: Path, title: str, lines: Sequence[str]) -> None:
    """
    :param file: CSV, beside which the report is written as Markdown, with where its numbers come from
    :param title: of the report
    :param lines: of it
    """
    content = json.loads(file.with_suffix(".json").read_text())
    runs = load(file)
    seeds = ", ".join(map(str, sorted(runs.seed.unique())))
    head = [
        f"# {title}",
        "",
        f"Written by `{command()}` from `{file.name}` and `{file.stem}.json`; not edited. Seeds: {seeds}. In brackets: "
        "95 % interval of a stratified bootstrap; with so few runs, rather too narrow than too wide.",
        "",
    ]
    tail = ["", "## How it was measured", "", f"`{file.stem}.json` has the settings of every variant.", ""]
    tail += [
        f"- `{start['command']}`, begun {start['date']}: {start['runs']} runs; {circumstances(start)}; {start['jobs']} "
        "runs at a time, one thread each"
        for start in content["starts"]
        if start["runs"]
    ]
    text = "\n".join([*head, *lines, *tail, ""])
    file.with_suffix(".md").write_text(text)
    print(text)


def circumstances(start: Mapping[str, Any]) -> str:
    """
    :param start: what was recorded when runs began
    :return: commit, versions and hardware
    """
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version[0].isdigit())
    changes = ", with uncommitted changes" if start["uncommitted_changes"] else ""
    hardware = start["hardware"]
    return (
        f"commit {start['commit']}{changes}; {versions}; {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['system']}"
    )
