"""The code of docs/extending.md runs and does what the page says."""

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_ppo_ewma import PPG, PPOEWMA, MaskablePPOEWMA
from sb3_ppo_ewma.evaluation import Evaluation

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
SETTINGS: dict[str, Any] = {"n_steps": 64, "seed": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's code defines, and as ``printed`` what it prints. Its blocks build on each other."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "example", "printed": [], "expected": []}
    found["print"] = found["printed"].append
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extending"))
        for block in blocks:
            found["expected"] += re.findall(r"^print\(.*\)  # (.+)$", block, flags=re.MULTILINE)
            exec(compile(re.sub(r"total_timesteps=[\w_]+", "total_timesteps=512", block), str(PAGE), "exec"), found)
    return found


class Log(KVWriter):
    """Remembers everything that is logged."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.values |= key_values

    def close(self) -> None:
        pass


def logged(model: Any, total_timesteps: int) -> dict[str, Any]:
    """
    :return: all that is logged while the model learns
    """
    log = Log()
    model.set_logger(Logger(folder=None, output_formats=[log]))
    model.learn(total_timesteps)
    model.logger.dump()
    return log.values


def parameters(model: Any) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.long
def test_engines_are_those_on_the_page(names: dict[str, Any]) -> None:
    assert names["expected"] == ["standard", "fused", "dense", "fused"]
    assert names["printed"] == names["expected"]


# === A loss term ===


class WithGradientOfThree(PPOEWMA):
    """A term whose derivative with respect to ``log_std`` is 3."""

    shapes: ClassVar[list[Any]] = []

    def extra_loss(self, evaluation: Evaluation, minibatch: Any) -> th.Tensor:
        self.shapes.append([tuple(each.shape) for each in evaluation if each is not None])
        assert minibatch.advantages.shape == evaluation.log_prob.shape
        return 3 * self.policy.log_std.sum()


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        ({}, "standard"),
        ({"engine": "reference"}, "reference"),
        ({"policy_kwargs": {"optimizer_class": th.optim.SGD}}, "reference"),
        ({"kl_coef": 1.0, "kl_estimator": "analytic"}, "standard"),
    ],
)
def test_the_term_is_added_to_the_gradient(arguments: dict[str, Any], engine: str) -> None:
    one_step = {**SETTINGS, "batch_size": 64, "n_epochs": 1, "max_grad_norm": float("inf"), **arguments}
    without = PPOEWMA("MlpPolicy", "Pendulum-v1", **copy.deepcopy(one_step)).learn(64)
    model = WithGradientOfThree("MlpPolicy", "Pendulum-v1", **copy.deepcopy(one_step)).learn(64)
    assert model.current_engine == engine
    difference = model.policy.log_std.grad - without.policy.log_std.grad
    assert difference.tolist() == pytest.approx([3.0], abs=1e-5)
    n_fields = 6 if "kl_coef" in arguments else 5
    assert model.shapes[-1] == [(64,)] * n_fields


def test_value_epochs_and_auxiliary_phase_do_not_call_it() -> None:
    class PhasicWithTerm(PPG):
        n_calls = 0

        def extra_loss(self, evaluation: Evaluation, minibatch: Any) -> th.Tensor:
            self.n_calls += 1
            return 0 * evaluation.log_prob.sum()

    model = PhasicWithTerm(
        "MlpPolicy", "Pendulum-v1", **SETTINGS, batch_size=16, n_epochs=2, n_epochs_value=3, n_policy_iterations=2
    ).learn(128)
    assert model._n_phases == 1
    assert model.n_calls == 2 * 2 * 4  # rollouts, policy epochs, minibatches


@pytest.mark.long
def test_smoothness_is_learned(names: dict[str, Any]) -> None:
    cls = names["SmoothPPOEWMA"]
    observations = th.as_tensor(np.random.default_rng(0).normal(size=(256, 3)), dtype=th.float32)
    noise = 0.05 * th.as_tensor(np.random.default_rng(1).normal(size=(256, 3)), dtype=th.float32)

    def roughness(coefficient: float) -> float:
        model = cls("MlpPolicy", "Pendulum-v1", **SETTINGS, learning_rate=1e-2, smoothness_coef=coefficient)
        log = logged(model, 256)
        assert log["train/smoothness_loss"] >= 0
        assert (log["train/smoothness_loss"] > 0) == (coefficient > 0)
        with th.no_grad():
            change = model.policy.get_distribution(observations).mode()
            change = change - model.policy.get_distribution(observations + noise).mode()
        return float(change.square().mean())

    assert roughness(1000.0) < 0.1 * roughness(0.0)


def test_parameters_of_the_subclass_are_saved(names: dict[str, Any], tmp_path: Path) -> None:
    cls = names["SmoothPPOEWMA"]
    cls("MlpPolicy", "Pendulum-v1", **SETTINGS, smoothness_coef=0.25).save(tmp_path / "smooth")
    model = cls.load(tmp_path / "smooth")
    assert (model.smoothness_coef, model.noise_std) == (0.25, 0.05)


# === An action distribution ===


def test_density_of_the_page_is_one(names: dict[str, Any]) -> None:
    distribution = names["BetaDistribution"](1).proba_distribution(th.tensor([[0.3, 1.2]]))
    actions = th.linspace(-1, 1, 20_001).unsqueeze(1)
    density = distribution.log_prob(actions).exp()
    width = 2 / 20_000
    assert float(density.sum()) * width == pytest.approx(1.0, abs=1e-3)
    entropy = -float((density * density.log()).nan_to_num().sum()) * width
    assert float(distribution.entropy()) == pytest.approx(entropy, abs=1e-3)
    assert distribution.mode().abs().item() < 1


def test_divergence_of_the_page(names: dict[str, Any]) -> None:
    # KL(Beta(2, 1) ‖ Beta(1, 1)) = ∫ 2x·log(2x) dx = log 2 − 1/2
    two, one = th.tensor([[2.0]]), th.tensor([[1.0]])
    kl = names["BetaForm"]().kl([two, one], [one, one])
    assert kl.tolist() == pytest.approx([np.log(2) - 0.5], abs=1e-6)


@pytest.mark.parametrize("has_form", [True, False], ids=["closed form", "without"])
@pytest.mark.parametrize("arguments", [{}, {"kl_coef": 1.0, "kl_estimator": "analytic", "ent_coef": 0.01}])
def test_distribution_trains_as_by_the_reference(
    names: dict[str, Any], arguments: dict[str, Any], has_form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_form:
        monkeypatch.delattr(names["BetaDistribution"], "closed_form")
    policy = names["BetaPolicy"]
    start = parameters(PPOEWMA(policy, "Pendulum-v1", **SETTINGS, **arguments))
    models, logs = [], []
    for engine in ("auto", "reference"):  # one after the other: a seed is set when a model is made
        models.append(PPOEWMA(policy, "Pendulum-v1", **SETTINGS, **arguments, engine=engine))
        logs.append(logged(models[-1], 64))
    model, reference = models
    fast = "standard" if arguments else "dense"
    assert model.current_engine == (fast if has_form else "fused")
    assert reference.current_engine == "reference"
    assert (parameters(model) - start).abs().max() > 1e-3
    th.testing.assert_close(parameters(model), parameters(reference), rtol=0, atol=2e-5)
    for key in [key for key in logs[0] if key.startswith("train/")]:
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-3, abs=1e-4), key
    assert ("train/kl_loss" in logs[0]) == bool(arguments)
    assert "train/std" not in logs[0]


@pytest.mark.long
@pytest.mark.parametrize("has_form", [True, False], ids=["closed form", "without"])
def test_auxiliary_phase_measures_the_divergence(
    names: dict[str, Any], has_form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_form:
        monkeypatch.delattr(names["BetaDistribution"], "closed_form")
    arguments = {**SETTINGS, "n_policy_iterations": 1, "aux_learning_rate": 1e-2}
    policy = names["BetaPPGPolicy"]
    logs = [logged(PPG(policy, "Pendulum-v1", **arguments, engine=engine), 64) for engine in ("auto", "reference")]
    assert logs[0]["aux/n_phases"] == 1
    assert logs[0]["aux/policy_kl"] > 1e-6
    assert logs[0]["aux/policy_kl"] == pytest.approx(logs[1]["aux/policy_kl"], rel=1e-2)


def test_actions_are_scaled_to_the_bounds(names: dict[str, Any]) -> None:
    model = PPOEWMA(names["BetaPolicy"], "Pendulum-v1", **SETTINGS)
    observations = np.random.default_rng(0).normal(size=(256, 3)).astype(np.float32)
    actions, _ = model.predict(observations)
    assert 1.0 < np.abs(actions).max() <= 2.0


# === An algorithm family ===


def test_family_trains_as_the_package_own(names: dict[str, Any]) -> None:
    env = names["InvalidActionEnvDiscrete"]
    models = [
        cls("MlpPolicy", env(dim=20, n_invalid_actions=10), **SETTINGS, engine="reference").learn(128)
        for cls in (names["MyPPOEWMA"], MaskablePPOEWMA)
    ]
    assert th.equal(*map(parameters, models))
