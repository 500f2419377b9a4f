"""Say how many mined negatives of a run on drawn garments are right answers, because the world knows what it drew.

Per file of negatives: the share whose garment has all that the text says of the target (as far as the text's words are
those of the world's phrases), the share of another category, and in how many attributes a negative differs from the
target, beside those of two images drawn at random from the same category.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from lavis_cir_plugin.data.negatives import NegativeSets, load_negatives
from lavis_cir_plugin.garments.attributes import ATTRIBUTES, CATEGORIES, Garment
from lavis_cir_plugin.garments.fashioniq import FashionIQGarments, plan_split
from lavis_cir_plugin.garments.ground_truth import is_answer
from lavis_cir_plugin.garments.wording import Phrase, phrases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of retrieval_dpo runs on garments")
    parser.add_argument("--triplets", type=int, default=500, help="drawn at random from each file (default: 500)")
    arguments = parser.parse_args()
    for run in arguments.runs:
        garments = training_garments(run)
        for path in sorted((run / "negatives").glob("fashioniq_*.npz")):
            print(f"{path}\n  {measured(load_negatives(path), garments, arguments.triplets)}", flush=True)


def training_garments(run: Path) -> dict[str, Garment]:
    """Return every training image's garment by name, of the world that a run's config names."""
    config, _ = json.JSONDecoder().raw_decode((run / "log.txt").read_text(encoding="utf-8"))
    world = FashionIQGarments(**(config["datasets"]["fashioniq"].get("garments") or {}))
    return {
        name: garment
        for category in CATEGORIES
        for name, garment in plan_split(world, category, "train").images.items()
    }


def measured(sets: NegativeSets, garments: Mapping[str, Garment], count: int) -> str:
    rng = random.Random(0)
    chosen = rng.sample(range(len(sets.targets)), min(count, len(sets.targets)))
    same, right, differing, at_random = [], [], [], []
    by_category: dict[str, list[Garment]] = {}
    for garment in garments.values():
        by_category.setdefault(garment.category, []).append(garment)
    for row in chosen:
        reference, target = (garments[sets.names[index[row]]] for index in (sets.references, sets.targets))
        said = list(spoken(reference, target, sets.texts[row]))
        at_random.append(differences(target, rng.choice(by_category[target.category])))
        for index in sets.negatives[row]:
            if index < 0:
                continue
            wrong = garments[sets.names[index]]
            same.append(wrong.category == target.category)
            differing.append(differences(target, wrong))
            if said:
                right.append(wrong != reference and is_answer(wrong, reference, said, kept=()))
    return (
        f"{len(differing):,} negatives of {len(chosen)} triplets: of {100 * statistics.mean(right):.1f} % all that is "
        f"said is true; {100 - 100 * statistics.mean(same):.1f} % of another category; they differ from the target in "
        f"{statistics.mean(differing):.1f} of {len(ATTRIBUTES)} attributes (random images of its category: "
        f"{statistics.mean(at_random):.1f})"
    )


def spoken(reference: Garment, target: Garment, text: str) -> Iterator[Phrase]:
    """Yield what can be said of the pair and stands in the text, as whole words."""
    text = " ".join(text.lower().split())
    for options in phrases(reference, target).values():
        yield from (phrase for phrase in options if re.search(rf"\b{re.escape(phrase.text.lower())}\b", text))


def differences(one: Garment, other: Garment) -> int:
    return sum(getattr(one, name) != getattr(other, name) for name in ATTRIBUTES)


if __name__ == "__main__":
    main()
