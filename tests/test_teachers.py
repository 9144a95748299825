("The teachers: the released architecture's numbers, diffusers' own results, features, "
 "and what a user sees go wrong.")

import json
import subprocess
import sys
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import teachers as teachers_file
from data import SyntheticClips
from model import CONFIGS
from teachers import (CONFIGURATIONS, RELEASES, TEACHERS, TINY, TINY_WEIGHTS, DCAETeacher,
                      DiffusersTeacher, VideoDCAE, VideoDCAEConfig, load_teacher, shuffle, temporal_tiles, unshuffle)

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
KEYS = json.loads((FIXTURES / "video_dc_ae_state_dict.json").read_text())
SMALL = VideoDCAEConfig(16, (32, 32, 64, 64, 128, 128), (1, 1, 1, 2, 1, 1), (1, 1, 1, 1, 2, 1))
# diffusers' classes at reduced width; every kind of block, chunking and compression is the released one's
SMALL_DIFFUSERS = {
    "ltx": dict(latent_channels=8, block_out_channels=(8, 16, 16, 16), decoder_block_out_channels=(8, 16, 16, 16),
                layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5),
    "hunyuan": dict(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
    "cog": dict(latent_channels=4, block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4),
    "wan21": dict(base_dim=8, z_dim=4, num_res_blocks=1),
    "wan22": CONFIGURATIONS["wan22"] | dict(base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1),
    "ltx2": CONFIGURATIONS["ltx2"] | dict(latent_channels=8, block_out_channels=(8, 8, 16, 16),
                                          layers_per_block=(1,) * 5, decoder_block_out_channels=(8, 16, 32),
                                          decoder_layers_per_block=(1,) * 4),
    "ltx23": CONFIGURATIONS["ltx23"] | dict(latent_channels=8, block_out_channels=(8, 8, 16, 16),
                                            layers_per_block=(1,) * 5, decoder_block_out_channels=(8, 16, 16, 32),
                                            decoder_layers_per_block=(1,) * 5),
    "hunyuan15": dict(latent_channels=4, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1),
    "qwen": dict(base_dim=8, z_dim=4, num_res_blocks=1),
}
SMALL_DIFFUSERS["ltx095"] = CONFIGURATIONS["ltx095"] | dict(
    latent_channels=8, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=(1,) * 5, timestep_conditioning=False,
    decoder_block_out_channels=(8, 16, 32), decoder_layers_per_block=(1,) * 4)
SMALL_DIFFUSERS["ltx 0.9.1"] = SMALL_DIFFUSERS["ltx"] | dict(
    decoder_block_out_channels=(8, 16, 32), decoder_layers_per_block=(1,) * 4,
    decoder_spatio_temporal_scaling=(True,) * 3, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
    timestep_conditioning=True, decoder_inject_noise=(True,) * 4)


SMALL_H3 = dict(latent_channels=4, block_out_channels=(8,) * 6, layers_per_block=1, norm_num_groups=4,
                decoder_num_layers=3, decoder_num_attention_heads=2, decoder_attention_head_dim=16, decoder_ffn_mult=2,
                decoder_num_register_tokens=2)
SMALL_DIFFUSION = dict(latent_channels=8, decoder_head_dim=16, decoder_stage_channels=(128, 64, 32, 32, 16),
                       decoder_stage_depths=(2, 1, 1, 1, 1), decoder_stage_kernels=((3, 1, 1),) * 3 + ((3, 3, 3),),
                       decoder_stage5_kernel=(11, 3, 3), decoder_t_emb_dim=32)


def golden_weights(shapes):
    """Every tensor filled from its own key, by the rule under which the fixtures were computed."""
    weights = {}
    for key, shape in shapes.items():
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            n = n / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            n = 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
        weights[key] = torch.from_numpy(n.astype(np.float32))
    return weights


def frozen(teacher):
    return teacher.eval().requires_grad_(False)


@lru_cache
def dc():
    """A narrow one of dc's depth in stages and compression, with the fixtures' weights."""
    teacher = DCAETeacher("dc", SMALL)
    teacher.vae.load_state_dict(golden_weights(KEYS["small"]))
    return frozen(teacher)


def small_vae(name, **changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kind = getattr(diffusers, RELEASES[name.split()[0]][1])
    return kind(**(SMALL_H3 if name == "h3" else SMALL_DIFFUSERS[name]) | changes)


def diffusion_decoder():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.LTX2VideoDiffusionDecoderModel(**SMALL_DIFFUSION).eval()


@lru_cache
def of_diffusers(name):
    vae = small_vae(name)
    for key, p in vae.named_parameters():
        if key.endswith("per_channel_scale1") or key.endswith("per_channel_scale2"):
            torch.nn.init.constant_(p, 0.5)         # zero to begin with, and then injected noise changes nothing
    return frozen(RELEASES[name.split()[0]][0](name.split()[0], vae))


@lru_cache
def h3():
    vae = small_vae("h3")
    for key, p in vae.decoder.named_parameters():
        if "scale" in key or "register" in key:
            torch.nn.init.normal_(p)                    # zero to begin with, and then no block does anything
    return frozen(RELEASES["h3"][0]("h3", vae))


@lru_cache
def ltx25():
    vae = small_vae("ltx23")
    vae.decoder = diffusion_decoder().decoder
    return frozen(RELEASES["ltx25"][0]("ltx25", vae))


@lru_cache
def tiny():
    return load_teacher("tiny")


OTHERS = {"h3": h3, "ltx25": ltx25}     # whose decoders have no mid_block and up_blocks
KINDS = {"dc": dc, "tiny": tiny} | {name: partial(of_diffusers, name) for name in SMALL_DIFFUSERS}
ltx = KINDS["ltx"]
LATENTS = {"dc": (1, 16, 1, 1, 2), "tiny": (1, 32, 1, 2, 3), "ltx": (1, 8, 2, 1, 2), "ltx 0.9.1": (2, 8, 2, 1, 2),
           "hunyuan": (1, 4, 5, 2, 3), "cog": (2, 4, 5, 2, 3), "wan21": (1, 4, 3, 2, 3), "wan22": (2, 4, 3, 1, 2),
           "ltx2": (1, 8, 2, 2, 2), "ltx23": (1, 8, 2, 2, 1), "hunyuan15": (1, 4, 3, 1, 2), "qwen": (2, 4, 3, 2, 3),
           "ltx095": (1, 8, 2, 1, 2)}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def one_line(*parts, kind=ValueError):
    """What is in it raises such an error, whose message is one line and names all the parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---------------------------------------------------------------------------------------------------------------------
# Video DC-AE.

@pytest.mark.parametrize("name, config", [("full", VideoDCAEConfig()), ("small", SMALL)])
def test_keys_and_shapes_are_the_released_checkpoints(name, config):
    with torch.device("meta"):
        vae = VideoDCAE(config)
    assert {key: list(v.shape) for key, v in vae.state_dict().items()} == KEYS[name]


@torch.no_grad()
def test_same_numbers_as_the_released_code():
    golden, teacher = load_file(FIXTURES / "video_dc_ae_small.safetensors"), dc()
    close = lambda ours, theirs: torch.testing.assert_close(ours, golden[f"0.{theirs}"], atol=1e-4, rtol=0)
    close(teacher.encode(golden["0.video"]), "latent")
    close(teacher.decode(golden["0.latent"]), "reconstruction")
    features = teacher.features(golden["0.latent"], ("mid", "up0", "up1"))
    for name, theirs in (("mid", "project_in"), ("up0", "stage5"), ("up1", "stage4")):
        close(features[name], theirs)


@pytest.mark.parametrize("time, space", [(1, 4), (2, 1), (2, 2), (1, 1)])
def test_shuffle_and_unshuffle_are_inverses(time, space):
    x = noise(2, 3, 4, 8, 12)
    cells = unshuffle(x, time, space)
    assert cells.shape == (2, 3 * time * space ** 2, 4 // time, 8 // space, 12 // space)
    assert torch.equal(shuffle(cells, time, space), x)
    # a cell's positions lie side by side in the channels, time before height before width
    cell = x[1, 2, -time:, -space:, -space:]
    assert torch.equal(cells[1, 2 * time * space ** 2:, -1, -1, -1], cell.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# The interface.

@pytest.mark.parametrize("name, compression, channels, images",
                         [("dc", (4, 32, 32), 16, False), ("tiny", (4, 8, 8), 32, False), ("ltx", (8, 32, 32), 8, True),
                          ("hunyuan", (4, 8, 8), 4, True), ("cog", (4, 8, 8), 4, True), ("wan21", (4, 8, 8), 4, True),
                          ("wan22", (4, 16, 16), 4, True), ("ltx2", (8, 32, 32), 8, True),
                          ("ltx23", (8, 32, 32), 8, True),
                          ("hunyuan15", (4, 16, 16), 4, True), ("qwen", (4, 8, 8), 4, True)])
@torch.no_grad()
def test_says_what_its_latents_are(name, compression, channels, images):
    teacher, (d_t, d_h, d_w) = KINDS[name](), compression
    assert (teacher.name, teacher.compression, teacher.latent_channels, teacher.images) == \
        (name, compression, channels, images)
    video = noise(1, 3, (8 if name == "cog" else d_t) + images, 2 * d_h, 3 * d_w).clamp(-1, 1)
    latents = teacher.encode(video)
    assert latents.shape == (1, channels, 1 + images * (2 if name == "cog" else 1), 2, 3)
    assert teacher.decode(latents).shape == video.shape


@pytest.mark.parametrize("name, clip, says", [
    ("dc", (17, 64, 64), ("dc", "frames = 17", "4k", "16 or 20")), ("dc", (16, 48, 64), ("height = 48", "32 or 64")),
    ("dc", (2, 64, 64), ("frames = 2", "example 4")), ("dc", (0, 64, 64), ("frames = 0", "4")),
    ("tiny", (17, 64, 64), ("tiny", "frames = 17", "16 or 20")), ("tiny", (8, 64, 63), ("width = 63", "56 or 64")),
    ("ltx", (16, 64, 64), ("ltx", "frames = 16", "8k + 1", "9 or 17")),
    ("ltx", (17, 64, 70), ("width = 70", "64 or 96")),
    ("cog", (13, 64, 64), ("frames = 13", "8k + 1", "9 or 17")), ("ltx2", (9, 32, 64), ("height = 32", "example 64")),
    ("wan22", (13, 64, 72), ("width = 72", "64 or 80")), ("ltx23", (9, 40, 64), ("ltx23", "height = 40", "32 or 64")),
    ("hunyuan15", (4, 64, 64), ("hunyuan15", "frames = 4", "4k + 1", "1 or 5")),
    ("qwen", (1, 64, 60), ("qwen", "width = 60", "56 or 64")),
    ("h3", (23, 64, 64), ("h3", "frames = 23", "17k + 5", "22 or 39")), ("h3", (22, 40, 32), ("height = 40",)),
    ("h3", (5, 32, 32), ("frames = 5", "example 22")), ("ltx25", (9, 32, 32), ("ltx25", "8k + 1", "example 17")),
    ("ltx", (0, 64, 64), ("frames = 0", "example 1")), ("ltx", (9, 20, 64), ("height = 20", "example 32")),
])
def test_a_clip_that_does_not_fit_gets_the_nearest_that_do(name, clip, says):
    teacher = (KINDS | OTHERS)[name]()
    with one_line(*says):
        teacher.check_clip(*clip)
    with one_line(*says):
        teacher.encode(torch.zeros(1, 3, *clip))


def test_a_clip_that_fits_passes():
    for name, clip in (("dc", (4, 32, 64)), ("tiny", (20, 8, 64)), ("ltx", (1, 32, 32)), ("ltx", (17, 64, 32))):
        KINDS[name]().check_clip(*clip)


@pytest.mark.parametrize("name", SMALL_DIFFUSERS)
@pytest.mark.parametrize("frames", [1, 9, 17])
@torch.no_grad()
def test_encodes_and_decodes_as_diffusers_does(name, frames):
    teacher, vae = KINDS[name](), small_vae(name).eval()
    vae.load_state_dict(teacher.vae.state_dict())
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    vae.use_slicing = name == "hunyuan15"       # its attention fails on batches
    video = noise(2, 3, frames, 64, 64).clamp(-1, 1)
    want = vae.encode(video).latent_dist
    mean, logvar = teacher.posterior(video)
    assert torch.equal(mean, want.mean) and torch.equal(logvar, want.logvar)
    assert torch.equal(teacher.encode(video, sample=False), want.mean)
    state = torch.get_rng_state()
    decoded = teacher.decode(mean)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(decoded, teacher.decode(mean))
    if name == "ltx 0.9.1":
        torch.manual_seed(0)                    # the noise that its decoder injects
        assert torch.equal(decoded, vae.decode(mean, torch.full((2,), 0.05)).sample)
    else:
        assert torch.equal(decoded, vae.decode(mean).sample)
    draw = lambda: torch.Generator().manual_seed(7)
    torch.testing.assert_close(teacher.encode(video, generator=draw()), want.sample(draw()))


# (parameters of the encoder, of the decoder), (latent channels, compression, whether a single frame is a clip)
BUILT = {
    "ltx": ((180404353, 238789296), (128, (8, 32, 32), True)),
    "hunyuan": ((100341408, 146136067), (16, (4, 8, 8), True)),
    "cog": ((92215456, 123368451), (16, (4, 8, 8), True)),
    "dc": ((220439936, 239022211), (128, (4, 32, 32), False)),
    "wan21": ((53595872, 73295331), (16, (4, 8, 8), True)),
    "wan22": ((149627776, 555049228), (48, (4, 16, 16), True)),
    "ltx2": ((694098881, 528380720), (128, (8, 32, 32), True)),
    "ltx23": ((318936897, 407169072), (128, (8, 32, 32), True)),
    "hunyuan15": ((389324544, 871309571), (32, (4, 16, 16), True)),
    "qwen": ((53595872, 73295331), (16, (4, 8, 8), True)),
    "ltx095": ((694098881, 552814641), (128, (8, 32, 32), True)),
    "ltx25": ((318936897, 417133616), (128, (8, 32, 32), True)),
    "h3": ((180335536, 2423530496), (24, (4, 16, 16), 5)),
    "tiny": ((1205152, 3597980), (32, (4, 8, 8), False)),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_is_as_large_as_released_and_has_a_student_of_its_latents(name):
    with torch.device("meta"):
        teacher = teachers_file.build(name, None)
    vae, config = teacher.vae, CONFIGS[name]
    parameters = tuple(sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder))
    latents = teacher.latent_channels, tuple(teacher.compression), teacher.images
    assert (parameters, latents) == BUILT[name]
    assert (config.latent_channels, config.compression, config.drop_first) == latents


@pytest.mark.parametrize("frames", [32, 36, 40, 56, 100])
@torch.no_grad()
def test_long_dc_clips_are_tiled_in_time(frames):
    ("Latents and frames as many as they should be, those before the first overlap exact, "
     "a still video without seams.")
    teacher, video = dc(), noise(1, 3, frames, 32, 32).clamp(-1, 1)
    latents = teacher.encode(video)
    assert latents.shape == (1, 16, frames // 4, 1, 1)
    assert torch.equal(latents[:, :, :6], teacher.vae.encoder(video[:, :, :32])[:, :, :6])
    decoded = teacher.decode(latents)
    assert decoded.shape == video.shape
    assert torch.equal(decoded[:, :, :24], teacher.vae.decoder(latents[:, :, :8])[:, :, :24])
    ramp = torch.arange(float(frames)).view(1, 1, -1, 1, 1)
    torch.testing.assert_close(temporal_tiles(lambda x: x[:, :, ::4], ramp, 32, 8), ramp[:, :, ::4])
    torch.testing.assert_close(temporal_tiles(lambda x: x.repeat_interleave(4, 2), ramp, 8, 32),
                               ramp.repeat_interleave(4, 2))


@torch.no_grad()
def test_a_sample_is_spread_as_the_posterior_says(monkeypatch):
    teacher, video = ltx(), noise(1, 3, 1, 32, 32).clamp(-1, 1)
    mean, logvar = teacher.posterior(video)
    monkeypatch.setattr(teacher, "posterior", lambda video: (mean, torch.full_like(logvar, 2 * np.log(0.1))))
    samples = torch.stack([teacher.encode(video) for _ in range(500)])
    assert (samples - mean).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("name", ["dc", "tiny"])
@torch.no_grad()
def test_a_deterministic_encoder_has_no_variance(name):
    teacher = KINDS[name]()
    video = noise(1, 3, 4, 32, 32).clamp(-1, 1)
    mean, logvar = teacher.posterior(video)
    assert logvar is None
    assert torch.equal(teacher.encode(video, sample=True), mean)


# ---------------------------------------------------------------------------------------------------------------------
# Features.

def decoder_blocks(teacher):
    """{name: module whose output a feature is}, as the decoder runs them; mid of a DC-AE has a shortcut besides."""
    decoder = teacher.vae.decoder
    if isinstance(teacher, DiffusersTeacher):
        return {"mid": decoder.mid_block, **{f"up{i}": block for i, block in enumerate(decoder.up_blocks)}}
    return {"mid": decoder.project_in["main"], **{f"up{i}": s for i, s in enumerate(reversed(decoder.stages))}}


def hooked(modules, action):
    return [module.register_forward_hook(lambda m, i, output, name=name: action(name, output))
            for name, module in modules.items()]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_features_are_what_a_full_decode_passes_through(name):
    teacher, latents, seen = KINDS[name](), noise(*LATENTS[name]), {}
    blocks = decoder_blocks(teacher)
    def collect(name, output):              # once for each chunk of a decoder that runs in chunks
        seen.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).clone())
    hooks = hooked(blocks, collect)
    teacher.decode(latents)
    for hook in hooks:
        hook.remove()
    features = teacher.features(latents, tuple(blocks))
    assert set(features) == set(blocks)
    assert len(blocks) == {"dc": 7, "tiny": 4, "ltx2": 4, "ltx 0.9.1": 4, "ltx095": 4, "hunyuan15": 6}.get(name, 5)
    assert {len(chunks) for chunks in seen.values()} == {{"cog": 2, "wan21": 3, "wan22": 3, "qwen": 3}.get(name, 1)}
    for block in blocks:
        seen[block] = torch.cat(seen[block], 2)
        if block == "mid" and name in ("dc", "tiny"):       # the hook sees it without its shortcut
            seen[block] = seen[block] + latents.repeat_interleave(seen[block].shape[1] // latents.shape[1], 1)
        assert torch.equal(features[block], seen[block]), block


@torch.no_grad()
def test_h3_is_diffusers_own_in_another_range_of_pixels():
    teacher, vae, seen = h3(), h3().vae, {}
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1, 1)
    for frames in (22, 39):
        video = noise(2, 3, frames, 32, 48).clamp(-1, 1)
        want, (ours, logvar) = vae.encode((video.add(1).div(2) - mean) / std).latent_dist, teacher.posterior(video)
        assert torch.equal(ours, want.mean) and torch.equal(logvar, want.logvar)
        assert torch.equal(teacher.decode(ours), (vae.decode(ours).sample * std + mean).mul(2).sub(1))
        assert teacher.decode(ours).shape == video.shape
    for t in (1, 2):
        with pytest.raises(ValueError, match=f"h3 teacher cannot decode {t} latents: it needs 3 at least"):
            teacher.decode(noise(1, 4, t, 2, 3))
    hooks = hooked(dict(zip(("mid", "up0", "the last"), vae.decoder.transformer_blocks)),
                   lambda name, tokens: seen.setdefault(name, []).append(tokens[:, :42].unflatten(1, (7, 2, 3))))
    for t in range(3, 13):
        latents = noise(2, 4, t, 2, 3)
        assert teacher.decode(latents).shape[2] == CONFIGS["h3"].frames(t)
        windows = dict(seen)
        seen.clear()
        for name, x in teacher.features(latents, ("mid", "up0")).items():
            want = torch.cat([*(tokens[:, :5] for tokens in windows[name]), windows[name][-1][:, 5:]], 1)[:, :t]
            torch.testing.assert_close(x, want.movedim(-1, 1))          # of each window 5, and of the last one all
        assert list(seen) == ["mid", "up0"]
        seen.clear()
    teacher.features(latents, "mid")
    assert list(seen) == ["mid"]
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_ltx25_decodes_by_diffusion_in_one_step_of_noise_that_is_always_the_same():
    teacher, own, seen = ltx25(), diffusion_decoder(), {}
    own.decoder = teacher.vae.decoder
    video = noise(2, 3, 17, 32, 64).clamp(-1, 1)
    latents = teacher.encode(video)
    draw = lambda: torch.Generator().manual_seed(0)
    decoded = teacher.decode(latents)
    assert torch.equal(decoded, own.decode(latents, generator=[draw(), draw()], num_inference_steps=1).sample)
    assert torch.equal(teacher.decode(latents[:1]), own.decode(latents[:1], generator=draw()).sample)
    torch.testing.assert_close(teacher.decode(latents[1:]), decoded[1:])
    assert decoded.shape == video.shape
    names, stages = ("mid", "up0", "up1", "up2"), teacher.vae.decoder.det_stages
    hooks = hooked({name: stage[-1] for name, stage in zip(names, stages)}, seen.__setitem__)
    teacher.decode(latents)
    whole, config = [dict(seen), seen.clear()][0], CONFIGS["ltx25"]
    for name, x in teacher.features(latents, names).items():        # without what was repeated behind the end
        assert torch.equal(x, whole[name].movedim(-1, 1)[:, :, :x.shape[2]]), name
        assert name == "up0" or x.shape[2:] == config.feature_shape(name, latents.shape)[2:]
    seen.clear()
    teacher.features(latents, ("up0",))
    assert list(seen) == ["mid", "up0"]
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_two_clips_have_the_features_of_each():
    teacher, latents = KINDS["hunyuan15"](), noise(2, 4, 3, 1, 2)
    both = teacher.features(latents, ("mid", "up1"))
    for i in range(2):
        for name, x in teacher.features(latents[i:i + 1], ("mid", "up1")).items():
            torch.testing.assert_close(both[name][i:i + 1], x)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("blocks, ran", [(("mid",), ["mid"]), (("up1", "mid"), ["mid", "up0", "up1"]),
                                         (("up0",), ["mid", "up0"]), ((), [])])
@torch.no_grad()
def test_no_block_runs_deeper_than_the_last_one_named(name, blocks, ran):
    teacher, run = KINDS[name](), []
    hooks = hooked(decoder_blocks(teacher), lambda name, output: run.append(name))
    features = teacher.features(noise(*LATENTS[name]), blocks)
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(run)) == ran and set(features) == set(blocks)      # once for each chunk


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_block_that_is_not_there_is_one_line(name):
    with one_line(name.split()[0], "['up9']", "'mid'", "'up0'"):
        KINDS[name]().features(noise(*LATENTS[name]), ("mid", "up9"))


# ---------------------------------------------------------------------------------------------------------------------
# The embedded teacher.

def test_tiny_comes_with_the_repository_and_without_diffusers():
    assert TINY_WEIGHTS.stat().st_size < 10e6 and ROOT in TINY_WEIGHTS.parents
    code = ("import sys; sys.modules['huggingface_hub'] = None\n"       # importing it now fails
            "from teachers import load_teacher; teacher = load_teacher('tiny')\n"
            "assert not any(m.split('.')[0] == 'diffusers' for m in sys.modules)\n"
            "print(teacher.compression, teacher.latent_channels)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "(4, 8, 8) 32"


def psnr(a, b):
    return (-10 * torch.log10((a.clamp(-1, 1) - b).square().flatten(1).mean(1) / 4)).mean().item()


@torch.no_grad()
def test_tiny_reconstructs_clips_it_was_not_trained_on():
    clips = SyntheticClips(8, 64, seed=10_000)
    video = torch.stack([clips[n] for n in (0, 8, 16, 24)])
    teacher = tiny()
    latents = teacher.encode(video)
    assert psnr(teacher.decode(latents), video) > 22
    assert psnr(teacher.decode(latents.flip(0)), video) < 18         # and not by always saying the same


@torch.no_grad()
def test_half_precision_stays_near_single():
    for name in KINDS:
        teacher, latents = KINDS[name](), noise(*LATENTS[name])
        want = teacher.decode(latents)
        try:
            got, features = teacher.to(torch.bfloat16).decode(latents), teacher.features(latents, ("mid",))
        finally:
            teacher.float()
        assert got.dtype == features["mid"].dtype == torch.bfloat16
        assert (got.float() - want).norm() < 0.1 * want.norm(), name
    half, video = load_teacher("tiny", dtype=torch.bfloat16), SyntheticClips(8, 64, seed=10_000)[0][None]
    latents, want = half.encode(video), tiny().encode(video)        # float32 in, as the data come
    assert half.dtype == latents.dtype == torch.bfloat16 and (latents - want).norm() < 0.1 * want.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Loading.

class Hub:
    """In the place of the hub: `folder` holds its files; what is not cached is fetched; `asked` for what, and how."""

    def __init__(self, folder):
        self.folder, self.asked, self.cached = folder, [], True

    def download(self, repo, file, local_files_only=False):
        self.asked.append((repo, file, local_files_only))
        if not (self.folder / file).is_file() or local_files_only and not self.cached:
            raise FileNotFoundError(file)
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "hf_hub_download", hub.download)
    return hub


def test_random_weights_are_the_same_every_time_and_disturb_nobody(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)       # accelerators' random numbers neither
    torch.manual_seed(5)
    before, seeded[:] = torch.get_rng_state(), []
    first = load_teacher("tiny", weights="random").state_dict()
    assert torch.equal(torch.get_rng_state(), before) and not seeded
    torch.rand(3)
    second, released = load_teacher("tiny", weights="random").state_dict(), tiny().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first.keys() == released.keys()
    assert not all(torch.equal(first[key], released[key]) for key in first)


def test_weights_may_be_a_file_or_a_folder(tmp_path):
    state = load_teacher("tiny", weights="random").vae.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_teacher("tiny", str(path)).vae.state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("name, inside", [
    ("ltx", "."), *((name, "vae") for name in SMALL_DIFFUSERS if name in TEACHERS)])
@torch.no_grad()
def test_folders_as_on_the_hub(tmp_path, name, inside):
    small_vae(name).save_pretrained(tmp_path / inside)
    teacher, latents, vae = load_teacher(name, tmp_path), noise(*LATENTS[name]), small_vae(name).eval()
    vae.use_framewise_decoding = False
    assert teacher.name == name and torch.equal(teacher.decode(latents), vae.decode(latents).sample)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@torch.no_grad()
def test_h3_comes_in_shards_and_keeps_its_precision(tmp_path, hub):
    h3().vae.save_pretrained(tmp_path / "vae", max_shard_size="100KB")
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) > 1
    for teacher in (load_teacher("h3", tmp_path), load_teacher("h3")):
        assert all(torch.equal(p, q) for p, q in zip(teacher.vae.parameters(), h3().vae.parameters()))
    assert {asked[:2] for asked in hub.asked} >= {
        ("MiniMaxAI/MiniMax-H3", f"vae/{file.name}") for file in (tmp_path / "vae").iterdir()}
    half, latents = load_teacher("h3", tmp_path, dtype=torch.bfloat16), noise(1, 4, 7, 2, 2)
    assert {key.split(".")[0] for key, p in half.vae.named_parameters() if p.dtype == torch.bfloat16} == {
        "post_quant_conv", "decoder"} and half.vae.decoder.norm_out.weight.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(half.vae.encoder.parameters(), h3().vae.encoder.parameters()))
    torch.testing.assert_close(half.decode(latents).float(), h3().decode(latents), atol=0.1, rtol=0.1)
    half.features(latents, ("up0",))


@torch.no_grad()
def test_ltx25_is_of_two_folders(tmp_path, hub):
    latents = noise(1, 8, 3, 1, 1)
    small_vae("ltx23").save_pretrained(tmp_path / "vae")
    with one_line("diffusion_decoder", kind=FileNotFoundError):
        load_teacher("ltx25", tmp_path)
    diffusion_decoder().save_pretrained(tmp_path / "diffusion_decoder")
    for weights in (tmp_path, tmp_path / "vae", None):
        torch.testing.assert_close(load_teacher("ltx25", weights).decode(latents), ltx25().decode(latents))


def test_an_ltx_folder_that_is_not_whole_is_one_line(tmp_path):
    with one_line(str(tmp_path), "config.json", kind=FileNotFoundError):
        load_teacher("ltx", tmp_path)
    small_vae("ltx").save_config(tmp_path)
    with one_line(str(tmp_path), "diffusion_pytorch_model.safetensors", kind=FileNotFoundError):
        load_teacher("ltx", tmp_path)


@pytest.mark.parametrize("name, other, says", [
    ("ltx", "hunyuan", ("AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo")),
    # latents of one shape that mean different things
    ("ltx2", "ltx23", ("not the ltx2 teacher's but the ltx23 or ltx25 teacher's",)),
    ("ltx23", "ltx2", ("not the ltx23 teacher's but the ltx2 teacher's",)),
    ("ltx", "ltx095", ("not the ltx teacher's but the ltx095 teacher's",)),
])
def test_a_folder_of_another_vae_is_one_line(tmp_path, name, other, says):
    small_vae(other).save_pretrained(tmp_path)
    with one_line(*says):
        load_teacher(name, tmp_path)


@torch.no_grad()
def test_qwens_decoder_is_wan21s_with_other_weights():
    """Name for name; with the same weights it computes the same images and clips."""
    qwen, wan = KINDS["qwen"](), small_vae("wan21").eval()
    assert {k: v.shape for k, v in qwen.vae.state_dict().items()} == {k: v.shape for k, v in wan.state_dict().items()}
    wan.load_state_dict(qwen.vae.state_dict())
    for t in (1, 3):
        latents = noise(1, 4, t, 2, 3)
        torch.testing.assert_close(qwen.decode(latents), wan.decode(latents).sample)


@pytest.mark.parametrize("name, weights, kind, says", [
    ("lxt", None, ValueError, ("'lxt'", "ltx", "dc", "tiny")),
    ("", None, ValueError, ("''", "ltx")),
    ("ltx", "none.safetensors", FileNotFoundError, ("none.safetensors",)),
    ("dc", "none.safetensors", FileNotFoundError, ("none.safetensors",)),
    ("tiny", "none.safetensors", FileNotFoundError, ("none.safetensors",)),
    ("tiny", ".", FileNotFoundError, ("model.safetensors",)),                   # a folder without weights
])
def test_a_teacher_that_is_not_there_is_one_line(tmp_path, name, weights, kind, says):
    with one_line(*says, kind=kind):
        load_teacher(name, weights and tmp_path / weights)


def truncated(kept):
    """What is left of the embedded weights: so many bytes, or that share."""
    content = TINY_WEIGHTS.read_bytes()
    return content[:kept if isinstance(kept, int) else int(kept * len(content))]


KEY = "decoder.project_in.main.conv.bias"


@pytest.mark.parametrize("damage, says", [
    *((kept, ("no whole safetensors file",)) for kept in (0, 5, 0.5, 0.999)),
    (lambda s: s.pop(KEY), ("lacks", KEY)),
    (lambda s: s.update({"decoder.gain": torch.ones(1)}), ("has besides", "decoder.gain")),
    (lambda s: s.update({KEY: torch.ones(5)}), ("another shape", KEY)),
    (lambda s: [s.pop(key) for key in list(s)[:5]], ("lacks", "and 4 more")),
    (lambda s: s.update({KEY: s[KEY] * torch.nan}), (KEY, "not finite")),
    (lambda s: s.update({KEY: s[KEY].int()}), (KEY, "not finite numbers")),
], ids=["0", "5", "half", "0.999", "missing", "extra", "shape", "many", "nan", "int"])
def test_weights_that_are_damaged_or_do_not_fit_say_where(tmp_path, damage, says):
    file = tmp_path / "x.safetensors"
    if callable(damage):
        state = dict(tiny().vae.state_dict())
        damage(state)
        save_file(state, file)
    else:
        file.write_bytes(truncated(damage))
    with one_line(str(file), *says):
        load_teacher("tiny", weights=file)


def offline(*args, **kwargs):
    raise ConnectionError("cannot reach the hub\nretried 5 times")


@pytest.mark.parametrize("name, weights, repo", [("dc", None, "hpcai-tech/Open-Sora-v2-Video-DC-AE"),
                                                 ("ltx", None, "Lightricks/LTX-Video"),
                                                 ("ltx", "someone/else", "someone/else")])
def test_without_the_hub_it_is_one_line(monkeypatch, name, weights, repo):
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "hf_hub_download", offline)
    with one_line(f"of {repo} from", "ConnectionError", "weights", kind=OSError):
        load_teacher(name, weights)


@pytest.mark.parametrize("name, repo, files", [
    ("ltx", "Lightricks/LTX-Video", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]),
    ("dc", "hpcai-tech/Open-Sora-v2-Video-DC-AE", ["F32T4C128_AE.safetensors"])])
@pytest.mark.parametrize("cached", [True, False])
def test_weights_come_from_the_hub_or_its_cache(tmp_path, monkeypatch, hub, name, repo, files, cached):
    teacher, hub.cached = KINDS[name](), cached
    monkeypatch.setattr(teachers_file, "VideoDCAEConfig", lambda: SMALL)
    if name == "dc":
        save_file(teacher.vae.state_dict(), tmp_path / files[0])
    else:
        teacher.vae.save_pretrained(tmp_path / "vae")
    loaded = load_teacher(name).vae.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in teacher.vae.state_dict().items())
    assert {asked[:2] for asked in hub.asked} == {(repo, file) for file in files}
    assert all(local for _, _, local in hub.asked) == cached


def test_a_teacher_by_a_class_that_is_not_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")

    class MineVAE(diffusers.AutoencoderKLWan):
        pass

    monkeypatch.setitem(RELEASES, "mine", (RELEASES["wan21"][0], MineVAE, "me/mine", "MIT"))
    monkeypatch.setitem(CONFIGURATIONS, "mine", SMALL_DIFFUSERS["wan21"])
    assert isinstance(teachers_file.build("mine", None).vae, MineVAE)
