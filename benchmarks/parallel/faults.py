"""
What is left after faults of asynchronous collection: errors, stops and signals at random moments, for every kind of
environments, forked as they are or made in a process of their own. From the root of the repository:

    python -m benchmarks.parallel.faults

After each fault: does training end as it should, can the model be saved and trained again, is a process still running,
is a file descriptor or a file of shared memory left? Needs Linux, which tells in /proc.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.metadata import metadata

HERE = Path(__file__).parent
KINDS = ("dummy", "subproc", "envpool")
STARTS = ("fork", "spawn")
N_ENVS, N_STEPS = 2, 32
# An environment that hangs is given up after so many seconds
TIMEOUT = 3.0
SECONDS_TO_END = 20
FAULTS = (
    "remote call fails",
    "callback stops",
    "callback raises",
    "SIGINT",
    "SIGTERM",
    "collector killed",
    "environment raises",
    "environment dies",
    "environment hangs",
)


def make_env(kind: str, start: str, what: Callable[[], None] | None, at: int) -> Any:
    """
    :param kind: of the environments
    :param start: "fork": they are in this process; otherwise the start method of the process that has them
    :param what: happens in an environment
    :param at: at this step
    :return: environments
    """
    import gymnasium as gym
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper

    from sb3_ppo_ewma import EnvPoolVecEnv, RemoteVecEnv

    class Faulty(gym.Wrapper):  # type: ignore[type-arg]
        n_steps = 0

        def step(self, action: Any) -> Any:
            self.n_steps += 1
            if what is not None and self.n_steps == at:
                what()
            return super().step(action)

    class FaultyPool(VecEnvWrapper):
        n_steps = 0

        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            self.n_steps += 1
            if what is not None and self.n_steps == at:
                what()
            return self.venv.step_wait()

    def pool(functions: list[Any]) -> Any:
        return EnvPoolVecEnv("CartPole-v1", len(functions))

    make = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv, "envpool": pool}[kind]
    functions = [lambda: Faulty(gym.make("CartPole-v1"))] * N_ENVS
    env = make(functions) if start == "fork" else RemoteVecEnv(functions, start, make)
    return FaultyPool(env) if kind == "envpool" else env


def make_model(env: Any) -> Any:
    """
    :param env: environments
    :return: a model that collects asynchronously
    """
    from sb3_ppo_ewma import PPOEWMA

    settings: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 1, "device": "cpu"}
    return PPOEWMA("MlpPolicy", env, max_policy_lag=1, collector_timeout=TIMEOUT, **settings)


def provoke(fault: str, kind: str, start: str, rng: random.Random) -> tuple[Any, str]:
    """
    :param fault: name of a fault
    :param kind: of environments
    :param start: where they are
    :param rng: chooses the moment
    :return: the model, and how its training ended
    """
    from stable_baselines3.common.callbacks import BaseCallback

    at, delay = rng.randrange(1, 6 * N_STEPS), rng.uniform(0, 0.3)
    happens: dict[str, Callable[[], None]] = {
        "environment raises": lambda: [][0],
        "environment dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "environment hangs": lambda: time.sleep(1000),
    }
    env = make_env(kind, start, happens.get(fault), at)
    model = make_model(env)

    class Callback(BaseCallback):
        def _on_step(self) -> bool:
            if fault == "remote call fails" and self.n_calls == at:
                try:  # SubprocVecEnv itself does not survive the name of an attribute that is not there
                    self.training_env.get_attr("nope" if kind == "envpool" else "spec", indices=[N_ENVS])
                except (AttributeError, IndexError):
                    pass
                else:
                    raise RuntimeError("the error did not come back")
            if fault == "callback raises" and self.n_calls == at:
                raise ZeroDivisionError
            return not (fault == "callback stops" and self.n_calls == at)

    def kill() -> None:
        collectors: list[Any] = []
        while not collectors and not has_ended.wait(0.01):
            collectors = [each for each in multiprocessing.active_children() if each.name == "collector"]
        for each in collectors:
            os.kill(each.pid, signal.SIGKILL)

    has_ended = threading.Event()

    outside = {"SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT), "collector killed": kill}
    timer = threading.Timer(delay, outside.get(fault, int))
    timer.start()
    try:
        model.learn(10 * N_ENVS * N_STEPS if fault == "remote call fails" else 10**6, Callback())
        if fault in outside:  # in the rest of the time nothing happens
            return model, "trained to its end"
        return model, "returned"
    except BaseException as error:
        return model, type(error).__name__
    finally:
        timer.cancel()
        has_ended.set()
        timer.join()


EXPECTED = {
    "remote call fails": {"returned"},
    "callback stops": {"returned"},
    "callback raises": {"ZeroDivisionError"},
    "SIGINT": {"KeyboardInterrupt"},
    "collector killed": {"RuntimeError"},
    "environment raises": {"IndexError", "EOFError", "ConnectionResetError", "BrokenPipeError"},  # as SubprocVecEnv
    "environment dies": {"RuntimeError", "EOFError", "ConnectionResetError", "BrokenPipeError"},
    "environment hangs": {"RuntimeError"},
}


def others_in_session() -> list[str]:
    """
    :return: command lines of the processes of this session, but this one and those that Python keeps to start others
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):
            continue
        is_other = int(fields[3]) == os.getsid(0) and fields[0] != "Z" and folder.name != str(os.getpid())
        is_server = "resource_tracker" in command or ("forkserver" in command and not _is_served(fields[1]))
        if is_other and not is_server:
            found.append(command)
    return found


def _is_served(parent: str) -> bool:
    """
    :param parent: id of a process's parent
    :return: whether the parent is a server that starts processes
    """
    try:
        return b"forkserver" in (Path("/proc") / parent / "cmdline").read_bytes()
    except OSError:
        return False


def left_over(n_files: int) -> list[str]:
    """
    :param n_files: file descriptors before
    :return: what is left, after some seconds to end
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while True:
        gc.collect()
        found = [f"a process: {each}" for each in others_in_session()]
        n_more = len(list(Path("/proc/self/fd").iterdir())) - n_files
        found += [f"{n_more} file descriptors"] if n_more > 0 else []
        found += [str(path) for path in Path("/dev/shm").glob("sb3-ppo-ewma-*")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def trial(fault: str, kind: str, start: str, rng: random.Random) -> list[str]:
    """
    :param fault: name of a fault
    :param kind: of environments
    :param start: where they are
    :param rng: chooses the moment
    :return: what went wrong
    """
    n_files, problems = len(list(Path("/proc/self/fd").iterdir())), []
    model, ending = provoke(fault, kind, start, rng)
    if ending not in EXPECTED[fault]:
        problems.append(f"training ended with {ending}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
    try:
        model.env.close()
    except Exception as error:
        problems.append(f"close() raised {error!r}")
    try:
        model.set_env(make_env("dummy", "fork", None, 0))
        model.learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
        model.env.close()
    except Exception as error:
        problems.append(f"with new environments, training raised {error!r}")
    del model
    return problems + left_over(n_files)


def terminated(kind: str, start: str, rng: random.Random) -> list[str]:
    """
    :param kind: of environments
    :param start: where they are
    :param rng: chooses the moment
    :return: what is left of a program that a signal ends
    """
    command = [sys.executable, "-m", "benchmarks.parallel.faults", "--victim", kind, start]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if victim.stdout is None or victim.stdout.readline() != "trains\n":
        victim.kill()
        return ["the program did not begin"]
    time.sleep(rng.uniform(0, 0.5))
    victim.terminate()
    victim.wait()
    victim.stdout.close()
    return left_over(10**6)


def train_as_victim(kind: str, start: str) -> None:
    from stable_baselines3.common.callbacks import BaseCallback

    class Tells(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if self.num_timesteps == N_ENVS * N_STEPS:
                print("trains", flush=True)

    make_model(make_env(kind, start, None, 0)).learn(10**6, Tells())


def serve(kind: str, start: str, faults: list[str], n_trials: int, seed: int) -> None:
    """Make all trials of one kind of environments, in a session of its own; a line of JSON for each."""
    rng = random.Random(f"{seed} {kind} {start}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
    provoke("remote call fails", kind, start, rng)[0].env.close()  # what stays open from the first time on
    gc.collect()
    for fault, _ in itertools.product(faults, range(n_trials)):
        began = time.perf_counter()
        problems = terminated(kind, start, rng) if fault == "SIGTERM" else trial(fault, kind, start, rng)
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({"fault": fault, "problems": problems, "seconds": seconds}), flush=True)


def run(kinds: list[str], starts: list[str], faults: list[str], n_trials: int, seed: int) -> list[dict[str, Any]]:
    """
    :param kinds: of environments
    :param starts: where they are
    :param faults: names of faults
    :param n_trials: of each combination
    :param seed: of the moments
    :return: for every trial, what it was, what went wrong, and how long it took
    """
    found = []
    for kind, start in itertools.product(kinds, starts):
        arguments = ["--serve", kind, start, "--faults", *faults, "--trials", str(n_trials), "--seed", str(seed)]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.parallel.faults", *arguments]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for line in program.stdout or ():
            if line.startswith("{"):
                found.append({"kind": kind, "start": start, **json.loads(line)})
                print(kind, start, *(str(value) for value in json.loads(line).values()), flush=True)
        if program.wait() != 0:
            raise RuntimeError(f"the program with {kind} environments ended with exit code {program.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--trials", type=int, default=4, help="of every combination")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/faults.json)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--victim", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.victim:
        train_as_victim(*args.victim)
    elif args.serve:
        serve(*args.serve, args.faults, args.trials, args.seed)
    else:
        trials = run(args.kinds, args.starts, args.faults, args.trials, args.seed)
        n_bad = sum(bool(each["problems"]) for each in trials)
        print(f"{len(trials)} trials, {n_bad} with problems")
        output = args.output or HERE / "results" / "faults.json"
        output.write_text(json.dumps({**metadata(), "trials": trials}, indent=1) + "\n")


if __name__ == "__main__":
    main()
