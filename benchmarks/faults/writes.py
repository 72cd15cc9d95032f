"""
Files that are replaced: writers that are killed, several at once, full disks, planted links, permissions, long names.

The old file or the new one must be there as a whole, with its permissions, and after the next save nothing else.
"""

import os
import random
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.outcome import Outcome, Verdict
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically

_SIZE = 200_000
_LONGEST = 0.02


def save(path: Path, value: int) -> None:
    """
    :param path: file to replace
    :param value: the value of all its bytes, which are written in parts
    """
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        for _ in range(10):
            file.write(bytes([value]) * (_SIZE // 10))


def is_whole(path: Path) -> bool:
    """
    :param path: a file
    :return: whether one call of ``save`` has written it
    """
    data = path.read_bytes()
    return len(data) == _SIZE and len(set(data)) == 1


def left(folder: Path, path: Path) -> list[str]:
    """
    :param folder: with the file
    :param path: the file
    :return: what else there is
    """
    return [name for name in os.listdir(folder) if name != path.name]


def forked(act: Callable[[], None], seconds: float | None = None) -> int:
    """
    :param act: what a process does
    :param seconds: when it is killed; ``None``: never
    :return: its exit code
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except OSError as error:
            code = 2 if error.filename is not None or error.errno is not None else 1
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_for_ever(path: Path) -> None:
    """
    :param path: file to replace again and again
    """
    for value in range(10**6):
        save(path, value % 256)


def killed(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace
    :param rng: chooses the case
    :return: verdict and reason
    """
    forked(lambda: save_for_ever(path), rng.uniform(0, _LONGEST))
    if not is_whole(path):
        return "lost", "half a file"
    save(path, 1)
    others = left(path.parent, path)
    return ("left", str(others)) if others else ("recovered", "")


def processes(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace, by several processes, some of which are killed
    :param rng: chooses the case
    :return: verdict and reason
    """
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(20):
                    save(path, number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    time.sleep(rng.uniform(0, _LONGEST))
    os.kill(children[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes[1:]) or not is_whole(path):
        return "lost", f"exit codes {codes}"
    save(path, 1)
    others = left(path.parent, path)
    return ("left", str(others)) if others else ("recovered", "")


def threads(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace, by several threads
    :param rng: chooses the case
    :return: verdict and reason
    """
    errors: list[str] = []

    def act(value: int) -> None:
        try:
            for _ in range(rng.randrange(1, 6)):
                save(path, value)
        except OSError as error:
            errors.append(repr(error))

    running = [threading.Thread(target=act, args=(value,)) for value in range(4)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if errors or not is_whole(path):
        return "lost", str(errors)
    others = left(path.parent, path)
    return ("left", str(others)) if others else ("recovered", "")


def full_disk(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace
    :param rng: chooses the case
    :return: verdict and reason
    """
    limit = rng.randrange(_SIZE)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save(path, 9)

    code = forked(act)
    if code != 2 or not is_whole(path) or path.read_bytes()[0] == 9:
        return "lost", f"exit code {code}"
    others = left(path.parent, path)
    return ("left", str(others)) if others else ("refused", "")


def planted_link(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace
    :param rng: chooses the case
    :return: verdict and reason
    """
    victim = path.parent / "victim"
    victim.write_bytes(b"precious")
    names = [f"{path.name}.{os.getpid()}.tmp", f"{path.name}.tmp", f".{path.name}.swp", f".sb3-save-{rng.random()}.tmp"]
    for name in names:
        (path.parent / name).symlink_to(victim)
    save(path, 1)
    if victim.read_bytes() != b"precious":
        return "lost", "the target of the link is overwritten"
    return ("recovered", "") if is_whole(path) else ("lost", "half a file")


def permissions(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file to replace
    :param rng: chooses the case
    :return: verdict and reason
    """
    mode = rng.randrange(0o1000) | 0o600
    path.chmod(mode)
    save(path, 1)
    kept = stat.S_IMODE(path.stat().st_mode)
    return ("recovered", "") if kept == mode else ("silent", f"{mode:o} becomes {kept:o}")


def long_name(path: Path, rng: random.Random) -> tuple[Verdict, str]:
    """
    :param path: file in the folder of the one to write
    :param rng: chooses the case
    :return: verdict and reason
    """
    other = path.with_name("n" * rng.randrange(200, 256))
    save(other, 1)
    return ("recovered", "") if is_whole(other) else ("lost", other.name)


FAULTS = {
    "kill -9": killed,
    "three processes, one killed": processes,
    "four threads": threads,
    "full disk": full_disk,
    "planted links": planted_link,
    "permissions": permissions,
    "long names": long_name,
}


def run(n_trials: int, seed: int, folder: Path) -> list[Outcome]:
    """
    :param n_trials: number of trials
    :param seed: of the cases
    :param folder: for files
    :return: what became of each
    """
    rng = random.Random(seed)
    found, names = [], list(FAULTS)
    for number in range(n_trials):
        name = names[number % len(names)]
        path = folder / str(number) / "file"
        path.parent.mkdir()
        save(path, 0)
        try:
            verdict, detail = FAULTS[name](path, rng)
        except OSError as error:
            verdict, detail = "lost", repr(error)
        found.append(Outcome(f"file: {name}", verdict, detail))
    return found
