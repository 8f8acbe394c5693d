"""Opening the storage that the workers of a study share, such that two of them never do one thing."""

from __future__ import annotations

import importlib
import random
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_dml.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

SQLITE, JOURNAL = ("sqlite:", "sqlite+"), "journal:"
LOCK_SECONDS = 60  # how long a worker waits for another's transaction on one SQLite file
OPENINGS = 20


def needed(name: str) -> ModuleType:
    """A package of the extra `study`.

    Raises:
        InputError: naming the extra, where the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise InputError(f"study needs the package {name}: pip install 'lightning-dml[study]'") from error


def exists(storage: str) -> bool:
    """True where there may be something in the storage; False only for a file that is not there."""
    path = _file(storage)
    return path is None or path.exists()


def open_storage(storage: str) -> BaseStorage:
    """Opens `sqlite:///FILE`, another SQLAlchemy URL, or `journal:FILE`, and makes what is not there.

    Raises:
        InputError: for anything else, for a database that cannot be reached, and without Optuna.
    """
    optuna = needed("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = _file(storage)
    if path is not None:
        if path.name in ("", ":memory:") or "mode=memory" in storage or path.is_dir():
            raise InputError(f"storage must name a file that all workers can open, got {storage!r}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"storage {storage} cannot be made: {error}") from error
    if storage.startswith(JOURNAL):
        journal = needed("optuna.storages.journal")
        opened: BaseStorage = journal.JournalStorage(journal.JournalFileBackend(str(path)))
        return opened
    if "://" not in storage:
        raise InputError(
            f"storage must be an SQLAlchemy URL such as sqlite:///runs/study.db or postgresql://USER@SERVER/DATABASE, "
            f"or journal:FILE, got {storage!r}"
        )
    return _open_database(storage, optuna)


def _open_database(storage: str, optuna: ModuleType) -> BaseStorage:
    errors = needed("sqlalchemy.exc")
    options: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if storage.startswith(SQLITE) else {}
    for opening in range(OPENINGS):
        try:
            opened: RDBStorage = optuna.storages.RDBStorage(storage, engine_kwargs=options)
            break
        except ImportError as error:
            raise InputError(f"storage {storage.partition('://')[0]}:// needs its driver: {error}") from error
        except errors.ArgumentError as error:
            raise InputError(f"storage {storage!r} is no SQLAlchemy URL: {' '.join(str(error).split())}") from error
        # Workers that start at once all create the tables, and all but one find them there already.
        except (errors.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if opening == OPENINGS - 1:
                cause = " ".join(str(error).split())[:300]
                raise InputError(f"storage {storage.rpartition('@')[2]} cannot be opened: {cause}") from error
            time.sleep(0.05 + 0.3 * random.random())
    if storage.startswith(SQLITE):
        _lock_for_reading_too(opened)
    return opened


def _lock_for_reading_too(storage: RDBStorage) -> None:
    """Makes a transaction take SQLite's write lock at its start.

    Optuna claims a waiting trial by reading its state and writing another, and relies on SELECT ... FOR UPDATE in
    between, which SQLite does not have: two workers may both read "waiting". The same holds for a trial's number.
    """
    event = needed("sqlalchemy.event")

    def own_transactions(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver would begin a transaction only at the first write

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.remove_session()
    storage.engine.dispose()
    event.listen(storage.engine, "connect", own_transactions)
    event.listen(storage.engine, "begin", begin)


def _file(storage: str) -> Path | None:
    if storage.startswith(JOURNAL):
        return Path(storage[len(JOURNAL) :])
    # sqlite:///FILE, also with a driver; with two slashes it names no file and is in memory.
    if storage.startswith(SQLITE) and "://" in storage:
        return Path(storage.partition("://")[2].partition("?")[0].partition("/")[2])
    return None
