"""Search of one's own pictures, shown: draw 2,000 garments, index them with a demo's checkpoint, ask three questions.

``make demo-search`` calls it after ``make demo``. Pictures, columns, index and the sheet of the answers stay below
``--work``; a second call draws and encodes nothing again.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import time
from pathlib import Path

from PIL import Image

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.garments.attributes import CATEGORIES, sample
from lavis_cir_plugin.garments.world import write_pictures
from lavis_cir_plugin.search import Encoder, build_index_folder, load_encoder, open_index
from lavis_cir_plugin.search.answers import as_lines, question
from lavis_cir_plugin.search.engine import SearchIndex
from lavis_cir_plugin.search.sheet import draw_answer

PICTURES = 2000
SIZE = (144, 180)
RUNS = Path("output/wrf4cir/demo")
COLUMNS = ("path", "category", "colour", "sleeve", "price")

QUESTIONS = (
    (True, "is red and has longer sleeves", None),
    (False, "a blue dress", None),
    (True, "is more colorful", "category = 'shirt' and price < 30"),
)
"""Whether there is a reference picture, the text, and a condition."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("output/search/demo"), help="default: %(default)s")
    parser.add_argument("--run", type=Path, help=f"a run's folder (default: the newest of {RUNS})")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="default: %(default)s")
    arguments = parser.parse_args()
    start = time.monotonic()
    encoder = load_encoder(arguments.run or newest_run())
    sheet = show(arguments.work, encoder, arguments.pictures)
    print(f"\nIn {time.monotonic() - start:.0f} s: {sheet}. Ask more:")
    print(f'  lavis-cir search {arguments.work / "index"} --text "a red shirt" --sheet answer.png')


def newest_run() -> Path:
    """Return the demo's newest run that has a best checkpoint."""
    found = sorted(RUNS.glob("*/checkpoint_best.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{RUNS} holds no finished run; start make demo first, or name a run by --run.")
    return found[-1].parent


def show(work: Path, encoder: Encoder, count: int) -> Path:
    """Draw, index, ask and write the sheet; return its path."""
    draw_catalogue(work / "pictures", work / "columns.csv", count)
    built = build_index_folder([work / "pictures"], work / "index", encoder, metadata=work / "columns.csv")
    print(f"{built.pictures:,} pictures, {built.encoded:,} encoded in {built.seconds:.1f} s")
    index = open_index(work / "index", encoder)
    reference = next(iter(sorted((work / "pictures").iterdir())))
    sheets = [ask(index, reference if has_image else None, text, where) for has_image, text, where in QUESTIONS]
    stacked = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, top))
        top += sheet.height
    path = work / "sheet.png"
    with path.open("wb") as file:
        stacked.save(file, "PNG")
    return path


def draw_catalogue(folder: Path, columns: Path, count: int) -> None:
    """Draw garments, the same for every call, and write what is known of each and a price into a file."""
    rng = random.Random(0)
    garments = {f"{number:05d}.jpg": sample(rng.choice(CATEGORIES), rng) for number in range(count)}
    missing = {name: garment for name, garment in garments.items() if not (folder / name).exists()}
    write_pictures(folder, missing, SIZE)
    rows = [
        [name, garment.category, garment.colour, garment.sleeve, rng.randrange(5, 100)]
        for name, garment in garments.items()
    ]
    with columns.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def ask(index: SearchIndex, reference: Path | None, text: str, where: str | None) -> Image.Image:
    """Print an answer and return it as a picture."""
    answer = index.search([reference] if reference else (), text, k=5, where=where)
    lines, notes = as_lines(answer)
    print("\n".join(["", *question(text, None, where), *lines, *notes]))
    references = [open_rgb(reference)] if reference else []
    return Image.open(io.BytesIO(draw_answer(answer, references, question(text, None, where))))


if __name__ == "__main__":
    main()
