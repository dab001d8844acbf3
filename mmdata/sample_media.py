"""The one medium of a sample: its image, or where the dataset holds sound or video, that.

In: base rows, whose roles are told by their columns (`mmdata.columns.fetched_roles`). Out: the same rows with the
reference of each row's medium in `image_path`, `image_offset`, `image_size` and `image_ext`, as exports and readers ask
for it, and the name under which they give it. An `original` beside a resized picture is no medium of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mmdata.columns import media_reference

__all__ = ["FEATURES", "media_name", "with_medium"]

_ROLES = ("image", "video", "audio")
FEATURES = {"image": "Image", "video": "Video", "audio": "Audio"}  # of Hugging Face datasets, by `media_name`


def media_name(columns: Sequence[str]) -> str:
    """`image`, `audio` or `video`, which all samples have or lack; `media` where rows may have either."""
    others = [role for role in _ROLES[1:] if f"{role}_path" in columns]
    return "image" if not others else others[0] if len(others) == 1 else "media"


def with_medium(table: pa.Table) -> pa.Table:
    """The rows with each one's medium as their image; `table` needs a role's columns all or not at all."""
    for number, image in enumerate(media_reference("image")):
        names = [media_reference(role)[number].name for role in _ROLES]
        there = [table.column(name) for name in names if name in table.column_names]
        if len(there) > 1 and image.name in table.column_names:
            place = table.schema.get_field_index(image.name)
            table = table.set_column(place, table.schema.field(place), pc.coalesce(*there))
    return table
