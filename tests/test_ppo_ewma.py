"""What PPOEWMA does beyond PPO."""

import copy
import inspect
import io
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from sb3_ppo_ewma import PPOEWMA, EwmaMixin
from sb3_ppo_ewma._arguments import SB3ArgumentError

QUICK = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}


def make(env="CartPole-v1", **kwargs) -> PPOEWMA:
    return PPOEWMA("MlpPolicy", env, **{**QUICK, **kwargs})


def parameters(policy: th.nn.Module) -> list[th.Tensor]:
    return [tensor.clone() for tensor in policy.state_dict().values()]


def all_equal(a: list[th.Tensor], b: list[th.Tensor]) -> bool:
    return len(a) == len(b) and all(th.equal(x, y) for x, y in zip(a, b, strict=True))


def logged(model: PPOEWMA) -> dict[str, float]:
    return {k: float(v) for k, v in model.logger.name_to_value.items() if k.startswith("train/")}


# ---------------------------------------------------------------------- proximal policy


def test_auto_decay_follows_the_minibatches_of_one_epoch():
    # The paper's setting, 8 minibatches: β = 8/9
    assert make(n_steps=128).current_prox_decay == pytest.approx(8 / 9)
    assert make(n_steps=20, batch_size=16).current_prox_decay == pytest.approx(2 / 3)  # ragged: ⌈20/16⌉ = 2
    assert make(n_steps=32, batch_size=64).current_prox_decay == pytest.approx(1 / 2)  # at least 1
    env = make_vec_env("CartPole-v1", 4)
    assert make(env, n_steps=32).current_prox_decay == pytest.approx(8 / 9)


@pytest.mark.parametrize(("n_epochs", "center_of_mass"), [(1, 2), (5, 2), (6, 6), (10, 10), (20, 20)])
def test_auto_decay_is_half_of_an_iteration_with_many_epochs(n_epochs, center_of_mass):
    model = make(n_steps=32, batch_size=16, n_epochs=n_epochs)
    assert model.current_prox_decay == pytest.approx(1 - 1 / (1 + center_of_mass))


def test_auto_decay_is_a_whole_iteration_with_stale_data():
    model = make(n_steps=32, batch_size=16, n_epochs=3, staleness=1)
    assert model.current_prox_decay == pytest.approx(1 - 1 / (1 + 6))


def test_auto_decay_follows_the_environments_of_a_loaded_model(tmp_path):
    model = make().learn(32)
    assert logged(model)["train/prox_center_of_mass"] == pytest.approx(2)
    model.save(tmp_path / "model")
    model = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 4)).learn(128)
    assert logged(model)["train/prox_center_of_mass"] == pytest.approx(8)


def test_ewma_moves_with_every_policy_step_only():
    model = make(prox_decay=0.9, n_epochs=2, n_epochs_value=3).learn(32)
    # 2 policy epochs of 2 minibatches; the 6 value steps do not count
    assert float(model.policy_ewma.total_weight) == pytest.approx(1 + 0.9 + 0.9**2 + 0.9**3 + 0.9**4)


def test_proximal_policy_is_the_average_of_the_iterates():
    model = make(prox_decay=0.5)
    iterates = [parameters(model.policy)]
    model.policy.optimizer.register_step_post_hook(lambda *_: iterates.append(parameters(model.policy)))
    model.learn(32)
    weights = [0.5 ** (len(iterates) - 1 - k) for k in range(len(iterates))]
    for i, average in enumerate(parameters(model.proximal_policy)):
        expected = sum(w * tensors[i].double() for w, tensors in zip(weights, iterates, strict=True)) / sum(weights)
        assert th.allclose(average.double(), expected, atol=1e-6)


def test_ewma_starts_from_parameters_put_in_before_training():
    model = make(prox_decay=0.99, learning_rate=0.0)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(1.0)
    model.learn(32)
    assert all(
        th.allclose(a, b) for a, b in zip(parameters(model.policy), parameters(model.proximal_policy), strict=True)
    )


def test_proximal_policy_can_be_evaluated_predicted_with_and_saved_alone(tmp_path):
    kwargs = {"net_arch": [8], "share_features_extractor": False}
    model = make(policy_kwargs=kwargs).learn(64)
    proximal = model.proximal_policy
    observations = np.stack([model.observation_space.sample() for _ in range(10)])
    assert proximal.predict(observations, deterministic=True)[0].shape == (10,)
    assert np.isfinite(evaluate_policy(proximal, model.get_env(), n_eval_episodes=2)[0])
    proximal.save(tmp_path / "proximal")
    loaded = ActorCriticPolicy.load(tmp_path / "proximal")
    assert loaded.share_features_extractor is False
    obs = th.as_tensor(observations)
    assert th.equal(loaded.predict_values(obs), proximal.predict_values(obs))
    assert th.equal(
        loaded.get_distribution(obs).distribution.logits, proximal.get_distribution(obs).distribution.logits
    )
    assert make(prox_decay=None).proximal_policy is None


class GivenEncoder(BaseFeaturesExtractor):
    def __init__(self, observation_space, encoder):
        super().__init__(observation_space, 8)
        self.encoder = encoder

    def forward(self, observations):
        return self.encoder(observations)


def test_module_among_the_policy_arguments_is_not_shared_with_the_average():
    encoder = th.nn.Linear(4, 8)
    extractor = {"features_extractor_class": GivenEncoder, "features_extractor_kwargs": {"encoder": encoder}}
    model = make(policy_kwargs={"net_arch": [8], **extractor}, learning_rate=0.01)
    before = encoder.weight.detach().clone()
    model.learn(64)
    assert encoder.weight.requires_grad
    assert not th.equal(encoder.weight, before)
    assert not th.equal(encoder.weight, model.proximal_policy.features_extractor.encoder.weight)


def test_building_the_proximal_policy_draws_no_random_numbers():
    draws = []
    for prox_decay in (None, 0.9):
        make(prox_decay=prox_decay)
        draws.append((th.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1]


def test_proximal_policy_explores_with_gsde_without_touching_the_generators():
    model = make("Pendulum-v1", use_sde=True).learn(32)
    state = th.get_rng_state()
    action, _ = model.proximal_policy.predict(model.observation_space.sample()[None])
    assert action.shape == (1, 1)
    model.proximal_policy  # noqa: B018  # a property that samples noise
    assert th.equal(th.get_rng_state(), state)


# ---------------------------------------------------------------------- objective


def test_zero_decay_makes_the_proximal_policy_the_current_one():
    # π_prox = π_θ at every step: nothing is ever clipped and the penalty has no gradient
    clip, no_clip = (make(prox_decay=0.0, clip_range=clip).learn(64) for clip in (0.01, None))
    assert all_equal(parameters(clip.policy), parameters(no_clip.policy))
    assert logged(clip)["train/clip_fraction"] == 0
    assert "train/clip_fraction" not in logged(no_clip)


@pytest.mark.parametrize("off", [None, -1, -1.0, ConstantSchedule(-1.0)])
def test_spellings_of_no_clip(off):
    def trained(clip_range) -> PPOEWMA:
        return make(clip_range=clip_range, learning_rate=0.01, n_epochs=8).learn(32)

    model = trained(off)
    assert "train/clip_range" not in logged(model)
    assert all_equal(parameters(model.policy), parameters(trained(None).policy))
    assert not all_equal(parameters(model.policy), parameters(trained(0.001).policy))


def test_schedule_that_ends_below_zero_still_clips():
    schedule = LinearSchedule(0.1, -0.1, 1.0)
    model = make(clip_range=schedule, learning_rate=schedule)
    model.learn(40)  # two rollouts of 32: the last one overshoots
    assert logged(model)["train/clip_range"] == 0.0
    assert logged(model)["train/learning_rate"] == 0.0


@pytest.mark.parametrize("kl_estimator", ["sample", "analytic"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("prox_decay", ["auto", None])
def test_kl_penalty_holds_the_policy_back(env, kl_estimator, prox_decay):
    def moved(kl_coef: float) -> float:
        model = make(
            env, clip_range=None, kl_coef=kl_coef, kl_estimator=kl_estimator, prox_decay=prox_decay, learning_rate=0.01
        )
        model.learn(96)
        return logged(model)["train/approx_kl_prox"]

    assert moved(100.0) < 0.5 * moved(0.0)


class MultiEnv(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


@pytest.mark.parametrize(
    ("action_space", "use_sde"),
    [
        (spaces.Box(-1, 1, (2,)), False),
        (spaces.Box(-1, 1, (2,)), True),
        (spaces.Discrete(3), False),
        (spaces.MultiDiscrete([2, 3]), False),
        (spaces.MultiBinary(3), False),
    ],
)
def test_analytic_kl_on_every_action_space(action_space, use_sde):
    model = make(MultiEnv(action_space), kl_coef=1.0, kl_estimator="analytic", use_sde=use_sde, learning_rate=0.01)
    model.learn(64)
    assert logged(model)["train/kl_loss"] > 0


class RecordingPolicy(ActorCriticPolicy):
    """Notes whether gradients are computed."""

    def evaluate_actions(self, obs, actions):
        vars(self).setdefault("evaluations", []).append(th.is_grad_enabled())
        return super().evaluate_actions(obs, actions)


def test_analytic_kl_evaluates_the_proximal_policy_once():
    kwargs = {**QUICK, "n_epochs": 1}
    model = PPOEWMA(RecordingPolicy, "CartPole-v1", kl_coef=1.0, kl_estimator="analytic", **kwargs).learn(32)
    assert model.policy.evaluations == [False, True] * 2  # π_prox, π_θ; two minibatches


class ForgetfulPolicy(ActorCriticPolicy):
    """Computes log-probabilities without leaving its distribution behind."""

    def evaluate_actions(self, obs, actions):
        result = super().evaluate_actions(obs, actions)
        self.action_dist.distribution = None
        return result


def test_analytic_kl_needs_the_distribution_of_the_policy():
    kwargs = {**QUICK, "kl_coef": 1.0}
    PPOEWMA(ForgetfulPolicy, "CartPole-v1", kl_estimator="sample", **kwargs).learn(32)
    with pytest.raises(ValueError, match=r"'analytic'.*the policy left none in its CategoricalDistribution"):
        PPOEWMA(ForgetfulPolicy, "CartPole-v1", kl_estimator="analytic", **kwargs).learn(32)


def test_target_kl_is_measured_against_the_behaviour_policy():
    model = make(target_kl=1e-9, n_epochs=10, learning_rate=0.01)
    model.learn(32)
    # Every rollout makes its first step, since there π_θ = π_behav
    assert float(model.policy_ewma.total_weight) > 1
    assert model._n_updates == 1


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_quantities_that_ppo_logs_keep_their_meaning(env):
    kwargs = {**QUICK, "learning_rate": 0.01, "n_epochs": 10, "clip_range": 0.01, "clip_range_vf": 0.3, "ent_coef": 0.1}
    ppo = PPO("MlpPolicy", env, **kwargs).learn(64)
    ours = logged(PPOEWMA("MlpPolicy", env, prox_decay=None, **kwargs).learn(64))
    theirs = logged(ppo)
    assert theirs["train/clip_fraction"] > 0
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert set(ours) - set(theirs) == {
        f"train/{name}"
        for name in ("approx_kl_prox", "importance_ratio_max", "importance_cap_fraction", "importance_ess")
    } | {"train/advantage_std"}


@pytest.mark.parametrize(
    ("kwargs", "engine", "line"),
    [
        ({}, "dense", "- not 'compiled dense': torch_compile=False; it needs torch_compile=True"),
        ({"engine": "reference"}, "reference", "- not 'dense': engine='reference'; it needs engine='auto'"),
        (
            {"n_epochs_value": 1},
            "standard",
            "- not 'dense': n_epochs_value gives the value function its own epochs; it needs n_epochs_value=None",
        ),
    ],
)
def test_engine_is_named_and_explained(kwargs, engine, line, capsys):
    model = make(verbose=1, **kwargs)
    assert model.current_engine == engine
    assert model.learn(64).current_engine == engine
    assert line in model.explain_engine().splitlines()
    assert model.explain_engine().startswith(f"engine {engine!r}")
    assert capsys.readouterr().out.count(f"Training with the {engine!r} engine") == 1


# ---------------------------------------------------------------------- advantages and epochs


def test_advantage_moments_over_rollouts_allow_single_sample_minibatches():
    model = make(batch_size=1, n_steps=8, n_epochs=1, advantage_decay=0.0).learn(16)
    assert all(th.isfinite(tensor).all() for tensor in parameters(model.policy))
    make(batch_size=1, n_steps=1, n_epochs=1, advantage_decay=0.9).learn(4)


def test_advantage_moments_average_over_iterations():
    model = make(advantage_decay=0.5)
    batches = []
    update = model.advantage_moments.update
    model.advantage_moments.update = lambda samples: (batches.append(samples.double().clone()), update(samples))
    model.learn(96)
    weights = th.tensor([0.25, 0.5, 1.0], dtype=th.float64)
    mean = (weights * th.stack([batch.mean() for batch in batches])).sum() / weights.sum()
    square = (weights * th.stack([(batch**2).mean() for batch in batches])).sum() / weights.sum()
    assert model.advantage_moments.moments() == pytest.approx((mean.item(), (square - mean**2).item()))
    assert logged(model)["train/advantage_std"] == pytest.approx(math.sqrt(square - mean**2))


def test_constant_advantages_train_without_nan():
    class ConstantEnv(MultiEnv):
        def step(self, action):
            return np.zeros(3, dtype=np.float32), 0.0, False, False, {}

        def reset(self, seed=None, options=None):
            return np.zeros(3, dtype=np.float32), {}

    for advantage_decay in (0.0, 0.9):
        model = make(ConstantEnv(spaces.Discrete(2)), advantage_decay=advantage_decay, gamma=0.0, gae_lambda=0.0)
        model.learn(64)
        assert all(th.isfinite(tensor).all() for tensor in parameters(model.policy))


def test_separate_value_epochs_come_first_and_use_their_own_optimiser():
    model = make(n_epochs=1, n_epochs_value=3)
    steps = []
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append("policy"))
    model.value_optimizer.register_step_post_hook(lambda *_: steps.append("value"))
    model.learn(32)
    assert steps == ["value"] * 6 + ["policy"] * 2
    assert make(n_epochs=2, n_epochs_value=2).value_optimizer is None


def test_separate_epochs_train_their_own_networks():
    def value_and_policy_change(**kwargs) -> tuple[bool, bool]:
        model = make(**kwargs)
        before = copy.deepcopy(model.policy.state_dict())
        model.learn(32)
        after = model.policy.state_dict()
        return tuple(not th.equal(before[name], after[name]) for name in ("value_net.weight", "action_net.weight"))

    assert value_and_policy_change(n_epochs=1, n_epochs_value=2, vf_coef=0.0) == (False, True)
    assert value_and_policy_change(n_epochs=1, n_epochs_value=2) == (True, True)


def test_recomputed_advantages_use_the_current_value_function():
    model = make(recompute_advantages=True, n_epochs=3, batch_size=32, learning_rate=0.01)
    iterates, modes = [], []

    def record(*_):
        iterates.append(copy.deepcopy(model.policy.state_dict()))
        modes.append(model.policy.training)

    model.policy.optimizer.register_step_post_hook(record)
    model.learn(32)
    assert modes == [True] * 3
    # The last epoch begins after the second step.
    buffer, valued = model.rollout_buffer, make()
    valued.policy.load_state_dict(iterates[1])
    with th.no_grad():
        values = valued.policy.predict_values(th.as_tensor(buffer.observations)).flatten().numpy()
    # TD(λ): A_t = δ_t + γλ(1−done)A_{t+1}
    starts, rewards, advantages = buffer.episode_starts[:, 0], buffer.rewards[:, 0], buffer.advantages.ravel()
    deltas = rewards[:-1] + 0.99 * values[1:] * (1 - starts[1:]) - values[:-1]
    expected = deltas + 0.99 * 0.95 * (1 - starts[1:]) * advantages[1:]
    np.testing.assert_allclose(advantages[:-1], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(buffer.returns.ravel(), advantages + values, rtol=1e-5, atol=1e-5)
    assert not np.allclose(values, buffer.values.ravel())  # those of collection


def test_recomputed_advantages_count_once_in_the_moments():
    model = make(recompute_advantages=True, advantage_decay=0.9, n_epochs=4).learn(64)
    assert float(model.advantage_moments.weight) == pytest.approx(32 * 1.9)


# ---------------------------------------------------------------------- staleness


def test_first_rollouts_only_fill_the_queue():
    model = make(staleness=2)
    before = parameters(model.policy)
    model.learn(64)
    assert all_equal(before, parameters(model.policy))
    assert model._n_updates == 0
    model.learn(32, reset_num_timesteps=False)
    assert not all_equal(before, parameters(model.policy))
    assert model._n_updates == QUICK["n_epochs"]


class RecordingModel(PPOEWMA):
    """Keeps the log-probabilities of every minibatch under π_θ, π_prox, π_behav and the policy that collected it."""

    def extra_loss(self, evaluation, minibatch):
        log_probs = (evaluation.log_prob, evaluation.log_prob_prox, evaluation.log_prob_behav)
        recorded = [each.detach().clone() for each in (*log_probs, minibatch.samples.old_log_prob)]
        vars(self).setdefault("recorded", []).append(recorded)
        return th.zeros(())


@pytest.mark.parametrize("mode", ["decoupled", "behavior", "proximal"])
@pytest.mark.parametrize("prox_decay", [None, 0.9])
def test_policies_of_a_stale_rollout(mode, prox_decay):
    kwargs = {**QUICK, "n_epochs": 1, "batch_size": 32, "learning_rate": 0.05}
    model = RecordingModel(
        "MlpPolicy", "CartPole-v1", staleness=1, staleness_mode=mode, prox_decay=prox_decay, **kwargs
    ).learn(96)
    # Second training: its rollout was collected before the first one's update.
    current, prox, behav, collected = model.recorded[1]
    assert not th.allclose(current, collected)
    recent = current  # one epoch of one minibatch: the policy at the start of the iteration is the current one
    expected_behav = recent if mode == "proximal" else collected
    assert th.allclose(behav, expected_behav)
    if prox_decay is None:
        assert th.allclose(prox, collected if mode == "behavior" else recent)
    else:
        assert not th.allclose(prox, recent)
        assert not th.allclose(prox, collected)


def test_queue_has_a_file_of_its_own(tmp_path):
    model = make(staleness=2).learn(128)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "queue")
    loaded = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
    before = parameters(loaded.policy)
    with pytest.warns(UserWarning, match="the next 2 rollouts are collected without training"):
        loaded.learn(64, reset_num_timesteps=False)
    assert all_equal(before, parameters(loaded.policy))
    loaded = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
    loaded.load_replay_buffer(tmp_path / "queue", truncate_last_traj=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(32, reset_num_timesteps=False)
    assert not all_equal(before, parameters(loaded.policy))
    with pytest.raises(ValueError, match="num_timesteps=128 and 4 rollouts, the model is at 160 and 5"):
        loaded.load_replay_buffer(tmp_path / "queue")


def test_queue_lost_while_it_fills_is_said(tmp_path):
    make(staleness=3).learn(64).save(tmp_path / "model")
    loaded = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1"))
    with pytest.warns(UserWarning, match="the next 3 rollouts are collected without training"):
        loaded.learn(32, reset_num_timesteps=False)
    model = make(staleness=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(64).learn(32, reset_num_timesteps=False)


def test_without_staleness_there_is_no_queue(tmp_path):
    model = make()
    assert model.replay_buffer is None
    with pytest.warns(UserWarning, match="staleness=0"):
        model.save_replay_buffer(tmp_path / "queue.pkl")
    assert not (tmp_path / "queue.pkl").exists()
    with pytest.warns(UserWarning, match="staleness=0"):
        model.load_replay_buffer(tmp_path / "queue.pkl", truncate_last_traj=True)


# ---------------------------------------------------------------------- from and to PPO


def test_ppo_file_loads_with_one_warning(tmp_path):
    ppo = PPO("MlpPolicy", "CartPole-v1", **QUICK).learn(64)
    ppo.save(tmp_path / "ppo")
    with pytest.warns(UserWarning, match="started afresh") as caught:
        model = PPOEWMA.load(tmp_path / "ppo", env=ppo.get_env())
    assert [str(w.message) for w in caught] == [
        "Loaded parameters without policy_ewma: started afresh from the loaded policy."
    ]
    assert all_equal(parameters(ppo.policy), parameters(model.policy))
    assert all_equal(parameters(ppo.policy), parameters(model.proximal_policy))
    assert model.num_timesteps == 64
    model.learn(32, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOEWMA.load(tmp_path / "ppo", prox_decay=None)


def test_changed_parameters_start_or_drop_their_state(tmp_path):
    make(advantage_decay=0.5).learn(32).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="with policy_ewma, advantage_moments, which this model does not use: dropped"):
        PPOEWMA.load(tmp_path / "model", prox_decay=None, advantage_decay=None)
    with pytest.warns(UserWarning, match="without value_optimizer: started afresh"):
        PPOEWMA.load(tmp_path / "model", n_epochs_value=5)


def test_trained_model_starts_missing_parts_afresh(tmp_path):
    ppo = PPO("MlpPolicy", "CartPole-v1", **QUICK).learn(64)
    ppo.save(tmp_path / "ppo")
    model = make(**FULL).learn(64)
    with pytest.warns(UserWarning, match="without policy_ewma, advantage_moments, value_optimizer: started afresh"):
        model.set_parameters(tmp_path / "ppo.zip")
    assert all_equal(parameters(model.proximal_policy), parameters(ppo.policy))
    assert float(model.advantage_moments.weight) == 0
    assert not model.value_optimizer.state
    model.learn(32, reset_num_timesteps=False)


def test_part_of_the_parameters_restarts_the_average():
    source, model = make(seed=1), make(seed=2).learn(32)
    model.set_parameters({"policy": source.policy.state_dict()}, exact_match=False)
    assert all_equal(parameters(model.proximal_policy), parameters(source.policy))
    assert float(model.policy_ewma.total_weight) == 1.0


def test_model_can_be_handed_back_as_ppo(tmp_path):
    model = make(n_epochs_value=3, advantage_decay=0.5).learn(64)
    ppo = model.to_ppo()
    assert type(ppo) is PPO
    assert all_equal(parameters(ppo.policy), parameters(model.policy))
    assert ppo.num_timesteps == 64
    ppo.save(tmp_path / "ppo")
    loaded = PPO.load(tmp_path / "ppo", env=make_vec_env("CartPole-v1"))
    observations = np.stack([model.observation_space.sample() for _ in range(20)])
    expected, _ = model.predict(observations, deterministic=True)
    assert (loaded.predict(observations, deterministic=True)[0] == expected).all()
    before = parameters(model.policy)
    loaded.learn(32, reset_num_timesteps=False)
    ppo.learn(32, reset_num_timesteps=False)
    assert all_equal(before, parameters(model.policy))  # independent of each other


def test_ppo_handed_back_goes_on_exactly_as_ppo_would():
    ppo = PPO("MlpPolicy", "CartPole-v1", **QUICK).learn(64).learn(64, reset_num_timesteps=False)
    back = make(prox_decay=None, engine="reference").learn(64).to_ppo().learn(64, reset_num_timesteps=False)
    assert all_equal(parameters(ppo.policy), parameters(back.policy))


def test_ppo_without_clip_gets_the_default_one():
    with pytest.warns(UserWarning, match="clip_range is set to SB3's default 0.2"):
        ppo = make(clip_range=None, kl_coef=1.0).learn(32).to_ppo()
    assert ppo.clip_range(1.0) == 0.2


# ---------------------------------------------------------------------- saving


FULL = {"prox_decay": 0.9, "advantage_decay": 0.5, "n_epochs_value": 3}


def test_everything_comes_back_from_a_file():
    model = make(**FULL, kl_coef=0.5, kl_estimator="analytic", clip_range=None, max_importance_ratio=None).learn(64)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = PPOEWMA.load(file, env=make_vec_env("CartPole-v1"))
    for name in ("prox_decay", "advantage_decay", "n_epochs_value", "kl_coef", "kl_estimator", "max_importance_ratio"):
        assert getattr(loaded, name) == getattr(model, name)
    assert all_equal(parameters(loaded.policy_ewma), parameters(model.policy_ewma))
    assert float(loaded.policy_ewma.total_weight) != 1.0
    assert loaded.advantage_moments.moments() == model.advantage_moments.moments()
    state, loaded_state = (m.value_optimizer.state_dict()["state"] for m in (model, loaded))
    assert state.keys() == loaded_state.keys() != set()
    assert all(th.equal(state[k]["exp_avg"], loaded_state[k]["exp_avg"]) for k in state)
    loaded.learn(32, reset_num_timesteps=False)
    assert {"train/clip_range", "train/importance_cap_fraction"}.isdisjoint(logged(loaded))


def test_get_and_set_parameters_carry_everything():
    model, other = make(**FULL).learn(64), make(**FULL, seed=5)
    other.set_parameters(copy.deepcopy(model.get_parameters()))
    assert all_equal(parameters(other.policy_ewma), parameters(model.policy_ewma))
    assert other.advantage_moments.moments() == model.advantage_moments.moments()
    names = {"policy", "policy.optimizer", "policy_ewma", "advantage_moments", "value_optimizer"}
    assert set(model.get_parameters()) == names
    assert set(make(prox_decay=None).get_parameters()) == {"policy", "policy.optimizer"}


def test_loading_does_not_rewind_the_generators_but_an_explicit_seed_does(tmp_path):
    make(seed=None).learn(32).save(tmp_path / "model")
    draws = []
    for seed in (7, 8):
        th.manual_seed(seed)
        PPOEWMA.load(tmp_path / "model")
        draws.append(th.rand(3))
    assert not th.equal(*draws)
    runs = []
    for _ in range(2):
        model = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), seed=11)
        runs.append(parameters(model.learn(32).policy))
    assert all_equal(*runs)
    # With a seed, nothing of the saved state comes back: what is drawn in between shows.
    drawn = PPOEWMA.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), seed=11)
    th.rand(1), np.random.rand(1)
    assert not all_equal(runs[0], parameters(drawn.learn(32).policy))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prox_decay": 1.0}, r"prox_decay must be in \[0, 1\), got 1.0"),
        ({"prox_decay": "0.9"}, r"prox_decay must be one of 'auto', a number in \[0, 1\) or None, got '0.9'"),
        ({"prox_decay": math.nan}, "prox_decay must be in"),
        ({"kl_coef": -0.1}, "kl_coef must be >= 0, got -0.1"),
        ({"kl_coef": math.inf}, "kl_coef"),
        ({"kl_estimator": "k3"}, "kl_estimator must be one of 'sample', 'analytic', got 'k3'"),
        ({"max_importance_ratio": 0.9}, "max_importance_ratio must be >= 1, got 0.9"),
        ({"advantage_decay": 1.0}, r"advantage_decay must be in \[0, 1\), got 1.0"),
        ({"advantage_decay": 0.5, "normalize_advantage": False}, "contradicts normalize_advantage=False"),
        ({"n_epochs_value": 0}, "n_epochs_value must be >= 1, got 0"),
        ({"n_epochs": 0}, "n_epochs must be >= 1, got 0"),
        ({"staleness": -1}, "staleness must be >= 0, got -1"),
        ({"staleness_mode": "recent"}, "staleness_mode must be one of 'decoupled', 'behavior', 'proximal'"),
        ({"engine": "fast"}, "engine must be one of 'auto', 'reference', got 'fast'"),
        ({"torch_compile": "fast"}, "torch_compile must be one of .*got 'fast'"),
        ({"clip_range": 1.0}, "clip_range must be below 1"),
        ({"clip_range": math.nan}, "clip_range must be below 1"),
        ({"clip_range": lambda _: 2.0}, "clip_range must be below 1"),
        ({"clip_range": lambda _: -1.0}, "clip_range must start at 0 or above"),
        ({"clip_range_vf": 0.0}, "clip_range_vf must be positive"),
        ({"batch_size": 1}, "batch_size must be greater than 1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
        ({"gae_lambda": -0.1}, "gae_lambda must be in"),
        ({"ent_coef": math.inf}, "ent_coef must be finite, got inf"),
        ({"vf_coef": -1}, "vf_coef must be >= 0, got -1"),
        ({"target_kl": -0.1}, "target_kl must be >= 0, got -0.1"),
        (
            {
                "kl_coef": 1.0,
                "kl_estimator": "analytic",
                "prox_decay": None,
                "staleness": 1,
                "staleness_mode": "behavior",
            },
            "use kl_estimator='sample'",
        ),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"prox_deacy": 0.9},
            r"PPOEWMA\(\) got an unexpected keyword argument 'prox_deacy'. Did you mean 'prox_decay'",
        ),
        ({"learning_rat": 0.9}, "Did you mean 'learning_rate'"),
        ({"prox_decay": True}, r"prox_decay must be a number \(in"),
        ({"staleness": 1.5}, "staleness must be an integer >= 0, got 1.5"),
        ({"batch_size": 16.0}, "batch_size must be an integer >= 1, got 16.0"),
        ({"recompute_advantages": 1}, "recompute_advantages must be True or False, got 1"),
        ({"clip_range": "0.2"}, "clip_range must be a number below 1, a schedule or None, got '0.2'"),
        ({"kl_coef": None}, r"kl_coef must be a number \(>= 0\), got None"),
        ({"max_grad_norm": None}, r"max_grad_norm must be a number \(>= 0\), got None"),
        ({"ent_coef": "1e-3"}, r"ent_coef must be a number \(finite\), got '1e-3'"),
        ({"n_steps": 32.0}, "n_steps must be an integer >= 1, got 32.0"),
    ],
)
def test_bad_types_are_named(kwargs, message):
    with pytest.raises(TypeError, match=message):
        make(**kwargs)


def test_what_sb3_refuses_by_assertion_can_be_caught_as_such():
    assert issubclass(SB3ArgumentError, AssertionError)
    with pytest.raises(AssertionError):
        make(clip_range_vf=-1.0)


def test_positional_arguments_are_those_of_ppo():
    model = PPOEWMA("MlpPolicy", "CartPole-v1", 1e-3, 64, 16, 3, device="cpu")
    assert (model.learning_rate, model.n_steps, model.batch_size, model.n_epochs) == (1e-3, 64, 16, 3)
    with pytest.raises(TypeError, match="missing a required argument: 'env'"):
        PPOEWMA("MlpPolicy")


@pytest.mark.parametrize("has_env", [False, True])
def test_values_given_at_loading_are_checked(has_env, tmp_path):
    model = make()
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="staleness_mode"):
        PPOEWMA.load(tmp_path / "model", env=model.get_env() if has_env else None, staleness_mode="recent")


@pytest.mark.parametrize(
    ("built", "by_hand"),
    [
        ({}, {"prox_decay": None}),
        ({"prox_decay": None}, {"prox_decay": 0.5}),
        ({}, {"advantage_decay": 0.5}),
        ({"advantage_decay": 0.5}, {"advantage_decay": None}),
        ({"n_epochs_value": 4}, {"n_epochs_value": None}),
        ({"n_epochs_value": 4}, {"n_epochs": 4}),
        ({}, {"staleness": 1}),
        ({"staleness": 2}, {"staleness": 1}),
    ],
)
def test_what_the_model_was_not_built_for_cannot_be_set_by_hand(built, by_hand):
    model = make(**built)
    for name, value in by_hand.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=r"by hand.* to load\(\)"):
        model.learn(32)
    assert model.num_timesteps == 0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("n_epochs", 0, ValueError), ("max_grad_norm", None, TypeError), ("target_kl", "0.1", TypeError)],
)
def test_what_cannot_be_is_named_when_it_is_set_by_hand(name, value, error):
    model = make()
    setattr(model, name, value)
    with pytest.raises(error, match=f"^{name} must be"):
        model.learn(32)
    assert model.num_timesteps == 0


def test_contradiction_given_at_loading(tmp_path):
    model = make(normalize_advantage=False)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="contradicts normalize_advantage=False"):
        PPOEWMA.load(tmp_path / "model", env=model.get_env(), advantage_decay=0.5)


def test_numbers_can_be_set_by_hand():
    model = make(prox_decay=0.5, advantage_decay=0.5, n_epochs=1).learn(32)
    model.prox_decay, model.advantage_decay = 0.0, 0.0
    model.learn(32, reset_num_timesteps=False)
    assert float(model.policy_ewma.total_weight) == 1.0
    assert float(model.advantage_moments.weight) == 32


def test_plain_mixins_and_own_constructors():
    class Plain:
        def greet(self):
            return "hello"

    class Mixed(Plain, PPOEWMA):
        pass

    class Own(PPOEWMA):
        def __init__(self, policy, env, foo=1, **kwargs):
            super().__init__(policy, env, **kwargs)
            self.foo = foo

    assert Mixed("MlpPolicy", "CartPole-v1", **QUICK).learn(32).greet() == "hello"
    model = Own("MlpPolicy", "CartPole-v1", foo=3, prox_decay=0.9, **QUICK).learn(32)
    assert list(inspect.signature(Own).parameters)[:3] == ["policy", "env", "foo"]
    assert {"prox_decay", "n_steps"} <= set(inspect.signature(Own).parameters)
    assert not {"prox_decay", "staleness", "foo"} & set(vars(model.to_ppo()))


class OwnDefaults(PPO):
    def __init__(self, *args, n_steps=48, **kwargs):
        super().__init__(*args, n_steps=n_steps, **kwargs)


class OwnPositional(PPO):
    def __init__(self, policy, env, extra=3, **kwargs):
        self.extra = extra
        super().__init__(policy, env, **kwargs)


class OwnPolicy(PPO):
    def __init__(self, env, **kwargs):
        super().__init__("MlpPolicy", env, **kwargs)


def test_mixin_over_other_classes_keeps_their_constructors():
    class Defaults(EwmaMixin, OwnDefaults):
        pass

    class Positional(EwmaMixin, OwnPositional):
        pass

    class Policy(EwmaMixin, OwnPolicy):
        pass

    kwargs = {"batch_size": 16, "n_epochs": 1, "device": "cpu"}
    assert Defaults("MlpPolicy", "CartPole-v1", **kwargs).n_steps == 48
    assert inspect.signature(Defaults).parameters["n_steps"].default == 48
    assert Defaults("MlpPolicy", "CartPole-v1", n_steps=32, **kwargs).learn(32).n_steps == 32
    model = Positional("MlpPolicy", "CartPole-v1", n_steps=32, prox_decay=0.5, **kwargs).learn(32)
    assert (model.extra, model.n_steps, model.prox_decay) == (3, 32, 0.5)
    assert Policy("CartPole-v1", n_steps=32, **kwargs).learn(32).policy_ewma is not None
    assert type(model.to_ppo()) is OwnPositional


class BrokenEnv(MultiEnv):
    def __init__(self, what, action_space, at_step=40):
        super().__init__(action_space)
        self.what, self.at_step, self.n = what, at_step, 0

    def step(self, action):
        self.n += 1
        obs, reward, *rest = super().step(action)
        broken = self.n >= self.at_step
        if broken and self.what == "observation":
            obs = np.full(3, np.nan, dtype=np.float32)
        return obs, math.inf if broken and self.what == "reward" else reward, *rest


@pytest.mark.parametrize("what", ["observation", "reward"])
@pytest.mark.parametrize("at_step", [40, 64])  # in the middle and at the very end of the second rollout
@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.Box(-1, 1, (2,))])
def test_nan_from_the_environment_ends_training_with_good_parameters(what, at_step, action_space):
    model = make(BrokenEnv(what, action_space, at_step))
    model.learn(32)
    before = parameters(model.policy), parameters(model.policy_ewma)
    with pytest.raises(ValueError, match=f"NaN or Inf in .*{what}"):
        model.learn(32, reset_num_timesteps=False)
    assert all_equal(before[0], parameters(model.policy))
    assert all_equal(before[1], parameters(model.policy_ewma))


class TruncatedEnv(MultiEnv):
    """Every step ends an episode, with a broken observation."""

    def __init__(self, value):
        super().__init__(spaces.Discrete(2))
        self.value = value

    def reset(self, seed=None, options=None):
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        return np.array([0.0, 0.0, self.value], dtype=np.float32), 0.0, False, True, {}


def test_nan_in_the_last_observation_of_a_truncated_episode():
    with pytest.raises(ValueError, match=r"NaN or Inf in rewards .* from the value of a terminal observation"):
        make(TruncatedEnv(np.nan)).learn(32)


def test_inf_that_the_network_bounds_trains_as_in_ppo():
    # tanh(Inf) = 1, and the terminal observation enters a value without gradient only
    ppo = PPO("MlpPolicy", TruncatedEnv(np.inf), **QUICK).learn(64)
    model = make(TruncatedEnv(np.inf), prox_decay=None, engine="reference").learn(64)
    assert all_equal(parameters(ppo.policy), parameters(model.policy))
    make(TruncatedEnv(np.inf)).learn(64)


class PoisonedPolicy(ActorCriticPolicy):
    """Breaks the quantity that its attribute names, in training."""

    poison = ""

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        # Finite forward pass, NaN backward: sqrt has an infinite derivative at 0
        values = values + {"gradients": th.sqrt(values * 0), "values": values * math.nan}.get(self.poison, 0)
        return values, log_prob * (math.nan if self.poison == "log-probabilities" else 1), entropy


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("quantity", ["gradients", "log-probabilities", "values"])
@pytest.mark.parametrize("target_kl", [None, 0.1])
def test_nan_in_training_leaves_the_last_good_parameters(quantity, target_kl, engine):
    kwargs = {**QUICK, "learning_rate": 0.01, "target_kl": target_kl, "engine": engine}
    model = PPOEWMA(PoisonedPolicy, "CartPole-v1", **kwargs).learn(32)
    model.policy.poison = quantity
    before = parameters(model.policy), parameters(model.policy_ewma)
    with pytest.raises(ValueError, match=f"NaN or Inf in {quantity}"):
        model.learn(32, reset_num_timesteps=False)
    assert all_equal(before[0], parameters(model.policy))
    assert all_equal(before[1], parameters(model.policy_ewma))


def test_nan_in_the_parameters_is_named():
    model = make()
    with th.no_grad():
        model.policy.action_net.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"policy's parameter 'action_net\.bias'"):
        model.learn(32)
