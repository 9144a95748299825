"""Mutated inputs: each ends in a right result or is refused in one clear line.

    python tests/fuzz.py [N] [SEED]         # N cases (400); SEED and n make case n

What the commands read is damaged as disks, downloads, other people's scripts and typing damage it. No wrong result and
no lost file is allowed; of 100 refusals 97 must be one line.
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
from model import CONFIGS, TurboVAED, TurboVAEDConfig, run_command
from teachers import TINY_WEIGHTS, load_teacher

STUDENT = ROOT / "assets" / "tiny_student.safetensors"
SECONDS = 120           # after which a case counts as hanging
CPU = ("--device", "cpu")


class Wrong(Exception):             # a wrong result without a word, or a file that is lost
    pass


class Refused(Exception):           # in one line
    pass


def expect(fact, what):
    if not fact:
        raise Wrong(what)


def guarded(log, run):
    """(stdout, stderr) of run(); Refused where it ends in one line, RuntimeError where in more."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as stop:
        line = stop.code if isinstance(stop.code, str) else (err.getvalue().splitlines() or [""])[-1]
        log.append(f"-> {line}")
        if stop.code:
            clear = re.fullmatch(r"(error: |\S+\.py: error: ).+", line) and "Traceback" not in err.getvalue()
            raise (Refused if clear else RuntimeError)(line + err.getvalue()) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    return out.getvalue(), err.getvalue()


def call(log, function):
    """function()'s result under the guard of the commands."""
    results = []
    guarded(log, lambda: run_command(lambda: results.append(function()), "less"))
    return results.pop()


def command(log, script, *args):
    """(stdout, stderr) of a script, run as the shell would."""
    argv, sys.argv = sys.argv, [script, *map(str, args)]
    try:
        return guarded(log, lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))
    finally:
        sys.argv = argv


def tensors_of(made, name=""):
    """{name: tensor} of what torch.save was given, however deep."""
    if isinstance(made, torch.Tensor):
        return {name: made}
    items = made.items() if isinstance(made, dict) else enumerate(made) if isinstance(made, list) else ()
    join = lambda key: f"{name}.{key}" if name else str(key)
    return {key: tensor for inner, value in items for key, tensor in tensors_of(value, join(inner)).items()}


def write_tensors(made, file):
    """save_file of what it can hold."""
    tensors = {k: v.clone().contiguous() for k, v in tensors_of(made).items() if not v.is_meta and not v.is_sparse}
    save_file(tensors or {"x": torch.ones(1)}, file)


def damage_bytes(r, file):
    data = file.read_bytes()
    n, a = len(data), r.randrange(len(data))
    b, flipped = min(n, a + r.choice((1, 16, 1000, n // 3 + 1))), bytearray(data)
    for _ in range(r.choice((1, 3, 50))):
        flipped[r.randrange(r.choice((n, min(n, 400))))] = r.randrange(256)
    text = r.choice((b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>not found</html>", b"{}",
                     b"[1", b"\0" * 64, b""))
    kinds = {"flip": flipped, "zero": data[:a] + bytes(b - a) + data[b:], "cut": data[:a], "text": text,
             "insert": data[:a] + r.randbytes(b - a) + data[a:], "repeat": data[:b] + data[a:],
             "append": data + r.randbytes(r.choice((1, 1000)))}
    kind = r.choice(sorted(kinds))
    file.write_bytes(kinds[kind])
    return kind


def damage_file(r, file):
    """A file of a cache or a package, as disks and people leave it; what was done."""
    if r.random() < 0.1:
        file.unlink()
        return f"{file.name} gone"
    if file.suffix != ".json" or r.random() < 0.4:
        return f"{file.name} {damage_bytes(r, file)}"
    content = json.loads(file.read_text())
    key = r.choice(sorted(content))
    changed = content | {key: r.choice((None, [], {}, -1, "x", [1], 3.5, [["mid"]]))}
    file.write_text(json.dumps(r.choice((changed, changed, [changed], key, {key: content[key]}))))
    return f"{file.name} {key}"


def damage_state(r, state):
    """A state dict as others write it, or spoilt: (what torch.save is given, what was done)."""
    key = r.choice(sorted(state))
    put = lambda change: state.update({key: change(state[key])})
    spoil = {
        "nothing": lambda: None, "missing": lambda: state.pop(key), "nan": lambda: put(lambda x: x * float("nan")),
        "inf": lambda: put(lambda x: x + float("inf")),
        "extra": lambda: state.update({r.choice(("heads.mid.0.weight", "x", "")): torch.ones(2)}),
        "large": lambda: put(lambda x: x.double() * 1e300), "double": lambda: put(lambda x: x.double()),
        "int": lambda: put(lambda x: x.int()), "bool": lambda: put(lambda x: x > 0),
        "complex": lambda: put(lambda x: x.to(torch.complex64)), "none": lambda: put(lambda x: None),
        "float8": lambda: put(lambda x: x.to(torch.float8_e4m3fn)), "meta": lambda: put(lambda x: x.to("meta")),
        "flat": lambda: put(lambda x: x.flatten()), "half": lambda: put(lambda x: x.half()),
        "wide": lambda: put(lambda x: torch.cat([x] * 2)), "scalar": lambda: put(lambda x: torch.tensor(1.0)),
        "sparse": lambda: put(lambda x: x.to_sparse()), "renamed": lambda: state.update({key + ".w": state.pop(key)})}
    what = r.choice(sorted(spoil))
    spoil[what]()
    prefix = r.choice((*"module. decoder. module.decoder. student. _orig_mod. vae.decoder. encoder.".split(), "", ""))
    state = {prefix + k: v for k, v in state.items()}
    if prefix and r.random() < 0.5:
        state |= {"encoder.conv_in.conv.weight": torch.ones(3), "logit_scale": torch.ones(())}
    wrap = r.choice(("", "", "ema", "ema_state_dict", "state_dict", "model", "params", "7", "list", "two"))
    wrapped = {"": state, "list": [state], "two": {"state_dict": state, "ema": state, "epoch": 3}, "7": {7: state}}
    return wrapped.get(wrap, {wrap: state, "step": 3}), f"{what}, {prefix or 'no prefix'}, {wrap or 'plain'}"


def damage_weights(r, file, state):
    write = write_tensors if file.suffix == ".safetensors" else torch.save
    state, done = damage_state(r, state) if r.random() < 0.6 else (state, "")
    write(state, file)
    return done or damage_bytes(r, file)


def checkpoint(r, log):
    file, config = Path(r.choice(("x.pth", "x.safetensors", "x.bin"))), r.choice((None, None, "tiny", "ltx", "no such"))
    log += [file, damage_weights(r, file, load_file(STUDENT)), config]
    model = call(log, lambda: TurboVAED.from_pretrained(file, config))
    in_file = load_file(file) if file.suffix == ".safetensors" else tensors_of(torch.load(file, weights_only=True))
    for key, p in model.state_dict().items():
        expect(p.isfinite().all() and p.dtype == torch.float32, f"{key} is not finite")
        alike = [v for k, v in in_file.items() if k.endswith(key) and v.shape == p.shape]
        expect(any(torch.equal(v.float(), p) for v in alike), f"{key} is not the file's")
    expect(model(torch.zeros(1, 32, 1, 1, 1)).shape == (1, 3, 4, 8, 8), "no video")


def configuration(r, log):
    fields = json.loads(json.dumps(CONFIGS["tiny"].__dict__))
    odd = (None, True, [], {}, "", "tiny", -1, 0, 3, 1.5, 10 ** 30, [None] * 5, [1] * 4, [[2, 2]] * 4, [[[]]],
           "NaN", float("nan"), float("inf"))
    for _ in range(r.choice((1, 1, 2))):
        key = r.choice([*sorted(fields), "more"])
        if r.random() < 0.2:
            fields.pop(key, None)
        elif isinstance(fields.get(key), list) and r.random() < 0.5:
            fields[key][r.randrange(len(fields[key]))] = r.choice(odd)
        else:
            fields[key] = r.choice(odd)
    text = json.dumps(fields)
    if r.random() < 0.15:
        text, fields = r.choice(("", "[", "null", "[1]", '"x"', "[" * 5000, "{}", "9" * 5000)), None
    log.append(text[:1000])
    save_file(load_file(STUDENT), "x.safetensors", metadata={"config": text})
    model = call(log, lambda: TurboVAED.from_pretrained("x.safetensors"))
    dump = lambda config: json.dumps(config.__dict__)
    expect(fields and dump(TurboVAEDConfig(**fields)) == dump(model.config), "another configuration")
    expect(torch.isfinite(model(torch.zeros(1, 32, 1, 1, 1))).all(), "no video")


def teacher(r, log):
    log.append(damage_weights(r, Path("model.safetensors"), load_file(TINY_WEIGHTS)))
    weights = r.choice(("model.safetensors", ".", "random", "nowhere", "a/b"))
    loaded = call(log, lambda: load_teacher("tiny", weights, dtype=r.choice((torch.float32, torch.bfloat16))))
    expect(all(p.isfinite().all() for p in loaded.parameters()), "weights that are not finite")


def write_film(r, file):
    with av.open(str(file), "w") as container:
        stream = container.add_stream(r.choice(("libx264", "mpeg4")), rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        tone = container.add_stream("aac", rate=16000) if r.random() < 0.5 else None
        for n in range(24):
            image = np.roll(np.random.default_rng(n // 8).integers(0, 255, (32, 48, 3), np.uint8), 3 * n, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if tone:
            wave = (8000 * np.sin(np.arange(15360) / 8)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            samples.sample_rate = 16000
            container.mux([*tone.encode(samples), *tone.encode()])
    return file


def video(r, log):
    file = write_film(r, Path(f"in{r.choice(('.mp4', '.mkv', '.avi', '.mov', '.ts'))}"))
    log += [file, damage_bytes(r, file)]
    if r.random() < 0.5:
        clip = call(log, lambda: VideoClips(".", 8, 16, train=False)[0])
        return expect(clip.shape == (3, 8, 16, 16) and clip.isfinite().all() and clip.abs().max() <= 1, "no clip")
    try:
        out, err = command(log, "evaluate.py", *CPU, "--student", STUDENT, "--reconstruct", file, "out.mp4")
    except Refused:
        return expect(not list(Path().glob("*out*")), "failure and a film")
    expect(not list(Path().glob(".out*")), "a half-written film")
    with av.open("out.mp4") as film, av.open(str(file)) as source:
        frames, promised = sum(1 for _ in film.decode(video=0)), source.streams.video[0].frames
    expect(f"out.mp4: {frames} frames" in out, f"{frames} frames, and it says {out!r}")
    expect(frames >= promised or "could not be read" in err, f"{frames} of {promised} frames: {err!r}")


def latents(r, log):
    Path("latents").mkdir()
    good = torch.randn(1, 32, 2, 3, 3)
    for n in range(4):
        save_file({"latents": good}, f"latents/{n}.safetensors")
    for name in ("-", "1a", "z"):           # before, between and after them
        file = Path("latents") / f"{name}.safetensors"
        odd = {"size": good[..., :2], "channels": good[:, :8], "none": good[:, :, :0], "nan": good * float("nan"),
               "half": good.half(), "int": good.int(), "bool": good > 0, "no batch": good[0], "flat": good.flatten(),
               "two": good.repeat(2, 1, 1, 1, 1), "scalar": torch.tensor(1.0)}
        what = r.choice([*sorted(odd), "bytes", "name", "nothing"])
        save_file({"latent" if what == "name" else "latents": odd.get(what, good).clone().contiguous()}, file)
        log.append(f"{what} {damage_bytes(r, file)}" if what == "bytes" else what)
    if r.random() < 0.2:
        shutil.rmtree("latents")
    try:
        _, err = command(log, "evaluate.py", *CPU, "--student", STUDENT, "--latents", "latents", "--metrics", "psnr",
                         "--out", "out")
    except Refused as error:
        return expect(not Path("latents").exists(), f"good latents were refused: {error}")
    results = json.loads(Path("out/results.json").read_text())
    clips, skipped = {clip["clip"] for clip in results["per_clip"]}, results["skipped"]
    good = {f"{n}.safetensors" for n in range(4)} <= clips
    expect(good and len(clips) + len(skipped) == 7, f"{clips} and {skipped}")
    expect(all(f"skipping {name}: " in err for name in skipped), f"a word is missing of {skipped}: {err!r}")
    expect(np.isfinite(results["rows"][1]["psnr"]), "no figure")


def cache(r, log):
    make = lambda: CachedClips("cache", 3, {"teacher": "tiny"}, blocks=("mid",))
    with contextlib.redirect_stdout(io.StringIO()):
        clips = make()
        for n in range(3):
            tensors = {"latents": torch.full((2, 1), float(n)), "features.mid": torch.full((2,), float(n))}
            clips.put(n, torch.rand(3, 4, 8, 8) * 2 - 1, tensors)
    file = r.choice([Path("cache/manifest.json"), r.choice(sorted(Path("cache").rglob("*.safetensors")))])
    done = damage_file(r, file)
    log.append(done)
    again = call(log, make)
    for n in range(3):
        entry = call(log, lambda: again[n])
        right = entry["latents"].flatten()[0] in (0, 1, 2) and entry["video"].shape == (3, 4, 8, 8)
        expect(right or "flip" in done or "zero" in done, "another clip")


def package(r, log):
    source = Path(tempfile.gettempdir()) / f"fuzz_{os.getpid()}" / "tiny.mlpackage"
    if not source.exists():
        from export import export
        export(TurboVAED.from_pretrained(STUDENT), (16, 16), 1, source)
    shutil.copytree(source, "tiny.mlpackage")
    file = r.choice(sorted(f for f in Path("tiny.mlpackage").rglob("*") if f.is_file()))
    log.append(damage_file(r, file))
    try:
        command(log, "export.py", "--verify", "tiny.mlpackage", "--student", STUDENT)
    except Refused:
        return expect(not Path("tiny.json").exists(), "a report of what failed")
    proof = json.loads(Path("tiny.json").read_text())["proof"]
    expect(proof["fp16"]["worst_error"] <= 0.05 and proof["float32"]["worst_error"] <= 0.02, "a proof that is none")


LEFT_OUT = {"--download", "--compile", "--stream"}      # these take long
FLAG = re.compile(r'(?:\("--|^ {12}\(")([a-z0-9-]+)",', re.MULTILINE)       # as the scripts name them
FLAGS = {script: sorted({f"--{name}" for name in FLAG.findall((ROOT / script).read_text())} - LEFT_OUT)
         for script in ("evaluate.py", "export.py", "bench.py", "train.py")}
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
    "--metrics": "psnr ssim temporal lpips fvd", "--cache": "folder file", "--decode": "folder out.mp4",
    "--out": "out/x file folder .", "--verify": "folder file x.mlpackage", "--bits": "8 6", "--latent-frames": "1 2 0",
    "--reconstruct": "clip.mp4 out.mp4", "--latents": "folder file", "--device": "cpu cuda cuda:1 mps",
    "--steps": "1 2", "--lr": "0 1e-3 nan", "--align": "mid up9"}


def command_line(r, log):
    Path("file").write_text("text")
    Path("folder").mkdir()
    film = write_film(r, Path("clip.mp4")).read_bytes()
    script = r.choice(sorted(FLAGS))
    args = SMALL[script].split()
    for flag in r.sample(FLAGS[script], r.choice((1, 1, 2, 3))):
        likely = flag in LIKELY and r.random() < 0.8
        many = 2 if flag in ("--reconstruct", "--decode") else 1 if likely else r.choice((0, 1, 1, 2))
        args += [flag, *r.choices(LIKELY[flag].split() if likely else VALUES, k=many)]
    log += [script, *args]
    with contextlib.suppress(Refused):
        command(log, script, *args)
    kept = Path("file").read_text() == "text" and Path("clip.mp4").read_bytes() == film
    expect(kept, "a file of the user's was overwritten")
    expect(not [f for f in Path().rglob(".*") if f.is_file()], "half-written files were left")


KINDS = (checkpoint, video, configuration, command_line, teacher, latents, package, cache)


def run_cases(numbers, seed):
    """{"wrong": cases, "unclear": cases}, printed as they come."""
    def hanging(*_):
        raise AssertionError(f"not done after {SECONDS} s")        # the commands' guard lets it pass

    found, handler = {"wrong": 0, "unclear": 0}, signal.signal(signal.SIGALRM, hanging)
    for n in numbers:
        kind, r, log = KINDS[n % len(KINDS)], random.Random(f"{seed} {n}"), []
        torch.manual_seed(n)
        signal.alarm(SECONDS)
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                kind(r, log)
        except Refused:
            pass
        except Exception as error:
            verdict = "wrong" if isinstance(error, Wrong) else "unclear"
            found[verdict] += 1
            print(f"{verdict}: case {n}, {kind.__name__}:", *log, f"\n{traceback.format_exc()}", flush=True)
        signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    return found


if __name__ == "__main__":
    count, seed = map(int, [*sys.argv[1:], *("400", "0")[len(sys.argv) - 1:]])
    found = run_cases(range(count), seed)
    print(f"of {count} mutated inputs {found['wrong']} ended wrong and {found['unclear']} not in one clear line")
    sys.exit(found["wrong"] > 0 or found["unclear"] > 0.03 * count)
