"""
Write and read the rollouts that an algorithm keeps from one iteration to the next, with their run and step.

A file is a line of text, a header as JSON, and for each rollout its arrays in NumPy's format, without pickles. A
checksum stands behind the header and behind each rollout. It is written and read from the beginning to the end, one
rollout at a time, so that a large part is never in memory twice.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedIOBase
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_ppo_ewma._parallel.process_group import ALONE, Place
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically, with_default_suffix

RolloutPath: TypeAlias = str | pathlib.Path | BufferedIOBase
# The arrays of one rollout by name
Piece: TypeAlias = Mapping[str, np.ndarray]
SelfKept = TypeVar("SelfKept", bound="KeptRollouts")

_FIRST_LINE = b"sb3_ppo_ewma kept rollouts, format 2\n"
_PICKLE = b"\x80"
_CHECKSUM_SIZE = 16
_LENGTH_SIZE = 8
# A length of the header that has changed must not fill the memory.
_MOST_BYTES = 2**26
# Facts of a run that can be changed, and what is computed from them
_OF_RETURNS = ("gamma", "gae_lambda")
# Facts of a run that another number of environments changes
_SIZES = ("n_steps", "n_envs")


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

    def pieces(self) -> Iterator[Piece]:
        """
        :return: for each rollout, its arrays by name
        """

    def restored(self: SelfKept, pieces: Iterator[Piece], count: int, model_buffer: RolloutBuffer) -> SelfKept:
        """
        Build a collection from a file.

        :param pieces: as from :meth:`pieces`
        :param count: their number
        :param model_buffer: the model's rollout buffer, which the rollouts must fit
        :return: a collection with the settings of this one and these rollouts
        :raises OtherSizeError: if they do not fit
        """

    def share(self, pieces: Sequence[Piece], rank: int, size: int) -> Piece:
        """
        Divide what other processes have written.

        :param pieces: one of each of them, in their order
        :param rank: number of this process
        :param size: number of processes now
        :return: the piece of this process
        :raises OtherSizeError: if that cannot be done
        """


class _Checked:
    """
    An open file whose contents are summed up as they pass.

    :param file: open binary file
    """

    def __init__(self, file: Any) -> None:
        self.name = getattr(file, "name", "the open file")
        self._file = file
        self._sum = hashlib.blake2b(digest_size=_CHECKSUM_SIZE)

    def write(self, data: Any) -> int:
        self._sum.update(data)
        return int(self._file.write(data))

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._sum.update(data)
        return data

    def read_piece(self, names: Sequence[str]) -> Piece:
        try:
            piece = {name: np.lib.format.read_array(self, allow_pickle=False) for name in names}  # type: ignore[arg-type]
        except Exception as error:  # numbers that have changed provoke almost any error
            raise ValueError(f"{self.name}: damaged or cut off ({type(error).__name__}: {error})") from error
        self.check_seal()
        return piece

    def seal(self) -> None:
        self.write(self._sum.digest())

    def check_seal(self) -> None:
        expected = self._sum.digest()
        if self.read(_CHECKSUM_SIZE) != expected:
            raise ValueError(f"{self.name}: damaged or cut off, its checksum is another")


def write_rollouts(
    path: RolloutPath,
    step: Step,
    parts: Mapping[str, KeptRollouts],
    place: Place = ALONE,
    run: Mapping[str, Any] | None = None,
) -> None:
    """
    Write kept rollouts. A file name is written atomically: if the process is killed, the old file stays as it was.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file; in a data-parallel training,
        ranks above 0 add theirs to the name
    :param step: step of the model, which :func:`read_rollouts` compares with the model's
    :param parts: kept rollouts by name
    :param place: this process among those that train the model
    :param run: what tells the run of the model from others, by name, numbers and text
    :raises TypeError: if a rollout has what a file cannot have
    """
    if isinstance(path, BufferedIOBase):
        _write(_Checked(path), step, parts, place, run or {})
        return
    path = _file_of_rank(path, place.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        _write(_Checked(file), step, parts, place, run or {})


def _write(file: _Checked, step: Step, parts: Mapping[str, KeptRollouts], place: Place, run: Mapping[str, Any]) -> None:
    header = {
        "run": dict(run),
        "step": tuple(step),
        "place": tuple(place),
        "parts": {name: [list(piece) for piece in part.pieces()] for name, part in parts.items()},
    }
    content = json.dumps(header).encode()
    file.write(_FIRST_LINE + len(content).to_bytes(_LENGTH_SIZE, "little") + content)
    file.seal()
    for part in parts.values():
        for piece in part.pieces():
            for array in piece.values():
                np.lib.format.write_array(file, array, allow_pickle=False)
            file.seal()


def read_rollouts(
    path: RolloutPath,
    step: Step,
    parts: Mapping[str, KeptRollouts],
    model_buffer: RolloutBuffer,
    place: Place = ALONE,
    run: Mapping[str, Any] | None = None,
) -> dict[str, KeptRollouts]:
    """
    Read the file that :func:`write_rollouts` wrote, or the files of all processes where another number of processes
    wrote them. Nothing in a file is run.

    :param path: file name (``.pkl`` is added if it has no suffix) or open binary file
    :param step: step of the model, which must be the one in the file
    :param parts: the model's kept rollouts by name; they are not changed
    :param model_buffer: the model's rollout buffer, which the rollouts must fit
    :param place: this process among those that train the model
    :param run: what tells the run of the model from others, which must be the same in the file
    :return: collections like ``parts`` with the rollouts from the file, by name
    :raises OtherSizeError: if the rollouts do not fit the model
    :raises ValueError: if the file is of another kind, damaged, or belongs to another run or step
    """
    with contextlib.ExitStack() as stack, _naming(path, place):
        files, headers = _open_all(path, stack, place)
        for file, header in zip(files, headers, strict=True):
            _check_header(file.name, header, place.n_processes, step, parts, run or {})
        found = {name: _read_part(name, parts[name], files, headers, model_buffer, place) for name in parts}
        for file in files:
            if not isinstance(path, BufferedIOBase) and file.read(1):
                raise ValueError(f"{file.name}: damaged, there is more behind its end")
        return found


@contextlib.contextmanager
def _naming(path: RolloutPath, place: Place) -> Iterator[None]:
    """
    Within this context, errors name the file.

    :param path: file name or open file
    :param place: this process among those that train the model
    """
    own = (
        getattr(path, "name", "the open file") if isinstance(path, BufferedIOBase) else _file_of_rank(path, place.rank)
    )
    # Files of other ranks, which errors name by themselves, begin alike.
    begins = str(own) if isinstance(path, BufferedIOBase) else str(_file_of_rank(path, 0).with_suffix(""))
    try:
        yield
    except FileNotFoundError:
        raise
    except ValueError as error:
        kind = OtherSizeError if isinstance(error, OtherSizeError) else ValueError
        raise kind(str(error) if str(error).startswith(begins) else f"{own}: {error}") from error
    except Exception as error:  # numbers that have changed provoke almost any error
        raise ValueError(f"{own}: damaged ({type(error).__name__}: {error})") from error


def _read_part(
    name: str,
    part: KeptRollouts,
    files: list[_Checked],
    headers: list[dict[str, Any]],
    model_buffer: RolloutBuffer,
    place: Place,
) -> KeptRollouts:
    """
    :param name: of the part
    :param part: the model's
    :param files: at the beginning of the part
    :param headers: of the files
    :param model_buffer: the model's rollout buffer
    :param place: this process
    :return: the part with the rollouts from the files
    """
    counts = {len(header["parts"][name]) for header in headers}
    if len(counts) > 1:
        raise ValueError(f"the files of the processes have different numbers of rollouts: {sorted(counts)}")

    together = (
        [file.read_piece(names) for file, names in zip(files, every, strict=True)]
        for every in zip(*(header["parts"][name] for header in headers), strict=True)
    )
    is_shared = headers[0]["place"][1] != place.n_processes
    pieces = (part.share(each, *place) if is_shared else each[0] for each in together)
    return part.restored(pieces, counts.pop(), model_buffer)


def _open_all(
    path: RolloutPath, stack: contextlib.ExitStack, place: Place
) -> tuple[list[_Checked], list[dict[str, Any]]]:
    """
    :param path: file name or open file
    :param stack: closes the files
    :param place: this process among those that train the model
    :return: the file of this process or, where another number of processes wrote them, those of all; and their headers
    """
    if isinstance(path, BufferedIOBase):
        file = _Checked(path)
        header = _read_header(file)
        rank, n_processes = header["place"]
        if n_processes != place.n_processes:
            raise ValueError(f"{n_processes} processes wrote their rollouts: the file names of all of them are needed")
        if rank != place.rank:
            raise ValueError(f"process {rank} wrote it, expected process {place.rank}")
        return [file], [header]
    n_processes = place.n_processes
    if _file_of_rank(path, 0).exists():
        with _file_of_rank(path, 0).open("rb") as first:
            n_processes = _read_header(_Checked(first))["place"][1]
    ranks = [place.rank] if n_processes == place.n_processes else range(n_processes)
    files = [_Checked(stack.enter_context(_file_of_rank(path, each).open("rb"))) for each in ranks]
    headers = [_read_header(file) for file in files]
    for rank, file, header in zip(ranks, files, headers, strict=True):
        if tuple(header["place"]) != (rank, n_processes):
            number, others = header["place"]
            raise ValueError(f"{file.name}: process {number} of {others} wrote it, expected {rank} of {n_processes}")
    return files, headers


def _read_header(file: _Checked) -> dict[str, Any]:
    line = file.read(len(_FIRST_LINE))
    if line.startswith(_PICKLE):
        raise ValueError(
            f"{file.name}: not a file of save_replay_buffer() but a pickle, as versions before the first release wrote "
            "it. It is not read, since a pickle can run code: go on without it"
        )
    if line != _FIRST_LINE:
        raise ValueError(f"{file.name}: not a file of save_replay_buffer(){'' if line else ', it is empty'}")
    length = int.from_bytes(file.read(_LENGTH_SIZE), "little")
    content = file.read(min(length, _MOST_BYTES))
    file.check_seal()
    header: dict[str, Any] = json.loads(content)
    return header


def _check_header(
    name: str,
    header: dict[str, Any],
    n_processes: int,
    step: Step,
    parts: Mapping[str, KeptRollouts],
    run: Mapping[str, Any],
) -> None:
    """
    :param name: of the file
    :param header: its header
    :param n_processes: number of processes that train the model
    :param step: of the model
    :param parts: the model's
    :param run: of the model
    """
    saved, advice = Step(*header["step"]), "load the file that was saved together with the model, or go on without"
    if saved != step:
        raise ValueError(
            f"{name}: belongs to num_timesteps={saved.num_timesteps} and {saved.n_rollouts} rollouts, the model is at "
            f"{step.num_timesteps} and {step.n_rollouts}: {advice}"
        )
    there = {fact: header["run"].get(fact) for fact in run}
    differing = [fact for fact, value in run.items() if there[fact] != value]
    if header["place"][1] != n_processes:  # which divide the rollouts in another way
        differing = [fact for fact in differing if fact not in _SIZES]
    for fact in differing:
        if fact in _OF_RETURNS:
            raise ValueError(
                f"{name}: has returns of {fact}={there[fact]!r}, the model has {run[fact]!r}, and training would mix "
                "them: give the model the same, or go on without the file"
            )
        if fact not in _SIZES:
            raise ValueError(
                f"{name}: belongs to another run, {fact} is {there[fact]!r} there and {run[fact]!r} in the model: "
                f"{advice}"
            )
    if set(header["parts"]) != set(parts):
        raise ValueError(
            f"{name}: has {sorted(header['parts'])}, the model keeps {sorted(parts)}: its staleness or n_aux_epochs is "
            "another"
        )
    if differing:
        sizes, expected = ({fact: facts[fact] for fact in _SIZES} for facts in (there, run))
        raise OtherSizeError(f"{name}: has rollouts of {sizes}, the model expects {expected}")


def _file_of_rank(path: str | pathlib.Path, rank: int) -> pathlib.Path:
    path = with_default_suffix(path, ".pkl")
    infix = f".rank{rank}" if rank > 0 else ""
    return path.with_name(f"{path.stem}{infix}{path.suffix}")
