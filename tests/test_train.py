"""Distillation as a user runs it: from the command line, on the embedded teacher, in float32 on a CPU."""
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train
from conftest import run_script
from data import CachedClips
from losses import Objective
from model import TurboVAED
from teachers import load_teacher
from test_data import write
from train import best_line, complete, converged, guard, parse_args

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--size", "16", "--frames", "8", "--batch", "4", "--micro-batch", "2", "--val-clips", "2",
         "--dtype", "float32", "--log-every", "1", "--workers", "0"]


def command(out, *flags):
    return [str(ROOT / "train.py"), *SMALL, "--out", str(out), *map(str, flags)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--standalone")


def run(script, *arguments, launcher=(), check=True, **options):
    if launcher or options:
        result = subprocess.run([sys.executable, *launcher, script, *arguments],
                                capture_output=True, text=True, timeout=300, env=ONE_THREAD, **options)
    else:
        result = run_script(Path(script).stem, *arguments)
    assert not check or result.returncode == 0, result.stderr
    return result


def log_lines(out):
    """Lines after the first, which names the held-out videos."""
    return (out / "log.jsonl").read_text().count("\n") - 1 if (out / "log.jsonl").exists() else 0


def begin(out, *arguments, lines=1, **options):
    """A process of its own, which has written so many more lines of the log in the folder `out`."""
    lines += log_lines(out)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ONE_THREAD, **options)
    while process.poll() is None and log_lines(out) < lines:
        time.sleep(0.001)
    return process


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: what it takes to reach into one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda out, *flags: train.main(parse_args(command(out, *flags)[1:]))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fails_in_one_line(result, *words):
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(word in line for word in words), line


def settings(flags):
    return complete(parse_args(flags))


def data_of(folder, *flags):
    """What a run on a folder is trained on and validated on."""
    return train.find_data(settings(["--data", str(folder), "--size", "16", "--frames", "8", *map(str, flags)]))


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def log(out, key="loss"):
    return {line["step"]: line[key] for line in rows(out) if key in line}


def checkpoint(out):
    """What a checkpoint holds: settings, what changed in the run, and the states of its parts by name."""
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    model, ema, discriminator, *optimizers, scaler = saved["parts"]
    return saved | saved["run"] | {"model": model, "ema": ema, "discriminator": discriminator, "optimizers": optimizers}


equal = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)        # of dicts and lists of tensors, too


def same_run(one, two):
    a, b = checkpoint(one), checkpoint(two)
    for part in ("model", "ema", "optimizers", "discriminator", "adaptive_weight", "step", "stage2_start"):
        equal(a[part], b[part])
    for key in ("loss", "psnr", "sharpness"):
        assert log(one, key) == log(two, key)
    same_student(one, two, "best.safetensors")
    assert not list(two.glob(".*"))


def same_student(one, two, name):
    a, b = (TurboVAED.from_pretrained(out / name) for out in (one, two))
    assert a.metadata == b.metadata
    equal(a.state_dict(), b.state_dict())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nearly(one, two, key, tolerance):
    """Whether logs of two runs have the same steps, and values as near as that."""
    a, b = log(one, key), log(two, key)
    return a.keys() == b.keys() and all(abs(a[step] - b[step]) < tolerance for step in a)


def signals_at(monkeypatch, call, *numbers):
    """Sends these signals in that call of `backward`; the first is 1."""
    plain, calls = Objective.backward, count(1)

    def backward(*args, **more):
        for number in numbers if next(calls) == call else ():
            signal.raise_signal(number)
        return plain(*args, **more)

    monkeypatch.setattr(Objective, "backward", backward)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(*command(out, "--steps", 8, "--eval-every", 4))
    return out


def test_a_run_leaves_what_it_promises_and_the_student_improves(whole):
    assert {p.name for p in whole.iterdir()} == {"student.safetensors", "best.safetensors", "checkpoint.pt",
                                                 "log.jsonl", "curves.png", "samples.png", "args.json"}
    student = TurboVAED.from_pretrained(whole)
    assert student.metadata["teacher"] == "tiny" and student.metadata["step"] == "8"
    assert list(log(whole)) == list(range(1, 9)) and list(log(whole, "psnr")) == [4, 8]
    assert log(whole)[8] < log(whole)[1]


@pytest.mark.parametrize("number, lines, workers", [(signal.SIGKILL, 5, 0), (signal.SIGINT, 1, 1)])
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, number, lines, workers):
    """Killed between two checkpoints, it goes on from the last one. Ctrl-C, which a terminal sends to loader processes
    too, saves one."""
    arguments = command(tmp_path, "--steps", 8, "--eval-every", 4, "--workers", workers)
    process = begin(tmp_path, *arguments, lines=lines, start_new_session=True)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        step = int(re.search(r"stopped by SIGINT at step (\d+); --resume goes on", stdout)[1])
        assert process.returncode == 130 and 0 < step < 8 and checkpoint(tmp_path)["step"] == step
        assert stderr == "\nfinishing the step, to save; a second signal stops now\n"
    assert "learning rate" not in run(*arguments, "--resume").stdout           # the settings are the same
    same_run(whole, tmp_path)


def test_two_processes_equal_one_and_the_micro_batch_changes_no_loss(whole, tmp_path):
    run(*command(tmp_path, "--steps", 8, "--eval-every", 4), launcher=TWO)
    assert nearly(whole, tmp_path, "loss", 1e-4 * log(whole)[1]) and nearly(whole, tmp_path, "psnr", 0.01)
    for micro in 1, 4:
        run(*command(tmp_path / str(micro), "--steps", 1, "--micro-batch", micro))
        assert abs(log(tmp_path / str(micro))[1] / log(whole)[1] - 1) < 1e-5


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 12 frames, and an empty file."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        images = [np.full((32, 48, 3), 40 * i + 8 * t, np.uint8) for t in range(12)]
        for t, image in enumerate(images):
            image[8:24, 2 * t:2 * t + 16] = 255 - 60 * i
        write(folder / f"{i}.mp4", images, ("mpeg4", "yuv420p", {}))
    (folder / "empty.mp4").touch()
    return folder


def staged_flags(out, cache, videos, *flags):
    """Four steps of stage 1 and six of stage 2, on a cache of what the teacher makes of 2 x 12 clips."""
    return (out, "--data", videos, "--cache", cache, "--cache-crops", 12, "--steps", 10, "--stage2", "auto",
            "--stage2-steps", 6, "--eval-every", 2, "--warmup", 2, *flags)


def staged_command(*arguments):
    return command(*staged_flags(*arguments))


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
    # measured at the first step of stage 2, used from the next on
    assert log(out, "weight")[5] == 0 < log(out, "weight")[6]
    saved = checkpoint(out)
    assert saved["stage2_start"] == 4 and len(saved["optimizers"]) == 3 and saved["adaptive_weight"] > 0
    best = TurboVAED.from_pretrained(out / "best.safetensors").metadata["step"]
    assert best == str(best_line([line for line in rows(out) if "psnr" in line])["step"])
    stage1 = TurboVAED.from_pretrained(out / "best_stage1.safetensors").metadata
    assert int(stage1["step"]) <= 4 and float(stage1["psnr"]) == round(max(log(out, "psnr")[s] for s in (2, 4)), 2)
    # lines say the stage, and in which share of its steps the discriminator was trained
    assert [log(out, "stage")[s] for s in (1, 4, 5, 10)] == [1, 1, 2, 2]
    assert {log(out, "disc_trained")[s] for s in range(5, 11)} <= {0, 1}


def test_a_cached_run_trains_on_the_teachers_numbers(staged, videos, tmp_path):
    """The first entries of the cache, against the teacher itself, and a whole run against one that runs the teacher."""
    teacher, clips = load_teacher("tiny"), data.VideoClips(videos, 8, 16, train=True, seed=0).subset([1, 2])
    for m in (0, 1, 23):
        entry, video = load_file(staged / "cache" / "00000" / f"{m:08d}.safetensors"), clips[m]
        torch.testing.assert_close(entry["video"].float() / 127.5 - 1, video)
        latents = teacher.encode(video[None])
        torch.testing.assert_close(entry["latents"], latents[0].half(), rtol=2e-3, atol=1e-3)
        for block, x in teacher.features(latents, ("mid", "up0")).items():
            torch.testing.assert_close(entry[f"features.{block}"], x[0].half(), rtol=2e-3, atol=2e-3)
        assert set(entry) == {"video", "latents", "kl", "features.mid", "features.up0"}


def test_a_cache_of_other_settings_or_videos_is_refused(staged, videos, tmp_path, here):
    """A folder of the same names, lengths and sizes, whose pixels differ, is another; one that was moved is the same."""
    other, moved = (shutil.copytree(videos, tmp_path / name) for name in ("other", "moved"))
    held = bytearray((other / "2.mp4").read_bytes())
    held[len(held) // 2] ^= 1
    (other / "2.mp4").write_bytes(held)
    for folder, words, *flags in ((videos, "frames 8, .* 4: ", "--frames", 4), (videos, "seed 0, .* 1: ", "--seed", 1),
                                  (videos, "weights", "--teacher-weights", "random"), (other, "files")):
        with pytest.raises(ValueError, match=f"the cache .* was made with {words}"):
            here(*staged_flags(tmp_path / "out", staged / "cache", folder, *flags))
    here(*staged_flags(tmp_path / "out", staged / "cache", moved, "--stage2", "off", "--steps", 1))


def test_a_cache_serves_runs_that_ask_for_less_and_refuses_those_that_ask_for_more(tmp_path, monkeypatch):
    cache = CachedClips(tmp_path, 2, {"teacher": "tiny"}, blocks=("mid", "up0"))
    for m in range(2):
        cache.put(m, torch.zeros(3, 4, 8, 8), {"latents": torch.full((16, 1, 1, 1), m),
                                               "features.mid": torch.ones(2), "features.up0": torch.ones(2)})
    less = CachedClips(tmp_path, 2, {"teacher": "tiny"}, blocks=("up0",))
    assert set(less[0]) == {"video", "latents", "features.up0"}
    assert all(sorted(less[n]["latents"][0].item() for n in (2 * epoch, 2 * epoch + 1)) == [0, 1] for epoch in range(5))
    fewer = CachedClips(tmp_path, 1, {"teacher": "tiny"}, blocks=("up0",))
    assert [fewer[n]["latents"][0].item() for n in range(3)] == [0, 0, 0]
    with pytest.raises(ValueError, match="does not fit"):
        cache.put(0, torch.zeros(3, 4, 8, 8), {"latents": torch.full((16, 1, 1, 1), 1e6)})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 50, 50))
    full, clips = CachedClips(tmp_path / "full", 2, {}), [torch.zeros(3, 4, 8, 8)] * 2
    with pytest.raises(OSError, match="no room"):
        full.fill(clips, lambda group, video: [{}] * len(group), 1, say=str)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused = [("", 3, (), "made with entries 2, this run has 3", None), ("other", 2, (), "no cache's manifest", None),
               ("", 2, ("up1",), "made with blocks .*this run has", None)]
    for folder, entries, blocks, words, held in refused + [
            ("other", 2, (), "manifest.json is damaged", held)
            for held in ("[]", "{", "{}", "", '{"blocks": [1]}', '{"blocks": 1}')]:
        if held is not None:
            (tmp_path / folder / "manifest.json").write_text(held)
        with pytest.raises(ValueError, match=words):
            CachedClips(tmp_path / folder, entries, {} if folder else {"teacher": "tiny"}, blocks=blocks)


def test_a_cache_is_made_once_and_mended_where_entries_are_missing_or_go_bad(staged, videos, tmp_path):
    """Those cut short are found when they are read, in a loader process, and stop the run in one line."""
    cache, out = shutil.copytree(staged / "cache", tmp_path / "cache"), tmp_path / "out"
    for m in 7, 11:
        (cache / "00000" / f"{m:08d}.safetensors").unlink()
    result = run(*staged_command(tmp_path / "short", cache, videos, "--stage2", "off", "--steps", 1))
    assert ", 2 to make" in result.stdout and sum(1 for _ in cache.rglob("*")) == 26
    held = contents(staged / "cache" / "00000")
    assert contents(cache / "00000") == held
    for path in (cache / "00000").iterdir():
        path.write_bytes(held[path.name][:-5])
    result = run(*staged_command(out, cache, videos, "--workers", 1), check=False)
    fails_in_one_line(result, ".safetensors was damaged", "--resume makes it anew")
    left = list((cache / "00000").iterdir())
    assert len(left) < 24
    for path in left:
        path.write_bytes(held[path.name])
    run(*staged_command(out, cache, videos, "--resume"))
    assert contents(cache / "00000") == held
    same_run(staged / "out", out)


def test_two_processes_equal_one_in_stage_2(staged, videos, tmp_path):
    """They fill the cache together, too."""
    run(*staged_command(tmp_path / "out", tmp_path / "cache", videos), launcher=TWO)
    assert contents(staged / "cache" / "00000") == contents(tmp_path / "cache" / "00000")
    for key in ("loss", "discriminator", "weight", "psnr"):
        most = max(1, *log(staged / "out", key).values())
        assert nearly(staged / "out", tmp_path / "out", key, 2e-4 * most), key
    one, two = checkpoint(staged / "out"), checkpoint(tmp_path / "out")
    for part in ("ema", "discriminator"):
        for key in one[part]:
            torch.testing.assert_close(two[part][key], one[part][key], rtol=1e-3, atol=2e-4)


def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(staged, videos, tmp_path):
    """SIGKILL at 3 moments (KILLS=20: at 20): while the cache is filled or a checkpoint is written, between the last
    step before a validation and its end, as stage 2 begins, or any time."""
    out, cache, rng = tmp_path / "out", tmp_path / "cache", random.Random(os.environ.get("KILLS", "3"))
    arguments = [sys.executable, *staged_command(out, cache, videos)]
    lines = lambda: (out / "log.jsonl").read_text().split("\n")[:-1] if (out / "log.jsonl").exists() else []
    kills, wanted = 0, int(os.environ.get("KILLS", 3))
    while kills < wanted:
        kind, deadline, entry = (rng.choice(("cache", "checkpoint", "validation", "switch", "any")),
                                 time.time() + rng.uniform(0, 15), rng.randrange(24))
        if kind == "cache":
            shutil.rmtree(cache, ignore_errors=True)
        known = len(lines())
        process = subprocess.Popen(arguments + ["--resume"] * (out / "checkpoint.pt").exists(),
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ONE_THREAD)
        os.set_blocking(process.stdout.fileno(), False)
        printed = b""
        while process.poll() is None:
            printed += process.stdout.read() or b""
            if kind == "cache" and (cache / "00000" / f"{entry:08d}.safetensors").exists() \
                    or kind == "checkpoint" and any(out.glob(".checkpoint.*.pt")) \
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
    run(*arguments[1:], *["--resume"] * (out / "checkpoint.pt").exists())
    same_run(staged / "out", out)


def test_a_student_that_is_not_finite_is_not_saved(staged, videos, tmp_path, here, capsys):
    out = shutil.copytree(staged / "out", tmp_path / "out")
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    saved["parts"][0]["student.conv_out.conv.bias"].fill_(math.nan)
    saved["parts"][1]["conv_out.conv.bias"].fill_(math.nan)
    saved["run"] |= {"step": 8, "validations": saved["run"]["validations"][:-1], "lines": saved["run"]["lines"][:-2]}
    torch.save(saved, out / "checkpoint.pt")
    with pytest.raises(RuntimeError, match="student at step 10's PSNR is nan: .* nothing was saved"):
        here(*staged_flags(out, staged / "cache", videos, "--resume"))
    assert re.search(r"passed over step 9: l1 is nan, clips \S*00000/\d+.safetensors", capsys.readouterr().err)
    assert checkpoint(out)["step"] == 8 and TurboVAED.from_pretrained(out).metadata["step"] == "10"


def with_clips(monkeypatch, change):
    """Made-up clips as change(n, clip) makes them, the held-out ones as they are."""
    plain = data.SyntheticClips.__getitem__
    monkeypatch.setattr(data.SyntheticClips, "__getitem__", lambda self, n: (
        plain(self, n) if self.seed == data.HELD_OUT_SEED else change(n, plain(self, n))))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_that_is_not_finite_is_passed_over(tmp_path, here, monkeypatch, capsys, dtype):
    with_clips(monkeypatch, lambda n, clip: clip * math.nan if n == 5 else clip)
    here(tmp_path, "--steps", 6, "--eval-every", 6, "--dtype", dtype, "--stage2", 3)
    assert "passed over step 2: l1 is nan, clips made-up clip 4, made-up clip 5\n" in capsys.readouterr().err
    assert log(tmp_path, "skipped")[2] == 1 and 2 not in log(tmp_path, "loss")
    saved = checkpoint(tmp_path)
    assert saved["step"] == 6
    assert all(t.isfinite().all() for part in ("model", "ema", "discriminator") for t in saved[part].values())
    states = [value for o in saved["optimizers"] for state in o["state"].values() for value in state.values()]
    assert all(value.isfinite().all() for value in states)
    if dtype == "float32":
        assert {float(s["step"]) for s in saved["optimizers"][0]["state"].values()} == {5}


def test_a_step_whose_loss_alone_is_not_finite_is_passed_over(tmp_path, here, monkeypatch, capsys):
    """L1's gradient is a sign: one infinite pixel, which the teacher does not see here, leaves it finite."""
    plain = train.run_teacher
    monkeypatch.setattr(train, "run_teacher", lambda teacher, batch, *rest: plain(
        teacher, batch | {"video": batch["video"].clamp(-1, 1)}, *rest))
    with_clips(monkeypatch, lambda n, clip: clip.index_fill(2, torch.tensor(3), math.inf) if n >= 4 else clip)
    here(tmp_path, "--steps", 3, "--eval-every", 3, "--distill-weight", 0)
    assert "passed over step 2: l1 is inf" in capsys.readouterr().err
    assert {float(s["step"]) for s in checkpoint(tmp_path)["optimizers"][0]["state"].values()} == {1}


@pytest.mark.parametrize("first", [0, 12])
def test_a_run_that_is_not_finite_again_and_again_ends(tmp_path, here, monkeypatch, first):
    with_clips(monkeypatch, lambda n, clip: clip * math.nan if n >= first else clip)
    with pytest.raises(RuntimeError, match=f"step {first // 4 + 5}: l1 is nan, clips made-up clip .*"
                                           "so were the 4 steps before"):
        here(tmp_path, "--steps", 100, "--eval-every", 3)
    assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path)["model"].values())


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_keeps_the_checkpoint(whole, tmp_path):
    """A limit on the size of files stands for the disk: writing the checkpoint fails halfway."""
    out = shutil.copytree(whole, tmp_path / "out")
    before = (out / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    result = run(*command(out, "--steps", 12, "--eval-every", 4, "--resume"), check=False, preexec_fn=limit)
    fails_in_one_line(result, "File too large")
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob(".*"))
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in whole.glob("*.safetensors")}


def test_videos_that_turn_unreadable_in_a_run_stop_it_in_one_line(videos, tmp_path):
    out, folder = tmp_path / "out", shutil.copytree(videos, tmp_path / "videos")
    process = begin(out, *command(out, "--data", folder, "--steps", 1000, "--workers", 1))
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    stderr = process.communicate(timeout=120)[1]
    fails_in_one_line(subprocess.CompletedProcess([], process.returncode, stderr=stderr),
                      "none of the 2 videos", "can be decoded")


@pytest.mark.parametrize("out, flags, words", [
    ("tmp_path", "--frames 9", "8 or 12"),
    ("tmp_path", "--batch 3", "cannot be divided"),
    ("tmp_path", "--data nowhere", "nowhere"),
    ("tmp_path", "--student latent_channels=64", "latent_channels would be 64"),
    ("tmp_path", "--student kernel", "kernel"),
    ("tmp_path", "--stage2 1", "lies behind"),
    ("tmp_path", "--resume", "/checkpoint.pt; --out names the run's folder"),
    ("whole", "", "holds a run already: --resume"),
    ("whole", "--resume --steps 8 --lr 1", "was run with --lr"),
])
def test_wrong_input_gets_one_line(request, out, flags, words):
    result = run(*command(request.getfixturevalue(out), "--steps", 1, *flags.split()), check=False)
    fails_in_one_line(result, words)
    assert result.stderr.count("\n") == 1


def test_the_embedded_path_imports_no_diffusers(tmp_path):
    code = (f"import sys; sys.argv = {command(tmp_path, '--steps', 1)!r}; import runpy; "
            "runpy.run_path(sys.argv[0], run_name='__main__'); "
            "assert not {'diffusers', 'lpips', 'coremltools'} & set(sys.modules)")
    run(code, launcher=("-c",))


def test_muon_steps_along_all_directions_alike():
    """Singular values of the step are about 1 however unlike the gradient's are. Depthwise weights and biases stay with
    AdamW."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6)).Q for n in (6, 54))
    weight = torch.nn.Parameter(torch.zeros(6, 2, 3, 3, 3))
    weight.grad = (u @ torch.diag(torch.logspace(0, -2, 6)) @ v.T).reshape(weight.shape)
    train.Muon([weight], dict(lr=1.0, weight_decay=0.0)).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert values.max() < 1.3 and values.min() > 0.5
    assert (weight.detach() * weight.grad).sum() < 0            # downhill
    module = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 3, groups=4), torch.nn.Conv3d(4, 8, 1))
    adamw, muon = train.make_optimizers(module, 1e-3, 0.02)
    assert [p is module[1].weight for p in muon.param_groups[0]["params"]] == [True]
    assert len(adamw.param_groups[0]["params"]) == 3 and len(train.make_optimizers(module, 1e-3, 0.0)) == 1


def validations(*psnrs, **more):
    """Two validations of stage 1, the others of stage 2."""
    return [{"step": 10 * (i + 1), "psnr": psnr, "stage": 1 + (i > 1)} | {key: more[key][i] for key in more}
            for i, psnr in enumerate(psnrs)]


def test_the_rules_that_go_by_the_validations():
    flat = [20, 20.01, 20.02, 20.01, 20.02]
    for psnrs, ends in ((flat, False), ((*flat, 20.06), False), ((*flat, 20.04), True),     # the first: too few to say
                        ((20, 19, 18, 19.9, 18, 19), True), ((*flat, 20.04, 20.2), False)):
        assert converged(validations(*psnrs)) == ends
    # the adversarial weight is halved while the PSNR lies too low
    log = validations(20, 22, 21.6, 21.5, 21.8, 21.9)
    assert guard(log[:2]) == 1 and guard(log[:4]) == 0.25 and guard(log) == 0.25 * 1.25 ** 2
    assert guard(validations(20, 22, 21.8)) == 1
    # the best is of highest PSNR, then the sharpest within the drop; stage 1's may be better by both measures
    log = validations(20, 22, 21.9, 21.8, 21.5, sharpness=[0.2, 0.5, 0.7, 0.8, 1.0])
    assert [best_line(log[:n])["step"] for n in (1, 2, 3, 5)] == [10, 20, 30, 40]
    assert best_line(validations(20, 22, 21.9, 21.8, sharpness=[0.2, 0.5, 0.4, 0.3]))["step"] == 20
    for lpips, best in ([0.5, 0.4, 0.3, 0.2], 40), ([0.5, 0.1, 0.3, 0.2], 20):
        log = validations(20, 22, 21.9, 21.8, sharpness=[1] * 4, val_lpips=lpips)
        assert best_line(log)["step"] == best


def test_presets_are_listed_change_what_their_rows_say_and_flags_win(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--preset", "list"])
    out, plain = capsys.readouterr().out, vars(settings([]))
    assert end.value.code in (0, None) and all(name in out for name in train.PRESETS) and "26.91, 0.1391, 0.8155" in out
    for name, row in train.PRESETS.items():
        args = settings(["--preset", name])
        changed = {key for key, value in vars(args).items() if value != plain[key]}
        named = {flag.replace("-", "_") for flag in re.findall(r"--(\S+)", row["flags"])}
        assert changed <= named | ({"align"} if name == "figure5-without" else set()), name
        assert train.student_config(args) == replace(train.CONFIGS["tiny"], **args.student), name
        assert row["paper"] is None or 20 < row["paper"][0] < 40
    assert settings(["--preset", "table6-mid"]).align == ["mid"]
    assert settings(["--preset", "table6-mid", "--align", "up0"]).align == ["up0"]
    assert settings(["--preset", "figure5-without"]).align == [] and plain["student"] == {}
    assert settings(["--preset", "table5-k7", "--student", "upsampling=interpolate"]).student == {
        "kernel": 7, "upsampling": "interpolate"}
    assert settings(["--student", "kernel=3", "kernel=7"]).student == {"kernel": 7}
    ltx = settings(["--teacher", "ltx", "--preset", "figure2-all"])
    assert train.student_config(ltx).separable == train.BLOCKS and ltx.lr == 2e-4
    assert train.student_config(settings(["--preset", "figure2-none"])).separable == ()
    config = train.student_config(settings(["--student", "up=null,[1,2],[2,1],[2,2]", "widths=96,80,64,48,32"]))
    assert config.up == (None, (1, 2), (2, 1), (2, 2)) and config.widths == (96, 80, 64, 48, 32)


def test_black_frames_that_come_out_exactly_and_infinities_are_told_apart():
    black = -torch.ones(1, 3, 2, 16, 16)
    assert train.measure(lambda z: z, [black], [black], "student")[1] == {"psnr": 100, "sharpness": 1}
    with pytest.raises(RuntimeError, match="the student's PSNR is nan"):
        train.measure(lambda z: z.where(z > -1, math.inf), [black], [black], "student")


def test_a_preset_trains_its_student_and_what_is_given_is_said(tmp_path, here, capsys):
    here(tmp_path, "--frames", "4", "--steps", "1", "--preset", "table5-k5")
    assert TurboVAED.from_pretrained(tmp_path).config == replace(train.CONFIGS["tiny"], kernel=5)
    assert capsys.readouterr().out.startswith(
        "given: --student {'kernel': 5}, --size 16, --frames 4, --batch 4, --micro-batch 2, --val-clips 2, "
        "--dtype float32, --log-every 1, --workers 0, --steps 1; the rest is the recipe's\n")
    train.main(parse_args(["--out", str(tmp_path), "--steps", "2", "--resume"]))
    assert checkpoint(tmp_path)["step"] == 2
    train.open_run({}, tmp_path / "new")
    assert capsys.readouterr().out.endswith("given: nothing; the rest is the recipe's\n")


def test_samples_are_so_many_clips_again_and_again(videos, tmp_path):
    clips = data_of("synthetic", "--samples", 3)[0]
    assert torch.equal(clips[0], clips[3]) and torch.equal(clips[2], clips[302]) and not torch.equal(clips[0], clips[1])
    assert clips.describe(5) == "made-up clip 2"
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes((videos / f"{i % 3}.mp4").read_bytes() + bytes(i))
    few, whole = data_of(tmp_path, "--samples", 2)[0], data_of(tmp_path)[0]
    assert len(few) == 2 and set(few.files) < set(whole.files)
    assert len(data_of(tmp_path, "--samples", 1, "--val-data", "synthetic")[0]) == 1        # whatever validates


def test_every_setting_is_remembered_but_those_that_change_nothing(tmp_path, capsys):
    """What is not given comes from the checkpoint; what is given and may change is said."""
    args = settings(["--size", "16", "--frames", "8", "--cache", "there"])
    changed = lambda name: {"steps": 7000}.get(name, "other" if vars(args)[name] != "other" else None)

    def resume(start=None, **given):
        torch.save({"args": vars(args), "run": {"stage2_start": start, "step": 4}, "unchanged": {}},
                   tmp_path / "checkpoint.pt")
        return train.open_run(given | {"resume": True}, tmp_path)[0]

    assert resume() == args and capsys.readouterr().out == ""
    for name in vars(args):
        flag = f"--{name.replace('_', '-')}"
        if name in train.MAY_CHANGE:
            assert vars(resume(**{name: changed(name)})) == vars(args) | {name: changed(name)}
            assert f"{flag} {changed(name)} from here on" in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match=f"was run with {flag} "):
                resume(**{name: changed(name)})
    with pytest.raises(ValueError, match="is at step 4, in stage 2: --stage2 off comes too late"):
        args.stage2 = "auto"
        resume(4, stage2="off")
    args.cache = None                                          # its clips and their order are others
    with pytest.raises(ValueError, match="was run with --cache None"):
        resume(cache="there")
    resume(steps=3000)
    assert "--steps 3000 from here on, 2000 before\n" in capsys.readouterr().out


def test_a_resume_finds_the_same_videos_wherever_they_are_and_keeps_the_type(videos, tmp_path, here, monkeypatch):
    """On a machine whose own choice of type would be another."""
    out, folder = tmp_path / "out", shutil.copytree(videos, tmp_path / "videos")
    resume = lambda *flags: here(out, "--data", folder, "--eval-every", 2, "--dtype", "auto", *flags)
    resume("--steps", 2)
    kept = checkpoint(out)["args"]["dtype"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: kept != "bfloat16")
    monkeypatch.chdir(folder)
    (folder / "3.mp4").hardlink_to("1.mp4")
    with pytest.raises(ValueError, match="had other videos"):
        resume("--resume")
    (folder / "3.mp4").unlink()
    (folder / "0.mp4").rename("00.mp4")
    with pytest.raises(ValueError, match="had other (held-out )?videos"):
        resume("--resume")
    (folder / "00.mp4").rename("0.mp4")
    for words, *flags in (("--val-clips 2, not 1", "--val-clips", 1), ("--dtype .*, not float16", "--dtype", "float16"),
                          ("had other (held-out )?videos", "--val-data", "1.mp4")):
        with pytest.raises(ValueError, match=words):
            resume("--resume", "--steps", 4, *flags)
    resume("--resume", "--steps", 4)
    assert checkpoint(out)["step"] == 4 and checkpoint(out)["args"]["dtype"] == kept


def test_a_resume_that_takes_no_step_says_so(staged, tmp_path, capsys):
    """Nothing but the folder has to be named."""
    out = shutil.copytree(staged / "out", tmp_path / "out")
    resume = lambda *flags: train.main(parse_args(["--out", str(out), "--resume", *flags]))
    for flags in (), ("--steps", "12"), ("--minutes", "1e-9"):
        resume(*flags)
        assert "0 steps, to step 10; " in capsys.readouterr().out
    resume("--minutes", "100", "--steps", "12", "--stage2-steps", "8")
    assert checkpoint(out)["step"] == 12 and list(log(out, "discriminator")) == list(range(5, 13))


@pytest.mark.parametrize("name", ["student.safetensors", "best.safetensors", "curves.png"])
def test_a_run_killed_between_checkpoint_and_best_mends_itself(whole, tmp_path, here, monkeypatch, name):
    """At each of the files that follow from the checkpoint, and behind the log."""
    plain = TurboVAED.save_pretrained

    def dies(self, path, metadata):
        assert (path.name, metadata["step"]) != (name, "8")
        plain(self, path, metadata)

    with monkeypatch.context() as context, pytest.raises((AssertionError, ZeroDivisionError)):
        context.setattr(TurboVAED, "save_pretrained", dies)
        context.setattr(train, "draw", lambda out, run, columns: 1 / (run.step - 8))
        here(tmp_path, "--steps", 8, "--eval-every", 4)
    assert checkpoint(tmp_path)["step"] == 8
    here(tmp_path, "--steps", 8, "--resume")
    same_run(whole, tmp_path)


def test_the_better_student_and_the_time_that_a_run_takes_are_said(tmp_path, here, monkeypatch, capsys):
    monkeypatch.setattr(train, "best_line", lambda validations: validations[0])
    here(tmp_path, "--steps", 24, "--eval-every", 12)
    out, psnr = capsys.readouterr().out, log(tmp_path, "psnr")
    assert f"; better is that of step 12: PSNR {psnr[12]:.2f} instead of {psnr[24]:.2f} dB" in out
    assert f"evaluate.py --student {tmp_path}/best.safetensors; " in out
    assert re.search(r"this run takes 0:00:\d\d \(h:mm:ss\)", out)


def test_a_learning_rate_that_other_settings_change_is_said(tmp_path, here, monkeypatch, capsys):
    """Not where it only follows its cosine. Each of the runs is stopped in its first step, that from 0 in its third."""
    for call, said, *flags in (
            (5, [], "--steps", 8), (1, [], "--resume"), (1, [], "--resume", "--eval-every", 9),
            (1, ["step 5: the learning rate is 0.00156, by the settings before 0.000617"], "--resume", "--steps", 16),
            (1, ["step 6: the learning rate is 9.9e-05, by the settings before 0.00138"], "--resume", "--steps", 7),
            (1, ["step 7: the learning rate is 7.61e-05, by the settings before 0"], "--resume", "--steps", 8)):
        with monkeypatch.context() as context, pytest.raises(SystemExit):
            signals_at(context, call, signal.SIGTERM)
            here(tmp_path, "--warmup", 0, "--log-every", 2, *flags)
        assert re.findall("step .*learning rate.*", capsys.readouterr().out) == said


def test_a_stop_while_a_cache_fills_says_that_the_command_goes_on(staged, videos, tmp_path, here, monkeypatch):
    plain = CachedClips.put

    def put(self, m, *entry):
        plain(self, m, *entry)
        if m == 5:
            signal.raise_signal(signal.SIGTERM)

    flags = staged_flags(tmp_path / "out", tmp_path / "cache", videos)
    with monkeypatch.context() as context, pytest.raises(SystemExit, match="stopped while .* the same command goes on"):
        context.setattr(CachedClips, "put", put)
        train.run_command(lambda: here(*flags), "less")
    assert sum(1 for _ in (tmp_path / "cache/00000").iterdir()) == 6
    here(*flags)
    same_run(staged / "out", tmp_path / "out")


def test_overwriting_waits_until_the_new_run_begins(whole, staged, videos, tmp_path, here, monkeypatch, capsys):
    """A cache that is refused costs nothing. Then nothing is left that a resume would go on with."""
    out = shutil.copytree(whole, tmp_path / "out")
    overwrite = staged_flags(out, staged / "cache", videos, "--overwrite")
    for words, flags in (("the cache .* was made with", (*overwrite, "--seed", 1)),
                         ("patch|compression would be", (*overwrite, "--student", "patch=1")),
                         ("is at step 8, in stage 1: --steps 1 comes too late", (out, "--resume", "--steps", 1))):
        with pytest.raises(ValueError, match=words):
            here(*flags)
    assert contents(out) == contents(whole)
    (out / "tiny.mlpackage").mkdir()
    (out / "results.md").touch()
    monkeypatch.setattr(Objective, "backward", Mock(side_effect=RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        here(out, "--steps", 4, "--overwrite")
    assert not list(out.glob("*.safetensors")) and not log(out) and checkpoint(out)["step"] == 0
    assert f"{out} still has what was made of the run before: results.md, tiny.mlpackage\n" in capsys.readouterr().out


def test_all_files_follow_from_the_checkpoint(whole, tmp_path):
    """Whatever happened to them in between: a best student of a step that the log does not have, a damaged log."""
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "log.jsonl").write_bytes(b'{"a": 1}\n[2]\nnot json\n\xff\xfe\n{"step": "3"}\n')
    (out / "best.safetensors").unlink()
    TurboVAED(train.CONFIGS["ltx"]).save_pretrained(out / "student.safetensors", metadata={"step": "99"})
    train.main(parse_args(["--out", str(out), "--resume"]))
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    for name in ("student.safetensors", "best.safetensors"):
        same_student(whole, out, name)


@pytest.mark.parametrize("held", [None, b"", b"not a checkpoint", "a cut", {"step": 1}, [1]],
                         ids=["gone", "empty", "other", "cut", "dict", "list"])
def test_a_checkpoint_that_is_gone_or_damaged_is_told_and_its_student_kept(whole, tmp_path, here, held):
    file = shutil.copytree(whole, tmp_path / "out") / "checkpoint.pt"
    student = (file.parent / "student.safetensors").read_bytes()
    if isinstance(held, (dict, list)):
        torch.save(held, file)
    elif held is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:5000] if held == "a cut" else held)
    told = f"no file {file}; --out names the run's folder$" if held is None else f"{file} is damaged or of [^\n]*$"
    for words, *flags in ("holds a run already",), (f"nothing to resume: {told}", "--resume"):
        with pytest.raises(ValueError, match=words):
            here(file.parent, "--steps", 9, *flags)
    assert (file.parent / "student.safetensors").read_bytes() == student


def test_what_is_held_out_is_not_trained_on_nor_are_copies_of_it(videos, tmp_path):
    folder, val = tmp_path / "all", tmp_path / "val"
    folder.mkdir()
    for name, source in zip("abcd", "0102"):
        shutil.copy(videos / f"{source}.mp4", folder / f"{name}.mp4")
    (folder / "hard.mp4").hardlink_to(folder / "a.mp4")
    clips, _, _, unchanged = data_of(folder)
    assert unchanged["held-out videos"][:-1] == ["a.mp4"] and clips.files == ["b.mp4", "d.mp4"]
    shutil.copy(videos / "1.mp4", tmp_path / "val.mp4")
    assert data_of(folder, "--val-data", tmp_path / "val.mp4")[0].files == ["a.mp4", "c.mp4", "d.mp4", "hard.mp4"]
    clips, _, name, _ = data_of(folder, "--val-data", "synthetic")
    assert len(clips) == 5 and name == "held-out made-up clips"
    shutil.copytree(videos, val, ignore=shutil.ignore_patterns("2.mp4"))
    (folder / "link").symlink_to(val)
    clips, val_clips, *_ = data_of(folder, "--val-data", val, "--val-clips", 1)
    assert clips.files == ["d.mp4"] and len(val_clips) == 1
    with pytest.raises(ValueError, match="no video is left to train on"):
        data_of(folder, "--val-data", folder)


def test_no_seed_trains_on_the_held_out_clips():
    streams = [data_of("synthetic", "--val-clips", 1, "--seed", seed)
               for seed in (data.HELD_OUT_SEED - 1, data.HELD_OUT_SEED, data.HELD_OUT_SEED + 1, 2 ** 32 - 2)]
    assert len({stream.seed for stream, *_ in streams} | {data.HELD_OUT_SEED}) == 5
    assert all(torch.equal(clips[0], streams[0][1][0]) and not torch.equal(stream[0][None], clips[0])
               for stream, clips, *_ in streams)


def test_stage_1_is_measured_where_stage_2_begins(tmp_path, here):
    for start, out in (0, tmp_path / "0"), (3, tmp_path / "3"):
        here(out, "--steps", 5, "--stage2", start, "--eval-every", 5)
        assert [(line["step"], line["stage"]) for line in rows(out) if "psnr" in line] == [(start, 1), (5, 2)]


def test_a_held_out_video_that_cannot_be_decoded_gives_way_to_the_next(videos, monkeypatch, capsys):
    plain, bad = data.VideoClips.clip, ["0.mp4"]

    def clip(self, i, *place):
        if self.files[i] in bad:
            raise data.BadVideo(f"{self.files[i]}: damaged")
        return plain(self, i, *place)

    monkeypatch.setattr(data.VideoClips, "clip", clip)
    clips, _, name, unchanged = data_of(videos)
    assert unchanged["held-out videos"][:-1] == ["1.mp4"] and clips.files == ["0.mp4", "2.mp4"]
    assert name == "1 held-out videos" and "not validating on 0.mp4: damaged" in capsys.readouterr().err
    bad += ["1.mp4", "2.mp4"]
    with pytest.raises(ValueError, match="no video in .* can be decoded to validate on"):
        data_of(videos)


def test_a_stop_before_the_first_validation_leaves_a_student(whole, tmp_path, here, monkeypatch):
    flags = "--steps", 8, "--eval-every", 4, "--micro-batch", 4
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        signals_at(context, 1, signal.SIGINT)
        context.setattr(os, "write", Mock(side_effect=BrokenPipeError))         # who read what it says is gone
        here(tmp_path, *flags)
    assert TurboVAED.from_pretrained(tmp_path).metadata == {"teacher": "tiny", "step": "1"}
    here(tmp_path, *flags, "--resume")
    assert log(tmp_path, "psnr").keys() == log(whole, "psnr").keys()


def test_three_times_ctrl_c_lose_no_checkpoint_and_leave_no_half_file(tmp_path):
    """In a row, whatever the run does in between; then it goes on."""
    arguments = command(tmp_path, "--steps", 500, "--eval-every", 2, "--workers", 1)
    for _ in range(3):
        resume = ["--resume"] * (tmp_path / "checkpoint.pt").exists()
        process = begin(tmp_path, *arguments, *resume, lines=5, start_new_session=True)
        for _ in range(3):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.01)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode in (1, 130) and "Traceback" not in stderr, stderr
        assert checkpoint(tmp_path)["step"] > 0 and not list(tmp_path.glob(".*"))
        TurboVAED.from_pretrained(tmp_path)


def test_what_a_line_of_the_log_is_the_mean_of_survives_a_stop(tmp_path, here, monkeypatch):
    flags = ("--steps", 6, "--eval-every", 6, "--log-every", 6, "--stage2", 2)
    here(tmp_path / "a", *flags)
    with monkeypatch.context() as context, pytest.raises(SystemExit) as end:
        signals_at(context, 8, signal.SIGTERM)                  # in the middle of step 4
        here(tmp_path / "b", *flags)
    assert end.value.code == 143 and checkpoint(tmp_path / "b")["step"] == 4
    here(tmp_path / "b", *flags, "--resume")
    same_run(tmp_path / "a", tmp_path / "b")
    for key in ("grad_norm", "weight", "discriminator", "disc_trained"):
        assert log(tmp_path / "a", key) == log(tmp_path / "b", key)


def test_checkpoints_come_by_time_too(tmp_path, here, monkeypatch):
    steps, plain = [], torch.save
    monkeypatch.setattr(torch, "save", lambda held, file: (steps.append(held["run"]["step"]), plain(held, file)))
    here(tmp_path / "late", "--steps", 4, "--eval-every", 4)
    assert steps == [0, 4]
    monkeypatch.setattr(train, "SAVE_MINUTES", 1e-9)
    here(tmp_path, "--steps", 4, "--eval-every", 4)
    assert {1, 2, 3, 4} <= set(steps)


def test_a_signal_before_the_first_step_and_a_second_one_in_it_end_at_once(tmp_path, here, monkeypatch):
    signals_at(monkeypatch, 1, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "begun", "--steps", 1)
    assert checkpoint(tmp_path / "begun")["step"] == 0
    monkeypatch.setattr(train, "load_teacher", lambda *args: signal.raise_signal(2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "new", "--steps", 1)
    assert not (tmp_path / "new" / "checkpoint.pt").exists()


def test_two_processes_scan_once_and_stop_together(videos, tmp_path):
    """SIGTERM to torchrun, as a cluster sends it before it takes the machine."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\nimport data, train\n"
                      f"plain = data.VideoClips.probe\ndef probe(self, name):\n"
                      f"    open({str(tmp_path)!r} + '/scans', 'a').write(os.environ['RANK'] + ' ' + name + chr(10))\n"
                      f"    return plain(self, name)\ndata.VideoClips.probe = probe\ntrain.main(train.parse_args())\n")
    arguments = command(tmp_path / "out", "--data", videos, "--steps", 5000, "--eval-every", 5000)[1:]
    process = begin(tmp_path / "out", *TWO, script, *arguments)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert stderr.count("finishing the step, to save; a second signal stops now\n") == 1
    assert sorted((tmp_path / "scans").read_text().splitlines()) == ["0 0.mp4", "0 1.mp4", "0 2.mp4", "0 empty.mp4"]
    step = int(re.search(r"stopped by SIGTERM at step (\d+); --resume goes on", stdout)[1])
    assert step > 0 and checkpoint(tmp_path / "out")["step"] == step


@pytest.mark.parametrize("name, stage2", [("ltx23", "off"), ("hunyuan15", "off"), ("qwen", "1"), ("wan22", "1"),
                                          ("ltx095", "off"), ("ltx25", "off"), ("h3", "1")])
def test_two_steps_of_a_teachers_recipe_at_reduced_width(tmp_path, here, monkeypatch, name, stage2):
    """What the recipe aligns, heads and all, on random weights; qwen's clips are single images."""
    pytest.importorskip("diffusers")
    from test_teachers import KINDS, OTHERS
    teacher, recipe = (KINDS | OTHERS)[name](), train.RECIPES[name]
    monkeypatch.setattr(train, "load_teacher", lambda *args: teacher)
    monkeypatch.setitem(train.CONFIGS, name, replace(train.CONFIGS[name], latent_channels=teacher.latent_channels,
                                                     widths=(16, 16, 16, 16, 16), resnets=(1, 1, 1, 1, 1)))
    frames = max(min(recipe["frames"], teacher.compression[0] + 1), teacher.fewest)
    here(tmp_path, "--teacher", name, "--frames", frames, "--stage2", stage2, *(
        "--data synthetic --size 64 --lpips-weight 0 --steps 2 --eval-every 2 --batch 2 --val-clips 1".split()))
    assert list(map(math.isfinite, log(tmp_path).values())) == [True, True] and log(tmp_path, "distill")[2] > 0
    student = TurboVAED.from_pretrained(tmp_path)
    assert student.metadata["teacher"] == name and student.config == train.CONFIGS[name]
    assert student(torch.zeros(1, teacher.latent_channels, 2, 1, 1)).shape[2] == teacher.compression[0] + 1


def test_a_teacher_whose_activations_are_beyond_float16_runs_in_float32(tmp_path, here):
    """The embedded one's go beyond 65,504."""
    here(tmp_path, "--steps", 2, "--eval-every", 2, "--dtype", "float16", "--log-every", 2)
    assert all(math.isfinite(log(tmp_path, key)[2]) for key in ("psnr", "teacher_psnr", "l1"))
    assert checkpoint(tmp_path)["args"]["dtype"] == "float16"


def test_memory_that_runs_out_is_told_with_what_helps(tmp_path, here, monkeypatch):
    """In a loader process, which is killed, or in a step."""
    killed = lambda context: with_clips(context, lambda n, clip: os.kill(os.getpid(), signal.SIGKILL))
    fails = lambda context: context.setattr(Objective, "backward", lambda *args, **more: torch.empty(2 ** 60))
    for workers, runs_out in (1, killed), (0, fails):
        with monkeypatch.context() as context, pytest.raises(SystemExit, match="error: out of memory: fewer clips"):
            runs_out(context)
            train.run_command(lambda: here(tmp_path, "--overwrite", "--workers", workers), "fewer clips")


@pytest.mark.parametrize("flags", [
    "--log-every 0", "--eval-every 0", "--batch 0", "--micro-batch 0", "--val-clips 0", "--cache-crops 0",
    "--warmup -1", "--seed -1", "--seed 4294967296", "--steps 0", "--frames 0", "--size 0", "--workers -1", "--lr 0",
    "--lr nan", "--lr inf", "--muon-lr -1", "--lpips-weight -1", "--distill-weight -1", "--stage2-steps 0",
    "--minutes 0", "--stage2 -1", "--stage2 never", "--batch 1.5", "--batch two", "--align up9", "--student width=3",
    "--preset table9", "--config ltx"])
def test_flags_that_mean_nothing_are_refused_before_anything_is_loaded(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2 and flags.split()[0].strip("=") in lines[1]


def test_what_needs_no_teacher_is_found_first(tmp_path, here, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "load_teacher", lambda *args: pytest.fail("loaded"))
    none = RuntimeError, ValueError, AssertionError
    for error, words, *flags in (
            (OSError, "file", "--out", tmp_path / "file" / "run"), (FileNotFoundError, "nowhere", "--data", "nowhere"),
            (none, "(?i)cuda|nvidia", "--device", "cuda:9"), (none, "nonsense", "--device", "nonsense")):
        with pytest.raises(error, match=words):
            here(tmp_path / "out", "--steps", 1, *flags)


def test_a_checkpoint_is_read_on_the_cpu_and_let_go(whole, tmp_path, here, monkeypatch):
    out, held, plain, backward = shutil.copytree(whole, tmp_path / "out"), [], torch.load, Objective.backward

    def load(path, map_location, **more):
        saved = plain(path, map_location=map_location, **more)
        held.extend((map_location, weakref.ref(next(iter(saved["parts"][1].values())))))
        return saved

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(Objective, "backward", lambda *args, **more: (
        held.append(held[1]() is None), backward(*args, **more))[1])
    here(out, "--steps", 9, "--eval-every", 9, "--resume")
    assert held[0] == "cpu" and held[2] is True


def test_the_adaptive_weight_does_not_depend_on_the_loss_scale(tmp_path, here, monkeypatch):
    flags = ("--steps", 3, "--stage2", 1, "--eval-every", 3)
    here(tmp_path / "a", *flags)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0 ** -12))
    here(tmp_path / "b", *flags)
    a, b = log(tmp_path / "a", "weight")[3], log(tmp_path / "b", "weight")[3]
    assert a > 0 and abs(a / b - 1) < 1e-4
