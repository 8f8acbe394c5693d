"""The command `lightning-dml curves`: weight curves of losses, on the pairs of a real batch where one is asked for."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_dml.errors import InputError, input_error_in, one_line

if TYPE_CHECKING:  # heavy: a help is to come at once
    from pytorch_lightning import LightningDataModule, LightningModule
    from torch import nn

    from lightning_dml.losses import Context, ObservedWeights
    from lightning_dml.losses.calling import Rows
    from lightning_dml.memory import MemoryBank
    from lightning_dml.report import DrawnCurve

    ReadTraining = Callable[[Sequence[str]], tuple[LightningModule, LightningDataModule | None]]
    """Makes model and data of training configs."""

USAGE = """%(prog)s --losses '[ContrastiveLoss, MultiSimilarityLoss]'
       %(prog)s --config configs/curves.yaml
       %(prog)s --training configs/quickstart.yaml --ckpt_path last.ckpt"""

ENDINGS = (".png", ".svg", ".csv")


def main(arguments: Sequence[str], read_training: ReadTraining) -> None:
    """Runs `lightning-dml curves`.

    Args:
        arguments: those after `curves`.
        read_training: makes model and data of the configs of a training, with its seed set.

    Raises:
        InputError: for losses, files and options that do not fit.
    """
    if {"-h", "--help"} & set(arguments):
        parser().parse_args(["--help"])
    curves(read_training, **_options(arguments))


def parser() -> argparse.ArgumentParser:
    """The options by the docstring of `curves`, for the help; what they hold is read by jsonargparse."""
    about, _, listed = str(curves.__doc__).partition("\n\n    Args:\n")
    first, _, rest = about.partition("\n\n")
    reader = argparse.ArgumentParser("lightning-dml curves", USAGE, first, " ".join(rest.split()))
    reader.add_argument("-c", "--config", help="a YAML file with the arguments below")
    defaults = inspect.signature(curves).parameters
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", listed, re.MULTILINE):
        if name != "read_training":
            default = defaults[name].default
            note = "" if default is None else f" (default: {default})"
            reader.add_argument(f"--{name}", help=" ".join(text.split()) + note)
    return reader


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
    and the weights of its pairs are drawn as points below the density of the pairs: against the memory bank of the
    checkpoint or of a file, or, without one, in the batch itself. Points and curves are weights per anchor, without the
    reduction; the context is then that of an anchor of the batch, whose points lie on the curve.

    Args:
        read_training: makes model and data of training configs.
        losses: class names, class paths with init_args, or a mapping of names for the legend to these; left out, the
            training's own loss, that against the bank where there is one.
        training: training configs, as `fit --config` takes them, laid over each other, for a batch of real pairs.
        ckpt_path: checkpoint of that training: its weights, and the memory bank in it.
        bank_file: a memory bank as `lightning-dml bank` writes it, instead of the checkpoint's.
        context: the anchor's other pairs, `positives` and `negatives`, for the curves of losses that look at them; left
            out, eleven pairs, or with a training those of its batch's median anchor.
        relative: divide each loss's weights by the largest that is shown of it on a side, to compare shapes.
        points: similarities from -1 to 1 at which a curve is computed.
        pairs: most pairs of each side to draw as points.
        seed: which batch, by the epoch of its sampler where that has any, and which pairs are drawn.
        output: path without a suffix for a PNG, an SVG and a CSV file, which replace older ones.
    """
    from lightning_dml.checks import check_count
    from lightning_dml.losses import Context, context_free
    from lightning_dml.report import curve_figure, save_curves

    check_count("points", points, least=2)
    check_count("pairs", pairs)
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
    drawn: dict[str, DrawnCurve] = {}
    contexts: dict[str, str] = {}
    observed: dict[str, ObservedWeights] = {}
    shown = ""
    if training is None:
        assert named is not None
        drawn = {name: _curve(loss, points, context) for name, loss in named.items()}
        contexts = {
            name: f"an anchor with {context or Context()}" for name, loss in named.items() if not context_free(loss)
        }
    else:
        paths = [training] if isinstance(training, str) else training
        named, batch, bank = _read(read_training, paths, ckpt_path, bank_file, named, seed)
        observed = {name: _observed(name, loss, batch, bank, pairs, seed) for name, loss in named.items()}
        drawn, contexts = _curves_on(batch, bank, named, points, context)
        against = "itself" if bank is None else f"a memory bank of {len(bank):,}"
        shown = f"Points and density: a batch of {len(batch.labels)} against {against}."
    caption = "\n".join([*_lines(contexts), *([shown] if shown else [])])
    figure = curve_figure(drawn, observed, relative=relative, caption=caption or None)
    for name, weights in observed.items():
        sides = (("positive", weights.positives), ("negative", weights.negatives))
        print(f"{name}: " + ", ".join(f"{own.pairs:,} {side}s of total force {own.force:.6g}" for side, own in sides))
    print(f"{caption}\n" if caption else "", end="")
    print(", ".join(str(path) for path in save_curves(figure, drawn, stem, observed)))


def _lines(contexts: Mapping[str, str]) -> list[str]:
    """A line for each context, with the losses whose curves stand at it."""
    losses: dict[str, list[str]] = {}
    for name, text in contexts.items():
        losses.setdefault(text, []).append(name)
    return [f"Curve of {text}: {', '.join(names)}." for text, names in losses.items()]


def _curve(loss: nn.Module, points: int, context: Context | None) -> DrawnCurve:
    import torch

    from lightning_dml.losses import context_free
    from lightning_dml.report import DrawnCurve

    free = context is None or context_free(loss)
    return DrawnCurve.of(loss, torch.linspace(-1, 1, points, dtype=torch.float64), None if free else context)


def _read(
    read_training: ReadTraining,
    paths: Sequence[str],
    ckpt_path: str | None,
    bank_file: str | None,
    named: dict[str, nn.Module] | None,
    seed: int,
) -> tuple[dict[str, nn.Module], Rows, MemoryBank | None]:
    """The losses by name, the training's own where none is named, its batch, and its bank."""
    from pytorch_lightning.utilities import rank_zero_warn

    from lightning_dml.commands.training_batch import bank_of, embedded_batch, loss_of

    if ckpt_path is None:
        rank_zero_warn(
            "curves runs without --ckpt_path: it takes the weights that the config builds, random ones unless the "
            "backbone is pretrained"
        )
    model, data = read_training(paths)
    if data is None:
        raise InputError("training must have data, whose batch is to be drawn; none of the configs has any")
    bank = bank_of(bank_file, ckpt_path)
    batch = embedded_batch(model, data, ckpt_path, bank, seed)
    return named or _named(loss_of(model, bank)), batch, bank


def _observed(
    name: str, loss: nn.Module, batch: Rows, bank: MemoryBank | None, limit: int, seed: int
) -> ObservedWeights:
    """The weights of all pairs, as the training would have them, with at most `limit` drawn ones on a side to show."""
    from lightning_dml.losses import PairWeightingLoss
    from lightning_dml.losses.inspection.measured import MEASURED_REFERENCES
    from lightning_dml.losses.inspection.observed import thinned
    from lightning_dml.report.batch_curves import per_anchor
    from lightning_dml.report.pair_observation import drawn_from

    references = None
    if bank is not None:
        most = len(bank) if isinstance(loss, PairWeightingLoss) else min(len(bank), MEASURED_REFERENCES)
        if most < len(bank):
            print(f"{name} is another library's loss: of the memory bank's {len(bank):,} rows {most:,} are drawn")
        references = drawn_from(bank, most, seed, 0, batch.labels.device)
    observed = per_anchor(loss, batch, references)
    if observed is None:
        raise InputError(
            f"the memory bank holds nothing but the samples of the batch, which {name} is not given: take a larger bank"
        )
    return thinned(observed, limit, seed)


def _curves_on(
    batch: Rows, bank: MemoryBank | None, named: Mapping[str, nn.Module], points: int, context: Context | None
) -> tuple[dict[str, DrawnCurve], dict[str, str]]:
    """The curves that the batch's points lie on or about, by name, and the contexts of those that have one."""
    import torch

    from lightning_dml.report.batch_curves import AnchorContext, curve_on_the_batch, typical_context
    from lightning_dml.report.pair_observation import drawn_from

    if context is not None:
        typical: AnchorContext | None = AnchorContext(context, context, f"an anchor with {context}")
    else:
        references = None if bank is None else drawn_from(bank, len(bank), 0, 0, batch.labels.device)
        typical = typical_context(batch, references)
    similarity = torch.linspace(-1, 1, points, dtype=torch.float64)
    drawn, contexts = {}, {}
    for name, loss in named.items():
        try:
            drawn[name], text = curve_on_the_batch(loss, similarity, typical)
        except InputError as error:
            print(f"{name} is drawn by its pairs alone: {error}")
            continue
        if text:
            contexts[name] = text
    return drawn, contexts


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    from lightning_dml.parsing import instantiated

    reader = ArgumentParser(prog="lightning-dml curves", exit_on_error=False)
    reader.add_argument("-c", "--config", action="config")
    # As in LightningCLI, other libraries' constructors may leave types out.
    reader.add_function_arguments(curves, as_group=False, skip={"read_training"}, fail_untyped=False)
    try:
        options = instantiated(reader, reader.parse_args(list(arguments)))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        _refuse(error)
    return {name: value for name, value in vars(options).items() if name != "config"}


def _refuse(error: Exception) -> NoReturn:
    """Raises InputError with what is wrong, out of what jsonargparse says of every type that was tried."""
    from lightning_dml.parsing import ambiguous_classes, class_complaint, constructor_complaint, refused_value

    ours = input_error_in(error)
    if ours is not None:
        raise ours from error
    text = one_line(error, 10**6)
    if not isinstance(error, argparse.ArgumentError):  # a constructor's own, once for every type
        raise InputError(
            f"losses cannot be made as given: {shorten(constructor_complaint(error), 200)}; options of a class go into "
            "init_args, as in losses: {NAME: {class_path: ..., init_args: {...}}}"
        ) from error
    if several := ambiguous_classes(error):
        raise InputError(f"losses names a class that there is more than once: give one of {several}") from error
    if '"losses' in text:
        # Of all the types that were tried, only a class's own complaint tells what is wrong.
        if complaint := class_complaint(error):
            raise InputError(f"losses: {complaint[0]}: {complaint[1]}") from error
        raise InputError(
            "losses must be classes with their init_args, or a mapping of names to these, got "
            f"{refused_value(error, 'losses')}: classes of lightning_dml.losses go by their names, others by their "
            "full paths"
        ) from error
    raise InputError(text) from error


def _named(losses: Mapping[str, nn.Module] | Sequence[nn.Module] | nn.Module) -> dict[str, nn.Module]:
    from torch import nn

    if isinstance(losses, Mapping):
        named = {str(name): loss for name, loss in losses.items()}  # 0.3 in a YAML file is a number
    else:
        several = losses if isinstance(losses, Sequence) else [losses]
        named = {type(loss).__name__: loss for loss in several}
        if len(named) < len(several):
            raise InputError(
                "losses has one class twice, and the legend could not tell them apart: give names, as in "
                "losses: {narrow: {class_path: ...}, wide: {class_path: ...}}"
            )
    if not named or (set(named) == {"Module"} and type(named["Module"]) is nn.Module):  # what {} is made into
        raise InputError("losses is empty: name one at least")
    wrong = next((name for name, loss in named.items() if not isinstance(loss, nn.Module)), None)
    if wrong is not None:
        raise InputError(f"losses.{wrong} must be a class with its init_args, got {named[wrong]!r}")
    return named


def _stem(output: str) -> Path:
    """The path without a suffix, once it is sure that the files can be written; before anything takes time."""
    stem = Path(output)
    if stem.suffix.lower() in ENDINGS:
        stem = stem.with_suffix("")
    if not stem.name or not stem.absolute().parent.is_dir() or not os.access(stem.absolute().parent, os.W_OK):
        raise InputError(f"output must be the path of files in a folder that exists and can be written, got {output!r}")
    folders = [path for path in (f"{stem}{ending}" for ending in ENDINGS) if Path(path).is_dir()]
    if folders:
        raise InputError(f"output must be the path of files, and {folders[0]} is a folder, got {output!r}")
    return stem
