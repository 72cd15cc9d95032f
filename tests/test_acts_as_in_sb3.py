"""
What users do to a model acts as in SB3's PPO: the reference engine gives the same bits, the faster engines the same
numbers. Each case is something that a faster engine could overlook.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ppo_ewma import PPOEWMA, MaskablePPOEWMA
from tests.battery.envs import OBSERVATION_SPACES, VECTOR, SpaceEnv
from tests.battery.helpers import assert_same

ROLLOUT = 32
QUICK: dict[str, Any] = {"n_steps": ROLLOUT, "batch_size": 16, "n_epochs": 2, "learning_rate": 0.01, "seed": 0}
WAYS: dict[str, tuple[type[PPO], dict[str, Any]]] = {
    "PPO": (PPO, {}),
    "reference": (PPOEWMA, {"prox_decay": None, "engine": "reference"}),
    "auto": (PPOEWMA, {"prox_decay": None}),
}


def make(
    algorithm: type[PPO] = PPOEWMA,
    env: SpaceEnv | None = None,
    policy: str = "MlpPolicy",
    policy_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """:return: a small model whose actions depend on the observations before it has learned"""
    model: Any = algorithm(
        policy,
        copy.deepcopy(env or SpaceEnv()),
        policy_kwargs={"net_arch": [8], **(policy_kwargs or {})},
        device="cpu",
        **{**QUICK, **copy.deepcopy(kwargs)},
    )
    with th.no_grad():
        model.policy.action_net.weight.mul_(100)
    return model


def results(model: Any, run: Callable[[Any], Any]) -> dict[str, Any]:
    """
    :param model: a new model
    :param run: trains it, and may return further tensors
    :return: everything to compare
    """
    returned, buffer = run(model), model.rollout_buffer
    collected = {
        "log_probs": th.from_numpy(buffer.log_probs).flatten(),
        "values": th.from_numpy(buffer.values).flatten(),
    }
    return {**model.policy.state_dict(), **collected, **(returned or {})}


def assert_acts_as_in_sb3(run: Callable[[Any], Any], **kwargs: Any) -> None:
    """
    :param run: changes and trains a model, and may return further tensors to compare
    :param kwargs: arguments of :func:`make`
    """
    ppo, exact, auto = (results(make(algorithm, **own, **kwargs), run) for algorithm, own in WAYS.values())
    assert_same(exact, ppo)
    th.testing.assert_close(auto, ppo, rtol=1e-4, atol=1e-5)


class Acts(BaseCallback):
    """
    Calls functions with the model.

    :param start: at the start of the second rollout
    :param step: at every step, with the number of the step, from 1
    :param end: at the end of every rollout
    """

    def __init__(
        self,
        start: Callable[[Any], Any] | None = None,
        step: Callable[[Any, int], Any] | None = None,
        end: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.step, self.end = start, step, end

    def _on_rollout_start(self) -> None:
        if self.start is not None and self.num_timesteps == ROLLOUT:
            self.start(self.model)

    def _on_step(self) -> bool:
        if self.step is not None:
            self.step(self.model, self.n_calls)
        return True

    def _on_rollout_end(self) -> None:
        if self.end is not None:
            self.end(self.model)


def learn(model: Any, **acts: Any) -> None:
    model.learn(2 * ROLLOUT, callback=Acts(**acts))


def new_optimizer(model: Any) -> None:
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01, eps=1e-5)


# ---------------------------------------------------------------------- changes before training


class Scale(nn.Module):
    """Flattens and scales."""

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return inputs.flatten(1) * 0.1


class Noisy(nn.Linear):
    """Explores by noise, as NoisyNet's layers do."""

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return super().forward(inputs) + 0.1 * th.randn(self.out_features)


class Viewing(BaseFeaturesExtractor):
    """Relies on the order of its inputs in memory."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 8)
        self.convolution, self.linear = nn.Conv2d(3, 4, 4, 4), nn.Linear(4 * 9 * 9, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        outputs = self.convolution(observations)
        features: th.Tensor = self.linear(outputs.view(len(outputs), -1))
        return features


def replace_flatten(model: Any) -> None:
    model.policy.features_extractor.flatten = Scale()


def hook_flatten(model: Any) -> None:
    model.policy.features_extractor.flatten.register_forward_hook(lambda module, inputs, output: 0.1 * output)


def patch_flatten(model: Any) -> None:
    flatten = model.policy.features_extractor.flatten
    forward = flatten.forward
    flatten.forward = lambda inputs: 0.1 * forward(inputs)


def replace_critics_extractor(model: Any) -> None:
    model.policy.vf_features_extractor.extractors["vector"] = Scale()


def replace_shared_extractor(model: Any) -> None:
    model.policy.features_extractor = copy.deepcopy(model.policy.features_extractor)
    model.policy.features_extractor.extractors["vector"] = Scale()


def hook_mlp_extractor(model: Any) -> None:
    model.policy.mlp_extractor.register_forward_hook(lambda module, inputs, output: (output[0] * 3, output[1]))


def one_log_std(model: Any) -> None:
    model.policy.log_std = nn.Parameter(th.zeros(1))
    new_optimizer(model)


def scalar_log_std(model: Any) -> None:
    model.policy.log_std = nn.Parameter(th.zeros(()))
    new_optimizer(model)


def log_std_as_buffer(model: Any) -> None:
    log_std = model.policy.log_std.detach() - 1
    del model.policy.log_std
    model.policy.register_buffer("log_std", log_std)
    new_optimizer(model)


def log_std_as_tensor(model: Any) -> None:
    log_std = model.policy.log_std.detach() - 1
    del model.policy.log_std
    model.policy.log_std = log_std
    new_optimizer(model)


def noisy_heads(model: Any) -> None:
    model.policy.action_net, model.policy.value_net = Noisy(8, 3), Noisy(8, 1)
    new_optimizer(model)


def noisy_hooks(model: Any) -> None:
    for head in (model.policy.action_net, model.policy.value_net):
        head.register_forward_hook(lambda module, inputs, output: output + 0.1 * th.randn_like(output))


def layers_share_memory(model: Any) -> None:
    actor, critic = model.policy.mlp_extractor.policy_net[0], model.policy.mlp_extractor.value_net[0]
    critic.weight.data, critic.bias.data = actor.weight.data, actor.bias.data


def log_std_shares_memory(model: Any) -> None:
    model.policy.log_std.data = model.policy.action_net.bias.data


def fixed_head(model: Any) -> None:
    """The head's weight is not a parameter, as with hyper-networks."""
    head = model.policy.action_net
    weight = 0.5 * head.weight.detach()
    del head.weight
    head.weight = weight


def hook_that_views(model: Any) -> None:
    """Relies on the order of images in memory."""
    layer = model.policy.features_extractor.cnn[0]
    layer.register_forward_hook(lambda module, inputs, output: output.view(len(output), -1).mean() and None)


def replace_convolutions(model: Any) -> None:
    model.policy.features_extractor = Viewing(model.observation_space)
    new_optimizer(model)


def own_learning_rate(model: Any) -> None:
    """Overrides SB3's method, which gets one optimiser."""

    def update(optimizers: Any) -> None:
        optimizers.param_groups[0]["lr"] = 0.003

    model._update_learning_rate = update


def entropy_bonus_by_hook(model: Any) -> None:
    """An entropy bonus in every second minibatch."""
    calls: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            calls.append(0)
            model.ent_coef = 0.5 * (len(calls) % 2)

    model.policy.action_net.register_forward_hook(hook)


def forget_moments_by_hook(model: Any) -> None:
    calls: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            calls.append(0)
            if len(calls) == 3:
                model.policy.optimizer.state.clear()

    model.policy.action_net.register_forward_hook(hook)


class Warmup:
    """A learning rate that depends on how often it was asked for."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, progress_remaining: float) -> float:
        self.n_calls += 1
        return 0.01 * min(1.0, self.n_calls / 12)


BOX: dict[str, Any] = {"env": SpaceEnv(action_space="box"), "ent_coef": 0.01}
MATRIX: dict[str, Any] = {"env": SpaceEnv(OBSERVATION_SPACES["matrix"])}
ELU: dict[str, Any] = {"policy_kwargs": {"activation_fn": nn.ELU}}
SEPARATE: dict[str, Any] = {"policy_kwargs": {"share_features_extractor": False}}
DICT: dict[str, Any] = {"env": SpaceEnv(spaces.Dict({"vector": VECTOR})), "policy": "MultiInputPolicy"}
IMAGES: dict[str, Any] = {
    "env": SpaceEnv(OBSERVATION_SPACES["image_channels_first"]),
    "policy": "CnnPolicy",
    "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}},
    "learning_rate": 0.001,
}


class Case(NamedTuple):
    """
    :param change: changes the model
    :param kwargs: arguments of :func:`make`
    """

    change: Callable[[Any], None]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never changed


def nothing(model: Any) -> None:
    pass


BEFORE: dict[str, Case] = {
    "nothing": Case(nothing),
    "flatten replaced": Case(replace_flatten, MATRIX),
    "flatten hooked": Case(hook_flatten, MATRIX),
    "flatten patched": Case(patch_flatten, MATRIX),
    "critic's extractor of a dict replaced": Case(replace_critics_extractor, {**DICT, **SEPARATE}),
    "shared extractor of a dict replaced": Case(replace_shared_extractor, DICT),
    "mlp_extractor hooked": Case(hook_mlp_extractor),
    "one log_std": Case(one_log_std, BOX),
    "one log_std, other activation": Case(one_log_std, {**BOX, **ELU}),
    "scalar log_std": Case(scalar_log_std, BOX),
    "log_std is a buffer": Case(log_std_as_buffer, BOX),
    "log_std is a tensor": Case(log_std_as_tensor, BOX),
    "noisy heads": Case(noisy_heads),
    "noisy hooks": Case(noisy_hooks),
    "layers share memory": Case(layers_share_memory),
    "log_std shares memory": Case(log_std_shares_memory, BOX),
    "weight is a tensor": Case(fixed_head),
    "hook that views images": Case(hook_that_views, IMAGES),
    "extractor that views images": Case(replace_convolutions, IMAGES),
    "method of the learning rate overridden": Case(own_learning_rate),
    "schedule with a state": Case(nothing, {"learning_rate": Warmup()}),
    "hook sets ent_coef": Case(entropy_bonus_by_hook),
    "hook clears the optimizer": Case(forget_moments_by_hook),
}


@pytest.mark.parametrize("case", BEFORE.values(), ids=BEFORE)
def test_changes_before_training(case: Case) -> None:
    def run(model: Any) -> None:
        case.change(model)
        learn(model)

    assert_acts_as_in_sb3(run, **case.kwargs)


# ---------------------------------------------------------------------- changes by callbacks


def orthogonalize(model: Any) -> None:
    """QR gives matrices in column-major order."""
    weight = model.policy.mlp_extractor.policy_net[0].weight
    weight.data = th.linalg.qr(weight.data).Q


def channels_last(model: Any) -> None:
    model.policy.to(memory_format=th.channels_last)


def hook_critics_extractor(model: Any) -> None:
    model.policy.vf_features_extractor.register_forward_hook(lambda module, inputs, output: 0.1 * output)


def double_advantages(model: Any) -> None:
    model.rollout_buffer.advantages = model.rollout_buffer.advantages.astype(np.float64)


def double_returns(model: Any) -> None:
    buffer = model.rollout_buffer
    buffer.returns = buffer.values + buffer.advantages.astype(np.float64)


def at_step(number: int, change: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    """:return: changes the model at one step"""
    return lambda model, n_calls: change(model) if n_calls == number else None


CALLBACKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "column-major weight": ({"start": orthogonalize}, ELU),
    "channels last": ({"start": channels_last}, IMAGES),
    "weight is a tensor": ({"step": at_step(10, fixed_head)}, {}),
    "critic's extractor hooked": ({"step": at_step(40, hook_critics_extractor)}, SEPARATE),
    "advantages in double precision": ({"end": double_advantages}, {}),
    "returns in double precision": ({"end": double_returns}, {}),
}


@pytest.mark.parametrize(("acts", "kwargs"), CALLBACKS.values(), ids=CALLBACKS)
def test_changes_by_callbacks(acts: dict[str, Any], kwargs: dict[str, Any]) -> None:
    assert_acts_as_in_sb3(lambda model: learn(model, **acts), **kwargs)


def test_global_hook_within_a_rollout() -> None:
    def run(model: Any) -> None:
        handles: list[Any] = []

        def halve(module: nn.Module, inputs: Any, output: Any) -> Any:
            return 0.5 * output if isinstance(module, nn.Linear) else None

        def register(model: Any) -> None:
            handles.append(nn.modules.module.register_module_forward_hook(halve))

        try:
            learn(model, step=at_step(40, register))
        finally:
            for handle in handles:
                handle.remove()

    assert_acts_as_in_sb3(run)


def test_method_of_the_class_replaced_at_rollout_start() -> None:
    def run(model: Any) -> None:
        base = type(model.policy)
        own: Any = type("Own", (base,), {})
        model.policy.__class__ = own

        def replace(model: Any) -> None:
            own._get_action_dist_from_latent = lambda self, latent: base._get_action_dist_from_latent(self, latent * 5)

        learn(model, start=replace)

    assert_acts_as_in_sb3(run)


def test_head_trained_by_a_callback() -> None:
    """``zero_grad()`` clears its gradient before training."""

    def train(model: Any) -> None:
        head = model.policy.own_head
        ((head(th.from_numpy(model.rollout_buffer.observations.reshape(-1, 3))) - 1) ** 2).mean().backward()
        with th.no_grad():
            for parameter in head.parameters():
                parameter -= 0.1 * parameter.grad

    def run(model: Any) -> None:
        model.policy.own_head = nn.Linear(3, 1)
        new_optimizer(model)
        learn(model, end=train)

    assert_acts_as_in_sb3(run)


@pytest.mark.parametrize("predicts", [False, True])
def test_callbacks_read_the_distribution_of_the_step(predicts: bool) -> None:
    def run(model: Any) -> dict[str, th.Tensor]:
        read: list[th.Tensor] = []

        def entropy(model: Any, n_calls: int) -> None:
            read.append(model.policy.action_dist.distribution.entropy().mean().detach())
            if predicts:
                model.policy.predict(np.ones(3, np.float32))
                read.append(model.policy.action_dist.distribution.entropy().mean().detach())

        learn(model, step=entropy)
        return {"entropies": th.stack(read)}

    assert_acts_as_in_sb3(run)


# ---------------------------------------------------------------------- changes between minibatches


class ActingBuffer(RolloutBuffer):
    """Calls ``act`` with the number of the minibatch, from 1, before it yields it."""

    act: Callable[[int], None]
    n_minibatches = 0

    def get(self, batch_size: int | None = None) -> Iterator[Any]:  # type: ignore[override]  # an iterator will do
        for samples in super().get(batch_size):
            self.n_minibatches += 1
            self.act(self.n_minibatches)
            yield samples


class DoubleBuffer(RolloutBuffer):
    """Advantages in double precision."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages = self.advantages.astype(np.float64)


def set_learning_rate(model: Any, number: int) -> None:
    model.policy.optimizer.param_groups[0]["lr"] = 0.01 * (number % 3)


@th.no_grad()
def clamp(model: Any, number: int) -> None:
    for parameter in model.policy.parameters():
        parameter.clamp_(-0.3, 0.3)


def freeze(model: Any, number: int) -> None:
    model.policy.action_net.weight.requires_grad_(number % 2 == 0)


def forget_moments(model: Any, number: int) -> None:
    if number == 3:
        model.policy.optimizer.state.clear()


def other_optimizer(model: Any, number: int) -> None:
    if number == 3:
        model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=0.1)


def assign(name: str, value: Callable[[int], Any]) -> Callable[[Any, int], None]:
    """:return: sets an attribute to what a function gives for the number of the minibatch"""
    return lambda model, number: setattr(model, name, value(number))


BETWEEN: dict[str, Callable[[Any, int], None]] = {
    "learning rate": set_learning_rate,
    "parameters": clamp,
    "requires_grad": freeze,
    "moments": forget_moments,
    "optimizer": other_optimizer,
    "ent_coef": assign("ent_coef", lambda number: 0.5 * (number % 2)),
    "vf_coef": assign("vf_coef", lambda number: 0.5 * (number % 2)),
    "max_grad_norm": assign("max_grad_norm", lambda number: 0.01 if number % 2 else 0.5),
    "batch_size": assign("batch_size", lambda number: 8 if number > 1 else 16),
    "normalize_advantage": assign("normalize_advantage", lambda number: number % 2 == 0),
    "target_kl": assign("target_kl", lambda number: 1e-9 if number == 3 else None),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_changes_between_minibatches(change: Callable[[Any, int], None]) -> None:
    def run(model: Any) -> None:
        model.rollout_buffer.act = lambda number: change(model, number)
        learn(model)

    assert_acts_as_in_sb3(run, rollout_buffer_class=ActingBuffer)


def test_get_of_the_buffer_replaced() -> None:
    def run(model: Any) -> None:
        own_get = model.rollout_buffer.get

        def get(batch_size: int | None = None) -> Iterator[Any]:
            for samples in own_get(batch_size):
                clamp(model, 0)
                yield samples

        model.rollout_buffer.get = get
        learn(model)

    assert_acts_as_in_sb3(run)


def test_buffer_in_double_precision() -> None:
    assert_acts_as_in_sb3(learn, rollout_buffer_class=DoubleBuffer)


# ---------------------------------------------------------------------- functions, gradients, generators


def test_patched_clip_grad_norm() -> None:
    clip = nn.utils.clip_grad_norm_

    def tenth(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> th.Tensor:
        return clip(parameters, 0.1 * max_norm, *args, **kwargs)

    with patch.object(nn.utils, "clip_grad_norm_", tenth):
        assert_acts_as_in_sb3(learn, max_grad_norm=0.01)  # so small that Adam's epsilon counts


def test_patched_distribution() -> None:
    with patch.object(CategoricalDistribution, "sample", CategoricalDistribution.mode):
        assert_acts_as_in_sb3(learn)


def test_coefficient_with_a_gradient() -> None:
    def run(model: Any) -> dict[str, Any]:
        model.ent_coef = nn.Parameter(th.tensor(0.01))
        learn(model)
        return {"gradient": model.ent_coef.grad}

    assert_acts_as_in_sb3(run)


def test_training_leaves_clipped_gradients() -> None:
    def run(model: Any) -> dict[str, Any]:
        learn(model)
        return {f"gradient of {name}": each.grad for name, each in model.policy.named_parameters()}

    assert_acts_as_in_sb3(run, max_grad_norm=0.1)


def test_set_parameters_does_not_rewind_generators() -> None:
    def run(model: Any) -> dict[str, Any]:
        model.learn(ROLLOUT)
        best = copy.deepcopy(model.get_parameters())
        model.learn(ROLLOUT, reset_num_timesteps=False)
        model.set_parameters(best)
        model.learn(ROLLOUT, reset_num_timesteps=False)
        return {"generator": th.get_rng_state()}

    assert_acts_as_in_sb3(run)


def test_heads_are_called_in_sb3s_order() -> None:
    def run(model: Any) -> dict[str, Any]:
        calls: list[int] = []
        model.policy.action_net.register_forward_hook(lambda *_: calls.append(0))
        model.policy.value_net.register_forward_hook(lambda *_: calls.append(1))
        learn(model)
        return {"first calls": th.tensor(calls[:ROLLOUT])}

    assert_acts_as_in_sb3(run)


# ---------------------------------------------------------------------- errors


class StopError(Exception):
    """Raised by a callback."""


class MissingValues(SpaceEnv):
    """Missing values are NaN."""

    def observation(self) -> Any:
        observation = super().observation()
        observation[0] = np.nan
        return observation


class WithoutNan(BaseFeaturesExtractor):
    """Takes missing values."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.nan_to_num(observations)


def stop(model: Any) -> None:
    raise StopError


@pytest.mark.parametrize(("algorithm", "own"), WAYS.values(), ids=WAYS)
def test_exception_of_a_callback_beside_missing_values(algorithm: type[PPO], own: dict[str, Any]) -> None:
    model = make(algorithm, MissingValues(), policy_kwargs={"features_extractor_class": WithoutNan}, **own)
    with pytest.raises(StopError):
        learn(model, step=at_step(20, stop))


@pytest.mark.parametrize(("algorithm", "own"), WAYS.values(), ids=WAYS)
def test_incomplete_rollout_is_refused(algorithm: type[PPO], own: dict[str, Any]) -> None:
    model = make(algorithm, **own)
    with pytest.raises(StopError):
        learn(model, step=at_step(20, stop))
    with pytest.raises(AssertionError):
        model.train()


@pytest.mark.parametrize(("algorithm", "own"), WAYS.values(), ids=WAYS)
def test_n_steps_below_the_size_of_the_buffer_is_refused(algorithm: type[PPO], own: dict[str, Any]) -> None:
    model = make(algorithm, **own)
    model.n_steps = ROLLOUT // 2
    with pytest.raises(AssertionError):
        learn(model)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("engine", "refrence", "engine must be one of .*'refrence'"), ("kl_coef", -1, "kl_coef must be >= 0, got -1")],
)
def test_parameters_set_by_callbacks_are_checked(name: str, value: Any, message: str, engine: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(make(engine=engine), end=lambda model: setattr(model, name, value))


# ---------------------------------------------------------------------- the proximal policy


class Masked(SpaceEnv):
    """Allows all actions."""

    def action_masks(self) -> np.ndarray:
        return np.ones(3, bool)


@pytest.mark.parametrize("kwargs", [{}, {"engine": "reference"}, {"prox_decay": None}], ids=str)
@pytest.mark.parametrize("algorithm", [PPOEWMA, MaskablePPOEWMA])
def test_proximal_policy_calls_hooks_of_the_mlp_extractor(algorithm: Any, kwargs: dict[str, Any]) -> None:
    """At a learning rate of 0, the proximal policy is the policy, so that no ratio is clipped."""
    model = make(algorithm, Masked(), learning_rate=0.0, **kwargs)
    hook_mlp_extractor(model)
    learn(model)
    assert model.logger.name_to_value["train/clip_fraction"] == 0
