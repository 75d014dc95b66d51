"""Rows that scripts pick from a table, and what tells its lines apart."""

import csv

import pytest

from flow.evaluation import plots, table


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
        table.append_row(tmp_path, own)

    def seeds(*args, **identity) -> list[tuple]:
        return [(r["weights"], r["identity"]["seed"]) for r in table.rows_of(tmp_path, *args, **identity)]

    assert seeds(80) == [("run@1", 0), ("run@1", 1), ("run@2", 0)]
    assert seeds(80, "digits") == [("run@1", 0), ("run@1", 1)]
    assert seeds(80, "digits", weights_sha256="a", seed=1) == [("run@1", 1)]
    assert seeds(80, "digits", weights_sha256="b") == []
    assert [r["n"] for r in table.floors(tmp_path, 80, "digits")] == [60]  # of at most as many images
    assert [r["n"] for r in table.floors(tmp_path, 80)] == [70]
    assert table.floors(tmp_path, 30) == []


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
    (entry,) = table.aggregate([row("run@1", 40, "digits", labels=list(range(100)))])
    assert entry["labels"].startswith("100 labels ") and len(entry["labels"]) < 30


def test_only_refitted_times_are_named():
    """A grid of each number of steps is one line; of two for the same steps, each is its own."""

    def fitted(*times: float) -> dict:
        steps = len(times) - 1
        return {**row("run@1", 40, "digits"), "steps": steps, "NFE": steps, "forwards": steps, "identity": {"times": times}}

    def names(*rows: dict) -> list[str]:
        entries = table.aggregate(list(rows))
        return [plots.line_name(e, plots.several_of(entries)) for e in entries]

    first, again, other = fitted(0, 0.3, 1), fitted(0, 0.4, 1), fitted(0, 0.3, 0.6, 1)
    assert names(first, other) == ["euler", "euler"]
    one, two, three = names(first, again, other)
    assert one.startswith("euler, times ") and two.startswith("euler, times ") and one != two and three == "euler"
