"""The catalogue of an index, in SQLite: its files, their contents, and the user's columns."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavis_cir_plugin.search.filters import Column, Condition
from lavis_cir_plugin.search.folders import Scan, Signature, is_below
from lavis_cir_plugin.search.metadata import NUMBER, Metadata

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS folders (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (sha256 BLOB PRIMARY KEY, row INTEGER NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, name TEXT NOT NULL, bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL, changed_ns INTEGER NOT NULL, read_ns INTEGER NOT NULL, sha256 BLOB NOT NULL,
    row INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, added INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS pictures_by_row ON pictures (row);
CREATE TABLE IF NOT EXISTS not_indexed (
    path TEXT PRIMARY KEY, reason TEXT NOT NULL, bytes INTEGER, modified_ns INTEGER, changed_ns INTEGER, read_ns INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS columns (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS metadata (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""

_DATE = "strftime('%Y-%m-%d %H:%M:%S', {}, 'unixepoch')"

FILE_COLUMNS: Mapping[str, Column] = {
    "file_id": Column("pictures.id", True),
    "file_path": Column("pictures.path", False),
    "file_name": Column("pictures.name", False),
    "file_bytes": Column("pictures.bytes", True),
    "file_width": Column("pictures.width", True),
    "file_height": Column("pictures.height", True),
    "file_modified": Column(_DATE.format("pictures.modified_ns / 1000000000"), False),
    "file_added": Column(_DATE.format("pictures.added"), False),
}
"""What every index knows of a picture and a condition may name; dates are texts such as 2026-01-31 12:00:00, UTC."""

_RACE_NS = 2 * 10**9
"""A file that changed this shortly before it was read may have changed again within one tick of its clock."""

_AT_ONCE = 400
_LARGEST_ID = 2**63 - 1  # SQLite's


class Read(NamedTuple):
    """What reading a file gave.

    Attributes:
        path: Absolute path of the file.
        signature: Signature of the file before it was read.
        read_ns: Time of the reading.
        sha256: Hash of the file's bytes; empty if it could not be read.
        row: Row of its features in the file that they were written to; -1 for none.
        width, height: Size of the upright picture in pixels.
        reason: The reason why it is not indexed; empty if it is.
    """

    path: str
    signature: Signature
    read_ns: int
    sha256: bytes
    row: int
    width: int
    height: int
    reason: str


@dataclass(frozen=True)
class Picture:
    """A picture of an index.

    Attributes:
        id: A number that no other picture of this index has or had.
        path: Absolute path, as it was found.
        row: Row of its features.
        sha256: Hash of the file's bytes, in hexadecimal.
        bytes: Size of the file.
        width, height: Size of the upright picture in pixels.
        modified, added: Times in seconds since 1970: of the file's last change, and of its indexing.
        columns: Values of the user's own columns; ``None`` if one is missing.
    """

    id: int
    path: str
    row: int
    sha256: str
    bytes: int
    width: int
    height: int
    modified: float
    added: int
    columns: dict[str, Any]


def condition_columns(own: Mapping[str, str]) -> dict[str, Column]:
    """Return what a condition may name: the user's own columns, by kinds of which they are given, and the files'."""
    names = {name: Column(f"metadata.c{place}", kind == NUMBER) for place, (name, kind) in enumerate(own.items())}
    return {**names, **FILE_COLUMNS}


class Record(NamedTuple):
    """A picture as the catalogue holds it.

    Attributes:
        id: A number that no other picture of this index has or had.
        path: Absolute path, as it was found.
        row: Row of its features.
        sha256: Hash of the file's bytes.
        bytes: Size of the file.
        width, height: Size of the upright picture in pixels.
        modified_ns: Nanoseconds from 1970 to the file's last change.
        added: Seconds from 1970 to its indexing.
        own: Values of the user's own columns.
    """

    id: int
    path: str
    row: int
    sha256: bytes
    bytes: int
    width: int
    height: int
    modified_ns: int
    added: int
    own: tuple[Any, ...]


class WritableCatalogue:
    """The writer's own catalogue; every method that changes it does so whole or not at all."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = DELETE")
        with self.transaction():
            for statement in _SCHEMA.strip().split(";"):
                self._database.execute(statement)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do all of a block or nothing of it."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def fact(self, name: str, otherwise: Any = None) -> Any:
        """Return a single value that was noted; ``otherwise`` where it was not."""
        found = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return otherwise if found is None else found[0]

    def note(self, **facts: Any) -> None:
        """Note single values."""
        self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    @property
    def folders(self) -> list[str]:
        """Absolute paths of the indexed folders, sorted."""
        return [path for (path,) in self._database.execute("SELECT path FROM folders ORDER BY path")]

    def set_folders(self, folders: Iterable[str]) -> None:
        """Replace the list of folders."""
        self._database.execute("DELETE FROM folders")
        self._database.executemany("INSERT INTO folders VALUES (?)", ((folder,) for folder in folders))

    def paths(self) -> list[str]:
        """Return the paths of all pictures, sorted."""
        return [path for (path,) in self._database.execute("SELECT path FROM pictures ORDER BY path")]

    def count(self, table: str) -> int:
        """Return how many rows a table has."""
        return int(self._database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])

    def unread(self, scan: Scan, is_thorough: bool) -> list[tuple[str, Signature]]:
        """Return the files of a scan that are new, or may have changed since they were read.

        Args:
            scan: What stands in the folders.
            is_thorough: Whether all files may have changed.
        """
        if is_thorough:
            return list(scan.pictures.items())
        known: dict[str, tuple[Signature, int]] = {}
        for table in ("not_indexed", "pictures"):
            for path, *numbers, read_ns in self._database.execute(
                f"SELECT path, bytes, modified_ns, changed_ns, read_ns FROM {table} WHERE read_ns IS NOT NULL"
            ):
                known[path] = Signature(*numbers), read_ns
        return [
            (path, signature)
            for path, signature in scan.pictures.items()
            if path not in known or known[path][0] != signature or _may_have_changed(signature, known[path][1])
        ]

    def row_of(self, sha256: bytes) -> int | None:
        """Return the row of the features of a content, if it was ever encoded."""
        found = self._database.execute("SELECT row FROM contents WHERE sha256 = ?", (sha256,)).fetchone()
        return None if found is None else int(found[0])

    def known_contents(self) -> set[bytes]:
        """Return the contents that have features."""
        return {sha256 for (sha256,) in self._database.execute("SELECT sha256 FROM contents")}

    def add_contents(self, rows: Iterable[tuple[bytes, int]]) -> None:
        """Note where the features of contents stand."""
        self._database.executemany("INSERT INTO contents VALUES (?, ?)", rows)

    def add(self, reads: Iterable[Read]) -> None:
        """Note what reading files gave; a file with another content than before becomes a new picture."""
        now = int(time.time())
        for read in reads:
            if read.reason:
                self._forget(read.path)
                # A disk that failed may be there the next time, so what gave no bytes counts as never read.
                values = (read.path, read.reason, *read.signature, read.read_ns if read.sha256 else None)
                self._database.execute("INSERT OR REPLACE INTO not_indexed VALUES (?, ?, ?, ?, ?, ?)", values)
                continue
            self._database.execute("DELETE FROM not_indexed WHERE path = ?", (read.path,))
            changed = self._database.execute(
                "UPDATE pictures SET bytes = ?, modified_ns = ?, changed_ns = ?, read_ns = ? "
                "WHERE path = ? AND sha256 = ?",
                (*read.signature, read.read_ns, read.path, read.sha256),
            )
            if changed.rowcount == 0:
                self._forget(read.path)
                self._database.execute(
                    "INSERT INTO pictures (path, name, bytes, modified_ns, changed_ns, read_ns, sha256, row, width, "
                    "height, added) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(read.path, os.path.basename(read.path), *read.signature, read.read_ns, read.sha256),
                        *(self.row_of(read.sha256), read.width, read.height, now),
                    ),
                )

    def keep_only(self, scan: Scan, folders: Sequence[str]) -> int:
        """Forget the files of some folders that a scan of them did not find; return how many pictures these were."""
        for table in ("not_indexed", "pictures"):
            left = [
                path
                for path in self._below(table, folders)
                if path not in scan.pictures and not any(is_below(path, folder) for folder in scan.unread)
            ]
            self._delete(table, left)
        self._database.executemany(
            "INSERT OR REPLACE INTO not_indexed (path, reason) VALUES (?, ?)", scan.left_out.items()
        )
        return len(left)

    def forget_outside(self, folders: Sequence[str]) -> int:
        """Forget the files that are in none of some folders; return how many pictures these were."""
        for table in ("not_indexed", "pictures"):
            kept = set(self._below(table, folders))
            paths = [path for (path,) in self._database.execute(f"SELECT path FROM {table}") if path not in kept]
            self._delete(table, paths)
        return len(paths)

    def _below(self, table: str, folders: Sequence[str]) -> list[str]:
        paths = [path for (path,) in self._database.execute(f"SELECT path FROM {table}")]
        return [path for path in paths if any(is_below(path, folder) for folder in folders)]

    def _delete(self, table: str, paths: Iterable[str]) -> None:
        self._database.executemany(f"DELETE FROM {table} WHERE path = ?", ((path,) for path in paths))

    def _forget(self, path: str) -> None:
        self._database.execute("DELETE FROM pictures WHERE path = ?", (path,))

    def not_indexed(self) -> list[tuple[str, str]]:
        """Return path and reason of every file that is not indexed, sorted by path."""
        return list(self._database.execute("SELECT path, reason FROM not_indexed ORDER BY path"))

    def set_metadata(self, metadata: Metadata) -> None:
        """Replace the user's columns."""
        _set_metadata(self._database, metadata.columns, metadata.rows)

    def without_metadata(self) -> tuple[list[str], int]:
        """Return the names of the user's columns, and how many pictures have no row of them; 0 without columns."""
        names = [name for (name,) in self._database.execute("SELECT name FROM columns ORDER BY place")]
        statement = "SELECT COUNT(*) FROM pictures WHERE path NOT IN (SELECT path FROM metadata)"
        return names, int(self._database.execute(statement).fetchone()[0]) if names else 0

    def pictures_by_row(self) -> np.ndarray[Any, Any]:
        """Return row and id of every picture, ``(P, 2)`` int64, sorted."""
        found = self._database.execute("SELECT row, id FROM pictures ORDER BY row, id").fetchall()
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def renumber(self, rows: Mapping[int, int]) -> None:
        """Give contents their new rows, and forget the contents that have none."""
        kept = [
            (sha256, rows[row])
            for sha256, row in self._database.execute("SELECT sha256, row FROM contents")
            if row in rows
        ]
        self._database.execute("DELETE FROM contents")
        self.add_contents(kept)
        self._database.execute(
            "UPDATE pictures SET row = (SELECT row FROM contents WHERE contents.sha256 = pictures.sha256)"
        )

    def copy_to(self, path: Path) -> None:
        """Write a copy onto the disk, whole."""
        copy = sqlite3.connect(path)
        try:
            self._database.backup(copy)
        finally:
            copy.close()
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _may_have_changed(signature: Signature, read_ns: int) -> bool:
    """Return whether a file may have changed again within the tick of the clock in which it was read.

    A wrong clock of a camera or a copying program may leave a ``modified_ns`` far in the future for ever.
    """
    return signature.changed_ns + _RACE_NS > read_ns or abs(signature.modified_ns - read_ns) < _RACE_NS


def _set_metadata(database: sqlite3.Connection, columns: Mapping[str, str], rows: Mapping[str, Sequence[Any]]) -> None:
    database.execute("DELETE FROM columns")
    database.execute("DROP TABLE metadata")
    kinds = [f", c{place} {'NUMERIC' if kind == NUMBER else 'TEXT'}" for place, kind in enumerate(columns.values())]
    database.execute(f"CREATE TABLE metadata (path TEXT PRIMARY KEY{''.join(kinds)}) WITHOUT ROWID")
    places = [(place, name, kind) for place, (name, kind) in enumerate(columns.items())]
    database.executemany("INSERT INTO columns VALUES (?, ?, ?)", places)
    marks = ", ".join("?" * (1 + len(columns)))
    database.executemany(f"INSERT INTO metadata VALUES ({marks})", ([path, *values] for path, values in rows.items()))


class ReadableCatalogue:
    """The catalogue of one state of an index, which nobody changes; may be asked by several threads."""

    def __init__(self, path: Path) -> None:
        # Nobody writes to this file any more, so that no lock is needed, and a folder without write permission is read.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} cannot be read ({error}); build the index again.") from None
        self._use(database, path)

    @classmethod
    def of_records(cls, columns: Mapping[str, str], records: Iterable[Record]) -> ReadableCatalogue:
        """Return a catalogue in memory of some pictures, which may come from elsewhere.

        Args:
            columns: Kinds of the user's own columns, by name.
            records: The pictures; of two of one path the later one counts.
        """
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        for statement in _SCHEMA.strip().split(";"):
            database.execute(statement)
        by_path = {record.path: record for record in records}
        database.executemany(
            "INSERT INTO pictures VALUES (?, ?, ?, ?, ?, 0, 0, ?, ?, ?, ?, ?)",
            (
                (id_, path, os.path.basename(path), size, modified_ns, sha256, row, width, height, added)
                for id_, path, row, sha256, size, width, height, modified_ns, added, _ in by_path.values()
            ),
        )
        _set_metadata(database, columns, {path: record.own for path, record in by_path.items()})
        found = cls.__new__(cls)
        found._use(database, ":memory:")
        return found

    def _use(self, database: sqlite3.Connection, path: str | Path) -> None:
        self._lock, self._database, self._is_closed = threading.Lock(), database, False
        try:
            kinds = self._all("SELECT place, name, kind FROM columns ORDER BY place")
            self.own_columns = {name: kind for _, name, kind in kinds}
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{path} is no catalogue of an index ({error}); build the index again.") from None
        self.columns = condition_columns(self.own_columns)

    def close(self) -> None:
        """Close the file; whatever is asked afterwards ends in a ValueError."""
        with self._lock:
            self._is_closed = True
            self._database.close()

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        if self._is_closed:
            raise ValueError("the index was closed; open it again by open_index.")
        return self._database.execute(statement, values)

    def _all(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._execute(statement, values).fetchall()

    def rows_where(self, condition: Condition) -> np.ndarray[Any, Any]:
        """Return the rows of the pictures that meet a condition, sorted, each once: int64."""
        # Sorted here: by its index SQLite would visit the pictures in another order than they lie on the disk.
        statement = (
            "SELECT pictures.row FROM pictures NOT INDEXED LEFT JOIN metadata ON metadata.path = pictures.path "
            f"WHERE {condition.sql}"
        )
        with self._lock:
            found = np.fromiter((row for (row,) in self._execute(statement, condition.values)), np.int64)
        return np.unique(found)

    def of_rows(self, rows: Sequence[int], condition: Condition | None = None) -> dict[int, list[Picture]]:
        """Return the pictures of some rows that meet a condition, by row, in order of their ids."""
        found: dict[int, list[Picture]] = {row: [] for row in rows}
        for start in range(0, len(rows), _AT_ONCE):
            some = list(rows[start : start + _AT_ONCE])
            where = f"pictures.row IN ({', '.join('?' * len(some))})"
            for picture in self._pictures(where, some, condition):
                found[picture.row].append(picture)
        return found

    def by_id(self, picture_id: int) -> Picture | None:
        """Return a picture, if it is in the index."""
        if not 0 < picture_id <= _LARGEST_ID:
            return None
        return next(iter(self._pictures("pictures.id = ?", [picture_id])), None)

    def row_of_content(self, sha256: str) -> int | None:
        """Return the row of a content that some picture has."""
        statement = (
            "SELECT row FROM contents WHERE sha256 = ? "
            "AND EXISTS (SELECT * FROM pictures WHERE pictures.row = contents.row)"
        )
        found = self._all(statement, (bytes.fromhex(sha256),))
        return found[0][0] if found else None

    def not_indexed(self) -> list[tuple[str, str]]:
        """Return path and reason of every file that is not indexed, sorted by path."""
        return [tuple(item) for item in self._all("SELECT path, reason FROM not_indexed ORDER BY path")]

    def records(self, rows: Sequence[int]) -> list[Record]:
        """Return the pictures of some rows, in order of rows and ids."""
        found: list[Record] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = list(rows[start : start + _AT_ONCE])
            found += self._records(f"pictures.row IN ({', '.join('?' * len(some))})", some)
        return sorted(found, key=lambda record: (record.row, record.id))

    def _pictures(self, where: str, values: list[Any], condition: Condition | None = None) -> list[Picture]:
        return [
            Picture(
                *record[:3],
                record.sha256.hex(),
                *record[4:7],
                record.modified_ns / 1e9,
                record.added,
                dict(zip(self.own_columns, record.own)),
            )
            for record in self._records(where, values, condition)
        ]

    def _records(self, where: str, values: list[Any], condition: Condition | None = None) -> list[Record]:
        own = "".join(f", metadata.c{place}" for place in range(len(self.own_columns)))
        also, more = (f" AND {condition.sql}", condition.values) if condition else ("", [])
        found = self._all(
            f"SELECT pictures.id, pictures.path, row, sha256, bytes, width, height, modified_ns, added{own} "
            "FROM pictures LEFT JOIN metadata ON metadata.path = pictures.path "
            f"WHERE {where}{also} ORDER BY pictures.id",
            [*values, *more],
        )
        return [Record._make((*row[:9], tuple(row[9:]))) for row in found]
