"""Wrong labels in training data: a share of the examples takes the labels of other examples, and a file says which."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.atomic_files import replace_file

NOISE = "noise.json"
"""File in a run's folder that names the examples with a wrong label."""


@dataclass(frozen=True)
class LabelNoise:
    """The wrong labels of one data set.

    Attributes:
        ratio: Share of the examples whose label is wrong.
        seed: Seed of the draw.
        sources: Position of the example whose label is taken, by the position of the example that takes it.
        wrong: What the file says of each wrong example, in the order of the examples.
    """

    ratio: float
    seed: int
    sources: Mapping[int, int]
    wrong: Sequence[Mapping[str, Any]]

    def record(self, examples: int) -> dict[str, Any]:
        """Return the content of the file for a data set with so many examples."""
        return {"noise_ratio": self.ratio, "noise_seed": self.seed, "examples": examples, "wrong": list(self.wrong)}


def mixed_sources(count: int, ratio: float, seed: int, is_wrong: Callable[[int, int], bool]) -> dict[int, int]:
    r"""Draw the examples that get a wrong label, and shuffle their labels among themselves.

    :math:`\mathrm{round}(r N)` of N examples are drawn. Each takes the label of another drawn one, and each label is
    taken once, so the labels stay as frequent as they were. For one seed, the examples of a smaller ratio are among
    those of a larger one. Nothing but the arguments decides, so all processes and a resumed run have equal labels.

    Args:
        count: Number N of examples.
        ratio: Share r of the examples, >= 0 and <= 1.
        seed: Seed of the draw.
        is_wrong: Function of two positions that says whether the second one's label is wrong for the first.

    Returns:
        Position of the label's example by position of the example, sorted.

    Raises:
        ValueError: If the ratio draws fewer than two examples, or a drawn one finds no wrong label; the message is the
            end of a sentence.

    Source: the protocol of noisy triplets of TME, HABIT and INTENT, without the labels that are right by chance.
    """
    order = list(range(count))
    random.Random(seed).shuffle(order)
    drawn = order[: round(ratio * count)]
    if len(drawn) < 2:
        raise ValueError(f"of {count:,} examples draws {len(drawn)}, and labels are exchanged among at least two")
    sources = [*drawn[1:], *drawn[:1]]
    for place, example in enumerate(drawn):
        if is_wrong(example, sources[place]):
            continue
        for step in range(1, len(drawn)):
            other = (place + step) % len(drawn)
            if is_wrong(example, sources[other]) and is_wrong(drawn[other], sources[place]):
                sources[place], sources[other] = sources[other], sources[place]
                break
        else:
            raise ValueError(f"of {count:,} examples leaves one without a wrong label, as too many labels are equal")
    return dict(sorted(zip(drawn, sources)))


def write_noise(folder: Path, datasets: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """Write which training examples of a run have a wrong label, and return the file, or ``None`` if none has.

    Args:
        folder: Folder of the run.
        datasets: Data sets by name and split; those with a `LabelNoise` in their attribute ``noise`` are written.

    Raises:
        OSError: If the file cannot be written.
    """
    content = {
        name: splits["train"].noise.record(len(splits["train"]))
        for name, splits in datasets.items()
        if getattr(splits.get("train"), "noise", None) is not None
    }
    return replace_file(folder / NOISE, (json.dumps(content, indent=1) + "\n").encode()) if content else None
