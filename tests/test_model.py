"""The student: the published decoders' numbers, the paper's ablations, checkpoints in and out, what compilers need."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
import weakref
import zlib
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import (BLOCKS, CONFIGS, PUBLISHED, Context, Conv3d, Resnet, SeparableConv3d, TurboVAED, TurboVAEDConfig,
                   count_flops, count_parameters, decoupled_pixel_shuffle, pixel_shuffle_3d, rms_norm, spans,
                   use_student)

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
KEYS = json.loads((FIXTURES / "student_state_dict.json").read_text())
PUBLISHED_NAMES = ("ltx", "dc", "hunyuan", "cog")
# parameters, and GFLOP for each of 17 frames (16 where no first frame is dropped) of 512x512
FAMILY = {"ltx": (41896023, 47.803), "dc": (45831383, 78.030), "hunyuan": (40687811, 388.076),
          "cog": (40687811, 388.076), "wan21": (20212771, 201.332), "wan22": (100333451, 287.747),
          "ltx2": (93190423, 72.246), "ltx23": (93190423, 72.246), "hunyuan15": (160399371, 387.556),
          "qwen": (20212771, 201.332), "magihuman": (107122892, 898.966), "tiny": (583083, 11.855)}
# of configurations that are one network, the first
NETWORKS = list({config: name for name, config in reversed(CONFIGS.items())}.values())

# As small as a student gets with every kind of layer in it: a changed width, both factors of upsampling, the 2D tail.
MICRO = TurboVAEDConfig(latent_channels=3, widths=(8, 8, 12, 8, 16), resnets=(1, 1, 1, 2, 1),
                        up=(None, (2, 2), (1, 2), (2, 1)), patch=2, drop_first=True)


@lru_cache(maxsize=1)
def golden_weights(keys_and_shapes):
    """Every tensor filled from its own key, by the rule under which the fixtures were computed."""
    weights = {}
    for key, shape in json.loads(keys_and_shapes).items():
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            n = n / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            n = 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
        weights[key] = torch.from_numpy(n.astype(np.float32))
    return weights


def on_meta(config):
    with torch.device("meta"):
        return TurboVAED(config)


def seeded(config, seed=0):
    torch.manual_seed(seed)
    return TurboVAED(config).eval()


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def one_line(error, *parts):
    """The message is one line and names all the parts."""
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---------------------------------------------------------------------------------------------------------------------
# The published decoders.

@pytest.mark.parametrize("name, millions", [("ltx", 41.90), ("dc", 45.83), ("hunyuan", 40.69), ("cog", 40.69)])
def test_parameters_are_as_many_as_published(name, millions):
    parts = count_parameters(on_meta(CONFIGS[name]))
    assert round(sum(parts.values()) / 1e6, 2) == millions
    assert sum(parts.values()) == sum(p.numel() for p in on_meta(CONFIGS[name]).parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_arithmetic_are_as_the_readme_has_them(name):
    config, (parameters, gigaflop) = CONFIGS[name], FAMILY[name]
    _, d_h, d_w = config.compression
    t = next(t for t in range(1, 18) if config.frames(t) >= 16)
    assert sum(count_parameters(on_meta(config)).values()) == parameters
    flops = sum(count_flops(config, (1, config.latent_channels, t, 512 // d_h, 512 // d_w)).values())
    assert round(flops / config.frames(t) / 1e9, 3) == gigaflop
    said = (f"`{name}`", f"{parameters / 1e6:.2f} M", f"{gigaflop:.1f}")
    assert any(all(part in line for part in said) for line in (ROOT / "README.md").read_text().splitlines())


def test_tiny_is_tiny():
    assert sum(count_parameters(on_meta(CONFIGS["tiny"])).values()) < 0.6e6
    assert CONFIGS["tiny"].latent_channels == 32 and CONFIGS["tiny"].compression == (4, 8, 8)


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_keys_and_shapes_are_the_published_checkpoints(name):
    assert {key: list(v.shape) for key, v in on_meta(CONFIGS[name]).state_dict().items()} == KEYS[name]


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
@torch.no_grad()
def test_same_numbers_as_the_published_decoder(name):
    model = on_meta(CONFIGS[name])
    model.load_state_dict(golden_weights(json.dumps(KEYS[name])), assign=True)
    golden = load_file(FIXTURES / f"student_{name}.safetensors")
    cases = sorted({key.split(".")[0] for key in golden})
    assert cases
    for i in cases:
        video, features = model(golden[f"{i}.latent"], return_features=True)
        torch.testing.assert_close(video, golden[f"{i}.video"], atol=1e-4, rtol=0)
        for ours, theirs in (("mid", "mid_block"), ("up0", "up_block_0"), ("up1", "up_block_1")):
            torch.testing.assert_close(features[ours], golden[f"{i}.{theirs}"], atol=1e-4, rtol=0)


def small_magihuman():
    """(the other students' configuration at reduced width, a model with the weights of its golden numbers)."""
    config = replace(CONFIGS["magihuman"], latent_channels=4, widths=(24, 24, 16, 12, 8))
    model = on_meta(config)
    shapes = json.loads((FIXTURES / "student_magihuman_state_dict.json").read_text())["small"]
    model.load_state_dict(golden_weights(json.dumps(shapes)), assign=True)
    return config, model


def test_keys_and_shapes_are_those_of_a_decoder_that_others_trained():
    shapes = json.loads((FIXTURES / "student_magihuman_state_dict.json").read_text())["full"]
    assert {key: list(v.shape) for key, v in on_meta(CONFIGS["magihuman"]).state_dict().items()} == shapes


@torch.no_grad()
def test_a_decoder_that_others_trained_gives_their_numbers(tmp_path, monkeypatch):
    """From a file as they ship it, against what their public code computes, whole and streamed."""
    config, model = small_magihuman()
    monkeypatch.setitem(CONFIGS, "magihuman", config)
    state = {f"module.decoder.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"ema_state_dict": state, "step": 340000}, tmp_path / "checkpoint-340000.ckpt")
    for how in ("magihuman", None):                                     # by name, or by its keys and shapes
        loaded = TurboVAED.from_pretrained(tmp_path / "checkpoint-340000.ckpt", how)
        assert loaded.config == config and loaded.metadata.get("teacher") == (how and "wan22")
    golden = load_file(FIXTURES / "student_magihuman.safetensors")
    for i in range(2):
        latents, video = golden[f"{i}.latent"], golden[f"{i}.video"]
        torch.testing.assert_close(loaded(latents), video, atol=1e-5, rtol=0)
        streamed = torch.cat(list(loaded.stream(latents.split(1, dim=2))), dim=2)
        torch.testing.assert_close(streamed, video, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, compression", [("ltx", (8, 32, 32)), ("dc", (4, 32, 32)), ("hunyuan", (4, 8, 8)),
                                               ("cog", (4, 8, 8)), ("tiny", (4, 8, 8))])
@pytest.mark.parametrize("t", [1, 2, 5])
def test_size_of_the_video_and_of_the_features(name, compression, t):
    config = CONFIGS[name]
    d_t, d_h, d_w = compression
    assert config.compression == compression
    assert config.frames(t) == (d_t * t if name in ("dc", "tiny") else d_t * (t - 1) + 1)
    latents = torch.empty(2, config.latent_channels, t, 2, 3, device="meta")
    video, features = on_meta(config)(latents, return_features=True)
    assert video.shape == (2, 3, config.frames(t), 2 * d_h, 3 * d_w)
    assert tuple(features) == BLOCKS
    assert all(features[b].shape == config.feature_shape(b, latents.shape) for b in BLOCKS)


def test_arithmetic_is_what_the_architecture_costs():
    def teraflop(name, shape):
        return round(sum(count_flops(CONFIGS[name], shape).values()) / 1e12, 3)
    assert teraflop("ltx", (1, 128, 3, 16, 16)) == 0.813        # 17 x 512 x 512
    assert teraflop("dc", (1, 128, 4, 16, 16)) == 1.248
    assert round(teraflop("hunyuan", (1, 16, 5, 64, 64)), 2) == 6.60


def test_only_the_features_asked_for():
    latents = torch.randn(1, 3, 1, 2, 2)
    model = seeded(MICRO)
    video, features = model(latents, return_features=("mid", "up1"))
    assert set(features) == {"mid", "up1"}
    assert torch.equal(video, model(latents))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2, 2), (3, 2, 2, 2), (1, 1, 3, 2, 2, 2)])
def test_wrong_latents_get_one_line(shape):
    with pytest.raises(ValueError) as error:
        seeded(MICRO)(torch.zeros(shape))
    one_line(error, "(B, 3, t, h, w)", str(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Layers, against slow references written from the paper.

@pytest.mark.parametrize("r_t, r_s", [(2, 2), (1, 2), (2, 1), (3, 2)])
def test_decoupled_shuffle_is_time_then_space(r_t, r_s):
    C, T, H, W = 3, 2, 2, 3
    x = torch.randn(2, C * r_s ** 2 * r_t, T, H, W)
    in_time = torch.empty(2, C * r_s ** 2, r_t * T, H, W)
    for c in range(C * r_s ** 2):
        for t in range(T):
            for k in range(r_t):
                in_time[:, c, r_t * t + k] = x[:, c * r_t + k, t]
    want = torch.empty(2, C, r_t * T, r_s * H, r_s * W)
    for c in range(C):
        for h in range(r_s * H):
            for w in range(r_s * W):
                want[:, c, :, h, w] = in_time[:, c * r_s ** 2 + (h % r_s) * r_s + w % r_s, :, h // r_s, w // r_s]
    assert torch.equal(decoupled_pixel_shuffle(x, r_t, r_s), want)


@pytest.mark.parametrize("r_t, r_s", [(2, 2), (1, 2), (2, 1)])
def test_3d_shuffle_moves_channels_to_time_and_space_at_once(r_t, r_s):
    C, T, H, W = 3, 2, 2, 3
    x = torch.randn(2, C * r_t * r_s ** 2, T, H, W)
    want = torch.empty(2, C, r_t * T, r_s * H, r_s * W)
    for c in range(C):
        for t in range(r_t * T):
            for h in range(r_s * H):
                for w in range(r_s * W):
                    channel = ((c * r_t + t % r_t) * r_s + h % r_s) * r_s + w % r_s
                    want[:, c, t, h, w] = x[:, channel, t // r_t, h // r_s, w // r_s]
    assert torch.equal(pixel_shuffle_3d(x, r_t, r_s), want)


def test_shuffles_differ_only_by_a_permutation_of_channels():
    x = torch.randn(1, 16, 2, 2, 2)
    permuted = x.unflatten(1, (2, 2, 2, 2)).permute(0, 1, 4, 2, 3, 5, 6, 7).flatten(1, 4)     # (C,h,w,t) to (C,t,h,w)
    assert torch.equal(decoupled_pixel_shuffle(x, 2, 2), pixel_shuffle_3d(permuted, 2, 2))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("T", [1, 4])
def test_convolutions_repeat_the_end_frames_and_see_black_around_them(kernel, T):
    n = kernel // 2
    x = torch.randn(1, 4, T, 5, 6)
    padded = F.pad(F.pad(x, (0, 0, 0, 0, n, n), mode="replicate"), (n, n, n, n))
    dense, separable = Conv3d(4, 6, kernel), SeparableConv3d(4, 6, kernel)
    torch.testing.assert_close(dense(x), F.conv3d(padded, dense.conv.weight, dense.conv.bias))
    depthwise = F.conv3d(padded, separable.depthwise_conv.weight, separable.depthwise_conv.bias, groups=4)
    torch.testing.assert_close(separable(x), separable.pointwise_conv(depthwise))


def test_rms_norm_is_unit_over_channels_at_any_scale():
    x = torch.randn(2, 32, 2, 3, 4)
    for scale in (1e-2, 1.0, 1e4):
        torch.testing.assert_close(rms_norm(scale * x).square().mean(1), torch.ones(2, 2, 3, 4), atol=1e-3, rtol=0)
    assert rms_norm(torch.zeros(1, 8, 1, 1, 1)).abs().max() == 0
    torch.testing.assert_close(rms_norm(torch.full((1, 8, 1, 1, 1), 1e-4)), torch.full((1, 8, 1, 1, 1), 0.5 ** 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_in_half_precision_neither_overflows_nor_drifts(dtype):
    x = (1000 * torch.randn(1, 512, 2, 3, 3)).to(dtype)        # its squares are beyond float16
    normed = rms_norm(x)
    assert normed.dtype == dtype
    assert relative_error(normed, rms_norm(x.float())) < 0.01
    assert rms_norm(torch.zeros(1, 8, 1, 1, 1, dtype=dtype)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# What the paper ablates, and the configurations a user may write.

@pytest.mark.parametrize("change", [
    *({"kernel": k} for k in (3, 5, 7)),
    *({"upsampling": u} for u in ("decoupled", "pixel_shuffle_3d", "interpolate")),
    *({"separable": s} for s in ((), ("mid",), ("up1",), ("up3",), BLOCKS)),
    {"upsampling": "interpolate", "drop_first": False}, {"drop_first": False},
    {"patch": 1}, {"patch": 4}, {"up": ((2, 2), None, None, (1, 2))}, {"resnets": (1, 0, 1, 1, 2)},
], ids=str)
def test_ablations_decode_to_the_right_size_and_train_every_parameter(change):
    config = replace(MICRO, **change)
    model = seeded(config)
    latents = torch.randn(2, 3, 2, 2, 2)
    video, features = model(latents, return_features=True)
    d_t, d_h, d_w = config.compression
    assert video.shape == (2, 3, config.frames(2), 2 * d_h, 2 * d_w)
    assert all(features[b].shape == config.feature_shape(b, latents.shape) for b in BLOCKS)
    (video - torch.randn_like(video)).square().mean().backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


@pytest.mark.parametrize("block", BLOCKS)
def test_a_separable_block_is_separable_throughout(block):
    prefix = "mid_block." if block == "mid" else f"up_blocks.{block[-1]}."
    for separable in (True, False):
        config = replace(CONFIGS["ltx"], separable=(block,) if separable else tuple(set(BLOCKS) - {block}))
        convs = [key for key, v in on_meta(config).state_dict().items() if key.startswith(prefix) and v.ndim == 5]
        dense = [key for key in convs if key.endswith(".conv.weight") and "shortcut" not in key]
        assert bool(dense) != separable


def test_separable_deep_blocks_save_parameters_where_the_paper_says():
    """Figure 2: the deeper the block, the more it saves, and mid with up0 save two fifths of the dense decoder."""
    total = lambda *blocks: sum(count_parameters(on_meta(replace(CONFIGS["ltx"], separable=blocks))).values())
    dense = total()
    assert 1 - total("mid", "up0") / dense == pytest.approx(0.4, abs=0.02)
    assert total("up1") < total("up2") < total("up3") < dense


def test_interpolation_keeps_the_upsampled_first_frame_single():
    config = replace(MICRO, upsampling="interpolate")
    assert seeded(config)(torch.randn(1, 3, 1, 2, 2)).shape[2] == 1
    assert seeded(config)(torch.randn(1, 3, 3, 2, 2)).shape[2] == 9


@pytest.mark.parametrize("change, says", [
    ({"patch": 4, "widths": (8, 8, 8, 8, 24)}, ("patch 4", "width 24")), ({"patch": 3}, ("patch",)),
    ({"separable": ("up4",)}, ("up4",)), ({"kernel": 4}, ("odd", "4")), ({"upsampling": "nearest"}, ("nearest",)),
    ({"shortcut": "batch"}, ("shortcut", "batch", "rms")), ({"head": 2}, ("head", "name")),
    ({"head": "conv"}, ("unpatchify",)),
    ({"widths": (8, 8, 8)}, ("widths", "5")), ({"up": (None, (1, 1), None, None)}, ("at least",)),
    *[({name: value}, (name,)) for name in TurboVAEDConfig.__dataclass_fields__
      for value in ([None], "", {}, -1, 1.5, None, 10 ** 30, [[1] * 5])],
])
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change, says):
    with pytest.raises(ValueError) as error:
        replace(MICRO, **change)
    one_line(error, *says)


def test_learns():
    model = seeded(CONFIGS["tiny"]).train()
    latents, target = torch.randn(1, 32, 1, 2, 2), F.interpolate(torch.rand(1, 3, 1, 2, 2) * 2 - 1, (4, 16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        losses.append((model(latents) - target).abs().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d"])
@torch.no_grad()
def test_an_untrained_student_upsamples_smoothly(upsampling):
    upsampler = seeded(replace(CONFIGS["dc"], upsampling=upsampling)).up_blocks[1].upsamplers
    video = upsampler(torch.randn(1, 256, 2, 2, 2))
    nearest = F.interpolate(video[:, :, ::2, ::2, ::2], scale_factor=2, mode="nearest")
    torch.testing.assert_close(video, nearest)


@pytest.mark.parametrize("config", [
    CONFIGS["tiny"], replace(CONFIGS["tiny"], kernel=5), replace(CONFIGS["tiny"], upsampling="interpolate"),
    CONFIGS["wan21"], CONFIGS["ltx"]])
@torch.no_grad()
def test_an_untrained_student_does_not_blur(config):
    """What a latent changes stays in its own pixels, by and large: 5 to 9 % of it with PyTorch's weights alone."""
    model, latents = seeded(config).eval(), torch.randn(1, config.latent_channels, 1, 5, 5)
    other = latents.clone()
    other[..., 2, 2] += torch.randn(config.latent_channels, 1)
    change = (model(other) - model(latents)).square().mean((0, 1, 2))
    at = F.avg_pool2d(change[None], change.shape[-1] // 5)[0]
    assert at[2, 2] > 0.5 * at.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Precision, layout, compilers.

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close(dtype):
    model, latents = seeded(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
    want = model(latents)
    with torch.autocast("cpu", dtype):
        assert relative_error(model(latents), want) < 0.1
    got = model.to(dtype)(latents.to(dtype))
    assert got.dtype == dtype and relative_error(got, want) < (0.1 if dtype is torch.bfloat16 else 0.02)


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d"])
@torch.no_grad()
def test_channels_last_is_kept_to_the_end_and_changes_nothing(upsampling):
    model, latents = seeded(replace(CONFIGS["tiny"], upsampling=upsampling)), torch.randn(1, 32, 2, 4, 4)
    want, lost, layout = model(latents), [], torch.channels_last_3d

    def keep_as_gpus_do(name, module, inputs, output):      # PyTorch's CPU convolutions only sometimes keep it
        lost.extend([] if inputs[0].is_contiguous(memory_format=layout) else [name])
        return output.contiguous(memory_format=layout)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv3d) and name != "conv_out.conv":     # three channels: no matter
            module.register_forward_hook(partial(keep_as_gpus_do, name))
    got = model.channels_last()(latents.contiguous(memory_format=layout))
    assert not lost
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_exports_whole_and_within_the_ranks_phones_know():
    model, latents = seeded(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
    program = torch.export.export(model, (latents,))
    torch.testing.assert_close(program.module()(latents), model(latents))
    ranks = [node.meta["val"].ndim for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert ranks and max(ranks) <= 5


@torch.no_grad()
def test_compiles_as_one_graph():
    model, latents = seeded(MICRO), torch.randn(1, 3, 2, 2, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    video, features = compiled(latents, return_features=True)
    torch.testing.assert_close(video, model(latents))
    assert set(features) == set(BLOCKS)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming.

def narrow(name, **change):
    ("The configuration with few channels: "
     """what looks where in time and space stays as it is. Four are left at the last norm:
    over a single one it would be a sign, which jumps.""")
    config = CONFIGS[name]
    few = {w: 6 + 4 * i for i, w in enumerate(sorted(set(config.widths)))} | {config.widths[-1]: 4 * config.patch ** 2}
    return replace(config, widths=[few[w] for w in config.widths], latent_channels=4, **change)


def chunkings(t, n=2):
    """One frame at a time, and `n` ways of a fixed random set."""
    random = np.random.RandomState(t)
    for _ in range(n):
        yield np.diff([0, *np.flatnonzero(random.rand(t - 1) < 0.4) + 1, t]).tolist()
    yield [1] * t


def rough(config):
    """A student whose biases and norms are no longer zeros and ones."""
    model = seeded(config)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p.data, std=0.1)
    return model


def check_streams(model, lengths, atol=1e-5, size=(1, 1), **chunks):
    for t in lengths:
        latents = torch.randn(1, model.config.latent_channels, t, *size)
        whole = model(latents)
        for sizes in chunkings(t, **chunks):
            frames = list(model.stream(latents.split(sizes, dim=2)))
            torch.testing.assert_close(torch.cat(frames, dim=2), whole, atol=atol, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_student_streams_what_it_decodes_whole(name):
    check_streams(rough(narrow(name)), range(1, 13))


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d", "interpolate", "resample"])
@pytest.mark.parametrize("drop_first", [True, False])
@torch.no_grad()
def test_every_upsampler_streams(upsampling, drop_first):
    for change in ({}, {"kernel": 1}, {"kernel": 7, "separable": BLOCKS}, {"up": ((3, 2), None, (2, 1), (4, 1))}):
        check_streams(rough(replace(MICRO, upsampling=upsampling, drop_first=drop_first, **change)), range(1, 13), n=1)
    for name in NETWORKS:
        check_streams(rough(narrow(name, upsampling=upsampling, drop_first=drop_first)), (3,), n=1)


@torch.no_grad()
def test_one_chunk_is_the_whole_clip_bit_for_bit():
    """float16, since there PyTorch takes the same kernel for any size."""
    model, latents = rough(CONFIGS["tiny"]).half(), torch.randn(2, 32, 12, 2, 2).half()
    whole, stream = model(latents), model.streamer()
    assert torch.equal(torch.cat(list(stream.run(latents, last=True)), dim=2), whole)
    assert torch.equal(torch.cat(list(model.stream(latents.split(1, dim=2))), dim=2), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_streams_in_every_precision_batched_and_channels_last(dtype):
    model, latents = rough(CONFIGS["tiny"]).to(dtype), torch.randn(3, 32, 5, 2, 3, dtype=dtype)
    want = model(latents)
    for twin in (latents, latents.contiguous(memory_format=torch.channels_last_3d)):
        got = torch.cat(list(model.stream(twin.split([2, 1, 2], dim=2))), dim=2)
        assert got.dtype == dtype and relative_error(got, want) < {
            torch.float64: 1e-6, torch.float16: 2e-3}.get(dtype, 2e-2)


@torch.no_grad()
def test_a_layer_streams_in_the_layout_of_its_frames():
    layer, context, lost = Resnet(8, 8, Conv3d), Context(last=False), []
    layer.conv2.register_forward_pre_hook(lambda module, inputs: lost.append(inputs[0]))
    x = torch.randn(2, 8, 6, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    layer(x, context)
    assert all(frames.is_contiguous(memory_format=torch.channels_last_3d) for frames in (*context.kept, lost[0]))


@torch.no_grad()
def test_streams_compiled():
    model, latents = rough(MICRO), torch.randn(1, 3, 12, 1, 2)
    want = model(latents)
    for layer in model.layers():
        layer.compile(fullgraph=True, backend="eager", dynamic=False)
    model.out = torch.compile(model.out, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=64):
        got = torch.cat(list(model.stream(latents.split(2, dim=2))), dim=2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["conv_in", "up_blocks.2.resnets.0"])
def test_a_stream_that_broke_off_does_not_go_on(where):
    """What its layers keep is no longer of one moment: any frames after that would be wrong."""
    model, broken = rough(MICRO), [False]

    def fail(*_):
        if broken[0]:
            raise torch.OutOfMemoryError("no memory")
    model.get_submodule(where).register_forward_hook(fail)
    stream, latents = model.streamer(), torch.randn(1, 3, 1, 1, 1)
    for _ in range(stream.delay + 2):
        stream(latents)
    broken[0] = True
    with pytest.raises(torch.OutOfMemoryError):
        stream(latents)
    broken[0] = False
    for go_on in (lambda: stream(latents), stream.flush):
        with pytest.raises(ValueError) as error:
            go_on()
        one_line(error, "interrupted", "begin a new one")
    abandoned = model.streamer()
    next(abandoned.run(torch.randn(1, 3, abandoned.delay + 9, 1, 1)))
    with pytest.raises(ValueError, match="interrupted"):
        abandoned(latents)


def test_a_chunk_that_cannot_be_the_next_changes_nothing():
    model, latents = rough(MICRO), torch.randn(1, 3, 12, 1, 2)
    stream, frames = model.streamer(), []
    for chunk in latents.split(3, dim=2):
        for wrong in (chunk.double(), chunk.half(), chunk[:, :, :0], chunk[0], *([chunk[..., :1]] if frames else [])):
            with pytest.raises(ValueError):
                stream(wrong)
        frames.append(stream(chunk))
    assert torch.equal(torch.cat([*frames, stream.flush()], dim=2),
                       torch.cat(list(model.stream(latents.split(3, dim=2))), dim=2))


def test_a_stream_keeps_nothing_of_the_callers_tensor():
    latents = torch.randn(1, 3, 400, 2, 2)
    stream = rough(MICRO).streamer()
    stream(latents[:, :, :1])
    assert stream.latents.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "hunyuan15"])       # in time it is hunyuan
@torch.no_grad()
def test_frames_come_as_soon_as_they_can_be_known_and_as_late_as_said(name):
    """What latents not yet seen could change is found by making them not-a-number."""
    model = rough(narrow(name))
    stream = model.streamer()
    t = stream.delay + 2
    latents = torch.randn(1, 4, t + 1, 1, 1)
    come = sum(stream(x).shape[2] for x in latents[:, :, :t].split(1, dim=2))
    latents[:, :, t:] = torch.nan
    assert come == model(latents)[0, 0, :, 0, 0].isfinite().sum()
    assert model.config.frames(t - stream.delay) <= come < model.config.frames(t - stream.delay + 1)
    assert come + stream.flush().shape[2] == model.config.frames(t)


def test_how_late_the_students_are():
    assert {name: on_meta(config).streamer().delay for name, config in CONFIGS.items()} == {
        "ltx": 20, "dc": 41, "hunyuan": 51, "cog": 51, "wan21": 37, "wan22": 52, "ltx2": 28, "ltx23": 28,
        "hunyuan15": 51, "qwen": 37, "magihuman": 17, "tiny": 13}


@torch.no_grad()
def test_a_stream_keeps_as_much_after_many_frames_as_after_few():
    """And no layer's frames ever become more than a chunk's and those that it looks ahead, the end included."""
    model, most = rough(narrow("hunyuan")), {}
    latents, lengths = torch.randn(1, 4, 2, 1, 1), []
    stream = model.streamer()
    for i, (layer, ahead, rate, context) in enumerate(stream.steps):
        def watched(x, context, layer=layer, i=i, room=2 * rate + ahead):
            most[i] = max(most.get(i, 0), x.shape[2] - room)
            return layer(x, context)
        stream.steps[i] = (watched, ahead, rate, context)
    for n in range(90):
        stream(latents)
        lengths.append(sum(x.untyped_storage().nbytes() for *_, context in stream.steps for x in context.kept))
    assert lengths[30] == lengths[-1] > 0
    assert stream.flush().shape[2] > 0
    assert len(most) == len(stream.steps) and max(most.values()) <= 0
    assert not any(context.kept for *_, context in stream.steps)


@torch.no_grad()
def test_a_stream_says_what_it_cannot_take():
    model, x = seeded(MICRO), torch.zeros(1, 3, 1, 2, 2)
    for wrong in (torch.zeros(1, 4, 1, 2, 2), x[0], x[:, :, :0]):
        with pytest.raises(ValueError) as error:
            model.streamer()(wrong)
        one_line(error, str(tuple(wrong.shape)))
    stream = model.streamer()
    with pytest.raises(ValueError) as error:
        stream.flush()
    one_line(error, "no latents")
    assert stream(x).shape == (1, 3, 0, 16, 16)
    for other in (torch.zeros(1, 3, 1, 2, 3), torch.zeros(2, 3, 1, 2, 2)):
        with pytest.raises(ValueError) as error:
            stream(other)
        one_line(error, str(tuple(other.shape)))
    assert stream.flush().shape[2] == model.config.frames(1)
    for late in (lambda: stream(x), stream.flush):
        with pytest.raises(ValueError) as error:
            late()
        one_line(error, "ended")
    with pytest.raises(ValueError):
        list(model.stream([]))


def test_a_stream_keeps_no_gradients():
    model = seeded(MICRO)
    assert not any(frames.requires_grad for frames in model.stream([torch.randn(1, 3, 2, 1, 1)]))


# ---------------------------------------------------------------------------------------------------------------------
# Bounded memory.

# Few layers, so that tiles wider than what a pixel depends on stay small.
SHORT = replace(MICRO, resnets=(0, 0, 0, 0, 1), separable=())


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being under it, on any device, meta included."""
    now = most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None:
            storage = out.untyped_storage()
            if all(storage._cdata != x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)):
                weakref.finalize(storage, self.grow, -storage.nbytes())
                self.grow(storage.nbytes())
        return out

    def grow(self, n):
        self.now += n
        self.most = max(self.most, self.now)


@torch.no_grad()
def test_decoding_in_chunks_is_decoding_whole():
    model, latents = rough(MICRO), torch.randn(2, 3, 7, 2, 3)
    want = model(latents)
    for chunk in (None, 1, 2, 3, 7, 50):
        torch.testing.assert_close(model.decode(latents, chunk=chunk), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_decodes_in_chunks_by_itself_where_a_layer_would_be_large(monkeypatch):
    model, latents, most = seeded(MICRO), torch.randn(1, 3, 9, 2, 2), []
    model.conv_out.register_forward_hook(lambda module, inputs, output: most.append(output.shape[2]))
    model.decode(latents)
    assert most == [model.config.frames(9)]
    monkeypatch.setattr(model_file, "LARGE", 3 * model.largest(1, 1, 2, 2))
    model.decode(latents)
    assert len(most) > 2 and max(most[1:]) <= 3 * 4 + 1


@pytest.mark.parametrize("upsampling", ["decoupled", "interpolate"])
@torch.no_grad()
def test_tiles_are_exact_where_their_halo_covers_what_a_pixel_depends_on(upsampling, recwarn):
    model = rough(replace(SHORT, upsampling=upsampling))
    n = 2 * model.reach(1)
    latents = torch.randn(2, 3, 2, n + 5, n + 2)
    want = model(latents)
    for tile in (n + 1, (n + 4, n + 3), (n + 20, n + 1), (n + 5, n + 2)):
        torch.testing.assert_close(model.decode(latents, tile=tile, chunk=1), want, atol=1e-5, rtol=0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"not exact.*above {n}"):
        near = model.decode(latents, tile=n)
    assert 1e-5 < (near - want).abs().max() and relative_error(near, want) < 0.2


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_pixel_depends_on_as_many_latents_as_said(name):
    """On no more, or tiles would not be exact, and on no fewer, or they would be larger than they need to be."""
    model = rough(narrow(name))
    reach, d_w = model.reach(1), model.config.compression[2]
    latents = torch.randn(1, 4, 1, 1, 2 * reach + 5)
    latents[..., reach + 2] = torch.nan
    touched = model(latents)[0, 0, 0, 0].isnan().nonzero().flatten()
    assert touched[0] // d_w == 2 and touched[-1] // d_w == 2 * reach + 2


@pytest.mark.parametrize("n, tile, reach", [
    (20, 30, 4), (20, 20, 4), (20, 19, 4), (20, 9, 4), (21, 8, 4), (5, 1, 4), (9, 3, 7)])
def test_tiles_cover_a_side_once(n, tile, reach):
    tiles = spans(n, tile, reach)
    assert [i for _, kept in tiles for i in range(n)[kept]] == list(range(n))
    for read, kept in tiles:
        assert read.stop - read.start <= tile and 0 <= read.start <= kept.start < kept.stop <= read.stop <= n
        if tile > 2 * reach:
            assert (kept.start - read.start >= min(reach, kept.start)
                    and read.stop - kept.stop >= min(reach, n - kept.stop))


@pytest.mark.parametrize("name", NETWORKS)
def test_121_frames_of_720p_fit_in_8_gb(name):
    model = on_meta(CONFIGS[name]).half()
    t = next(t for t in range(1, 32) if model.config.frames(t) >= 120)
    shape = (-(-size // d) for size, d in zip((720, 1280), model.config.compression[1:]))
    with Live() as live:
        video = model.decode(torch.empty(1, model.config.latent_channels, t, *shape,
                                         dtype=torch.float16, device="meta"))
    assert video.nbytes < live.now + 1 and live.most + sum(p.nbytes for p in model.parameters()) < 8e9


def test_as_much_memory_as_allowed_is_used_and_no_more():
    model = on_meta(CONFIGS["ltx"]).half()
    latents, used = torch.empty(1, 128, 24, 45, 80, dtype=torch.float16, device="meta"), []
    for allowed in (10, 20, 50):
        with Live() as live:
            model.decode(latents, max_memory=allowed)
        used.append(live.most / 1e9 + 0.084)
        assert 0.4 * allowed < used[-1] <= allowed
    assert model.fit(latents, 400) == (24, (45, 80))
    chunk, tile = model.fit(latents, 8)
    assert chunk == 1 and 40 < tile[1] < 80
    with pytest.raises(ValueError) as error:
        model.decode(latents, max_memory=4)
    one_line(error, "at least 4.", "not 4", "stream")
    model, latents = rough(MICRO), torch.randn(1, 3, 5, 2, 3)
    torch.testing.assert_close(model.decode(latents, max_memory=1), model(latents))
    with pytest.raises(ValueError, match="at least"):
        model.decode(torch.zeros(1, 3, 5, 40, 40), max_memory=0.001)      # tiles of 1x1 would be all seam


def test_what_cannot_be_decoded_in_pieces_is_one_line():
    model, latents = seeded(MICRO), torch.zeros(1, 3, 2, 2, 2)
    for wrong, says in (({"chunk": -1}, "from 1 on"), ({"tile": (0, 4)}, "from 1 on"), ({"tile": (3,)}, "one or two"),
                        ({"tile": 2.5}, "one or two"), ({"chunk": 1, "max_memory": 8}, "alone"),
                        ({"chunk": 0, "max_memory": 8}, "alone")):
        with pytest.raises(ValueError) as error:
            model.decode(latents, **wrong)
        one_line(error, says)
    for wrong, says in ((latents[0], "(B, 3, t, h, w)"), (latents[:, :, :0], "(1, 3, 0, 2, 2)"),
                        (latents.half(), "float16")):
        with pytest.raises(ValueError) as error:
            model.decode(wrong)
        one_line(error, says)


# ---------------------------------------------------------------------------------------------------------------------
# Optimized for inference.

@torch.no_grad()
def test_optimized_is_the_same_decoder_without_the_slow_convolution():
    def slow(run):          # but for 1x1x1 kernels, which are a matrix product there
        with torch.profiler.profile(record_shapes=True) as profile:
            run()
        return [event for event in profile.events()
                if event.name == "aten::slow_conv3d" and event.input_shapes[1][2] > 1]
    model, latents = rough(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
    want = model(latents)
    assert slow(lambda: model(latents)) and not slow(lambda: list(model.stream([latents])))
    assert model.optimize_for_inference(compile=False) is model and not any(p.requires_grad for p in model.parameters())
    assert not slow(lambda: model(latents))
    torch.testing.assert_close(model(latents), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_shipped_student_in_half_precision_is_45_db_from_itself(dtype):
    model = TurboVAED.from_pretrained(ROOT / "assets" / "tiny_student.safetensors").eval()
    latents = torch.randn(1, 32, 3, 8, 8)
    want = model(latents)
    got = model.optimize_for_inference(dtype, compile=False)(latents.to(dtype)).float()
    assert 10 * torch.log10(4 / (got - want).square().mean()) > 45


@torch.no_grad()
def test_optimized_compiles_whole_and_decodes_through_it():
    model, latents = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))), torch.randn(1, 3, 2, 2, 2)
    want = model(latents)
    model.optimize_for_inference()
    for _ in range(2):
        torch.testing.assert_close(model.decode(latents), want, atol=1e-5, rtol=0)
    assert model._compiled_call_impl is not None


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs PyTorch has compiled: a function. The graphs run as they are, which is what takes no time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_the_middle_of_a_stream_is_compiled_once_for_all_streams(graphs):
    model, chunks = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))), torch.randn(1, 3, 26, 2, 2).split(3, dim=2)
    want = model(torch.cat(chunks, dim=2))
    assert model.streamer().delay < 15          # so that several chunks are in the middle
    model.optimize_for_inference()
    for _ in range(2):
        torch.testing.assert_close(torch.cat(list(model.stream(chunks)), dim=2), want, atol=1e-5, rtol=0)
    assert graphs() == 1
    odd = torch.randn(1, 3, 4, 2, 2)            # one longer chunk does not end it, and is not compiled itself
    want, got = model(torch.cat([odd, *chunks], dim=2)), torch.cat(list(model.stream([odd, *chunks])), dim=2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert graphs() == 2                        # the other one is of the whole clip


@torch.no_grad()
def test_copies_of_what_is_optimized_are_compiled_with_weights_of_their_own(graphs):
    model, latents = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))).optimize_for_inference(), torch.randn(1, 3, 2, 2, 2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    stream = copy.deepcopy(model.streamer())
    want = model(latents)
    torch.nn.init.zeros_(model.conv_out.conv.weight)
    assert torch.equal(copied(latents), want) and graphs() == 1       # one graph, its weights are what it is given
    assert copied._compiled_call_impl is not None
    torch.testing.assert_close(torch.cat([stream(latents), stream.flush()], dim=2), want, atol=1e-5, rtol=0)
    model.optimize_for_inference(compile=False)(latents[..., :1])
    assert graphs() == 1 and model.compiles is None


@torch.no_grad()
def test_more_sizes_than_pytorch_compiles_by_itself(graphs):
    model = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))).optimize_for_inference()
    for width in range(1, 12):
        assert model(torch.zeros(1, 3, 1, 1, width)).shape[-1] == 8 * width
    assert graphs() == 11


@torch.no_grad()
def test_in_a_pipeline_what_is_optimized_stays_compiled(graphs):
    pipe, _, student = tiny_pipeline("LTX-Video")
    latents = torch.randn(1, 8, 2, 2, 3)
    want = student(latents)
    use_student(pipe, student.optimize_for_inference())
    torch.testing.assert_close(pipe.vae.decode(latents).sample, want, atol=1e-5, rtol=0)
    assert graphs() == 1
    pipe.vae.decode(latents.bfloat16())         # its precision is that of the latents, and no loss
    torch.testing.assert_close(pipe.vae.decode(latents).sample, want, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Files.

@pytest.mark.parametrize("config", [CONFIGS["tiny"], replace(MICRO, upsampling="pixel_shuffle_3d", kernel=7)],
                         ids=["preset", "own"])
@pytest.mark.parametrize("where", ["run", "some/where/x.safetensors"])
@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path, config, where):
    model, latents = seeded(config), torch.randn(1, config.latent_channels, 2, 2, 2)
    file = model.save_pretrained(tmp_path / where, metadata={"teacher": "tiny", "step": "12"})
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [file]
    assert file == tmp_path / where / "student.safetensors" or file == tmp_path / where
    with safe_open(file, "pt") as f:            # other tools recognise it by its header
        about = f.metadata()
    assert json.loads(about["config"]) == json.loads(json.dumps(asdict(config))) and about["teacher"] == "tiny"
    loaded = TurboVAED.from_pretrained(tmp_path / where)
    assert loaded.config == config and loaded.metadata == {"teacher": "tiny", "step": "12"}
    assert torch.equal(loaded(latents), model(latents))
    assert all(p.requires_grad for p in loaded.parameters())


def test_half_precision_files_come_back_in_float32(tmp_path):
    loaded = TurboVAED.from_pretrained(seeded(MICRO).half().save_pretrained(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = seeded(MICRO)
    file = model.save_pretrained(tmp_path)

    def full_disk(path, data):
        with open(path, "wb") as partial:
            partial.write(data[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        seeded(MICRO, seed=1).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(TurboVAED.from_pretrained(file).conv_in.conv.weight, model.conv_in.conv.weight)


def test_others_can_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        assert seeded(MICRO).save_pretrained(tmp_path).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_saving_refuses_the_name_of_another_format(tmp_path):
    with pytest.raises(ValueError) as error:
        seeded(MICRO).save_pretrained(tmp_path / "student.pth")
    one_line(error, "student.pth", ".safetensors")
    assert seeded(MICRO).save_pretrained(tmp_path / "X.SAFETENSORS").is_file()
    with pytest.raises(ValueError) as error:
        seeded(MICRO).save_pretrained(tmp_path, {"step": 5})
    one_line(error, "metadata is text")


def published(name, folder):
    """A file with the keys and shapes of a published checkpoint and ones in it, stored small."""
    state = {key: torch.ones(1, dtype=torch.float16).expand(shape) for key, shape in KEYS[name].items()}
    torch.save(state, folder / PUBLISHED[name])
    return folder / PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_checkpoints_are_read_and_recognised(tmp_path, name):
    file = published(name, tmp_path)
    same_network = CONFIGS["hunyuan" if name == "cog" else name]
    for loaded in (TurboVAED.from_pretrained(file, config=name), TurboVAED.from_pretrained(str(file)),
                   TurboVAED.from_pretrained(tmp_path, config=name)):
        assert loaded.config == same_network
        assert loaded.conv_out.conv.weight.dtype == torch.float32 and (loaded.conv_out.conv.weight == 1).all()


@pytest.mark.parametrize("suffix, wrap", [(".pth", "plain"), (".pt", "plain"), (".safetensors", "plain"),
                                          (".pth", "ema"), (".pth", "prefix"), (".safetensors", "prefix")])
def test_plain_state_dicts_are_read(tmp_path, suffix, wrap):
    model = seeded(CONFIGS["tiny"])
    state = {("module.decoder." if wrap == "prefix" else "") + key: v for key, v in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, tmp_path / "x.safetensors")
    else:
        torch.save({"ema": state, "step": 3} if wrap == "ema" else state, tmp_path / f"x{suffix}")
    loaded = TurboVAED.from_pretrained(tmp_path / f"x{suffix}")
    assert loaded.config == CONFIGS["tiny"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def beside(names, prefix=""):
    return {f"{prefix}{name}": torch.ones(2) for name in names}


@pytest.mark.parametrize("wrap, left_out", [
    (lambda s: {f"decoder.{k}": v for k, v in s.items()} | beside(
        ["encoder.conv_in.conv.weight", "encoder.mid_block.x", "latents_mean"]),
     "encoder, latents_mean"),
    (lambda s: {"ema_state_dict": {f"module.decoder.{k}": v for k, v in s.items()},
                "state_dict": {f"module.decoder.{k}": v + 1 for k, v in s.items()},
                "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3},
     "optimizer.state.0, state_dict.module.decoder"),
    (lambda s: s | beside(["heads.mid.0.weight", "proj.bias"]), "heads, proj"),
    (lambda s: {f"student.{k}": v for k, v in s.items()} | beside(["heads.mid.0.weight"]), "heads"),
    (lambda s: {"params_ema": s, "params": {k: v + 1 for k, v in s.items()}}, "params"),
    (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "EMA": s}, "model"),
    (lambda s: {"optimizer": {"exp_avg": s}, "grads": s, "initial": s, "model": s}, "grads, initial, optimizer"),
    (lambda s: {"model": s, "optim": {"state": {
        k: {"exp_avg": v, "exp_avg_sq": v, "step": torch.ones(1)} for k, v in s.items()}}}, "optim"),
], ids=["vae", "wrapper", "heads", "student", "ema", "capitals", "gradients", "fsdp"])
def test_the_decoder_is_taken_out_of_what_others_write(tmp_path, wrap, left_out, capsys):
    model = seeded(CONFIGS["tiny"])
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    loaded = TurboVAED.from_pretrained(tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert capsys.readouterr().err == f"{tmp_path / 'x.pth'}: left out what is not the decoder: {left_out}\n"


def test_of_several_decoders_none_is_guessed(tmp_path):
    state = seeded(CONFIGS["tiny"]).state_dict()
    torch.save({"last": state, "best": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(tmp_path / "x.pth")
    one_line(error, "x.pth", "several decoders", "last.", "best.")


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.mul_(math.nan), "not finite"), (lambda t: t.index_fill(0, torch.tensor([1]), math.inf), "not finite"),
    (lambda t: t.double().mul(1e300), "not finite"), (lambda t: t.long(), "floating-point"),
    (lambda t: t.to_sparse(), "plain tensor")])
def test_weights_that_are_no_finite_numbers_are_refused_by_name(tmp_path, spoil, says):
    state = seeded(CONFIGS["tiny"]).state_dict()
    key = "up_blocks.1.conv_in.norm3.weight"
    state[key] = spoil(state[key].clone())
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(tmp_path / "x.pth")
    one_line(error, "x.pth", key, says)


@pytest.mark.parametrize("damage, says", [
    (lambda s: s.pop("conv_out.conv.bias"), ("conv_out.conv.bias is missing",)),
    (lambda s: s.update({"conv_out.gain": torch.ones(1)}), ("conv_out.gain is unexpected",)),
    (lambda s: s.update({"conv_out.conv.bias": torch.ones(4)}), ("conv_out.conv.bias is (4,), not (3,)",)),
    (lambda s: [s.pop(key) for key in list(s)[:5]], ("is missing", "and 2 more")),
], ids=["missing", "extra", "shape", "many"])
@pytest.mark.parametrize("config", ["tiny", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_that_does_not_fit_says_what(tmp_path, damage, says, config, suffix):
    state = seeded(CONFIGS["tiny"]).state_dict()
    damage(state)
    file = tmp_path / f"x{suffix}"
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(file, config)
    one_line(error, str(file), '"tiny"', *says)


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_says_so(tmp_path, suffix, kept):
    file = seeded(MICRO).save_pretrained(tmp_path / "x.safetensors")
    if suffix == ".pth":
        torch.save(load_file(file), tmp_path / "x.pth")
        file = tmp_path / "x.pth"
    size = file.stat().st_size
    os.truncate(file, kept if isinstance(kept, int) else int(size * kept))
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(file)
    one_line(error, str(file), "truncated")


def test_a_checkpoint_of_another_configuration_says_which(tmp_path):
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(published("hunyuan", tmp_path), config="ltx")
    one_line(error, '"ltx"', 'config="hunyuan"', "conv_in.conv.weight")
    file = seeded(CONFIGS["tiny"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(file, config="dc")
    one_line(error, str(file), '"tiny"', '"dc"')


def test_same_shapes_under_another_configuration_are_no_match(tmp_path):
    """A student trained with the 3D shuffle has the decoupled one's keys and shapes, and would decode to noise."""
    file = seeded(replace(CONFIGS["tiny"], upsampling="pixel_shuffle_3d")).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(file, config="tiny")
    one_line(error, "pixel_shuffle_3d", '"tiny"')


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.conv.weight": Payload()}, "x.pth")
    Path("y.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for file in ("x.pth", "y.pth"):
        with pytest.raises(ValueError) as error:
            TurboVAED.from_pretrained(file)
        one_line(error, file, "not unpickled")
        assert "weights_only" not in str(error.value)       # PyTorch's advice, which would run it
    assert not Path("executed").exists()


def test_files_that_are_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    save_file({"x": torch.ones(1)}, tmp_path / "config.safetensors", metadata={"config": '{"depth": 3}'})
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError) as error:
            TurboVAED.from_pretrained(file)
        one_line(error, str(file))


def test_what_is_not_there_is_said_in_one_line_and_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)       # importing it now fails
    for path, config in ((tmp_path / "none.safetensors", None), (tmp_path, "ltx"), ("out/none", None),
                         ("none.pth", "ltx"), ("hustvl/Turbo-VAED", "ltx")):
        with pytest.raises(FileNotFoundError) as error:
            TurboVAED.from_pretrained(path, config)
        one_line(error, str(path))
    with pytest.raises(ValueError) as error:
        TurboVAED.from_pretrained(tmp_path, config="lxt")
    one_line(error, "lxt", "ltx", "hunyuan")


def test_a_hub_id_fetches_the_published_file(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(published("ltx", tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="ltx").config == CONFIGS["ltx"]
    assert asked == [("hustvl/Turbo-VAED", "Turbo-VAED-LTX.pth")]
    with pytest.raises(FileNotFoundError) as error:         # which of the four?
        TurboVAED.from_pretrained("hustvl/Turbo-VAED")
    one_line(error, "hustvl/Turbo-VAED", "config=", "ltx")


def test_no_network_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(repo, name):
        raise ConnectionError("cannot reach the hub\nretried 5 times")
    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="dc")
    one_line(error, "hustvl/Turbo-VAED", "Turbo-VAED-DC.pth", "cannot reach the hub")


# ---------------------------------------------------------------------------------------------------------------------
# A file to carry away.

def test_imports_pytorch_safetensors_and_the_standard_library_only(tmp_path):
    """Copied alone into an empty folder, with everything else the project uses made unimportable."""
    (tmp_path / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    barred = ("diffusers", "av", "lpips", "torchvision", "torchmetrics", "huggingface_hub", "transformers",
              "coremltools", "tqdm", "matplotlib", "data", "teachers", "losses")
    code = (f"import sys; sys.modules.update(dict.fromkeys({barred!r}))\n"
            "import torch; from model import CONFIGS, TurboVAED\n"
            "print(TurboVAED(CONFIGS['tiny'])(torch.zeros(1, 32, 1, 1, 1)).shape)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": ""})
    assert ran.returncode == 0, ran.stderr
    assert "[1, 3, 4, 8, 8]" in ran.stdout


def test_prints_the_family():
    ran = subprocess.run([sys.executable, ROOT / "model.py"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in CONFIGS)
    for figure in ("41.896", "45.831", "40.688", "(8, 32, 32)", "47.803"):      # 47.8 GFLOP x 17 frames = 0.813 TFLOP
        assert figure in ran.stdout


def test_a_size_that_does_not_fit_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "--size", "500"])
    with pytest.raises(SystemExit) as exit:
        model_file.main()
    assert exit.value.code != 0 and "multiple of 32" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# In a pipeline.

def tiny_pipeline(name):
    """(a diffusers pipeline of tiny random parts, what to call it with, a student of its VAE's latents)."""
    pytest.importorskip("transformers")
    import diffusers
    torch.manual_seed(0)
    common = dict(num_inference_steps=2, output_type="pt", prompt_embeds=torch.randn(1, 4, 16), num_frames=9,
                  prompt_attention_mask=torch.ones(1, 4, dtype=torch.bool))
    parts = dict(text_encoder=None, tokenizer=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    if name == "LTX-Video":
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)
        vae.latents_mean.normal_(), vae.latents_std.uniform_(0.5, 2)
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=1, caption_channels=16)
        pipe = diffusers.LTXPipeline(vae=vae, transformer=transformer, **parts)
        config = replace(MICRO, latent_channels=8, up=(None, (2, 2), (2, 2), (2, 2)), patch=4,
                         widths=(32, 32, 32, 32, 64))
        return pipe, common | dict(height=64, width=96, guidance_scale=1.0), TurboVAED(config)
    vae = diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
                                              norm_num_groups=4)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))
    pipe = diffusers.HunyuanVideoPipeline(vae=vae, transformer=transformer,
                                          text_encoder_2=None, tokenizer_2=None, **parts)
    config = replace(MICRO, latent_channels=4, up=(None, (2, 2), (2, 2), (1, 2)), patch=1)
    return pipe, common | dict(height=64, width=96, pooled_prompt_embeds=torch.randn(1, 8)), TurboVAED(config)


@pytest.mark.parametrize("name", ["LTX-Video", "HunyuanVideo"])
@torch.no_grad()
def test_a_pipeline_decodes_through_the_student_and_back(name):
    pipe, call, student = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    generate = lambda: pipe(**call, generator=torch.Generator().manual_seed(3)).frames
    given, original = [], pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: given.append(z) or original(z, *args, **kwargs)
    own = generate()
    del pipe.vae.decode

    chunks = []
    student.conv_in.register_forward_hook(lambda module, inputs, output: chunks.append(inputs[0].shape[2]))
    assert use_student(pipe, student) is pipe                   # a copy of it, hook and all
    by_hand = pipe.video_processor.postprocess_video(student(given[0]), output_type="pt")
    for tiling in (False, True):
        pipe.vae.enable_tiling() if tiling else pipe.vae.disable_tiling()
        chunks.clear()
        frames = generate()
        t = given[0].shape[2]
        assert chunks == ([2] + [1] * (t - 2) if tiling else [t])       # the first layer begins when it has two
        assert frames.shape == own.shape == (1, 9, 3, 64, 96)
        torch.testing.assert_close(frames, by_hand, atol=1e-5, rtol=0)
        assert not torch.allclose(frames, own, atol=1e-2)
        torch.testing.assert_close(pipe.vae.decode(given[0]).sample, student(given[0]), atol=1e-5, rtol=0)

    # accelerate's hooks around it, though nothing can move without a GPU
    if name == "LTX-Video":
        pipe.enable_model_cpu_offload(device=torch.device("cpu"))
        assert torch.equal(generate(), frames) and torch.equal(generate(), frames)
        pipe.remove_all_hooks()
    use_student(pipe.vae, None)
    pipe.vae.disable_tiling()
    assert torch.equal(generate(), own)


def test_a_student_of_other_latents_is_refused_in_one_line():
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    with torch.device("meta"):
        ltx = AutoencoderKLLTXVideo()
    hunyuan = on_meta(CONFIGS["hunyuan"])
    hunyuan.metadata["teacher"] = "hunyuan"
    for target, student, parts in (
            (vae, on_meta(CONFIGS["ltx"]), ("128", "AutoencoderKLWan", "16", "(8, 32, 32)", "(4, 8, 8)")),
            (vae, hunyuan, ("hunyuan", "wan21 or wan22")),                             # of the very same shape
            (vae, on_meta(CONFIGS["tiny"]), ("keeps first frames", "8 frames, not 5")),
            (ltx, on_meta(CONFIGS["dc"]), ("AutoencoderKLLTXVideo", "(4, 32, 32), not (8, 32, 32)"))):
        with pytest.raises(ValueError) as error:
            use_student(target, student)
        one_line(error, *parts)
        assert "decode" not in vars(target)
    with pytest.raises(TypeError) as error:
        use_student(object(), on_meta(CONFIGS["ltx"]))
    one_line(error, "object")


def test_what_was_assumed_of_a_student_is_said(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLWan
    vae, student = (AutoencoderKLWan(base_dim=8, num_res_blocks=1),
                    seeded(replace(CONFIGS["wan21"], widths=(8, 8, 8, 8, 8), resnets=(0,) * 5)))
    with pytest.warns(UserWarning, match="does not say whose latents"):
        use_student(vae, student)
    student.metadata["teacher"] = "wan21"
    student = TurboVAED.from_pretrained(student.save_pretrained(tmp_path))             # what a file says is kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_student(vae, student)
    torch.save(student.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError):                                                    # of a size that no preset has
        TurboVAED.from_pretrained(tmp_path / "plain.pth", "wan21")
    for name in ("hunyuan", "cog"):
        assert TurboVAED.from_pretrained(published(name, tmp_path)).metadata["teacher"] == name


def test_a_vae_that_is_not_known_here_is_assumed_to_fit_with_a_warning():
    vae, student = SimpleNamespace(decode=None, config={"latent_channels": 16}), on_meta(CONFIGS["hunyuan"])
    student.metadata["teacher"] = "hunyuan"
    with pytest.warns(UserWarning, match="was made for latents of hunyuan: assumed are those of this SimpleNamespace"):
        use_student(vae, student)


@pytest.mark.parametrize("kind, config, fits, others", [
    ("AutoencoderKLQwenImage", "qwen", ("qwen", "wan21"), ("hunyuan",)),
    ("AutoencoderKLWan", "wan21", ("wan21",), ("qwen", "hunyuan")),
    ("AutoencoderKLHunyuanVideo15", "hunyuan15", ("hunyuan15",), ("wan22",)),
    ("AutoencoderKLLTX2Video", "ltx2", ("ltx2",), ("ltx23",)),
    ("AutoencoderKLLTX2Video", "ltx23", ("ltx23",), ("ltx2", "ltx"))])
def test_a_vae_takes_students_of_its_own_latents_only(kind, config, fits, others):
    """Latents of one shape, and for LTX-2 and 2.3 of one class, from different encoders. Qwen-Image's encoder is Wan
    2.1's, so Wan's students decode its images; a student trained on images has never seen motion."""
    diffusers = pytest.importorskip("diffusers")
    from teachers import CONFIGURATIONS
    with torch.device("meta"):
        vae = getattr(diffusers, kind)(**CONFIGURATIONS.get(config, {}))
    student = on_meta(CONFIGS[config])
    for teacher in fits:
        student.metadata["teacher"] = teacher
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert use_student(vae, student) is vae
    for teacher in others:
        student.metadata["teacher"] = teacher
        with pytest.raises(ValueError, match=f"was made for latents of {teacher}, not {fits[0]}"):
            use_student(vae, student)


def test_a_refusal_leaves_the_student_that_was_there():
    vae, student = small_vae()
    before = vars(use_student(vae, student))["decode"]
    for other in (on_meta(CONFIGS["dc"]), "out/ltx", vae):
        with pytest.raises((ValueError, TypeError)) as error:
            use_student(vae, other)
        assert "\n" not in str(error.value)
    assert vars(vae)["decode"] is before
    use_student(vae, None)
    assert "decode" not in vars(vae)


def test_none_puts_back_what_another_tool_had_put_there():
    vae, student = small_vae()
    vae.decode = theirs = lambda z: z
    use_student(vae, None)
    assert vars(vae)["decode"] is theirs
    use_student(use_student(vae, student), student)
    use_student(vae, None)
    assert vars(vae)["decode"] is theirs


def small_vae(**options):
    """(an LTX VAE of random weights with 8 latent channels, a student of its latents)."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLLTXVideo
    vae = AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                                layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, **options)
    student = seeded(replace(MICRO, latent_channels=8, up=(None, (2, 2), (2, 2), (2, 2)), patch=4,
                             widths=(32, 32, 32, 32, 16)))
    student.metadata["teacher"] = "ltx"
    return vae, student


@torch.no_grad()
def test_the_callers_own_student_keeps_its_precision():
    vae, student = small_vae()
    z = torch.randn(1, 8, 1, 2, 2)
    before = student(z)
    use_student(vae, student).decode(z.bfloat16())
    assert student.conv_in.conv.weight.dtype == torch.float32 and torch.equal(student(z), before)


@pytest.mark.parametrize("how", ["model", "sequential"])
@torch.no_grad()
def test_accelerates_offloading_moves_the_student_as_it_moves_the_vae(how, monkeypatch):
    """Without a GPU: the model that ran before lies on the meta device, so only where it is asked to go can be seen."""
    accelerate = pytest.importorskip("accelerate")
    vae, student = small_vae()
    ran_before, moved, z = torch.nn.Linear(1, 1, device="meta"), [], torch.randn(1, 8, 1, 2, 2)
    expected = student(z)
    monkeypatch.setattr(ran_before, "to", lambda device: moved.append(("before", str(device))))
    if how == "model":
        _, hook = accelerate.cpu_offload_with_hook(torch.nn.Linear(1, 1), "cpu")
        hook.model = ran_before
        accelerate.cpu_offload_with_hook(vae, "cpu", prev_module_hook=hook)
    else:
        accelerate.cpu_offload(vae, "cpu")
    use_student(vae, student)
    to = TurboVAED.to
    monkeypatch.setattr(TurboVAED, "to",
                        lambda self, *where: moved.append(("student", str(where[0]))) or to(self, *where))
    assert torch.equal(vae.decode(z).sample, expected)
    assert moved[0] == ("before", "cpu") if how == "model" else True
    assert moved[-2:] == [("student", "cpu")] * 2       # to the latents, and off


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_offloading_leaves_nothing_on_the_gpu():
    accelerate = pytest.importorskip("accelerate")
    vae, student = small_vae()
    ran_before, hook = accelerate.cpu_offload_with_hook(torch.nn.Linear(1, 1), "cuda")
    ran_before(torch.ones(1, 1))
    held = torch.cuda.memory_allocated()
    accelerate.cpu_offload_with_hook(vae, "cuda", prev_module_hook=hook)
    video = use_student(vae, student).decode(torch.randn(1, 8, 1, 2, 2, device="cuda")).sample
    assert (video.is_cuda and ran_before.weight.device.type == "cpu"
            and torch.cuda.memory_allocated() <= held + video.nbytes)


def test_a_pipeline_that_adds_noise_before_decoding_is_told():
    vae, student = small_vae(timestep_conditioning=True)
    with pytest.warns(UserWarning, match="decode_noise_scale=0.0"):
        use_student(vae, student)


def test_checkpointing_changes_memory_and_not_gradients():
    """What autograd keeps for the backward pass is counted, and every gradient compared."""
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, latents = TurboVAED(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
        model.checkpointing, sizes = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            video, features = model(latents, return_features=("mid",))
        (video.square().mean() + features["mid"].abs().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(sum(sizes))
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.5 * kept[0]
