"""Turbo-VAED's student: a light decoder for the latents of a heavy video VAE, whole in this file.

    python model.py                                       # the family: parameters, compression, arithmetic

    model = TurboVAED(CONFIGS["ltx"])                     # to train
    model = TurboVAED.from_pretrained("out/ltx")          # ours: a training run's folder, or one .safetensors
    model = TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="ltx")      # published, from the hub
    video = model(latents)                                # (B, C, t, h, w) -> (B, 3, T, H, W) in about [-1, 1]
    for frames in model.stream(chunks): ...               # the same, as soon as they are known, from chunks of latents
    video = model.decode(latents, max_memory=8)           # the same video within 8 GB
    model.optimize_for_inference()                        # compiled, and what else makes it fast

Needs PyTorch, and safetensors where such a file is read or written. Section, figure and table numbers are those of the
Turbo-VAED paper.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from operator import index
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BLOCKS = ("mid", "up0", "up1", "up2", "up3")
UPSAMPLING = ("decoupled", "pixel_shuffle_3d", "interpolate")
ONEDNN = torch.backends.mkldnn.is_available()
LARGE = 2 ** 27         # numbers in a layer's output, above which `decode` streams if it is not told otherwise
LEAST_TILE = 8          # latents to a side, below which `max_memory` takes no tiles: they would be nearly all seam
WORK = 13               # largest outputs that fit into what a layer needs while it runs: measured on CPUs; 8 are live


@dataclass(frozen=True)
class TurboVAEDConfig:
    latent_channels: int                 # channels of the teacher's latents
    widths: tuple                        # channels of mid, up0, up1, up2, up3
    resnets: tuple                       # resnets in mid, up0, up1, up2, up3
    up: tuple                            # (time, space) factors of up0 ... up3; None: the block does not upsample
    patch: int                           # what is left to upsample after up3, in space: 1, 2 or 4
    drop_first: bool                     # a time upsampler drops its first frame(s), so that one latent is one image
    separable: tuple = ("mid", "up0")    # blocks of depthwise separable convolutions, upsampler's included (Figure 2)
    kernel: int = 5                      # of the depthwise convolutions: 3, 5 or 7 (Table 5)
    upsampling: str = "decoupled"        # or "pixel_shuffle_3d", "interpolate" (Table 1), "resample" (see Resampler)
    shortcut: str = "layer"              # norm before a learned shortcut: LayerNorm, or "rms", where nothing is learned
    head: str = "shuffle"                # the patch: doublings after up3, or "unpatchify", all at once after conv_out

    def __post_init__(self):
        freeze = lambda v: tuple(map(freeze, v)) if isinstance(v, (list, tuple)) else v   # JSON knows lists only
        for name in ("widths", "resnets", "up", "separable"):
            object.__setattr__(self, name, freeze(getattr(self, name)))
        number = lambda v, least=1, most=2 ** 16: type(v) is int and least <= v <= most        # True is no number
        several = lambda v, fits: type(v) is tuple and all(map(fits, v))
        text = lambda v: type(v) is str
        for name, fits, what in (
                ("latent_channels", number, "a number from 1"),
                ("widths", lambda v: several(v, number), "numbers from 1"),
                ("resnets", lambda v: several(v, lambda n: number(n, 0, 256)), "numbers from 0 to 256"),
                ("up", lambda v: several(v, lambda f: f is None or several(f, lambda r: number(r, 0, 16))),
                 "pairs of numbers, or None"),
                ("patch", number, "a number from 1"), ("drop_first", lambda v: type(v) is bool, "True or False"),
                ("separable", lambda v: several(v, text), "names"),
                ("kernel", lambda v: number(v, 1, 31), "a number from 1 to 31"),
                ("upsampling", text, "a name"), ("shortcut", text, "a name"), ("head", text, "a name")):
            if not fits(getattr(self, name)):
                raise ValueError(f"{name} must be {what}, got {str(getattr(self, name))[:80]}")
        for name, length in (("widths", 5), ("resnets", 5), ("up", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} needs {length} entries, got {getattr(self, name)}")
        if any(f is not None and (len(f) != 2 or min(f) < 1 or max(f) == 1) for f in self.up):
            raise ValueError(f"up factors are (time, space), each at least 1, or None; got {self.up}")
        if self.patch not in (1, 2, 4) or self.widths[-1] % self.patch ** 2:
            raise ValueError(f"patch must be 1, 2 or 4 and up3's width a multiple of its square; "
                             f"got patch {self.patch}, width {self.widths[-1]}")
        if not set(self.separable) <= set(BLOCKS):
            raise ValueError(f"separable names blocks among {BLOCKS}, got {self.separable}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        for name, known in (("upsampling", (*UPSAMPLING, "resample")), ("shortcut", ("layer", "rms")),
                            ("head", ("shuffle", "unpatchify"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    @property
    def compression(self):
        """(d_t, d_h, d_w): how many frames, rows and columns one latent stands for."""
        space = self.patch * math.prod(f[1] for f in self.up if f)
        return math.prod(f[0] for f in self.up if f), space, space

    def frames(self, t):
        """Frames that `t` latent frames decode to: d_t (t - 1) + 1 where first frames are dropped, else d_t t."""
        d_t = self.compression[0]
        return d_t * t - (d_t - 1 if self.drop_first else 0)

    def feature_shape(self, block, latent_shape):
        """Shape of a block's output for latents of shape (B, C, t, h, w)."""
        B, _, t, h, w = latent_shape
        depth = BLOCKS.index(block)
        for r_t, r_s in (f for f in self.up[:depth] if f):
            t, h, w = r_t * t - (r_t - 1 if self.drop_first else 0), r_s * h, r_s * w
        return B, self.widths[depth], t, h, w


# hunyuan and cog are one network, trained on two teachers' latents. tiny serves the embedded teacher.
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
    "cog": TurboVAEDConfig(
        latent_channels=16, widths=(512, 512, 256, 32, 16), resnets=(5, 4, 4, 4, 5),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=1, drop_first=True),
    # The next four are ours, by the paper's rules: about 17 to 30 % of the teacher's decoder, depthwise separable mid
    # and up0, decoupled upsampling; 20.21 of 73.3 M, 100.33 of 555.0 M, 93.19 of 528.4 M, 160.40 of 871.3 M parameters.
    "wan21": TurboVAEDConfig(
        latent_channels=16, widths=(384, 384, 192, 32, 16), resnets=(3, 3, 3, 3, 4),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=1, drop_first=True),
    "wan22": TurboVAEDConfig(
        latent_channels=48, widths=(768, 768, 384, 64, 32), resnets=(5, 4, 5, 4, 5),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=2, drop_first=True),
    "ltx2": TurboVAEDConfig(
        latent_channels=128, widths=(768, 768, 384, 192, 64), resnets=(2, 2, 3, 2, 3),
        up=(None, (2, 2), (2, 2), (2, 2)), patch=4, drop_first=True),
    "hunyuan15": TurboVAEDConfig(
        latent_channels=32, widths=(1024, 1024, 512, 64, 32), resnets=(5, 4, 4, 4, 5),
        up=(None, (2, 2), (2, 2), (1, 2)), patch=2, drop_first=True),
    # a student of wan22's latents that others trained (daVinci-MagiHuman, MAGI-2)
    "magihuman": TurboVAEDConfig(
        latent_channels=48, widths=(512, 512, 256, 128, 64), resnets=(3, 3, 2, 2, 2), up=((2, 2), (2, 2), (1, 2), None),
        patch=2, drop_first=True, separable=(), upsampling="resample", shortcut="rms", head="unpatchify"),
    "tiny": TurboVAEDConfig(
        latent_channels=32, widths=(96, 96, 64, 32, 32), resnets=(1, 1, 2, 2, 0),
        up=(None, (2, 2), (2, 1), (1, 2)), patch=2, drop_first=False, separable=("mid", "up0", "up1"), kernel=3),
}
CONFIGS["ltx23"] = CONFIGS["ltx2"]      # 22.9 % of a decoder of 407.2 M
CONFIGS["qwen"] = CONFIGS["wan21"]      # Qwen-Image's encoder, and so its latents, are Wan 2.1's

PUBLISHED = {"ltx": "Turbo-VAED-LTX.pth", "dc": "Turbo-VAED-DC.pth",
             "hunyuan": "Turbo-VAED-Hunyuan.pth", "cog": "Turbo-VAED-Cog.pth"}
OWN_FILE = "student.safetensors"
SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_student.safetensors"
# a key of the decoder's, after a prefix
IN_DECODER = re.compile(r"((?:[^.]+\.)*?)(?:conv_in|mid_block|up_blocks|upsampler2d_[12]|conv_out)\.")


# ---------------------------------------------------------------------------------------------------------------------
# Layers. Their attribute names are those of the published checkpoints' keys.

class Context:
    """Where a layer's frames stand in their clip, and what the layer keeps of the frames before them.

    A clip may come in chunks. Whatever looks n frames ahead then gives its frames n late, and keeps those that it needs
    again. `kept` is a queue: each place in a layer takes its frames from the front and puts the next ones at the end,
    so that after each chunk all stand in the same order. A whole clip is one chunk, first and last: nothing is kept.
    """

    def __init__(self, first=True, last=True, kept=()):
        self.first, self.last, self.kept = first, last, list(kept)


WHOLE = Context()


def pad_time(x, n, context=WHOLE):
    """Repeat the first and the last frame n times each: (B, C, T, H, W) -> (B, C, T + 2n, H, W).

    In a stream this happens at its two ends only; elsewhere the last 2n frames before x come first. A cat of slices,
    because an expanded tensor among them would cost x its channels_last_3d layout.
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


def wait_for(h, x, context):
    """The frames of x that h, made from x, has come to: in a stream h runs late, and the frames ahead are kept."""
    if not context.first:
        x = torch.cat([context.kept.pop(0), x], dim=2)
    if context.last:
        return x
    context.kept.append(x[:, :, h.shape[2]:].clone())
    return x[:, :, :h.shape[2]]


def rms_norm(x, eps=1e-8):
    """x / rms(x) over channels (dimension 1), nothing learned.

    The mean is taken in float32: in float16 the eps is zero and the square of 256 is infinite.
    """
    return x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps).to(x.dtype)


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: list[int], groups: int) -> torch.Tensor:
    """A convolution by oneDNN at any size: PyTorch itself hands small clips to a kernel several times as slow."""
    return torch.mkldnn_convolution(x, weight, bias, padding, [1] * 3, [1] * 3, groups).contiguous()


compiled_onednn = torch.library.custom_op("turbo_vaed::onednn", onednn, mutates_args=())      # its first call takes 2 s


@compiled_onednn.register_fake
def _(x, weight, bias, padding, groups):
    return F.conv3d(x, weight, bias, 1, padding, 1, groups).contiguous()


def convolve(conv, x, context):
    """conv(x); in a stream on a CPU, and in whole clips once optimized for inference, by oneDNN."""
    if context is WHOLE and not hasattr(conv, "optimized") or not ONEDNN:
        return conv(x)
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return conv(x)
    run = compiled_onednn if torch.compiler.is_compiling() else onednn
    return run(x, conv.weight, conv.bias, conv.padding, conv.groups)


# Every layer below says in `reach` how far it looks to each side: from r frames (axis 0) or pixels (axis 1) beside its
# output to so many beside its input.

class Conv3d(nn.Module):
    """3D convolution: zeros around each frame, first and last frame repeated in time (the decoder is not causal)."""

    def __init__(self, c_in, c_out, kernel=3, space=None):
        super().__init__()
        space = space or kernel         # the kernel's height and width
        self.conv = nn.Conv3d(c_in, c_out, (kernel, space, space), padding=(0, space // 2, space // 2))

    def forward(self, x, context=WHOLE):
        return convolve(self.conv, pad_time(x, self.conv.kernel_size[0] // 2, context), context)

    def reach(self, r, axis):
        return r + self.conv.kernel_size[axis] // 2


class SeparableConv3d(nn.Module):
    """3D depthwise separable convolution (Equations 1 and 2), padded as Conv3d is."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.depthwise_conv = nn.Conv3d(c_in, c_in, kernel, padding=(0, kernel // 2, kernel // 2), groups=c_in)
        self.pointwise_conv = nn.Conv3d(c_in, c_out, 1)

    def forward(self, x, context=WHOLE):
        x = pad_time(x, self.depthwise_conv.kernel_size[0] // 2, context)
        return convolve(self.pointwise_conv, convolve(self.depthwise_conv, x, context), context)

    def reach(self, r, axis):
        return r + self.depthwise_conv.kernel_size[0] // 2


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over dimension 1 of (B, C, T, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelRMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x, eps=1e-6)


class Resnet(nn.Module):
    """Norm, activation, conv, twice, beside a shortcut that is learned where the width changes."""

    def __init__(self, c_in, c_out, conv, activation=F.silu, shortcut="layer"):
        super().__init__()
        self.activation = activation
        self.conv1 = conv(c_in, c_out)
        self.conv2 = conv(c_out, c_out)
        if c_in != c_out:
            self.norm3 = ChannelNorm(c_in, eps=1e-6) if shortcut == "layer" else ChannelRMSNorm()
            self.conv_shortcut = Conv3d(c_in, c_out, kernel=1)

    def forward(self, x, context=WHOLE):
        h = self.conv1(self.activation(rms_norm(x)), context)
        h = self.conv2(F.silu(rms_norm(h)), context)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(self.norm3(x))
        x = wait_for(h, x, context)
        return h + x    # in this order the sum keeps h's memory format: ChannelNorm's output is always channels-last

    def reach(self, r, axis):
        return self.conv1.reach(self.conv2.reach(r, axis), axis)


def layout(x):
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def decoupled_pixel_shuffle(x, r_t, r_s):
    """Time, then space (Section 3.3): (B, C r_s² r_t, T, H, W) -> (B, C, r_t T, r_s H, r_s W).

    Time: channel c r_t + k of frame t becomes channel c of frame r_t t + k. Space: the ordinary 2D pixel shuffle of
    each frame, Equation 3 up to a permutation of channels. No tensor on the way has more than five dimensions, the
    limit of phones' compilers.
    """
    B, C, T, H, W = x.shape
    frames = x.reshape(B, C // r_t, r_t, T, H * W).permute(0, 3, 2, 1, 4)              # (B, T, r_t, C r_s², H W)
    frames = F.pixel_shuffle(frames.reshape(B * T * r_t, C // r_t, H, W), r_s)
    return frames.unflatten(0, (B, T * r_t)).transpose(1, 2).contiguous(memory_format=layout(x))


def pixel_shuffle_3d(x, r_t, r_s):
    """Both at once: (B, C r_t r_s², T, H, W) -> (B, C, r_t T, r_s H, r_s W), channels in order (C, r_t, r_h, r_w)."""
    B, C, T, H, W = x.shape
    y = x.reshape(B, C // (r_t * r_s ** 2), r_t, r_s, r_s, T, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.reshape(B, -1, T * r_t, H * r_s, W * r_s).contiguous(memory_format=layout(x))


class Upsampler(nn.Module):
    """Upsample by (time, space) factors, in one of Table 1's three ways.

    "decoupled" and "pixel_shuffle_3d" convolve to r_t r_s² times the channels and shuffle; "interpolate" repeats each
    value (nearest neighbour, as Hunyuan-VAE and CogVideoX-VAE do), then convolves at the same width.
    """

    def __init__(self, width, factors, conv, upsampling, drop_first):
        super().__init__()
        self.factors, self.upsampling = factors, upsampling
        self.drop = factors[0] - 1 if drop_first else 0
        self.pixels = 1 if upsampling == "interpolate" else factors[0] * factors[1] ** 2   # that a shuffle makes of one
        self.conv = conv(width, width * self.pixels)

    def forward(self, x, context=WHOLE):
        r_t, r_s = self.factors
        if self.upsampling == "decoupled":
            x = decoupled_pixel_shuffle(self.conv(x, context), r_t, r_s)
        elif self.upsampling == "pixel_shuffle_3d":
            x = pixel_shuffle_3d(self.conv(x, context), r_t, r_s)
        else:
            x = F.interpolate(x, scale_factor=(r_t, r_s, r_s), mode="nearest")
        x = x[:, :, self.drop:] if self.drop and context.first else x
        return self.conv(x, context) if self.upsampling == "interpolate" else x

    def reach(self, r, axis):
        if self.upsampling == "interpolate":
            return -(-self.conv.reach(r, axis) // self.factors[axis])
        return self.conv.reach(-(-r // self.factors[axis]), axis)


class Resampler(nn.Module):
    """The upsampler of Wan's VAEs, not causal here: time by a convolution along it to r_t times the channels, in order
    (frame, channel); then space by nearest neighbour and a 2D convolution."""

    def __init__(self, width, factors, drop_first):
        super().__init__()
        self.factors, self.drop = factors, factors[0] - 1 if drop_first else 0
        if factors[0] > 1:
            self.time_conv = Conv3d(width, width * factors[0], space=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=factors[1]), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x, context=WHOLE):
        B, r_t, memory_format = x.shape[0], self.factors[0], layout(x)
        if r_t > 1:
            x = self.time_conv(x, context).unflatten(1, (r_t, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = x[:, :, self.drop:] if context.first else x
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)
        return x.contiguous(memory_format=memory_format)

    def reach(self, r, axis):
        r = -(-(r + axis) // self.factors[axis])        # the 2D convolution looks one pixel further
        return self.time_conv.reach(r, axis) if self.factors[0] > 1 else r


class Block(nn.Module):
    """To a new width, to a new size, then resnets; the first two only where the configuration asks for them."""

    def __init__(self, c_in, c_out, resnets, conv, upsampler=None, shortcut="layer"):
        super().__init__()
        self.conv_in = Resnet(c_in, c_out, conv, shortcut=shortcut) if c_in != c_out else nn.Identity()
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


# ---------------------------------------------------------------------------------------------------------------------
# The decoder.

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
            if config.upsampling == "resample":
                upsampler = factors and Resampler(widths[i], factors, config.drop_first)
            else:
                upsampler = factors and Upsampler(widths[i], factors, conv[i], config.upsampling, config.drop_first)
            block = Block(widths[i - 1], widths[i], config.resnets[i], conv[i], upsampler, config.shortcut)
            self.up_blocks.append(block)
        if config.head == "unpatchify":
            self.conv_out = Conv3d(widths[-1], 3 * config.patch ** 2)
        else:
            for i in range(config.patch // 2):
                setattr(self, f"upsampler2d_{i + 1}", Upsampler2d(widths[-1] // 4 ** i))
            self.conv_out = Conv3d(widths[-1] // config.patch ** 2, 3)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Start as a smooth upsampler of the latents: PyTorch's weights, but no biases, residual branches at a tenth,
        and the same weights for all the pixels that a shuffle makes of one, so that it begins as nearest neighbour.

        The convolutions that all goes through begin nearly pointwise: what they take of the neighbours is a tenth, and
        what they take of the place itself is scaled up to keep the variance. Outside the branches nothing carries x
        past a convolution, and a random one blurs it: after five of them, a start that takes hundreds of steps to undo.
        (tiny, 400 steps of findings.py: 25.2 dB, 22.4 without; of AdamW alone 20.6, 18.6 without.)

        The last norm runs over few channels (4 in ltx, 8 in tiny) and would leave directions only, of which brightness
        takes the most: a quarter of them start constant, so that amplitude, and with it colour, comes through from the
        start. (tiny in 600 steps of Muon: 30 % of the colour's variance left unexplained, against 40 % without.)
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        for module in self.modules():
            if isinstance(module, Resnet):
                list(module.conv2.parameters())[-2].mul_(0.1)
            elif isinstance(module, (Upsampler, Upsampler2d)):
                weight, n = list(module.conv.parameters())[-2], module.pixels
                weight.copy_(weight[::n].repeat_interleave(n, 0))
        upsamplers = [upsampler for block in self.up_blocks for upsampler in block.upsamplers]
        for layer in (self.conv_in, *upsamplers, *self.upsamplers2d(), self.conv_out):
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

        latents are what the teacher's encoder gives, no scaling factor applied. One latent frame is one image, unless
        the configuration keeps first frames. return_features=True also returns the blocks' outputs as a dict with the
        keys "mid", "up0" ... "up3"; a tuple of names returns those only. Raises ValueError on other shapes.
        """
        self.check(latents)
        wanted = BLOCKS if return_features is True else return_features or ()
        features = {}
        x = self.conv_in(latents)
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
        return self.unpatchify(self.conv_out(F.silu(rms_norm(x)), context))

    def unpatchify(self, x):
        """conv_out's output to video: (B, 3 p², T, H, W) -> (B, 3, T, p H, p W).

        The channels are in order (C, column, row).
        """
        if self.config.head == "shuffle":
            return x
        x = x.unflatten(1, (3, self.config.patch, self.config.patch)).transpose(2, 3).flatten(1, 3)
        return F.pixel_shuffle(x.transpose(1, 2), self.config.patch).transpose(1, 2)

    def upsamplers2d(self):
        count = self.config.patch // 2 if self.config.head == "shuffle" else 0
        return [getattr(self, f"upsampler2d_{i + 1}") for i in range(count)]

    def check(self, latents):
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels or not latents.numel():
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, t, h, w), got {tuple(latents.shape)}")

    def check_dtype(self, latents):
        own = self.conv_in.conv.weight.dtype
        if latents.dtype != own and not torch.is_autocast_enabled(latents.device.type):
            raise ValueError(f"the student is {own}, the latents are {latents.dtype}: convert either with .to(dtype)")

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

        A generator of the frames (B, 3, m, H, W), each as soon as the latents that it depends on are there: together
        they are model(latents), without overlap, blending or recomputation, in memory that does not grow, no gradients.
        """
        stream = self.streamer()
        for latents in chunks:
            yield from stream.run(latents)
        yield from stream.run(last=True)

    def streamer(self):
        """The same by hand: stream = model.streamer(); frames = stream(latents), and so on; rest = stream.flush()."""
        return Stream(self)

    def step(self, latents, kept):
        """A chunk in the middle of a stream as a plain function, to be compiled.

        latents (B, C, n, h, w); kept: for each of `layers` and for `out` a list of the frames that it kept of those
        before. Returns (frames (B, 3, d_t n, H, W), kept for the next chunk). Every layer must have begun.
        """
        x, contexts = latents, [Context(first=False, last=False, kept=frames) for frames in kept]
        for layer, context in zip((*self.layers(), self.out), contexts):
            x = layer(x, context)
        return x, [context.kept for context in contexts]

    @torch.no_grad()
    def decode(self, latents, chunk=None, tile=None, max_memory=None):
        """model(latents) in bounded memory: (B, C, t, h, w) -> (B, 3, T, H, W). No gradients.

        chunk: latent frames that are decoded at a time, as `stream` does it, so exactly; if nothing is given, as many
        as keep the output of every layer below LARGE numbers. tile: how many latents are decoded at a time in space,
        (rows, columns) or one number for both. The outer ones are a halo and are decoded again by the next tile; this
        is exact too where a side has more than twice as many as `reach(1)`. Else the halo is a quarter of the tile on
        each side, seams are near and not exact, and a warning says so. max_memory: GB (1e9 bytes) for the weights, the
        video and all between; chooses the longest chunk, else the largest tile, by estimate. Raises ValueError where
        nothing fits.
        """
        self.check(latents)
        self.check_dtype(latents)
        B, _, t, h, w = latents.shape
        if max_memory is not None:
            if not (chunk is None and tile is None):
                raise ValueError("max_memory chooses chunk and tile: give it alone")
            chunk, tile = self.fit(latents, max_memory)
        try:
            tile = (h, w) if tile is None else tile if isinstance(tile, (tuple, list)) else (tile, tile)
            tile = tuple(map(index, tile))
            chunk = chunk if chunk is None else index(chunk)
            if len(tile) != 2 or min(tile) < 1 or chunk is not None and chunk < 1:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"chunk is a number of latents from 1 on, tile one or two (rows, columns); "
                             f"got {chunk} and {tile}") from None
        chunk = chunk or max(1, LARGE // self.largest(B, 1, min(h, tile[0]), min(w, tile[1])))
        reach, (_, d_h, d_w) = self.reach(1), self.config.compression
        if any(side < n and side <= 2 * reach for side, n in zip(tile, (h, w))):
            warnings.warn(f"tiles of {tile[0]}x{tile[1]} latents are not exact at their seams: "
                          f"above {2 * reach} they are")
        if chunk >= t and tile[0] >= h and tile[1] >= w:
            return self.own(self(latents))
        video = None
        for (rows, kept_rows), (columns, kept_columns) in product(spans(h, tile[0], reach), spans(w, tile[1], reach)):
            stream, done = self.streamer(), 0
            for i in range(0, t, chunk):
                for frames in stream.run(latents[:, :, i:i + chunk, rows, columns], last=i + chunk >= t):
                    if video is None:
                        video = frames.new_empty(B, 3, self.config.frames(t), d_h * h, d_w * w)
                    frames = frames[..., pixels(kept_rows, d_h, rows.start), pixels(kept_columns, d_w, columns.start)]
                    video[:, :, done:done + frames.shape[2], pixels(kept_rows, d_h), pixels(kept_columns, d_w)] = frames
                    done += frames.shape[2]
        return video

    def largest(self, B, t, h, w):
        """Numbers in the largest output of a layer, for t latent frames within a longer clip."""
        numbers = lambda block, n: math.prod(self.config.feature_shape(block, (B, 0, n, h, w)))
        return max(numbers(block, t + 1) - numbers(block, 1) for block in BLOCKS)

    def fit(self, latents, max_memory):
        """(chunk, tile) with which `decode` needs no more than so many GB: the longest chunk, else the largest tile."""
        B, C, t, h, w = latents.shape
        with torch.device("meta"):          # what a stream in the middle of its clip keeps for one latent of a frame
            stream = TurboVAED(self.config).streamer()
            stream(torch.empty(1, C, stream.delay + 1, 1, 1))
        kept = sum(x.numel() for *_, context in stream.steps for x in context.kept)
        size = latents.element_size()
        held = 2 * sum(p.nbytes for p in self.parameters())         # oneDNN orders them anew
        held += size * B * 3 * math.prod(self.config.compression) * t * h * w
        # On a CPU half precision is computed in float32.
        work = WORK * (max(size, 4) if latents.device.type == "cpu" else size)

        def need(chunk, h, w):      # a layer's frames are those of the chunk and a few that it looks ahead
            state = size * B * kept * h * w if chunk < t else 0
            return (held + state + work * self.largest(B, chunk + 1, h, w)) / 1e9

        for side in range(max(h, w), min(max(h, w), LEAST_TILE) - 1, -1):
            tile = min(side, h), min(side, w)
            if need(1, *tile) <= max_memory or need(t, *tile) <= max_memory:
                return max(chunk for chunk in range(1, t + 1) if need(chunk, *tile) <= max_memory), tile
        least = need(1, min(h, LEAST_TILE), min(w, LEAST_TILE))
        raise ValueError(f"these latents need at least {least:.3g} GB, of which {held / 1e9:.3g} are the weights "
                         f"and the video, not {max_memory}; `stream` gives the video piece by piece")

    def channels_last(self):
        """Lay the weights out for channels-last latents, the layout fast on GPUs, in place; returns the model.

        `model.to(memory_format=...)` cannot: it takes one format for both the 3D and the 2D convolutions.
        """
        return channels_last(self)

    def optimize_for_inference(self, dtype=None, compile=True):
        """Make this student decode as fast as it can where it is, in place; returns it. It cannot be trained any more.

        dtype: float16 or bfloat16, or None for its own. compile: True, or a mode of torch.compile, such as
        "reduce-overhead", which replays CUDA graphs: there the next model(latents) overwrites the video of the last.
        Compiled anew for each size, minutes at first and then faster, are model(latents), with it `decode` of what it
        takes whole, and what a stream does between its start and its end. On a CPU convolutions in float32 are
        oneDNN's, on a GPU all are laid out channels-last.
        """
        self.to(dtype=dtype).eval().requires_grad_(False)
        if next(self.parameters()).is_cuda:
            self.channels_last()
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.optimized = True
        self.compiles = dict(dynamic=False, mode=None if compile is True else compile) if compile else None
        self.compile_again()
        return self

    def compile_again(self):
        self._compiled_call_impl = None
        if self.compiles:
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, 64)        # sizes, where PyTorch would stop at 8
            self.compile(**self.compiles)

    def __setstate__(self, state):
        """A copy, or what comes out of a pickle, is compiled if the original was."""
        super().__setstate__(state)
        self.compile_again()

    def own(self, x):
        """x in memory of its own: what comes out of a CUDA graph is overwritten when that is replayed."""
        return x.clone() if self.compiles and self.compiles["mode"] else x

    def save_pretrained(self, path, metadata=None):
        """Write weights and configuration to one .safetensors file and return its path.

        path is that file, or a folder, which gets `student.safetensors`. metadata (str -> str) is kept in the file and
        comes back as `model.metadata`, with what the model's own says besides. Written beside its place and renamed, so
        a crash leaves no half file.
        """
        from safetensors.torch import save
        path = Path(path).expanduser()
        if path.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
            raise ValueError(f"{path}: students are written as .safetensors; name such a file, or a folder")
        if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
            raise ValueError(f"metadata is text by names, not {metadata}")
        path = path if path.suffix.lower() == ".safetensors" else path / OWN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        about = {**self.metadata, **(metadata or {}), "config": json.dumps(asdict(self.config))}
        data = save(state, metadata=about)      # not save_file: what that writes only its owner may read
        try:
            replace_files({path: lambda file: file.write_bytes(data)}, errors=())
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}); what was there before still is") from None
        return path

    @classmethod
    def from_pretrained(cls, path, config=None):
        """Read a student in float32 on the CPU: ours, or a published Turbo-VAED checkpoint.

        path: a file that save_pretrained wrote or a folder with one; a plain state dict, `.pth` or `.safetensors`, also
        as training scripts wrap it and with an encoder or heads beside the decoder, which stderr tells is left out; or
        a hub id such as "hustvl/Turbo-VAED", which needs `config`. config: a TurboVAEDConfig or a name in CONFIGS; None
        takes the file's own, or the first of CONFIGS whose keys and shapes are the file's ("hunyuan" for "cog"). A name
        or a published file's, also says whose latents it decodes where the file does not: `model.metadata["teacher"]`.
        Raises FileNotFoundError, or ValueError with one line that says what does not fit.
        """
        if isinstance(config, str) and config not in CONFIGS:
            raise ValueError(f"no configuration {config!r}; there are {', '.join(CONFIGS)}")
        file = find_checkpoint(path, config)
        state, metadata = read_checkpoint(file)
        named = [config] if isinstance(config, str) else [name for name in PUBLISHED if PUBLISHED[name] == file.name]
        if named:
            metadata.setdefault("teacher", {"magihuman": "wan22"}.get(named[0], named[0]))
        config = CONFIGS[config] if isinstance(config, str) else config
        if "config" in metadata:
            try:
                written = TurboVAEDConfig(**json.loads(metadata.pop("config")))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{file}: its configuration cannot be read: {summary(error)}") from None
            if config and config != written:
                raise ValueError(f"{file}: was written as {config_name(written)}, not as {config_name(config)}")
            config = written

        with torch.device("meta"):      # shapes only
            wrong = {name: differences(cls(preset).state_dict(), state) for name, preset in CONFIGS.items()}
            nearest = min(wrong, key=lambda name: len(wrong[name]))     # the first of those that fit, if any does
            config = config or CONFIGS[nearest]
            model = cls(config)
        problems = differences(model.state_dict(), state)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            hint = "" if wrong[nearest] else f'; this is a checkpoint of "{nearest}": pass config="{nearest}"'
            raise ValueError(f"{file}: does not fit {config_name(config)}: {'; '.join(problems[:3])}{more}{hint}")
        state = {key: tensor.float() for key, tensor in state.items()}
        broken = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
        if broken:
            raise ValueError(f"{file}: {broken} holds values that are not finite")
        model.load_state_dict(state, assign=True)
        model.metadata = metadata
        return model


def channels_last(module):
    """Lay the weights of a module's convolutions out channels-last, in place; returns the module."""
    for p in module.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d if p.ndim == 5 else torch.channels_last)
    return module


def spans(n, tile, reach):
    """Tiles along a side of n latents: slices [(latents read, latents kept)]; reads at most `tile`, keeps all once."""
    if tile >= n:
        return [(slice(0, n), slice(0, n))]
    halo, kept, spans = reach if tile > 2 * reach else tile // 4, 0, []
    while kept < n:
        start = max(0, kept - halo)
        stop = min(start + tile, n)
        end = stop - halo if stop < n else n
        spans.append((slice(start, stop), slice(kept, end)))
        kept = end
    return spans


def pixels(latents, size, start=0):
    """The slice of pixels that a slice of latents, counted from `start`, becomes."""
    return slice(size * (latents.start - start), size * (latents.stop - start))


class Stream:
    """One clip on its way through a student, in chunks: what `student.streamer()` returns.

    stream(latents) takes the next (B, C, n, h, w), n at least 1, and returns the frames (B, 3, m, H, W) that are known
    by now, at first none: m = 0. stream.flush() ends the clip and returns the rest. Frames come `delay` latents late.
    Raises ValueError on other shapes, and after the end.
    """

    def __init__(self, student):
        self.student, self.delay, rate = student, student.reach(0), 1
        self.latents = None                         # none of the clip's, but of their shape
        self.chunk = self.latest = 0                # latent frames of the longest and of the latest chunk
        self.ended = self.running = False
        self.steps = []                 # (layer, frames that it looks ahead, its frames for one latent, its context)
        for layer in student.layers():
            self.steps.append((layer, layer.reach(0, 0), rate, Context(last=False)))
            rate *= layer.factors[0] if isinstance(layer, (Upsampler, Resampler)) else 1
        self.steps.append((student.out, student.conv_out.reach(0, 0), rate, Context(last=False)))

    def __call__(self, latents):
        return self.join(self.run(latents))

    def flush(self):
        return self.join(self.run(last=True))

    def join(self, frames):
        frames = list(frames)
        B, _, _, h, w = self.latents.shape
        _, d_h, d_w = self.student.config.compression
        return torch.cat(frames or [self.latents.new_empty(B, 3, 0, d_h * h, d_w * w)], dim=2)

    def take(self, latents):
        """The latents, if they can be the next; without any, none of the latest ones' shape."""
        for wrong, reason in ((self.ended, "this stream has ended: each clip needs one"),
                              (self.running, "this stream was interrupted within a chunk: begin a new one"),
                              (latents is self.latents is None, "no latents were given")):
            if wrong:
                raise ValueError(reason)
        if latents is None:
            return self.latents
        self.student.check(latents)
        self.student.check_dtype(latents)
        none = latents[:, :, :0].clone()        # of its own: a view would keep the whole chunk alive
        like = lambda x: (x.shape, x.dtype, x.device)
        if self.latents is not None and like(none) != like(self.latents):
            raise ValueError(f"the latents of a stream have one size, precision and place; got {tuple(latents.shape)}, "
                             f"{latents.dtype}, after {tuple(self.latents.shape)}, {self.latents.dtype}")
        self.latents, self.chunk = none, max(self.chunk, latents.shape[2])
        return latents

    @torch.no_grad()
    def run(self, latents=None, last=False):
        """Generate the frames that become known with these latents, about a chunk's worth at a time; last: the end.

        A layer begins when it has enough for its first frame. From then on it gives as many frames as it gets, and with
        the last ones those that it looks ahead as well. They go on in pieces of the usual length, each through all the
        layers before the next one starts, so that the end needs no more memory than the middle.
        """
        latents, before = self.take(latents), self.latest
        self.running, self.latest = True, latents.shape[2]
        # Compiled once for each length of a chunk, so lengths that come but once are not.
        if self.student.compiles and not last and before == self.latest and not any(c.first for *_, c in self.steps):
            compiled = torch.compile(self.student.step, **self.student.compiles)
            frames, kept = compiled(latents, [context.kept for *_, context in self.steps])
            for (*_, context), x in zip(self.steps, kept):
                context.kept = [self.student.own(frames) for frames in x]
            self.running = False
            yield self.student.own(frames)
            return
        work = [(0, latents, last)]          # (number of the step, frames for it, whether they are its last)
        self.ended = last
        while work:
            i, x, last = work.pop()
            if i == len(self.steps):
                yield x
                continue
            layer, ahead, rate, context = self.steps[i]
            length = self.chunk * rate
            if context.first:
                x, context.kept = torch.cat([*context.kept, x], dim=2), []
                length += ahead
                if x.shape[2] <= ahead and not last:
                    context.kept = [x]
                    continue
            if x.shape[2] > length:
                work.append((i, x[:, :, length:], last))
                x, last = x[:, :, :length], False
            context.last = last
            work.append((i + 1, layer(x, context), last))
            context.first = False
        self.running = False


# ---------------------------------------------------------------------------------------------------------------------
# Whose latents a student decodes.

# diffusers' classes of the teachers' VAEs
VAES = {"AutoencoderKLLTXVideo": ("ltx",), "AutoencoderKLHunyuanVideo": ("hunyuan",),
        "AutoencoderKLCogVideoX": ("cog",), "AutoencoderKLWan": ("wan21", "wan22"),
        "AutoencoderKLLTX2Video": ("ltx2", "ltx23"), "AutoencoderKLHunyuanVideo15": ("hunyuan15",),
        "AutoencoderKLQwenImage": ("qwen",)}


def check_fit(student, what, teachers, channels, compression, images, who="the student"):
    """Raise ValueError unless `student` decodes the latents of `what`: of one of `teachers` (names; empty: not known),
    with so many channels, that (d_t, d_h, d_w), and first frames dropped if `images`. Channels and compression None are
    not compared. Returns what was assumed, or None: latents of one shape mean different things, and not every file says
    whose it decodes.
    """
    config, teacher, wrong = student.config, student.metadata.get("teacher"), []
    teachers = (*teachers, *["wan21"] * ("qwen" in teachers))       # a student of clips decodes their images too
    if channels not in (None, config.latent_channels):
        wrong.append(f"decodes {config.latent_channels} latent channels, not {channels}")
    if compression not in (None, config.compression):
        wrong.append(f"has compression {config.compression}, not {compression}")
    elif config.drop_first != images and config.compression[0] > 1:
        wrong.append(f"{'drops' if config.drop_first else 'keeps'} first frames: 2 latent frames would be "
                     f"{config.frames(2)} frames, not {replace(config, drop_first=images).frames(2)}")
    if teacher and teachers and teacher not in teachers:
        wrong.append(f"was made for latents of {teacher}, not {' or '.join(teachers)}")
    if wrong:
        raise ValueError(f"{who} does not fit {what}: it {', it '.join(wrong)}")
    if teacher and teachers:
        return None
    said = f"was made for latents of {teacher}" if teacher else "does not say whose latents it was made for"
    return f"{who} {said}: assumed are those of {what}"


# ---------------------------------------------------------------------------------------------------------------------
# In a pipeline.

def use_student(pipe_or_vae, student):
    """Put `student` in the place of the decoder of a diffusers pipeline or VAE, so that `pipe(...)` decodes through it.

    Only `vae.decode` changes: it hands the latents that it is given to the `decode` of a copy of the student, in the
    latents' own precision and on their device. Large clips are decoded in chunks of time, and all are, one latent frame
    at a time, after `vae.enable_tiling()`; both are exact. Where accelerate offloads the pipeline's models, it takes
    part: the model before it leaves the GPU, and so does the copy afterwards. student None puts back what decoded
    before. Returns pipe_or_vae.

    Raises ValueError if the student decodes other latents than this VAE's, TypeError if there is no VAE. Warns where
    the student's file does not say whose latents it decodes, and where the pipeline will mix noise into them.
    """
    vae = getattr(pipe_or_vae, "vae", pipe_or_vae)
    if not hasattr(vae, "decode"):
        raise TypeError(f"a {type(pipe_or_vae).__name__} has no VAE whose decoder could be replaced")
    ours = vars(vae).get("decode")
    before = getattr(ours, "before", ours)          # another tool's decode, if there was one
    if student is None:
        if ours is not before:
            vars(vae).pop("decode")
            vars(vae).update({"decode": before} if before else {})
        return pipe_or_vae
    if not isinstance(student, TurboVAED):
        raise TypeError(f"a TurboVAED can take the decoder's place, or None its own; not a {type(student).__name__}")
    kinds = next((VAES[kind.__name__] for kind in type(vae).__mro__ if kind.__name__ in VAES), ())
    if "ltx23" in kinds:        # one class, latents of one shape, two encoders: LTX-2.3's decoder has a block more
        kinds = kinds[len(vae.config.decoder_layers_per_block) > 4:][:1]
    get = lambda *names: next((v for n in names for v in (vae.config.get(n), vars(vae).get(n)) if v), None)
    time = get("scale_factor_temporal", "temporal_compression_ratio")
    space = get("scale_factor_spatial", "spatial_compression_ratio") or \
        2 ** (len(vae.config.get("block_out_channels") or ()) - 1)          # CogVideoX's does not say
    assumed = check_fit(student, f"this {type(vae).__name__}", kinds, get("latent_channels", "z_dim"),
                        (time, space, space) if time and space >= 1 else None, images=True)
    if assumed:
        warnings.warn(assumed, stacklevel=2)
    if vae.config.get("timestep_conditioning"):
        warnings.warn("this VAE's pipelines mix noise into the latents before decoding where decode_timestep or "
                      "decode_noise_scale is not 0, and the student does not take it out: call them with "
                      "decode_noise_scale=0.0", stacklevel=2)
    student = placed = copy.deepcopy(student).eval()        # the caller's own keeps its precision and its place

    @torch.no_grad()
    def decode(z, *conditioning, return_dict=True, **more):      # a timestep, a generator: the student needs neither
        nonlocal placed
        hook = getattr(vae, "_hf_hook", None)       # accelerate's, where models are offloaded; as diffusers' own decode
        if hook:
            hook.pre_forward(placed)
        if placed.conv_in.conv.weight.dtype != z.dtype:     # always from the precision that it came in
            placed = copy.deepcopy(student).to(z.device, z.dtype)
        placed.to(z.device)
        if z.is_cuda:
            placed.channels_last()
        video = placed.decode(z, chunk=1 if getattr(vae, "use_tiling", False) else None)
        if hook:
            placed.to("cpu")
        if not return_dict:
            return (video,)
        from diffusers.models.autoencoders.vae import DecoderOutput
        return DecoderOutput(sample=video)

    vae.decode, decode.before = decode, before
    return pipe_or_vae


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints.

def config_name(config):
    """Its name in CONFIGS in quotes, else all of it."""
    return next((f'"{name}"' for name, preset in CONFIGS.items() if preset == config), str(config))


def summary(error):
    """The first sentence of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def check_writable(folder):
    """Raise OSError unless `folder` can be written to, or made: to be asked before anything is computed for it."""
    path = Path(folder).absolute()
    place = next(place for place in (path, *path.parents) if place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        what = "read-only" if place.is_dir() else "no folder"
        raise OSError(f"nothing can be written to {folder}: {place} is {what}")


def find_checkpoint(path, config):
    """The file that `path` means: itself, the one in that folder, or the published one of that hub repository."""
    file = Path(path).expanduser()
    published = PUBLISHED.get(config) if isinstance(config, str) else None
    if file.is_dir():
        names = [OWN_FILE, published] if published else [OWN_FILE]
        file = next((file / name for name in names if (file / name).is_file()), None)
        if not file:
            raise FileNotFoundError(f"{path}: this folder holds no {' nor '.join(names)}; name a file")
    if file.is_file():
        return file
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or file.suffix in (".safetensors", ".pth", ".pt"):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not published:
        raise FileNotFoundError(f"{path}: no such file or folder; if it is a hub id, say which student: "
                                f"config= one of {', '.join(PUBLISHED)}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise FileNotFoundError(f"{path}: no such file or folder; for the hub, pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download(str(path), published))
    except Exception as error:      # a dozen classes, from no network to no such repository: all mean "not there"
        raise FileNotFoundError(f"{path}: no such file or folder, and the hub did not give {published}: "
                                f"{summary(error)}") from None


def read_checkpoint(file):
    """(state dict, metadata) of a .safetensors file or a PyTorch one, which is never unpickled beyond plain tensors."""
    if file.suffix.lower() == ".safetensors":
        from safetensors import safe_open
    metadata = {}
    try:
        if file.suffix.lower() == ".safetensors":
            with safe_open(file, framework="pt") as f:
                metadata = dict(f.metadata() or {})
                state = {key: f.get_tensor(key) for key in f.keys()}
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:      # PyTorch's own words would send the user to unpickle it after all
        raise ValueError(f"{file}: truncated, or holds more than names and tensors; it was not unpickled") from None
    except Exception as error:          # damage in the wrong place may raise nearly anything
        raise ValueError(f"{file}: truncated, or no checkpoint: {summary(error)}") from None
    state = flat(state)
    if not state:
        raise ValueError(f"{file}: holds no state dict (names and tensors)")
    try:
        state, left_out = take_decoder(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if left_out:
        print(f"{file}: left out what is not the decoder: {', '.join(left_out)}", file=sys.stderr)
    plain = lambda t: t.is_floating_point() and not t.is_meta and t.layout == torch.strided
    wrong = next((key for key, tensor in state.items() if not plain(tensor)), None)
    if wrong:
        raise ValueError(f"{file}: {wrong} holds no floating-point numbers, or not as a plain tensor")
    return state, metadata


def flat(tree, path=()):
    """{names joined by dots: tensor} of all tensors in nested dicts."""
    if isinstance(tree, torch.Tensor):
        return {".".join(path): tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {name: tensor for key, value in items for name, tensor in flat(value, (*path, str(key))).items()}


def take_decoder(state):
    """(the decoder's tensors of a flat state dict under their own names, what was left out): out of a whole VAE, of a
    training script's wrapper, from beside projection heads; of several the EMA weights. All of it where there is no
    decoder. Raises ValueError where several would do."""
    words = lambda prefix: set(re.split(r"[._]", prefix.lower()))
    # The second set names what optimizers keep, and gradients: these are as large as the weights.
    others = ({"encoder", "teacher", "discriminator", "initial", "init"}
              | {"optim", "optimizer", "optimizers", "exp", "momentum", "grad", "grads", "gradients"})
    matches = [m for m in map(IN_DECODER.match, state) if m and not words(m[1]) & others]
    found = Counter(m[1] for m in matches)
    if not found:
        return state, []
    rank = lambda p: ("ema" in words(p), bool(words(p) & {"decoder", "student"}), found[p])
    prefix, *more = sorted(found, key=rank, reverse=True)
    if more and rank(more[0]) == rank(prefix):
        raise ValueError(f"holds several decoders, {prefix or 'one at the top'} and {more[0] or 'one at the top'}: "
                         f"save the one that is meant by itself")
    mine = {m.string: m.string[len(prefix):] for m in matches if m[1] == prefix}
    depth = lambda key: max(1, prefix.count(".") + key.startswith(prefix))
    left_out = sorted({".".join(key.split(".")[:depth(key)]) for key in state.keys() - mine.keys()})
    return {name: state[key] for key, name in mine.items()}, left_out


def differences(want, have):
    """What keeps the state dict `have` from being `want`, a few words each; empty if it fits."""
    return ([f"{key} is {tuple(have[key].shape)}, not {tuple(want[key].shape)}"
             for key in want if key in have and have[key].shape != want[key].shape]
            + [f"{key} is missing" for key in want if key not in have]
            + [f"{key} is unexpected" for key in have if key not in want])


# ---------------------------------------------------------------------------------------------------------------------
# The family.

def by_block(model, count):
    """{part: count(modules)} over the decoder's parts: conv_in, mid, up0 ... up3, out."""
    parts = {"conv_in": ["conv_in"], "mid": ["mid_block"], **{f"up{i}": [f"up_blocks.{i}"] for i in range(4)},
             "out": ["upsampler2d_1", "upsampler2d_2", "conv_out"]}
    names = dict(model.named_modules())
    return {part: sum(count(name, names[name]) for name in modules if name in names) for part, modules in parts.items()}


def count_parameters(model):
    """Parameters by part: {"conv_in", "mid", "up0" ... "up3", "out"}."""
    return by_block(model, lambda name, module: sum(p.numel() for p in module.parameters()))


def count_flops(config, latent_shape):
    """FLOP by part to decode latents of that shape: two for each multiply-add of the convolutions, the rest is noise.

    Runs on the meta device: nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = TurboVAED(config)
        model(torch.empty(latent_shape))
    counts = counter.get_flop_counts()
    return by_block(model, lambda name, module: sum(counts.get(f"TurboVAED.{name}", {}).values()))


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share.

def number(kind=int, least=1, most=math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a finite `kind` (int or float) from `least` to `most`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
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

    The label is the path as one types it from here, a run's folder for the student in it. metadata["teacher"] says
    whose latents the student decodes.
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
    label = os.path.relpath(file) if file.exists() and file.is_relative_to(Path.cwd()) else path
    return str(label), student


def weights_hash(module):
    """The SHA-256 of the names and float32 values of a module's state dict, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def atomically(path):
    """Yields a temporary path beside `path` that is renamed to `path` when the block ends well, else removed: a crash
    or a full disk leaves what was there. Makes the folder. A file or a package (a folder)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:80]}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def text_table(rows, left=("model",), markdown=False):
    """Rows of cells as text; the first row holds the headings. Columns align to the right, those of `left` to the left.
    """
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) if heading in left else cell.rjust(w)
                       for cell, w, heading in zip(row, widths, rows[0])).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def out_of_memory(error):
    """Whether an exception says so; on a CPU PyTorch has no class of its own for it."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "buffer size")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


def run_command(main, less):
    """main(), with one line for what a user can mend; less: what needs less memory, said where it runs out. SIGTERM is
    as Ctrl-C, so that what is half written is removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: stopped")
    except (OSError, ValueError, RuntimeError, KeyError, MemoryError, ImportError, pickle.UnpicklingError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        sys.exit(f"error: out of memory: {less}" if out_of_memory(error) else f"error: {kind}{summary(error)}")


def default_student(quiet=False):
    """The file of the student that was trained last under out/, hidden folders left out, else the shipped one; says
    which unless `quiet`. Raises FileNotFoundError where there is none."""
    file = max(Path("out").glob(f"[!.]*/{OWN_FILE}"), key=lambda file: file.stat().st_mtime, default=SHIPPED)
    if not file.is_file():
        raise FileNotFoundError(f"no student: out/ holds none and neither does {file.parent}; "
                                f"train one (make demo), or name one with --student")
    if not quiet:
        print(f"the student {file}" if file != SHIPPED else f"no student in out/: the shipped one, {file.name}")
    return file


def replace_files(writes, errors=OSError):
    """{path: write}: each write(temporary file), then all are renamed to their paths: a crash leaves no half file, and
    a full disk all of the old ones. errors: what a write raises; it becomes a ValueError that names the path."""
    partial_files = {path: path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}") for path in writes}
    try:
        for path, write in writes.items():
            try:
                write(partial_files[path])
            except errors as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise ValueError(f"{path}: {reason}") from None
        for path, partial_file in partial_files.items():
            os.replace(partial_file, path)
    finally:
        for partial_file in partial_files.values():
            partial_file.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Print the family: parameters, compression, and GFLOP (two for each "
                                     "multiply-add) for each frame of a clip of 17 frames, 16 without a dropped one.")
    parser.add_argument("--size", type=int, default=512, help="height and width of the video in pixels (default 512)")
    size = parser.parse_args().size
    header = ["", "total", "conv_in", *BLOCKS, "out"]
    for name, config in CONFIGS.items():
        d_t, d_h, d_w = config.compression
        if size < 1 or size % d_h:
            parser.error(f"--size must be a multiple of {d_h} for {name}, got {size}")
        t = next(t for t in range(1, 18) if config.frames(t) >= 16)
        with torch.device("meta"):
            parameters = count_parameters(TurboVAED(config))
        flops = count_flops(config, (1, config.latent_channels, t, size // d_h, size // d_w))
        print(f"{name}: {config.latent_channels} latent channels, compression ({d_t}, {d_h}, {d_w}), "
              f"{config.frames(t)} frames from {t}")
        print("".join(f"{h:>12}" if h else f"{'':16}" for h in header))
        for row, values, unit in (("M parameters", parameters, 1e6), ("GFLOP/frame", flops, 1e9 * config.frames(t))):
            print(f"{row:16}" + "".join(f"{v / unit:12.3f}" for v in (sum(values.values()), *values.values())))
        print()


if __name__ == "__main__":
    main()
