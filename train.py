"""Distils a frozen video VAE's decoder into a Turbo-VAED student (Sections 3.4 and 4.2).

    python train.py                                          # the embedded default: teacher tiny, made-up video, CPU
    python train.py --teacher ltx --data data/vidgen         # LTX-VAE on one GPU
    torchrun --nproc_per_node=8 train.py --teacher ltx       # on eight; the effective batch stays the same
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --teacher ltx
                                                             # on two nodes: the same line on both, HOST is one of them
    python train.py --teacher ltx --cache data/cache         # what the teacher makes of each clip, computed once
    python train.py --teacher ltx --resume                   # go on after a stop, with the run's own settings
    python train.py --preset table6-up0-up1                  # one row of the paper's tables; --preset list prints all
    python train.py --student kernel=7 separable=mid,up0     # fields of its model.TurboVAEDConfig

Stage 1 is Equation 5 without its adversarial term. Stage 2 adds the term when stage 1 has nearly converged.
A run leaves in out/<teacher>/ (or --out): checkpoint.pt, student.safetensors (the moving average of the weights),
best.safetensors, in stage 2 best_stage1.safetensors, log.jsonl, curves.png, samples.png (input, teacher, student) and
args.json. The checkpoint is written first and holds log and students, so that these agree.
Clip, crop and noise are functions of (seed, step, slot): results depend neither on the number of processes nor on where
a run was stopped. Ctrl-C and SIGTERM finish the step and save. Steps that are not finite are passed over.
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
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CLIPS_PER_SCENE, HELD_OUT_SEED, BadVideo, CachedClips, SyntheticClips, VideoClips, begin_worker,
                  psnr, shuffled)
from losses import (HEADS, LPIPS, Objective, PatchDiscriminator, StudentWithHeads, adaptive_weight, kl_loss,
                    last_layer_gradients, make_heads, sharpness)
from model import (BLOCKS, CONFIGS, TurboVAED, atomically, channels_last, check_writable, find_device, number,
                   run_command, weights_hash)
from teachers import TEACHERS, load_teacher

# ---------------------------------------------------------------------------------------------------------------------
# Recipes: what is not given on the command line. What has no flag is changed here.

COMMON = dict.fromkeys("teacher_weights val_data samples minutes cache compile".split()) | dict(
    student={}, val_clips=8, warmup=100, head="pointwise", cache_crops=4, checkpointing=False, seed=0, log_every=10,
    dtype="auto", device="cuda" if torch.cuda.is_available() else "cpu",
    workers=os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
# Section 4.2: AdamW, learning rate 2e-4, betas 0.9 and 0.95, effective batch 32, 17 (dc: 16) frames at 256x256.
# Weight decay and EMA as in the published code; 70,000 and 40,000 steps as a user's reproduction of ltx reports.
PAPER = COMMON | dict(
    frames=17, size=256, batch=32, micro_batch=2, steps=110_000, lr=2e-4, disc_lr=2e-4, muon_lr=0, schedule="constant",
    align=["mid", "up0", "up1"], lpips_weight=1.0, distill_weight=1.0, normalize=False, data="data/vidgen",
    eval_every=1000, stage2="auto", stage2_steps=40_000, stage2_lr=1.0, adversarial_weight=0.05, disc_width=64)
LARGE = PAPER | dict(micro_batch=1)
FIRST_TWO = LARGE | dict(align=["mid", "up0"])
RECIPES = {             # the paper has students for the first four teachers
    "ltx": PAPER, "dc": PAPER | dict(frames=16), "hunyuan": FIRST_TWO, "cog": FIRST_TWO,
    "wan21": FIRST_TWO, "wan22": FIRST_TWO, "ltx2": LARGE, "ltx23": LARGE, "ltx095": PAPER,
    "hunyuan15": FIRST_TWO, "qwen": FIRST_TWO | dict(frames=1, micro_batch=4),
    "ltx25": LARGE | dict(align=["mid", "up1"]), "h3": FIRST_TWO | dict(frames=22),
    # No LPIPS, which is a download. AdamW alone leaves the student grey for hundreds of steps, hence Muon.
    "tiny": COMMON | dict(
        frames=16, size=64, batch=4, micro_batch=4, steps=2000, lr=2e-3, disc_lr=1e-3, muon_lr=0.02, schedule="cosine",
        align=["mid", "up0"], lpips_weight=0.0, distill_weight=0.02, normalize=True, data="synthetic", workers=1,
        eval_every=200, stage2="off", stage2_steps=600, stage2_lr=0.1, adversarial_weight=1.0, disc_width=32)}
WEIGHT_DECAY, MOMENTUM = 1e-4, 0.95         # the momentum is Muon's
CLIP, EMA = 1.0, 0.999                      # the largest gradient norm; the decay of the weights' average
LPIPS_FRAMES = 2                            # random frames of each clip that LPIPS sees: an unbiased estimate
CONVERGED = 5, 0.05                         # stage 1 ends when so many validations gained less than so many dB
MAX_DROP = 0.3                              # dB of PSNR that stage 2 may cost before its adversarial weight is halved
DISC_FLOOR = 1.0                            # the discriminator pauses while its hinge loss is below
BAD_STEPS, SAVE_MINUTES = 5, 10             # steps in a row, not finite, that end a run; minutes between checkpoints
POSTERIOR, FRAMES, DISCRIMINATOR = 4, 6, 7  # what a clip's random numbers are for; data.py has the others
STUDENTS = "student.safetensors", "best.safetensors", "best_stage1.safetensors"
PRESETS = json.loads((Path(__file__).parent / "assets" / "presets.json").read_text())


def student_change(text):
    """An argparse type: "kernel=7" or "separable=mid,up0" -> (field of TurboVAEDConfig, value)."""
    name, _, value = text.partition("=")
    fields = vars(CONFIGS["tiny"])
    if name not in fields:
        raise argparse.ArgumentTypeError(f"takes FIELD=VALUE, a field of model.TurboVAEDConfig, not {text!r}")
    several = isinstance(fields[name], tuple)
    try:
        return name, json.loads(f"[{value}]" if several else value)
    except ValueError:                                          # names
        return name, value.split(",") if several else value


def parse_args(argv=None):
    """{name: value} of what the command line and its preset give."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [--teacher NAME] [options]; --help explains each",
                                argument_default=argparse.SUPPRESS,
                                epilog="Defaults: the recipe at the top of train.py, or with --resume the run's own.")
    whole, positive, weight = number(), number(float, 1e-12), number(float, 0)
    either, flag = {"action": argparse.BooleanOptionalAction}, {"action": "store_true"}
    for name, takes, what in (
            ("teacher", {"choices": TEACHERS}, "whose decoder to distil (default: tiny)"),
            ("teacher-weights", str, 'a folder or file instead of the released weights, or "random"'),
            ("student", {"nargs": "+", "action": "extend", "type": student_change}, "FIELD=VALUE of the student"),
            ("preset", {"choices": [*PRESETS, "list"], "metavar": "NAME|list"}, "a row of the paper's tables"),
            ("data", str, 'a folder of videos, of any depth, or "synthetic" for made-up video'),
            ("samples", whole, "train on so many videos, or made-up clips, only"),
            ("val-data", str, "validate on this folder; else on held-out files of --data, or held-out made-up clips"),
            ("val-clips", whole, "clips to validate on, at most"),
            ("frames", whole, "frames of a clip"),
            ("size", whole, "height and width of a clip in pixels"),
            ("batch", whole, "effective batch: clips a step over all processes and accumulation"),
            ("micro-batch", whole, "clips a process takes at once"),
            ("steps", whole, "optimiser steps, both stages together, at most"),
            ("minutes", positive, "of training in all, if --steps take longer; a cosine then follows the clock"),
            ("stage2", lambda word: word if word in ("auto", "off") else number(int, 0)(word),
             "auto, off, or the step at which stage 2 begins; auto: when validations improve no longer"),
            ("stage2-steps", whole, "length of stage 2, with --stage2 auto; so early before --steps it begins anyway"),
            ("lr", positive, "AdamW's learning rate"),
            ("muon-lr", weight, "Muon's, for convolutions that mix channels; 0: AdamW for everything"),
            ("schedule", {"choices": ("constant", "cosine")}, "of the rates, in each stage after its warm-up"),
            ("warmup", number(int, 0), "steps of linear warm-up, of each stage"),
            ("align", {"nargs": "*", "choices": BLOCKS}, "blocks that Equation 4 aligns; or none"),
            ("head", {"choices": HEADS}, "projection heads, Table 7"),
            ("lpips-weight", weight, "α1 of Equation 5; 0 turns LPIPS off"),
            ("distill-weight", weight, "α2 of Equation 5; 0 turns the distillation loss off"),
            ("normalize", either, "divide the teacher's features by their deviation in Equation 4"),
            ("cache", str, "a folder for what the teacher makes of each clip, computed before the first step"),
            ("cache-crops", whole, "crops of each video in the cache; made-up video counts as 512 videos"),
            ("checkpointing", flag, "compute the student's blocks twice: less memory, more time"),
            ("seed", number(int, 0, 2 ** 32 - 2), "of weights, clips and samples"),
            ("workers", number(int, 0), "loader processes of each process (default: the machine's cores, shared)"),
            ("dtype", {"choices": ("auto", "float32", "bfloat16", "float16")}, "of autocast; auto: by the device"),
            ("device", str, "(default: cuda where there is a GPU)"),
            ("compile", either, "torch.compile the student and the teacher (default: on GPUs)"),
            ("eval-every", whole, "steps between validations, pictures and checkpoints"),
            ("log-every", whole, "steps between lines of log.jsonl"),
            ("out", str, "the run's folder (default: out/<teacher>)"),
            ("resume", flag, "go on from the folder's checkpoint.pt"),
            ("overwrite", flag, "start anew where the folder holds a run already")):
        p.add_argument(f"--{name}", help=what, **(takes if isinstance(takes, dict) else {"type": takes}))
    given = vars(p.parse_args(argv))
    preset = given.get("preset")
    if preset == "list":
        for name, row in PRESETS.items():
            print(f"{name:22} {row['flags']:68} {row['paper'] or '-'}")
        p.exit()
    if preset:
        given = vars(p.parse_args(argv, p.parse_args(PRESETS[preset]["flags"].split())))
        del given["preset"]
    if "student" in given:
        given["student"] = dict(given["student"])
    if given.get("dtype") == "auto":                            # or what the run has
        del given["dtype"]
    return given


def complete(given):
    """All settings of a new run: the recipe's, under those given."""
    teacher = given.get("teacher", "tiny")
    args = argparse.Namespace(**RECIPES[teacher] | {"teacher": teacher} | given)
    if not args.distill_weight:
        args.align = []
    return args


def student_config(args):
    own = CONFIGS[args.teacher]
    config = replace(own, **args.student)
    for fact in "latent_channels compression drop_first".split():
        if getattr(config, fact) != getattr(own, fact):
            raise ValueError(f"--student: {fact} would be {getattr(config, fact)}; {args.teacher}'s latents need "
                             f"{getattr(own, fact)}")
    return config


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))        # as torchrun starts it
say = tqdm.write if RANK == 0 else lambda line: None        # leaves a progress bar whole


def reduce(tensor, operation=dist.ReduceOp.SUM):
    """The sum (or `operation`) of a tensor over all processes, on each of them, in its place."""
    if WORLD > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def from_rank0(make):
    """What make() returns on the first process, on all of them; torchrun ends the others where it fails."""
    result = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result, 0)
    return result[0]


# ---------------------------------------------------------------------------------------------------------------------
# Clips.

def hold_out(clips, n):
    """{index: clip} of n of the files, spread evenly; the next file where one cannot be decoded."""
    taken, left = {}, list(range(len(clips)))
    for place in range(n):
        for i in sorted(left, key=lambda i: i < place * len(clips) // n):       # from this place on, then those before
            left.remove(i)
            try:
                taken[i] = clips[i]
                break
            except BadVideo as error:
                print(f"not validating on {error}", file=sys.stderr)
    if not taken:
        raise ValueError(f"no video in {clips.root} can be decoded to validate on")
    return taken


def find_data(args):
    """(training stream, held-out clips, what these are called, {what a resume must find unchanged})."""
    if args.batch % (args.micro_batch * WORLD):
        raise ValueError(f"--batch {args.batch} cannot be divided by --micro-batch {args.micro_batch} x {WORLD}")
    if isinstance(args.stage2, int) and args.stage2 >= args.steps:
        raise ValueError(f"--stage2 {args.stage2} lies behind the run's --steps {args.steps}")
    size, made_up = (args.frames, args.size), args.data == "synthetic"
    train = SyntheticClips(*size, args.seed + (args.seed >= HELD_OUT_SEED), length=2 ** 62, distinct=args.samples) \
        if made_up else VideoClips(args.data, *size, seed=args.seed)
    unchanged = {"videos": "made-up", "held-out videos": []}
    if args.val_data == "synthetic" or made_up and not args.val_data:
        scenes = SyntheticClips(*size, HELD_OUT_SEED)
        clips, name = [scenes[CLIPS_PER_SCENE * i] for i in range(args.val_clips)], "held-out made-up clips"
    else:
        others = VideoClips(args.val_data, *size) if args.val_data else copy.copy(train)
        others.train = False
        taken = hold_out(others, min(args.val_clips, len(others) if args.val_data else max(len(train) // 20, 1)))
        clips, name = list(taken.values()), args.val_data or f"{len(taken)} held-out videos"
        held_out = copy.copy(others).subset(list(taken))
        unchanged["held-out videos"] = [*held_out.files, held_out.fingerprint()]
        rest = train if made_up else copy.copy(train).without(others if args.val_data else held_out)
        if len(rest):
            train = rest
        elif args.val_data:
            raise ValueError(f"no video is left to train on: all of {args.data} is in --val-data {args.val_data}")
        else:
            name, unchanged["held-out videos"] = "the one video there is, trained on too", []
    if not made_up:
        if args.samples:
            train.subset(sorted(shuffled(len(train), 0, 7)[:args.samples].tolist()))
        unchanged["videos"] = train.fingerprint()
    return train, [clip[None] for clip in clips], name, unchanged


def slots(args, step):
    """Yields the numbers, step * batch + slot, of this process's clips, micro-batch by micro-batch, from a step on."""
    for n in count(step * args.batch + RANK * args.micro_batch, WORLD * args.micro_batch):
        yield list(range(n, n + args.micro_batch))


@contextmanager
def loader_errors():
    """Says an error of a loader process by the last line of its traceback."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error)
        if "killed by signal" in message or "exited unexpectedly" in message:
            raise MemoryError("out of memory: a loader process was killed") from None
        if "DataLoader worker" in message:
            raise ValueError(message.splitlines()[-1].partition(": ")[2]) from None
        raise


def end_workers():
    """Python ends its children by SIGTERM, which loader processes ignore, and would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)             # PyTorch's handler would call it a failure
    for child in multiprocessing.active_children():
        child.kill()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the momentum with all its singular values made about 1. So colour, a weak
    direction, is learned as fast as brightness. Unlike torch.optim.Muon it takes the weights of convolutions."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
                x = p.grad.lerp(average, MOMENTUM).flatten(1)           # Nesterov's look ahead
                rows, columns = x.shape
                x = x.T if rows > columns else x
                x = x / (x.norm() + 1e-12)
                for _ in range(5):                                       # Newton and Schulz's way to the polar factor
                    a = x @ x.T
                    x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
                x = x.T if rows > columns else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(module, lr, muon_lr, weight_decay=WEIGHT_DECAY):
    """AdamW with the paper's betas; with a muon_lr, Muon takes the weights that mix channels (not depthwise ones)."""
    mixing, rest = [], []
    for p in module.parameters():
        (mixing if muon_lr and p.ndim > 1 and p.shape[1] > 1 else rest).append(p)
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    return [adamw, Muon(mixing, dict(lr=muon_lr, weight_decay=weight_decay))] if mixing else [adamw]


def clip_noise(seed, purpose, numbers, like):
    """Unit normal noise of the shape of `like`, whose first dimension are the clips `numbers`."""
    seeds = [int(np.random.default_rng((seed, purpose, n)).integers(2 ** 62)) for n in numbers]
    return torch.stack([torch.randn(like.shape[1:], generator=torch.Generator(like.device).manual_seed(s),
                                    device=like.device) for s in seeds]).to(like.dtype)


def lpips_frames(args, numbers):
    """(B, LPIPS_FRAMES): which frames of the clips `numbers` LPIPS sees."""
    orders = [np.random.default_rng((args.seed, FRAMES, n)).permutation(args.frames) for n in numbers]
    return torch.from_numpy(np.stack(orders)[:, :LPIPS_FRAMES])


@torch.no_grad()
def run_teacher(teacher, batch, numbers, blocks, seed):
    """(latents, {block: features}, KL divergence of each clip) of a batch; the cache's where there is no teacher."""
    if teacher is None:
        return batch["latents"].float(), {name: batch[f"features.{name}"] for name in blocks}, batch["kl"].float()
    mean, logvar = teacher.posterior(batch["video"])
    latents = mean if logvar is None else mean + (0.5 * logvar).exp() * clip_noise(seed, POSTERIOR, numbers, mean)
    return latents, teacher.features(latents, blocks), kl_loss(mean, logvar)


@torch.no_grad()
def fill_cache(args, teacher, clips, unchanged, device, autocast):
    """A CachedClips of --cache-crops crops of each clip, of which this process makes its share of what is missing."""
    settings = {"weights": unchanged["teacher's weights"], "files": unchanged["videos"], "precision": args.dtype} \
        | {key: getattr(args, key) for key in "teacher frames size cache_crops seed".split()}
    made_up = args.data == "synthetic"
    entries = min((512 if made_up else len(clips)) * args.cache_crops, made_up and args.samples or 2 ** 62)
    cache = from_rank0(lambda: CachedClips(args.cache, entries, settings, blocks=args.align, seed=args.seed))

    def make(numbers, video):
        with autocast():
            latents, features, kl = run_teacher(teacher, {"video": video.to(device)}, numbers,
                                                cache.made["blocks"], args.seed)
        return [{"latents": latents[i], "kl": kl[i], **{f"features.{name}": f[i] for name, f in features.items()}}
                for i in range(len(video))]
    try:
        with loader_errors():
            cache.fill(clips, make, args.micro_batch, RANK, WORLD, lambda: from_rank0(dict), args.workers, say)
    except KeyboardInterrupt:
        sys.exit(f"stopped while the cache {args.cache} was filled: the same command goes on with it")
    return cache


def prepare(module, device, compiles):
    """Lays a network's convolutions out as is fast on GPUs, and compiles it, or what is used of a teacher."""
    if device.type == "cuda":
        channels_last(module)
    if compiles and hasattr(module, "vae"):
        module.vae.encoder.compile(dynamic=False)
        for block in module.vae.decoder.children():           # one by one: features need the first of them only
            for part in block if isinstance(block, torch.nn.ModuleList) else [block]:
                part.compile(dynamic=False)
    elif compiles:
        module.compile()


# ---------------------------------------------------------------------------------------------------------------------
# Rules that go by the validations: lines of the log with a PSNR.

def converged(validations):
    """Whether the last validations brought too little over the best before them."""
    n, gain = CONVERGED
    psnrs = [line["psnr"] for line in validations]
    return len(psnrs) > n and max(psnrs[-n:]) < max(psnrs[:-n]) + gain


def guard(validations):
    """The adversarial weight's factor. A validation of stage 2 halves it where the PSNR lies more than MAX_DROP below
    stage 1's last, else multiplies it by 1.25, up to 1."""
    factor = 1.0
    for line in validations:
        if line["stage"] == 1:
            floor = line["psnr"] - MAX_DROP
        else:
            factor = factor / 2 if line["psnr"] < floor else min(1.0, factor * 1.25)
    return factor


def best_line(validations):
    """The best student's validation: in stage 1 that of highest PSNR. In stage 2 it competes with those whose PSNR is
    within MAX_DROP of stage 1's last, by LPIPS or, without it, by whose sharpness is nearest to the input's."""
    stage1 = [line for line in validations if line["stage"] == 1]
    floor = stage1[-1]["psnr"] - MAX_DROP
    rivals = [line for line in validations if line["stage"] == 2 and line["psnr"] >= floor]
    distance = lambda line: line.get("val_lpips", abs(math.log(max(line["sharpness"], 1e-6))))
    return min([max(stage1, key=lambda line: line["psnr"]), *rivals], key=distance)


def stage_bounds(args, run):
    """(first step, the step that ends it) of the stage that a run is in."""
    auto = args.stage2 == "auto"
    if run.stage == 2:
        return run.stage2_start, min(args.steps, run.stage2_start + args.stage2_steps) if auto else args.steps
    if auto and args.steps > args.stage2_steps:                 # a shorter run: only if it converges
        return 0, args.steps - args.stage2_steps
    return 0, args.stage2 if isinstance(args.stage2, int) else args.steps


def set_rates(optimizers, args, run, minutes):
    """Sets the learning rates, the discriminator's last; returns the warm-up's factor and AdamW's rate. The cosine of a
    stage ends with its steps or with --minutes, of which `minutes` are over, whichever come first."""
    start, end = stage_bounds(args, run)
    warmup = min((run.step - start + 1) / max(args.warmup, 1), 1)
    progress = max((run.step - start) / max(end - start, 1), minutes / (args.minutes or math.inf))
    decay = 0.5 * (1 + math.cos(math.pi * min(progress, 1))) if args.schedule == "cosine" else 1
    for optimizer in optimizers:
        factor = args.stage2_lr if run.stage == 2 and optimizer is not optimizers[-1] else 1
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * decay * warmup * factor
    return warmup, optimizers[0].param_groups[0]["lr"]


@dataclass
class Run:
    """How far a run has come: what a checkpoint holds besides settings, weights and optimisers."""
    step: int = 0                               # steps so far, those passed over too
    stage2_start: int | None = None             # the step at which stage 2 began
    seconds: float = 0.0                        # of training
    adaptive_weight: float = 0.0                # VQGAN's, measured every tenth step of stage 2
    sums: Counter = field(default_factory=Counter)      # of each term over the steps since the last line of the log
    lines: list = field(default_factory=list)   # of log.jsonl: means of the terms ...
    validations: list = field(default_factory=list)                     # ... and what was measured
    students: dict = field(default_factory=dict)                        # {file: (its metadata, weights)}

    @property
    def stage(self):
        return 1 if self.stage2_start is None else 2


# What --resume may change. Videos, weights and a cache are compared by what they hold.
MAY_CHANGE = ("data val_data teacher_weights cache steps minutes stage2 stage2_steps micro_batch checkpointing workers "
              "device compile eval_every log_every").split()


def open_run(given, out):
    """(settings, checkpoint or None) of a run that begins, or goes on, in the folder `out`."""
    settings = {name: value for name, value in given.items() if name not in ("resume", "overwrite", "out")}
    if "resume" not in given:
        if any((out / name).exists() for name in ("checkpoint.pt", *STUDENTS)) and "overwrite" not in given:
            raise ValueError(f"{out} holds a run already: --resume goes on, --overwrite starts anew, or another --out")
        check_writable(out)
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
        say(f"given: {', '.join(flags) or 'nothing'}; the rest is the recipe's")
        return complete(settings), None
    try:
        saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        before, run = saved["args"], Run(**saved["run"])
    except FileNotFoundError:
        raise ValueError(f"nothing to resume: no file {out}/checkpoint.pt; --out names the run's folder") from None
    except Exception as error:
        raise ValueError(f"nothing to resume: {out}/checkpoint.pt is damaged or of another version of train.py "
                         f"({type(error).__name__})") from None
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value == before[name]:
            continue
        if name not in MAY_CHANGE or name == "cache" and not before["cache"]:
            raise ValueError(f"{out} was run with {flag} {before[name]}, not {value}")
        if name == "stage2" and run.stage == 2 or name == "steps" and value < run.step:
            raise ValueError(f"{out} is at step {run.step}, in stage {run.stage}: {flag} {value} comes too late")
        say(f"{flag} {value} from here on, {before[name]} before")
    return argparse.Namespace(**before | settings), saved


@torch.no_grad()
def measure(decode, latents, clips, who, lpips=None):
    """(decoded videos, {"psnr": in dB, "sharpness": over the clips' own, "val_lpips": a distance}), means over clips.
    RuntimeError where a PSNR is not finite: an infinite value becomes NaN, since clamped it would pass for white."""
    videos = [decode(z).float() for z in latents]
    videos = [video.where(video.isfinite(), math.nan).clamp(-1, 1).cpu() for video in videos]
    mean, pairs = lambda values: round(float(np.mean(list(values))), 4), list(zip(videos, clips))
    # A black frame may come out exactly: its infinite PSNR, or a ratio of zeros, would drown the others.
    values = {"psnr": mean(psnr(a, b, most=100).item() for a, b in pairs),
              "sharpness": mean(((sharpness(a) + 1e-12) / (sharpness(b) + 1e-12)).item() for a, b in pairs)}
    if not math.isfinite(values["psnr"]):
        raise RuntimeError(f"the {who}'s PSNR is {values['psnr']}: its weights are not fit for use, nothing was saved")
    if lpips:
        values["val_lpips"] = mean(lpips(*(x.to(latents[0].device) for x in pair)).item() for pair in pairs)
    return videos, values


def draw(out, run, columns):
    """samples.png: a clip a row, its middle frame in each of the columns of clips. curves.png: what the log has."""
    from matplotlib.figure import Figure
    from torchvision.utils import save_image
    frames = [video[0, :, video.shape[2] // 2] for row in zip(*columns) for video in row]
    with atomically(out / "samples.png") as file:
        save_image(frames, file, nrow=len(columns), normalize=True, value_range=(-1, 1))
    titles = {"l1": "L1", "lpips": "LPIPS", "distill": "distillation", "discriminator": "discriminator",
              "psnr": "PSNR in dB (dashed: teacher)", "sharpness": "sharpness (input: 1)"}
    lines = run.lines + run.validations
    shown = [name for name in titles if any(name in line for line in lines)]
    figure = Figure((3.5 * len(shown), 3), layout="constrained")
    for i, name in enumerate(shown, 1):
        axis = figure.add_subplot(1, len(shown), i)
        axis.plot(*zip(*[(line["step"], line[name]) for line in lines if name in line]), ".-")
        axis.set(title=titles[name], xlabel="step")
        if name == "psnr":
            axis.axhline(run.validations[-1]["teacher_psnr"], linestyle="--")
    with atomically(out / "curves.png") as file:
        figure.savefig(file)


# ---------------------------------------------------------------------------------------------------------------------
# A run.

def set_precision(args, device):
    """(autocast, autocast for what float16 is too small for, whether networks are compiled); settles args.dtype."""
    gpu = device.type == "cuda"
    if args.dtype == "auto":
        fast = torch.cuda.get_device_capability(device)[0] >= 8 if gpu else torch.cpu._is_avx512_bf16_supported()
        args.dtype = "bfloat16" if fast else "float16" if gpu else "float32"
    autocast = lambda: torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    compiles = gpu if args.compile is None else args.compile
    torch.backends.cudnn.benchmark = True                     # sizes do not change
    if compiles:
        torch._dynamo.config.suppress_errors = True           # what cannot be compiled here runs eager, with a warning
        torch._dynamo.config.optimize_ddp = not args.checkpointing      # it cannot split a graph of checkpointed blocks
    return autocast, nullcontext if args.dtype == "float16" else autocast, compiles


def make_student(args, teacher, latents):
    """A student with the heads that lead to the teacher's features of these latents."""
    torch.manual_seed(args.seed)
    student = TurboVAED(student_config(args)).to(latents.device)
    student.checkpointing = args.checkpointing
    shapes = {name: f.shape for name, f in teacher.features(latents, args.align).items()}
    heads = make_heads({name: student.config.feature_shape(name, latents.shape) for name in shapes}, shapes, args.head)
    return StudentWithHeads(student, heads, args.normalize).to(latents.device)


def pass_over(run, values, micros, describe, bad_steps):
    """Names the value that is not finite, and this process's clips with it. RuntimeError after BAD_STEPS in a row."""
    name = next(name for name, value in values.items() if not math.isfinite(value))
    clips = [describe(n) for numbers, terms in micros if not math.isfinite(terms.get(name, math.nan)) for n in numbers]
    bad = f"step {run.step}: {name} is {values[name]}, clips {', '.join(dict.fromkeys(clips)) or 'of another process'}"
    print(f"passed over {bad}", file=sys.stderr)
    if bad_steps == BAD_STEPS:
        raise RuntimeError(f"{bad}; so were the {BAD_STEPS - 1} steps before")


def log_line(args, run):
    """A line of the log: means of the terms over the steps since the line before."""
    before, sums, run.sums = run.lines[-1], run.sums, Counter()
    seconds, steps = run.seconds - 60 * before["minutes"], sums.pop("steps", 0)
    line = {"step": run.step, "stage": run.stage, "minutes": run.seconds / 60, "skipped": sums.pop("skipped", 0),
            "samples_per_s": args.batch * (run.step - before["step"]) / seconds,
            "waiting": sums.pop("waiting", 0) / seconds}
    return line | {name: round(total / steps, 7) for name, total in sums.items()}


def price(args, run, line):
    """What a run takes, by a line of its log."""
    seconds = min((args.steps - run.step) * args.batch / line["samples_per_s"], 60 * (args.minutes or math.inf))
    return (f"at {line['samples_per_s']:.3g} samples a second, as measured over the first steps, this run takes "
            f"{timedelta(seconds=round(seconds))} (h:mm:ss) on {WORLD} x {args.device}; it waits for clips "
            f"{line['waiting']:.0%} of the time" + ": more --workers or --cache help" * (line["waiting"] > 0.2))


def main(given):
    """A whole run with these settings (see `parse_args`). ValueError, OSError or RuntimeError where it cannot go on."""
    atexit.register(end_workers)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(days=7))                  # a validation or a cache may take long
    out = Path(given.get("out") or f"out/{given.get('teacher', 'tiny')}")
    args, saved = from_rank0(lambda: open_run(given, out))
    device = find_device(args.device)
    accumulate = args.batch // args.micro_batch // WORLD
    autocast, safe_autocast, compiles = set_precision(args, device)
    clips, held_out, val_name, unchanged = from_rank0(lambda: find_data(args))          # before weights are fetched
    teacher = load_teacher(args.teacher, args.teacher_weights, device)
    teacher.check_clip(args.frames, args.size, args.size)
    unchanged["teacher's weights"] = weights_hash(teacher.vae)
    for what, value in unchanged.items():
        if saved and saved["unchanged"][what] != value:
            raise ValueError(f"{out} had other {what}: bring them back, or start anew with --overwrite")
    prepare(teacher, device, compiles)
    val_latents = [teacher.encode(clip.to(device), sample=False) for clip in held_out]
    with safe_autocast():
        teacher_videos, ceiling = measure(teacher.decode, val_latents, held_out, f"{args.teacher} teacher")
    model = make_student(args, teacher, val_latents[0])
    student = model.student
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    torch.manual_seed(args.seed + 1)
    discriminator = PatchDiscriminator(args.disc_width).to(device)      # the same on all processes, by the seed
    lpips = LPIPS().to(device) if args.lpips_weight else None
    prepare(ema, device, False)
    for module in filter(None, (student, discriminator, lpips)):
        prepare(module, device, compiles)
    objective = Objective(lpips, args.lpips_weight, args.distill_weight)
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    optimizers.append(torch.optim.AdamW(discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9),
                                        weight_decay=WEIGHT_DECAY, fused=True))
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    run, earlier = Run(lines=[{"step": 0, "minutes": 0.0, "held_out": unchanged["held-out videos"][:-1]}]), args
    parts = model, ema, discriminator, *optimizers, scaler
    if saved:
        run, earlier = Run(**saved["run"]), argparse.Namespace(**saved["args"])
        for part, state in zip(parts, saved["parts"]):
            part.load_state_dict(state)

    def average(**about):
        """(metadata, weights) of the moving average as it is now."""
        metadata = {"teacher": args.teacher, "step": str(run.step), **about}
        return metadata, {name: tensor.cpu().clone() for name, tensor in ema.state_dict().items()}

    def save():
        """Writes the checkpoint, then what follows from it: students and log."""
        if run.step and not run.validations:                  # before the first validation there is a student, too
            run.students["student.safetensors"] = average()
        buffer = io.BytesIO()
        torch.save({"args": vars(args), "unchanged": unchanged, "run": vars(run),
                    "parts": [part.state_dict() for part in parts]}, buffer)
        with atomically(out / "checkpoint.pt") as file:
            file.write_bytes(buffer.getbuffer())
        shadow = copy.deepcopy(ema)
        for name, (metadata, weights) in run.students.items():
            shadow.load_state_dict(weights)
            shadow.save_pretrained(out / name, metadata=metadata)
        log_file.truncate(0)
        for line in sorted(run.lines + run.validations, key=lambda line: line["step"]):
            print(json.dumps(line), file=log_file, flush=True)

    def validate():
        """Measures the average on the held-out clips, unless that is done, and saves. Returns all measurements."""
        if any(line["step"] == run.step for line in run.validations):
            return run.validations
        with safe_autocast():
            videos, values = measure(ema, val_latents, held_out, f"student at step {run.step}", lpips)
        run.validations.append({"step": run.step, "stage": run.stage, "teacher_psnr": ceiling["psnr"],
                                "minutes": run.seconds / 60, **values})
        run.students["student.safetensors"] = new = average(psnr=f"{values['psnr']:.2f}")
        if best_line(run.validations) is run.validations[-1]:
            run.students["best.safetensors"] = new
        save()
        draw(out, run, (held_out, teacher_videos, videos))
        say(f"step {run.step}: PSNR {values['psnr']:.2f} dB ({values['psnr'] / ceiling['psnr']:.1%} of the teacher's), "
            f"sharpness {values['sharpness']:.0%} of the input's, {run.seconds / 60:.1f} min")
        return run.validations
    if args.cache:
        clips = fill_cache(args, teacher, clips, unchanged, device, safe_autocast)
        teacher = None                                        # its memory is the student's now
    if RANK == 0:
        for path in (*map(out.joinpath, {*STUDENTS} - {*run.students}), *out.glob(".[abcs]*.[0-9]*.*")):    # half files
            path.unlink(missing_ok=True)
        others = sorted({path.name for path in out.glob("[!.]*")}       # the students are gone
                        .difference("checkpoint.pt log.jsonl args.json curves.png samples.png".split()))
        if others and "overwrite" in given:
            say(f"{out} still has what was made of the run before: {', '.join(others)}")
        with atomically(out / "args.json") as file:
            file.write_text(json.dumps(vars(args) | {"held_out": run.lines[0]["held_out"]}, indent=1))
        log_file = open(out / "log.jsonl", "a")         # "a": after a truncation it writes at the new end
        save()
        say(f"teacher {args.teacher}: {ceiling['psnr']:.2f} dB on {val_name}; student: "
            f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters; {args.steps} steps of "
            f"{args.batch} = {args.micro_batch}x{WORLD}x{accumulate} clips of {args.frames}x{args.size}x{args.size}; "
            f"{args.data}; {device.type}, {args.dtype}")
    saved = None                                              # its memory is the run's now
    batches = zip(slots(args, run.step), DataLoader(
        clips, batch_sampler=slots(args, run.step), num_workers=args.workers, pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker))
    parallel = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        if len(signals) == 2 and WORLD == 1:                  # a second Ctrl-C; torchrun sends its own
            raise KeyboardInterrupt                           # a third one must not disturb what cleans up
        with suppress(OSError):                               # where a pipe's reader is gone, too; once, on rank 0
            os.write(2, b"\nfinishing the step, to save; a second signal stops now\n" * (len(signals) + RANK == 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bar = tqdm(total=args.steps, initial=run.step, unit="step", disable=RANK > 0 or None)
    first_step, bad_steps = run.step, 0
    saved_at = told_at = time.time()
    while True:             # all processes agree on what is next; a signal may reach any of them
        stopped, minutes = reduce(torch.tensor([sum(signals[:1]), run.seconds / 60], dtype=torch.float64),
                                  dist.ReduceOp.MAX).tolist()
        if stopped or minutes >= (args.minutes or math.inf) or run.step >= args.steps:
            break
        if run.stage == 1 and (run.step >= stage_bounds(args, run)[1]
                               or args.stage2 == "auto" and converged(run.validations)):
            run.validations = from_rank0(validate)            # stage 2 is measured by what stage 1 ended with
            run.students["best_stage1.safetensors"] = run.students.get("best.safetensors")
            run.sums, run.stage2_start = Counter(), run.step
            say(f"step {run.step}: stage 2 begins")
        (start, end), stage2 = stage_bounds(args, run), run.stage == 2
        if run.step >= end:
            break
        if RANK == 0 and time.time() - saved_at > 60 * SAVE_MINUTES:
            save()
            saved_at = time.time()
        _, before = set_rates(optimizers, earlier, run, minutes)
        warmup, rate = set_rates(optimizers, args, run, minutes)
        if rate != before:
            say(f"step {run.step}: the learning rate is {rate:.3g}, by the settings before {before:.3g}")
            earlier = args
        weight = args.adversarial_weight * guard(run.validations) * warmup * run.adaptive_weight
        objective.adversarial_weight, objective.discriminator = weight, discriminator if stage2 else None
        # The gradient of L = L_1 + α1 L_lpips + α2 L_distill + α3 L_kl + α4 L_adv, in micro-batches.
        began, micros, at_last_layer = time.perf_counter(), [], []
        for i in range(accumulate):
            asked = time.perf_counter()
            with loader_errors():
                numbers, batch = next(batches)
            run.sums["waiting"] += time.perf_counter() - asked
            batch = batch if args.cache else {"video": batch}
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with safe_autocast():
                latents, features, kl = run_teacher(teacher, batch, numbers, args.align, args.seed)
            noise = clip_noise(args.seed, DISCRIMINATOR, numbers, batch["video"]) if stage2 else None
            with parallel.no_sync() if WORLD > 1 and i + 1 < accumulate else nullcontext():
                terms, on_video = objective.backward(
                    parallel, latents, features, batch["video"], kl.mean(), lpips_frames(args, numbers).to(device),
                    noise, scale=lambda loss: scaler.scale(loss / accumulate), autocast=autocast)
            micros.append((numbers, terms))
            if stage2 and (run.step - start) % 10 == 0:
                at_last_layer.append(torch.stack(last_layer_gradients(student, latents, *on_video, autocast=autocast)))
        # The step, if loss and gradients are finite on all processes. Reading them costs milliseconds.
        for p in discriminator.parameters() if stage2 else ():
            reduce(p.grad).div_(WORLD)                        # DDP does it for the student's
        scale = scaler.get_scale()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP) for net in (model, discriminator)[:run.stage]]
        means = torch.stack([torch.stack(list(terms.values())).float() for _, terms in micros]).mean(0)
        values = reduce(torch.cat([means, torch.stack(norms)])).div(WORLD).tolist()
        values = dict(zip([*terms, "grad_norm", "disc_grad_norm"], values))    # zip stops where there is no second norm
        finite, pauses = all(map(math.isfinite, values.values())), values.get("discriminator", DISC_FLOOR) < DISC_FLOOR
        for optimizer in optimizers:
            if finite and not (pauses and optimizer is optimizers[-1]):         # in stage 1 the last has no gradients
                optimizer.step()
            optimizer.zero_grad()
        scaler.update()
        run.step += 1
        with torch.no_grad():                                 # early on it forgets sooner, or it would keep the start
            keep = min(EMA, (1 + run.step) / (10 + run.step))
            torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - keep)
        if at_last_layer:
            ratio = adaptive_weight(*reduce(sum(at_last_layer)) / (scale * WORLD)).item()
            if math.isfinite(ratio):
                run.adaptive_weight = ratio
        if finite:
            run.sums.update(values | {"steps": 1, "disc_trained": stage2 and not pauses})
            bad_steps = 0
        else:
            run.sums["skipped"] += 1
            if scale <= 1 or not math.isfinite(values["loss"]):         # else a smaller scale mends it
                bad_steps += 1
                pass_over(run, values, micros, clips.describe, bad_steps)
        run.seconds += time.perf_counter() - began
        bar.update()
        validates = run.step % args.eval_every == 0 or run.step == end
        if validates or run.step % args.log_every == 0:
            line = log_line(args, run) | {"lr": rate, "weight": weight}     # means, and this step's rate and weight
            if run.lines[-1]["step"] < first_step + 20 <= run.step:
                say(price(args, run, line))
            run.lines.append(line)
            if RANK == 0:
                print(json.dumps(line), file=log_file, flush=True)
            if bar.disable and time.time() - told_at > 20:
                told_at = time.time()
                say(f"step {run.step} of {end}: loss {line.get('loss')}, {run.seconds / 60:.1f} minutes")
        if validates:
            run.validations, saved_at = from_rank0(validate), time.time()
    bar.close()
    if stopped:
        signals += [0]                                        # a second Ctrl-C does not end this
        from_rank0(save)
        say(f"stopped by {signal.Signals(int(stopped)).name} at step {run.step}; --resume goes on from there, in {out}")
        sys.exit(128 + int(stopped))
    from_rank0(validate)
    last, best = run.validations[-1], best_line(run.validations)
    better = (f"; better is that of step {best['step']}: PSNR {best['psnr']:.2f} instead of {last['psnr']:.2f} dB, "
              f"sharpness {best['sharpness']:.0%} instead of {last['sharpness']:.0%}, to be had by "
              f"evaluate.py --student {out}/best.safetensors") * (best is not last)
    say(f"{run.step - first_step} steps, to step {run.step}; the student is in {out}/student.safetensors{better}; "
        f"--resume goes on, with more --steps, --stage2-steps or --minutes")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()), "a smaller --micro-batch, --size or --workers, --checkpointing, --cache")
