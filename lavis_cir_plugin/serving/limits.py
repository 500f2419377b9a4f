"""Define the limits of a server for requests, memory and time."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Upper limits of a server.

    Attributes:
        upload_bytes: Size of one uploaded picture.
        upload_pixels: Width times height of an uploaded picture, as its header says, before anything is decoded.
        pictures: Number of references of one query, uploaded pictures and pictures of the index together.
        results: Number of results of one answer.
        text: Number of characters of each text.
        condition: Number of characters of a condition.
        bodies_bytes: Size of all request bodies that are in memory at the same time.
        searching: Number of searches at the same time. The model encodes one query at a time anyway.
        drawing: Number of pictures that are read or resized at the same time.
        waiting: Number of requests that wait for a search, and likewise for a picture.
        thumbnails_bytes: Size of all thumbnails that are kept in memory.
        seconds: Time in which a client has to send a request, and has to accept data before more follows.
        connections: Number of open connections.
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
        """Size of one request: the largest pictures, as many as it may have, and a mebibyte for everything else."""
        return self.pictures * self.upload_bytes + MEBIBYTE
