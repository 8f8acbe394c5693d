"""Evaluation of a module: a metric for each data set, and ranks of which some may have no batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dml import distributed
from lightning_dml.errors import InputError, NothingToEvaluate
from lightning_dml.retrieval import RetrievalMetrics, RetrievalResult

# The arguments of `RetrievalMetrics.update` by the names that they have in a batch, which must have the first two.
_REQUIRED = {"label": "labels", "index": "indices"}
_COLUMNS = {**_REQUIRED, "is_query": "is_query", "is_gallery": "is_gallery", "group": "groups"}


class SetMetrics:
    """One evaluator for each of the data sets of a stage, all of them copies of one.

    Args:
        stage: `val` or `test`, which the keys begin with.
        template: the evaluator that each set gets a copy of, without the rows that it may hold.

    Attributes:
        results: of the last evaluation, with values per class, by the name of the set; "0" where there is one only.
    """

    def __init__(self, stage: str, template: RetrievalMetrics) -> None:
        self.stage = stage
        self.template = template
        self.results: dict[str, RetrievalResult] = {}
        self._evaluators: dict[int, RetrievalMetrics] = {}

    def __getitem__(self, number: int) -> RetrievalMetrics:
        """The evaluator of the set in that place, made when it is first asked for."""
        if number not in self._evaluators:
            self._evaluators[number] = empty_copy(self.template)
        return self._evaluators[number]

    def reset(self) -> None:
        """Forgets every row, those of an evaluation that was interrupted included."""
        self._evaluators.clear()

    def update(self, number: int, embeddings: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Adds a batch of the set in that place.

        Args:
            number: place of the set among those of the stage.
            embeddings: (B, D) floating point.
            batch: `label` and `index` (B,) int64; if there, `is_query` and `is_gallery` (B,) bool, `group` (B,) int64.

        Raises:
            InputError: without `label` or `index`, or for what `RetrievalMetrics.update` refuses.
        """
        self[number].update(embeddings, **evaluation_columns(batch))

    def compute(self, names: Sequence[str], sanity_check: bool = False) -> dict[str, float]:
        """The metrics of every set, by the keys that are logged; a collective that every rank must call.

        Args:
            names: of the sets, by place.
            sanity_check: the rows are those of the first few batches. Then the search is exact, as an index may take
                more rows than there are, nothing is warned of, and a set without queries or without gallery, of which
                these may come later, is left out.

        Returns:
            `STAGE/METRIC` for the first set; where there are several, also `STAGE/NAME/METRIC` for each of them.

        Raises:
            NothingToEvaluate: for a set without queries or without gallery, but in the sanity check.
            InputError: for what else `RetrievalMetrics.compute` refuses.
        """
        values: dict[str, float] = {}
        self.results = {}
        for number, name in enumerate(names):
            prefix = f"{self.stage}/{name}" if len(names) > 1 else self.stage
            try:
                of_set = self._compute_one(number, prefix, sanity_check)
            except NothingToEvaluate:  # raised by all ranks alike, so they go on together
                if not sanity_check:
                    raise
                continue
            if (result := self[number].result) is not None:
                self.results[name] = result
            if number == 0:
                values |= {f"{self.stage}/{metric}": value for metric, value in of_set.items()}
            values |= {f"{prefix}/{metric}": value for metric, value in of_set.items()}
        return values

    def _compute_one(self, number: int, prefix: str, sanity_check: bool) -> dict[str, float]:
        evaluator = self[number]
        if sanity_check:
            evaluator.options = replace(evaluator.options, index=None, index_parameters="")
        # Without its set in it, a warning of the second set would often be the same as that of the first, and Python
        # shows equal ones once.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = evaluator.compute()
        for warning in caught:
            if not (sanity_check and issubclass(warning.category, UserWarning)):
                warnings.warn(f"{prefix}: {warning.message}", warning.category, stacklevel=4)
        return values


def evaluation_columns(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of `RetrievalMetrics.update` from a batch, all but the embeddings, by name.

    Args:
        batch: see `SetMetrics.update`.

    Raises:
        InputError: without `label` or `index`.
    """
    if missing := [key for key in _REQUIRED if key not in batch]:
        raise InputError(
            f"batch has no {' and no '.join(map(repr, missing))}, only {', '.join(map(repr, batch))}: evaluation takes "
            "the class of each item as 'label' and its number in the data set as 'index', both (B,) int64; let the "
            "data set return them"
        )
    return {argument: batch[key] for key, argument in _COLUMNS.items() if key in batch}


def empty_copy(evaluator: RetrievalMetrics) -> RetrievalMetrics:
    """A copy of an evaluator without rows, which may be computed on a rank that adds none."""
    copied = copy.deepcopy(evaluator)
    copied.reset()
    # torchmetrics warns of a compute() before the first update().
    copied.update(torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
    return copied


class EvaluatedRows(NamedTuple):
    """The rows of an evaluation: embeddings with their identity and their roles."""

    embeddings: Tensor
    """(N, D) float."""
    labels: Tensor
    """(N,) int64."""
    indices: Tensor
    """(N,) int64, the sample indices; a padded sampler repeats some."""
    is_query: Tensor
    """(N,) bool."""
    is_gallery: Tensor
    """(N,) bool."""


def gathered_rows(evaluator: RetrievalMetrics) -> EvaluatedRows:
    """The rows that an evaluator has on all ranks, on the CPU; a collective. A rank may have none."""
    device = distributed.collective_device()
    own = evaluator.embeddings[0].shape[1] if evaluator.embeddings else 0
    dimensions = max(columns for (columns,) in distributed.gather_numbers([own], device))
    flags, whole = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    columns = (
        [torch.zeros(0, dimensions), *evaluator.embeddings],
        [whole, *evaluator.labels],
        [whole, *evaluator.indices],
        [flags, *evaluator.is_query],
        [flags, *evaluator.is_gallery],
    )
    return EvaluatedRows(*(distributed.gather_rows(torch.cat(column).to(device)).cpu() for column in columns))


def named_loaders(loaders: Any) -> dict[str, Any]:
    """The loaders of a stage by name, in the order in which Lightning numbers them.

    Args:
        loaders: one loader, or a list or a dict of them, which may be nested, as `trainer.val_dataloaders` has them.

    Returns:
        Keys of dicts and positions in lists; of nested ones, joined by a slash.

    Raises:
        InputError: if two of them have one name.
    """
    if not isinstance(loaders, Mapping | list | tuple):
        return {"0": loaders}
    named: dict[str, Any] = {}
    for key, inner in loaders.items() if isinstance(loaders, Mapping) else enumerate(loaders):
        nested = isinstance(inner, Mapping | list | tuple)
        for name, loader in (named_loaders(inner) if nested else {"": inner}).items():
            full = f"{key}/{name}" if nested else str(key)
            if full in named:
                raise InputError(f"dataloaders: two data sets are called {full!r}; give each a name of its own")
            named[full] = loader
    return named
