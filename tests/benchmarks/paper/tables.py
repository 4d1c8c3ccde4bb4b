"""The tables of the page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.eval.vl.confidence_intervals import AnswerScores, confidence_intervals, group_cells
from dora_mm.studies.campaigns.training_rows import TrainingRow
from dora_mm.studies.curves import difference, rate_per_doubling, shown, with_holm
from dora_mm.studies.variants import NAMES, Variant
from dora_mm.utils.tables import markdown_records
from tests.benchmarks.paper.campaigns import Study, bricks, rows_of, scenes
from tests.benchmarks.paper.weights import (
    Records,
    magnitude_table,
    pattern_table,
    projection_table,
    ratios_at_equal_rates,
    records,
    relation_table,
)

RANKS = (1, 4, 16)
SETTINGS = {
    "b_quarter": "B at 1/4 of the rate",
    "b_4": "B at 4 times the rate",
    "exact": "`norm_grad: exact`",
    "m_quarter": "m at 1/4 of the rate",
    "m_4": "m at 4 times the rate",
    "no_decay": "no weight decay",
}
CANDIDATES = {"riemannian": ("Riemannian", RANKS), "pre_diag": ("Pre-Diag", (1, 4))}
FIRST, LAST = 0, 119  # steps at which gradients were measured


def everything() -> str:
    """All tables, each under what it shows."""
    sdxl, (vl, alone) = bricks("tuned/trainings.csv", "candidates/trainings.csv"), scenes()
    again = {
        "SDXL, rank 1, AVX2": (sdxl, rows_of("tuned/avx2.csv")),
        "SDXL, settings, older": (sdxl, rows_of("tuned/elsewhere.csv") + rows_of("candidates/elsewhere.csv")),
        "VL-BART, older": (vl, rows_of("tuned_vl/elsewhere.csv")),
    }
    sections = {
        "What training changed": pattern_table(),
        "How many times as large DoRA's changes are as LoRA's, VL-BART": ratios_at_equal_rates(),
        "What goes with the score": relation_table(),
        "What the projection does to gradients": projection_table(FIRST, LAST),
        "What becomes of |dL/dm|": magnitude_table(FIRST, LAST),
        "Tuned": [row for study in (sdxl, vl) for row in scores_table(study)],
        "DoRA less LoRA": contrast_table([sdxl, vl]),
        "Rank 1": rank_1_table(sdxl),
        "VL-BART at rank 1": floor_table(vl, alone),
        "Rounding": rounding_table(again),
        "Settings": settings_table(sdxl),
        "Candidates": candidates_table(sdxl),
        "WordNet": wordnet_table(),
    }
    paragraphs = [part for title, table in sections.items() for part in (f"## {title}", markdown_records(table))]
    return "\n\n".join([*paragraphs, "## Best rates", *map(moves, (sdxl, vl))])


def plain(method: str, rank: int) -> Variant:
    return Variant(method, rank)


# --- tuned against tuned ---------------------------------------------------------------------------------------------


def scores_table(study: Study) -> Records:
    """The score of each method at its best rate, with its band."""
    table = []
    for variant in (plain(method, rank) for rank in RANKS for method in ("lora", "dora")):
        row = next(row for row in study.rows if row.training.variant == variant)
        low, high = study.curves[variant].band
        table.append(
            {"": f"{study.name}, {variant}", "parameters": f"{int(row.parameters):,}"}
            | {"best rate": f"{study.best[variant]:g}", "choosing seeds": str(len(study.choosing(variant)))}
            | {"seeds": str(len(study.at(variant).seeds))}
            | {"score": shown(study.at(variant).ci), "as good": f"{2**low:.2g} to {2**high:.2g}"}
        )
    return table


def contrast_table(studies: Sequence[Study]) -> Records:
    """The primary contrasts, with Holm's correction for all of them."""
    pairs = [(study, plain("dora", rank), plain("lora", rank)) for study in studies for rank in RANKS]
    p_values = with_holm([study.less(dora, lora) for study, dora, lora in pairs])
    return [
        {"": f"{study.name}, rank {dora.rank}", "each at its best rate": shown(study.less(dora, lora)), "p (Holm)": p}
        | {"around": shown(difference(study.around(dora), study.around(lora)))}
        | {"rates by all seeds": shown(difference(*(study.at(v, study.preferred[v]) for v in (dora, lora))))}
        | {"width": shown(study.width_less(dora, lora), 1)}
        for (study, dora, lora), p in zip(pairs, p_values, strict=True)
    ]


def rank_1_table(study: Study) -> Records:
    """What helps at rank 1: DoRA, Pre-Diag at DoRA's best rate, and LoRA of rank 2, which has the most parameters."""
    dora, scale = plain("dora", 1), Variant("dora", 1, "pre_diag_1")
    points = {"DoRA": study.at(dora), "Pre-Diag": study.at(scale, study.best[dora])}
    points |= {"LoRA": study.at(plain("lora", 1)), "LoRA of rank 2": study.at(plain("lora", 2))}
    pairs = [("DoRA", "LoRA"), ("Pre-Diag", "LoRA"), ("LoRA of rank 2", "LoRA")]
    pairs += [("Pre-Diag", "DoRA"), ("DoRA", "LoRA of rank 2")]
    found = [difference(points[first], points[second]) for first, second in pairs]
    return [
        {"rank 1": f"{first} less {second}", "difference": shown(each), "p (Holm)": p}
        for (first, second), each, p in zip(pairs, found, with_holm(found), strict=True)
    ]


def floor_table(study: Study, alone: AnswerScores) -> Records:
    """The trainings of rank 1 at the rates that one seed and several have chosen, beside questions alone."""
    given = confidence_intervals({"vqa": alone})["vqa"]
    variants, table = [plain(method, 1) for method in ("lora", "dora")], []
    by_one = replace(study, rate_seeds=study.rate_seeds[:1])
    for rate in sorted({each.best[variant] for each in (study, by_one) for variant in variants}):
        for variant in variants:
            point, values = study.at(variant, rate), study.values[variant][rate]
            less = mean_ci(point.cells_KS - group_cells([alone]))
            chosen_by = [values[seed] / 100 for seed in study.choosing(variant)]
            table.append(
                {"": f"{NAMES[variant.method]} at {rate:g}", "chosen by": three_digits(chosen_by)}
                | {"reported": three_digits(point.cells_KS.mean(axis=0)), "less questions alone": shown(less)}
            )
    return [*table, {"": "questions alone", "chosen by": "-", "reported": shown(given), "less questions alone": "-"}]


def three_digits(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def rounding_table(again: Mapping[str, tuple[Study, Sequence[TrainingRow]]]) -> Records:
    """Rows of trainings that have others with other rounding, and equal digests of data and config."""
    lora, dora = plain("lora", 1), plain("dora", 1)
    table = []
    for title, (study, rows) in again.items():
        own = {row.training.name: row for row in study.rows}
        assert all(row.digest == own[row.training.name].digest for row in rows)
        moved = [float(np.mean(study.cells(row.scores) - study.cells(own[row.training.name].scores))) for row in rows]
        other, rate = replace(study, rows=rows), study.best[dora]
        paired = {lora, dora} <= {row.training.variant for row in rows if row.training.rate == rate}
        table.append(
            {"": title, "rows": str(len(rows)), "a row moves by": f"{np.sqrt(np.mean(np.square(moved))):.3f}"}
            | {"at most": f"{max(map(abs, moved)):.3f}"}
            | {"DoRA less LoRA, rank 1": shown(study.less(dora, lora, rate)) if paired else "-"}
            | {"then": shown(other.less(dora, lora, rate)) if paired else "-"}
        )
    return table


# --- settings and candidates -----------------------------------------------------------------------------------------


def settings_table(study: Study) -> Records:
    """DoRA of rank 4 with other settings, less plain DoRA, with Holm's correction for all of them."""
    dora = plain("dora", 4)
    others = {title: Variant("dora", 4, setting) for setting, title in SETTINGS.items()}
    p_values = with_holm([study.less(other, dora) for other in others.values()])
    return [
        {
            "DoRA, rank 4, with": title,
            "best rate": f"{study.best[other]:g}",
            "less plain DoRA": shown(study.less(other, dora)),
        }
        | {"p (Holm)": p, "around": shown(difference(study.around(other), study.around(dora)))}
        | {"width": shown(study.width_less(other, dora), 1)}
        for (title, other), p in zip(others.items(), p_values, strict=True)
    ]


def candidates_table(study: Study) -> Records:
    """The two candidates, less DoRA of the same rank."""
    table = []
    for name, (title, ranks) in CANDIDATES.items():
        for rank in ranks:
            own, dora = Variant("dora", rank, f"{name}_{rank}"), plain("dora", rank)
            point = study.at(own)
            table.append(
                {
                    "candidate": f"{title}, rank {rank}",
                    "best rate": f"{study.best[own]:g}",
                    "seeds": str(len(point.seeds)),
                }
                | {"less DoRA, each at its best": shown(study.less(own, dora))}
                | {"both at DoRA's": shown(study.less(own, dora, study.best[dora]))}
                | {"width": shown(study.width_less(own, dora), 1)}
            )
    return table


def moves(study: Study) -> str:
    """A sentence on how the best rate falls with the rank."""
    found = {
        NAMES[method]: rate_per_doubling({rank: study.curves[plain(method, rank)] for rank in RANKS})
        for method in ("lora", "dora")
    }
    texts = "; ".join(f"{name} {shown(each, 2)}" for name, each in found.items())
    return f"{study.name}, doublings of the best rate per doubling of the rank: {texts}."


def wordnet_table() -> Records:
    """The scores of a language model on questions made from WordNet, in points."""
    rows = [row for row in records("wordnet.csv") if row["task"] == "mean"]
    texts = {
        row["run"]: ConfidenceInterval(*(float(row[end]) for end in ("mean", "low", "high"))).text("{:.1f}")
        for row in rows
    }
    return [{"SmolLM2-135M": run, "points": text} for run, text in texts.items()]
