"""What follows the policy when its parameters are replaced or changed from outside."""

from typing import Any

import torch as th

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
        setattr(model, name, model._make_optimizer(getattr(model, schedule)))
        if optimizer.state:
            restarted.append(name)
    if restarted and not model._has_warned_of_restart:
        model._has_warned_of_restart = True
        warn_caller(f"The policy's parameters were changed outside of training: {', '.join(restarted)} started afresh.")
