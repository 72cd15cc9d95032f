"""
Files of the rollouts that an algorithm keeps from one iteration to the next, with the step they belong to.

One file has several parts, each a sequence of pickles, so that a large part is never in memory twice.
"""

import contextlib
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ewma._parallel.process_group import rank

RolloutPath: TypeAlias = str | pathlib.Path | BufferedIOBase
SelfKept = TypeVar("SelfKept", bound="KeptRollouts")

_FORMAT_VERSION = 1


class Step(NamedTuple):
    """
    Where training stands. The same number of environment steps has two such states, before and after the training on
    the rollout that ended there, and a checkpoint can be of either.

    :param num_timesteps: environment steps
    :param n_rollouts: rollouts that were handed to training
    """

    num_timesteps: int
    n_rollouts: int


class KeptRollouts(Protocol):
    """Rollouts kept from one iteration to the next."""

    def __len__(self) -> int:
        """
        :return: number of rollouts
        """

    def pieces(self) -> Iterator[Any]:
        """
        :return: what is written of each rollout
        """

    def restored(self: SelfKept, pieces: Iterator[Any], count: int, model_buffer: RolloutBuffer) -> SelfKept:
        """
        :param pieces: as from :meth:`pieces`
        :param count: their number
        :param model_buffer: the model's rollout buffer, which they must fit
        :return: the same kind of collection with these rollouts
        :raises ValueError: if they do not fit
        """


def write_rollouts(path: RolloutPath, step: Step, parts: Mapping[str, KeptRollouts]) -> None:
    """
    Atomic when ``path`` is a file name: a run that is killed leaves the old file whole.

    :param path: file name (``.pkl`` is added where there is no suffix) or open binary file; in a data-parallel
        training, ranks above 0 add theirs to the name
    :param step: the model's, checked by :func:`read_rollouts`
    :param parts: what to write, by name
    """
    path = _file_of_rank(path)
    if isinstance(path, BufferedIOBase):
        _write(path, step, parts)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write(file, step, parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: Any, step: Step, parts: Mapping[str, KeptRollouts]) -> None:
    header = {
        "format": _FORMAT_VERSION,
        "step": tuple(step),
        "parts": {name: len(part) for name, part in parts.items()},
    }
    pickle.dump(header, file, protocol=pickle.HIGHEST_PROTOCOL)
    for part in parts.values():
        for piece in part.pieces():
            pickle.dump(piece, file, protocol=pickle.HIGHEST_PROTOCOL)


def read_rollouts(
    path: RolloutPath, step: Step, parts: Mapping[str, KeptRollouts], model_buffer: RolloutBuffer
) -> dict[str, KeptRollouts]:
    """
    :param path: as for :func:`write_rollouts`
    :param step: the model's
    :param parts: the model's parts, which stay as they are
    :param model_buffer: the model's rollout buffer, which the rollouts must fit
    :return: by name, parts with the rollouts of the file
    :raises ValueError: if the file is of another kind, another step or another model
    """
    path = _file_of_rank(path)
    with contextlib.nullcontext(path) if isinstance(path, BufferedIOBase) else path.open("rb") as file:
        try:
            header = pickle.load(file)
            _check_header(header, step, parts)
            return {
                name: parts[name].restored((pickle.load(file) for _ in range(count)), count, model_buffer)
                for name, count in header["parts"].items()
            }
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # almost any, when a pickle is damaged, foreign, or of classes that have changed
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is damaged or not a file of save_replay_buffer() ({reason})") from error


def _check_header(header: Any, step: Step, parts: Mapping[str, KeptRollouts]) -> None:
    if not (isinstance(header, dict) and header.get("format") == _FORMAT_VERSION):
        raise ValueError(f"not a file of save_replay_buffer() (format {_FORMAT_VERSION})")
    saved = Step(*header["step"])
    if saved != step:
        raise ValueError(
            f"belongs to num_timesteps={saved.num_timesteps} and {saved.n_rollouts} rollouts, the model is at "
            f"{step.num_timesteps} and {step.n_rollouts}: load the file that was saved together with the model, or go "
            "on without"
        )
    if set(header["parts"]) != set(parts):
        raise ValueError(
            f"has {sorted(header['parts'])}, the model keeps {sorted(parts)}: its staleness or n_aux_epochs is another"
        )


def _file_of_rank(path: RolloutPath) -> pathlib.Path | BufferedIOBase:
    if isinstance(path, BufferedIOBase):
        return path
    path = pathlib.Path(path)
    infix = f".rank{rank()}" if rank() > 0 else ""
    return path.with_name(f"{path.stem}{infix}{path.suffix or '.pkl'}")
