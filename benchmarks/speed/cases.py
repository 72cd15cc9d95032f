"""What is measured: cases (an environment with hyper-parameters) and entries (an implementation)."""

import importlib.util
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SEED = 0


@dataclass(frozen=True)
class Case:
    """
    An environment with hyper-parameters, which all entries share.

    :param title: for the report
    :param env: id of the environment; ``"RandomFrames"`` is the one of benchmarks/memory.py, frames of 64x64x3 bytes
        from a pool, which cost almost nothing
    :param n_envs: number of environments
    :param ppo: hyper-parameters, as JSON can have them: ``"lin_0.1"`` falls linearly to 0, as in rl-zoo3
    :param n_iterations: length of a chunk, the unit of measurement; a multiple of the length of a phase
    :param phase: arguments of PPG. How long a phase is hardly changes what it costs per step, since it passes over
        every sample ``n_aux_epochs`` times
    :param policy: name of the policy
    :param policy_kwargs: of the policy, with names in place of classes
    :param atari: AtariWrapper and four stacked frames
    :param normalize: normalise observations and rewards
    :param packages: modules that it needs
    :param algorithms: by entry, the class that takes the place of its own. Entries that are not there are left out;
        empty: all have their own
    """

    title: str
    env: str
    n_envs: int
    ppo: dict[str, Any]
    n_iterations: int
    phase: dict[str, Any]
    policy: str = "MlpPolicy"
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    atari: bool = False
    normalize: bool = False
    packages: tuple[str, ...] = ()
    algorithms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """
    An implementation.

    :param name: for the report
    :param algorithm: module and class
    :param kwargs: beside the hyper-parameters of the case
    :param has_phases: whether it is one of the phasic algorithms
    :param packages: modules that it needs
    :param only_in: the cases that it can run, empty: all
    :param why: it can run no others, if that is to be told
    """

    name: str
    algorithm: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_phases: bool = False
    packages: tuple[str, ...] = ()
    only_in: tuple[str, ...] = ()
    why: str = ""

    @property
    def is_compiled(self) -> bool:
        return bool(self.kwargs.get("torch_compile"))


_LSTM_ONLY = "benchmarks.speed.lstm_only.LstmOnly"

CASES = {
    "cartpole": Case(
        "CartPole-v1, SB3's defaults with 8 environments",
        "CartPole-v1",
        n_envs=8,
        ppo={"n_steps": 256, "batch_size": 64, "n_epochs": 10},
        n_iterations=4,
        phase={"n_policy_iterations": 4},
    ),
    "cartpole_one_epoch": Case(
        "the same with one policy epoch, as in PPG's paper",
        "CartPole-v1",
        n_envs=8,
        ppo={"n_steps": 256, "batch_size": 64, "n_epochs": 1},
        n_iterations=8,
        phase={"n_policy_iterations": 8},
    ),
    "cartpole_zoo": Case(
        "CartPole-v1, rl-zoo3's settings",
        "CartPole-v1",
        n_envs=8,
        ppo={
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 20,
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "ent_coef": 0.0,
            "learning_rate": "lin_0.001",
            "clip_range": "lin_0.2",
        },
        n_iterations=40,
        phase={"n_policy_iterations": 4},
    ),
    "halfcheetah": Case(
        "HalfCheetah-v5, rl-zoo3's settings of HalfCheetah-v4",
        "HalfCheetah-v5",
        n_envs=1,
        ppo={
            "n_steps": 512,
            "batch_size": 64,
            "n_epochs": 20,
            "gamma": 0.98,
            "gae_lambda": 0.92,
            "ent_coef": 0.000401762,
            "vf_coef": 0.58096,
            "max_grad_norm": 0.8,
            "learning_rate": 2.0633e-05,
            "clip_range": 0.1,
        },
        n_iterations=4,
        phase={"n_policy_iterations": 4},
        policy_kwargs={
            "log_std_init": -2,
            "ortho_init": False,
            "activation_fn": "ReLU",
            "net_arch": {"pi": [256, 256], "vf": [256, 256]},
        },
        normalize=True,
        packages=("mujoco",),
    ),
    "breakout": Case(
        "Breakout, rl-zoo3's settings of Atari games",
        "BreakoutNoFrameskip-v4",
        n_envs=8,
        ppo={
            "n_steps": 128,
            "batch_size": 256,
            "n_epochs": 4,
            "ent_coef": 0.01,
            "vf_coef": 0.5,
            "learning_rate": "lin_2.5e-4",
            "clip_range": "lin_0.1",
        },
        n_iterations=2,
        phase={"n_policy_iterations": 2},
        policy="CnnPolicy",
        atari=True,
        packages=("ale_py", "cv2"),
    ),
    "impala": Case(
        "Random frames of 64×64×3, IMPALA's network",
        "RandomFrames",
        n_envs=16,
        ppo={"n_steps": 64, "batch_size": 256, "n_epochs": 3},
        n_iterations=1,
        phase={"n_policy_iterations": 1},
        policy="CnnPolicy",
        policy_kwargs={"features_extractor_class": "ImpalaCNN", "ortho_init": False, "net_arch": []},
    ),
    "cartpole_lstm": Case(
        "CartPole-v1 with LSTMs",
        "CartPole-v1",
        n_envs=8,
        ppo={"n_steps": 128, "batch_size": 256, "n_epochs": 4},
        n_iterations=2,
        phase={"n_policy_iterations": 2},
        policy="MlpLstmPolicy",
        policy_kwargs={"lstm_hidden_size": 256},
        packages=("sb3_contrib",),
        algorithms={
            "sb3": "sb3_contrib.RecurrentPPO",
            "lstm_only": _LSTM_ONLY,
            "ppo_ewma_none": "sb3_ppo_ewma.RecurrentPPOEWMA",
            "ppo_ewma": "sb3_ppo_ewma.RecurrentPPOEWMA",
            "ppg": "sb3_ppo_ewma.RecurrentPPG",
            "ppg_ewma": "sb3_ppo_ewma.RecurrentPPGEWMA",
        },
    ),
}

_PPO_EWMA, _PPG, _PPG_EWMA = (f"sb3_ppo_ewma.{name}" for name in ("PPOEWMA", "PPG", "PPGEWMA"))
_COMPILED = {"torch_compile": True}

# In the order of tables and plots
ENTRIES = {
    "sb3": Entry("PPO of SB3", "stable_baselines3.PPO"),
    "sbx": Entry(
        "PPO of SBX",
        "sbx.PPO",
        packages=("sbx",),
        only_in=("cartpole", "cartpole_one_epoch", "cartpole_zoo", "halfcheetah", "breakout"),
        why="SBX does not have the network",
    ),
    "torchrl": Entry(
        "PPO-EWMA's update in TorchRL",
        "benchmarks.speed.torchrl_update.TorchRLUpdate",
        packages=("torchrl",),
        only_in=("cartpole",),
    ),
    "lstm_only": Entry("forward and backward passes of the LSTMs alone", _LSTM_ONLY, only_in=("cartpole_lstm",)),
    "ppo_ewma_none": Entry("PPOEWMA, prox_decay=None", _PPO_EWMA, {"prox_decay": None}),
    "ppo_ewma": Entry("PPOEWMA", _PPO_EWMA),
    "ppo_ewma_compiled": Entry("PPOEWMA, compiled", _PPO_EWMA, _COMPILED),
    "ppg": Entry("PPG", _PPG, has_phases=True),
    "ppg_compiled": Entry("PPG, compiled", _PPG, _COMPILED, has_phases=True),
    "ppg_ewma": Entry("PPGEWMA", _PPG_EWMA, has_phases=True),
    "ppg_ewma_compiled": Entry("PPGEWMA, compiled", _PPG_EWMA, _COMPILED, has_phases=True),
}


def quick(case: Case) -> Case:
    """
    :param case: a case
    :return: the same so small that it only shows that everything runs
    """
    sizes = {"n_steps": 16, "batch_size": 16, "n_epochs": 2}
    phase = {"n_policy_iterations": 2, "n_aux_epochs": 1, "aux_batch_size": 16}
    return replace(case, n_envs=2, n_iterations=2, ppo={**case.ppo, **sizes}, phase=phase)


def case_settings(case: Case) -> dict[str, Any]:
    """
    :param case: a case
    :return: all that its speed depends on, as JSON can have it
    """
    others = ("title", "packages", "phase", "algorithms")
    return {**{name: value for name, value in asdict(case).items() if name not in others}, "seed": SEED}


def entry_settings(case: Case, name: str) -> dict[str, Any]:
    """
    :param case: a case
    :param name: of an entry
    :return: what it has beside the settings of the case
    """
    entry = ENTRIES[name]
    phase = case.phase if entry.has_phases else {}
    return {"algorithm": case.algorithms.get(name, entry.algorithm), "kwargs": {**entry.kwargs, **phase}}


def missing(packages: tuple[str, ...]) -> list[str]:
    """
    :param packages: modules
    :return: those that are not installed
    """
    return [package for package in packages if importlib.util.find_spec(package) is None]
