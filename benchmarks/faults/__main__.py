"""
Inject faults by the hundred and count what becomes of them. From the root of the repository:

    python -m benchmarks.faults
    python -m benchmarks.faults --parts arguments --trials 2000

A part is a module of this folder with a function ``run(n_trials, seed, folder)``. The table is stored in
``results/faults.json``, with the first examples of what did not go well.
"""

import argparse
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import GOOD, Outcome
from benchmarks.metadata import metadata

HERE = Path(__file__).parent
# Parts with their numbers of trials
PARTS: dict[str, int] = {
    "arguments": 14000,
    "files": 1800,
    "writes": 2100,
    "searches": 600,
    "interruptions": 154,
}
N_EXAMPLES = 5


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """
    :param outcomes: of all trials
    :return: a row for each kind of fault: its verdicts with their numbers, and examples of those that are not good
    """
    rows = []
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        bad = [f"{outcome.verdict}: {outcome.detail}" for outcome in own if outcome.verdict not in GOOD]
        counts: dict[str, int] = Counter(outcome.verdict for outcome in own)
        rows.append({"kind": kind, "trials": len(own), **counts, "examples": bad[:N_EXAMPLES]})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """
    :param rows: as from :func:`table`
    """
    for row in rows:
        counts = {name: value for name, value in row.items() if name not in ("kind", "trials", "examples")}
        print(f"{row['kind']:60} {row['trials']:6}  " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        for example in row["examples"]:
            print(f"    {example}")


def main(argv: Sequence[str] | None = None) -> None:
    """
    :param argv: arguments; by default those of the process
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trials", type=int, help="of each part (default: its own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "faults.json")
    given = parser.parse_args(argv)
    stored = json.loads(given.output.read_text()) if given.output.exists() else {}
    for part in given.parts:
        n_trials = PARTS[part] if given.trials is None else given.trials
        with tempfile.TemporaryDirectory() as folder:
            module = importlib.import_module(f"benchmarks.faults.{part}")
            rows = table(module.run(n_trials, given.seed, Path(folder)))
        show(rows)
        stored[part] = {"rows": rows, "seed": given.seed, "metadata": metadata()}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
