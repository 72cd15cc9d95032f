"""The forward pass of collection, faster, for policies that are recognised, anew at every call."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_ppo_ewma._engine.dense_networks import chains, unknown_networks
from sb3_ppo_ewma._engine.recognition import (
    FILLED_BY_SB3,
    has_global_hooks,
    hooks,
    methods,
    unknown_distribution,
    unknown_lstm,
    unknown_policy,
)
from sb3_ppo_ewma._engine.standard import StandardPolicy

# Methods of the policy's class that the faster forward pass stands in for
_METHODS = ("forward", "extract_features", "_get_action_dist_from_latent", "__call__", "_call_impl")


def unknown_collection(policy: Any) -> str | None:
    """
    :param policy: any policy
    :return: why its forward pass cannot be replaced by a faster one, ``None`` if it can
    """
    if not isinstance(policy.action_dist, FILLED_BY_SB3):
        return f"{type(policy.action_dist).__name__} is not a distribution of SB3"
    return unknown_policy(policy) or unknown_distribution(policy) or hooks([policy])


@contextlib.contextmanager
def fast_forward(policy: Any) -> Iterator[None]:
    """
    Within this context, calling the policy is faster. Torch has a place for what is called instead of ``forward``
    (``Module.compile()`` uses it), which copies and pickles of the module leave out.

    :param policy: a policy that :func:`unknown_collection` accepts
    """
    policy._compiled_call_impl = stand_in = FastForward(policy)
    try:
        yield
    finally:
        if policy._compiled_call_impl is stand_in:  # unless somebody has compiled it since
            policy._compiled_call_impl = None
        left = getattr(policy.action_dist, "distribution", None)
        if type(left) is LazyDistribution:
            with contextlib.suppress(ValueError):  # of parameters with NaN, which the rollout's check names
                left.build()


class FastForward:
    """
    Stands in for the ``forward`` of a policy while it collects. At every call it looks at what it relies on: whatever a
    callback replaces or changes acts at the next step, as with SB3.

    :param policy: a policy that :func:`unknown_collection` accepts
    """

    stands_in_for_forward = True

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._standard = StandardPolicy(policy)
        self._methods = [getattr(type(policy), name) for name in _METHODS]
        self._distribution = policy.action_dist, type(policy.action_dist)
        extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
        self._watched = _Watched([policy, policy.mlp_extractor])
        self._flattening = _Watched([module for extractor in extractors for module in extractor.modules()])
        self._dense = None if unknown_networks(policy) else _DenseForward(policy)

    def __call__(self, obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :param deterministic: take the most likely actions
        :return: actions (batch, ...), values (batch, 1), log-probabilities (batch,)
        """
        policy, standard = self._policy, self._standard
        if not (self._watched.is_unchanged() and self._is_unchanged()):
            return cast(tuple[th.Tensor, th.Tensor, th.Tensor], policy._call_impl(obs, deterministic))
        dense = self._dense
        if dense is not None and dense.watched.is_unchanged() and self._flattening.is_unchanged():
            outputs, values = dense.outputs(standard.features(obs))
        else:
            latent_pi, latent_vf = standard.latents(obs)
            values, outputs = policy.value_net(latent_vf), policy.action_net(latent_pi)  # in SB3's order
        policy.action_dist.distribution = LazyDistribution(policy, outputs)
        parameters = standard.parameters(outputs)
        actions = (standard.form.mode if deterministic else standard.form.sample)(parameters)
        shaped = actions.reshape((-1, *policy.action_space.shape))
        return shaped, values, standard.form.log_prob(parameters, actions)

    def _is_unchanged(self) -> bool:
        policy, distribution = self._policy, self._policy.action_dist
        return (
            all(getattr(type(policy), name) is known for name, known in zip(_METHODS, self._methods, strict=True))
            and not has_global_hooks()
            and (distribution, type(distribution)) == self._distribution
            and methods(type(distribution)).isdisjoint(vars(distribution))
            and self._standard.is_current()
        )


@contextlib.contextmanager
def fast_cells(policy: nn.Module) -> Iterator[None]:
    """
    Within this context, an LSTM of the policy makes single steps by torch's ``lstm_cell``, which takes less time.

    :param policy: any policy, which is evaluated in any way
    """
    # On CUDA, torch's LSTM may multiply in TF32 where a cell does not.
    on_cpu = all(parameter.device.type == "cpu" for parameter in policy.parameters())
    lstms = (each for each in policy.modules() if on_cpu and isinstance(each, nn.LSTM) and unknown_lstm(each) is None)
    stand_ins: list[Any] = [FastCell(lstm) for lstm in lstms]
    for stand_in in stand_ins:
        stand_in.lstm._compiled_call_impl = stand_in
    try:
        yield
    finally:
        for stand_in in stand_ins:
            if stand_in.lstm._compiled_call_impl is stand_in:  # unless somebody has compiled it since
                stand_in.lstm._compiled_call_impl = None


class FastCell:
    """
    Stands in for an LSTM, where it is called with one step of each sequence, as while a policy collects.

    :param lstm: an LSTM that :func:`unknown_lstm` accepts
    """

    stands_in_for_forward = True

    def __init__(self, lstm: nn.LSTM) -> None:
        self.lstm: Any = lstm
        self._watched = _Watched([lstm])

    def __call__(self, inputs: Any, states: Any = None, *args: Any, **kwargs: Any) -> Any:
        """
        :param inputs: (length, batch, input_size)
        :param states: hidden and cell states, (layers, batch, units) each
        :param args: further positional arguments, with which the LSTM itself is called
        :param kwargs: keyword arguments, with which the LSTM itself is called
        :return: (length, batch, units) outputs; new states
        """
        lstm = self.lstm
        is_step = isinstance(inputs, th.Tensor) and inputs.dim() == 3 and len(inputs) == 1
        if not is_step or states is None or args or kwargs or has_global_hooks() or not self._watched.is_unchanged():
            return lstm._call_impl(inputs, states, *args, **kwargs)
        outputs, hidden, cells = inputs[0], [], []
        for layer, weights in enumerate(lstm.all_weights):
            outputs, cell = th.lstm_cell(outputs, (states[0][layer], states[1][layer]), *weights)
            hidden.append(outputs)
            cells.append(cell)
        return outputs.unsqueeze(0), (th.stack(hidden), th.stack(cells))


class LazyDistribution:
    """
    Takes the place of the torch distribution that SB3's ``forward`` leaves in ``policy.action_dist``. It is built when
    somebody reads it.

    :param policy: the policy
    :param outputs: outputs of its ``action_net``
    """

    def __init__(self, policy: Any, outputs: th.Tensor) -> None:
        self._policy, self._outputs = policy, outputs

    @th.no_grad()
    def build(self) -> Any:
        """
        :return: the distribution, which is then in ``policy.action_dist``
        """
        own = self._policy.action_dist
        log_std = getattr(self._policy, "log_std", None)
        built = copy.copy(own)
        built.proba_distribution(*([self._outputs] if log_std is None else [self._outputs, log_std]))
        if vars(own)["distribution"] is self:
            own.distribution = built.distribution
        return built.distribution

    def __bool__(self) -> bool:
        return True

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks
        return type(self.build())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.build(), name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.build())

    def __getitem__(self, index: int) -> Any:
        return self.build()[index]

    def __len__(self) -> int:
        return len(self.build())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.build(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self.build(),)


def _identity(value: Any) -> Any:
    return value


class _Watched:
    """
    Modules whose type, methods, hooks and submodules must stay what they are.

    :param modules: the modules
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [
            (module, type(module), methods(type(module)), tuple(module._modules.values())) for module in modules
        ]

    def is_unchanged(self) -> bool:
        """
        :return: whether all are what they were
        """
        for module, cls, names, children in self._modules:
            state = module.__dict__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or type(module) is not cls
                or not names.isdisjoint(state)
                or tuple(state["_modules"].values()) != children
            ):
                return False
        return True


class _DenseForward:
    """
    The dense layers of a policy, whose parameters are looked up at every call.

    :param policy: a policy that :func:`unknown_networks` accepts
    """

    def __init__(self, policy: Any) -> None:
        self._chains = [[_call(module) for module in chain] for chain in chains(policy)]
        sequences = [policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net]
        self.watched = _Watched([*sequences, *(m for chain in chains(policy) for m in chain)])

    def outputs(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param features: (batch, features_dim)
        :return: outputs of ``policy.action_net`` and of ``policy.value_net``
        """
        actor = critic = features
        for layer in self._chains[0]:
            actor = layer(actor)
        for layer in self._chains[1]:
            critic = layer(critic)
        return actor, critic


def _call(module: nn.Module) -> Callable[[th.Tensor], th.Tensor]:
    """
    :param module: a linear layer or an activation
    :return: what it computes, without the cost of calling a module
    """
    if isinstance(module, nn.Linear):
        state = module.__dict__

        def linear(inputs: th.Tensor) -> th.Tensor:
            parameters = state["_parameters"]
            weight = parameters.get("weight")
            bias = parameters.get("bias")
            if weight is None or bias is None:  # a plain tensor took the parameter's place
                return cast(th.Tensor, module(inputs))
            return F.linear(inputs, weight, bias)

        return linear
    return th.tanh if isinstance(module, nn.Tanh) else th.relu
