"""Invalid-action masks for recurrent policies: distributions, rollout buffers and the collection that fills them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.vec_env import VecEnv
from torch.distributions import Categorical

SelfCategorical = TypeVar("SelfCategorical", bound="MaskedCategoricalDistribution")
SelfMultiCategorical = TypeVar("SelfMultiCategorical", bound="MaskedMultiCategoricalDistribution")

# Logit of an invalid action, as in sb3-contrib
_INVALID = -1e8


class MaskedCategorical(Categorical):
    """
    A categorical distribution in which some values cannot occur. Where all are valid, it is the same to the bit as
    without a mask.

    :param logits: (batch, n) unnormalised log-probabilities
    :param mask: (batch, n) bool, False for what cannot occur
    """

    def __init__(self, logits: th.Tensor, mask: th.Tensor) -> None:
        self.mask = mask
        super().__init__(logits=th.where(mask, logits, _INVALID))

    def entropy(self) -> th.Tensor:
        """
        :return: (batch,)
        """
        summands = self.logits * self.probs
        return -th.where(self.mask, summands, 0.0).sum(-1)


class MaskedCategoricalDistribution(CategoricalDistribution):
    """
    SB3's ``CategoricalDistribution`` with masks.

    :param action_dim: number of actions
    """

    _logits: th.Tensor

    def proba_distribution(self: SelfCategorical, action_logits: th.Tensor) -> SelfCategorical:
        """
        :param action_logits: (batch, action_dim)
        :return: this distribution, without a mask
        """
        self._logits = action_logits
        return super().proba_distribution(action_logits)

    def apply_masking(self, masks: Any) -> None:
        """
        :param masks: (batch, action_dim) True for valid actions
        """
        self.distribution = MaskedCategorical(self._logits, _as_mask(masks, self._logits))


class MaskedMultiCategoricalDistribution(MultiCategoricalDistribution):
    """
    SB3's ``MultiCategoricalDistribution`` with masks. Actions of a ``MultiBinary`` space are such, of two values each.

    :param action_dims: numbers of values of the actions
    """

    _logits: th.Tensor

    def proba_distribution(self: SelfMultiCategorical, action_logits: th.Tensor) -> SelfMultiCategorical:
        """
        :param action_logits: (batch, sum of action_dims)
        :return: this distribution, without a mask
        """
        self._logits = action_logits
        return super().proba_distribution(action_logits)

    def apply_masking(self, masks: Any) -> None:
        """
        :param masks: (batch, sum of action_dims) True for valid values
        """
        dims = [int(dim) for dim in self.action_dims]
        parts = zip(
            *(th.split(each, dims, dim=1) for each in (self._logits, _as_mask(masks, self._logits))), strict=True
        )
        self.distribution = [MaskedCategorical(logits, mask) for logits, mask in parts]


def masked_distribution(space: spaces.Space[Any]) -> MaskedCategoricalDistribution | MaskedMultiCategoricalDistribution:
    """
    :param space: action space
    :return: its distribution
    :raises ValueError: if actions of the space cannot be masked
    """
    sizes = mask_sizes(space)
    if isinstance(space, spaces.Discrete):
        return MaskedCategoricalDistribution(sizes[0])
    return MaskedMultiCategoricalDistribution(sizes)


def mask_sizes(space: spaces.Space[Any]) -> list[int]:
    """
    :param space: action space
    :return: number of values of each of its actions; a mask has an entry for each value of all
    :raises ValueError: if actions of the space cannot be masked
    """
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return [int(size) for size in space.nvec]
    if isinstance(space, spaces.MultiBinary) and isinstance(space.n, int | np.integer):
        return [2] * int(space.n)
    raise ValueError(
        f"the action space must be Discrete, MultiDiscrete or MultiBinary, with one axis, to be masked, got {space}"
    )


def _as_mask(masks: Any, logits: th.Tensor) -> th.Tensor:
    return th.as_tensor(masks, dtype=th.bool, device=logits.device).reshape(logits.shape)


def check_masks(masks: np.ndarray, space: spaces.Space[Any], where: Callable[[tuple[int, ...]], str]) -> None:
    """
    :param masks: (..., n) masks, True for valid values
    :param space: action space
    :param where: says in words which mask has an index
    :raises ValueError: if a mask leaves no valid value of an action
    """
    start = 0
    for i, size in enumerate(mask_sizes(space)):
        is_empty = ~masks[..., start : start + size].astype(bool).any(axis=-1)
        if is_empty.any():
            index = tuple(int(each) for each in np.argwhere(is_empty)[0])
            of_action = "" if isinstance(space, spaces.Discrete) else f" for action {i}"
            raise ValueError(f"action_masks must leave a valid action, {where(index)} has none{of_action}")
        start += size


class MaskedSequenceSamples(NamedTuple):
    """sb3-contrib's ``RecurrentRolloutBufferSamples`` with masks, (padded batch, n)."""

    observations: Any
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    lstm_states: RNNStates
    episode_starts: th.Tensor
    mask: th.Tensor
    action_masks: th.Tensor


class MaskedSequencesMixin:
    """
    Adds masks to a rollout buffer of sb3-contrib for recurrent policies. Place it first.

    :param args: positional arguments of the buffer
    :param kwargs: keyword arguments of the buffer
    """

    action_masks: np.ndarray
    # Masks of the step that is being made
    pending_masks: np.ndarray | None = None

    def reset(self) -> None:
        """Clear the buffer."""
        buffer: Any = super()
        buffer.reset()
        own = cast(RecurrentRolloutBuffer, self)
        self.action_masks = np.ones((own.buffer_size, own.n_envs, sum(mask_sizes(own.action_space))), np.float32)
        self.pending_masks = None

    def add(self, *args: Any, **kwargs: Any) -> None:
        """
        Add a step, with the masks in ``pending_masks``.

        :param args: positional arguments of the buffer's method
        :param kwargs: keyword arguments of the buffer's method
        """
        if self.pending_masks is not None:
            position = cast(RecurrentRolloutBuffer, self).pos
            self.action_masks[position] = self.pending_masks.reshape(self.action_masks.shape[1:])
            self.pending_masks = None
        buffer: Any = super()
        buffer.add(*args, **kwargs)

    def get(self, batch_size: int | None = None) -> Any:
        """
        :param batch_size: number of samples, ``None``: all
        :return: one epoch of minibatches
        """
        own = cast(RecurrentRolloutBuffer, self)
        if own.full and not own.generator_ready:
            self.action_masks = own.swap_and_flatten(self.action_masks)
        buffer: Any = super()
        return buffer.get(batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env_change: np.ndarray, env: Any = None) -> Any:
        buffer: Any = super()
        samples = buffer._get_samples(batch_inds, env_change, env)
        # Padding allows everything.
        masks = cast(Any, self).pad(self.action_masks[batch_inds], padding_value=1.0)
        return MaskedSequenceSamples(**samples._asdict(), action_masks=masks.flatten(end_dim=1))


class MaskedRecurrentRolloutBuffer(MaskedSequencesMixin, RecurrentRolloutBuffer):  # type: ignore[misc]  # samples
    """sb3-contrib's ``RecurrentRolloutBuffer`` with masks."""


class MaskedRecurrentDictRolloutBuffer(MaskedSequencesMixin, RecurrentDictRolloutBuffer):  # type: ignore[misc]
    """sb3-contrib's ``RecurrentDictRolloutBuffer`` with masks."""


class MaskedCollection:
    """
    Lets sb3-contrib's ``RecurrentPPO`` collect with masks. Place it before it. Its loop calls the policy, which takes
    the masks of the step from the environments, and then the buffer, which stores them.
    """

    def _setup_model(self) -> None:
        algorithm: Any = super()
        algorithm._setup_model()
        model = cast(Any, self)
        is_dict = isinstance(model.observation_space, spaces.Dict)
        model.rollout_buffer = (MaskedRecurrentDictRolloutBuffer if is_dict else MaskedRecurrentRolloutBuffer)(
            model.n_steps,
            model.observation_space,
            model.action_space,
            model.rollout_buffer.hidden_state_shape,
            model.device,
            gamma=model.gamma,
            gae_lambda=model.gae_lambda,
            n_envs=model.n_envs,
        )

    def learn(self, *args: Any, use_masking: bool = True, **kwargs: Any) -> Any:
        """
        As in ``RecurrentPPO``, with masks.

        :param args: positional arguments of the algorithm's method
        :param use_masking: whether to use masks
        :param kwargs: keyword arguments of the algorithm's method
        :return: the model
        """
        self._use_masking = use_masking
        return cast(Any, super()).learn(*args, **kwargs)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int, use_masking: bool = True
    ) -> bool:
        """
        As in ``RecurrentPPO``, with masks.

        :param env: the training environments
        :param callback: called for every step
        :param rollout_buffer: buffer to fill
        :param n_rollout_steps: number of steps of each environment
        :param use_masking: whether to use masks
        :return: False when a callback ended the collection
        :raises ValueError: if the environments have no masks, or one of them leaves no valid action
        """
        model, collect = cast(Any, self), cast(Any, super()).collect_rollouts
        if not use_masking:
            return cast(bool, collect(env, callback, rollout_buffer, n_rollout_steps))
        check_supports_masks(env)
        with model.policy.masks_from(partial(_masks_of_step, env, rollout_buffer)):
            return cast(bool, collect(env, callback, rollout_buffer, n_rollout_steps))


def check_supports_masks(env: Any) -> None:
    """
    :param env: environments
    :raises ValueError: if they have no masks
    """
    if not is_masking_supported(env):
        raise ValueError(
            "the environment must have a method action_masks() to be trained on with masks: add one, wrap it into "
            "sb3_contrib.common.wrappers.ActionMasker, or give learn() use_masking=False"
        )


def _masks_of_step(env: VecEnv, buffer: MaskedSequencesMixin) -> np.ndarray:
    """
    :param env: the training environments
    :param buffer: buffer that the step will be added to
    :return: (n_envs, n) masks of the observations that the environments returned last
    """
    if buffer.pending_masks is None:  # else a callback calls the policy before the step is stored
        buffer.pending_masks = get_action_masks(env)
        check_masks(buffer.pending_masks, env.action_space, lambda index: f"environment {index[0]}")
    return buffer.pending_masks
