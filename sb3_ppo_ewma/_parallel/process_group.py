"""Exchanges between the processes of a data-parallel training, through ``torch.distributed``."""

import atexit
import contextlib
import hashlib
import io
import pickle
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as TorchProcessGroup
else:
    TorchProcessGroup = getattr(dist, "ProcessGroup", object)  # torch can be built without it

Anything = TypeVar("Anything")
# The parameter ``data_parallel`` of the algorithms
DataParallelChoice: TypeAlias = bool | TorchProcessGroup | None

# Tensors of past exchanges, which threads of the process group may still hold
_exchanged: list[th.Tensor] = []
# Errors that others may not know of yet: a store, its key of the number of processes that have failed, their number
_reports: list[tuple[Any, str, int]] = []
_SECONDS_AT_EXIT = 5
# Of the keys in the group's store
_PREFIX = "sb3_ppo_ewma"
# How often a process that waits for others looks whether one of them has failed
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_POLLS = 5e-5


class Place(NamedTuple):
    """
    Where this process is among those that train a model together.

    :param rank: its number
    :param n_processes: number of processes
    """

    rank: int
    n_processes: int


ALONE = Place(rank=0, n_processes=1)


def place(data_parallel: DataParallelChoice = None) -> Place:
    """
    :param data_parallel: the parameter of a model
    :return: this process's place among those that train the model
    """
    group = _torch_group(data_parallel)
    return ALONE if group is None else Place(dist.get_rank(group), dist.get_world_size(group))


def check_data_parallel(data_parallel: Any) -> None:
    """
    :param data_parallel: the parameter of a model
    :raises TypeError: if it has the wrong type
    :raises ValueError: if it asks for a process group that is not there, or that this process does not belong to
    """
    if data_parallel is True:
        if place().n_processes == 1:
            raise ValueError(
                "data_parallel=True needs a default process group of several processes, and there is none: start them "
                "with torchrun, and call torch.distributed.init_process_group() first"
            )
    elif _is_group(data_parallel):
        if not dist.is_initialized():
            raise ValueError("data_parallel is a process group that was destroyed: give load() another one, or None")
    elif not (data_parallel is None or data_parallel is False):
        is_comparable = dist.is_available() and not hasattr(data_parallel, "__array__")
        if is_comparable and data_parallel == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("data_parallel is a process group that this process does not belong to")
        raise TypeError(
            f"data_parallel must be True, False, None or a process group of torch.distributed, got {data_parallel!r}"
        )


def _torch_group(data_parallel: DataParallelChoice) -> Any:
    """
    :param data_parallel: the parameter of a model
    :return: process group of ``torch.distributed``, ``None`` where this process trains alone
    """
    if data_parallel is False or not (dist.is_available() and dist.is_initialized()):
        return None
    return data_parallel if _is_group(data_parallel) else dist.group.WORLD


def _is_group(data_parallel: Any) -> bool:
    return dist.is_available() and isinstance(data_parallel, TorchProcessGroup)


class SharedInCopies:
    """
    Stands for the parameter ``data_parallel`` in the state of a model: a process group belongs to a process. Deep
    copies have the same one; in a pickle it becomes ``None``.

    :param data_parallel: the parameter
    """

    def __init__(self, data_parallel: DataParallelChoice) -> None:
        self.data_parallel = data_parallel

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInCopies":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInCopies, (without_group(self.data_parallel),)


def without_group(data_parallel: DataParallelChoice) -> bool | None:
    """
    :param data_parallel: the parameter of a model
    :return: what a file can have of it: ``None`` for a process group
    """
    return data_parallel if isinstance(data_parallel, bool) else None


class ProcessGroup:
    """
    A process group of ``torch.distributed`` with at least two processes. A process that waits for others looks every
    second whether one of them has failed.

    :param group: process group that this process belongs to
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
        # NCCL runs exchanges in the order in which they are queued, and this process goes on.
        self._has_queue = "cuda:nccl" in dist.get_backend_config(group)
        self._store = group.get_group_store()
        self._n_learned = self._count(f"{_PREFIX}/learned/{self.rank}", 0)
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        self._work: Any = None

    @classmethod
    def of(cls, data_parallel: DataParallelChoice = None) -> "ProcessGroup | None":
        """
        :param data_parallel: the parameter of a model
        :return: the processes that train the model, ``None`` where this process trains alone
        """
        group = _torch_group(data_parallel)
        return cls(group) if group is not None and dist.get_world_size(group) > 1 else None

    def average(self, tensors: Sequence[th.Tensor]) -> None:
        """
        Replace tensors by their means over all processes, with one reduction.

        :param tensors: tensors on one device, with the same shapes in all processes
        """
        flat = th.cat([tensor.reshape(-1) for tensor in tensors])
        self.add_up(flat)
        flat /= self.size
        parts = th.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def add_up(self, tensor: th.Tensor) -> None:
        """
        Replace a tensor by its sum over all processes.

        :param tensor: contiguous, with the same shape in all processes
        """
        self._exchange(dist.all_reduce, tensor, is_read=False)

    def moments(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor, int]:
        """
        :param rows: (..., samples) this process's samples; their number may differ between processes
        :return: mean over the samples of all processes, (..., 1); sum of their squared deviations from it, (..., 1);
            their number
        """
        mean = rows.mean(-1, keepdim=True)
        local = th.stack([th.full_like(mean, rows.shape[-1]), mean, ((rows - mean) ** 2).sum(-1, keepdim=True)])
        counts, means, deviations = th.stack(self._gather_tensors(local), dim=1)
        total = counts.sum(0)
        pooled = (counts * means).sum(0) / total
        return pooled, (deviations + counts * (means - pooled) ** 2).sum(0), round(total.flatten()[0].item())

    def gather(self, value: Anything) -> list[Anything]:
        """
        :param value: this process's value, anything that can be pickled
        :return: the values of all processes, by rank
        """
        data = self._on_device(pickle.dumps(value))
        sizes = self._gather_tensors(th.tensor([len(data)], device=data.device))
        padded = data.new_zeros(max(map(int, sizes)))
        padded[: len(data)] = data
        parts = self._gather_tensors(padded)
        both = zip(parts, sizes, strict=True)
        return [pickle.loads(part[: int(size)].cpu().numpy().tobytes()) for part, size in both]

    def from_first(self, value: Anything) -> Anything:
        """
        :param value: anything that can be pickled; only rank 0's is used
        :return: rank 0's value, in every process; its tensors are on the CPU
        """
        # Tensors arrive on the CPU: else they would take memory of rank 0's device in every process.
        buffer = io.BytesIO()
        th.save(value if self.rank == 0 else None, buffer)
        data = self._on_device(buffer.getbuffer())
        size = th.tensor([len(data)], device=data.device)
        first = dist.get_global_rank(self._group, 0)
        self._exchange(dist.broadcast, size, src=first)
        data = data if self.rank == 0 else data.new_empty(int(size))
        self._exchange(dist.broadcast, data, src=first)
        received = io.BytesIO(data.cpu().numpy().tobytes())
        result: Anything = th.load(received, map_location="cpu", weights_only=False)  # from the same training
        return result

    def _gather_tensors(self, tensor: th.Tensor) -> list[th.Tensor]:
        gathered = [th.empty_like(tensor) for _ in range(self.size)]
        self._exchange(dist.all_gather, gathered, tensor)
        return gathered

    def _on_device(self, data: Any) -> th.Tensor:
        return th.frombuffer(bytearray(data), dtype=th.uint8).to(self._device)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """
        :param values: by name, values that must be equal in all processes
        :raises ValueError: in every process, if a value differs
        """
        check_equal(self.gather(dict(values)))

    def seed_generators_apart(self) -> None:
        """
        Give every process random numbers of its own. A process whose generators are in the state of a lower rank's,
        because both were seeded alike or loaded the same checkpoint, seeds them from that state and its rank.
        """
        states = self.gather(_generator_state())
        if states[self.rank] in states[: self.rank]:
            digest = hashlib.sha256(f"{states[self.rank]} {self.rank}".encode()).digest()
            seed = int.from_bytes(digest[:4], "little")
            random.seed(seed)
            np.random.seed(seed)
            th.manual_seed(seed)

    # ------------------------------------------------------------------ exchanges and failures

    def _exchange(self, exchange: Callable[..., Any], *tensors: Any, is_read: bool = True, **kwargs: Any) -> None:
        """
        Errors of the exchange itself, as of tensors that do not fit, keep their names.

        :param exchange: function of ``torch.distributed``
        :param tensors: its tensors or lists of them, kept until no thread of the process group holds them
        :param is_read: whether this process needs the result at once
        :param kwargs: its further arguments
        :raises RuntimeError: if another process has failed, ended, or does not answer
        """
        flat = [each for part in tensors for each in (part if isinstance(part, list) else [part])]
        _exchanged[:] = [*filter(_is_held, _exchanged), *flat]
        self._work = exchange(*tensors, group=self._group, async_op=True, **kwargs)
        try:
            if self._has_queue and flat[0].device.type == "cuda":
                self._wait_for_queue(is_read)
            else:
                self._wait()
        finally:
            self._work = None  # the traceback of an error would hold it, and its tensors

    def _wait(self) -> None:
        while not self._is_over():
            try:
                self.check_others()
            except RuntimeError:
                # The other process may have failed by what this exchange has told it, as all do where settings differ.
                if not self._is_over():
                    raise
                return

    def _is_over(self) -> bool:
        """
        :return: whether the exchange is over within a second; Gloo goes on with it in a thread of its own
        :raises RuntimeError: if it failed
        """
        is_over: bool = self._work.is_completed()
        try:
            self._work.wait(timedelta(seconds=_SECONDS_BETWEEN_LOOKS))
        except th.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not is_over:
                return False
            self.check_others(now=True)
            raise RuntimeError(
                "Another process of the data-parallel training has ended or does not answer: its own output says why. "
                f"This one (rank {self.rank}) cannot go on without it."
            ) from error
        return True

    def _wait_for_queue(self, is_read: bool) -> None:
        while is_read and not self._work.is_completed():
            self.check_others()
            time.sleep(_SECONDS_BETWEEN_POLLS)
        self._work.wait()  # for its place in the queue only

    def check_others(self, now: bool = False) -> None:
        """
        Look whether another process has failed, at most once in a second.

        :param now: look in any case
        :raises RuntimeError: if one has, with its message
        """
        if not now and time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        message = None
        with contextlib.suppress(RuntimeError):  # the process that has the store may be the one that ended
            if self._store.check([self._key("error")]):
                message = self._store.get(self._key("error")).decode()
        if message is not None:
            raise RuntimeError(message) from None

    def begin_learning(self) -> None:
        """Forget failures of the last training. To be called by all processes whenever ``learn`` begins."""
        self._n_learned = self._count(f"{_PREFIX}/learned/{self.rank}", 1)

    def report(self, error: BaseException) -> None:
        """
        Let the other processes fail with the first error that one of them reports.

        :param error: the error that ended the training in this process
        """
        text = f"Rank {self.rank} ended with {type(error).__name__}" + (f": {error}" if str(error) else "")
        with contextlib.suppress(RuntimeError):
            first = self._store.compare_set(self._key("error"), "", text).decode()
            self._count(self._key("failed"), 1)
            if first == text:
                _reports.append((self._store, self._key("failed"), self.size))

    def _key(self, name: str) -> str:
        return f"{_PREFIX}/{self._n_learned}/{name}"

    def _count(self, key: str, n: int) -> int:
        return int(self._store.add(key, n))


def check_equal(by_rank: Sequence[Mapping[str, Any]]) -> None:
    """
    :param by_rank: of every process, values by name
    :raises ValueError: if a value differs
    """
    first = by_rank[0]
    for rank, others in enumerate(by_rank[1:], 1):
        for name in [*first, *(each for each in others if each not in first)]:
            if first.get(name) != others.get(name):
                raise ValueError(
                    f"all processes of a data-parallel training need the same {name}: rank 0 has {first.get(name)!r}, "
                    f"rank {rank} has {others.get(name)!r}"
                )


def _generator_state() -> str:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    state = [th.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), str(position).encode()]
    return hashlib.sha256(b"".join(state)).hexdigest()


def _is_held(tensor: th.Tensor) -> bool:
    return int(tensor._use_count()) > 1  # type: ignore[attr-defined]  # Python's object is one


def _is_known_to_all(store: Any, key: str, size: int) -> bool:
    try:
        return int(store.add(key, 0)) >= size
    except RuntimeError:
        return True  # the store has gone


@atexit.register
def _wait_at_exit() -> None:
    # Gloo's threads let go of tensors a moment after the exchange. They need the interpreter for it, and abort the
    # process if it has ended by then. And this process may have the store in which others find why it ended.
    deadline = time.monotonic() + _SECONDS_AT_EXIT
    while any(map(_is_held, _exchanged)) and time.monotonic() < deadline:
        time.sleep(0.001)
    while not all(_is_known_to_all(*each) for each in _reports) and time.monotonic() < deadline:
        time.sleep(0.05)
