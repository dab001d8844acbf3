"""Export: the kept rows of a dataset, or of several mixed, in a form that other tools read, with a card.

First a survey of the columns of all kept rows (no media) decides names, members, what fits JSON, and the identity of
the export. Then a plan puts every sample in its place (`export_plan`), and each shard is a function of the plan and the
media it names, written under another name and renamed when it is whole. All of it lies in an attempt folder beside the
target, which is renamed at the end: so a target folder is whole or absent, a killed export goes on at its first missing
shard, and neither kills nor the number of writers change a byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmdata import card
from mmdata.errors import RecipeError, StoreError
from mmdata.export_plan import find_plan, write_plan
from mmdata.export_rows import MIXED_FROM, Rows
from mmdata.export_shards import Media, cut_shards, write_shards
from mmdata.exporters.formats import FORMATS, boxes_type
from mmdata.exporters.hub import push
from mmdata.exporters.shape import Format, Shape
from mmdata.layout import ExportColumn, Survey, columns_to_ask, export_columns
from mmdata.mixing import Exportable, Opener, Part, divide, open_parts
from mmdata.publish import FORMAT, Attempt, Finished, Target, size_on_disk
from mmdata.sample_media import media_name
from mmdata.settings import ExportOptions

__all__ = ["ExportOptions", "ExportResult", "Exportable", "export"]


@dataclass(frozen=True)
class ExportResult:
    """`rows` samples in `shards` shards of `data_bytes` bytes at `path`; `written` False: it stood there already.

    `pushed`: address of the repository it was uploaded to.
    """

    path: Path
    rows: int
    shards: int
    data_bytes: int
    written: bool
    pushed: str | None = None


def export(
    dataset: Exportable,
    options: ExportOptions,
    recipe_yaml: str | None,
    tick: Callable[[int], None] | None = None,
    meanings: Mapping[str, str] | None = None,
    opener: Opener | None = None,
) -> ExportResult:
    """Write the kept rows of `dataset` to `options.path`.

    The same kept rows, columns and options give the same bytes, but for the times in `*_stats.json` (and the names of
    Lance's files). An export of the same content is left alone (its card is brought up to date); an earlier one of
    other content is replaced once the new one is whole. `tick(n)` is called as samples are done. `meanings`: step
    column → a line for the card. `opener` opens the datasets of `options.mix`.

    RecipeError: the path holds something else or lies in the dataset, a column is not there, or keys do not name files
    of the format (such as two samples of a shard with one key). StoreError: another
    export writes there, the disk is full, or the dataset contradicts itself. MissingExtra: the format's package is
    not installed.
    """
    form = FORMATS[options.format]
    form.require()
    target = Target(options.path, dataset.store)
    with target.sole_writer():
        parts = open_parts(dataset, options, opener)
        for part in parts:
            target.require_apart(part.dataset.store)
        job = _Job(parts, target, form, options, recipe_yaml, meanings or {})
        finished = target.finished(job.identity)
        written = finished is None
        if finished is not None:
            target.refresh(job.card(finished))
        else:
            with target.attempt(job.identity, job.media_bytes) as attempt:
                finished = job.write(attempt, tick)
                target.publish(attempt, job.card(finished), job.identity, finished)
    pushed = push(target.path, options.push_to_hub) if options.push_to_hub is not None else None
    return ExportResult(target.path, sum(job.counts), finished.shards, sum(finished.files.values()), written, pushed)


class _Job:
    """One export: what to write, decided by the survey."""

    def __init__(
        self,
        parts: list[Part],
        target: Target,
        form: type[Format],
        options: ExportOptions,
        recipe_yaml: str | None,
        meanings: Mapping[str, str],
    ) -> None:
        self.parts, self.options, self.recipe_yaml = parts, options, recipe_yaml
        if form.media == "never":
            options = options.model_copy(update={"columns": ("uid",)})
        self.with_media = form.media == "always" or (form.media == "asked" and options.include_media)
        schema = _schema(parts, options)
        self.media_name = _medium(parts, schema)
        form.require_media(self.media_name)
        self.columns = _columns(parts, schema, options, meanings, form, self.media_name)
        boxes = boxes_type(schema, options.blur) if len(schema) else None
        self.rows = Rows(parts, self.columns, options, boxes)
        self.survey = Survey(self.columns)
        self.blurred = 0
        self._look(form.keys_name_files, target)
        self.counts = divide(parts, options)
        if form.same_members and self.survey.extensions[None] and self.survey.image_extension() is not None:
            raise RecipeError(
                f"{self.survey.extensions[None]} kept rows have no image, and every sample of a WebDataset needs the "
                "same members; add the filter image_path IS NOT NULL, or export to format parquet"
            )
        self.identity = _identity(options, self.columns, self.survey, parts)
        shape = Shape(
            schema=pa.schema([pa.field(c.name, c.type) for c in self.columns]),
            json_names=self.survey.json_columns(options.json_nulls or form.json_nulls),
            extension=self.survey.image_extension() if self.with_media else None,
            has_text=self.survey.has_captions,
            with_media=self.with_media,
            options=options,
            identity=self.identity,
            full_names=self.survey.full_columns(),
            media_name=self.media_name,
        )
        self.writer = form(shape)

    @property
    def media_bytes(self) -> int:
        """Bytes of the images to be written, as stored."""
        if not self.with_media:
            return 0
        return sum(p.media_bytes * n // max(1, p.rows) for p, n in zip(self.parts, self.counts, strict=True))

    def _look(self, as_members: bool, target: Target) -> None:
        """The survey: every part's kept rows, without media."""
        options = self.options
        also = ["row_id"] if options.mix or options.shuffle != "none" else []
        also += [n for n in (options.blur, options.repeat) if n is not None]
        for part in self.parts:
            rows, media, values = self.survey.rows, self.survey.media_bytes, self.survey.value_bytes
            for shard in part.dataset.shards():
                once = self.rows.once(part, shard)
                part.kept += len(once)
                kept = self.rows.repeated(once)
                target.require_no_media(kept.column("image_path"))
                here = [n for n in also if n in kept.column_names]
                self.survey.add(shard, kept, as_members, here)
                if options.mix:
                    part.row_ids.append(kept.column("row_id").to_numpy())
                if options.blur in here:
                    self.blurred += _count_boxes(kept, str(options.blur), shard)
            part.rows = self.survey.rows - rows
            part.media_bytes = self.survey.media_bytes - media
            part.value_bytes = self.survey.value_bytes - values
            counted = part.dataset.funnel().kept
            if counted != part.kept:
                raise StoreError(
                    f"the ledger counts {counted} kept rows, the shards hold {part.kept}; run the recipe again"
                )

    def write(self, attempt: Attempt, tick: Callable[[int], None] | None) -> Finished:
        """Write the export into the attempt's folder, or what it lacks."""
        notes = self.writer.notes
        if notes is not None and (attempt.plan / notes).exists():  # an attempt that died at its very end
            (attempt.plan / notes).rename(attempt.folder / notes)
        plan = find_plan(attempt.plan, self.identity)
        if plan is None:
            attempt.restart()
            rows = self.rows.stream(self.counts, attempt.plan)
            plan = write_plan(attempt.plan, self.identity, rows, lambda pairs: cut_shards(self.writer, pairs))
        media = Media([p.dataset for p in self.parts], self.with_media)
        names = write_shards(self.writer, plan, attempt, media, tick) if self.writer.is_sharded else []
        if not self.writer.is_sharded and tick is not None:
            tick(plan.rows)
        names += self.writer.finish(attempt.folder, plan)
        if notes is not None and (attempt.folder / notes).exists():
            (attempt.folder / notes).rename(attempt.plan / notes)
        sizes = {name: size_on_disk(attempt.folder / name) or 0 for name in names}
        return Finished(sizes, plan.shards if self.writer.is_sharded else len(sizes))

    def card(self, finished: Finished) -> str:
        """The README.md of this export."""
        extensions = {e: n for e, n in self.survey.extensions.items() if e is not None and self.with_media}
        stories = []
        for part, count in zip(self.parts, self.counts, strict=True):
            current = part.dataset.current
            chain = "" if current is None else current.chain
            stories.append(card.Origin(part.name, count, part.kept, part.dataset.funnel(), chain))
        return card.render(
            card.Card(
                rows=sum(self.counts),
                shards=finished.shards,
                data_bytes=sum(finished.files.values()),
                origins=stories,
                recipe_yaml=self.recipe_yaml,
                columns=self.columns,
                writer=self.writer,
                extensions=extensions,
                blurred=self.blurred if self.with_media else 0,
            )
        )


def _makers(dataset: Exportable) -> dict[str, str]:
    """Step column → which step made it, for the card."""
    made = {}
    for step in () if dataset.current is None else dataset.current.steps:
        for name in [*(visible for _, visible in (*step.outputs, *step.aside)), step.reason_column]:
            made[name] = f"made by step {step.name}"
    return made


def _schema(parts: list[Part], options: ExportOptions) -> pa.Schema:
    """The columns of all parts; RecipeError where two of them give one name two types."""
    asked = columns_to_ask(options.columns) or []
    asked += [n for n in (options.blur, options.repeat) if n is not None]
    found: dict[str, tuple[pa.DataType, Part]] = {}
    for part in parts:
        shards = part.dataset.shards()
        if not shards:
            continue
        fields = list(part.dataset.kept(shards[0]).schema)
        missing = [n for n in asked if n not in {f.name for f in fields}]
        if missing:  # what is not shown unless it is asked for, such as embeddings
            fields = [*fields, *(f for f in part.dataset.kept(shards[0], missing).schema if f.name in missing)]
        for field in fields:
            kind, first = found.setdefault(field.name, (field.type, part))
            if kind == pa.null():
                found[field.name] = (field.type, part)
            elif field.type not in (kind, pa.null()):
                raise RecipeError(
                    f"export.mix: the column {field.name!r} is {kind} in {first.name!r} and {field.type} in "
                    f"{part.name!r}; export columns that agree"
                )
    return pa.schema([(name, kind) for name, (kind, _) in found.items()])


def _medium(parts: list[Part], schema: pa.Schema) -> str:
    """What the samples' medium is called; `media` where the parts of a mix do not agree."""
    if len(parts) == 1:
        return media_name(schema.names)
    found = {media_name(p.dataset.kept(p.dataset.shards()[0], []).schema.names) for p in parts if p.dataset.shards()}
    return found.pop() if len(found) == 1 else "media" if found else "image"


def _columns(
    parts: list[Part],
    schema: pa.Schema,
    options: ExportOptions,
    meanings: Mapping[str, str],
    form: type[Format],
    medium: str,
) -> tuple[ExportColumn, ...]:
    if not len(schema):
        return ()
    reserved = form.reserved if form.media == "always" or options.include_media else ()
    reserved = tuple(medium if name == "image" else name for name in reserved)
    only = {"uid"} if form.media == "never" else None  # the one format without media writes uids alone
    chosen = options.columns
    made = {name: text for part in reversed(parts) for name, text in _makers(part.dataset).items()}
    if options.mix:
        if MIXED_FROM in schema.names:
            raise RecipeError(f"export.mix: a dataset has a column {MIXED_FROM!r}, which a mix writes itself")
        schema = schema.append(pa.field(MIXED_FROM, pa.string()))
        made[MIXED_FROM] = "name of the dataset in this mix"
        chosen = None if chosen is None else (*chosen, MIXED_FROM)
    found = export_columns(schema, chosen, {**made, **meanings}, reserved)
    return tuple(c for c in found if only is None or c.name in only)


def _count_boxes(kept: pa.Table, name: str, shard: int) -> int:
    """Pictures with a box; StoreError for a picture of which nobody can say whether it has one."""
    import pyarrow.compute as pc

    boxes = kept.column(name).filter(kept.column("image_path").is_valid())
    if boxes.null_count:
        raise StoreError(
            f"export.blur: {boxes.null_count} kept rows of shard {shard:05d} have NULL in {name!r}, so nobody can say "
            f"what to blur; add the filter {name} IS NOT NULL"
        )
    return int(pc.sum(pc.greater(pc.list_value_length(boxes), 0)).as_py() or 0)


def _identity(options: ExportOptions, columns: tuple[ExportColumn, ...], survey: Survey, parts: list[Part]) -> str:
    described = options.model_dump(mode="json", exclude=set(options.OPERATIONAL))
    names = [[c.name, str(c.type)] for c in columns]
    who = [[p.name, str(p.weight), p.rows] for p in parts]
    text = json.dumps([FORMAT, described, names, who, survey.rows, survey.digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
