"""Mutated files: headers of snapshots, npz files of statistics, tables of results, metrics of runs.

Each case gives the numbers of the whole file or ends in one line that names it, exit code 2: no traceback, no silent number.
"""

import io
import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import CASES, Outcomes, attempt, attempt_and_read
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flow.sampling import images, locate, snapshot
from flow.training.logging import read_metrics

JSON_VALUES = [
    "3",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "[1]",
    "[1, 8]",
    "[8, 8, 8]",
    "[0, 8, 8]",
    "[1, 8, 1e3]",
    "NaN",
    "-1",
    "1e999",
]
JSON_VALUES += [
    "{",
    "9" * 30,
    "[" * 5000,
    '{"name": "vae"}',
    '{"name": 3, "source": 4, "digest": 5}',
    "\\u0000",
    "数字",
    "[1000000000000]",
]
YAML_VALUES = [
    "",
    "null",
    "-1",
    "0",
    "1",
    "1.5",
    "true",
    "nan",
    "10000000000",
    "9" * 400,
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "abc",
    "'",
    "*a",
]
YAML_VALUES += [
    "&a 1",
    "${seed}",
    "${oc.env:HOME}",
    "${oc.env:NOWHERE}",
    "!!python/name:os.system",
    '"\\0"',
    "/etc",
    "dit",
    "mlp",
    "vp",
]
YAML_VALUES += ["cosine", "noise", "data", "[[1]]", "???", "2026-01-01", "100000", "64", '"\\ud800"']


ODD_LINES = [b"3", b"null", b"[]", b"{}", b'"a"', b"[" * 5000, b"9" * 5000, b"\0", b"\xff\xfe", b"{]", b"true"]  # of JSON lines


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """With a bit flipped, cut off, emptied, longer, or a run of bytes replaced."""
    place = rng.randrange(len(whole))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << rng.randrange(8)
    noise = rng.randbytes(rng.randint(1, 16))
    return rng.choice(
        [bytes(flipped), bytes(flipped), whole[:place], b"", whole + noise, whole[:place] + noise + whole[place + len(noise) :]]
    )


def mutated_header(source: Path, path: Path, rng: random.Random) -> None:
    """A file whose header has another value, other characters or other bytes, with and without a digest that fits."""
    with safe_open(source, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(source)
    kind = rng.choice(["config value", "config value", "config value", "entry", "entry", "characters", "bytes", "weights"])
    if kind == "bytes":
        whole = source.read_bytes()
        if rng.random() < 0.7:  # a file of before there were digests
            whole = whole.replace(b'"digest"', b'"digesx"', 1)
        size = 8 + int.from_bytes(whole[:8], "little")
        path.write_bytes(damaged(whole[:size], rng) + whole[size:])
        return
    header.pop("digest")
    if kind == "config value":
        lines = header["config"].splitlines()
        k = rng.randrange(len(lines))
        lines[k] = f"{lines[k].partition(':')[0]}: {rng.choice(YAML_VALUES)}" if rng.random() < 0.9 else rng.choice(lines)
        header["config"] = "\n".join(lines)
    elif kind == "entry":
        name = rng.choice(["image_shape", "step", "images", "half_life_images", "codec", "codec", "config"])
        header[name] = rng.choice(JSON_VALUES)
        if rng.random() < 0.1:
            del header[name]
    elif kind == "characters":
        name = rng.choice(sorted(header))
        header[name] = damaged(header[name].encode(), rng).decode("utf-8", "replace")
    else:
        name = rng.choice(sorted(tensors))
        change = rng.choice(["nan", "inf", "drop", "shape", "kind", "name"])
        if change in ("nan", "inf"):
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = float(change)
        elif change == "shape":
            tensors[name] = tensors[name].flatten()[:-1].clone()
        elif change == "kind":
            tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.complex64, torch.bool]))
        else:
            value = tensors.pop(name)
            tensors |= {"other": value} if change == "name" else {}
    save_file(tensors, path, metadata=header)


def of_images(snap: snapshot.Snapshot) -> tuple:
    """What decides the images of a snapshot besides its weights."""
    return snap.config.model, snap.config.flow.path, snap.config.flow.prediction, snap.image_shape, snap.codec


def fuzz_headers(cases: int, seed: int, main_of, capsys, run: Path) -> Outcomes:
    """Silent would be: other images, though neither the network nor the path is another one; or numbers that are not finite."""
    outcomes, rng, source = Outcomes(), random.Random(seed), locate.find(run)
    ask = ["--n_samples", "2", "--sampling_steps", "1", "--bspp", "2", "--save_dir"]
    with tempfile.TemporaryDirectory() as scratch:
        path, out = Path(scratch) / "s.safetensors", Path(scratch) / "out"
        assert attempt(main_of, capsys, "sample", ["--weights", str(source), *ask, f"{scratch}/right"]) == "ran"
        right, known = (
            [images.read_png(Path(f"{scratch}/right/images/00000{k}.png")) for k in (0, 1)],
            of_images(snapshot.load(source)),
        )
        for _ in range(cases):
            shutil.rmtree(out, ignore_errors=True)
            mutated_header(source, path, rng)
            with outcomes.case(path.read_bytes()[:2000]):
                outcome = attempt(main_of, capsys, "sample", ["--weights", str(path), *ask, str(out)])
                if outcome == "ran":
                    snap = snapshot.load(path)
                    assert all(torch.isfinite(value).all() for value in snap.weights.values())
                    same = of_images(snap) == known
                    same = same and all(torch.equal(v, snap.weights[n]) for n, v in load_file(source).items())
                    pictures = [images.read_png(out / "images" / f"00000{k}.png") for k in (0, 1)]
                    assert not same or all(np.array_equal(a, b) for a, b in zip(pictures, right, strict=True))
                assert (outcome == "ran") == out.exists(), outcome
                outcomes["header: ran" if outcome == "ran" else "header: ended in one line"] += 1
    return outcomes


def mutated_npz(rng: random.Random, mu: np.ndarray, sigma: np.ndarray) -> bytes:
    """Statistics with a damaged file, or with arrays that are none."""
    file, arrays = io.BytesIO(), {"mu": mu.copy(), "sigma": sigma.copy()}
    name = rng.choice(["mu", "sigma"])
    kind = rng.choice(["bytes", "bytes", "bytes", "number", "kind", "shape", "lost", "more", "negative", "npy"])
    if kind == "number":
        arrays[name].flat[rng.randrange(arrays[name].size)] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == "kind":
        arrays[name] = rng.choice([arrays[name].astype(str), arrays[name].astype(object), arrays[name] * 1j, arrays[name] > 9])
    elif kind == "shape":
        arrays[name] = rng.choice([arrays[name][..., :-1], arrays[name][None], np.zeros(0), np.array(3.0)])
    elif kind == "lost":
        del arrays[name]
    elif kind == "more":
        arrays["other"] = np.array([np.nan])
    elif kind == "negative":
        arrays["sigma"] = -sigma
    rng.choice([np.savez, np.savez_compressed])(file, **arrays) if kind != "npy" else np.save(file, sigma)
    return damaged(file.getvalue(), rng) if kind == "bytes" else file.getvalue()


def scores(folder: Path) -> list[float]:
    """The distances in the table of a folder."""
    rows = (folder / "results.csv").read_text().splitlines()
    column = rows[0].split(",").index("FD-digits")
    return [float(row.split(",")[column]) for row in rows[1:]]


@pytest.fixture
def scored(here, tmp_path):
    """Arguments that score a folder of images against statistics; the mean and covariance of these."""
    rng = np.random.default_rng(0)
    for k in range(8):
        images.write_png(tmp_path / f"{k}.png", torch.from_numpy(rng.integers(256, size=(1, 8, 8), dtype=np.uint8)))
    mu, sigma = rng.normal(size=64), np.cov(rng.normal(size=(200, 64)).T)
    np.savez(tmp_path / "whole.npz", mu=mu, sigma=sigma)
    return ["--samples", str(tmp_path), "--feature_extractor", "digits", "--metrics", "fid"], mu, sigma


def fuzz_npz(cases: int, seed: int, main_of, capsys, scored, scratch: Path) -> Outcomes:
    """Silent would be another distance than that of the whole file."""
    outcomes, rng = Outcomes(), random.Random(seed)
    ask, mu, sigma = scored
    path, out = scratch / "reference.npz", scratch / "out"
    np.savez(path, mu=mu, sigma=sigma)
    assert attempt(main_of, capsys, "evaluate", [*ask, "--reference", str(path), "--out", str(out)]) == "ran"
    right = scores(out)
    for _ in range(cases):
        shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(mutated_npz(rng, mu, sigma))
        with outcomes.case(path.read_bytes()[:2000]):
            outcome = attempt(main_of, capsys, "evaluate", [*ask, "--reference", str(path), "--out", str(out)])
            assert outcome == "ran" or "reference.npz" in outcome, outcome
            assert outcome != "ran" or scores(out) == right, f"{scores(out)} in place of {right}"
            outcomes["npz: ran" if outcome == "ran" else "npz: ended in one line"] += 1
    return outcomes


def mutated_jsonl(line: str, rng: random.Random) -> tuple[bytes, bool]:
    """(a table of three rows, one of them damaged or beside an odd line; whether what is odd has to be named)."""
    row = json.loads(line)
    rows = [json.dumps({**row, "first": 100 * k, "weights": f"w{k}"}).encode() for k in range(3)]
    k = rng.randrange(3)
    kind = rng.choice(["cut", "value", "missing", "bytes", "glued", "blank", "type"])
    if kind == "cut":
        rows[k] = rows[k][: rng.randrange(1, len(rows[k]))]
    elif kind == "value":
        rows.insert(k, rng.choice(ODD_LINES))
    elif kind == "missing":
        rows[k] = json.dumps(
            {n: v for n, v in json.loads(rows[k]).items() if n != rng.choice(["metrics", "identity", "requested"])}
        ).encode()
    elif kind == "bytes":
        place = rng.randrange(len(rows[k]))
        rows[k] = rows[k][:place] + rng.choice([b"\xff", b"\xc3\x28", b"\0"]) + rows[k][place:]
    elif kind == "glued":
        rows[0] += rows.pop()
    elif kind == "type":
        rows[k] = json.dumps({**row, rng.choice(["metrics", "requested"]): rng.choice([3, None, "a", [1]])}).encode()
    else:
        rows.insert(k, rng.choice([b"", b"  "]))
    return b"\n".join(rows) + rng.choice([b"\n", b"\n", b""]), kind not in ("blank", "missing", "type")


def fuzz_jsonl(cases: int, seed: int, main_of, capsys, scored, scratch: Path) -> Outcomes:
    """Silent would be a distance that nobody measured, or a damaged line that nobody names."""
    outcomes, rng = Outcomes(), random.Random(seed)
    ask = [*scored[0], "--reference", str(scratch / "whole.npz"), "--out"]
    out = scratch / "out"
    assert attempt(main_of, capsys, "evaluate", [*ask, str(out)]) == "ran"
    right, line = scores(out), (out / "results.jsonl").read_text()
    for case in range(cases):
        shutil.rmtree(out, ignore_errors=True)
        out = scratch / f"out_{case}"  # a line that was named once in a process may not be named again
        out.mkdir()
        content, named = mutated_jsonl(line, rng)
        (out / "results.jsonl").write_bytes(content)
        with outcomes.case(content):
            outcome, printed = attempt_and_read(main_of, capsys, "evaluate", [*ask, str(out)])
            if outcome == "ran":
                assert set(scores(out)) == set(right), content
                lines = [text for text in printed.splitlines() if not text.startswith("in ")]  # that one lists the files
                assert not named or any("results.jsonl" in text for text in lines), content
            else:
                assert "results.jsonl" in outcome, outcome
            outcomes["jsonl: ran" if outcome == "ran" else "jsonl: ended in one line"] += 1
    return outcomes


METRICS = [{"step": step, "images": 32 * step, "loss": 0.5 + step, "images_per_second": 9.0} for step in (2, 4, 6)]


def mutated_metrics(rng: random.Random) -> tuple[bytes, list[dict], bool]:
    """(a damaged metrics.jsonl, the rows that are whole in it, whether another line has to be named)."""
    rows = [json.dumps(row).encode() for row in METRICS]
    k = rng.randrange(len(rows))
    whole = [row for i, row in enumerate(METRICS) if i != k]
    kind = rng.choice(["cut", "line", "step", "bytes", "glued", "blank"])
    if kind == "cut":
        rows[k] = rows[k][: rng.randrange(1, len(rows[k]))]
    elif kind == "line":
        rows.insert(k, rng.choice(ODD_LINES))
        whole = METRICS
    elif kind == "step":
        values = [None, "2", [2], {}, True, 2.5, 10**30]
        changed = {**METRICS[k], "step": rng.choice(values)} if rng.random() < 0.8 else {"loss": 1.0}
        rows[k] = json.dumps(changed).encode()
    elif kind == "bytes":
        place = rng.randrange(len(rows[k]) - 1) + 1
        rows[k] = rows[k][:place] + rng.choice([b"\xff", b"\xc3\x28", b"\0"]) + rows[k][place:]
    elif kind == "glued":
        rows[0] += rows.pop(1)
        whole = METRICS[2:]
    else:
        rows.insert(k, rng.choice([b"", b"  "]))
        whole = METRICS
    return b"\n".join(rows) + rng.choice([b"\n", b"\n", b""]), whole, kind != "blank"


def fuzz_metrics(cases: int, seed: int, main_of, capsys, scored, scratch: Path) -> Outcomes:
    """Silent would be a value that nobody logged, a lost row, or a damaged line that nobody names."""
    outcomes, rng = Outcomes(), random.Random(seed)
    for case in range(cases):
        run = scratch / f"run_{case}"
        run.mkdir()
        content, whole, named = mutated_metrics(rng)
        (run / "metrics.jsonl").write_bytes(content)
        with outcomes.case(content):
            assert read_metrics(run / "metrics.jsonl") == whole
            printed = capsys.readouterr().err
            assert ("metrics.jsonl, line " in printed) == named, printed
            outcome, printed = attempt_and_read(
                main_of, capsys, "plot_loss", ["--runs", str(run), "--out", str(run / "loss.png")]
            )
            assert outcome == "ran" and (run / "loss.png").is_file(), outcome
            assert ("metrics.jsonl, line " in printed) == named, printed
            outcomes["metrics: damage named" if named else "metrics: nothing to name"] += 1
    return outcomes


def check(outcomes: Outcomes, cases: int) -> None:
    assert outcomes.failures == []
    assert outcomes.total() == cases


def test_some_mutated_headers(main_of, capsys, tiny_run):
    outcomes = fuzz_headers(20, 1, main_of, capsys, tiny_run)
    check(outcomes, 20)
    assert len(outcomes) == 2  # some ran, some ended in one line


def test_some_mutated_statistics(main_of, capsys, scored, tmp_path):
    outcomes = fuzz_npz(8, 1, main_of, capsys, scored, tmp_path)
    check(outcomes, 8)
    assert len(outcomes) == 2


@pytest.mark.parametrize("fuzz", [fuzz_jsonl, fuzz_metrics])
def test_some_mutated_tables(main_of, capsys, scored, tmp_path, fuzz):
    check(fuzz(8, 1, main_of, capsys, scored, tmp_path), 8)


@pytest.mark.slow
def test_many_mutated_headers(main_of, capsys, tiny_run):
    outcomes = fuzz_headers(CASES // 2, 0, main_of, capsys, tiny_run)
    with capsys.disabled():
        print(f"\nfuzz: {outcomes}")
    check(outcomes, CASES // 2)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_npz, fuzz_jsonl, fuzz_metrics])
def test_many_mutated_tables_and_statistics(main_of, capsys, scored, tmp_path, fuzz):
    outcomes = fuzz(CASES // 4, 0, main_of, capsys, scored, tmp_path)
    with capsys.disabled():
        print(f"\nfuzz: {outcomes}")
    check(outcomes, CASES // 4)
