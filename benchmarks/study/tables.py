"""Tables of the study, made of the CSV alone, and what they say by the rules of the plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from study.design import (
    CANDIDATES,
    ELSEWHERE,
    ELSEWHERE_GAMMAS,
    GAMMAS,
    GRID,
    LORA,
    LORA_WRF,
    NOISE_RATIOS,
    PAPER,
    PLAIN,
    RANDOM,
    REGULARISERS,
    SAM,
    SCOPED,
    SMOOTHING,
    UNCHOSEN,
    Design,
    Plan,
    plan,
    wrf_name,
)
from study.intervals import LEVEL, Interval, bootstrap, over_seeds
from study.results import Result, unpack_scores

PERTURBATION_ALONE = "second half: "
"""Prefix of the row whose change leaves plain training as it is."""

WHY = {
    "as in the main table": "",
    "weight decay x 10": "weight decay x 10: ",
    "all with dropout": "dropout: ",
    "steps x 2": "steps x 2: ",
    "perturbed in the second half": PERTURBATION_ALONE,
    "Q-Former of width 32": "head 32: ",
    "Q-Former of width 64": "head 64: ",
    "tower with a tenth of the steps": "weak tower: ",
    "Q-Former without captions": "fresh head: ",
}

ELSEWHERE_LABELS = {
    "clip_cir": "`clip_cir`'s text tower, FashionIQ's `mean`",
    "tscir": "TSCIR's stage II, FashionIQ's `mean`",
    "vqa": "LAVIS's BLIP, right answers in percent",
    "captioning": "LAVIS's BLIP, 100 x CIDEr",
}
"""What is trained and measured in the parts of the study that train other models or tasks."""

WITHOUT_GAP = ("tscir",)
"""Parts whose training examples are of another kind than validation's, so that their difference says nothing."""

POINT = 1.0
"""Points of recall that count as a gain worth a second pass."""

LEAST_SEEDS = 3
"""Seeds that a verdict and an interval over seeds alone need."""

ELSEWHERE_LEAST = 3
"""Other models and tasks that have to agree for a conclusion."""

Results = Mapping[tuple[str, str], Result]
Values = NDArray[np.float64]
Table = list[list[str]]


def recalls_of(rows: Results) -> dict[tuple[str, str], float]:
    """Return what settings are chosen by: validation recall with early stopping."""
    return {key: float(row["val_stopped"]) for key, row in rows.items()}


@dataclass(frozen=True)
class Study:
    """The finished runs of a design."""

    design: Design
    rows: Results

    @cached_property
    def plan(self) -> Plan:
        return plan(self.design, recalls_of(self.rows))

    @cached_property
    def chosen(self) -> Mapping[str, float]:
        return {**UNCHOSEN, **self.plan.chosen}

    @property
    def wrf(self) -> str:
        """Name of WRF's row with the chosen gamma."""
        return wrf_name(self.chosen["gamma"])

    @property
    def best_regulariser(self) -> str | None:
        """Name of the usual regulariser that was best in the choosing world; ``None`` if that is not known."""
        found = {}
        for name, setting in REGULARISERS.items():
            key = f"{setting} {self.chosen[setting]:g}"
            runs = [row for amount in self.design.main_amounts for row in self.of("choose", key, amount).values()]
            found[name] = mean(float(row["val_stopped"]) for row in runs) if runs else None
        known = {name: recall for name, recall in found.items() if recall is not None}
        return max(known, key=lambda name: known[name]) if len(known) == len(found) else None

    @property
    def main_names(self) -> list[str]:
        """Names of the main table's rows in the order of the plan."""
        return list(dict.fromkeys(run.name for run in self.plan.runs if run.part == "main"))

    @cached_property
    def finished(self) -> dict[tuple[str, str, int], dict[int, Result]]:
        """Results by part, row and amount, then by seed; rows of other settings than the plan's are left out."""
        found: dict[tuple[str, str, int], dict[int, Result]] = defaultdict(dict)
        for run in self.plan.runs:
            if run.identity in self.rows:
                found[run.part, run.name, run.triplets][run.seed] = self.rows[run.identity]
        return found

    def of(self, part: str, name: str, amount: int, decides: bool = False) -> dict[int, Result]:
        """Return a row's results by seed; of the main table those of the seeds that all of its rows have.

        Args:
            part, name, amount: What identifies the row.
            decides: Whether to return all seeds, also where the rows that decide have more than the others.
        """
        found = self.finished.get((part, name, amount), {})
        if decides or part != "main":
            return found
        return {seed: row for seed, row in found.items() if seed in self.design.main_seeds}

    def side_by_side(self, rows: Mapping[str, Mapping[int, Result]]) -> dict[str, dict[int, Result]]:
        """Return rows whose averages are compared, by name: each has the seeds that all rows with a result have.

        Of the main table these are at most the seeds of the other parts, whose averages stand below.
        """
        return with_seeds(rows, [seed for seed in shared_seeds(rows.values()) if seed in self.design.other_seeds])

    def difference(
        self, one: Mapping[int, Result], other: Mapping[int, Result], column: str = "hits_stopped"
    ) -> Interval | None:
        """Return the mean of one row less another over the seeds that both have, in points of recall."""
        return over_both(differences_by_seed(one, other, column))

    @cached_property
    def gains(self) -> dict[int, dict[str, Interval]]:
        """What each row of the main table gains over plain training, with early stopping, by amount and name."""
        found: dict[int, dict[str, Interval]] = {}
        for amount in sorted({*self.design.main_amounts, *self.design.other_amounts}):
            plain = self.of("main", PLAIN, amount)
            others = {name: self.of("main", name, amount) for name in self.main_names if name != PLAIN}
            differences = {name: self.difference(own, plain) for name, own in others.items()}
            found[amount] = {name: interval for name, interval in differences.items() if interval is not None}
        return found

    def gap_difference(self, one: Mapping[int, Result], other: Mapping[int, Result]) -> Interval | None:
        """Return the mean of one row's gap less another's at the last step; the interval is over seeds alone.

        Fewer than `LEAST_SEEDS` give no interval.
        """
        seeds = paired_seeds(one, other)
        if len(seeds) < LEAST_SEEDS:
            return None
        return over_seeds(np.array([gap(one[seed]) - gap(other[seed]) for seed in seeds]))


def paired_seeds(one: Mapping[int, Result], other: Mapping[int, Result]) -> list[int]:
    """Return the seeds of both rows whose runs began with the same weights; another processor may train other ones."""
    return [seed for seed in sorted(one.keys() & other.keys()) if one[seed]["start"] == other[seed]["start"]]


def shared_seeds(rows: Iterable[Mapping[int, Result]]) -> list[int]:
    """Return the seeds that all rows with a result have, with the same weights at the beginning."""
    known = [own for own in rows if own]
    seeds = sorted(set(known[0]).intersection(*known[1:])) if known else []
    return [seed for seed in seeds if len({own[seed]["start"] for own in known}) == 1]


def with_seeds(rows: Mapping[str, Mapping[int, Result]], seeds: Collection[int]) -> dict[str, dict[int, Result]]:
    return {name: {seed: row for seed, row in own.items() if seed in seeds} for name, own in rows.items()}


def per_query(row: Result, column: str = "hits_stopped") -> Values:
    """Return each example's score in percent, ``(examples,)``; a query's is the mean of R@10 and R@50: 0, 50 or 100."""
    values: Values = 100 * unpack_scores(row[column]).mean(axis=0)
    return values


def differences_by_seed(
    one: Mapping[int, Result], other: Mapping[int, Result], column: str = "hits_stopped"
) -> dict[int, Values]:
    """Return one row less another, ``(examples,)`` in percent, for each seed that both have."""
    return {seed: per_query(one[seed], column) - per_query(other[seed], column) for seed in paired_seeds(one, other)}


def over_both(values: Mapping[int, Values]) -> Interval | None:
    """Return the mean over seeds and examples of values by seed; ``None`` without a seed."""
    return bootstrap(np.stack(list(values.values()))) if values else None


def gap(row: Result) -> float:
    """Return recall on training queries less recall on validation queries, after the last step."""
    return float(row["train_last"]) - float(row["val_last"])


def average(rows: Mapping[int, Result], column: str) -> float | None:
    values = [float(row[column]) for row in rows.values() if row[column]]
    return mean(values) if values else None


def seeds_of(rows: Mapping[str, Mapping[int, Result]]) -> str:
    """Return how many seeds the rows of `Study.side_by_side` have."""
    return str(max(map(len, rows.values())))


# -- tables ----------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def words(interval: Interval | None) -> str:
    return "–" if interval is None else str(interval)


def pairs_of(own: Mapping[int, Result], plain: Mapping[int, Result]) -> str:
    """Return a row's number of seeds, and how many of them are paired with plain training if not all are."""
    paired = len(paired_seeds(own, plain))
    return str(len(own)) if paired == len(own) else f"{len(own)}, {paired} paired"


def average_gap(rows: Mapping[int, Result]) -> float | None:
    return mean(gap(row) for row in rows.values()) if rows else None


def main_table(study: Study, amount: int) -> Table:
    """Return the main table of one amount of triplets; rows without a finished run are left out."""
    heading = ["row", "seeds", "train", "val", "gap", "val, stopped", f"less plain ({LEVEL} %)", "loss", "rise along δ",
               "rise, random", "‖δ‖/‖θ‖", "‖θ‖, end / start", "time"]  # fmt: skip
    plain = study.of("main", PLAIN, amount)
    plain_time = average(plain, "step_seconds")
    table = [heading]
    for name in study.main_names:
        own = study.of("main", name, amount)
        if not own:
            continue
        time, start, end, radius = (
            average(own, column) for column in ("step_seconds", "norm_start", "norm_end", "radius")
        )
        table.append([
            name,
            pairs_of(own, plain),
            *(number(average(own, column)) for column in ("train_last", "val_last")),
            number(average_gap(own)),
            number(average(own, "val_stopped")),
            words(study.gains[amount].get(name)),
            number(average(own, "loss"), 3),
            *(number(average(own, column), 4) for column in ("rise_gradient", "rise_random")),
            number(radius / start if radius and start else None, 5),
            number(end / start if end and start else None, 2),
            f"{time / plain_time:.2f} x" if time and plain_time else "–",
        ])  # fmt: skip
    return table


def choice_table(study: Study) -> Table:
    """Return the recall of each candidate in the choosing world: at each size, and the mean that chooses."""
    amounts = study.design.main_amounts
    table = [["setting", "value", "runs", *(f"{amount:,} triplets" for amount in amounts), "mean", ""]]
    for name, values in CANDIDATES.items():
        for value in values:
            of_amount = [study.of("choose", f"{name} {value:g}", amount) for amount in amounts]
            found = [float(row["val_stopped"]) for own in of_amount for row in own.values()]
            is_chosen = study.plan.chosen.get(name) == value
            recalls = [average(own, "val_stopped") for own in of_amount] + [mean(found) if found else None]
            said = [number(recall, 2) for recall in recalls]
            table.append([name, f"{value:g}", str(len(found)), *said, "chosen" if is_chosen else ""])
    return table


def pair_table(study: Study, part: str, labels: Mapping[str, str], amount: int) -> Table:
    """Return validation recall of plain, random and WRF under changes, and what WRF gains over the other two.

    ``labels`` names the prefix of a row under each change; "", the first, is the main table's row. A change of the
    perturbation alone has no plain training of its own, and is compared with the main table's.
    """
    table = [["", "seeds", "plain", "random", "WRF", "WRF less plain", "less the first line's", "WRF less random",
              "gap, plain", "gap, WRF"]]  # fmt: skip
    first: dict[int, Values] = {}
    for label, prefix in labels.items():
        own = {name: study.of(part if prefix else "main", prefix + name, amount) for name in (PLAIN, RANDOM, study.wrf)}
        if prefix == PERTURBATION_ALONE:
            own[PLAIN] = study.of("main", PLAIN, amount)
        rows = study.side_by_side(own)
        plain, drawn, wrf = rows.values()
        if not (plain or drawn or wrf):
            continue
        gaps = [average_gap(own) for own in (plain, wrf)]
        gains = differences_by_seed(wrf, plain)
        first = first or gains
        change = {seed: gains[seed] - first[seed] for seed in gains.keys() & first.keys()} if gains is not first else {}
        against = [over_both(gains), over_both(change), study.difference(wrf, drawn)]
        recalls = [number(average(own, "val_stopped")) for own in (plain, drawn, wrf)]
        table.append([label, seeds_of(rows), *recalls, *map(words, against), *map(number, gaps)])
    return table


def grid_table(study: Study, amount: int) -> Table:
    """Return what WRF gains over plain training, with early stopping, for each gamma, scope and warm-up."""
    places = [
        f"{'per tensor' if scope == 'tensor' else scope}" + f", warm-up {warmup}" * bool(warmup)
        for scope, warmup in GRID
    ]
    table = [["γ", "seeds", *places]]
    plain = study.of("main", PLAIN, amount)
    for gamma in GAMMAS:
        names = [wrf_name(gamma, *place) for place in GRID]
        pairs = (len(paired_seeds(study.of("main", name, amount), plain)) for name in names)
        seeds = sorted(filter(None, pairs))
        if seeds:
            found = (words(study.gains[amount].get(name)) for name in names)
            table.append([f"{gamma:g}", " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), *found])
    return table


def noise_table(study: Study, amount: int) -> Table:
    names = (PLAIN, SMOOTHING, RANDOM, SAM, study.wrf)
    table = [["share of wrong targets", "seeds", *names, "WRF less plain"]]
    for ratio in NOISE_RATIOS:
        prefix, part = (f"noise {ratio:g}: ", "noise") if ratio else ("", "main")
        rows = study.side_by_side({name: study.of(part, prefix + name, amount) for name in names})
        if any(rows.values()):
            difference = study.difference(rows[study.wrf], rows[PLAIN])
            recalls = [number(average(own, "val_stopped")) for own in rows.values()]
            table.append([f"{ratio:g}", seeds_of(rows), *recalls, words(difference)])
    return table


def elsewhere_table(study: Study) -> Table:
    """Return for each other model or task the scores of its rows, and what WRF gains over plain and over random."""
    amount, radii = study.design.elsewhere_examples, [wrf_name(value) for value in ELSEWHERE_GAMMAS]
    names, claimed = (PLAIN, RANDOM, SAM, *radii), wrf_name(PAPER)
    differences = [f"{name} less plain" for name in radii] + [f"{claimed} less random"]
    table = [["what is trained, and measured", "seeds", *names, *differences, "gap, plain", f"gap, {claimed}"]]
    for part in ELSEWHERE:
        rows = study.side_by_side({name: study.of(part, name, amount) for name in names})
        if not any(rows.values()):
            continue
        pairs = [(name, PLAIN) for name in radii] + [(claimed, RANDOM)]
        found = [study.difference(rows[one], rows[other]) for one, other in pairs]
        gaps = [None if part in WITHOUT_GAP else average_gap(rows[name]) for name in (PLAIN, claimed)]
        scores = [number(average(own, "val_stopped")) for own in rows.values()]
        own = [ELSEWHERE_LABELS[part], seeds_of(rows)]
        table.append([*own, *scores, *map(words, found), *map(number, gaps)])
    return table


def markdown(table: Table) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def aligned(table: Table) -> str:
    """Return a table as plain text."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


# -- what was said before --------------------------------------------------------------------------------------------


def verdict(interval: Interval | None) -> str:
    """Say in words what an interval of a difference means, by the rules of the plan."""
    if interval is None:
        return "not run yet"
    if interval.low > 0:
        return "a gain of a point" if interval.mean >= POINT else "a gain under a point"
    if interval.high < 0:
        return "a loss"
    return "no gain of a point" if interval.high < POINT else "undecided"


def judged(interval: Interval | None, seeds: int) -> str:
    """Return the verdict, which one or two seeds do not get: they say next to nothing about other seeds."""
    return f"fewer than {LEAST_SEEDS} seeds" if 0 < seeds < LEAST_SEEDS else verdict(interval)


def comparisons(study: Study) -> Table:
    """Return the comparisons that the plan named before the runs, with their verdicts."""
    table = [["triplets", "comparison", "seeds", f"difference ({LEVEL} %)", "verdict"]]
    wrf, best = study.wrf, study.best_regulariser or "the best regulariser"
    twice = {name: f"{name} with twice the steps" for name in (PLAIN, wrf)}
    compared = [
        (f"{wrf} less plain", wrf, PLAIN, "hits_stopped"),
        (f"{wrf} less random", wrf, RANDOM, "hits_stopped"),
        ("random less plain", RANDOM, PLAIN, "hits_stopped"),
        (f"{wrf} less SAM", wrf, SAM, "hits_stopped"),
        (f"{wrf} less {best}", wrf, best, "hits_stopped"),
        (f"{wrf} less plain, last step", wrf, PLAIN, "hits_last"),
        (f"{wrf} less random, last step", wrf, RANDOM, "hits_last"),
        *((f"{one} less {other}", one, other, "hits_stopped") for one, other in SCOPED),
        (f"{LORA_WRF} less {LORA}", LORA_WRF, LORA, "hits_stopped"),
        (f"{wrf} less {twice[PLAIN]}", wrf, twice[PLAIN], "hits_stopped"),
        (f"{wrf} less plain, both with twice the steps", twice[wrf], twice[PLAIN], "hits_stopped"),
    ]
    for amount in study.design.main_amounts:
        rows = {name: study.of("main", name, amount, decides=True) for name in study.main_names}
        if study.design.has_parts:
            rows.setdefault(best, {})
            rows.update({longer: study.of("why", f"steps x 2: {name}", amount) for name, longer in twice.items()})
        planned = [(label, rows[one], rows[other], column) for label, one, other, column in compared
                   if one in rows and other in rows]  # fmt: skip
        for label, one, other, column in planned:
            interval, seeds = study.difference(one, other, column), len(paired_seeds(one, other))
            table.append([f"{amount:,}", label, str(seeds), words(interval), judged(interval, seeds)])
        narrower, seeds = study.gap_difference(rows[wrf], rows[PLAIN]), len(paired_seeds(rows[wrf], rows[PLAIN]))
        said = judged(None, seeds) if narrower is None else "narrower" if narrower.high < 0 else "not narrower"
        table.append([f"{amount:,}", "gap: WRF less plain", str(seeds), words(narrower), said])
    return table


def conclusion(study: Study) -> str:
    """Return what the runs say of the paper's claim, by the rules of the plan."""
    amounts, wanted = study.design.main_amounts, len(study.design.deciding_seeds or study.design.main_seeds)
    rows = {(amount, name): study.of("main", name, amount, decides=True) for amount in amounts
            for name in (PLAIN, RANDOM, study.wrf)}  # fmt: skip
    against_plain, against_random, gaps = [], [], []
    for amount in amounts:
        own, plain, drawn = (rows[amount, name] for name in (study.wrf, PLAIN, RANDOM))
        if min(len(paired_seeds(own, plain)), len(paired_seeds(own, drawn))) < wanted:
            return "The runs that decide are not all there, so nothing is concluded yet."
        against_plain.append(_known(study.difference(own, plain)))
        against_random.append(_known(study.difference(own, drawn)))
        gaps.append(study.gap_difference(own, plain))
    is_narrower = all(interval is not None and interval.high < 0 for interval in gaps)
    gains, gains_over_random = (
        all(interval.low > 0 for interval in found) for found in (against_plain, against_random)
    )
    if all(interval.high < POINT for interval in against_plain):
        return "The runs speak against the paper: WRF gains less than a point over plain training at both sizes."
    if gains and gains_over_random and is_narrower:
        return (
            "The runs support the paper: at both sizes WRF gains over plain training and over a random perturbation, "
            "and the gap is narrower."
        )
    undecided = "The runs leave it undecided whether WRF gains what the paper claims"
    if gains and gains_over_random:
        return f"{undecided}: it gains over plain and over random at both sizes, and the gap is not narrower."
    if gains:
        return f"{undecided}: it gains over plain training at both sizes, and not over a random perturbation at both."
    if is_narrower and not any(interval.low > 0 for interval in against_plain):
        return f"{undecided}: it narrows the gap without a gain on validation, so it only slows training down."
    found = (f"{verdict(interval)} with {amount:,}" for interval, amount in zip(against_plain, amounts))
    return f"{undecided}. Over plain training, by number of triplets: {', '.join(found)}."


def _known(interval: Interval | None) -> Interval:
    assert interval is not None, "rows with pairs have a difference"
    return interval


def elsewhere_conclusion(study: Study) -> str:
    """Return what the other models and tasks say of the paper's claim, by the rule of the plan."""
    amount, claimed, wanted = study.design.elsewhere_examples, wrf_name(PAPER), len(study.design.other_seeds)
    gains = losses = 0
    for part in ELSEWHERE:
        own, plain, drawn = (study.of(part, name, amount) for name in (claimed, PLAIN, RANDOM))
        if min(len(paired_seeds(own, plain)), len(paired_seeds(own, drawn))) < wanted:
            return "These runs are not all there, or not of one start, so nothing is concluded yet."
        against = [_known(study.difference(own, other)) for other in (plain, drawn)]
        gains += all(interval.low > 0 for interval in against)
        losses += against[0].high < POINT
    said = f"WRF at γ = {PAPER:g} gains over plain and over random in {gains} of {len(ELSEWHERE)}"
    said += f", and less than a point over plain in {losses}: "
    if losses >= ELSEWHERE_LEAST:
        return f"{said}this speaks against the paper."
    return said + ("this supports the paper." if gains >= ELSEWHERE_LEAST else "this is undecided.")


# -- where the numbers are from ---------------------------------------------------------------------------------------


def counts(study: Study) -> Table:
    table = [["part", "finished", "planned"]]
    planned = Counter(run.part for run in study.plan.runs)
    done = Counter(run.part for run in study.plan.runs if run.identity in study.rows)
    table += [[part, str(done[part]), str(total)] for part, total in planned.items()]
    if study.plan.later:
        table.append(["later, once the settings are chosen", "0", str(study.plan.later)])
    return table


def provenance(study: Study) -> Table:
    table = [["runs", "commit", "processor", "torch", "Python", "start"]]
    columns = ("commit", "cpu", "torch", "python", "start")
    used = (row for of_seed in study.finished.values() for row in of_seed.values())
    found = Counter(tuple(row[column] for column in columns) for row in used)
    return table + [[str(count), *values] for values, count in found.most_common()]
