r"""Run the main job on FashionIQ's real annotation files at their real size and report time and memory.

    python benchmarks/fashioniq_full_size.py --annotations <folder with captions/ and image_splits/>

The photographs cannot be shipped, so a drawn garment stands in for each of the 40,151 images that training and
validation need. Its looks depend on the image's name alone and do not show what the captions say: **the recall is near
chance and means nothing; only time, memory and the path from the folder to the final table count.** Whoever has the
photographs puts them into images/ and runs the same YAML:

    python -m lavis.train --cfg-path projects/wrf4cir/fiq_tiny.yaml \
        --options datasets.fashioniq.build_info.root=<folder>

An interrupted call is continued by the next one: pictures that are there are not drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import measure
from tqdm import tqdm

from lavis_cir_plugin.benchmarks import fashioniq
from lavis_cir_plugin.garments import draw_for_name

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "projects" / "wrf4cir" / "fiq_tiny.yaml"
CATEGORIES = ("dress", "shirt", "toptee")
FULL_SIZE = {"training triplets": 18_000, "queries": 6_016, "gallery images": 15_536}
# Lines of LAVIS's log at which a stage begins; what comes before the first is reading and start.
STAGE_OF_LINE = {"[INFO] Start training": "training", "[INFO] Evaluating on": "evaluation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="folder with captions/ and image_splits/")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "fashioniq_full_size", help="where it all goes")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--image-width", type=int, default=72, help="of the drawn pictures; their aspect is 4:5")
    parser.add_argument("--options", nargs="+", default=[], help="more overrides, such as run.wrf.gamma=0")
    args = parser.parse_args()

    root = args.work.absolute() / f"fashionIQ_dataset_{args.image_width}px"
    copy_annotations(args.annotations, root)
    start = time.perf_counter()
    drawn, present = draw_missing(needed_images(root), root / "images", args.image_width)
    drawing = time.perf_counter() - start
    counts = read_counts(root)

    job = Job()
    command = [sys.executable, "-u", "-W", "ignore", "-m", "lavis.train", "--cfg-path", str(CONFIG), "--options"]
    command += [f"datasets.fashioniq.build_info.root={root}", f"run.max_epoch={args.epochs}"]
    command += [f"run.output_dir={args.work.absolute() / 'run'}", *args.options]
    try:
        usage = measure.run(command, job.read_line)
    except subprocess.CalledProcessError as error:
        sys.exit(f"fashioniq_full_size: the job ended with status {error.returncode}; its own message stands above.")
    stages = job.stages(usage.seconds)

    is_full = "FashionIQ's real size" if counts == FULL_SIZE else f"NOT FashionIQ's real size: {FULL_SIZE}"
    rows = {
        "read": ", ".join(f"{count:,} {name}" for name, count in counts.items()) + f" ({is_full})",
        "pictures": f"{drawing:7.1f} s   {drawn:,} drawn, {present:,} already there, {args.image_width} px wide",
        "reading and start": f"{stages['start']:7.1f} s",
        "training": f"{stages['training']:7.1f} s   {args.epochs} epoch(s)",
        "evaluation": f"{stages['evaluation']:7.1f} s   after each epoch, and at the end with both single modalities",
        "job": f"{usage.seconds:7.1f} s   {usage.cpu_seconds:,.0f} s of processor time",
        "peak memory": f"{usage.peak_bytes / 2**20:7,.0f} MiB resident in the job's largest process",
        "machine": f"{os.cpu_count()} cores, CPU, {platform.platform()}, Python {platform.python_version()}",
        "output": str(job.output),
    }
    print("\nFashionIQ at full size: drawn pictures, so the recall above says nothing")
    print("\n".join(f"  {name:<18} {text}" for name, text in rows.items()))


def copy_annotations(source: Path, root: Path) -> None:
    """Copy the annotation files to where FashionIQ's users keep them."""
    needed = [
        source / folder / f"{stem}.{category}.{split}.json"
        for folder, stem in (("captions", "cap"), ("image_splits", "split"))
        for category in CATEGORIES
        for split in ("train", "val")
    ]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        sys.exit(
            f"fashioniq_full_size: {len(missing)} of {len(needed)} annotation files are missing (first: {missing[0]}); "
            "give --annotations the folder that holds captions/ and image_splits/."
        )
    for path in needed:
        place = root / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def needed_images(root: Path) -> dict[str, str]:
    """Map each image that a training triplet or a validation gallery names to its (first) category."""
    category_of: dict[str, str] = {}
    for category in CATEGORIES:
        triplets = json.loads((root / "captions" / f"cap.{category}.train.json").read_text(encoding="utf-8"))
        gallery = json.loads((root / "image_splits" / f"split.{category}.val.json").read_text(encoding="utf-8"))
        for name in [*(row[key] for row in triplets for key in ("candidate", "target")), *gallery]:
            category_of.setdefault(name, category)
    return category_of


def draw_missing(category_of: dict[str, str], folder: Path, width: int) -> tuple[int, int]:
    """Draw <name>.jpg for each image that has none yet, in one process per core; return (drawn, already there)."""
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in os.scandir(folder)}
    jobs = [
        (name, category, folder / f"{name}.jpg", width)
        for name, category in category_of.items()
        if f"{name}.jpg" not in present
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(_draw, jobs, chunksize=16), "drawing", len(jobs), unit="image", disable=not jobs):
            pass
    return len(jobs), len(category_of) - len(jobs)


def _draw(job: tuple[str, str, Path, int]) -> None:
    name, category, path, width = job
    part = path.with_suffix(f".{os.getpid()}.part")  # under its own name a picture is always whole
    draw_for_name(name, category, (width, width * 5 // 4)).save(part, "JPEG", quality=90)
    part.replace(path)


def read_counts(root: Path) -> dict[str, int]:
    """Count what the plugin's own reader finds.

    Raises:
        ValueError, FileNotFoundError: by the reader; no file may be missing or broken.
    """
    triplets, _ = fashioniq.read_train({"root": str(root)})
    groups = fashioniq.read_benchmark({"root": str(root)}, "val").groups
    queries, gallery = (sum(len(getattr(group, part)) for group in groups) for part in ("queries", "gallery"))
    return dict(zip(FULL_SIZE, (len(triplets), queries, gallery)))


@dataclass
class Job:
    """Follows the log of the job: passes it on and notes when each stage begins."""

    begun: float = field(default_factory=time.perf_counter)
    changes: list[tuple[float, str]] = field(default_factory=list)
    output: str = ""

    def read_line(self, line: str) -> None:
        """Print a line and take from it what it tells."""
        print(line, flush=True)
        for mark, stage in STAGE_OF_LINE.items():
            if mark in line:
                self.changes.append((time.perf_counter() - self.begun, stage))
        if "[INFO] output: " in line:
            self.output = line.split("[INFO] output: ")[1]

    def stages(self, total: float) -> dict[str, float]:
        """Return the seconds of each stage, summed over epochs; they add up to the total."""
        seconds = {"start": 0.0, "training": 0.0, "evaluation": 0.0}
        changes = [(0.0, "start"), *self.changes, (total, "end")]
        for (since, stage), (until, _) in zip(changes, changes[1:]):
            seconds[stage] += until - since
        return seconds


if __name__ == "__main__":
    main()
