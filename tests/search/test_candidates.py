"""Candidates by FAISS: scored exactly, recall reported, with filters, newer rows, and many equal pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from search_world import draw_some, index, make_encoder

from lavis_cir_plugin.search import candidates, gallery, open_index
from lavis_cir_plugin.search.candidates import build_candidates, tune
from lavis_cir_plugin.search.gallery import Gallery

ROWS, FEATURES, WIDTH = 1500, 3, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return unit features around 100 centres, and candidates for all but the last 100 rows."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 1, WIDTH, generator=generator)[torch.randint(100, (ROWS,), generator=generator)]
    features = F.normalize(centres + 0.5 * torch.randn(ROWS, FEATURES, WIDTH, generator=generator), dim=2).half()
    made = build_candidates(features[: ROWS - 100], tmp_path_factory.mktemp("faiss") / "c.faiss", probes=2)
    recall = tune(made, features[: ROWS - 100])
    return features, made, recall


@pytest.fixture(autouse=True)
def all_are_many(monkeypatch):
    monkeypatch.setattr(gallery, "FEW_ALLOWED", 0)


def naive(features, query, rows):
    scores = torch.stack([(features[row].double() @ query.double()).max() for row in rows])
    order = sorted(range(len(rows)), key=lambda place: (-float(scores[place]), rows[place]))
    return [rows[place] for place in order]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_what_is_found_is_ordered_exactly_and_hardly_anything_is_missed(world, share):
    features, made, recall = world
    opened = Gallery(features, 1.001, candidates=made)
    exact = Gallery(features, 1.001)
    rng = np.random.default_rng(0)
    allowed = None if share == 1 else np.sort(rng.choice(ROWS, int(share * ROWS), replace=False))
    rows = list(range(ROWS)) if allowed is None else allowed.tolist()
    found = 0
    for number in range(20):
        query = F.normalize(features[rng.integers(ROWS), 0].float() + 0.1 * torch.randn(WIDTH), dim=0)
        best = opened.best(query, 10, allowed)
        assert exact.best(query, 10, allowed).rows.tolist() == naive(features, query, rows)[:10]
        assert not best.is_exact
        assert len(best.rows) == 10
        assert best.rows.tolist() == naive(features, query, sorted(best.rows.tolist()))
        found += len(set(best.rows.tolist()) & set(naive(features, query, rows)[:10]))
        if number == 0:
            assert opened.best(query, 10, allowed, must_be_exact=True).is_exact
    assert recall >= candidates.ENOUGH
    assert found >= 0.97 * 200


def test_rows_that_are_newer_than_the_candidates_are_found(world):
    features, made, _ = world
    opened = Gallery(features, 1.001, candidates=made)
    for row in range(ROWS - 100, ROWS, 10):
        assert (
            opened.best(features[row, 0].float(), 1).rows.tolist() == naive(features, features[row, 0], range(ROWS))[:1]
        )
    newer = np.arange(ROWS - 50, ROWS)
    best = opened.best(features[0, 0].float(), 5, newer)
    assert best.is_exact
    assert set(best.rows.tolist()) <= set(newer.tolist())


def test_of_equal_pictures_nobody_is_lost(tmp_path):
    """2,000 rows of the same features beside 500 others: all come, in order of their rows."""
    generator = torch.Generator().manual_seed(0)
    same = F.normalize(torch.randn(1, 1, WIDTH, generator=generator), dim=2).half()
    others = F.normalize(torch.randn(500, 1, WIDTH, generator=generator), dim=2).half()
    features = torch.cat([others[:250], same.expand(2000, -1, -1), others[250:]])
    made = build_candidates(features, tmp_path / "c.faiss")
    best = Gallery(features, 1.001, candidates=made).best(same[0, 0].float(), 2000 // 4)
    assert best.rows.tolist() == list(range(250, 750))
    everybody = Gallery(features, 1.001, candidates=made).best(same[0, 0].float(), 2000)
    assert everybody.rows.tolist() == list(range(250, 2250))


def test_an_index_with_candidates_says_what_they_find(tmp_path):
    draw_some(tmp_path / "p", 60)
    encoder = make_encoder()
    built = index(tmp_path / "p", tmp_path / "i", encoder, candidates="always")
    assert any("% of the exact 50 best are found for drawn queries" in note for note in built.notes)
    opened = open_index(tmp_path / "i", encoder)
    answer = opened.search(text="is red", k=5, fold=False)
    assert not answer.is_exact
    assert 0.9 < answer.recall <= 1
    exact = opened.search(text="is red", k=5, fold=False, exact=True)
    assert exact.is_exact
    assert answer.hits == exact.hits
    (file,) = (tmp_path / "i").glob("candidates-*")
    draw_some(tmp_path / "p", 3, start=100)
    index(tmp_path / "p", tmp_path / "i", encoder, candidates="always")
    assert [path.name for path in (tmp_path / "i").glob("candidates-*")] == [file.name]  # 3 rows are not worth it
    never_searched = open_index(tmp_path / "i", encoder)
    draw_some(tmp_path / "p", 30, start=200)
    index(tmp_path / "p", tmp_path / "i", encoder, candidates="always")
    assert not file.exists()
    answer = never_searched.search(text="is red", k=5, fold=False)
    assert not answer.is_exact
    assert len(answer.hits) == 5
    assert len(open_index(tmp_path / "i", encoder).search(text="is red", k=100, fold=False).hits) == 93


def test_a_disk_that_is_full_when_candidates_are_written_stops_with_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    draw_some(tmp_path / "p", 45)
    encoder, out = make_encoder(), tmp_path / "i"
    index(tmp_path / "p", out, encoder)
    draw_some(tmp_path / "p", 5, start=100)

    def full(_, path):
        with open(path, "wb") as file:
            file.write(b"begun")
        raise RuntimeError(
            "Error in void faiss::write_InvertedLists(const InvertedLists*, IOWriter*) at index_write.cpp:341: Error: "
            f"'ret == (n * ails->code_size)' failed: write error in {path}: 5 != 1504 (No space left on device)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        message = r"faiss cannot be written: write error in .* \(No space left on device\); free some space and run"
        with pytest.raises(OSError, match=message):
            index(tmp_path / "p", out, encoder, candidates="always")
    assert not list(out.glob("*candidates*"))
    assert not list(out.glob(".candidates*"))
    assert len(open_index(out, encoder)) == 45
    assert index(tmp_path / "p", out, encoder, candidates="always").encoded == 0
    assert len(open_index(out, encoder)) == 50
