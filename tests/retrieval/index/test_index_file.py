"""Files of an ApproximateIndex: complete, damaged, foreign, or not to be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch

from lightning_dml.errors import InputError
from lightning_dml.files import UnwritableFile
from lightning_dml.retrieval.index import file as index_file
from lightning_dml.retrieval.index.approximate import ApproximateIndex
from tests.retrieval.index.cases import rows, state


@pytest.mark.parametrize(
    ("factory", "metric", "parameters"),
    [
        ("IVF4,Flat", "cosine", "nprobe=3,max_codes=90"),
        ("HNSW8", "l2", "efSearch=40,efConstruction=20"),
        ("PCA6,PQ3x4,RFlat", "inner_product", "k_factor_rf=7"),
    ],
)
@pytest.mark.filterwarnings("ignore:factory 'PCA6")
def test_a_loaded_index_is_the_saved_one(factory: str, metric: Any, parameters: str, tmp_path: Path) -> None:
    """An index is kept for months; metric and parameters are not all in what faiss writes."""
    index = ApproximateIndex(rows(300), factory, metric, parameters)
    index.save(tmp_path / "folder" / "gallery.index")
    loaded = ApproximateIndex.load(str(tmp_path / "folder" / "gallery.index"))
    assert repr(loaded) == repr(index) and state(loaded) == state(index)
    queries = rows(30, seed=1)
    for ours, theirs in zip(index.search(queries, 9), loaded.search(queries, 9), strict=True):
        assert torch.equal(ours, theirs)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["gallery.index"]


def test_a_parameter_that_faiss_does_not_keep_is_set_again(tmp_path: Path) -> None:
    """Without it the loaded index would search more, or less, than the one that was measured."""
    index = ApproximateIndex(rows(300), "IVF4,Flat", parameters="max_codes=90")
    faiss_only: Any = faiss.deserialize_index(faiss.serialize_index(index._index))
    index.save(tmp_path / "index")
    assert faiss_only.max_codes == 0 and ApproximateIndex.load(tmp_path / "index")._index.max_codes == 90


@pytest.mark.parametrize("where", ["in the middle", "before the renaming"])
def test_an_interrupted_save_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is killed or a disk that is full must not cost the index that was there."""
    path = tmp_path / "index"
    ApproximateIndex(rows(40), "Flat").save(path)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "in the middle":
            patch.setattr(faiss, "write_index", stop)  # the header is in the file by then
        else:
            patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            ApproximateIndex(rows(50), "Flat").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_through_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes go through C++; an error on the way back must not be lost there."""
    original = index_file._CheckedFile.write

    def write(self: index_file._CheckedFile, data: bytes) -> int:
        if self.length + len(data) > 500:
            raise OSError("no space left on device")
        return original(self, data)

    index = ApproximateIndex(rows(500), "SQ8")
    monkeypatch.setattr(index_file._CheckedFile, "write", write)
    with pytest.raises(UnwritableFile, match=r"index cannot be written \(no space left on device\): make room there"):
        index.save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_room_for_a_folder_is_named(tmp_path: Path) -> None:
    """A path below a file is a typing error that the user can put right."""
    (tmp_path / "indexes").write_text("a file")
    with pytest.raises(UnwritableFile, match=r"indexes/gallery.index cannot be written .*choose another place"):
        ApproximateIndex(rows(40), "Flat").save(tmp_path / "indexes" / "gallery.index")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Half an index that loads answers with half the gallery."""
    path = tmp_path / "index"
    ApproximateIndex(rows(200), "IVF4,Flat", parameters="nprobe=2").save(path)
    whole = path.read_bytes()
    start = whole.index(b"}\n")
    cuts = [whole[:length] for length in (40, start, start + 2, start + 60, len(whole) - 100, len(whole) - 1)]
    flips = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for place in (40, start, start + 3, len(whole) // 2, len(whole) - 30, len(whole) - 1)
    ]
    for content in (*cuts, *flips, whole + b"\n", whole + whole):
        path.write_bytes(content)
        with pytest.raises(InputError, match="index was cut off or is damaged; copy it again, or build and save"):
            ApproximateIndex.load(path)
    path.write_bytes(whole)
    assert len(ApproximateIndex.load(path)) == 200


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """A plain faiss file has no metric or parameters, and a folder or nothing is a slip of the hand."""
    faiss.write_index(ApproximateIndex(rows(20), "Flat")._index, str(tmp_path / "plain.faiss"))
    (tmp_path / "empty").touch()
    for name in ("plain.faiss", "empty"):
        with pytest.raises(InputError, match=f"{name} is not an index file; give one that ApproximateIndex.save wrote"):
            ApproximateIndex.load(tmp_path / name)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"there is no index file .*; give one that ApproximateIndex.save wrote"):
            ApproximateIndex.load(path)
