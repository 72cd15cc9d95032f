"""
Trainings and searches of the zoo that a signal ends: is the agent there, what is the exit code, what is left?

Every trial is a process of its own session, forked from this one, which has imported everything; the environments of
some are processes too. The signal comes at a random moment of the start, of training, or of saving.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import Outcome

_TRAIN = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "--device", "cpu", "--seed", "0", "-f", "logs"]
_SMALL = ["n_envs:2", "n_steps:32", "batch_size:32", "n_epochs:1"]
_LAG = "max_policy_lag:1"
_SUBPROC = ["--vec-env", "subproc"]
# Arguments, and hyper-parameters
MODES: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "statistics": ([], ["normalize:True"]),
    "evaluation": (["--eval-freq", "64"], ["normalize:True"]),
    "asynchronous": ([], [_LAG]),
    "subproc": (_SUBPROC, []),
    "subproc, forkserver": (_SUBPROC, []),
    "asynchronous, subproc": (_SUBPROC, [_LAG]),
    "envpool": (["--vec-env", "envpool"], []),
    "asynchronous, envpool": (["--vec-env", "envpool"], [_LAG]),
    "search": (["-optimize", "--storage", "study.log", "--study-name", "study", "--n-trials", "1000"], []),
    "search, 2 jobs": (["-optimize", "--n-jobs", "2", "--n-trials", "1000"], []),
}
_SEARCH = ["--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots", "--pruner", "none"]
# Signals, by how they are sent: whether to the group of processes, as a terminal does, and how often. Output is gone
# when Ctrl-C ends the "tee" that it goes to.
HOWS: dict[str, tuple[int, bool, int]] = {
    "Ctrl-C": (signal.SIGINT, True, 1),
    "Ctrl-C twice": (signal.SIGINT, True, 2),
    "SIGTERM": (signal.SIGTERM, False, 1),
    "SIGTERM to the group": (signal.SIGTERM, True, 1),
    "SIGHUP": (signal.SIGHUP, True, 1),
    "Ctrl-C, output gone": (signal.SIGINT, True, 1),
    "kill -9": (signal.SIGKILL, False, 1),
}
MOMENTS = ("start", "training", "saving")
# What the output says when training begins, and when the agent is saved
_MARKS = {"start": "", "training": "Log path:", "saving": "Saving to"}
_SECONDS_TO_BEGIN, _SECONDS_TO_END, _SECONDS_TO_CLEAN = 60.0, 60.0, 15.0
_FOREVER = 10**9


def command(mode: str, moment: str) -> list[str]:
    """
    :param mode: one of ``MODES``
    :param moment: one of ``MOMENTS``
    :return: arguments of the zoo's command
    """
    arguments, hyperparameters = MODES[mode]
    if mode.startswith("search"):
        return [*_TRAIN, *arguments, *_SEARCH, "-n", "256", "-params", "n_envs:1"]
    n_timesteps = 128 if moment == "saving" else _FOREVER
    no_evaluation = [] if mode == "evaluation" else ["--eval-freq", "-1"]
    return [*_TRAIN, *arguments, *no_evaluation, "-n", str(n_timesteps), "-params", *_SMALL, *hyperparameters]


def train(arguments: list[str], folder: Path, output: int, start_method: str | None) -> None:
    """
    Run the zoo's command as a process that was just started does.

    :param arguments: of the command
    :param folder: to run it in
    :param output: descriptor that gets what it prints
    :param start_method: of the processes of environments; ``None``: SB3's choice
    """
    os.setsid()
    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.alarm(round(2 * _SECONDS_TO_BEGIN + _SECONDS_TO_END))  # or it could train for ever
    # A server of its own, in its own session
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_alive_fd = server._forkserver_pid = server._forkserver_address = None
    import torch as th
    from rl_zoo3 import exp_manager

    from sb3_ppo_ewma import zoo
    from sb3_ppo_ewma._parallel import shared_memory

    th.set_num_threads(1)
    shared_memory._MEMORY_DIR = str(folder / "memory")
    if start_method is not None:
        exp_manager.SubprocVecEnv = partial(exp_manager.SubprocVecEnv, start_method=start_method)
    try:
        zoo.main(arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class Trial:
    """
    A process that trains.

    :param mode: one of ``MODES``
    :param how: one of ``HOWS``
    :param moment: one of ``MOMENTS``
    :param folder: for its files
    """

    def __init__(self, mode: str, how: str, moment: str, folder: Path) -> None:
        self.folder = folder
        (folder / "memory").mkdir(parents=True)
        self._reads, writes = os.pipe()
        os.set_blocking(self._reads, False)
        self._is_read = True
        # A fork is faster, but SB3's forked processes do not see that this one is killed.
        start_method = "fork" if "subproc" in mode and "forkserver" not in mode and how != "kill -9" else None
        arguments = command(mode, moment), folder, writes, start_method
        self.process: Any = multiprocessing.get_context("fork").Process(target=train, args=arguments)
        self.process.start()
        os.close(writes)
        self.output = ""

    def read(self) -> str:
        """
        :return: what it has printed
        """
        with contextlib.suppress(BlockingIOError):
            while self._is_read and (data := os.read(self._reads, 65536)):
                self.output += data.decode(errors="replace")
        return self.output

    def stop_reading(self) -> None:
        """Let what it prints fail."""
        if self._is_read:
            os.close(self._reads)
        self._is_read = False

    def wait_for(self, mark: str) -> bool:
        """
        :param mark: what it prints
        :return: whether it has printed that
        """
        deadline = time.monotonic() + _SECONDS_TO_BEGIN
        while mark not in self.read():
            if not self.process.is_alive() or time.monotonic() > deadline:
                return mark in self.read()
            time.sleep(0.002)
        return True

    def send(self, number: int, to_group: bool) -> None:
        """
        :param number: of a signal
        :param to_group: whether all its processes get it
        """
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def end(self) -> int | None:
        """
        :return: exit code; ``None``: it has not ended
        """
        deadline = time.monotonic() + _SECONDS_TO_END
        while self.process.is_alive() and time.monotonic() < deadline:
            self.read()  # or it could wait for a reader
            self.process.join(0.01)
        self.read()
        code: int | None = self.process.exitcode
        return code

    def processes(self) -> list[str]:
        """
        :return: what still runs in its session
        """
        deadline = time.monotonic() + _SECONDS_TO_CLEAN
        while (found := session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def clean(self) -> None:
        """Kill what still runs, and forget it."""
        for each in session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(each.partition(" ")[0]), signal.SIGKILL)
        self.process.join()
        self.stop_reading()


def session(leader: int) -> list[str]:
    """
    :param leader: id of the first process of a session
    :return: ids and commands of its processes
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{folder.name} {text[:200]}")
    return found


def is_whole(agent: Path, has_statistics: bool) -> bool:
    """
    :param agent: zip file of an agent
    :param has_statistics: whether ``VecNormalize`` has some
    :return: whether it is there as a whole
    """
    try:
        with zipfile.ZipFile(agent) as archive:
            is_readable = archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
    return is_readable and (not has_statistics or (agent.with_suffix("") / "vecnormalize.pkl").is_file())


def problems(trial: Trial, mode: str, how: str, moment: str, code: int | None) -> list[tuple[str, str]]:
    """
    :param trial: after the signal
    :param mode: one of ``MODES``
    :param how: one of ``HOWS``
    :param moment: one of ``MOMENTS``
    :param code: exit code
    :return: verdicts with their reasons
    """
    number, is_killed = HOWS[how][0], how == "kill -9"
    found: list[tuple[str, str]] = [("left", each) for each in trial.processes()]
    files = [*trial.folder.rglob(".sb3-save-*"), *(trial.folder / "memory").iterdir()]
    found += [("left", str(each)) for each in files if not is_killed]
    if code is None:
        found.append(("left", "the process itself"))
    elif not is_killed and code not in (128 + number, {"start": -number, "saving": 0}.get(moment)):
        found.append(("unclear", f"exit code {code}"))
    runs = list(trial.folder.glob("logs/*/CartPole-v1_*"))
    agents = [each / "CartPole-v1.zip" for each in runs]
    has_statistics = mode in ("statistics", "evaluation")
    if mode.startswith("search") or is_killed:
        return found
    if moment != "start" and not agents:
        found.append(("lost", "no folder"))
    return found + [("lost", str(each)) for each in agents if not is_whole(each, has_statistics)]


def outcome(mode: str, how: str, moment: str, folder: Path, rng: random.Random) -> Outcome:
    """
    :param mode: one of ``MODES``
    :param how: one of ``HOWS``
    :param moment: one of ``MOMENTS``
    :param folder: for the files of this trial
    :param rng: chooses when exactly
    :return: what became of it
    """
    trial = Trial(mode, how, moment, folder)
    kind = f"{mode}: {how}"
    try:
        mark = "Optimizing" if mode.startswith("search") and moment != "start" else _MARKS[moment]
        if not trial.wait_for(mark):
            return Outcome(kind, "unclear", f"no {mark!r} in {trial.output[-1000:]}")
        delay = rng.uniform(0, {"start": 0.6, "training": 1.0, "saving": 0.03}[moment])
        time.sleep(delay)
        number, to_group, times = HOWS[how]
        if "output gone" in how:
            trial.read()
            trial.stop_reading()
        for _ in range(times):
            trial.send(number, to_group)
            time.sleep(rng.uniform(0, 0.05) if times > 1 else 0)
        bad = problems(trial, mode, how, moment, trial.end())
    finally:
        trial.clean()
    case = f"{moment}, {delay:.3f} s later"
    if not bad:
        return Outcome(kind, "recovered", case)
    verdict: Any = next((each for each, _ in bad if each == "lost"), bad[0][0])
    return Outcome(kind, verdict, f"{case}: {'; '.join(reason for _, reason in bad)}\n{trial.output[-1500:]}")


def torchrun(how: str, folder: Path, rng: random.Random) -> Outcome:
    """
    End a training in two processes, which ``torchrun`` starts and gives the signal. Its own exit code is 1.

    :param how: one of ``HOWS`` that sends one signal
    :param folder: for the files of this trial
    :param rng: chooses when exactly
    :return: what became of it
    """
    folder.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "sb3_ppo_ewma.zoo"]
    arguments = [*command("statistics", "training"), "n_steps:16"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"}
    output = folder / "output"
    with output.open("w") as file:
        agent = subprocess.Popen(
            [sys.executable, *launcher, *arguments], cwd=folder, env=environment, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 2 * _SECONDS_TO_BEGIN
    while "total_timesteps" not in output.read_text() and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [int(path) for path in children(agent.pid)]
    delay = rng.uniform(0, 1)
    time.sleep(delay)
    agent.send_signal(HOWS[how][0])
    kind, case = f"torchrun: {how}", f"{delay:.3f} s later"
    try:
        agent.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        agent.kill()
        return Outcome(kind, "left", f"{case}: torchrun itself")
    left = [each for rank in ranks for each in session(rank)]  # torchrun gives each a session
    if left or len(ranks) != 2:
        return Outcome(kind, "left", f"{case}: {left}\n{output.read_text()[-1500:]}")
    agents = list(folder.glob("logs/*/*/CartPole-v1.zip"))
    if len(agents) != 1 or not is_whole(agents[0], has_statistics=True):
        return Outcome(kind, "lost", f"{case}: {agents}\n{output.read_text()[-1500:]}")
    return Outcome(kind, "recovered", case)


def children(parent: int) -> list[str]:
    """
    :param parent: id of a process
    :return: ids of the processes that it has started
    """
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def run(n_trials: int, seed: int, folder: Path) -> list[Outcome]:
    """
    :param n_trials: number of trials
    :param seed: of the moments
    :param folder: for files
    :return: what became of each
    """
    from sb3_ppo_ewma import zoo

    zoo.register()
    rng = random.Random(seed)
    found = []
    cases = [(mode, how) for how in HOWS for mode in MODES]
    for number in range(n_trials):
        mode, how = cases[number % len(cases)]
        moment = rng.choices(MOMENTS, (1, 3, 1 if not mode.startswith("search") else 0))[0]
        found.append(outcome(mode, how, moment, folder / str(number), rng))
    for number in range(n_trials // 50):
        how = ("Ctrl-C", "SIGTERM", "SIGHUP")[number % 3]
        found.append(torchrun(how, folder / f"torchrun_{number}", rng))
    return found
