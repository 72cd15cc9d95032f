"""The mixin over sb3-contrib's algorithms; bit-equality with them when it is off stands in test_bit_equality.py."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

import sb3_ppo_ewma
from sb3_ppo_ewma import (
    AuxiliaryPhaseMixin,
    EwmaMixin,
    MaskablePPG,
    MaskablePPGEWMA,
    MaskablePPOEWMA,
    MaskableRecurrentPPG,
    MaskableRecurrentPPGEWMA,
    MaskableRecurrentPPOEWMA,
    RecurrentPPG,
    RecurrentPPGEWMA,
    RecurrentPPOEWMA,
)

QUICK = {"n_steps": 32, "batch_size": 24, "n_epochs": 2, "device": "cpu", "learning_rate": 0.01}
LSTM = {"net_arch": [8], "lstm_hidden_size": 8}

OPTIONS = [
    {},
    {"kl_coef": 1.0, "kl_estimator": "analytic", "clip_range": None},
    {"advantage_decay": 0.5, "n_epochs_value": 1},
    {"recompute_advantages": True, "staleness": 1, "prox_decay": None},
    {"staleness": 1, "staleness_mode": "proximal"},
]


def parameters(policy: th.nn.Module) -> list[th.Tensor]:
    return [tensor.clone() for tensor in policy.state_dict().values()]


def all_equal(a: list[th.Tensor], b: list[th.Tensor]) -> bool:
    return all(th.equal(x, y) for x, y in zip(a, b, strict=True))


def make_recurrent(**kwargs) -> RecurrentPPOEWMA:
    env = make_vec_env(kwargs.pop("env", "CartPole-v1"), 2)
    policy_kwargs = {**LSTM, **kwargs.pop("policy_kwargs", {})}
    return RecurrentPPOEWMA("MlpLstmPolicy", env, policy_kwargs=policy_kwargs, **{**QUICK, **kwargs})


def make_maskable(env=InvalidActionEnvDiscrete, policy="MlpPolicy", **kwargs) -> MaskablePPOEWMA:
    return MaskablePPOEWMA(
        policy, env(dim=6, n_invalid_actions=3), policy_kwargs={"net_arch": [8]}, **{**QUICK, **kwargs}
    )


def make_both(algorithm=MaskableRecurrentPPOEWMA, **kwargs) -> MaskableRecurrentPPOEWMA:
    env = InvalidActionEnvDiscrete(dim=6, n_invalid_actions=3)
    return algorithm("MlpLstmPolicy", env, policy_kwargs=LSTM, **{**QUICK, **kwargs})


def make_phasic(**kwargs) -> MaskableRecurrentPPGEWMA:
    return make_both(MaskableRecurrentPPGEWMA, n_policy_iterations=3, n_aux_epochs=1, **kwargs)


@pytest.mark.long
@pytest.mark.parametrize("kwargs", OPTIONS)
@pytest.mark.parametrize("make", [make_recurrent, make_maskable, make_both, make_phasic])
def test_training_saving_and_loading(make, kwargs, tmp_path):
    model = make(**kwargs)
    before = parameters(model.policy)
    model.learn(256)
    after = parameters(model.policy)
    assert not all_equal(before, after)
    assert all(th.isfinite(tensor).all() for tensor in after)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env())
    assert all_equal(after, parameters(loaded.policy))
    if model.proximal_policy is not None:
        assert all_equal(parameters(model.proximal_policy), parameters(loaded.proximal_policy))
        assert not all_equal(after, parameters(loaded.proximal_policy))
    loaded.learn(64)


@pytest.mark.parametrize("lstm", [{"enable_critic_lstm": True}, {"enable_critic_lstm": False}, {"shared_lstm": True}])
def test_recurrent_value_recomputation_on_every_critic(lstm):
    if lstm.get("shared_lstm"):
        lstm = {"shared_lstm": True, "enable_critic_lstm": False}
    model = make_recurrent(policy_kwargs=lstm, recompute_advantages=True).learn(128)
    assert all(th.isfinite(tensor).all() for tensor in parameters(model.policy))


class ShiftAdvantages(BaseCallback):
    """Keeps the collected advantages, and makes those in the buffer others."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.collected = buffer.advantages.copy()
        buffer.advantages += 100


@pytest.mark.parametrize("make", [make_recurrent, make_maskable, make_both])
def test_recomputed_advantages_are_those_of_collection_before_any_update(make):
    model = make(learning_rate=0.0, recompute_advantages=True).learn(64)
    model.learn(64, callback := ShiftAdvantages(), reset_num_timesteps=False)
    recomputed = model.rollout_buffer.advantages.ravel()
    np.testing.assert_allclose(recomputed, callback.collected.swapaxes(0, 1).ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lstm", [{"lstm_hidden_size": 5}, {"n_lstm_layers": 2}, {"enable_critic_lstm": False}])
def test_recurrent_average_is_saved_alone(lstm, tmp_path):
    proximal = make_recurrent(policy_kwargs=lstm).learn(64).proximal_policy
    proximal.save(tmp_path / "proximal")
    loaded = type(proximal).load(tmp_path / "proximal")
    assert all_equal(parameters(proximal), parameters(loaded))


class PoisonedPadding(RecurrentActorCriticPolicy):
    """Returns other numbers for padding, whose observations are 0."""

    poison = 0.0
    n_padded = 0

    def evaluate_actions(self, obs, actions, lstm_states, episode_starts):
        values, log_prob, entropy = super().evaluate_actions(obs, actions, lstm_states, episode_starts)
        padding = (obs == 0).all(dim=1)
        self.n_padded += int(padding.sum())
        shift = padding.float() * self.poison
        return values + shift[:, None], log_prob + shift, entropy + shift


def test_padding_does_not_move_the_loss():
    """Sequences of several lengths in one minibatch: padded entries must count for nothing."""
    trained = []
    for poison in (0.0, 3.0):
        env = make_vec_env("CartPole-v1", 2, seed=0)
        model = RecurrentPPOEWMA(PoisonedPadding, env, seed=0, advantage_decay=0.0, policy_kwargs=LSTM, **QUICK)
        model.policy.poison = poison
        model.learn(128)
        assert model.policy.n_padded > 0
        trained.append(parameters(model.policy))
    assert all_equal(*trained)


class RecordingPolicy(MaskableActorCriticPolicy):
    """Notes whether gradients are computed, and whether there are masks."""

    def evaluate_actions(self, obs, actions, action_masks=None):
        vars(self).setdefault("evaluations", set()).add((th.is_grad_enabled(), action_masks is not None))
        return super().evaluate_actions(obs, actions, action_masks)


@pytest.mark.parametrize("env", [InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete])
def test_masks_reach_the_proximal_policy(env):
    if env is InvalidActionEnvMultiDiscrete:
        env = lambda dim, n_invalid_actions: InvalidActionEnvMultiDiscrete(dims=[2, dim], n_invalid_actions=3)  # noqa: E731
    model = make_maskable(env, RecordingPolicy, kl_coef=1.0, kl_estimator="analytic").learn(64)
    assert model.policy.evaluations == {(True, True), (False, True)}  # π_θ, π_prox
    masks = np.array(model.get_env().env_method("action_masks"))
    observation = model.get_env().reset()
    for _ in range(20):
        action, _ = model.proximal_policy.predict(observation, action_masks=masks)
        assert masks[0, int(action[0] if action.ndim == 1 else action[0, -1])] or action.ndim > 1


@pytest.mark.parametrize(
    ("make", "plain"),
    [(make_recurrent, RecurrentPPO), (make_maskable, MaskablePPO), (make_both, RecurrentPPO)],
)
def test_back_to_the_plain_algorithm(make, plain, tmp_path):
    model = make().learn(64)
    back = model.to_ppo()
    assert type(back) is plain
    back.save(tmp_path / "plain")
    loaded = plain.load(tmp_path / "plain", env=model.get_env())
    assert all_equal(parameters(loaded.policy), parameters(model.policy))
    with pytest.warns(UserWarning, match="without policy_ewma: started afresh"):
        again = type(model).load(tmp_path / "plain", env=model.get_env())
    assert all_equal(parameters(again.proximal_policy), parameters(model.policy))


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (make_recurrent, RecurrentPPO),
        (make_maskable, MaskablePPO),
        (make_both, RecurrentPPO),
        (make_phasic, RecurrentPPO),
    ],
)
def test_the_plain_algorithm_loads_the_file(make, plain, tmp_path):
    model = make().learn(64)
    model.save(tmp_path / "model")
    loaded = plain.load(tmp_path / "model", env=model.get_env())
    assert type(loaded) is plain
    assert all_equal(parameters(loaded.policy), parameters(model.policy))
    observations = np.stack([model.observation_space.sample() for _ in range(20)])
    assert np.array_equal(*(each.predict(observations, deterministic=True)[0] for each in (loaded, model)))
    before = parameters(loaded.policy)
    assert loaded.learn(64, reset_num_timesteps=False).num_timesteps == 128
    assert not all_equal(parameters(loaded.policy), before)
    make(clip_range=None).save(tmp_path / "model")
    with pytest.raises(AssertionError, match=r"to_ppo\(\)"):
        plain.load(tmp_path / "model")


PLAIN = [
    (RecurrentPPOEWMA, RecurrentPPO),
    (RecurrentPPG, RecurrentPPO),
    (RecurrentPPGEWMA, RecurrentPPO),
    (MaskablePPOEWMA, MaskablePPO),
    (MaskablePPG, MaskablePPO),
    (MaskablePPGEWMA, MaskablePPO),
    (MaskableRecurrentPPOEWMA, RecurrentPPO),
    (MaskableRecurrentPPG, RecurrentPPO),
    (MaskableRecurrentPPGEWMA, RecurrentPPO),
]


@pytest.mark.parametrize(("cls", "plain"), PLAIN)
def test_signature(cls, plain):
    assert issubclass(cls, EwmaMixin)
    assert issubclass(cls, plain)
    assert issubclass(cls, AuxiliaryPhaseMixin) == ("PPG" in cls.__name__)
    assert sb3_ppo_ewma.__all__.count(cls.__name__) == 1
    ours, theirs = inspect.signature(cls).parameters, inspect.signature(plain).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    others = {"n_epochs"} if "PPG" in cls.__name__ else set()
    assert {name for name in theirs if ours[name].default != theirs[name].default} == others
    assert ours["prox_decay"].default == (None if cls.__name__.endswith("PPG") else "auto")
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)


@pytest.mark.parametrize("masks", [True, False])
def test_learn_has_the_arguments_of_the_plain_algorithm(masks):
    cls, plain = (MaskableRecurrentPPG, MaskablePPO) if masks else (RecurrentPPG, RecurrentPPO)
    ours, theirs = (list(inspect.signature(each.learn).parameters) for each in (cls, plain))
    assert ours[: len(theirs)] == theirs


@pytest.mark.long
def test_missing_sb3_contrib_is_said_in_one_sentence():
    code = (
        "import sys; sys.modules['sb3_contrib'] = None\n"
        "import sb3_ppo_ewma\n"
        "try:\n    sb3_ppo_ewma.RecurrentPPOEWMA\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RecurrentPPOEWMA needs sb3-contrib: pip install" in result.stdout


class OwnLearn(RecurrentPPO):
    """Has defaults of its own."""

    def learn(self, total_timesteps, callback=None, log_interval=50, tb_log_name="mine", **kwargs):
        self.logged = log_interval, tb_log_name
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, **kwargs)


def test_defaults_of_an_own_learn():
    class Own(EwmaMixin, OwnLearn):
        policy_evaluation = RecurrentPPOEWMA.policy_evaluation

    model = Own("MlpLstmPolicy", make_vec_env("CartPole-v1", 2), policy_kwargs=LSTM, **QUICK)
    assert model.learn(64).logged == (50, "mine")
    assert model.learn(64, log_interval=3, tb_log_name="other").logged == (3, "other")
