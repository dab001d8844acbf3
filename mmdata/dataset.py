"""A dataset as its users see it: SQL over every sample, why a sample is gone, and running a recipe.

`mmdata.open(path)` and `mmdata.run(recipe)` both give a `Dataset`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from mmdata import ledger, query
from mmdata.base_rows import extra_columns, with_extras
from mmdata.errors import RecipeError, SourceError, StoreError
from mmdata.funnel import Funnel, FunnelStep
from mmdata.media_reader import MediaReader
from mmdata.selections import load_selections
from mmdata.store import Store
from mmdata.stories import StepStory, Story, tell

if TYPE_CHECKING:
    import duckdb

    from mmdata.driver import Report
    from mmdata.export import ExportResult
    from mmdata.progress import Progress
    from mmdata.recipe import Recipe

__all__ = ["Dataset", "StepStory", "Story", "export_of", "open", "run"]


class Dataset:
    """A dataset folder, read. `store` is the folder; `current` the selection that is seen, None before a run finished.

    A selection is what the last run of one recipe left, under the recipe's name; without one asked for it is that of
    the last run. A dataset sees the state at the time it was opened; open it again to see a later run.
    """

    def __init__(self, path: str, selection: str | None = None) -> None:
        self.store = Store(path)
        if not self.store.exists("dataset.json"):
            raise SourceError(f"there is no dataset at {self.store.url}; make one with mmdata run RECIPE")
        self.current = ledger.Current.load(self.store, selection)
        self.report: Report | None = None
        self._media: MediaReader | None = None
        self._extra = extra_columns(self.store)
        self._connection: duckdb.DuckDBPyConnection | None = None

    def __repr__(self) -> str:
        return f"mmdata.open({self.store.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.store.url, "current": self.current}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Dataset.__init__(self, state["url"])
        self.current = state["current"]

    def again(self) -> Dataset:
        """The same state read through files and connections of this process' own, as a forked worker must."""
        made = Dataset(self.store.url)
        made.current = self.current
        return made

    def _seen(self) -> ledger.Current:
        if self.current is None:
            raise StoreError(f"no run has finished on {self.store.url} yet; run its recipe to the end first")
        return self.current

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with the views `samples`, `rows`, `verdicts`, `runs` and `columns."<set>"`."""
        if self._connection is None:
            self._connection = query.connect(self.store, self._seen())
        return self._connection

    def sql(self, text: str) -> duckdb.DuckDBPyRelation:
        """The answer to a question in DuckDB's SQL; `.df()`, `.arrow()` or `.fetchall()` it."""
        return self.connection.sql(text)

    def samples(self) -> duckdb.DuckDBPyRelation:
        """The kept rows of the view `samples`."""
        return self.sql("SELECT * FROM samples WHERE verdict = 'kept'")

    def selections(self) -> dict[str, ledger.Current]:
        """Every selection of the dataset as it is now, by name."""
        return load_selections(self.store)[0]

    def latest(self) -> str | None:
        """The name of the selection whose run finished last; None before any has."""
        return load_selections(self.store)[1]

    def shards(self) -> list[int]:
        """Shard numbers, ascending."""
        return list(self._seen().shards)

    def kept(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Kept rows of one shard in row order: base columns, media references, then step columns.

        `columns` names the step columns wanted (None = all but embeddings, reasons too); base columns are always there.
        """
        current = self._seen()
        index = current.shards.index(shard)
        base = with_extras(self.store.read_table(current.rows[index]), self._extra)
        verdicts = self.store.read_table(current.verdicts[index], ["row_id", "verdict"])
        query.require_rows(self.store, "verdicts", shard, base["row_id"], verdicts["row_id"])
        alive = pa.array(np.flatnonzero(verdicts["verdict"].to_numpy(zero_copy_only=False) == "kept"))
        table = base.take(alive).replace_schema_metadata(None)
        for step in current.steps:
            if not step.set_name:
                continue
            pairs = [*step.outputs, *(() if columns is None else step.aside), ("reason", step.reason_column)]
            wanted = [(own, visible) for own, visible in pairs if columns is None or visible in columns]
            if wanted:
                owns = list(dict.fromkeys(["row_id", *(own for own, _ in wanted)]))
                values = self.store.read_table(current.sets[step.set_name][index], owns)
                query.require_rows(self.store, step.set_name, shard, base["row_id"], values["row_id"])
                values = values.take(alive)
                for own, visible in wanted:
                    table = table.append_column(visible, values.column(own))
        return table

    def read_media(self, path: str, offset: int, size: int) -> bytes:
        """The bytes of a media reference (`image_path`, `image_offset`, `image_size`), wherever they lie.

        StoreError when they are not there; MissingMedia, which is one, when it is adopted media that is gone.
        """
        return self.media.read(path, offset, size)

    def to_torch(self, columns: Sequence[str] = (), **how: Any) -> Any:
        """The kept samples as a `torch.utils.data.IterableDataset`, for `torch.utils.data.DataLoader`.

        Each sample is a dictionary with `key`, `caption`, `image` and the `columns` named, None for NULL. Over all
        nodes and workers each kept sample is given exactly once an epoch. The arguments, all by name:

        - `shuffle` (True), `seed`, `epoch`: the order; `set_epoch(n)` gives the next epoch its own. Shards and the rows
          in them are permuted, then the rows of `buffer` (8) shards are mixed; only references are held for that.
        - `decode`: `"pil"` (the default), `"tensor"` ((H, W, 3) uint8, RGB), `"bytes"` as stored, or None: no `image`.
        - `rank`, `world`: this node; by default torch.distributed's, else RANK and WORLD_SIZE of the environment.
        - `uneven`: `"keep"`, `"drop"` or `"repeat"`: whether nodes differ by one sample, drop it, or repeat others.
        - `threads` (4) read media ahead in every worker; `on_error`: `"raise"`, or `"skip"` what does not decode.
        - `transform`: a function of one sample, called in those threads.
        """
        from mmdata.readers.torch_reader import torch_samples

        return torch_samples(self, columns, **how)

    def to_arrow(self, columns: Sequence[str] | None = None, *, media: bool = False, stream: bool = False) -> Any:
        """The kept samples as a `pyarrow.Table`, or with `stream` as a `RecordBatchReader` that holds a shard at most.

        `columns`: base and step columns in that order (None = all but embeddings). `media` adds `image`, a struct of
        `bytes` (as stored) and `path` (`<key>.<extension>`), the form Hugging Face datasets reads as Image.
        """
        from mmdata.readers.arrow import arrow_samples

        reader = arrow_samples(self, columns, media)
        return reader if stream else reader.read_all()

    def to_datasets(self, columns: Sequence[str] | None = None, *, media: bool = True, stream: bool = False) -> Any:
        """The kept samples as a `datasets.Dataset`, or with `stream` as a `datasets.IterableDataset`.

        `columns` as in `to_arrow`. With `media` there is a column `image` of the feature Image; the pictures stay where
        they are and are read when they are asked for. A `Dataset` holds its columns in memory, a stream one shard.
        """
        from mmdata.readers.huggingface import hugging_face_samples

        return hugging_face_samples(self, columns, media, stream)

    @property
    def media(self) -> MediaReader:
        """What reads media references; tell it with `expect` what will be read next, where media is far away."""
        if self._media is None:
            self._media = MediaReader(self.store)
            weakref.finalize(self, self._media.close)
        return self._media

    def export(self, path: str | Path, **options: Any) -> ExportResult:
        """Write the kept samples into the folder `path`, in a form that other tools read.

        `options` are those of a recipe's `export` (see `mmdata.settings.ExportOptions`), by name: `format`, `shuffle`,
        `columns`, `mix` … RecipeError for an option that is wrong; the same call goes on with a killed export.
        """
        from pydantic import ValidationError

        from mmdata.export import export
        from mmdata.recipe import describe_errors
        from mmdata.settings import ExportOptions

        try:
            read = ExportOptions.model_validate({"path": str(path), **options})
        except ValidationError as error:
            raise RecipeError(describe_errors("export", error, ExportOptions)) from None
        return export(self, read, self.current.recipe if self.current is not None else None, opener=open)

    def retry(self, errors: Sequence[str] = (), **how: Any) -> Dataset:
        """Fetch failed rows again, then run the recipe that was run last, which computes just these; the dataset anew.

        `errors`: their statuses, such as `["timeout", "http_5xx"]`; none = those that pass (`mmdata.retry.PASSING`).
        `how`: `overrides` of options that only say how to fetch (`["fetch.timeout_s=60"]`), and `runner`, `workers`,
        `address`, `device`, `quiet` as in `mmdata.run`. RecipeError for a status that is never tried again.
        """
        from mmdata.retry import retry

        return retry(self.store.url, errors, **how).dataset

    def funnel(self) -> Funnel:
        """What became of every row, step by step; rows in = kept + dropped + failed, proved."""
        current = self._seen()
        seconds = _seconds(query.run_records(self.store))
        rows_in = sum(n for *_, n in current.counts)
        steps, left = [], rows_in
        for position, name, kind, set_name in [
            (0, "ingest", "ingest", "ingest"),
            *((s.position, s.name, s.kind, s.set_name) for s in current.steps),
        ]:
            gone = [(verdict, reason, n) for verdict, p, reason, n in current.counts if p == position]
            dropped = sum(n for verdict, _, n in gone if verdict == "dropped")
            failed = sum(n for verdict, _, n in gone if verdict == "failed")
            reasons = {str(reason): n for _, reason, n in gone}
            out = left - dropped - failed
            steps.append(FunnelStep(position, name, kind, left, dropped, failed, out, reasons, seconds.get(set_name)))  # type: ignore[arg-type]
            left = out
        totals = {v: sum(n for verdict, *_, n in current.counts if verdict == v) for v in ("kept", "dropped", "failed")}
        funnel = Funnel(rows_in, totals["kept"], totals["dropped"], totals["failed"], tuple(steps))
        funnel.check()
        return funnel

    def why(self, key: str) -> Story:
        """The story of the row with this key; SourceError when there is none.

        Its `others` are the stories of further rows that have the key, which only adopted ones do.
        """
        return tell(self.store, self._seen(), str(key))


def _seconds(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Set name → seconds of work over all runs; `ingest` for fetching."""
    total: dict[str, float] = {}
    for record in records:
        if record["ingest_seconds"]:
            total["ingest"] = total.get("ingest", 0.0) + record["ingest_seconds"]
        for step in record["steps"]:
            if step["set"] and step["seconds"]:
                total[step["set"]] = total.get(step["set"], 0.0) + step["seconds"]
    return total


def open(path: str | Path, selection: str | None = None) -> Dataset:
    """The dataset in a folder, as the recipe named `selection` left it, or as the last run did.

    SourceError when there is none, RecipeError when it has no selection of that name.
    """
    return Dataset(str(path), selection)


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    dataset: str | Path | None = None,
    runner: Literal["ray", "processes", "inline"] = "ray",
    workers: int | None = None,
    address: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    allow_mixed: bool = False,
    quiet: bool = True,
) -> Dataset:
    """Run a recipe (a YAML file, the name of a shipped one, a mapping, a `Recipe`) to its end, and open the dataset.

    The end includes the export. `dataset` puts a recipe of a file or name over that folder: see
    `shipped.find_recipe`. `overrides` are `--set` assignments. `runner="inline"` stays in this process, `"processes"`
    starts plain processes on this machine, without Ray; all give the same bytes. `address` joins a Ray cluster. The
    dataset's `report` says what was computed now. Raises MmdataError; the same call resumes.
    """
    from mmdata import recipe as recipes
    from mmdata.driver import RunOptions, execute
    from mmdata.preflight import prove
    from mmdata.progress import Progress
    from mmdata.shipped import find_recipe

    if address is not None and runner != "ray":
        raise RecipeError(f"--address joins a Ray cluster, which --runner {runner} has no use for; give one of them")
    if isinstance(recipe, str | Path):
        read = find_recipe(recipe, overrides, dataset)
    elif dataset is not None:
        raise RecipeError("dataset: a recipe that is not in a file names its own; leave one of the two out")
    else:
        read = recipes.parse(recipe, overrides=overrides)
    proved = prove(read)
    with Progress(quiet=quiet) as progress:
        options = RunOptions(runner, workers, address, device, allow_mixed)
        report = execute(proved, options, progress, export_of(read, progress))
    made = Dataset(read.dataset, read.name)
    made.report = report
    return made


def export_of(recipe: Recipe, progress: Progress) -> Callable[[ledger.Current], None]:
    """What a run does at its end: the export of the recipe, if it has one."""
    from mmdata.export import export

    def write(current: ledger.Current) -> None:
        if recipe.export is not None:
            made = Dataset(recipe.dataset, recipe.name)
            with progress.step("export", made.funnel().kept) as line:
                export(made, recipe.export, current.recipe, lambda rows: line.advance(done=rows), opener=open)

    return write
