"""The documentation says what is there: examples run, parameters, log keys, options, files and targets exist."""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3
from stable_baselines3.common.logger import KVWriter, Logger

import sb3_ppo_ewma
from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.zoo.command_line import SCRIPTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ALGORITHM_PAGE = (ROOT / "docs" / "ppo_ewma.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

OWN_PARAMETERS = [
    parameter
    for parameter in inspect.signature(PPOEWMA).parameters.values()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


def page_id(page: Path) -> str:
    return page.name


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "python")], ids=page_id)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in code_blocks(page, "python"):
        short = re.sub(r"total_timesteps=[\d_]+", "total_timesteps=512", code)
        exec(compile(short, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("parameter", OWN_PARAMETERS, ids=lambda parameter: parameter.name)
def test_own_parameters_are_explained(parameter: inspect.Parameter) -> None:
    default = str(parameter.default) if not isinstance(parameter.default, str) else f'"{parameter.default}"'
    row = re.search(rf"^\| `{parameter.name}` \| ([^|]+) \|", README, flags=re.MULTILINE)
    assert row is not None, "no row in the README"
    assert row[1].strip("` ") == default
    item = re.search(rf"^- `{parameter.name}` \(`?([^`]+?)`?\):", ALGORITHM_PAGE, flags=re.MULTILINE)
    assert item is not None, "no item on the algorithm's page"
    assert item[1] == default


class Keys(KVWriter):
    """Remembers the names of what is logged."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.keys |= set(key_values)

    def close(self) -> None:
        pass


def logged_keys(env: str, **parameters: Any) -> set[str]:
    keys = Keys()
    model = PPOEWMA("MlpPolicy", env, n_steps=64, n_epochs=2, device="cpu", **parameters)
    model.set_logger(Logger(folder=None, output_formats=[keys]))
    model.learn(128)
    return {key for key in keys.keys if key.startswith("train/")}


def test_logged_quantities_are_explained() -> None:
    documented = set(re.findall(r"^\|[^|]*?`(train/\w+)`", ALGORITHM_PAGE, flags=re.MULTILINE))
    documented |= set(re.findall(r"^\| `train/\w+`, `(train/\w+)` \|", ALGORITHM_PAGE, flags=re.MULTILINE))
    everything = logged_keys("Pendulum-v1", kl_coef=1.0, clip_range_vf=0.2)
    assert documented == everything
    nothing = logged_keys("CartPole-v1", prox_decay=None, clip_range=None, max_importance_ratio=None)
    assert {"train/approx_kl_prox", "train/importance_ratio_max", "train/advantage_std"} < nothing < everything
    for key in everything - nothing:
        row = next(line for line in ALGORITHM_PAGE.splitlines() if line.startswith("|") and f"`{key}`" in line)
        assert re.search("absent|only|Gaussian", row), f"{key} is not always logged, its row does not say so"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation dropped, a hyphen for every space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def zoo_commands(page: Path) -> Iterator[list[str]]:
    for block in code_blocks(page, "(?:bash|shell|console|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").split()
            if words[:1] == ["sb3-ppo-ewma"]:
                yield words[1:]
            elif words[:3] == ["python", "-m", "sb3_ppo_ewma.zoo"]:
                yield words[3:]


@pytest.mark.parametrize("page", [page for page in PAGES if list(zoo_commands(page))], ids=page_id)
def test_zoo_commands_have_the_options_of_their_scripts(page: Path) -> None:
    for script, *arguments in zoo_commands(page):
        path = "/".join(SCRIPTS[script][0].split(".")[1:])
        source = (Path(rl_zoo3.__file__).parent / f"{path}.py").read_text()
        for option in arguments:
            if option.startswith("-") and not re.fullmatch(r"-\d+", option):
                assert f'"{option}"' in source, f"{script} has no {option}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", "".join(code_blocks(ROOT / "README.md", "bash"))))
    named |= set(re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", README))
    assert named >= {"train", "test", "help"}
    assert named <= targets


MODULES = [module.name for module in pkgutil.walk_packages(sb3_ppo_ewma.__path__, "sb3_ppo_ewma.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
