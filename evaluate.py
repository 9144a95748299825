"""How good and how fast are a teacher and its students? PSNR, SSIM, decoding speed, and a side-by-side picture.

    python evaluate.py                                     # the newest student under out/, on made-up video
    python evaluate.py --data davis                        # on the videos in data/davis
    python evaluate.py --data my_videos --clips 100 --size 512
    python evaluate.py --student out/a out/b --teacher ltx --device cuda      # several students, several rows

Every clip is encoded once (the posterior's mean), decoded by the teacher and by every student, and compared with the
input. Prints a table and writes results.json and compare.png.
"""
import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import CLIPS_PER_SCENE, BadVideo, SyntheticClips, VideoClips
from model import CONFIGS, OWN_FILE, TurboVAED
from teachers import TEACHERS, load_teacher

SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_student.safetensors"
HELD_OUT = 10_000               # seed of made-up clips that training, which counts its seeds from 0, does not see
WARM_UP, ROUNDS = 2, 7          # of the speed measurement


# ----------------------------------------------------------------------------------------------------------
# metrics

def frames_of(video):
    """(B, 3, T, H, W) in [-1, 1] -> (B T, 3, H, W) in [0, 1], clamped: what a screen can show of it."""
    return video.float().clamp(-1, 1).add(1).div(2).transpose(1, 2).flatten(0, 1)


def psnr(a, b):
    """PSNR in dB of each clip, (B,): the mean over frames of each frame's PSNR, with a peak of 1 in [0, 1].

    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. Infinite for equal frames. ValueError if shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"cannot compare clips of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    error = (frames_of(a) - frames_of(b)).square().mean((1, 2, 3))
    return (-10 * error.log10()).view(len(a), -1).mean(1)


def ssim(a, b):
    """SSIM of each clip, (B,): the mean over frames of torchmetrics' SSIM (Gaussian window, sigma 1.5).

    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. ValueError if shapes differ, or frames are smaller than the
    window, 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure
    if a.shape != b.shape:
        raise ValueError(f"cannot compare clips of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs frames of 11x11 or more, not {a.shape[-2]}x{a.shape[-1]}")
    each = structural_similarity_index_measure(frames_of(a), frames_of(b), data_range=1.0, reduction="none")
    return each.view(len(a), -1).mean(1)


def decode_speeds(decoders, latents):
    """Frames per second of each decoder, {name: function of latents}, all on the same latents.

    The decoders take turns, so that whatever else the machine does slows all of them; medians over the rounds.
    """
    sync = torch.cuda.synchronize if latents.is_cuda else lambda: None
    seconds, frames = {name: [] for name in decoders}, {}
    for i in range(WARM_UP + ROUNDS):
        for name, decode in decoders.items():
            sync()
            start = time.perf_counter()
            video = decode(latents)
            sync()
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
            frames[name] = video.shape[0] * video.shape[2]
    return {name: frames[name] / statistics.median(seconds[name]) for name in decoders}


# ----------------------------------------------------------------------------------------------------------
# what to evaluate, and on what

def find_students(paths):
    """Files of the students asked for; without any the newest that was trained here, else the shipped one."""
    if paths:
        return [Path(p) / OWN_FILE if Path(p).is_dir() else Path(p) for p in paths]
    trained = sorted(Path("out").glob(f"*/{OWN_FILE}"), key=lambda file: file.stat().st_mtime)
    if trained:
        return trained[-1:]
    if not SHIPPED.is_file():
        raise FileNotFoundError(f"no student: out/ holds none and neither does {short(SHIPPED)}; "
                                f"train one (make demo), or name one with --student")
    print(f"no student in out/: evaluating the shipped one, {short(SHIPPED)}")
    return [SHIPPED]


def short(path):
    """The path as one would type it from here; a run's folder stands for the student in it."""
    path = Path(path).resolve()
    path = path.parent if path.name == OWN_FILE else path
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def teacher_name(student):
    """What the student's file says, else the name of its configuration, else "tiny"."""
    named = next((name for name, config in CONFIGS.items() if config == student.config), "tiny")
    return student.metadata.get("teacher", named)


def open_data(data, frames, size, seed):
    """(number and name of each clip in order, data set)."""
    if data == "synthetic":
        clips = SyntheticClips(frames, size, seed=seed)
        # one clip of each painted scene
        return ((n, f"clip {n}") for n in range(0, len(clips), CLIPS_PER_SCENE)), clips
    root = Path(data) if Path(data).exists() else Path("data") / data
    if not root.exists():
        raise FileNotFoundError(f"no videos called {data}: put the video files into the folder {root}, "
                                f"or pass --data the folder that holds them")
    clips = VideoClips(root, frames, size, train=False)
    return enumerate(clips.files), clips


# ----------------------------------------------------------------------------------------------------------
# what comes out

def table(rows):
    """The rows as lines of text, numbers aligned to the right."""
    header = ("model", "decoder (M)", "PSNR (dB)", "PSNR kept", "SSIM", "decode FPS", "speed-up")
    cells = [(r["model"], f"{r['parameters'] / 1e6:.2f}", f"{r['psnr']:.2f}", f"{r['psnr_kept']:.1f}%",
              f"{r['ssim']:.4f}", f"{r['fps']:.1f}", f"{r['speed_up']:.2f}x") for r in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = ["  ".join([c[0].ljust(widths[0])] + [v.rjust(w) for v, w in zip(c[1:], widths[1:])])
             for c in (header, *cells)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def replace(path, write):
    """write(temporary file), then rename it to path: a crash leaves no half file."""
    partial_file = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial_file)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


def finite(value):
    """Infinities and NaN as None: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(path, rows):
    """One row of frames for each (label, [(title, (3, H, W) in [0, 1])]); whole pixels, so that nothing is blurred."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    h, w = rows[0][1][0][1].shape[1:]
    scale = -(-384 // max(h, w))                         # small frames are magnified by a whole number
    h, w, dpi, gap, left, top = h * scale, w * scale, 150, 12, 72, 56
    width, height = left + len(rows[0][1]) * (w + gap), len(rows) * (h + top) + gap
    figure = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for i, (label, images) in enumerate(rows):
        for j, (title, image) in enumerate(images):
            x, y = left + j * (w + gap), height - (i + 1) * (h + top)
            axes = figure.add_axes((x / width, y / height, w / width, h / height))
            axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, fontsize=8, pad=3)
            if not j:
                axes.set_ylabel(label, fontsize=8)
    replace(path, lambda file: figure.savefig(file, dpi=dpi, format="png"))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description="PSNR, SSIM and decoding speed of a teacher and its students: "
                                     "a table, results.json and a side-by-side picture.")
    parser.add_argument("--data", default="synthetic", help="a folder of videos or one video; a name such as davis, for "
                        "data/davis; or synthetic, made-up video that no training sees (default)")
    parser.add_argument("--student", nargs="+", metavar="PATH", help="students: a run's folder or a file, one or several "
                        "(default: the newest under out/, else the shipped one)")
    parser.add_argument("--teacher", choices=TEACHERS, help="default: the one that the first student was trained with")
    parser.add_argument("--teacher-weights", metavar="W", help='a folder or file, or "random" to measure speed only '
                        "(default: the released weights)")
    parser.add_argument("--clips", type=int, default=16, help="at most that many clips (default 16)")
    parser.add_argument("--frames", type=int, help="frames of a clip (default: 8 for tiny, 16 for dc, 17 for ltx)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: 128 for tiny, else 256)")
    parser.add_argument("--seed", type=int, default=HELD_OUT, help=f"of made-up video (default {HELD_OUT})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json and compare.png (default: that of the "
                        "first student's run, else out/evaluate)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    for name in ("clips", "frames", "size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch sees no CUDA device here; use --device cpu")
    return args


@torch.inference_mode()
def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    files = list(dict.fromkeys(find_students(args.student)))
    students = {short(file): TurboVAED.from_pretrained(file) for file in files}
    teacher = load_teacher(args.teacher or teacher_name(next(iter(students.values()))), args.teacher_weights, device)
    for name, student in students.items():
        config = student.config
        fits = (teacher.latent_channels, tuple(teacher.compression), teacher.images)
        if (config.latent_channels, config.compression, config.drop_first) != fits:
            raise ValueError(f"{name} decodes {config.latent_channels} channels at {config.compression}, not the latents "
                             f"of the {teacher.name} teacher, {teacher.latent_channels} channels at {fits[1]}")
        student.to(device).eval()
    d_t, extra = teacher.compression[0], int(teacher.images)
    frames = args.frames or (8 if teacher.name == "tiny" else (17 - extra) // d_t * d_t + extra)
    size = args.size or (128 if teacher.name == "tiny" else 256)
    teacher.check_clip(frames, size, size)

    label = f"{teacher.name} (teacher)"
    decoders = {label: teacher.decode, **students}
    numbered, clips = open_data(args.data, frames, size, args.seed)
    skipped = dict(getattr(clips, "skipped", {}))
    load = lambda n: clips[n][None].to(device)
    done, scores = [], {name: {"psnr": [], "ssim": []} for name in decoders}
    total = args.clips if args.data == "synthetic" else min(args.clips, len(clips))
    with tqdm(total=total, unit="clip", disable=not sys.stderr.isatty(), leave=False) as bar:
        for n, name in numbered:
            if len(done) == args.clips:
                break
            try:
                video = load(n)
            except BadVideo as error:
                skipped[name] = str(error).removeprefix(f"{name}: ")
                tqdm.write(f"skipping {name}: {skipped[name]}", file=sys.stderr)
                continue
            latents = teacher.encode(video, sample=False)
            for decoder, score in scores.items():
                decoded = decoders[decoder](latents)
                score["psnr"] += psnr(decoded, video).tolist()
                score["ssim"] += ssim(decoded, video).tolist()
            done.append((n, name))
            bar.update()
    if not done:
        raise ValueError(f"none of the videos in {args.data} can be decoded")
    # Small clips are timed four at a time: PyTorch's convolutions on a CPU take a slow path for one clip with few channels.
    together = max(1, min(4, 2 ** 20 // (frames * size * size)))
    fps = decode_speeds(decoders, latents.repeat(together, 1, 1, 1, 1))

    mean = {name: {metric: statistics.fmean(values) for metric, values in score.items()} for name, score in scores.items()}
    size_of = lambda module: sum(p.numel() for p in module.parameters())
    rows = [{"model": name, "parameters": size_of(students.get(name, teacher.vae.decoder)), **mean[name],
             "psnr_kept": 100 * mean[name]["psnr"] / mean[label]["psnr"], "fps": fps[name],
             "speed_up": fps[name] / fps[label]} for name in decoders]
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(table(rows))
    print(f"{args.data}: {len(done)} clips of {frames}x{size}x{size} (frames x height x width); {hardware}, "
          f"{torch.get_num_threads()} CPU threads, float32, {together} at a time for speed; {len(skipped)} clips skipped")

    run = files[0].resolve().parent
    out = Path(args.out) if args.out else run if run.parent == Path("out").resolve() else Path("out/evaluate")
    out.mkdir(parents=True, exist_ok=True)
    import torchmetrics
    results = {
        "rows": rows, "data": args.data, "seed": args.seed if args.data == "synthetic" else None, "clips": len(done),
        "frames": frames, "height": size, "width": size, "device": hardware, "threads": torch.get_num_threads(), "timed_together": together,
        "dtype": "float32", "skipped": skipped, "command": ["python", *sys.argv],
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchmetrics": torchmetrics.__version__},
        "per_clip": [{"clip": name, **{decoder: {metric: values[i] for metric, values in score.items()}
                                       for decoder, score in scores.items()}} for i, (_, name) in enumerate(done)]}
    replace(out / "results.json", lambda file: file.write_text(json.dumps(finite(results), indent=1) + "\n"))

    # The picture's clips are decoded again: keeping all of them until it is known which ones would take memory.
    first = next(iter(students))
    order = sorted(range(len(done)), key=scores[first]["psnr"].__getitem__)
    picks = {order[len(order) // 2]: "median", order[0]: "worst", order[-1]: "best"}
    grid = []
    for i in sorted(picks, key=order.index):
        video = load(done[i][0])
        latents = teacher.encode(video, sample=False)
        shown = {name: frames_of(decode(latents))[frames // 2] for name, decode in decoders.items()}
        reference = frames_of(video)[frames // 2]
        grid.append((f"{picks[i]}: {done[i][1]}", [("input", reference)]
                     + [(f"{name[-40:]}\n{scores[name]['psnr'][i]:.2f} dB", image) for name, image in shown.items()]
                     + [(f"|error| x4 of\n{first[-40:]}", (4 * (shown[first] - reference).abs()).clamp(max=1))]))
    picture(out / "compare.png", grid)
    print(f"{short(out / 'compare.png')}\n{short(out / 'results.json')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:     # wrong input; anything else is a bug and shows its trace
        sys.exit(f"error: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
