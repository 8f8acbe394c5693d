"""The pair weights of a loss that tells nothing but its value, measured through its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_dml.errors import InputError
from lightning_dml.losses.calling import call_plainly

MEASURED_REFERENCES = 8192
"""Most references that another library's loss is measured against: its probing axes then take half a GiB."""

_TILT = 1e-7  # of the probing axes; the similarities change by half its square, which is less than rounding
_MISMATCH = 1e-3  # of the gradient and of what the weights make of it, relative; rounding is far below


def measured_weights(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    r"""Signed pair weights :math:`dL/dS` of any loss on inner products, cosines or distances of unit rows.

    Each reference gets an axis of its own by which it is tilted very slightly, and the anchors' gradient along that
    axis is the weight of the pair. The gradient along all other axes must follow from the weights, or the loss depends
    on something else. In-batch a loss tells only the sum of both directions of a pair; the answer then holds half of
    it at both places. The axes take 8 M (D + M) bytes, and there may be 8,192 references.

    Args:
        loss: any module called `loss(embeddings, labels[, ref_emb=..., ref_labels=...])`.
        embeddings: (N, D) anchors with unit rows.
        labels: (N,) integer labels.
        ref_emb: (M, D) references; None for in-batch.
        ref_labels: (M,) integer labels of the references.

    Returns:
        (N, M) float64; M is N in-batch.

    Raises:
        InputError: if the loss cannot be called so, as a loss with proxies of its own dimension; or if it depends on
            more than the similarities of pairs, and so has no such weights; or for more references.
    """
    references = embeddings if ref_emb is None else ref_emb
    if len(references) > MEASURED_REFERENCES:
        raise InputError(
            f"ref_emb has {len(references)} rows, and the weights of {type(loss).__name__} can be measured against at "
            f"most {MEASURED_REFERENCES}: draw some of them"
        )
    # Validation may run in inference mode, where nothing has a gradient.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(embeddings.device.type, enabled=False):
        references = references.detach().double().clone()
        # Every reference is tilted towards an axis that nothing else has, and stays of unit length.
        axes = _TILT * torch.eye(len(references), dtype=torch.float64, device=references.device)
        tilted = torch.cat((references * math.sqrt(1 - _TILT**2), axes), dim=1)
        if ref_emb is None:
            anchors = tilted
        else:
            anchors = embeddings.detach().double().clone()
            anchors = torch.cat((anchors, anchors.new_zeros(len(anchors), len(references))), dim=1)
        anchors.requires_grad_()
        try:
            value = call_plainly(loss, anchors, labels, None if ref_emb is None else tilted, ref_labels)
        except Exception as error:
            raise InputError(
                f"loss {type(loss).__name__} has no weights of pairs of samples: it could not be called "
                f"so, as in-batch losses cannot with references, nor losses with proxies in another dimension ({error})"
            ) from error
        if not value.requires_grad:
            return anchors.new_zeros(len(anchors), len(references), requires_grad=False)
        (gradient,) = torch.autograd.grad(value, anchors)
    return _weights(type(loss).__name__, anchors.detach(), tilted.detach(), gradient, ref_emb is None)


def _weights(name: str, anchors: Tensor, tilted: Tensor, gradient: Tensor, in_batch: bool) -> Tensor:
    dim = anchors.shape[1] - len(tilted)
    weights = gradient[:, dim:] / _TILT
    if in_batch:
        weights.fill_diagonal_(0)
    rows = anchors[:, :dim]
    # Only what turns the rows: a loss that normalises them anew has no gradient along them.
    excess = weights @ tilted[:, :dim] - gradient[:, :dim]
    excess -= (excess * rows).sum(dim=1, keepdim=True) * rows
    largest = max(float(weights.abs().sum(dim=1).max()), float(gradient.abs().max())) if weights.numel() else 0.0
    if float(excess.abs().sum()) > _MISMATCH * largest * len(rows):
        raise InputError(
            f"loss {name} has no weights of pairs of samples: its gradient is not that of weighted similarities, so it "
            "depends on more than inner products, cosines or distances of unit rows, as a signal-to-noise ratio does"
        )
    # In-batch measured from either end, equal but for rounding.
    return (weights + weights.T) / 4 if in_batch else weights
