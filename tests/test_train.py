"""Distillation as a user runs it: from the command line, on the embedded teacher, in float32 on a CPU."""
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from model import TurboVAED
from train import best_step, converged, damping

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--size", "16", "--batch", "4", "--micro-batch", "2", "--val-clips", "2", "--dtype", "float32", "--log-every", "1", "--workers", "0"]


def command(out, *flags):
    return [str(ROOT / "train.py"), *SMALL, "--out", str(out), *map(str, flags)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--standalone")


def run(*arguments, launcher=(), check=True, **options):
    result = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300, env=ONE_THREAD, **options)
    assert not check or result.returncode == 0, result.stderr
    return result


def fails_in_one_line(result, *words):
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(word in line for word in words), line


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
    assert {p.name for p in whole.iterdir()} == {"student.safetensors", "best.safetensors", "checkpoint.pt", "log.jsonl", "curves.png",
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
    for part in ("model", "ema", "optimizers", "step"):
        assert same(a[part], b[part]), part
    assert log(whole) == log(tmp_path)


def test_two_processes_equal_one(whole, tmp_path):
    run(*command(tmp_path, "--steps", 8, "--eval-every", 4), launcher=TWO)
    one, two = log(whole), log(tmp_path)
    assert one.keys() == two.keys()
    assert max(abs(one[s] - two[s]) for s in one) < 1e-4 * one[1]
    assert abs(log(whole, "psnr")[8] - log(tmp_path, "psnr")[8]) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Video files, the teacher's cache, stage 2.

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 12 frames, and an empty file."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height = 48, 32
            for t in range(12):
                image = np.full((32, 48, 3), 40 * i + 8 * t, np.uint8)
                image[8:24, 2 * t:2 * t + 16] = 255 - 60 * i
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    (folder / "empty.mp4").touch()
    return folder


def staged_command(out, cache, videos, *flags):
    """Four steps of stage 1 and six of stage 2, on a cache of what the teacher makes of 2 x 12 clips."""
    return command(out, "--data", videos, "--cache", cache, "--cache-crops", 12, "--steps", 10, "--stage2", "auto", "--stage2-steps", 6,
                   "--disc-width", 8, "--eval-every", 2, "--warmup", 2, *flags)


@pytest.fixture(scope="module")
def staged(tmp_path_factory, videos):
    folder = tmp_path_factory.mktemp("staged")
    result = run(*staged_command(folder / "out", folder / "cache", videos))
    assert "1 held-out videos" in result.stdout and result.stderr.count("empty.mp4") >= 1
    assert "24 entries of" in result.stdout and "step 4: stage 2 begins" in result.stdout
    return folder


def test_the_discriminator_lives_in_stage_2_only(staged):
    out = staged / "out"
    assert list(log(out)) == list(range(1, 11)) and list(log(out, "psnr")) == [2, 4, 6, 8, 10]
    assert list(log(out, "discriminator")) == list(range(5, 11))
    assert log(out, "weight")[5] == 0 < log(out, "weight")[6]        # measured at the first step of stage 2, used from the next on
    saved = checkpoint(out)
    assert saved["start2"] == 4 and len(saved["optimizers"]) == 3 and saved["adaptive_weight"] > 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert TurboVAED.from_pretrained(out / "best.safetensors").metadata["step"] == str(best_step(lines, 4, 0.3))


def test_a_cached_run_trains_on_the_teachers_numbers(staged, videos, tmp_path):
    """The first entries of the cache, against the teacher itself, and a whole run against one that runs the teacher."""
    from data import VideoClips
    from safetensors.torch import load_file
    from teachers import load_teacher
    teacher, clips = load_teacher("tiny"), VideoClips(videos, 8, 16, train=True, seed=0).subset([1, 2])
    for m in (0, 1, 23):
        entry, video = load_file(staged / "cache" / "00000" / f"{m:08d}.safetensors"), clips[m]
        torch.testing.assert_close(entry["video"].float() / 127.5 - 1, video)
        latents = teacher.encode(video[None])
        torch.testing.assert_close(entry["latents"], latents[0].half(), rtol=2e-3, atol=1e-3)
        for block, x in teacher.features(latents, ("mid", "up0")).items():
            torch.testing.assert_close(entry[f"features.{block}"], x[0].half(), rtol=2e-3, atol=2e-3)
        assert set(entry) == {"video", "latents", "kl", "features.mid", "features.up0"}


def test_the_cache_is_made_once_and_mended_where_it_is_damaged(staged, videos, tmp_path):
    cache = shutil.copytree(staged / "cache", tmp_path / "cache")
    whole = (cache / "00000" / "00000007.safetensors").read_bytes()
    (cache / "00000" / "00000007.safetensors").write_bytes(whole[:len(whole) // 2])
    (cache / "00000" / "00000011.safetensors").unlink()
    result = run(*staged_command(tmp_path / "out", cache, videos, "--stage2", "off", "--steps", 1))
    assert ", 2 to make" in result.stdout
    assert (cache / "00000" / "00000007.safetensors").read_bytes() == whole
    assert sum(1 for _ in cache.rglob("*")) == 26 and not list(cache.rglob("*.partial*"))


@pytest.mark.parametrize("flags, words", [
    (("--cache-dtype", "bfloat16"), ("dtype float16", "bfloat16")),
    (("--frames", "4"), ("frames 8", "4")),
    (("--seed", "1"), ("seed 0", "1")),
    (("--teacher-weights", "random"), ("weights",)),
])
def test_a_cache_of_other_settings_is_refused(staged, videos, tmp_path, flags, words):
    fails_in_one_line(run(*staged_command(tmp_path, staged / "cache", videos, *flags), check=False), "cache", *words)


def test_a_cache_serves_runs_that_align_less_and_refuses_those_that_align_more(tmp_path):
    from data import CachedClips
    cache = CachedClips(tmp_path, 2, {"teacher": "tiny"}, blocks=("mid", "up0"))
    for m in range(2):
        cache.put(m, torch.zeros(3, 4, 8, 8), {"latents": torch.full((16, 1, 1, 1), m), "features.mid": torch.ones(2), "features.up0": torch.ones(2)})
    less = CachedClips(tmp_path, 2, {"teacher": "tiny"}, blocks=("up0",))
    assert set(less[0]) == {"video", "latents", "features.up0"}
    assert all(sorted(less[n]["latents"][0].item() for n in (2 * epoch, 2 * epoch + 1)) == [0, 1] for epoch in range(5))
    with pytest.raises(ValueError, match="holds features of mid up0, this run aligns up1"):
        CachedClips(tmp_path, 2, {"teacher": "tiny"}, blocks=("up1",))
    with pytest.raises(ValueError, match="does not fit"):
        cache.put(0, torch.zeros(3, 4, 8, 8), {"latents": torch.full((16, 1, 1, 1), 1e6)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="no cache's manifest"):
        CachedClips(tmp_path / "other", 2, {})


def test_a_cache_file_that_goes_bad_in_a_run_stops_it_in_one_line(staged, videos, tmp_path):
    """Found when it is read, in a loader process: what the first step needs is replaced between the check and the step."""
    cache = shutil.copytree(staged / "cache", tmp_path / "cache")
    for path in (cache / "00000").iterdir():
        path.write_bytes(bytes(path.stat().st_size))                # the right size, and nothing in it
    result = run(*staged_command(tmp_path / "out", cache, videos, "--workers", 1), check=False)
    fails_in_one_line(result, ".safetensors cannot be read", "--resume")


def test_two_processes_equal_one_in_stage_2(staged, videos, tmp_path):
    """They fill the cache together, too."""
    run(*staged_command(tmp_path / "out", tmp_path / "cache", videos), launcher=TWO)
    for path in (staged / "cache" / "00000").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / "00000" / path.name).read_bytes()
    for key in ("loss", "discriminator", "weight", "psnr"):
        one, two = log(staged / "out", key), log(tmp_path / "out", key)
        assert one.keys() == two.keys() and max(abs(one[s] - two[s]) for s in one) < 2e-4 * max(1, max(one.values())), key
    one, two = checkpoint(staged / "out"), checkpoint(tmp_path / "out")
    for part in ("ema", "discriminator"):
        for key in one[part]:
            torch.testing.assert_close(two[part][key], one[part][key], rtol=1e-3, atol=2e-4)


def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(staged, videos, tmp_path):
    """SIGKILL at KILLS (3; `KILLS=20 pytest -k random_moments` for all kinds many times) moments: while the cache is filled, while
    a checkpoint is written, between the last step before a validation and its end, as stage 2 begins, or any time."""
    out, cache, rng = tmp_path / "out", tmp_path / "cache", random.Random(os.environ.get("KILLS", "3"))
    arguments = [sys.executable, *staged_command(out, cache, videos)]
    lines = lambda: (out / "log.jsonl").read_text().split("\n")[:-1] if (out / "log.jsonl").exists() else []
    kills, wanted = 0, int(os.environ.get("KILLS", 3))
    while kills < wanted:
        kind, deadline, entry = rng.choice(("cache", "checkpoint", "validation", "switch", "any")), time.time() + rng.uniform(0, 15), rng.randrange(24)
        if kind == "cache":
            shutil.rmtree(cache, ignore_errors=True)
        known = len(lines())
        process = subprocess.Popen(arguments + ["--resume"] * (out / "args.json").exists(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   env=ONE_THREAD)
        os.set_blocking(process.stdout.fileno(), False)
        printed = b""
        while process.poll() is None:
            printed += process.stdout.read() or b""
            if kind == "cache" and (cache / "00000" / f"{entry:08d}.safetensors").exists() \
                    or kind == "checkpoint" and (out / "checkpoint.pt.partial").exists() \
                    or kind == "validation" and len(lines()) > known and json.loads(lines()[-1])["step"] % 2 == 0 \
                    or kind == "switch" and b"stage 2 begins" in printed \
                    or kind == "any" and time.time() > deadline:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.0005)
        process.wait()
        process.stdout.close()
        if process.returncode == 0:                             # it came to its end first: begin again
            same_run(staged / "out", out)
            shutil.rmtree(out)
    run(*arguments[1:], *["--resume"] * (out / "args.json").exists())
    same_run(staged / "out", out)


def same_run(one, two):
    a, b = checkpoint(one), checkpoint(two)
    for part in ("model", "ema", "optimizers", "discriminator", "adaptive_weight", "step", "start2"):
        assert same(a[part], b[part]), part
    for key in ("loss", "psnr", "sharpness"):
        assert log(one, key) == log(two, key)
    best = [TurboVAED.from_pretrained(out / "best.safetensors") for out in (one, two)]
    assert same(*[b.state_dict() for b in best]) and best[0].metadata == best[1].metadata
    assert not list(two.glob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong.

def test_a_loss_that_is_not_finite_names_step_term_and_clips_and_keeps_the_checkpoint(staged, videos, tmp_path):
    out = shutil.copytree(staged / "out", tmp_path / "out")
    saved = checkpoint(out)
    saved["model"]["student.conv_out.conv.bias"].fill_(math.nan)
    saved["step"], saved["start2"] = 8, 4
    torch.save(saved, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()
    result = run(*staged_command(out, staged / "cache", videos, "--resume"), check=False)
    fails_in_one_line(result, "l1 is nan at step 9", "00000/", ".safetensors", "checkpoint.pt")
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_keeps_the_checkpoint(whole, tmp_path):
    """A limit on the size of files stands for the disk: writing the checkpoint fails halfway."""
    out = shutil.copytree(whole, tmp_path / "out")
    before = (out / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    result = run(*command(out, "--steps", 12, "--eval-every", 4, "--resume"), check=False, preexec_fn=limit)
    fails_in_one_line(result, "checkpoint.pt cannot be written (File too large)", "still is")
    assert (out / "checkpoint.pt").read_bytes() == before and not (out / "checkpoint.pt.partial").exists()


def test_a_cache_too_large_for_the_disk_is_not_begun(tmp_path, monkeypatch):
    from data import CachedClips
    cache = CachedClips(tmp_path / "cache", 10, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 50, 50))
    cache.check_room(5, 10)
    with pytest.raises(OSError, match="GB more"):
        cache.check_room(6, 10)


def test_videos_that_turn_unreadable_in_a_run_stop_it_in_one_line(videos, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "videos")
    process = subprocess.Popen([sys.executable, *command(tmp_path / "out", "--data", folder, "--steps", 1000, "--workers", 1)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    while process.poll() is None and not log_lines(tmp_path / "out"):
        time.sleep(0.01)
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    stderr = process.communicate(timeout=120)[1]
    fails_in_one_line(subprocess.CompletedProcess([], process.returncode, stderr=stderr), "none of the 2 videos", "can be decoded")


def log_lines(out):
    return len((out / "log.jsonl").read_text()) if (out / "log.jsonl").exists() else 0


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
    fails_in_one_line(result, words)
    assert result.stderr.count("\n") == 1


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


# ---------------------------------------------------------------------------------------------------------------------
# Rules.

def validations(*psnrs, every=10, **more):
    return [{"step": every * (i + 1), "psnr": psnr} | {key: values[i] for key, values in more.items()} for i, psnr in enumerate(psnrs)]


def test_stage_1_has_converged_when_the_last_validations_gained_little():
    assert not converged(validations(20, 21, 22), 3, 0.05)           # too few to say
    assert not converged(validations(20, 20.01, 20.02, 20.06), 3, 0.05)
    assert converged(validations(20, 20.01, 20.02, 20.04), 3, 0.05)
    assert converged(validations(20, 19, 18, 19.9), 3, 0.05)
    assert not converged(validations(20, 20.01, 20.02, 20.04) + [{"step": 41, "loss": 1.0}] + validations(20.2), 3, 0.05)


def test_the_adversarial_weight_is_damped_while_psnr_lies_too_low():
    log = validations(20, 22, 21.6, 21.5, 21.8, 21.9)
    assert damping(log, None, 0.3) == 1 and damping(log, 20, 0.3) == 0.25 * 1.25 ** 2
    assert damping(log[:4], 20, 0.3) == 0.25 and damping(log, 20, 1.0) == 1
    assert damping(validations(5, 4), 0, 0.3) == 1                   # no stage 1 to compare with


def test_the_best_is_of_highest_psnr_then_the_sharpest_within_the_drop():
    log = validations(20, 22, 21.9, 21.8, 21.5, sharpness=[0.2, 0.5, 0.7, 0.8, 1.0])
    assert best_step(log, None, 0.3) == 20 and best_step(log[:1], None, 0.3) == 10
    assert best_step(log, 20, 0.3) == 40 and best_step(log, 20, 1.0) == 50
    log = validations(20, 22, 21.9, 21.8, sharpness=[1, 1, 1, 1], val_lpips=[0.5, 0.1, 0.3, 0.2])
    assert best_step(log, 20, 0.3) == 40                             # stage 2's, since that is what it is for


def test_profile_tells_where_the_time_goes_and_leaves_nothing_behind(tmp_path):
    result = run(*command(tmp_path / "out", "--steps", 12, "--stage2", 2, "--profile", 2, "--price", 3), cwd=tmp_path)
    shares = [float(line.split()[-2]) for line in result.stdout.splitlines() if " ms a step" in line]
    assert len(shares) == 6 and abs(sum(shares) - 100) < 0.5
    assert "samples/s" in result.stdout and "the whole recipe, 48 samples" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["profile.png"]
