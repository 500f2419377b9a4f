"""Answers of a search as lines for people and as plain values for programs."""

from __future__ import annotations

import os
from typing import Any

from lavis_cir_plugin.core.error_messages import printable
from lavis_cir_plugin.search.catalogue import Picture
from lavis_cir_plugin.search.questions import Answer, Hit


def as_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain values; `/docs` of ``lavis-cir serve`` says what each is."""
    return {
        "hits": [_hit(hit) for hit in answer.hits],
        "searched": answer.searched,
        "folded": answer.folded,
        "left_out": list(answer.left_out),
        "exact": answer.is_exact,
        "recall": answer.recall,
        "share_is_estimated": answer.share_is_estimated,
    }


def picture_as_json(picture: Picture) -> dict[str, Any]:
    """Return a picture as plain values."""
    return {
        "id": picture.id,
        "path": picture.path,
        "sha256": picture.sha256,
        "bytes": picture.bytes,
        "width": picture.width,
        "height": picture.height,
        "modified": picture.modified,
        "columns": picture.columns,
    }


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "score": round(hit.score, 6),
        "share_below": round(hit.share_below, 6),
        **picture_as_json(hit.picture),
        "duplicates": [{"id": picture.id, "path": picture.path} for picture in hit.duplicates],
    }


def as_lines(answer: Answer) -> tuple[list[str], list[str]]:
    """Return a table of the hits, and sentences on what is not in it."""
    lines = ["score   above    path"]
    for hit in answer.hits:
        more = f"  (+{len(hit.duplicates)} alike)" if hit.duplicates else ""
        lines.append(f"{hit.score:6.4f}  {100 * hit.share_below:5.1f} %  {printable(hit.path)}{more}")
    if not answer.hits:
        lines = ["nothing found"]
    return lines, list(_notes(answer))


def _notes(answer: Answer) -> list[str]:
    estimated = " (estimated from a sample)" if answer.share_is_estimated else ""
    notes = [
        f"score: cosine of query and picture; above: share of the index that scores less{estimated}; "
        f"{answer.searched:,} different pictures were searched."
    ]
    if answer.folded:
        notes.append(f"{answer.folded:,} near-duplicates are folded into the results; --all shows them.")
    if answer.left_out:
        who = "reference itself is" if len(answer.left_out) == 1 else "references themselves are"
        notes.append(f"The {who} left out ({', '.join(answer.left_out[:3])}); --keep-reference shows it.")
    if not answer.is_exact:
        notes.append(
            f"Candidates, not a scan: {100 * answer.recall:.1f} % of the exact 50 best were found for drawn queries; "
            "--exact scans everything."
        )
    gone = [hit.path for hit in answer.hits if not os.path.exists(hit.path)]
    if gone:
        notes.append(
            f"Not on this machine: {len(gone)} of the {len(answer.hits)} files (first: {printable(gone[0])}); if they "
            "were moved or deleted, lavis-cir index brings the index up to date."
        )
    return notes


def question(text: str | None, without: str | None, where: str | None) -> list[str]:
    """Say what was asked, in lines."""
    lines = [text or "pictures like this"]
    if without:
        lines.append(f"without: {without}")
    if where:
        lines.append(f"where: {where}")
    return lines
