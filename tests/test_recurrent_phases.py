"""The auxiliary phase of recurrent policies: whole sequences, each step once, from the states of collection."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma import MaskableRecurrentPPG, RecurrentPPG

N_STEPS, LENGTHS, N_ROLLOUTS = 8, (3, 5, 11), 3  # steps of a rollout, of episodes in each environment; of a phase
N_ENVS = len(LENGTHS)
N_SAMPLES = N_STEPS * N_ENVS * N_ROLLOUTS
CLASSES = [RecurrentPPG, MaskableRecurrentPPG]
NETWORKS: dict[str, dict[str, Any]] = {
    "two_lstms": {},
    "shared": {"shared_lstm": True},
    "actor_only": {"enable_critic_lstm": False, "n_lstm_layers": 2},
}


class NumberedEnv(gym.Env[np.ndarray, int]):
    """
    Numbers its observations, over all episodes, which have one length.

    :param index: of the environment; numbers begin with a hundred times it
    """

    observation_space = spaces.Box(0, 10, (1,))
    action_space = spaces.Discrete(3)

    def __init__(self, index: int) -> None:
        self.index, self.number = index, 100 * index - 1

    def observe(self) -> np.ndarray:
        self.number += 1
        return np.array([self.number / 100], np.float32)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(seed=kwargs.get("seed"))
        if self.number % 100 != 99:
            self.number -= 1  # the last observation of an episode is not stored, and its number not used
        return self.observe(), {}

    def step(self, action: int) -> Any:
        observation = self.observe()
        return observation, float(action), self.number % 100 % LENGTHS[self.index] == 0, False, {}

    def action_masks(self) -> np.ndarray:
        return masks_of(self.number)


def masks_of(number: int) -> np.ndarray:
    """:return: masks of an observation"""
    return np.array([True, number % 2 == 0, True])


def make(cls: Any, policy: Any = "MlpLstmPolicy", network: str = "two_lstms", **kwargs: Any) -> Any:
    """:return: a model that does not learn, so that collection can be repeated, with outputs that vary"""
    kwargs = {"learning_rate": 0.0, "aux_learning_rate": 0.0, "n_aux_epochs": 2, **kwargs}
    model = cls(
        policy,
        DummyVecEnv([lambda i=i: NumberedEnv(i) for i in range(N_ENVS)]),  # type: ignore[misc]
        n_steps=N_STEPS,
        batch_size=N_STEPS * N_ENVS,
        n_policy_iterations=N_ROLLOUTS,
        policy_kwargs={"lstm_hidden_size": 4, "net_arch": [4], "ortho_init": False, **NETWORKS[network]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(3)
    return model


class Returns(BaseCallback):
    """Keeps the value targets by number of the observation."""

    def __init__(self) -> None:
        super().__init__()
        self.by_number: dict[int, float] = {}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer
        numbers = np.rint(100 * buffer.observations).astype(int).ravel()
        self.by_number.update(zip(numbers.tolist(), buffer.returns.ravel().tolist(), strict=True))


class Step:
    """
    What a policy computes at one step, in a loop over the steps of an episode.

    :param states: hidden and cell state of actor and critic before the step, (layers, 1, units) each
    :param value: V
    :param aux_value: V_aux
    """

    def __init__(self, states: list[th.Tensor], value: float, aux_value: float) -> None:
        self.states, self.value, self.aux_value = states, value, aux_value


@th.no_grad()
def steps_by_hand(policy: Any) -> dict[int, Step]:
    """:return: all steps of the phase by number of the observation"""
    steps = {}
    for index, length in enumerate(LENGTHS):
        zero = th.zeros(policy.lstm_actor.num_layers, 1, 4)
        actor = critic = (zero, zero)
        for t in range(N_STEPS * N_ROLLOUTS):
            before = [*actor, *critic]  # as stored: an episode's beginning comes after
            if t % length == 0:
                actor = critic = (zero, zero)
            features = th.tensor([[[(100 * index + t) / 100]]])
            latent_pi, actor = policy.lstm_actor(features, actor)
            if policy.lstm_critic is not None:
                latent_vf, critic = policy.lstm_critic(features, critic)
            else:
                latent_vf = latent_pi if policy.critic is None else policy.critic(features)
                critic = actor
            extractor = policy.mlp_extractor
            value = policy.value_net(extractor.forward_critic(latent_vf)).item()
            aux_value = policy.aux_value_net(extractor.forward_actor(latent_pi)).item()
            steps[100 * index + t] = Step(before, value, aux_value)
    return steps


def recording(base: Any) -> Any:
    """:return: a policy's class that keeps what it is given in the auxiliary phase, and its answers"""

    class Recording(base):  # type: ignore[misc]  # of either family
        def evaluate_auxiliary(self, obs: Any, lstm_states: Any, episode_starts: Any, **kwargs: Any) -> Any:
            result = super().evaluate_auxiliary(obs, lstm_states, episode_starts, **kwargs)
            states = [state.clone() for pair in lstm_states for state in pair]
            call = obs, states, episode_starts, kwargs.get("action_masks"), *(each.detach() for each in result[1:])
            vars(self).setdefault("calls", []).append(call)
            return result

    return Recording


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cls", CLASSES)
def test_sequences_are_those_of_collection(cls: Any, network: str) -> None:
    model = make(cls, recording(cls.policy_aliases["MlpLstmPolicy"]), network, aux_batch_size=20)
    model.learn(N_SAMPLES)
    calls, by_hand = model.policy.calls, steps_by_hand(model.policy)
    # 9 sequences of 8 steps; 20 samples are 2 of them
    assert [len(call[0]) for call in calls] == 2 * [16, 16, 16, 16, 8]
    epochs = []
    for observations, states, episode_starts, masks, values, aux_values in calls:
        numbers = np.rint(100 * observations.numpy()).astype(int).ravel()
        epochs.append(numbers)
        for i, sequence in enumerate(numbers.reshape(-1, N_STEPS)):
            assert sequence[0] % 100 % N_STEPS == 0
            assert np.array_equal(sequence, sequence[0] + np.arange(N_STEPS))
            for state, expected in zip(states, by_hand[sequence[0]].states, strict=True):
                th.testing.assert_close(state[:, i : i + 1], expected)
        begins = [number % 100 % LENGTHS[number // 100] == 0 for number in numbers]
        assert episode_starts.bool().tolist() == begins
        # Episodes that begin within a sequence start from zero.
        assert values.tolist() == pytest.approx([by_hand[number].value for number in numbers], abs=1e-5)
        assert aux_values.tolist() == pytest.approx([by_hand[number].aux_value for number in numbers], abs=1e-5)
        if cls is MaskableRecurrentPPG:
            assert np.array_equal(masks.numpy().astype(bool), [masks_of(number) for number in numbers])
        else:
            assert masks is None
    # Every step once in each epoch, in another order
    first, second = np.concatenate(epochs[:5]), np.concatenate(epochs[5:])
    assert sorted(first) == sorted(second) == sorted(by_hand)
    assert not np.array_equal(first, second)
    # The states matter, and differ between networks.
    assert np.std([step.aux_value for step in by_hand.values()]) > 0.01


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cls", CLASSES)
def test_terms_of_the_loss(cls: Any, network: str, engine: str) -> None:
    """Means over all steps, with episodes of several lengths in a minibatch: padding would change them."""
    model = make(cls, network=network, engine=engine, aux_batch_size=24)  # 3 minibatches of one size
    model.learn(N_SAMPLES, returns := Returns())
    by_hand, log = steps_by_hand(model.policy), model.logger.name_to_value
    targets = returns.by_number
    assert targets.keys() == by_hand.keys()
    for name in ("value", "aux_value"):
        errors = [getattr(step, name) - targets[number] for number, step in by_hand.items()]
        assert log[f"aux/{name}_loss"] == pytest.approx(np.mean(np.square(errors)), rel=1e-4)
    # Nothing was learned: π_θ is π_old at every step, if both saw the same states and masks.
    assert log["aux/policy_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("aux_batch_size", "n_minibatches"),
    # 24 samples of a rollout, by 16, are 1
    [(None, 9), (1, 9), (8, 9), (15, 9), (16, 5), (24, 3), (71, 2), (72, 1), (1000, 1)],
)
def test_minibatches_are_whole_sequences(aux_batch_size: int | None, n_minibatches: int) -> None:
    model = make(RecurrentPPG, aux_batch_size=aux_batch_size, n_aux_epochs=3)
    model.learn(2 * N_SAMPLES)
    # Two phases of three epochs
    assert model.aux_optimizer.state_dict()["state"][0]["step"] == 2 * 3 * n_minibatches


@pytest.mark.parametrize("cls", CLASSES)
def test_another_phase_changes_the_policy_through_its_memory(cls: Any) -> None:
    """The auxiliary losses train the LSTM of the policy, by the head alone, and the critic's."""
    model = make(cls, aux_learning_rate=1e-3, aux_batch_size=24, beta_clone=0.0)
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    model.learn(N_SAMPLES)
    changed = {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])}
    # Without the divergence, what belongs to the policy alone stays.
    assert set(before) - changed == {"action_net.weight", "action_net.bias"}
