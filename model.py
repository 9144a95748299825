"""Turbo-VAED's student: a light decoder for the latents of a heavy video VAE, whole in this file.

    model = TurboVAED(CONFIGS["ltx"])                     # to train
    model = TurboVAED.from_pretrained("out/ltx")          # ours: a training run's folder, or one .safetensors
    model = TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="ltx")      # published, from the hub
    video = model(latents)                                # (B, C, t, h, w) -> (B, 3, T, H, W) in about [-1, 1]
    for frames in model.stream(chunks): ...               # the same, as soon as they are known, from chunks of latents
    video = model.decode(latents, chunk=4)                # the same video in less memory
    model.optimize_for_inference()                        # compiled, and what else makes it fast

Needs PyTorch, and safetensors where such a file is read or written. Section, figure and table numbers are those of the
Turbo-VAED paper.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BLOCKS = ("mid", "up0", "up1", "up2", "up3")
UPSAMPLING = ("decoupled", "pixel_shuffle_3d", "interpolate")
ONEDNN = torch.backends.mkldnn.is_available()
LARGE = 2 ** 27         # numbers in a layer's output, above which `decode` streams if it is not told otherwise


@dataclass(frozen=True)
class TurboVAEDConfig:
    latent_channels: int                 # channels of the teacher's latents
    widths: tuple                        # channels of mid, up0, up1, up2, up3
    resnets: tuple                       # resnets in mid, up0, up1, up2, up3
    up: tuple                            # (time, space) factors of up0 ... up3; None: the block does not upsample
    patch: int                           # what is left to upsample after up3, in space: 1, 2 or 4
    drop_first: bool                     # True: the clip's first latent stands for one frame; n: the first of every n
    separable: tuple = ("mid", "up0")    # blocks of depthwise separable convolutions, upsampler's included (Figure 2)
    kernel: int = 5                      # of the depthwise convolutions: 3, 5 or 7 (Table 5)
    upsampling: str = "decoupled"        # or "pixel_shuffle_3d", "interpolate" (Table 1)

    def __post_init__(self):
        freeze = lambda v: tuple(map(freeze, v)) if isinstance(v, (list, tuple)) else v   # JSON knows lists only
        for name in ("widths", "resnets", "up", "separable"):
            object.__setattr__(self, name, freeze(getattr(self, name)))
        if (len(self.widths), len(self.resnets), len(self.up)) != (5, 5, 4):
            raise ValueError(f"widths and resnets need 5 entries, up 4; got {self.widths}, {self.resnets}, {self.up}")
        if any(f and (len(f) != 2 or min(f) < 1 or max(f) == 1) for f in self.up):
            raise ValueError(f"up takes factors (time, space), at least 1, not both 1, or None; got {self.up}")
        if min(self.latent_channels, *self.widths) < 1 or not all(n in range(100) for n in self.resnets):
            raise ValueError(f"channels are at least 1, resnets 0 to 99 a block; got {self}")
        if self.patch not in (1, 2, 4) or self.widths[-1] % self.patch ** 2:
            raise ValueError(f"patch must be 1, 2 or 4 and up3's width a multiple of its square; got {self}")
        if not set(self.separable) <= set(BLOCKS) or self.upsampling not in UPSAMPLING:
            raise ValueError(f"separable names some of {BLOCKS}, upsampling one of {UPSAMPLING}; got {self}")
        if self.kernel not in range(1, 32, 2):
            raise ValueError(f"kernel must be odd and below 32, got {self.kernel}")
        if not isinstance(self.drop_first, bool) and self.drop_first not in range(2, 100):
            raise ValueError(f"drop_first is True, False or a number of latents from 2 to 99, got {self.drop_first!r}")

    @property
    def compression(self):
        """(d_t, d_h, d_w): how many frames, rows and columns one latent stands for."""
        space = self.patch * math.prod(f[1] for f in self.up if f)
        return math.prod(f[0] for f in self.up if f), space, space

    def frames(self, t):
        """Frames that `t` latent frames decode to: one for each that `drop_first` means, d_t for each other."""
        return self.feature_shape(BLOCKS[-1], (1, 0, t, 1, 1))[2]

    def feature_shape(self, block, latent_shape):
        """Shape of a block's output for latents of shape (B, C, t, h, w)."""
        B, _, t, h, w = latent_shape
        depth = BLOCKS.index(block)
        firsts = int(self.drop_first) if isinstance(self.drop_first, bool) else -(-t // self.drop_first)
        for r_t, r_s in (f for f in self.up[:depth] if f):
            t, h, w = r_t * t - (r_t - 1) * firsts, r_s * h, r_s * w
        return B, self.widths[depth], t, h, w


CONFIGS = {
    "ltx": TurboVAEDConfig(
        latent_channels=128, widths=(512, 512, 256, 128, 64), resnets=(1, 1, 3, 2, 3),
        up=(None, (2, 2), (2, 2), (2, 2)), patch=4, drop_first=True),
    "dc": TurboVAEDConfig(
        latent_channels=128, widths=(512, 512, 256, 128, 64), resnets=(4, 3, 3, 3, 4),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=4, drop_first=False),
    "hunyuan": TurboVAEDConfig(
        latent_channels=16, widths=(512, 512, 256, 32, 16), resnets=(5, 4, 4, 4, 5),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=1, drop_first=True),
    # of the embedded teacher
    "tiny": TurboVAEDConfig(
        latent_channels=32, widths=(96, 96, 64, 32, 32), resnets=(1, 1, 2, 2, 0),
        up=(None, (2, 2), (2, 1), (1, 2)), patch=2, drop_first=False, separable=("mid", "up0", "up1"), kernel=3),
}
CONFIGS["cog"] = CONFIGS["hunyuan"]     # one network, trained on two teachers' latents
# Ours, by the paper's rules: 17 to 30 % of the teacher's decoder (of 73.3, 555.0, 528.4 and 871.3 M parameters).
CONFIGS["wan21"] = replace(CONFIGS["hunyuan"], widths=(384, 384, 192, 32, 16), resnets=(3, 3, 3, 3, 4))
CONFIGS["wan22"] = replace(CONFIGS["hunyuan"], latent_channels=48, widths=(768, 768, 384, 64, 32),
                           resnets=(5, 4, 5, 4, 5), patch=2)
CONFIGS["ltx2"] = replace(CONFIGS["ltx"], widths=(768, 768, 384, 192, 64), resnets=(2, 2, 3, 2, 3))
CONFIGS["hunyuan15"] = replace(CONFIGS["hunyuan"], latent_channels=32, widths=(1024, 1024, 512, 64, 32), patch=2)
CONFIGS["ltx23"] = CONFIGS["ltx25"] = CONFIGS["ltx2"]       # 22.9 % of a decoder of 407.2 M, 22.3 % of one of 417.1 M
CONFIGS["ltx095"] = CONFIGS["ltx"]
CONFIGS["h3"] = replace(CONFIGS["wan22"], latent_channels=24, drop_first=5)     # 7 % of a ViT's arithmetic (2,424 M)
CONFIGS["qwen"] = CONFIGS["wan21"]      # Qwen-Image's encoder, and so its latents, are Wan 2.1's

PUBLISHED = {"ltx": "Turbo-VAED-LTX.pth", "dc": "Turbo-VAED-DC.pth",
             "hunyuan": "Turbo-VAED-Hunyuan.pth", "cog": "Turbo-VAED-Cog.pth"}
SAME_LATENTS = {"qwen": ("wan21",), "ltx23": ("ltx25",), "ltx25": ("ltx23",)}      # qwen's students know images only
OWN_FILE = "student.safetensors"
SHIPPED = Path(__file__).resolve().parent / "assets/tiny_student.safetensors"


# ---------- Layers. Their attribute names are those of the published checkpoints' keys.

class Context:
    """Where a layer's frames stand in their clip, which may come in chunks, and what it keeps for the next chunk.

    `kept` is a queue: each place in a layer takes its frames from the front and puts the next ones at the end.
    """

    def __init__(self, first=True, last=True, kept=()):
        self.first, self.last, self.kept = first, last, list(kept)


WHOLE = Context()       # of whole clips: it keeps nothing


def pad_time(x, n, context=WHOLE):
    """Repeat the first and the last frame n times each: (B, C, T, H, W) -> (B, C, T + 2n, H, W).

    Within a stream the 2n frames before x come first instead. Slices, since an expanded tensor would cost x its layout.
    """
    if not n:
        return x
    frames = [x[:, :, :1]] * n if context.first else [context.kept.pop(0)]
    frames += [x] if x.shape[2] else []         # the end of a stream may bring no more frames
    frames += [frames[-1][:, :, -1:]] * n if context.last else []
    x = torch.cat(frames, dim=2)
    if not context.last:
        context.kept.append(x[:, :, -2 * n:].clone())
    return x


def align_shortcut(h, x, context):
    """The frames of x that stand beside h, which is computed from x. In a stream h runs late: x's other frames wait."""
    if not context.first:
        x = torch.cat([context.kept.pop(0), x], dim=2)
    if context.last:
        return x
    context.kept.append(x[:, :, h.shape[2]:].clone())
    return x[:, :, :h.shape[2]]


def rms_norm(x, eps=1e-8):
    """x / rms(x) over channels. The mean is taken in float32: in float16 eps is zero and the square of 256 infinite."""
    return x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps).to(x.dtype)


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: list[int], groups: int) -> torch.Tensor:
    return torch.mkldnn_convolution(x, weight, bias, padding, [1] * 3, [1] * 3, groups).contiguous()


compiled_onednn = torch.library.custom_op("turbo_vaed::onednn", onednn, mutates_args=())      # its first call takes 2 s
compiled_onednn.register_fake(lambda x, weight, bias, padding, groups:
                              F.conv3d(x, weight, bias, 1, padding, 1, groups).contiguous())


def convolve(conv, x):
    """conv(x). Without gradients, on a CPU in float32, by oneDNN: PyTorch takes a slow kernel for small clips."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    here = x.device.type == "cpu" and ONEDNN and not torch.compiler.is_exporting()
    fits = x.dtype == torch.float32 and x.is_contiguous() and not torch.is_autocast_enabled("cpu")
    if gradient or not here or not fits:
        return conv(x)
    run = compiled_onednn if torch.compiler.is_compiling() else onednn
    return run(x, conv.weight, conv.bias, conv.padding, conv.groups)


# `reach` of a layer maps an output radius r to the input radius that it needs, in frames (axis 0) or pixels (axis 1).
class Conv3d(nn.Module):
    """3D convolution: zeros around each frame, first and last frame repeated in time (the decoder is not causal)."""

    def __init__(self, c_in, c_out, kernel=3):
        super().__init__()
        self.pad = kernel // 2
        self.conv = nn.Conv3d(c_in, c_out, kernel, padding=(0, self.pad, self.pad))

    def forward(self, x, context=WHOLE):
        return convolve(self.conv, pad_time(x, self.pad, context))

    def reach(self, r, axis):
        return r + self.pad


class SeparableConv3d(nn.Module):
    """3D depthwise separable convolution (Equations 1 and 2), padded as Conv3d is."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.pad = kernel // 2
        self.depthwise_conv = nn.Conv3d(c_in, c_in, kernel, padding=(0, self.pad, self.pad), groups=c_in)
        self.pointwise_conv = nn.Conv3d(c_in, c_out, 1)

    def forward(self, x, context=WHOLE):
        return convolve(self.pointwise_conv, convolve(self.depthwise_conv, pad_time(x, self.pad, context)))

    reach = Conv3d.reach


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over dimension 1 of (B, C, T, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Resnet(nn.Module):
    """Norm, activation, conv, twice, beside a shortcut that is learned where the width changes."""

    def __init__(self, c_in, c_out, conv, activation=F.silu):
        super().__init__()
        self.activation = activation
        self.conv1 = conv(c_in, c_out)
        self.conv2 = conv(c_out, c_out)
        if c_in != c_out:
            self.norm3 = ChannelNorm(c_in, eps=1e-6)
            self.conv_shortcut = Conv3d(c_in, c_out, kernel=1)

    def forward(self, x, context=WHOLE):
        h = self.conv1(self.activation(rms_norm(x)), context)
        h = self.conv2(F.silu(rms_norm(h)), context)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(self.norm3(x))
        x = align_shortcut(h, x, context)
        return h + x    # in this order the sum keeps h's memory format: ChannelNorm's output is always channels-last

    def reach(self, r, axis):
        return self.conv1.reach(self.conv2.reach(r, axis), axis)


def decoupled_pixel_shuffle(x, r_t, r_s):
    """Time, then space (Section 3.3): (B, C r_s² r_t, T, H, W) -> (B, C, r_t T, r_s H, r_s W).

    Time: channel c r_t + k of frame t becomes channel c of frame r_t t + k. Space: Equation 3 up to a permutation of
    channels. Tensors have five dimensions at most, the limit of phones' compilers.
    """
    B, C, T, H, W = x.shape
    frames = x.reshape(B, C // r_t, r_t, T, H * W).permute(0, 3, 2, 1, 4)              # (B, T, r_t, C r_s², H W)
    frames = F.pixel_shuffle(frames.reshape(B * T * r_t, C // r_t, H, W), r_s)
    return frames.unflatten(0, (B, T * r_t)).transpose(1, 2)


def pixel_shuffle_3d(x, r_t, r_s):
    """Both at once, channels in order (C, r_t, r_h, r_w): the shuffle above after a permutation of channels."""
    x = x.unflatten(1, (-1, r_t, r_s ** 2)).transpose(2, 3).flatten(1, 3)
    return decoupled_pixel_shuffle(x, r_t, r_s)


class Upsampler(nn.Module):
    """Upsample by (time, space) factors, in one of Table 1's three ways.

    Two convolve to r_t r_s² times the channels and shuffle; "interpolate" repeats each value (nearest neighbour, as
    Hunyuan-VAE and CogVideoX-VAE do), then convolves at the same width.
    """

    def __init__(self, width, factors, conv, upsampling, drop_first):
        super().__init__()
        self.factors, self.upsampling = factors, upsampling
        self.drop = factors[0] - 1 if drop_first else 0
        self.group = factors[0] * drop_first if drop_first > 1 else None        # upsampled frames, with those to drop
        self.pixels = 1 if upsampling == "interpolate" else factors[0] * factors[1] ** 2   # that a shuffle makes of one
        self.conv = conv(width, width * self.pixels)

    def forward(self, x, context=WHOLE):
        r_t, r_s = self.factors
        if self.upsampling == "interpolate":
            x = F.interpolate(x, scale_factor=(r_t, r_s, r_s))
            return self.conv(self.drop_frames(x, context), context)
        x = self.conv(x, context)
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
        x = (decoupled_pixel_shuffle if self.upsampling == "decoupled" else pixel_shuffle_3d)(x, r_t, r_s)
        x = x.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
        return self.drop_frames(x, context)

    def drop_frames(self, x, context):
        """x without first frames. In a stream the place where x begins in its group is kept."""
        if not self.drop or not (context.first or self.group):
            return x
        start = 0 if context.first else context.kept.pop(0)
        pieces = [x[:, :, piece] for piece in self.left(x.shape[2], start)]
        if self.group and not context.last:
            context.kept.append((start + x.shape[2]) % self.group)
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def left(self, n, start=0):
        """Slices of n upsampled frames that are not dropped; the first of the n is number `start` of its group."""
        group = self.group or sys.maxsize
        return [slice(max(0, i + self.drop), i + group) for i in range(-start, max(1, n), group)]

    def reach(self, r, axis):
        if self.upsampling == "interpolate":
            return self.inputs(self.conv.reach(r, axis), axis)
        return self.conv.reach(self.inputs(r, axis), axis)

    def inputs(self, r, axis):
        """How many inputs r outputs in a row come from, at most: in every group frames were dropped."""
        dropped = 0 if axis or not self.group else -(-r // (self.group - self.drop)) * self.drop
        return -(-(r + dropped) // self.factors[axis])


class Block(nn.Module):
    """To a new width, to a new size, then resnets; the first two only where the configuration asks for them."""

    def __init__(self, c_in, c_out, resnets, conv, upsampler=None):
        super().__init__()
        self.conv_in = Resnet(c_in, c_out, conv) if c_in != c_out else nn.Identity()
        self.upsamplers = nn.Sequential(*[upsampler] if upsampler else [])
        activation = F.relu if upsampler else F.silu      # as published: ReLU comes first after an upsampler
        self.resnets = nn.Sequential(*[Resnet(c_out, c_out, conv, activation) for _ in range(resnets)])

    def forward(self, x):
        return self.resnets(self.upsamplers(self.conv_in(x)))


class Upsampler2d(nn.Module):
    """One doubling of the frames' size at the cost of three quarters of the width: (N, C, H, W) -> (N, C/4, 2H, 2W)."""

    def __init__(self, width):
        super().__init__()
        self.pixels = 4
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.conv(F.silu(rms_norm(x))), 2)

    def reach(self, r, axis):
        return -(-r // 2) + 1 if axis else r


# ---------- The decoder.

def channels_last(module):
    """Lay out 3D and 2D convolutions for channels-last tensors, fast on GPUs; `.to` takes one format only."""
    for p in module.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d if p.ndim == 5 else torch.channels_last)
    return module


class TurboVAED(nn.Module):
    """The student (Figure 4): conv in, mid, four up blocks, out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.metadata = {}      # what a loaded file says of itself besides its configuration
        self.checkpointing = False      # True: training recomputes each block in its backward pass
        self.compiles = None            # what optimize_for_inference was asked to compile with
        widths = config.widths
        conv = [partial(SeparableConv3d, kernel=config.kernel) if name in config.separable else Conv3d
                for name in BLOCKS]
        self.conv_in = Conv3d(config.latent_channels, widths[0])
        self.mid_block = Block(widths[0], widths[0], config.resnets[0], conv[0])
        self.up_blocks = nn.ModuleList()
        for i, factors in enumerate(config.up, start=1):
            drop_first = config.feature_shape(BLOCKS[i - 1], (1, 0, config.drop_first, 1, 1))[2]    # in its own frames
            upsampler = factors and Upsampler(widths[i], factors, conv[i], config.upsampling, drop_first)
            self.up_blocks.append(Block(widths[i - 1], widths[i], config.resnets[i], conv[i], upsampler))
        for i in range(config.patch // 2):
            setattr(self, f"upsampler2d_{i + 1}", Upsampler2d(widths[-1] // 4 ** i))
        self.conv_out = Conv3d(widths[-1] // config.patch ** 2, 3)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Start as a smooth, sharp upsampler: no biases, residual branches at a tenth of PyTorch's weights.

        All pixels that a shuffle makes of one begin with equal weights, as nearest neighbour. Other convolutions begin
        nearly pointwise: neighbours have a tenth of PyTorch's weights, the centre keeps the variance. A quarter of the
        last norm's few channels start constant, so that amplitude, and with it colour, comes through.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        for layer in (*self.layers(), *self.upsamplers2d(), self.conv_out):
            if isinstance(layer, Resnet):
                list(layer.conv2.parameters())[-2].mul_(0.1)
                continue
            if isinstance(layer, (Upsampler, Upsampler2d)):
                weight, n = list(layer.conv.parameters())[-2], layer.pixels
                weight.copy_(weight[::n].repeat_interleave(n, 0))
            for weight in layer.parameters():
                if weight.ndim > 1:
                    place = ..., *(size // 2 for size in weight.shape[2:])
                    centre = weight[place] * weight[0, 0].numel() ** 0.5
                    weight.mul_(0.1)
                    weight[place] = centre
        for last in self.upsamplers2d()[-1:]:       # where the last norm's channels come from; a quarter are its scale
            last.conv.bias[:len(last.conv.bias) // last.pixels // 4 * last.pixels] = 2

    def forward(self, latents, return_features=False):
        """Decode latents (B, C, t, h, w) to video (B, 3, T, H, W), in about [-1, 1] but not clamped.

        latents are what the teacher's encoder gives, no scaling factor applied. return_features=True also returns the
        blocks' outputs as a dict with the keys "mid", "up0" ... "up3"; a tuple of names returns those only. Raises
        ValueError on other shapes.
        """
        self.check(latents)
        wanted = BLOCKS if return_features is True else return_features or ()
        x, features = self.conv_in(latents), {}
        for name, block in zip(BLOCKS, (self.mid_block, *self.up_blocks)):
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            if name in wanted:
                features[name] = x
        video = self.out(x)
        return (video, features) if return_features else video

    def out(self, x, context=WHOLE):
        """The last block's features to video."""
        if self.upsamplers2d():                          # frame by frame to full size
            B, x = x.shape[0], x.transpose(1, 2).flatten(0, 1)
            for upsampler in self.upsamplers2d():
                x = upsampler(x)
            x = x.unflatten(0, (B, -1)).transpose(1, 2)
        return self.conv_out(F.silu(rms_norm(x)), context)

    def upsamplers2d(self):
        return [getattr(self, name) for name in ("upsampler2d_1", "upsampler2d_2") if hasattr(self, name)]

    def check(self, latents):
        """Raise ValueError unless these are latents of this student, in its precision."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, t, h, w), got {tuple(latents.shape)}")
        if latents.dtype != self.dtype and not torch.is_autocast_enabled(self.device.type):
            raise ValueError(f"the student takes tensors of {self.dtype}, not {latents.dtype}: convert with .to(dtype)")

    channels_last = channels_last       # as a method
    # what diffusers' hooks ask of a model
    dtype = property(lambda self: self.conv_in.conv.weight.dtype)
    device = property(lambda self: self.conv_in.conv.weight.device)
    get_memory_footprint = lambda self: sum(p.nbytes for p in self.parameters())

    def layers(self):
        """What forward runs through before `out`, one after the other."""
        blocks = [layer for block in (self.mid_block, *self.up_blocks)
                  for layer in (block.conv_in, *block.upsamplers, *block.resnets)]
        return [self.conv_in, *(layer for layer in blocks if not isinstance(layer, nn.Identity))]

    def reach(self, axis):
        """How many latents to each side of its own a frame (axis 0) or, in rows and columns, a pixel (1) depends on."""
        r = self.conv_out.reach(0, axis)
        for layer in reversed([*self.layers(), *self.upsamplers2d()]):
            r = layer.reach(r, axis)
        return r

    def stream(self, chunks):
        """Decode a clip of any length that comes in chunks: an iterable of latents (B, C, n, h, w), any n from 1 on.

        Generates the frames (B, 3, m, H, W), each as soon as the latents that it depends on are there. Together they
        are model(latents), without overlap, blending or recomputation, in memory that does not grow. No gradients.
        """
        stream = self.streamer()
        for latents in chunks:
            yield from stream.run(latents)
        yield from stream.run(last=True)

    def streamer(self):
        """The same by hand: stream = model.streamer(); frames = stream(latents), and so on; rest = stream.flush()."""
        return Stream(self)

    def step(self, latents, kept):
        """A chunk (B, C, n, h, w) in the middle of a stream as a plain function, to be compiled.

        kept: for each of `layers` and for `out` its Context's `kept`. Returns (frames (B, 3, d_t n, H, W),
        kept for the next chunk). Every layer must have begun.
        """
        contexts = [Context(False, False, frames) for frames in kept]
        for layer, context in zip((*self.layers(), self.out), contexts):
            latents = layer(latents, context)
        return latents, [context.kept for context in contexts]

    @torch.no_grad()
    def decode(self, latents, chunk=None, tile=None):
        """model(latents) in bounded memory: (B, C, t, h, w) -> (B, 3, T, H, W). No gradients.

        chunk: latent frames at a time, exactly as `stream`. None: as many as keep every layer's output below LARGE
        numbers. tile: latents at a time in space, (rows, columns) or one number for both. Tiles overlap: they are exact
        where a side is above twice `reach(1)`. Smaller ones have seams, and a warning says so. Raises ValueError.
        """
        self.check(latents)
        B, _, t, h, w = latents.shape
        tile = tile if isinstance(tile, (tuple, list)) else (tile, tile)
        if len(tile) != 2 or any(n is not None and n < 1 for n in (chunk, *tile)):
            raise ValueError(f"chunk is a number of latents from 1 on, tile one or two; got {chunk} and {tile}")
        for axis, side in zip((3, 4), tile):
            if side and side < latents.shape[axis]:
                return self.decode_tiles(latents, chunk, tile, axis, side)
        chunk = chunk or max(1, LARGE // self.largest(B, h, w))
        if chunk >= t:
            return self.clone_if_cuda_graph(self(latents))
        stream, video, done = self.streamer(), None, 0
        for i in range(0, t, chunk):
            for frames in stream.run(latents[:, :, i:i + chunk], last=i + chunk >= t):
                if video is None:
                    video = frames.new_empty(B, 3, self.config.frames(t), *frames.shape[3:])
                video[:, :, done:done + frames.shape[2]] = frames
                done += frames.shape[2]
        return video

    def decode_tiles(self, latents, chunk, tile, axis, side):
        """Decode tiles of `side` latents along an axis, and join what is kept of each."""
        n, scale, reach = latents.shape[axis], self.config.compression[2], self.reach(1)
        halo = reach if side > 2 * reach else side // 4
        if halo < reach:
            warnings.warn(f"tiles of {side} latents are not exact at their seams: above {2 * reach} they are")
        parts, kept = [], 0
        while kept < n:
            start = max(0, kept - halo)
            stop = min(start + side, n)
            end = stop - halo if stop < n else n
            video = self.decode(latents.narrow(axis, start, stop - start), chunk, tile)
            parts.append(video.narrow(axis, scale * (kept - start), scale * (end - kept)).clone())
            kept = end
        return torch.cat(parts, axis)

    def largest(self, B, h, w):
        """Numbers that one latent frame adds to the largest output of a layer."""
        numbers = lambda block, t: math.prod(self.config.feature_shape(block, (B, 0, t, h, w)))
        return max(numbers(block, 2) - numbers(block, 1) for block in BLOCKS)

    def optimize_for_inference(self, dtype=None, compile=True):
        """Make this student decode as fast as it can where it is, in place; returns it. It cannot be trained any more.

        dtype: float16, bfloat16, or None for its own. compile: True, or a mode of torch.compile; "reduce-overhead"
        replays CUDA graphs: there the next model(latents) overwrites the last one's video. Compiled, anew for each size
        and for minutes at first, are model(latents) and the middle of a stream.
        """
        self.to(dtype=dtype).eval().requires_grad_(False)
        if next(self.parameters()).is_cuda:
            self.channels_last()
        self.compiles = self._compiled_call_impl = None
        if compile:
            self.compile(dynamic=False, mode=None if compile is True else compile)
        return self

    def compile(self, **options):
        """nn.Module's, for more sizes than the 8 that PyTorch stops at; copies of the student are compiled as well."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.compiles = options
        super().compile(**options)

    def __setstate__(self, state):
        """A copy, or what comes out of a pickle, is compiled if the original was."""
        super().__setstate__(state)
        if self.compiles is not None:
            self.compile(**self.compiles)

    def clone_if_cuda_graph(self, x):
        """x in memory of its own: what comes out of a CUDA graph is overwritten when that is replayed."""
        return x.clone() if (self.compiles or {}).get("mode") and torch.is_tensor(x) else x

    def save_pretrained(self, path, metadata=None):
        """Write weights and configuration to one .safetensors file and return its path.

        path is that file, or a folder, which gets `student.safetensors`. metadata (str -> str) adds to the model's own
        and comes back as `model.metadata`. A crash leaves no half file.
        """
        from safetensors.torch import save
        path = Path(path).expanduser()
        if path.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
            raise ValueError(f"{path}: students are written as .safetensors; name such a file, or a folder")
        path = path if path.suffix.lower() == ".safetensors" else path / OWN_FILE
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        about = {**self.metadata, **(metadata or {}), "config": json.dumps(asdict(self.config))}
        with atomically(path) as file:
            file.write_bytes(save(state, about))        # not save_file: what that writes only its owner may read
        return path

    @classmethod
    def from_pretrained(cls, path, config=None):
        """Read a student in float32 on the CPU: ours, or a published Turbo-VAED checkpoint.

        path: a file that save_pretrained wrote, or a folder with one; a state dict, `.pth` or `.safetensors`, also as
        training scripts wrap it; or a hub id. config: a TurboVAEDConfig or a name in CONFIGS; None takes the file's
        own, or the first of CONFIGS that fits ("hunyuan" for "cog"). `model.metadata["teacher"]` says whose latents the
        student decodes, if file or config do. Raises FileNotFoundError, or ValueError that says what does not fit.
        """
        name = config if isinstance(config, str) else None
        if name and name not in CONFIGS:
            raise ValueError(f"no configuration {name!r}; there are {', '.join(CONFIGS)}")
        config, file = CONFIGS.get(name, config), find_checkpoint(path, name)
        try:
            state, metadata = read_checkpoint(file)
            teacher = name or next((n for n in PUBLISHED if PUBLISHED[n] == file.name), None)
            if teacher:
                metadata.setdefault("teacher", teacher)
            if "config" in metadata:
                fields = json.loads(metadata.pop("config"))
                for old in ("shortcut", "head"):
                    fields.pop(old, None)
                written = TurboVAEDConfig(**fields)
                if config not in (None, written):
                    raise ValueError(f"was written as {config_name(written)}, not as {config_name(config)}")
                config = written
            config = config or CONFIGS[nearest(state)]
            wrong = differences(cls, config, state)
            if wrong:
                raise ValueError(f"does not fit {config_name(config)}, {len(wrong)} differences: "
                                 f"{'; '.join(wrong[:3])}; the nearest is config=\"{nearest(state)}\"")
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: {summary(error)}") from None
        with torch.device("meta"):      # the weights are the file's
            model = cls(config)
        model.load_state_dict(state, assign=True)
        model.metadata = metadata
        return model


class Stream:
    """One clip on its way through a student, in chunks: what `student.streamer()` returns.

    stream(latents) takes the next (B, C, n, h, w), n > 0, and returns the frames (B, 3, m, H, W) that are known by now.
    stream.flush() ends the clip and returns the rest. Frames come `delay` latents late. Raises ValueError.
    """

    def __init__(self, student):
        self.student, self.delay, self.closed = student, student.reach(0), False
        self.latents = None             # none of the clip's, but of their shape
        self.longest = self.latest = 0  # latent frames of the longest and of the latest chunk
        self.steps, rate = [], 1        # (layer, frames that it looks ahead, frames it gets for a latent, its context)
        for layer in (*student.layers(), student.out):
            ahead = getattr(layer, "reach", student.conv_out.reach)(0, 0)
            self.steps.append((layer, ahead, rate, Context(last=False)))
            rate *= getattr(layer, "factors", (1, 1))[0]

    def __call__(self, latents=None, last=False):
        frames = list(self.run(latents, last))
        B, _, _, h, w = self.latents.shape
        _, d_h, d_w = self.student.config.compression
        return torch.cat(frames or [self.latents.new_empty(B, 3, 0, d_h * h, d_w * w)], dim=2)

    def flush(self):
        return self(last=True)

    @torch.no_grad()
    def run(self, latents=None, last=False):
        """Generate the frames that become known with these latents, about a chunk's worth at a time; last: the end."""
        if self.closed:
            raise ValueError("this stream has ended, or was interrupted within a chunk: begin a new one")
        if latents is not None:
            self.student.check(latents)
            none = latents[:, :, :0].clone()        # of its own: a view would keep the whole chunk alive
            if self.latents is not None and none.shape != self.latents.shape:
                raise ValueError(f"the latents of a stream have one size; got {tuple(latents.shape)} "
                                 f"after {tuple(self.latents.shape)}")
            self.latents = none
        elif self.latents is None:
            raise ValueError("no latents were given")
        latents = self.latents if latents is None else latents
        before, self.latest = self.latest, latents.shape[2]
        self.longest, self.closed = max(self.longest, self.latest), True
        contexts = [context for *_, context in self.steps]
        begun = not last and not any(context.first for context in contexts)
        if self.student.compiles and begun and before == self.latest:       # each length compiles: only one that recurs
            step = torch.compile(self.student.step, **self.student.compiles)
            frames, kept = step(latents, [context.kept for context in contexts])
            for context, tensors in zip(contexts, kept):
                context.kept = [self.student.clone_if_cuda_graph(x) for x in tensors]
            yield self.student.clone_if_cuda_graph(frames)
        else:
            yield from self.through(0, latents, last)
        self.closed = last

    def through(self, i, x, last):
        """Generate the frames of video that x, the next input frames of step i, becomes; last: x ends the clip.

        A layer begins when it has enough for its first frame. Then it gives as many frames as it gets, and at the end
        those that it looks ahead as well. More than a chunk's worth goes on in pieces, so that the end needs no more
        memory than the middle.
        """
        if i == len(self.steps):
            yield x
            return
        layer, ahead, rate, context = self.steps[i]
        length = self.longest * rate
        if context.first:
            x, context.kept, length = torch.cat([*context.kept, x], dim=2), [], length + ahead
            if x.shape[2] <= ahead and not last:
                context.kept = [x]
                return
        while x.shape[2] > length:
            yield from self.through(i, x[:, :, :length], False)
            x, length = x[:, :, length:], self.longest * rate
        context.last = last
        x = layer(x, context)
        context.first = False           # only now: for every convolution of the layer
        yield from self.through(i + 1, x, last)


def check_fit(student, what, teachers, channels, compression, images, who="the student"):
    """Raise ValueError unless `student` decodes the latents of `what`, which are of one of `teachers` (if not empty).

    channels and compression (d_t, d_h, d_w) may be None for not known; `images` is drop_first. Returns what was assumed
    where latents of one shape may mean different things, or None.
    """
    config, teacher, wrong = student.config, student.metadata.get("teacher"), []
    teachers = [*teachers, *(other for name in teachers for other in SAME_LATENTS.get(name, ()))]
    if channels not in (None, config.latent_channels):
        wrong.append(f"decodes {config.latent_channels} latent channels, not {channels}")
    if compression not in (None, config.compression):
        wrong.append(f"has compression {config.compression}, not {compression}")
    elif config.drop_first != images and config.compression[0] > 1:
        wrong.append(f"{'drops' if config.drop_first else 'keeps'} first frames: 6 latent frames would be "
                     f"{config.frames(6)} frames, not {replace(config, drop_first=images).frames(6)}")
    if teacher and teachers and teacher not in teachers:
        wrong.append(f"was made for latents of {teacher}, not {' or '.join(teachers)}")
    if wrong:
        raise ValueError(f"{who} does not fit {what}: it {', it '.join(wrong)}")
    if teacher and teachers:
        return None
    said = f"was made for latents of {teacher}" if teacher else "does not say whose latents it was made for"
    return f"{who} {said}: assumed are those of {what}"


# ---------- Checkpoints.

def config_name(config):
    """Its name in CONFIGS in quotes, else all of it."""
    return next((f'"{name}"' for name, preset in CONFIGS.items() if preset == config), str(config))


def find_checkpoint(path, config):
    """The file that `path` means: itself, the one in that folder, or in that hub repository (of this configuration)."""
    file = Path(path).expanduser()
    names = [OWN_FILE, PUBLISHED[config]] if config in PUBLISHED else [OWN_FILE]
    for candidate in (file, *(file / name for name in names)):
        if candidate.is_file():
            return candidate
    if file.is_dir():
        raise FileNotFoundError(f"{path}: this folder holds no {' nor '.join(names)}; name a file")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)(?<!\.pth)(?<!\.pt)", str(path)):     # a hub id
        raise FileNotFoundError(f"{path}: no such file or folder")
    for name in names:
        try:
            from huggingface_hub import hf_hub_download
            return Path(hf_hub_download(str(path), name))
        except Exception as error:      # a dozen classes, from no network to no such repository: all mean "not there"
            reason = summary(error)
    raise FileNotFoundError(f"{path}: no such file or folder, nor did the hub give its {' or '.join(names)}: {reason} "
                            f"(published students need config=, one of {', '.join(PUBLISHED)})")


def read_checkpoint(file):
    """(the decoder's state dict in float32, metadata) of a .safetensors file or a PyTorch one, not unpickled."""
    start, metadata = file.open("rb").read(9), {}
    if start and start.isascii() and b"\0" not in start:
        raise ValueError("text, not weights: a Git LFS pointer (`git lfs pull`), an index of shards or a page")
    try:
        if start[8:] == b"{":           # safetensors, whatever its name
            from safetensors import safe_open
            with safe_open(file, framework="pt") as f:
                metadata = dict(f.metadata() or {})
                state = {key: f.get_tensor(key) for key in f.keys()}
        else:
            state = flat(torch.load(file, map_location="cpu", weights_only=True))
    except ImportError:
        raise
    except Exception:       # damage may raise nearly anything, and PyTorch's words would send the user to unpickle it
        raise ValueError("truncated, or holds more than names and tensors; it was not unpickled") from None
    if not state:
        raise ValueError("holds no state dict (names and tensors)")
    keys = take_decoder(state)
    if len(keys) < len(state):
        print(f"{file}: took the decoder's {len(keys)} of {len(state)} tensors", file=sys.stderr)
    for name, key in keys.items():
        if not state[key].is_floating_point() or not state[key].float().isfinite().all():
            raise ValueError(f"{name} holds values that are not finite, or no floating-point numbers")
    return {name: state[key].float() for name, key in keys.items()}, metadata


def flat(tree, path=()):
    """{names joined by dots: tensor} of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return {".".join(path): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in flat(value, (*path, str(key))).items()}


def take_decoder(state):
    """{the decoder's own name of a tensor: its key} in a flat state dict: all keys where there is no decoder.

    A decoder is where a conv_in is. Its EMA weights come first, also those of a list. Raises ValueError where several
    would do.
    """
    # The second line is of optimizers and gradients, which have the weights' names and shapes.
    others = ("encoder|teacher|discriminator|init|initial|"
              "optim|optimizer|optimizers|exp|momentum|grad|grads|gradients")
    has = lambda words, prefix: re.search(rf"(^|[._])({words})[._]", prefix, re.IGNORECASE)
    found = [re.fullmatch(r"(|.*\.)conv_in\.conv\.weight", key) for key in state]
    prefixes = [match[1] for match in found if match and not has(others, match[1])]
    for words in ("ema", "decoder|student"):
        prefixes = [prefix for prefix in prefixes if has(words, prefix)] or prefixes
    if not prefixes:
        return dict(zip(state, state))
    if len(prefixes) > 1:
        raise ValueError(f"holds several decoders ({', '.join(prefixes)}): save the one that is meant by itself")
    inside = re.escape(prefixes[0]) + r"((conv_in|mid_block|up_blocks|upsampler2d_[12]|conv_out)\..*)"
    keys = {match[1]: key for key in state if (match := re.fullmatch(inside, key))}
    averages = [key for key in state if has("ema|shadow", key) and key.split(".")[-1].isdigit()]     # a list's
    if not averages:
        return keys
    shapes = lambda keys: [state[key].shape for key in keys]
    starts = [i for i in range(len(averages)) if shapes(averages[i:i + len(keys)]) == shapes(keys.values())]
    if len(starts) != 1:
        raise ValueError("holds EMA weights as a list that does not fit the decoder: save them by name")
    return dict(zip(keys, averages[starts[0]:]))


def differences(kind, config, state):
    """What keeps a state dict from being such a student's, a few words each; empty if it fits."""
    with torch.device("meta"):          # shapes only
        want = kind(config).state_dict()
    shape = lambda tensors, key: tuple(tensors[key].shape) if key in tensors else "missing"
    return [f"{key} is {shape(state, key)}, should be {shape(want, key)}" for key in {**want, **state}
            if shape(state, key) != shape(want, key)]


def nearest(state):
    """The first of CONFIGS that a state dict fits, or fits best."""
    return min(CONFIGS, key=lambda name: len(differences(TurboVAED, CONFIGS[name], state)))


# ---------- What the commands share.

def number(kind=int, least=1, most=math.inf):
    """An argparse type: a finite `kind` (int or float) from `least` to `most`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            words = f"from {least:g} to {most:g}" if math.isfinite(most) else f"from {least:g}"
            raise argparse.ArgumentTypeError(f"takes a {'whole ' * (kind is int)}number {words}, not {text!r}")
        return value
    return convert


def parse_size(text):
    """An argparse type: pixels, "512" or "720x1280" (height x width) -> (height, width)."""
    sides = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"takes HEIGHTxWIDTH in pixels, such as 512 or 720x1280, not {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def find_device(name):
    """The torch.device of that name; "cuda" is a process's own GPU under torchrun. RuntimeError if it is not there."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    torch.empty(0, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)           # what PyTorch or a pipeline allocates without saying where
    return device


def choose_student(path=None, config=None, say=print):
    """(label, student) of a file, folder or hub id. None: the student trained last under out/, else the shipped one.

    The label is the path from here. metadata["teacher"] says whose latents the student decodes.
    """
    if path is None:
        path = max(Path("out").glob(f"[!.]*/{OWN_FILE}"), key=lambda file: file.stat().st_mtime, default=SHIPPED)
        say(f"the student {path}" if path != SHIPPED else f"no student in out/: the shipped one, {path.name}")
    student = TurboVAED.from_pretrained(path, config)
    if "teacher" not in student.metadata:
        student.metadata["teacher"] = next((n for n, c in CONFIGS.items() if c == student.config), "student")
        say(f"{path} does not say which teacher it was made for: by its size, {student.metadata['teacher']}")
    file = Path(path).absolute()
    file = file.parent if file.name == OWN_FILE else file
    return os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(path), student


def weights_hash(module):
    """The SHA-256 of the names and float32 values of a module's state dict, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def atomically(path):
    """Yields a path beside `path`, of a file or a folder: renamed to it when the block ends well, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:80]}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def check_writable(folder):
    """Make `folder`, and raise OSError before anything is computed for it if nothing can be written there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def text_table(rows, left=("model",), markdown=False):
    """Rows of cells as text, headings first. Columns align to the right, those of the headings `left` to the left."""
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    columns = []
    for heading, *cells in zip(*rows):
        width, side = max(map(len, (heading, *cells))), "<" if heading in left else ">"
        columns.append([f"{cell:{side}{width}}" for cell in (heading, "-" * width, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def summary(error):
    """The first sentence of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def out_of_memory(error):
    """Whether an exception says so; on a CPU PyTorch has no class of its own for it."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "buffer size")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


def run_command(main, less):
    """main(), with one line for what a user can mend; less: what needs less memory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: what is half written is removed
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: stopped")
    except (OSError, ValueError, RuntimeError, KeyError, MemoryError, ImportError, pickle.UnpicklingError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        sys.exit(f"error: out of memory: {less}" if out_of_memory(error) else f"error: {kind}{summary(error)}")
