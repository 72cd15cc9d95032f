"""The reference's losses and gradients with a faster update: clipping and Adam in one kernel, nothing read back."""

import math
import operator
from typing import Any, ClassVar, cast

import torch as th
from torch import nn
from torch.optim import optimizer as torch_optimizer

from sb3_ppo_ewma._engine.iteration import Iteration
from sb3_ppo_ewma._engine.recognition import replaced_method
from sb3_ppo_ewma._engine.reference import ReferenceEngine
from sb3_ppo_ewma.evaluation import Minibatch, averaged_parameters
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.training_log import STEP

# Moments of Adam below these move no parameter by a digit, unless epsilon is smaller still.
_NEGLIGIBLE = {"exp_avg": 1e-25, "exp_avg_sq": 1e-36}
_SMALLEST_EPS = 1e-10
# Gradient steps after which they are cleared at the end of an epoch; at the end of a training they always are
_CLEARED_EVERY = 128
_CLIP_GRAD_NORM = nn.utils.clip_grad_norm_


def _adam_step() -> Any:
    step: Any = th.optim.Adam.step
    return step.__wrapped__ if getattr(step, "hooked", None) else step  # torch wraps it when it is first used


_ADAM_STEP = _adam_step()
_UNUSUAL_SETTINGS = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


class FusedEngine(ReferenceEngine):
    """
    The reference engine with torch's fused Adam, for optimisers that :func:`unusual_optimizer` does not object to.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "fused"

    def __init__(self, iteration: Iteration) -> None:
        super().__init__(iteration)
        self.parameters: list[th.Tensor] = list(iteration.policy.parameters())
        self._fused: dict[int, FusedAdam] = {}
        self._foreign: dict[int, list[th.Tensor]] = {}
        self._optimizers: dict[int, th.optim.Optimizer] = {}
        self._skips_critic = iteration.evaluation.may_skip_critic(iteration.policy)
        self._divisor = th.ones((), dtype=th.float64, device="cpu")
        self.n_steps_since_clearing = 0

    def log_prob_under(self, average: ParameterEwma, minibatch: Minibatch) -> th.Tensor:
        iteration = self.iteration
        if not self._skips_critic:
            return super().log_prob_under(average, minibatch)
        with averaged_parameters(iteration.policy, average):
            return iteration.evaluation.log_prob(iteration.policy, minibatch.samples, minibatch.actions)

    @th.no_grad()
    def update(
        self,
        loss: th.Tensor,
        statistics: dict[str, th.Tensor],
        optimizer: th.optim.Optimizer,
        average: ParameterEwma | None,
    ) -> bool:
        is_replaced = (
            id(optimizer) not in self._fused and unusual_optimizer(optimizer, self.iteration.policy) is not None
        )
        # Gradients of parameters that are not the policy's are not clipped.
        if is_replaced or any(parameter.grad is not None for parameter in self._foreign_parameters(optimizer)):
            with th.enable_grad():
                return super().update(loss, statistics, optimizer, average)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        statistics[STEP] = checked = self.clip_and_step(gradients, loss, optimizer)
        self.iteration.statistics.add(statistics)
        if not self.was_made(checked):
            return False
        if average is not None and self.iteration.prox_decay is not None:
            average.update(self.iteration.prox_decay)
        return True

    def clip_and_step(self, gradients: list[th.Tensor], loss: th.Tensor, optimizer: th.optim.Optimizer) -> th.Tensor:
        """
        Step with clipped gradients, where they and the loss are finite.

        :param gradients: all gradients
        :param loss: detached loss, shape ()
        :param optimizer: optimiser that makes the step
        :return: norm of the gradients before clipping plus loss, shape ()
        """
        iteration = self.iteration
        self.n_steps_since_clearing += 1
        if iteration.process_group is not None:
            iteration.process_group.average([*gradients, loss := loss.clone()])
        norm = gradient_norm(gradients)
        checked = norm + loss
        fused = self._fused_adam(optimizer)
        # SB3's factor is max/(norm + 1e-6), at most 1; the kernel divides.
        if checked.device.type != "cpu":
            fused.step(th.clamp((norm + 1e-6) / iteration.max_grad_norm, min=1.0), th.isfinite(checked))
        elif math.isfinite(checked):
            limit, value = iteration.max_grad_norm, norm.item() + 1e-6
            fused.step(None if value <= limit else self._divisor.fill_(value / limit if limit > 0 else math.inf))
        return checked

    def was_made(self, checked: th.Tensor) -> bool:
        """
        :param checked: from :meth:`clip_and_step`
        :return: whether the step was made; on an accelerator True without waiting for it, where the training goes on
            with the next minibatch
        """
        return checked.device.type != "cpu" or math.isfinite(checked)

    def _foreign_parameters(self, optimizer: th.optim.Optimizer) -> list[th.Tensor]:
        """
        :param optimizer: any optimiser
        :return: its parameters that are not the policy's
        """
        if id(optimizer) not in self._foreign:
            own = set(map(id, self.parameters))
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._foreign[id(optimizer)] = [parameter for parameter in parameters if id(parameter) not in own]
        return self._foreign[id(optimizer)]

    def _fused_adam(self, optimizer: th.optim.Optimizer) -> "FusedAdam":
        if id(optimizer) not in self._fused:
            self._fused[id(optimizer)] = FusedAdam(optimizer)
            self.remember_optimizer(optimizer)
        return self._fused[id(optimizer)]

    def remember_optimizer(self, optimizer: th.optim.Optimizer) -> None:
        """
        :param optimizer: an optimiser whose negligible moments are cleared now and then
        """
        self._optimizers[id(optimizer)] = optimizer

    def end_epoch(self) -> None:
        if self.n_steps_since_clearing >= _CLEARED_EVERY:
            self.clear_moments()

    def synchronize(self) -> None:
        self.clear_moments()

    def clear_moments(self) -> None:
        """Clear negligible moments of all optimisers that made a step."""
        self.n_steps_since_clearing = 0
        for optimizer in self._optimizers.values():
            clear_negligible_moments(optimizer)


class FusedAdam:
    """
    ``torch.optim.Adam.step()`` with the kernel and the state of ``fused=True``, but without the overhead of the method,
    which is several times the kernel's time for a small network. The state is torch's own, so that the optimiser can
    be saved, loaded and stepped in the ordinary way at any time.

    :param optimizer: an Adam with ordinary settings, see :func:`unusual_adam`
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        self._groups = [_FusedGroup(optimizer, group) for group in optimizer.param_groups]

    def step(self, divisor: th.Tensor | None, made: th.Tensor | None = None) -> None:
        """
        Make a step. To be called under ``no_grad``.

        :param divisor: number to divide the gradients by, shape (); ``None``: 1
        :param made: bool of shape (), ``False``: leave parameters and state as they are; ``None``: ``True``
        """
        made = None if made is None else made.float()
        for group in self._groups:
            group.step(divisor, made)


class _FusedGroup:
    def __init__(self, optimizer: th.optim.Optimizer, group: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._group = group
        self._parameters: list[th.Tensor] = []
        self._states: list[dict[str, th.Tensor]] = []
        self._tensors: tuple[list[th.Tensor], ...] = ()

    def step(self, divisor: th.Tensor | None, made: th.Tensor | None) -> None:
        parameters = [parameter for parameter in self._group["params"] if parameter.grad is not None]
        if not parameters:
            return
        known = self._optimizer.state
        if (
            len(parameters) != len(self._parameters)
            or any(map(operator.is_not, parameters, self._parameters))
            or any(known.get(parameter) is not state for parameter, state in zip(parameters, self._states, strict=True))
        ):
            states = [adam_state(self._optimizer, parameter) for parameter in parameters]
            self._parameters, self._states = parameters, states
            self._tensors = tuple([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        exp_avgs, exp_avg_sqs, steps = self._tensors
        gradients = [cast(th.Tensor, parameter.grad) for parameter in parameters]
        if divisor is not None and gradients[0].dtype == th.float64:
            th._foreach_div_(gradients, divisor)  # the kernel takes the divisor in single precision
            divisor = None
        beta1, beta2 = self._group["betas"]
        th._foreach_add_(steps, 1 if made is None else [made] * len(steps))
        th._fused_adam_(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=self._group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=self._group["weight_decay"],
            eps=self._group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if divisor is None else divisor.float(),
            found_inf=None if made is None else 1 - made,
        )


@th.no_grad()
def clear_negligible_moments(optimizer: th.optim.Optimizer) -> None:
    """
    Set moments of Adam to 0 that have decayed to nothing beside its epsilon. Where gradients have become 0, of units
    that died and inputs that are rarely seen, they would end as denormal numbers and stay there, with which a CPU takes
    many times as long.

    :param optimizer: an Adam
    """
    for group in optimizer.param_groups:
        if group["eps"] < _SMALLEST_EPS:
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and state["exp_avg"].device.type == "cpu":
                for name, limit in _NEGLIGIBLE.items():
                    state[name].masked_fill_(state[name].abs() < limit, 0.0)


def gradient_norm(gradients: list[th.Tensor]) -> th.Tensor:
    """
    :param gradients: tensors on one device
    :return: Euclidean norm of all of them together, shape (); of several by the operations of ``clip_grad_norm_``
    """
    norms = gradients[0] if len(gradients) == 1 else th.stack(th._foreach_norm(gradients))
    norm: th.Tensor = th.linalg.vector_norm(norms)
    return norm


def unusual_optimizer(optimizer: th.optim.Optimizer, policy: nn.Module) -> str | None:
    """
    :param optimizer: any optimiser
    :param policy: the policy it trains
    :return: why :class:`FusedEngine` cannot make its steps, ``None`` if it can
    """
    replaced = replaced_method(optimizer)
    if replaced is not None:
        return f"{replaced} of the optimizer was replaced"
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(parameter.requires_grad and id(parameter) not in trained for parameter in policy.parameters()):
        return "the optimizer does not have all parameters of the policy"
    return unusual_adam(optimizer)


def unusual_adam(optimizer: th.optim.Optimizer) -> str | None:
    """
    :param optimizer: any optimiser
    :return: why :class:`FusedAdam` cannot take the place of its ``step()``, ``None`` if it can
    """
    if nn.utils.clip_grad_norm_ is not _CLIP_GRAD_NORM or _adam_step() is not _ADAM_STEP:
        return "torch.nn.utils.clip_grad_norm_ or torch.optim.Adam.step was replaced"
    if type(optimizer) is not th.optim.Adam:
        return f"the optimizer is {type(optimizer).__name__}, not torch.optim.Adam"
    if not hasattr(th, "_fused_adam_"):
        return f"torch {th.__version__} has no fused Adam"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return "torch has global hooks of optimizers"
    for group in optimizer.param_groups:
        unusual = [name for name in _UNUSUAL_SETTINGS if group.get(name)]
        if (
            unusual
            or not isinstance(group["lr"], float)
            or not all(isinstance(beta, float | int) for beta in group["betas"])
        ):
            return f"the optimizer has {', '.join(unusual) or 'learning rate or betas that are not plain numbers'}"
        if len({(parameter.device, parameter.dtype) for parameter in group["params"]}) > 1:
            return "the optimizer's parameters differ in dtype or device"
        if not all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"]):
            return "the optimizer has parameters that fused Adam does not support"
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and state["exp_avg"].stride() != parameter.stride():
                return "a parameter's memory layout changed since the optimizer made its state"
    return None


def adam_state(optimizer: th.optim.Optimizer, parameter: th.Tensor) -> dict[str, th.Tensor]:
    """
    :param optimizer: an Adam
    :param parameter: one of its parameters
    :return: its state, made if there is none
    """
    state: dict[str, th.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = th.zeros((), dtype=th.float32, device=parameter.device)
        state["exp_avg"] = th.zeros_like(parameter, memory_format=th.preserve_format)
        state["exp_avg_sq"] = th.zeros_like(parameter, memory_format=th.preserve_format)
    elif state["step"].device != parameter.device:  # where torch keeps it for Adam that is not fused
        state["step"] = state["step"].to(parameter.device)
    return state
