"""Training samples encoded between two steps of a training that must not notice it."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dml import distributed
from lightning_dml.checks import check_count
from lightning_dml.errors import InputError
from lightning_dml.labels import UNLABELLED
from lightning_dml.lightning_repairs import batch_on_device, without_forward_hooks
from lightning_dml.memory.momentum import uncompiled
from lightning_dml.seeds import mixed_seed


def encode_samples(
    trainer: Trainer,
    pl_module: LightningModule,
    encoder: nn.Module,
    positions: Sequence[int] | Tensor,
    batch_size: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of training samples as the encoder gives them now, in the mode that it is in.

    The samples are loaded as the training loads them, by its data set, collate function and batch transfer hooks, and
    the ranks share the batches. The training goes on afterwards as if nothing had happened: random states, buffers (of
    batch norm) and modes are as before. Forward hooks of the encoder itself, which watch the training, are not called.

    The random augmentation of a sample follows from `seed` and its place in `positions`, dropout from `seed` and the
    number of the batch, so a call can be repeated on any number of ranks and workers. Batches differ in size by at
    most one row, as batch norm can do nothing with a lone last one. A data set that draws from a generator of its own,
    rather than from the global ones, does move that generator on.

    Every rank must call this with the same arguments.

    Args:
        trainer: in a fit that has started, so that its training dataloader is known.
        pl_module: the module in training; its batch transfer hooks are used.
        encoder: maps `batch["image"]` to embeddings; one that `torch.compile` made runs uncompiled.
        positions: n positions in the training set, at least one.
        batch_size: rows of a batch on each rank, at most.
        seed: of augmentation and dropout; not negative.

    Returns:
        Embeddings (n, D), labels (n,) and sample indices (n,) on the module's device, in the order of `positions`, the
        same on every rank. The label is -1 where the batch's `enqueue`, if it has one, is False.

    Raises:
        InputError: without positions, with one outside the data set, for a `batch_size` or `seed` out of range, a
            training dataloader without map-style data set, batches without `image`, `label` and `index`, or an encoder
            that does not give one row per image.
    """
    plan = BatchPlan(len(positions), batch_size)
    embeddings, identities = [], []
    with undisturbed(encoder, pl_module.device) as encode:
        for number, batch in load_batches(trainer, pl_module, positions, plan, seed):
            embeddings.append(encode_images(trainer, encode, batch["image"], seed, number))
            labels = batch["label"].long()
            if (mask := batch.get("enqueue")) is not None:
                labels = torch.where(mask, labels, UNLABELLED)
            identities.append(torch.stack((labels, batch["index"].long()), dim=1))
    identity = plan.gather(identities)
    return plan.gather(embeddings), identity[:, 0], identity[:, 1]


class BatchPlan:
    """A division of rows into batches, and of batches among ranks: batch k goes to rank k modulo the ranks.

    All ranks have equally many batches, as an encoder may hold collectives (synchronised batch norm): a rank that would
    have one less takes the last batch as well, and what it makes of it is left out.

    Args:
        rows: how many there are, at least 1.
        batch_size: rows of a batch, at most.

    Attributes:
        batches: the places of the rows of each batch, in order.
        mine: the numbers of this rank's batches.

    Raises:
        InputError: for no rows or a `batch_size` below 1.

    Examples:
        >>> plan = BatchPlan(rows=5, batch_size=2)
        >>> plan.batches, plan.mine
        ([range(0, 2), range(2, 4), range(4, 5)], [0, 1, 2])
    """

    def __init__(self, rows: int, batch_size: int) -> None:
        if rows < 1:
            raise InputError("positions is empty: there is nothing to encode; leave the call out")
        check_count("batch_size", batch_size)
        count, self._ranks = -(-rows // batch_size), distributed.world_size()
        bounds = [-(-rows * number // count) for number in range(count + 1)]
        self.batches = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        rounds = -(-count // self._ranks)
        self.mine = [min(turn * self._ranks + distributed.rank(), count - 1) for turn in range(rounds)]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of all ranks in the order of their places; `parts` are those of each of this rank's batches."""
        numbers = range(len(self.batches))
        by_rank = [[number for number in numbers if number % self._ranks == rank] for rank in range(self._ranks)]
        counts = [sum(len(self.batches[number]) for number in own) for own in by_rank]
        rows = torch.cat(list(parts))[: counts[distributed.rank()]]
        order = [place for own in by_rank for number in own for place in self.batches[number]]
        return distributed.gather_rows(rows, counts)[torch.tensor(order, device=rows.device).argsort()]


def load_batches(
    trainer: Trainer, pl_module: LightningModule, positions: Sequence[int] | Tensor, plan: BatchPlan, seed: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """This rank's batches of the plan, with their numbers, loaded and moved as the training's are.

    Moves the global random states; run it within `undisturbed`.

    Raises:
        InputError: as `encode_samples` does.
    """
    check_count("seed", seed, least=0)
    loader = training_loader(trainer)
    places = [int(position) for position in positions]
    size = len(loader.dataset)  # type: ignore[arg-type]
    outside = [position for position in places if not 0 <= position < size]
    if outside:
        raise InputError(
            f"positions must be at least 0 and less than {size}, the length of the training set, got {outside[0]}; "
            "batch['index'] must be the position in the data set"
        )
    own: DataLoader[Any] = DataLoader(
        _SeededSamples(loader.dataset, places, seed),
        batch_sampler=[list(plan.batches[number]) for number in plan.mine],
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, len(plan.mine)),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        pin_memory=loader.pin_memory,
        generator=torch.Generator().manual_seed(mixed_seed(seed)),
    )
    for number, batch in zip(plan.mine, own, strict=True):
        _seed_for(pl_module.device, seed, number, 1)
        batch = batch_on_device(trainer, pl_module, batch)
        if not (isinstance(batch, Mapping) and {"image", "label", "index"} <= set(batch)):
            content = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(
                "training samples are encoded from batches that are a dict with 'image', 'label' and 'index', "
                f"got {content}; return such a dict from the dataset"
            )
        yield number, dict(batch)


@torch.no_grad()
def encode_images(trainer: Trainer, encoder: nn.Module, images: Tensor, seed: int, number: int) -> Tensor:
    """Embeddings (B, D) of batch `number`, in the trainer's precision; dropout follows from `seed` and `number`.

    Raises:
        InputError: if the encoder does not give one row per image.
    """
    _seed_for(images.device, seed, number, 2)
    with trainer.precision_plugin.forward_context():
        embeddings = encoder(images)
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(images):
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise InputError(
            f"encoder must map images to embeddings of shape ({len(images)}, D), {type(encoder).__name__} gave "
            f"{shape}; name the attribute of the module that does"
        )
    return embeddings.detach()


@contextlib.contextmanager
def undisturbed(encoder: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Gives the uncompiled encoder to use; afterwards its modes, buffers and hooks and the random states are as before.

    Calls of the encoder run none of its forward hooks: a callback that catches the embeddings of the training step
    would take these for them.
    """
    inner = uncompiled(encoder)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in inner.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, torch.no_grad(), modes_restored(inner), without_forward_hooks(inner):
        try:
            yield inner
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))


@contextlib.contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Puts every layer, frozen ones included, back into its own mode at the end of the block."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def training_loader(trainer: Trainer) -> DataLoader[Any]:
    """The training dataloader, whose data set has `__getitem__` and `__len__`.

    Raises:
        InputError: if the trainer has another, or several.
    """
    loader: object = trainer.train_dataloader
    kind = type(loader).__name__
    if isinstance(loader, DataLoader):
        dataset = loader.dataset
        if (
            loader.batch_sampler is not None
            and hasattr(dataset, "__len__")
            and not isinstance(dataset, IterableDataset)
        ):
            return loader
        kind = f"{kind} of {type(dataset).__name__}"
    raise InputError(
        "training samples can be encoded only from one DataLoader that batches a map-style data set (with __getitem__ "
        f"and __len__), the training dataloader is {kind}; use such a loader, or turn off what asks for the samples"
    )


class _SeededSamples(Dataset[Any]):
    """The samples at `positions`; what a sample draws follows from the seed and its place alone."""

    def __init__(self, dataset: Dataset[Any], positions: Sequence[int], seed: int) -> None:
        self.dataset = dataset
        self.positions = positions
        self.seed = seed

    def __getitem__(self, place: int) -> Any:
        _seed_cpu(mixed_seed(self.seed, place))
        return self.dataset[self.positions[place]]


def _seed_cpu(seed: int) -> None:
    # Not torch.manual_seed: it seeds every GPU as well, and workers must leave those alone.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _seed_for(device: torch.device, *numbers: int) -> None:
    seed = mixed_seed(*numbers)
    _seed_cpu(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
