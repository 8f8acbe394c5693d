"""`RetrievalReport`: retrieval before and after training, as a table and as a figure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only

from lightning_dml import distributed
from lightning_dml.checks import check_count
from lightning_dml.errors import InputError
from lightning_dml.files import write_whole
from lightning_dml.modules.evaluation import empty_copy, evaluation_columns, gathered_rows, named_loaders
from lightning_dml.modules.sample_encoding import modes_restored
from lightning_dml.report.retrieval_figure import MISSING, Picture, as_picture, retrieval_figure, retrieval_table
from lightning_dml.retrieval import RetrievalMetrics

_FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


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
        *,
        queries: int = 8,
        neighbours: int = 7,
        seed: int = 0,
        path: str | None = None,
    ) -> None:
        super().__init__()
        if path is not None and Path(path).suffix.lower() not in _FORMATS:
            raise InputError(f"path must end in one of {', '.join(_FORMATS)}, got {path!r}")
        check_count("queries", queries, least=0, hint="0 draws no figure")
        check_count("neighbours", neighbours)
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
        figure = self._figure(trainer, evaluated) if self.queries else None
        # Asking the trainer for its folder is a collective, so every rank asks.
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "retrieval.png")
        _publish(retrieval_table(self.rows, self.ks), figure, path)

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
        flags = distributed.gather_numbers([int(batches > 0)], distributed.collective_device())
        if not any(flag for (flag,) in flags):
            raise InputError(
                "RetrievalReport evaluates the validation data and there is none: give the datamodule a validation "
                "set and leave limit_val_batches above 0, or take RetrievalReport out of the callbacks"
            )
        metrics = empty_copy(self._evaluator(pl_module))
        with modes_restored(pl_module), torch.no_grad():
            pl_module.eval()
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

    def _figure(self, trainer: Trainer, evaluated: RetrievalMetrics) -> Figure | None:
        """The figure of the rows of all ranks on rank zero; None on the others, and with nothing to show."""
        rows = gathered_rows(evaluated)
        if not trainer.is_global_zero:
            return None
        return retrieval_figure(
            *rows,
            picture=lambda index: _picture(trainer, index),
            queries=self.queries,
            neighbours=self.neighbours,
            metric=evaluated.options.metric,
            seed=self.seed,
        )


def _first_loader(trainer: Trainer) -> Any:
    return next(iter(named_loaders(trainer.val_dataloaders).values()), None)


@rank_zero_only
def _publish(table: str, figure: Figure | None, path: Path) -> None:
    print("\n" + table)
    if figure is None:
        return
    FigureCanvasAgg(figure)
    write_whole(path, lambda aside: figure.savefig(aside, dpi=150))
    print(f"Queries and their nearest neighbours: {path}")


def _picture(trainer: Trainer, index: int) -> Picture:
    """The image as it is before any transform where the datamodule can tell, else the tensor, stretched to 0..1.

    Grey where the data set of this rank does not have the image in that place.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if hasattr(datamodule, "eval_image"):
        picture: Picture = datamodule.eval_image(index)
        return picture
    dataset = _first_loader(trainer).dataset
    sample: dict[str, Any] = dataset[index] if index < len(dataset) else {"index": -1}
    return as_picture(sample["image"]) if int(sample.get("index", index)) == index else MISSING
