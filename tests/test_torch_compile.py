"""Training by compiled graphs: when it is refused, what makes new graphs, and how it goes on without them."""

import contextvars
import copy
import io
import json
import pickle
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch as th
from torch import _dynamo, nn

from sb3_ppo_ewma import PPGEWMA, PPOEWMA, MaskablePPOEWMA, RecurrentPPOEWMA
from tests.battery.envs import OBSERVATION_SPACES, SpaceEnv
from tests.battery.helpers import copy_parameters, record_log
from tests.engines import MaskedEnv, needs_compiler

pytestmark = pytest.mark.long


def make(cls: Any = PPOEWMA, policy: str = "MlpPolicy", env: Any = None, **kwargs: Any) -> Any:
    """:return: a small model"""
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "learning_rate": 0.01, "seed": 0}
    defaults["policy_kwargs"] = {"net_arch": [4]}
    env = SpaceEnv(action_space="box", episode_length=5) if env is None else env
    return cls(policy, env, **{**defaults, **kwargs})


def learn(model: Any, total_timesteps: int = 64) -> tuple[Any, list[dict[str, float]]]:
    """:return: the model after training, what it logged"""
    rows = record_log(model)
    model.learn(total_timesteps)
    parts = ("train/", "aux/")
    return model, [{key: value for key, value in row.items() if key.startswith(parts)} for _, row in rows]


def assert_equal_training(own: tuple[Any, Any], reference: tuple[Any, Any]) -> None:
    """Up to rounding."""
    (model, rows), (other, other_rows) = own, reference
    th.testing.assert_close(copy_parameters(model), copy_parameters(other), rtol=1e-4, atol=1e-5)
    if model.policy_ewma is not None:
        averages = [dict(each.policy_ewma.state_dict()) for each in (model, other)]
        th.testing.assert_close(*averages, rtol=1e-4, atol=1e-5)
    steps = [
        [state["step"] for state in each.policy.optimizer.state_dict()["state"].values()] for each in (model, other)
    ]
    assert steps[0] == steps[1]
    assert model._n_updates == other._n_updates
    assert len(rows) == len(other_rows) > 0
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-3, abs=1e-4)


def n_graphs() -> int:
    """:return: number of graphs so far"""
    return int(_dynamo.utils.counters["stats"]["unique_graphs"])


# ---------------------------------------------------------------------- graphs


@needs_compiler
def test_schedules_make_no_new_graphs() -> None:
    kwargs: dict[str, Any] = {
        "target_kl": 10.0,  # each step is a graph, not every four
        "max_grad_norm": 1.5,  # which some gradients have
        # A large epsilon: a common factor of all gradients would change nothing without it
        "policy_kwargs": {"net_arch": [4], "optimizer_kwargs": {"eps": 0.1, "weight_decay": 0.1}},
        "learning_rate": lambda progress: 0.001 + 0.01 * progress,
        "clip_range": lambda progress: 0.02 + 0.2 * progress,
        "ent_coef": 0.1,
        "kl_coef": 0.5,
    }
    before = n_graphs()
    compiled = learn(make(torch_compile=True, **kwargs))
    assert compiled[0].current_engine == "compiled dense"
    assert n_graphs() - before == 1
    assert_equal_training(compiled, learn(make(**kwargs)))


@needs_compiler
@pytest.mark.slow
def test_several_steps_in_a_graph() -> None:
    kwargs: dict[str, Any] = {"n_steps": 36, "ent_coef": 0.1}  # four minibatches are one graph, a smaller one follows
    before = n_graphs()
    compiled = learn(make(torch_compile=True, **kwargs), 144)
    assert n_graphs() - before == 2
    assert_equal_training(compiled, learn(make(**kwargs), 144))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU], ids=["compiled dense", "compiled"])
def test_target_kl_ends_epochs(activation: type[nn.Module]) -> None:
    policy_kwargs = {"net_arch": [4], "activation_fn": activation}
    kwargs = {"target_kl": 1e-3, "n_epochs": 5, "policy_kwargs": policy_kwargs}
    compiled, eager = (learn(make(torch_compile=each, **kwargs)) for each in (True, False))
    assert compiled[0].current_engine.startswith("compiled")
    assert_equal_training(compiled, eager)
    assert 4 <= compiled[0]._n_updates < 4 * 5


@needs_compiler
@pytest.mark.slow
def test_a_saved_model_goes_on_compiled() -> None:
    model, _ = learn(make(torch_compile=True))
    file = io.BytesIO()
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        assert not any("engines" in name or "graph" in name for name in json.loads(archive.read("data")))
    results = []
    for given in ({}, {"torch_compile": False}):
        file.seek(0)
        loaded = PPOEWMA.load(file, env=SpaceEnv(action_space="box", episode_length=5), **given)
        assert loaded.torch_compile == (not given)
        loaded.set_random_seed(1)
        results.append(learn(loaded))
    assert [model.current_engine for model, _ in results] == ["compiled dense", "dense"]
    assert_equal_training(*results)


@needs_compiler
@pytest.mark.slow
def test_copies_of_a_model_go_on_compiled() -> None:
    model = make(torch_compile=True).learn(32)
    results = []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        other.set_random_seed(1)
        results.append(learn(other))
        assert other.current_engine == "compiled dense"
    assert_equal_training(results[0], results[2])
    assert_equal_training(results[1], results[2])


@needs_compiler
@pytest.mark.slow
def test_models_do_not_share_a_limit_of_graphs() -> None:
    with _dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            assert make(torch_compile=True, batch_size=6, seed=seed).learn(32).current_engine == "compiled dense"


@needs_compiler
@pytest.mark.slow
def test_models_train_compiled_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a search with ``--n-jobs 2``. A thread lets the other one run wherever it calls a graph."""
    real, n_inside, most = th.compile, 0, 0

    def compile_slowly(function: Any, **kwargs: Any) -> Any:
        graph = real(function, **kwargs)

        def call(*args: Any) -> Any:
            nonlocal n_inside, most
            n_inside += 1
            most = max(most, n_inside)
            time.sleep(0.005)
            try:
                return graph(*args)
            finally:
                n_inside -= 1

        return call

    # A smaller last minibatch needs a graph of its own, while the other thread uses one that it has.
    monkeypatch.setattr(th, "compile", compile_slowly)
    models = [make(torch_compile=True, n_steps=36), make(torch_compile=True, n_steps=44, target_kl=10.0)]
    with ThreadPoolExecutor(2) as threads:
        for model in threads.map(lambda each: each.learn(4 * each.n_steps), models):
            assert model.current_engine == "compiled dense"
            assert model._n_updates == 4 * 2
    assert most == 1  # torch's settings for a graph are those of all threads
    assert not _dynamo.config.trace_autograd_ops
    assert not _dynamo.eval_frame._stance.skip_guard_eval_unsafe


@needs_compiler
@pytest.mark.slow
def test_trainings_leave_nothing_behind() -> None:
    model = make(torch_compile=True).learn(32)
    before = len(contextvars.copy_context())
    model.learn(64)
    assert len(contextvars.copy_context()) == before


PHASES = {"n_policy_iterations": 2, "n_aux_epochs": 2, "aux_batch_size": 16, "aux_learning_rate": 1e-4}
SLOW_CASES: dict[str, dict[str, Any]] = {
    "convolutions": {
        "env": SpaceEnv(OBSERVATION_SPACES["image_channels_last"]),
        "policy": "ImpalaPolicy",
        "learning_rate": 1e-3,
        "policy_kwargs": {"features_extractor_kwargs": {"channels": (4,), "n_blocks": 1, "features_dim": 8}},
    },
    "dictionary": {"env": SpaceEnv(OBSERVATION_SPACES["dict"]), "policy": "MultiInputPolicy", "learning_rate": 1e-3},
    "phases": {
        "cls": PPGEWMA,
        **PHASES,
        "policy_kwargs": {"critic_arch": "detach", "trunk_arch": [4], "net_arch": [4], "std_activation": "softplus"},
    },
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch_compile=True is slower:UserWarning")
@pytest.mark.parametrize("name", SLOW_CASES)
def test_graphs_of_larger_networks(name: str) -> None:
    compiled, eager = (learn(make(torch_compile=each, **copy.deepcopy(SLOW_CASES[name]))) for each in (True, False))
    assert compiled[0].current_engine == "compiled"
    assert_equal_training(compiled, eager)


# ---------------------------------------------------------------------- without graphs


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch_compile must be one of 'default', .*True or False, got 'fast'"):
        make(torch_compile="fast")


FALLBACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "optimizer": ("SGD", {"policy_kwargs": {"net_arch": [4], "optimizer_class": th.optim.SGD}}),
    "settings": ("amsgrad", {"policy_kwargs": {"net_arch": [4], "optimizer_kwargs": {"amsgrad": True}}}),
    "gSDE": ("StateDependentNoiseDistribution", {"use_sde": True}),
    "recurrent": (
        "RecurrentRolloutBuffer",
        {"cls": RecurrentPPOEWMA, "policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 4}},
    ),
    "maskable": ("MaskableEvaluation", {"cls": MaskablePPOEWMA, "env": MaskedEnv(action_space="discrete")}),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_training_goes_on_without_graphs(name: str) -> None:
    reason, kwargs = FALLBACKS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = learn(make(torch_compile=True, **copy.deepcopy(kwargs)))
    messages = [str(warning.message) for warning in caught if "torch_compile" in str(warning.message)]
    assert len(messages) == 1  # of four trainings
    assert messages[0].startswith("torch_compile=True has no effect, training goes on without it: ")
    assert reason in messages[0]
    assert_equal_training(model, learn(make(**kwargs)))


@pytest.mark.parametrize("at_call", [1, 4])
def test_what_cannot_be_compiled_is_trained_without(at_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation fails at the first minibatch, or at a later one, of another size."""

    def compile_badly(function: Any, **_: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(1)
            if len(calls) >= at_call:
                raise _dynamo.exc.TorchDynamoException("cannot be compiled\nfor a reason")
            return function(*args)

        return call

    calls: list[int] = []
    monkeypatch.setattr(th, "compile", compile_badly)
    kwargs: dict[str, Any] = {"n_steps": 36, "batch_size": 8}
    with pytest.warns(UserWarning, match="has no effect, training goes on without it: cannot be compiled$") as caught:
        compiled = learn(make(torch_compile=True, **kwargs), 144)
    assert len([warning for warning in caught if "torch_compile" in str(warning.message)]) == 1
    assert len(calls) == at_call
    assert compiled[0].current_engine == "dense"
    assert "- not 'compiled dense': cannot be compiled" in compiled[0].explain_engine()
    assert_equal_training(compiled, learn(make(**kwargs), 144))
