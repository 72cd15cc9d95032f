"""
The average follows the policy: what users change in a policy during or between trainings acts as in SB3's PPO, and the
proximal policy has it too.
"""

import copy
import pathlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA
from tests.battery.envs import SpaceEnv
from tests.battery.helpers import assert_same, copy_parameters

ROLLOUT = 16
QUICK: dict[str, Any] = {"n_steps": ROLLOUT, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
PHASES: dict[str, Any] = {"n_policy_iterations": 1, "n_aux_epochs": 2, "aux_batch_size": 8}
ENGINES = ["auto", "reference"]
EXACT: dict[str, Any] = {"prox_decay": None, "engine": "reference"}
RESTARTED = "parameters were changed outside of training"


def make(algorithm: type[PPO] = PPOEWMA, extractor: type[BaseFeaturesExtractor] | None = None, **kwargs: Any) -> Any:
    policy_kwargs: dict[str, Any] = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    if extractor is not None:
        policy_kwargs["features_extractor_class"] = extractor
    return algorithm("MlpPolicy", SpaceEnv(), policy_kwargs=policy_kwargs, **{**QUICK, "learning_rate": 0.01, **kwargs})


def large_head(extractor: type[BaseFeaturesExtractor], **kwargs: Any) -> PPOEWMA:
    """:return: a model whose actions depend on the observations before it has learned"""
    model = make(extractor=extractor, **kwargs)
    with th.no_grad():
        model.policy.action_net.weight.mul_(100)
    return model


def logged(model: Any) -> dict[str, float]:
    return {key: float(value) for key, value in model.logger.name_to_value.items() if key.startswith("train/")}


def restarts(caught: list[Any]) -> int:
    return sum(RESTARTED in str(warning.message) for warning in caught)


# ---------------------------------------------------------------------- changes while training


class Temperature(BaseFeaturesExtractor):
    """A layer, divided by an attribute that is no parameter."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.layer, self.temperature = nn.Linear(3, 8), 1.0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layer(observations)
        return features / self.temperature


def lower_temperature(policy: Any) -> None:
    policy.features_extractor.temperature = 0.1


def add_hook(policy: Any) -> None:
    policy.action_net.register_forward_hook(lambda module, inputs, output: 50 * output + th.arange(3.0))


def patch_forward(policy: Any) -> None:
    forward = policy.action_net.forward
    policy.action_net.forward = lambda inputs: 50 * forward(inputs) + th.arange(3.0)


def replace_head(policy: Any) -> None:
    policy.action_net = different(policy.action_net)


def load_head(policy: Any) -> None:
    policy.load_state_dict({**policy.state_dict(), **different(policy.action_net, "action_net.").state_dict()})


def different(head: nn.Linear, prefix: str = "") -> Any:
    """:return: a layer of the same shape with other weights; with a prefix, in a module where it has this name"""
    layer = copy.deepcopy(head)
    with th.no_grad():
        layer.weight.mul_(50)
        layer.bias.copy_(th.arange(3.0))
    return nn.ModuleDict({prefix.rstrip("."): layer}) if prefix else layer


CHANGES: list[Callable[[Any], None]] = [lower_temperature, add_hook, patch_forward, replace_head, load_head]


class Change(BaseCallback):
    """
    Changes the policy once, when the second rollout begins, or when it ends, before it is trained on.

    :param change: takes the policy
    :param at_end: whether when it ends
    """

    def __init__(self, change: Callable[[Any], None], at_end: bool = False) -> None:
        super().__init__()
        self.change, self.at_end = change, at_end

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._at(False)

    def _on_rollout_end(self) -> None:
        self._at(True)

    def _at(self, end: bool) -> None:
        if end == self.at_end and self.model.num_timesteps == (2 if end else 1) * ROLLOUT:
            self.change(self.model.policy)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_act_as_in_ppo(change: Callable[[Any], None], at_end: bool) -> None:
    ppo, exact, fast = (
        make(algorithm, Temperature, **kwargs).learn(4 * ROLLOUT, Change(change, at_end))
        for algorithm, kwargs in ((PPO, {}), (PPOEWMA, EXACT), (PPOEWMA, {"prox_decay": None}))
    )
    expected = copy_parameters(ppo)
    assert_same(copy_parameters(exact), expected)
    for name, value in copy_parameters(fast).items():
        th.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    unchanged = copy_parameters(make(PPO, Temperature).learn(4 * ROLLOUT))
    assert not th.allclose(expected["action_net.weight"], unchanged["action_net.weight"])


@pytest.mark.filterwarnings(f"ignore:.*{RESTARTED}")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_average_has_the_change(change: Callable[[Any], None], at_end: bool, engine: str) -> None:
    """At a learning rate of 0, the average is the policy, whatever else was changed in it."""
    model = large_head(Temperature, learning_rate=0.0, engine=engine)
    model.learn(2 * ROLLOUT, Change(change, at_end))
    assert logged(model)["train/clip_fraction"] == 0
    assert logged(model)["train/approx_kl_prox"] == pytest.approx(0, abs=1e-10)
    # The comparison means something: against the policy that collected, the change shows.
    assert (logged(model)["train/importance_ratio_max"] > 1.1) == at_end
    obs = th.ones(4, 3)
    probabilities = [each.policy.get_distribution(obs).distribution.probs for each in (model, large_head(Temperature))]
    assert not th.allclose(*probabilities, atol=0.01)


# ---------------------------------------------------------------------- changes between trainings


def test_loaded_parameters_restart_the_average_with_one_warning() -> None:
    model = make(prox_decay=0.5, n_epochs=1).learn(2 * ROLLOUT)
    model.policy.load_state_dict(make(seed=1).policy.state_dict())
    iterates = [copy_parameters(model)]
    model.policy.optimizer.register_step_post_hook(lambda *_: iterates.append(copy_parameters(model)))
    with pytest.warns(UserWarning, match=RESTARTED) as caught:
        model.learn(ROLLOUT, reset_num_timesteps=False)
    assert restarts(caught) == 1
    # Weights ¼, ½, 1 for the loaded parameters and those after the two steps
    for name, average in model.proximal_policy.state_dict().items():
        expected = (0.25 * iterates[0][name] + 0.5 * iterates[1][name] + iterates[2][name]) / 1.75
        th.testing.assert_close(average, expected)
    model.policy.load_state_dict(make(seed=2).policy.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        model.learn(ROLLOUT, reset_num_timesteps=False)


@pytest.mark.parametrize("how", ["set_parameters", "before the first training"])
def test_what_is_no_change_from_outside_is_not_warned_of(how: str) -> None:
    model = make()
    if how == "set_parameters":
        model.learn(ROLLOUT)
        model.set_parameters(make(seed=1).learn(ROLLOUT).get_parameters())
    else:
        model.policy.load_state_dict(make(seed=1).policy.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2 * ROLLOUT, reset_num_timesteps=False)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as LoRA adds them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        outputs: th.Tensor = self.layer(inputs) + self.up(self.down(inputs))
        return outputs


def adapt(policy: Any) -> None:
    policy.requires_grad_(False)
    policy.action_net, policy.value_net = Adapted(policy.action_net), Adapted(policy.value_net)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.optimizer = th.optim.Adam(trained, lr=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_are_trained_with_one_warning(engine: str) -> None:
    model = make(engine=engine, n_epochs_value=3).learn(2 * ROLLOUT)
    adapt(model.policy)
    before = copy_parameters(model)
    with pytest.warns(UserWarning, match=f"{RESTARTED}: policy_ewma, value_optimizer started afresh") as caught:
        model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert restarts(caught) == 1
    changed = {name for name, value in copy_parameters(model).items() if not th.equal(value, before[name])}
    assert changed == {f"{net}.{name}.weight" for net in ("action_net", "value_net") for name in ("down", "up")}
    average = dict(model.proximal_policy.named_parameters())
    assert not th.equal(average["action_net.up.weight"], model.policy.action_net.up.weight)
    assert not th.equal(average["action_net.up.weight"], before["action_net.up.weight"])


def test_adapters_are_trained_as_in_ppo() -> None:
    trained = []
    for algorithm, kwargs in ((PPO, {}), (PPOEWMA, EXACT)):
        model = make(algorithm, **kwargs).learn(2 * ROLLOUT)
        adapt(model.policy)
        trained.append(copy_parameters(model.learn(2 * ROLLOUT, reset_num_timesteps=False)))
    assert_same(*trained)


@pytest.mark.filterwarnings(f"ignore:.*{RESTARTED}")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("replaced", ["head", "policy"])
def test_value_optimizer_follows(replaced: str, engine: str) -> None:
    model = make(n_epochs=1, n_epochs_value=2, engine=engine).learn(ROLLOUT)
    if replaced == "head":
        model.policy.value_net = nn.Linear(8, 1)
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01)
    else:
        model.policy = make(seed=1).policy
    before = copy_parameters(model)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    after = copy_parameters(model)
    assert not any(th.equal(after[name], before[name]) for name in before)


@pytest.mark.filterwarnings(f"ignore:.*{RESTARTED}")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("algorithm", [PPG, PPGEWMA])
@pytest.mark.parametrize("replaced", ["head", "policy"])
def test_aux_optimizer_follows(replaced: str, algorithm: type[PPG], engine: str) -> None:
    model = make(algorithm, **PHASES, engine=engine).learn(ROLLOUT)
    if replaced == "head":
        model.policy.aux_value_net = nn.Linear(8, 1)
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01)
    else:
        model.policy = make(algorithm, seed=1).policy
    before = copy_parameters(model)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    # Only phases train this head.
    assert not th.equal(model.policy.aux_value_net.weight, before["aux_value_net.weight"])
    assert not th.equal(model.policy.action_net.weight, before["action_net.weight"])


@pytest.mark.filterwarnings(f"ignore:.*{RESTARTED}")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [(PPOEWMA, {"n_epochs_value": 3}), (PPG, PHASES), (PPGEWMA, {**PHASES, "n_epochs_value": 3})],
)
def test_what_the_optimizer_leaves_out_stays_untrained(algorithm: type[PPO], kwargs: Any, engine: str) -> None:
    model = make(algorithm, **kwargs, engine=engine)
    heads = ("action_net", "value_net", "aux_value_net")
    trained = [parameter for name, parameter in model.policy.named_parameters() if name.startswith(heads)]
    model.policy.optimizer = th.optim.Adam(trained, lr=0.01)
    before = copy_parameters(model)
    model.learn(2 * ROLLOUT)
    for name, value in copy_parameters(model).items():
        assert th.equal(value, before[name]) == (not name.startswith(heads)), name


# ---------------------------------------------------------------------- what cannot be copied


class WeightNorm(BaseFeaturesExtractor):
    """A layer whose weight is computed anew before every forward pass."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.layer = nn.utils.weight_norm(nn.Linear(3, 8))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.layer(observations)
        return features


class SpectralNorm(WeightNorm):
    """A layer whose buffers change with every forward pass in training."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.layer = nn.utils.spectral_norm(nn.Linear(3, 8))


class Locked(Temperature):
    """Has a lock."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.lock = threading.Lock()


class Writing(Temperature):
    """Has an open file."""

    def __init__(self, observation_space: Any, file: Any) -> None:
        super().__init__(observation_space)
        self.file = file


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("extractor", "reason"),
    [(WeightNorm, "deepcopy"), (SpectralNorm, "deepcopy"), (Locked, "lock"), (Writing, "TextIOWrapper")],
)
def test_policies_that_cannot_be_copied_are_trained(
    extractor: type[BaseFeaturesExtractor], reason: str, engine: str, tmp_path: pathlib.Path
) -> None:
    with (tmp_path / "log").open("w") as file:
        kwargs = {"features_extractor_kwargs": {"file": file}} if extractor is Writing else {}
        ppo, exact, model = (
            make(algorithm, extractor, policy_kwargs=kwargs, **own).learn(3 * ROLLOUT)
            for algorithm, own in ((PPO, {}), (PPOEWMA, EXACT), (PPOEWMA, {"engine": engine}))
        )
        assert_same(copy_parameters(exact), copy_parameters(ppo))
        assert 0 < logged(model)["train/approx_kl_prox"] < 1
        with pytest.raises(ValueError, match=f"the policy cannot be copied: .*{reason}"):
            _ = model.proximal_policy


def test_proximal_policy_is_a_snapshot() -> None:
    model = make(prox_decay=0.9).learn(ROLLOUT)
    first, second = model.proximal_policy, model.proximal_policy
    assert first is not second
    before = copy.deepcopy(first.state_dict())
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert_same(dict(first.state_dict()), dict(before))
    assert not th.equal(model.proximal_policy.action_net.weight, first.action_net.weight)
    with th.no_grad():
        first.action_net.weight.zero_()
    assert model.proximal_policy.action_net.weight.any()
    assert second.action_net.weight.any()
    assert model.policy.action_net.weight.any()


# ---------------------------------------------------------------------- what forward passes leave behind


class Counting(BaseFeaturesExtractor):
    """Counts its forward passes, in a number and in a buffer, and keeps running statistics."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 3)
        self.norm, self.n_calls = nn.BatchNorm1d(3, affine=False), 0
        self.register_buffer("n_samples", th.zeros((), dtype=th.int64))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.n_calls += 1
        self.n_samples += len(observations)
        features: th.Tensor = self.norm(observations)
        return features


@pytest.mark.parametrize("kwargs", [{"staleness": 0}, {"kl_coef": 1.0, "kl_estimator": "analytic"}])
@pytest.mark.parametrize("engine", ENGINES)
def test_forward_passes_leave_behind_what_ppo_leaves(engine: str, kwargs: dict[str, Any]) -> None:
    """The proximal policy is evaluated beside: at a learning rate of 0, everything else is as in PPO."""
    ppo = make(PPO, Counting, learning_rate=0.0).learn(3 * ROLLOUT)
    model = make(PPOEWMA, Counting, learning_rate=0.0, engine=engine, **kwargs).learn(3 * ROLLOUT)
    assert_same(dict(model.policy.named_buffers()), dict(ppo.policy.named_buffers()))
    assert model.policy.features_extractor.n_calls == ppo.policy.features_extractor.n_calls
    assert ppo.policy.features_extractor.norm.num_batches_tracked == 3 * 2 * 2  # rollouts, epochs, minibatches
    assert_same(dict(model.proximal_policy.named_buffers()), dict(ppo.policy.named_buffers()))
