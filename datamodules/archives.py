"""What is known of a published archive, and whether a file is that archive."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lightning_dml.datamodules.transfers import check_url
from lightning_dml.errors import InputError

_DIGITS = {"md5": 32, "sha256": 64}  # of each checksum that is understood


@dataclass(frozen=True)
class Archive:
    """A published archive: where it is, and what is known of it.

    Args:
        name: what people call it, for messages.
        urls: tried in this order; http, https or ftp.
        filename: of the archive on disk.
        size: in bytes, where it is published.
        checksum: `md5:...` or `sha256:...` in hexadecimal, where it is published.

    Raises:
        InputError: for a URL of another kind, a file name with folders, or a size or checksum that cannot be one.

    Examples:
        >>> birds = Archive("birds", ("https://example.org/birds.tgz",), "birds.tgz", size=1_000)
        >>> birds.checksum is None
        True
    """

    name: str
    urls: tuple[str, ...]
    filename: str
    size: int | None = None
    checksum: str | None = None

    def __post_init__(self) -> None:
        """Checks the fields; see the class."""
        if not self.urls:
            raise InputError("urls must have at least one URL, got none")
        for url in self.urls:
            check_url(url)
        if self.filename in ("", ".", "..") or set(self.filename) & set("/\\\0"):
            raise InputError(f"filename must be a plain file name, got {self.filename!r}")
        if self.size is not None and self.size < 1:
            raise InputError(f"size must be at least 1 byte or None, got {self.size}")
        if self.checksum is not None:
            algorithm, _, digits = self.checksum.partition(":")
            if not re.fullmatch(f"[0-9a-f]{{{_DIGITS.get(algorithm, 0)}}}", digits) or algorithm not in _DIGITS:
                raise InputError(f"checksum must be md5:<32 hex digits> or sha256:<64>, got {self.checksum!r}")

    def fault(self, path: Path) -> str | None:
        """What is wrong with a file that should be this archive, as the end of a sentence; None if it is right."""
        if not path.is_file():
            return "is not a file"
        size = path.stat().st_size
        if not size:
            return "is empty"
        if self.size is not None and size != self.size:
            return f"has {size:,} bytes, expected {self.size:,}"
        if self.checksum is None:
            return None
        algorithm, _, expected = self.checksum.partition(":")
        digest = hashlib.new(algorithm, usedforsecurity=False)
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        got = digest.hexdigest()
        return None if got == expected else f"has the {algorithm} {got}, expected {expected}"
