"""
Measure how fast the entries train in the cases, see cases.py. From the root of the repository:

    python -m benchmarks.speed.run

Every entry has a process of its own, and they take turns: in each round, every entry trains for one chunk while the
others sleep, so that what else happens on the machine meets all of them. Results are added to those that are in the
folder, if these have the same settings, code, versions and hardware.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.metadata import REPOSITORY, metadata
from benchmarks.speed.cases import CASES, ENTRIES, Case, case_settings, entry_settings, missing, quick
from benchmarks.speed.worker import Chunk, EntryError, Worker

Answer = TypeVar("Answer")

HERE = Path(__file__).parent
COLUMNS = ["case", "entry", "round", "steps", "seconds", "collect_seconds", "train_seconds", "cpu_seconds"]
# The number of the round that is not counted. Its first chunk compiles and allocates.
WARM_UP = 0
_CODE = ["sb3_ppo_ewma/**/*.py", *(f"benchmarks/speed/{name}.py" for name in ("lstm_only", "torchrl_update", "worker"))]
# What changes how many threads JAX and the libraries under PyTorch use
_FLAGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS", "JAX_PLATFORMS", "NPROC")


class Results:
    """
    chunks.csv and metadata.json: what was measured, and with which settings, versions and hardware.

    :param folder: of the two files
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.chunks, self.metadata = folder / "chunks.csv", folder / "metadata.json"
        self.content: dict[str, Any] = {"conditions": {}, "settings": {}, "starts": []}
        if self.metadata.is_file():
            self.content = json.loads(self.metadata.read_text())

    def begin(self, settings: dict[str, Any], conditions: dict[str, Any], start: dict[str, Any]) -> None:
        """
        :param settings: of the cases and entries that will be measured
        :param conditions: of all measurements
        :param start: of the program
        :raises SystemExit: if there are results of other settings or conditions, which must not be mixed with them
        """
        if self._rows():
            known = {**self.content["conditions"], **self.content["settings"]}
            now = {**conditions, **settings}
            self._refuse({name: now[name] for name in now if known.get(name, now[name]) != now[name]}, known)
        self.content["conditions"] = conditions
        self.content["settings"] |= settings
        self.content["starts"].append({**start, "workers": {}})
        self._write_metadata()

    def next_round(self, case: str) -> int:
        """
        :param case: name
        :return: number after those in the file
        """
        return 1 + max((int(row["round"]) for row in self._rows() if row["case"] == case), default=WARM_UP)

    def describe(self, case: str, entry: str, facts: dict[str, Any]) -> None:
        """
        :param case: name
        :param entry: name
        :param facts: about its process, for the metadata
        """
        self.content["starts"][-1]["workers"].setdefault(f"{case} {entry}", {}).update(facts)
        self._write_metadata()

    def add(self, case: str, entry: str, number: int, chunk: Chunk) -> None:
        """
        :param case: name
        :param entry: name
        :param number: of the round
        :param chunk: what was measured
        """
        seconds = (chunk.seconds, chunk.collect_seconds, chunk.train_seconds, chunk.cpu_seconds)
        row = [case, entry, str(number), str(chunk.steps), *(f"{value:.6f}" for value in seconds)]
        lines = [row] if self.chunks.is_file() else [COLUMNS, row]
        with self.chunks.open("a") as file:
            file.write("".join(",".join(line) + "\n" for line in lines))
        self.describe(case, entry, {"peak_memory_bytes": chunk.peak_bytes})

    def _rows(self) -> list[dict[str, str]]:
        if not self.chunks.is_file():
            return []
        with self.chunks.open(newline="") as file:
            return list(csv.DictReader(file))

    def _refuse(self, different: dict[str, Any], known: dict[str, Any]) -> None:
        if different:
            sys.exit(
                f"{self.chunks} was measured with other settings: move it and {self.metadata.name} away, or give "
                f"another folder with --results\n"
                + "\n".join(f"{name}\n  there: {known[name]}\n  now:   {now}" for name, now in different.items())
            )

    def _write_metadata(self) -> None:
        temporary = self.metadata.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.metadata)


def main() -> None:
    args = parse_arguments()
    cases = {name: quick(CASES[name]) if args.quick else CASES[name] for name in args.cases}
    plan = available(cases, args.entries)
    settings = {name: case_settings(cases[name]) for name in plan}
    for name, entries in plan.items():
        settings |= {f"{name} {entry}": entry_settings(cases[name], entry) for entry in entries}
    results = Results(args.results)
    start = metadata()
    platform = {name: start.pop(name) for name in ("versions", "hardware")}
    results.begin(settings, {**conditions(args.device), **platform}, start)
    failures: dict[str, str] = {}
    for name, entries in plan.items():
        workers = {entry: {**settings[name], **settings[f"{name} {entry}"]} for entry in entries}
        failures |= measure_case(name, workers, args, results)
    for name, reason in failures.items():
        print(f"\n=== {name} failed: {reason}", file=sys.stderr)
    print(f"python -m benchmarks.speed.report --results {args.results}")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--entries",
        nargs="+",
        choices=ENTRIES,
        metavar="ENTRY",
        help=f"{', '.join(ENTRIES)} (default: all; with --quick, those that are not compiled)",
    )
    parser.add_argument("--rounds", type=int, help="chunks of each entry that count (default: 10; with --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that everything runs")
    parser.add_argument(
        "--results", type=Path, help="folder (default: results beside this program; with --quick: a temporary one)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    args.entries = args.entries or [name for name in ENTRIES if not (args.quick and ENTRIES[name].is_compiled)]
    args.rounds = args.rounds or (1 if args.quick else 10)
    args.results = args.results or (Path(tempfile.mkdtemp()) if args.quick else HERE / "results")
    return args


def available(cases: dict[str, Case], entries: list[str]) -> dict[str, list[str]]:
    """
    :param cases: that were asked for
    :param entries: that were asked for
    :return: those that can be measured, by case; the rest is told
    """
    plan: dict[str, list[str]] = {}
    for case_name, case in cases.items():
        if lacking := missing(case.packages):
            print(f"{case_name}: left out, not installed: {', '.join(lacking)}")
            continue
        plan[case_name] = []
        for entry_name in entries:
            entry = ENTRIES[entry_name]
            if case.algorithms and entry_name not in case.algorithms:
                continue
            if entry.only_in and case_name not in entry.only_in:
                if entry.why:
                    print(f"{case_name} {entry_name}: left out, {entry.why}")
            elif lacking := missing(entry.packages):
                print(f"{case_name} {entry_name}: left out, not installed: {', '.join(lacking)}")
            else:
                plan[case_name].append(entry_name)
    return plan


def conditions(device: str) -> dict[str, Any]:
    """
    :param device: of the models
    :return: what all measurements have in common
    """
    files = sorted(file for pattern in _CODE for file in REPOSITORY.glob(pattern))
    return {
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12],
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }


def measure_case(
    case: str, entries: dict[str, dict[str, Any]], args: argparse.Namespace, results: Results
) -> dict[str, str]:
    """
    :param case: name
    :param entries: settings of its entries
    :param args: arguments of the program
    :param results: to which each measurement is added
    :return: the entries that failed, with the reasons
    """
    failures: dict[str, str] = {}
    workers: dict[str, Worker] = {}

    def ask(entry: str, question: Callable[[], Answer]) -> Answer | None:
        try:
            return question()
        except EntryError as error:
            failures[f"{case} {entry}"] = str(error)
            print(f"{case} {entry}: failed", flush=True)
            workers.pop(entry).close()
            return None

    try:
        for entry, settings in entries.items():
            workers[entry] = Worker(settings, args.device)
        # All are built before the first one measures.
        for entry, worker in list(workers.items()):
            if (facts := ask(entry, worker.wait)) is not None:
                results.describe(case, entry, facts)
        first = results.next_round(case)
        for turn, number in enumerate([WARM_UP, *range(first, first + args.rounds)]):
            for entry in rotated(list(workers), turn):
                if (chunk := ask(entry, workers[entry].measure)) is not None:
                    results.add(case, entry, number, chunk)
                    print(f"{case} round {number} {entry}: {chunk.steps / chunk.seconds:.0f} steps/s", flush=True)
    finally:
        for worker in workers.values():
            worker.dismiss()
        for worker in workers.values():
            worker.close()
    return failures


def rotated(entries: list[str], turn: int) -> list[str]:
    """
    :param entries: in their order
    :param turn: number of the round
    :return: another one of them comes first in each round
    """
    start = turn % max(len(entries), 1)
    return entries[start:] + entries[:start]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through measure_case's finally
    main()
