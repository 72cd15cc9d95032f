"""
Turn results/chunks.csv and results/metadata.json into results/README.md and a plot. From the root of the repository:

    python -m benchmarks.speed.report

It takes what is there, also of a measurement that is not finished.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from benchmarks.metadata import command
from benchmarks.speed.cases import CASES, ENTRIES
from benchmarks.speed.run import WARM_UP

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend

HERE = Path(__file__).parent
BASELINES = ["sb3", "sbx"]
LSTM_ONLY = "lstm_only"
LEARN, COLLECTION, TRAINING = PARTS = ["learn", "collection", "training"]
_SECONDS = {LEARN: "seconds", COLLECTION: "collect_seconds", TRAINING: "train_seconds"}
# What an EWMA costs: with it, without it
EWMA_PAIRS = [
    ("ppo_ewma", "ppo_ewma_none"),
    ("ppg_ewma", "ppg"),
    ("ppg_ewma_compiled", "ppg_compiled"),
]
ENTRY_NAMES = {entry: ENTRIES[entry].name for entry in ENTRIES}
# Of Okabe and Ito, told apart by the colour-blind too
_COLORS = {"sbx": "#009E73", "ppo_ewma": "#0072B2", "ppg": "#E69F00"}
MIB = 2**20


@dataclass
class Estimate:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" + self._interval(self.low, self.high, ".2f")

    def as_cost(self) -> str:
        value, low, high = (100 * (ratio - 1) for ratio in (self.value, self.low, self.high))
        return f"{value:.1f} %" + self._interval(low, high, ".1f")

    def _interval(self, low: float, high: float, digits: str) -> str:
        # Of one round, there is none.
        return "" if low == high else f" [{low:{digits}}, {high:{digits}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of chunks.csv")
    parser.add_argument("--reps", type=int, default=10_000, help="resamples of the bootstrap (default: 10000)")
    args = parser.parse_args()
    chunks = pd.read_csv(args.results / "chunks.csv")
    metadata = json.loads((args.results / "metadata.json").read_text())
    plot(chunks, [args.results / "speed.png", args.results / "speed.svg"], args.reps)
    text = report(chunks, metadata, args.reps)
    (args.results / "README.md").write_text(text)
    print(text)


# === Statistics ===


def rates(chunks: pd.DataFrame, part: str) -> pd.DataFrame:
    """
    :param chunks: of one case
    :param part: of the time
    :return: steps per second, a row per round that counts, a column per entry; NaN where there is no measurement
    """
    counted = chunks[(chunks["round"] != WARM_UP) & (chunks[_SECONDS[part]] > 0)]
    if part == LEARN:  # without collection, it would be training
        counted = counted[counted.collect_seconds > 0]
    values = counted.assign(rate=counted.steps / counted[_SECONDS[part]])
    table = values.pivot(index="round", columns="entry", values="rate")
    return table[in_order(table.columns)]


def ratio(table: pd.DataFrame, entry: str, baseline: str, reps: int) -> Estimate | None:
    """
    Ratio of the medians, over the rounds in which both were measured. The interval is a bootstrap's, by percentiles;
    it draws rounds, since measurements of the same round share what else happened on the machine.

    :param table: of :func:`rates`
    :param entry: numerator
    :param baseline: denominator
    :param reps: number of resamples
    :return: ``None`` if there is no such round
    """
    if not {entry, baseline} <= set(table.columns):
        return None
    pairs = table[[entry, baseline]].dropna().to_numpy()
    if len(pairs) == 0:
        return None
    drawn = np.random.default_rng(0).integers(len(pairs), size=(reps, len(pairs)))
    over, under = np.moveaxis(np.median(pairs[drawn], axis=1), -1, 0)
    value, other = np.median(pairs, axis=0)
    low, high = np.percentile(over / under, [2.5, 97.5])
    return Estimate(float(value / other), float(low), float(high))


def against(table: pd.DataFrame, baseline: str, reps: int) -> dict[str, Estimate]:
    """
    :param table: of :func:`rates`
    :param baseline: denominator
    :param reps: number of resamples
    :return: :func:`ratio` of all other entries that have one
    """
    found = {entry: ratio(table, entry, baseline, reps) for entry in table if entry != baseline}
    return {entry: estimate for entry, estimate in found.items() if estimate is not None}


def warm_up_seconds(chunks: pd.DataFrame) -> dict[str, float]:
    """
    :param chunks: of one case
    :return: how much longer the first chunk took than the median of the others, by entry
    """
    is_first = chunks["round"] == WARM_UP
    first, later = (part.groupby("entry").seconds.median() for part in (chunks[is_first], chunks[~is_first]))
    return dict((first - later).dropna())


def microseconds_per_gradient_step(chunks: pd.DataFrame, ppo: dict[str, Any]) -> dict[str, float]:
    """
    :param chunks: of one case
    :param ppo: its hyper-parameters
    :return: median time of training per minibatch, by entry; not of those that also have other minibatches
    """
    seconds_per_step = 1 / rates(chunks, TRAINING).median()
    seconds = seconds_per_step * ppo["batch_size"] / ppo["n_epochs"]
    return {entry: 1e6 * value for entry, value in seconds.items() if not ENTRIES[entry].has_phases}


def cores_used(chunks: pd.DataFrame) -> dict[str, float]:
    """
    :param chunks: of one case
    :return: time of all threads by that of the clock, by entry
    """
    totals = chunks[chunks["round"] != WARM_UP].groupby("entry")[["cpu_seconds", "seconds"]].sum()
    return dict(totals.cpu_seconds / totals.seconds)


def peak_memory(metadata: dict[str, Any], case: str) -> dict[str, int]:
    """
    :param metadata: of metadata.json
    :param case: name
    :return: bytes, the greatest of all starts, by entry
    """
    peaks: dict[str, int] = {}
    for start in metadata["starts"]:
        for name, facts in start["workers"].items():
            worker_case, entry = name.split()
            if worker_case == case and "peak_memory_bytes" in facts:
                peaks[entry] = max(facts["peak_memory_bytes"], peaks.get(entry, 0))
    return peaks


def in_order(names: Iterable[str]) -> list[str]:
    found = set(names)
    return [entry for entry in ENTRIES if entry in found]


def cases_in(chunks: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {case: chunks[chunks.case == case] for case in CASES if (chunks.case == case).any()}


# === Text ===


def report(chunks: pd.DataFrame, metadata: dict[str, Any], reps: int) -> str:
    """
    :param chunks: all measurements
    :param metadata: of metadata.json
    :param reps: number of resamples
    :return: Markdown
    """
    lines = [
        "# Speed",
        "",
        f"Written by `{command()}` from `chunks.csv` and `metadata.json`; not edited. How it is done and what the "
        "entries are: [../../README.md](../../README.md#speed).",
        "",
        "Ratios are those of the medians of steps per second, with the same hyper-parameters: 2 is twice as fast. In "
        f"brackets: 95 % interval of a bootstrap over the rounds, {reps} resamples. It tells about other rounds on "
        "this machine, not about other machines. “learn” is the whole of it, “collection” and “training” "
        "are `collect_rollouts()` and `train()`, with auxiliary phases. The first chunk, which compiles, does not "
        "count.",
        "",
        "![Speed](speed.png)",
        "",
        "## Whole learn(), against PPO of SB3",
        "",
        *overview(chunks, reps),
    ]
    if costs := ewma_costs(chunks, reps):
        lines += ["", "## What the EWMA costs: how much longer it takes", "", *costs]
    for case, of_case in cases_in(chunks).items():
        lines += ["", f"## {CASES[case].title}", "", *case_section(case, of_case, metadata, reps)]
    return "\n".join([*lines, "", "## How it was measured", "", *provenance(metadata), ""])


def overview(chunks: pd.DataFrame, reps: int) -> list[str]:
    """
    :param chunks: all measurements
    :param reps: number of resamples
    :return: lines of a table with a column per case
    """
    columns = {}
    for case, of_case in cases_in(chunks).items():
        table = rates(of_case, LEARN)
        columns[f"`{case}`"] = against(table, BASELINES[0], reps)
    return markdown_table(columns)


def case_section(case: str, chunks: pd.DataFrame, metadata: dict[str, Any], reps: int) -> list[str]:
    """
    :param case: name
    :param chunks: of this case
    :param metadata: of metadata.json
    :param reps: number of resamples
    :return: lines of Markdown
    """
    settings = metadata["settings"][case]
    tables = {part: rates(chunks, part) for part in PARTS}
    ratios: dict[str, dict[str, Any]] = {
        f"{part} ÷ {ENTRIES[baseline].name}": against(table, baseline, reps)
        for baseline in BASELINES
        for part, table in tables.items()
        if baseline in table
    }
    numbers = {f"{part}, steps/s": as_text(tables[part].median(), 0) for part in PARTS}
    gradient_steps = microseconds_per_gradient_step(chunks, settings["ppo"])
    numbers["training, µs per gradient step"] = as_text(gradient_steps, 0)
    numbers["first chunk, extra s"] = as_text(warm_up_seconds(chunks), 1)
    numbers["peak memory, MiB"] = {entry: f"{peak / MIB:.0f}" for entry, peak in peak_memory(metadata, case).items()}
    numbers["cores used"] = as_text(cores_used(chunks), 2)
    return [
        describe(case, settings, chunks),
        "",
        *markdown_table(ratios),
        "",
        *markdown_table(numbers),
        *lstm_shares(tables[TRAINING], reps),
    ]


def lstm_shares(table: pd.DataFrame, reps: int) -> list[str]:
    """
    :param table: of :func:`rates`, of training
    :param reps: number of resamples
    :return: lines of Markdown: which part of training the LSTMs' own arithmetic is, none if that was not measured
    """
    # Steps per second of an entry by those of the passes alone: the inverse of the ratio of their times
    found = against(table, LSTM_ONLY, reps) if LSTM_ONLY in table else {}
    # Auxiliary phases have passes of their own, which were not measured.
    shares = {entry: share for entry, share in found.items() if not ENTRIES[entry].has_phases}
    rows = {f"`training`, part that {ENTRIES[LSTM_ONLY].name} would take": shares}
    return ["", *markdown_table(rows)] if shares else []


def describe(case: str, settings: dict[str, Any], chunks: pd.DataFrame) -> str:
    """
    :param case: name
    :param settings: of the case
    :param chunks: its measurements
    :return: a sentence
    """
    ppo = settings["ppo"]
    n_rounds = chunks[chunks["round"] != WARM_UP]["round"].nunique()
    there = set(chunks.entry)
    classes = [
        f"{ENTRIES[entry].name}: `{name.rpartition('.')[2]}`"
        for entry, name in CASES[case].algorithms.items()
        if entry in there and entry != LSTM_ONLY
    ]
    classes_in_place = f" Classes: {', '.join(classes)}." if classes else ""
    return (
        f"`{case}`: {settings['env']}, {settings['policy']}. Environments: {settings['n_envs']}, steps of each in a "
        f"rollout: {ppo['n_steps']}, minibatches of {ppo['batch_size']}, epochs: {ppo['n_epochs']}. "
        f"Rounds: {n_rounds}, iterations in a chunk: {settings['n_iterations']}.{classes_in_place}"
    )


def ewma_costs(chunks: pd.DataFrame, reps: int) -> list[str]:
    """
    :param chunks: all measurements
    :param reps: number of resamples
    :return: lines of a table with a column per case, none if there is nothing to compare
    """
    rows = [(part, *pair) for part in (LEARN, TRAINING) for pair in EWMA_PAIRS]
    names = {f"{part} {entry}": f"{part}, {ENTRIES[entry].name} ÷ {ENTRIES[other].name}" for part, entry, other in rows}
    columns = {}
    for case, of_case in cases_in(chunks).items():
        # Steps per second of the one without an EWMA by those of the other: the inverse of the ratio of their times
        costs = {f"{part} {entry}": ratio(rates(of_case, part), other, entry, reps) for part, entry, other in rows}
        columns[f"`{case}`"] = {row: cost.as_cost() for row, cost in costs.items() if cost}
    return markdown_table(columns, names) if any(columns.values()) else []


def as_text(values: Any, digits: int) -> dict[str, str]:
    # Adding 0.0 takes the sign from what is rounded to 0.
    numbers = {entry: round(value, digits) + 0.0 for entry, value in dict(values).items() if not np.isnan(value)}
    return {entry: f"{number:.{digits}f}" for entry, number in numbers.items()}


def markdown_table(columns: dict[str, dict[str, Any]], names: dict[str, str] = ENTRY_NAMES) -> list[str]:
    """
    :param columns: heading -> row -> cell
    :param names: of the rows, in their order
    :return: lines of Markdown, without rows that are empty
    """
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for row, name in names.items():
        if any(row in column for column in columns.values()):
            rows.append([name, *(str(column.get(row, "")) for column in columns.values())])
    return ["| " + " | ".join(row) + " |" for row in rows]


def provenance(metadata: dict[str, Any]) -> list[str]:
    """
    :param metadata: of metadata.json
    :return: lines of Markdown: versions, hardware, threads, and every start with its command and date
    """
    conditions = metadata["conditions"]
    hardware = conditions["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    flags = ", ".join(f"{name}={value}" for name, value in conditions["flags"].items()) or "none"
    workers = {name: facts for start in metadata["starts"] for name, facts in start["workers"].items()}
    threads = {ENTRIES[name.split()[1]].name: facts["threads"] for name, facts in workers.items() if "threads" in facts}
    lines = [
        f"- {hardware['cpu']}, {hardware['cores']} cores, of which {conditions['cores']} could be used; "
        f"{hardware['system']}; device {conditions['device']}",
        f"- {versions}",
        f"- threads: {', '.join(f'{name} {number}' for name, number in threads.items())}; environment: {flags}",
        "- seed 0 of models and environments; `metadata.json` has all settings",
    ]
    for start in metadata["starts"]:
        changes = ", with uncommitted changes" if start["uncommitted_changes"] else ""
        lines.append(f"- `{start['command']}`, begun {start['date']}, commit {start['commit']}{changes}")
    return lines


# === Plot ===


def plot(chunks: pd.DataFrame, files: list[Path], reps: int) -> None:
    """
    :param chunks: all measurements
    :param files: images to write
    :param reps: number of resamples of the intervals
    """
    bars = {case: against(rates(of_case, LEARN), BASELINES[0], reps) for case, of_case in cases_in(chunks).items()}
    rows = {entry: row for row, entry in enumerate(in_order(entry for of_case in bars.values() for entry in of_case))}
    size = (2.2 * len(bars) + 2.4, 0.3 * len(rows) + 1)
    figure, axes = plt.subplots(1, len(bars), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (case, of_case) in zip(axes[0], bars.items(), strict=True):
        draw_bars(axis, of_case, rows)
        axis.set_title(case)
    axes[0][0].set_yticks(list(rows.values()), [ENTRIES[entry].name for entry in rows])
    axes[0][0].invert_yaxis()  # the first on top
    figure.supxlabel(f"steps per second of learn(), {ENTRIES[BASELINES[0]].name} = 1", fontsize="medium")
    plt.rcParams["svg.hashsalt"] = "speed"  # the same image from the same numbers
    for file in files:
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def draw_bars(axis: Any, bars: dict[str, Estimate], rows: dict[str, int]) -> None:
    """
    :param axis: of matplotlib
    :param bars: ratios, by entry
    :param rows: where they are drawn
    """
    for entry, bar in bars.items():
        (color,) = {_COLORS[name] for name in _COLORS if entry.startswith(name)}
        error = [[bar.value - bar.low], [bar.high - bar.value]]
        style = {"color": color, "edgecolor": "#ffffff", "hatch": "//" if ENTRIES[entry].is_compiled else ""}
        axis.barh(rows[entry], bar.value, xerr=error, capsize=2, **style)
    axis.axvline(1, color="#000000", linewidth=0.8)


if __name__ == "__main__":
    main()
