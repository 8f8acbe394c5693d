"""Files are there whole or not at all, whoever writes them and whatever fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile, delete_parts, locked, write_whole


def test_a_text_bytes_and_a_function_write_a_file(tmp_path: Path) -> None:
    """Each is what callers have; folders are made, and nothing stays beside the file."""
    path = tmp_path / "new/folder/array.npz"
    write_whole(path, "Ä\n")
    assert path.read_bytes() == "Ä\n".encode()
    write_whole(path, b"\0")
    assert path.read_bytes() == b"\0"
    write_whole(path, lambda aside: np.savez(aside, rows=np.arange(3)))  # numpy adds a suffix that is not there
    assert np.load(path)["rows"].tolist() == [0, 1, 2]
    assert [entry.name for entry in path.parent.iterdir()] == ["array.npz"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """An error in the middle of the writing is the caller's; the file is as it was."""
    path = tmp_path / "file.txt"
    write_whole(path, "old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_system_refuses_is_an_input_error_and_an_os_error(tmp_path: Path) -> None:
    """The command line shows it in one line, and code that expects an OSError still catches it."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnwritableFile, match=r"file/below\.txt cannot be written .*: make room there") as caught:
        write_whole(tmp_path / "file/below.txt", "text")
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, OSError)

    def no_room(aside: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UnwritableFile, match="No space left on device"):
        write_whole(tmp_path / "other", no_room)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """People link outputs to a larger disk."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "bank.pt"
    link.symlink_to(tmp_path / "disk/bank.pt")
    write_whole(link, "rows")
    assert link.is_symlink()
    assert (tmp_path / "disk/bank.pt").read_text() == "rows"


WRITER = """
import sys, time
from pathlib import Path
from lightning_dml.files import write_whole

def slowly(aside):
    aside.write_text(sys.argv[2])
    print("begun", flush=True)
    sys.stdin.readline()

write_whole(Path(sys.argv[1]), slowly)
"""


def _start(path: Path, text: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    """With one name for their parts, one would rename the other's half, and the other find nothing to rename."""
    path = tmp_path / "file.txt"
    first, second = _start(path, "first"), _start(path, "second")
    for process in (first, second):
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_killed_processes_can_be_deleted(tmp_path: Path) -> None:
    """A part that nobody will finish may be as large as a cache; other files' parts are not touched."""
    path, other = tmp_path / "file.txt", tmp_path / "file2.txt"
    for target in (path, other):
        process = _start(target, "half")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) != 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not path.exists()
    delete_parts(path)
    assert [entry.name.startswith(".file2.") for entry in tmp_path.iterdir()] == [True]


def test_parts_of_several_files_are_deleted_by_their_stems(tmp_path: Path) -> None:
    """A cache has another name with every change of its settings, and an attempt at an older one is as large."""
    names = [f".train-{key}.{'0' * 32}.part.images" for key in "ab"] + [f".test-a.{'0' * 32}.part.images"]
    for name in names:
        (tmp_path / name).touch()
    delete_parts(tmp_path / "train-c.images", stems="train-[a-z]")
    assert [entry.name for entry in tmp_path.iterdir()] == names[2:]


HOLD = """
import sys, time
from pathlib import Path
from lightning_dml.files import locked
with locked(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(1)
    Path(sys.argv[2]).touch()
"""


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    """One of several ranks builds a cache; the others would build it a second time."""
    lock, done = tmp_path / "new/.lock", tmp_path / "done"
    command = [sys.executable, "-c", HOLD, str(lock), str(done)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        with locked(lock):
            assert done.exists()


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_stops_nobody(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network drives have none, and the training is what the user came for; an error of the block is its own."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locked(tmp_path / ".lock"):
        (tmp_path / "file").touch()
    assert (tmp_path / "file").exists()
    with pytest.raises(KeyError), locked(tmp_path / ".lock"):
        raise KeyError
