"""Frozen teachers: video VAEs behind one small interface.

    teacher = load_teacher("ltx")                        # released weights from the hub, cached there
    teacher = load_teacher("dc", weights="F32T4C128_AE.safetensors", device="cuda", dtype=torch.bfloat16)
    teacher = load_teacher("ltx", weights="random")      # right shapes without a download: tests and speed

    latents = teacher.encode(video)                      # (B, 3, T, H, W) in [-1, 1] -> (B, C, t, h, w)
    video = teacher.decode(latents)
    features = teacher.features(latents, ("mid", "up0", "up1"))

Latents are exactly what the encoder gives: what a diffusers pipeline hands to `vae.decode`, with no scaling factor.
Clips are taken whole, without tiles, but for dc's above 32 frames, which its release takes in tiles too.

`python teachers.py` prints the table: parameters, compression, clips, blocks and their shapes, licences.
"""
import argparse
import inspect
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------
# Video DC-AE (Peng et al. 2025; DC-AE: Chen et al. 2024). Module names are the released checkpoint's.

@dataclass(frozen=True)
class VideoDCAEConfig:
    latent_channels: int = 128
    widths: tuple = (128, 256, 512, 512, 1024, 1024)        # channels of stages 0 ... 5, from pixels to latents
    encoder_depths: tuple = (2, 2, 2, 3, 3, 3)              # blocks in each stage
    decoder_depths: tuple = (3, 3, 3, 3, 3, 3)
    strides: tuple = ((1, 2), (1, 2), (1, 2), (2, 2), (2, 2))   # (time, space) between stage i and i + 1
    attention_from: int = 3                                 # stages from here on are EViT blocks, else ResBlocks
    patch: int = 1                                          # stage 0 works on space unshuffled by this factor

    @property
    def compression(self):
        time, space = map(math.prod, zip(*self.strides))
        return time, self.patch * space, self.patch * space

    def blocks(self, stage, depth):
        kind = ResBlock if stage < self.attention_from else EViTBlock
        return [kind(self.widths[stage]) for _ in range(depth)]


class RMSNorm(nn.Module):
    """Over channels, with scale and bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-5).to(x.dtype)
        weight, bias = (p.to(x.dtype).view(-1, 1, 1, 1) for p in (self.weight, self.bias))
        return x * scale * weight + bias


class Conv(nn.Module):
    """3D convolution, "same" zero padding in all three directions, then optionally a norm."""

    def __init__(self, c_in, c_out, kernel=3, stride=(1, 1), groups=1, bias=True, norm=False):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, (*stride, stride[1]), kernel // 2, groups=groups, bias=bias)
        self.norm = RMSNorm(c_out) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x))


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.main = nn.ModuleDict({"conv1": Conv(channels, channels),
                                   "conv2": Conv(channels, channels, bias=False, norm=True)})

    def forward(self, x):
        return x + self.main["conv2"](F.silu(self.main["conv1"](x)))


class LinearAttention(nn.Module):
    """ReLU linear attention over all positions, in float32 at least. One set of heads sees q, k, v as projected, a
    second set sees them averaged by a depthwise 5x5x5 convolution."""

    def __init__(self, channels, head=32):
        super().__init__()
        self.head = head
        inner = 3 * channels
        self.main = nn.ModuleDict({
            "qkv": Conv(channels, inner, 1, bias=False),
            "aggreg": nn.ModuleList([nn.Sequential(
                nn.Conv3d(inner, inner, 5, padding=2, groups=inner, bias=False),
                nn.Conv3d(inner, inner, 1, groups=inner // head, bias=False))]),
            "proj": Conv(2 * channels, channels, 1, bias=False, norm=True)})

    def forward(self, x):
        qkv = self.main["qkv"](x)
        qkv = torch.cat((qkv, self.main["aggreg"][0](qkv)), 1)
        # The sums over every position overflow half precision.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            exact = qkv if qkv.dtype == torch.float64 else qkv.float()
            q, k, v = exact.flatten(2).unflatten(1, (-1, 3 * self.head)).chunk(3, 2)      # (B, heads, 32, THW)
            q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 0, 0, 1), value=1.0)
            out = (v @ k.transpose(-1, -2)) @ q
            out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
        out = out.to(qkv.dtype).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.main["proj"](out)


class GatedConv(nn.Module):
    """Widen to twice 4x, mix each channel in space and time, gate one half with the other, narrow."""

    def __init__(self, channels):
        super().__init__()
        inner = 4 * channels
        self.main = nn.ModuleDict({"inverted_conv": Conv(channels, 2 * inner, 1),
                                   "depth_conv": Conv(2 * inner, 2 * inner, groups=2 * inner),
                                   "point_conv": Conv(inner, channels, 1, bias=False, norm=True)})

    def forward(self, x):
        value, gate = self.main["depth_conv"](F.silu(self.main["inverted_conv"](x))).chunk(2, 1)
        return x + self.main["point_conv"](value * F.silu(gate))


class EViTBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.context_module, self.local_module = LinearAttention(channels), GatedConv(channels)

    def forward(self, x):
        return self.local_module(self.context_module(x))


def unshuffle(x, time, space):
    """(B, C, T, H, W) -> (B, C·time·space², T/time, H/space, W/space): each cell's positions become channels."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffle(x, time, space):
    """The inverse of `unshuffle`."""
    x = x.unflatten(1, (-1, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)


def average_channels(x, c_out):
    """Shortcut to fewer channels: the mean of each group of neighbours."""
    return x.unflatten(1, (c_out, -1)).mean(2)


class Downsample(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.c_out = stride, c_out
        self.main = Conv(c_in, c_out, stride=stride)

    def forward(self, x):
        return self.main(x) + average_channels(unshuffle(x, *self.stride), self.c_out)


class Upsample(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        time, space = self.stride = stride
        self.repeats = c_out * time * space ** 2 // c_in
        self.main = nn.ModuleDict({"conv": Conv(c_in, c_out)})

    def forward(self, x):
        time, space = self.stride
        nearest = F.interpolate(x, scale_factor=(time, space, space), mode="nearest")
        return self.main["conv"](nearest) + shuffle(x.repeat_interleave(self.repeats, 1), time, space)


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.op_list = nn.Sequential(*blocks)

    def forward(self, x):
        return self.op_list(x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, widths = config, config.widths
        self.project_in = Conv(3 * config.patch ** 2, widths[0])
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.encoder_depths):
            down = [Downsample(*widths[i:i + 2], stride) for stride in config.strides[i:i + 1]]
            self.stages.append(Stage(config.blocks(i, depth) + down))
        self.project_out = nn.ModuleDict({"main": Stage([Conv(widths[-1], config.latent_channels)])})

    def forward(self, video):
        x = self.project_in(unshuffle(video, 1, self.config.patch))
        for stage in self.stages:
            x = stage(x)
        return self.project_out["main"](x) + average_channels(x, self.config.latent_channels)


def run_blocks(x, blocks, *args, **kwargs):
    """Yields ("mid", x), then the name and the output of each block, which is computed when it is asked for."""
    yield "mid", x
    for i, block in enumerate(blocks):
        x = block(x, *args, **kwargs)
        yield f"up{i}", x


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, widths = config, config.widths
        self.project_in = nn.ModuleDict({"main": Conv(config.latent_channels, widths[-1])})
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.decoder_depths):
            up = [Upsample(widths[i + 1], widths[i], stride) for stride in config.strides[i:i + 1]]
            self.stages.append(Stage(up + config.blocks(i, depth)))
        self.project_out = Stage([RMSNorm(widths[0]), nn.ReLU(), Conv(widths[0], 3 * config.patch ** 2)])

    def blocks(self, latents):
        """(name, features) from the latents up: "mid" is project_in, "up0" the last stage, "up1" the one before ..."""
        x = self.project_in["main"](latents) + latents.repeat_interleave(self.config.widths[-1] // latents.shape[1], 1)
        return run_blocks(x, reversed(self.stages))

    def forward(self, latents):
        for _, x in self.blocks(latents):
            pass
        return shuffle(self.project_out(x), 1, self.config.patch)


class VideoDCAE(nn.Module):
    """Video DC-AE: a deterministic autoencoder; `state_dict()` has the released checkpoint's keys."""

    def __init__(self, config):
        super().__init__()
        self.config, self.encoder, self.decoder = config, Encoder(config), Decoder(config)

    def forward(self, video):
        return self.decoder(self.encoder(video))


TINY = VideoDCAEConfig(latent_channels=32, widths=(48, 96, 128), encoder_depths=(1, 1, 0), decoder_depths=(2, 2, 2),
                       strides=((2, 2), (2, 2)), attention_from=3, patch=2)     # no attention: any length, any size


# ----------------------------------------------------------------------------------------------------------
# the interface

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # mean and standard deviation of pixels in [0, 1]


class Teacher(nn.Module):
    """A frozen video VAE.

    `name`, `latent_channels`, `compression` = (d_t, d_h, d_w), and `images`, its students' `drop_first`: True where a
    clip has d_t k + 1 frames, so that a single frame is a clip, else False (d_t k) or h3's 5. A kind of teacher adds
        posterior(video)    (B, 3, T, H, W) in [-1, 1] -> mean and log-variance, each (B, C, t, h, w); None for the
                            latter if the encoder is deterministic. ValueError for a clip that does not fit.
        decode(latents)     (B, C, t, h, w) -> video (B, 3, T, H, W), not clamped
        blocks(latents)     yields (name, features) of the decoder from the latents up
    """

    def __init__(self, name, vae, latent_channels, compression, images):
        super().__init__()
        self.name, self.vae, self.images = name, vae, images
        self.latent_channels, self.compression = latent_channels, compression
        self.frame_step, self.frame_extra = compression[0], int(images)     # a clip has k of the one and the other
        self.fewest = self.smallest = 1             # frames, and height and width of the latents, at least

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def check_clip(self, frames, height, width):
        """Raises ValueError, naming the nearest sizes that fit, unless the clip is one this teacher can encode."""
        _, d_h, d_w = self.compression
        for what, value, step, extra, least in (("frames", frames, self.frame_step, self.frame_extra, self.fewest),
                                                ("height", height, d_h, 0, self.smallest * d_h),
                                                ("width", width, d_w, 0, self.smallest * d_w)):
            if value < least or (value - extra) % step:
                below = (value - extra) // step * step + extra
                nearest = dict.fromkeys(str(max(v, least)) for v in (below, below + step) if v > 0)
                raise ValueError(f"the {self.name} teacher cannot take {what} = {value}: it needs {step}k"
                                 f"{f' + {extra}' if extra else ''}, for example {' or '.join(nearest)}")

    def encode(self, video, sample=True, generator=None):
        """(B, 3, T, H, W) in [-1, 1] -> latents (B, C, t, h, w): a sample of the posterior, or its mean.
        generator: a torch.Generator for the sample's noise, on its own device."""
        mean, logvar = self.posterior(video)
        if logvar is None or not sample:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device)
        return mean + (0.5 * logvar).exp() * noise.to(mean)

    def features(self, latents, blocks=("mid", "up0", "up1")):
        """Outputs of the decoder's named blocks, {name: (B, C, T, H, W)}. Runs no block deeper than the last one
        named. Raises ValueError for a name that this decoder does not have."""
        found, wanted = {}, {blocks} if isinstance(blocks, str) else set(blocks)
        if not wanted:
            return found
        known = []
        for name, x in self.blocks(latents.to(self.dtype)):
            known.append(name)
            if name in wanted:
                found[name] = x
            if len(found) == len(wanted):
                return found
        raise ValueError(f"the {self.name} teacher has no block {sorted(wanted - set(known))}; it has {known}")


def repeat_last(x, n):
    """Appends the last frame of (B, C, T, H, W) n times."""
    return torch.cat([x, *[x[:, :, -1:]] * n], 2)


def temporal_tiles(run, x, tile, out_tile):
    """run(x) for x (B, C, T, H, W), in tiles of `tile` frames that give `out_tile` each. They overlap by a quarter, and
    are blended there."""
    if x.shape[2] <= tile:
        return run(x)
    overlap, pieces = out_tile // 4, []
    for start in range(0, x.shape[2], tile - tile // 4):
        piece = run(x[:, :, start:start + tile])
        if pieces:
            n = min(overlap, piece.shape[2])
            ramp = torch.arange(n, device=x.device, dtype=x.dtype).div(n).view(-1, 1, 1)
            piece = torch.cat([torch.lerp(pieces[-1][:, :, -n:], piece[:, :, :n], ramp), piece[:, :, n:]], 2)
        pieces.append(piece)
    return torch.cat([piece[:, :, :out_tile - overlap] for piece in pieces], 2)


class DCAETeacher(Teacher):
    """Video DC-AE, released (`dc`) or reduced (`tiny`).

    dc encodes and decodes clips of more than 32 frames in temporal tiles, as Open-Sora 2.0's configuration says (tiles
    of 32, overlap 0.25): its attention is over whole clips. tiny has none and takes them whole. Latents are the
    encoder's; Open-Sora's own are these divided by 0.493.
    """

    def __init__(self, name, config):
        super().__init__(name, VideoDCAE(config), config.latent_channels, config.compression, images=False)
        self.tile = 32 if config.attention_from < len(config.widths) else 2 ** 30

    def posterior(self, video):
        self.check_clip(*video.shape[2:])
        return temporal_tiles(self.vae.encoder, video.to(self.dtype), self.tile, self.tile // self.compression[0]), None

    def decode(self, latents):
        return temporal_tiles(self.vae.decoder, latents.to(self.dtype), self.tile // self.compression[0], self.tile)

    def blocks(self, latents):
        return self.vae.decoder.blocks(latents)


class DiffusersTeacher(Teacher):
    """A video VAE of diffusers: `posterior` and `decode` are its own, untiled; subclasses add `blocks`."""

    def __init__(self, name, vae):
        config = vae.config
        time, space = (config.get(f"scale_factor_{way}") or config.get(f"{way}_compression_ratio")
                       or getattr(vae, f"{way}_compression_ratio", None) for way in ("temporal", "spatial"))
        time = time or 2 ** sum(config.temperal_downsample)         # qwen's
        space = space or 2 ** (len(config.block_out_channels) - 1)
        super().__init__(name, vae, config.get("latent_channels") or config.z_dim, (time, space, space), images=True)
        vae.disable_tiling()
        vae.use_framewise_encoding = vae.use_framewise_decoding = False     # Hunyuan's default: tiles of 16 frames

    def posterior(self, video):
        self.check_clip(*video.shape[2:])
        posterior = self.vae.encode(video.to(self.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents):
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0]


class LTXTeacher(DiffusersTeacher):
    """LTX-VAE, LTX-2's and LTX-2.3's, AutoencoderKLLTXVideo and AutoencoderKLLTX2Video. Releases 0.9.1 to 0.9.8 are
    conditioned on the timestep: they decode at 0.05, as their model cards have it, always with the same noise."""
    timestep = 0.05

    def __init__(self, name, vae):
        super().__init__(name, vae)
        config = vae.config
        if "decoder_spatial_padding_mode" in config:        # of each class two encoders, whose latents have one shape
            release = "ltx23 or ltx25" if len(config.decoder_layers_per_block) > 4 else "ltx2"
        else:
            release = "ltx095" if "LTXVideo095DownBlock3D" in config.down_block_types else "ltx"
        if name not in release.split(" or "):
            raise ValueError(f"this VAE is not the {name} teacher's but the {release} teacher's")
        # Reflection needs something to mirror: a second row and column.
        self.smallest = 2 if config.get("decoder_spatial_padding_mode") == "reflect" else 1

    @contextmanager
    def conditioning(self, latents):
        """Yields the decoder's timestep for each clip, or None; inside, the decoder draws the same noise every time."""
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            timestep = None
            if self.vae.config.timestep_conditioning:
                torch.manual_seed(0)
                timestep = latents.new_full((len(latents),), self.timestep)
            yield timestep

    def decode(self, latents):
        latents = latents.to(self.dtype)
        with self.conditioning(latents) as timestep:
            return self.vae.decode(latents, timestep, return_dict=False)[0]

    def blocks(self, latents):
        decoder = self.vae.decoder
        causal = {"causal": decoder.is_causal} if hasattr(decoder, "is_causal") else {}     # LTX-2's
        with self.conditioning(latents) as timestep:
            temb = timestep if timestep is None else timestep * decoder.timestep_scale_multiplier
            x = decoder.mid_block(decoder.conv_in(latents, **causal), temb, **causal)
            yield from run_blocks(x, decoder.up_blocks, temb, **causal)


class LTX25Teacher(LTXTeacher):
    """LTX-2.5: LTX-2.3's encoder with LTX2VideoDiffusionDecoderModel's decoder, which makes video of noise, in one step
    and here of the same for every clip. Its attention needs 7x7 latents and 17 frames at least. Features are those of
    its four stages before the noise: mid, up1 and up2 are on the grids of the student's."""

    def __init__(self, name, vae):
        super().__init__(name, vae)
        self.smallest = max(vae.decoder.det_stages[0][0].attn.kernel_size[1:])
        last = vae.decoder.diff_blocks[0].attn.kernel_size[0]
        self.fewest = -(-(last - 1) // self.frame_step) * self.frame_step + 1

    def decode(self, latents):
        noise = [torch.Generator().manual_seed(0) for _ in latents]
        return self.vae.decoder(latents.to(self.dtype), noise, num_inference_steps=1)

    def blocks(self, latents):
        decoder, rate = self.vae.decoder, 1
        x = decoder.conv_in(repeat_last(latents, decoder.trailing_pad_latent_frames).movedim(1, -1))    # cut off again
        for name, stage, upsample in zip(("mid", "up0", "up1", "up2"), decoder.det_stages, decoder.upsamples):
            stage = () if x.is_meta else stage          # where there is no FlexAttention; shapes stay
            mask = stage and stage[0].attn.build_block_mask(x)
            for block in stage:
                x = block(x, mask)
            yield name, x[:, :rate * (latents.shape[2] - 1) + 1].movedim(-1, 1)
            x, rate = upsample(x), rate * upsample.stride[0]


class H3Teacher(DiffusersTeacher):
    """MiniMax H3's VAE, AutoencoderKLMiniMaxH3: a causal encoder of 17 frames at a time, a ViT as the decoder.

    Clips have 17 k + 5 frames and 5 k + 2 latents: the first of each 5 stands for one frame. The ViT sees 7 latents at
    a time, cross-faded over 5 frames. Video is in [-1, 1] here, in ImageNet's statistics inside. Above 256 pixels a
    side it goes in tiles, blended over 64, as released; whole frames would give other numbers, since each tile has
    attention, norms and positions of its own. Features are the tokens a third and two thirds into the ViT, untiled.
    """
    def __init__(self, name, vae):
        super().__init__(name, vae)
        vae.enable_tiling()
        self.images, self.frame_step = vae.tokens_chunk_size, vae.config.clip_length
        self.frame_extra, self.fewest = vae.frame_overlap, self.frame_step + vae.frame_overlap

    def posterior(self, video):
        mean, std = video.new_tensor(IMAGENET).view(2, 3, 1, 1, 1)
        return super().posterior((video.add(1).div(2) - mean) / std)

    def decode(self, latents):
        if latents.shape[2] < 3:
            raise ValueError(f"the {self.name} teacher cannot decode {latents.shape[2]} latents: it needs 3 at least")
        video = super().decode(latents)
        mean, std = video.new_tensor(IMAGENET).view(2, 3, 1, 1, 1)
        return (video * std + mean).mul(2).sub(1)

    def blocks(self, latents):
        decoder, first, t = self.vae.decoder, self.vae.post_quant_conv, latents.shape[2]
        missing = -(t + self.vae.config.token_drop) % self.images           # decode, too, repeats the last latent
        windows = repeat_last(latents, missing).unfold(2, self.images + self.vae.token_overlap, self.images)
        windows = windows.movedim((2, -1), (1, 3))
        z = first(windows.flatten(0, 1).to(first.weight.dtype))             # (B times windows, C, 7, h, w)
        x = decoder.proj_in(z.flatten(2).transpose(1, 2))
        n, registers = x.shape[1], decoder.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x, registers.to(x.dtype), torch.zeros_like(x[:, :1])], 1)
        axes = [torch.arange(0.5, size, device=x.device) / size * 2 - 1 for size in z.shape[2:]]
        places = torch.cartesian_prod(*axes)
        rotary = decoder.rope(F.pad(places, (0, 0, 0, x.shape[1] - n)).expand(len(x), -1, -1))
        third = len(decoder.transformer_blocks) // 3
        for name, start in (("mid", 0), ("up0", third)):
            for block in decoder.transformer_blocks[start:start + third]:
                x = block(x, rotary)
            tokens = x[:, :n].transpose(1, 2).unflatten(2, z.shape[2:]).unflatten(0, windows.shape[:2])
            own = tokens[:, :, :, :self.images].transpose(1, 2).flatten(2, 3)
            yield name, torch.cat([own, tokens[:, -1, :, self.images:]], 2)[:, :, :t]


class HunyuanTeacher(DiffusersTeacher):
    """HunyuanVideo's VAE, AutoencoderKLHunyuanVideo."""

    def blocks(self, latents):
        decoder = self.vae.decoder
        x = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(latents)))
        return run_blocks(x, decoder.up_blocks)


class Hunyuan15Teacher(DiffusersTeacher):
    """HunyuanVideo 1.5's VAE, AutoencoderKLHunyuanVideo15. A shortcut into mid repeats latent channels. The class's
    attention takes one clip at a time only (its mask has the batch where heads belong), so clips go one by one."""

    def __init__(self, name, vae):
        super().__init__(name, vae)
        vae.enable_slicing()

    def blocks(self, latents):
        decoder = self.vae.decoder
        x = decoder.conv_in(latents) + latents.repeat_interleave(decoder.repeat, 1)
        x = torch.cat([decoder.mid_block(clip) for clip in x.split(1)])
        return run_blocks(x, decoder.up_blocks)


class CogTeacher(DiffusersTeacher):
    """CogVideoX's VAE, AutoencoderKLCogVideoX.

    It decodes latents in chunks, the first of 3 or 2 frames, the others of 2, and group norms see one chunk at a time.
    Here a block runs over all chunks before the next one starts. Each block has a cache of its own, so the numbers are
    those of the other order. Two latent frames that start a clip decode to 8 frames, so clips have 8k + 1 frames.
    """

    def __init__(self, name, vae):
        super().__init__(name, vae)
        self.frame_step = vae.num_latent_frames_batch_size * self.compression[0]

    def blocks(self, latents):
        decoder, n = self.vae.decoder, self.vae.num_latent_frames_batch_size
        first = n + latents.shape[2] % n if latents.shape[2] > 1 else 1
        z = latents.split([first] + (latents.shape[2] - first) // n * [n], 2)
        if self.vae.post_quant_conv is not None:
            z = [self.vae.post_quant_conv(chunk) for chunk in z]

        def over_chunks(module, *inputs):
            cache, outputs = None, []
            for chunk in zip(*inputs):
                output, cache = module(*chunk, conv_cache=cache)
                outputs.append(output)
            return outputs

        of_latents = [None] * len(z), z                 # no timestep; the latents for the norms
        x = over_chunks(decoder.mid_block, over_chunks(decoder.conv_in, z), *of_latents)
        for name, x in run_blocks(x, [partial(over_chunks, block) for block in decoder.up_blocks], *of_latents):
            yield name, torch.cat(x, 2)


class WanTeacher(DiffusersTeacher):
    """Wan 2.1's and 2.2's VAEs, AutoencoderKLWan; and Qwen-Image's, AutoencoderKLQwenImage: Wan 2.1's, its decoder
    trained on for images, one latent frame each.

    It decodes one latent frame at a time, with a cache for each convolution; here, too, one block runs over all frames
    before the next starts. Its decode clamps to [-1, 1].
    """

    def blocks(self, latents):
        decoder = self.vae.decoder
        x, seen = [], None
        for frame in self.vae.post_quant_conv(latents).split(1, 2):
            x.append(decoder.conv_in(frame, seen))
            # A causal 3x3x3 convolution needs two frames from before.
            seen = frame if seen is None else torch.cat([seen[:, :, -1:], frame], 2)

        def over_frames(block, x):
            cache = [None] * len(list(block.modules()))                  # one for each convolution, and more
            asks = "first_chunk" in inspect.signature(block.forward).parameters         # Wan's up blocks
            return [block(frame, feat_cache=cache, feat_idx=[0], **{"first_chunk": j == 0} if asks else {})
                    for j, frame in enumerate(x)]

        x = over_frames(decoder.mid_block, x)
        for name, x in run_blocks(x, [partial(over_frames, block) for block in decoder.up_blocks]):
            yield name, torch.cat(x, 2)


# ----------------------------------------------------------------------------------------------------------
# loading

# name: (kind, class or its name in diffusers or file of weights, hub repository, the weights' licence by its model card)
RELEASES = {
    "ltx": (LTXTeacher, "AutoencoderKLLTXVideo", "Lightricks/LTX-Video", "LTX-Video Open Weights"),
    "hunyuan": (HunyuanTeacher, "AutoencoderKLHunyuanVideo", "hunyuanvideo-community/HunyuanVideo",
                "Tencent Hunyuan Community"),
    "cog": (CogTeacher, "AutoencoderKLCogVideoX", "zai-org/CogVideoX1.5-5B", "CogVideoX"),
    "dc": (DCAETeacher, "F32T4C128_AE.safetensors", "hpcai-tech/Open-Sora-v2-Video-DC-AE", "Apache 2.0"),
    "wan21": (WanTeacher, "AutoencoderKLWan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Apache 2.0"),
    "wan22": (WanTeacher, "AutoencoderKLWan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Apache 2.0"),
    "ltx2": (LTXTeacher, "AutoencoderKLLTX2Video", "Lightricks/LTX-2", "LTX-2 Community"),
    # LTX-2.5's encoder is 2.3's byte for byte, its vae's decoder of the same shape: weights=ltx25's repository
    "ltx23": (LTXTeacher, "AutoencoderKLLTX2Video", "diffusers/LTX-2.3-Diffusers", "LTX-2 Community"),
    "hunyuan15": (Hunyuan15Teacher, "AutoencoderKLHunyuanVideo15",
                  "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", "Tencent Hunyuan Community"),
    "qwen": (WanTeacher, "AutoencoderKLQwenImage", "Qwen/Qwen-Image", "Apache 2.0"),
    "ltx095": (LTXTeacher, "AutoencoderKLLTXVideo", "Lightricks/LTX-Video-0.9.5", "LTX-Video Open Weights"),
    "ltx25": (LTX25Teacher, "LTX2VideoDiffusionDecoderModel", "Lightricks/LTX-2.5-Diffusers", "LTX-2 Community"),
    "h3": (H3Teacher, "AutoencoderKLMiniMaxH3", "MiniMaxAI/MiniMax-H3", "MiniMax H3 Community"),
    "tiny": (DCAETeacher, "model.safetensors", None, "MIT, in this repository"),
}
TEACHERS = tuple(RELEASES)
# where the released configuration is not diffusers' default
CONFIGURATIONS = {
    "wan22": dict(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
                  patch_size=2, scale_factor_spatial=16),
    "ltx2": dict(decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8),
    "ltx23": dict(block_out_channels=(256, 512, 1024, 1024), layers_per_block=(4, 6, 4, 2, 2),
                  decoder_block_out_channels=(256, 512, 512, 1024), decoder_layers_per_block=(4, 6, 4, 2, 2),
                  decoder_spatio_temporal_scaling=(True,) * 4, decoder_inject_noise=(False,) * 5,
                  upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
                  upsample_factor=(2, 2, 1, 2), upsample_residual=(False,) * 4, decoder_causal=False,
                  decoder_spatial_padding_mode="zeros", spatial_compression_ratio=32, temporal_compression_ratio=8),
    "ltx095": dict(block_out_channels=(128, 256, 512, 1024, 2048), decoder_block_out_channels=(256, 512, 1024),
                   layers_per_block=(4, 6, 6, 2, 2), decoder_layers_per_block=(5,) * 4, timestep_conditioning=True,
                   down_block_types=("LTXVideo095DownBlock3D",) * 4, spatio_temporal_scaling=(True,) * 4,
                   downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
                   decoder_spatio_temporal_scaling=(True,) * 3, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
                   spatial_compression_ratio=32, temporal_compression_ratio=8),
}
CONFIGURATIONS["ltx25"] = CONFIGURATIONS["ltx23"]
TINY_WEIGHTS = Path(__file__).resolve().parent / "assets" / "tiny_teacher" / "model.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def load_weights(module, path):
    """Fills `module` from a safetensors file of exactly its keys and shapes, finite values; else ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    index = path.with_name(f"{path.name}.index.json")
    files = shards(index) if index.is_file() else [path]
    try:
        state = {key: tensor for file in files for key, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    ours = module.state_dict()
    bad = [key for key, x in state.items() if not (x.is_floating_point() and x.float().isfinite().all())]
    for problem, keys in (
            ("lacks", ours.keys() - state.keys()),
            ("has besides", state.keys() - ours.keys()),
            ("has with another shape", [k for k in ours.keys() & state.keys() if ours[k].shape != state[k].shape]),
            ("has values that are not finite numbers in", bad)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{path} does not fit this teacher: it {problem} {min(keys)}{more}")
    module.load_state_dict(state)


def load_teacher(name, weights=None, device="cpu", dtype=torch.float32):
    """A frozen teacher in evaluation mode.

    weights: None for the released ones (from the hub, cached; tiny's are in the repository), a .safetensors file, a
             folder (as on the hub, or the pipeline's around it), another hub id ("Lightricks/LTX-Video-0.9.1"), or
             "random" for the right shapes without a download (seeded: every process gets the same).
    Raises ValueError or OSError, one line each, if the name is unknown, or the weights cannot be found, read or fitted.
    """
    if name not in TEACHERS:
        raise ValueError(f"no teacher is called {name!r}; there are {', '.join(TEACHERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)      # the CPU's only: GPUs' generators are not restored
        teacher = build(name, find_weights(name, weights))
    teacher, pinned = teacher.to(device), getattr(teacher.vae, "_keep_in_fp32_modules", None) or ()     # h3's
    for key, p in teacher.named_parameters():
        p.data = p.data.to(torch.float32 if set(pinned) & set(key.split(".")) else dtype)
    return teacher.eval().requires_grad_(False)


def find_weights(name, weights):
    """The file or folder to read, or None for random weights."""
    if weights == "random":
        return None
    if weights is None and name == "tiny":
        return TINY_WEIGHTS
    _, file, repo, _ = RELEASES[name]
    if weights is not None:
        if Path(weights).exists():
            return Path(weights)
        repo = str(weights)
        if name == "tiny" or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)", repo):
            raise FileNotFoundError(f"no teacher weights at {weights}: name a file, a folder or a hub id")
    if name == "dc":
        return from_hub(repo, file)
    for folder in ("diffusion_decoder", "vae")[name != "ltx25":]:
        try:
            from_hub(repo, f"{folder}/{WEIGHTS_FILE}")
        except OSError:
            for file in shards(from_hub(repo, f"{folder}/{WEIGHTS_FILE}.index.json")):
                from_hub(repo, f"{folder}/{file.name}")
        config = from_hub(repo, f"{folder}/config.json")
    return config.parent


def shards(index):
    """The files of weights that an index names, beside it."""
    return sorted({index.with_name(name) for name in json.loads(index.read_text())["weight_map"].values()})


def build(name, path):
    """The teacher with the weights at `path`, or random ones."""
    teacher_of, source, _, _ = RELEASES[name]
    if teacher_of is DCAETeacher:
        teacher = DCAETeacher(name, TINY if name == "tiny" else VideoDCAEConfig())
        if path:
            load_weights(teacher.vae, path / source if path.is_dir() else path)
        return teacher
    try:
        import diffusers
        kind = getattr(diffusers, source) if isinstance(source, str) else source
    except (ImportError, AttributeError):
        raise OSError(f"the {name} teacher needs diffusers with {source}: pip install -U diffusers") from None
    if path and path.is_dir() and not (path / "config.json").is_file():
        path = path / "vae"
    vae = build_part(diffusers.AutoencoderKLLTX2Video if name == "ltx25" else kind, path, CONFIGURATIONS.get(name, {}))
    if name == "ltx25":         # the decoder is in the pipeline's other folder
        vae.decoder = build_part(kind, path and path.parent / "diffusion_decoder", {}).decoder
    return teacher_of(name, vae)


def build_part(kind, path, options):
    """A part of a diffusers pipeline by its folder, by a file of weights and options, or with random weights."""
    if not path or path.is_file():
        part = kind(**options)
    else:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {path}: this is not a diffusers {kind.__name__}")
        config = kind.load_config(path)
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise ValueError(f"{path} holds an {config['_class_name']}, not an {kind.__name__}")
        part, path = kind.from_config(config), path / WEIGHTS_FILE
    if path:
        load_weights(part, path)
    return part


def from_hub(repo, file):
    """Path of a hub repository's file: from the cache if it is there, else downloaded, with the hub's progress bar."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    try:
        try:
            return Path(hf_hub_download(repo, file, local_files_only=True))
        except OSError:                    # not in the cache
            print(f"getting {file} of {repo} from the hub", file=sys.stderr)
        logging.set_verbosity_error()      # or every retry is a line
        return Path(hf_hub_download(repo, file))
    except Exception as error:             # the hub's client raises a dozen kinds, whose messages run over pages
        raise OSError(f"could not get {file} of {repo} from the hub ({type(error).__name__}); "
                      f"download it elsewhere and pass its folder or file as the teacher's weights") from None


# ----------------------------------------------------------------------------------------------------------
# the family

def main():
    parser = argparse.ArgumentParser(description="Print the teachers: parameters, compression, clips, blocks with the "
                                                 "shapes of their outputs, and the licence of their weights.")
    parser.add_argument("--size", type=int, default=256, help="height and width of the clip shown (default 256)")
    size = parser.parse_args().size
    millions = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"
    for name, (_, _, repo, licence) in RELEASES.items():
        with torch.device("meta"), torch.no_grad():     # shapes only: nothing is computed
            teacher = build(name, None)
            d_t, d_h, d_w = teacher.compression
            frames = max(17 if teacher.images else 16, teacher.fewest)
            try:
                latents = teacher.encode(torch.empty(1, 3, frames, size, size), sample=False)
            except ValueError as error:
                parser.error(str(error))
            blocks = [f"{block} {'x'.join(map(str, x.shape[1:]))}" for block, x in teacher.blocks(latents)]
        parts = f"encoder {millions(teacher.vae.encoder)} M, decoder {millions(teacher.vae.decoder)} M parameters"
        print(f"{name}: {parts}; {teacher.latent_channels} latent channels at {d_t}x{d_h}x{d_w}; "
              f"{teacher.frame_step}k{f' + {teacher.frame_extra}' if teacher.images else ''} frames, sizes /{d_h}")
        print(f"    weights: {repo or 'assets/tiny_teacher'}; licence: {licence}")
        print(f"    blocks for {frames}x{size}x{size}: {', '.join(blocks)}")


if __name__ == "__main__":
    main()
