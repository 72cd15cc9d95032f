"""The moving average of parameters, on numbers worked out in the open."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.ewma import (
    ParameterEwma,
    center_of_mass_from_decay,
    check_decay,
    decay_from_center_of_mass,
    decay_from_span,
    default_center_of_mass,
    span_from_decay,
)
from tests.battery.envs import SpaceEnv


def module(value: float = 0.0) -> nn.Linear:
    """:return: a module with one parameter"""
    linear = nn.Linear(1, 1, bias=False)
    fill(linear, value)
    return linear


@th.no_grad()
def fill(linear: nn.Linear, value: float) -> None:
    linear.weight.fill_(value)


def average_of(ewma: ParameterEwma) -> float:
    """:return: the value of a module's one parameter under the average"""
    with ewma.in_place():
        return ewma.module.weight.item()


# === Updates ===


def test_average_weighs_by_age_without_bias() -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    assert (average_of(ewma), ewma.total_weight) == (1.0, 1.0)
    fill(source, 2.0)
    ewma.update(0.5)
    # weights ½ and 1: (½·1 + 1·2) / 1.5
    assert average_of(ewma) == pytest.approx(2.5 / 1.5)
    fill(source, 6.0)
    ewma.update(0.5)
    # weights ¼, ½, 1
    assert average_of(ewma) == pytest.approx((0.25 + 1.0 + 6.0) / 1.75)
    assert ewma.total_weight == 1.75


def test_first_parameters_are_forgotten_faster_than_by_plain_interpolation() -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    fill(source, 0.0)
    for _ in range(8):
        ewma.update(8 / 9)
    # β^8 / Σ β^k = 0.390 / 5.88; interpolating by 1/9 each time would leave β^8 = 39 %
    assert average_of(ewma) == pytest.approx(0.0663, abs=1e-4)


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 6.0), (1.0, 3.0)])
def test_extreme_decays_give_the_last_parameters_and_the_mean(decay: float, expected: float) -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    for value in (2.0, 6.0):
        fill(source, value)
        ewma.update(decay)
    assert average_of(ewma) == pytest.approx(expected)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_update_refuses_bad_decays(decay: float) -> None:
    ewma = ParameterEwma(module())
    with pytest.raises(ValueError, match=re.escape(f"decay must be in [0, 1], got {decay}")):
        ewma.update(decay)
    assert ewma.total_weight == 1.0


def test_interpolation_of_other_tensors_counts_as_an_update() -> None:
    ewma = ParameterEwma(module(1.0))
    averages, parameters = [th.tensor([1.0, 3.0])], [th.tensor([4.0, 6.0])]
    ewma.interpolate(averages, parameters, 0.5)
    # (½·1 + 4) / 1.5 and (½·3 + 6) / 1.5
    assert averages[0].tolist() == pytest.approx([3.0, 5.0])
    assert ewma.total_weight == 1.5
    assert average_of(ewma) == 1.0


def test_reset_copies_and_clears_nan() -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    fill(source, math.nan)
    ewma.update(0.9)
    fill(source, 3.0)
    ewma.update(0.9)
    assert math.isnan(average_of(ewma))
    ewma.reset()
    assert (average_of(ewma), ewma.total_weight) == (3.0, 1.0)
    fill(source, 5.0)
    assert average_of(ewma) == 3.0  # a copy, not a view


def test_averages_have_no_gradient_and_keep_their_dtype_and_device() -> None:
    source = nn.Linear(2, 1).to(th.float16)
    source.bias = nn.Parameter(source.bias.double())
    ewma = ParameterEwma(source)
    ewma.update(0.5)
    assert [average.dtype for average in ewma.averages] == [th.float16, th.float64]
    assert not any(average.requires_grad for average in ewma.averages)
    assert [average.device.type for average in ParameterEwma(nn.Linear(2, 1, device="meta")).averages] == ["meta"] * 2


# === The averaged module ===


def test_in_place_restores_the_parameters() -> None:
    source = module(1.0)
    ewma, parameter, data = ParameterEwma(source), source.weight, source.weight.data_ptr()
    fill(source, 5.0)
    with ewma.in_place():
        assert source(th.ones(1)).item() == 1.0
        assert source.weight is parameter
    assert source(th.ones(1)).item() == 5.0
    assert source.weight.data_ptr() == data
    with pytest.raises(RuntimeError, match="inside"), ewma.in_place():
        raise RuntimeError("inside")
    assert (source.weight.item(), average_of(ewma)) == (5.0, 1.0)


def test_buffers_and_attributes_are_those_of_the_module() -> None:
    source = nn.BatchNorm1d(2)
    ewma = ParameterEwma(source)
    source(th.randn(16, 2) + 5)
    statistics = source.running_mean.clone()
    ewma.update(0.9)
    with ewma.in_place():
        assert th.equal(source.running_mean, statistics)
        assert source.num_batches_tracked == 1
    ewma.reset()
    assert th.equal(source.running_mean, statistics)


def test_integer_parameters_are_left_alone() -> None:
    source: Any = module(0.0)
    source.count = nn.Parameter(th.tensor(3), requires_grad=False)
    ewma = ParameterEwma(source)
    assert ewma.names == ["weight"]
    source.count.fill_(5)
    fill(source, 3.0)
    ewma.update(0.5)
    with ewma.in_place():
        assert source.count == 5
        assert source.weight.item() == pytest.approx(2.0)  # (½·0 + 3) / 1.5
    assert source.count == 5


def test_shared_parameters_have_one_average() -> None:
    first = module(1.0)
    second = module()
    second.weight = first.weight
    ewma = ParameterEwma(nn.Sequential(first, second))
    assert ewma.names == ["0.weight"]
    fill(second, 3.0)
    ewma.update(0.0)
    with ewma.in_place():
        assert first.weight.item() == second.weight.item() == 3.0


# === Following a module ===


def test_replaced_parameters_are_noticed() -> None:
    source = nn.Sequential(module(1.0), module(2.0))
    ewma = ParameterEwma(source)
    ewma.update(0.5)
    assert ewma.follows(source)
    source[1].weight = nn.Parameter(source[1].weight.detach().clone())
    assert not ewma.follows(source)
    assert not ewma.follows(source[0])
    ewma.follow(source)
    assert ewma.follows(source)
    assert ewma.total_weight == 1.0
    assert th.equal(ewma.averages[1], source[1].weight)


@pytest.mark.parametrize("argument", [th.float64, th.bfloat16, "meta"])
def test_another_dtype_or_device_is_noticed(argument: Any) -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    source.to(argument)
    assert not ewma.follows(source)
    ewma.follow(source)
    assert ewma.follows(source)


def test_changed_values_are_noticed() -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    assert ewma.is_up_to_date()
    fill(source, 2.0)
    assert not ewma.is_up_to_date()
    ewma.remember()
    assert ewma.is_up_to_date()
    source.weight.data = th.full((1, 1), 3.0)
    assert not ewma.is_up_to_date()
    ewma.reset()
    assert ewma.is_up_to_date()
    fill(source, 4.0)
    ewma.parameters_loaded()
    assert ewma.is_up_to_date()


def test_data_of_another_shape_can_be_remembered() -> None:
    source = module(1.0)
    ewma = ParameterEwma(source)
    source.weight.data = th.zeros(1, 3)
    assert not ewma.is_up_to_date()
    ewma.remember()
    assert ewma.is_up_to_date()


def trained(**kwargs: Any) -> PPOEWMA:
    """:return: a model after one training"""
    return PPOEWMA("MlpPolicy", SpaceEnv(), n_steps=16, batch_size=8, n_epochs=2, seed=0, **kwargs).learn(16)


def replace_parameter(policy: Any) -> None:
    policy.action_net.weight = nn.Parameter(policy.action_net.weight.detach() + 1)
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=3e-4)


@th.no_grad()
def change_values(policy: Any) -> None:
    policy.action_net.weight += 1


@pytest.mark.parametrize("change", [replace_parameter, change_values])
def test_the_average_starts_afresh_from_changed_policies(change: Callable[[Any], None]) -> None:
    model = trained()
    assert model.policy_ewma is not None
    change(model.policy)
    with pytest.warns(UserWarning, match="changed outside of training: policy_ewma started afresh"):
        proximal = model.proximal_policy
    assert proximal is not None
    assert th.equal(proximal.action_net.weight, model.policy.action_net.weight)
    assert model.policy_ewma.total_weight == 1.0
    model.learn(16, reset_num_timesteps=False)  # without a second warning, which would be an error here
    assert model.policy_ewma.total_weight > 1.0


def test_ordinary_training_goes_on_with_the_average(recwarn: pytest.WarningsRecorder) -> None:
    model = trained()
    model.learn(32)
    assert model.policy_ewma is not None
    decay = model.current_prox_decay
    assert decay is not None
    assert model.policy_ewma.total_weight == pytest.approx(sum(decay**k for k in range(1 + 3 * 2 * 2)))
    assert not [each for each in recwarn if "afresh" in str(each.message)]


# === States ===


def test_state_survives_with_the_weight_in_double_precision() -> None:
    source = module(0.0)
    ewma = ParameterEwma(source)
    fill(source, 1.0)
    for _ in range(3):
        ewma.update(0.9)
    state = ewma.state_dict()
    assert list(state) == ["module.weight", "total_weight"]
    copy = ParameterEwma(module(9.0))
    copy.load_state_dict(state)
    assert copy.total_weight == pytest.approx(1 + 0.9 + 0.9**2 + 0.9**3, rel=1e-15)
    assert average_of(copy) == average_of(ewma)
    assert copy.module.weight.item() == 9.0
    fill(source, 5.0)
    ewma.update(0.9)
    assert average_of(copy) != average_of(ewma)  # a copy, not a view


def test_states_of_older_files_have_buffers_as_well() -> None:
    source = nn.BatchNorm1d(1)
    ewma = ParameterEwma(source)
    older = {f"module.{name}": tensor + 1 for name, tensor in source.state_dict().items()}
    ewma.load_state_dict({**older, "total_weight": th.tensor(4.0, dtype=th.float64)})
    assert ewma.total_weight == 4.0
    assert [average.item() for average in ewma.averages] == [2.0, 1.0]
    assert source.num_batches_tracked == 0


def test_states_that_do_not_fit_are_refused() -> None:
    ewma = ParameterEwma(nn.Linear(2, 1))
    state = ewma.state_dict()
    for name in state:
        incomplete = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=re.escape(f"['{name}']")):
            ewma.load_state_dict(incomplete)
        ewma.load_state_dict(incomplete, strict=False)
    with pytest.raises(RuntimeError, match=re.escape("module.bias has shape (2,), expected (1,)")):
        ewma.load_state_dict({**state, "module.bias": th.zeros(2)})


# === Conversions ===


def test_conversions() -> None:
    assert decay_from_center_of_mass(8) == pytest.approx(8 / 9)  # the paper's 0.889
    assert center_of_mass_from_decay(0.5) == 1.0
    assert decay_from_span(1) == 0.0
    assert decay_from_span(3) == 0.5
    for decay in (0.0, 0.3, 0.999):
        assert decay_from_center_of_mass(center_of_mass_from_decay(decay)) == pytest.approx(decay)
        assert decay_from_span(span_from_decay(decay)) == pytest.approx(decay)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 16), 4.0),
        ((65, 16), 5.0),  # the last minibatch is smaller
        ((8, 16), 1.0),
        ((64, None), 1.0),
        ((64, 16, 5), 4.0),
        ((64, 16, 6), 12.0),
        ((64, 16, 3, True), 12.0),
    ],
)
def test_default_center_of_mass(arguments: tuple[Any, ...], expected: float) -> None:
    assert default_center_of_mass(*arguments) == expected


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (decay_from_center_of_mass, -1),
        (decay_from_center_of_mass, math.inf),
        (decay_from_center_of_mass, math.nan),
        (decay_from_span, 0.5),
        (decay_from_span, math.nan),
        (center_of_mass_from_decay, 1.0),
        (span_from_decay, -0.1),
        (lambda value: check_decay("prox_decay", value), math.nan),
    ],
)
def test_conversions_refuse_what_has_no_meaning(function: Callable[[float], Any], value: float) -> None:
    with pytest.raises(ValueError, match=str(value)):
        function(value)
