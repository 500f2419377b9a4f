"""Write drawn garments with questions and captions in the files that LAVIS's COCO data sets read.

Every picture shows another garment. A question is about one visible attribute. For each kind of question all answers
are equally often right, in training and in validation, so the question alone gives no more than chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lavis_cir_plugin.core.settings import Positive, Section, one_of

from .attributes import CATEGORIES, COLOURS, Garment, attributes, is_held_out, sample
from .wording import description, full_description, tokens
from .world import HeldOut, Pixels, World, explain_full_disk, write_json, write_pictures

GENERATOR_VERSION = 1
"""Version in the cache key. Raise it whenever the written files change."""

SPLITS = ("train", "val")

DESCRIPTIONS = {"short": description, "full": full_description}

_DRESS, _TOPS = ("dress",), ("shirt", "toptee")
_NOUNS = {"dress": "dress", "shirt": "shirt", "toptee": "top"}
# VQA's scorer takes ten answers of ten people for each question, and three equal answers score in full.
_ANNOTATORS = 10


@dataclass(frozen=True)
class QuestionGarments(Section):
    """Sizes of a drawn world with questions and captions.

    Attributes:
        seed: Seed of everything.
        train_images, val_images: Number of pictures of the split, each of another garment.
        captions_per_image: Number of descriptions of a picture.
        captions: What a description says: colour, pattern and two details (``short``), or up to five (``full``).
        image_width, image_height: Pixels of a picture.
        held_out: Expected share of the (colour, pattern, sleeve) combinations that training never shows.

    Raises:
        ValueError: If a value is not allowed; the message has one line for each.
    """

    WHERE = "garments"

    seed: int = 0
    train_images: Positive = 3000
    val_images: Positive = 600
    captions_per_image: Positive = 5
    captions: Annotated[str, one_of(DESCRIPTIONS)] = "short"
    image_width: Pixels = 64
    image_height: Pixels = 80
    held_out: HeldOut = 0.2


@dataclass(frozen=True)
class Kind:
    """A kind of question: its attribute, its wordings ({} stands for the garment's noun), answers and categories.

    answers: answer by attribute value; no question is asked about a garment with another value. Answers contain no
    article, numeral or punctuation, because VQA's scorer would rewrite them.
    """

    name: str
    attribute: str
    wordings: tuple[str, ...]
    answers: Mapping[str, str]
    categories: tuple[str, ...] = CATEGORIES


KINDS = (
    Kind(
        "what color",
        "colour",
        ("what color is the {}?", "what is the main color of the {}?", "which color does the {} have?"),
        {colour: colour for colour in COLOURS},
    ),
    Kind(
        "what pattern",
        "pattern",
        ("what pattern does the {} have?", "what is the print of the {}?", "how is the {} patterned?"),
        {
            "solid": "solid",
            "stripes": "horizontal stripes",
            "vertical stripes": "vertical stripes",
            "dots": "polka dots",
            "plaid": "plaid",
            "floral": "flowers",
            "zigzag": "zigzags",
            "two tone": "color block",
        },
    ),
    Kind(
        "what sleeves",
        "sleeve",
        ("how long are the sleeves of the {}?", "what sleeves does the {} have?"),
        {"sleeveless": "sleeveless", "short": "short", "elbow": "elbow length", "long": "long"},
    ),
    Kind(
        "what neckline",
        "neckline",
        ("what is the neckline of the {}?", "which neckline does the {} have?"),
        {
            "v": "v neck",
            "square": "square neck",
            "round": "round neck",
            "boat": "boat neck",
            "collar": "collar",
            "high": "turtleneck",
        },
    ),
    Kind(
        "how long is the dress",
        "length",
        ("how long is the {}?", "what is the length of the {}?"),
        {"mini": "mini", "knee": "knee length", "midi": "calf length", "maxi": "floor length"},
        _DRESS,
    ),
    Kind(
        "how long is the top",
        "length",
        ("how long is the {}?", "what is the length of the {}?"),
        {"cropped": "waist length", "regular": "hip length", "tunic": "thigh length"},
        _TOPS,
    ),
    Kind(
        "what is on",
        "graphic",
        ("what is on the chest of the {}?", "what is printed on the {}?"),
        {"star": "star", "heart": "heart", "lettering": "letters", "circle": "circle", "moon": "moon"},
        _TOPS,
    ),
    Kind(
        "is there a belt",
        "belt",
        ("does the {} have a belt?", "is there a belt?"),
        {"no": "no", "yes": "yes"},
        _DRESS,
    ),
    Kind(
        "are there buttons",
        "buttons",
        ("does the {} have buttons?", "are there buttons on the {}?"),
        {"no": "no", "yes": "yes"},
    ),
    Kind("is it striped", "pattern", ("is the {} striped?", "are there stripes on the {}?"), {
        "solid": "no", "dots": "no", "plaid": "no", "floral": "no", "two tone": "no",
        "stripes": "yes", "vertical stripes": "yes",
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its right answer."""

    image: str
    kind: str
    text: str
    answer: str


def image_id(file_name: str) -> int:
    """Return the number at the end of a picture's file name, which is its id as in COCO's names."""
    return int(Path(file_name).stem.rpartition("_")[2])


def plan_pictures(config: QuestionGarments) -> dict[str, dict[str, Garment]]:
    """Plan the garments by split and file name. The plan depends on `config` alone.

    No garment occurs twice, neither in one split nor in both, and training shows no held-out combination.
    """
    rng = random.Random(f"garments/questions/{config.seed}")
    seen: set[tuple[str, ...]] = set()
    plan: dict[str, dict[str, Garment]] = {}
    number = 0
    for split, count in zip(SPLITS, (config.train_images, config.val_images)):
        plan[split] = {}
        while len(plan[split]) < count:
            category = rng.choice(CATEGORIES)
            garment = sample(category, rng)
            key = (category, *attributes(garment))
            if key in seen or (split == "train" and is_held_out(garment, config.held_out)):
                continue
            seen.add(key)
            number += 1
            plan[split][f"garments_{split}_{number:08d}.jpg"] = garment
    return plan


def plan_questions(
    config: QuestionGarments, split: str, pictures: Mapping[str, Garment], section: str = "garments_vqa"
) -> list[Question]:
    """Return questions about the pictures of a split: per kind, each answer as often as the rarest answer allows.

    section: name of the data set that is being built, for error messages; the captions' data set uses the same world.

    Raises:
        ValueError: If the pictures are too few for any kind of question.
    """
    rng = random.Random(f"garments/questions/{config.seed}/{split}")
    questions = [question for kind in KINDS for question in _balanced(kind, pictures, rng)]
    if not questions:
        raise ValueError(
            f"garments: {len(pictures)} pictures show no kind of question with all of its answers; raise "
            f"datasets.{section}.garments.{split}_images."
        )
    rng.shuffle(questions)
    return questions


def _balanced(kind: Kind, pictures: Mapping[str, Garment], rng: random.Random) -> Iterator[Question]:
    by_answer: dict[str, list[str]] = {answer: [] for answer in kind.answers.values()}
    for name, garment in pictures.items():
        answer = kind.answers.get(getattr(garment, kind.attribute))
        if answer is not None and garment.category in kind.categories:
            by_answer[answer].append(name)
    count = min(len(names) for names in by_answer.values())
    for answer, names in by_answer.items():
        for name in rng.sample(names, count):
            text = rng.choice(kind.wordings).format(_NOUNS[pictures[name].category])
            yield Question(name, kind.name, text, answer)


def plan_captions(config: QuestionGarments, split: str, pictures: Mapping[str, Garment]) -> dict[str, list[str]]:
    """Return ``captions_per_image`` descriptions of each picture of a split, by file name."""
    rng = random.Random(f"garments/captions/{config.seed}/{split}")
    return {
        name: [DESCRIPTIONS[config.captions](garment, rng) for _ in range(config.captions_per_image)]
        for name, garment in pictures.items()
    }


def answers() -> list[str]:
    """Return every answer once, sorted."""
    return sorted({answer for kind in KINDS for answer in kind.answers.values()})


def guess_rate(questions: Sequence[Question]) -> float:
    """Return the percentage of questions that the best constant answer per kind gets right, or 0 without questions."""
    kinds = {kind.name: len(set(kind.answers.values())) for kind in KINDS}
    return 100 * sum(1 / kinds[question.kind] for question in questions) / max(len(questions), 1)


def write_questions(
    root: Path,
    config: QuestionGarments,
    progress: bool = True,
    workers: int | None = None,
    section: str = "garments_vqa",
) -> Path:
    """Write images/ and the annotation files of LAVIS's COCO-VQA and COCO-caption data sets below `root`; return it.

    ``vqa_train.json`` and ``vqa_val.json`` hold the questions, ``answer_list.json`` the candidate answers,
    ``questions_val.json`` and ``annotations_val.json`` VQA's own files for its scorer, ``caption_train.json`` a record
    per caption and ``caption_val.json`` a record per picture. The files depend on `config` alone and not on `workers`.

    Raises:
        OSError: If a file cannot be written. The message says so if the disk is full.
    """
    root = Path(root)
    plan = plan_pictures(config)
    size = (config.image_width, config.image_height)
    pictures = {name: garment for split in plan.values() for name, garment in split.items()}
    with explain_full_disk(root, len(pictures), size):
        write_json(root / "answer_list.json", answers())
        for split, garments in plan.items():
            questions = plan_questions(config, split, garments, section)
            write_json(root / f"vqa_{split}.json", lavis_records(questions, with_answers=split == "train"))
            described = plan_captions(config, split, garments)
            if split == "train":
                rows: list[dict[str, Any]] = [
                    {"image": name, "caption": text, "image_id": image_id(name)}
                    for name, texts in described.items()
                    for text in texts
                ]
            else:
                rows = [{"image": name, "caption": texts} for name, texts in described.items()]
                write_json(root / f"questions_{split}.json", coco_questions(questions))
                write_json(root / f"annotations_{split}.json", coco_annotations(questions))
            write_json(root / f"caption_{split}.json", rows)
        write_pictures(root / "images", pictures, size, progress, workers)
    return root


WORLD = World("garments-questions", GENERATOR_VERSION, QuestionGarments, write_questions)


def question_words() -> list[str]:
    """Return every word of the questions and answers, in lower case and sorted; ``wording.words`` covers captions."""
    texts = [text.format(noun) for kind in KINDS for text in kind.wordings for noun in _NOUNS.values()]
    return sorted({word for text in (*texts, *answers()) for word in tokens(text)})


def lavis_records(questions: Sequence[Question], with_answers: bool) -> list[dict[str, Any]]:
    """Return LAVIS's records, which its data sets of questions read. The id of a question is its index."""
    return [
        {
            "question_id": place,
            "question": question.text,
            "image": question.image,
            "dataset": "vqa",
            **({"answer": [question.answer]} if with_answers else {}),
        }
        for place, question in enumerate(questions)
    ]


_COCO_HEADER = {"info": {}, "task_type": "Open-Ended", "data_type": "garments", "data_subtype": "val", "license": {}}


def coco_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Return VQA's file of questions, which its scorer reads."""
    rows = [
        {"question_id": place, "image_id": image_id(question.image), "question": question.text}
        for place, question in enumerate(questions)
    ]
    return {**_COCO_HEADER, "questions": rows}


def coco_annotations(questions: Sequence[Question]) -> dict[str, Any]:
    """Return VQA's file of answers, ten equal ones per question, which its scorer reads."""
    rows = [
        {
            "question_id": place,
            "image_id": image_id(question.image),
            "question_type": question.kind,
            "answer_type": "yes/no" if question.answer in ("yes", "no") else "other",
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": number}
                for number in range(1, _ANNOTATORS + 1)
            ],
        }
        for place, question in enumerate(questions)
    ]
    return {**_COCO_HEADER, "annotations": rows}
