"""Exchanges between the processes of a data-parallel training, through ``torch.distributed``."""

import atexit
import contextlib
import hashlib
import pickle
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist

Anything = TypeVar("Anything")

# Tensors of past exchanges, which threads of the process group may still hold
_exchanged: list[th.Tensor] = []
_SECONDS_AT_EXIT = 5


def rank() -> int:
    """
    :return: this process's number in the default process group, 0 without one
    """
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """
    :return: number of processes in the default process group, 1 without one
    """
    return dist.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class ProcessGroup:
    """The default process group of ``torch.distributed``, with at least two processes."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()

    @classmethod
    def default(cls) -> "ProcessGroup | None":
        """
        :return: the group, ``None`` where this process trains alone
        """
        return cls() if world_size() > 1 else None

    def average(self, tensors: Sequence[th.Tensor]) -> None:
        """
        Replace tensors by their means over all processes, with one reduction.

        :param tensors: tensors on one device, with the same shapes in all processes
        """
        flat = th.cat([tensor.reshape(-1) for tensor in tensors])
        with _exchange(flat):
            dist.all_reduce(flat)
        flat /= self.size
        parts = th.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

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
        data = self._pickled(value)
        sizes = self._gather_tensors(th.tensor([len(data)], device=data.device))
        padded = data.new_zeros(max(map(int, sizes)))
        padded[: len(data)] = data
        parts = self._gather_tensors(padded)
        return [_unpickled(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def from_first(self, value: Anything) -> Anything:
        """
        :param value: anything that can be pickled; only rank 0's is used
        :return: rank 0's value, in every process
        """
        data = self._pickled(value if self.rank == 0 else None)
        size = th.tensor([len(data)], device=data.device)
        with _exchange(size):
            dist.broadcast(size, src=0)
        data = data if self.rank == 0 else data.new_empty(int(size))
        with _exchange(data):
            dist.broadcast(data, src=0)
        result: Anything = _unpickled(data)
        return result

    def _gather_tensors(self, tensor: th.Tensor) -> list[th.Tensor]:
        gathered = [th.empty_like(tensor) for _ in range(self.size)]
        with _exchange(tensor, *gathered):
            dist.all_gather(gathered, tensor)
        return gathered

    def _pickled(self, value: Any) -> th.Tensor:
        device = "cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"
        return th.frombuffer(bytearray(pickle.dumps(value)), dtype=th.uint8).to(device)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """
        :param values: by name, values that must be equal in all processes
        :raises ValueError: in every process, if a value differs
        """
        by_rank = self.gather(dict(values))
        for number, others in enumerate(by_rank[1:], 1):
            for name in by_rank[0].keys() | others.keys():
                first, other = by_rank[0].get(name), others.get(name)
                if first != other:
                    raise ValueError(
                        f"all processes of a data-parallel training need the same {name}: rank 0 has {first!r}, "
                        f"rank {number} has {other!r}"
                    )

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


def _generator_state() -> str:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    state = [th.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), str(position).encode()]
    return hashlib.sha256(b"".join(state)).hexdigest()


def _unpickled(data: th.Tensor) -> Any:
    return pickle.loads(data.cpu().numpy().tobytes())


@contextlib.contextmanager
def _exchange(*tensors: th.Tensor) -> Iterator[None]:
    """
    Keep tensors until no thread of the process group holds them, and name the likely cause of a failed exchange.

    :param tensors: tensors exchanged within the context
    """
    _exchanged[:] = [*filter(_is_held, _exchanged), *tensors]
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Another process of the data-parallel training has ended or does not answer: its own output says why. "
            f"This one (rank {rank()}) cannot go on without it."
        ) from error


def _is_held(tensor: th.Tensor) -> bool:
    return int(tensor._use_count()) > 1  # type: ignore[attr-defined]  # Python's object is one


@atexit.register
def _wait_until_released() -> None:
    # Gloo's threads let go of tensors a moment after the exchange. They need the interpreter for it, and abort the
    # process if it has ended by then.
    deadline = time.monotonic() + _SECONDS_AT_EXIT
    while any(map(_is_held, _exchanged)) and time.monotonic() < deadline:
        time.sleep(0.001)
