"""Input that ApproximateIndex refuses, and the words with which it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightning_dml.retrieval.index.approximate as module
from lightning_dml.errors import InputError
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from tests.retrieval.index.cases import broken_rows, rows

BUILD_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "not a matrix": ({"gallery": torch.ones(3)}, r"gallery must have shape \(N, D\), got \(3,\)"),
    "integers": ({"gallery": torch.ones(3, 3).long()}, "gallery must be floating point, got torch.int64"),
    "empty": ({"gallery": rows(0)}, r"gallery is empty, got shape \(0, 8\); give at least one row"),
    "elsewhere": (
        {"gallery": torch.ones(3, 3, device="meta")},
        r"gallery must be on the CPU, .* got meta; move it with .cpu\(\)",
    ),
    "broken": ({"gallery": broken_rows()}, "gallery has NaN or infinite values in 2 of 100 rows, .* row 4;"),
    "metric": ({"metric": "dot"}, "metric must be one of inner_product, cosine, l2, got 'dot'"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "train_rows": ({"train_rows": 0}, "train_rows must be an integer of at least 1, got 0"),
    "train_rows is true": ({"train_rows": True}, "train_rows must be an integer of at least 1, got True"),
    "threads": ({"graph_threads": 0}, "graph_threads must be an integer of at least 1, got 0"),
    "nothing": ({"factory": ""}, "factory must be a faiss factory string such as 'IVF1024,Flat'.* got ''"),
    "no string": ({"factory": 3}, "factory must be a faiss factory string .* got 3"),
    "unknown": (
        {"factory": "Hello"},
        r"'Hello' is no faiss factory string for 8 dimensions \(could not parse index string Hello\); write one such",
    ),
    "unknown codes": ({"factory": "IVF4,Hello"}, "'IVF4,Hello' is no faiss factory string .*such as 'IVF1024,Flat'"),
    "huge number": ({"factory": "IVF99999999999999999999,Flat"}, "is no faiss factory string for 8 dimensions"),
    "no lists": ({"factory": "IVF0,Flat"}, "'IVF0,Flat' has 0 lists"),
    "lists": (
        {"factory": "IVF4096,Flat"},
        "'IVF4096,Flat' learns 4096 lists and needs at least 4096 training rows, got 100: give more rows, or take "
        "fewer lists, such as IVF2",
    ),
    "lists of a sample": (
        {"factory": "IVF64,Flat", "train_rows": 50},
        "'IVF64,Flat' learns 64 lists and needs at least 64 training rows, got 50: raise train_rows, or .* IVF1",
    ),
    "codes": (
        {"factory": "IVF2,PQ4"},
        r"'IVF2,PQ4' learns 2\*\*8 codes and needs at least 256 training rows, got 100: give .* as 4 in PQ8x4",
    ),
    "codes of a rotation": ({"factory": "OPQ4,PQ4x4"}, r"'OPQ4,PQ4x4' learns 2\*\*8 codes and .* 256 .* got 100"),
    "residual codes": ({"factory": "RQ2x7"}, r"'RQ2x7' learns 2\*\*7 codes and .* 128 training rows, got 100"),
    "pieces": (
        {"factory": "PQ3"},
        "'PQ3' cuts rows into a number of pieces that does not divide .* 8 .* must be one of 1, 2, 4, 8",
    ),
    "pieces of a rotation": ({"factory": "OPQ3,Flat"}, "'OPQ3,Flat' cuts rows .* one of 1, 2, 4, 8"),
    "l2 only": ({"factory": "LSH"}, "'LSH' cannot search by inner product or cosine; take metric='l2'"),
    "l2 only for cosine": ({"factory": "IMI2x4,Flat", "metric": "cosine"}, "'IMI2x4,Flat' cannot search by inner"),
    "l2 in secret": ({"factory": "HNSW8_PQ4x4"}, "'HNSW8_PQ4x4' cannot search by inner product or cosine"),
    "own numbers": ({"factory": "IDMap,Flat"}, "'IDMap,Flat' has no search by row; write one such as"),
    "no search": ({"factory": "Residual4x4,PQ4", "metric": "l2"}, "'Residual4x4,PQ4' has no search by row"),
    "faiss refuses": (
        {"factory": "PCA6,Flat", "gallery": rows(4)},
        "'PCA6,Flat' cannot be built from 4 rows of 8 dimensions, trained on 4: PCA matrix cannot output 6 dimensions",
    ),
    "unknown parameter": (
        {"factory": "IVF2,Flat", "parameters": "probes=3"},
        "parameters: index 'IVF2,Flat' has no parameter 'probes', got 'probes=3'; it has nprobe",
    ),
    "no parameters": (
        {"parameters": "nprobe=3"},
        "index 'Flat' has no parameter 'nprobe', got 'nprobe=3'; it has none",
    ),
    "no value": ({"parameters": "nprobe"}, "parameters must be names with numbers .*'nprobe=16'.* got 'nprobe'"),
    "no number": ({"parameters": "nprobe=x"}, "parameters must be names with numbers .* got 'nprobe=x'"),
    "no name": ({"parameters": "=3"}, "parameters must be names with numbers .* got '=3'"),
    "zero": ({"factory": "IVF2,Flat", "parameters": "nprobe=0"}, "numbers of at least 1, .* got 'nprobe=0'"),
    "endless": ({"factory": "IVF2,Flat", "parameters": "nprobe=inf"}, "numbers of at least 1, .* got 'nprobe=inf'"),
}


@pytest.mark.parametrize("case", BUILD_ERRORS)
def test_what_cannot_be_built_is_refused_with_the_way_out(case: str) -> None:
    """Faiss says it in terms of its source code, after an hour, or not at all."""
    changes, message = BUILD_ERRORS[case]
    arguments: dict[str, Any] = {"gallery": rows(100), "factory": "Flat", **changes}
    with pytest.raises(InputError, match=message):
        ApproximateIndex(**arguments)


def test_settings_are_checked_before_the_gallery_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a gallery of many millions even one pass takes long."""
    monkeypatch.setattr(module, "check_finite", lambda *_: pytest.fail("the gallery was read"))
    for factory, parameters in (("IVF4096,Flat", ""), ("PQ3", ""), ("Flat", "nprobe=2")):
        with pytest.raises(InputError):
            ApproximateIndex(rows(100), factory, parameters=parameters)


SEARCH_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "not a matrix": ({"queries": torch.ones(8)}, r"queries must have shape \(N, D\), got \(8,\)"),
    "dimensions": (
        {"queries": rows(5, 7)},
        r"queries must have shape \(N, 8\), got \(5, 7\); all embeddings must come from embedders of the same",
    ),
    "broken": ({"queries": broken_rows()}, "queries has NaN or infinite values in 2 of 100 rows"),
    "overflow": (
        {"queries": rows(5) * 1e38},
        r"queries: \d rows.* have products with the gallery that overflow float32",
    ),
    "k of zero": ({"k": 0}, "k must be an integer of at least 1, got 0"),
    "k no integer": ({"k": 2.0}, "k must be an integer of at least 1, got 2.0"),
    "query keys": (
        {"exclude": [(torch.arange(4), torch.arange(100))]},
        r"exclude, query keys must have shape \(5,\), one for each row of queries, got \(4,\)",
    ),
    "gallery keys": (
        {"exclude": [(torch.arange(5), torch.arange(100.0))]},
        "exclude, gallery keys must be integers, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", SEARCH_ERRORS)
@pytest.mark.parametrize("recall", [False, True])
def test_searches_are_checked(case: str, recall: bool) -> None:
    """Faiss reads as many floats as the index has dimensions, whatever it is given."""
    changes, message = SEARCH_ERRORS[case]
    gallery = rows(100) * 100
    index = ApproximateIndex(gallery, "Flat")
    arguments: dict[str, Any] = {"queries": rows(5), "k": 2, **changes}
    with pytest.raises(InputError, match=message):
        index.recall(gallery=gallery, **arguments) if recall else index.search(**arguments)


def test_recall_needs_the_gallery_and_something_to_find() -> None:
    """Over other rows, or over nothing, a share means nothing."""
    gallery = rows(20)
    index = ApproximateIndex(gallery, "Flat")
    with pytest.raises(InputError, match=r"gallery has shape \(19, 8\) and the index holds \(20, 8\); give the rows"):
        index.recall(rows(3), 2, gallery[1:])
    with pytest.raises(InputError, match="gallery has NaN"):
        index.recall(rows(3), 2, broken_rows()[:20])
    with pytest.raises(InputError, match="0 queries have no candidate"):
        index.recall(rows(0), 2, gallery)
    ones = torch.ones(20).long()
    with pytest.raises(InputError, match="3 queries have no candidate in the gallery; give others, or exclude less"):
        index.recall(rows(3), 2, gallery, [(ones[:3], ones)])
