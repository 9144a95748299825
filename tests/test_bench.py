"""The benchmark as a user runs it, on the smallest there is."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(out, *flags):
    return subprocess.run([sys.executable, str(ROOT / "bench.py"), "--rounds", "2", "--device", "cpu", "--out", str(out), *flags],
                          capture_output=True, text=True, timeout=200, cwd=out)


def test_student_against_teacher(tmp_path):
    result = bench(tmp_path, "--size", "32x40", "--no-compile")
    assert result.returncode == 0, result.stderr
    assert "the shipped one" in result.stdout and "TFLOP/s" in result.stdout
    results = json.loads((tmp_path / "bench.json").read_text())
    student, teacher = results["rows"]
    assert (student["way"], teacher["way"]) == ("eager", "teacher") and student["frames"] == 16
    assert student["parameters"] < 0.6e6 < 2e6 < teacher["parameters"]
    for row in results["rows"]:
        assert row["fps"] == pytest.approx(row["frames"] / row["milliseconds"] * 1000) and row["milliseconds"] > 0
    assert student["of_matrix_rate"] > 0 and results["limits"]["copy_gb_per_s"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_features_against_a_whole_decode(tmp_path):
    result = bench(tmp_path, "--features", "--config", "tiny", "--size", "32x32")
    assert result.returncode == 0, result.stderr
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["way"] == "features mid up0" and 0 < row["of_decode"] < 1
    assert row["of_decode"] == pytest.approx(row["milliseconds"] / row["decode_milliseconds"])


def test_the_training_step_against_a_plain_one(tmp_path):
    pytest.importorskip("lpips")
    result = bench(tmp_path, "--train", "--config", "tiny", "--size", "32x32", "--no-compile")
    assert result.returncode == 0, result.stderr
    rows = {row["way"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert list(rows) == ["plain step", "ours step", "cached step"]
    assert rows["plain step"]["milliseconds"] > rows["ours step"]["milliseconds"]
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(1000 / row["milliseconds"])


def test_wrong_sizes_are_one_line(tmp_path):
    result = bench(tmp_path, "--size", "512")
    assert result.returncode == 2 and "HEIGHTxWIDTH" in result.stderr.splitlines()[-1]
