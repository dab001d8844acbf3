"""Rows out of text lists (txt, csv, tsv, json, jsonl), streamed: broken text costs the row it stands in, no other.

A row is a list of cells in the order of the columns asked for, None where there is no value. Bytes that are not UTF-8
become U+FFFD; the fetcher calls a URL with U+FFFD a bad one.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from mmdata.errors import SourceError

__all__ = ["FIRST_BLOCK", "column_names", "converted", "inferred_type", "text_rows"]

FIRST_BLOCK = 10_000  # rows that decide on names (json) and types
_MAX_LINE = 16 << 20  # bytes; the rest of a longer line is dropped with it
_CHUNK = 1 << 20
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_BOOLEAN = {"true": True, "false": False}


def column_names(file: BinaryIO, format: str, where: str) -> list[str]:
    """Columns of the list: `url` (txt), the header (csv, tsv), the keys of the first block in order (json, jsonl)."""
    if format == "txt":
        return ["url"]
    if format in _DELIMITERS:
        return _header(_csv_rows(_lines(file, where), _DELIMITERS[format]))
    names: dict[str, None] = {}
    for _, value in zip(range(FIRST_BLOCK), _json_values(file, format, where), strict=False):
        if isinstance(value, dict):
            names |= dict.fromkeys(value)
    return list(names)


def text_rows(file: BinaryIO, format: str, wanted: list[str], where: str) -> Iterator[list[Any]]:
    """Cells of `wanted` for every row. Blank lines are no rows; rows too short have None, cells too many are ignored.

    In csv and tsv an empty cell is None, and a quote that is never closed costs the row it stands in. A line of jsonl
    that is no object is a row without values; a json file that does not parse raises SourceError at that place.
    """
    if format == "txt":
        for line in _lines(file, where):
            if text := line.strip():
                yield [text] * len(wanted)
    elif format in _DELIMITERS:
        rows = _csv_rows(_lines(file, where), _DELIMITERS[format])
        header = _header(rows)
        places = [header.index(name) for name in wanted]
        for cells in rows:
            yield [(cells[place] or None) if place < len(cells) else None for place in places]
    else:
        for value in _json_values(file, format, where):
            found = value if isinstance(value, dict) else {}
            yield [found.get(name) for name in wanted]


def _header(rows: Iterator[list[str]]) -> list[str]:
    return [name.strip() for name in next(rows, [])]


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    """Lines with their ends, in UTF-8, the byte order mark taken off; blank ones too."""
    first = True
    while raw := file.readline(_MAX_LINE):
        if first and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(f"{where} is UTF-16; save it as UTF-8")
        rest = raw
        while len(rest) >= _MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_LINE)
        text = raw.decode("utf-8", "replace")
        yield text.removeprefix("\ufeff") if first else text
        first = False


class _Feed:
    """Lines for a csv reader: those of the row being read are remembered and can be put back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._back: deque[str] = deque()
        self.taken: list[str] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._lines)
        self.taken.append(line)
        return line

    def put_back(self, lines: list[str]) -> None:
        self._back.extendleft(reversed(lines))


def _csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Rows by the csv module's strict rules; where these fail, the first line of the row is read by the lax ones."""
    feed = _Feed(lines)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.taken.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            first, *others = feed.taken
            feed.put_back(others)
            row = _lax(first, delimiter)
        if row:
            yield row


def _lax(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [""])
    except csv.Error:  # a cell above the module's limit of 131,072 characters
        return [""]


def _json_values(file: BinaryIO, format: str, where: str) -> Iterator[Any]:
    if format == "jsonl":
        for line in _lines(file, where):
            if line.strip():
                yield _parsed(line)
    else:
        yield from _array_values(file, where)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _array_values(file: BinaryIO, where: str) -> Iterator[Any]:
    """Elements of a JSON array, one at a time; also objects one after the other, with or without line ends."""
    decoder, to_text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")("replace")
    between = re.compile(r"[\s,]*")
    text, at, passed, begun, ended = "", 0, 0, False, False
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if not begun and at < len(text):
            begun = True
            at += text[at] == "["
            continue
        if ended and (at == len(text) or text[at] == "]"):
            return
        try:
            if at == len(text):
                raise ValueError
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if ended or len(text) - at > _MAX_LINE or isinstance(error, RecursionError):
                raise SourceError(f"{where} is not JSON after character {passed + at}: mend it there") from None
            chunk = file.read(_CHUNK)
            ended = not chunk
            passed += at
            text, at = text[at:] + to_text.decode(chunk, final=ended), 0
            continue
        yield value
        at = end


def inferred_type(cells: list[Any], format: str) -> pa.DataType:
    """Type of a column from the cells of its first block: bool, int64, float64, else string (also without a value).

    In csv and tsv a number with leading zeros is text. In json, lists and objects are text: the JSON of the value.
    """
    values = [c for c in cells if c is not None]
    if format in _DELIMITERS:
        if values and all(_INTEGER.fullmatch(v) for v in values):
            return pa.int64()
        if values and all(_NUMBER.fullmatch(v) and not re.match(r"-?0[0-9]", v) for v in values):
            return pa.float64()
        return pa.bool_() if values and all(v.lower() in _BOOLEAN for v in values) else pa.string()
    kinds = {type(v) for v in values}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(abs(v) < 2**63 for v in values):
        return pa.int64()
    return pa.float64() if kinds and kinds <= {int, float} else pa.string()


def converted(cells: list[Any], type: pa.DataType) -> pa.Array:
    """Cells as a column of `type`; a cell that does not fit is NULL (never so for string)."""
    return pa.array([None if c is None else _cell(c, type) for c in cells], type)


def _cell(cell: Any, type: pa.DataType) -> Any:
    if pa.types.is_string(type):
        text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(cell, str):
        if pa.types.is_boolean(type):
            return _BOOLEAN.get(cell.lower())
        if not (_INTEGER if pa.types.is_int64(type) else _NUMBER).fullmatch(cell):
            return None
        return int(cell) if pa.types.is_int64(type) else float(cell)
    if pa.types.is_boolean(type):
        return cell if isinstance(cell, bool) else None
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return None
    if pa.types.is_int64(type):
        return cell if isinstance(cell, int) and abs(cell) < 2**63 else None
    return float(cell) if abs(cell) < 2**1023 else None
