"""What every benchmark is made of, and how its annotation files and its configuration are read."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lavis_cir_plugin.benchmarks.survey import current_survey

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking import Ranking

Config = TypeVar("Config")
T = TypeVar("T")

EVALUATION_SPLITS = ("val", "test", "seen")
"""Evaluation splits; ``seen`` is drawn from the training data, to be compared with ``val``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Triplet:
    """One training example.

    Attributes:
        reference: Name (file stem) of the reference image.
        target: Name of the target image.
        captions: What ``training_text`` makes the modification text of.
        category: FashionIQ's; empty elsewhere.
        reference_caption: What the reference shows, for losses that need it; empty where the data do not say, which
            they do for all triplets of a data set or for none.
        also_right: What the annotation lists besides the target as a right answer (CIRR's soft labels above 0).
        members: Of the image set that the triplet was written for, without the reference (CIRR).
    """

    reference: str
    target: str
    captions: tuple[str, ...]
    category: str = ""
    reference_caption: str = ""
    also_right: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """One evaluation query.

    Attributes:
        reference: Name of the reference image.
        texts: Modification texts; the query features of several are averaged and normalised again.
        target: ``None`` where the split's targets are not public.
        members: The image set that a subset metric ranks, without the reference (CIRR).
        relevance: Every labelled image and its weight, where a metric needs more than the target: CIRCO's ground truths
            (each 1.0), CIRR's soft labels.
        identifier: The annotation's own id, which a submission names the query by.
    """

    reference: str
    texts: tuple[str, ...]
    target: str | None
    members: tuple[str, ...] = ()
    relevance: tuple[tuple[str, float], ...] = ()
    identifier: str = ""


@dataclass(frozen=True)
class Group:
    """Queries that are ranked against one gallery.

    Attributes:
        name: Of the group (FashionIQ: the category).
        gallery: Distinct image names in protocol order; equal scores are ordered by it.
        queries: In the order of the annotation file.
        reference_removed: The reference is taken out of its own ranking.
    """

    name: str
    gallery: tuple[str, ...]
    queries: tuple[Query, ...]
    reference_removed: bool


def no_submissions(rankings: Mapping[str, Ranking]) -> dict[str, Any]:
    """Return no file: the benchmark has no test server."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """A split with its protocol.

    Attributes:
        name: Of the benchmark, as registered.
        split: One of `EVALUATION_SPLITS`.
        groups: At least one.
        image_paths: File of every gallery and reference image.
        protocol: One line that says what makes the numbers comparable; print it beside them.
        metrics: Ranking per group name to metrics in percent; empty where the targets are not public.
        selection_metric: The metric that chooses the best checkpoint.
        submissions: Ranking per group name to the test server's files, the content (for JSON) by file name.
        upright: Whether its images are turned as their EXIF orientation says.
    """

    name: str
    split: str
    groups: tuple[Group, ...]
    image_paths: Mapping[str, Path]
    protocol: str
    metrics: Callable[[Mapping[str, Ranking]], dict[str, float]]
    selection_metric: str
    submissions: Callable[[Mapping[str, Ranking]], dict[str, Any]] = no_submissions
    upright: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether the answers are public, all of them, so that it can be scored."""
        return all(query.target is not None for group in self.groups for query in group.queries)


def no_metrics(rankings: Mapping[str, Ranking]) -> dict[str, float]:
    """Return no metric: the targets of the split are not public."""
    return {}


def split_names(splits: Sequence[str] = EVALUATION_SPLITS) -> str:
    """Return the names of the evaluation splits for a sentence."""
    return " and ".join(filter(None, (", ".join(splits[:-1]), splits[-1])))


def check_split(split: str, dataset: str, splits: Sequence[str] = EVALUATION_SPLITS) -> None:
    """Raise ValueError unless ``split`` is one that the benchmark is evaluated on."""
    if split not in splits:
        raise ValueError(
            f"{dataset} has the evaluation splits {split_names(splits)}, got '{split}'; "
            f"change datasets.{dataset}.splits."
        )


def complete_triplets(triplets: list[Triplet], image_paths: Mapping[str, Path], dataset: str) -> list[Triplet]:
    """Leave out the triplets that need a missing image, and log how many.

    Raises:
        ValueError: no triplet is left.
    """
    return only_complete(triplets, lambda t: t.reference in image_paths and t.target in image_paths, dataset, "triplet")


def only_complete(examples: Sequence[T], has_images: Callable[[T], bool], dataset: str, what: str) -> list[T]:
    """Leave out the training examples that need a missing image, and log how many; ``what`` is one called.

    Raises:
        ValueError: none is left.
    """
    found = [example for example in examples if has_images(example)]
    if not found:
        raise ValueError(
            f"{dataset} train: every {what} needs an image that is missing; check datasets.{dataset}.build_info."
        )
    if len(found) < len(examples):
        left_out = len(examples) - len(found)
        logger.warning("%s train: %d of %d %ss left out, images missing.", dataset, left_out, len(examples), what)
    return found


def some(items: Sequence[T], count: int | None, seed: int | None) -> list[T]:
    """Return the first ``count`` items, or with a seed drawn ones; all where there are no more, or ``count`` is null.

    The items keep their order. Of one seed, those of a smaller count are among those of a larger one, so that the sets
    of a data-amount curve are nested.
    """
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return [items[index] for index in sorted(order[:count])]


def without_missing(group: Group, image_paths: Mapping[str, Path]) -> Group:
    """Leave missing images out of the gallery, and out of the queries those that need one of them.

    Raises:
        ValueError: no query is left.
    """
    gallery = tuple(name for name in group.gallery if name in image_paths)
    queries = tuple(query for query in group.queries if all(name in image_paths for name in _images(query)))
    if not queries:
        raise ValueError(f"{group.name}: every query needs an image that is missing; check build_info.images.")
    return replace(group, gallery=gallery, queries=queries)


def coverage(complete: Sequence[Group], groups: Sequence[Group]) -> str:
    """Say what missing images took out of a benchmark, to be appended to its protocol line; empty for nothing."""
    images, all_images = (sum(len(group.gallery) for group in some) for some in (groups, complete))
    queries, all_queries = (sum(len(group.queries) for group in some) for some in (groups, complete))
    if (images, queries) == (all_images, all_queries):
        return ""
    return (
        f"; incomplete: {all_images - images:,} of {all_images:,} gallery images missing, "
        f"{all_queries - queries:,} of {all_queries:,} queries left out"
    )


def listed(names: Sequence[Any], limit: int = 5) -> str:
    """Write the first few names for an error sentence: ``first: a, b, c``."""
    return "first: " + ", ".join(str(name) for name in names[:limit])


# -- the split `seen` ------------------------------------------------------------------------------------------------


def drawn_like(training: Group, val: Group, seed: int = 0) -> Group:
    """Draw training queries into a group of val's size: recall on it less recall on val is the generalisation gap.

    Recall depends on the number of gallery images and on how many of them resemble the target, so the gallery gets
    val's size and is filled by whole clusters, that is, with all training images that are connected through queries
    (FashionIQ's variants of one product, CIRR's image sets), in random order. The queries are drawn from those whose
    images all lie in that gallery.

    Args:
        training: All training queries, and the images to draw from.
        val: What to resemble in its two sizes; where the training data are too few, the result is smaller.
        seed: Of the draw, which also depends on the group's name and on nothing else.

    Returns:
        A group with training's name and rule. Every reference, target, member and labelled image is in its gallery;
        queries and gallery keep training's order.
    """
    rng = random.Random(f"{seed} {training.name}")
    clusters = _clusters(training.queries)
    rng.shuffle(clusters)
    room = len(val.gallery)
    chosen: set[str] = set()
    for query in (query for cluster in clusters for query in cluster):
        images = _images(query)
        if len(chosen.union(images)) <= room:
            chosen.update(images)
    others = [name for name in training.gallery if name not in chosen]
    chosen.update(rng.sample(others, min(room - len(chosen), len(others))))
    queries = [query for query in training.queries if chosen.issuperset(_images(query))]
    drawn = sorted(rng.sample(range(len(queries)), min(len(val.queries), len(queries))))
    gallery = tuple(name for name in training.gallery if name in chosen)
    return replace(training, gallery=gallery, queries=tuple(queries[index] for index in drawn))


def _images(query: Query) -> list[str]:
    names = (query.reference, query.target, *query.members, *(name for name, _ in query.relevance))
    return [name for name in names if name is not None]


def _clusters(queries: Iterable[Query]) -> list[list[Query]]:
    """Sort queries so that no image occurs in two clusters and no cluster can be parted; in order of first queries."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for query in queries:
        for name in _images(query):
            leader[find(name)] = find(query.reference)
    clusters: dict[str, list[Query]] = {}
    for query in queries:
        clusters.setdefault(find(query.reference), []).append(query)
    return list(clusters.values())


# -- annotation files ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read (a folder, no permission), is not UTF-8 or not JSON (with line and column), or an
            object has a key twice.
    """
    refuse_special(path)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a JSON file that can.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"correct the file or copy it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; a key twice
        raise ValueError(f"{path} cannot be read as JSON: {error}; correct the file or copy it again.") from error


def refuse_special(path: Path) -> None:
    """Refuse what waits for a writer when it is opened, or never ends: a named pipe, a socket, a device.

    Raises:
        ValueError: it is such a thing. A missing file, a folder and a regular file pass.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is no regular file but a named pipe, socket or device; put a file in its place.")


def parse_json(text: str) -> Any:
    """Parse JSON in which no object has a key twice: of the two values, parsers keep one and say nothing.

    Raises:
        ValueError: it is not JSON, or an object has a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shown(key)} twice")
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read an annotation file that is a list of objects.

    Raises:
        FileNotFoundError, ValueError: as `read_json`, or the content is not a non-empty list of objects.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a non-empty list of objects, got {shown(records)}.")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise record_error(path, number, f"must be an object, got {shown(record)}")
    return records


def text_field(record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False) -> str | None:
    """Return a text of a record; ``None`` only where it is optional and absent.

    Raises:
        ValueError: the field is missing or not text.
    """
    value = record.get(key)
    if is_text(value) or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be text")


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be written: JSON also spells halves of surrogate pairs, which cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def whole_number_field(
    record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False
) -> int | None:
    """Return a whole number of a record; ``None`` only where it is optional and absent.

    Raises:
        ValueError: the field is missing or not a whole number.
    """
    value = record.get(key)
    if type(value) is int or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be a whole number")


def _has(record: Mapping[str, Any], key: str) -> str:
    return f"has {key} = {shown(record[key])}" if key in record else f"has no '{key}'"


def require_distinct(records: Sequence[Mapping[str, Any]], key: str, path: Path) -> None:
    """Check that no two records have the same value in a field; those without it do not count.

    Raises:
        ValueError: with the first two that do.
    """
    first: dict[Any, int] = {}
    for number, record in enumerate(records):
        value = record.get(key)
        if value is not None and first.setdefault(value, number) != number:
            raise record_error(path, number, f"has {key} = {shown(value)} like record {first[value]}")


def image_name(value: Any, key: str, path: Path, number: int) -> str:
    """Return the image name in a field of a record: a file stem, which can lead to no other folder.

    Args:
        value: What the file holds.
        key: Of the field, for the message.
        path: Of the annotation file.
        number: Of the record, counting from 0.

    Raises:
        ValueError: it is not text, empty, ``.`` or ``..``, or holds a slash, a backslash or something unprintable
            (NUL, line breaks, halves of surrogate pairs).
    """
    if not isinstance(value, str) or value in ("", ".", "..") or set(value) & {"/", "\\"} or not value.isprintable():
        raise record_error(
            path, number, f"has {key} = {shown(value)}; it must be an image name, that is text without / and \\"
        )
    return value


def record_error(path: Path, number: int, problem: str) -> ValueError:
    """Build the error of one record; `number` counts from 0."""
    return ValueError(f"{path}: record {number} (counting from 0) {problem}; correct the file or copy it again.")


def require_listed(
    uses: Iterable[tuple[int, str, Any]], split: Mapping[Any, Any], path: Path, split_path: Path
) -> None:
    """Check that every image that an annotation file uses is in its split file.

    Args:
        uses: Number of the record, field and image; images that are None do not count.
        split: What the split file lists.
        path: Of the annotation file.
        split_path: Of the split file.

    Raises:
        ValueError: with the number of unlisted images and the first one's place.
    """
    unlisted = [use for use in uses if use[2] is not None and use[2] not in split]
    if unlisted:
        number, key, image = unlisted[0]
        raise ValueError(
            f"{path} uses {len({use[2] for use in unlisted}):,} images that {split_path} does not list (first: record "
            f"{number}, counting from 0, has {key} = {shown(image)}); the two files must belong together."
        )


def find_annotation(bases: Sequence[Path], folders: Sequence[str], name: str, dataset: str) -> Path:
    """Find an annotation file in the first of ``base/folder`` that has it.

    Raises:
        FileNotFoundError: naming the places that were looked at and the key to set.
    """
    places = [base / folder for base in bases for folder in folders]
    survey = current_survey()
    for place in places:
        if (place / name).is_file():
            if survey is not None:
                survey.files.append(place / name)
            return place / name
    if survey is not None:
        survey.absent.append(name)
    raise FileNotFoundError(
        f"{dataset}: annotation file {name} is in none of {', '.join(map(str, places))}; "
        f"set datasets.{dataset}.build_info.root to the data set's folder, or build_info.annotations to that of its "
        f"JSON files."
    )


# -- configuration ---------------------------------------------------------------------------------------------------


def one_of(default: str, *others: str) -> Any:
    """Declare a configuration field that takes one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


def some_of(*default: str, others: Sequence[str] = ()) -> Any:
    """Declare a configuration field that takes a non-empty list of distinct words, of the default ones and others."""
    return field(default=default, metadata={"choices": (*default, *others)})


def at_least(least: int) -> Any:
    """Declare a configuration field that takes a whole number from ``least`` on, or null, the default."""
    return field(default=None, metadata={"least": least})


def config_from_mapping(cls: type[Config], dataset: str, mapping: Mapping[str, Any]) -> Config:
    """Build the frozen configuration of a data set from its ``build_info``; ``~`` in a path becomes the home folder.

    Args:
        cls: Dataclass whose fields are ``str``, ``str | None``, ``bool``, ``str | tuple[str, ...] | None``, or declared
            by `one_of`, `some_of` or `at_least`.
        dataset: Its registered name, for the messages.
        mapping: The ``build_info``.

    Raises:
        ValueError: one message with every unknown key, missing key and impossible value.
    """
    where = f"datasets.{dataset}.build_info"
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    values, errors = {}, []
    for key, value in mapping.items():
        if key not in known:
            errors.append(f"{where}.{key} is not a known key{did_you_mean(key, known)} Known: {', '.join(known)}.")
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
        problem = _problem(known[key].type, known[key].metadata, value)
        if problem:
            errors.append(f"{where}.{key} must be {problem}")
        is_path = isinstance(value, str) and "choices" not in known[key].metadata
        values[key] = os.path.expanduser(value) if is_path else value
    errors += [
        f"{where}.{name} is required; set it to the data set's folder."
        for name, item in known.items()
        if item.default is MISSING and name not in mapping
    ]
    if errors:
        raise ValueError("\n".join(errors))
    return cls(**values)


def _problem(kind: Any, metadata: Mapping[str, Any], value: Any) -> str:
    """Say what a value must be, with what it is; empty where it is right. `kind` is the annotation's source text."""
    choices = metadata.get("choices", ())
    if kind == "bool":
        return "" if isinstance(value, bool) else f"true or false, got {shown(value)}."
    if "least" in metadata:
        is_right = value is None or (type(value) is int and value >= metadata["least"])
        return "" if is_right else f"a whole number >= {metadata['least']} or null, got {shown(value)}."
    if kind == "str | tuple[str, ...] | None":
        paths = (value,) if isinstance(value, str) else value
        is_right = paths is None or (
            isinstance(paths, tuple) and paths and all(is_text(path) and path for path in paths)
        )
        return "" if is_right else f"a path or a list of paths, got {shown(value)}."
    if kind.startswith("tuple"):
        is_right = isinstance(value, tuple) and value and len(set(map(str, value))) == len(value)
        if is_right and all(item in choices for item in value):
            return ""
        return f"a non-empty list of distinct names from {', '.join(choices)}, got {shown(value)}."
    if choices:
        allowed = f"one of {', '.join(choices)}, got {shown(value)}"
        return "" if value in choices else allowed + did_you_mean(value, choices)
    if value is None and kind.endswith("None"):
        return ""
    return "" if isinstance(value, str) and value else f"the path of a folder, got {shown(value)}."


def setting_problems(key: str, settings: type, given: Any, example: str = "") -> Iterator[str]:
    """Yield what is wrong with a config section that holds the fields of a dataclass, which refuses impossible values.

    Args:
        key: Of the section, for the messages.
        settings: The dataclass.
        given: The section.
        example: For the message where it is no mapping.
    """
    if not isinstance(given, Mapping):
        yield f"{key} must be a mapping{example}, got {given!r}."
        return
    known = [field.name for field in fields(settings)]
    unknown = [name for name in given if name not in known]
    yield from (unknown_key(key, name, known) for name in unknown)
    try:
        settings(**{name: value for name, value in given.items() if name in known})
    except ValueError as error:
        yield str(error)


def is_number(value: Any) -> bool:
    """Return whether a value of a config is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def unknown_key(where: str, name: str, known: Sequence[str]) -> str:
    """Return the sentence for a key that is not known: the nearest known one, or all."""
    hint = did_you_mean(name, known)
    return f"{where}.{name} is not a known key{hint}" + (f" Known: {', '.join(known)}." if hint == "." else "")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known word, or a full stop."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def shown(value: Any) -> str:
    """Write a value for an error sentence: as JSON, shortened, escaping what is not printable."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= 80 else text[:77] + "..."
