"""``lavis-cir triplets``: training triplets from any captioned image set, without weights and without a download.

A caption is edited (`caption_edits`), the modification is written by a template, and of the captions that hold what the
edit puts there the nearest one names the target. Source: TransAgg (Liu et al., 2023, arXiv 2306.07272), which edits by
templates (and by a language model) and takes the nearest caption of a web-scale set.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import shlex
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.benchmarks.captions import caption_records
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.caption_edits import Edit, Phrases, plain
from lavis_cir_plugin.index import build_index
from lavis_cir_plugin.whole_files import replace_file

COUNT, CLIP_SIMILARITY, WORDS_SIMILARITY = 10_000, 0.9, 0.7
"""Triplets that are made, and least cosine of an edited caption and the target's, by CLIP and by words."""

CANDIDATES = 20
"""Captions near an edited one that are looked at."""

SHEET_ROWS, _CAPTION_WIDTH = 12, 330
"""Triplets on a contact sheet, and pixels."""

LARGEST_EXACT = 20_000
"""Captions that are compared with an edited one without an index; FAISS finds the nearest of more."""

_FEWEST, _ROUND, _MOST_TRIED, _SCORES = 1_000, 50_000, 40, 10_000_000
_BLOCK = 8_192  # captions whose features are computed at a time
_STEPS = 2048  # a feature's entries count in steps of 1/2048, which float16 holds, and sums of products float32


@dataclass(frozen=True)
class Captions:
    """A captioned image set.

    Attributes:
        names: The pictures, in the file's order.
        texts: The captions, each once per picture.
        images: Number of each caption's picture.
    """

    names: list[str]
    texts: list[str]
    images: list[int]


@dataclass(frozen=True)
class SyntheticTriplet:
    """One made triplet: the edit, the row of the target's caption, and how near that is."""

    edit: Edit
    target: int
    target_row: int
    similarity: float


@dataclass
class Made:
    """What was made, and what became of the edits that were tried."""

    triplets: list[SyntheticTriplet] = field(default_factory=list)
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Features(Protocol):
    """Something that turns captions into features ``(N, D)`` of length 1, on the CPU."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the features."""
        ...


class HashedWords:
    r"""Words and pairs of words, weighted by how rare they are: tf-idf, hashed to a fixed width.

    .. math:: f_d = \sum_{w: h(w) = d} \pm n_w (1 + \log \frac{1 + N}{1 + N_w})

    then scaled to length 1; n: how often in the caption; N captions, of which N_w hold w. What none holds counts
    nothing. Entries are rounded, so that sums do not depend on their order. Source: feature hashing (Weinberger et al.,
    2009).
    """

    def __init__(self, captions: Sequence[str], width: int = 1024) -> None:
        """Count the words of the captions, which are as `plain` writes them."""
        held = Counter(term for caption in captions for term in set(_terms(caption)))
        self.width = width
        self._entries: dict[str, tuple[int, float]] = {}
        for term, count in held.items():
            code = zlib.crc32(term.encode())
            weight = 1 + math.log((1 + len(captions)) / (1 + count))
            self._entries[term] = (code // 2 % width, weight if code % 2 else -weight)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return features ``(N, D)``, float32; zero for a caption without a known word."""
        parts = [self._features(captions[start : start + _BLOCK]) for start in range(0, len(captions), _BLOCK)]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def _features(self, captions: Sequence[str]) -> Tensor:
        places: list[int] = []
        values: list[float] = []
        for row, caption in enumerate(captions):
            entries = [entry for entry in map(self._entries.get, _terms(caption)) if entry is not None]
            places.extend(row * self.width + column for column, _ in entries)
            values.extend(value for _, value in entries)
        flat = np.bincount(np.array(places, dtype=np.int64), np.array(values), len(captions) * self.width)
        return _rounded(F.normalize(torch.from_numpy(flat).view(len(captions), self.width), dim=1))


class ClipWords:
    """The text tower of a CLIP model of open_clip."""

    def __init__(self, clip_model: str, pretrained: str | None, batch_size: int = 256) -> None:
        """Load the model; raises what its loader raises."""
        from lavis_cir_plugin.open_clip_towers import TextTower, load_clip

        self._batch_size = batch_size
        self._tower = TextTower(load_clip(clip_model, pretrained), clip_model)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tower.to(self._device).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return features ``(N, D)``, float32."""
        parts = []
        starts = range(0, len(captions), self._batch_size)
        for start in tqdm(starts, "reading captions", unit="batch", disable=None, leave=False):
            ids = self._tower.tokenize(captions[start : start + self._batch_size])
            parts.append(_rounded(F.normalize(self._tower(ids).double(), dim=1)).cpu())
        return torch.cat(parts)


def _terms(caption: str) -> list[str]:
    words = caption.split()
    return [*words, *(f"{first} {second}" for first, second in zip(words, words[1:]))]


def _rounded(features: Tensor) -> Tensor:
    return ((features * _STEPS).round() / _STEPS).float()


# -- making ----------------------------------------------------------------------------------------------------------


def make_triplets(
    captions: Captions,
    features: Features | None = None,
    count: int = COUNT,
    seed: int = 0,
    similarity: float | None = None,
) -> Made:
    """Make triplets; equal arguments give equal ones, whatever the number of threads.

    An edit becomes a triplet if there is another picture with a caption that

    * holds what the edit puts there (or, where it only drops something, has nothing in that place),
    * is, as a whole, at least ``similarity`` near to the edited caption, and
    * no caption of that picture holds what the edit takes away; nor does one of the reference hold what it puts there.

    Of several the picture is taken whose captions, together, are nearest to all captions of the reference after the
    edit. No two triplets have the same reference and target.

    Args:
        captions: The image set.
        features: `HashedWords` of these captions by default.
        count: How many triplets, at most.
        seed: Draws the edits and templates.
        similarity: Least cosine; by default `WORDS_SIMILARITY`, or `CLIP_SIMILARITY` with given features.

    Raises:
        ValueError: the captions are of fewer than two pictures, or share too few contexts for any exchange.
    """
    if len(captions.names) < 2:
        raise ValueError(f"triplets need captions of at least 2 images, got {len(captions.names)}.")
    phrases = Phrases(captions.texts, captions.images)
    maker = _Maker(captions, phrases, features, similarity)
    made, rng = Made(), random.Random(f"synthetic triplets/{seed}")
    used: set[tuple[int, int]] = set()
    known: set[tuple[int, str]] = set()
    order: list[int] = []
    with tqdm(total=count, desc="making triplets", unit="triplet", disable=None) as bar:
        while len(made.triplets) < count and made.tried < _MOST_TRIED * max(count, len(captions.names)):
            wanted = count - len(made.triplets)
            rate = max(0.1, len(made.triplets) / made.tried) if made.tried else 0.5
            number = min(max(_FEWEST, math.ceil(1.2 * wanted / rate)), _ROUND)
            edits, before = [], len(made.triplets)
            for _ in range(number):
                if not order:
                    order = rng.sample(range(len(captions.names)), len(captions.names))
                edit = phrases.draw(order.pop(), rng)
                made.tried += 1
                if edit is None:
                    made.refused["no exchangeable phrase was drawn"] += 1
                elif (edit.row, edit.edited) in known:
                    made.refused["tried before"] += 1
                else:
                    known.add((edit.row, edit.edited))
                    edits.append(edit)
            for edit, found in zip(edits, maker.targets(edits, used)):
                if isinstance(found, str):
                    made.refused[found] += 1
                elif (edit.image, found.target) in used:
                    made.refused["the two images are a triplet already"] += 1
                elif len(made.triplets) < count:
                    used.add((edit.image, found.target))
                    made.triplets.append(found)
                    bar.update()
                else:
                    made.tried -= 1  # beyond what was asked for
            if len(made.triplets) - before < 0.002 * number:
                break
    return made


class _Maker:
    def __init__(
        self, captions: Captions, phrases: Phrases, features: Features | None, similarity: float | None
    ) -> None:
        self.captions, self.phrases = captions, phrases
        texts = [plain(text) for text in captions.texts]
        numbers: dict[str, int] = {}
        self.distinct = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        self.features = HashedWords(texts) if features is None else features
        default = WORDS_SIMILARITY if features is None else CLIP_SIMILARITY
        self.similarity = default if similarity is None else similarity
        distinct = list(numbers)
        self.gallery = torch.cat(
            [self.features(distinct[start : start + _ROUND]).half() for start in range(0, len(distinct), _ROUND)]
        )
        self.of_caption: list[list[int]] = [[] for _ in numbers]
        said: list[list[str]] = [[] for _ in captions.names]
        self.rows_of: list[list[int]] = [[] for _ in captions.names]
        for row, image in enumerate(captions.images):
            self.of_caption[self.distinct[row]].append(row)
            said[image].append(" ".join(phrases.rows[row]))  # a second blank stands for punctuation
            self.rows_of[image].append(row)
        self.said = [f" {' | '.join(own)} " for own in said]
        rows = self.gallery.numpy()
        self.means = np.zeros((len(captions.names), rows.shape[1]), dtype=np.float16)
        for number, own in enumerate(self.rows_of):
            self.means[number] = rows[self.distinct[own]].mean(axis=0, dtype=np.float32)

    def targets(self, edits: Sequence[Edit], used: set[tuple[int, int]]) -> list[SyntheticTriplet | str]:
        """Find the target of each edit, or why there is none."""
        found: list[SyntheticTriplet | str] = ["no other caption holds the edited phrase"] * len(edits)
        by_holder: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, edit in enumerate(edits):
            if edit.new and f" {edit.new} " in self.said[edit.image]:
                found[number] = "the reference has it already"
            else:
                by_holder[edit.holder].append(number)
        features = self.features([edit.edited for edit in edits]) if edits else torch.empty(0)
        for holder, numbers in sorted(by_holder.items()):
            candidates = np.unique(self.distinct[self.phrases.rows_holding(holder)])
            gallery = self.gallery[torch.from_numpy(candidates)].float()
            scores, places = nearest(features[numbers], gallery, min(CANDIDATES, len(candidates)))
            for number, score, place in zip(numbers, scores.tolist(), places.tolist()):
                near = [(int(candidates[p]), s) for p, s in zip(place, score) if p >= 0]
                found[number] = self._target(edits[number], features[number], near, used)
        return found

    def _target(
        self, edit: Edit, feature: Tensor, near: Sequence[tuple[int, float]], used: set[tuple[int, int]]
    ) -> SyntheticTriplet | str:
        """Choose among captions, the nearest first."""
        choices: list[SyntheticTriplet] = []
        reason, seen = "no other image's caption holds the edited phrase", set()
        for caption, score in near:
            for row in self.of_caption[caption]:
                image = self.captions.images[row]
                if image == edit.image or (edit.new and f" {edit.new} " not in self.said[image]):
                    continue
                if score < self.similarity:
                    reason = "the nearest caption is too far from the edited one" if not choices else reason
                elif edit.old and f" {edit.old} " in self.said[image]:
                    reason = "the target has the replaced phrase too"
                elif (edit.image, image) in used:
                    reason = "the two images are a triplet already"
                elif image not in seen:
                    seen.add(image)
                    choices.append(SyntheticTriplet(edit, image, row, score))
        if not choices:
            return reason
        # Elementwise and in order: a matrix product would depend on the number of threads.
        own, now = self.means[edit.image].astype(np.float32), self.gallery[self.distinct[edit.row]].float().numpy()
        wanted = own + (feature.numpy() - now) / len(self.rows_of[edit.image])
        others = self.means[[choice.target for choice in choices]].astype(np.float32)
        agreement = (others * wanted).sum(axis=1) / np.sqrt((others**2).sum(axis=1)).clip(1e-6)
        return choices[int(agreement.argmax())]


def nearest(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return scores and places ``(Q, k)`` of the nearest rows, best first, of equal ones the first.

    A gallery of up to `LARGEST_EXACT` is compared in full; FAISS finds the nearest of a larger one. Of features as
    they are rounded here float32 sums are exact, so that neither the number of threads nor the way makes a difference.
    """
    if len(gallery) > LARGEST_EXACT:
        return build_index("flat", gallery).search(query, k)
    count, parts = len(gallery), []
    for part in query.split(max(1, _SCORES // count)):
        scores = torch.from_numpy(part.numpy() @ gallery.numpy().T)
        # One whole number of score and place has no ties, which would be in no particular order.
        steps = (scores.double() * _STEPS**2).long() * count + torch.arange(count - 1, -1, -1)
        places = count - 1 - steps.topk(k, dim=1).values % count
        parts.append((scores.gather(1, places).double(), places))
    values, places = (torch.cat(found) for found in zip(*parts))
    return values, places


# -- files -----------------------------------------------------------------------------------------------------------


def read_captions(path: Path) -> Captions:
    """Read captions from any file that the data set ``image_captions`` reads.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, holds no captions, or a record has no image or caption.
    """
    numbers: dict[str, int] = {}
    texts, images = [], []
    known: set[tuple[int, str]] = set()
    for record in caption_records(path, remedy="name a file of captions"):
        for text in record.captions:
            image = numbers.setdefault(record.image, len(numbers))
            if (image, text) not in known:
                known.add((image, text))
                texts.append(text)
                images.append(image)
    return Captions(list(numbers), texts, images)


def as_lines(captions: Captions, triplets: Sequence[SyntheticTriplet]) -> str:
    """Write triplets as JSON lines of the data set ``triplets``."""
    return "".join(
        json.dumps(
            {
                "reference": captions.names[triplet.edit.image],
                "text": triplet.edit.text,
                "target": captions.names[triplet.target],
                "reference_caption": captions.texts[triplet.edit.row],
            },
            ensure_ascii=False,
        )
        + "\n"
        for triplet in triplets
    )


# -- the command -----------------------------------------------------------------------------------------------------


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir triplets``."""
    parser = subparsers.add_parser("triplets", help="make training triplets from captioned images")
    parser.add_argument(
        "captions",
        metavar="CAPTIONS",
        help='JSON lines {"image": ..., "caption": ...}, or a caption annotation of LAVIS; a caption may be a list',
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where train.jsonl is written")
    parser.add_argument(
        "--images", metavar="FOLDER", help="the images; only the contact sheet and the closing line need it"
    )
    parser.add_argument("--count", type=int, default=COUNT, help=f"triplets to make, at most (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same file (default: 0)")
    parser.add_argument(
        "--similarity",
        type=float,
        help=f"least cosine of an edited and a target's caption (default {WORDS_SIMILARITY}, CLIP: {CLIP_SIMILARITY})",
    )
    parser.add_argument(
        "--clip-model", metavar="NAME", help="compare captions by this open_clip model; default: by words"
    )
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="its weights")
    parser.add_argument("--contact-sheet", metavar="PNG", help="picture of some of the triplets; needs --images")
    parser.add_argument("--overwrite", action="store_true", help="replace a train.jsonl that is there")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    path, output = Path(os.path.expanduser(args.captions)), Path(os.path.expanduser(args.output)) / "train.jsonl"
    images = Path(os.path.expanduser(args.images)) if args.images else None
    sheet = Path(os.path.expanduser(args.contact_sheet)) if args.contact_sheet else None
    _check(args, output, images, sheet)
    captions = read_captions(path)
    features = ClipWords(args.clip_model, args.pretrained) if args.clip_model else None
    made = make_triplets(captions, features, args.count, args.seed, args.similarity)
    print(summary(captions, made, args.count))
    if not made.triplets:
        raise ValueError(
            f"no triplet was made of {path}: give more captions, or several per image, or lower --similarity."
        )
    picture = contact_sheet(captions, made.triplets, images, args.seed) if sheet and images else b""
    replace_file(output, as_lines(captions, made.triplets).encode())
    if sheet:
        replace_file(sheet, picture)
    print(f"Written: {output}{f' and {sheet}' if sheet else ''}")
    if images is None:
        print("Train with these options, in place of IMAGES the folder of the images:")
    else:
        print("Train with these options:")
    options = {"root": output.parent, "images": images or "IMAGES"}
    if images is not None and images.resolve() == (output.parent / "images").resolve():
        del options["images"]
    words = [shlex.quote(f"datasets.triplets.build_info.{key}={folder}") for key, folder in options.items()]
    print(" ".join(["--options", *words]))


def _check(args: argparse.Namespace, output: Path, images: Path | None, sheet: Path | None) -> None:
    if args.count < 1:
        raise ValueError(f"--count must be a whole number >= 1, got {args.count}.")
    if args.similarity is not None and not -1 <= args.similarity <= 1:
        raise ValueError(f"--similarity must lie in [-1, 1], got {args.similarity}.")
    if bool(args.pretrained) != bool(args.clip_model):
        raise ValueError("--clip-model and --pretrained need each other: a model of open_clip, and its tag or file.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite.")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; give the folder of the images.")
    if sheet is not None and images is None:
        raise ValueError("--contact-sheet needs --images, the folder of the images.")
    if sheet is not None and sheet.suffix != ".png":
        raise ValueError(f"--contact-sheet {sheet}: the picture is a PNG; choose a name that ends in .png.")


def summary(captions: Captions, made: Made, count: int) -> str:
    """Say what was made, what was refused and why, and show examples."""
    lines = [
        f"{len(made.triplets):,} triplets of {count:,} wanted, from {len(captions.texts):,} captions of "
        f"{len(captions.names):,} images; {made.tried:,} edits tried",
        *(f"  {number:>9,} refused: {reason}" for reason, number in made.refused.most_common()),
    ]
    for triplet in made.triplets[:: max(1, len(made.triplets) // 5)][:5]:
        lines += [
            f'  "{captions.texts[triplet.edit.row]}"',
            f'    {triplet.edit.text}: "{captions.texts[triplet.target_row]}" ({triplet.similarity:.2f})',
        ]
    return "\n".join(lines)


def contact_sheet(captions: Captions, triplets: Sequence[SyntheticTriplet], images: Path, seed: int) -> bytes:
    """Draw some triplets, chosen at random: reference, modification, target, and both captions; a PNG.

    Raises:
        FileNotFoundError, ValueError: a picture is missing or broken.
    """
    from PIL import Image, ImageDraw

    from lavis_cir_plugin import report

    chosen = sorted(random.Random(seed).sample(range(len(triplets)), min(SHEET_ROWS, len(triplets))))
    target_left = report.MARGIN + report.PICTURE[0] + 2 * report.GAP + report.TEXT_WIDTH
    caption_left = target_left + report.PICTURE[0] + report.GAP
    row_height = report.PICTURE[1] + report.LABEL_HEIGHT + report.GAP
    width = caption_left + _CAPTION_WIDTH + report.MARGIN
    top = report.MARGIN + 72 + report.LABEL_HEIGHT
    sheet = Image.new("RGB", (width, top + len(chosen) * row_height + report.MARGIN), report.WHITE)
    draw = ImageDraw.Draw(sheet)
    note = f"{len(chosen)} of {len(triplets):,}, chosen at random with seed {seed}"
    draw.text((report.MARGIN, report.MARGIN), "Synthetic triplets", report.BLACK, report._font(26))
    draw.text((report.MARGIN, report.MARGIN + 40), note, report.GREY, report._font(15))
    text_left = report.MARGIN + report.PICTURE[0] + report.GAP
    titles = {report.MARGIN: "reference", text_left: "modification text", target_left: "target"}
    for x, title in {**titles, caption_left: "captions of reference and target"}.items():
        draw.text((x, top - report.LABEL_HEIGHT), title, report.GREY, report._font(13))
    for number, index in enumerate(chosen):
        triplet, y = triplets[index], top + number * row_height
        for left, image in ((report.MARGIN, triplet.edit.image), (target_left, triplet.target)):
            path = images / captions.names[image]
            open_rgb(path)  # raises a sentence
            report._draw_picture(sheet, (left, y), path)
        report._draw_text(draw, (text_left, y), triplet.edit.text)
        for step, row in enumerate((triplet.edit.row, triplet.target_row)):
            lines = report._wrap(captions.texts[row], 14, _CAPTION_WIDTH)[:3]
            place = (caption_left, y + step * report.PICTURE[1] // 2)
            draw.text(place, "\n".join(lines), report.GREY, report._font(14), spacing=4)
        draw.text(
            (text_left, y + report.PICTURE[1]),
            f"similarity {triplet.similarity:.2f}",
            report.GREY,
            report._font(13),
            anchor="ls",
        )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
