"""What several test files share: small real models and the real annotation files where they are.

Torch and open_clip, which take seconds, are imported where they are used: pytest-xdist's first process, which runs no
test and before which no other one starts, reads this file too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

# Examples are looked for in every file, and this one needs Qdrant's engine, which Python 3.9 cannot have.
collect_ignore = [] if importlib.util.find_spec("qdrant_edge") else ["engine_in_process.py"]

# Tests run in as many processes as there are cores. With more threads than cores, each step of a small model waits for
# threads that do not run; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell lets what it starts in the background ignore Ctrl-C, which tests send to themselves and to their processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small enough for milliseconds, with every kind of layer of the real model.
SMALL: dict[str, Any] = {
    "vit_model": "eva_clip_g",
    "image_size": 16,
    "vit_config": {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "mlp_ratio": 2},
    "vit_precision": "fp32",
    "freeze_vit": False,
    "tokenizer": "blip2_cir_tiny_vocab.txt",
    "num_query_token": 3,
    "qformer_config": {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "embed_dim": 6,
}


@functools.cache
def add_small_towers() -> None:
    """Let open_clip know towers small enough for milliseconds: small_clip; small_siglip, which is not causal and is
    read at its last position."""
    import open_clip

    open_clip.add_model_config(Path(__file__).parent / "open_clip")


@pytest.fixture(scope="session", autouse=True)
def small_towers():
    """Add the small towers, and read CLIP's vocabulary, which takes longer than they do, once for all models."""
    import open_clip

    add_small_towers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield


@pytest.fixture(scope="session", autouse=True)
def features_of_runs(tmp_path_factory):
    """Keep the features that runs cache by default in a folder of each test's own, not in the user's cache."""
    from lavis_cir_plugin.data import benchmark_datasets

    base = tmp_path_factory.mktemp("features_of_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_datasets, "features_root", lambda: base / str(hash(name_of_test())))
        yield


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """Close the process group that a run opens in a test, because LAVIS's models compute otherwise in one."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def set_threads():
    """Return torch's function for the number of threads, and restore the number after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tokens_and_mask(model: Any, texts: list[str]) -> tuple[Any, Any]:
    """Return the tokens of texts for a ``blip2_cir`` and, as LAVIS and transformers take it, the mask of padding."""
    import torch

    from lavis_cir_plugin.models.tokenizer import token_ids

    ids, lengths = token_ids(model.tokenizer, texts, model.max_txt_len)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()


def name_of_test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


@pytest.fixture
def small_model():
    """Return a factory of small real ``blip2_cir`` models, each from the same seed."""
    import torch

    from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir

    def make(**changes: Any) -> Blip2Cir:
        torch.manual_seed(0)
        return Blip2Cir(**{**SMALL, **changes})

    return make


def make_triplets(size: int, seed: int = 1) -> dict[str, Any]:
    """Return a random batch of triplets in LAVIS's keys."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    texts = ["is red", "has longer sleeves and no collar", "is more colorful", "plain blue", "is darker"]
    return {
        "image": torch.randn(size, 3, 16, 16, generator=generator),
        "target": torch.randn(size, 3, 16, 16, generator=generator),
        "text_input": [texts[index % len(texts)] for index in range(size)],
        "target_id": torch.arange(size),
    }


class TripletsInMemory:
    """A batch of triplets with the interface that a runner expects of a LAVIS data set."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["text_input"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[index] for key, values in self.batch.items()}

    def collater(self, samples: list[dict[str, Any]]) -> Any:
        from torch.utils.data import default_collate

        return default_collate(samples)


SMALL_CLIP = {"clip_model": "small_clip"}
SMALL_TSCIR = {**SMALL_CLIP, "hidden_width": 10, "injection_width": 8, "injection_heads": 2, "injection_blocks": [0, 1]}
LAVIS_VIT_L = {"vit_model": "clip_L", "vit_config": {"patch_size": 8, "width": 12, "layers": 2, "heads": 2}}
"""Changes of ``SMALL`` that give it LAVIS's CLIP tower."""

SCORING_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("blip2_cir", SMALL),
    "mean_queries": ("blip2_cir", {**SMALL, "pooling": "mean_queries"}),
    "sentence_prompt": ("blip2_cir", {**SMALL, "fusion": "sentence_prompt"}),
    "frozen tower": ("blip2_cir", {**SMALL, "freeze_vit": True}),
    "clip": ("clip_cir", {**SMALL_CLIP, "freeze_vit": False}),
    "clip text": ("clip_cir", {**SMALL_CLIP, "fusion": "text"}),
    "mapping": ("tscir_mapping", SMALL_TSCIR),
    "composing": ("tscir_composing", {**SMALL_TSCIR, "adapter_blocks": [0, 2], "adapter_rank": 3}),
}
"""Small real models of every kind that scores queries against images: ``model.arch`` and its arguments."""


def make_scoring_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return one of `SCORING_MODELS` with random weights."""
    import torch
    from lavis.common.registry import registry

    import lavis_cir_plugin  # noqa: F401 (registers the models)

    add_small_towers()
    arch, settings = SCORING_MODELS[name]
    torch.manual_seed(seed)
    return registry.get_model_class(arch)(**{**settings, **changes})


def make_preferences(size: int, count: int = 1, seed: int = 1) -> dict[str, Any]:
    """Return a random batch of triplets with ``count`` negatives each, all there."""
    import torch

    generator = torch.Generator().manual_seed(seed + 100)
    return {
        **make_triplets(size, seed),
        "image_id": torch.arange(size) + 1000,
        "negatives": torch.randn(size, count, 3, 16, 16, generator=generator),
        "negatives_present": torch.ones(size, count, dtype=torch.bool),
    }


@pytest.fixture
def triplets():
    """Return the factory of random batches."""
    return make_triplets


@pytest.fixture(scope="session")
def siglip_tokenizer(tmp_path_factory) -> str:
    """Return the folder of a Hugging Face tokenizer of whole words, for small_siglip."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "photo",
        "of",
        "that",
        "is",
        "x",
        "red",
        "blue",
        "dress",
        "with",
        "long",
        "sleeves",
        "and",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


REAL = Path(os.environ.get("CIR_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_folder(name: str) -> Path:
    """Return a data set's folder of real annotation files, or skip."""
    if not (REAL / name).is_dir():
        pytest.skip(f"the real annotation files are not under {REAL}; set CIR_DATA")
    return REAL / name


@pytest.fixture(scope="session")
def real_annotations() -> Path:
    """Return the folder of the real annotation files (``CIR_DATA``), or skip."""
    return real_folder("fashionIQ_dataset").parent


@pytest.fixture
def blank_pictures(monkeypatch):
    """Leave the pictures in reports of runs blank, for tests that look at none; fixtures of a module draw theirs."""
    from launched import leave_pictures_blank

    leave_pictures_blank(monkeypatch)
