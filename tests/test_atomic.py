"""Permissions and links of the files that save() and save_replay_buffer() replace."""

import os
import pathlib
import stat
from collections.abc import Callable, Iterator

import pytest

from sb3_ppo_ewma import PPOEWMA
from sb3_ppo_ewma.checkpointing.atomic import replace_atomically

Write = Callable[[pathlib.Path], None]


@pytest.fixture(scope="module")
def model() -> PPOEWMA:
    return PPOEWMA("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, staleness=1, device="cpu").learn(8)


@pytest.fixture(params=["save", "save_replay_buffer"])
def write(request: pytest.FixtureRequest, model: PPOEWMA) -> Write:
    return getattr(model, request.param)


@pytest.fixture
def umask() -> Iterator[None]:
    """The group may read new files, others may not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def permissions(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_new_file_has_the_permissions_of_open(write: Write, tmp_path: pathlib.Path) -> None:
    write(tmp_path / "new.file")
    (tmp_path / "opened").open("wb").close()
    assert permissions(tmp_path / "new.file") == permissions(tmp_path / "opened") == 0o640


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_existing_file_keeps_its_permissions(mode: int, write: Write, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert permissions(path) == mode
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["old.file", "without_suffix"])
def test_link_stays_and_its_file_is_replaced(name: str, write: Write, tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    path, link = tmp_path / "folder" / name, tmp_path / "link.file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    write(link)
    assert link.readlink() == path
    assert permissions(path) == 0o640
    assert path.read_bytes() != b"old"
    assert list((tmp_path / "folder").iterdir()) == [path]


def test_file_is_not_readable_by_others_before_it_has_its_permissions(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"new")
        assert permissions(temporary) == 0o600
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def write_half(path: pathlib.Path) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")


def test_error_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
