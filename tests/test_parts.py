"""Minibatches of images in parts: the same training up to rounding, where no sample depends on another."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, ImpalaPolicy
from sb3_ppo_ewma._engine import forward, parts
from sb3_ppo_ewma.losses import LossTerms
from sb3_ppo_ewma.policies import PPGCnnPolicy
from tests.battery.envs import ACTION_SPACES, OBSERVATION_SPACES, VECTOR, SpaceEnv
from tests.battery.helpers import copy_parameters, record_log

IMAGE = spaces.Box(0, 255, (3, 36, 36), "uint8")
IMPALA = {"policy_kwargs": {"features_extractor_kwargs": {"channels": (4,), "n_blocks": 1, "features_dim": 8}}}
PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 14, "aux_learning_rate": 1e-4}


def train(cls: Any = PPOEWMA, policy: Any = "CnnPolicy", actions: str = "discrete", image: str = "", **kw: Any) -> Any:
    """:return: a model after some iterations with ragged minibatches, its log"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 7, "n_epochs": 2, "learning_rate": 1e-4, "seed": 0}
    model = cls(
        policy,
        SpaceEnv(OBSERVATION_SPACES[image or "image_channels_first"], actions, episode_length=5),
        **{**defaults, **kw},
    )
    rows = record_log(model)
    return model.learn(32), [{k: v for k, v in row.items() if k.startswith(("train/", "aux/"))} for _, row in rows]


RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "box": {"actions": "box", "ent_coef": 0.1, "vf_coef": 0.9},
    "dict": {"policy": "MultiInputPolicy", "image": "dict"},
    "impala": {"policy": "ImpalaPolicy", **IMPALA},
    "penalty": {"kl_coef": 0.5, "clip_range": None},
    "no EWMA": {"prox_decay": None, "clip_range": 0.01, "clip_range_vf": 0.1},
    "value epochs": {"n_epochs_value": 3},
    "target_kl": {"target_kl": 1e-9},
    "advantages": {"advantage_decay": 0.5},
    "stale": {"staleness": 1, "staleness_mode": "proximal", "prox_decay": None},
    "phasic": {"cls": PPGEWMA, **PHASES},
    "phasic shared": {"cls": PPG, "policy_kwargs": {"critic_arch": "shared"}, **PHASES},
}


@pytest.mark.parametrize("name", RUNS)
def test_same_training(name: str) -> None:
    with patch.object(parts, "_LARGEST", 3 * 32 * 8 * 8 * 4), patch.object(parts, "_rows", wraps=parts._rows) as rows:
        # Layers of all networks here put out more than a third of this for a sample
        own, own_rows = train(**RUNS[name])
    assert rows.call_count > 0
    with patch.object(parts, "_rows", wraps=parts._rows) as rows:
        reference, reference_rows = train(**RUNS[name])
    assert rows.call_count == 0
    th.testing.assert_close(copy_parameters(own), copy_parameters(reference), rtol=1e-4, atol=1e-5)
    assert len(own_rows) == len(reference_rows) > 0
    for own_row, row in zip(own_rows, reference_rows, strict=True):
        assert own_row == pytest.approx(row, rel=1e-3, abs=1e-4)


def test_given_optimizer_settings_are_trained_as_a_whole() -> None:
    with patch.object(parts, "_LARGEST", 1), patch.object(parts, "_rows", side_effect=AssertionError):
        train(policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}})


class OwnBuffer(RolloutBuffer):
    """May give anything beside the samples."""


def test_own_buffers_are_trained_on_as_a_whole() -> None:
    with patch.object(parts, "_LARGEST", 1), patch.object(parts, "_rows", side_effect=AssertionError):
        train(rollout_buffer_class=OwnBuffer)


def test_own_auxiliary_evaluation_is_called_with_whole_minibatches() -> None:
    class Own(PPGCnnPolicy):
        def evaluate_auxiliary(self, obs: Any) -> Any:
            sizes.append(len(obs))
            return super().evaluate_auxiliary(obs)

    sizes: list[int] = []
    with patch.object(parts, "_LARGEST", 1):
        train(PPG, Own, **{**PHASES, "aux_batch_size": 16})
    assert set(sizes) == {16}


# ---------------------------------------------------------------------- where it applies


class OwnExtractor(BaseFeaturesExtractor):
    """May do anything with a batch."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 5)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36 * 36, 5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layers(observations)
        return features


def build(cls: Any = ActorCriticCnnPolicy, space: spaces.Space[Any] = IMAGE, **kwargs: Any) -> Any:
    """:return: a policy"""
    return cls(space, ACTION_SPACES["discrete"], lambda _: 0.01, **kwargs)


@pytest.mark.parametrize(
    "policy",
    [
        lambda: build(),
        lambda: build(ImpalaPolicy),
        lambda: build(PPGCnnPolicy),
        lambda: build(PPGCnnPolicy, critic_arch="detach", activation_fn=nn.ELU),
        lambda: build(MultiInputActorCriticPolicy, spaces.Dict({"image": IMAGE, "vector": VECTOR})),
    ],
)
def test_policies_that_can_be_parted(policy: Callable[[], Any]) -> None:
    assert parts.can_be_parted(policy())


def append(policy: Any, module: nn.Module) -> None:
    policy.features_extractor.cnn.append(module)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "normalised over the batch": lambda policy: append(policy, nn.BatchNorm1d(64)),
    "random": lambda policy: append(policy, nn.Dropout(0.5)),
    "hook": lambda policy: policy.action_net.register_forward_hook(lambda *_: None),
    "hook of a parameter": lambda policy: policy.action_net.weight.register_hook(lambda gradient: gradient),
    "own layer": lambda policy: setattr(policy, "action_net", type("Own", (nn.Linear,), {})(64, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_policies_that_cannot_be_parted(change: str) -> None:
    policy = build()
    CHANGES[change](policy)
    assert not parts.can_be_parted(policy)


def test_policies_without_images_are_not() -> None:
    assert not parts.can_be_parted(build(ActorCriticPolicy, VECTOR))


def test_own_extractors_cannot_be_parted() -> None:
    assert not parts.can_be_parted(build(ActorCriticPolicy, features_extractor_class=OwnExtractor))


# ---------------------------------------------------------------------- sizes and sums


def test_size_of_a_part() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), "uint8")
    policy = forward.StandardPolicy(build(space=space))
    # Nature CNN: 32 filters of 8x8 with stride 4 leave 20x20 values each, of 4 bytes
    observations = th.zeros((7, 4, 84, 84), dtype=th.uint8)
    assert parts.part_size(policy, observations) == 2**23 // (32 * 20 * 20 * 4)
    assert not policy.policy.features_extractor.cnn[0]._forward_hooks


def test_split() -> None:
    columns = (th.arange(10), {"a": th.arange(10, 20)}, [th.arange(20, 30)])
    found = list(parts.split(columns, 10, 4))
    assert [share for share, _ in found] == [0.4, 0.4, 0.2]
    assert [part[0].tolist() for _, part in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found[2][1][1]["a"].tolist() == [18, 19]
    assert found[1][1][2][0].tolist() == [24, 25, 26, 27]
    # 9 samples in parts of at most 8 are not 8 and 1
    assert [len(part[0]) for _, part in parts.split((th.arange(9),), 9, 8)] == [5, 4]
    ((share, whole),) = parts.split(columns, 10, None)
    assert share == 1
    assert whole is columns


def test_sums_of_parts() -> None:
    weight = th.tensor(3.0, requires_grad=True)
    samples = th.tensor([1.0, 2.0, 6.0])

    def terms(part: th.Tensor) -> LossTerms:
        loss = (weight * part).mean()
        return LossTerms([loss], [th.tensor(2.0)], 2 * loss.detach(), {"mean": part.mean(), "rows": part})

    result = parts.accumulated((share, terms(part)) for share, (part,) in parts.split((samples,), 3, 2))
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(6)  # 2 · mean
    assert result.loss.item() == pytest.approx(18)
    assert result.roots == []
    assert result.statistics["mean"].item() == pytest.approx(3)
    assert result.statistics["rows"].tolist() == [1, 2, 6]
