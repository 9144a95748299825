"""Distillation as a user runs it: from the command line, on the embedded teacher, in float32 on a CPU."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import TurboVAED

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--size", "16", "--batch", "4", "--micro-batch", "2", "--val-clips", "2", "--dtype", "float32", "--log-every", "1", "--workers", "0"]


def command(out, *flags):
    return [str(ROOT / "train.py"), *SMALL, "--out", str(out), *map(str, flags)]


def run(*arguments, launcher=(), check=True):
    result = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not check or result.returncode == 0, result.stderr
    return result


def log(out, key="loss"):
    return {line["step"]: line[key] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line}


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(*command(out, "--steps", 8, "--eval-every", 4))
    return out


def test_a_run_leaves_what_it_promises_and_the_student_improves(whole):
    assert {p.name for p in whole.iterdir()} == {"student.safetensors", "checkpoint.pt", "log.jsonl", "curves.png",
                                                  "samples.png", "args.json"}
    student = TurboVAED.from_pretrained(whole)
    assert student.metadata["teacher"] == "tiny" and student.metadata["step"] == "8"
    assert list(log(whole)) == list(range(1, 9)) and list(log(whole, "psnr")) == [4, 8]
    assert log(whole)[8] < log(whole)[1]


def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path):
    """Killed between two checkpoints, the run goes on from the last one and ends with the same weights, averages,
    optimiser state and log."""
    process = subprocess.Popen([sys.executable, *command(tmp_path, "--steps", 8, "--eval-every", 4)],
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        lines = (tmp_path / "log.jsonl").read_text().count("\n") if (tmp_path / "log.jsonl").exists() else 0
        if (tmp_path / "checkpoint.pt").exists() and lines >= 6:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    run(*command(tmp_path, "--steps", 8, "--eval-every", 4, "--resume"))
    a, b = checkpoint(whole), checkpoint(tmp_path)
    for part in ("objective", "ema", "optimizers", "step"):
        assert same(a[part], b[part]), part
    assert log(whole) == log(tmp_path)


def test_two_processes_equal_one(whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--standalone")
    run(*command(tmp_path, "--steps", 8, "--eval-every", 4), launcher=launcher)
    one, two = log(whole), log(tmp_path)
    assert one.keys() == two.keys()
    assert max(abs(one[s] - two[s]) for s in one) < 1e-4 * one[1]
    assert abs(log(whole, "psnr")[8] - log(tmp_path, "psnr")[8]) < 0.01


def test_it_trains_on_video_files_and_holds_some_out(tmp_path):
    import av
    import numpy as np
    for i in range(3):
        with av.open(str(tmp_path / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height = 48, 32
            for t in range(12):
                image = np.full((32, 48, 3), 40 * i + 8 * t, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    (tmp_path / "empty.mp4").touch()
    result = run(*command(tmp_path / "out", "--data", tmp_path, "--steps", 2))
    assert "1 held-out videos" in result.stdout and result.stderr.count("empty.mp4") >= 1


@pytest.mark.parametrize("flags, words", [
    (["--frames", "9"], "8 or 12"),
    (["--batch", "3"], "cannot be divided"),
    (["--data", "nowhere"], "nowhere"),
    (["--config", "ltx"], "teacher has 16"),
    (["--resume"], "nothing to resume"),
    (["--align", "up9"], "up9"),
])
def test_wrong_input_gets_one_line(tmp_path, flags, words):
    result = run(*command(tmp_path, "--steps", "1", *flags), check=False)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_finished_run_is_not_overwritten_and_not_resumed_with_other_settings(whole):
    result = run(*command(whole, "--steps", 8), check=False)
    assert result.returncode == 1 and "--resume" in result.stderr
    result = run(*command(whole, "--steps", 9, "--resume", "--lr", 1), check=False)
    assert result.returncode == 1 and "--lr" in result.stderr


def test_the_embedded_path_imports_no_diffusers(tmp_path):
    code = f"import sys; sys.argv = {command(tmp_path, '--steps', 1)!r}; import runpy; runpy.run_path(sys.argv[0], run_name='__main__'); " \
           "assert not {'diffusers', 'lpips', 'coremltools'} & set(sys.modules)"
    run("-c", code)


def test_muon_steps_along_all_directions_alike():
    """Singular values of the step about 1 however unlike the gradient's are; depthwise weights and biases stay with AdamW."""
    from train import Muon, make_optimizers
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6)).Q for n in (6, 54))
    weight = torch.nn.Parameter(torch.zeros(6, 2, 3, 3, 3))
    weight.grad = (u @ torch.diag(torch.logspace(0, -2, 6)) @ v.T).reshape(weight.shape)
    Muon([weight], lr=1.0).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert values.max() < 1.3 and values.min() > 0.5
    direction = (weight.detach().flatten(1) * weight.grad.flatten(1)).sum()
    assert direction < 0                                        # downhill

    module = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 3, groups=4), torch.nn.Conv3d(4, 8, 1))
    adamw, muon = make_optimizers(module, 1e-3, 0.02, 0.0)
    assert [p is module[1].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 3 and len(make_optimizers(module, 1e-3, 0.0, 0.0)) == 1
