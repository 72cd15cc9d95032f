"""Files that are replaced: permissions, links, folders, several writers, and writers that are killed."""

import concurrent.futures
import os
import pathlib
import signal
import stat
from collections.abc import Callable, Iterator

import pytest

from benchmarks.faults import writes
from benchmarks.faults.outcome import GOOD
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


# === Names, links and folders ===


def replaced(path: pathlib.Path, data: bytes = b"new") -> None:
    with replace_atomically(path) as temporary:
        temporary.write_bytes(data)


def test_names_may_be_as_long_as_the_system_allows(write: Write, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"{'n' * 251}.zip"
    write(path)
    assert list(tmp_path.iterdir()) == [path]


def test_names_of_temporary_files_cannot_be_foreseen(tmp_path: pathlib.Path) -> None:
    names = set()
    for _ in range(3):
        with replace_atomically(tmp_path / "file") as temporary:
            names.add(temporary.name)
            temporary.touch()
    assert len(names) == 3


def write_through_link(path: pathlib.Path, other: pathlib.Path) -> None:
    with replace_atomically(path) as temporary:
        temporary.unlink()
        temporary.symlink_to(other)


def test_a_temporary_file_that_became_a_link_is_not_followed(tmp_path: pathlib.Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(OSError, match="exchanged"):
        write_through_link(path, other)
    assert other.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_in_the_place_of_the_file_and_folders_that_are_missing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.v1").mkdir()
    with pytest.warns(UserWarning, match=r"model\.v1_2"):
        replaced(tmp_path / "model.v1")
    assert (tmp_path / "model.v1_2").read_bytes() == b"new"
    with pytest.warns(UserWarning, match="Will create it"):
        replaced(tmp_path / "new" / "folder" / "file")
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"new"


@pytest.fixture
def without_privileges(tmp_path: pathlib.Path) -> Iterator[None]:
    """Permissions count, also for root."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    os.chown(tmp_path, 65534, 65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("without_privileges")
def test_a_folder_that_takes_no_new_files(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "file"
    path.write_bytes(b"old and longer")
    folder.chmod(0o555)
    replaced(path)
    assert path.read_bytes() == b"new"
    with pytest.raises(PermissionError, match="other"):
        replaced(folder / "other")
    assert list(folder.iterdir()) == [path]
    folder.chmod(0o755)


@pytest.mark.usefixtures("without_privileges")
def test_a_file_that_may_not_be_written_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="file"):
        replaced(path)
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_and_group_stay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 65534, 65533)
    replaced(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65533)


def test_what_is_no_file_is_written_and_not_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    replaced(path)
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert path.is_fifo()


def test_a_temporary_file_can_be_written_by_what_replaces_files(model: PPOEWMA, tmp_path: pathlib.Path) -> None:
    with replace_atomically(tmp_path / "file") as temporary:
        model.save(temporary)
        assert list(tmp_path.iterdir()) == [temporary]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert PPOEWMA.load(tmp_path / "file", device="cpu").num_timesteps == 8


# === Several writers, and those that were killed ===


def killed_while_writing(path: pathlib.Path) -> None:
    child = os.fork()
    if child == 0:
        with replace_atomically(path) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_is_removed_at_the_next_save(tmp_path: pathlib.Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for each in (path, path, other):
        killed_while_writing(each)
    foreign = tmp_path / ".sb3-save-foreign.tmp"
    foreign.touch()
    assert len(list(tmp_path.iterdir())) == 3  # the second one has removed what the first one left
    with replace_atomically(path) as temporary:  # one that is alive
        replaced(path)
        assert temporary.exists()
        temporary.write_bytes(b"last")
    assert path.read_bytes() == b"last"
    replaced(other)
    assert set(tmp_path.iterdir()) == {path, other, foreign}


def test_threads_may_save_one_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: replaced(path, bytes([i]) * 1000), range(200)))
    assert len(set(path.read_bytes())) == 1
    assert len(path.read_bytes()) == 1000
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_on_the_disk_before_and_after_the_replacement(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "file", []

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(("folder" if is_folder else "file", path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    replaced(path)
    assert events == [("file", False), ("folder", True)]


def test_injected_faults(tmp_path: pathlib.Path) -> None:
    bad = [each for each in writes.run(28, seed=0, folder=tmp_path) if each.verdict not in GOOD]
    assert not bad
