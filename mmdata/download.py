"""What `mmdata download` does: img2dataset's options → a recipe whose dataset is the output folder, and its run.

In: option name → value, as given (see `download_options`). Out: the recipe, how to run it, and the dataset. Fails with
RecipeError before anything is written: an option that cannot be honoured, with what to do instead; a value that does
not fit; a folder that holds something else. Like every run it goes on where it was stopped, when it is given again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
from pydantic import ValidationError

from mmdata import __version__
from mmdata.dataset import Dataset, run
from mmdata.download_options import THEIR_NAMES, runner_of
from mmdata.errors import RecipeError, nearest
from mmdata.lease import Lease
from mmdata.ledger import DatasetDocument, dataset_document
from mmdata.local_disk import TEMPORARY
from mmdata.recipe import parse
from mmdata.sample_layout import RESERVED
from mmdata.settings import FetchOptions
from mmdata.shard_layout import is_layout_name
from mmdata.source_entries import look_at
from mmdata.sources.list_files import FORMATS
from mmdata.sources.places import is_local
from mmdata.store import Store

__all__ = ["Download", "download", "planned", "remove_dataset", "summary"]

_INPUT = [f"{name}{end}" for name in ("txt", "csv", "tsv", "json", "jsonl") for end in ("", ".gz")] + ["parquet"]
_OUTPUT = {"files": "files", "webdataset": "webdataset", "parquet": "parquet", "none": "none"}
# What is accepted by name, and refused unless it says the usual.
_REFUSED = {
    ("output_format", "tfrecord"): "is not written; take webdataset or parquet, which TensorFlow's readers know, too",
    ("output_format", "dummy"): "writes nothing, and mmdata keeps what it fetches; take none, which adds no layout",
    ("distributor", "pyspark"): "is not there; take ray, with --address where the cluster is",
    ("enable_wandb", True): "is not there; `mmdata show`, `mmdata sql` and the files in state/runs tell more",
    ("ignore_ssl_certificate", True): "is not there: certificates are verified; such rows have the status tls",
}
_MODES = ("incremental", "overwrite", "extend")
# What a dataset folder holds at its top, beside a layout.
_OURS = {
    *("dataset.json", "current.json", "lease.json", ".lock", "media", "rows", "columns", "verdicts", "state", "runs"),
}


@dataclass(frozen=True)
class Download:
    """A recipe, and how to run it. `mode` is incremental, overwrite or extend."""

    recipe: dict[str, Any]
    mode: str
    runner: str
    workers: int | None
    address: str | None


def download(given: Mapping[str, Any], *, quiet: bool = True) -> Dataset:
    """Fetch a list as the options say; the dataset, which is the output folder."""
    found = planned(given)
    store = Store(found.recipe["dataset"])
    recipe = found.recipe
    if found.mode == "overwrite":
        parse(recipe, where="download")  # what is wrong with it is told before anything is removed
        remove_dataset(store)
    elif (document := dataset_document(store)) is not None:
        recipe = {**recipe, "source": _sources(recipe, document, store, found.mode)}
    return run(
        parse(recipe, where="download"),
        runner=found.runner,  # type: ignore[arg-type]
        workers=found.workers,
        address=found.address,
        quiet=quiet,
    )


def summary(ds: Dataset) -> str:
    """One line: what is there, and where to look further."""
    found = ds.funnel()
    stored = f"{found.kept} of {found.rows_in} rows are stored in {ds.store.url}"
    return f"{stored}; what became of the others: mmdata show, why, sql"


def planned(given: Mapping[str, Any]) -> Download:
    """What the options mean; RecipeError for those that cannot be."""
    for (name, value), words in _REFUSED.items():
        if given.get(name) == value:
            raise RecipeError(f"download: --{name}={value} {words}")
    if not given.get("url_list"):
        raise RecipeError("download: no list is given; expected mmdata download URL_LIST, such as urls.txt")
    mode = given.get("incremental_mode", "incremental")
    if mode not in _MODES:
        raise RecipeError(f"download: --incremental_mode={mode}: expected incremental, overwrite or extend")
    runner, workers = _how(given)
    fetch = _fetch(given)
    folder = str(given.get("output_folder") or "images")
    recipe = {
        "name": "download",
        "dataset": os.path.abspath(folder) if is_local(folder) else folder,
        "source": _source(given),
        "fetch": fetch,
        "steps": [],
    }
    return Download(recipe, mode, runner, workers, given.get("address"))


def _how(given: Mapping[str, Any]) -> tuple[str, int | None]:
    """Runner and CPUs."""
    distributor = given.get("distributor", "multiprocessing")
    if distributor not in ("multiprocessing", "ray"):
        raise RecipeError(f"download: --distributor={distributor}: expected multiprocessing or ray")
    runner = runner_of(given)
    if runner not in ("processes", "inline", "ray"):
        raise RecipeError(f"download: --runner={runner}: expected processes, inline or ray")
    if given.get("address") is not None and runner != "ray":
        raise RecipeError("download: --address names a Ray cluster: add --distributor=ray")
    named = [name for name in ("processes_count", "workers") if given.get(name) is not None]
    if len(named) == 2:
        raise RecipeError("download: --processes_count and --workers say the same; give one of them")
    if not named:
        return runner, None if runner == "ray" else 1  # 1 is img2dataset's
    count = given[named[0]]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RecipeError(f"download: --{named[0]}: expected a whole number from 1 on, got {count!r}")
    return runner, count


# The list


def _source(given: Mapping[str, Any]) -> dict[str, Any]:
    path = str(given["url_list"])
    path = os.path.abspath(os.path.expanduser(path)) if is_local(path) else path
    form = given.get("input_format")
    if form is not None and form not in _INPUT:
        raise RecipeError(f"download: --input_format={form}: no such format{nearest(str(form), _INPUT)}")
    known = _told_by_name(path)
    plain = (form or known or "txt").removesuffix(".gz")
    if form is not None and form.endswith(".gz") and not path.endswith(".gz") and not _is_folder(path):
        raise RecipeError(f"download: --input_format={form}, but {path} does not end in .gz: rename it")
    if _is_folder(path):
        path = f"{path.rstrip('/')}/*.{form or 'txt'}"  # as img2dataset looks for them
    extra = list(given.get("save_additional_columns") or [])
    taken = sorted({str(name) for name in extra if str(name).lower() in RESERVED})
    if taken:
        raise RecipeError(
            f"download: --save_additional_columns: img2dataset keeps the name {taken[0]!r} for itself: rename it"
        )
    if given.get("bbox_col") is not None and given["bbox_col"] not in extra:
        extra.append(given["bbox_col"])
    names = {"url": given.get("url_col"), "caption": given.get("caption_col"), "uid": given.get("uid_col")}
    if "uid" in extra:  # DataComp's scripts carry it along so; here it names the rows
        extra.remove("uid")
        names["uid"] = names["uid"] or "uid"
    source = {"kind": "urls", "path": path, "format": plain, "columns": [str(name) for name in extra]}
    if plain == "txt":
        names.pop("url")  # it has one column, whatever that is called
    return source | {name: column for name, column in names.items() if column is not None}


def _told_by_name(path: str) -> str | None:
    parts = PurePosixPath(path).name.lower().removesuffix(".gz").rsplit(".", 1)
    return FORMATS.get(parts[-1]) if len(parts) > 1 else None


def _is_folder(path: str) -> bool:
    if is_local(path):
        return os.path.isdir(path)
    try:
        fs, root = fsspec.core.url_to_fs(path)
        return bool(fs.isdir(root))
    except Exception:  # noqa: BLE001  whatever is wrong with it, reading the list says it better
        return False


# How it is fetched


def _fetch(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of fetch: img2dataset's defaults, then what is given."""
    found: dict[str, Any] = {"resize_mode": "border", "timeout_s": 10, "layout": "files"}
    named: dict[str, str] = {}
    for name, value in given.items():
        target = THEIR_NAMES.get(name, name)
        if target not in FetchOptions.model_fields:
            continue
        if target in named:
            raise RecipeError(f"download: --{named[target]} and --{name} say the same; give one of them")
        named[target] = name
        found[target] = value
    _as_ours(found, given)
    try:
        FetchOptions.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = str(first["loc"][0]) if first["loc"] else ""
        words = first["msg"].removeprefix("Value error, ")
        option = f"--{named.get(place, place)}: " if place else ""
        got = f", got {first['input']!r}" if place else ""
        raise RecipeError(f"download: {option}{words[:1].lower()}{words[1:]}{got}") from None
    return found


def _as_ours(found: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Values that img2dataset writes otherwise."""
    for name in ("max_image_area", "max_aspect_ratio"):
        if found.get(name) == float("inf"):
            found[name] = None
    if found.get("compute_hash") == "sha256":
        found["compute_hash"] = None  # always there
    if found["layout"] not in _OUTPUT:
        raise RecipeError(
            f"download: --output_format={found['layout']}: no such format{nearest(str(found['layout']), _OUTPUT)}"
        )
    if found.get("disallowed_header_directives", ()) is None:
        del found["disallowed_header_directives"]
    for name in ("skip_existing",):
        if isinstance(found.get(name), str):
            found[name] = [part.strip() for part in found[name].split(",")]
    token = given.get("user_agent_token")
    if token is not None and found.get("user_agent") is None:
        contact = f" (+{given['contact']})" if given.get("contact") else ""
        found["user_agent"] = f"{token} mmdata/{__version__}{contact}"


# A folder that is there


def _sources(recipe: Mapping[str, Any], document: DatasetDocument, store: Store, mode: str) -> Any:
    """The sources of the dataset, with this list at their end where it is not among them."""
    entries = document.sources
    [new] = parse(recipe, where="download").sources
    look = look_at(new, None).entry
    options = {name: value for name, value in look["options"].items() if name != "path"}
    for entry in entries:
        same = {name: value for name, value in entry["options"].items() if name != "path"} == options
        if same and (entry["kind"], entry["fingerprint"]) == (look["kind"], look["fingerprint"]):
            found = [_written(e, recipe["source"] if e is entry else None) for e in entries]
            return found if len(found) > 1 else found[0]
    if mode == "extend":
        return [*(_written(entry) for entry in entries), recipe["source"]]
    raise RecipeError(
        f"download: {store.url} was made from {entries[-1]['options']['path']}, and {new.path} is another list, or is "
        "read otherwise; --incremental_mode=extend adds it, --incremental_mode=overwrite begins anew"
    )


def _written(entry: Mapping[str, Any], now: Any = None) -> Any:
    """A source of the dataset as a recipe has it."""
    if now is not None:
        return now
    path = entry["options"]["path"]
    here = path if any(c in path for c in "*?[") or not entry.get("location") else entry["location"]
    return {"kind": entry["kind"], **entry["options"], "path": here}


def remove_dataset(store: Store) -> None:
    """Remove a dataset with its layout; nothing where nothing is. RecipeError when the folder holds anything else."""
    names = [name for name, _ in store.entries("")]
    if not names:
        return
    foreign = [n for n in names if not (n in _OURS or is_layout_name(n) or n.startswith(TEMPORARY))]
    if foreign or dataset_document(store) is None:
        what = f"it holds {foreign[0]!r}" if foreign else "it is no dataset of mmdata"
        raise RecipeError(
            f"download: --incremental_mode=overwrite removes what mmdata made, nothing else: {store.url} stays, "
            f"for {what}; name another folder, or empty it yourself"
        )
    with Lease.acquire(store, "overwrite"):
        # What says that there is a dataset goes last: a removal that was stopped is taken up by the next.
        store.remove("current.json")
        for name in _below(store, ""):
            if name not in ("dataset.json", "lease.json", ".lock"):
                store.remove(name)
        store.remove("dataset.json")


def _below(store: Store, folder: str) -> list[str]:
    found = []
    for entry, size in store.entries(folder):
        name = f"{folder}/{entry}" if folder else entry
        found += _below(store, name) if size is None else [name]
    return found
