"""Turbo-VAED's student: a light decoder for the latents of a heavy video VAE, whole in this file.

    python model.py                                       # the family: parameters, compression, arithmetic

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
        for name, length in (("widths", 5), ("resnets", 5), ("up", 4)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} needs {length} entries, got {getattr(self, name)}")
        for factors in self.up:
            if factors and (len(factors) != 2 or min(factors) < 1 or max(factors) == 1):
                raise ValueError(f"up takes factors (time, space), at least 1, not both 1, or None; got {factors}")
        if min(self.latent_channels, *self.widths) < 1 or not all(0 <= n < 100 for n in self.resnets):
            raise ValueError(f"channels are at least 1, resnets 0 to 99 a block; "
                             f"got {self.latent_channels}, {self.widths} and {self.resnets}")
        if self.patch not in (1, 2, 4) or self.widths[-1] % self.patch ** 2:
            raise ValueError(f"patch must be 1, 2 or 4 and up3's width a multiple of its square; "
                             f"got patch {self.patch}, width {self.widths[-1]}")
        if not all(name in BLOCKS for name in self.separable):
            raise ValueError(f"separable names blocks among {BLOCKS}, got {self.separable}")
        if self.kernel not in range(1, 32, 2):
            raise ValueError(f"kernel must be odd and below 32, got {self.kernel}")
        if not isinstance(self.drop_first, bool) and self.drop_first not in range(2, 100):
            raise ValueError(f"drop_first is True, False or a number of latents from 2 to 99, got {self.drop_first!r}")
        if self.upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling must be one of {UPSAMPLING}, got {self.upsampling!r}")

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
OWN_FILE = "student.safetensors"
SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_student.safetensors"


# ---------- Layers. Their attribute names are those of the published checkpoints' keys.

class Context:
    """Where a layer's frames stand in their clip, which may come in chunks, and what it keeps of earlier frames.

    A layer that looks n frames ahead gives its frames n late, and keeps those that it needs again. `kept` is a queue:
    each place in a layer takes its frames from the front and puts the next ones at the end.
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


@compiled_onednn.register_fake
def _(x, weight, bias, padding, groups):
    return F.conv3d(x, weight, bias, 1, padding, 1, groups).contiguous()


def convolve(conv, x):
    """conv(x). Without gradients, on a CPU in float32, by oneDNN: PyTorch takes a slow kernel for small clips."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and ONEDNN
    if gradient or not fits or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
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


def layout(x):
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def decoupled_pixel_shuffle(x, r_t, r_s):
    """Time, then space (Section 3.3): (B, C r_s² r_t, T, H, W) -> (B, C, r_t T, r_s H, r_s W).

    Time: channel c r_t + k of frame t becomes channel c of frame r_t t + k. Space: the 2D pixel shuffle of each frame,
    Equation 3 up to a permutation of channels. Tensors have five dimensions at most, the limit of phones' compilers.
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

    "decoupled" and "pixel_shuffle_3d" convolve to r_t r_s² times the channels and shuffle; "interpolate" repeats each
    value (nearest neighbour, as Hunyuan-VAE and CogVideoX-VAE do), then convolves at the same width.
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
            x = F.interpolate(x, scale_factor=(r_t, r_s, r_s), mode="nearest")
        else:
            x = self.conv(x, context)
            shuffle = decoupled_pixel_shuffle if self.upsampling == "decoupled" else pixel_shuffle_3d
            x = shuffle(x, r_t, r_s).contiguous(memory_format=layout(x))
        x = self.drop_frames(x, context) if self.drop else x
        return self.conv(x, context) if self.upsampling == "interpolate" else x

    def drop_frames(self, x, context):
        """x without first frames. In a stream the place where x begins in its group is kept."""
        if not (context.first or self.group):
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
        """How many inputs r outputs in a row come from, at most. The first of a group is one output, others are r_t."""
        factor = self.factors[axis]
        if axis or not self.group:
            return -(-r // factor)
        groups, rest = divmod(r, self.group - self.drop)
        return groups * self.group // factor + (-(-(rest + self.drop) // factor) if rest else 0)


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
        """Start as a smooth upsampler: PyTorch's weights, but no biases, and residual branches at a tenth.

        All pixels that a shuffle makes of one begin with the same weights, as nearest neighbour. Convolutions outside
        the branches begin nearly pointwise, since random ones blur x: their neighbours' weights are a tenth of
        PyTorch's, the centre's keep the variance. The last norm runs over few channels and would leave directions only;
        a quarter of them start constant, so that amplitude, and with it colour, comes through.
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
        return self.conv_out(F.silu(rms_norm(x)), context)

    def upsamplers2d(self):
        return [getattr(self, name) for name in ("upsampler2d_1", "upsampler2d_2") if hasattr(self, name)]

    def check(self, latents):
        """Raise ValueError unless these are latents of this student, in its precision."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels or not latents.numel():
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, t, h, w), got {tuple(latents.shape)}")
        own = self.dtype
        if latents.dtype != own and not torch.is_autocast_enabled(latents.device.type):
            raise ValueError(f"the student is {own}, the latents are {latents.dtype}: convert either with .to(dtype)")

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
        """A chunk in the middle of a stream as a plain function, to be compiled.

        latents (B, C, n, h, w); kept: for each of `layers` and for `out` a list of the frames that it kept of those
        before. Returns (frames (B, 3, d_t n, H, W), kept for the next chunk). Every layer must have begun.
        """
        x, contexts = latents, [Context(first=False, last=False, kept=frames) for frames in kept]
        for layer, context in zip((*self.layers(), self.out), contexts):
            x = layer(x, context)
        return x, [context.kept for context in contexts]

    @torch.no_grad()
    def decode(self, latents, chunk=None, tile=None):
        """model(latents) in bounded memory: (B, C, t, h, w) -> (B, 3, T, H, W). No gradients.

        chunk: latent frames at a time, as `stream` decodes them, so exactly. None: as many as keep the output of every
        layer below LARGE numbers. tile: latents at a time in space, (rows, columns) or one number for both. Tiles
        overlap: they are exact where a side has more than twice as many latents as `reach(1)`. Smaller ones overlap by
        a quarter, have seams, and a warning says so. Raises ValueError on other shapes.
        """
        self.check(latents)
        B, _, t, h, w = latents.shape
        tile = tile if isinstance(tile, (tuple, list)) else (tile, tile)
        if len(tile) != 2 or any(n is not None and n < 1 for n in (chunk, *tile)):
            raise ValueError(f"chunk is a number of latents from 1 on, tile one or two (rows, columns); "
                             f"got {chunk} and {tile}")
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

    def channels_last(self):
        """Lay the weights out for channels-last latents, the layout fast on GPUs, in place; returns the model."""
        return channels_last(self)

    def optimize_for_inference(self, dtype=None, compile=True):
        """Make this student decode as fast as it can where it is, in place; returns it. It cannot be trained any more.

        dtype: float16 or bfloat16, or None for its own. compile: True, or a mode of torch.compile; "reduce-overhead"
        replays CUDA graphs: there the next model(latents) overwrites the video of the last. Compiled, anew for each
        size and for minutes at first, are model(latents) and a stream between its start and its end.
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
        self._compiled_call_impl = None
        if self.compiles is not None:
            self.compile(**self.compiles)

    def clone_if_cuda_graph(self, x):
        """x in memory of its own: what comes out of a CUDA graph is overwritten when that is replayed."""
        return x.clone() if self.compiles and self.compiles.get("mode") and torch.is_tensor(x) else x

    def save_pretrained(self, path, metadata=None):
        """Write weights and configuration to one .safetensors file and return its path.

        path is that file, or a folder, which gets `student.safetensors`. metadata (str -> str) is kept in the file and
        comes back as `model.metadata`, with what the model's own says besides. A crash leaves no half file.
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

        path: a file that save_pretrained wrote, or a folder with one; a plain state dict, `.pth` or `.safetensors`,
        also as training scripts wrap it; or a hub id such as "hustvl/Turbo-VAED", which needs `config`. config: a
        TurboVAEDConfig or a name in CONFIGS; None takes the file's own, or the first of CONFIGS that fits ("hunyuan"
        for "cog"). `model.metadata["teacher"]` says whose latents the student decodes, if file or config do. Raises
        FileNotFoundError, or ValueError with one line that says what does not fit.
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
            written = cls.read_config(json.loads(metadata.pop("config"))) if "config" in metadata else None
            with torch.device("meta"):      # the weights are the file's
                model = cls(written or config or CONFIGS[nearest(state)[0]])
            if config and config != model.config:
                raise ValueError(f"was written as {config_name(model.config)}, not as {config_name(config)}")
            wrong = differences(model.state_dict(), state)
            if wrong:
                name, others = nearest(state)
                hint = "" if others else f'; this is a checkpoint of "{name}": pass config="{name}"'
                raise ValueError(f"does not fit {config_name(model.config)}, {len(wrong)} differences: "
                                 f"{'; '.join(wrong[:3])}{hint}")
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: {summary(error)}") from None
        model.load_state_dict(state, assign=True)
        model.metadata = metadata
        return model

    @staticmethod
    def read_config(fields):
        """The configuration that a file's metadata hold, in an older file with two fields that have one value here."""
        if (fields.pop("shortcut", "layer"), fields.pop("head", "shuffle")) != ("layer", "shuffle"):
            raise ValueError("it is of another decoder, which examples/magihuman.py reads")
        return TurboVAEDConfig(**fields)


def channels_last(module):
    """`module.to(memory_format=...)` takes one format for both the 3D and the 2D convolutions; this lays out both."""
    for p in module.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d if p.ndim == 5 else torch.channels_last)
    return module


class Stream:
    """One clip on its way through a student, in chunks: what `student.streamer()` returns.

    stream(latents) takes the next (B, C, n, h, w), n at least 1, and returns the frames (B, 3, m, H, W) that are known
    by now, at first none: m = 0. stream.flush() ends the clip and returns the rest. Frames come `delay` latents late.
    Raises ValueError on other shapes, and after the end.
    """

    def __init__(self, student):
        self.student, self.delay, self.closed = student, student.reach(0), False
        self.latents = None                         # none of the clip's, but of their shape
        self.longest = self.latest = 0              # latent frames of the longest and of the latest chunk
        self.steps, rate = [], 1        # (layer, frames that it looks ahead, its frames for one latent, its context)
        for layer in student.layers():
            self.steps.append((layer, layer.reach(0, 0), rate, Context(last=False)))
            rate *= getattr(layer, "factors", (1, 1))[0]
        self.steps.append((student.out, student.conv_out.reach(0, 0), rate, Context(last=False)))

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
        latents = self.latents if latents is None else latents
        if latents is None:
            raise ValueError("no latents were given")
        if latents is not self.latents:
            self.student.check(latents)
            none = latents[:, :, :0].clone()        # of its own: a view would keep the whole chunk alive
            like = lambda x: (x.shape, x.dtype, x.device)
            if self.latents is not None and like(none) != like(self.latents):
                raise ValueError(f"the latents of a stream have one size, precision and place; got "
                                 f"{tuple(latents.shape)}, {latents.dtype}, after {tuple(self.latents.shape)}")
            self.latents = none
        before, self.latest = self.latest, latents.shape[2]
        self.longest, self.closed = max(self.longest, self.latest), True
        # Compiled once for each length of a chunk, so lengths that come but once are not.
        compiles = self.student.compiles if before == self.latest and not last else None
        if compiles and not any(context.first for *_, context in self.steps):
            step = torch.compile(self.student.step, **compiles)
            frames, kept = step(latents, [context.kept for *_, context in self.steps])
            for (*_, context), tensors in zip(self.steps, kept):
                context.kept = [self.student.clone_if_cuda_graph(x) for x in tensors]
            yield self.student.clone_if_cuda_graph(frames)
        else:
            yield from self.through(0, latents, last)
        self.closed = last

    def through(self, i, x, last):
        """Generate the frames of video that x, the next input frames of step i, becomes; last: x ends the clip.

        A layer begins when it has enough for its first frame. From then on it gives as many frames as it gets, and with
        the last ones those that it looks ahead as well. More than a chunk's worth goes on in pieces, each through all
        further layers before the next one starts, so that the end needs no more memory than the middle.
        """
        for i in range(i, len(self.steps)):
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
            context.first = False
        yield x


# ---------- In a pipeline: whose latents a student decodes, and a student in the place of a VAE's decoder.

# diffusers' classes of the teachers' VAEs
VAES = {"AutoencoderKLLTXVideo": ("ltx", "ltx095"), "AutoencoderKLHunyuanVideo": ("hunyuan",),
        "AutoencoderKLCogVideoX": ("cog",), "AutoencoderKLWan": ("wan21", "wan22"),
        "AutoencoderKLLTX2Video": ("ltx2", "ltx23"), "AutoencoderKLHunyuanVideo15": ("hunyuan15",),
        "AutoencoderKLQwenImage": ("qwen",), "AutoencoderKLMiniMaxH3": ("h3",),
        "LTX2VideoDiffusionDecoderModel": ("ltx25",)}
SAME_LATENTS = {"qwen": ("wan21",), "ltx23": ("ltx25",), "ltx25": ("ltx23",)}      # qwen's students know images only
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean and standard deviation: H3's VAE gives such pixels


def check_fit(student, what, teachers, channels, compression, images, who="the student"):
    """Raise ValueError unless `student` decodes the latents of `what`, which are of one of `teachers` (if not empty).

    They have so many channels and that (d_t, d_h, d_w), or None for not known, and `images` as drop_first.
    Returns what was assumed where latents of one shape may mean different things, or None.
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


def teachers_of(vae):
    """Names of the teachers whose latents a diffusers VAE has; empty where it is not known here."""
    names = next((VAES[kind.__name__] for kind in type(vae).__mro__ if kind.__name__ in VAES), ())
    if "ltx" in names:          # one class, latents of one shape, two encoders: the second came with 0.9.5
        return names["LTXVideo095DownBlock3D" in vae.config.down_block_types:][:1]
    if "ltx2" in names:         # the same: LTX-2.3's decoder has a block more
        return names[len(vae.config.decoder_layers_per_block) > 4:][:1]
    return names


def check_vae(student, vae):
    """Raise ValueError unless `student` decodes this diffusers VAE's latents; warn of what is not known."""
    config = vae.config
    facts = {**vars(vae), **{name: value for name, value in config.items() if value}}
    time = facts.get("scale_factor_temporal") or facts.get("temporal_compression_ratio")
    space = (facts.get("scale_factor_spatial") or facts.get("spatial_compression_ratio")
             or 2 ** (len(facts.get("block_out_channels", ())) - 1))            # CogVideoX's does not say
    channels = facts.get("latent_channels") or facts.get("z_dim")
    compression = (time, space, space) if time and space >= 1 else None
    images = facts.get("tokens_chunk_size", True)       # H3's
    assumed = check_fit(student, f"this {type(vae).__name__}", teachers_of(vae), channels, compression, images)
    if assumed:
        warnings.warn(assumed, stacklevel=3)
    if config.get("timestep_conditioning"):
        warnings.warn("this VAE's pipelines mix noise into the latents before decoding where decode_timestep or "
                      "decode_noise_scale is not 0, and the student does not take it out: call them with "
                      "decode_noise_scale=0.0", stacklevel=3)


def use_student(pipe_or_vae, student):
    """Put `student` in the place of the decoder of a diffusers pipeline or VAE, so that `pipe(...)` decodes through it.

    Only `decode` changes, that of `pipe.vae` and, in LTX-2.5, of `pipe.diffusion_decoder`: to a StudentDecoder with a
    copy of the student. student None puts back what decoded before. Returns pipe_or_vae.

    Raises ValueError if the student decodes other latents than this VAE's, TypeError if there is no VAE. Warns where
    the student's file does not say whose latents it decodes, and where the pipeline will mix noise into them.
    """
    parts = [pipe_or_vae, *(getattr(pipe_or_vae, name, None) for name in ("vae", "diffusion_decoder"))]
    vaes = [getattr(part, "_orig_mod", part) for part in parts if hasattr(part, "decode")]      # under torch.compile
    if not vaes or not isinstance(student, TurboVAED | None):
        raise TypeError(f"takes a pipeline or VAE and a TurboVAED, or None for its own decoder; "
                        f"not a {type(pipe_or_vae).__name__} and a {type(student).__name__}")
    for vae in vaes if student else ():
        check_vae(student, vae)
    for vae in vaes:
        before = vars(vae).pop("decode", None)
        before = before.before if isinstance(before, StudentDecoder) else before
        if student or before:
            vae.decode = StudentDecoder(vae, student, before) if student else before
    return pipe_or_vae


class StudentDecoder:
    """A VAE's `decode` by a copy of a student. `before` is what another tool had put there.

    It decodes in the latents' own precision and on their device; after `vae.enable_tiling()` one latent frame at a
    time, which is exact too. Where the pipeline's models are offloaded, it takes part.
    """

    def __init__(self, vae, student, before):
        self.vae, self.before, self.teachers = vae, before, teachers_of(vae)
        self.student = self.placed = copy.deepcopy(student).eval()      # the caller's own keeps its precision and place

    @torch.no_grad()
    def __call__(self, z, *conditioning, return_dict=True, **more):     # a timestep, a generator: not needed
        h3, t, hook = "h3" in self.teachers, z.shape[2], getattr(self.vae, "_hf_hook", None)
        if h3:          # whose pipeline leaves precision to the VAE, and whose tiling is on from the beginning
            z = z.to(self.vae.post_quant_conv.weight.dtype)
        if "cog" in self.teachers and t % 2 == 0:
            warnings.warn(f"CogVideoX's VAE makes {4 * t} frames of {t} latents, its student {4 * t - 3}")
        if not torch.compiler.is_compiling():
            if hook:                            # as diffusers' own decode calls it
                hook.pre_forward(self.placed)
            if self.placed.dtype != z.dtype:    # always from the precision that it came in
                self.placed = copy.deepcopy(self.student).to(z.device, z.dtype)
            self.placed.to(z.device)
            if z.is_cuda:
                self.placed.channels_last()
        video = self.placed.decode(z, chunk=1 if getattr(self.vae, "use_tiling", False) and not h3 else None)
        if hook:
            self.placed.to("cpu")
        if h3:
            mean, std = video.new_tensor(IMAGENET).view(2, 3, 1, 1, 1)
            video = (video.add(1).div(2) - mean) / std
        if not return_dict or any(given is False for given in conditioning):
            return (video,)
        from diffusers.models.autoencoders.vae import DecoderOutput
        return DecoderOutput(sample=video)


# ---------- Checkpoints.

def config_name(config):
    """Its name in CONFIGS in quotes, else all of it."""
    return next((f'"{name}"' for name, preset in CONFIGS.items() if preset == config), str(config))


def find_checkpoint(path, config):
    """The file that `path` means: itself, the one in that folder, or in that hub repository (of this configuration)."""
    if path is None:
        raise FileNotFoundError("no student was named: give a file, a folder or a hub id")
    file = Path(path).expanduser()
    published = PUBLISHED.get(config)
    names = [OWN_FILE, published] if published else [OWN_FILE]
    for candidate in (file, *(file / name for name in names)):
        if candidate.is_file():
            return candidate
    if file.is_dir():
        raise FileNotFoundError(f"{path}: this folder holds no {' nor '.join(names)}; name a file")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or file.suffix in (".safetensors", ".pth", ".pt"):
        raise FileNotFoundError(f"{path}: no such file or folder")
    hint = "" if published else f"; for published students pass config= one of {', '.join(PUBLISHED)}"
    for name in reversed(names):
        try:
            from huggingface_hub import hf_hub_download
            return Path(hf_hub_download(str(path), name))
        except Exception as error:      # a dozen classes, from no network to no such repository: all mean "not there"
            reason = summary(error)
    raise FileNotFoundError(f"{path}: no such file or folder, nor did the hub give its {' or '.join(names)}: "
                            f"{reason}{hint}")


def read_checkpoint(file):
    """(the decoder's state dict in float32, metadata) of a .safetensors file or a PyTorch one, not unpickled."""
    start, metadata = file.open("rb").read(9), {}
    if start and start.isascii() and b"\0" not in start:
        raise ValueError("text, not weights: a Git LFS pointer (`git lfs pull`), an index of shards or a page")
    safe = start[8:] == b"{" or file.suffix.lower() == ".safetensors"       # whatever its name
    if safe:
        from safetensors import safe_open
    try:
        if safe:
            with safe_open(file, framework="pt") as f:
                metadata = dict(f.metadata() or {})
                state = {key: f.get_tensor(key) for key in f.keys()}
        else:
            state = flat(torch.load(file, map_location="cpu", weights_only=True))
    except Exception:       # damage may raise nearly anything, and PyTorch's words would send the user to unpickle it
        raise ValueError("truncated, or holds more than names and tensors; it was not unpickled") from None
    if not state:
        raise ValueError("holds no state dict (names and tensors)")
    keys = take_decoder(state)
    left_out = {key.split(".")[0] for key in state.keys() - set(keys.values())}
    if left_out:
        print(f"{file}: left out what is not the decoder: {', '.join(sorted(left_out))}", file=sys.stderr)
    state = {name: state[key] for name, key in keys.items()}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"{name} holds values that are not finite, or no floating-point numbers")
    return {name: tensor.float() for name, tensor in state.items()}, metadata


def flat(tree, path=()):
    """{names joined by dots: tensor} of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return {".".join(path): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in flat(value, (*path, str(key))).items()}


def take_decoder(state):
    """{the decoder's own name of a tensor: its key} in a flat state dict: all keys where there is no decoder.

    A decoder is where a conv_in is: in a whole VAE, a training script's wrapper, beside projection heads. Its EMA
    weights come first, also those of a list. Raises ValueError where several would do.
    """
    # The second line is of optimizers and gradients, which have the weights' names and shapes.
    others = ("encoder|teacher|discriminator|init|initial|"
              "optim|optimizer|optimizers|exp|momentum|grad|grads|gradients")
    has = lambda words, prefix: re.search(rf"(^|[._])({words})[._]", prefix, re.IGNORECASE) is not None
    rank = lambda prefix: (has("ema", prefix), has("decoder|student", prefix))
    found = [re.fullmatch(r"(|.*\.)conv_in\.conv\.weight", key) for key in state]
    prefixes = sorted((m[1] for m in found if m and not has(others, m[1])), key=rank, reverse=True)
    if not prefixes:
        return dict(zip(state, state))
    if rank(prefixes[0]) in map(rank, prefixes[1:]):
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


def differences(want, have):
    """What keeps the state dict `have` from being `want`, a few words each; empty if it fits."""
    return ([f"{key} is {tuple(have[key].shape)}, not {tuple(want[key].shape)}"
             for key in want if key in have and have[key].shape != want[key].shape]
            + [f"{key} is missing" for key in want if key not in have]
            + [f"{key} is unexpected" for key in have if key not in want])


def nearest(state):
    """(name, differences) of the first configuration in CONFIGS that a state dict fits, or fits best."""
    with torch.device("meta"):          # shapes only
        found = {name: differences(TurboVAED(config).state_dict(), state) for name, config in CONFIGS.items()}
    return min(found.items(), key=lambda item: len(item[1]))


# ---------- The family.

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_flops(config, latent_shape):
    """FLOP to decode latents of that shape: two for each multiply-add of the convolutions. Nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        TurboVAED(config)(torch.empty(latent_shape))
    return counter.get_total_flops()


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
    return os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(path), student


def weights_hash(module):
    """The SHA-256 of the names and float32 values of a module's state dict, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def atomically(path):
    """Yields a temporary path beside `path`, which is renamed to `path` when the block ends well, else removed.

    A crash or a full disk leaves what was there. Makes the folder. For a file or a package (a folder).
    """
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
    """Make `folder`, or raise OSError where nothing can be written: to be asked before anything is computed for it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"nothing can be written to {folder}: {error.strerror}") from None


def text_table(rows, left=("model",), markdown=False):
    """Rows of cells as text; the first row holds the headings. Columns align to the right, those of `left` to the left.
    """
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) if heading in left else cell.rjust(w)
                       for cell, w, heading in zip(row, widths, rows[0])).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(error):
    """The first sentence of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


def out_of_memory(error):
    """Whether an exception says so; on a CPU PyTorch has no class of its own for it."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "buffer size")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


def run_command(main, less):
    """main(), with one line for what a user can mend; less: what needs less memory, said where it runs out."""
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


def main():
    parser = argparse.ArgumentParser(description="Print the family: parameters, compression, and GFLOP (two for each "
                                     "multiply-add) for each frame of a clip of 17 frames, 16 without a dropped one.")
    parser.add_argument("--size", type=number(), default=512, help="height and width of the video (default 512)")
    size = parser.parse_args().size
    rows = [["model", "latent channels", "compression", "M parameters", "GFLOP/frame"]]
    for name, config in CONFIGS.items():
        _, d_h, d_w = config.compression
        if size % d_h:
            parser.error(f"--size must be a multiple of {d_h} for {name}, got {size}")
        t = 1 if name == "qwen" else next(t for t in range(1, 18) if config.frames(t) >= 16)      # its clips are images
        flops = count_flops(config, (1, config.latent_channels, t, size // d_h, size // d_w))
        with torch.device("meta"):
            parameters = count_parameters(TurboVAED(config))
        rows.append([name, str(config.latent_channels), str(config.compression), f"{parameters / 1e6:.3f}",
                     f"{flops / 1e9 / config.frames(t):.3f}"])
    print(text_table(rows))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it without a word
    main()
