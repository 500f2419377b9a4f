"""Which runs the study of weight perturbation consists of: its rows, its sizes, and how settings are chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

VERSION = 1
"""Part of every run's digest. Raise it when a change of the code makes older rows of the CSV another experiment's."""

CHOOSING_WORLD, TABLE_WORLD, CAPTION_WORLD = 101, 404, 303
"""Seeds of the drawn worlds: one to choose settings, one for the table, one for the captions of the first training.

The small designs stay in the choosing world, because a world of another size has the same validation queries.
"""

GAMMAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PAPER = 1e-3
GRID = (("tensor", 0), ("global", 0), ("tensor", 5), ("global", 5))
"""Scope and warm-up epochs of WRF's rows, each with every gamma."""
PLAIN, RANDOM, SAM, ASAM = "plain", "random", "SAM", "ASAM"
LORA, LORA_WRF = "LoRA", "LoRA + WRF"
SMOOTHING, EMA, DROPOUT, DECAY = "label smoothing", "EMA of weights", "dropout", "weight decay x 10"
REGULARISERS = {DECAY: "weight decay", DROPOUT: "dropout", SMOOTHING: "label smoothing", EMA: "EMA"}
"""The usual regularisers, each with the setting that is chosen for it."""
NOISE_RATIOS = (0.0, 0.2, 0.5, 0.8)
ELSEWHERE = {"clip_cir": 5e-4, "tscir": 1e-3, "vqa": 1e-3, "captioning": 1e-3}
"""Parts of the study that train other models or tasks than ``blip2_cir``, each with its learning rate."""
ELSEWHERE_GAMMAS = (3e-4, PAPER, 3e-3)


@dataclass(frozen=True)
class Start:
    """What a run starts from: a tower and a Q-Former that were trained on captions.

    Attributes:
        share: Share of the usual number of steps that the tower was trained for.
        width: Width of the Q-Former's layers.
        fresh: Whether the Q-Former's weights are random and the tower alone knows captions.
    """

    share: float = 1.0
    width: int = 128
    fresh: bool = False

    @property
    def name(self) -> str:
        return f"start_{self.share:g}_{self.width}" + ("_fresh" if self.fresh else "")


@dataclass(frozen=True)
class Row:
    """A row of a table: what differs from the plain run.

    Attributes:
        options: ``key.path=value`` of the run's config.
        start: What the run starts from.
        matched: Name of the radius that is computed at the start of the run (``SAM`` or ``ASAM``), so that the
            perturbation has the norm of ``run.wrf.gamma`` times that of the weights.
    """

    options: tuple[str, ...] = ()
    start: Start = Start()
    matched: str = ""

    def with_options(self, *options: str) -> Row:
        return Row((*self.options, *options), self.start, self.matched)


@dataclass(frozen=True)
class Run:
    """One training: a row with a size, a world and a seed. The seed draws the triplets too."""

    part: str
    name: str
    row: Row
    world: int
    triplets: int
    seed: int
    settings: str = field(repr=False)  # of the design, as JSON

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}/{self.triplets}/{self.seed}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that differ between runs with other settings."""
        content = [VERSION, self.settings, asdict(self.row), self.world, self.triplets, self.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def identity(self) -> tuple[str, str]:
        """Key and digest, by which the results are found."""
        return self.key, self.digest


@dataclass(frozen=True)
class Design:
    """Sizes of a study. A run's digest depends on the fields of ``settings`` alone, so seeds can be added later."""

    name: str
    caption_pictures: int = 6000
    caption_steps: int = 1500
    world_triplets: int = 3400  # per category
    world_images: int = 3600
    steps: int = 400
    validations: int = 16
    batch: int = 64
    choosing_seeds: tuple[int, ...] = (100, 101)
    main_amounts: tuple[int, ...] = (1000, 3000)
    main_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    deciding_seeds: tuple[int, ...] = tuple(range(12))  # of plain, random and WRF in the main table
    other_amounts: tuple[int, ...] = (300, 10000)
    other_seeds: tuple[int, ...] = (0, 1, 2)
    main_rows: tuple[str, ...] = ()  # empty: all
    why_triplets: int = 1000
    noise_triplets: int = 3000
    elsewhere_examples: int = 1000
    has_parts: bool = True  # why, noise, elsewhere, and the choice of settings

    @property
    def settings(self) -> str:
        sizes = ("caption_pictures", "caption_steps", "world_triplets", "world_images", "steps", "validations", "batch")
        return json.dumps({name: getattr(self, name) for name in sizes}, sort_keys=True)


FULL = Design("full")
QUICK = Design(
    "quick",
    caption_pictures=3000,
    caption_steps=400,
    world_triplets=350,
    world_images=420,
    steps=240,
    validations=8,
    main_amounts=(1000,),
    main_seeds=(0,),
    deciding_seeds=(),
    other_amounts=(),
    main_rows=(PLAIN, *REGULARISERS, RANDOM, SAM, ASAM, "momentum", "every 5th", "WRF 0.001", "WRF 0.003",
               "WRF 0.001 global", LORA, LORA_WRF),
    has_parts=False,
)  # fmt: skip
DEMO = Design(
    "demo",
    caption_pictures=3000,
    caption_steps=500,
    world_triplets=350,
    world_images=420,
    steps=360,
    validations=12,
    main_amounts=(1000,),
    main_seeds=(0,),
    deciding_seeds=(),
    other_amounts=(),
    main_rows=(PLAIN, RANDOM, "WRF 0.001"),
    has_parts=False,
)

CANDIDATES: dict[str, tuple[float, ...]] = {
    "learning rate": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "gamma": GAMMAS,
    "momentum": (1.5e-3, 5e-3, 1.5e-2),
    "weight decay": (0.5,),
    "dropout": (0.1, 0.2),
    "label smoothing": (0.1, 0.2),
    "EMA": (0.9, 0.98, 0.995),
    "LoRA rate": (1e-3, 3e-3),
}
"""Values among which the choosing world decides; the learning rate first, because the others are chosen with it.

The weight decay has one value, whose runs say how it compares with the other regularisers there.
"""

UNCHOSEN = {
    "learning rate": 5e-4, "gamma": PAPER, "momentum": 1.5e-2, "weight decay": 0.5, "dropout": 0.1,
    "label smoothing": 0.1, "EMA": 0.98, "LoRA rate": 3e-3,
}  # fmt: skip
"""Values of a design without a choice; also how the table's runs are counted before the choice is known."""

Chosen = Mapping[str, float]


def candidate_row(name: str, value: float, chosen: Chosen) -> Row:
    """Return the row that shows how good a value of a setting is."""
    if name == "learning rate":
        return Row((f"run.init_lr={value:g}",))
    rows = table_rows({**chosen, name: value})
    others = {regulariser: row for row, regulariser in REGULARISERS.items()}
    return rows[{"gamma": wrf_name(value), "momentum": "momentum", "LoRA rate": LORA, **others}[name]]


def wrf_name(gamma: float, scope: str = "tensor", warmup: int = 0) -> str:
    """Return the name of a row of WRF: ``WRF 0.001``, ``WRF 0.001 global``, ``WRF 0.001 warm-up 5``."""
    return f"WRF {gamma:g}" + (" global" if scope == "global" else "") + (f" warm-up {warmup}" if warmup else "")


def table_rows(chosen: Chosen) -> dict[str, Row]:
    """Return the rows of the main table by name, with the chosen settings."""
    base = Row((f"run.init_lr={chosen['learning rate']:g}",))
    gamma = f"run.wrf.gamma={chosen['gamma']:g}"
    places = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    lora = Row(
        (
            f"run.init_lr={chosen['LoRA rate']:g}",
            "run.lora.target_modules=[query,value]",
            "run.lora.r=8",
            "run.lora.lora_alpha=16",
            "run.lora.also_train=query_tokens|vision_proj|text_proj|temp",
        )
    )
    rows = {
        PLAIN: base,
        DECAY: base.with_options(f"run.weight_decay={chosen['weight decay']:g}"),
        DROPOUT: base.with_options(*(f"model.qformer_config.{place}={chosen['dropout']:g}" for place in places)),
        SMOOTHING: base.with_options(f"model.label_smoothing={chosen['label smoothing']:g}"),
        EMA: base.with_options(f"run.ema_decay={chosen['EMA']:g}"),
        RANDOM: base.with_options(gamma, "run.wrf.direction=random"),
        SAM: Row((*base.options, gamma, "run.wrf.radius=absolute", "run.wrf.scope=global"), matched=SAM),
        ASAM: Row((*base.options, gamma, "run.wrf.radius=elementwise", "run.wrf.scope=global"), matched=ASAM),
        "momentum": base.with_options(
            f"run.wrf.gamma={chosen['momentum']:g}", "run.wrf.direction=momentum", "run.wrf.warmup_epochs=1"
        ),
        "every 5th": base.with_options(gamma, "run.wrf.every=5"),
        "direction from a quarter": base.with_options(gamma, "run.wrf.direction_share=0.25"),
    }
    for scope, warmup in GRID:
        for value in GAMMAS:
            own = (f"run.wrf.gamma={value:g}", f"run.wrf.scope={scope}", f"run.wrf.warmup_epochs={warmup}")
            rows[wrf_name(value, scope, warmup)] = base.with_options(*own)
    rows[LORA] = lora
    rows[LORA_WRF] = lora.with_options(gamma)
    return rows


def why_rows(chosen: Chosen, steps: int, validations: int) -> dict[str, Row]:
    """Return the rows that test why WRF may not win, as ``hypothesis: row``."""
    rows, wrf = table_rows(chosen), wrf_name(chosen["gamma"])
    three = {name: rows[name] for name in (PLAIN, RANDOM, wrf)}
    two = {name: rows[name] for name in (PLAIN, wrf)}
    found = {f"weight decay x 10: {name}": row.with_options("run.weight_decay=0.5") for name, row in two.items()}
    found[f"second half: {wrf}"] = rows[wrf].with_options(f"run.wrf.last_epochs={validations // 2}")
    longer = (f"run.max_iters={2 * steps}", f"run.iters_per_inner_epoch={2 * steps // validations}")
    found.update({f"steps x 2: {name}": row.with_options(*longer) for name, row in two.items()})
    regularised = {option for option in rows[DROPOUT].options if option not in rows[PLAIN].options}
    found.update({f"dropout: {name}": row.with_options(*sorted(regularised)) for name, row in three.items()})
    starts = {"head 32": Start(width=32), "head 64": Start(width=64), "weak tower": Start(share=0.1),
              "fresh head": Start(fresh=True)}  # fmt: skip
    for label, start in starts.items():
        found.update({f"{label}: {name}": Row(row.options, start, row.matched) for name, row in three.items()})
    return found


def noise_rows(chosen: Chosen) -> dict[str, Row]:
    """Return the rows under label noise, as ``noise RATIO: row``; without noise they are the main table's."""
    rows = table_rows(chosen)
    names = (PLAIN, SMOOTHING, RANDOM, SAM, wrf_name(chosen["gamma"]))
    return {
        f"noise {ratio:g}: {name}": rows[name].with_options(f"datasets.fashioniq.noise_ratio={ratio:g}")
        for ratio in NOISE_RATIOS[1:]
        for name in names
    }


def elsewhere_rows(part: str) -> dict[str, Row]:
    """Return the rows for another model or task. Nothing is chosen for it: all have one learning rate."""
    base = Row((f"run.init_lr={ELSEWHERE[part]:g}",))
    gamma = f"run.wrf.gamma={PAPER:g}"
    sam = base.with_options(gamma, "run.wrf.radius=absolute", "run.wrf.scope=global")
    wrf = {wrf_name(value): base.with_options(f"run.wrf.gamma={value:g}") for value in ELSEWHERE_GAMMAS}
    return {
        PLAIN: base,
        RANDOM: base.with_options(gamma, "run.wrf.direction=random"),
        SAM: Row(sam.options, matched=SAM),
        **wrf,
    }


SCOPED = [(wrf_name(value, *place), wrf_name(value)) for value in (3e-4, PAPER) for place in GRID[1:3]]
"""Rows with another scope or with a warm-up that are compared with the row without."""


def other_names(chosen: Chosen) -> list[str]:
    """Return the rows that are run for the other sizes: of WRF those per tensor without warm-up."""
    left_out = {wrf_name(value, *place) for value in GAMMAS for place in GRID[1:]}
    return [name for name in table_rows(chosen) if name not in left_out]


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        runs: All runs whose settings are known, also finished ones.
        later: Number of further runs, whose settings the results so far do not decide yet.
        chosen: The settings, chosen as far as they are.
    """

    runs: tuple[Run, ...]
    later: int
    chosen: Chosen


Recalls = Mapping[tuple[str, str], float]
"""Validation recall of finished runs by key and digest."""


def plan(design: Design, recalls: Recalls) -> Plan:
    """Return the runs of a design; the results so far choose settings."""
    if not design.has_parts:
        return Plan(unique(table_runs(design, UNCHOSEN)), 0, UNCHOSEN)
    chosen: dict[str, float] = {}
    runs: list[Run] = []
    for stage in (["learning rate"], [name for name in CANDIDATES if name != "learning rate"]):
        settled = {**UNCHOSEN, **chosen}
        for name in stage:
            own = {value: candidate_runs(design, name, value, settled) for value in CANDIDATES[name]}
            runs += [run for of_value in own.values() for run in of_value]
            best = best_value(own, recalls)
            if best is not None:
                chosen[name] = best
        if any(name not in chosen for name in stage):
            provisional = {**UNCHOSEN, **chosen}
            later = len(unique(table_runs(design, provisional)))
            if stage == ["learning rate"]:
                others = (len(values) for name, values in CANDIDATES.items() if name != "learning rate")
                later += sum(others) * len(design.main_amounts) * len(design.choosing_seeds)
            return Plan(unique(runs), later, chosen)
    return Plan(unique([*runs, *table_runs(design, chosen)]), 0, chosen)


def candidate_runs(design: Design, name: str, value: float, chosen: Chosen) -> list[Run]:
    row = candidate_row(name, value, chosen)
    return [
        Run("choose", f"{name} {value:g}", row, CHOOSING_WORLD, amount, seed, design.settings)
        for amount in design.main_amounts
        for seed in design.choosing_seeds
    ]


def best_value(runs: Mapping[float, Sequence[Run]], recalls: Recalls) -> float | None:
    """Return the value with the best mean recall, the first of equal ones; ``None`` if a run is missing."""
    means = {}
    for value, own in runs.items():
        found = [recalls.get(run.identity) for run in own]
        if None in found:
            return None
        means[value] = sum(recall for recall in found if recall is not None) / len(found)
    return max(means, key=lambda value: means[value])


def table_runs(design: Design, chosen: Chosen) -> list[Run]:
    """Return the runs of the table's world: the main table, the other sizes, hypotheses, label noise, other models."""

    def runs(part: str, rows: Mapping[str, Row], amounts: Sequence[int], seeds: Sequence[int]) -> list[Run]:
        return [
            Run(part, name, row, TABLE_WORLD if design.has_parts else CHOOSING_WORLD, amount, seed, design.settings)
            for seed in seeds  # outermost, so that an interrupted study has whole tables of fewer seeds
            for amount in amounts
            for name, row in rows.items()
        ]

    rows = table_rows(chosen)

    def named(names: Iterable[str]) -> dict[str, Row]:
        return {name: rows[name] for name in names}

    found = runs("main", named((PLAIN, RANDOM, wrf_name(chosen["gamma"]))), design.main_amounts, design.deciding_seeds)
    found += runs("main", named(design.main_rows or rows), design.main_amounts, design.main_seeds)
    if design.has_parts:
        why = why_rows(chosen, design.steps, design.validations)
        longer = {name: row for name, row in why.items() if name.startswith("steps x 2")}
        found += runs("main", named(other_names(chosen)), design.other_amounts, design.other_seeds)
        found += runs("why", why, [design.why_triplets], design.other_seeds)
        found += runs("why", longer, design.main_amounts, design.other_seeds)
        found += runs("noise", noise_rows(chosen), [design.noise_triplets], design.other_seeds)
        for part in ELSEWHERE:
            found += runs(part, elsewhere_rows(part), [design.elsewhere_examples], design.other_seeds)
    return found


def unique(runs: Iterable[Run]) -> tuple[Run, ...]:
    return tuple({run.identity: run for run in runs}.values())
