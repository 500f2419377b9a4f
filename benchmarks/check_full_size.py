"""Time ``lavis-cir check`` on a folder of CIRCO's size: 123,403 (empty) image files, made in a temporary folder."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import measure

IMAGES, QUERIES = 123_403, {"val": 220, "test": 800}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"number of files (default: {IMAGES})")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_circo(Path(folder), arguments.images)
        command = [sys.executable, "-W", "ignore", "-m", "lavis_cir_plugin.commands.main", "check", folder]
        usage = measure.run(command, print)
    print(f"in all {usage.seconds:.1f} s with the start of Python, {usage.peak_bytes / 2**20:,.0f} MiB")


def write_circo(root: Path, images: int) -> None:
    """Write CIRCO's annotation files about images 0, 1, 2, ..., and these as empty files."""
    pictures = root / "COCO2017_unlabeled" / "unlabeled2017"
    listed = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(images)]
    write_json(root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json", {"images": listed})
    for split, count in QUERIES.items():
        records = [
            {
                "id": number,
                "reference_img_id": number,
                "relative_caption": "is another one",
                "shared_concept": "a thing",
                **({"target_img_id": number + 1, "gt_img_ids": [number + 1]} if split == "val" else {}),
            }
            for number in range(min(count, images - 1))
        ]
        write_json(root / "annotations" / f"{split}.json", records)
    pictures.mkdir()
    for image in listed:
        (pictures / str(image["file_name"])).touch()


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
