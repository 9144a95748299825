"""How rows of the paper's tables are told apart, compared and written; the runs themselves are train.py's."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "assets"))
import findings                          # noqa: E402
from teachers import load_teacher        # noqa: E402


def row(psnrs, paper):
    run = lambda psnr: {"psnr": psnr, "ssim": psnr / 100, "parameters": 490_000, "curve": {"1": psnr - 1, "2": psnr}}
    return {"paper": paper, "seeds": {str(seed): run(psnr) for seed, psnr in enumerate(psnrs)}}


def test_rows_that_come_to_one_run_share_it():
    same = {findings.identity(name) for name in ("table1-decoupled", "table2-full", "table7-pointwise", "figure5-with")}
    others = {findings.identity(name) for name in findings.ROWS}
    assert len(same) == 1 and len(others) > 27
    assert findings.identity("table5-k3") in same                   # the embedded student's own kernel


def test_what_cannot_be_aligned_is_said():
    teacher = load_teacher("tiny")
    assert all(findings.what_hinders(row, teacher) is None for row in findings.ROWS)
    blocks = {"mid": torch.zeros(1, 8, 2, 12, 12)}                  # no multiple of the student's 8x8
    teacher.features = lambda latents, names: blocks
    assert "no projection head" in findings.what_hinders("table6-mid", teacher)


@pytest.mark.parametrize("first, verdict", [((24.3, 24.2, 24.3), "agrees"), ((23.9, 23.8, 23.9), "DISAGREES"),
                                            ((24.5, 23.5, 24.1), "within the spread"), ((24.3,), "one pair")])
def test_rows_are_compared_seed_by_seed(first, verdict):
    rows = {"x-a": row(first, (28.0, None, None)), "x-b": row((24.1, 24.0, 24.1), (27.0, None, None)),
            "y-c": row((20.0, 20.0, 20.0), (27.0, None, None))}
    line = findings.against(rows, "x-a", "x-b")
    assert verdict in line and "paper +1.00 dB" in line
    assert "paper" not in findings.against(rows, "x-a", "y-c")          # tables of the paper differ in their runs


def test_how_much_sooner_a_row_is_where_another_ends():
    rows = {"a": row((24.0, 24.0), None), "b": row((23.5, 22.5), None)}     # curves that gain 1 dB from step 1 to 2
    assert findings.sooner(rows, "a", "b").startswith("; there 1.67 ± ")    # after 1.5 steps and after 0.98
    assert findings.sooner(rows, "b", "a") == "; never there"
    assert "+1.00 ± 0.71 dB of 2 pairs, 1.4 spreads: beyond the spread" in findings.against(rows, "a", "b")


def test_the_report_has_all_tables_and_the_paper_beside(tmp_path):
    rows = {name: row((24.0 + i / 10, 24.1 + i / 10), paper) for i, (name, paper) in enumerate(findings.ROWS.items())}
    found = {"command": "findings.py", "runs": "test", "rows": rows, "left_out": {"table6-up9": "no such"}}
    text = findings.report(found)
    assert all(name in text for name in findings.ROWS) and all(title in text for title in findings.TITLES.values())
    assert "| table1-interpolate | 0.490 | 24.75 ± 0.07 | 0.2475 ± 0.0007 | 27.4 | 0.8272 |" in text
    assert "Left out: table6-up9: no such." in text
    findings.picture(found, tmp_path / "findings.png")
    assert (tmp_path / "findings.png").stat().st_size > 10_000


def test_only_what_the_same_run_gave_is_kept(tmp_path):
    identities = {name: f"run of {name}" for name in findings.ROWS}
    found = {"command": "findings.py", "runs": "test", "steps": 400, "teacher_weights": "abc", "left_out": {},
             "rows": {name: row((24.0, 24.1), paper) | {"run": identities[name]}
                      for name, paper in findings.ROWS.items()}}
    assert findings.recorded(tmp_path / "findings.json", found, identities) == {}
    findings.write(found, tmp_path)
    kept = findings.recorded(tmp_path / "findings.json", found, identities)
    assert kept == {name: found["rows"][name]["seeds"] for name in findings.ROWS}
    kept = findings.recorded(tmp_path / "findings.json", found, identities | {"table5-k5": "another preset"})
    assert "table5-k5" not in kept and "table5-k3" in kept
    for changed in ({"teacher_weights": "others"}, {"steps": 30}, {"runs": "longer clips"}):
        assert findings.recorded(tmp_path / "findings.json", found | changed, identities) == {}


def test_a_run_is_told_by_its_arguments_and_by_what_the_student_begins_with(monkeypatch):
    before = findings.identity("table5-k5")
    assert before == findings.identity("table5-k5") != findings.identity("table5-k7")
    monkeypatch.setattr(findings.TurboVAED, "init_weights", lambda self: None)
    assert findings.identity("table5-k5") != before
