"""What a run still has to bring in: the shards of its sources that have no rows yet, as items of work.

In: a proved recipe and the shards that have rows. Out: items for the pool, then what became of them, and at the end
the shards of every source in `dataset.json`. The driver decides when an item starts; a source is read only as far as
items are asked for, and never held. Sources follow one another: the first shard of one comes after the last of another.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from mmdata.adopt import with_columns
from mmdata.column_files import shard_name
from mmdata.errors import StoreError
from mmdata.fetched_before import FetchedBefore
from mmdata.ingest_journal import forget_ingests
from mmdata.ledger import update_dataset
from mmdata.pool import Finished, IngestContext, Item
from mmdata.preflight import Proved
from mmdata.progress import FetchLine
from mmdata.shard_layout import complete_layouts
from mmdata.sources.adopted import AdoptingSource
from mmdata.sources.urls import GIVEN, UrlSource
from mmdata.work import journal_folder

__all__ = ["Intake"]


class Intake:
    """The ingest of one run: `items` to do, `take` for each that ended, `finish` when all have.

    `contexts` is what the pool shares, by the name in the items. `by_status` counts the rows brought in by this run,
    `seconds` is the time its workers took.
    """

    def __init__(self, proved: Proved, run: str, worker_run: str, line: FetchLine) -> None:
        self._proved, self._run, self._line = proved, run, line
        self._recipe, self._document = proved.plan.recipe, proved.document
        self.contexts = {
            f"ingest {number}": self._context(number, source, worker_run)
            for number, source in enumerate(self._recipe.sources)
        }
        self.by_status: Counter[str] = Counter()
        self.seconds = 0.0
        self._held: FetchedBefore | None = None
        self._ranges: dict[int, tuple[int, int]] = {}  # source → first shard, shards

    def _context(self, number: int, source: Any, worker_run: str) -> IngestContext:
        adopting = source if isinstance(source, AdoptingSource) else None
        own, extra = self._proved.schemas[number], self._proved.extra
        store, fetch, block = self._proved.store, self._recipe.fetch, self._proved.block
        earlier = self._proved.earlier if source.is_fetched else None
        of, captions = self._document.id, source.has_captions
        return IngestContext(store, of, source.kind, fetch, worker_run, adopting, own, extra, block, earlier, captions)

    def items(self, there: Collection[int]) -> Iterator[Item]:
        """Shards that are not among those `there`; a source all of whose shards are known to be is not read."""
        first = 0
        for number, entry in enumerate(self._document.sources):
            count = entry["shards"]
            if count is None or any(shard not in there for shard in range(first, first + count)):
                if number in self._proved.drifted:
                    path = self._recipe.sources[number].path
                    raise StoreError(
                        f"rows of {path} are missing from {self._proved.store.url}, and it is not as it was adopted: "
                        "restore the rows, or bring the source back"
                    )
                count = 0
                for item in self._of_source(number, first):
                    count += 1
                    if item.shard not in there:
                        if self._proved.earlier is not None and self._held is None:
                            self._held = self._proved.earlier.load()  # once for all workers of this machine
                        self._line.begin(self._left(there))
                        yield item
            self._ranges[number] = (first, count)
            first += count

    def _left(self, there: Collection[int]) -> int | None:
        """Rows that are to come, about: what is there already counts as whole shards. None where nobody knows."""
        total = 0
        for source in self._recipe.sources:
            rows = source.known_rows if isinstance(source, UrlSource) else None
            if rows is None:
                return None
            total += rows
        return max(1, total - len(there) * self._recipe.fetch.shard_rows)

    def _of_source(self, number: int, first: int) -> Iterator[Item]:
        source, rows = self._recipe.sources[number], self._recipe.fetch.shard_rows
        name, extra = f"ingest {number}", self._proved.extra
        if isinstance(source, AdoptingSource):
            for shard, part in enumerate(source.parts(rows), first):
                yield Item("ingest", name, shard, part=part, attempt=self._attempt())
            return
        for shard, table in enumerate(source.tables(rows), first):
            own = table.select([n for n in ("url", "caption", "uid", *GIVEN) if n in table.column_names])
            for column, values in with_columns(table, extra).items():
                own = own.append_column(extra.field(column), values)
            yield Item("ingest", name, shard, own, attempt=self._attempt())

    def _attempt(self) -> str:
        return f"{self._run}-{secrets.token_hex(2)}"

    def take(self, finished: Finished) -> str:
        """Count a shard that is in; the name of its rows file."""
        counts = finished.result
        self.by_status.update(counts.by_status)
        self.seconds += counts.seconds
        self._line.finish(counts.rows, counts.by_status.get("ok", 0), counts.bytes_fetched)
        return f"rows/{shard_name(finished.item.shard)}.g0.parquet"

    def finish(self) -> None:
        """The sources have been read to their end: their shards are known from now on."""
        for number, (first, count) in self._ranges.items():
            self._document.sources[number] |= {"first_shard": first, "shards": count}
        update_dataset(self._proved.store, self._document)
        complete_layouts(self._proved.store, self._document.sources, self._recipe.fetch)
        forget_ingests(journal_folder(self._document.id))
