"""The split ``seen`` samples training queries to val's size, whole clusters first, equally in every run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lavis_cir_plugin.benchmarks import cirr, fashioniq
from lavis_cir_plugin.benchmarks.seen_split import drawn_like
from lavis_cir_plugin.benchmarks.types import Group, Query
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.ranking.ranks import Ranking


def group(pairs, gallery=None, name="dress"):
    """Return a group of queries from (reference, target) pairs, with the sorted images as its gallery."""
    queries = tuple(Query(a, (f"{a} to {b}",), b) for a, b in pairs)
    return Group(name, tuple(gallery or sorted({image for pair in pairs for image in pair})), queries, False)


def of_size(queries, images):
    """Return a validation group of that size."""
    return group([("v0", "v1")] * queries, [f"v{index}" for index in range(images)])


# The clusters are a-b-c (2 queries, 3 images), d-e-f (2, 3) and g-h-i (2, 3), with interleaved queries.
THREE = group([("a", "b"), ("d", "e"), ("g", "h"), ("b", "c"), ("f", "e"), ("h", "i")])


@pytest.mark.parametrize("seed", range(6))
def test_whole_clusters_fill_the_gallery(seed):
    """Room for 6 of 9 images holds two whole clusters with 4 queries, of which 3 are sampled."""
    drawn = drawn_like(THREE, of_size(queries=3, images=6), seed)
    clusters = {"".join(part) for part in ("abc", "def", "ghi") if set(part) <= set(drawn.gallery)}
    assert len(clusters) == 2
    assert "".join(drawn.gallery) == "".join(sorted(clusters))
    assert len(drawn.queries) == 3
    assert all({query.reference, query.target} <= set(drawn.gallery) for query in drawn.queries)
    positions = [THREE.queries.index(query) for query in drawn.queries]
    assert positions == sorted(set(positions))
    assert (drawn.name, drawn.reference_removed) == ("dress", False)


def test_a_cluster_that_does_not_fit_is_cut_and_the_rest_filled_up():
    """Room for 4 of 9 images holds one cluster of 3. No further pair fits, so one image comes from elsewhere."""
    for seed in range(6):
        drawn = drawn_like(THREE, of_size(queries=5, images=4), seed)
        assert len(drawn.gallery) == 4
        assert len(drawn.queries) == 2  # fewer than val's 5, because no other query has both images in the gallery


def test_images_that_no_query_uses_fill_up_last():
    training = replace(THREE, gallery=(*THREE.gallery, "x", "y", "z"))
    assert set(drawn_like(training, of_size(queries=9, images=9)).gallery) == set("abcdefghi")
    assert len(set(drawn_like(training, of_size(queries=9, images=11)).gallery) & set("xyz")) == 2


def test_less_training_data_than_val_is_taken_whole():
    assert drawn_like(THREE, of_size(queries=100, images=100)) == THREE


def test_the_draw_depends_on_seed_and_name_alone():
    large = group([(f"r{index:03}", f"t{index:03}") for index in range(200)])
    val = of_size(queries=20, images=50)
    assert drawn_like(large, val) == drawn_like(large, val, seed=0)
    assert len({drawn_like(large, val, seed).gallery for seed in range(4)}) == 4
    assert drawn_like(replace(large, name="shirt"), val).gallery != drawn_like(large, val).gallery


def test_members_come_along():
    """The sets are {a, b, c, d} and {e, f, g, h}. Room for 5 holds one set and a single image."""
    queries = (
        Query("a", ("x",), "b", ("b", "c", "d")),
        Query("e", ("x",), "f", ("f", "g", "h")),
        Query("c", ("x",), "d", ("a", "b", "d")),
    )
    training = Group("cirr", tuple("hgfedcba"), queries, True)
    for seed in range(6):
        drawn = drawn_like(training, of_size(queries=3, images=5), seed)
        assert drawn.reference_removed
        assert list(drawn.gallery) == sorted(drawn.gallery, reverse=True)
        assert len(drawn.gallery) == 5
        assert drawn.queries in ((queries[1],), (queries[0], queries[2]))


# -- FashionIQ -------------------------------------------------------------------------------------------------------

WORLD = {
    "train_triplets": 60, "train_images": 80, "val_queries": 12, "val_images": 30, "test_queries": 3, "test_images": 6,
    "image_width": 32, "image_height": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """Return a drawn world with 60 training triplets on 80 images and 12 val queries on 30 images per category."""
    return str(make_garments(tmp_path_factory.mktemp("cache"), GarmentsConfig(**WORLD)))


def images_of(benchmark):
    return {name for group in benchmark.groups for name in group.gallery}


def test_fashioniq_seen_has_the_shape_of_val_and_none_of_its_images(garments):
    config = {"root": garments, "reference": "removed", "training_text": "and"}  # "and" makes query texts
    seen, val = fashioniq.read_benchmark(config, "seen"), fashioniq.read_benchmark(config, "val")
    triplets, _ = fashioniq.read_train(config)
    assert [(g.name, len(g.queries), len(g.gallery)) for g in seen.groups] == [
        (name, 12, 30) for name in ("dress", "shirt", "toptee")
    ]
    assert all(g.reference_removed for g in seen.groups)
    assert not images_of(seen) & images_of(val)
    assert images_of(seen) <= {name for t in triplets for name in (t.reference, t.target)}
    assert set(seen.image_paths) == images_of(seen)
    known = {(t.category, t.reference, t.target, t.captions) for t in triplets}
    assert {(g.name, q.reference, q.target, q.texts) for g in seen.groups for q in g.queries} <= known
    assert all({q.reference, q.target} <= set(g.gallery) for g in seen.groups for q in g.queries)
    assert (seen.split, seen.selection_metric) == ("seen", "mean")
    assert seen.protocol == (
        "FashionIQ seen, gallery of training images drawn up to the size of val's original-split gallery (dress 30, "
        "shirt 30, toptee 30), reference removed, captions 'a and b', 36 of 180 training queries, ties by gallery "
        "order; protocol clip4cir except reference: removed"
    )
    assert fashioniq.read_benchmark(config, "seen").groups == seen.groups


@pytest.mark.parametrize(("mode", "texts"), [("both_orders_avg", 2), ("two_queries", 1), ("per_caption", 1)])
def test_fashioniq_seen_follows_the_caption_convention(garments, mode, texts):
    config = {"root": garments, "captions": mode, "gallery": "val"}
    seen, val = fashioniq.read_benchmark(config, "seen"), fashioniq.read_benchmark(config, "val")
    for ours, theirs in zip(seen.groups, val.groups):
        assert len(ours.gallery) == len(theirs.gallery)
        assert {len(query.texts) for query in ours.queries} == {texts}
    assert "VAL-split gallery" in seen.protocol


def test_fashioniq_seen_needs_no_image_outside_the_training_triplets(garments, tmp_path):
    """Missing images are skipped and counted as in val. Images of the split file without a triplet do not count."""
    paths = fashioniq.read_train({"root": garments})[1]
    val_paths = fashioniq.read_benchmark({"root": garments}, "val").image_paths
    gone = sorted(paths)[0]
    (tmp_path / "images").mkdir()
    for name, path in {**paths, **val_paths}.items():
        if name != gone:
            (tmp_path / "images" / path.name).symlink_to(path)
    config = {"root": garments, "images": str(tmp_path / "images"), "missing_images": "skip"}
    seen = fashioniq.read_benchmark(config, "seen")
    assert gone not in seen.image_paths
    assert f"incomplete: 1 of {len(paths)} gallery images missing" in seen.protocol


# -- CIRR ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cirr_root(tmp_path):
    """Write CIRR's files with 5 sets of 6 images and 4 queries in train, and 2 such sets in val."""

    def write(has_sets=True):
        for split, folder, sets in (("train", "train/0", 5), ("val", "dev", 2)):
            records, images = [], {}
            for number in range(sets):
                names = [f"{split}-{number}-img{index}" for index in range(6)]
                images.update({name: f"./{folder}/{name}.png" for name in names})
                for index in range(4):
                    record = {"reference": names[index], "target_hard": names[index + 1], "caption": f"to {index + 1}"}
                    if has_sets or split == "val":
                        record.update(pairid=len(records), img_set={"members": names})
                    records.append(record)
            images[f"{split}-unused"] = f"./{folder}/{split}-unused.png"
            for kind, content in (("captions/cap", records), ("image_splits/split", images)):
                path = tmp_path / f"{kind}.rc2.{split}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(content))
            for place in images.values():
                (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4)).save(tmp_path / place)
        return {"root": str(tmp_path)}

    return write


def test_cirr_seen_takes_whole_image_sets(cirr_root):
    """Val has 8 queries and 13 images. Two of 5 sets fit (12 images, 8 queries); the 13th image is of another set."""
    config = cirr_root()
    benchmark = cirr.read_benchmark(config, "seen")
    (group,) = benchmark.groups
    assert (len(group.queries), len(group.gallery)) == (8, 13)
    assert not any("val" in name or "unused" in name for name in group.gallery)
    assert sorted(Counter(name.split("-")[1] for name in group.gallery).values()) == [1, 6, 6]
    assert all(len(query.members) == 5 and set(query.members) <= set(group.gallery) for query in group.queries)
    assert set(benchmark.image_paths) == set(group.gallery)
    assert benchmark.selection_metric == "mean"
    assert benchmark.protocol == (
        "CIRR seen, gallery of 13 training images drawn up to the size of val's, reference removed, 8 of 20 training "
        "queries, hard targets, R_subset among the 5 other members of the image set, ties by gallery order"
    )


def test_cirr_seen_without_image_sets_has_no_subset_metric(cirr_root):
    """Ranks 0 and 7 give R@1 50, R@5 50, R@10 100 and R@50 100."""
    benchmark = cirr.read_benchmark(cirr_root(has_sets=False), "seen")
    ranking = Ranking(torch.tensor([0, 7]), torch.empty(2, 0, dtype=torch.long), torch.tensor([-1, -1]))
    assert benchmark.metrics({"cirr": ranking}) == {"R@1": 50.0, "R@5": 50.0, "R@10": 100.0, "R@50": 100.0}
    assert benchmark.selection_metric == "R@5"
    assert "no image sets, so no R_subset" in benchmark.protocol
    assert all(query.members == () for query in benchmark.groups[0].queries)


def test_cirr_training_and_val_are_as_before(cirr_root):
    config = cirr_root()
    assert len(cirr.read_train(config)[0]) == 20
    assert len(cirr.read_benchmark(config, "val").groups[0].gallery) == 13
