"""Samples encoded amid a training: the right rows in the right order, and nothing of it left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dml.errors import InputError
from lightning_dml.modules.sample_encoding import BatchPlan, encode_samples
from tests.helpers import run_ranks
from tests.tiny import QUIET, TinyData, TinyEmbedder

POSITIONS = [7, 3, 59, 3, 0, 21, 40]


class Once(Callback):
    """Calls a function at the start of the training and keeps what it gave."""

    def __init__(self, function: Callable[[Trainer, LightningModule], Any]) -> None:
        self.function = function
        self.result: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The earliest moment at which a callback may ask for samples."""
        self.result = self.function(trainer, pl_module)


class Plain(LightningModule):
    """Somebody else's module: whatever it trains, it has an embedder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = TinyEmbedder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Nothing that matters here."""
        return sum((parameter.sum() for parameter in self.parameters()), torch.zeros(()))

    def configure_optimizers(self) -> Any:
        """Nothing that matters here."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def at_start(function: Callable[[Trainer, LightningModule], Any], data: Any = None, **settings: Any) -> Any:
    """The result of `function(trainer, module)` at the start of a training."""
    once = Once(function)
    trainer = Trainer(max_steps=1, limit_val_batches=0, callbacks=[once], **QUIET, **settings)
    trainer.fit(Plain(), data or TinyData())
    return once.result


def encode(trainer: Trainer, module: Any, batch_size: int = 3, encoder: Any = None, **options: Any) -> Any:
    """The call under test with the module's embedder."""
    positions = options.pop("positions", POSITIONS)
    return encode_samples(
        trainer, module, module.embedder if encoder is None else encoder, positions, batch_size, **options
    )


@pytest.mark.parametrize("positions", [POSITIONS, torch.tensor(POSITIONS)])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_of_the_samples_in_order(positions: Any, workers: int) -> None:
    """A row under another sample's label would be a wrong positive for thousands of steps."""
    data = TinyData(num_workers=workers)
    embeddings, labels, indices = at_start(lambda t, m: encode(t, m, positions=positions), data)
    assert data.train_set is not None
    samples = [data.train_set[position] for position in POSITIONS]
    expected = TinyEmbedder()(torch.stack([sample["image"] for sample in samples]))
    torch.testing.assert_close(embeddings, expected.detach())
    assert labels.tolist() == [sample["label"] for sample in samples]
    assert indices.tolist() == POSITIONS
    assert not embeddings.requires_grad


def test_augmentation_repeats_by_seed_whatever_the_batches_and_workers() -> None:
    """A figure that changes with the number of workers could not be compared between machines."""

    def calls(trainer: Trainer, module: LightningModule) -> list[Tensor]:
        return [encode(trainer, module, size, seed=seed)[0] for size, seed in ((3, 0), (7, 0), (3, 1))]

    first, other_batches, other_seed = at_start(calls, TinyData(augment=True))
    with_workers = at_start(calls, TinyData(augment=True, num_workers=2))[0]
    torch.testing.assert_close(first, other_batches)
    torch.testing.assert_close(first, with_workers)
    assert (first - other_seed).norm(dim=1).max() > 1e-2
    same_sample = at_start(lambda t, m: encode(t, m, positions=[3] * 8)[0], TinyData(augment=True))
    assert len(same_sample.unique(dim=0)) > 1


class Restless(nn.Module):
    """Draws from every generator and moves buffers, as an embedder with dropout and batch norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 4))
        self.net[1].eval()

    def forward(self, images: Tensor) -> Tensor:
        """Draws what nobody should draw, too."""
        random.random(), np.random.random(), torch.rand(1)
        embeddings: Tensor = self.net(images)
        return embeddings


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_behind(frozen: bool) -> None:
    """Whoever measures must get the model that they would have got without measuring."""
    encoder = Restless()
    if not frozen:
        encoder.train()
    watched: list[int] = []
    encoder.register_forward_hook(lambda *_: watched.append(1))
    state, modes = copy.deepcopy(encoder.state_dict()), [module.training for module in encoder.modules()]

    def call(trainer: Trainer, module: LightningModule) -> list[Any]:
        def states() -> list[Any]:
            return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

        before = states()
        rows = encode(trainer, module, encoder=encoder)[0]
        again = encode(trainer, module, encoder=encoder)[0]
        return [before, states(), rows, again]

    before, after, rows, again = at_start(call, TinyData(augment=True))
    assert before == after
    assert torch.equal(rows, again)
    assert [module.training for module in encoder.modules()] == modes
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert watched == []
    encoder(torch.zeros(2, 1, 8, 8))
    assert watched == [1]


def test_a_failing_call_leaves_nothing_behind_either() -> None:
    """A user who catches the error in a notebook goes on with the same module."""
    encoder = Restless()
    encoder.train()
    encoder.net = nn.Sequential(*encoder.net, nn.Linear(5, 5))
    hooks = encoder._forward_hooks
    state = copy.deepcopy(encoder.state_dict())

    def call(trainer: Trainer, module: LightningModule) -> bool:
        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="shapes"):
            encode(trainer, module, encoder=encoder)
        return torch.equal(before, torch.get_rng_state())

    assert at_start(call)
    assert encoder._forward_hooks is hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_a_compiled_encoder_is_run_without_compiling_again() -> None:
    """Each new shape or mode would cost a compilation of minutes in the middle of a training."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled anew")

    def call(trainer: Trainer, module: Any) -> list[Tensor]:
        compiled: Any = torch.compile(module.embedder, backend=refuse)
        return [encode(trainer, module)[0], encode(trainer, module, encoder=compiled)[0]]

    plain, compiled = at_start(call)
    assert torch.equal(plain, compiled)


def test_the_precision_is_the_trainers() -> None:
    """Keys in another precision than the training's would differ from its embeddings."""
    rows = at_start(lambda t, m: encode(t, m)[0], precision="64-true")
    assert rows.dtype == torch.float64
    rounded = at_start(lambda t, m: encode(t, m, encoder=m.get_submodule("embedder.net"))[0], precision="bf16-mixed")
    assert rounded.dtype == torch.bfloat16


def test_batches_differ_by_one_row_at_most() -> None:
    """Batch norm fails on a lone last row, and its statistics differ on a short one."""
    for rows in range(1, 40):
        for batch_size in (1, 3, 8):
            sizes = [len(batch) for batch in BatchPlan(rows, batch_size).batches]
            assert sum(sizes) == rows and max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
            assert len(sizes) == -(-rows // batch_size)


def gather_on_ranks(rank: int, ranks: int) -> list[tuple[list[int], int]]:
    """The rows on a rank after all have given the squares of their places, for several numbers of rows."""
    outcomes = []
    for rows in (1, 5, 8):
        plan = BatchPlan(rows, 2)
        parts = [torch.tensor([place**2 for place in plan.batches[number]]) for number in plan.mine]
        outcomes.append((plan.gather(parts).tolist(), len(plan.mine)))
    return outcomes


@pytest.mark.slow
def test_ranks_share_the_rows_and_agree() -> None:
    """Rows come back in order on each rank, with equally many batches, or a synchronised batch norm would hang."""
    expected = [([place**2 for place in range(rows)], batches) for rows, batches in ((1, 1), (5, 2), (8, 2))]
    assert run_ranks(2, gather_on_ranks) == [expected, expected]


class Stream(IterableDataset[Any]):
    """Cannot be asked for a sample."""

    def __iter__(self) -> Any:
        """One batch full."""
        return iter([{"image": torch.zeros(1, 8, 8), "label": 0, "index": i} for i in range(4)])


class LoaderData(TinyData):
    """Hands out what it is given as the training loader."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        """Not one of ours."""
        return self.loader


TUPLES: Any = [(torch.zeros(1, 8, 8), 0)] * 60


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (None, {"positions": []}, "positions is empty"),
        (None, {"positions": [60]}, "less than 60.*got 60"),
        (None, {"positions": [-1]}, "got -1"),
        (None, {"batch_size": 0}, "batch_size.*0"),
        (None, {"seed": -1}, "seed.*-1"),
        (None, {"encoder": nn.Flatten(0)}, r"shape \(3, D\), Flatten gave"),
        (LoaderData(DataLoader(TUPLES, 4)), {}, "'index', got list"),
        (LoaderData(DataLoader(Stream(), 4)), {}, "map-style.*DataLoader of Stream"),
        (LoaderData([DataLoader(TUPLES, 4)]), {}, "one DataLoader.*is list"),
    ],
)
def test_wrong_input_is_named(data: Any, options: dict[str, Any], words: str) -> None:
    """The message says what to change, where Lightning's or torch's own would come from deep inside."""
    with pytest.raises(InputError, match=words):
        at_start(lambda t, m: encode(t, m, **options), data)
