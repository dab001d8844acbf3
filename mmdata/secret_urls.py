"""URLs that hold credentials: a recipe with one is refused before it is kept, logged or printed anywhere.

In: a recipe's document. Fails: RecipeError that says where the URL stands, and never what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmdata.errors import RecipeError

__all__ = ["require_no_credentials"]

_USER = re.compile(r"(?:\w[\w.+-]*::)*\w[\w.+-]*://[^/?#\s]*:[^/?#\s]*@", re.A)
_SIGNED = re.compile(
    r"\w[\w.+-]*://\S*[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|"
    r"Signature|sig|token|access_token)=",
    re.A | re.I,
)


def require_no_credentials(document: Any) -> None:
    """RecipeError where a text that begins as a URL holds `user:key@` or a signature."""
    for place, text in _texts(document, ""):
        if _USER.match(text) or _SIGNED.match(text):
            raise RecipeError(
                f"{place or 'a value'} is a URL with credentials in it; take them out of the recipe and give them "
                "in the environment or the cloud's own files (docs/stores.md)"
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value.strip()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}[{index}]")
