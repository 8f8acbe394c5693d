"""The help of the program and of its trainings: written, short, and there at once.

What LightningCLI prints for `fit` is 550 lines, nearly all about its Trainer, and takes seconds to be made. It stands
behind one more word, `--help all`. tests/test_cli.py holds that every option and class named here exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning_dml
from lightning_dml.commands.table import BY_NAME, COMMANDS

Rows = Sequence[tuple[str, str]]
"""Pairs of what to write and what it does."""

QUICKSTART = "--config configs/quickstart.yaml"
BEST = "--ckpt_path best.ckpt"

EXAMPLES: Mapping[str, Sequence[str]] = {
    "fit": (
        f"fit {QUICKSTART}",
        f"fit {QUICKSTART} --config configs/no-memory.yaml",
        f"fit {QUICKSTART} --trainer.max_epochs 5 --model.loss.margin 0.4",
        f"fit {QUICKSTART} --ckpt_path last.ckpt",
    ),
    "validate": (f"validate {QUICKSTART} {BEST}",),
    "test": (f"test {QUICKSTART} {BEST}",),
    "predict": (f"predict {QUICKSTART} {BEST}",),
    "bank": (f"bank {QUICKSTART} {BEST} --output bank.pt",),
}
CHECKPOINT = {
    "fit": "go on from this checkpoint, with its optimizer and memory bank",
    "validate": "take the weights of this checkpoint",
    "test": "take the weights of this checkpoint",
    "predict": "take the weights of this checkpoint",
    "bank": "take the weights of this checkpoint",
}
OF_BANK: Rows = (
    ("--output FILE", "the file to write (bank.pt), for bank_file of MemoryBankCallback"),
    ("--policy queue|samples", "rows in random order, or one slot for each sample (queue)"),
    ("--dtype float32|bfloat16|float16", "of the stored embeddings (float32)"),
)
MODEL: Rows = (
    ("--model.embedder.model_name NAME", "the timm backbone, such as resnet50"),
    ("--model.embedder.pretrained true", "start from timm's weights"),
    ("--model.embedder.dim D", "columns of the embeddings"),
    ("--model.loss CLASS", "such as ContrastiveLoss, MultiSimilarityLoss, SupConLoss, TripletLoss"),
    ("--model.memory_loss CLASS", "another loss against the memory bank"),
    ("--model.memory_weight W", "its factor; 0 leaves the bank out of the loss"),
    ("--model.optimizer CLASS", "such as Adam, AdamW, SGD; --model.optimizer.lr RATE"),
    ("--model.lr_scheduler CLASS", "such as CosineAnnealingLR"),
    ("--model.ks [1,10]", "the K of the Recall@K that evaluation computes"),
)
DATA: Rows = (
    ("--data CLASS", "FolderDataModule, TableDataModule, GlyphsDataModule, CUB200DataModule,"),
    ("", "Cars196DataModule, SOPDataModule, InShopDataModule, VehicleIDDataModule,"),
    ("", "INaturalistDataModule"),
    ("--data.root FOLDER", "where the images are"),
    ("--data.classes_per_batch P", "classes in a batch on each rank"),
    ("--data.samples_per_class K", "images of each class in a batch"),
    ("--data.eval_batch_size N", "images in a batch of evaluation"),
    ("--data.num_workers N", "processes that load images"),
)
CALLBACKS: Rows = (
    ("MemoryBankCallback", "keeps the memory bank, filled by a momentum encoder"),
    ("DriftMonitor", "measures how stale the bank is"),
    ("RetrievalReport", "a table and a figure of neighbours, before and after training"),
    ("WeightCurveLogger", "the pairs' similarities and their weights during training"),
    ("ReproducibleSteps", "the same random numbers at the same step, also after a resumption"),
    ("StepEndSignals", "lets SIGTERM and requeue signals act between two steps"),
)
TRAINER: Rows = (
    ("--trainer.max_epochs N", "length of the training"),
    ("--trainer.accelerator NAME", "auto, cpu or gpu"),
    ("--trainer.devices N", "devices; with two or more --trainer.strategy ddp"),
    ("--trainer.precision P", "such as 32-true, 16-mixed, bf16-mixed"),
)


def help_of_program() -> str:
    """The help of `lightning-dml`: every command with a sentence."""
    return "\n".join(
        [
            "usage: lightning-dml COMMAND [OPTION ...]",
            "",
            str(lightning_dml.__doc__),
            "",
            *_block("commands", [(command.name, command.summary) for command in COMMANDS]),
            *_block(
                "more",
                [
                    ("lightning-dml COMMAND --help", "how to call a command, and its options"),
                    ("lightning-dml fit --help all", "Lightning's options too"),
                    ("python -m lightning_dml", "the same program"),
                ],
            ),
            "a first training, about two minutes on a CPU:",
            f"  lightning-dml {EXAMPLES['fit'][0]}",
        ]
    )


def help_of_command(name: str) -> str:
    """The short help of a command that LightningCLI runs: how to call it, and the options that are ours.

    Args:
        name: fit, validate, test, predict or bank.
    """
    common: Rows = (
        ("-c FILE, --config FILE", "a training config; several are laid over each other"),
        ("--ckpt_path FILE", CHECKPOINT[name]),
        ("--seed_everything N", "seed of all random numbers"),
        ("--print_config", "print the whole config, defaults too, and stop"),
    )
    lines = [
        f"usage: lightning-dml {name} --config FILE [--config FILE ...] [--OPTION VALUE ...]",
        "",
        BY_NAME[name].summary,
        "",
        "A config is a YAML file with the parts model, data and trainer. An option overrides what the config",
        "says. A class is named by class_path and its arguments by init_args; classes of lightning_dml go by",
        "their names alone.",
        "",
        "examples:",
        *(f"  lightning-dml {example}" for example in EXAMPLES[name]),
        "",
        *_block("options", [*common, *(OF_BANK if name == "bank" else ())]),
        *_block("model (MetricLearningModule, or a LightningModule of yours)", MODEL),
        *_block("data", DATA),
    ]
    if name == "fit":
        lines += _block("callbacks, in the config under trainer.callbacks", CALLBACKS)
    more = (
        (f"lightning-dml {name} --help all", "every option, Lightning's too"),
        (f"lightning-dml {name} --model.help MetricLearningModule", "the options of a class"),
        (f"lightning-dml {name} --data.help FolderDataModule", "the same for data"),
        ("... --model.help MetricLearningModule all", "with the names of all classes that an option takes"),
    )
    return "\n".join([*lines, *_block("trainer", TRAINER), *_block("more help", more)]).rstrip()


def _block(title: str, rows: Rows) -> list[str]:
    """A title and two columns under it, and an empty line."""
    width = max(len(left) for left, _ in rows)
    return [f"{title}:", *(f"  {left:{width}}  {right}" for left, right in rows), ""]
