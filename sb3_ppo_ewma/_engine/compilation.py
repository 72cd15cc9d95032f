"""Whole gradient steps as compiled graphs: gather, losses, backward pass, clipping, Adam and EWMA."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th

from sb3_ppo_ewma._engine.optimizers import adam_state, can_be_fused
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.losses import LossTerms

# Number of steps in one graph where they are so small that calling it takes longer
UNROLLED = 4

# For how many steps the numbers are prepared at once
_ROWS = 64


class CompilationError(Exception):
    """Says why a step has to be made without a graph."""


class Adam(NamedTuple):
    """
    The tensors and constants of an Adam optimiser in a graph.

    :param parameters: all it optimises
    :param exp_avgs: their first moments
    :param exp_avg_sqs: their second moments
    :param betas: decays of the moments
    :param eps: added to the denominator
    :param weight_decay: of the parameters
    """

    parameters: list[th.Tensor]
    exp_avgs: list[th.Tensor]
    exp_avg_sqs: list[th.Tensor]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class StepNumbers:
    """
    What differs from step to step, as the positions of numbers in a tensor, so that no graph depends on their values.
    Behind these stand, for each parameter, Adam's step size, learning rate / (1 − β₁ᵗ), and the divisor of the root of
    its second moment, √(1 − β₂ᵗ).
    """

    MAX_GRAD_NORM = 0
    MAX_KL = 1  # largest approximate KL divergence at which the step is made
    INTERPOLATION = 2  # weight of the new parameters in the EWMA
    N = 3


def _gradient_steps(
    loss_terms: Callable[..., LossTerms],
    minibatches: list[tuple[Any, ...]],
    adam: Adam,
    averages: list[th.Tensor],
    averaged: list[th.Tensor],
    numbers: list[th.Tensor],
) -> tuple[list[dict[str, th.Tensor]], th.Tensor, list[bool]]:
    """
    :param loss_terms: computes the losses of a minibatch
    :param minibatches: its arguments, for each minibatch
    :param adam: the optimiser
    :param averages: tensors of an EWMA, none without one
    :param averaged: the parameters that they average
    :param numbers: of each step, see :class:`StepNumbers`
    :return: statistics of the minibatches, of which ``"step"`` is NaN or Inf where gradient or loss are; how many steps
        were made, until the first that was not; for each parameter whether it had a gradient
    """
    statistics: list[dict[str, th.Tensor]] = []
    all_made: list[th.Tensor] = []
    has_gradient: list[bool] = []
    for arguments, row in zip(minibatches, numbers, strict=True):
        last_made = all_made[-1] if all_made else None
        result = _gradient_step(loss_terms, arguments, adam, averages, averaged, row, last_made)
        statistics.append(result[0])
        all_made.append(result[1])
        has_gradient = result[2]
    return statistics, th.stack(all_made).sum(), has_gradient


def _gradient_step(
    loss_terms: Callable[..., LossTerms],
    arguments: tuple[Any, ...],
    adam: Adam,
    averages: list[th.Tensor],
    averaged: list[th.Tensor],
    numbers: th.Tensor,
    last_made: th.Tensor | None,
) -> tuple[dict[str, th.Tensor], th.Tensor, list[bool]]:
    """
    :param last_made: whether the step before it was made; if not, this one is not either
    :return: as :func:`_gradient_steps`, of one step
    """
    terms = loss_terms(*arguments)
    parameters = adam.parameters
    gradients = _gradients(terms, parameters)
    has_gradient = [gradient is not None for gradient in gradients]
    with th.no_grad():
        norm = th.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()
        step = norm + terms.loss
        made = th.isfinite(step)
        if "approx_kl" in terms.statistics:
            made = made & (terms.statistics["approx_kl"] <= numbers[StepNumbers.MAX_KL])
        if last_made is not None:
            made = made & last_made
        factor = th.clamp(numbers[StepNumbers.MAX_GRAD_NORM] / (norm + 1e-6), max=1.0)
        one = made.to(norm.dtype)  # or 0, which leaves everything as it is
        step_sizes, divisors = numbers[StepNumbers.N :].chunk(2)
        beta1, beta2 = adam.betas
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            parameter, exp_avg, exp_avg_sq = parameters[i], adam.exp_avgs[i], adam.exp_avg_sqs[i]
            clipped = th.where(made, gradient * factor + adam.weight_decay * parameter, 0.0)
            exp_avg.lerp_(clipped, (1 - beta1) * one)
            exp_avg_sq.mul_(1 - (1 - beta2) * one).add_((1 - beta2) * clipped * clipped)
            denominator = exp_avg_sq.sqrt() / divisors[i] + adam.eps
            parameter.sub_(one * step_sizes[i] * (exp_avg / denominator))
        for average, parameter in zip(averages, averaged, strict=True):
            average.lerp_(parameter, (one * numbers[StepNumbers.INTERPOLATION]).to(average.dtype))
    return {**terms.statistics, "step": step}, made, has_gradient


def _gradients(terms: LossTerms, parameters: list[th.Tensor]) -> Sequence[th.Tensor | None]:
    if terms.parameter_gradients is not None:
        return terms.parameter_gradients
    roots, root_gradients = terms.trained()
    return th.autograd.grad(roots, parameters, root_gradients, allow_unused=True)


class CompiledSteps:
    """
    Makes gradient steps as compiled graphs, one for each shape of minibatch. Optimiser and EWMA keep their own tensors,
    which are updated in place.

    :param mode: of ``torch.compile``, ``None``: its default
    :raises CompilationError: if this version of torch cannot trace a backward pass
    """

    def __init__(self, mode: str | None) -> None:
        from torch import _dynamo  # takes seconds, and only here

        if not hasattr(_dynamo.config, "trace_autograd_ops"):
            raise CompilationError(f"torch {th.__version__} cannot compile a backward pass together with the optimiser")
        self._dynamo = _dynamo
        options: dict[str, Any] | None = None
        if mode is None:
            # Fewer of the wrapper's own operations between the kernels, which are small; dropout as without compilation
            options = {"cpp_wrapper": True, "size_asserts": False, "fallback_random": True}
        # A function of its own: torch limits the number of graphs of one.
        code = _gradient_steps.__code__.replace()
        function = types.FunctionType(code, _gradient_steps.__globals__, _gradient_steps.__name__)
        self._graphs = th.compile(function, fullgraph=True, dynamic=False, mode=mode, options=options)
        # With CUDA graphs, the next step writes its results where those of the last one are.
        self._copies = mode in ("reduce-overhead", "max-autotune")
        self._series: dict[tuple[int, int], StepSeries] = {}
        self._mode = mode
        # Number of steps made
        self.n_steps = 0

    def __reduce__(self) -> tuple[type["CompiledSteps"], tuple[str | None]]:
        return type(self), (self._mode,)  # graphs belong to a process; a copy makes its own

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Steps are made within this context, in which nothing else changes. It updates step counts when it ends."""
        try:
            with self._dynamo.config.patch(trace_autograd_ops=True):
                yield
        finally:
            self._finish()

    def _finish(self) -> None:
        for series in self._series.values():
            series.finish()
        self._series.clear()

    def series(self, optimizer: th.optim.Optimizer, **settings: Any) -> "StepSeries":
        """
        :param optimizer: for which :func:`~sb3_ppo_ewma._engine.optimizers.can_be_fused` holds
        :param settings: see :class:`StepSeries`
        :return: the steps that this optimiser makes in this training
        :raises CompilationError: if a graph cannot stand for its ``step()``
        """
        key = id(optimizer), id(settings.get("average"))
        if key not in self._series:
            self._series[key] = StepSeries(optimizer, **settings)
        return self._series[key]

    def step(
        self, series: "StepSeries", loss_terms: Callable[..., LossTerms], minibatches: list[tuple[Any, ...]]
    ) -> list[dict[str, th.Tensor]]:
        """
        Make some steps as one graph. If they cannot be compiled, nothing has changed.

        :param series: of this training
        :param loss_terms: computes the losses of a minibatch
        :param minibatches: its arguments, for each minibatch; all of one size
        :return: statistics of the minibatches, of which ``"step"`` is NaN or Inf where gradient or loss are
        :raises CompilationError: if it cannot be compiled
        """
        # That nothing changes need not be checked again at every step, only which of the graphs it is.
        checks = th.compiler.set_stance("default", skip_guard_eval_unsafe=True) if series.checked(minibatches) else None
        try:
            with checks or contextlib.nullcontext():
                numbers = series.numbers(len(minibatches))
                statistics, n_made, has_gradient = self._graphs(loss_terms, minibatches, *series.tensors, numbers)
        except (self._dynamo.exc.TorchDynamoException, self._dynamo.exc.FailOnRecompileLimitHit) as error:
            self._finish()
            raise CompilationError(str(error).strip().partition("\n")[0]) from error
        self.n_steps += len(minibatches)
        # Without a limit of the KL divergence, only a step that ends the training with an error is not made: to ask an
        # accelerator would be to wait for it.
        asks = n_made.device.type == "cpu" or "approx_kl" in statistics[0]
        series.count(int(n_made) if asks else len(minibatches), has_gradient)
        if self._copies:
            statistics = [{name: value.clone() for name, value in each.items()} for each in statistics]
        return cast(list[dict[str, th.Tensor]], statistics)


class StepSeries:
    """
    The steps of an optimiser in one training, all of which move the EWMA or none.

    :param optimizer: with one group of parameters
    :param max_grad_norm: largest norm of the gradient
    :param max_kl: largest approximate KL divergence at which a step is made
    :param average: the EWMA
    :param source: the averaged module
    :param decay: of the EWMA
    :raises CompilationError: if a graph cannot stand for the optimiser's ``step()``
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        *,
        max_grad_norm: float,
        max_kl: float,
        average: ParameterEwma | None = None,
        source: th.nn.Module | None = None,
        decay: float = 0.0,
    ) -> None:
        if not can_be_fused(optimizer) or len(optimizer.param_groups) != 1:
            raise CompilationError(f"the optimiser is {type(optimizer).__name__} with settings other than plain Adam's")
        (self._group,) = optimizer.param_groups
        self._optimizer = optimizer
        self._parameters = [parameter for parameter in self._group["params"] if parameter.requires_grad]
        self._states = [adam_state(optimizer, parameter) for parameter in self._parameters]
        self._counts = [float(state["step"]) for state in self._states]
        self._has_gradient: list[bool] = []
        self._limits = [max_grad_norm, max_kl]
        self._average, self._decay = average, decay
        self._pairs = None if average is None or source is None else average.pairs(source)
        # Total weight of the EWMA after each step
        self._weights = [1.0 if average is None else average.total_weight.item()]
        self._n_made = 0
        self._rows: list[th.Tensor] = []
        self._seen: set[tuple[int, int | None]] = set()

    @property
    def tensors(self) -> tuple[Adam, list[th.Tensor], list[th.Tensor]]:
        """
        :return: arguments of the graph
        """
        pairs = self._pairs
        return (self._adam, [], []) if pairs is None else (self._adam, pairs.averages, pairs.parameters)

    @functools.cached_property
    def _adam(self) -> Adam:
        group, states = self._group, self._states
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        return Adam(self._parameters, exp_avgs, exp_avg_sqs, group["betas"], group["eps"], group["weight_decay"])

    def checked(self, minibatches: list[tuple[Any, ...]]) -> bool:
        """
        :param minibatches: arguments of the next steps
        :return: whether there were steps with arguments of this size before
        """
        size = next((len(argument) for argument in minibatches[0] if isinstance(argument, th.Tensor)), None)
        key = len(minibatches), size
        if size is None or key in self._seen:
            return size is not None
        self._seen.add(key)
        return False

    def numbers(self, n: int) -> list[th.Tensor]:
        """
        :param n: number of steps
        :return: those of the next steps, see :class:`StepNumbers`
        """
        while len(self._rows) < self._n_made + n:
            self._rows += self._next_rows().unbind()
        return self._rows[self._n_made : self._n_made + n]

    def _next_rows(self) -> th.Tensor:
        n_made, (beta1, beta2) = len(self._rows), self._group["betas"]
        steps = np.arange(n_made + 1, n_made + 1 + _ROWS)[:, None] + np.array(self._counts)
        limits = np.tile(self._limits, (_ROWS, 1))
        for _ in range(_ROWS):
            self._weights.append(self._decay * self._weights[-1] + 1)
        interpolations = 1 / np.array(self._weights[-_ROWS:])[:, None]
        numbers = [limits, interpolations, self._group["lr"] / (1 - beta1**steps), np.sqrt(1 - beta2**steps)]
        parameter = self._parameters[0]
        return th.as_tensor(np.hstack(numbers), dtype=parameter.dtype, device=parameter.device)

    def count(self, n_made: int, has_gradient: list[bool]) -> None:
        """
        :param n_made: number of steps that were made
        :param has_gradient: for each parameter whether it had a gradient in them
        """
        if n_made == 0:
            return
        self._n_made += n_made
        self._has_gradient = has_gradient
        if self._pairs is not None:
            self._pairs.copy_buffers()

    def finish(self) -> None:
        """Write counts of steps to where optimiser and EWMA keep them."""
        has_gradient = self._has_gradient or [False] * len(self._parameters)
        for parameter, state, count, stepped in zip(
            self._parameters, self._states, self._counts, has_gradient, strict=True
        ):
            count += self._n_made * stepped
            state["step"].fill_(count)
            if count == 0:
                self._optimizer.state.pop(parameter, None)  # as torch, which has no state without a step
        if self._average is not None:
            self._average.total_weight.fill_(self._weights[self._n_made])
