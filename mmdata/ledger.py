"""`dataset.json`: what a dataset was made of. What readers see of it is in `mmdata.selections`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mmdata.columns import FORMAT_VERSION
from mmdata.errors import StoreError
from mmdata.selections import Current, CurrentStep
from mmdata.store import Store

__all__ = ["Current", "CurrentStep", "DatasetDocument", "dataset_document", "new_dataset", "update_dataset"]


@dataclass
class DatasetDocument:
    """`dataset.json`: what the dataset was made of; `data` is the file as read, for the conditional put."""

    id: str
    sources: list[dict[str, Any]]
    fetch: dict[str, Any]
    columns: list[list[str]] = field(default_factory=list)  # extra source columns as [name, Arrow type]
    blocks: list[dict[str, Any]] = field(default_factory=list)  # {lists: kind → fingerprint, first_shard: checked so}
    data: bytes | None = None

    def to_bytes(self) -> bytes:
        """JSON."""
        document = {
            "format": FORMAT_VERSION,
            "id": self.id,
            "sources": self.sources,
            "fetch": self.fetch,
            "columns": self.columns,
            "blocks": self.blocks,
        }
        return json.dumps(document, indent=1, sort_keys=True).encode()


def dataset_document(store: Store) -> DatasetDocument | None:
    """What `dataset.json` says; None when the folder is no dataset yet."""
    data = store.read_if_there("dataset.json")
    if data is None:
        return None
    try:
        found = json.loads(data)
        if found["format"] != FORMAT_VERSION:
            raise StoreError(f"{store.url} has format {found['format']}, this mmdata reads format {FORMAT_VERSION}")
        blocks = found.get("blocks", [])
        return DatasetDocument(found["id"], found["sources"], found["fetch"], found["columns"], blocks, data)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"dataset.json of {store.url} is damaged ({error!r}); restore it from a backup") from None


def new_dataset(store: Store, document: DatasetDocument) -> None:
    """Write the first `dataset.json`; StoreError when another run made the folder a dataset meanwhile."""
    data = document.to_bytes()
    if not store.replace("dataset.json", data, None):
        raise StoreError(f"another run made {store.url} a dataset meanwhile; run the same command again")
    document.data = data


def update_dataset(store: Store, document: DatasetDocument) -> None:
    """Put the changed document in place of the one it was read from."""
    data = document.to_bytes()
    if data != document.data:
        if not store.replace("dataset.json", data, document.data):
            raise StoreError(f"dataset.json of {store.url} was changed by another run; run the same command again")
        document.data = data
