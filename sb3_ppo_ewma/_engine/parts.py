"""
Minibatches of images in parts, whose gradients are added up. Convolutions are as fast on parts; what is between them is
faster: it fits into the processor's caches, and memory of this size is used again instead of being fetched from the
system for every operation.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn

from sb3_ppo_ewma._engine import forward
from sb3_ppo_ewma.losses import LossTerms
from sb3_ppo_ewma.networks import ImpalaCNN, ResidualBlock, SmallGridCNN
from sb3_ppo_ewma.policies import DetachedCriticMlpExtractor, Trunk

# Bytes of the largest output of a layer. Of 4, 8, 16 and 32 MiB, 8 was best for both Nature CNN and IMPALA's network.
_LARGEST = 2**23

# Modules that compute each sample by itself
_CONTAINERS = (
    *(nn.Sequential, nn.ModuleDict, NatureCNN, CombinedExtractor, FlattenExtractor, MlpExtractor),
    *(ImpalaCNN, ResidualBlock, SmallGridCNN, Trunk, DetachedCriticMlpExtractor),
)
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus)
_LAYERS = (nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Identity, *_ACTIVATIONS)


def can_be_parted(policy: Any) -> bool:
    """
    :param policy: for which :func:`~sb3_ppo_ewma._engine.forward.is_standard` holds
    :return: whether parts are faster: it has convolutions; and whether they change nothing: its results for a sample
        depend on this sample only, and nothing looks on
    """
    modules = [module for module in policy.modules() if module is not policy]
    return (
        policy.device.type == "cpu"
        and any(type(module) is nn.Conv2d for module in modules)
        and all(type(module) in (*_CONTAINERS, *_LAYERS) for module in modules)
        and not forward.has_hooks(policy)
    )


@th.no_grad()
def part_size(policy: forward.StandardPolicy, observations: Any) -> int:
    """
    :param policy: for which :func:`can_be_parted` holds
    :param observations: at least one
    :return: number of samples in a part
    """
    largest = 1

    def measure(module: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal largest
        largest = max(largest, outputs.numel() * outputs.element_size())

    extractor = policy.policy.pi_features_extractor
    handles = [module.register_forward_hook(measure) for module in extractor.modules()]
    try:
        policy.action_outputs(_first(observations))
    finally:
        for handle in handles:
            handle.remove()
    return max(1, _LARGEST // largest)


def _first(observations: Any) -> Any:
    return {key: part[:1] for key, part in observations.items()} if isinstance(observations, dict) else observations[:1]


def split(columns: Any, n_samples: int, size: int | None) -> Iterator[tuple[float, Any]]:
    """
    :param columns: tensors, dictionaries, lists and named or other tuples of them, (n_samples, ...) each
    :param n_samples: in all
    :param size: of a part, at most; ``None``: one part
    :return: parts of about one size, each with its share of the samples
    """
    if size is None or n_samples <= size:
        yield 1.0, columns
        return
    size = math.ceil(n_samples / math.ceil(n_samples / size))
    for start in range(0, n_samples, size):
        rows = slice(start, min(start + size, n_samples))
        yield (rows.stop - rows.start) / n_samples, _rows(columns, rows)


def _rows(columns: Any, rows: slice) -> Any:
    if isinstance(columns, th.Tensor):
        return columns[rows]
    if isinstance(columns, dict):
        return {key: _rows(value, rows) for key, value in columns.items()}
    parts = [_rows(value, rows) for value in columns]
    return type(columns)(*parts) if hasattr(columns, "_fields") else type(columns)(parts)


def accumulated(parts: Iterable[tuple[float, LossTerms]]) -> LossTerms:
    """
    Add the gradients of parts of a minibatch to those in the parameters.

    :param parts: share of the samples, means over these; they are asked for one after the other
    :return: of all together; if there is but one, it is returned as it is
    """
    shares: list[float] = []
    terms: list[LossTerms] = []
    for share, part in parts:
        if share == 1:
            return part
        roots, gradients = part.trained()
        th.autograd.backward(roots, [share * gradient for gradient in gradients])
        shares.append(share)
        # Without what would keep the graph
        terms.append(LossTerms([], [], part.loss, part.statistics))

    def mean(values: list[th.Tensor]) -> th.Tensor:
        if values[0].dim() > 0:
            return th.cat(values)
        return th.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    statistics = {name: mean([each.statistics[name] for each in terms]) for name in terms[0].statistics}
    return LossTerms([], [], mean([each.loss for each in terms]), statistics)
