"""Rescaling: the rules by what they do, the paper's grid, refusals, and training down to one sample."""

import copy
import functools
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_ppo_ewma import PPGEWMA, PPOEWMA
from sb3_ppo_ewma import batch_scaling as scaling
from sb3_ppo_ewma.advantages import MomentsEwma
from sb3_ppo_ewma.batch_scaling import rescale, settings_of, with_defaults
from sb3_ppo_ewma.ewma import ParameterEwma

# Hilton et al. 2022, one process: 256 environments, 256 steps, 8 minibatches, auxiliary minibatches of 16 sequences
PAPER = {
    "n_envs": 256,
    "n_steps": 256,
    "batch_size": 8192,
    "n_epochs": 1,
    "learning_rate": 5e-4,
    "prox_decay": "auto",
    "advantage_decay": 0.0,
    "n_policy_iterations": 32,
    "aux_batch_size": None,
    "aux_learning_rate": 5e-4,
}
SETTINGS = {**PAPER, "n_envs": 8, "n_steps": 32, "batch_size": 64, "prox_decay": 0.75, "advantage_decay": 0.9,
            "n_policy_iterations": 16, "aux_batch_size": 24, "gamma": 0.99}  # fmt: skip


by_paper = functools.partial(rescale, strategy="paper")


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return by_paper(*args, **kwargs).hyperparameters


# === The paper's grid ===


@pytest.mark.parametrize(
    ("n_envs", "batch_size", "learning_rate", "center_of_mass", "span", "n_policy_iterations"),
    [
        (64, 2048, 2.5e-4, 32, 4, 128),
        (16, 512, 1.25e-4, 128, 16, 512),
        (4, 128, 6.25e-5, 512, 64, 2048),
        (1, 32, 3.125e-5, 2048, 256, 8192),
    ],
)
def test_the_papers_grid(n_envs, batch_size, learning_rate, center_of_mass, span, n_policy_iterations):
    new = by_paper(PAPER, n_envs / 256).hyperparameters
    assert (new["n_envs"], new["n_steps"], new["batch_size"]) == (n_envs, 256, batch_size)
    assert new["learning_rate"] == pytest.approx(learning_rate, rel=1e-12)
    assert 1 / (1 - new["prox_decay"]) - 1 == pytest.approx(center_of_mass, rel=1e-9)
    assert 2 / (1 - new["advantage_decay"]) - 1 == pytest.approx(span, rel=1e-9)
    assert new["n_policy_iterations"] == n_policy_iterations
    # The phase: the same samples, minibatches and learning rate
    assert new["n_policy_iterations"] * new["n_steps"] * new["n_envs"] == 32 * 256 * 256
    assert (new["aux_batch_size"], new["aux_learning_rate"]) == (4096, 5e-4)


@pytest.mark.parametrize("ratio", [Fraction(1, 8), 0.25, 2, Fraction(3, 2)])
def test_there_and_back(ratio):
    settings = {**SETTINGS, "n_policy_iterations": 48, "staleness": 6}
    back = quietly(quietly(settings, ratio), 1 / ratio)
    assert back.keys() == settings.keys()
    for name, value in settings.items():
        if isinstance(value, float):
            assert back[name] == pytest.approx(value, rel=1e-12), name
        else:
            assert back[name] == value, name


def test_in_steps_or_at_once():
    in_steps = by_paper(by_paper(PAPER, 1 / 4).hyperparameters, 1 / 16).hyperparameters
    at_once = by_paper(PAPER, 1 / 64).hyperparameters
    assert in_steps == pytest.approx(at_once, rel=1e-12)


def test_nothing_else_changes_and_nothing_is_changed_in_place():
    settings = {**SETTINGS, "policy_kwargs": {"net_arch": [8]}, "seed": 3}
    before = copy.deepcopy(settings)
    new = by_paper(settings, 0.5).hyperparameters
    assert settings == before
    assert {name for name in new if new[name] != settings[name]} == {
        "n_envs", "batch_size", "learning_rate", "prox_decay", "advantage_decay", "n_policy_iterations",
    }  # fmt: skip


def test_explanation():
    lines = by_paper(PAPER, 1 / 256).explanation.splitlines()
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert found["n_envs"] == "256 → 1 × ratio ratio 1/256"
    assert found["prox_decay"] == "auto → 0.9995 centre of mass ÷ ratio: 8 → 2048 gradient steps Hilton et al. 2022"
    assert found["aux_batch_size"].startswith("None → 4096 kept")


# === The rules, by what they do ===


def mean_age(settings):
    """:return: mean age of the proximal policy in environment steps: the lag of the EWMA of a growing parameter"""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    average = ParameterEwma(module)
    steps = 0
    for _ in range(2_000):  # much longer than the average remembers
        steps += settings["batch_size"]
        nn.init.constant_(module.weight, steps)
        average.update(settings["prox_decay"])
    return steps - float(average.averages[0])


@pytest.mark.parametrize("prox_decay", ["auto", 0.75])
def test_age_of_the_proximal_policy_in_environment_steps(prox_decay):
    # "auto": 8 minibatches of 32 samples
    settings = {**SETTINGS, "batch_size": 32, "prox_decay": prox_decay}
    expected = 8 * 32 if prox_decay == "auto" else 3 * 32
    for ratio in (1, 1 / 4, 1 / 8, 2):
        assert mean_age(quietly(settings, ratio)) == pytest.approx(expected, rel=1e-6)


def test_auto_of_a_model_has_the_same_age():
    env = make_vec_env("CartPole-v1", 8)
    model = PPOEWMA("MlpPolicy", env, n_steps=12, batch_size=20, n_epochs=1, advantage_decay=0.0)
    age = model.current_prox_decay / (1 - model.current_prox_decay) * 20
    for ratio in (1 / 4, 1 / 2):
        new = by_paper(settings_of(model), ratio).hyperparameters
        small = PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", new.pop("n_envs")), **new)
        decay = small.current_prox_decay
        assert decay / (1 - decay) * small.batch_size == pytest.approx(age)


def effective_sample_size(decay, n_iterations=4000):
    """:return: 1/Σw² for decaying weights that sum to 1"""
    weights = decay ** np.arange(n_iterations)
    return weights.sum() ** 2 / (weights**2).sum()


def test_advantage_span_in_samples():
    settings = {**SETTINGS, "advantage_decay": 0.9}
    per_iteration = [settings["n_envs"], effective_sample_size(0.9)]
    for ratio in (1 / 8, 1 / 2, 4):
        new = quietly(settings, ratio)
        assert new["n_envs"] * effective_sample_size(new["advantage_decay"]) == pytest.approx(math.prod(per_iteration))


def test_advantage_moments_follow_a_change_as_fast_in_samples():
    means = []
    for settings in (SETTINGS, by_paper(SETTINGS, 1 / 8).hyperparameters):
        moments = MomentsEwma(settings["advantage_decay"])
        n_samples = settings["n_envs"] * settings["n_steps"]
        for value, total in ((0.0, 400_000), (1.0, 2_560)):
            for _ in range(total // n_samples):
                moments.update_from_moments(value, 1.0, n_samples)
        means.append(moments.moments()[0])
    # Two decays per sample with the same effective sample size are alike, not equal.
    assert means[0] == pytest.approx(means[1], rel=0.03)
    assert 0.3 < means[0] < 0.8


def displacement(optimizer_class, rate, batch_size, noise, n_samples=2**15):
    """:return: distance that parameters move with gradients of mean -1 and standard deviation ``noise`` per sample"""
    generator = th.Generator().manual_seed(0)
    parameters = th.zeros(2000, requires_grad=True)
    optimizer = optimizer_class([parameters], lr=rate)
    for _ in range(n_samples // batch_size):
        parameters.grad = -1 + noise / batch_size**0.5 * th.randn(parameters.shape, generator=generator)
        optimizer.step()
    return parameters.detach()


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "noise"), [(th.optim.Adam, 300.0), (th.optim.SGD, 10.0)])
def test_learning_rate(optimizer, noise):
    settings = {**SETTINGS, "policy_kwargs": {"optimizer_class": optimizer}, "learning_rate": 1e-3}
    small = by_paper(settings, 1 / 8).hyperparameters
    before = displacement(optimizer, 1e-3, 64, noise)
    after = displacement(optimizer, small["learning_rate"], small["batch_size"], noise)
    unadjusted = displacement(optimizer, 1e-3, small["batch_size"], noise)
    # The drift, which the signal makes
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.1)
    assert float(unadjusted.mean()) > 2 * float(before.mean())
    if optimizer is th.optim.Adam:  # and the spread, which the noise makes
        assert float(after.std()) == pytest.approx(float(before.std()), rel=0.1)


def test_adam_betas():
    assert "policy_kwargs" not in by_paper(SETTINGS, 0.5).hyperparameters
    new = by_paper(SETTINGS, 1 / 2, adam_betas=True).hyperparameters["policy_kwargs"]["optimizer_kwargs"]
    # What two of the new steps forget is what one of the old ones does.
    assert [beta**2 for beta in new["betas"]] == pytest.approx([0.9, 0.999])
    given = {**SETTINGS, "policy_kwargs": {"optimizer_kwargs": {"betas": (0.5, 0.9), "eps": 1e-8}, "net_arch": [4]}}
    new = by_paper(given, 1 / 4, adam_betas=True).hyperparameters["policy_kwargs"]
    assert new["net_arch"] == [4]
    assert new["optimizer_kwargs"]["eps"] == 1e-8
    assert [beta**4 for beta in new["optimizer_kwargs"]["betas"]] == pytest.approx([0.5, 0.9])


def test_adam_betas_alone_change_nothing_else_of_the_optimizer():
    settings = with_defaults(PPOEWMA, {"n_envs": 2, "n_steps": 16, "n_epochs": 1, "advantage_decay": 0.0})
    new = by_paper(settings, 1, adam_betas=True).hyperparameters["policy_kwargs"]
    default, given = (
        PPOEWMA("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=16, seed=0, policy_kwargs=kwargs).learn(64)
        for kwargs in (None, new)
    )
    assert given.current_engine == default.current_engine == "dense"
    for old, parameter in zip(default.policy.parameters(), given.policy.parameters(), strict=True):
        assert th.equal(old, parameter)


@pytest.mark.parametrize(
    "learning_rate", ["lin_1e-3", LinearSchedule(1e-3, 0.0, 1.0), lambda progress: 1e-3 * progress]
)
def test_schedules(learning_rate):
    scaled = by_paper({**SETTINGS, "learning_rate": learning_rate}, 1 / 4).hyperparameters["learning_rate"]
    if isinstance(scaled, str):
        assert scaled.startswith("lin_")
        assert float(scaled[4:]) == pytest.approx(5e-4)
        return
    assert [scaled(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([5e-4, 2.5e-4, 0.0])
    back = quietly({**SETTINGS, "learning_rate": scaled}, 4)["learning_rate"]
    assert back(0.5) == pytest.approx(5e-4)
    assert not isinstance(back.schedule, scaling.ScaledSchedule)


def test_as_many_gradients_are_clipped():
    settings = {**SETTINGS, "max_grad_norm": 0.5}
    shares = []
    for each in (settings, by_paper(settings, 1 / 8).hyperparameters):
        generator = th.Generator().manual_seed(0)
        gradients = th.randn(10_000, each["batch_size"], 8, generator=generator).mean(dim=1) * 1.5
        shares.append(float((gradients.norm(dim=1) > each["max_grad_norm"]).double().mean()))
    assert 0.3 < shares[0] < 0.7
    assert shares[1] == pytest.approx(shares[0], abs=0.03)
    assert by_paper({**SETTINGS, "max_grad_norm": math.inf}, 1 / 2).hyperparameters["max_grad_norm"] == math.inf


def test_a_scaled_schedule_is_saved(tmp_path):
    schedule = scaling.ScaledSchedule(LinearSchedule(1e-3, 0.0, 1.0), 0.5)
    assert pickle.loads(pickle.dumps(schedule))(1.0) == 5e-4
    PPOEWMA("MlpPolicy", "CartPole-v1", learning_rate=schedule).save(tmp_path / "model")
    assert PPOEWMA.load(tmp_path / "model").lr_schedule(1.0) == 5e-4


# === Refusals ===


@pytest.mark.parametrize(
    ("changed", "ratio", "reason"),
    [
        ({"n_epochs": 4}, 0.5, "n_epochs=4 cannot be rescaled with strategy='paper': with several policy epochs"),
        ({"prox_decay": None}, 0.5, "prox_decay=None cannot be rescaled with strategy='paper': without an EWMA"),
        (
            {"advantage_decay": None},
            0.5,
            "advantage_decay=None cannot be rescaled with strategy='paper': it normalises .* per minibatch",
        ),
        ({"target_kl": 0.01}, 0.5, "target_kl=0.01 cannot be rescaled with strategy='paper'"),
        ({}, 1 / 3, "n_envs=8 times 1/3 is 2.667, not a whole number of environments"),
        ({"batch_size": 65}, 0.5, "batch_size=65 times 1/2 is 32.5, not a whole number of samples"),
        ({"n_policy_iterations": 3}, 2, "n_policy_iterations=3 times 1/2 is 1.5, not a whole number of iterations"),
        ({"staleness": 1}, 2, "staleness=1 times 1/2"),
        ({"advantage_decay": 0.0}, 2, "span of 1 iterations.*would be 0.5.*advantage_decay must be at least 0.3333"),
        ({"learning_rate": "cos_1e-3"}, 0.5, "learning_rate='cos_1e-3' cannot be rescaled"),
        ({"learning_rate": "lin_x"}, 0.5, "learning_rate='lin_x' cannot be rescaled"),
        ({"learning_rate": "1e-3"}, 0.5, "learning_rate='1e-3' cannot be rescaled"),
        ({"policy_kwargs": {"optimizer_class": th.optim.RMSprop}}, 0.5, "optimizer_class must be .* RMSprop"),
        ({"policy_kwargs": {"optimizer_class": th.optim.AdamW}}, 0.5, "optimizer_class must be .* AdamW"),
        ({"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1}}}, 0.5, "without weight decay"),
        ({"prox_decay": 1.0}, 0.5, "prox_decay must be in"),
        ({}, 0, "ratio must be positive and finite, got 0"),
        ({}, -0.5, "ratio must be positive"),
        ({}, math.nan, "ratio must be positive"),
        ({}, math.inf, "ratio must be positive"),
    ],
)
def test_what_cannot_be_rescaled(changed, ratio, reason):
    with pytest.raises(ValueError, match=reason):
        quietly({**SETTINGS, **changed}, ratio)


@pytest.mark.parametrize(
    ("changed", "ratio", "reason"),
    [
        ({}, "2", "ratio must be a positive number.*got '2'"),
        ({}, True, "ratio must be a positive number"),
        ({"batch_size": 64.0}, 0.5, "batch_size must be an integer"),
        ({"policy_kwargs": "dict()"}, 0.5, "policy_kwargs must be a dictionary or None"),
        ({"learning_rate": None}, 0.5, "learning_rate must be a number"),
    ],
)
def test_wrong_types(changed, ratio, reason):
    with pytest.raises(TypeError, match=reason):
        by_paper({**SETTINGS, **changed}, ratio)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="must have n_envs, batch_size: with_defaults"):
        by_paper({name: value for name, value in SETTINGS.items() if name not in ("n_envs", "batch_size")}, 0.5)


def test_advantages_that_are_not_normalised_need_no_rule():
    settings = {**SETTINGS, "advantage_decay": None, "normalize_advantage": False}
    assert by_paper(settings, 0.5).hyperparameters["advantage_decay"] is None


def test_warning_of_the_critical_size():
    with pytest.warns(UserWarning, match="128 samples; that may be more than the critical batch size") as caught:
        by_paper(SETTINGS, 2)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the critical batch size is 100"):
        by_paper(SETTINGS, 2, critical_batch_size=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_paper(SETTINGS, 2, critical_batch_size=128)
        by_paper(SETTINGS, 0.5)


# === Models ===


@pytest.mark.parametrize("algorithm", [PPOEWMA, PPGEWMA])
def test_settings_of_a_model_build_the_same_model(algorithm):
    kwargs = {"n_epochs": 1, "advantage_decay": 0.5, "learning_rate": 1e-3, "clip_range": 0.1, "gamma": 0.9}
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=16, seed=1, **kwargs)
    settings = by_paper(settings_of(model), 1).hyperparameters
    again = algorithm("MlpPolicy", make_vec_env("CartPole-v1", settings.pop("n_envs")), **settings)
    for name, value in kwargs.items():
        if name != "clip_range":
            assert getattr(again, name) == value
    assert again.clip_range(1.0) == 0.1
    for old, new in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        assert th.equal(old, new)


def test_settings_of_another_algorithm():
    with pytest.raises(TypeError, match="model must be one of this package's algorithms, got PPO"):
        settings_of(PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8))
    with pytest.raises(TypeError, match="algorithm must be a class"):
        with_defaults(PPO, {})


def test_processes_share_environments_and_minibatches():
    shared = scaling.per_process({**SETTINGS, "batch_size": 64}, 4)
    assert (shared["n_envs"], shared["batch_size"], shared["aux_batch_size"]) == (2, 16, 6)
    changed = {name for name in SETTINGS if shared[name] != SETTINGS[name]}
    assert changed == {"n_envs", "batch_size", "aux_batch_size"}
    assert scaling.per_process(PAPER, 2)["aux_batch_size"] is None
    assert scaling.per_process(SETTINGS, 1) == SETTINGS


@pytest.mark.parametrize(
    ("changed", "n_processes", "message"),
    [
        ({"n_envs": 6}, 4, "n_envs=6 environments cannot be divided between 4 processes: it must be a multiple of 4"),
        ({"batch_size": 65}, 2, "batch_size=65 samples cannot be divided"),
        ({}, 0, "n_processes must be >= 1, got 0"),
    ],
)
def test_what_processes_cannot_share(changed, n_processes, message):
    with pytest.raises(ValueError, match=message):
        scaling.per_process({**SETTINGS, **changed}, n_processes)


def test_processes_need_both_numbers():
    with pytest.raises(ValueError, match="hyperparameters must have batch_size"):
        scaling.per_process({"n_envs": 4}, 2)


def test_defaults():
    assert with_defaults(PPGEWMA, {"n_steps": 5}) | {"max_grad_norm": None} == {
        "n_envs": 1,
        "n_steps": 5,
        "batch_size": 64,
        "n_epochs": 1,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "learning_rate": 3e-4,
        "prox_decay": "auto",
        "advantage_decay": 0.0,
        "n_policy_iterations": 32,
        "aux_batch_size": None,
        "aux_learning_rate": 5e-4,
        "max_grad_norm": None,
    }
    assert with_defaults(PPOEWMA, {})["n_epochs"] == 10
    assert with_defaults(PPGEWMA, {"normalize_advantage": False})["advantage_decay"] is None


@pytest.mark.long
@pytest.mark.parametrize("algorithm", [PPOEWMA, PPGEWMA])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_with_one_environment_and_minibatches_of_one_sample(algorithm, env_id):
    settings = {"n_envs": 16, "n_steps": 8, "batch_size": 16, "n_epochs": 1, "advantage_decay": 0.0}
    if algorithm is PPGEWMA:
        settings["n_policy_iterations"] = 1
    settings = with_defaults(algorithm, settings)
    new = by_paper(settings, 1 / 16).hyperparameters
    assert (new["n_envs"], new["batch_size"]) == (1, 1)
    model = algorithm("MlpPolicy", make_vec_env(env_id, new.pop("n_envs"), seed=0), seed=0, **new)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(8 * 16 * 3)
    for old, parameter in zip(before, model.policy.parameters(), strict=True):
        assert th.isfinite(parameter).all()
        assert not th.equal(old, parameter) or parameter.numel() == 1
    for name, value in model.logger.name_to_value.items():
        if isinstance(value, float) and name != "train/explained_variance":
            assert math.isfinite(value), name
