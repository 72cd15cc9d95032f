"""What follows the policy when its parameters are replaced or changed from outside."""

from typing import Any, cast

import torch as th
from stable_baselines3.common.type_aliases import Schedule

from sb3_ppo_ewma._arguments import warn_caller
from sb3_ppo_ewma.policies import uncompiled


def follow_policy(model: Any) -> None:
    """
    EWMA and further optimisers follow the policy: where its parameters were replaced by other objects, or the
    policy's optimiser by one of other parameters, they start afresh; so does the EWMA where somebody else has
    changed values since the last training.

    :param model: an algorithm with the parts of ``EwmaMixin``
    """
    restarted = []
    average, policy = model.policy_ewma, uncompiled(model.policy)
    if average is not None and not (average.follows(policy) and average.is_up_to_date()):
        if average.total_weight > 1:
            restarted.append("policy_ewma")
        average.follow(policy)
    optimized = [id(each) for group in model.policy.optimizer.param_groups for each in group["params"]]
    for name, schedule in model._further_optimizers.items():
        optimizer: th.optim.Optimizer | None = getattr(model, name)
        if optimizer is None or [id(p) for group in optimizer.param_groups for p in group["params"]] == optimized:
            continue
        setattr(model, name, make_optimizer(model.policy, getattr(model, schedule)))
        if optimizer.state:
            restarted.append(name)
    if restarted and not model._has_warned_of_restart:
        model._has_warned_of_restart = True
        warn_caller(f"The policy's parameters were changed outside of training: {', '.join(restarted)} started afresh.")


def make_optimizer(policy: Any, schedule: Schedule) -> th.optim.Optimizer:
    """
    :param policy: a policy
    :param schedule: schedule of the learning rate
    :return: a further optimiser, built as SB3 builds the policy's own, for the parameters that that one has
    """
    parameters = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    return cast(th.optim.Optimizer, policy.optimizer_class(parameters, lr=schedule(1), **policy.optimizer_kwargs))
