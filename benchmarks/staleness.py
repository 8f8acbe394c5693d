"""Settings of a memory in trainings from scratch: which do harm, and which help.

    python benchmarks/staleness.py                               # prints the tables of the runs that there are
    python benchmarks/staleness.py --run --jobs 2                # makes the missing runs (hours), then the tables
    python benchmarks/staleness.py --run --data glyphs --settings none online momentum --on dev

Trains the same embedder on the glyphs and on an archive of ../shared/data, which is no part of this repository, with
the memory's start step, weight, momentum, entry average and moment adaptation one at a time. `--on dev` trains on four
fifths of the training classes and evaluates on the others: for choosing. `--on unseen` is for reporting. The values
are of the last step, not of the best checkpoint, and stand beside the drift of the bank. Each finished run is appended
to --out at once and never repeated, so that the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything

from lightning_dml import Embedder, MetricLearningModule
from lightning_dml.callbacks import DriftMonitor, MemoryBankCallback
from lightning_dml.losses import ContrastiveLoss, MultiSimilarityLoss, PairWeightingLoss

if TYPE_CHECKING:
    from benchmarks._shared_data import ArchiveDataModule, GlyphsPartDataModule
else:  # run as a script, this folder is on the path and the one above is not
    from _shared_data import ArchiveDataModule, GlyphsPartDataModule

ONLINE = {"momentum": None, "start_step": 100}
MOMENTUM = {"momentum": 0.99, "start_step": 100}
ENTRY = {"size": 1.0, "policy": "samples", "average": 0.5}  # a slot of each sample's own, so of all samples

# Options of the MemoryBankCallback; None is no memory. A name that begins with ms is of the multi-similarity loss.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "online": ONLINE,
    "online-start500": {**ONLINE, "start_step": 500},
    "online-weight0.1": {**ONLINE, "weight": 0.1},
    "online-warmup": {**ONLINE, "warmup_steps": 500},
    "online-fill": {**ONLINE, "initial_fill": True},
    "entry": {**ONLINE, **ENTRY},
    "online-moments": {**ONLINE, "adaptation": "moments"},
    "online-kalman": {**ONLINE, "adaptation": "kalman"},
    "momentum0.9": {**MOMENTUM, "momentum": 0.9},
    "momentum": MOMENTUM,
    "momentum0.999": {**MOMENTUM, "momentum": 0.999},
    "defaults": {**MOMENTUM, "start_step": 0, "size": 8192},  # the callback without any option
    "momentum-moments": {**MOMENTUM, "adaptation": "moments"},
    "momentum-entry": {**MOMENTUM, **ENTRY},
    "ms": None,
    "ms-online": ONLINE,
    "ms-momentum": MOMENTUM,
}
FEWER = "none online online-start500 online-weight0.1 entry online-moments momentum defaults ms ms-momentum"
DEFAULT_SETTINGS = {"glyphs": list(SETTINGS), "hanzi": FEWER.split()}
BANK_SIZE: dict[str, int | float] = {"glyphs": 1.0, "hanzi": 8192, "icons": 8192}
MARGIN = 0.5
# What a setting does not name; spelled out, so that no change of the callback's defaults changes what a name means.
PLAIN: dict[str, Any] = {
    "weight": 1.0,
    "warmup_steps": 0,
    "enqueue": "before",
    "initial_fill": False,
    "policy": "queue",
    "average": 0.0,
    "adaptation": None,
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Half width of the two-sided 95 % interval of a mean in standard errors, by the number of values (Student's t)."""

Run = dict[str, Any]


def main() -> None:
    """Runs what is missing, if asked to, and prints a table for each data set."""
    args = _arguments()
    wanted = [
        _key(args, data, setting, seed)
        for data in args.data
        for seed in args.seeds
        for setting in (args.settings or DEFAULT_SETTINGS.get(data, DEFAULT_SETTINGS["hanzi"]))
    ]
    done = {_name(run["key"]): run for run in map(json.loads, _lines(args.out))}
    missing = [key for key in wanted if _name(key) not in done]
    if args.run and missing:
        for key in missing:
            _data(key, args.npz)  # complains now rather than hours later
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _run_all(missing, args, done)
        missing = [key for key in wanted if _name(key) not in done]
    for data in args.data:
        runs = [done[_name(key)] for key in wanted if key["data"] == data and _name(key) in done]
        print(_table(data, runs, args) if runs else f"{data}: no runs in {args.out}", end="\n\n")
    if missing:
        print(f"{len(missing)} of {len(wanted)} runs are missing in {args.out}; --run makes them")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make the missing runs; without it, only print")
    parser.add_argument("--data", nargs="+", choices=BANK_SIZE, default=["glyphs", "hanzi"])
    parser.add_argument("--npz", type=Path, help="the archive; default ../shared/data/NAME.npz beside this checkout")
    parser.add_argument("--on", choices=["dev", "unseen"], default="unseen", help="classes to evaluate")
    parser.add_argument("--classes", type=int, default=1000, help="at most so many of them, drawn once; 0 is all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: all, for hanzi fewer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/staleness.jsonl"))
    return parser.parse_args()


def _key(args: argparse.Namespace, data: str, setting: str, seed: int) -> Run:
    """Settings on which a run's result depends, all of them."""
    key = {"data": data, "on": args.on, "classes": args.classes, "setting": setting, "seed": seed}
    key |= {"steps": args.steps, "lr": args.lr, "model": args.model}
    options = SETTINGS[setting]
    if options is not None:
        key["memory"] = {"size": BANK_SIZE[data], **PLAIN, **options}
    return key


def _run_all(missing: list[Run], args: argparse.Namespace, done: dict[str, Run]) -> None:
    """Makes the runs, `args.jobs` side by side, each in a fresh process; a failed one stops none of the others."""
    errors = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_run, key, args.npz, args.threads): key for key in missing}
        for future in as_completed(futures):
            key = futures[future]
            label = f"{key['data']} {key['setting']} seed {key['seed']}"
            if (error := future.exception()) is not None:
                errors.append(error)
                print(f"{label}: FAILED, {type(error).__name__}: {error}", flush=True)
                continue
            run = {"key": key, "threads": args.threads, "jobs": args.jobs, **future.result()}
            with args.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
            done[_name(key)] = run
            recall, map_at_r = (100 * run["values"][name] for name in ("recall@1", "map@r"))
            print(f"{label}: {recall:.1f} / {map_at_r:.1f}, {run['seconds']:.0f} s", flush=True)
    if errors:
        raise errors[0]


def _run(key: Run, npz: Path | None, threads: int) -> Run:
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    seed_everything(key["seed"], verbose=False)
    loss: PairWeightingLoss = MultiSimilarityLoss() if key["setting"].startswith("ms") else ContrastiveLoss(MARGIN)
    module = MetricLearningModule(
        Embedder(key["model"], dim=64, in_chans=1),
        loss,
        optimizer=partial(torch.optim.AdamW, lr=key["lr"], weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=key["steps"]),
        lr_interval="step",
    )
    drift = DriftMonitor(every_n_steps=max(1, min(100, key["steps"] // 10)), probes=128, entries=128)
    memory: list[Callback] = [MemoryBankCallback(**key["memory"])] if "memory" in key else []
    trainer = Trainer(
        max_steps=key["steps"],
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*memory, drift],
    )
    data = _data(key, npz)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    trainer.limit_test_batches = 1.0
    metrics = trainer.test(module, data, verbose=False)[0]
    values = {name.removeprefix("test/"): value for name, value in metrics.items()}
    return {"values": values, "seconds": seconds, "drift": drift.history}


def _data(key: Run, npz: Path | None) -> ArchiveDataModule | GlyphsPartDataModule:
    if key["data"] == "glyphs":
        return GlyphsPartDataModule(key["on"], key["classes"], seed=key["seed"])
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / f"{key['data']}.npz"
    return ArchiveDataModule(npz or beside, key["on"], key["classes"], seed=key["seed"])


def _table(data: str, runs: list[Run], args: argparse.Namespace) -> str:
    on = "unseen classes" if args.on == "unseen" else "held-out training classes"
    seeds = ", ".join(str(seed) for seed in sorted({run["key"]["seed"] for run in runs}))
    lines = [
        f"{data}: {args.steps} steps of 16 x 4 at lr {args.lr:g}, seeds {seeds}, {_evaluated(args)}{on}; "
        "mean ± standard deviation; the gain in MAP@R is over the same loss without memory (for ms: over none), paired "
        "by seed, with its 95 % interval; drift of the bank less its floor, from the encoder of its keys in the second "
        "quarter and at the end, and from the embedder in the second quarter; "
        f"seconds of training on {runs[0]['threads']} thread(s), {runs[0]['jobs']} run(s) at a time.",
        "",
        "| setting | Recall@1 | MAP@R | gain in MAP@R | drift, early | late | from the embedder | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(run["key"]["setting"], []).append(run)
    for setting, own in by_setting.items():
        base = by_setting.get("ms" if setting.startswith("ms-") else "none", [])
        cells = [
            setting,
            *(_spread([100 * run["values"][name] for run in own]) for name in ("recall@1", "map@r")),
            "-" if setting == "none" else _gain(own, base),
            *_drifts(own),
            f"{statistics.mean(run['seconds'] for run in own):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _evaluated(args: argparse.Namespace) -> str:
    return f"at most {args.classes:,} " if args.classes else "all "


def _gain(runs: list[Run], base: list[Run]) -> str:
    """Mean difference in MAP@R by seed, and half the width of its 95 % interval."""
    without = {run["key"]["seed"]: run["values"]["map@r"] for run in base}
    both = [run for run in runs if run["key"]["seed"] in without]
    gains = [100 * (run["values"]["map@r"] - without[run["key"]["seed"]]) for run in both]
    if not gains:
        return "-"
    if len(gains) == 1:
        return f"{gains[0]:+.1f}"
    half = T_95.get(len(gains), 2.23) * statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{statistics.mean(gains):+.1f} ± {half:.1f}"


def _drifts(runs: list[Run]) -> list[str]:
    """Against the encoder that makes the keys, early and late; against the embedder, early. All less the floor."""
    early: list[float] = []
    late: list[float] = []
    to_embedder: list[float] = []
    for run in runs:
        steps = run["key"]["steps"]
        measured = [row for row in run["drift"] if {"drift/bank", "drift/floor"} <= set(row)]
        quarter = [row for row in measured if steps / 4 <= row["step"] <= steps / 2]
        if quarter:
            early.append(statistics.mean(row["drift/bank"] - row["drift/floor"] for row in quarter))
            # Only a bank of momentum keys has the two apart.
            online = [row.get("drift/online", row["drift/bank"]) - row["drift/floor"] for row in quarter]
            to_embedder.append(statistics.mean(online))
        if measured:
            late.append(measured[-1]["drift/bank"] - measured[-1]["drift/floor"])
    return [f"{statistics.mean(values):.3f}" if values else "-" for values in (early, late, to_embedder)]


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _name(key: Run) -> str:
    return json.dumps(key, sort_keys=True)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
