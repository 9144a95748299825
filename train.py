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
number of processes changes what is trained on. Ctrl-C and SIGTERM save a checkpoint first. A step whose loss or gradient
is not finite is skipped and named.
"""
import argparse
import atexit
import copy
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import HELD_OUT_SEED, BadVideo, CachedClips, SyntheticClips, VideoClips, write_file
from losses import (HEADS, LPIPS, Objective, PatchDiscriminator, StudentWithHeads, adaptive_weight, kl_loss,
                    last_layer_gradients, make_heads, sharpness)
from model import CONFIGS, TurboVAED, number
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
    if value in ("auto", "off"):
        return value
    if not value.isdecimal():
        raise argparse.ArgumentTypeError("takes auto, off or the number of a step")
    return int(value)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [--teacher NAME] [options]; --help explains each",
                                epilog="Defaults marked * are the teacher's recipe, at the top of train.py.")
    p.add_argument("--teacher", choices=TEACHERS, default="tiny", help="whose decoder to distil (default: tiny)")
    p.add_argument("--teacher-weights", help='a folder or file instead of the released weights, or "random"')
    p.add_argument("--config", choices=CONFIGS, help="the student's configuration (default: the one named as the teacher)")
    p.add_argument("--data", help='a folder of videos, of any depth, or "synthetic" for made-up video *')
    p.add_argument("--val-data", help="validate on this folder (default: held-out files of --data, or held-out made-up clips)")
    p.add_argument("--val-clips", type=number(int, 1), default=8, help="clips to validate on, at most (default: 8)")
    p.add_argument("--frames", type=number(int, 1), help="frames of a clip *")
    p.add_argument("--size", type=number(int, 1), help="height and width of a clip in pixels *")
    p.add_argument("--stride", type=number(int, 1), default=1, help="keep every so many frames of a video (default: 1)")
    p.add_argument("--steps", type=number(int, 1), help="optimiser steps, both stages together, at most *")
    p.add_argument("--stage2", type=stage2, metavar="auto|STEP|off", help="when the adversarial term joins: once validation PSNR has gained "
                   "less than --stage2-gain over --stage2-evaluations, or --stage2-steps are left; at that step; never *")
    p.add_argument("--stage2-steps", type=number(int, 1), help="optimiser steps of stage 2 where it begins by itself *")
    p.add_argument("--stage2-lr", type=number(float, 0), help="the student's learning rates in stage 2, as a part of stage 1's *")
    p.add_argument("--stage2-gain", type=number(float, 0), default=0.05, help="in dB (default: 0.05)")
    p.add_argument("--stage2-evaluations", type=number(int, 1), default=5, help="(default: 5)")
    p.add_argument("--minutes", type=number(float, above=0), help="stop after this long at the latest; the cosine then ends with the time")
    p.add_argument("--batch", type=number(int, 1), help="effective batch: clips a step over all processes and accumulation *")
    p.add_argument("--micro-batch", type=number(int, 1), help="clips a process takes at once *")
    p.add_argument("--lr", type=number(float, above=0), help="AdamW's learning rate *")
    p.add_argument("--muon-lr", type=number(float, 0), help="Muon's learning rate, for convolutions that mix channels; 0: AdamW for everything *")
    p.add_argument("--schedule", choices=("constant", "cosine"), help="of the learning rate, after the warm-up *")
    p.add_argument("--warmup", type=number(int, 0), default=100, help="steps of linear warm-up (default: 100)")
    p.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="(default: 1e-4)")
    p.add_argument("--clip", type=number(float, above=0), default=1.0, help="largest gradient norm (default: 1)")
    p.add_argument("--ema", type=number(float, 0, below=1), default=0.999, help="decay of the weights' moving average (default: 0.999)")
    p.add_argument("--align", nargs="*", metavar="BLOCK", help="blocks that Equation 4 aligns; none after --align turns it off *")
    p.add_argument("--head", choices=HEADS, default="pointwise", help="projection heads, Table 7 (default: pointwise)")
    p.add_argument("--lpips-weight", type=number(float, 0), help="α1 of Equation 5; 0 turns LPIPS off *")
    p.add_argument("--lpips-frames", type=number(int, 0), default=2, help="random frames of each clip that LPIPS sees, an unbiased estimate; 0: all (default: 2)")
    p.add_argument("--distill-weight", type=number(float, 0), help="α2 of Equation 5; 0 turns the distillation loss off *")
    p.add_argument("--equation4", action="store_true", help="the distillation loss as the paper has it: weight 1, features as they are")
    p.add_argument("--kl-weight", type=number(float, 0), default=1e-7, help="α3 of Equation 5 (default: 1e-7)")
    p.add_argument("--adversarial-weight", type=number(float, 0), help="α4 of Equation 5, besides the adaptive weight *")
    p.add_argument("--max-drop", type=number(float, 0), default=0.3, help="dB of validation PSNR that stage 2 may cost: where it costs more, the "
                   "adversarial weight is halved at each validation until it does not (default: 0.3)")
    p.add_argument("--disc-lr", type=number(float, above=0), help="the discriminator's learning rate *")
    p.add_argument("--disc-width", type=number(int, 4), help="channels of the discriminator's first layer *")
    p.add_argument("--disc-floor", type=number(float, 0), default=1.0, help="the discriminator rests in steps where its hinge loss is below this, so that "
                   "it does not outrun the student; 0 for never (default: 1)")
    p.add_argument("--smoothness", type=number(float, 0), default=10.0, help="weight of the discriminator's approximate R1 penalty (default: 10)")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None,
                   help="divide the teacher's features by their standard deviation in Equation 4 *")
    p.add_argument("--cache", metavar="DIR", help="keep the teacher's latents and features of --cache-crops crops of each clip there, "
                   "computed before the first step, and run no teacher in training")
    p.add_argument("--cache-crops", type=number(int, 1), default=4, help="crops of each video; made-up video counts as 512 videos (default: 4)")
    p.add_argument("--cache-dtype", choices=("float16", "bfloat16"), default="float16", help="of latents and features (default: float16)")
    p.add_argument("--checkpointing", action="store_true", help="recompute the student's blocks in the backward pass: less memory, more time")
    p.add_argument("--profile", type=number(int, 1), metavar="N", help="time N steps of each stage, say what takes how long and what the recipe would "
                   "cost, and stop")
    p.add_argument("--price", type=number(float, 0), default=2.0, help="dollars per GPU and hour, for --profile (default: 2)")
    p.add_argument("--seed", type=number(int, 0, 2 ** 32 - 2), default=0, help="of weights, clips and samples (default: 0)")
    p.add_argument("--workers", type=number(int, 0), help="loader processes for each training process *")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="autocast type (default: bfloat16 where the hardware has units for it, else float16 on GPUs, float32 on CPUs)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is a GPU)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile the student (default: on GPUs)")
    p.add_argument("--save-minutes", type=number(float, above=0), default=10.0, help="minutes between checkpoints, at most (default: 10)")
    p.add_argument("--eval-every", type=number(int, 1), help="steps between validations, pictures and checkpoints *")
    p.add_argument("--log-every", type=number(int, 1), default=10, help="steps between lines of log.jsonl (default: 10)")
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
    if args.disc_width % 4:
        p.error(f"--disc-width must be a multiple of 4, not {args.disc_width}")
    if args.resume and (args.overwrite or args.profile):
        p.error("--resume goes neither with --overwrite nor with --profile")
    return args


def autocast_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def hold_out(clips, n):
    """{index: clip} of n of the files, spread evenly; the next file where one cannot be decoded."""
    taken, tried = {}, set()
    for place in range(n):
        for i in range(len(clips)):
            i = (place * len(clips) // n + i) % len(clips)
            if i not in tried:
                tried.add(i)
                try:
                    taken[i] = clips[i]
                    break
                except BadVideo as error:
                    print(f"not validating on {error}", file=sys.stderr)
    if not taken:
        raise ValueError(f"no video in {clips.root} can be decoded to validate on")
    return taken


def datasets(args):
    """(training stream, validation clips, what the latter are, what a resume must find unchanged)."""
    made_up = args.data == "synthetic"
    if made_up:
        train = SyntheticClips(args.frames, args.size, args.seed + (args.seed >= HELD_OUT_SEED), length=2 ** 62)
    else:
        train = VideoClips(args.data, args.frames, args.size, args.stride, train=True, seed=args.seed)
    if made_up and not args.val_data:
        held_out = SyntheticClips(args.frames, args.size, HELD_OUT_SEED)
        return train, [held_out[8 * i] for i in range(args.val_clips)], "held-out made-up clips", {"files": "made-up", "held_out": []}
    if args.val_data:
        held_out = VideoClips(args.val_data, args.frames, args.size, args.stride, train=False)
        clips, name = hold_out(held_out, min(args.val_clips, len(held_out))), args.val_data
        train = train if made_up else train.without(held_out)
        if not len(train):
            raise ValueError(f"no video is left to train on: {args.val_data}, which is for validation, holds all that {args.data} does")
    else:
        held_out = copy.copy(train)
        held_out.train = False
        n = min(args.val_clips, max(len(train) // 20, 1))
        clips = hold_out(held_out, n)
        name = f"{len(clips)} held-out videos" if len(train) > 1 else "the one video there is, trained on too"
        train = copy.copy(train).subset([i for i in range(len(train)) if i not in clips or len(train) == 1])
    held_out.subset(list(clips))
    return train, list(clips.values()), name, {"files": "made-up" if made_up else train.fingerprint(),
                                               "held_out": held_out.files + [held_out.fingerprint()]}


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
    """Clips with their numbers, which seed the posterior's samples, and with the `lpips_frames` of them that LPIPS sees."""

    def __init__(self, clips, seed, frames, lpips_frames):
        self.clips, self.seed, self.frames, self.lpips_frames = clips, seed, frames, lpips_frames

    def __getitem__(self, n):
        clip = self.clips[n]
        item = {"n": n} | (clip if isinstance(clip, dict) else {"video": clip})
        if self.lpips_frames:
            item["frames"] = torch.from_numpy(clip_rng(self.seed, 6, n).permutation(self.frames)[:self.lpips_frames])
        return item


def begin_worker(number):
    """Loader processes leave signals to the process that they serve: it still needs them for the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """Python ends its children by SIGTERM, which these ignore, and would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)             # PyTorch's handler would call it a failure
    for child in multiprocessing.active_children():
        child.kill()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the momentum with all its singular values made about 1, so that weak
    directions, colour say, are learned as fast as strong ones, brightness. A convolution's weight counts as the matrix
    (output channels) x (input channels and positions), which torch.optim.Muon does not accept."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        skip = getattr(self, "found_inf", None)                             # as torch.optim's fused optimisers have it
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)       # Nesterov's look ahead
                rows, columns = x.shape
                x = x.T if rows > columns else x
                x = x / (x.norm() + 1e-12)
                for _ in range(5):                                          # Newton and Schulz's iteration to the polar factor
                    a = x @ x.T
                    x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
                x = x.T if rows > columns else x
                new = p * (1 - group["lr"] * group["weight_decay"])
                new.add_(x.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
                for old, value in ((state["momentum"], average), (p, new)):
                    old.copy_(value if skip is None else torch.where(skip > 0, old, value))


def make_optimizers(module, lr, muon_lr, weight_decay):
    """AdamW with the paper's betas; with a muon_lr, Muon takes the weights that mix channels (not depthwise ones)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    mixing = [p for p in trained if p.ndim > 1 and p.shape[1] > 1] if muon_lr else []
    taken = set(map(id, mixing))
    rest = [p for p in trained if id(p) not in taken]
    return [torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)] \
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
    """Seconds by part of the step, waiting for the device at each part's ends: `with timer("student"): ...`; and of whole
    steps, between start() and stop()."""

    def __init__(self, device):
        self.device, self.seconds, self.total, self.steps = device, {}, 0.0, 0

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self):
        self.began = self.now()

    def stop(self):
        self.total, self.steps = self.total + self.now() - self.began, self.steps + 1

    @contextmanager
    def __call__(self, part):
        start = self.now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start


def report(timers, recipe, args, device, world, path):
    """Prints where the time of --profile's steps went, {stage: Timer}, and what the recipe, {stage: steps}, would cost;
    draws it, too."""
    import resource
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(timers), 1, figsize=(7, 3.2 * len(timers)), squeeze=False, layout="constrained")
    hours = 0.0
    for axis, (stage, timer) in zip(axes[:, 0], timers.items()):
        parts = timer.seconds | {"the rest": timer.total - sum(timer.seconds.values())}
        print(f"stage {stage}, {timer.steps} steps")
        for part, seconds in parts.items():
            print(f"  {part:16} {1000 * seconds / timer.steps:9.1f} ms a step  {100 * seconds / timer.total:5.1f} %")
        print(f"  {args.batch * timer.steps / timer.total:.3g} samples/s on {world} x {device.type}")
        hours += recipe[stage] * timer.total / timer.steps / 3600
        bars = axis.barh(list(parts), [1000 * seconds / timer.steps for seconds in parts.values()])
        axis.bar_label(bars, [f"{100 * seconds / timer.total:.0f} %" for seconds in parts.values()], padding=3)
        axis.set(title=f"stage {stage}", xlabel="milliseconds a step", xmargin=0.1)
        axis.invert_yaxis()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1e9:.2f} GB in a process")
    steps = " and ".join(f"{recipe[stage]} steps of stage {stage}" for stage in timers)
    print(f"the whole recipe, {steps}, {args.batch} samples each, at this speed: {hours:.3g} hours, {hours * world:.3g} {device.type} hours"
          + (f", {hours * world * args.price:.0f} dollars at {args.price:g} each" if device.type == "cuda" else ""))
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
        if axis.get_legend_handles_labels()[0]:
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
def fill_cache(args, teacher, clips, about, device, autocast, processes, say):
    """A CachedClips of --cache-crops crops of each clip, of which this process makes its share of what is missing."""
    videos = 512 if args.data == "synthetic" else len(clips)
    settings = {"teacher": args.teacher, "weights": about["teacher_weights"], "files": about["files"], "seed": args.seed, "precision": args.dtype} \
        | {key: getattr(args, key) for key in ("frames", "size", "stride", "cache_crops")}
    make_cache = lambda: CachedClips(args.cache, videos * args.cache_crops, settings, getattr(torch, args.cache_dtype), args.align, args.seed)
    cache = processes.from_chief(make_cache)

    def make(numbers, video):
        with autocast():
            latents, features, kl = teach(teacher, video.to(device), numbers, cache.made["blocks"], args.seed)
        return [{"latents": latents[i], "kl": kl[i]} | {f"features.{name}": f[i] for name, f in features.items()} for i in range(len(video))]

    cache.fill(clips, make, args.micro_batch, processes.rank, processes.world, processes.wait, args.workers, say)
    return cache


class Processes:
    """The processes of a run, in one place. They wait for each other over gloo on the CPU, with no limit to speak of:
    NCCL's watchdog ends who waits for ten minutes, be it for a validation or a cache. The chief is the first."""

    def __init__(self, device):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.chief = self.rank == 0
        if self.world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self):
        if self.world > 1:
            dist.barrier(self.group)

    def end(self):
        if self.world > 1:
            dist.barrier(self.group)
            dist.destroy_process_group()

    def agree(self, values, how=None):
        """The sum, or what else `how` says, of a list of floats over all processes."""
        if self.world == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(values, how or dist.ReduceOp.SUM, self.group)
        return values.tolist()

    def from_chief(self, make):
        """What make() returns on the chief, on all processes; its error ends them all, and is said once."""
        if self.world == 1:
            return make()
        held, error = [None, None], None
        if self.chief:
            try:
                held = [make(), None]
            except (ValueError, OSError, RuntimeError) as e:
                held, error = [None, str(e)], e
        dist.broadcast_object_list(held, 0, self.group)
        if error:
            raise error
        if held[1] is not None:
            sys.exit(1)
        return held[0]


class Signals:
    """SIGINT (Ctrl-C) and SIGTERM: while `holding`, they are kept in `received` until the step is done; else they end the
    process at once."""

    def __init__(self):
        self.received, self.holding = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = self.received or number
        if not self.holding:
            sys.exit(128 + number)


class Tally:
    """The steps' values between two lines of the log, and which steps were skipped since something was not finite.

    `add` leaves them on the device, `settle` reads all in one go, since reading waits for the device."""
    IN_A_ROW, OF_100 = 5, 20                        # so many steps that are not finite end a run

    def __init__(self, processes):
        self.chief, self.alone = processes.chief, processes.world == 1
        self.describe, self.pending, self.failure = str, [], None
        self.in_a_row, self.recent, self.told = 0, deque(maxlen=100), 0
        self.reset()

    def reset(self):
        self.state = {"steps": 0, "clipped": 0, "skipped": 0, "sums": {}}

    def restore(self, state):
        """The sums over all processes are the chief's from then on."""
        self.state = state if self.chief else {"steps": 0, "clipped": 0, "skipped": 0, "sums": dict.fromkeys(state["sums"], 0.0)}

    def gather(self, processes):
        """The state summed over all processes."""
        counts, names = ("steps", "clipped", "skipped"), list(self.state["sums"])
        values = processes.agree([self.state[name] for name in counts] + list(self.state["sums"].values()))
        state = dict(zip(counts, values)) | {"sums": dict(zip(names, values[len(counts):]))}
        self.restore(state)
        return state

    def add(self, step, micros, norms, skip, scale):
        """micros: (numbers, {term: value}) of each micro-batch; norms: {name: gradient's norm}; skip: whether the step is
        skipped; scale: float16's loss scale, else 1."""
        for name in micros[0][1]:
            self.state["sums"].setdefault(name, 0.0)
        values = [value for _, terms in micros for value in terms.values()] + [*norms.values(), skip, scale]
        self.pending.append((step, [numbers for numbers, _ in micros], list(micros[0][1]), list(norms), torch.stack([v.float() for v in values])))

    def settle(self, clip):
        """clip: the largest norm that is not clipped."""
        flat = torch.cat([p[-1] for p in self.pending]).tolist() if self.pending else []
        for step, numbers, names, norms, values in self.pending:
            values, flat = flat[:len(values)], flat[len(values):]
            rows = [values[i * len(names):][:len(names)] for i in range(len(numbers))]
            norms, (skip, scale) = dict(zip(norms, values[len(names) * len(rows):])), values[-2:]
            wrong = [(name, value, n) for row, n in zip(rows, numbers) for name, value in zip(names, row) if not math.isfinite(value)]
            if skip and not wrong and scale <= 1:   # above 1 float16 just looks for its scale
                where = "" if self.alone else " of this process or another"
                wrong = [(name + where, value, sum(numbers, [])) for name, value in norms.items() if not math.isfinite(value)][:1]
            self.state["skipped"] += int(skip) * self.chief             # it is the same step on all processes
            if wrong:
                self.not_finite(step, wrong)
            self.in_a_row = self.in_a_row + 1 if wrong else 0
            self.recent.append(bool(wrong))
            if self.in_a_row >= self.IN_A_ROW or sum(self.recent) >= self.OF_100:
                self.failure = f"{self.last}; so were {sum(self.recent)} of the last {len(self.recent)} steps"
            if not wrong and not skip:
                for name, column in zip(names, zip(*rows)):
                    self.state["sums"][name] += sum(column) / len(rows)
                self.state["steps"] += 1
                self.state["clipped"] += next(iter(norms.values())) > clip
        self.pending = []

    def not_finite(self, step, wrong):
        clips = dict.fromkeys(self.describe(n) for _, _, numbers in wrong for n in numbers)
        self.last = f"{wrong[0][0]} is {wrong[0][1]} at step {step}, clips {', '.join(clips)}"
        self.told += 1
        if self.told <= 10:
            print(f"passed over: {self.last}" + "; more of these are not told" * (self.told == 10), file=sys.stderr)


# What --resume may change. The first three are compared by what they hold.
MAY_CHANGE = {"data", "val_data", "teacher_weights", "steps", "minutes", "stage2", "stage2_steps", "stage2_gain", "stage2_evaluations", "micro_batch",
              "equation4", "checkpointing", "profile", "price", "workers", "device", "compile", "save_minutes", "eval_every", "log_every", "out",
              "resume", "overwrite"}


def check_resume(saved, args, about, out):
    """Raises ValueError where a run would not go on as what it began as."""
    then = saved["args"]
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and then.get(name) != value:
            raise ValueError(f"{out} was run with --{name.replace('_', '-')} {then.get(name)}, not {value}")
    for key, what in (("held_out", f"validated on {', '.join(saved['about']['held_out'][:-1]) or 'made-up clips'}, and now these files"),
                      ("files", f"trained on files of {then['data']} that"), ("teacher_weights", "taught by weights that")):
        if saved["about"][key] != about[key]:
            raise ValueError(f"{out} was {what} are others: bring back what was there, or start anew with --overwrite")
    if saved["start2"] is not None and args.stage2 != then["stage2"]:
        raise ValueError(f"stage 2 of {out} began at step {saved['start2']}: --stage2 {args.stage2} comes too late")


RUN_FILES = ("checkpoint.pt", "student.safetensors", "best.safetensors", "curves.png", "samples.png")


def open_run(out, args):
    """Whether the run in the folder `out` goes on; makes the folder. Raises where the folder holds or lacks a run that it
    should not, or cannot be written to."""
    there = [(out / name).exists() for name in RUN_FILES[:2]]
    if any(there) and not (args.resume or args.overwrite or args.profile):
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite starts anew, --out names another folder")
    if args.resume and not (out / "args.json").exists():
        raise FileNotFoundError(f"nothing to resume: no run in {out}")
    if not args.profile:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_file(out / "writable", b"")
            (out / "writable").unlink()
        except OSError as error:
            raise OSError(f"--out {out} cannot be written to ({error.strerror or error})") from None
    return args.resume and there[0]


def last_checkpoint(out):
    return f"; the last good checkpoint is {out}/checkpoint.pt" if (out / "checkpoint.pt").exists() else ""


def find_device(name):
    """The torch.device, this process's own where there are several GPUs. Raises ValueError where there is none such."""
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@torch.no_grad()
def finite_in_autocast(teacher, clip, blocks, autocast):
    """Whether all that training asks of the teacher is finite in half precision, whose largest number is 65,504."""
    with autocast():
        mean, logvar = teacher.posterior(clip)
        tensors = [mean, teacher.decode(mean), *teacher.features(mean, blocks).values()] + [logvar] * (logvar is not None)
    return all(tensor.isfinite().all().item() for tensor in tensors)


def take_step(optimizers, scaler, skip, rests=None):
    """One step of all optimisers together, or of none where `skip` is 1; the last one, the discriminator's, stays where
    `rests` is 1. Both are tensors that stay on the device, as torch.optim's fused optimisers and Muon read them."""
    for optimizer in optimizers:
        optimizer.found_inf = skip if rests is None or optimizer is not optimizers[-1] else torch.maximum(skip, rests)
        optimizer.step()
    scaler.update()


def lay_out(module):
    """The weights of 3D and 2D convolutions in the layout that is fast on GPUs."""
    for p in module.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d if p.ndim == 5 else torch.channels_last)
    return module


def compile_teacher(teacher):
    """Compiles the encoder and each block of the decoder, since features need the first of them only."""
    teacher.vae.encoder.compile(dynamic=False)
    for block in teacher.vae.decoder.children():
        for part in block if isinstance(block, torch.nn.ModuleList) else [block]:
            part.compile(dynamic=False)


def main(args):
    # processes -----------------------------------------------------------------------------------------------
    signals = Signals()
    device = find_device(args.device)
    processes = Processes(device)
    world, chief = processes.world, processes.chief
    if args.batch % (args.micro_batch * world):
        raise ValueError(f"--batch {args.batch} cannot be divided among {world} processes in micro-batches of {args.micro_batch}: "
                         f"multiples of {args.micro_batch * world} can")
    accumulate = args.batch // (args.micro_batch * world)
    say = tqdm.write if chief else (lambda line: None)
    out = Path(args.out)
    resumes = processes.from_chief(lambda: open_run(out, args))
    saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True) if resumes else None
    if resumes and args.dtype == "auto":
        args.dtype = saved["args"]["dtype"]

    # teacher, clips, student, loss ---------------------------------------------------------------------------
    dtype = autocast_dtype(args.dtype, device)
    args.dtype = str(dtype)[6:]
    autocast = teacher_autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    teacher = load_teacher(args.teacher, args.teacher_weights, device)
    teacher.check_clip(args.frames, args.size, args.size)
    config = CONFIGS[args.config]
    if config.latent_channels != teacher.latent_channels or config.compression != teacher.compression:
        raise ValueError(f"student {args.config} decodes {config.latent_channels} channels at {config.compression}, "
                         f"the {args.teacher} teacher has {teacher.latent_channels} at {teacher.compression}")
    val_clips = []

    def find_clips():                                         # the chief looks, since all must go by one list
        train, clips, name, about = datasets(args)
        val_clips.extend(clip[None] for clip in clips)
        return train, name, about | {"teacher_weights": teacher.weights_hash()}

    train_clips, val_name, about = processes.from_chief(find_clips)
    if resumes:
        check_resume(saved, args, about, out)
    compiles = args.compile or args.compile is None and device.type == "cuda"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True                 # sizes do not change
        if dtype != torch.float32:
            torch.set_float32_matmul_precision("high")        # Muon's products
        lay_out(teacher)
    if compiles:
        compile_teacher(teacher)
        torch._dynamo.config.suppress_errors = True           # what cannot be compiled here runs eager, with a warning
        torch._dynamo.config.optimize_ddp = not args.checkpointing      # it cannot split a graph of checkpointed blocks

    torch.manual_seed(args.seed)
    student = TurboVAED(config).to(device)
    if device.type == "cuda":
        student.channels_last()
    student.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    with torch.no_grad():
        latents = teacher.encode(torch.zeros(1, 3, args.frames, args.size, args.size, device=device), sample=False)
        shapes = {name: f.shape for name, f in teacher.features(latents, args.align).items()}
    heads = make_heads({name: config.feature_shape(name, latents.shape) for name in shapes}, shapes, args.head)
    both = StudentWithHeads(student, heads, args.normalize).to(device)
    objective = Objective(LPIPS().to(device) if args.lpips_weight else None, args.lpips_weight, args.distill_weight, args.kl_weight,
                          smoothness=args.smoothness)
    if objective.lpips and device.type == "cuda":
        lay_out(objective.lpips)
    if compiles:
        student.compile()
        if objective.lpips:
            objective.lpips.net.compile()
    trained = [p for p in both.parameters() if p.requires_grad]
    optimizers = make_optimizers(both, args.lr, args.muon_lr, args.weight_decay)
    peaks = [args.lr, args.muon_lr][:len(optimizers)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def begin_stage2():
        torch.manual_seed(args.seed + 1)
        objective.discriminator = PatchDiscriminator(args.disc_width).to(device)
        objective.adaptive_weight = torch.zeros((), device=device)
        if device.type == "cuda":
            lay_out(objective.discriminator)
        if compiles:
            objective.discriminator.compile()
        optimizers.append(torch.optim.AdamW(objective.discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9), weight_decay=args.weight_decay,
                                            fused=True))
        peaks[:] = [args.lr * args.stage2_lr, args.muon_lr * args.stage2_lr][:len(peaks)] + [args.disc_lr]

    # what the teacher makes of the validation clips ----------------------------------------------------------
    if chief:
        with torch.no_grad():
            val_latents = [teacher.encode(clip.to(device), sample=False) for clip in val_clips]
    if dtype != torch.float32 and not processes.from_chief(lambda: finite_in_autocast(teacher, val_clips[0].to(device), args.align, autocast)):
        teacher_autocast = nullcontext
        say(f"the {args.teacher} teacher is not finite in {args.dtype}: it runs in float32")

    def decode_with_teacher():
        with teacher_autocast():
            videos = decode_all(teacher.decode, val_latents)
        mean = float(np.mean([psnr(a, b) for a, b in zip(videos, val_clips)]))
        if not math.isfinite(mean):
            raise ValueError(f"the {args.teacher} teacher's PSNR is {mean} on {val_name}: its weights are not fit to learn from")
        teacher_videos.extend(videos)
        return mean

    teacher_videos = []
    teacher_psnr = processes.from_chief(decode_with_teacher)

    # resume --------------------------------------------------------------------------------------------------
    step, start2, elapsed, log = 0, None, 0.0, []             # start2: the step at which stage 2 began
    tally = Tally(processes)
    if resumes:
        step, start2, elapsed = saved["step"], saved["start2"], saved["elapsed"]
        both.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        if start2 is not None:
            begin_stage2()
            objective.discriminator.load_state_dict(saved["discriminator"])
            objective.adaptive_weight.fill_(saved["adaptive_weight"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        tally.restore(saved["tally"])
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        lines = text.split("\n")[:-1]                         # without one that a kill cut short: it is of a later step anyway
        log = [line for line in map(json.loads, lines) if line["step"] <= step]
    latest = args.steps - args.stage2_steps                   # auto's; a run too short for that has stage 2 only if it converges
    stage2_at = args.stage2 if isinstance(args.stage2, int) else latest if args.stage2 == "auto" and latest > 0 else args.steps
    end_of = lambda start2: min(args.steps, start2 + args.stage2_steps) if start2 is not None and args.stage2 == "auto" else args.steps
    recipe = {1: stage2_at, 2: args.steps - stage2_at}
    if args.profile:
        stage2_at = args.profile + 3
        end_of = lambda start2: stage2_at * (1 + (recipe[2] > 0))
    if resumes and step >= end_of(start2):
        if all(saved["args"][name] == getattr(args, name) for name in ("steps", "stage2", "stage2_steps")):
            say(f"{out} is finished: it ended at step {step}; to go on, ask for more --steps" + " and --stage2-steps" * (args.stage2 == "auto"))
            return processes.end()
        raise ValueError(f"{out} is at step {step} and ends at {end_of(start2)}: no step would be taken; ask for more "
                         + ("--steps" if end_of(start2) == args.steps else f"--stage2-steps than {args.stage2_steps}"))
    saved = None                                              # or it would stay in memory
    if chief and not args.profile:
        if not resumes:
            for name in RUN_FILES:                            # an older run's, which --resume would go on with
                (out / name).unlink(missing_ok=True)
        write_file(out / "args.json", json.dumps(vars(args), indent=1).encode())
        write_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())

    model = DistributedDataParallel(both) if world > 1 else both
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    say(f"teacher {args.teacher}: {teacher_psnr:.2f} dB on {val_name}; student {args.config}: {millions(student):.2f} M parameters"
        f"{f' and {millions(heads):.2f} M in heads' if shapes else ''}; {device.type} x {world}, {args.dtype}")
    say(f"{args.steps} steps of {args.batch} clips ({args.micro_batch} x {world} processes x {accumulate}), "
        f"{args.frames}x{args.size}x{args.size}, {args.data}" + ("" if objective.lpips else "; no LPIPS term"))
    if args.cache:
        train_clips = fill_cache(args, teacher, train_clips, about, device, teacher_autocast, processes, say)
        teacher = None                                        # its memory is the student's now
    tally.describe = train_clips.describe

    def write_line(line):
        log.append(line)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def save_checkpoint(state):
        checkpoint = {"model": both.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                      "scaler": scaler.state_dict(), "step": step, "start2": start2, "elapsed": elapsed, "args": vars(args),
                      "about": about, "tally": state}
        if start2 is not None:
            checkpoint |= {"discriminator": objective.discriminator.state_dict(), "adaptive_weight": objective.adaptive_weight.item()}
        save_as(out / "checkpoint.pt", torch.save, checkpoint)

    @torch.no_grad()
    def validate():
        """A line of the log, pictures, and the student as it is now."""
        with autocast():
            videos = decode_all(ema, val_latents)
        if not all(video.isfinite().all() for video in videos):                     # in half precision, perhaps
            videos = decode_all(ema, val_latents)
        line = {"step": step, "psnr": round(float(np.mean([psnr(a, b) for a, b in zip(videos, val_clips)])), 4)}
        if not math.isfinite(line["psnr"]):
            raise RuntimeError(f"the student's PSNR is {line['psnr']} at step {step}: nothing was saved" + last_checkpoint(out))
        line["sharpness"] = round(float(np.mean([(sharpness(a) / sharpness(b)).item() for a, b in zip(videos, val_clips)])), 4)
        if objective.lpips:
            line["val_lpips"] = round(float(np.mean([objective.lpips(a.to(device), b.to(device)).item() for a, b in zip(videos, val_clips)])), 4)
        write_line(line | {"stage": 1 if start2 is None or step <= start2 else 2, "teacher_psnr": round(teacher_psnr, 4), "minutes": round(elapsed / 60, 3)})
        plot_curves(out / "curves.png", log, teacher_psnr, start2)
        squeeze = lambda videos: [v[0] for v in videos]
        plot_samples(out / "samples.png", {"input": squeeze(val_clips), "teacher": squeeze(teacher_videos), "student": squeeze(videos)})
        about_student = {"teacher": args.teacher, "step": str(step), "psnr": f"{line['psnr']:.2f}"}
        ema.save_pretrained(out, metadata=about_student)
        if best_step(log, start2, args.max_drop) == step:
            ema.save_pretrained(out / "best.safetensors", metadata=about_student)
        say(f"step {step}: PSNR {line['psnr']:.2f} dB ({100 * line['psnr'] / teacher_psnr:.1f} % of the teacher's), "
            f"sharpness {100 * line['sharpness']:.0f} % of the input's, {elapsed / 60:.1f} min")

    def save(validates=False):
        """All processes take part: what the tally holds is theirs."""
        if args.profile:
            return
        tally.settle(args.clip)
        state = tally.gather(processes)
        processes.from_chief(lambda: (validates and validate(), save_checkpoint(state)))

    # the loop ------------------------------------------------------------------------------------------------
    lpips_frames = args.lpips_frames if objective.lpips and args.lpips_frames < args.frames else 0
    signals.holding = True
    atexit.register(end_workers)
    loader = iter(DataLoader(Indexed(train_clips, args.seed, args.frames, lpips_frames), batch_sampler=Slots(args, step, processes.rank, world),
                             num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=begin_worker))
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=not (chief and sys.stderr.isatty()))
    first_step, timers, timer, timed = step, {}, lambda part: nullcontext(), 0
    clock = saved_at = time.time()
    logged_elapsed, damp = elapsed, 1.0
    validated = lambda: any(line["step"] == step and "psnr" in line for line in log)
    while True:
        decision = [0.0] * 6
        if chief:                                             # it has the clock and the validations
            begins = False
            if step % args.eval_every == 0 or step in (first_step, stage2_at):
                begins = start2 is None and step < end_of(None) and (step >= stage2_at or not args.profile and args.stage2 == "auto"
                                                                     and converged(log, args.stage2_evaluations, args.stage2_gain))
                damp = damping(log, start2, args.max_drop)
            decision[:4] = [elapsed / (60 * args.minutes) if args.minutes and not args.profile else 0.0, float(begins), damp,
                            float(time.time() - saved_at > 60 * args.save_minutes)]
        decision[4:] = [float(signals.received), float(tally.failure is not None)]
        spent, begins, damp, saves, stopped, failed = processes.agree(decision, dist.ReduceOp.MAX if world > 1 else None)
        if failed:
            if tally.failure:
                print(f"error: {tally.failure}{last_checkpoint(out)}", file=sys.stderr, flush=True)
            processes.wait()
            sys.exit(1)
        if stopped:
            break
        if saves:
            save()
            clock = saved_at = time.time()                    # the clock of --minutes counts training
        if begins:
            if not processes.from_chief(validated):           # stage 2 is measured by what stage 1 ended with
                save(validates=True)
                clock = saved_at = time.time()
            start2 = step
            begin_stage2()
            say(f"step {step}: stage 2 begins")
        begun, length = (0, stage2_at) if start2 is None else (start2, end_of(start2) - start2)
        if step >= begun + length or spent >= 1:
            break
        bar.total, bar.desc = begun + length, f"stage {1 if start2 is None else 2}"
        decay = 0.5 * (1 + math.cos(math.pi * max((step - begun) / length, spent))) if args.schedule == "cosine" else 1.0
        warmup = min((step - begun + 1) / args.warmup, 1) if args.warmup else 1.0
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * decay * warmup
        objective.adversarial_weight = args.adversarial_weight * damp * warmup
        weight = objective.adversarial_weight * objective.adaptive_weight
        timing = args.profile and step - begun >= 3
        if timing:
            timer = timers.setdefault(1 if start2 is None else 2, Timer(device))
            timer.start()
        elif args.profile:
            timer = lambda part: nullcontext()

        micros, layers = [], []
        for i in range(accumulate):
            with timer("data"):
                batch = next(loader)
                numbers, video = batch["n"].tolist(), batch["video"].to(device, non_blocking=True)
                frames = batch["frames"].to(device, non_blocking=True) if lpips_frames else None
            with timer("teacher"), torch.no_grad():
                if teacher:
                    with teacher_autocast():
                        latents, features, kl = teach(teacher, video, numbers, args.align, args.seed)
                else:
                    latents, kl = (batch[name].to(device, non_blocking=True).float() for name in ("latents", "kl"))
                    features = {name: batch[f"features.{name}"].to(device, non_blocking=True) for name in args.align}
            noise = clip_noise(args.seed, 7, numbers, video) if start2 is not None else None
            with model.no_sync() if world > 1 and i + 1 < accumulate else nullcontext():
                terms, gradients = objective.backward(model, latents, features, video, kl.mean(), frames, noise,
                                                      lambda loss: scaler.scale(loss / accumulate), autocast, timer)
            micros.append((numbers, terms))
            if start2 is not None and (step - start2) % 10 == 0:
                with timer("discriminator"):
                    layers.append(torch.stack(last_layer_gradients(student, latents, *gradients, autocast=autocast)))

        with timer("optimiser"):
            scale = scaler.scale(torch.ones((), device=device))
            if start2 is not None and world > 1:
                for p in objective.discriminator.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= world
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norms = {"the gradient": torch.nn.utils.clip_grad_norm_(trained, args.clip)}
            if start2 is not None:
                norms["the discriminator's gradient"] = torch.nn.utils.clip_grad_norm_(objective.discriminator.parameters(), args.clip)
            skip = 1 - torch.stack(list(norms.values())).isfinite().all().float()
            rests = None
            if start2 is not None:
                hinge = torch.stack([terms["discriminator"] for _, terms in micros]).mean()
                if world > 1:
                    dist.all_reduce(hinge)
                    hinge /= world
                rests = (hinge < args.disc_floor).float()
            take_step(optimizers, scaler, skip, rests)
            tally.add(step + 1, micros, norms, skip, scale)
            both.zero_grad(set_to_none=True)
            if start2 is not None:
                objective.discriminator.zero_grad(set_to_none=True)
            step += 1
            with torch.no_grad():                             # young averages forget sooner, or they would keep the start
                keep = min(args.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - keep)
            if layers:
                layers = sum(layers)
                if world > 1:
                    dist.all_reduce(layers)
                ratio = adaptive_weight(*(layers / (scale * world)))
                objective.adaptive_weight = torch.where(ratio.isfinite(), ratio, objective.adaptive_weight)
        lines_up = step % args.log_every == 0 or step % args.eval_every == 0 or step == begun + length
        if lines_up or step % 10 == 0:
            tally.settle(args.clip)
        if timing:
            timer.stop()
        if compiles and step - 1 in (first_step, start2):     # it compiled: no training that --minutes should count
            clock = time.time()
        else:
            elapsed, clock, timed = elapsed + time.time() - clock, time.time(), timed + 1
        bar.update()

        if lines_up:                                          # before it is saved, too
            state = tally.gather(processes)
            line = {"step": step} | {name: round(value / state["steps"], 7) for name, value in state["sums"].items() if state["steps"]}
            if start2 is not None:
                line["weight"] = round(float(weight), 7)      # of L_adv
            grad_norm = norms["the gradient"].item()
            line |= {"lr": optimizers[0].param_groups[0]["lr"], "grad_norm": round(grad_norm, 4) if math.isfinite(grad_norm) else None,
                     "clipped": state["clipped"] / max(state["steps"], 1), "samples_per_s": round(args.batch * timed / max(elapsed - logged_elapsed, 1e-9), 3),
                     "minutes": round(elapsed / 60, 3)}
            if state["skipped"]:
                line["skipped"] = state["skipped"]
            tally.reset()
            timed, logged_elapsed = 0, elapsed
            bar.set_postfix(loss=f"{line.get('loss', math.nan):.4f}")
            if chief and not args.profile:
                write_line(line)
        if step % args.eval_every == 0 or step == begun + length:
            save(validates=True)
            clock = saved_at = time.time()
    bar.close()
    if stopped:
        save()
        how = f"--resume goes on from {out}/checkpoint.pt" if (out / "checkpoint.pt").exists() and not args.profile else "nothing was saved"
        say(f"stopped by {signal.Signals(int(stopped)).name} at step {step}; {how}")
    elif args.profile:
        if chief:
            report(timers, recipe, args, device, world, Path("profile.png"))
    else:
        if not processes.from_chief(validated):               # --minutes are over
            save(validates=True)
        if chief:
            say(f"the student is in {out}/student.safetensors, the best one, of step {best_step(log, start2, args.max_drop)}, in best.safetensors; "
                f"pictures: {out}/samples.png, {out}/curves.png")
    processes.end()
    if stopped:
        sys.exit(128 + int(stopped))


def one_line(error):
    """What a user is told of an error; None for one that is not ours, which wants its traceback."""
    message = str(error).strip()
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return ("a loader process was killed, most likely since memory ran out: fewer --workers, a smaller --micro-batch or smaller videos help; "
                "--resume goes on from the last checkpoint")
    if "DataLoader worker" in message:                        # the worker's own error is the last line of its traceback
        return message.splitlines()[-1].partition(": ")[2]
    return None if isinstance(error, RuntimeError) and "\n" in message else message


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        message = one_line(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
