"""NumPy's files as columns: `.npy`, and arrays in `.npz`, mapped from disk and never unpickled.

In: a file that may be hostile. Out: its dtype and shape from the header alone (`header`), and an array mapped from the
file or from scratch (`mapped`), of which any rows are taken without reading the others. SourceError, naming file and
array: objects (which only pickle reads), a shape the file does not hold, no such array.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from mmdata.errors import SourceError, nearest
from mmdata.sources.list_files import ListFile, reading

__all__ = ["ArrayFile", "Header", "array_names", "arrow_type", "as_arrow"]

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Header:
    """What an array is: `offset` is where its values begin in the (decompressed) file, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ArrayFile:
    """One array: a `.npy` file (`member` None), or the array of that name in a `.npz` file."""

    file: ListFile
    member: str | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return self.file.path if self.member is None else f"{self.file.path}, array {self.member!r}"

    @contextmanager
    def _stream(self) -> Iterator[tuple[BinaryIO, int, zipfile.ZipInfo | None]]:
        """The `.npy` bytes, how many there are, and the entry of the zip file where it is in one."""
        with _readable(self.where), self.file.fs.open(self.file.path, "rb") as raw:
            if self.member is None:
                yield raw, int(self.file.fs.info(self.file.path)["size"]), None
                return
            with zipfile.ZipFile(raw) as archive:
                info = _entry(archive, self.member, self.file.path)
                with archive.open(info) as stream:
                    yield stream, info.file_size, info  # type: ignore[misc]

    def _scratch_name(self) -> str:
        return hashlib.sha256(f"{self.file.fs.protocol}{self.file.path}\0{self.member}".encode()).hexdigest()[:32]

    def header(self) -> Header:
        """Type and shape, from the first bytes."""
        with self._stream() as (stream, size, _):
            return _header(stream, size, self.where)

    def mapped(self, folder: Path) -> npt.NDArray[Any]:
        """The array, mapped from where it lies if that is a plain file of this machine, else copied to `folder`."""
        with self._stream() as (stream, size, info):
            header = _header(stream, size, self.where)
            start = header.offset
            path: Path | None = Path(self.file.path) if isinstance(self.file.fs, LocalFileSystem) else None
            if path is not None and info is not None:
                begin = _begin(path, info)
                path, start = (path, start + begin) if begin is not None else (None, 0)
            if path is None:
                path, start = folder / f"{self._scratch_name()}.values", 0
                _copy(stream, path, header.size, self.where)
        if not header.size:
            return np.empty(header.shape, header.dtype)
        order: Any = "F" if header.fortran else "C"
        return np.memmap(path, header.dtype, "r", offset=start, shape=header.shape, order=order)


def array_names(file: ListFile) -> list[str]:
    """The names of the arrays in a `.npz` file."""
    with _readable(file.path), file.fs.open(file.path, "rb") as raw, zipfile.ZipFile(raw) as archive:
        return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


@contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        with reading(where):
            yield
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"cannot read {where}: {error}") from None


def _entry(archive: zipfile.ZipFile, member: str, where: str) -> zipfile.ZipInfo:
    found = [i for i in archive.infolist() if i.filename == f"{member}.npy"]
    if not found:
        there = [n.removesuffix(".npy") for n in archive.namelist()]
        raise SourceError(f"{where} has no array {member!r}{nearest(member, there)}")
    if len(found) > 1:
        raise SourceError(f"{where} has the array {member!r} {len(found)} times; write it anew")
    return found[0]


def _header(stream: BinaryIO, size: int, where: str) -> Header:
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except KeyError:
        raise SourceError(f"{where} is of a version of .npy that is not read here; save it with NumPy anew") from None
    except ValueError as error:
        raise SourceError(f"{where} is no .npy array: {' '.join(str(error).split())[:200]}") from None
    header = Header(dtype, tuple(shape), fortran, stream.tell())
    if dtype.hasobject:
        raise SourceError(f"{where} holds Python objects, which only pickle reads; save numbers or text instead")
    if any(n < 0 for n in shape) or header.offset + header.size > size:
        raise SourceError(f"{where} is cut short: its shape is {shape}, of {dtype}; bring it again")
    return header


def _begin(path: Path, info: zipfile.ZipInfo) -> int | None:
    """Where an entry's bytes begin in a zip file; None where they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        return None
    name, extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    begin = info.header_offset + 30 + name + extra
    return begin if begin + info.file_size <= path.stat().st_size else None


def _copy(stream: BinaryIO, path: Path, size: int, where: str) -> None:
    if shutil.disk_usage(path.parent).free < size + (64 << 20):
        raise SourceError(
            f"{where} needs {size / 1e9:.1f} GB in {path.parent} while it is read; point MMDATA_SCRATCH to a larger "
            "disk, or unpack the array to a .npy file on this machine"
        )
    with open(path, "wb") as out:
        left = size
        while left:
            block = stream.read(min(left, _BLOCK))
            if not block:
                raise SourceError(f"{where} is cut short: bring it again")
            out.write(block)
            left -= len(block)


def arrow_type(header: Header, where: str) -> pa.DataType:
    """The column an array makes: numbers, truth values or text of one dimension; vectors of floats of two.

    Single numbers of 16 bits become float32, vectors of 64 bits float32; SourceError for any other array.
    """
    kind, shape = header.dtype.kind, header.shape
    if len(shape) == 1 and kind in "US":
        return pa.string()
    if len(shape) == 1 and kind in "biuf" and header.dtype.itemsize <= 8:
        plain = pa.from_numpy_dtype(header.dtype.newbyteorder("="))
        return pa.float32() if pa.types.is_float16(plain) else plain
    if len(shape) == 2 and kind == "f" and header.dtype.itemsize <= 8 and 0 < shape[1] <= 1 << 16:
        return pa.list_(pa.float16() if header.dtype.itemsize == 2 else pa.float32(), shape[1])
    raise SourceError(
        f"{where} has the shape {shape} of {header.dtype}; one number a row (N,) or one vector of floats a row (N, D) "
        "was expected"
    )


def as_arrow(values: npt.NDArray[Any], kind: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Rows of an array as a column of its `arrow_type`, and which rows hold NaN or an infinity."""
    finite = np.ones(len(values), bool)
    if values.dtype.kind in "US":
        text = values.astype(str) if values.dtype.kind == "U" else np.char.decode(values, "utf-8", "replace")
        return pa.array(text.tolist(), kind), ~finite
    if values.dtype.kind != "f":
        return pa.array(np.ascontiguousarray(values, values.dtype.newbyteorder("=")), kind), ~finite
    vectors = pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if vectors else kind
    with np.errstate(over="ignore"):  # what float32 cannot hold is an infinity, and told as one
        numbers = np.ascontiguousarray(values, inner.to_pandas_dtype())
    finite = np.isfinite(numbers).all(axis=1) if vectors else np.isfinite(numbers)
    if not vectors:
        return pa.array(numbers), ~finite
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), type=kind), ~finite
