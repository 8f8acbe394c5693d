"""Scores of clusterings against loops, permutations and scikit-learn; k-means against one run of faiss."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
from collections import Counter
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval import clustering
from lightning_dml.retrieval.clustering import (
    adjusted_mutual_information,
    kmeans_labels,
    normalized_mutual_information,
)
from tests.helpers import LargestTensor

# scikit-learn takes many small clusters for a regression target.
pytestmark = pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%")

NAMES = [0, -1, 1, 2**24, 2**24 + 1, 2**63 - 1, -(2**63)]


def slow_information(labels: list[int], clusters: list[int]) -> float:
    """Mutual information by its definition, one pair of class and cluster at a time."""
    total = len(labels)
    information = 0.0
    for a in set(labels):
        for b in set(clusters):
            both = sum(1 for pair in zip(labels, clusters, strict=True) if pair == (a, b))
            if both:
                information += both / total * math.log(total * both / (labels.count(a) * clusters.count(b)))
    return information


def slow_mean_entropy(labels: list[int], clusters: list[int]) -> float:
    """Mean of the two entropies, since the information of a partition about itself is its entropy."""
    return (slow_information(labels, labels) + slow_information(clusters, clusters)) / 2


def within_clusters(rows: Tensor, clusters: Tensor) -> float:
    """Sum that k-means minimises: squared distances of the rows to the means of their clusters, in float64."""
    members = [rows.double()[clusters == cluster] for cluster in torch.unique(clusters)]
    return sum(float((rows_of_cluster - rows_of_cluster.mean(dim=0)).square().sum()) for rows_of_cluster in members)


def blobs(clusters: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around far corners, and the number of each row's corner."""
    labels = torch.arange(clusters * size) % clusters
    noise = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return torch.eye(8)[labels] * 5 + 0.1 * noise, labels


@st.composite
def partitions(draw: st.DrawFn, most: int) -> tuple[list[int], list[int]]:
    """Two partitions of the same 1 to `most` items, with names that float32 or an index could not hold."""
    size = draw(st.integers(1, most))
    first = draw(st.lists(st.sampled_from(NAMES), min_size=size, max_size=size))
    second = draw(st.lists(st.sampled_from(NAMES), min_size=size, max_size=size))
    return first, second


@given(both=partitions(most=12))
def test_nmi_equals_its_definition(both: tuple[list[int], list[int]]) -> None:
    """Equal names under int64 must stay equal, and different ones different; float32 merges 2**24 and 2**24 + 1."""
    labels, clusters = both
    value = normalized_mutual_information(torch.tensor(labels), torch.tensor(clusters))
    most = slow_mean_entropy(labels, clusters)
    expected = 1.0 if most == 0 else slow_information(labels, clusters) / most
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(both=partitions(most=6))
def test_expected_information_is_the_mean_over_all_permutations(both: tuple[list[int], list[int]]) -> None:
    """Chance in AMI means that: all ways to deal the items out with these sizes, equally likely."""
    labels, clusters = both
    shuffled = [slow_information(labels, list(dealt)) for dealt in itertools.permutations(clusters)]
    sizes = [torch.tensor(list(Counter(names).values())) for names in both]
    value = clustering._expected_information(sizes[0], sizes[1], len(labels))
    assert value == pytest.approx(sum(shuffled) / len(shuffled), rel=1e-9, abs=1e-12)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 300),
    classes=st.integers(1, 80),
    clusters=st.integers(1, 80),
    agreeing=st.floats(0, 1),
)
def test_scores_equal_scikit_learn(seed: int, size: int, classes: int, clusters: int, agreeing: float) -> None:
    """The two numbers are compared with papers, which took them from there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    partition = torch.randint(clusters, (size,), generator=generator)
    same = torch.rand(size, generator=generator) < agreeing
    partition[same] = labels[same]
    nmi, ami = normalized_mutual_information(labels, partition), adjusted_mutual_information(labels, partition)
    assert nmi == pytest.approx(normalized_mutual_info_score(labels.numpy(), partition.numpy()), rel=1e-9, abs=1e-9)
    assert ami == pytest.approx(adjusted_mutual_info_score(labels.numpy(), partition.numpy()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("score", [normalized_mutual_information, adjusted_mutual_information])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("classes", [1, 4])
def test_equal_partitions_have_one(score: Any, size: int, classes: int) -> None:
    """The score is 1 also where entropy, or what chance leaves, is 0; exactly, so that no mean of scores exceeds it."""
    labels = torch.arange(classes).repeat(size)
    assert score(labels, 7 - labels * 2) == 1.0


def test_partitions_that_say_nothing() -> None:
    """Scikit-learn's conventions: one cluster agrees with nothing else, single items no better than chance."""
    labels = torch.arange(5).repeat_interleave(torch.tensor([1, 2, 3, 7, 11]))
    one, single = torch.zeros(24, dtype=torch.int32), torch.arange(24)
    for other in (labels, single):
        for pair in ((other, one), (one, other)):
            assert normalized_mutual_information(*pair) == adjusted_mutual_information(*pair) == 0.0
    assert adjusted_mutual_information(labels, single) == adjusted_mutual_information(single, labels) == 0.0
    expected = normalized_mutual_info_score(labels.numpy(), single.numpy())
    assert 0 < expected < 1 and normalized_mutual_information(labels, single) == pytest.approx(expected, rel=1e-9)


def test_two_large_classes() -> None:
    """Long sums, of which only the middle is computed: what is left out must not show."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100_000) % 2
    partition = torch.where(torch.rand(100_000, generator=generator) < 0.1, labels, 1 - labels.roll(1) * 2)
    expected = adjusted_mutual_info_score(labels.numpy(), partition.numpy())
    assert adjusted_mutual_information(labels, partition) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_memory_of_ami_does_not_grow_with_classes_times_clusters() -> None:
    """11,316 classes and as many clusters (SOP) would be a gigabyte as a table."""
    labels = torch.arange(60_502) % 11_316
    partition = torch.randint(11_316, (60_502,), generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        adjusted_mutual_information(labels, partition)
    assert 60_502 <= largest.entries <= clustering._BLOCK_ENTRIES


def test_memory_of_ami_where_all_sizes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be grouped there, so the sum is cut in blocks, and the cuts must not change it."""
    labels = torch.arange(100).repeat_interleave(torch.arange(1, 101))
    partition = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    partition[::2] = labels[::2]
    with LargestTensor() as largest:
        whole = adjusted_mutual_information(labels, partition)
    assert largest.entries > 4 * len(labels)
    monkeypatch.setattr(clustering, "_BLOCK_ENTRIES", 2000)
    with LargestTensor() as largest:
        blocked = adjusted_mutual_information(labels, partition)
    # The pairs of sizes are then the largest thing in memory, and there are at most two for each item.
    assert largest.entries <= 2 * len(labels)
    assert blocked == pytest.approx(whole, rel=1e-12)
    assert blocked == pytest.approx(adjusted_mutual_info_score(labels.numpy(), partition.numpy()), rel=1e-9)


@pytest.mark.parametrize("score", [normalized_mutual_information, adjusted_mutual_information])
@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        (torch.zeros(2, 2).long(), torch.zeros(4).long(), r"labels must have shape \(4,\), .* got \(2, 2\)"),
        (torch.zeros(4), torch.zeros(4).long(), "labels must be integers, got torch.float32"),
        (torch.zeros(4).long(), torch.zeros(3).long(), r"clusters must have shape \(4,\), .* got \(3,\)"),
        (torch.zeros(4).long(), torch.zeros(4), "clusters must be integers, got torch.float32"),
        (torch.zeros(0).long(), torch.zeros(0).long(), r"labels is empty, got shape \(0,\)"),
    ],
)
def test_scores_refuse(score: Any, labels: Tensor, clusters: Tensor, message: str) -> None:
    """A score of misaligned or rounded labels looks like any other number."""
    with pytest.raises(InputError, match=message):
        score(labels, clusters)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separated_clusters(seed: int) -> None:
    """Two far groups have no other optimum, so any start must end there."""
    rows, labels = blobs(2, 30, seed)
    clusters = kmeans_labels(rows, 2, seed=seed)
    assert clusters.dtype == torch.int64 and clusters.shape == (60,)
    assert set(clusters.tolist()) == {0, 1}
    assert normalized_mutual_information(labels, clusters) == 1.0


def test_kmeans_depends_on_its_seed_alone() -> None:
    """A validation score must not move because something else drew a random number, nor move what is drawn next."""
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    np.random.seed(1)
    first = kmeans_labels(rows, 20, seed=3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(kmeans_labels(rows.double().requires_grad_(), 20, seed=3), first)
    assert not torch.equal(kmeans_labels(rows, 20, seed=4), first)


def test_kmeans_does_not_depend_on_the_order_of_the_rows() -> None:
    """Two ranks gather their rows in another order than one process has them, and must log the same number."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator)[torch.randint(200, (300,), generator=generator)]
    order = torch.randperm(300, generator=generator)
    assert torch.equal(kmeans_labels(rows[order], 20), kmeans_labels(rows, 20)[order])


def test_a_last_digit_hardly_moves_the_first_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor or batch size rounds embeddings otherwise; other centroids would be another score."""
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    rounded = rows * (1 + torch.finfo(rows.dtype).eps * torch.randint(-1, 2, rows.shape))
    assert (rows != rounded).float().mean() > 0.5
    starts: list[Any] = []
    train = faiss.Kmeans.train

    def recording(self: Any, x: Any, weights: Any, init_centroids: Any) -> Any:
        starts.append(init_centroids.copy())
        return train(self, x, weights=weights, init_centroids=init_centroids)

    monkeypatch.setattr(faiss.Kmeans, "train", recording)
    for embeddings in (rows, rounded):
        kmeans_labels(embeddings, 20, iterations=1)
    # Only rows whose first columns agree to the last digits can change places, and those are few.
    assert (np.abs(starts[0] - starts[1]).max(axis=1) < 1e-5).sum() >= 18


def test_single_iterations_equal_one_run_of_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls between the iterations must not cost quality, nor where clusters run empty."""
    generator = torch.Generator().manual_seed(0)
    # Distinct rows, of which many are one point to float32: what tells them apart vanishes in every sum of squares,
    # on any processor. So several of the first centroids are at one place, and all but one of them get no rows.
    points, names = torch.randn(600, 4, generator=generator).round(), torch.arange(600.0)[:, None]
    rows = torch.cat([points, 1e-20 * names], dim=1)
    runs: list[dict[str, Any]] = []
    train = faiss.Kmeans.train

    def recording(self: Any, x: Any, weights: Any, init_centroids: Any) -> Any:
        runs.append({"x": x.copy(), "weights": weights.copy(), "init_centroids": init_centroids.copy()})
        return train(self, x, weights=weights, init_centroids=init_centroids)

    with monkeypatch.context() as patch:
        patch.setattr(faiss.Kmeans, "train", recording)
        kmeans_labels(rows, 100, iterations=12)
    one_run = faiss.Kmeans(5, 100, niter=11, min_points_per_centroid=1, max_points_per_centroid=600)
    one_run.train(**runs[0])
    assert sum(stats["nsplit"] for stats in one_run.iteration_stats or []) > 0
    np.testing.assert_array_equal(runs[11]["init_centroids"], one_run.centroids)


def test_kmeans_is_as_good_as_faiss() -> None:
    """The field's NMI is that of faiss's k-means: a weaker one would report lower numbers for the same model."""
    ratios, early = [], []
    for seed in range(12):
        rows = torch.randn(800, 16, generator=torch.Generator().manual_seed(seed)) + 3
        peer = faiss.Kmeans(16, 30, niter=20, seed=seed, min_points_per_centroid=1, max_points_per_centroid=800)
        peer.train(rows.numpy())
        reached = within_clusters(rows, torch.from_numpy(peer.assign(rows.numpy())[1]))
        ratios.append(within_clusters(rows, kmeans_labels(rows, 30, seed=seed)) / reached)
        early.append(within_clusters(rows, kmeans_labels(rows, 30, seed=seed, iterations=1)) / reached)
    # Over 40 seeds a ratio scatters by 0.0084, so the mean of twelve by 0.0024, of which 0.01 is four. After a single
    # iteration it is 1.054 and scatters by 0.0102, the mean by 0.003.
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)
    assert np.mean(early) > 1.04


@pytest.mark.parametrize("clusters", [1, 2, 5, 39, 40])
@pytest.mark.parametrize("distinct", [1, 2, 5, 40])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_kmeans_of_any_rows(clusters: int, distinct: int, scale: float, capfd: pytest.CaptureFixture[str]) -> None:
    """A collapsed, vanishing or exploding model must get its low score in silence, not end the run."""
    corners = torch.randn(distinct, 6, generator=torch.Generator().manual_seed(0))
    rows = corners.repeat(40 // distinct, 1) * scale
    calls: list[int] = []
    answer = kmeans_labels(rows, clusters, iterations=7, after_iteration=lambda: calls.append(1))
    # The other ranks wait this often, whatever rank 0 finds.
    assert len(calls) == 7
    assert 0 <= int(answer.min()) and int(answer.max()) < clusters
    # Equal rows share a cluster, so that a collapsed model is not scored by the order of its rows.
    assert len({(row % distinct, cluster) for row, cluster in enumerate(answer.tolist())}) == distinct
    if clusters >= distinct:
        assert len(torch.unique(answer)) == distinct
    assert capfd.readouterr() == ("", "")


def test_kmeans_far_from_the_origin() -> None:
    """An offset that all rows share says nothing, but squares of it leave no digits for what does."""
    rows = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)) / 100
    near, far = (kmeans_labels(rows + offset, 300, iterations=4) for offset in (0, 1000))
    assert within_clusters(rows, far) == pytest.approx(within_clusters(rows, near), rel=0.01)


def test_zeros_of_either_sign_are_equal() -> None:
    """Equal rows share a cluster, and a ReLU can give a zero of either sign."""
    first, second, third = kmeans_labels(torch.tensor([[0.0], [-0.0], [1.0]]), 3).tolist()
    assert first == second != third


ROWS = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeddings": ROWS[0]}, r"embeddings must have shape \(N, D\), got \(3,\)"),
        ({"embeddings": ROWS.long()}, "embeddings must be floating point, got torch.int64"),
        ({"embeddings": ROWS[:0]}, r"embeddings is empty, got shape \(0, 3\)"),
        ({"embeddings": ROWS.to("meta")}, "embeddings must be on the CPU, .* got meta"),
        ({"embeddings": ROWS / 0}, "embeddings has NaN or infinite values in 3 of 3 rows"),
        ({"clusters": 0}, "clusters must be an integer from 1 to 3, got 0; the number of rows is the most"),
        ({"clusters": 4}, "clusters must be an integer from 1 to 3, got 4; the number of rows is the most"),
        ({"clusters": 2.0}, "clusters must be an integer from 1 to 3, got 2.0"),
        ({"clusters": True}, "clusters must be an integer from 1 to 3, got True"),
        ({"seed": -1}, "seed must be an integer from 0 to .* got -1"),
        ({"iterations": 0}, "iterations must be an integer from 1 to .* got 0"),
    ],
)
def test_kmeans_refuses(arguments: dict[str, Any], message: str) -> None:
    """Faiss answers such input with an assertion of its C++ code, or with clusters of NaN."""
    with pytest.raises(InputError, match=message):
        kmeans_labels(**{"embeddings": ROWS, "clusters": 2, **arguments})


def test_the_docstring_examples_are_true() -> None:
    """Examples are what people copy."""
    module = importlib.import_module("lightning_dml.retrieval.clustering")
    outcome = doctest.testmod(module, extraglobs={"torch": torch})
    assert outcome.failed == 0 and outcome.attempted == 9
