"""
PPO, PPO-EWMA, PPG and PPG-EWMA on Procgen's hard games, as in the PPO-EWMA paper: returns of the training episodes,
which come from all levels, against steps of the environments. From the root of the repository:

    python -m benchmarks.procgen --games coinrun starpilot --steps 8e6 --device cuda --mixed-precision

trains what is missing, from the last checkpoint where there is one, and makes the report. More steps later continue the
same runs. --report makes the report of what is stored, --quick is a smoke test on a CPU.
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.metadata import REPOSITORY, metadata
from benchmarks.procgen.curves import Curve

HERE = Path(__file__).parent
GAMES = ["bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot", "heist",
         "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot"]  # fmt: skip
ALGORITHMS = ["ppo", "ppo_ewma", "ppg", "ppg_ewma"]
WITH_KL_PENALTY = ["ppo_ewma_kl", "ppg_kl", "ppg_ewma_kl"]
# Sixteen rows make a window of the published curves.
ROW_STEPS = 2**16
# A phase of PPG, in which there is none, has 2^21 steps with the settings of the files.
CHECKPOINT_STEPS = 2**20
QUICK: dict[str, Any] = {
    "n_envs": 4,
    "n_steps": 32,
    "batch_size": 64,
    "n_policy_iterations": 2,
    "n_aux_epochs": 1,
    "aux_batch_size": 64,
    "policy_kwargs": "dict(features_extractor_kwargs=dict(channels=[4], features_dim=16, mixed_precision=True))",
}
QUICK_STEPS = 512


def main() -> None:
    args = parse_arguments()
    if not args.report:
        train_all(args)
    from benchmarks.procgen.report import report  # so that training does not need what reports do

    report(args.results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=GAMES, metavar="GAME", help=", ".join(GAMES))
    parser.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS + WITH_KL_PENALTY, default=ALGORITHMS, metavar="ALGORITHM",
        help=f"{', '.join(ALGORITHMS)} (default: these), {', '.join(WITH_KL_PENALTY)}",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    parser.add_argument("--steps", type=float, default=1e8, help="of all environments of a run (default: 1e8)")
    parser.add_argument("--minutes", type=float, help="of all: each run stops after its share, and can be continued")
    parser.add_argument("--n-envs", type=int, choices=[64, 256], default=64, help="(default: 64)")
    parser.add_argument("--device", default="auto", help="of the networks: cpu, cuda, auto (default)")
    parser.add_argument("--mixed-precision", action="store_true", help="convolutions in bfloat16")
    parser.add_argument(
        "--params", nargs="+", default=[], metavar="NAME:VALUE",
        help="other hyper-parameters, of the algorithms that have them (e.g. n_policy_iterations:32)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small networks, few steps, one game")
    parser.add_argument("--report", action="store_true", help="train nothing, only make tables and figures anew")
    parser.add_argument("--results", type=Path, help="folder of curves and report")
    parser.add_argument("--logs", type=Path, help="folder of checkpoints")
    args = parser.parse_args()
    args.changes = {}
    for pair in args.params:
        name, colon, value = pair.partition(":")
        if not (name and colon and value):
            parser.error(f"--params: expected NAME:VALUE, got {pair!r}")
        args.changes[name] = json_or_text(value)
    if args.quick:
        args.games, args.seeds, args.steps, args.changes = args.games[:1], args.seeds[:1], QUICK_STEPS, QUICK
    logs = REPOSITORY / "logs"
    args.results = args.results or (logs / "quick" / "procgen" if args.quick else HERE / "results")
    args.logs = args.logs or (logs / "quick" / "procgen_checkpoints" if args.quick else logs / "procgen")
    return args


def json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def train_all(args: argparse.Namespace) -> None:
    """
    :param args: of the program
    :raises SystemExit: if there are curves of other settings; if a run failed, when all others have ended
    """
    # Here, as the report needs none of it
    from benchmarks.procgen.processes import train_in_processes
    from benchmarks.procgen.training import Plan, Run, settings_of

    chosen = itertools.product(args.seeds, args.games, args.algorithms)  # what there is after a while is balanced
    runs = [Run(algorithm, args.n_envs, game, seed) for seed, game, algorithm in chosen]
    settings_by_run = {run: settings_of(run, args.changes, args.mixed_precision) for run in runs}
    known = set().union(*settings_by_run.values())
    unknown = [] if args.quick else sorted(args.changes.keys() - known)
    if unknown:
        sys.exit(f"--params: none of {', '.join(args.algorithms)} has {', '.join(unknown)}")
    pending = {}
    for run, settings in settings_by_run.items():
        curve = Curve.read(args.results / run.name)
        if curve.settings not in (None, settings):
            sys.exit(
                f"{args.results / run.name}.json is of a run with other settings: give another folder with --results, "
                f"and one with --logs\nthere: {curve.settings}\nnow:   {settings}"
            )
        if curve.n_steps < args.steps:
            pending[run] = settings
    print(f"{len(pending)} of {len(runs)} runs to do", flush=True)
    n_steps = int(args.steps)
    start = {**metadata(), "jobs": args.jobs}
    plans = {
        run: Plan(
            settings,
            n_steps=n_steps,
            row_steps=min(ROW_STEPS, n_steps),
            checkpoint_steps=min(CHECKPOINT_STEPS, n_steps),
            seconds=args.minutes * 60 * args.jobs / len(pending) if args.minutes else math.inf,
            device=args.device,
            n_threads=max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else None,
            logs=args.logs,
            results=args.results,
            start=start,
        )
        for run, settings in pending.items()
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the other processes
    failures = []
    for n_ended, (run, failure) in enumerate(train_in_processes(plans, args.jobs), start=1):
        n_done = Curve.read(args.results / run.name).n_steps
        print(f"[{n_ended}/{len(plans)}] {run.name}: {failure or f'{n_done} steps'}", flush=True)
        failures += [run.name] if failure else []
    if failures:
        sys.exit(f"{len(failures)} of {len(plans)} runs failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
