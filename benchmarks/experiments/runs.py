"""
Trainings as rows of a CSV: which there are, which are done, and as many at a time as there are cores.

An experiment is a module with a table of runs, fixed before the first one, and a report that is made from the CSV
alone.
"""

import argparse
import csv
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from benchmarks.experiments.training import N_PARTS, Result, train, use_one_thread
from benchmarks.metadata import REPOSITORY, metadata

RESULTS = Path(__file__).parent / "results"
DIAGNOSTICS = ["clip_fraction", "approx_kl", "approx_kl_prox", "importance_cap_fraction", "entropy_loss",
               "noise_scale_policy", "noise_scale_joint"]  # fmt: skip
RETURNS = [f"return_{100 * (part + 1) // N_PARTS:02}" for part in range(N_PARTS)]
COLUMNS = ["env", "variant", "seed", "n_timesteps", "wall_seconds", "final_return", *DIAGNOSTICS, *RETURNS]
# The environment of smoke tests, whose episodes are short
QUICK_ENV = "MinAtar/SpaceInvaders-v1"
# Trainings after which processes are replaced by new ones. Not by max_tasks_per_child, with which an executor of
# Python 3.11 that has been given everything at once stops for ever (CPython issue 115634).
RUNS_PER_PROCESS = 25
# Trains a run: given algorithm, environment, settings, seed and whether it is tested, as :func:`train` is
TrainFunction = Callable[[str, str, dict[str, Any], int, bool], Result]


@dataclass(frozen=True)
class Variant:
    """
    What is trained with several seeds.

    :param env: environment
    :param name: of this variant among those of the environment
    :param algo: name of an algorithm in the zoo, or of a class of this package
    :param settings: complete, as an entry of the zoo's files
    :param is_tested: whether the final return is that of test episodes, instead of those of training
    """

    env: str
    name: str
    algo: str
    settings: dict[str, Any]
    is_tested: bool = False

    @property
    def recorded(self) -> dict[str, Any]:
        tests = {"is_tested": True} if self.is_tested else {}
        return {"algo": self.algo, **self.settings, **tests}


def zoo_settings(algo: str, env_id: str, folder: Path = REPOSITORY / "zoo_hyperparams") -> dict[str, Any]:
    """
    :param algo: name of one of our algorithms in the zoo
    :param env_id: environment
    :param folder: of the files
    :return: its entry
    """
    entries: dict[str, dict[str, Any]] = yaml.safe_load((folder / f"{algo}.yml").read_text())
    return entries[env_id]


class Table:
    """
    The files of an experiment: a row per run, and beside it the settings, versions, hardware and commands.

    :param file: CSV; the other has its name with ``.json``
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.metadata = file, file.with_suffix(".json")
        self.content: dict[str, Any] = {"settings": {}, "starts": []}
        if self.metadata.is_file():
            self.content = json.loads(self.metadata.read_text())

    def finished(self) -> set[tuple[str, str, int]]:
        if not self.file.is_file():
            return set()
        with self.file.open(newline="") as lines:
            return {(row["env"], row["variant"], int(row["seed"])) for row in csv.DictReader(lines)}

    def begin(self, variants: Iterable[Variant], start: dict[str, Any]) -> None:
        """
        :param variants: of the runs to come
        :param start: versions, hardware and command
        :raises SystemExit: if there are runs of a variant with other settings, which must not be mixed with them
        """
        measured = {(env, name) for env, name, _ in self.finished()}
        for variant in variants:
            known = self.content["settings"].setdefault(variant.env, {})
            if (variant.env, variant.name) in measured and known.get(variant.name) != variant.recorded:
                sys.exit(
                    f"{self.file} has runs of {variant.name} in {variant.env} with other settings: move it and "
                    f"{self.metadata.name} away, or give another folder with --results\n"
                    f"there: {known.get(variant.name)}\nnow:   {variant.recorded}"
                )
            known[variant.name] = variant.recorded
        self.content["starts"].append({**start, "runs": 0})
        self.write_metadata()

    def add(self, variant: Variant, seed: int, result: Result) -> None:
        row = {
            "env": variant.env,
            "variant": variant.name,
            "seed": seed,
            "n_timesteps": int(variant.settings["n_timesteps"]),
            "wall_seconds": f"{result.wall_seconds:.1f}",
            "final_return": f"{result.final_return:.6g}",
            **{name: f"{value:.4g}" for name, value in result.diagnostics.items()},
            **{name: f"{value:.6g}" for name, value in zip(RETURNS, result.returns, strict=True)},
        }
        is_new = not self.file.is_file()
        with self.file.open("a", newline="") as lines:
            writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.content["starts"][-1]["runs"] += 1
        self.write_metadata()

    def write_metadata(self) -> None:
        temporary = self.metadata.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.metadata)


def parser(description: str | None, name: str, n_seeds: int) -> argparse.ArgumentParser:
    """
    :param description: of the experiment
    :param name: of its files
    :param n_seeds: by default
    :return: what all experiments have in common
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each (default: 2)")
    result.add_argument("--envs", nargs="+", help="only these environments")
    result.add_argument("--variants", nargs="+", help="only these variants")
    result.add_argument("--seeds", nargs="+", type=int, default=list(range(n_seeds)))
    result.add_argument("--quick", action="store_true", help="a smoke test: some variants, few steps, one seed")
    result.add_argument("--report", action="store_true", help="train nothing, only make tables and figures anew")
    result.add_argument("--results", type=Path, help="folder of the results")
    result.set_defaults(name=name)
    return result


def execute(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    quick: dict[str, Any],
    report: Callable[[Path], None],
    quick_names: Sequence[str] | None = None,
    quick_env: str = QUICK_ENV,
    function: TrainFunction | None = None,
) -> None:
    """
    Train what is missing, then report.

    :param args: of :func:`parser`
    :param variants: all of the experiment, in the order of training
    :param quick: settings that make a run short
    :param report: is given the CSV
    :param quick_names: of the variants of a smoke test; ``None``: all
    :param quick_env: environment of a smoke test
    :param function: that trains a run; ``None``: :func:`train`
    """
    folder = args.results or (REPOSITORY / "logs" / "quick" if args.quick else RESULTS)
    table = Table(folder / f"{args.name}.csv")
    if not args.report:
        if args.quick:
            variants = [
                replace(v, settings={**v.settings, **quick})
                for v in variants
                if v.env == quick_env and (quick_names is None or v.name in quick_names)
            ]
        chosen = [
            variant
            for variant in variants
            if (args.envs is None or variant.env in args.envs)
            and (args.variants is None or variant.name in args.variants)
        ]
        train_all(chosen, args.seeds[:1] if args.quick else args.seeds, table, args.jobs, function)
    report(table.file)


def train_all(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    table: Table,
    n_jobs: int,
    function: TrainFunction | None = None,
) -> None:
    """
    :param variants: in their order
    :param seeds: of each; all variants have had one before the next begins
    :param table: to which each run is added when it ends
    :param n_jobs: runs at the same time
    :param function: that trains a run; ``None``: :func:`train`
    :raises SystemExit: if one failed, when all others have ended
    """
    finished = table.finished()
    pending = [(v, seed) for seed in seeds for v in variants if (v.env, v.name, seed) not in finished]
    print(f"{len(pending)} of {len(variants) * len(seeds)} runs to do", flush=True)
    if not pending:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    use_one_thread()
    table.begin({id(v): v for v, _ in pending}.values(), {**metadata(), "jobs": n_jobs, "threads_per_run": 1})
    failures = []
    for n_ended, (variant, seed, ended) in enumerate(_results(pending, n_jobs, function), start=1):
        name = f"[{n_ended}/{len(pending)}] {variant.env} {variant.name} seed {seed}"
        if isinstance(ended, BaseException):
            failures.append(f"{name}: {ended!r}")
            print(failures[-1], flush=True)
        else:
            table.add(variant, seed, ended)
            print(f"{name}: {ended.final_return:.4g} after {ended.wall_seconds:.0f} s", flush=True)
    if failures:
        sys.exit("\n".join([f"{len(failures)} of {len(pending)} runs failed:", *failures]))


def _results(
    pending: Sequence[tuple[Variant, int]], n_jobs: int, function: TrainFunction | None = None
) -> Iterator[tuple[Variant, int, Result | BaseException]]:
    """
    :param pending: variants and seeds
    :param n_jobs: runs at the same time
    :param function: that trains a run; ``None``: :func:`train`
    :return: what became of each, as they end
    """
    n_together = n_jobs * RUNS_PER_PROCESS
    for start in range(0, len(pending), n_together):
        with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as executor:
            futures = {
                executor.submit(function or train, v.algo, v.env, v.settings, seed, v.is_tested): (v, seed)
                for v, seed in pending[start : start + n_together]
            }
            try:
                for future in as_completed(futures):
                    yield (*futures[future], future.exception() or future.result())
            finally:
                for process in list(getattr(executor, "_processes", {}).values()):
                    process.terminate()
                executor.shutdown(cancel_futures=True)
