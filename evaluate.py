"""How good and how fast are a teacher and its students? The rows of the paper's Tables 3 and 4, and pictures.

    python evaluate.py                                     # the newest student under out/, on made-up video
    python evaluate.py --data davis                        # Table 4: DAVIS-2017 in data/davis (--download fetches it)
    torchrun --nproc_per_node=8 evaluate.py --data ucf101 --teacher ltx --student out/a out/b   # Table 3, two students
    python evaluate.py --data my_videos --size 480x832 --against teacher

    python evaluate.py --reconstruct in.mp4 out.mp4        # any video through encoder and student
    python evaluate.py --decode latents.safetensors out.mp4 --fps 24       # saved latents of any length to video

    python examples/generate.py prompts.txt out/latents --pipeline Lightricks/LTX-Video
    python evaluate.py --latents out/latents --data openvid        # Table 3's FVD: generated against real video

Every clip is encoded once (the posterior's mean), decoded by the teacher and by every student, and compared with the
input. Values go from [-1, 1] to [0, 1] and are clamped, nothing else. Writes results.json, results.md, compare.png and
compare.mp4, and prints a table.
"""
import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (BROKEN, CLIPS_PER_SCENE, DATA_SETS, EXACT, HELD_OUT_SEED, BadVideo, SyntheticClips, VideoClips,
                  check_colours, check_fields, check_shapes, colours, download, find_clips, frames_of, open_video,
                  picture, psnr, video_stream, why)
from model import (CONFIGS, atomically, check_fit, check_writable, choose_student, find_device, number, parse_size,
                   run_command, summary, text_table, weights_hash)
from teachers import TEACHERS, load_teacher

INPUT = "the input"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's
WRITTEN = "compare.png", "compare.mp4", "results.md", "results.json"
SAME = "data root split latents dtype seed reference students chosen shape teacher_sha256 metrics".split()
ROUNDS = 5          # of the speed measurement, after one to warm up
METRICS = "psnr ssim lpips temporal fvd".split()
COLUMNS = {     # of the table: heading, text of a cell
    "psnr": ("PSNR (dB)", "{:.2f}"), "ssim": ("SSIM", "{:.4f}"), "lpips": ("LPIPS", "{:.4f}"),
    "temporal": ("temporal error", "{:.2f}"), "fvd": ("rFVD", "{:.2f}"),
    "psnr_kept": ("PSNR kept", "{:.1f}%"), "fps": ("decode FPS", "{:.1f}"), "speed_up": ("speed-up", "{:.2f}x")}
I3D_URL = "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/main/i3d_torchscript.pt"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
CACHE = Path(torch.hub.get_dir()) / "checkpoints"
ALEXNET = "alexnet-owt-7be5be79.pth"        # torchvision's name; its checksum begins so


# ----------------------------------------------------------------------------------------------------------
# metrics

def ssim(a, b):
    """SSIM of each clip, (B,): the mean over frames of torchmetrics' SSIM. The window is Gaussian, with sigma 1.5.
    Frames are reflected at their borders; scikit-image leaves the border out.
    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. ValueError if shapes differ."""
    from torchmetrics.functional.image import structural_similarity_index_measure
    check_shapes(a, b)
    each = structural_similarity_index_measure(frames_of(a), frames_of(b), data_range=1.0, reduction="none")
    return each.view(len(a), -1).mean(1)


def temporal_error(a, b):
    """Temporal consistency of each clip, (B,): the mean absolute error of the differences between neighbouring frames,
    in 8-bit levels (1/255 of [0, 1]). Zero where a moves and flickers as b does, whatever their colours.
    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. NaN for single frames. ValueError if shapes differ."""
    check_shapes(a, b)
    change_a, change_b = (frames_of(v).unflatten(0, (len(v), -1)).diff(dim=1) for v in (a, b))
    return 255 * (change_a - change_b).abs().mean((1, 2, 3, 4))


def frechet_distance(features_a, features_b):
    """Fréchet distance between the Gaussians that fit two sets of features, (n, d) and (m, d): |μa - μb|² +
    tr(Σa + Σb - 2 (Σa Σb)^½), as in FVD (Unterthiner et al. 2018), covariances with n - 1. A float, in float64.
    With Σ = XᵀX, X the centred features, the last trace is the sum of the singular values of Xa Xbᵀ. This is exact
    for any rank, so also for fewer clips than dimensions.
    ValueError for fewer than two rows, or for features that are not finite."""
    a, b = features_a.double(), features_b.double()
    if min(len(a), len(b)) < 2 or not torch.cat([a, b]).isfinite().all():
        raise ValueError("a Fréchet distance needs two sets of two or more rows, all finite")
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    distance = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(distance.item(), 0.0)


def load_lpips(path, device):
    """LPIPS (Zhang et al. 2018) on AlexNet, mean over frames: a function of two clips (B, 3, T, H, W) in [-1, 1].
    path: torchvision's AlexNet weights; None downloads them, with a checked sum, into PyTorch's cache."""
    import lpips
    net = lpips.LPIPS(net="alex", verbose=False, pnet_rand=path is not None).to(device)
    if path:
        state = torch.load(path, weights_only=True)
        net.net.load_state_dict({key: state["features" + key[key.index("."):]] for key in net.net.state_dict()})
    return lambda a, b: net(frames_of(a) * 2 - 1, frames_of(b) * 2 - 1).view(len(a), -1).mean(1)


def load_i3d(path, device):
    """I3D features for FVD, (B, d) with d = 400: a function of clips (B, 3, T, H, W) in [-1, 1].
    The detector is StyleGAN-V's TorchScript, whose features are the original FVD's. It brings clips from [0, 255] to
    [-1, 1] (rescale) and to 224x224 (resize) itself. Others may not, so its checksum is checked. path: as above."""
    file = Path(path or CACHE / "i3d_torchscript.pt")
    if not path and not file.is_file():
        check_writable(CACHE)
        torch.hub.download_url_to_file(I3D_URL, str(file), I3D_SHA256, progress=False)
    if hashlib.sha256(file.read_bytes()).hexdigest() != I3D_SHA256:
        raise OSError("it is another file")
    detector = torch.jit.load(str(file), map_location=device).eval()
    return lambda video: detector(255 * frames_of(video).unflatten(0, (len(video), -1)).transpose(1, 2),
                                  rescale=True, resize=True, return_features=True)


def load_metrics(args):
    """({name: function of two clips, fvd's of one}, {name of what cannot be loaded: why})."""
    metrics, without = {"psnr": psnr, "ssim": ssim, "temporal": temporal_error}, {}
    warnings.simplefilter("ignore")         # both networks are made by deprecated functions
    for name, load, path, wanted in (("lpips", load_lpips, args.lpips_weights, f"{ALEXNET} with --lpips-weights"),
                                     ("fvd", load_i3d, args.i3d, "i3d_torchscript.pt with --i3d")):
        try:
            if name in args.metrics:
                metrics[name] = load(path, args.device)
        except Exception as error:      # no network, no such file, another file: all mean "not there"
            without[name] = f"no weights ({summary(error)}); name {wanted}, or put it into {CACHE}"
    return {name: metrics[name] for name in args.metrics if name in metrics}, without


def decode_speeds(decoders, latents):
    """Frames per second of each decoder, {name: function of latents}, all on the same latents; medians over ROUNDS.
    The decoders take turns, so that whatever else the machine does slows all of them."""
    seconds = {name: [] for name in decoders}
    for _ in range(1 + ROUNDS):
        for name, decode in decoders.items():
            start = time.perf_counter()
            video = decode(latents)
            video.flatten()[0].item()               # waits for a GPU
            seconds[name].append(time.perf_counter() - start)
    frames = video.shape[0] * video.shape[2]
    return {name: frames / statistics.median(times[1:]) for name, times in seconds.items()}


# ----------------------------------------------------------------------------------------------------------
# what to evaluate, and on what

def share(mine):
    """A list of every process's object, the same on all of them."""
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return parts


def progress(items, total, unit):
    """Passes items on, and shows how many there were: by a bar on a terminal, else by a line every 20 seconds."""
    look = {"leave": False} if sys.stderr.isatty() else {
        "delay": 20, "mininterval": 20, "bar_format": "{n_fmt} of {total_fmt}\n"}
    return tqdm(items, unit, total, disable=RANK > 0, **look)


def load_students(args):
    """{label: student}, and the first one's label and itself."""
    device = find_device(args.device)
    students = dict(choose_student(path, None if Path(path or ".").exists() else args.teacher, str if RANK else print)
                    for path in args.student or [None])
    for student in students.values():
        student.to(device, getattr(torch, args.dtype)).eval()
        if device.type == "cuda":
            student.channels_last()
    return students, *next(iter(students.items()))


def load_fitting_teacher(args, students, first):
    """The teacher, as the first student is, by the weights of a student's run unless --teacher-weights says others,
    after a check that all students decode its latents."""
    name = args.teacher or first.metadata["teacher"]
    for label, student in students.items():     # before anything is fetched, where a preset has the teacher's numbers
        like = CONFIGS.get(name, student.config)
        check_fit(student, f"the {name} teacher", (name,), like.latent_channels, like.compression, like.drop_first,
                  label)
        run = read_json(folder_of(label) / "args.json")
        if run.get("teacher") == name:
            args.teacher_weights = args.teacher_weights or run["teacher_weights"]
    return load_teacher(name, args.teacher_weights, first.device, first.dtype)


def clip_shape(args, teacher):
    """(frames, height, width) of a clip: what was asked for, else the paper's for that data set and teacher."""
    frames = args.frames or max(17 if teacher.images else 16, teacher.fewest)
    usual = DATA_SETS.get(args.data, [[128 if teacher.name == "tiny" else 256] * 2])[0]
    # The usual sides are rounded down to multiples of the teacher's compression: 360 is no multiple of 32.
    height, width = args.size or (side // d * d for side, d in zip(usual, teacher.compression[1:]))
    teacher.check_clip(frames, height, width)
    return frames, height, width


@dataclass
class Clips:
    """Clips (3, T, H, W), or latents (C, t, h, w); names, {key: name}, of those to evaluate; and why not of those
    skipped, {name: why}. An item is (key, clip), or (key, why not): worker processes cannot hand over errors."""
    clips: object
    names: dict
    skipped: dict

    def __getitem__(self, i):
        n = list(self.names)[i]
        try:
            return n, self.clips[n]
        except BadVideo as error:
            return n, str(error).removeprefix(f"{self.names[n]}: ")

    def skip(self, name, reason):
        self.skipped[name] = reason
        if RANK == 0:
            print(f"skipping {name}: {reason}", file=sys.stderr)


def open_clips(args, frames, height, width):
    """The Clips that --data means."""
    if args.data == "synthetic":
        if height != width:
            raise ValueError(f"made-up video is square: --size {height}, not {height}x{width}")
        scenes = range(0, CLIPS_PER_SCENE * (args.clips or 16), CLIPS_PER_SCENE)       # the first clip of each
        return Clips(SyntheticClips(frames, height, seed=args.seed), {n: f"clip {n}" for n in scenes}, {})
    if args.download and RANK == 0 and not Path(args.root or f"data/{args.data}").exists():
        download(args.data, args.root)
    share(None)             # the others wait for a download
    folder, names = find_clips(args.data, args.root, args.split)
    clips = VideoClips(folder, frames, (height, width), train=False, names=names)
    return Clips(clips, dict(enumerate(clips.files[:args.clips])), clips.skipped)


def finite(x, what):
    """x, or BadVideo if its values are not finite."""
    if not x.isfinite().all():
        raise BadVideo(f"{what} are not finite")
    return x


def read_latents(file, student, teacher=None):
    """The latents (C, t, h, w) in a .safetensors file, "latents" or its only tensor; mapped, not loaded. ValueError
    where they are not finite, or where the student does not decode those of `teacher` or of the one in its metadata."""
    try:
        with safe_open(file, "pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}
            about = held.metadata() or {}
    except Exception as error:      # safetensors has a class of its own for damaged files
        raise BadVideo(f"no safetensors file ({summary(error)})") from None
    latents = tensors.get("latents", next(iter(tensors.values())) if len(tensors) == 1 else torch.empty(0))
    if latents.ndim < 4 or math.prod(latents.shape[:-4]) != 1 or not latents.numel() * latents.is_floating_point():
        raise BadVideo(f'holds {", ".join([*tensors][:3]) or "no tensor"} ({latents.dtype}, {tuple(latents.shape)}), '
                       'but "latents" are needed, floating-point, (C, t, h, w) or (1, C, t, h, w)')
    for name in filter(None, (teacher, about.get("teacher"))):
        check_fit(student, f"latents of {name}", (name,), None, None, student.config.drop_first)
    latents = latents.flatten(0, -4)
    for t, frame in enumerate(latents.unbind(1)):
        finite(frame.float(), f"its values in latent frame {t}")
    return latents


def open_latents(args, student):
    """The Clips of the latents in a folder, of the shape that most have of those that the student decodes."""
    latents, channels = Clips({}, {}, {}), student.config.latent_channels
    for file in sorted(Path(args.latents).glob("[!.]*.safetensors"))[:args.clips]:
        try:
            latents.clips[file.name] = read_latents(file, student)
        except ValueError as error:
            latents.skip(file.name, str(error))
    shapes = [x.shape for x in latents.clips.values() if len(x) == channels]
    if not shapes:
        raise ValueError(f"no latents of {channels} channels in {args.latents}: examples/generate.py makes some")
    for name, x in latents.clips.items():
        if x.shape == statistics.mode(shapes):
            latents.names[name] = name
        else:
            latents.skip(name, f"of shape {tuple(x.shape)}")
    return latents


# ----------------------------------------------------------------------------------------------------------
# comparing

def measure(args, clips, videos_of, reference, metrics):
    """{key: what is known of a clip}, measured by all processes together; adds to clips.skipped.
    videos_of(batch (B, ...)) -> {model: (B, 3, T, H, W)}. Each video is compared with that of `reference`. Known are
    a clip's "hash"; its "values", {model: {metric: value}}; and "features", {model: I3D's}. A clip of which some video
    is not finite is skipped for all models."""
    loader = DataLoader(clips, args.batch, sampler=range(RANK, len(clips.names), WORLD), collate_fn=list,
                        num_workers=args.workers)
    known = {}
    for batch in progress(loader, len(loader), "batches"):
        known.update(batch)
        good = {n: clip for n, clip in batch if not isinstance(clip, str)}
        videos = videos_of(torch.stack([*good.values()]).to(args.device)) if good else {}
        for i, (n, clip) in enumerate(good.items()):
            try:
                one = {model: finite(video[i:i + 1], f"{model} gave values that") for model, video in videos.items()}
            except BadVideo as error:
                known[n] = str(error)
                continue
            known[n] = {
                "hash": hashlib.sha256(clip.float().numpy().tobytes()).hexdigest(),
                "features": {model: metrics["fvd"](video)[0].cpu() for model, video in one.items() if "fvd" in metrics},
                "values": {model: {name: metric(video, one[reference]).item() for name, metric in metrics.items()
                                   if name != "fvd"} for model, video in one.items() if model != reference}}
    known = dict(sorted(pair for part in share(known) for pair in part.items()))
    for n, reason in [*known.items()]:
        if isinstance(reason, str):
            clips.skip(clips.names[n], known.pop(n))
    if not known:
        raise ValueError(f"none of the clips can be evaluated: {reason}")
    return known


def distances(known, models, real, truth):
    """({model: Fréchet distance of the clips in `known` to those of `truth` in `real`}, a note about them or None)."""
    stack = lambda known, model: torch.stack([clip["features"][model] for clip in known.values()])
    features = stack(real, truth)
    n, d = min(len(known), len(real)), features.shape[1]
    if n < 2:
        return {}, "needs two clips or more"
    few = f"{n} clips are too few to mean much: I3D has {d} features, and the distance falls with more clips"
    return {model: frechet_distance(stack(known, model), features) for model in models
            if model != truth}, few if n <= d else None


def table(rows, metrics, **style):
    """The rows as text."""
    names = [*metrics, "psnr_kept", "fps", "speed_up"]
    cells = [["model", "decoder (M)", *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        values = [COLUMNS[name][1].format(row[name]) if math.isfinite(row[name]) else "-" for name in names]
        cells.append([row["model"].replace("|", "/").replace("\n", " "), f"{row['parameters'] / 1e6:.2f}", *values])
    return text_table(cells, **style)


def folder_of(label):
    """The folder of the student of that label: its run's, if it has one."""
    path = Path(label).resolve()
    return path if path.is_dir() else path.parent


def read_json(file):
    """What a JSON file holds; {} where there is none. ValueError that names a damaged one."""
    with named(file):
        return json.loads(file.read_text()) if file.is_file() else {}


def trained_on(label, clips):
    """How many of the clips a student was trained on, by its run's args.json."""
    run = read_json(folder_of(label) / "args.json")
    if "held_out" not in run or not isinstance(clips.clips, VideoClips):
        return 0
    files = {Path(clips.clips.root, name).resolve() for name in clips.names.values()}
    files -= {Path(run["val_data"] or run["data"], name).resolve() for name in run["held_out"]}
    return sum(file.is_relative_to(Path(run["data"]).resolve()) for file in files)


def check_same(out, settings):
    """ValueError where the results in `out` are of other settings, of more clips, or of metrics left out now."""
    before = read_json(out / "results.json") or settings
    other = [f"{key} {before.get(key)} (now {settings[key]})" for key in SAME if before.get(key) != settings[key]
             and not (key == "metrics" and set(before[key]) < set(settings[key])
                      or key == "chosen" and before[key] < settings[key])]
    if other:
        raise ValueError(f"{out}/results.json is of {', '.join(other)}: name another folder with --out, or delete it")


def compare(args):
    """Measures teacher and students on clips, writes the results and prints the table."""
    students, first, student = load_students(args)
    # --out, else the first student's run or out/evaluate, in these a folder for each data set
    run, what = folder_of(first), args.latents or args.data
    out = run if run.parent == Path("out").resolve() else Path("out/evaluate")
    if what != "synthetic":
        out /= Path(what).resolve().name
    out = Path(args.out or out)
    check_writable(out)
    teacher = load_fitting_teacher(args, students, student)
    label, device = f"{teacher.name} (teacher)", student.device
    decoders, networks = {label: teacher.decode} | students, {label: teacher.vae} | students
    reference = label if args.latents or args.against == "teacher" else INPUT
    if args.latents:
        COLUMNS["fvd"] = "FVD", "{:.2f}"        # of generated video, not of reconstructions
        clips = open_latents(args, student)
        shape = student(clips.clips[next(iter(clips.names))][None].to(device, student.dtype)).shape[2:]
    else:
        shape = clip_shape(args, teacher)
        clips = open_clips(args, *shape)
    weights = {name: weights_hash(network) for name, network in networks.items()}
    settings = vars(args) | {           # of weights the teacher's matter: a student may have been trained on
        "reference": reference, "students": [*students], "chosen": len(clips.names), "shape": [*shape],
        "weights": weights, "teacher_sha256": weights[label]}
    check_same(out, settings)
    trained = [f"{name} was trained on {n} of these clips: it is worse on others" for name in students
               if (n := trained_on(name, clips))]
    metrics, without = load_metrics(args)
    latents_of = lambda batch: (batch if args.latents else teacher.encode(batch, sample=False)).to(student.dtype)

    def videos_of(batch):
        latents = latents_of(batch)
        inputs = {} if args.latents else {INPUT: batch}
        return inputs | {name: decode(latents) for name, decode in decoders.items()}

    known = measure(args, clips, videos_of, reference, metrics)
    real, truth = known, reference
    if args.latents and "fvd" in metrics:
        real_clips = open_clips(args, *shape)
        real, truth = measure(args, real_clips, lambda batch: {INPUT: batch}, INPUT, metrics), INPUT
        clips.skipped |= real_clips.skipped
    if RANK:
        return
    fvd, note = distances(known, decoders, real, truth) if "fvd" in metrics else ({}, None)
    # Small clips are timed four at a time: PyTorch's convolutions on a CPU are slow for one clip of few channels.
    together = max(1, min(4, 2 ** 20 // math.prod(shape)))
    clip = clips.clips[next(iter(known))][None].to(device)
    fps, rows = decode_speeds(decoders, latents_of(clip).repeat(together, 1, 1, 1, 1)), []
    for name, network in networks.items():
        parameters = getattr(network, "decoder", network).parameters()
        row = {"model": name, "parameters": sum(p.numel() for p in parameters), **dict.fromkeys(COLUMNS, math.nan),
               "fps": fps[name], "speed_up": fps[name] / fps[label], "fvd": fvd.get(name, math.nan)}
        rows.append(row)
        values = [clip["values"].get(name, {}) for clip in known.values()]
        row |= {metric: statistics.fmean(value[metric] for value in values) for metric in values[0]}
        row["psnr_kept"] = 100 * row["psnr"] / rows[0]["psnr"]

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    notes = [f"{what}: {len(known)} clips of {'x'.join(map(str, shape))} (frames x height x width)"
             f"{f', FVD to {len(real)} real clips of {args.data}' if real is not known else ''}"
             f"{', against the teacher' if reference == label else ''}; {hardware}, {torch.get_num_threads()} CPU "
             f"threads, {args.dtype}, {together} at a time for speed; {len(clips.skipped)} clips skipped"]
    notes += [f"{COLUMNS[metric][0]}: {why}" for metric, why in ({"fvd": note} | without).items() if why]
    notes += trained
    results = settings | {
        "rows": rows, "clips": len(known), "device": hardware, "notes": notes, "skipped": clips.skipped,
        "without": without, "torch": torch.__version__,
        "per_clip": [{"clip": clips.names[n], "sha256": clip["hash"], **clip["values"]} for n, clip in known.items()]}
    film = draw_clips(clips, known, videos_of, first, reference, device)
    write_results(out, film, "\n\n".join([table(rows, args.metrics, markdown=True), *notes]), results)
    print(table(rows, args.metrics), *notes, *(os.path.relpath(out / name) for name in WRITTEN), sep="\n")


# ----------------------------------------------------------------------------------------------------------
# pictures

def draw_clips(clips, known, videos_of, student, reference, device):
    """A film, [(H, W, 3) uint8]: rows with the worst, the median and the best clip of `student` by the first metric,
    columns with the models' videos and the error. Clips are decoded again: keeping all would take memory."""
    order, rows, text = sorted(known, key=lambda n: [*known[n]["values"][student].values(), 0][0]), [], ""
    for n in dict.fromkeys(order[i] for i in (0, len(order) // 2, -1)):
        videos = {name: frames_of(video) for name, video in videos_of(clips.clips[n][None].to(device)).items()}
        videos["|error| x4"] = (videos[student] - videos[reference]).abs().mul(4).clamp(max=1)
        rows.append(np.stack([to_image(frame) for frame in torch.cat([*videos.values()], dim=3)]))
        text += f"{clips.names[n]}: {', '.join(videos)}\n"
    film = np.concatenate(rows, axis=1)
    by = 1 + max(film.shape) // 16000       # H.264 takes sides of 16384 pixels
    film = film[:, ::by, ::by]
    title = Image.new("RGB", (film.shape[2], 64), "white")
    ImageDraw.Draw(title).text((4, 4), text, "black", ImageFont.load_default(15))
    return [np.concatenate([title, frame]) for frame in film]


def to_image(frame):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return frame.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def write_film(path, images, rate, crf=15):
    """An H.264 film of (H, W, 3) uint8 images."""
    stream = None
    with av.open(f"file:{path}", "w") as film:
        for image in images:
            stream = stream or add_h264(film, rate, *image.shape[:2], crf)
            film.mux(stream.encode(to_frame(image, stream)))
        film.mux(stream.encode())


def write_results(out, film, text, results):
    """Writes all four files to the folder `out`, or none of them."""
    with named(out), ExitStack() as stack:
        files = [stack.enter_context(atomically(out / name)) for name in WRITTEN]
        Image.fromarray(film[len(film) // 2]).save(files[0])
        write_film(files[1], film * -(-48 // len(film)), 12, crf=22)            # four seconds
        files[2].write_text(text + "\n")
        finite = json.loads(json.dumps(results), parse_constant=lambda _: None)         # JSON has no infinities nor NaN
        files[3].write_text(json.dumps(finite, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
# films

JOINED = 0.1            # by how many seconds stamps go back where another recording begins
# Sound that is copied. PyAV's own list of what .mp4 and .mov take has codecs that their muxers then refuse.
COPIED = {".mp4": "aac mp3 mp3float ac3 eac3 alac opus flac".split(), ".mov": "aac mp3 mp3float ac3 alac".split()}


def add_h264(container, rate, height, width, crf=15, look=(1, 1, 1)):
    """An H.264 stream that is tagged with its colours (data.py's `colours`); full chroma where the size is odd."""
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if height % 2 or width % 2 else "yuv420p"
    stream.colorspace, stream.color_primaries, stream.color_trc, stream.color_range = *look, 1      # limited range
    return stream


def to_frame(image, stream):
    """(H, W, 3) uint8 RGB as a frame of that stream."""
    matrix = stream.colorspace
    convert = lambda image: av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format=stream.pix_fmt, dst_colorspace=5 if matrix == 6 else matrix, dst_color_range="MPEG",
        interpolation=EXACT, threads=1)
    frame = convert(image)
    if stream.pix_fmt == "yuv420p":
        # The converter's chroma is the mean of two columns, and players take it to be of the left one. Of an image
        # that is blurred to the right it is the mean of three, the left one in the middle.
        left = image[:, [0, *range(stream.width - 1)]]
        chroma = convert(np.uint8((np.uint16(left) + image + 1) // 2))
        for n in (1, 2):
            frame.planes[n].update(chroma.planes[n])
    return frame


def packets_of(container, ends):
    """Yields the file's packets; to `ends` go the times in seconds up to which there were some. Where the file cannot
    be read on, the last is None, which makes decoders give what they hold."""
    try:
        for packet in container.demux():
            if packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
            yield packet
    except av.FFmpegError:
        yield None


def upright_frames(container, stream, sounds, ends):
    """Yields (image (H, W, 3) uint8, upright; time stamp; `colours`) of a video stream; other packets go to `sounds`.
    Frames are brought to the size of the first. Packets that cannot be decoded are left out. AVI's stamps are of
    packets, in the order of decoding: the frames shown take them in turn."""
    size, stamps, name = {}, [], container.name.removeprefix("file:")
    for packet in packets_of(container, ends):
        if packet and packet.stream is not stream:
            sounds.append(packet)
            continue
        try:
            frames = stream.decode(packet)
        except av.InvalidDataError:
            continue
        if container.format.name == "avi" and packet and packet.size:
            heappush(stamps, packet.dts)
        for frame in frames:
            size = size or {"width": frame.width, "height": frame.height}
            check_colours(name, frame, tagged=True)
            check_fields(name, frame)
            stamp = heappop(stamps) if stamps else frame.pts
            yield picture(frame, **size), stamp, colours(frame)


def rising(latest, stream, stamp, step):
    """The stamp of a stream's next frame or packet, later than the one before: a missing one comes a `step` later.
    Where stamps go back by more than JOINED, a joined recording begins. latest: {stream: (last stamp, shift)}."""
    last, shift = latest.get(stream, (-step, max(0, -(stamp or 0))))
    given = last + step if stamp is None else stamp + shift
    if given < last - JOINED / stream.time_base:
        given, shift = last + step, last + step - stamp
    given = max(given, last + 1)
    latest[stream] = given, shift
    return given


def in_windows(frames, through, length, overlap):
    """Yields (image, original, ...) for each (original, ...) of `frames`: windows of `length` originals go through
    `through`, each shares `overlap` with the one before and is faded into it; the last one may be shorter."""
    waiting, decoded = [], ()           # decoded: of the first of those that wait, by the window before
    for frame in chain(frames, [None]):
        if frame:
            waiting.append(frame)
            if len(waiting) < length:
                continue
        if len(waiting) > len(decoded):
            before, decoded = decoded, through([original for original, *_ in waiting])
            for i, image in enumerate(before):
                decoded[i] = image + (i + 1) / (len(before) + 1) * (decoded[i] - image)
        ready = length - overlap if frame else len(waiting)
        for image, original in zip(decoded[:ready], waiting):
            yield to_image(image), *original
        waiting, decoded = waiting[ready:], decoded[ready:]


@contextmanager
def named(what):
    """An error in it becomes a ValueError that says of what."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{what}: {why(error)}") from None


def reconstruct(teacher, student, source, target, frames):
    """Writes the video `source`, of any size and length, through the teacher's encoder and the student to `target`.
    Size, frames, their time stamps and the sound are kept; stderr says what is not. Windows of `frames` frames overlap
    and are faded into each other, so memory depends on `frames` and the size only. Edges are repeated up to what the
    teacher takes, and cut off again. Returns (frames, mean PSNR in dB, frames missing in the source); ValueError."""
    (_, d_h, d_w), errors, ends, packets, latest = teacher.compression, [], [0], [], {}

    def through(images):
        video = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)[None]
        video = video.to(student.device, student.dtype).div(127.5).sub(1)
        t, h, w = video.shape[2:]
        video = F.pad(video, (0, -w % d_w, 0, -h % d_h, 0, frames - t), mode="replicate")
        latents = teacher.encode(video, sample=False).to(student.dtype)
        decoded = student.decode(finite(latents, f"the {teacher.name} teacher's latents in {student.dtype}"))
        return frames_of(finite(decoded, f"the student's values after {len(errors)} frames")[..., :t, :h, :w])

    with (named(f"{source} to {target}"), open_video(source) as container, atomically(target) as file,
          av.open(f"file:{file}", "w") as out):
        stream, rate = video_stream(container)
        stream.thread_type = "AUTO"
        images = in_windows(upright_frames(container, stream, packets, ends), through, frames, min(4, frames // 4))
        first = next(images, None)
        if not first:
            raise BadVideo("no frame in it can be decoded")
        film, shape = add_h264(out, rate, *first[0].shape[:2], look=first[3]), stream.sample_aspect_ratio
        film.time_base = film.codec_context.time_base = stream.time_base
        if shape:
            film.sample_aspect_ratio = shape if film.height == stream.height else 1 / shape
        takes = COPIED.get(file.suffix.lower(), out.supported_codecs)
        # A track without a codec context is one that no decoder knows.
        sounds = {track: out.add_stream_from_template(track) for track in container.streams.audio
                  if track.codec_context and track.name in takes}
        step = max(1, round(1 / (rate * stream.time_base)))
        for shown in chain([first], progress(images, stream.frames or None, "frame"), [None]):
            frame = None            # after the last one, for what the encoder still holds
            if shown:
                image, original, stamp, _ = shown
                error = np.square(image.astype(np.float32) - original).mean() / 255 ** 2
                errors.append(-10 * math.log10(max(error, 1e-10)))
                frame = to_frame(image, film)
                frame.pts, frame.time_base = rising(latest, stream, stamp, step), stream.time_base
            out.mux(film.encode(frame))
            for packet in packets:
                track = packet.stream
                if track in sounds and packet.dts is not None:
                    packet.dts = packet.pts = rising(latest, track, packet.dts, packet.duration or 1)
                    packet.stream = sounds[track]
                    out.mux(packet)
            packets.clear()
        # Not read: what the index lists, without what an edit list hides; or what should come before the file ends.
        early = ((container.duration or 0) + (container.start_time or 0)) / av.time_base - max(ends)
        by_time = round(early * rate) if early > 0.1 else 0
        missing = max(by_time, sum(not entry.is_discard for entry in stream.index_entries) - len(errors))
        lost = [f"{other.type} {other.name}" for other in container.streams if other not in (stream, *sounds)]
        lost += ["chapters"] * bool(container.chapters())
        lost += [f"{stream.pix_fmt} (but {film.pix_fmt})"] * (stream.pix_fmt != film.pix_fmt)
    if lost:
        print(f"{source} to {target}: not kept: {', '.join(lost)}", file=sys.stderr)
    return len(errors), statistics.fmean(errors), missing


def one_film(args):
    """--reconstruct; and --decode, four latent frames at a time. ValueError for what cannot be read or written."""
    students, label, student = load_students(args)
    source, target = args.film
    if args.decode:
        with named(f"{source} to {target} by {label}"), atomically(target) as file:
            latents = read_latents(source, student, args.teacher)
            chunks = (chunk[None].to(student.device, student.dtype) for chunk in latents.split(4, dim=1))
            images = (to_image(image) for video in student.stream(chunks)
                      for image in frames_of(finite(video, "the student's values")))
            frames = student.config.frames(latents.shape[1])
            write_film(file, progress(images, frames, "frames"), args.fps or 24)
        return print(f"{target}: {frames} frames by {label}")
    teacher = load_fitting_teacher(args, students, student)
    count, quality, missing = reconstruct(teacher, student, source, target, clip_shape(args, teacher)[0])
    print(f"{target}: {count} frames through the {teacher.name} teacher's encoder and {label}, PSNR {quality:.2f} dB")
    if missing:
        print(f"{source} promises {count + missing} frames: {missing} could not be read and are missing from {target}",
              file=sys.stderr)


def frame_rate(text):
    """An argparse type: "24", "29.97" or "30000/1001" as a Fraction up to 1000."""
    try:
        rate = Fraction(text).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = 0
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"takes frames per second up to 1000, such as 24 or 30000/1001, not {text!r}")
    return rate


REAL = " data root split download seed"         # of video to compare with
TAKES = {       # the flags that go with each of these, or with none of them, besides those that go with all
    "reconstruct": "teacher_weights frames", "decode": "fps",
    "latents": "teacher_weights metrics lpips_weights i3d clips batch workers out",
    "data": "teacher_weights metrics lpips_weights i3d clips batch workers out frames size against" + REAL}


def parse():
    """The arguments. OSError or ValueError where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--data WHAT] [--student PATH] [options]; --help explains each")
    add, count = parser.add_argument, number(int, 1)
    add("--data", default="synthetic", help="davis, ucf101, vidgen or openvid, in data/<name>; a video; a folder of "
        "videos or folders of frames; or synthetic, made-up video that no training sees (default)")
    add("--root", help="where the data set lies, if not in data/<name>")
    add("--split", help="a data set's list, or a file of names (default: DAVIS's test-dev, else val; testlist01)")
    add("--download", action="store_true", help="fetch davis (trainval, 0.8 GB) or ucf101 (7 GB) where it is not there")
    add("--student", nargs="+", help="runs' folders or files (default: the newest under out/, else the shipped one)")
    add("--teacher", choices=TEACHERS, help="default: the one that the first student was trained with")
    add("--teacher-weights", help='folder, file, or "random" to measure speed only (default: those that the '
        "first student was trained with, else the released weights)")
    add("--against", choices=("input", "teacher"), default="input", help="to compare with (default input)")
    add("--metrics", nargs="+", choices=METRICS, help="default: psnr ssim temporal, of real video lpips fvd too")
    add("--lpips-weights", help=f"torchvision's {ALEXNET} (default: PyTorch's cache, or a download of 233 MB)")
    add("--i3d", help="i3d_torchscript.pt (default: PyTorch's cache, or a download of 51 MB)")
    add("--clips", type=count, help="the first so many (default: all; 16 of made-up video)")
    add("--frames", type=count, help="frames of a clip (default: 17; 16 for dc and tiny)")
    add("--size", type=parse_size, help="pixels (default: 512 for davis, 360x640 for openvid, else 256; 128 for tiny)")
    add("--batch", type=count, default=1, help="clips at a time (default 1)")
    add("--workers", type=number(int, 0), default=0, help="processes that read clips ahead (default 0)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=HELD_OUT_SEED,
        help=f"of made-up video (default {HELD_OUT_SEED})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..., mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32")
    add("--threads", type=count, help="CPU threads (default: PyTorch's choice)")
    add("--out", help="folder for what is written (default: the first student's run, else out/evaluate)")
    add("--reconstruct", nargs=2, metavar=("IN", "OUT"),
        help="a video through encoder and first student, sound and time stamps kept")
    add("--decode", nargs=2, metavar=("LATENTS", "OUT"), help="saved latents through the first student")
    add("--fps", type=frame_rate, help="frames per second of --decode's video: 24 (default), 29.97, 30000/1001 ...")
    add("--latents", help="a folder of saved latents: students against teacher, and FVD of both to --data")
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    usual = "psnr ssim temporal" if args.data == "synthetic" else METRICS
    args.metrics = [metric for metric in METRICS if metric in (args.metrics or usual)]

    args.film = args.reconstruct or args.decode
    # Flags that do not go together, or what is missing, before anything is fetched.
    mode = next((mode for mode in TAKES if mode in given), "data")
    takes = f"{mode} student teacher device dtype threads {TAKES[mode]}"
    if mode == "latents":
        takes += REAL * ("fvd" in args.metrics)
        mode += f" and --metrics {' '.join(args.metrics)}"
    for name in given.difference(takes.split()):
        raise ValueError(f"--{name.replace('_', '-')} does not go with --{mode}")
    if given & {"root", "download"} and args.data not in DATA_SETS or "split" in given and args.data == "synthetic":
        raise ValueError(f"--root, --split and --download go with a data set's name: --data {', '.join(DATA_SETS)}")
    if args.film:
        source, target = map(Path, args.film)
        if target.suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise ValueError(f"{target}: films are .mp4, .mkv or .mov")
        if target.resolve() == source.resolve(strict=True):
            raise ValueError(f"{target} would be written over")
    elif args.data != "synthetic" and not args.download:
        find_clips(args.data, args.root, args.split)
    return args


@torch.inference_mode()
def main():
    args = parse()
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=1))      # a download may be waited for
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False     # float32 is float32
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.film:
        compare(args)
    elif RANK == 0:             # one film is the first process's
        one_film(args)
    if WORLD > 1:
        dist.barrier()              # one that leaves while another still works may abort
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "smaller --batch, --size or --frames, or --dtype bfloat16, need less")
