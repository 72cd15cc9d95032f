"""
SB3's own actor-critic policies without its distribution objects, whose construction costs more than the arithmetic.
Their modules are called as SB3 calls them, including their hooks.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn import functional as F

from sb3_ppo_ewma._engine.fused import FusedEngine
from sb3_ppo_ewma._engine.iteration import AuxiliaryEvaluation, AuxiliaryMinibatch, Iteration, Objective
from sb3_ppo_ewma._engine.recognition import hooks, takes_channels_last, unknown_modules
from sb3_ppo_ewma.distributions import ClosedForm, GaussianForm, Parameters, closed_form
from sb3_ppo_ewma.evaluation import Evaluation, Minibatch, averaged_parameters
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.rollouts import PhaseSamples


class StandardPolicy:
    """
    What collection and training call of a policy.

    :param policy: a policy that the selection has recognised
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.form = cast(ClosedForm, closed_form(policy.action_dist))
        self._space, self._normalize_images = policy.observation_space, policy.normalize_images
        extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
        channels_last = all(map(takes_channels_last, extractors))
        parts = self._space.spaces if isinstance(self._space, spaces.Dict) else {"": self._space}
        # Made once: SB3 compares the bounds of all pixels at every call.
        self._preprocess = {
            key: preprocessing(part, self._normalize_images, channels_last) for key, part in parts.items()
        }

    def is_current(self) -> bool:
        """
        :return: whether what was read from the policy when this was made is still what it has
        """
        policy = self.policy
        return policy.observation_space is self._space and policy.normalize_images is self._normalize_images

    def preprocessed(self, obs: PyTorchObs) -> PyTorchObs:
        """
        :param obs: observations
        :return: the observations after SB3's ``preprocess_obs``
        """
        if isinstance(obs, dict):
            return {key: self._preprocess[key](part) for key, part in obs.items()}
        return self._preprocess[""](obs)

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations of a policy whose features extractor only flattens
        :return: (batch, features_dim)
        """
        preprocessed = self.preprocessed(obs)
        if isinstance(preprocessed, th.Tensor):
            return preprocessed.flatten(start_dim=1)  # what FlattenExtractor does
        return cast(th.Tensor, self.policy.pi_features_extractor(preprocessed))

    def latents(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :return: inputs of ``policy.action_net`` and of ``policy.value_net``
        """
        policy, preprocessed = self.policy, self.preprocessed(obs)
        if policy.share_features_extractor:
            return cast(tuple[th.Tensor, th.Tensor], policy.mlp_extractor(policy.features_extractor(preprocessed)))
        pi_features = policy.pi_features_extractor(preprocessed)
        vf_features = policy.vf_features_extractor(preprocessed)
        return policy.mlp_extractor.forward_actor(pi_features), policy.mlp_extractor.forward_critic(vf_features)

    def outputs(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net`` and of ``policy.value_net``
        """
        latent_pi, latent_vf = self.latents(obs)
        return self.policy.action_net(latent_pi), self.policy.value_net(latent_vf)

    def action_outputs(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations
        :return: outputs of ``policy.action_net``, without the critic
        """
        policy = self.policy
        extractor = policy.features_extractor if policy.share_features_extractor else policy.pi_features_extractor
        features = extractor(self.preprocessed(obs))
        return cast(th.Tensor, policy.action_net(policy.mlp_extractor.forward_actor(features)))

    def parameters(self, outputs: th.Tensor) -> Parameters:
        """
        :param outputs: outputs of ``policy.action_net``
        :return: parameters of the action distribution
        """
        return self.form.parameters(outputs, getattr(self.policy, "log_std", None))


class StandardEngine(FusedEngine):
    """
    The fused engine for policies that compute what SB3's own do.

    :param iteration: what the training works with
    """

    name: ClassVar[str] = "standard"

    def __init__(self, iteration: Iteration) -> None:
        super().__init__(iteration)
        self.standard = StandardPolicy(iteration.policy)
        self.form = self.standard.form
        policy = iteration.policy
        # The reference evaluates the critic under every policy. Code of others may notice, or draw random numbers.
        self._evaluates_critic = (unknown_modules(policy) or hooks(policy.modules())) is not None

    def evaluate(self, minibatch: Minibatch, objective: Objective) -> Evaluation:
        iteration, samples = self.iteration, minibatch.samples
        log_prob_prox = log_prob_behav = samples.old_log_prob
        if objective.policy and iteration.prox is not None:
            prox = self.parameters_under(iteration.prox, samples.observations)
            log_prob_prox = self.form.log_prob(prox, minibatch.actions)
        if objective.policy and iteration.behav is not None:
            behav = self.parameters_under(iteration.behav, samples.observations)
            log_prob_behav = self.form.log_prob(behav, minibatch.actions)
        outputs, values = self.standard.outputs(samples.observations)
        parameters = self.standard.parameters(outputs)
        log_prob, entropy = self.form.log_prob(parameters, minibatch.actions), self.form.entropy(parameters)
        kl = self.form.kl(prox, parameters) if objective.policy and iteration.analytic_kl else None
        return Evaluation(values.flatten(), log_prob, entropy, log_prob_prox, log_prob_behav, kl)

    def parameters_under(self, average: ParameterEwma, observations: Any) -> Parameters:
        """
        :param average: parameters to put in place of the policy's
        :param observations: observations of a minibatch
        :return: parameters of the action distributions, where nobody notices without the critic
        """
        with averaged_parameters(self.iteration.policy, average):
            if self._evaluates_critic:
                return self.standard.parameters(self.standard.outputs(observations)[0])
            return self.standard.parameters(self.standard.action_outputs(observations))

    def evaluate_auxiliary(self, minibatch: AuxiliaryMinibatch) -> AuxiliaryEvaluation:
        policy = self.iteration.policy
        latent_pi, latent_vf = self.standard.latents(minibatch.samples.observations)
        values, aux_values = policy.value_net(latent_vf), policy.aux_value_net(latent_pi)
        parameters = self.standard.parameters(policy.action_net(latent_pi))
        kl = self.form.kl(minibatch.old_parameters, parameters)
        return AuxiliaryEvaluation(kl, values.flatten(), aux_values.flatten())

    def old_parameters(self, samples: PhaseSamples) -> list[th.Tensor]:
        parameters = self.standard.parameters(self.standard.action_outputs(samples.observations))
        if isinstance(self.form, GaussianForm):
            mean, std = parameters
            return [mean, std.expand_as(mean)]
        return parameters


def preprocessing(
    space: spaces.Space[Any], normalize_images: bool, channels_last: bool
) -> Callable[[th.Tensor], th.Tensor]:
    """
    :param space: observation space, not a ``Dict``
    :param normalize_images: divide images by 255
    :param channels_last: put the channels of images last in memory
    :return: what SB3's ``preprocess_obs`` does with such observations
    """
    if isinstance(space, spaces.Discrete):
        n = int(space.n)
        return lambda obs: F.one_hot(obs.long(), num_classes=n).float()
    if isinstance(space, spaces.MultiDiscrete):
        sizes = [int(size) for size in space.nvec.flatten()]

        def one_hots(obs: th.Tensor) -> th.Tensor:
            columns = obs.long().flatten(start_dim=1).unbind(dim=1)
            return th.cat([F.one_hot(column, size) for column, size in zip(columns, sizes, strict=True)], dim=1).float()

        return one_hots
    if not (isinstance(space, spaces.Box) and is_image_space(space)):
        return lambda obs: obs.float()
    is_last = channels_last and space.shape[0] == min(space.shape)
    memory_format = th.channels_last if is_last else th.contiguous_format
    if normalize_images:
        return lambda obs: _images(obs, memory_format) / 255.0
    return lambda obs: _images(obs, memory_format)


def _images(obs: th.Tensor, memory_format: th.memory_format) -> th.Tensor:
    """
    :param obs: (batch, three axes)
    :param memory_format: the order that is the fastest for convolutions on a CPU
    :return: in single precision
    """
    return obs.to(dtype=th.float32, memory_format=memory_format if obs.device.type == "cpu" else th.preserve_format)
