"""Hyper-parameters of Procgen: the paper's, for 256 environments and for 64, with the clip and with the KL penalty."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from rl_zoo3 import ALGOS

from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.envs.envpool_env import PROCGEN
from sb3_ppo_ewma.zoo.algorithms import hyperparameter_file
from sb3_ppo_ewma.zoo.rescaling import rescaled
from tests.test_envpool_vec_env import needs_procgen

pytestmark = pytest.mark.long

zoo.register()
VARIANTS = ["ppo", *(f"{algo}{suffix}" for algo in ("ppo_ewma", "ppg", "ppg_ewma") for suffix in ("", "_kl"))]
FILES = sorted(f"{variant}_{n_envs}" for variant in VARIANTS for n_envs in (256, 64))


def entry(name: str) -> dict[str, Any]:
    entries = yaml.safe_load(hyperparameter_file(f"procgen/{name}").read_text())
    assert set(entries) == {game for game in PROCGEN if "Hard" in game}
    first, *others = entries.values()
    assert all(each == first for each in others)
    return dict(first)


def algorithm(name: str) -> str:
    return name.removesuffix("_256").removesuffix("_64").removesuffix("_kl")


def test_these_are_all() -> None:
    folder = hyperparameter_file("procgen/ppo_256").parent
    assert sorted(file.stem for file in folder.iterdir()) == FILES


@pytest.mark.parametrize("variant", VARIANTS)
def test_256_environments_have_the_numbers_of_the_paper(variant: str) -> None:
    # Hilton et al. 2022, appendix: 4 workers of 64 environments, 256 steps, 8 minibatches, 100 M steps
    settings = entry(f"{variant}_256")
    assert settings["n_envs"] == 4 * 64
    assert settings["n_steps"] * settings["n_envs"] / settings["batch_size"] == 8
    assert settings["n_timesteps"] == 100e6
    paper = {"learning_rate": 5e-4, "gamma": 0.999, "gae_lambda": 0.95, "vf_coef": 0.5, "ent_coef": 0.01}
    assert {name: settings[name] for name in paper} == paper
    assert settings["max_grad_norm"] == math.inf
    assert settings["n_epochs"] == (1 if "ppg" in variant else 3)
    assert (settings["clip_range"], settings.get("kl_coef")) == ((None, 1.0) if "kl" in variant else (0.2, None))
    assert settings.get("prox_decay") == ("auto" if "ewma" in variant else None)
    phase = {"n_policy_iterations": 32, "n_aux_epochs": 6, "aux_learning_rate": 5e-4, "aux_batch_size": 16 * 256}
    assert {name: settings.get(name) for name in phase} == (phase if "ppg" in variant else dict.fromkeys(phase))


@pytest.mark.parametrize("variant", VARIANTS)
def test_64_environments_have_the_rescaled_ones(variant: str) -> None:
    large, small = entry(f"{variant}_256"), entry(f"{variant}_64")
    # The rules are those of one epoch and of averages; what has several or none takes the same numbers.
    complete = {"advantage_decay": 0.0, **large, "n_epochs": 1, "prox_decay": "auto"}
    result = rescaled("ppg_ewma" if "ppg" in variant else "ppo_ewma", complete, 64, "paper").hyperparameters
    assert small.keys() == large.keys()
    for name in large.keys() - {"n_epochs"}:
        is_number = isinstance(result[name], float)
        assert small[name] == (pytest.approx(result[name], rel=1e-6) if is_number else result[name]), name
    assert small["n_epochs"] == large["n_epochs"]


@needs_procgen
@pytest.mark.parametrize("name", ["ppo_64", "ppo_ewma_kl_256", "ppg_64", "ppg_ewma_kl_64"])
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    algo = algorithm(name)
    arguments = ["--algo", algo, "--env", "StarpilotHard-v0", "--vec-env", "envpool", "-conf", f"procgen/{name}.yml"]
    small = ["n_envs:2", "n_steps:8", "batch_size:8"]
    if "ppg" in name:
        small += ["n_policy_iterations:1", "n_aux_epochs:1", "aux_batch_size:8"]
    zoo.main(["train", *arguments, "-n", "16", "--eval-freq", "-1", "--device", "cpu", "-f", "logs", "-params", *small])
    run = Path("logs", algo, "StarpilotHard-v0_1")
    model = ALGOS[algo].load(run / "StarpilotHard-v0.zip", device="cpu")
    assert model.num_timesteps == 16
    assert type(model.policy.features_extractor).__name__ == "ImpalaCNN"
    assert (run / "StarpilotHard-v0" / "vecnormalize.pkl").exists()
