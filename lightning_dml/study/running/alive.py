"""Who a worker is, and whether the worker that somebody else noted down is still alive."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def own_identity() -> dict[str, Any]:
    """This process, such that no other process of any host or container is taken for it."""
    return {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(identity: Any) -> bool | None:
    """True if the process lives; None where this host cannot tell, as for a process of another host."""
    machine = _machine()
    if not isinstance(identity, dict) or machine is None or identity.get("machine") != machine:
        return None
    started = _started(int(identity["pid"]))
    return started is not None and started == identity["started"]


def _machine() -> str | None:
    """One boot of one kernel and one space of process ids: containers may share a host's name, and have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When the process started, in ticks since the boot; None if there is no such process, or it is a dead one."""
    try:
        # The second field is the name, in parentheses, which may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
