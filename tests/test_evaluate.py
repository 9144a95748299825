"""Evaluation: metrics that agree with other implementations, and commands that leave what they promise."""
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import peak_signal_noise_ratio

import data
import evaluate
from conftest import run_script
from data import VideoClips
from evaluate import frechet_distance, psnr, ssim, temporal_error
from model import CONFIGS, SHIPPED, TurboVAED, weights_hash
from teachers import TINY_WEIGHTS

SCRIPT = Path(evaluate.__file__)


@pytest.fixture
def clips():
    """Two pairs of clips of three frames: noise, and the same with more noise, different in each frame."""
    g = torch.Generator().manual_seed(0)
    a, noise = torch.rand(2, 3, 3, 24, 32, generator=g) * 2 - 1, torch.rand(2, 3, 3, 24, 32, generator=g) - 0.5
    return a, (a + noise * torch.tensor([0.1, 0.5, 1.0]).view(1, 1, 3, 1, 1)).clamp(-1, 1)


unit = lambda video: (video + 1) / 2


def script(folder, *arguments, launcher=(SCRIPT,)):
    """evaluate.py in a process of its own, in that folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.run([sys.executable, *launcher, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          env=environment, timeout=300)


TWO = "-m", "torch.distributed.run", "--nproc_per_node=2"


def test_psnr_is_the_mean_of_torchmetrics_over_frames(clips):
    want = [[peak_signal_noise_ratio(unit(b[:, t]), unit(a[:, t]), data_range=1.0) for t in range(3)]
            for a, b in zip(*clips)]
    assert torch.allclose(psnr(*clips), torch.tensor(want).mean(1), atol=1e-4)


def test_ssim_is_the_formula(clips):
    """Wang et al. 2004 with SciPy's Gaussian filter."""
    from scipy.ndimage import gaussian_filter
    blur = lambda image: gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    def reference(x, y):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
        c1, c2 = 0.01 ** 2, 0.03 ** 2
        return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean()
    x, y = (unit(v).double().numpy() for v in clips)
    want = np.array([[[reference(x[i, c, t], y[i, c, t]) for c in range(3)] for t in range(3)] for i in range(2)])
    assert ssim(*clips).tolist() == pytest.approx(want.mean((1, 2)), abs=1e-5)


def test_temporal_error_sees_flicker_and_not_colour(clips):
    a = clips[0] * 0.5
    assert torch.allclose(temporal_error(a, a + 0.1), torch.zeros(2), atol=1e-4)
    flicker = torch.tensor([0.0, 0.2, 0.0]).view(1, 1, 3, 1, 1)       # 0.1 of [0, 1] up, then down
    assert torch.allclose(temporal_error(a, a + flicker), torch.full((2,), 25.5), atol=1e-3)
    assert temporal_error(a[:, :, :1], a[:, :, :1]).isnan().all()


# ----------------------------------------------------------------------------------------------------------
# the Fréchet distance

def with_covariance(mean, root, n, generator):
    """n rows whose sample mean and covariance (n - 1) are exactly `mean` and rootᵀ root; n > len(mean)."""
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(n - 1) @ root + mean


@pytest.mark.parametrize("d, n, m", [(1, 50, 70), (3, 50, 70), (20, 50, 70), (5, 6, 9), (5, 6, 500), (5, 300, 450)])
def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form(d, n, m):
    """Also of fewer clips than dimensions: features that live in a d-dimensional plane of 400."""
    g = torch.Generator().manual_seed(0)
    mean_a, mean_b, std_a, std_b = torch.rand(4, d, generator=g, dtype=torch.float64)
    a, b = with_covariance(mean_a, std_a.diag(), n, g), with_covariance(mean_b, std_b.diag(), m, g)
    want = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    plane, other = torch.linalg.qr(torch.randn(400, 2 * d, generator=g, dtype=torch.float64)).Q.T.split(d)
    for x, y in ((a, b), (b, a), (a @ plane, b @ plane)):
        assert frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(d / 4, rel=1e-9)
    # two sets in planes at right angles: nothing of one helps to explain the other
    apart = mean_a.square().sum() + mean_b.square().sum() + std_a.square().sum() + std_b.square().sum()
    assert frechet_distance(a @ plane, b @ other) == pytest.approx(apart.item(), rel=1e-9)


def test_a_frechet_distance_of_nothing_is_refused():
    for a in (torch.zeros(1, 4), torch.full((5, 4), math.nan)):
        with pytest.raises(ValueError, match="two or more rows, all finite"):
            frechet_distance(a, torch.zeros(5, 4))


@pytest.mark.parametrize("metric", [psnr, ssim, temporal_error])
def test_values_are_clamped_and_clips_of_different_shapes_refused(metric, clips):
    a, b = clips
    assert torch.equal(metric(a * 3, b), metric((a * 3).clamp(-1, 1), b))
    with pytest.raises(ValueError, match="cannot compare"):
        metric(a, b[:, :, :1])          # would broadcast, silently


# ----------------------------------------------------------------------------------------------------------
# networks that measure

class Detector(torch.nn.Module):
    """A small one with the signature of i3d_torchscript.pt: features of (B, 3, T, H, W), T of 8 or more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = torch.nn.Conv3d(3, 8, (8, 7, 7), stride=(4, 4, 4)), torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True,
                return_features: bool = False) -> torch.Tensor:
        if resize:
            x = torch.nn.functional.interpolate(x, size=[x.shape[2], 56, 56], mode="trilinear", align_corners=False)
        if rescale:
            x = x / 127.5 - 1.0
        features = self.head(torch.tanh(self.conv(x)).mean([2, 3, 4]))
        return features if return_features else features.softmax(1)


@pytest.fixture
def i3d(tmp_path, monkeypatch):
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    monkeypatch.setattr(evaluate, "I3D_SHA256", hashlib.sha256((tmp_path / "i3d.pt").read_bytes()).hexdigest())
    return tmp_path / "i3d.pt"


def test_the_detector_gets_pixels_in_its_own_range(i3d, clips):
    video = torch.rand(2, 3, 9, 24, 32, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    want = torch.jit.load(str(i3d))(video.clamp(-1, 1), rescale=False, resize=True, return_features=True)
    assert torch.allclose(evaluate.load_i3d(i3d, "cpu")(video), want, atol=1e-5)


def test_networks_that_cannot_be_had_are_named_with_what_helps(tmp_path, i3d):
    torch.jit.script(Detector().half()).save(str(tmp_path / "half.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    for name, reason in (("half", "it is another file"), ("text", "it is another file"), ("none", "No such file")):
        file = str(tmp_path / f"{name}.pt")
        args = SimpleNamespace(metrics=["psnr", "lpips", "fvd"], lpips_weights=file, i3d=file, device="cpu")
        metrics, without = evaluate.load_metrics(args)
        assert list(metrics) == ["psnr"] and reason in without["fvd"] and "\n" not in "".join(without.values())
        assert "i3d_torchscript.pt with --i3d" in without["fvd"] and " with --lpips-weights" in without["lpips"]


def test_lpips_is_the_packages(tmp_path):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for part in net.net.children():
        for number, layer in part.named_children():
            layer.load_state_dict(alexnet.features[int(number)].state_dict())
    a, b = torch.rand(2, 2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        want = torch.stack([net(a[:, :, t], b[:, :, t]).flatten() for t in range(3)]).mean(0)
        assert torch.allclose(evaluate.load_lpips(tmp_path / "alexnet.pth", "cpu")(a, b), want, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# the command

@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    return TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "out" / "demo", {"teacher": "tiny"})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs main() in an empty folder; returns results.json, if there is one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "ROUNDS", 1)          # the machine's speed is not what is tested
    def run(*args):
        short = ["--frames", "8"] * (not {"--frames", "--latents", "--decode", "--reconstruct"} & set(args))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *short, *map(str, args)])
        evaluate.main()
        newest = max(tmp_path.rglob("results.json"), key=lambda file: file.stat().st_mtime_ns, default=None)
        return newest and json.loads(newest.read_text())
    return run


def test_a_run_on_made_up_video(student, run, tmp_path, capsys):
    other = TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "other.safetensors")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    results = run("--student", student, other, "--clips", 2, "--size", 64)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    rows = results["rows"]
    assert [r["model"] for r in rows] == ["tiny (teacher)", "out/demo", "other.safetensors"]
    assert all(math.isfinite(r[k]) for r in rows for k in ("psnr", "ssim", "temporal", "psnr_kept", "fps", "speed_up"))
    assert rows[0]["psnr_kept"] == 100 and rows[0]["speed_up"] == 1 and rows[0]["psnr"] > rows[1]["psnr"]
    assert rows[1]["parameters"] == sum(p.numel() for p in TurboVAED(CONFIGS["tiny"]).parameters())
    for row in rows:
        assert row["psnr"] == pytest.approx(sum(clip[row["model"]]["psnr"] for clip in results["per_clip"]) / 2)
    assert (tmp_path / "out/demo/compare.png").read_bytes().startswith(b"\x89PNG")
    written = ["compare.mp4", "compare.png", "results.json", "results.md"]
    assert sorted(f.name for f in student.parent.iterdir()) == sorted([*written, "student.safetensors"])
    assert len(film(student.parent / "compare.mp4")) == 48          # four seconds
    lines = capsys.readouterr().out.splitlines()
    assert "2 clips of 8x64x64" in lines[-5] and sorted(lines[-4:]) == [f"out/demo/{name}" for name in written]
    rows = (student.parent / "results.md").read_text().splitlines()
    assert rows[0] == "| model | decoder (M) | PSNR (dB) | SSIM | temporal error | PSNR kept | decode FPS | speed-up |"
    assert rows[3].startswith(f"| out/demo | 0.58 | {results['rows'][1]['psnr']:.2f} |")
    assert "2 clips of 8x64x64" in rows[-1]             # what the terminal says, warnings too


def test_against_the_teacher(student, run):
    rows = run("--clips", 2, "--size", 64, "--against", "teacher")["rows"]
    assert rows[0]["psnr"] is None and rows[0]["ssim"] is None and rows[1]["psnr_kept"] is None
    teacher, clips = evaluate.load_teacher("tiny"), evaluate.SyntheticClips(8, 64, seed=evaluate.HELD_OUT_SEED)
    with torch.no_grad():
        latents = teacher.encode(torch.stack([clips[0], clips[8]]))
        want = psnr(TurboVAED.from_pretrained(student)(latents), teacher.decode(latents)).mean().item()
    assert rows[1]["psnr"] == pytest.approx(want, abs=1e-4)


def test_students_in_half_precision_take_a_teacher_that_keeps_its_own(student, run, tmp_path, monkeypatch):
    """As h3's, whose encoder stays in float32."""
    load = evaluate.load_teacher
    monkeypatch.setattr(evaluate, "load_teacher", lambda name, weights, device, dtype: load(name, weights, device))
    half = "--dtype", "bfloat16"
    assert run("--clips", 1, "--size", 64, "--metrics", "psnr", *half)["rows"][1]["psnr"] > 0
    run("--reconstruct", write_video(tmp_path / "in.mp4", texture(9)), "out.mp4", *half)
    assert len(film(tmp_path / "out.mp4")) == 9


def texture(n, height=64, width=96, seed=0):
    """n frames of moving noise over a gradient."""
    base = (np.random.default_rng(seed).integers(0, 100, (height, width, 3))
            + np.linspace(0, 150, width).astype(int)[:, None])
    return [np.roll(base, 3 * k, 1).astype(np.uint8) for k in range(n)]


def write_video(path, images, rate=25, stamps=None, pixels="yuv420p", turn=0, sound=None, sound_rate=16000,
                codec="libx264", options={"crf": "10"}, look=(2, 2, 2), **muxer):
    """A video with one image or frame at each time stamp (in 1/rate seconds), tagged (matrix, primaries, transfer);
    sound: a codec, for a tone as long as it."""
    frames = [image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(
        np.ascontiguousarray(image), format="rgb24") for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pixels
        stream.colorspace, stream.color_primaries, stream.color_trc = look
        if turn:
            stream.set_display_rotation(turn)
        tone = container.add_stream(sound, rate=sound_rate) if sound else None
        for n, frame in enumerate(frames):
            frame.pts, frame.time_base = stamps[n] if stamps else n, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if tone:
            wave = (8000 * np.sin(np.arange(sound_rate * len(images) // rate) / 8)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            samples.sample_rate, samples.pts = sound_rate, 0
            container.mux(tone.encode(samples))
            container.mux(tone.encode())
    return path


def harm(file, start, end, byte):
    """Fills the file's bytes from start to end, in hundredths of its length, with one byte."""
    content = file.read_bytes()
    a, b = len(content) * start // 100, len(content) * end // 100
    file.write_bytes(content[:a] + byte * (b - a) + content[b:])


@pytest.fixture
def videos(tmp_path):
    """A folder of what a user's folder holds: seven videos and folders of frames that are fine, five that are not."""
    from PIL import Image
    folder = tmp_path / "videos"
    write_video(folder / "plain.mp4", texture(12))
    write_video(folder / "odd.mp4", texture(12, 65, 91, seed=1), pixels="yuv444p")
    write_video(folder / "uneven.mp4", texture(12, seed=2), stamps=[0, 1, 2, 6, 7, 8, 15, 16, 17, 18, 30, 31])
    write_video(folder / "ten_bits.mp4", texture(12, seed=3), pixels="yuv420p10le")
    write_video(folder / "turned.mp4", texture(12, seed=4), turn=90)
    for name, count in (("frames", 9), ("few_frames", 3)):
        (folder / name).mkdir()
        for n, image in enumerate(texture(count, seed=5)):
            Image.fromarray(image).save(folder / name / f"frame {n}.png")
    write_video(folder / "short.mp4", texture(5))
    write_video(folder / "single.mp4", texture(1))
    harm(write_video(folder / "corrupt.mp4", texture(12)), 2, 90, b"\0")       # the header is whole, the frames are not
    (folder / "empty.mp4").touch()
    return folder


def real_clips(videos, size):
    """Those of `videos` that can be evaluated, (B, 3, 8, H, W)."""
    clips = VideoClips(videos, 8, size, train=False)
    return torch.stack([clips[i] for i, name in enumerate(clips.files) if name != "corrupt.mp4"])


def test_clips_that_the_student_was_trained_on_are_said(run, tmp_path, capsys, monkeypatch):
    """Wherever a path leads to them; a run's held-out videos are not meant, nor others of the same names."""
    for n in range(3):
        write_video(tmp_path / f"mine/sub/{n}.mp4", texture(12, seed=n))
    save_file({key: value + 1e-3 for key, value in load_file(TINY_WEIGHTS).items()}, tmp_path / "teacher.safetensors")
    trained = run_script("train", *("--data mine --size 16 --frames 8 --batch 1 --micro-batch 1 --steps 1 --workers 0 "
                                    "--dtype float32 --out out/demo --teacher-weights teacher.safetensors").split(),
                         cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    shutil.copytree(tmp_path / "mine", tmp_path / "others")
    (tmp_path / "link").symlink_to("mine")
    flags = "--student", "out/demo", "--size", 16, "--metrics", "psnr", "--data"
    for data, count in (("mine", 2), ("mine/sub", 2), ("link", 2), (tmp_path / "mine/sub/1.mp4", 1), ("others", 0),
                        ("mine/sub/0.mp4", 0)):
        run(*flags, data, "--out", f"results/{Path(data).name}{count}")
        line = f"out/demo was trained on {count} of these clips: it is worse on others"
        said = (tmp_path / f"results/{Path(data).name}{count}/results.md").read_text()
        assert (line in capsys.readouterr().out) == (line in said) == (count > 0), data
    # the teacher is the one that it was trained with
    for other, weights in ((["tiny"], "teacher.safetensors"), (["tiny", "--teacher-weights", TINY_WEIGHTS], None)):
        results = run(*flags, "others", "--out", f"results/{weights}", "--teacher", *other)
        assert results["teacher_sha256"] == weights_hash(evaluate.load_teacher("tiny", weights).vae)
    about = json.loads(Path("out/demo/args.json").read_text())
    Path("out/demo/args.json").write_text(json.dumps(about | {"teacher": "cog"}))
    assert run(*flags, "others", "--out", "results/None")       # what another teacher's weights were matters not
    monkeypatch.setattr(evaluate, "measure", None)          # damage is said before anything is measured
    for damaged in ("results/mine2/results.json", "out/demo/args.json"):
        (tmp_path / damaged).write_text("{")
        with pytest.raises(ValueError, match=f"{damaged}: Expecting property name"):
            run(*flags, "mine", "--out", "results/mine2" if "results" in damaged else "new")


def test_a_student_may_have_any_name_that_a_file_can_have(student, run, tmp_path, capsys):
    """The longest, and one that would break a table."""
    for name in ("s" * 243, "\u00e9" * 121, "a|b\nc"):
        student, shown = student.rename(tmp_path / f"{name}.safetensors"), name.replace("|", "/").replace("\n", " ")
        rows = run("--student", student, "--clips", 1, "--size", 64, "--metrics", "psnr", "--out", "x")["rows"]
        assert rows[1]["model"] == student.name
        lines, markdown = capsys.readouterr().out.splitlines(), (tmp_path / "x/results.md").read_text().splitlines()
        assert lines[3].startswith(f"{shown}.safetensors  ") and lines[4].startswith("synthetic: 1 clips")
        assert markdown[3].startswith(f"| {shown}.safetensors | 0.58 |") and markdown[3].count("|") == 7
        shutil.rmtree(tmp_path / "x")


def test_every_video_is_evaluated_or_skipped_by_name_and_what_has_no_weights_is_said(student, run, videos, capsys):
    results = run("--data", "videos", "--size", 64, "--lpips-weights", "none.pth", "--i3d", "none.pt")
    assert [clip["clip"] for clip in results["per_clip"]] == [
        "frames", "odd.mp4", "plain.mp4", "ten_bits.mp4", "turned.mp4", "uneven.mp4"]
    assert sorted(results["skipped"]) == ["corrupt.mp4", "empty.mp4", "few_frames", "short.mp4", "single.mp4"]
    assert all(math.isfinite(v) for clip in results["per_clip"] for v in clip["out/demo"].values())
    printed = capsys.readouterr()
    assert "6 clips of 8x64x64" in printed.out and "5 clips skipped" in printed.out
    assert all(f"skipping {name}: " in printed.err for name in results["skipped"])
    assert results["rows"][1]["lpips"] is None
    assert "LPIPS: no weights (" in printed.out and "rFVD: no weights (" in printed.out


def test_the_same_numbers_by_any_batch_and_number_of_processes(student, run, videos, i3d, tmp_path, capsys):
    flags = ["--data", "videos", "--size", "64x48", "--frames", "8",
             "--metrics", "psnr", "ssim", "temporal", "fvd", "--i3d", i3d]
    one = run(*flags)
    assert one["without"] == {} and one["weights"]["out/demo"] == weights_hash(TurboVAED.from_pretrained(student))
    assert "rFVD: 6 clips are too few to mean much: I3D has 6 features" in capsys.readouterr().out
    detect, teacher = evaluate.load_i3d(i3d, "cpu"), evaluate.load_teacher("tiny")
    good = real_clips(videos, (64, 48))
    with torch.inference_mode():            # rFVD is the distance of the detector's features
        want = frechet_distance(detect(teacher.decode(teacher.encode(good))), detect(good))
    assert one["rows"][0]["fvd"] == pytest.approx(want, rel=1e-4)
    three = run(*flags, "--batch", 4, "--workers", 1)
    (tmp_path / "two.py").write_text(
        f"import evaluate\nevaluate.I3D_SHA256 = {evaluate.I3D_SHA256!r}\nevaluate.main()\n")
    shared = script(tmp_path, "--device", "cpu", "--out", "shared", *flags, launcher=(*TWO, "two.py"))
    assert shared.returncode == 0, shared.stderr
    shared = json.loads((tmp_path / "shared" / "results.json").read_text())
    assert len(shared["per_clip"]) == 6 and sorted(shared["skipped"]) == sorted(one["skipped"])
    for other in (three, shared):
        assert other["weights"] == one["weights"]
        assert [clip["sha256"] for clip in other["per_clip"]] == [clip["sha256"] for clip in one["per_clip"]]
        for a, b in zip(one["rows"], other["rows"]):
            for metric in ("psnr", "ssim", "temporal", "fvd"):
                assert a[metric] == pytest.approx(b[metric], rel=1e-6, abs=1e-6), metric
    assert one["rows"][1]["fvd"] > 0
    (videos / "plain.mp4").write_bytes((videos / "odd.mp4").read_bytes())      # another under the same name
    for a, b in zip(one["per_clip"], run(*flags)["per_clip"]):
        assert (a["sha256"] == b["sha256"]) == (a["clip"] != "plain.mp4")


def test_a_student_or_teacher_that_broke_is_named_and_leaves_nothing(student, run, tmp_path):
    model = TurboVAED(CONFIGS["tiny"])
    model.conv_out.conv.weight.data.fill_(3e38)         # finite weights, infinite values
    overflowing = model.save_pretrained(tmp_path / "broken.safetensors", {"teacher": "tiny"})
    with pytest.raises(ValueError, match="none of the clips .*: broken.safetensors gave values that are not finite"):
        run("--student", student, overflowing, "--clips", 2, "--size", 64, "--metrics", "psnr")
    write_video(tmp_path / "in.mp4", texture(9))
    with pytest.raises(ValueError, match="in.mp4 to out.mp4: .* not finite"):
        run("--student", overflowing, "--reconstruct", "in.mp4", "out.mp4")
    teacher = evaluate.load_teacher("tiny", dtype=torch.float16)
    teacher.vae.encoder.project_out["main"].op_list[0].conv.weight.mul_(1e6)
    with pytest.raises(ValueError, match="the tiny teacher's latents in torch.float16 are not finite"):
        evaluate.reconstruct(teacher, TurboVAED(CONFIGS["tiny"]).half(), "in.mp4", "out.mp4", 8)
    assert not list(tmp_path.glob("*out.*"))


def test_one_bad_clip_is_named_and_costs_no_other(student, run, videos, i3d, monkeypatch, capsys):
    flags = ["--data", "videos", "--size", 64, "--metrics", "psnr", "fvd", "--i3d", i3d]
    good, forward, calls = run(*flags), TurboVAED.forward, []

    def third_breaks(self, latents, *args, **kwargs):
        calls.append(1)
        return forward(self, latents, *args, **kwargs) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(TurboVAED, "forward", third_breaks)
    capsys.readouterr()
    results, rest = run(*flags), [clip for clip in good["per_clip"] if clip["clip"] != "plain.mp4"]
    assert results["per_clip"] == rest and results["skipped"].keys() - good["skipped"].keys() == {"plain.mp4"}
    assert results["rows"][1]["psnr"] == pytest.approx(sum(clip["out/demo"]["psnr"] for clip in rest) / 5)
    assert "skipping plain.mp4: out/demo gave values that are not finite" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# whole videos

@pytest.mark.parametrize("shape, stamps, sound, suffix", [
    ((48, 64), None, "aac", ".mp4"),
    ((51, 67), [0, 1, 2, 6, 7, 8, 15, 16, 17, 18, 30, 31, 32, 33, 34, 40, 41, 42, 43], None, ".mp4"),
    ((48, 64), None, "adpcm_ima_wav", ".avi"),          # a codec that .mp4 does not hold
    ((48, 64), None, "pcm_s16le", ".mkv")])             # one that FFmpeg only claims it to hold
def test_a_video_keeps_frames_time_and_the_sound_that_its_kind_takes(
        student, run, tmp_path, capfd, shape, stamps, sound, suffix):
    source = write_video(tmp_path / f"in{suffix}", texture(19, *shape), stamps=stamps, sound=sound,
                         pixels="yuv444p" if shape[0] % 2 else "yuv420p")
    run("--reconstruct", source.name, "out.mp4")

    def sound_of(path):
        with av.open(str(path)) as video:
            return [bytes(packet) for packet in video.demux(audio=0) if packet.size] if video.streams.audio else []
    # .avi has no time stamps
    want = times(source) if suffix != ".avi" else [n / 25 for n in range(19)]
    assert times(tmp_path / "out.mp4") == pytest.approx(want, abs=2e-3)
    assert {(frame.height, frame.width) for frame, _ in film(tmp_path / "out.mp4")} == {shape}
    assert sound_of(tmp_path / "out.mp4") == (sound_of(source) if sound == "aac" else [])      # not encoded again
    said = f"{source.name} to out.mp4: not kept: audio {sound}\n" if sound not in (None, "aac") else ""
    assert capfd.readouterr().err == said and not list(tmp_path.glob(".out*"))


def test_what_a_film_does_not_keep_is_said_and_channels_are(tmp_path, capfd):
    """A tone in each of six channels is where it was."""
    tones = np.stack([8000 * np.sin(np.arange(16000) * (n + 1) / 40) for n in range(6)], 1).astype(np.int16)
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        video, sound, other = out.add_stream("ffv1"), out.add_stream("pcm_s16le", 16000), out.add_stream("mpeg4")
        sound.layout = "5.1"
        for stream, pixels in ((video, "yuva420p"), (other, "yuv420p")):
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for stream in (video, other):
            for image in texture(9, 48, 64):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
        samples = av.AudioFrame.from_ndarray(tones.reshape(1, -1), format="s16", layout="5.1")
        samples.sample_rate = 16000
        out.mux(sound.encode(samples))
    same(tmp_path / "in.mkv", tmp_path / "out.mkv")
    assert capfd.readouterr().err.endswith("out.mkv: not kept: video mpeg4, yuva420p (but yuv420p)\n")
    with av.open(str(tmp_path / "out.mkv")) as film:
        got = np.concatenate([frame.to_ndarray() for frame in film.decode(audio=0)], 1).reshape(-1, 6)
    assert np.array_equal(got, tones)


def test_recordings_that_were_joined_follow_each_other_in_the_size_of_the_first(tmp_path):
    parts = [write_video(tmp_path / f"{n}.ts", texture(25, *size), sound="mp2") for n, size in enumerate(
        ((64, 96), (96, 128)))]
    (tmp_path / "in.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    same(tmp_path / "in.ts", tmp_path / "out.mkv")
    assert [(frame.height, frame.width) for frame, _ in film(tmp_path / "out.mkv")] == [(64, 96)] * 50
    for kind in ("video", "audio"):
        with av.open(str(parts[0])) as one, av.open(str(tmp_path / "out.mkv")) as both:
            n = sum(1 for packet in one.demux(**{kind: 0}) if packet.size)
            stamps = [float(packet.pts * packet.time_base) for packet in both.demux(**{kind: 0}) if packet.size]
        assert len(stamps) == 2 * n and min(np.diff(sorted(stamps))) > 0 and 1.8 < max(stamps) - min(stamps) < 2.2


def test_chroma_stands_where_players_take_it_to_be():
    """An edge of colour, measured on the planes: 4:2:0 is sited at the left column, between two rows."""
    ramp = np.linspace(0, 255, 64)
    for axis, site in ((1, 0), (0, 0.5)):
        image = np.zeros((64, 64, 3), np.uint8)
        image[..., 2] = ramp[None] if axis else ramp[:, None]
        stream = evaluate.add_h264(av.open(io.BytesIO(), "w", format="mp4"), 25, 64, 64)
        frame = evaluate.to_frame(image, stream)
        blue = np.asarray(frame.planes[1]).reshape(32, -1)[:, :32].astype(float).mean(1 - axis)
        full = image[..., 2].astype(float).mean(1 - axis)
        # Cb = 128 + 112 B / 255 in BT.709: the place on the ramp where each sample belongs
        places = np.interp((blue - 128) / 112 * 255, full, np.arange(64))[2:-2]
        assert abs((places - 2 * np.arange(32)[2:-2] - site).mean()) < 0.1


class Same:
    """A teacher and student in one that change nothing."""
    compression, name, device, dtype = (4, 8, 8), "same", "cpu", torch.float32
    encode = staticmethod(lambda video, sample: video)
    decode = staticmethod(lambda latents: latents)


def same(source, target, frames=8):
    return evaluate.reconstruct(Same, Same, source, target, frames)


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_windows_are_joined_in_order_and_colours_survive(tmp_path, frames):
    flat = [np.full((50, 66, 3), (200 - 4 * n, 40 + 3 * n, 60), np.uint8) for n in range(21)]
    source = write_video(tmp_path / "in.mp4", flat)
    count, quality, lost = same(source, tmp_path / "out.mkv", frames)
    assert count == 21 and quality > 50 and lost == 0
    for (_, before), (_, after) in zip(film(source), film(tmp_path / "out.mkv"), strict=True):
        assert np.abs(before.astype(int) - after).max() <= 2


def film(path):
    """[(frame, its colour in the middle)] of a video, by the tags that it has."""
    with av.open(str(path)) as video:
        return [(frame, frame.to_ndarray(format="rgb24", interpolation=evaluate.EXACT)[
                    frame.height // 2, frame.width // 2])
                for frame in video.decode(video=0)]


def times(path):
    return [float(frame.time) for frame, _ in film(path)]


def write_raw(path, values, height, width, look, pixels="yuv420p"):
    """Three lossless frames of one (Y, U, V), tagged (matrix, primaries, transfer)."""
    planes = [np.full(height * width // n, v, np.uint16 if "10" in pixels else np.uint8)
              for v, n in zip(values, (1, 4, 4))]
    frame = av.VideoFrame.from_ndarray(np.concatenate(planes).reshape(-1, width), format=pixels)
    return write_video(path, [frame] * 3, pixels=pixels, codec="ffv1", options={}, look=look)


@pytest.mark.parametrize("values, height, look, tags", [
    # [200, 40, 40] in BT.709, which players assume of HD without tags
    ((80, 112, 198), 720, (2, 2, 2), (1, 1, 1)),
    ((91, 104, 198), 480, (2, 2, 2), (6, 6, 6)),           # and in BT.601, of less
    ((91, 104, 198), 720, (5, 5, 6), (5, 5, 6)),           # tags decide where there are any
    ((80, 112, 198), 480, (1, 1, 1), (1, 1, 1))])
def test_colours_are_what_players_show(tmp_path, values, height, look, tags):
    source = write_raw(tmp_path / "in.mkv", values, height, 64, look)
    clip = VideoClips(source, 3, 64, train=False)[0]
    assert (clip.mean((1, 2, 3)).add(1).mul(127.5) - torch.tensor([200, 40, 40])).abs().max() < 2
    same(source, tmp_path / "out.mkv", frames=2)
    for frame, colour in film(tmp_path / "out.mkv"):
        assert ((frame.colorspace, frame.color_primaries, frame.color_trc) == tags
                and np.abs(colour.astype(int) - [200, 40, 40]).max() <= 3)


HDR = "{} is %s video: its values are taken as they are, not converted to BT.709's\n"


@pytest.mark.parametrize("look, line", [
    ((9, 9, 18), HDR % "HLG"), ((9, 9, 16), HDR % "PQ"), ((9, 9, 14), HDR % "BT.2020"),
    ((14, 9, 16), "{}: its colours will be wrong: nothing here undoes matrix 14 (FFmpeg's number)\n"),     # ICtCp
    (None, "{} is interlaced: its frames are taken as they are, two fields in one picture\n")])
def test_what_is_not_undone_is_said_once_and_hdr_keeps_its_tags(tmp_path, look, line, capfd):
    source, hdr = tmp_path / "in.mkv", look and look[0] == 9
    if look:
        write_raw(source, (500, 400, 650) if hdr else (80, 112, 198), 64, 64, look, "yuv420p10le" if hdr else "yuv420p")
    else:
        write_video(source, texture(9), options={"flags": "+ildct+ilme", "x264-params": "interlaced=1"})
    clips = VideoClips(source, 3, 64, train=False)
    assert clips[0] is not clips[0] and capfd.readouterr().err == line.format(source)
    data.warn_once.cache_clear()
    same(source, tmp_path / "out.mkv", frames=2)
    assert hdr or capfd.readouterr().err == line.format(source)
    for (before, a), (after, b) in zip(film(source), film(tmp_path / "out.mkv")) if hdr else ():
        assert ((after.colorspace, after.color_primaries, after.color_trc) == look
                and np.abs(a.astype(int) - b).max() <= 3)


@pytest.mark.parametrize("name, start, byte, least, most", [
    ("cut.mp4", 60, b"", 1, 39), ("cut.mkv", 60, b"", 1, 39), ("damaged.mp4", 40, b"\xff", 25, 48)])
def test_frames_that_a_truncated_or_damaged_file_lacks_are_counted(
        student, run, tmp_path, capsys, name, start, byte, least, most):
    # what says how many frames there are has to stand before them
    source = write_video(tmp_path / name, texture(48), movflags="faststart")
    assert same(source, tmp_path / "out.mp4")[0::2] == (48, 0)
    harm(source, start, 50 if byte else 100, byte)
    count, _, lost = same(source, tmp_path / "out.mp4")
    assert least <= count <= most and count + lost == 48
    run("--reconstruct", name, "out.mp4")
    assert (f"{name} promises 48 frames: {lost} could not be read" in capsys.readouterr().err) == (lost > 0)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_that_are_skipped_or_hidden_are_none_that_is_lost(tmp_path, codec):
    """An edit list hides frames; those that an AVI skips take time."""
    source = write_video(tmp_path / "in.mp4", texture(20), stamps=range(-5, 15))
    assert same(source, tmp_path / "out.mp4")[0::2] == (15, 0)
    stamps = [0, 1, 2, 10, 11, 30, 31, 32, 50]
    source = write_video(tmp_path / "in.avi", texture(9), stamps=stamps, codec=codec, options={"bf": "0"})
    assert same(source, tmp_path / "out.mp4")[0::2] == (9, 0)
    assert times(tmp_path / "out.mp4") == pytest.approx([n / 25 for n in stamps], abs=1e-3)
    content = source.read_bytes()
    source.write_bytes(content[:content.index(b"00dc", content.index(b"movi") + 4 + 600)])      # and without the index
    count, _, lost = same(source, tmp_path / "out.mp4")
    assert 0 < count < 9 and 0 < lost <= 51 - count


@pytest.mark.parametrize("stamps, want", [
    ([0, 40, 40, 80, 120], [0, 40, 41, 80, 120]), ([0, 80, 40, 120, 160], [0, 80, 81, 120, 160]),
    ([0, 400, 800, 0, 400, 800], [0, 400, 800, 840, 1240, 1640]),                  # two recordings, one after the other
    ([None, None, None], [0, 40, 80]), ([-80, -40, 0], [0, 40, 80]), ([7, 40, None, 120], [7, 40, 80, 120])])
def test_a_stamp_that_does_not_rise_costs_no_other_its_time(stamps, want):
    stream, latest = type("Stream", (), {"time_base": Fraction(1, 1000)}), {}
    assert [evaluate.rising(latest, stream, stamp, 40) for stamp in stamps] == want


def test_of_two_processes_one_reconstructs(student, tmp_path):
    write_video(tmp_path / "in.mp4", texture(9))
    done = script(tmp_path, "--device", "cpu", "--reconstruct", "in.mp4", "out.mp4", launcher=(*TWO, SCRIPT))
    assert done.stdout.count("out.mp4: 9 frames") == 1 and done.returncode == 0, done.stderr


def test_a_repeated_stamp_delays_no_later_frame_and_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_video(Path("at 12:30.mkv"), texture(9), stamps=[0, 1, 1, 2, 3, 4, 4, 5, 6],
                         codec="libvpx", options={})
    same(source, "out: 12.mkv")
    assert times("file:out: 12.mkv") == pytest.approx([0, 0.04, 0.041, 0.08, 0.12, 0.16, 0.161, 0.2, 0.24], abs=1e-3)
    assert len(VideoClips(source, 7, 32, train=False)[0][0]) == 7


def test_a_broken_source_is_one_line_and_leaves_nothing(student, videos, tmp_path):
    for flags in (["--reconstruct", videos / "corrupt.mp4", "out.mp4"], ["--student", "nowhere"]):
        done = script(tmp_path, *flags)
        assert (done.returncode == 1 and done.stderr.startswith("error: ")
                and len(done.stderr.splitlines()) == 1), done.stderr
        assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".out*"))


# ----------------------------------------------------------------------------------------------------------
# generated video

class Pipeline:
    """As a diffusers pipeline is used; its latents have the embedded teacher's channels."""

    def __init__(self):
        self.vae, self.to = SimpleNamespace(decode=None), lambda device: self
        self.set_progress_bar_config = lambda disable: None

    def __call__(self, prompt, generator, output_type, num_frames, height, width):
        latents = torch.randn(1, 32, num_frames // 4, height // 8, width // 8, generator=generator)
        return self.vae.decode(latents * 2 + len(prompt), None, return_dict=False)[0]       # scaled and shifted


def test_latents_are_generated_and_evaluated(student, run, videos, i3d, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent / "examples")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda path, torch_dtype: Pipeline())
    import generate
    (tmp_path / "prompts.txt").write_text("a boat\n\na dog\na dog\n")
    make = "generate.py prompts.txt latents --device cpu --pipeline x --size 64 --frames 8".split()
    monkeypatch.setattr(sys, "argv", make)
    generate.main()
    files = sorted((tmp_path / "latents").iterdir())
    made = [load_file(file)["latents"] for file in files]
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert not torch.equal(made[1], made[2])                                            # each its own seed
    assert torch.equal(made[0], torch.randn(1, 32, 2, 8, 8, generator=torch.Generator().manual_seed(10_000)) * 2 + 6)

    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    generate.main()                                 # goes on where it stopped
    assert "3 prompts, 1 to do" in capsys.readouterr().out
    assert torch.equal(load_file(files[1])["latents"], made[1]) and files[0].stat().st_mtime_ns == kept
    monkeypatch.setattr(sys, "argv", [*make, "--seed", "5"])
    with pytest.raises(ValueError, match="was made from .* name another folder"):
        generate.main()

    damaged, narrow = made[0].clone(), made[0][..., :4].contiguous()
    damaged[0, 3, 1, 2, 2] = math.nan
    for name, latents, teacher in (         # of the shape that most have, whichever comes first
            (".hidden", narrow, "tiny"), ("0 narrow", narrow, "tiny"), ("not a number", damaged, "tiny"),
            ("several", torch.cat(made), "tiny"), ("another teacher's", made[0], "hunyuan15")):
        save_file({"latents": latents}, tmp_path / f"latents/{name}.safetensors", {"teacher": teacher})
    (tmp_path / "latents/text.safetensors").touch()
    results = run("--latents", "latents", "--data", "videos", "--i3d", i3d, "--metrics", "psnr", "fvd")
    assert results["clips"] == 3 and {
        "0 narrow.safetensors", "several.safetensors", "text.safetensors", "corrupt.mp4"} <= set(results["skipped"])
    assert results["skipped"]["not a number.safetensors"] == "its values in latent frame 1 are not finite"
    assert "latents of tiny, not hunyuan15" in results["skipped"]["another teacher's.safetensors"]
    detect, teacher = evaluate.load_i3d(i3d, "cpu"), evaluate.load_teacher("tiny")
    with torch.inference_mode():
        real = detect(real_clips(videos, 64))
        decoded = teacher.decode(torch.cat(made)), TurboVAED.from_pretrained(student)(torch.cat(made))
        for row, video in zip(results["rows"], decoded):
            assert row["fvd"] == pytest.approx(frechet_distance(detect(video), real), rel=1e-4)
        assert results["rows"][1]["psnr"] == pytest.approx(psnr(*decoded).mean().item(), abs=1e-4)
    assert "FVD to 6 real clips of videos" in capsys.readouterr().out


def test_a_second_data_set_does_not_overwrite_the_results_of_the_first(student, run, videos, tmp_path):
    flags = ["--size", 64, "--metrics", "psnr"]
    made_up = run("--clips", 1, *flags)
    assert run("--data", "videos", *flags)["data"] == "videos"
    assert sorted(path.relative_to(tmp_path / "out/demo") for path in (tmp_path / "out").rglob("results.json")) == [
        Path("results.json"), Path("videos/results.json")]
    assert json.loads((tmp_path / "out/demo/results.json").read_text()) == made_up
    weights = tmp_path / "teacher.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(TINY_WEIGHTS).items()}, weights)
    for other, said in ((["--data", "videos", "--out", "out/demo"], r"data synthetic \(now videos\)"),
                        (["--against", "teacher"], "reference the input"),
                        (["--student", SHIPPED, "--out", "out/demo"], "students "),
                        (["--size", 32], r"shape \[8, 64, 64\] \(now \[8, 32, 32\]\)"),
                        (["--seed", 3], r"seed 10000 \(now 3\)"), (["--frames", 4], r"shape .* \(now \[4, 64, 64\]\)"),
                        (["--dtype", "bfloat16"], "dtype float32"), (["--metrics", "ssim"], r"metrics \['psnr'\]"),
                        (["--teacher-weights", weights], "teacher_sha256 ")):
        with pytest.raises(ValueError, match=f"out/demo/results.json is of {said}.*: name another folder with --out"):
            run("--clips", 1, *flags, *other)
    assert json.loads((tmp_path / "out/demo/results.json").read_text()) == made_up
    TurboVAED(CONFIGS["tiny"]).save_pretrained(student, {"teacher": "tiny"})
    run("--clips", 1, *flags, "--batch", 2)                 # the same again is no other's, nor a student trained on
    run("--clips", 2, *flags)                               # nor are more clips and more metrics
    more = run("--clips", 2, *flags, "ssim")
    for fewer, said in (([1, *flags, "ssim"], r"chosen 2 \(now 1\)"),
                        ([2, *flags], r"metrics \['psnr', 'ssim'\] \(now \['psnr'\]\)"),
                        ([3, *flags], "metrics"), ([1, *flags, "ssim", "temporal"], "chosen")):
        with pytest.raises(ValueError, match=f"out/demo/results.json is of {said}.*: name another folder with --out"):
            run("--clips", *fewer)
    assert json.loads((tmp_path / "out/demo/results.json").read_text()) == more


def test_a_reader_that_goes_away_loses_no_results_and_a_full_disk_is_one_line_and_leaves_them(student, tmp_path):
    """`| head`: files come before the table."""
    flags = "--student out/demo --clips 1 --frames 8 --size 64 --metrics psnr --device cpu"
    held = lambda: {file.name: file.read_bytes() for file in student.parent.iterdir()}
    subprocess.run(f"{sys.executable} {SCRIPT} {flags} | true", shell=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    before = held()
    assert {*before} == {*evaluate.WRITTEN, student.name}
    for name, limit in (("compare.png", 2000), ("compare.mp4", len(before["compare.png"]) + 1000)):
        code = (f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
                f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
        done = script(tmp_path, *flags.split(), launcher=("-c", code))
        assert done.returncode == 1 and done.stderr == f"error: {student.parent}: File too large\n", done.stderr
        assert held() == before


def test_a_stop_leaves_no_half_film(student, tmp_path):
    source = write_video(tmp_path / "in.mp4", texture(400))
    process = subprocess.Popen([sys.executable, SCRIPT, "--device", "cpu", "--reconstruct", source, "out.mp4"],
                               cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*")):
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    assert process.wait(30) == 1 and process.stderr.read() == "error: stopped\n" and not list(tmp_path.glob("*out.*"))


@pytest.mark.parametrize("args, message", [
    (["--data", "davis"], "put them into the folder data/davis.* or by --download"),
    (["--data", "synthetic", "--size", "64x32"], "made-up video is square"),
    (["--latents", "nowhere"], "no latents of 32 channels in nowhere"),
    (["--out", "file"], "File exists: 'file'"),
    (["--student", "hustvl/Turbo-VAED"], "published students need config="),
    (["--reconstruct", "a.mp4", "b.webm"], "films are .mp4, .mkv or .mov"),
    (["--reconstruct", "a.mp4", "a.mp4"], "would be written over"),
    (["--decode", "a.safetensors", "b.gif"], "films are .mp4, .mkv or .mov"),
    (["--decode", __file__, "b.mp4"], "no safetensors file"),
    (["--reconstruct", "a.mp4", "b.mp4", "--out", "x"], "--out does not go with --reconstruct"),
    (["--reconstruct", "a.mp4", "b.mp4", "--metrics", "psnr"], "--metrics does not go with --reconstruct"),
    (["--decode", "a.safetensors", "b.mp4", "--latents", "x"], "--latents does not go with --decode"),
    (["--decode", "a.safetensors", "b.mp4", "--teacher-weights", "x"], "--teacher-weights does not go with --decode"),
    (["--decode", "z.safetensors", "b.mp4", "--teacher", "cog", "--student", "out/demo", SHIPPED],
     "z.safetensors to b.mp4 by out/demo: the student does not fit latents of cog: .* latents of tiny"),
    (["--reconstruct", "file", "out.mp4"], "file to out.mp4: "), (["--data", "nowhere"], "no videos called nowhere"),
    (["--fps", "30"], "--fps does not go with --data"),
    (["--decode", "cog.safetensors", "b.mp4"], "does not fit latents of cog: .* latents of tiny, not cog"),
    *((["--latents", "x", "--metrics", "psnr", *flags.split()], "does not go with --latents and --metrics psnr")
      for flags in ("--data videos", "--seed 1", "--size 16", "--frames 8", "--against teacher")),
    (["--latents", "x", "--metrics", "fvd", "--size", "16"], "--size does not go with --latents"),
    *((flags.split(), "go with a data set's name") for flags in (
        "--root x", "--split x", "--download", "--data videos --root x")),
    (["--data", "vidgen", "--download"], "--download fetches davis and ucf101; vidgen is to be had from"),
    (["--frames", "9"], "frames = 9"),
    (["--teacher", "dc", "--teacher-weights", "nowhere"], "does not fit the dc teacher"),
])
def test_wrong_arguments_say_what_would_be_right(student, run, tmp_path, args, message):
    for name in ("file", "a.mp4"):
        (tmp_path / name).touch()
    for name in ("z", "cog"):
        about = {"teacher": name} if name == "cog" else None
        save_file({"z": torch.zeros(32, 1, 2, 2)}, tmp_path / f"{name}.safetensors", about)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [
    "--clips 0", "--frames 0", "--batch 0", "--workers -1", "--seed -1", "--threads 0", "--size 0", "--batch two",
    "--fps 0", "--fps -1", "--fps 2147483648", "--fps 1/0", "--fps nan"])
def test_numbers_that_mean_nothing_are_refused_before_anything_is_loaded(run, capsys, flags):
    with pytest.raises(SystemExit) as end:
        run(*flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and flags.split()[0] in lines[1]


@pytest.mark.parametrize("flags, unused, message", [
    ("--reconstruct nowhere out.mp4", "load_students", "No such file or directory: '.*nowhere'"),
    ("--decode nowhere out.mp4", "load_students", "No such file or directory: '.*nowhere'"),
    ("--student out/demo out/other", "load_teacher", "out/other does not fit the tiny teacher: .*drops first frames"),
    ("--student out/demo --teacher cog", "load_teacher", "out/demo .* made for latents of tiny, not cog")])
def test_what_cannot_be_is_refused_before_anything_is_fetched_for_it(
        student, run, monkeypatch, tmp_path, flags, unused, message):
    TurboVAED(replace(CONFIGS["tiny"], drop_first=True)).save_pretrained(tmp_path / "out/other")
    monkeypatch.setattr(evaluate, unused, None)
    with pytest.raises((ValueError, OSError), match=message):
        run(*flags.split())


@pytest.mark.parametrize("tensors", [{"latents": (1, 32, 11, 3, 4), "other": (2,)}, {"z": (32, 11, 3, 4)}])
def test_saved_latents_become_a_video(run, tmp_path, capsys, tensors):
    torch.manual_seed(0)
    saved = {name: torch.randn(shape) for name, shape in tensors.items()}
    save_file(saved, tmp_path / "z.safetensors")
    run("--student", SHIPPED, "--fps", "30000/1001", "--decode", "z.safetensors", "new/out.mp4")
    assert "new/out.mp4: 44 frames" in capsys.readouterr().out
    with av.open("new/out.mp4") as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        got = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with torch.no_grad():
        video = TurboVAED.from_pretrained(SHIPPED)(next(iter(saved.values())).reshape(1, 32, 11, 3, 4))
    want = evaluate.frames_of(video).permute(0, 2, 3, 1).numpy()
    errors, others = (np.abs(got / 255 - frames).mean((1, 2, 3)) for frames in (want, np.roll(want, 1, 0)))
    assert got.shape == (44, 24, 32, 3) and errors.max() < 0.1 and (errors < others).all()


@pytest.mark.parametrize("tensors, says", [
    ({"latents": (2, 32, 1, 2, 2)}, "(1, C, t, h, w)"), ({"a": (32, 1, 2, 2), "b": (1,)}, "a, b"),
    ({"latents": (8, 1, 2, 2)}, "(B, 32, t, h, w)"), (b"no", "z.safetensors"), ({"latents": (5,)}, "(C, t, h, w)"),
    ({}, "holds no tensor"), ({"latents": (16, 1, 2, 0)}, "(C, t, h, w)"),
    (b"\x93NUMPY\1\0v\0{'descr': '<f4'", "no safetensors file"), ({"bool": (32, 1, 2, 2)}, "bool"),
    ({"int32": (16, 1, 2, 2)}, "int32"), ({"complex64": (16, 1, 2, 2)}, "floating")])
def test_latents_that_are_none_are_one_line(run, tmp_path, tensors, says):
    source, target = tmp_path / "z.safetensors", tmp_path / "out.mp4"
    kind = lambda name: getattr(torch, name, torch.float32)
    if isinstance(tensors, bytes):
        source.write_bytes(tensors)
    else:
        save_file({name: torch.zeros(shape, dtype=kind(name)) for name, shape in tensors.items()}, source)
    with pytest.raises(ValueError) as error:
        run("--student", SHIPPED, "--decode", source, target)
    assert says in str(error.value) and "\n" not in str(error.value) and list(tmp_path.iterdir()) == [source]
