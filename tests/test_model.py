"""The student: the published decoders' numbers, the paper's ablations, checkpoints in and out, what compilers need."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import weakref
import zlib
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from bench import count
from conftest import run_script
from model import (BLOCKS, CONFIGS, PUBLISHED, SHIPPED, Conv3d, SeparableConv3d, TurboVAED, TurboVAEDConfig,
                   decoupled_pixel_shuffle, pixel_shuffle_3d, rms_norm)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "results")]
from family import count_flops                          # noqa: E402
from magihuman import MagiHuman                         # noqa: E402
FIXTURES = Path(__file__).parent / "fixtures"
KEYS = json.loads((FIXTURES / "student_state_dict.json").read_text())
PUBLISHED_NAMES = ("ltx", "dc", "hunyuan", "cog")
# parameters, and GFLOP for each of 17 frames (16 where no first frame is dropped, 1 of an image) of 512x512
FAMILY = {"ltx": (41896023, 47.803), "dc": (45831383, 78.030), "hunyuan": (40687811, 388.076),
          "cog": (40687811, 388.076), "wan21": (20212771, 201.332), "wan22": (100333451, 287.747),
          "ltx2": (93190423, 72.246), "ltx23": (93190423, 72.246), "hunyuan15": (160399371, 387.556),
          "qwen": (20212771, 378.171), "tiny": (583083, 11.855), "ltx095": (41896023, 47.803),
          "ltx25": (93190423, 72.246), "h3": (99835787, 287.448)}
# of configurations that are one network, the first
NETWORKS = list({config: name for name, config in reversed(CONFIGS.items())}.values())

# As small as a student gets with every kind of layer in it: a changed width, both factors of upsampling, the 2D tail.
MICRO = TurboVAEDConfig(latent_channels=3, widths=(8, 8, 12, 8, 16), resnets=(1, 1, 1, 2, 1),
                        up=(None, (2, 2), (1, 2), (2, 1)), patch=2, drop_first=True)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


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


@contextmanager
def one_line(kind, *parts):
    """What stands in it raises `kind` with one line that names all the parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---------- The published decoders.

@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_arithmetic_are_as_the_readme_has_them(name):
    config, (parameters, gigaflop) = CONFIGS[name], FAMILY[name]
    _, d_h, d_w = config.compression
    t = 1 if name == "qwen" else next(t for t in range(1, 18) if config.frames(t) >= 16)
    assert count(on_meta(config)) == parameters
    flops = count_flops(config, (1, config.latent_channels, t, 512 // d_h, 512 // d_w))
    assert round(flops / config.frames(t) / 1e9, 3) == gigaflop
    said = (f"`{name}`", f"{parameters / 1e6:.2f} M", f"{gigaflop:.1f}")
    assert any(all(part in line for part in said) for line in (ROOT / "results" / "README.md").read_text().splitlines())


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_same_keys_shapes_and_numbers_as_the_published_decoder(name):
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


def test_a_decoder_that_others_trained_gives_their_numbers(tmp_path):
    """examples/magihuman.py: a file as they ship it, against what their public code computes, whole and streamed."""
    shapes = json.loads((FIXTURES / "student_magihuman_state_dict.json").read_text())
    with torch.device("meta"):
        full = MagiHuman()
    assert {key: list(v.shape) for key, v in full.state_dict().items()} == shapes["full"]
    assert count(full) == 107122892 and full.streamer().delay == 17
    config = replace(full.config, latent_channels=4, widths=(24, 24, 16, 12, 8))
    state = {f"module.decoder.{key}": v for key, v in golden_weights(json.dumps(shapes["small"])).items()}
    torch.save({"ema_state_dict": state, "step": 340000}, tmp_path / "checkpoint-340000.ckpt")
    student = MagiHuman.from_pretrained(tmp_path / "checkpoint-340000.ckpt", config)
    golden = load_file(FIXTURES / "student_magihuman.safetensors")
    for i in range(2):
        latents, video = golden[f"{i}.latent"], golden[f"{i}.video"]
        torch.testing.assert_close(student(latents), video, atol=1e-5, rtol=0)
        check_streams(student, (1, 5, 9))
    again = MagiHuman.from_pretrained(student.save_pretrained(tmp_path), config)
    assert torch.equal(again(latents), student(latents)) and again.metadata == {"teacher": "wan22"}


def test_a_file_of_before_is_read(tmp_path):
    """Files had two fields more."""
    state, fields = seeded(MICRO).state_dict(), asdict(MICRO)
    save_file(state, tmp_path / "x.safetensors",
              metadata={"config": json.dumps(fields | {"shortcut": "layer", "head": "shuffle"})})
    assert TurboVAED.from_pretrained(tmp_path / "x.safetensors").config == MICRO


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
    video, features = on_meta(config)(latents, return_features=("mid", "up1"))
    assert set(features) == {"mid", "up1"} and video.shape[2] == config.frames(t)


def test_of_every_five_of_h3s_latents_the_first_is_one_frame(tmp_path):
    config, shape = narrow("h3"), lambda t: (1, 4, t, 1, 2)
    for t in range(1, 13):
        video, features = on_meta(config)(torch.empty(shape(t), device="meta"), return_features=True)
        assert video.shape[2] == config.frames(t) == 4 * t - 3 * -(-t // 5)
        assert all(features[b].shape == config.feature_shape(b, shape(t)) for b in BLOCKS)
    model, latents = rough(config), torch.randn(shape(14))
    first = model(latents)[:, :, 17]
    latents[:, :, 5] += 1
    assert not torch.allclose(model(latents)[:, :, 17], first)
    loaded = TurboVAED.from_pretrained(model.save_pretrained(tmp_path)).eval()
    assert loaded.config == config and config.frames(62) == 209
    torch.testing.assert_close(loaded.decode(latents, 4), model(latents), atol=1e-5, rtol=0)



@pytest.mark.parametrize("shape", [(1, 4, 2, 2, 2), (3, 2, 2, 2), (1, 1, 3, 2, 2, 2), (1, 3, 0, 2, 2)])
def test_wrong_latents_get_one_line(shape):
    model = seeded(MICRO)
    for decode in (model, model.decode, model.streamer()):
        with one_line(ValueError, "(B, 3, t, h, w)", str(shape)):
            decode(torch.zeros(shape))
        with one_line(ValueError, "float32", "float16"):
            decode(torch.zeros(1, 3, 1, 2, 2).half())


# ---------- Layers, against slow references written from the paper.

@pytest.mark.parametrize("r_t, r_s", [(2, 2), (1, 2), (2, 1), (3, 2)])
def test_shuffles_move_channels_to_time_and_space(r_t, r_s):
    """Decoupled: channel (C, r_h, r_w, r_t), since time goes first; at once: (C, r_t, r_h, r_w)."""
    C, T, H, W = 3, 2, 2, 3
    x = torch.randn(2, C * r_t * r_s ** 2, T, H, W)
    for shuffle, channel in ((decoupled_pixel_shuffle, lambda c, k, i, j: ((c * r_s + i) * r_s + j) * r_t + k),
                             (pixel_shuffle_3d, lambda c, k, i, j: ((c * r_t + k) * r_s + i) * r_s + j)):
        want = torch.empty(2, C, r_t * T, r_s * H, r_s * W)
        for c, k, i, j in np.ndindex(C, r_t, r_s, r_s):
            want[:, c, k::r_t, i::r_s, j::r_s] = x[:, channel(c, k, i, j)]
        assert torch.equal(shuffle(x, r_t, r_s), want)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_is_unit_over_channels_neither_overflows_nor_drifts(dtype):
    x = (1000 * torch.randn(1, 512, 2, 3, 3)).to(dtype)        # its squares are beyond float16
    normed = rms_norm(x)
    torch.testing.assert_close(normed.float().square().mean(1), torch.ones(1, 2, 3, 3), atol=1e-2, rtol=0)
    assert normed.dtype == dtype and relative_error(normed, rms_norm(x.float())) < 0.01
    assert rms_norm(torch.zeros(1, 8, 1, 1, 1, dtype=dtype)).abs().max() == 0
    torch.testing.assert_close(rms_norm(torch.full((1, 8, 1, 1, 1), 1e-4)), torch.full((1, 8, 1, 1, 1), 0.5 ** 0.5))


# ---------- What the paper ablates, and the configurations a user may write.

@pytest.mark.parametrize("change", [
    *({"kernel": k} for k in (3, 5, 7)),
    *({"upsampling": u} for u in ("decoupled", "pixel_shuffle_3d", "interpolate")),
    *({"separable": s} for s in ((), ("mid",), ("up1",), ("up3",), BLOCKS)),
    {"upsampling": "interpolate", "drop_first": False}, {"drop_first": False},
    {"patch": 1}, {"patch": 4}, {"up": ((2, 2), None, None, (1, 2))}, {"resnets": (1, 0, 1, 1, 2)},
], ids=str)
@torch.enable_grad()
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


def test_separable_deep_blocks_save_parameters_where_the_paper_says():
    """Figure 2: the deeper the block, the more it saves, and mid with up0 save two fifths of the dense decoder."""
    total = lambda *blocks: count(on_meta(replace(CONFIGS["ltx"], separable=blocks)))
    dense = total()
    assert 1 - total("mid", "up0") / dense == pytest.approx(0.4, abs=0.02)
    assert total("up1") < total("up2") < total("up3") < dense


@pytest.mark.parametrize("change, says", [
    ({"patch": 4, "widths": (8, 8, 8, 8, 24)}, ("patch=4", "24")), ({"patch": 3}, ("patch",)),
    ({"separable": ("up4",)}, ("up4",)), ({"kernel": 4}, ("odd", "4")), ({"upsampling": "nearest"}, ("nearest",)),
    ({"widths": (8, 8, 8)}, ("widths", "5")), ({"up": (None, (1, 1), None, None)}, ("at least 1",)),
    ({"up": (None, (2,), None, None)}, ("(time, space)",)), ({"widths": (8, 8, 0, 8, 8)}, ("channels", "(8, 8, 0")),
    ({"latent_channels": 0}, ("channels", "0")), ({"resnets": (1, 1, -1, 1, 1)}, ("resnets", "-1")),
    ({"resnets": (1, 1, 10 ** 9, 1, 1)}, ("resnets",)), ({"kernel": -1}, ("kernel",))])
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change, says):
    with one_line(ValueError, *says):
        replace(MICRO, **change)


@pytest.mark.parametrize("name", TurboVAEDConfig.__dataclass_fields__)
def test_a_file_with_a_configuration_that_cannot_be_is_refused_in_one_line(tmp_path, name):
    state = seeded(MICRO).state_dict()
    for value in ([None], {}, -1, 1.5, None, 10 ** 30, [[1] * 5]):
        fields = json.dumps(asdict(MICRO) | {name: value})
        save_file(state, tmp_path / "x.safetensors", metadata={"config": fields})
        with one_line(ValueError, "x.safetensors"):
            TurboVAED.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d"])
def test_an_untrained_student_upsamples_smoothly(upsampling):
    upsampler = seeded(replace(CONFIGS["dc"], upsampling=upsampling)).up_blocks[1].upsamplers
    video = upsampler(torch.randn(1, 256, 2, 2, 2))
    nearest = F.interpolate(video[:, :, ::2, ::2, ::2], scale_factor=2, mode="nearest")
    torch.testing.assert_close(video, nearest)


@pytest.mark.parametrize("config", [
    CONFIGS["tiny"], replace(CONFIGS["tiny"], kernel=5), replace(CONFIGS["tiny"], upsampling="interpolate"),
    CONFIGS["wan21"], CONFIGS["ltx"]])
def test_an_untrained_student_does_not_blur(config):
    """What a latent changes stays in its own pixels, by and large: 5 to 9 % of it with PyTorch's weights alone."""
    model, latents = seeded(config).eval(), torch.randn(1, config.latent_channels, 1, 5, 5)
    other = latents.clone()
    other[..., 2, 2] += torch.randn(config.latent_channels, 1)
    change = (model(other) - model(latents)).square().mean((0, 1, 2))
    at = F.avg_pool2d(change[None], change.shape[-1] // 5)[0]
    assert at[2, 2] > 0.5 * at.sum()


# ---------- Precision, layout, compilers.

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    """The shipped student's in half precision has 45 dB from itself."""
    model, latents = TurboVAED.from_pretrained(SHIPPED).eval(), torch.randn(1, 32, 3, 8, 8)
    want = model(latents)
    with torch.autocast("cpu", dtype):
        assert relative_error(model(latents), want) < 0.1
    got = model.optimize_for_inference(dtype, compile=False)(latents.to(dtype))
    assert got.dtype == dtype and 10 * torch.log10(4 / (got.float() - want).square().mean()) > 45


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d"])
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


def test_exports_whole_and_within_the_ranks_phones_know():
    model, latents = seeded(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
    program = torch.export.export(model, (latents,))
    torch.testing.assert_close(program.module()(latents), model(latents))
    ranks = [node.meta["val"].ndim for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert ranks and max(ranks) <= 5


def test_compiles_as_one_graph():
    model, latents = seeded(MICRO), torch.randn(1, 3, 2, 2, 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    video, features = compiled(latents, return_features=True)
    torch.testing.assert_close(video, model(latents))
    assert set(features) == set(BLOCKS)


# ---------- Streaming.

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
def test_every_student_streams_what_it_decodes_whole(name):
    check_streams(rough(narrow(name)), range(1, 13))


@pytest.mark.parametrize("upsampling", ["decoupled", "pixel_shuffle_3d", "interpolate"])
@pytest.mark.parametrize("drop_first", [True, False, 2, 5])
def test_every_upsampler_streams(upsampling, drop_first):
    for change in ({}, {"kernel": 1}, {"kernel": 7, "separable": BLOCKS}, {"up": ((3, 2), None, (2, 1), (4, 1))}):
        check_streams(rough(replace(MICRO, upsampling=upsampling, drop_first=drop_first, **change)), range(1, 13), n=1)
    for name in NETWORKS:
        check_streams(rough(narrow(name, upsampling=upsampling, drop_first=drop_first)), (3,), n=1)


def test_one_chunk_is_the_whole_clip_bit_for_bit():
    """float16, since there PyTorch takes the same kernel for any size."""
    model, latents = rough(CONFIGS["tiny"]).half(), torch.randn(2, 32, 12, 2, 2).half()
    whole, stream = model(latents), model.streamer()
    assert torch.equal(torch.cat(list(stream.run(latents, last=True)), dim=2), whole)
    assert torch.equal(torch.cat(list(model.stream(latents.split(1, dim=2))), dim=2), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_streams_in_every_precision_batched_and_channels_last(dtype):
    model, latents = rough(CONFIGS["tiny"]).to(dtype), torch.randn(3, 32, 5, 2, 3, dtype=dtype)
    want = model(latents)
    for twin in (latents, latents.contiguous(memory_format=torch.channels_last_3d)):
        got = torch.cat(list(model.stream(twin.split([2, 1, 2], dim=2))), dim=2)
        assert got.dtype == dtype and relative_error(got, want) < {
            torch.float64: 1e-6, torch.float16: 2e-3}.get(dtype, 2e-2)


def test_a_stream_that_broke_off_does_not_go_on():
    """What its layers keep is no longer of one moment: any frames after that would be wrong."""
    model = rough(MICRO)
    stream, latents = model.streamer(), torch.randn(1, 3, 1, 1, 1)
    for _ in range(stream.delay + 2):
        stream(latents)
    hook = model.up_blocks[2].resnets[0].register_forward_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        stream(latents)
    hook.remove()
    abandoned = model.streamer()
    next(abandoned.run(torch.randn(1, 3, abandoned.delay + 9, 1, 1)))
    for go_on in (lambda: stream(latents), stream.flush, lambda: abandoned(latents)):
        with one_line(ValueError, "interrupted", "begin a new one"):
            go_on()


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


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("hunyuan15", "h3")])     # hunyuan in time
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


def test_h3s_frames_are_as_late_as_said_at_most_and_in_one_of_five_places():
    model, late = rough(narrow("h3", resnets=(0, 0, 1, 0, 1))), []
    for t in range(model.streamer().delay + 1, model.streamer().delay + 6):
        latents, stream = torch.randn(1, 4, t + 1, 1, 1), model.streamer()
        come = sum(stream(x).shape[2] for x in latents[:, :, :t].split(1, dim=2))
        latents[:, :, t:] = torch.nan
        assert come == model(latents)[0, 0, :, 0, 0].isfinite().sum()
        late.append(next(n for n in range(t) if model.config.frames(t - n) <= come))
    assert max(late) == stream.delay


def test_how_late_the_students_are():
    assert {name: on_meta(config).streamer().delay for name, config in CONFIGS.items()} == {
        "ltx": 20, "dc": 41, "hunyuan": 51, "cog": 51, "wan21": 37, "wan22": 52, "ltx2": 28, "ltx23": 28,
        "hunyuan15": 51, "qwen": 37, "tiny": 13, "ltx095": 20, "ltx25": 28, "h3": 54}


@pytest.mark.parametrize("name", ["hunyuan", "h3"])
def test_a_stream_keeps_as_much_after_many_frames_as_after_few(name):
    """And no layer's frames ever become more than a chunk's and those that it looks ahead, the end included."""
    model, most = rough(narrow(name)), {}
    latents, lengths = torch.randn(1, 4, 2, 1, 1), []
    stream = model.streamer()
    for i, (layer, ahead, rate, context) in enumerate(stream.steps):
        def watched(x, context, layer=layer, i=i, room=2 * rate + ahead):
            most[i] = max(most.get(i, 0), x.shape[2] - room)
            return layer(x, context)
        stream.steps[i] = (watched, ahead, rate, context)
    for n in range(90):
        stream(latents)
        lengths.append(sum(x.untyped_storage().nbytes() for *_, context in stream.steps for x in context.kept
                           if torch.is_tensor(x)))             # h3's keep a place in the group besides
    assert lengths[30] == lengths[-1] > 0
    assert stream.flush().shape[2] > 0
    assert len(most) == len(stream.steps) and max(most.values()) <= 0
    assert not any(context.kept for *_, context in stream.steps)


def test_a_stream_says_what_it_cannot_take():
    model, x = seeded(MICRO), torch.zeros(1, 3, 1, 2, 2)
    stream = model.streamer()
    for end in (stream.flush, lambda: list(model.stream([]))):
        with one_line(ValueError, "no latents"):
            end()
    assert stream(x).shape == (1, 3, 0, 16, 16)
    assert stream.latents.untyped_storage().nbytes() == 0       # nothing of the caller's tensor
    for other in (torch.zeros(1, 3, 1, 2, 3), torch.zeros(2, 3, 1, 2, 2)):
        with one_line(ValueError, str(tuple(other.shape))):
            stream(other)
    assert stream.flush().shape[2] == model.config.frames(1)
    for late in (lambda: stream(x), stream.flush):
        with one_line(ValueError, "ended"):
            late()


# ---------- Bounded memory.

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


def test_decoding_in_chunks_is_decoding_whole():
    model, latents = rough(MICRO), torch.randn(2, 3, 7, 2, 3)
    want = model(latents)
    for chunk in (None, 1, 2, 3, 7, 50):
        torch.testing.assert_close(model.decode(latents, chunk=chunk), want, atol=1e-5, rtol=0)


def test_decodes_in_chunks_by_itself_where_a_layer_would_be_large(monkeypatch):
    model, latents, most = seeded(MICRO), torch.randn(1, 3, 9, 2, 2), []
    model.conv_out.register_forward_hook(lambda module, inputs, output: most.append(output.shape[2]))
    model.decode(latents)
    assert most == [model.config.frames(9)]
    monkeypatch.setattr(model_file, "LARGE", 3 * model.largest(1, 2, 2))
    model.decode(latents)
    assert len(most) > 2 and max(most[1:]) <= 3 * 4 + 1


@pytest.mark.parametrize("change", [{}, {"upsampling": "interpolate"}, {"drop_first": 2}])
def test_tiles_are_exact_where_their_halo_covers_what_a_pixel_depends_on(change, recwarn):
    model = rough(replace(SHORT, **change))
    n = 2 * model.reach(1)
    latents = torch.randn(2, 3, 3, n + 5, n + 2)
    want = model(latents)
    for tile in (n + 1, (n + 4, n + 3), (n + 20, n + 1), (n + 5, n + 2)):
        torch.testing.assert_close(model.decode(latents, tile=tile, chunk=1), want, atol=1e-5, rtol=0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"not exact.*above {n}"):
        near = model.decode(latents, tile=n)
    assert 1e-5 < (near - want).abs().max() and relative_error(near, want) < 0.2


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pixel_depends_on_as_many_latents_as_said(name):
    """On no more, or tiles would not be exact, and on no fewer, or they would be larger than they need to be."""
    model = rough(narrow(name))
    reach, d_w = model.reach(1), model.config.compression[2]
    latents = torch.randn(1, 4, 1, 1, 2 * reach + 5)
    latents[..., reach + 2] = torch.nan
    touched = model(latents)[0, 0, 0, 0].isnan().nonzero().flatten()
    assert touched[0] // d_w == 2 and touched[-1] // d_w == 2 * reach + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_121_frames_of_720p_fit_in_8_gb(name):
    model = on_meta(CONFIGS[name]).half()
    t = next(t for t in range(1, 99) if model.config.frames(t) >= 120)
    shape = (-(-size // d) for size, d in zip((720, 1280), model.config.compression[1:]))
    with Live() as live:
        video = model.decode(torch.empty(1, model.config.latent_channels, t, *shape,
                                         dtype=torch.float16, device="meta"))
    assert video.nbytes < live.now + 1 and live.most + sum(p.nbytes for p in model.parameters()) < 8e9


@pytest.mark.parametrize("how, says", [({"chunk": -1}, "from 1 on"), ({"chunk": 0}, "from 1 on"),
                                       ({"tile": (0, 4)}, "from 1 on"), ({"tile": (3,)}, "one or two")])
def test_what_cannot_be_decoded_in_pieces_is_one_line(how, says):
    with one_line(ValueError, says):
        seeded(MICRO).decode(torch.zeros(1, 3, 2, 2, 2), **how)


# ---------- Optimized for inference.

@torch.enable_grad()
def test_without_gradients_no_clip_goes_through_the_slow_convolution():
    def slow(run):          # but for 1x1x1 kernels, which are a matrix product there
        with torch.profiler.profile(record_shapes=True) as profile:
            run()
        return [event for event in profile.events()
                if event.name == "aten::slow_conv3d" and event.input_shapes[1][2] > 1]
    model, latents = rough(CONFIGS["tiny"]), torch.randn(1, 32, 2, 4, 4)
    want = model(latents)           # with gradients: PyTorch's own choice
    with torch.no_grad():
        assert not slow(lambda: model(latents)) and not slow(lambda: list(model.stream([latents])))
        torch.testing.assert_close(model(latents), want, atol=1e-5, rtol=1e-6)
    assert model.optimize_for_inference(compile=False) is model and not any(p.requires_grad for p in model.parameters())
    assert not slow(lambda: model(latents))
    (gradient,) = torch.autograd.grad(model(latents.requires_grad_()).square().mean(), latents)
    assert gradient.abs().sum() > 0


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


def test_a_stream_of_groups_is_compiled_once_for_each_place_in_them(graphs):
    model, chunks = rough(replace(MICRO, resnets=(0,) * 5, drop_first=3)), torch.randn(1, 3, 40, 1, 1).split(1, dim=2)
    want = model(torch.cat(chunks, dim=2))
    got = torch.cat(list(model.optimize_for_inference(compile="default").stream(chunks)), dim=2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert graphs() == 3


def test_copies_of_what_is_optimized_are_compiled_with_weights_of_their_own(graphs):
    model, latents = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))).optimize_for_inference(), torch.randn(1, 3, 2, 2, 2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    stream = copy.deepcopy(model.streamer())
    want = model(latents)
    torch.nn.init.zeros_(model.conv_out.conv.weight)
    assert torch.equal(copied(latents), want) and graphs() == 1       # one graph, its weights are what it is given
    assert copied._compiled_call_impl is not None
    plain = seeded(MICRO)
    plain.compile(fullgraph=True)               # nn.Module's own way
    assert copy.deepcopy(plain)._compiled_call_impl is not None
    torch.testing.assert_close(torch.cat([stream(latents), stream.flush()], dim=2), want, atol=1e-5, rtol=0)
    model.optimize_for_inference(compile=False)(latents[..., :1])
    assert graphs() == 1 and model.compiles is None


def test_more_sizes_than_pytorch_compiles_by_itself(graphs):
    model = rough(replace(MICRO, resnets=(0, 0, 1, 0, 0))).optimize_for_inference()
    for width in range(1, 12):
        assert model(torch.zeros(1, 3, 1, 1, width)).shape[-1] == 8 * width
    assert graphs() == 11


# ---------- Files.

@pytest.mark.parametrize("config", [CONFIGS["tiny"], replace(MICRO, upsampling="pixel_shuffle_3d", kernel=7)],
                         ids=["preset", "own"])
@pytest.mark.parametrize("where", ["run", "some/where/x.safetensors"])
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
    with one_line(ValueError, "student.pth", ".safetensors"):
        seeded(MICRO).save_pretrained(tmp_path / "student.pth")
    file = seeded(MICRO).half().save_pretrained(tmp_path / "X.SAFETENSORS")
    assert {p.dtype for p in TurboVAED.from_pretrained(file).parameters()} == {torch.float32}


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
                                          (".pth", "ema"), (".pth", "prefix"), (".safetensors", "prefix"),
                                          (".bin", "safe")])
def test_plain_state_dicts_are_read(tmp_path, suffix, wrap):
    model = seeded(CONFIGS["tiny"])
    state = {("module.decoder." if wrap == "prefix" else "") + key: v for key, v in model.state_dict().items()}
    if suffix == ".safetensors" or wrap == "safe":
        save_file(state, tmp_path / f"x{suffix}")
    else:
        torch.save({"ema": state, "step": 3} if wrap == "ema" else state, tmp_path / f"x{suffix}")
    loaded = TurboVAED.from_pretrained(tmp_path / f"x{suffix}")
    assert loaded.config == CONFIGS["tiny"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def beside(names, prefix=""):
    return {f"{prefix}{name}": torch.ones(2) for name in names}


@pytest.mark.parametrize("wrap", [
    (lambda s: {f"decoder.{k}": v for k, v in s.items()} | beside(
        ["encoder.conv_in.conv.weight", "encoder.mid_block.x", "latents_mean"])),
    (lambda s: {"ema_state_dict": {f"module.decoder.{k}": v for k, v in s.items()},
                "state_dict": {f"module.decoder.{k}": v + 1 for k, v in s.items()},
                "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3}),
    lambda s: s | beside(["heads.mid.0.weight", "proj.bias"]),
    lambda s: {f"student.{k}": v for k, v in s.items()} | beside(["heads.mid.0.weight"]),
    lambda s: {"params_ema": s, "params": {k: v + 1 for k, v in s.items()}},
    lambda s: {"model": {k: v + 1 for k, v in s.items()}, "EMA": s},
    lambda s: {"optimizer": {"exp_avg": s}, "grads": s, "initial": s, "model": s},
    (lambda s: {"model": s, "optim": {"state": {
        k: {"exp_avg": v, "exp_avg_sq": v, "step": torch.ones(1)} for k, v in s.items()}}}),
    # diffusers' EMAModel: no names
    lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": {"decay": 0.999, "shadow_params": [*s.values()]}},
    (lambda s: {"state_dict": {f"decoder.{k}": v + 1 for k, v in s.items()},        # of a whole VAE
                "ema": [torch.ones(3), *s.values(), torch.ones(4)]}),
], ids=["vae", "wrapper", "heads", "student", "ema", "capitals", "gradients", "fsdp", "list", "list of a VAE"])
def test_the_decoder_is_taken_out_of_what_others_write(tmp_path, wrap, capsys):
    model = seeded(CONFIGS["tiny"])
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    loaded = TurboVAED.from_pretrained(tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert f"{tmp_path / 'x.pth'}: took the decoder's {len(model.state_dict())} of " in capsys.readouterr().err


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.mul_(math.nan), "not finite"), (lambda t: t.index_fill(0, torch.tensor([1]), math.inf), "not finite"),
    (lambda t: t.double().mul(1e300), "not finite"), (lambda t: t.long(), "floating-point")])
def test_weights_that_are_no_finite_numbers_are_refused_by_name(tmp_path, spoil, says):
    state = seeded(CONFIGS["tiny"]).state_dict()
    key = "up_blocks.1.conv_in.norm3.weight"
    state[key] = spoil(state[key].clone())
    torch.save(state, tmp_path / "x.pth")
    with one_line(ValueError, "x.pth", key, says):
        TurboVAED.from_pretrained(tmp_path / "x.pth")


@pytest.mark.parametrize("damage, says", [
    (lambda s: s.pop("conv_out.conv.bias"), ("conv_out.conv.bias is missing",)),
    (lambda s: s.update({"conv_out.gain": torch.ones(1)}), ("conv_out.gain is (1,), should be missing",)),
    (lambda s: s.update({"conv_out.conv.bias": torch.ones(4)}), ("conv_out.conv.bias is (4,), should be (3,)",)),
    (lambda s: [s.pop(key) for key in list(s)[:5]], ("is missing", "5 differences")),
], ids=["missing", "extra", "shape", "many"])
@pytest.mark.parametrize("config", ["tiny", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_that_does_not_fit_says_what(tmp_path, damage, says, config, suffix):
    state = seeded(CONFIGS["tiny"]).state_dict()
    damage(state)
    file = tmp_path / f"x{suffix}"
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    with one_line(ValueError, str(file), '"tiny"', *says):
        TurboVAED.from_pretrained(file, config)


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_says_so(tmp_path, suffix, kept):
    file = seeded(MICRO).save_pretrained(tmp_path / "x.safetensors")
    if suffix == ".pth":
        torch.save(load_file(file), tmp_path / "x.pth")
        file = tmp_path / "x.pth"
    size = file.stat().st_size
    os.truncate(file, kept if isinstance(kept, int) else int(size * kept))
    with one_line(ValueError, str(file), "truncated"):
        TurboVAED.from_pretrained(file)


def test_a_checkpoint_of_another_configuration_says_which(tmp_path):
    """A student trained with the 3D shuffle has the decoupled one's keys and shapes, and would decode to noise."""
    with one_line(ValueError, '"ltx"', 'config="hunyuan"', "conv_in.conv.weight"):
        TurboVAED.from_pretrained(published("hunyuan", tmp_path), config="ltx")
    for config, other, says in ((CONFIGS["tiny"], "dc", ('"tiny"', '"dc"')),
                                (replace(CONFIGS["tiny"], upsampling="pixel_shuffle_3d"), "tiny", ("3d", '"tiny"'))):
        file = seeded(config).save_pretrained(tmp_path)
        with one_line(ValueError, str(file), *says):
            TurboVAED.from_pretrained(file, config=other)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.conv.weight": Payload()}, "x.pth")
    Path("y.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for file in ("x.pth", "y.pth"):
        with one_line(ValueError, file, "it was not unpickled"):       # without PyTorch's advice, which would run it
            TurboVAED.from_pretrained(file)
    assert not Path("executed").exists()


def test_files_that_are_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    save_file({"x": torch.ones(1)}, tmp_path / "config.safetensors", metadata={"config": '{"depth": 3}'})
    state = seeded(CONFIGS["tiny"]).state_dict()
    torch.save({"last": state, "best": state}, tmp_path / "two.pth")
    torch.save({"model": state, "ema": {"shadow_params": list(state.values())[1:]}}, tmp_path / "average.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {}}')
    says = {"two.pth": ("several decoders", "last.", "best."), "pointer.pth": ("Git LFS",),
            "average.pth": ("EMA", "list"), "x.safetensors.index.json": ("index of shards",)}
    for file in tmp_path.iterdir():
        with one_line(ValueError, str(file), *says.get(file.name, ())):
            TurboVAED.from_pretrained(file)


def test_what_is_not_there_is_said_in_one_line_and_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)       # importing it now fails
    for path, config in ((tmp_path / "none.safetensors", None), (tmp_path, "ltx"), ("out/none", None),
                         ("none.pth", "ltx"), ("hustvl/Turbo-VAED", "ltx")):
        with one_line(FileNotFoundError, str(path)):
            TurboVAED.from_pretrained(path, config)
    with one_line(ValueError, "lxt", "ltx", "hunyuan"):
        TurboVAED.from_pretrained(tmp_path, config="lxt")


def test_a_hub_id_fetches_the_published_file(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(repo, name):
        if name == "Turbo-VAED-LTX.pth":
            return str(published("ltx", tmp_path))
        raise ConnectionError("cannot reach the hub\nretried 5 times")
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="ltx").config == CONFIGS["ltx"]
    with one_line(FileNotFoundError, "hustvl/Turbo-VAED", "config=", "ltx"):        # which of the four?
        TurboVAED.from_pretrained("hustvl/Turbo-VAED")
    with one_line(FileNotFoundError, "hustvl/Turbo-VAED", "Turbo-VAED-DC.pth", "cannot reach the hub"):
        TurboVAED.from_pretrained("hustvl/Turbo-VAED", config="dc")


def test_a_student_that_somebody_shares_comes_from_the_hub_or_its_cache(tmp_path, monkeypatch):
    constants, say = pytest.importorskip("huggingface_hub").constants, []
    repo = tmp_path / "models--someone--their-student"
    model = seeded(MICRO)
    model.save_pretrained(repo / "snapshots" / "abc", {"teacher": "wan21"})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = TurboVAED.from_pretrained("someone/their-student")
    assert loaded.config == MICRO and torch.equal(loaded.conv_out.conv.weight, model.conv_out.conv.weight)
    label, loaded = model_file.choose_student("someone/their-student", say=say.append)
    assert (label, loaded.metadata["teacher"], say) == ("someone/their-student", "wan21", [])
    with one_line(FileNotFoundError, "someone/else", "student.safetensors", "config="):
        TurboVAED.from_pretrained("someone/else")


# ---------- A file to carry away.

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


@torch.enable_grad()
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


def test_prints_the_family():
    ran = run_script("results.family", cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in (*CONFIGS, "41.896", "(8, 32, 32)", "47.803"))
    ran = run_script("results.family", "--size", "500", cwd=ROOT)
    assert ran.returncode and "multiple of 32" in ran.stderr and "Traceback" not in ran.stderr
