"""Draw the picture of the README: queries that a run of `make demo` answers well, and one that it does not.

Three queries are drawn at random from those whose right answer is among the first three images, and one from those
whose right answer is not among the first fifty. The shares of both kinds stand on the picture.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

from PIL import Image

from lavis_cir_plugin.report.contact_sheets import query_cells
from lavis_cir_plugin.report.query_results import QUERIES, read_queries
from lavis_cir_plugin.report.sheet_layout import SECTION_GAP, TEXT_WIDTH, Column, draw_sheet

GOOD, BAD, SHOWN = 3, 50, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a run of projects/wrf4cir/demo.yaml")
    parser.add_argument("--output", type=Path, default=Path("docs/contact_sheet.jpg"))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the queries (default: 0)")
    arguments = parser.parse_args()

    found = read_queries(arguments.run / "val" / QUERIES)
    ranked = [query for queries in found.groups.values() for query in queries]
    good = [query for query in ranked if 0 <= query.rank < GOOD]
    bad = [query for query in ranked if query.rank >= BAD]
    rng = random.Random(arguments.seed)
    chosen = [*rng.sample(good, 3), *rng.sample(bad, 1)]
    lines = [query_cells(query, found.images, SHOWN, found.upright) for query in chosen]
    shares = [round(100 * len(kind) / len(ranked)) for kind in (good, bad)]
    notes = [
        f"Three of the {shares[0]} % of queries whose right answer is among the first {GOOD} of 400 images, and one of "
        f"the {shares[1]} % whose right answer is not among the first {BAD}."
    ]
    layout = [Column("reference"), Column("what to change", TEXT_WIDTH), Column("best first", space=SECTION_GAP)]
    layout += [*[Column()] * (SHOWN - 1), Column("right answer", space=SECTION_GAP)]
    sheet = draw_sheet("Drawn garments, a small model trained for minutes on a CPU", notes, layout, lines)
    Image.open(io.BytesIO(sheet)).convert("RGB").save(arguments.output, quality=85, optimize=True, progressive=True)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
