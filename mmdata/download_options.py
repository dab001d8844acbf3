"""The options of `mmdata download`: img2dataset's command line, read as it reads it, and every option of `fetch`.

In: the words after `mmdata download`. Out: option name → value; the text of `--help`. The grammar is python-fire's, as
img2dataset's is: `--image_size=256`, `--image_size 256`, `--flag`, `--flag=True`, `--noflag`, `None`, `'["a","b"]'`,
dashes for underscores, and bare words in the order of img2dataset's parameters. RecipeError for an option that is not
known (with the nearest name), is given twice or has no value. What the values mean is `mmdata.download`'s business.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmdata.errors import RecipeError, nearest
from mmdata.recipe_yaml import from_yaml
from mmdata.settings import FetchOptions

__all__ = ["OPTIONS", "THEIR_NAMES", "Option", "help_text", "read_command_line", "runner_of"]

# img2dataset's name → the option of fetch that it is, where the names differ
THEIR_NAMES = {
    "timeout": "timeout_s",
    "thread_count": "concurrency",
    "number_sample_per_shard": "shard_rows",
    "output_format": "layout",
    "bbox_col": "bbox",
}


@dataclass(frozen=True)
class Option:
    """One option; `is_theirs`: of img2dataset; `default` as shown, None = it must be given.

    `kind`: text (as written), flag, list (of texts) or value (a number, a list, a mapping, None, else text).
    """

    name: str
    kind: Literal["text", "flag", "list", "value"]
    default: str | None
    about: str
    group: str
    is_theirs: bool = True


# In the order of img2dataset's parameters (main.py), in which bare words are taken.
_THEIRS = """
url_list|text||file of URLs, folder of such files, or fsspec URL|List
image_size|value|256|side in px that resize_mode brings a picture to|Pictures
output_folder|text|images|folder to make, which is an mmdata dataset, too; or fsspec URL|Output
processes_count|value|1|worker processes|Running
resize_mode|text|border|no, border, keep_ratio, keep_ratio_largest or center_crop|Pictures
resize_only_if_bigger|flag|False|leave pictures whose side is not above image_size|Pictures
upscale_interpolation|text|lanczos|filter for enlarging|Pictures
downscale_interpolation|text|area|filter for shrinking|Pictures
encode_quality|value|95|jpg, webp: 0 to 100; png: zlib level 0 to 9, else 6|Pictures
encode_format|text|jpg|jpg, png or webp|Pictures
skip_reencode|flag|False|keep the bytes of a picture that needs no change|Pictures
output_format|text|files|files, webdataset, parquet; none: the dataset alone|Output
input_format|text|txt|txt, csv, tsv, json, jsonl (.gz too) or parquet; not given: by the file's name|List
url_col|text|url|column of the URLs|List
caption_col|text|None|column of the captions|List
bbox_col|text|None|column of boxes to blur, which is saved, too|Pictures
thread_count|value|256|most URLs in flight in one process|Fetching
number_sample_per_shard|value|10000|rows of the list in one shard|Output
extract_exif|flag|True|keep EXIF tags as JSON|Pictures
save_additional_columns|list|None|further columns to carry along|List
timeout|value|10|s, deadline of one URL with all its attempts and redirects|Fetching
enable_wandb|flag|False|refused: mmdata reports to nobody|Refused, or without effect here
wandb_project|text|img2dataset|without effect|Refused, or without effect here
oom_shard_count|value|5|digits of the shard number|Output
compute_hash|text|sha256|sha256, md5 or sha512, of the bytes as fetched; sha256 is there in any case|Output
verify_hash|list|None|[column, kind]: rows whose bytes have another hash fail|Fetching
distributor|text|multiprocessing|multiprocessing, or ray (with --address); pyspark is refused|Running
subjob_size|value|1000|without effect|Refused, or without effect here
retries|value|0|further attempts, after passing trouble alone|Fetching
disable_all_reencoding|flag|False|store the bytes as fetched, once they are proved to decode|Pictures
min_image_size|value|0|px: a shorter short side is filtered|Pictures
max_image_area|value|inf|px: a larger area is filtered|Pictures
max_aspect_ratio|value|inf|long by short side: above is filtered|Pictures
incremental_mode|text|incremental|incremental: go on; overwrite: begin anew; extend: add this list|Output
max_shard_retry|value|1|without effect: every run takes up what is missing|Refused, or without effect here
user_agent_token|text|None|names you in the User-Agent, before mmdata|Fetching
disallowed_header_directives|list|None|directives of X-Robots-Tag that opt a row out; '[]': none|Fetching
ignore_ssl_certificate|flag|False|refused: certificates are verified|Refused, or without effect here
"""
_OWN = """
uid_col|text|None|column of each row's own uid|mmdata's own
runner|text|processes|processes, inline or ray|mmdata's own
workers|value|None|processes_count by its other name|mmdata's own
address|text|None|join the Ray cluster at this address|mmdata's own
quiet|flag|False|no progress|mmdata's own
"""


def _table(text: str, is_theirs: bool) -> list[Option]:
    rows = [line.split("|") for line in text.strip().splitlines()]
    return [Option(n, k, d or None, about, g, is_theirs) for n, k, d, about, g in rows]  # type: ignore[arg-type]


def _of_fetch() -> list[Option]:
    """The options of fetch that img2dataset has not, or calls otherwise."""
    found = []
    theirs = {option.name for option in _table(_THEIRS, True)}
    for name, field in FetchOptions.model_fields.items():
        if name in theirs:
            continue
        kind = "flag" if field.annotation is bool else "text" if field.annotation in (str, str | None) else "value"
        other = next((t for t, ours in THEIR_NAMES.items() if ours == name), None)
        about = f"{other} by mmdata's name" if other else str(field.description)
        default = "as there" if other else str(field.default)
        found.append(Option(name, kind, default, about, "mmdata's own", False))  # type: ignore[arg-type]
    return found


OPTIONS: Mapping[str, Option] = {o.name: o for o in [*_table(_THEIRS, True), *_table(_OWN, False), *_of_fetch()]}
_POSITIONAL = [o.name for o in OPTIONS.values() if o.is_theirs]
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_command_line(words: Sequence[str]) -> dict[str, Any]:
    """Option name → value, of what is given."""
    given: dict[str, Any] = {}
    bare = iter(_POSITIONAL)
    left = list(words)
    while left:
        word = left.pop(0)
        if not _is_option(word):
            name = next((n for n in bare if n not in given), None)
            if name is None:
                raise RecipeError(f"download: {word!r} is one word too many")
            _take(given, OPTIONS[name], name, word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        option, is_negated = _option(name)
        if equals:
            _take(given, option, name, text, is_negated)
        elif option.kind == "flag" and not (left and left[0].lower() in _TRUTHS and not is_negated):
            _take(given, option, name, "False" if is_negated else "True")
        elif not left or _is_option(left[0]):
            raise RecipeError(f"download: --{name} needs a value, such as --{name}={option.default}")
        else:
            _take(given, option, name, left.pop(0), is_negated)
    return given


def runner_of(given: Mapping[str, Any]) -> str:
    """What runs it: img2dataset's distributor under mmdata's name, unless a runner is named; not checked here."""
    distributor = str(given.get("distributor", "multiprocessing"))
    return str(given.get("runner") or ("processes" if distributor == "multiprocessing" else distributor))


def _is_option(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _option(name: str) -> tuple[Option, bool]:
    plain = name.replace("-", "_")
    if plain in OPTIONS:
        return OPTIONS[plain], False
    flag = OPTIONS.get(plain.removeprefix("no").lstrip("_"))
    if plain.startswith("no") and flag is not None and flag.kind == "flag":
        return flag, True
    raise RecipeError(f"download: no option is called --{name}{nearest(plain, OPTIONS)}")


def _take(given: dict[str, Any], option: Option, name: str, text: str, is_negated: bool = False) -> None:
    if option.name in given:
        raise RecipeError(f"download: --{option.name} is given twice")
    if is_negated and text not in ("False", "True"):
        raise RecipeError(f"download: --{name} takes no value")
    given[option.name] = _read(option, text)


def _read(option: Option, text: str) -> Any:
    if option.kind == "flag":
        if text.lower() not in _TRUTHS:
            raise RecipeError(f"download: --{option.name}: expected True or False, got {text!r}")
        return _TRUTHS[text.lower()]
    if option.kind == "text":
        return None if text in ("None", "null") and option.default is not None else text
    value = _literal(text)
    if option.kind == "list":
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        if isinstance(value, tuple | set):
            return list(value)
        if value is not None and not isinstance(value, list):
            raise RecipeError(f'download: --{option.name}: expected a list such as \'["a","b"]\', got {text!r}')
    return value


def _literal(text: str) -> Any:
    """A Python literal, as python-fire reads it; lists and mappings of bare words too; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text.lower() in ("inf", "float('inf')", ".inf"):
        return float("inf")
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    if text[:1] in ("[", "{"):
        try:
            return from_yaml(text)
        except RecipeError:
            return text
    return text


_BEGINNING = """Usage: mmdata download URL_LIST [OPTIONS]

Fetch a list's pictures with img2dataset's options, into its layout. The folder is an mmdata dataset, too: mmdata
show, sql, why, retry and export work on it. A command that was stopped goes on when it is given again.

Examples:
  mmdata download urls.txt --output_folder=pets --output_format=webdataset
  mmdata download pets.parquet --url_col=URL --caption_col=TEXT --resize_mode=keep_ratio --processes_count=4
  mmdata download more.parquet --output_folder=pets --incremental_mode=extend
  mmdata download urls.csv --save_additional_columns '["license"]' --per_host_rate=2 --retries=2 --decode=exact
"""
_GROUPS = ("List", "Output", "Pictures", "Fetching", "Running", "mmdata's own", "Refused, or without effect here")


def help_text(width: int = 120) -> str:
    """All options by group, with their defaults."""
    lines = [_BEGINNING]
    for group in _GROUPS:
        lines.append(f"{group}:")
        for option in OPTIONS.values():
            if option.group == group and option.name != "url_list":
                head = f"  --{option.name}={option.default}"
                lines += _folded(head, option.about, width)
        lines.append("")
    return "\n".join(lines).rstrip()


def _folded(head: str, about: str, width: int) -> Iterable[str]:
    import textwrap

    begin = f"{head:<36} "
    return textwrap.wrap(about, width, initial_indent=begin, subsequent_indent=" " * 37, break_on_hyphens=False)
