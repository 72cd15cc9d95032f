"""
What masks do: invalid actions count for nothing, in collection, in every term of the losses and in the auxiliary phase.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_ppo_ewma import MaskableRecurrentPPOEWMA, RecurrentPPOEWMA
from sb3_ppo_ewma.contrib import MaskedEvalCallback, WithMasks
from sb3_ppo_ewma.contrib.policies import MaskedLstmPolicy
from sb3_ppo_ewma.policies import copy_policy
from tests.battery.algorithms import MASKABLE, Algorithm
from tests.battery.envs import MaskedSpaceEnv, SpaceEnv, copies
from tests.battery.helpers import assert_same, copy_parameters, record_log

# Every term of the loss that the policy has a part in
ALL_TERMS: dict[str, Any] = {"ent_coef": 0.1, "kl_coef": 0.5, "kl_estimator": "analytic", "learning_rate": 0.02}
ACTION_SPACES = ("discrete", "multidiscrete", "multibinary")
RECURRENT_MASKABLE = [algo for algo in MASKABLE if algo.is_recurrent]


class LastActionEnv(MaskedSpaceEnv):
    """
    Of every action, only the last value is valid.

    :param action_space: of the environment
    """

    def __init__(self, action_space: str) -> None:
        super().__init__(action_space=action_space, episode_length=5)

    def action_masks(self) -> np.ndarray:
        return np.concatenate([np.arange(size) == size - 1 for size in self.sizes])


def values_of(rows: list[tuple[int, dict[str, Any]]], model: Any, name: str) -> list[float]:
    """
    :return: what was logged under the name
    """
    return [row[name] for row in (*(row for _, row in rows), model.logger.name_to_value) if name in row]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_a_single_valid_action_leaves_nothing_to_learn(
    maskable_algo: Algorithm, action_space: str, engine: str
) -> None:
    model = maskable_algo.make(LastActionEnv(action_space), **ALL_TERMS, engine=engine)
    rows, before = record_log(model), copy_parameters(model)
    model.learn(32)
    after = copy_parameters(model)
    # p(valid) = 1 whatever the logits are: entropy, divergence and their gradients are 0, and every ratio is 1
    for name in ("entropy_loss", "kl_loss", "approx_kl", "clip_fraction"):
        values = values_of(rows, model, f"train/{name}")
        assert len(values) == 2
        assert values == pytest.approx([0.0] * 2, abs=1e-12), name
    assert values_of(rows, model, "train/importance_ratio_max") == [1.0] * 2
    if maskable_algo.has_phases:
        assert values_of(rows, model, "aux/policy_kl")[-1] == pytest.approx(0.0, abs=1e-12)
    assert th.equal(before["action_net.weight"], after["action_net.weight"])
    assert th.equal(before["action_net.bias"], after["action_net.bias"])
    assert not th.equal(before["value_net.weight"], after["value_net.weight"])
    assert all(th.isfinite(value).all() for value in after.values())


class FirstOfThreeInvalid(MaskedSpaceEnv):
    """Of actions with three and two values, the first value of the first is invalid."""

    def __init__(self) -> None:
        super().__init__(action_space="multidiscrete", episode_length=5)

    def action_masks(self) -> np.ndarray:
        return np.array([False, True, True, True, True])


def with_shifted_logit(algo: Algorithm, env: SpaceEnv, shift: float, **kwargs: Any) -> dict[str, th.Tensor]:
    """
    :param algo: the algorithm
    :param env: the environment
    :param shift: added to the logit of the first value of the first action
    :param kwargs: arguments of ``make`` and, ``use_masking``, of ``learn``
    :return: parameters after a training, without the shift
    """
    use_masking = kwargs.pop("use_masking", True)
    # Not Adam, which makes steps of one size of any gradient: of rounding, too.
    model = algo.make(
        env, **{**ALL_TERMS, "learning_rate": 0.1}, policy_kwargs={"optimizer_class": th.optim.SGD}, **kwargs
    )
    with th.no_grad():
        model.policy.action_net.bias[0] += shift
    if model.policy_ewma is not None:
        model.policy_ewma.reset()
    model.learn(32, use_masking=use_masking)
    parameters = copy_parameters(model)
    parameters["action_net.bias"][0] -= shift
    return parameters


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_logits_of_invalid_actions_count_for_nothing(maskable_algo: Algorithm, engine: str) -> None:
    """In collection, under π_prox, in both divergences, and under the π_old of the auxiliary phase."""
    runs = [with_shifted_logit(maskable_algo, FirstOfThreeInvalid(), shift, engine=engine) for shift in (0.0, 3.0)]
    for name, value in runs[0].items():
        # sb3-contrib's masked distributions normalise before they mask, which rounds.
        th.testing.assert_close(runs[1][name], value, rtol=0, atol=1e-5)


def test_the_same_logits_count_without_masks(maskable_algo: Algorithm) -> None:
    runs = [
        with_shifted_logit(maskable_algo, SpaceEnv(action_space="multidiscrete"), shift, use_masking=False)
        for shift in (0.0, 3.0)
    ]
    assert max((runs[1][name] - value).abs().max() for name, value in runs[0].items()) > 0.01


class DeadEndEnv(SpaceEnv):
    """
    Has no valid value of the last action in its seventh step.
    """

    def action_masks(self) -> np.ndarray:
        masks = np.ones(3 if self.action_space.shape == () else 5, bool)
        if len(self.actions) == 6:
            masks[{3: 0, 5: 3}[len(masks)] :] = False
        return masks


@pytest.mark.parametrize(("action_space", "which"), [("discrete", ""), ("multidiscrete", " for action 1")])
def test_a_step_without_valid_action_is_refused(maskable_algo: Algorithm, action_space: str, which: str) -> None:
    envs = DummyVecEnv(
        [lambda: MaskedSpaceEnv(action_space=action_space), lambda: DeadEndEnv(action_space=action_space)]
    )
    model = maskable_algo.make(envs)
    before = copy_parameters(model)
    message = f"action_masks must leave a valid action, environment 1 at step 6 of the rollout has none{which}$"
    with pytest.raises(ValueError, match=message):
        model.learn(32)
    assert_same(copy_parameters(model), before)


def test_masks_without_valid_action_are_refused_in_predict(maskable_algo: Algorithm) -> None:
    model = maskable_algo.make(MaskedSpaceEnv(action_space="multidiscrete"))
    observation, masks = np.zeros((3, 3), np.float32), np.ones((3, 5), bool)
    model.predict(observation, action_masks=masks)
    masks[2, 3:] = False
    with pytest.raises(ValueError, match="valid action, environment 2 has none for action 1"):
        model.predict(observation, action_masks=masks)
    with pytest.raises(ValueError, match="valid action, environment 0 has none for action 0"):
        model.predict(observation[0], action_masks=np.array([0, 0, 0, 1, 1]))


class MatrixMaskEnv(MaskedSpaceEnv):
    """Masks as a matrix, with a row for each action, which MaskablePPO takes too."""

    def __init__(self) -> None:
        super().__init__(action_space="multibinary", episode_length=5)

    def step(self, action: Any) -> Any:
        assert action[0] == 1
        return SpaceEnv.step(self, action)

    def action_masks(self) -> np.ndarray:
        return np.array([[False, True], [True, True], [True, True]])


def test_masks_as_a_matrix(maskable_algo: Algorithm) -> None:
    env = MatrixMaskEnv()
    model = maskable_algo.make(DummyVecEnv(copies(MatrixMaskEnv, 2))).learn(64)
    observation = np.zeros(3, np.float32)
    actions = [model.predict(observation, action_masks=env.action_masks())[0] for _ in range(20)]
    assert {int(action[0]) for action in actions} == {1}
    assert {int(action[1]) for action in actions} == {0, 1}


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_masks_of_each_step_are_stored(maskable_algo: Algorithm, action_space: str) -> None:
    def make_env() -> MaskedSpaceEnv:
        return MaskedSpaceEnv(action_space=action_space, episode_length=5)

    stored = []

    class Stored(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            stored.append(self.model.rollout_buffer.action_masks.copy())

    model = maskable_algo.make(DummyVecEnv(copies(make_env, 2))).learn(64, Stored())
    env, expected = make_env(), []
    for step in range(32):
        env.n_steps = step % 5
        expected.append([env.action_masks()] * 2)
    assert np.array_equal(np.concatenate(stored), expected)
    assert model.num_timesteps == 64


class CallsPolicy(BaseCallback):
    """Uses the policy wherever a callback can, without a trace in the random numbers."""

    def _call(self) -> None:
        model: Any = self.model
        generators = th.get_rng_state(), np.random.get_state()
        for n in (1, 2, 5):
            observation = np.zeros((n, 3), np.float32)
            model.predict(observation)
            model.predict(observation, action_masks=np.ones((n, 3)))
            arguments: tuple[Any, ...] = ()
            if hasattr(model.policy, "lstm_actor"):
                zeros = th.zeros(1, n, 4)
                arguments = ((zeros, zeros), (zeros, zeros)), th.zeros(n)
                arguments = type(model._last_lstm_states)(*arguments[0]), arguments[1]
            model.policy(th.zeros(n, 3), *arguments)
            if model.policy_ewma is not None:
                model.proximal_policy(th.zeros(n, 3), *arguments)
        th.set_rng_state(generators[0])
        np.random.set_state(generators[1])

    def _on_rollout_start(self) -> None:
        self._call()

    def _on_step(self) -> bool:
        self._call()
        return True

    def _on_rollout_end(self) -> None:
        self._call()


def test_a_callback_may_use_the_policy(maskable_algo: Algorithm) -> None:
    runs = []
    for callback in (None, CallsPolicy()):
        model = maskable_algo.make(DummyVecEnv(copies(lambda: MaskedSpaceEnv(episode_length=5), 2)))
        model.learn(64, callback)
        runs.append((copy_parameters(model), model.rollout_buffer.action_masks))
    assert_same(*runs)


@pytest.mark.long
@pytest.mark.parametrize("algo", [algo for algo in RECURRENT_MASKABLE if algo.has_average], ids=str)
def test_the_proximal_policy_within_a_rollout_has_no_environments(algo: Algorithm) -> None:
    """Environments in other processes cannot be copied."""
    policies = []

    class Copies(BaseCallback):
        def _on_step(self) -> bool:
            policies.append(self.model.proximal_policy)
            return len(policies) < 3

    env = SubprocVecEnv(copies(MaskedSpaceEnv, 1), start_method="fork")
    algo.make(env).learn(16, Copies())
    env.close()
    assert len(policies) == 3


def test_use_masking_is_that_of_each_training(maskable_algo: Algorithm) -> None:
    model = maskable_algo.make(DummyVecEnv([FirstOfThreeInvalid]))
    model.learn(16)
    assert (model.rollout_buffer.action_masks == 0).sum() == 16
    model.set_env(SpaceEnv(action_space="multidiscrete"))
    model.learn(16, use_masking=False)
    assert (model.rollout_buffer.action_masks == 0).sum() == 0


def swap_policy(callback: BaseCallback) -> None:
    model = callback.model
    model.policy = copy_policy(model.policy).requires_grad_(True)


def copy_the_policy(callback: BaseCallback) -> None:
    assert callback.model.proximal_policy is not None


def call_the_policy(callback: BaseCallback) -> None:
    model, random_state = callback.model, th.get_rng_state()
    observations, starts = th.zeros(3, *model.observation_space.shape), th.ones(3)
    states = [th.zeros(1, 3, model.policy.lstm_actor.hidden_size)] * 2
    with th.no_grad():
        model.policy(observations, RNNStates(tuple(states), tuple(states)), starts)
    th.set_rng_state(random_state)


class Acts(BaseCallback):
    """
    Does something when a rollout begins and after every step of it.

    :param act: what it does
    """

    def __init__(self, act: Callable[[BaseCallback], None]) -> None:
        super().__init__()
        self.act = act

    def _on_rollout_start(self) -> None:
        self.act(self)

    def _on_step(self) -> bool:
        self.act(self)
        return True


class Strict(MaskedSpaceEnv):
    """An invalid action is an error."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_masks()[action]:
            raise ValueError("invalid action")
        return super().step(action)


@pytest.mark.parametrize("act", [swap_policy, copy_the_policy, call_the_policy])
@pytest.mark.parametrize("algo", RECURRENT_MASKABLE, ids=str)
def test_what_callbacks_do_with_the_policy_leaves_the_masks_alone(
    algo: Algorithm, act: Callable[[BaseCallback], None]
) -> None:
    env = DummyVecEnv(copies(lambda: Strict(episode_length=5), 2))
    model = algo.make(env, **({"prox_decay": 0.5} if act is copy_the_policy else {}))
    model.learn(64, Acts(act))
    assert not model.rollout_buffer.action_masks.all()


@pytest.mark.long
def test_policies_are_copied_beside_environments_in_processes() -> None:
    env = SubprocVecEnv(copies(lambda: Strict(episode_length=5), 2))
    RECURRENT_MASKABLE[0].make(env, prox_decay=0.5).learn(64, Acts(copy_the_policy))
    env.close()


def test_masks_reach_a_forward_of_ones_own() -> None:
    class Own(MaskedLstmPolicy):
        def forward(self, *args: Any, action_masks: Any = None) -> Any:
            seen.append(action_masks)
            return super().forward(*args, action_masks=action_masks)

    seen: list[Any] = []
    MaskableRecurrentPPOEWMA(Own, Strict(episode_length=5), n_steps=16, batch_size=8, seed=0).learn(16)
    assert len(seen) == 16
    assert all(masks.shape == (1, 3) for masks in seen)


class Without(MaskedSpaceEnv):
    """
    Its masks are no masks.

    :param masks: what it returns
    """

    def __init__(self, masks: Any) -> None:
        super().__init__(episode_length=5)
        self.masks = masks

    def action_masks(self) -> Any:
        return self.masks


@pytest.mark.parametrize("masks", [None, [True, True], [1.0, float("nan"), 1.0]], ids=str)
def test_masks_of_another_kind_are_refused(masks: Any) -> None:
    model = RECURRENT_MASKABLE[0].make(Without(masks))
    message = "action_masks must be 3 numbers or booleans for every environment"
    with pytest.raises(ValueError, match=message):
        model.learn(16)
    if masks is not None:
        with pytest.raises(ValueError, match=message):
            model.predict(model.env.reset(), action_masks=[masks])


def test_going_on_without_masks_is_told(tmp_path: Path) -> None:
    model = MaskableRecurrentPPOEWMA("MlpLstmPolicy", Strict(), n_steps=16, batch_size=8).learn(16)
    with pytest.warns(UserWarning, match="RecurrentPPO takes no action masks"):
        model.to_ppo()
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="RecurrentPPOEWMA takes no action masks, which its policy was made for"):
        RecurrentPPOEWMA.load(tmp_path / "model")
    buffer, callback = model.rollout_buffer, CallbackList([])
    callback.init_callback(model)
    assert model.collect_rollouts(model.env, callback, buffer, 16, True)  # as MaskablePPO.learn() calls it
    assert not buffer.action_masks.all()


def test_evaluation_keeps_the_states_and_the_masks() -> None:
    class Own(MaskedLstmPolicy):
        def predict(self, observation: Any, state: Any = None, *args: Any, **kwargs: Any) -> Any:
            calls.append((state is not None, kwargs["action_masks"] is not None))
            return super().predict(observation, state, *args, **kwargs)

    calls: list[tuple[bool, bool]] = []
    env = DummyVecEnv(copies(lambda: Strict(episode_length=5), 2))
    model = MaskableRecurrentPPOEWMA(Own, env, n_steps=16, batch_size=8, seed=0)
    callback = MaskedEvalCallback(DummyVecEnv(copies(lambda: Strict(episode_length=5), 2)), eval_freq=16, verbose=0)
    model.learn(32, callback)
    assert callback.model is model
    assert np.isfinite(callback.last_mean_reward)
    assert len(calls) > 5
    assert calls == [(False, True), *[(True, True)] * (len(calls) - 1)]
    calls.clear()
    evaluate_policy(WithMasks(model, env), env, n_eval_episodes=2, warn=False)
    assert calls == [(False, True), *[(True, True)] * (len(calls) - 1)]
