"""Captioning scored against the captions of the data set itself: no download, no Java."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import main_process
from lavis.common.registry import registry
from lavis.tasks.captioning import CaptionTask
from pycocoevalcap.bleu.bleu import Bleu  # type: ignore[import-untyped]
from pycocoevalcap.cider.cider import Cider  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import Dataset


@registry.register_task("local_captioning")
class LocalCaptionTask(CaptionTask):
    """LAVIS's captioning task with another scorer: CIDEr and BLEU-4 in pure Python.

    LAVIS's own task downloads COCO's ground truth whatever the data set, and tokenizes by a Java program. This one
    takes the references from the evaluated data set's ``annotation`` (key ``caption``, a text or a list of texts, as
    in COCO's Karpathy splits), so it scores any captioning data set of LAVIS that ships them.
    """

    RUN_KEYS = ()

    @staticmethod
    def run_problems(run: Mapping[str, Any]) -> Iterator[str]:
        """Yield which of the keys that LAVIS's task takes for granted are missing, one sentence each."""
        for key in ("num_beams", "max_len", "min_len"):
            value = run.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"run.{key} must be a whole number >= 1, got {value!r}."

    def before_evaluation(self, model: nn.Module, dataset: Dataset, **kwargs: Any) -> None:
        """Remember whose captions are the references.

        Raises:
            ValueError: If the data set ships no captions for this split.
        """
        super().before_evaluation(model, dataset, **kwargs)
        self._annotation = dataset.annotation
        if not all(record.get("caption") for record in self._annotation):
            raise ValueError(
                "run.task: local_captioning scores against the data set's own captions, and this split has none; "
                "evaluate another split (run.valid_splits, run.test_splits)."
            )

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Generate captions; each also carries the place of its record in the annotation."""
        results: list[dict[str, Any]] = super().valid_step(model, samples)
        for result, instance in zip(results, samples["instance_id"]):
            result["instance_id"] = int(instance)
        return results

    @main_process
    def _report_metrics(self, eval_result_file: str, split_name: str) -> dict[str, float]:
        results = json.loads(Path(eval_result_file).read_text())
        references = [self._annotation[result["instance_id"]]["caption"] for result in results]
        listed = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        scores = caption_scores([result["caption"] for result in results], listed)
        with open(os.path.join(registry.get_path("output_dir"), "evaluate.txt"), "a") as file:
            file.write(json.dumps({split_name: scores}) + "\n")
        return {**scores, "agg_metrics": scores["CIDEr"] + scores["Bleu_4"]}


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``CIDEr`` (0 to 10) and ``Bleu_4`` (fraction) of captions against their references.

    Texts are tokenized by :func:`tokenized`, so the numbers are close to, and not the same as, those of COCO's scorer.
    CIDEr weighs words by their rarity in these references; with one picture all weights, and so CIDEr, are 0.

    Args:
        captions: One per picture.
        references: For each, at least one.

    Source: CIDEr-D (arXiv 1411.5726) and corpus BLEU with the closest reference length, by pycocoevalcap.
    """
    given = {place: [tokenized(text)] for place, text in enumerate(captions)}
    truth = {place: [tokenized(text) for text in texts] for place, texts in enumerate(references)}
    cider, _ = Cider().compute_score(truth, given)
    bleu, _ = Bleu(4).compute_score(truth, given, verbose=0)
    return {"CIDEr": float(cider), "Bleu_4": float(bleu[3])}


def tokenized(text: str) -> str:
    """Return the lower-case runs of letters, digits and apostrophes, joined by blanks: punctuation is no token."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))
