"""RetrievalMetrics on 1, 2 and 3 gloo ranks: the same numbers on each, and the same errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dml.retrieval import DatabaseAugmentation, KReciprocal, QueryExpansion, RetrievalMetrics
from tests.helpers import run_ranks

N = 47  # a prime: no rank count divides it
KS = (1, 2, 4)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same rows on every rank, of which each takes its share."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(9, (N,), generator=generator)
    centres = torch.randn(9, 6, generator=generator)
    embeddings = centres[labels] + 0.8 * torch.randn(N, 6, generator=generator)
    indices = torch.randperm(10 * N, generator=generator)[:N]
    is_query = torch.rand(N, generator=generator) < 0.5
    is_gallery = ~is_query | (torch.rand(N, generator=generator) < 0.3)
    groups = torch.randint(-1, 6, (N,), generator=generator)
    return embeddings, labels, indices, is_query, is_gallery, groups


def evaluate(batches: list[list[Tensor]], options: dict[str, Any]) -> tuple[dict[str, float] | str, list[str]]:
    """The values or the error, and the warnings."""
    metrics = RetrievalMetrics(ks=KS, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            metrics.update(*batch)
        try:
            outcome: dict[str, float] | str = metrics.compute()
        except (ValueError, RuntimeError) as error:
            outcome = f"{type(error).__name__}: {error}"
    return outcome, [str(warning.message) for warning in caught if "before the" not in str(warning.message)]


def batches_of(rows: Tensor, columns: int, size: int = 5) -> list[list[Tensor]]:
    """The rows as a dataloader would bring them, with as many columns as the case uses."""
    return [[column[part] for column in data()[:columns]] for part in torch.split(rows, size)] if len(rows) else []


def share(rank: int, ranks: int) -> Tensor:
    """Every ranks-th row, as our sampler deals them."""
    return torch.arange(N)[rank::ranks]


def padded_share(rank: int, ranks: int) -> Tensor:
    """Rows as torch's DistributedSampler deals them: the first ones again, until every rank has as many."""
    most = -(-N // ranks) + 1
    return torch.arange(most * ranks).remainder(N)[rank::ranks]


def late_update(rank: int, ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """A second compute after rows that only rank 0 has seen."""
    metrics = RetrievalMetrics(ks=KS)
    columns = data()[:3]
    metrics.update(*(column[share(rank, ranks)] for column in columns))
    first = metrics.compute()
    if rank == 0:
        metrics.update(columns[0][:1] + 0.1, columns[1][:1], torch.tensor([10 * N]))
    return first, metrics.compute()


def few(rank: int) -> list[list[Tensor]]:
    """Two rows, both on rank 0: fewer queries than ranks."""
    return [[torch.eye(2), torch.tensor([5, 5]), torch.tensor([0, 1])]] if rank == 0 else []


def unlike(rank: int, what: str) -> list[list[Tensor]]:
    """Rows on which rank 1 disagrees with the others."""
    embeddings, labels, indices = data()[:3]
    if what == "dimensions" and rank == 1:
        embeddings = embeddings[:, :4]
    return [[embeddings, labels] if what == "indices" and rank == 1 else [embeddings, labels, indices + N * rank]]


def huge(rank: int, ranks: int) -> list[list[Tensor]]:
    """Rows of which the last query overflows in the search, which only the last rank sees."""
    embeddings, labels, indices, is_query, is_gallery = (column.clone() for column in data()[:5])
    last = indices.argmax()
    embeddings[last] *= 1e38
    is_query[last], is_gallery[last] = True, False
    return [[column[share(rank, ranks)] for column in (embeddings, labels, indices, is_query, is_gallery)]]


EVERY_METRIC = ("recall", "precision", "ndcg", "map@r", "r_precision", "map", "mrr", "nmi", "ami")
OPTIONS: dict[str, dict[str, Any]] = {
    "every metric": {"include": EVERY_METRIC, "average": "macro", "confidence": 0.9, "bootstrap_draws": 50},
    "half precision and l2": {"dtype": "float16", "metric": "l2", "include": ("recall", "map@r", "map")},
    "draws": {"gallery_draws": 3, "include": ("recall", "map@r", "mrr")},
    "expansion": {"reranking": [DatabaseAugmentation(k=3), QueryExpansion(k=2)], "include": ("map@r", "map", "recall")},
    "k-reciprocal": {"reranking": [KReciprocal(k1=6, k2=3)]},
    "index": {"index": "IVF4,Flat", "index_parameters": "nprobe=2"},
}


def scenarios(rank: int, ranks: int) -> dict[str, Any]:
    """All cases in one set of processes, since starting them takes longer than the cases."""
    everything = torch.arange(N)
    cases: dict[str, Callable[[], list[list[Tensor]]]] = {
        "self retrieval": lambda: batches_of(share(rank, ranks), 3),
        "roles": lambda: batches_of(share(rank, ranks), 5),
        "padded": lambda: batches_of(padded_share(rank, ranks), 5),
        "all on the last rank": lambda: batches_of(everything if rank == ranks - 1 else everything[:0], 5),
        "without indices": lambda: batches_of(share(rank, ranks), 2),
        "few": lambda: few(rank),
        "nothing": lambda: [],
        "dimensions": lambda: unlike(rank, "dimensions"),
        "indices": lambda: unlike(rank, "indices"),
        "clash": lambda: [[torch.eye(2), torch.tensor([rank, 1]), torch.tensor([0, 1])]],
    }
    results: dict[str, Any] = {name: evaluate(make(), {}) for name, make in cases.items()}
    for name, options in OPTIONS.items():
        results[name] = evaluate(batches_of(share(rank, ranks), 3), options)
    results["groups"] = evaluate(batches_of(share(rank, ranks), 6), {"ignore": "group"})
    results["failure"] = evaluate(huge(rank, ranks), {"metric": "inner_product"})
    results["late update"] = late_update(rank, ranks)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Outcomes of one process: the expectation."""
    return scenarios(0, 1)


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Outcomes of all cases, by rank."""
    return run_ranks(request.param, scenarios)


PLAIN = ["self retrieval", "roles", "padded", "all on the last rank", "without indices", "groups"]


@pytest.mark.parametrize("case", [*PLAIN, *OPTIONS])
def test_any_number_of_ranks_gives_the_same_numbers(
    alone: dict[str, Any], together: list[dict[str, Any]], case: str
) -> None:
    """A checkpoint chosen by recall must not depend on the number of GPUs."""
    values = alone[case][0]
    assert isinstance(values, dict) and 0.2 < values["map@r"] < 0.9
    for results in together:
        assert results[case][0] == values  # to the last bit


def test_padding_and_an_idle_rank_change_nothing(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    """Lightning's sampler pads with copies, and a small set leaves ranks without rows."""
    for results in [alone, *together]:
        assert results["padded"][0] == results["all on the last rank"][0] == alone["roles"][0]


def test_fewer_queries_than_ranks(together: list[dict[str, Any]]) -> None:
    """A rank without queries must take part, or the others wait for it forever."""
    for rank, results in enumerate(together):
        values, told = results["few"]
        assert values == dict.fromkeys(["recall@1", "recall@2", "recall@4", "precision@1", "map@r", "r_precision"], 1.0)
        assert len(told) == (rank == 0)  # one warning (K beyond the gallery), not one per rank


def test_compute_is_not_cached_on_ranks_without_new_rows(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    """Some ranks answering from a cache while others gather would hang."""
    first, second = alone["late update"]
    assert first != second
    for results in together:
        assert results["late update"] == (first, second)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "InputError: embeddings: RetrievalMetrics has seen none on any rank"),
        ("dimensions", "InputError: embeddings have [4, 6] dimensions on different ranks"),
        ("indices", "InputError: indices were given on some ranks only"),
        ("clash", "InputError: indices must name one item each, but index 0 came with different labels"),
    ],
)
def test_all_ranks_raise_the_same_error(together: list[dict[str, Any]], case: str, message: str) -> None:
    """An error on one rank alone leaves the others waiting until a timeout."""
    errors = {results[case][0] for results in together}
    assert len(errors) == 1
    assert errors.pop().startswith(message)


def test_a_search_that_fails_on_one_rank_fails_on_all(together: list[dict[str, Any]]) -> None:
    """The others would wait for its values until the process group times out, without a word of the cause."""
    *others, last = (results["failure"][0] for results in together)
    assert last.startswith("InputError: queries: 1 rows, ") and "overflow float32" in last
    assert set(others) == {f"RuntimeError: rank {len(others)} failed at this point; its own error says why"}
