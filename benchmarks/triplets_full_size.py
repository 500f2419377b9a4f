"""Time ``lavis-cir triplets`` on 300,000 captions of invented words, as frequent as English ones: 30,000 triplets."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measure

IMAGES, CAPTIONS, TRIPLETS = 60_000, 5, 30_000
THINGS, KINDS, ACTS, PLACES = 3_000, 300, 300, 1_000
"""Nouns, adjectives, verbs and places that captions choose from; the n-th of each is chosen with weight 1/n."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"number of images (default: {IMAGES})")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"captions per image (default: {CAPTIONS})")
    parser.add_argument("--count", type=int, default=TRIPLETS, help=f"triplets to make (default: {TRIPLETS})")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "captions.jsonl")
        write_captions(path, arguments.images, arguments.captions)
        command = [sys.executable, "-W", "ignore", "-m", "lavis_cir_plugin.commands.main", "triplets", str(path)]
        usage = measure.run([*command, "--output", folder, "--count", str(arguments.count)], print)
    print(f"in all {usage.seconds:.0f} s ({usage.cpu_seconds:.0f} s of processors), {usage.peak_bytes / 2**30:.2f} GiB")


def write_captions(path: Path, images: int, captions: int) -> None:
    """Write captions of images 0, 1, 2, ...: those of an image are about one scene, in words of their own."""
    rng = random.Random(0)
    drawn = {letter: _drawn(letter, size, rng) for letter, size in zip("navp", (THINGS, KINDS, ACTS, PLACES))}
    with path.open("w") as file:
        for image in range(images):
            thing, other, act, place = next(drawn["n"]), next(drawn["n"]), next(drawn["v"]), next(drawn["p"])
            for _ in range(captions):
                first = f"a {next(drawn['a'])} {thing}" if rng.random() < 0.5 else f"a {thing}"
                second = f" a {other}" if rng.random() < 0.8 else ""
                third = f" in the {place}" if rng.random() < 0.6 else f" on a {place}"
                caption = f"{first} {act}{second}{third}"
                file.write(json.dumps({"image": f"{image:07d}.jpg", "caption": caption}) + "\n")


def _drawn(letter: str, size: int, rng: random.Random) -> Iterator[str]:
    """Draw words without end."""
    words = [f"{letter}{number}" for number in range(size)]
    weights = list(itertools.accumulate(1 / number for number in range(1, size + 1)))
    while True:
        yield from rng.choices(words, cum_weights=weights, k=1000)


if __name__ == "__main__":
    main()
