"""Memory against no memory on the glyphs, at the same steps and seeds: the table of the README.

    python benchmarks/glyphs.py                       # all settings, three seeds
    python benchmarks/glyphs.py --settings none momentum --seeds 0 --lr 3e-4

Trains what configs/quickstart.yaml trains, in four ways, and prints a Markdown table of the unseen characters'
retrieval after the last step (not of the best checkpoint: that would be choosing on what is reported). Each finished
run is appended to --out at once and never repeated, so that the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything

from lightning_dml import Embedder, MetricLearningModule
from lightning_dml.callbacks import MemoryBankCallback
from lightning_dml.datamodules import GlyphsDataModule
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, PairWeightingLoss

SETTINGS = {
    "none": "contrastive, no memory",
    "online": "contrastive + online memory, enqueued after the loss",
    "momentum": "contrastive + momentum memory",
    "ms": "multi-similarity, no memory",
    "ms-momentum": "multi-similarity + momentum memory",
}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--margin", type=float, default=0.5, help="of the contrastive loss")
    parser.add_argument("--size", type=float, default=1.0, help="bank, as a share of the training set")
    parser.add_argument("--momentum", type=float, default=0.99)
    parser.add_argument("--start-step", type=int, default=100)
    parser.add_argument("--memory-weight", type=float, default=1.0)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs.jsonl"))
    args = parser.parse_args()

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {json.dumps(run["key"]): run for run in map(json.loads, _lines(args.out))}
    chosen = []
    for seed in args.seeds:
        for setting in args.settings:
            key = _key(args, setting, seed)
            if json.dumps(key) not in done:
                done[json.dumps(key)] = {"key": key, **_run(args, setting, seed)}
                with args.out.open("a") as file:
                    file.write(json.dumps(done[json.dumps(key)]) + "\n")
            chosen.append(done[json.dumps(key)])
            print({**key, **chosen[-1]["values"], "seconds": chosen[-1]["seconds"]}, flush=True)
    print(_table(chosen, args))


def _run(args: argparse.Namespace, setting: str, seed: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    data = GlyphsDataModule(seed=seed)
    loss: PairWeightingLoss = MultiSimilarityLoss() if setting.startswith("ms") else ContrastiveLoss(args.margin)
    module = MetricLearningModule(
        Embedder(args.model, dim=64, in_chans=1),
        loss,
        memory_weight=args.memory_weight,
        optimizer=partial(torch.optim.AdamW, lr=args.lr, weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.steps),
        lr_interval="step",
    )
    memory: dict[str, list[Callback]] = {
        "online": [MemoryBankCallback(size=args.size, start_step=args.start_step, momentum=None, enqueue="after")],
        "momentum": [MemoryBankCallback(size=args.size, start_step=args.start_step, momentum=args.momentum)],
        "ms-momentum": [MemoryBankCallback(size=args.size, start_step=args.start_step, momentum=args.momentum)],
    }
    trainer = Trainer(
        max_steps=args.steps,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=memory.get(setting, []),
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    trainer.limit_test_batches = 1.0
    metrics = trainer.test(module, data, verbose=False)[0]
    return {"values": {name.removeprefix("test/"): value for name, value in metrics.items()}, "seconds": seconds}


def _key(args: argparse.Namespace, setting: str, seed: int) -> dict[str, Any]:
    key = {"setting": setting, "seed": seed, "steps": args.steps, "lr": args.lr, "model": args.model}
    if not setting.startswith("ms"):
        key["margin"] = args.margin
    if setting in ("online", "momentum", "ms-momentum"):
        key |= {"size": args.size, "start_step": args.start_step, "memory_weight": args.memory_weight}
    if setting.endswith("momentum"):
        key["momentum"] = args.momentum
    return key


def _table(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        f"{args.steps} steps of 16 x 4, {len(args.seeds)} seeds, mean ± standard deviation, unseen characters:",
        "",
        "| setting | Recall@1 | Recall@2 | Recall@4 | Recall@8 | MAP@R | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in args.settings:
        own = [run for run in runs if run["key"]["setting"] == setting]
        cells = [
            _spread([100 * run["values"][name] for run in own])
            for name in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r")
        ]
        seconds = statistics.mean(run["seconds"] for run in own)
        lines.append(f"| {SETTINGS[setting]} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
