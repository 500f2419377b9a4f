"""Write and check submission files: each query has a fixed number of distinct, known images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_cir_plugin.benchmarks.types import Group
from lavis_cir_plugin.core.error_messages import listed, shown

if TYPE_CHECKING:
    from torch import Tensor

Row = list[Hashable]
"""Images of one query, best first, in the type that the annotation uses for them."""

_NOT_LISTED = 2**40  # rank beyond every cutoff


@dataclass(frozen=True)
class ListedRanks:
    """Ranks from a file, with which metrics are computed as with a `Ranking`.

    Attributes:
        ranks: ``(Q,)`` 0-based rank of the target, or -1 if it is not listed.
        subset_ranks: ``(Q,)`` 0-based rank of the target in files that rank a subset, or -1.
        relevant_ranks: ``(Q, T)`` 0-based rank of every labelled image, or a rank beyond every cutoff if it is not
            listed.
    """

    ranks: list[int]
    subset_ranks: list[int]
    relevant_ranks: list[list[int]]


@dataclass
class Review:
    """Findings of the check of a submission file.

    Attributes:
        title: Description of the file from the annotation and from the file itself.
        rows: Images of each query in the annotation's order, for queries with a list of images.
        problems: Offending queries by problem. The test server refuses the file for each of them.
        notes: Useful remarks that are not problems.
        checked: What was checked, with any result.
        unchecked: What could not be checked, and why.
        metrics: Metrics in percent; empty if the annotation has no targets or the file has a problem.
    """

    title: str
    rows: dict[str, Row] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def refuse(self, kind: str, offender: str) -> None:
        """Add a problem and an offending query."""
        self.problems.setdefault(kind, []).append(offender)

    def read_rows(
        self, content: Mapping[str, Any], identifiers: Collection[str], as_image: Callable[[Any], Hashable | None]
    ) -> None:
        """Read the rows of all queries; record missing and unknown queries, and values that are no list of images.

        Args:
            content: Content of the file: a list by query.
            identifiers: Ids of the annotation's queries, in order.
            as_image: Function that returns the image that a value names, or None if it names none.
        """
        for identifier in identifiers:
            if identifier not in content:
                self.refuse("queries missing", identifier)
                continue
            values = content[identifier]
            images = [as_image(value) for value in values] if isinstance(values, list) else [None]
            if None in images:
                wrong = values[images.index(None)] if isinstance(values, list) else values
                self.refuse("queries with a value that is no image's name", f"{identifier} has {shown(wrong)}")
                continue
            self.rows[identifier] = [image for image in images if image is not None]
        self.checked.append("queries missing or unknown")
        known = set(identifiers)
        for identifier in content:
            if identifier not in known:
                self.refuse("unknown queries", shown(identifier))

    def check_rows(self, count: int, gallery: Collection[Hashable] | None) -> None:
        """Record rows without exactly ``count`` distinct images, and images outside the gallery if it is known."""
        self.checked += [f"exactly {count} images for each query", "images twice"]
        for identifier, row in self.rows.items():
            if len(row) != count:
                self.refuse(f"queries without exactly {count} images", f"{identifier} has {len(row)}")
            if len(set(row)) < len(row):
                ((most, _),) = Counter(row).most_common(1)
                self.refuse("queries with an image twice", f"{identifier} has {shown(most)}")
            if gallery is not None:
                self.check_each("queries with an image that is not in the gallery", identifier, gallery)

    def check_each(self, kind: str, identifier: str, allowed: Collection[Hashable]) -> None:
        """Record the query if one of its images is not allowed."""
        stranger = next((image for image in self.rows[identifier] if image not in allowed), None)
        if stranger is not None:
            self.refuse(kind, f"{identifier} has {shown(stranger)}")

    def note_gallery(self, path: Path | None, count: int, name: str) -> None:
        """Record the file and number of images by which names were checked, or that this file is missing."""
        if path is None:
            self.unchecked.append(
                f"the images' names, because {name} is not beside the annotation: give it by --gallery"
            )
        else:
            self.checked.append(f"the images' names (by the {count:,} of {path})")

    def __str__(self) -> str:
        """Return the findings, one per line."""
        lines = [f"checked: {', '.join(self.checked)}"] if self.checked else []
        lines += [f"not checked: {what}" for what in self.unchecked]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"refused: {kind}: {len(bad):,} ({listed(bad)})" for kind, bad in self.problems.items()]
        return "\n".join([self.title, *lines, *(f"{name}: {value:.2f}" for name, value in self.metrics.items())])


def by_query(group: Group, best: Tensor, images: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the images of each query, best first, by its identifier.

    Args:
        group: Group of the queries.
        best: ``(Q, k)`` gallery indices; -1 pads.
        images: Names that the file uses for the images of the gallery, in its order.
    """
    rows = ([images[index] for index in row if index >= 0] for row in best.tolist())
    return dict(zip((query.identifier for query in group.queries), rows))


def ranks_in(
    rows: Sequence[Row], targets: Sequence[Hashable], relevant: Sequence[Sequence[Hashable]] = ()
) -> ListedRanks:
    """Return the ranks of labelled images in truncated rankings.

    Args:
        rows: Ranked images of each query, best first.
        targets: Target of each query. Its rank is -1 if it is not listed. It also serves as the subset rank, for files
            that rank a subset.
        relevant: Labelled images of each query. An image that is not listed has a rank beyond every cutoff.
    """
    places = [{image: place for place, image in reversed(list(enumerate(row)))} for row in rows]
    ranks = [place.get(target, -1) for place, target in zip(places, targets)]
    labelled = [
        [place.get(image, _NOT_LISTED + column) for column, image in enumerate(images)]
        for place, images in zip(places, relevant or [()] * len(rows))
    ]
    return ListedRanks(ranks, ranks, labelled)


def gallery_beside(annotation: Path, gallery: Path | None, folders: Sequence[str], name: str) -> Path | None:
    """Return the given gallery file, or the first one in the folders, which are relative to the annotation's folder.

    If the annotation or its folder is a link, the neighbours of the link and of its target both count.

    Returns:
        The path, or None if there is no such file.
    """
    places: list[Path] = []
    for folder in folders:
        # The system goes up (..) from the target of a linked folder, but a written-out path goes up from the link.
        beside_link = os.path.normpath(os.path.abspath(annotation.parent / folder))
        bases = (annotation.parent / folder, Path(beside_link), annotation.resolve().parent / folder)
        places += [base / name for base in bases]
    return gallery or next((place for place in places if place.is_file() and place != annotation), None)
