"""Trains the embedded teacher, a reduced Video DC-AE, from scratch on made-up video.

    python assets/train_tiny_teacher.py                    # what made assets/tiny_teacher/
    python assets/train_tiny_teacher.py --minutes 1 --out /tmp/teacher      # try it

Muon and AdamW: with AdamW alone the same model was 3 dB behind after the first 140 steps, and still grey. The loss is the mean over clips of log(MSE), the quantity that PSNR averages: dull clips count as much as busy
ones. There is no KL term and no sampling, since Video DC-AE's encoder is deterministic.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import HELD_OUT_SEED, SyntheticClips          # noqa: E402
from teachers import TINY, Downsample, GatedConv, LinearAttention, RMSNorm, ResBlock, Upsample, VideoDCAE  # noqa: E402
from train import make_optimizers        # noqa: E402

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--minutes", type=float, default=50, help="how long to train; the learning rates follow the clock")
p.add_argument("--batch", type=int, default=8, help="clips a step")
p.add_argument("--frames", type=int, default=8)
p.add_argument("--size", type=int, default=64, help="height and width of a clip in pixels")
p.add_argument("--lr", type=float, default=2e-3, help="AdamW's peak learning rate: 50 steps of warm-up, then a cosine that ends at 0 with the time")
p.add_argument("--muon-lr", type=float, default=0.02, help="Muon's, likewise")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--workers", type=int, default=1, help="processes that make clips")
p.add_argument("--bf16", action=argparse.BooleanOptionalAction, 
               default=torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
               help="autocast to bfloat16 (default: where the CPU has instructions for it)")
p.add_argument("--out", default=str(Path(__file__).resolve().parent / "tiny_teacher"))
args = p.parse_args()


def psnr(model, clips):
    """Mean over clips of the PSNR in dB of the reconstruction, clamped to [-1, 1]."""
    with torch.no_grad():
        error = torch.stack([(model(x[None]).clamp(-1, 1)[0] - x).square().mean() for x in clips])
    return (-10 * torch.log10(error / 4)).mean().item()


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
        elif isinstance(module, LinearAttention):
            module.main["qkv"].conv.weight.mul_(scale)
        elif isinstance(module, GatedConv):
            module.main["inverted_conv"].conv.weight.mul_(scale)
        elif isinstance(module, RMSNorm) and name != "decoder.project_out.op_list.0":
            module.weight.div_(scale), module.bias.div_(scale)
        elif isinstance(module, Downsample):
            module.main.conv.bias.div_(scale)
        elif isinstance(module, Upsample):
            module.main["conv"].conv.bias.div_(scale)
    model.encoder.project_in.conv.weight.div_(scale)
    for conv in (model.encoder.project_in, model.encoder.project_out["main"].op_list[0], model.decoder.project_in["main"]):
        conv.conv.bias.div_(scale)


torch.manual_seed(args.seed)
model = VideoDCAE(TINY)
for name, module in model.named_modules():      # residual branches start small: the shortcuts carry the first steps
    if name.endswith("norm"):
        nn.init.constant_(module.weight, 0.1)
ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
for conv in (model.encoder.project_out["main"].op_list[0], model.decoder.project_in["main"]):
    # PyTorch 2.15's bfloat16 gradient of these two weights is wrong (by 60 %, now and then infinite) on CPUs with AVX512
    conv.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    conv.forward = torch.autocast("cpu", enabled=False)(conv.forward)
optimizers = make_optimizers(model, args.lr, args.muon_lr, weight_decay=1e-2)
clips = SyntheticClips(args.frames, args.size, args.seed)
held_out = SyntheticClips(args.frames, 128, seed=HELD_OUT_SEED)
held_out = [held_out[8 * i] for i in range(16)]
loader = iter(DataLoader(clips, args.batch, num_workers=args.workers))
start = time.time()


def save():
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    final = copy.deepcopy(ema.module)
    unit_latents(final, held_out)
    weights = {k: v.half().contiguous() for k, v in final.state_dict().items()}
    save_file(weights, out / "model.tmp", metadata={"training": json.dumps(
        vars(args) | {"out": "", "step": step, "minutes": round((time.time() - start) / 60, 1), "torch": torch.__version__})})
    os.replace(out / "model.tmp", out / "model.safetensors")


for step, video in enumerate(loader, 1):
    done = min((time.time() - start) / (60 * args.minutes), 1)
    for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr)):
        optimizer.param_groups[0]["lr"] = peak * min(step / 50, 1) * 0.5 * (1 + math.cos(math.pi * done))
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        reconstruction = model(video)
    loss = (reconstruction.float() - video).square().mean((1, 2, 3, 4)).add(1e-5).log().mean()
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    ema.update_parameters(model)
    if step % 250 == 0 or done == 1:
        print(f"step {step}: loss {loss.item():.3f}, held-out PSNR {psnr(ema.module, held_out):.2f} dB, "
              f"{(time.time() - start) / step:.2f} s a step", flush=True)
        save()
    if done == 1:
        break
