"""Which engine trains a model, how the model says so, and that whatever changes a model is noticed."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, MaskablePPOEWMA, RecurrentPPOEWMA
from sb3_ppo_ewma.policies import AuxiliaryHeadMixin, PPGPolicy
from tests import customizations
from tests.battery.envs import ACTION_SPACES, SpaceEnv
from tests.battery.helpers import assert_same, copy_parameters
from tests.customizations import CUSTOMIZATIONS
from tests.engines import ENGINES, SPACES, MaskedEnv, MixingExtractor, OwnExtractor


def make(
    cls: Any = PPOEWMA, policy: Any = "MlpPolicy", observations: str = "vector", actions: str = "box", **kwargs: Any
) -> Any:
    """:return: a small model: 2 epochs of 2 minibatches in an iteration"""
    env_class = MaskedEnv if cls is MaskablePPOEWMA else SpaceEnv
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
    defaults["policy_kwargs"] = {"net_arch": [8]}
    return cls(policy, env_class(SPACES[observations], actions, episode_length=5), **{**defaults, **kwargs})


def with_policy(**kwargs: Any) -> dict[str, Any]:
    """:return: arguments of a model whose policy has these arguments"""
    return {"policy_kwargs": {"net_arch": [8], **kwargs}}


SMALL_CNN = with_policy(features_extractor_kwargs={"features_dim": 6})
SMALL_CNNS = with_policy(features_extractor_kwargs={"cnn_output_dim": 6})
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("dense", {}),
    "discrete": ("dense", {"actions": "discrete"}),
    "multidiscrete": ("dense", {"actions": "multidiscrete"}),
    "multibinary": ("dense", {"actions": "multibinary"}),
    "relu": ("dense", with_policy(activation_fn=nn.ReLU)),
    "no layers": ("dense", with_policy(net_arch=[])),
    "given Adam": ("dense", with_policy(optimizer_kwargs={"eps": 1e-5})),
    "weight decay": ("dense", with_policy(optimizer_kwargs={"weight_decay": 0.1})),
    "dictionary of vectors": ("dense", {"policy": "MultiInputPolicy", "observations": "vector_dict"}),
    "PPG": ("dense", {"cls": PPG}),
    "softplus": ("dense", {"cls": PPGEWMA, **with_policy(std_activation="softplus")}),
    "elu": ("standard", with_policy(activation_fn=nn.ELU)),
    "value epochs": ("standard", {"n_epochs_value": 3}),
    "analytic penalty": ("standard", {"kl_coef": 0.5, "kl_estimator": "analytic"}),
    "own extractor": ("standard", {"observations": "matrix", **with_policy(features_extractor_class=OwnExtractor)}),
    "dropout": ("standard", {"observations": "matrix", **with_policy(features_extractor_class=MixingExtractor)}),
    "trunk": ("standard", {"cls": PPG, **with_policy(trunk_arch=[5])}),
    "images": ("microbatches", {"policy": "CnnPolicy", "observations": "image", **SMALL_CNN}),
    "dictionary of images": ("microbatches", {"policy": "MultiInputPolicy", "observations": "dict", **SMALL_CNNS}),
    "gSDE": ("fused", {"use_sde": True}),
    "maskable": ("fused", {"cls": MaskablePPOEWMA, "actions": "discrete"}),
    "recurrent": ("sequences", {"cls": RecurrentPPOEWMA, "policy": "MlpLstmPolicy", **with_policy(lstm_hidden_size=4)}),
    "SGD": ("reference", with_policy(optimizer_class=th.optim.SGD)),
    "maximize": ("reference", with_policy(optimizer_kwargs={"maximize": True})),
    "AdamW": ("reference", with_policy(optimizer_class=th.optim.AdamW)),
    "amsgrad": ("reference", with_policy(optimizer_kwargs={"amsgrad": True})),
}


@pytest.mark.parametrize("name", CHOICES)
def test_engine_of_a_model(name: str) -> None:
    engine, kwargs = CHOICES[name]
    model = make(**kwargs)
    assert model.current_engine == engine
    assert model.learn(16).current_engine == engine
    assert model.explain_engine().startswith(f"engine {engine!r}: the fastest one that computes what this model")


# What an explanation must name, with the engine that is left
REASONS: dict[str, tuple[str, str]] = {
    "head replaced, old optimizer": ("reference", "does not have all parameters"),
    "head of two layers": ("standard", "a layer is a Sequential, not an nn.Linear with bias"),
    "head of another class": ("standard", "SoftLinear"),
    "head without bias": ("standard", "not an nn.Linear with bias"),
    "activation replaced": ("standard", "Softsign is not one of the activations nn.Tanh, nn.ReLU"),
    "one network": ("standard", "layers share parameters"),
    "weight norm": ("standard", "ParametrizedLinear"),
    "tied": ("standard", "layers share parameters"),
    "forward patched": ("standard", "forward of a Linear was replaced"),
    "evaluate_actions patched": ("fused", "evaluate_actions of the policy was replaced"),
    "forward hook": ("standard", "a Linear has hooks"),
    "pre-hook": ("standard", "a Linear has hooks"),
    "backward hook": ("standard", "a Linear has hooks"),
    "hook after accumulation": ("standard", "a parameter of a Linear has hooks"),
    "actor frozen": ("standard", "parameters are frozen"),
    "log_std frozen": ("standard", "parameters are frozen"),
    "groups": ("standard", "2 parameter groups"),
    "one left out": ("reference", "does not have all parameters"),
    "counts differ": ("standard", "different numbers of steps"),
    "own Adam": ("reference", "OwnAdam, not torch.optim.Adam"),
    "hook of the optimizer": ("reference", "the optimizer has hooks"),
    "step patched": ("reference", "step of the optimizer was replaced"),
    "log_prob patched": ("fused", "log_prob of the action distribution was replaced"),
    "own distribution": ("fused", "Own has no closed form"),
    "evaluate_actions overridden": ("fused", "EvaluateActions overrides evaluate_actions"),
    "extract_features overridden": ("fused", "ExtractFeatures overrides extract_features"),
    "helper overridden": ("fused", "overrides _get_action_dist_from_latent"),
    "forward overridden": ("fused", "Forward overrides forward"),
    "extra loss": ("standard", "the algorithm adds a term to the loss"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_named(name: str) -> None:
    engine, reason = REASONS[name]
    change = CUSTOMIZATIONS[name]
    policy: Any = "MlpPolicy" if change.policy is None else type("Own", (change.policy, ActorCriticPolicy), {})
    model = make(PPOEWMA if change.model is None else type("Own", (change.model, PPOEWMA), {}), policy)
    change.apply(model)
    assert model.current_engine == engine
    faster = ENGINES[ENGINES.index("dense") : ENGINES.index(engine)]
    lines = {line.split(":")[0]: line for line in model.explain_engine().splitlines()}
    assert reason in lines["- not 'dense'"]
    assert all(f"- not {each!r}" in lines for each in faster)


def append(module: nn.Module) -> Callable[[Any], Any]:
    """:return: appends a layer to the convolutions"""
    return lambda policy: policy.features_extractor.cnn.append(module)


IMAGE_REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "normalised over the batch": (
        append(nn.BatchNorm1d(64, affine=False)),
        "BatchNorm1d is not one of the layers known",
    ),
    "random": (append(nn.Dropout(0.5)), "Dropout is not one of the layers known"),
    "hook": (lambda policy: policy.action_net.register_forward_hook(lambda *_: None), "a Linear has hooks"),
    "hook of a parameter": (
        lambda policy: policy.value_net.bias.register_hook(th.zeros_like),
        "a parameter of a Linear",
    ),
    "forward": (lambda policy: setattr(policy.value_net, "forward", policy.value_net.forward), "forward of a Linear"),
}


@pytest.mark.parametrize("name", IMAGE_REASONS)
def test_why_minibatches_of_images_stay_whole(name: str) -> None:
    model = make(**CHOICES["images"][1])
    change, reason = IMAGE_REASONS[name]
    change(model.policy)
    assert model.current_engine == "standard"
    (line,) = [line for line in model.explain_engine().splitlines() if line.startswith("- not 'microbatches'")]
    assert reason in line


def hook_calls(cls: Any, hooked: str) -> tuple[int, int]:
    """:return: number of calls of a hook in collection and in training"""
    model = make(cls, **({"prox_decay": None} if cls is PPOEWMA else {}))
    calls: Counter[str] = Counter()
    phase = ["collection"]
    model.policy.get_submodule(hooked).register_forward_hook(lambda *_: calls.update(phase))
    train = model.train

    def train_with_name() -> None:
        phase[0] = "training"
        train()
        phase[0] = "collection"

    model.train = train_with_name
    model.learn(32)
    return calls["collection"], calls["training"]


@pytest.mark.parametrize(
    "hooked",
    ["", "features_extractor", "mlp_extractor", "mlp_extractor.policy_net", "mlp_extractor.value_net.0", "action_net"],
)
def test_hooks_are_called_as_in_ppo(hooked: str) -> None:
    own = hook_calls(PPOEWMA, hooked)
    assert own == hook_calls(PPO, hooked)
    assert own[0] >= 32


def test_explanation_names_a_remedy() -> None:
    explanation = make(**with_policy(optimizer_class=th.optim.SGD)).explain_engine()
    assert "- not 'fused': the optimizer is SGD, not torch.optim.Adam; it needs SB3's default optimizer" in explanation


def test_engine_is_printed_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(verbose=1).learn(48)
    line = "Training with the {!r} engine (model.explain_engine() says why)"
    assert capsys.readouterr().out.count(line.format("dense")) == 1
    model.policy.action_net.register_forward_hook(lambda *_: None)
    model.learn(32)
    printed = capsys.readouterr().out
    assert printed.count(line.format("standard")) == 1
    assert line.format("dense") not in printed
    make().learn(16)
    assert "Training with" not in capsys.readouterr().out


# ---------------------------------------------------------------------- engine="reference"


@pytest.mark.parametrize("name", ["default", "images", "maskable", "recurrent", "PPG", "gSDE", "SGD"])
def test_reference_engine_can_be_asked_for(name: str) -> None:
    model = make(**CHOICES[name][1], engine="reference")
    assert model.current_engine == model.learn(32).current_engine == "reference"
    assert "- not 'fused': engine='reference'; it needs engine='auto'" in model.explain_engine()


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'reference', got 'fast'"):
        make(engine="fast")
    model = make()
    model.engine = "dense"
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'reference', got 'dense'"):
        model.learn(16)


def test_engine_set_by_hand_acts_at_the_next_training() -> None:
    model = make().learn(16)
    assert model.current_engine == "dense"
    model.engine = "reference"
    assert model.explain_engine().startswith("engine 'reference'")
    assert model.learn(16).current_engine == "reference"
    model.engine = "auto"
    assert model.learn(16).current_engine == "dense"


# ---------------------------------------------------------------------- changes in between


class Acts(BaseCallback):
    """
    Does something once, in the second rollout, and keeps the engines of the trainings.

    :param act: what it does to the model
    :param moment: start, step or end
    """

    def __init__(self, act: Callable[[Any], Any], moment: str) -> None:
        super().__init__()
        self.act, self.moment = act, moment
        self.engines: list[str] = []
        self.n_rollouts = 0

    def _act_at(self, moment: str) -> None:
        if moment == self.moment and self.n_rollouts == 2:
            self.act(self.model)

    def _on_rollout_start(self) -> None:
        if self.n_rollouts > 0:
            self.engines.append(self.model.current_engine)
        self.n_rollouts += 1
        self._act_at("start")

    def _on_step(self) -> bool:
        if self.model.rollout_buffer.pos == 7:
            self._act_at("step")
        return True

    def _on_rollout_end(self) -> None:
        self._act_at("end")

    def _on_training_end(self) -> None:
        self.engines.append(self.model.current_engine)


def set_reference(model: Any) -> None:
    model.engine = "reference"


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "engine": (set_reference, "reference"),
    "hook": (
        customizations.hook(lambda model: model.policy.value_net, "register_forward_hook", lambda *_: None),
        "standard",
    ),
    "evaluate_actions": (CUSTOMIZATIONS["evaluate_actions patched"].apply, "fused"),
    "step": (CUSTOMIZATIONS["step patched"].apply, "reference"),
    "frozen": (customizations.freeze("value_net"), "standard"),
    "optimizer": (customizations.own_adam, "reference"),
    "head": (customizations.new_head, "dense"),
    "activation": (customizations.other_activation, "standard"),
}


@pytest.mark.parametrize("moment", ["start", "step", "end"])
@pytest.mark.parametrize("name", CHANGES)
def test_callbacks_change_the_choice(name: str, moment: str) -> None:
    act, engine = CHANGES[name]
    callback = Acts(act, moment)
    make().learn(48, callback)
    assert callback.engines == ["dense", engine, engine]


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_calls_of_learn(name: str) -> None:
    act, engine = CHANGES[name]
    model = make().learn(16)
    act(model)
    assert model.learn(16).current_engine == engine


def test_removed_hooks_give_the_engine_back() -> None:
    model = make()
    handle = model.policy.action_net.register_forward_hook(lambda *_: None)
    assert model.learn(16).current_engine == "standard"
    handle.remove()
    assert model.learn(16).current_engine == "dense"


@pytest.mark.parametrize(
    ("cls", "name", "engine"),
    [
        (nn.Linear, "forward", "fused"),
        (nn.Tanh, "forward", "fused"),
        (ActorCriticPolicy, "forward", "fused"),
        (ActorCriticPolicy, "evaluate_actions", "fused"),
        (ActorCriticPolicy, "extract_features", "fused"),
        (DiagGaussianDistribution, "log_prob", "fused"),
        (DiagGaussianDistribution, "proba_distribution", "fused"),
    ],
)
def test_patched_classes_are_noticed(cls: Any, name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    calls: list[str] = []
    original = getattr(cls, name)
    model = make().learn(16)
    monkeypatch.setattr(cls, name, patched)
    assert model.learn(16).current_engine == engine
    assert f"{cls.__name__}.{name} was replaced" in model.explain_engine()
    assert len(calls) >= (16 if name != "evaluate_actions" else 4)
    monkeypatch.undo()
    assert model.learn(16).current_engine == "dense"


def test_a_patch_of_an_inherited_method_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(cls=PPG)
    original = PPGPolicy.extract_features
    monkeypatch.setattr(PPGPolicy, "extract_features", lambda *args, **kwargs: original(*args, **kwargs))
    assert model.current_engine == "fused"
    assert "PPGPolicy.extract_features was replaced" in model.explain_engine()


def test_an_auxiliary_head_that_is_mixed_in_and_overridden_is_noticed() -> None:
    class Own(AuxiliaryHeadMixin, ActorCriticPolicy):
        def evaluate_auxiliary(self, obs: Any) -> Any:
            return super().evaluate_auxiliary(obs)

    model = make(cls=PPG, policy=Own)
    assert model.current_engine == "fused"
    assert "Own overrides evaluate_auxiliary" in model.explain_engine()


def test_global_hooks_are_called() -> None:
    calls: list[str] = []
    model = make()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        assert model.learn(16).current_engine == "fused"
        assert "torch has global module hooks" in model.explain_engine()
    finally:
        handle.remove()
    # 16 steps and the value after the last, 2 epochs of 2 minibatches under the policy and its average
    assert calls.count("Tanh") >= 2 * 16 + 1 + 2 * 2 * 3


# ---------------------------------------------------------------------- collection


class Compares(BaseCallback):
    """
    Calls the policy as collection does, and as SB3 would.

    :param deterministic: argument of the calls
    """

    def __init__(self, deterministic: bool) -> None:
        super().__init__()
        self.deterministic = deterministic
        self.pairs: list[tuple[Any, Any]] = []

    def _on_step(self) -> bool:
        policy, obs = self.model.policy, self.locals["obs_tensor"]
        state = th.get_rng_state()
        with th.no_grad():
            results = []
            for function in (policy, policy.forward):
                th.set_rng_state(state)
                results.append((*function(obs, self.deterministic), th.get_rng_state()))
        th.set_rng_state(state)
        self.pairs.append((results[0], results[1]))
        return True


POLICIES = {
    "image": "CnnPolicy",
    "small_image": "CnnPolicy",
    "dict": "MultiInputPolicy",
    "vector_dict": "MultiInputPolicy",
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("observations", [name for name in SPACES if name != "small_image"])
def test_collection_as_in_sb3(observations: str, actions: str, deterministic: bool) -> None:
    callback = Compares(deterministic)
    sizes = {"CnnPolicy": SMALL_CNN, "MultiInputPolicy": SMALL_CNNS}
    policy = POLICIES.get(observations, "MlpPolicy")
    make(PPOEWMA, policy, observations, actions, n_steps=6, batch_size=6, **sizes.get(policy, {})).learn(6, callback)
    assert len(callback.pairs) == 6
    for own, reference in callback.pairs:
        th.testing.assert_close(own[:3], reference[:3], rtol=1e-4, atol=1e-5)  # shapes and dtypes, too
        assert th.equal(own[3], reference[3])


def test_collection_builds_no_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(
        "stable_baselines3.common.distributions.Normal", lambda *args: built.append(1) or th.distributions.Normal(*args)
    )
    make().learn(16)
    assert len(built) <= 1  # the last one, for whoever reads policy.action_dist after the rollout
    make(engine="reference").learn(16)
    assert len(built) >= 16


STEP_CHANGES: dict[str, Callable[[Any], Any]] = {
    "weights": customizations.shrink,
    "data": customizations.shrink_data,
    "vector": customizations.load_from_vector,
    "head": customizations.new_head,
    "activation": customizations.other_activation,
    "layer": customizations.other_layer,
    "hook": CUSTOMIZATIONS["hook in a rollout"].apply,
    "hook of the policy": lambda model: model.policy.register_forward_hook(lambda m, i, o: (o[0], o[1] + 1, o[2])),
    "forward": CUSTOMIZATIONS["patch in a rollout"].apply,
    "forward of the policy": customizations.patch_method(
        lambda model: model.policy, "forward", lambda method: lambda *args: [method(*args)[0], *method(*args)[1:]]
    ),
    "log_prob": CUSTOMIZATIONS["distribution in a rollout"].apply,
    "distribution": customizations.own_distribution,
    "policy": customizations.new_policy,
    "mlp_extractor": lambda model: setattr(
        model.policy.mlp_extractor, "forward_critic", lambda features: features[:, :1].expand(-1, 8)
    ),
    "attribute": lambda model: setattr(model.policy, "action_dist", DiagGaussianDistribution(2)),
}


@pytest.mark.parametrize("actions", ["box", "multidiscrete"])
@pytest.mark.parametrize("name", STEP_CHANGES)
def test_changes_act_at_the_next_step(name: str, actions: str) -> None:
    if name == "attribute" and actions != "box":
        pytest.skip("a distribution for Box actions")
    buffers = []
    for engine in ("auto", "reference"):
        model = make(actions=actions, engine=engine, n_epochs=1, learning_rate=1e-5)
        callback = Acts(STEP_CHANGES[name], "step")
        model.learn(32, callback)
        buffers.append(
            {key: getattr(model.rollout_buffer, key) for key in ("values", "log_probs", "actions", "returns")}
        )
    for key, own in buffers[0].items():
        np.testing.assert_allclose(own, buffers[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("name", ["default", "multidiscrete", "images", "PPG"])
def test_copies_of_the_policy_in_a_callback(name: str, duplicate: Callable[[Any], Any]) -> None:
    def duplicates(model: Any) -> None:
        policy, obs = model.policy, th.as_tensor(model._last_obs)
        copied = duplicate(policy)
        assert_same(dict(copied.state_dict()), copy_parameters(model))
        with th.no_grad():
            assert_same(copied(obs, deterministic=True), policy.forward(obs, deterministic=True))
            before = policy(obs, deterministic=True)
            for parameter in copied.parameters():
                parameter.zero_()
            assert copied(obs)[1].abs().max() == 0
            assert_same(policy(obs, deterministic=True), before)
            copied.forward = lambda *_: "own"
            assert copied(obs) == "own"
        done.append(model)

    done: list[Any] = []
    make(**CHOICES[name][1]).learn(32, Acts(duplicates, "step"))
    assert len(done) == 1


def test_an_error_in_collection_leaves_the_policy_as_it_was() -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("broken")

    model = make()
    with pytest.raises(RuntimeError, match="broken"):
        model.learn(48, Acts(fail, "step"))
    calls: list[int] = []
    forward = model.policy.forward
    model.policy.forward = lambda *args: calls.append(1) or forward(*args)
    model.policy(th.zeros(1, 3))
    assert calls == [1]
