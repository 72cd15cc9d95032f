"""
Fixtures of the battery.
"""

from collections.abc import Iterator

import pytest
import torch as th

from tests.battery.algorithms import ALGORITHMS, CONTRIB, MASKABLE, RECURRENT, Algorithm


@pytest.fixture(params=ALGORITHMS, ids=str)
def algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm of the list."""
    return request.param


@pytest.fixture(params=[algo for algo in ALGORITHMS if algo.own], ids=str)
def own_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm of this package."""
    return request.param


@pytest.fixture(params=[algo for algo in ALGORITHMS if algo.has_average], ids=str)
def average_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm whose proximal policy is an average."""
    return request.param


@pytest.fixture(params=[algo for algo in ALGORITHMS if algo.has_phases], ids=str)
def phasic_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm with auxiliary phases."""
    return request.param


@pytest.fixture(params=CONTRIB, ids=str)
def contrib_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm of sb3-contrib's families."""
    return request.param


@pytest.fixture(params=RECURRENT, ids=str)
def recurrent_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm with LSTM policies."""
    return request.param


@pytest.fixture(params=MASKABLE, ids=str)
def maskable_algo(request: pytest.FixtureRequest) -> Algorithm:
    """Every algorithm with action masks."""
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks are slower with several threads."""
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(threads)
