"""A recipe with credentials in a URL is refused, and its message does not hold them."""

from __future__ import annotations

from typing import Any

import pytest

from mmdata.errors import RecipeError
from mmdata.recipe import parse

SECRET = "wJalrXUtnFEMI"
URLS = [
    f"s3://AKIAKEY:{SECRET}@bucket/pets.parquet",
    f"https://me:{SECRET}@example.org/pets.csv",
    f"simplecache::ftp://me:{SECRET}@example.org/pets.csv",
    f"https://b.s3.amazonaws.com/pets.csv?X-Amz-Credential=A&X-Amz-Signature={SECRET}",
    f"https://a.blob.core.windows.net/c/pets.csv?sv=2022&sig={SECRET}",
]
PLAIN = ["s3://bucket/pets.parquet", "https://example.org/a:b@c/pets.csv?page=2", "pets@home:1.csv"]


def recipe(path: str) -> dict[str, Any]:
    return {
        "name": "pets",
        "dataset": "data/pets",
        "source": {"kind": "urls", "path": path, "url": "url"},
        "steps": [{"filter": {"f": "url NOT LIKE 'http://a:b@%'"}}],
        "export": {"path": "out"},
    }


@pytest.mark.parametrize("url", URLS)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    for overrides in ([], [f"source.path={url}"]):
        with pytest.raises(RecipeError, match=r"source\.path is a URL with credentials in it") as told:
            parse(recipe("pets.csv" if overrides else url), overrides=overrides)
        assert SECRET not in str(told.value)


@pytest.mark.parametrize("path", PLAIN)
def test_others_pass(path: str) -> None:
    assert parse(recipe(path)).name == "pets"
