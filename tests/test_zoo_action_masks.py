"""Action masks in the zoo's scripts. Every invalid action is an error in these environments."""

import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
from rl_zoo3 import ALGOS
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_ppo_ewma import zoo
from sb3_ppo_ewma.envs.action_masks import InfoActionMasker, MiniGridActionMasker
from sb3_ppo_ewma.zoo import action_masks
from tests import masked_envs

pytestmark = pytest.mark.long

zoo.register()

MASKED = [name for name, algorithm in ALGOS.items() if action_masks.takes_masks(algorithm)]
# One without and one with hidden states, where one of each is enough
SOME = ["ppo_mask_ewma", "ppo_mask_lstm_ewma"]
SMALL = ["n_envs:2", "n_steps:16", "batch_size:16", "n_epochs:1"]
MASKER = "sb3_contrib.common.wrappers.ActionMasker"
INFO_MASKER = "sb3_ppo_ewma.envs.action_masks.InfoActionMasker"
BY_NAME = f"env_wrapper:{{'{MASKER}':dict(action_mask_fn='valid_actions')}}"
FROM_INFO = f"env_wrapper:{{'{INFO_MASKER}':dict(key='mask')}}"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(algo: str, *params: str, env: str = "Masked-v0", arguments: tuple[str, ...] = ()) -> Path:
    command = ["train", "--algo", algo, "--env", env, "-f", "logs", "-n", "64", "--seed", "0", "--device", "cpu"]
    zoo.main([*command, "--eval-freq", "32", "--eval-episodes", "4", *arguments, "-params", *SMALL, *params])
    return Path(f"logs/{algo}/{env}_1")


def refusal(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as refused:
        zoo.main(arguments)
    assert isinstance(refused.value.code, str)
    return refused.value.code


@pytest.fixture
def evaluated_states(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hidden states that reach ``predict`` of masked policies."""
    found: list[Any] = []
    policies = {cls for name in MASKED for key, cls in ALGOS[name].policy_aliases.items() if key.startswith("Mlp")}
    for owner in {action_masks._owner_of_predict(policy) for policy in policies}:
        predict = owner.predict

        def noted(policy: Any, observation: Any, state: Any = None, *args: Any, predict: Any = predict, **kwargs: Any):
            found.append(state)
            return predict(policy, observation, state, *args, **kwargs)

        monkeypatch.setattr(owner, "predict", noted)
    return found


@pytest.mark.parametrize("algo", MASKED)
def test_train_evaluate_and_watch(algo: str, evaluated_states: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(algo, "normalize:True", "frame_stack:2", arguments=("--n-eval-envs", "2"))
    evaluations = np.load(run / "evaluations.npz")
    assert (evaluations["results"] == 8).all()  # whole episodes
    zoo.main(["enjoy", "--algo", algo, "--env", "Masked-v0", "-f", "logs", "--no-render", "-n", "20", "--load-best"])
    assert "Mean reward: 8.00" in capsys.readouterr().out
    # Evaluated twice, then watched: each begins without a state.
    assert sum(state is None for state in evaluated_states) == (3 if "lstm" in algo else len(evaluated_states))
    assert len(evaluated_states) > 20


def test_processes() -> None:
    # The patch that finds the method has to reach them.
    train("ppo_mask_ewma", "n_envs:1", BY_NAME, env="Unmasked-v0", arguments=("--vec-env", "subproc"))


@pytest.mark.parametrize(("algo", "n_jobs"), [("ppo_mask", "1"), *((algo, "2") for algo in SOME)])
def test_a_search(algo: str, n_jobs: str) -> None:
    command = ["train", "--algo", algo, "--env", "Masked-v0", "-n", "64", "-optimize", "--n-trials", "2", "--seed", "0"]
    command += ["--n-jobs", n_jobs, "--n-evaluations", "1", "--no-optim-plots", "--eval-episodes", "4", "-f", "logs"]
    command += ["--fix", "n_steps_pow:5", "n_epochs:1", "net_arch:tiny", "--storage", "study.log", "--study-name", "s"]
    zoo.main([*command, "--device", "cpu", "-params", "n_envs:2"])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    assert [trial.value for trial in optuna.load_study(study_name="s", storage=storage).trials] == [8, 8]


@pytest.mark.parametrize("algo", SOME)
def test_record_video(algo: str) -> None:
    pytest.importorskip("moviepy")
    train(algo, arguments=("--eval-freq", "-1"))
    zoo.main(["record_video", "--algo", algo, "--env", "Masked-v0", "-f", "logs", "-o", "videos", "-n", "20"])
    assert list(Path("videos").glob("*.mp4"))


def test_child_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The zoo imports a module of this name in every process.
    (tmp_path / "custom_envs.py").write_text("import tests.masked_envs")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    algo = SOME[-1]
    train(algo, arguments=("--eval-freq", "-1"))
    arguments = ["--log-dir", "logs", "--benchmark-dir", "benchmark", "--no-hub", "--num-threads", "1", "-n", "40"]
    zoo.main(["benchmark", *arguments])
    row = next(line for line in Path("benchmark/benchmark.md").read_text().splitlines() if algo in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:4] == ["8", "0"]


@pytest.mark.parametrize("wrapper", [BY_NAME, FROM_INFO])
def test_masks_of_a_wrapper(wrapper: str) -> None:
    train("ppo_mask", wrapper, env="Unmasked-v0")
    zoo.main(["enjoy", "--algo", "ppo_mask", "--env", "Unmasked-v0", "-f", "logs", "--no-render", "-n", "20"])


@pytest.mark.parametrize("arguments", [[], ["-optimize"], ["--eval-freq", "-1"]])
def test_an_environment_without_masks_is_refused(arguments: list[str]) -> None:
    message = refusal(
        ["train", "--algo", "ppo_mask_ewma", "--env", "CartPole-v1", "-n", "64", "-f", "logs", *arguments]
    )
    assert re.search(r"ppo_mask_ewma needs action masks, and CartPole-v1 has no method action_masks\(\)", message)
    assert MASKER in message
    assert INFO_MASKER in message
    assert not list(Path("logs").glob("*/*"))


def test_an_agent_is_not_watched_without_masks() -> None:
    run = train("ppo_mask", FROM_INFO, env="Unmasked-v0")
    (run / "Unmasked-v0" / "config.yml").unlink()  # names the wrapper
    message = refusal(["enjoy", "--algo", "ppo_mask", "--env", "Unmasked-v0", "-f", "logs", "--no-render"])
    assert "MaskablePPO needs action masks, and the environment has no method action_masks()" in message


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        (BY_NAME.replace("valid_actions", "valid"), "action_mask_fn must name a method .* got 'valid'"),
        (FROM_INFO.replace("'mask'", "'masks'"), "key must name a mask in the information, got 'masks'; there is 'm"),
    ],
)
def test_wrappers_that_find_no_masks(wrapper: str, said: str) -> None:
    command = ["train", "--algo", "ppo_mask", "--env", "Unmasked-v0", "-f", "logs", "-n", "64"]
    assert re.search(said, refusal([*command, "-params", *SMALL, wrapper]))


def test_masks_are_taken_only_where_something_is_evaluated() -> None:
    venv = make_vec_env("Masked-v0", n_envs=2, seed=0)
    model = MaskablePPO("MlpPolicy", venv, device="cpu", seed=0)
    observations = venv.reset()

    def drawn() -> set[int]:
        return {int(action) for _ in range(50) for action in model.predict(observations)[0]}

    valid = {int(action) for mask in venv.env_method("action_masks") for action in np.flatnonzero(mask)}
    assert drawn() > valid  # sb3-contrib's own behaviour
    with action_masks.evaluating(venv):
        assert drawn() <= valid
        # Masks that are passed have priority.
        only = np.eye(masked_envs.N_ACTIONS, dtype=bool)[[3, 3]]
        assert set(model.predict(observations, action_masks=only)[0]) == {3}
    assert drawn() > valid
    # A script forgets its environment when it ends.
    train("ppo_mask", arguments=("--eval-freq", "-1"))
    zoo.main(["enjoy", "--algo", "ppo_mask", "--env", "Masked-v0", "-f", "logs", "--no-render", "-n", "5"])
    assert action_masks._evaluated.get() is None


def test_masks_in_the_information() -> None:
    env = InfoActionMasker(gym.make("Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"))
    with pytest.raises(ValueError, match=r"action_masks\(\) needs reset\(\) first"):
        env.action_masks()
    _, info = env.reset(seed=0)
    for _ in range(5):
        assert env.action_masks().dtype == bool
        assert list(env.action_masks()) == list(info["action_mask"])
        *_, info = env.step(int(np.flatnonzero(env.action_masks())[0]))


@pytest.mark.parametrize("env_id", ["MiniGrid-MemoryS7-v0", "MiniGrid-DoorKey-5x5-v0"])
def test_masked_actions_of_minigrid_have_no_effect(env_id: str) -> None:
    pytest.importorskip("minigrid")
    env = MiniGridActionMasker(gym.make(env_id, max_episode_steps=10**6, max_steps=10**6))
    random, seen = np.random.default_rng(0), np.zeros((7, 2), int)

    def state(grid: Any) -> tuple[Any, ...]:
        carrying = grid.carrying and (grid.carrying.type, grid.carrying.color)
        return grid.grid.encode().tobytes(), tuple(grid.agent_pos), grid.agent_dir, carrying

    env.reset(seed=0)
    for _ in range(150):
        masks = env.action_masks()
        for action in range(7):
            after = copy.deepcopy(env.unwrapped)
            _, reward, terminated, *_ = after.step(action)
            changed = state(after) != state(env.unwrapped) or reward != 0 or terminated
            seen[action, int(changed)] += 1
            assert masks[action] or not changed
        *_, terminated, truncated, _ = env.step(random.choice(np.flatnonzero(masks[:6])))
        if terminated or truncated:
            env.reset()
    assert (seen[:2, 0] == 0).all()  # turning always has an effect
    assert (seen[2] > 0).all()  # going forward sometimes
