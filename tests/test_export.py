"""Exported files act as predict does, alone, or are not written."""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize, VecTransposeImage

import sb3_ppo_ewma
from sb3_ppo_ewma import PPOEWMA, MaskablePPOEWMA, RecurrentPPOEWMA, zoo
from sb3_ppo_ewma.export import ExportError, export_policy

pytestmark = pytest.mark.long

BOX = spaces.Box(-2.0, 2.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
DICT = spaces.Dict(
    {"image": IMAGE, "position": BOX, "kind": spaces.Discrete(3), "flags": spaces.MultiBinary(2), "action_masks": BOX}
)
ACTIONS = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(3),
    "box": spaces.Box(np.array([-0.5, 0.0], np.float32), np.array([0.5, 9.0], np.float32)),
}


class Spaces(gym.Env[Any, Any]):
    """
    Random observations, with masks of which one value of every action is always valid.

    :param observation_space: space of the observations
    :param action_space: space of the actions
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action.astype(self.action_space.dtype))
        self._steps += 1
        return self.observation_space.sample(), 1.0, self._steps == 7, False, {}

    def action_masks(self) -> np.ndarray:
        space: Any = self.action_space
        sizes = {spaces.Discrete: lambda: [space.n], spaces.MultiDiscrete: lambda: space.nvec}
        masks = []
        for size in sizes.get(type(space), lambda: [2] * space.n)():
            mask = self.np_random.random(size) < 0.5
            mask[self.np_random.integers(size)] = True
            masks.append(mask)
        return np.concatenate(masks)


def environment(
    observation_space: spaces.Space[Any] = BOX, action_space: spaces.Space[Any] = ACTIONS["box"], n_envs: int = 3
) -> VecEnv:
    env = make_vec_env(lambda: Spaces(observation_space, action_space), n_envs=n_envs)
    env.seed(0)
    return env


def built(cls: Any, env: VecEnv, policy: Any = "MlpPolicy", **policy_kwargs: Any) -> Any:
    """An agent that is not trained, but whose actions depend on its observations."""
    small = {"lstm_hidden_size": 8} if "Lstm" in str(policy) else {}
    model = cls(policy, env, n_steps=8, device="cpu", seed=0, policy_kwargs={**small, **policy_kwargs})
    with th.no_grad():
        for name, parameter in model.policy.named_parameters():
            if name.startswith(("action_net", "log_std")):
                parameter.add_(th.randn_like(parameter))
    return model


def opened(path: Path) -> Any:
    """The file as a function of named inputs to named outputs."""
    if path.suffix == ".pt2":
        program = th.export.load(path).module()
        return lambda **inputs: {
            name: each.numpy() for name, each in program({k: th.as_tensor(v) for k, v in inputs.items()}).items()
        }
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda **inputs: dict(zip(names, session.run(names, inputs), strict=True))


FAMILIES = {
    "PPOEWMA": "MlpPolicy",
    "PPG": "MlpPolicy",
    "PPGEWMA": "MlpPolicy",
    "RecurrentPPOEWMA": "MlpLstmPolicy",
    "RecurrentPPG": "MlpLstmPolicy",
    "RecurrentPPGEWMA": "MlpLstmPolicy",
    "MaskablePPOEWMA": "MlpPolicy",
    "MaskablePPG": "MlpPolicy",
    "MaskablePPGEWMA": "MlpPolicy",
    "MaskableRecurrentPPOEWMA": "MlpLstmPolicy",
    "MaskableRecurrentPPG": "MlpLstmPolicy",
    "MaskableRecurrentPPGEWMA": "MlpLstmPolicy",
    "PPO": "MlpPolicy",
    "A2C": "MlpPolicy",
    "RecurrentPPO": "MlpLstmPolicy",
    "MaskablePPO": "MlpPolicy",
    "TRPO": "MlpPolicy",
}


SAMPLE = ("PPOEWMA", "RecurrentPPG", "MaskablePPGEWMA", "MaskableRecurrentPPGEWMA", "PPO")


def algorithm(name: str) -> Any:
    return next(getattr(m, name) for m in (sb3_ppo_ewma, stable_baselines3, sb3_contrib) if hasattr(m, name))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in FAMILIES]
)
def test_families(family: str, tmp_path: Path) -> None:
    env = environment(action_space=ACTIONS["discrete"])
    model = built(algorithm(family), env, FAMILIES[family])
    proof = export_policy(model, tmp_path / "agent.pt2", env, n_observations=60)
    assert proof.n_observations >= 60
    assert proof.differences["action"] == 0
    assert proof.n_ties == 0
    states = {"next_hidden_state", "next_cell_state"} if "Recurrent" in family else set()
    assert set(proof.differences) == {"action"} | states


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize(
    ("family", "actions"),
    [("PPOEWMA", actions) for actions in ACTIONS]
    + [("MaskablePPOEWMA", "discrete"), ("MaskablePPOEWMA", "multi_binary")]
    + [("MaskableRecurrentPPOEWMA", "discrete"), ("MaskableRecurrentPPOEWMA", "multi_discrete")],
)
def test_action_spaces(family: str, actions: str, deterministic: bool, tmp_path: Path) -> None:
    env = environment(action_space=ACTIONS[actions])
    model = built(algorithm(family), env, FAMILIES[family])
    proof = export_policy(model, tmp_path / "agent.onnx", env, deterministic=deterministic, n_observations=60)
    assert proof.differences["action"] <= (1e-5 if actions == "box" else 0)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_normalization_scaling_and_any_number_of_observations(suffix: str, tmp_path: Path) -> None:
    env = VecNormalize(environment(spaces.Box(-np.inf, np.inf, (3,), np.float64)), clip_obs=1.5, epsilon=1e-3)
    model = built(PPOEWMA, env)
    env.obs_rms.mean, env.obs_rms.var = np.array([100.0, -1.0, 0.0]), np.array([4.0, 1e-6, 1.0])  # type: ignore[union-attr]
    path = tmp_path / f"agent.{suffix}"
    export_policy(model, path, env, n_observations=30)
    act = opened(path)
    for n in (1, 2, 17):
        raw = np.random.default_rng(n).normal([100.0, -1.0, 0.0], [2.0, 1e-3, 1.0], (n, 3))
        expected, _ = model.predict(env.normalize_obs(raw), deterministic=True)
        assert np.isin(expected, [-0.5, 0.0, 0.5, 9.0]).any()  # some are clipped
        np.testing.assert_allclose(act(observation=raw)["action"], expected, atol=1e-5)


def test_gsde_acts_deterministically_only(tmp_path: Path) -> None:
    env = environment(action_space=spaces.Box(np.array([-3.0, 10.0]), np.array([-1.0, 30.0]), dtype=np.float64))
    for squash_output in (True, False):
        model = PPOEWMA("MlpPolicy", env, use_sde=True, n_steps=8, policy_kwargs={"squash_output": squash_output})
        proof = export_policy(model, tmp_path / "agent.onnx", env, n_observations=30)
        assert proof.differences["action"] <= 1e-5
        with pytest.raises(ExportError, match="random actions cannot be exported with gSDE"):
            export_policy(model, tmp_path / "agent.onnx", deterministic=False)


@pytest.mark.parametrize(("policy", "suffix"), [("CnnPolicy", "pt2"), ("CnnPolicy", "onnx"), ("ImpalaPolicy", "onnx")])
def test_images_come_as_the_environment_returns_them(policy: str, suffix: str, tmp_path: Path) -> None:
    env = environment(IMAGE, ACTIONS["discrete"])
    model = built(PPOEWMA, env, policy)  # which wraps the environment into VecTransposeImage
    path = tmp_path / f"agent.{suffix}"
    for given in (env, model.get_env(), None) if suffix == "pt2" else (env,):
        export_policy(model, path, given, n_observations=9)
        raw = np.stack([IMAGE.sample() for _ in range(4)])
        expected, _ = model.predict(VecTransposeImage.transpose_image(raw), deterministic=True)
        np.testing.assert_array_equal(opened(path)(observation=raw)["action"], expected)


def test_stacked_frames(tmp_path: Path) -> None:
    env = VecFrameStack(environment(IMAGE, ACTIONS["discrete"]), 2)
    model = built(PPOEWMA, env, "CnnPolicy")
    export_policy(model, tmp_path / "agent.onnx", env, n_observations=9)
    raw = np.zeros((1, 36, 40, 6), np.uint8)
    assert opened(tmp_path / "agent.onnx")(observation=raw)["action"].shape == (1,)


def test_normalization_inside_a_stack_is_refused(tmp_path: Path) -> None:
    env = VecFrameStack(VecNormalize(environment()), 2)
    model = built(PPOEWMA, env)
    with pytest.raises(ExportError, match="normalises observations inside VecFrameStack"):
        export_policy(model, tmp_path / "agent.onnx", env)
    env = VecFrameStack(VecNormalize(environment(), norm_obs=False), 2)
    assert export_policy(model, tmp_path / "agent.onnx", env, n_observations=9).differences["action"] <= 1e-5
    env = VecNormalize(VecFrameStack(environment(), 2))
    assert export_policy(model, tmp_path / "agent.onnx", env, n_observations=9).differences["action"] <= 1e-5


@pytest.mark.parametrize(
    ("name", "policy", "suffix"),
    [("PPOEWMA", "MultiInputPolicy", "onnx"), ("RecurrentPPG", "MultiInputLstmPolicy", "pt2")],
)
def test_dictionaries(name: str, policy: str, suffix: str, tmp_path: Path) -> None:
    env = VecNormalize(environment(DICT), norm_obs_keys=["position"])
    env.obs_rms["position"].mean[:] = 1.0  # type: ignore[index]
    model = built(algorithm(name), env, policy)
    path = tmp_path / f"agent.{suffix}"
    export_policy(model, path, env, n_observations=9)
    metadata = metadata_of(path)
    names = {f"observation.{key}" for key in DICT.spaces}
    states = {"hidden_state", "cell_state", "episode_start"} if "Lstm" in policy else set()
    assert set(json.loads(metadata["inputs"])) == names | states
    assert json.loads(metadata["inputs"])["observation.image"]["shape"] == ["batch", 36, 40, 3]


@pytest.mark.parametrize("observations", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)])
def test_discrete_observations(observations: spaces.Space[Any], tmp_path: Path) -> None:
    env = environment(observations, ACTIONS["discrete"])
    export_policy(built(PPOEWMA, env), tmp_path / "agent.onnx", env, n_observations=30)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_states_of_an_lstm_over_episodes(suffix: str, tmp_path: Path) -> None:
    env = environment()
    model = built(RecurrentPPOEWMA, env, "MlpLstmPolicy", n_lstm_layers=2)
    path = tmp_path / f"agent.{suffix}"
    export_policy(model, path, env, n_observations=9)
    act, state = opened(path), None
    own = {name: np.zeros((2, 3, 8), np.float32) for name in ("hidden_state", "cell_state")}
    observations, starts = env.reset(), np.ones(3, dtype=bool)
    for _ in range(20):  # episodes have 7 steps
        action, state = model.predict(observations, state, starts, deterministic=True)
        outputs = act(observation=observations, **own, episode_start=starts)
        own = {name: outputs[f"next_{name}"] for name in own}
        np.testing.assert_allclose(outputs["action"], action, atol=1e-5)
        np.testing.assert_allclose(own["cell_state"], state[1], atol=1e-5)
        observations, _, starts, _ = env.step(action)


def test_masked_actions_never_occur(tmp_path: Path) -> None:
    env = environment(action_space=ACTIONS["discrete"])
    export_policy(built(MaskablePPOEWMA, env), tmp_path / "agent.onnx", env, deterministic=False, n_observations=9)
    generator, act = np.random.default_rng(0), opened(tmp_path / "agent.onnx")
    actions = act(
        observation=generator.normal(size=(500, 3)).astype(np.float32),
        action_masks=np.tile([False, True, False, True], (500, 1)),
        noise=generator.standard_exponential((500, 4), dtype=np.float32),
    )["action"]
    assert set(actions) == {1, 3}


def test_random_actions_have_the_policys_probabilities(tmp_path: Path) -> None:
    model = built(PPOEWMA, environment(action_space=ACTIONS["discrete"]))
    export_policy(model, tmp_path / "agent.onnx", deterministic=False, n_observations=9)
    generator, observation = np.random.default_rng(0), np.ones((1, 3), np.float32)
    noise = generator.standard_exponential((20_000, 4), dtype=np.float32)
    actions = opened(tmp_path / "agent.onnx")(observation=observation.repeat(20_000, axis=0), noise=noise)["action"]
    with th.no_grad():
        probabilities = model.policy.get_distribution(th.as_tensor(observation)).distribution.probs[0].numpy()
    np.testing.assert_allclose(np.bincount(actions, minlength=4) / 20_000, probabilities, atol=0.015)


def metadata_of(path: Path) -> dict[str, str]:
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        th.export.load(path, extra_files=extra)
        loaded: dict[str, str] = json.loads(extra["metadata.json"])
        return loaded
    metadata: dict[str, str] = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return metadata


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_metadata(suffix: str, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2)
    path = tmp_path / f"agent.{suffix}"
    export_policy(built(PPOEWMA, env), path, env, deterministic=False, n_observations=4)
    metadata = metadata_of(path)
    expected = {"algorithm": "PPOEWMA", "policy": "ActorCriticPolicy", "env_id": "CartPole-v1"}
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["action_space"] == "Discrete(2)"
    assert metadata["deterministic"] == "false"
    assert json.loads(metadata["versions"])["torch"] == th.__version__
    inputs = json.loads(metadata["inputs"])
    assert inputs["observation"]["shape"] == ["batch", 4]
    if suffix == "onnx":
        assert [each.shape for each in onnxruntime.InferenceSession(path).get_inputs()] == [["batch", 4], ["batch", 2]]
    assert inputs["noise"] == {
        "dtype": "float32",
        "shape": ["batch", 2],
        "meaning": "random numbers, independent: exponential with scale 1",
    }
    assert json.loads(metadata["outputs"])["action"]["dtype"] == "int64"


# === Without an environment ===


def test_statistics_of_the_training_environment_are_taken(tmp_path: Path) -> None:
    env = VecNormalize(environment())
    model = built(PPOEWMA, env)
    env.obs_rms.mean[:] = 1.0  # type: ignore[union-attr]
    env.save(str(tmp_path / "vecnormalize.pkl"))
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    expected, _ = model.predict(env.normalize_obs(raw), deterministic=True)
    export_policy(model, tmp_path / "own.onnx", n_observations=30)
    np.testing.assert_allclose(opened(tmp_path / "own.onnx")(observation=raw)["action"], expected, atol=1e-5)
    model.save(tmp_path / "agent.zip")
    loaded = PPOEWMA.load(tmp_path / "agent.zip", device="cpu")
    for i, given in enumerate((env, tmp_path / "vecnormalize.pkl")):
        export_policy(loaded, tmp_path / f"{i}.onnx", vec_normalize=given, n_observations=30)
        np.testing.assert_allclose(opened(tmp_path / f"{i}.onnx")(observation=raw)["action"], expected, atol=1e-5)
    export_policy(loaded, tmp_path / "raw.onnx", n_observations=30)
    assert np.abs(opened(tmp_path / "raw.onnx")(observation=raw)["action"] - expected).max() > 0.01
    for name, meaning in (
        ("own", "before VecNormalize"),
        ("0", "before VecNormalize"),
        ("raw", "as predict takes them"),
    ):
        inputs = json.loads(metadata_of(tmp_path / f"{name}.onnx")["inputs"])
        assert inputs["observation"]["meaning"] == f"observations {meaning}"


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    env = VecNormalize(environment())
    model = built(PPOEWMA, env).learn(24)
    before = (th.get_rng_state(), model.policy.parameters_to_vector(), env.obs_rms.mean.copy(), env.training)  # type: ignore[union-attr]
    export_policy(model, tmp_path / "agent.onnx", deterministic=False, n_observations=9)
    after = (th.get_rng_state(), model.policy.parameters_to_vector(), env.obs_rms.mean, env.training)  # type: ignore[union-attr]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    model.learn(24, reset_num_timesteps=False)


# === What is refused ===


class NumpyExtractor(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.as_tensor(np.asarray(observations.detach())) + 1.0


class DecidesOtherwise(ActorCriticPolicy):
    """Acts by another method than the one that is exported."""

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return super()._predict(observation, deterministic) * 0.999


def test_policies_that_cannot_be_traced_are_named(tmp_path: Path) -> None:
    model = built(PPOEWMA, environment(), features_extractor_class=NumpyExtractor)
    with pytest.raises(ExportError, match="ActorCriticPolicy cannot be exported"):
        export_policy(model, tmp_path / "agent.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_file_that_acts_otherwise_is_not_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"agent.{suffix}"
    path.write_text("an older file")
    with pytest.raises(ExportError, match=r"would not act as predict: action differs by"):
        export_policy(built(PPOEWMA, environment(), DecidesOtherwise), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "an older file"


def test_other_discrete_actions_are_refused_unless_equally_likely(tmp_path: Path) -> None:
    env = environment(action_space=spaces.Discrete(2))
    model = built(PPOEWMA, env)
    policy = model.policy
    predict = type(policy)._predict
    policy._predict = lambda observation, deterministic=False: 1 - predict(policy, observation, deterministic)
    with pytest.raises(ExportError, match="action differs in 3 of 3 observations"):
        export_policy(model, tmp_path / "agent.onnx", env)
    with th.no_grad():
        policy.action_net.weight.zero_()
        policy.action_net.bias.zero_()
    proof = export_policy(model, tmp_path / "agent.onnx", env, n_observations=9)
    assert proof.n_ties == 12  # every observation, and the first of each three once more
    assert "12 with another, equally likely action" in str(proof)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "agent.zip"}, "path must end in .onnx or .pt2, got"),
        ({"path": "missing/agent.onnx"}, "path must be in a folder that exists"),
        ({"n_observations": 0}, "n_observations must be"),
        ({"env": environment(), "vec_normalize": "vecnormalize.pkl"}, "vec_normalize must be None where env is given"),
        (
            {"vec_normalize": VecNormalize(environment(spaces.Box(-1.0, 1.0, (5,))))},
            "must be for the model's observations",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / arguments.pop("path", "agent.onnx")
    with pytest.raises(ValueError, match=message):
        export_policy(built(PPOEWMA, environment()), path, **arguments)


def test_other_algorithms_and_environments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.onnx"
    sac: Any = SAC("MlpPolicy", "Pendulum-v1", buffer_size=1)
    with pytest.raises(ValueError, match="model must be an on-policy algorithm, such as PPO, got SAC"):
        export_policy(sac, path)
    model = built(PPO, environment())
    single: Any = gym.make("Pendulum-v1")
    with pytest.raises(TypeError, match="env must be a VecEnv"):
        export_policy(model, path, single)
    masked = built(MaskablePPOEWMA, environment(action_space=ACTIONS["discrete"]))
    with pytest.raises(ValueError, match="env must be for the model's observations"):
        export_policy(masked, path, DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    unmasked = gym.wrappers.TransformObservation(gym.make("CartPole-v1"), lambda each: each[:3], BOX)
    with pytest.raises(ValueError, match="env must have a method action_masks"):
        export_policy(masked, path, DummyVecEnv([lambda: unmasked]))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    model = built(PPOEWMA, environment())
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'sb3-ppo-ewma\[export\]'"):
        export_policy(model, tmp_path / "agent.onnx")
    export_policy(model, tmp_path / "agent.pt2", n_observations=9)


# === The command ===


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A normalising agent of Pendulum with a best model and checkpoints, and a recurrent one."""
    folder = tmp_path_factory.mktemp("logs")
    short = ["-n", "64", "--eval-freq", "32", "--eval-episodes", "1", "--save-freq", "32", "-f", str(folder)]
    small = ["-params", "n_envs:1", "n_steps:32", "batch_size:16", "n_epochs:1"]
    for algo, env_id in (("ppo_ewma", "Pendulum-v1"), ("ppo_lstm_ewma", "CartPoleNoVel-v1")):
        zoo.main(
            [
                "train",
                "--algo",
                algo,
                "--env",
                env_id,
                *short,
                *small,
                "normalize:True",
                *(["use_sde:False"] if env_id == "Pendulum-v1" else []),
            ]
        )
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "agent.onnx"),
        ("-o", "agent.pt2", "--stochastic"),
        ("-o", "agent.onnx", "--load-best"),
        ("-o", "agent.onnx", "--load-checkpoint", "32", "--n-envs", "1"),
        ("-o", "agent.onnx", "--load-last-checkpoint", "--exp-id", "1"),
    ],
    ids=" ".join,
)
def test_command(options: tuple[str, ...], logs: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["export", "--algo", "ppo_ewma", "--env", "Pendulum-v1", "-f", str(logs), "-n", "40"]
    zoo.main([*common, *options])
    out, err = capfd.readouterr()
    assert f"{options[1]}: largest difference to predict on 40 observations: action " in out.splitlines()[-1]
    assert err == ""
    assert metadata_of(Path(options[1]))["env_id"] == "Pendulum-v1"


def test_command_exports_an_lstm(logs: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "agent.onnx"
    common = ["export", "--algo", "ppo_lstm_ewma", "--env", "CartPoleNoVel-v1", "-f", str(logs), "-n", "40"]
    zoo.main([*common, "-o", str(path)])
    assert "action 0, next_hidden_state " in capsys.readouterr().out


def test_command_fails_where_the_file_would_act_otherwise(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = ActorCriticPolicy._predict
    monkeypatch.setattr(ActorCriticPolicy, "_predict", lambda *args, **kwargs: predict(*args, **kwargs) + 0.1)
    path = tmp_path / "agent.onnx"
    with pytest.raises(SystemExit) as finished:
        zoo.main(["export", "--algo", "ppo_ewma", "--env", "Pendulum-v1", "-f", str(logs), "-o", str(path)])
    assert "sb3-ppo-ewma export: the file would not act as predict: action differs by" in str(finished.value.code)
    assert not path.exists()
