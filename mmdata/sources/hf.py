"""The source `hf`: datasets of the library `datasets`, adopted where they lie: its Arrow files, or their Parquet.

In: a folder of `save_to_disk`, a folder or a Hub id that `load_dataset` reads (a Hub id at a pinned commit). Out: rows
whose media references are cells of Arrow files in that folder or in the library's cache; with `streaming`, cells of the
Parquet files themselves, wherever these are. No code of a dataset is ever run.
SourceError: no such dataset or split, a Hub id without a commit, a dataset with an order of its own (indices).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import fsspec
from pydantic import Field

from mmdata.errors import MissingExtra, SourceError, nearest
from mmdata.sources.list_files import reading
from mmdata.sources.places import Place, absolute, fingerprint_of, place_of
from mmdata.sources.tables import TableSource

__all__ = ["HfSource"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CURE = "see that id, commit and network are right, and that HF_TOKEN may read it if it is private"
_LIBRARIES = ("datasets", "httpx", "huggingface_hub", "yaml")


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
        """The dataset's folder, the library's cache and that of the hub's files: where cells may refer to files."""
        datasets = _datasets()
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = (str(datasets.config.HF_DATASETS_CACHE), str(HF_HUB_CACHE))
        return [p for p in (absolute(self.path), *caches) if os.path.isdir(p)]

    def fingerprint(self) -> str:
        """The commit of a Hub id; for a folder the names, sizes and times of change of its files."""
        if self._is_far():
            return fingerprint_of([], self.path, str(self.revision), str(self.config), self.split)
        return fingerprint_of(self.places())

    def _arguments(self) -> dict[str, Any]:
        where = self.path if self._is_far() else absolute(self.path)
        return {"path": where, "name": self.config, "revision": self.revision}

    def _builder(self) -> Any:
        """The library's reader of the dataset; SourceError where there is none, or only that of another commit."""
        datasets = _datasets()
        said = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity_error()  # the fallback below is told by an error, or needs no word
        try:
            with self._loading():
                builder = datasets.load_dataset_builder(**self._arguments())
        finally:
            datasets.logging.set_verbosity(said)
        # Where the hub does not answer, the library falls back on what it cached last, of any commit or configuration.
        if self._is_far() and builder.hash != self.revision:
            raise SourceError(
                f"cannot load {self.path}: the hub did not give it, and the cache has it at commit {builder.hash}, not "
                f"at {self.revision} (source.revision); {_CURE}"
            )
        is_fallback = type(builder).__module__.startswith("datasets.packaged_modules.cache")
        if is_fallback and self.config is None and builder.config.name != "default":
            raise SourceError(
                f"cannot load {self.path}: the hub did not say which configuration is its default, and the cache has "
                f"{builder.config.name!r}; name one with source.config"
            )
        return builder

    def _is_far(self) -> bool:
        return not os.path.isdir(absolute(self.path))

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """What the library, the hub's client or its HTTP raises becomes a SourceError."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, OSError | ValueError | RuntimeError)
            if not known and type(error).__module__.partition(".")[0] not in _LIBRARIES:
                raise
            said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            cure = f"; {_CURE}" if self._is_far() else ""
            raise SourceError(f"cannot load {self.path}: {said}{cure}") from error

    def _cached(self) -> list[Place]:
        """The Arrow files into which the library wrote the dataset."""
        builder = self._builder()
        with self._loading():
            builder.download_and_prepare()
            found = builder.as_dataset(split=self.split)
        return _arrow_places([f["filename"] for f in found.cache_files], self.path)

    def _streamed(self) -> list[Place]:
        """The dataset's own Parquet files, in the library's order."""
        builder = self._builder()
        files = dict(builder.config.data_files or {})
        if not files:
            raise SourceError(f"cannot load {self.path}: the hub did not say which files it has; {_CURE}")
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
