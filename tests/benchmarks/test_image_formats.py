"""Every path through the package decodes only the listed formats, whatever a file is called."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any, Callable

import pytest
from PIL import EpsImagePlugin, Image

import lavis_cir_plugin
from lavis_cir_plugin.benchmarks.images import (
    FORMATS,
    SUFFIXES,
    check_format,
    decode_rgb,
    image_problems,
    open_rgb,
    scan_images,
)
from lavis_cir_plugin.data.builders.garments_questions import (
    GarmentsCaption,
    GarmentsCaptionEval,
    GarmentsVqa,
    GarmentsVqaEval,
)
from lavis_cir_plugin.report import sheet_layout

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
RED = (255, 0, 0)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for Ghostscript, and return a list of the arguments of its calls."""
    calls: list[Any] = []

    def interpret(*arguments: Any, **_: Any) -> Any:
        calls.append(arguments)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", interpret)
    return calls


@pytest.fixture
def disguised(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(POSTSCRIPT)
    return path


def draw(path: Path) -> None:
    sheet_layout.draw_picture(Image.new("RGB", (300, 300)), (0, 0), sheet_layout.Picture(path))


def item_of(kind: type, record: dict[str, Any]) -> Callable[[Path], Any]:
    def item(path: Path) -> Any:
        annotation = path.with_suffix(".json")
        annotation.write_text(json.dumps([{"image": path.name, **record}]))
        files = [str(annotation), str(path.with_name("more.json"))]
        Path(files[1]).write_text("[]")
        return kind(lambda picture: picture.size, str, str(path.parent), files)[0]

    return item


QUESTION = {"question": "is it red?", "question_id": 7, "answer": ["yes"]}
CAPTION = {"caption": "a dress", "image_id": 7}
PATHS = {
    "open_rgb": open_rgb,
    "upright": lambda path: open_rgb(path, upright=True),
    "decode_rgb": lambda path: decode_rgb(path.read_bytes(), path.name),
    "check_format": check_format,
    "sheet": draw,
    "vqa": item_of(GarmentsVqa, QUESTION),
    "vqa eval": item_of(GarmentsVqaEval, QUESTION),
    "caption": item_of(GarmentsCaption, CAPTION),
    "caption eval": item_of(GarmentsCaptionEval, CAPTION),
}


def test_pillow_alone_hands_postscript_to_its_interpreter(disguised: Path, interpreter: list[Any]):
    """Pillow alone does what the tests below rule out, so they can fail."""
    with Image.open(disguised) as image:
        assert image.format == "EPS"
        image.load()
    assert len(interpreter) == 1


@pytest.mark.parametrize("name", PATHS)
def test_postscript_that_is_called_png_never_reaches_an_interpreter(disguised: Path, interpreter: list[Any], name: str):
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: it is none of JPEG, PNG, .*TIFF"):
        PATHS[name](disguised)
    assert "it is none of JPEG" in image_problems([disguised])[0]
    assert interpreter == []


@pytest.mark.parametrize("name", PATHS)
def test_a_picture_of_the_same_name_is_read(tmp_path: Path, name: str):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png")
    PATHS[name](tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PPM", "PCX", "TGA", "ICO", "SGI", "PDF", "JPEG2000", "MSP", "XBM", "DDS"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path, kind: str):
    path = tmp_path / "a.jpg"
    mode = "1" if kind in ("MSP", "XBM") else "RGB"
    Image.new(mode, (16, 16)).save(path, format=kind)
    with pytest.raises(ValueError, match="it is none of JPEG"):
        open_rgb(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read_by_each_suffix(tmp_path: Path, kind: str):
    for number, suffix in enumerate(SUFFIXES):
        path = tmp_path / f"{number}{suffix}"
        Image.new("RGB", (16, 16), RED).save(path, format=kind)
        red, green, blue = open_rgb(path).getpixel((8, 8))  # type: ignore[misc]
        assert red > 240
        assert max(green, blue) < 15
    assert len(scan_images([tmp_path])) == len(SUFFIXES)
    assert image_problems(sorted(tmp_path.iterdir())) == [""] * len(SUFFIXES)


def test_a_camera_s_file_of_two_pictures_gives_the_first(tmp_path: Path):
    """JPEG's entry of the list also opens MPO. A list that names MPO makes Pillow raise a KeyError."""
    content = io.BytesIO()
    second = Image.new("RGB", (8, 8), "blue")
    Image.new("RGB", (16, 16), RED).save(content, "MPO", save_all=True, append_images=[second])
    (tmp_path / "a.jpg").write_bytes(content.getvalue())
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert open_rgb(tmp_path / "a.jpg").size == (16, 16)
    assert image_problems([tmp_path / "a.jpg"]) == [""]
    assert "MPO" not in FORMATS


def test_every_format_of_the_list_has_a_suffix_and_no_suffix_lacks_its_format():
    assert {Image.registered_extensions()[suffix] for suffix in SUFFIXES} == set(FORMATS)


# -- no other way to a decoder ---------------------------------------------------------------------------------------

SOURCES = sorted(Path(lavis_cir_plugin.__file__).parent.rglob("*.py"))
DECODERS = {"imread", "read_image", "decode_image", "decode_jpeg", "decode_png", "pil_loader", "default_loader"}


def opens(tree: ast.AST) -> list[ast.Call]:
    """Return the calls of ``Image.open``, however ``Image`` is reached."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call for call in calls if call.func.attr == "open" and ast.unparse(call.func.value).endswith("Image")]  # type: ignore[attr-defined]


def test_no_bare_image_open_stays_in_the_package():
    """Only three places open pictures, each with a list of formats: all, or fewer for uploads."""
    calls = [(path, call) for path in SOURCES for call in opens(ast.parse(path.read_text()))]
    formats = {
        path.name: {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["formats"]
        for path, call in calls
    }
    assert formats == {
        "images.py": "FORMATS",
        "uploads.py": "KINDS",
        "pictures.py": "FORMATS",
    }
    assert len(calls) == sum("Image.open(" in path.read_text() for path in SOURCES) == 3


def test_the_search_finds_what_it_looks_for():
    found = opens(ast.parse("Image.open(x)\nPIL.Image.open(x)\nwith Image.open(x) as i: pass\npath.open()"))
    assert len(found) == 3


def test_no_module_decodes_pictures_in_another_way():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                assert "open" not in [alias.name for alias in node.names], path
            if isinstance(node, ast.ImportFrom):
                assert not DECODERS & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in DECODERS, path
