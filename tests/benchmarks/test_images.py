"""Finding, opening and checking image files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from lavis_cir_plugin.benchmarks.images import (
    find_images,
    image_folders,
    image_problems,
    open_rgb,
    scan_images,
    scan_tree,
    verify_images,
)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_images_are_found_by_stem_flat_and_per_category(tmp_path: Path):
    flat = touch(tmp_path / "A1.jpg")
    nested = touch(tmp_path / "dress" / "B2.PNG")
    dotted = touch(tmp_path / "shirt" / "dev-1.v2.jpeg")
    touch(tmp_path / "notes.txt")
    touch(tmp_path / "dress" / "deeper" / "C3.jpg")
    assert scan_images([tmp_path]) == {"A1": flat, "B2": nested, "dev-1.v2": dotted}


def test_the_choice_between_several_files_of_a_name_is_fixed(tmp_path: Path):
    """The order is .jpg, .jpeg, .png, then files before sub-folders, sub-folders by name, earlier folders first."""
    for name in ("first/A.png", "first/A.jpeg", "first/A.jpg", "first/B.png", "first/x/B.jpg", "first/y/C.jpg"):
        touch(tmp_path / name)
    for name in ("first/x/C.png", "second/A.jpg", "second/D.png"):
        touch(tmp_path / name)
    found = scan_images([tmp_path / "first", tmp_path / "second"])
    chosen = {name: str(path.relative_to(tmp_path)) for name, path in found.items()}
    assert chosen == {"A": "first/A.jpg", "B": "first/B.png", "C": "first/x/C.png", "D": "second/D.png"}


def test_symlinked_folders_are_scanned(tmp_path: Path):
    touch(tmp_path / "elsewhere" / "A.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "dress").symlink_to(tmp_path / "elsewhere")
    assert set(scan_images([tmp_path / "images"])) == {"A"}


def test_missing_images_are_counted_and_named(tmp_path: Path):
    touch(tmp_path / "here.jpg")
    names = ["here", *(f"gone{number}" for number in range(7)), "gone0"]
    with pytest.raises(FileNotFoundError, match="fashioniq: 7 of 8 images are missing") as error:
        find_images(names, [tmp_path], "fashioniq", "error")
    assert "first: gone0, gone1, gone2, gone3, gone4)" in str(error.value)
    assert "datasets.fashioniq.build_info.missing_images to skip" in str(error.value)

    paths, missing = find_images(names, [tmp_path], "fashioniq", "skip")
    assert paths == {"here": tmp_path / "here.jpg"}
    assert missing == names[1:8]


def test_skip_does_not_mean_all(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="2 of 2 images are missing"):
        find_images(["A", "B"], [tmp_path], "cirr", "skip")


def test_no_image_folder_is_an_error_that_names_the_key(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"looked for .*images.*datasets.cirr.build_info.images"):
        image_folders([tmp_path / "images"], "cirr")


# -- opening -------------------------------------------------------------------------------------------------------


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixel(path: Path) -> tuple[int, int, int]:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """Grey 128 stays 128, CMYK (0, 255, 255, 0) becomes red, and transparent green stays green."""
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    cases = {
        "grey.png": (Image.new("L", (2, 2), 128), {}, (128, 128, 128)),
        "bits.png": (Image.new("1", (2, 2), 1), {}, (255, 255, 255)),
        "alpha.png": (Image.new("RGBA", (2, 2), (0, 255, 0, 0)), {}, (0, 255, 0)),
        "grey_alpha.png": (Image.new("LA", (2, 2), (50, 0)), {}, (50, 50, 50)),
        "palette.png": (palette, {"transparency": 1}, (0, 0, 255)),
        "palette_bytes.png": (palette, {"transparency": b"\x00\x80"}, (0, 0, 255)),
    }
    for name, (image, options, expected) in cases.items():
        assert pixel(saved(tmp_path / name, image, **options)) == expected, name
    red, green, blue = pixel(saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert red > 230
    assert max(green, blue) < 25
    assert not [str(warning.message) for warning in recwarn if "ransparen" in str(warning.message)]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path):
    """0, 257, 32,896 = 128 x 257 and 65,535 = 255 x 257 become 0, 1, 128 and 255."""
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = open_rgb(saved(tmp_path / "deep.png", Image.fromarray(values)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_content_decides_and_not_the_suffix(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", format="GIF", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "moving.png") == (255, 0, 0)
    Image.new("RGB", (4, 4), "white").save(tmp_path / "photo.png", format="JPEG")
    assert pixel(tmp_path / "photo.png") == (255, 255, 255)


def huge_png(path: Path) -> Path:
    """Write a PNG header that claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0")]
    packed = (struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) for data in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


@pytest.mark.parametrize("lenient", [False, True], ids=["Pillow as it comes", "Pillow as LAVIS sets it"])
def test_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: bool):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    whole = saved(tmp_path / "whole.jpg", Image.effect_noise((64, 64), 50))
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(whole.read_bytes()[:-200])
    noise = tmp_path / "noise.png"
    noise.write_bytes(b"<html>404</html>")
    png = saved(tmp_path / "good.png", Image.effect_noise((64, 64), 50))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(png.read_bytes()[:100] + b"\0" * 50 + png.read_bytes()[150:])
    for path, reason in [
        (touch(tmp_path / "empty.jpg"), "the file is empty"),
        (truncated, "truncated"),
        (noise, "it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (damaged, "."),
        (huge_png(tmp_path / "huge.png"), "more than 178,956,970 pixels, .* scale it down"),
    ]:
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read as an image: .*{reason}"):
            open_rgb(path)
    with pytest.raises(FileNotFoundError, match=r"absent.jpg does not exist"):
        open_rgb(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_rgb(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_verification_counts_and_names_broken_files(tmp_path: Path):
    good = [saved(tmp_path / f"good{number}.png", Image.new("RGB", (4, 4))) for number in range(3)]
    verify_images(good)
    bad = [touch(tmp_path / f"bad{number}.jpg") for number in range(6)]
    with pytest.raises(ValueError, match="6 of 9 image files cannot be read") as error:
        verify_images([*bad, *good])
    assert [path.name in str(error.value) for path in bad] == [True] * 5 + [False]


def test_links_and_folders_that_are_no_images_are_missing(tmp_path: Path):
    """A link to a picture counts. A broken link, a circle of links and a folder x.jpg do not."""
    touch(tmp_path / "elsewhere.jpg")
    folder = tmp_path / "images"
    touch(folder / "B.jpg" / "inside.jpg")
    (folder / "A.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (folder / "C.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "D.jpg").symlink_to(folder / "D.jpg")
    assert scan_images([folder]) == {"A": folder / "A.jpg", "inside": folder / "B.jpg" / "inside.jpg"}
    assert list(scan_tree(folder)) == ["A.jpg", "B.jpg/inside.jpg"]
    problems = image_problems([folder / "C.jpg", folder / "B.jpg"])
    assert "C.jpg is a link to a file that does not exist" in problems[0]
    assert "B.jpg cannot be read as an image" in problems[1]


def test_a_tree_is_scanned_to_any_depth_in_sorted_order(tmp_path: Path):
    """Names contain folders and suffix, so a.jpg and a.png are two images. The scan ends at circles of folders."""
    for name in ("b/z/deep.webp", "b/a.png", "a.jpg", "a.png", "B.JPG", "notes.txt"):
        touch(tmp_path / name)
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    found = scan_tree(tmp_path)
    assert list(found) == ["B.JPG", "a.jpg", "a.png", "b/a.png", "b/z/deep.webp"]
    assert found["b/z/deep.webp"] == tmp_path / "b" / "z" / "deep.webp"


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, ".png", (255, 255, 255)),
        ("L", 90, ".png", (90, 90, 90)),
        ("LA", (90, 0), ".png", (90, 90, 90)),
        ("RGBA", (1, 2, 3, 0), ".png", (1, 2, 3)),
        ("RGBA", (1, 2, 3, 255), ".webp", (1, 2, 3)),
        ("P", 0, ".gif", (0, 0, 0)),
        ("RGB", (1, 2, 3), ".bmp", (1, 2, 3)),
        ("RGB", (1, 2, 3), ".tif", (1, 2, 3)),
        ("L", 90, ".TIFF", (90, 90, 90)),
    ],
)
def test_every_mode_and_suffix_becomes_rgb(tmp_path: Path, mode: str, colour: object, suffix: str, expected: tuple):
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"picture{suffix}", Image.new(mode, (8, 8), colour), **options)  # type: ignore[arg-type]
    assert pixel(path) == expected
    assert scan_images([tmp_path]) == {"picture": path}
    verify_images([path])


@pytest.mark.parametrize("lenient", [False, True], ids=["Pillow as it comes", "Pillow as LAVIS sets it"])
def test_verification_finds_truncated_files_of_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: bool
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    for suffix in (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"):
        path = saved(tmp_path / f"picture{suffix}", Image.effect_noise((64, 64), 50))
        whole = path.read_bytes()
        verify_images([path])
        for kept in (len(whole) - 200, len(whole) // 2, 20):
            path.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=rf"1 of 1 .*picture{suffix} cannot be read as an image: "):
                verify_images([path])
        path.write_bytes(whole)


def test_a_jpeg_with_its_end_marker_is_not_decoded_and_without_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Padding after the marker causes no decoding. Other bytes do, and the picture still proves whole."""
    whole = saved(tmp_path / "whole.jpg", Image.effect_noise((64, 64), 50)).read_bytes()
    (tmp_path / "padded.jpg").write_bytes(whole + b"\0" * 100 + b" \r\n")
    (tmp_path / "trailing.jpg").write_bytes(whole + b"trailing words")
    (tmp_path / "cut.jpg").write_bytes(whole[:-2])  # the picture lacks only the marker
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: decoded.append(Path(self.filename).name) or load(self))
    verify_images([tmp_path / "whole.jpg", tmp_path / "padded.jpg"])
    assert decoded == []
    verify_images([tmp_path / "trailing.jpg"])
    assert decoded == ["trailing.jpg"]
    image_problems([tmp_path / "cut.jpg"])
    assert decoded == ["trailing.jpg", "cut.jpg"]


def test_verification_names_what_is_wrong_with_each_file(tmp_path: Path):
    page = tmp_path / "page.jpg"
    page.write_bytes(b"<html>404</html>")
    paths = [touch(tmp_path / "empty.jpg"), huge_png(tmp_path / "huge.png"), page, tmp_path / "absent.jpg"]
    for problem, reason in zip(
        image_problems(paths), ["the file is empty", "exceeds the limit", "it is none of JPEG", "not exist"]
    ):
        assert reason in problem
