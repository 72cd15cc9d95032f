"""
The package against the numbers of the paper's released code (see ``tests/golden_data.py``).

Every family and case of the recordings is consumed, except:

- cases marked as overflowing: the reference gives Inf or NaN there, ours must be finite;
- ``reward_normalizer`` and runs with reward normalisation: VecNormalize's job;
- float64 GAE, where SB3's rollout buffer is float32;
- unbiased variances (``ddof`` 1) of the moving moments, which the reference offers but its training does not use;
- buffers of averaged modules: the reference freezes them, ours are those of the module itself;
- multi-dimensional auxiliary KL: the reference averages over D action dimensions, ours is the sum, D times as much;
- float32 runs of ``e2e_ppg``: the KL divergence has no gradient but rounding noise at the first auxiliary step, which
  Adam makes a step of; they are compared within a few learning rates.

Stale runs take the recorded advantages and targets: the reference bootstraps with the current model, SB3 at collection.

Runs of whole trainings are repeated by every engine that claims them.
"""

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from torch import _dynamo, nn

from sb3_ppo_ewma import losses
from sb3_ppo_ewma._engine import dense, reference
from sb3_ppo_ewma.advantages import MomentsEwma
from sb3_ppo_ewma.distributions import CategoricalForm, distribution_parameters
from sb3_ppo_ewma.ewma import ParameterEwma
from sb3_ppo_ewma.policies import DetachedCriticMlpExtractor
from sb3_ppo_ewma.rollouts import Rollout
from tests.golden_data import Case, case_ids, load_case, manifest
from tests.golden_runs import AUXILIARY_STEP, POLICY_STEP_KINDS, VALUE_STEP_KINDS, WAYS, GoldenRun

LOSS_FAMILIES = [family for family in manifest()["families"] if family.startswith("losses_")]
TESTED_FAMILIES = {"gae", "ewma_model", "ewma_moments", "adv_norm", "e2e_ppo", "e2e_ppg", "aux_losses", *LOSS_FAMILIES}
OTHER_FAMILIES = {"reward_normalizer"}


def assert_close(actual, expected, rtol, atol=0.0):
    """The absolute tolerance is per unit of the largest entry: sums of large terms may cancel in the others."""
    expected = np.asarray(expected)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol * scale)


def test_every_family_is_consumed():
    assert set(manifest()["families"]) <= TESTED_FAMILIES | OTHER_FAMILIES


# ---------------------------------------------------------------------- advantages


def gae(case: Case, reward: np.ndarray, vpred: np.ndarray, first: np.ndarray) -> Rollout:
    """Advantages of one recorded segment, axes [environment, time], by the package's own rollout."""
    n_envs, n_steps = reward.shape
    hp = case.hyperparameters
    buffer = RolloutBuffer(
        n_steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", hp["lam"], hp["gamma"], n_envs=n_envs
    )
    buffer.rewards, buffer.episode_starts = reward.T.copy(), first[:, :-1].T.astype(np.float32)
    buffer.full = True
    rollout = Rollout(buffer, last_obs=None, last_dones=first[:, -1])
    list(buffer.get())  # flattens the arrays
    rollout.replace_values(vpred[:, :-1].ravel(), th.as_tensor(vpred[:, -1]))
    return rollout


@pytest.mark.parametrize("case_id", [case_id for case_id in case_ids("gae") if case_id.startswith("f32")])
def test_gae(case_id):
    case = load_case("gae", case_id)
    data = case.arrays
    buffer = gae(case, data["reward"], data["vpred"], data["first"]).buffer
    assert_close(buffer.advantages.reshape(data["adv"].shape), data["adv"], **case.tolerance)
    assert_close(buffer.returns.reshape(data["vtarg"].shape), data["vtarg"], **case.tolerance)


@pytest.mark.parametrize("case_id", case_ids("adv_norm"))
def test_advantage_normalisation(case_id):
    case = load_case("adv_norm", case_id)
    data = case.arrays
    moments = MomentsEwma(case.hyperparameters["adv_ewma_decay"] or 0.0)
    for k in range(len(data["reward"])):
        buffer = gae(case, data["reward"][k], data["vpred"][k], data["first"][k]).buffer
        raw = th.as_tensor(buffer.advantages).reshape(data["adv_raw"][k].shape)
        moments.update(raw)
        assert_close(moments.moments(), (data["used_mean"][k], data["used_var"][k]), rtol=1e-5, atol=1e-6)
        assert_close(moments.normalize(raw), data["adv"][k], rtol=1e-5, atol=2e-6)


# ---------------------------------------------------------------------- moving averages


BIASED_MOMENTS = [
    case_id
    for case_id in case_ids("ewma_moments")
    if load_case("ewma_moments", case_id).hyperparameters["ddof_update"] == 0
]


@pytest.mark.parametrize("case_id", BIASED_MOMENTS)
def test_moments(case_id):
    case = load_case("ewma_moments", case_id)
    data = case.arrays
    moments = MomentsEwma(case.hyperparameters["ewma_decay"])
    for k, count in enumerate(data["count"]):
        moments.update_from_moments(float(data["mean"][k]), float(data["var"][k]), int(count))
        mean, variance = moments.moments()
        # The reference subtracts sums of squares: its own rounding grows with the square of the mean.
        tolerance = {"rtol": 1e-9, "atol": 1e-12 * (1 + mean**2)}
        assert_close(mean, data["out_mean"][k], rtol=1e-9, atol=1e-12)
        assert_close(variance, data["out_var_ddof0"][k], **tolerance)
        weight, _, weighted_sum, weighted_squares = data["state"][k]
        assert_close(moments.weight, weight, rtol=1e-12)
        assert_close(moments.weight * moments.mean, weighted_sum, rtol=1e-9, atol=1e-12)
        assert_close(moments.squared_deviations + moments.weight * mean**2, weighted_squares, rtol=1e-9)


@pytest.mark.parametrize("case_id", case_ids("ewma_model"))
def test_parameter_ewma(case_id):
    case = load_case("ewma_model", case_id)
    data = case.arrays
    module = nn.Module()
    module.vector = nn.Parameter(th.as_tensor(data["theta"][0].copy()))
    ewma = ParameterEwma(module)
    for k, event in enumerate(data["event"]):
        with th.no_grad():
            module.vector.copy_(th.as_tensor(data["theta"][k]))
        if event == 0:
            ewma.update(case.hyperparameters["ewma_decay"])
        elif event == 1:
            ewma.reset()
        elif event == 2:
            ewma.update(float(data["override_decay"][k]))
        with ewma.in_place():
            assert_close(module.vector.detach(), data["ewma"][k], **case.tolerance)
        assert_close(module.vector.detach(), data["theta"][k], rtol=0)
        assert_close(ewma.total_weight, data["total_weight"][k], rtol=1e-12)


# ---------------------------------------------------------------------- losses


def distribution(family: str, data: dict, prefix: str = "") -> tuple[Distribution, list[th.Tensor]]:
    """SB3's distribution on the recorded parameters, flattened to one batch axis, and those parameters as leaves."""
    if family == "losses_gaussian":
        mean = th.as_tensor(data[f"{prefix}mean"]).requires_grad_()
        log_std = th.as_tensor(data[f"{prefix}log_std"]).requires_grad_()
        return DiagGaussianDistribution(mean.shape[-1]).proba_distribution(mean.flatten(0, 1), log_std), [mean, log_std]
    logits = th.as_tensor(data[f"{prefix}logits"]).requires_grad_()
    flat = logits.flatten(0, 1)
    if family == "losses_categorical":
        return CategoricalDistribution(flat.shape[-1]).proba_distribution(flat), [logits]
    if family == "losses_bernoulli":
        return BernoulliDistribution(flat.shape[-1]).proba_distribution(flat), [logits]
    dims = [flat.shape[-1]] * flat.shape[-2]
    return MultiCategoricalDistribution(dims).proba_distribution(flat.flatten(1)), [logits]


def log_probs(family: str, data: dict) -> tuple[th.Tensor, th.Tensor, th.Tensor, list[th.Tensor]]:
    """log π_θ, entropy, log π of the EWMA policy, (batch,), and the leaves that carry gradients."""
    if family == "losses_raw":
        leaves = [th.as_tensor(data[name]).requires_grad_() for name in ("newlogp", "entropy_ps")]
        return leaves[0].flatten(), leaves[1].flatten(), th.as_tensor(data["ewma_logp"]).flatten(), leaves
    actions = th.as_tensor(data["ac"]).flatten(0, 1)
    current, leaves = distribution(family, data)
    average, _ = distribution(family, data, "ewma_")
    log_prob, entropy, log_prob_ewma = current.log_prob(actions), current.entropy(), average.log_prob(actions)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if log_prob.dtype == th.float32 else {"rtol": 1e-9, "atol": 1e-11}
    assert_close(log_prob.detach(), data["newlogp"].ravel(), **tolerance)
    assert_close(entropy.detach(), data["entropy_ps"].ravel(), **tolerance)
    assert_close(log_prob_ewma.detach(), data["ewma_logp"].ravel(), **tolerance)
    return log_prob, entropy, log_prob_ewma, leaves


LEAF_GRADIENTS = {
    "losses_raw": ["grad_newlogp", "grad_entropy_ps"],
    "losses_gaussian": ["grad_mean", "grad_log_std"],
    "losses_categorical": ["grad_logits"],
    "losses_multicategorical": ["grad_logits"],
    "losses_bernoulli": ["grad_logits"],
}


def away_from_clip_threshold(
    case: Case, log_prob: th.Tensor, log_prob_prox: th.Tensor, clip_range: float
) -> np.ndarray:
    """On a clip threshold the gradient depends on rounding; the recordings put samples there on purpose."""
    if case.hyperparameters["profile"] != "boundary" or not clip_range:
        return np.ones(log_prob.shape, dtype=bool)
    log_ratio = (log_prob - log_prob_prox).detach().numpy()
    distance = np.minimum(abs(log_ratio - math.log1p(clip_range)), abs(log_ratio - math.log1p(-clip_range)))
    return distance > 1e-5


@pytest.mark.parametrize(
    ("family", "case_id"), [(family, case_id) for family in LOSS_FAMILIES for case_id in case_ids(family)]
)
def test_losses_and_gradients(family, case_id):
    case = load_case(family, case_id)
    data = case.arrays
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if case.dtype == th.float32 else {"rtol": 1e-9, "atol": 1e-11}
    flat = {name: th.as_tensor(data[name]).flatten() for name in ("logp", "rec_logp", "adv", "vtarg")}
    for i, (prox_source, clip_param, kl_penalty, imp_samp_max, entcoef, vfcoef) in enumerate(data["configs"]):
        log_prob, entropy, log_prob_ewma, leaves = log_probs(family, data)
        log_prob_prox = (flat["logp"], flat["rec_logp"], log_prob_ewma)[int(prox_source)]
        loss, stats = losses.decoupled_policy_loss(
            log_prob,
            log_prob_prox,
            flat["logp"],
            flat["adv"],
            clip_range=clip_param or None,
            max_importance_ratio=imp_samp_max or None,
        )
        kl_loss = kl_penalty * losses.sampled_kl(log_prob, log_prob_prox)
        (gradient,) = th.autograd.grad(loss + kl_loss, log_prob, retain_graph=True)
        entropy_loss = losses.entropy_loss(entropy, log_prob)
        total = loss + kl_loss + entcoef * entropy_loss
        leaf_gradients = th.autograd.grad(total, leaves, retain_graph=True)
        vpred = th.as_tensor(data["vpred"]).flatten().requires_grad_()
        value_loss = vfcoef * losses.value_loss(vpred, flat["vtarg"])
        (value_gradient,) = th.autograd.grad(value_loss, vpred)
        assert_close(value_loss.detach(), data["loss_vf"][i], **tolerance)
        assert_close(value_gradient, data["grad_vpred"][i].ravel(), **tolerance)

        if case.overflows:
            assert th.isfinite(total)
            assert all(th.isfinite(g).all() for g in (gradient, *leaf_gradients))
            continue
        # Relative to the largest terms of the sum, which are in the gradients' entries times the batch size
        scale = max(1.0, float(np.abs(data["grad_newlogp"][i]).max()) * data["grad_newlogp"][i].size)
        assert_close(total.detach() / scale, data["loss_pi"][i] / scale, **tolerance)
        assert_close(stats.policy_gradient_loss / scale, data["pg"][i] / scale, **tolerance)
        assert_close(kl_loss.detach(), data["pi_kl"][i], **tolerance)
        assert_close(entcoef * entropy_loss.detach(), data["negent"][i], **tolerance)
        assert_close(stats.approx_kl_prox, data["approxkl"][i], **tolerance)
        # Fractions are float32 in the reference, whatever the dtype.
        if clip_param:
            assert_close(stats.clip_fraction, data["clipfrac"][i], rtol=1e-6)
        if imp_samp_max:
            assert_close(stats.importance_cap_fraction, data["imp_samp_clipfrac"][i], rtol=1e-6)
        compared = away_from_clip_threshold(case, log_prob, log_prob_prox, clip_param)
        assert_close(gradient[compared], data["grad_newlogp"][i].ravel()[compared], **tolerance)
        for leaf_gradient, name in zip(leaf_gradients, LEAF_GRADIENTS[family], strict=True):
            expected = data[name][i]
            if family == "losses_raw":
                leaf_gradient, expected = leaf_gradient.flatten()[compared], expected.ravel()[compared]
            assert_close(leaf_gradient, expected, **tolerance)


AUXILIARY_LEAVES = {"gaussian": ["mean", "log_std"]}


@pytest.mark.parametrize("case_id", case_ids("aux_losses"))
def test_auxiliary_losses_and_gradients(case_id):
    case = load_case("aux_losses", case_id)
    data, kind = case.arrays, case.hyperparameters["policy"]
    n_dims = data["logits"].shape[3] if kind in ("multicategorical", "bernoulli") else 1
    if kind == "gaussian":
        n_dims = data["mean"].shape[-1]
    # (segment, environment, time) as one axis
    flat = {name: array.reshape(1, -1, *array.shape[3:]) for name, array in data.items() if name != "old_log_std"}
    beta_clone, vf_aux_coef, vf_true_coef = data["name2coef"]
    for i, mask in enumerate(data["mb_mask"]):
        chosen = mask.reshape(1, -1)
        names = AUXILIARY_LEAVES.get(kind, ["logits"])
        prefixed = [name for name in names for name in (name, f"old_{name}")]
        minibatch = {name: data[name] if "log_std" in name else flat[name][chosen][None] for name in prefixed}
        current, leaves = distribution(f"losses_{kind}", minibatch)
        old, _ = distribution(f"losses_{kind}", minibatch, "old_")
        predictions = [th.as_tensor(flat[name][chosen]).requires_grad_() for name in ("vpredtrue", "vpredaux")]
        returns = th.as_tensor(flat["vtarg"][chosen])
        parts = [getattr(d, "distributions", None) or d.distribution for d in (old, current)]
        kl = losses.analytic_kl(*parts) / n_dims
        coefficients = {"beta_clone": beta_clone, "vf_aux_coef": vf_aux_coef, "vf_true_coef": vf_true_coef}
        loss, stats = losses.auxiliary_loss(kl, *predictions, returns, **coefficients)
        gradients = th.autograd.grad(loss, [*leaves, *predictions])

        terms = (stats.policy_kl, 0.5 * stats.aux_value_loss, 0.5 * stats.value_loss)
        tolerance = {"rtol": 2e-5, "atol": 1e-6} if case.dtype == th.float32 else {"rtol": 1e-9, "atol": 1e-12}
        assert_close(terms, data["unscaled"][i], **tolerance)
        assert_close(loss.detach(), data["total"][i], **tolerance)
        for gradient, name in zip(gradients, [*names, "vpredtrue", "vpredaux"], strict=True):
            expected = data[f"grad_{name}"][i]
            if name != "log_std":
                expected = expected[mask]
            assert_close(gradient.reshape(expected.shape), expected, **tolerance)


# ---------------------------------------------------------------------- whole trajectories

COMPILERS = ("g++", "clang++")
NEEDS_COMPILER = pytest.mark.skipif(
    not hasattr(_dynamo.config, "trace_autograd_ops") or not any(map(shutil.which, COMPILERS)),
    reason="needs a C++ compiler and a torch that can compile a backward pass",
)


def has_ewma(hp: dict[str, Any]) -> bool:
    return hp["kl_ewma_decay"] is not None


def structure(hp: dict[str, Any]) -> tuple[Any, ...]:
    """:return: what a compiled graph depends on"""
    losses_on = (has_ewma(hp), hp["clip_param"] > 0, hp["kl_penalty"] > 0)
    return *losses_on, hp["staleness"] and hp["staleness_loss"], hp["arch"], hp["n_epoch_pi"] == hp["n_epoch_vf"]


def ways(family: str) -> list[Any]:
    """
    Every way to repeat every case. Compiling takes long: only cases that have different graphs are compiled, and only
    the first of them in the ordinary tests.
    """
    parameters, compiled = [], set()
    is_first = family == "e2e_ppo"
    for case_id in case_ids(family):
        case = load_case(family, case_id)
        for name, way in WAYS.items():
            if not way.claims(case.hyperparameters):
                continue
            marks = []
            if "torch_compile" in dict(way.arguments):
                graph = (name, structure(case.hyperparameters))
                if graph in compiled or case.dtype != th.float64:
                    continue
                compiled.add(graph)
                is_quick = is_first and name == "compiled dense" and has_ewma(case.hyperparameters)
                is_first = is_first and not is_quick
                marks = [NEEDS_COMPILER] if is_quick else [NEEDS_COMPILER, pytest.mark.slow]
            parameters.append(pytest.param(case_id, name, marks=marks, id=f"{case_id}-{name}"))
    return parameters


def repeated(family: str, case: Case, way: str, feed: bool = True) -> GoldenRun:
    run = GoldenRun(family, case, WAYS[way], feed)
    run.run()
    return run


def assert_trajectory(run: GoldenRun, rtol: float, atol: float) -> None:
    data, events = run.data, list(run.params)
    if run.way.pause == "step":
        assert events == list(range(len(data["step_kind"])))
    assert_close(list(run.params.values()), data["params"][events][:, run.columns], rtol=rtol, atol=atol)
    if "ewma" in data:
        assert_close(list(run.ewma.values()), data["ewma"][events][:, run.columns], rtol=rtol, atol=atol)
        assert_close(list(run.weights.values()), data["total_weight"][events], rtol=1e-12)


def trajectory_tolerance(case: Case) -> dict[str, float]:
    if case.dtype == th.float64:
        return {"rtol": 1e-7, "atol": 1e-10}
    # What the reference's own float32 run deviates from its float64 one, with some room
    summaries = {summary["case"]: summary for summary in manifest()["families"]["e2e_ppo"]["summary"]}
    deviation = summaries.get(case.id, {}).get("f32_vs_f64_max_abs_param_diff", 0.0)
    return {"rtol": 1e-4, "atol": max(2e-6, 10 * deviation)}


def assert_statistics(run: GoldenRun) -> None:
    """What is logged of every gradient step, against the recorded diagnostics."""
    data, hp = run.data, run.hp
    columns = {"policy_gradient_loss": 2, "approx_kl_prox": 7, "importance_cap_fraction": 8}
    if hp["kl_penalty"]:
        columns["kl_loss"] = 3
    if hp["clip_param"]:
        columns["clip_fraction"] = 6
    diags = data["diags"][np.isin(data["step_kind"], POLICY_STEP_KINDS)]
    expected = {name: diags[:, column] for name, column in columns.items()}
    expected["entropy_loss"] = diags[:, 4] / hp["entcoef"]
    if hp["n_epoch_pi"] == hp["n_epoch_vf"] and not run.is_phasic:
        expected["value_loss"] = diags[:, 1] / hp["vfcoef"]
        expected["loss"] = diags[:, 0] + diags[:, 1]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if run.case.dtype == th.float32 else {"rtol": 1e-6, "atol": 1e-9}
    for name, values in expected.items():
        assert_close(run.statistics(name), values, **tolerance)


@pytest.mark.parametrize(("case_id", "way"), ways("e2e_ppo"))
def test_ppo_trajectory(case_id, way, default_dtype):
    case = load_case("e2e_ppo", case_id)
    default_dtype(case.dtype)
    run = repeated("e2e_ppo", case, way)
    assert_trajectory(run, **trajectory_tolerance(case))
    assert_statistics(run)


@pytest.mark.parametrize(("case_id", "way"), ways("e2e_ppg"))
def test_ppg_trajectory(case_id, way, default_dtype):
    case = load_case("e2e_ppg", case_id)
    default_dtype(case.dtype)
    run = repeated("e2e_ppg", case, way)
    data, hp = case.arrays, case.hyperparameters
    exact = case.dtype == th.float64
    tolerance = {"rtol": 1e-7, "atol": 1e-10} if exact else {"rtol": 0, "atol": 10 * max(hp["lr"], hp["aux_lr"])}
    assert_trajectory(run, **tolerance)
    kinds, auxiliary_terms = data["step_kind"], data["aux_terms"]
    is_auxiliary, has_values = kinds == AUXILIARY_STEP, np.isin(kinds, VALUE_STEP_KINDS)
    # The recorded value losses have the factor ½; the policy phase has a value loss of the same name.
    value_losses = np.where(is_auxiliary, 2 * auxiliary_terms[:, 2], data["diags"][:, 1] / hp["vfcoef"])
    expected = {
        "aux_value_loss": 2 * auxiliary_terms[is_auxiliary, 1],
        "value_loss": value_losses[is_auxiliary | has_values],
    }
    if exact:
        assert_statistics(run)
        expected["policy_kl"] = auxiliary_terms[is_auxiliary, 0]  # elsewhere no larger than the tolerance
    else:
        tolerance = {"rtol": 1e-2}
    for name, values in expected.items():
        assert_close(run.statistics(name), values, **tolerance)


OWN_ADVANTAGES = [
    pytest.param(case_id, way, id=f"{case_id}-{way}")
    for case_id in case_ids("e2e_ppo")
    for hp in [load_case("e2e_ppo", case_id).hyperparameters]
    for way in ("reference", "dense by the epoch")
    if not hp["staleness"] and not hp["rnorm"] and WAYS[way].claims(hp)
]


@pytest.mark.parametrize(("case_id", "way"), OWN_ADVANTAGES)
def test_ppo_trajectory_with_own_advantages(case_id, way, default_dtype):
    """The same with our own GAE and normalisation; the reference rounds its advantages to float32."""
    case = load_case("e2e_ppo", case_id)
    default_dtype(case.dtype)
    run = repeated("e2e_ppo", case, way, feed=False)
    assert_trajectory(run, rtol=1e-4, atol=case.hyperparameters["lr"] * 1e-2)


# ---------------------------------------------------------------------- mistakes, which these tests must notice


def swap_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.ReferenceEngine.evaluate

    def swapped(*args: Any) -> Any:
        result = original(*args)
        return result._replace(log_prob_prox=result.log_prob_behav, log_prob_behav=result.log_prob_prox)

    monkeypatch.setattr(reference.ReferenceEngine, "evaluate", swapped)


def drop_debiasing(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased_update(
        self: ParameterEwma, averages: list[th.Tensor], parameters: list[th.Tensor], decay: float
    ) -> None:
        with th.no_grad():
            th._foreach_lerp_(averages, parameters, 1 - decay)

    monkeypatch.setattr(ParameterEwma, "interpolate", biased_update)


def reverse_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    original = losses.analytic_kl
    monkeypatch.setattr(losses, "analytic_kl", lambda old, current: original(current, old))


def forget_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ParameterEwma.reset
    # The first one belongs to the initial parameters.
    monkeypatch.setattr(ParameterEwma, "reset", lambda self: original(self) if self.total_weight == 1 else None)


def refresh_old_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reference.with_parameters

    def with_present_parameters(like: Any, _: Any) -> Any:
        return original(like, [parameter.detach() for parameter in distribution_parameters(like)])

    monkeypatch.setattr(reference, "with_parameters", with_present_parameters)


def share_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GoldenRun.run

    def run_with_one_optimizer(run: GoldenRun) -> None:
        run.model.aux_optimizer = run.model.policy.optimizer
        original(run)

    monkeypatch.setattr(GoldenRun, "run", run_with_one_optimizer)


def do_not_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetachedCriticMlpExtractor, "forward_critic", lambda self, features: self.value_net(features))


def negate(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """:return: a mistake: the last result of a function, a gradient, has the wrong sign"""

    def mistake(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def negated(*args: Any) -> Any:
            first, gradient = original(*args)
            return (first, -gradient) if gradient is not None else (-first, None)

        monkeypatch.setattr(owner, name, negated)

    return mistake


def has_phases(hp: dict[str, Any]) -> bool:
    return hp["n_aux_epochs"] > 0


MISTAKES: list[tuple[str, str, Callable[[dict[str, Any]], Any], Callable[[pytest.MonkeyPatch], None]]] = [
    ("e2e_ppo", "reference", lambda hp: hp["staleness"] and hp["staleness_loss"] == "decoupled", swap_policies),
    ("e2e_ppo", "reference", lambda hp: has_ewma(hp) and hp["clip_param"], swap_policies),
    ("e2e_ppo", "reference", lambda hp: has_ewma(hp) and hp["kl_penalty"], swap_policies),
    ("e2e_ppo", "reference", lambda hp: has_ewma(hp) and hp["clip_param"], drop_debiasing),
    ("e2e_ppo", "dense", lambda hp: has_ewma(hp) and hp["kl_penalty"], drop_debiasing),
    ("e2e_ppo", "dense", lambda hp: hp["clip_param"], negate(dense, "policy_loss_gradient")),
    ("e2e_ppo", "dense", lambda hp: hp["clip_param"], negate(dense, "value_loss_gradient")),
    ("e2e_ppo", "dense", lambda hp: hp["clip_param"], negate(CategoricalForm, "gradients")),
    ("e2e_ppg", "reference", has_phases, reverse_kl),
    ("e2e_ppg", "reference", has_phases, share_optimizer),
    ("e2e_ppg", "reference", has_phases, refresh_old_policy),
    ("e2e_ppg", "reference", lambda hp: has_phases(hp) and has_ewma(hp), forget_reset),
    ("e2e_ppg", "reference", lambda hp: has_phases(hp) and hp["arch"] == "detach", do_not_detach),
]


@pytest.mark.filterwarnings("ignore:The policy's parameters were changed outside of training")
@pytest.mark.parametrize(("family", "way", "wanted", "mistake"), MISTAKES)
def test_trajectories_notice_mistakes(family, way, wanted, mistake, default_dtype, monkeypatch):
    cases = [load_case(family, case_id) for case_id in case_ids(family)]
    cases = [case for case in cases if case.dtype == th.float64 and WAYS[way].claims(case.hyperparameters)]
    suitable = [case for case in cases if wanted(case.hyperparameters)]
    if not suitable:
        pytest.skip("no recording in this folder can show it")
    case = max(suitable, key=lambda case: case.hyperparameters["lr"])
    default_dtype(case.dtype)
    mistake(monkeypatch)
    run = repeated(family, case, way)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_trajectory(run, rtol=1e-7, atol=1e-10)
