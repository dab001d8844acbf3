"""The dataset folder: every write into it goes through here, and everything but three small files is written once.

`Store.commit` publishes a closed local file only if its name is free; `Store.replace` changes `current.json`,
`dataset.json` or `lease.json` only if they still hold what the caller saw. Both leave either the old or the new file
after a crash, whole. Local folders, fsspec's `memory://` (one process), S3, Google Cloud Storage and Azure are known
(`mmdata.object_store`); a protocol without a conditional put is refused, because nothing would keep two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mmdata import local_disk
from mmdata.column_files import (
    PARQUET,
    ColumnFile,
    ColumnFooter,
    covered_digest,
    covered_mask,
    newest_numbered,
    open_parquet,
    publish_columns,
    read_footer,
    shard_name,
    write_column_file,
    write_parquet,
)
from mmdata.errors import RecipeError, StoreError
from mmdata.object_store import ObjectStore, Unfinished, bucket_path, open_objects
from mmdata.objects.memory import MemoryObjects
from mmdata.range_file import ObjectFiles, RangeFile
from mmdata.scratch import scratch_folder

__all__ = [
    "MUTABLE",
    "PARQUET",
    "ColumnFile",
    "ColumnFooter",
    "Store",
    "covered_digest",
    "covered_mask",
    "publish_columns",
    "shard_name",
    "write_column_file",
    "write_parquet",
]

MUTABLE = ("current.json", "dataset.json", "lease.json")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@~-]{0,199}")
Names = list[str]  # in the class, `list` is the method
Entries = list[tuple[str, int | None]]
Versions = list[tuple[str, int, str]]


class Store:
    """A dataset folder behind a path or URL; the folder itself is made by the first write.

    `url` is absolute for local folders and never holds credentials, `root` is the folder's path in its store, `fs` the
    fsspec filesystem DuckDB reads it through. `is_local`: a plain folder; `is_shared`: several processes may use it.
    Names are relative POSIX paths such as `rows/00000.g0.parquet`. Pickles as its URL. Methods raise StoreError for
    what the operator must mend: a file missing or torn, a full disk, a store that does not answer or refuses;
    RecipeError when an object store takes no credentials or has no such bucket at the first contact.
    """

    def __init__(self, url: str) -> None:
        protocol = fsspec.core.split_protocol(str(url))[0] or "file"
        self.is_local = protocol in ("file", "local")
        self.is_shared = protocol != "memory"
        self._remote = ""  # protocol of an object store
        self._account = ""  # Azure's, where the URL names it
        if self.is_local:
            root = fsspec.core.url_to_fs(os.path.expanduser(str(url)))[1]
            self.root: str = os.path.abspath(root)
            self.url: str = self.root
        elif protocol == "memory":
            root = fsspec.core.url_to_fs(str(url))[1]
            self.root, self.url = root.rstrip("/"), f"memory:/{root.rstrip('/')}"
        else:
            self._remote, self._account, self.root = bucket_path(str(url))
            host, _, path = self.root.partition("/")
            account = f"@{self._account}" if self._account else ""
            self.url = f"{self._remote}://{host}{account}/{path}".rstrip("/")
        self._met = not self._remote  # from then on what goes wrong is the operator's, not the recipe's
        remote = open_objects(self._remote, self._account) if self._remote else None
        self.fs: Any = fsspec.filesystem(protocol) if remote is None else ObjectFiles(remote)

    @property
    def _objects(self) -> ObjectStore | MemoryObjects:
        return open_objects(self._remote, self._account) if self._remote else MemoryObjects()

    def __reduce__(self) -> tuple[type[Store], tuple[str], dict[str, bool]]:
        return Store, (self.url,), {"_met": True}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    # Writing

    def commit(self, name: str, local_file: Path) -> bool:
        """Publish a closed local file under `name` if that name is free; False, and no change, when it is not.

        The file is moved: do not use `local_file` afterwards. Data and name are on disk when it returns. A file named
        `.parquet` is opened first, so that a torn one is never published.
        """
        path = self._writable(name)
        if name in MUTABLE:
            raise StoreError(f"{name} is changed by Store.replace, not committed")
        if not local_file.is_file() or local_file.is_symlink():
            raise StoreError(f"commit of {name} to {self.url}: {local_file} is not a file")
        if name.endswith(".parquet"):
            open_parquet(str(local_file), f"{local_file}, to be committed as {name},").close()
        with self._explained(name, local_file.stat().st_size):
            if self.is_local:
                return local_disk.publish(local_file, path)
            published = self._objects.put_if_absent(path, local_file)
            local_file.unlink()
            return published

    def link(self, name: str, existing: str) -> bool:
        """Give one of its files a second name, if that is free; for local folders (`is_local`) alone."""
        with self._explained(name, 0):
            return local_disk.link(self._path(existing), self._writable(name))

    def commit_folder(self, name: str, files: Iterable[tuple[str, bytes]]) -> bool:
        """Publish (file name, bytes) as a folder, all or nothing, if that name is free; for local folders alone."""
        with self._explained(name, 0):
            return local_disk.publish_folder(files, self._writable(name))

    def create(self, name: str, data: bytes) -> bool:
        """Commit a small file (`runs/*.json`, `state/*.json`); False when it exists already."""
        with self.scratch() as folder:
            local = folder / "small"
            local.write_bytes(data)
            return self.commit(name, local)

    def replace(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Put `data` in one of the three mutable files if it still holds `expected` (None: if it is absent).

        False, and nothing changes, when it holds something else.
        """
        path = self._writable(name)
        if name not in MUTABLE:
            raise StoreError(f"{name} of {self.url} is written once; only {', '.join(MUTABLE)} may be replaced")
        if self.is_local and expected is not None and not self.exists(name):
            return False  # nor is a folder that somebody removed made anew
        with self._explained(name, len(data)):
            if not self.is_local:
                return self._objects.replace(path, data, expected)
            with local_disk.locked(self.root):
                if self._bytes_or_none(path) != expected:
                    return False
                local_disk.put(data, path)
                return True

    def remove(self, name: str) -> None:
        """Remove a file, and its folders when they are empty then; for `mmdata clean`. No error when it is absent."""
        path = self._path(name)
        with self._explained(name, 0), contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                self._objects.delete(path)
                return
            os.unlink(path)
            with contextlib.suppress(OSError):  # not empty
                while (path := os.path.dirname(path)) != self.root:
                    os.rmdir(path)

    def unfinished_uploads(self) -> list[Unfinished]:
        """Uploads in parts below the folder that were begun and not ended: a process sends them, or has died."""
        with self._explained("uploads", 0, "list"):
            return [] if self.is_local else self._objects.unfinished(self.root)

    def abort_upload(self, found: Unfinished) -> None:
        """Give an unfinished upload up; no error when it has ended."""
        with self._explained(found.path, 0, "abort"):
            self._objects.abort(found)

    # Reading

    def read(self, name: str) -> bytes:
        """The whole file; StoreError when it is absent."""
        found = self.read_if_there(name)
        if found is None:
            raise self._missing(name)
        return found

    def read_if_there(self, name: str) -> bytes | None:
        """The whole file, or None when it is absent."""
        with self._explained(name, 0, "read"):
            return self._bytes_or_none(self._path(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; StoreError when the file is absent or shorter."""
        path = self._path(name)
        try:
            with self._explained(name, 0, "read"):
                data = self._range(path, offset, size)
        except FileNotFoundError:
            raise self._missing(name) from None
        if len(data) != size:
            raise StoreError(f"{name} of {self.url} ends before byte {offset + size}; it was cut short: restore it")
        return data

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        path = self._path(name)
        if self.is_local:
            return os.path.isfile(path)
        with self._explained(name, 0, "read"):
            return self._objects.size(path) is not None

    def list(self, folder: str) -> Names:
        """Names of the files directly in `folder` (`""`: the dataset folder), sorted; hidden ones left out."""
        return [name for name, size in self.entries(folder) if size is not None and not name.startswith(".")]

    def folders(self, folder: str) -> Names:
        """Names of the folders directly in `folder`, sorted; hidden ones left out."""
        return [name for name, size in self.entries(folder) if size is None and not name.startswith(".")]

    def entries(self, folder: str) -> Entries:
        """(name, size in bytes) of all that lies directly in `folder`, hidden files too; size None = a folder."""
        path = self._path(folder) if folder else self.root
        with self._explained(folder or "the folder", 0, "list"):
            try:
                if self.is_local:
                    return local_disk.entries(path)
                return sorted((e.path.rsplit("/", 1)[1], e.size) for e in self._objects.entries(path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def versions(self, folder: str) -> Versions:
        """(name, size in bytes, tag) of the files of a folder in an object store; a file written anew has another."""
        with self._explained(folder, 0, "list"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._objects.entries(self._path(folder))
            return [(e.path.rsplit("/", 1)[1], e.size, e.tag or str(e.modified)) for e in found if e.size is not None]
        return []

    def read_table(self, name: str, columns: Names | None = None) -> pa.Table:
        """A Parquet file, or these columns of it in this order; StoreError when torn, or a column is not there."""
        with self._parquet(name) as file:
            there = file.schema_arrow.names
            absent = [c for c in columns or [] if c not in there]
            if absent:
                raise StoreError(f"{name} of {self.url} has no column {absent[0]!r}; it has {', '.join(there)}")
            try:
                table = file.read(columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{name} of {self.url} does not read as Parquet: {error}; restore it") from error
        return table if columns is None else table.select(columns)

    def footer(self, name: str) -> dict[str, str]:
        """Key-value metadata of a Parquet file, and its row count as `num_rows`; StoreError when torn."""
        with self._parquet(name) as file:
            pairs = file.metadata.metadata or {}
            found = {k.decode(): v.decode() for k, v in pairs.items() if k != b"ARROW:schema"}
            found["num_rows"] = str(file.metadata.num_rows)
            return found

    def column_names(self, name: str) -> Names:
        """Names of a Parquet file's columns, in order."""
        with self._parquet(name) as file:
            return Names(file.schema_arrow.names)

    def path_for_duckdb(self, name: str) -> str:
        """What DuckDB's `read_parquet` takes for this very file, glob characters escaped.

        Unless the store `is_local` the connection needs `register_filesystem(store.fs)` first.
        """
        path = self._path(name)
        escaped = re.sub(r"[*?\[]", lambda m: f"[{m[0]}]", path)
        if self._remote:
            return f"{self._remote}://{escaped}"
        return escaped if self.is_local else f"memory:/{escaped}"

    def plain_path(self, path: str) -> str:
        """The path in this store, `root` in front, of a file as DuckDB names it in an answer."""
        return path if self.is_local else path.removeprefix(f"{self._remote or 'memory'}://")

    def expect(self, names: Iterable[str]) -> None:
        """DuckDB will open these files: on an object store their footers are fetched now, many at once."""
        if self._remote:
            self.fs.expect([self._path(name) for name in names])

    def modified(self, name: str) -> float | None:
        """When the file was written, in seconds since the epoch by the store's clock; None when it is absent."""
        path = self._path(name)
        with self._explained(name, 0, "read"), contextlib.suppress(FileNotFoundError):
            if self.is_local:
                return os.stat(path, follow_symlinks=False).st_mtime
            return self._objects.modified(path)
        return None

    # What is there

    def row_files(self) -> dict[int, str]:
        """Shard → its newest base rows file (highest g)."""
        return {shard: name for shard, (_, name) in self._newest("rows", "g").items()}

    def column_sets(self) -> Names:
        """Names of the column sets that have a folder, sorted."""
        return self.folders("columns")

    def coverage(self, set_name: str) -> dict[int, ColumnFile]:
        """Shard → its newest c-file, from listing and footers; StoreError names a torn or foreign file."""
        newest = self._newest(f"columns/{set_name}", "c")
        with ThreadPoolExecutor(32 if self._remote else 8) as pool:
            files = list(pool.map(lambda found: read_footer(self, found[1]), newest.values()))
        return dict(zip(newest, files, strict=True))

    def newest_column_file(self, set_name: str, shard: int) -> ColumnFile | None:
        """The newest c-file of one shard, or None."""
        found = self._newest(f"columns/{set_name}", "c").get(shard)
        return read_footer(self, found[1]) if found else None

    def _newest(self, folder: str, letter: str) -> dict[int, tuple[int, str]]:
        return newest_numbered(self.list(folder), folder, letter, self.url)

    # Scratch and the small parts

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh local folder of this process, removed at the end of the `with`."""
        with scratch_folder() as folder:
            yield folder

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if not name or "\0" in name or any(p in ("", ".", "..") for p in parts):
            raise StoreError(f"{name!r} is no name in {self.url}: names are relative, without empty parts or '..'")
        return f"{self.root}/{name}"

    def _writable(self, name: str) -> str:
        path = self._path(name)
        if not all(_PART.fullmatch(p) for p in name.split("/")):
            raise StoreError(f"{name!r} may not be written to {self.url}: letters, digits and _.=+@~- only")
        return path

    def _bytes_or_none(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes() if self.is_local else self._objects.read(path)
        except FileNotFoundError:
            return None

    def _range(self, path: str, offset: int, size: int) -> bytes:
        if not self.is_local:
            return self._objects.read_range(path, offset, size)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    @contextlib.contextmanager
    def _parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        path = self._path(name)
        source: Any = path
        try:
            with self._explained(name, 0, "read"):
                if self.is_local:
                    os.stat(path)
                else:
                    source = pa.PythonFile(RangeFile(self._objects, path))
        except FileNotFoundError:
            raise self._missing(name) from None
        with open_parquet(source, f"{name} of {self.url}") as file:
            yield file

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"{name} is missing from {self.url}; restore it, or run again to make it anew")

    @contextlib.contextmanager
    def _explained(self, name: str, size: int, verb: str = "write") -> Iterator[None]:
        """Turns an OSError into a StoreError, or a RecipeError, that says what to do; a missing file stays as it is."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            no_way_in = not self._met and error.errno in (errno.EINVAL, errno.ENXIO)  # credentials, bucket
            raise (RecipeError if no_way_in else StoreError)(
                f"cannot {verb} {name} in {self.url}: {local_disk.what_to_do(error, size, self.root)}"
            ) from error
        self._met |= verb != "read"  # absent files are not told from absent buckets
