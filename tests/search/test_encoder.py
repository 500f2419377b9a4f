"""Encoders by name: BLIP-2's weights from a file, and a CLIP of open_clip from a file, without any training."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lavis.models import load_model
from search_world import draw_some, index, make_encoder

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.search import load_encoder, open_index


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
