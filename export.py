"""Student to Core ML, proven right on any machine: an ML Program in fp16 with fixed shapes.

    python export.py                                     # the newest student under out/, at 512x512 and 720x1280
    python export.py --student out/ltx --size 512x512 --bits 8
    python export.py --config ltx --random               # no checkpoint at hand: for speed only
    python export.py --config ltx --random --plain       # the graph without the rewrites below, to compare with
    python export.py --verify out/ltx/ltx_17x512x512.mlpackage --student out/ltx

Core ML predicts on a Mac only. So every export ends with the saved package's own operations, read back from its files and
run one by one in PyTorch, in float32 and with each result rounded to fp16, beside the student on the same latents. On a
Mac real predictions are compared as well. The report says what a phone will have to do: operations, arithmetic, memory.
"""
import argparse
import copy
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (BLOCKS, CONFIGS, OWN_FILE, ChannelNorm, Conv3d, Resnet, SeparableConv3d, TurboVAED, TurboVAEDConfig,
                   Upsampler, Upsampler2d)

SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_student.safetensors"
PARTS = ("conv_in", *BLOCKS, "out")
TINY = 2.0 ** -24           # the smallest number fp16 has
VIEWS = ("reshape", "expand_dims", "squeeze")       # operations that move nothing


# ---------------------------------------------------------------------------------------------------------------------
# A graph made for the phone: the student's own modules with other forwards that compute the same numbers. All tensors are
# (1, C, T, H, W) throughout; nothing is ever transposed.

def take_frames(x, index):
    """Frames number `index` of (1, C, T, H, W): whatever repeats, drops or reorders frames is one gather."""
    return x.index_select(2, torch.tensor(index))


def replicate(x, n):
    T = x.shape[2]
    return take_frames(x, [0] * n + list(range(T)) + [T - 1] * n) if n else x


@torch.library.custom_op("turbo_vaed::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| / sqrt(C) + 2^-24) over channels: three operations, of which one writes a tensor of x's size.

    Squares never leave the operation that sums them: as tensors of their own they overflow fp16 from 256 on, which the
    shipped student's activations do. The student's eps, 1e-8 under the root, is zero in fp16; what is added here is only there
    for 0 / 0, and smaller than fp16's rounding wherever the student's eps is.
    """
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5 + TINY)


@torch.library.custom_op("turbo_vaed::layer_norm", mutates_args=())
def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over channels without its affine part: one operation."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1).contiguous()


for op in (rms_norm, layer_norm):
    op.register_fake(lambda x, eps=None: torch.empty_like(x))


def pixel_shuffle(x, r):
    """(1, C r², T, H, W) -> (1, C, T, r H, r W): one 2D pixel shuffle of the frames stacked into a tall one, since rows of
    different frames never meet."""
    return F.pixel_shuffle(x.flatten(2, 3), r).unflatten(2, (x.shape[2], -1)) if r > 1 else x


class PhoneConv3d(Conv3d):
    def forward(self, x):
        return self.conv(replicate(x, self.conv.kernel_size[0] // 2))


class PhoneSeparableConv3d(SeparableConv3d):
    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(replicate(x, self.depthwise_conv.kernel_size[0] // 2)))


class PhoneChannelNorm(ChannelNorm):
    def forward(self, x):
        return layer_norm(x, self.eps)


class PhoneResnet(Resnet):
    @torch.no_grad()
    def rewrite(self):
        """Fold the shortcut's LayerNorm into its convolution, and bring conv1's output to about 1 in size.

        That output goes through a norm, so its scale is free; a power of two changes no digit. It keeps the sums of squares
        far from fp16's 65504 also on hardware that holds them in fp16: the shipped student's reach 7 million.
        """
        weight, bias = list(self.conv1.parameters())[-2:]
        scale = 2.0 ** -round(math.log2(weight.norm() / len(weight) ** 0.5))
        weight *= scale
        bias *= scale
        if hasattr(self, "conv_shortcut"):
            conv = self.conv_shortcut.conv
            conv.bias += conv.weight.flatten(1) @ self.norm3.bias
            conv.weight *= self.norm3.weight[:, None, None, None]

    def forward(self, x):
        h = self.conv1(self.activation(rms_norm(x)))
        h = self.conv2(F.silu(rms_norm(h)))
        return h + (self.conv_shortcut(self.norm3(x)) if hasattr(self, "conv_shortcut") else x)


class PhoneUpsampler(Upsampler):
    @torch.no_grad()
    def rewrite(self):
        """Order the convolution's output channels as (C, r_t, r_s²), as pixel_shuffle_3d has them; decoupled has r_t last."""
        if self.upsampling == "decoupled":
            for p in list(self.conv.parameters())[-2:]:
                p.copy_(p.unflatten(0, (-1, self.factors[1] ** 2, self.factors[0])).transpose(1, 2).flatten(0, 2))

    def forward(self, x):
        r_t, r_s = self.factors
        T = x.shape[2]
        if self.upsampling == "interpolate":
            x = F.interpolate(x.flatten(2, 3), scale_factor=r_s, mode="nearest").unflatten(2, (T, -1)) if r_s > 1 else x
            order = [i // r_t for i in range(r_t * T)]
        else:       # frame t of channel (c, k) stands at k T + t of channel c
            x = pixel_shuffle(self.conv(x), r_s)
            x = x.reshape(1, -1, r_t * T, *x.shape[3:])
            order = [i % r_t * T + i // r_t for i in range(r_t * T)]
        x = take_frames(x, order[self.drop:]) if r_t > 1 else x
        return self.conv(x) if self.upsampling == "interpolate" else x


class PhoneUpsampler2d(Upsampler2d):
    def forward(self, x):
        x = F.conv3d(F.silu(rms_norm(x)), self.conv.weight.unsqueeze(2), self.conv.bias, padding=(0, 1, 1))
        return pixel_shuffle(x, 2)


class PhoneTurboVAED(TurboVAED):
    def forward(self, latents):
        x = self.conv_in(latents)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        for name in ("upsampler2d_1", "upsampler2d_2")[:self.config.patch // 2]:
            x = getattr(self, name)(x)
        return self.conv_out(F.silu(rms_norm(x)))


REWRITES = {Conv3d: PhoneConv3d, SeparableConv3d: PhoneSeparableConv3d, ChannelNorm: PhoneChannelNorm, Resnet: PhoneResnet,
            Upsampler: PhoneUpsampler, Upsampler2d: PhoneUpsampler2d, TurboVAED: PhoneTurboVAED}


def phone_twin(student):
    """A copy of the student that computes the same video from (1, C, t, h, w) latents by way of the graph above."""
    twin = copy.deepcopy(student)
    for module in twin.modules():
        module.__class__ = REWRITES.get(type(module), type(module))
        if hasattr(module, "rewrite"):
            module.rewrite()
    return twin.eval()
