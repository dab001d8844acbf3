"""Export: the kept rows of a dataset as shards that other tools read, in row order, with a card.

Two passes: the first looks at the columns of all kept rows (no media) and decides names, members and what fits JSON;
the second writes, into an attempt folder beside the target, which is renamed at the end. So a target folder is whole or
absent, and an interrupted export leaves nothing that a reader could take for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mmdata import card
from mmdata.errors import RecipeError, StoreError
from mmdata.funnel import Funnel
from mmdata.layout import ExportColumn, Survey, columns_to_ask, export_columns, json_value, project, records
from mmdata.publish import FORMAT, Target
from mmdata.settings import ExportOptions
from mmdata.shards import Media, ParquetShards, Shards, WebDatasetShards

__all__ = ["ExportOptions", "ExportResult", "Exportable", "export"]


@dataclass(frozen=True)
class ExportResult:
    """`rows` samples in `shards` shards of `data_bytes` bytes at `path`; `written` False: it stood there already."""

    path: Path
    rows: int
    shards: int
    data_bytes: int
    written: bool


class Exportable(Protocol):
    """What export asks of a dataset (see `mmdata.dataset.Dataset`)."""

    @property
    def store(self) -> Any:
        """The dataset's folder: `is_local`, `root`."""

    @property
    def current(self) -> Any:
        """What readers see, with its `chain` and `steps`; None when no run has finished."""

    def shards(self) -> list[int]:
        """Shard numbers, ascending."""

    def kept(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Kept rows of a shard in row order: base columns, media references and the columns named (None = all)."""

    def read_media(self, path: str, offset: int, size: int) -> bytes:
        """The bytes of a media reference."""

    def funnel(self) -> Funnel:
        """What became of every row."""


def export(
    dataset: Exportable,
    options: ExportOptions,
    recipe_yaml: str | None,
    tick: Callable[[int], None] | None = None,
    meanings: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write the kept rows of `dataset` to `options.path`.

    The same kept rows, columns and options give the same bytes, but for the times in `*_stats.json`. An export of the
    same content is left alone (its card is brought up to date); an earlier one of other content is replaced once the
    new one is whole. `tick(n)` is called as samples are done. `meanings`: step column → a line for the card.

    RecipeError: the path holds something else, lies in the dataset, or a column is not there. StoreError: another
    export writes there, the disk is full, or the dataset contradicts itself.
    """
    target = Target(options.path, dataset.store)
    with target.sole_writer():
        columns, survey = _survey(dataset, options, {**_makers(dataset), **(meanings or {})})
        funnel = dataset.funnel()
        if funnel.kept != survey.rows:
            raise StoreError(
                f"the ledger counts {funnel.kept} kept rows, the shards hold {survey.rows}; run the recipe again"
            )
        identity = _identity(options, columns, survey)
        job = _Job(dataset, options, columns, survey)
        files = target.finished(identity)
        written = files is None
        if files is not None:
            target.refresh(job.card(funnel, recipe_yaml, files))
        else:
            with target.attempt(survey.media_bytes if job.with_media else 0) as folder:
                files = job.write(folder, tick)
                target.publish(folder, job.card(funnel, recipe_yaml, files), identity, files)
    return ExportResult(target.path, survey.rows, _count_shards(files), sum(files.values()), written)


class _Job:
    """One export under way: what to write, decided by the survey."""

    def __init__(
        self, dataset: Exportable, options: ExportOptions, columns: tuple[ExportColumn, ...], survey: Survey
    ) -> None:
        self.dataset = dataset
        self.options = options
        self.columns = columns
        self.survey = survey
        self.is_tar = options.format == "webdataset"
        self.with_media = self.is_tar or options.include_media
        self.json_names = survey.json_columns(options.json_nulls) if self.is_tar else ()
        if self.is_tar and survey.extensions[None] and survey.image_extension() is not None:
            raise RecipeError(
                f"{survey.extensions[None]} kept rows have no image, and every sample of a WebDataset needs the same "
                "members; add the filter image_path IS NOT NULL, or export to format parquet"
            )

    def _shards(self, folder: Path, schema: pa.Schema) -> Shards:
        options = self.options
        max_rows, max_bytes = options.max_rows, options.max_bytes
        if self.is_tar:
            extension, has_text = self.survey.image_extension(), self.survey.has_captions
            return WebDatasetShards(folder, schema, max_rows, max_bytes, extension, has_text)
        return ParquetShards(folder, schema, max_rows, max_bytes, options.max_group_bytes, self.with_media)

    def write(self, folder: Path, tick: Callable[[int], None] | None) -> dict[str, int]:
        """Write every shard into `folder`; returns the data files with their sizes."""
        schema = pa.schema([pa.field(c.name, c.type) for c in self.columns])
        sink = self._shards(folder, schema)
        try:
            for shard in self.dataset.shards():
                self._write_shard(shard, sink, tick)
            sink.close()
        except BaseException:
            sink.abandon()
            raise
        return sink.files

    def _write_shard(self, shard: int, sink: Shards, tick: Callable[[int], None] | None) -> None:
        kept = _kept(self.dataset, shard, self.options)
        table = project(kept, self.columns).combine_chunks()
        references = kept.select(["image_path", "image_offset", "image_size", "image_ext"]).to_pylist()
        found = records(table, self.json_names if self.is_tar else table.column_names)
        for row, record in enumerate(map(json_value, found) if self.is_tar else found):
            sink.add(record, table, row, self._media(references[row]))
            if tick is not None:
                tick(1)

    def _media(self, reference: dict[str, Any]) -> Media | None:
        path, size = reference["image_path"], reference["image_size"]
        if path is None or not self.with_media:
            return None
        data = self.dataset.read_media(path, reference["image_offset"], size)
        if len(data) != size:
            raise StoreError(f"{path} is cut short: {len(data)} of {size} bytes at {reference['image_offset']}")
        return reference["image_ext"] or "bin", data

    def card(self, funnel: Funnel, recipe_yaml: str | None, files: dict[str, int]) -> str:
        """The README.md of this export."""
        current = self.dataset.current
        extensions = {e: n for e, n in self.survey.extensions.items() if e is not None and self.with_media}
        return card.render(
            card.Card(
                format=self.options.format,
                rows=self.survey.rows,
                shards=_count_shards(files),
                data_bytes=sum(files.values()),
                funnel=funnel,
                chain="" if current is None else current.chain,
                recipe_yaml=recipe_yaml,
                columns=self.columns,
                json_columns=self.json_names,
                extensions=extensions,
                extension=self.survey.image_extension(),
                has_text=self.survey.has_captions,
            )
        )


def _kept(dataset: Exportable, shard: int, options: ExportOptions) -> pa.Table:
    return dataset.kept(shard, columns_to_ask(options.columns))


def _makers(dataset: Exportable) -> dict[str, str]:
    """Step column → which step made it, for the card."""
    made = {}
    for step in () if dataset.current is None else dataset.current.steps:
        for name in [*(visible for _, visible in step.outputs), step.reason_column]:
            made[name] = f"made by step {step.name}"
    return made


def _survey(
    dataset: Exportable, options: ExportOptions, meanings: Mapping[str, str]
) -> tuple[tuple[ExportColumn, ...], Survey]:
    reserved = ("image",) if options.format == "parquet" and options.include_media else ()
    shards = dataset.shards()
    columns: tuple[ExportColumn, ...] = ()
    if shards:
        columns = export_columns(dataset.kept(shards[0]).schema, options.columns, meanings, reserved)
    survey = Survey(columns)
    for shard in shards:
        survey.add(shard, _kept(dataset, shard, options), as_members=options.format == "webdataset")
    return columns, survey


def _identity(options: ExportOptions, columns: tuple[ExportColumn, ...], survey: Survey) -> str:
    described = options.model_dump(mode="json", exclude={"path"})
    names = [[c.name, str(c.type)] for c in columns]
    text = json.dumps([FORMAT, described, names, survey.rows, survey.digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _count_shards(files: Mapping[str, int]) -> int:
    return len({name.partition(".")[0] for name in files})
