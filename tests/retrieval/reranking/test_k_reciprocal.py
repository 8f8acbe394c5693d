"""k-reciprocal re-ranking against the paper's steps written with sets, its memory, and its effect on hubs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dml.errors import InputError
from lightning_dml.retrieval.reranking import expansion, k_reciprocal, sparse_rows
from lightning_dml.retrieval.reranking.k_reciprocal import KReciprocal, k_reciprocal_nearest
from lightning_dml.retrieval.search import nearest, unit_rows
from tests.helpers import LargestTensor, run_ranks
from tests.retrieval.reranking.cases import Matrix, clear, slow_distances


def clusters(count: int, classes: int, seed: int, noise: float = 0.8, dimensions: int = 8) -> tuple[Tensor, Tensor]:
    """Unit rows around random centres, and the number of each row's centre."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(classes, (count,), generator=generator)
        centres = torch.randn(classes, dimensions, generator=generator)
        noises = torch.randn(count, dimensions, generator=generator)
        rows = unit_rows(centres[labels] + noise * noises)
        if not 1 < count <= 100 or clear(rows):
            return rows, labels


def assert_same_answer(ours: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    """The same values, and the same items but for neighbours whose values are nearer than the rounding of both."""
    torch.testing.assert_close(ours[0], right[0])
    padded = torch.nn.functional.pad(right[0].double().nan_to_num(neginf=-9), (1, 1), value=torch.inf)
    steps = padded.diff(dim=1).abs()
    steps[:, -1] = 0  # the next item behind the last place is not known
    near = torch.minimum(steps[:, 1:], steps[:, :-1]) < 1e-5
    assert bool((near | (ours[1] == right[1])).all())


def check_against(distances: Matrix, values: Tensor, positions: Tensor, allowed: npt.NDArray[np.bool_]) -> None:
    """Values and order of an answer, where the true distances (queries, gallery) tell which is right."""
    for row, candidates, its_values, its_positions in zip(distances, allowed, values, positions, strict=True):
        best = np.sort(row[candidates])[: len(its_values)]
        there = len(best)
        picked = its_positions[:there].numpy()
        assert len(set(picked.tolist())) == there and candidates[picked].all()
        np.testing.assert_allclose(-its_values[:there].numpy(), best, atol=1e-5)
        # Equal to the sorted ones place by place, so only items within the tolerance have changed places.
        np.testing.assert_allclose(row[picked], best, atol=1e-5)
        assert (its_positions[there:] == -1).all() and (its_values[there:] == -np.inf).all()


@settings(max_examples=40)
@given(
    count=st.integers(2, 40),
    classes=st.integers(1, 6),
    k1=st.integers(1, 45),
    k2=st.integers(1, 45),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    k=st.integers(1, 45),
    long_column=st.sampled_from([0.0, 1 / 16, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_self_retrieval_equals_the_paper(
    count: int, classes: int, k1: int, k2: int, weight: float, k: int, long_column: float, seed: int
) -> None:
    """A re-ranking that is nearly the published one gives numbers that compare with no paper."""
    rows, _ = clusters(count, classes, seed)
    items = torch.arange(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_reciprocal, "_LONG_COLUMN", long_column)
        answer = KReciprocal(k1, k2, weight).encode(rows).nearest(items, items, k, [(items, items)])
    assert answer[0].shape == answer[1].shape == (count, k)
    assert answer[0].dtype == torch.float32 and answer[1].dtype == torch.int64
    check_against(slow_distances(rows, k1, k2, weight), *answer, ~np.eye(count, dtype=bool))


@pytest.mark.parametrize(("k1", "k2"), [(3, 1), (5, 2), (7, 3), (11, 8), (20, 6), (3, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_each_setting_equals_the_paper(k1: int, k2: int, seed: int) -> None:
    """Odd halves, and averages over more items than there are neighbours, matter in few random graphs."""
    rows, _ = clusters(40, 4, seed)
    items = torch.arange(40)
    answer = KReciprocal(k1, k2).encode(rows).nearest(items, items, 39, [(items, items)])
    check_against(slow_distances(rows, k1, k2, 0.3), *answer, ~np.eye(40, dtype=bool))


@given(data=st.data(), count=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_queries_and_gallery_may_be_any_items(data: st.DataObject, count: int, seed: int) -> None:
    """Distractors take part in the encoding, and what must not be found differs from query to query."""
    rows, _ = clusters(count, 4, seed)
    numbers = st.integers(0, count - 1)
    queries = torch.tensor(data.draw(st.lists(numbers, max_size=8)), dtype=torch.int64)
    gallery = torch.tensor(data.draw(st.lists(numbers, min_size=1, unique=True)))
    keys = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count)))
    groups = torch.tensor(data.draw(st.lists(st.integers(-1, 6), min_size=count, max_size=count)))

    exclude = [(keys[queries], keys[gallery]), (groups[queries], groups[gallery])]
    values, positions = KReciprocal(6, 3).encode(rows).nearest(queries, gallery, 5, exclude)

    allowed = np.ones((len(queries), len(gallery)), dtype=bool)
    for mine, theirs in exclude:
        allowed &= ((mine[:, None] != theirs) | (mine[:, None] < 0)).numpy()
    distances = slow_distances(rows, 6, 3, 0.3)[queries.numpy()][:, gallery.numpy()]
    check_against(distances, values, positions, allowed)


def test_the_example_that_can_be_done_by_hand() -> None:
    """The oracle and the code could share a misreading of the paper; four points on a line cannot."""
    # Angles 0, 10, 30 and 180 degrees. With k1 = 1 the two first are each other's neighbours, the third has the
    # second as its neighbour but is not that one's, and so are the last two: sets {0, 1}, {0, 1}, {2}, {3}.
    angles = torch.tensor([0.0, 10.0, 30.0, 180.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    encoding = KReciprocal(k1=1, k2=1, weight=0.25).encode(rows)
    values, positions = encoding.nearest(torch.tensor([0]), torch.tensor([3, 2, 1]), 3)
    assert positions.tolist() == [[2, 1, 0]]

    chord = 2 - 2 * angles.cos()  # squared distances from the first point; that to the last is 4
    # The shares of item 0 and item 1 in the sets of both: weights exp(-d / largest), made to add up to 1.
    first = torch.tensor([1.0, (-chord[1] / 4).exp()])
    second = torch.tensor([(-chord[1] / (2 - 2 * torch.tensor(170.0).deg2rad().cos())).exp(), 1.0])
    first, second = first / first.sum(), second / second.sum()
    jaccard = 1 - torch.minimum(first, second).sum() / torch.maximum(first, second).sum()
    expected = torch.stack([0.75 * jaccard + 0.25 * chord[1] / 4, 0.75 + 0.25 * chord[2] / 4, torch.tensor(1.0)])
    torch.testing.assert_close(-values[0], expected)


def map_at_r(positions: Tensor, labels: Tensor) -> float:
    """MAP@R of self-retrieval, for classes of equal size."""
    hits = (labels[positions] == labels[:, None]).double()
    return (hits * hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1)).mean().item()


def test_hubs_lose_their_places() -> None:
    """An item that is near to everyone is nobody's mutual neighbour: that is the point of the method."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(30).repeat_interleave(10), torch.full((10,), 30)])
    centres = torch.randn(31, 24, generator=generator) + 1.5  # a common part, along which the last class lies
    centres[30] = 1.5
    spread = torch.where(labels == 30, 0.2, 1.0)[:, None]
    rows = unit_rows(centres[labels] + spread * torch.randn(310, 24, generator=generator))
    items = torch.arange(310)
    _, plain = nearest(rows, rows, 9, "inner_product", [(items, items)])
    _, reranked = KReciprocal(10, 4).encode(rows).nearest(items, items, 9, [(items, items)])
    members = items[:300]
    hubs = [(labels[positions[members]] == 30).double().mean().item() for positions in (plain, reranked)]
    assert hubs[1] < 0.7 * hubs[0]
    assert map_at_r(reranked, labels) > map_at_r(plain, labels) + 0.05


def test_only_the_original_distance_is_plain_search() -> None:
    """With weight = 1 nothing is re-ranked, whatever the encodings."""
    rows, _ = clusters(60, 5, seed=4)
    items = torch.arange(60)
    # `clusters` keeps neighbours apart, so that the two may not exchange any.
    _, plain = nearest(rows, rows, 10, "inner_product", [(items, items)])
    assert torch.equal(KReciprocal(weight=1.0).encode(rows).nearest(items, items, 10, [(items, items)])[1], plain)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a block must not decide the numbers."""
    rows, _ = clusters(90, 6, seed=1)
    items = torch.arange(90)
    whole = KReciprocal(8, 3).encode(rows).nearest(items, items, 12, [(items, items)])
    monkeypatch.setattr(k_reciprocal, "_BLOCK_ENTRIES", 200)
    monkeypatch.setattr(k_reciprocal, "_LONG_COLUMN", 0.1)
    for module in (k_reciprocal, sparse_rows):
        monkeypatch.setattr(module, "BLOCK_PAIRS", 150)
    blocked = KReciprocal(8, 3).encode(rows).nearest(items, items, 12, [(items, items)])
    assert_same_answer(blocked, whole)
    distances = slow_distances(rows, 8, 3, 0.3)
    for answer in (whole, blocked):
        check_against(distances, *answer, ~np.eye(90, dtype=bool))


def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code needs several of them, 14 GB each for 60,000 items."""
    rows, _ = clusters(5000, 500, seed=2)
    items = torch.arange(5000)
    monkeypatch.setattr(k_reciprocal, "_BLOCK_ENTRIES", 2**18)
    for module in (k_reciprocal, sparse_rows):
        monkeypatch.setattr(module, "BLOCK_PAIRS", 2**18)
    with LargestTensor() as largest:
        KReciprocal().encode(rows).nearest(items[:1000], items, 20, [(items[:1000], items)])
    # The sparse encodings of all items are the largest thing there is, far below 5000 * 5000.
    assert 5000 * 20 <= largest.entries < 5000 * 150


@pytest.mark.parametrize("kind", ["zeros", "one point", "one item", "half precision"])
def test_odd_embeddings(kind: str) -> None:
    """A model that collapsed must show in the metrics, not as NaN; storage must not change what is found."""
    rows, _ = clusters(30, 3, seed=3)
    kinds = {"zeros": torch.zeros(30, 8), "one point": rows[:1].repeat(30, 1), "one item": rows[:1]}
    odd_rows = kinds.get(kind, rows.half())
    items = torch.arange(len(odd_rows))
    encoding = KReciprocal(5, 3).encode(odd_rows)
    values, positions = encoding.nearest(items, items, 4, [(items, items)])
    assert not values.isnan().any()
    if kind == "one item":
        assert positions.tolist() == [[-1] * 4] and values.tolist() == [[float("-inf")] * 4]
    else:
        assert (positions >= 0).all() and (values <= 1e-5).all() and (values >= -1 - 1e-5).all()
        assert (positions != items[:, None]).all()
    if kind == "half precision":
        exact = KReciprocal(5, 3).encode(rows.half().float()).nearest(items, items, 4, [(items, items)])
        assert_same_answer((values, positions), exact)


def test_a_row_of_zeros_is_at_no_distance_from_itself() -> None:
    """Its cosine similarity is 0 even to itself, so it would weigh no more than others in its own set."""
    items = torch.arange(2)
    values, _ = KReciprocal(1, 1, 0.0).encode(torch.zeros(2, 3)).nearest(items, items, 1, [(items, items)])
    # Weights 1 and exp(-1) of two items in each other's sets: minima and maxima of each pair.
    assert -values[0].item() == pytest.approx(1 - np.exp(-1), abs=1e-6)


def test_items_that_are_all_alike_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All items then share their neighbours; pair by pair, an evaluation of a collapsed model seemed to hang."""
    items = torch.arange(400)
    encoding = KReciprocal().encode(torch.ones(400, 4) / 2)
    pairs = []

    def counted(lengths: Tensor, most: int) -> Iterator[Tensor]:
        pairs.append(int(lengths.sum()))
        return sparse_rows.parts(lengths, most)

    monkeypatch.setattr(k_reciprocal, "parts", counted)
    encoding.nearest(items, items, 5)
    assert encoding.columns.longest == 400
    assert sum(pairs) <= 400 * 25 * 25


def steps_on_ranks(rank: int, ranks: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Encoding, augmented rows and neighbours that this rank gets; small blocks make many steps."""
    k_reciprocal._BLOCK_ENTRIES = expansion._BLOCK_ENTRIES = 40
    rows, _ = clusters(37, 4, seed=5)
    encoding = KReciprocal(6, 3).encode(rows)
    items = torch.arange(37)
    parts = [encoding.largest, encoding.rows.starts, encoding.rows.columns, encoding.rows.weights]
    parts.append(expansion.DatabaseAugmentation(3).apply(rows))
    return parts, encoding.nearest(items[rank::ranks], items, 5)


def test_two_ranks_encode_and_augment_as_one() -> None:
    """Each rank searches for its own queries, so all must search the same encoding, or the same augmented gallery."""
    alone, answer = steps_on_ranks(0, 1)
    for rank, (parts, share) in enumerate(run_ranks(2, steps_on_ranks)):
        for part, expected in zip(parts, alone, strict=True):
            torch.testing.assert_close(part, expected)
        assert_same_answer(share, (answer[0][rank::2], answer[1][rank::2]))


def test_plain_tensors_with_indices() -> None:
    """An item that is both query and gallery is one item of the graph, or it would be its own best neighbour."""
    rows, _ = clusters(40, 4, seed=6)
    items = torch.arange(40)
    expected = KReciprocal(8, 3).encode(rows).nearest(items[:15], items, 5, [(items[:15], items)])
    # Scaled rows, and item numbers in another order than the rows.
    numbers = (items * 7 + 3) % 41
    answer = k_reciprocal_nearest(3 * rows[:15], rows, 5, 8, 3, query_indices=numbers[:15], gallery_indices=numbers)
    assert_same_answer(answer, expected)


def test_plain_tensors_without_indices() -> None:
    """All rows are then items of their own, as negative indices say too."""
    rows, _ = clusters(40, 4, seed=7)
    items = torch.arange(40)
    expected = KReciprocal(8, 3).encode(rows).nearest(items[:15], items[15:], 5)
    assert_same_answer(k_reciprocal_nearest(rows[:15], rows[15:], 5, 8, 3), expected)
    nobody = torch.full((40,), -1)
    answer = k_reciprocal_nearest(rows[:15], rows[15:], 5, 8, 3, query_indices=nobody[:15], gallery_indices=nobody[15:])
    assert_same_answer(answer, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k1": 0}, "k1 must be an integer of at least 1, got 0"),
        ({"k2": 0}, "k2 must be an integer of at least 1, got 0"),
        ({"k2": True}, "k2 must be an integer of at least 1, got True"),
        ({"weight": 1.5}, r"weight must be .* at least 0 and at most 1, got 1\.5"),
        ({"weight": float("nan")}, "weight must be .* at least 0 and at most 1, got nan"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    """They come out of a YAML file, and hours of training may come before the first evaluation."""
    with pytest.raises(InputError, match=message):
        KReciprocal(**wrong)


def test_input_that_does_not_fit() -> None:
    """Each of these would otherwise be an answer to another question, or an error of a product within."""
    rows, items = torch.eye(3), torch.arange(3)
    encoding = KReciprocal(2, 1).encode(rows)
    calls: dict[str, Callable[[], object]] = {
        "embeddings is empty": lambda: KReciprocal().encode(rows[:0]),
        "embeddings must be floating point": lambda: KReciprocal().encode(rows.long()),
        "embeddings has NaN": lambda: KReciprocal().encode(rows / 0),
        "k must be an integer of at least 1, got 0": lambda: encoding.nearest(items, items, 0),
        "gallery is empty": lambda: encoding.nearest(items, items[:0], 1),
        "gallery holds item 1 twice": lambda: encoding.nearest(items, torch.tensor([1, 2, 1]), 1),
        "gallery_indices is missing": lambda: k_reciprocal_nearest(rows, rows, 1, query_indices=items),
        "query_indices is missing": lambda: k_reciprocal_nearest(rows, rows, 1, gallery_indices=items),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
