"""
Training of SB3's ``MlpPolicy`` with one tensor for all parameters, one for each of Adam's moments and one for the EWMA:
for networks this small, most of the time of a gradient step is that of many small operations.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution
from torch import nn

from sb3_ppo_ewma import losses
from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma._engine.mlp import Mlp, MlpPolicy
from sb3_ppo_ewma._engine.optimizers import adam_state, can_be_fused
from sb3_ppo_ewma.ewma import Pairs, ParameterEwma
from sb3_ppo_ewma.losses import Coefficient, Coefficients, LossTerms

# Of the rows of a minibatch, those that :meth:`FlatMlp.statistics` takes
ROWS = ("objective", "penalty", "errors", "distribution")


class Samples(NamedTuple):
    """
    What a minibatch has beside the features of its observations.

    :param actions: (batch, ...), see :func:`~sb3_ppo_ewma._engine.forward.as_distributed`
    :param advantages: (batch,) normalised
    :param returns: (batch,)
    :param old_values: (batch,) at collection
    :param old_log_prob: (batch,) at collection
    :param log_prob_behav: (batch,), ``None``: the same
    :param log_prob_prox: (batch,), ``None``: of the EWMA
    """

    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    log_prob_behav: th.Tensor | None
    log_prob_prox: th.Tensor | None

    def chunk(self, n: int) -> Iterator["Samples"]:
        """
        :param n: number of minibatches of one size that these are
        :return: each of them
        """
        columns = [[None] * n if column is None else column.chunk(n) for column in self]
        return map(Samples._make, zip(*columns, strict=True))


class FlatMlp:
    """
    A policy in training, with its parameters, their average and the optimiser's state as long vectors. The policy and
    its own optimiser stay as they are until :meth:`write_back`.

    :param policy: whose optimiser :func:`can_be_flat` says can be flat
    :param average: EWMA of the policy
    :param is_stacked: whether policy and average are parts of one tensor, so that their actors are evaluated together;
        not for a compiled graph, which is slower where parts of one tensor change
    """

    def __init__(self, policy: MlpPolicy, average: ParameterEwma | None, is_stacked: bool = True) -> None:
        self._policy = policy
        self._own_optimizer: th.optim.Optimizer = policy.policy.optimizer
        self._sizes = [parameter.numel() for parameter in policy.parameters]
        self._shapes = [parameter.shape for parameter in policy.parameters]
        self._averages = [] if average is None else MlpPolicy(average.module).parameters
        vectors = [_flat(parameters) for parameters in (policy.parameters, self._averages) if parameters]
        self._stack: th.Tensor | None = None
        if len(vectors) == 2 and is_stacked:
            self._stack = th.stack(vectors)
            vectors = list(self._stack.unbind())
        self.trained = nn.Parameter(vectors[0])
        self.average = vectors[1] if len(vectors) == 2 else None
        self.optimizer = self._make_optimizer()
        self._networks = [policy.networks(self._views(vector), quick=True) for vector in vectors]
        if self._stack is not None:
            self._stacked_actors, _, self._stacked_log_std = policy.networks(self._views(self._stack), quick=True)
        self._gradient = th.empty_like(vectors[0])
        self._gradient_views = self._views(self._gradient)

    def _make_optimizer(self) -> th.optim.Optimizer:
        (group,) = self._own_optimizer.param_groups
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        optimizer = th.optim.Adam([self.trained], **settings)
        states = [self._own_optimizer.state.get(parameter) for parameter in self._policy.parameters]
        if states[0]:
            state = adam_state(optimizer, self.trained)
            state["step"].copy_(states[0]["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _flat([state_[name] for state_ in states if state_])
        return optimizer

    def replaced(self, pairs: Pairs) -> Pairs:
        """
        :param pairs: of the policy and its EWMA
        :return: the same with the long vectors in place of what they stand for
        """
        own = set(map(id, self._policy.parameters))
        kept = [i for i, parameter in enumerate(pairs.parameters) if id(parameter) not in own]
        pairs.parameters = [*(pairs.parameters[i] for i in kept), self.trained]
        pairs.averages = [*(pairs.averages[i] for i in kept), cast(th.Tensor, self.average)]
        return pairs

    def _views(self, vector: th.Tensor) -> list[th.Tensor]:
        """
        :param vector: of all parameters, or several of them, (n, parameters)
        :return: views in the shapes of the parameters, (n, ...) of several
        """
        parts = th.split_with_sizes(vector, self._sizes, dim=-1)
        return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @th.no_grad()
    def write_back(self) -> None:
        """Put parameters, average and the optimiser's state to where they belong."""
        th._foreach_copy_(self._policy.parameters, self._views(self.trained))
        if self.average is not None:
            th._foreach_copy_(self._averages, self._views(self.average))
        # As an ordinary training leaves them behind; a compiled one has none
        gradients = [None] * len(self._sizes) if self.trained.grad is None else self._gradient_views
        for parameter, gradient in zip(self._policy.parameters, gradients, strict=True):
            parameter.grad = gradient
        state = self.optimizer.state.get(self.trained)
        if not state or state["step"] == 0:
            return
        views = zip(self._views(state["exp_avg"]), self._views(state["exp_avg_sq"]), strict=True)
        moments = dict(zip(map(id, self._policy.parameters), views, strict=True))
        for parameter in self._own_optimizer.param_groups[0]["params"]:  # the order in which torch makes them
            if id(parameter) in moments:
                own = adam_state(self._own_optimizer, parameter)
                own["step"].copy_(state["step"])
                th._foreach_copy_([own["exp_avg"], own["exp_avg_sq"]], moments[id(parameter)])

    @property
    def features_dim(self) -> int:
        """
        :return: number of inputs of the networks, at least 1
        """
        return max(1, int(self._shapes[0][1]))

    def features(self, observations: Any) -> th.Tensor:
        """
        :param observations: of any number of minibatches
        :return: (n, features_dim)
        """
        return self._policy.features(observations)

    def loss_terms(
        self, features: th.Tensor, samples: Samples, coefficients: Coefficients, with_approx_kl: bool
    ) -> LossTerms:
        """
        :param features: (batch, features_dim)
        :param samples: of the minibatch
        :param coefficients: of this iteration
        :param with_approx_kl: whether the statistics need ``approx_kl`` at once
        :return: gradient of the joint loss; rows for :meth:`statistics`
        """
        actions, log_prob_behav = samples.actions, samples.log_prob_behav
        actor, critic, _ = self._networks_of(self.trained)
        action_values, parameters, log_prob, log_prob_of_average = self._evaluate(features, actions)
        policy = losses.policy_loss_terms(
            log_prob,
            cast(th.Tensor, samples.log_prob_prox) if log_prob_of_average is None else log_prob_of_average,
            samples.old_log_prob if log_prob_behav is None else log_prob_behav,
            samples.advantages,
            coefficients.ratio_limits,
            kl_coef=coefficients.kl_coef,
        )
        state_values = critic.forward(features)
        errors, half_gradient = losses.value_errors(
            state_values[-1].flatten(),
            samples.returns,
            old_values=samples.old_values,
            clip_range_vf=coefficients.clip_range_vf,
        )
        value_gradient = half_gradient * (2 * coefficients.vf_coef / len(errors))
        action_gradients = self._action_gradients(parameters, actions, policy.gradient, coefficients.ent_coef)
        gradient = self._backward(
            (actor, action_values, *action_gradients), (critic, state_values, value_gradient.unsqueeze(1))
        )
        rows = {
            "objective": policy.objective,
            "log_ratio_prox": policy.log_ratio_prox,
            "log_ratio_behav": policy.log_ratio_behav,
            "log_ratio_old": policy.log_ratio_behav if log_prob_behav is None else log_prob - samples.old_log_prob,
            "errors": errors,
            "distribution": parameters[-1],
        }
        if policy.penalty is not None:
            rows["penalty"] = policy.penalty
        if with_approx_kl:
            rows["approx_kl"] = losses.approximate_kl(rows["log_ratio_old"])
        # Not the loss, but as finite, and quickly computed
        finite = errors.dot(errors) - policy.objective.sum()
        return LossTerms([], [], finite, rows, [gradient])

    def _networks_of(self, vector: th.Tensor) -> tuple[Mlp, Mlp, th.Tensor | None]:
        # A graph makes views of its own: it is slower if it is given views of a tensor that changes.
        if not th.compiler.is_compiling():
            return self._networks[vector is self.average]
        return self._policy.networks(self._views(vector), quick=True)

    def _evaluate(
        self, features: th.Tensor, actions: th.Tensor
    ) -> tuple[list[th.Tensor], list[th.Tensor], th.Tensor, th.Tensor | None]:
        """
        :return: values of the actor's layers, parameters of its distribution, log-probabilities of the actions, also
            under the average, if there is one
        """
        own = self._policy.policy
        if self._stack is not None:
            values = self._stacked_actors.forward(features.expand(2, -1, -1))
            log_std = self._stacked_log_std
            both = forward.distribution(own, values[-1], None if log_std is None else log_std.unsqueeze(1))
            log_prob, log_prob_of_average = forward.log_prob(own, both, actions).unbind()
            parameters = [both[0][0], *(std[0, 0] for std in both[1:])]
            return [features, *(value[0] for value in values[1:-1])], parameters, log_prob, log_prob_of_average
        log_probs: list[th.Tensor | None] = [None, None]
        for i, vector in ((1, self.average), (0, self.trained)):  # in this order: values and parameters are the last's
            if vector is not None:
                actor, _, log_std = self._networks_of(vector)
                values = actor.forward(features)
                parameters = forward.distribution(own, values[-1], log_std)
                log_probs[i] = forward.log_prob(own, parameters, actions)
        return values, parameters, cast(th.Tensor, log_probs[0]), log_probs[1]

    def _backward(
        self,
        actor: tuple[Mlp, list[th.Tensor], th.Tensor, list[th.Tensor]],
        critic: tuple[Mlp, list[th.Tensor], th.Tensor],
    ) -> th.Tensor:
        """
        :return: derivative with respect to all parameters
        """
        network, values, gradient, others = actor
        if th.compiler.is_compiling():
            return _flat([*network.backward(values, gradient), *critic[0].backward(*critic[1:]), *others])
        actor_out, critic_out, others_out = self._policy.parts(self._gradient_views)
        network.backward(values, gradient, actor_out)
        critic[0].backward(*critic[1:], critic_out)
        for out, other in zip(others_out, others, strict=True):
            out.copy_(other)
        return self._gradient

    def _action_gradients(
        self,
        parameters: list[th.Tensor],
        actions: th.Tensor,
        log_prob_gradient: th.Tensor,
        ent_coef: Coefficient | None,
    ) -> tuple[th.Tensor, list[th.Tensor]]:
        """
        :return: derivatives with respect to the outputs of the actor (batch, n) and to ``log_std``, if there is one
        """
        weights = log_prob_gradient.unsqueeze(1)
        if isinstance(self._policy.policy.action_dist, CategoricalDistribution):
            (log_probs,) = parameters
            probs = log_probs.exp()
            # d log p(a) / d logits = onehot(a) − p
            gradient = (-weights * probs).scatter_add_(1, actions.unsqueeze(1), weights)
            if ent_coef is not None:
                # dH / d logits = −p·(log p + H)
                entropy = forward.entropy(self._policy.policy, parameters).unsqueeze(1)
                gradient += ent_coef / len(actions) * probs * (log_probs + entropy)
            return gradient, []
        mean, std = parameters
        deviations = (actions - mean) / std
        log_std_gradient = (weights * (deviations**2 - 1)).sum(0)
        if ent_coef is not None:
            log_std_gradient -= ent_coef
        return weights * deviations / std, [log_std_gradient]

    def statistics(self, rows: dict[str, th.Tensor], coefficients: Coefficients) -> dict[str, th.Tensor]:
        """
        :param rows: from :meth:`loss_terms`, those of n minibatches one above the other
        :param coefficients: of this iteration
        :return: terms of the loss, (n,) each
        """
        n = len(rows["objective"])
        part = rows["distribution"]
        entropy = forward.entropy(self._policy.policy, [part, part])  # of one parameter or two, of which it needs one
        terms = {
            "policy_gradient_loss": -rows["objective"].mean(-1),
            "kl_loss": rows["penalty"].mean(-1) if "penalty" in rows else part.new_zeros(n),
            "entropy_loss": -entropy.reshape(n, -1).mean(-1),
            "value_loss": rows["errors"].square().mean(-1),
        }
        ent_coef = coefficients.ent_coef or 0.0
        loss = terms["policy_gradient_loss"] + terms["kl_loss"] + coefficients.vf_coef * terms["value_loss"]
        return {**terms, "loss": loss + ent_coef * terms["entropy_loss"]}


def can_be_flat(policy: MlpPolicy) -> bool:
    """
    :param policy: any
    :return: whether a step of its optimiser is one of all parameters of its networks
    """
    optimizer, parameters = policy.policy.optimizer, policy.parameters
    if not can_be_fused(optimizer) or len(optimizer.param_groups) != 1:
        return False
    states = [optimizer.state.get(parameter) or {"step": 0} for parameter in parameters]
    return (
        all(parameter.requires_grad for parameter in parameters)
        and set(map(id, parameters)) <= set(map(id, optimizer.param_groups[0]["params"]))
        and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        and len({float(state["step"]) for state in states}) == 1
    )


def _flat(tensors: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([tensor.detach().flatten() for tensor in tensors])
