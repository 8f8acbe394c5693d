"""Several workers of a study as processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

from lightning_dml.errors import InputError
from lightning_dml.study.running.worker import heard


def run_workers(command: Sequence[str], workers: int, first: Sequence[str] = ()) -> tuple[int | None, list[str]]:
    """Runs the command so many times at once, to the end of all.

    A signal that asks a job to end is passed on as SIGTERM.

    Args:
        command: of one worker.
        workers: how many.
        first: further arguments of the first one.

    Returns:
        The signal that ended them, if one did; and how each ended that did not end well, such as "worker 2 ended by
        SIGKILL".

    Raises:
        InputError: if a worker refused its input.
    """
    came: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, _: object) -> None:
        came.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in heard()}
    try:
        for place in range(workers):
            if not came:
                further = list(first) if place == 0 else []
                processes.append(subprocess.Popen([*command, *further], env=_environment(place, workers)))
        statuses = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        return came[0], []
    if any(status == 2 for status in statuses):
        raise InputError("a worker could not go on; its message stands above")
    ended = [
        f"worker {number} ended " + (f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}")
        for number, status in enumerate(statuses, 1)
        if status
    ]
    return None, ended


def _environment(place: int, workers: int) -> dict[str, str]:
    """The environment of one local worker: a GPU of its own while there are some, and its share of the cores."""
    import torch  # takes seconds, which only the process that starts the others needs to spend

    from lightning_dml.cores import cores

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    devices = devices or [str(device) for device in range(torch.cuda.device_count())]
    if len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    return environment
