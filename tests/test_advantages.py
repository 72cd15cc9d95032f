"""Normalisation of advantages, on numbers worked out in the open."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ppo_ewma.advantages import AdvantageNormalizer, MomentsEwma, normalize_advantages, standardize

# === Moments over batches ===


def test_moments_of_two_batches() -> None:
    moments = MomentsEwma(0.5)
    assert moments.moments() == (0.0, 1.0)
    moments.update(th.tensor([1.0, 3.0]))
    assert moments.moments() == pytest.approx((2.0, 1.0))
    moments.update(th.tensor([[5.0]]))
    # weights ½, ½, 1 on 1, 3, 5: mean 7/2, variance (½·6.25 + ½·0.25 + 2.25)/2
    assert moments.moments() == pytest.approx((3.5, 2.75))
    assert moments.location_and_scale() == pytest.approx((3.5, math.sqrt(2.75) + 1e-8), rel=1e-15)
    assert moments.normalize(th.tensor([3.5, 3.5 + math.sqrt(2.75)])).tolist() == pytest.approx([0.0, 1.0])
    moments.reset()
    assert moments.moments() == (0.0, 1.0)


def test_moments_of_moments() -> None:
    samples, moments = MomentsEwma(0.5), MomentsEwma(0.5)
    for batch in ([1.0, 3.0], [5.0, 5.0, 8.0]):
        samples.update(th.tensor(batch, dtype=th.float64))
        moments.update_from_moments(float(np.mean(batch)), float(np.var(batch)), len(batch))
    assert moments.moments() == pytest.approx(samples.moments(), rel=1e-15)


def test_before_the_first_update_nothing_is_normalised() -> None:
    assert MomentsEwma(0.5).normalize(th.tensor([-3.0, 7.0])).tolist() == pytest.approx([-3.0, 7.0])


def test_decay_zero_remembers_the_last_batch_only() -> None:
    moments = MomentsEwma(0.0)
    moments.update(th.tensor([1e6, -1e6]))
    moments.update(th.tensor([1.0, 3.0]))
    assert moments.moments() == pytest.approx((2.0, 1.0))
    assert moments.normalize(th.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, -3.7e8, 1e15])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_constant_and_single_samples_become_zero(value: float, decay: float) -> None:
    moments = MomentsEwma(decay)
    for n in (1, 7, 64):
        samples = th.full((n,), value)
        moments.update(samples)
        assert moments.moments()[1] >= 0
        normalized = moments.normalize(samples)
        assert th.isfinite(normalized).all()
        assert normalized.abs().max() < 1e-3
        assert normalized.dtype == samples.dtype


@pytest.mark.parametrize("bad", [[math.nan], [math.inf, 1.0], []])
def test_moments_refuse_nan_and_nothing(bad: list[float]) -> None:
    moments = MomentsEwma(0.5)
    moments.update(th.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="finite"):
        moments.update(th.tensor(bad))
    assert moments.moments() == (2.0, 1.0)


@pytest.mark.parametrize("arguments", [(0.0, -1.0, 4), (0.0, math.nan, 4), (0.0, 1.0, 0)])
def test_moments_that_do_not_exist_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"count={arguments[2]}, variance={arguments[1]}")):
        MomentsEwma(0.5).update_from_moments(*arguments)


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_bad_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"decay must be in [0, 1), got {decay}")):
        MomentsEwma(decay)


def test_moments_survive_a_state() -> None:
    moments = MomentsEwma(0.9)
    moments.update(th.tensor([1.0, 4.0]))
    state = moments.state_dict()
    copy = MomentsEwma(0.9)
    copy.load_state_dict({**state, "squared_weight": th.tensor(2.0)})  # which older files have
    for each in (moments, copy):
        each.update(th.tensor([0.5]))
    assert copy.moments() == moments.moments()
    del state["mean"]
    with pytest.raises(RuntimeError, match=re.escape("['mean']")):
        copy.load_state_dict(state)
    copy.load_state_dict(state, strict=False)


# === Minibatches ===


def test_normalisation_of_a_minibatch() -> None:
    # mean 2, unbiased standard deviation 1
    assert normalize_advantages(th.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
    mask = th.tensor([True, True, True, False])
    masked = normalize_advantages(th.tensor([1.0, 2.0, 3.0, 100.0]), mask)
    assert masked[:3].tolist() == pytest.approx([-1.0, 0.0, 1.0])
    rows = normalize_advantages(th.tensor([[1.0, 2.0, 3.0], [10.0, 30.0, 50.0]]))
    assert rows.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0] * 2)


def test_single_and_constant_advantages_of_a_minibatch() -> None:
    assert normalize_advantages(th.tensor([7.0])).tolist() == [7.0]
    assert normalize_advantages(th.tensor([7.0, 9.0]), th.tensor([False, True])).tolist() == [7.0, 9.0]
    assert normalize_advantages(th.full((4,), 7.0)).tolist() == [0.0] * 4


def test_standardisation_computes_in_double_precision() -> None:
    samples = th.tensor([16777216.0, 16777218.0])
    assert standardize(samples, 16777217.0, 1.0).tolist() == [-1.0, 1.0]
    location = th.tensor(16777217.0, dtype=th.float64)
    assert standardize(samples, location, 2.0).tolist() == [-0.5, 0.5]


def test_normalizer_of_minibatches() -> None:
    normalizer, rollout = AdvantageNormalizer(True, None), np.array([[1.0, 2.0], [3.0, 6.0]], dtype=np.float32)
    assert normalizer.include(rollout) == pytest.approx(math.sqrt(3.5))
    assert normalizer(th.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
    masked = normalizer(th.tensor([1.0, 9.0, 3.0]), th.tensor([True, False, True]))
    assert masked[[0, 2]].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_normalizer_that_is_off_returns_what_it_is_given() -> None:
    advantages = th.tensor([1.0, 5.0])
    for moments in (None, MomentsEwma(0.5)):
        normalizer = AdvantageNormalizer(False, moments)
        normalizer.include(np.array([3.0, 4.0]))
        assert normalizer(advantages) is advantages


def test_normalizer_with_moments_over_rollouts() -> None:
    moments = MomentsEwma(0.5)
    first = AdvantageNormalizer(True, moments)
    assert first.include(np.array([[1.0, 3.0]], dtype=np.float32)) == pytest.approx(1.0)
    second = AdvantageNormalizer(True, moments)
    assert second.include(np.array([[5.0]], dtype=np.float32)) == pytest.approx(math.sqrt(2.75))
    # One sample, and a minibatch of another mean: neither matters.
    assert second(th.tensor([3.5 + math.sqrt(2.75)])).tolist() == pytest.approx([1.0])
    rows = second(th.tensor([[3.5], [3.5 - math.sqrt(2.75)]]))
    assert rows.flatten().tolist() == pytest.approx([0.0, -1.0])


def test_recomputed_advantages_replace_those_of_their_rollout() -> None:
    moments = MomentsEwma(0.5)
    AdvantageNormalizer(True, moments).include(np.array([1.0, 3.0]))
    normalizer = AdvantageNormalizer(True, moments)
    for advantages in ([100.0, -7.0, 3.0], [-20.0], [5.0]):
        normalizer.include(np.array(advantages))
    # as after [1, 3] and [5] alone
    assert moments.moments() == pytest.approx((3.5, 2.75))
    assert moments.weight == 2.0


class OneGroup:
    """Another process has the samples 5 and 7."""

    def moments(self, samples: th.Tensor) -> tuple[th.Tensor, th.Tensor, int]:
        together = th.cat([samples.double(), th.tensor([5.0, 7.0], dtype=th.float64)])
        mean = together.mean(-1, keepdim=True)
        return mean, ((together - mean) ** 2).sum(-1, keepdim=True), len(together)


def test_normalizer_of_processes_that_train_together() -> None:
    # 1, 3, 5, 7: mean 4, squared deviations 20
    normalizer = AdvantageNormalizer(True, None, OneGroup())
    scale = math.sqrt(20 / 3)
    masked = normalizer(th.tensor([1.0, 99.0, 3.0]), th.tensor([True, False, True]))
    assert masked[[0, 2]].tolist() == pytest.approx([-3 / scale, -1 / scale])
    moments = MomentsEwma(0.5)
    normalizer = AdvantageNormalizer(True, moments, OneGroup())
    assert normalizer.include(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(5))
    assert moments.moments() == pytest.approx((4.0, 5.0))
    assert moments.weight == 4.0
