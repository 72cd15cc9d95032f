"""The documentation says what is there: examples run, parameters, log keys, options, files and targets exist."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rl_zoo3.hyperparams_opt import sample_ppo_params
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger

import sb3_ppo_ewma
from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, PPGPolicy
from sb3_ppo_ewma._engine.selection import ENGINES
from sb3_ppo_ewma.networks import FEATURES_EXTRACTORS
from sb3_ppo_ewma.zoo import options
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES
from sb3_ppo_ewma.zoo.command_line import SCRIPTS
from sb3_ppo_ewma.zoo.search_space import SEARCH_SPACES
from tests.test_packaging import PACKAGE

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
DASH = "[\u2010-\u2014\u2212]"  # hyphens, dashes and the minus sign, but not the ASCII one
README = (ROOT / "README.md").read_text()
PPO_EWMA_PAGE, PPG_PAGE, ZOO_PAGE, INDEX = (
    (ROOT / "docs" / name).read_text() for name in ("ppo_ewma.md", "ppg.md", "zoo.md", "index.md")
)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def own_parameters(function: Any) -> dict[str, inspect.Parameter]:
    """What is keyword-only, or has another default than in SB3."""
    sb3 = parameters(PPO)
    return {
        name: parameter
        for name, parameter in parameters(function).items()
        if parameter.kind is parameter.KEYWORD_ONLY or (name in sb3 and sb3[name].default != parameter.default)
    }


def table(page: str, first_header: str) -> list[list[str]]:
    """
    :return: the cells of all rows below headers that begin like this, without backticks around them
    """
    found = re.findall(rf"^\| {re.escape(first_header)} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    assert found, f"no table with the header {first_header}"
    rows = "".join(found).splitlines()
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def page_id(page: Path) -> str:
    return page.name


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# Blocks of extending.md build on each other: tests/test_extending.py runs them
WITH_EXAMPLES = [page for page in PAGES if code_blocks(page, "python") and page.name != "extending.md"]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=page_id)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in code_blocks(page, "python"):
        short = re.sub(r"total_timesteps=[\w.+]+", "total_timesteps=512", code)
        # So that 512 steps in rollouts of 256 end in the middle of a phase, and 512 more reach its end
        short = re.sub(r"n_policy_iterations=\d+", "n_policy_iterations=3", short)
        exec(compile(short, str(page), "exec"), {"__name__": "example"})


def test_own_parameters_are_in_the_readme() -> None:
    classes: list[type[BaseAlgorithm]] = [PPOEWMA, PPG, PPGEWMA]
    rows = {name: cells for name, *cells in table(README, "parameter")}
    for i, cls in enumerate(classes):
        assert set(own_parameters(cls)) <= set(rows)
        for name, cells in rows.items():
            default = parameters(cls)[name].default if name in parameters(cls) else "–"
            assert cells[i] == "–" if default == "–" else ast.literal_eval(cells[i]) == default, (cls, name)


@pytest.mark.parametrize("name", own_parameters(PPOEWMA))
def test_own_parameters_of_ppo_ewma_are_explained(name: str) -> None:
    item = re.search(rf"^- `{name}` \(`?([^`]+?)`?\):", PPO_EWMA_PAGE, flags=re.MULTILINE)
    assert item is not None, "no item on the algorithm's page"
    assert ast.literal_eval(item[1]) == parameters(PPOEWMA)[name].default


def test_parameters_of_ppg_are_explained() -> None:
    rows = table(PPG_PAGE, "symbol")
    assert len({name for _, name, *_ in rows}) == len(rows)
    assert set(own_parameters(PPG)) <= {name for _, name, *_ in rows}
    for _, name, default, whose, meaning in rows:
        of_ppg, _, of_ppg_ewma = default.partition("; in `PPGEWMA` ")
        assert ast.literal_eval(of_ppg.strip("`")) == parameters(PPG)[name].default, name
        assert ast.literal_eval((of_ppg_ewma or of_ppg).strip("`")) == parameters(PPGEWMA)[name].default, name
        assert meaning
        if name in parameters(PPO):
            unchanged = parameters(PPO)[name].default == parameters(PPG)[name].default
            assert whose.startswith(("SB3's", "both") if unchanged else "the paper's"), name


def test_parameters_of_the_policies_are_explained() -> None:
    rows = table(PPG_PAGE, "in `policy_kwargs`")
    expected = {name: p.default for name, p in parameters(PPGPolicy).items() if p.kind is p.KEYWORD_ONLY}
    assert {name: ast.literal_eval(default) for name, default, _ in rows} == expected
    choices = {name for name, *_ in table(PPG_PAGE, "`critic_arch`")}
    assert choices == {f'"{name}"' for name in ("dual", "shared", "detach")}


def test_policies_and_features_extractors_are_named() -> None:
    rows = table(PPG_PAGE, "name")
    assert {ast.literal_eval(alias): cls for alias, cls, *_ in rows} == {
        alias: cls.__name__ for alias, cls in PPG.policy_aliases.items()
    }
    for name in FEATURES_EXTRACTORS:
        assert f'`"{name}"`' in PPG_PAGE
        assert f"`{name}`" in ZOO_PAGE


@pytest.mark.parametrize("name", ["ImpalaCNN", "SmallGridCNN"])
def test_defaults_of_the_features_extractors(name: str) -> None:
    item = re.search(rf"^- `{name}` \((.+?)\):", PPG_PAGE, flags=re.MULTILINE)
    assert item is not None
    stated = dict(pair.split("=", 1) for pair in re.findall(r"`(\w+=[^`]+)`", item[1]))
    for parameter, value in stated.items():
        assert ast.literal_eval(value) == parameters(FEATURES_EXTRACTORS[name])[parameter].default
    elsewhere = {"observation_space", "channels_last", "mixed_precision"}
    assert set(stated) | elsewhere == set(parameters(FEATURES_EXTRACTORS[name]))


class Keys(KVWriter):
    """Remembers the names of what is logged, line by line."""

    def __init__(self) -> None:
        self.lines: list[set[str]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.lines.append(set(key_values))

    def close(self) -> None:
        pass


def logged_keys(cls: type[BaseAlgorithm], env: str, prefix: str, **arguments: Any) -> list[set[str]]:
    """
    :return: names with the prefix, in each of the first three iterations
    """
    keys = Keys()
    model = cls("MlpPolicy", env, n_steps=64, device="cpu", **arguments)
    model.set_logger(Logger(folder=None, output_formats=[keys]))
    model.learn(4 * 64)  # what an iteration's training logs is written in the next one
    return [{key for key in line if key.startswith(prefix)} for line in keys.lines[1:]]


def documented_keys(page: str, prefix: str) -> set[str]:
    return {key for cell, *_ in table(page, "key") for key in re.findall(rf"{prefix}\w+", cell)}


def row_of(page: str, key: str) -> str:
    return next(line for line in page.splitlines() if line.startswith("|") and f"`{key}`" in line)


def test_logged_quantities_of_ppo_ewma_are_explained() -> None:
    *_, everything = logged_keys(PPOEWMA, "Pendulum-v1", "train/", kl_coef=1.0, clip_range_vf=0.2)
    assert documented_keys(PPO_EWMA_PAGE, "train/") == everything
    absent = {"prox_decay": None, "clip_range": None, "max_importance_ratio": None}
    *_, nothing = logged_keys(PPOEWMA, "CartPole-v1", "train/", **absent)
    assert {"train/approx_kl_prox", "train/importance_ratio_max", "train/advantage_std"} < nothing < everything
    for key in everything - nothing:
        row = row_of(PPO_EWMA_PAGE, key)
        assert re.search("absent|only|Gaussian", row), f"{key} is not always logged, its row does not say so"


def test_logged_quantities_of_ppg_are_explained() -> None:
    first, second, _ = logged_keys(PPG, "CartPole-v1", "aux/", n_policy_iterations=2)
    assert documented_keys(PPG_PAGE, "aux/") == second
    # "The first four appear only when an auxiliary phase has run since the last line, the other two always"
    in_order = [cell for cell, *_ in table(PPG_PAGE, "key")]
    assert set(in_order[:4]) == second - first
    assert set(in_order[4:]) == first
    assert logged_keys(PPG, "CartPole-v1", "aux/", n_aux_epochs=0) == [set(), set(), set()]
    everything = logged_keys(PPGEWMA, "Pendulum-v1", "", n_policy_iterations=2, kl_coef=1.0, clip_range_vf=0.2)[1]
    known = documented_keys(PPG_PAGE, "aux/") | documented_keys(PPO_EWMA_PAGE, "train/")
    assert {key for key in everything if not key.startswith(("time/", "rollout/"))} == known


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
            elif "sb3_ppo_ewma.zoo" in words:  # python -m, torchrun ... -m
                yield words[words.index("sb3_ppo_ewma.zoo") + 1 :]


def source_of(module: str) -> str:
    package, *path = module.split(".")  # not find_spec, which imports scripts that run on import
    folder = Path(importlib.import_module(package).__path__[0])
    return folder.joinpath(*path).with_suffix(".py").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if list(zoo_commands(page))], ids=page_id)
def test_zoo_commands_have_the_options_of_their_scripts(page: Path) -> None:
    for script, *arguments in zoo_commands(page):
        source = source_of(SCRIPTS[script][0])
        if script in options.SCRIPTS:
            source += source_of("sb3_ppo_ewma.zoo.options")
        if script == "n-envs":
            source += source_of("sb3_ppo_ewma.zoo.rescaling")
        for option in arguments:
            assert not re.match(DASH, option), f"{option} begins with a typographic dash"
            if option.startswith("-") and not re.fullmatch(r"-[\d.]+(e-?\d+)?", option):
                assert f'"{option}"' in source, f"{script} has no {option}"


def drawn(sampler: Any) -> set[str]:
    trial = optuna.create_study().ask()
    sampler(trial, 2, 1, {})
    return set(trial.params)


def test_search_spaces_are_explained() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    zoo = drawn(sample_ppo_params)
    of_ppo_ewma, of_ppg, of_lstm = (
        {name: "not with an LSTM" in name for name, *_ in table(f"{part}\n", "parameter of the trial")}
        for part in re.split("For PPG,|For recurrent algorithms", ZOO_PAGE)
    )
    for algo in {**ALGORITHMS, **BASELINES}:
        has_lstm, has_average = "_lstm" in algo, algo.endswith("_ewma")
        documented = of_ppg if algo.startswith("ppg") else of_ppo_ewma if has_average else {}
        names = {name.split("`")[0] for name, not_with_lstm in documented.items() if not (has_lstm and not_with_lstm)}
        names |= {"prox_center_of_mass"} if has_average else set()
        names |= set(of_lstm) if has_lstm else set()
        assert drawn(SEARCH_SPACES[algo].sample) - zoo == names, algo


def test_algorithms_are_named() -> None:
    algorithms = {**ALGORITHMS, **BASELINES}
    assert dict(table(ZOO_PAGE, "`--algo`")) == {name: cls.__name__ for name, cls in algorithms.items()}


def test_modules_are_listed() -> None:
    listed = {name.removeprefix("sb3_ppo_ewma.") for name, _ in table(INDEX, "module")}
    files = [file.relative_to(PACKAGE).with_suffix("").parts for file in PACKAGE.rglob("*.py")]
    public = {".".join(parts) for parts in files if not any(part.startswith("_") for part in parts)}
    assert listed == {name for name in public if not name.startswith("zoo.")} | {"zoo"}


def test_architecture_names_modules() -> None:
    source, picture = ((ROOT / "docs" / "images" / f"architecture.{kind}").read_text() for kind in ("dot", "svg"))
    in_source, in_picture = (
        set(re.findall(r"[\w/]+\.py", text.replace("\\n", "\n").replace("\\l", "\n"))) for text in (source, picture)
    )
    assert in_source == in_picture, "make the picture anew"
    in_text = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))
    assert {"losses.py", "_engine/reference.py"} <= in_source & in_text
    assert [name for name in in_source | in_text if not (PACKAGE / name).exists()] == []


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


@pytest.mark.parametrize("page", ["batch_scaling.md", "speed.md"])
def test_explanations_are_what_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / page).read_text()
    example = re.search(r"```python\n((?:(?!```).)*)```(?:(?!```).)*```text\n(.*?)```", text, flags=re.DOTALL)
    assert example is not None
    exec(example[1], {})
    assert capsys.readouterr().out == example[2]


def test_engines_are_listed() -> None:
    rows = table((ROOT / "docs" / "speed.md").read_text(), "engine")
    assert {ast.literal_eval(name) for name, *_ in rows} == {engine.name for engine, _ in ENGINES}


# Pages may write any dash as a minus sign, reports write a hyphen. A dash after a digit is a range.
SIGN = rf"(?<![\w.]){DASH}(?=\d)"
NUMBER = r"[+-]?\d[\d.]*"
# Intervals after an estimate: "-0.01 [-0.04, 0.01]", or "[0.74](a link) (95 % interval 0.59 to 0.88)"
IN_BRACKETS = rf"\[({NUMBER}), ({NUMBER})\]"
IN_PROSE = rf"\((?:95 % interval )?({NUMBER}) to ({NUMBER})\)"
LINK = r"(?:\]\([^)\s]+\))?"


def negative(number: str) -> str:
    return number[1:] if number.startswith("-") else f"-{number}"


def estimates(text: str, interval: str, negate_losses: bool = False) -> list[tuple[str, str, str]]:
    """
    :return: value and interval of every estimate; on request as the change that it is if a sentence calls it a loss
    """
    text = re.sub(SIGN, "-", text)
    found = []
    for match in re.finditer(rf"(?<![\w.+-])({NUMBER}){LINK}\s+{interval}", text):
        value, low, high = match.groups()
        sentence = re.split(r"[.:;]\s", text[: match.start()])[-1]
        is_loss = re.search(r"\b(lose|loses|lost|loss of)\b", sentence) is not None
        negate = negate_losses and is_loss
        found.append((negative(value), negative(high), negative(low)) if negate else (value, low, high))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("by -0.01 [-0.04, 0.01]", ("-0.01", "-0.04", "0.01")),
        ("by −0.01 [−0.04, 0.01]", ("-0.01", "-0.04", "0.01")),
        ("by \u20130.01\n[\u20110.04, 0.01]", ("-0.01", "-0.04", "0.01")),
        ("by 0.01 [-0.04, 0.01]", ("0.01", "-0.04", "0.01")),
        ("it loses 0.72 [0.67, 0.77]", ("-0.72", "-0.77", "-0.67")),
        ("it loses much. Or 0.72 [0.67, 0.77]", ("0.72", "0.67", "0.77")),
    ],
)
def test_signs_of_estimates_are_read(text: str, expected: tuple[str, str, str]) -> None:
    assert estimates(text, IN_BRACKETS, negate_losses=True) == [expected]


def test_estimates_in_prose_are_read() -> None:
    text = "[probability 0.74](results.md#a) (95 % interval 0.59 to 0.88), −1.5 (−2.5 to 0.5)"
    assert estimates(text, IN_PROSE) == [("0.74", "0.59", "0.88"), ("-1.5", "-2.5", "0.5")]


@pytest.mark.parametrize(
    ("page", "interval", "at_least", "reports", "negate_losses"),
    [
        ("docs/results.md", IN_BRACKETS, 50, "experiments", True),
        ("README.md", IN_PROSE, 3, "experiments", True),
        ("docs/asynchronous.md", IN_PROSE, 3, "parallel", False),  # that report has tables of losses
        ("benchmarks/README.md", IN_PROSE, 2, "comparison", True),
    ],
    ids=["results", "readme", "asynchronous", "benchmarks"],
)
def test_results_are_those_of_the_reports(
    page: str, interval: str, at_least: int, reports: str, negate_losses: bool
) -> None:
    stored: set[tuple[str, str, str]] = set()
    for file in (ROOT / "benchmarks" / reports / "results").glob("*.md"):
        stored |= set(estimates(file.read_text(), IN_BRACKETS))
    text = (ROOT / page).read_text()
    quoted = estimates(text, interval, negate_losses)
    assert len(quoted) >= at_least
    if interval == IN_BRACKETS:
        assert len(quoted) == len(re.findall(r"\[[^\]]+\](?!\()", text)), "brackets without an estimate in front"
    assert [estimate for estimate in quoted if estimate not in stored] == []
