"""
Training of SB3's ``MlpPolicy`` with one tensor for all parameters, one for each of Adam's moments and one for the EWMA,
and derivatives in closed form: for networks this small, most of the time of a gradient step is that of many small
operations.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch as th
from torch import nn

from sb3_ppo_ewma import losses
from sb3_ppo_ewma._engine.dense_networks import DenseNetwork, DensePolicy
from sb3_ppo_ewma._engine.fused import adam_state
from sb3_ppo_ewma._engine.iteration import Coefficients, Iteration, Objective
from sb3_ppo_ewma._engine.reference import is_on, total_loss
from sb3_ppo_ewma._engine.standard import StandardEngine
from sb3_ppo_ewma.distributions import Parameters, to_policy_actions
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.rollouts import DeviceMinibatches
from sb3_ppo_ewma.training_log import STEP

# Numbers of outputs from which on statistics do not wait any longer
_MOST_WAITING = 2**20


class DenseMinibatch(NamedTuple):
    """
    Samples of one gradient step.

    :param features: (batch, features_dim)
    :param actions: actions in the form the distribution expects
    :param advantages: (batch,) normalised
    :param returns: (batch,)
    :param old_values: (batch,) at collection
    :param old_log_prob: (batch,) at collection
    :param log_prob_prox: (batch,), ``None``: that of the EWMA, or without one that at collection
    :param log_prob_behav: (batch,), ``None``: that at collection
    """

    features: th.Tensor
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    log_prob_prox: th.Tensor | None
    log_prob_behav: th.Tensor | None


class DenseEngine(StandardEngine):
    """
    The standard engine for dense networks, with everything that is trained in one tensor. Policy, EWMA and optimiser
    stay as they are until :meth:`synchronize`.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "dense"
    # Whether policy and EWMA are parts of one tensor, so that their actors are evaluated together
    is_stacked: ClassVar[bool] = True

    def __init__(self, iteration: Iteration) -> None:
        super().__init__(iteration)
        self._dense = DensePolicy(iteration.policy)
        self._own_parameters = self._dense.parameters
        self._sizes = [parameter.numel() for parameter in self._own_parameters]
        self._shapes = [parameter.shape for parameter in self._own_parameters]
        self._averages, self._other_averages, self._other_parameters = self._split_average()
        tensors = [_flat(each) for each in (self._own_parameters, self._averages) if each]
        self._stack: th.Tensor | None = None
        if len(tensors) == 2 and self.is_stacked:
            self._stack = th.stack(tensors)
            tensors = list(self._stack.unbind())
        self.trained = nn.Parameter(tensors[0])
        self.average = tensors[1] if len(tensors) == 2 else None
        self.dense_optimizer = self._make_optimizer()
        self.remember_optimizer(self.dense_optimizer)
        self._networks = [self._dense.networks(self._views(tensor)) for tensor in tensors]
        if self._stack is not None:
            self._stacked_actors, _, self._stacked_log_std = self._dense.networks(self._views(self._stack))
        self._gradient = th.zeros_like(tensors[0])
        self._gradient_views = self._views(self._gradient)
        # By minibatch, epoch and per-sample values of the statistics, which are computed for many minibatches at once
        self._waiting: list[tuple[int, dict[str, th.Tensor]]] = []
        self._n_waiting = 0

    def _split_average(self) -> tuple[list[th.Tensor], list[th.Tensor], list[th.Tensor]]:
        """
        :return: averages of the networks' parameters; of the policy's other parameters; these other parameters
        """
        average = self.iteration.average
        if average is None:
            return [], [], []
        by_parameter = {id(p): (a, p) for a, p in zip(average.averages, average.parameters, strict=True)}
        own = [by_parameter.pop(id(parameter))[0] for parameter in self._own_parameters]
        return own, [each for each, _ in by_parameter.values()], [each for _, each in by_parameter.values()]

    def _make_optimizer(self) -> th.optim.Optimizer:
        own = self.iteration.optimizer
        (group,) = own.param_groups
        optimizer = th.optim.Adam(
            [self.trained], **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        )
        states = [own.state.get(parameter) for parameter in self._own_parameters]
        if states[0]:
            state = adam_state(optimizer, self.trained)
            state["step"].copy_(states[0]["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _flat([each[name] for each in states if each])
        return optimizer

    def _views(self, tensor: th.Tensor) -> list[th.Tensor]:
        """
        :param tensor: all parameters, or n sets of them, (n, parameters)
        :return: views in the shapes of the parameters, (n, ...) of several sets
        """
        parts = th.split_with_sizes(tensor, self._sizes, dim=-1)
        return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    # === Minibatches ===

    def minibatches(self) -> Iterator[Any]:
        iteration = self.iteration
        source = cast(DeviceMinibatches, iteration.source)
        prox = iteration.prox if iteration.prox is not iteration.average else None
        for samples, n_minibatches in source.blocks(iteration.batch_size, max(1, self._shapes[0][1])):
            actions = to_policy_actions(iteration.action_space, samples.actions)
            advantages = iteration.normalizer(samples.advantages.view(n_minibatches, -1)).flatten()
            columns = DenseMinibatch(
                self.standard.features(samples.observations),
                actions,
                advantages,
                samples.returns,
                samples.old_values,
                samples.old_log_prob,
                None if prox is None else self._log_prob_of(prox, samples.observations, actions),
                None if iteration.behav is None else self._log_prob_of(iteration.behav, samples.observations, actions),
            )
            chunks = [[None] * n_minibatches if each is None else each.chunk(n_minibatches) for each in columns]
            yield from map(DenseMinibatch._make, zip(*chunks, strict=True))
            if self._n_waiting > _MOST_WAITING:
                self.add_statistics()

    def _log_prob_of(self, average: ParameterEwma, observations: Any, actions: th.Tensor) -> th.Tensor:
        return self.form.log_prob(self.parameters_under(average, observations), actions)

    # === Steps ===

    @th.no_grad()
    def step(self, minibatch: Any, objective: Objective) -> bool:
        iteration = self.iteration
        last_gradient = None if iteration.max_kl is None else self._gradient.clone()
        gradient, finite, values = self.gradient(minibatch, iteration.coefficients)
        self.wait_with(values)
        if self.exceeds_max_kl(values):
            self._gradient.copy_(cast(th.Tensor, last_gradient))  # SB3 makes none for a step it refuses
            return False
        self.trained.grad = gradient
        values[STEP] = checked = self.clip_and_step([gradient], finite, self.dense_optimizer)
        if not self.was_made(checked):
            return False
        if iteration.average is not None and iteration.prox_decay is not None:
            averages = [cast(th.Tensor, self.average), *self._other_averages]
            iteration.average.interpolate(averages, [self.trained, *self._other_parameters], iteration.prox_decay)
        return True

    @th.no_grad()
    def gradient(
        self, minibatch: DenseMinibatch, coefficients: Coefficients
    ) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        :param minibatch: samples
        :param coefficients: hyper-parameters of the loss
        :return: derivative of the loss with respect to all parameters; a number that is finite where the loss is;
            per-sample values of the statistics
        """
        actor, critic, log_std = self._networks_with(self.trained)
        layers, parameters, log_prob, log_prob_average = self._evaluate_actor(minibatch.features, minibatch.actions)
        log_prob_prox = minibatch.log_prob_prox if log_prob_average is None else log_prob_average
        log_prob_behav = minibatch.old_log_prob if minibatch.log_prob_behav is None else minibatch.log_prob_behav
        values, log_prob_gradient = policy_loss_gradient(
            log_prob,
            minibatch.old_log_prob if log_prob_prox is None else log_prob_prox,
            log_prob_behav,
            minibatch.advantages,
            coefficients,
        )
        critic_layers = critic.forward(minibatch.features)
        errors, value_gradient = value_loss_gradient(critic_layers[-1].flatten(), minibatch, coefficients)
        entropy_weight = -coefficients.ent_coef / len(log_prob) if is_on(coefficients.ent_coef) else None
        outputs_gradient, log_std_gradient = self.form.gradients(
            parameters, minibatch.actions, log_prob_gradient, entropy_weight
        )
        gradient = self._backward(
            (actor, layers, outputs_gradient), (critic, critic_layers, value_gradient.unsqueeze(1)), log_std_gradient
        )
        values |= {"errors": errors, "outputs": layers[-1], "log_ratio_old": log_prob - minibatch.old_log_prob}
        if log_std is not None:
            values["log_std"] = log_std.clone()
        if self.iteration.max_kl is not None:
            values["approx_kl"] = losses.approximate_kl(values["log_ratio_old"])
        # Cheaper than the loss, and finite if and only if the loss is
        return gradient, errors.dot(errors) - values["objective"].sum(), values

    def _networks_with(self, tensor: th.Tensor) -> tuple[DenseNetwork, DenseNetwork, th.Tensor | None]:
        # A graph makes views of its own: it is slower if it is given views of a tensor that changes.
        if not th.compiler.is_compiling():
            return self._networks[tensor is self.average]
        return self._dense.networks(self._views(tensor))

    def _evaluate_actor(
        self, features: th.Tensor, actions: th.Tensor
    ) -> tuple[list[th.Tensor], Parameters, th.Tensor, th.Tensor | None]:
        """
        :return: values of the actor's layers, parameters of its distribution, log-probabilities of the actions, and
            those under the average, if there is one
        """
        if self._stack is not None:
            both = self._stacked_actors.forward(features.expand(2, -1, -1))
            log_std = self._stacked_log_std
            parameters = self.form.parameters(both[-1], None if log_std is None else log_std.unsqueeze(1))
            log_prob, log_prob_average = self.form.log_prob(parameters, actions).unbind()
            own_layers = [features, *(layer[0] for layer in both[1:])]
            return own_layers, [each[0] for each in parameters], log_prob, log_prob_average
        log_probs: list[th.Tensor | None] = [None, None]
        for i, tensor in ((1, self.average), (0, self.trained)):  # the trained policy last: its layers are returned
            if tensor is not None:
                actor, _, log_std = self._networks_with(tensor)
                layers = actor.forward(features)
                parameters = self.form.parameters(layers[-1], log_std)
                log_probs[i] = self.form.log_prob(parameters, actions)
        return layers, parameters, cast(th.Tensor, log_probs[0]), log_probs[1]

    def _backward(
        self,
        actor: tuple[DenseNetwork, list[th.Tensor], th.Tensor],
        critic: tuple[DenseNetwork, list[th.Tensor], th.Tensor],
        log_std_gradient: th.Tensor | None,
    ) -> th.Tensor:
        """
        :param actor: network, values of its layers, derivative with respect to its outputs
        :param critic: the same of the critic
        :param log_std_gradient: derivative with respect to ``log_std``
        :return: derivative with respect to all parameters
        """
        if th.compiler.is_compiling():
            others = [] if log_std_gradient is None else [log_std_gradient]
            return _flat([*actor[0].backward(*actor[1:]), *critic[0].backward(*critic[1:]), *others])
        actor_out, critic_out, others_out = self._dense.parts(self._gradient_views)
        actor[0].backward(*actor[1:], actor_out)
        critic[0].backward(*critic[1:], critic_out)
        if log_std_gradient is not None:
            others_out[0].copy_(log_std_gradient)
        return self._gradient

    # === Statistics, and the way back ===

    def wait_with(self, values: dict[str, th.Tensor]) -> None:
        """
        :param values: per-sample values of a minibatch, for :meth:`add_statistics`
        """
        self._waiting.append((self.iteration.statistics.epoch, values))
        self._n_waiting += values["outputs"].numel()

    @th.no_grad()
    def add_statistics(self) -> None:
        """Compute the statistics of the minibatches since the last call."""
        coefficients = self.iteration.coefficients
        for group in _groups_of_one_size(self._waiting):
            values = {name: th.stack([each[name] for _, each in group]) for name in group[-1][1]}
            # log_std of every minibatch is broadcast over its samples.
            log_std = values["log_std"].unsqueeze(1) if "log_std" in values else None
            entropy = self.form.entropy(self.form.parameters(values["outputs"], log_std))
            kl = values["squared_log_ratio"].mean(-1) * 0.5 if "squared_log_ratio" in values else 0.0
            policy_loss, entropy_loss = -values["objective"].mean(-1), -entropy.mean(-1)
            value_loss = values["errors"].square().mean(-1)
            statistics = losses.ratio_statistics(
                values["log_ratio_prox"],
                values["log_ratio_behav"],
                coefficients.clip_range,
                coefficients.max_importance_ratio,
            )
            statistics |= {
                "policy_gradient_loss": policy_loss,
                "entropy_loss": entropy_loss,
                "value_loss": value_loss,
                "approx_kl": losses.approximate_kl(values["log_ratio_old"]),
                "loss": total_loss(policy_loss, value_loss, entropy_loss, kl, coefficients),
            }
            if isinstance(kl, th.Tensor):
                statistics["kl_loss"] = coefficients.kl_coef * kl
            if STEP in values:
                statistics[STEP] = values[STEP]
            self.iteration.statistics.add(statistics, [epoch for epoch, _ in group])
        self._waiting.clear()
        self._n_waiting = 0

    @th.no_grad()
    def synchronize(self) -> None:
        super().synchronize()
        th._foreach_copy_(self._own_parameters, self._views(self.trained))
        if self.average is not None:
            th._foreach_copy_(self._averages, self._views(self.average))
        if self.trained.grad is not None:  # as an ordinary training leaves them behind, if it made a step
            self.iteration.optimizer.zero_grad()
            for parameter, gradient in zip(self._own_parameters, self._gradient_views, strict=True):
                parameter.grad = gradient
        state = self.dense_optimizer.state.get(self.trained)
        if state and state["step"] > 0:
            self._write_moments(state)
        self.add_statistics()

    def _write_moments(self, state: dict[str, th.Tensor]) -> None:
        """
        :param state: state of the optimiser of the one tensor
        """
        views = zip(self._views(state["exp_avg"]), self._views(state["exp_avg_sq"]), strict=True)
        moments = dict(zip(map(id, self._own_parameters), views, strict=True))
        own = self.iteration.optimizer
        for parameter in own.param_groups[0]["params"]:  # the order in which torch makes them
            if id(parameter) in moments:
                own_state = adam_state(own, parameter)
                own_state["step"].copy_(state["step"])
                th._foreach_copy_([own_state["exp_avg"], own_state["exp_avg_sq"]], moments[id(parameter)])


def policy_loss_gradient(
    log_prob: th.Tensor,
    log_prob_prox: th.Tensor,
    log_prob_behav: th.Tensor,
    advantages: th.Tensor,
    coefficients: Coefficients,
) -> tuple[dict[str, th.Tensor], th.Tensor]:
    """
    The derivative of ``losses.decoupled_policy_loss`` and of the sampled KL penalty, which is short: that of
    Â·exp(log π_θ − log π_behav) is the product itself, that of a clipped sample is 0.

    :param log_prob: (batch,) log π_θ(a|s), without a graph, as the others
    :param log_prob_prox: (batch,) log π_prox(a|s)
    :param log_prob_behav: (batch,) log π_behav(a|s)
    :param advantages: (batch,) normalised
    :param coefficients: hyper-parameters of the loss
    :return: per-sample values of the statistics; (batch,) derivative of the loss with respect to log π_θ
    """
    log_cap = None if coefficients.max_importance_ratio is None else losses.log_of(coefficients.max_importance_ratio)
    log_ratio_prox, log_ratio_behav = log_prob - log_prob_prox, log_prob - log_prob_behav
    behav = log_prob_behav if log_cap is None else th.maximum(log_prob_behav, log_prob - cast(float, log_cap))
    exponent = log_prob - behav
    bound = losses.MAX_EXPONENT[exponent.dtype]
    is_bounded = isinstance(log_cap, float) and log_cap <= bound
    ratio = th.exp(exponent) if is_bounded else losses.bounded_exp(exponent)
    objective = advantages * ratio
    gradient = advantages * (-1 / len(advantages)) * ratio
    if not is_bounded:
        gradient = th.where(exponent > bound, 0.0, gradient)
    if coefficients.clip_range is not None:
        low, high = losses.log_clip_limits(coefficients.clip_range)
        clipped_ratio = th.clamp(log_ratio_prox, cast(float, low), cast(float, high))  # or both tensors
        clipped = advantages * losses.bounded_exp(clipped_ratio + (log_prob_prox - behav))
        # Where the minimum takes the clipped branch; a NaN is not such a place.
        gradient = th.where((clipped < objective) & (clipped_ratio != log_ratio_prox), 0.0, gradient)
        objective = th.minimum(objective, clipped)
    values = {"objective": objective, "log_ratio_prox": log_ratio_prox, "log_ratio_behav": log_ratio_behav}
    if is_on(coefficients.kl_coef):
        bounded = losses.bounded_log_ratio(log_ratio_prox)
        values["squared_log_ratio"] = bounded**2
        gradient = gradient + coefficients.kl_coef * bounded / len(bounded)
    return values, gradient


def value_loss_gradient(
    values: th.Tensor, minibatch: DenseMinibatch, coefficients: Coefficients
) -> tuple[th.Tensor, th.Tensor]:
    """
    The derivative of ``losses.value_loss``.

    :param values: (batch,) V_θ(s), without a graph
    :param minibatch: samples
    :param coefficients: hyper-parameters of the loss
    :return: (batch,) errors, whose mean square is the loss; (batch,) derivative of the weighted loss
    """
    factor = 2 * coefficients.vf_coef / len(values)
    if coefficients.clip_range_vf is None:
        errors = values - minibatch.returns
        return errors, errors * factor
    bound = cast(float, coefficients.clip_range_vf)  # or a tensor
    difference = values - minibatch.old_values
    clipped = th.clamp(difference, -bound, bound)
    errors = minibatch.old_values + clipped - minibatch.returns
    return errors, th.where(clipped != difference, 0.0, errors) * factor


def _groups_of_one_size(
    waiting: Sequence[tuple[int, dict[str, th.Tensor]]],
) -> Iterator[list[tuple[int, dict[str, th.Tensor]]]]:
    """
    :param waiting: by minibatch, epoch and per-sample values
    :return: runs of minibatches that have the same size and the same values
    """
    return (
        list(group)
        for _, group in itertools.groupby(waiting, key=lambda each: (len(each[1]["objective"]), each[1].keys()))
    )


def _flat(tensors: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([tensor.detach().flatten() for tensor in tensors])
