"""The first table of results/README.md, of every student: parameters, compression, arithmetic for each frame.

    python results/family.py --size 512
"""
import argparse
import signal
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import count                                         # noqa: E402
from model import CONFIGS, TurboVAED, number, text_table        # noqa: E402


def count_flops(config, latent_shape):
    """FLOP to decode latents of that shape: two for each multiply-add of the convolutions. Nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        TurboVAED(config)(torch.empty(latent_shape))
    return counter.get_total_flops()


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
            parameters = count(TurboVAED(config))
        rows.append([name, str(config.latent_channels), str(config.compression), f"{parameters / 1e6:.3f}",
                     f"{flops / 1e9 / config.frames(t):.3f}"])
    print(text_table(rows))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it without a word
    main()
