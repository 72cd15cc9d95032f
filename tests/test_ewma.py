"""Moving averages on numbers worked out in the open."""

import math

import pytest
import torch as th
from torch import nn

from sb3_ppo_ewma.ewma import (
    MomentsEwma,
    ParameterEwma,
    center_of_mass_from_decay,
    decay_from_center_of_mass,
    decay_from_span,
    span_from_decay,
)


def module(value: float) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    with th.no_grad():
        linear.weight.fill_(value)
    return linear


def test_average_weighs_by_age_without_bias():
    ewma = ParameterEwma(module(1.0))
    ewma.update(module(2.0), 0.5)
    # weights ½ and 1: (½·1 + 1·2) / 1.5
    assert ewma.module.weight.item() == pytest.approx(2.5 / 1.5)
    ewma.update(module(6.0), 0.5)
    # weights ¼, ½, 1
    assert ewma.module.weight.item() == pytest.approx((0.25 + 1.0 + 6.0) / 1.75)
    assert float(ewma.total_weight) == 1.75


def test_first_parameters_are_forgotten_faster_than_by_plain_interpolation():
    ewma = ParameterEwma(module(1.0))
    for _ in range(8):
        ewma.update(module(0.0), 8 / 9)
    # β^8 / Σ β^k = 0.390 / 5.88; interpolating by 1/9 each time would leave β^8 = 39 %
    assert ewma.module.weight.item() == pytest.approx(0.0663, abs=1e-4)


def test_reset_copies_and_clears_nan():
    ewma, source = ParameterEwma(module(math.nan)), module(3.0)
    ewma.update(source, 0.9)
    assert math.isnan(ewma.module.weight.item())
    ewma.reset(source)
    assert ewma.module.weight.item() == 3.0
    assert float(ewma.total_weight) == 1.0
    with th.no_grad():
        source.weight.fill_(5.0)
    assert ewma.module.weight.item() == 3.0  # a copy, not a view


def test_buffers_are_copied():
    source = nn.BatchNorm1d(2)
    ewma = ParameterEwma(nn.BatchNorm1d(2))
    source(th.randn(16, 2) + 5)
    ewma.update(source, 0.9)
    assert th.equal(ewma.module.running_mean, source.running_mean)
    assert ewma.module.num_batches_tracked == 1


def test_integer_parameters_are_copied():
    def with_integer(value: int) -> nn.Module:
        result = module(float(value))
        result.count = nn.Parameter(th.tensor(value), requires_grad=False)
        return result

    ewma = ParameterEwma(with_integer(0))
    ewma.update(with_integer(3), 0.5)
    assert ewma.module.count == 3
    assert ewma.module.weight.item() == pytest.approx(2.0)


def test_average_is_frozen_and_in_evaluation_mode():
    ewma = ParameterEwma(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not ewma.module.training
    assert not any(parameter.requires_grad for parameter in ewma.module.parameters())


def test_weight_survives_state_dict_and_casts_in_float64():
    ewma = ParameterEwma(module(0.0))
    for _ in range(3):
        ewma.update(module(1.0), 0.9)
    ewma.to(th.float16)
    assert ewma.total_weight.dtype == th.float64
    copy = ParameterEwma(module(9.0))
    copy.load_state_dict(ewma.state_dict())
    assert float(copy.total_weight) == pytest.approx(1 + 0.9 + 0.9**2 + 0.9**3, rel=1e-15)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_update_refuses_bad_decays(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        ParameterEwma(module(0.0)).update(module(1.0), decay)


def test_moments_of_two_batches():
    moments = MomentsEwma(0.5)
    assert moments.moments() == (0.0, 1.0)
    moments.update(th.tensor([1.0, 3.0]))
    assert moments.moments() == pytest.approx((2.0, 1.0))
    moments.update(th.tensor([5.0]))
    # weights ½, ½, 1 on 1, 3, 5: mean 7/2, variance (½·6.25 + ½·0.25 + 2.25)/2
    assert moments.moments() == pytest.approx((3.5, 2.75))
    # Σw² = ¼ + ¼ + 1 = 1.5, denominator 2 − 1.5/2
    assert moments.moments(ddof=1)[1] == pytest.approx(5.5 / 1.25)


def test_single_sample_has_no_variance():
    moments = MomentsEwma(0.5)
    moments.update(th.tensor([3.0]))
    assert moments.moments(ddof=1) == (3.0, 0.0)
    moments.reset()
    assert moments.moments() == (0.0, 1.0)


def test_decay_zero_remembers_the_last_batch_only():
    moments = MomentsEwma(0.0)
    moments.update(th.tensor([1e6, -1e6]))
    moments.update(th.tensor([1.0, 3.0]))
    assert moments.moments() == pytest.approx((2.0, 1.0))
    assert moments.normalize(th.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, -3.7e8, 1e15])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_constant_and_single_samples_stay_finite(value, decay):
    moments = MomentsEwma(decay)
    for n in (1, 7, 64):
        samples = th.full((n,), value)
        moments.update(samples)
        assert moments.moments()[1] >= 0
        normalized = moments.normalize(samples)
        assert th.isfinite(normalized).all()
        assert normalized.dtype == samples.dtype


def test_moments_refuse_nan_and_nothing():
    moments = MomentsEwma(0.5)
    for bad in ([math.nan], [math.inf, 1.0], []):
        with pytest.raises(ValueError, match="finite"):
            moments.update(th.tensor(bad))
    with pytest.raises(ValueError, match="variance"):
        moments.update_from_moments(0.0, -1.0, 4)


def test_moments_survive_state_dict():
    moments = MomentsEwma(0.9)
    moments.update(th.tensor([1.0, 4.0]))
    copy = MomentsEwma(0.9)
    copy.load_state_dict(moments.state_dict())
    for m in (moments, copy):
        m.update(th.tensor([0.5]))
    assert copy.moments() == moments.moments()


def test_conversions():
    assert decay_from_center_of_mass(8) == pytest.approx(8 / 9)  # the paper's 0.889
    assert center_of_mass_from_decay(0.5) == 1.0
    assert decay_from_span(1) == 0.0
    assert decay_from_span(3) == 0.5
    for decay in (0.0, 0.3, 0.999):
        assert decay_from_center_of_mass(center_of_mass_from_decay(decay)) == pytest.approx(decay)
        assert decay_from_span(span_from_decay(decay)) == pytest.approx(decay)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (decay_from_center_of_mass, -1),
        (decay_from_center_of_mass, math.inf),
        (decay_from_span, 0.5),
        (center_of_mass_from_decay, 1.0),
        (span_from_decay, -0.1),
        (MomentsEwma, 1.0),
    ],
)
def test_conversions_refuse_what_has_no_meaning(function, value):
    with pytest.raises(ValueError, match=str(value)):
        function(value)
