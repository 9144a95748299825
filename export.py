"""Student to Core ML, proven right on any machine: an ML Program in fp16 with fixed shapes.

    python export.py                                     # the newest student under out/, at 512x512 and 720x1280
    python export.py --student out/ltx --size 512x512 --bits 8
    python export.py --config ltx --random               # no checkpoint at hand: for speed only
    python export.py --graph engine conv3d               # both graphs: for the Neural Engine, and for the phone's GPU
    python export.py --stream 2                          # video of any length, two latent frames at a time
    python export.py --verify out/ltx/ltx_17x512x512_engine.mlpackage --student out/ltx

Core ML predicts on a Mac only. So every export ends with the saved package's own operations, read back from its files
and run one by one in PyTorch, in float32 and with each result rounded to fp16, beside the student on the same latents;
a very large one at a fraction of its height, after showing that it is the same program but for that. On a Mac real
predictions are compared as well. The report says what a phone will have to do: operations, what keeps them off the
Neural Engine, arithmetic, memory.
"""
import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (BLOCKS, CONFIGS, OWN_FILE, ChannelNorm, Conv3d, Resnet, SeparableConv3d, TurboVAED, TurboVAEDConfig,
                   Upsampler, Upsampler2d, check_writable, default_student, number, replace_files, run_command, summary)

PARTS = ("conv_in", *BLOCKS, "out")
TINY = 2.0 ** -24           # the smallest number fp16 has
MOVES = ("gather", "slice_by_index", "concat", "split", "reshape", "pixel_shuffle", "upsample_nearest_neighbor")


# ---------------------------------------------------------------------------------------------------------------------
# Two graphs for phones: the student's own modules with other forwards that compute the same numbers. "engine" is for
# the Neural Engine, which has no 3D convolution and no gather: all tensors are (T, C, H, W) throughout, and time is
# among the channels where a convolution looks at several frames. "conv3d" is for the GPU: all tensors are
# (1, C, T, H, W). In neither is anything transposed.

@torch.library.custom_op("turbo_vaed::take_frames", mutates_args=())
def take_frames(x: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Frames number `index` of (1, C, T, H, W): whatever repeats, drops or reorders frames is one operation."""
    return x.index_select(2, torch.tensor(index))


@torch.library.custom_op("turbo_vaed::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| / sqrt(C) + 2^-24) over channels: three operations, of which one writes a tensor of x's size.

    Squares never leave the operation that sums them: as tensors of their own they overflow fp16 from 256 on, which the
    shipped student's activations do. The student's eps, 1e-8 under the root, is zero in fp16. What is added here is
    only there for 0 / 0, and is smaller than fp16's rounding wherever the student's eps is.
    """
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5 + TINY)


@torch.library.custom_op("turbo_vaed::layer_norm", mutates_args=())
def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over channels without its affine part: one operation."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1).contiguous()


take_frames.register_fake(lambda x, index: x.new_empty(1, x.shape[1], len(index), *x.shape[3:]))
rms_norm.register_fake(lambda x: torch.empty_like(x))
layer_norm.register_fake(lambda x, eps: torch.empty_like(x))


class PhoneChannelNorm(ChannelNorm):
    def forward(self, x):
        return layer_norm(x, self.eps)


class PhoneResnet(Resnet):
    def forward(self, x, *step):
        h = self.conv1(self.activation(rms_norm(x)), *step)
        h = self.conv2(F.silu(rms_norm(h)), *step)
        x = self.conv_shortcut(self.norm3(x)) if hasattr(self, "conv_shortcut") else x
        return h + (step[0].delay(x, self.reach(0, 0)) if step else x)


class PhoneTurboVAED(TurboVAED):
    def forward(self, x, *step):
        for layer in self.layers():
            x = layer(x, *step)
        for layer in self.upsamplers2d():
            x = layer(x)
        return self.conv_out(F.silu(rms_norm(x)), *step)


class Step:
    """A step of a stream, as layers of the "engine" graph are handed it: N latent frames, anywhere in the clip.

    Every layer runs from the first step on, with zeros for what was before, and what it makes of the frames around one
    comes late: the clip's own begin at frame `first` of what a layer is given, counted over all steps. What is before
    and after them is wrong, and cut off at last; but a convolution at the clip's ends must see the end frame repeated.
    edges (3 P, 1, 1, 1) says so for each of P convolutions: 1 in the step in which its clip begins, in which it ends,
    and in all after that; None in a step where all are 0. kept: the frames (n, C, H, W) of before that each place in
    the decoder needs, in order; keeps: those that the next step needs.
    """

    def __init__(self, kept=(), edges=None):
        self.kept, self.edges, self.keeps = list(kept), edges, []
        self.others = None if edges is None else edges * -1 + 1         # the engine adds and multiplies
        self.first, self.dropped = 0, 0
        self.places = []        # of each convolution: (step, frame) of its clip's begin, and of its end from the last

    def before(self, n, x):
        return self.kept.pop(0) if self.kept else x.new_zeros(n, *x.shape[1:])

    def delay(self, x, n):
        x = torch.cat([self.before(n, x), x])
        self.keeps.append(x[len(x) - n:])
        return x[:len(x) - n]

    def grow(self, r, drop):
        self.first, self.dropped = r * self.first + drop, r * self.dropped + drop

    def before_and(self, x, n):
        """([2 n frames before], x), or ([], both in one), for windows of 2 n + 1: as many as x has frames, n late."""
        kept, begin = self.before(2 * n, x), divmod(self.first, len(x))
        end = divmod(self.first - self.dropped - 1, len(x))
        self.places.append((begin, end))
        self.first += n
        if self.edges is not None:
            kept, x = [], self.repeat_ends(kept, x, 2 * n + begin[1], 2 * n + end[1] + 1)
        self.keeps.append((x if len(x) > 2 * n else torch.cat([kept, x]))[-2 * n:])
        return frames_of(kept) if len(kept) else [], x

    def repeat_ends(self, kept, x, begin, end):
        """kept and x in one, where it is the step for it with frame `begin` in place of those before, the one before
        `end` from there on, or the last one kept in place of all of x."""
        i, total = len(self.places) - 1, len(self.edges) // 3
        begins, ends, over = ((self.others[j:j + 1], self.edges[j:j + 1]) for j in (i, total + i, 2 * total + i))
        either = lambda x, other, shares: x * shares[0] + other * shares[1]
        x = torch.cat([kept, either(x, kept[len(kept) - 1:], over)])
        x = torch.cat([either(x[:begin], x[begin:begin + 1], begins), x[begin:]])
        return torch.cat([x[:end], either(x[end:], x[end - 1:end], ends)]) if end < len(x) else x


def take(x, start, end):
    return x if (start, end) == (0, len(x)) else x[start:end]       # coremltools knows no slice that takes all


def frames_of(x):
    return list(x.split(1)) if len(x) > 1 else [x]                  # nor a split into one


class EngineConv3d(Conv3d):
    def rewrite(self):
        """k x 3 x 3 over C channels is 3 x 3 over k C channels: those of k frames, one frame after the other."""
        self.conv.weight = torch.nn.Parameter(self.conv.weight.transpose(1, 2).flatten(1, 2))

    def convolve(self, x):
        """n windows of k frames each, one behind the other as (n k, C, H, W), to (n, C', H, W)."""
        x = x.reshape(-1, self.conv.weight.shape[1], *x.shape[2:])
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=self.conv.padding[1:])

    def forward(self, x, *step):
        """Every k-th window of k frames begins where the one before it ends, so k slices of x hold all that lie in x: a
        convolution of each, and one concat that puts their outputs in order. Windows that reach beyond are copied.
        Where outputs are so wide that the concat moves more than copies would, all are, and one convolution is all."""
        k = self.conv.kernel_size[0]
        before, x = step[0].before_and(x, k // 2) if step and k > 1 else (None, x)
        frames = frames_of(x)
        before, after = (frames[:1] * (k // 2), frames[-1:] * (k // 2)) if before is None else (before, [])
        frames = before + frames + after
        windows = range(len(frames) - k + 1)
        inside = windows[len(before):len(windows) - len(after)]
        if k == 1 or k * len(inside) * x.shape[1] <= len(windows) * self.conv.out_channels:
            inside = ()
        copied = [t for t in windows if t not in inside]
        if not inside:
            return self.convolve(torch.cat([frame for t in copied for frame in frames[t:t + k]]) if k > 1 else x)
        outputs = {}
        if copied:
            ends = self.convolve(torch.cat([frame for t in copied for frame in frames[t:t + k]]))
            outputs.update(zip(copied, frames_of(ends)))
        for phase in range(k):
            if part := inside[phase::k]:
                outputs.update(zip(part, frames_of(self.convolve(take(x, phase, phase + k * len(part))))))
        return torch.cat([outputs[t] for t in windows])


class EngineSeparableConv3d(SeparableConv3d):
    def rewrite(self):
        """The depthwise convolution as k two-dimensional ones, summed: one for each frame that it sees."""
        self.taps = torch.nn.ParameterList(w.contiguous() for w in self.depthwise_conv.weight.unbind(2))
        self.pointwise_conv.weight = torch.nn.Parameter(self.pointwise_conv.weight.squeeze(2))
        del self.depthwise_conv.weight

    def forward(self, x, *step):
        r, T, bias = len(self.taps) // 2, len(x), self.depthwise_conv.bias
        before, x = step[0].before_and(x, r) if step else ([take(x, 0, 1)] * r, x)
        x = torch.cat([*before, x, *([] if step else [take(x, T - 1, T)] * r)]) if before else x
        h = F.conv2d(take(x, 0, T), self.taps[0], bias, padding=r, groups=len(bias))
        for i, weight in enumerate(self.taps[1:], start=1):
            h = h + F.conv2d(x[i:i + T], weight, padding=r, groups=len(bias))
        return F.conv2d(h, self.pointwise_conv.weight, self.pointwise_conv.bias)


class EngineUpsampler(Upsampler):
    def rewrite(self):
        """Order the output channels as (r_t, C, r_s²), a new frame after the other: growth in time is a reshape."""
        r_t, r_s = self.factors
        sizes, axis = ((-1, r_s ** 2, r_t), 2) if self.upsampling == "decoupled" else ((-1, r_t, r_s ** 2), 1)
        for p in list(self.conv.parameters())[-2:] if self.upsampling != "interpolate" else ():
            p.copy_(p.unflatten(0, sizes).movedim(axis, 0).flatten(0, 2))

    def forward(self, x, *step):
        r_t, r_s = self.factors
        if self.upsampling == "interpolate":
            x = F.interpolate(x, scale_factor=r_s, mode="nearest") if r_s > 1 else x
            frames = [frame for frame in frames_of(x) for _ in range(r_t)]
            return self.conv(torch.cat(frames[self.dropped(step):]) if r_t > 1 else x, *step)
        x = self.conv(x, *step)
        x = x.reshape(r_t * len(x), -1, *x.shape[2:])
        x = take(x, self.dropped(step), len(x))
        return F.pixel_shuffle(x, r_s) if r_s > 1 else x

    def dropped(self, step):
        """Frames to drop: in a stream none, the clip's own begin so much later."""
        for s in step:
            s.grow(self.factors[0], self.drop)
        return 0 if step else self.drop


class EngineUpsampler2d(Upsampler2d):
    def forward(self, x):
        return F.pixel_shuffle(self.conv(F.silu(rms_norm(x))), 2)


def replicate(x, n):
    T = x.shape[2]
    return take_frames(x, [0] * n + list(range(T)) + [T - 1] * n) if n else x


def pixel_shuffle(x, r):
    """(1, C r², T, H, W) -> (1, C, T, r H, r W): one 2D pixel shuffle of the frames stacked into a tall one.

    That is right since rows of different frames never meet.
    """
    return F.pixel_shuffle(x.flatten(2, 3), r).unflatten(2, (x.shape[2], -1)) if r > 1 else x


class GpuConv3d(Conv3d):
    def forward(self, x):
        return self.conv(replicate(x, self.conv.kernel_size[0] // 2))


class GpuSeparableConv3d(SeparableConv3d):
    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(replicate(x, self.depthwise_conv.kernel_size[0] // 2)))


class GpuUpsampler(Upsampler):
    def rewrite(self):
        """Order the output channels as (C, r_t, r_s²), as pixel_shuffle_3d has them; decoupled has r_t last."""
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


class GpuUpsampler2d(Upsampler2d):
    def rewrite(self):
        """The same convolution over stacks of frames, so that time stays where it is."""
        self.conv.weight = torch.nn.Parameter(self.conv.weight.unsqueeze(2))

    def forward(self, x):
        return pixel_shuffle(F.conv3d(F.silu(rms_norm(x)), self.conv.weight, self.conv.bias, padding=(0, 1, 1)), 2)


BOTH = PhoneChannelNorm, PhoneResnet, PhoneTurboVAED
GRAPHS = {"engine": (*BOTH, EngineConv3d, EngineSeparableConv3d, EngineUpsampler, EngineUpsampler2d),
          "conv3d": (*BOTH, GpuConv3d, GpuSeparableConv3d, GpuUpsampler, GpuUpsampler2d)}


def rescale(twin):
    """Bring what the norms see to about 1 in size, by powers of two in the weights, which change no digit of the video.

    A norm does not mind the scale of its input, fp16 does: 65504 is its largest number, also for the sum of squares
    where hardware holds that in fp16; unscaled, the shipped student's reach 7 million. Every convolution writes to a
    norm or to the stream of residuals, which only norms and upsamplers read. How much a convolution magnifies is
    estimated from its weights.
    """
    def scale(conv, by=None, read=1.0):     # conv's output, given that the scale of its input is `read` already
        *depthwise, weight, bias = conv.parameters()
        magnifies = math.prod(float(w.norm()) / len(w) ** 0.5 for w in (weight, *depthwise[:1])) / read
        by = by or 2.0 ** -round(math.log2(max(magnifies, 1e-3)))
        for p, factor in ((weight, by / read), (bias, by), *((p, read) for p in depthwise[1:])):
            p.mul_(factor)
        return by

    stream = scale(twin.conv_in)
    for block in (twin.mid_block, *twin.up_blocks):
        if isinstance(block.conv_in, Resnet):
            scale(block.conv_in.conv1)
            stream = scale(block.conv_in.conv2, scale(block.conv_in.conv_shortcut))
        for upsampler in block.upsamplers:
            stream = scale(upsampler.conv, read=stream)
        for resnet in block.resnets:
            scale(resnet.conv1)
            scale(resnet.conv2, stream)
    for upsampler in twin.upsamplers2d():
        scale(upsampler.conv)


@torch.no_grad()
def phone_twin(student, graph):
    """A copy of the student that computes the same video by a graph above; `for_graph` lays out what it takes."""
    twin, rewrites = copy.deepcopy(student), {rewrite.__base__: rewrite for rewrite in GRAPHS[graph]}
    for resnet in (module for module in twin.modules() if hasattr(module, "conv_shortcut")):
        conv = resnet.conv_shortcut.conv        # takes the affine part of its LayerNorm
        conv.bias += conv.weight.flatten(1) @ resnet.norm3.bias
        conv.weight *= resnet.norm3.weight[:, None, None, None]
    rescale(twin)
    for module in list(twin.modules()):
        module.__class__ = rewrites.get(type(module), type(module))
        if hasattr(module, "rewrite"):
            module.rewrite()
    return twin.eval()


def for_graph(x, graph):
    """Latents or video (1, C, T, H, W) as a graph has them: (T, C, H, W) for "engine", as they are for "conv3d"."""
    return x[0].transpose(0, 1).contiguous() if graph == "engine" else x


# ---------------------------------------------------------------------------------------------------------------------
# Export.

def latent_shape(config, size, latent_frames=None):
    """(1, C, t, h, w) of the latents that decode to at least `size`.

    latent_frames None: what makes 17 frames, or 16.
    """
    t = latent_frames or next(t for t in range(1, 18) if config.frames(t) >= 16)
    return 1, config.latent_channels, t, -(-size[0] // config.compression[1]), -(-size[1] // config.compression[2])


def decoded_size(config, shape):
    """(height, width) of the video that latents of that shape decode to, before any crop."""
    return tuple(d * n for d, n in zip(config.compression[1:], shape[3:]))


class Crop(torch.nn.Module):
    """To height and width: where the size is no multiple of the compression, the student decodes a little more."""

    def __init__(self, decoder, size):
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(self, latents):
        video = self.decoder(latents)
        return video if video.shape[-2:] == self.size else video[..., :self.size[0], :self.size[1]]


def coremltools():
    """The package, told how the three operations above are written in MIL. ValueError where it is not installed."""
    try:
        logging.getLogger("coremltools").setLevel(logging.ERROR)        # it tells at length what a Mac would have
        import coremltools as ct
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil import register_torch_op
    except ImportError as error:
        raise ValueError(f"this needs coremltools ({error}): pip install coremltools") from None

    def take_frames(context, node):
        x, index = context[node.inputs[0]], list(node.inputs[1])
        context.add(mb.gather(x=x, indices=index, axis=2, name=node.name))

    def rms_norm(context, node):
        x = context[node.inputs[0]]
        norm = mb.reduce_l2_norm(x=x, axes=[1], keep_dims=True, name=f"{node.name}_l2")
        rms = mb.linear_activation(x=norm, alpha=x.shape[1] ** -0.5, beta=TINY, name=f"{node.name}_rms")
        context.add(mb.real_div(x=x, y=rms, name=node.name))

    def layer_norm(context, node):
        context.add(mb.layer_norm(x=context[node.inputs[0]], axes=[1], epsilon=node.inputs[1], name=node.name))

    for lowering in (take_frames, rms_norm, layer_norm):
        lowering.__name__ = f"turbo_vaed::{lowering.__name__}"      # what it is registered by
        register_torch_op(lowering, override=True)
    return ct


def weights_hash(model):
    """sha256 over names and float32 values of the weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def part_of(node):
    """The decoder's part that a node of the exported graph belongs to."""
    path = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    modules = ("conv_in", "mid_block", *(f"up_blocks.{i}" for i in range(4)))
    within = lambda module: any(f"{name}.".startswith(f"decoder.{module}.") for name in path)
    return next((part for part, module in zip(PARTS, modules) if within(module)), "out")


def convert(module, inputs, outputs):
    """A module as a coremltools MLModel whose operations are named after the decoder's parts. inputs: {name: tensor};
    outputs: names."""
    ct = coremltools()
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(inputs.values())).run_decompositions({})
    for node in program.graph.nodes:
        if node.op == "call_function" and not any(user.op == "output" for user in node.users):
            node.name = f"{part_of(node)}_{node.name}"
    # iOS 18 (macOS 15) is the first whose palettised weights are stored in 4 and 6 bits.
    inputs = [ct.TensorType(name=name, shape=x.shape, dtype=np.float16) for name, x in inputs.items()]
    outputs = [ct.TensorType(name=name, dtype=np.float16) for name in outputs]
    return ct.convert(program, inputs=inputs, outputs=outputs, compute_precision=ct.precision.FLOAT16,
                      minimum_deployment_target=ct.target.iOS18, skip_model_load=True)


def export(model, size=(512, 512), latent_frames=None, path="student.mlpackage", bits=None, graph="engine",
           stream=None, note=""):
    """Write a student to `path`, an .mlpackage (ML Program, fp16, fixed shapes), and return that path.

    model: a TurboVAED. size: (height, width) of the video in pixels; where it is no multiple of the compression the
    graph decodes a little more and crops. latent_frames: None takes what makes 17 frames, 16 where first frames are
    kept. graph: "engine", two-dimensional operations that the Neural Engine has: input "latents" (t, C, h, w) as the
    teacher's encoder gives them, output "video" (T, 3, height, width), about [-1, 1], not clamped; or "conv3d", for the
    GPU: (1, C, t, h, w) to (1, 3, T, height, width). bits: 8, 6 or 4 palettises the weights by k-means. stream: in
    place of a clip, a step of so many latent frames of a stream, see `run_stream`; it decodes whole latents, without a
    crop. note goes into the description. Written beside its place and renamed; a report beside the old package goes
    with it. Raises ValueError for sizes below 1, other bits, graphs or names, or without coremltools.
    """
    path, config = Path(path), model.config
    if min(*size, 1 if latent_frames is None else latent_frames) < 1:
        raise ValueError(f"size and latent frames must be at least 1, got {size[0]}x{size[1]} and {latent_frames}")
    if {config.upsampling, config.shortcut, config.head} & {"resample", "rms", "unpatchify"}:
        raise ValueError("students with upsampling 'resample', shortcut 'rms' or head 'unpatchify' cannot be exported")
    if stream and config.kernel == 1 and config.separable:
        raise ValueError("a stream's depthwise kernels are 3 or more frames long, not 1")
    if bits not in (None, 8, 6, 4):
        raise ValueError(f"weights have 8, 6 or 4 bits, or None for fp16; not {bits}")
    if graph not in GRAPHS:
        raise ValueError(f"the graph is {' or '.join(GRAPHS)}, not {graph}")
    if path.suffix != ".mlpackage":
        raise ValueError(f"{path}: a Core ML package's name ends in .mlpackage")
    if stream and (graph != "engine" or bits or stream < 1):
        raise ValueError("a stream's step is of at least 1 latent frame, in the engine graph and in fp16")
    shape = latent_shape(config, size, stream or latent_frames)
    size = decoded_size(config, shape) if stream else size
    # coremltools' progress bars are for a terminal only.
    with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        try:
            twin, about = phone_twin(copy.deepcopy(model).float().cpu(), graph), {}
            latents = for_graph(torch.zeros(shape), graph)
            if stream:
                packages, about["stream"] = convert_stream(twin, latents)
            else:
                packages = {"main": convert(Crop(twin, tuple(size)), {"latents": latents}, ["video"])}
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            raise OSError(f"{path}: its weights cannot be written to {tempfile.gettempdir()}; "
                          "is the disk full?") from None
        if bits:        # below 10,000 weights coremltools would want scikit-learn, and little is to be saved
            from coremltools.optimize import coreml as compress
            packages["main"] = compress.palettize_weights(packages["main"], compress.OptimizationConfig(
                compress.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=10_000)))
        about |= dict(config=json.dumps(asdict(config)), size=f"{size[0]}x{size[1]}", latent_frames=str(shape[2]),
                      frames=str(config.frames(shape[2])), weights_sha256=weights_hash(model), bits=str(bits or 16),
                      note=note, graph=graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
        try:
            save(packages, partial, about)
            install(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def convert_stream(twin, latents):
    """({"step": package, "edge": package}, when clips begin and end, as JSON) of a stream in steps of such latents."""
    probe = Step()
    with torch.no_grad():
        twin(latents, probe)
    state = {f"state_{i}": kept for i, kept in enumerate(probe.keeps)}
    edges = {"edges": torch.zeros(3 * len(probe.places), 1, 1, 1)}
    inputs, outputs = {"latents": latents, **state}, ["video", *(f"next_{name}" for name in state)]
    when = {"first_frame": probe.first, "begins": [begin for (begin, _), _ in probe.places],
            "ends": [end for _, (end, _) in probe.places]}
    return {"step": convert(StreamStep(twin, len(state)), inputs, outputs),
            "edge": convert(StreamStep(twin, len(state)), inputs | edges, outputs)}, json.dumps(when)


class StreamStep(torch.nn.Module):
    """(latents, what was kept ..., edges or not) to (video, what is kept ...)."""

    def __init__(self, decoder, states):
        super().__init__()
        self.decoder, self.states = decoder, states

    def forward(self, latents, *given):
        step = Step(given[:self.states], *given[self.states:])
        return (self.decoder(latents, step), *step.keeps)


ABOUT = {"latents": "({}): as the teacher's encoder gives them, no scaling factor",
         "video": "({}), about [-1, 1], not clamped",
         "edges": "(3 P, 1, 1, 1), of P convolutions: 1 in the step in which the clip begins, in which it ends, "
                  "after it"}


def save(packages, path, metadata):
    """Write {function: MLModel}, one "main" or several that share their weights, to `path`, and what they are."""
    ct = coremltools()
    if "main" in packages:
        packages["main"].save(str(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            functions = ct.utils.MultiFunctionDescriptor()
            for name, package in packages.items():
                package.save(f"{folder}/{name}.mlpackage")
                functions.add_function(f"{folder}/{name}.mlpackage", "main", name)
            functions.default_function_name = next(iter(packages))
            ct.utils.save_multifunction(functions, str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)         # the converter's own, no part of it
    spec = ct.utils.load_spec(str(path))
    described = spec.description
    described.metadata.shortDescription = f"Turbo-VAED: latents to video. {metadata['note']}".strip()
    described.metadata.license = "Code: MIT. Weights: under the licence of the teacher they were distilled from."
    described.metadata.userDefined.update(metadata)
    axes = ("t, C, h, w", "T, 3, H, W") if metadata["graph"] == "engine" else ("1, C, t, h, w", "1, 3, T, H, W")
    for part in (described, *described.functions):
        for feature in (*part.input, *part.output):
            text = ABOUT.get(feature.name, "frames that the next step needs: the first one's are zeros")
            feature.shortDescription = text.format(axes[feature.name == "video"])
    (path / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(spec.SerializeToString())


def install(made, path):
    """Rename the package `made` to `path`. The one that was there goes only then, and its report before it: no report
    stays beside a package that it does not speak of."""
    old = path.with_name(f".{os.getpid()}.old.{path.name}")
    try:
        if path.exists():
            path.with_suffix(".json").unlink(missing_ok=True)
            os.rename(path, old)            # a folder that holds files cannot be renamed over
        os.rename(made, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)


def write_report(path, r):
    """The report r as JSON beside the package at `path`."""
    file = path.with_suffix(".json")
    replace_files({file: lambda partial: partial.write_text(json.dumps(r, indent=1) + "\n")})
    print(f"{file}\n")


# ---------------------------------------------------------------------------------------------------------------------
# A package, read back from its files.

@dataclass
class Operation:
    kind: str           # as MIL calls it
    inputs: dict        # parameter -> names of values: operations' outputs, constants or the program's input
    outputs: list       # (name, shape, NumPy type)

    @property
    def part(self):
        return next((part for part in PARTS if self.outputs[0][0].startswith(f"{part}_")), "out")


NUMPY = {"FLOAT16": np.float16, "FLOAT32": np.float32, "INT32": np.int32, "INT16": np.int16, "UINT16": np.uint16,
         "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_, "STRING": np.str_}


class Program:
    """The ML Program of a package: operations in order, constants, metadata, graph. ValueError where it is damaged.

    function: None is the default one, for a stream "step"; its other is "edge"."""

    def __init__(self, path, function=None):
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such Core ML package")
        ct = coremltools()
        from coremltools.proto import MIL_pb2
        self.type_name = MIL_pb2.DataType.Name
        try:
            spec = ct.utils.load_spec(str(path))
            self.blob = np.memmap(path / "Data/com.apple.CoreML/weights/weight.bin", np.uint8, "r")
            main = spec.mlProgram.functions[function or spec.description.defaultFunctionName or "main"]
            block = main.block_specializations[main.opset]
            self.inputs = {x.name: self.type_of(x.type)[0] for x in main.inputs}        # latents first
            self.outputs = list(block.outputs)                                          # video first
            self.input, self.output = next(iter(self.inputs)), self.outputs[0]
            shape = self.inputs[self.input]
            self.graph, self.latent_frames = ("engine", shape[0]) if len(shape) == 4 else ("conv3d", shape[2])
        except Exception as error:      # protobuf, the package's reader and NumPy each have their own
            raise ValueError(f"{path}: damaged, or no Core ML program: {error}") from None
        self.metadata = dict(spec.description.metadata.userDefined)
        self.file_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self.constants, self.stored, self.operations = {}, {}, []       # stored: bytes of a constant in weight.bin
        self.largest_square = 0.0       # sum of squares that a norm has met, while running
        for op in block.operations:
            outputs = [(o.name, *self.type_of(o.type)) for o in op.outputs]
            name, inputs = outputs[0][0], {}
            for key, argument in op.inputs.items():
                inputs[key] = [a.name or f"{name}:{key}" for a in argument.arguments]
                for a in argument.arguments:
                    if not a.name:
                        self.constants[f"{name}:{key}"] = self.constant(a.value, f"{name}:{key}")
            if op.type == "const":
                self.constants[name] = self.constant(op.attributes["val"], name)
            elif op.type == "constexpr_lut_to_dense":
                self.constants[name] = lut_to_dense(**{key: self.constants[names[0]] for key, names in inputs.items()})
                self.stored[name] = sum(self.stored.get(names[0], 0) for names in inputs.values())
            else:
                self.operations.append(Operation(op.type, inputs, outputs))

    def type_of(self, value_type):
        """(shape, name of the data type) of a value's type."""
        return (tuple(d.constant.size for d in value_type.tensorType.dimensions),
                self.type_name(value_type.tensorType.dataType))

    def constant(self, value, name):
        """A constant as NumPy array, from the specification or from weight.bin.

        In weight.bin a header of 64 bytes comes first: a mark, the type, the size and where the data begin. The data
        follow, of less than a byte each where the type is such.
        """
        shape, kind = self.type_of(value.type)
        count = math.prod(shape)
        bits = 8 * np.dtype(NUMPY[kind]).itemsize if kind in NUMPY else int(kind.removeprefix("UINT"))
        if value.WhichOneof("value") == "blobFileValue":
            start = value.blobFileValue.offset
            header = self.blob[start:start + 24].tobytes()
            mark, size, data = (int.from_bytes(header[i:j], "little") for i, j in ((0, 4), (8, 16), (16, 24)))
            if mark != 0xDEADBEEF or data + size > len(self.blob) or size != -(-count * bits // 8):
                raise ValueError("weight.bin is truncated or damaged: "
                                 f"it does not hold {name}, {count} values of {kind}")
            raw = self.blob[data:data + size]
            self.stored[name] = size
        else:
            tensor = value.immediateValue.tensor
            raw = getattr(tensor, tensor.WhichOneof("value")).values
            if not isinstance(raw, bytes):
                return np.array(raw, NUMPY[kind]).reshape(shape)
            raw = np.frombuffer(raw, np.uint8)
        if kind in NUMPY:
            return raw.view(NUMPY[kind]).reshape(shape)
        fields = np.unpackbits(raw, bitorder="little", count=count * bits).reshape(count, bits)
        return (fields << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8).reshape(shape)


def lut_to_dense(indices, lut):
    """Palettised weights: indices (of the weights' shape) into tables (parts of each dimension ..., entries, 1)."""
    grid = np.ogrid[tuple(map(slice, indices.shape))]
    return lut[(*(g * parts // n for g, parts, n in zip(grid, lut.shape, indices.shape)), indices, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# MIL, operation by operation, in PyTorch. Parameters are MIL's; one that is not here is an error, as is an operation.

def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    if pad_type not in ("custom", "valid") or pad[::2] != pad[1::2]:
        raise ValueError(f"conv pads {pad_type} {pad}")
    padding = pad[::2] if pad_type == "custom" else 0
    if x.ndim == 5:
        x, weight = (v.contiguous(memory_format=torch.channels_last_3d) for v in (x, weight))      # up to twice as fast
    return (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, bias, strides, padding, dilations, groups)


def gather(x, indices, axis, batch_dims, validate_indices):
    if batch_dims or min(indices) < 0 or max(indices) >= x.shape[axis]:
        raise ValueError(f"gather takes {indices} of {x.shape[axis]} with batch_dims {batch_dims}")
    return x.index_select(axis, torch.tensor(indices))


def slice_by_index(x, begin, end, begin_mask=None, end_mask=None, squeeze_mask=None):
    none = [False] * x.ndim
    if any(squeeze_mask or none):
        raise ValueError("slice_by_index squeezes")
    return x[tuple(slice(None if no_begin else b, None if no_end else e) for b, e, no_begin, no_end
                   in zip(begin, end, begin_mask or none, end_mask or none))]


def mil_layer_norm(x, axes, epsilon):
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)


def concat(values, axis, interleave):
    if interleave:
        raise ValueError("concat interleaves")
    return torch.cat(values, axis)


MIL = {
    "conv": conv, "gather": gather, "slice_by_index": slice_by_index, "layer_norm": mil_layer_norm, "concat": concat,
    "split": lambda x, axis, split_sizes: x.split(split_sizes, axis),
    "reduce_l2_norm": lambda x, axes, keep_dims: torch.linalg.vector_norm(x, dim=axes, keepdim=keep_dims),
    "linear_activation": lambda x, alpha, beta: x * alpha + beta,
    "real_div": lambda x, y: x / y,
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "silu": lambda x: F.silu(x),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(scale_factor_height, scale_factor_width), mode="nearest"),
}


def last_uses(program):
    """{number of an operation: names of values that nothing after it reads}."""
    last, uses = {}, {}
    for i, op in enumerate(program.operations):
        last.update(dict.fromkeys([name for name, _, _ in op.outputs] + sum(op.inputs.values(), []), i))
    for name, i in last.items():
        if name not in program.constants and name not in program.outputs:
            uses.setdefault(i, []).append(name)
    return uses


def tensor_or_number(constant):
    """A constant as PyTorch's functions take it: weights as float32 tensors, everything else as Python's own."""
    floats = constant.ndim and constant.dtype.kind == "f"
    return torch.from_numpy(constant.astype(np.float32)) if floats else constant.tolist()


@torch.inference_mode()
def run(program, latents, fp16):
    """Run the program's operations one by one, in float32; fp16=True rounds what each of them gives to fp16.

    latents float32 -> video float32, both as `for_graph` lays them out; or {input: tensor} -> {output: tensor}. A value
    is freed after its last use. Raises ValueError for an operation or parameter that is not known, a failing one, and
    one whose output is not of the declared shape.
    """
    from tqdm import tqdm
    values, unused = dict(latents) if isinstance(latents, dict) else {program.input: latents}, last_uses(program)
    for i, op in enumerate(tqdm(program.operations, unit="op", leave=False, disable=not sys.stderr.isatty())):
        where = f"operation {i}, {op.kind} {op.outputs[0][0]}"
        if op.kind not in MIL:
            raise ValueError(f"{where}: not one of the operations known here, so nothing is proven")
        try:
            arguments = {key: [values[n] if n in values else tensor_or_number(program.constants[n]) for n in names]
                         for key, names in op.inputs.items()}
            results = MIL[op.kind](**{key: v if key == "values" else v[0] for key, v in arguments.items()})
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None
        del arguments
        for (name, shape, kind), result in zip(op.outputs, results if op.kind == "split" else [results]):
            if tuple(result.shape) != shape or kind != "FLOAT16":
                raise ValueError(f"{where}: gives {tuple(result.shape)}, declared is {shape} of {kind}")
            values[name] = result.copy_(result.half()) if fp16 and op.kind not in MOVES else result
        del result, results
        if op.kind == "reduce_l2_norm":
            program.largest_square = max(program.largest_square, values[name].max().item() ** 2)
        for name in unused.get(i, ()):
            del values[name]
    return {name: values[name] for name in program.outputs} if isinstance(latents, dict) else values[program.output]


# ---------------------------------------------------------------------------------------------------------------------
# Proof.

# Worst error that passes, of a video in about [-1, 1]; ten times what is usual.
FLOAT32_BOUND, FP16_BOUND = 0.02, 0.05
PALETTE_FLOOR = 15      # dB between a student and itself with palettised weights: 4 bits leave 30, damage 10
WHOLE_FLOPS = 5e12                          # above, running a package whole takes minutes: see prove_by_height


def difference(video, expected):
    """Worst absolute error, and PSNR in dB with a peak of 2, the width of [-1, 1]."""
    error = video - expected
    return {"worst_error": error.abs().max().item(),
            "psnr": 10 * (4 / error.square().mean().clamp(1e-20)).log10().item()}


def run_stream(package, latents, call):
    """Decode latents (t, C, h, w) of a clip, t a multiple of the step's, by a stream's package as an app does it.

    package: its Program, for sizes and metadata. call(function, {input: tensor}) -> {output: tensor} runs one step:
    "edge" where a convolution's clip begins, ends or is over, which `edges` says, else "step". Steps go on, with
    whatever latents, until all frames are out; the first `first_frame` are none of the clip's. Returns
    (video (T, 3, H, W), calls of each).
    """
    when, config = json.loads(package.metadata["stream"]), TurboVAEDConfig(**json.loads(package.metadata["config"]))
    state = {name: torch.zeros(shape) for name, shape in package.inputs.items() if name.startswith("state_")}
    if not len(latents) or len(latents) % package.latent_frames:
        raise ValueError(f"a clip is a multiple of {package.latent_frames} latent frames, not {len(latents)}")
    chunks, video, calls = latents.split(package.latent_frames), [], Counter()
    first, count = when["first_frame"], config.frames(len(latents))
    while sum(map(len, video)) < first + count:
        s = len(video)
        begins, ends = torch.tensor(when["begins"]), len(chunks) + torch.tensor(when["ends"])
        edges = torch.stack([s == begins, s == ends, s > ends])
        given = {"latents": chunks[min(s, len(chunks) - 1)], **state}
        if edges.any():
            given["edges"] = edges.float().view(-1, 1, 1, 1)
        function = "edge" if edges.any() else "step"
        out = call(function, given)
        video.append(out["video"])
        state = {name: out[f"next_{name}"] for name in state}
        calls[function] += 1
    return torch.cat(video)[first:first + count], calls


def stream_length(program, steps=10):
    """How many latent frames make a clip with so many steps in the middle, for a stream's package."""
    when = json.loads(program.metadata["stream"])
    return program.latent_frames * (max(when["begins"]) - min(when["ends"]) + 1 + steps)


@torch.no_grad()
def with_weights_of(program, model):
    """The decoder that was exported, with the package's palettised weights and the others rounded to fp16."""
    decoder = phone_twin(model, program.graph)
    for name, p in decoder.named_parameters():
        palettised = program.constants.get(f"p_decoder_{name.replace('.', '_')}_to_fp16_palettized")
        p.copy_(p.half() if palettised is None else torch.from_numpy(palettised))
    return decoder


def check_weights(program, model, path):
    if program.metadata.get("weights_sha256") != weights_hash(model):
        raise ValueError(f"{path} was exported from other weights than this student's")


def predictor(path, units):
    """Core ML on those compute units of this Mac: call(function or None, {input: tensor}) -> {output: tensor}."""
    ct, loaded = coremltools(), {}

    def call(function, given):
        try:
            if function not in loaded:
                more = {"function_name": function} if function else {}
                loaded[function] = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[units], **more)
            out = loaded[function].predict({name: x.numpy().astype(np.float16) for name, x in given.items()})
            return {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in out.items()}
        except Exception as error:      # Core ML's own, of many classes
            raise ValueError(f"{path}: Core ML cannot run it on {units}: {summary(error)}") from None
    return call


@torch.inference_mode()
def compare(path, model, seed=0):
    """What the saved package at `path` computes, beside its student, on normal latents: {which: {worst_error, psnr}}.

    "float32" and "fp16": its operations one by one, see `run`; on a Mac "core_ml", Core ML's prediction on the CPU, and
    "neural_engine", the same where the Neural Engine may take part. Palettised packages are compared with the student
    that has their weights, and "palettised" is that one beside `model` itself. Raises ValueError as `run` and Program
    do, for a package of other weights, and for Core ML's own errors.
    """
    program, model = Program(path), copy.deepcopy(model).float().cpu().channels_last()
    check_weights(program, model, path)
    height, width = map(int, program.metadata["size"].split("x"))
    streams = "stream" in program.metadata
    shape = latent_shape(model.config, (height, width), stream_length(program) if streams else program.latent_frames)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    expected = for_graph(model.eval()(latents)[..., :height, :width] if not streams else model(latents), program.graph)
    latents = for_graph(latents, program.graph)
    results = {}
    if program.metadata["bits"] != "16":
        palettised = with_weights_of(program, model)(latents)[..., :height, :width]
        results["palettised"] = difference(palettised, expected)
        expected = palettised
    functions = {"step": program, "edge": Program(path, "edge")} if streams else {"main": program}
    for which, fp16 in (("float32", False), ("fp16", True)):
        call = lambda function, given: run(functions[function], given, fp16)
        video, calls = run_stream(program, latents, call) if streams else (call("main", latents), Counter(main=1))
        results[which] = difference(video, expected)
    results["fp16"]["largest_sum_of_squares"] = max(function.largest_square for function in functions.values())
    if streams:
        results["calls"] = dict(calls)
    if sys.platform == "darwin":
        for which, units in (("core_ml", "CPU_ONLY"), ("neural_engine", "CPU_AND_NE")):     # the second has no bound
            call = predictor(path, units)
            video = run_stream(program, latents, call)[0] if streams else call(None, {"latents": latents})["video"]
            results[which] = difference(video, expected)
    return results


def check(results):
    """Raise ValueError if a result of `compare` is outside the bounds."""
    if "palettised" in results and not results["palettised"]["psnr"] > PALETTE_FLOOR:
        raise ValueError(f"the palettised weights are not the student's: PSNR {results['palettised']['psnr']:.1f} dB")
    for which, bound in (("float32", FLOAT32_BOUND), ("fp16", FP16_BOUND), ("core_ml", FP16_BOUND)):
        if which in results and not results[which]["worst_error"] <= bound:     # NaN is not
            raise ValueError(f"the package is not the student: worst error {results[which]['worst_error']:.3g} in "
                             f"{which}, {bound} would pass; PSNR {results[which]['psnr']:.1f} dB")


def same_but_for_height(program, other):
    """Raise ValueError unless two programs are the same operations with the same wiring, weights and parameters, but
    for heights in shapes, which are all longer by one factor."""
    tall, short = (p.inputs[p.input] for p in (program, other))
    grown = lambda a, b: len(a) == len(b) and all(x == y or x * short[-2] == y * tall[-2] for x, y in zip(a, b))
    keys = ("stream", "config", "frames", "latent_frames")
    same = lambda p: [*p.inputs, *p.outputs, *(p.metadata.get(key) for key in keys)]
    if same(program) != same(other):
        raise ValueError("names or metadata are not what they are at the smaller height")
    names = {name: name for name in program.inputs}         # of a value here: its name there
    if len(program.operations) != len(other.operations):
        raise ValueError(f"{len(program.operations)} operations, {len(other.operations)} at the smaller height")
    for i, (a, b) in enumerate(zip(program.operations, other.operations)):
        same = a.kind == b.kind and a.inputs.keys() == b.inputs.keys() and len(a.outputs) == len(b.outputs)
        for key in a.inputs if same else ():
            same = same and len(a.inputs[key]) == len(b.inputs[key])
            for x, y in zip(a.inputs[key], b.inputs[key]):
                if x in program.constants and y in other.constants:
                    x, y = program.constants[x], other.constants[y]
                    if key == "end" and "end_mask" in a.inputs:         # which says where it does not count
                        x, y = (v[~program.constants[a.inputs["end_mask"][0]]] for v in (x, y))
                    resized = key == "shape" and a.kind == "reshape" and grown(x.tolist(), y.tolist())
                    same = same and (np.array_equal(x, y) or resized)
                else:
                    same = same and names.get(x) == y
        for (x, shape, kind), (y, *rest) in zip(a.outputs, b.outputs):
            same = same and grown(shape, rest[0]) and kind == rest[1]
            names[x] = y
        if not same:
            raise ValueError(f"operation {i}, {a.kind} {a.outputs[0][0]}, is not what it is at the smaller height")
    if [names[name] for name in program.outputs] != other.outputs:
        raise ValueError("the outputs are not those of the smaller height")


def prove_by_height(path, model):
    """`compare` for a package that is too large to run: of the same student exported at a fraction of the height, after
    showing that the two programs are the same but for it. None where no such height exists, or weights are palettised.
    """
    program, config = Program(path), model.config
    streams = "stream" in program.metadata
    height, width = map(int, program.metadata["size"].split("x"))
    t, h = program.latent_frames, program.inputs[program.input][-2]
    least = 1 if streams else 8         # a stream is many steps, in which the height matters as little
    rows = next((n for n in range(least, h) if h % n == 0), None)
    cropped = height != h * config.compression[1] and not streams
    if not rows or cropped or program.metadata["bits"] != "16":
        return None
    check_weights(program, model, path)
    with tempfile.TemporaryDirectory() as folder:
        size, small = (rows * config.compression[1], width), Path(folder) / "small.mlpackage"
        export(model, size, t, small, graph=program.graph, stream=t if streams else None)
        for function in ("step", "edge") if streams else (None,):
            same_but_for_height(Program(path, function), Program(small, function))
        return compare(small, model) | {"run_at": f"{size[0]}x{size[1]}"}


def verify(path, model, seed=0):
    """Prove that the package at `path` computes what the student does; the worst absolute error with fp16 rounding.

    See `compare`, whose arguments these are. Raises ValueError where it does not.
    """
    results = compare(path, model, seed)
    check(results)
    return results["fp16"]["worst_error"]


# ---------------------------------------------------------------------------------------------------------------------
# Report.

# What the Neural Engine is known to run, of what may be met with here, by public measurements (the ane-guide, 2026)
ENGINE = {"conv", "add", "mul", "real_div", "relu", "silu", "linear_activation", "reduce_l2_norm", "layer_norm",
          "concat", "split", "slice_by_index", "reshape", "pixel_shuffle"}
ON_CHIP = 2         # MB that stay on its chip; a larger tensor is streamed through in tiles


def why_not(op, shapes, constants):
    """What keeps an operation off the Neural Engine; None if nothing is known to. shapes: of the tensors that it reads
    and writes. constants: its parameters."""
    begin, from_first = constants.get("begin", [0]), constants.get("begin_mask", [False])
    reasons = {
        "3D convolution": op.kind == "conv" and len(shapes[0]) > 4,
        "runs on the CPU or GPU only": op.kind == "gather",
        "rewrites memory": op.kind == "transpose",
        "not known to run there": op.kind not in ENGINE,
        "rank above 4": max(map(len, shapes)) > 4,
        "height or width above 16384, channels or frames above 65536":
            any(max(shape[-2:]) > 16384 or max(shape) > 65536 for shape in shapes),
        "kernel wider than 13": op.kind == "conv" and max(constants["weight"].shape[2:]) > 13,
        "factor other than 2, 3, 4, 8": constants.get("upscale_factor", 2) not in (2, 3, 4, 8),
        "slice of the last axis with an offset":
            begin[-1] and not from_first[-1] or op.kind == "split" and constants["axis"] in (3, -1),
        "not fp16": any(kind != "FLOAT16" for _, _, kind in op.outputs)}
    return next((reason for reason, holds in reasons.items() if holds), None)


def report(program):
    """What a phone will have to do, as a dict: totals, operations by kind, and by part of the decoder.

    views: reshapes, and slices and splits of the batch dimension: they move nothing, their memory is their source's.
    off_engine: operations that keep off the Neural Engine, in "off_engine_kinds" by reason and kind. flops: two for
    each multiply-add of the convolutions. bytes_moved: every operation but views reads its inputs and writes its
    outputs once. peak_activation_bytes: all that is alive at once in program order, inputs and outputs of the operation
    included. largest_bytes: the largest tensor. Core ML may fuse operations and need less.
    """
    shapes = dict(program.inputs)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    unused, alive, root, seen, off_engine = last_uses(program), set(shapes), {}, set(), {}
    parts = {part: dict(operations=0, views=0, off_engine=0, parameters=0, weight_bytes=0, flops=0, bytes_moved=0,
                        peak_activation_bytes=0, largest_bytes=0) for part in PARTS}
    for i, op in enumerate(program.operations):
        row, written = parts[op.part], [name for name, _, _ in op.outputs]
        read = [name for names in op.inputs.values() for name in names]
        weights = [n for n in read if n in program.stored]
        source = next((n for n in read if n in shapes), None)
        view = op.kind == "reshape" or op.kind in ("slice_by_index", "split") and all(
            shape[1:] == shapes[source][1:] for _, shape, _ in op.outputs)
        view = view and not set(written) & set(program.outputs)         # an output has memory of its own
        for name, shape, kind in op.outputs:
            shapes[name], sizes[name] = shape, np.dtype(NUMPY[kind]).itemsize * math.prod(shape)
            root[name] = root.get(source, source) if view else name         # whose memory it is
        parameters = {key: program.constants[n] for key, (n, *_) in op.inputs.items() if n in program.constants}
        reason = why_not(op, [shapes[n] for n in [*read, *written] if n in shapes], parameters)
        if reason:
            off_engine.setdefault(reason, Counter())[op.kind] += 1
        row["operations"] += 1
        row["views"] += view
        row["off_engine"] += reason is not None
        row["parameters"] += sum(program.constants[n].size for n in weights if n not in seen)
        row["weight_bytes"] += sum(program.stored[n] for n in weights if n not in seen)
        seen.update(weights)
        if op.kind == "conv":
            row["flops"] += 2 * math.prod(op.outputs[0][1]) * parameters["weight"][0].size
        if not view:
            row["bytes_moved"] += sum(program.stored[n] if n in weights else sizes.get(n, 0) for n in [*read, *written])
            row["largest_bytes"] = max(row["largest_bytes"], *(sizes[n] for n in written))
        alive.update(written)
        held = sum(sizes[n] for n in {root.get(n, n) for n in alive})
        row["peak_activation_bytes"] = max(row["peak_activation_bytes"], held)
        alive.difference_update(unused.get(i, ()))
    kinds, largest = Counter(op.kind for op in program.operations), max(shapes, key=sizes.get)
    over = lambda key: max if key in ("peak_activation_bytes", "largest_bytes") else sum
    total = {key: over(key)(row[key] for row in parts.values()) for key in parts["out"]}
    stream = {"stream": program.latent_frames} if "stream" in program.metadata else {}
    return {**total, **stream, "package_bytes": program.file_bytes,
            "fp16_bytes": program.file_bytes + sum(2 * program.constants[n].size - program.stored[n] for n in seen),
            "highest_rank": max(map(len, shapes.values())),
            "largest_tensor": {"name": largest, "shape": shapes[largest], "bytes": sizes[largest]},
            "kinds": dict(kinds.most_common()), "off_engine_kinds": off_engine, "parts": parts}


def package_report(path):
    """The `report` of a package; a stream's has that of its other function as "edge"."""
    program = Program(path)
    return report(program) | ({"edge": report(Program(path, "edge"))} if "stream" in program.metadata else {})


def table(r):
    """The report as lines of text."""
    columns = (("operations", "operations", 1, 0), ("views", "views", 1, 0), ("off engine", "off_engine", 1, 0),
               ("M weights", "parameters", 1e6, 3), ("weights MB", "weight_bytes", 1e6, 2), ("GFLOP", "flops", 1e9, 1),
               ("GB moved", "bytes_moved", 1e9, 3), ("peak MB", "peak_activation_bytes", 1e6, 1),
               ("largest MB", "largest_bytes", 1e6, 1))
    lines = [" " * 8 + "".join(f"{title:>12}" for title, *_ in columns)]
    for name, row in (*r["parts"].items(), ("total", r)):
        lines.append(f"{name:8}" + "".join(f"{row[key] / unit:12.{digits}f}" for _, key, unit, digits in columns))
    count = lambda kinds: ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    off_engine = "; ".join(f"{count(kinds)} ({reason})" for reason, kinds in r["off_engine_kinds"].items())
    largest = r["largest_tensor"]
    return "\n".join([*lines, count(r["kinds"]),
                      f"package {r['package_bytes'] / 1e6:.1f} MB ({r['fp16_bytes'] / 1e6:.1f} in fp16), highest rank "
                      f"{r['highest_rank']}, largest tensor {'x'.join(map(str, largest['shape']))}, "
                      f"{largest['bytes'] / 1e6:.1f} MB; the Neural Engine keeps {ON_CHIP} MB on its chip",
                      f"kept off the Neural Engine: {off_engine or 'none'}"])


def prove(path, model, r, whole=False):
    """Compare the package with the student, print how they differ; the report with the proof, or ValueError if too
    much."""
    started = time.perf_counter()
    flops = r["flops"] * (3 * stream_length(Program(path)) // r["stream"] if "stream" in r else 1)
    results = (prove_by_height(path, model) if flops > WHOLE_FLOPS and not whole else None) or compare(path, model)
    words = {"palettised": "its weights against the student's", "float32": "its operations in float32",
             "fp16": "its operations, each rounded to fp16",
             "core_ml": "Core ML's prediction on the CPU", "neural_engine": "with the Neural Engine"}
    if "run_at" in results:
        print(f"run at {results['run_at']}, where it is the same program but for the height (--whole runs all of it):")
    if "calls" in results:
        print("a clip of {step} steps in the middle and {edge} where layers begin and end, against the whole decode:"
              .format(**results["calls"]))
    for which, result in [(which, result) for which, result in results.items() if which in words]:
        print(f"{words[which]}: worst error {result['worst_error']:.2g}, PSNR {result['psnr']:.1f} dB")
    if largest := results["fp16"]["largest_sum_of_squares"]:
        print(f"largest sum of squares under a norm {largest:.3g}, fp16 holds 65504")
    print(f"in {time.perf_counter() - started:.0f} s", flush=True)
    check(results)
    return {**r, "proof": results}


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(usage="%(prog)s [--student PATH] [options]; --help explains each",
                                     description="Student to Core ML packages, each run operation by operation and "
                                     "compared with the student, and a report of what a phone will have to do.")
    parser.add_argument("--student", metavar="PATH", help="a run's folder, a file or a hub id (default: the newest "
                        "under out/, else the shipped one)")
    parser.add_argument("--config", choices=CONFIGS, help="the student's configuration, where its file does not say")
    parser.add_argument("--random", action="store_true", help="random weights for --config, to measure speed only")
    parser.add_argument("--size", nargs="+", metavar="HxW", help="of the video in pixels, one package each (default "
                        "512x512 720x1280); what is no multiple of the compression is cropped in the graph")
    parser.add_argument("--latent-frames", type=number(int, 1), metavar="N", help="default: what makes 17 frames, "
                        "16 for students that keep first frames")
    parser.add_argument("--bits", type=int, choices=(8, 6, 4), help="palettise the weights (default: fp16)")
    parser.add_argument("--graph", nargs="+", choices=GRAPHS, default=["engine"], help="engine: two-dimensional, for "
                        "the Neural Engine (default); conv3d: for the phone's GPU; or both")
    parser.add_argument("--stream", type=number(int, 1), metavar="N", help="export a step of a stream: N latent frames "
                        "at a time, with what layers keep going in and out, so that a phone plays video of any length")
    parser.add_argument("--out", metavar="DIR",
                        help="folder for the packages (default: the student's run, else out/export)")
    parser.add_argument("--whole", action="store_true", help=f"run packages of more than {WHOLE_FLOPS / 1e12:.0f} "
                        "TFLOP whole, which takes minutes, instead of showing that they are the same program as one of "
                        "a fraction of the height")
    parser.add_argument("--verify", metavar="PACKAGE", help="export nothing: compare this package with the student")
    args = parser.parse_args()
    if args.verify and (args.size or args.bits or args.stream or args.latent_frames or args.out
                        or args.graph != ["engine"]):
        parser.error("--verify PACKAGE takes the package as it is: beside it go --student, --config, --random, --whole")
    sizes = []
    for size in args.size or ("512x512", "720x1280"):
        height, _, width = size.partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            parser.error(f"--size is HEIGHTxWIDTH in pixels, such as 720x1280; not {size}")
        sizes.append((int(height), int(width)))
    args.size = sizes
    if args.stream and (args.bits or args.latent_frames or args.graph != ["engine"]):
        parser.error("--stream N is in the engine graph and fp16, and says itself how many latent frames a step takes")
    if args.random and (not args.config or args.student):
        parser.error("--random needs --config NAME and goes without --student")
    if args.config and not args.random and not args.student:
        parser.error("--config goes with --random or with --student PATH")
    return args


def find_student(args):
    """(name, model, folder for its packages): a run's own student is named after its teacher and has its packages in
    the run's folder; where students share a folder, the file's or the run's name tells them apart."""
    if args.random:
        torch.manual_seed(0)
        return f"{args.config}_random", TurboVAED(CONFIGS[args.config]), Path(args.out or "out/export")
    path = args.student or default_student()
    model = TurboVAED.from_pretrained(path, config=args.config)
    teacher = model.metadata.get("teacher")
    if teacher is None:
        teacher = next((n for n, c in CONFIGS.items() if c == model.config), "student")
        print(f"{path} does not say which teacher it was made for: the package is named after {teacher}")
    teacher = re.sub(r"[^\w.-]", "_", teacher)          # it is to be in a file's name
    file = Path(path).resolve()
    file = file / OWN_FILE if file.is_dir() else file
    own = file.parent.parent == Path("out").resolve()
    label = file.parent.name if file.name == OWN_FILE else file.stem
    if own and not args.out and file.name == OWN_FILE:
        return teacher, model, file.parent
    folder = Path(args.out or (file.parent if own else "out/export"))
    return label if label.startswith(teacher) else f"{teacher}_{label}", model, folder


def check_whose(path, model):
    """Raise ValueError if there is another student's package at `path`, but in a run's folder, whose student goes
    on."""
    if (path.parent / OWN_FILE).exists() or not path.exists():
        return
    if Program(path).metadata.get("weights_sha256") != weights_hash(model):
        raise ValueError(f"{path} is another student's: name another folder with --out, or delete it")


def main():
    args = parse()
    if args.verify and not Path(args.verify).is_dir():
        raise FileNotFoundError(f"{args.verify}: no such Core ML package")
    check_writable(args.out or "out")
    name, model, folder = find_student(args)
    if args.verify:
        path = Path(args.verify)
        return write_report(path, prove(path, model, package_report(path), args.whole))
    bits, paths = f"_{args.bits}bit" * bool(args.bits), {}
    for size, graph in itertools.product(args.size, args.graph):
        shape = latent_shape(model.config, size, args.latent_frames)
        frames = f"stream{args.stream}" if args.stream else model.config.frames(shape[2])
        if args.stream:         # an app crops what it shows
            size = decoded_size(model.config, shape)
        paths[size, graph] = folder / f"{name}_{frames}x{size[0]}x{size[1]}_{graph}{bits}.mlpackage"
        check_whose(paths[size, graph], model)
    check_writable(folder)
    for (size, graph), path in paths.items():
        started, made = time.perf_counter(), path.with_name(f".{os.getpid()}.{path.name}")
        try:        # what is there stays until the new package is proven
            note = "Random weights: for speed only." if args.random else ""
            export(model, size, args.latent_frames, made, args.bits, graph, args.stream, note)
            r = package_report(made)
            print(f"{path}: exported in {time.perf_counter() - started:.0f} s\n{table(r)}", flush=True)
            if args.stream:
                print(f"the same where layers begin and end:\n{table(r['edge'])}", flush=True)
            r = prove(made, model, r, args.whole)
            install(made, path)
            write_report(path, r)
        finally:
            shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    run_command(main, "a smaller --size or fewer --latent-frames need less")
