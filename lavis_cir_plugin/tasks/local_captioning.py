"""The LAVIS task ``local_captioning``: captioning scored by the data set's own captions, without download or Java."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # unlike re, it knows marks and scripts
from lavis.common.dist_utils import main_process
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from pycocoevalcap.bleu.bleu import Bleu  # type: ignore[import-untyped]
from pycocoevalcap.cider.cider import Cider  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import Dataset

from lavis_cir_plugin.core.settings import Positive, Section

# These scripts have no blanks between words: Chinese, Japanese, and those of South-East Asia (Thai, Lao, Khmer,
# Burmese). Unicode puts the latter into the line breaking class SA, because only a dictionary finds their words.
_UNSPACED = r"[\p{Han}\p{scx=Hira}\p{scx=Kana}\p{lb=SA}]"
_CHARACTER = rf"[[\p{{L}}\p{{N}}]&&{_UNSPACED}]\p{{M}}*"
# The two joiners (U+200C, U+200D) occur inside words of Persian and of Indian scripts.
_WORD = rf"[[\p{{L}}\p{{N}}']--{_UNSPACED}][[\p{{L}}\p{{M}}\p{{N}}'\u200c\u200d]--{_UNSPACED}]*"
_TOKEN = regex.compile(f"(?V1){_CHARACTER}|{_WORD}")  # V1: differences and intersections of sets


@dataclass(frozen=True)
class GenerationSettings(Section):
    """Keys of ``run`` that LAVIS's task needs.

    Attributes:
        num_beams: Beams of the search for a text. Captioning requires it, and LAVIS's ``vqa`` has 3 by default.
        max_len: Largest number of tokens of a generated text. Captioning requires it, and LAVIS's ``vqa`` has 10 by
            default.
        min_len: Smallest number of tokens of a generated text. Captioning requires it, and LAVIS's ``vqa`` has 1 by
            default.
    """

    WHERE = "run"

    num_beams: Positive
    max_len: Positive
    min_len: Positive


@registry.register_task("local_captioning")
class LocalCaptionTask(CaptionTask):
    """LAVIS's captioning task with another scorer: CIDEr and BLEU-4 in pure Python.

    LAVIS's own task downloads COCO's ground truth for every data set and tokenizes by a Java program. This task takes
    the references from the data set's ``annotation`` (key ``caption``, a text or a list of texts, as in COCO's Karpathy
    splits). It can score every captioning data set of LAVIS with such an annotation.
    """

    RUN_SETTINGS = GenerationSettings

    def before_evaluation(self, model: nn.Module, dataset: Dataset, **kwargs: Any) -> None:
        """Remember the data set whose captions are the references.

        Raises:
            ValueError: If the data set has no captions for this split.
        """
        super().before_evaluation(model, dataset, **kwargs)
        self._annotation = dataset.annotation
        if not all(record.get("caption") for record in self._annotation):
            raise ValueError(
                "run.task: local_captioning scores against the data set's own captions, and this split has none; "
                "evaluate another split (run.valid_splits, run.test_splits)."
            )
        texts = [text for record in self._annotation for text in _texts(record["caption"])]
        wordless = [text for text in texts if not tokenized(text)]
        if wordless:
            logging.warning(
                "%d of %d captions hold no letter and no digit (first: %r), so no generated caption agrees with them",
                len(wordless),
                len(texts),
                wordless[0],
            )

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Generate captions; each result also has the position of its record in the annotation."""
        # LAVIS makes a number of each picture's id, which the name of a .png file is not.
        results: list[dict[str, Any]] = super().valid_step(model, {**samples, "image_id": samples["instance_id"]})
        for result, picture in zip(results, samples["image_id"]):
            result.update(image_id=_number_or_name(picture), instance_id=result["image_id"])
        return results

    @staticmethod
    def save_result(result: Any, result_dir: str, filename: str, remove_duplicate: str = "") -> str:
        """Save one result per record. LAVIS saves one per ``image_id``, which a/1.jpg and b/1.jpg have in common."""
        path: str = CaptionTask.save_result(result, result_dir, filename, remove_duplicate="instance_id")
        return path

    @main_process
    def _report_metrics(self, eval_result_file: str, split_name: str) -> dict[str, float]:
        results = json.loads(Path(eval_result_file).read_text())
        references = [_texts(self._annotation[result["instance_id"]]["caption"]) for result in results]
        scores = caption_scores([result["caption"] for result in results], references)
        with open(os.path.join(registry.get_path("output_dir"), "evaluate.txt"), "a") as file:
            file.write(json.dumps({split_name: scores}) + "\n")
        return {**scores, "agg_metrics": scores["CIDEr"] + scores["Bleu_4"]}


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``CIDEr`` (0 to 10) and ``Bleu_4`` (a fraction) of captions against their references.

    Texts are tokenized by :func:`tokenized`, so the numbers are close to those of COCO's scorer but not equal. In
    scripts without blanks the n-grams consist of characters, so scores can be compared within one script only. CIDEr
    weighs words by their rarity in these references. With a single picture all weights are 0, and so is CIDEr. If no
    reference holds a word, both scores are 0.

    Args:
        captions: One caption per picture.
        references: For each picture one or more references.

    Source: CIDEr-D (arXiv 1411.5726) and corpus BLEU with the closest reference length, by pycocoevalcap.
    """
    given, truth = _words_of(captions, references)
    if not _has_words(truth):
        return {"CIDEr": 0.0, "Bleu_4": 0.0}
    cider, _ = Cider().compute_score(truth, given)
    bleu, _ = Bleu(4).compute_score(truth, given, verbose=0)
    return {"CIDEr": float(cider), "Bleu_4": float(bleu[3])}


def cider_of_each(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return each caption's ``CIDEr``, whose mean is that of :func:`caption_scores`."""
    given, truth = _words_of(captions, references)
    return list(map(float, Cider().compute_score(truth, given)[1])) if _has_words(truth) else [0.0] * len(captions)


_Words = Mapping[int, Sequence[str]]


def _words_of(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[_Words, _Words]:
    """Return captions and references as pycocoevalcap takes them, by the number of the picture."""
    given = {place: [tokenized(text)] for place, text in enumerate(captions)}
    return given, {place: [tokenized(text) for text in texts] for place, texts in enumerate(references)}


def _has_words(truth: _Words) -> bool:
    """Return whether a reference holds a word; without one pycocoevalcap takes the maximum of no numbers."""
    return any(text for texts in truth.values() for text in texts)


def tokenized(text: str) -> str:
    """Return the words of a text in lower case, joined by blanks.

    A word is a run of letters with their marks, digits and apostrophes of any script. Punctuation, symbols and emoji
    are no tokens. In scripts without blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter
    with its marks is a token. Texts that are canonically equivalent in Unicode (NFC, NFD) give equal tokens.
    """
    return " ".join(_TOKEN.findall(unicodedata.normalize("NFC", text.lower())))


def _number_or_name(picture: Any) -> int | str:
    try:
        return int(picture)
    except ValueError:
        return str(picture)


def _texts(captions: str | Sequence[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else list(captions)
