"""blip2_cir: both fusions equal an independent reading of their equations; checkpoints, gradients, refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SMALL, tokens_and_mask
from lavis.models import eva_vit, load_model, load_model_and_preprocess, model_zoo
from lavis.models.blip2_models import Qformer
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lavis_cir_plugin.core.checkpoints import count_blocks_in
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.blip2_cir.qformer import encode
from lavis_cir_plugin.models.tokenizer import load_tokenizer, token_ids
from lavis_cir_plugin.ranking.scoring import similarity

FUSIONS = ("joint", "sentence_prompt")


class NaiveQformer:
    """The Q-Former of BLIP-2 and SPRC's two passes, written down from the papers over a bare state dictionary."""

    def __init__(self, state, heads=2, layers=3, cross_every=2):
        self.state, self.heads, self.layers, self.cross_every = state, heads, layers, cross_every

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-12)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, x, keys, name):
        query, key, value = (
            self.linear(source, f"{name}.self.{part}").unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part, source in (("query", x), ("key", keys), ("value", keys))
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
        mixed = (weights @ value).transpose(-2, -3).flatten(-2)
        return self.norm(self.linear(mixed, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def feed_forward(self, x, name, suffix):
        inner = F.gelu(self.linear(x, f"{name}.intermediate{suffix}.dense"))
        return self.norm(self.linear(inner, f"{name}.output{suffix}.dense") + x, f"{name}.output{suffix}.LayerNorm")

    def run(self, x, image=None, num_queries=0):
        """x: (sequence, hidden) of ONE example without padding."""
        for layer in range(self.layers):
            name = f"Qformer.bert.encoder.layer.{layer}"
            x = self.attention(x, x, f"{name}.attention")
            if image is None:
                x = self.feed_forward(x, name, "")
                continue
            queries, text = x[:num_queries], x[num_queries:]
            if layer % self.cross_every == 0:
                queries = self.attention(queries, image, f"{name}.crossattention")
            x = torch.cat([self.feed_forward(queries, name, "_query"), self.feed_forward(text, name, "")])
        return x

    def embed(self, x):
        return self.norm(x, "Qformer.bert.embeddings.LayerNorm")

    def words(self, ids):
        return self.state["Qformer.bert.embeddings.word_embeddings.weight"][ids]

    def positions(self, count):
        return self.state["Qformer.bert.embeddings.position_embeddings.weight"][:count]

    def project(self, x, name):
        return F.normalize(self.linear(x, name), dim=-1)

    def query(self, image, ids, fusion):
        queries = self.state["query_tokens"][0]
        count = len(queries)
        text = self.words(ids) + self.positions(len(ids))
        fused = self.run(self.embed(torch.cat([queries, text])), image, count)
        if fusion == "sentence_prompt":
            fused = self.run(self.embed(torch.cat([fused[:count], text])))
        return self.project(fused[count], "text_proj")

    def text_query(self, ids):
        sequence = torch.cat([self.words(ids[:1]), self.state["prompt_tokens"][0], self.words(ids[1:])])
        return self.project(self.run(self.embed(sequence + self.positions(len(sequence))))[0], "text_proj")

    def target(self, image):
        queries = self.state["query_tokens"][0]
        return self.project(self.run(self.embed(queries), image, len(queries)), "vision_proj")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_sides_equal_an_independent_reading_of_the_equations(fusion, small_model, triplets):
    """A batch has texts of different lengths, so padding must have no effect."""
    model = small_model(fusion=fusion).eval()
    batch = triplets(3)
    naive = NaiveQformer(model.state_dict())
    query, target = model.encode_query(batch), model.encode_target(batch["target"])
    with torch.no_grad():
        images = model.ln_vision(model.visual_encoder(batch["image"]))
        targets = model.ln_vision(model.visual_encoder(batch["target"]))
    for row, text in enumerate(batch["text_input"]):
        ids = torch.tensor(model.tokenizer(text).input_ids)
        torch.testing.assert_close(query[row], naive.query(images[row], ids, fusion), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(target[row], naive.target(targets[row]), atol=1e-5, rtol=1e-4)
        if fusion == "sentence_prompt":
            text_query = model.encode_query({"text_input": [text]}, mode="text")[0]
            torch.testing.assert_close(text_query, naive.text_query(ids), atol=1e-5, rtol=1e-4)


def test_joint_passes_equal_lavis_own_qformer(small_model, triplets):
    """The reference for the fused outputs and BLIP-2's text mode is the forward of LAVIS's own Q-Former."""
    model = small_model().eval()
    batch = triplets(2)
    bert = model.Qformer["bert"]
    ids, mask = tokens_and_mask(model, batch["text_input"])
    with torch.no_grad():
        image = model.ln_vision(model.visual_encoder(batch["image"]))
        stock = bert(
            ids,
            query_embeds=model.query_tokens.expand(2, -1, -1),
            attention_mask=torch.cat([torch.ones(2, 3), mask], dim=1),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2]),
            return_dict=True,
        ).last_hidden_state
        kind = model._fused_kind(model.image_features(batch["image"]), *model._embed_words(batch["text_input"]))
        text, queries = encode(bert.encoder, [kind, replace(kind, read="queries")])
        torch.testing.assert_close(queries, stock[:, :3])
        torch.testing.assert_close(text, stock[:, 3])
        text = bert(ids, attention_mask=mask, return_dict=True).last_hidden_state[:, 0]
        found = model.encode_query(batch, "text")
        torch.testing.assert_close(found, F.normalize(model.text_proj(text), dim=-1))


@pytest.mark.parametrize("changes", [{"fusion": "joint"}, {"pooling": "mean_queries"}, {"fusion": "sentence_prompt"}])
def test_every_trainable_tensor_gets_a_gradient(changes, small_model, triplets):
    model = small_model(**changes).train()
    model(triplets(4))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_of_one_keeps_its_shapes(fusion, small_model, triplets):
    model = small_model(fusion=fusion)
    batch = triplets(1)
    assert model(batch)["loss"].shape == ()
    assert model.encode_query(batch).shape == (1, 6)
    assert model.encode_target(batch["target"]).shape == (1, 3, 6)
    for features in (model.encode_query(batch), model.encode_query(batch, "text"), model.encode_query(batch, "image")):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(1))


def test_rows_do_not_depend_on_their_batch(small_model, triplets):
    model = small_model(fusion="sentence_prompt").eval()
    batch = triplets(5)
    alone = {"image": batch["image"][3:4], "text_input": batch["text_input"][3:4]}
    torch.testing.assert_close(model.encode_query(batch)[3:4], model.encode_query(alone), atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_weighted_sum(small_model, triplets):
    weights = {"itc": 1.0, "rtc": 0.4, "align": 0.2}
    out = small_model(fusion="sentence_prompt", loss_weights=weights)(triplets(4))
    expected = sum(weights[name] * out[f"loss_{name}"] for name in weights)
    torch.testing.assert_close(out["loss"], expected)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loss_of_a_share_is_that_of_its_rows_among_all_targets(fusion, is_frozen, small_model, triplets):
    """The share 0.3 of 4 rows is 2 rows; the targets of the others are constants."""
    model = small_model(fusion=fusion, freeze_vit=is_frozen).train()
    batch = triplets(4)
    assert torch.equal(model.loss_of_share(batch, 1.0)["loss"], model(batch)["loss"])
    loss = model.loss_of_share(batch, 0.3)["loss_itc"]
    first = {key: value[:2] for key, value in batch.items()}
    targets = torch.cat([model.target_features(batch["target"][:2]), model.encode_target(batch["target"][2:])])
    expected = F.cross_entropy(similarity(model.query_features(first), targets) / model.temp, torch.arange(2))
    torch.testing.assert_close(loss, expected)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    ours, theirs = (
        torch.autograd.grad(x, weights, materialize_grads=True, allow_unused=True) for x in (loss, expected)
    )
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-3)


def test_a_repeated_target_does_not_count_as_negative(small_model, triplets):
    model = small_model()
    batch = triplets(4)
    batch["target"][1] = batch["target"][0]
    alike = model({**batch, "target_id": torch.tensor([0, 0, 2, 3])})["loss"]
    assert alike < model(batch)["loss"]


@pytest.mark.parametrize("mode", ["image", "text", "multimodal"])
def test_extract_features_has_lavis_modes(mode, small_model, triplets):
    model = small_model().eval()
    features = model.extract_features(triplets(2), mode)
    if mode == "text":
        assert features.text_embeds_proj.shape == (2, 6)
    else:
        assert features.image_embeds.shape == (2, 3, 8)
        torch.testing.assert_close(features.image_embeds_proj, model.encode_target(triplets(2)["image"]))
    if mode == "multimodal":
        torch.testing.assert_close(features.multimodal_embeds, model.encode_query(triplets(2)))
    with pytest.raises(ValueError, match=r"model\.mode must be one of multimodal, text, image, got 'both'"):
        model.extract_features(triplets(2), "both")


def test_a_frozen_tower_stays_in_evaluation_and_still(small_model, triplets):
    model = small_model(freeze_vit=True).train()
    assert not model.visual_encoder.training
    model(triplets(2))["loss"].backward()
    assert all(p.grad is None for p in model.visual_encoder.parameters())
    assert model.ln_vision.weight.grad is not None


def test_the_zoo_loads_it_and_its_preprocessors():
    assert dict(model_zoo)["blip2_cir"] == ["pretrain", "pretrain_vitL", "coco", "tiny"]
    model, vis_processors, txt_processors = load_model_and_preprocess("blip2_cir", "tiny", is_eval=True)
    assert isinstance(model, Blip2Cir)
    image = vis_processors["eval"](Image.new("RGB", (30, 90), "red"))
    assert image.shape == (3, 64, 64)
    query = model.encode_query({"image": image[None], "text_input": [txt_processors["eval"]("Is RED.")]})
    assert similarity(query, model.encode_target(image[None])).shape == (1, 1)
    assert load_model("blip2_cir", "tiny").tokenizer.bos_token == "[DEC]"


# --- checkpoints -----------------------------------------------------------------------------------------------------


def published_layout(model):
    """Return weights in BLIP-2's layout, with the heads that this model does not use."""
    vocabulary, hidden = model.Qformer["bert"].embeddings.word_embeddings.weight.shape
    extra = {
        "itm_head.weight": torch.zeros(2, hidden),
        "itm_head.bias": torch.zeros(2),
        "Qformer.cls.predictions.bias": torch.zeros(vocabulary),
        "Qformer.cls.predictions.decoder.weight": torch.zeros(vocabulary, hidden),
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
    }
    return {
        **{name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()},
        **extra,
    }


CLIP_TOWER = {"vit_model": "clip_L", "vit_config": {"patch_size": 8, "width": 8, "layers": 1, "heads": 2}}


@pytest.mark.parametrize("tower", [{}, CLIP_TOWER], ids=["ViT-g", "ViT-L"])
def test_a_sprc_checkpoint_loads_and_scores_the_same(tower, tmp_path, small_model, triplets):
    """SPRC's file is {"epoch", "Blip2QformerCirAlignPrompt": whole state}; its scores equal the independent reading."""
    model = small_model(fusion="sentence_prompt", freeze_vit=True, **tower).eval()
    state = published_layout(model)
    torch.save({"epoch": 3, "Blip2QformerCirAlignPrompt": state}, tmp_path / "tuned_blip_best.pt")
    model.load_checkpoint(str(tmp_path / "tuned_blip_best.pt"))
    batch = triplets(4)
    scores = similarity(model.encode_query(batch), model.encode_target(batch["target"]))
    naive = NaiveQformer(state)
    with torch.no_grad():
        images, targets = (model.ln_vision(model.visual_encoder(batch[key])) for key in ("image", "target"))
    for i, text in enumerate(batch["text_input"]):
        query = naive.query(images[i], torch.tensor(model.tokenizer(text).input_ids), "sentence_prompt")
        for j in range(4):
            assert float(scores[i, j]) == pytest.approx(float((naive.target(targets[j]) @ query).max()), abs=1e-5)


@pytest.mark.parametrize(("count", "limit", "calls"), [(7, 3, [3, 2, 2]), (3, 3, [3]), (2, 0.4, [1, 1])])
def test_a_frozen_tower_takes_few_pictures_at_a_time_on_a_cpu(count, limit, calls, small_model, triplets, monkeypatch):
    """A picture has five tokens, and the widest states are the 36 numbers of query, key and value; in bytes 720."""
    model, pictures, seen = small_model(freeze_vit=True), triplets(7)["image"][:count], []
    whole = model.image_features(pictures)
    model.visual_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("lavis_cir_plugin.methods.blip2_cir.model._LARGEST_BLOCK_KEPT", limit * 720)
    torch.testing.assert_close(model.image_features(pictures), whole)
    assert seen == calls
    model.visual_encoder.requires_grad_(True)
    assert model.image_features(pictures).requires_grad
    assert seen == [*calls, count]


def test_padding_changes_no_text_and_is_not_computed(small_model, triplets):
    """A text alone has no padding; beside a longer one it has some."""
    model, batch, rows = small_model().eval(), triplets(2), []
    alone = [
        model.encode_query({"image": batch["image"][i : i + 1], "text_input": batch["text_input"][i]}) for i in (0, 1)
    ]
    model.Qformer["bert"].encoder.layer[0].intermediate.register_forward_hook(lambda *args: rows.append(len(args[2])))
    torch.testing.assert_close(model.encode_query(batch), torch.cat(alone))
    lengths = token_ids(model.tokenizer, batch["text_input"], model.max_txt_len)[1]
    assert rows == [sum(lengths)]
    assert lengths[0] < lengths[1]


def test_blip2_weights_load_and_only_the_prompt_starts_anew(tmp_path, small_model):
    state = published_layout(small_model())
    torch.save({"model": state}, tmp_path / "blip2.pth")
    model = small_model(fusion="sentence_prompt")
    prompt = model.prompt_tokens.clone()
    model.load_from_pretrained(str(tmp_path / "blip2.pth"))
    assert torch.equal(model.text_proj.weight, state["text_proj.weight"])
    assert torch.equal(model.prompt_tokens, prompt)


def test_a_tower_in_a_file_of_its_own_is_added(tmp_path, small_model):
    state = published_layout(small_model())
    tower = {name.split(".", 1)[1]: t for name, t in state.items() if name.startswith("visual_encoder.")}
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("visual_encoder.")}}, tmp_path / "q.pth")
    torch.save(tower, tmp_path / "vit.pth")
    model = small_model()
    model.load_from_pretrained(str(tmp_path / "q.pth"), vit_pretrained=str(tmp_path / "vit.pth"))
    assert torch.equal(model.visual_encoder.cls_token, tower["cls_token"])


TOWERS = {  # one that LAVIS builds with so many blocks
    "eva_clip_g": lambda blocks: {"patch_size": 8, "embed_dim": 12, "depth": blocks, "num_heads": 2, "mlp_ratio": 2},
    "clip_L": lambda blocks: {"patch_size": 8, "width": 12, "layers": blocks + 1, "heads": 2},
}
STACKS = {"eva_clip_g": "blocks", "clip_L": "transformer.resblocks"}


def tower_files(folder, small_model, vit_model, blocks):
    """Write the tower of a model with so many blocks to one file, and the rest of a model to another."""
    state = small_model(vit_model=vit_model, vit_config=TOWERS[vit_model](blocks)).state_dict()
    tower = {name.split(".", 1)[1]: t for name, t in state.items() if name.startswith("visual_encoder.")}
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("visual_encoder.")}}, folder / "q.pth")
    torch.save(tower, folder / "vit.pth")
    return {"pretrained": str(folder / "q.pth"), "vit_pretrained": str(folder / "vit.pth")}


@pytest.mark.parametrize("vit_model", TOWERS)
@pytest.mark.parametrize(("blocks", "is_taken"), [(1, False), (2, True), (3, True), (4, False)])
def test_a_tower_of_another_depth_is_named_and_one_block_more_is_left_out(
    vit_model, blocks, is_taken, tmp_path, small_model, caplog
):
    """The model has 2 blocks; EVA's and CLIP's published towers have one block more than BLIP-2 uses."""
    files = tower_files(tmp_path, small_model, vit_model, blocks)
    model = small_model(vit_model=vit_model, vit_config=TOWERS[vit_model](2))
    model.is_depth_chosen = False  # as for the published types, whose depth no config names
    said = rf"vit\.pth has {blocks} blocks of {STACKS[vit_model]} and this tower has 2"
    if not is_taken:
        with pytest.raises(ValueError, match=rf"model\.vit_pretrained: .*{said}; name the file .* with 2 or 3"):
            model.load_checkpoint_from_config(files)
        return
    with caplog.at_level("INFO"):
        model.load_checkpoint_from_config(files)
    assert bool(re.search(said, caplog.text)) is (blocks == 3)
    tower = torch.load(files["vit_pretrained"], weights_only=True)
    loaded = model.visual_encoder.state_dict()
    assert loaded.keys() <= tower.keys()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("vit_model", TOWERS)
def test_a_depth_that_the_config_names_may_cut_a_tower_short(vit_model, tmp_path, small_model):
    files = tower_files(tmp_path, small_model, vit_model, 4)
    model = small_model(vit_model=vit_model, vit_config=TOWERS[vit_model](2))
    model.load_checkpoint_from_config(files)
    assert count_blocks_in(model.visual_encoder.state_dict()) == {STACKS[vit_model]: 2}


@pytest.mark.parametrize("vit_model", TOWERS)
def test_a_whole_checkpoint_of_another_depth_is_refused_with_both_numbers(vit_model, tmp_path, small_model):
    """SPRC's ViT-L checkpoint met this case, under a tower with two blocks too few."""
    state = small_model(vit_model=vit_model, vit_config=TOWERS[vit_model](4)).state_dict()
    torch.save({"model": state}, tmp_path / "sprc.pt")
    said = rf"4 blocks of visual_encoder\.{STACKS[vit_model]} there and 2 here"
    with pytest.raises(ValueError, match=said):
        small_model(vit_model=vit_model, vit_config=TOWERS[vit_model](2)).load_checkpoint(str(tmp_path / "sprc.pt"))


def test_blocks_are_counted_by_the_outermost_number():
    names = ["a.blocks.0.mlp.1.w", "a.blocks.0.mlp.2.w", "a.blocks.1.x.w", "conv1.w", "b.7.w", "b.12.w"]
    assert count_blocks_in(names) == {"a.blocks": 2, "b": 2}


def test_a_run_without_its_frozen_tower_takes_it_from_pretrained(tmp_path, small_model):
    """LAVIS saves trained tensors only. They are refused alone and load together with the pretrained file."""
    source = small_model(freeze_vit=True)
    trained = {n: t for n, t in source.state_dict().items() if not n.startswith("visual_encoder.")}
    torch.save({"model": trained, "optimizer": {"state": {}}, "epoch": 1}, tmp_path / "checkpoint_best.pth")
    torch.save({"model": published_layout(source)}, tmp_path / "blip2.pth")
    finetuned = {"load_finetuned": True, "finetuned": str(tmp_path / "checkpoint_best.pth")}
    with pytest.raises(ValueError, match=r"leaves out the image tower, .* set model\.pretrained to the checkpoint"):
        small_model(freeze_vit=True).load_checkpoint_from_config(finetuned)
    model = small_model(freeze_vit=True)
    model.load_checkpoint_from_config({**finetuned, "pretrained": str(tmp_path / "blip2.pth")})
    assert torch.equal(model.query_tokens, source.query_tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"visual.proj": torch.zeros(2)}},
            r"1 unexpected keys \(first: visual\.proj\), \d+ missing keys.*0 of",
        ),
        ({"model": {"temp": torch.zeros(2)}}, r"1 keys of another shape \(first: temp is \(2,\) there and \(\) here\)"),
        ({"a": {"x": torch.zeros(1)}, "b": {"y": torch.zeros(1)}}, "expected one state dictionary .* found 2"),
        ([1, 2], r"found 0 \(content: list\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(content, message, tmp_path, small_model):
    torch.save(content, tmp_path / "x.pth")
    model = small_model()
    before = model.temp.clone()
    with pytest.raises(ValueError, match=message):
        model.load_checkpoint(str(tmp_path / "x.pth"))
    assert torch.equal(model.temp, before)


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("kind", ["text", "truncated", "malicious"])
def test_a_broken_or_malicious_file_is_refused(kind, tmp_path, small_model):
    path = tmp_path / "x.pth"
    torch.save({"model": Malicious() if kind == "malicious" else small_model().state_dict()}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    if kind == "text":
        path.write_text("not a checkpoint")
    reasons = {
        "text": "cannot be read as tensors and plain containers, because it is no checkpoint",
        "truncated": "is damaged or was only half written",
        "malicious": "cannot be read .*, because it holds an object of exec beside its tensors",
    }
    with pytest.raises(ValueError, match=rf"x\.pth:? {reasons[kind]}"):
        small_model().load_checkpoint(str(path))


def test_a_missing_checkpoint_says_where_it_was_looked_for(small_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder; name the file in it, such as .*/checkpoint_best\.pth"):
        small_model().load_checkpoint(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist \(looked from .*Set model\.pretrained"):
        small_model().load_checkpoint("nowhere.pth")


def test_without_a_network_the_local_way_is_named(monkeypatch, small_model):
    """This holds for both downloads, the checkpoint's and the tokenizer's."""
    from transformers import BertTokenizer

    def unreachable(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(network is unreachable\).*local file"):
        small_model().load_checkpoint("https://example.org/no-such-file.pth")
    monkeypatch.setattr(BertTokenizer, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'no-such-tokenizer' is no local folder.*vocab\.txt of bert-base"):
        small_model(tokenizer="no-such-tokenizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "late"}, r"model\.fusion must be one of joint, sentence_prompt, got 'late'"),
        (
            {"qformer_config": {**SMALL["qformer_config"], "position_embedding_type": "relative_key"}},
            r"position_embedding_type(: 'relative_key' is not available.*leave the key out| is not a known key)",
        ),
        ({"pooling": "max"}, r"model\.pooling must be one of .*, got 'max'"),
        ({"vit_model": "resnet"}, r"model\.vit_model must be one of eva_clip_g, clip_L, got 'resnet'"),
        ({"loss_weights": {"rtc": 1.0}}, r"rtc needs model\.fusion: sentence_prompt"),
        ({"loss_weights": {"itc": -1.0}}, r"model\.loss_weights\.itc must be a number >= 0, got -1\.0"),
        ({"vit_precision": "fp16"}, r"stores the image tower in half precision, which cannot be trained"),
        ({"max_txt_len": 64}, r"max_txt_len: 64 and model\.num_query_token: 3 exceed the 40 positions"),
    ],
)
def test_impossible_choices_are_refused(changes, message, small_model):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_a_half_precision_tower_on_a_cpu_is_refused(small_model, triplets):
    with pytest.raises(ValueError, match=r"'fp16' needs a GPU; on a CPU set model\.vit_precision: fp32"):
        small_model(vit_precision="fp16", freeze_vit=True)(triplets(2))


class SmallBlip2(Blip2Qformer):
    """LAVIS's own BLIP-2 stage-1 model at small size, with replacements of the three constructors that download."""

    @classmethod
    def init_tokenizer(cls):
        return load_tokenizer(SMALL["tokenizer"])

    @classmethod
    def init_vision_encoder(cls, *_):
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        tower = eva_vit.VisionTransformer(img_size=16, qkv_bias=True, norm_layer=norm_layer, **SMALL["vit_config"])
        return tower, nn.LayerNorm(12)

    @classmethod
    def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):  # noqa: N802
        config = Qformer.BertConfig(
            vocab_size=len(cls.init_tokenizer()),
            encoder_width=vision_width,
            add_cross_attention=True,
            cross_attention_freq=cross_attention_freq,
            query_length=num_query_token,
            **SMALL["qformer_config"],
        )
        model = Qformer.BertLMHeadModel(config)
        return model, nn.Parameter(torch.randn(1, num_query_token, config.hidden_size))


def test_lavis_own_checkpoint_loads_and_gives_lavis_own_features(tmp_path, small_model, triplets):
    """The published key layout is what LAVIS's Blip2Qformer writes; the features are those it extracts."""
    torch.manual_seed(4)
    theirs = SmallBlip2(num_query_token=3, embed_dim=6, vit_precision="fp32").eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "blip2_pretrained.pth")
    ours = small_model().eval()
    ours.load_from_pretrained(str(tmp_path / "blip2_pretrained.pth"))
    batch = triplets(3)
    expected = theirs.extract_features(batch, mode="image").image_embeds_proj
    torch.testing.assert_close(ours.encode_target(batch["image"]), expected, atol=1e-5, rtol=1e-4)
    expected = theirs.extract_features(batch, mode="text").text_embeds_proj[:, 0]
    torch.testing.assert_close(ours.encode_query(batch, "text"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "millions", "blocks", "width", "pixels"),
    [
        ("pretrain", 985.9, {"blocks": 39}, 1408, 224),
        ("pretrain_vitL", 290.6, {"transformer.resblocks": 23}, 1024, 224),
        ("coco", 986.5, {"blocks": 39}, 1408, 364),
    ],
)
def test_real_types_build_offline_at_full_size(model_type, millions, blocks, width, pixels, monkeypatch):
    """The towers have the published sizes, and the Q-Former is BERT-base with 32 queries and a shipped vocabulary."""
    cfg = OmegaConf.load(Blip2Cir.default_config_path(model_type)).model
    cfg.update({"pretrained": None, "tokenizer": SMALL["tokenizer"]})
    # Random values are beside the point here and cost a minute.
    for place, name in ((eva_vit, "trunc_normal_"), (nn.init, "kaiming_uniform_"), (nn.init, "uniform_")):
        monkeypatch.setattr(place, name, lambda weight, *_, **__: weight)
    model = Blip2Cir.from_config(cfg)
    assert model.visual_encoder.num_features == width
    assert sum(p.numel() for p in model.visual_encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert count_blocks_in(model.visual_encoder.state_dict()) == blocks
    assert model.query_tokens.shape == (1, 32, 768)
    assert model.Qformer["bert"].config.num_hidden_layers == 12
    assert OmegaConf.load(Blip2Cir.default_config_path(model_type)).preprocess.vis_processor.eval.image_size == pixels
