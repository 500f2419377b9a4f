"""README and docs against the code: config keys and their defaults, commands, paths, messages, protocol lines."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lavis.common.config import Config
from omegaconf import OmegaConf
from search_world import draw_some, make_encoder
from search_world import index as index_pictures

from lavis_cir_plugin.benchmarks import cirr, fashioniq
from lavis_cir_plugin.benchmarks.triplets import read_train
from lavis_cir_plugin.commands import (
    check,
    export,
    gap,
    index,
    lora,
    main,
    negatives,
    report,
    search,
    serve,
    submission,
    triplets,
)
from lavis_cir_plugin.commands import config as config_command
from lavis_cir_plugin.garments import FashionIQGarments, write_fashioniq
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.run_log import EPOCHS, STEPS
from lavis_cir_plugin.search.engine import SearchIndex
from lavis_cir_plugin.training import config, reference
from lavis_cir_plugin.training.run_folders import LAST, PREVIOUS
from lavis_cir_plugin.training.run_settings import RUN_DEFAULTS

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = "\n".join(PAGES.values())
PACKAGES = ("lavis_cir_plugin", "lavis_cir_hook")


def test_the_front_page_is_short_and_says_what_has_not_been_run_before_any_number_of_ours():
    front = PAGES[ROOT / "README.md"]
    assert len(front.splitlines()) <= 150
    (status,) = (at for at in [front.find("\n## Status\n")] if at > 0)
    numbers = [found.start() for found in re.finditer(r"\b\d+\.\d\d\b|\d %|\bR@\d+ (?:of|is) ", front)]
    assert numbers
    assert min(numbers) > front.find("No number on real photographs has been reproduced here", status) > status


def test_commits_are_named_by_the_page_of_measurements_and_the_generated_one_alone():
    def commits(text: str) -> list[str]:
        words = re.findall(r"\b[0-9a-f]{7,40}\b", text)
        return [word for word in words if re.search(r"[a-f]", word) and re.search(r"\d", word)]

    naming = {page.name for page, text in PAGES.items() if commits(text)}
    assert naming - {"results.md"} == {"measurements.md"}


def test_every_page_is_found_from_the_front_page():
    """README names docs/index.md, and that every other page."""
    front, index = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "index.md"]
    assert "](docs/index.md)" in front
    others = {page.name for page in PAGES} - {"README.md", "index.md"}
    assert others == {name for name in re.findall(r"\]\(([\w]+\.md)\)", index)}


def section(heading: str) -> str:
    """Return what stands between a heading and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README has no section '{heading}'"
    return found[1]


def table(heading: str) -> dict[str, str]:
    """Map each key of a section's table, also of several in one cell, to its default as written."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section(heading), re.MULTILINE)
    keys = [(key, default.strip("`")) for names, default in rows for key in re.findall(r"`(\w+)`", names)]
    assert len(dict(keys)) == len(keys)
    return dict(keys)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)


def test_the_card_of_blip2_cir_names_its_types_and_the_defaults_of_the_keys_it_explains():
    defaults = Blip2Cir.__init__.__kwdefaults__
    stated = table("Settings of `blip2_cir`")
    assert {"fusion", "pooling", "loss_weights"} <= set(stated)
    assert {key: yaml.safe_load(value) for key, value in stated.items()} == {key: defaults[key] for key in stated}
    assert set(table("Types of `blip2_cir`")) == set(Blip2Cir.PRETRAINED_MODEL_CONFIG_DICT)


def test_the_tables_of_settings_are_those_of_the_code():
    """`python docs/settings_tables.py` writes them; every section of this package has one."""
    page = PAGES[ROOT / "docs" / "configuration.md"]
    assert reference.with_tables(page) == page
    told = set(re.findall(r"^<!-- settings: (.*) -->$", page, re.MULTILINE))
    assert told == set(reference.sections()) - {"datasets.garments_caption.garments"}  # it is that of garments_vqa


@pytest.mark.parametrize(
    "values",
    [
        {"radius": "absolute", "scope": "global", "tensors": "all", "embeddings": "tensor"},
        {"radius": "elementwise", "scope": "global", "tensors": "all", "embeddings": "tensor"},
        {"every": 5},
        {"direction": "random"},
        {"direction": "momentum"},
    ],
)
def test_the_relatives_of_the_method_card_are_allowed_and_named(values):
    WeightPerturbation(**values)
    card = section("Method card: WRF4CIR")
    assert all(f"`{key}: {'k' if key == 'every' else value}`" in card for key, value in values.items())


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split()[1])
def test_every_yaml_block_is_valid(block):
    run = {**RUN_DEFAULTS, "task": "composed_retrieval", **yaml.safe_load(block)["run"]}
    assert list(config.run_problems(run)) == []


COMMANDS = [
    (line, shlex.split(line))
    for block in blocks("bash")
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if "-m lavis." in line
]


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line[:60] for line, _ in COMMANDS])
def test_every_command_has_right_keys_and_values(line, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path, *options = words[words.index("--cfg-path") + 1 :]
    assert options[:1] in ([], ["--options"])
    options = options[1:]
    OmegaConf.save(config.read_config(str(ROOT / path), options), tmp_path / "merged.yaml")
    completed = Config(argparse.Namespace(cfg_path=str(tmp_path / "merged.yaml"), options=[]))
    config.check_values(completed, "train" if "lavis.train" in words else "evaluate")


def test_there_are_commands():
    assert {"lavis.train", "lavis.evaluate"} <= {word for _, words in COMMANDS for word in words}


def test_every_lavis_cir_command_is_understood(monkeypatch):
    understood = []
    monkeypatch.setattr(gap, "_compare", understood.append)
    monkeypatch.setattr(serve, "_serve", understood.append)
    monkeypatch.setattr(report, "_report", understood.append)
    monkeypatch.setattr(lora, "_export", understood.append)
    monkeypatch.setattr(check, "_check", understood.append)
    monkeypatch.setattr(config_command, "_show", understood.append)
    monkeypatch.setattr(submission, "_check", understood.append)
    monkeypatch.setattr(triplets, "_run", understood.append)
    monkeypatch.setattr(negatives, "_show", understood.append)
    monkeypatch.setattr(export, "_export", understood.append)
    monkeypatch.setattr(index, "_run", understood.append)
    monkeypatch.setattr(search, "_run", understood.append)
    joined = [re.sub(r"\\\n\s*", " ", block) for block in blocks("bash")]
    lines = [line for block in joined for line in block.splitlines() if line.startswith("lavis-cir ")]
    for line in lines:
        main.main(shlex.split(line, comments=True)[1:])
    assert len(understood) == len(lines) >= 3


def test_the_examples_of_a_catalogue_are_read(tmp_path):
    (example,) = blocks("json")
    (tmp_path / "train.jsonl").write_text(example)
    images = re.findall(r'"([\w/]+\.\w+)"', example)
    for name in images:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    train, _ = read_train({"root": str(tmp_path)})
    assert len(train) == 3
    assert set(images) == {name for triplet in train for name in (triplet.reference, triplet.target)}


def test_the_files_of_a_run_have_their_names():
    text = section("What a run leaves") + section("Never lose a run")
    assert all(f"`{name}`" in text for name in (LAST, PREVIOUS, STEPS, EPOCHS))


def test_every_path_of_the_project_exists():
    """Paths below the project's own folders, and the targets of links; 'x' is the name of an example."""
    prose = re.sub(r"^```(?:text|python)\n.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)  # they have tests
    folders = "benchmarks|configs|docs|lavis_cir_hook|lavis_cir_plugin|projects|tests"
    paths = re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*", prose)
    named = {path.rstrip(".") for path in paths if not re.search(r"/x[/.]", path)}
    assert len(named) > 20
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_every_link_leads_somewhere():
    """To a file beside the page and, after #, to one of its headings, spelt as they are rendered."""
    pages = {
        path: re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE) for path, text in PAGES.items()
    }

    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    links = [(page, *link) for page, text in pages.items() for link in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text)]
    local = [
        (page, (page.parent / name).resolve() if name else page, part) for page, name, part in links if ":" not in name
    ]
    assert len(local) > 10
    assert [str(target) for _, target, _ in local if not target.exists()] == []
    assert [(page.name, part) for page, target, part in local if part and part not in anchors(pages[target])] == []


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([\w-]+)|`make ([\w-]+)", README, re.MULTILINE)
    assert named
    assert {first or second for first, second in named} <= set(targets)


def test_the_listing_has_the_first_line_of_every_module():
    (listing,) = (block for block in blocks("text") if block.startswith("lavis_cir_plugin/"))
    named, package = {}, ""
    for line in listing.splitlines():
        name, _, sentence = line.strip().partition(" ")
        if line[0] != " ":
            package = name
        else:
            named[package + name] = sentence.strip()
    modules = {path.relative_to(ROOT).as_posix() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    stations = {name for name in modules if name.endswith("/__init__.py") and name.count("/") > 1}
    first_lines = {name: first_line(ROOT / name) for name in modules - stations}
    assert named == first_lines


def first_line(module):
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    return docstring.splitlines()[0].removesuffix(".")


def test_every_quoted_message_is_in_the_code():
    # Adjacent string literals are one message; the last row quotes LAVIS, whose source it is looked up in.
    from lavis.models import eva_vit

    files = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in [*files, Path(eva_vit.__file__)])
    source = re.sub(r'"\s+f?"', "", source)
    quoted = [
        message
        for cell in re.findall(r"^\| (`.*?) \|", section("When something goes wrong"), re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(quoted) >= 8
    assert [message for message in quoted if message not in source] == []


@pytest.mark.parametrize(("reader", "folder"), [(fashioniq, "fashionIQ_dataset"), (cirr, "cirr_dataset")])
def test_the_protocol_lines_are_those_of_the_real_files(reader, folder, real_annotations, monkeypatch):
    """With every image taken to exist: sizes and wording come from the annotation files and the default config."""
    monkeypatch.setattr(reader, "_find_images", lambda settings, names: (dict.fromkeys(names, Path()), []))
    root = real_annotations / folder
    root = root if root.is_dir() else real_annotations
    (lines,) = (block.splitlines() for block in blocks("text") if block.startswith("FashionIQ val"))
    assert reader.read_benchmark({"root": str(root)}, "val").protocol in lines


def test_the_python_example_of_a_search_runs(tmp_path, monkeypatch, capsys):
    encoder = make_encoder()
    paths = draw_some(tmp_path / "p", 3)
    (tmp_path / "columns.csv").write_text("path,price\n001.png,20\n002.png,90\n")
    index_pictures(tmp_path / "p", tmp_path / "my_index", encoder, metadata=tmp_path / "columns.csv")
    paths[0].rename(tmp_path / "shirt.jpg")
    monkeypatch.setattr(SearchIndex, "encoder", encoder)
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "open_index" in block)
    exec(example, {})
    assert f"'{paths[1]}', {{'price': 20}})]" in capsys.readouterr().out


def test_the_python_example_of_an_index_runs(tmp_path, monkeypatch, capsys):
    draw_some(tmp_path / "photos", 2)
    (tmp_path / "columns.csv").write_text("path,price\n001.png,20\n")
    monkeypatch.setattr("lavis_cir_plugin.search.encoder.load_encoder", lambda name: make_encoder())
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "build_index_folder" in block)
    exec(example, {})
    assert capsys.readouterr().out.endswith("2 2 {}\n")


def test_the_python_example_of_rankings_runs(capsys):
    (example,) = (block for block in blocks("python") if "recall_at" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["found"].top.shape == (3, 10)


def test_the_python_examples_of_a_model_and_of_its_training_run(tmp_path, monkeypatch):
    sizes = {"train_triplets": 3, "val_queries": 1, "test_queries": 1}
    images = {"train_images": 4, "val_images": 3, "test_images": 3, "image_width": 32, "image_height": 32}
    write_fashioniq(tmp_path / "fashionIQ_dataset", FashionIQGarments(**sizes, **images), progress=False, workers=0)
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "encode_query" in block)
    (training,) = (block for block in blocks("python") if "PerturbingOptimizer" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["query"].shape == (1, 64)
    assert names["targets"].shape == (4, 8, 64)
    assert sorted(names["ranking"][0].tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(names["query"].norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(names["targets"].norm(dim=-1), torch.ones(4, 8))
    exec(training, names)
    assert names["optimizer"].steps == {"perturbed": 3, "skipped": 0}  # 3 categories of 3 triplets by 4
    assert not torch.equal(names["model"].encode_target(names["images"]), names["targets"])
