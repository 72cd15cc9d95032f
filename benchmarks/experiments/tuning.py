"""
Optuna studies of PPO-EWMA through rl-zoo3. From the root of the repository:

    python -m benchmarks.experiments.tuning --jobs 2

Every study is one `sb3-ppo-ewma train --algo ppo_ewma --env ENV -optimize ...`, started --jobs times with the same
storage, results/tuning_ENV.log. The same command continues studies that are not finished. results/tuning.csv has a row
per trial.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import RESULTS, Table, parser
from benchmarks.experiments.training import use_one_thread
from benchmarks.metadata import REPOSITORY, metadata

# Steps of a trial, number of trials, further arguments. The zoo's 64 environments of SpaceInvaders would leave no more
# than one or two rollouts of the longer lengths that are drawn. Pendulum is learned in so few steps only with a
# discount factor below those that are drawn, 0.97 and more, or with normalised rewards.
STUDIES: dict[str, tuple[int, int, list[str]]] = {
    "CartPole-v1": (50_000, 100, []),
    "Acrobot-v1": (100_000, 100, []),
    "Pendulum-v1": (100_000, 50, ["-params", "normalize:True"]),
    "MinAtar/SpaceInvaders-v1": (300_000, 40, ["-params", "n_envs:8"]),
}
# A smoke test: steps, trials, and what makes every trial short
QUICK_ENV = "CartPole-v1"
QUICK = (64, 2, ["--fix", "n_steps_pow:5", "n_epochs:1"])
COLUMNS = ["env", "trial", "state", "value", "seconds", "params"]


def storage_of(env: str, folder: Path) -> Path:
    return folder / f"tuning_{env.replace('/', '-')}.log"


def command(env: str, n_timesteps: int, n_trials: int, further: list[str], storage: Path, seed: int) -> list[str]:
    """
    :param env: environment
    :param n_timesteps: of a trial
    :param n_trials: of the study, those that are there included
    :param further: arguments
    :param storage: of the study
    :param seed: of the sampler
    :return: arguments of ``sb3-ppo-ewma``
    """
    options = {
        "--algo": "ppo_ewma",
        "--env": env,
        "--n-timesteps": n_timesteps,
        "--max-total-trials": n_trials,
        "--n-startup-trials": 10,
        "--n-evaluations": 4,
        "--eval-episodes": 20,
        "--n-eval-envs": 10,
        "--storage": os.path.relpath(storage, REPOSITORY),
        "--study-name": env,
        "--seed": seed,
        "--log-folder": "logs/tuning",
        "--device": "cpu",
        "--verbose": 0,
    }
    words = [str(word) for option in options.items() for word in option]
    return ["train", "-optimize", "--no-optim-plots", *words, *further]


def search(env: str, n_timesteps: int, n_trials: int, further: list[str], folder: Path, n_jobs: int) -> list[str]:
    """
    :param env: environment
    :param n_timesteps: of a trial
    :param n_trials: of the study
    :param further: arguments
    :param folder: of the storage
    :param n_jobs: processes that share the study
    :return: the commands
    :raises SystemExit: if one failed
    """
    storage = storage_of(env, folder)
    commands = [command(env, n_timesteps, n_trials, further, storage, seed) for seed in range(n_jobs)]
    processes = [
        subprocess.Popen([sys.executable, "-m", "sb3_ppo_ewma.zoo", *each], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        for each in commands
    ]
    try:
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()
    if any(statuses):
        sys.exit(f"the study of {env} failed: exit status {statuses}")
    return [shlex.join(["sb3-ppo-ewma", *each]) for each in commands]


def trials(env: str, folder: Path) -> list[dict[str, Any]]:
    """
    :param env: environment
    :param folder: of the storage
    :return: a row per trial that has ended
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    file = storage_of(env, folder)
    if not file.is_file():
        return []
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    found = optuna.load_study(study_name=env, storage=storage).trials
    return [
        {
            "env": env,
            "trial": trial.number,
            "state": trial.state.name,
            "value": "" if trial.value is None else f"{trial.value:.6g}",
            "seconds": f"{trial.duration.total_seconds():.1f}",
            "params": json.dumps(trial.params),
        }
        for trial in found
        if trial.state.is_finished() and trial.duration is not None
    ]


def report(file: Path) -> None:
    """
    :param file: CSV of all trials
    """
    import numpy as np
    import pandas as pd

    from benchmarks.experiments import report as common

    found = pd.read_csv(file)
    figure, axes = common.panels(found.env.unique(), n_columns=2)
    lines = []
    for env, axis in axes.items():
        study = found[found.env == env].sort_values("trial")
        complete = study[study.state == "COMPLETE"]
        axis.plot(complete.trial, complete.value, "o", color=common.COLORS[1], markersize=3)
        axis.plot(complete.trial, np.maximum.accumulate(complete.value.to_numpy()), color=common.COLORS[0])
        axis.set(xlabel="trial", ylabel="mean reward of the last evaluation")
        counts = study.state.value_counts()
        best = complete.loc[complete.value.idxmax()]
        params = ", ".join(f"`{name}` {_short(value)}" for name, value in json.loads(best.params).items())
        lines += [
            "",
            f"## {env}",
            "",
            f"{len(study)} trials ({', '.join(f'{n} {state.lower()}' for state, n in counts.items())}), "
            f"{study.seconds.sum() / 60:.0f} minutes in all. Best: trial {best.trial}, {best.value:.4g}: {params}.",
        ]
    image = common.save(figure, file)
    content = json.loads(file.with_suffix(".json").read_text())
    head = [
        "# Optuna studies of PPO-EWMA",
        "",
        f"Written by `python -m benchmarks.experiments.{file.stem} --report` from `{file.name}` and "
        f"`{file.stem}.json`, not edited. The value of a trial is the mean reward of 20 evaluation episodes at its "
        "end, of one seed: the best of a study is partly luck.",
        "",
        image,
    ]
    tail = ["", "## How it was done", ""]
    for start in content["starts"]:
        tail.append(f"- ended {start['date']}; {common.circumstances(start)}; at the same time, one thread each")
        tail += [f"  - `{each}`" for each in start["commands"]]
    file.with_suffix(".md").write_text("\n".join([*head, *lines, *tail, ""]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    arguments: argparse.Namespace = parser(__doc__, "tuning", 1).parse_args()
    folder = (arguments.results or (REPOSITORY / "logs" / "quick" if arguments.quick else RESULTS)).resolve()
    table = Table(folder / "tuning.csv")
    if not arguments.report:
        use_one_thread()
        studies = {QUICK_ENV: QUICK} if arguments.quick else STUDIES
        for env, (n_timesteps, n_trials, further) in studies.items():
            if arguments.envs is not None and env not in arguments.envs:
                continue
            if len(trials(env, folder)) < n_trials:
                commands = search(env, n_timesteps, n_trials, further, folder, arguments.jobs)
                table.content["starts"].append({**metadata(), "jobs": arguments.jobs, "commands": commands})
                table.write_metadata()
            with table.file.open("w", newline="") as lines:
                writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(row for each in STUDIES for row in trials(each, folder))
            print(f"{env}: {len(trials(env, folder))} trials", flush=True)
    report(table.file)


if __name__ == "__main__":
    main()
