"""
Tables and a figure of what benchmarks.parallel.throughput and benchmarks.parallel.asynchronous stored. From the root of
the repository:

    python -m benchmarks.parallel.report
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.experiments import report as common
from benchmarks.metadata import command

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TITLES = {"throughput": "Two processes that train", "asynchronous": "One collects, one trains"}
BASE = "one process"


def ratios_of(result: dict[str, Any]) -> dict[str, list[float]]:
    """
    :param result: of a case
    :return: by kind, ratio of its steps per second to those of one process, of every round
    """
    speeds = result["steps_per_second"]
    return {
        kind: [speed / base for speed, base in zip(of_kind, speeds[BASE], strict=True)]
        for kind, of_kind in speeds.items()
        if kind != BASE
    }


def main() -> None:
    stored = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in TITLES}
    panels = {f"{TITLES[name]}, {each['case']}": each for name, file in stored.items() for each in file["results"]}
    figure, axes = common.panels(panels, 2)
    for title, result in panels.items():
        ratios = ratios_of(result)
        axes[title].boxplot(list(ratios.values()), tick_labels=list(ratios), whis=(0, 100))
        axes[title].axhline(1, color="grey", linewidth=0.8)
        if result["target"] is not None:
            axes[title].axhline(result["target"], color=common.COLORS[1], linestyle="--", linewidth=0.8)
        axes[title].set(ylabel="times as fast as one process", ylim=(0, 2.2))
    lines = [
        "# Several processes",
        "",
        f"Written by `{command()}` from `throughput.json` and `asynchronous.json`; not edited. What training learns is "
        "in [returns.md](returns.md).",
        "",
        "Steps per second of all environments, median (least to greatest) of the rounds; ratio: of a round, to one "
        "process. One thread per process. Dashed in the figure: what is aimed at.",
        "",
        common.save(figure, RESULTS / "speed.csv"),
    ]
    for name, file in stored.items():
        rows = [
            [
                each["title"],
                kind,
                spread(speeds, "{:.0f}"),
                spread(ratios_of(each).get(kind, []), "{:.2f}"),
                target(each, kind),
            ]
            for each in file["results"]
            for kind, speeds in each["steps_per_second"].items()
        ]
        lines += ["", f"## {TITLES[name]}", "", *common.table(["case", "", "steps per second", "ratio", "aim"], rows)]
        lines += ["", f"`{file['command']}`, {file['date']}; {common.circumstances(file)}"]
    text = "\n".join([*lines, ""])
    (RESULTS / "README.md").write_text(text)
    print(text)


def spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    return f"{form} ({form} to {form})".format(statistics.median(values), min(values), max(values))


def target(result: dict[str, Any], kind: str) -> str:
    aims = ("two processes", "max_policy_lag=1")
    return f"≥ {result['target']}" if result["target"] is not None and kind in aims else ""


if __name__ == "__main__":
    main()
