"""clip_cir and TSCIR: equality with open_clip, trained weights, checkpoints, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lavis.models import load_model, model_zoo
from torch import nn

from lavis_cir_plugin.methods.tscir.composing import TscirComposing
from lavis_cir_plugin.methods.tscir.losses import mixed_negatives_loss, soft_text_alignment_loss
from lavis_cir_plugin.methods.tscir.mapping import PLAIN_SENTENCE, TscirMapping, weights_fingerprint
from lavis_cir_plugin.models.clip_cir import ClipCir
from lavis_cir_plugin.models.contrastive_losses import symmetric_contrastive_loss
from lavis_cir_plugin.models.open_clip_towers import load_clip

TEXTS = ["is red", "has longer sleeves", "is blue and plain"]
SIZES = {"hidden_width": 10, "injection_width": 8, "injection_heads": 2}
TYPES = ["ViT-B-16-SigLIP", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-L-14", "ViT-L-14-quickgelu", "ViT-bigG-14", "tiny"]


def pictures(count=3, seed=1):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["small_clip", "small_siglip"])
def clip_model(request):
    return request.param


@pytest.fixture
def make(tmp_path, siglip_tokenizer):
    """Return a factory of models on the same random CLIP, which is read from a file."""

    def make(model_class, clip_model="small_clip", seed=0, **changes):
        weights = tmp_path / f"{clip_model}.pt"
        if not weights.exists():
            torch.manual_seed(7)
            torch.save(load_clip(clip_model).state_dict(), weights)
        given = {"clip_model": clip_model, "pretrained": str(weights), **changes}
        if clip_model == "small_siglip":
            given.setdefault("tokenizer", siglip_tokenizer)
        if model_class is not ClipCir:
            given = {"injection_blocks": [0, 1], **SIZES, **given}
        if model_class is TscirComposing:
            given = {"adapter_blocks": [0, 2], "adapter_rank": 4, **given}
        torch.manual_seed(seed)
        return model_class(**given)

    return make


def saved(model, path):
    """Write a checkpoint without frozen parameters, as LAVIS does."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    torch.save({"model": {k: v for k, v in model.state_dict().items() if k not in frozen}, "epoch": 1}, path)
    return str(path)


def triplets(with_captions=True):
    batch = {
        "image": pictures(),
        "target": pictures(seed=2),
        "text_input": TEXTS,
        "target_id": torch.arange(3),
    }
    return {**batch, "reference_caption": ["a red dress", "a top", "a long blue dress"]} if with_captions else batch


# clip_cir.


def test_clip_cir_is_open_clip(make, clip_model):
    model = make(ClipCir, clip_model).eval()
    clip = load_clip(clip_model, str(model_file(make, clip_model)))
    image, text = clip.encode_image(pictures()), clip.encode_text(model.text_tower.tokenize(TEXTS))
    samples = {"image": pictures(), "text_input": TEXTS}
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    torch.testing.assert_close(model.encode_target(pictures()), image)
    torch.testing.assert_close(model.encode_query(samples, "image"), image)
    torch.testing.assert_close(model.encode_query(samples, "text"), text)
    torch.testing.assert_close(model.encode_query(samples), F.normalize(image + text, dim=-1))
    torch.testing.assert_close(model.extract_features(samples).multimodal_embeds, F.normalize(image + text, dim=-1))


def model_file(make, clip_model):
    return make.__closure__[[*make.__code__.co_freevars].index("tmp_path")].cell_contents / f"{clip_model}.pt"


def test_clip_cir_trains_on_captions_as_clip_and_on_triplets(make, clip_model):
    model = make(ClipCir, clip_model, freeze_vit=False)
    batch = {"image": pictures(), "text_input": TEXTS}
    scale = float(model.text_tower.clip.logit_scale.exp().clamp(max=100))
    units = F.normalize(model.image_tower(pictures())[:, 0], dim=-1), model.encode_query(batch, "text")
    torch.testing.assert_close(model(batch)["loss"], symmetric_contrastive_loss(*units, 1 / scale))
    same = {**batch, "image_id": torch.tensor([4, 4, 9])}
    assert float(model(same)["loss"]) < float(model(batch)["loss"]), "the same image is no negative"
    model({**batch, "target": pictures(seed=2), "target_id": torch.arange(3)})["loss"].backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == [], "DistributedDataParallel would wait for these"


def test_a_temperature_below_its_limit_is_still_trained(make):
    """CLIP's own weights end at the limit and SigLIP's lie beyond it: the gradient is the one at the limit."""
    gradients = []
    for scale in (100.0, 118.0):
        model = make(ClipCir)
        model.text_tower.clip.logit_scale.data.fill_(scale).log_()
        assert float(model.temperature) == pytest.approx(0.01)
        model({"image": pictures(), "text_input": TEXTS, "target": pictures(seed=2)})["loss"].backward()
        gradients.append(float(model.text_tower.clip.logit_scale.grad))
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)
    assert abs(gradients[1]) > 1e-3


def test_frozen_towers_stay_as_loaded_and_in_eval_mode(make):
    model = make(ClipCir, freeze_vit=True, freeze_text=False).train()
    assert not model.image_tower.training
    assert model.text_tower.training
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {"text_tower"}


def test_a_checkpoint_of_clip_cir_serves_as_weights_of_clip(make, tmp_path):
    trained = make(ClipCir, freeze_vit=False)
    nn.init.normal_(trained.image_tower.visual.conv1.weight)
    path = saved(trained, tmp_path / "clip_cir.pth")
    model = make(TscirMapping, pretrained=path)
    torch.testing.assert_close(model.encode_target(pictures()), trained.encode_target(pictures()))
    again = make(ClipCir)
    again.load_checkpoint(path)
    trained.eval()
    assert torch.equal(again.encode_target(pictures()), trained.encode_target(pictures()))


# Reduction to open_clip.


def silence(model):
    """Set the last weights of injections and adapters to zero, so that they add nothing."""
    with torch.no_grad():
        for injection in model.injections.values():
            injection.to_word[2].weight.zero_()
            injection.to_word[2].bias.zero_()
        for adapter in getattr(model, "adapters", {}).values():
            adapter.up.zero_()
    return model


@pytest.mark.parametrize("model_class", [TscirMapping, TscirComposing])
def test_silent_injections_and_adapters_leave_open_clips_sentence(model_class, make, clip_model):
    """The query equals open_clip's encode_text of the sentence with the pseudo-word's embedding in it."""
    model = silence(make(model_class, clip_model)).eval()
    query = model.encode_query({"image": pictures(), "text_input": TEXTS})
    word, _ = model.mapping(model.image_features(pictures()))
    for row, text in enumerate(TEXTS):
        clip = load_clip(clip_model, str(model_file(make, clip_model)))
        table = (clip.text if hasattr(clip, "text") else clip).token_embedding
        with torch.no_grad():
            table.weight[model.text_tower.placeholder_id] = word[row]
        ids = model.text_tower.tokenize([f"a photo of * that {text}"])
        expected = F.normalize(clip.encode_text(ids), dim=-1)[0]
        torch.testing.assert_close(query[row], expected, atol=1e-6, rtol=1e-5)


def test_injection_and_adapters_change_the_query_when_they_speak(make, clip_model):
    model = make(TscirComposing, clip_model).eval()
    for adapter in model.adapters.values():
        nn.init.normal_(adapter.up)
    samples = {"image": pictures(), "text_input": TEXTS}
    attributes = set(vars(model))
    full, stage_one = model.encode_query(samples), model.encode_query(samples, "mapping")
    assert set(vars(model)) == attributes, "an index would know another model by another attribute"
    assert not torch.allclose(full, stage_one, atol=1e-3)
    assert not torch.allclose(stage_one, silence(copy.deepcopy(model)).encode_query(samples, "mapping"), atol=1e-4)


def test_without_blocks_of_injection_the_mapping_is_pic2words(make, clip_model):
    model = make(TscirMapping, clip_model, injection_blocks=[], loss_weights={"weak": 0, "sta": 0})
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        f"mapping.word.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")
    }
    model.eval()
    out = model({"image": pictures(), "text_input": TEXTS})
    sentence = model._sentence_features([PLAIN_SENTENCE] * 3, model.image_features(pictures()))
    torch.testing.assert_close(
        out["loss"], symmetric_contrastive_loss(model.encode_target(pictures()), sentence, model.temperature)
    )
    assert set(out) == {"loss", "loss_con"}


# Losses of both stages.


def test_stage_one_has_the_three_losses_of_two_views(make):
    model = make(TscirMapping, dropout=0.0)
    for injection in model.injections.values():
        injection.eval()  # running statistics, so that both calls see the same
    weak, view = pictures(seed=3), pictures(seed=4)
    out = model({"image": torch.stack([weak, view], dim=1), "text_input": TEXTS})
    sentence = model._sentence_features([PLAIN_SENTENCE] * 3, model.image_features(weak))
    v_weak, v = model.encode_target(weak), model.encode_target(view)
    c = model.encode_query({"text_input": TEXTS}, "text")
    expected = (
        symmetric_contrastive_loss(v, sentence, 0.07)
        + symmetric_contrastive_loss(v_weak, sentence, 0.07)
        + 0.2 * soft_text_alignment_loss(c, sentence, v, 0.07)
    )
    torch.testing.assert_close(out["loss"], expected)


def test_a_single_view_is_both(make):
    model = make(TscirMapping, dropout=0.0).eval()
    once = model({"image": pictures(), "text_input": TEXTS})
    twice = model({"image": pictures()[:, None].expand(-1, 2, -1, -1, -1), "text_input": TEXTS})
    torch.testing.assert_close(once["loss"], twice["loss"])


@pytest.mark.parametrize("quirk", [{}, {"mixed_negatives_scaled": False}, {"alignment_with_target": True}])
def test_stage_two_has_its_losses_and_the_quirks_of_the_released_code(make, quirk):
    model = make(TscirComposing, mixed_negatives=1, temperature=0.1, **quirk)
    batch = triplets()
    out = model(batch)
    query = model.encode_query(batch)
    sentence = model._sentence_features([PLAIN_SENTENCE] * 3, model.image_features(batch["image"]))
    reference, target = model.encode_target(batch["image"]), model.encode_target(batch["target"])
    c = model.encode_query({"text_input": batch["reference_caption"]}, "text")
    seen = target if quirk.get("alignment_with_target") else reference
    expected = (
        mixed_negatives_loss(query, target, 0.1, batch["target_id"], 1, quirk.get("mixed_negatives_scaled", True))
        + symmetric_contrastive_loss(reference, sentence, 0.1)
        + 0.2 * soft_text_alignment_loss(c, sentence, seen, 0.1)
    )
    torch.testing.assert_close(out["loss"], expected)
    if quirk:
        assert float(out["loss"]) != pytest.approx(
            float(make(TscirComposing, mixed_negatives=1, temperature=0.1)(batch)["loss"])
        )


def test_a_loss_of_weight_0_is_not_computed_and_needs_nothing(make):
    model = make(TscirComposing, loss_weights={"sta": 0})
    assert set(model(triplets(with_captions=False))) == {"loss", "loss_compose", "loss_reference"}
    with pytest.raises(ValueError, match=r"model\.loss_weights\.sta needs the captions of the reference images"):
        make(TscirComposing)(triplets(with_captions=False))


def test_a_reference_that_repeats_is_no_negative_of_itself(make):
    """The sentence "a photo of *" of a repeated reference is equal too, so it cannot be a negative."""
    model = make(TscirComposing, loss_weights={"sta": 0}, temperature=0.1).eval()
    batch = {**triplets(), "image": pictures()[[0, 0, 1]]}
    known = {**batch, "image_id": torch.tensor([5, 5, 8])}
    reference = model.encode_target(batch["image"])
    sentence = model._sentence_features([PLAIN_SENTENCE] * 3, model.image_features(batch["image"]))
    expected = symmetric_contrastive_loss(reference, sentence, 0.1, known["image_id"])
    torch.testing.assert_close(model(known)["loss_reference"], expected)
    assert float(model(known)["loss_reference"]) < float(model(batch)["loss_reference"])
    torch.testing.assert_close(model(known)["loss_compose"], model(batch)["loss_compose"])


def test_features_may_stand_for_pictures(make):
    model = make(TscirComposing)
    batch = triplets()
    features = {**batch, "image": model.image_features(batch["image"]), "target": model.image_features(batch["target"])}
    torch.testing.assert_close(model(features)["loss"], model(batch)["loss"])
    torch.testing.assert_close(model.encode_query(features), model.encode_query(batch))


def test_two_views_are_refused_by_stage_two(make):
    batch = {**triplets(), "image": pictures()[:, None].expand(-1, 2, -1, -1, -1)}
    with pytest.raises(ValueError, match="tscir_composing trains on single views"):
        make(TscirComposing)(batch)


# What trains.


def test_stage_one_trains_mapping_and_injections_all_of_them(make):
    model = make(TscirMapping).train()
    model({"image": pictures(), "text_input": TEXTS})["loss"].backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"mapping", "injections"}
    # A key's bias shifts all scores of a row equally, so its gradient is 0 up to rounding; the others must learn.
    silent = [name for name, weight in trained.items() if weight.grad is None]
    assert silent == []
    assert not model.image_tower.training
    assert not model.text_tower.training
    assert model.mapping.training


def test_stage_two_trains_the_adapters_alone_and_all_else_is_in_eval_mode(make):
    model = make(TscirComposing).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {n for n, weight in model.named_parameters() if weight.requires_grad} == {
        f"adapters.{block}.{side}" for block in (0, 2) for side in ("down", "up")
    }
    training = {name for name, module in model.named_modules() if module.training}
    assert {name.split(".")[0] for name in training} == {"", "adapters"}
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    model(triplets())["loss"].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"adapters.{block}.{side}" for block in (0, 2) for side in ("down", "up")}


# Checkpoints.


def test_stage_two_goes_on_from_stage_one_and_its_checkpoint_holds_both(make, tmp_path, clip_model):
    stage_one = make(TscirMapping, clip_model, seed=3).eval()
    path = saved(stage_one, tmp_path / "one.pth")
    samples = {"image": pictures(), "text_input": TEXTS}
    stage_two = make(TscirComposing, clip_model, seed=4, mapping_checkpoint=path).eval()
    torch.testing.assert_close(stage_two.encode_query(samples, "mapping"), stage_one.encode_query(samples))
    whole = saved(stage_two, tmp_path / "two.pth")
    again = make(TscirComposing, clip_model, seed=5).eval()
    again.load_checkpoint(whole)
    assert torch.equal(again.encode_query(samples), stage_two.encode_query(samples))
    assert torch.equal(again.encode_query(samples, "mapping"), stage_two.encode_query(samples, "mapping"))
    assert not any(name.startswith(("image_tower", "text_tower")) for name in torch.load(whole)["model"])


def test_only_what_matches_is_loaded(make, tmp_path):
    one = saved(make(TscirMapping), tmp_path / "one.pth")
    state = torch.load(one)["model"]

    def refused(problem, path=one, **changes):
        with pytest.raises(ValueError, match=problem):
            make(TscirComposing, mapping_checkpoint=path, **changes)

    refused(r"missing keys \(first: injections\.0\.conv\.weight\)|1 unexpected|unexpected keys", injection_blocks=[1])
    refused(r"keys of another shape", hidden_width=12)
    torch.manual_seed(9)
    torch.save(load_clip("small_clip").state_dict(), tmp_path / "other.pt")
    refused(r"was trained on other weights of CLIP than model\.clip_model and", pretrained=str(tmp_path / "other.pt"))
    torch.save({k: v for k, v in state.items() if "running_var" not in k}, tmp_path / "lacks.pth")
    refused(r"2 missing keys \(first: injections\.0\.norm\.running_var\)", str(tmp_path / "lacks.pth"))
    torch.save({k: v for k, v in state.items() if k != "clip_fingerprint"}, tmp_path / "foreign.pth")
    refused("was not trained by a model of TSCIR", str(tmp_path / "foreign.pth"))
    with pytest.raises(ValueError, match=r"missing keys \(first: adapters\.0\.down\)"):
        make(TscirComposing).load_checkpoint(one)
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*gone\.pth does not exist"):
        make(TscirComposing, mapping_checkpoint=str(tmp_path / "gone.pth"))


def test_a_checkpoint_of_stage_two_is_no_start_for_another(make, tmp_path):
    """Otherwise its trained adapters would be loaded with the mapping."""
    two = make(TscirComposing, mapping_checkpoint=saved(make(TscirMapping), tmp_path / "one.pth"))
    path = saved(two, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"mapping_checkpoint: .*two\.pth holds adapters of stage II"):
        make(TscirComposing, mapping_checkpoint=path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"injection_heads": 4}, r"was trained with model\.injection_heads: 2, here it is 4"),
        ({"pixels": "inception"}, r"was trained with model\.pixels: clip, here it is inception"),
        ({"clip_model": "small_clip-quickgelu"}, r"was trained with model\.clip_model: small_clip, here it is small_"),
    ],
)
def test_settings_that_no_tensor_tells_are_compared(make, tmp_path, change, problem):
    path, pretrained = tmp_path / "one.pth", str(tmp_path / "small_clip.pt")
    one = make(TscirMapping)
    theirs = {"arch": "tscir_mapping", "clip_model": "small_clip", "pretrained": pretrained, **SIZES}
    torch.save({"model": one.state_dict(), "config": {"model": theirs}}, path)
    make(TscirMapping).load_checkpoint(str(path))
    make(TscirMapping, pixels="clip").load_checkpoint(str(path))
    with pytest.raises(ValueError, match=problem):
        make(TscirMapping, **{"pretrained": pretrained, **change}).load_checkpoint(str(path))
    with pytest.raises(ValueError, match=problem):
        make(TscirComposing, mapping_checkpoint=str(path), **{"pretrained": pretrained, **change})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pixels": "inception"}, r"was trained with model\.pixels: clip, here it is inception"),
        ({"clip_model": "small_clip-quickgelu"}, r"was trained with model\.clip_model: small_clip, here it is small_"),
    ],
)
def test_clip_cirs_checkpoint_compares_them_too(make, tmp_path, change, problem):
    """QuickGELU's weights have the names and shapes of GELU's, and pixels have none."""
    path, pretrained = tmp_path / "tuned.pth", str(tmp_path / "small_clip.pt")
    theirs = {"arch": "clip_cir", "clip_model": "small_clip", "pretrained": pretrained}
    torch.save({"model": make(ClipCir).state_dict(), "config": {"model": theirs}}, path)
    make(ClipCir, seed=1).load_checkpoint(str(path))
    with pytest.raises(ValueError, match=problem):
        make(ClipCir, **{"pretrained": pretrained, **change}).load_checkpoint(str(path))


@pytest.mark.parametrize("freeze_vit", [True, False])
def test_a_trained_clip_cir_is_found_again(make, clip_model, tmp_path, freeze_vit):
    """SigLIP's bias of the logits is never trained, so that no checkpoint holds it."""
    trained = make(ClipCir, clip_model, freeze_vit=freeze_vit)
    with torch.no_grad():
        for weight in trained.parameters():
            weight += 0.01 * weight.requires_grad
    again = make(ClipCir, clip_model, freeze_vit=freeze_vit)
    again.load_checkpoint(saved(trained, tmp_path / "trained.pth"))
    samples = {"image": pictures(), "text_input": TEXTS}
    torch.testing.assert_close(again.encode_query(samples), trained.encode_query(samples))


def test_a_merged_checkpoint_brings_its_own_clip(make, tmp_path):
    """``lavis-cir lora --merge`` writes the whole model; later checkpoints lack CLIP, which must then be named."""
    merged = make(TscirMapping).eval()
    with torch.no_grad():
        merged.text_tower.clip.transformer.resblocks[0].mlp.c_fc.weight += 0.1
    path = str(tmp_path / "merged.pth")
    torch.save({"model": merged.state_dict()}, path)
    samples = {"image": pictures(), "text_input": TEXTS}
    again = make(TscirMapping, seed=1).eval()
    again.load_checkpoint(path)
    torch.testing.assert_close(again.encode_query(samples), merged.encode_query(samples))
    went_on = saved(again, tmp_path / "went_on.pth")
    with pytest.raises(ValueError, match="was trained on other weights of CLIP"):
        make(TscirMapping).load_checkpoint(went_on)
    with pytest.raises(ValueError, match=r"merged\.pth holds other weights of CLIP .* set model\.pretrained to it"):
        make(TscirComposing, mapping_checkpoint=path)
    two = make(TscirComposing, mapping_checkpoint=path, pretrained=path).eval()
    # The weights are the same bits; a product may round otherwise where the same weights lie elsewhere in memory.
    read = two.text_tower.state_dict()
    assert all(torch.equal(weight, read[name]) for name, weight in merged.text_tower.state_dict().items())
    torch.testing.assert_close(two.encode_query(samples, "mapping"), merged.encode_query(samples))
    made = make(TscirComposing, pretrained=path, seed=2).eval()
    made.load_checkpoint(saved(two, tmp_path / "two.pth"))
    torch.testing.assert_close(made.encode_query(samples), two.encode_query(samples))


def test_the_fingerprint_knows_every_weight_and_no_device(make):
    model = make(TscirMapping)
    assert torch.equal(model.clip_fingerprint, make(TscirMapping, seed=5).clip_fingerprint)
    with torch.no_grad():
        model.text_tower.clip.ln_final.bias[3] += 1e-7
    assert not torch.equal(weights_fingerprint(model.image_tower, model.text_tower), model.clip_fingerprint)


# Evaluation.


def test_attention_maps_sum_to_one(make, clip_model):
    maps = make(TscirMapping, clip_model).eval().attention_maps({"image": pictures(), "text_input": TEXTS})
    assert maps.shape == (3, 2, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(3, 2))


def test_rows_do_not_depend_on_their_batch(make, clip_model):
    model = make(TscirComposing, clip_model).eval()
    samples = {"image": pictures(), "text_input": TEXTS}
    alone = [model.encode_query({"image": pictures()[i : i + 1], "text_input": TEXTS[i : i + 1]}) for i in range(3)]
    torch.testing.assert_close(model.encode_query(samples), torch.cat(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_class", [ClipCir, TscirMapping, TscirComposing])
def test_every_reported_mode_gives_unit_vectors_and_others_are_refused(make, model_class):
    model = make(model_class).eval()
    for mode in ("multimodal", *model.baselines):
        query = model.encode_query({"image": pictures(), "text_input": TEXTS}, mode)
        torch.testing.assert_close(query.norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match=r"model\.mode must be one of multimodal, image, text"):
        model.encode_query({}, "both")


def test_a_template_of_ones_own(make):
    model = make(TscirMapping, template="* , {}").eval()
    assert model._sentences(["is red"]) == ["* , is red"]
    assert model.encode_query({"image": pictures(), "text_input": TEXTS}).shape == (3, 8)


def test_a_template_whose_image_is_no_word_of_its_own_is_refused(make):
    """CLIP's tokenizer joins punctuation to "*"; a second placeholder word could be taken for the image."""
    with pytest.raises(ValueError, match=r"model\.template: 'a photo of \*, \{\}' .* as one word"):
        make(TscirMapping, template="a photo of *, {}")
    with pytest.raises(ValueError, match=r"model\.template: 'x of \* that \{\}' .* as one word"):
        make(TscirMapping, "small_siglip", template="x of * that {}")


# Configs.


@pytest.mark.parametrize("model_class", [ClipCir, TscirMapping, TscirComposing])
def test_types_are_named_after_open_clips_models(model_class):
    assert sorted(model_class.PRETRAINED_MODEL_CONFIG_DICT) == sorted(TYPES)
    name = {ClipCir: "clip_cir", TscirMapping: "tscir_mapping", TscirComposing: "tscir_composing"}[model_class]
    assert model_zoo.model_zoo[name] == list(model_class.PRETRAINED_MODEL_CONFIG_DICT)


def test_lavis_loads_a_type_by_name():
    assert isinstance(load_model("clip_cir", "tiny"), ClipCir)


BASE = {"clip_model": "small_clip", "pretrained": "x.pt", "injection_blocks": [1], "adapter_blocks": [0, 2]}


@pytest.mark.parametrize(
    ("model_class", "change", "problem"),
    [
        (ClipCir, {"clip_model": "ViT-L-41"}, "model.clip_model: 'ViT-L-41' is no model of open_clip"),
        (ClipCir, {"pixels": "half"}, "model.pixels must be one of auto, clip, inception, got 'half'"),
        (ClipCir, {"image_size": 0}, "model.image_size must be a whole number >= 1, or null, got 0"),
        (ClipCir, {"freeze_vit": "yes"}, "model.freeze_vit must be true or false, got 'yes'"),
        (ClipCir, {"pretrained": None}, "model.pretrained is empty, so frozen towers would keep random weights"),
        (TscirMapping, {"pretrained": None}, "model.pretrained is empty, so frozen towers would keep random weights"),
        (TscirMapping, {"template": "a photo"}, "model.template must be a text with one * for the image and after it"),
        (TscirMapping, {"template": "* and * {}"}, "model.template must be a text with one * for the image"),
        (
            TscirMapping,
            {"template": "{} than *"},
            "model.template must be a text with one * for the image and after",
        ),
        (TscirMapping, {"injection_blocks": [1, 2]}, "distinct numbers of text blocks from 0 to 1 (an injection after"),
        (TscirMapping, {"injection_blocks": [1, 1]}, "distinct numbers of text blocks from 0 to 1"),
        (TscirMapping, {"injection_blocks": 1}, "model.injection_blocks must be distinct numbers"),
        (TscirMapping, {"injection_heads": 3}, "model.injection_heads: 3 does not divide model.injection_width: 128"),
        (TscirMapping, {"dropout": 1}, "model.dropout must be a number >= 0 and < 1, got 1"),
        (TscirMapping, {"temperature": 0}, "model.temperature must be a number > 0, got 0"),
        (TscirMapping, {"loss_weights": {"compose": 1}}, "model.loss_weights.compose is no loss of this model"),
        (TscirMapping, {"loss_weights": {"con": -1}}, "model.loss_weights.con must be a number >= 0, got -1"),
        (TscirMapping, {"loss_weights": {"con": 0, "weak": 0, "sta": 0}}, "model.loss_weights are all 0"),
        (
            TscirComposing,
            {"adapter_blocks": [3]},
            "model.adapter_blocks must be distinct numbers of text blocks from 0",
        ),
        (TscirComposing, {"adapter_blocks": []}, "model.adapter_blocks is empty, so that nothing would be trained"),
        (TscirComposing, {"mixed_negatives": -1}, "model.mixed_negatives must be a whole number >= 0, got -1"),
        (TscirComposing, {"mixed_negatives_scaled": 1}, "model.mixed_negatives_scaled must be true or false, got 1"),
        (TscirComposing, {"mapping_checkpoint": None}, "model.mapping_checkpoint is empty, so the mapping would stay"),
    ],
)
def test_impossible_values_name_key_value_and_remedy(model_class, change, problem):
    base = {**BASE, "mapping_checkpoint": "one.pth"}
    model_class.check_config(base)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence is compared below)
        model_class.check_config({**base, **change})
    assert problem in str(caught.value)


def test_a_checkpoint_of_stage_two_needs_no_file_of_stage_one(make, tmp_path):
    """The checkpoint holds stage I, so the ``mapping_checkpoint`` of the training's config is not read."""
    one = saved(make(TscirMapping), tmp_path / "one.pth")
    two = make(TscirComposing, mapping_checkpoint=one).eval()
    path = saved(two, tmp_path / "two.pth")
    gone = {"mapping_checkpoint": str(tmp_path / "gone.pth")}
    own = {**BASE, **SIZES, "injection_blocks": [0, 1], "adapter_rank": 4, **gone}
    config = {**own, "pretrained": str(tmp_path / "small_clip.pt"), "load_finetuned": True, "finetuned": path}
    TscirComposing.check_config(config)
    built = TscirComposing.from_config(config)
    assert all(torch.equal(built.state_dict()[name], tensor) for name, tensor in two.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        TscirComposing.from_config({**config, "load_finetuned": False})
