"""
How many more steps per second do several processes make than one? From the root of the repository:

    python -m benchmarks.parallel.throughput
    python -m benchmarks.parallel.throughput --torch-compile --cases impala

PPO-EWMA trains in one process, and data-parallel in two that share its environments and minibatches, with one thread
each. Both are built once and take turns, a few iterations each, while the other one sleeps. The ratio of a round is
that of their steps per second.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.metadata import metadata
from benchmarks.speed.cases import CASES, case_settings, entry_settings, quick

HERE = Path(__file__).parent
# Names of cases of benchmarks/speed, and the ratio aimed at where there is one
TARGETS: dict[str, float | None] = {"impala": 1.7, "cartpole": None}


class Team:
    """
    Processes that train together, from the outside. Unless they are measured, they sleep.

    :param settings: of case and entry, see benchmarks/speed/cases.py
    :param n_processes: among which environments and minibatches are divided
    :param folder: empty, in which they find each other
    """

    def __init__(self, settings: dict[str, Any], n_processes: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(n_processes)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(theirs, settings, rank, n_processes, folder))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def steps_per_second(self) -> float:
        """
        :return: of one chunk of training, all processes together
        """
        began = time.perf_counter()
        for connection in self._connections:
            connection.send("train")
        steps = {connection.recv() for connection in self._connections}
        if len(steps) != 1:
            raise RuntimeError(f"the processes do not agree on the number of steps: {steps}")
        return float(steps.pop() / (time.perf_counter() - began))

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(connection: Connection, settings: dict[str, Any], rank: int, n_processes: int, folder: Path) -> None:
    import warnings

    import torch as th
    import torch.distributed as dist

    from benchmarks.speed.worker import build_model
    from sb3_ppo_ewma.batch_scaling import per_process

    th.set_num_threads(1)
    warnings.filterwarnings("error", message="torch_compile=.* has no effect")
    if n_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=n_processes)
    parts = per_process({"n_envs": settings["n_envs"], "batch_size": settings["ppo"]["batch_size"]}, n_processes)
    settings |= {"n_envs": parts["n_envs"], "ppo": {**settings["ppo"], "batch_size": parts["batch_size"]}}
    model = build_model(settings, "cpu")
    n_steps = settings["n_iterations"] * model.n_steps * model.n_envs * n_processes
    with contextlib.suppress(EOFError):  # the parent has gone
        while connection.recv():
            before = model.num_timesteps
            model.learn(n_steps, reset_num_timesteps=False)
            connection.send(model.num_timesteps - before)
    if n_processes > 1:
        dist.destroy_process_group()


def measure(name: str, entry: str, rounds: int, is_quick: bool) -> dict[str, Any]:
    """
    :param name: of a case
    :param entry: of an algorithm of benchmarks/speed
    :param rounds: in each of which all take their turn; one more that does not count goes before
    :param is_quick: whether it only shows that everything runs
    :return: settings, steps per second, ratios
    """
    case = quick(CASES[name]) if is_quick else CASES[name]
    settings = {**case_settings(case), **entry_settings(case, entry)}
    with tempfile.TemporaryDirectory() as folder:
        teams = {"one process": Team(settings, 1, Path(folder)), "two processes": Team(settings, 2, Path(folder))}
        try:
            speeds = [{kind: team.steps_per_second() for kind, team in teams.items()} for _ in range(rounds + 1)][1:]
        finally:
            for team in teams.values():
                team.close()
    return {
        "case": name,
        "title": case.title + (", compiled" if "torch_compile" in settings["kwargs"] else ""),
        "settings": settings,
        "steps_per_second": {kind: [round(each[kind]) for each in speeds] for kind in teams},
        "ratios": [round(each["two processes"] / each["one process"], 3) for each in speeds],
        "target": TARGETS[name],
    }


def tell(result: dict[str, Any]) -> None:
    """
    :param result: of a case
    """
    print(f"{result['title']}: steps per second, median (least to greatest) of {len(result['ratios'])} rounds")
    for kind, speeds in result["steps_per_second"].items():
        print(f"  {kind:<14} {statistics.median(speeds):>7.0f} ({min(speeds)} to {max(speeds)})")
    ratios, target = result["ratios"], result["target"]
    aim = "" if target is None else f", target at least {target}"
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}){aim}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--torch-compile", action="store_true", help="train with compiled gradient steps")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file (default: results/throughput.json, with --torch-compile results/throughput_compiled.json, "
        "with --quick none)",
    )
    args = parser.parse_args()
    suffix = "_compiled" if args.torch_compile else ""
    results = []
    for name in args.cases:
        results.append(measure(name, f"ppo_ewma{suffix}", args.rounds, args.quick))
        tell(results[-1])
    output = args.output or (None if args.quick else HERE / "results" / f"throughput{suffix}.json")
    if output is not None:
        output.write_text(json.dumps({**metadata(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
