"""How a family of algorithms evaluates its policies on samples from its rollout buffer: what PPO, RecurrentPPO and
MaskablePPO differ in."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.rollouts import Rollout, observations_at

# Smallest batch for evaluating many samples without gradients
EVALUATION_BATCH_SIZE = 256


class Minibatch(NamedTuple):
    """
    Samples as the loss takes them.

    :param samples: samples from the rollout buffer
    :param actions: their actions in the form the distribution expects
    :param advantages: (batch,) normalised
    :param mask: (batch,) bool, False for padding; ``None`` where nothing is padded
    """

    samples: Any
    actions: th.Tensor
    advantages: th.Tensor
    mask: th.Tensor | None


class Evaluation(NamedTuple):
    """
    A minibatch under the policies of the loss. Only π_θ has a gradient.

    :param values: (batch,) V_θ(s)
    :param log_prob: (batch,) log π_θ(a|s)
    :param entropy: (batch,) H(π_θ(·|s)), ``None`` where it has no closed form
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param log_prob_behav: (batch,) log π_behav(a|s)
    :param kl: (batch,) KL(π_prox ‖ π_θ), with ``kl_estimator="analytic"``
    """

    values: th.Tensor
    log_prob: th.Tensor
    entropy: th.Tensor | None
    log_prob_prox: th.Tensor
    log_prob_behav: th.Tensor
    kl: th.Tensor | None = None


class PolicyEvaluation:
    """The evaluation of SB3's ``PPO``. Other families override its methods."""

    # What an auxiliary phase keeps of a rollout beside observations and value targets: arrays of the rollout buffer,
    # of every step, and of the first step of each environment
    step_fields: ClassVar[tuple[str, ...]] = ()
    sequence_fields: ClassVar[tuple[str, ...]] = ()

    def further_arguments(self, samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        :param samples: minibatch from the rollout buffer or of an auxiliary phase
        :return: positional and keyword arguments that methods of the policy take beside observations and actions
        """
        return (), {}

    def evaluate_actions(
        self, policy: Any, samples: Any, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param policy: the policy
        :param samples: minibatch from the rollout buffer
        :param actions: its actions in the form the distribution expects
        :return: values, log-probabilities and entropies of the actions
        """
        args, kwargs = self.further_arguments(samples)
        result = policy.evaluate_actions(samples.observations, actions, *args, **kwargs)
        return cast(tuple[th.Tensor, th.Tensor, th.Tensor | None], result)

    def log_prob(self, policy: Any, samples: Any, actions: th.Tensor) -> th.Tensor:
        """
        :param policy: the policy
        :param samples: minibatch from the rollout buffer
        :param actions: its actions in the form the distribution expects
        :return: (batch,) the log-probabilities of :meth:`evaluate_actions`, perhaps without evaluating the critic
        """
        return self.evaluate_actions(policy, samples, actions)[1]

    def may_skip_critic(self, policy: Any) -> bool:
        """
        :param policy: the policy
        :return: whether :meth:`log_prob` may take the place of :meth:`evaluate_actions`
        """
        return True

    def distribution(self, policy: Any, samples: Any) -> Any:
        """
        :param policy: the policy
        :param samples: minibatch from the rollout buffer or of an auxiliary phase
        :return: SB3's action distribution, without evaluating the critic
        """
        return policy.get_distribution(samples.observations)

    def evaluate_auxiliary(self, policy: Any, samples: Any) -> tuple[Any, th.Tensor, th.Tensor]:
        """
        :param policy: a policy with the auxiliary value head
        :param samples: samples of an auxiliary phase
        :return: SB3's action distribution; values V and V_aux, (batch,) each
        """
        args, kwargs = self.further_arguments(samples)
        result = policy.evaluate_auxiliary(samples.observations, *args, **kwargs)
        return cast(tuple[Any, th.Tensor, th.Tensor], result)

    def unknown_sequences(self, policy: Any) -> str | None:
        """
        :param policy: the policy
        :return: why the sequences of its LSTM cannot be evaluated without padding, ``None`` if they can
        """
        return "the policy is not recurrent"

    def unknown_sequence_buffer(self, buffer: Any) -> str | None:
        """
        :param buffer: rollout buffer
        :return: why its sequences cannot be read without padding, ``None`` if they can
        """
        return "the policy is not recurrent"

    def padding_mask(self, samples: Any) -> th.Tensor | None:
        """
        :param samples: minibatch from the rollout buffer
        :return: (batch,) bool, False for padding; ``None`` where nothing is padded
        """
        return None

    def predict_values(self, policy: Any, buffer: Any, indices: slice) -> th.Tensor:
        """
        :param policy: the policy
        :param buffer: flattened rollout buffer
        :param indices: range of its samples
        :return: values of their observations
        """
        return cast(th.Tensor, policy.predict_values(observations_at(buffer, indices)))

    def predict_last_values(self, policy: Any, rollout: Rollout) -> th.Tensor:
        """
        :param policy: the policy
        :param rollout: the rollout
        :return: values of the observations after its last step
        """
        return cast(th.Tensor, policy.predict_values(obs_as_tensor(rollout.last_obs, policy.device)))

    def collected_rollout(self, model: Any) -> Rollout:
        """
        :param model: the algorithm
        :return: what its ``collect_rollouts`` has just collected
        """
        return Rollout(model.rollout_buffer, model._last_obs, cast(np.ndarray, model._last_episode_starts))


@contextlib.contextmanager
def averaged_parameters(policy: Any, average: ParameterEwma) -> Iterator[None]:
    """
    Within this context the policy is π_prox: it has the average's parameters, and is in evaluation mode, in which it
    collected. Afterwards it is as it was: buffers and attributes that its modules assigned are put back. A list or
    dictionary that a module changed in place stays changed.

    :param policy: the policy
    :param average: the average of its parameters
    """
    states = [(module, dict(vars(module))) for module in policy.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in policy.buffers()]
    with th.no_grad(), average.in_place():
        try:
            policy.set_training_mode(False)
            yield
        finally:
            for module, state in states:
                vars(module).update(state)  # also whether it is in training mode
            for buffer, value in buffers:
                buffer.copy_(value)
