"""The command `lightning-dml curves`: weight curves of losses, on the pairs of a real batch where one is asked for."""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_dml.commands.training_set import TrainingSet, columns_of
from lightning_dml.errors import InputError, input_error_in
from lightning_dml.losses import Context, ObservedWeights, PairWeightingLoss, context_free, weight_curve
from lightning_dml.losses.calling import Rows
from lightning_dml.losses.inspection.measured import MEASURED_REFERENCES
from lightning_dml.losses.inspection.observed import thinned
from lightning_dml.memory import MemoryBank
from lightning_dml.parsing import (
    ambiguous_classes,
    class_complaint,
    constructor_complaint,
    instantiated,
    refused_value,
)
from lightning_dml.report import DrawnCurve, curve_figure, save_curves
from lightning_dml.report.pair_observation import drawn_from, observe

USAGE = """%(prog)s --losses '[ContrastiveLoss, MultiSimilarityLoss]'
       %(prog)s --config configs/curves.yaml
       %(prog)s --training configs/quickstart.yaml --ckpt_path last.ckpt"""

ENDINGS = (".png", ".svg", ".csv")

ReadTraining = Callable[[Sequence[str]], tuple[LightningModule, LightningDataModule | None]]
"""Makes model and data of training configs."""


def main(arguments: Sequence[str], read_training: ReadTraining) -> None:
    """Runs `lightning-dml curves`.

    Args:
        arguments: those after `curves`.
        read_training: makes model and data of the configs of a training, with its seed set.

    Raises:
        InputError: for losses, files and options that do not fit.
    """
    curves(read_training, **_options(arguments))


def curves(
    read_training: ReadTraining,
    losses: nn.Module | list[nn.Module] | dict[str, nn.Module] | None = None,
    training: list[str] | str | None = None,
    ckpt_path: str | None = None,
    bank_file: str | None = None,
    context: Context | None = None,
    relative: bool = False,
    points: int = 401,
    pairs: int = 2000,
    seed: int = 0,
    output: str = "curves",
) -> None:
    """Draws weight against similarity for one or several losses, positives and negatives apart.

    Losses that look at one pair at a time have one curve. Of all others the curve is that of an anchor with stated
    other pairs, the context. With a training, a batch is drawn and embedded as the training would, in evaluation mode,
    and the weights of its pairs are drawn as points over the density of the pairs: against the memory bank of the
    checkpoint or of a file, or, without one, in the batch itself.

    Args:
        read_training: makes model and data of training configs.
        losses: class names, class paths with init_args, or a mapping of names for the legend to these; left out, the
            training's own loss, that against the bank where there is one.
        training: training configs, as `fit --config` takes them, laid over each other, for a batch of real pairs.
        ckpt_path: checkpoint of that training: its weights, and the memory bank in it.
        bank_file: a memory bank as `lightning-dml bank` writes it, instead of the checkpoint's.
        context: the anchor's other pairs, `positives` and `negatives`, for the curves of losses that look at them.
        relative: divide each loss's weights by the largest that is shown of it on a side, to compare shapes.
        points: similarities from -1 to 1 at which a curve is computed.
        pairs: most pairs of each side to draw as points.
        seed: which batch, by the epoch of its sampler where that has any, and which pairs are drawn.
        output: path without a suffix for a PNG, an SVG and a CSV file, which replace older ones.
    """
    for name, value, least in (("points", points, 2), ("pairs", pairs, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if training is None and (ckpt_path or bank_file):
        raise InputError(
            f"{'ckpt_path' if ckpt_path else 'bank_file'} is of no use without a training, whose batch is to be drawn: "
            "give its config with --training"
        )
    if losses is None and training is None:
        raise InputError(
            "there is nothing to draw: name losses with --losses '[ContrastiveLoss, ...]', or a training config with "
            "--training, whose own loss is then drawn"
        )
    stem = _stem(output)
    named = None if losses is None else _named(losses)
    curve_of: dict[str, DrawnCurve] = {}
    if named is not None and training is None:
        curve_of = {name: _curve(loss, points, context) for name, loss in named.items()}
    seen: dict[str, ObservedWeights] = {}
    shown = None
    if training is not None:
        if ckpt_path is None:
            rank_zero_warn(
                "curves runs without --ckpt_path: it takes the weights that the config builds, random ones unless the "
                "backbone is pretrained"
            )
        model, data = read_training([training] if isinstance(training, str) else training)
        if data is None:
            raise InputError("training must have data, whose batch is to be drawn; none of the configs has any")
        bank = _bank(bank_file, ckpt_path)
        batch = _batch(model, data, ckpt_path, bank, seed)
        named = named or _named(_loss_of(model, bank))
        seen = {name: _seen(name, loss, batch, bank, pairs, seed) for name, loss in named.items()}
        against = "itself" if bank is None else f"a memory bank of {len(bank):,}"
        shown = f"a batch of {len(batch.labels)} against {against}"
        for name, loss in named.items():
            try:
                _check_scale(loss)
                curve_of[name] = _curve(loss, points, context)
            except InputError as error:
                print(f"{name} is drawn by its pairs alone: {error}")
    assert named is not None
    caption = _caption(named, curve_of, context, shown)
    figure = curve_figure(curve_of, seen, relative=relative, caption=caption)
    for name, observed in seen.items():
        sides = (("positive", observed.positives), ("negative", observed.negatives))
        print(
            f"{name}: " + ", ".join(f"{each.pairs:,} {side}s of total force {each.force:.6g}" for side, each in sides)
        )
    print(f"{caption}\n" if caption else "", end="")
    print(", ".join(str(path) for path in save_curves(figure, curve_of, stem, seen)))


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    about = str(curves.__doc__).partition("\n\n    Args:")[0]
    parser = ArgumentParser(
        prog="lightning-dml curves",
        usage=USAGE,
        description=" ".join(about.split()),
        exit_on_error=False,
        formatter_class=_ShortHelp,
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with the arguments below")
    # As in LightningCLI, other libraries' constructors may leave types out.
    parser.add_function_arguments(curves, as_group=False, skip={"read_training"}, fail_untyped=False)
    try:
        made = instantiated(parser, parser.parse_args(list(arguments)))
    except (ArgumentError, TypeError, ValueError) as error:
        ours = input_error_in(error)
        if ours is not None:
            raise ours from error
        # jsonargparse goes through every type that the argument might have had.
        if not isinstance(error, ArgumentError):  # a constructor's own, once for every type
            raise InputError(
                f"losses cannot be made as given: {shorten(constructor_complaint(error), 200)}; options of a class go "
                "into init_args, as in losses: {NAME: {class_path: ..., init_args: {...}}}"
            ) from error
        if several := ambiguous_classes(error):
            raise InputError(f"losses names a class that there is more than once: give one of {several}") from error
        if '"losses' in str(error):
            # Of all the types that were tried, only a class's own complaint tells what is wrong.
            if refused := class_complaint(error):
                raise InputError(f"losses: {refused[0]}: {refused[1]}") from error
            raise InputError(
                "losses must be classes with their init_args, or a mapping of names to these, got "
                f"{refused_value(error, 'losses')}: classes of lightning_dml.losses go by their names, others by "
                "their full paths"
            ) from error
        raise InputError(" ".join(str(error).split())) from error
    return {name: value for name, value in vars(made).items() if name != "config"}


class _ShortHelp(DefaultHelpFormatter):
    """Leaves out the hundreds of modules of torch that are no losses."""

    def _expand_help(self, action: Any) -> str:
        text, listed, _ = str(super()._expand_help(action)).partition(", known subclasses: ")
        return text + ")" * bool(listed)


def _named(losses: Mapping[str, nn.Module] | Sequence[nn.Module] | nn.Module) -> dict[str, nn.Module]:
    if isinstance(losses, Mapping):
        named = {str(name): each for name, each in losses.items()}  # 0.3 in a YAML file is a number
    else:
        several = losses if isinstance(losses, Sequence) else [losses]
        named = {type(each).__name__: each for each in several}
        if len(named) < len(several):
            raise InputError(
                "losses has one class twice, and the legend could not tell them apart: give names, as in "
                "losses: {narrow: {class_path: ...}, wide: {class_path: ...}}"
            )
    if not named or (set(named) == {"Module"} and type(named["Module"]) is nn.Module):  # what {} is made into
        raise InputError("losses is empty: name one at least")
    wrong = next((name for name, each in named.items() if not isinstance(each, nn.Module)), None)
    if wrong is not None:
        raise InputError(f"losses.{wrong} must be a class with its init_args, got {named[wrong]!r}")
    return named


def _stem(output: str) -> Path:
    """Checks that the files can be written before anything takes time."""
    stem = Path(output)
    if stem.suffix.lower() in ENDINGS:
        stem = stem.with_suffix("")
    if not stem.name or not stem.absolute().parent.is_dir() or not os.access(stem.absolute().parent, os.W_OK):
        raise InputError(f"output must be the path of files in a folder that exists and can be written, got {output!r}")
    taken = [each for each in (f"{stem}{ending}" for ending in ENDINGS) if Path(each).is_dir()]
    if taken:
        raise InputError(f"output must be the path of files, and {taken[0]} is a folder, got {output!r}")
    return stem


def _curve(loss: nn.Module, points: int, context: Context | None) -> DrawnCurve:
    similarity = torch.linspace(-1, 1, points, dtype=torch.float64)
    free = context is None or context_free(loss)
    return DrawnCurve(similarity, *weight_curve(loss, similarity, context=None if free else context))


def _check_scale(loss: nn.Module) -> None:
    """A curve is that of one anchor; its batch lies on it where the loss is a mean over all anchors."""
    if not isinstance(loss, PairWeightingLoss):
        raise InputError(
            "another library's loss takes a mean of its own over a batch, so that the weights there are on another "
            "scale than the curve of an anchor; leave --training out for the curve"
        )
    if loss.reduction != "anchors":
        raise InputError(
            f"with reduction={loss.reduction} the weights of a batch are on another scale than the curve of an anchor; "
            "leave --training out, or take reduction=anchors, for the curve"
        )


def _caption(
    named: Mapping[str, nn.Module], curve_of: Mapping[str, DrawnCurve], context: Context | None, shown: str | None
) -> str | None:
    lines = []
    with_context = [name for name in curve_of if not context_free(named[name])]
    if with_context:
        lines.append(f"Curve of an anchor with {context or Context()}: {', '.join(with_context)}.")
    if shown is not None:
        lines.append(f"Points and density: {shown}.")
    return "\n".join(lines) or None


def _bank(bank_file: str | None, ckpt_path: str | None) -> MemoryBank | None:
    if bank_file is not None:
        bank = MemoryBank.load(bank_file)
        if not len(bank):
            raise InputError(f"bank_file {bank_file!r} holds an empty memory bank: leave it out for pairs in the batch")
        return bank
    if ckpt_path is None:
        return None
    if not Path(ckpt_path).is_file():
        raise InputError(f"ckpt_path {ckpt_path!r} does not exist")
    try:
        callbacks = torch.load(ckpt_path, map_location="cpu", weights_only=True)["callbacks"]
    except Exception as error:
        raise InputError(f"ckpt_path {ckpt_path!r} is no checkpoint of a training, or is damaged") from error
    states = {key: each["bank"] for key, each in callbacks.items() if str(key).startswith("MemoryBankCallback")}
    states = {str(key): state for key, state in states.items() if state is not None}
    if not states:
        return None
    if len(states) > 1 and "MemoryBankCallback" not in states:
        raise InputError(
            f"ckpt_path {ckpt_path!r} has several memory banks, {', '.join(states)}: write one to a file with "
            "MemoryBank.from_state_dict(...).save(...), and give it as bank_file"
        )
    bank = MemoryBank.from_state_dict(states.get("MemoryBankCallback", next(iter(states.values()))))
    return bank if len(bank) else None


def _loss_of(model: LightningModule, bank: MemoryBank | None) -> nn.Module:
    """The loss of a training, that against the bank where there is one."""
    memory_loss = getattr(model, "memory_loss", None) if bank is not None else None
    loss = getattr(model, "loss", None) if memory_loss is None else memory_loss
    if not isinstance(loss, nn.Module):
        raise InputError(f"{type(model).__name__} has no loss in an attribute of that name: name losses with --losses")
    return loss


def _seen(name: str, loss: nn.Module, batch: Rows, bank: MemoryBank | None, limit: int, seed: int) -> ObservedWeights:
    """The weights of all pairs, as the training would have them, with at most `limit` drawn ones on a side to show."""
    references = None
    if bank is not None:
        most = len(bank) if isinstance(loss, PairWeightingLoss) else min(len(bank), MEASURED_REFERENCES)
        if most < len(bank):
            print(f"{name} is another library's loss: of the memory bank's {len(bank):,} rows {most:,} are drawn")
        references = drawn_from(bank, most, seed, 0, batch.labels.device)
    observed = observe(loss, batch, references, [len(batch.labels)])
    if observed is None:
        raise InputError(
            f"the memory bank holds nothing but the samples of the batch, which {name} is not given: take a larger bank"
        )
    return thinned(observed, limit, seed)


def _batch(
    model: LightningModule, data: LightningDataModule, ckpt_path: str | None, bank: MemoryBank | None, seed: int
) -> Rows:
    trainer = Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    outputs: Any = trainer.predict(model, datamodule=_OneBatch(data, seed), ckpt_path=ckpt_path)
    embeddings, labels, indices = columns_of(outputs, type(model).__name__, trainer.strategy.root_device, "curves")
    if bank is not None and bank.dim != embeddings.shape[1]:
        raise InputError(
            f"the memory bank has embeddings of {bank.dim} columns and the model gives {embeddings.shape[1]}: take a "
            "bank and a config of one training"
        )
    model.to("cpu")
    return Rows(nn.functional.normalize(embeddings.float(), dim=1), labels, indices)


class _OneBatch(TrainingSet):
    """Shows one batch of the training to `predict`, the first that its sampler gives."""

    def __init__(self, inner: LightningDataModule, seed: int) -> None:
        super().__init__(inner)
        self.seed = seed

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images of one training batch."""
        loader = self.training_loader()
        torch.manual_seed(self.seed)  # of samplers that draw from torch's generator, and of augmentation
        batches: Any = loader.batch_sampler
        for each in (batches, loader.sampler):
            if callable(getattr(each, "set_epoch", None)):
                each.set_epoch(self.seed)
        drawn = next(iter(batches), None)
        if not drawn:
            raise InputError("the training has no batch: make its set larger or its batch smaller")
        return DataLoader(Subset(loader.dataset, list(drawn)), batch_size=len(drawn), collate_fn=loader.collate_fn)
