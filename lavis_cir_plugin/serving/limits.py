"""What a server takes from its clients, at most."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        upload_bytes: Of one uploaded picture.
        upload_pixels: Width times height of one, as its header says, before anything is decoded.
        pictures: Of one question, uploaded ones and those of the index together.
        results: Of one answer.
        text: Characters of each text.
        condition: Characters of a condition.
        bodies_bytes: All request bodies that are in memory at a time.
        searching: Searches that run at a time; the model encodes one question at a time anyway.
        drawing: Pictures that are read or made small at a time.
        waiting: Requests of either kind that wait for their turn.
        thumbnails_bytes: Small pictures that are kept in memory.
        seconds: That a client may take to send a request, or to take in what it was sent before more follows.
        connections: Open ones.
    """

    upload_bytes: int = 15 * MEBIBYTE
    upload_pixels: int = 40_000_000
    pictures: int = 4
    results: int = 500
    text: int = 2000
    condition: int = 4000
    bodies_bytes: int = 256 * MEBIBYTE
    searching: int = 2
    drawing: int = 2
    waiting: int = 500
    thumbnails_bytes: int = 64 * MEBIBYTE
    seconds: float = 60.0
    connections: int = 1000

    @property
    def body_bytes(self) -> int:
        """Of one request: as many pictures as it may have, and a mebibyte for everything else."""
        return self.pictures * self.upload_bytes + MEBIBYTE
