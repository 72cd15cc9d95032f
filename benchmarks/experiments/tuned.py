"""
What the studies of `tuning` found, trained again: the best trials with new seeds, and with others the settings of
zoo_hyperparams/ppo_ewma_tuned.yml, which are those of one of these trials, beside the ones that were there before. From
the root of the repository:

    python -m benchmarks.experiments.tuned --jobs 2

Runs that are in results/tuned.csv are not repeated.
"""

import argparse
import ast
import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import RESULTS, Variant, execute, parser, zoo_settings
from benchmarks.experiments.tuning import STUDIES

N_SEEDS = 5
# The value of a trial is that of one training. So several are trained again, and the one is taken that learns most.
N_CANDIDATES = 5
CANDIDATE_SEEDS = [100, 101, 102]
BEFORE, WITHOUT, TUNED = "ppo_ewma.yml", "ppo_ewma.yml, no EWMA", "ppo_ewma_tuned.yml"
SETTINGS = [BEFORE, WITHOUT, TUNED]


def candidates(env: str, file: Path = RESULTS / "tuning.csv") -> dict[str, dict[str, Any]]:
    """
    :param env: environment
    :param file: CSV of the studies
    :return: settings of the best trials, and of those that are as good as the last of them, by name
    """
    n_timesteps, _, further = STUDIES[env]
    with file.open(newline="") as lines:
        trials = [row for row in csv.DictReader(lines) if row["env"] == env and row["state"] == "COMPLETE"]
    least = sorted(float(row["value"]) for row in trials)[-N_CANDIDATES:][0]
    best = [row for row in trials if float(row["value"]) >= least]
    given = {name: ast.literal_eval(value) for name, _, value in (pair.partition(":") for pair in further[1:])}
    start = {**zoo_settings("ppo_ewma", env), **given, "n_timesteps": n_timesteps}
    return {f"trial {row['trial']}": {**start, **drawn(json.loads(row["params"]))} for row in best}


def drawn(params: dict[str, Any]) -> dict[str, Any]:
    """
    :param params: of a trial
    :return: hyper-parameters as in the zoo's files, with numbers of a readable length
    """
    # Here, so that reports do not need the zoo.
    from sb3_ppo_ewma.zoo.rescaling import source
    from sb3_ppo_ewma.zoo.search_space import SEARCH_SPACES

    short = {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in params.items()}
    hyperparams = SEARCH_SPACES["ppo_ewma"].convert(short)
    # Differences of 1 and a short number, and quotients
    exact = {name: float(f"{value:.6g}") for name, value in hyperparams.items() if isinstance(value, float)}
    return {**hyperparams, **exact, "policy_kwargs": source(hyperparams["policy_kwargs"])}


def variants() -> list[Variant]:
    """
    :return: by environment, the settings of both files, with the budget of the study
    """
    found = []
    for env, (n_timesteps, *_) in STUDIES.items():
        budget = {"n_timesteps": n_timesteps}
        before = {**zoo_settings("ppo_ewma", env), **budget}
        settings = {
            BEFORE: before,
            WITHOUT: {**before, "prox_decay": None},
            TUNED: {**zoo_settings("ppo_ewma_tuned", env), **budget},
        }
        found += [Variant(env, name, "ppo_ewma", each) for name, each in settings.items()]
    return found


def trials() -> list[Variant]:
    """
    :return: by environment, the best trials of its study
    """
    return [Variant(env, name, "ppo_ewma", each) for env in STUDIES for name, each in candidates(env).items()]


def report(file: Path) -> None:
    # Here, so that training does not need what reports do.
    from benchmarks.experiments import report as common

    runs = common.load(file)
    figure, axes = common.panels((env for env in STUDIES if env in set(runs.env)), n_columns=2)
    lines = []
    for env, axis in axes.items():
        there = runs[runs.env == env]
        common.plot_curves(axis, there, {name: name for name in SETTINGS})
        names = [name for name in there.variant.unique() if name not in SETTINGS]
        names.sort(key=lambda name: int(name.removeprefix("trial ")))
        for heading, wanted in (("settings", SETTINGS), ("candidate", names)):
            chosen = there[there.variant.isin(wanted)]
            if len(chosen):
                title = f"## {env}" if heading == "settings" else "The best trials of the study, other seeds:"
                lines += ["", title, "", *common.table_of_returns(heading, chosen, {name: name for name in wanted})]
    next(iter(axes.values())).legend(frameon=False, fontsize="small")
    intro = [
        f"The {N_CANDIDATES} trials of each study with the highest value, and those that are as good as the last of "
        f"them, were trained again, with the seeds {', '.join(map(str, CANDIDATE_SEEDS))}. The one with the highest "
        "mean return is the entry of `zoo_hyperparams/ppo_ewma_tuned.yml`, which other seeds compare with that of "
        "`ppo_ewma.yml`, with the budget of the study. Settings of `ppo_ewma.yml` that were made for ten times the "
        "budget and more (Acrobot-v1, MinAtar) are at a disadvantage. Final return: mean of the training episodes that "
        "ended in the last tenth of training; mean return: of all of training.",
        "",
        common.save(figure, file),
    ]
    common.write(file, "Tuned settings", [*intro, *lines])


def main() -> None:
    args = parser(__doc__, "tuned", N_SEEDS).parse_args()
    quick: dict[str, Any] = {"n_timesteps": 2000, "n_envs": 4, "n_steps": 16, "batch_size": 16, "n_epochs": 1}
    if not (args.report or args.quick):
        execute(argparse.Namespace(**{**vars(args), "seeds": CANDIDATE_SEEDS}), trials(), quick, report)
    execute(args, variants(), quick, report)


if __name__ == "__main__":
    main()
