"""Study whether weight perturbation does what WRF4CIR claims, on drawn garments, with controls of equal radius.

Each finished run leaves one row in a CSV, docs/results/wrf_study.csv for the whole study, and a run whose row is there
is skipped: commit the file now and then, and another machine goes on from it. Settings are chosen in one drawn world
and used in another. docs/results/wrf_study_plan.md says what is asked and what would count as an answer.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from study.design import DEMO, FULL, QUICK, Design, Run
from study.page import write_page
from study.results import Result, append_result, read_results
from study.tables import Study, aligned, comparisons, counts, main_table

ROOT = Path(__file__).parents[1]
DESIGNS = {"full": FULL, "quick": QUICK, "demo": DEMO}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    quick = "a quarter of an hour on two cores: one size, one seed, and settings that nothing has chosen"
    sizes.add_argument("--quick", dest="design", action="store_const", const="quick", default="full", help=quick)
    sizes.add_argument("--demo", dest="design", action="store_const", const="demo", help="plain, random and WRF alone")
    patterns = "runs by part/row/triplets/seed, such as 'main/*/1000/*' or '*/plain/*'"
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=patterns)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; each computes on one core")
    parser.add_argument("--limit", type=int, help="largest number of runs to do now")
    parser.add_argument("--work", type=Path, default=Path("output/wrf_study"), help="folder of what need not be kept")
    parser.add_argument("--list", action="store_true", help="name the missing runs and end")
    parser.add_argument("--page", action="store_true", help="write the page of the whole study and end")
    args = parser.parse_args()
    design, work = DESIGNS[args.design], args.work.absolute()
    results = ROOT / "docs/results/wrf_study.csv" if design is FULL else work / f"{design.name}.csv"
    if args.list:
        missing = missing_runs(design, results, args.only)
        print("\n".join(f"{run.key}  {' '.join(run.row.options)}" for run in missing))
    elif not args.page and not run_missing(design, results, args.only, work, args.jobs, args.limit):
        sys.exit("wrf_study: runs have failed, their own messages stand above; the same command tries them again.")
    show(Study(design, read_results(results)))


def show(study: Study) -> None:
    """Write the page of the whole study, or print the tables of a small one."""
    print("\n" + aligned(counts(study)))
    if study.design is FULL:
        page = ROOT / "docs/results.md"
        write_page(study, page, ROOT / "docs/results")
        print(f"\nWritten to {page}")
        return
    for amount in study.design.main_amounts:
        print(f"\n{amount:,} triplets, mean of R@10 and R@50 in percent\n" + aligned(main_table(study, amount)))
    print("\n" + aligned(comparisons(study)))


def missing_runs(design: Design, results: Path, only: Sequence[str]) -> list[Run]:
    """Return the runs without a row whose settings are known."""
    rows = read_results(results)
    runs = Study(design, rows).plan.runs
    return [run for run in runs if run.identity not in rows and is_asked(run, only)]


def is_asked(run: Run, only: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(run.key, pattern) for pattern in only)


def run_missing(
    design: Design, results: Path, only: Sequence[str], work: Path, jobs: int, limit: int | None = None
) -> bool:
    """Run what is missing, and what becomes known by it; return whether nothing failed."""
    done = 0
    while runs := missing_runs(design, results, only):
        runs = runs[: limit - done] if limit is not None else runs
        if not runs:
            break
        began = time.perf_counter()
        print(f"{len(runs)} runs; first what they start from", flush=True)
        failed = 0
        for number, (run, outcome) in enumerate(outcomes(design, runs, work, results, jobs), start=1):
            failed += isinstance(outcome, str)
            left = (time.perf_counter() - began) / number * (len(runs) - number) / 60
            words = f"failed\n{outcome}" if isinstance(outcome, str) else summary(outcome)
            print(f"[{number}/{len(runs)}, {left:.0f} min left] {run.key}: {words}", flush=True)
        if failed:
            return False
        done += len(runs)
    return True


def summary(row: Result) -> str:
    return f"val {row['val_last']}, stopped {row['val_stopped']}, train {row['train_last']}, {row['run_seconds']} s"


def outcomes(
    design: Design, runs: Sequence[Run], work: Path, results: Path, jobs: int
) -> Iterator[tuple[Run, Result | str]]:
    """Yield each run with its row, or with what went wrong, as they end."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they import torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(runs)), mp_context=context) as pool:
        pool.submit(prepare_starts, design, list(runs), work).result()
        commit = checkout()  # now, because the processes keep the code that they import
        futures = {pool.submit(run_once, design, run, work, results, commit): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def prepare_starts(design: Design, runs: list[Run], work: Path) -> None:
    """Draw the worlds and train the starts, before several processes need them."""
    from study.runs import prepare  # LAVIS takes seconds to import, which only the processes need

    prepare(design, runs, work)


def checkout() -> str:
    """Return the first digits of the commit, with ``+`` where files other than the results were changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!docs/results", ":!docs/results.md").strip()
    return (git("rev-parse", "HEAD").strip()[:7] or "unknown") + ("+" if changed else "")


def run_once(design: Design, run: Run, work: Path, results: Path, commit: str) -> Result | str:
    """Run, and write the row; return the row, or the error's text."""
    from study.runs import execute

    try:
        row = execute(design, run, work, commit)
    except Exception:
        return traceback.format_exc()
    append_result(results, row)
    return row


if __name__ == "__main__":
    main()
