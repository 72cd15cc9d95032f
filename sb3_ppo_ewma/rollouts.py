"""
Rollouts on their way from collection to training: checks, recomputed advantages, waiting (artificial staleness), and
what is kept of them for the auxiliary phase.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_ppo_ewma._arguments import SB3ArgumentError, warn_caller
from sb3_ppo_ewma.checkpointing.rollout_files import OtherSizeError, Piece
from sb3_ppo_ewma.memory import available_memory

# SB3's minibatches, whose actions its buffers cast to float32; sb3-contrib does not
_CASTING_SAMPLES = (RolloutBufferSamples, DictRolloutBufferSamples)

# Number of features that are gathered at once, if there are several minibatches of them
_BLOCK = 2**22

# Of sb3-contrib's buffers, from the last minibatch that was read from them
_OF_MINIBATCH = ("seq_start_indices", "seq_end_indices")
# Names of what a phase buffer stores. Keys of dictionary observations stand behind a slash.
_RETURNS, _OBSERVATIONS = "returns", "observations"
# Hidden and cell states of actor and critic, in the order of sb3-contrib's ``RNNStates``
LSTM_STATES = ("hidden_states_pi", "cell_states_pi", "hidden_states_vf", "cell_states_vf")


@dataclass
class Rollout:
    """
    A collected rollout and what is needed to bootstrap from its end.

    :param buffer: filled rollout buffer
    :param last_obs: observation after the last step, (n_envs, ...) or a dictionary of such arrays
    :param last_dones: whether the last step ended an episode, (n_envs,)
    :param last_lstm_states: hidden and cell state of the critic after the last step (recurrent policies)
    """

    buffer: RolloutBuffer
    last_obs: Any
    last_dones: np.ndarray
    last_lstm_states: Any = None

    def __post_init__(self) -> None:
        # Recurrent buffers flatten these in place when training begins, or when a callback reads minibatches. GAE needs
        # them as (n_steps, n_envs).
        buffer, starts = self.buffer, self.buffer.episode_starts
        is_flat = starts.shape != (buffer.buffer_size, buffer.n_envs)
        self.episode_starts = starts.reshape(buffer.n_envs, buffer.buffer_size).T if is_flat else starts

    def check_finite(self) -> None:
        """
        Look at what enters the losses. Observations may have NaN or Inf that the networks handle, or do not read.

        :raises ValueError: if there is a NaN or Inf, naming the quantity and where it comes from
        """
        quantities = {
            # Before the rewards, to which the values of truncated episodes are added
            "values": (self.buffer.values, "the network"),
            "log-probabilities": (self.buffer.log_probs, "the network"),
            "rewards": (self.buffer.rewards, "the environment, or from the value of a terminal observation"),
            "advantages": (self.buffer.advantages, "rewards or values that overflow"),
        }
        broken = [(name, origin) for name, (array, origin) in quantities.items() if not is_finite(array)]
        if not broken:
            return
        name, origin = broken[0]
        if not is_finite(self.buffer.observations):
            name, origin = "observations", "the environment"
        elif not is_finite(self.last_obs):
            name, origin = "the last observation", "the environment"
        raise ValueError(
            f"NaN or Inf in {name} of the rollout, from {origin}. The parameters are those from before it. "
            "VecCheckNan finds the step where it begins."
        )

    def detached_copy(self) -> "Rollout":
        """
        :return: a copy that the next collection cannot overwrite
        """
        buffer = copy.copy(self.buffer)
        for name, value in vars(buffer).items():
            if isinstance(value, np.ndarray) or (name == "observations" and isinstance(value, dict)):
                setattr(buffer, name, copy.deepcopy(value))
        return Rollout(buffer, copy.deepcopy(self.last_obs), self.last_dones.copy(), self.last_lstm_states)

    def arrays(self) -> dict[str, np.ndarray]:
        """
        :return: arrays and numbers of the rollout by name, from which :meth:`from_arrays` makes it again
        :raises TypeError: if the buffer has what that leaves out
        """
        arrays = {f"buffer/{name}": array for name, array in buffer_arrays(self.buffer).items()}
        arrays |= _flattened("last_obs", self.last_obs)
        arrays["last_dones"] = self.last_dones
        if self.last_lstm_states is not None:
            arrays["last_hidden_state"], arrays["last_cell_state"] = (
                state.detach().cpu().numpy() for state in self.last_lstm_states
            )
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Piece, model_buffer: RolloutBuffer) -> "Rollout":
        """
        :param arrays: as from :meth:`arrays`
        :param model_buffer: the model's rollout buffer, which the rollout must fit
        :return: the rollout
        :raises OtherSizeError: if it does not fit
        """
        buffer = copy.copy(model_buffer)
        size = tuple(arrays[f"buffer/{name}"].item() for name in ("buffer_size", "n_envs"))
        expected = (buffer.buffer_size, buffer.n_envs)
        if size != expected:
            raise OtherSizeError(f"has rollouts of (n_steps, n_envs) = {size}, the model expects {expected}")
        given = {name.removeprefix("buffer/") for name in arrays if name.startswith("buffer/")}
        needed = set(buffer_arrays(model_buffer))
        if given != needed:
            raise OtherSizeError(f"has rollouts of {sorted(given)}, the model's have {sorted(needed)}")
        for name, value in vars(model_buffer).items():
            found = _restored(f"buffer/{name}", arrays)
            if found is not None:
                setattr(buffer, name, found if isinstance(value, np.ndarray | dict) else found.item())
        states = [arrays[name] for name in ("last_hidden_state", "last_cell_state") if name in arrays]
        last_lstm_states = tuple(map(th.as_tensor, states)) or None
        return cls(buffer, _restored("last_obs", arrays), arrays["last_dones"], last_lstm_states)

    def replace_values(self, values: np.ndarray, last_values: th.Tensor) -> None:
        """
        Compute advantages and returns anew from other values, with the buffer's own GAE. Rewards stay as collected,
        that is, with the bootstrap of truncated episodes by the value function of that time; so do the values that
        value clipping refers to.

        :param values: (n_envs · n_steps,), environment by environment as in the flattened buffer
        :param last_values: (n_envs,) of the observation after the last step
        """
        buffer = self.buffer
        scratch = copy.copy(buffer)
        scratch.values = np.ascontiguousarray(values.reshape(buffer.n_envs, buffer.buffer_size).T)
        scratch.advantages = np.zeros_like(scratch.values)
        scratch.episode_starts = self.episode_starts
        scratch.compute_returns_and_advantage(last_values, self.last_dones)
        buffer.advantages = buffer.swap_and_flatten(scratch.advantages)
        buffer.returns = buffer.swap_and_flatten(scratch.returns)


def check_full(buffer: RolloutBuffer) -> None:
    """
    :param buffer: rollout buffer to train on
    :raises ValueError: if it is not full
    """
    if not getattr(buffer, "full", True):
        raise SB3ArgumentError(
            f"train() needs a whole rollout, the rollout buffer has {buffer.pos} of {buffer.buffer_size} steps: let "
            "learn() or collect_rollouts() fill it"
        )


def buffer_arrays(buffer: RolloutBuffer) -> dict[str, np.ndarray]:
    """
    :param buffer: rollout buffer
    :return: its arrays and numbers by name; keys of dictionaries stand behind a slash
    :raises TypeError: if it has what is neither one of them nor the same in all rollouts, as spaces and functions are
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(buffer).items():
        is_dictionary = isinstance(value, dict) and any(isinstance(each, np.ndarray) for each in value.values())
        if name in _OF_MINIBATCH:
            continue
        if is_dictionary or isinstance(value, np.ndarray | bool | int | float | np.generic):
            arrays |= _flattened(name, value)
        elif not (callable(value) or isinstance(value, spaces.Space | th.device | str | tuple | dict | type(None))):
            raise TypeError(
                f"{type(buffer).__name__}.{name} is a {type(value).__name__}, which a file of kept rollouts cannot "
                "have: make it an array"
            )
    return arrays


def _flattened(name: str, value: Any) -> dict[str, np.ndarray]:
    if isinstance(value, dict):
        return {f"{name}/{key}": array for key, array in value.items()}
    return {name: np.asarray(value)}


def _restored(name: str, arrays: Piece) -> Any:
    """
    :param name: of a value that was an array, a number or a dictionary of arrays
    :param arrays: by name, as from :func:`_flattened`
    :return: the array or the dictionary; ``None`` if there is neither
    """
    if name in arrays:
        return arrays[name]
    return {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")} or None


@contextlib.contextmanager
def naming_non_finite(model: Any) -> Iterator[None]:
    """
    Errors within this context that a NaN or Inf in observations or parameters may have caused name it.

    :param model: the algorithm
    :raises ValueError: from such an error
    """
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        if model._last_obs is not None and not is_finite(model._last_obs):
            raise ValueError("NaN or Inf in the observations that the environment returned") from error
        for name, parameter in model.policy.named_parameters():
            if not bool(th.isfinite(parameter).all()):
                raise ValueError(f"NaN or Inf in the policy's parameter {name!r}") from error
        raise


def is_finite(array: Any) -> bool:
    """
    :param array: array, or dictionary of arrays
    :return: whether no floating-point entry is NaN or Inf
    """
    if isinstance(array, dict):
        return all(is_finite(value) for value in array.values())
    array = np.asarray(array)
    return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())


class MinibatchSource(Protocol):
    """Where the minibatches of one training come from."""

    def minibatches(self, batch_size: int | None) -> Iterator[Any]:
        """
        :param batch_size: number of samples, ``None``: all; the last minibatch may be smaller
        :return: one epoch of minibatches, named tuples as from SB3's buffers
        """
        ...

    def update_targets(self) -> None:
        """Take notice that advantages and returns in the buffer have changed."""


class BufferMinibatches:
    """
    Minibatches from the buffer's own ``get()``.

    :param buffer: filled rollout buffer
    """

    def __init__(self, buffer: RolloutBuffer) -> None:
        self.buffer = buffer

    def minibatches(self, batch_size: int | None) -> Iterator[Any]:
        """
        :param batch_size: number of samples, ``None``: all
        :return: one epoch
        """
        return self.buffer.get(batch_size)

    def update_targets(self) -> None:
        """Nothing to do: every minibatch is read from the buffer."""


class DeviceMinibatches:
    """
    A rollout on the device, each quantity in its own dtype, from which minibatches are gathered there; in the same
    order and with the same numbers as from the buffer's own ``get()``.

    :param buffer: filled rollout buffer, it is flattened
    :param samples_class: named tuple of a minibatch, as ``get()`` returns it; what it has beyond SB3's fields is an
        array of the buffer with the same name
    """

    def __init__(self, buffer: RolloutBuffer, samples_class: type[Any]) -> None:
        self._buffer = buffer
        self._samples_class = samples_class
        extra_names = samples_class._fields[len(RolloutBufferSamples._fields) :]
        flatten_buffer(buffer, extra_names)
        observations: Any = buffer.observations
        self._observations: Any = (
            {key: self._tensor(array) for key, array in observations.items()}
            if isinstance(observations, dict)
            else self._tensor(observations)
        )
        actions = buffer.actions
        if isinstance(buffer.action_space, spaces.Discrete):
            actions = actions.flatten().astype(np.int64)
        elif samples_class in _CASTING_SAMPLES:
            actions = actions.astype(np.float32, copy=False)
        self._actions = self._tensor(actions)
        self._extras = [self._tensor(getattr(buffer, name)) for name in extra_names]
        self.update_targets()

    def _tensor(self, array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, device=self._buffer.device)

    def update_targets(self) -> None:
        """Read values, log-probabilities, advantages and returns from the buffer again."""
        buffer = self._buffer
        targets = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
        self._targets = self._tensor(np.stack([target.flatten() for target in targets]))

    def minibatches(self, batch_size: int | None) -> Iterator[Any]:
        """
        :param batch_size: number of samples, ``None``: all
        :return: one epoch
        """
        return map(self._gather, th.split(self._permutation(), batch_size or self._n_samples))

    def blocks(self, batch_size: int | None, features_dim: int) -> Iterator[tuple[Any, int]]:
        """
        :param batch_size: number of samples, ``None``: all
        :param features_dim: number of features of a sample
        :return: one epoch
        """
        permutation, size = self._permutation(), batch_size or self._n_samples
        block_size = size * max(1, _BLOCK // (size * features_dim))
        whole = self._n_samples // size * size
        for start in range(0, whole, block_size):
            indices = permutation[start : min(start + block_size, whole)]
            yield self._gather(indices), len(indices) // size
        if whole < self._n_samples:
            yield self._gather(permutation[whole:]), 1

    @property
    def _n_samples(self) -> int:
        return self._targets.shape[1]

    def _permutation(self) -> th.Tensor:
        return self._tensor(np.random.permutation(self._n_samples))  # SB3's generator

    def _gather(self, indices: th.Tensor) -> Any:
        observations = self._observations
        return self._samples_class(
            {key: tensor.index_select(0, indices) for key, tensor in observations.items()}
            if isinstance(observations, dict)
            else observations.index_select(0, indices),
            self._actions.index_select(0, indices),
            *self._targets.index_select(1, indices).unbind(),
            *(extra.index_select(0, indices) for extra in self._extras),
        )


def device_minibatches(buffer: RolloutBuffer, samples_class: type[Any]) -> MinibatchSource:
    """
    :param buffer: filled rollout buffer
    :param samples_class: named tuple of a minibatch, as its ``get()`` returns it
    :return: its minibatches gathered on the device, or by its own ``get()`` if it does not fit there
    """
    try:
        return DeviceMinibatches(buffer, samples_class)
    except th.OutOfMemoryError:
        warn_too_large(buffer)
        return BufferMinibatches(buffer)


def warn_too_large(buffer: RolloutBuffer) -> None:
    """
    :param buffer: a rollout that does not fit onto the device
    """
    warn_caller(
        f"A rollout of n_steps={buffer.buffer_size} and n_envs={buffer.n_envs} does not fit into the memory of "
        f"{buffer.device}: its minibatches are copied there one by one, which takes longer."
    )


def flatten_buffer(buffer: RolloutBuffer, extra_names: tuple[str, ...]) -> None:
    """
    What SB3's ``get()`` does when it is called first.

    :param buffer: filled rollout buffer
    :param extra_names: names of its arrays beyond those of SB3's
    """
    if buffer.generator_ready:
        return
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns", *extra_names):
        array = getattr(buffer, name)
        if isinstance(array, dict):
            flat: Any = {key: buffer.swap_and_flatten(part) for key, part in array.items()}
        else:
            flat = buffer.swap_and_flatten(array)
        setattr(buffer, name, flat)
    buffer.generator_ready = True


def observations_at(buffer: RolloutBuffer, indices: slice) -> Any:
    """
    :param buffer: flattened rollout buffer
    :param indices: of its samples
    :return: their observations as tensors on the buffer's device, a dictionary of them for dictionary observations
    """
    if isinstance(buffer.observations, dict):
        return {key: buffer.to_torch(value[indices]) for key, value in buffer.observations.items()}
    return buffer.to_torch(buffer.observations[indices])


class StaleRollouts:
    """
    First-in, first-out queue that delays training on a rollout by ``staleness`` iterations.

    :param staleness: number of iterations a rollout waits, at least 1
    """

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.waiting: deque[Rollout] = deque()

    def exchange(self, rollout: Rollout) -> Rollout | None:
        """
        :param rollout: the one just collected, it is copied
        :return: the one to train on now, ``None`` while the queue fills
        """
        self.waiting.append(rollout.detached_copy())
        return self.waiting.popleft() if len(self.waiting) > self.staleness else None

    @property
    def missing(self) -> int:
        """
        :return: rollouts still to be collected before training begins
        """
        return self.staleness - len(self.waiting)

    def warn_if_missing(self, n_rollouts: int) -> None:
        """
        Warn where rollouts that were waiting when a model was saved are not there.

        :param n_rollouts: number of rollouts that were handed to training so far
        """
        if len(self) < min(self.staleness, n_rollouts):
            warn_caller(
                f"The queue of stale rollouts is not full: the next {self.missing} rollouts are "
                "collected without training. To continue where training stopped, write it with save_replay_buffer() "
                "beside the model and read it with load_replay_buffer()."
            )

    def __len__(self) -> int:
        """
        :return: number of waiting rollouts
        """
        return len(self.waiting)

    def clear(self) -> None:
        """Drop the waiting rollouts."""
        self.waiting.clear()

    def pieces(self) -> Iterator[Piece]:
        """
        :return: the arrays of the waiting rollouts, oldest first
        :raises TypeError: if a rollout buffer has what a file of arrays cannot have
        """
        return (rollout.arrays() for rollout in self.waiting)

    def restored(self, pieces: Iterator[Piece], count: int, model_buffer: RolloutBuffer) -> "StaleRollouts":
        """
        :param pieces: as from :meth:`pieces`
        :param count: their number
        :param model_buffer: the model's rollout buffer
        :return: a queue of them
        :raises OtherSizeError: if there are too many or their size differs
        """
        if count > self.staleness:
            raise OtherSizeError(f"has {count} waiting rollouts, staleness={self.staleness} allows fewer")
        queue = StaleRollouts(self.staleness)
        queue.waiting.extend(Rollout.from_arrays(piece, model_buffer) for piece in pieces)
        return queue

    def share(self, pieces: Sequence[Piece], rank: int, size: int) -> Piece:
        """
        :param pieces: a waiting rollout of each of the processes that wrote them
        :param rank: number of this process
        :param size: number of processes now
        :raises OtherSizeError: always
        """
        raise OtherSizeError(f"has waiting rollouts of {len(pieces)} processes, which {size} cannot divide among them")


# The default batch size is this part of a rollout: in the paper, 16 of its 256 sequences.
_AUX_MINIBATCHES = 16


def default_aux_batch_size(n_samples: int) -> int:
    """
    :param n_samples: of a rollout
    :return: samples in a minibatch of the auxiliary phase where no number is given
    """
    return max(1, n_samples // _AUX_MINIBATCHES)


class PhaseSamples(NamedTuple):
    """
    Samples of an auxiliary phase. Those of a recurrent policy are whole sequences of one length, one after the other.
    What else the family keeps can be read as an attribute.

    :param observations: tensor or dictionary of tensors, (batch, ...) each
    :param returns: (batch,) value targets of the policy phase
    :param extra: by name of an array of the rollout buffer, the rows of the samples, (batch, ...);
        ``"lstm_states"``: the ``LSTM_STATES`` that sequences begin with, (layers, n_sequences, units) each
    """

    observations: Any
    returns: th.Tensor
    extra: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.extra:
            raise AttributeError(
                f"the auxiliary phase keeps no {name}: name it in step_fields of the algorithm's policy_evaluation"
            )
        return self.extra[name]


class PhaseBuffer:
    """
    Observations and value targets of the rollouts of a policy phase, each quantity in one preallocated block and in the
    dtype of the rollout buffer, which is that of the observation space. Memory is reserved with the first rollout.

    :param n_rollouts: number of rollouts of a phase
    :param step_fields: further arrays of the rollout buffer to keep, a row for every step
    :param sequence_fields: further arrays, of the first step of each environment, whose steps are then a sequence that
        stays whole
    """

    def __init__(
        self, n_rollouts: int, step_fields: tuple[str, ...] = (), sequence_fields: tuple[str, ...] = ()
    ) -> None:
        self.n_rollouts = n_rollouts
        self._step_fields, self._sequence_fields = step_fields, sequence_fields
        self._n_stored = 0
        self._blocks: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """
        :return: number of stored rollouts
        """
        return self._n_stored

    @property
    def is_full(self) -> bool:
        """
        :return: whether the phase is complete
        """
        return self._n_stored == self.n_rollouts

    @property
    def nbytes(self) -> int:
        """
        :return: memory reserved
        """
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def n_samples(self) -> int:
        """
        :return: number of stored samples
        """
        return self._n_stored * len(self._blocks[_RETURNS][0]) if self._blocks else 0

    def check_memory(self, buffer: RolloutBuffer) -> None:
        """
        :param buffer: a rollout of the size that will be stored
        :raises ValueError: if the blocks are still to be reserved and cannot fit into the available memory
        """
        available = available_memory()
        if self._blocks or available is None:
            return
        needed = self.n_rollouts * sum(array.nbytes for array in self._samples_of(buffer).values())
        if needed > available:
            n_samples = self.n_rollouts * buffer.buffer_size * buffer.n_envs
            raise ValueError(
                f"n_policy_iterations={self.n_rollouts} rollouts of n_steps={buffer.buffer_size} and "
                f"n_envs={buffer.n_envs} are {n_samples} samples of {needed / n_samples:.0f} bytes: the auxiliary "
                f"phase needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available. Reduce "
                "one of the three."
            )

    def add(self, buffer: RolloutBuffer) -> None:
        """
        :param buffer: rollout buffer, it is copied
        :raises ValueError: if the phase is complete or the size differs from that of the rollouts before
        """
        self._store(self._samples_of(buffer))

    def _store(self, samples: Piece) -> None:
        if self.is_full:
            raise ValueError(f"n_policy_iterations={self.n_rollouts} rollouts are stored already")
        if not self._blocks:
            self._blocks = {
                name: np.empty((self.n_rollouts, *array.shape), array.dtype) for name, array in samples.items()
            }
        expected = {name: (block.shape[1:], block.dtype) for name, block in self._blocks.items()}
        given = {name: (array.shape, array.dtype) for name, array in samples.items()}
        if given != expected:
            raise ValueError(f"rollout of {given}, this phase stores {expected}")
        for name, array in samples.items():
            self._blocks[name][self._n_stored] = array
        self._n_stored += 1

    def clear(self) -> None:
        """Begin the next phase; the memory stays reserved."""
        self._n_stored = 0

    def minibatches(self, batch_size: int) -> Iterator[np.ndarray]:
        """
        One epoch: every stored sample once, in an order that mixes iterations and environments.

        :param batch_size: number of samples, of which only whole sequences are taken; the last minibatch may be smaller
        :return: indices for :meth:`samples`
        """
        length = self._sequence_length
        permutation = np.random.permutation(self.n_samples // length)  # SB3's generator for minibatches
        n_sequences = self.whole_sequences(batch_size) // length
        for start in range(0, len(permutation), n_sequences):
            chosen = permutation[start : start + n_sequences]
            yield (chosen[:, None] * length + np.arange(length)).ravel()

    def whole_sequences(self, n_samples: int) -> int:
        """
        :param n_samples: number of samples
        :return: number of samples in the whole sequences among them, at least one sequence
        """
        return max(1, n_samples // self._sequence_length) * self._sequence_length

    @property
    def _sequence_length(self) -> int:
        """
        :return: number of samples that stay together
        """
        if not self._sequence_fields or not self._blocks:
            return 1
        return len(self._blocks[_RETURNS][0]) // len(self._blocks[self._sequence_fields[0]][0])

    def samples(self, indices: np.ndarray | slice, device: th.device) -> PhaseSamples:
        """
        :param indices: of samples, in whole sequences
        :param device: where to put them
        :return: the samples
        """
        extra: dict[str, Any] = {name: self._gather(name, indices, device) for name in self._step_fields}
        if self._sequence_fields:
            length = self._sequence_length
            chosen = np.arange(self.n_samples)[indices][::length] // length
            states = [self._gather(name, chosen, device).swapaxes(0, 1) for name in self._sequence_fields]
            extra["lstm_states"] = [state.contiguous() for state in states]
        return PhaseSamples(self.observations(indices, device), self.returns(indices, device), extra)

    def observations(self, indices: np.ndarray | slice, device: th.device) -> Any:
        """
        :param indices: of samples
        :param device: where to put them
        :return: their observations as a tensor, or as a dictionary of tensors
        """
        if _OBSERVATIONS in self._blocks:
            return self._gather(_OBSERVATIONS, indices, device)
        names = [name for name in self._blocks if name.startswith(f"{_OBSERVATIONS}/")]
        return {name.partition("/")[2]: self._gather(name, indices, device) for name in names}

    def returns(self, indices: np.ndarray | slice, device: th.device) -> th.Tensor:
        """
        :param indices: of samples
        :param device: where to put them
        :return: their value targets, (batch,)
        """
        return self._gather(_RETURNS, indices, device)

    def _gather(self, name: str, indices: np.ndarray | slice, device: th.device) -> th.Tensor:
        block = self._blocks[name]
        samples = block[: self._n_stored].reshape(-1, *block.shape[2:])  # a view
        # A copy in any case: a policy may change its input in place.
        chosen = samples[indices].copy() if isinstance(indices, slice) else samples[indices]
        return th.as_tensor(chosen, device=device)

    def pieces(self) -> Iterator[Piece]:
        """
        :return: the stored rollouts
        """
        for i in range(self._n_stored):
            yield {name: block[i] for name, block in self._blocks.items()}

    def share(self, pieces: Sequence[Piece], rank: int, size: int) -> Piece:
        """
        :param pieces: a rollout of each of the processes that wrote them
        :param rank: number of this process
        :param size: number of processes now
        :return: an equal part of the samples of all
        :raises OtherSizeError: if they cannot be divided
        """
        whole = self._sequence_fields[0] if self._sequence_fields else _RETURNS
        count, kind = sum(len(piece[whole]) for piece in pieces), "sequences" if self._sequence_fields else "samples"
        if count % size:
            raise OtherSizeError(f"has rollouts of {count} {kind}, which cannot be divided among {size} processes")
        return {
            name: np.array_split(np.concatenate([piece[name] for piece in pieces]), size)[rank] for name in pieces[0]
        }

    def restored(self, pieces: Iterator[Piece], count: int, model_buffer: RolloutBuffer) -> "PhaseBuffer":
        """
        :param pieces: stored rollouts
        :param count: their number
        :param model_buffer: the model's rollout buffer
        :return: a buffer of the same phase with these rollouts
        :raises OtherSizeError: if there are too many or they do not fit
        """
        if count >= self.n_rollouts:
            raise OtherSizeError(f"has {count} rollouts of a phase, n_policy_iterations={self.n_rollouts} allows fewer")
        buffer = PhaseBuffer(self.n_rollouts, self._step_fields, self._sequence_fields)
        buffer.check_memory(model_buffer)
        expected = {name: (array.shape, array.dtype) for name, array in self._samples_of(model_buffer).items()}
        for piece in pieces:
            given = {name: (array.shape, array.dtype) for name, array in piece.items()}
            if given != expected:
                raise OtherSizeError(
                    f"has rollouts of {given}, a model with n_steps={model_buffer.buffer_size}, "
                    f"n_envs={model_buffer.n_envs} and its observation space expects {expected}"
                )
            buffer._store(piece)
        return buffer

    def _samples_of(self, buffer: RolloutBuffer) -> dict[str, np.ndarray]:
        """
        :param buffer: rollout buffer, flattened or not
        :return: what a phase stores of it, arrays of shape (n_steps · n_envs, ...); of sequences (n_envs, ...)
        """
        n_samples = buffer.buffer_size * buffer.n_envs
        # Sequences are one after the other. The order of single samples does not matter.
        is_by_time = bool(self._sequence_fields) and not buffer.generator_ready

        def rows(array: np.ndarray, *shape: int) -> np.ndarray:
            return (array.swapaxes(0, 1) if is_by_time else array).reshape(n_samples, *shape)

        samples = {_RETURNS: rows(buffer.returns)}
        observations: Any = buffer.observations
        shapes: Any = buffer.obs_shape
        if not isinstance(observations, dict):
            samples[_OBSERVATIONS] = rows(observations, *shapes)
        else:
            for key, array in observations.items():
                samples[f"{_OBSERVATIONS}/{key}"] = rows(array, *shapes[key])
        samples |= {name: rows(getattr(buffer, name), -1) for name in self._step_fields}
        for name in self._sequence_fields:
            array = getattr(buffer, name)
            # (n_steps · n_envs, layers, units) environment by environment, or (n_steps, layers, n_envs, units)
            samples[name] = array[:: buffer.buffer_size] if buffer.generator_ready else array[0].swapaxes(0, 1)
        return samples
