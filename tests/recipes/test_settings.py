"""What the shipped recipes set, a second time from the sources: models, shares, seeds, and which step comes first.

test_shipped runs every recipe, but with small random weights, and lets every score through: what it replaces, and the
order of what it does not tell apart, is looked at here.
"""

from __future__ import annotations

from typing import Any

import pytest

from mmdata import catalogue
from mmdata.recipe import OperatorStep, load

B32, B16, L14 = ({"model": f"ViT-{size}-quickgelu", "pretrained": "openai"} for size in ("B-32", "B-16", "L-14"))

PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    # mlfoundations/datacomp, baselines/apply_filter.py: the best 30 % by L/14, its own way to count; B/32 for laion2b
    ("datacomp_clip", "score_clip", L14),
    ("datacomp_clip", "top_fraction", {"of": "clip_score", "fraction": 0.3, "datacomp": True}),
    ("datacomp_image_clip", "score_clip", L14),
    ("datacomp_image_clip", "top_fraction", {"of": "clip_score", "fraction": 0.3, "datacomp": True}),
    ("datacomp_laion2b", "score_clip", B32),
    ("datacomp_text", "match_concepts", {"rule": "synsets"}),
    # baselines/image_based_clustering.py: niter 20, seed 0
    ("datacomp_image", "score_clip", L14),
    ("datacomp_image", "cluster_images", {"of": "clip_image_embedding", "iterations": 20, "seed": 0}),
    ("datacomp_image_clip", "cluster_images", {"of": "clip_image_embedding", "iterations": 20, "seed": 0}),
    # LAION's announcements: URL and text are the key of the first, URL of the second; B/32
    ("laion400m", "exact_duplicates", {"of": ["url", "caption"]}),
    ("laion400m", "score_clip", B32),
    ("laion400m", "score_nsfw_zero_shot", B32),
    ("laion5b", "exact_duplicates", {"of": ["url"]}),
    ("laion5b", "score_clip", B32),
    # kakaobrain/coyo-dataset: (image_phash, text)
    ("coyo700m", "same_caption", {"of": ["caption"]}),
    ("coyo700m", "same_pair", {"of": ["phash", "caption"]}),
    # facebookresearch/MetaCLIP: "the magic 20k", for 400 million pairs
    ("metaclip", "balance_concepts", {"t": 20_000}),
    # facebookresearch/SemDeDup: niter 100, seed 1234, the farthest from the mean first
    ("semdedup", "semantic_duplicates", {"iterations": 100, "seed": 1234, "keep": "hard"}),
    # CC12M: persons become <PERSON>
    ("cc12m", "scrub_pii", {"kinds": ["person"]}),
]

# Not verified, or chosen here where a source leaves it open: the recipe's head must say so.
CHOSEN: list[tuple[str, str, dict[str, Any], str]] = [
    ("align", "rare_ngrams", {"common": 100_000_000}, "All figures here are recalled and could not be verified."),
    ("align", "same_picture", {"of": ["sha256"]}, "a picture is its file (sha256)"),
    ("align", "same_text", {"of": ["caption"]}, "as written"),
    (
        "coyo700m",
        "same_pair",
        {"prefer": ["original_width_px * original_height_px desc"]},
        "of equal pairs the largest picture stays is our choice",
    ),
    ("cc3m", "classify_image", {"top": 10}, "the best ten of them"),
    ("cc12m", "classify_image", {"top": 10}, "the best ten of them"),
    ("dfn", "top_fraction", {"of": "clip_score", "fraction": 0.15}, "Could not be verified, and are options here"),
    ("tmars", "top_fraction", {"of": "masked_score", "fraction": 0.5}, "Could not be verified, and are options here"),
    ("tmars", "masked", {**B32, "masked": "ocr_boxes"}, "and ViT-B/32 as the model that scores"),
    ("semdedup", "score_clip", B16, "[M] which checkpoint made their embeddings could not be verified"),
    ("semdedup", "semantic_duplicates", {"epsilon": 0.05}, "0.05 is our choice"),
    ("laion5b", "mclip", {"model": "xlm-roberta-base-ViT-B-32"}, "0.26 belongs to mCLIP"),
]

ORDERED = [
    # A duplicate goes before the score may drop the row that stays for it.
    ("laion400m", "unique", "aligned"),
    ("laion5b", "unique", "aligned"),
    # What comes more than ten times is counted before pairs are made one.
    ("coyo700m", "same_caption", "unique"),
    # The threshold is of the whole pool, and the clusters are those of all captioned rows.
    ("datacomp_image_clip", "top_fraction", "english"),
    ("datacomp_image_clip", "long_enough", "cluster_images"),
    ("datacomp_image_clip", "cluster_images", "aligned"),
    ("datacomp_image", "long_enough", "cluster_images"),
    # metaclip/README.md: matching, then unsafe pictures and duplicates, balancing last
    ("metaclip", "matched", "safe"),
    ("metaclip", "safe", "unique"),
    ("metaclip", "unique", "balance_concepts"),
    # Text is found before it is painted over.
    ("tmars", "detect_text", "masked"),
]


def options_of(recipe: str, step: str) -> dict[str, Any]:
    steps = [s for s in load(catalogue.recipe_folder() / f"{recipe}.yaml").steps if isinstance(s, OperatorStep)]
    [found] = [s.options for s in steps if s.name == step]
    return found


@pytest.mark.parametrize(("recipe", "step", "expected"), PUBLISHED)
def test_published_settings(recipe: str, step: str, expected: dict[str, Any]):
    found = options_of(recipe, step)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(("recipe", "step", "expected", "said"), CHOSEN)
def test_what_is_chosen_says_so(recipe: str, step: str, expected: dict[str, Any], said: str):
    found = options_of(recipe, step)
    assert {name: found.get(name) for name in expected} == expected
    head = catalogue.shipped_recipe(recipe).partition("\nname:")[0]
    assert said in " ".join(head.replace("\n#", "\n").split())


@pytest.mark.parametrize(("recipe", "first", "later"), ORDERED)
def test_order(recipe: str, first: str, later: str):
    names = [s.name for s in load(catalogue.recipe_folder() / f"{recipe}.yaml").steps]
    assert names.index(first) < names.index(later)
