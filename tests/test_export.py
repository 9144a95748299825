"""Core ML packages: the graph made for phones computes what the student does, and a wrong package is found out."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export
from model import CONFIGS, UPSAMPLING, TurboVAED

pytest.importorskip("coremltools")
ROOT = Path(__file__).resolve().parent.parent


def small(name, **changes):
    """A preset with an eighth of the width, random weights and biases."""
    config = CONFIGS[name]
    widths = tuple(max(width // 8, 8 * config.patch ** 2) for width in config.widths)
    torch.manual_seed(0)
    model = TurboVAED(replace(config, widths=widths, latent_channels=8, **changes)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias") or "norm3" in key:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def tiny():
    return TurboVAED.from_pretrained(ROOT / "assets/tiny_student.safetensors").eval()


@pytest.fixture(scope="module")
def package(tiny, tmp_path_factory):
    return export.export(tiny, (32, 40), path=tmp_path_factory.mktemp("export") / "tiny.mlpackage")


def edit(package, path, change):
    """A copy of a package with its specification changed; what change returns."""
    import coremltools as ct
    shutil.copytree(package, path)
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    spec = ct.utils.load_spec(str(file))
    main = spec.mlProgram.functions["main"]
    change(main.block_specializations[main.opset].operations)
    file.write_bytes(spec.SerializeToString())
    return path


def constant(operations, op, parameter):
    """The integers that an operation takes as a parameter."""
    name = op.inputs[parameter].arguments[0].name
    value = next(o for o in operations if o.outputs[0].name == name).attributes["val"].immediateValue.tensor
    return value.ints.values


# ---------------------------------------------------------------------------------------------------------------------
# the rewrites

@pytest.mark.parametrize("upsampling", UPSAMPLING)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "cog"])       # cog is hunyuan's network
def test_the_rewritten_graph_computes_the_same_video(name, upsampling):
    model = small(name, upsampling=upsampling)
    twin = export.phone_twin(model)
    for t in (1, 2):
        latents = torch.randn(1, 8, t, 2, 3)
        with torch.no_grad():
            assert (twin(latents) - model(latents)).abs().max() < 2e-5


def test_a_trained_student_keeps_its_video_and_its_weights(tiny):
    before = export.weights_hash(tiny)
    twin, latents = export.phone_twin(tiny), torch.randn(1, 16, 3, 4, 5)
    with torch.no_grad():
        assert (twin(latents) - tiny(latents)).abs().max() < 1e-5
    assert export.weights_hash(tiny) == before


def test_ltx_at_full_size_keeps_within_its_operations(tmp_path):
    torch.manual_seed(0)
    path = export.export(TurboVAED(CONFIGS["ltx"]), (512, 512), path=tmp_path / "ltx.mlpackage")
    r = export.report(export.Program(path))
    assert r["operations"] <= 221 and "transpose" not in r["kinds"] and r["highest_rank"] <= 5
    assert r["flops"] == pytest.approx(0.813e12, rel=0.01) and r["parts"]["mid"]["operations"] == 15
    assert r["package_bytes"] == pytest.approx(2 * 41.9e6, rel=0.01)
    # up3's convolutions: 19 frames of 64 channels at 128x128 in, 17 out, the residual beside them
    assert r["peak_activation_bytes"] == 2 * 64 * 128 * 128 * (19 + 17 + 17)
    assert r["largest_tensor"]["shape"] == (1, 64, 19, 128, 128)


# ---------------------------------------------------------------------------------------------------------------------
# packages

def test_a_package_is_its_student(tiny, package):
    results = export.compare(package, tiny)
    assert results["float32"]["worst_error"] < 0.005 and results["fp16"]["worst_error"] < 0.01 and results["fp16"]["psnr"] > 65
    assert export.verify(package, tiny) == results["fp16"]["worst_error"]


def test_unscaled_sums_of_squares_would_overflow(tiny, package, tmp_path):
    """The student's own forward is right in float32 and wrong in fp16; the graph made for phones is right in both."""
    plain = export.export(tiny, (32, 40), path=tmp_path / "plain.mlpackage", plain=True)
    results = export.compare(plain, tiny)
    assert results["float32"]["worst_error"] < 0.005 and results["fp16"]["worst_error"] > 0.5
    with pytest.raises(ValueError, match="not the student: worst error .* in fp16"):
        export.verify(plain, tiny)
    assert export.compare(package, tiny)["fp16"]["largest_sum_of_squares"] < 65504 / 4


def test_the_package_says_what_it_is(tiny, package):
    import coremltools as ct
    spec = ct.utils.load_spec(str(package))
    said = export.Program(package).metadata
    assert json.loads(said["config"])["latent_channels"] == 16 and said["size"] == "32x40" and said["frames"] == "16"
    assert said["weights_sha256"] == export.weights_hash(tiny)
    latents, = spec.description.input
    video, = spec.description.output
    assert latents.name == "latents" and list(latents.type.multiArrayType.shape) == [1, 16, 4, 4, 5]
    assert video.name == "video" and "[-1, 1]" in video.shortDescription and "MIT" in spec.description.metadata.license
    assert not list(package.parent.glob(".*"))          # nothing temporary is left


@pytest.mark.parametrize("name, changes", [("ltx", {}), ("hunyuan", dict(upsampling="interpolate")), ("dc", {})])
@pytest.mark.parametrize("gather", [True, False])
def test_any_size_any_student(name, changes, gather, tmp_path):
    model = small(name, resnets=(1, 0, 1, 0, 1), **changes)
    space = model.config.compression[1]
    size, t = (2 * space - space // 2, 2 * space), 1 if gather else 2        # a height to crop, an image or more
    path = export.export(model, size, t, tmp_path / "student.mlpackage", gather=gather)
    program = export.Program(path)
    assert program.operations[-1].outputs[0][1] == (1, 3, model.config.frames(t), *size)
    assert gather or "gather" not in export.report(program)["kinds"]
    assert export.verify(path, model) < export.FP16_BOUND


def test_palettised_weights(tiny, package, tmp_path):
    """Fewer bits are a smaller file and a coarser video, and the graph is still proven to the last bit of fp16."""
    worse = [export.report(export.Program(package))["weight_bytes"]], [100.0]
    for bits in (8, 4):
        path = export.export(tiny, (32, 40), path=tmp_path / f"{bits}.mlpackage", bits=bits)
        results, r = export.compare(path, tiny), export.report(export.Program(path))
        assert results["float32"]["worst_error"] < 1e-3 and results["fp16"]["worst_error"] < 0.01
        worse[0].append(r["weight_bytes"])
        worse[1].append(results["palettised"]["psnr"])
        assert r["parameters"] == export.report(export.Program(package))["parameters"]
    assert worse[0] == sorted(worse[0], reverse=True) and worse[1] == sorted(worse[1], reverse=True) and worse[1][-1] > 20


# ---------------------------------------------------------------------------------------------------------------------
# planted faults

def test_a_wrong_frame_is_found(tiny, package, tmp_path):
    def one_frame_off(operations):      # the last convolution repeats the frame before the last
        constant(operations, [o for o in operations if o.type == "gather"][-1], "indices")
        last = [o for o in operations if o.type == "gather"][-1]
        name = last.inputs["indices"].arguments[0].name
        value = next(o for o in operations if o.outputs[0].name == name).attributes["val"].immediateValue.tensor
        print(value)
    edit(package, tmp_path / "wrong.mlpackage", one_frame_off)
