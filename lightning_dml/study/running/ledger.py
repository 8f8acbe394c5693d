"""The book of a study: every training exactly once, whoever starts, dies or comes late.

A trial is an Optuna trial with the training's key and the number of the attempt; its parameters are the variants and
the seed, for Optuna's own tools. The grid is entered here and not drawn by Optuna's GridSampler, which hands out what
other workers are still at when nothing else is left. Three rules make it exact, and none of them needs a lock that a
dead worker could hold:

* Of the trials with the same key and attempt the one with the lowest number counts. Numbers grow with the commits of
  the storage, so once a worker has seen a trial no lower one can appear. Workers that start at once may both enter a
  training; the later entry is struck out and never runs.
* A worker claims a trial by turning it from waiting to running, which the storage lets one of them do.
* A trial that ended has ended: Optuna refuses to change it. A worker that seems dead has its trial ended as lost, and
  the next attempt is entered. If it lives after all, it finds its trial ended and stops.

So a training has one attempt that counts and completed, at most.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_dml import __version__
from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import Run
from lightning_dml.study.running.alive import is_alive, own_identity
from lightning_dml.study.running.storage import needed

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

BASE = "base config"


class Lost(Exception):
    """The trial has been ended by somebody else, who took its worker for dead."""


@dataclass(frozen=True)
class Entry:
    """The latest attempt at a training, or the one that completed.

    Args:
        key: of the training.
        attempt: 1 for the first.
        state: waiting, running, finished, failed (by an error of its own) or lost.
        number: of the trial in the storage.
        attributes: what was noted: `result`, `error`, `owner`, `beat`.
    """

    key: str
    attempt: int
    state: str
    number: int
    attributes: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class _Sign:
    """A sign of life, since when it is the same by this host's clock, and whether it has ever changed here."""

    sign: object
    since: float
    renewed: bool = False


def is_there(storage: BaseStorage, name: str) -> bool:
    """True if the storage has the study; asking does not make it."""
    return any(study.study_name == name for study in storage.get_all_studies())


class Ledger:
    """Reads and writes the trials of one study.

    Args:
        storage: from `open_storage`.
        name: of the study.
        mode: max or min, for Optuna's own tools.
        lease: seconds without a sign of life after which a worker on another host counts as dead.
    """

    def __init__(self, storage: BaseStorage, name: str, mode: str, lease: float) -> None:
        self.storage = storage
        self.name = name
        self.lease = lease
        self._optuna = needed("optuna")
        directions = self._optuna.study.StudyDirection
        direction = directions.MAXIMIZE if mode == "max" else directions.MINIMIZE
        try:
            self._study = storage.create_new_study([direction], name)
        except self._optuna.exceptions.DuplicatedStudyError:
            self._study = storage.get_study_id_from_name(name)
        self._seen: dict[int, _Sign] = {}

    def pin(self, base: Mapping[str, Any], begin: bool = True) -> None:
        """Ties the study to its base config.

        Args:
            base: what of the base config makes one training another.
            begin: whether this may be the study's beginning; if not, a study without a base is left as it is.

        Raises:
            InputError: if the study has been run with another one, naming an option that differs.
        """
        attributes = self.storage.get_study_user_attrs(self._study)
        if BASE not in attributes:
            if not begin:
                return
            self.storage.set_study_user_attr(self._study, BASE, dict(base))
            attributes = self.storage.get_study_user_attrs(self._study)
        differing = _difference(attributes[BASE], json.loads(json.dumps(base)))
        if differing:
            raise InputError(
                f"base has changed since the study {self.name} began, at {differing}: its trials would not be "
                "comparable; change it back, or give the study another name to begin anew"
            )

    def entries(self) -> dict[str, Entry]:
        """The entry that counts of each training that has been entered."""
        latest: dict[str, Entry] = {}
        for entry, _ in self._counting().values():
            newest = latest.get(entry.key)
            if newest is None or (newest.state != "finished" and entry.attempt > newest.attempt):
                latest[entry.key] = entry
        return latest

    def enter(self, runs: Sequence[Run], retry_failed: bool = False) -> None:
        """Enters each training that is not there, and the next attempt at each that was lost (or has failed)."""
        again = {"lost", "failed"} if retry_failed else {"lost"}
        entries = self.entries()
        due = [run for run in runs if (entry := entries.get(run.key)) is None or entry.state in again]
        distributions = self._distributions(runs) if due else {}
        for run in due:
            attributes = {
                "key": run.key,
                "attempt": entries[run.key].attempt + 1 if run.key in entries else 1,
                "point": dict(run.point.choice),
                "seed": run.seed,
                "version": __version__,
            }
            parameters = _parameters(run)
            trial = self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.WAITING,
                user_attrs=attributes,
                params={name: parameters[name] for name in distributions},
                distributions=distributions,
            )
            self.storage.create_new_trial(self._study, template_trial=trial)
        self._strike_out()

    def claim(self, runs: Sequence[Run]) -> Entry | None:
        """Takes the first of the trainings that waits, for this process alone; None when none waits."""
        entries = self.entries()
        for run in runs:
            entry = entries.get(run.key)
            if entry is None or entry.state != "waiting":
                continue
            try:
                if self.storage.set_trial_state_values(self._id(entry), self._optuna.trial.TrialState.RUNNING):
                    self.storage.set_trial_user_attr(self._id(entry), "owner", own_identity())
                    return entry
            except self._optuna.exceptions.UpdateFinishedTrialError:
                continue
        return None

    def recover(self, runs: Sequence[Run]) -> bool:
        """Ends the trials of dead workers as lost and enters their next attempts.

        Returns:
            Whether every running trial has been seen to be alive, here or by its signs of life.
        """
        keys = {run.key for run in runs}
        alive = True
        for entry in self.entries().values():
            if entry.state != "running" or entry.key not in keys:
                continue
            verdict = self._verdict(entry)
            if verdict is False:
                self._end(entry, self._optuna.trial.TrialState.FAIL)
            alive = alive and verdict is True
        self.enter(runs)
        return alive

    def beat(self, entry: Entry) -> None:
        """Gives a sign of life.

        Raises:
            Lost: if the trial has been given to another worker.
        """
        self._note(entry, "beat", time.time())

    def release(self, entry: Entry) -> None:
        """Puts the trial back to waiting, to be continued by anyone."""
        try:
            self._note(entry, "owner", None)
            self.storage.set_trial_state_values(self._id(entry), self._optuna.trial.TrialState.WAITING)
        except (Lost, self._optuna.exceptions.UpdateFinishedTrialError):
            pass

    def finish(self, entry: Entry, value: float, result: Mapping[str, Any]) -> None:
        """Enters the result of a training, once and for all.

        Raises:
            Lost: if the trial has been given to another worker, whose result will count.
        """
        self._note(entry, "result", dict(result))
        if not self._end(entry, self._optuna.trial.TrialState.COMPLETE, [value]):
            raise Lost

    def fail(self, entry: Entry, error: str, result: Mapping[str, Any] | None = None) -> None:
        """Enters that a training failed, and why; it is not tried again unless somebody asks for it.

        Raises:
            Lost: if the trial has been given to another worker.
        """
        self._note(entry, "result", dict(result or {}))
        self._note(entry, "error", error)
        if not self._end(entry, self._optuna.trial.TrialState.FAIL):
            raise Lost

    def _distributions(self, runs: Sequence[Run]) -> dict[str, Any]:
        """The choices of the trials' parameters, without those that the study has had otherwise, as Optuna refuses."""
        values: dict[str, dict[Any, None]] = defaultdict(dict)
        for run in runs:
            for name, value in _parameters(run).items():
                values[name][value] = None
        wanted = {
            name: self._optuna.distributions.CategoricalDistribution([*choices]) for name, choices in values.items()
        }
        trials = self.storage.get_all_trials(self._study, deepcopy=False)
        before = {name: choices for trial in trials for name, choices in trial.distributions.items()}
        return {name: choices for name, choices in wanted.items() if before.get(name, choices) == choices}

    def _counting(self) -> dict[tuple[str, int], tuple[Entry, list[FrozenTrial]]]:
        """The trials by key and attempt: the one that counts and those that do not."""
        counting: dict[tuple[str, int], tuple[Entry, list[FrozenTrial]]] = {}
        trials = self.storage.get_all_trials(self._study, deepcopy=False)
        for trial in sorted(trials, key=lambda trial: trial.number):
            attributes = trial.user_attrs
            if "key" not in attributes:
                continue  # somebody else's, put in by hand
            place = attributes["key"], attributes["attempt"]
            if place in counting:
                counting[place][1].append(trial)
            else:
                counting[place] = self._entry(trial), []
        return counting

    def _entry(self, trial: FrozenTrial) -> Entry:
        states = self._optuna.trial.TrialState
        names = {states.WAITING: "waiting", states.RUNNING: "running", states.COMPLETE: "finished"}
        state = names.get(trial.state, "failed" if "error" in trial.user_attrs else "lost")
        return Entry(trial.user_attrs["key"], trial.user_attrs["attempt"], state, trial.number, trial.user_attrs)

    def _id(self, entry: Entry) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._study, entry.number)

    def _strike_out(self) -> None:
        for counts, others in self._counting().values():
            for trial in others:
                if not trial.state.is_finished():
                    entry = self._entry(trial)
                    try:
                        self._note(entry, "instead", counts.number)
                    except Lost:
                        continue
                    self._end(entry, self._optuna.trial.TrialState.FAIL)

    def _verdict(self, entry: Entry) -> bool | None:
        """True if the worker of a running trial lives; None while that cannot be told."""
        owner, beat = entry.attributes.get("owner"), entry.attributes.get("beat")
        verdict = is_alive(owner)
        if verdict is not None:
            return verdict
        # By this host's own clock, as clocks of hosts differ: what counts is how long the sign of life is the same.
        now, sign = time.monotonic(), (owner, beat)
        last = self._seen.setdefault(entry.number, _Sign(sign, now))
        if last.sign != sign:
            last = self._seen[entry.number] = _Sign(sign, now, renewed=True)
        if now - last.since > self.lease:
            return False
        return True if last.renewed else None

    def _note(self, entry: Entry, key: str, value: Any) -> None:
        try:
            self.storage.set_trial_user_attr(self._id(entry), key, value)
        except self._optuna.exceptions.UpdateFinishedTrialError as error:
            raise Lost from error

    def _end(self, entry: Entry, state: Any, values: Sequence[float] | None = None) -> bool:
        try:
            return bool(self.storage.set_trial_state_values(self._id(entry), state, values))
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return False


def _parameters(run: Run) -> dict[str, Any]:
    """The parameters that Optuna's own tools show of a training."""
    return {"seed": run.seed, **run.point.choice}


def _difference(old: Any, new: Any, where: str = "") -> str:
    """Dotted path of one place at which two configs differ, with both values; empty when there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            difference = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if difference:
                return difference
        return ""
    return "" if old == new else f"{where} (was {old!r}, is {new!r})"
