"""How fast: students against their teachers, eager against compiled, and what the machine could do at best.

    python bench.py                                        # the student in out/, else the shipped one, with its teacher
    python bench.py --config ltx dc --size 512x512 720x1280 --dtype bfloat16        # on a GPU
    python bench.py --config ltx --teacher                 # against the teacher, with random weights
    python bench.py --features                             # teachers: `features` against a whole decode
    python bench.py --train                                # the training step, with and without cache, against a plain one

What is compared takes turns within one run, after warm-up, so that whatever else the machine does slows all of it;
medians and the middle half's spread are reported. Weights are random where speed does not depend on them. Writes
bench.json and bench.png to --out. Students need PyTorch alone.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from model import CONFIGS, OWN_FILE, TurboVAED, count_flops

SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_student.safetensors"


def take_turns(runs, device, rounds, warm_up=2):
    """Seconds of each of {name: function}, {name: [seconds]}; functions take turns, GPU work is timed by events."""
    seconds = {name: [] for name in runs}
    for i in range(warm_up + rounds):
        for name, run in runs.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end) / 1000
            else:
                start = time.perf_counter()
                run()
                spent = time.perf_counter() - start
            if i >= warm_up:
                seconds[name].append(spent)
    return seconds


def machine_limits(device, dtype, rounds=5):
    """(FLOP/s of a large matrix product, bytes/s of a large copy), measured here and now."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = take_turns({"matrix": lambda: a @ b, "copy": lambda: y.copy_(x)}, device, rounds)
    return 2 * n ** 3 / min(seconds["matrix"]), 2 * x.numel() / min(seconds["copy"])


def peak_memory(run, device):
    """Bytes that PyTorch held at most while `run` ran, weights included; None on a CPU, where nothing counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def figures(seconds, frames, flops=None, limits=None):
    """What the table shows of one entry's times."""
    median = statistics.median(seconds)
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    row = {"milliseconds": 1000 * median, "spread": 1000 * (quarters[2] - quarters[0]), "fps": frames / median}
    if flops:
        row |= {"tflops": flops / median / 1e12, "of_matrix_rate": flops / median / limits[0]}
    return row


def bench_students(args, device, dtype):
    """A row for each student, size and way of running it; its teacher's where asked for."""
    limits, rows = machine_limits(device, dtype), []
    for name, config, student in args.students:
        student = student.to(device, dtype).eval().channels_last() if device.type == "cuda" else student.to(device, dtype).eval()
        parameters = sum(p.numel() for p in student.parameters())
        for height, width in args.size:
            d_t, d_h, d_w = config.compression
            t = next(t for t in range(1, args.frames + 2) if config.frames(t) >= args.frames - args.frames % d_t)
            shape = (1, config.latent_channels, t, -(-height // d_h), -(-width // d_w))
            latents, frames, flops = torch.randn(shape, device=device, dtype=dtype), config.frames(t), sum(count_flops(config, shape).values())
            if device.type == "cuda":
                latents = latents.contiguous(memory_format=torch.channels_last_3d)
            runs = {"eager": lambda: student(latents)}
            if args.compile:
                compiled = torch.compile(student, dynamic=False)
                runs["compiled"] = lambda: compiled(latents)
            if args.teacher:
                from teachers import load_teacher
                teacher = load_teacher(name, None if name == "tiny" else "random", device, dtype)
                runs["teacher"] = lambda: teacher.decode(latents)
            seconds = take_turns(runs, device, args.rounds)
            for way, run in runs.items():
                ours = way != "teacher"
                count = parameters if ours else sum(p.numel() for p in teacher.vae.decoder.parameters())
                rows.append({"model": name, "way": way, "frames": frames, "height": height, "width": width, "parameters": count,
                             **figures(seconds[way], frames, flops if ours else None, limits), "peak_bytes": peak_memory(run, device)})
    return rows, {"matrix_tflops": limits[0] / 1e12, "copy_gb_per_s": limits[1] / 1e9}


def aligned_blocks(teacher):
    """The blocks that training aligns, as in the paper and the recipes in train.py."""
    return ["mid", "up0", "up1"] if teacher.compression[1] == 32 else ["mid", "up0"]


def bench_features(args, device, dtype):
    """A row for each teacher: the features that training aligns against a whole decode of the same latents."""
    from teachers import TEACHERS, load_teacher
    rows = []
    for name in args.config or TEACHERS:
        teacher = load_teacher(name, None if name == "tiny" else "random", device, dtype)
        (height, width), (d_t, d_h, d_w) = args.size[0], teacher.compression
        frames = 16 + int(teacher.images)
        blocks = aligned_blocks(teacher)
        latents = torch.randn(1, teacher.latent_channels, (frames - 1) // d_t + 1, height // d_h, width // d_w, device=device, dtype=dtype)
        seconds = take_turns({"decode": lambda: teacher.decode(latents), "features": lambda: teacher.features(latents, blocks)},
                             device, args.rounds, warm_up=1)
        row = {"model": name, "way": f"features {' '.join(blocks)}", "frames": frames, "height": height, "width": width,
               "decode_milliseconds": 1000 * statistics.median(seconds["decode"]), **figures(seconds["features"], frames)}
        rows.append(row | {"of_decode": row["milliseconds"] / row["decode_milliseconds"]})
        print(f"{name}: {row['way']} {row['milliseconds']:.0f} ms, whole decode {row['decode_milliseconds']:.0f} ms, "
              f"{100 * rows[-1]['of_decode']:.1f} %", flush=True)
    return rows


class FlopCounter(TorchDispatchMode):
    """Adds up the arithmetic of what runs under it. (PyTorch's FlopCounterMode fails on gradients of a leaf.)"""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


def bench_train(args, device, dtype):
    """A row for each way to take a training step of stage 1 on one micro-batch, for each configuration.

    plain: what the published code does: encode, decode with the whole teacher, LPIPS on all frames, the discriminator's
    forward pass though its weight is zero, eager. ours: train.py's step, with LPIPS on --lpips-frames random frames.
    cached: the same from train.py's cache, reading it included. The losses are the same in expectation. Random weights;
    reading videos is left out of all.
    """
    import tempfile

    from data import CachedClips
    from losses import LPIPS, Objective, PatchDiscriminator, StudentWithHeads, kl_loss, make_heads
    from teachers import load_teacher
    limits, rows, (height, width) = machine_limits(device, dtype), [], args.size[0]
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    for name in args.config or ["ltx"]:
        teacher = load_teacher(name, None if name == "tiny" else "random", device)
        blocks, frames = aligned_blocks(teacher), 16 + int(teacher.images)
        lpips, discriminator = LPIPS(random=True).to(device), PatchDiscriminator().to(device)
        numbers = list(range(args.batch))
        video = torch.rand(args.batch, 3, frames, height, width, device=device) * 2 - 1

        def teach():
            mean, logvar = teacher.posterior(video)
            z = mean if logvar is None else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            return z, teacher.features(z, blocks), kl_loss(mean, logvar)

        with torch.no_grad():
            latents, features, kl = teach()
        shapes = {block: x.shape for block, x in features.items()}

        def step(ours, cache=None, compiles=args.compile):
            student = TurboVAED(CONFIGS[name]).to(device)
            if ours and device.type == "cuda":
                student = student.channels_last()
            heads = make_heads({b: student.config.feature_shape(b, latents.shape) for b in blocks}, shapes)
            model = StudentWithHeads(student, heads).to(device)
            if ours and compiles:
                student.compile()
            optimizer, objective = torch.optim.AdamW(model.parameters(), 2e-4), Objective(lpips)

            def plain():
                with torch.no_grad(), autocast():
                    z, aligned, _ = teach()
                    teacher.decode(z)
                with autocast():
                    decoded, distill = model(z, aligned)
                    loss = (decoded.float() - video).abs().mean() + lpips(decoded, video) + distill
                    discriminator(decoded)
                loss.backward()

            def cheap():
                with torch.no_grad(), autocast():
                    if cache:
                        entries = [cache[n] for n in numbers]
                        target, z, divergence, *aligned = (torch.stack([e[key] for e in entries]).to(device)
                                                   for key in ("video", "latents", "kl", *[f"features.{b}" for b in blocks]))
                        z, aligned = z.float(), dict(zip(blocks, aligned))
                    else:
                        target, (z, aligned, divergence) = video, teach()
                chosen = torch.stack([torch.randperm(frames)[:args.lpips_frames] for _ in numbers]).to(device)
                objective.backward(model, z, aligned, target, divergence.mean(), chosen, autocast=autocast)

            def run():
                cheap() if ours else plain()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return run

        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            cache = CachedClips(folder, args.batch, {}, blocks=blocks)
            for n in numbers:
                cache.put(n, video[n], {"latents": latents[n], "kl": kl} | {f"features.{b}": x[n] for b, x in features.items()})
            flops = {}
            for way, made in {"plain": step(False), "ours": step(True, compiles=False), "cached": step(True, cache, False)}.items():
                with FlopCounter() as counter:
                    made()
                flops[way] = counter.total
            runs = {"plain": step(False), "ours": step(True), "cached": step(True, cache)}
            seconds = take_turns(runs, device, args.rounds)
            for way, run in runs.items():
                row = figures(seconds[way], args.batch * frames, flops[way], limits)
                rows.append({"model": name, "way": f"{way} step", "frames": frames, "height": height, "width": width,
                             "parameters": sum(p.numel() for p in TurboVAED(CONFIGS[name]).parameters()), **row,
                             "samples_per_s": args.batch * 1000 / row["milliseconds"], "flops_per_sample": flops[way] / args.batch,
                             "peak_bytes": peak_memory(run, device)})
    return rows, {"matrix_tflops": limits[0] / 1e12, "copy_gb_per_s": limits[1] / 1e9}


def table(rows):
    header = ("model", "way", "clip", "M param.", "ms", "spread", "FPS", "TFLOP/s", "of matrix rate", "peak GB", "speed-up")
    cells = []
    for r in rows:
        rivals = [o for o in rows if all(o[k] == r[k] for k in ("model", "height", "width"))]
        base = next((o for o in rivals if o["way"] == "teacher"), rivals[0])
        cells.append((r["model"], r["way"], f"{r['frames']}x{r['height']}x{r['width']}", f"{r['parameters'] / 1e6:.2f}",
                      f"{r['milliseconds']:.1f}", f"{r['spread']:.1f}", f"{r['fps']:.1f}", f"{r['tflops']:.3f}" if "tflops" in r else "",
                      f"{100 * r['of_matrix_rate']:.0f} %" if "tflops" in r else "",
                      f"{r['peak_bytes'] / 1e9:.2f}" if r["peak_bytes"] else "", f"{base['milliseconds'] / r['milliseconds']:.2f}x"))
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    lines = ["  ".join([c[0].ljust(widths[0]), c[1].ljust(widths[1])] + [v.rjust(w) for v, w in zip(c[2:], widths[2:])])
             for c in (header, *cells)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def report(results, args):
    print(table(results["rows"]))
    print(f"{results['device']}, {args.dtype}, torch {torch.__version__}; measured here: {results['limits']['matrix_tflops']:.2f} TFLOP/s of a "
          f"matrix product, {results['limits']['copy_gb_per_s']:.0f} GB/s of a copy")


def picture(path, rows):
    try:
        import matplotlib
    except ImportError:
        return print(f"no {path.name}: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(rows)), layout="constrained")
    names = [f"{r['model']} {r['way']}, {r['frames']}x{r['height']}x{r['width']}" for r in rows]
    bars = axes.barh(range(len(rows)), [r["fps"] for r in rows], color=["tab:grey" if r["way"] == "teacher" else "tab:blue" for r in rows])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="frames per second", xmargin=0.1)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, help="students of these configurations, with random weights")
    parser.add_argument("--student", metavar="PATH", help="a run's folder or a file (default: the newest under out/, else the shipped one)")
    parser.add_argument("--size", nargs="+", metavar="HxW", help="of the video in pixels (default 512x512 and 720x1280 on a GPU, "
                        "256x256 on a CPU; --features and --train: 128x128, --train on a GPU: 256x256)")
    parser.add_argument("--frames", type=int, default=17, help="of a clip, or the nearest fewer that latents decode to (default 17)")
    parser.add_argument("--teacher", action=argparse.BooleanOptionalAction, default=None,
                        help="the teachers' decoders too (default: without --config)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too (default)")
    parser.add_argument("--features", action="store_true", help="teachers: aligned features against a whole decode")
    parser.add_argument("--train", action="store_true", help="the training step against a plain one, for --config (default ltx)")
    parser.add_argument("--batch", type=int, default=1, help="clips in --train's micro-batch (default 1)")
    parser.add_argument("--lpips-frames", type=int, default=2, help="frames of a clip that --train's LPIPS sees (default 2, as train.py's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default float16 on a GPU, float32 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count (default 7)")
    parser.add_argument("--out", default="out/bench", help="folder for bench.json and bench.png (default out/bench)")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    sizes = args.size or (["256x256" if gpu and args.train else "128x128"] if args.features or args.train else ["512x512", "720x1280"] if gpu else ["256x256"])
    try:
        args.size = [tuple(map(int, size.split("x"))) for size in sizes]
        if any(len(size) != 2 or min(size) < 1 for size in args.size):
            raise ValueError
    except ValueError:
        parser.error(f"--size takes HEIGHTxWIDTH in pixels, such as 512x512, not {' '.join(sizes)}")
    if min(args.rounds, args.frames, args.batch, args.lpips_frames) < 1:
        parser.error("--rounds, --frames, --batch and --lpips-frames must be at least 1")
    args.teacher = not args.config if args.teacher is None else args.teacher
    args.dtype = args.dtype or ("float32" if not gpu else "bfloat16" if args.train else "float16")
    return args


def find_student(path):
    """(name, configuration, model) of the student asked for, else of the newest trained here, else of the shipped one."""
    if path is None:
        trained = sorted(Path("out").glob(f"*/{OWN_FILE}"), key=lambda file: file.stat().st_mtime)
        path = trained[-1] if trained else SHIPPED
        print(f"the student {path}" if trained else f"no student in out/: the shipped one, {path.name}")
    student = TurboVAED.from_pretrained(path)
    name = student.metadata.get("teacher") or next((n for n, c in CONFIGS.items() if c == student.config), "tiny")
    return name, student.config, student


@torch.inference_mode()
def main():
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    results = {"command": ["python", *sys.argv], "dtype": args.dtype, "torch": torch.__version__, "python": platform.python_version(),
               "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"}
    if args.features:
        results["rows"] = bench_features(args, device, dtype)
    elif args.train:
        with torch.inference_mode(False), torch.enable_grad():
            results["rows"], results["limits"] = bench_train(args, device, dtype)
        report(results, args)
        print(f"arithmetic of a sample: {', '.join(r['way'] + ' %.2f TFLOP' % (r['flops_per_sample'] / 1e12) for r in results['rows'])}")
    else:
        args.students = [(name, CONFIGS[name], TurboVAED(CONFIGS[name])) for name in args.config] if args.config else [find_student(args.student)]
        results["rows"], results["limits"] = bench_students(args, device, dtype)
        report(results, args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(out / "bench.png", results["rows"])
    print(f"{out}/bench.json, {out}/bench.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
