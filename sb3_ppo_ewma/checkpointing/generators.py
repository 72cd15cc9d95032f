"""Save and restore the states of the global random number generators."""

import hashlib
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th

StateDict = dict[str, th.Tensor]


class GeneratorStates:
    """
    The states of the global generators of torch (CPU and CUDA), numpy and Python, with the methods of a module that
    saving needs.

    Loading does not change the generators at once: a model that you load only to predict must not rewind the random
    numbers of a training in the same process. :meth:`apply_pending` restores them when training resumes.

    :param device: device of the model; if it is a CUDA device, its generator is saved too
    """

    def __init__(self, device: th.device) -> None:
        self.device = device
        self.pending: StateDict | None = None

    def state_dict(self) -> StateDict:
        """
        Read the current states, or those that were loaded and not restored yet.

        :return: one float64 tensor for each generator, by name: its 32-bit words, which float64 represents exactly,
            and for numpy and Python the second normal variable of a pair
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
        Keep states until :meth:`apply_pending` restores them.

        :param state_dict: result of :meth:`state_dict`
        :param strict: whether the state of every generator must be there, except CUDA's
        :raises RuntimeError: if one is missing
        """
        current = self.state_dict()
        missing = set(current) - set(state_dict) - {"cuda"}
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in the state of the random number generators: {sorted(missing)}")
        self.pending = {**current, **state_dict}

    def drop_pending(self) -> None:
        """Forget the states that were loaded last: the generators continue as they are."""
        self.pending = None

    def apply_pending(self) -> None:
        """
        Restore the states that were loaded last, if any. A state that is not valid is skipped, with a warning.
        """
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


class CollectorGenerators:
    """
    The states of the generators of a process that collects rollouts for the model, with the methods of a module that
    saving needs. ``states`` is ``None`` before it has begun.
    """

    def __init__(self) -> None:
        self.states: StateDict | None = None

    def state_dict(self) -> StateDict:
        """
        :return: the states after the last rollout, empty before the first
        """
        return dict(self.states or {})

    def load_state_dict(self, state_dict: StateDict, strict: bool = True) -> None:
        """
        :param state_dict: result of :meth:`state_dict`
        :param strict: has no effect; part of the interface of a module
        """
        self.states = dict(state_dict) or None

    def drop(self) -> None:
        """Forget the states: the process begins with others."""
        self.states = None


def seed_from(states: StateDict, purpose: str) -> int:
    """
    :param states: of generators, as from :meth:`GeneratorStates.state_dict`
    :param purpose: of the seed; each gets its own
    :return: a seed that depends on both
    """
    digest = hashlib.sha256(purpose.encode())
    for name in sorted(states):
        digest.update(states[name].cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "little") % 2**31


def derived_states(states: StateDict, purpose: str) -> StateDict:
    """
    :param states: of generators
    :param purpose: of the new states
    :return: states of other generators, which depend on both; those of this process stay
    """
    cpu, seed = th.device("cpu"), seed_from(states, purpose)
    with preserved_generators(cpu):
        random.seed(seed)
        np.random.seed(seed)
        th.default_generator.manual_seed(seed)
        return GeneratorStates(cpu).state_dict()


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
    Restore the generators at the end of this context, so that building a second policy does not change the random
    numbers that the training of the first one draws.

    :param device: device of the model
    """
    states = GeneratorStates(device)
    saved = states.state_dict()
    try:
        yield
    finally:
        states.load_state_dict(saved)
        states.apply_pending()
