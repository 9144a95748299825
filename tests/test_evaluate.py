("Evaluation: metrics that agree with closed forms and other implementations, "
 "and commands that leave what they promise.")
import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import data
import evaluate
from data import VideoClips
from evaluate import frechet_distance, psnr, ssim, temporal_error
from model import CONFIGS, SHIPPED, TurboVAED
from teachers import TINY_WEIGHTS

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


@pytest.mark.parametrize("kind", ["noise", "made-up"])
def test_ssim_is_the_formula_and_scikit_image(clips, kind):
    """Wang et al. 2004 with SciPy's Gaussian filter; scikit-image leaves out the windows that reach over the border."""
    from scipy.ndimage import gaussian_filter
    a, b = clips
    if kind == "made-up":
        a = evaluate.SyntheticClips(3, 64, seed=5)[0][None]
        b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    blur = lambda image: gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    def reference(x, y):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
        c1, c2 = 0.01 ** 2, 0.03 ** 2
        return (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    x, y = unit(a).double().numpy(), unit(b).double().numpy()
    maps = np.array([[[reference(x[i, c, t], y[i, c, t]) for c in range(3)] for t in range(3)] for i in range(len(x))])
    assert ssim(a, b).tolist() == pytest.approx(maps.mean((1, 2, 3, 4)), abs=1e-5)
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return
    other = structural_similarity(x[0, :, 0], y[0, :, 0], gaussian_weights=True, use_sample_covariance=False,
                                  data_range=1, channel_axis=0)
    assert other == pytest.approx(maps[0, 0, :, 5:-5, 5:-5].mean(), abs=1e-6)


def test_temporal_error_sees_flicker_and_not_colour(clips):
    a = clips[0] * 0.5
    assert torch.allclose(temporal_error(a, a + 0.1), torch.zeros(2), atol=1e-4)
    flicker = torch.tensor([0.0, 0.2, 0.0]).view(1, 1, 3, 1, 1)       # 0.1 of [0, 1] up, then down
    assert torch.allclose(temporal_error(a, a + flicker), torch.full((2,), 25.5), atol=1e-3)
    assert temporal_error(a[:, :, :1], a[:, :, :1]).isnan().all()


def test_grid_sees_a_grid_in_flat_areas_and_no_other_change(clips):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    flat = (0.3 * torch.sin(x / 15) + 0.01 * torch.randn(64, 64)).expand(2, 3, 2, 64, 64).clone()
    flat[..., 48:] += torch.randn(64, 16)                                               # busy: does not count
    assert torch.allclose(evaluate.grid(flat, flat), torch.ones(2))
    for period in (2, 4):
        painted = flat + 0.02 * torch.cos(2 * math.pi * x / period)
        assert evaluate.grid(painted, flat).min() > 3
        busy = flat.clone()
        busy[..., 48:] = painted[..., 48:]
        assert (evaluate.grid(busy, flat) < 1.2).all()
    assert evaluate.grid(flat + 0.02 * torch.cos(2 * math.pi * x / 3), flat).max() < 1.2           # no grid of 2 or 4
    smoother = torch.nn.functional.avg_pool2d(flat[0], 3, 1, 1)[None]
    assert evaluate.grid(smoother, flat[:1]).item() < 1
    constant = torch.full((1, 3, 1, 32, 32), 0.5)
    assert evaluate.grid(constant, constant).item() == 1
    # rounding to 8 bits is as much noise as is taken for b's own
    noisy = constant + (torch.rand(400, 3, 1, 32, 32) - 0.5) * 2 / 255
    assert evaluate.grid(noisy, constant.expand(400, -1, -1, -1, -1)).mean().item() == pytest.approx(2, rel=0.1)
    assert evaluate.grid(constant[..., :31], constant[..., :31]).isnan().all()
    with pytest.raises(ValueError, match="shapes"):
        evaluate.grid(flat, constant)


# ----------------------------------------------------------------------------------------------------------
# the Fréchet distance

def with_covariance(mean, root, n, generator):
    """n rows whose sample mean and covariance (n - 1) are exactly `mean` and rootᵀ root; n > len(mean)."""
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(n - 1) @ root + mean


@pytest.fixture
def normal():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form(normal, d):
    mean_a, mean_b, std_a, std_b = torch.rand(4, d, generator=normal, dtype=torch.float64)
    a, b = with_covariance(mean_a, std_a.diag(), 50, normal), with_covariance(mean_b, std_b.diag(), 70, normal)
    want = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(want.item(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(d / 4, rel=1e-9)


@pytest.mark.parametrize("n", [60, 400])
def test_frechet_distance_agrees_with_scipys_sqrtm(normal, n):
    from scipy.linalg import sqrtm
    d = 40
    a, b = (torch.randn(n, d, generator=normal, dtype=torch.float64)
            @ torch.randn(d, d, generator=normal, dtype=torch.float64) for _ in range(2))
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    want = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("n, m", [(6, 9), (6, 500), (300, 450)])
def test_frechet_distance_of_fewer_clips_than_dimensions_is_exact(normal, n, m):
    """Features that live in a 5-dimensional subspace of 400: the distance is that of their coordinates there."""
    mean_a, mean_b, std_a, std_b = torch.rand(4, 5, generator=normal, dtype=torch.float64)
    a, b = with_covariance(mean_a, std_a.diag(), n, normal), with_covariance(mean_b, std_b.diag(), m, normal)
    want = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    plane = torch.linalg.qr(torch.randn(400, 5, generator=normal, dtype=torch.float64)).Q.T
    assert frechet_distance(a @ plane, b @ plane) == pytest.approx(want.item(), rel=1e-9)
    # two sets in planes at right angles: nothing of one helps to explain the other
    other = torch.linalg.qr(torch.randn(400, 10, generator=normal, dtype=torch.float64)).Q.T
    apart = mean_a.square().sum() + mean_b.square().sum() + std_a.square().sum() + std_b.square().sum()
    assert frechet_distance(a @ other[:5], b @ other[5:]) == pytest.approx(apart.item(), rel=1e-9)


@pytest.mark.parametrize("a, b, message", [
    (torch.zeros(1, 4), torch.zeros(5, 4), "two or more rows"),
    (torch.zeros(5, 4), torch.zeros(5, 3), "two or more rows"),
    (torch.zeros(5, 4), torch.full((5, 4), math.nan), "finite"),
])
def test_a_frechet_distance_of_nothing_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_leaves_the_range_is_clamped(metric, clips):
    a, b = clips
    assert torch.equal(metric(a * 3, b), metric((a * 3).clamp(-1, 1), b))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_clips_of_different_shapes_are_refused(metric, clips):
    with pytest.raises(ValueError, match="cannot compare"):
        metric(clips[0], clips[1][:, :, :1])        # would broadcast, silently


# ----------------------------------------------------------------------------------------------------------
# networks that measure

class Detector(torch.nn.Module):
    """A small one with the signature of i3d_torchscript.pt: features of (B, 3, T, H, W), T of 8 or more."""

    def __init__(self, low: float = 0.0, high: float = 255.0):
        super().__init__()
        self.low, self.high = low, high
        torch.manual_seed(0)
        self.conv, self.head = torch.nn.Conv3d(3, 8, (8, 7, 7), stride=(4, 4, 4)), torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True,
                return_features: bool = False) -> torch.Tensor:
        if resize:
            x = torch.nn.functional.interpolate(x, size=[x.shape[2], 56, 56], mode="trilinear", align_corners=False)
        if rescale:
            x = 2.0 * (x - self.low) / (self.high - self.low) - 1.0
        features = self.head(torch.tanh(self.conv(x)).mean([2, 3, 4]))
        return features if return_features else features.softmax(1)


def save_detector(path, **options):
    torch.jit.script(Detector(**options)).save(str(path))
    return path


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("i3d") / "i3d.pt")


def test_the_detector_gets_pixels_in_its_own_range(i3d, clips):
    video = torch.rand(2, 3, 9, 24, 32, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    want = torch.jit.load(str(i3d))(video.clamp(-1, 1), rescale=False, resize=True, return_features=True)
    assert torch.allclose(evaluate.load_i3d(i3d, "cpu", 9)(video), want, atol=1e-5)


def test_another_detector_is_refused(tmp_path, i3d):
    # would take [0, 1]: the numbers would be of white video
    other = save_detector(tmp_path / "unit.pt", high=1.0)
    with pytest.raises(ValueError, match="does not rescale"):
        evaluate.load_i3d(other, "cpu", 9)
    with pytest.raises(ValueError, match="no clips of 5 frames"):
        evaluate.load_i3d(i3d, "cpu", 5)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(OSError, match="no TorchScript file"):
        evaluate.load_i3d(tmp_path / "text.pt", "cpu", 9)


def test_lpips_is_the_packages(tmp_path, clips):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for slot in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        for number, layer in getattr(net.net, slot).named_children():
            layer.load_state_dict(alexnet.features[int(number)].state_dict())
    a, b = torch.rand(2, 2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        want = torch.stack([
            torch.stack([net(a[i:i + 1, :, t], b[i:i + 1, :, t]).squeeze() for t in range(3)]).mean()
            for i in range(2)])
        assert torch.allclose(evaluate.load_lpips(tmp_path / "alexnet.pth", "cpu")(a, b), want, atol=1e-6)
    with pytest.raises(OSError, match="no AlexNet weights .* --lpips-weights"):
        evaluate.load_lpips(tmp_path / "nowhere.pth", "cpu")
    alexnet.features[0].bias.data.fill_(math.nan)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    with pytest.raises(OSError, match="not finite"):
        evaluate.load_lpips(tmp_path / "alexnet.pth", "cpu")


# ----------------------------------------------------------------------------------------------------------
# the command

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

    def run(*args):
        short = ["--frames", "8"] * (not {"--frames", "--latents", "--decode", "--reconstruct"} & set(args))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *short, *map(str, args)])
        evaluate.main()
        return json.loads(max(tmp_path.rglob("results.json"), key=lambda file: file.stat().st_mtime_ns).read_text())
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
    written = ["compare.mp4", "compare.png", "results.json", "results.md"]
    assert sorted(f.name for f in student.parent.iterdir()) == sorted([*written, "student.safetensors"])
    with av.open(str(student.parent / "compare.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 48          # four seconds
    lines = capsys.readouterr().out.splitlines()
    assert "2 clips of 8x64x64" in lines[-5] and sorted(lines[-4:]) == [f"out/demo/{name}" for name in written]
    rows = (student.parent / "results.md").read_text().splitlines()
    assert rows[0] == "| Model | Decoder Param (M) | (d_t, d_h, d_w) | FPS↑ | PSNR↑ | SSIM↑ | temporal error↓ |"
    assert rows[3].startswith("| out/demo | 0.6 | (4, 8, 8) |") and f"| {results['rows'][1]['psnr']:.2f} |" in rows[3]


def test_quality_does_not_depend_on_the_run(student, run):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    first, again = (run("--clips", 1, "--size", 64) for _ in range(2))       # finds the student under out/
    assert first["per_clip"] == again["per_clip"] and first["rows"][1]["model"] == "out/demo"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_against_the_teacher(student, run):
    rows = run("--clips", 2, "--size", 64, "--against", "teacher")["rows"]
    assert rows[0]["psnr"] is None and rows[0]["ssim"] is None and rows[1]["psnr_kept"] is None
    teacher = evaluate.load_teacher("tiny")
    clips = evaluate.SyntheticClips(8, 64, seed=evaluate.HELD_OUT_SEED)
    with torch.no_grad():
        latents = teacher.encode(torch.stack([clips[0], clips[8]]))
        want = psnr(TurboVAED.from_pretrained(student)(latents), teacher.decode(latents)).mean().item()
    assert rows[1]["psnr"] == pytest.approx(want, abs=1e-4)


def texture(n, height=64, width=96, seed=0):
    """n frames of moving noise over a gradient."""
    base = (np.random.default_rng(seed).integers(0, 100, (height, width, 3))
            + np.linspace(0, 150, width).astype(int)[:, None])
    return [np.roll(base, 3 * k, 1).astype(np.uint8) for k in range(n)]


def write_video(path, images, rate=25, stamps=None, pixels="yuv420p", turn=0, sound=None, sound_rate=16000,
                codec="libx264", options={"crf": "10"}):
    """A video with one frame at each time stamp (in 1/rate seconds); sound: a codec, for a tone as long as it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pixels
        if turn:
            stream.set_display_rotation(turn)
        tone = container.add_stream(sound, rate=sound_rate) if sound else None
        for n, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
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
    broken = write_video(folder / "corrupt.mp4", texture(12))
    content = bytearray(broken.read_bytes())
    content[len(content) // 50:len(content) * 9 // 10] = bytes(len(content) * 9 // 10 - len(content) // 50)
    broken.write_bytes(content)                     # the header is whole, the frames are not
    (folder / "empty.mp4").touch()
    return folder


def test_every_video_is_evaluated_or_skipped_by_name(student, run, videos, capsys):
    results = run("--data", "videos", "--size", 64, "--metrics", "psnr", "ssim", "temporal", "grid")
    assert [clip["clip"] for clip in results["per_clip"]] == [
        "frames", "odd.mp4", "plain.mp4", "ten_bits.mp4", "turned.mp4", "uneven.mp4"]
    assert sorted(results["skipped"]) == ["corrupt.mp4", "empty.mp4", "few_frames", "short.mp4", "single.mp4"]
    assert all(math.isfinite(v) for clip in results["per_clip"] for v in clip["out/demo"].values())
    printed = capsys.readouterr()
    assert "6 clips of 8x64x64" in printed.out and "5 clips skipped" in printed.out
    for name in results["skipped"]:
        assert f"skipping {name}: " in printed.err


def test_the_same_numbers_by_any_batch_and_number_of_processes(student, run, videos, i3d, tmp_path):
    flags = ["--data", "videos", "--size", "64x48", "--frames", "8",
             "--metrics", "psnr", "ssim", "temporal", "fvd", "--i3d", i3d]
    one, three = run(*flags), run(*flags, "--batch", 4, "--workers", 1)
    assert one["without"] == {}
    (tmp_path / "two.py").write_text(
        "import os, evaluate\n"
        "def load_lpips(path, device):\n"
        "    if os.environ['RANK'] == '1': raise OSError('no disk')\n"
        "    return evaluate.psnr\n"
        "evaluate.load_lpips = load_lpips\n"
        "evaluate.main()\n")
    flags.insert(flags.index("ssim"), "lpips")              # which one of two processes cannot load
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    shared = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "two.py",
                             "--device", "cpu", "--out", "shared", *map(str, flags)],
                            cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert shared.returncode == 0, shared.stderr
    shared = json.loads((tmp_path / "shared" / "results.json").read_text())
    assert shared["without"] == {"lpips": "no disk"} and shared["rows"][1]["lpips"] is None
    assert len(shared["per_clip"]) == 6 and sorted(shared["skipped"]) == sorted(one["skipped"])
    for other in (three, shared):
        assert other["clips_hash"] == one["clips_hash"] and other["weights"] == one["weights"]
        for a, b in zip(one["rows"], other["rows"]):
            for metric in ("psnr", "ssim", "temporal", "fvd"):
                assert a[metric] == pytest.approx(b[metric], rel=1e-6, abs=1e-6), metric
    assert one["rows"][1]["fvd"] > 0


def test_rfvd_is_the_distance_of_the_detectors_features(student, run, videos, i3d, capsys):
    results = run("--data", "videos", "--size", 64, "--metrics", "fvd", "--i3d", i3d)
    assert results["weights"]["I3D"] == hashlib.sha256(i3d.read_bytes()).hexdigest()
    assert results["weights"]["out/demo"] == hashlib.sha256(student.read_bytes()).hexdigest()
    detect, teacher = evaluate.load_i3d(i3d, "cpu", 8), evaluate.load_teacher("tiny")
    clips = VideoClips(videos, 8, 64, train=False)
    good = torch.stack([clips[i] for i, name in enumerate(clips.files) if name != "corrupt.mp4"])
    with torch.inference_mode():
        want = frechet_distance(detect(teacher.decode(teacher.encode(good))), detect(good))
    assert results["rows"][0]["fvd"] == pytest.approx(want, rel=1e-4)
    assert "rFVD: 6 clips are too few to mean much: I3D has 6 features" in capsys.readouterr().out


@pytest.fixture
def overflowing(tmp_path):
    """A student of finite weights that gives infinite values."""
    model = TurboVAED(CONFIGS["tiny"])
    model.conv_out.conv.weight.data.fill_(3e38)
    return model.save_pretrained(tmp_path / "broken.safetensors", {"teacher": "tiny"})


def test_one_student_that_broke_does_not_cost_the_others(student, overflowing, run, videos, i3d, capsys):
    results = run("--student", student, overflowing, "--data", "videos", "--size", 64,
                  "--metrics", "psnr", "fvd", "--i3d", i3d)
    teacher, good, bad = results["rows"]
    assert (teacher["fvd"] > 0 and good["fvd"] > 0
            and bad["fvd"] is None and bad["psnr"] is None and bad["psnr_kept"] is None)
    assert results["broken"] == ["broken.safetensors"]
    assert ("broken.safetensors: every clip's video holds values that are not finite" in capsys.readouterr().out
            and results["clips"] == 6)


def test_one_bad_clip_is_named_and_costs_no_other(student, run, videos, i3d, monkeypatch, capsys):
    flags = ["--data", "videos", "--size", 64, "--metrics", "psnr", "fvd", "--i3d", i3d]
    good, forward, calls = run(*flags), TurboVAED.forward, []

    def third_breaks(self, latents, *args, **kwargs):
        calls.append(1)
        return forward(self, latents, *args, **kwargs) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(TurboVAED, "forward", third_breaks)
    capsys.readouterr()
    results = run(*flags)
    rest = [clip for clip in good["per_clip"] if clip["clip"] != "plain.mp4"]
    assert results["per_clip"] == rest and results["skipped"].keys() - good["skipped"].keys() == {"plain.mp4"}
    assert (results["rows"][1]["psnr"] == pytest.approx(sum(clip["out/demo"]["psnr"] for clip in rest) / 5)
            and results["rows"][1]["fvd"] > 0)
    assert "skipping plain.mp4: out/demo gave values that are not finite" in capsys.readouterr().err


def test_a_reconstruction_of_no_numbers_fails_and_leaves_nothing(overflowing, run, tmp_path, monkeypatch):
    write_video(tmp_path / "in.mp4", texture(9))
    with pytest.raises(ValueError, match="in.mp4 to out.mp4: .* not finite"):
        run("--student", overflowing, "--reconstruct", "in.mp4", "out.mp4")
    assert not list(tmp_path.glob("*out.*"))


def test_without_weights_the_column_says_so(student, run, videos, tmp_path, capsys):
    results = run("--data", "videos", "--size", 64, "--lpips-weights", tmp_path / "none.pth",
                  "--i3d", tmp_path / "none.pt")
    assert (sorted(results["without"]) == ["fvd", "lpips"] and results["rows"][1]["lpips"] is None
            and results["rows"][1]["psnr"] > 0)
    out = capsys.readouterr().out
    assert "LPIPS: no AlexNet weights" in out and "rFVD: " in out


# ----------------------------------------------------------------------------------------------------------
# whole videos

@pytest.mark.parametrize("name, shape, stamps, sound, suffix", [
    ("plain", (48, 64), None, "aac", ".mp4"),
    ("odd and uneven", (51, 67), [0, 1, 2, 6, 7, 8, 15, 16, 17, 18, 30, 31, 32, 33, 34, 40, 41, 42, 43], None, ".mp4"),
    ("a codec that .mp4 does not hold", (48, 64), None, "adpcm_ima_wav", ".avi"),
    ("one that it only claims to hold", (48, 64), None, "pcm_s16le", ".mkv"),
])
def test_a_video_keeps_frames_time_and_sound(student, run, tmp_path, monkeypatch, name, shape, stamps, sound, suffix):
    source = write_video(tmp_path / f"in{suffix}", texture(19, *shape), stamps=stamps, sound=sound,
                         pixels="yuv444p" if shape[0] % 2 else "yuv420p")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu",
                                      "--reconstruct", str(source), str(tmp_path / "out.mp4")])
    evaluate.main()

    def content(path):
        with av.open(str(path)) as video:
            frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
        with av.open(str(path)) as video:
            sound = [bytes(packet) for packet in video.demux(audio=0) if packet.size] if video.streams.audio else []
            return frames, sound, video.streams.video[0].average_rate, [s.name for s in video.streams.audio]
    (before, sound_in, rate_in, _), (after, sound_out, rate_out, codecs) = (
        content(source), content(tmp_path / "out.mp4"))
    # .avi has no time stamps
    times = [t for t, _ in before] if source.suffix != ".avi" else [n / 25 for n in range(19)]
    assert [t for t, _ in after] == pytest.approx(times, abs=2e-3)
    assert stamps or rate_out == rate_in            # an uneven film's mean rate counts how long the last frame stays
    assert {image.shape for _, image in after} == {(*shape, 3)}
    assert codecs == ([] if sound is None else ["aac"]) and bool(sound_out) == bool(sound)
    if sound == "aac":
        assert sound_out == sound_in                # not encoded again
    assert not list(tmp_path.glob(".out*"))


def test_frame_rates_are_those_of_players():
    assert [evaluate.frame_rate(text) for text in ("24", "29.97", "30000/1001")] == [
        24, Fraction(2997, 100), Fraction(30000, 1001)]
    for wrong in ("0", "-1", "2147483648", "1/0", "nan", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="up to 1000"):
            evaluate.frame_rate(wrong)


def test_a_teacher_that_half_precision_breaks_is_named(tmp_path):
    teacher = evaluate.load_teacher("tiny", dtype=torch.float16)
    teacher.vae.encoder.project_out["main"].op_list[0].conv.weight.mul_(1e6)
    source = write_video(tmp_path / "in.mp4", list(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)))
    with pytest.raises(ValueError) as error:
        evaluate.reconstruct(teacher, None, source, tmp_path / "out.mp4", 8, torch.device("cpu"), torch.float16)
    assert "the tiny teacher's latents are not finite in float16" in str(error.value)


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_windows_are_joined_in_order_and_colours_survive(tmp_path, frames):
    """With an encoder and a decoder that change nothing, what comes out is what went in, but for the video codec."""
    class Nothing:
        compression = (4, 8, 8)

        def encode(self, video, sample):
            assert video.shape == (1, 3, frames, 56, 72)
            return video
    flat = [np.full((50, 66, 3), (200 - 4 * n, 40 + 3 * n, 60), np.uint8) for n in range(21)]
    source = write_video(tmp_path / "in.mp4", flat)
    count, quality, lost = evaluate.reconstruct(Nothing(), lambda latents: latents, source, tmp_path / "out.mkv",
                                                frames, torch.device("cpu"), torch.float32)
    assert count == 21 and quality > 50 and lost == 0
    read = lambda path: np.stack(
        list(evaluate.VideoClips(path, 21, (50, 66), train=False)[0].mul(127.5).add(127.5).numpy()), -1)
    before, after = read(source), read(tmp_path / "out.mkv")
    assert np.abs(before.mean((1, 2)) - after.mean((1, 2))).max() < 2


class Same:
    """A teacher and student in one that change nothing."""
    compression = (4, 8, 8)
    encode = staticmethod(lambda video, sample: video)

    def __call__(self, latents):
        return latents


def same(source, target, frames=8):
    return evaluate.reconstruct(Same(), Same(), source, target, frames, torch.device("cpu"), torch.float32)


def film(path):
    """[(frame, its colour in the middle)] of a video, by the tags that it has."""
    with av.open(str(path)) as video:
        return [(frame, frame.to_ndarray(format="rgb24", interpolation=evaluate.EXACT)[
                    frame.height // 2, frame.width // 2])
                for frame in video.decode(video=0)]


def write_raw(path, values, height, width, look, pixels="yuv420p"):
    """Three lossless frames of one (Y, U, V), tagged (matrix, primaries, transfer)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        codec = stream.codec_context
        codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range = *look, 1
        planes = [np.full(height * width // n, v, np.uint16 if "10" in pixels else np.uint8)
                  for v, n in zip(values, (1, 4, 4))]
        for n in range(3):
            frame = av.VideoFrame.from_ndarray(np.concatenate(planes).reshape(-1, width), format=pixels)
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


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


@pytest.mark.parametrize("transfer, kind", [(18, "HLG"), (16, "PQ"), (14, "BT.2020")])
def test_hdr_keeps_its_tags_and_training_is_told(tmp_path, transfer, kind, capfd):
    look = 9, 9, transfer
    source = write_raw(tmp_path / "in.mkv", (500, 400, 650), 64, 64, look, "yuv420p10le")
    clips = VideoClips(source, 3, 64, train=False)
    clips[0], clips[0]
    assert capfd.readouterr().err == (
        f"{source} is {kind} video: its values are taken as they are, not converted to BT.709's\n")
    same(source, tmp_path / "out.mkv", frames=2)
    for (before, a), (after, b) in zip(film(source), film(tmp_path / "out.mkv")):
        assert ((after.colorspace, after.color_primaries, after.color_trc) == look
                and np.abs(a.astype(int) - b).max() <= 3)


def test_a_matrix_that_nothing_undoes_is_said(tmp_path, capfd):
    source = write_raw(tmp_path / "in.mkv", (80, 112, 198), 64, 64, (14, 9, 16))        # ICtCp
    VideoClips(source, 3, 64, train=False)[0]
    said = capfd.readouterr().err
    data.warn_once.cache_clear()
    same(source, tmp_path / "out.mkv", frames=2)
    assert capfd.readouterr().err == said == (
        f"{source}: its colours will be wrong: nothing here undoes matrix 14 (FFmpeg's number)\n")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_that_a_truncated_file_lacks_are_counted(student, run, tmp_path, monkeypatch, capsys, suffix):
    source = write_video(tmp_path / f"whole{suffix}", texture(48))
    if suffix == ".mp4":        # what says how many frames there are has to stand before them
        with (av.open(str(source)) as whole,
              av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as out):
            stream = out.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
        source = tmp_path / "first.mp4"
    content = source.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[:len(content) * 6 // 10])
    assert same(source, tmp_path / "out.mp4")[0::2] == (48, 0)
    count, _, lost = same(cut, tmp_path / "out.mp4")
    assert count < 40 and count + lost == 48
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", "--reconstruct", cut.name, "out.mp4"])
    monkeypatch.chdir(tmp_path)
    evaluate.main()
    assert capsys.readouterr().err == (
        f"cut{suffix} promises 48 frames: {lost} could not be read and are missing from out.mp4\n")


def times(path):
    with av.open(str(path)) as video:
        return [float(frame.time) for frame in video.decode(video=0)]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_that_an_avi_skips_take_time_and_are_none_that_is_lost(tmp_path, codec):
    stamps = [0, 1, 2, 10, 11, 30, 31, 32, 50]
    source = write_video(tmp_path / "in.avi", texture(9), stamps=stamps, codec=codec, options={"bf": "0"})
    assert same(source, tmp_path / "out.mp4")[0::2] == (9, 0)
    assert times(tmp_path / "out.mp4") == pytest.approx([n / 25 for n in stamps], abs=1e-3)
    assert data.count_frames(source) == 9
    content = source.read_bytes()
    source.write_bytes(content[:content.index(b"00dc", content.index(b"movi") + 4 + 600)])      # and without the index
    count, _, lost = same(source, tmp_path / "out.mp4")
    assert 0 < count < 9 and 0 < lost <= 51 - count and data.count_frames(source) == 51     # what its header says


@pytest.mark.parametrize("stamps, want", [
    ([0, 40, 40, 80, 120, 160], [0, 40, 60, 80, 120, 160]), ([0, 40, 40, 40, 80], [0, 40, 50, 65, 80]),
    ([0, 80, 40, 120, 160], [0, 80, 100, 120, 160]),
    ([0, 40, 80, 0, 40, 80], [0, 40, 80, 120, 160, 200]),                       # two recordings, one after the other
    ([None, None, None], [0, 40, 80]), ([-80, -40, 0], [0, 40, 80]), ([7, 40, None, 120], [7, 40, 80, 120])])
def test_a_stamp_that_does_not_rise_costs_no_other_its_time(stamps, want):
    assert [stamp for _, stamp, _ in evaluate.rising(((n, stamp, None) for n, stamp in enumerate(stamps)), 40)] == want


def test_of_two_processes_one_reconstructs(student, tmp_path):
    write_video(tmp_path / "in.mp4", texture(9))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", SCRIPT,
                           "--device", "cpu", "--reconstruct", "in.mp4", "out.mp4"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0 and done.stdout.count("out.mp4: 9 frames") == 1, done.stderr


def test_a_repeated_stamp_delays_no_later_frame(tmp_path):
    source = write_video(tmp_path / "in.mkv", texture(9), stamps=[0, 1, 1, 2, 3, 4, 4, 5, 6],
                         codec="libvpx", options={})
    same(source, tmp_path / "out.mkv")
    assert times(tmp_path / "out.mkv") == pytest.approx([0, 0.04, 0.06, 0.08, 0.12, 0.16, 0.18, 0.2, 0.24], abs=2e-3)


def test_frames_that_an_edit_list_hides_are_none_that_is_lost(tmp_path, capfd):
    source = write_video(tmp_path / "in.mp4", texture(20), stamps=range(-5, 15))
    assert same(source, tmp_path / "out.mp4")[0::2] == (15, 0)
    with pytest.raises(ValueError, match="no usable video"):
        VideoClips(source, 16, 32, train=False)
    assert "15 frames, 16 needed" in capfd.readouterr().err and len(VideoClips(source, 15, 32, train=False)[0][0]) == 15


def test_interlaced_video_is_said_once(tmp_path, capfd):
    source = write_video(tmp_path / "in.mp4", texture(9),
                         options={"flags": "+ildct+ilme", "x264-params": "interlaced=1"})
    line = f"{source} is interlaced: its frames are taken as they are, two fields in one picture\n"
    clips = VideoClips(source, 3, 64, train=False)
    clips[0], clips[0]
    assert capfd.readouterr().err == line
    data.warn_once.cache_clear()
    same(source, tmp_path / "out.mp4")
    assert capfd.readouterr().err == line


def test_damage_in_the_middle_costs_its_frames_only(tmp_path):
    source = write_video(tmp_path / "in.mp4", texture(48))
    content = bytearray(source.read_bytes())
    content[len(content) * 4 // 10:len(content) * 5 // 10] = b"\xff" * (len(content) * 5 // 10 - len(content) * 4 // 10)
    source.write_bytes(content)
    count, _, lost = same(source, tmp_path / "out.mp4")
    assert 24 < count <= 48 and count + lost == 48


def test_a_size_that_changes_on_the_way_is_brought_to_the_first(tmp_path):
    """As broadcasts and streams have it: two encodings, one after the other."""
    parts = [write_video(tmp_path / f"{n}.ts", texture(8, *size)) for n, size in enumerate([(64, 96), (96, 128)])]
    (tmp_path / "in.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    same(tmp_path / "in.ts", tmp_path / "out.mp4")
    assert ({(frame.height, frame.width) for frame, _ in film(tmp_path / "out.mp4")} == {(64, 96)}
            and len(film(tmp_path / "out.mp4")) == 16)


def test_a_rate_of_sound_that_aac_has_not_and_a_colon_in_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(Path("at 12:30.mkv"), texture(9), sound="pcm_s16le", sound_rate=37800)
    same("at 12:30.mkv", "out: 12.mp4")
    with av.open("file:out: 12.mp4") as video:
        assert (video.streams.audio[0].rate == 44100
                and sum(frame.samples for frame in video.decode(audio=0)) >= 9 / 25 * 44100)
    assert len(VideoClips(Path("at 12:30.mkv"), 9, 32, train=False)[0][0]) == 9


def test_a_broken_source_is_one_line_and_leaves_nothing(student, videos, tmp_path):
    for name in ("corrupt.mp4", "empty.mp4", "nowhere.mp4"):
        done = subprocess.run([sys.executable, SCRIPT, "--reconstruct", videos / name, "out.mp4"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 1 and done.stderr.startswith("error: ")
                and len(done.stderr.splitlines()) == 1), done.stderr
        assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".out*"))


# ----------------------------------------------------------------------------------------------------------
# generated video

@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with a diffusers pipeline of tiny random parts, whose latents have the embedded teacher's channels."""
    transformers, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel(
        {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "a", "boat", "dog"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    small = dict(block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                 layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)
    vae = diffusers.AutoencoderKLLTXVideo(latent_channels=32, **small)
    vae.latents_mean.normal_(), vae.latents_std.uniform_(0.5, 2)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=32, out_channels=32, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=1, caption_channels=16)
    pipe = diffusers.LTXPipeline(
        vae=vae, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def test_latents_are_generated_and_evaluated(student, run, videos, pipeline, i3d, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file
    (tmp_path / "prompts.txt").write_text("a boat\n\na dog\na dog\n")
    make = ["evaluate.py", "--device", "cpu", "--generate", "prompts.txt", "--pipeline", str(pipeline),
            "--latents", "latents", "--size", "256", "--frames", "9"]
    monkeypatch.setattr(sys, "argv", make)
    evaluate.main()
    files = sorted((tmp_path / "latents").iterdir())
    made = [load_file(file)["latents"] for file in files]
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert made[0].shape == (1, 32, 2, 8, 8) and not torch.equal(made[1], made[2])     # each its own seed

    # what a pipeline's own decoder is given, scaled and shifted
    import diffusers
    pipe = diffusers.LTXPipeline.from_pretrained(pipeline)
    given, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: given.append(z) or decode(z, *args, **kwargs)
    pipe("a boat", generator=torch.Generator().manual_seed(evaluate.HELD_OUT_SEED), height=256, width=256,
         num_frames=9, output_type="pt")
    assert torch.allclose(made[0], given[0], atol=1e-5)

    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    evaluate.main()                                 # goes on where it stopped
    assert "3 prompts, 1 to do" in capsys.readouterr().out
    assert torch.equal(load_file(files[1])["latents"], made[1]) and files[0].stat().st_mtime_ns == kept
    monkeypatch.setattr(sys, "argv", [*make, "--seed", "5"])
    with pytest.raises(ValueError, match="was made from .* name another folder"):
        evaluate.main()

    save_file({"latents": made[0][..., :4].contiguous()}, tmp_path / "latents" / "narrow.safetensors")
    save_file({"latents": made[0] * math.nan}, tmp_path / "latents" / "not a number.safetensors")
    save_file({"latents": torch.cat(made)}, tmp_path / "latents" / "several.safetensors")
    (tmp_path / "latents" / "text.safetensors").write_text("no latents")
    results = run("--latents", "latents", "--data", "videos", "--i3d", i3d, "--metrics", "psnr", "fvd")
    assert results["clips"] == 3 and {
        "narrow.safetensors", "not a number.safetensors", "several.safetensors", "text.safetensors",
        "corrupt.mp4"} <= set(results["skipped"])
    detect, teacher = evaluate.load_i3d(i3d, "cpu", 8), evaluate.load_teacher("tiny")
    clips = VideoClips(videos, 8, 64, train=False)
    with torch.inference_mode():
        real = detect(torch.stack([clips[i] for i, name in enumerate(clips.files) if name != "corrupt.mp4"]))
        decoded = teacher.decode(torch.cat(made)), TurboVAED.from_pretrained(student)(torch.cat(made))
        for row, video in zip(results["rows"], decoded):
            assert row["fvd"] == pytest.approx(frechet_distance(detect(video), real), rel=1e-4)
        assert (results["rows"][1]["psnr"] == pytest.approx(psnr(*decoded).mean().item(), abs=1e-4)
                and results["rows"][0]["psnr"] is None)
    assert "FVD to 6 real clips of videos" in capsys.readouterr().out


def test_a_second_data_set_does_not_overwrite_the_results_of_the_first(student, run, videos, tmp_path):
    flags = ["--size", 64, "--metrics", "psnr"]
    made_up = run("--clips", 1, *flags)
    assert run("--data", "videos", *flags)["data"] == "videos"
    assert sorted(path.relative_to(tmp_path / "out/demo") for path in (tmp_path / "out").rglob("results.json")) == [
        Path("results.json"), Path("videos/results.json")]
    assert json.loads((tmp_path / "out/demo/results.json").read_text()) == made_up
    for other in (["--data", "videos"], ["--against", "teacher"], ["--student", SHIPPED]):
        with pytest.raises(ValueError, match="out/demo/results.json is of .*: name another folder with --out"):
            run(*other, *flags, "--out", "out/demo")
    weights = tmp_path / "teacher.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(TINY_WEIGHTS).items()}, weights)
    for other, said in ((["--clips", 2], r"clips_chosen 1 \(now 2\)"),
                        (["--size", 32], r"height 64 \(now 32\), width 64"),
                        (["--seed", 3], r"seed 10000 \(now 3\)"), (["--frames", 4], r"frames 8 \(now 4\)"),
                        (["--dtype", "bfloat16"], "dtype float32"),
                        (["--teacher-weights", weights], "teacher_weights ")):
        with pytest.raises(ValueError, match=f"out/demo/results.json is of {said}.*: name another folder with --out"):
            run("--clips", 1, *flags, *other)
    assert json.loads((tmp_path / "out/demo/results.json").read_text()) == made_up
    run("--clips", 1, *flags, "--batch", 2)                 # the same again is no other's


def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_all_that_was_there(student, run, tmp_path):
    flags = ["--student", "out/demo", "--clips", "1", "--frames", "8", "--size", "64", "--metrics", "psnr",
             "--device", "cpu"]
    held = lambda: {file.name: file.read_bytes() for file in student.parent.iterdir()}
    run(*flags)
    before = held()
    for name, limit in (("compare.png", 2000), ("compare.mp4", len(before["compare.png"]) + 1000)):
        code = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " \
               f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
        assert done.returncode == 1 and done.stderr == f"error: {student.parent / name}: File too large\n", done.stderr
        assert held() == before
    (student.parent / "results.md").unlink()
    (student.parent / "results.md").mkdir()
    with pytest.raises(OSError, match="results.md: it is a folder"):
        run(*flags)


def test_what_is_missing_or_cannot_be_written_is_found_before_a_student_is_loaded(
        student, run, videos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("\n \n")
    monkeypatch.setattr(TurboVAED, "from_pretrained", None)
    generate = ["--pipeline", "nowhere", "--latents", "latents"]
    for flags, message in (
            (["--out", "file"], "nothing can be written to file: .*no folder"),
            (["--out", "file/x"], "nothing can be written to file/x"),
            (["--reconstruct", "nowhere.mp4", "out.mp4"], "no video nowhere.mp4"),
            (["--reconstruct", "videos/plain.mp4", "file/out.mp4"], "nothing can be written to file"),
            (["--reconstruct", "videos/empty.mp4", "out.mp4"], "empty.mp4: "),
            (["--data", "nowhere"], "no videos called nowhere"), (["--latents", "nowhere"], "no latents in nowhere"),
            (["--generate", "nowhere.txt", *generate], "no file nowhere.txt"),
            (["--generate", "prompts.txt", *generate], "holds no prompt")):
        with pytest.raises((ValueError, OSError), match=message):
            run(*flags)
    assert not (tmp_path / "latents").exists()


def test_a_run_called_input_is_not_the_input(run, tmp_path):
    TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "input", {"teacher": "tiny"})
    rows = run("--student", "input", "--clips", 1, "--size", 64, "--metrics", "psnr")["rows"]
    assert [row["model"] for row in rows] == ["tiny (teacher)", "./input"] and 5 < rows[1]["psnr"] < 30


def test_saved_latents_of_the_shape_that_most_have_are_evaluated(student, run, tmp_path):
    from safetensors.torch import save_file
    (tmp_path / "latents").mkdir()
    shapes = {"a": (1, 32, 2, 5, 4), "b": (1, 32, 2, 4, 4), "c": (1, 8, 2, 4, 4), "d": (1, 32, 2, 4, 4),
              "e": (1, 32, 0, 4, 4), ".hidden": (1, 32, 2, 4, 4)}
    for name, shape in shapes.items():
        save_file({"latents": torch.randn(shape)}, tmp_path / "latents" / f"{name}.safetensors")
    results = run("--latents", "latents", "--metrics", "psnr")
    assert [clip["clip"] for clip in results["per_clip"]] == ["b.safetensors", "d.safetensors"]
    assert (sorted(results["skipped"]) == ["a.safetensors", "c.safetensors", "e.safetensors"]
            and "no" not in results["skipped"])


def test_memory_that_runs_out_is_one_line(tmp_path):
    """On a CPU, where PyTorch's allocator raises a RuntimeError."""
    code = ("import runpy, sys, torch; sys.argv = ['evaluate.py', '--clips', '1', '--device', 'cpu']\n"
            "torch.nn.Module.__call__ = lambda *_, **__: torch.empty(1 << 50)\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert done.returncode == 1 and done.stderr == (
        "error: out of memory: smaller --batch, --size or --frames, or --dtype bfloat16, need less\n")


def test_speeds_on_a_mac_wait_for_its_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    latents = type("Latents", (), {"device": torch.device("mps")})()
    evaluate.decode_speeds({"student": lambda latents: torch.zeros(1, 3, 4, 1, 1)}, latents)
    assert len(waited) == 2 * (evaluate.WARM_UP + evaluate.ROUNDS)


def test_a_picture_wider_than_h264_is_made_narrower(tmp_path):
    evaluate.write_film(tmp_path / "film.mp4", [np.zeros((32, 16500, 3), np.uint8)], rate=1, seconds=1)
    assert [(frame.height, frame.width) for frame, _ in film(tmp_path / "film.mp4")] == [(16, 8250)]
    assert evaluate.tile(torch.full((1, 3, 40, 4000), 0.5)).shape == (1, 13, 1333, 3)       # and held small
    with pytest.raises(ValueError, match="16384 pixels a side"):
        evaluate.add_h264(None, 25, 32, 16500)


def test_a_stop_leaves_no_half_film(student, tmp_path):
    source = write_video(tmp_path / "in.mp4", texture(400))
    process = subprocess.Popen([sys.executable, SCRIPT, "--device", "cpu", "--reconstruct", source, "out.mp4"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 1 and process.stderr.read() == "error: stopped\n" and not list(tmp_path.glob("*out.*"))


def test_wrong_input_gets_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--student", "nowhere"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: nowhere: no such file or folder\n"


@pytest.mark.parametrize("args, message", [
    (["--data", "davis"], "put them into the folder data/davis, .* or by --download"),
    (["--data", "synthetic", "--size", "64x32"], "made-up video is square"),
    (["--latents", "nowhere"], "no latents in nowhere"),
    (["--device", "gpu"], "--device gpu: PyTorch sees cpu"), (["--device", "cuda:99"], "--device cuda:99"),
    (["--student", "hustvl/Turbo-VAED"], "if it is a hub id, say which student"),
    (["--generate", "prompts.txt"], "--generate needs --pipeline"),
    (["--reconstruct", "a.mp4", "b.webm"], "writes .mp4, .mkv or .mov"),
    (["--reconstruct", "a.mp4", "a.mp4"], "cannot write over its source"),
    (["--decode", "a.safetensors", "b.gif"], "--decode writes .mp4, .mkv or .mov"),
    (["--decode", "a.safetensors", "b.mp4"], "no file a.safetensors"),
    (["--reconstruct", "a.mp4", "b.mp4", "--out", "x"], "--reconstruct goes without --out"),
    (["--reconstruct", "a.mp4", "b.mp4", "--metrics", "psnr"], "--reconstruct goes without --metrics"),
    (["--decode", __file__, "b.mp4"], "reads .safetensors"), (["--fps", "24"], "--fps is of --decode only"),
    (["--decode", "a.safetensors", "b.mp4", "--latents", "x"], "--decode goes without --latents"),
    (["--decode", "a.safetensors", "b.mp4", "--teacher-weights", "x"], "--decode goes without --teacher-weights"),
    (["--fps", "30"], "--fps is of --decode only"), (["--pipeline", "x"], "--pipeline is of --generate only"),
    (["--data", "vidgen", "--download"], "--download fetches davis and ucf101; vidgen is to be had from"),
    (["--frames", "9"], "frames = 9"),
    (["--teacher", "dc", "--teacher-weights", "nowhere"], "no teacher weights"),
])
def test_wrong_arguments_say_what_would_be_right(student, run, args, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [
    "--clips 0", "--frames 0", "--batch 0", "--workers -1", "--seed -1", "--threads 0", "--size 0", "--batch two",
    "--fps 0"])
def test_numbers_that_mean_nothing_are_refused_before_anything_is_loaded(run, capsys, flags):
    with pytest.raises(SystemExit) as end:
        run(*flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and flags.split()[0] in lines[1]


def test_a_student_of_other_latents_is_refused_before_its_teacher_is_fetched(student, run, monkeypatch):
    config = replace(CONFIGS["tiny"], drop_first=True)
    other = TurboVAED(config).save_pretrained(student.parent.parent / "other")
    monkeypatch.setattr(evaluate, "load_teacher", None)
    with pytest.raises(ValueError, match="out/other does not fit the tiny teacher: it drops first frames: "
                                         "2 latent frames would be 5 frames, not 8"):
        run("--student", student, other)
    with pytest.raises(ValueError, match="out/demo .* made for latents of tiny, not cog"):
        run("--student", student, "--teacher", "cog")


def test_a_student_that_does_not_say_whose_it_is_is_assumed_to_fit(student, run, tmp_path, capsys):
    TurboVAED(CONFIGS["tiny"]).save_pretrained(tmp_path / "silent.safetensors")
    run("--student", student, "silent.safetensors", "--clips", 1, "--size", 64)
    assert ("silent.safetensors does not say whose latents it was made for: assumed are those of the tiny teacher"
            in capsys.readouterr().out)


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no student is shipped yet")
def test_without_a_run_the_shipped_student_is_evaluated(run, capsys):
    results = run("--clips", 1, "--size", 64)
    assert "no student in out/: the shipped one" in capsys.readouterr().out.splitlines()[0]
    assert results["rows"][1]["model"].endswith("assets/tiny_student.safetensors")


@pytest.mark.parametrize("tensors", [{"latents": (1, 32, 11, 3, 4), "other": (2,)}, {"z": (32, 11, 3, 4)}])
def test_saved_latents_become_a_video(tmp_path, monkeypatch, capsys, tensors):
    torch.manual_seed(0)
    saved = {name: torch.randn(shape) for name, shape in tensors.items()}
    save_file(saved, tmp_path / "z.safetensors")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", "--student", str(SHIPPED),
                                      "--fps", "30000/1001", "--decode", str(tmp_path / "z.safetensors"),
                                      str(tmp_path / "new" / "out.mp4")])
    evaluate.main()
    assert "44 frames" in capsys.readouterr().out
    with av.open(str(tmp_path / "new" / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        got = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    latents = next(iter(saved.values())).reshape(1, 32, 11, 3, 4)
    with torch.no_grad():
        want = evaluate.frames_of(TurboVAED.from_pretrained(SHIPPED)(latents))
    assert got.shape == (44, 24, 32, 3)
    errors = (got.permute(0, 3, 1, 2) / 255 - want).abs().mean((1, 2, 3))
    others = (got.permute(0, 3, 1, 2) / 255 - want.roll(1, 0)).abs().mean((1, 2, 3))
    assert errors.max() < 0.1 and (errors < others).all()


@pytest.mark.parametrize("tensors, says", [
    ({"latents": (2, 32, 1, 2, 2)}, "(1, C, t, h, w)"), ({"a": (32, 1, 2, 2), "b": (1,)}, "a, b"),
    ({"latents": (8, 1, 2, 2)}, "(B, 32, t, h, w)"), (None, "z.safetensors"),
    ({}, "holds no tensor"), ({"latents": (16, 1, 2, 0)}, "(C, t, h, w)"),
    ({"int32": (16, 1, 2, 2)}, "I32"), ({"complex64": (16, 1, 2, 2)}, "floating")])
def test_latents_that_are_none_are_one_line(tmp_path, tensors, says):
    source, target = tmp_path / "z.safetensors", tmp_path / "out.mp4"
    kind = lambda name: getattr(torch, name, torch.float32)
    if tensors is None:
        source.write_text("no")
    else:
        save_file({name: torch.zeros(shape, dtype=kind(name)) for name, shape in tensors.items()}, source)
    with pytest.raises(ValueError) as error:
        evaluate.decode_latents(TurboVAED(CONFIGS["tiny"]), source, target, 24, torch.device("cpu"), torch.float32)
    assert says in str(error.value) and "\n" not in str(error.value) and list(tmp_path.iterdir()) == [source]
