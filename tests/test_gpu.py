"""What only a GPU can show: `make gpu`, or `python -m pytest -m gpu`. Needs PyTorch and pytest alone."""
import copy
from dataclasses import replace

import pytest
import torch

from model import CONFIGS, SHIPPED, TurboVAED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")]
NAMES = ("ltx", "dc", "hunyuan")
SHALLOW = replace(CONFIGS["ltx"], resnets=(1, 0, 1, 0, 1))      # each kind of layer once, for what has to be compiled


@pytest.fixture(autouse=True)
def exact():
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    with torch.inference_mode():
        yield


def student(config, dtype=torch.float32):
    """With weights that let every layer matter: full residual branches, biases and norms that are not trivial."""
    torch.manual_seed(0)
    model = TurboVAED(CONFIGS[config] if isinstance(config, str) else config)
    for key, p in model.named_parameters():
        if "conv2" in key and p.ndim > 1:
            p.mul_(10)
        elif key.endswith("bias"):
            p.normal_(std=0.1)
    return model.cuda().to(dtype).eval().channels_last()


def latents(name, t, side=8, dtype=torch.float32):
    torch.manual_seed(1)
    shape = 1, CONFIGS[name].latent_channels, t, side, side
    return torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def psnr(a, b):
    return float(10 * torch.log10(4 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_decodes_what_a_cpu_does_and_half_precision_is_near(name):
    """Random weights make noise of every sum: dc in bfloat16 has 47 dB on a CPU, a trained student 59."""
    model, x = student(name), latents(name, 3)
    want = copy.deepcopy(model).cpu()(x.cpu()).cuda()
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=0)
    for dtype, least in ((torch.float16, 50), (torch.bfloat16, 40)):
        assert psnr(student(name, dtype)(x.to(dtype)), want) > least


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_shipped_student_in_half_precision_is_50_db_from_itself(dtype):
    pytest.importorskip("safetensors")
    model, x = TurboVAED.from_pretrained(SHIPPED).cuda().eval(), latents("tiny", 3)
    want = model(x)
    assert psnr(model.optimize_for_inference(dtype)(x.to(dtype)), want) > 50


@pytest.mark.parametrize("dtype, mode, least", [
    (torch.float32, True, 90), (torch.float16, True, 55), (torch.float16, "reduce-overhead", 55)])
def test_the_optimized_decoder_is_the_plain_one(dtype, mode, least):
    model, x = student(SHALLOW, dtype), latents("ltx", 2, dtype=dtype)
    want = model(x)
    model.optimize_for_inference(compile=mode)
    got = [model.decode(x), *(model.decode(-x) for _ in range(4))][0]       # not overwritten by later replays
    assert psnr(got, want) > least


@pytest.mark.parametrize("config, dtype, mode, least", [
    *((name, dtype, None, least) for name in NAMES for dtype, least in ((torch.float32, 90), (torch.float16, 55))),
    (SHALLOW, torch.float16, True, 55), (SHALLOW, torch.float16, "reduce-overhead", 55)])
def test_a_stream_is_the_whole_clip(config, dtype, mode, least):
    model = student(config, dtype)
    x = latents(config if isinstance(config, str) else "ltx", model.streamer().delay + 13, 2, dtype)
    want = model(x)
    model = model.optimize_for_inference(compile=mode) if mode else model
    assert psnr(torch.cat(list(model.stream(x.split(3, dim=2))), dim=2), want) > least


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_channels_last_from_end_to_end(name):
    model, x = student(name, torch.float16), latents(name, 3, dtype=torch.float16)

    def check(module, inputs):
        layout = torch.channels_last_3d if inputs[0].ndim == 5 else torch.channels_last
        assert inputs[0].is_contiguous(memory_format=layout), (module, inputs[0].shape)
    for module in (m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))):
        module.register_forward_pre_hook(check)
    model(x)
    list(model.stream(x.split(1, dim=2)))


@pytest.mark.parametrize("name", CONFIGS)
def test_121_frames_of_720p_fit_in_8_gb(name):
    model, config = student(name, torch.float16), CONFIGS[name]
    t, (_, d_h, d_w) = next(t for t in range(1, 32) if config.frames(t) >= 120), config.compression
    x = torch.randn(1, config.latent_channels, t, -(-720 // d_h), 1280 // d_w, device="cuda", dtype=torch.float16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert model.decode(x).isfinite().all() and torch.cuda.max_memory_reserved() < 8e9


def test_memory_does_not_grow_with_the_clip():
    model, piece, peaks = student("ltx", torch.float16), latents("ltx", 4, 16, torch.float16), []
    for pieces in (15, 60):
        torch.cuda.reset_peak_memory_stats()
        sum(frames.shape[2] for frames in model.stream([piece] * pieces))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.05 * peaks[0]
