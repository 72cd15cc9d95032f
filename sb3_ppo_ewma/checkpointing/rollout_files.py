"""
Write and read the rollouts that an algorithm keeps from one iteration to the next, with the step they belong to.

A file has one part for each attribute of the model. A part is a sequence of pickles, one for each rollout, so that a
large part is never in memory twice.
"""

import contextlib
import pathlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ewma._parallel.process_group import ALONE, Place
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix

RolloutPath: TypeAlias = str | pathlib.Path | BufferedIOBase
SelfKept = TypeVar("SelfKept", bound="KeptRollouts")

_FORMAT_VERSION = 1


class OtherSizeError(ValueError):
    """Kept rollouts have another size or number than the model's."""


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
        :raises OtherSizeError: if they do not fit
        """

    def share(self, pieces: Sequence[Any], rank: int, size: int) -> Any:
        """
        Divide what other processes have written.

        :param pieces: one of each of them, in their order
        :param rank: number of this process
        :param size: number of processes now
        :return: the piece of this process
        :raises OtherSizeError: if that cannot be done
        """


def write_rollouts(path: RolloutPath, step: Step, parts: Mapping[str, KeptRollouts], place: Place = ALONE) -> None:
    """
    Write kept rollouts. A file name is written atomically: if the process is killed, the old file stays as it was.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file; in a data-parallel training,
        ranks above 0 add theirs to the name
    :param step: step of the model, which :func:`read_rollouts` compares with the model's
    :param parts: kept rollouts by name
    :param place: this process among those that train the model
    """
    if isinstance(path, BufferedIOBase):
        _write(path, step, parts, place)
        return
    path = _file_of_rank(path, place.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        _write(file, step, parts, place)


def _write(file: Any, step: Step, parts: Mapping[str, KeptRollouts], place: Place) -> None:
    header = {
        "format": _FORMAT_VERSION,
        "step": tuple(step),
        "n_processes": place.n_processes,
        "parts": {name: len(part) for name, part in parts.items()},
    }
    pickle.dump(header, file, protocol=pickle.HIGHEST_PROTOCOL)
    for part in parts.values():
        for piece in part.pieces():
            pickle.dump(piece, file, protocol=pickle.HIGHEST_PROTOCOL)


def read_rollouts(
    path: RolloutPath,
    step: Step,
    parts: Mapping[str, KeptRollouts],
    model_buffer: RolloutBuffer,
    place: Place = ALONE,
) -> dict[str, KeptRollouts]:
    """
    Read the file that :func:`write_rollouts` wrote, or the files of all processes where another number of processes
    wrote them.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file
    :param step: step of the model, which must be the one in the file
    :param parts: the model's kept rollouts by name; they are not changed
    :param model_buffer: the model's rollout buffer, which the rollouts must fit
    :param place: this process among those that train the model
    :return: collections like ``parts`` with the rollouts from the file, by name
    :raises OtherSizeError: if the rollouts do not fit the model
    :raises ValueError: if the file is of another kind or belongs to another step
    """
    own = path if isinstance(path, BufferedIOBase) else _file_of_rank(path, place.rank)
    with contextlib.ExitStack() as stack:
        try:
            files = [path] if isinstance(path, BufferedIOBase) else _files_to_read(path, stack, place)
            headers = [pickle.load(file) for file in files]
            for header in headers:
                _check_header(header, step, parts, {len(files), place.n_processes})
            found = {}
            for name, count in headers[0]["parts"].items():
                together = ([pickle.load(file) for file in files] for _ in range(count))
                is_shared = headers[0].get("n_processes", len(files)) != place.n_processes
                pieces = (parts[name].share(each, *place) if is_shared else each[0] for each in together)
                found[name] = parts[name].restored(pieces, count, model_buffer)
            return found
        except FileNotFoundError:
            raise
        except OtherSizeError as error:
            raise OtherSizeError(f"{own}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{own}: {error}") from error
        except Exception as error:  # unpickling damaged data raises almost any error
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{own} is damaged or not a file of save_replay_buffer() ({reason})") from error


def _files_to_read(path: str | pathlib.Path, stack: contextlib.ExitStack, place: Place) -> list[Any]:
    """
    :param path: file name
    :param stack: closes the files
    :param place: this process among those that train the model
    :return: the open file of this process or, where another number of processes wrote them, those of all
    """
    first = _file_of_rank(path, 0)
    n_processes = place.n_processes
    if first.exists():
        with first.open("rb") as file:
            header = pickle.load(file)
            if isinstance(header, dict):
                n_processes = header.get("n_processes", n_processes)
    ranks = [place.rank] if n_processes == place.n_processes else range(n_processes)
    return [stack.enter_context(_file_of_rank(path, each).open("rb")) for each in ranks]


def _check_header(header: Any, step: Step, parts: Mapping[str, KeptRollouts], numbers: set[int]) -> None:
    if not (isinstance(header, dict) and header.get("format") == _FORMAT_VERSION):
        raise ValueError(f"not a file of save_replay_buffer() (format {_FORMAT_VERSION})")
    n_processes = header.get("n_processes")
    if n_processes is not None and n_processes not in numbers:
        raise ValueError(f"{n_processes} processes wrote their rollouts: the file names of all of them are needed")
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


def _file_of_rank(path: str | pathlib.Path, rank: int) -> pathlib.Path:
    path = with_default_suffix(path, ".pkl")
    infix = f".rank{rank}" if rank > 0 else ""
    return path.with_name(f"{path.stem}{infix}{path.suffix}")
