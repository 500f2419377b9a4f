"""benchmarks/wrf_study.py in small: what is run and what is skipped, the choice of settings, intervals, the page."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wrf_study
from omegaconf import OmegaConf
from study import projects, worlds
from study import runs as study_runs
from study.design import (
    ASAM,
    DEMO,
    ELSEWHERE,
    FULL,
    PLAIN,
    QUICK,
    RANDOM,
    SAM,
    Run,
    elsewhere_rows,
    plan,
    table_rows,
)
from study.intervals import Interval, bootstrap, over_seeds
from study.page import write_page
from study.results import COLUMNS, append_result, key_of, pack_scores, read_results, unpack_scores
from study.scores import scores_of, stopped_scores
from study.tables import (
    WHY,
    Study,
    choice_table,
    comparisons,
    conclusion,
    elsewhere_conclusion,
    elsewhere_table,
    grid_table,
    main_table,
    noise_table,
    pair_table,
    recalls_of,
    verdict,
)

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.training.config import read_config

ROOT = Path(__file__).parents[3]
SMALL = dataclasses.replace(FULL, name="small", main_amounts=(30,), other_amounts=(60,), choosing_seeds=(7,))


def packed(hits: list[list[bool]]) -> str:
    return pack_scores(np.array(hits, dtype=bool))


def row_of(run: Run, recall: float = 40.0, hits: list[list[bool]] | None = None) -> dict[str, str]:
    """Return the row that a finished run would leave."""
    hits = [[True, False], [True, True]] if hits is None else hits
    numbers = dict.fromkeys(COLUMNS, "1.5")
    texts = {"part": run.part, "row": run.name, "triplets": run.triplets, "seed": run.seed, "digest": run.digest,
             "val_stopped": recall, "hits_last": packed(hits), "hits_stopped": packed(hits),
             "val_curve": "30 40", "train_curve": "50 80", "commit": "abc"}  # fmt: skip
    return {**numbers, **{name: str(value) for name, value in texts.items()}}


# -- the design ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [FULL, QUICK, DEMO])
def test_every_row_is_a_config_that_the_package_takes(design, tmp_path):
    project = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    project.run.update({"runner": "runner_wrf4cir_iter", "max_iters": 10, "iters_per_inner_epoch": 5})
    OmegaConf.save(project, tmp_path / "project.yaml")
    everything = {run.row.options for run in plan(design, everything_finished(design)).runs}
    assert len(everything) > 2
    for options in everything:
        read_config(str(tmp_path / "project.yaml"), options)


def everything_finished(design, **recalls):
    """Return recalls that decide every choice: the recall of a candidate by its row, 40 for others."""
    found: dict[tuple[str, str], float] = {}
    while True:
        runs = plan(design, found).runs
        new = {(run.key, run.digest): recalls.get(run.name.replace(" ", "_"), 40.0) for run in runs}
        if new.keys() == found.keys():
            return found
        found = new


def test_settings_are_chosen_by_the_best_mean_and_the_learning_rate_first():
    first = plan(SMALL, {})
    assert {run.name for run in first.runs} == {
        f"learning rate {value}" for value in ("0.00025", "0.0005", "0.001", "0.002", "0.004")
    }
    assert first.chosen == {}
    scored = {(run.key, run.digest): 50.0 if run.name.endswith("0.001") else 40.0 for run in first.runs}
    second = plan(SMALL, scored)
    assert second.chosen == {"learning rate": 1e-3}
    gammas = [run for run in second.runs if run.name.startswith("gamma")]
    assert all("run.init_lr=0.001" in run.row.options for run in gammas)
    third = plan(SMALL, everything_finished(SMALL, gamma_0_003=41.0, **{"gamma_0.003": 41.0, "dropout_0.2": 41.0}))
    assert third.later == 0
    assert (third.chosen["gamma"], third.chosen["dropout"], third.chosen["momentum"]) == (0.003, 0.2, 0.0015)
    by_name = {run.name: run for run in third.runs if run.part == "main"}
    assert "run.wrf.gamma=0.003" in by_name[RANDOM].row.options


def test_the_number_of_runs_is_known_before_the_choice():
    totals = [len(found.runs) + found.later for found in (plan(FULL, {}), plan(FULL, everything_finished(FULL)))]
    assert totals[0] == totals[1]


def test_settings_are_never_chosen_in_the_world_of_the_table():
    runs = plan(FULL, everything_finished(FULL)).runs
    of_part = {run.part: run.world for run in runs}
    assert len({of_part[part] for part in of_part if part != "choose"}) == 1
    assert of_part["main"] != of_part["choose"]
    assert {"main", "why", "noise", *ELSEWHERE, "choose"} == set(of_part)
    assert {run.world for design in (QUICK, DEMO) for run in plan(design, {}).runs} == {of_part["choose"]}
    assert not set(FULL.choosing_seeds) & set(FULL.main_seeds)
    seeds = {
        name: Counter(run.triplets for run in runs if run.part == "main" and run.name == name) for name in (PLAIN, SAM)
    }
    assert seeds[PLAIN] == {1000: 12, 3000: 12, 300: 3, 10000: 3}
    assert seeds[SAM] == {1000: 5, 3000: 5, 300: 3, 10000: 3}
    at_once = Counter(run.name for run in runs if run.part == "main" and run.triplets == 3000)
    assert len([name for name in at_once if name.startswith("WRF ")]) == 5 * 2 * 2
    assert set(at_once.values()) == {5, 12}


def test_the_hypothesis_of_dropout_trains_each_method_with_the_same_dropout():
    runs = plan(FULL, everything_finished(FULL)).runs
    own = {run.name: run.row.options for run in runs if run.part == "why" and run.name.startswith("dropout: ")}
    without = {run.name: run.row.options for run in runs if run.part == "main"}
    assert len(own) == 3
    for name, options in own.items():
        assert set(options) - set(without[name[len("dropout: ") :]]) == {
            "model.qformer_config.hidden_dropout_prob=0.1",
            "model.qformer_config.attention_probs_dropout_prob=0.1",
        }


def test_a_run_is_another_one_with_other_settings_and_the_same_with_more_seeds():
    run = plan(SMALL, {}).runs[0]
    more = plan(dataclasses.replace(SMALL, choosing_seeds=(7, 8)), {}).runs
    assert run.digest in {other.digest for other in more}
    longer = plan(dataclasses.replace(SMALL, steps=960), {}).runs[0]
    assert (longer.key, longer.digest == run.digest) == (run.key, False)
    assert len({(run.key, run.digest) for run in more}) == len({run.digest for run in more}) == len(more)


# -- what is skipped -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch):
    """Let runs end at once with a row; return the list of those that ran, and how many may run before a break."""
    done: list[str] = []
    limits = {"left": 10**6}

    def outcomes(design, runs, work, results, jobs):
        for run in runs:
            if limits["left"] == 0:
                raise KeyboardInterrupt
            limits["left"] -= 1
            done.append(run.key)
            append_result(results, row_of(run))
            yield run, row_of(run)

    monkeypatch.setattr(wrf_study, "outcomes", outcomes)
    return done, limits


def test_a_stopped_study_goes_on_after_its_last_row(fake_runs, tmp_path):
    done, limits = fake_runs
    results = tmp_path / "study.csv"
    limits["left"] = 2
    with pytest.raises(KeyboardInterrupt):
        wrf_study.run_missing(DEMO, results, ["*"], tmp_path, 1)
    assert len(read_results(results)) == 2
    limits["left"] = 10**6
    assert wrf_study.run_missing(DEMO, results, ["*"], tmp_path, 1)
    assert done == ["main/plain/1000/0", "main/random/1000/0", "main/WRF 0.001/1000/0"]
    assert wrf_study.run_missing(DEMO, results, ["*"], tmp_path, 1)
    assert len(done) == 3


def test_runs_follow_that_the_first_ones_decide_and_patterns_and_a_limit_choose_among_them(fake_runs, tmp_path):
    done, _ = fake_runs
    results = tmp_path / "study.csv"
    assert wrf_study.run_missing(SMALL, results, ["*"], tmp_path, 1, limit=4)
    assert len(done) == 4
    assert wrf_study.run_missing(SMALL, results, ["choose/*", "main/plain/30/*"], tmp_path, 1)
    finished = Study(SMALL, read_results(results))
    assert finished.plan.later == 0
    assert {key.split("/")[0] for key in done} == {"choose", "main"}
    assert [key for key in done if key.startswith("main")] == [f"main/plain/30/{seed}" for seed in range(12)]
    assert {key for key, _ in read_results(results)} == set(done)


def test_a_run_of_other_settings_does_not_count(fake_runs, tmp_path):
    done, _ = fake_runs
    results = tmp_path / "study.csv"
    run = plan(DEMO, {}).runs[0]
    append_result(results, {**row_of(run), "digest": "other"})
    assert wrf_study.run_missing(DEMO, results, ["*"], tmp_path, 1)
    assert done[0] == run.key
    assert len(read_results(results)) == 4


def test_a_failed_run_leaves_no_row_and_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wrf_study, "outcomes", lambda design, runs, *_: ((run, "Traceback: no") for run in runs))
    assert not wrf_study.run_missing(DEMO, tmp_path / "study.csv", ["*"], tmp_path, 1)
    assert "main/plain/1000/0: failed\nTraceback: no" in capsys.readouterr().out


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_row_is_added_once_and_the_others_stay_as_they_are(tmp_path):
    path = tmp_path / "results" / "study.csv"
    first, second = plan(DEMO, {}).runs[:2]
    append_result(path, row_of(first))
    before = path.read_bytes()
    append_result(path, row_of(second))
    append_result(path, row_of(second))
    assert path.read_bytes().startswith(before)
    assert list(read_results(path)) == [key_of(row_of(first)), key_of(row_of(second))]
    assert [item.name for item in path.parent.iterdir()] == ["study.csv"]
    path.write_text("part,row\nmain,plain\n")
    with pytest.raises(ValueError, match="has the columns"):
        append_result(path, row_of(first))


def test_hits_are_packed_a_bit_each():
    hits = np.random.default_rng(0).random((2, 825)) < 0.4
    text = pack_scores(hits)
    assert (unpack_scores(text) == hits).all()
    assert len(text) < 825 * 2 / 8 * 4 / 3 + 10


def test_other_scores_are_packed_in_half_precision():
    scores = np.array([[0.0, 0.5, 3.140625, 10.0]])
    text = pack_scores(scores)
    assert text.startswith("4f:")
    assert unpack_scores(text).tolist() == scores.tolist()


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_worked_by_hand():
    """One seed, queries 0 and 100: a draw's mean is 0, 50 or 100 with probability 1/4, 1/2 and 1/4."""
    values = np.array([[0.0, 100.0]])
    assert bootstrap(values) == Interval(50.0, 0.0, 100.0)
    assert bootstrap(values, level=40) == Interval(50.0, 50.0, 50.0)
    assert bootstrap(values.T) == Interval(50.0, 0.0, 100.0)


def test_seeds_and_queries_are_drawn_independently():
    """The values are products, so the variance of the mean is that of a product of two independent means.

    With entries 0 and 2 a mean of n draws has the mean 1 and the variance 1 / n: (1 + 1/8) (1 + 1/50) - 1 = 0.1475.
    """
    seeds, queries = np.tile([0.0, 2.0], 4), np.tile([0.0, 2.0], 25)
    found = bootstrap(np.outer(seeds, queries), draws=40000, level=68.27)
    assert (found.high - found.low) / 2 == pytest.approx(np.sqrt(0.1475), rel=0.03)


def test_an_interval_over_seeds_alone_is_students():
    """The mean of 1, 2, 3 is 2 and its error 1 / sqrt(3); t with two degrees of freedom is 4.3027 for 95 %."""
    found = over_seeds(np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)


def test_equal_values_have_no_width_and_a_shift_moves_the_interval():
    assert bootstrap(np.full((3, 5), 7.0)) == Interval(7.0, 7.0, 7.0)
    values = np.random.default_rng(1).normal(size=(3, 40))
    one, other = bootstrap(values), bootstrap(values + 10)
    assert (other.low - one.low, other.high - one.high) == pytest.approx((10, 10))


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (None, "not run yet"),
        (Interval(2.0, 0.5, 3.5), "a gain of a point"),
        (Interval(0.5, 0.1, 0.9), "a gain under a point"),
        (Interval(-2.0, -3.0, -0.1), "a loss"),
        (Interval(0.1, -0.7, 0.9), "no gain of a point"),
        (Interval(0.5, -0.5, 1.5), "undecided"),
    ],
)
def test_verdicts(interval, words):
    assert verdict(interval) == words


def test_each_half_of_the_queries_chooses_the_epoch_of_the_other_half():
    """Queries 0 and 2 are best in epoch 1, and 1 and 3 in epoch 0: each half gets the epoch of the other."""
    epochs = [[True, False, True, False], [False, True, False, True]]
    hits = torch.tensor([[row, row] for row in (epochs[1], epochs[0])])
    assert stopped_scores(hits).tolist() == [[False] * 4] * 2
    assert stopped_scores(torch.ones(3, 2, 4, dtype=torch.bool)).all()


def test_right_answers_and_captions_are_scored_for_each_example():
    """CIDEr is 10 for a caption that is equal to its only reference, and 0 without a common word."""
    asked = [{"question_id": 3, "answer": ["red"]}, {"question_id": 1, "answer": ["no"]}]
    given = [{"question_id": 1, "answer": "yes"}, {"question_id": 3, "answer": "red"}]
    assert scores_of(given, SimpleNamespace(annotation=asked)).tolist() == [[True, False]]
    shown = [{"caption": ["a red dress with dots"]}, {"caption": ["long blue shirt here"]}]
    said = [{"instance_id": 1, "caption": "nothing of that"}, {"instance_id": 0, "caption": "A red dress with dots."}]
    assert scores_of(said, SimpleNamespace(annotation=shown)).tolist() == [[pytest.approx(10.0), 0.0]]


# -- tables and page -------------------------------------------------------------------------------------------------


def finished_study(design, gain):
    """Return a study whose WRF rows hit one query in the first ``gain`` seeds that all other rows miss."""
    rows = {}
    for run in plan(design, everything_finished(design)).runs:
        is_better = run.name.startswith("WRF") and run.part == "main" and run.seed < gain
        hits = [[is_better, False, True, True]] * 2
        rows[run.key, run.digest] = row_of(run, 40.0 if run.part == "choose" else 50.0, hits)
    return Study(design, rows)


@pytest.mark.parametrize(("design", "count"), [(FULL, 30), (QUICK, 9), (DEMO, 6)])
def test_a_study_shows_the_comparisons_of_the_rows_that_it_has(design, count, capsys, monkeypatch):
    monkeypatch.setattr(wrf_study, "write_page", lambda *_: None)
    study = finished_study(design, 12)
    wrf_study.show(study)
    assert ("less plain" in capsys.readouterr().out) == (design is not FULL)
    assert len(comparisons(study)[1:]) == count


def test_differences_are_of_the_seeds_that_both_rows_have():
    """In all seeds one of four queries is gained: 25 points; a missing seed of plain leaves the others."""
    study = finished_study(SMALL, 12)
    table = {row[0]: row for row in main_table(study, 30)}
    heading = table["row"]
    assert table[study.wrf][heading.index("less plain (95 %)")].startswith("+25.00 (")
    assert table[PLAIN][heading.index("less plain (95 %)")] == "–"
    assert table[PLAIN][heading.index("seeds")] == "5", "those that all rows have"
    assert len(study.of("main", PLAIN, 30, decides=True)) == 12
    run = next(run for run in study.plan.runs if run.key == "main/plain/30/0")
    rest = Study(SMALL, {key: row for key, row in study.rows.items() if key != (run.key, run.digest)})
    difference = rest.difference(rest.of("main", rest.wrf, 30), rest.of("main", PLAIN, 30))
    assert difference.mean == pytest.approx(25.0)
    one, other = rest.of("main", rest.wrf, 30), rest.of("main", PLAIN, 30)
    assert rest.gap_difference(one, other) == Interval(0.0, 0.0, 0.0)
    assert rest.gap_difference({1: one[1], 2: one[2]}, other) is None, "two seeds say nothing about the spread of seeds"


def test_the_conclusion_follows_the_rules_of_the_plan():
    """With queries that all seeds gain the interval still holds 0, because one of four queries may not be drawn."""

    def of_hits(study, narrower, better_than=(PLAIN, RANDOM), gain=100):
        """Return a study in which WRF's rows hit queries that the others miss, and overfit less if `narrower`."""
        whole, part = [[True] * 400] * 2, [[index >= gain for index in range(400)]] * 2
        rows = {
            key: {**row, "hits_stopped": packed(part if row["row"] in better_than else whole),
                  "train_last": "60" if row["row"].startswith("WRF") and narrower else "80"}
            for key, row in study.rows.items()
        }  # fmt: skip
        return Study(SMALL, rows)

    assert conclusion(Study(SMALL, {})).endswith("nothing is concluded yet.")
    assert "speak against" in conclusion(finished_study(SMALL, 0))
    said = conclusion(finished_study(SMALL, 12))
    assert "undecided whether WRF gains what the paper claims." in said
    assert said.endswith("Over plain training, by number of triplets: undecided with 30.")
    study = finished_study(SMALL, 12)
    assert "support the paper" in conclusion(of_hits(study, narrower=True))
    assert conclusion(of_hits(study, narrower=False)).endswith("and the gap is not narrower.")
    assert conclusion(of_hits(study, True, [PLAIN])).endswith("and not over a random perturbation at both.")
    equal = of_hits(finished_study(SMALL, 0), narrower=True, better_than=[], gain=0)
    assert "speak against" in conclusion(equal), "an equal recall is no gain of a point"
    small_gain = of_hits(study, True, gain=3)  # 0.75 points, of which the whole interval may be above 0
    assert "support" not in conclusion(small_gain)
    elsewhere = {key: {**row, "start": "other" if row["row"] == PLAIN else "mine"} for key, row in study.rows.items()}
    assert conclusion(Study(SMALL, elsewhere)).endswith("nothing is concluded yet."), "other starts are no pairs"
    verdicts = {row[1]: row[-1] for row in comparisons(of_hits(study, narrower=True))}
    assert verdicts[f"{study.wrf} less plain"] == "a gain of a point"
    assert verdicts["random less plain"] == "no gain of a point"


def only(study, **seeds):
    """Return the study without the runs of these parts whose seed is another than those that the part is left with."""
    kept = {key: row for key, row in study.rows.items() if int(row["seed"]) in seeds.get(row["part"], range(1000))}
    return Study(study.design, kept)


def test_a_comparison_tells_its_seeds_and_one_or_two_of_them_get_no_verdict():
    """All queries are answered by WRF and none by plain, so that every interval is 100 (100 to 100)."""
    study = finished_study(SMALL, 12)
    rows = {key: {**row, "hits_stopped": packed([["WRF" in row["row"]] * 4] * 2)} for key, row in study.rows.items()}

    def told(seeds):
        table = comparisons(only(Study(SMALL, rows), main=seeds))
        return {row[1]: row[2:] for row in table[1:]}

    compared = f"{study.wrf} less plain"
    assert told(range(12))[compared] == ["12", "+100.00 (+100.00 to +100.00)", "a gain of a point"]
    assert told(range(3))[compared] == ["3", "+100.00 (+100.00 to +100.00)", "a gain of a point"]
    assert told(range(2))[compared] == ["2", "+100.00 (+100.00 to +100.00)", "fewer than 3 seeds"]
    assert told(range(2))["gap: WRF less plain"] == ["2", "–", "fewer than 3 seeds"]
    assert told([])[compared] == ["0", "–", "not run yet"]
    longer = f"{study.wrf} less plain, both with twice the steps"
    assert told([])[longer] == ["3", "+100.00 (+100.00 to +100.00)", "a gain of a point"]


def test_rows_side_by_side_are_averaged_over_the_seeds_that_all_of_them_have():
    """The recall is the seed's number: 0, 1 and 2 average to 1, where five seeds would give 2; without seed 0, 1.5."""
    design = dataclasses.replace(SMALL, noise_triplets=30, why_triplets=30)
    study = finished_study(design, 12)
    rows = {key: {**row, "val_stopped": row["seed"]} for key, row in study.rows.items() if row["part"] != "choose"}
    study = Study(design, {**study.rows, **rows})

    def told(study):
        return [row[1:7] for row in noise_table(study, 30)[1:]], [row[1:5] for row in pair_table(study, "why", WHY, 30)]

    noise, why = told(study)
    assert noise == [["3", *["1.0"] * 5]] * 4
    assert why[1] == ["3", *["1.0"] * 3]
    lost = {key: row for key, row in study.rows.items() if key[0] not in ("main/SAM/30/0", "noise/noise 0.2: SAM/30/0")}
    noise, why = told(Study(design, lost))
    assert noise == [["2", *["1.5"] * 5]] * 2 + [["3", *["1.0"] * 5]] * 2
    assert why[1] == ["3", *["1.0"] * 3]


def test_radius_scope_and_warmup_stand_side_by_side():
    """Global WRF answers three of four queries and plain two; a row without two of its seeds is told."""
    study = finished_study(SMALL, 12)
    half, more = packed([[True, True, False, False]] * 2), packed([[True, True, True, False]] * 2)
    rows = {
        key: {**row, "hits_stopped": more if "global" in row["row"] else half}
        for key, row in study.rows.items()
        if (row["row"], row["seed"]) not in {("WRF 0.003 global", "2"), ("WRF 0.003 global", "4")}
    }
    table = grid_table(Study(SMALL, rows), 30)
    assert table[0] == ["γ", "seeds", "per tensor", "global", "per tensor, warm-up 5", "global, warm-up 5"]
    seeds = {"0.0001": "5", "0.0003": "5", "0.001": "5", "0.003": "3 to 5", "0.01": "5"}
    assert dict(row[:2] for row in table[1:]) == seeds
    same, gain = "+0.00 (+0.00 to +0.00)", "+25.00 (+0.00 to +75.00)"
    assert {tuple(row[2:]) for row in table[1:]} == {(same, gain, same, gain)}
    assert grid_table(Study(SMALL, {}), 30) == table[:1]


def test_runs_of_another_start_are_neither_paired_nor_averaged_with_the_others():
    """In the main table their number is told; side by side the seed is left out."""
    study = finished_study(dataclasses.replace(SMALL, noise_triplets=30), 12)
    strange = {("main", "SAM", "1"), ("noise", "noise 0.2: SAM", "1"), ("tscir", "WRF 0.001", "0")}
    rows = {
        key: {**row, "start": "other"} if (row["part"], row["row"], row["seed"]) in strange else row
        for key, row in study.rows.items()
    }
    mixed = Study(study.design, rows)
    assert {row[0]: row[1] for row in main_table(mixed, 30)}[SAM] == "5, 4 paired"
    assert [row[1] for row in noise_table(mixed, 30)[1:]] == ["2", "2", "3", "3"]
    assert elsewhere_conclusion(mixed).endswith("or not of one start, so nothing is concluded yet.")
    assert [row[1] for row in elsewhere_table(mixed)[1:]] == ["3", "2", "3", "3"]


def test_a_change_of_the_perturbation_alone_is_compared_with_the_main_tables_plain_training():
    design = dataclasses.replace(SMALL, why_triplets=30)
    table = {row[0]: row for row in pair_table(finished_study(design, 12), "why", WHY, 30)}
    assert table["perturbed in the second half"][1:6] == ["3", "50.0", "–", "50.0", "+0.00 (+0.00 to +0.00)"]


def test_a_gain_under_a_change_is_compared_with_the_gain_without():
    """WRF answers two of four queries more than plain; with dropout it answers one more: 25 points less of a gain."""
    study = finished_study(dataclasses.replace(SMALL, why_triplets=30), 12)
    gained = {"plain": 0, study.wrf: 2, "dropout: plain": 1, f"dropout: {study.wrf}": 2}
    rows = {
        key: {**row, "hits_stopped": packed([[index < gained[row["row"]] for index in range(4)]] * 2)}
        for key, row in study.rows.items()
        if row["row"] in gained and row["part"] in ("main", "why")
    }
    table = {row[0]: row for row in pair_table(Study(study.design, {**study.rows, **rows}), "why", WHY, 30)}
    column = table[""].index("less the first line's")
    assert table["as in the main table"][column] == "–"
    assert table["all with dropout"][column].startswith("-25.00 (")


def test_the_choice_is_shown_at_each_size():
    """A candidate with 10 points less at the second size, and 40 at the first: 35 on average."""
    design = dataclasses.replace(SMALL, main_amounts=(30, 60))
    rows = finished_study(design, 0).rows
    rows = {
        key: {**row, "val_stopped": "30"} if row["row"] == "dropout 0.2" and row["triplets"] == "60" else row
        for key, row in rows.items()
    }
    table = choice_table(Study(design, rows))
    assert table[0] == ["setting", "value", "runs", "30 triplets", "60 triplets", "mean", ""]
    assert ["dropout", "0.2", "2", "40.00", "30.00", "35.00", ""] in table


def test_three_of_four_other_models_have_to_agree():
    assert elsewhere_conclusion(Study(SMALL, {})).endswith("nothing is concluded yet.")
    study, names = finished_study(SMALL, 12), list(ELSEWHERE)
    whole, part = packed([[True] * 400] * 2), packed([[index % 4 > 0 for index in range(400)]] * 2)

    def told(better):
        rows = {
            key: {**row, "hits_stopped": whole if row["row"].startswith("WRF") and row["part"] in better else part}
            for key, row in study.rows.items()
        }
        return elsewhere_conclusion(Study(SMALL, rows))

    assert told(names[:3]).endswith("in 3 of 4, and less than a point over plain in 1: this supports the paper.")
    assert told(names[:2]).endswith("this is undecided.")
    assert told(names[:1]).endswith("this speaks against the paper.")


def test_the_page_shows_what_is_there_and_how_much_is_missing(tmp_path):
    study = finished_study(SMALL, 12)
    write_page(study, tmp_path / "results.md", tmp_path / "results")
    whole = (tmp_path / "results.md").read_text()
    total = len(study.plan.runs)
    assert f"**{total} of {total} runs are finished, 0 are missing.**" in whole
    assert "## 30 triplets\n\n| row |" in whole
    for name in ("differences", "curves", "gamma"):
        assert f"](results/wrf_study_{name}.png)" in whole
        assert (tmp_path / "results" / f"wrf_study_{name}.png").is_file()
    part = {key: row for key, row in study.rows.items() if row["part"] == "choose"}
    old = {("main/plain/30/0", "other"): row_of(study.plan.runs[0])}
    write_page(Study(SMALL, {**part, **old}), tmp_path / "results.md", tmp_path / "results")
    page = (tmp_path / "results.md").read_text()
    assert f"**{len(part)} of {total} runs are finished, {total - len(part)} are missing.**" in page
    assert "## 30 triplets\n\nNo run of this part is finished." in page
    assert "## At a glance" not in page
    assert "1 rows of the file belong to other settings" in page


def test_the_committed_page_is_that_of_the_committed_file(tmp_path):
    rows = read_results(ROOT / "docs/results/wrf_study.csv")
    write_page(Study(FULL, rows), tmp_path / "results.md", tmp_path / "results")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/results.md").read_text()


def test_every_difference_on_the_page_of_regularisers_is_one_of_the_results():
    interval = r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)"
    page, results = ((ROOT / "docs" / name).read_text() for name in ("regularisers.md", "results.md"))
    named = re.findall(interval, " ".join(page.split()))
    assert len(named) > 5
    assert set(named) <= set(re.findall(interval, results))


# -- data and a run --------------------------------------------------------------------------------------------------

TINY = dataclasses.replace(
    DEMO, name="tiny", caption_pictures=40, caption_steps=2, world_triplets=12, world_images=16, steps=4,
    validations=2, batch=4, main_amounts=(20,),
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def small_world(tmp_path, monkeypatch, cache):
    """Let the study draw small worlds in a cache of its own."""
    settings = {"train_triplets": 12, "train_images": 16, "val_queries": 6, "val_images": 8, "test_queries": 1,
                "test_images": 4, "image_width": 64, "image_height": 64}  # fmt: skip

    def world(design, seed):
        return make_garments(tmp_path / "worlds", GarmentsConfig(seed=seed, **settings))

    monkeypatch.setattr(worlds, "world", world)


def test_a_seeds_smaller_amount_is_part_of_its_larger_one(small_world, tmp_path):
    run = plan(TINY, {}).runs[0]

    def triplets(amount, seed=0):
        folder = worlds.training_annotations(TINY, dataclasses.replace(run, triplets=amount, seed=seed), tmp_path)
        return {
            category: [json.dumps(record) for record in json.loads(path.read_text())]
            for category in ("dress", "shirt", "toptee")
            for path in [folder / "captions" / f"cap.{category}.train.json"]
        }

    few, many = triplets(10), triplets(30)
    assert sorted(map(len, few.values())) == [3, 3, 4]
    assert sum(map(len, many.values())) == 30
    assert all(many[category][: len(few[category])] == few[category] for category in few)
    assert triplets(30, seed=1) != many
    with pytest.raises(ValueError, match="the world has 12 triplets of dress, and 33 are asked for"):
        triplets(100)


@pytest.fixture
def few_questions(monkeypatch):
    """Let the study draw a small world of questions and captions."""
    sizes = {"train_images": 80, "val_images": 60, "image_width": 64, "image_height": 64}
    settings = worlds.questions.QuestionGarments(seed=5, **sizes)
    monkeypatch.setattr(worlds, "_question_settings", lambda run: settings)


def test_the_seed_draws_the_questions_and_captions_and_some_of_them_are_asked_again(few_questions, tmp_path, cache):
    run = Run("vqa", PLAIN, elsewhere_rows("vqa")[PLAIN], 5, 20, 0, TINY.settings)
    for files in (worlds.vqa_files, worlds.caption_files):
        records = {
            (amount, seed): {
                split: json.loads(Path(paths[0]).read_text())
                for split, paths in files(dataclasses.replace(run, triplets=amount, seed=seed), tmp_path).items()
            }
            for amount, seed in ((20, 0), (10, 0), (20, 1))
        }
        whole = records[20, 0]
        assert records[10, 0]["train"] == whole["train"][:10]
        assert records[20, 1]["train"] != whole["train"]
        assert records[20, 1]["val"] == whole["val"]
        assert {record["image"] for record in whole["test"]} == {record["image"] for record in whole["train"]}
    with pytest.raises(ValueError, match="training examples, and 9999 are asked for"):
        worlds.caption_files(dataclasses.replace(run, triplets=9999), tmp_path)


@pytest.mark.usefixtures("blank_pictures", "cache")
@pytest.mark.parametrize(("part", "examples"), [("vqa", "answers"), ("captioning", "captions")])
def test_other_tasks_leave_the_same_row(part, examples, few_questions, tmp_path):
    run = Run(part, "WRF 0.001", elsewhere_rows(part)["WRF 0.001"], 5, 20, 0, TINY.settings)
    row = study_runs.execute(TINY, run, tmp_path / "work", "abc1234")
    assert set(row) == set(COLUMNS)
    scores = unpack_scores(row["hits_last"])
    assert (scores.dtype == bool) == (examples == "answers")
    assert 100 * scores.mean() == pytest.approx(float(row["val_last"]), abs=0.05)
    assert float(row["radius"]) > 0


@pytest.mark.parametrize("part", ELSEWHERE)
def test_projects_of_other_models_and_tasks_are_taken(part, small_world, few_questions, tmp_path, monkeypatch):
    for name in ("clip_checkpoint", "mapping_checkpoint"):
        monkeypatch.setattr(projects, name, lambda design, work: Path(__file__))
    monkeypatch.setattr(worlds, "synthetic_triplets", lambda *_: tmp_path)
    monkeypatch.setattr(worlds, "caption_world", lambda *_: tmp_path)
    for row in elsewhere_rows(part).values():
        run = Run(part, "any", row, 5, 20, 0, TINY.settings)
        OmegaConf.save(OmegaConf.create(projects.project(TINY, run, tmp_path / "work")), tmp_path / "project.yaml")
        read_config(str(tmp_path / "project.yaml"), row.options)


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_is_measured_and_leaves_its_row_alone(small_world, tmp_path):
    """The random perturbation, and ASAM, whose radius is computed at the start to give the same norm."""
    rows = table_rows(plan(TINY, {}).chosen)
    found = {}
    for name in (ASAM, RANDOM):  # ASAM's radius is computed where no feature is cached yet
        run = Run("main", name, rows[name], 5, 20, 0, TINY.settings)
        found[name] = study_runs.execute(TINY, run, tmp_path / "work", "abc1234")
        assert set(found[name]) == set(COLUMNS)
    random_row = found[RANDOM]
    hits = unpack_scores(random_row["hits_last"])
    assert hits.shape == (2, 18)
    assert 100 * hits.mean() == pytest.approx(float(random_row["val_last"]), abs=1e-3)
    assert [len(random_row[column].split()) for column in ("val_curve", "train_curve")] == [2, 2]
    start = float(random_row["norm_start"])
    assert float(random_row["radius"]) == pytest.approx(1e-3 * start, rel=0.01)
    assert float(found[ASAM]["radius"]) == pytest.approx(1e-3 * start, rel=0.3)
    assert "(matched: " in found[ASAM]["settings"]
    assert float(random_row["step_seconds"]) > 0
    assert list((tmp_path / "work" / "runs").iterdir()) == []
    assert recalls_of({key_of(random_row): random_row}) == {key_of(random_row): float(random_row["val_stopped"])}
