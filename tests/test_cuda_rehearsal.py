"""What a GPU would do, rehearsed without one (`cuda_rehearsal`): everything on "cuda", and the numbers of the CPU."""

from __future__ import annotations

import ast
import copy
import importlib
import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SCORING_MODELS, SMALL, make_preferences, make_scoring_model, make_triplets
from cuda_rehearsal import CUDA, PACKAGE, off_cuda, on_cuda, rehearsal, to_cuda
from lavis.common import dist_utils
from lavis.tasks.base_task import BaseTask

from lavis_cir_plugin.methods.retrieval_dpo.losses import VARIANTS, PreferenceSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import learn_preferences
from lavis_cir_plugin.methods.wrf4cir.generalisation_gap import loss_along
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.models.blip_tiny import BlipCaptionTiny, BlipVqaTiny
from lavis_cir_plugin.ranking.ranks import rank, rerank
from lavis_cir_plugin.training.lora import LoraSettings, add_adapters

# Where a training step waits for the GPU on purpose.
WAITS = {
    "methods/wrf4cir/optimizer.py:_perturbed": "whether the direction is finite decides what the second pass computes",
    "methods/wrf4cir/optimizer.py:_gradient": "GradScaler's factor is read before anything of the step is queued",
    "methods/wrf4cir/frozen_memo.py:_is_equal": "an output is used again only if the inputs are equal",
    "methods/wrf4cir/optimizer.py:measure": "a number for the log, in measured steps alone",
    "methods/wrf4cir/optimizer.py:_cosine": "a number for the log, in measured steps alone",
    "models/open_clip_towers.py:forward": "open_clip 2 counts the rows of a batch on the CPU",
    "models/open_clip_towers.py:compose": "the sentences' check, on the CPU; inside it open_clip 2 counts rows there",
}
# Calls in a training step that look like waits and are none.
NO_WAITS = {
    "core/random_state.py:set_random_state": "NumPy's state is on the CPU",
    "methods/blip2_cir/model.py:_tokens_shape": "numbers of Python",
    "methods/tscir/composing.py:forward": "numbers of Python",
    "methods/tscir/composing.py:_edits": "numbers of Python",
    "methods/tscir/mapping.py:_edits": "numbers of Python",
    "methods/wrf4cir/frozen_memo.py:equals": "structures of Python",
    "models/open_clip_towers.py:tokenize": "token ids are on the CPU",
}


def batch_of(size=3):
    """Return triplets with what any of the models reads."""
    batch = make_triplets(size)
    return {**batch, "reference_caption": batch["text_input"], "epoch": 0}


def assert_near(found, expected):
    torch.testing.assert_close(off_cuda(found), expected, rtol=1e-4, atol=1e-4)


def step_of(model, batch, seed=5):
    """Return a model's outputs and the gradients of its loss by name."""
    torch.manual_seed(seed)
    outputs = model(batch)
    outputs["loss"].backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: value.detach() for name, value in outputs.items() if isinstance(value, torch.Tensor)}, gradients


# The rehearsal itself


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.cat([x, torch.zeros(1, 4)]),
        lambda x: F.linear(x, torch.ones(2, 4)),
        lambda x: torch.ones(4) @ x.T,
        lambda x: x.numpy(),
        lambda x: torch.randn(2, device=x.device, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_what_a_gpu_refuses_is_refused(mistake):
    with rehearsal() as gpu:
        x = torch.ones(2, 4, device="cuda")
        with pytest.raises((RuntimeError, TypeError), match="device"):
            mistake(x)
    assert not gpu.waits


def test_every_wait_is_noted_and_nothing_else():
    with rehearsal() as gpu:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        pixels = torch.ones(2, 3)
        (x * torch.tensor(2.0) + 1).softmax(dim=1).to(torch.float16).to(CUDA)
        pixels.to(CUDA, non_blocking=True)
        torch.arange(2, device=x.device)
        assert not gpu.waits
        waits = [
            lambda: float(x.sum()),
            lambda: bool((x > 1).all()),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x[x > 1],
            lambda: torch.equal(x, x),
            lambda: pixels.to(CUDA),
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: x[torch.tensor([0])],
        ]
        for count, wait in enumerate(waits, start=1):
            wait()
            assert gpu.waits == {f"{Path(__file__).name}:<lambda>": count}


def test_autocast_has_the_types_of_a_gpu():
    with rehearsal(), torch.autocast("cuda", dtype=torch.float16):
        x = torch.randn(2, 4, device="cuda")
        product = F.linear(x, torch.randn(3, 4, device="cuda"))
        assert (product.dtype, product.softmax(dim=1).dtype) == (torch.float16, torch.float32)
        assert F.layer_norm(product, (3,)).dtype == torch.float32


# Models, losses, perturbation


@pytest.mark.parametrize("name", SCORING_MODELS)
def test_a_step_and_the_encoding_have_the_numbers_of_the_cpu(name):
    model, batch = make_scoring_model(name), batch_of()
    batch["target_id"] = torch.tensor([4, 9, 4])
    modes = ["multimodal", *getattr(model, "baselines", ("image", "text"))]

    def encoded(model, samples):
        return [model.encode_target(samples["target"]), *(model.encode_query(samples, mode) for mode in modes)]

    expected = step_of(model.train(), batch), encoded(model.eval(), batch)
    model.zero_grad()
    with rehearsal() as gpu:
        to_cuda(model)
        batch = on_cuda(batch)
        found = step_of(model.train(), batch)
        assert gpu.waiting() <= {"models/open_clip_towers.py:forward", "models/open_clip_towers.py:compose"}
        assert_near((found, encoded(model.eval(), batch)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_of_retrieval_dpo_are_on_the_gpu(variant):
    model, batch = make_scoring_model("clip text"), make_preferences(3, 2)
    batch["negatives_present"][1] = torch.tensor([True, False])
    batch["reference_scores"] = torch.rand(3, 3)
    learn_preferences(model, PreferenceSettings(variant=variant, anchor=0.5))
    expected = {name: value.detach() for name, value in model(batch).items()}
    with rehearsal() as gpu:
        to_cuda(model)
        batch = on_cuda(batch)
        assert_near({name: value.detach() for name, value in model(batch).items()}, expected)
        assert gpu.waiting() <= {"models/open_clip_towers.py:forward"}


ONE_LAYER = {**SMALL["qformer_config"], "num_hidden_layers": 1}
PERTURBATIONS = {
    "gradient": {},
    "global": {"scope": "global", "tensors": "all"},
    "elementwise": {"radius": "elementwise", "gamma": 0.05},
    "rows of embeddings": {"embeddings": "row"},
    "every": {"every": 2},
    "share": {"direction_share": 0.5},
    "random": {"direction": "random"},
    "momentum": {"direction": "momentum"},
    "adapters": {},
}


def trained(name, on_gpu):
    """Return the weights after three perturbed steps, and what was measured."""
    model, batch = make_scoring_model("frozen tower", qformer_config=ONE_LAYER), batch_of()
    if name == "adapters":
        torch.manual_seed(2)
        add_adapters(model, LoraSettings(target_modules=["query", "value"], r=2, lora_alpha=3))
    if on_gpu:
        model, batch = to_cuda(model), on_cuda(batch)
    model.train()
    stock = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2, eps=1e-4)
    optimizer = PerturbingOptimizer(stock, model, WeightPerturbation(**{"gamma": 0.02, **PERTURBATIONS[name]}))
    call = optimizer.perturb(model)
    for step in range(3):
        optimizer.is_measuring = step == 2
        torch.manual_seed(step)
        call(dict(batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return weights, optimizer


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbed_steps_have_the_numbers_of_the_cpu(name):
    expected, optimizer = trained(name, on_gpu=False)
    with rehearsal() as gpu:
        weights, own = trained(name, on_gpu=True)
        assert gpu.waiting() <= set(WAITS)
        torch.testing.assert_close(off_cuda(weights), expected, rtol=1e-3, atol=1e-4)
    assert own.steps == optimizer.steps
    assert own.steps["perturbed"] + (name == "momentum") == 3
    assert own.measured == pytest.approx(optimizer.measured, rel=1e-3)


def test_the_loss_around_the_weights_is_computed_on_the_gpu():
    model, batch = make_scoring_model("frozen tower").eval(), batch_of()
    with mock.patch("lavis_cir_plugin.methods.wrf4cir.generalisation_gap.MULTIPLES", (0, 4)):
        expected = loss_along(model, [batch])
        with rehearsal():
            found = loss_along(to_cuda(model), [on_cuda(batch)])
    for direction, losses in expected.items():
        assert found[direction] == pytest.approx(losses, rel=1e-3)


TINY = {
    "image_size": 32,
    "vit_config": {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "bert_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 48,
    },
}


@pytest.mark.parametrize("kind", ["question", "caption"])
def test_lavis_own_models_train_perturbed_and_answer(kind):
    torch.manual_seed(0)
    picture = {"image": torch.randn(2, 3, 32, 32)}
    if kind == "question":
        model = BlipVqaTiny(**TINY)
        asked = {"text_input": ["is it red", "is it blue"], "answer": ["yes", "no"], "n_answers": [1, 1]}
        batch = {**picture, **asked, "weight": torch.ones(2)}
        answer = partial(model.predict_answers, inference_method="generate", num_beams=1, max_len=3)
    else:
        model = BlipCaptionTiny(**TINY)
        batch = {**picture, "text_input": ["a red dress", "a blue shirt"]}
        answer = partial(model.generate, use_nucleus_sampling=False, num_beams=1, max_length=8, min_length=2)
    model.eval()  # its dropout draws other numbers on a GPU
    expected, said = step_of(model, batch), answer(batch)
    model.zero_grad()
    with rehearsal():
        to_cuda(model)
        assert_near(step_of(model, on_cuda(batch)), expected)
        assert answer(on_cuda(batch)) == said


# Waits


def functions_of_a_step():
    """Return the functions of the package, as file and first line, that run in training steps of every kind."""
    ran = set()

    def note(frame, event, _):
        if event == "call":
            ran.add(frame.f_code)

    def run(model, batch, settings, steps=2):
        stock = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
        optimizer = PerturbingOptimizer(stock, model, settings)
        call, optimizer.is_measuring = optimizer.perturb(model), True
        sys.setprofile(note)
        try:
            for _ in range(steps):
                call(dict(batch))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            sys.setprofile(None)

    for name in SCORING_MODELS:
        run(make_scoring_model(name).train(), batch_of(), WeightPerturbation())
    for name, changes in PERTURBATIONS.items():
        model = make_scoring_model("frozen tower", qformer_config=ONE_LAYER).train()
        if name == "adapters":
            add_adapters(model, LoraSettings(target_modules=["query", "value"], r=2, lora_alpha=3))
        run(model, batch_of(), WeightPerturbation(**changes))
    for variant in VARIANTS:
        model = make_scoring_model("clip text")
        learn_preferences(model, PreferenceSettings(variant=variant, anchor=0.5))
        run(model, {**make_preferences(3, 2), "reference_scores": torch.rand(3, 3)}, WeightPerturbation(), 1)
    files = [(Path(code.co_filename), code.co_firstlineno) for code in ran]
    return {(path, line) for path, line in files if PACKAGE in path.parents}


METHODS = {"cpu", "cuda", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "synchronize", "tolist"}


def is_like_a_wait(node):
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in METHODS
    return isinstance(node.func, ast.Name) and node.func.id in ("bool", "float", "int")


def test_no_function_of_a_step_waits_for_the_gpu_beside_those_that_say_why():
    """Read the code of what ran in real steps: also the branches that did not run must not wait."""
    ran = functions_of_a_step()
    assert len(ran) > 150
    found = set()
    for path in {path for path, _ in ran}:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
                continue
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            if (path, first) in ran and any(map(is_like_a_wait, ast.walk(node))):
                found.add(f"{path.relative_to(PACKAGE).as_posix()}:{getattr(node, 'name', '<lambda>')}")
    of_torch_or_open_clip = {"methods/wrf4cir/optimizer.py:_gradient", "models/open_clip_towers.py:forward"}
    assert found == {*WAITS, *NO_WAITS} - of_torch_or_open_clip


# Mixed precision


def test_lavis_loop_trains_in_half_precision_under_autocast(monkeypatch):
    """LAVIS's loop under ``run.amp``: matrix products in float16, losses and weights in float32."""
    monkeypatch.setattr(dist_utils, "is_dist_avail_and_initialized", lambda: False)
    model, seen = make_scoring_model("frozen tower", qformer_config=ONE_LAYER), []
    model.text_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    start = copy.deepcopy(model.state_dict())
    schedule = mock.Mock()
    with rehearsal() as gpu:
        model.to("cuda").train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = PerturbingOptimizer(torch.optim.AdamW(weights, lr=1e-2), model, WeightPerturbation())
        scaler = torch.cuda.amp.GradScaler(init_scale=2.0**8)
        call = optimizer.perturb(model, scaler.get_scale)
        stats = BaseTask().train_epoch(
            0, call, [make_triplets(3), make_triplets(3, seed=2)], optimizer, schedule, scaler, cuda_enabled=True
        )
        assert optimizer.steps == {"perturbed": 2, "skipped": 0}
        assert set(seen) == {torch.float16}
        places = {f"methods/wrf4cir/{place}" for place in ("optimizer.py:_perturbed", "optimizer.py:_gradient")}
        assert gpu.waiting() == {*places, "methods/wrf4cir/frozen_memo.py:_is_equal"}
        moved = off_cuda({name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad})
    assert {weight.dtype for weight in moved.values()} == {torch.float32}
    assert all(not torch.equal(weight, start[name]) for name, weight in moved.items() if weight.dim() > 1)
    assert math.isfinite(float(stats["loss"]))


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_tower_in_half_precision_computes_in_it_with_and_without_autocast_around(is_mixed):
    """The tower's own layers see float16, and what is trained behind it float32 unless ``run.amp`` is set."""
    model = make_scoring_model("frozen tower", vit_precision="fp16")
    exact = make_scoring_model("frozen tower")
    batch, entered, projected = make_triplets(2), [], []
    model.vision_proj.register_forward_hook(lambda module, inputs, output: projected.append(output.dtype))
    expected = exact.encode_target(batch["image"])
    stock = torch.autocast

    class Noted(stock):
        def __init__(self, device_type, dtype=None, **options):
            entered.append((device_type, dtype))
            super().__init__(device_type, dtype=dtype, **options)

    with rehearsal(), mock.patch.object(torch, "autocast", Noted):
        to_cuda(model)
        with stock("cuda", enabled=is_mixed, dtype=torch.float16):
            tokens = model.image_features(on_cuda(batch["image"]))
            assert entered == [("cuda", torch.float16)]
            assert tokens.dtype == torch.float16
            model.encode_target(tokens)
        assert projected == [torch.float16 if is_mixed else torch.float32]
        torch.testing.assert_close(off_cuda(model.encode_target(on_cuda(batch["image"]))), expected, rtol=0, atol=0.02)


# Ranking


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_rankings_with_ties_are_those_of_the_cpu(features, where):
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (5, 4), generator=generator).float()
    gallery = torch.randint(-2, 3, (30, features, 4), generator=generator).float().squeeze(1)
    targets = torch.randint(30, (5,), generator=generator)
    members = (targets[:, None] + torch.arange(4)) % 30
    given = {"excluded": (targets + 9) % 30, "members": members, "relevant": members[:, 1:3]}
    expected, best = rank(query, gallery, targets, top_k=7, **given), rerank(query, gallery, members, 3)
    with rehearsal():
        placed = gallery.to(where)
        found = rank(query.to(CUDA), placed, targets.to(CUDA), top_k=7, **on_cuda(given))
        for name, value in vars(expected).items():
            assert torch.equal(off_cuda(getattr(found, name)), value), name
        assert all(map(torch.equal, off_cuda(rerank(query.to(CUDA), placed, members.to(CUDA), 3)), best))


# The benchmarks' branches for a GPU


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def each_once(steps, rounds, device):
    """Run each step once, as the first round does, which looks at the memory."""
    assert device.type == "cuda"
    cost = importlib.import_module("perturbation_cost")
    with mock.patch.object(cost, "gc"):  # with all that the tests hold, each collection takes half a second
        peaks = {name: cost.peak_of(run_step, device) for name, run_step in steps.items()}
    return {name: [1.0] * 5 for name in steps}, peaks


def test_the_cost_of_perturbations_is_measured_to_its_end(script, monkeypatch, capsys):
    cost = script("perturbation_cost")
    small = {"vit_config": {**SMALL["vit_config"], "patch_size": 56}, "qformer_config": ONE_LAYER}
    monkeypatch.setattr(cost, "Blip2Cir", partial(cost.Blip2Cir, **small, num_query_token=3, embed_dim=6))
    monkeypatch.setattr(cost, "measure_in_turns", each_once)
    monkeypatch.setattr(cost, "loop_cost", lambda: 1.0)  # on the CPU, whatever the machine
    monkeypatch.setattr(sys, "argv", ["perturbation_cost.py", "--batch-size", "2"])
    with rehearsal():
        cost.main()
    said = capsys.readouterr().out
    assert "blip2_cir, rehearsed GPU, batch 2, 200 interleaved rounds" in said
    assert all(f"  {name:<24}     1.00    1.000" in said for name in cost.VARIANTS)
    assert "extrapolated, in hours" in said


def test_the_cost_of_tscir_is_measured_to_its_end(script, monkeypatch, capsys):
    cost = script("tscir_step_cost")
    monkeypatch.setattr(cost, "measure_in_turns", each_once)
    for name in ("TscirMapping", "TscirComposing"):
        small = {"hidden_width": 10, "injection_width": 8, "injection_heads": 2, "injection_blocks": [0, 1]}
        more = {"adapter_blocks": [0, 2], "adapter_rank": 3} if name == "TscirComposing" else {}
        monkeypatch.setattr(cost, name, partial(getattr(cost, name), **small, **more))
    monkeypatch.setattr(sys, "argv", ["tscir_step_cost.py", "--clip-model", "small_clip", "--batch-size", "2"])
    with rehearsal():
        cost.main()
    said = capsys.readouterr().out
    assert "small_clip, rehearsed GPU, batch 2, 100 interleaved rounds" in said
    assert "stage II, pictures" in said


@pytest.mark.parametrize("features", [1, 3])
def test_validation_metrics_are_measured_on_the_gpu(script, monkeypatch, features):
    metrics = script("validation_metrics")
    monkeypatch.setattr(metrics, "SIZES", {"cirr": {"val": (12, 40)}, "fashioniq": {"dress": (8, 30)}})
    monkeypatch.setattr(metrics, "REPEATS", 1)
    ways = [metrics.PRODUCT, metrics.STRINGS, metrics.OURS, *([metrics.USUAL_PRODUCT] if features > 1 else [])]
    for dataset in metrics.SIZES:
        expected = metrics.run_here(dataset, metrics.OURS, features)["recalls"]
        with rehearsal():
            found = {way: metrics.run_here(dataset, way, features) for way in ways}
        assert found[metrics.OURS]["recalls"] == found[metrics.STRINGS]["recalls"] == expected
        assert {result["device"] for result in found.values()} == {"rehearsed GPU"}
