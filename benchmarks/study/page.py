"""The page of results, made of the CSV alone: what is there, and how many runs are missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from study.intervals import LEVEL
from study.plots import draw_curves, draw_differences, draw_gammas
from study.tables import (
    WHY,
    Study,
    Table,
    choice_table,
    comparisons,
    conclusion,
    counts,
    elsewhere_conclusion,
    elsewhere_table,
    grid_table,
    main_table,
    markdown,
    noise_table,
    pair_table,
    provenance,
)

HEAD = """# Results: does WRF4CIR do what it claims?

`python benchmarks/wrf_study.py --page` writes this page from `docs/results/wrf_study.csv`, which has a row per run.
`make study` runs what is missing and writes it anew. [The plan](results/wrf_study_plan.md) was committed before any run
of the table; what was changed later is told there. All of it is on drawn garments and a small model: it shows what the
method does there, and nothing about photographs.

**{finished} of {total} runs are finished, {missing} are missing.** {conclusion}
{stale}{pictures}
## What the plan asks

Differences are in points of the mean of R@10 and R@50 on 825 validation queries, with early stopping unless a row says
otherwise: each half of the queries chooses the epoch of the other half. Runs with one seed share triplets and order,
and differences are of runs with one start, so they are paired. {wrf} is the method with the γ that the other world
chose; the paper's is 0.001. The rows that decide have {deciding} seeds here, and the tables further below at most
{main}.

Brackets hold {level} % bootstrap intervals over seeds and queries, or Student's over seeds alone for the gap. A gain
has its whole interval above 0, and is one of a point if its mean is at least 1, so the interval may begin below 1. "No
gain of a point" means that the interval ends below 1; a smaller gain or a loss is possible. One or two seeds get no
verdict.

{tests}

What to keep in mind:

- One drawn world and one set of queries are behind all of these differences, and one start behind each size and model:
  another processor may train another start (see the end of the page), and runs of two starts are never paired. VQA and
  captioning begin with random weights of their seed. Seeds vary the triplets and their order alone, so no interval says
  how another world or another start would turn out. (Neighbouring seeds share orders of places in the data, but other
  triplets stand at these places.)
- With 3,000 triplets plain training does not overfit in these steps: its validation recall still rises at the end. WRF
  learns more slowly, so a difference there can be one of speed; the row with twice the steps for both is the test.
- γ was chosen for WRF. Random, SAM and ASAM have a perturbation of the same norm, and might do better with one of their
  own; the learning rate, in turn, was chosen for plain training. The gain over random is that of the direction at
  the radius chosen for WRF.
- The regulariser that stands for all was the best on average over both sizes in the other world, where another was best
  with 1,000 triplets (see the end of the page). Values at an end of their grid may not be the best there are.
- BLIP-2's Q-Former trains with BERT's dropout of 0.1, and this small one without. "All with dropout" below asks whether
  WRF adds to it.
- A gap narrows when training recall falls, too: `train` and `val` below tell which of them moved.
- The bootstrap counts the chance of a single answer in both of its draws, so intervals of many seeds are rather too
  wide. Those of three can be too narrow. Queries of one family of garments share pictures; whole families drawn instead
  of queries move the limits of the rows that decide by about a tenth of a point.
- There are many rows, so some intervals will miss 0 by chance. A limit within a tenth of a point of 0 may lie on its
  other side with other draws of the bootstrap. Two lines are not compared by their brackets: that one
  difference is a gain and another is none does not make the two different.
"""

AFTER_TABLES = """`train` and `val` are after the last step, and `gap` is their difference. `less plain` is of `val,
stopped` and paired; the other columns are averages of a row's own seeds, which do not compare rows with unequal
numbers of seeds. `train` is recall on training queries, in galleries of val's size or, with 300 triplets, of the half
that their pictures fill, which makes the gap larger there. With 10,000 triplets all seeds have nearly the same ones,
so intervals there are of their order alone. `loss` is on fixed training batches without label smoothing. It rises
along δ, the paper's perturbation at γ = 0.001 whatever a row was trained with, and along a random direction of equal
length. `time` is processor time per step relative to plain, with features that are computed beforehand.
"""

GRID_TABLE = """What WRF gains over plain training with early stopping: runs of the table above, side by side."""

SIDE_BY_SIDE = """Here and below, a line has the seeds that all of its runs have, so what is also in the table above is
of fewer seeds than there. "Less the first line's" is the gain of a line less that of the first, which says whether the
change makes a difference to WRF."""

FOOT = """## How the settings were chosen

In another world (seeds {seeds}), the learning rate first and everything else with it, by the mean recall under early
stopping. Two seeds at a size differ by several points, so neighbouring values are not told apart.

{choices}

## Where the numbers are from

The command is `make study`; seeds are those of the plan, and a run's own are in the file. `start` names the weights
that the runs started from.

{counts}

{provenance}
"""


PICTURES = {
    "differences": (
        draw_differences,
        "Gains over plain training",
        f"Means and {LEVEL} % intervals of recall with early stopping. Blue is a gain of a point, light blue\n"
        "a smaller gain, orange a loss; grey is none of these, or fewer than three seeds.",
    ),
    "curves": (draw_curves, "Recall while training goes on", "Averages over seeds after each validation."),
    "gamma": (
        draw_gammas,
        "Recall over the radius",
        "On validation queries with early stopping, on training queries after the last step.",
    ),
}
"""What the pictures are called, what draws them, their titles, and what is said below them."""


def write_page(study: Study, page: Path, pictures: Path) -> None:
    """Write the page and its pictures."""
    links = []
    for name, (draw, title, caption) in PICTURES.items():
        path = pictures / f"wrf_study_{name}.png"
        if draw(study, path):
            links.append(f"![{title}]({path.relative_to(page.parent).as_posix()})\n\n{title}. {caption}\n")
    page.write_text("\n".join(page_parts(study, links)), encoding="utf-8")


def page_parts(study: Study, links: Sequence[str] = ()) -> Iterator[str]:
    """Yield the parts of the page; ``links`` are its pictures with their captions."""
    design = study.design
    missing = sum(run.identity not in study.rows for run in study.plan.runs) + study.plan.later
    total = len(study.plan.runs) + study.plan.later
    stale = len(study.rows) - sum(map(len, study.finished.values()))
    yield HEAD.format(
        finished=total - missing,
        total=total,
        missing=missing,
        conclusion=conclusion(study),
        pictures="\n## At a glance\n\n" + "\n".join(links) if links else "",
        stale=f"\n{stale} rows of the file belong to other settings than these and are left out.\n" if stale else "",
        level=LEVEL,
        wrf=study.wrf,
        deciding=len(design.deciding_seeds),
        main=len(design.main_seeds),
        tests=markdown(comparisons(study)),
    )
    for amount in study.gains:
        yield f"## {amount:,} triplets\n\n{shown(main_table(study, amount))}\n"
    yield AFTER_TABLES
    for amount in design.main_amounts:
        heading = f"## Radius, scope and warm-up: {amount:,} triplets"
        yield f"{heading}\n\n{GRID_TABLE}\n\n{shown(grid_table(study, amount))}\n"
    why, noise = pair_table(study, "why", WHY, design.why_triplets), noise_table(study, design.noise_triplets)
    yield f"## Why, or why not: {design.why_triplets:,} triplets\n\n{SIDE_BY_SIDE}\n\n{shown(why)}\n"
    yield f"## Under label noise: {design.noise_triplets:,} triplets\n\n{shown(noise)}\n"
    heading = f"## Other models and tasks: {design.elsewhere_examples:,} training examples"
    yield f"{heading}\n\n{elsewhere_conclusion(study)}\n\n{shown(elsewhere_table(study))}\n"
    yield FOOT.format(
        seeds=", ".join(map(str, design.choosing_seeds)),
        choices=markdown(choice_table(study)),
        counts=markdown(counts(study)),
        provenance=shown(provenance(study)),
    )


def shown(table: Table) -> str:
    return markdown(table) if len(table) > 1 else "No run of this part is finished."
