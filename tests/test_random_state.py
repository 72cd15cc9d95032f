import random

import numpy as np
import pytest
import torch as th

from sb3_ppo_ewma.checkpointing.generators import CollectorGenerators, GeneratorStates, preserved_generators

CPU = th.device("cpu")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), th.rand(()).item()]


def test_state_is_restored_when_training_goes_on_not_when_it_is_loaded():
    states = GeneratorStates(CPU)
    draw()  # leaves half a pair of normal variables behind in numpy and in random
    saved = states.state_dict()
    first = draw()
    states.load_state_dict(saved)
    assert draw() != first
    states.apply_pending()
    assert draw() == first
    states.apply_pending()  # once only
    assert draw() != first


def test_state_is_safe_to_load_as_weights(tmp_path):
    saved = GeneratorStates(CPU).state_dict()
    first = draw()
    th.save(saved, tmp_path / "state.pth")
    states = GeneratorStates(CPU)
    states.load_state_dict(th.load(tmp_path / "state.pth", weights_only=True))
    states.apply_pending()
    assert draw() == first


def test_every_state_must_be_there_and_valid():
    saved = GeneratorStates(CPU).state_dict()
    assert all(tensor.dtype == th.float64 for tensor in saved.values())
    states = GeneratorStates(CPU)
    with pytest.raises(RuntimeError, match=r"Missing key.*python"):
        states.load_state_dict({name: saved[name] for name in ("torch", "numpy")})
    first = draw()
    states.load_state_dict(saved)
    beyond = saved["numpy"].clone()
    beyond[-3] = 625
    invalid = {"torch": saved["torch"][:-1], "numpy": beyond, "python": th.rand_like(saved["python"])}
    for name, tensor in invalid.items():
        with pytest.raises(ValueError, match=f"state of {name}'s random numbers is not valid"):
            states.load_state_dict({**saved, name: tensor})
        with pytest.raises(ValueError, match=f"state of {name}'s random numbers is not valid"):
            CollectorGenerators().load_state_dict({name: tensor})
    states.apply_pending()  # those that were valid
    assert draw() == first


def test_part_of_a_state():
    saved = GeneratorStates(CPU).state_dict()
    states = GeneratorStates(CPU)
    first = draw()
    states.load_state_dict({"python": saved["python"]}, strict=False)
    states.apply_pending()
    second = draw()
    assert second[:2] == first[:2]
    assert second[2:] != first[2:]


def test_state_not_applied_yet_is_saved_again():
    states = GeneratorStates(CPU)
    saved = states.state_dict()
    states.load_state_dict(saved)
    draw()
    assert th.equal(states.state_dict()["torch"], saved["torch"])


def test_draws_inside_the_context_leave_no_trace():
    saved = GeneratorStates(CPU)
    saved.load_state_dict(saved.state_dict())
    with preserved_generators(CPU):
        first = draw()
    assert draw() == first
