"""Tools of the readers of official data sets: where a set lies, its lines, classes and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_dml.datamodules.arrays import IntArray
from lightning_dml.datamodules.tables.checks import Source, check_no_duplicates, check_paths
from lightning_dml.datamodules.tables.rows import ImageTable
from lightning_dml.errors import InputError


@dataclass(frozen=True)
class Official:
    """A data set as its authors publish it, with the words for its messages.

    Args:
        name: as papers call it.
        folders: names of its folder, of which `root` may be the parent.
        layout: what lies in that folder.
        origin: where the set comes from.
    """

    name: str
    folders: Sequence[str]
    layout: str
    origin: str

    def folder(self, root: Path, *markers: str) -> Path:
        """Folder of the set: `root` or one in it, the first that holds one of the files `markers`.

        Raises:
            InputError: if there is none.
        """
        place = self.find(root, *markers)
        if place is not None:
            return place
        if not root.is_dir():
            raise InputError(f"root {root} is not a folder: {self._way_out()}")
        raise InputError(
            f"{self.name}: there is no {' or '.join(markers)} in root {root}, nor in a folder "
            f"{' or '.join(self.folders)} there: {self._way_out()}"
        )

    def find(self, root: Path, *markers: str) -> Path | None:
        """Folder of the set as in `folder`, or None if there is none."""
        candidates = [root, *(root / name for name in self.folders)]
        return next(
            (candidate for candidate in candidates if any((candidate / marker).is_file() for marker in markers)), None
        )

    def file(self, folder: Path, *names: str) -> Path:
        """The first of some files in the folder that is there.

        Raises:
            InputError: if none is.
        """
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise InputError(f"{self.name}: there is no {' or '.join(names)} in {folder}: {self._way_out()}")
        return path

    def check_counts(self, part: str, table: ImageTable, images: int | None, classes: int) -> None:
        """Compares a table with what its authors published.

        Args:
            part: what the table is, such as "training set".
            table: the rows.
            images: how many images there must be; None leaves them uncounted.
            classes: how many classes there must be.

        Raises:
            InputError: if there are more or fewer.
        """
        count = len(np.unique(table.labels))
        if count == classes and images in (None, len(table)):
            return
        expected = f"{classes:,} classes" if images is None else f"{images:,} images of {classes:,} classes"
        raise InputError(
            f"{self.name}: the {part} must have {expected}, and {len(table):,} images of {count:,} classes are listed "
            f"below {table.root}: get the files of the set anew, or set check_counts=false for a part of your own"
        )

    def check_unseen(self, train: ImageTable, test: ImageTable, names: Sequence[str], files: str) -> None:
        """Compares the classes of the training set with those of an evaluation set.

        Args:
            train: training rows.
            test: evaluation rows.
            names: of the labels.
            files: where both stand, for the message.

        Raises:
            InputError: if a class is in both.
        """
        if len(both := np.intersect1d(train.labels, test.labels)):
            raise InputError(
                f"{self.name}: class {names[both[0]]!r} ({len(both)} such class(es)) is in training and in evaluation, "
                f"in {files}: retrieval is evaluated on unseen classes; get the files of the set anew, or take one out"
            )

    def _way_out(self) -> str:
        return f"it must be the folder of {self.name}, or hold it, with {self.layout}; {self.origin}"


@dataclass(frozen=True)
class Columns:
    """The fields of a text file, column by column, and where they stood.

    Args:
        file: the file.
        form: names of the columns, with spaces between.
        first: number of the first line that holds a row, from 1.
        texts: a tuple of N fields for each column.
    """

    file: Path
    form: str
    first: int
    texts: Sequence[Sequence[str]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts[0])

    @property
    def source(self) -> Source:
        """The file and its lines, for the checks of tables."""
        return Source(str(self.file), np.arange(self.first, self.first + len(self)), unit="line")

    def numbers(self, column: int, least: int = 0) -> IntArray:
        """A column of whole numbers, (N,) int64.

        Raises:
            InputError: naming the line of a field that is no number, or less than `least`.
        """
        texts = self.texts[column]
        # Eighteen digits always fit, and no official number comes near.
        wrong = next((row for row, text in enumerate(texts) if not text.isdecimal() or len(text) > 18), None)
        if wrong is not None:
            raise self.malformed(wrong)
        numbers = np.fromiter(map(int, texts), np.int64, len(texts))
        if numbers.min(initial=least) < least:
            raise self.malformed(int(numbers.argmin()), f"with numbers of at least {least}")
        return numbers

    def decimals(self, column: int) -> NDArray[np.float64]:
        """A column of numbers, (N,) float64.

        Raises:
            InputError: naming the line of a field that is no finite number.
        """
        numbers = np.empty(len(self), np.float64)
        for row, text in enumerate(self.texts[column]):
            try:
                numbers[row] = float(text)
            except ValueError:
                numbers[row] = np.nan
            if not np.isfinite(numbers[row]):
                raise self.malformed(row)
        return numbers

    def malformed(self, row: int, demand: str = "") -> InputError:
        """Error for a row of another form, or out of range, which `demand` says."""
        line = " ".join(column[row] for column in self.texts)
        return _malformed(self.file, self.first + row, f"{self.form!r}{demand and ' ' + demand}", line)


def read_columns(file: Path, form: str, header: bool = False, skip: int = 0) -> Columns:
    """Reads a file of one row per line, whose fields have white space between.

    Args:
        file: the file; ends of lines of any system.
        form: names of the columns, with spaces between.
        header: whether the names stand above the rows.
        skip: lines to pass over before all that.

    Raises:
        InputError: if the file cannot be read, or naming the line that has another header or number of fields.
    """
    lines = read_lines(file)
    if header:
        above = lines[skip] if len(lines) > skip else ""
        if above.split() != form.split():
            raise _malformed(file, skip + 1, f"the header {form!r}", above)
    first = skip + header
    fields = [line.split() for line in lines[first:]]
    width = len(form.split())
    for row, row_fields in enumerate(fields):
        if len(row_fields) != width:
            raise _malformed(file, first + row + 1, repr(form), lines[first + row])
    return Columns(file, form, first + 1, list(zip(*fields, strict=True)) or [()] * width)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file without those at its end that are empty.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}; check its permissions, or get it anew") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def number_classes(train: IntArray, *tests: IntArray) -> tuple[IntArray, list[IntArray]]:
    """Labels for official class numbers: training classes count from 0 in their order, the others follow in theirs.

    Args:
        train: (N,) class number of each training image.
        tests: (M,) of each image of an evaluation set.

    Returns:
        The class number of each label, (C,), and the labels of `train` and of each of `tests`.

    Examples:
        >>> numbers, labels = number_classes(np.array([7, 3, 7]), np.array([9, 1]))
        >>> numbers.tolist(), [part.tolist() for part in labels]
        ([3, 7, 1, 9], [[1, 0, 1], [3, 2]])
    """
    train_classes = np.unique(train)
    test_classes = np.setdiff1d(np.concatenate([train[:0], *tests]), train_classes)
    numbers = np.concatenate([train_classes, test_classes]).astype(np.int64)
    ascending = np.argsort(numbers)
    labels = [ascending[np.searchsorted(numbers, part, sorter=ascending)] for part in (train, *tests)]
    return numbers, [part.astype(np.int64) for part in labels]


def check_rows(table: ImageTable, source: Source) -> None:
    """Checks that paths stay in the root and that none comes twice.

    Raises:
        InputError: naming the line that is wrong.
    """
    check_paths(table, source)
    check_no_duplicates(table, source)


def _malformed(file: Path, line: int, wanted: str, got: str) -> InputError:
    return InputError(f"{file}, line {line} must be {wanted}, got {got.strip()!r}: get the file anew, or mend the line")
