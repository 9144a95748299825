"""Student to phones, proven right on any machine: Core ML, Core AI or ExecuTorch, with fixed shapes.

    python export.py                                     # Core ML: the newest student, at 512x512 and 720x1280
    python export.py --format coreai --stream 2          # for iOS 27 and macOS 27, with video of any length
    python export.py --format executorch --float32       # for Android and any CPU, by XNNPACK
    python export.py --config ltx --random               # no checkpoint at hand: for speed only
    python export.py --verify out/ltx/ltx_17x512x512_engine.mlpackage --student out/ltx

Every file is read back, executed and compared with the student on the same latents before it replaces an older one:
by Core AI's and ExecuTorch's own runtimes, and Core ML's operations one by one in PyTorch, in float32 and with each
result rounded to fp16; on a Mac also by Core ML itself. The report says what a phone will have to do.
"""
import argparse
import asyncio
import contextlib
import copy
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (CONFIGS, OWN_FILE, ChannelNorm, Context, Conv3d, Resnet, SeparableConv3d, TurboVAED, Upsampler,
                   Upsampler2d, atomically, check_writable, choose_student, number, parse_size,
                   run_command, summary, weights_hash)

TINY = 2.0 ** -24           # the smallest number fp16 has


# ---------------------------------------------------------------------------------------------------------------------
# The student's twin for phones: its modules with other forwards that compute the same. The Neural Engine has no 3D
# convolution and no gather: tensors are (T, C, H, W), and a convolution has the frames it sees among its channels.

@torch.library.custom_op("turbo_vaed::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| / sqrt(C) + 2^-24) over channels: three operations, of which one writes a tensor of x's size.

    One of them squares and sums: squares of their own would overflow fp16 from 256 on. 2^-24 serves 0 / 0 only.
    """
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5 + TINY)


@torch.library.custom_op("turbo_vaed::layer_norm", mutates_args=())
def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over channels without its affine part: one operation."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1).contiguous()


rms_norm.register_fake(lambda x: torch.empty_like(x))
layer_norm.register_fake(lambda x, eps: torch.empty_like(x))


def take(x, start, end):
    """x[start:end]; coremltools knows no slice that takes all."""
    return x if (start, end) == (0, len(x)) else x[start:end]


def frames_of(x):
    """The frames of x, each (1, C, H, W); coremltools knows no split into one."""
    return list(x.split(1)) if len(x) > 1 else [x]


def join(pieces):
    """Frames one after the other; neither format knows a concat of one."""
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def crop(video, size):
    return video if size in (None, video.shape[-2:]) else video[..., :size[0], :size[1]]


class TwinChannelNorm(ChannelNorm):
    def forward(self, x):
        return layer_norm(x, self.eps)


class TwinResnet(Resnet):
    def forward(self, x):
        h = self.conv1(self.activation(rms_norm(x)))
        h = self.conv2(F.silu(rms_norm(h)))
        return h + (self.conv_shortcut(self.norm3(x)) if hasattr(self, "conv_shortcut") else x)


class TwinConv3d(Conv3d):
    def rewrite(self):
        """k x 3 x 3 over C channels is 3 x 3 over k C channels: those of k frames, one frame after the other."""
        self.conv.weight = torch.nn.Parameter(self.conv.weight.transpose(1, 2).flatten(1, 2))

    def convolve(self, x):
        """n windows of k frames each, one after the other: (n k, C, H, W) -> (n, C', H, W)."""
        x = x.reshape(-1, self.conv.weight.shape[1], *x.shape[2:])
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=self.conv.padding[1:])

    def forward(self, x):
        """One output frame for each window of k frames; the end frames are repeated.

        Every k-th window begins where the one before it ends: k slices of x hold all windows that lie in x. A concat
        orders the outputs. Windows at the ends are copied together, and all of them where that moves less.
        """
        k, T = self.conv.kernel_size[0], len(x)
        if k == 1:
            return self.convolve(x)
        r, frames = k // 2, frames_of(x)
        frames = frames[:1] * r + frames + frames[-1:] * r
        copied = range(T)
        if k * (T - 2 * r) * x.shape[1] > T * self.conv.out_channels:
            copied = [*range(r), *range(T - r, T)]
        ends = self.convolve(torch.cat([frame for t in copied for frame in frames[t:t + k]]))
        if len(copied) == T:
            return ends
        outputs = dict(zip(copied, frames_of(ends)))
        for first in range(r, min(r + k, T - r)):
            windows = range(first, T - r, k)
            inside = take(x, first - r, first - r + k * len(windows))
            outputs.update(zip(windows, frames_of(self.convolve(inside))))
        return torch.cat([outputs[t] for t in range(T)])


class CpuConv3d(TwinConv3d):
    """Two output frames by four 2D convolutions in place of six: Winograd's F(2, 3), along time."""

    def rewrite(self):
        a, b, c = self.conv.weight.unbind(2)
        self.taps = torch.nn.ParameterList([a.clone(), (a + b + c) / 2, (a - b + c) / 2, c.clone()])
        del self.conv.weight

    def forward(self, x):
        frames, T = frames_of(x), len(x)
        frames = frames[:1] + frames + [x[T - 1:] for _ in range(1 + T % 2)]       # XNNPACK joins no tensor with itself
        before, even, odd, after = (join(frames[i:i + T + T % 2:2]) for i in range(4))
        conv = lambda x, i, bias=None: F.conv2d(x, self.taps[i], bias, padding=1)
        a, b = conv(before - odd, 0), conv(even + odd, 1, self.conv.bias)
        c, d = conv(odd - even, 2), conv(after - even, 3)
        pairs = zip(frames_of(a + b + c), frames_of(b - c + d))
        return torch.cat([frame for pair in pairs for frame in pair][:T])


class TwinSeparableConv3d(SeparableConv3d):
    def rewrite(self):
        """The depthwise convolution is k two-dimensional ones, summed: one for each frame that it sees."""
        self.taps = torch.nn.ParameterList(w.contiguous() for w in self.depthwise_conv.weight.unbind(2))
        self.pointwise_conv.weight = torch.nn.Parameter(self.pointwise_conv.weight.squeeze(2))
        del self.depthwise_conv.weight

    def forward(self, x):
        r, T, bias = len(self.taps) // 2, len(x), self.depthwise_conv.bias
        ends = lambda t: [take(x, t, t + 1) for _ in range(r)]      # XNNPACK joins no tensor with itself
        x = join([*ends(0), x, *ends(T - 1)])
        h = F.conv2d(take(x, 0, T), self.taps[0], bias, padding=r, groups=len(bias))
        for i, weight in enumerate(self.taps[1:], start=1):
            h = h + F.conv2d(x[i:i + T], weight, padding=r, groups=len(bias))
        return F.conv2d(h, self.pointwise_conv.weight, self.pointwise_conv.bias)


class TwinUpsampler(Upsampler):
    def rewrite(self):
        """Order the output channels as (r_t, C, r_s²), one new frame after the other: growth in time is a reshape."""
        r_t, r_s = self.factors
        sizes, axis = ((-1, r_s ** 2, r_t), 2) if self.upsampling == "decoupled" else ((-1, r_t, r_s ** 2), 1)
        for p in list(self.conv.parameters())[-2:] if self.upsampling != "interpolate" else ():
            p.copy_(p.unflatten(0, sizes).movedim(axis, 0).flatten(0, 2))

    def forward(self, x):
        r_t, r_s = self.factors
        if self.upsampling == "interpolate":
            x = F.interpolate(x, scale_factor=r_s, mode="nearest") if r_s > 1 else x
            frames = [frame for frame in frames_of(x) for _ in range(r_t)]
            frames = [frame for piece in self.left(len(frames)) for frame in frames[piece]]
            return self.conv(join(frames) if r_t > 1 else x)
        x = self.conv(x)
        x = x.reshape(r_t * len(x), -1, *x.shape[2:])
        pieces = [take(x, piece.start, min(piece.stop, len(x))) for piece in self.left(len(x))]
        return F.pixel_shuffle(join(pieces), r_s) if r_s > 1 else join(pieces)


class TwinUpsampler2d(Upsampler2d):
    def forward(self, x):
        return F.pixel_shuffle(self.conv(F.silu(rms_norm(x))), 2)


class Twin(TurboVAED):
    def forward(self, latents):
        """(t, C, h, w) -> video (T, 3, height, width), cropped to `size` if there is one."""
        x = latents
        for layer in (*self.layers(), *self.upsamplers2d()):
            x = layer(x)
        return crop(self.conv_out(F.silu(rms_norm(x))), self.size)


TWINS = {twin.__base__: twin for twin in (TwinChannelNorm, TwinResnet, TwinConv3d, TwinSeparableConv3d, TwinUpsampler,
                                          TwinUpsampler2d, Twin)}


def rescale(twin):
    """Bring what the norms see to about 1 in size, by powers of two in the weights, which change no digit of the video.

    A norm does not mind the scale of its input, fp16 does: 65504 is its largest number, also for sums of squares where
    hardware holds them in fp16; unscaled, the shipped student's reach 7 million. Every convolution writes to a norm or
    to the sum of residuals, which only norms and upsamplers read. Its weights tell how much a convolution magnifies.
    """
    def scale(conv, by=None, read=1.0):
        """Multiply conv's output by `by`, or to about 1 in size, where its input was multiplied by `read`."""
        *depthwise, weight, bias = conv.parameters()
        magnifies = math.prod(float(w.norm()) / len(w) ** 0.5 for w in (weight, *depthwise[:1])) / read
        by = by or 2.0 ** -round(math.log2(max(magnifies, 1e-3)))
        weight.mul_(by / read)
        bias.mul_(by)
        for depthwise_bias in depthwise[1:]:
            depthwise_bias.mul_(read)
        return by

    residual = scale(twin.conv_in)
    for block in (twin.mid_block, *twin.up_blocks):
        if isinstance(block.conv_in, Resnet):
            scale(block.conv_in.conv1)
            residual = scale(block.conv_in.conv2, scale(block.conv_in.conv_shortcut))
        for upsampler in block.upsamplers:
            residual = scale(upsampler.conv, read=residual)
        for resnet in block.resnets:
            scale(resnet.conv1)
            scale(resnet.conv2, residual)
    for upsampler in twin.upsamplers2d():
        scale(upsampler.conv)


@torch.no_grad()
def phone_twin(student, size=None, cpu=False):
    """A float32 copy of the student on the CPU: latents (t, C, h, w) -> the same video (T, 3, H, W), cropped to `size`.

    cpu: with CpuConv3d. Raises ValueError for a subclass of TurboVAED.
    """
    if type(student) is not TurboVAED:
        raise ValueError(f"{type(student).__name__} has layers of its own, for which there is no twin")
    twin = copy.deepcopy(student).float().cpu().eval()
    for resnet in (module for module in twin.modules() if hasattr(module, "conv_shortcut")):
        conv = resnet.conv_shortcut.conv        # takes the affine part of its LayerNorm
        conv.bias += conv.weight.flatten(1) @ resnet.norm3.bias
        conv.weight *= resnet.norm3.weight[:, None, None, None]
    rescale(twin)
    for module in list(twin.modules()):
        module.__class__ = TWINS.get(type(module), type(module))
        if cpu and isinstance(module, TwinConv3d) and module.conv.kernel_size[0] == 3:
            module.__class__ = CpuConv3d
        if hasattr(module, "rewrite"):
            module.rewrite()
    twin.size = size
    return twin


def frames_first(x):
    """Latents or video (1, C, T, H, W) -> (T, C, H, W), as the twin has them."""
    return x[0].transpose(0, 1).contiguous()


def mean(x, eps):
    """The mean over channels, plus eps, as a 1x1 convolution: fast wherever convolutions are, in x's own precision."""
    full = lambda value, *shape: torch.full(shape, value, dtype=x.dtype)
    return F.conv2d(x, full(1 / x.shape[1], 1, x.shape[1], 1, 1), full(eps, 1))


def plain_layer_norm(x, eps):
    x = x - mean(x, 0)
    return x * torch.rsqrt(mean(x * x, eps))


def plain_pixel_shuffle(x, r):
    """As a transposed convolution: of four dimensions, and none of them is as short as r."""
    groups = x.shape[1] // r ** 2
    weight = torch.eye(r ** 2, dtype=x.dtype).view(r ** 2, 1, r, r).repeat(groups, 1, 1, 1)
    return F.conv_transpose2d(x, weight, stride=r, groups=groups)


# What the twin's operations become where Core ML's own are unknown.
PLAIN = {torch.ops.turbo_vaed.rms_norm.default: lambda x: x * torch.rsqrt(mean(x * x, TINY)),
         torch.ops.turbo_vaed.layer_norm.default: plain_layer_norm,
         torch.ops.aten.split.Tensor: lambda x, n: [x[i:i + n] for i in range(0, len(x), n)]}


# ---------------------------------------------------------------------------------------------------------------------
# A format is a class. write(path, student, settings) makes a file, Format(path) reads one, report() says what it is.
# compare(student, sample) yields (name, difference) of what it computes and what the student does. Where the student's
# weights times the latents are above `limit`, `proven_at` latents are run, after a look at program().

@dataclass(frozen=True)
class Settings:
    size: tuple                 # (height, width) of the video in pixels
    latent_frames: int = None   # None: what makes 17 frames, 16 where first frames are kept
    bits: int = None            # 8, 6 or 4: Core ML's weights are palettised by k-means
    graph: str = "plain"        # Core AI's: the student as it is, or "engine", its twin
    stream: int = 0             # Core AI's: latent frames a step; functions begin, step, end_0, end_1 ... beside clip
    float32: bool = False       # Core AI's and ExecuTorch's; Core ML has fp16 only
    note: str = ""              # of Core ML's description

    @property
    def dtype(self):
        return torch.float32 if self.float32 else torch.float16


def latent_shape(config, settings):
    """(t, C, h, w) of the latents that decode to at least the size of `settings`."""
    t = settings.latent_frames or next(t for t in range(1, 18) if config.frames(t) >= 16)
    return t, config.latent_channels, *(-(-side // config.compression[1]) for side in settings.size)


def about(student, settings):
    """The metadata of a file."""
    return {"weights_sha256": weights_hash(student), "config": json.dumps(asdict(student.config)),
            "settings": json.dumps(asdict(settings))}


def library(name):
    """A module that only one format needs, imported; what it was not tried with and lacks here stays unseen."""
    for logger in ("coremltools", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: pip install -r requirements.txt -r requirements-phones.txt") from None


@torch.no_grad()
def trace(module, inputs, table):
    """The program of a module, in the operations that are left by the decompositions of `table`."""
    return torch.export.export(module, tuple(inputs)).run_decompositions(table)


def shape_text(shape, dtype="f16"):
    return "x".join(map(str, (*shape, dtype)))


def summarise(operations, **functions):
    """A report of pairs (kind of an operation, what keeps it off the Neural Engine or None)."""
    off_engine = {}
    for kind, reason in operations:
        if reason:
            off_engine.setdefault(reason, Counter())[kind] += 1
    return {"operations": len(operations), "kinds": dict(Counter(kind for kind, _ in operations).most_common()),
            "off_engine_kinds": off_engine, "functions": functions}


def difference(video, expected):
    """Worst absolute error, and PSNR in dB with a peak of 2, the width of [-1, 1]."""
    error = (video - expected).abs()
    return {"worst_error": error.max().item(), "psnr": 10 * (4 / error.square().mean().clamp(1e-20)).log10().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Core ML: an ML Program in fp16, read back as coremltools' operations and variables, and run one by one in PyTorch.

def coremltools():
    """The package, told how the two norms above are written in MIL."""
    ct = library("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil import register_torch_op

    def rms_norm(context, node):
        x = context[node.inputs[0]]
        norm = mb.reduce_l2_norm(x=x, axes=[1], keep_dims=True, name=f"{node.name}_l2")
        rms = mb.linear_activation(x=norm, alpha=x.shape[1] ** -0.5, beta=TINY, name=f"{node.name}_rms")
        context.add(mb.real_div(x=x, y=rms, name=node.name))

    def layer_norm(context, node):
        context.add(mb.layer_norm(x=context[node.inputs[0]], axes=[1], epsilon=node.inputs[1], name=node.name))

    for lowering in (rms_norm, layer_norm):
        lowering.__name__ = f"turbo_vaed::{lowering.__name__}"      # what it is registered by
        register_torch_op(lowering, override=True)
    return ct


def operations(function):
    """What a function computes, in order, without its constants."""
    return [op for op in function.operations if op.op_type != "const" and not op.op_type.startswith("constexpr_")]


def inputs_of(op):
    """{parameter: its variables}; only concat has several."""
    return {key: list(v) if isinstance(v, (list, tuple)) else [v] for key, v in op.inputs.items() if v is not None}


def constant(variable):
    """The value of a constant, None for what is computed: floats as a float32 tensor, all others as Python's own."""
    palettised = variable.op and variable.op.op_type.startswith("constexpr_")
    value = variable.op.materialized_val_inference() if palettised else variable.val
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float32))
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


# Parameters are MIL's; one that is not here is an error, as is an operation.
def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    if pad_type not in ("custom", "valid") or pad[::2] != pad[1::2]:
        raise ValueError(f"conv pads {pad_type} {pad}")
    return F.conv2d(x, weight, bias, strides, pad[::2] if pad_type == "custom" else 0, dilations, groups)


def slice_by_index(x, begin, end, begin_mask=None, end_mask=None, squeeze_mask=None):
    if any(squeeze_mask or ()):
        raise ValueError("slice_by_index squeezes")
    bounds = [[None if masks and masks[axis] else places[axis] for axis in range(x.ndim)]
              for places, masks in ((begin, begin_mask), (end, end_mask))]
    return x[tuple(map(slice, *bounds))]


def mil_layer_norm(x, axes, epsilon):
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)


def concat(values, axis, interleave):
    if interleave:
        raise ValueError("concat interleaves")
    return torch.cat(values, axis)


MIL = {
    "conv": conv, "slice_by_index": slice_by_index, "layer_norm": mil_layer_norm, "concat": concat,
    "split": lambda x, axis, split_sizes: x.split(split_sizes, axis),
    "reduce_l2_norm": lambda x, axes, keep_dims: torch.linalg.vector_norm(x, dim=axes, keepdim=keep_dims),
    "linear_activation": lambda x, alpha, beta: x * alpha + beta,
    "real_div": lambda x, y: x / y, "add": lambda x, y: x + y,
    "silu": lambda x: F.silu(x), "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(scale_factor_height, scale_factor_width), mode="nearest"),
}
MOVES = ("slice_by_index", "concat", "split", "reshape", "pixel_shuffle", "upsample_nearest_neighbor")


@torch.inference_mode()
def run(function, latents, fp16):
    """Run a function's operations one by one, in float32: latents (t, C, h, w) -> video (T, 3, H, W).

    fp16 rounds what each of them gives. Raises ValueError for an operation or parameter that is not known, for one that
    fails, and for an output that is not of the declared shape.
    """
    from tqdm import tqdm
    ops, values = operations(function), {"latents": latents}
    last_use = {v.name: i for i, op in enumerate(ops) for variables in inputs_of(op).values() for v in variables}
    for i, op in enumerate(tqdm(ops, unit="op", leave=False, disable=not sys.stderr.isatty())):
        where = f"operation {i}, {op.op_type} {op.name}"
        if op.op_type not in MIL:
            raise ValueError(f"{where}: not one of the operations known here, so nothing is proven")
        arguments = {}
        for key, variables in inputs_of(op).items():
            arguments[key] = [values[v.name] if v.name in values else constant(v) for v in variables]
            if key != "values":
                arguments[key], = arguments[key]
        try:
            results = MIL[op.op_type](**arguments)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{where}: {summary(error)}") from None
        del arguments
        for variable, result in zip(op.outputs, results if op.op_type == "split" else [results]):
            if tuple(result.shape) != tuple(variable.shape):
                raise ValueError(f"{where}: gives {tuple(result.shape)}, declared is {tuple(variable.shape)}")
            values[variable.name] = result.copy_(result.half()) if fp16 and op.op_type not in MOVES else result
        del result, results
        values = {name: value for name, value in values.items() if last_use.get(name, i + 1) > i}
    return values["video"]


# What the Neural Engine is known to run, of what may be met with here, by public measurements (the ane-guide, 2026)
ENGINE = {"conv", "add", "real_div", "relu", "silu", "linear_activation", "reduce_l2_norm", "layer_norm", "concat",
          "split", "slice_by_index", "reshape", "pixel_shuffle"}


def why_not(op):
    """What keeps an operation off the Neural Engine; None if nothing is known to."""
    inputs = inputs_of(op)
    shapes = [v.shape for v in (*inputs.get("x", ()), *inputs.get("values", ()), *op.outputs)]
    if op.op_type not in ENGINE:
        return "not known to run there"
    if max(map(len, shapes)) > 4:
        return "rank above 4"
    if op.op_type == "pixel_shuffle" and constant(inputs["upscale_factor"][0]) not in (2, 3, 4, 8):
        return "factor other than 2, 3, 4, 8"
    if any(variable.dtype.get_bitwidth() != 16 for variable in op.outputs):
        return "not fp16"


class CoreML:
    suffix, limit, proven_at = ".mlpackage", 6e11, (8, sys.maxsize)

    def __init__(self, path):
        ct = coremltools()
        from coremltools.converters.mil.frontend.milproto.load import load
        self.path, spec = path, ct.utils.load_spec(str(path))
        program = load(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))    # checks types
        self.function, self.metadata = program.functions["main"], dict(spec.description.metadata.userDefined)

    @staticmethod
    def write(path, student, settings):
        ct, shape = coremltools(), latent_shape(student.config, settings)
        program = trace(phone_twin(student, settings.size), [torch.zeros(shape)], {})
        with contextlib.redirect_stderr(io.StringIO()):         # progress bars
            try:        # iOS 18 (macOS 15) is the first whose palettised weights are stored in 4 and 6 bits
                package = ct.convert(program, inputs=[ct.TensorType(name="latents", shape=shape, dtype=np.float16)],
                                     outputs=[ct.TensorType(name="video", dtype=np.float16)], skip_model_load=True,
                                     minimum_deployment_target=ct.target.iOS18)
            except RuntimeError as error:
                if "FileWriter" not in str(error):
                    raise
                raise OSError(f"weights cannot be written to {tempfile.gettempdir()}; is the disk full?") from None
            if settings.bits:       # below 10,000 weights coremltools wants scikit-learn, and little is to be saved
                compress = library("coremltools.optimize.coreml")
                package = compress.palettize_weights(package, compress.OptimizationConfig(
                    compress.OpPalettizerConfig(mode="kmeans", nbits=settings.bits, weight_threshold=10_000)))
        package.short_description = f"Turbo-VAED: latents to video. {settings.note}".strip()
        package.license = "Code: MIT. Weights: under the licence of the teacher they were distilled from."
        package.input_description["latents"] = "(t, C, h, w): as the teacher's encoder gives them, no scaling factor"
        package.output_description["video"] = "(T, 3, H, W), about [-1, 1], not clamped"
        package.user_defined_metadata.update(about(student, settings))
        package.save(str(path))
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)     # the converter's own, no part of it

    def report(self):
        """Functions, operations, and what keeps off the Neural Engine by what is known of it."""
        return summarise([(op.op_type, why_not(op)) for op in operations(self.function)],
                         main=dict(latents=shape_text(self.function.inputs["latents"].shape),
                                   video=shape_text(self.function.outputs[0].shape)))

    def program(self):
        """Its operations, wiring, weights and parameters, but for heights: the third of four axes."""
        def content(key, variable):
            value = constant(variable)
            value = np.delete(value, 2) if key in ("shape", "end") else value
            return variable.name if value is None else np.asarray(value).tobytes()

        return [(op.op_type, [v.name for v in op.outputs], {key: [content(key, v) for v in variables]
                 for key, variables in inputs_of(op).items()}) for op in operations(self.function)]

    def compare(self, student, sample):
        latents, video = sample()
        latents = frames_first(latents)
        if self.settings.bits:
            palettised = crop(with_weights_of(self.function, student)(latents), self.settings.size)
            yield "palettised", difference(palettised, video)
            video = palettised
        yield "float32", difference(run(self.function, latents, fp16=False), video)
        yield "fp16", difference(run(self.function, latents, fp16=True), video)
        for which, units in (("core_ml", "CPU_ONLY"), ("neural_engine", "CPU_AND_NE")):
            if sys.platform == "darwin":
                ct = coremltools()
                package = ct.models.MLModel(str(self.path), compute_units=ct.ComputeUnit[units])
                frames = package.predict({"latents": latents.numpy().astype(np.float16)})["video"]
                yield which, difference(torch.from_numpy(np.asarray(frames, np.float32)), video)


# ---------------------------------------------------------------------------------------------------------------------
# Core AI: the student as it is, also as a stream, or its twin.

def through(student, x, context):
    """x through all layers of a student, which share one queue of what they keep."""
    for layer in (*student.layers(), student.out):
        x = layer(x, context)
    return x


class Part(torch.nn.Module):
    """A clip, or the begin, a step or the end of a stream. states: what the layers keep for the next call, in order.
    Tensors are buffers, which the part overwrites. Numbers, places in a group of frames, are the same in every call."""

    def __init__(self, student, size, first=True, last=True, states=()):
        super().__init__()
        self.student, self.size, self.first, self.last, self.states = student, size, first, last, states
        for i, state in enumerate(states):
            if torch.is_tensor(state):
                self.register_buffer(f"state_{i}", torch.zeros(state.shape, dtype=state.dtype))

    def forward(self, *latents):
        if not self.states:
            return crop(self.student(*latents), self.size)
        kept = [getattr(self, f"state_{i}", state) for i, state in enumerate(self.states)]
        context = Context(self.first, self.last, () if self.first else kept)
        video = through(self.student, latents[0] if latents else kept[0][:, :, :0], context)
        for state, new in zip(kept, context.kept or [0 * state for state in kept]):     # states must be written
            if torch.is_tensor(state):
                state.copy_(new)
        return crop(video, self.size)


def parts(student, settings):
    """{function of an asset: (module, example latents)}."""
    (t, channels, h, w), n = latent_shape(student.config, settings), settings.stream
    if settings.graph == "engine":
        twin = phone_twin(student, settings.size).to(settings.dtype)
        return {"clip": (twin, [torch.zeros(t, channels, h, w, dtype=settings.dtype)])}
    student, ahead = copy.deepcopy(student).cpu().to(settings.dtype).eval(), student.reach(0) + n
    latents = lambda t: [torch.zeros(1, channels, t, h, w, dtype=settings.dtype)] if t else []
    clip = {"clip": (Part(student, settings.size), latents(t))}
    if not n:
        return clip
    if n % max(1, student.config.drop_first):
        raise ValueError(f"--stream {n}: this student's latents come in groups of {student.config.drop_first}, and a "
                         "step takes whole groups")
    context = Context(last=False)
    through(copy.deepcopy(student).to("meta"), latents(ahead)[0].to("meta"), context)
    part = lambda t, first, last: (Part(student, settings.size, first, last, context.kept), latents(t))
    return clip | {"begin": part(ahead, True, False), "step": part(n, False, False),
                   **{f"end_{rest}": part(rest, False, True) for rest in range(n)}}


def stream_calls(latents, n, ahead):
    """[(function, latents)] that decode a clip (1, C, t, h, w): `ahead` latents begin, n more are a step."""
    steps, rest = divmod(latents.shape[2] - ahead, n)
    begin, *chunks, end = latents.split([ahead, *[n] * steps, rest], dim=2)
    return [("begin", begin), *(("step", chunk) for chunk in chunks), (f"end_{rest}", end)]


class CoreAI:
    suffix, limit, proven_at = ".aimodel", 1.2e9, (2, 2)         # Apple's runtime is slow on a CPU

    def __init__(self, path):
        if hashlib.sha256((path / "main.mlirb").read_bytes()).digest() != (path / "main.hash").read_bytes():
            raise ValueError("main.mlirb is not what was written")
        self.asset = library("coreai.authoring").AIModelAsset.load(path)
        self.metadata = self.asset.metadata.creator_defined_metadata
        operation = self.asset.program._module._mlir_module.operation
        self.lines = operation.get_asm(large_resource_limit=16).splitlines()       # larger constants by their hash

    @staticmethod
    def write(path, student, settings):
        torch_to = library("coreai_torch")
        table = torch_to.get_decomp_table()
        table.update(PLAIN)
        if settings.graph == "engine":
            table[torch.ops.aten.pixel_shuffle.default] = plain_pixel_shuffle
        converter = torch_to.TorchConverter(mode=torch_to.TorchConverter.Mode.RELEASE)
        for name, (module, latents) in parts(student, settings).items():
            converter.add_exported_program(
                trace(module, latents, table), input_names=["latents"] * len(latents), output_names=["video"],
                entrypoint_name=name, state_names=[state for state, _ in module.named_buffers(recurse=False)])
        with contextlib.redirect_stderr(io.StringIO()):
            asset = converter.to_coreai().save_asset(path.absolute())
        entries = about(student, settings).items()
        asset.update_metadata(lambda metadata: [metadata.set_custom(*entry) for entry in entries])

    def report(self):
        """Functions, operations, and by Apple's rules what keeps off the Neural Engine and what takes more memory."""
        functions, found, narrow = {}, [], 0
        for line in self.lines:
            if graph := re.search(r"coreai.graph @(\w+)", line):
                functions[graph[1]] = {name: shape for shape, name in re.findall(
                    r'tensor<(\w+)>[^%]*?coreai.name = "(\w+)"', line)}
            kind, types = re.search(r"= coreai\.(?:\w+\.)*(\w+)", line), re.findall(r"tensor<(\w+)>", line)
            if kind and types and kind[1] != "constant":
                *shape, dtype = types[-1].split("x")
                found.append((kind[1], "rank above 5" if len(shape) > 5 else "float32" if dtype == "f32" else
                              "zero length" if "0" in shape else None))
                narrow += bool(shape) and int(shape[-1]) < 32
        return summarise(found, **functions) | {"narrow": narrow}

    def program(self):
        """Its functions, operations, wiring, and the hashes of its weights, in order."""
        return re.findall(r"(?<=@)(?:clip|begin|step|end_\d+)\b|coreai\.[\w.]+|resource_\w+|%\w+",
                          "\n".join(line for line in self.lines if not re.search(r"constant.*i32>$", line)))

    async def play(self, calls, states, options=None):
        """The video (T, 3, H, W) of calls [(function, latents), ...]. They fill and change states, at first {}."""
        runtime, video = library("coreai.runtime"), []
        to_array = lambda tensor: runtime.NDArray(tensor.to(self.settings.dtype).contiguous().numpy())
        async with self.asset.executable(options) as model:
            functions = {name: model.load_function(name) for name in dict(calls)}
            for name, latents in calls:
                about = functions[name].desc
                for key in about.state_names:
                    states.setdefault(key, to_array(torch.zeros(about.state_descriptor(key).shape)))
                inputs = {"latents": to_array(latents)} if latents.numel() else {}
                outputs = await functions[name](inputs, **({"state": states} if states else {}))
                frames = torch.from_numpy(outputs["video"].numpy()).float()
                video.append(frames if frames.ndim == 4 else frames_first(frames))
        return torch.cat(video)

    def compare(self, student, sample):
        latents, video = sample()
        calls = [("clip", frames_first(latents) if self.settings.graph == "engine" else latents)]
        played = lambda *arguments: difference(asyncio.run(self.play(*arguments)), video)
        yield "clip", played(calls, {})
        options = library("coreai.runtime").SpecializationOptions
        if options.is_supported():      # on a Mac, with USE_OS_COREAI=1
            yield "default_unit", played(calls, {}, options.default())
        n, ahead = self.settings.stream, student.reach(0) + self.settings.stream
        for t in range(ahead + 2 * n, ahead + 3 * n):       # two steps and each of the ends
            latents, video = sample(t)
            yield "stream", played(stream_calls(latents, n, ahead), {})


class ExecuTorch:       # the twin, whose operations XNNPACK runs
    suffix, limit, proven_at = ".pte", math.inf, ()

    def __init__(self, path):
        data = path.read_bytes()
        if data[4:6] != b"ET":                      # the runtime would abort
            raise ValueError("no ExecuTorch program")
        self.loaded = library("executorch.runtime").Runtime.get().load_program(path)
        self.method = self.loaded.load_method("forward")
        names = self.loaded.method_names - {"forward"}
        self.metadata = {name: self.loaded.load_method(name).execute([])[0] for name in names}
        deserialize = library("executorch.exir._serialize._program").deserialize_pte_binary
        self.plan, = (plan for plan in deserialize(data).program.execution_plan if plan.name == "forward")

    @staticmethod
    def write(path, student, settings):
        exir, xnnpack = library("executorch.exir"), library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        fold = library("executorch.exir.passes.constant_prop_pass").constant_prop_pass
        table = PLAIN | {torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}       # PyTorch's goes by float32
        latents = torch.zeros(latent_shape(student.config, settings), dtype=settings.dtype)
        program = trace(phone_twin(student, settings.size, cpu=True).to(settings.dtype), [latents], table)
        lowered = exir.to_edge_transform_and_lower(fold(program), partitioner=[xnnpack.XnnpackPartitioner()],
                                                   constant_methods=about(student, settings))
        path.write_bytes(lowered.to_executorch().buffer)

    def report(self):
        """Functions, delegates, and the operations that no delegate takes."""
        meta, found, dtype = self.method.metadata, [], "f32" if self.settings.float32 else "f16"
        for call in (instruction.instr_args for instruction in self.plan.chains[0].instructions):
            if hasattr(call, "delegate_index"):
                found.append(("XNNPACK delegate", None))
            elif hasattr(call, "op_index"):
                kind = self.plan.operators[call.op_index].name.removeprefix("aten::")
                found.append((kind, "XNNPACK joins no frame with itself" if kind == "cat" else "unknown to XNNPACK"))
        return summarise(found, forward=dict(latents=shape_text(meta.input_tensor_meta(0).sizes(), dtype),
                                             video=shape_text(meta.output_tensor_meta(0).sizes(), dtype)))

    def compare(self, student, sample):
        latents, video = sample()
        frames, = self.method.execute([frames_first(latents).to(self.settings.dtype)])
        yield "clip", difference(frames.float(), video)


FORMATS = {"coreml": CoreML, "coreai": CoreAI, "executorch": ExecuTorch}
# (worst error, PSNR in dB) of a video in about [-1, 1] that pass; Core ML's weights are fp16 in "float32" too.
BOUNDS = {"float32": (0.02, 60), "fp16": (0.05, 55), "exact": (1e-3, 100), "neural_engine": (math.inf, 0)}


@torch.no_grad()
def with_weights_of(function, student):
    """The student's twin, with the package's palettised weights and the others rounded to fp16."""
    twin = phone_twin(student)
    outputs = {variable.name: variable for op in function.operations for variable in op.outputs}
    for name, p in twin.named_parameters():
        variable = outputs.get(f"p_{name.replace('.', '_')}_to_fp16_palettized")
        p.copy_(constant(variable) if variable else p.half())
    return twin


def format_of(path):
    """The class of the file at `path`, by the end of its name."""
    for form in FORMATS.values():
        if form.suffix == Path(path).suffix:
            return form
    raise ValueError(f"{path}: a package for phones ends with .mlpackage, .aimodel or .pte")


def read(path, form=None):
    """The file at `path`, as its format's class. ValueError where it is damaged."""
    form = form or format_of(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        file = form(Path(path))
        file.settings = Settings(**json.loads(file.metadata["settings"]))
        return file
    except ImportError:
        raise
    except Exception as error:      # the formats' readers have many classes of errors
        raise ValueError(f"{path}: damaged, or not written by this program: {summary(error)}") from None


@torch.no_grad()
def prove(path, student, whole=False):
    """Compare the file at `path` with its student on normal latents: {which: {"worst_error", "psnr"}}.

    Core ML: "float32" and "fp16", see `run`; on a Mac also "core_ml" (on the CPU) and "neural_engine". A palettised
    package is compared with the student that has its weights, and that one with `student`: "palettised". Core AI and
    ExecuTorch: "clip", and "stream", the worst of clips of two steps and each end; on a Mac also "default_unit". What
    would take minutes is proven at a smaller size, "run_at", unless `whole`. Raises ValueError at another student's.
    """
    opened, proof, random = read(path), {}, torch.Generator().manual_seed(0)
    if not about(student, opened.settings).items() <= opened.metadata.items():
        raise ValueError(f"{path} was exported from other weights, or another configuration, than this student's")
    settings, config = opened.settings, student.config
    frames, channels, h, w = latent_shape(config, settings)
    work = frames * h * w * sum(p.numel() for p in student.parameters())
    if not whole and work > opened.limit:
        size = tuple(side - max(0, n - at) * config.compression[1]
                     for side, n, at in zip(settings.size, (h, w), opened.proven_at))
        with tempfile.TemporaryDirectory() as folder:
            smaller = Path(folder) / f"smaller{opened.suffix}"
            opened.write(smaller, student, replace(settings, size=size))
            for this, that in itertools.zip_longest(opened.program(), read(smaller).program()):
                if this != that:
                    raise ValueError(f"operation {str(this)[:80]} is not what it is at the smaller size")
            return prove(smaller, student, whole=True) | {"run_at": f"{size[0]}x{size[1]}"}
    student = copy.deepcopy(student).float().cpu().eval().channels_last()

    def sample(t=frames):
        """Latents (1, C, t, h, w), and the student's video of them (T, 3, H, W)."""
        latents = torch.randn(1, channels, t, h, w, generator=random)
        return latents, frames_first(crop(student(latents), settings.size))

    bounds = BOUNDS | {"palettised": (math.inf, 6 * (settings.bits or 0) - 9)}      # 4 bits leave 23 dB, 8 bits 48
    for which, result in opened.compare(student, sample):
        worst, floor = bounds.get(which, BOUNDS["exact" if settings.float32 else "fp16"])
        if not (result["worst_error"] <= worst and result["psnr"] >= floor):        # NaN is not
            raise ValueError(f"the package is not the student: worst error {result['worst_error']:.3g} in {which}, "
                             f"{worst} would pass; PSNR {result['psnr']:.1f} dB, {floor} would")
        proof[which] = max(result, proof.get(which, result), key=lambda result: result["worst_error"])
    return proof


def player(path, student, latents):
    """A function that runs the .pte at `path`, of that student, on latents (1, C, t, h, w). ValueError: of others."""
    opened, frames = read(path, ExecuTorch), frames_first(latents)
    takes = opened.settings.dtype, opened.method.metadata.input_tensor_meta(0).sizes()
    if takes != (frames.dtype, frames.shape):
        raise ValueError(f"{path} takes {takes[0]} of {takes[1]}, not {frames.dtype} of {tuple(frames.shape)}")
    run = lambda: opened.method.execute([frames])[0]
    psnr = difference(run().float(), frames_first(crop(student(latents), opened.settings.size)))["psnr"]
    if not psnr > 40:
        raise ValueError(f"{path} is not the student's: PSNR {psnr:.1f} dB between their videos")
    return run


def verify(path, model, whole=False):
    """The worst error of the file at `path`, Core ML's with fp16 rounding. ValueError where it is not the student."""
    proof = prove(path, model, whole)
    return max(proof[which]["worst_error"] for which in ("fp16", "clip", "stream") if which in proof)


def prove_and_report(path, student, whole):
    """The report of the file at `path`, with its proof, as JSON. Raises as `prove` does."""
    proof, r = prove(path, student, whole), read(path).report()
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    return json.dumps(r | {"package_bytes": size, "proof": proof}, indent=1) + "\n"


def export(model, size=(512, 512), latent_frames=None, path="student.mlpackage", whole=False, **settings):
    """Write a student to `path`, prove it, and return that path.

    The path's end says the format: .mlpackage (Core ML), .aimodel (Core AI) or .pte (ExecuTorch). size: where it is no
    multiple of the compression the package decodes a little more and crops. settings: see `Settings`.

    A package maps "latents" as the teacher's encoder gives them, (t, C, h, w), to "video" (T, 3, height, width) in
    about [-1, 1], not clamped; Core AI's plain graph (1, C, t, h, w) to (1, 3, T, height, width). Its report lies
    beside it as .json. What was at `path` stays until the new package is proven. Raises as `prove` does.
    """
    path, settings = Path(path), Settings(tuple(size), latent_frames, **settings)
    with atomically(path.with_suffix(".json")) as file, atomically(path) as package:
        format_of(path).write(package, model, settings)
        file.write_text(prove_and_report(package, model, whole))
        path.with_suffix(".json").unlink(missing_ok=True)       # it speaks of the old package
    return path


def text_of(text):
    """A report, as JSON, as lines of text."""
    r = json.loads(text)
    count = lambda kinds: ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    off_engine = "; ".join(f"{count(kinds)} ({reason})" for reason, kinds in r["off_engine_kinds"].items())
    where = "outside XNNPACK" if "forward" in r["functions"] else "kept off the Neural Engine"
    lines = [f"{r['operations']} operations: {count(r['kinds'])}; package {r['package_bytes'] / 1e6:.2f} MB"]
    for name, tensors in r["functions"].items():
        given = [f"{key} {shape}" for key, shape in tensors.items() if key in ("latents", "video")]
        lines.append(f"{name}: {', '.join(given)}, {len(tensors) - len(given)} states")
    lines.append(f"{where}: {off_engine or 'none'}")
    if run_at := r["proof"].pop("run_at", None):
        lines.append(f"run at {run_at}, where it has the same operations (--whole runs all of it):")
    for which, result in r["proof"].items():
        figures = [f"{key.replace('_', ' ')} {value:.3g}" for key, value in result.items()]
        lines.append(f"proof, {which}: {', '.join(figures)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description="Student to packages for phones, each run and compared with it.")
    add = parser.add_argument
    add("--student", metavar="PATH", help="a run's folder, a file or a hub id (default: the newest)")
    add("--config", choices=CONFIGS, help="the student's configuration, where its file does not say")
    add("--random", action="store_true", help="random weights for --config, to measure speed only")
    add("--size", nargs="+", type=parse_size, metavar="HxW", help="of the video, in pixels (default 512x512 720x1280)")
    add("--latent-frames", type=number(int, 1), metavar="N", help="default: what makes 17 frames, or 16")
    add("--format", nargs="+", choices=FORMATS, default=["coreml"], help="for iOS 18, iOS 27, Android (default coreml)")
    add("--bits", type=int, choices=(8, 6, 4), help="palettise Core ML's weights (default: fp16)")
    add("--graph", choices=("plain", "engine"), help="Core AI: for the phone's GPU (default) or its Neural Engine")
    add("--stream", type=number(int, 1), default=0, metavar="N", help="Core AI: any length, N latent frames a step")
    add("--float32", action="store_true", help="Core AI and ExecuTorch: not float16")
    add("--out", metavar="DIR", help="folder for the packages (default: the student's run, else out/export)")
    add("--whole", action="store_true", help="run large packages whole, which takes minutes, and not at a smaller size")
    add("--verify", type=Path, metavar="PACKAGE", help="export nothing: compare this package with the student")
    args = parser.parse_args()
    if args.verify and (args.size or args.bits or args.latent_frames or args.out or args.stream):
        parser.error("--verify PACKAGE takes the package as it is: beside it go --student, --config, --random, --whole")
    for flag, form in (("bits", "coreml"), ("graph", "coreai"), ("stream", "coreai")):
        if getattr(args, flag) and form not in args.format:
            parser.error(f"--{flag} goes with --format {form}")
    if args.float32 and "coreml" in args.format or args.stream and args.graph == "engine":
        parser.error("--float32 goes without --format coreml, --stream without --graph engine")
    if args.random + bool(args.student) != 1 and (args.random or args.config) or args.random and not args.config:
        parser.error("--config NAME goes with --random or with --student PATH, --random with --config NAME only")
    return args


def main():
    args = parse()
    if args.random:
        torch.manual_seed(0)
        label, student = f"{args.config}_random", TurboVAED(CONFIGS[args.config])
    else:
        label, student = choose_student(args.student, args.config)
    if args.verify:
        text = prove_and_report(args.verify, student, args.whole)
        with atomically(args.verify.with_suffix(".json")) as file:
            file.write_text(text)
        return print(text_of(text))
    run, graph = Path(label) if Path(label).is_dir() else Path(label).parent, args.graph or "plain"
    folder = Path(args.out or (run if (run / OWN_FILE).exists() else "out/export"))
    check_writable(folder)
    ends = {"coreml": "engine" + (f"_{args.bits}bit" if args.bits else ""), "executorch": "executorch",
            "coreai": f"coreai_{graph}" + (f"_stream{args.stream}" if args.stream else "")}
    paths = {}
    for size, form in itertools.product(args.size or [(512, 512), (720, 1280)], args.format):
        frames = student.config.frames(latent_shape(student.config, Settings(size, args.latent_frames))[0])
        end = ends[form] + ("_float32" if args.float32 else "") + FORMATS[form].suffix
        path = folder / f"{Path(label).absolute().name.removesuffix('.safetensors')}_{frames}x{size[0]}x{size[1]}_{end}"
        paths[path] = size
        if path.exists() and folder != run:         # a run's own folder holds packages of one student
            if read(path).metadata["weights_sha256"] != weights_hash(student):
                raise ValueError(f"{path} is another student's: name another folder with --out, or delete it")
    for path, size in paths.items():
        print(path, flush=True)
        started = time.perf_counter()
        export(student, size, args.latent_frames, path, args.whole, bits=args.bits, graph=graph, stream=args.stream,
               float32=args.float32, note="Random weights: for speed only." if args.random else "")
        seconds = time.perf_counter() - started
        print(f"{text_of(path.with_suffix('.json').read_text())}\nexported and proven in {seconds:.0f} s\n", flush=True)


if __name__ == "__main__":
    run_command(main, "a smaller --size or fewer --latent-frames need less")
