"""The rows of evaluate.py: the same for any number of processes, computed once, with one bar of progress at a time."""

import pytest
from conftest import run_here
from digits_features import digits_extractor, feature_set, write_folder

import datasets
from flow.evaluation import control, results
from flow.evaluation.frechet import frechet_distance
from flow.noise import generator
from flow.runtime import distributed

extractor = pytest.fixture(digits_extractor, scope="module")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_run):
    out = tmp_path_factory.mktemp("evaluation")
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--n_samples", "60", "--bspp", "16"]
    command += ["--metrics", "fid", "accuracy", "prc", "density_coverage", "memorization", "--methods", "euler", "heun"]
    command += ["--sampling_steps", "1", "3", "--repeats", "2", f"data.root={out / 'data'}"]
    printed = run_here(*command, "--out", out / "one")
    assert "60 images (samples) are too few for a Frechet distance of 64 features" in printed
    return command, out


def test_few_images_are_enough_for_other_metrics(here, evaluated):
    """No warning about the Fréchet distance, for which nobody asks."""
    command, out = evaluated
    printed = here(*command, "--metrics", "accuracy", "--repeats", "1", "--out", out / "accuracy")
    assert "too few for a Frechet distance" not in printed
    assert all(row["metrics"].keys() == {"accuracy"} for row in results.read(out / "accuracy"))


def test_two_processes_find_the_same_numbers(group, evaluated):
    """Also those of the reference, which the second run computes anew."""
    command, out = evaluated
    of_heun = ["--methods", "heun", "--sampling_steps", "3", "--repeats", "1"]
    group(*command[:-1], f"data.root={out / 'other'}", *of_heun, "--out", out / "two")
    two = results.read(out / "two")
    settings = [(row["method"], row["steps"], row["first"]) for row in two]
    one = [row for row in results.read(out / "one") if (row["method"], row["steps"], row["first"]) in settings]
    assert settings == [(None, None, 0), ("heun", 3, 0)]
    for a, b in zip(one, two, strict=True):
        assert a.get("NFE") == b.get("NFE")
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-6)
        assert b["standard_errors"] == pytest.approx(a["standard_errors"], rel=1e-6)
        assert set(a["metrics"]) - set(a["standard_errors"]) == {"FD-digits"}  # of fewer images than features


def test_table_files_and_finished_rows(evaluated, here, error):
    command, out = evaluated
    folder = out / "one"
    names = {"results.jsonl", "results.csv", "results.md", "nfe.png", "memorization.png"}
    assert {p.name for p in folder.iterdir()} == names
    control, *rows = results.read(folder)
    assert results.is_control(control) and control["n"] == 60
    assert [(r["method"], r["steps"], r["NFE"]) for r in rows[::2]] == [
        ("euler", 1, 1), ("euler", 3, 3), ("heun", 1, 1), ("heun", 3, 5),
    ]  # fmt: skip
    assert [r["first"] for r in rows[:2]] == [0, 60]  # repeats are other images, not the same ones again
    assert rows[0]["metrics"]["FD-digits"] != rows[1]["metrics"]["FD-digits"]
    text = (folder / "results.md").read_text()
    assert "FD-digits" in text and "FID" not in text and " (sd " in text
    assert "real (half against half)" in text and "real (half against half)" in (folder / "results.csv").read_text()
    before = (folder / "results.jsonl").read_bytes()
    again = here(*command, "--out", folder, "--rows_file", out / "rows.jsonl")
    assert (folder / "results.jsonl").read_bytes() == before
    assert results.read(out / "rows.jsonl") == [control, *rows]
    note = "rows were in results.jsonl already; name another --out to compute them again"
    assert "| euler" in again and f"note: 9 of 9 {note}" in again
    for file in (out / "rows.jsonl", folder / "results.jsonl"):
        line = error(*command, "--out", folder, "--rows_file", file)
        assert f"--rows_file {file}: is there already; name a new file" in line
    assert (folder / "results.jsonl").read_bytes() == before


def test_one_bar_at_a_time(here, tmp_path, tiny_run, monkeypatch):
    bars = []
    progress = distributed.progress

    def recorded(*args, **kwargs):
        assert all(bar.disable for bar in bars), "the bar before is still open"
        bars.append(progress(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(distributed, "progress", recorded)
    here(
        "evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, 2, "--n_samples", 70,
        "--metrics", "fid", "prc", f"data.root={tmp_path}", "--out", tmp_path / "out",
    )  # fmt: skip
    names = [bar.desc for bar in bars]
    images = [f"images of this process, row {k} of 2" for k in (1, 2)]
    assert names == ["features of the reference", "metrics", images[0], "metrics", images[1], "metrics"]
    assert [bar.n for bar in bars if bar.desc in images] == [70, 140]  # of 140: the time left is that of all rows
    assert all(bar.n == bar.total for bar in bars if bar.desc == "metrics")


def test_real_row_without_splits(evaluated, extractor):
    """Two random halves of the reference, of which the first has no more images than the rows have samples."""
    row_of_real = next(row for row in results.read(evaluated[1] / "one") if results.is_control(row))
    data = datasets.build("digits", None, {})
    order = generator("control").permutation(len(data))
    chosen = control.choose_by_frequency(order[:898].tolist(), data.labels, data.labels[order[898:]], 60)
    a, b = (feature_set(data.images[part], extractor) for part in (chosen, order[898:]))
    expected = frechet_distance(a.moments, b.moments)
    assert row_of_real["metrics"]["FD-digits"] == pytest.approx(expected, rel=1e-6)
    assert row_of_real["metrics"]["accuracy"] > 0.95


def test_rows_of_a_changed_network_are_other_rows(here, tmp_path, tiny_run):
    """Keys of the command line change what the same weights are; the same keys again compute nothing."""
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 8]
    command += ["--metrics", "fid", "--no_control", "--out", tmp_path]
    for keys in ([], ["flow.prediction=data"], [], ["flow.prediction=data"]):
        here(*command, *keys)
    plain, changed = results.read(tmp_path)
    assert plain["metrics"] != changed["metrics"]


def test_other_classes_give_no_labels(here, tmp_path, tiny_run):
    """A reference with as many classes of other names: classes are as frequent as in the training set, and none is compared."""
    data = datasets.build("digits", None, {})
    for label in range(10):
        write_folder(tmp_path / "named" / "zyxwvutsrq"[label], data.images[data.labels == label][: 4 + label])
    command = ["evaluate", "--weights", tiny_run, "--feature_extractor", "digits", "--sampling_steps", 1, "--n_samples", 12]
    command += ["--no_control", "--metrics", "fid", "--out", tmp_path / "out", f"data.root={tmp_path}"]
    here(*command, "--reference", tmp_path / "named")
    here(*command, "--reference", "digits")
    named, own = results.read(tmp_path / "out")
    assert named["identity"]["labels"] == own["identity"]["labels"]
