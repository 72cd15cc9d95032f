"""Evaluation with action masks and with the states of an LSTM."""

from typing import Any

import numpy as np
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.type_aliases import GymEnv


class WithMasks:
    """
    A model whose ``predict`` takes the masks from environments, for ``evaluate_policy`` of SB3, which keeps the states
    of an LSTM (that of sb3-contrib 2.9 does not). All else is the model's.

    :param model: the model
    :param env: the environments that it acts in
    """

    def __init__(self, model: Any, env: GymEnv) -> None:
        self._model, self._env = model, env

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As the model's.

        :param args: positional arguments of the model's method
        :param kwargs: keyword arguments of the model's method
        :return: actions, new state
        """
        prediction: tuple[np.ndarray, tuple[np.ndarray, ...] | None]
        prediction = self._model.predict(*args, action_masks=get_action_masks(self._env), **kwargs)
        return prediction

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class MaskedEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` for policies with action masks, recurrent ones among them.

    :param args: positional arguments of ``EvalCallback``
    :param kwargs: keyword arguments of ``EvalCallback``
    """

    def _on_step(self) -> bool:
        model = self.model
        self.model = WithMasks(model, self.eval_env)  # type: ignore[assignment]  # all that EvalCallback uses
        try:
            return super()._on_step()
        finally:
            self.model = model
