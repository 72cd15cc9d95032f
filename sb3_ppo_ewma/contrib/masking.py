"""Invalid-action masks for recurrent policies: distributions, rollout buffers and the collection that fills them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch.distributions import Categorical

from sb3_ppo_ewma.rollouts import is_finite

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


def checked_masks(masks: Any, space: spaces.Space[Any], where: Callable[[int], str]) -> np.ndarray:
    """
    :param masks: masks, True for valid values
    :param space: action space
    :param where: describes the origin of a mask, given its row
    :return: (number of masks, n) the masks
    :raises ValueError: if they have another size, are not numbers, or one leaves no valid value of an action
    """
    sizes, array = mask_sizes(space), np.asarray(masks)
    if array.dtype.kind not in "biuf" or array.size == 0 or array.size % sum(sizes) or not is_finite(array):
        raise ValueError(
            f"action_masks must be {sum(sizes)} numbers or booleans for every environment, as the action space is "
            f"{space}, got {array}"
        )
    array, start = array.reshape(-1, sum(sizes)), 0
    for i, size in enumerate(sizes):
        is_empty = ~array[:, start : start + size].astype(bool).any(axis=1)
        if is_empty.any():
            of_action = "" if isinstance(space, spaces.Discrete) else f" for action {i}"
            place = where(int(is_empty.argmax()))
            raise ValueError(f"action_masks must leave a valid action, {place} has none{of_action}")
        start += size
    return array


class MaskableRecurrentRolloutBufferSamples(NamedTuple):
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


class MaskableBufferMixin:
    """
    Adds masks to a rollout buffer of sb3-contrib for recurrent policies. Place it first.

    :param args: positional arguments of the buffer
    :param kwargs: keyword arguments of the buffer
    """

    action_masks: np.ndarray

    def reset(self) -> None:
        """Clear the buffer."""
        buffer: Any = super()
        buffer.reset()
        own = cast(RecurrentRolloutBuffer, self)
        self.action_masks = np.ones((own.buffer_size, own.n_envs, sum(mask_sizes(own.action_space))), np.float32)

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:
        """
        Add a step.

        :param args: positional arguments of the buffer's method
        :param action_masks: (n_envs, n) masks of its observations; ``None``: all actions are valid
        :param kwargs: keyword arguments of the buffer's method
        """
        if action_masks is not None:
            self.action_masks[cast(RecurrentRolloutBuffer, self).pos] = action_masks
        buffer: Any = super()
        buffer.add(*args, **kwargs)

    def get(self, batch_size: int | None = None) -> Iterator[Any]:
        """
        :param batch_size: number of samples, ``None``: all
        :return: one epoch of minibatches
        """
        own = cast(RecurrentRolloutBuffer, self)
        if own.full and not own.generator_ready:
            self.action_masks = own.swap_and_flatten(self.action_masks)
        buffer: Any = super()
        yield from buffer.get(batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env_change: np.ndarray, env: Any = None) -> Any:
        buffer: Any = super()
        samples = buffer._get_samples(batch_inds, env_change, env)
        # Padding allows everything.
        masks = cast(Any, self).pad(self.action_masks[batch_inds], padding_value=1.0)
        return MaskableRecurrentRolloutBufferSamples(**samples._asdict(), action_masks=masks.flatten(end_dim=1))


class MaskableRecurrentRolloutBuffer(MaskableBufferMixin, RecurrentRolloutBuffer):  # type: ignore[misc]  # samples
    """sb3-contrib's ``RecurrentRolloutBuffer`` with masks."""


class MaskableRecurrentDictRolloutBuffer(MaskableBufferMixin, RecurrentDictRolloutBuffer):  # type: ignore[misc]
    """sb3-contrib's ``RecurrentDictRolloutBuffer`` with masks."""


class MaskableCollection:
    """Collects with masks for sb3-contrib's ``RecurrentPPO``. Place it before it."""

    # What learn() was given
    _use_masking = True

    def _setup_model(self) -> None:
        algorithm: Any = super()
        algorithm._setup_model()
        model = cast(Any, self)
        is_dict = isinstance(model.observation_space, spaces.Dict)
        model.rollout_buffer = (MaskableRecurrentDictRolloutBuffer if is_dict else MaskableRecurrentRolloutBuffer)(
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
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: Any,
        n_rollout_steps: int,
        use_masking: bool | None = None,
    ) -> bool:
        """
        As in ``RecurrentPPO``, with masks.

        :param env: the training environments
        :param callback: called for every step
        :param rollout_buffer: buffer to fill
        :param n_rollout_steps: number of steps of each environment
        :param use_masking: whether to use masks; ``None``: as ``learn()`` was told
        :return: False when a callback ended the collection
        :raises ValueError: if the environments have no masks, or one of them leaves no valid action
        """
        model, buffer = cast(Any, self), cast(Any, rollout_buffer)
        if not isinstance(rollout_buffer, MaskableBufferMixin):
            raise ValueError(f"the rollout buffer must have MaskableBufferMixin, got {type(rollout_buffer).__name__}")
        if not (self._use_masking if use_masking is None else use_masking):
            collect = cast(Any, super()).collect_rollouts
            return cast(bool, collect(env, callback, rollout_buffer, n_rollout_steps))
        check_supports_masks(env)
        model.policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        lstm_states = model._last_lstm_states
        for n_steps in range(n_rollout_steps):
            action_masks = _masks_of(env, model.action_space, n_steps)
            obs_tensor = obs_as_tensor(model._last_obs, model.device)
            episode_starts = _flags(model._last_episode_starts, model.device)
            with th.no_grad():
                actions, values, log_probs, lstm_states = model.policy(
                    obs_tensor, lstm_states, episode_starts, action_masks=action_masks
                )
            actions = actions.cpu().numpy()
            new_obs, rewards, dones, infos = env.step(actions)
            model.num_timesteps += env.num_envs
            # Named as in RecurrentPPO, for callbacks
            callback.update_locals({**locals(), "clipped_actions": actions})
            if not callback.on_step():
                return False
            model._update_info_buffer(infos, dones)
            for index in np.flatnonzero(dones):
                rewards[index] += model.gamma * _value_of_cut_episode(model.policy, infos[index], lstm_states, index)
            stored = actions.reshape(-1, 1) if isinstance(model.action_space, spaces.Discrete) else actions
            step = (model._last_obs, stored, rewards, model._last_episode_starts, values, log_probs)
            buffer.add(*step, lstm_states=model._last_lstm_states, action_masks=action_masks)
            model._last_obs, model._last_episode_starts, model._last_lstm_states = new_obs, dones, lstm_states
        with th.no_grad():
            observations, starts = obs_as_tensor(cast(Any, new_obs), model.device), _flags(dones, model.device)
            last_values = model.policy.predict_values(observations, lstm_states.vf, starts)
        buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        callback.on_rollout_end()
        return True


def _flags(flags: Any, device: th.device) -> th.Tensor:
    return th.tensor(flags, dtype=th.float32, device=device)


def _value_of_cut_episode(policy: Any, info: dict[str, Any], lstm_states: RNNStates, index: Any) -> Any:
    """
    :param policy: the policy
    :param info: of the last step of an episode
    :param lstm_states: hidden and cell states after that step
    :param index: number of the environment
    :return: value of the last observation of an episode that a time limit cut, 0 of any other
    """
    observation = info.get("terminal_observation")
    if observation is None or not info.get("TimeLimit.truncated", False):
        return 0.0
    states = tuple(state[:, index : index + 1].contiguous() for state in lstm_states.vf)
    with th.no_grad():
        return policy.predict_values(policy.obs_to_tensor(observation)[0], states, _flags([False], policy.device))[0]


def check_supports_masks(env: Any) -> None:
    """
    :param env: environments
    :raises ValueError: if they have no masks
    """
    if not is_masking_supported(env):
        raise ValueError(
            "the environment must have a method action_masks(), with masks: add one, or wrap it into "
            "sb3_contrib.common.wrappers.ActionMasker; learn(use_masking=False) trains without"
        )


def _masks_of(env: VecEnv, space: spaces.Space[Any], step: int) -> np.ndarray:
    """
    :param env: the training environments
    :param space: their action space
    :param step: of the rollout
    :return: (n_envs, n) masks of the observations that they returned last
    :raises ValueError: as :func:`checked_masks`
    """
    masks = checked_masks(
        get_action_masks(env), space, lambda index: f"environment {index} at step {step} of the rollout"
    )
    if len(masks) != env.num_envs:
        raise ValueError(f"action_masks must be those of {env.num_envs} environments, got {len(masks)}")
    return masks
