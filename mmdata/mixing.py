"""Several datasets in one export: who takes part, under which name, with how many samples.

In: the dataset that is exported and `export.mix`. Out: `Part`s; a dataset that is exported alone is one part without a
name. Shares: the dataset itself takes what the others leave to 1; where it is named in `mix` too, weights are relative.
Samples: `samples`, else `epochs` times the rows of all parts, divided by largest remainders (Hare quota), ties in the
order given. A part that gives more samples than it has rows gives whole passes, then rows chosen by their hashes.
RecipeError: weights that leave nothing, two parts of one name, a part without kept rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import RecipeError
from mmdata.funnel import Funnel
from mmdata.settings import ExportOptions

__all__ = ["Exportable", "Opener", "Part", "divide", "interleaved_counts", "open_parts"]


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


Opener = Callable[[str, str | None], Exportable]  # dataset folder, selection


@dataclass
class Part:
    """One dataset of an export. `name` is empty when it is the only one; `row_ids`: its kept rows', shard by shard.

    `rows` are what one pass gives: the `kept` rows, or with `repeat` as many as that says.
    """

    number: int
    name: str
    dataset: Exportable
    weight: Fraction
    rows: int = 0
    kept: int = 0
    media_bytes: int = 0
    value_bytes: int = 0
    row_ids: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def key_of(self, keys: pa.ChunkedArray, passing: int) -> pa.ChunkedArray:
        """Keys as exported in the given pass over the rows, counted from 0."""
        import pyarrow.compute as pc

        if not self.name:
            return keys
        end = f"-r{passing}" if passing else ""
        return pc.binary_join_element_wise(f"{self.name}-", keys, end, "")


def open_parts(dataset: Exportable, options: ExportOptions, opener: Opener | None) -> list[Part]:
    """The parts of an export, in the order of `mix`; the dataset itself first when it is not named there."""
    if not options.mix:
        return [Part(0, "", dataset, Fraction(1))]
    if opener is None:
        raise AssertionError("an export that mixes datasets needs to be told how they are opened")
    own = _place(dataset.store)
    named: list[tuple[str, Exportable, Fraction]] = []
    is_named = False
    for entry in options.mix:
        found = opener(entry.dataset, entry.selection)
        is_own = entry.selection is None and _place(found.store) == own
        is_named |= is_own
        name = entry.name or _name(found.store, entry.selection)
        named.append((name, dataset if is_own else found, Fraction(str(entry.weight))))
    if not is_named:
        left = 1 - sum((Fraction(str(entry.weight)) for entry in options.mix), Fraction(0))
        if left <= 0:
            raise RecipeError(
                "export.mix: the weights leave nothing for the dataset that is exported; name it there too, "
                "or give the others less than 1 in all"
            )
        named.insert(0, (_name(dataset.store, None), dataset, left))
    names = [name.lower() for name, _, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(f"export.mix: two datasets are called {twice[0]!r}; give one of them another `name`")
    return [Part(n, name, part, weight) for n, (name, part, weight) in enumerate(named)]


def _place(store: Any) -> str:
    return os.path.realpath(store.root) if store.is_local else str(store.url)


def _name(store: Any, selection: str | None) -> str:
    """A folder's name with what a key can hold."""
    last = str(store.root).rstrip("/").rpartition("/")[2] or "dataset"
    return re.sub(r"[^A-Za-z0-9_-]", "-", last if selection is None else f"{last}-{selection}")[:32]


def divide(parts: Sequence[Part], options: ExportOptions) -> list[int]:
    """How many samples each part gives."""
    if not options.mix:
        return [part.rows for part in parts]
    empty = [part.name for part in parts if not part.rows]
    if empty:
        raise RecipeError(f"export.mix: {empty[0]!r} has no kept rows to take samples from; leave it out")
    total = options.samples or max(1, round(Fraction(options.epochs or 1) * sum(part.rows for part in parts)))
    whole = sum(part.weight for part in parts)
    shares = [total * part.weight / whole for part in parts]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(parts)), key=lambda n: (counts[n] - shares[n], n))
    for n in by_rest[: total - sum(counts)]:
        counts[n] += 1
    return counts


def interleaved_counts(counts: Sequence[int], step: int, steps: int) -> list[int]:
    """How many samples of each part lie in the first `step` of `steps` equal stretches of the export.

    Sample i of n lies at (i + 1/2) / n: so each stretch holds the parts in their proportions.
    """
    return [(2 * n * step + steps) // (2 * steps) for n in counts]
