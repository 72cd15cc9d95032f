"""
Journals of searches: processes that are killed, also while they have the lock; half lines, full disks, damaged files.

A searcher is a process, forked from this one, whose trials take a moment. After each fault another one must be able to
go on in the same study, with all that was there before, or be told which line of which file is to blame.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from benchmarks.faults.outcome import Outcome

FILE = "logs/study.log"
_SECONDS = 20.0
_LONGEST = 0.15


def open_study() -> optuna.Study:
    """
    :return: the study, by a relative path as in the documentation
    """
    storage = JournalStorage(JournalFileBackend(FILE))
    return optuna.create_study(storage=storage, study_name="study", load_if_exists=True)


def search(n_trials: int) -> None:
    """
    :param n_trials: number of trials that this process adds
    """
    from sb3_ppo_ewma.zoo import dead_trials, journal

    def objective(trial: optuna.Trial) -> float:
        dead_trials.mark(trial)
        dead_trials.fail_dead_trials(trial.study)
        time.sleep(0.01)
        return trial.suggest_float("x", 0, 1)

    dead_trials.fail_dead_trials_of(FILE, "study")
    with dead_trials.searching(), journal.naming_errors():
        open_study().optimize(objective, n_trials)


def in_process(act: Callable[[], Any]) -> int:
    """
    :param act: what the process does
    :return: its id
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(os.open("error.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            act()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return child


def ends_in_time(child: int) -> int | None:
    """
    :param child: id of a process
    :return: its exit code; ``None`` if it had to be killed
    """
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def completed() -> int:
    """
    :return: number of completed trials
    """
    return len(open_study().get_trials(states=(TrialState.COMPLETE,)))


def goes_on(n_before: int) -> tuple[str, str]:
    """
    :param n_before: number of completed trials before the fault
    :return: verdict and reason
    """
    code = ends_in_time(in_process(lambda: search(1)))
    if code is None:
        return "lost", "the next process waits for ever"
    if code != 0:
        message = Path("error.txt").read_text().strip().splitlines()[-1]
        return ("refused" if "study.log, line " in message else "lost"), message
    n_running = len(open_study().get_trials(states=(TrialState.RUNNING,)))
    if completed() < n_before + 1:
        return "lost", f"{completed()} completed trials of {n_before + 1}"
    left = [name for name in os.listdir("logs") if name != "study.log"]
    return ("left", f"{n_running} running, {left}") if n_running or left else ("recovered", "")


def killed_at_random(rng: random.Random) -> None:
    """
    :param rng: chooses when
    """
    child = in_process(lambda: search(10**6))
    time.sleep(rng.uniform(0, _LONGEST))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def killed_with_the_lock(rng: random.Random) -> None:
    """
    :param rng: chooses with which record
    """
    n_left = rng.randrange(1, 12)

    def act() -> None:
        write = os.write

        def dying(descriptor: int, data: bytes) -> int:
            nonlocal n_left
            n_left -= data.startswith(b'{"op_code"')
            if n_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, data)

        os.write = dying  # type: ignore[assignment]
        search(10)

    os.waitpid(in_process(act), 0)


def half_a_line(rng: random.Random) -> None:
    """
    :param rng: chooses how much of a line
    """
    data = Path(FILE).read_bytes()
    line = rng.choice(data.splitlines())
    torn = rng.choice([line[: rng.randrange(1, len(line))], bytes(rng.randrange(1, 200))])
    Path(FILE).write_bytes(data + torn)


def full_disk(rng: random.Random) -> None:
    """
    :param rng: chooses how much room there is
    """
    limit = Path(FILE).stat().st_size + rng.randrange(0, 600)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        search(10)

    os.waitpid(in_process(act), 0)


def two_killed(rng: random.Random) -> None:
    """
    :param rng: chooses when
    """
    children = [in_process(lambda: search(10**6)) for _ in range(2)]
    for child in children:
        time.sleep(rng.uniform(0, _LONGEST))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def damaged_line(rng: random.Random) -> None:
    """
    :param rng: chooses which line, and how
    """
    lines = Path(FILE).read_bytes().splitlines(keepends=True)
    number = rng.randrange(len(lines))
    line = lines[number]
    half = rng.randrange(1, len(line) - 1)
    lines[number] = rng.choice(
        [
            rng.randbytes(20).replace(b"\n", b"") + b"\n",
            line[:half] + b"\n",
            line[half:],
            bytes(len(line) - 1) + b"\n",
            b"text of another file\n",
        ]
    )
    Path(FILE).write_bytes(b"".join(lines))


FAULTS: dict[str, Callable[[random.Random], None]] = {
    "kill -9": killed_at_random,
    "kill -9 with the lock": killed_with_the_lock,
    "kill -9 of two": two_killed,
    "half a line": half_a_line,
    "full disk": full_disk,
    "damaged line": damaged_line,
}


def outcome(name: str, rng: random.Random) -> Outcome:
    """
    :param name: one of ``FAULTS``
    :param rng: chooses the case
    :return: what became of it
    """
    search(2)
    n_before = completed()
    Path("error.txt").write_text("")
    FAULTS[name](rng)
    verdict: Any
    if name == "full disk" and (error := Path("error.txt").read_text()) and "study.log" not in error:
        return Outcome(f"search: {name}", "unclear", error[-500:])
    Path("error.txt").write_text("")
    verdict, detail = goes_on(n_before)
    if verdict == "refused" and name != "damaged line":
        verdict = "lost"
    return Outcome(f"search: {name}", verdict, detail)


def run(n_trials: int, seed: int, folder: Path) -> list[Outcome]:
    """
    :param n_trials: number of trials
    :param seed: of the cases
    :param folder: for files
    :return: what became of each
    """
    from sb3_ppo_ewma import zoo

    zoo.register()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = random.Random(seed)
    found, names, here = [], list(FAULTS), os.getcwd()
    try:
        for number in range(n_trials):
            (folder / str(number) / "logs").mkdir(parents=True)
            os.chdir(folder / str(number))
            found.append(outcome(names[number % len(names)], rng))
    finally:
        os.chdir(here)
    return found
