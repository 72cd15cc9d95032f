"""Features extractors for images and grids, and the initialisation of PPG's networks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from torch import nn
from torch.nn import functional as F

from sb3_ppo_ewma._arguments import check_integer, check_number

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)


def normalize_fan_in(layer: LayerT, scale: float = 1.0) -> LayerT:
    """
    Scale the weight vector of every output unit to the same Euclidean norm and set the biases to zero, in place: the
    initialisation of PPG's networks. Unlike an orthogonal one it keeps the directions that the layer was built with.

    Source: code of Cobbe et al. 2020, https://github.com/openai/phasic-policy-gradient

    :param layer: linear or convolutional layer
    :param scale: norm of the weights of each output unit, over all its inputs (and the kernel); a vector of zeros,
        which has no direction, stays zero
    :return: ``layer``
    :raises ValueError: if ``scale`` is negative, infinite or NaN
    """
    check_number("scale", scale, 0)
    with th.no_grad():
        directions = F.normalize(layer.weight.flatten(1))  # (outputs, inputs x kernel)
        layer.weight.copy_(scale * directions.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def is_channels_last(observation_space: spaces.Box) -> bool:
    """
    Guess the order of the axes of an image or a grid. The first rule that applies decides:

    1. Two neighbouring axes have the same size and the third, first or last, another: the third has the channels. It
       may be the longest (stacked frames of a small grid).
    2. All sizes differ and the first or the last axis is the smallest: the smallest has the channels, as in SB3.
    3. Otherwise, for instance 10x10x10: images (uint8 in [0, 255]) are channel-first, as SB3 passes them to the policy;
       everything else is channel-last, as in MinAtar.

    :param observation_space: space with three axes, as the policy sees it, after SB3 has moved the channels of images
        to the front
    :return: ``True`` for (height, width, channels), ``False`` for (channels, height, width)
    """
    first, middle, last = observation_space.shape
    if first == middle != last:
        return True
    if middle == last != first:
        return False
    smallest = min(first, middle, last)
    if first != last and middle != smallest:
        return last == smallest
    return not is_image_space(observation_space)


class _ConvolutionalExtractor(BaseFeaturesExtractor):
    """
    Base class of this module's extractors: argument checks, order of the axes and forward pass. Subclasses set ``cnn``,
    which ends with ``nn.Flatten``, and ``linear``.

    :param observation_space: space of an image or a grid, a ``Box`` with three axes
    :param features_dim: number of features extracted
    :param channels_last: order of the axes; ``None`` to guess it
    :param mixed_precision: whether to compute in bfloat16
    """

    cnn: nn.Sequential
    linear: nn.Sequential

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int,
        channels_last: bool | None,
        mixed_precision: bool,
    ) -> None:
        name = type(self).__name__
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
            raise ValueError(f"{name} needs an observation_space that is a Box with 3 axes, got {observation_space}")
        if min(observation_space.shape) < 1:
            raise ValueError(f"{name} needs an observation_space without empty axes, got {observation_space}")
        check_integer("features_dim", features_dim, minimum=1)
        if channels_last is not None and not isinstance(channels_last, bool):
            raise TypeError(f"channels_last must be True, False or None, got {channels_last!r}")
        if not isinstance(mixed_precision, bool):
            raise TypeError(f"mixed_precision must be True or False, got {mixed_precision!r}")
        super().__init__(observation_space, features_dim)
        self.mixed_precision = mixed_precision
        self.channels_last = is_channels_last(observation_space) if channels_last is None else channels_last
        shape = observation_space.shape
        self.image_shape = (shape[2], *shape[:2]) if self.channels_last else shape  # (channels, height, width)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, three axes in the order of the observation space), in the parameters' dtype
        :return: (batch, features_dim)
        """
        if self.channels_last:
            observations = observations.permute(0, 3, 1, 2)
        # The channels_last memory format speeds up convolution and above all pooling on a CPU, and suits tensor cores.
        device = observations.device.type
        use_channels_last = device == "cpu" or self.mixed_precision
        memory_format = th.channels_last if use_channels_last else th.contiguous_format
        observations = observations.contiguous(memory_format=memory_format)
        if not self.mixed_precision:
            return cast(th.Tensor, self.linear(self.cnn(observations)))
        with th.autocast(device, dtype=th.bfloat16):
            features = self.linear(self.cnn(observations))
        return cast(th.Tensor, features.to(observations.dtype))


class ResidualBlock(nn.Module):
    """
    Adds the output of two convolutions to the input.

    :param channels: number of channels of input and output
    :param scale: norm of the initial weights of each filter
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            normalize_fan_in(nn.Conv2d(channels, channels, kernel_size=3, padding=1), scale),
            nn.ReLU(),
            normalize_fan_in(nn.Conv2d(channels, channels, kernel_size=3, padding=1), scale),
        )

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: (batch, channels, height, width)
        :return: (batch, channels, height, width)
        """
        output: th.Tensor = images + self.residual(images)
        return output


class ImpalaCNN(_ConvolutionalExtractor):
    """
    Residual network of IMPALA, with the initialisation of PPG's released code.

    Each stage is a 3x3 convolution, a 3x3 max-pooling with stride 2 and ``n_blocks`` residual blocks of two 3x3
    convolutions; a dense layer follows. A stage halves height and width, rounded up. Images may be as small as 1x1,
    since every layer is padded.

    The initial weights of a unit have norm 1 in the first convolution of a stage, 1.4 in the dense layer and
    (number of blocks in all stages)^(-1/4) in the blocks; biases start at zero.

    Two defaults of SB3's ``ActorCriticPolicy`` change this network: ``ortho_init=True`` **overwrites its
    initialisation** with orthogonal weights, and ``net_arch`` adds two layers of 64 units after every extractor but
    ``NatureCNN``. ``policy_kwargs=dict(features_extractor_class=ImpalaCNN, ortho_init=False, net_arch=[])`` builds the
    network described here.

    SB3's preprocessing divides images by 255 (``normalize_images=True``). Spaces of any dtype and range are accepted,
    so there is no ``normalized_image`` as in ``NatureCNN``.

    Paper: Espeholt et al. 2018, https://arxiv.org/abs/1802.01561, figure 3 (without the LSTM)
    Code: https://github.com/openai/phasic-policy-gradient

    :param observation_space: space of an image or a grid, a ``Box`` with three axes
    :param features_dim: number of features extracted
    :param channels: number of filters in each stage
    :param n_blocks: number of residual blocks per stage
    :param channels_last: ``True`` for (height, width, channels), ``False`` for (channels, height, width), after SB3 has
        moved the channels of images to the front; ``None`` to guess with :func:`is_channels_last`
    :param mixed_precision: whether to compute convolutions and dense layer in bfloat16 with ``torch.autocast``, faster
        on hardware that supports it; parameters, gradients and features keep their dtype
    :raises ValueError: if the space is not a ``Box`` with three axes, or a number is out of range
    :raises TypeError: if a parameter has the wrong type
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 256,
        channels: Sequence[int] = (16, 32, 32),
        n_blocks: int = 2,
        channels_last: bool | None = None,
        mixed_precision: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim, channels_last, mixed_precision)
        channels = _checked_channels(channels)
        check_integer("n_blocks", n_blocks, minimum=0)
        # The blocks' outputs add up, and each passes through two convolutions: hence two square roots.
        block_scale = (len(channels) * max(n_blocks, 1)) ** -0.25
        in_channels, height, width = self.image_shape
        layers: list[nn.Module] = []
        for out_channels in channels:
            layers.append(normalize_fan_in(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)))
            layers.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
            layers.extend(ResidualBlock(out_channels, block_scale) for _ in range(n_blocks))
            in_channels, height, width = out_channels, (height + 1) // 2, (width + 1) // 2
        self.cnn = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
        dense = nn.Linear(in_channels * height * width, features_dim)
        self.linear = nn.Sequential(normalize_fan_in(dense, scale=1.4), nn.ReLU())


class SmallGridCNN(_ConvolutionalExtractor):
    """
    Small network for grids in which every cell counts, such as MinAtar's 10x10 and MiniGrid's 7x7: convolutions with
    stride 1 and without padding or pooling, then a dense layer.

    The defaults are the hidden layers of MinAtar's DQN: one 3x3 convolution with 16 filters and 128 units, all ReLU.
    The initial weights are PyTorch's, or orthogonal with SB3's ``ortho_init=True``. SB3's ``net_arch`` adds two layers
    of 64 units, unless it is ``[]``.

    SB3 divides observations by 255 if their space has the dtype and the bounds of an image. MiniGrid's has, although
    its values are at most 10: ``policy_kwargs=dict(normalize_images=False)`` keeps them.

    Paper: Young and Tian 2019, https://arxiv.org/abs/1903.03176
    Code: https://github.com/kenjyoung/MinAtar

    :param observation_space: space of a grid or an image, a ``Box`` with three axes
    :param features_dim: number of features extracted
    :param channels: number of filters in each convolution
    :param kernel_size: height and width of the filters
    :param channels_last: ``True`` for (height, width, channels), ``False`` for (channels, height, width), after SB3 has
        moved the channels of images to the front; ``None`` to guess with :func:`is_channels_last`
    :param mixed_precision: whether to compute convolutions and dense layer in bfloat16 with ``torch.autocast``, faster
        on hardware that supports it; parameters, gradients and features keep their dtype
    :raises ValueError: if the space is not a ``Box`` with three axes, the grid is too small for the convolutions, or a
        number is out of range
    :raises TypeError: if a parameter has the wrong type
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 128,
        channels: Sequence[int] = (16,),
        kernel_size: int = 3,
        channels_last: bool | None = None,
        mixed_precision: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim, channels_last, mixed_precision)
        channels = _checked_channels(channels)
        check_integer("kernel_size", kernel_size, minimum=1)
        in_channels, height, width = self.image_shape
        margin = len(channels) * (kernel_size - 1)
        if min(height, width) <= margin:
            raise ValueError(
                f"observation_space must be a grid of at least {margin + 1}x{margin + 1} for channels={channels} and "
                f"kernel_size={kernel_size}, got {height}x{width} (shape {observation_space.shape}, "
                f"channels_last={self.channels_last})"
            )
        layers: list[nn.Module] = []
        for out_channels in channels:
            layers += [nn.Conv2d(in_channels, out_channels, kernel_size), nn.ReLU()]
            in_channels = out_channels
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        dense = nn.Linear(in_channels * (height - margin) * (width - margin), features_dim)
        self.linear = nn.Sequential(dense, nn.ReLU())


def _checked_channels(channels: object) -> tuple[int, ...]:
    """
    :param channels: number of filters in each stage or convolution
    :return: these numbers as a tuple
    :raises ValueError: if ``channels`` is empty or a number is below 1
    :raises TypeError: if ``channels`` is not a sequence of integers
    """
    if not isinstance(channels, Sequence):
        raise TypeError(f"channels must be a sequence of integers >= 1, got {channels!r}")
    if not channels:
        raise ValueError(f"channels must have at least one number, got {channels!r}")
    for number in channels:
        check_integer("every number in channels", number, minimum=1)
    return tuple(int(number) for number in channels)


FEATURES_EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {
    extractor.__name__: extractor
    for extractor in (FlattenExtractor, NatureCNN, CombinedExtractor, ImpalaCNN, SmallGridCNN)
}


def features_extractor_class(
    name_or_class: str | Callable[..., BaseFeaturesExtractor],
) -> type[BaseFeaturesExtractor]:
    """
    Look up a features extractor by its name, for configuration files and command lines.

    :param name_or_class: a name in ``FEATURES_EXTRACTORS``; a class or another callable that builds an extractor is
        returned unchanged, since SB3 accepts both
    :return: the class
    :raises ValueError: if no extractor has this name
    :raises TypeError: if ``name_or_class`` is neither a name nor callable
    """
    if isinstance(name_or_class, str):
        if name_or_class not in FEATURES_EXTRACTORS:
            names = ", ".join(FEATURES_EXTRACTORS)
            raise ValueError(f"features_extractor_class must be a class or one of {names}, got {name_or_class!r}")
        return FEATURES_EXTRACTORS[name_or_class]
    if not callable(name_or_class):
        raise TypeError(f"features_extractor_class must be a name or a class, got {name_or_class!r}")
    return cast(type[BaseFeaturesExtractor], name_or_class)


def with_features_extractor(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param policy_kwargs: keyword arguments of a policy, in which ``features_extractor_class`` may be a name
    :return: ``policy_kwargs`` with the class in place of its name
    :raises ValueError: for an unknown name
    :raises TypeError: if ``policy_kwargs`` is not a dictionary
    """
    if not isinstance(policy_kwargs, dict):
        raise TypeError(f"policy_kwargs must be a dictionary or None, got {policy_kwargs!r}")
    if "features_extractor_class" not in policy_kwargs:
        return policy_kwargs
    extractor = features_extractor_class(policy_kwargs["features_extractor_class"])
    return {**policy_kwargs, "features_extractor_class": extractor}
