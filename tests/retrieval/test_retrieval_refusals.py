"""Settings and input that RetrievalMetrics refuses, and the words with which it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dml.errors import InputError, NothingToEvaluate
from lightning_dml.retrieval import RetrievalMetrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": ()}, r"ks must be one or more integers of at least 1, got \(\)"),
        ({"ks": [1, 0]}, r"ks must be .* got \[1, 0\]"),
        ({"ks": (1, 2.0)}, r"ks must be .* got \(1, 2.0\)"),
        ({"metric": "dot"}, "metric must be one of inner_product, cosine, l2, got 'dot'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """A wrong K or metric is found when the metric is made, not after the first epoch."""
    with pytest.raises(InputError, match=message):
        RetrievalMetrics(**settings)


def with_nans() -> Tensor:
    """Two broken rows among good ones, to be counted and located."""
    rows = torch.ones(6, 2)
    rows[2, 0], rows[5, 1] = float("nan"), float("inf")
    return rows


LABELS = torch.zeros(6, dtype=torch.int64)
UPDATE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN rows": ({"embeddings": with_nans()}, "embeddings has NaN or infinite values in 2 of 6 rows, .* row 2;"),
    "one row as a vector": (
        {"embeddings": torch.ones(6)},
        r"embeddings must have shape \(N, D\), got \(6,\)",
    ),
    "integer rows": ({"embeddings": torch.ones(6, 2).int()}, "embeddings must be floating point, got torch.int32"),
    "too few labels": (
        {"labels": LABELS[:5]},
        r"labels must have shape \(6,\), one for each row of embeddings, got \(5,\)",
    ),
    "labels as a column": ({"labels": LABELS[:, None]}, r"labels must have shape \(6,\).* got \(6, 1\)"),
    "float labels": ({"labels": LABELS.float()}, "labels must be integers, got torch.float32"),
    "bool labels": ({"labels": LABELS.bool()}, "labels must be integers, got torch.bool"),
    "too few indices": ({"indices": LABELS[:5]}, r"indices must have shape \(6,\)"),
    "float indices": ({"indices": LABELS.double()}, "indices must be integers, got torch.float64"),
    "negative indices": ({"indices": LABELS - 1}, "indices must be 0 or more, got -1"),
    "integer roles": ({"is_query": LABELS}, "is_query must be bool, got torch.int64"),
    "too few roles": ({"is_gallery": LABELS[:5].bool()}, r"is_gallery must have shape \(6,\)"),
}


@pytest.mark.parametrize("case", UPDATE_ERRORS)
def test_updates_are_checked_and_a_refused_one_leaves_no_trace(case: str) -> None:
    """Half an update would shift labels against embeddings for the rest of the epoch."""
    changes, message = UPDATE_ERRORS[case]
    metrics = RetrievalMetrics(ks=(1,))
    arguments: dict[str, Any] = {"embeddings": torch.ones(6, 2), "labels": LABELS, **changes}
    with pytest.raises(InputError, match=message):
        metrics.update(**arguments)
    assert not any(metrics.metric_state.values())


def test_batches_must_agree() -> None:
    """Batches with and without indices cannot be told apart later, so the second one is refused."""
    metrics = RetrievalMetrics()
    metrics.update(torch.ones(6, 2), LABELS)
    with pytest.raises(InputError, match="indices were given to some updates only"):
        metrics.update(torch.ones(6, 2), LABELS, torch.arange(6))
    with pytest.raises(InputError, match="embeddings have 3 dimensions, earlier batches 2; call reset"):
        metrics.update(torch.ones(6, 3), LABELS)
    metrics.reset()
    metrics.update(torch.ones(6, 3), LABELS, torch.arange(6))
    with pytest.raises(InputError, match="indices were given to some updates only"):
        metrics.update(torch.ones(6, 3), LABELS)


def test_compute_on_nothing() -> None:
    """An empty validation loader is a mistake to be told of, not a recall of 0."""
    metrics = RetrievalMetrics()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(InputError, match="has seen none"):
        metrics.compute()
    metrics.update(torch.ones(0, 4), LABELS[:0])
    with pytest.raises(InputError, match=r"has seen none on any rank; call update\(\) before compute\(\)"):
        metrics.compute()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is_query", "is_query is False for all 3 items, so there is nothing to search for; evaluate queries and"),
        ("is_gallery", "is_gallery is False for all 3 items, so there is no gallery; evaluate queries and gallery"),
    ],
)
def test_no_queries_and_no_gallery_are_named(name: str, message: str) -> None:
    """A loader of queries alone is a mistake in the data module; NaN would send people to look for it in the model."""
    metrics = RetrievalMetrics()
    metrics.update(torch.eye(3), torch.zeros(3).long(), **{name: torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(NothingToEvaluate, match=message):
        metrics.compute()


@pytest.mark.parametrize("what", ["label", "query", "gallery"])
def test_one_index_for_two_items_is_refused(what: str) -> None:
    """Merged by index, different items would vanish from the evaluation."""
    # As two dataloaders do that each count from 0: dropped as duplicates, half of the items would be gone.
    labels, is_query, is_gallery = torch.tensor([0, 0, 1]), torch.ones(3).bool(), torch.ones(3).bool()
    metrics = RetrievalMetrics()
    metrics.update(torch.eye(3), labels, torch.tensor([7, 4, 5]), is_query, is_gallery)
    {"label": labels, "query": is_query, "gallery": is_gallery}[what][1] ^= True
    metrics.update(torch.eye(3), labels, torch.tensor([7, 4, 5]), is_query, is_gallery)
    with pytest.raises(InputError, match=r"index 4 came with different labels, roles or groups \(1 such"):
        metrics.compute()
