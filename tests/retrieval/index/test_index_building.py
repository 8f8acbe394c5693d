"""The building of an ApproximateIndex: blocks, seeds, training rows, threads, warnings and parameters."""

from __future__ import annotations

import warnings
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor

import lightning_dml.retrieval.index.approximate as module
from lightning_dml.errors import InputError
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from tests.retrieval.index.cases import METRICS, rows, state


@pytest.mark.parametrize("metric", METRICS)
def test_a_half_precision_gallery_is_converted_by_blocks(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 copy of a gallery of many millions is what half precision is to avoid."""
    gallery = rows(500).half()
    expected = state(ApproximateIndex(gallery.float(), "IVF4,SQ8", metric, train_rows=200))
    converted: list[int] = []
    original = ApproximateIndex._prepared

    def prepared(self: ApproximateIndex, part: Tensor) -> Tensor:
        converted.append(len(part))
        return original(self, part)

    monkeypatch.setattr(ApproximateIndex, "_prepared", prepared)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 8 * 60)
    assert state(ApproximateIndex(gallery, "IVF4,SQ8", metric, train_rows=200)) == expected
    assert converted == [200, *[60] * 8, 20]


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "HNSW8", "PQ2x4", "OPQ2_4,PQ2x4", "RQ2x4", "NSG8"])
@pytest.mark.filterwarnings("ignore:factory 'OPQ2")
def test_a_seed_gives_one_index(factory: str) -> None:
    """An experiment that is run again must find the same neighbours, whatever the state of the global generators."""
    gallery = rows(700, 4)
    first = ApproximateIndex(gallery, factory, "l2", seed=3, train_rows=650)
    torch.manual_seed(99)
    assert state(first) == state(ApproximateIndex(gallery, factory, "l2", seed=3, train_rows=650))


@pytest.mark.parametrize("train_rows", [400, None])
def test_seeds_differ(train_rows: int | None) -> None:
    """A seed that does nothing would hide how much the choice of training rows and first centroids matters."""
    built = [ApproximateIndex(rows(500), "IVF8,Flat", seed=seed, train_rows=train_rows) for seed in (1, 2)]
    assert state(built[0]) != state(built[1])


def test_it_trains_on_rows_from_all_over_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Galleries are sorted by class: the first rows alone would make lists for a few classes."""
    gallery = torch.arange(70_000.0)[:, None].repeat(1, 2)
    samples: list[Tensor] = []
    original = faiss.IndexIVFFlat.train

    def train(self: Any, sample: Any) -> None:
        samples.append(torch.from_numpy(sample).clone())
        original(self, sample)

    monkeypatch.setattr(faiss.IndexIVFFlat, "train", train)
    for train_rows in (1000, None, 10**6):
        ApproximateIndex(gallery, "IVF4,Flat", "l2", train_rows=train_rows)
    assert [len(sample) for sample in samples] == [1000, 65_536, 70_000]
    for sample in samples:
        numbers = sample[:, 0]
        assert len(set(numbers.tolist())) == len(numbers)
        assert numbers.mean() == pytest.approx(35_000, rel=0.1)


def test_a_graph_is_linked_by_one_thread_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links depend on the order in which threads come to the nodes; other indexes need not pay for that."""
    faiss.omp_set_num_threads(2)
    threads: list[int] = []
    for kind in (faiss.IndexHNSWFlat, faiss.IndexIVFFlat):

        def add(self: Any, block: Any, original: Any = kind.add) -> None:
            threads.append(faiss.omp_get_max_threads())
            original(self, block)

        monkeypatch.setattr(kind, "add", add)
    gallery = rows(200)
    ApproximateIndex(gallery, "HNSW8")
    ApproximateIndex(gallery, "HNSW8", graph_threads=2)
    ApproximateIndex(gallery, "IVF2,Flat")
    ApproximateIndex(gallery, "IVF2_HNSW8,Flat")
    assert threads == [1, 2, 2, 2]
    assert faiss.omp_get_max_threads() == 2


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,PQ4x4", "PQ4x4", "OPQ4,PQ4x4", "RQ2x4"])
def test_few_training_rows_are_said_once_and_by_us(factory: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Faiss prints a line for each of its k-means, hundreds for OPQ, and no filter reaches them."""
    with pytest.warns(UserWarning, match=f"factory '{factory}' learns .* from 300 training rows; below 39") as caught:
        ApproximateIndex(rows(300), factory)
    assert len(caught) == 1 and caught[0].filename == __file__
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_enough_training_rows_are_not_worth_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """A warning that always comes is not read; and with it switched off wrongly, that of faiss would show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = ApproximateIndex(rows(39 * 16), "IVF4,PQ4x4")
    assert capfd.readouterr().err == ""
    assert index._index.cp.min_points_per_centroid == 39


@pytest.mark.filterwarnings("ignore:factory 'PCA6")
def test_repr_and_length_say_what_it_is() -> None:
    """A kept index is recognised by its settings, those set later included."""
    index = ApproximateIndex(rows(100), "PCA6,IVF4,PQ3x4,RFlat", "l2", " nprobe = 2, k_factor_rf=3,")
    index.parameters = "nprobe=4"
    assert len(index) == 100
    assert repr(index) == (
        "ApproximateIndex('PCA6,IVF4,PQ3x4,RFlat', metric='l2', parameters='nprobe=4,k_factor_rf=3', rows=100, "
        "dimensions=8)"
    )


def test_refused_parameters_leave_the_others_as_they_were() -> None:
    """Half of a string set and the other half refused would search otherwise than `parameters` says."""
    index = ApproximateIndex(rows(200), "IVF4,Flat", parameters="nprobe=2")
    with pytest.raises(InputError, match="no parameter 'efSearch'"):
        index.parameters = "nprobe=4,efSearch=3"
    assert index.parameters == "nprobe=2" and index._index.nprobe == 2
