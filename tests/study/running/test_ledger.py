"""The book of a study: claims, lost trials and double entries, on SQLite and on a journal."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_dml.study.plan.grid import Run, points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile
from lightning_dml.study.running.ledger import Entry, Ledger, Lost, is_there
from lightning_dml.study.running.storage import open_storage
from tests.study.running.cases import POINTS, STUDY


def test_sqlite_lets_one_of_two_claims_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna reads a trial's state and then writes it: without a lock for both, two workers train the same."""
    url, running = f"sqlite:///{tmp_path}/study.db", optuna.trial.TrialState.RUNNING
    mine, other = open_storage(url), open_storage(url)
    study = mine.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "claims")
    waiting = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
    trial = mine.create_new_trial(study, template_trial=waiting)
    claims: list[bool] = []
    rival = threading.Thread(target=lambda: claims.append(other.set_trial_state_values(trial, running)))
    check = mine.check_trial_is_updatable

    def after_reading(*args: Any) -> None:
        rival.start()
        rival.join(0.5)
        check(*args)

    monkeypatch.setattr(mine, "check_trial_is_updatable", after_reading)
    claimed = mine.set_trial_state_values(trial, running)
    rival.join()
    assert claimed is True and claims == [False]


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.journal"])
def ledgers(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[float], Ledger]:
    """Makes ledgers of one study, each with a connection of its own."""
    storage = request.param.format(tmp_path)
    return lambda lease: Ledger(open_storage(storage), "ledger", "max", lease)


def grid(folder: Path) -> list[Run]:
    """The trainings of the study of this file."""
    (folder / "grid.yaml").write_text(json.dumps(STUDY))
    study = StudyFile.read(folder / "grid.yaml")
    return runs_of(study, points_of(study))


def test_a_worker_that_gives_no_sign_of_life_loses_its_trial(
    ledgers: Callable[[float], Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host only the signs of life tell; a worker that was only suspended must not end the trial twice."""
    runs = grid(tmp_path)
    monkeypatch.setattr("lightning_dml.study.running.ledger.is_alive", lambda _: None)
    suspended, other = ledgers(1000), ledgers(0.3)
    suspended.enter(runs)
    mine = suspended.claim(runs)
    assert mine is not None
    suspended.beat(mine)
    assert other.recover(runs) is False  # seen once, which tells nothing
    time.sleep(0.2)
    suspended.beat(mine)
    assert other.recover(runs) is True
    assert other.recover(runs) is True  # between two signs of life too, or several workers would never all be alive
    time.sleep(0.4)
    other.recover(runs)
    entry = other.entries()[mine.key]
    assert (entry.state, entry.attempt) == ("waiting", 2)
    for late in (suspended.beat, lambda it: suspended.finish(it, 0.5, {}), lambda it: suspended.fail(it, "late")):
        with pytest.raises(Lost):
            late(mine)
    taken = other.claim(runs)
    assert taken is not None and (taken.key, taken.attempt) == (mine.key, 2)
    suspended.release(mine)
    assert other.entries()[mine.key].state == "running"
    other.finish(taken, 0.25, {"metrics": {}})
    suspended.enter(runs)
    assert suspended.entries()[mine.key].state == "finished"


def test_asking_for_a_study_does_not_make_it(ledgers: Callable[[float], Ledger]) -> None:
    """On a server that many studies share, a dry run left an empty one behind, and its report was an empty table."""
    storage = ledgers(1).storage
    assert is_there(storage, "ledger") and not is_there(storage, "other")
    assert [study.study_name for study in storage.get_all_studies()] == ["ledger"]


def test_optunas_own_tools_see_the_variants(ledgers: Callable[[float], Ledger], tmp_path: Path) -> None:
    """A dashboard of trials without parameters shows nothing; and a study that grows must not be refused for them."""
    runs = grid(tmp_path)
    ledgers(10).enter(runs[::2])
    ledger = ledgers(10)
    ledger.enter(runs)
    for run in runs:
        entry = ledger.claim([run])
        assert entry is not None
        ledger.finish(entry, float(run.key == runs[-1].key), {})
    study = optuna.load_study(study_name="ledger", storage=ledger.storage)
    assert sorted(trial.user_attrs["key"] for trial in study.trials) == sorted(run.key for run in runs)
    shown = {trial.user_attrs["key"]: trial.params for trial in study.trials}
    first = {run.key for run in runs[::2]}
    whole = {run.key: {"seed": run.seed, **run.point.choice} for run in runs}
    assert all(shown[key] == whole[key] for key in first)
    # What has other choices than before is left out, as Optuna holds a parameter to those that it began with.
    assert all(shown[key].items() <= whole[key].items() for key in shown)
    assert study.best_trial.user_attrs["point"] == runs[-1].point.choice


def test_a_training_that_was_entered_twice_counts_once(ledgers: Callable[[float], Ledger], tmp_path: Path) -> None:
    """Workers that start at once enter everything twice: the first entries count, the others never run."""
    runs = grid(tmp_path)
    one, other = ledgers(60), ledgers(60)
    plain = other.entries
    other.entries = dict  # type: ignore[method-assign]
    one.enter(runs)
    other.enter(runs)
    other.entries = plain  # type: ignore[method-assign]
    claimed: list[Entry] = []
    while entry := (one if len(claimed) % 2 else other).claim(runs):
        claimed.append(entry)
    assert Counter(entry.key for entry in claimed) == dict.fromkeys((run.key for run in runs), 1)
    assert sorted(entry.number for entry in claimed) == list(range(POINTS))
    states = Counter(trial.state.name for trial in one.storage.get_all_trials(one._study))
    assert states == {"RUNNING": POINTS, "FAIL": POINTS}
