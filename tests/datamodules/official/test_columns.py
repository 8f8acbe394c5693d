"""The lines, numbers and labels that the readers of all official data sets rest on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_dml.datamodules.official.reading import number_classes, read_columns
from lightning_dml.errors import InputError


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (b"1 a.jpg\r\n2  b.jpg \r\n", [("1", "2"), ("a.jpg", "b.jpg")]),
        (b"\xef\xbb\xbf1\ta.jpg\n\n \n", [("1",), ("a.jpg",)]),
        ("1 é.jpg".encode("latin-1"), [("1",), (b"\xe9.jpg".decode("utf-8", "surrogateescape"),)]),
        (b"", [(), ()]),
    ],
)
def test_columns(content: bytes, columns: list[tuple[str, ...]], tmp_path: Path) -> None:
    """Files that went through another system have other line ends, marks and encodings, and say the same."""
    (tmp_path / "list.txt").write_bytes(content)
    read = read_columns(tmp_path / "list.txt", "number path")
    assert [tuple(texts) for texts in read.texts] == columns and len(read) == len(columns[0])
    assert read.numbers(0).tolist() == [int(text) for text in columns[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id size\n1 2\n3\n", "line 3 must be 'id size', got '3'"),
        ("id size\n1 2\n\n3 4\n", "line 3 must be 'id size', got ''"),
        ("id size\n1 2 3\n", "line 2 must be 'id size', got '1 2 3'"),
        ("id length\n1 2\n", "line 1 must be the header 'id size', got 'id length'"),
        ("1 2\n3 4\n", "line 1 must be the header"),
        ("", "line 1 must be the header 'id size', got ''"),
        ("id size\n1 2\n-3 4\n", "line 3 must be 'id size', got '-3 4'"),
        ("id size\n1 2\n3.5 4\n", r"line 3 must be 'id size', got '3\.5 4'"),
        (f"id size\n{'9' * 19} 4\n", "line 2 must be 'id size'"),
        ("id size\n1 2\n0 4\n", "line 3 must be 'id size' with numbers of at least 1, got '0 4'"),
        ("id size\n1 nan\n", "line 2 must be 'id size', got '1 nan'"),
        ("id size\n1 wide\n", "line 2 must be 'id size', got '1 wide'"),
    ],
)
def test_malformed_lines(content: str, message: str, tmp_path: Path) -> None:
    """In a file of a hundred thousand lines only the number of the line helps."""
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(InputError, match=rf"list\.txt, {message}"):
        read = read_columns(tmp_path / "list.txt", "id size", header=True)
        read.numbers(0, least=1)
        read.decimals(1)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The command line shows input errors as one line, and others as a traceback."""
    (tmp_path / "list.txt").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*list\.txt"):
        read_columns(tmp_path / "list.txt", "id size")


def test_numbering_against_loops() -> None:
    """All sets take their labels from here; a shifted label would be a wrong class everywhere."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        train, first, second = (draw.integers(0, 30, size) for size in draw.integers(0, 40, 3))
        numbers, labels = number_classes(train, first, second)
        expected = sorted(set(train.tolist()))
        expected += sorted(set(first.tolist() + second.tolist()) - set(expected))
        assert numbers.tolist() == expected
        for given, made in zip((train, first, second), labels, strict=True):
            assert made.tolist() == [expected.index(number) for number in given.tolist()]
