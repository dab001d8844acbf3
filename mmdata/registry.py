"""Operator name → class, loaded when asked for: listing the names imports no operator and no model package.

Three origins: mmdata itself, installed packages (entry points of the group `mmdata.operators`, each `name =
"module:Class"`), and what this process registered (a notebook, a test). A recipe's own files are a fourth, seen by that
recipe alone: they come as the argument `own` (see `mmdata.operator_files`). A name has one origin: what is taken by
mmdata or by a package is refused elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from mmdata.errors import MmdataError, RecipeError, nearest
from mmdata.stage import Contract, Group, Operator, Options, Stage

__all__ = ["ENTRY_POINTS", "Own", "built_in", "collect", "contract", "maker", "names", "operator", "origin", "register"]

ENTRY_POINTS = "mmdata.operators"
Own = Mapping[str, type[Operator[Any]]]  # name → class, of the files that one recipe names

_BUILT_IN = {
    "probe_image": "mmdata.stages.probe_image:ProbeImage",
    "probe_text": "mmdata.stages.probe_text:ProbeText",
    "tag_text": "mmdata.stages.tag_text:TagText",
    "match_labels": "mmdata.stages.match_labels:MatchLabels",
    "scrub_pii": "mmdata.stages.scrub_pii:ScrubPii",
    "detect_language": "mmdata.stages.detect_language:DetectLanguage",
    "hash_image": "mmdata.stages.hash_image:HashImage",
    "hash_text": "mmdata.stages.hash_text:HashText",
    "measure_image": "mmdata.stages.measure_image:MeasureImage",
    "detect_text": "mmdata.stages.detect_text:DetectText",
    "detect_faces": "mmdata.stages.detect_faces:DetectFaces",
    "detect_nudity": "mmdata.stages.detect_nudity:DetectNudity",
    "score_clip": "mmdata.stages.score_clip:ScoreClip",
    "score_clipscore": "mmdata.stages.score_clipscore:ScoreClipscore",
    "score_itm": "mmdata.stages.score_itm:ScoreItm",
    "score_conse": "mmdata.stages.score_conse:ScoreConse",
    "score_aesthetic": "mmdata.stages.score_aesthetic:ScoreAesthetic",
    "score_nsfw_zero_shot": "mmdata.stages.score_nsfw_zero_shot:ScoreNsfwZeroShot",
    "classify_image": "mmdata.stages.classify_image:ClassifyImage",
    "classify_text": "mmdata.stages.classify_text:ClassifyText",
    "embed_text": "mmdata.stages.embed_text:EmbedText",
    "match_concepts": "mmdata.stages.match_concepts:MatchConcepts",
    "attach": "mmdata.joins.attach:Attach",
    "keep_list": "mmdata.joins.keep_list:KeepList",
    "exact_duplicates": "mmdata.groups.exact_duplicates:ExactDuplicates",
    "rare_ngrams": "mmdata.groups.rare_ngrams:RareNgrams",
    "near_duplicates": "mmdata.groups.near_duplicates:NearDuplicates",
    "semantic_duplicates": "mmdata.groups.semantic_duplicates:SemanticDuplicates",
    "cluster_images": "mmdata.groups.cluster_images:ClusterImages",
    "minhash_duplicates": "mmdata.groups.minhash_duplicates:MinhashDuplicates",
    "decontaminate": "mmdata.joins.decontaminate:Decontaminate",
    "balance_concepts": "mmdata.groups.balance_concepts:BalanceConcepts",
    "sample": "mmdata.groups.sample:Sample",
    "top_fraction": "mmdata.groups.top_fraction:TopFraction",
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_registered: dict[str, type[Operator[Any]]] = {}
_collected: ContextVar[list[type[Operator[Any]]] | None] = ContextVar("collected", default=None)


def register(operator_class: type[Operator[Any]]) -> type[Operator[Any]]:
    """Make an operator known by its `name` in this process; registering a name again replaces it (notebooks do).

    Raises TypeError for what is no Stage and no Group, RecipeError for a name that is taken or no name.
    """
    if not issubclass(operator_class, Stage | Group):
        raise TypeError(f"{operator_class.__name__} is neither a Stage nor a Group")
    name = operator_class.name
    if not _NAME.fullmatch(name) or name == "filter":
        raise RecipeError(f"operator name {name!r} must be lower-case letters, digits and underscores, not 'filter'")
    if name in _BUILT_IN or name in _packaged():
        raise RecipeError(f"operator name {name!r} is taken by {origin(name)}; choose another")
    collected = _collected.get()
    if collected is None:
        _registered[name] = operator_class
    else:
        collected.append(operator_class)
    return operator_class


@contextmanager
def collect() -> Iterator[list[type[Operator[Any]]]]:
    """What is registered inside goes into the list and nowhere else: the operators of a file are that file's."""
    found: list[type[Operator[Any]]] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


@cache
def _packaged() -> dict[str, list[EntryPoint]]:
    """Operator name → its entry points, of every installed package that offers one."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


def built_in() -> list[str]:
    """The operators of mmdata itself, in their order."""
    return list(_BUILT_IN)


def names(own: Own | None = None) -> list[str]:
    """Every operator name: built-in ones first, in their order, then packages', this process' and the recipe's own."""
    return list(dict.fromkeys([*_BUILT_IN, *sorted(_packaged()), *sorted(_registered), *sorted(own or ())]))


def origin(name: str) -> str:
    """Who brings an operator: `mmdata`, `package <name> <version>`, or `this process`."""
    if name in _BUILT_IN:
        return "mmdata"
    if name in _packaged():
        return " and ".join(f"package {_distribution(p)}" for p in _packaged()[name])
    return "this process"


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def operator(name: str, own: Own | None = None) -> type[Operator[Any]]:
    """The class of an operator; RecipeError with the nearest name when there is none.

    `own`: the operators of the recipe's files, which come before what this process registered.
    """
    if own and name in own:
        return own[name]
    if name in _packaged():
        return _from_package(name)
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise RecipeError(f"no operator is called {name!r}{nearest(name, names(own))}")
    module, _, attribute = _BUILT_IN[name].partition(":")
    found: type[Operator[Any]] = getattr(import_module(module), attribute)
    return found


@cache
def _from_package(name: str) -> type[Operator[Any]]:
    """The class behind an entry point; RecipeError names the package when it is not what it says."""
    points = _packaged()[name]
    if name in _BUILT_IN or len(points) > 1:
        offers = [*(["mmdata"] if name in _BUILT_IN else []), *(_distribution(p) for p in points)]
        raise RecipeError(f"operator {name!r} is offered by {' and by '.join(offers)}; uninstall one of the packages")
    [point] = points
    where = f"operator {name!r} of package {_distribution(point)}"
    try:
        found = point.load()
    except Exception as error:
        raise RecipeError(f"{where} cannot be loaded from {point.value} ({type(error).__name__}: {error})") from error
    if not (isinstance(found, type) and issubclass(found, Stage | Group)):
        raise RecipeError(f"{where}: {point.value} is neither a Stage nor a Group; tell its author")
    if found.name != name or not _NAME.fullmatch(name) or name == "filter":
        raise RecipeError(f"{where}: the class {point.value} is called {found.name!r}; the two must be one name")
    # Two packages may use one name after the other: their columns must not be taken for one another's.
    found.origin = point.dist.name if point.dist is not None else point.value
    return found


def contract(operator_class: type[Operator[Any]], options: Options) -> Contract:
    """The operator's contract under these options; what a stranger's code raises becomes a RecipeError."""
    try:
        return operator_class.contract(options)
    except MmdataError:
        raise
    except Exception as error:
        if operator_class.__module__.partition(".")[0] == "mmdata":
            raise
        raise RecipeError(
            f"operator {operator_class.name!r}: its contract cannot be read ({type(error).__name__}: {error})"
        ) from error


def maker(column: str, own: Own | None = None) -> str | None:
    """The operator that adds a column of this name, with the option that asks for it; None when there is none."""
    for name in names(own):
        try:
            found = operator(name, own)
            if column in dict(found.on_request):
                return f"{name} with `{dict(found.on_request)[column]}`"
            writes = contract(found, found.options_type()).writes.names
        except (ValidationError, MmdataError):  # an option is required, or weights are not there
            continue
        if column in writes:
            return name
    return None
