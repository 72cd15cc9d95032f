"""How fast a training would be if its network were all that took time."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_ppo_ewma.rollouts import default_aux_batch_size

# Samples that go through a network together on a CPU, where larger numbers are slower
_CPU_BATCH = 64
_SECONDS = 0.5


def steps_per_second(model: Any) -> float:
    """
    The passes of an iteration alone, back to back, with observations that lie on the device: those of the rollout,
    forwards and backwards for every epoch, those of the proximal policy, and the share of an auxiliary phase. No
    environments, copies, losses, steps of an optimiser.

    :param model: PPO, PPO-EWMA, PPG or PPG-EWMA
    :return: steps of all environments
    """
    policy, proximal = model.policy, getattr(model, "proximal_policy", None)
    batch_size, n_samples = model.batch_size, model.n_steps * model.n_envs
    passes = [
        _Passes(1, policy, _outputs, model.n_envs, False),
        _Passes(model.n_epochs, policy, _outputs, batch_size, True),
    ]
    if proximal is not None:
        passes.append(_Passes(model.n_epochs, proximal, _actor, batch_size, False))
    if getattr(model, "n_aux_epochs", 0):
        aux_batch_size = model.aux_batch_size or default_aux_batch_size(n_samples)
        passes.append(_Passes(1, policy, _actor, aux_batch_size, False))
        passes.append(_Passes(model.n_aux_epochs, policy, _outputs, aux_batch_size, True))
    return 1 / sum(each.number * _seconds_per_sample(each) for each in passes)


class _Passes(NamedTuple):
    """
    Of all samples of an iteration.

    :param number: how often
    :param policy: network
    :param function: of it and observations, from which a scalar comes
    :param batch_size: samples that go through it together
    :param has_gradient: whether backwards too
    """

    number: int
    policy: Any
    function: Callable[[Any, th.Tensor], th.Tensor]
    batch_size: int
    has_gradient: bool


def _outputs(policy: Any, observations: th.Tensor) -> th.Tensor:
    features = policy.extract_features(observations)
    for_actor, for_critic = features if isinstance(features, tuple) else (features, features)
    values = policy.value_net(policy.mlp_extractor.forward_critic(for_critic))
    outputs: th.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(for_actor)).mean() + values.mean()
    return outputs


def _actor(policy: Any, observations: th.Tensor) -> th.Tensor:
    features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
    outputs: th.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(features)).mean()
    return outputs


def _seconds_per_sample(passes: _Passes) -> float:
    """
    :param passes: of some kind
    :return: time that one takes for a sample, the median of repetitions for half a second
    """
    device, space = passes.policy.device, passes.policy.observation_space
    n = min(passes.batch_size, _CPU_BATCH) if device.type == "cpu" else passes.batch_size
    observations = th.randint(256, (n, *space.shape), dtype=th.uint8, device=device)

    def seconds() -> float:
        _synchronize(device)
        began = time.perf_counter()
        with th.set_grad_enabled(passes.has_gradient):
            result = passes.function(passes.policy, observations)
        if passes.has_gradient:
            passes.policy.zero_grad()
            result.backward()
        _synchronize(device)
        return time.perf_counter() - began

    seconds()  # the first one is slower
    measured = [seconds()]
    while sum(measured) < _SECONDS:
        measured.append(seconds())
    return statistics.median(measured) / n


def _synchronize(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)
