"""The arithmetic of the LSTMs in training, without the rest of it."""

from typing import Any

import numpy as np
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback


class LstmOnly:
    """
    Takes the place of ``RecurrentPPO`` in the measurement of training. Its ``train()`` is only what ``torch.nn.LSTM``
    computes, a forward and a backward pass of actor and critic for the padded sequences of every minibatch. A
    ``RecurrentPPO`` collects the rollouts and learns from them, with the same minibatches, while nothing is measured.

    :param args: positional arguments of ``RecurrentPPO``
    :param kwargs: keyword arguments of ``RecurrentPPO``
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._model = RecurrentPPO(*args, **kwargs)
        self.n_steps, self.n_envs = self._model.n_steps, self._model.n_envs

    def learn(self, total_timesteps: int, reset_num_timesteps: bool = True) -> None:
        """
        Let the model learn, and compute the LSTMs' part before each of its trainings.

        :param total_timesteps: as in ``RecurrentPPO``
        :param reset_num_timesteps: as in ``RecurrentPPO``
        """
        self._model.learn(total_timesteps, _BeforeTraining(self), reset_num_timesteps=reset_num_timesteps)

    def prepare(self) -> None:
        """Draw the minibatches of an iteration. The model will draw the same."""
        state = np.random.get_state()
        batches = [list(self._model.rollout_buffer.get(self._model.batch_size)) for _ in range(self._model.n_epochs)]
        np.random.set_state(state)
        self._inputs = [self._sequences(samples) for epoch in batches for samples in epoch]

    def train(self) -> None:
        """Compute the passes."""
        for inputs in self._inputs:
            for lstm, features, states in inputs:
                outputs, _ = lstm(features, states)
                outputs.sum().backward()
        self._model.policy.zero_grad()

    def _sequences(self, samples: Any) -> list[Any]:
        """
        :param samples: a minibatch
        :return: of actor and critic, the LSTM, (steps, sequences, features) inputs and the states before them
        """
        policy: Any = self._model.policy
        features = policy.features_extractor(samples.observations.float())
        found = []
        for lstm, states in ((policy.lstm_actor, samples.lstm_states.pi), (policy.lstm_critic, samples.lstm_states.vf)):
            sequences = features.reshape(states[0].shape[1], -1, lstm.input_size).swapaxes(0, 1).contiguous()
            found.append((lstm, sequences, states))
        return found


class _BeforeTraining(BaseCallback):
    def __init__(self, measured: LstmOnly) -> None:
        super().__init__()
        self._measured = measured

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._measured.prepare()
        self._measured.train()
