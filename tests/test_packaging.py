"""What an installed package promises: imports, names, signatures, data files, extras; slow: the wheel itself."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import sb3_contrib
import stable_baselines3
import yaml

import sb3_ppo_ewma
from sb3_ppo_ewma import PPG, PPGEWMA, PPOEWMA, AuxiliaryPhaseMixin, EwmaMixin, MaskablePPOEWMA, RecurrentPPOEWMA
from sb3_ppo_ewma._engine.iteration import Engine
from sb3_ppo_ewma._engine.reference import ReferenceEngine
from sb3_ppo_ewma.zoo.algorithms import ALGORITHMS, BASELINES, ONE_EPOCH, SHARED_FILES, TUNED, hyperparameter_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sb3_ppo_ewma"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HYPERPARAMETER_FILES = sorted((ROOT / "zoo_hyperparams").rglob("*.yml"))

# Modules from the bottom up, each with the packages beside the standard library that its layer adds to those below.
LAYERS: list[tuple[set[str], set[str]]] = [
    (
        {
            "checkpointing.atomic",
            "checkpointing.plain_data",
            "checkpointing.simulator_states",
            "checkpointing.state_checks",
            "losses",
            "ewma",
        },
        {"torch", "numpy"},
    ),
    ({"_parallel.channel"}, {"cloudpickle"}),
    ({"checkpointing.generators", "memory", "advantages", "_parallel.process_group"}, {"numpy"}),
    (
        {
            "_arguments",
            "distributions",
            "checkpointing.restricted_pickle",
            "checkpointing.rollout_files",
            "checkpointing.object_states",
            "checkpointing.rollout_in_progress",
            "_parallel.normalization",
            "_parallel.shared_memory",
        },
        {"stable_baselines3", "gymnasium"},
    ),
    ({"checkpointing.environment_states", "envs.env_state"}, set()),
    (
        {
            "_finite",
            "checkpointing.conversion",
            "checkpointing.model_files",
            "_parallel.portable",
            "_parallel.shared_state",
        },
        set(),
    ),
    (
        {
            "_rules",
            "checkpointing.own_states",
            "networks",
            "rollouts",
            "callbacks.advice",
            "envs.envpool_vec_env",
            "envs.action_masks",
            "envs.grouped_vec_env",
        },
        set(),
    ),
    ({"checkpointing.saving", "policies", "evaluation", "training_log", "envs.envpool_env"}, set()),
    (
        {"batch_scaling", "following", "_engine.recognition", "_parallel.policy_copies", "_parallel.data_parallel"},
        set(),
    ),
    ({"_engine.iteration", "checkpointing.run_checkpoint"}, set()),
    ({"callbacks.run_checkpoint"}, set()),
    ({"_engine.reference", "_engine.dense_networks", "auxiliary_phase", "_parallel.worker"}, set()),
    (
        {
            "_engine.fused",
            "_parallel.worker_process",
            "_parallel.remote_methods",
            "_parallel.replay",
            "_parallel.as_ready",
        },
        set(),
    ),
    ({"_parallel.collector", "envs.remote_vec_env"}, set()),
    ({"_engine.standard", "_engine.sequences"}, set()),
    ({"_engine.dense", "_engine.microbatches", "_engine.collection"}, set()),
    ({"_engine.compiled"}, set()),
    ({"tuned_settings", "_engine.selection"}, set()),
    ({"ppo_ewma"}, set()),
    ({"ppg"}, set()),
    ({"callbacks.noise_scale"}, set()),
    ({"contrib.masking"}, {"sb3_contrib"}),
    ({"contrib.policies", "contrib.callbacks"}, set()),
    ({"contrib.evaluation"}, set()),
    ({"contrib.algorithms", "export"}, set()),
]
OWN_PARAMETERS = {
    "prox_decay",
    "kl_coef",
    "kl_estimator",
    "max_importance_ratio",
    "advantage_decay",
    "n_epochs_value",
    "recompute_advantages",
    "staleness",
    "staleness_mode",
    "engine",
    "tuned_for_n_envs",
    "torch_compile",
    "data_parallel",
    "max_policy_lag",
    "lag_mode",
    "collector_timeout",
    "collect",
}
PHASE_PARAMETERS = {
    "n_policy_iterations",
    "n_aux_epochs",
    "aux_batch_size",
    "aux_learning_rate",
    "beta_clone",
    "vf_true_coef",
    "vf_aux_coef",
}
FAMILIES = [
    pytest.param(PPOEWMA, stable_baselines3.PPO, id="ppo"),
    pytest.param(RecurrentPPOEWMA, sb3_contrib.RecurrentPPO, id="recurrent"),
    pytest.param(MaskablePPOEWMA, sb3_contrib.MaskablePPO, id="maskable"),
]


def imported_modules(file: Path) -> set[str]:
    """
    :param file: a module of the package
    :return: names of what it imports when it runs, which leaves out what only type checkers see
    """
    imported: set[str] = set()
    module = ast.parse(file.read_text())
    for_typing = {
        node
        for condition in ast.walk(module)
        if isinstance(condition, ast.If) and ast.unparse(condition.test) == "TYPE_CHECKING"
        for statement in condition.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(module):
        if node in for_typing:
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imported


def own_module(name: str) -> str:
    """
    :param name: of something imported, "sb3_ppo_ewma.losses" or "sb3_ppo_ewma._engine.recognition.hooks"
    :return: the module of this package that it is or comes from, without the package's name
    """
    parts = name.split(".")[1:]
    while not (PACKAGE / "/".join(parts)).with_suffix(".py").is_file():
        parts = parts[:-1]
    return ".".join(parts)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_imports_go_one_way() -> None:
    allowed: set[str] = set()
    layered: set[str] = set()
    for modules, distributions in LAYERS:
        below = set(layered)
        allowed |= distributions
        layered |= modules
        for module in modules:
            imported = imported_modules(PACKAGE / f"{module.replace('.', '/')}.py")
            own = {own_module(name) for name in imported if name.startswith("sb3_ppo_ewma.")}
            assert own <= below, f"{module} imports {own - below}, which is not below it"
            others = {name.partition(".")[0] for name in imported} - {"sb3_ppo_ewma"} - sys.stdlib_module_names
            assert others <= allowed, f"{module} imports {others - allowed}"
    files = [file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py")]
    present = {".".join(file.parts) for file in files if file.name != "__init__" and file.parts[0] != "zoo"}
    assert present == layered, "give every module its layer"


@pytest.mark.parametrize("module", ["sb3_ppo_ewma", "sb3_ppo_ewma.zoo"])
def test_import_is_light(module: str) -> None:
    result = run_python(f"import sys, {module}; print(*(name.partition('.')[0] for name in sys.modules))")
    assert result.returncode == 0, result.stderr
    heavy = {"rl_zoo3", "sb3_contrib", "optuna", "huggingface_sb3", "minatar", "minigrid", "mujoco", "Box2D", "ale_py"}
    assert not heavy & set(result.stdout.split())


@pytest.mark.parametrize("name", ["RecurrentPPOEWMA", "MaskablePPOEWMA"])
def test_missing_contrib_is_named(name: str) -> None:
    result = run_python(f"import sys; sys.modules['sb3_contrib'] = None\nfrom sb3_ppo_ewma import {name}")
    assert result.returncode == 1
    message = f"ImportError: {name} needs sb3-contrib: pip install 'sb3-ppo-ewma[contrib]'"
    assert result.stderr.splitlines()[-1] == message


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PPOEMA'"):
        _ = sb3_ppo_ewma.PPOEMA


def test_public_names() -> None:
    for name in sb3_ppo_ewma.__all__:
        assert getattr(sb3_ppo_ewma, name) is not None
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", sb3_ppo_ewma.__version__)


def test_named_extras_exist() -> None:
    texts = [*PACKAGE.rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]
    named: set[str] = set()
    for text in texts:
        for extras in re.findall(r"(?:sb3-ppo-ewma|pip install -e \"\.)\[([\w,-]+)\]", text.read_text()):
            named |= set(extras.split(","))
    assert named >= {"contrib", "zoo"}
    assert named <= set(PROJECT["optional-dependencies"])


def public_definitions(body: list[ast.stmt], prefix: str) -> list[tuple[str, Any]]:
    definitions: list[tuple[str, Any]] = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        definitions.append((f"{prefix}.{node.name}", node))
        if isinstance(node, ast.ClassDef):
            definitions += public_definitions(node.body, f"{prefix}.{node.name}")
    return definitions


def inherited_docstring(file: Path, name: str) -> str | None:
    """
    :param file: a module of the package
    :param name: of a method, "module.Class.method"
    :return: docstring of the method that it overrides, or of the one of the protocol ``Engine`` that it implements
    """
    _, class_name, *method = name.split(".")
    if not method:
        return None
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    cls = getattr(importlib.import_module(module), class_name)
    bases = [*cls.__mro__, *([Engine] if issubclass(cls, ReferenceEngine) else [])]
    return next((doc for base in bases if (doc := getattr(vars(base).get(method[0]), "__doc__", None))), None)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_names_are_documented(file: Path) -> None:
    module = ast.parse(file.read_text())
    if file.name != "__main__.py":
        assert ast.get_docstring(module), f"{file.name} has no docstring"
    for name, node in public_definitions(module.body, file.stem):
        docstring = ast.get_docstring(node) or inherited_docstring(file, name)
        assert docstring, f"{name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            names = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            missing = {name for name in names - {"self", "cls"} if f":param {name}:" not in docstring}
            assert not missing, f"{name} does not document {missing}"


def test_own_parameters_are_documented() -> None:
    documented = set(re.findall(r":param (\w+):", EwmaMixin.__doc__ or ""))
    assert documented - {"ppo_args", "ppo_kwargs"} == OWN_PARAMETERS
    documented = set(re.findall(r":param (\w+):", AuxiliaryPhaseMixin.__doc__ or ""))
    assert documented - {"args", "kwargs"} == PHASE_PARAMETERS | {"prox_decay", "advantage_decay"}


@pytest.mark.parametrize(("cls", "upstream"), FAMILIES)
def test_signature_is_that_of_sb3_with_own_parameters_after(cls: type, upstream: type) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    expected = list(inspect.signature(upstream).parameters.values())
    for got, wanted in zip(parameters, expected, strict=False):
        assert (got.name, got.default, got.kind) == (wanted.name, wanted.default, wanted.kind)
    own = parameters[len(expected) :]
    assert {parameter.name for parameter in own} == OWN_PARAMETERS
    for parameter in own:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
        assert parameter.default is not inspect.Parameter.empty, parameter  # load() builds without arguments


@pytest.mark.parametrize(("cls", "prox_decay"), [(PPG, None), (PPGEWMA, "auto")])
def test_signature_of_ppg_is_that_of_ppo_with_the_papers_defaults(cls: type, prox_decay: str | None) -> None:
    parameters = inspect.signature(cls).parameters
    expected = inspect.signature(stable_baselines3.PPO).parameters
    assert list(parameters)[: len(expected)] == list(expected)
    changed = {name for name in expected if parameters[name] != expected[name]}
    assert changed == {"n_epochs"}
    assert {name for name in parameters if name not in expected} == OWN_PARAMETERS | PHASE_PARAMETERS
    papers = {
        "n_epochs": 1,
        "n_policy_iterations": 32,
        "n_aux_epochs": 6,
        "aux_batch_size": None,
        "aux_learning_rate": 5e-4,
        "beta_clone": 1.0,
        "vf_true_coef": 1.0,
        "vf_aux_coef": 1.0,
        "advantage_decay": 0.0,
        "prox_decay": prox_decay,
    }
    assert {name: parameters[name].default for name in papers} == papers


def test_every_hyperparameter_file_is_found() -> None:
    names = [*ALGORITHMS, *BASELINES, ONE_EPOCH, TUNED]
    stems = [file.stem for file in HYPERPARAMETER_FILES if file.parent.name == "zoo_hyperparams"]
    assert stems == sorted(set(names) - set(SHARED_FILES))
    for name in names:
        settings = yaml.safe_load(hyperparameter_file(name).read_text())
        assert ("default" in settings) is (name != TUNED)  # what was searched for some tasks is for no other


# ---------------------------------------------------------------------- slow: the package as others get it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, which must therefore be complete."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the executables of an environment that has the wheel, and only the dependencies from this one."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # A .pth file is not read in a folder that another one names: the editable install stays out.
    dependencies = sysconfig.get_paths()["purelib"]
    Path(paths["purelib"], "dependencies.pth").write_text(f"{dependencies}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return Path(paths["scripts"])


def run_elsewhere(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_has_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    data = {f"sb3_ppo_ewma/{file.relative_to(ROOT)}" for file in HYPERPARAMETER_FILES}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources | data | {"sb3_ppo_ewma/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


@pytest.mark.slow
def test_installed_wheel_trains_from_its_console_script(installed: Path, tmp_path: Path) -> None:
    code = "import sb3_ppo_ewma; print(sb3_ppo_ewma.__file__)"
    file = run_elsewhere(tmp_path, str(installed / "python"), "-c", code).strip()
    assert Path(file).is_relative_to(installed.parent)
    train = ["train", "--algo", "ppo_ewma", "--env", "CartPole-v1", "-n", "512", "--eval-freq", "256", "--seed", "1"]
    run_elsewhere(tmp_path, str(installed / "sb3-ppo-ewma"), *train)
    run = tmp_path / "logs" / "ppo_ewma" / "CartPole-v1_1"
    assert (run / "CartPole-v1.zip").is_file()
    assert (run / "best_model.zip").is_file()
    used = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
    shipped = yaml.safe_load((ROOT / "zoo_hyperparams" / "ppo_ewma.yml").read_text())["CartPole-v1"]
    assert {name: value for name, value in used.items() if name in shipped} == shipped
