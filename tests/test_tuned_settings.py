"""``tuned_for_n_envs``: what training counts, what models are built with, saved with and loaded with."""

import io
import pickle

import numpy as np
import pytest
import torch as th
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma import (
    PPG,
    PPGEWMA,
    PPOEWMA,
    EwmaMixin,
    MaskablePPG,
    MaskablePPOEWMA,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPGEWMA,
    RecurrentPPOEWMA,
)
from sb3_ppo_ewma.batch_scaling import settings_of

# 256 samples in 4 minibatches, 2 epochs
SETTINGS = {"n_steps": 32, "batch_size": 64, "n_epochs": 2, "gae_lambda": 0.9, "seed": 0, "tuned_for_n_envs": 8}


def envs(n_envs, env_id="CartPole-v1"):
    return make_vec_env(env_id, n_envs, seed=0)


def model_for(n_envs, algorithm=PPOEWMA, **changed):
    policy = policy_of(algorithm)
    small = {"policy_kwargs": {"lstm_hidden_size": 8}} if policy == "MlpLstmPolicy" else {}
    return algorithm(policy, envs(n_envs), **{**SETTINGS, **small, **changed})


def policy_of(algorithm):
    return "MlpLstmPolicy" if issubclass(algorithm, RecurrentPPO) else "MlpPolicy"


def in_memory(model):
    file = io.BytesIO()
    model.save(file)
    return lambda **kwargs: type(model).load(io.BytesIO(file.getvalue()), **kwargs)


# === What training counts ===


@pytest.mark.parametrize("n_envs", [1, 2, 4, 8, 16, 32])
def test_training_is_counted_the_same_per_environment_step(n_envs):
    model = model_for(n_envs, PPGEWMA, n_policy_iterations=2, aux_batch_size=None, advantage_decay=0.5)
    sizes = []
    step = model.policy.optimizer.step
    model.policy.optimizer.step = lambda *args, **kwargs: (sizes.append(1), step(*args, **kwargs))[1]
    model.learn(1024)
    assert model.num_timesteps == 1024
    assert (model.n_envs, model.n_steps * n_envs) == (n_envs, 256)
    # 4 iterations of 2 epochs of 4 minibatches, 2 phases
    assert len(sizes) == 32
    assert model._n_updates == 8
    assert model.logger.name_to_value["aux/n_phases"] == 2
    assert model.current_prox_decay == pytest.approx(4 / 5)
    assert model.aux_optimizer.state_dict()["state"][0]["step"] == 2 * 6 * 32  # phases, epochs, 512 samples by 16
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


def test_a_longer_iteration_makes_as_many_steps_of_as_many_samples():
    # 256 samples of 64 environments would be rollouts of 4 steps; they have 8, and iterations 512 samples
    model = model_for(64, PPGEWMA, n_policy_iterations=2, advantage_decay=0.8)
    assert (model.n_steps, model.batch_size, model.n_policy_iterations) == (8, 64, 1)
    assert model.aux_batch_size == 16  # a sixteenth of 256
    # a centre of mass of 4 gradient steps, a span of 9 iterations of 256 samples
    assert model.current_prox_decay == pytest.approx(4 / 5)
    assert model.advantage_decay == pytest.approx(3.5 / 5.5)
    model.learn(1024)
    assert model.policy.optimizer.state_dict()["state"][0]["step"] == 32
    assert model.logger.name_to_value["aux/n_phases"] == 2


def test_the_average_grows_older_where_the_iteration_leaves_its_data():
    # 8 times the samples: an iteration of 16 minibatches, 8 epochs, 128 gradient steps, against 16 with 8 environments
    model = model_for(128, n_steps=16, n_epochs=8)
    assert (model.n_steps, model.batch_size) == (8, 64)
    assert model.current_prox_decay == pytest.approx(128 / 5 / (128 / 5 + 1))
    # With a proximal policy that young the iteration left its data before, and is not made to stay
    young = model_for(128, n_steps=16, n_epochs=8, prox_decay=0.5)
    assert young.current_prox_decay == pytest.approx(8 / 9)


def test_stale_data_is_trained_on_with_the_average_of_an_iteration():
    # Twice the samples: 16 gradient steps, and half of the iterations
    model = model_for(64, staleness=2)
    assert (model.n_steps, model.staleness) == (8, 1)
    assert model.current_prox_decay == pytest.approx(16 / 17)
    assert model_for(64, max_policy_lag=4).max_policy_lag == 2
    assert model_for(128, max_policy_lag=1).max_policy_lag == 1


def test_minibatches_stay_whole():
    assert model_for(96, n_steps=16, batch_size=128, tuned_for_n_envs=16).n_steps == 8
    assert model_for(100, n_steps=16, batch_size=80, tuned_for_n_envs=20).n_steps == 8
    assert model_for(33, n_steps=32, batch_size=64).n_steps == 8  # 64 would be too many


def test_the_shortest_rollouts_grow_too():
    model = model_for(16, n_steps=1, batch_size=8)
    assert (model.n_steps, model.batch_size) == (1, 8)


@pytest.mark.parametrize("changed", [{"prox_decay": None}, {"target_kl": 0.01}])
def test_iterations_that_must_not_grow(changed):
    with pytest.warns(UserWarning, match="Rollouts of 64 environments have 4 steps, fewer than the 8"):
        model = model_for(64, **changed)
    assert (model.n_steps, model.prox_decay) == (4, changed.get("prox_decay", "auto"))
    with pytest.raises(ValueError, match=r"256 samples, fewer than environments.*possible: 256$"):
        model_for(512, **changed)


def test_noise_is_drawn_as_often():
    kwargs = {"use_sde": True, "n_steps": 32, "batch_size": 64, "tuned_for_n_envs": 8}
    model = PPOEWMA("MlpPolicy", envs(2, "Pendulum-v1"), **kwargs)
    assert (model.n_steps, model.sde_sample_freq) == (128, 32)
    assert PPOEWMA("MlpPolicy", envs(2, "Pendulum-v1"), **kwargs, sde_sample_freq=4).sde_sample_freq == 4
    assert PPOEWMA("MlpPolicy", envs(16, "Pendulum-v1"), **kwargs).sde_sample_freq == -1


def test_the_number_it_was_tuned_for_changes_nothing():
    plain = model_for(8, tuned_for_n_envs=None).learn(512)
    tuned = model_for(8).learn(512)
    for expected, parameter in zip(plain.policy.parameters(), tuned.policy.parameters(), strict=True):
        assert th.equal(expected, parameter)


# === Construction ===


def test_explanation(capsys):
    model_for(16, verbose=1)
    printed = capsys.readouterr().out
    assert "Hyper-parameters tuned for 8 environments, for 16:\nn_envs   8 → 16" in printed
    assert "n_steps  32 → 16  ÷ ratio: an iteration keeps its 256 samples" in printed
    model_for(8, verbose=1)
    assert "tuned for" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_a_name_or_a_single_environment_is_one():
    for env in ("CartPole-v1", envs(1).envs[0]):
        model = PPOEWMA("MlpPolicy", env, **SETTINGS)
        assert (model.n_envs, model.n_steps) == (1, 256)


def test_what_cannot_be_rescaled():
    with pytest.raises(ValueError, match=r"256 samples, which cannot be divided among 3 .*possible: 2 and 4$"):
        model_for(3)
    with pytest.raises(ValueError, match="tuned_for_n_envs must be >= 1, got 0"):
        model_for(2, tuned_for_n_envs=0)
    with pytest.raises(TypeError, match=r"tuned_for_n_envs must be an integer >= 1, got 8\.0"):
        model_for(2, tuned_for_n_envs=8.0)
    # An iteration of 512 environments has twice its samples at least, and a phase a whole number of iterations
    with pytest.raises(ValueError, match=r"up to 32 leaves n_policy_iterations=7 whole for 512 .*: 448 and 896"):
        model_for(512, PPGEWMA, n_policy_iterations=7)


def test_where_iterations_cannot_grow_rollouts_are_shorter():
    with pytest.warns(UserWarning, match=r"have 4 steps.* since n_policy_iterations=1 keeps iterations as short"):
        assert model_for(64, PPGEWMA, n_policy_iterations=1).n_steps == 4
    longer = model_for(64, PPGEWMA, n_policy_iterations=7)  # 8 or more steps, and 14 make 7 iterations 2
    assert (longer.n_steps, longer.n_policy_iterations) == (14, 2)


# === Files ===


@pytest.mark.parametrize("algorithm", [PPOEWMA, PPG, PPGEWMA, RecurrentPPGEWMA])
def test_loaded_for_another_number_it_is_rescaled_from_what_was_tuned(algorithm):
    load = in_memory(model_for(64, algorithm).learn(512))
    assert load(env=envs(8)).n_steps == 32
    assert load(env=envs(1)).n_steps == 256
    again = in_memory(load(env=envs(1)))(env=envs(8))
    expected, settings = settings_of(model_for(8, algorithm)), settings_of(again)
    assert {name: value for name, value in settings.items() if not callable(value)}.items() <= expected.items()
    assert again.num_timesteps == 512
    again.learn(256, reset_num_timesteps=False)
    assert again.num_timesteps == 768


def test_to_predict_nothing_is_rescaled():
    model = model_for(64)
    loaded = in_memory(model)()
    assert (loaded.n_envs, loaded.n_steps, loaded.tuned_for_n_envs) == (64, 8, 8)
    observations = model.observation_space.sample()[None]
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    loaded.set_env(envs(4))
    assert (loaded.n_envs, loaded.n_steps) == (4, 64)


def test_hyperparameters_given_to_load_are_as_tuned():
    load = in_memory(model_for(64))
    assert load(env=envs(16), n_steps=64).n_steps == 32
    assert load(env=envs(16), batch_size=32).batch_size == 32
    assert load(env=envs(16), tuned_for_n_envs=16).n_steps == 32
    kept = load(env=envs(16), tuned_for_n_envs=None)
    assert (kept.n_steps, kept.tuned_hyperparameters) == (8, None)
    plain = in_memory(model_for(8, tuned_for_n_envs=None))
    assert plain(env=envs(16)).n_steps == 32
    assert plain(env=envs(16), tuned_for_n_envs=8).n_steps == 16


def test_hyperparameters_set_by_hand():
    model = model_for(16)
    model.batch_size = 32  # the same for any number
    load = in_memory(model)
    assert load(env=envs(2)).batch_size == 32
    assert load(env=envs(8)).tuned_hyperparameters["batch_size"] == 32
    grown = model_for(64)
    grown.prox_decay = 0.5  # was a number for 64
    load = in_memory(grown)
    assert load(env=envs(64)).prox_decay == 0.5  # and still is
    with pytest.raises(ValueError, match=r"prox_decay was set by hand to 0\.5, .* 2 environments, give load"):
        load(env=envs(2))
    assert load(env=envs(2), prox_decay=0.6).prox_decay == 0.6
    grown.prox_decay, grown.tuned_for_n_envs = 0.8, 4
    with pytest.raises(ValueError, match=r"built with tuned_for_n_envs=8 for 64 .*now there are tuned_for_n_envs=4"):
        grown.learn(512)


def test_hyperparameters_given_to_load_without_environments():
    load = in_memory(model_for(16))
    model = load(n_steps=64)
    model.set_env(envs(16))
    assert model.n_steps == 32
    model = load(n_steps=64)
    model.set_env(envs(4))
    assert model.n_steps == 128
    model = load(tuned_for_n_envs=16)
    model.set_env(envs(16))
    assert model.learn(512).n_steps == 32


class OfItsOwn(PPOEWMA):
    """Has other defaults."""

    def __init__(self, *args, n_steps=16, tuned_for_n_envs=16, **kwargs):
        super().__init__(*args, n_steps=n_steps, tuned_for_n_envs=tuned_for_n_envs, **kwargs)


def test_defaults_of_a_subclass_are_not_those_of_a_file(tmp_path):
    PPO("MlpPolicy", envs(4), n_steps=64, batch_size=32).save(tmp_path / "ppo")
    for n_envs, n_steps in ((16, 64), (4, 256)):
        with pytest.warns(UserWarning, match="started afresh"):
            assert OfItsOwn.load(tmp_path / "ppo", env=envs(n_envs)).n_steps == n_steps
    OfItsOwn("MlpPolicy", envs(3), n_steps=48).save(tmp_path / "own")  # 16 steps are not for 3 environments
    assert OfItsOwn.load(tmp_path / "own", env=envs(3)).n_steps == 256


def test_defaults_of_a_class_in_between():
    class Between(PPO):
        def __init__(self, *args, **kwargs):
            kwargs.setdefault("n_steps", 128)
            super().__init__(*args, **kwargs)

    class Own(EwmaMixin, Between):
        """Takes the default."""

    assert Own("MlpPolicy", envs(64), tuned_for_n_envs=16).n_steps == 32


def test_sb3_loads_the_file(tmp_path):
    model_for(16).save(tmp_path / "model")
    assert PPO.load(tmp_path / "model").n_steps == 16


def test_goes_on_to_the_bit():
    model = model_for(16).learn(512)
    load, env = in_memory(model), pickle.dumps(model.get_env())
    model.learn(512, reset_num_timesteps=False)
    resumed = load(env=pickle.loads(env), force_reset=False).learn(512, reset_num_timesteps=False)
    for one, other in zip(model.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(one, other)
    assert resumed.policy_ewma.total_weight == model.policy_ewma.total_weight


# === Another number of environments in place ===


@pytest.mark.parametrize("algorithm", [PPOEWMA, PPGEWMA, RecurrentPPOEWMA])
def test_set_env(algorithm):
    more = {"n_policy_iterations": 3} if algorithm is PPGEWMA else {}
    model = algorithm(policy_of(algorithm), envs(8), **SETTINGS, **more).learn(512)
    optimizer, parameters = model.policy.optimizer, [each.clone() for each in model.policy.parameters()]
    weight = model.policy_ewma.total_weight
    state = th.get_rng_state()
    model.set_env(envs(16))
    assert th.equal(state, th.get_rng_state())
    assert (model.n_envs, model.n_steps) == (16, 16)
    assert model.policy.optimizer is optimizer
    assert all(th.equal(*pair) for pair in zip(model.policy.parameters(), parameters, strict=True))
    assert model.policy_ewma.total_weight == weight
    model.learn(256, reset_num_timesteps=False)
    assert model.num_timesteps == 768
    if algorithm is PPGEWMA:  # two rollouts before, one after
        assert model.logger.name_to_value["aux/n_phases"] == 1
    with pytest.raises(ValueError, match="possible: 2 and 4"):
        model.set_env(envs(3))
    assert (model.n_envs, model.n_steps, model.get_env().num_envs) == (16, 16, 16)
    model.learn(256, reset_num_timesteps=False)
    model.set_env(envs(8).envs[0])
    assert (model.n_envs, model.n_steps) == (1, 256)
    model.learn(256, reset_num_timesteps=False)
    assert model.num_timesteps == 1280


@pytest.mark.parametrize(
    "algorithm", [MaskablePPOEWMA, MaskablePPG, MaskableRecurrentPPOEWMA, MaskableRecurrentPPGEWMA]
)
def test_set_env_with_masks(algorithm):
    def masked(n_envs):
        return DummyVecEnv([lambda: InvalidActionEnvDiscrete(dim=8, n_invalid_actions=4)] * n_envs)

    model = algorithm(policy_of(algorithm), masked(8), **SETTINGS).learn(256)
    model.set_env(masked(4))
    assert model.n_steps == 64
    assert model.learn(256, reset_num_timesteps=False).num_timesteps == 512


def test_sequences_of_another_length_are_lost_with_a_warning(tmp_path):
    model = model_for(8, RecurrentPPG, n_policy_iterations=3).learn(512)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "rollouts")
    model.set_env(envs(16))
    loaded = RecurrentPPG.load(tmp_path / "model", env=envs(16))
    with pytest.warns(UserWarning, match=r"another number of environments are not read.*expects"):
        loaded.load_replay_buffer(tmp_path / "rollouts")
    for changed in (model, loaded):
        with pytest.warns(UserWarning, match="the phase starts anew"):
            changed.learn(3 * 256, reset_num_timesteps=False)
        assert changed.logger.name_to_value["aux/n_phases"] == 1


def test_rollouts_of_another_size_are_lost_with_a_warning():
    model = model_for(8, staleness=2, prox_decay=0.9).learn(512)
    model.set_env(envs(4))
    with pytest.warns(UserWarning, match="The queue of stale rollouts is not full: the next 2 rollouts"):
        model.learn(256, reset_num_timesteps=False)


def test_files_with_rollouts_of_another_size_are_left_out_with_a_warning(tmp_path):
    model = model_for(8, staleness=2, prox_decay=0.9).learn(512)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "rollouts")
    loaded = PPOEWMA.load(tmp_path / "model", env=envs(4))
    with pytest.warns(UserWarning, match=r"another number of environments are not read.*the model expects"):
        loaded.load_replay_buffer(tmp_path / "rollouts")


def test_without_it_the_number_stays():
    model = model_for(8, tuned_for_n_envs=None)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(envs(4))
