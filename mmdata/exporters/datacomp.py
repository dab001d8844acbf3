"""DataComp's subset file: `subset.npy`, the uids of the kept rows as `u8,u8`, sorted, each once; no media is written.

A uid of 32 hex digits is two numbers: the first 16 digits and the last 16 (DataComp, baselines/apply_filter.py, and
what its resharder reads). DuckDB sorts, out of core. RecipeError for a uid that is not 32 hex digits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from mmdata.errors import RecipeError
from mmdata.export_plan import Plan
from mmdata.exporters.shape import Format

__all__ = ["DataComp", "write_subset"]

_DTYPE = np.dtype([("f0", "<u8"), ("f1", "<u8")])  # what numpy makes of "u8,u8"
_READ = 65_536


class DataComp(Format):
    """One file for the whole export; its Parquet twin is any other format."""

    media: ClassVar[Literal["always", "asked", "never"]] = "never"
    is_sharded = False

    def finish(self, folder: Path, plan: Plan) -> list[str]:
        """Write the file."""
        write_subset((table.column("uid") for table, _ in plan.all(_READ)), folder / "subset.npy", plan.folder)
        return ["subset.npy"]

    def header(self) -> dict[str, Any]:
        """No data for Hugging Face datasets."""
        return {}

    def opening(self) -> str:
        """By NumPy; and what DataComp does with it."""
        return (
            '```python\nimport numpy as np\nsubset = np.load("subset.npy", mmap_mode="r")  # dtype u8,u8, sorted\n'
            'uids = [f"{int(a):016x}{int(b):016x}" for a, b in subset[:5]]\n```\n\n'
            "DataComp's `resharder.py --subset-file subset.npy` takes it.\n"
        )


def write_subset(uids: Iterator[pa.ChunkedArray], path: Path, scratch: Path) -> int:
    """Write the distinct uids, sorted; returns how many. Upper-case digits count as lower-case.

    `scratch`: a folder of this process, for what does not fit into memory.
    """
    import duckdb

    schema = pa.schema([("uid", pa.string())])
    batches = (b for column in uids for b in pa.table([column.cast(pa.string())], schema=schema).to_batches())
    with duckdb.connect() as connection:
        connection.execute("SET temp_directory = ?", [str(scratch / "sort")])
        connection.execute("SET memory_limit = '1GB'")
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        connection.register("given", reader)
        connection.execute("CREATE TABLE uids AS SELECT lower(uid) AS uid FROM given")
        bad: list[tuple[str | None]] = connection.execute(
            "SELECT uid FROM uids WHERE uid IS NULL OR NOT regexp_full_match(uid, '[0-9a-f]{32}') LIMIT 1"
        ).fetchall()
        if bad:
            raise RecipeError(
                f"export: a kept row has the uid {bad[0][0]!r}; DataComp's subset files hold uids of 32 hex "
                "digits only; set export.format to parquet"
            )
        [(count,)] = connection.execute("SELECT count(DISTINCT uid) FROM uids").fetchall()
        sorted_uids: Any = connection.sql("SELECT DISTINCT uid FROM uids ORDER BY uid").to_arrow_reader(_READ)
        with path.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(_DTYPE), "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in sorted_uids:
                file.write(_pairs(batch.column(0)).tobytes())
            file.flush()
            os.fsync(file.fileno())
    return int(count)


def _pairs(uids: pa.Array) -> np.ndarray[Any, Any]:
    """(N,) of `u8,u8` from N strings of 32 lower-case hex digits."""
    digits = "".join(uids.to_pylist())
    found = np.frombuffer(bytes.fromhex(digits), ">u8").reshape(-1, 2)
    pairs = np.empty(len(found), _DTYPE)
    pairs["f0"], pairs["f1"] = found[:, 0], found[:, 1]
    return pairs
