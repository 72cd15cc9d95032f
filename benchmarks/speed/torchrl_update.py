"""
The update of PPO-EWMA as TorchRL has it, to compare its speed: ``ClipPPOLoss(delay_actor=True)`` and ``SoftUpdate``.
Rollouts are random numbers, since only the update is measured.
"""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, SoftUpdate


class TorchRLUpdate:
    """
    Takes the place of an algorithm of Stable-Baselines3 in the measurement of training. Hyper-parameters, network,
    optimiser and decay are those of ``PPOEWMA`` by default; the loss computes neither entropy nor explained variance.

    :param policy: is not used
    :param env: of which only the spaces are used
    :param n_steps: as in ``PPOEWMA``
    :param batch_size: as in ``PPOEWMA``
    :param n_epochs: as in ``PPOEWMA``
    :param seed: of the random numbers
    :param device: of networks and data
    """

    def __init__(
        self,
        policy: str,
        env: VecEnv,
        *,
        n_steps: int,
        batch_size: int,
        n_epochs: int,
        seed: int,
        device: str,
        policy_kwargs: dict[str, Any] | None = None,
    ) -> None:
        th.manual_seed(seed)
        assert isinstance(env.observation_space, spaces.Box)
        assert isinstance(env.action_space, spaces.Discrete)
        assert not policy_kwargs
        self.n_steps, self.n_envs = n_steps, env.num_envs
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.device, self.obs_shape = device, env.observation_space.shape
        (obs_dim,) = self.obs_shape
        logits = TensorDictModule(_mlp(obs_dim, int(env.action_space.n)), ["observation"], ["logits"])
        self.actor = ProbabilisticActor(
            logits,
            in_keys=["logits"],
            distribution_class=th.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="log_prob",
        ).to(device)
        self.loss = ClipPPOLoss(
            self.actor,
            ValueOperator(_mlp(obs_dim, 1)).to(device),
            clip_epsilon=0.2,
            entropy_bonus=False,
            critic_coeff=0.5,
            loss_critic_type="l2",
            normalize_advantage=True,
            log_explained_variance=False,
            delay_actor=True,
            max_importance_ratio=100.0,
        )
        self.loss.set_keys(sample_log_prob="log_prob")
        self.optimizer = th.optim.Adam(self.loss.parameters(), lr=3e-4, eps=1e-5)
        n_minibatches = n_steps * self.n_envs // batch_size
        self.average = SoftUpdate(self.loss, eps=n_minibatches / (n_minibatches + 1))

    def learn(self, total_timesteps: int, reset_num_timesteps: bool = True) -> None:
        """
        Train on random rollouts.

        :param total_timesteps: number of samples
        :param reset_num_timesteps: has no effect
        """
        for _ in range(total_timesteps // (self.n_steps * self.n_envs)):
            self.rollout = self._random_rollout()
            self.train()

    def train(self) -> None:
        """Update actor, critic and average with the rollout."""
        parameters = list(self.loss.parameters())
        for _ in range(self.n_epochs):
            for indices in th.randperm(len(self.rollout), device=self.device).split(self.batch_size):
                terms = self.loss(self.rollout[indices])
                loss = terms["loss_objective"] + terms["loss_critic"]
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                self.optimizer.step()
                self.average.step()
        if not bool(th.isfinite(loss)):
            raise ValueError(f"the loss is {loss}")

    @th.no_grad()
    def _random_rollout(self) -> TensorDict:
        n = self.n_steps * self.n_envs
        samples = {
            "observation": th.randn(n, *self.obs_shape),
            "advantage": th.randn(n, 1),
            "value_target": th.randn(n, 1),
        }
        rollout = TensorDict(samples, batch_size=n).to(self.device)
        return self.actor(rollout).exclude("logits")  # with actions and their log-probabilities


def _mlp(n_inputs: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_outputs))
