"""Trains the embedded teacher, a reduced Video DC-AE, from scratch on made-up video.

    python assets/train_tiny_teacher.py                    # what made assets/tiny_teacher/
    python assets/train_tiny_teacher.py --minutes 1 --out /tmp/teacher --work /tmp/teacher      # try it
    python assets/train_tiny_teacher.py --blocks-anew --minutes 32 --out out/blocks_anew    # a better decoder for it

It goes on from the checkpoint in --work, if there is one.

Clips of all the lengths and sizes below take turns, so that a clip's ends and edges are met at every distance.

Muon and AdamW: with AdamW alone an earlier version was 3 dB behind after the first 140 steps, and still grey. The loss
is the mean over clips of log(MSE) + log(MAE). The first is what PSNR averages: dull clips count as much as busy ones.
The second gives small errors weight, such as a grid over flat areas. There is no KL term and no sampling, since Video
DC-AE's encoder is deterministic.

What comes out is a decoder that is all but linear. Muon lets the convolutions between blocks grow until the stream of
features stands at hundreds, and the norm that ends each block's branch grows by AdamW's small steps only: a branch is
0.1 % of its stream or less. --blocks-anew takes the shipped teacher, begins the decoder's blocks anew, in units of
their stream, and trains the decoder alone: the latents stay as they are.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.parametrize import register_parametrization
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CLIPS_PER_SCENE, HELD_OUT_SEED, SyntheticClips, psnr    # noqa: E402
from teachers import TINY, TINY_WEIGHTS, Downsample, RMSNorm, ResBlock, Upsample, VideoDCAE       # noqa: E402
from train import make_optimizers        # noqa: E402

FRAMES, SIZES = (4, 8, 12, 16, 20, 24), (64, 96)       # of the clips

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--minutes", type=float, default=115, help="how long to train; the learning rates follow the clock")
p.add_argument("--pixels", type=int, default=2 ** 17, help="of all frames of a step's clips together, about")
p.add_argument("--lr", type=float, default=2e-3,
               help="AdamW's peak learning rate: 50 steps of warm-up, then a cosine that ends at 0 with the time")
p.add_argument("--muon-lr", type=float, default=0.02, help="Muon's, likewise")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--bf16", action=argparse.BooleanOptionalAction,
               default=torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
               help="autocast to bfloat16 (default: where the CPU has instructions for it)")
p.add_argument("--blocks-anew", action="store_true",
               help="take the shipped teacher, begin its decoder's blocks anew, and train the decoder alone")
p.add_argument("--work", help="for the checkpoint (default: out/tiny_teacher, or --out with --blocks-anew)")
p.add_argument("--out", default=str(Path(__file__).resolve().parent / "tiny_teacher"))
args = p.parse_args()
args.work = args.work or (args.out if args.blocks_anew else "out/tiny_teacher")


class Batches(IterableDataset):
    """Batches of made-up clips, (B, 3, T, S, S), each of one length and size, of about as many pixels."""

    def __iter__(self):
        rng, used = np.random.default_rng((args.seed, step)), {}
        while True:
            shape = int(rng.choice(FRAMES)), int(rng.choice(SIZES))
            clips, first = used.get(shape) or (SyntheticClips(*shape, seed=args.seed + (step and 2 ** 20 + step)), 0)
            end = first + max(1, round(args.pixels / (shape[0] * shape[1] ** 2)))
            used[shape] = clips, end
            yield torch.stack([clips[n] for n in range(first, end)])


@torch.no_grad()
def mean_psnr(model, clips):
    """Mean over clips of the reconstruction's PSNR in dB."""
    return sum(psnr(model(clip[None]), clip[None]).item() for clip in clips) / len(clips)


@torch.no_grad()
def unit_latents(model, clips):
    """Divides the latents, and the stream of features they come from and go to, by the latents' standard deviation.

    Nothing in training fixes that scale (every branch is normalised, and so is the way out), so it drifts into the
    thousands. Each branch takes the stream times the divisor and gives its output over it: the numbers stay the same.
    """
    scale = torch.cat([model.encoder(clip[None]).flatten() for clip in clips]).std()
    for name, module in model.named_modules():
        if isinstance(module, ResBlock):
            module.main["conv1"].conv.weight.mul_(scale)
        elif isinstance(module, RMSNorm) and name != "decoder.project_out.op_list.0":
            module.weight.div_(scale), module.bias.div_(scale)
        elif isinstance(module, Downsample):
            module.main.conv.bias.div_(scale)
        elif isinstance(module, Upsample):
            module.main["conv"].conv.bias.div_(scale)
    encoder, decoder = model.encoder, model.decoder
    encoder.project_in.conv.weight.div_(scale)
    for conv in (encoder.project_in, encoder.project_out["main"].op_list[0], decoder.project_in["main"]):
        conv.conv.bias.div_(scale)


class Times(nn.Module):
    """A parametrisation: the weight that is used is the trained one times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, weight):
        return weight * self.factor


@torch.no_grad()
def begin_blocks_anew(decoder, latents):
    """Gives each block new weights, in units of its stream: it reads the stream over its root mean square, and what it
    adds, nothing at first, is in that unit."""
    units = {}
    measure = lambda block, inputs: units.update({block: inputs[0].square().mean().sqrt()})
    hooks = [block.register_forward_pre_hook(measure) for block in decoder.modules() if isinstance(block, ResBlock)]
    decoder(latents)
    for hook in hooks:
        hook.remove()
    for block, unit in units.items():
        reads, adds = block.main["conv1"].conv, block.main["conv2"]
        reads.reset_parameters(), adds.conv.reset_parameters()
        nn.init.zeros_(adds.norm.weight), nn.init.zeros_(adds.norm.bias)
        register_parametrization(reads, "weight", Times(1 / unit))
        for name in ("weight", "bias"):
            register_parametrization(adds.norm, name, Times(unit))


torch.manual_seed(args.seed)
held_out = {frames: SyntheticClips(frames, 128, seed=HELD_OUT_SEED) for frames in (8, 32)}
held_out = {frames: [clips[CLIPS_PER_SCENE * i] for i in range(8)] for frames, clips in held_out.items()}
model = VideoDCAE(TINY)
trained = model.decoder if args.blocks_anew else model
for name, module in model.named_modules():      # residual branches start small: the shortcuts carry the first steps
    if name.endswith("norm") and hasattr(module, "weight"):
        nn.init.constant_(module.weight, 0.1)
if args.blocks_anew:
    model.load_state_dict(load_file(TINY_WEIGHTS))
    model.encoder.requires_grad_(False)
    begin_blocks_anew(model.decoder, model.encoder(torch.stack(held_out[8])))
ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
for conv in (model.encoder.project_out["main"].op_list[0], model.decoder.project_in["main"]):
    # PyTorch 2.15's bfloat16 gradient of these two weights is wrong (by 60 %, at times infinite) on CPUs with AVX512.
    conv.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    conv.forward = torch.autocast("cpu", enabled=False)(conv.forward)
optimizers = make_optimizers(trained, args.lr, args.muon_lr, weight_decay=1e-2)
step, start, norms = 0, time.time(), []      # the latest gradients' norms
checkpoint = Path(args.work) / "checkpoint.pt"
parts = {"model": model, "ema": ema, **{f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}}
if checkpoint.exists():
    saved = torch.load(checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    step, start = saved["step"], time.time() - saved["seconds"]
    print(f"goes on from step {step}, minute {saved['seconds'] / 60:.0f}", flush=True)


def save():
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    final = VideoDCAE(TINY)
    with torch.no_grad():
        for name, weight in final.named_parameters():           # with their factors, where they have them
            module, _, leaf = name.rpartition(".")
            weight.copy_(getattr(ema.module.get_submodule(module), leaf))
    if not args.blocks_anew:
        unit_latents(final, held_out[8])
    weights = {k: v.half().contiguous() for k, v in final.state_dict().items()}
    minutes = round((time.time() - start) / 60, 1)
    made = vars(args) | {"out": "", "step": step, "minutes": minutes, "torch": torch.__version__}
    save_file(weights, out / "model.tmp", metadata={"training": json.dumps(made)})
    os.replace(out / "model.tmp", out / "model.safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}
               | {"step": step, "seconds": time.time() - start}, checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


for step, video in enumerate(DataLoader(Batches(), None, num_workers=1, prefetch_factor=8), step + 1):
    done = min((time.time() - start) / (60 * args.minutes), 1)
    for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr)):
        optimizer.param_groups[0]["lr"] = peak * min(step / 50, 1) * 0.5 * (1 + math.cos(math.pi * done))
    # PyTorch 2.14's bfloat16 gradients of clips of 4 frames are now and then a thousand times too large, or NaN, on
    # CPUs with AMX: those clips run in float32, and a step that stands out all the same is passed over.
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16 and video.shape[2] > 4):
        reconstruction = model(video)
    error = (reconstruction.float() - video).flatten(1)
    loss = (error.square().mean(1).add(1e-5).log() + error.abs().mean(1).add(1e-3).log()).mean()
    trained.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0).item()
    norms = (norms + [norm] if math.isfinite(norm) else norms)[-50:]
    if not norm < 10 * sorted(norms)[len(norms) // 2]:
        continue
    for optimizer in optimizers:
        optimizer.step()
    ema.update_parameters(model)
    if step % 500 == 0 or done == 1:
        found = ", ".join(f"{mean_psnr(ema.module, clips):.2f} dB of {frames} frames"
                          for frames, clips in held_out.items())
        seconds = (time.time() - start) / step
        print(f"step {step}: loss {loss.item():.3f}, held-out PSNR {found}, {seconds:.2f} s a step", flush=True)
        save()
    if done == 1:
        break
