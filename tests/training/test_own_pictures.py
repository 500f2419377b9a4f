"""The page on a catalogue of one's own: its commands are run one after the other, on a small one with small models."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import make_scoring_model

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.garments import draw_for_name
from lavis_cir_plugin.training import launcher

pytestmark = [pytest.mark.usefixtures("blank_pictures"), pytest.mark.slow]

PAGE = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text(encoding="utf-8")
WORDS = itertools.product(
    ("red", "blue", "green", "black"), ("dress", "shirt", "coat"), ("long sleeves", "short sleeves", "no sleeves")
)
CAPTIONS = {f"{i}.png": f"a {colour} {kind} with {sleeves}" for i, (colour, kind, sleeves) in enumerate(WORDS)}
LESS = ["run.device=cpu", "run.num_workers=0", "run.seed=1"]
SHORT = ["run.max_epoch=1", "run.batch_size_train=4", "run.amp=false"]
SMALL_BLIP2 = [
    "model.model_type=tiny",
    *(f"datasets.triplets.vis_processor.{s}.image_size=64" for s in ("train", "eval")),
]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Make a folder with images/, captions.jsonl and val.jsonl, as the page says."""
    root = tmp_path_factory.mktemp("catalogue")
    (root / "images").mkdir()
    for name in CAPTIONS:
        draw_for_name(name, "dress").resize((40, 50)).save(root / "images" / name)
    lines = [{"image": name, "caption": caption} for name, caption in CAPTIONS.items()]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    queries = [{"reference": f"{i}.png", "text": "in blue", "target": f"{i + 9}.png"} for i in range(3)]
    (root / "val.jsonl").write_text("\n".join(map(json.dumps, queries)))
    return root


def small_clip(data, *sizes):
    processors = [f"datasets.{data}.vis_processor.{stage}.image_size=16" for stage in sizes]
    return ["model.model_type=tiny", "model.clip_model=small_clip", "model.image_size=16", *processors]


def options_for(project, clip):
    """Return what makes a shipped project small enough for milliseconds a step."""
    weights = f"model.pretrained={clip}"
    injections = ["model.injection_blocks=[1]", "model.hidden_width=8"]
    return {
        "clip_cir/triplets": [*small_clip("triplets", "train", "eval"), weights],
        "tscir/mapping_captions": [*small_clip("image_captions", "train"), weights, *injections, *SHORT],
        "tscir/composing_triplets": [
            *small_clip("triplets", "train", "eval"), weights, *injections, *SHORT, "model.adapter_blocks=[0,2]",
        ],
        "tscir/eval_triplets": [
            *small_clip("triplets", "train", "eval"), weights, *injections, "model.adapter_blocks=[0,2]",
        ],
        "wrf4cir/triplets": [*SMALL_BLIP2, *SHORT],
        "retrieval_dpo/triplets": [*SMALL_BLIP2, *SHORT, "run.negatives.count=2"],
    }[project]  # fmt: skip


def commands_of(heading):
    """Return the words of each command below a heading of the page."""
    (text,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def run(words, catalogue, output, clip):
    """Run a command of the page with its example's paths replaced; return the folder of a run's splits."""

    def of_training(found):
        return str(min((output / found[1]).iterdir()))  # evaluations by the same project came after it

    words = [word.replace("/data/my_catalogue", str(catalogue)).replace("shoes/a.jpg", "0.png") for word in words]
    words = [re.sub(r"\boutput/([\w/]+)/RUN\b", of_training, word) for word in words]
    if words[0] == "lavis-cir":
        main.main(words[1:])
        return None
    project = words[words.index("--cfg-path") + 1].removeprefix("projects/").removesuffix(".yaml")
    options = [*LESS, *options_for(project, clip), f"run.output_dir={output / project}"]
    before = set((output / project).glob("*"))
    launcher.main(words[2].removeprefix("lavis."), ["--cfg-path", *words[words.index("--cfg-path") + 1 :], *options])
    (made,) = set((output / project).iterdir()) - before
    return made


def rows(made):
    return json.loads((made / "val" / "metrics.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pth"
    torch.save({"model": make_scoring_model("clip").state_dict()}, path)
    return path


def test_clip_as_it_is_is_measured_on_own_queries(catalogue, tmp_path, clip):
    (command,) = commands_of("Any CLIP on your queries, without training")
    found = rows(run(command, catalogue, tmp_path, clip))
    assert {"image only", "text only"} < set(found)
    assert found["random (expected)"]["R@5"] == pytest.approx(100 * 5 / 35)  # all 36 pictures but the reference


def test_captions_alone_train_both_stages(catalogue, tmp_path, clip):
    *stages, last = commands_of("Train without triplets, from captions")
    made = [run(words, catalogue, tmp_path, clip) for words in stages]
    triplets = [json.loads(line) for line in (catalogue / "train.jsonl").read_text().splitlines()]
    assert len(triplets) >= 4
    assert all(triplet["reference_caption"] for triplet in triplets)
    assert rows(run(last, catalogue, tmp_path, clip)) == rows(made[-1])
    assert {"stage I + II", "stage I alone"} < set(rows(made[-1]))


def test_own_triplets_train_a_model_that_preferences_go_on_from_and_that_is_searched_with(
    catalogue, tmp_path, clip, monkeypatch
):
    train = [{"reference": f"{i}.png", "text": "in green", "target": f"{i + 18}.png"} for i in range(9)]
    (catalogue / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    first, _, preferences, fine_tuning = commands_of("Train on your triplets")
    trained = run(first, catalogue, tmp_path, clip)
    assert {"trained model"} < set(rows(trained))
    made = run(preferences, catalogue, tmp_path, clip)
    assert (made / "negatives").is_dir()
    assert {"trained model"} < set(rows(made))
    assert {"image + text"} < set(rows(run([*fine_tuning, *SHORT[:2]], catalogue, tmp_path, clip)))

    evaluation, index, search = commands_of("Search with what you trained")
    asked = [{"reference": f"{i}.png", "text": "in green", "id": f"q{i}"} for i in range(2)]
    (catalogue / "test.jsonl").write_text("\n".join(map(json.dumps, asked)))
    best = json.loads((run(evaluation, catalogue, tmp_path, clip) / "test" / "triplets_test.json").read_text())
    assert {name: len(found) for name, found in best.items()} == {"q0": 35, "q1": 35}  # all pictures but the reference
    monkeypatch.chdir(tmp_path)  # my_index and answer.png
    run([*index, "--workers", "0"], catalogue, tmp_path, clip)
    run(search, catalogue, tmp_path, clip)
    assert (tmp_path / "answer.png").is_file()
