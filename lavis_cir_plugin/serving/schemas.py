"""Define the answers of the server as types, from which its OpenAPI description is generated."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, Union

from pydantic import BaseModel, Field


class ColumnInfo(BaseModel):
    """A column that a condition may name."""

    name: str
    kind: Literal["number", "text"]
    own: bool = Field(description="whether it is of the user's metadata, not of the file")


class IndexInfo(BaseModel):
    """An index that can be searched."""

    name: str
    pictures: int
    model: str = Field(description="what made its features; empty where only code can load it")
    columns: list[ColumnInfo]


class LimitsInfo(BaseModel):
    """What a request may hold."""

    upload_bytes: int
    upload_pixels: int
    upload_kinds: list[str]
    pictures: int
    results: int
    text: int
    condition: int


class ServerInfo(BaseModel):
    """What this server has."""

    version: str
    indexes: list[IndexInfo]
    limits: LimitsInfo


class Duplicate(BaseModel):
    """A picture that looks the same as a result and stands behind it."""

    id: int
    path: str


class PictureInfo(BaseModel):
    """A picture of an index."""

    id: int = Field(description="a number that no other picture of this index has or had")
    path: str = Field(description="of the file, absolute, on the server")
    sha256: str
    bytes: int
    width: int
    height: int
    modified: float = Field(description="seconds since 1970")
    columns: dict[str, Union[int, float, str, None]] = Field(description="the user's metadata")


class HitInfo(PictureInfo):
    """A result."""

    score: float = Field(description="cosine of the question and the nearest feature of the picture, from -1 to 1")
    share_below: float = Field(description="share of the index's pictures that score less, from 0 to 1")
    duplicates: list[Duplicate]


class AnswerInfo(BaseModel):
    """Results, best first."""

    index: str
    hits: list[HitInfo]
    searched: int = Field(description="contents that the condition leaves to choose from")
    folded: int = Field(description="near-duplicates that stand behind the results")
    left_out: list[str] = Field(description="paths of references that were left out of the results")
    exact: bool = Field(description="whether no better picture can have been missed")
    recall: float = Field(description="otherwise the share of the exact best that was found when the index was built")
    share_is_estimated: bool
    milliseconds: float = Field(description="that the search took, without waiting for its turn")


class Sample(BaseModel):
    """Pictures of an index, drawn at random."""

    pictures: list[PictureInfo]


class Problem(BaseModel):
    """Why a request was refused."""

    code: str
    message: str = Field(description="one sentence: what is wrong, and what is allowed")


class ProblemAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: Problem


class Session(BaseModel):
    """Whether the client is let in."""

    open: bool = Field(description="whether this server asks for a token at all")
    signed_in: bool


class Token(BaseModel):
    """What opens a session."""

    token: str = Field(max_length=500)


class Side(IntEnum):
    """Pixels of the longer side of a small copy."""

    SMALL = 160
    MEDIUM = 320
    LARGE = 640
    WHOLE = 1600
