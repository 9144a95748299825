"""Distils a frozen video VAE's decoder into a Turbo-VAED student (Sections 3.4 and 4.2).

    python train.py                                          # the embedded default: teacher tiny, made-up video, CPU
    python train.py --data FOLDER --steps 200                # the same on real video
    python train.py --teacher ltx --data data/vidgen         # LTX-VAE on one GPU
    torchrun --nproc_per_node=8 train.py --teacher ltx       # on eight; the effective batch stays the same
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --teacher ltx
                                                             # on two nodes: the same line on both, HOST is one of them
    python train.py --teacher ltx --cache data/cache         # what the teacher makes of each clip, computed once
    python train.py --teacher ltx --resume                   # go on after a stop, as if it had not stopped
    python train.py --preset table6-up0-up1                  # one row of the paper's tables; --preset list prints all
    python train.py --teacher ltx --profile 20               # where a step's time goes, and what the recipe would cost

Stage 1 is Equation 5 without its adversarial term; stage 2 adds it when stage 1 has nearly converged (--stage2).

A run leaves in out/<teacher>/ (or --out): student.safetensors (EMA weights), best.safetensors, checkpoint.pt,
log.jsonl, curves.png, samples.png (input, teacher, student) and args.json. In stage 1 the best student is the one of
highest PSNR. In stage 2 it is chosen among those whose PSNR is within --max-drop of stage 1's last: the one of lowest
LPIPS or, without LPIPS, the one whose sharpness is nearest to the input's.

Which clips, crops and samples stand at step s, slot k depends on the seed, s and k only, so neither a resume nor the
number of processes changes what is trained on. Ctrl-C and SIGTERM save a checkpoint first. A step whose loss or
gradient is not finite is passed over, and its clips are named.
"""
import argparse
import atexit
import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque, namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CLIPS_PER_SCENE, HELD_OUT_SEED, BadVideo, CachedClips, SyntheticClips, VideoClips, begin_worker,
                  psnr, shuffled, write_file)
from losses import (HEADS, LPIPS, Objective, PatchDiscriminator, StudentWithHeads, adaptive_weight, kl_loss,
                    last_layer_gradients, make_heads, sharpness)
from model import (BLOCKS, CONFIGS, Block, ChannelRMSNorm, TurboVAED, channels_last, check_fit, check_writable,
                   find_device, number, out_of_memory)
from teachers import TEACHERS, load_teacher

# Section 4.2: AdamW, learning rate 2e-4, betas 0.9 and 0.95, effective batch 32, 17 (dc: 16) frames at 256x256.
# Weight decay and EMA as in the published code; 70,000 and 40,000 steps as a user's reproduction of ltx reports.
PAPER = dict(frames=17, size=256, batch=32, micro_batch=2, steps=110_000, lr=2e-4, muon_lr=0.0, schedule="constant",
             align=["mid", "up0", "up1"], lpips_weight=1.0, distill_weight=1.0, normalize=False, data="data/vidgen",
             eval_every=1000, workers=4, stage2="auto", stage2_steps=40_000, stage2_lr=1.0, adversarial_weight=0.05,
             disc_lr=2e-4, disc_width=64)
RECIPES = {
    "ltx": PAPER,
    "dc": PAPER | dict(frames=16),
    "hunyuan": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "cog": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    # ours: the paper has no student for these teachers
    "wan21": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "wan22": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "ltx2": PAPER | dict(micro_batch=1),
    "ltx23": PAPER | dict(micro_batch=1),
    "hunyuan15": PAPER | dict(micro_batch=1, align=["mid", "up0"]),
    "qwen": PAPER | dict(frames=1, micro_batch=4, align=["mid", "up0"]),
    # Made-up video and no LPIPS, since the embedded recipe must need no download. Muon, since AdamW alone learns
    # brightness first and leaves the student grey for hundreds of steps.
    "tiny": dict(frames=16, size=64, batch=4, micro_batch=4, steps=2000, lr=2e-3, muon_lr=0.02, schedule="cosine",
                 align=["mid", "up0"], lpips_weight=0.0, distill_weight=0.02, normalize=True, data="synthetic",
                 eval_every=200, workers=1, stage2="off", stage2_steps=600, stage2_lr=0.1, adversarial_weight=1.0,
                 disc_lr=1e-3, disc_width=32),
}


# One change of the recipe for each row of the paper's ablations (Turbo-VAED-LTX; Figure 5 and Table 2 at VidGen's full
# length, the others shorter): {name: (what it sets, the paper's (PSNR in dB, LPIPS, SSIM), None where it prints none)}.
# `student` changes the student's configuration. The full row of a table is the recipe itself.
LOW_TO_HIGH = {"none": (), "mid": BLOCKS[:1], "mid-up0": BLOCKS[:2], "mid-up1": BLOCKS[:3], "mid-up2": BLOCKS[:4],
               "all": BLOCKS}
FIGURE2_PSNR = {"none": (28.07, None, None), "mid-up0": (28.05, None, None)}
PRESETS = {
    **{f"figure2-{name}": (dict(student=dict(separable=blocks, upsampling="pixel_shuffle_3d")), FIGURE2_PSNR.get(name))
       for name, blocks in LOW_TO_HIGH.items()},
    "table1-pixel-shuffle": (dict(student=dict(upsampling="pixel_shuffle_3d")), (28.05, 0.1293, 0.8431)),
    "table1-interpolate": (dict(student=dict(upsampling="interpolate")), (27.40, 0.1392, 0.8272)),
    "table1-decoupled": (dict(student=dict(upsampling="decoupled")), (27.86, 0.1312, 0.8396)),
    "table2-10k": (dict(samples=10_000), (29.21, 0.0943, 0.8709)),
    "table2-full": (dict(), (29.23, 0.0950, 0.8711)),
    "table5-k3": (dict(student=dict(kernel=3)), (27.99, 0.1310, 0.8425)),
    "table5-k5": (dict(student=dict(kernel=5)), (28.09, 0.1285, 0.8430)),
    "table5-k7": (dict(student=dict(kernel=7)), (28.07, 0.1307, 0.8438)),
    "table6-mid": (dict(align=["mid"]), (26.30, 0.1563, 0.7972)),
    "table6-up0": (dict(align=["up0"]), (26.46, 0.1514, 0.8032)),
    "table6-up1": (dict(align=["up1"]), (26.42, 0.1512, 0.7992)),
    "table6-up2": (dict(align=["up2"]), (24.82, 0.1837, 0.7455)),
    "table6-up0-up1": (dict(align=["up0", "up1"]), (26.83, 0.1441, 0.8124)),
    "table6-mid-up0-up1": (dict(align=["mid", "up0", "up1"]), (26.91, 0.1391, 0.8155)),
    "table7-linear": (dict(head="linear"), (26.88, 0.1470, 0.8148)),
    "table7-mlp1": (dict(head="mlp1"), (26.81, 0.1424, 0.8119)),
    "table7-mlp2": (dict(head="mlp2"), (26.80, 0.1445, 0.8120)),
    "table7-pointwise": (dict(head="pointwise"), (26.91, 0.1391, 0.8155)),
    "figure5-without": (dict(distill_weight=0.0), (28.77, None, None)),
    "figure5-with": (dict(), (30.39, None, None)),
}


class ListPresets(argparse.Action):
    """--preset list prints them and ends; any other name is kept."""

    def __call__(self, parser, namespace, value, option=None):
        if value == "list":
            print(f"{'preset':22} {'sets':58} the paper's PSNR (dB), LPIPS, SSIM")
            for name, (changes, paper) in PRESETS.items():
                flat = {k: v for k, v in changes.items() if k != "student"} | changes.get("student", {})
                sets = ", ".join(f"{k} {v if isinstance(v, (str, int, float)) else ' '.join(v) or 'none'}"
                                 for k, v in flat.items()) or "nothing: the recipe"
                print(f"{name:22} {sets:58} {', '.join(str(v) for v in paper or () if v is not None) or '-'}")
            parser.exit()
        if value not in PRESETS:
            parser.error(f"there is no preset {value}: --preset list prints those there are")
        namespace.preset = value


def student_config(args):
    """The student's configuration, with what a preset changes."""
    return replace(CONFIGS[args.config], **args.student)


def stage2_argument(value):
    if value in ("auto", "off"):
        return value
    if not value.isdecimal():
        raise argparse.ArgumentTypeError("takes auto, off or the number of a step")
    return int(value)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [--teacher NAME] [options]; --help explains each",
                                epilog="Defaults marked * are the teacher's recipe, at the top of train.py.")
    add = p.add_argument
    add("--teacher", choices=TEACHERS, default="tiny", help="whose decoder to distil (default: tiny)")
    add("--teacher-weights", help='a folder or file instead of the released weights, or "random"')
    add("--config", choices=CONFIGS, help="the student's configuration (default: the one named as the teacher)")
    add("--preset", action=ListPresets, metavar="NAME|list",
        help="one row of the paper's tables and figures, for any teacher; list: print them with the paper's numbers. "
             "Flags given beside it win")
    add("--samples", type=number(int, 1), help="train on so many videos, or made-up clips, only (default: all)")
    add("--init", choices=("random", "teacher"), default="random",
        help="teacher: the student's layers that have a counterpart in the teacher's decoder begin with its most "
             "important channels (default: random)")
    add("--data", help='a folder of videos, of any depth, or "synthetic" for made-up video *')
    add("--val-data", help="validate on this folder (default: held-out files of --data, or held-out made-up clips)")
    add("--val-clips", type=number(int, 1), default=8, help="clips to validate on, at most (default: 8)")
    add("--frames", type=number(int, 1), help="frames of a clip *")
    add("--size", type=number(int, 1), help="height and width of a clip in pixels *")
    add("--stride", type=number(int, 1), default=1, help="keep every so many frames of a video (default: 1)")
    add("--steps", type=number(int, 1), help="optimiser steps, both stages together, at most *")
    add("--stage2", type=stage2_argument, metavar="auto|STEP|off",
        help="when stage 2, with the adversarial term, begins. auto: when the last --stage2-evaluations validations "
             "brought less than --stage2-gain, at the latest --stage2-steps before the end. A number: at that step *")
    add("--stage2-steps", type=number(int, 1), help="length of stage 2, with --stage2 auto *")
    add("--stage2-lr", type=number(float, 0), help="factor on the student's learning rates in stage 2 *")
    add("--stage2-gain", type=number(float, 0), default=0.05, help="of PSNR in dB, see --stage2 (default: 0.05)")
    add("--stage2-evaluations", type=number(int, 1), default=5, help="see --stage2 (default: 5)")
    add("--minutes", type=number(float, above=0),
        help="end after so many minutes of training, if --steps take longer; a cosine then follows the clock, through "
             "both stages, and reaches 0")
    add("--batch", type=number(int, 1), help="effective batch: clips a step over all processes and accumulation *")
    add("--micro-batch", type=number(int, 1), help="clips a process takes at once *")
    add("--lr", type=number(float, above=0), help="AdamW's learning rate *")
    add("--muon-lr", type=number(float, 0),
        help="Muon's learning rate, for convolutions that mix channels; 0: AdamW for everything *")
    add("--schedule", choices=("constant", "cosine"), help="of the learning rates, in each stage after its warm-up *")
    add("--warmup", type=number(int, 0), default=100, help="steps of linear warm-up, of each stage (default: 100)")
    add("--weight-decay", type=number(float, 0), default=1e-4, help="(default: 1e-4)")
    add("--clip", type=number(float, above=0), default=1.0, help="largest gradient norm (default: 1)")
    add("--ema", type=number(float, 0, below=1), default=0.999,
        help="decay of the weights' moving average (default: 0.999)")
    add("--align", nargs="*", metavar="BLOCK", help="blocks that Equation 4 aligns; --align alone turns it off *")
    add("--head", choices=HEADS, default="pointwise", help="projection heads, Table 7 (default: pointwise)")
    add("--lpips-weight", type=number(float, 0), help="α1 of Equation 5; 0 turns LPIPS off *")
    add("--lpips-frames", type=number(int, 0), default=2,
        help="random frames of each clip that LPIPS sees, an unbiased estimate; 0: all (default: 2)")
    add("--distill-weight", type=number(float, 0), help="α2 of Equation 5; 0 turns the distillation loss off *")
    add("--equation4", action="store_true",
        help="the distillation loss as the paper has it: weight 1, features as they are")
    add("--kl-weight", type=number(float, 0), default=1e-7, help="α3 of Equation 5 (default: 1e-7)")
    add("--adversarial-weight", type=number(float, 0), help="α4 of Equation 5; the adaptive weight multiplies it *")
    add("--max-drop", type=number(float, 0), default=0.3,
        help="dB of validation PSNR that stage 2 may cost: where it costs more, the adversarial weight is halved at "
             "each validation until it does not, and then raised again (default: 0.3)")
    add("--disc-lr", type=number(float, above=0), help="the discriminator's learning rate *")
    add("--disc-width", type=number(int, 4), help="channels of the discriminator's first layer *")
    add("--disc-floor", type=number(float, 0), default=1.0,
        help="train the discriminator only in steps where its hinge loss is at least this, so that the student can "
             "keep up; 0: in all (default: 1)")
    add("--smoothness", type=number(float, 0), default=10.0,
        help="weight of the discriminator's approximate R1 penalty (default: 10)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="divide the teacher's features by their standard deviation in Equation 4 *")
    add("--cache", metavar="DIR",
        help="keep the teacher's latents and features of --cache-crops crops of each clip there, computed before the "
             "first step, and run no teacher in training")
    add("--cache-crops", type=number(int, 1), default=4,
        help="crops of each video; made-up video counts as 512 videos (default: 4)")
    add("--cache-dtype", choices=("float16", "bfloat16"), default="float16",
        help="of latents and features (default: float16)")
    add("--checkpointing", action="store_true",
        help="recompute the student's blocks in the backward pass: less memory, more time")
    add("--profile", type=number(int, 1), metavar="N",
        help="time N steps of each stage, say what takes how long and what the recipe would cost without its "
             "validations, draw it in profile.png, and stop; one step in ten of stage 2 is longer: a multiple of ten "
             "is fair")
    add("--price", type=number(float, 0), default=2.0, help="dollars per GPU and hour, for --profile (default: 2)")
    add("--seed", type=number(int, 0, 2 ** 32 - 2), default=0, help="of weights, clips and samples (default: 0)")
    add("--workers", type=number(int, 0), help="loader processes for each training process *")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="autocast type (default: bfloat16 where the hardware has units for it, else float16 on GPUs, float32 on "
             "CPUs)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is a GPU)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile the student (default: on GPUs)")
    add("--save-minutes", type=number(float, above=0), default=10.0,
        help="minutes between checkpoints, at most (default: 10)")
    add("--eval-every", type=number(int, 1), help="steps between validations, pictures and checkpoints *")
    add("--log-every", type=number(int, 1), default=10, help="steps between lines of log.jsonl (default: 10)")
    add("--out", help="the run's folder (default: out/<teacher>)")
    add("--resume", action="store_true", help="go on from the folder's checkpoint.pt")
    add("--overwrite", action="store_true", help="start anew where the folder holds a run already")
    p.set_defaults(student={})
    preset = p.parse_args(argv).preset
    p.set_defaults(**(PRESETS[preset][0] if preset else {}))        # what is given beside a preset wins
    args = p.parse_args(argv)
    if args.equation4:
        if (args.distill_weight, args.normalize) != (None, None):
            p.error("--equation4 sets --distill-weight and --normalize: give it or them")
        args.distill_weight, args.normalize = 1.0, False
    for name, value in RECIPES[args.teacher].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.config = args.config or args.teacher
    args.out = args.out or f"out/{args.teacher}"
    if not args.distill_weight:
        args.align = []
    if isinstance(args.stage2, int) and args.stage2 >= args.steps:
        p.error(f"--stage2 {args.stage2} lies behind the run's --steps {args.steps}")
    args.align = [] if args.align == ["none"] else args.align
    for name in ("data", "val_data", "cache"):
        if getattr(args, name) == "":
            p.error(f"--{name.replace('_', '-')} is empty")
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


# ---------------------------------------------------------------------------------------------------------------------
# Clips.

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


def some_of(clips, n):
    """So many of the videos, always the same ones; all for None."""
    if not n or n >= len(clips):
        return clips
    return copy.copy(clips).subset(sorted(shuffled(len(clips), 0, 7)[:n].tolist()))


def datasets(args):
    """(training stream, validation clips, what the latter are, what a resume must find unchanged)."""
    made_up = args.data == "synthetic"
    if made_up:
        train = SyntheticClips(args.frames, args.size, args.seed + (args.seed >= HELD_OUT_SEED), length=2 ** 62,
                               distinct=args.samples)
    else:
        train = VideoClips(args.data, args.frames, args.size, args.stride, train=True, seed=args.seed)
    if args.val_data == "synthetic" or made_up and not args.val_data:
        held_out = SyntheticClips(args.frames, args.size, HELD_OUT_SEED)
        clips = [held_out[CLIPS_PER_SCENE * i] for i in range(args.val_clips)]
        train = train if made_up else some_of(train, args.samples)
        return train, clips, "held-out made-up clips", {"files": "made-up" if made_up else train.fingerprint(),
                                                        "held_out": []}
    if args.val_data:
        held_out = VideoClips(args.val_data, args.frames, args.size, args.stride, train=False)
        clips, name = hold_out(held_out, min(args.val_clips, len(held_out))), args.val_data
        train = train if made_up else train.without(held_out)
        held_out.subset(list(clips))
        if not len(train):
            raise ValueError(f"no video is left to train on: all of {args.data} is in --val-data {args.val_data}")
    else:
        held_out, rest = copy.copy(train), copy.copy(train)
        held_out.train = False
        clips = hold_out(held_out, min(args.val_clips, max(len(train) // 20, 1)))
        held_out.subset(list(clips))
        rest.without(held_out)
        train, name = ((rest, f"{len(clips)} held-out videos") if len(rest)
                       else (train, "the one video there is, trained on too"))
    train = train if made_up else some_of(train, args.samples)
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
    """Clips with their numbers, which seed the posterior's samples, and with the frames that LPIPS sees."""

    def __init__(self, clips, seed, frames, lpips_frames):
        self.clips, self.seed, self.frames, self.lpips_frames = clips, seed, frames, lpips_frames

    def __getitem__(self, n):
        clip = self.clips[n]
        item = {"n": n} | (clip if isinstance(clip, dict) else {"video": clip})
        if self.lpips_frames:
            order = clip_rng(self.seed, LPIPS_FRAMES, n).permutation(self.frames)
            item["frames"] = torch.from_numpy(order[:self.lpips_frames])
        return item


def end_workers():
    """Python ends its children by SIGTERM, which loader processes ignore, and would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)             # PyTorch's handler would call it a failure
    for child in multiprocessing.active_children():
        child.kill()


# ---------------------------------------------------------------------------------------------------------------------
# A start from the teacher (--init teacher). A student is a narrower decoder of the teacher's kind: a way in, resnets,
# an upsampler, resnets, an upsampler ... Its channels are some of the teacher's, its weights those between them.
# Weights here are (C, r_t, r_s, r_s, C_in, k_t, k_h, k_w) and biases (C, r_t, r_s, r_s), with factors of 1 where
# nothing is upsampled.

@torch.no_grad()
def init_from_teacher(student, layers):
    """Fills those of the student's layers that have a counterpart among a teacher's `layers`, and returns their names.

    Each stream of channels, a resnet's inner one too, keeps the teacher's most important: by the norm of what writes a
    channel, from channels that are kept, times the norm of what reads it.
    """
    pairs, reads, writers = list(counterparts(student, layers)), {}, {}
    for name, weight, _, source, target in pairs:
        if weight.ndim > 1:
            reads[source] = reads.get(source, 0) + weight.square().sum((0, 1, 2, 3, 5, 6, 7))
            layer = student.get_submodule(name)
            width = len(list(layer.parameters())[-1]) // getattr(layer, "pixels", 1)
            writers.setdefault(target, []).append((weight, source, width))
    kept = {"latents": torch.arange(student.config.latent_channels)}
    for stream, its in writers.items():         # a resnet's inside comes after what it writes: there all channels count
        importance = reads.get(stream, 1) * sum(
            weight[:, :, :, :, kept.get(source, slice(None))].flatten(1).square().sum(1) for weight, source, _ in its)
        kept[stream] = importance.topk(min(len(importance), its[0][2])).indices.sort().values
    for name, weight, bias, source, target in pairs:
        layer = student.get_submodule(name)
        if weight.ndim == 1:                                    # a norm's
            layer.weight[:len(kept[source])], layer.bias[:len(kept[source])] = weight[kept[source]], bias[kept[source]]
            continue
        weight, bias = weight[kept[target]][:, :, :, :, kept[source]], bias[kept[target]]
        if hasattr(layer, "factors"):
            for axis, r in enumerate((layer.factors[0], layer.factors[1], layer.factors[1]), start=1):
                if weight.shape[axis] != r:                     # another number of pixels: all are their mean
                    weight, bias = (x.mean(axis, keepdim=True).repeat_interleave(r, axis) for x in (weight, bias))
            if layer.upsampling == "decoupled":                 # channels in order (C, r_s, r_s, r_t)
                weight, bias = weight.movedim(1, 3), bias.movedim(1, 3)
            layer = layer.conv
        copy_weight(layer, weight.flatten(0, 3), bias.flatten())
    return [name for name, *_ in pairs]


def counterparts(student, layers):
    """Yields (name of the student's layer, the teacher's weight, bias, stream that it reads, that it writes); a norm's
    are (C,). The student's stretch between its upsamplers k and k + 1 goes after the teacher's, resnet after resnet."""
    ours = [("", "conv_in", [])]                                # a resnet to another width, way in, resnets
    for path, block in student.named_modules():
        if isinstance(block, Block):
            narrow = f"{path}.conv_in" if hasattr(block.conv_in, "conv1") else ""
            if len(block.upsamplers):
                ours.append((narrow, f"{path}.upsamplers.0", []))
            elif narrow:
                break                                           # no teacher does that
            ours[-1][2].extend(f"{path}.resnets.{i}" for i in range(len(block.resnets)))

    def resnet(name, parts, source, target):
        streams = {"conv1": (source, name), "conv2": (name, target),
                   "conv_shortcut": (source, target), "norm3": (source, "")}
        for part, weights in parts.items():
            ours = getattr(student.get_submodule(name), part, None)
            if ours is not None and not isinstance(ours, ChannelRMSNorm):       # in which nothing is learned
                yield f"{name}.{part}", *weights, *streams[part]

    stream = "latents"
    for (our_narrow, way_in, our_resnets), (narrow, (weight, bias), resnets) in zip(ours, stretches(layers)):
        source = stream
        if our_narrow:
            eye = torch.eye(weight.shape[4])                    # the choice of channels alone, if the teacher has none
            choice = {"conv_shortcut": (eye.view(-1, 1, 1, 1, len(eye), 1, 1, 1), torch.zeros(len(eye), 1, 1, 1))}
            source = f"{our_narrow} out"
            yield from resnet(our_narrow, narrow or choice, stream, source)
        shuffles = way_in == "conv_in" or student.config.upsampling in ("decoupled", "pixel_shuffle_3d")
        if shuffles and (our_narrow or not narrow):
            yield way_in, weight, bias, source, way_in
        few = min(len(our_resnets), len(resnets))
        for i in range(few):
            yield from resnet(our_resnets[i], resnets[i * len(resnets) // few], way_in, way_in)
        stream = way_in


def stretches(layers):
    """A teacher's `layers` between its upsamplers: [(resnet to another width or None, way in, resnets)]."""
    found, narrow = [], None
    for kind, parts in layers:
        parts = {name: (weight[:, None, None, None], bias[:, None, None, None]) if weight.ndim == 5 else (weight, bias)
                 for name, (weight, bias) in parts.items()}
        if kind != "resnet":
            found.append((narrow, parts["conv"], []))
            narrow = None
        elif "conv_shortcut" not in parts:
            found[-1][2].append(parts)
        elif "norm3" in parts:                                  # ltx's, before an upsampler as the student's
            narrow = parts
        else:                                                   # after one: its shortcut is made part of that
            (matrix, offset), (before, way_in, resnets) = parts["conv_shortcut"], found[-1]
            weight, bias = (torch.einsum("nc,c...->n...", matrix.flatten(1), x) for x in way_in)
            found[-1] = before, (weight, bias + offset), resnets
    return found


def copy_weight(layer, weight, bias):
    """Puts (n_out, n_in, k_t, k_h, k_w) into the first channels of a layer, in the middle of its kernel; of a depthwise
    separable one as the nearest for each input channel: one kernel, times a number for each output channel."""
    if hasattr(layer, "depthwise_conv"):
        taps = weight.flatten(2).transpose(0, 1).double()                       # (n_in, n_out, taps)
        kernel = torch.linalg.eigh(taps.mT @ taps).eigenvectors[:, :, -1:]      # the first right singular vectors
        kernel = kernel * kernel.sum(1, keepdim=True).sign()
        conv = layer.depthwise_conv
        conv.weight[:len(kernel)] = fit_kernel(kernel.view(-1, 1, *weight.shape[2:]), conv)
        weight = (taps @ kernel).transpose(0, 1)[..., None, None]
    conv = layer.pointwise_conv if hasattr(layer, "depthwise_conv") else layer.conv
    conv.weight[:weight.shape[0], :weight.shape[1]] = fit_kernel(weight, conv)
    conv.bias[:len(bias)] = bias


def fit_kernel(weight, conv):
    """A kernel in the middle of a larger one, or with its outer taps added to the outermost of a smaller one."""
    for axis, size in zip((2, 3, 4), conv.kernel_size):
        middle, n = weight.shape[axis] // 2, size // 2
        places = (torch.arange(weight.shape[axis]) - middle).clamp(-n, n) + n
        shape = list(weight.shape)
        shape[axis] = size
        weight = weight.new_zeros(shape).index_add(axis, places, weight)
    return weight


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers.

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
                for _ in range(5):                                       # Newton and Schulz's way to the polar factor
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


def take_step(optimizers, scaler, skip, skip_discriminator=None):
    """One step of each optimiser, or of none where `skip` is 1, or of all but the last one, the discriminator's, where
    `skip_discriminator` is 1. Both are tensors that stay on the device, as torch.optim's fused optimisers and Muon read
    them."""
    for optimizer in optimizers:
        last = skip_discriminator is not None and optimizer is optimizers[-1]
        optimizer.found_inf = torch.maximum(skip, skip_discriminator) if last else skip
        optimizer.step()
    scaler.update()


# ---------------------------------------------------------------------------------------------------------------------
# Randomness, and what the teacher makes of clips.

POSTERIOR, LPIPS_FRAMES, DISCRIMINATOR = 4, 6, 7          # what a clip's random numbers are for; data.py has the others


def clip_rng(seed, purpose, n):
    """A generator for each clip, so that its random numbers do not depend on which others share its batch."""
    return np.random.default_rng((seed, purpose, n))


def clip_noise(seed, purpose, numbers, like):
    """Unit normal noise of the shape of `like`, whose first dimension are the clips `numbers`."""
    seeds = [int(clip_rng(seed, purpose, n).integers(2 ** 62)) for n in numbers]
    generators = [torch.Generator(like.device).manual_seed(s) for s in seeds]
    noise = [torch.randn(like.shape[1:], generator=g, device=like.device) for g in generators]
    return torch.stack(noise).to(like.dtype)


def run_teacher(teacher, video, numbers, blocks, seed):
    """(latents, {block: features}, KL divergence of each clip) of the clips with these numbers."""
    mean, logvar = teacher.posterior(video)
    latents = mean if logvar is None else mean + (0.5 * logvar).exp() * clip_noise(seed, POSTERIOR, numbers, mean)
    kl = torch.stack([kl_loss(mean[i:i + 1], None if logvar is None else logvar[i:i + 1]) for i in range(len(mean))])
    return latents, teacher.features(latents, blocks), kl


@torch.no_grad()
def fill_cache(args, teacher, clips, fingerprints, device, autocast, processes, say):
    """A CachedClips of --cache-crops crops of each clip, of which this process makes its share of what is missing."""
    videos = 512 if args.data == "synthetic" else len(clips)
    settings = {"weights": fingerprints["teacher_weights"], "files": fingerprints["files"], "precision": args.dtype} \
        | {key: getattr(args, key) for key in ("teacher", "frames", "size", "stride", "cache_crops", "seed")}
    dtype = getattr(torch, args.cache_dtype)
    entries = videos * args.cache_crops
    if args.data == "synthetic" and args.samples:
        entries = min(entries, args.samples)
    cache = processes.from_rank0(lambda: CachedClips(args.cache, entries, settings, dtype, args.align, args.seed))

    def make(numbers, video):
        with autocast():
            latents, features, kl = run_teacher(teacher, video.to(device), numbers, cache.made["blocks"], args.seed)
        tensors = {"latents": latents, "kl": kl} | {f"features.{name}": f for name, f in features.items()}
        return [{name: t[i] for name, t in tensors.items()} for i in range(len(video))]

    cache.fill(clips, make, args.micro_batch, processes.rank, processes.world, processes.wait, args.workers, say)
    return cache


@torch.no_grad()
def teacher_targets(batch, numbers, teacher, args, autocast):
    """(latents, {block: features}, KL divergence of each clip) of a batch; the cache's where there is no teacher."""
    if teacher is None:
        return batch["latents"].float(), {name: batch[f"features.{name}"] for name in args.align}, batch["kl"].float()
    with autocast():
        return run_teacher(teacher, batch["video"], numbers, args.align, args.seed)


@torch.no_grad()
def finite_in_autocast(teacher, clip, blocks, autocast):
    """Whether all that training asks of the teacher is finite in half precision, whose largest number is 65,504."""
    with autocast():
        mean, logvar = teacher.posterior(clip)
        tensors = [mean, logvar, teacher.decode(mean), *teacher.features(mean, blocks).values()]
    return all(tensor.isfinite().all().item() for tensor in tensors if tensor is not None)


def prepare(module, device, compiles):
    """Lays a network's convolutions out as is fast on GPUs, and compiles it, or what is used of a teacher."""
    if module is None:
        return
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
# Processes and signals.

class Processes:
    """The processes of a run, in one place. They wait for each other over gloo on the CPU, with no limit to speak of:
    NCCL's watchdog ends a process that waits for ten minutes, be it for a validation or a cache."""

    def __init__(self, device):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.rank0 = self.rank == 0
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

    def total(self, values, largest=False):
        """The sum, or the largest, of each of a list of floats over all processes."""
        if self.world == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self.group)
        return values.tolist()

    def from_rank0(self, make):
        """What make() returns on the first process, on all of them; its error ends them all, and is said once."""
        if self.world == 1:
            return make()
        held, error = [None, None], None
        if self.rank0:
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
    """SIGINT (Ctrl-C) and SIGTERM: while `holding`, they are kept in `received` until the step is done. Else they end
    the process at once."""

    def __init__(self):
        self.received, self.holding = 0, False
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.handle)

    def handle(self, which, frame):
        self.received = self.received or which
        if not self.holding:
            sys.exit(128 + which)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, and the rules that go by it.

@torch.no_grad()
def decode_all(decode, latents):
    """Videos in [-1, 1], with NaN where a value is infinite: clamped, it would pass for white or black."""
    videos = [decode(z).float() for z in latents]
    return [video.where(video.isfinite(), math.nan).clamp(-1, 1).cpu() for video in videos]


def capped_psnr(a, b):
    """PSNR with at most 100 dB a frame: a black one may come out exactly, and its infinity would drown the others."""
    return psnr(a, b, most=100)


def sharpness_ratio(a, b):
    """Of what b's sharpness is; 1 where b has none."""
    ours, theirs = sharpness(a).item(), sharpness(b).item()
    return ours / theirs if theirs else 1.0


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
    """What the adversarial weight is multiplied by: halved at each validation of stage 2 whose PSNR lies more than
    max_drop below stage 1's last, multiplied by 1.25, up to 1, at each of the others."""
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
    floor = stage1[-1]["psnr"] - max_drop if stage1 else -math.inf
    stage2 = [line for line in lines if line not in stage1 and line["psnr"] >= floor]
    distance = lambda line: line.get("val_lpips", abs(math.log(max(line["sharpness"], 1e-6))))
    return min(stage2, key=distance)["step"] if stage2 else max(stage1 or lines, key=lambda line: line["psnr"])["step"]


class Tally:
    """The steps' values between two lines of the log, and which steps were skipped because something was not finite.

    `add` leaves them on the device, `settle` reads all in one go, since reading waits for the device."""
    IN_A_ROW, OF_100 = 5, 20                        # so many steps that are not finite end a run

    def __init__(self, processes):
        self.rank0, self.alone = processes.rank0, processes.world == 1
        self.describe, self.pending, self.failure = str, [], None
        self.in_a_row, self.recent, self.told = 0, deque(maxlen=100), 0
        self.reset()

    def reset(self, names=()):
        self.state = {"steps": 0, "clipped": 0, "skipped": 0, "sums": dict.fromkeys(names, 0.0)}

    def restore(self, state):
        """Gives the first process the totals; the others begin again at zero, so that no sum counts them twice."""
        self.reset(state["sums"])
        if self.rank0:
            self.state = state

    def gather(self, processes):
        """The state summed over all processes; the first keeps it, the others begin again at zero."""
        counts, names = ("steps", "clipped", "skipped"), list(self.state["sums"])
        values = processes.total([self.state[name] for name in counts] + list(self.state["sums"].values()))
        state = dict(zip(counts, values)) | {"sums": dict(zip(names, values[len(counts):]))}
        self.restore(state)
        return state

    def add(self, step, micros, norms, skip, scale):
        """micros: (clips' numbers, {term: value}) of each micro-batch; norms: {name: a gradient's norm}; skip: whether
        the step is skipped; scale: float16's loss scale, else 1."""
        for name in micros[0][1]:
            self.state["sums"].setdefault(name, 0.0)
        values = [value for _, terms in micros for value in terms.values()] + [*norms.values(), skip, scale]
        numbers, values = [numbers for numbers, _ in micros], torch.stack([value.float() for value in values])
        self.pending.append((step, numbers, list(micros[0][1]), list(norms), values))

    def settle(self, clip):
        """Reads the pending steps' values from the device. clip: the largest norm that is not clipped."""
        flat = torch.cat([p[-1] for p in self.pending]).tolist() if self.pending else []
        for step, numbers, names, norms, values in self.pending:
            values, flat = flat[:len(values)], flat[len(values):]
            rows = [values[i * len(names):][:len(names)] for i in range(len(numbers))]
            norms, (skip, scale) = dict(zip(norms, values[len(names) * len(rows):])), values[-2:]
            wrong = [(name, value, n) for row, n in zip(rows, numbers) for name, value in zip(names, row)
                     if not math.isfinite(value)]
            if skip and not wrong and scale <= 1:   # above 1 a smaller loss scale will mend it
                where = "" if self.alone else " of this process or another"
                wrong = [(name + where, value, sum(numbers, [])) for name, value in norms.items()
                         if not math.isfinite(value)][:1] or [("a term of another process", math.nan, [])]
            self.state["skipped"] += int(skip) * self.rank0             # it is the same step on all processes
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
        self.last = f"{wrong[0][0]} is {wrong[0][1]} at step {step}" + f", clips {', '.join(clips)}" * bool(clips)
        self.told += 1
        if self.told <= 10:
            print(f"passed over: {self.last}" + "; more of these are not told" * (self.told == 10), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Time and pictures.

class Timer:
    """Seconds by part of the step, waiting for the device at each part's ends: `with timer("student"): ...`, and of
    whole steps: `with timer.step(): ...`. One that is not `on` does nothing."""

    def __init__(self, device, on=True):
        self.device, self.on, self.parts, self.total, self.steps = device, on, {}, 0.0, 0

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, part):
        start = self.on and self.now()
        yield
        if self.on:
            self.parts[part] = self.parts.get(part, 0.0) + self.now() - start

    @contextmanager
    def step(self):
        start = self.on and self.now()
        yield
        if self.on:
            self.total, self.steps = self.total + self.now() - start, self.steps + 1


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
        parts = timer.parts | {"the rest": timer.total - sum(timer.parts.values())}
        print(f"stage {stage}, {timer.steps} steps")
        for part, seconds in parts.items():
            print(f"  {part:16} {1000 * seconds / timer.steps:9.1f} ms a step  {100 * seconds / timer.total:5.1f} %")
        print(f"  {args.batch * timer.steps / timer.total:.3g} samples/s on {world} x {device.type}")
        hours += recipe[stage] * timer.total / timer.steps / 3600
        bars = axis.barh(list(parts), [1000 * seconds / timer.steps for seconds in parts.values()])
        axis.bar_label(bars, [f"{100 * seconds / timer.total:.0f} %" for seconds in parts.values()], padding=3)
        axis.set(title=f"stage {stage}", xlabel="milliseconds a step", xmargin=0.1)
        axis.invert_yaxis()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" \
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1e9:.2f} GB in a process")
    steps = " and ".join(f"{recipe[stage]} steps of stage {stage}" for stage in timers)
    price = f", {hours * world * args.price:.0f} dollars at {args.price:g} each" if device.type == "cuda" else ""
    print(f"the whole recipe, {steps}, {args.batch} samples each, at this speed: {hours:.3g} hours, "
          f"{hours * world:.3g} {device.type} hours{price}")
    save_as(path, figure.savefig, dpi=150, format="png")
    print(path)


def plot_samples(path, columns):
    """A row a clip, its middle frame in each of {title: [clips]}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = min(len(next(iter(columns.values()))), 6)
    size = (2.2 * len(columns), 2.2 * rows)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False, layout="constrained")
    target = next(iter(columns.values()))
    for j, (title, clips) in enumerate(columns.items()):
        for i in range(rows):
            frame = clips[i][:, clips[i].shape[1] // 2]
            axes[i, j].imshow((frame + 1).div(2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[i, j].set_axis_off()
            quality = psnr(clips[i][None], target[i][None]).item()
            axes[i, j].set_title(title if j == 0 else f"{title}, {quality:.1f} dB", fontsize=8)
    save_as(path, figure.savefig, dpi=150, format="png")
    plt.close(figure)


def plot_curves(path, log, teacher_psnr, start2):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")

    def curve(axis, key, **style):
        axis.plot(*zip(*[(line["step"], line[key]) for line in log if key in line]), **style)

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


# ---------------------------------------------------------------------------------------------------------------------
# A run.

@dataclass
class Run:
    """All that training changes, and how far it has come; `state` is what a checkpoint holds of it."""
    args: argparse.Namespace
    device: torch.device
    compiles: bool
    student_and_heads: StudentWithHeads                      # the student and its projection heads
    ema: TurboVAED                              # the student's moving average, which is what is validated and kept
    objective: Objective
    optimizers: list                            # AdamW, Muon where it is used, and in stage 2 the discriminator's
    rates: list                                 # their learning rates at full height
    scaler: torch.amp.GradScaler
    tally: Tally
    step: int = 0                               # steps so far, those passed over too
    stage2_start: int | None = None             # the step at which stage 2 began
    seconds: float = 0.0                        # of training
    log: list = field(default_factory=list)     # the lines of log.jsonl
    damping: float = 1.0                        # what the adversarial weight is multiplied by

    @property
    def stage(self):
        return 1 if self.stage2_start is None else 2

    def validated(self):
        """Whether the log has a validation of this step."""
        return any(line["step"] == self.step and "psnr" in line for line in self.log)

    def begin_stage2(self):
        args = self.args
        torch.manual_seed(args.seed + 1)
        discriminator = PatchDiscriminator(args.disc_width).to(self.device)
        prepare(discriminator, self.device, self.compiles)
        self.objective.discriminator = discriminator
        self.objective.adaptive_weight = torch.zeros((), device=self.device)
        self.optimizers.append(torch.optim.AdamW(discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9),
                                                 weight_decay=args.weight_decay, fused=True))
        self.rates = [args.stage2_lr * rate for rate in self.rates] + [args.disc_lr]

    def state(self):
        state = {"model": self.student_and_heads.state_dict(), "ema": self.ema.state_dict(),
                 "scaler": self.scaler.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "tally": self.tally.state,
                 "validations": [line for line in self.log if "psnr" in line],
                 "step": self.step, "stage2_start": self.stage2_start, "seconds": self.seconds, "args": vars(self.args)}
        if self.stage == 2:
            state |= {"discriminator": self.objective.discriminator.state_dict(),
                      "adaptive_weight": self.objective.adaptive_weight.item()}
        return state

    def load(self, state, log_file):
        self.step, self.seconds = state["step"], state["seconds"]
        self.student_and_heads.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        if state["stage2_start"] is not None:
            self.begin_stage2()
            self.stage2_start = state["stage2_start"]
            self.objective.discriminator.load_state_dict(state["discriminator"])
            self.objective.adaptive_weight.fill_(state["adaptive_weight"])
        for optimizer, held in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(held)
        self.scaler.load_state_dict(state["scaler"])
        self.tally.restore(state["tally"])
        means = [line for line in read_log(log_file) if line["step"] <= self.step and "psnr" not in line]
        self.log = sorted(means + state["validations"], key=lambda line: (line["step"], "psnr" in line))
        self.damping = damping(self.log, self.stage2_start, self.args.max_drop)

    def write_line(self, line):
        self.log.append(line)
        with open(Path(self.args.out) / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path):
    """The whole lines of a log.jsonl: a kill may have cut the last one short."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return lines


def make_run(args, device, compiles, teacher, processes, resumes):
    """A Run before its first step."""
    torch.manual_seed(args.seed)
    student = TurboVAED(student_config(args))
    if args.init == "teacher" and not resumes:
        begun = init_from_teacher(student, teacher.layers())
        if processes.rank0:
            tqdm.write(f"{len(begun)} of the student's layers begin as the {args.teacher} teacher's: "
                       + ", ".join(begun))
    student = student.to(device)
    student.checkpointing = args.checkpointing
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    with torch.no_grad():
        latents = teacher.encode(torch.zeros(1, 3, args.frames, args.size, args.size, device=device), sample=False)
        shapes = {name: f.shape for name, f in teacher.features(latents, args.align).items()}
    heads = make_heads({name: student.config.feature_shape(name, latents.shape) for name in shapes}, shapes, args.head)
    student_and_heads = StudentWithHeads(student, heads, args.normalize).to(device)
    lpips = LPIPS().to(device) if args.lpips_weight else None
    prepare(ema, device, False)
    prepare(student, device, compiles)
    prepare(lpips, device, compiles)
    objective = Objective(lpips, args.lpips_weight, args.distill_weight, args.kl_weight, smoothness=args.smoothness)
    optimizers = make_optimizers(student_and_heads, args.lr, args.muon_lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    rates = [args.lr, args.muon_lr][:len(optimizers)]
    return Run(args, device, compiles, student_and_heads, ema, objective, optimizers, rates, scaler, Tally(processes))


RUN_FILES = ("checkpoint.pt", "student.safetensors", "best.safetensors", "curves.png", "samples.png")


def open_folder(out, args):
    """Whether the run in the folder `out` goes on. Raises where it holds or lacks a run that it should not."""
    there = [(out / name).exists() for name in RUN_FILES[:2]]
    if any(there) and not (args.resume or args.overwrite or args.profile):
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite starts anew, "
                         f"--out names another folder")
    if args.resume and not (out / "args.json").exists():
        raise FileNotFoundError(f"nothing to resume: no run in {out}")
    if args.resume and there[1] and not there[0] and sum("psnr" in line for line in read_log(out / "log.jsonl")) != 1:
        # With one validation it was killed before its first checkpoint, and nothing is lost.
        raise ValueError(f"{out} has a student but no checkpoint.pt to go on from: --overwrite starts anew")
    return args.resume and there[0]


# What --resume may change. Videos and weights are compared by what they hold.
MAY_CHANGE = {"data", "val_data", "teacher_weights", "steps", "minutes", "stage2", "stage2_steps", "stage2_gain",
              "stage2_evaluations", "micro_batch", "equation4", "checkpointing", "profile", "price", "workers",
              "device", "compile", "save_minutes", "eval_every", "log_every", "out", "resume", "overwrite", "preset"}

# and these before stage 2 has begun
MAY_CHANGE_BEFORE_STAGE_2 = {"stage2_lr", "adversarial_weight", "max_drop", "disc_lr", "disc_width", "disc_floor",
                             "smoothness"}


def check_resume(saved, args, fingerprints):
    """Raises ValueError where a run would not go on as what it began as."""
    then, out = saved["args"], args.out
    may_change = MAY_CHANGE | (MAY_CHANGE_BEFORE_STAGE_2 if saved["stage2_start"] is None else set())
    for name, value in vars(args).items():
        if name not in may_change and then.get(name, value) != value:
            raise ValueError(f"{out} was run with --{name.replace('_', '-')} {then.get(name)}, not {value}")
    held_out = ", ".join(saved["fingerprints"]["held_out"][:-1]) or "made-up clips"
    for key, what in (("held_out", f"validated on {held_out}, and now these files"),
                      ("files", f"trained on files of {then['data']} that"),
                      ("teacher_weights", "taught by weights that")):
        if saved["fingerprints"][key] != fingerprints[key]:
            raise ValueError(f"{out} was {what} are others: bring back what was there, or start anew with --overwrite")
    if saved["stage2_start"] is not None and args.stage2 != then["stage2"]:
        raise ValueError(f"stage 2 of {out} began at step {saved['stage2_start']}: "
                         f"--stage2 {args.stage2} comes too late")


def read_checkpoint(path):
    """What Run.state() was. Raises ValueError where the file is damaged or of something else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["args"], saved["fingerprints"], saved["validations"]
        return saved
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be resumed from: it is damaged, or not a checkpoint of this version "
                         f"({type(error).__name__}); --overwrite starts anew") from None


@contextmanager
def alone_in(out):
    """Makes the folder `out` and holds it for this process. Raises ValueError while another one does, OSError where it
    cannot be written to."""
    import fcntl
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {out}: --out names another folder") from None
        yield
    finally:
        os.close(folder)


def last_checkpoint(out):
    return f"; the last good checkpoint is {out}/checkpoint.pt" if (Path(out) / "checkpoint.pt").exists() else ""


# ---------------------------------------------------------------------------------------------------------------------
# The schedule: stages and learning rates.

class Schedule:
    """Where the stages and the run end. Stage 1 ends at step `stage2_at` at the latest, the run at step `last`."""
    WARM = 3                                    # steps that --profile does not time

    def __init__(self, args):
        self.stage2_at = args.steps             # the run's end: never
        if isinstance(args.stage2, int):
            self.stage2_at = args.stage2
        elif args.stage2 == "auto" and args.steps > args.stage2_steps:      # a shorter run: only if it converges
            self.stage2_at = args.steps - args.stage2_steps
        self.last, self.stage2_steps = args.steps, args.stage2_steps if args.stage2 == "auto" else args.steps
        self.recipe = {1: self.stage2_at, 2: self.last - self.stage2_at}
        self.converges = args.stage2 == "auto" and not args.profile
        if args.profile:
            self.stage2_at = self.stage2_steps = args.profile + self.WARM
            self.last = self.stage2_at * (2 if self.recipe[2] else 1)

    def bounds(self, stage2_start):
        """The first step of the stage that a run is in, and the step that ends it."""
        return (0, self.stage2_at) if stage2_start is None else (stage2_start, self.end(stage2_start))

    def end(self, stage2_start):
        """The step at which the run ends."""
        return self.last if stage2_start is None else min(self.last, stage2_start + self.stage2_steps)

    def check_left(self, run, saved):
        """Whether there are steps left to resume for. Raises ValueError where a run is asked for more and has none."""
        args, end = run.args, self.end(run.stage2_start)
        if run.step < end:
            return True
        if all(saved["args"][name] == getattr(args, name) for name in ("steps", "stage2", "stage2_steps")):
            return False
        more = "--steps" if end == args.steps else f"--stage2-steps than {args.stage2_steps}"
        raise ValueError(f"{args.out} is at step {run.step} and ends at {end}: no step would be taken; "
                         f"ask for more {more}")


def rate_factors(args, step, stage_start, stage_end, time_used):
    """(warm-up, decay) that the learning rates are multiplied by in a stage of these steps. The cosine ends with the
    steps or with --minutes, whichever come first."""
    warmup = min((step - stage_start + 1) / args.warmup, 1) if args.warmup else 1.0
    progress = max((step - stage_start) / (stage_end - stage_start), time_used)
    return warmup, 0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1.0


Decision = namedtuple("Decision", "time_used begins_stage2 damping save_is_due signal failed")


def decide(run, schedule, signals, saved_at, first, processes):
    """What all processes must do alike at the top of a step. The first process has the clock and the validations;
    signals and failures may reach any."""
    args, mine = run.args, [0.0] * 4
    if processes.rank0:
        time_used = run.seconds / (60 * args.minutes) if args.minutes and not args.profile else 0.0
        begins = run.stage2_start is None and run.step < schedule.last and time_used < 1 and (
            run.step >= schedule.stage2_at
            or schedule.converges and (first or run.step % args.eval_every == 0)
            and converged(run.log, args.stage2_evaluations, args.stage2_gain))
        mine = [time_used, float(begins), run.damping, float(time.time() - saved_at > 60 * args.save_minutes)]
    mine += [float(signals.received), float(run.tally.failure is not None)]
    return Decision(*processes.total(mine, largest=True))


# ---------------------------------------------------------------------------------------------------------------------
# Validation.

class Validation:
    """The held-out clips and what the teacher makes of them; the first process has them."""

    def __init__(self, clips, name, teacher, device):
        self.clips, self.name, self.device = [clip[None] for clip in clips], name, device
        with torch.no_grad():
            self.latents = [teacher.encode(clip.to(device), sample=False) for clip in self.clips]

    def mean(self, measure, videos):
        return float(np.mean([measure(video, clip) for video, clip in zip(videos, self.clips)]))

    def decode_with_teacher(self, teacher, autocast):
        """The teacher's PSNR in dB. Raises ValueError where it is not finite."""
        with autocast():
            self.teacher_videos = decode_all(teacher.decode, self.latents)
        self.teacher_psnr = self.mean(capped_psnr, self.teacher_videos)
        if not math.isfinite(self.teacher_psnr):
            raise ValueError(f"the {teacher.name} teacher's PSNR is {self.teacher_psnr} on {self.name}: "
                             f"its weights are not fit to learn from")
        return self.teacher_psnr

    @torch.no_grad()
    def __call__(self, run, autocast):
        """Writes a line of the log, the pictures, and the student as it is now. Raises RuntimeError, and writes
        nothing, where the student's PSNR is not finite."""
        out, lpips = Path(run.args.out), run.objective.lpips
        with autocast():
            videos = decode_all(run.ema, self.latents)
        if not all(video.isfinite().all() for video in videos):          # in half precision, perhaps
            videos = decode_all(run.ema, self.latents)
        line = {"step": run.step, "psnr": round(self.mean(capped_psnr, videos), 4)}
        if not math.isfinite(line["psnr"]):
            raise RuntimeError(f"the student's PSNR is {line['psnr']} at step {run.step}: nothing was saved"
                               + last_checkpoint(out))
        line["sharpness"] = round(self.mean(sharpness_ratio, videos), 4)
        if lpips:
            distance = lambda a, b: lpips(a.to(self.device), b.to(self.device)).item()
            line["val_lpips"] = round(self.mean(distance, videos), 4)
        run.write_line(line | {"stage": run.stage, "teacher_psnr": round(self.teacher_psnr, 4),
                               "minutes": round(run.seconds / 60, 3)})
        run.damping = damping(run.log, run.stage2_start, run.args.max_drop)
        plot_curves(out / "curves.png", run.log, self.teacher_psnr, run.stage2_start)
        rows = {"input": self.clips, "teacher": self.teacher_videos, "student": videos}
        plot_samples(out / "samples.png", {title: [video[0] for video in held] for title, held in rows.items()})
        about = {"teacher": run.args.teacher, "step": str(run.step), "psnr": f"{line['psnr']:.2f}"}
        run.ema.save_pretrained(out, metadata=about)
        if best_step(run.log, run.stage2_start, run.args.max_drop) == run.step:
            run.ema.save_pretrained(out / "best.safetensors", metadata=about)
        kept = 100 * line["psnr"] / self.teacher_psnr
        tqdm.write(f"step {run.step}: PSNR {line['psnr']:.2f} dB ({kept:.1f} % of the teacher's), "
                   f"sharpness {100 * line['sharpness']:.0f} % of the input's, {run.seconds / 60:.1f} min")


# ---------------------------------------------------------------------------------------------------------------------
# One step.

def optimise(run, micro_terms, at_last_layer, processes):
    """Clips the gradients and steps along them, or passes over the step where a gradient or a term is not finite; then
    counts it, and renews the average and the adaptive weight. Nothing here waits for the device.

    micro_terms: (clips' numbers, {term: value}) of each micro-batch; at_last_layer: each one's gradients there, of
    reconstruction and of L_adv, or none. Returns the gradient's norm before clipping."""
    args, objective, world = run.args, run.objective, processes.world
    scale = run.scaler.scale(torch.ones((), device=run.device))
    if run.stage == 2 and world > 1:
        for p in objective.discriminator.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    clip_norm = lambda module: torch.nn.utils.clip_grad_norm_(module.parameters(), args.clip)
    norms = {"the gradient": clip_norm(run.student_and_heads)}
    skip_discriminator = None
    if run.stage == 2:
        norms["the discriminator's gradient"] = clip_norm(objective.discriminator)
        hinge = torch.stack([terms["discriminator"] for _, terms in micro_terms]).mean()
        if world > 1:
            dist.all_reduce(hinge)
        skip_discriminator = (hinge / world < args.disc_floor).float()
    # A term may be infinite and its gradient finite: L1's is a sign.
    values = [value.float() for _, terms in micro_terms for value in terms.values()]
    skip = 1 - torch.stack([*norms.values(), *values]).isfinite().all().float()
    if world > 1:
        dist.all_reduce(skip, dist.ReduceOp.MAX)
    take_step(run.optimizers, run.scaler, skip, skip_discriminator)
    run.step += 1
    run.tally.add(run.step, micro_terms, norms, skip, scale)
    run.student_and_heads.zero_grad(set_to_none=True)
    if run.stage == 2:
        objective.discriminator.zero_grad(set_to_none=True)
    with torch.no_grad():                       # an average of few steps forgets sooner, or it would keep the start
        keep = min(args.ema, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.student_and_heads.student.parameters()), 1 - keep)
    if at_last_layer:
        pair = sum(at_last_layer)
        if world > 1:
            dist.all_reduce(pair)
        ratio = adaptive_weight(*(pair / (scale * world)))
        objective.adaptive_weight = torch.where(ratio.isfinite(), ratio, objective.adaptive_weight)
    return norms["the gradient"]


def write_means(run, norm, logged_weight, clips_per_s, processes):
    """A line of the log: means of the terms since the line before; learning rate, norm and weight of the last step.
    Returns the mean loss."""
    state = run.tally.gather(processes)
    steps = state["steps"]
    line = {"step": run.step} | {name: round(value / steps, 7) for name, value in state["sums"].items() if steps}
    if run.stage == 2:
        line["weight"] = round(float(logged_weight), 7)
    norm = norm.item()
    line |= {"lr": run.optimizers[0].param_groups[0]["lr"],
             "grad_norm": round(norm, 4) if math.isfinite(norm) else None, "clipped": state["clipped"] / max(steps, 1),
             "samples_per_s": round(clips_per_s, 3), "minutes": round(run.seconds / 60, 3)}
    if state["skipped"]:
        line["skipped"] = state["skipped"]
    run.tally.reset()
    if processes.rank0 and not run.args.profile:
        run.write_line(line)
    return line.get("loss", math.nan)


# ---------------------------------------------------------------------------------------------------------------------

def main(args):
    """A whole run. Raises ValueError, OSError or RuntimeError of one line where it cannot go on."""
    here = int(os.environ.get("RANK", 0)) == 0 and not args.profile
    with alone_in(Path(args.out)) if here else nullcontext():
        distil(args)


@dataclass
class Setup:
    """What a run works with: processes, precision, teacher and clips."""
    args: argparse.Namespace
    device: torch.device
    processes: Processes
    out: Path
    saved: dict                         # the checkpoint that the run goes on from, or None
    autocast: object                    # makes the context of the student's precision
    compiles: bool
    teacher: object = None              # None where a cache has what it makes
    teacher_autocast: object = None     # as autocast, but float32 where the teacher is not finite in half precision
    clips: object = None                # the training stream
    validation: Validation = None
    fingerprints: dict = None           # what a resume must find unchanged

    @property
    def accumulate(self):
        """Micro-batches of a process in a step."""
        return self.args.batch // (self.args.micro_batch * self.processes.world)

    def say(self, line):
        if self.processes.rank0:
            tqdm.write(line)


def set_up(args):
    """A Setup without teacher and clips; settles the precision in args.dtype. ValueError where the batch does not
    divide."""
    device, out = find_device(args.device), Path(args.out)
    processes = Processes(device)
    together = args.micro_batch * processes.world
    if args.batch % together:
        raise ValueError(f"--batch {args.batch} cannot be divided among {processes.world} processes in micro-batches "
                         f"of {args.micro_batch}: multiples of {together} can")
    resumes = processes.from_rank0(lambda: open_folder(out, args))
    saved = read_checkpoint(out / "checkpoint.pt") if resumes else None
    if resumes and args.dtype == "auto":
        args.dtype = saved["args"]["dtype"]
    dtype = autocast_dtype(args.dtype, device)
    args.dtype = str(dtype)[6:]
    compiles = args.compile or args.compile is None and device.type == "cuda"
    torch.backends.cudnn.benchmark = True                     # sizes do not change
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")            # Muon's products
    if compiles:
        torch._dynamo.config.suppress_errors = True           # what cannot be compiled here runs eager, with a warning
        torch._dynamo.config.optimize_ddp = not args.checkpointing      # it cannot split a graph of checkpointed blocks
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    setup = Setup(args, device, processes, out, saved, autocast, compiles)
    if args.resume and not resumes:
        setup.say(f"{out} has no checkpoint yet: it begins at step 0")
    return setup


def add_teacher_and_clips(setup):
    """Loads the teacher, finds the clips, and lets the teacher decode those to validate on."""
    args, processes = setup.args, setup.processes
    teacher = setup.teacher = load_teacher(args.teacher, args.teacher_weights, setup.device)
    teacher.check_clip(args.frames, args.size, args.size)
    with torch.device("meta"):
        check_fit(TurboVAED(student_config(args)), f"the {args.teacher} teacher", (), teacher.latent_channels,
                  tuple(teacher.compression), teacher.images, who=f"student {args.config}")
    held_out = []

    def find_clips():                                         # one process looks, since all must go by the same list
        train, clips, name, fingerprints = datasets(args)
        held_out.extend(clips)
        return train, name, fingerprints | {"teacher_weights": teacher.weights_hash()}

    setup.clips, val_name, setup.fingerprints = processes.from_rank0(find_clips)
    if setup.saved:
        check_resume(setup.saved, args, setup.fingerprints)
    prepare(teacher, setup.device, setup.compiles)
    setup.validation, setup.teacher_autocast = Validation(held_out, val_name, teacher, setup.device), setup.autocast
    is_finite = lambda: finite_in_autocast(teacher, setup.validation.clips[0].to(setup.device), args.align,
                                           setup.autocast)
    if args.dtype != "float32" and not processes.from_rank0(is_finite):
        setup.teacher_autocast = nullcontext
        setup.say(f"the {args.teacher} teacher is not finite in {args.dtype}: it runs in float32")
    return processes.from_rank0(lambda: setup.validation.decode_with_teacher(teacher, setup.teacher_autocast))


def open_run(setup, run):
    """Writes what a run's folder begins with, on the first process."""
    if not setup.processes.rank0 or setup.args.profile:
        return
    # Or a later --resume would go on with an older run's.
    for path in [] if setup.saved else [setup.out / name for name in RUN_FILES]:
        path.unlink(missing_ok=True)
    for path in (*setup.out.glob("*.partial"), *setup.out.glob(".*.safetensors")):
        path.unlink(missing_ok=True)
    write_file(setup.out / "args.json", json.dumps(vars(setup.args), indent=1).encode())
    write_file(setup.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log).encode())


def save(setup, run, validates=False):
    """Writes the checkpoint, and before it validates if asked to; --profile writes nothing. All processes take part,
    since the tally is theirs. Returns the time when it is done."""
    def write():
        if validates:
            setup.validation(run, setup.autocast)
        save_as(setup.out / "checkpoint.pt", torch.save, run.state() | {"fingerprints": setup.fingerprints})

    if not setup.args.profile:
        run.tally.settle(setup.args.clip)
        run.tally.gather(setup.processes)
        setup.processes.from_rank0(write)
    return time.time()


def gradients_of_a_step(setup, run, model, loader, timer, stage_start):
    """Adds up Equation 5's gradients over a step's micro-batches. The teacher makes latents and features;
    `losses.Objective.backward` computes

        L = L_1                                     mean absolute error
            + α1 L_lpips                            --lpips-weight
            + α2 L_distill                          --distill-weight, Equation 4
            + α3 L_kl                               --kl-weight; no gradient, since the encoder is frozen
            + α4 L_adv                              --adversarial-weight x adaptive weight x damping x warm-up; stage 2

    Returns what `optimise` wants: (clips' numbers, {term: value}) of each micro-batch, and the gradients at the last
    layer, every tenth step of stage 2."""
    args, accumulate, micro_terms, at_last_layer = setup.args, setup.accumulate, [], []
    for i in range(accumulate):
        with timer("data"):
            batch = next(loader)
            numbers = batch.pop("n").tolist()
            batch = {name: t.to(setup.device, non_blocking=True) for name, t in batch.items()}
        with timer("teacher"):
            latents, features, kl = teacher_targets(batch, numbers, setup.teacher, args, setup.teacher_autocast)
        noise = clip_noise(args.seed, DISCRIMINATOR, numbers, batch["video"]) if run.stage == 2 else None
        with model.no_sync() if setup.processes.world > 1 and i + 1 < accumulate else nullcontext():
            terms, gradients = run.objective.backward(
                model, latents, features, batch["video"], kl.mean(), batch.get("frames"), noise,
                scale=lambda loss: run.scaler.scale(loss / accumulate), autocast=setup.autocast, timer=timer)
        micro_terms.append((numbers, terms))
        if run.stage == 2 and (run.step - stage_start) % 10 == 0:
            with timer("discriminator"):
                pair = last_layer_gradients(run.student_and_heads.student, latents, *gradients, autocast=setup.autocast)
                at_last_layer.append(torch.stack(pair))
    return micro_terms, at_last_layer


def open_loader(setup, run):
    """An endless iterator of micro-batches, from the run's step on."""
    args = setup.args
    lpips_frames = args.lpips_frames if run.objective.lpips and args.lpips_frames < args.frames else 0
    slots = Slots(args, run.step, setup.processes.rank, setup.processes.world)
    return iter(DataLoader(Indexed(setup.clips, args.seed, args.frames, lpips_frames), worker_init_fn=begin_worker,
                           batch_sampler=slots, num_workers=args.workers, pin_memory=setup.device.type == "cuda"))


def loop(setup, run, schedule, signals):
    """Each turn: agree with the other processes what is to be done. Begin stage 2 or end, if it is time. Set the
    learning rates. Add up gradients, and step. Now and then write a line of the log, validate and save. Returns what
    was agreed on last, and the timers of both stages."""
    args, processes = setup.args, setup.processes
    model = DistributedDataParallel(run.student_and_heads) if processes.world > 1 else run.student_and_heads
    loader, timers, untimed = open_loader(setup, run), {}, Timer(setup.device, on=False)
    progress = Progress(setup, run)
    started_at = saved_at = time.time()
    while True:
        shared = decide(run, schedule, signals, saved_at, run.step == progress.first_step, processes)
        if shared.failed or shared.signal:
            break
        if shared.save_is_due:
            started_at = saved_at = save(setup, run)               # --minutes counts training only
        if shared.begins_stage2:
            if not processes.from_rank0(run.validated):       # stage 2 is measured by what stage 1 ended with
                started_at = saved_at = save(setup, run, validates=True)
            run.tally.settle(args.clip)
            run.tally.reset()                                 # its terms are others
            run.stage2_start = run.step
            run.begin_stage2()
            setup.say(f"step {run.step}: stage 2 begins")
        stage_start, stage_end = schedule.bounds(run.stage2_start)
        if run.step >= stage_end or shared.time_used >= 1:
            break
        warmup, decay = rate_factors(args, run.step, stage_start, stage_end, shared.time_used)
        for optimizer, rate in zip(run.optimizers, run.rates):
            optimizer.param_groups[0]["lr"] = rate * decay * warmup
        run.objective.adversarial_weight = args.adversarial_weight * shared.damping * warmup
        logged_weight = run.objective.adversarial_weight * run.objective.adaptive_weight    # all that multiplies L_adv
        timed = args.profile and run.step - stage_start >= schedule.WARM
        timer = timers.setdefault(run.stage, Timer(setup.device)) if timed else untimed
        with timer.step():
            micro_terms, at_last_layer = gradients_of_a_step(setup, run, model, loader, timer, stage_start)
            with timer("optimiser"):
                norm = optimise(run, micro_terms, at_last_layer, processes)
            log_now = run.step % args.log_every == 0 or run.step % args.eval_every == 0 or run.step == stage_end
            if log_now or run.step % 10 == 0:                 # what is not finite is told soon
                run.tally.settle(args.clip)
        started_at = progress.step(started_at, stage_end)
        if log_now:                                           # before it is saved, too
            clips_per_s = progress.clips_per_s()
            progress.note(write_means(run, norm, logged_weight, clips_per_s, processes), clips_per_s)
        if run.step % args.eval_every == 0 or run.step == stage_end:
            started_at = saved_at = save(setup, run, validates=True)
    progress.bar.close()
    return shared, timers


class Progress:
    """The bar, or a line every 20 seconds where there is no terminal; and the run's clock."""

    def __init__(self, setup, run):
        self.setup, self.run, self.first_step = setup, run, run.step
        hidden = not (setup.processes.rank0 and sys.stderr.isatty())
        self.bar = tqdm(total=setup.args.steps, initial=run.step, unit="step", disable=hidden)
        self.logged_seconds, self.timed_steps, self.told_at, self.noted = run.seconds, 0, time.time(), ""

    def step(self, started_at, stage_end):
        """Counts a step that began at `started_at`. Returns the time now."""
        run, now = self.run, time.time()
        self.bar.total, self.bar.desc = stage_end, f"stage {run.stage}"
        self.bar.update()
        compiling = self.setup.compiles and run.step - 1 in (self.first_step, run.stage2_start)
        if not compiling:                                     # which is no training
            run.seconds, self.timed_steps = run.seconds + now - started_at, self.timed_steps + 1
        if self.bar.disable and now - self.told_at > 20:
            self.told_at = now
            self.setup.say(f"step {run.step} of {stage_end}: {self.noted}{run.seconds / 60:.1f} minutes")
        return now

    def clips_per_s(self):
        """Clips a second since the last call."""
        rate = self.setup.args.batch * self.timed_steps / max(self.run.seconds - self.logged_seconds, 1e-9)
        self.timed_steps, self.logged_seconds = 0, self.run.seconds
        return rate

    def note(self, loss, rate):
        """What the next line is to say beside the step and the minutes."""
        self.bar.set_postfix(loss=f"{loss:.4f}")
        self.noted = f"loss {loss:.4f}, {rate:.1f} clips a second, "


def finish(setup, run, schedule, shared, timers):
    """What comes after the last step: saves, reports, says where the student is, and ends the processes."""
    args, out, processes = setup.args, setup.out, setup.processes
    if shared.failed:
        if run.tally.failure:
            print(f"error: {run.tally.failure}{last_checkpoint(out)}", file=sys.stderr, flush=True)
        processes.wait()
        sys.exit(1)
    if shared.signal:
        save(setup, run)
        there = (out / "checkpoint.pt").exists() and not args.profile
        setup.say(f"stopped by {signal.Signals(int(shared.signal)).name} at step {run.step}; "
                  + (f"--resume goes on from {out}/checkpoint.pt" if there else "nothing was saved"))
    elif args.profile:
        if processes.rank0:
            report(timers, schedule.recipe, args, setup.device, processes.world, Path("profile.png"))
    else:
        if not processes.from_rank0(run.validated):           # --minutes are over
            save(setup, run, validates=True)
        if processes.rank0:
            best = best_step(run.log, run.stage2_start, args.max_drop)
            setup.say(f"the student is in {out}/student.safetensors, the best one, of step {best}, in "
                      f"best.safetensors; pictures: {out}/samples.png, {out}/curves.png")
    processes.end()
    if shared.signal:
        sys.exit(128 + int(shared.signal))


def distil(args):
    signals = Signals()
    setup = set_up(args)
    teacher_psnr = add_teacher_and_clips(setup)
    device, processes, saved = setup.device, setup.processes, setup.saved
    run = make_run(args, device, setup.compiles, setup.teacher, processes, saved is not None)
    schedule = Schedule(args)
    if saved:
        run.load(saved, setup.out / "log.jsonl")
        if not schedule.check_left(run, saved):
            setup.say(f"{args.out} is finished: it ended at step {run.step}; to go on, ask for more --steps"
                      + " and --stage2-steps" * (args.stage2 == "auto"))
            return processes.end()
    if args.cache:
        setup.clips = fill_cache(args, setup.teacher, setup.clips, setup.fingerprints, device, setup.teacher_autocast,
                                 processes, setup.say)
        setup.teacher = None                                  # its memory is the student's now
    run.tally.describe = setup.clips.describe
    open_run(setup, run)
    saved = setup.saved = None                                # or it would stay in memory
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    heads = f" and {millions(run.student_and_heads.heads):.2f} M in heads" if args.align else ""
    setup.say(f"teacher {args.teacher}: {teacher_psnr:.2f} dB on {setup.validation.name}; student {args.config}: "
              f"{millions(run.student_and_heads.student):.2f} M parameters{heads}; "
              f"{device.type} x {processes.world}, {args.dtype}")
    setup.say(f"{args.steps} steps of {args.batch} clips ({args.micro_batch} x {processes.world} processes x "
              f"{setup.accumulate}), {args.frames}x{args.size}x{args.size}, {args.data}"
              + ("" if run.objective.lpips else "; no LPIPS term"))
    signals.holding = True
    atexit.register(end_workers)
    finish(setup, run, schedule, *loop(setup, run, schedule, signals))


def one_line(error):
    """What a user is told of an error; None for a bug, whose traceback is shown."""
    message = str(error).strip()
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return ("a loader process was killed, most likely since memory ran out: fewer --workers, a smaller "
                "--micro-batch or smaller videos help; --resume goes on from the last checkpoint, if there is one")
    if out_of_memory(error):
        return "memory ran out: a smaller --micro-batch or --size, --checkpointing and --cache need less of it"
    if "/gloo/" in message:
        return "another process of this run has ended"
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
