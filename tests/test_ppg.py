"""The auxiliary phase: when it runs, on what, and what it leaves behind."""

import warnings
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, AuxiliaryPhaseMixin, losses

N_STEPS, N_ENVS = 16, 2
ROLLOUT = N_STEPS * N_ENVS
QUICK: dict[str, Any] = {
    "n_steps": N_STEPS,
    "batch_size": 16,
    "n_policy_iterations": 3,
    "n_aux_epochs": 2,
    "policy_kwargs": {"net_arch": [8]},
    "seed": 0,
    "device": "cpu",
}


class RandomEnv(gym.Env):
    """Any action space; the reward is the first entry of the observation."""

    observation_space = spaces.Box(-1, 1, (4,))

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(0)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation = self.observation_space.sample()
        return observation, float(observation[0]), False, False, {}


def make(algorithm: type[PPG] = PPG, env: Any = None, **kwargs: Any) -> PPG:
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0) if env is None else env
    return algorithm("MlpPolicy", env, **{**QUICK, **kwargs})


class Rollouts(BaseCallback):
    """Keeps observations and returns of every rollout, (n_samples, ...) each."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[np.ndarray] = []
        self.returns: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.observations.append(buffer.observations.reshape(ROLLOUT, -1).copy())
        self.returns.append(buffer.returns.ravel().copy())


def vector(model: PPG) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def enlarge_policy_head(model: PPG) -> None:
    """It starts so small that what the auxiliary phase does to the layers before it hardly shows."""
    with th.no_grad():
        model.policy.action_net.weight.mul_(100)


def spy_on_minibatches(model: PPG, monkeypatch: pytest.MonkeyPatch) -> list[losses.AuxiliaryLossStats]:
    statistics = []
    original = losses.auxiliary_loss

    def spy(*args: Any, **kwargs: Any) -> Any:
        loss, stats = original(*args, **kwargs)
        statistics.append(stats)
        return loss, stats

    monkeypatch.setattr(losses, "auxiliary_loss", spy)
    return statistics


# ---------------------------------------------------------------------- when


@pytest.mark.parametrize("algorithm", [PPG, PPGEWMA])
def test_phase_starts_after_n_policy_iterations(algorithm):
    model = make(algorithm)
    counts = []
    for _ in range(7):
        model.learn(ROLLOUT, reset_num_timesteps=False)
        counts.append((model._n_phases, len(model.phase_buffer)))
    assert counts == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_phase_runs_also_in_the_last_training():
    assert make().learn(3 * ROLLOUT)._n_phases == 1
    assert make().learn(3 * ROLLOUT - 1)._n_phases == 1  # SB3 collects whole rollouts
    assert make().learn(2 * ROLLOUT)._n_phases == 0


def test_only_trained_rollouts_count():
    model = make(staleness=2)
    model.learn(4 * ROLLOUT)
    assert (model._n_phases, len(model.phase_buffer)) == (0, 2)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert (model._n_phases, len(model.phase_buffer)) == (1, 0)


def test_phase_goes_on_after_loading(tmp_path):
    model = make().learn(2 * ROLLOUT)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "phase")
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS)
    loaded = PPG.load(tmp_path / "model", env=env)
    loaded.load_replay_buffer(tmp_path / "phase")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert (loaded._n_phases, len(loaded.phase_buffer)) == (1, 0)
    loaded.save(tmp_path / "model")
    assert PPG.load(tmp_path / "model")._n_phases == 1


def test_lost_phase_starts_anew_and_says_so_once(tmp_path):
    make().learn(2 * ROLLOUT).save(tmp_path / "model")
    loaded = PPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=N_ENVS))
    with pytest.warns(
        UserWarning, match=r"rollouts of the policy phase are missing \(2 when .*\): the phase starts anew"
    ):
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert (loaded._n_phases, len(loaded.phase_buffer)) == (0, 2)


def test_file_of_the_other_side_of_a_training_is_refused(tmp_path):
    """A checkpoint at the last step of a rollout comes before its training, and has the same number of steps."""
    model = make(n_policy_iterations=4)
    model.learn(2 * ROLLOUT, CheckpointCallback(N_STEPS, str(tmp_path), save_replay_buffer=True))
    model.save_replay_buffer(tmp_path / "after")
    before = PPG.load(tmp_path / f"rl_model_{2 * ROLLOUT}_steps")
    with pytest.raises(ValueError, match=r"num_timesteps=64 and 2 rollouts, the model is at 64 and 1"):
        before.load_replay_buffer(tmp_path / "after")
    with pytest.raises(ValueError, match=r"num_timesteps=64 and 1 rollouts, the model is at 64 and 2"):
        model.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{2 * ROLLOUT}_steps")


def test_training_ended_by_a_callback_in_the_middle_of_a_rollout():
    model = make()
    steps = []

    def stop(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        steps.append(1)
        return len(steps) < N_STEPS + 5

    model.learn(3 * ROLLOUT, stop)
    assert (model._n_phases, len(model.phase_buffer)) == (0, 1)
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert (model._n_phases, len(model.phase_buffer)) == (1, 0)


def test_file_of_another_step_is_refused(tmp_path):
    model = make().learn(ROLLOUT)
    model.save_replay_buffer(tmp_path / "phase")
    model.learn(ROLLOUT, reset_num_timesteps=False)
    with pytest.raises(
        ValueError, match=f"num_timesteps={ROLLOUT} and 1 rollouts, the model is at {2 * ROLLOUT} and 2"
    ):
        model.load_replay_buffer(tmp_path / "phase")
    assert len(model.phase_buffer) == 2


def test_checkpoints_have_the_phase(tmp_path):
    checkpoints = CheckpointCallback(N_STEPS, str(tmp_path), save_replay_buffer=True)
    make().learn(2 * ROLLOUT, checkpoints)
    # A checkpoint after the last step of a rollout comes before its training.
    loaded = PPG.load(tmp_path / f"rl_model_{2 * ROLLOUT}_steps")
    loaded.set_env(make_vec_env("CartPole-v1", n_envs=N_ENVS))
    loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{2 * ROLLOUT}_steps")
    assert len(loaded.phase_buffer) == 1


@pytest.mark.parametrize("algorithm", [PPG, PPGEWMA])
def test_interrupted_phase_is_over(algorithm, tmp_path):
    model = make(algorithm)
    steps = []

    def interrupted(*_: Any) -> None:
        steps.append(None)
        if len(steps) == 3 * 16 + 1:  # the first step of the second epoch
            raise KeyboardInterrupt

    hook = model.aux_optimizer.register_step_post_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(3 * ROLLOUT)
    hook.remove()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "phase")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "phase")
    for resumed in (model, loaded):
        assert (resumed._n_phases, len(resumed.phase_buffer)) == (0, 0)
        if resumed.policy_ewma is not None:
            assert float(resumed.policy_ewma.total_weight) == 1
        resumed.learn(3 * ROLLOUT, reset_num_timesteps=False)
        assert (resumed._n_phases, len(resumed.phase_buffer)) == (1, 0)


def test_error_before_the_first_minibatch_ends_the_phase_too():
    fails = [True]

    def schedule(progress: float) -> float:
        return float("nan") if fails[0] and progress < 0.9 else 1e-3

    model = make(aux_learning_rate=schedule)
    with pytest.raises(ValueError, match=r"schedule of aux_learning_rate gives nan at progress 0\.000"):
        model.learn(3 * ROLLOUT)
    assert bool(th.isfinite(vector(model)).all())
    fails[0] = False
    assert model.learn(3 * ROLLOUT, reset_num_timesteps=False)._n_phases == 1


def test_callbacks_with_attributes_of_these_names_work():
    class Callback(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.callbacks, self.callback = None, self

        def _on_step(self) -> bool:
            return True

    make().learn(ROLLOUT, [Callback()])


def test_model_can_be_pickled_after_a_progress_bar():
    cloudpickle.dumps(make().learn(ROLLOUT, progress_bar=True))


def test_no_warning_for_a_complete_checkpoint(tmp_path):
    checkpoints = CheckpointCallback(N_STEPS, str(tmp_path), save_replay_buffer=True)
    make(PPGEWMA, staleness=1).learn(ROLLOUT, checkpoints)
    loaded = PPGEWMA.load(tmp_path / f"rl_model_{ROLLOUT}_steps", env=make_vec_env("CartPole-v1", n_envs=N_ENVS))
    loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{ROLLOUT}_steps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(ROLLOUT, reset_num_timesteps=False)


def test_warning_points_to_the_callers_line(tmp_path):
    make().learn(ROLLOUT).save(tmp_path / "model")
    loaded = PPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=N_ENVS))
    with pytest.warns(UserWarning, match="starts anew") as caught:
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert caught[0].filename == __file__


def test_nan_in_the_auxiliary_head_is_named_before_the_first_step():
    model = make()
    with th.no_grad():
        model.policy.aux_value_net.weight.fill_(np.nan)
    with pytest.raises(ValueError, match=r"NaN or Inf in the policy's parameter 'aux_value_net\.weight'"):
        model.learn(3 * ROLLOUT)
    assert model.num_timesteps == 0


def test_without_auxiliary_epochs_there_is_no_phase():
    kwargs = {"n_aux_epochs": 0, "policy_kwargs": {"net_arch": [8], "critic_arch": "shared"}}
    model = make(**kwargs).learn(4 * ROLLOUT)
    assert model.phase_buffer is None
    assert model.replay_buffer is None
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0)
    shared = {key: QUICK[key] for key in ("n_steps", "batch_size", "seed", "device")}
    plain = PPOEWMA(
        "MlpPolicy", env, n_epochs=1, advantage_decay=0.0, prox_decay=None, policy_kwargs={"net_arch": [8]}, **shared
    ).learn(4 * ROLLOUT)
    for name, parameter in plain.policy.named_parameters():
        assert th.equal(parameter, model.policy.get_parameter(name)), name


def test_phase_out_of_reach_is_said(capsys):
    make(verbose=1).learn(2 * ROLLOUT)
    assert "next auxiliary phase is 96 steps away" in capsys.readouterr().out
    make(verbose=1).learn(3 * ROLLOUT - 1)  # SB3 collects whole rollouts
    make(verbose=0).learn(2 * ROLLOUT)
    model = make(verbose=1, staleness=1, n_policy_iterations=2).learn(3 * ROLLOUT)
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert "next auxiliary phase" not in capsys.readouterr().out


# ---------------------------------------------------------------------- on what


def test_every_epoch_visits_every_sample_once(monkeypatch):
    model = make(aux_batch_size=10)
    visited: list[np.ndarray] = []
    buffer = model.phase_buffer
    original = buffer.observations

    def spy(indices: Any, device: th.device) -> Any:
        if isinstance(indices, np.ndarray):
            visited.append(indices)
        return original(indices, device)

    monkeypatch.setattr(buffer, "observations", spy)
    model.learn(3 * ROLLOUT)
    assert [len(indices) for indices in visited] == 2 * ([10] * 9 + [6])
    for epoch in (visited[:10], visited[10:]):
        assert sorted(np.concatenate(epoch)) == list(range(3 * ROLLOUT))
    # Rollout 0 has samples 0 to 31, and so on.
    assert len(set(visited[0] // ROLLOUT)) > 1
    assert not np.array_equal(np.concatenate(visited[:10]), np.concatenate(visited[10:]))


def test_default_minibatch_is_a_sixteenth_of_a_rollout(monkeypatch):
    model = make(n_aux_epochs=1)
    statistics = spy_on_minibatches(model, monkeypatch)
    model.learn(3 * ROLLOUT)
    assert len(statistics) == 3 * 16  # of two samples each


def test_targets_are_those_of_the_policy_phase(monkeypatch):
    model = make()
    rollouts, seen = Rollouts(), []
    auxiliary_loss = losses.auxiliary_loss

    def spy(kl: th.Tensor, values: th.Tensor, aux_values: th.Tensor, returns: th.Tensor, **kwargs: float) -> Any:
        seen.append(returns)
        return auxiliary_loss(kl, values, aux_values, returns, **kwargs)

    monkeypatch.setattr(losses, "auxiliary_loss", spy)
    model.learn(3 * ROLLOUT, rollouts)
    expected = np.sort(np.concatenate(rollouts.returns))
    first_epoch = th.cat(seen[: len(seen) // 2]).numpy()
    np.testing.assert_array_equal(np.sort(first_epoch), expected)


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(3),
        spaces.Box(-1, 1, (2,)),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ],
    ids=lambda space: type(space).__name__,
)
def test_kl_to_the_old_policy_is_zero_at_first_and_positive_later(action_space, monkeypatch):
    model = make(env=RandomEnv(action_space), aux_learning_rate=1e-2)
    enlarge_policy_head(model)
    statistics = spy_on_minibatches(model, monkeypatch)
    model.learn(3 * N_STEPS)
    kl = [float(stats.policy_kl) for stats in statistics]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl) > 1e-3
    assert min(kl) > -1e-6


def test_old_policy_is_that_before_the_phase():
    """With a large weight on the divergence, the policy stays where it was; without, it leaves."""

    def moved(beta_clone: float) -> float:
        model = make(beta_clone=beta_clone, aux_learning_rate=1e-3, n_aux_epochs=100, aux_batch_size=96)
        enlarge_policy_head(model)
        rollouts = Rollouts()
        probabilities: list[th.Tensor] = []

        def look(*_: Any) -> None:
            observations = th.as_tensor(np.concatenate(rollouts.observations))
            distribution = model.policy.get_distribution(observations).distribution
            probabilities.append(distribution.probs.detach())

        model.aux_optimizer.register_step_pre_hook(look)
        model.aux_optimizer.register_step_post_hook(look)
        model.learn(3 * ROLLOUT, rollouts)
        return float((probabilities[0] - probabilities[-1]).abs().mean())

    assert moved(beta_clone=100.0) < 0.3 * moved(beta_clone=0.0)


# ---------------------------------------------------------------------- with what


def test_phase_has_its_own_optimiser_and_learning_rate():
    model = make(learning_rate=1e-3, aux_learning_rate=lambda progress: 0.5 * progress)
    model.learn(3 * ROLLOUT)
    steps = {int(state["step"]) for state in model.policy.optimizer.state.values()}
    aux_steps = {int(state["step"]) for state in model.aux_optimizer.state.values()}
    assert steps == {6}  # 3 rollouts of 2 minibatches; the auxiliary head has no gradient there
    assert aux_steps == {2 * 3 * 16}
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.aux_optimizer.param_groups[0]["lr"] == 0.0  # of the last training, at the end of the budget
    model = make(aux_learning_rate=7e-4).learn(3 * ROLLOUT)
    assert model.aux_optimizer.param_groups[0]["lr"] == 7e-4


def test_auxiliary_head_is_trained_in_the_auxiliary_phase_only():
    model = make()
    before = model.policy.aux_value_net.weight.detach().clone()
    model.learn(2 * ROLLOUT)
    assert th.equal(model.policy.aux_value_net.weight, before)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert not th.equal(model.policy.aux_value_net.weight, before)


def test_ewma_starts_anew_after_the_phase():
    model = make(PPGEWMA).learn(2 * ROLLOUT)
    assert float(model.policy_ewma.total_weight) > 1
    model.learn(ROLLOUT, reset_num_timesteps=False)
    assert float(model.policy_ewma.total_weight) == 1
    assert th.equal(th.nn.utils.parameters_to_vector(model.policy_ewma.averages), vector(model))


@pytest.mark.parametrize("vf_true_coef", [0.0, 1.0])
def test_weights_of_zero_switch_terms_off(vf_true_coef):
    model = make(beta_clone=0.0, vf_true_coef=vf_true_coef, policy_kwargs={"net_arch": [8], "critic_arch": "dual"})
    values: list[th.Tensor] = []
    model.aux_optimizer.register_step_pre_hook(lambda *_: values.append(model.policy.value_net.weight.detach().clone()))
    model.learn(3 * ROLLOUT)
    assert len(values) == 2 * 3 * 16  # steps of the phase
    assert all(th.equal(value, values[0]) for value in values) == (vf_true_coef == 0)


@pytest.mark.long
def test_auxiliary_phase_improves_the_values(monkeypatch):
    model = make(n_aux_epochs=20, aux_learning_rate=3e-3)
    statistics = spy_on_minibatches(model, monkeypatch)
    model.learn(3 * ROLLOUT)
    per_epoch = len(statistics) // 20
    for name in ("value_loss", "aux_value_loss"):
        first = np.mean([float(getattr(stats, name)) for stats in statistics[:per_epoch]])
        last = np.mean([float(getattr(stats, name)) for stats in statistics[-per_epoch:]])
        assert last < 0.7 * first, name


# ---------------------------------------------------------------------- what is shown


def test_logs():
    model = make()
    model.learn(2 * ROLLOUT)
    assert model.logger.name_to_value["aux/n_phases"] == 0
    assert model.logger.name_to_value["aux/phase_progress"] == pytest.approx(2 / 3)
    assert "aux/policy_kl" not in model.logger.name_to_value
    model.learn(ROLLOUT, reset_num_timesteps=False)
    logged = model.logger.name_to_value
    assert logged["aux/n_phases"] == 1
    assert logged["aux/phase_progress"] == 0
    assert logged["aux/learning_rate"] == 5e-4
    assert {"aux/policy_kl", "aux/value_loss", "aux/aux_value_loss"} <= set(logged)


@pytest.mark.parametrize("as_callback", [False, True])
def test_progress_bar_shows_the_epochs(as_callback, monkeypatch):
    texts: list[str] = []
    original = ProgressBarCallback._on_training_start

    def start(callback: ProgressBarCallback) -> None:
        original(callback)
        monkeypatch.setattr(callback.pbar, "set_description", texts.append)

    monkeypatch.setattr(ProgressBarCallback, "_on_training_start", start)
    model = make()
    if as_callback:
        model.learn(3 * ROLLOUT, [ProgressBarCallback()])
    else:
        model.learn(3 * ROLLOUT, progress_bar=True)
    assert texts[0] == "aux 1/2 0%"
    assert "aux 2/2 50%" in texts
    assert texts[-1] == ""
    model.learn(ROLLOUT, reset_num_timesteps=False)  # without one again
    assert texts[-1] == ""


def test_learning_rate_set_by_hand_holds_from_the_next_learning_on():
    model = make().learn(3 * ROLLOUT)
    model.aux_learning_rate = 1e-4
    model.learn(3 * ROLLOUT)
    assert model.aux_optimizer.param_groups[0]["lr"] == 1e-4


def test_mixin_makes_a_ppg_of_other_classes():
    class MyPPO(PPO):
        pass

    class MyPPG(AuxiliaryPhaseMixin, MyPPO):
        pass

    env = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0)
    assert MyPPG("MlpPolicy", env, **QUICK).learn(3 * ROLLOUT)._n_phases == 1


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_policy_iterations": 0}, ValueError, "n_policy_iterations must be >= 1, got 0"),
        ({"n_policy_iterations": 2.5}, TypeError, "n_policy_iterations must be an integer"),
        ({"n_aux_epochs": -1}, ValueError, "n_aux_epochs must be >= 0, got -1"),
        ({"aux_batch_size": 0}, ValueError, "aux_batch_size must be >= 1, got 0"),
        ({"aux_learning_rate": -1e-3}, ValueError, "aux_learning_rate must be >= 0, got -0.001"),
        ({"aux_learning_rate": "lin_1e-3"}, TypeError, "aux_learning_rate must be a number"),
        ({"aux_learning_rate": lambda _: -1.0}, ValueError, "aux_learning_rate at the start must be >= 0"),
        ({"policy_kwargs": 5}, TypeError, "policy_kwargs must be a dictionary or None, got 5"),
        ({"beta_clone": -1}, ValueError, "beta_clone must be >= 0, got -1"),
        ({"beta_clone": float("nan")}, ValueError, "beta_clone must be >= 0, got nan"),
        ({"vf_true_coef": float("inf")}, ValueError, "vf_true_coef must be >= 0, got inf"),
        ({"vf_aux_coef": -0.5}, ValueError, "vf_aux_coef must be >= 0"),
        ({"n_policy_iteration": 3}, TypeError, "Did you mean 'n_policy_iterations'"),
        ({"prox_decay": 1.0}, ValueError, "prox_decay must be in"),
    ],
)
@pytest.mark.parametrize("algorithm", [PPG, PPGEWMA])
def test_bad_arguments_are_named(algorithm, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(algorithm, **kwargs)


def test_policy_without_auxiliary_head_is_refused(tmp_path):
    policy = PPO.policy_aliases["MlpPolicy"]
    with pytest.raises(ValueError, match="derived from PPGPolicy, which has the auxiliary value head"):
        PPG(policy, "CartPole-v1")
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="derived from PPGPolicy, which has the auxiliary value head"):
        PPG.load(tmp_path / "ppo")


def test_phase_that_cannot_fit_is_refused_before_collection(monkeypatch):
    model = make()
    monkeypatch.setattr("sb3_ppo_ewma.rollouts.available_memory", lambda: 100)
    with pytest.raises(ValueError, match="n_policy_iterations=3 rollouts of n_steps=16 and n_envs=2"):
        make()
    with pytest.raises(ValueError, match="n_policy_iterations=3 rollouts of n_steps=16 and n_envs=2"):
        model.learn(ROLLOUT)
    assert model.num_timesteps == 0
    model.predict(model.observation_space.sample())


@pytest.mark.parametrize("name", ["n_policy_iterations", "n_aux_epochs"])
def test_parameters_set_by_hand_that_do_not_fit_are_refused(name):
    model = make()
    setattr(model, name, 0 if name == "n_aux_epochs" else 5)
    with pytest.raises(ValueError, match=f"{name} was set to . by hand"):
        model.learn(ROLLOUT)


def test_phase_reserves_memory_when_it_is_needed():
    model = make()
    assert model.phase_buffer.nbytes == 0
    model.learn(ROLLOUT)
    assert model.phase_buffer.nbytes == 3 * ROLLOUT * (4 * 4 + 4)


# ---------------------------------------------------------------------- from and to the others


def test_files_of_the_others(tmp_path):
    env = make_vec_env("CartPole-v1", n_envs=N_ENVS)
    model = make(PPGEWMA).learn(4 * ROLLOUT)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="with aux_optimizer, which this model does not use: dropped"):
        plain = PPOEWMA.load(tmp_path / "model", env=env)
    assert plain.prox_decay == "auto"
    plain.learn(ROLLOUT)
    plain.save(tmp_path / "plain")
    with pytest.warns(UserWarning, match="without aux_optimizer: started afresh"):
        PPG.load(tmp_path / "plain", env=env).learn(ROLLOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PPG.load(tmp_path / "model").prox_decay == "auto"


def test_to_ppo():
    model = make().learn(3 * ROLLOUT)
    ppo = model.to_ppo()
    assert type(ppo) is PPO
    assert th.equal(vector(ppo), vector(model))
    ppo.learn(ROLLOUT)


def test_sb3s_switch_of_normalisation_goes_before_our_default():
    model = make(normalize_advantage=False).learn(3 * ROLLOUT)
    assert model.advantage_moments is None
    assert model.normalize_advantage is False
    by_position = PPG("MlpPolicy", "CartPole-v1", 3e-4, 16, 16, 1, 0.99, 0.95, 0.2, None, False)
    assert by_position.advantage_decay is None
    with pytest.raises(ValueError, match=r"advantage_decay=0\.5 .* contradicts normalize_advantage=False"):
        make(normalize_advantage=False, advantage_decay=0.5)


def test_learning_rate_may_be_a_numpy_number():
    assert make(aux_learning_rate=np.float32(0.5)).aux_lr_schedule(1.0) == 0.5


def test_defaults_by_position_and_by_name():
    assert PPG("MlpPolicy", "CartPole-v1").n_epochs == 1
    assert PPG("MlpPolicy", "CartPole-v1", 3e-4, 64, 32, 5).n_epochs == 5
    assert PPG("MlpPolicy", "CartPole-v1", n_epochs=4).n_epochs == 4
    assert PPG("MlpPolicy", "CartPole-v1").policy_ewma is None
    assert PPGEWMA("MlpPolicy", "CartPole-v1").policy_ewma is not None
    assert PPG("MlpPolicy", "CartPole-v1", prox_decay=0.9).policy_ewma is not None
