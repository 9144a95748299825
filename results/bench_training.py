"""How the training step, and what it asks of a teacher, compare with plain ones: two tables of results/README.md.

    python results/bench_training.py --no-compile --rounds 5      # the step, with and without cache, and a plain one
    python results/bench_training.py --features                   # each teacher's `features` against a whole decode

Ways take turns, as in bench.py. Losses are the same in expectation, weights are random, reading videos is left out.
"""
import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import WorkCounter, count, machine, nbytes, peak_memory, placed, table, take_turns, timing_row  # noqa: E402
from data import CachedClips                                                                            # noqa: E402
from losses import LPIPS, Objective, PatchDiscriminator, StudentWithHeads, kl_loss, make_heads          # noqa: E402
from model import CONFIGS, TurboVAED, find_device, number, parse_size, run_command                      # noqa: E402
from teachers import TEACHERS, load_teacher                                                             # noqa: E402


def aligned_blocks(teacher):
    """The blocks that training aligns, as in the paper and the recipes in train.py."""
    return ["mid", "up0", "up1"] if teacher.compression[1] == 32 else ["mid", "up0"]


def find_teacher(name, device, dtype=torch.float32):
    return load_teacher(name, None if name == "tiny" else "random", device, dtype)


@torch.inference_mode()
def bench_features(args, device, dtype):
    """Two rows for each teacher: a whole decode, and the features that training aligns, of the same latents."""
    rows = []
    for name in args.config or TEACHERS:
        teacher = find_teacher(name, device, dtype)
        (height, width), (d_t, d_h, d_w), frames = args.size, teacher.compression, 17 if teacher.images else 16
        h, w, blocks = -(-height // d_h), -(-width // d_w), aligned_blocks(teacher)
        latents = torch.randn(1, teacher.latent_channels, (frames - 1) // d_t + 1, h, w, device=device, dtype=dtype)
        runs = {"decode": partial(teacher.decode, latents),
                f"features {' '.join(blocks)}": partial(teacher.features, latents, blocks)}
        seconds = take_turns(runs, device, args.rounds)
        rows += [{"model": name, "way": way, "frames": frames, "height": h * d_h, "width": w * d_w,
                  **timing_row(seconds, way, frames, "decode")} for way in runs]
        print(f"{name}: {rows[-1]['way']} take {100 / rows[-1]['speed_up']:.1f} % of a whole decode", flush=True)
    return rows


class Training:
    """What the ways to take a training step share: the losses' networks, and a micro-batch of video with what the
    teacher makes of it, also as train.py's cache has it."""

    def __init__(self, name, teacher, video, dtype, lpips_frames, folder):
        self.config, self.teacher, self.video, self.lpips_frames = CONFIGS[name], teacher, video, lpips_frames
        self.blocks = aligned_blocks(teacher)
        self.lpips, self.discriminator = (network.to(video.device) for network in
                                          (LPIPS(random=True), PatchDiscriminator()))
        self.autocast = partial(torch.autocast, video.device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad():
            self.latents, self.features, kl = self.teach()
        self.cache = CachedClips(folder, len(video), {}, blocks=self.blocks)
        for n, clip in enumerate(video):
            features = {f"features.{block}": x[n] for block, x in self.features.items()}
            self.cache.put(n, clip, {"latents": self.latents[n], "kl": kl} | features)

    def teach(self):
        """(latents, {block: features}, KL divergence), by the teacher."""
        mean, logvar = self.teacher.posterior(self.video)
        latents = mean if logvar is None else mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return latents, self.teacher.features(latents, self.blocks), kl_loss(mean, logvar)

    def from_cache(self):
        """(video, latents, {block: features}, KL divergences), read from the cache."""
        entries = [self.cache[n] for n in range(len(self.video))]
        stack = lambda key: torch.stack([entry[key] for entry in entries]).to(self.video.device)
        features = {block: stack(f"features.{block}") for block in self.blocks}
        return stack("video"), stack("latents").float(), features, stack("kl")

    def step(self, way, compiles):
        """A function that takes one step with a new student in that way."""
        student, device = TurboVAED(self.config), self.video.device
        student = student.to(device) if way == "plain" else placed(student, device, torch.float32)
        heads = make_heads({block: student.config.feature_shape(block, self.latents.shape) for block in self.blocks},
                           {block: x.shape for block, x in self.features.items()})
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
        """What the published code does: encode, decode with the whole teacher, LPIPS on all frames, and the
        discriminator's forward pass though its weight is zero."""
        with torch.no_grad(), self.autocast():
            latents, features, _ = self.teach()
            self.teacher.decode(latents)
        with self.autocast():
            decoded, distill = model(latents, features)
            loss = (decoded.float() - self.video).abs().mean() + self.lpips(decoded, self.video) + distill
            self.discriminator(decoded)
        loss.backward()

    def our_gradients(self, model, objective, cached):
        """train.py's step of stage 1, with LPIPS on a few random frames."""
        if cached:
            target, latents, features, kl = self.from_cache()
        else:
            with torch.no_grad(), self.autocast():
                target, (latents, features, kl) = self.video, self.teach()
        frames = torch.stack([torch.randperm(target.shape[2])[:self.lpips_frames] for _ in target]).to(target.device)
        objective.backward(model, latents, features, target, kl.mean(), frames, autocast=self.autocast)


def bench_steps(args, device, dtype):
    """A row for each way to take a training step of stage 1 on one micro-batch, for each configuration."""
    rows, (height, width) = [], args.size
    for name in args.config or ["ltx"]:
        teacher = find_teacher(name, device)
        frames = max(17 if teacher.images else 16, teacher.fewest)
        teacher.check_clip(frames, height, width)
        video = torch.rand(args.batch, 3, frames, height, width, device=device) * 2 - 1
        with tempfile.TemporaryDirectory() as folder:
            training = Training(name, teacher, video, dtype, args.lpips_frames, folder)
            weights = {"cached": nbytes(training.lpips)}
            weights["ours"] = weights["cached"] + nbytes(teacher)
            weights["plain"] = weights["ours"] + nbytes(training.discriminator)
            ways = ("plain", "ours", "cached")
            work = {way: WorkCounter() for way in ways}
            for way in ways:
                with work[way]:
                    training.step(way, False)()
            runs = {way: training.step(way, args.compile and way != "plain") for way in ways}
            limits, amounts = machine(device, dtype)
            seconds = take_turns(runs | limits, device, args.rounds)
            student = TurboVAED(CONFIGS[name])
            for way, run in runs.items():
                rows.append({"model": name, "way": f"{way} step", "frames": frames, "height": height, "width": width,
                             "parameters": count(student),
                             **timing_row(seconds, way, args.batch * frames, "plain", work[way], amounts),
                             **peak_memory(run, device, 3 * nbytes(student) + weights[way])})   # 3: AdamW's moments
                print(f"{name}, {way}: {work[way].flops / args.batch / 1e12:.2f} TFLOP a sample", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features", action="store_true", help="teachers' features against a whole decode, not the training step")
    add("--config", nargs="+", choices=CONFIGS, help="(default ltx; --features: all teachers)")
    add("--size", type=parse_size, metavar="HxW", help="(default 128x128; of the step on a GPU 256x256)")
    add("--batch", type=number(int, 1), default=1, help="clips in the step's micro-batch (default 1)")
    add("--lpips-frames", type=number(int, 1), default=2, help="frames of a clip that LPIPS sees (default 2)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile students, but the plain one")
    add("--rounds", type=number(int, 1), help="turns that count (default: 5 to 200 in 45 s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default float32; on a GPU bfloat16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    device = find_device(args.device)
    gpu = device.type == "cuda"
    args.size = args.size or ((256, 256) if gpu and not args.features else (128, 128))
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True           # as in bench.py
    print(table((bench_features if args.features else bench_steps)(args, device, dtype)))


if __name__ == "__main__":
    run_command(main, "smaller --size or --batch, or --dtype bfloat16, need less")
