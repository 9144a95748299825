"""Mutated inputs: each ends in a right result or in one clear line.

    python tests/fuzz.py [N] [SEED]         # N cases (400), those that do not are printed; SEED and n make case n

Checkpoints, teachers' weights, configurations, videos, saved latents, caches, packages and command lines are damaged as
disks, downloads, other people's scripts and typing damage them, and given to the commands, in this process.
"""
import contextlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data import CachedClips, VideoClips
from model import CONFIGS, TurboVAED, TurboVAEDConfig, flat
from teachers import TINY_WEIGHTS, load_teacher

STUDENT = ROOT / "assets" / "tiny_student.safetensors"
SECONDS = 120           # after which a case counts as hanging


class Wrong(Exception):
    """A wrong result without a word."""


def expect(fact, what):
    if not fact:
        raise Wrong(what)


def command(log, script, *args):
    """Runs a script as the shell would: (whether it succeeded, stdout, stderr); Wrong where an error is no line."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [script, *map(str, args)]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    if isinstance(code, str):
        clear = code.startswith("error: ") and len(code) > 12 and "\n" not in code
        expect(clear, f"an error that is not one clear line: {code!r}")
    elif code:
        expect(re.match(r"\S+\.py: error: .+", err.getvalue().splitlines()[-1]), f"exit {code} and {err.getvalue()!r}")
    expect("Traceback" not in err.getvalue(), err.getvalue())
    log.append(f"-> {code or 'fine'}")
    return not code, out.getvalue(), err.getvalue() + (code if isinstance(code, str) else "")


def refused(error, log):
    log.append(f"-> {error}")
    expect(str(error).strip() and "\n" not in str(error), f"an error that is not one clear line: {error!r}")


# ----------------------------------------------------------------------------------------------------------
# damage

def damage_bytes(r, file):
    content = bytearray(file.read_bytes())
    n, kind = len(content), r.choice(("flip", "zero", "cut", "insert", "repeat", "head", "text", "empty", "append"))
    start = r.randrange(n)
    end = min(n, start + r.choice((1, 16, 1000, n // 3 + 1)))
    if kind in ("flip", "head"):
        for _ in range(r.choice((1, 3, 50))):
            content[r.randrange(n if kind == "flip" else min(n, 400))] = r.randrange(256)
    elif kind == "zero":
        content[start:end] = bytes(end - start)
    elif kind == "cut":
        del content[start:]
    elif kind == "insert":
        content[start:start] = r.randbytes(end - start)
    elif kind == "repeat":
        content[start:start] = content[start:end]
    elif kind == "text":
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        content = bytearray(r.choice((pointer, b"<html>not found</html>", b"{}", b"[1", b"\0" * 64)))
    elif kind == "empty":
        content = bytearray()
    else:
        content += r.randbytes(r.choice((1, 1000)))
    file.write_bytes(content)
    return kind


def damage_state(r, state):
    """A state dict as others write it, or spoilt: (what torch.save is given, what was done)."""
    key = r.choice(sorted(state))
    put = lambda change: state.update({key: change(state[key])})
    extra = r.choice(("heads.mid.0.weight", "x", "conv_in.y", ""))
    spoil = {
        "nothing": lambda: None, "missing": lambda: state.pop(key),
        "extra": lambda: state.update({extra: torch.ones(2)}),
        "nan": lambda: put(lambda x: x * float("nan")), "inf": lambda: put(lambda x: x + float("inf")),
        "large": lambda: put(lambda x: x.double() * 1e300), "double": lambda: put(lambda x: x.double()),
        "int": lambda: put(lambda x: x.int()), "bool": lambda: put(lambda x: x > 0),
        "complex": lambda: put(lambda x: x.to(torch.complex64)),
        "float8": lambda: put(lambda x: x.to(torch.float8_e4m3fn)),
        "half": lambda: state.update({k: v.half() for k, v in state.items()}),
        "flat": lambda: put(lambda x: x.flatten()),
        "wide": lambda: put(lambda x: torch.cat([x] * 2)), "scalar": lambda: put(lambda x: torch.tensor(1.0)),
        "none": lambda: put(lambda x: None), "sparse": lambda: put(lambda x: x.to_sparse()),
        "meta": lambda: put(lambda x: x.to("meta")),
        "renamed": lambda: state.update({key + ".w": state.pop(key)})}
    what = r.choice(sorted(spoil))
    spoil[what]()
    prefix = r.choice(("", "", *"module. decoder. module.decoder. student. _orig_mod. vae.decoder. encoder.".split()))
    state = {prefix + k: v for k, v in state.items()}
    if prefix and r.random() < 0.5:
        state |= {"encoder.conv_in.conv.weight": torch.ones(3), "logit_scale": torch.ones(())}
    wrap = r.choice(("", "", "ema", "ema_state_dict", "state_dict", "model", "params", "7", "list", "two"))
    wrapped = {"": state, "list": [state], "two": {"state_dict": state, "ema": state, "epoch": 3}, "7": {7: state}}
    return wrapped.get(wrap, {wrap: state, "step": 3}), f"{what}, {prefix or 'no prefix'}, {wrap or 'plain'}"


# ----------------------------------------------------------------------------------------------------------
# what is damaged, and how it ends. Each writes into `log` what was done, and how it ended.

def checkpoint(r, log):
    file = Path(r.choice(("x.pth", "x.safetensors", "x.bin")))
    state = load_file(STUDENT)
    if r.random() < 0.6:
        made, done = damage_state(r, state)
        if file.suffix == ".safetensors":
            tensors = {k: v for k, v in flat(made).items() if not v.is_meta and not v.is_sparse}
            save_file({k: v.clone().contiguous() for k, v in tensors.items()} or {"x": torch.ones(1)}, file)
        else:
            torch.save(made, file)
    else:
        shutil.copy(STUDENT, file) if file.suffix == ".safetensors" else torch.save(state, file)
        done = damage_bytes(r, file)
    config = r.choice((None, None, "tiny", "ltx", "no such"))
    log += [file, done, config]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            model = TurboVAED.from_pretrained(file, config)
        except (ValueError, OSError) as error:
            return refused(error, log)
    there = flat(torch.load(file, weights_only=True)) if file.suffix != ".safetensors" else load_file(file)
    for key, p in model.state_dict().items():
        expect(p.isfinite().all() and p.dtype == torch.float32, f"{key} is not finite")
        alike = [v for k, v in there.items() if k.endswith(key) and v.shape == p.shape]
        expect(any(torch.equal(v.float(), p) for v in alike), f"{key} is not the file's")
    expect(model(torch.zeros(1, 32, 1, 1, 1)).shape == (1, 3, 4, 8, 8), "no video")


def configuration(r, log):
    fields = json.loads(json.dumps(CONFIGS["tiny"].__dict__))
    odd = (None, True, [], {}, "", "tiny", -1, 0, 3, 1.5, 10 ** 30, [None] * 5, [1] * 4, [[2, 2]] * 4, [0] * 5, [[[]]],
           "NaN", float("nan"), float("inf"))
    text = None
    for _ in range(r.choice((1, 1, 2))):
        key = r.choice([*sorted(fields), "more"])
        if r.random() < 0.2:
            fields.pop(key, None)
        elif isinstance(fields.get(key), list) and r.random() < 0.5:
            fields[key][r.randrange(len(fields[key]))] = r.choice(odd)
        else:
            fields[key] = r.choice(odd)
    if r.random() < 0.15:
        text = r.choice(("", "[", "null", "[1]", '"x"', "[" * 5000, "{}", "9" * 5000))
    log.append((str(fields) if text is None else text)[:1000])
    save_file(load_file(STUDENT), "x.safetensors", metadata={"config": json.dumps(fields) if text is None else text})
    try:
        model = TurboVAED.from_pretrained("x.safetensors")
    except (ValueError, OSError) as error:
        return refused(error, log)
    as_tuple = lambda v: tuple(map(as_tuple, v)) if isinstance(v, list) else v
    meant = TurboVAEDConfig(**{k: as_tuple(v) for k, v in fields.items()})
    expect(text is None and model.config == meant, "another configuration")
    expect(torch.isfinite(model(torch.zeros(1, 32, 1, 1, 1))).all(), "no video")


def teacher(r, log):
    file, state = Path("model.safetensors"), load_file(TINY_WEIGHTS)
    if r.random() < 0.5:
        made, done = damage_state(r, state)
        tensors = {k: v for k, v in flat(made).items() if not v.is_meta and not v.is_sparse}
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, file)
    else:
        shutil.copy(TINY_WEIGHTS, file)
        done = damage_bytes(r, file)
    log.append(done)
    try:
        weights, dtype = r.choice((file, ".", "random", "nowhere", "a/b")), r.choice((torch.float32, torch.bfloat16))
        loaded = load_teacher("tiny", weights, dtype=dtype)
    except (ValueError, OSError) as error:
        return refused(error, log)
    expect(all(p.isfinite().all() for p in loaded.parameters()), "weights that are not finite")


def write_film(r, file):
    with av.open(str(file), "w") as container:
        codec = r.choice(("libx264", "mpeg4", "ffv1")) if file.suffix == ".mkv" else r.choice(("libx264", "mpeg4"))
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        tone = container.add_stream("aac", rate=16000) if r.random() < 0.5 else None
        for n in range(24):
            image = np.roll(np.random.default_rng(n // 8).integers(0, 255, (32, 48, 3), np.uint8), 3 * n, 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if tone:
            wave = (8000 * np.sin(np.arange(15360) / 8)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            samples.sample_rate, samples.pts = 16000, 0
            container.mux(tone.encode(samples))
            container.mux(tone.encode())


def video(r, log):
    file = Path(f"in{r.choice(('.mp4', '.mkv', '.avi', '.mov', '.ts'))}")
    write_film(r, file)
    log += [file, damage_bytes(r, file)]
    if r.random() < 0.5:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                clip = VideoClips(".", 8, 16, train=False)[0]
            except (ValueError, OSError) as error:
                return refused(error, log)
        return expect(clip.shape == (3, 8, 16, 16) and clip.isfinite().all() and clip.abs().max() <= 1, "no clip")
    flags = ["--device", "cpu", "--student", STUDENT, "--reconstruct", file, "out.mp4"]
    fine, out, err = command(log, "evaluate.py", *flags)
    expect(not list(Path().glob(".out*")), "a half-written film")
    expect(fine == Path("out.mp4").exists(), "success and no film, or failure and a film")
    if fine:
        with av.open("out.mp4") as film:
            frames = sum(1 for _ in film.decode(video=0))
        expect(f"out.mp4: {frames} frames" in out, f"{frames} frames, and it says {out!r}")
        with av.open(str(file)) as source:
            promised = source.streams.video[0].frames
        told = f"promises {promised} frames: {promised - frames} could not be read" in err
        expect(frames >= promised or told, f"{frames} of {promised} frames: {err!r}")


def latents(r, log):
    Path("latents").mkdir()
    good = torch.randn(1, 32, 2, 3, 3)
    for n in range(4):
        save_file({"latents": good}, f"latents/{n}.safetensors")
    for name in ("-", "1a", "z"):           # before, between and after them
        file = Path("latents") / f"{name}.safetensors"
        odd = {"other": good[..., :2], "channels": good[:, :8], "none": good[:, :, :0], "nan": good * float("nan"),
               "half": good.half(), "int": good.int(), "bool": good > 0, "no batch": good[0],
               "two": good.repeat(2, 1, 1, 1, 1), "flat": good.flatten(), "scalar": torch.tensor(1.0)}
        what = r.choice([*sorted(odd), "bytes", "name", "nothing"])
        save_file({"latent" if what == "name" else "latents": odd.get(what, good).clone().contiguous()}, file)
        log.append(f"{what} {damage_bytes(r, file)}" if what == "bytes" else what)
    if r.random() < 0.2:
        shutil.rmtree("latents")
    flags = "--device cpu --latents latents --metrics psnr --out out".split()
    fine, out, err = command(log, "evaluate.py", "--student", STUDENT, *flags)
    if fine:
        results = json.loads(Path("out/results.json").read_text())
        clips = {clip["clip"] for clip in results["per_clip"]}
        skipped, good = results["skipped"], {f"{n}.safetensors" for n in range(4)}
        expect(good <= clips and len(clips) + len(skipped) == 7, f"{clips} and {skipped}")
        expect(all(f"skipping {name}: " in err for name in skipped), f"a word is missing of {skipped}: {err!r}")
        expect(np.isfinite(results["rows"][1]["psnr"]), "no figure")
    else:
        expect(not Path("latents").exists(), f"good latents were refused: {err}")


def cache(r, log):
    make = lambda: CachedClips("cache", 3, {"teacher": "tiny"}, blocks=("mid",))
    with contextlib.redirect_stdout(io.StringIO()):
        made, clips = make(), torch.rand(3, 3, 4, 8, 8) * 2 - 1
        for n in range(3):
            made.put(n, clips[n], {"latents": torch.full((2, 1), float(n)), "features.mid": torch.full((2,), float(n))})
    file = Path(r.choice(("cache/manifest.json", made.path(r.randrange(3)))))
    done = f"{file.name} "
    if file.suffix == ".json" and r.random() < 0.6:
        settings = json.loads(file.read_text())
        key = r.choice(sorted(settings))
        settings[key] = r.choice((None, [], {}, -1, "x", [1], 3.5, [["mid"]]))
        without = {k: v for k, v in settings.items() if k != key}
        file.write_text(json.dumps(r.choice((settings, settings, [settings], key, without))))
        done += f"{key} {settings[key]}"
    elif r.random() < 0.2:
        file.unlink()
        done += "gone"
    else:
        done += damage_bytes(r, file)
    log.append(done)
    try:
        again = make()
        for n in range(3):
            entry = again[n]
            m = entry["latents"].flatten()[0].item()
            expect(m in (0, 1, 2) or "flip" in done or "zero" in done, f"latents {m}")
            expect(entry["video"].shape == (3, 4, 8, 8), "no clip")
    except (ValueError, OSError) as error:
        refused(error, log)


def package(r, log):
    source = Path(tempfile.gettempdir()) / f"fuzz_{os.getpid()}" / "tiny.mlpackage"
    if not source.exists():
        from export import export
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(TurboVAED.from_pretrained(STUDENT), (16, 16), 1, source)
    shutil.copytree(source, "tiny.mlpackage")
    file = r.choice(sorted(f for f in Path("tiny.mlpackage").rglob("*") if f.is_file()))
    if file.suffix == ".json" and r.random() < 0.5:
        manifest = json.loads(file.read_text())
        key = r.choice(sorted(manifest))
        manifest[key] = r.choice((None, [], {}, "x", 3))
        file.write_text(json.dumps(manifest))
        done = f"{file.name} {key}"
    elif r.random() < 0.1:
        shutil.rmtree(file.parent)
        done = f"{file.parent.name} gone"
    else:
        done = f"{file.name} {damage_bytes(r, file)}"
    log.append(done)
    fine, out, err = command(log, "export.py", "--verify", "tiny.mlpackage", "--student", STUDENT)
    report = Path("tiny.json")
    expect(report.exists() == fine, "a report of what failed, or none of what did not")
    if fine:
        proof = json.loads(report.read_text())["proof"]
        expect(proof["fp16"]["worst_error"] <= 0.05 and proof["float32"]["worst_error"] <= 0.02, "a proof that is none")


FLAGS = {
    "evaluate.py": "--data --root --split --student --teacher --teacher-weights --against --metrics --lpips-weights "
                   "--i3d --clips --frames --size --batch --seed --device --dtype --threads --out --reconstruct "
                   "--latents --generate --pipeline --no",
    "export.py": "--student --config --random --size --latent-frames --bits --graph --out --whole --verify",
    "bench.py": "--config --student --size --frames --teacher --no-teacher --blocks --mlpackage --iphone --team "
                "--features --batch --lpips-frames --dtype --device --out",
    "train.py": "--teacher --config --data --frames --size --batch --seed --device --out --steps --resume --align --lr "
                "--stride --val-clips --dtype"}
SMALL = {
    "evaluate.py": "--clips 1 --size 32 --metrics psnr --lpips-weights no.pth --i3d no.pt --device cpu",
    "export.py": "--size 16x16 --latent-frames 1", "bench.py": "--size 16x16 --rounds 1 --no-compile --device cpu",
    "train.py": "--steps 1 --size 32 --batch 1 --val-clips 1 --device cpu"}
VALUES = ["", "\u00e9", str(STUDENT), *"""0 1 -1 2 9 1.5 16x16 0x16 16 x nan 1e400 tiny cpu cuda cuda:9 mps float16 psnr
    synthetic davis nowhere nowhere/x a/b . file file/x folder clip.mp4 out.mp4 input mid a:b""".split()]
LIKELY = {      # what somebody who means well gives these flags
    "--data": "synthetic clip.mp4 folder davis vidgen file", "--size": "16 32 16x32 24x24 33 16x16 0",
    "--frames": "1 4 8 9 16", "--student": f"{STUDENT} out/run a/b folder file clip.mp4", "--teacher": "tiny ltx dc no",
    "--config": "tiny ltx cog", "--teacher-weights": "random folder file a/b",
    "--metrics": "psnr ssim temporal lpips fvd",
    "--out": "out/x file folder .", "--verify": "folder file x.mlpackage", "--bits": "8 6", "--latent-frames": "1 2 0",
    "--graph": "conv3d",
    "--reconstruct": "clip.mp4 out.mp4", "--latents": "folder file", "--generate": "file folder clip.mp4",
    "--pipeline": "folder a/b",
    "--device": "cpu cuda cuda:1 mps", "--steps": "1 2", "--lr": "0 1e-3 nan", "--align": "mid up9", "--stride": "1 9"}


def command_line(r, log):
    Path("file").write_text("text")
    Path("folder").mkdir()
    write_film(r, Path("clip.mp4"))
    script = r.choice(sorted(FLAGS))
    args = SMALL[script].split()
    for flag in r.sample(FLAGS[script].split(), r.choice((1, 1, 2, 3))):
        likely = flag in LIKELY and r.random() < 0.8
        many = 2 if flag == "--reconstruct" else 1 if likely else r.choice((0, 1, 1, 2))
        args += [flag, *r.choices(LIKELY[flag].split() if likely else VALUES, k=many)]
    log += [script, *args]
    before = Path("file").read_text()
    fine, out, err = command(log, script, *args)
    expect(Path("file").read_text() == before, "a file of the user's was overwritten")
    expect(not [f for f in Path().rglob(".*") if f.is_file()], "half-written files were left")


KINDS = (checkpoint, video, configuration, command_line, teacher, latents, package, cache)


def hanging(*_):
    raise Wrong(f"not done after {SECONDS} s")


def case(n, seed):
    """(what was done and how it ended, how that is wrong or None) of case n."""
    kind, r, log = KINDS[n % len(KINDS)], random.Random(f"{seed} {n}"), []
    torch.manual_seed(n)
    there, threads, problem = os.getcwd(), torch.get_num_threads(), None
    handler = signal.signal(signal.SIGALRM, hanging)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.chdir(folder)
            try:
                kind(r, log)
            finally:
                os.chdir(there)
    except Wrong as wrong:
        problem = str(wrong)
    except Exception:
        problem = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        torch.set_num_threads(threads)
    return f"case {n}, {kind.__name__}: {' '.join(map(str, log))}", problem


def main():
    count, seed = (int(given) if given else usual for given, usual in zip((sys.argv[1:] + ["", ""])[:2], (400, 0)))
    wrong = 0
    for n in range(count):
        done, problem = case(n, seed)
        wrong += bool(problem)
        if problem:
            print(f"{done}\n{problem.strip()}\n", flush=True)
    print(f"{count - wrong} of {count} mutated inputs ended in a right result or in one clear line")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
