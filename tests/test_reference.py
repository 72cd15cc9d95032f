"""
The package against the numbers of the paper's released code (see ``tests/golden_data.py``).

Every family and case of the recordings is consumed, except:

- cases marked as overflowing: the reference gives Inf or NaN there, ours must be finite;
- ``reward_normalizer`` and runs with reward normalisation: VecNormalize's job;
- float64 GAE, where SB3's rollout buffer is float32;
- buffers of averaged modules: the reference freezes them, ours are copied;
- multi-dimensional auxiliary KL: the reference averages over D action dimensions, ours is the sum, D times as much;
- float32 runs of ``e2e_ppg``: the KL divergence has no gradient but rounding noise at the first auxiliary step, which
  Adam makes a step of; they are compared within a few learning rates.

Stale runs take the recorded advantages and targets: the reference bootstraps with the current model, SB3 at collection.
"""

import math

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
from torch import nn

from sb3_ppo_ewma import losses, ppg
from sb3_ppo_ewma.ewma import MomentsEwma, ParameterEwma
from sb3_ppo_ewma.rollouts import Rollout
from tests.golden_data import Case, case_ids, load_case, manifest
from tests.golden_runs import AUXILIARY_STEP, EWMA_RESET, POLICY_STEP_KINDS, GoldenPhasicRun, GoldenRun

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


@pytest.mark.parametrize("case_id", case_ids("ewma_moments"))
def test_moments(case_id):
    case = load_case("ewma_moments", case_id)
    data, ddof = case.arrays, case.hyperparameters["ddof_update"]
    moments = MomentsEwma(case.hyperparameters["ewma_decay"])
    for k, count in enumerate(data["count"]):
        moments.update_from_moments(float(data["mean"][k]), float(data["var"][k]), int(count), ddof)
        mean, variance = moments.moments()
        # The reference subtracts sums of squares: its own rounding grows with the square of the mean.
        tolerance = {"rtol": 1e-9, "atol": 1e-12 * (1 + mean**2)}
        assert_close(mean, data["out_mean"][k], rtol=1e-9, atol=1e-12)
        assert_close(variance, data["out_var_ddof0"][k], **tolerance)
        assert_close(moments.moments(ddof=1)[1], data["out_var_ddof1"][k], **tolerance)
        weight, squared_weight, weighted_sum, weighted_squares = data["state"][k]
        assert_close((moments.weight, moments.squared_weight), (weight, squared_weight), rtol=1e-12)
        assert_close(moments.weight * moments.mean, weighted_sum, rtol=1e-9, atol=1e-12)
        assert_close(moments.squared_deviations + moments.weight * mean**2, weighted_squares, rtol=1e-9)


@pytest.mark.parametrize("case_id", case_ids("ewma_model"))
def test_parameter_ewma(case_id):
    case = load_case("ewma_model", case_id)
    data = case.arrays
    n_parameters = data["theta"].shape[1]
    has_buffers = "buffers" in data

    def module_with(vector: np.ndarray, buffers: np.ndarray | None) -> nn.Module:
        module = nn.Module()
        module.vector = nn.Parameter(th.as_tensor(vector.copy()))
        if buffers is not None:
            module.register_buffer("statistics", th.as_tensor(buffers.copy()))
        return module

    def row(k: int) -> nn.Module:
        return module_with(data["theta"][k], data["buffers"][k] if has_buffers else None)

    ewma = ParameterEwma(row(0))
    assert ewma.module.vector.numel() == n_parameters
    for k, event in enumerate(data["event"]):
        if event == 0:
            ewma.update(row(k), case.hyperparameters["ewma_decay"])
        elif event == 1:
            ewma.reset(row(k))
        elif event == 2:
            ewma.update(row(k), float(data["override_decay"][k]))
        assert_close(ewma.module.vector, data["ewma"][k], **case.tolerance)
        assert_close(ewma.total_weight, data["total_weight"][k], rtol=1e-12)
        if has_buffers:
            assert_close(ewma.module.statistics, data["buffers"][k], rtol=0, atol=0)


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
            kl_coef=kl_penalty,
            max_importance_ratio=imp_samp_max or None,
        )
        (gradient,) = th.autograd.grad(loss, log_prob, retain_graph=True)
        entropy_loss = losses.entropy_loss(entropy, log_prob)
        total = loss + entcoef * entropy_loss
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
        assert_close(stats.kl_loss, data["pi_kl"][i], **tolerance)
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

        terms = (stats.policy_kl, stats.aux_value_loss, stats.value_loss)
        tolerance = {"rtol": 2e-5, "atol": 1e-6} if case.dtype == th.float32 else {"rtol": 1e-9, "atol": 1e-12}
        assert_close(terms, data["unscaled"][i], **tolerance)
        assert_close(loss.detach(), data["total"][i], **tolerance)
        for gradient, name in zip(gradients, [*names, "vpredtrue", "vpredaux"], strict=True):
            expected = data[f"grad_{name}"][i]
            if name != "log_std":
                expected = expected[mask]
            assert_close(gradient.reshape(expected.shape), expected, **tolerance)


# ---------------------------------------------------------------------- whole trajectories


def assert_trajectory(run: GoldenRun, rtol: float, atol: float) -> None:
    data = run.data
    steps = np.flatnonzero(data["mb_mask"].any(axis=(1, 2)))
    assert len(run.params) == len(steps)
    assert_close(run.params, data["params"][steps], rtol=rtol, atol=atol)
    if "ewma" in data:
        updates = np.flatnonzero(np.isin(data["step_kind"], (*POLICY_STEP_KINDS, EWMA_RESET)))
        assert_close(run.ewma, data["ewma"][updates], rtol=rtol, atol=atol)
        assert_close(run.weights, data["total_weight"][updates], rtol=1e-12)


def trajectory_tolerance(case: Case) -> dict[str, float]:
    if case.dtype == th.float64:
        return {"rtol": 1e-7, "atol": 1e-10}
    # What the reference's own float32 run deviates from its float64 one, with some room
    summaries = {summary["case"]: summary for summary in manifest()["families"]["e2e_ppo"]["summary"]}
    deviation = summaries.get(case.id, {}).get("f32_vs_f64_max_abs_param_diff", 0.0)
    return {"rtol": 1e-4, "atol": max(2e-6, 10 * deviation)}


def spy_on(name, monkeypatch):
    """Statistics of every call of a loss function."""
    recorded = []
    original = getattr(losses, name)

    def spy(*args, **kwargs):
        loss, stats = original(*args, **kwargs)
        recorded.append(stats)
        return loss, stats

    monkeypatch.setattr(losses, name, spy)
    return recorded


@pytest.fixture
def recorded_stats(monkeypatch):
    recorded = []
    original = losses.policy_loss_terms

    def spy(log_prob, log_prob_prox, log_prob_behav, advantages, limits, **kwargs):
        terms = original(log_prob, log_prob_prox, log_prob_behav, advantages, limits, **kwargs)
        ratios = losses.ratio_statistics(terms.log_ratio_prox, terms.log_ratio_behav, limits)
        losses_of_both = terms.policy_gradient_loss, terms.kl_loss
        recorded.append(losses.PolicyLossStats(*losses_of_both, *ratios))
        return terms

    monkeypatch.setattr(losses, "policy_loss_terms", spy)
    return recorded


@pytest.fixture
def recorded_auxiliary_stats(monkeypatch):
    return spy_on("auxiliary_loss", monkeypatch)


@pytest.mark.parametrize("fused", [False, True], ids=["exact", "fused"])
@pytest.mark.parametrize("case_id", case_ids("e2e_ppo"))
def test_ppo_trajectory(case_id, fused, recorded_stats, default_dtype):
    case = load_case("e2e_ppo", case_id)
    default_dtype(case.dtype)
    run = GoldenRun("e2e_ppo", case, feed=True, fused=fused)
    run.run()
    tolerance = trajectory_tolerance(case)
    assert_trajectory(run, **tolerance)

    data, hp = case.arrays, case.hyperparameters
    diags = data["diags"][np.isin(data["step_kind"], POLICY_STEP_KINDS)]
    columns = {"policy_gradient_loss": 2, "kl_loss": 3, "approx_kl_prox": 7, "clip_fraction": 6}
    columns["importance_cap_fraction"] = 8
    if not hp["clip_param"]:
        del columns["clip_fraction"]
    for name, column in columns.items():
        actual = [float(getattr(stats, name)) for stats in recorded_stats]
        atol = 1e-5 if case.dtype == th.float32 else 1e-9
        assert_close(actual, diags[:, column], rtol=1e-4 if case.dtype == th.float32 else 1e-6, atol=atol)


@pytest.mark.parametrize("fused", [False, True], ids=["exact", "fused"])
@pytest.mark.parametrize("case_id", case_ids("e2e_ppg"))
def test_ppg_trajectory(case_id, fused, recorded_auxiliary_stats, default_dtype):
    case = load_case("e2e_ppg", case_id)
    default_dtype(case.dtype)
    run = GoldenPhasicRun("e2e_ppg", case, feed=True, fused=fused)
    run.run()
    data, hp = case.arrays, case.hyperparameters
    exact = case.dtype == th.float64
    tolerance = {"rtol": 1e-7, "atol": 1e-10} if exact else {"rtol": 0, "atol": 10 * max(hp["lr"], hp["aux_lr"])}
    assert_trajectory(run, **tolerance)
    terms = data["aux_terms"][data["step_kind"] == AUXILIARY_STEP]
    assert len(recorded_auxiliary_stats) == len(terms)
    columns = {"aux_value_loss": 1, "value_loss": 2}
    if exact:
        columns["policy_kl"] = 0  # elsewhere no larger than the tolerance
    else:
        tolerance = {"rtol": 1e-2}
    for name, column in columns.items():
        actual = [float(getattr(stats, name)) for stats in recorded_auxiliary_stats]
        assert_close(actual, terms[:, column], **tolerance)


OWN_ADVANTAGES = [
    case_id
    for case_id in case_ids("e2e_ppo")
    for hp in [load_case("e2e_ppo", case_id).hyperparameters]
    if not hp["staleness"] and not hp["rnorm"]
]


@pytest.mark.parametrize("case_id", OWN_ADVANTAGES)
def test_ppo_trajectory_with_own_advantages(case_id, default_dtype):
    """The same with our own GAE and normalisation; the reference rounds its advantages to float32."""
    case = load_case("e2e_ppo", case_id)
    default_dtype(case.dtype)
    run = GoldenRun("e2e_ppo", case, feed=False)
    run.run()
    lr = case.hyperparameters["lr"]
    assert_trajectory(run, rtol=1e-4, atol=lr * 1e-2)


def swap_policies(run: GoldenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    prox, behav = run.model._log_prob_prox, run.model._log_prob_behav
    monkeypatch.setattr(run.model, "_log_prob_prox", behav)
    monkeypatch.setattr(run.model, "_log_prob_behav", prox)


def drop_debiasing(run: GoldenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    ewma = run.model.policy_ewma

    def biased_update(source: nn.Module, decay: float) -> None:
        with th.no_grad():
            th._foreach_lerp_(list(ewma.module.parameters()), list(source.parameters()), 1 - decay)

    monkeypatch.setattr(ewma, "update", biased_update)


def reverse_kl(run: GoldenPhasicRun, monkeypatch: pytest.MonkeyPatch) -> None:
    original = losses.analytic_kl
    monkeypatch.setattr(losses, "analytic_kl", lambda old, current: original(current, old))


def forget_reset(run: GoldenPhasicRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.model.policy_ewma, "reset", lambda _: None)


def share_optimizer(run: GoldenPhasicRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.model.aux_optimizer = run.model.policy.optimizer


def do_not_detach(run: GoldenPhasicRun, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = run.model.policy.mlp_extractor
    monkeypatch.setattr(extractor, "forward_critic", lambda features: extractor.value_net(features))


def refresh_old_policy(run: GoldenPhasicRun, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ppg.with_parameters

    def with_present_parameters(like, _):
        return original(like, [parameter.detach() for parameter in ppg.distribution_parameters(like)])

    monkeypatch.setattr(ppg, "with_parameters", with_present_parameters)


def has_ewma(hp: dict) -> bool:
    return hp["kl_ewma_decay"] is not None


def has_phases(hp: dict) -> bool:
    return hp["n_aux_epochs"] > 0


@pytest.mark.parametrize(
    ("family", "wanted", "mistake"),
    [
        ("e2e_ppo", lambda hp: hp["staleness"] and hp["staleness_loss"] == "decoupled", swap_policies),
        ("e2e_ppo", lambda hp: has_ewma(hp) and hp["clip_param"], swap_policies),
        ("e2e_ppo", lambda hp: has_ewma(hp) and hp["kl_penalty"], swap_policies),
        ("e2e_ppo", lambda hp: has_ewma(hp) and hp["clip_param"], drop_debiasing),
        ("e2e_ppo", lambda hp: has_ewma(hp) and hp["kl_penalty"], drop_debiasing),
        ("e2e_ppg", has_phases, reverse_kl),
        ("e2e_ppg", has_phases, share_optimizer),
        ("e2e_ppg", has_phases, refresh_old_policy),
        ("e2e_ppg", lambda hp: has_phases(hp) and has_ewma(hp), forget_reset),
        ("e2e_ppg", lambda hp: has_phases(hp) and hp["arch"] == "detach", do_not_detach),
    ],
)
def test_trajectories_notice_mistakes(family, wanted, mistake, default_dtype, monkeypatch):
    cases = [load_case(family, case_id) for case_id in case_ids(family)]
    suitable = [case for case in cases if case.dtype == th.float64 and wanted(case.hyperparameters)]
    if not suitable:
        pytest.skip("no recording in this folder can show it")
    case = max(suitable, key=lambda case: case.hyperparameters["lr"])
    default_dtype(case.dtype)
    run = (GoldenPhasicRun if family == "e2e_ppg" else GoldenRun)(family, case, feed=True)
    mistake(run, monkeypatch)
    run.run()
    with pytest.raises(AssertionError):
        assert_trajectory(run, rtol=1e-7, atol=1e-10)
