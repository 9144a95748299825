"""How fast: students against their teachers, eager against compiled, block by block, and on phones.

    python bench.py                                    # the student in out/, else the shipped one, with its teacher
    python bench.py --config ltx dc --size 512x512 720x1280        # on a GPU, in float16; needs PyTorch alone
    python bench.py --config ltx --teacher             # against the teacher, with random weights
    python bench.py --config ltx --decode              # plain, compiled, and optimized for inference
    python bench.py --pte PATH --decode                # export.py's file for ExecuTorch beside PyTorch
    python bench.py --config ltx --stream              # clips of any length: latency, frames per second, memory
    python bench.py --blocks                           # latency by block with the three upsamplers (Figure 3, Table 1)
    python bench.py --mlpackage PATH                   # on a Mac: export.py's package, on every choice of compute units
    python bench.py --iphone --team TEAM               # the packages on the iPhone that is connected to this Mac

What is compared takes turns within one run, after warm-up, so that whatever else the machine does slows all of it.
Reported are medians and the spread of the middle half; a ratio is the median of the ratios within a turn. Weights are
random where speed does not depend on them. Writes bench.json and bench.png to --out.
"""
import argparse
import asyncio
import copy
import ctypes
import itertools
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial, partialmethod
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import (BLOCKS, CONFIGS, UPSAMPLING, TurboVAED, atomically, check_writable, choose_student, find_device,
                   number, parse_size, run_command, summary, text_table)

WARM_UP = 3     # rounds that do not count, in which caches fill, clocks rise and kernels are chosen
PARTS = ("conv_in", *BLOCKS, "out")
WORK = 13       # largest features that fit into the memory in which a student decodes a clip whole: measured on CPUs
UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")      # Core ML's choices of compute units
PAPER = {       # the paper's frames per second, Tables 3 and 4
    "paper_a100": {"ltx 512x512": 841.6, "ltx 720x1280": 255.6, "dc 512x512": 552.5, "dc 720x1280": 167.0,
                   "hunyuan 512x512": 87.5, "cog 512x512": 87.5},
    "paper_iphone": {"ltx 512x512": 161.8, "ltx 720x1280": 38.1, "dc 512x512": 112.7, "dc 720x1280": 25.3,
                     "hunyuan 512x512": 10.6, "cog 512x512": 10.6}}
RIVALS = {"paper_a100": "an A100; its rivals' there, at 512x512: H3AE 195.4",
          "paper_iphone": "an iPhone 16 Pro; its rivals' there, at 512x512: SnapGen-V 31.5, H3AE 38.1"}
COLUMNS = {     # of the table, where any row has them: heading, text of a row's cell
    "model": "{model}", "way": "{way}", "clip": "{frames}x{height}x{width}", "parameters": "{parameters:,}",
    "ms": "{milliseconds:.2f}", "spread": "{spread:.2f}", "FPS": "{fps:.1f}", "TFLOP/s": "{tflops:.3f}",
    "of matrix rate": "{of_matrix_rate:.1%}", "of copy rate": "{of_copy_rate:.1%}", "peak GB": "{peak_gb:.2f}",
    "load ms": "{load_milliseconds:.0f}", "latents": "{latents}", "first frame ms": "{first_milliseconds:.0f}",
    "speed-up": "{speed_up:.2f}x", "paper's A100": "{paper_a100:.1f}", "paper's iPhone": "{paper_iphone:.1f}",
    **{part: f"{{blocks[{part}]:.2f}} {{shares[{part}]:.0%}}" for part in (*PARTS, "upsamplers")}}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.

def now(device):
    """The moment, in seconds, at which the work begun so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(runs, device, rounds=None, least=5, budget=45, warm_up=WARM_UP):
    """{name: [seconds]} of {name: function}, which take turns: `rounds` of them, or as many as fit into `budget`
    seconds, from `least` to 200."""
    seconds = {name: [] for name in runs}
    for i in itertools.count(-warm_up):
        if i == 0:
            begin = time.perf_counter()
        if i == (rounds or 200) or not rounds and i >= least and time.perf_counter() - begin > budget:
            return {name: spent[warm_up:] for name, spent in seconds.items()}
        for name, run in runs.items():
            start = now(device)
            run()
            seconds[name].append(now(device) - start)


def machine(device, dtype):
    """{name: function} of a large matrix product and a large copy, and {name: its FLOP or bytes}."""
    n, size = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 27)
    a, b, c = torch.randn(3, n, n, device=device, dtype=dtype)
    x, y = torch.zeros(2, size, device=device, dtype=torch.uint8)
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


def count(module):
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def count_work(run):
    with torch.inference_mode(False), torch.no_grad(), WorkCounter() as work:
        run()
    return work


def nbytes(module):
    return sum(p.nbytes for p in module.parameters())


def peak_memory(run, device, weights):
    """{"peak_gb"} of a run: so many bytes of weights, and what it adds to the GPU's or the process's resident memory.
    Empty on a CPU without Linux, which alone notes the most there was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        most = lambda: torch.cuda.max_memory_allocated(device)
    else:
        most = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        try:
            ctypes.CDLL(None).malloc_trim(0)        # what the C library keeps for later would hide what the run needs
            Path("/proc/self/clear_refs").write_text("5")       # the most falls to what is resident now
        except (OSError, AttributeError, TypeError):     # neither that library nor /proc
            return {}
    before = most()
    run()
    return {"peak_gb": (weights + most() - before) / 1e9}


def timing_row(seconds, name, frames, base=None, work=None, amounts=None):
    """What the table shows of one of those that took turns. base: which of them it is compared with. work: its
    WorkCounter, for its share of the rates of `machine`, whose amounts these are."""
    spent = seconds[name]
    ratio = lambda other: statistics.median(theirs / ours for ours, theirs in zip(spent, seconds[other]))
    low, median, high = statistics.quantiles(spent if len(spent) > 1 else spent * 2, n=4)
    row = {"milliseconds": 1000 * median, "spread": 1000 * (high - low), "fps": frames / median, "rounds": len(spent)}
    if base:
        row |= {"compared_with": base, "speed_up": ratio(base)}
    if work:
        row |= {"flops": work.flops, "bytes": work.moved, "tflops": work.flops / median / 1e12,
                "of_matrix_rate": work.flops / amounts["matrix"] * ratio("matrix"),
                "of_copy_rate": work.moved / amounts["copy"] * ratio("copy"),
                "matrix_tflops": amounts["matrix"] / statistics.median(seconds["matrix"]) / 1e12,
                "copy_gb_per_s": amounts["copy"] / statistics.median(seconds["copy"]) / 1e9}
    return row


# ---------------------------------------------------------------------------------------------------------------------
# What is measured. Each bench_... returns rows for bench.json.

def chosen_students(args):
    """[(name of the teacher, student)]: configurations with random weights, or one student."""
    if args.config and not args.student:
        return [(name, TurboVAED(CONFIGS[name])) for name in args.config]
    _, student = choose_student(args.student, args.config[0] if args.config else None)
    return [(student.metadata["teacher"], student)]


def placed(student, device, dtype):
    """The student as it runs fastest there: its weights laid out for channels-last latents on a GPU."""
    student = student.to(device, dtype).eval()
    return student.channels_last() if device.type == "cuda" else student


def random_latents(student, length, size):
    """Random latents (1, C, length, h, w) for frames of that size, its sides rounded up, as the student runs fastest;
    and the {"frames", "height", "width"} to which they decode."""
    config, weight = student.config, next(student.parameters())
    _, d_h, d_w = config.compression
    h, w = -(-size[0] // d_h), -(-size[1] // d_w)
    latents = torch.randn(1, config.latent_channels, length, h, w, device=weight.device, dtype=weight.dtype)
    if latents.is_cuda:
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
    return latents, {"frames": config.frames(length), "height": d_h * h, "width": d_w * w}


def random_clip(student, name, frames, size):
    """random_latents of the longest clip of at most so many frames. ValueError if one latent decodes to more."""
    decoded = student.config.frames
    if decoded(1) > frames:
        raise ValueError(f"--frames {frames}: {name} decodes {decoded(1)} or more")
    t = 1 if name == "qwen" else next(t for t in itertools.count(1) if decoded(t + 1) > frames)     # qwen's are images
    return random_latents(student, t, size)


def paper_speed(where, name, height, width):
    """For a row: the paper's frames per second of a configuration at that size, if it has any."""
    speed = PAPER[where].get(f"{name} {height}x{width}")
    return {where: speed} if speed else {}


def ways_to_decode(args, name, student, latents):
    """{way: module} of the student as it is, compiled and, with --decode, optimized for inference."""
    ways = {"eager": student}
    if args.compile:
        torch.compiler.reset()      # past its limit of recompilations, PyTorch would run the next one eager
        compiled = torch.compile(student, dynamic=False, fullgraph=True)
        try:
            compiled(latents)
            ways["compiled"] = compiled
        except Exception as error:      # no C++ compiler, for one: the rest is still worth timing
            print(f"{name} does not compile here: {type(error).__name__}: {summary(error)}", file=sys.stderr)
    if args.decode:
        ways["optimized"] = copy.deepcopy(student).optimize_for_inference(compile=args.compile)
        if args.compile and latents.is_cuda:
            ways["CUDA graphs"] = copy.deepcopy(student).optimize_for_inference(compile="reduce-overhead")
    return ways


@torch.inference_mode()
def bench_students(args, device, dtype):
    """A row for each student, size and way of running it; its teacher's where asked for."""
    rows = []
    for (name, student), size in itertools.product(chosen_students(args), args.size):
        student = placed(student, device, dtype)
        latents, clip = random_clip(student, name, args.frames, size)
        modules = ways_to_decode(args, name, student, latents)
        runs = {way: partial(module, latents) for way, module in modules.items()}
        if args.pte:
            from export import player
            modules["ExecuTorch"], runs["ExecuTorch"] = student, player(args.pte, student, latents)
        if args.teacher:
            from teachers import load_teacher
            teacher = load_teacher(name, None if name == "tiny" else "random", device, dtype)
            modules["teacher"], runs["teacher"] = teacher.vae.decoder, partial(teacher.decode, latents)
        limits, amounts = machine(device, dtype)
        work = {way: count_work(run) for way, run in runs.items() if way in ("eager", "teacher")}
        seconds = take_turns(runs | limits, device, args.rounds)
        base = "teacher" if args.teacher else "eager"
        for way, run in runs.items():
            row = {"model": name, "way": way, **clip, "parameters": count(modules[way]),
                   **timing_row(seconds, way, clip["frames"], base, work.get(way, work["eager"]), amounts)}
            if device.type == "cuda" and way != "teacher":
                row |= paper_speed("paper_a100", name, *size)
            if way != "CUDA graphs":        # these hold their memory between runs
                row |= peak_memory(run, device, nbytes(modules[way]))
            rows.append(row)
    return rows


@torch.inference_mode()
def bench_stream(args, device, dtype):
    """Rows for each student, size and length: streamed in chunks, with --decode also by a student that is optimized for
    inference, and whole if the machine's memory may hold it."""
    def stream(student, latents, first_seconds):
        start, first = now(device), None
        for _ in student.stream(latents.split(args.chunk, dim=2)):
            first = first or now(device)
        first_seconds.append(first - start)

    rows = []
    for (name, student), size in itertools.product(chosen_students(args), args.size):
        student = placed(student, device, dtype)
        delay, students = student.streamer().delay, {"streamed": student}
        if args.decode:
            torch.compiler.reset()
            students["streamed, optimized"] = copy.deepcopy(student).optimize_for_inference(compile=args.compile)
            stream(students["streamed, optimized"], random_latents(student, delay + 4 * args.chunk, size)[0], [])
        clips = [random_latents(student, length, size) for length in args.lengths]
        # A whole decode leaves the process's memory in pieces, so streams of all lengths come first.
        peaks = [{way: peak_memory(partial(stream, module, latents, []), device, nbytes(module))
                  for way, module in students.items()} for latents, _ in clips]
        for (latents, clip), peak in zip(clips, peaks):
            firsts = {way: [] for way in students}
            runs = {way: partial(stream, module, latents, firsts[way]) for way, module in students.items()}
            if memory_may_hold(student, latents):
                runs["whole"] = partial(student, latents)
                peak["whole"] = peak_memory(runs["whole"], device, nbytes(student))
            seconds = take_turns(runs, device, args.rounds, least=1, warm_up=0)     # each has run once
            for way in runs:
                row = {"model": name, "way": way, **clip, "latents": latents.shape[2], **peak[way],
                       **timing_row(seconds, way, clip["frames"], "whole" if "whole" in runs else None)}
                if way in students:
                    row |= {"chunk": args.chunk, "delay": delay,
                            "first_milliseconds": 1000 * statistics.median(firsts[way])}
                rows.append(row)
    return rows


def memory_may_hold(student, latents):
    """Whether the student can decode these latents whole. Without Linux or a GPU nobody says what is free: not 8 GB."""
    feature = max(math.prod(student.config.feature_shape(block, latents.shape)) for block in BLOCKS)
    if latents.is_cuda:
        return WORK * feature * latents.element_size() < torch.cuda.mem_get_info(latents.device)[0]
    memory = Path("/proc/meminfo")
    free = int(memory.read_text().split("MemAvailable:")[1].split()[0]) if memory.exists() else 8e6
    return WORK * feature * 4 < 1024 * free         # a CPU computes half precision in float32


def mark_blocks(student, device):
    """Returns the list of (part, moment at which it was done) that the student's decodes will fill, from "start" on."""
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


def part_times(marks):
    """{part: median milliseconds since the part before it was done}, by the marks of `mark_blocks`."""
    decodes = []
    for part, moment in marks:
        if part == "start":
            decodes.append(Counter())
        else:
            decodes[-1][part] += 1000 * (moment - before)
        before = moment
    return {part: statistics.median(decode[part] for decode in decodes[WARM_UP:]) for part in decodes[0]}


@torch.inference_mode()
def bench_blocks(args, device, dtype):
    """A row for each upsampler of Table 1, with the milliseconds of each part of an eager decode, as in Figure 3. What
    the upsamplers take of their blocks, convolutions included, is given beside."""
    rows = []
    for name, size in itertools.product(args.config or ["ltx"], args.size):
        students = {way: placed(TurboVAED(replace(CONFIGS[name], upsampling=way)), device, dtype) for way in UPSAMPLING}
        latents, clip = random_clip(students["decoupled"], name, args.frames, size)
        marks = {way: mark_blocks(student, device) for way, student in students.items()}
        seconds = take_turns({way: partial(student, latents) for way, student in students.items()}, device, args.rounds)
        for way, student in students.items():
            times = part_times(marks[way])
            upsamplers = {part: time for part, time in times.items() if part not in PARTS}
            blocks = {part: times[part] + times.get(f"{part} upsampler", 0) for part in PARTS}
            whole = sum(blocks.values())
            blocks |= upsamplers | {"upsamplers": sum(upsamplers.values())}
            rows.append({"model": name, "way": way, **clip, "parameters": count(student),
                         **timing_row(seconds, way, clip["frames"], "pixel_shuffle_3d"),
                         "blocks": blocks, "shares": {part: time / whole for part, time in blocks.items()}})
    return rows


async def time_package(path, unit, device, rounds):
    """A row: what coremltools measures of a package on one choice of compute units, on that device or (None) this Mac.
    Operations' shares of a prediction are Core ML's own estimate."""
    import coremltools
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    model = coremltools.models.MLModel(str(path), skip_model_load=True, compute_units=coremltools.ComputeUnit[unit])
    about = model.get_spec().description
    shapes = {f.name: tuple(f.type.multiArrayType.shape) for f in (*about.input, *about.output)}
    if [len(shapes.get(name, ())) for name in ("latents", "video")] != [4, 4]:
        raise ValueError(f"{path}: has {shapes} instead of latents (t, C, h, w) and video (T, 3, H, W)")
    frames, _, height, width = shapes["video"]
    inputs, config = {"latents": torch.randn(shapes["latents"]).numpy()}, about.metadata.userDefined.get("config")
    name = next((name for name in CONFIGS if json.dumps(asdict(CONFIGS[name])) == config), None)
    row = {"model": path.stem, "way": unit, "frames": frames, "height": height, "width": width,
           **paper_speed("paper_iphone", name, height, width)}
    try:
        benchmarker = MLModelBenchmarker(model, device)
        row["load_milliseconds"] = (await benchmarker.benchmark_load()).samples[0]
        predictions = await benchmarker.benchmark_predict(inputs, iterations=rounds, warmup=True)
        row |= timing_row({unit: [sample / 1000 for sample in predictions.samples]}, unit, frames)
        return row | shares_of(await benchmarker.benchmark_operation_execution(inputs))
    except Exception as error:      # out of memory, or refused by this unit: the other units are still worth timing
        return row | {"error": f"{type(error).__name__}: {summary(error)}"}


def shares_of(operations):
    """For a row: which compute units a prediction's time goes to, and its slowest operations."""
    # Constants have neither samples nor a device.
    operations = [op for op in operations if op.measurement.samples and op.compute_device_usage]
    whole, units, slowest = sum(op.measurement.samples[0] for op in operations), Counter(), []
    for op in operations:       # the slowest first
        unit = type(op.compute_device_usage.preferred_compute_device).__name__      # such as MLCPUComputeDevice
        unit, share = unit.removeprefix("ML").removesuffix("ComputeDevice"), op.measurement.samples[0] / whole
        units[unit] += share
        slowest.append({"operation": op.spec.type, "output": op.spec.outputs[0].name, "share": share, "unit": unit})
    return {"operations": len(operations), "units": dict(units.most_common()), "slowest": slowest[:10]}


async def start_phone(team, folder):
    """The connected iPhone, with coremltools' app that runs packages: built in `folder`, signed for that team."""
    from coremltools.models.ml_program.experimental import remote_device
    # By itself the service would look 20 times for an answer; loading may well take longer.
    service = remote_device._DeviceCtlRemoteService
    service.__init__ = partialmethod(service.__init__, max_attempts=200)
    try:
        phones = remote_device.Device.get_connected_devices(device_type=remote_device.DeviceType.IPHONE)
        if not phones:
            raise ValueError("none is connected: plug it in, unlock it, trust this Mac, turn on its Developer Mode")
        credentials = remote_device.AppSigningCredentials(      # Apple gives each identifier to one team only
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
            print(f"{path.name} on {unit}: {row.get('error', 'measured')}", flush=True)
            if device and not device.session.is_alive():      # a model too large for the phone's memory ends the app
                try:
                    device = await start_phone(team, folder)
                except ValueError as error:
                    print(error)
                    break
    return rows


def bench_packages(args, device, dtype):
    """Rows of time_packages; ValueError where Core ML cannot run, with what it needs."""
    if sys.platform != "darwin":
        raise ValueError("Core ML runs on Apple hardware: --mlpackage needs macOS, --iphone also Xcode and a connected "
                         "iPhone, and both need a package that `python export.py` made")
    packages = sorted(path for path in Path("out").rglob("*.mlpackage") if not path.name.startswith("."))
    paths = [Path(path) for path in args.mlpackage or packages or ["out/*.mlpackage"]]
    missing = [str(path) for path in paths if not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such package; `python export.py` makes one")
    rows = asyncio.run(time_packages(paths, args.rounds or 10, args.team))
    if not any("fps" in row for row in rows):
        raise ValueError(f"nothing could be measured; {rows[0]['way']}: {rows[0]['error']}")
    return rows


def table(rows):
    def cell(text, row):
        try:
            return text.format(**row)
        except KeyError:        # this row has no such figure
            return ""

    without = ("parameters", "FPS") if "blocks" in rows[0] else ()
    cells = [[name, *(cell(text, row) for row in rows)] for name, text in COLUMNS.items() if name not in without]
    cells = [column for column in cells if any(column[1:])]
    return text_table(list(zip(*cells)), ("model", "way"))


def report(rows):
    print(table(rows))
    if "blocks" in rows[0]:
        print("milliseconds of each part and its share; upsamplers: with their convolutions, part of up0 ... up3")
    if "matrix_tflops" in rows[0]:
        print("measured here, in turns: {matrix_tflops:.2f} TFLOP/s of a matrix product, {copy_gb_per_s:.0f} GB/s of a "
              "copy".format(**rows[0]))
    for where, rivals in RIVALS.items():
        if any(where in row for row in rows):
            print(f"the paper's frames per second are of {rivals}")
    for row in rows:
        if "units" in row:
            units = ", ".join(f"{unit} {share:.0%}" for unit, share in row["units"].items())
            slowest = ", ".join(f"{op['operation']} {op['output']} {op['share']:.1%} ({op['unit']})"
                                for op in row["slowest"][:5])
            print(f"{row['model']} on {row['way']}, estimated shares: {units}; slowest {slowest}")


def picture(rows, path):
    """Bars of frames per second; or of each part's milliseconds, with the upsamplers hatched."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [row for row in rows if "fps" in row]
    places = range(len(rows))
    names = [f"{r['model']} {r['way']}, {r['frames']}x{r['height']}x{r['width']}" for r in rows]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    if "blocks" in rows[0]:
        left = [0] * len(rows)
        for part in PARTS:
            widths = [row["blocks"][part] for row in rows]
            axes.barh(places, widths, left=left, label=part)
            upsamplers = [row["blocks"].get(f"{part} upsampler", 0) for row in rows]
            axes.barh(places, upsamplers, left=left, color="none", hatch="////", edgecolor="white", lw=0)
            left = [a + b for a, b in zip(left, widths)]
        figure.legend(ncols=len(PARTS), loc="outside upper center", fontsize="small", frameon=False)
        axes.set_xlabel("milliseconds of a decode; hatched: upsamplers with their convolutions")
    else:
        bars = axes.barh(places, [row["fps"] for row in rows])
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.set(xlabel="frames per second", xmargin=0.1)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--config NAME | --student PATH] [options]; --help explains each")
    add = parser.add_argument
    add("--config", nargs="+", choices=CONFIGS, help="with random weights; or the one that --student's file lacks")
    add("--student", metavar="PATH", help="a folder, a file or a hub id (default: the newest in out/, or the shipped)")
    add("--size", type=parse_size, nargs="+", metavar="HxW", help="of the video in pixels (default 512x512 and "
        "720x1280 on a GPU, 256x256 on a CPU; --blocks and --stream 512x512 and 128x128)")
    add("--frames", type=number(int, 1), help="of a clip, or the most below that latents decode to (default 17)")
    add("--teacher", action=argparse.BooleanOptionalAction, help="teachers too (default: without --config)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too (default)")
    add("--decode", action="store_true", help="optimized for inference as well, and no teacher unless --teacher")
    add("--pte", metavar="PATH", help="export.py's .pte of this student, size and --dtype as well, on the CPU")
    add("--stream", action="store_true", help="streamed in chunks against whole")
    add("--lengths", type=number(int, 1), nargs="+", metavar="N", help="of --stream's latents (default 10 100 600)")
    add("--chunk", type=number(int, 1), help="latent frames that --stream decodes at a time (default 4)")
    add("--blocks", action="store_true", help="latency by block, eager, for --config (default ltx)")
    add("--mlpackage", nargs="*", metavar="PATH", help="Core ML packages, on a Mac (default: all under out/)")
    add("--iphone", action="store_true", help="the packages on the iPhone that is connected to this Mac")
    add("--team", metavar="ID", help="the Apple development team for which Xcode signs --iphone's app")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default float32 on a CPU, float16 on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--rounds", type=number(int, 1), help="turns that count (default: 5 to 200 in 45 s; packages: 10)")
    add("--out", default="out/bench", help="folder for bench.json and bench.png (default out/bench)")
    args = parser.parse_args()
    gpu, args.packages = args.device.startswith("cuda"), args.iphone or args.mlpackage is not None
    if not gpu and args.device != "cpu":
        parser.error(f"--device is cpu or cuda, not {args.device}")
    if args.stream + args.blocks + args.packages + bool(args.pte) > 1:
        parser.error("--stream, --blocks, --pte and --mlpackage or --iphone go without each other")
    if args.iphone != bool(args.team):
        parser.error("--iphone and --team go together: Xcode signs the app that runs packages for a development team")
    if (args.student or args.decode) and (args.blocks or args.packages):
        parser.error("--student and --decode go without --blocks, --mlpackage and --iphone")
    if args.stream and (args.teacher or args.frames):
        parser.error("--stream goes without --teacher and --frames: its clips are of --lengths latent frames")
    if (args.chunk or args.lengths) and not args.stream:
        parser.error("--chunk and --lengths go with --stream only")
    if args.student and len(args.config or ()) > 1:
        parser.error("--student goes with one --config at most: its own")
    if args.teacher is None:
        args.teacher = not args.decode and (args.student or not args.config)
    if args.blocks or args.stream:
        args.size = args.size or [(512, 512) if gpu else (128, 128)]
    args.size = args.size or ([(512, 512), (720, 1280)] if gpu else [(256, 256)])
    args.frames, args.chunk, args.lengths = args.frames or 17, args.chunk or 4, args.lengths or [10, 100, 600]
    args.dtype = args.dtype or ("float16" if gpu else "float32")
    return args


def main():
    args = parse()
    torch.backends.cudnn.allow_tf32 = False             # float32 is float32, for convolutions as for the matrix product
    torch.backends.cudnn.benchmark = True               # sizes are fixed: cuDNN may choose by trial, as in train.py
    check_writable(args.out)
    device = find_device(args.device)
    bench = (bench_packages if args.packages else bench_blocks if args.blocks else
             bench_stream if args.stream else bench_students)
    rows = bench(args, device, getattr(torch, args.dtype))
    report(rows)
    results = {"command": ["python", *sys.argv], "torch": torch.__version__, "python": platform.python_version()}
    if not args.packages:
        name = f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name(device)
        results |= {"device": name, "dtype": args.dtype}
        print(f"{name}, {args.dtype}, torch {torch.__version__}")
    file, image = Path(args.out, "bench.json"), Path(args.out, "bench.png")
    with atomically(file) as temporary:
        temporary.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
        try:
            with atomically(image) as drawn:
                picture(rows, drawn)
            print(image)
        except ImportError:
            print("no bench.png: matplotlib is not installed")
    print(file)


if __name__ == "__main__":
    run_command(main, "smaller --size or --frames, or --dtype bfloat16, need less")
