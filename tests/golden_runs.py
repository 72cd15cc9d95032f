"""Drives the package's own ``train()`` over the recorded data streams, with the recorded minibatches."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ppo_ewma import PPOEWMA
from tests.golden_data import Case, param_layout

POLICY_STEP_KINDS = (0, 1)  # joint and policy steps, each followed by an update of the EWMA

# Names of the reference's layers in our policy
DUAL_NAMES = {
    "pi_enc.lin": "mlp_extractor.policy_net.0",
    "vf_enc.lin": "mlp_extractor.value_net.0",
    "vf_vhead": "value_net",
    "pi_head": "action_net",
    "aux_vf_head": "aux_value_net",
}
SHARED_NAMES = {
    "pi_enc.lin": "features_extractor.linear",
    "pi_vhead": "value_net",
    "pi_head": "action_net",
    "aux_vf_head": "aux_value_net",
}


class TanhTrunk(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box, features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.linear(observations))


class GoldenPolicy(ActorCriticPolicy):
    """SB3's policy with the recorded architectures; observations stay float64, which SB3 would cast to float32."""

    def __init__(self, *args: Any, arch: str, n_hidden: int, **kwargs: Any) -> None:
        self.arch = arch
        if arch == "dual":
            kwargs |= {"net_arch": {"pi": [n_hidden], "vf": [n_hidden]}}
        else:
            kwargs |= {
                "net_arch": [],
                "features_extractor_class": TanhTrunk,
                "features_extractor_kwargs": {"features_dim": n_hidden},
            }
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        # Untouched by PPO, but part of the recorded parameter vectors
        self.aux_value_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 1)

    def extract_features(self, obs: th.Tensor, features_extractor: Any = None) -> th.Tensor:
        return self.features_extractor(obs)

    def evaluate_actions(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        features = self.extract_features(obs)
        latent_pi = self.mlp_extractor.forward_actor(features)
        latent_vf = self.mlp_extractor.forward_critic(features.detach() if self.arch == "detach" else features)
        distribution = self._get_action_dist_from_latent(latent_pi)
        return self.value_net(latent_vf), distribution.log_prob(actions), distribution.entropy()


class PrescribedBuffer(RolloutBuffer):
    """Yields the recorded minibatches, in the dtype of the recording."""

    def __init__(self, *args: Any, dtype: Any, **kwargs: Any) -> None:
        self.dtype = dtype
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        for name in ("rewards", "returns", "values", "log_probs", "advantages"):
            setattr(self, name, getattr(self, name).astype(self.dtype))

    def get(self, batch_size: int | None = None) -> Iterator[Any]:
        n_samples = self.buffer_size * self.n_envs
        list(super().get(n_samples))  # flattens the arrays
        done = 0
        while done < n_samples:
            env, step = np.nonzero(next(self.minibatches))
            # Flattened buffers run through one environment after the other.
            indices = env * self.buffer_size + step % self.buffer_size
            done += len(indices)
            yield self._get_samples(indices)


class SpacesEnv(gym.Env):
    def __init__(self, n_obs: int, n_actions: int, dtype: Any) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_obs,), dtype)
        self.action_space = spaces.Discrete(n_actions)


class GoldenRun:
    """
    One recorded run, repeated by our algorithm.

    :param family: of the case
    :param case: with the recorded stream
    :param feed: train on the recorded advantages and targets (which the reference rounds to float32) instead of our own
    :param algorithm: class and further arguments of the algorithm
    """

    def __init__(self, family: str, case: Case, feed: bool, algorithm: type[PPOEWMA] = PPOEWMA, **kwargs: Any) -> None:
        self.case, self.feed, self.hp, self.data = case, feed, case.hyperparameters, case.arrays
        self.layout = param_layout(family, self.hp["arch"])
        self.names = DUAL_NAMES if self.hp["arch"] == "dual" else SHARED_NAMES
        shapes = {entry["name"]: entry["shape"] for entry in self.layout}
        n_hidden, n_obs = shapes["pi_enc.lin.weight"]
        dtype = np.float32 if case.dtype == th.float32 else np.float64
        n_envs = self.hp["nenv"]
        env = DummyVecEnv([lambda: SpacesEnv(n_obs, shapes["pi_head.weight"][0], dtype)] * n_envs)
        clip_range = self.hp["clip_param"] or None
        # fmt: off
        self.model = algorithm(
            GoldenPolicy, env, learning_rate=self.hp["lr"], n_steps=self.hp["nstep"],
            batch_size=self.hp["nstep"] * n_envs // self.hp["nminibatch"], n_epochs=self.hp["n_epoch_pi"],
            gamma=self.hp["gamma"], gae_lambda=self.hp["lam"], clip_range=clip_range, normalize_advantage=not feed,
            ent_coef=self.hp["entcoef"], vf_coef=self.hp["vfcoef"], max_grad_norm=float("inf"),
            rollout_buffer_class=PrescribedBuffer, rollout_buffer_kwargs={"dtype": dtype}, device="cpu",
            policy_kwargs={
                "arch": self.hp["arch"], "n_hidden": n_hidden,
                "optimizer_kwargs": {"eps": self.hp["adam_eps"], "betas": (self.hp["beta1"], self.hp["beta2"])},
            },
            prox_decay=self.hp["kl_ewma_decay"], kl_coef=self.hp["kl_penalty"],
            max_importance_ratio=self.hp["imp_samp_max"] or None,
            advantage_decay=None if feed else self.hp["adv_ewma_decay"] or 0.0, n_epochs_value=self.hp["n_epoch_vf"],
            staleness=self.hp["staleness"], staleness_mode=self.hp["staleness_loss"], **kwargs,
        )
        # fmt: on
        self.model.set_logger(Logger(None, []))
        self._load(self.data["init"])
        self.params: list[np.ndarray] = []
        self.ewma: list[np.ndarray] = []
        self.weights: list[float] = []
        self._record()

    def _load(self, vector: np.ndarray) -> None:
        tensors = dict(self.model.policy.named_parameters())
        with th.no_grad():
            for entry in self.layout:
                values = vector[entry["offset"] : entry["offset"] + entry["size"]].reshape(entry["shape"])
                tensors[self._our_name(entry["name"])].copy_(th.as_tensor(values))
        if self.model.policy_ewma is not None:
            self.model.policy_ewma.reset(self.model.policy)

    def _our_name(self, name: str) -> str:
        layer, kind = name.rsplit(".", 1)
        return f"{self.names[layer]}.{kind}"

    def _flat(self, policy: nn.Module) -> np.ndarray:
        tensors = dict(policy.named_parameters())
        names = [self._our_name(entry["name"]) for entry in self.layout]
        return np.concatenate([tensors[name].detach().numpy().ravel() for name in names])

    def _record(self) -> None:
        model = self.model

        def after_step(*_: Any) -> None:
            self.params.append(self._flat(model.policy))

        model.policy.optimizer.register_step_post_hook(after_step)
        if model.value_optimizer is not None:
            model.value_optimizer.register_step_post_hook(after_step)
        if model.policy_ewma is not None:
            update = model.policy_ewma.update

            def recorded_update(*args: Any) -> None:
                update(*args)
                self.ewma.append(self._flat(model.policy_ewma.module))
                self.weights.append(float(model.policy_ewma.total_weight))

            model.policy_ewma.update = recorded_update

    def collect(self, segment: int) -> None:
        """Fill the rollout buffer with one recorded segment, as ``collect_rollouts`` would."""
        steps = slice(segment * self.hp["nstep"], (segment + 1) * self.hp["nstep"])
        buffer, data, policy = self.model.rollout_buffer, self.data, self.model.policy
        buffer.reset()
        buffer.observations = data["ob"][:, steps].swapaxes(0, 1).copy()
        buffer.actions = data["ac"][:, steps].T[..., None].copy()
        buffer.rewards = data["reward"][:, steps].T.copy()
        buffer.episode_starts = data["first"][:, steps].T.astype(np.float32)
        last_obs = th.as_tensor(data["ob"][:, steps.stop])
        with th.no_grad():
            flat_obs = th.as_tensor(buffer.observations).flatten(0, 1)
            values, log_prob, _ = policy.evaluate_actions(flat_obs, th.as_tensor(buffer.actions).flatten())
            last_values = policy.evaluate_actions(last_obs, th.zeros(len(last_obs), dtype=th.long))[0]
        shape = buffer.rewards.shape
        buffer.values = values.numpy().reshape(shape)
        buffer.log_probs = log_prob.numpy().reshape(shape) + data["logp_noise"][:, steps].T
        dones = data["first"][:, steps.stop]
        buffer.compute_returns_and_advantage(last_values, dones)
        iteration = list(data["seg_index"]).index(segment) if segment in data["seg_index"] else None
        if self.feed and iteration is not None:
            buffer.advantages = data["seg_adv"][iteration].T.astype(buffer.dtype)
            buffer.returns = data["seg_vtarg"][iteration].T.copy()
        buffer.full = True
        self.model._last_obs, self.model._last_episode_starts = last_obs.numpy(), dones

    def run(self) -> None:
        """Repeat the whole recording."""
        # Events without samples are resets of the EWMA.
        minibatches = iter([mask for mask in self.data["mb_mask"] if mask.any()])
        self.model.rollout_buffer.minibatches = minibatches
        for segment in range(len(self.data["seg_index"]) + self.hp["staleness"]):
            self.collect(segment)
            self.model.train()
        assert next(minibatches, None) is None
