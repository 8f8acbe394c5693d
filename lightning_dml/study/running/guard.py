"""Runs one command and sees to its end: when whoever started the guard dies, even by SIGKILL, the command dies too.

    python -m lightning_dml.study.running.guard COMMAND [ARGUMENT ...]

The guard's standard input is a pipe that only the worker holds open. A trial that outlived its worker would go on
writing into the folder in which another worker repeats it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Runs `command` and returns its status; the guard leads a process group of its own, which ends with the pipe."""
    # The worker ends a trial by a signal to the whole group; the guard stays to tell how the command ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_with_the_pipe() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
