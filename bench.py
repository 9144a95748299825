"""How fast: students against their teachers, eager against compiled, block by block, and on phones.

Measures what the machine could do as well.

    python bench.py                                    # the student in out/, else the shipped one, with its teacher
    python bench.py --config ltx dc --size 512x512 720x1280        # on a GPU, in float16; needs PyTorch alone
    python bench.py --config ltx --teacher             # against the teacher, with random weights
    python bench.py --config ltx --decode              # plain, compiled, and optimized for inference
    python bench.py --config ltx --stream              # clips of any length: latency, frames per second, memory
    python bench.py --blocks                           # latency by block with the three upsamplers (Figure 3, Table 1)
    python bench.py --mlpackage PATH                   # on a Mac: export.py's package, on every choice of compute units
    python bench.py --iphone --team TEAM               # the packages on the iPhone that is connected to this Mac
    python bench.py --features                         # teachers: `features` against a whole decode
    python bench.py --train                            # the training step, with and without cache, against a plain one
    python bench.py --gpu                              # all that only a GPU can tell, in nine minutes: results/<gpu>/

What is compared takes turns within one run, after warm-up, so that whatever else the machine does slows all of it.
Reported are medians and the spread of the middle half. A speed-up or a share of the machine's rates is the median over
the turns of the ratio within a turn, which repeats better than a ratio of medians. Weights are random where speed does
not depend on them. Writes bench.json and bench.png to --out.
"""
import argparse
import asyncio
import copy
import ctypes
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial, partialmethod
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import (BLOCKS, CONFIGS, UPSAMPLING, TurboVAED, check_fit, check_writable, default_student, find_device,
                   number, replace_files, run_command, summary, text_table)

WARM_UP = 3     # rounds that do not count, in which caches fill, clocks rise and kernels are chosen
PARTS = ("conv_in", *BLOCKS, "out")
GPU_RUNS = (    # what --gpu measures, the most telling first
    *(f"--decode --teacher --rounds 7 --config {name} --size {size}"
      for size in ("512x512", "720x1280") for name in ("ltx", "dc", "hunyuan")),
    "--stream --decode --rounds 3 --config ltx --size 512x512 --lengths 10 100 600", "--train --rounds 7 --config ltx",
    *(f"--stream --decode --rounds 3 --config {name} --size {size} --lengths 10 100"
      for size in ("512x512", "720x1280") for name in ("dc", "hunyuan", "ltx") if (name, size) != ("ltx", "512x512")))
LAST_START = 390        # seconds after which --gpu begins nothing more: it is to end within nine minutes
UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")      # Core ML's choices of compute units
PAPER = {   # the paper's frames per second, Tables 3 and 4: on an A100 and on an iPhone 16 Pro
    "paper_a100": {("ltx", 512, 512): 841.6, ("ltx", 720, 1280): 255.6, ("dc", 512, 512): 552.5,
                   ("dc", 720, 1280): 167.0, ("hunyuan", 512, 512): 87.5, ("cog", 512, 512): 87.5},
    "paper_iphone": {("ltx", 512, 512): 161.8, ("ltx", 720, 1280): 38.1, ("dc", 512, 512): 112.7,
                     ("dc", 720, 1280): 25.3, ("hunyuan", 512, 512): 10.6, ("cog", 512, 512): 10.6}}
RIVALS = {"paper_a100": "an A100; its rivals' there, at 512x512: H3AE 195.4",
          "paper_iphone": "an iPhone 16 Pro; its rivals' there, at 512x512: SnapGen-V 31.5, H3AE 38.1"}
# option: (the mode that it goes with, its default there)
BELONGS = {"batch": ("train", 1), "lpips_frames": ("train", 2), "team": ("iphone", None),
           "chunk": ("stream", 4), "lengths": ("stream", [10, 100, 600])}
COLUMNS = {     # of the table, where any row has them: header, text of a row's cell
    "model": "{model}", "way": "{way}", "clip": "{frames}x{height}x{width}", "parameters": "{parameters:,}",
    "ms": "{milliseconds:.2f}", "spread": "{spread:.2f}", "FPS": "{fps:.1f}", "TFLOP/s": "{tflops:.3f}",
    "of matrix rate": "{of_matrix_rate:.1%}", "of copy rate": "{of_copy_rate:.1%}", "peak GB": "{peak_gb:.2f}",
    "load ms": "{load_milliseconds:.0f}", "latents": "{latents}", "first frame ms": "{first_milliseconds:.0f}",
    "speed-up": "{speed_up:.2f}x", "over conv3d": "{over_conv3d:.2f}x",
    "paper's A100": "{paper_a100:.1f}", "paper's iPhone": "{paper_iphone:.1f}", "not measured": "{reason}"}
BLOCK_COLUMNS = {key: COLUMNS[key] for key in ("model", "way", "clip", "ms", "spread", "speed-up")} | {
    part: f"{{blocks[{part}]:.2f}} {{shares[{part}]:.0%}}" for part in (*PARTS, "upsamplers")}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.

def now(device):
    """The moment at which the work begun so far is done: an event on a GPU, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start, end):
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def take_turns(runs, device, rounds=None, budget=45):
    """Seconds of each of {name: function}, {name: [seconds]}; the functions take turns.

    rounds None: as many as fit into `budget` seconds, at least 5 and at most 200.
    """
    seconds = {name: [] for name in runs}
    for i in itertools.count(-WARM_UP):
        if i == 0:
            begin = time.perf_counter()
        if i == (rounds or 200) or not rounds and i >= 5 and time.perf_counter() - begin > budget:
            return seconds
        for name, run in runs.items():
            start = now(device)
            run()
            end = now(device)
            if device.type == "cuda":
                end.synchronize()
            if i >= 0:
                seconds[name].append(seconds_between(start, end))


def machine(device, dtype):
    """A large matrix product and a large copy, to take turns with the rest.

    Returns {name: function} and {name: its FLOP or bytes}.
    """
    n, size = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 27)
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return ({"matrix": lambda: torch.mm(a, b, out=c), "copy": lambda: y.copy_(x)},
            {"matrix": 2 * n ** 3, "copy": 2 * size})


class WorkCounter(TorchDispatchMode):
    """Counts the FLOP of the convolutions and matrix products that run under it, and the bytes that these must move at
    least: inputs, weights and outputs, once each. (PyTorch's FlopCounterMode fails on gradients of a leaf.)"""
    flops = moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
            self.moved += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def count_work(run):
    with torch.inference_mode(False), torch.no_grad(), WorkCounter() as work:
        run()
    return work


def count(module):
    return sum(p.numel() for p in module.parameters())


def nbytes(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


def peak_memory(run, device, held):
    """{"peak_gb"}: the most memory that is held while `run` runs.

    That is `held` bytes of weights, and what the run adds to GPU memory or to the process's resident memory. Empty on
    a CPU without Linux, where no one keeps the high-water mark.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        mark = lambda: torch.cuda.max_memory_allocated(device)
    else:
        mark = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        try:
            ctypes.CDLL(None).malloc_trim(0)        # what the C library keeps for later would hide what the run needs
            Path("/proc/self/clear_refs").write_text("5")       # the mark falls to what is resident now
        except (OSError, AttributeError, TypeError):     # neither that library nor /proc
            return {}
    before = mark()
    run()
    return {"peak_gb": (held + mark() - before) / 1e9}


def figures(seconds, name, frames, base=None, work=None, amounts=None):
    """What the table shows of one entry among those that took turns; base: the entry that it is compared with."""
    spent = seconds[name]
    over = lambda other: statistics.median(b / a for a, b in zip(spent, seconds[other]))
    median = statistics.median(spent)
    quarters = statistics.quantiles(spent, n=4) if len(spent) > 1 else [median] * 3
    row = {"milliseconds": 1000 * median, "spread": 1000 * (quarters[2] - quarters[0]), "fps": frames / median,
           "rounds": len(spent)}
    if base:
        row |= {"compared_with": base, "speed_up": over(base)}
    if work:
        row |= {"flops": work.flops, "bytes": work.moved, "tflops": work.flops / median / 1e12,
                "of_matrix_rate": work.flops / amounts["matrix"] * over("matrix"),
                "of_copy_rate": work.moved / amounts["copy"] * over("copy"),
                "matrix_tflops": amounts["matrix"] / statistics.median(seconds["matrix"]) / 1e12,
                "copy_gb_per_s": amounts["copy"] / statistics.median(seconds["copy"]) / 1e9}
    return row


def placed(student, device, dtype):
    """The student as it runs fastest there: its weights laid out for channels-last latents on a GPU."""
    student = student.to(device, dtype).eval()
    return student.channels_last() if device.type == "cuda" else student


def make_latents(config, name, frames, height, width, device, dtype):
    """Random latents (1, C, t, h, w), and the frames, height and width that they decode to: the most frames up to
    `frames`, sides rounded up to the compression. ValueError for fewer frames than one latent decodes to."""
    _, d_h, d_w = config.compression
    t = next(t for t in itertools.count() if config.frames(t + 1) > frames)
    if not t:
        raise ValueError(f"--frames {frames}: {name} decodes {config.frames(1)} or more")
    latents = torch.randn(1, config.latent_channels, t, -(-height // d_h), -(-width // d_w), device=device, dtype=dtype)
    layout = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    return latents.contiguous(memory_format=layout), config.frames(t), d_h * latents.shape[3], d_w * latents.shape[4]


def of_paper(where, *which):
    """For a row: the paper's frames per second of (name of a configuration, height, width), if it has any."""
    return {where: PAPER[where][which]} if which in PAPER[where] else {}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured. Each returns rows for bench.json.

@torch.inference_mode()
def bench_students(args, device, dtype):
    """A row for each student, size and way of running it; its teacher's where asked for."""
    rows = []
    for (name, student), size in itertools.product(chosen_students(args), args.size):
        student = placed(student, device, dtype)
        latents, frames, height, width = make_latents(student.config, name, args.frames, *size, device, dtype)
        runs, modules = {"eager": lambda: student(latents)}, {"eager": student, "compiled": student}
        if args.compile:
            torch.compiler.reset()      # past its limit of recompilations, PyTorch would run the next one eager
            compiled = torch.compile(student, dynamic=False, fullgraph=True)
            try:
                compiled(latents)
                runs["compiled"] = lambda: compiled(latents)
            except Exception as error:      # no C++ compiler, for one: the rest is still worth timing
                print(f"{name} does not compile here: {type(error).__name__}: {summary(error)}", file=sys.stderr)
        if args.decode:
            ways = {"optimized": args.compile} | (
                {"CUDA graphs": "reduce-overhead"} if args.compile and latents.is_cuda else {})
            for way, compiles in ways.items():
                modules[way] = copy.deepcopy(student).optimize_for_inference(compile=compiles)
                runs[way] = lambda module=modules[way]: module(latents)
        if args.teacher:
            try:
                teacher = find_teacher(name, student, device, dtype)
                runs["teacher"], modules["teacher"] = lambda: teacher.decode(latents), teacher.vae.decoder
            except ImportError as error:
                rows.append({"model": name, "way": "teacher", "reason": f"{error}; pip install -r requirements.txt"})
        limits, amounts = machine(device, dtype)
        work = {way: count_work(run) for way, run in runs.items() if way in ("eager", "teacher")}
        seconds = take_turns(runs | limits, device, args.rounds)
        rows += [{"model": name, "way": way, "frames": frames, "height": height, "width": width,
                  "parameters": count(modules[way]),
                  **figures(seconds, way, frames, "teacher" if "teacher" in runs else "eager",
                            work.get(way, work["eager"]), amounts),
                  **(of_paper("paper_a100", name, *size) if device.type == "cuda" and way != "teacher" else {}),
                  # CUDA graphs hold their memory between runs.
                  **(peak_memory(run, device, nbytes(modules[way])) if way != "CUDA graphs" else {})}
                 for way, run in runs.items()]
    return rows


def find_teacher(name, student, device, dtype):
    """The student's teacher, with random weights but for the embedded one. ImportError where its library is missing."""
    from teachers import TEACHERS, load_teacher
    if name not in TEACHERS:
        raise ValueError("the student does not say which teacher it was made for: --no-teacher times it alone")
    teacher = load_teacher(name, None if name == "tiny" else "random", device, dtype)
    check_fit(student, f"the {name} teacher", (name,), teacher.latent_channels, tuple(teacher.compression),
              teacher.images)
    return teacher


@torch.inference_mode()
def bench_stream(args, device, dtype):
    """Rows for each student, size and length: streamed in chunks, with --decode also by a student that is optimized for
    inference, and whole if the machine's memory may hold it."""
    rows = []
    for (name, student), (height, width) in itertools.product(chosen_students(args), args.size):
        student = placed(student, device, dtype)
        _, d_h, d_w = student.config.compression
        shape = 1, student.config.latent_channels, args.chunk, -(-height // d_h), -(-width // d_w)
        chunk = torch.randn(shape, device=device, dtype=dtype)
        students = {"streamed": student}
        if args.decode:
            torch.compiler.reset()
            students["streamed, optimized"] = copy.deepcopy(student).optimize_for_inference(compile=args.compile)
            for _ in students["streamed, optimized"].stream([chunk] * (student.streamer().delay // args.chunk + 4)):
                pass        # compiles
        measured = {length: stream_length(args, students, chunk, length, device) for length in args.lengths}
        for length, (runs, firsts, spent, peaks) in measured.items():
            add_whole(args, student, chunk, length, device, runs, spent, peaks)
            if sum(map(sum, spent.values())) < 10 or args.rounds:
                spent = take_turns(runs, device, args.rounds)
            frames = student.config.frames(length)
            for way in runs:
                row = {"model": name, "way": way, "frames": frames, "height": d_h * shape[3], "width": d_w * shape[4],
                       "latents": length,
                       **figures(spent, way, frames, "whole" if "whole" in runs else None), **peaks[way]}
                if way in students:
                    row |= {"chunk": args.chunk, "delay": student.streamer().delay,
                            "first_milliseconds": 1000 * statistics.median(firsts[way])}
                rows.append(row)
    return rows


def stream_length(args, students, chunk, length, device):
    """Streams of so many latent frames, once each: ({way: run}, {way: [seconds to the first frame]}, {way: [seconds]},
    {way: peak memory}). All lengths come before any whole decode, which would leave the process's heap in pieces."""
    def stream(way):
        start, first, rest = now(device), None, length % args.chunk
        chunks = itertools.repeat(chunk, length // args.chunk)
        for _ in students[way].stream(itertools.chain(chunks, [chunk[:, :, :rest]] if rest else [])):
            first = first or now(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        firsts[way].append(seconds_between(start, first))

    runs, firsts = {way: partial(stream, way) for way in students}, {way: [] for way in students}
    spent, peaks = {}, {}
    for way, run in runs.items():
        start = time.perf_counter()
        peaks[way] = peak_memory(run, device, nbytes(students[way]))
        spent[way] = [time.perf_counter() - start]
    return runs, firsts, spent, peaks


def add_whole(args, student, chunk, length, device, runs, spent, peaks):
    """The whole decode beside the streams of `stream_length`, if what memory there is may hold it."""
    free, latents = free_memory(device), torch.cat([chunk] * -(-length // args.chunk), dim=2)[:, :, :length]
    try:
        if student.fit(latents, free / 1e9)[0] < length:
            return
    except ValueError:          # not even in pieces, with all of the video in memory
        return
    runs["whole"] = lambda: student(latents)
    start = time.perf_counter()
    peaks["whole"] = peak_memory(runs["whole"], device, nbytes(student))
    spent["whole"] = [time.perf_counter() - start]


def free_memory(device):
    """Bytes that can still be had; without Linux or a GPU nobody says, and 8 GB are assumed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError):
        return 8e9


def mark_blocks(student, device):
    """Make the student note when each part of a decode is done.

    Returns the list of (part, moment) that it will fill.
    """
    marks = []
    note = lambda part: lambda *_: marks.append((part, now(device)))
    student.register_forward_pre_hook(note("start"))
    student.conv_in.register_forward_hook(note("conv_in"))
    for name, block in zip(BLOCKS, (student.mid_block, *student.up_blocks)):
        for upsampler in block.upsamplers:
            upsampler.register_forward_pre_hook(note(name))
            upsampler.register_forward_hook(note(f"{name} upsampler"))
        block.register_forward_hook(note(name))
    student.register_forward_hook(note("out"))
    return marks


@torch.inference_mode()
def bench_blocks(args, device, dtype):
    """A row for each upsampler of Table 1, with the milliseconds of each part of an eager decode, as in Figure 3.

    The parts add up to the whole: each lasts from the moment at which the one before it was done. What the upsamplers
    take of their blocks, convolutions included, is given beside.
    """
    rows = []
    for name, size in itertools.product(args.config or ["ltx"], args.size):
        latents, frames, height, width = make_latents(CONFIGS[name], name, args.frames, *size, device, dtype)
        students = {way: placed(TurboVAED(replace(CONFIGS[name], upsampling=way)), device, dtype) for way in UPSAMPLING}
        marks = {way: mark_blocks(student, device) for way, student in students.items()}
        runs = {way: lambda student=student: student(latents) for way, student in students.items()}
        seconds = take_turns(runs, device, args.rounds)
        for way in UPSAMPLING:
            n = len(marks[way]) // (len(seconds[way]) + WARM_UP)          # marks of one decode
            decodes = [marks[way][i:i + n] for i in range(WARM_UP * n, len(marks[way]), n)]
            samples = [Counter() for _ in decodes]
            for sample, decode in zip(samples, decodes):
                for (_, start), (part, end) in itertools.pairwise(decode):
                    sample[part] += 1000 * seconds_between(start, end)
            spent = {part: statistics.median(sample[part] for sample in samples) for part in samples[0]}
            upsamplers = {part: time for part, time in spent.items() if part not in PARTS}
            blocks = {part: spent[part] + spent.get(f"{part} upsampler", 0) for part in PARTS}
            whole = sum(blocks.values())
            blocks |= upsamplers | {"upsamplers": sum(upsamplers.values())}
            rows.append({"model": name, "way": way, "frames": frames, "height": height, "width": width,
                         "parameters": count(students[way]), **figures(seconds, way, frames, "pixel_shuffle_3d"),
                         "blocks": blocks, "shares": {part: time / whole for part, time in blocks.items()}})
    return rows


async def time_package(path, unit, device, rounds):
    """What coremltools measures of a package on one choice of compute units, on `device` or, where None, on this Mac.

    Loading and predictions are timed where the model runs. Operations' shares of a prediction are Core ML's own
    estimate.
    """
    import coremltools
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    model = coremltools.models.MLModel(str(path), skip_model_load=True, compute_units=coremltools.ComputeUnit[unit])
    description = model.get_spec().description
    # The default function of a stream's package is its step.
    part = next((f for f in description.functions if f.name == description.defaultFunctionName), description)
    shapes = {f.name: tuple(f.type.multiArrayType.shape) for f in (*part.input, *part.output)}
    ranks = len(shapes.get("latents", ())), len(shapes.get("video", ()))
    if ranks not in ((4, 4), (5, 5)):
        raise ValueError(f"{path}: has {shapes} instead of latents (t, C, h, w) and video (T, 3, H, W), or "
                         "(1, C, t, h, w) and (1, 3, T, H, W)")
    graph, said = "engine" if ranks == (4, 4) else "conv3d", dict(description.metadata.userDefined)
    frames, height, width = shapes["video"][0 if graph == "engine" else 2], *shapes["video"][-2:]
    inputs = {f.name: torch.randn(shapes[f.name]).numpy() for f in part.input}
    name = next((n for n, c in CONFIGS.items() if json.dumps(asdict(c)) == said.get("config")), None)
    row = {"model": path.stem, "way": unit, "graph": graph, "frames": frames, "height": height, "width": width,
           "student": (said.get("weights_sha256"), said.get("bits")), **of_paper("paper_iphone", name, height, width)}
    try:
        benchmarker = MLModelBenchmarker(model, device)
        row["load_milliseconds"] = (await benchmarker.benchmark_load()).samples[0]
        predictions = await benchmarker.benchmark_predict(inputs, iterations=rounds, warmup=True)
        row |= figures({unit: [sample / 1000 for sample in predictions.samples]}, unit, frames)
        operations = await benchmarker.benchmark_operation_execution(inputs)
        # Constants have neither samples nor a device.
        operations = [op for op in operations if op.measurement.samples and op.compute_device_usage]
        whole, units, slowest = sum(op.measurement.samples[0] for op in operations), Counter(), []
        for op in operations:       # the slowest first
            # A class's name, such as MLNeuralEngineComputeDevice.
            ran_on = type(op.compute_device_usage.preferred_compute_device).__name__
            op = {"operation": op.spec.type, "output": op.spec.outputs[0].name,
                  "share": op.measurement.samples[0] / whole,
                  "unit": ran_on.removeprefix("ML").removesuffix("ComputeDevice")}
            units[op["unit"]] += op["share"]
            slowest.append(op)
        row |= {"operations": len(operations), "units": dict(units.most_common()), "slowest": slowest[:10]}
    except Exception as error:      # out of memory, or refused by this unit: the other units are still worth timing
        row["error"] = f"{type(error).__name__}: {summary(error)}"
    return row


async def start_phone(team, folder):
    """The connected iPhone, with coremltools' app on it that runs packages.

    The app is signed for that development team and built in `folder`.
    """
    from coremltools.models.ml_program.experimental import remote_device
    # By itself the service would look 20 times for an answer; loading may well take longer.
    service = remote_device._DeviceCtlRemoteService
    service.__init__ = partialmethod(service.__init__, max_attempts=200)
    try:
        phones = remote_device.Device.get_connected_devices(device_type=remote_device.DeviceType.IPHONE)
        if not phones:
            raise ValueError("none is connected: plug it in, unlock it, trust this Mac, turn on its Developer Mode")
        credentials = remote_device.AppSigningCredentials(
            # Apple gives each identifier to one team only.
            development_team=team, bundle_identifier=f"team.{team.lower()}.modelrunner")
        return await phones[0].prepare_for_model_debugging(credentials=credentials, working_directory=Path(folder))
    except Exception as error:      # Xcode's, devicectl's, coremltools': what to do is the same
        raise ValueError(f"no iPhone to run on: {summary(error)}; `xcrun devicectl list devices` should call it "
                         f"connected, and Xcode's settings list an account of team {team}") from None


async def time_packages(paths, rounds, team):
    """A row for each package and choice of compute units; with a development team, on the connected iPhone."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        device = await start_phone(team, folder) if team else None
        for path, unit in itertools.product(paths, UNITS):
            row = await time_package(path, unit, device, rounds)
            rows.append(row | {"device": f"{device.name}, iOS {device.os_version}" if device else platform.platform()})
            speed = f"{row['milliseconds']:.1f} ms" if "fps" in row else ""
            print(f"{path.name} on {unit}: {speed} {row.get('error', '')}", flush=True)
            if device and not device.session.is_alive():      # a model too large for the phone's memory ends the app
                try:
                    device = await start_phone(team, folder)
                except ValueError as error:
                    print(error)
                    break
    return rows


def bench_packages(args):
    """Rows of time_packages; ValueError where Core ML cannot run, with what it needs."""
    if sys.platform != "darwin":
        raise ValueError("Core ML runs on Apple hardware: --mlpackage needs macOS, --iphone also Xcode and a connected "
                         "iPhone, and both need a package that `python export.py` made")
    found = sorted(path for path in Path("out").rglob("*.mlpackage") if not path.name.startswith("."))  # half-written
    paths = [Path(path) for path in args.mlpackage or found]
    missing = [str(path) for path in paths if not path.is_dir()]
    if missing or not paths:
        raise FileNotFoundError(f"{', '.join(missing) or 'out/'}: no such package, or none in it; "
                                "`python export.py` makes one")
    rows = asyncio.run(time_packages(paths, args.rounds or 10, args.team if args.iphone else None))
    if not any("fps" in row for row in rows):
        raise ValueError(f"nothing could be measured; {rows[0]['way']}: {rows[0]['error']}")
    same = lambda row: [row[key] for key in ("student", "frames", "height", "width", "way")]
    for row, other in itertools.permutations([row for row in rows if "fps" in row], 2):
        if (row["graph"], other["graph"]) == ("engine", "conv3d") and same(row) == same(other):
            row["over_conv3d"] = row["fps"] / other["fps"]      # of the same student, on the same units
    return rows


def aligned_blocks(teacher):
    """The blocks that training aligns, as in the paper and the recipes in train.py."""
    return ["mid", "up0", "up1"] if teacher.compression[1] == 32 else ["mid", "up0"]


@torch.inference_mode()
def bench_features(args, device, dtype):
    """Two rows for each teacher: a whole decode, and the features that training aligns, of the same latents."""
    from teachers import TEACHERS, load_teacher
    rows = []
    for name in args.config or TEACHERS:
        teacher = load_teacher(name, None if name == "tiny" else "random", device, dtype)
        (height, width), (d_t, d_h, d_w), frames = args.size[0], teacher.compression, 16 + int(teacher.images)
        height, width = -(-height // d_h) * d_h, -(-width // d_w) * d_w         # what is decoded
        shape = (1, teacher.latent_channels, (frames - 1) // d_t + 1, height // d_h, width // d_w)
        latents, blocks = torch.randn(shape, device=device, dtype=dtype), aligned_blocks(teacher)
        runs = {"decode": lambda: teacher.decode(latents),
                f"features {' '.join(blocks)}": lambda: teacher.features(latents, blocks)}
        seconds = take_turns(runs, device, args.rounds)
        rows += [{"model": name, "way": way, "frames": frames, "height": height, "width": width,
                  **figures(seconds, way, frames, "decode")} for way in runs]
        print(f"{name}: {rows[-1]['way']} take {100 / rows[-1]['speed_up']:.1f} % of a whole decode", flush=True)
    return rows


@dataclass
class Training:
    """What the ways to take a training step share: a teacher, the losses' networks, and a micro-batch of video with
    what the teacher makes of it, also as train.py's cache holds it."""
    name: str                   # of the configuration
    teacher: object
    lpips: object
    discriminator: object
    autocast: object            # makes the context of the step's precision
    video: torch.Tensor         # (B, 3, T, H, W)
    lpips_frames: int
    cache: object = None

    def __post_init__(self):
        self.blocks = aligned_blocks(self.teacher)
        with torch.no_grad():
            self.latents, self.features, self.kl = self.teach()

    def teach(self):
        """(latents, {block: features}, KL divergence), by the teacher."""
        from losses import kl_loss
        mean, logvar = self.teacher.posterior(self.video)
        z = mean if logvar is None else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return z, self.teacher.features(z, self.blocks), kl_loss(mean, logvar)

    def fill_cache(self, folder):
        from data import CachedClips
        self.cache = CachedClips(folder, len(self.video), {}, blocks=self.blocks)
        for n, clip in enumerate(self.video):
            made = {f"features.{block}": x[n] for block, x in self.features.items()}
            self.cache.put(n, clip, {"latents": self.latents[n], "kl": self.kl} | made)

    def from_cache(self):
        """(video, latents, {block: features}, KL divergences), read from the cache."""
        entries = [self.cache[n] for n in range(len(self.video))]
        keys = ("video", "latents", "kl", *(f"features.{block}" for block in self.blocks))
        video, z, kl, *aligned = (torch.stack([entry[key] for entry in entries]).to(self.video.device) for key in keys)
        return video, z.float(), dict(zip(self.blocks, aligned)), kl

    def step(self, way, compiles):
        """A function that takes one step with a new student, the way `bench_train` calls it."""
        from losses import Objective, StudentWithHeads, make_heads
        student, device = TurboVAED(CONFIGS[self.name]), self.video.device
        student = student.to(device) if way == "plain" else placed(student, device, torch.float32)
        heads = make_heads({b: student.config.feature_shape(b, self.latents.shape) for b in self.blocks},
                           {b: x.shape for b, x in self.features.items()})
        model = StudentWithHeads(student, heads).to(device)
        if compiles:
            student.compile()
        optimizer, objective = torch.optim.AdamW(model.parameters(), 2e-4), Objective(self.lpips)

        def run():
            if way == "plain":
                self.plain_gradients(model)
            else:
                self.our_gradients(model, objective, way == "cached")
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return run

    def plain_gradients(self, model):
        with torch.no_grad(), self.autocast():
            z, aligned, _ = self.teach()
            self.teacher.decode(z)
        with self.autocast():
            decoded, distill = model(z, aligned)
            loss = (decoded.float() - self.video).abs().mean() + self.lpips(decoded, self.video) + distill
            self.discriminator(decoded)
        loss.backward()

    def our_gradients(self, model, objective, cached):
        if cached:
            target, z, aligned, kl = self.from_cache()
        else:
            with torch.no_grad(), self.autocast():
                target, (z, aligned, kl) = self.video, self.teach()
        chosen = torch.stack([torch.randperm(target.shape[2])[:self.lpips_frames] for _ in target]).to(target.device)
        objective.backward(model, z, aligned, target, kl.mean(), chosen, autocast=self.autocast)


def bench_train(args, device, dtype):
    """A row for each way to take a training step of stage 1 on one micro-batch, for each configuration.

    plain: what the published code does: encode, decode with the whole teacher, LPIPS on all frames, the discriminator's
    forward pass though its weight is zero, eager. ours: train.py's step, with LPIPS on --lpips-frames random frames.
    cached: the same from train.py's cache, reading it included. The losses are the same in expectation. Random weights;
    reading videos is left out of all.
    """
    from losses import LPIPS, PatchDiscriminator
    from teachers import load_teacher
    rows, (height, width) = [], args.size[0]
    for name in args.config or ["ltx"]:
        teacher = load_teacher(name, None if name == "tiny" else "random", device)
        frames = 16 + int(teacher.images)
        teacher.check_clip(frames, height, width)
        training = Training(
            name, teacher, LPIPS(random=True).to(device), PatchDiscriminator().to(device),
            lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            torch.rand(args.batch, 3, frames, height, width, device=device) * 2 - 1, args.lpips_frames)
        held = {"plain": nbytes(teacher, training.lpips, training.discriminator),
                "ours": nbytes(teacher, training.lpips), "cached": nbytes(training.lpips)}
        with tempfile.TemporaryDirectory() as folder:
            training.fill_cache(folder)
            work = {way: WorkCounter() for way in held}
            for way in held:
                with work[way]:
                    training.step(way, False)()
            runs = {way: training.step(way, args.compile and way != "plain") for way in held}
            limits, amounts = machine(device, dtype)
            seconds = take_turns(runs | limits, device, args.rounds)
            student = TurboVAED(CONFIGS[name])
            for way, run in runs.items():
                row = {"model": name, "way": f"{way} step", "frames": frames, "height": height, "width": width,
                       "parameters": count(student),
                       **figures(seconds, way, args.batch * frames, "plain", work[way], amounts),
                       **peak_memory(run, device, 3 * nbytes(student) + held[way])}       # 3: AdamW's two moments
                rows.append(row | {"samples_per_s": row["fps"] / frames, "flops_per_sample": row["flops"] / args.batch})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What is shown.

def table(rows, columns, markdown=False):
    def cell(text, row):
        try:
            return text.format(**row)
        except KeyError:        # this row has no such figure
            return ""

    cells = [[header, *(cell(text, row) for row in rows)] for header, text in columns.items()]
    cells = [column for column in cells if any(column[1:])]
    return text_table(list(zip(*cells)), ("model", "way", "not measured"), markdown)


def report(rows, args):
    print(table(rows, BLOCK_COLUMNS if args.blocks else COLUMNS))
    if args.blocks:
        print("milliseconds of each part and its share; "
              "upsamplers: all of them with their convolutions, part of up0 ... up3")
    if any("matrix_tflops" in row for row in rows):
        rates = tuple(statistics.median(row[key] for row in rows if key in row)
                      for key in ("matrix_tflops", "copy_gb_per_s"))
        print("measured here, in turns with the rest: %.2f TFLOP/s of a matrix product, %.0f GB/s of a copy" % rates)
    for where in (where for where in PAPER if any(where in row for row in rows)):
        print(f"the paper's frames per second are of {RIVALS[where]}")
    if args.train:
        print("arithmetic of a sample: "
              f"{', '.join(r['way'] + ' %.2f TFLOP' % (r['flops_per_sample'] / 1e12) for r in rows)}")
    for row in rows:
        if "units" in row:
            units = ", ".join(f"{unit} {share:.0%}" for unit, share in row["units"].items())
            slowest = ", ".join(f"{op['operation']} {op['output']} {op['share']:.1%} ({op['unit']})"
                                for op in row["slowest"][:5])
            print(f"{row['model']} on {row['way']}, estimated shares: {units}; slowest {slowest}")


def picture(rows, blocks):
    """A function that saves, to a file, bars of frames per second; or of each part's milliseconds, with the upsamplers
    hatched. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return print("no bench.png: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [row for row in rows if "fps" in row]
    places = range(len(rows))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    if blocks:
        left = [0] * len(rows)
        for i, part in enumerate(PARTS):
            widths = [row["blocks"][part] for row in rows]
            axes.barh(places, widths, left=left, color=f"C{i}", label=part)
            upsamplers = [row["blocks"].get(f"{part} upsampler", 0) for row in rows]
            axes.barh(places, upsamplers, left=left, color="none", hatch="////", edgecolor="white", linewidth=0)
            left = [a + b for a, b in zip(left, widths)]
        axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.4, 1), fontsize="small", frameon=False)
        axes.set_xlabel("milliseconds of a decode; hatched: upsamplers with their convolutions")
    else:
        colors = ["tab:grey" if row["way"] == row.get("compared_with") else "tab:blue" for row in rows]
        bars = axes.barh(places, [row["fps"] for row in rows], color=colors)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set(xlabel="frames per second", xmargin=0.1)
    axes.set(yticks=places,
             yticklabels=[f"{r['model']} {r['way']}, {r['frames']}x{r['height']}x{r['width']}" for r in rows])
    axes.invert_yaxis()
    plt.close(figure)
    return lambda file: figure.savefig(file, dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--config NAME | --student PATH] [options]; --help explains each")
    add = parser.add_argument
    add("--config", nargs="+", choices=CONFIGS, help="students of these configurations, with random weights; or that "
        "of --student, where its file does not say")
    add("--student", metavar="PATH", help="a run's folder, a file or a hub id (default: the newest under out/, else "
        "the shipped one)")
    add("--size", nargs="+", metavar="HxW", help="of the video in pixels (default 512x512 and 720x1280 on a GPU, "
        "256x256 on a CPU; --blocks and --stream 512x512 and 128x128; --train 256x256 and 128x128; "
        "--features 128x128)")
    add("--frames", type=number(int, 1), help="of a clip, or the most below that latents decode to (default 17)")
    add("--teacher", action=argparse.BooleanOptionalAction,
        help="the teachers' decoders too (default: without --config)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too (default)")
    add("--decode", action="store_true", help="optimized for inference as well, and no teacher unless --teacher")
    add("--stream", action="store_true", help="streamed in chunks against whole, for clips of --lengths latent frames")
    add("--lengths", type=number(int, 1), nargs="+", metavar="N",
        help="latent frames of --stream's clips (default 10 100 600)")
    add("--chunk", type=number(int, 1), help="latent frames that --stream decodes at a time (default 4)")
    add("--blocks", action="store_true",
        help="latency by block with the three upsamplers, for --config (default ltx), eager")
    add("--mlpackage", nargs="*", metavar="PATH", help="Core ML packages, on a Mac (default: all under out/)")
    add("--iphone", action="store_true", help="the packages on the iPhone that is connected to this Mac; needs --team")
    add("--team", metavar="ID",
        help="the Apple development team for which Xcode signs the app that runs packages on the iPhone")
    add("--features", action="store_true", help="teachers: aligned features against a whole decode")
    add("--train", action="store_true", help="the training step against a plain one, for --config (default ltx)")
    add("--batch", type=number(int, 1), help="clips in --train's micro-batch (default 1)")
    add("--lpips-frames", type=number(int, 1),
        help="frames of a clip that --train's LPIPS sees (default 2, as train.py's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="(default float32 on a CPU, float16 on a GPU, --train there bfloat16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default cuda where there is one)")
    add("--rounds", type=number(int, 1),
        help="turns that count (default: as many as fit into 45 s, 5 to 200; packages: 10)")
    add("--gpu", action="store_true", help="all that only a GPU can tell: its tests, ltx, dc and hunyuan decoded and "
        "streamed at 512x512 and 720p against their teachers, the training step; at most nine minutes")
    add("--out",
        help="folder for bench.json and bench.png (default out/bench), with --gpu README.md (results/<the GPU>)")
    args = parser.parse_args(words)
    gpu = args.device.split(":")[0] == "cuda"
    if args.device == "mps":
        parser.error("--device is cpu or cuda, not mps")
    try:
        find_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.gpu and not gpu:
        raise ValueError("no GPU that PyTorch sees here: --gpu measures on one")
    sizes = args.size or (["128x128"] if args.features else ["256x256" if gpu else "128x128"] if args.train else
                          ["512x512" if gpu else "128x128"] if args.blocks or args.stream else
                          ["512x512", "720x1280"] if gpu else ["256x256"])
    try:
        args.size = [tuple(map(int, size.split("x"))) for size in sizes]
        if any(len(size) != 2 or min(size) < 1 for size in args.size):
            raise ValueError
    except ValueError:
        parser.error(f"--size takes HEIGHTxWIDTH in pixels, such as 512x512, not {' '.join(sizes)}")
    for name, (mode, default) in BELONGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not getattr(args, mode):
            parser.error(f"--{name.replace('_', '-')} goes with --{mode} only")
    if len(set(args.config or ())) < len(args.config or ()):
        parser.error(f"--config {' '.join(args.config)} names one twice")
    modes = [mode for mode in ("gpu", *MODES) if getattr(args, mode)]
    modes += ["iphone" if args.iphone else "mlpackage"] * (args.iphone or args.mlpackage is not None)
    if len(modes) > 1:
        parser.error(f"--{modes[0]} goes without --{modes[1]}")
    if args.iphone and not args.team:
        parser.error("--iphone needs --team ID: "
                     "Xcode signs the app that runs the packages for an Apple development team")
    others = ("blocks", "train", "features", "iphone", "mlpackage")
    for other in (name for name in others if args.student and getattr(args, name) not in (None, False)):
        parser.error(f"--student goes without --{other}")
    if args.decode and not args.stream and modes:
        parser.error(f"--decode goes without --{modes[0]}")
    if args.stream and (args.teacher or args.frames):
        parser.error("--stream goes without --teacher and --frames: its clips are of --lengths latent frames")
    args.frames = args.frames or 17
    if args.student and len(args.config or ()) > 1:
        parser.error("--student goes with one --config at most: its own")
    if args.teacher is None:
        args.teacher = bool(args.student or not args.config) and not args.decode
    args.dtype = args.dtype or ("float32" if not gpu else "bfloat16" if args.train else "float16")
    return args


def chosen_students(args):
    """[(name, model)] of what is to be timed: configurations with random weights, or one student."""
    if args.config and not args.student:
        return [(name, TurboVAED(CONFIGS[name])) for name in args.config]
    return [find_student(args.student, args.config)]


def measure(args):
    """Rows of what the options ask for."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.iphone or args.mlpackage is not None:
        return bench_packages(args)
    run = next((run for mode, run in MODES.items() if getattr(args, mode)), bench_students)
    return run(args, device, dtype)


MODES = {"blocks": bench_blocks, "stream": bench_stream, "features": bench_features, "train": bench_train}


def bench_gpu(args):
    """All that only a GPU can tell, within nine minutes: its tests, then GPU_RUNS.

    Each of these runs as if it had been called by itself. Writes bench.json and README.md, a table in Markdown, to
    results/<the GPU's name>/. What fails or finds no time left is a line that says so.
    """
    name, began = torch.cuda.get_device_name(args.device), time.perf_counter()
    tests = Path(__file__).resolve().parent / "tests" / "test_gpu.py"
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)], capture_output=True,
                            text=True)
    said = (result.stdout + result.stderr).strip()
    print(said, flush=True)
    runs, rows = [], []
    for options in GPU_RUNS:
        about = {"model": options.split("--config ")[1].split()[0], "way": options}
        start = time.perf_counter()
        if start - began > LAST_START:
            found = [about | {"reason": f"no time left after {LAST_START} s"}]
        else:
            try:
                found = measure(parse([*options.split(), "--device", args.device]))
            except Exception as error:      # one that does not fit or lacks a package must not cost the others
                found = [about | {"reason": f"{type(error).__name__}: {summary(error)}"}]
        runs.append({"command": f"python bench.py {options}", "seconds": time.perf_counter() - start, "rows": found})
        rows += found
        print(f"{runs[-1]['command']}\n{table(found, COLUMNS)}\n{runs[-1]['seconds']:.0f} s\n", flush=True)
        torch.cuda.empty_cache()
    results = {"device": name, "torch": torch.__version__, "python": platform.python_version(),
               "tests": said.splitlines(), "tests_passed": not result.returncode, "runs": runs}
    text = [f"# {name}", f"`python bench.py --gpu` (`make gpu`), torch {torch.__version__}, float16 but for training "
            f"(bfloat16); {time.perf_counter() - began:.0f} s. A speed-up is over the row of 1.00x beside it.",
            *[f"`{run['command']}`\n\n{table(run['rows'], COLUMNS, markdown=True)}" for run in runs],
            f"`python -m pytest -m gpu`\n\n```\n{said}\n```"]
    out = Path(args.out or Path("results", re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")))
    out.mkdir(parents=True, exist_ok=True)
    writes = {out / "bench.json": lambda file: file.write_text(json.dumps(results, indent=1) + "\n"),
              out / "README.md": lambda file: file.write_text("\n\n".join(text) + "\n")}
    replace_files(writes)
    print(*writes, sep="\n")
    if result.returncode:
        raise ValueError("the tests did not pass on the GPU: see above")


def find_student(path, config=None):
    """(name of its teacher, or "student", model) of the student asked for, else of the newest trained here, else of the
    shipped one. config: a list of one name, for a file that does not say."""
    path = path or default_student()
    student = TurboVAED.from_pretrained(path, config[0] if config else None)
    name = student.metadata.get("teacher")
    if name is None:
        name = next((n for n, c in CONFIGS.items() if c == student.config), "student")
        print(f"{path} does not say which teacher it was made for: called {name} here, by its size")
    return name, student


def main():
    args = parse()
    torch.backends.cudnn.allow_tf32 = False             # float32 is float32, for convolutions as for the matrix product
    torch.backends.cudnn.benchmark = True               # sizes are fixed: cuDNN may choose by trial, as in train.py
    check_writable(args.out or "results")
    if args.gpu:
        return bench_gpu(args)
    args.out = args.out or "out/bench"
    for path in (Path(args.out, "bench.json"), Path(args.out, "bench.png")):
        if path.is_dir():
            raise OSError(f"nothing can be written to {path}: it is a folder")
    rows = measure(args)
    report(rows, args)
    results = {"command": ["python", *sys.argv], "torch": torch.__version__, "python": platform.python_version()}
    if not (args.iphone or args.mlpackage is not None):
        device = torch.device(args.device)
        name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
                f"CPU, {torch.get_num_threads()} threads")
        results |= {"device": name, "dtype": args.dtype}
        print(f"{name}, {args.dtype}, torch {torch.__version__}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    writes = {out / "bench.json": lambda file: file.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")}
    save = picture(rows, args.blocks)
    if save:
        writes[out / "bench.png"] = save
    replace_files(writes)
    print(*writes, sep="\n")


if __name__ == "__main__":
    try:
        run_command(main, "smaller --size, --frames or --batch, or --dtype bfloat16, need less")
    except ImportError as error:
        sys.exit(f"error: {error}; pip install -r requirements.txt, "
                 "or --config NAME --no-teacher, which needs PyTorch alone")
