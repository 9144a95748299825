"""Latents of generated video, for `python evaluate.py --latents`: what a diffusers pipeline hands to its VAE's decoder.

    python examples/generate.py prompts.txt out/latents --pipeline Lightricks/LTX-Video --size 352x640
    torchrun --nproc_per_node=8 examples/generate.py ...           # processes share the prompts
    python evaluate.py --latents out/latents --data openvid --teacher ltx --student out/ltx

Writes a .safetensors for each line of prompts.txt. Files that are there are kept, so a stopped run goes on.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.pipelines import teachers_of                                                              # noqa: E402
from model import atomically, check_writable, find_device, number, parse_size, run_command, summary     # noqa: E402


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", help="a text file, a prompt a line")
    add("latents", help="the folder to write to")
    add("--pipeline", required=True, metavar="HUB_ID", help="a diffusers pipeline, or a folder with one")
    add("--size", type=parse_size, metavar="S|HxW", help="pixels (default: the pipeline's)")
    add("--frames", type=number(int, 1), help="default: the pipeline's")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=10_000, help="of the first prompt (default 10000)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32")
    return parser.parse_args()


def to_do(args):
    """{file: {"prompt", "pipeline", "seed", ...}, as text} of what this process has to make."""
    prompts = [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompt: it takes one a line")
    height, width = args.size or (None, None)
    shape = {"num_frames": args.frames, "height": height, "width": width}
    rank, world, todo = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), {}
    for n, prompt in list(enumerate(prompts))[rank::world]:
        file = Path(args.latents) / f"{n:05d}.safetensors"
        origin = {"prompt": prompt, "pipeline": args.pipeline, "seed": str(args.seed + n), "dtype": args.dtype,
                  "shape": json.dumps({key: value for key, value in shape.items() if value})}
        try:
            with safe_open(file, "pt") as there:
                made = there.metadata()
        except FileNotFoundError:
            todo[file] = origin
            continue
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from None
        if (made or {}) | origin != made:
            raise ValueError(f"{file} was made from {made}, not from {origin}: name another folder")
    print(f"{len(prompts)} prompts, {len(todo)} to do" + (f" by process {rank}" if world > 1 else ""), flush=True)
    return todo


@torch.inference_mode()
def main():
    from diffusers import DiffusionPipeline
    from diffusers.models.autoencoders.vae import DecoderOutput
    args = parse()
    device = find_device(args.device)
    check_writable(args.latents)
    todo = to_do(args)
    if not todo:
        return
    try:
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=getattr(torch, args.dtype)).to(device)
    except Exception as error:      # a dozen classes, from no network to no such repository
        raise OSError(f"no pipeline {args.pipeline}: {summary(error)}") from None
    taken = []

    def decode(latents, *_, return_dict=True, **__):
        """In the place of the VAE's. output_type="latent" will not do: pipelines then scale and pack latents."""
        taken.append(latents)
        nothing = torch.zeros(len(latents), 3, 1, 8, 8, device=latents.device, dtype=latents.dtype)
        return DecoderOutput(sample=nothing) if return_dict else (nothing,)

    teachers = teachers_of(pipe.vae)                # so that evaluate.py knows whose latents they are
    teacher = {"teacher": teachers[0]} if len(teachers) == 1 else {}
    pipe.vae.decode = decode
    pipe.set_progress_bar_config(disable=True)
    for file, origin in tqdm(todo.items(), unit="prompt"):
        taken.clear()
        generator = torch.Generator().manual_seed(int(origin["seed"]))
        pipe(origin["prompt"], generator=generator, output_type="pt", **json.loads(origin["shape"]))
        with atomically(file) as temporary:
            save_file({"latents": torch.cat(taken).cpu().contiguous()}, temporary, metadata=origin | teacher)


if __name__ == "__main__":
    run_command(main, "smaller --size or --frames, or --dtype bfloat16, need less")
