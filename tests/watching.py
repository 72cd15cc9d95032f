"""What callbacks see of a training, and comparisons of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

# Local variables of the loops in collect_rollouts
_LOCALS = ("n_steps", "obs_tensor", "actions", "clipped_actions", "values", "log_probs", "new_obs", "rewards", "dones",
           "infos", "action_masks", "lstm_states", "episode_starts")  # fmt: skip


class Watch(BaseCallback):
    """
    Keeps what SB3 promises to callbacks.

    :param act: called at every step with the callback; ``False`` ends the training
    :param sees_original_obs: whether observations before their normalisation are those of the step
    """

    def __init__(self, act: Callable[[Any], Any] = lambda callback: None, sees_original_obs: bool = True) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.events: list[str] = []
        self._act, self._sees_original_obs = act, sees_original_obs

    def _on_step(self) -> bool:
        venv = self.model.get_vec_normalize_env()
        local = {name: self.locals[name] for name in _LOCALS if name in self.locals}
        assert self.locals["env"] is self.model.env
        assert isinstance(self.locals["callback"], BaseCallback)
        seen = {
            **local,
            "kinds": {name: f"{type(each).__name__} {getattr(each, 'dtype', '')}" for name, each in local.items()},
            "num_timesteps": self.num_timesteps,
            "pos": self.locals["rollout_buffer"].pos,
            "original_rewards": None if venv is None else venv.get_original_reward(),
            "original_obs": venv.get_original_obs() if venv is not None and self._sees_original_obs else None,
        }
        self.seen.append(plain(seen))
        return self._act(self) is not False

    def _on_rollout_start(self) -> None:
        self.events.append(f"start {self.model.num_timesteps}")

    def _on_rollout_end(self) -> None:
        self.events.append(f"end {self.model.num_timesteps}")

    def _on_training_end(self) -> None:
        self.events.append("training end")

    def column(self, name: str) -> np.ndarray:
        """
        :param name: of something that was seen
        :return: (steps, ...) its values
        """
        return np.stack([each[name] for each in self.seen])


def plain(value: Any) -> Any:
    """
    :param value: anything nested
    :return: copies, without tensors and without the time that episodes took
    """
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name != "t"}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, th.Tensor):
        return value.detach().cpu().numpy().copy()
    return value.copy() if isinstance(value, np.ndarray) else value


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """
    :param a: what :func:`plain` returned
    :param b: what :func:`plain` returned
    :param path: where both are
    :return: paths at which they differ
    """
    if isinstance(a, dict) and isinstance(b, dict):
        names = a.keys() | b.keys()
        return [line for name in sorted(names) for line in differences(a.get(name), b.get(name), f"{path}/{name}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    is_equal = a == b if isinstance(a, str) else np.array_equal(a, b)
    return [] if is_equal else [path]
