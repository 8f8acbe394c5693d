"""`RetrievalReport`: what training brought, as a table, and what retrieval looks like, as a figure."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.modules.evaluation import empty_copy, evaluation_columns, named_loaders
from lightning_dml.retrieval import RetrievalMetrics, knn
from lightning_dml.retrieval.search import SimilarityName

# Blue and orange stay apart for colour-blind eyes; a miss is dashed as well.
_FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
HIT, MISS = "#0072b2", "#d55e00"


class RetrievalReport(Callback):
    """Evaluates before and after training; prints a table and draws some queries with their nearest neighbours.

    The first validation dataloader is evaluated, by self-retrieval unless its batches have `is_query` and `is_gallery`;
    with a `group` in them, the table counts as `RetrievalMetrics` does. Similarity and the role of groups are those of
    `MetricLearningModule(metrics=...)`, or the defaults for another module; the search is exact, without re-ranking.
    The figure shows randomly drawn queries, each with its nearest neighbours of any group, hits and misses framed. A
    resumed run keeps the row of its first start.

    Args:
        ks: the K of the Recall@K columns.
        queries: rows of the figure; 0 draws none.
        neighbours: nearest neighbours per row.
        seed: of the choice of queries.
        path: where the figure goes; None is `retrieval.png` in the trainer's log folder.

    Raises:
        InputError: for counts out of range; when training starts, without validation data.
    """

    def __init__(
        self,
        ks: Sequence[int] = (1, 2, 4, 8),
        queries: int = 8,
        neighbours: int = 7,
        seed: int = 0,
        path: str | None = None,
    ) -> None:
        super().__init__()
        if path is not None and Path(path).suffix.lower() not in _FORMATS:
            raise InputError(f"path must end in one of {', '.join(_FORMATS)}, got {path!r}")
        if queries < 0:
            raise InputError(f"queries must not be negative, got {queries}; 0 draws no figure")
        if neighbours < 1:
            raise InputError(f"neighbours must be at least 1, got {neighbours}")
        self.ks = RetrievalMetrics(ks=ks).options.ks
        self.queries = queries
        self.neighbours = neighbours
        self.seed = seed
        self.path = path
        self.rows: list[tuple[str, dict[str, float], float]] = []
        self._fitting = False
        self._started = 0.0
        self._seconds_before = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew; a checkpoint's row comes after this."""
        self._fitting = stage == "fit"
        if self._fitting:
            self.rows, self._started, self._seconds_before = [], 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates the untrained weights."""
        if self.path is not None and Path(self.path).is_dir():
            raise InputError(f"path must be a file such as {self.path}/retrieval.png, got the folder {self.path!r}")
        if not self.rows:
            name = "untrained" if trainer.global_step == 0 else f"step {trainer.global_step}"
            values, _ = self._evaluate(trainer, pl_module)
            self.rows = [(name, values, 0.0)]
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates the trained weights, prints the table and draws the figure."""
        seconds = self._seconds()
        self._seconds_before, self._started = seconds, 0.0
        values, evaluated = self._evaluate(trainer, pl_module)
        self.rows = [*self.rows[:1], (f"trained, step {trainer.global_step}", values, seconds)]
        figure = self._figure(trainer, evaluated.options.metric, *_gathered(evaluated)) if self.queries else None
        # Asking the trainer for its folder is a collective, so every rank asks.
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "retrieval.png")
        _publish(_table(self.rows, self.ks), figure, path)

    def state_dict(self) -> dict[str, Any]:
        """The row of the untrained weights and the seconds so far."""
        return {"rows": [list(row) for row in self.rows[:1]], "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the row of the first start; validation and test have no use for it."""
        if not self._fitting:
            return
        self.rows = [(row[0], row[1], row[2]) for row in state_dict["rows"]]
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._started if self._started else 0.0)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[str, float], RetrievalMetrics]:
        """The values of all ranks, and the evaluator with the rows of this one."""
        loader = _first_loader(trainer)
        batches = trainer.num_val_batches[0] if trainer.num_val_batches else 0
        # Together, as a rank that raises alone would leave the others waiting.
        if not any(has for (has,) in distributed.gather_numbers([int(batches > 0)], distributed.collective_device())):
            raise InputError(
                "RetrievalReport evaluates the validation data and there is none: give the datamodule a validation "
                "set and leave limit_val_batches above 0, or take RetrievalReport out of the callbacks"
            )
        metrics = empty_copy(self._evaluator(pl_module))
        with _evaluation_mode(pl_module), torch.no_grad():
            for position, batch in enumerate(loader):
                if position >= batches:
                    break
                batch = trainer.precision_plugin.convert_input(batch)
                batch = trainer.strategy.batch_to_device(batch, pl_module.device)
                with trainer.precision_plugin.forward_context():
                    embeddings = pl_module(batch["image"]).float()
                metrics.update(embeddings, **evaluation_columns(batch))
        return metrics.compute(), metrics

    def _evaluator(self, pl_module: LightningModule) -> RetrievalMetrics:
        template = getattr(getattr(pl_module, "val_metrics", None), "template", None)
        if not isinstance(template, RetrievalMetrics):
            return RetrievalMetrics(ks=self.ks)
        return RetrievalMetrics(ks=self.ks, metric=template.options.metric, ignore=template.options.ignore)

    def _figure(
        self,
        trainer: Trainer,
        metric: SimilarityName,
        embeddings: Tensor,
        labels: Tensor,
        indices: Tensor,
        is_query: Tensor,
        is_gallery: Tensor,
    ) -> Figure | None:
        if not trainer.is_global_zero:
            return None
        # A padded sampler repeats images: each is shown once.
        _, first = np.unique(indices.numpy(), return_index=True)
        unique = torch.from_numpy(first)
        embeddings, labels, indices = embeddings[unique], labels[unique], indices[unique]
        queries = torch.nonzero(is_query[unique])[:, 0]
        gallery = torch.nonzero(is_gallery[unique])[:, 0]
        chosen = np.random.default_rng(self.seed).permutation(len(queries))[: self.queries]
        queries = queries[torch.from_numpy(np.sort(chosen))]
        columns = min(self.neighbours, len(gallery) - int(bool(torch.isin(queries, gallery).any())))
        if len(queries) == 0 or columns < 1:
            return None
        _, nearest = knn(
            embeddings[queries],
            embeddings[gallery],
            columns,
            metric=metric,
            query_indices=indices[queries],
            gallery_indices=indices[gallery],
        )
        figure = Figure(figsize=(0.9 * (columns + 1.2), 0.9 * len(queries) + 0.9), layout="constrained")
        grid = figure.subplots(len(queries), columns + 1, squeeze=False)
        for row, query, near in zip(grid, queries, gallery[nearest], strict=True):
            _show(row[0], _picture(trainer, int(indices[query])), None)
            for axes, neighbour in zip(row[1:], near, strict=True):
                hit = bool(labels[neighbour] == labels[query]) and int(labels[query]) != UNLABELLED
                _show(axes, _picture(trainer, int(indices[neighbour])), hit)
        grid[0][0].set_title("query", fontsize=9)
        for rank, axes in enumerate(grid[0][1:], start=1):
            axes.set_title(str(rank), fontsize=9)
        figure.suptitle(
            "Random queries and their nearest neighbours, by rank\nsolid blue: same class    dashed orange: another",
            fontsize=9,
        )
        return figure


def _first_loader(trainer: Trainer) -> Any:
    return next(iter(named_loaders(trainer.val_dataloaders).values()), None)


def _gathered(evaluated: RetrievalMetrics) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, indices, is_query and is_gallery of all ranks, on the CPU; a rank may have none."""
    device = distributed.collective_device()
    own = evaluated.embeddings[0].shape[1] if evaluated.embeddings else 0
    dimensions = max(each for (each,) in distributed.gather_numbers([own], device))
    flags, whole = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    columns = (
        [torch.zeros(0, dimensions), *evaluated.embeddings],
        [whole, *evaluated.labels],
        [whole, *evaluated.indices],
        [flags, *evaluated.is_query],
        [flags, *evaluated.is_gallery],
    )
    embeddings, labels, indices, is_query, is_gallery = (
        distributed.gather_rows(torch.cat(column).to(device)).cpu() for column in columns
    )
    return embeddings, labels, indices, is_query, is_gallery


@rank_zero_only
def _publish(table: str, figure: Figure | None, path: Path) -> None:
    print("\n" + table)
    if figure is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    FigureCanvasAgg(figure)
    figure.savefig(aside, dpi=150, format=path.suffix.lstrip(".") or "png")
    os.replace(aside, path)
    print(f"Queries and their nearest neighbours: {path}")


def _table(rows: list[tuple[str, dict[str, float], float]], ks: Sequence[int]) -> str:
    header = ["", *(f"Recall@{k}" for k in ks), "MAP@R", "seconds"]
    body = [
        [name, *(f"{100 * values[f'recall@{k}']:.1f}" for k in ks), f"{100 * values['map@r']:.1f}", f"{seconds:.0f}"]
        for name, values, seconds in rows
    ]
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (zip(line, widths, strict=True) for line in (header, *body))
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _show(axes: Axes, picture: NDArray[Any], hit: bool | None) -> None:
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(hit is not None)
        spine.set_color(HIT if hit else MISS)
        spine.set_linewidth(2.5)
        spine.set_linestyle("solid" if hit else (0, (2, 1.2)))


def _picture(trainer: Trainer, index: int) -> NDArray[Any]:
    """The image as it is before any transform where the datamodule can tell, else the tensor, stretched to 0..1.

    Grey where the data set of this rank does not have the image in that place.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if hasattr(datamodule, "eval_image"):
        picture: NDArray[Any] = datamodule.eval_image(index)
        return picture
    dataset = _first_loader(trainer).dataset
    sample: dict[str, Any] = dataset[index] if index < len(dataset) else {"index": -1}
    if int(sample.get("index", index)) != index:
        return np.full((1, 1, 3), 220, np.uint8)
    image = sample["image"].float()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    stretched: NDArray[Any] = image.permute(1, 2, 0).squeeze(-1).numpy()
    return stretched


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every layer is back in its own mode, frozen ones included."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
