"""Evaluation: metrics that agree with their formula and with torchmetrics, and commands that leave what they promise."""
import json
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import evaluate
from evaluate import psnr, ssim
from model import CONFIGS, TurboVAED

SCRIPT = Path(evaluate.__file__)


@pytest.fixture
def clips():
    """Two pairs of clips of three frames: noise, and the same with more noise, different in each frame."""
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 3, 24, 32, generator=g) * 2 - 1
    noise = torch.rand(a.shape, generator=g) - 0.5
    return a, (a + noise * torch.tensor([0.1, 0.5, 1.0]).view(1, 1, 3, 1, 1)).clamp(-1, 1)


def unit(video):
    return (video + 1) / 2


@pytest.mark.parametrize("d", [0.01, 0.1, 1.0])
def test_psnr_of_a_constant_offset_is_the_closed_form(d):
    a = torch.full((2, 3, 4, 8, 8), -0.5)
    assert torch.allclose(psnr(a, a + d), torch.full((2,), 20 * math.log10(2 / d)), atol=1e-3)


def test_psnr_is_the_mean_of_torchmetrics_over_frames(clips):
    a, b = clips
    want = [[peak_signal_noise_ratio(unit(b[i, :, t]), unit(a[i, :, t]), data_range=1.0) for t in range(3)]
            for i in range(2)]
    assert torch.allclose(psnr(a, b), torch.tensor(want).mean(1), atol=1e-4)


def test_psnr_of_equal_clips_is_infinite_and_symmetric_otherwise(clips):
    a, b = clips
    assert psnr(a, a).isinf().all() and torch.allclose(psnr(a, b), psnr(b, a))


def test_ssim_is_the_mean_of_torchmetrics_over_frames(clips):
    a, b = clips
    want = [[structural_similarity_index_measure(unit(a[i, :, t])[None], unit(b[i, :, t])[None], data_range=1.0)
             for t in range(3)] for i in range(2)]
    assert torch.allclose(ssim(a, b), torch.tensor(want).mean(1), atol=1e-5)
    assert torch.allclose(ssim(a, a), torch.ones(2))
    assert ssim(a[:1], b[:1]).shape == (1,) and ssim(a[:1, :, :1], b[:1, :, :1]).shape == (1,)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_leaves_the_range_is_clamped(metric, clips):
    a, b = clips
    assert torch.equal(metric(a * 3, b), metric((a * 3).clamp(-1, 1), b))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_of_different_shapes_are_refused(metric, clips):
    with pytest.raises(ValueError, match="cannot compare"):
        metric(clips[0], clips[1][:, :, :1])        # would broadcast, silently


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    return TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "out" / "demo", {"teacher": "tiny"})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs main() in an empty folder; returns results.json."""
    monkeypatch.chdir(tmp_path)
    # the machine's speed is not what is tested
    monkeypatch.setattr(evaluate, "ROUNDS", 1)

    def run(*args, out="out/demo"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, args)])
        evaluate.main()
        return json.loads((tmp_path / out / "results.json").read_text())
    return run


def test_a_run_on_made_up_video(student, run, tmp_path, capsys):
    other = TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "other.safetensors")
    results = run("--student", student, other, "--clips", 2, "--size", 64)
    rows = results["rows"]
    assert [r["model"] for r in rows] == ["tiny (teacher)", "out/demo", "other.safetensors"]
    assert all(math.isfinite(v) for r in rows for k, v in r.items() if k != "model")
    assert rows[0]["psnr_kept"] == 100 and rows[0]["speed_up"] == 1 and rows[0]["psnr"] > rows[1]["psnr"]
    assert rows[1]["parameters"] == sum(p.numel() for p in TurboVAED(CONFIGS["tiny"]).parameters())
    for i, row in enumerate(rows):
        values = [clip[row["model"]]["psnr"] for clip in results["per_clip"]]
        assert len(values) == 2 and row["psnr"] == pytest.approx(sum(values) / 2)
    assert (tmp_path / "out/demo/compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in student.parent.iterdir()) == ["compare.png", "results.json", "student.safetensors"]
    lines = capsys.readouterr().out.splitlines()
    assert "2 clips of 8x64x64" in lines[-3] and lines[-2:] == ["out/demo/compare.png", "out/demo/results.json"]


def test_quality_does_not_depend_on_the_run(student, run):
    first, again = (run("--clips", 1, "--size", 64) for _ in range(2))       # finds the student under out/
    assert first["per_clip"] == again["per_clip"] and first["rows"][1]["model"] == "out/demo"


def test_a_broken_video_is_skipped_by_name(student, run, tmp_path, capsys):
    images = [np.roll(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8), k, 1) for k in range(12)]
    (tmp_path / "videos").mkdir()
    for name in ("good.mp4", "broken.mp4"):
        with av.open(str(tmp_path / "videos" / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    broken = tmp_path / "videos" / "broken.mp4"
    content = bytearray(broken.read_bytes())
    content[len(content) // 50:len(content) * 9 // 10] = bytes(len(content) * 9 // 10 - len(content) // 50)
    broken.write_bytes(content)                     # the header is whole, the frames are not
    (tmp_path / "videos" / "empty.mp4").touch()
    results = run("--data", "videos", "--size", 64)
    assert results["clips"] == 1 and results["per_clip"][0]["clip"] == "good.mp4"
    assert sorted(results["skipped"]) == ["broken.mp4", "empty.mp4"]
    printed = capsys.readouterr()
    assert "2 clips skipped" in printed.out
    assert "skipping broken.mp4: " in printed.err and "skipping empty.mp4: " in printed.err


def test_wrong_input_gets_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--student", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: nowhere: no such file or folder\n"


@pytest.mark.parametrize("args, message", [
    (["--data", "davis"], "put the video files into the folder data/davis"),
    (["--frames", "9"], "frames = 9"),
    (["--teacher", "dc", "--teacher-weights", "nowhere"], "no teacher weights"),
    (["--clips", "0"], "--clips must be at least 1"),
])
def test_wrong_arguments_say_what_would_be_right(student, run, args, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(*args)
    assert "\n" not in str(error.value)


def test_a_student_of_other_latents_is_refused(student, run):
    other = TurboVAED(CONFIGS["hunyuan"]).save_pretrained(student.parent.parent / "hunyuan")
    with pytest.raises(ValueError, match="out/hunyuan decodes .* not the latents of the tiny teacher"):
        run("--student", student, other)


@pytest.mark.skipif(not evaluate.SHIPPED.is_file(), reason="no student is shipped yet")
def test_without_a_run_the_shipped_student_is_evaluated(run, capsys):
    results = run("--clips", 1, "--size", 64, out="out/evaluate")
    assert "no student in out/: evaluating the shipped one" in capsys.readouterr().out.splitlines()[0]
    assert results["rows"][1]["model"].endswith("assets/tiny_student.safetensors")
