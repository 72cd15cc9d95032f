"""Trainings in processes of their own."""

import multiprocessing
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from benchmarks.procgen.training import Plan, Run, train


def train_in_processes(plans: dict[Run, Plan], n_jobs: int) -> Iterator[tuple[Run, str]]:
    """
    A process for each run: what one leaves in a GPU's memory would be missing to the next.

    :param plans: of the runs, in their order
    :param n_jobs: at the same time
    :return: as they end, the run and why it failed, if it did
    """
    context = multiprocessing.get_context("spawn")
    waiting, under_way = deque(plans.items()), dict[Connection, tuple[Run, SpawnProcess]]()
    while waiting or under_way:
        while waiting and len(under_way) < n_jobs:
            run, plan = waiting.popleft()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_train_and_tell, args=(theirs, run, plan), daemon=True)
            process.start()
            theirs.close()
            under_way[ours] = run, process
        for connection in wait(list(under_way)):
            run, process = under_way.pop(connection)
            try:
                failure = connection.recv()
            except EOFError:
                failure = "it was killed"
            process.join()
            yield run, failure


def _train_and_tell(connection: Connection, run: Run, plan: Plan) -> None:
    try:
        train(run, plan)
    except Exception:
        connection.send(traceback.format_exc())
    else:
        connection.send("")
