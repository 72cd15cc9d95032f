"""Drives the package's own ``train()`` over the recorded data streams, with the recorded minibatches, by any engine."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ppo_ewma import PPG, PPOEWMA, PPGPolicy
from sb3_ppo_ewma._engine.iteration import Engine, Iteration, Objective
from sb3_ppo_ewma._engine.selection import EngineSelector
from tests.golden_data import Case, param_layout

AUXILIARY_STEP, EWMA_RESET = 3, 4
STEP_KINDS = {Objective(True, True): 0, Objective(True, False): 1, Objective(False, True): 2}
POLICY_STEP_KINDS = [kind for objective, kind in STEP_KINDS.items() if objective.policy]
VALUE_STEP_KINDS = [kind for objective, kind in STEP_KINDS.items() if objective.value]

# Names of the reference's layers in our policies, with a trunk and without one
NAMES = {"pi_vhead": "value_net", "vf_vhead": "value_net", "pi_head": "action_net", "aux_vf_head": "aux_value_net"}
TRUNK_NAMES = {"pi_enc.lin": "features_extractor.mlp.0", "vf_enc.lin": "vf_features_extractor.mlp.0", **NAMES}
MLP_NAMES = {"pi_enc.lin": "mlp_extractor.policy_net.0", "vf_enc.lin": "mlp_extractor.value_net.0", **NAMES}


class OwnPolicy(PPGPolicy):
    """Computes what its base class does, which no engine can know."""

    def evaluate_actions(self, *args: Any) -> Any:
        return super().evaluate_actions(*args)


class Way(NamedTuple):
    """
    How a run is made.

    :param engine: name of the engine that makes the policy phase's steps
    :param policy: class or name of the policy
    :param is_mlp: whether its networks are SB3's, behind an extractor without parameters
    :param pause: when the engine puts parameters and averages in place, to be recorded
    :param arguments: further arguments of the algorithm
    """

    engine: str
    policy: Any
    is_mlp: bool = False
    pause: Literal["step", "epoch"] = "step"
    arguments: tuple[tuple[str, Any], ...] = ()

    def claims(self, hp: dict[str, Any]) -> bool:
        """
        :param hp: hyper-parameters of a recording
        :return: whether it can be repeated in this way
        """
        is_joint = hp["n_epoch_pi"] == hp["n_epoch_vf"]
        return not self.is_mlp or (hp["arch"] == "dual" and (is_joint or self.engine == "reference"))


REFERENCE, COMPILE = (("engine", "reference"),), (("torch_compile", True),)
WAYS = {
    "reference": Way("reference", PPGPolicy, arguments=REFERENCE),
    "reference of MlpPolicy": Way("reference", "MlpPolicy", is_mlp=True, arguments=REFERENCE),
    "fused": Way("fused", OwnPolicy),
    "standard": Way("standard", PPGPolicy),
    "dense": Way("dense", "MlpPolicy", is_mlp=True),
    "dense by the epoch": Way("dense", "MlpPolicy", is_mlp=True, pause="epoch"),
    "compiled": Way("compiled", PPGPolicy, arguments=COMPILE),
    # Steps wait for each other until the end of an epoch.
    "compiled dense": Way("compiled dense", "MlpPolicy", is_mlp=True, pause="epoch", arguments=COMPILE),
}


class SpacesEnv(gym.Env):
    def __init__(self, n_obs: int, n_actions: int, dtype: Any) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (n_obs,), dtype)
        self.action_space = spaces.Discrete(n_actions)


class RecordingEngine:
    """
    Passes everything on to an engine, and lets a run record what it has done.

    :param engine: the engine
    :param run: the run
    :param pause: when to record
    """

    def __init__(self, engine: Engine, run: "GoldenRun", pause: str) -> None:
        self._engine, self._run, self._pause = engine, run, pause
        self.name = engine.name
        self.minibatches, self.old_parameters = engine.minibatches, engine.old_parameters
        self.synchronize = engine.synchronize

    def step(self, minibatch: Any, objective: Objective) -> bool:
        return self._after_step(self._engine.step(minibatch, objective), STEP_KINDS[objective])

    def auxiliary_step(self, *args: Any) -> bool:
        return self._after_step(self._engine.auxiliary_step(*args), AUXILIARY_STEP)

    def _after_step(self, made: bool, kind: int) -> bool:
        self._run.begin_event(kind)
        if self._pause == "step":
            self._record()
        return made

    def end_epoch(self) -> None:
        self._engine.end_epoch()
        if self._pause == "epoch":
            self._record()

    def _record(self) -> None:
        self._engine.synchronize()
        self._run.record()


class RecordingSelector(EngineSelector):
    """
    :param run: the run that records what the engines do
    """

    def __init__(self, run: "GoldenRun") -> None:
        super().__init__()
        self._run = run

    def engine_for(self, model: Any, iteration: Iteration, *args: Any, is_auxiliary: bool = False) -> Any:
        engine = super().engine_for(model, iteration, *args, is_auxiliary=is_auxiliary)
        self._run.iterations.append(iteration)
        return RecordingEngine(engine, self._run, "step" if is_auxiliary else self._run.way.pause)


class GoldenRun:
    """
    One recorded run, repeated by our algorithm: PPO-EWMA, or PPG-EWMA if it has auxiliary phases.

    :param family: of the case
    :param case: with the recorded stream
    :param way: how it is repeated
    :param feed: train on the recorded advantages and targets (which the reference rounds to float32) instead of our own
    """

    def __init__(self, family: str, case: Case, way: Way, feed: bool = True) -> None:
        self.case, self.way, self.feed, self.hp, self.data = case, way, feed, case.hyperparameters, case.arrays
        self.is_phasic = "n_pi" in self.hp
        # By number of the recorded event
        self.params: dict[int, np.ndarray] = {}
        self.ewma: dict[int, np.ndarray] = {}
        self.weights: dict[int, float] = {}
        self.iterations: list[Iteration] = []
        self._event = -1
        self.model = self._make(param_layout(family, self.hp["arch"]))
        self.model._engines = RecordingSelector(self)
        self.model.set_logger(Logger(None, []))
        self._load(self.data["init"])

    def _make(self, layout: list[dict[str, Any]]) -> Any:
        hp, names = self.hp, MLP_NAMES if self.way.is_mlp else TRUNK_NAMES
        shapes = {entry["name"]: entry["shape"] for entry in layout}
        n_hidden, n_obs = shapes["pi_enc.lin.weight"]
        self.dtype = np.float32 if self.case.dtype == th.float32 else np.float64
        env = DummyVecEnv([lambda: SpacesEnv(n_obs, shapes["pi_head.weight"][0], self.dtype)] * hp["nenv"])
        network: dict[str, Any] = {"critic_arch": hp["arch"], "trunk_arch": [n_hidden], "net_arch": []}
        if self.way.is_mlp:
            network = {"net_arch": {"pi": [n_hidden], "vf": [n_hidden]}}
        optimizer = {"optimizer_kwargs": {"eps": hp["adam_eps"], "betas": (hp["beta1"], hp["beta2"])}}
        # fmt: off
        model = (PPG if self.is_phasic else PPOEWMA)(
            self.way.policy, env, learning_rate=hp["lr"], n_steps=hp["nstep"],
            batch_size=hp["nstep"] * hp["nenv"] // hp["nminibatch"], n_epochs=hp["n_epoch_pi"],
            gamma=hp["gamma"], gae_lambda=hp["lam"], clip_range=hp["clip_param"] or None,
            normalize_advantage=not self.feed, ent_coef=hp["entcoef"], vf_coef=hp["vfcoef"],
            max_grad_norm=float("inf"), device="cpu", policy_kwargs={**network, **optimizer},
            prox_decay=hp["kl_ewma_decay"], kl_coef=hp["kl_penalty"],
            max_importance_ratio=hp["imp_samp_max"] or None,
            advantage_decay=None if self.feed else hp["adv_ewma_decay"] or 0.0, n_epochs_value=hp["n_epoch_vf"],
            staleness=hp["staleness"], staleness_mode=hp["staleness_loss"], **self._phase_arguments(),
            **dict(self.way.arguments),
        )
        # fmt: on
        if self.is_phasic:  # our optimiser of the phase has the settings of the policy's
            for group in model.aux_optimizer.param_groups:
                group["betas"] = (hp["aux_beta1"], hp["aux_beta2"])
        parameters = dict(model.policy.named_parameters())
        self._entries: dict[str, slice] = {}
        for entry in layout:
            layer, kind = entry["name"].rsplit(".", 1)
            if f"{names[layer]}.{kind}" in parameters:  # plain policies have no auxiliary head
                self._entries[f"{names[layer]}.{kind}"] = slice(entry["offset"], entry["offset"] + entry["size"])
        assert self._entries.keys() == parameters.keys()
        # Columns of recorded parameters that our policy has
        self.columns = np.concatenate([np.arange(each.start, each.stop) for each in self._entries.values()])
        return model

    def _phase_arguments(self) -> dict[str, Any]:
        if not self.is_phasic:
            return {}
        coefficients = self.hp["name2coef"]
        sizes = self.data["mb_mask"][self.data["step_kind"] == AUXILIARY_STEP].sum((1, 2))
        return {
            "n_policy_iterations": self.hp["n_pi"],
            "n_aux_epochs": self.hp["n_aux_epochs"],
            "aux_batch_size": int(sizes[0]) if len(sizes) else None,
            "aux_learning_rate": self.hp["aux_lr"],
            "beta_clone": coefficients.get("pol_distance", 1.0),
            "vf_true_coef": coefficients.get("vf_true", 1.0),
            "vf_aux_coef": coefficients.get("vf_aux", 1.0),
        }

    def _load(self, vector: np.ndarray) -> None:
        with th.no_grad():
            for name, parameter in self.model.policy.named_parameters():
                parameter.copy_(th.as_tensor(vector[self._entries[name]].reshape(parameter.shape)))
        if self.model.policy_ewma is not None:
            self.model.policy_ewma.reset()

    # === What was recorded ===

    def begin_event(self, kind: int) -> None:
        """
        :param kind: of the recorded event that was just repeated
        """
        self._event += 1
        assert self.data["step_kind"][self._event] == kind

    def record(self) -> None:
        """Record the present parameters, those of the average and its weight."""
        average = self.model.policy_ewma
        self.params[self._event] = self._flat(dict(self.model.policy.named_parameters()))
        if average is not None:
            self.ewma[self._event] = self._flat(dict(zip(average.names, average.averages, strict=True)))
            self.weights[self._event] = average.total_weight

    def _flat(self, tensors: dict[str, th.Tensor]) -> np.ndarray:
        return np.concatenate([tensors[name].detach().numpy().ravel() for name in self._entries])

    def statistics(self, name: str) -> np.ndarray:
        """
        :param name: of a statistic
        :return: its values, one for each gradient step that has it
        """
        every = [each.statistics for each in self.iterations if name in each.statistics]
        return np.concatenate([statistics.values(name) for statistics in every]) if every else np.zeros(0)

    # === The run ===

    def run(self) -> None:
        """Repeat the whole recording."""
        permutations = self._permutations()
        with ExitStack() as stack:
            # SB3's generator of minibatches, which our own minibatches and phases use as well
            stack.enter_context(patch.object(np.random, "permutation", lambda _: next(permutations)))
            if self.case.dtype == th.float64:  # SB3 casts observations to float32.
                stack.enter_context(
                    patch("stable_baselines3.common.policies.preprocess_obs", lambda obs, *_, **__: obs)
                )
                stack.enter_context(patch("sb3_ppo_ewma._engine.standard.preprocessing", lambda *_: lambda obs: obs))
            for segment in range(len(self.data["seg_index"]) + self.hp["staleness"]):
                self.collect(segment)
                self.model.train()
                if self._event + 1 < len(self.data["step_kind"]) and self._next_kind() == EWMA_RESET:
                    self.begin_event(EWMA_RESET)
                    self.record()
        assert next(permutations, None) is None
        assert self._event + 1 == len(self.data["step_kind"])
        assert self.model.current_engine == self.way.engine

    def _next_kind(self) -> int:
        return self.data["step_kind"][self._event + 1]

    def _permutations(self) -> Iterator[np.ndarray]:
        """
        :return: for each epoch of a policy or auxiliary phase, the samples of its minibatches, as numbers in arrays
            that run through one environment after the other
        """
        n_steps, n_envs = self.hp["nstep"], self.hp["nenv"]
        segments = list(self.data["seg_index"])
        epoch: list[np.ndarray] = []
        for kind, mask in zip(self.data["step_kind"], self.data["mb_mask"], strict=True):
            env, step = np.nonzero(mask)
            indices, size = env * n_steps + step % n_steps, n_steps * n_envs
            if kind == AUXILIARY_STEP:
                iterations = np.array([segments.index(segment) for segment in step // n_steps])
                indices, size = indices + iterations % self.hp["n_pi"] * size, size * self.hp["n_pi"]
            epoch.append(indices)
            if sum(map(len, epoch)) == size:
                yield np.concatenate(epoch)
                epoch = []
        assert not any(map(len, epoch))

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
            last_values = policy.predict_values(last_obs)
        shape = buffer.rewards.shape
        buffer.values = values.numpy().reshape(shape)
        buffer.log_probs = log_prob.numpy().reshape(shape) + data["logp_noise"][:, steps].T
        buffer.advantages = np.zeros(shape, self.dtype)  # SB3's have float32
        dones = data["first"][:, steps.stop]
        buffer.compute_returns_and_advantage(last_values, dones)
        if self.feed and segment in data["seg_index"]:
            iteration = list(data["seg_index"]).index(segment)
            buffer.advantages = data["seg_adv"][iteration].T.astype(self.dtype)
            buffer.returns = data["seg_vtarg"][iteration].T.copy()
        buffer.full = True
        self.model._last_obs, self.model._last_episode_starts = last_obs.numpy(), dones
