"""
The reference engine: the gradient step of PPO-EWMA as it is defined, with autograd and ``torch.optim`` alone, for any
policy. Every other engine must give the same numbers.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch as th

from sb3_ppo_ewma import losses
from sb3_ppo_ewma._engine.iteration import (
    AuxiliaryCoefficients,
    AuxiliaryEvaluation,
    AuxiliaryMinibatch,
    Coefficients,
    Iteration,
    Objective,
)
from sb3_ppo_ewma.distributions import distribution_parameters, torch_distributions, with_parameters
from sb3_ppo_ewma.evaluation import Evaluation, Minibatch, averaged_parameters
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.rollouts import PhaseSamples
from sb3_ppo_ewma.training_log import STEP

_ANALYTIC, _PHASE = "kl_estimator='analytic'", "the auxiliary phase"


class ReferenceEngine:
    """
    The definition of a gradient step.

    Source: Hilton, Cobbe, Schulman 2022, https://arxiv.org/abs/2110.00641; for the auxiliary phase Cobbe, Hilton,
    Klimov, Schulman 2020, https://arxiv.org/abs/2009.04416.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "reference"

    def __init__(self, iteration: Iteration) -> None:
        self.iteration = iteration

    def minibatches(self) -> Iterator[Any]:
        return self.iteration.source.minibatches(self.iteration.batch_size)  # type: ignore[union-attr]  # policy phase

    def step(self, minibatch: Any, objective: Objective) -> bool:
        iteration = self.iteration
        iteration.read_settings()
        prepared = iteration.prepare(minibatch)
        evaluation = self.evaluate(prepared, objective)
        iteration.read_settings()  # again: code of the user may have run in the policy's forward pass
        loss, statistics = self.loss(evaluation, prepared, objective, iteration.coefficients)
        if self.exceeds_max_kl(statistics):
            iteration.statistics.add(statistics)
            return False
        optimizer = iteration.optimizer_of(objective)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        return self.update(loss.detach(), statistics, optimizer, iteration.average if objective.policy else None)

    def evaluate(self, minibatch: Minibatch, objective: Objective) -> Evaluation:
        """
        :param minibatch: samples
        :param objective: the losses to minimise
        :return: the minibatch under π_θ, π_prox and π_behav
        """
        iteration, samples = self.iteration, minibatch.samples
        # π_prox and π_behav first: SB3's policies keep their last distribution only.
        log_prob_prox = log_prob_behav = samples.old_log_prob
        prox = []
        if objective.policy and iteration.prox is not None:
            log_prob_prox = self.log_prob_under(iteration.prox, minibatch)
            prox = torch_distributions(iteration.policy.action_dist, _ANALYTIC) if iteration.analytic_kl else []
        if objective.policy and iteration.behav is not None:
            log_prob_behav = self.log_prob_under(iteration.behav, minibatch)
        values, log_prob, entropy = iteration.evaluation.evaluate_actions(iteration.policy, samples, minibatch.actions)
        kl = None
        if prox:
            kl = losses.analytic_kl(prox, torch_distributions(iteration.policy.action_dist, _ANALYTIC))
        return Evaluation(values.flatten(), log_prob, entropy, log_prob_prox, log_prob_behav, kl)

    def log_prob_under(self, average: ParameterEwma, minibatch: Minibatch) -> th.Tensor:
        """
        :param average: parameters to put in place of the policy's
        :param minibatch: samples
        :return: (batch,) log-probabilities of their actions
        """
        iteration = self.iteration
        with averaged_parameters(iteration.policy, average):
            return iteration.evaluation.evaluate_actions(iteration.policy, minibatch.samples, minibatch.actions)[1]

    def loss(
        self, evaluation: Evaluation, minibatch: Minibatch, objective: Objective, coefficients: Coefficients
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The loss of a minibatch::

            L = −E[(π_prox/π_behav)·min(r·Â, clip(r, 1−ε, 1+ε)·Â)] + c_v·E[(V − V_targ)²] − c_e·E[H(π_θ)]
                + β·E[KL(π_prox ‖ π_θ)],    r = π_θ/π_prox

        :param evaluation: the minibatch under the policies
        :param minibatch: samples
        :param objective: the losses to minimise
        :param coefficients: hyper-parameters
        :return: loss of shape (), with gradient; statistics
        """
        samples, mask, log_prob = minibatch.samples, minibatch.mask, evaluation.log_prob
        policy_loss: Any = 0.0
        value_loss: Any = 0.0
        entropy_loss: Any = 0.0
        kl: Any = 0.0
        statistics: dict[str, th.Tensor] = {}
        if objective.policy:
            policy_loss, policy_statistics = losses.decoupled_policy_loss(
                log_prob,
                evaluation.log_prob_prox,
                evaluation.log_prob_behav,
                minibatch.advantages,
                clip_range=coefficients.clip_range,
                max_importance_ratio=coefficients.max_importance_ratio,
                mask=mask,
            )
            entropy_loss = losses.entropy_loss(evaluation.entropy, log_prob, mask)
            log_ratio = losses.drop_padding(log_prob.detach() - samples.old_log_prob, mask)
            statistics |= policy_statistics._asdict()
            statistics |= {"entropy_loss": entropy_loss.detach(), "approx_kl": losses.approximate_kl(log_ratio)}
            if is_on(coefficients.kl_coef):
                kl = self.kl(evaluation, mask)
                statistics["kl_loss"] = coefficients.kl_coef * kl.detach()
        if objective.value:
            value_loss = losses.value_loss(
                evaluation.values,
                samples.returns,
                old_values=samples.old_values,
                clip_range_vf=coefficients.clip_range_vf,
                mask=mask,
            )
            statistics["value_loss"] = value_loss.detach()
        loss = total_loss(policy_loss, value_loss, entropy_loss, kl, coefficients)
        if self.iteration.extra_loss is not None and objective.policy:
            loss = loss + self.iteration.extra_loss(evaluation, minibatch)
        statistics["loss"] = loss.detach()
        return loss, statistics

    def kl(self, evaluation: Evaluation, mask: th.Tensor | None) -> th.Tensor:
        """
        :param evaluation: a minibatch under the policies
        :param mask: (batch,) bool, False for padding
        :return: KL(π_prox ‖ π_θ), shape ()
        """
        if evaluation.kl is not None:
            return losses.masked_mean(evaluation.kl, mask)
        return losses.sampled_kl(evaluation.log_prob, evaluation.log_prob_prox, mask)

    def exceeds_max_kl(self, statistics: dict[str, th.Tensor]) -> bool:
        """
        :param statistics: statistics of a minibatch
        :return: whether ``target_kl`` forbids its step
        """
        iteration = self.iteration
        if iteration.process_group is not None and iteration.max_kl is not None and "approx_kl" in statistics:
            iteration.process_group.average([statistics["approx_kl"]])
        return self.is_beyond_max_kl(statistics)

    def is_beyond_max_kl(self, statistics: dict[str, th.Tensor]) -> bool:
        """
        :param statistics: statistics of a minibatch, of all processes
        :return: whether ``target_kl`` forbids its step
        """
        # SB3 measures it against the behaviour policy. Against the EWMA, a refused step would never be caught up with.
        iteration = self.iteration
        if iteration.max_kl is None or "approx_kl" not in statistics:
            return False
        approx_kl = statistics["approx_kl"].item()
        if not approx_kl > iteration.max_kl:  # a NaN goes on, to be named
            return False
        iteration.exceeded_kl = approx_kl
        return True

    def update(
        self,
        loss: th.Tensor,
        statistics: dict[str, th.Tensor],
        optimizer: th.optim.Optimizer,
        average: ParameterEwma | None,
    ) -> bool:
        """
        Clip the gradient, step, and move the EWMA. Where loss or gradient are NaN or Inf, everything stays as it is.

        :param loss: detached loss, shape ()
        :param statistics: statistics of the minibatch, to be added to the iteration's
        :param optimizer: optimiser that makes the step
        :param average: EWMA that the step moves
        :return: False if the step was not made
        """
        iteration = self.iteration
        parameters = list(iteration.policy.parameters())
        if iteration.process_group is not None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            iteration.process_group.average([*gradients, loss := loss.clone()])
        norm = th.nn.utils.clip_grad_norm_(parameters, iteration.max_grad_norm)
        statistics[STEP] = norm + loss
        iteration.statistics.add(statistics)
        if not math.isfinite(statistics[STEP]):
            return False
        optimizer.step()
        if average is not None and iteration.prox_decay is not None:
            average.update(iteration.prox_decay)
        return True

    def auxiliary_step(
        self, minibatch: AuxiliaryMinibatch, optimizer: th.optim.Optimizer, coefficients: AuxiliaryCoefficients
    ) -> bool:
        optimizer.zero_grad()
        loss, statistics = self.auxiliary_backward(minibatch, coefficients)
        return self.update(loss, statistics, optimizer, average=None)

    def auxiliary_backward(
        self, minibatch: AuxiliaryMinibatch, coefficients: AuxiliaryCoefficients
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Put the gradient of the auxiliary loss into the parameters.

        :param minibatch: samples
        :param coefficients: hyper-parameters of the loss
        :return: detached loss, statistics
        """
        evaluation = self.evaluate_auxiliary(minibatch)
        loss, statistics = self.auxiliary_loss(evaluation, minibatch, coefficients)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        return loss.detach(), statistics

    def evaluate_auxiliary(self, minibatch: AuxiliaryMinibatch) -> AuxiliaryEvaluation:
        """
        :param minibatch: samples
        :return: the minibatch under π_θ and π_old
        """
        iteration = self.iteration
        evaluated = iteration.evaluation.evaluate_auxiliary(iteration.policy, minibatch.samples)
        distribution, values, aux_values = evaluated
        current = torch_distributions(distribution, _PHASE)
        kl = losses.analytic_kl(with_parameters(current, minibatch.old_parameters), current)
        return AuxiliaryEvaluation(kl, values, aux_values)

    def auxiliary_loss(
        self, evaluation: AuxiliaryEvaluation, minibatch: AuxiliaryMinibatch, coefficients: AuxiliaryCoefficients
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param evaluation: the minibatch under π_θ and π_old
        :param minibatch: samples
        :param coefficients: hyper-parameters
        :return: loss of shape (), with gradient; statistics
        """
        loss, statistics = losses.auxiliary_loss(*evaluation, minibatch.samples.returns, **coefficients._asdict())
        return loss, statistics._asdict()

    def old_parameters(self, samples: PhaseSamples) -> list[th.Tensor]:
        distribution = self.iteration.evaluation.distribution(self.iteration.policy, samples)
        return distribution_parameters(torch_distributions(distribution, _PHASE))

    def end_epoch(self) -> None:
        pass

    def synchronize(self) -> None:
        pass  # everything is in its place after every step


def total_loss(policy_loss: Any, value_loss: Any, entropy_loss: Any, kl: Any, coefficients: Coefficients) -> Any:
    """
    :param policy_loss: L_π, a tensor, or 0.0 for a term that is not part of the objective, as the others
    :param value_loss: L_V
    :param entropy_loss: L_H, the negative entropy
    :param kl: KL(π_prox ‖ π_θ)
    :param coefficients: their weights
    :return: the loss
    """
    ent_coef, vf_coef, kl_coef = coefficients.ent_coef, coefficients.vf_coef, coefficients.kl_coef
    # L = L_π + c_v·L_V + c_e·L_H + β·KL(π_prox ‖ π_θ)
    loss = policy_loss + vf_coef * value_loss + ent_coef * entropy_loss + kl_coef * kl
    return loss


def is_on(coefficient: Any) -> bool:
    """
    :param coefficient: a number, or a tensor that stands for one other than 0 in a compiled graph
    :return: whether the term it weights is part of the loss
    """
    return isinstance(coefficient, th.Tensor) or coefficient != 0
