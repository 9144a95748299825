"""Each command once, on a video made here: does it run with this Python and what pip brought for it?

    make smoke PYTHON=python3.13 VENV=.venv-3.13
"""
import platform
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "av", "diffusers", "numpy", "coremltools", "torchmetrics")


def write_video(path, seed, frames=24, size=64):
    """H.264 of noise that moves by a pixel a frame."""
    image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(image, i, 1), format="rgb24")))
        container.mux(stream.encode())


def main():
    print(f"Python {platform.python_version()}:", ", ".join(f"{name} {version(name)}" for name in PACKAGES), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        videos, run = Path(folder, "videos"), Path(folder, "run")
        videos.mkdir()
        for seed in range(3):
            write_video(videos / f"{seed}.mp4", seed)
        commands = (
            f"train.py --data {videos} --size 32 --frames 8 --batch 2 --micro-batch 2 --steps 4 --eval-every 4 "
            f"--workers 2 --val-clips 1 --out {run}",
            f"evaluate.py --data {videos} --size 32 --frames 8 --metrics psnr ssim temporal --student {run} --out {run}",
            f"evaluate.py --reconstruct {videos}/0.mp4 {folder}/reconstructed.mp4 --student {run}",
            f"export.py --student {run} --size 32x32 --latent-frames 2 --out {run}",
        )
        for command in commands:
            start = time.perf_counter()
            subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
            print(f"{command.split()[0]}: {time.perf_counter() - start:.0f} s", flush=True)
        for file in (run / "student.safetensors", run / "results.json", Path(folder, "reconstructed.mp4"),
                     next(run.glob("*.mlpackage"))):
            assert file.exists(), file
    print("all commands ran")


if __name__ == "__main__":
    main()
