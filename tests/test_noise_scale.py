"""The gradient noise scale: its statistics, what is measured, and that training does not notice."""

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_ppo_ewma import PPOEWMA, NoiseScaleCallback, RecurrentPPOEWMA
from sb3_ppo_ewma.callbacks.noise_scale import NoiseEstimate, estimate_noise
from sb3_ppo_ewma.evaluation import Evaluation, Minibatch
from tests.resume import ENVIRONMENTS, N_STEPS, NORMALIZED, QUICK, RUNS, DictWalkEnv, WalkEnv, phases
from tests.test_resume import differences

SMALL = {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [8]}}
BOX = spaces.Box(-1, 1, (2,))


def make(algorithm: type = PPOEWMA, env: Any = None, **kwargs: Any) -> Any:
    return algorithm(env=WalkEnv(spaces.Discrete(3)) if env is None else env, **{**QUICK, "seed": 0, **SMALL, **kwargs})


def keys(model: BaseAlgorithm) -> set[str]:
    return {key for key in model.logger.name_to_value if key.startswith("noise_scale/")}


class Watch(BaseCallback):
    """Calls a function at the end of every rollout."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.look = look

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.look()


# ---------------------------------------------------------------------- statistics


def test_estimates_worked_out_by_hand():
    # ḡ = (2, 2), deviations ∓(1, 2): tr Σ = 3·(5 + 5)/1 = 30, |G|² = 8 − 30/6 = 3
    estimate = estimate_noise(iter([th.tensor([1.0, 0.0]), th.tensor([3.0, 4.0])]), batch_size=3)
    assert estimate == pytest.approx((3, 30))
    assert estimate.noise_scale == pytest.approx(10)


def test_estimates_are_those_of_the_source():
    # Appendix A.1 with |G_small|² = (1 + 25)/2 = 13, |G_big|² = 8, B_small = 3, B_big = 6:
    # |G|² = (6·8 − 3·13)/(6 − 3) = 3, S = (13 − 8)/(1/3 − 1/6) = 30
    gradients = [th.tensor([1.0, 0.0]), th.tensor([3.0, 4.0])]
    assert estimate_noise(gradients, 3) == pytest.approx(((6 * 8 - 3 * 13) / 3, (13 - 8) / (1 / 3 - 1 / 6)))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_estimates_are_unbiased(n):
    # A gradient of 7 samples is (0, 0) or (2, 4), each half of the time: G = (1, 2), tr Σ = 7·(1 + 4)
    possible = (th.tensor([0.0, 0.0], dtype=th.float64), th.tensor([2.0, 4.0], dtype=th.float64))
    estimates = [estimate_noise(gradients, 7) for gradients in itertools.product(possible, repeat=n)]
    assert np.mean(estimates, axis=0) == pytest.approx([5, 35])


def test_small_noise_of_a_large_gradient_does_not_cancel():
    # Differences of squares of 1e4 in float32 would have errors of about 10
    noise = th.tensor([1.0, -1.0]) / 16
    estimate = estimate_noise([th.full((1,), 1e4) + each for each in noise], batch_size=1)
    assert estimate.trace == pytest.approx(2 / 16**2)


def test_scale_is_none_where_there_is_no_gradient():
    assert NoiseEstimate(squared_norm=-1.0, trace=2.0).noise_scale is None
    assert NoiseEstimate(squared_norm=0.0, trace=0.0).noise_scale is None
    with pytest.raises(ValueError, match="at least 2, got 1"):
        estimate_noise([th.ones(3)], 1)


# ---------------------------------------------------------------------- known noise scales


class Bandit(gym.Env):
    """One step, an observation of zeros: the outputs of networks without hidden layers are their biases."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-10, 10, (1,))

    def __init__(self, reward):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), float(self.reward(action)), True, False, {}


def of_bandit(reward, n_steps: int, n_batches: int, n_rollouts: int = 1, **kwargs) -> tuple[Any, NoiseScaleCallback]:
    callback = NoiseScaleCallback(n_batches, decay=0.99)
    kwargs = {"policy_kwargs": {"net_arch": []}, "learning_rate": 0.0, "n_epochs": 1, **kwargs}
    model = make(env=Bandit(reward), n_steps=n_steps, batch_size=n_steps, **kwargs)
    return model.learn(n_rollouts * n_steps, callback, log_interval=None), callback


def test_value_loss_has_the_noise_scale_of_the_returns():
    # Rewards 3, −1, 3, −1, …; V = 0: with vf_coef ½, the gradient of a sample is −R. 64 batches of one sample:
    # tr Σ = 64/63·4 = 256/63, |G|² = 1 − (256/63)/64 = 59/63
    rewards = itertools.cycle([3.0, -1.0])
    model, callback = of_bandit(lambda _: next(rewards), 64, 64, n_epochs_value=2)
    assert callback.estimates["value"] == pytest.approx((59 / 63, 256 / 63), rel=1e-5)
    assert model.logger.name_to_value["noise_scale/value"] == pytest.approx(256 / 59, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("n_epochs_value", "name", "expected"), [(2, "policy", 12), (None, "joint", 13)])
def test_linear_gaussian_bandit_has_its_noise_scale(n_epochs_value, name, expected):
    # a ~ N(0, 1), Â = R = a. Gradients of a sample: −a·a of the mean, with expectation −1 and variance 3 − 1 = 2;
    # −a·(a² − 1) of the logarithm of the standard deviation, with 0 and E[a⁶ − 2a⁴ + a²] = 15 − 6 + 1 = 10.
    # |G|² = 1, tr Σ = 12. The joint loss adds that of V, −R, with 0 and 1.
    model, callback = of_bandit(lambda action: action[0], 2048, 128, 2, n_epochs_value=n_epochs_value)
    assert callback.estimates[name].squared_norm == pytest.approx(1, abs=0.2)
    assert model.logger.name_to_value[f"noise_scale/{name}"] == pytest.approx(expected, rel=0.25)


def test_nothing_is_logged_without_a_gradient():
    model, callback = of_bandit(lambda _: 0.0, 64, 8)
    assert callback.estimates["joint"] == (0, 0)
    assert keys(model) == set()


# ---------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    ("kwargs", "rel"),
    [
        ({"prox_decay": 0.9, "advantage_decay": 0.5}, 1e-4),
        ({"prox_decay": 0.9, "normalize_advantage": False}, 1e-4),
        # SB3's standard deviation is the unbiased one: its square has another factor of 63/64.
        ({"prox_decay": 0.9}, 2e-2),
        ({"prox_decay": None, "kl_coef": 10.0, "kl_estimator": "analytic"}, 2e-2),
    ],
)
def test_gradient_is_that_of_the_first_step(kwargs, rel):
    # One step of gradient descent per rollout: |Δθ|²/lr² = |ḡ|² = |G|² + tr Σ/n
    learning_rate = 0.3
    model = make(
        n_steps=64,
        batch_size=64,
        n_epochs=1,
        learning_rate=learning_rate,
        max_grad_norm=float("inf"),
        clip_range=lambda progress: 0.02 * progress,
        ent_coef=0.1,
        policy_kwargs={"net_arch": [8], "optimizer_class": th.optim.SGD},
        **kwargs,
    )
    with th.no_grad():
        for parameter in model.policy.parameters():  # so that the average is not yet the policy
            parameter.add_(0.1 * th.randn(parameter.shape))
    callback = NoiseScaleCallback(n_batches=4, decay=0)
    measured, steps, clipped = [], [], []
    train = model.train

    def watched_train() -> None:
        before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
        train()
        change = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach() - before
        steps.append(float(change.square().sum()) / learning_rate**2)
        clipped.append(model.logger.name_to_value["train/clip_fraction"])

    def look() -> None:
        squared_norm, trace = callback.estimates["joint"]
        measured.append(squared_norm + trace / 64)

    model.train = watched_train
    model.learn(4 * 64, [callback, Watch(look)], log_interval=None)
    assert measured == pytest.approx(steps, rel=rel)
    assert len(steps) == 4
    assert kwargs["prox_decay"] is None or max(clipped) > 0.1


class RecordingModel(PPOEWMA):
    """Notes number of samples and mode of the policy at every loss of the policy."""

    def extra_loss(self, evaluation: Evaluation, minibatch: Minibatch) -> th.Tensor:
        vars(self).setdefault("seen", []).append((len(minibatch.actions), self.policy.training))
        return th.zeros(())


def test_batches_are_evaluated_as_in_training():
    model = make(RecordingModel).learn(N_STEPS, NoiseScaleCallback(n_batches=5))
    # 32 samples: 5 batches of 6 for "joint" and for "policy", the rest is left out; then training, in minibatches of 24
    assert model.seen[:12] == [(6, True)] * 10 + [(24, True), (8, True)]


def test_joint_loss_is_measured_where_it_is_minimised():
    model = make().learn(64, callback := NoiseScaleCallback(4), log_interval=None)
    assert callback.estimates.keys() == {"joint", "policy", "value"}
    assert {"noise_scale/joint", "noise_scale/value"} <= keys(model)
    make(n_epochs_value=1).learn(64, callback := NoiseScaleCallback(4))
    assert callback.estimates.keys() == {"policy", "value"}
    make(n_epochs_value=QUICK["n_epochs"]).learn(64, callback := NoiseScaleCallback(4))
    assert callback.estimates.keys() == {"joint", "policy", "value"}


def test_frozen_network_has_no_noise():
    model = build("ppg, images", n_aux_epochs=0)
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("value" in name)
    model.learn(2 * N_STEPS, callback := NoiseScaleCallback(4), log_interval=None)
    assert callback.estimates["policy"] == (0, 0)
    assert callback.estimates["joint"].trace == pytest.approx(callback.estimates["value"].trace, rel=0.5)
    assert callback.estimates["value"].trace > 0


def test_both_estimates_are_averaged_over_measurements():
    single, every_second = NoiseScaleCallback(4, decay=0), NoiseScaleCallback(4, decay=0.5, every=2)
    measured = []
    make().learn(5 * 32, [single, every_second, Watch(lambda: measured.append(single.estimates["joint"]))])
    assert len(set(measured)) == 5
    weights = [0.25, 0, 0.5, 0, 1]
    expected = np.average(measured, axis=0, weights=weights)
    assert every_second.estimates["joint"] == pytest.approx(tuple(expected))


# ---------------------------------------------------------------------- training does not notice


def build(name: str, **changed: Any) -> BaseAlgorithm:
    algorithm, action_space, kwargs = RUNS[name]
    environment = ENVIRONMENTS.get(name, WalkEnv)
    env: VecEnv = DummyVecEnv([lambda: environment(action_space)] * 2)
    if name in NORMALIZED:
        env = VecNormalize(env)
    return algorithm(env=env, **{**QUICK, "seed": 0, **kwargs, **changed})


def state(model: BaseAlgorithm) -> dict[str, Any]:
    log = {key: float(value) for key, value in model.logger.name_to_value.items() if not key.startswith("noise_")}
    progress = model._current_progress_remaining
    return {**model.get_parameters(), "phases": phases(model), "log": log, "progress": progress}


def run(callback: NoiseScaleCallback | None, name: str, **changed: Any) -> dict[str, Any]:
    model = build(name, **changed)
    # So many that every auxiliary phase is reached
    return state(model.learn(4 * model.n_steps * model.n_envs, callback, log_interval=None))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"seeded"}))  # all are seeded here
def test_training_is_the_same_to_the_bit(name):
    callback = NoiseScaleCallback(n_batches=4)
    assert differences(run(None, name), run(callback, name)) == []
    assert all(estimate.trace > 0 for estimate in callback.estimates.values())
    assert ("joint" in callback.estimates) == ("n_epochs_value" not in RUNS[name][2])


def test_training_with_schedules_and_moments_is_the_same_to_the_bit():
    settings = {"prox_decay": "auto", "advantage_decay": 0.7, "clip_range": lambda progress: 0.1 * progress}
    plain = run(None, "ewma", **settings)
    assert differences(plain, run(NoiseScaleCallback(4), "ewma", **settings)) == []
    assert differences(plain, run(NoiseScaleCallback(4), "ewma")) != []  # the comparison can fail


class NoisyExtractor(BaseFeaturesExtractor):
    """Draws random numbers and keeps statistics, in training only."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.layers = th.nn.Sequential(th.nn.Linear(2, 8), th.nn.BatchNorm1d(8), th.nn.Dropout(0.2))

    def forward(self, observations):
        return self.layers(observations)


def test_running_statistics_and_dropout_are_the_same_to_the_bit():
    kwargs = {"net_arch": [8], "features_extractor_class": NoisyExtractor}
    states = [run(callback, "ewma", policy_kwargs=kwargs) for callback in (None, NoiseScaleCallback(4))]
    assert differences(*states) == []


@pytest.mark.parametrize("name", ["ewma", "ppg, dictionaries"])
def test_nothing_is_left_behind(name):
    model = build(name)
    looks: list[tuple[Any, ...]] = []

    def look() -> None:
        buffer = model.rollout_buffer
        arrays = [*buffer.observations.values()] if isinstance(buffer.observations, dict) else [buffer.observations]
        looks.append(
            (
                *(id(parameter.grad) for parameter in model.policy.parameters()),
                *(module.training for module in model.policy.modules()),
                *map(id, [*arrays, buffer.actions, buffer.advantages]),
                buffer.generator_ready,
                model._current_progress_remaining,
                *(tuple(vars(module)) for module in model.policy.modules()),
            )
        )

    model.learn(3 * N_STEPS * 2, [Watch(look), NoiseScaleCallback(4), Watch(look)])
    assert len(looks) == 6
    assert looks[::2] == looks[1::2]


def test_recurrent_policies_of_dictionaries_are_trained_the_same_to_the_bit():
    # Their buffer flattens the dictionary itself.
    states = []
    for callback in (None, NoiseScaleCallback(4)):
        policy = {"policy": "MultiInputLstmPolicy", "policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 8}}
        states.append(state(make(RecurrentPPOEWMA, DictWalkEnv(BOX), **policy).learn(3 * 32, callback)))
    assert differences(*states) == []


def test_runs_that_are_saved_meanwhile_go_on(tmp_path):
    model = build("ppg, stale")
    callback, n_steps = NoiseScaleCallback(4, decay=0.5), 3 * N_STEPS * 2
    checkpoints = CheckpointCallback(N_STEPS, str(tmp_path), "model", save_replay_buffer=True)
    model.learn(n_steps, [callback, checkpoints])
    assert set(callback._weights.values()) == {1 + 0.5 + 0.25}
    # Saved at the end of the third rollout, before it was trained on
    loaded = type(model).load(tmp_path / f"model_{n_steps}_steps.zip", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / f"model_replay_buffer_{n_steps}_steps.pkl")
    loaded.learn(N_STEPS * 2, callback, reset_num_timesteps=False)
    assert set(callback._weights.values()) == {1 + 0.5 + 0.25 + 0.125}
    loaded.learn(N_STEPS * 2, callback)  # a new run
    assert set(callback._weights.values()) == {1}


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "kwargs", "message"),
    [
        (ValueError, {"n_batches": 1}, "n_batches must be >= 2, got 1"),
        (TypeError, {"n_batches": 4.0}, "n_batches must be an integer"),
        (ValueError, {"every": 0}, "every must be >= 1, got 0"),
        (ValueError, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (TypeError, {"decay": None}, "decay must be a number"),
    ],
)
def test_parameters_are_checked(error, kwargs, message):
    with pytest.raises(error, match=message):
        NoiseScaleCallback(**kwargs)


def test_too_many_batches_are_refused_before_training():
    model = make()
    with pytest.raises(ValueError, match=r"n_batches must be at most .* n_steps·n_envs = 32, got 33"):
        model.learn(32, NoiseScaleCallback(33))
    assert model.num_timesteps == 0
    model.learn(32, NoiseScaleCallback(32))


def test_other_algorithms_are_refused_before_training():
    with pytest.raises(TypeError, match=r"needs an algorithm of sb3_ppo_ewma, got PPO$"):
        make(PPO).learn(32, NoiseScaleCallback())


def test_training_says_what_is_not_finite():
    rewards = itertools.chain([1.0] * 40, itertools.repeat(float("nan")))
    callback = NoiseScaleCallback(4)
    with pytest.raises(ValueError, match="NaN or Inf in rewards of the rollout"):
        make(env=Bandit(lambda _: next(rewards))).learn(64, callback)
    assert set(callback._weights.values()) == {1}
