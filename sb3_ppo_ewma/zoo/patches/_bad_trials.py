"""Tell a trial with bad hyper-parameters from an error of the user's code or machine."""

import re
import sysconfig
import traceback
from pathlib import Path

import numpy as np
import rl_zoo3
import sb3_contrib
import stable_baselines3
import torch as th

import sb3_ppo_ewma

# Errors that hyper-parameters can cause: NaNs and refused values, overflows, too little memory (RuntimeError in torch)
ERRORS = (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, MemoryError)

_ALGORITHMS = [
    Path(str(each.__file__)).parent for each in (np, rl_zoo3, sb3_contrib, stable_baselines3, th, sb3_ppo_ewma)
]
_DISTRIBUTIONS = Path(th.distributions.__file__).parent
_COMMON = Path(stable_baselines3.__file__).parent / "common"
# What steps environments, or reports what they raised
_ENVIRONMENTS = [
    _COMMON / "vec_env",
    _COMMON / "monitor.py",
    _COMMON / "env_util.py",
    Path(sb3_ppo_ewma.__file__).parent / "envs",
]
_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_SITE_PACKAGES = re.compile(r"(site|dist)-packages")
_FILE = re.compile(r'^ *File "([^"]+)", line', re.MULTILINE)
_NO_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)


def is_bad_trial(error: BaseException) -> bool:
    """
    :param error: error of a trial
    :return: whether the hyper-parameters of the trial are to blame: the constructor or the losses of the algorithm
        refused them, they led to NaN or need too much memory. Environments, callbacks and the user's networks are not
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return True
    if not isinstance(error, ERRORS):
        return False
    files = _files(error)
    if any(_is_in(file, _ENVIRONMENTS) for file in files):
        return False
    # The user's policy may have asked for the distribution of a NaN.
    return bool(files) and (_is_in(files[-1], [_DISTRIBUTIONS]) or all(map(_is_of_algorithm, files)))


def _files(error: BaseException) -> list[Path]:
    """
    :param error: an error
    :return: source files of its traceback, outermost first; those of the process that it came from last
    """
    here = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # Errors of worker processes have the text of their traceback as cause, as in concurrent.futures.
    elsewhere = _FILE.findall(str(error.__cause__)) if error.__cause__ is not None else []
    return [Path(file) for file in (*here, *elsewhere)]


def _is_of_algorithm(file: Path) -> bool:
    if _is_in(file, _ALGORITHMS) or str(file).startswith("<"):  # generated code
        return True
    return _is_in(file, [_STANDARD_LIBRARY]) and not _SITE_PACKAGES.search(str(file))


def _is_in(file: Path, folders: list[Path]) -> bool:
    return any(folder == file or folder in file.parents for folder in folders)
