"""Drives the package's own ``train()`` over the recorded data streams, with the recorded minibatches."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ppo_ewma import PPG, PPOEWMA, PPGPolicy
from tests.golden_data import Case, param_layout

POLICY_STEP_KINDS = (0, 1)  # joint and policy steps, each followed by an update of the EWMA
AUXILIARY_STEP, EWMA_RESET = 3, 4

# Names of the reference's layers in our policy
NAMES = {
    "pi_enc.lin": "features_extractor.mlp.0",
    "vf_enc.lin": "vf_features_extractor.mlp.0",
    "pi_vhead": "value_net",
    "vf_vhead": "value_net",
    "pi_head": "action_net",
    "aux_vf_head": "aux_value_net",
}


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
    :param fused: SB3's arithmetic with its own optimiser, or that of the default settings
    :param algorithm: class and further arguments of the algorithm
    """

    def __init__(
        self,
        family: str,
        case: Case,
        feed: bool,
        fused: bool = False,
        algorithm: type[PPOEWMA] = PPOEWMA,
        **kwargs: Any,
    ) -> None:
        self.case, self.feed, self.hp, self.data = case, feed, case.hyperparameters, case.arrays
        self.layout = param_layout(family, self.hp["arch"])
        shapes = {entry["name"]: entry["shape"] for entry in self.layout}
        n_hidden, n_obs = shapes["pi_enc.lin.weight"]
        dtype = np.float32 if case.dtype == th.float32 else np.float64
        n_envs = self.hp["nenv"]
        env = DummyVecEnv([lambda: SpacesEnv(n_obs, shapes["pi_head.weight"][0], dtype)] * n_envs)
        clip_range = self.hp["clip_param"] or None
        # fmt: off
        self.model = algorithm(
            PPGPolicy, env, learning_rate=self.hp["lr"], n_steps=self.hp["nstep"],
            batch_size=self.hp["nstep"] * n_envs // self.hp["nminibatch"], n_epochs=self.hp["n_epoch_pi"],
            gamma=self.hp["gamma"], gae_lambda=self.hp["lam"], clip_range=clip_range, normalize_advantage=not feed,
            ent_coef=self.hp["entcoef"], vf_coef=self.hp["vfcoef"], max_grad_norm=float("inf"),
            rollout_buffer_class=PrescribedBuffer, rollout_buffer_kwargs={"dtype": dtype}, device="cpu",
            policy_kwargs={
                "critic_arch": self.hp["arch"], "trunk_arch": [n_hidden], "net_arch": [],
                "optimizer_kwargs": {"eps": self.hp["adam_eps"], "betas": (self.hp["beta1"], self.hp["beta2"]),
                                     "fused": fused},
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
        return f"{NAMES[layer]}.{kind}"

    def _flat(self, policy: nn.Module) -> np.ndarray:
        tensors = dict(policy.named_parameters())
        names = [self._our_name(entry["name"]) for entry in self.layout]
        return np.concatenate([tensors[name].detach().numpy().ravel() for name in names])

    def _record(self) -> None:
        step = self.model._gradient_step

        def recorded_step(*args: Any, updates_average: bool = False) -> bool:
            made = step(*args, updates_average=updates_average)
            self.params.append(self._flat(self.model.policy))
            if updates_average and self.model.policy_ewma is not None:
                self._record_ewma()
            return made

        self.model._gradient_step = recorded_step

    def _record_ewma(self) -> None:
        self.ewma.append(self._flat(self.model.policy_ewma.module))
        self.weights.append(float(self.model.policy_ewma.total_weight))

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
        is_policy_step = np.isin(self.data["step_kind"], (AUXILIARY_STEP, EWMA_RESET), invert=True)
        minibatches = iter(self.data["mb_mask"][is_policy_step])
        self.model.rollout_buffer.minibatches = minibatches
        # SB3 casts observations to float32.
        with (
            patch("stable_baselines3.common.policies.preprocess_obs", lambda obs, *_, **__: obs),
            patch("sb3_ppo_ewma._engine.forward.preprocessing", lambda *_: lambda obs: obs),
        ):
            for segment in range(len(self.data["seg_index"]) + self.hp["staleness"]):
                self.collect(segment)
                self.model.train()
        assert next(minibatches, None) is None


class GoldenPhasicRun(GoldenRun):
    """The same with auxiliary phases; see there."""

    def __init__(
        self, family: str, case: Case, feed: bool, fused: bool = False, algorithm: type[PPG] = PPG, **kwargs: Any
    ) -> None:
        hp = case.hyperparameters
        coefficients = hp["name2coef"]
        super().__init__(
            family,
            case,
            feed,
            fused,
            algorithm,
            n_policy_iterations=hp["n_pi"],
            n_aux_epochs=hp["n_aux_epochs"],
            aux_learning_rate=hp["aux_lr"],
            beta_clone=coefficients.get("pol_distance", 1.0),
            vf_true_coef=coefficients.get("vf_true", 1.0),
            vf_aux_coef=coefficients.get("vf_aux", 1.0),
            **kwargs,
        )
        # Ours are those of the policy's optimiser
        for group in self.model.aux_optimizer.param_groups:
            group["betas"] = (hp["aux_beta1"], hp["aux_beta2"])

    def _record(self) -> None:
        super()._record()
        model = self.model
        if model.policy_ewma is None or model.phase_buffer is None:
            return
        end_iteration = model._end_iteration

        def recorded_end(*args: Any) -> None:
            n_phases = model._n_phases
            end_iteration(*args)
            if model._n_phases > n_phases:
                self._record_ewma()  # reset by now

        model._end_iteration = recorded_end

    def run(self) -> None:
        """Repeat the whole recording."""
        masks = iter(self.data["mb_mask"][self.data["step_kind"] == AUXILIARY_STEP])
        buffer = self.model.phase_buffer
        if buffer is not None:
            buffer.minibatches = lambda _: self._prescribed(buffer.n_samples, masks)
        super().run()
        assert next(masks, None) is None

    def _prescribed(self, n_samples: int, masks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        n_steps, n_envs = self.hp["nstep"], self.hp["nenv"]
        done = 0
        while done < n_samples:
            env, step = np.nonzero(next(masks))
            iterations = [list(self.data["seg_index"]).index(segment) for segment in step // n_steps]
            # Stored rollouts run through one environment after the other.
            indices = (np.array(iterations) % self.hp["n_pi"] * n_envs + env) * n_steps + step % n_steps
            done += len(indices)
            yield indices
