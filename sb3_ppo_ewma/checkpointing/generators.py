"""State of the global random number generators, saved and restored like a module."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th

StateDict = dict[str, th.Tensor]


class GeneratorStates:
    """
    State of the generators of torch (CPU and CUDA), numpy and Python, with the interface of a module's state: SB3
    writes ``state_dict()`` into the zip and hands it back to ``load_state_dict()``.

    Loading does not touch the generators at once: a model that is loaded only to predict or to compare must not rewind
    the random numbers of a training that runs in the same process. :meth:`apply_pending` restores them when training
    goes on.

    :param device: device of the model; its generator is kept too when it is a CUDA device
    """

    def __init__(self, device: th.device) -> None:
        self.device = device
        self.pending: StateDict | None = None

    def state_dict(self) -> StateDict:
        """
        :return: one float64 tensor for each generator, as SB3 and its users expect of parameters: 32-bit words, which
            float64 holds exactly, and a kept normal variable where there is one
        """
        if self.pending is not None:
            return dict(self.pending)
        state = {"torch": _words(th.get_rng_state())}
        if self.device.type == "cuda":
            state["cuda"] = _words(th.cuda.get_rng_state(self.device))
        _, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        state["numpy"] = th.tensor([*map(int, keys), position, has_gauss, cached_gaussian], dtype=th.float64)
        version, internal, gauss_next = random.getstate()
        gauss = (0.0, 0.0) if gauss_next is None else (1.0, gauss_next)
        state["python"] = th.tensor([*internal, version, *gauss], dtype=th.float64)
        return state

    def load_state_dict(self, state_dict: StateDict, strict: bool = True) -> None:
        """
        :param state_dict: from :meth:`state_dict`
        :param strict: whether a state of every generator must be there; those of CUDA may always be missing
        :raises RuntimeError: if one is missing
        """
        current = self.state_dict()
        missing = set(current) - set(state_dict) - {"cuda"}
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in the state of the random number generators: {sorted(missing)}")
        self.pending = {**current, **state_dict}

    def apply_pending(self) -> None:
        """Restore the generators to the state loaded last, if there is one. A state that is none is left out."""
        state, self.pending = self.pending, None
        for name, tensor in (state or {}).items():
            try:
                self._restore(name, tensor.cpu().numpy())
            except (ValueError, TypeError, RuntimeError) as error:
                warnings.warn(f"The loaded state of {name}'s random numbers is not valid: {error}", stacklevel=3)

    def _restore(self, name: str, values: np.ndarray) -> None:
        if name == "torch":
            th.set_rng_state(_bytes(values))
        elif name == "cuda" and self.device.type == "cuda":
            th.cuda.set_rng_state(_bytes(values), self.device)
        elif name == "numpy":
            keys, (position, has_gauss, cached_gaussian) = _integers(values[:-3]), values[-3:].tolist()
            np.random.set_state(("MT19937", keys.astype(np.uint32), int(position), int(has_gauss), cached_gaussian))
        elif name == "python":
            internal, (version, has_gauss, gauss_next) = _integers(values[:-3]), values[-3:].tolist()
            random.setstate((int(version), tuple(internal.tolist()), gauss_next if has_gauss else None))


def _words(state: th.Tensor) -> th.Tensor:
    return th.tensor(state.numpy().view(np.uint32).astype(np.float64))


def _bytes(values: np.ndarray) -> th.Tensor:
    return th.tensor(_integers(values).astype(np.uint32).view(np.uint8))


def _integers(values: np.ndarray) -> np.ndarray:
    integers = values.astype(np.int64)
    if not np.array_equal(integers, values):
        raise ValueError("its entries are not integers")
    return integers


@contextmanager
def preserved_generators(device: th.device) -> Iterator[None]:
    """
    Random numbers drawn inside the context leave no trace: building a second policy must not shift the draws of the
    first one's training.

    :param device: of the model
    """
    states = GeneratorStates(device)
    saved = states.state_dict()
    try:
        yield
    finally:
        states.load_state_dict(saved)
        states.apply_pending()
