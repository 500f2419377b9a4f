"""Encoders by name: BLIP-2's weights from a file, and a CLIP of open_clip from a file, without any training."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import threading
import time

import open_clip
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import make_scoring_model
from lavis.models import load_model
from search_world import draw, draw_some, index, make_encoder

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.search import Encoder, load_encoder, open_index
from lavis_cir_plugin.search.encoder import _known_settings, _turn_of


@pytest.fixture(params=["blip2", "open_clip"])
def name(request, tmp_path):
    """Return the name of a model whose weights lie in a file."""
    path = tmp_path / "weights.pth"
    torch.manual_seed(0)
    if request.param == "blip2":
        torch.save({"model": load_model("blip2_cir", "tiny").state_dict()}, path)
        return f"blip2:tiny:{path}"
    torch.save(open_clip.create_model("small_clip").state_dict(), path)
    return f"small_clip:{path}"


def test_an_index_of_weights_in_a_file_gives_their_scores(name, tmp_path):
    """Scores are the largest cosines of query and features, which half precision moves by at most 2^-10."""
    pictures = draw_some(tmp_path / "pictures", 5)
    encoder = load_encoder(name)
    index(tmp_path / "pictures", tmp_path / "index", encoder)
    opened = open_index(tmp_path / "index")
    assert opened.manifest.name == name
    answer = opened.search(pictures[0], "is red", k=5, keep_references=True)
    query = encoder.query([open_rgb(pictures[0])], "is red")[0]
    features = encoder.targets(torch.stack([encoder.transform(open_rgb(path)) for path in pictures])).float()
    expected = (features.reshape(5, -1, len(query)) @ query).amax(dim=1)
    found = {hit.path: hit.score for hit in answer.hits}
    assert [found[str(path)] for path in pictures] == pytest.approx(expected.tolist(), abs=2**-10)
    assert [hit.score for hit in answer.hits] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("composes", [True, False])
@pytest.mark.parametrize("kind", ["joint", "composing"])
@pytest.mark.parametrize(("weight", "passes"), [(0.0, 0), (0.3, 1), (0.5, 1), (0.8, 1), (1.0, 1)])
def test_a_query_runs_the_tower_once_per_picture(kind, composes, weight, passes, tmp_path):
    """A query beyond 1/2 is mixed of two that both need the picture."""
    encoder = dataclasses.replace(make_encoder(kind), composes=composes)
    seen = []
    encoder.model.image_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    pictures = [open_rgb(path) for path in draw_some(tmp_path, 2)]
    query = encoder.query(pictures, "is red", weight)
    assert sum(seen) == passes * len(pictures)

    images = torch.stack([encoder.transform(picture) for picture in pictures])

    def unit(mode):
        samples = {"image": images, "text_input": ["is red"] * 2}
        return F.normalize(encoder.model.encode_query(samples, mode), dim=-1)

    image, text = unit("image"), unit("text")
    both = unit("multimodal") if composes else F.normalize(image + text, dim=-1)
    expected = (1 - abs(2 * weight - 1)) * both + max(0, 2 * weight - 1) * image + max(0, 1 - 2 * weight) * text
    torch.testing.assert_close(query, F.normalize(expected, dim=-1), atol=1e-6, rtol=1e-5)


def fingerprint_of_061(model):
    """The checksum as version 0.6.1 made it; earlier ones did so, too, and had no label smoothing."""
    settings = [
        (f"{place}.{name}", value)
        for place, module in model.named_modules()
        if type(module).__module__.startswith("lavis_cir_plugin.")
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("training", "freeze_vit")
    ]
    digest = hashlib.sha256(repr(sorted(settings)).encode())
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 1024)]
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update((sample.half() if sample.is_floating_point() else sample).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("has_smoothing", [False, True], ids=["0.5", "0.6.1"])
@pytest.mark.parametrize("has_told", [False, True])
def test_an_index_of_an_earlier_version_is_searched_and_goes_on(has_smoothing, has_told, tmp_path):
    draw_some(tmp_path / "p", 4)
    earlier = make_encoder("clip")
    earlier.model.text_tower.has_told_of_a_cut = has_told
    if not has_smoothing:
        del earlier.model.label_smoothing
    earlier.identity = {**earlier.identity, "weights": fingerprint_of_061(earlier.model)}
    index(tmp_path / "p", tmp_path / "i", earlier)
    encoder = make_encoder("clip")
    assert len(open_index(tmp_path / "i", encoder).search(text="red").hits) == 4
    draw(tmp_path / "p" / "new.png", 100)
    assert index(tmp_path / "p", tmp_path / "i", encoder).encoded == 1
    assert open_index(tmp_path / "i").manifest.identity == earlier.identity
    with pytest.raises(ValueError, match=r"another model or transform \(weights\)"):
        open_index(tmp_path / "i", make_encoder("clip", seed=1))


def test_a_model_is_the_same_after_a_text_that_was_too_long(tmp_path):
    draw_some(tmp_path / "p", 2)
    index(tmp_path / "p", tmp_path / "i", make_encoder("clip"))
    used = make_encoder("clip")
    used.query([], "red " * 200)
    assert used.model.text_tower.has_told_of_a_cut
    assert len(open_index(tmp_path / "i", used).search(text="red").hits) == 2


_BLIP2 = {".fusion", ".is_depth_chosen", ".max_txt_len", ".pooling"}
_TOWERS = {
    *(f"image_tower.{name}" for name in ("grid", "image_size", "renormalises", "width", "with_patches")),
    *(f"text_tower.{name}" for name in ("has_told_of_a_cut", "padding", "placeholder", "placeholder_id", "pooling")),
}


@pytest.mark.parametrize(
    ("kind", "names"), [("joint", _BLIP2), ("sentence_prompt", _BLIP2), ("clip", {".fusion", *_TOWERS})]
)
def test_the_settings_by_which_indexes_know_a_model_stay_the_same(kind, names):
    """A further attribute of a model would have every index that there is refused as another model's."""
    (today, *_) = _known_settings(make_encoder(kind).model)
    assert {name for name, _ in today} == names


def test_a_forked_process_does_not_wait_for_the_turn_of_a_thread_that_it_does_not_have():
    encoder = Encoder(make_scoring_model("joint").eval(), TargetPadProcessor(16))
    with _turn_of(encoder.model):
        process = multiprocessing.get_context("fork").Process(target=encoder.query, args=([], "is red"))
        process.start()
        process.join(60)
    assert process.exitcode == 0


def test_threads_take_turns_in_a_model_that_several_encoders_share():
    """The model notes who is inside; each query stays for a moment, so that two at once would meet."""
    model, inside, met = make_scoring_model("joint").eval(), [], []
    original = model.encode_query

    def encode_query(samples, mode):
        inside.append(mode)
        time.sleep(0.01)
        met.append(len(inside))
        found = original(samples, mode)
        inside.pop()
        return found

    model.encode_query = encode_query
    encoders = [Encoder(model, TargetPadProcessor(16)) for _ in range(2)]
    threads = [threading.Thread(target=each.query, args=([], "is red")) for each in encoders * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [1] * 8
