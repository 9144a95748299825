"""Student to Core ML, proven right on any machine: an ML Program in fp16 with fixed shapes.

    python export.py                                     # the newest student under out/, at 512x512 and 720x1280
    python export.py --student out/ltx --size 512x512 --bits 8
    python export.py --config ltx --random               # no checkpoint at hand: for speed only
    python export.py --verify out/ltx/ltx_17x512x512_engine.mlpackage --student out/ltx

Core ML predicts on a Mac only. So every export is read back from its files, and its operations are run one by one in
PyTorch, in float32 and with each result rounded to fp16, beside the student on the same latents. A very large package
is proven at a smaller height, where it has the same operations. On a Mac real predictions are compared as well. The
report says what a phone will have to do: operations, what keeps them off the Neural Engine, arithmetic, memory.
"""
import argparse
import contextlib
import copy
import io
import json
import logging
import math
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (CONFIGS, OWN_FILE, ChannelNorm, Conv3d, Resnet, SeparableConv3d, TurboVAED, Upsampler, Upsampler2d,
                   atomically, check_writable, choose_student, number, parse_size, run_command, summary, weights_hash)

TINY = 2.0 ** -24           # the smallest number fp16 has


# ---------------------------------------------------------------------------------------------------------------------
# The student's twin for phones: its own modules with other forwards that compute the same numbers. The Neural Engine
# has no 3D convolution and no gather, so all tensors are (T, C, H, W), and a convolution that looks at several frames
# has them among its channels. Nothing is transposed.

@torch.library.custom_op("turbo_vaed::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| / sqrt(C) + 2^-24) over channels: three operations, of which one writes a tensor of x's size.

    One operation takes the squares and sums them. As a tensor of their own they would overflow fp16 from 256 on, which
    the shipped student's activations reach. The student's eps, 1e-8 under the root, is zero in fp16. The 2^-24 here
    serves 0 / 0 only: it is smaller than fp16's rounding wherever the student's eps is.
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

        Every k-th window begins where the one before it ends. So k slices of x hold all windows that lie in x: each
        slice is convolved, and one concat orders the outputs. Only windows at the ends are copied together. Where
        outputs are so wide that the concat moves more than copies would, all windows are copied.
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


class TwinSeparableConv3d(SeparableConv3d):
    def rewrite(self):
        """The depthwise convolution is k two-dimensional ones, summed: one for each frame that it sees."""
        self.taps = torch.nn.ParameterList(w.contiguous() for w in self.depthwise_conv.weight.unbind(2))
        self.pointwise_conv.weight = torch.nn.Parameter(self.pointwise_conv.weight.squeeze(2))
        del self.depthwise_conv.weight

    def forward(self, x):
        r, T, bias = len(self.taps) // 2, len(x), self.depthwise_conv.bias
        x = torch.cat([*[take(x, 0, 1)] * r, x, *[take(x, T - 1, T)] * r]) if r else x
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
            return self.conv(torch.cat(frames) if r_t > 1 else x)
        x = self.conv(x)
        x = x.reshape(r_t * len(x), -1, *x.shape[2:])
        pieces = [take(x, piece.start, min(piece.stop, len(x))) for piece in self.left(len(x))]
        x = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return F.pixel_shuffle(x, r_s) if r_s > 1 else x


class TwinUpsampler2d(Upsampler2d):
    def forward(self, x):
        return F.pixel_shuffle(self.conv(F.silu(rms_norm(x))), 2)


class Twin(TurboVAED):
    def forward(self, latents):
        """(t, C, h, w) -> video (T, 3, height, width), cropped to `size` if there is one."""
        x = latents
        for layer in (*self.layers(), *self.upsamplers2d()):
            x = layer(x)
        video = self.conv_out(F.silu(rms_norm(x)))
        return video if self.size in (None, video.shape[2:]) else video[..., :self.size[0], :self.size[1]]


TWINS = {twin.__base__: twin for twin in (TwinChannelNorm, TwinResnet, TwinConv3d, TwinSeparableConv3d, TwinUpsampler,
                                          TwinUpsampler2d, Twin)}


def rescale(twin):
    """Bring what the norms see to about 1 in size, by powers of two in the weights, which change no digit of the video.

    A norm does not mind the scale of its input, fp16 does: 65504 is its largest number, also for the sum of squares
    where hardware holds that in fp16; unscaled, the shipped student's reach 7 million. Every convolution writes to a
    norm or to the sum of residuals, which only norms and upsamplers read. How much a convolution magnifies is estimated
    from its weights.
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
def phone_twin(student, size=None):
    """A copy of the student on the CPU, in float32, that takes latents (t, C, h, w) to the same video (T, 3, H, W).

    size: the (height, width) that it crops the video to. Raises ValueError for a subclass of TurboVAED.
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
        if hasattr(module, "rewrite"):
            module.rewrite()
    twin.size = size
    return twin


def frames_first(x):
    """Latents or video (1, C, T, H, W) -> (T, C, H, W), as the twin has them."""
    return x[0].transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Export.

def latent_shape(config, size, latent_frames=None):
    """(t, C, h, w) of the latents that decode to at least `size`; t: by default what makes 17 frames, or 16."""
    t = latent_frames or next(t for t in range(1, 18) if config.frames(t) >= 16)
    return t, config.latent_channels, -(-size[0] // config.compression[1]), -(-size[1] // config.compression[2])


def coremltools():
    """The package, told how the two norms above are written in MIL. ImportError where it is not installed."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)        # it tells at length what a Mac would have
    try:
        import coremltools as ct
    except ImportError as error:
        raise ImportError(f"export needs coremltools ({error}): pip install coremltools") from None
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


def identity(student):
    """The metadata by which a package is this student's."""
    return {"weights_sha256": weights_hash(student), "config": json.dumps(asdict(student.config))}


def convert(student, size, latent_frames=None, bits=None, note=""):
    """The student as coremltools' MLModel, with its descriptions; see `export` for the arguments."""
    ct, config, shape = coremltools(), student.config, latent_shape(student.config, size, latent_frames)
    with torch.no_grad():
        program = torch.export.export(phone_twin(student, tuple(size)), (torch.zeros(shape),)).run_decompositions({})
    # coremltools' progress bars are for a terminal only.
    with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
        try:        # iOS 18 (macOS 15) is the first whose palettised weights are stored in 4 and 6 bits
            package = ct.convert(program, inputs=[ct.TensorType(name="latents", shape=shape, dtype=np.float16)],
                                 outputs=[ct.TensorType(name="video", dtype=np.float16)],
                                 compute_precision=ct.precision.FLOAT16, minimum_deployment_target=ct.target.iOS18,
                                 skip_model_load=True)
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            raise OSError(f"weights cannot be written to {tempfile.gettempdir()}; is the disk full?") from None
        if bits:        # below 10,000 weights coremltools would want scikit-learn, and little is to be saved
            from coremltools.optimize import coreml as compress
            package = compress.palettize_weights(package, compress.OptimizationConfig(
                compress.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=10_000)))
    package.short_description = f"Turbo-VAED: latents to video. {note}".strip()
    package.license = "Code: MIT. Weights: under the licence of the teacher they were distilled from."
    package.input_description["latents"] = "(t, C, h, w): as the teacher's encoder gives them, no scaling factor"
    package.output_description["video"] = "(T, 3, H, W), about [-1, 1], not clamped"
    package.user_defined_metadata.update(
        identity(student), size=f"{size[0]}x{size[1]}", latent_frames=str(shape[0]),
        frames=str(config.frames(shape[0])), bits=str(bits or 16), note=note)
    return package


def save(package, path):
    package.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)         # the converter's own, no part of it


def export(model, size=(512, 512), latent_frames=None, path="student.mlpackage", bits=None, whole=False, note=""):
    """Write a student to `path`, an .mlpackage (ML Program, fp16, fixed shapes), prove it, and return that path.

    model: a TurboVAED. size: (height, width) of the video in pixels; where it is no multiple of the compression the
    package decodes a little more and crops. latent_frames: None takes what makes 17 frames, 16 where first frames are
    kept. bits: 8, 6 or 4 palettises the weights by k-means. whole: see `prove`. note goes into the description.

    The package takes "latents" (t, C, h, w) as the teacher's encoder gives them and gives "video" (T, 3, height,
    width), about [-1, 1], not clamped. Its report, with the proof, lies beside it as .json. What was at `path` stays
    until the new package is proven. Raises ValueError where it is not the student, and coremltools' own errors.
    """
    path = Path(path)
    with atomically(path.with_suffix(".json")) as file, atomically(path) as package:
        save(convert(model, size, latent_frames, bits, note), package)
        file.write_text(prove_and_report(package, model, whole))
        path.with_suffix(".json").unlink(missing_ok=True)       # it speaks of the old package
    return path


# ---------------------------------------------------------------------------------------------------------------------
# A package, read back from its files as coremltools' operations and variables.

def read(path):
    """(function, metadata) of a package. ValueError where it is damaged: coremltools checks shapes and types too."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such Core ML package")
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load
    try:
        spec = ct.utils.load_spec(str(path))
        program = load(spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
        return program.functions["main"], dict(spec.description.metadata.userDefined)
    except Exception as error:      # protobuf and coremltools have many classes of errors
        raise ValueError(f"{path}: damaged, or no Core ML program: {summary(error)}") from None


def operations(function):
    """What a function computes, in order, without its constants."""
    return [op for op in function.operations if op.op_type != "const" and not op.op_type.startswith("constexpr_")]


def inputs_of(op):
    """{parameter: its variables}; only concat has several."""
    return {key: list(v) if isinstance(v, (list, tuple)) else [v] for key, v in op.inputs.items() if v is not None}


def constant(variable):
    """The value of a constant, of palettised weights the dense ones; None for what is computed."""
    if variable.op and variable.op.op_type.startswith("constexpr_"):
        return variable.op.materialized_val_inference()
    return variable.val


def last_uses(ops):
    """{number of an operation: names of variables, but the video, that nothing after it reads}."""
    last = {}
    for i, op in enumerate(ops):
        for variable in (*sum(inputs_of(op).values(), []), *op.outputs):
            last[variable.name] = i
    uses = {i: [] for i in range(len(ops))}
    for name, i in last.items():
        if name != "video":
            uses[i].append(name)
    return uses


# ---------------------------------------------------------------------------------------------------------------------
# MIL, operation by operation, in PyTorch. Parameters are MIL's; one that is not here is an error, as is an operation.

def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    if pad_type not in ("custom", "valid") or pad[::2] != pad[1::2]:
        raise ValueError(f"conv pads {pad_type} {pad}")
    return F.conv2d(x, weight, bias, strides, pad[::2] if pad_type == "custom" else 0, dilations, groups)


def slice_by_index(x, begin, end, begin_mask=None, end_mask=None, squeeze_mask=None):
    if any(squeeze_mask or ()):
        raise ValueError("slice_by_index squeezes")
    slices = []
    for axis in range(x.ndim):
        start = None if begin_mask and begin_mask[axis] else begin[axis]
        stop = None if end_mask and end_mask[axis] else end[axis]
        slices.append(slice(start, stop))
    return x[tuple(slices)]


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
    "real_div": lambda x, y: x / y,
    "add": lambda x, y: x + y,
    "silu": lambda x: F.silu(x),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(scale_factor_height, scale_factor_width), mode="nearest"),
}
MOVES = ("slice_by_index", "concat", "split", "reshape", "pixel_shuffle", "upsample_nearest_neighbor")


def tensor_or_plain(value):
    """A constant as PyTorch's functions take it: arrays of floats as float32 tensors, all others as Python's own."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float32))
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@torch.inference_mode()
def run(function, latents, fp16):
    """Run a function's operations one by one, in float32; fp16=True rounds what each of them gives to fp16.

    Latents (t, C, h, w) -> (video (T, 3, H, W), the largest sum of squares that a norm met), all float32. A value is
    freed after its last use. Raises ValueError for an operation or parameter that is not known, for one that fails, and
    for one whose output is not of the declared shape.
    """
    from tqdm import tqdm
    ops, values, largest_square = operations(function), {"latents": latents}, 0.0
    uses = last_uses(ops)
    for i, op in enumerate(tqdm(ops, unit="op", leave=False, disable=not sys.stderr.isatty())):
        where = f"operation {i}, {op.op_type} {op.name}"
        if op.op_type not in MIL:
            raise ValueError(f"{where}: not one of the operations known here, so nothing is proven")
        arguments = {}
        for key, variables in inputs_of(op).items():
            arguments[key] = [values[v.name] if v.name in values else tensor_or_plain(constant(v)) for v in variables]
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
        if op.op_type == "reduce_l2_norm":
            largest_square = max(largest_square, values[op.outputs[0].name].max().item() ** 2)
        for name in uses[i]:
            values.pop(name, None)
    return values["video"], largest_square


# ---------------------------------------------------------------------------------------------------------------------
# Proof.

BOUNDS = {"float32": 0.02, "fp16": 0.05, "core_ml": 0.05}     # worst errors of a video in about [-1, 1]: 10 x the usual
PALETTE_FLOOR = 15      # dB between a student and itself with palettised weights: 4 bits leave 30, damage 10
WHOLE_FLOPS = 5e12      # above, running a package whole takes minutes: it is proven at ROWS rows of latents
ROWS = 8


def difference(video, expected):
    """Worst absolute error, and PSNR in dB with a peak of 2, the width of [-1, 1]."""
    error = video - expected
    return {"worst_error": error.abs().max().item(),
            "psnr": 10 * (4 / error.square().mean().clamp(1e-20)).log10().item()}


@torch.no_grad()
def with_weights_of(function, student):
    """The student's twin, with the package's palettised weights and the others rounded to fp16."""
    twin = phone_twin(student)
    outputs = [variable for op in function.operations for variable in op.outputs]
    palettised = {v.name: v for v in outputs if v.name.endswith("_to_fp16_palettized")}
    for name, p in twin.named_parameters():
        variable = palettised.get(f"p_{name.replace('.', '_')}_to_fp16_palettized")
        p.copy_(torch.from_numpy(constant(variable)) if variable else p.half())
    return twin


def core_ml(path, latents, units):
    """The video that Core ML predicts on those compute units of this Mac."""
    ct = coremltools()
    package = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[units])
    video = package.predict({"latents": latents.numpy().astype(np.float16)})["video"]
    return torch.from_numpy(np.asarray(video, np.float32))


def check_same_operations(function, lower):
    """Raise ValueError unless two functions have the same operations, wiring, weights and parameters, but for heights.
    """
    def signature(op):
        inputs = {}
        for key, variables in inputs_of(op).items():
            values = [constant(v) for v in variables]
            if key in ("shape", "end"):         # of four axes, of which the third is the height
                values = [np.delete(value, 2) for value in values]
            inputs[key] = [v.name if value is None else np.asarray(value).tobytes()
                           for v, value in zip(variables, values)]
        return op.op_type, inputs, [v.name for v in op.outputs]

    these, those = operations(function), operations(lower)
    if len(these) != len(those):
        raise ValueError(f"{len(these)} operations, {len(those)} at the smaller height")
    for i, (this, that) in enumerate(zip(these, those)):
        if signature(this) != signature(that):
            raise ValueError(f"operation {i}, {this.op_type} {this.name}, is not what it is at the smaller height")


@torch.no_grad()
def prove(path, student, whole=False):
    """Compare the package at `path` with its student on normal latents: {which: {"worst_error", "psnr"}}.

    "float32" and "fp16": its operations one by one, see `run`. On a Mac also "core_ml", Core ML's prediction on the
    CPU, and "neural_engine", the same where the Neural Engine may take part. A palettised package is compared with the
    student that has its weights, and "palettised" compares that one with `student`. "run_at": a package of more than
    WHOLE_FLOPS is proven at that smaller size, where it has the same operations, unless `whole`. Raises ValueError
    where the package is not the student.
    """
    function, metadata = read(path)
    if not identity(student).items() <= metadata.items():
        raise ValueError(f"{path} was exported from other weights, or another configuration, than this student's")
    (t, channels, h, w), (*_, height, width) = function.inputs["latents"].shape, function.outputs[0].shape
    bits = int(metadata["bits"])
    if not whole and h > ROWS and sum(map(flops, operations(function))) > WHOLE_FLOPS:
        size = height - (h - ROWS) * student.config.compression[1], width
        with tempfile.TemporaryDirectory() as folder:
            lower = Path(folder) / "lower.mlpackage"
            save(convert(student, size, t, bits if bits < 16 else None), lower)
            check_same_operations(function, read(lower)[0])
            return prove(lower, student, whole=True) | {"run_at": f"{size[0]}x{size[1]}"}
    student = copy.deepcopy(student).float().cpu().eval().channels_last()
    latents = torch.randn(1, channels, t, h, w, generator=torch.Generator().manual_seed(0))
    video, latents, proof = frames_first(student(latents)[..., :height, :width]), frames_first(latents), {}
    if bits < 16:
        palettised = with_weights_of(function, student)(latents)[..., :height, :width]
        proof["palettised"] = difference(palettised, video)
        video = palettised
    proof["float32"] = difference(run(function, latents, fp16=False)[0], video)
    rounded, largest_square = run(function, latents, fp16=True)
    proof["fp16"] = difference(rounded, video) | {"largest_sum_of_squares": largest_square}
    if sys.platform == "darwin":
        proof["core_ml"] = difference(core_ml(path, latents, "CPU_ONLY"), video)
        proof["neural_engine"] = difference(core_ml(path, latents, "CPU_AND_NE"), video)        # has no bound
    check(proof)
    return proof


def check(proof):
    """Raise ValueError if a comparison is outside the bounds."""
    if "palettised" in proof and not proof["palettised"]["psnr"] > PALETTE_FLOOR:
        raise ValueError(f"the palettised weights are not the student's: PSNR {proof['palettised']['psnr']:.1f} dB")
    for which, bound in BOUNDS.items():
        if which in proof and not proof[which]["worst_error"] <= bound:         # NaN is not
            raise ValueError(f"the package is not the student: worst error {proof[which]['worst_error']:.3g} in "
                             f"{which}, {bound} would pass; PSNR {proof[which]['psnr']:.1f} dB")


def verify(path, model, whole=False):
    """Prove that the package at `path` computes what the student does; the worst absolute error with fp16 rounding.

    See `prove`. Raises ValueError where it does not.
    """
    return prove(path, model, whole)["fp16"]["worst_error"]


# ---------------------------------------------------------------------------------------------------------------------
# Report.

# What the Neural Engine is known to run, of what may be met with here, by public measurements (the ane-guide, 2026)
ENGINE = {"conv", "add", "real_div", "relu", "silu", "linear_activation", "reduce_l2_norm", "layer_norm", "concat",
          "split", "slice_by_index", "reshape", "pixel_shuffle"}


def why_not(op):
    """What keeps an operation off the Neural Engine; None if nothing is known to."""
    inputs = inputs_of(op)
    shapes = [v.shape for v in (*inputs.get("x", ()), *inputs.get("values", ()), *op.outputs)]
    parameter = lambda key, default: constant(inputs[key][0]) if key in inputs else default
    if op.op_type not in ENGINE:
        return "not known to run there"
    if max(map(len, shapes)) > 4:
        return "rank above 4"
    if any(max(shape[-2:]) > 16384 or max(shape) > 65536 for shape in shapes):
        return "height or width above 16384, channels or frames above 65536"
    if op.op_type == "conv" and max(inputs["weight"][0].shape[2:]) > 13:
        return "kernel wider than 13"
    if parameter("upscale_factor", 2) not in (2, 3, 4, 8):
        return "factor other than 2, 3, 4, 8"
    from_first = parameter("begin_mask", [False])
    if parameter("begin", [0])[-1] and not from_first[-1] or op.op_type == "split" and parameter("axis", 0) in (3, -1):
        return "slice of the last axis with an offset"
    if any(variable.dtype.get_bitwidth() != 16 for variable in op.outputs):
        return "not fp16"


def flops(op):
    """Two for each multiply-add of a convolution."""
    return 2 * math.prod(op.outputs[0].shape) * math.prod(op.weight.shape[1:]) if op.op_type == "conv" else 0


def bytes_of(variable):
    """Of a tensor in memory, or of weights in the package; palettised ones are indices and a table."""
    parts = [variable]
    if variable.op and variable.op.op_type.startswith("constexpr_"):
        parts = variable.op.inputs.values()
    return sum(math.prod(part.shape) * part.dtype.get_bitwidth() // 8 for part in parts)


def is_view(op):
    """Whether an operation moves nothing: reshapes, and slices and splits of the frames, share their input's memory."""
    if any(variable.name == "video" for variable in op.outputs):
        return False
    frames_only = op.op_type in ("slice_by_index", "split") and all(v.shape[1:] == op.x.shape[1:] for v in op.outputs)
    return op.op_type == "reshape" or frames_only


def report(function):
    """What a phone will have to do, as a dict: totals and operations by kind.

    views: see `is_view`. off_engine: operations that keep off the Neural Engine, in off_engine_kinds by reason and
    kind. flops: two for each multiply-add of the convolutions. bytes_moved: every operation but views reads its inputs
    and writes its outputs once. peak_activation_bytes: all that is alive at once in program order, inputs and outputs
    of the operation included. Core ML may fuse operations and need less.
    """
    ops, weights, tensors = operations(function), {}, {"latents": function.inputs["latents"]}
    uses, alive, memory, off_engine = last_uses(ops), {"latents"}, {"latents": "latents"}, {}
    views = moved = peak = 0
    for i, op in enumerate(ops):
        inputs = inputs_of(op)
        read = [v for v in sum(inputs.values(), []) if v.name in tensors]
        own_weights = [v for key in ("weight", "bias") for v in inputs.get(key, ())]
        weights.update((v.name, v) for v in own_weights)
        tensors.update((v.name, v) for v in op.outputs)
        view = is_view(op)
        for variable in op.outputs:         # whose memory it is
            memory[variable.name] = memory[read[0].name] if view else variable.name
        views += view
        moved += 0 if view else sum(map(bytes_of, (*own_weights, *read, *op.outputs)))
        alive.update(v.name for v in op.outputs)
        peak = max(peak, sum(bytes_of(tensors[name]) for name in {memory[name] for name in alive}))
        alive.difference_update(uses[i])
        if reason := why_not(op):
            off_engine.setdefault(reason, Counter())[op.op_type] += 1
    return {"operations": len(ops), "views": views, "off_engine": sum(map(Counter.total, off_engine.values())),
            "parameters": sum(math.prod(v.shape) for v in weights.values()),
            "weight_bytes": sum(map(bytes_of, weights.values())), "flops": sum(map(flops, ops)), "bytes_moved": moved,
            "peak_activation_bytes": peak, "kinds": dict(Counter(op.op_type for op in ops).most_common()),
            "off_engine_kinds": off_engine}


def prove_and_report(path, student, whole):
    """The report of the package at `path`, with its proof, as JSON. Raises as `prove` does."""
    proof, size = prove(path, student, whole), sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
    return json.dumps({**report(read(path)[0]), "package_bytes": size, "proof": proof}, indent=1) + "\n"


def text_of(text):
    """A report, as JSON, as lines of text."""
    r = json.loads(text)
    count = lambda kinds: ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    off_engine = "; ".join(f"{count(kinds)} ({reason})" for reason, kinds in r["off_engine_kinds"].items())
    proof = r["proof"]
    lines = [f"{r['operations']} operations, of which {r['views']} move nothing: {count(r['kinds'])}",
             f"{r['flops'] / 1e9:.1f} GFLOP, {r['bytes_moved'] / 1e9:.3f} GB moved, activations at most "
             f"{r['peak_activation_bytes'] / 1e6:.1f} MB",
             f"{r['parameters'] / 1e6:.3f} M weights in {r['weight_bytes'] / 1e6:.2f} MB; "
             f"package {r['package_bytes'] / 1e6:.1f} MB",
             f"kept off the Neural Engine: {off_engine or 'none'}"]
    if "run_at" in proof:
        lines.append(f"run at {proof['run_at']}, where it has the same operations (--whole runs all of it):")
    for which, words in (("palettised", "its weights against the student's"),
                         ("float32", "its operations in float32"), ("fp16", "its operations, each rounded to fp16"),
                         ("core_ml", "Core ML's prediction on the CPU"), ("neural_engine", "with the Neural Engine")):
        if which in proof:
            lines.append(f"{words}: worst error {proof[which]['worst_error']:.2g}, PSNR {proof[which]['psnr']:.1f} dB")
    lines.append(f"largest sum of squares under a norm {proof['fp16']['largest_sum_of_squares']:.3g}, fp16 holds 65504")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(usage="%(prog)s [--student PATH] [options]; --help explains each",
                                     description="Student to Core ML packages, each run operation by operation and "
                                     "compared with the student, and a report of what a phone will have to do.")
    add = parser.add_argument
    add("--student", metavar="PATH", help="a run's folder, a file or a hub id (default: the newest under out/, else "
        "the shipped one)")
    add("--config", choices=CONFIGS, help="the student's configuration, where its file does not say")
    add("--random", action="store_true", help="random weights for --config, to measure speed only")
    add("--size", nargs="+", type=parse_size, metavar="HxW", help="of the video in pixels, one package each (default "
        "512x512 720x1280); what is no multiple of the compression is cropped in the package")
    add("--latent-frames", type=number(int, 1), metavar="N", help="default: what makes 17 frames, 16 for students that "
        "keep first frames")
    add("--bits", type=int, choices=(8, 6, 4), help="palettise the weights (default: fp16)")
    add("--out", metavar="DIR", help="folder for the packages (default: the student's run, else out/export)")
    add("--whole", action="store_true", help=f"run packages of more than {WHOLE_FLOPS / 1e12:.0f} TFLOP whole, which "
        "takes minutes, and not at a smaller height")
    add("--verify", metavar="PACKAGE", help="export nothing: compare this package with the student")
    args = parser.parse_args()
    if args.verify and (args.size or args.bits or args.latent_frames or args.out):
        parser.error("--verify PACKAGE takes the package as it is: beside it go --student, --config, --random, --whole")
    if args.random and (not args.config or args.student):
        parser.error("--random needs --config NAME and goes without --student")
    if args.config and not args.random and not args.student:
        parser.error("--config goes with --random or with --student PATH")
    return args


def name_packages(label, teacher, out):
    """(folder, name) for the packages of the student at the path `label`.

    A run's own student has them in the run's folder, named after its teacher. Where students share a folder, the
    file's or the run's name tells them apart.
    """
    path, teacher = Path(label), re.sub(r"[^\w.-]", "_", teacher)
    run = path if path.is_dir() else path.parent
    in_run = run.absolute().parent == Path("out").absolute()
    if in_run and path.is_dir() and not out:
        return path, teacher
    name = path.name if path.is_dir() else path.stem
    folder = Path(out or (run if in_run else "out/export"))
    return folder, name if name.startswith(teacher) else f"{teacher}_{name}"


def main():
    args = parse()
    if args.random:
        torch.manual_seed(0)
        student, folder, name = TurboVAED(CONFIGS[args.config]), Path(args.out or "out/export"), f"{args.config}_random"
    else:
        label, student = choose_student(args.student, args.config)
        folder, name = name_packages(label, student.metadata["teacher"], args.out)
    if args.verify:
        text = prove_and_report(args.verify, student, args.whole)
        with atomically(Path(args.verify).with_suffix(".json")) as file:
            file.write_text(text)
        return print(text_of(text))
    check_writable(folder)
    paths = {}
    for size in args.size or [(512, 512), (720, 1280)]:
        frames = student.config.frames(latent_shape(student.config, size, args.latent_frames)[0])
        bits = f"_{args.bits}bit" if args.bits else ""
        path = paths[size] = folder / f"{name}_{frames}x{size[0]}x{size[1]}_engine{bits}.mlpackage"
        if path.exists() and not (folder / OWN_FILE).exists():      # a run's own folder holds packages of one student
            if not identity(student).items() <= read(path)[1].items():
                raise ValueError(f"{path} is another student's: name another folder with --out, or delete it")
    for size, path in paths.items():
        print(path, flush=True)
        started, note = time.perf_counter(), "Random weights: for speed only." if args.random else ""
        export(student, size, args.latent_frames, path, args.bits, args.whole, note)
        print(text_of(path.with_suffix(".json").read_text()))
        print(f"exported and proven in {time.perf_counter() - started:.0f} s\n", flush=True)


if __name__ == "__main__":
    run_command(main, "a smaller --size or fewer --latent-frames need less")
