"""State of the global random number generators, saved and restored like a module."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th


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
        self.pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """
        :return: tensors and plain numbers only, as ``torch.load(weights_only=True)`` demands
        """
        if self.pending is not None:
            return self.pending
        _, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        version, internal, gauss_next = random.getstate()
        state: dict[str, Any] = {
            "torch": th.get_rng_state(),
            "numpy_keys": th.tensor(np.asarray(keys).astype(np.int64)),
            "numpy_rest": [int(position), int(has_gauss), float(cached_gaussian)],
            "python_internal": th.tensor(internal, dtype=th.int64),
            "python_rest": [version, gauss_next],
        }
        if self.device.type == "cuda":
            state["cuda"] = th.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """
        :param state_dict: from :meth:`state_dict`
        :param strict: not used, part of the interface of ``torch.nn.Module``
        """
        self.pending = state_dict

    def apply_pending(self) -> None:
        """Restore the generators to the state loaded last, if there is one."""
        state, self.pending = self.pending, None
        if state is None:
            return
        position, has_gauss, cached_gaussian = state["numpy_rest"]
        keys = state["numpy_keys"].cpu().numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, cached_gaussian))
        version, gauss_next = state["python_rest"]
        random.setstate((version, tuple(state["python_internal"].tolist()), gauss_next))
        # torch.load(map_location="cuda") moves these tensors, the generators want them on the CPU.
        th.set_rng_state(state["torch"].cpu())
        if "cuda" in state and self.device.type == "cuda":
            th.cuda.set_rng_state(state["cuda"].cpu(), self.device)


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
