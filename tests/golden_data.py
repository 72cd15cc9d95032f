"""
Reference numbers of the released code of the paper, as described by ``tests/golden/README.md`` and its manifest.

Another folder of the same format is read when the environment variable ``GOLDEN_DIR`` names one.
"""

import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import torch as th

GOLDEN_DIR = pathlib.Path(os.environ.get("GOLDEN_DIR", pathlib.Path(__file__).parent / "golden"))


class Case(NamedTuple):
    """
    One case of a family.

    :param id: name
    :param hyperparameters: of the run of the reference
    :param arrays: by role
    :param overflows: whether the reference gives Inf or NaN
    """

    id: str
    hyperparameters: dict[str, Any]
    arrays: dict[str, np.ndarray]
    overflows: bool

    @property
    def dtype(self) -> th.dtype:
        return th.float32 if self.id.startswith("f32") else th.float64

    @property
    def tolerance(self) -> dict[str, float]:
        return {"rtol": 1e-5, "atol": 1e-6} if self.dtype == th.float32 else {"rtol": 1e-9, "atol": 1e-12}


@functools.cache
def manifest() -> dict[str, Any]:
    return json.loads((GOLDEN_DIR / "manifest.json").read_text())


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN_DIR / file, allow_pickle=False) as archive:
        return dict(archive)


def case_ids(family: str) -> list[str]:
    return [case["id"] for case in manifest()["families"][family]["cases"]]


def load_case(family: str, case_id: str) -> Case:
    description = manifest()["families"][family]
    case = next(case for case in description["cases"] if case["id"] == case_id)
    archive = _arrays(description["file"])
    arrays = {role: archive[name] for role, name in case["arrays"].items()}
    return Case(case_id, case["hyperparameters"], arrays, bool(case.get("expect_nonfinite", False)))


def param_layout(family: str, arch: str) -> list[dict[str, Any]]:
    return manifest()["families"][family]["param_layout"][arch]
