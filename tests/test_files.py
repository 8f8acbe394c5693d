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

from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile, delete_parts, write_whole


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
