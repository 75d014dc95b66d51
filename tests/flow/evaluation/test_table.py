"""The table of an evaluation: its rows and lines, its files, and what tells its lines apart."""

import csv
import math
from contextlib import ExitStack

import pytest

from flow.evaluation import plots, results, table
from flow.evaluation.entries import Statistic, aggregate


def row(weights: str, n: int, extractor: str, **identity) -> dict:
    method = None if weights.startswith("real") else "euler"
    identity |= {"extractor": [extractor, "768", "hash"], "times": [0.0, 1.0]}
    return {"weights": weights, "method": method, "n": n, "identity": identity, "metrics": {}, "seconds": 1.0, "requested": []}


def test_rows_of_one_call_among_others(tmp_path):
    for own in (
        row("run@1", 40, "digits", weights_sha256="a", seed=0),
        row("run@1", 80, "digits", weights_sha256="a", seed=0),
        row("run@1", 80, "digits", weights_sha256="a", seed=1),
        row("run@2", 80, "mnist", weights_sha256="b", seed=0),
        row("real (test split)", 40, "digits", control="split"),
        row("real (test split)", 60, "digits", control="split"),
        row("real (test split)", 70, "mnist", control="split"),
        row("real (test split)", 90, "digits", control="split"),
    ):
        results.append(tmp_path, own)

    rows = results.rows_of(tmp_path, 80)
    assert [(r["weights"], r["identity"]["seed"]) for r in rows] == [("run@1", 0), ("run@1", 1), ("run@2", 0)]
    assert [r["n"] for r in results.real_rows(tmp_path, 80)] == [70]  # of at most as many images
    assert results.real_rows(tmp_path, 30) == []


@pytest.mark.parametrize(
    ("column", "values", "cells"),
    [
        ("seed", (0, 1), ["0", "1"]),
        ("mixed_precision", ("no", "bf16"), ["no", "bf16"]),
        ("labels", (None, [3, 5]), ["", "3 5"]),
        ("labels", ("by frequency 1a2b", [3, 5, 3, 5]), ["by frequency", "3 5"]),
    ],
)
def test_other_samples_have_a_column(tmp_path, column, values, cells):
    """In Markdown and CSV, and only where they differ; rows of real images have none of it."""
    rows = [row("run@1", 40, "digits", **{column: value}) for value in values]
    control = row("real (test split)", 40, "digits")

    def columns_of(chosen: list[dict]) -> tuple[list[str], list[str]]:
        header, *lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.write(tmp_path, chosen).splitlines()]
        with open(tmp_path / "results.csv", newline="") as file:
            names, *in_csv = csv.reader(file)
        assert (column in header) == (column in names)
        if column not in header:
            return [], []
        return [line[header.index(column)] for line in lines[1:]], [line[names.index(column)] for line in in_csv]

    assert columns_of([control, *rows]) == (["", *cells], ["", *cells])
    assert all(columns_of([control, r]) == ([], []) for r in rows)


def test_labels_of_references_are_no_difference(tmp_path):
    """The classes are as frequent as in each; the column `reference` tells these rows apart."""
    rows = [row("run@1", 40, "digits", labels=f"by frequency {k}") for k in range(2)]
    assert "labels" not in table.write(tmp_path, rows)


def test_many_labels_are_counted():
    (entry,) = aggregate([row("run@1", 40, "digits", labels=list(range(100)))])
    assert entry["labels"].startswith("100 labels ") and len(entry["labels"]) < 30


def test_only_refitted_times_are_named():
    """A grid of each number of steps is one line; of two for the same steps, each is its own."""

    def fitted(*times: float) -> dict:
        steps = len(times) - 1
        return {**row("run@1", 40, "digits"), "steps": steps, "NFE": steps, "forwards": steps, "identity": {"times": times}}

    def names(*rows: dict) -> list[str]:
        entries = aggregate(list(rows))
        return [plots.line_name(e, plots.several_of(entries)) for e in entries]

    first, again, other = fitted(0, 0.3, 1), fitted(0, 0.4, 1), fitted(0, 0.3, 0.6, 1)
    assert names(first, other) == ["euler", "euler"]
    one, two, three = names(first, again, other)
    assert one.startswith("euler, times ") and two.startswith("euler, times ") and one != two and three == "euler"


@pytest.mark.parametrize(
    ("first", "second", "variants"),
    [
        ({}, {"flow": {"prediction": "data"}}, 1),
        ({}, {"held_out": "a"}, 1),
        ({"weights_sha256": "a"}, {"weights_sha256": "b"}, 1),  # hf:alice/x and hf:bob/x, the latest without a name
        ({"reference": "a"}, {"reference": "b"}, 2),  # a folder with new content
        ({"bspp": 100}, {"bspp": 50}, 2),
        ({"prompts": None}, {}, 0),  # the same
    ],
)
def test_other_identities_are_variants(tmp_path, first, second, variants):
    """A column and lines of their own, also over other numbers of steps; what has nothing of its own stays without a name."""

    def measured(steps: int, identity: dict) -> dict:
        return {**row("run@1", 40, "digits", **identity), "steps": steps, "NFE": steps, "forwards": steps}

    rows = [measured(steps, identity) for identity in (first, second) for steps in (5, 10)]
    entries = aggregate(rows)
    assert len({entry["variant"] for entry in entries} - {None}) == variants
    lines: dict[str, list[int]] = {}
    for entry in entries:
        lines.setdefault(plots.line_name(entry, plots.several_of(entries)), []).append(entry["steps"])
    assert list(lines.values()) == ([[5, 10]] * 2 if variants else [[5, 5, 10, 10]])
    assert ("variant" in table.write(tmp_path, rows)) == ("variant" in (tmp_path / "results.csv").read_text()) == bool(variants)
    assert all(entry["variant"] is None for single in rows for entry in aggregate([single]))


def test_variants_are_of_the_same_columns(tmp_path):
    """Two snapshots of a run, and two extractors, are told apart by their names."""
    snapshots = [row(f"run@{k}", 40, "digits", weights_sha256=str(k)) for k in range(2)]
    extractors = [row("run@0", 40, name, weights_sha256="0") for name in ("mnist", "inception-v3-compat")]
    assert all(entry["variant"] is None for entry in aggregate([*snapshots, *extractors]))


def test_aggregate_mean_and_spread():
    """The aggregate is the mean and spread of the ranges."""
    common = {"weights": "w", "method": "euler", "steps": 2, "NFE": 2, "forwards": 2, "guidance_scale": None, "n": 9}
    rows = [{**common, "first": i, "identity": {}, "metrics": {"FID": v}, "seconds": 1.0} for i, v in enumerate((3.0, 5.0))]
    (entry,) = aggregate(rows)
    assert entry["metrics"]["FID"][:2] == pytest.approx((4.0, math.sqrt(2)))
    assert entry["ranges"] == 2


def test_repeats_of_an_adaptive_method_are_one_row(tmp_path):
    """Its NFE is measured: every repeat has its own, and the table their mean and spread."""
    row = {"weights": "w", "method": "dopri5", "steps": None, "guidance_scale": 2.0, "n": 9, "identity": {"seed": 1}}
    for first, nfe in ((0, 72), (9, 74), (18, 79)):
        cost = {"NFE": nfe, "forwards": 2 * nfe, "metrics": {"FID": nfe / 10}, "seconds": 1.0}
        results.append(tmp_path, {**row, "first": first, **cost, "requested": ["fid"]})
    assert results.find(tmp_path, {**row, "first": 9, "requested": ["fid"]})  # what is measured is no part of the question
    rows = results.read(tmp_path)
    (entry,) = aggregate(rows)
    assert (entry["ranges"], entry["NFE"], entry["forwards"]) == (3, 75, 150)
    assert entry["metrics"]["FID"][:2] == pytest.approx((7.5, 0.36056), abs=1e-5)
    assert "| 75 (sd 3.6) | 150 (sd 7.2) |" in table.write(tmp_path, rows)
    assert "NFE,NFE_std,forwards,forwards_std" in (tmp_path / "results.csv").read_text()


def test_table_shows_intervals(tmp_path):
    """Of one range its own, of two that of their mean; none where a range does not know its error."""
    common = {"weights": "a", "method": "euler", "steps": 5, "NFE": 5, "forwards": 5, "n": 100, "seconds": 1.0}
    common |= {"requested": ["fid"]}
    rows = [
        {**common, "identity": {"seed": seed}, "first": first, "metrics": {"FID": value}, "standard_errors": errors}
        for seed, first, value, errors in (
            (0, 0, 3.0, {"FID": 0.5}), (1, 0, 3.0, {"FID": 0.3}), (1, 100, 5.0, {"FID": 0.4}), (2, 0, 3.0, {"FID": 0.3}),
            (2, 100, 5.0, {}),
        )
    ]  # fmt: skip
    for row in rows:
        results.append(tmp_path, row)
    intervals = [entry["metrics"]["FID"].interval for entry in aggregate(results.read(tmp_path))]
    assert intervals == pytest.approx([1.96 * 0.5, 1.96 * 0.25, math.nan], nan_ok=True)
    text = table.write(tmp_path, rows)
    assert "3.00 ± 0.98 |" in text and "4.00 ± 0.49 (sd 1.41) |" in text and text.endswith(table.NOTE)
    with open(tmp_path / "results.csv", newline="") as file:
        assert [line["FID_interval"][:4] for line in csv.DictReader(file)] == ["0.98", "0.49", ""]


def test_cells_may_hold_bars():
    text = table.markdown([["weights", "FID"], ["a|b", "9.00"], ["c", "10.00"]])
    assert text.splitlines() == [r"| weights |   FID |", "| ------- | ----: |", r"| a\|b    |  9.00 |", "| c       | 10.00 |"]


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    """Whole: who reads while it is written reads the one before to its end."""
    row = {"weights": "a", "n": 9, "identity": {}, "seconds": 1.0, "requested": ["fid"]}
    rows = [{**row, "first": 9 * k, "metrics": {"FID": 3.0, "FID[3]": 1.0}} for k in range(2)]
    text = table.write(tmp_path, rows)
    names = ["per_class.md", "results.csv", "results.md"]
    before = [(tmp_path / name).read_text() for name in names]
    assert text == f"{before[2]}\n{before[0]}"[:-1]
    with ExitStack() as stack:
        readers = [stack.enter_context(open(tmp_path / name)) for name in names]
        table.write(tmp_path, rows[:1])
        assert [reader.read() for reader in readers] == before
    after = [(tmp_path / name).read_text() for name in names]
    assert all(a != b for a, b in zip(after, before, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("name", "text"),
    [("FID", "0.15 ± 0.00"), ("FD-digits", "0.15 ± 0.00"), ("FD-inception-768", "0.151 ± 0.005"),
     ("precision", "0.151 ± 0.005"), ("KD-digits", "0.1514 ± 0.0049"), ("SW2", "0.1514 ± 0.0049")],
)  # fmt: skip
def test_decimals_suit_the_scale_of_a_metric(name, text):
    """A good model has an FD-inception-768 of 0.15 with an interval of 0.005."""
    assert table.cell(name, Statistic(0.1514, math.nan, 0.0049)) == text
