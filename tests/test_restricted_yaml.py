"""What the zoo writes into ``args.yml`` and ``config.yml`` is read, and nothing else that YAML can make."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch as th
import yaml

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.zoo import restricted_yaml


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(batch_size=64, policy_kwargs="dict(net_arch=[3])", clip_range=None),
        OrderedDict(env_kwargs={"size": (3, 4), "path": Path("a/b")}, normalize="{'norm_obs': True, 'gamma': 0.9}"),
        OrderedDict(policy_kwargs={"activation_fn": th.nn.ReLU, "optimizer_class": th.optim.Adam}),
        OrderedDict(normalize="dict(norm_obs=True, norm_reward=False)"),
        {"normalize": True, "nested": OrderedDict(a=OrderedDict(b=(1, 2)))},
        OrderedDict(),
    ],
    ids=str,
)
def test_what_the_zoo_writes_is_read(value, tmp_path):
    (tmp_path / "config.yml").write_text(yaml.dump(value))
    with (tmp_path / "config.yml").open() as file:
        result = restricted_yaml.load(file)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch touched']",
        "!!python/object/apply:pathlib.Path.touch [x]",
        "!!python/object/new:os.system ['touch touched']",
        "!!python/object/new:collections.OrderedDict {state: {x: 1}}",
        "!!python/object:sb3_ppo_ewma.ppo_ewma.PPOEWMA {}",
        "!!python/module:antigravity ''",
        "!!python/name:os.system ''",
        "!!python/name:antigravity.x ''",
        "!!python/name:eval ''",
        "!!python/complex 1j",
        "!!python/object/apply:collections.OrderedDict\n- !!python/object/apply:os.system ['touch touched']",
    ],
)
def test_other_objects_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("args.yml").write_text(f"env: CartPole-v1\nenv_kwargs: {text}\n" if "\n" not in text else text)
    with (
        Path("args.yml").open() as file,
        pytest.raises(yaml.YAMLError, match=r'(?s)could run code.*"args\.yml", line 2'),
    ):
        restricted_yaml.load(file)
    assert [path.name for path in tmp_path.iterdir()] == ["args.yml"]
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "code", ["__import__('os').getcwd()", "dict(a=print(1))", "dict([(1, 2)])", "{", "x", "print(1)"]
)
def test_code_that_the_zoo_would_evaluate_is_refused(code):
    with pytest.raises(ValueError, match=r"normalize: .* is not a dictionary of plain values, but would be run"):
        restricted_yaml.load(yaml.dump({"normalize": code}))


def test_classes_of_packages_on_the_command_line_are_read(monkeypatch):
    text = "x: !!python/name:sb3_ppo_ewma.ppo_ewma.PPOEWMA ''"
    with pytest.raises(yaml.YAMLError, match="name its package with --gym-packages"):
        restricted_yaml.load(text)
    monkeypatch.setattr(sys, "argv", ["enjoy", "--gym-packages", "sb3_ppo_ewma.zoo", "other", "-n", "3"])
    assert restricted_yaml.load(text) == {"x": PPOEWMA}


def test_classes_that_only_training_uses_are_not_read():
    loaded = restricted_yaml.load("callback:\n- !!python/name:antigravity.x ''\nn_envs: 2")
    assert loaded["n_envs"] == 2
    assert not isinstance(loaded["callback"][0], type)
    assert "antigravity" not in sys.modules
