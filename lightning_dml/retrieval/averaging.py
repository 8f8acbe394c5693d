"""Class means of the values of queries, averages over queries or classes, and intervals of those averages.

Sums here run in one thread and in an order that the data alone gives, so every rank comes to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dml.checks import check_choice, check_count, check_integers, check_number
from lightning_dml.errors import InputError

AverageName = Literal["micro", "macro"]

# Resampled classes in memory at a time, over the draws of a block (one draw at least): four arrays of 8 MiB.
_BLOCK_ENTRIES = 2**20


@dataclass(frozen=True, eq=False)
class PerClass:
    """The mean of each metric over the answered queries of each class; `print` shows the worst classes.

    Attributes:
        labels: (C,) int64, ascending; classes without an answered query are not there.
        queries: (C,) int64, answered queries of each class, at least 1.
        values: (C, M) float64, means over those.
        names: the M metrics.

    Examples:
        >>> values = torch.tensor([[1.0, 0.5], [0.0, 0.25], [1.0, 1.0]], dtype=torch.float64)
        >>> per_class = class_means(values, torch.tensor([7, 3, 7]), ["recall@1", "map@r"])
        >>> per_class.as_dict()
        {3: {'recall@1': 0.0, 'map@r': 0.25}, 7: {'recall@1': 1.0, 'map@r': 0.75}}
        >>> print(per_class)
        class  queries  recall@1   map@r
            3        1    0.0000  0.2500
            7        2    1.0000  0.7500
    """

    labels: Tensor
    queries: Tensor
    values: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def __str__(self) -> str:
        """The 20 worst classes as a table."""
        return self.table(limit=20)

    def as_dict(self) -> dict[int, dict[str, float]]:
        """The values of each metric, by label and then by name."""
        rows = zip(self.labels.tolist(), self.values.tolist(), strict=True)
        return {label: dict(zip(self.names, row, strict=True)) for label, row in rows}

    def table(self, class_names: Sequence[str] | None = None, limit: int | None = None) -> str:
        """Lines of text, the worst class by the first metric first; equal ones by label.

        Args:
            class_names: what to call class i, such as a data module's `class_names`; the labels by default.
            limit: how many classes to show, all by default; a last line tells how many are left out.

        Raises:
            InputError: `limit` is negative or no integer, or `class_names` has none for a label.
        """
        if limit is not None:
            check_count("limit", limit, 0, hint="None shows all classes")
        worst = self.values[:, 0].argsort(stable=True)[:limit].tolist()
        rows = [["class", "queries", *self.names]]
        for row in worst:
            label = int(self.labels[row])
            means = [f"{value:.4f}" for value in self.values[row].tolist()]
            rows.append([_class_name(label, class_names), str(int(self.queries[row])), *means])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        if len(worst) < len(self):
            lines.append(f"... and {len(self) - len(worst)} more classes")
        return "\n".join(lines)


def class_means(values: Tensor, labels: Tensor, names: Sequence[str]) -> PerClass:
    """The mean of each metric over the queries of each class.

    The queries of a class are added in the order of the rows: given in the order of their indices, they give the
    same bits for any number of ranks and threads.

    Args:
        values: (Nq, M) floating point on the CPU, the metrics of each answered query; no NaN.
        labels: (Nq,) integers, the class of each query.
        names: the M metrics, at least one.

    Raises:
        InputError: shapes or dtypes do not fit each other.
    """
    _check_values(values)
    check_integers("labels", labels, len(values), "values")
    if len(names) != values.shape[1]:
        raise InputError(f"names must name the {values.shape[1]} columns of values, got {len(names)}: {tuple(names)}")
    classes, numbers = torch.unique(labels.long(), return_inverse=True)
    places = numbers.numpy()
    counts = np.bincount(places, minlength=len(classes))
    # numpy's bincount is one loop over the rows; torch's index_add_ promises no order, nor do its parallel sums.
    sums = [np.bincount(places, column.numpy(), minlength=len(classes)) for column in values.double().unbind(dim=1)]
    means = np.stack(sums, axis=1) / counts[:, None]
    return PerClass(classes, torch.from_numpy(counts), torch.from_numpy(means), tuple(names))


def micro_average(values: Tensor) -> Tensor:
    """The mean over queries, each of which counts alike: large classes weigh more.

    The sum is exact (`math.fsum`), so the mean depends on neither the number of threads nor the order of the rows.

    Args:
        values: (Nq, M) floating point.

    Returns:
        (M,) float64; NaN where there is no query.

    Raises:
        InputError: `values` is not a floating point matrix with at least one column.

    Examples:
        >>> micro_average(torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)).tolist()
        [0.75]
    """
    _check_values(values)
    if len(values) == 0:
        return torch.full((values.shape[1],), math.nan, dtype=torch.float64)
    means = [math.fsum(column.tolist()) / len(values) for column in values.unbind(dim=1)]
    return torch.tensor(means, dtype=torch.float64)


def macro_average(per_class: PerClass) -> Tensor:
    """The mean over classes of their means: a class of two queries counts as much as one of two thousand.

    Returns:
        (M,) float64; NaN where there is no class.

    Examples:
        >>> values = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
        >>> macro_average(class_means(values, torch.tensor([0, 1, 0, 0]), ["recall@1"])).tolist()
        [0.5]
    """
    return micro_average(per_class.values)


def bootstrap_interval(
    per_class: PerClass, average: AverageName, confidence: float, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Percentile interval of an average, from a bootstrap that resamples whole classes.

    Queries of one class share their positives and stand or fall together, so an interval that resampled queries
    would be far too narrow. Here each draw takes C of the C classes with replacement, every class with all of its
    queries; with w_c, how often class c was taken, n_c queries and mean m_c it gives sum w_c n_c m_c / sum w_c n_c
    ("micro") or sum w_c m_c / C ("macro"). The interval lies between the (1 - confidence) / 2 and
    (1 + confidence) / 2 quantiles of all draws, linearly interpolated. Nothing is searched again: the gallery stays
    as it is, and the interval says how far the average depends on which classes were asked for, not on the training
    run. With few classes (say, below 30) it is still too narrow, and with one it is the point itself.

    Source: the cluster bootstrap of Field and Welsh, Bootstrapping clustered data, JRSS B 69 (2007), 369-390; the
    second strategy (groups with replacement, within them none) in section 3.8 of Davison and Hinkley, Bootstrap
    Methods and their Application (1997).

    Args:
        per_class: C classes.
        average: "micro" or "macro", as the average was taken.
        confidence: nominal coverage, in (0, 1).
        draws: resamples, at least 1; a thousand for two digits of an interval's ends.
        seed: at least 0; the same gives the same interval on every rank.

    Returns:
        low: (M,) float64.
        high: (M,) float64; both NaN where there is no class.

    Raises:
        InputError: an argument is out of range.

    Examples:
        >>> values = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
        >>> per_class = class_means(values, torch.tensor([0, 0, 1, 2]), ["recall@1"])
        >>> low, high = bootstrap_interval(per_class, "macro", 0.95, draws=1000, seed=0)
        >>> low.item(), high.item()
        (0.5, 1.0)
    """
    check_average(average)
    check_bootstrap(confidence, draws, seed)
    if len(per_class) < 2:
        point = macro_average(per_class)
        return point, point.clone()
    weights = per_class.queries if average == "micro" else torch.ones_like(per_class.queries)
    averages = _resampled_averages(per_class.values.numpy(), weights.numpy(), draws, seed)
    low, high = np.quantile(averages, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return torch.from_numpy(low), torch.from_numpy(high)


def check_average(average: str) -> None:
    """Raises InputError unless `average` is one that there is."""
    check_choice("average", average, get_args(AverageName))


def check_bootstrap(confidence: float, draws: int, seed: int) -> None:
    """Raises InputError unless an interval can be made with these; see `bootstrap_interval`."""
    check_number("confidence", confidence, "a share, such as 0.95", above=0, below=1)
    check_count("draws of the bootstrap", draws)
    check_count("seed of the bootstrap", seed, 0)


def _resampled_averages(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], draws: int, seed: int
) -> npt.NDArray[np.float64]:
    """The weighted mean of the rows of `values` (C, M) in each resample; (draws, M)."""
    classes = len(values)
    columns = np.ascontiguousarray((values * weights[:, None]).T)
    # Integers in [0, C) need no floating point, as binomial counts would, whose logarithms differ between machines.
    generator = np.random.Generator(np.random.PCG64(seed))
    averages = np.empty((draws, len(columns)))
    block = max(1, _BLOCK_ENTRIES // classes)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        choices = generator.integers(0, classes, size=(rows, classes))
        choices += classes * np.arange(rows)[:, None]
        counts = np.bincount(choices.ravel(), minlength=rows * classes).reshape(rows, classes)
        totals = counts @ weights
        times = counts.astype(np.float64)
        for place, column in enumerate(columns):
            # Not a matrix product: BLAS adds in an order that depends on the machine and on its threads.
            averages[start : start + rows, place] = (times * column).sum(axis=1) / totals
    return averages


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    if class_names is None:
        return str(label)
    if not 0 <= label < len(class_names):
        raise InputError(f"class_names must name every label, got {len(class_names)} names and label {label}")
    return class_names[label]


def _check_values(values: Tensor) -> None:
    if values.ndim != 2 or values.shape[1] == 0 or not values.is_floating_point():
        raise InputError(
            f"values must be a floating point matrix (queries, metrics), got {values.dtype} of shape "
            f"{tuple(values.shape)}; a single metric is one column"
        )
