"""
Files that are loaded: bits flipped, cut off, of other runs, with numbers that cannot be, and pickles that want to run
something. A load that is refused must name the file; one that is not must give what was saved.
"""

import base64
import io
import json
import math
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.faults.outcome import Outcome
from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, RecurrentPPG, RecurrentPPGEWMA, RecurrentPPOEWMA

QUICK: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "gamma": 0.99}
SMALL = {"net_arch": [4]}
N_ROLLOUTS = 3
OWN_MEMBER = "sb3_ppo_ewma_states.pt"
# Of 1000 trials
SHARES = {
    "kept rollouts: a bit flipped": 500,
    "kept rollouts: cut off": 60,
    "kept rollouts: of another run": 50,
    "saved model: a bit flipped": 90,
    "saved model: cut off": 40,
    "saved model: a number that cannot be": 110,
    "saved model: a broken optimiser": 80,
    "saved model: a hostile pickle": 70,
}


class Touch:
    """
    Touches a file when it is unpickled.

    :param path: of the file
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


class OtherTask(gym.Wrapper[Any, Any, Any, Any]):
    """The same spaces, other rewards."""

    def step(self, action: Any) -> Any:
        observation, reward, *ends = self.env.step(action)
        return observation, 2 * float(reward), *ends


def cart_pole() -> gym.Env[Any, Any]:
    """
    :return: the task
    """
    return gym.make("CartPole-v1")


def other_task() -> gym.Env[Any, Any]:
    """
    :return: another one
    """
    return OtherTask(cart_pole())


STALE: dict[str, Any] = {"policy_kwargs": SMALL, "staleness": 2}
PHASES: dict[str, Any] = {"policy_kwargs": SMALL, "n_policy_iterations": 9, "n_aux_epochs": 1, "n_epochs_value": 2}
LSTM = {"policy_kwargs": {"lstm_hidden_size": 4, **SMALL}}
# By name: class, policy, arguments
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "stale": (PPOEWMA, "MlpPolicy", {**STALE, "advantage_decay": 0.5}),
    "phases": (PPGEWMA, "MlpPolicy", PHASES),
    "recurrent": (RecurrentPPOEWMA, "MlpLstmPolicy", {**STALE, **LSTM}),
    "recurrent phases": (RecurrentPPG, "MlpLstmPolicy", {**PHASES, **LSTM}),
}
# Algorithms that keep the same rollouts
OTHER_ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stale": (PPGEWMA, {"n_aux_epochs": 0}),
    "phases": (PPG, {}),
    "recurrent": (RecurrentPPG, {"n_aux_epochs": 0}),
    "recurrent phases": (RecurrentPPGEWMA, {}),
}
# What tells another run from the first one
OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "task": {"env": other_task},
    "network": {"policy_kwargs": {"net_arch": [5]}},
    "gamma": {"gamma": 0.9},
    "gae_lambda": {"gae_lambda": 0.5},
    "learning rate": {"learning_rate": 1e-2},
    "n_steps and n_envs": {"n_steps": 8, "n_envs": 2, "batch_size": 8},
    "algorithm": {},
    "gamma given to load": {},
    "seed after a common beginning": {},
}


def make(kind: str, cls: Any = None, **changes: Any) -> Any:
    """
    :param kind: name in ``KINDS``
    :param cls: another class
    :param changes: of its arguments, and ``env``, ``n_envs``
    :return: a new model
    """
    own, policy, kwargs = KINDS[kind]
    given = {"seed": 0, **QUICK, **kwargs, **changes}
    given["policy_kwargs"] = {**kwargs["policy_kwargs"], **given["policy_kwargs"]}
    env, n_envs = given.pop("env", cart_pole), given.pop("n_envs", 1)
    return (cls or own)(policy, DummyVecEnv([env] * n_envs), **given)


def leaves(value: Any) -> Iterator[np.ndarray]:
    """
    :param value: containers
    :return: the tensors, arrays and numbers in them, as arrays
    """
    if isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, th.Tensor | np.ndarray | int | float):
        yield np.asarray(value)


def same(first: Any, second: Any) -> bool:
    """
    :param first: containers of tensors, arrays and numbers
    :param second: others
    :return: whether they are the same, to the bit
    """
    pairs = [list(leaves(first)), list(leaves(second))]
    return len(pairs[0]) == len(pairs[1]) and all(map(np.array_equal, *pairs))


def kept(model: Any) -> dict[str, Any]:
    """
    :param model: whose kept rollouts are wanted
    :return: their arrays
    """
    return {name: list(part.pieces()) for name, part in model.replay_buffer.items()}


def judge(kind: str, detail: str, name: str, load: Callable[[], Any], is_right: Callable[[Any], bool]) -> Outcome:
    """
    :param kind: of the fault
    :param detail: the case
    :param name: of the file
    :param load: what is tried
    :param is_right: whether the result is what was saved
    :return: what became of it
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = load()
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        return Outcome(
            kind, "refused" if name in str(error) else "unclear", f"{detail}: {type(error).__name__}: {error}"
        )
    except Exception as error:
        return Outcome(kind, "unclear", f"{detail}: {type(error).__name__}: {error}")
    return Outcome(kind, "recovered" if is_right(result) else "silent", detail)


class Saved:
    """
    A trained model and its files.

    :param kind: name in ``KINDS``
    :param folder: where to write
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.model = make(kind).learn(N_ROLLOUTS * QUICK["n_steps"])
        self.zip, self.rollouts = folder / f"{kind}.zip", folder / f"{kind}.pkl"
        self.model.save(self.zip)
        self.model.save_replay_buffer(self.rollouts)
        self.parameters = deepcopy(self.model.get_parameters())
        self.loaded = KINDS[kind][0].load(self.zip, device="cpu")

    def load(self, path: Path, **kwargs: Any) -> Any:
        """
        :param path: of a saved model
        :param kwargs: of ``load``
        :return: the model
        """
        return KINDS[self.kind][0].load(path, device="cpu", **kwargs)

    def load_parameters(self, path: Path, **kwargs: Any) -> Any:
        """
        :param path: of a saved model
        :param kwargs: of ``load``
        :return: the parameters and states of the model
        """
        return self.load(path, **kwargs).get_parameters()

    def load_rollouts(self, path: Path) -> Any:
        """
        :param path: of kept rollouts
        :return: their arrays, as a model that was loaded from the right file reads them
        """
        self.loaded.load_replay_buffer(path)
        return kept(self.loaded)


def flipped(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    """
    :param content: of a file
    :param generator: of random numbers
    :return: the content with one bit changed, and which
    """
    changed, place, bit = bytearray(content), generator.randrange(len(content)), generator.randrange(8)
    changed[place] ^= 1 << bit
    return bytes(changed), f"byte {place}, bit {bit}"


def cut(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    """
    :param content: of a file
    :param generator: of random numbers
    :return: its beginning, and how long that is
    """
    length = generator.randrange(len(content))
    return content[:length], f"{length} of {len(content)} bytes"


def damaged_rollouts(
    kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path
) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes
    """
    outcomes, path = [], folder / "damaged.pkl"
    for trial in range(n):
        saved = all_saved[trial % len(all_saved)]
        content, detail = (flipped if "flipped" in kind else cut)(saved.rollouts.read_bytes(), generator)
        path.write_bytes(content)
        expected = kept(saved.model)
        outcomes.append(
            judge(
                kind,
                f"{saved.kind}, {detail}",
                path.name,
                partial(saved.load_rollouts, path),
                partial(same, expected),
            )
        )
    return outcomes


def other_runs(kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes: each file of kept rollouts is of another run, at the same step
    """
    outcomes: list[Outcome] = []
    cases = [(saved, name) for name in OTHERS for saved in all_saved]
    path, n_steps = folder / "other.pkl", N_ROLLOUTS * QUICK["n_steps"]
    for trial in range(n):
        saved, name = cases[trial % len(cases)]
        target = saved.loaded
        if name == "seed after a common beginning":
            other, target = (saved.load(saved.zip, env=cart_pole(), seed=trial + i) for i in range(2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they begin without kept rollouts
                for each in (other, target):
                    each.learn(n_steps, reset_num_timesteps=False)
        elif name == "gamma given to load":
            other, target = saved.model, saved.load(saved.zip, gamma=0.9)
        elif name == "algorithm":
            cls, changes = OTHER_ALGORITHMS[saved.kind]
            other = make(saved.kind, cls, **changes).learn(n_steps)
        else:
            other = make(saved.kind, **OTHERS[name]).learn(n_steps)
        other.save_replay_buffer(path)
        load = partial(target.load_replay_buffer, path)
        outcomes.append(judge(kind, f"{saved.kind}, another {name}", path.name, load, lambda _: False))
    return outcomes


def damaged_models(kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes
    """
    outcomes, path = [], folder / "damaged.zip"
    for trial in range(n):
        saved = all_saved[trial % len(all_saved)]
        content, detail = (flipped if "flipped" in kind else cut)(saved.zip.read_bytes(), generator)
        path.write_bytes(content)
        outcomes.append(
            judge(
                kind,
                f"{saved.kind}, {detail}",
                path.name,
                partial(saved.load_parameters, path),
                partial(same, saved.parameters),
            )
        )
    return outcomes


def rewrite(saved: Saved, path: Path, changes: dict[str, bytes]) -> None:
    """
    :param saved: a model
    :param path: of the file to write
    :param changes: members of the archive to replace
    """
    with zipfile.ZipFile(saved.zip) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def states_of(saved: Saved, member: str) -> Any:
    """
    :param saved: a model
    :param member: of its file
    :return: the states in it
    """
    with zipfile.ZipFile(saved.zip) as archive, archive.open(member) as file:
        return th.load(file, weights_only=True)


def as_bytes(states: Any) -> bytes:
    """
    :param states: of a model
    :return: as a member of its file
    """
    content = io.BytesIO()
    th.save(states, content)
    return content.getvalue()


def floating(states: Any, path: str = "") -> Iterator[tuple[str, th.Tensor]]:
    """
    :param states: containers of tensors
    :param path: where they are
    :return: those of floating-point numbers, with where they are
    """
    if isinstance(states, dict):
        for name, each in states.items():
            yield from floating(each, f"{path}/{name}")
    elif isinstance(states, th.Tensor) and states.is_floating_point() and states.numel():
        yield path, states


def impossible_numbers(
    kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path
) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes: a parameter, an average, a moment is NaN or Inf
    """
    outcomes, path = [], folder / "numbers.zip"
    for trial in range(n):
        saved = all_saved[trial % len(all_saved)]
        member = generator.choice(["policy.pth", "policy.optimizer.pth", OWN_MEMBER])
        states = states_of(saved, member)
        where, tensor = generator.choice(list(floating(states)))
        value = generator.choice([math.nan, math.inf, -math.inf])
        tensor.view(-1)[generator.randrange(tensor.numel())] = value
        rewrite(saved, path, {member: as_bytes(states)})
        by_load = bool(generator.randrange(2))
        load = saved.load if by_load else saved.load(saved.zip).set_parameters
        detail = f"{saved.kind}, {'load' if by_load else 'set_parameters'}, {member}{where} = {value}"
        outcomes.append(judge(kind, detail, path.name, partial(load, path), lambda _: False))
    return outcomes


def _set_group(name: str, value: Any) -> Callable[[Any], None]:
    return lambda state: state["param_groups"][0].update({name: value})


def _set_state(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        first = next(iter(state["state"].values()))
        first[name] = value(first[name])

    return change


BROKEN_OPTIMIZERS: dict[str, Callable[[Any], None]] = {
    "lr NaN": _set_group("lr", math.nan),
    "lr negative": _set_group("lr", -1e-3),
    "lr text": _set_group("lr", "1e-3"),
    "betas above 1": _set_group("betas", (0.9, 1.1)),
    "one beta": _set_group("betas", (0.9,)),
    "no betas": lambda state: state["param_groups"][0].pop("betas"),
    "eps negative": _set_group("eps", -1.0),
    "too few parameters": lambda state: state["param_groups"][0]["params"].pop(),
    "too many parameters": lambda state: state["param_groups"][0]["params"].append(99),
    "a parameter twice": lambda state: state["param_groups"][0]["params"].__setitem__(0, 1),
    "two groups": lambda state: state["param_groups"].append(deepcopy(state["param_groups"][0])),
    "no groups": lambda state: state["param_groups"].clear(),
    "no state": lambda state: state.pop("state"),
    "groups without parameters": lambda state: state["param_groups"][0].pop("params"),
    "a state of no parameter": lambda state: state["state"].update({99: {}}),
    "a state that is a number": lambda state: state["state"].update({next(iter(state["state"])): 3}),
    "an empty state": lambda state: state["state"].update({next(iter(state["state"])): {}}),
    "step negative": _set_state("step", lambda step: step - 1e6),
    "step a fraction": _set_state("step", lambda step: step + 0.5),
    "step Inf": _set_state("step", lambda step: step + math.inf),
    "step of another shape": _set_state("step", lambda step: step.repeat(3)),
    "exp_avg of another shape": _set_state("exp_avg", lambda each: each.flatten()[:1]),
    "exp_avg a number": _set_state("exp_avg", lambda each: each.flatten()[0]),
    "exp_avg text": _set_state("exp_avg", lambda _: "text"),
    "exp_avg_sq negative": _set_state("exp_avg_sq", lambda each: each - 1),
    "exp_avg_sq of another shape": _set_state("exp_avg_sq", lambda each: th.zeros(3, 3, 3)),
    "no exp_avg": lambda state: next(iter(state["state"].values())).pop("exp_avg"),
    "no step": lambda state: next(iter(state["state"].values())).pop("step"),
}


def broken_optimizers(
    kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path
) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes
    """
    outcomes, path = [], folder / "optimiser.zip"
    for trial in range(n):
        name = list(BROKEN_OPTIMIZERS)[trial % len(BROKEN_OPTIMIZERS)]
        saved = generator.choice(all_saved)
        own = states_of(saved, OWN_MEMBER)
        optimizers = [each for each in own if isinstance(own[each], dict) and own[each].get("state")]
        which = generator.choice(["policy.optimizer", *optimizers])
        states = states_of(saved, "policy.optimizer.pth") if which == "policy.optimizer" else own
        BROKEN_OPTIMIZERS[name](states if which == "policy.optimizer" else own[which])
        member = "policy.optimizer.pth" if which == "policy.optimizer" else OWN_MEMBER
        rewrite(saved, path, {member: as_bytes(states)})
        by_load = bool(generator.randrange(2))
        load = saved.load if by_load else saved.load(saved.zip).set_parameters
        detail = f"{saved.kind}, {'load' if by_load else 'set_parameters'}, {which}: {name}"
        outcomes.append(judge(kind, detail, path.name, partial(load, path), lambda _: False))
    return outcomes


def hostile_pickles(kind: str, n: int, all_saved: list[Saved], generator: random.Random, folder: Path) -> list[Outcome]:
    """
    :param kind: of the fault
    :param n: number of trials
    :param all_saved: models
    :param generator: of random numbers
    :param folder: where to write
    :return: outcomes: "silent" if anything was run
    """
    outcomes, path, touched = [], folder / "hostile.zip", folder / "touched"
    for trial in range(n):
        saved = all_saved[trial % len(all_saved)]
        with zipfile.ZipFile(saved.zip) as archive:
            data, members = json.loads(archive.read("data")), archive.namelist()
        hostile = generator.choice([Touch(touched), [Touch(touched)], {"a": (1, Touch(touched))}])
        pickled = pickle.dumps(hostile, generator.choice([2, 4, 5]))
        place = generator.choice([*data, "an attribute more", *(f"member {name}" for name in members)])
        if place.startswith("member "):
            name = place.removeprefix("member ")
            content = as_bytes(hostile) if generator.randrange(2) else pickled
            rewrite(saved, path, {name: content})
        else:
            data[place] = {":type:": "x", ":serialized:": base64.b64encode(pickled).decode()}
            rewrite(saved, path, {"data": json.dumps(data).encode()})
        judged = judge(
            kind,
            f"{saved.kind}, {place}",
            path.name,
            partial(saved.load_parameters, path, safe=True),
            partial(same, saved.parameters),  # nobody reads the version
        )
        if touched.exists():
            touched.unlink()
            judged = judged._replace(verdict="silent", detail=f"{judged.detail}: code was run")
        outcomes.append(judged)
    return outcomes


PARTS: dict[str, Callable[[str, int, list[Saved], random.Random, Path], list[Outcome]]] = {
    "kept rollouts: a bit flipped": damaged_rollouts,
    "kept rollouts: cut off": damaged_rollouts,
    "kept rollouts: of another run": other_runs,
    "saved model: a bit flipped": damaged_models,
    "saved model: cut off": damaged_models,
    "saved model: a number that cannot be": impossible_numbers,
    "saved model: a broken optimiser": broken_optimizers,
    "saved model: a hostile pickle": hostile_pickles,
}


def run(n_trials: int, seed: int, folder: Path) -> list[Outcome]:
    """
    :param n_trials: number of trials
    :param seed: of the choice of faults
    :param folder: where to write
    :return: outcomes
    """
    generator = random.Random(seed)
    th.set_num_threads(1)
    all_saved = [Saved(kind, folder) for kind in KINDS]
    outcomes: list[Outcome] = []
    for kind, share in SHARES.items():
        outcomes += PARTS[kind](kind, max(1, math.ceil(n_trials * share / 1000)), all_saved, generator, folder)
    return outcomes
