"""How good and how fast are a teacher and its students?

Gives the rows of the paper's Tables 3 and 4, and pictures to look at.

    python evaluate.py                                     # the newest student under out/, on made-up video
    python evaluate.py --data davis                        # Table 4: DAVIS-2017 in data/davis (--download fetches it)
    torchrun --nproc_per_node=8 evaluate.py --data ucf101 --teacher ltx --student out/a out/b   # Table 3, two students
    python evaluate.py --data my_videos --size 480x832 --against teacher

    python evaluate.py --reconstruct in.mp4 out.mp4        # any video through encoder and student
    python evaluate.py --decode latents.safetensors out.mp4 --fps 24       # saved latents of any length to video

    python evaluate.py --generate prompts.txt --pipeline Lightricks/LTX-Video --latents out/latents
    python evaluate.py --latents out/latents --data openvid        # Table 3's FVD: generated against real video

Every clip is encoded once (the posterior's mean), decoded by the teacher and by every student, and compared with the
input. Values go from [-1, 1] to [0, 1] and are clamped, nothing else. Prints a table and writes results.json,
results.md, compare.png and compare.mp4.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import partial
from heapq import heappop, heappush
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data import (BROKEN, CLIPS_PER_SCENE, DATA_SETS, EXACT, HELD_OUT_SEED, BadVideo, SyntheticClips, VideoClips,
                  check_colours, check_fields, check_shapes, colours, download, find_clips, frames_of, header_frames,
                  open_video, picture, psnr, video_stream, why)
from model import (CONFIGS, OWN_FILE, TurboVAED, check_fit, check_writable, default_student, find_checkpoint,
                   find_device, number, replace_files, run_command, text_table)
from teachers import TEACHERS, load_teacher

FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")      # as safetensors calls what latents may be
WRITTEN = ("compare.png", "compare.mp4", "results.md", "results.json")
# What goes with the modes that evaluate nothing, beside --device, --dtype and --threads.
TAKES = {"reconstruct": "student teacher teacher_weights frames", "decode": "student teacher fps",
         "generate": "pipeline latents size frames seed"}
WARM_UP, ROUNDS = 2, 7          # of the speed measurement, which where it is slow ends after FEWEST rounds
FEWEST, ENOUGH = 3, 20          # rounds, seconds
# name: (heading, decimals)
METRICS = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4), "temporal": ("temporal error", 2),
           "grid": ("grid", 2), "fvd": ("rFVD", 2)}
I3D_URL = "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/main/i3d_torchscript.pt"
ALEXNET = "alexnet-owt-7be5be79.pth"        # torchvision's name; its checksum begins so
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"


# ----------------------------------------------------------------------------------------------------------
# metrics

def ssim(a, b):
    """SSIM of each clip, (B,): the mean over frames of torchmetrics' SSIM.

    The window is Gaussian, with sigma 1.5. Frames are reflected at their borders; scikit-image leaves the border out.

    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. ValueError if shapes differ, or frames are smaller than the
    window, 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure
    check_shapes(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs frames of 11x11 or more, not {a.shape[-2]}x{a.shape[-1]}")
    each = structural_similarity_index_measure(frames_of(a), frames_of(b), data_range=1.0, reduction="none")
    return each.view(len(a), -1).mean(1)


def temporal_error(a, b):
    """Temporal consistency of each clip, (B,): the mean absolute error of the differences between neighbouring frames,
    in 8-bit levels (1/255 of [0, 1]). Zero where a moves and flickers as b does, whatever their colours.

    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. NaN for single frames. ValueError if shapes differ.
    """
    check_shapes(a, b)
    change_a, change_b = (frames_of(v).unflatten(0, v.shape[:1] + v.shape[2:3]).diff(dim=1) for v in (a, b))
    return 255 * (change_a - change_b).abs().mean((1, 2, 3, 4))


def grid(a, b, window=32):
    """How strong a grid of 2 or 4 pixels, as upsampling by shuffles leaves it, a paints over flat areas, of each clip,
    (B,): the energy at multiples of 1/4 cycle per pixel (both directions, Hann window) in the tenth of all windows of
    32x32 pixels where b varies least, over that of b there. 1 where a has as much of it as b, below 1 where it is
    smoother. The noise of rounding to 8 bits counts as b's own, so that a perfectly flat b divides by no zero.

    a, b: (B, 3, T, H, W) in [-1, 1], clamped to it. NaN for frames smaller than a window. ValueError if shapes differ.
    """
    check_shapes(a, b)
    if min(a.shape[-2:]) < window:
        return torch.full((len(a),), math.nan)
    hann = torch.hann_window(window, device=a.device)
    hann = hann[:, None] * hann
    found = []
    for pair in zip(a, b):
        grey = [frames_of(video[None]).mean(1) for video in pair]
        windows = [v.unfold(1, window, window // 2).unfold(2, window, window // 2).flatten(0, 2) for v in grey]
        flattest = windows[1].var((1, 2)).argsort()[:max(1, len(windows[1]) // 10)]
        energies = []
        for view in windows:
            view = view[flattest]
            spectrum = torch.fft.fft2((view - view.mean((1, 2), keepdim=True)) * hann).abs().square()
            spectrum = spectrum[:, ::window // 4, ::window // 4].mean(0)
            energies.append(spectrum.sum() - spectrum[0, 0])
        rounding = 15 * hann.square().sum() / 255 ** 2 / 12 / 3         # 15 frequencies, the mean of 3 channels
        found.append((energies[0] + rounding) / (energies[1] + rounding))
    return torch.stack(found)


def frechet_distance(features_a, features_b):
    """Fréchet distance between the Gaussians that fit two sets of features, (n, d) and (m, d): |μa - μb|² +
    tr(Σa + Σb - 2 (Σa Σb)^½), as in FVD (Unterthiner et al. 2018), covariances with n - 1. A float, in float64.

    The last trace is the sum of the square roots of the eigenvalues of the symmetric Σa^½ Σb Σa^½.
    With Σ = XᵀX, X the centred features, those roots are the singular values of Xa Xbᵀ. This is exact for any
    rank, so also for fewer clips than dimensions. No product is squared on the way.

    ValueError for fewer than two rows, or for features that are not finite.
    """
    a, b = features_a.double(), features_b.double()
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError("a Fréchet distance needs two sets of two or more rows, "
                         f"not {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a Fréchet distance needs finite features")
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    a, b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (a, b))      # the same Σ from d rows
    distance = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(distance.item(), 0.0)


def cached(name):
    """Where PyTorch keeps a downloaded file of that name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def load_lpips(path, device):
    """A function of two clips (B, 3, T, H, W) in [-1, 1]: LPIPS (Zhang et al. 2018) on AlexNet, mean over frames, (B,).

    path: torchvision's AlexNet weights; None downloads them, with a checked sum, into PyTorch's cache, or OSError.
    """
    import lpips
    try:
        with warnings.catch_warnings():         # of torchvision's, about how the package asks for the weights
            warnings.simplefilter("ignore")
            net = lpips.LPIPS(net="alex", verbose=False, pnet_rand=path is not None)
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)
            net.net.load_state_dict({key: state[f"features.{key.split('.', 1)[1]}"] for key in net.net.state_dict()})
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("values in it are not finite")
    except Exception as error:      # no network, no such file, another file: all mean "not there"
        raise OSError(f"no AlexNet weights ({why(error)}); name torchvision's {ALEXNET} with --lpips-weights, "
                      f"or put it into {cached(ALEXNET).parent}".replace("\n", " ")) from None
    net = net.to(device).eval()

    def distance(a, b):
        check_shapes(a, b)
        if min(a.shape[-2:]) < 32:
            raise ValueError(f"LPIPS needs frames of 32x32 or more, not {a.shape[-2]}x{a.shape[-1]}")
        return net(frames_of(a) * 2 - 1, frames_of(b) * 2 - 1).view(len(a), -1).mean(1)
    return distance


def load_i3d(path, device, frames):
    """A function of clips (B, 3, T, H, W) in [-1, 1] that gives I3D features, (B, d) with d = 400, for FVD.

    The detector is StyleGAN-V's TorchScript, whose features are the original FVD's. It prepares clips itself:
    rescale=True takes values in [0, 255] to [-1, 1], and resize=True takes frames of any size to 224x224,
    trilinearly. Both are left to it. The range is checked here:
    [0, 255] rescaled must give what [-1, 1] gives as it is.

    path: the file; None downloads it, with a checked sum, into PyTorch's cache. OSError without it, ValueError if it
    is another detector or clips of so many frames are too short for it.
    """
    file = Path(path) if path else cached("i3d_torchscript.pt")
    if not path and not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(I3D_URL, str(file), hash_prefix=I3D_SHA256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise OSError(f"no I3D weights ({why(error)}); name i3d_torchscript.pt with --i3d, "
                          f"or put it into {file.parent}") from None
    try:
        with warnings.catch_warnings():             # the detector is a TorchScript file, deprecated or not
            warnings.simplefilter("ignore")
            detector = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise OSError(f"{file} is no TorchScript file ({why(error).strip().splitlines()[0]})") from None
    detect = lambda x, rescale: detector(x, rescale=rescale, resize=True, return_features=True)
    probe = torch.rand(1, 3, frames, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        rescaled, plain = detect(255 * probe, True), detect(2 * probe - 1, False)
    except RuntimeError:
        raise ValueError(f"I3D takes no clips of {frames} frames" if frames < 10 else
                         f"{file} is not the I3D detector of FVD") from None
    if rescaled.ndim != 2 or not torch.allclose(rescaled, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item()):
        raise ValueError(f"{file} is not the I3D detector of FVD: it does not rescale [0, 255] to [-1, 1]")
    return lambda video: detect(255 * frames_of(video).unflatten(0, (len(video), -1)).transpose(1, 2), True)


def load_metrics(args, frames, device, without):
    """({name: function of two clips}, I3D or None, {metric left out: why}), those of `without` among the latter."""
    functions, detector, without = (
        {"psnr": psnr, "ssim": ssim, "temporal": temporal_error, "grid": grid}, None, dict(without))
    functions = {name: f for name, f in functions.items() if name in args.metrics}
    for name, load in (("lpips", lambda: load_lpips(args.lpips_weights, device)),
                       ("fvd", lambda: load_i3d(args.i3d, device, frames))):
        if name in args.metrics and name not in without:
            try:
                loaded = load()
            except (OSError, ValueError) as error:
                without[name] = str(error)
            else:
                functions, detector = (functions | {name: loaded}, detector) if name == "lpips" else (functions, loaded)
    if dist.is_initialized():           # what one process cannot load none of them computes
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, without)
        without = {name: reason for each in reversed(told) for name, reason in each.items()}
    functions = {name: f for name, f in functions.items() if name not in without}
    return functions, None if "fvd" in without else detector, without


def decode_speeds(decoders, latents):
    """Frames per second of each decoder, {name: function of latents}, all on the same latents.

    The decoders take turns, so that whatever else the machine does slows all of them; medians over ROUNDS rounds, or
    FEWEST, if ENOUGH seconds have gone by then.
    """
    waits = {"cuda": lambda: torch.cuda.synchronize(latents.device), "mps": lambda: torch.mps.synchronize()}
    sync = waits.get(latents.device.type, lambda: None)
    seconds, frames, begun = {name: [] for name in decoders}, {}, time.perf_counter()
    for i in range(WARM_UP + ROUNDS):
        if i >= WARM_UP + FEWEST and time.perf_counter() - begun > ENOUGH:
            break
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

def find_students(paths, teacher):
    """{name: file} of the students asked for; of a hub id, the one for `teacher`.

    Where none is asked for: the newest trained here, else the shipped one.
    """
    if paths:
        names = [short(path) if Path(path).exists() else path for path in paths]
        taken = lambda name: name == "input" or name.endswith("(teacher)")      # tables mean something else by these
        names = [f"./{name}" if taken(name) else name for name in names]
        return {name: find_checkpoint(path, teacher) for name, path in zip(names, paths)}
    file = default_student(quiet=process()[0] > 0)
    return {short(file): file}


def short(path):
    """The path as one would type it from here; a run's folder stands for the student in it."""
    path = Path(path).resolve()
    path = path.parent if path.name == OWN_FILE else path
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def load_decoders(args, files, device):
    """(teacher, {name: student}) of find_students' {name: file}."""
    students = {name: TurboVAED.from_pretrained(file) for name, file in files.items()}
    dtype, first = getattr(torch, args.dtype), next(iter(students.values()))
    named = next((name for name, config in CONFIGS.items() if config == first.config), "tiny")
    name = args.teacher or first.metadata.get("teacher", named)
    fit = lambda *shape: [check_fit(student, f"the {name} teacher", (name,), *shape, label)
                          for label, student in students.items()]
    if name in CONFIGS and not args.teacher_weights:    # a preset has its teacher's shapes: nothing is fetched in vain
        fit(CONFIGS[name].latent_channels, CONFIGS[name].compression, CONFIGS[name].drop_first)
    teacher = load_teacher(name, args.teacher_weights, device, dtype)
    for assumed in fit(teacher.latent_channels, tuple(teacher.compression), teacher.images):
        if assumed and process()[0] == 0:
            print(assumed)
    for student in students.values():
        student.to(device, dtype).eval()
        if device.type == "cuda":
            student.channels_last()
    return teacher, students


def clip_shape(args, teacher):
    """(frames, height, width) of a clip: what was asked for, else the paper's for that data set and teacher."""
    step, extra = teacher.frame_step, int(teacher.images)
    frames = args.frames or (17 - extra) // step * step + extra
    usual = DATA_SETS.get(args.data, [(128, 128) if teacher.name == "tiny" else (256, 256)])[0]
    # The usual sides are rounded down to multiples of the teacher's compression: 360 is no multiple of 32.
    size = args.size or tuple(side // d * d for side, d in zip(usual, teacher.compression[1:]))
    teacher.check_clip(frames, *size)
    return frames, *size


def open_clips(args, frames, height, width):
    """(clips, the numbers of those to evaluate, a function from number to name, {name: why it was skipped at once})."""
    if args.data == "synthetic":
        if height != width:
            raise ValueError(f"made-up video is square: --size {height}, not {height}x{width}")
        # one clip of each painted scene
        return (SyntheticClips(frames, height, seed=args.seed),
                range(0, CLIPS_PER_SCENE * (args.clips or 16), CLIPS_PER_SCENE), "clip {}".format, {})
    if args.download and process()[0] == 0:
        try:
            find_clips(args.data, args.root, args.split)
        except FileNotFoundError:
            download(args.data, args.root)
    if args.download and dist.is_initialized():
        dist.barrier()
    folder, names = find_clips(args.data, args.root, args.split)
    clips = VideoClips(folder, frames, (height, width), train=False, names=names)
    return clips, range(min(args.clips or len(clips), len(clips))), lambda n: clips.files[n], clips.skipped


class SavedLatents(Dataset):
    """Latents from files that --generate, or anybody, wrote.

    Each is a .safetensors that holds `latents`, (1, C, t, h, w).
    """

    def __init__(self, folder):
        self.files = sorted(file for file in Path(folder).glob("*.safetensors") if not file.name.startswith("."))
        if not self.files:
            raise FileNotFoundError(f"no latents in {folder}: --generate prompts.txt --pipeline HUB_ID makes some")

    def usual_shape(self, numbers, channels):
        """The shape, (C, t, h, w), that most of these files have among those of so many channels; ValueError if none
        has."""
        items = (item for _, item, _ in map(OrReason(self).__getitem__, numbers) if item is not None)
        shapes = Counter(item.shape for item in items if len(item) == channels)
        if not shapes:
            raise ValueError(f"none of the files in {self.files[0].parent} holds latents of {channels} channels")
        return shapes.most_common(1)[0][0]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, n):
        try:
            latents = load_file(self.files[n])["latents"]
        except Exception as error:      # safetensors has a class of its own for damaged files
            raise BadVideo(f"no safetensors file with latents ({type(error).__name__})") from None
        if latents.shape[:-4] not in ((), (1,)) or latents.ndim < 4:
            raise BadVideo(f"latents of shape {tuple(latents.shape)}, not (1, C, t, h, w)")
        if 0 in latents.shape or not latents.is_floating_point():
            raise BadVideo(f"latents of shape {tuple(latents.shape)} in {latents.dtype}: no frame, or no numbers")
        if not latents.isfinite().all():
            raise BadVideo("latents that are not finite")
        return latents.flatten(0, -4).float()


def process():
    """(number of this process, how many share the work)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class OrReason(Dataset):
    """(n, item, None), or (n, None, why it cannot be had): what worker processes can hand over."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, n):
        try:
            return n, self.items[n], None
        except BadVideo as error:
            return n, None, str(error)


def measure(items, numbers, args, videos_of, reference, functions, detector, device, name_of, shape=None):
    """This process's share of `numbers`: {n: {model: {metric: value}}, {model: {n: features}}, {name: why skipped}, and
    {model: {n: True}} where its video holds values that are not finite.

    videos_of(items (B, ...)) -> {model: (B, 3, T, H, W)}. Each video is compared with that of `reference`; None means
    no comparison. One batch is held at a time. All items have one shape, `shape` or the first one's; others are
    skipped by name.
    """
    rank, world = process()
    records, features, skipped, broken = {}, {}, {}, {}
    loader = DataLoader(Subset(OrReason(items), list(numbers)[rank::world]), args.batch, collate_fn=list,
                        num_workers=args.workers)
    with tqdm(total=len(numbers), unit="clip", disable=rank > 0 or not sys.stderr.isatty(), leave=False) as bar:
        for batch in loader:
            for n, item, reason in batch:
                shape = shape or (item.shape if item is not None else None)
                if reason is None and item.shape != shape:
                    reason = f"of shape {tuple(item.shape)}, the others are {tuple(shape)}"
                if reason:
                    skipped[name_of(n)] = reason.removeprefix(f"{name_of(n)}: ")
                    tqdm.write(f"skipping {name_of(n)}: {skipped[name_of(n)]}", file=sys.stderr)
            good = [(n, item) for n, item, _ in batch if item is not None and item.shape == shape]
            if good:
                videos = videos_of(torch.stack([item for _, item in good]).to(device))
                for model, video in videos.items():
                    if reference not in (None, "input") and model == "input":
                        continue
                    compared = reference and model != reference
                    values = ({name: f(video, videos[reference]).tolist() for name, f in functions.items()}
                              if compared else {})
                    found = detector(video).cpu() if detector else None
                    finite = video.isfinite().flatten(1).all(1).tolist()
                    for i, (n, _) in enumerate(good):
                        records.setdefault(n, {})
                        if not finite[i]:
                            broken.setdefault(model, {})[n] = True
                        if compared:
                            records[n][model] = {name: value[i] for name, value in values.items()}
                        if detector:
                            features.setdefault(model, {})[n] = found[i]
            bar.update(world * len(batch))
    return gather(records), gather(features), gather(skipped), gather(broken)


def gather(mine):
    """The dicts of all processes as one, on the first process; dicts in them are joined too."""
    parts, (rank, world) = [mine], process()
    if dist.is_initialized():
        parts = [None] * world if rank == 0 else None
        dist.gather_object(mine, parts)
    whole = {}
    for part in parts or []:
        for key, value in part.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    return whole


def drop_broken(records, features, broken, skipped, name_of):
    """Clips of which some model's video holds values that are not finite go from all models, into `skipped`; but a
    model that gave such values for every clip is broken itself, has no figures and costs no clip. Returns those
    models."""
    hopeless = [model for model, clips in broken.items() if len(clips) == len(records)]
    for model in hopeless:
        features.pop(model, None)
    for model, clips in broken.items():
        for n in sorted(clips if model not in hopeless else ()):
            reason = f"{model} gave values that are not finite"
            print(f"skipping {name_of(n)}: {reason}", file=sys.stderr)
            skipped[name_of(n)] = reason
            for held in (records, *features.values()):
                held.pop(n, None)
    return hopeless


def distances(features, reference):
    """{model: Fréchet distance of its clips to those of `reference`}, and a warning where they are too few."""
    stacked = {model: torch.stack([found[n] for n in sorted(found)]) for model, found in features.items()}
    clips, (_, d) = min(map(len, stacked.values())), next(iter(stacked.values())).shape
    if clips < 2:
        return {}, "needs two clips or more"
    few = (f"{clips} clips are too few to mean much: I3D has {d} features, and the distance falls with more clips"
           if clips <= d else None)
    broken = [model for model, found in stacked.items() if not found.isfinite().all()]
    if broken:
        few = f"{', '.join(broken)} gave clips whose features are not finite"
    return {model: frechet_distance(found, stacked[reference]) for model, found in stacked.items()
            if model != reference and not {model, reference} & set(broken)}, few


# ----------------------------------------------------------------------------------------------------------
# what comes out

def cell(value, decimals, unit=""):
    return f"{value:.{decimals}f}{unit}" if value is not None and math.isfinite(value) else "-"


def table(rows, columns):
    """The rows as lines of text, numbers aligned to the right. columns: {metric: (heading, decimals)}."""
    header = ("model", "decoder (M)", *(heading for heading, _ in columns.values()), "PSNR kept", "decode FPS",
              "speed-up")
    return text_table([header, *(
        (r["model"], cell(r["parameters"] / 1e6, 2), *(cell(r[m], decimals) for m, (_, decimals) in columns.items()),
         cell(r["psnr_kept"], 1, "%"), cell(r["fps"], 1), cell(r["speed_up"], 2, "x")) for r in rows)])


def markdown(rows, columns, compression, clips):
    """The rows in the form of the paper's Table 3."""
    arrow = {"psnr": "↑", "ssim": "↑"}
    header = ["Model", "Decoder Param (M)", "(d_t, d_h, d_w)", "FPS↑",
              *(heading.removesuffix(" (dB)") + arrow.get(m, "↓") for m, (heading, _) in columns.items())]
    lines = [[r["model"], cell(r["parameters"] / 1e6, 1), str(tuple(compression)), cell(r["fps"], 1),
              *(cell(r[m], decimals) for m, (_, decimals) in columns.items())] for r in rows]
    return text_table([header, *lines], markdown=True) + f"\n\n{clips}\n"


replace = partial(replace_files, errors=(SafetensorError, *BROKEN))


def pixels(frame):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return frame.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def tile(clip):
    """(T, 3, H, W) in [0, 1] -> (T, H, W, 3) uint8 on the CPU, as large as pictures show it: sides above 1920 are
    divided by a whole number, frame by frame, since a large clip is many gigabytes."""
    by = -(-max(clip.shape[-2:]) // 1920)
    return np.stack([pixels(F.avg_pool2d(frame, by) if by > 1 else frame) for frame in clip])


def sheet(rows, t):
    """(H, W, 3) uint8: frame t of one row of clips for each (label, [(title, (T, H, W, 3) uint8)])."""
    h, w = rows[0][1][0][1].shape[1:3]
    # Small frames are magnified by a whole number: nothing is blurred.
    scale = -(-384 // max(h, w))
    h, w, gap, top, font = h * scale, w * scale, 8, 48, ImageFont.load_default(15)
    width, height = gap + len(rows[0][1]) * (w + gap), gap + len(rows) * (h + top)
    image = Image.new("RGB", (width + width % 2, height + height % 2), "white")         # H.264 likes even sizes
    draw = ImageDraw.Draw(image)
    for i, (label, clips) in enumerate(rows):
        y = i * (h + top)
        draw.text((gap, y + 6), label, "black", font)
        for j, (title, clip) in enumerate(clips):
            x = gap + j * (w + gap)
            while draw.textlength(title, font) > w:      # a path's end says more than its beginning
                title = title[1:]
            draw.text((x, y + 26), title, "black", font)
            image.paste(Image.fromarray(clip[t]).resize((w, h), Image.Resampling.NEAREST), (x, y + top))
    return np.asarray(image)


BT709 = 1, 1, 1


def add_h264(container, rate, height, width, crf=15, look=BT709):
    """An H.264 stream that says which colours its numbers mean (data.py's `colours`); full chroma where the size is
    odd."""
    if max(height, width) > 16384:
        raise ValueError(f"H.264 takes frames of up to 16384 pixels a side, not {height}x{width}")
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if height % 2 or width % 2 else "yuv420p"
    codec = stream.codec_context
    codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range = *look, 1      # limited range
    return stream


def to_frame(image, stream):
    """(H, W, 3) uint8 RGB as a frame of that stream."""
    matrix = stream.codec_context.colorspace
    return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
        format=stream.pix_fmt, dst_colorspace={6: 5}.get(matrix, matrix), dst_color_range="MPEG", interpolation=EXACT)


def write_film(path, images, rate=12, seconds=4):
    """A film of (H, W, 3) uint8 images, slowly and over and over; smaller by a whole number where H.264 has no such
    size."""
    height, width = images[0].shape[:2]
    by = -(-max(height, width) // 16384)
    if by > 1:
        size = width // by // 2 * 2, height // by // 2 * 2
        images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]

    with av.open(f"file:{path}", "w") as container:
        stream = add_h264(container, rate, *images[0].shape[:2], crf=22)
        for _ in range(max(1, round(rate * seconds / len(images)))):
            for image in images:
                container.mux(stream.encode(to_frame(image, stream)))
        container.mux(stream.encode())


# ----------------------------------------------------------------------------------------------------------
# whole videos

# Audio that is copied, not encoded again. PyAV's own list of what .mp4 and .mov take is not used: it includes codecs
# that their muxers then refuse.
COPIED = {".mp4": ("aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "flac"),
          ".mov": ("aac", "mp3", "mp3float", "ac3", "alac")}


AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)      # of the 13 that it has


def upright_frames(container, stream, tracks, other, seen):
    """Yields (image (H, W, 3) uint8 RGB, upright, its time stamp, its `colours`) of a video stream; other(packet) takes
    the tracks' packets. Frames of another size than the first are brought to it. Packets that cannot be decoded are
    left out, and where the file cannot be read on, it ends; seen["end"] is the time in seconds up to which there were
    packets. AVI's stamps are of packets, in the order of decoding: the frames shown take them in turn."""
    def packets():
        try:
            yield from container.demux()
        except av.FFmpegError:
            yield None          # the decoder still holds some frames

    size, codec, stamps, avi = {}, stream.codec_context, [], container.format.name == "avi"
    for packet in packets():
        if packet and packet.pts is not None:
            seen["end"] = max(seen["end"], float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet and packet.stream in tracks:
            other(packet)
        if packet and packet.stream is not stream:
            continue
        try:
            frames = codec.decode(packet)
        except av.InvalidDataError:
            continue
        if avi and packet and packet.size and packet.dts is not None:
            heappush(stamps, packet.dts)
        for frame in frames:
            size = size or {"width": frame.width, "height": frame.height}
            name = container.name.removeprefix("file:")
            check_colours(name, frame, tagged=True)
            check_fields(name, frame)
            yield picture(frame, **size), heappop(stamps) if stamps else frame.pts, colours(frame)


def rising(film, step):
    """Yields the (image, stamp, look) of `film` with stamps that rise from 0 or later; step: how long a frame lasts
    where nothing says it.

    A stamp that is no later than the one before goes between that and the next, and later frames keep theirs; where
    the next is no later either, another recording begins, and follows the one before.
    """
    film = chain(film, [(None, None, None)])
    image, stamp, look = next(film)
    before, last, shift = -math.inf, -step, max(0, -(stamp or 0))      # before: as the file has it, last: as given out
    for following in film:
        after = -math.inf if following[1] is None else following[1]
        if stamp is None:
            given = last + step
        elif stamp > before:
            given, before = stamp + shift, stamp
        elif after > before:
            given = (last + after + shift) // 2
        elif stamp == before:
            given = last + step // 4
        else:
            given, before, shift = last + step, stamp, last + step - stamp
        last = max(given, last + 1)
        yield image, last, look
        image, stamp, look = following


def in_windows(source, through, length, overlap):
    """Yields (image, original, ...) for each (original, ...) of `source`: windows of `length` originals go through
    `through`, each shares `overlap` with the one before and is faded into it; the last one may be shorter."""
    held, tail, fresh = [], None, False             # fresh: some of those held have not been in a window
    for frame in chain(source, (None,)):            # None: the end
        if frame:
            held, fresh = [*held, frame], True
        if frame and len(held) < length or not held:
            continue
        decoded = through([original for original, *_ in held]) if fresh else tail
        if fresh and tail is not None:
            weight = (torch.arange(1, len(tail) + 1, device=tail.device) / (len(tail) + 1)).view(-1, 1, 1, 1)
            decoded[:len(tail)] = tail + weight * (decoded[:len(tail)] - tail)
        ready = length - overlap if frame else len(held)
        yield from ((image, *frame) for image, frame in zip(map(pixels, decoded[:ready]), held[:ready]))
        held, tail, fresh = held[ready:], decoded[ready:], False


class Film:
    """A video file that is written frame by frame, beside it the audio tracks of the one that the frames come from:
    copied where this kind of file takes them, else as AAC."""

    def __init__(self, out, suffix, stream, rate, tracks):
        self.out, self.stream, self.rate = out, stream, rate        # an open container, and the stream of the source
        self.copies = COPIED.get(suffix.lower(), out.supported_codecs)
        self.tracks, self.packets, self.sounds, self.written = tracks, deque(), {}, None

    def open(self, height, width, look):
        self.written = add_h264(self.out, self.rate, height, width, look=look)
        self.written.time_base = self.written.codec_context.time_base = self.stream.time_base
        shape = self.stream.sample_aspect_ratio
        if shape:
            self.written.codec_context.sample_aspect_ratio = shape if height == self.stream.height else 1 / shape
        for track in self.tracks:
            if track.name in self.copies:
                self.sounds[track.index] = self.out.add_stream_from_template(track), True
            else:
                # "6 channels" is no layout's name.
                layout = {} if track.layout.name.endswith("channels") else {"layout": track.layout.name}
                rate = next((r for r in AAC_RATES if r >= track.rate), AAC_RATES[-1])
                self.sounds[track.index] = self.out.add_stream("aac", rate=rate, **layout), False

    def put(self, image, stamp, look):
        """Writes an (H, W, 3) uint8 RGB image, and the packets of sound that came before it."""
        if self.written is None:
            self.open(*image.shape[:2], look)
        frame = to_frame(image, self.written)
        frame.pts, frame.time_base = stamp, self.stream.time_base
        self.out.mux(self.written.encode(frame))
        self.mux_audio()

    def mux_audio(self):
        while self.packets:
            packet = self.packets.popleft()
            sound, copied = self.sounds[packet.stream.index]
            if not copied:
                with suppress(av.InvalidDataError):         # a damaged packet of sound
                    for frame in packet.decode():
                        self.out.mux(sound.encode(frame))
            elif packet.dts is not None:
                packet.stream = sound
                self.out.mux(packet)

    def close(self):
        if self.written is None:
            raise BadVideo("no frame in it can be decoded")
        self.out.mux(self.written.encode())
        self.mux_audio()
        for sound, copied in self.sounds.values():
            if not copied:
                self.out.mux(sound.encode())


def reconstruct(teacher, student, source, target, frames, device, dtype):
    """Writes the video `source`, of any size and length, through the teacher's encoder and the student to `target`.

    Size, frames, their time stamps and the audio are kept. Windows of `frames` frames overlap and are faded into each
    other, so memory depends on `frames` and the size only. Edges are repeated up to what the teacher takes; the
    result is cut back.

    Returns (frames, PSNR in dB, mean over frames, how many frames the source lacks of those that it promises).
    ValueError for a source that cannot be read, or a target that cannot be written.
    """
    (_, d_h, d_w), errors, seen, promised = teacher.compression, [], {"end": 0.0}, 0

    def through(images):
        video = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)[None].to(device, dtype).div(127.5).sub(1)
        t, h, w = video.shape[2:]
        video = F.pad(video, (0, -w % d_w, 0, -h % d_h, 0, frames - t), mode="replicate")
        latents = teacher.encode(video, sample=False)
        if not latents.isfinite().all():
            raise ValueError(f"the {teacher.name} teacher's latents are not finite in {str(dtype)[6:]}: "
                             "another --dtype")
        decoded = student(latents)[..., :t, :h, :w]
        if not decoded.isfinite().all():
            raise ValueError(f"after {len(errors)} frames the student gave values that are not finite")
        return frames_of(decoded)

    def write(file):
        nonlocal promised
        with open_video(source) as container, av.open(f"file:{file}", "w") as out:
            stream, rate = video_stream(container)
            stream.thread_type = "AUTO"
            # A track without a codec context is one that no decoder knows.
            tracks = [audio for audio in container.streams.audio if audio.codec_context]
            step = max(1, round(1 / (rate * stream.time_base)))
            film = Film(out, file.suffix, stream, rate, tracks)
            images = upright_frames(container, stream, tracks, film.packets.append, seen)
            images = in_windows(rising(images, step), through, frames, min(4, frames // 4))
            hidden = not sys.stderr.isatty()
            for image, original, stamp, look in tqdm(images, total=stream.frames or None, unit="frame", disable=hidden,
                                                     leave=False):
                error = np.square(image.astype(np.float32) - original).mean() / 255 ** 2
                errors.append(-10 * math.log10(max(error, 1e-10)))
                film.put(image, stamp, look)
            film.close()
            # What a header counts; else by the time at which the file ends, with room for the last packets.
            early = ((container.duration or 0) + (container.start_time or 0)) / av.time_base - seen["end"]
            promised = header_frames(container, stream) or (len(errors) + round(early * rate) if early > 0.25 else 0)
    try:
        replace({Path(target): write})
    except ValueError as error:
        raise ValueError(f"{source} to {error}") from None
    return len(errors), statistics.fmean(errors), max(0, promised - len(errors))


@torch.inference_mode()
def decode_latents(student, source, target, fps, device, dtype):
    """Writes the latents saved in `source` as the video `target`; returns its frames. Memory does not grow with them.

    source: a .safetensors file with "latents", or with one tensor of any name, (C, t, h, w) or (1, C, t, h, w), as the
    teacher's encoder gives them. Read and decoded a few at a time. ValueError for what cannot be read or written.
    """
    count = 0

    def write(path):
        nonlocal count
        with safe_open(source, "pt") as file, av.open(f"file:{path}", "w") as out:
            names = list(file.keys())
            if not names:
                raise ValueError(f"{source} holds no tensor")
            held = file.get_slice("latents" if "latents" in names else names[0])
            shape = held.get_shape()
            several, fits = len(names) > 1 and "latents" not in names, len(shape) in (4, 5) and shape[:-4] in ([], [1])
            if several or not fits or 0 in shape or held.get_dtype() not in FLOATS:
                raise ValueError(f'{source} holds {", ".join(names)}, {held.get_dtype()} {shape}, but "latents" are '
                                 'needed, floating-point, (C, t, h, w) or (1, C, t, h, w)')
            chunks = (held[..., i:i + 4, :, :].to(device, dtype) for i in range(0, shape[-3], 4))
            stream = None
            for video in student.stream(chunk if chunk.ndim == 5 else chunk[None] for chunk in chunks):
                if not video.isfinite().all():
                    raise ValueError(f"what the student makes of it is not finite from frame {count} on")
                for frame in frames_of(video):
                    stream = stream or add_h264(out, fps, *frame.shape[1:])
                    out.mux(stream.encode(to_frame(pixels(frame), stream)))
                    count += 1
            out.mux(stream.encode())
    try:
        replace({Path(target): write})
    except ValueError as error:
        raise ValueError(f"{source} to {error}") from None
    return count


def generate(args, device):
    """Writes what a diffusers pipeline hands to its VAE's decoder, one file for each line of args.generate.

    Latents are taken where `vae.decode` is called. What pipelines return for output_type="latent" will not do: each
    scales, shifts and packs latents in its own way. Files that are there are kept, so a stopped run goes on.
    Processes share the prompts.
    """
    from diffusers import DiffusionPipeline
    from diffusers.models.autoencoders.vae import DecoderOutput
    prompts = [line.strip() for line in Path(args.generate).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.generate} holds no prompt: it takes one a line")
    folder = Path(args.latents)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"num_frames": args.frames, **dict(zip(("height", "width"), args.size or ()))}
    shape = {key: value for key, value in shape.items() if value}
    rank, world = process()
    todo = {}
    for n, prompt in list(enumerate(prompts))[rank::world]:
        file = folder / f"{n:05d}.safetensors"
        origin = {"prompt": prompt, "pipeline": args.pipeline, "seed": str(args.seed + n), "dtype": args.dtype,
                  "shape": json.dumps(shape)}
        if not file.is_file():
            todo[file] = origin
            continue
        try:
            with safe_open(file, "pt") as held:
                made = held.metadata()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from None
        if made != origin:
            raise ValueError(f"{file} was made from {made}, not from {origin}: name another folder")
    print(f"{len(prompts)} prompts, {len(todo)} to do" + (f" by process {rank}" if world > 1 else ""), flush=True)
    if not todo:
        return
    try:
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=getattr(torch, args.dtype)).to(device)
    except Exception as error:      # a dozen classes, from no network to no such repository
        raise OSError(f"no pipeline {args.pipeline}: {why(error).strip().splitlines()[0]}") from None
    taken = []

    def decode(latents, *_, return_dict=True, **__):
        taken.append(latents)
        nothing = torch.zeros(len(latents), 3, 1, 8, 8, device=latents.device, dtype=latents.dtype)
        return DecoderOutput(sample=nothing) if return_dict else (nothing,)
    pipe.vae.decode = decode
    pipe.set_progress_bar_config(disable=True)
    for file, origin in tqdm(todo.items(), unit="prompt", disable=rank > 0 or not sys.stderr.isatty()):
        taken.clear()
        pipe(origin["prompt"], generator=torch.Generator().manual_seed(int(origin["seed"])), output_type="pt", **shape)
        latents = {"latents": torch.cat(taken).cpu().contiguous()}
        replace({file: lambda partial_file: save_file(latents, partial_file, metadata=origin)})


# ----------------------------------------------------------------------------------------------------------

def frame_rate(text):
    """An argparse type: "24", "29.97" or "30000/1001" as a Fraction up to 1000."""
    try:
        rate = Fraction(text).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = 0
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"takes frames per second up to 1000, such as 24 or 30000/1001, not {text!r}")
    return rate


def size_of(text):
    """"512" or "360x640" -> (height, width)."""
    try:
        sides = tuple(map(int, text.split("x")))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"takes pixels, such as 512 or 360x640, not {text}")
    return sides * 2 if len(sides) == 1 else sides


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--data WHAT] [--student PATH] [options]; --help explains each")
    add = parser.add_argument
    add("--data", default="synthetic", help="davis, ucf101, vidgen or openvid, in data/<name>; a video or a folder of "
        "videos or of folders of frames; or synthetic, made-up video that no training sees (default)")
    add("--root", metavar="DIR", help="where the data set lies, if not in data/<name>")
    add("--split", help="a data set's list, such as val or testlist02, or a text file with a name a line "
        "(default: DAVIS's test-dev where it is there, else val; UCF-101's testlist01)")
    add("--download", action="store_true", help="fetch davis (trainval, 0.8 GB) or ucf101 (7 GB) where it is not there")
    add("--student", nargs="+", metavar="PATH", help="students: a run's folder or a file, one or several "
        "(default: the newest under out/, else the shipped one)")
    add("--teacher", choices=TEACHERS, help="default: the one that the first student was trained with")
    add("--teacher-weights", metavar="W",
        help='a folder or file, or "random" to measure speed only (default: the released weights)')
    add("--against", choices=("input", "teacher"), default="input",
        help="what reconstructions are compared with (default input)")
    add("--metrics", nargs="+", choices=METRICS, help="default: psnr ssim temporal, "
        "and on real video lpips fvd, whose networks are downloaded")
    add("--lpips-weights", metavar="FILE",
        help=f"torchvision's {ALEXNET} (default: PyTorch's cache, or a download of 233 MB)")
    add("--i3d", metavar="FILE", help="i3d_torchscript.pt (default: PyTorch's cache, or a download of 51 MB)")
    add("--clips", type=number(int, 1), help="the first so many (default: all; 16 of made-up video)")
    add("--frames", type=number(int, 1), help="frames of a clip (default: 17; 16 for dc and tiny)")
    add("--size", type=size_of, metavar="S|HxW",
        help="pixels (default: 512 for davis, 360x640 for openvid, else 256; 128 for tiny)")
    add("--batch", type=number(int, 1), default=1, help="clips at a time (default 1)")
    add("--workers", type=number(int, 0), default=0, help="processes that read clips ahead (default 0)")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=HELD_OUT_SEED, help="of made-up video and of generation "
        f"(default {HELD_OUT_SEED}, which no training sees)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ..., mps (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of teacher, students and pipeline (default float32)")
    add("--threads", type=number(int, 1), help="CPU threads (default: PyTorch's choice)")
    add("--out", metavar="DIR",
        help="folder for what is written (default: that of the first student's run, else out/evaluate)")
    add("--reconstruct", nargs=2, metavar=("IN", "OUT"),
        help="a video through encoder and first student, audio and time stamps kept; nothing else")
    add("--decode", nargs=2, metavar=("LATENTS", "OUT"),
        help="saved latents, a .safetensors file, through the first student; nothing else")
    add("--fps", type=frame_rate,
        help="frames per second of --decode's video, such as 29.97 or 30000/1001 (default 24)")
    add("--latents", metavar="DIR", help="evaluate on saved latents: students against teacher, "
        "and both against real video, if --data has any")
    add("--generate", metavar="PROMPTS",
        help="make --latents with --pipeline, a file a line; --size and --frames are the pipeline's")
    add("--pipeline", metavar="HUB_ID", help="a diffusers pipeline, or a folder with one")
    args = parser.parse_args()
    args.data = args.data.rstrip("/") or "/"
    find_device(args.device)
    if args.generate and not (args.pipeline and args.latents):
        raise ValueError("--generate needs --pipeline HUB_ID and --latents DIR, for what it makes")
    for name, paths in (("reconstruct", args.reconstruct), ("decode", args.decode)):
        if paths and Path(paths[1]).suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise ValueError(f"--{name} writes .mp4, .mkv or .mov, not {paths[1]}")
    if args.reconstruct and Path(args.reconstruct[0]).resolve() == Path(args.reconstruct[1]).resolve():
        raise ValueError(f"--reconstruct cannot write over its source, {args.reconstruct[0]}")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for mode, options in TAKES.items():
        for name in given:
            if getattr(args, mode) and name not in (mode, *options.split(), "device", "dtype", "threads"):
                raise ValueError(f"--{mode} goes without --{name.replace('_', '-')}")
    for name, mode in (("fps", "decode"), ("pipeline", "generate")):
        if name in given and not getattr(args, mode):
            raise ValueError(f"--{name} is of --{mode} only")
    usual = ["psnr", "ssim", "temporal", *(["lpips", "fvd"] if args.data != "synthetic" or args.latents else [])]
    args.metrics = [m for m in METRICS if m in (args.metrics or usual)]
    return args


def check_inputs(args):
    """Raises OSError or ValueError for what is missing or cannot be written, before anything is fetched or computed."""
    if args.reconstruct or args.decode:
        source, target = map(Path, args.reconstruct or args.decode)
        if not source.is_file():
            raise FileNotFoundError(f"no {'video' if args.reconstruct else 'file'} {source}")
        if args.reconstruct:
            try:
                with open_video(source) as container:
                    video_stream(container)
            except BROKEN as error:
                raise ValueError(f"{source}: {why(error)}") from None
        elif source.suffix.lower() != ".safetensors":
            raise ValueError(f"{source}: --decode reads .safetensors")
        if target.is_dir():
            raise OSError(f"--{'reconstruct' if args.reconstruct else 'decode'} cannot write {target}: it is a folder")
        return check_writable(target.parent)
    if args.generate:
        if not Path(args.generate).is_file():
            raise FileNotFoundError(f"no file {args.generate} with prompts, one a line")
        return check_writable(args.latents)
    if args.out:
        check_writable(args.out)
    if args.latents:
        SavedLatents(args.latents)
    if args.data != "synthetic" and not args.download and ("fvd" in args.metrics or not args.latents):
        find_clips(args.data, args.root, args.split)


def whose(args, files):
    """What tells this evaluation's results from another's, as far as it is known before anything is loaded."""
    return {"data": args.data, "root": args.root, "split": args.split, "latents": args.latents,
            "compared_with": args.against, "students": list(files), "dtype": args.dtype,
            "seed": args.seed if args.data == "synthetic" and not args.latents else None}


def check_same(out, mine):
    """ValueError where the results in the folder `out` are not of `mine`, {setting: value}."""
    try:
        there = json.loads((out / "results.json").read_text())
    except (OSError, ValueError):
        return                      # none, or none that says anything
    there = there if isinstance(there, dict) else {}
    other = [f"{key} {there[key]} (now {value})" for key, value in mine.items() if there.get(key, value) != value]
    if other:
        raise ValueError(f"{out}/results.json is of {', '.join(other)}: name another folder with --out, or delete it")


def results_folder(args, files):
    """--out, else the first student's run, else out/evaluate; in these two a folder for each data set but made-up
    video. OSError where it cannot be written, ValueError where it holds results of other data or students."""
    run = next(iter(files.values())).resolve().parent
    out = Path(args.out) if args.out else run if run.parent == Path("out").resolve() else Path("out/evaluate")
    if not args.out and (args.latents or args.data != "synthetic"):
        out = out / Path(args.latents or args.data).resolve().name
    check_writable(out)
    for name in WRITTEN:
        if (out / name).is_dir():
            raise OSError(f"nothing can be written to {out / name}: it is a folder")
    check_same(out, whose(args, files))
    return out


def one_video(args, teacher, students, device):
    """--reconstruct."""
    source, target = map(Path, args.reconstruct)
    name, student = next(iter(students.items()))
    target.parent.mkdir(parents=True, exist_ok=True)
    frames, _, _ = clip_shape(args, teacher)
    start = time.perf_counter()
    count, quality, lost = reconstruct(teacher, student.decode, source, target, frames, device,
                                       getattr(torch, args.dtype))
    print(f"{target}: {count} frames through the {teacher.name} teacher's encoder and {name}, PSNR {quality:.2f} dB, "
          f"{count / (time.perf_counter() - start):.2f} frames per second, video decoding and encoding included")
    if lost:
        print(f"{source} promises {count + lost} frames: {lost} could not be read and are missing from {target}",
              file=sys.stderr)


def saved_latents(args, files, device):
    """--decode."""
    source, target = map(Path, args.decode)
    name, file = next(iter(files.items()))
    student = TurboVAED.from_pretrained(file).to(device, getattr(torch, args.dtype)).eval()
    if device.type == "cuda":
        student.channels_last()
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    count = decode_latents(student, source, target, args.fps or 24, device, getattr(torch, args.dtype))
    print(f"{target}: {count} frames by {name}, {count / (time.perf_counter() - start):.2f} frames per second, "
          "video encoding included")


@dataclass
class Comparison:
    """What is compared with what: clips, or latents of generated video, and the videos that models make of them."""
    items: Dataset                  # clips (3, T, H, W), or latents (C, t, h, w)
    numbers: object                 # which of them
    name_of: object                 # a number's name
    skipped: dict                   # {name: why}
    clip: tuple                     # frames, height, width of all videos
    encode: object                  # items (B, ...) -> latents (B, C, t, h, w)
    decoders: dict                  # {model: latents -> video}, the teacher first
    reference: str                  # "input" or a model: what the others are compared with
    shape: tuple = None             # of an item, where all must have it
    real: tuple = None              # (clips, numbers, name_of, skipped) of real video, where items are latents
    without: dict = field(default_factory=dict)         # {metric left out: why}

    def videos_of(self, items):
        """{model: (B, 3, T, H, W)}; of clips with the input first."""
        latents = self.encode(items)
        decoded = {name: run(latents) for name, run in self.decoders.items()}
        return decoded if self.shape else {"input": items, **decoded}


def to_compare(args, teacher, students, device):
    """The Comparison that the flags ask for."""
    label = f"{teacher.name} (teacher)"
    decoders = {label: teacher.decode, **students}
    if not args.latents:
        clip = clip_shape(args, teacher)
        items, numbers, name_of, skipped = open_clips(args, *clip)
        encode = lambda video: teacher.encode(video.to(teacher.dtype), sample=False)
        return Comparison(items, numbers, name_of, skipped, clip, encode, decoders,
                          {"input": "input", "teacher": label}[args.against])
    items = SavedLatents(args.latents)
    numbers = range(min(args.clips or len(items), len(items)))
    shape = items.usual_shape(numbers, teacher.latent_channels)
    like = torch.zeros(1, *shape, device=device, dtype=teacher.dtype)
    clip = tuple(next(iter(students.values()))(like).shape[2:])
    fvd = "fvd" in args.metrics
    real = open_clips(args, *clip) if args.data != "synthetic" and fvd else None
    without = {"fvd": "real video is needed: --data openvid, for example"} if fvd and not real else {}
    return Comparison(items, numbers, lambda n: items.files[n].name, {}, clip,
                      lambda latents: latents.to(teacher.dtype), decoders, label, shape, real, without)


def measure_all(args, compared, functions, detector, device):
    """`measure` of all that is compared, of real video too where FVD needs it: (records, features, {name: why skipped},
    models that are never finite, names of the real clips or None), None on all processes but the first."""
    records, features, failed, broken = measure(compared.items, compared.numbers, args, compared.videos_of,
                                                compared.reference, functions, detector, device, compared.name_of,
                                                compared.shape)
    skipped, real = {**compared.skipped, **failed}, None
    if process()[0] == 0:
        broken = drop_broken(records, features, broken, skipped, compared.name_of)
    if compared.real and detector:
        clips, numbers, name_of, skipped_real = compared.real
        seen, found, failed, _ = measure(clips, numbers, args, lambda video: {"input": video}, None, {}, detector,
                                         device, name_of)
        features, skipped = {**features, **found}, {**skipped, **skipped_real, **failed}
        real = [name_of(n) for n in sorted(seen)]
    if process()[0]:
        return None
    for clips, where in ((records, args.latents or args.data), (real, args.data)):
        if clips is not None and not clips:
            raise ValueError(f"none of the clips in {where} can be evaluated")
    if compared.reference in broken:
        raise ValueError(f"{compared.reference} gave values that are not finite for every clip: "
                         f"nothing can be compared with it")
    return records, features, skipped, broken, real


def rows_of(compared, metrics, functions, records, fvd, broken, fps, parameters):
    """A row of the table for each model, the teacher's first; None for what is not known."""
    rows, label = [], next(iter(compared.decoders))
    for name in compared.decoders:
        measured = functions if name not in (compared.reference, *broken) else {}
        mean = lambda metric: statistics.fmean(record[name][metric] for record in records.values())
        values = {m: mean(m) if m in measured else fvd.get(name) if m == "fvd" else None for m in metrics}
        rows.append({"model": name, "parameters": parameters[name], **values, "fps": fps[name], "psnr_kept": None,
                     "speed_up": fps[name] / fps[label]})
        if "psnr" in functions and compared.reference == "input" and not {name, label} & set(broken):
            rows[-1]["psnr_kept"] = 100 * rows[-1]["psnr"] / rows[0]["psnr"]
    return rows


def sheets_of(compared, records, functions, device):
    """A picture for each frame: the worst, the median and the best clip of the first student by the first metric.

    The clips are decoded again: keeping all of them until it is known which ones would take memory.
    """
    student, metric, done = list(compared.decoders)[1], next(iter(functions), None), sorted(records)
    rising = 1 if metric in ("psnr", "ssim") else -1
    order = sorted(done, key=lambda n: rising * records[n][student][metric]) if metric else done
    picks = ({order[len(order) // 2]: "median", order[0]: "worst", order[-1]: "best"}
             if metric and len(done) > 1 else {order[0]: "clip"})
    shown = []
    for n in sorted(picks, key=order.index):
        videos = compared.videos_of(compared.items[n][None].to(device))
        title = lambda name: name + (f", {records[n][name]['psnr']:.2f} dB"
                                     if "psnr" in records[n].get(name, {}) else "")
        tiles = [(title(name), tile(frames_of(video))) for name, video in videos.items()]
        error = tile((4 * (frames_of(videos[student]) - frames_of(videos[compared.reference])).abs()).clamp(max=1))
        shown.append((f"{picks[n]}: {compared.name_of(n)}", [*tiles, (f"|error| x4 of {student}", error)]))
        del videos          # before the next clip's are made
    return [sheet(shown, t) for t in range(compared.clip[0])]


def provenance(args, files, teacher, functions, detector):
    """What measured, for results.json: versions, and hashes of all weights."""
    measured_by = {"AlexNet": Path(args.lpips_weights or cached(ALEXNET))} if "lpips" in functions else {}
    measured_by |= {"I3D": Path(args.i3d or cached("i3d_torchscript.pt"))} if detector else {}
    return {"command": ["python", *sys.argv],
            "versions": {"python": platform.python_version(),
                         **{p: version(p) for p in ("torch", "torchvision", "torchmetrics", "lpips", "av")}},
            "weights": {f"{teacher.name} (teacher)": teacher.weights_hash(),
                        **{name: hashlib.sha256(file.read_bytes()).hexdigest()
                           for name, file in {**files, **measured_by}.items()}}}


def set_device(args):
    """This process's torch.device; with --threads, and without TF32, so that float32 is float32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if args.threads:
        torch.set_num_threads(args.threads)
    return find_device(args.device)


@torch.inference_mode()
def evaluate(args):
    """Does what the flags ask for: generates or decodes latents, reconstructs a video, or compares models on clips."""
    if process()[0] and (args.reconstruct or args.decode):
        return                      # one video is the first process's
    device = set_device(args)
    check_inputs(args)
    if args.generate:
        return generate(args, device)
    files = find_students(args.student, args.teacher)
    if args.decode:
        return saved_latents(args, files, device)
    out = None if args.reconstruct else results_folder(args, files)
    teacher, students = load_decoders(args, files, device)
    if args.reconstruct:
        return one_video(args, teacher, students, device)
    compare(args, files, teacher, students, out, device)


def compare(args, files, teacher, students, out, device):
    """The table of teacher and students, and what goes to the folder `out`."""
    compared = to_compare(args, teacher, students, device)
    frames, height, width = compared.clip
    settings = {"clips_chosen": len(compared.numbers), "frames": frames, "height": height, "width": width,
                "teacher": teacher.name, "teacher_weights": teacher.weights_hash()}
    check_same(out, settings)
    functions, detector, without = load_metrics(args, frames, device, compared.without)
    found = measure_all(args, compared, functions, detector, device)
    if found is None:
        return
    records, features, skipped, broken, real = found
    done = sorted(records)
    fvd, few = distances(features, "input" if args.latents else compared.reference) if detector else ({}, None)

    # Small clips are timed four at a time: PyTorch's convolutions on a CPU take a slow path for one clip with few
    # channels.
    together = max(1, min(4, 2 ** 20 // (frames * height * width)))
    latents = compared.encode(compared.items[done[0]][None].to(device))
    fps = decode_speeds(compared.decoders, latents.repeat(together, 1, 1, 1, 1))
    parameters = {name: sum(p.numel() for p in students.get(name, teacher.vae.decoder).parameters())
                  for name in compared.decoders}
    rows = rows_of(compared, args.metrics, functions, records, fvd, broken, fps, parameters)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    what = (f"{args.latents or args.data}: {len(done)} clips of {frames}x{height}x{width} (frames x height x width)"
            f"{f', FVD to {len(real)} real clips of {args.data}' if real else ''}"
            f"{', against the teacher' if compared.reference != 'input' else ''}; "
            f"{hardware}, {torch.get_num_threads()} CPU threads, {args.dtype}, {together} at a time for speed; "
            f"{len(skipped)} clips skipped")
    columns = {m: ("FVD", 2) if m == "fvd" and args.latents else METRICS[m] for m in args.metrics}
    notes = [f"{columns[m][0]}: {reason}" for m, reason in (without | ({"fvd": few} if few else {})).items()]
    notes += [f"{name}: every clip's video holds values that are not finite" for name in broken]
    print("\n".join([table(rows, columns), what, *notes]))

    names = [compared.name_of(n) for n in done]
    results = {
        "rows": rows, **whose(args, files), **settings, "clips": len(done), "against": compared.reference,
        "device": hardware, "threads": torch.get_num_threads(), "timed_together": together, "skipped": skipped,
        "broken": broken, "without": without, "about_fvd": few,
        **provenance(args, files, teacher, functions, detector),
        "clips_hash": hashlib.sha256(json.dumps([names, real]).encode()).hexdigest(),
        "per_clip": [{"clip": name, **records[n]} for n, name in zip(done, names)]}
    finite = json.loads(json.dumps(results), parse_constant=lambda _: None)      # JSON has neither infinities nor NaN
    sheets = sheets_of(compared, records, functions, device)
    out.mkdir(parents=True, exist_ok=True)
    replace(dict(zip((out / name for name in WRITTEN), (
        lambda file: Image.fromarray(sheets[frames // 2]).save(file), lambda file: write_film(file, sheets),
        lambda file: file.write_text(markdown(rows, columns, teacher.compression, what)),
        lambda file: file.write_text(json.dumps(finite, indent=1) + "\n")))))
    print("\n".join(short(out / name) for name in WRITTEN))


def main():
    args = parse()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Records are gathered on the CPU. The timeout is long because a download may be waited for.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        evaluate(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, "smaller --batch, --size or --frames, or --dtype bfloat16, need less")
