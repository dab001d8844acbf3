"""The source `parquet`: Parquet files with the pictures' bytes in a column, adopted where they lie."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmdata.errors import SourceError
from mmdata.sources.places import Place, find_places, fingerprint_of
from mmdata.sources.tables import TableSource

__all__ = ["ParquetSource"]

_SUFFIXES = (".parquet", ".pq")


class ParquetSource(TableSource):
    """Parquet files with a picture in each row, as bytes or as HF's struct of bytes and path. Nothing is copied."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1, description="file, folder, glob, or braces as in {00..07}.parquet; fsspec URLs too")

    def places(self) -> list[Place]:
        """See `TableSource`; SourceError for a name that a reference could not tell from a plain file."""
        found = find_places(self.path, _SUFFIXES, "Parquet files")
        for place in found:
            if not place.name.endswith(_SUFFIXES):
                raise SourceError(
                    f"{place.url} does not end in .parquet, by which its cells are told from files: rename it"
                )
        return found

    def fingerprint(self) -> str:
        """See `AdoptingSource`: the files' names, sizes and times of change."""
        return fingerprint_of(self.places())
