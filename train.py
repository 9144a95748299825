"""Distils a frozen video VAE's decoder into a Turbo-VAED student (Section 3.4): stage 1.

    python train.py                                          # the embedded default: teacher tiny, made-up video, CPU
    python train.py --data FOLDER --steps 200                # the same on real video
    python train.py --teacher ltx --data data/vidgen         # LTX-VAE on one GPU
    torchrun --nproc_per_node=8 train.py --teacher ltx       # on eight; the effective batch stays the same
    python train.py --teacher ltx --resume                   # go on after a stop, as if it had not stopped

A run leaves in out/<teacher>/ (or --out): student.safetensors (EMA weights), checkpoint.pt, log.jsonl, curves.png,
samples.png (input, teacher, student) and args.json. Which clips, crops and posterior samples stand at step s, slot k
depends on the seed, s and k only, so neither a resume nor the number of processes changes what is trained on.
"""
import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import SyntheticClips, VideoClips
from losses import HEADS, LPIPS, Stage1, make_heads
from model import CONFIGS, TurboVAED
from teachers import TEACHERS, load_teacher

# Section 4.2: AdamW, learning rate 2e-4, betas 0.9 and 0.95, effective batch 32, 17 (dc: 16) frames at 256x256.
# Weight decay and EMA as in the published code; 70,000 steps as a user's reproduction of ltx reports.
PAPER = dict(frames=17, size=256, batch=32, micro_batch=2, steps=70_000, lr=2e-4, muon_lr=0.0, schedule="constant", align=["mid", "up0", "up1"],
             lpips_weight=1.0, distill_weight=1.0, normalize=False, data="data/vidgen", eval_every=1000, workers=4)
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
                 lpips_weight=0.0, distill_weight=0.02, normalize=True, data="synthetic", eval_every=200, workers=1),
}


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
    p.add_argument("--steps", type=int, help="optimiser steps *")
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
    p.add_argument("--distill-weight", type=float, help="α2 of Equation 5; 0 turns the distillation loss off *")
    p.add_argument("--kl-weight", type=float, default=1e-7, help="α3 of Equation 5 (default: 1e-7)")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None,
                   help="divide the teacher's features by their standard deviation in Equation 4 *")
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
    args.config = args.config or args.teacher
    args.out = args.out or f"out/{args.teacher}"
    if not args.distill_weight:
        args.align = []
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
        for step in range(self.first_step, self.args.steps):
            for start in range(step * self.args.batch, (step + 1) * self.args.batch, micro * self.world):
                first = start + self.rank * micro
                yield list(range(first, first + micro))


class Indexed(torch.utils.data.Dataset):
    """Clips with their numbers, which seed the posterior's samples."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, n):
        return n, self.clips[n]


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


def clip_generator(seed, n):
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 4, n)).generate_state(1)[0]))


def psnr(video, target):
    """dB over a clip, [-1, 1] mapped to [0, 1] and clamped."""
    return -10 * math.log10(max(((video.float().clamp(-1, 1) - target.float()) / 2).square().mean().item(), 1e-10))


@torch.no_grad()
def decode_all(decode, latents):
    return [decode(z).float().clamp(-1, 1).cpu() for z in latents]


def write_atomically(path, write):
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


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
    write_atomically(path, lambda p: figure.savefig(p, dpi=150, format="png"))
    plt.close(figure)


def plot_curves(path, log, teacher_psnr):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for term in ("l1", "lpips", "distill"):
        points = [(line["step"], line[term]) for line in log if term in line]
        if points:
            left.plot(*zip(*points), label=term)
            left.legend()
    left.set(xlabel="step", ylabel="loss terms, unweighted", yscale="log")
    points = [(line["step"], line["psnr"]) for line in log if "psnr" in line]
    right.plot(*zip(*points), marker=".", label="student (EMA)")
    right.axhline(teacher_psnr, color="grey", linestyle="--", label="teacher")
    right.set(xlabel="step", ylabel="validation PSNR in dB")
    right.legend()
    write_atomically(path, lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)


RESUMES_WITH = ("teacher", "teacher_weights", "config", "data", "frames", "size", "stride", "batch", "lr", "muon_lr", "schedule", "warmup",
                "weight_decay", "clip", "ema", "align", "head", "lpips_weight", "distill_weight", "kl_weight", "normalize", "seed")


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
    if (out / "checkpoint.pt").exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite starts anew, --out names another folder")
    if args.resume and not (out / "checkpoint.pt").exists():
        raise FileNotFoundError(f"nothing to resume: no checkpoint.pt in {out}")

    # teacher, student, loss ----------------------------------------------------------------------------------
    dtype = autocast_dtype(args.dtype, device)
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
    ema = TurboVAED(config).to(device).requires_grad_(False).eval()
    ema.load_state_dict(student.state_dict())
    with torch.no_grad():
        val_latents = [teacher.encode(clip.to(device), sample=False) for clip in val_clips]
        shapes = {name: f.shape for name, f in teacher.features(val_latents[0], args.align).items()}
    heads = make_heads({name: config.feature_shape(name, val_latents[0].shape) for name in shapes}, shapes, args.head)
    lpips = LPIPS() if args.lpips_weight else None
    objective = Stage1(student, heads, lpips, args.lpips_weight, args.distill_weight, args.kl_weight, args.normalize).to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizers = make_optimizers(objective, args.lr, args.muon_lr, args.weight_decay)
    peaks = [args.lr, args.muon_lr]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # resume --------------------------------------------------------------------------------------------------
    step, elapsed, log = 0, 0.0, []
    if args.resume:
        saved = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        for name in RESUMES_WITH:
            if saved["args"][name] != getattr(args, name):
                raise ValueError(f"{out} was run with --{name.replace('_', '-')} {saved['args'][name]}, not {getattr(args, name)}")
        objective.load_state_dict(saved["objective"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        step, elapsed = saved["step"], saved["elapsed"]
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        log = [line for line in map(json.loads, lines) if line["step"] <= step]
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "args.json", lambda p: p.write_text(json.dumps(vars(args), indent=1)))
        write_atomically(out / "log.jsonl", lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in log)))

    if args.compile or args.compile is None and device.type == "cuda":
        student.compile()
    model = DistributedDataParallel(objective) if world > 1 else objective
    with autocast():
        teacher_videos = decode_all(teacher.decode, val_latents)
    teacher_psnr = float(np.mean([psnr(a, b) for a, b in zip(teacher_videos, val_clips)]))
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    say(f"teacher {args.teacher}: {teacher_psnr:.2f} dB on {val_name}; student {args.config}: {millions(student):.2f} M parameters"
        f"{f' and {millions(heads):.2f} M in heads' if shapes else ''}; {device.type} x {world}, {str(dtype)[6:]}")
    say(f"{args.steps} steps of {args.batch} clips ({args.micro_batch} x {world} processes x {accumulate}), "
        f"{args.frames}x{args.size}x{args.size}, {args.data}" + ("" if lpips else "; no LPIPS term"))

    def validate_and_save():
        with autocast():
            videos = decode_all(ema, val_latents)
        log.append({"step": step, "psnr": round(float(np.mean([psnr(a, b) for a, b in zip(videos, val_clips)])), 4),
                    "teacher_psnr": round(teacher_psnr, 4), "minutes": round(elapsed / 60, 3)})
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(log[-1]) + "\n")
        plot_curves(out / "curves.png", log, teacher_psnr)
        squeeze = lambda videos: [v[0] for v in videos]
        plot_samples(out / "samples.png", {"input": squeeze(val_clips), "teacher": squeeze(teacher_videos), "student": squeeze(videos)})
        ema.save_pretrained(out, metadata={"teacher": args.teacher, "step": str(step), "psnr": f"{log[-1]['psnr']:.2f}"})
        checkpoint = {"objective": objective.state_dict(), "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                      "scaler": scaler.state_dict(), "step": step, "elapsed": elapsed, "args": vars(args)}
        write_atomically(out / "checkpoint.pt", lambda p: torch.save(checkpoint, p))
        say(f"step {step}: PSNR {log[-1]['psnr']:.2f} dB ({100 * log[-1]['psnr'] / teacher_psnr:.1f} % of the teacher's), "
            f"{elapsed / 60:.1f} min")

    # the loop ------------------------------------------------------------------------------------------------
    loader = iter(DataLoader(Indexed(train_clips), batch_sampler=Slots(args, step, rank, world), num_workers=args.workers,
                             pin_memory=device.type == "cuda"))
    bar = tqdm(total=args.steps, initial=step, desc="stage 1", unit="step", disable=not (chief and sys.stderr.isatty()))
    clock, sums, last_step = time.time(), {}, step
    while step < args.steps:
        progress = step / args.steps
        if args.minutes:
            spent = torch.tensor(elapsed / (60 * args.minutes), dtype=torch.float64)
            if world > 1:                                     # one clock for all, or their learning rates would part
                spent = spent.to(device)
                dist.broadcast(spent, 0)
            progress = max(progress, spent.item())
            if progress >= 1:
                break
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1.0
        factor = decay * min((step + 1) / args.warmup, 1) if args.warmup else decay
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor

        for i in range(accumulate):
            numbers, video = next(loader)
            video = video.to(device, non_blocking=True)
            with torch.no_grad(), autocast():
                mean, logvar = teacher.posterior(video)
                noise = [torch.randn(mean.shape[1:], generator=clip_generator(args.seed, n)) for n in numbers.tolist()]
                latents = mean if logvar is None else mean + (0.5 * logvar).exp() * torch.stack(noise).to(mean)
                features = teacher.features(latents, args.align)
            with model.no_sync() if world > 1 and i + 1 < accumulate else nullcontext():
                with autocast():
                    loss, terms = model(latents, video, features, (mean, logvar))
                scaler.scale(loss / accumulate).backward()
            for name, value in (terms | {"loss": loss.detach()}).items():
                sums[name] = sums.get(name, 0.0) + value.float() / accumulate
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        with torch.no_grad():                                 # young averages forget sooner, or they would keep the start
            keep = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - keep)
        elapsed += time.time() - clock
        clock = time.time()
        bar.update()

        if step % args.log_every == 0 or step % args.eval_every == 0 or step == args.steps:     # before it is saved, too
            means = torch.stack([value.float() for value in sums.values()]) / (step - last_step)
            if world > 1:
                dist.all_reduce(means)
                means /= world
            if not means.isfinite().all():
                raise RuntimeError(f"the loss is not finite at step {step}; the last good checkpoint is in {out}")
            line = {"step": step} | {name: round(value, 7) for name, value in zip(sums, means.tolist())}
            line |= {"lr": args.lr * factor, "grad_norm": round(norm.item(), 4), "minutes": round(elapsed / 60, 3)}
            sums, last_step = {}, step
            log.append(line)
            if chief:
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{line['loss']:.4f}")
        if step % args.eval_every == 0 and step < args.steps and chief:
            validate_and_save()
            clock = time.time()                               # the clock of --minutes counts training
    bar.close()
    if chief:
        validate_and_save()
        say(f"the student is in {out}/student.safetensors; pictures: {out}/samples.png, {out}/curves.png")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "\n" in str(error):     # not one of ours: a bug wants its traceback
            raise
        sys.exit(f"error: {error}")
