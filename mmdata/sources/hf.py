"""The source `hf`: datasets of the library `datasets`, adopted where they lie: its Arrow files, or their Parquet.

In: a folder of `save_to_disk`, a folder or a Hub id that `load_dataset` reads (a Hub id at a pinned commit). Out: rows
whose media references are cells of Arrow files in that folder or in the library's cache; with `streaming`, cells of the
Parquet files themselves, wherever these are. No code of a dataset is ever run.
SourceError: no such dataset or split, a Hub id without a commit, a dataset with an order of its own (indices).
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Literal

import fsspec
from pydantic import Field

from mmdata.errors import MissingExtra, SourceError, nearest
from mmdata.sources.list_files import reading
from mmdata.sources.places import Place, absolute, fingerprint_of, place_of
from mmdata.sources.tables import TableSource

__all__ = ["HfSource"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HfSource(TableSource):
    """A dataset of HF `datasets`. Without `streaming`, `plan` already brings it into the library's cache."""

    kind: Literal["hf"] = "hf"
    path: str = Field(min_length=1, description="folder (save_to_disk, or files that load_dataset reads), or a Hub id")
    config: str | None = Field(None, description="configuration of the dataset; null = its default")
    split: str = Field("train", description="which split")
    revision: str | None = Field(None, description="commit of a Hub id, 40 hex digits; a branch could move")
    streaming: bool = Field(False, description="refer to the dataset's Parquet files themselves, bring nothing")

    def places(self) -> list[Place]:
        """See `TableSource`: Arrow files of the folder or the cache, or Parquet files."""
        folder = absolute(self.path)
        if os.path.isdir(folder):
            for where in (folder, os.path.join(folder, self.split)):
                if os.path.isfile(os.path.join(where, "state.json")):
                    return _saved(where, self.split if where == folder else None)
            if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
                with reading(folder), open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
                    splits = json.load(file)["splits"]
                raise SourceError(f"{folder} has no split {self.split!r} (source.split){nearest(self.split, splits)}")
        elif self.path.startswith(("/", ".", "~")) or self.path.count("/") > 1:
            raise SourceError(f"there is no folder {folder}")
        elif self.revision is None or not _COMMIT.fullmatch(self.revision):
            raise SourceError(
                f"{self.path} is no folder, so it is taken for a Hub id, and that needs source.revision: the commit, "
                "40 hex digits (a branch could move under the dataset)"
            )
        return self._streamed() if self.streaming else self._cached()

    def folders(self) -> list[str]:
        """The dataset's folder and the library's cache: where cells may refer to files."""
        datasets = _datasets()
        return [
            p
            for p in (absolute(self.path), str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.HF_CACHE_HOME))
            if os.path.isdir(p)
        ]

    def fingerprint(self) -> str:
        """The commit of a Hub id; for a folder the names, sizes and times of change of its files."""
        if not os.path.isdir(absolute(self.path)):
            return fingerprint_of([], self.path, str(self.revision), str(self.config), self.split)
        return fingerprint_of(self.places())

    def _arguments(self) -> dict[str, Any]:
        where = absolute(self.path) if os.path.isdir(absolute(self.path)) else self.path
        return {"path": where, "name": self.config, "revision": self.revision}

    def _cached(self) -> list[Place]:
        """The Arrow files into which the library wrote the dataset."""
        datasets = _datasets()
        try:
            found = datasets.load_dataset(**self._arguments(), split=self.split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(f"cannot load {self.path}: {' '.join(str(error).split())[:300]}") from error
        return _arrow_places([f["filename"] for f in found.cache_files], self.path)

    def _streamed(self) -> list[Place]:
        datasets = _datasets()
        try:
            builder = datasets.load_dataset_builder(**self._arguments())
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(f"cannot load {self.path}: {' '.join(str(error).split())[:300]}") from error
        files = dict(builder.config.data_files or {})
        if self.split not in files:
            raise SourceError(f"{self.path} has no split {self.split!r} (source.split){nearest(self.split, files)}")
        if any(not str(f).endswith(".parquet") for f in files[self.split]):
            raise SourceError(f"{self.path} is not Parquet, which streaming refers into: leave out source.streaming")
        places = []
        with reading(self.path):
            for name in map(str, files[self.split]):
                fs, root = fsspec.core.url_to_fs(name)
                places.append(place_of(fs, root, name.rpartition("/")[2], fs.info(root)))
        return places


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets is not installed: pip install datasets") from None
    return datasets


def _saved(folder: str, split: str | None) -> list[Place]:
    """The Arrow files of a folder that save_to_disk wrote, as its state.json lists them; `split` None = any."""
    with reading(folder), open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
        state = json.load(file)
        if split not in (None, "train", state.get("_split")):  # train is also what nobody wrote
            raise SourceError(
                f"{folder} is one split, {state.get('_split') or 'without a name'}; leave out source.split"
            )
        if state.get("_indices_data_files"):
            raise SourceError(f"{folder} was saved with indices: call flatten_indices() and save it again")
        names = [str(f["filename"]) for f in state["_data_files"]]
    if any(os.path.basename(name) != name for name in names):
        raise SourceError(f"{folder}/state.json names a file outside of its folder")
    return _arrow_places([os.path.join(folder, name) for name in names], folder)


def _arrow_places(names: list[str], where: str) -> list[Place]:
    if not names:
        raise SourceError(f"{where} holds no rows")
    places = []
    for name in names:
        with reading(name):
            status = os.stat(name)
        places.append(Place(os.path.abspath(name), os.path.basename(name), status.st_size, str(status.st_mtime)))
    return places
