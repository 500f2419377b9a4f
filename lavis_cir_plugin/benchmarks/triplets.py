"""Read your own triplets: a folder with JSON lines and images becomes a benchmark without code.

::

    my_catalogue/
      train.jsonl  val.jsonl  test.jsonl     the files that a run needs
      images/                                 JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, to any depth
      gallery.txt                             optional

Each line of a ``.jsonl`` file is one JSON object, in UTF-8; blank lines are skipped::

    {"reference": "shoes/a.jpg", "text": "the same in red", "target": "shoes/b.jpg"}
    {"reference": "shoes/a.jpg", "text": ["with laces", "laced"], "target": ["c.png", "shoes/d.jpg"], "id": "q7"}

=====================  ========  ===================================================================================
key                    needed    value
=====================  ========  ===================================================================================
``reference``          yes       An image: its path below ``images/``, with ``/`` and the file's suffix, in the file's
                                 spelling (`Spelling` describes allowed differences).
``text``               yes       The modification, or a list of wordings: training draws one of them each time,
                                 evaluation averages the features of all.
``target``             train,    An image other than the reference, or a list of equally right ones; training makes a
                       val       triplet of each. In ``test.jsonl`` either every line has a target or none has.
``id``                 no        Text or an integer, distinct within the file; the default is the line's number. A
                                 ranking of a test split without targets is listed by this id.
``members``            no        Images that R_subset@K ranks by themselves, with the only target among them (CIRR's
                                 image sets); on every line of a file or on none. The reference does not compete.
``reference_caption``  no        A description of the reference, for losses that need it. Only training reads it; on
                                 every line of ``train.jsonl`` or on none.
=====================  ========  ===================================================================================

Other keys are ignored. The gallery of ``val`` and ``test`` is ``gallery.txt``, with one image per line, in its order.
Without that file it is every image below ``images/`` in sorted order, except what `scan_tree` leaves out. It is never
just the images of the queries, which would make the task easier than the catalogue is. References need not be in the
gallery, but targets and members must.

The metrics are in percent. R@1, 5, 10 and 50 are the shares of queries with a target (or any of several) among the
first K. If a query of the split has several targets, mAP@5, 10, 25 and 50 over min(K, targets) are added, as in CIRCO.
``members`` add R_subset@1, 2 and 3.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from lavis_cir_plugin.benchmarks.images import Spelling, image_folders, scan_tree, select_images
from lavis_cir_plugin.benchmarks.json_lines import (
    Refusal,
    image_path,
    line_error,
    one_or_more_texts,
    one_text,
    parse_line,
    read_lines,
    read_objects,
)
from lavis_cir_plugin.benchmarks.seen_split import drawn_like
from lavis_cir_plugin.benchmarks.submissions import by_query
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, scan_once
from lavis_cir_plugin.benchmarks.types import (
    EVALUATION_SPLITS,
    Benchmark,
    Group,
    Query,
    Triplet,
    check_split,
    complete_triplets,
    coverage,
    first_or_drawn,
    no_metrics,
    no_submissions,
    without_missing,
)
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import Folder, NotNegative, Positive, Section, is_text, one_of
from lavis_cir_plugin.ranking.metrics import HasRanks, as_lists, average_precision_at, recall_at

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking.ranks import Ranking

SPLITS = ("train", *EVALUATION_SPLITS)
UPRIGHT = True
"""Whether images are turned as their EXIF orientation says: people's own photographs need it."""

CUTOFFS = (1, 5, 10, 50)
PRECISION_CUTOFFS = (5, 10, 25, 50)
SUBSET_CUTOFFS = (1, 2, 3)
TOP = 50
"""Number of images per query in the ranking of a test split without targets."""

_GALLERY_FILE = "gallery.txt"
_REMEDY = "set datasets.triplets.build_info.root to the folder with train.jsonl, val.jsonl and test.jsonl"
_METRICS = (
    *(f"R@{k}" for k in CUTOFFS),
    *(f"mAP@{k}" for k in PRECISION_CUTOFFS),
    *(f"R_subset@{k}" for k in SUBSET_CUTOFFS),
)
_SELECTION_METRICS = ("R@10", *(name for name in _METRICS if name != "R@10"))


@dataclass(frozen=True)
class TripletsConfig(Section):
    """Keys of ``datasets.triplets.build_info``.

    Attributes:
        root: Folder with the ``.jsonl`` files.
        images: Folder of the image files if it is not ``images/`` below ``root``.
        reference: ``removed`` from its own ranking, or ``kept`` in the gallery.
        selection_metric: Metric of the split that chooses the best checkpoint.
        max_triplets: Largest number of training triplets: the first ones, or a random sample if ``seed`` is set.
        seed: Seed of the sample. For one seed, a smaller sample is a part of a larger one.
        missing_images: ``error``, or ``skip`` to leave out what needs a missing image and report how much that is.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.triplets.build_info"

    root: Folder
    images: Optional[Folder] = None
    reference: Literal["removed", "kept"] = "removed"
    selection_metric: Annotated[str, one_of(_SELECTION_METRICS)] = "R@10"
    max_triplets: Optional[Positive] = None
    seed: Optional[NotNegative] = None
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


@dataclass(frozen=True)
class _Record:
    line: int
    reference: str
    texts: tuple[str, ...]
    targets: tuple[str, ...]
    members: tuple[str, ...]
    identifier: str
    reference_caption: str

    @property
    def images(self) -> tuple[str, ...]:
        return (self.reference, *self.targets, *self.members)


CONFIG = TripletsConfig
"""Section ``build_info`` of the config."""


def image_folder(config: Mapping[str, Any]) -> Path:
    """Return the folder of the catalogue's images; it need not exist."""
    return _image_folder(TripletsConfig.from_mapping(config))


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets, one per target, in file order, and the paths of their images.

    What any line names for a triplet's reference and texts is also right for it (``also_right``).

    Raises:
        ValueError: If a key or value of the config, or a line of the file, is wrong.
        FileNotFoundError: If the file or an image is missing.
    """
    settings = TripletsConfig.from_mapping(config)
    records = _read_records(settings, "train")
    scanned = _scan(settings)
    records = _spelt_as_files(settings, "train", records, Spelling(scanned, "triplets"))
    answers: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for record in records:
        answers.setdefault((record.reference, record.texts), {}).update(dict.fromkeys(record.targets))
    triplets = [
        Triplet(
            record.reference,
            target,
            record.texts,
            reference_caption=record.reference_caption,
            also_right=tuple(name for name in answers[record.reference, record.texts] if name != target),
        )
        for record in records
        for target in record.targets
    ]
    used = [name for triplet in triplets for name in (triplet.reference, triplet.target)]
    paths, _ = _select(settings, used, scanned)
    return complete_triplets(triplets, paths, "triplets"), paths


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Return the ``val``, ``test`` or ``seen`` split.

    ``seen`` is sampled from the training queries and their images to val's sizes (`drawn_like`), with val's rules. A
    test split without targets has no metrics; its submission is the best 50 images by the query's id. With
    ``missing_images: skip`` the gallery shrinks, and queries that need a missing image are left out. The protocol line
    counts them.

    Raises:
        ValueError: If a key or value of the config, or a line of a file, is wrong, or if there is no such split.
        FileNotFoundError: If a file or an image is missing.
    """
    check_split(split, "triplets")
    settings = TripletsConfig.from_mapping(config)
    if split == "seen":
        settings = replace(settings, verify_images=False)  # reading the training split verifies its images
    records, scanned = _read_records(settings, split), _scan(settings)
    records = _spelt_as_files(settings, split, records, Spelling(scanned, "triplets"))
    gallery = _gallery(settings, split, records, scanned)
    complete = available = Group("triplets", gallery, _queries(records), settings.reference == "removed")
    references = [record.reference for record in records]
    paths, missing = _select(settings, [*gallery, *references], scanned)
    if missing:
        available = without_missing(complete, paths)
    group = available
    if split == "seen":
        (val,) = read_benchmark({**config, "verify_images": False}, "val").groups
        group = drawn_like(available, val)
        paths = {name: paths[name] for name in group.gallery}
    has_targets = all(query.target is not None for query in group.queries)
    has_several, has_members = bool(group.queries[0].relevance), bool(group.queries[0].members)
    return Benchmark(
        name="triplets",
        split=split,
        groups=(group,),
        image_paths=paths,
        protocol=_protocol(settings, split, group, available) + coverage([complete], [available]),
        metrics=partial(_metrics, has_several=has_several, has_members=has_members) if has_targets else no_metrics,
        selection_metric=_selection_metric(settings, split, has_several, has_members),
        submissions=no_submissions if has_targets else partial(_submissions, group=group),
        upright=UPRIGHT,
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return a random wording of a triplet."""
    return rng.choice(captions)


def _queries(records: Sequence[_Record]) -> tuple[Query, ...]:
    has_several = any(len(record.targets) > 1 for record in records)
    return tuple(
        Query(
            reference=record.reference,
            texts=record.texts,
            target=record.targets[0] if record.targets else None,
            members=record.members,
            relevance=tuple((name, 1.0) for name in record.targets) if has_several else (),
            identifier=record.identifier,
        )
        for record in records
    )


def _gallery(
    settings: TripletsConfig, split: str, records: Sequence[_Record], scanned: Mapping[str, Path]
) -> tuple[str, ...]:
    """Return the gallery with missing images; raise ValueError if the gallery file lacks a target or member."""
    if split == "seen":
        return tuple(sorted({name for record in records for name in record.images}))
    path = _gallery_file(settings)
    if not path.is_file():
        return tuple(sorted({*scanned, *(name for record in records for name in record.images)}))
    gallery = _read_gallery(path, Spelling(scanned, "triplets"))
    for record in records:
        outside = [name for name in (*record.targets, *record.members) if name not in gallery]
        if outside:
            problem = f"has the target or member {shown(outside[0])}, which {path} does not list"
            raise line_error(_file(settings, split), record.line, problem)
    return tuple(gallery)


def _protocol(settings: TripletsConfig, split: str, group: Group, available: Group) -> str:
    source = _GALLERY_FILE if _gallery_file(settings).is_file() else "all images of the folder"
    gallery, counted = f"{len(group.gallery):,} images ({source})", f"{len(group.queries):,} queries"
    if split == "seen":
        gallery = f"{len(group.gallery):,} training images drawn up to the size of val's"
        counted = f"{len(group.queries):,} of {len(available.queries):,} training queries"
    name = Path(settings.root).resolve().name
    parts = [f"Triplets {split} of {name}, gallery of {gallery}", f"reference {settings.reference}", counted]
    if any(len(query.texts) > 1 for query in group.queries):
        parts.append("features of a query's texts averaged")
    if group.queries[0].relevance:
        parts.append("R@K of any target, mAP@K over min(K, targets)")
    if group.queries[0].members:
        parts.append("R_subset among the members without the reference")
    return ", ".join([*parts, "ties by gallery order"])


def _metrics(rankings: Mapping[str, HasRanks], has_several: bool, has_members: bool) -> dict[str, float]:
    """Return R@K, mAP@K if a query has several targets, and R_subset@K if the queries have members."""
    ranking = rankings["triplets"]
    ranks, labelled = ranking.ranks, ranking.relevant_ranks
    if has_several:
        ranks = [min((rank for rank in row if rank >= 0), default=-1) for row in as_lists(labelled)]
    metrics = {f"R@{k}": recall_at(ranks, k) for k in CUTOFFS}
    if has_several:
        metrics.update({f"mAP@{k}": average_precision_at(labelled, k) for k in PRECISION_CUTOFFS})
    if has_members:
        metrics.update({f"R_subset@{k}": recall_at(ranking.subset_ranks, k) for k in SUBSET_CUTOFFS})
    return metrics


def _selection_metric(settings: TripletsConfig, split: str, has_several: bool, has_members: bool) -> str:
    """Return the config's metric, or R@10 if the data do not suffice for it; raise ValueError if val's do not."""
    selected = settings.selection_metric
    needs = {"mAP": ("queries with several targets", has_several), "R_subset": ("members", has_members)}
    needed, is_there = needs.get(selected.split("@")[0], ("", True))
    if is_there:
        return selected
    if split != "val":
        return "R@10"
    raise ValueError(
        f"datasets.triplets.build_info.selection_metric: {selected} needs {needed}, and {_file(settings, split)} has "
        f"none; choose one of {', '.join(f'R@{k}' for k in CUTOFFS)}."
    )


def _submissions(rankings: Mapping[str, Ranking], group: Group) -> dict[str, Any]:
    return {"triplets_test.json": by_query(group, rankings["triplets"].top[:, :TOP], group.gallery)}


# -- files -----------------------------------------------------------------------------------------------------------


def _file(settings: TripletsConfig, split: str) -> Path:
    return Path(settings.root) / f"{'train' if split == 'seen' else split}.jsonl"


def _gallery_file(settings: TripletsConfig) -> Path:
    return Path(settings.root) / _GALLERY_FILE


def _image_folder(settings: TripletsConfig) -> Path:
    return Path(settings.images) if settings.images else Path(settings.root) / "images"


def _scan(settings: TripletsConfig) -> dict[str, Path]:
    scanned: dict[str, Path] = {}
    for folder in image_folders([_image_folder(settings)], "triplets"):
        scanned = scan_once(scan_tree, folder)
    unwritable = [path for name, path in scanned.items() if not is_text(name)]
    if unwritable:
        raise ValueError(
            f"triplets: the name of {shown(str(unwritable[0]))} is not UTF-8; rename the file or its folder."
        )
    return scanned


def _select(
    settings: TripletsConfig, names: Iterable[str], scanned: Mapping[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    folder = _image_folder(settings)
    remedy = "add them (an image is named by its path below that folder with its suffix, such as shoes/a.jpg)"
    return select_images(
        names,
        scanned,
        str(folder),
        remedy,
        "triplets",
        settings.missing_images,
        settings.verify_images,
        Spelling(scanned, "triplets").near,
    )


def _read_gallery(path: Path, spelling: Spelling) -> dict[str, int]:
    """Return the line number of every image in the gallery file."""
    lines: dict[str, int] = {}
    for line, text in read_lines(path, "put one image per line into it, or take it away"):
        name = spelling.file_name(image_path(text, "image name", partial(line_error, path, line)))
        if lines.setdefault(name, line) != line:
            raise line_error(path, line, f"lists {shown(name)} like line {lines[name]}")
    return lines


def _read_records(settings: TripletsConfig, split: str) -> list[_Record]:
    path = _file(settings, split)
    records = [_record(line, path, number, split) for number, line in read_objects(path, _REMEDY)]
    first: dict[str, int] = {}
    for record in records:
        if first.setdefault(record.identifier, record.line) != record.line:
            raise line_error(
                path, record.line, f"has id = {shown(record.identifier)} like line {first[record.identifier]}"
            )
    for key in ("targets", "members", "reference_caption"):
        without = [record.line for record in records if not getattr(record, key)]
        if 0 < len(without) < len(records):
            name = key.replace("targets", "target")
            raise line_error(path, without[0], f"has no '{name}' and others have; give it on every line or on none")
    return _limited(records, settings) if split in ("train", "seen") else records


def _spelt_as_files(
    settings: TripletsConfig, split: str, records: Sequence[_Record], spelling: Spelling
) -> list[_Record]:
    """Name every image by its file; raise ValueError if a reference is then its own target."""
    path = _file(settings, split)
    found = [_respelt(record, spelling, partial(line_error, path, record.line)) for record in records]
    spelling.log()
    return found


def _respelt(record: _Record, spelling: Spelling, refuse: Refusal) -> _Record:
    reference = spelling.file_name(record.reference)
    targets, members = (
        tuple(dict.fromkeys(map(spelling.file_name, names))) for names in (record.targets, record.members)
    )
    if reference in targets:
        raise refuse(f"has the reference {shown(reference)} as a target in another spelling, which says nothing")
    members = tuple(name for name in members if name != reference)
    return replace(record, reference=reference, targets=targets, members=members)


def _limited(records: Sequence[_Record], settings: TripletsConfig) -> list[_Record]:
    """Keep as many triplets as the config says, and remove from each line the targets that are not kept."""
    triplets = [(index, target) for index, record in enumerate(records) for target in record.targets]
    targets: dict[int, list[str]] = {}
    for index, target in first_or_drawn(triplets, settings.max_triplets, settings.seed):
        targets.setdefault(index, []).append(target)
    return [replace(records[index], targets=tuple(kept)) for index, kept in targets.items()]


def _record(text: str, path: Path, line: int, split: str) -> _Record:
    refuse = partial(line_error, path, line)
    item = parse_line(text, refuse, '{"reference": ...}')
    for key in ("reference", "text") if split == "test" else ("reference", "text", "target"):
        if item.get(key) is None:
            raise refuse(f"has no '{key}'")
    reference = image_path(item["reference"], "reference", refuse)
    targets = _images(item.get("target"), "target", refuse)
    members = tuple(name for name in _images(item.get("members"), "members", refuse) if name != reference)
    if reference in targets:
        raise refuse(f"has the reference {shown(reference)} as a target, which says nothing")
    if members and (len(targets) > 1 or not set(targets) <= set(members)):
        raise refuse("has 'members', which must include its target, and only one target")
    caption = item.get("reference_caption") if split == "train" else None
    return _Record(
        line=line,
        reference=reference,
        texts=one_or_more_texts(item["text"], "text", refuse),
        targets=targets,
        members=members,
        identifier=_identifier(item.get("id"), line, refuse),
        reference_caption="" if caption is None else one_text(caption, "reference_caption", refuse),
    )


def _identifier(value: Any, line: int, refuse: Refusal) -> str:
    if value is None:
        return str(line)
    if type(value) is int or (is_text(value) and value):
        return str(value)
    raise refuse(f"has id = {shown(value)}; it must be text or a whole number")


def _images(value: Any, key: str, refuse: Refusal) -> tuple[str, ...]:
    """Return the images of an optional field that holds one image or a list of distinct images."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    names = tuple(image_path(name, key, refuse) for name in values)
    if not names or len(set(names)) < len(names):
        raise refuse(f"has {key} = {shown(value)}; it must be an image, or a list of distinct ones")
    return names


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="Triplets of your own",
    usages=(Usage("training", "train"), Usage("val", "val"), Usage("test", "test")),
    published={},
    absent_files=(
        "give the folder itself that has train.jsonl, val.jsonl or test.jsonl; only those that a run reads are needed"
    ),
    absent_images="an image is named by its path below images/ with its suffix, such as shoes/a.jpg",
    training=("projects/wrf4cir/triplets.yaml",),
    is_evaluated=True,
)
