"""What every engine works with: the objects and numbers of one training, and the protocol of engines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch as th
from gymnasium import spaces

from sb3_ppo_ewma.advantages import AdvantageNormalizer
from sb3_ppo_ewma.distributions import to_policy_actions
from sb3_ppo_ewma.evaluation import Evaluation, PolicyEvaluation
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.losses import Coefficient
from sb3_ppo_ewma.rollouts import MinibatchSource
from sb3_ppo_ewma.training_log import TrainingStatistics


class Objective(NamedTuple):
    """
    Which losses a gradient step minimises.

    :param policy: the policy loss with the entropy bonus and the KL penalty; each of its steps moves the EWMA
    :param value: the value loss
    """

    policy: bool
    value: bool


class Coefficients(NamedTuple):
    """
    Hyper-parameters of the loss, with the values that schedules have in this iteration.

    :param clip_range: ε, ``None``: no clip
    :param clip_range_vf: range of the value clipping in units of the return, ``None``: no clipping
    :param ent_coef: weight of the entropy
    :param vf_coef: weight of the value loss
    :param kl_coef: β, weight of the KL penalty
    :param max_importance_ratio: M, ``None``: no cap
    """

    clip_range: Coefficient | None
    clip_range_vf: Coefficient | None
    ent_coef: Coefficient
    vf_coef: Coefficient
    kl_coef: Coefficient
    max_importance_ratio: Coefficient | None


class AuxiliaryCoefficients(NamedTuple):
    """
    Hyper-parameters of the auxiliary phase's loss.

    :param beta_clone: β_clone, weight of the KL divergence from the policy before the phase
    :param vf_true_coef: c_vf, weight of the value function's loss
    :param vf_aux_coef: c_aux, weight of the auxiliary value head's loss
    """

    beta_clone: float
    vf_true_coef: float
    vf_aux_coef: float


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


class AuxiliaryMinibatch(NamedTuple):
    """
    Samples of the auxiliary phase.

    :param observations: tensor or dictionary of tensors, (batch, ...) each
    :param returns: (batch,) value targets of the policy phase
    :param old_parameters: parameters of π_old's distributions, (batch, ...) each
    """

    observations: Any
    returns: th.Tensor
    old_parameters: list[th.Tensor]


class AuxiliaryEvaluation(NamedTuple):
    """
    A minibatch of the auxiliary phase under the policy, with gradient.

    :param kl: (batch,) KL(π_old ‖ π_θ)
    :param values: (batch,) V
    :param aux_values: (batch,) V_aux
    """

    kl: th.Tensor
    values: th.Tensor
    aux_values: th.Tensor


@dataclass
class Iteration:
    """
    What one training works with. It stays what it is while the training lasts.

    :param policy: the policy
    :param evaluation: how its family evaluates it
    :param action_space: action space of the environment
    :param source: minibatches of the rollout
    :param batch_size: samples of a minibatch, ``None``: the whole rollout
    :param coefficients: hyper-parameters of the loss
    :param normalizer: of the advantages
    :param optimizer: optimiser of the steps that train the policy
    :param max_grad_norm: largest norm of the gradient
    :param value_optimizer: optimiser of the steps that train the value function alone
    :param average: EWMA of the policy's parameters, ``None`` without one
    :param prox_decay: decay of the EWMA
    :param prox: parameters of π_prox, ``None``: π_prox is the policy that collected
    :param behav: parameters of π_behav, ``None``: the policy that collected
    :param analytic_kl: whether the KL penalty is the divergence of the distributions, not an estimate
    :param max_kl: largest approximate KL divergence at which a step is made, ``None``: any
    :param extra_loss: the algorithm's further term of the loss, ``None`` without one
    :param process_group: processes that train together, ``None``: this one trains alone
    :param statistics: collects what is logged
    :param exceeded_kl: the KL divergence that ended the training, ``None``: none has
    """

    policy: Any
    evaluation: PolicyEvaluation
    action_space: spaces.Space[Any]
    source: MinibatchSource | None
    batch_size: int | None
    coefficients: Coefficients
    normalizer: AdvantageNormalizer
    optimizer: th.optim.Optimizer
    max_grad_norm: float
    value_optimizer: th.optim.Optimizer | None = None
    average: ParameterEwma | None = None
    prox_decay: float | None = None
    prox: ParameterEwma | None = None
    behav: ParameterEwma | None = None
    analytic_kl: bool = False
    max_kl: float | None = None
    extra_loss: Callable[[Evaluation, Minibatch], th.Tensor] | None = None
    process_group: Any = None
    statistics: TrainingStatistics = field(default_factory=TrainingStatistics)
    exceeded_kl: float | None = None

    def prepare(self, samples: Any) -> Minibatch:
        """
        :param samples: minibatch from the rollout buffer
        :return: the same as the loss takes it
        """
        mask = self.evaluation.padding_mask(samples)
        actions = to_policy_actions(self.action_space, samples.actions)
        return Minibatch(samples, actions, self.normalizer(samples.advantages, mask), mask)

    def optimizer_of(self, objective: Objective) -> th.optim.Optimizer:
        """
        :param objective: losses of a step
        :return: the optimiser that makes it
        """
        return self.optimizer if objective.policy or self.value_optimizer is None else self.value_optimizer


class Engine(Protocol):
    """A way to make the gradient steps of a training. All give the numbers of the reference engine."""

    name: str

    def minibatches(self) -> Iterator[Any]:
        """
        :return: one epoch of minibatches for :meth:`step`
        """
        ...

    def step(self, minibatch: Any, objective: Objective) -> bool:
        """
        Make one gradient step, and add its statistics to the iteration's.

        :param minibatch: from :meth:`minibatches`
        :param objective: the losses to minimise
        :return: False if the training ends here: ``target_kl`` is exceeded, or loss or gradient are NaN or Inf
        """
        ...

    def auxiliary_step(
        self, minibatch: AuxiliaryMinibatch, optimizer: th.optim.Optimizer, coefficients: AuxiliaryCoefficients
    ) -> bool:
        """
        Make one gradient step of the auxiliary phase.

        :param minibatch: samples of the phase
        :param optimizer: optimiser of the phase
        :param coefficients: hyper-parameters of its loss
        :return: False if the phase ends here: loss or gradient are NaN or Inf
        """
        ...

    def old_parameters(self, observations: Any) -> list[th.Tensor]:
        """
        :param observations: observations of the auxiliary phase
        :return: parameters of the policy's distributions for them, which :meth:`auxiliary_step` takes as π_old's
        """
        ...

    def end_epoch(self) -> None:
        """Called after every epoch."""
        ...

    def synchronize(self) -> None:
        """Put everything back into policy, EWMA, optimisers and statistics. Called when training ends or pauses."""
        ...
