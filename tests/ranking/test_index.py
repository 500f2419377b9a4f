"""Candidate search: every kind with enough candidates equals the exact search; index files; errors."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from lavis_cir_plugin.ranking import index as index_module
from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.index import KINDS, build_index, load_index, recall_against_exact
from lavis_cir_plugin.ranking.ranks import rank
from lavis_cir_plugin.ranking.scoring import similarity

FAISS_KINDS = [kind for kind in KINDS if kind != "exact"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


@pytest.fixture
def query() -> Tensor:
    return draw(7, 8)


@pytest.fixture
def gallery() -> Tensor:
    """Return 200 images of 3 vectors. Images 100 to 109 are copies of images 0 to 9, so scores tie."""
    gallery = draw(200, 3, 8, seed=1)
    gallery[100:110] = gallery[:10]
    return gallery


@pytest.mark.parametrize("excluded", [None, torch.tensor([3, -1, 0, 100, 5, 199, -1])])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_candidates_every_kind_is_the_exact_search(query, gallery, kind, tokens, excluded):
    """The search requests every vector and reads every list, so order and ties are those of `rank`."""
    gallery = gallery if tokens else gallery[:, 0]
    expected = rank(query, gallery, torch.full((7,), -1), excluded=excluded, top_k=40).top
    index = build_index(kind, gallery, probes=1000)
    scores, found = index.search(query, 40, excluded=excluded, hits=600)
    assert torch.equal(found, expected)
    true = similarity(query.double(), gallery.double()).gather(1, found)
    assert torch.allclose(scores, true, atol=1e-6)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_gallery_can_be_ordered_but_for_the_excluded_image(query, gallery, kind):
    excluded = torch.arange(7)
    _, found = build_index(kind, gallery, probes=1000).search(query, 200, excluded=excluded, hits=600)
    assert torch.equal(found, rank(query, gallery, excluded, excluded=excluded, top_k=200).top)
    assert (found[:, -1] == -1).all()


def test_more_is_asked_for_where_hits_belong_to_few_images():
    """The query's 10 nearest vectors belong to image 0. The first 4 hits are one image, so the search asks for more."""
    gallery = torch.zeros(30, 10, 4)
    gallery[0, :, 0] = torch.linspace(0.91, 1.0, 10)
    gallery[1:, :, 0] = torch.linspace(0.9, 0.1, 29).unsqueeze(1)
    scores, found = build_index("flat", gallery).search(torch.eye(4)[:1], 2)
    assert found.tolist() == [[0, 1]]
    assert scores.tolist() == [pytest.approx([1.0, 0.9])]
    excluded = torch.tensor([0])
    assert build_index("flat", gallery).search(torch.eye(4)[:1], 2, excluded=excluded)[1].tolist() == [[1, 2]]


def test_an_inverted_file_that_looks_at_few_lists_finds_fewer():
    """Two distant clusters of 50 have one list each. One probe never sees the other cluster, and -1 pads."""
    gallery = torch.cat([torch.tensor([1.0, 0.0]) + 0.01 * draw(50, 2), torch.tensor([0.0, 1.0]) + 0.01 * draw(50, 2)])
    scores, found = build_index("ivf", gallery, lists=2, probes=1).search(torch.tensor([[1.0, 0.1]]), 60)
    assert sorted(found[0, :50].tolist()) == list(range(50))
    assert found[0, 50:].tolist() == [-1] * 10
    assert torch.isinf(scores[0, 50:]).all()


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_length_of_the_features_changes_nothing(query, gallery, kind):
    """Float16 holds nothing above 65,504 and little below 1e-7, so features are scaled before they are stored."""
    index = build_index(kind, gallery, probes=1000)
    for scale in (1e-12, 1e12):
        scaled = build_index(kind, gallery * scale, probes=1000)
        assert torch.equal(scaled.search(query * scale, 5, hits=100)[1], index.search(query, 5, hits=100)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_working_memory_changes_nothing(query, gallery, kind, monkeypatch):
    expected = build_index(kind, gallery, probes=1000).search(query, 10, hits=600)
    monkeypatch.setattr(scoring, "WORKING_BYTES", 4096)
    result = build_index(kind, gallery, probes=1000).search(query, 10, hits=600)
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_finds_the_same_in_a_mapped_gallery(query, gallery, kind, tmp_path):
    gallery = gallery.half()
    gallery.numpy().tofile(tmp_path / "gallery.f16")
    mapped = torch.from_numpy(np.memmap(tmp_path / "gallery.f16", np.float16, "c", shape=(200, 3, 8)))
    index = build_index(kind, gallery, lists=4, probes=2)
    assert index.save(tmp_path / "gallery.index") == tmp_path / "gallery.index"
    loaded = load_index(tmp_path / "gallery.index", mapped)
    assert loaded.kind == kind
    for a, b in zip(loaded.search(query, 10), index.search(query, 10)):
        assert torch.equal(a, b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.f16", "gallery.index"]


def test_an_index_is_written_whole_or_not_at_all(gallery, tmp_path, monkeypatch):
    path = build_index("flat", gallery).save(tmp_path / "a.index")
    before = path.read_bytes()
    index = build_index("flat", gallery[:50])

    def full(index: object, writer: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("faiss.write_index", full)
    with pytest.raises(OSError, match="no space left"):
        index.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_do_not_fit_are_refused(gallery, tmp_path):
    path = build_index("flat", gallery).save(tmp_path / "a.index")
    for other in (gallery[:-1], gallery.half(), gallery + 0.01):
        with pytest.raises(ValueError, match=r"a\.index was built from other features .* build it again"):
            load_index(path, other)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.index is damaged"):
        load_index(path, gallery)
    for content in (b"", b"{}\n", b"[]\n", b"\xff\xff\n", b"null", path.read_bytes().replace(b"index 2", b"index 9")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.index is not an index of this version"):
            load_index(path, gallery)
    with pytest.raises(FileNotFoundError):
        load_index(tmp_path / "b.index", gallery)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hsnw"}, "index kind must be one of exact, flat, ivf, hnsw, got 'hsnw'; did you mean 'hnsw'"),
        ({"gallery": torch.ones(0, 4)}, "not empty"),
        ({"gallery": torch.ones(4)}, r"gallery must be \(G, D\) or \(G, K, D\)"),
        (
            {"kind": "ivf", "lists": 15},
            "15 lists need 585 vectors to be trained, the gallery has 570 that differ; set lists to 14",
        ),
        ({"kind": "ivf", "lists": 0}, "0 lists"),
        ({"gallery": torch.full((4, 4), float("nan"))}, "4 of 4 gallery features are not finite"),
    ],
)
def test_what_cannot_be_built_is_refused(gallery, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_index(**{"kind": "flat", "gallery": gallery, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 201}, "k must be from 1 to the gallery's 200 images, got 201"),
        ({"k": 0}, "k must be from 1"),
        ({"hits": 4}, "hits must be at least k = 5, got 4"),
        ({"query": torch.ones(7, 9)}, r"query must be \(Q, 8\), got \(7, 9\)"),
        ({"query": torch.full((7, 8), float("inf"))}, "7 of 7 query features are not finite"),
        ({"excluded": torch.tensor([1])}, r"excluded must be \(7,\), got \(1,\)"),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_what_cannot_be_searched_is_refused(query, gallery, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_index(kind, gallery).search(**{"query": query, "k": 5, **arguments})


def test_without_faiss_the_exact_search_remains(query, gallery, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert build_index("exact", gallery).search(query, 3)[1].shape == (7, 3)
    with pytest.raises(ValueError, match="kind 'ivf' needs FAISS, which is not installed; pip install faiss-cpu"):
        build_index("ivf", gallery)


def test_a_gpu_searches_where_faiss_has_one(query, gallery, monkeypatch):
    """A stand-in for a GPU copy counts its searches: it gets no graphs and no more hits than a GPU returns."""
    import faiss

    searches = []

    class Copy:
        def __init__(self, vectors):
            self.vectors = vectors

        def search(self, rows, hits):
            searches.append(hits)
            return self.vectors.search(rows, hits)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, gpu, vectors: Copy(vectors), raising=False)
    for kind in KINDS:
        build_index(kind, gallery).search(query, 5)
    assert searches == [20, 20]
    monkeypatch.setattr(index_module, "GPU_HITS", 19)
    expected = build_index("exact", gallery).search(query, 5)[1]
    assert recall_against_exact(build_index("flat", gallery).search(query, 5)[1], expected) == 100.0
    assert searches == [20, 20]


def test_an_index_that_the_gpu_does_not_take_is_searched_on_the_cpu(query, gallery, monkeypatch, caplog):
    """FAISS reports a full GPU by a RuntimeError. The copy goes to the GPU that torch has chosen."""
    import faiss

    def refuse(resources, gpu, vectors):
        raise RuntimeError(f"Error in GpuMemoryReservation: out of memory on {gpu}\nmore")

    expected = build_index("flat", gallery).search(query, 5)[1]
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    monkeypatch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with caplog.at_level("WARNING"):
        index = build_index("flat", gallery)
    assert "as GPU 3 does not take it (Error in GpuMemoryReservation: out of memory on 3)" in caplog.text
    monkeypatch.undo()
    assert torch.equal(index.search(query, 5)[1], expected)


def test_recall_by_hand():
    """The search finds both of (1, 2), none of (3, none) and one of (5, 6), which is 3 of 5."""
    exact = torch.tensor([[1, 2], [3, -1], [5, 6]])
    found = torch.tensor([[2, 1, 9], [4, -1, -1], [6, 0, 1]])
    assert recall_against_exact(found, exact) == pytest.approx(60.0)
    with pytest.raises(ValueError, match="no exact result"):
        recall_against_exact(found, torch.full((3, 2), -1))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_recall_with_2000_copies_equals_recall_without(kind, tokens):
    """The gallery holds a placeholder's features 2,000 times, before, between and after 3,000 other pictures.

    A graph of all these vectors finds 70 % with 1 feature per image and 90 % with 3.
    """
    pictures, copy, query = draw(3000, tokens, 16, seed=1), draw(1, 1, 16, seed=9), draw(50, 16, seed=2)
    copies = copy.expand(2000, tokens, 16)
    mixed = torch.cat([copies[:500], pictures[:1000], copies[500:1500], pictures[1000:], copies[1500:]])
    without, with_copies = (
        recall_against_exact(
            build_index(kind, gallery, lists=20, probes=20).search(query, 10)[1],
            build_index("exact", gallery).search(query, 10)[1],
        )
        for gallery in (pictures, mixed)
    )
    assert with_copies == without == 100.0


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_copies_that_are_the_best_are_all_found_in_order_of_the_gallery(kind):
    """Images 1, 3, 5, ... are one picture. The query finds the first 40 of them, without the excluded one."""
    gallery = draw(400, 2, 8, seed=3)
    gallery[1::2] = gallery[1]
    index = build_index(kind, gallery, lists=2, probes=2)
    scores, found = index.search(gallery[1:2, 0], 40, excluded=torch.tensor([5]))
    assert found[0].tolist() == [number for number in range(1, 400, 2) if number != 5][:40]
    assert (scores[0] == scores[0, 0]).all()


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_equal_features_of_one_image_and_of_all_images(kind):
    """All 5 images hold one vector three times, so one vector is indexed and gallery order breaks the tie."""
    index = build_index(kind, torch.ones(5, 3, 4))
    assert index.vectors.ntotal == 1
    assert index.search(torch.ones(2, 4), 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_owners_are_those_of_a_naive_loop(dtype):
    gallery = torch.randint(0, 2, (60, 2, 3), generator=torch.Generator().manual_seed(5)).to(dtype)
    expected: dict[tuple[float, ...], list[int]] = {}
    for image, vectors in enumerate(gallery.tolist()):
        for vector in map(tuple, vectors):
            images = expected.setdefault(vector, [])
            images += [image] if image not in images else []
    owners = index_module._owners(gallery)
    got = [owners.images[a:b].tolist() for a, b in zip(owners.bounds[:-1], owners.bounds[1:])]
    assert got == list(expected.values())
    assert [tuple(gallery.flatten(0, 1)[row].tolist()) for row in owners.first] == list(expected)


def test_vectors_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(index_module, "_hashes", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    assert index_module._owners(draw(30, 4)) is None
    gallery = draw(30, 4)
    gallery[20] = gallery[0]
    owners = index_module._owners(gallery)
    assert owners.first.tolist() == [number for number in range(30) if number != 20]
    assert owners.images[:2].tolist() == [0, 20]


def test_a_short_file_of_copies_is_damaged(gallery, tmp_path):
    path = build_index("flat", gallery).save(tmp_path / "a.index")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\n") + 100])
    with pytest.raises(ValueError, match=r"a\.index is damaged"):
        load_index(path, gallery)
