"""One step of an optimiser with clipped gradients, without waiting for the device."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_ppo_ewma._parallel.process_group import ProcessGroup

# Counted by the optimiser itself, so that a training that was saved and loaded does the same
_FLUSH_EVERY = 128
# What a step makes of such moments is beyond the last digit of any parameter.
_NOTHING = {"exp_avg": 1e-25, "exp_avg_sq": 1e-36}
_SMALLEST_EPS = 1e-10


class ClippedSteps:
    """
    Clips gradients by their norm and steps. Where the norm or the loss is NaN or Inf, parameters and optimiser stay as
    they are.

    :param optimizer: any optimiser
    :param parameters: whose gradients are clipped
    :param max_grad_norm: largest norm of all gradients together
    :param fused: step with :class:`FusedAdam`; the optimiser must be one that :func:`can_be_fused`
    :param ranks: processes over which gradients and losses are averaged first; ``None``: this one is alone
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        parameters: Sequence[th.Tensor],
        max_grad_norm: float,
        fused: bool,
        ranks: ProcessGroup | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._max_grad_norm = max_grad_norm
        self._fused = FusedAdam(optimizer) if fused else None
        self._ranks = ranks
        self._divisor = th.ones((), device="cpu")

    @th.no_grad()
    def step(self, loss: th.Tensor) -> th.Tensor:
        """
        :param loss: shape ()
        :return: norm of the gradients before clipping plus loss, shape (), NaN or Inf where no step was made
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._ranks is not None:
            loss = loss.clone()
            self._ranks.average([*gradients, loss])
        norm = gradient_norm(gradients)
        checked = norm + loss
        # SB3's factor is max/(norm + 1e-6), at most 1; the kernel divides.
        if self._fused is not None and checked.device.type != "cpu":
            self._fused.step(th.clamp((norm + 1e-6) / self._max_grad_norm, min=1.0), th.isfinite(checked))
        elif not math.isfinite(checked):
            pass
        elif self._fused is not None:
            limit, value = self._max_grad_norm, norm.item() + 1e-6
            self._fused.step(None if value <= limit else self._divisor.fill_(value / limit if limit > 0 else math.inf))
        else:
            with th.enable_grad():
                th.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
                self._optimizer.step()
        return checked

    def flush_moments(self, n_steps: int) -> None:
        """
        See :func:`flush_moments`; moments of an optimiser that is not fused stay what torch makes of them.

        :param n_steps: made since the last call
        """
        if self._fused is not None:
            flush_moments(self._optimizer, n_steps)


def gradient_norm(gradients: list[th.Tensor]) -> th.Tensor:
    """
    :param gradients: on one device
    :return: Euclidean norm of all of them together, shape (); of several by the operations of ``clip_grad_norm_``
    """
    norms = gradients if len(gradients) == 1 else [th.stack(th._foreach_norm(gradients))]
    norm: th.Tensor = th.linalg.vector_norm(norms[0])
    return norm


def can_be_fused(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: any optimiser
    :return: whether :class:`FusedAdam` may take the place of its ``step()``
    """
    return (
        type(optimizer) is th.optim.Adam
        and hasattr(th, "_fused_adam_")
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        and all(_is_plain(group) for group in optimizer.param_groups)
    )


def _is_plain(group: dict[str, Any]) -> bool:
    unusual = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
    return (
        not any(group.get(name) for name in unusual)
        and isinstance(group["lr"], float)
        and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])
    )


class FusedAdam:
    """
    ``torch.optim.Adam.step()`` with the kernel and the state of ``fused=True``, but without the overhead of the method,
    which is several times the kernel's time for a small network. The state is torch's own, so that the optimiser can
    be saved, loaded and stepped in the ordinary way at any time.

    :param optimizer: for which :func:`can_be_fused` holds
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        self._groups = [_FusedGroup(optimizer, group) for group in optimizer.param_groups]

    def step(self, divisor: th.Tensor | None, made: th.Tensor | None = None) -> None:
        """
        To be called without gradients.

        :param divisor: of the gradients, shape (); ``None``: 1
        :param made: bool of shape (), ``False``: leave parameters and state as they are; ``None``: ``True``
        """
        divisor = None if divisor is None else divisor.float()
        made = None if made is None else made.float()
        for group in self._groups:
            group.step(divisor, made)


class _FusedGroup:
    def __init__(self, optimizer: th.optim.Optimizer, group: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._group = group
        self._parameters: list[th.Tensor] = []
        self._tensors: tuple[list[th.Tensor], ...] = ()

    def step(self, divisor: th.Tensor | None, made: th.Tensor | None) -> None:
        parameters = [parameter for parameter in self._group["params"] if parameter.grad is not None]
        if not parameters:
            return
        if len(parameters) != len(self._parameters) or any(map(operator.is_not, parameters, self._parameters)):
            states = [adam_state(self._optimizer, parameter) for parameter in parameters]
            self._parameters = parameters
            self._tensors = tuple([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        exp_avgs, exp_avg_sqs, steps = self._tensors
        beta1, beta2 = self._group["betas"]
        th._foreach_add_(steps, 1 if made is None else [made] * len(steps))
        th._fused_adam_(
            parameters,
            [parameter.grad for parameter in parameters],
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
            grad_scale=divisor,
            found_inf=None if made is None else 1 - made,
        )


@th.no_grad()
def flush_moments(optimizer: th.optim.Optimizer, n_steps: int) -> None:
    """
    Every 128 steps, set moments of Adam to 0 that have decayed to nothing beside its epsilon. Where gradients have
    become 0, of units that died and inputs that are rarely seen, they would end as denormal numbers and stay there,
    with which a CPU takes many times as long.

    :param optimizer: for which :func:`can_be_fused` holds
    :param n_steps: made since the last call
    """
    for group in optimizer.param_groups:
        states = (state for parameter in group["params"] if (state := optimizer.state.get(parameter)))
        first = next(states, None)
        if first is None or first["exp_avg"].device.type != "cpu" or group["eps"] < _SMALLEST_EPS:
            continue
        count = int(first["step"].item())
        if count // _FLUSH_EVERY == (count - n_steps) // _FLUSH_EVERY:
            continue
        for moments, limit in ((state[name], limit) for state in (first, *states) for name, limit in _NOTHING.items()):
            moments.masked_fill_(moments.abs() < limit, 0.0)


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
