"""Distils a frozen video VAE's decoder into a Turbo-VAED student (Sections 3.4 and 4.2).

    python train.py                                          # the embedded default: teacher tiny, made-up video, CPU
    python train.py --data FOLDER --steps 200                # the same on real video
    python train.py --teacher ltx --data data/vidgen         # LTX-VAE on one GPU
    torchrun --nproc_per_node=8 train.py --teacher ltx       # on eight; the effective batch stays the same
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --teacher ltx
                                                             # on two nodes: the same line on both, HOST is one of them
    python train.py --teacher ltx --cache data/cache         # what the teacher makes of each clip, computed once
    python train.py --teacher ltx --resume                   # go on after a stop, as if it had not stopped
    python train.py --teacher ltx --profile 20               # where a step's time goes, and what the recipe would cost

Stage 1 is Equation 5 without its adversarial term; stage 2 adds it when stage 1 has nearly converged (--stage2).

A run leaves in out/<teacher>/ (or --out): student.safetensors (EMA weights), best.safetensors, checkpoint.pt, log.jsonl,
curves.png, samples.png (input, teacher, student) and args.json. The best student is the one of highest PSNR in stage 1;
in stage 2, of those whose PSNR is within --max-drop of stage 1's last, the one of lowest LPIPS or, without LPIPS, whose
sharpness is nearest to the input's.

Which clips, crops and samples stand at step s, slot k depends on the seed, s and k only, so neither a resume nor the
number of processes changes what is trained on.
"""
import argparse
import copy
import hashlib
import io
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CachedClips, SyntheticClips, VideoClips, write_file
from losses import (HEADS, LPIPS, Objective, PatchDiscriminator, StudentWithHeads, adaptive_weight, kl_loss,
                    last_layer_gradients, make_heads, sharpness)
from model import CONFIGS, TurboVAED
from teachers import TEACHERS, load_teacher

# Section 4.2: AdamW, learning rate 2e-4, betas 0.9 and 0.95, effective batch 32, 17 (dc: 16) frames at 256x256.
# Weight decay and EMA as in the published code; 70,000 and 40,000 steps as a user's reproduction of ltx reports.
PAPER = dict(frames=17, size=256, batch=32, micro_batch=2, steps=110_000, lr=2e-4, muon_lr=0.0, schedule="constant", align=["mid", "up0", "up1"],
             lpips_weight=1.0, distill_weight=1.0, normalize=False, data="data/vidgen", eval_every=1000, workers=4,
             stage2="auto", stage2_steps=40_000, stage2_lr=1.0, adversarial_weight=0.05, disc_lr=2e-4, disc_width=64)
RECIPES = {
    "ltx": PAPER,
    "dc": PAPER | dict(frames=16),
    "hunyuan": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "cog": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    # ours: the paper has no student for these teachers
    "wan21": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "wan22": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "ltx2": PAPER | dict(micro_batch=1),
    # Made-up video and no LPIPS, since the embedded recipe must need no download. Muon, since AdamW alone learns
    # brightness first and leaves the student grey for hundreds of steps.
    "tiny": dict(frames=8, size=64, batch=8, micro_batch=8, steps=2000, lr=2e-3, muon_lr=0.02, schedule="cosine", align=["mid", "up0"],
                 lpips_weight=0.0, distill_weight=0.02, normalize=True, data="synthetic", eval_every=200, workers=1,
                 stage2="off", stage2_steps=600, stage2_lr=0.1, adversarial_weight=1.0, disc_lr=1e-3, disc_width=32),
}


def stage2(value):
    if value not in ("auto", "off") and not value.isdecimal():
        raise argparse.ArgumentTypeError("takes auto, off or the number of a step")
    return int(value) if value.isdecimal() else value


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Defaults marked * are the teacher's recipe, at the top of train.py.")
    p.add_argument("--teacher", choices=TEACHERS, default="tiny", help="whose decoder to distil (default: tiny)")
    p.add_argument("--teacher-weights", help='a folder or file instead of the released weights, or "random"')
    p.add_argument("--config", choices=CONFIGS, help="the student's configuration (default: the one named as the teacher)")
    p.add_argument("--data", help='a folder of videos, of any depth, or "synthetic" for made-up video *')
    p.add_argument("--val-data", help="validate on this folder (default: held-out files of --data, or held-out made-up clips)")
    p.add_argument("--val-clips", type=int, default=8, help="clips to validate on, at most (default: 8)")
    p.add_argument("--frames", type=int, help="frames of a clip *")
    p.add_argument("--size", type=int, help="height and width of a clip in pixels *")
    p.add_argument("--stride", type=int, default=1, help="keep every so many frames of a video (default: 1)")
    p.add_argument("--steps", type=int, help="optimiser steps, both stages together, at most *")
    p.add_argument("--stage2", type=stage2, metavar="auto|STEP|off", help="when the adversarial term joins: once validation PSNR has gained "
                   "less than --stage2-gain over --stage2-evaluations, or --stage2-steps are left; at that step; never *")
    p.add_argument("--stage2-steps", type=int, help="optimiser steps of stage 2 where it begins by itself *")
    p.add_argument("--stage2-lr", type=float, help="the student's learning rates in stage 2, as a part of stage 1's *")
    p.add_argument("--stage2-gain", type=float, default=0.05, help="in dB (default: 0.05)")
    p.add_argument("--stage2-evaluations", type=int, default=5, help="(default: 5)")
    p.add_argument("--minutes", type=float, help="stop after this long at the latest; the cosine then ends with the time")
    p.add_argument("--batch", type=int, help="effective batch: clips a step over all processes and accumulation *")
    p.add_argument("--micro-batch", type=int, help="clips a process takes at once *")
    p.add_argument("--lr", type=float, help="AdamW's learning rate *")
    p.add_argument("--muon-lr", type=float, help="Muon's learning rate, for convolutions that mix channels; 0: AdamW for everything *")
    p.add_argument("--schedule", choices=("constant", "cosine"), help="of the learning rate, after the warm-up *")
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up (default: 100)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="(default: 1e-4)")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the weights' moving average (default: 0.999)")
    p.add_argument("--align", nargs="*", metavar="BLOCK", help="blocks that Equation 4 aligns; none after --align turns it off *")
    p.add_argument("--head", choices=HEADS, default="pointwise", help="projection heads, Table 7 (default: pointwise)")
    p.add_argument("--lpips-weight", type=float, help="α1 of Equation 5; 0 turns LPIPS off *")
    p.add_argument("--lpips-frames", type=int, default=2, help="random frames of each clip that LPIPS sees, an unbiased estimate; 0: all (default: 2)")
    p.add_argument("--distill-weight", type=float, help="α2 of Equation 5; 0 turns the distillation loss off *")
    p.add_argument("--equation4", action="store_true", help="the distillation loss as the paper has it: weight 1, features as they are")
    p.add_argument("--kl-weight", type=float, default=1e-7, help="α3 of Equation 5 (default: 1e-7)")
    p.add_argument("--adversarial-weight", type=float, help="α4 of Equation 5, besides the adaptive weight *")
    p.add_argument("--max-drop", type=float, default=0.3, help="dB of validation PSNR that stage 2 may cost: where it costs more, the "
                   "adversarial weight is halved at each validation until it does not (default: 0.3)")
    p.add_argument("--disc-lr", type=float, help="the discriminator's learning rate *")
    p.add_argument("--disc-width", type=int, help="channels of the discriminator's first layer *")
    p.add_argument("--disc-floor", type=float, default=1.0, help="the discriminator rests in steps where its hinge loss is below this, so that "
                   "it does not outrun the student; 0 for never (default: 1)")
    p.add_argument("--smoothness", type=float, default=10.0, help="weight of the discriminator's approximate R1 penalty (default: 10)")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None,
                   help="divide the teacher's features by their standard deviation in Equation 4 *")
    p.add_argument("--cache", metavar="DIR", help="keep the teacher's latents and features of --cache-crops crops of each clip there, "
                   "computed before the first step, and run no teacher in training")
    p.add_argument("--cache-crops", type=int, default=4, help="crops of each video; made-up video counts as 512 videos (default: 4)")
    p.add_argument("--cache-dtype", choices=("float16", "bfloat16"), default="float16", help="of latents and features (default: float16)")
    p.add_argument("--checkpointing", action="store_true", help="recompute the student's blocks in the backward pass: less memory, more time")
    p.add_argument("--profile", type=int, metavar="N", help="time N steps, say what takes how long and what the recipe would cost, and stop")
    p.add_argument("--price", type=float, default=2.0, help="dollars per GPU and hour, for --profile (default: 2)")
    p.add_argument("--seed", type=int, default=0, help="of weights, clips and samples (default: 0)")
    p.add_argument("--workers", type=int, help="loader processes for each training process *")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="autocast type (default: bfloat16 where the hardware has units for it, else float16 on GPUs, float32 on CPUs)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is a GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile the student (default: on GPUs)")
    p.add_argument("--eval-every", type=int, help="steps between validations, pictures and checkpoints *")
    p.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl (default: 10)")
    p.add_argument("--out", help="the run's folder (default: out/<teacher>)")
    p.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint.pt")
    p.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run already")
    args = p.parse_args(argv)
    for name, value in RECIPES[args.teacher].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.equation4:
        args.distill_weight, args.normalize = 1.0, False
    args.config = args.config or args.teacher
    args.out = args.out or f"out/{args.teacher}"
    if not args.distill_weight:
        args.align = []
    if isinstance(args.stage2, int) and args.stage2 >= args.steps:
        p.error(f"--stage2 {args.stage2} lies behind the run's --steps {args.steps}")
    return args


def autocast_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def datasets(args):
    """(training stream, validation clips, what the latter are)."""
    if args.data == "synthetic":
        train = SyntheticClips(args.frames, args.size, args.seed, length=2 ** 62)
    else:
        train = VideoClips(args.data, args.frames, args.size, args.stride, train=True, seed=args.seed)
    if args.val_data:
        held_out = VideoClips(args.val_data, args.frames, args.size, args.stride, train=False)
        return train, [held_out[i] for i in range(min(args.val_clips, len(held_out)))], args.val_data
    if args.data == "synthetic":
        held_out = SyntheticClips(args.frames, args.size, seed=10_000)
        return train, [held_out[8 * i] for i in range(args.val_clips)], "held-out made-up clips"
    held_out = VideoClips(args.data, args.frames, args.size, args.stride, train=False)
    files = len(train)
    n = min(args.val_clips, max(files // 20, 1))
    chosen = [i * files // n for i in range(n)]
    if files > 1:
        train.subset([i for i in range(files) if i not in chosen])
    return train, [held_out[i] for i in chosen], f"{n} held-out videos" if files > 1 else "the one video there is, trained on too"


class Slots:
    """The indices of the clips this process takes, micro-batch by micro-batch: n = step * batch + slot."""

    def __init__(self, args, first_step, rank, world):
        self.args, self.first_step, self.rank, self.world = args, first_step, rank, world

    def __iter__(self):
        micro = self.args.micro_batch
        for step in count(self.first_step):
            for start in range(step * self.args.batch, (step + 1) * self.args.batch, micro * self.world):
                first = start + self.rank * micro
                yield list(range(first, first + micro))


class Indexed(torch.utils.data.Dataset):
    """Clips with their numbers, which seed the posterior's samples."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, n):
        clip = self.clips[n]
        return {"n": n} | (clip if isinstance(clip, dict) else {"video": clip})


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the momentum with all its singular values made about 1, so that weak
    directions, colour say, are learned as fast as strong ones, brightness. A convolution's weight counts as the matrix
    (output channels) x (input channels and positions), which torch.optim.Muon does not accept."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)       # Nesterov's look ahead
                rows, columns = x.shape
                x = x.T if rows > columns else x
                x = x / (x.norm() + 1e-12)
                for _ in range(5):                                          # Newton and Schulz's iteration to the polar factor
                    a = x @ x.T
                    x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
                x = x.T if rows > columns else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(module, lr, muon_lr, weight_decay):
    """AdamW with the paper's betas; with a muon_lr, Muon takes the weights that mix channels (not depthwise ones)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    mixing = [p for p in trained if p.ndim > 1 and p.shape[1] > 1] if muon_lr else []
    taken = set(map(id, mixing))
    rest = [p for p in trained if id(p) not in taken]
    return [torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=weight_decay)] \
        + ([Muon(mixing, muon_lr, weight_decay=weight_decay)] if mixing else [])


def clip_rng(seed, purpose, n):
    """A generator of its own for each clip, so that its random numbers do not depend on which others share its batch."""
    return np.random.default_rng((seed, purpose, n))


def clip_noise(seed, purpose, numbers, like):
    """Unit normal noise of the shape of `like`, whose first dimension are the clips `numbers`."""
    generators = [torch.Generator(like.device).manual_seed(int(clip_rng(seed, purpose, n).integers(2 ** 62))) for n in numbers]
    return torch.stack([torch.randn(like.shape[1:], generator=g, device=like.device) for g in generators]).to(like.dtype)


def psnr(video, target):
    """dB over a clip, [-1, 1] mapped to [0, 1] and clamped."""
    return -10 * math.log10(max(((video.float().clamp(-1, 1) - target.float()) / 2).square().mean().item(), 1e-10))


@torch.no_grad()
def decode_all(decode, latents):
    return [decode(z).float().clamp(-1, 1).cpu() for z in latents]


def save_as(path, save, *args, **options):
    """save(*args, file, **options), written whole or not at all."""
    file = io.BytesIO()
    save(*args, file, **options)
    write_file(path, file.getbuffer())


def converged(log, evaluations, gain):
    """Whether the last so many validations brought less than `gain` dB over the best before them."""
    psnrs = [line["psnr"] for line in log if "psnr" in line]
    return len(psnrs) > evaluations and max(psnrs[-evaluations:]) < max(psnrs[:-evaluations]) + gain


def damping(log, start, max_drop):
    """What the adversarial weight is multiplied by: halved at every validation of stage 2 whose PSNR lies more than max_drop
    below stage 1's last, and let grow back to 1 by a quarter at every other."""
    before = [line["psnr"] for line in log if "psnr" in line and start is not None and line["step"] <= start]
    factor = 1.0
    for line in log:
        if before and "psnr" in line and line["step"] > start:
            factor = factor / 2 if line["psnr"] < before[-1] - max_drop else min(1.0, factor * 1.25)
    return factor


def best_step(log, start, max_drop):
    """The step of the best student so far, by the rule in this file's docstring."""
    lines = [line for line in log if "psnr" in line]
    stage1 = [line for line in lines if start is None or line["step"] <= start]
    stage2 = [line for line in lines if line not in stage1 and (not stage1 or line["psnr"] >= stage1[-1]["psnr"] - max_drop)]
    distance = lambda line: line.get("val_lpips", abs(math.log(max(line["sharpness"], 1e-6))))
    return min(stage2, key=distance)["step"] if stage2 else max(stage1 or lines, key=lambda line: line["psnr"])["step"]


class Timer:
    """Seconds by part of the step, waiting for the device at each part's ends: `with timer("student"): ...`"""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, part):
        start = self.now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start


def report(timer, args, device, world, path):
    """Prints where the time of --profile's steps went and what the whole recipe would cost; draws it, too."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    total, steps = sum(timer.seconds.values()), args.profile
    for part, seconds in timer.seconds.items():
        print(f"{part:16} {1000 * seconds / steps:9.1f} ms a step  {100 * seconds / total:5.1f} %")
    rate, samples = args.batch * steps / total, args.batch * args.steps
    hours = samples / rate / 3600
    import resource
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{rate:.3g} samples/s on {world} x {device.type}, peak memory {peak / 1e9:.2f} GB in a process")
    print(f"the whole recipe, {samples} samples, at this speed: {hours:.3g} hours, {hours * world:.3g} {device.type} hours"
          + (f", {hours * world * args.price:.0f} dollars at {args.price:g} each" if device.type == "cuda" else ""))
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.35 * len(timer.seconds)), layout="constrained")
    bars = axes.barh(list(timer.seconds), [1000 * seconds / steps for seconds in timer.seconds.values()])
    axes.bar_label(bars, [f"{100 * seconds / total:.0f} %" for seconds in timer.seconds.values()], padding=3)
    axes.set(xlabel="milliseconds a step", xmargin=0.1)
    axes.invert_yaxis()
    save_as(path, figure.savefig, dpi=150, format="png")
    print(path)


def plot_samples(path, columns):
    """A row a clip, its middle frame in each of {title: [clips]}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = min(len(next(iter(columns.values()))), 6)
    figure, axes = plt.subplots(rows, len(columns), figsize=(2.2 * len(columns), 2.2 * rows), squeeze=False, layout="constrained")
    target = next(iter(columns.values()))
    for j, (title, clips) in enumerate(columns.items()):
        for i in range(rows):
            axes[i, j].imshow((clips[i][:, clips[i].shape[1] // 2] + 1).div(2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[i, j].set_axis_off()
            axes[i, j].set_title(title if j == 0 else f"{title}, {psnr(clips[i], target[i]):.1f} dB", fontsize=8)
    save_as(path, figure.savefig, dpi=150, format="png")
    plt.close(figure)


def plot_curves(path, log, teacher_psnr, start2):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    curve = lambda axis, key, **style: axis.plot(*zip(*[(line["step"], line[key]) for line in log if key in line]), **style)
    for term in ("l1", "lpips", "distill", "discriminator"):
        if any(term in line for line in log):
            curve(axes[0], term, label=term)
    axes[0].set(xlabel="step", ylabel="loss terms, unweighted", yscale="log")
    curve(axes[1], "psnr", marker=".", label="student (EMA)")
    axes[1].axhline(teacher_psnr, color="grey", linestyle="--", label="teacher")
    axes[1].set(xlabel="step", ylabel="validation PSNR in dB")
    curve(axes[2], "sharpness", marker=".", label="student (EMA)")
    axes[2].axhline(1, color="grey", linestyle="--", label="input")
    axes[2].set(xlabel="step", ylabel="sharpness (1: the input's)")
    for axis in axes:
        if start2 is not None:
            axis.axvline(start2, color="grey", linewidth=0.8, linestyle=":", label="stage 2 begins")
        axis.legend(fontsize=8)
    save_as(path, figure.savefig, dpi=120, format="png")
    plt.close(figure)


def teach(teacher, video, numbers, blocks, seed):
    """(latents, {block: features}, KL divergence of each clip) of the clips with these numbers: what the student learns from."""
    mean, logvar = teacher.posterior(video)
    latents = mean if logvar is None else mean + (0.5 * logvar).exp() * clip_noise(seed, 4, numbers, mean)
    kl = torch.stack([kl_loss(mean[i:i + 1], None if logvar is None else logvar[i:i + 1]) for i in range(len(mean))])
    return latents, teacher.features(latents, blocks), kl


@torch.no_grad()
def fill_cache(args, teacher, clips, device, autocast, rank, world, say):
    """A CachedClips of --cache-crops crops of each clip, of which this process makes its share of what is missing."""
    videos = 512 if args.data == "synthetic" else len(clips)
    settings = {"teacher": args.teacher, "weights": teacher.weights_hash(), "seed": args.seed, "precision": args.dtype} \
        | {key: getattr(args, key) for key in ("frames", "size", "stride", "cache_crops")} \
        | {"files": "made-up" if args.data == "synthetic" else hashlib.sha256(json.dumps([clips.files, clips.counts]).encode()).hexdigest()}
    barrier = dist.barrier if world > 1 else lambda: None
    for turn in range(2):                                     # the manifest is the chief's
        if (rank == 0) == (turn == 0):
            cache = CachedClips(args.cache, videos * args.cache_crops, settings, getattr(torch, args.cache_dtype), args.align, args.seed)
        barrier()

    def make(numbers, video):
        with autocast():
            latents, features, kl = teach(teacher, video.to(device), numbers, cache.made["blocks"], args.seed)
        return [{"latents": latents[i], "kl": kl[i]} | {f"features.{name}": f[i] for name, f in features.items()} for i in range(len(video))]

    cache.fill(clips, make, args.micro_batch, rank, world, barrier, args.workers, say)
    return cache


def finite_values(micros, norms, scaled, step, clips, out):
    """{term: mean over the step's micro-batches}; raises RuntimeError where one, or the norm of a gradient, is not finite.
    Float16's gradients may be: its scaler skips such steps. All is read in one go, since reading waits for the device."""
    names = list(micros[0][1])
    flat = torch.stack([terms[name].float() for _, terms in micros for name in names] + [norm.float() for norm in norms.values()]).tolist()
    rows = [flat[i * len(names):][:len(names)] for i in range(len(micros))]
    found = [(numbers, name, value) for (numbers, _), row in zip(micros, rows) for name, value in zip(names, row)]
    if not scaled:
        found += [([n for numbers, _ in micros for n in numbers], name, value) for name, value in zip(norms, flat[-len(norms):])]
    for numbers, name, value in found:
        if not math.isfinite(value):
            raise RuntimeError(f"{name} is {value} at step {step}, clips {', '.join(dict.fromkeys(map(clips.describe, numbers)))}; "
                               f"the last good checkpoint is {out}/checkpoint.pt")
    return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}


RESUMES_WITH = ("teacher", "teacher_weights", "config", "data", "frames", "size", "stride", "batch", "lr", "muon_lr", "schedule", "warmup",
                "weight_decay", "clip", "ema", "align", "head", "lpips_weight", "lpips_frames", "distill_weight", "kl_weight", "normalize",
                "adversarial_weight", "max_drop", "stage2_lr", "disc_lr", "disc_width", "disc_floor", "smoothness", "cache", "seed")


def main(args):
    # processes -----------------------------------------------------------------------------------------------
    world, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = torch.device(args.device, local_rank) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch % (args.micro_batch * world):
        raise ValueError(f"--batch {args.batch} cannot be divided among {world} processes in micro-batches of {args.micro_batch}")
    accumulate = args.batch // (args.micro_batch * world)
    chief = rank == 0
    say = tqdm.write if chief else (lambda line: None)
    out = Path(args.out)
    resumes = args.resume and (out / "checkpoint.pt").exists()
    if (out / "checkpoint.pt").exists() and not (args.resume or args.overwrite or args.profile):
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite starts anew, --out names another folder")
    if args.resume and not (out / "args.json").exists():
        raise FileNotFoundError(f"nothing to resume: no run in {out}")

    # teacher, student, loss ----------------------------------------------------------------------------------
    dtype = autocast_dtype(args.dtype, device)
    args.dtype = str(dtype)[6:]
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    teacher = load_teacher(args.teacher, args.teacher_weights, device)
    teacher.check_clip(args.frames, args.size, args.size)
    config = CONFIGS[args.config]
    if config.latent_channels != teacher.latent_channels or config.compression != teacher.compression:
        raise ValueError(f"student {args.config} decodes {config.latent_channels} channels at {config.compression}, "
                         f"the {args.teacher} teacher has {teacher.latent_channels} at {teacher.compression}")
    train_clips, val_clips, val_name = datasets(args)
    val_clips = [clip[None] for clip in val_clips]

    torch.manual_seed(args.seed)
    student = TurboVAED(config).to(device)
    if device.type == "cuda":
        student.channels_last()
    student.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    with torch.no_grad():
        val_latents = [teacher.encode(clip.to(device), sample=False) for clip in val_clips]
        shapes = {name: f.shape for name, f in teacher.features(val_latents[0], args.align).items()}
    heads = make_heads({name: config.feature_shape(name, val_latents[0].shape) for name in shapes}, shapes, args.head)
    both = StudentWithHeads(student, heads, args.normalize).to(device)
    objective = Objective(LPIPS().to(device) if args.lpips_weight else None, args.lpips_weight, args.distill_weight, args.kl_weight,
                          smoothness=args.smoothness)
    trained = [p for p in both.parameters() if p.requires_grad]
    optimizers = make_optimizers(both, args.lr, args.muon_lr, args.weight_decay)
    peaks = [args.lr, args.muon_lr][:len(optimizers)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def begin_stage2():
        torch.manual_seed(args.seed + 1)
        objective.discriminator = PatchDiscriminator(args.disc_width).to(device)
        optimizers.append(torch.optim.AdamW(objective.discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9), weight_decay=args.weight_decay))
        peaks[:] = [args.lr * args.stage2_lr, args.muon_lr * args.stage2_lr][:len(peaks)] + [args.disc_lr]

    # resume --------------------------------------------------------------------------------------------------
    step, start2, elapsed, log = 0, None, 0.0, []             # start2: the step at which stage 2 began
    if resumes:
        saved = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        for name in RESUMES_WITH:
            if saved["args"].get(name) != getattr(args, name):
                raise ValueError(f"{out} was run with --{name.replace('_', '-')} {saved['args'].get(name)}, not {getattr(args, name)}")
        step, start2, elapsed = saved["step"], saved["start2"], saved["elapsed"]
        both.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        if start2 is not None:
            begin_stage2()
            objective.discriminator.load_state_dict(saved["discriminator"])
            objective.adaptive_weight = saved["adaptive_weight"]
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        lines = text.split("\n")[:-1]                         # without one that a kill cut short: it is of a later step anyway
        log = [line for line in map(json.loads, lines) if line["step"] <= step]
    if chief and not args.profile:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "args.json", json.dumps(vars(args), indent=1).encode())
        write_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())

    if args.compile or args.compile is None and device.type == "cuda":
        student.compile()
    model = DistributedDataParallel(both) if world > 1 else both
    with autocast():
        teacher_videos = decode_all(teacher.decode, val_latents)
    teacher_psnr = float(np.mean([psnr(a, b) for a, b in zip(teacher_videos, val_clips)]))
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    say(f"teacher {args.teacher}: {teacher_psnr:.2f} dB on {val_name}; student {args.config}: {millions(student):.2f} M parameters"
        f"{f' and {millions(heads):.2f} M in heads' if shapes else ''}; {device.type} x {world}, {args.dtype}")
    say(f"{args.steps} steps of {args.batch} clips ({args.micro_batch} x {world} processes x {accumulate}), "
        f"{args.frames}x{args.size}x{args.size}, {args.data}" + ("" if objective.lpips else "; no LPIPS term"))
    if args.cache:
        train_clips = fill_cache(args, teacher, train_clips, device, autocast, rank, world, say)
        teacher = None                                        # its memory is the student's now

    def write_line(line):
        log.append(line)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def validate_and_save():
        with autocast():
            videos = decode_all(ema, val_latents)
        line = {"step": step, "psnr": round(float(np.mean([psnr(a, b) for a, b in zip(videos, val_clips)])), 4),
                "sharpness": round(float(np.mean([(sharpness(a) / sharpness(b)).item() for a, b in zip(videos, val_clips)])), 4)}
        if objective.lpips:
            line["val_lpips"] = round(float(np.mean([objective.lpips(a.to(device), b.to(device)).item() for a, b in zip(videos, val_clips)])), 4)
        write_line(line | {"stage": 1 if start2 is None or step <= start2 else 2, "teacher_psnr": round(teacher_psnr, 4), "minutes": round(elapsed / 60, 3)})
        plot_curves(out / "curves.png", log, teacher_psnr, start2)
        squeeze = lambda videos: [v[0] for v in videos]
        plot_samples(out / "samples.png", {"input": squeeze(val_clips), "teacher": squeeze(teacher_videos), "student": squeeze(videos)})
        about = {"teacher": args.teacher, "step": str(step), "psnr": f"{line['psnr']:.2f}"}
        ema.save_pretrained(out, metadata=about)
        if best_step(log, start2, args.max_drop) == step:
            ema.save_pretrained(out / "best.safetensors", metadata=about)
        checkpoint = {"model": both.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                      "scaler": scaler.state_dict(), "step": step, "start2": start2, "elapsed": elapsed, "args": vars(args)}
        if start2 is not None:
            checkpoint |= {"discriminator": objective.discriminator.state_dict(), "adaptive_weight": objective.adaptive_weight}
        save_as(out / "checkpoint.pt", torch.save, checkpoint)
        say(f"step {step}: PSNR {line['psnr']:.2f} dB ({100 * line['psnr'] / teacher_psnr:.1f} % of the teacher's), "
            f"sharpness {100 * line['sharpness']:.0f} % of the input's, {elapsed / 60:.1f} min")

    # the loop ------------------------------------------------------------------------------------------------
    loader = iter(DataLoader(Indexed(train_clips), batch_sampler=Slots(args, step, rank, world), num_workers=args.workers,
                             pin_memory=device.type == "cuda"))
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=not (chief and sys.stderr.isatty()))
    first_step = last_step = step
    latest = args.steps - args.stage2_steps                   # auto's; a run too short for that has stage 2 only if it converges
    stage1 = args.stage2 if isinstance(args.stage2, int) else latest if args.stage2 == "auto" and latest > 0 else args.steps
    clock, sums, clipped, last_elapsed, spent, damp, timer = time.time(), {}, 0, elapsed, 0.0, 1.0, lambda part: nullcontext()
    while True:
        if args.minutes or step % args.eval_every == 0 or step in (first_step, stage1):
            begins = start2 is None and step < args.steps and (
                step == stage1 or args.stage2 == "auto" and converged(log, args.stage2_evaluations, args.stage2_gain))
            decision = torch.tensor([elapsed / (60 * args.minutes) if args.minutes else 0, begins, damping(log, start2, args.max_drop)],
                                    dtype=torch.float64, device=device)
            if world > 1:                                     # the chief has the clock and the validations
                dist.broadcast(decision, 0)
            spent, begins, damp = decision.tolist()
            if begins:
                start2 = step
                begin_stage2()
                say(f"step {step}: stage 2 begins")
        begun, length = (0, stage1) if start2 is None else (start2, args.steps - start2)
        if args.stage2 == "auto" and start2 is not None:
            length = min(length, args.stage2_steps)
        if step >= begun + length or spent >= 1:
            break
        bar.total, bar.desc = begun + length, f"stage {1 if start2 is None else 2}"
        decay = 0.5 * (1 + math.cos(math.pi * max((step - begun) / length, spent))) if args.schedule == "cosine" else 1.0
        warmup = min((step - begun + 1) / args.warmup, 1) if args.warmup else 1.0
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * decay * warmup
        objective.adversarial_weight = args.adversarial_weight * damp * warmup
        weight = objective.adversarial_weight * objective.adaptive_weight
        if args.profile and step == first_step + 3:
            timer = Timer(device)

        micros, layers = [], []
        for i in range(accumulate):
            with timer("data"):
                batch = next(loader)
                numbers, video = batch["n"].tolist(), batch["video"].to(device, non_blocking=True)
            with timer("teacher"), torch.no_grad(), autocast():
                if teacher:
                    latents, features, kl = teach(teacher, video, numbers, args.align, args.seed)
                else:
                    latents, kl = (batch[name].to(device, non_blocking=True).float() for name in ("latents", "kl"))
                    features = {name: batch[f"features.{name}"].to(device, non_blocking=True) for name in args.align}
            frames = noise = None
            if objective.lpips and 0 < args.lpips_frames < args.frames:
                frames = np.stack([clip_rng(args.seed, 6, n).permutation(args.frames)[:args.lpips_frames] for n in numbers])
                frames = torch.from_numpy(frames).to(device)
            if start2 is not None:
                noise = clip_noise(args.seed, 7, numbers, video)
            with model.no_sync() if world > 1 and i + 1 < accumulate else nullcontext():
                terms, gradients = objective.backward(model, latents, features, video, kl.mean(), frames, noise,
                                                      lambda loss: scaler.scale(loss / accumulate), autocast, timer)
            micros.append((numbers, terms))
            if start2 is not None and (step - start2) % 10 == 0:
                with timer("discriminator"), autocast():
                    layers.append(torch.stack(last_layer_gradients(student, latents, *gradients)))

        with timer("optimiser"):
            if start2 is not None and world > 1:
                for p in objective.discriminator.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= world
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
            norms = {"the gradient": norm}
            if start2 is not None:
                norms["the discriminator's gradient"] = torch.nn.utils.clip_grad_norm_(objective.discriminator.parameters(), args.clip)
            values = finite_values(micros, norms, scaler.is_enabled(), step + 1, train_clips, out)
            clipped += norm.item() > args.clip
            hinge = values.get("discriminator", math.inf)
            if start2 is not None and world > 1:
                total = torch.tensor(hinge, dtype=torch.float64, device=device)
                dist.all_reduce(total)
                hinge = total.item() / world
            for optimizer in optimizers[:-1] if hinge < args.disc_floor else optimizers:
                scaler.step(optimizer)
            both.zero_grad(set_to_none=True)
            if start2 is not None:
                objective.discriminator.zero_grad(set_to_none=True)
            scaler.update()
            step += 1
            with torch.no_grad():                             # young averages forget sooner, or they would keep the start
                keep = min(args.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - keep)
            if layers:
                layers = sum(layers)
                if world > 1:
                    dist.all_reduce(layers)
                ratio = adaptive_weight(*layers).item()
                objective.adaptive_weight = ratio if math.isfinite(ratio) else objective.adaptive_weight
        if args.profile and step == first_step + 3 + args.profile:
            break
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        elapsed += time.time() - clock
        clock = time.time()
        bar.update()

        if step % args.log_every == 0 or step % args.eval_every == 0 or step == begun + length:     # before it is saved, too
            means = torch.tensor(list(sums.values()), dtype=torch.float64, device=device) / (step - last_step)
            if world > 1:
                dist.all_reduce(means)
                means /= world
            line = {"step": step} | {name: round(value, 7) for name, value in zip(sums, means.tolist())}
            if start2 is not None:
                line["weight"] = round(weight, 7)             # of L_adv
            line |= {"lr": optimizers[0].param_groups[0]["lr"], "grad_norm": round(norm.item(), 4), "clipped": clipped / (step - last_step),
                     "samples_per_s": round(args.batch * (step - last_step) / (elapsed - last_elapsed), 3), "minutes": round(elapsed / 60, 3)}
            sums, clipped, last_step, last_elapsed = {}, 0, step, elapsed
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            if chief and not args.profile:
                write_line(line)
        if (step % args.eval_every == 0 or step == begun + length) and chief and not args.profile:
            validate_and_save()
            clock = time.time()                               # the clock of --minutes counts training
    bar.close()
    if chief and args.profile:
        report(timer, args, device, world, Path("profile.png"))
    elif chief:
        if not any(line["step"] == step and "psnr" in line for line in log):       # --minutes are over
            validate_and_save()
        say(f"the student is in {out}/student.safetensors, the best one, of step {best_step(log, start2, args.max_drop)}, in best.safetensors; "
            f"pictures: {out}/samples.png, {out}/curves.png")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error).strip()
        if "DataLoader worker" in message:                    # the worker's own error is the last line of its traceback
            message = message.splitlines()[-1].partition(": ")[2]
        elif isinstance(error, RuntimeError) and "\n" in message:      # not one of ours: a bug wants its traceback
            raise
        sys.exit(f"error: {message}")
