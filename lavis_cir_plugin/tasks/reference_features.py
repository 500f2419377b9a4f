"""Keep the image features of a benchmark's references during an evaluation, so that the tower runs once per picture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lavis_cir_plugin.core.error_messages import size_text
from lavis_cir_plugin.core.processes import gather
from lavis_cir_plugin.core.shared_rows import SharedRows
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset

REFERENCES_FILE = "reference_features.tmp"


class DistinctPictures(Dataset):
    """The pictures of a benchmark as samples with ``image``, each once: its gallery, then other references.

    Attributes:
        names: Names of the pictures; the first are those of the gallery, in its order.
        references: Those that are references of queries, in the same order.
    """

    def __init__(self, dataset: BenchmarkDataset) -> None:
        self.dataset = dataset
        references = dict.fromkeys(reference for reference, _ in dataset.queries.rows)
        self.names = list(dict.fromkeys([*dataset.names, *references]))
        self.references = [name for name in self.names if name in references]

    def __len__(self) -> int:
        """Return the number of distinct pictures."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one picture."""
        return {"image": self.dataset.load_image(self.names[index])}


class ReferenceFeatures:
    """Image features of references in a file that all processes write during an evaluation, and read after that.

    Every process must make the object, and call :meth:`complete` after its last :meth:`write`. The features only save
    time. If there is no room for them, or the disk fills up meanwhile, the evaluation goes on without them.

    Args:
        folder: Folder for the file, which all processes see. The file is gone when the processes end, or earlier.
        references: Names of the references; a process writes features in this order.
    """

    def __init__(self, folder: Path, references: Sequence[str]) -> None:
        self._folder = folder
        self._row = {name: row for row, name in enumerate(references)}
        self._failure = ""
        self._is_announced = False
        self._features: Tensor | None = None
        self._file: SharedRows | None = None
        with self._failure_noted():
            self._file = SharedRows(
                folder / REFERENCES_FILE,
                len(references),
                "the references' image features",
                "each query encodes its reference again",
            )

    def __enter__(self) -> ReferenceFeatures:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def is_writable(self) -> bool:
        """Whether features can still be written."""
        return self._file is not None

    def write(self, names: Sequence[str], features: Tensor, others: int) -> None:
        """Write the features of those pictures that are references.

        Args:
            names: Names of consecutive pictures.
            features: A row of image features for each, on any device.
            others: Number of bytes that the evaluation needs on the same disk for something else.
        """
        places = [(place, self._row[name]) for place, name in enumerate(names) if name in self._row]
        if self._file is None or not places:
            return
        rows = features[[place for place, _ in places]].cpu()
        with self._failure_noted():
            if not self._is_announced:
                self._file.check_room(rows[0], others)
                self._announce(rows[0])
            self._file.write(places[0][1], rows)

    def complete(self) -> bool:
        """Make the features readable, and return whether they are; in all processes they are, or they are not."""
        failures = [failure for failure in gather(self._failure) if failure]
        if self._file is not None and not failures:
            with self._failure_noted():
                self._features = self._file.mapped()
            failures = [failure for failure in gather(self._failure) if failure]
        self._close()
        if failures:
            self._features = None
            logging.info(failures[0])
        return not failures

    def of(self, names: Sequence[str]) -> Tensor:
        """Return the features of references ``(B, ...)`` on the CPU, bit for bit as they were written."""
        assert self._features is not None
        return self._features[[self._row[name] for name in names]]

    def _announce(self, row: Tensor) -> None:
        self._is_announced = True
        _tell_once(
            f"each picture is encoded once: the image features of {len(self._row):,} references take "
            f"{size_text(len(self._row) * row.nbytes)} in {self._folder} until the evaluation ends"
        )

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """Give the file up after an error, which frees its room once all processes have done so."""
        try:
            yield
        except (OSError, ValueError) as error:  # a ValueError says that another process failed
            self._failure = str(error)
            self._close()


@functools.cache
def _tell_once(words: str) -> None:
    """Log a line that is equal in every validation of a run before the first of them alone."""
    logging.info(words)
