"""`PairWeightingLoss`: a miner, a weighting and a reduction as a loss module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from lightning_dml import distributed
from lightning_dml.checks import check_choice, check_count, check_embeddings, check_finite, check_integers
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.losses.engine import PairSums, PairTask, pair_sums, row_statistics
from lightning_dml.losses.labels import PairLabels
from lightning_dml.losses.mining import Miner
from lightning_dml.losses.sharded import sharded_pair_sums
from lightning_dml.losses.weighting import Weighting

SAMPLE = 256  # references whose length is checked in every call

Reduction = Literal["anchors", "active_anchors", "pairs"]

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:
    # For a type checker and an editor, `**options: Unpack[LossOptions]` names the options. jsonargparse would take them
    # from there as well, without defaults; where it sees Any, it follows super().__init__ to the base's own signature.
    class Unpack:
        """Stands for `typing.Unpack` at run time."""

        def __class_getitem__(cls, options: type) -> Any:
            """Any, whatever the options."""
            return Any


class EngineOptions(TypedDict, total=False):
    """Options of every loss, by name; see `PairWeightingLoss`."""

    reduction: Reduction
    gather: bool
    block_bytes: int
    validate: bool | None


class LossOptions(EngineOptions, total=False):
    """Options of every loss that may be given any miner, by name; see `PairWeightingLoss`."""

    miner: Miner | None


class PairWeightingLoss(nn.Module):
    """General pair weighting (arXiv 1905.12837; the identity it rests on: arXiv 1904.06627).

    Every pair-based loss is samples mining and pairs weighting over the similarity matrix S of anchors and
    references. The gradient of the loss is that of sum_ij sg(dL/dS_ij) S_ij.

    Called without references, the loss is in-batch: every row is an anchor and a reference of the others. Under an
    initialised process group the references are then the batches of all ranks, with gradient, and the loss of each
    rank is scaled so that DDP's mean over ranks is the gradient of one process with the whole batch; the value is
    that of the whole batch on every rank. Every rank must then call the loss, forward and backward.

    Args:
        weighting: row losses and pair weights.
        miner: keeps the informative pairs; None keeps all.
        reduction: what the sum over anchors is divided by: the number of `anchors` (as released XBM and MS code
            do), of `active_anchors` (those with a pair of non-zero weight), or of `pairs` of non-zero weight. Counts
            are those of all ranks.
        gather: False keeps the loss within the rank: own batch as references, own counts, no collective.
        block_bytes: upper limit in bytes of a block of S; the working memory is a few times that.
        validate: whether a call checks that rows are finite and of unit length, all anchors and a sample of the
            references; and, should the loss not be finite, which rows are to blame. None checks on a CPU and not on an
            accelerator, where the answer would be waited for. Set it to False for raw inner products.

    Raises:
        InputError: for an unknown reduction or a block of less than one byte.

    Examples:
        >>> from lightning_dml.losses import ContrastiveLoss
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> loss = ContrastiveLoss(margin=0.5)
        >>> float(loss(embeddings, torch.tensor([0, 0, 1])))  # (1 + 0.3) + (1 + 0.1) + (0.3 + 0.1), over 3
        0.93333...
    """

    def __init__(
        self,
        weighting: Weighting,
        miner: Miner | None = None,
        *,
        reduction: Reduction = "anchors",
        gather: bool = True,
        block_bytes: int = 16 * 2**20,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        check_count("block_bytes", block_bytes)
        self.weighting = weighting
        self.miner = miner
        self.reduction = reduction
        self.gather = gather
        self.block_bytes = block_bytes
        self.validate = validate

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        ref_indices: Tensor | None = None,
        ref_sharded: bool = False,
    ) -> Tensor:
        """Loss of the anchors against the references.

        Args:
            embeddings: (N, D) float anchors with unit rows.
            labels: (N,) integer labels; rows with label -1 take part in no pair.
            ref_emb: (M, D) float references, such as `memory_bank.embeddings`; None for in-batch.
            ref_labels: (M,) integer labels of the references.
            indices: (N,) integer sample indices. A reference with the anchor's index is the same sample and no pair.
                In-batch, the anchor's own row is left out with or without them.
            ref_indices: (M,) integer sample indices of the references; -1 where unknown.
            ref_sharded: whether the references are this rank's share of a set that is spread over the ranks round
                robin: row s of the set is row s // ranks of rank s % ranks. Value, gradient and draws are those of the
                whole set on every rank. Every rank must then call the loss; what the ranks send each other tells
                `losses.sharded.bytes_sent`. Without a process group it makes no difference.

        Returns:
            0-dim loss in float32 (float64 for float64 embeddings); 0 with a zero gradient where no pair exists.

        Raises:
            InputError: if shapes, lengths or dtypes do not fit together, or rows are not finite or of unit length; if
                sharded references are to get a gradient, or the loss keeps to its rank. Rows are checked by the rank
                that has them: where only some ranks raise, the others wait for them until the collective times out.
        """
        together = self.gather and distributed.is_distributed()
        if ref_sharded:
            self._check_sharded(ref_emb)
        references, task = self.prepare(embeddings, labels, ref_emb, ref_labels, indices, ref_indices, together)
        sums = (sharded_pair_sums if ref_sharded and together else pair_sums)(embeddings, references, task)
        if self._validates(embeddings) and not bool(torch.isfinite(sums.loss)):
            check_unit_rows("embeddings", embeddings[labels != UNLABELLED])
            check_unit_rows("ref_emb", references[task.labels.references != UNLABELLED])
        return self._reduce(sums, len(embeddings), together)

    def prepare(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        indices: Tensor | None,
        ref_indices: Tensor | None,
        together: bool,
    ) -> tuple[Tensor, PairTask]:
        """Checks the arguments of a call and says what the engine is to do: the references (M, D) and its task.

        With `together`, the in-batch references are the rows of all ranks, and every rank must call.
        """
        if ref_emb is not None and not isinstance(ref_emb, Tensor):
            raise InputError(
                f"ref_emb must be a torch.Tensor, got {type(ref_emb).__name__}; an indices_tuple of "
                "pytorch-metric-learning has no place here: give the loss a miner, and references by keyword"
            )
        check_embeddings("embeddings", embeddings)
        check_integers("labels", labels, len(embeddings))
        if indices is not None:
            check_integers("indices", indices, len(embeddings))
        if ref_emb is None:
            if ref_labels is not None or ref_indices is not None:
                raise InputError("ref_labels and ref_indices need ref_emb; leave all three out for an in-batch loss")
            references, pairs = _in_batch(embeddings, labels, indices, together)
        else:
            if ref_labels is None:
                raise InputError("ref_emb needs ref_labels, the label of each reference row")
            check_embeddings("ref_emb", ref_emb, dim=embeddings.shape[1])
            check_integers("ref_labels", ref_labels, len(ref_emb), "ref_emb")
            if ref_indices is not None:
                check_integers("ref_indices", ref_indices, len(ref_emb), "ref_emb")
            references, pairs = ref_emb, PairLabels(labels, ref_labels, indices, ref_indices)
        if self._validates(embeddings):
            check_unit_rows("embeddings", embeddings[labels != UNLABELLED])
            if ref_emb is not None:
                every = slice(None, None, max(1, len(references) // SAMPLE))
                check_unit_rows("ref_emb", references[every][pairs.references[every] != UNLABELLED])
        task = PairTask(pairs, self.miner, self.weighting, self.block_bytes, counting=self.reduction != "anchors")
        statistics = row_statistics(embeddings, references, task)
        if statistics is not None:
            if ref_emb is not None:
                raise InputError(
                    f"{type(self.weighting).__name__} couples the rows of anchors and positives and works in-batch "
                    "only: leave ref_emb out, or choose a variant or loss whose anchors are independent"
                )
            everyone = distributed.gather_rows(statistics) if together else statistics
            task = task._replace(statistics=(statistics, everyone))
        return references, task

    def _check_sharded(self, ref_emb: Tensor | None) -> None:
        if ref_emb is None:
            raise InputError("ref_sharded=True needs ref_emb, this rank's share of the references, got None")
        if isinstance(ref_emb, Tensor) and ref_emb.requires_grad:
            raise InputError("ref_emb requires a gradient, which sharded references get none of: detach it")
        if not self.gather and distributed.is_distributed():
            raise InputError(
                "ref_sharded=True needs the other ranks' shares, and gather=False keeps the loss within its rank: "
                "set gather to True, or hold all references on every rank"
            )

    def _validates(self, embeddings: Tensor) -> bool:
        return embeddings.device.type == "cpu" if self.validate is None else self.validate

    def _reduce(self, sums: PairSums, anchors: int, together: bool) -> Tensor:
        loss = sums.loss
        divisor = reduction_divisor(self.reduction, anchors, sums.active_anchors, sums.pairs).to(loss.dtype)
        if not together:
            return loss / divisor.clamp_min(1)
        total, divisor = distributed.all_reduce_sum(torch.stack((loss.detach(), divisor)))
        divisor = divisor.clamp_min(1)
        own = loss * (distributed.world_size() / divisor)
        whole: Tensor = own + (total / divisor - own).detach()  # value of the whole batch, gradient of the own share
        return whole

    def extra_repr(self) -> str:
        """Settings that `print` shows between the brackets."""
        return f"reduction={self.reduction!r}"


def reduction_divisor(reduction: Reduction, anchors: int, active_anchors: Tensor, pairs: Tensor) -> Tensor:
    """Number that the summed row losses are divided by, a 0-dim integer tensor; 0 where nothing is counted.

    Args:
        reduction: of the loss.
        anchors: how many anchors there are.
        active_anchors: 0-dim integer tensor, how many of them have a pair of non-zero weight.
        pairs: 0-dim integer tensor, how many pairs have a weight other than zero.
    """
    return {"anchors": pairs.new_tensor(anchors), "active_anchors": active_anchors, "pairs": pairs}[reduction]


def _in_batch(embeddings: Tensor, labels: Tensor, indices: Tensor | None, together: bool) -> tuple[Tensor, PairLabels]:
    if not together:
        return embeddings, PairLabels(labels, labels, indices, indices, own_column=0)
    counts = distributed.row_counts(len(embeddings), embeddings.device)
    references = distributed.gather_rows_with_grad(embeddings, counts)
    ref_labels = distributed.gather_rows(labels, counts)
    ref_indices = None if indices is None else distributed.gather_rows(indices, counts)
    own_column = sum(counts[: distributed.rank()])
    return references, PairLabels(labels, ref_labels, indices, ref_indices, own_column)


def check_unit_rows(name: str, rows: Tensor) -> None:
    """Raises `InputError` unless every row (n, D) is finite and of unit length."""
    rows = rows.detach()
    tolerance = 2e-2  # rows that were kept in bfloat16 are off by up to a hundredth
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    wrong = ~((norms - 1).abs() <= tolerance)  # NaN as well
    if not bool(wrong.any()):
        return
    check_finite(name, rows)
    first = int(wrong.nonzero()[0])
    raise InputError(
        f"{name} must have rows of unit length, but {int(wrong.sum())} of {len(rows)} have not, such as row {first} of "
        f"length {float(norms[first]):.4g}: normalise with torch.nn.functional.normalize, or set the loss's validate "
        "to False for raw inner products"
    )
