"""
Write and read the rollouts that an algorithm keeps from one iteration to the next, with the step they belong to.

A file has one part for each attribute of the model. A part is a sequence of pickles, one for each rollout, so that a
large part is never in memory twice.
"""

import contextlib
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ewma._parallel.process_group import rank
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix

RolloutPath: TypeAlias = str | pathlib.Path | BufferedIOBase
SelfKept = TypeVar("SelfKept", bound="KeptRollouts")

_FORMAT_VERSION = 1


class Step(NamedTuple):
    """
    Point of a training run. The number of environment steps alone is ambiguous: a checkpoint can be written before or
    after the training on the rollout that ended there.

    :param num_timesteps: number of environment steps
    :param n_rollouts: number of rollouts that ``train()`` was called for
    """

    num_timesteps: int
    n_rollouts: int


class KeptRollouts(Protocol):
    """A collection of rollouts that is kept from one iteration to the next."""

    def __len__(self) -> int:
        """
        :return: number of rollouts
        """

    def pieces(self) -> Iterator[Any]:
        """
        :return: for each rollout, an object to write
        """

    def restored(self: SelfKept, pieces: Iterator[Any], count: int, model_buffer: RolloutBuffer) -> SelfKept:
        """
        Build a collection from a file.

        :param pieces: objects that :meth:`pieces` returned
        :param count: number of objects
        :param model_buffer: the model's rollout buffer, which the rollouts must fit
        :return: a collection with the settings of this one and these rollouts
        :raises ValueError: if they do not fit
        """


def write_rollouts(path: RolloutPath, step: Step, parts: Mapping[str, KeptRollouts]) -> None:
    """
    Write kept rollouts. A file name is written atomically: if the process is killed, the old file stays as it was.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file; in a data-parallel training,
        ranks above 0 add theirs to the name
    :param step: step of the model, which :func:`read_rollouts` compares with the model's
    :param parts: kept rollouts by name
    """
    path = _file_of_rank(path)
    if isinstance(path, BufferedIOBase):
        _write(path, step, parts)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        _write(file, step, parts)


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
    Read the file that :func:`write_rollouts` wrote.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file
    :param step: step of the model, which must be the one in the file
    :param parts: the model's kept rollouts by name; they are not changed
    :param model_buffer: the model's rollout buffer, which the rollouts must fit
    :return: collections like ``parts`` with the rollouts from the file, by name
    :raises ValueError: if the file is of another kind, belongs to another step or does not fit the model
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
        except Exception as error:  # unpickling damaged data raises almost any error
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
    path = with_default_suffix(path, ".pkl")
    infix = f".rank{rank()}" if rank() > 0 else ""
    return path.with_name(f"{path.stem}{infix}{path.suffix}")
