"""A training that takes no time to speak of, and a worker that runs such, each as a process of its own.

    python -m tests.study.pretend fit --config FILE [--ckpt_path FILE]     one training
    python -m tests.study.pretend study ARGUMENT ...                       `lightning-dml study` with such trainings

What a training does is in its config, under `model`: `value`, `seconds`, and `then` (raise, refuse, nan, hang, die).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import yaml

from lightning_dml.errors import InputError

FIT, STUDY = ((sys.executable, "-m", "tests.study.pretend", command) for command in ("fit", "study"))


def fit(config: str, checkpoint: str = "") -> None:
    """Notes that it started, does what its config says, and writes the result as `StudyRecord` does."""
    content = yaml.safe_load(Path(config).read_text())
    folder, model = Path(content["trainer"]["default_root_dir"]), content["model"]
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{os.getpid()} {'going on' if checkpoint else 'anew'}\n")
    print("a training that only pretends")
    (folder / "checkpoints").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "checkpoints/last.ckpt", "w") as archive:
        archive.writestr("step", "1")
    then = None if checkpoint else model.get("then")
    if then == "raise":
        raise InputError("margin must be positive")
    if then == "refuse":  # as jsonargparse does, in several lines
        print("usage: lightning-dml fit\nlightning-dml: error: Option 'x' is not accepted")
        sys.exit(2)
    if then == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600 if then == "hang" else model.get("seconds", 0))
    value = model.get("value", 0.5) + content["seed_everything"] / 100
    values = dict.fromkeys(("last", "max", "min"), None if then == "nan" else value)
    result = {"metrics": {"val/recall@1": values}, "seconds": 1.0, "step": 1}
    (folder / "result.json").write_text(json.dumps(result))


def parser() -> Any:
    """In place of LightningCLI's: knows the options of `fit` above."""

    def parse(config: dict[str, Any]) -> None:
        unknown = set(config["model"]) - {"value", "seconds", "then", "other"}
        if unknown:
            raise InputError(f"model has no option {unknown.pop()}")

    return parse


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
        fit(options["--config"], options.get("--ckpt_path", ""))
    else:
        from lightning_dml.commands.study import main  # Optuna, which a training does without

        try:
            main(sys.argv[2:], parser, FIT, STUDY)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
