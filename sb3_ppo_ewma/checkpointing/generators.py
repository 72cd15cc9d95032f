"""Save and restore the states of the global random number generators."""

import hashlib
import random
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
        :raises ValueError: if one cannot be a state of its generator
        """
        current = self.state_dict()
        missing = set(current) - set(state_dict) - {"cuda"}
        if strict and missing:
            raise RuntimeError(f"Missing key(s) in the state of the random number generators: {sorted(missing)}")
        _check_states(state_dict)
        self.pending = {**current, **state_dict}

    def drop_pending(self) -> None:
        """Forget the states that were loaded last: the generators continue as they are."""
        self.pending = None

    def apply_pending(self) -> None:
        """Restore the states that were loaded last, if any."""
        state, self.pending = self.pending, None
        for name, tensor in (state or {}).items():
            values = tensor.cpu().numpy()
            if name == "torch":
                th.set_rng_state(_bytes(values))
            elif name == "cuda" and self.device.type == "cuda":
                th.cuda.set_rng_state(_bytes(values), self.device)
            elif name == "numpy":
                np.random.set_state(_numpy_state(values))
            elif name == "python":
                random.setstate(_python_state(values))


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
        :raises ValueError: if a state cannot be one of its generator
        """
        _check_states(state_dict)
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


def _check_states(states: StateDict) -> None:
    """
    :param states: of generators, by name
    :raises ValueError: if one cannot be a state of its generator
    """
    for name, tensor in states.items():
        try:
            values = tensor.cpu().numpy()
            if name == "torch":
                th.Generator().set_state(_bytes(values))
            elif name == "numpy":
                np.random.RandomState(0).set_state(_numpy_state(values))
            elif name == "python":
                random.Random().setstate(_python_state(values))
            else:
                _bytes(values)
        except (AttributeError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"the loaded state of {name}'s random numbers is not valid: {error}") from error


def _numpy_state(values: np.ndarray) -> tuple[str, np.ndarray, int, int, float]:
    keys, (position, has_gauss, cached_gaussian) = _integers(values[:-3]), values[-3:].tolist()
    if not 0 <= position <= len(keys):  # NumPy does not look, and would read beyond the keys
        raise ValueError(f"its position is {position}")
    return "MT19937", keys.astype(np.uint32), int(position), int(has_gauss), cached_gaussian


def _python_state(values: np.ndarray) -> tuple[int, tuple[int, ...], float | None]:
    internal, (version, has_gauss, gauss_next) = _integers(values[:-3]), values[-3:].tolist()
    return int(version), tuple(internal.tolist()), gauss_next if has_gauss else None


def _words(state: th.Tensor) -> th.Tensor:
    return th.tensor(state.numpy().view(np.uint32).astype(np.float64))


def _bytes(values: np.ndarray) -> th.Tensor:
    return th.tensor(_integers(values).astype(np.uint32).view(np.uint8))


def _integers(values: np.ndarray) -> np.ndarray:
    if not np.all((values >= 0) & (values < 2**32) & (values == np.floor(values))):
        raise ValueError("its entries are not integers of 32 bits")
    return values.astype(np.int64)


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
