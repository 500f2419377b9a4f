"""Each wrong input of a model gives one sentence, and a single string is one text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SCORING_MODELS, make_scoring_model, make_triplets
from PIL import Image

from lavis_cir_plugin import processors
from lavis_cir_plugin.processors import ClipTwoViewsProcessor, TargetPadProcessor, pad_to_ratio


@pytest.fixture(params=SCORING_MODELS, scope="module")
def model(request):
    return make_scoring_model(request.param).eval()


@pytest.fixture
def batch():
    return make_triplets(4)


def needs_image(model):
    return getattr(model, "fusion", "sum") != "text"


def test_one_string_is_one_text(model, batch):
    one = {"image": batch["image"][:1], "text_input": "is red"}
    expected = model.encode_query({**one, "text_input": ["is red"]})
    assert expected.shape[0] == 1
    assert torch.equal(model.encode_query(one), expected)
    assert torch.equal(model.encode_query({"text_input": "is red"}, "text"), model.encode_query(one, "text"))
    assert torch.equal(
        model.encode_query({**batch, "text_input": tuple(batch["text_input"])}), model.encode_query(batch)
    )


@pytest.mark.parametrize("texts", ["blue", ["a", "b"], ["a"] * 5])
def test_other_numbers_of_texts_and_pictures_are_refused(model, batch, texts):
    """The string "blue" has four letters, and there are four pictures."""
    if not needs_image(model):
        pytest.skip("its queries are texts alone")
    count = 1 if texts == "blue" else len(texts)
    changed = {**batch, "text_input": texts, "reference_caption": batch["text_input"]}
    for call in (model.extract_features, model.encode_query, model):
        with pytest.raises(ValueError, match=rf"image has 4 and text_input {count} entries; give as many texts as"):
            call(changed)


@pytest.mark.parametrize("count", [2, 6])
def test_other_numbers_of_targets_and_texts_are_refused(model, batch, count):
    """Both numbers are even, as that of all pictures together is."""
    changed = {**batch, "target": make_triplets(count)["target"], "reference_caption": batch["text_input"]}
    if type(model).__name__ == "TscirMapping":
        pytest.skip("it is trained without targets")
    with pytest.raises(ValueError, match=rf"target has {count} and text_input 4 entries; give as many texts as"):
        model(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "first"}, r"image is a single picture of shape \(3, 16, 16\); make a batch of one, picture\[None\]"),
        (
            {"image": "pil"},
            r"image must be a tensor of a batch of pictures, got Image; give torch\.stack\(\[vis_proces",
        ),
        ({"image": "pils"}, r"image must be a tensor of a batch of pictures, got list of Image; give torch\.stack"),
        ({"image": "bytes"}, r"image holds uint8, as an unprocessed picture does; give torch\.stack"),
        (
            {"image": "grey"},
            r"image must be a batch of RGB pictures \(B, 3, height, width\) .* got the shape \(4, 1, 16",
        ),
        ({"image": "views"}, r"image must be a batch of RGB pictures .* got the shape \(4, 2, 3, 16, 16\)"),
        ({"image": None}, r"samples have no 'image', which is needed here; they have 'image', 'target', 'text_input'"),
        ({"text_input": None}, r"samples have no 'text_input', which is needed here; they have 'image', 'target'"),
        (
            {"text_input": [1, 2, 3, 4]},
            r"text_input must be a string or a list of one string per picture, got list of ",
        ),
        ({"text_input": b"red"}, r"text_input must be a string or a list of one string per picture, got bytes"),
    ],
)
def test_a_sentence_for_each_slip(model, batch, change, message):
    if "image" in change and not needs_image(model):
        pytest.skip("its queries are texts alone")
    picture = Image.new("RGB", (16, 16))
    images = {
        "first": batch["image"][0],
        "pil": picture,
        "pils": [picture] * 4,
        "bytes": batch["image"].byte(),
        "grey": batch["image"][:, :1],
        "views": batch["image"][:, None].expand(-1, 2, -1, -1, -1),
    }
    given = {key: images.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        model.encode_query({**batch, **given})


def test_slips_of_target_pictures_and_samples_are_named_too(model, batch):
    with pytest.raises(ValueError, match=r"image is a single picture of shape \(3, 16, 16\)"):
        model.encode_target(batch["image"][0])
    with pytest.raises(ValueError, match=r"image must be a tensor of a batch of pictures, got Image"):
        model.encode_target(Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match=r"samples must be a dictionary with 'image' and 'text_input', got Tensor"):
        model.encode_query(batch["image"])


def test_features_are_still_taken_for_pictures(model, batch):
    tokens = model.image_features(batch["image"])
    assert tokens.ndim == 3
    torch.testing.assert_close(model.encode_target(tokens), model.encode_target(batch["image"]))
    three = {"image": tokens[:3], "text_input": batch["text_input"][:3]}  # as many as a picture has colours
    torch.testing.assert_close(model.encode_query(three), model.encode_query(batch)[:3], atol=1e-5, rtol=1e-4)


# -- processors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "1"])
def test_pictures_of_any_mode_are_processed_as_the_data_sets_open_them(mode):
    """A picture of the same colours in RGB gives the same pixels; alpha is dropped."""
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(array).convert(mode)
    process = TargetPadProcessor(image_size=16)
    assert torch.equal(process(picture), process(picture.convert("RGB")))
    two = ClipTwoViewsProcessor(image_size=16)
    torch.manual_seed(3)
    views = two(picture)
    torch.manual_seed(3)
    assert torch.equal(views, two(picture.convert("RGB")))


@pytest.mark.parametrize("size", [(21, 900), (900, 21)])
def test_a_long_picture_takes_little_memory_and_looks_the_same(size, monkeypatch):
    fields = np.random.default_rng(0).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    picture = Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)
    process = TargetPadProcessor(image_size=16)
    expected = process(picture)
    assert pad_to_ratio(picture, 1.25).size in [(720, 900), (900, 720)]
    monkeypatch.setattr(processors, "PADDED_PIXELS", 100_000)
    assert pad_to_ratio(picture, 1.25).size in [(240, 300), (300, 240)]  # 648,000 pixels, by 3 x 3
    torch.testing.assert_close(process(picture), expected, atol=0.1, rtol=0)  # of some 4 from black to white


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_a_line_of_pixels_fills_no_memory(size):
    """Padded as it is, it would have 3 x 10^12 pixels."""
    assert TargetPadProcessor(image_size=16)(Image.new("RGB", size)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    "item", ["a.jpg", np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), [Image.new("L", (2, 2))]]
)
@pytest.mark.parametrize("processor", [TargetPadProcessor, ClipTwoViewsProcessor])
def test_what_is_no_picture_is_named(processor, item):
    with pytest.raises(ValueError, match=rf"takes one PIL image, got {type(item).__name__}; open a file by PIL"):
        processor(image_size=8)(item)
