"""The page over runs: it says what the files say, asks nobody for anything, and breaks on no caption."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.ranking.metrics import recall_at
from lavis_cir_plugin.ranking.ranks import Ranking
from lavis_cir_plugin.report import query_results, run_record, run_report
from lavis_cir_plugin.report.curves import comparison_figure
from lavis_cir_plugin.report.html_parts import THUMBNAIL, Thumbnails
from lavis_cir_plugin.report.query_results import QueryResult, Results, read_queries, write_queries
from lavis_cir_plugin.report.result_files import write_metrics
from lavis_cir_plugin.report.run_report import COLOURS, Run, read_run, report

PROTOCOL = "toy val, gallery of 6, reference kept"
NASTY = 'is <script src="https://example.org/x.js"></script> & "red"'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = {}
    for index, name in enumerate("abcdef"):
        paths[name] = folder / f"{name}.png"
        Image.new("RGB", (400, 300), (40 * index, 90, 120)).save(paths[name])
    return paths


def benchmark(pictures, text="is red", protocol=PROTOCOL):
    queries = (Query("a", (text, "is long"), "b"), Query("c", ("is blue",), "d", relevance=(("d", 1.0), ("e", 0.5))))
    group = Group("toys", tuple("abcdef"), queries, reference_removed=False)
    return Benchmark(
        "toy", "val", (group,), pictures, protocol, lambda r: {"R@1": recall_at(r["toys"].ranks, 1)}, "R@1"
    )


def ranking(*orders: str):
    targets = ("b", "d")
    top = torch.tensor([["abcdef".index(name) for name in order] for order in orders])
    ranks = torch.tensor([order.index(target) for order, target in zip(orders, targets)])
    return Ranking(ranks, top, torch.full((2,), -1))


@pytest.fixture
def make_run(tmp_path, pictures):
    """Write the folder of a run that has been trained for two epochs and evaluated."""

    def make(label, orders=("bacdef", "cdabef"), text="is red", protocol=PROTOCOL, config=None, where=pictures):
        folder = tmp_path / "runs" / label
        folder.mkdir(parents=True)
        folder.joinpath("log.txt").write_text('{"run": {"seed": 7}}\n')
        folder.joinpath("steps.csv").write_text("step,epoch,loss,lr,cosine\n0,0,2.0,0.1,0.5\n1,1,1.5,0.05,0.4\n")
        folder.joinpath("epochs.csv").write_text(
            "epoch,split,metric,value\n0,train,loss,2\n0,val,R@1,25\n0,val,agg_metrics,25\n"
            "1,train,loss,1.5\n1,val,R@1,50\n1,val,agg_metrics,50\n"
        )
        values = config or {"model.arch": "blip2_cir", "datasets.toy.splits": ["val"], "run.seed": 7}
        run_record.begin(folder, ["python", "-m", "lavis.train"], values, dict.fromkeys(values, "toy.yaml"))
        run_record.end(folder)
        bench, ranked = benchmark(where, text, protocol), {"toys": ranking(*orders)}
        rows = {"trained model": bench.metrics(ranked), "random (expected)": {"R@1": 16.67}}
        write_metrics(folder / "val/metrics.json", rows, bench, {})
        write_queries(folder / "val/queries.json", bench, ranked)
        return folder

    return make


class Page(HTMLParser):
    """Collects the text, the tags and every address of a page."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.tags, self.alts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.addresses += [named[name] for name in ("src", "href", "srcset", "action", "poster") if name in named]
        if tag == "img":
            self.alts.append(named["alt"])

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_queries_are_read_as_they_were_written(tmp_path, pictures):
    """Of the second query d is the target and e a soft label, so that e is no right answer."""
    bench = benchmark(pictures)
    top = ranking("bacdef", "cdabef")
    short = Ranking(top.ranks, torch.cat([top.top[:, :2], torch.full((2, 1), -1)], dim=1), top.subset_ranks)
    found = read_queries(write_queries(tmp_path / "queries.json", bench, {"toys": short}))
    assert found.groups["toys"] == (
        QueryResult("a", ("is red", "is long"), ("b",), 0, ("b", "a")),
        QueryResult("c", ("is blue",), ("d",), 1, ("c", "d")),
    )
    assert found.images == {name: str(pictures[name]) for name in found.images}
    assert set(found.images) == {"a", "b", "c", "d"}


def test_no_more_than_the_first_ten_images_are_kept(tmp_path, pictures):
    gallery = tuple(f"g{i}" for i in range(30))
    group = Group("toys", gallery, (Query("g0", ("x",), "g1"),), reference_removed=False)
    bench = Benchmark("toy", "val", (group,), dict.fromkeys(gallery, pictures["a"]), PROTOCOL, lambda r: {}, "R@1")
    whole = Ranking(torch.tensor([1]), torch.arange(30)[None], torch.tensor([-1]))
    found = read_queries(write_queries(tmp_path / "queries.json", bench, {"toys": whole}))
    assert found.groups["toys"][0].top == gallery[: query_results.TOP]


def test_a_folder_whose_name_is_no_text_breaks_neither_the_file_nor_the_page(tmp_path, pictures, capsys):
    """Linux allows any bytes in names, which Python holds as lone surrogates."""
    odd = {name: Path(f"{path.parent}/caf\udce9/{path.name}") for name, path in pictures.items()}
    folder = tmp_path / "run"
    folder.mkdir()
    folder.joinpath("log.txt").write_text("")
    written = write_queries(folder / "val/queries.json", benchmark(odd), {"toys": ranking("bacdef", "cdabef")})
    assert read_queries(written).images["b"] == str(odd["b"])
    main.main(["report", str(folder), "--output", str(tmp_path / "r.html")])
    assert "caf?/b.png" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("content", ["", "{}", '{"images": {}, "groups": {"a": [[0]]}, "upright": false}'])
def test_a_damaged_file_of_queries_is_named(tmp_path, content):
    path = tmp_path / "queries.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"queries\.json is damaged .* evaluate the run again"):
        read_queries(path)


def results(*ranks):
    return tuple(QueryResult(f"r{i}", ("x",), ("t",), rank, ()) for i, rank in enumerate(ranks))


def test_best_worst_and_most_different():
    queries = results(5, 0, -1, 9, 0)
    assert query_results.best(queries, 3) == [1, 4, 0]
    assert query_results.worst(queries, 2) == [3, 0]
    assert query_results.best(results(-1, -1), 3) == []
    # Ratios of ranks from 1: 6/6, 10/1, none, 10/20, 1/2; equal ranks are no difference.
    assert query_results.most_different([queries, results(5, 9, 3, 19, 1)], 5) == [1, 3, 4]


def test_drawn_queries_depend_on_the_seed_alone():
    assert query_results.drawn(results(*range(40)), 4) == query_results.drawn(results(*reversed(range(40))), 4)
    assert query_results.drawn(results(1, 2), 4) == [0, 1]


def test_the_page_asks_no_other_host_and_runs_no_script(make_run):
    text = report([read_run(make_run("one", text=NASTY)), read_run(make_run("two", text=NASTY))])
    page = Page(text)
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "video", "audio", "form", "base"} & set(page.tags)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert NASTY in page.text.replace('" red "', '"red"'), "the caption is shown as it was written"


def test_the_figures_inside_ask_no_other_host(make_run):
    text = report([read_run(make_run("one"))])
    figures = [base64.b64decode(found) for found in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]
    assert len(figures) == 1
    assert b">training loss<" in figures[0], "its words are text"
    assert b">cosine<" in figures[0], "what the method logged has a panel"
    assert set(re.findall(rb'(?:href|src)="([^"#]+)', figures[0])) <= {b""}


def test_the_numbers_stand_beside_their_protocol(make_run):
    text = Page(report([read_run(make_run("one"))])).text
    assert "R@1 chooses the checkpoint 50.00 16.67" in text
    assert f"Protocol: {PROTOCOL}" in text
    assert "Queries / gallery images: toys 2 / 6" in text
    assert "50.00 % R@1 on val" in text
    assert "best epoch 1" in text


def test_the_config_has_origins_and_the_machine_is_named(make_run):
    text = Page(report([read_run(make_run("one"))])).text
    assert "run.seed 7 toy.yaml" in text
    assert f"python {run_record.software()['python']}" in text
    assert str(run_record.hardware()["cpu"]) in text
    assert "python -m lavis.train" in text


def test_right_answers_are_marked_in_words(make_run):
    """b is right at once; of "cdabef" d is second, and with one image shown it stands apart with its rank."""
    text = Page(report([read_run(make_run("one"))])).text
    assert "right answer at rank 1" in text
    assert "2 ✓ right" in text
    assert "1 reference" in text
    assert "rank 2" in Page(report([read_run(make_run("two"))], images=1)).text.split("At random")[1]


def test_of_several_right_answers_the_page_counts_those_shown(pictures):
    """The target is sixth and another right answer first: "right answer at rank 6" would contradict the mark."""
    answer = QueryResult("a", ("is red",), ("f", "b", "e"), 5, tuple("bacdef"))
    images = {name: str(path) for name, path in pictures.items()}
    run = run_report.Run("r", Path("r"), (), {}, {}, {}, {"val": Results({"toys": (answer,)}, images, False)})
    text = Page(report([run], images=3)).text
    assert "1 of 3 right answers shown, the target at rank 6" in text
    assert "right answer at rank" not in text


def test_a_text_from_right_to_left_has_its_own_direction(pictures):
    """Its full stop would otherwise stand at the wrong end."""
    answer = QueryResult("a", ("אדום.",), ("b",), 0, ("b",))
    results = Results({"toys": (answer,)}, {name: str(path) for name, path in pictures.items()}, False)
    page = report([Run("r", Path("r"), (), {}, {}, {}, {"val": results})])
    assert "<q dir=auto>אדום.</q>" in page


def test_the_command_can_be_run_again_as_it_stands(tmp_path):
    run_record.begin(tmp_path, ["python", "--options", "run.valid_splits=[val, seen]"], {}, {})
    run = Run("r", tmp_path, run_record.read_starts(tmp_path), {}, {}, {}, {})
    assert run_report._machine_facts(run)["command"] == "python --options 'run.valid_splits=[val, seen]'"


def test_several_runs_stand_side_by_side(make_run):
    """The second run misses the first query: 0 percent beside 50, and its rank of b is 5 instead of 1."""
    config = {"model.arch": "blip2_cir", "datasets.toy.splits": ["val"], "run.seed": 8}
    runs = [make_run("one"), make_run("two", orders=("acdefb", "cdabef"), config=config)]
    text = Page(report([read_run(folder) for folder in runs])).text
    assert "50.00 0.00 -50.00" in text
    differing, alike = text[text.index("values that differ") :].split("values that are the same", 1)
    assert "run.seed 7 toy.yaml 8 toy.yaml" in differing
    assert "model.arch" in alike
    assert "model.arch" not in differing
    differ = text.split("Where the runs differ most")[1].split("Best ranks")[0]
    assert "is red / is long" in differ
    assert "is blue" not in differ, "both runs rank its answer alike"


def test_runs_in_folders_of_one_name_are_told_apart_and_each_has_its_curve(make_run, monkeypatch):
    drawn = []
    figure = run_report.comparison_figure
    monkeypatch.setattr(
        run_report, "comparison_figure", lambda places, metric: drawn.append(places) or figure(places, metric)
    )
    folders = [make_run("seed0/x"), make_run("seed1/x")]
    text = Page(report([read_run(folder) for folder in folders])).text
    assert {label: folder for label, (folder, _) in drawn[0].items()} == dict(zip(["seed0/x", "seed1/x"], folders))
    assert "Best ranks of seed0/x" in text


def test_every_run_has_a_colour_of_its_own_and_the_legend_lies_over_no_panel(make_run):
    folders = {str(number): make_run(str(number)) for number in range(len(COLOURS))}
    assert len(set(COLOURS)) == len(COLOURS)
    figure = comparison_figure({label: (folders[label], colour) for label, colour in zip(folders, COLOURS)}, "R@1")
    (legend,) = figure.legends
    shown = {text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert shown == dict(zip(folders, COLOURS))
    figure.draw_without_rendering()
    top = legend.get_window_extent().y1
    assert all(panel.get_tightbbox().y0 >= top for panel in figure.axes)


def test_numbers_of_different_protocols_are_said_not_to_compare(make_run):
    runs = [read_run(make_run("one")), read_run(make_run("two", protocol="toy val, reference removed"))]
    assert "of different protocols and cannot be compared" in Page(report(runs)).text
    assert "cannot be compared" not in Page(report([runs[0], read_run(make_run("three"))])).text


def test_runs_over_other_queries_have_sections_of_their_own(make_run):
    text = Page(report([read_run(make_run("one")), read_run(make_run("two", text="is green"))])).text
    assert "Where the runs differ most" not in text
    assert text.count("val: toys 2 queries") == 2


def test_pictures_are_small_and_a_missing_one_is_said(make_run, pictures, tmp_path):
    run = read_run(make_run("one", where={**pictures, "b": tmp_path / "gone.png"}))
    embed = Thumbnails()
    page = Page(report([run], embed=embed))
    assert set(embed.missing) == {str(tmp_path / "gone.png")}
    assert "1 pictures could not be read. The first: " in page.text
    assert "no file b" in page.text
    pictures_inside = [address for address in page.addresses if address.startswith("data:image/jpeg")]
    assert pictures_inside
    for address in set(pictures_inside):
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
            assert picture.width <= THUMBNAIL[0]
            assert picture.height <= THUMBNAIL[1]
            assert picture.width / picture.height == pytest.approx(400 / 300, rel=0.02)


def test_each_missing_file_counts_also_under_one_name():
    embed = Thumbnails()
    for folder in ("one", "two", "two"):
        embed.image(f"/nowhere/{folder}/a.png", "a")
    assert len(embed.missing) == 2


def test_the_headline_is_of_val_and_not_of_the_queries_that_were_trained_on():
    contents = {
        name: {"selection_metric": "R@1", "metrics": {"trained model": {"R@1": value}}}
        for name, value in {"cirr_seen": 99.0, "cirr_val": 40.0, "validated": 1.0}.items()
    }
    run = Run("x", Path("x"), [], {}, {}, contents, {})
    assert run_report._main_number(run) == ("40.00 %", "R@1 on cirr_val")
    alone = {name.removeprefix("cirr_"): content for name, content in contents.items()}
    assert run_report._main_number(replace(run, metrics=alone)) == ("40.00 %", "R@1 on val")
    assert run_report._main_number(replace(run, metrics={"seen": contents["cirr_seen"]}))[1] == "R@1 on seen"


def test_the_score_of_captions_is_no_percentage():
    run = Run("x", Path("x"), [], {}, {"val": {"CIDEr": {0: 1.0}, "agg_metrics": {0: 1.25, 1: 1.2}}}, {}, {})
    assert run_report._main_number(run)[0] == "1.25"


def test_a_run_that_is_not_finished_is_reported(make_run):
    folder = make_run("one")
    for path in (folder / "val").iterdir():
        path.unlink()
    text = Page(report([read_run(folder)])).text
    assert "50.00 % best so far in validation" in text
    assert "No run has a metrics.json" in text
    assert "No run has a queries.json" in text


def test_a_run_of_an_older_version_is_reported(make_run):
    folder = make_run("one")
    (folder / run_record.RECORD).unlink()
    text = Page(report([read_run(folder)])).text
    assert "run.seed 7 not recorded" in text
    assert "The machine was not recorded" in text


def test_what_is_no_run_is_refused(tmp_path, make_run):
    make_run("one")
    with pytest.raises(FileNotFoundError, match=r"runs is not the folder of a run; it holds the runs one;"):
        read_run(tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"nothing is not the folder of a run; name"):
        read_run(tmp_path / "nothing")


def test_a_damaged_metrics_file_is_named(make_run):
    folder = make_run("one")
    (folder / "val/metrics.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"metrics\.json is damaged .* evaluate the run again"):
        read_run(folder)


# -- what a run was started with -------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_both_starts(tmp_path):
    run_record.begin(tmp_path, ["first"], {"run.seed": 1}, {})
    run_record.begin(tmp_path, ["second"], {"run.seed": 1}, {"run.seed": "--options"}, processes=2)
    run_record.end(tmp_path)
    first, second = run_record.read_starts(tmp_path)
    assert (first["command"], first["finished"]) == (["first"], None)
    assert second["finished"] >= second["started"]
    assert second["processes"] == 2
    assert second["config"] == {"run.seed": {"value": 1, "origin": "--options"}}


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.touch()
    run_record.begin(blocked / "inside", ["x"], {}, {})
    assert "run.json could not be written" in caplog.text


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / run_record.RECORD).write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run_record.read_starts(tmp_path)


@pytest.mark.parametrize(("changes", "mark"), [("", ""), (" M setup.py", "+"), (None, "+")])
def test_a_commit_is_clean_only_where_git_says_so(monkeypatch, changes, mark):
    """Of a large checkout on a slow disk git gives no answer in time."""
    monkeypatch.setattr(run_record, "_git", lambda *words: changes if words[0] == "status" else "0123abc")
    assert run_record.commit() == f"0123abc{mark}"


def test_flat_keeps_lists_and_empty_mappings():
    assert run_record.flat({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {
        "a.b": [1, {"c": 2}], "a.d": {}, "e": None
    }  # fmt: skip


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(make_run, tmp_path, capsys):
    main.main(["report", str(make_run("one")), "--output", str(tmp_path / "r.html"), "--queries", "1"])
    assert capsys.readouterr().out.startswith(f"Written: {tmp_path / 'r.html'} (")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "r.pdf"], "choose a name that ends in .html"),
        (["--queries", "-1"], "--queries must be a whole number >= 0"),
        (["--images", "11"], "--images must be a whole number from 1 to 10"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        main.main(["report", str(tmp_path), *words])
    (tmp_path / "link").symlink_to(tmp_path)
    for again in (tmp_path, tmp_path / "link"):
        with pytest.raises(SystemExit, match=f"{again} is named twice"):
            main.main(["report", str(tmp_path), str(again)])
