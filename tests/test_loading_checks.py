"""Parameters and states that cannot be ones of training are refused, by name, and a refusal changes nothing."""

import math
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_ewma import PPGEWMA, PPOEWMA, RecurrentPPOEWMA
from tests.battery.helpers import assert_same

QUICK: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 1, "device": "cpu"}
ALGORITHMS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "ppg": (
        PPGEWMA,
        "MlpPolicy",
        {"n_policy_iterations": 2, "n_aux_epochs": 1, "n_epochs_value": 2, "advantage_decay": 0.5},
    ),
    "recurrent": (RecurrentPPOEWMA, "MlpLstmPolicy", {"policy_kwargs": {"lstm_hidden_size": 4, "net_arch": [4]}}),
}
Change = Callable[[dict[str, Any]], None]
# Stands for the first of several keys
FIRST = object()


def make(name: str, **changes: Any) -> Any:
    algorithm, policy, kwargs = ALGORITHMS[name]
    return algorithm(policy, "CartPole-v1", **{"policy_kwargs": {"net_arch": [4]}, **QUICK, **kwargs, **changes})


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """:return: trained models"""
    return {name: make(name).learn(64) for name in ALGORITHMS}


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    """:return: others, which no test changes, since all that is loaded into them is refused"""
    return {name: make(name, seed=3).learn(64) for name in ALGORITHMS}


def put(value: float, *keys: Any) -> Change:
    """:return: a function that puts a number into the first entry of a tensor, or in the place of a number"""

    def change(parameters: dict[str, Any]) -> None:
        *others, last = keys
        for key in others:
            parameters = parameters[next(iter(parameters)) if key is FIRST else key]
        if isinstance(parameters[last], th.Tensor):
            parameters[last].view(-1)[0] = value
        else:
            parameters[last] = value

    return change


def replace(new: Any, *keys: Any) -> Change:
    """:return: a function that replaces an entry; ``None`` removes it"""

    def change(parameters: dict[str, Any]) -> None:
        *others, last = keys
        for key in others:
            parameters = parameters[key]
        if new is None:
            del parameters[last]
        else:
            parameters[last] = new

    return change


def group(**settings: Any) -> Change:
    """:return: a function that changes settings of the policy's optimiser"""

    def change(parameters: dict[str, Any]) -> None:
        parameters["policy.optimizer"]["param_groups"][0].update(settings)

    return change


OPTIMIZER = ("policy.optimizer", "state", 0)
# By the algorithm that it is tried with: what is changed in get_parameters(), and what the message says
CHANGES: dict[str, dict[str, tuple[Change, str]]] = {
    "ppg": {
        "parameter": (put(math.nan, "policy", "action_net.weight"), "NaN or Inf in 'action_net.weight' of .* policy"),
        "infinite": (put(math.inf, "policy", "value_net.bias"), "NaN or Inf in 'value_net.bias'"),
        "average": (put(math.nan, "policy_ewma", "module.value_net.bias"), "'module.value_net.bias' of .* policy_ewma"),
        "weight": (put(0.5, "policy_ewma", "total_weight"), "total weight 0.5, which must be >= 1"),
        "infinite weight": (put(math.inf, "policy_ewma", "total_weight"), "'total_weight' of .* policy_ewma"),
        "shape of average": (replace(th.zeros(3), "policy_ewma", "module.value_net.bias"), "shape"),
        "no average": (replace(None, "policy_ewma", "module.value_net.bias"), "Missing key"),
        "moments": (put(math.nan, "advantage_moments", "mean"), "'mean' of the loaded advantage_moments"),
        "deviations": (put(-1.0, "advantage_moments", "squared_deviations"), "squared_deviations=-1.0"),
        "no moments": (replace(None, "advantage_moments", "weight"), "Missing key.*weight"),
        "first moment": (put(math.nan, *OPTIMIZER, "exp_avg"), "'exp_avg' of .* policy.optimizer, parameter 0"),
        "second moment": (put(-1.0, *OPTIMIZER, "exp_avg_sq"), "'exp_avg_sq' in .* parameter 0 is negative"),
        "shape of moment": (replace(th.zeros(2), *OPTIMIZER, "exp_avg"), r"'exp_avg' in .* the shape \(2,\)"),
        "scalar moment": (replace(th.zeros(()), *OPTIMIZER, "exp_avg"), r"'exp_avg' in .* the shape \(\)"),
        "no tensor": (replace("text", *OPTIMIZER, "exp_avg"), "'exp_avg' in .* parameter 0 is 'text'"),
        "no moment": (replace(None, *OPTIMIZER, "exp_avg"), r"parameter 0 has no \['exp_avg'\]"),
        "negative step": (put(-3.0, *OPTIMIZER, "step"), "'step' in .* is negative"),
        "half a step": (put(2.5, *OPTIMIZER, "step"), r"'step' in .* is 2\.5, no number of steps"),
        "infinite step": (put(math.inf, *OPTIMIZER, "step"), "NaN or Inf in 'step'"),
        "steps": (replace(th.zeros(3), *OPTIMIZER, "step"), "'step' in .* the shape"),
        "text": (replace("text", *OPTIMIZER), "parameter 0 has no"),
        "another parameter": (replace({}, "policy.optimizer", "state", 99), "states of parameters .*99"),
        "rate": (group(lr=math.nan), "policy.optimizer has lr=nan"),
        "negative rate": (group(lr=-1.0), r"policy.optimizer has lr=-1\.0"),
        "betas": (group(betas=(0.9, 1.5)), r"betas=\(0.9, 1.5\)"),
        "one beta": (group(betas=(0.9,)), r"betas=\(0.9,\)"),
        "no eps": (group(eps=None), "eps=None"),
        "fewer parameters": (group(params=[0, 1]), r"groups of \[2\] parameters"),
        "same parameter": (put(1, "policy.optimizer", "param_groups", 0, "params", 0), "but is for"),
        "no groups": (replace([], "policy.optimizer", "param_groups"), r"groups of \[\] parameters"),
        "no optimiser": (replace({}, "policy.optimizer"), "policy.optimizer is not the state of an optimiser"),
        "value optimiser": (put(math.nan, "value_optimizer", "state", FIRST, "exp_avg_sq"), "value_optimizer, param"),
        "aux optimiser": (put(math.nan, "aux_optimizer", "state", FIRST, "exp_avg"), "aux_optimizer, parameter"),
        "shape of parameter": (replace(th.zeros(3), "policy", "action_net.weight"), "size mismatch"),
        "no parameter": (replace(None, "policy", "action_net.weight"), "Missing key"),
        "surplus parameter": (replace(th.zeros(3), "policy", "more"), "Unexpected key"),
        "no policy": (replace(None, "policy"), "Names of parameters do not match"),
        "unknown": (replace({}, "what_is_this"), "what_is_this"),
    },
    "recurrent": {
        "lstm": (put(math.nan, "lstm_state", "cell_vf"), "'cell_vf' of the loaded lstm_state"),
        "shape of lstm": (replace(th.zeros(1, 1, 5), "lstm_state", "cell_vf"), "states of the LSTM have the shapes"),
        "no lstm": (replace(None, "lstm_state", "cell_vf"), "states of the LSTM have the shapes"),
    },
}
BROKEN = {case: (name, *change) for name, changes in CHANGES.items() for case, change in changes.items()}


def everything(model: Any) -> dict[str, Any]:
    """:return: a copy of all that loading could change"""
    own = {"lstm_state": model.lstm_state.state_dict()} if hasattr(model, "lstm_state") else {}
    return deepcopy({**model.get_parameters(), **own, "generators": model.generators.state_dict()})


def reading(model: Any) -> dict[str, Any]:
    """:return: a copy of what can be given to ``set_parameters``"""
    return {name: state for name, state in everything(model).items() if name != "generators"}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_parameters_change_nothing(case: str, models: dict[str, Any], targets: dict[str, Any]) -> None:
    name, change, message = BROKEN[case]
    parameters, model = reading(models[name]), targets[name]
    before = everything(model)
    change(parameters)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.set_parameters(parameters, device="cpu")
    assert_same(everything(model), before)


class Broken:
    """A part whose state is another one in files."""

    def __init__(self, part: Any, state: dict[str, Any]) -> None:
        self.part, self.state = part, state

    def state_dict(self) -> dict[str, Any]:
        return self.state


WITHOUT_TORCHS_CHECKS = [case for case in BROKEN if case not in ("unknown", "no policy")]


@pytest.mark.parametrize("case", WITHOUT_TORCHS_CHECKS)
def test_broken_files_are_named(
    case: str, models: dict[str, Any], targets: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, message = BROKEN[case]
    algorithm, model = ALGORITHMS[name][0], models[name]
    parameters = reading(model)
    change(parameters)
    sb3s = {part: parameters[part] for part in ("policy", "policy.optimizer")}
    monkeypatch.setattr(algorithm, "get_parameters", lambda _: sb3s)
    for part in set(parameters) - set(sb3s):
        monkeypatch.setattr(model, part, Broken(getattr(model, part), parameters[part]))
    model.save(tmp_path / "model")
    monkeypatch.undo()
    for load in (algorithm.load, targets[name].set_parameters):
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s)model(\.zip)?: .*({message})"):
            load(tmp_path / "model", device="cpu")


def test_generators_of_a_file_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ppg")
    states = model.generators.state_dict()
    states["numpy"][-3] = 1e6
    monkeypatch.setattr(model, "generators", Broken(model.generators, states))
    model.save(tmp_path / "model")
    monkeypatch.undo()
    message = "model: the loaded state of numpy's random numbers is not valid"
    with pytest.raises(ValueError, match=message):
        PPGEWMA.load(tmp_path / "model", device="cpu")
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        model.set_parameters(tmp_path / "model", device="cpu")
    assert_same(everything(model), before)


class WithMask(ActorCriticPolicy):
    """Has a buffer with infinite entries, as masks of attention are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", th.tensor([0.0, -math.inf]))


def test_infinite_entries_that_the_policy_is_built_with_are_kept(tmp_path: Path) -> None:
    model = PPOEWMA(WithMask, "CartPole-v1", **QUICK)
    model.save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", device="cpu")
    assert loaded.policy.mask.tolist() == [0.0, -math.inf]
    parameters = deepcopy(model.get_parameters())
    for broken in ([-math.inf, -math.inf], [0.0, math.inf], [0.0, math.nan]):
        parameters["policy"]["mask"] = th.tensor(broken)
        with pytest.raises(ValueError, match="'mask' of the loaded policy"):
            model.set_parameters(parameters)


@pytest.mark.parametrize(
    "optimizer",
    [
        th.optim.SGD,
        th.optim.RMSprop,
        th.optim.Adagrad,
        th.optim.NAdam,
        th.optim.ASGD,
        th.optim.Rprop,
        th.optim.Adafactor,
    ],
)
def test_sane_states_of_every_optimizer_are_taken(optimizer: type, tmp_path: Path) -> None:
    policy_kwargs = {"optimizer_class": optimizer, "net_arch": [4], "optimizer_kwargs": {}}
    if optimizer in (th.optim.SGD, th.optim.RMSprop):
        policy_kwargs["optimizer_kwargs"] = {"momentum": 0.9}
    model = PPOEWMA("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, **QUICK).learn(64)
    model.save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", device="cpu")
    assert_same(loaded.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())
    model.set_parameters(tmp_path / "model")


def test_some_parameters_without_a_state_are_taken(models: dict[str, Any]) -> None:
    """As the auxiliary head has none before the first auxiliary phase."""
    parameters = reading(models["ppg"])
    del parameters["policy.optimizer"]["state"][0]
    model = make("ppg")
    model.set_parameters(parameters)
    assert 0 not in model.policy.optimizer.state_dict()["state"]


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def saved(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: a saved model"""
    path = tmp_path_factory.mktemp("models") / "model.zip"
    models["ppg"].save(path)
    return path


def test_files_that_are_cut_off_or_something_else_are_named(saved: Path, tmp_path: Path) -> None:
    # In the middle, the end of an archive within the archive is the last thing.
    path, whole = tmp_path / "agent.zip", saved.read_bytes()
    contents = {
        b"": "agent.zip wasn't a zip-file: it is empty",
        b"garbage " * 30: "agent.zip wasn't a zip-file: its 240 bytes are not one",
        **{
            whole[:length]: f"agent.zip wasn't a zip-file: it begins as one but was cut off after {length} bytes"
            for length in (10, len(whole) // 2, len(whole) - 30)
        },
    }
    model = make("ppg")
    for content, message in contents.items():
        path.write_bytes(content)
        for load in (PPGEWMA.load, model.set_parameters):
            with pytest.raises(ValueError, match=message):
                load(path)


def test_archives_of_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    for members, message in (
        ({"readme.txt": "text"}, "agent.zip: not a file of save.*no member 'data'"),
        ({"data": "text"}, "agent.zip: not a file of save.*'data' is not JSON"),
        ({"data": "[1]"}, "agent.zip: not a file of save.*not a dictionary"),
        ({"data": "{}"}, "agent.zip: not a file of save.*without policy_class"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(ValueError, match=message):
            PPGEWMA.load(path)


def test_bits_that_have_changed_are_refused_or_without_effect(
    saved: Path, tmp_path: Path, models: dict[str, Any]
) -> None:
    """Neither SB3 nor PyTorch compare checksums."""
    path, whole, generator = tmp_path / "agent.zip", saved.read_bytes(), np.random.default_rng(0)
    expected = models["ppg"].get_parameters()
    for place in generator.integers(len(whole), size=40):
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
        try:
            loaded = PPGEWMA.load(path, device="cpu")
        except ValueError as error:
            assert "agent.zip" in str(error)  # noqa: PT017
        else:
            assert_same(loaded.get_parameters(), expected)


def test_unknown_keywords_of_load_are_refused(saved: Path) -> None:
    with pytest.raises(TypeError, match=r"got an .* 'porx_decay', got 0\.5\. Did you mean 'prox_decay'\?"):
        PPGEWMA.load(saved, porx_decay=0.5)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nothing_like_it', got 0\.5$"):
        PPGEWMA.load(saved, nothing_like_it=0.5)
    with pytest.raises(TypeError, match=r"custom_objects=\{'policy_class': \.\.\.\}"):
        PPGEWMA.load(saved, policy="CnnPolicy")
    loaded = PPGEWMA.load(
        saved, gamma=0.5, prox_decay=0.25, lr_schedule=lambda _: 0.0, num_timesteps=7, extra_loss=None
    )
    assert (loaded.gamma, loaded.prox_decay, loaded.num_timesteps) == (0.5, 0.25, 7)


class WithParameter(PPOEWMA):
    """Has a parameter and an attribute of its own."""

    def __init__(self, *args: Any, bonus: float = 0.0, **kwargs: Any) -> None:
        self.bonus, self.counter = bonus, 0
        super().__init__(*args, **kwargs)


def test_keywords_of_derived_classes_are_known(tmp_path: Path) -> None:
    WithParameter("MlpPolicy", "CartPole-v1", bonus=1.0, **QUICK).save(tmp_path / "model", exclude=["bonus"])
    loaded = WithParameter.load(tmp_path / "model", bonus=2.0, counter=3)
    assert (loaded.bonus, loaded.counter) == (2.0, 3)
    with pytest.raises(TypeError, match="Did you mean 'bonus'"):
        WithParameter.load(tmp_path / "model", bonsu=2.0)
