"""`lightning-dml curves`: the numbers behind the figure, with and without a training, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from lightning_dml import MemoryBank
from lightning_dml.cli import main
from lightning_dml.losses import Context, MultiSimilarityLoss, weight_curve

OURS = "lightning_dml.losses."  # other tests import a library with classes of the same names


ORIGINAL = f"{{class_path: {OURS}LiftedStructureLoss, init_args: {{variant: original}}}}"  # couples rows


def table(path: str = "curves.csv", **wanted: str) -> list[tuple[float, float]]:
    """Similarity and weight of the rows that have what is wanted."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]
    return [(float(row["similarity"]), float(row["weight"])) for row in rows]


def test_losses_by_name_need_nothing_else(config: str) -> None:
    """Looking at a loss should take one line, and no data."""
    main(["curves", "--losses", f"[{OURS}ContrastiveLoss, pytorch_metric_learning.losses.MultiSimilarityLoss]"])
    assert {path.name for path in Path().glob("curves.*")} == {"curves.png", "curves.svg", "curves.csv"}
    points = table(loss="ContrastiveLoss", side="negative")
    assert len(points) == 401 and all(weight == float(similarity > 0.5) for similarity, weight in points)
    assert len(table(loss="MultiSimilarityLoss", kind="curve", side="positive")) == 401
    assert not table(kind="pair")


def test_a_file_gives_names_settings_and_the_context(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two settings of one loss are told apart by name, and a curve at a context says at which."""
    losses = {
        "narrow": {"class_path": f"{OURS}ContrastiveLoss", "init_args": {"margin": 0.2}},
        "mixed": {
            "class_path": f"{OURS}DirectWeightingLoss",
            "init_args": {
                "positive": {"from_loss": {"class_path": f"{OURS}MultiSimilarityLoss"}},
                "negative": {"class_path": "lightning_dml.losses.curves.Linear", "init_args": {"threshold": 0.1}},
            },
        },
        "ms": {"class_path": f"{OURS}MultiSimilarityLoss"},
    }
    context = {"positives": [0.3], "negatives": [0.1, 0.2]}
    Path("look.yaml").write_text(json.dumps({"losses": losses, "context": context, "points": 21}))
    main(["curves", "--config", "look.yaml", "--losses.narrow.init_args.margin", "0.4", "--output", "look.svg"])
    printed = capsys.readouterr().out
    assert "1 positive at 0.3, 2 negatives from 0.1 to 0.2: mixed, ms." in printed and "look.png" in printed
    similarity = torch.linspace(-1, 1, 21, dtype=torch.float64)
    positive, negative = weight_curve(MultiSimilarityLoss(), similarity, context=Context((0.3,), (0.1, 0.2)))
    assert table("look.csv", loss="ms", side="positive") == list(
        zip(similarity.tolist(), positive.tolist(), strict=True)
    )
    assert table("look.csv", loss="ms", side="negative") == list(
        zip(similarity.tolist(), negative.tolist(), strict=True)
    )
    assert table("look.csv", loss="mixed", side="positive") == table("look.csv", loss="ms", side="positive")
    pushed = [similarity for similarity, weight in table("look.csv", loss="narrow", side="negative") if weight]
    assert pushed == [value for value in similarity.tolist() if value > 0.4]


def test_a_batch_is_held_against_the_bank_of_a_checkpoint(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The scatter of a trained model and its memory, by its own loss, from the two files that a training leaves."""
    memory = {"class_path": "MemoryBankCallback", "init_args": {"size": 20, "start_step": 1}}
    Path("memory.yaml").write_text(json.dumps({"trainer": {"callbacks": [memory]}}))
    training = ["--config", config, "--config", "memory.yaml"]
    main(["fit", *training, "--trainer.enable_checkpointing=true", "--trainer.max_epochs=2"])
    (path,) = Path().rglob("*.ckpt")
    before = set(Path().rglob("*"))
    capsys.readouterr()
    main(["curves", "--training", f"[{config}, memory.yaml]", "--ckpt_path", str(path), "--pairs", "50"])
    printed = capsys.readouterr().out
    state = torch.load(path, weights_only=True)["callbacks"]["MemoryBankCallback"]["bank"]
    bank = MemoryBank.from_state_dict(state)
    assert f"a batch of 6 against a memory bank of {len(bank)}." in printed
    assert {path.name for path in set(Path().rglob("*")) - before} == {"curves.png", "curves.svg", "curves.csv"}
    for side in ("positive", "negative"):
        assert 0 < len(table(loss="MultiSimilarityLoss", kind="pair", side=side)) <= 50
        assert len(table(loss="MultiSimilarityLoss", kind="curve", side=side)) == 401
    # Every similarity is one of an image of the training set, as evaluation sees it, and a row of the bank.
    main(["bank", "--config", config, "--ckpt_path", str(path), "--output", "all.pt"])
    rows = MemoryBank.load("all.pt").embeddings
    possible = (rows.double() @ bank.embeddings.double().T).flatten().sort().values
    found = torch.tensor([similarity for similarity, _ in table(kind="pair")], dtype=torch.float64)
    nearest = possible[torch.searchsorted(possible, found).clamp(1, len(possible) - 1)[:, None] - torch.tensor([0, 1])]
    assert float((nearest - found[:, None]).abs().min(dim=1).values.max()) < 1e-2  # augmentation is all that differs


def test_a_bank_from_a_file_and_no_bank(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any training there is a bank that `lightning-dml bank` made, or the batch itself."""
    main(["bank", "--config", config, "--output", "all.pt"])
    capsys.readouterr()
    with pytest.warns(UserWarning, match="curves runs without --ckpt_path"):
        main(["curves", "--training", config, "--bank_file", "all.pt", "--losses", f"{OURS}ContrastiveLoss"])
    rows = len(MemoryBank.load("all.pt"))
    printed = capsys.readouterr().out
    # Three classes of two: the other three samples of each class, and all rows of other classes.
    assert f"{6 * 3} positives of total force 3," in printed and f"{6 * (rows - 4)} negatives" in printed
    with pytest.warns(UserWarning, match="curves runs without --ckpt_path"):
        main(["curves", "--training", config, "--losses", f"{OURS}ContrastiveLoss"])
    assert "6 positives of total force 1, 24 negatives" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["false", "true"])
def test_a_loss_without_a_curve_is_drawn_by_its_pairs(
    config: str, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss without a curve still has weights in a batch, and one wants to see these, to any scale."""
    losses = f"[{ORIGINAL}, {OURS}ContrastiveLoss]"
    with pytest.warns(UserWarning, match="curves runs without"):
        main(["curves", "--training", config, "--losses", losses, "--relative", scale])
    assert "LiftedStructureLoss is drawn by its pairs alone" in capsys.readouterr().out
    assert table(loss="LiftedStructureLoss", kind="pair") and not table(loss="LiftedStructureLoss", kind="curve")
    assert table(loss="ContrastiveLoss", kind="curve")


def test_points_and_curve_are_on_one_scale(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With a mean over pairs the points lay far below the curve, as if the batch had next to no weights."""
    smooth = {"class_path": f"{OURS}curves.Sigmoid", "init_args": {"rate": 3.0, "threshold": 0.2}}
    losses: dict[str | float, Any] = {
        **{
            reduction: {
                "class_path": f"{OURS}DirectWeightingLoss",
                "init_args": {"positive": smooth, "negative": smooth, "reduction": reduction},
            }
            for reduction in ("anchors", "active_anchors", "pairs")
        },
        "peer": {"class_path": "pytorch_metric_learning.losses.ContrastiveLoss"},
        0.5: {"class_path": f"{OURS}ContrastiveLoss"},  # a number, as YAML reads the name
    }
    Path("five.yaml").write_text(yaml.safe_dump({"losses": losses, "points": 4001}))
    with pytest.warns(UserWarning, match="curves runs without"):
        main(["curves", "--training", config, "--config", "five.yaml"])
    printed = capsys.readouterr().out
    assert "peer is drawn by its pairs alone: another library's loss" in printed and "Curve of" not in printed
    assert not table(loss="peer", kind="curve") and table(loss="peer", kind="pair")
    for side in ("positive", "negative"):
        for name in ("anchors", "active_anchors", "pairs"):
            curve = np.array(table(loss=name, kind="curve", side=side))
            points = np.array(table(loss=name, kind="pair", side=side))
            # Half a step of 5e-4 beside a knot, a curve of curvature below 3 is 1e-7 from the line; points are float32.
            np.testing.assert_allclose(points[:, 1], np.interp(points[:, 0], *curve.T), rtol=0, atol=1e-5)
        on_curve = dict(table(loss="0.5", kind="curve", side=side))
        assert {weight for _, weight in table(loss="0.5", kind="pair", side=side)} <= set(on_curve.values())
    forces = {
        name: float(re.findall(rf"^{name}: .* positives of total force ([\d.e-]+),", printed, re.M)[0])
        for name in ("anchors", "pairs")
    }
    assert forces["pairs"] < forces["anchors"]  # the force is that of the loss, its own reduction included
    main(["curves", "--config", "five.yaml"])
    assert table(loss="pairs", kind="curve") and table(loss="peer", kind="curve")


CONTRASTIVE = ("--losses", f"{OURS}ContrastiveLoss")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "nothing to draw.*--losses.*--training"),
    "no such loss": (("--losses", "Contrastive"), "losses .* got Contrastive: .*by their names"),
    "no such loss of a name": (("--losses.a", "Foo"), "got Foo for losses.a"),
    "an empty list": (("--losses", "[]"), "losses is empty"),
    "an empty mapping": (("--losses", "{}"), "losses is empty"),
    "no such option": (
        ("--losses", f"{{class_path: {OURS}ContrastiveLoss, init_args: {{margn: 1}}}}"),
        "'margn' is not",
    ),
    "no loss": (("--losses", "torch.nn.ReLU"), "ReLU"),
    "a loss without what it needs": (
        ("--losses", "pytorch_metric_learning.losses.ProxyAnchorLoss"),
        "losses cannot be made as given: .*init_args",
    ),
    "a class twice": (("--losses", f"[{OURS}ContrastiveLoss, {OURS}ContrastiveLoss]"), "one class twice.*names"),
    "a value of a loss": (("--losses.a", f"{OURS}ContrastiveLoss", "--losses.a.margin", "wide"), "margin"),
    "without a curve": (("--losses", ORIGINAL), "LiftedStructureLoss.*observed_weights"),
    "points": ((*CONTRASTIVE, "--points", "1"), "points must be an integer of at least 2, got 1"),
    "pairs": ((*CONTRASTIVE, "--pairs", "0"), "pairs must be an integer of at least 1, got 0"),
    "context": (
        (*CONTRASTIVE, "--context.positives", "[2]"),
        "positives of Context must be cosine similarities .* at least -1 and at most 1, got 2.0",
    ),
    "output": ((*CONTRASTIVE, "--output", "no/such/folder/curves"), "output must be .*'no/such/folder/curves'"),
    "a folder in the way": ((*CONTRASTIVE, "--output", "images/way"), "output must be .*images/way.svg is a folder"),
    "a bank without a training": ((*CONTRASTIVE, "--bank_file", "all.pt"), "bank_file is of no use.*--training"),
    "no such training": (("--training", "nowhere.yaml"), "'nowhere.yaml' does not exist"),
    "no checkpoint": (("--training", "folder.yaml", "--ckpt_path", "folder.yaml"), "'folder.yaml' is no checkpoint"),
    "no such checkpoint": (("--training", "folder.yaml", "--ckpt_path", "x.ckpt"), "'x.ckpt' does not exist"),
    "no such bank": (("--training", "folder.yaml", "--bank_file", "x.pt"), "no memory bank file x.pt"),
    "a wrong training": (("--training", "[folder.yaml, wrong.yaml]"), "nonsense"),
    "an option of fit": ((*CONTRASTIVE, "--trainer.max_epochs", "2"), "trainer.max_epochs"),
}


@pytest.mark.filterwarnings("ignore:curves runs without")
@pytest.mark.parametrize("what", REFUSED)
def test_one_clear_line_says_what_is_wrong(config: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """A wrong value ends in one line that names it, and leaves no file."""
    Path("wrong.yaml").write_text("model: {init_args: {nonsense: 1}}")
    Path("images/way.svg").mkdir()
    arguments, words = REFUSED[what]
    with pytest.raises(SystemExit) as stop:
        main(["curves", *arguments])
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-dml: error:")]
    assert len(said) == 1
    assert re.search(words, said[0]), said[0]
    assert not list(Path().glob("curves.*"))


def test_a_loss_without_types_is_taken(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other people's constructors say nothing of types, and `fit` takes them."""
    Path("mine.py").write_text(
        "from lightning_dml.losses import ContrastiveLoss\n"
        "class Mine(ContrastiveLoss):\n    def __init__(self, margin):\n        super().__init__(margin)\n"
    )
    monkeypatch.syspath_prepend(".")
    main(["curves", "--losses", "{class_path: mine.Mine, init_args: {margin: 0.7}}", "--points", "21"])
    assert [similarity for similarity, weight in table(side="negative") if weight] == pytest.approx([0.8, 0.9, 1.0])


@pytest.mark.filterwarnings("ignore:curves runs without")
def test_another_seed_is_another_batch(config: str) -> None:
    """One batch may be an odd one."""
    similarities = []
    for seed in ("0", "1", "0"):
        main(["curves", "--training", config, "--losses", f"{OURS}ContrastiveLoss", "--seed", seed])
        similarities.append(sorted(similarity for similarity, _ in table(kind="pair")))
    assert similarities[0] == pytest.approx(similarities[2]) and similarities[0] != pytest.approx(similarities[1])


@pytest.mark.filterwarnings("ignore:curves runs without")
def test_a_loss_that_is_measured_sees_a_part_of_a_large_bank(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured against a whole memory, a loss would take all of the machine's."""
    main(["bank", "--config", config, "--output", "all.pt"])
    monkeypatch.setattr("lightning_dml.losses.inspection.measured.MEASURED_REFERENCES", 10)
    losses = f"[{OURS}ContrastiveLoss, pytorch_metric_learning.losses.MultiSimilarityLoss]"
    capsys.readouterr()
    main(["curves", "--training", config, "--bank_file", "all.pt", "--losses", losses])
    rows = len(MemoryBank.load("all.pt"))
    assert f"of the memory bank's {rows} rows 10 are drawn" in capsys.readouterr().out
    assert len(table(kind="pair", loss="ContrastiveLoss")) > len(table(kind="pair", loss="MultiSimilarityLoss")) > 0


@pytest.mark.filterwarnings("ignore:curves runs without")
def test_one_of_several_banks_is_not_taken_in_silence(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure of the wrong bank looks like one of the right one."""
    bank = MemoryBank(size=4, dim=16)
    bank.enqueue(F.normalize(torch.randn(4, 16), dim=1), torch.arange(4))
    names = [f"MemoryBankCallback{{'attribute': '{letter}'}}" for letter in "ab"]
    torch.save({"callbacks": {name: {"bank": bank.state_dict()} for name in names}}, "two.ckpt")
    with pytest.raises(SystemExit):
        main(["curves", "--training", config, "--ckpt_path", "two.ckpt"])
    assert "several memory banks" in capsys.readouterr().err


def test_a_name_of_two_libraries_asks_for_the_whole_path(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With another library imported, a bare name may be either's; taking one in silence would be a coin's decision."""
    with pytest.raises(SystemExit):
        main(["curves", "--losses", "[pytorch_metric_learning.losses.ContrastiveLoss, ContrastiveLoss]"])
    said = capsys.readouterr().err
    assert "more than once" in said and "lightning_dml.losses.ContrastiveLoss" in said


def test_a_bank_of_another_model_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Similarities of embeddings of two models would be numbers without a meaning, if they had a shape at all."""
    bank = MemoryBank(size=4, dim=8)
    bank.save("empty.pt")
    bank.enqueue(F.normalize(torch.randn(4, 8), dim=1), torch.arange(4))
    bank.save("other.pt")
    for name, words in (("other.pt", "8 columns and the model gives 16"), ("empty.pt", "empty memory bank")):
        with pytest.raises(SystemExit), pytest.warns(UserWarning, match="without --ckpt_path"):
            main(["curves", "--training", config, "--bank_file", name])
        assert words in capsys.readouterr().err


def test_the_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    """The classes of torch that are no losses are hundreds."""
    with pytest.raises(SystemExit):
        main(["curves", "--help"])
    printed = capsys.readouterr().out
    assert "Draws weight against similarity" in printed and "--losses" in printed and len(printed.splitlines()) < 80
