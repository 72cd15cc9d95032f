import os

import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def sb3_logs_in_pytest_folder(tmp_path_factory):
    """SB3 makes a folder for the logs of every learn(); pytest's are cleaned up."""
    previous = os.environ.get("SB3_LOGDIR")
    os.environ["SB3_LOGDIR"] = str(tmp_path_factory.mktemp("sb3_logs"))
    yield
    if previous is None:
        del os.environ["SB3_LOGDIR"]
    else:
        os.environ["SB3_LOGDIR"] = previous


@pytest.fixture
def default_dtype():
    """Sets the default dtype, for one test."""
    previous = th.get_default_dtype()
    yield th.set_default_dtype
    th.set_default_dtype(previous)
