"""Rows that scripts pick from a table."""

from flow.evaluation import table


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
