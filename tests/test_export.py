"""Core ML packages: the graph made for phones computes what the student does, and a wrong package is found out."""
import inspect
import json
import os
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


def copy_of(package, path, change=lambda operations, weights: None):
    """A copy of a package after change(its operations, the bytes of its weight.bin)."""
    import coremltools as ct
    shutil.copytree(package, path)
    file, blob = path / "Data/com.apple.CoreML/model.mlmodel", path / "Data/com.apple.CoreML/weights/weight.bin"
    spec, weights = ct.utils.load_spec(str(file)), bytearray(blob.read_bytes())
    main = spec.mlProgram.functions["main"]
    change(main.block_specializations[main.opset].operations, weights)
    file.write_bytes(spec.SerializeToString())
    blob.write_bytes(weights)
    return path


def constant(operations, op, parameter):
    name = op.inputs[parameter].arguments[0].name
    return next(o for o in operations if o.outputs[0].name == name).attributes["val"]


# ---------------------------------------------------------------------------------------------------------------------
# the rewrites

@pytest.mark.parametrize("upsampling", UPSAMPLING)
@pytest.mark.parametrize("name", list({c: name for name, c in CONFIGS.items() if c.head == "shuffle"}.values()))
def test_the_rewritten_graph_computes_the_same_video(name, upsampling):
    model = small(name, upsampling=upsampling)
    twin = export.phone_twin(model)
    for t, h, w in ((1, 1, 1), (2, 2, 1)):
        latents = torch.randn(1, 8, t, h, w)
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


def test_a_failed_export_leaves_what_was_there(tiny, package, tmp_path, monkeypatch):
    import coremltools as ct
    path = copy_of(package, tmp_path / "tiny.mlpackage")

    def save(self, name):
        Path(name).mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(ct.models.MLModel, "save", save)
    with pytest.raises(OSError, match="no space left"):
        export.export(tiny, (16, 16), 1, path)
    assert list(tmp_path.iterdir()) == [path] and export.verify(path, tiny) < 0.01


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
    fp16 = export.report(export.Program(package))
    path = export.export(tiny, (32, 40), path=tmp_path / "tiny.mlpackage", bits=4)
    results, r = export.compare(path, tiny), export.report(export.Program(path))
    assert results["float32"]["worst_error"] < 1e-4 and results["fp16"]["worst_error"] < 0.01
    assert 25 < results["palettised"]["psnr"] < 40
    assert r["parameters"] == fp16["parameters"] and r["fp16_bytes"] == pytest.approx(fp16["package_bytes"], rel=0.02)
    # tensors of less than 10,000 weights, a tenth of all, stay in fp16
    assert 4 / 16 < r["weight_bytes"] / fp16["weight_bytes"] < 4 / 16 + 0.15


# ---------------------------------------------------------------------------------------------------------------------
# planted faults

@pytest.mark.parametrize("which", [0, -1])
def test_a_wrong_frame_is_found(tiny, package, tmp_path, which):
    def change(operations, weights):        # after its last frame a convolution sees the one before it
        value = constant(operations, [o for o in operations if o.type == "gather"][which], "indices")
        if value.WhichOneof("value") == "blobFileValue":        # a long list is in weight.bin, behind a header
            header = value.blobFileValue.offset
            start, size = (int.from_bytes(weights[header + i:header + i + 8], "little") for i in (16, 8))
            weights[start + size - 2] -= 1
        else:
            value.immediateValue.tensor.ints.values[-1] -= 1

    with pytest.raises(ValueError, match="not the student: worst error .* in float32"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


def test_a_wrong_slice_is_found(tiny, tmp_path):
    def change(operations, weights):        # the crop keeps the last rows instead of the first
        op, = [o for o in operations if o.type == "slice_by_index"]
        begin, end, mask = (constant(operations, op, key).immediateValue.tensor for key in ("begin", "end", "end_mask"))
        begin.ints.values[3], end.ints.values[3] = 4, 32
        mask.bools.values[3] = True

    package = export.export(tiny, (28, 32), 1, tmp_path / "right.mlpackage")
    with pytest.raises(ValueError, match="not the student: worst error .* in float32"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


def test_a_swapped_transpose_is_found(tmp_path):
    def change(operations, weights):        # rows for columns, in square frames, so that every shape is still right
        op = next(o for o in operations if o.type == "transpose")
        perm = constant(operations, op, "perm").immediateValue.tensor.ints.values
        perm[-1], perm[-2] = perm[-2], perm[-1]

    model = small("ltx", resnets=(0, 0, 1, 0, 0))
    package = export.export(model, (64, 64), 2, tmp_path / "right.mlpackage", plain=True)
    export.verify(package, model)
    with pytest.raises(ValueError, match="not the student|gives"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), model)


def test_an_unknown_operation_is_no_pass(tiny, package, tmp_path):
    def change(operations, weights):
        next(o for o in operations if o.type == "silu").type = "gelu"

    with pytest.raises(ValueError, match="gelu mid_silu.*not one of the operations known"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


def test_a_wrong_declared_shape_is_found(tiny, package, tmp_path):
    def change(operations, weights):
        next(o for o in operations if o.type == "conv").outputs[0].type.tensorType.dimensions[1].constant.size = 95

    with pytest.raises(ValueError, match="conv conv_in.*declared is"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


@pytest.mark.parametrize("file", ["Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"])
def test_truncated_files_are_found(tiny, package, tmp_path, file):
    path = copy_of(package, tmp_path / "wrong.mlpackage")
    (path / file).write_bytes((path / file).read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or damaged|damaged, or no"):
        export.verify(path, tiny)


def test_a_large_package_is_the_small_one_but_for_its_height(tiny, tmp_path):
    large = export.export(tiny, (192, 40), 4, tmp_path / "large.mlpackage")
    results = export.prove_by_height(large, tiny)
    assert results["run_at"] == "64x40" and results["float32"]["worst_error"] < 0.005 and results["fp16"]["worst_error"] < 0.01
    assert export.prove_by_height(export.export(tiny, (190, 40), 4, tmp_path / "cropped.mlpackage"), tiny) is None

    def weight(operations, weights):        # one bit of one weight
        header = constant(operations, next(o for o in operations if o.type == "conv"), "weight").blobFileValue.offset
        weights[int.from_bytes(weights[header + 16:header + 24], "little")] ^= 1

    def wiring(operations, weights):        # adds another branch
        adds = [o for o in operations if o.type == "add"]
        adds[1].inputs["y"].arguments[0].name = adds[0].inputs["y"].arguments[0].name

    def frame(operations, weights):
        header = constant(operations, [o for o in operations if o.type == "gather"][-1], "indices").blobFileValue.offset
        assert header
        weights[int.from_bytes(weights[header + 16:header + 24], "little")] += 1

    def shape(operations, weights):         # frames for rows
        op = next(o for o in operations if o.type == "reshape")
        values = constant(operations, op, "shape").immediateValue.tensor.ints.values
        values[2], values[3] = values[3], values[2]

    for change in (weight, wiring, frame, shape):
        wrong = copy_of(large, tmp_path / f"{change.__name__}.mlpackage", change)
        with pytest.raises(ValueError, match="is not what it is at the smaller height"):
            export.prove_by_height(wrong, tiny)


def test_a_package_of_another_checkpoint_is_found(tiny, package, tmp_path, monkeypatch):
    torch.manual_seed(0)
    other = TurboVAED(tiny.config)
    with pytest.raises(ValueError, match="other weights"):
        export.verify(package, other)
    monkeypatch.setattr(export, "weights_hash", lambda model: export.Program(package).metadata["weights_sha256"])
    with pytest.raises(ValueError, match="not the student"):        # also where the metadata lies
        export.verify(package, other)


def test_core_mls_own_prediction_is_compared_on_a_mac(tiny, package, monkeypatch):
    import coremltools as ct
    assert {"self", "data"} <= set(inspect.signature(ct.models.MLModel.predict).parameters)

    class MLModel:
        def __init__(self, model, compute_units):
            assert model == str(package)
            self.error = shift + (0.3 if compute_units == ct.ComputeUnit.CPU_AND_NE else 0)

        def predict(self, data):
            latents = data["latents"]
            assert latents.shape == (1, 16, 4, 4, 5) and latents.dtype == "float16"
            with torch.no_grad():
                return {"video": (tiny(torch.from_numpy(latents).float()) + self.error).numpy()}

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ct.models, "MLModel", MLModel)
    shift = 0
    results = export.compare(package, tiny)
    assert results["core_ml"]["worst_error"] < 0.01 < 0.2 < results["neural_engine"]["worst_error"]
    export.check(results)                               # a figure, no bound
    shift = 0.1
    with pytest.raises(ValueError, match="in core_ml"):
        export.verify(package, tiny)

    def fails(self, data):
        raise RuntimeError("Error computing NN outputs.\nlong")
    monkeypatch.setattr(MLModel, "predict", fails)
    with pytest.raises(ValueError, match="Core ML cannot run it on CPU_ONLY: Error computing NN outputs"):
        export.verify(package, tiny)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

@pytest.fixture
def command(monkeypatch, tmp_path):
    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["export.py", *flags])
        export.main()
    return run


def test_the_newest_student_is_exported_and_proven(tiny, tmp_path, command, capsys):
    tiny.save_pretrained(tmp_path / "out/run")
    command("--size", "36x40", "--latent-frames", "1")
    said = capsys.readouterr().out
    assert "out/run/student.safetensors" in said and "rounded to fp16: worst error" in said
    path = tmp_path / "out/run/tiny_4x36x40.mlpackage"
    saved = json.loads(path.with_suffix(".json").read_text())
    assert saved["proof"]["fp16"]["worst_error"] == pytest.approx(export.verify(path, tiny))
    assert saved["operations"] == sum(part["operations"] for part in saved["parts"].values()) == sum(saved["kinds"].values())
    command("--verify", str(path), "--student", str(ROOT / "assets/tiny_student.safetensors"))
    assert "rounded to fp16: worst error" in capsys.readouterr().out


def test_a_package_that_fails_its_proof_is_not_put_in_the_place_of_a_good_one(tiny, tmp_path, command, monkeypatch):
    tiny.save_pretrained(tmp_path / "out/run")
    flags = ["--size", "16x16", "--latent-frames", "1"]
    command(*flags)
    files = lambda: {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    good = files()
    monkeypatch.setattr(export, "FP16_BOUND", 0)
    with pytest.raises(ValueError, match="the package is not the student"):
        command(*flags)
    assert files() == good
    export.export(tiny, (16, 16), 1, tmp_path / "out/run/tiny_4x16x16.mlpackage")      # by hand, so nothing is proven of it
    assert not (tmp_path / "out/run/tiny_4x16x16.json").exists() and not list((tmp_path / "out/run").glob(".*"))


def test_two_students_of_one_teacher_do_not_share_a_package(tiny, tmp_path, command, capsys):
    torch.manual_seed(0)
    other = TurboVAED(tiny.config)
    flags = ["--size", "16x16", "--latent-frames", "1"]
    tiny.save_pretrained(tmp_path / "a.safetensors")
    other.save_pretrained(tmp_path / "b.safetensors", {"teacher": "tiny"})
    for name in "ab":
        command("--student", f"{name}.safetensors", *flags)
    assert {path.name for path in (tmp_path / "out/export").glob("*.mlpackage")} == {"tiny_a_4x16x16.mlpackage", "tiny_b_4x16x16.mlpackage"}
    other.save_pretrained(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="tiny_a_4x16x16.mlpackage is another student's: name another folder"):
        command("--student", "a.safetensors", *flags)
    assert "does not say which teacher it was made for: the package is named after tiny" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_found_at_once(tiny, tmp_path, command, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "export", None)
    with pytest.raises(OSError, match="nothing can be written to file/x: .*file is no folder"):
        command("--config", "tiny", "--random", "--out", "file/x")


def test_a_stop_leaves_no_half_package(tmp_path):
    """SIGTERM, as schedulers send it, in the middle of an export."""
    code = ("import runpy, sys, time; import coremltools as ct; save = ct.models.MLModel.save\n"
            "def slow(self, path): save(self, path); print('saved', flush=True); time.sleep(60)\n"
            f"ct.models.MLModel.save = slow; sys.argv = ['export.py', '--config', 'tiny', '--random', '--size', '16x16']\n"
            f"runpy.run_path({str(ROOT / 'export.py')!r}, run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.stdout.readline().strip() != "saved":
        assert process.poll() is None, process.stderr.read()
    assert list((tmp_path / "out/export").iterdir())
    process.terminate()
    assert process.wait(30) != 0 and process.stderr.read().splitlines()[-1] == "error: stopped"
    assert not list((tmp_path / "out/export").iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for it."""
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
    flags = ["--config", "tiny", "--random", "--size", "16x16", "--latent-frames", "1", "--out", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, str(ROOT / "export.py"), *flags], capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "disk full" in result.stderr
    assert not any((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


def test_random_weights_say_so(tmp_path, command):
    command("--config", "tiny", "--random", "--size", "16x16", "--latent-frames", "1", "--out", ".")
    assert "speed only" in export.Program(tmp_path / "tiny_random_4x16x16.mlpackage").metadata["note"]


@pytest.mark.parametrize("flags, message", [
    (["--size", "512"], "HEIGHTxWIDTH"),
    (["--size", "0x512"], "HEIGHTxWIDTH"),
    (["--random"], "--random needs --config"),
    (["--config", "ltx"], "--config goes with"),
    (["--latent-frames", "0"], "at least 1"),
    (["--student", "nowhere"], "no such file or folder"),
    (["--verify", "nowhere.mlpackage"], "no such Core ML package"),
])
def test_wrong_input_says_what_is_wrong(command, capsys, flags, message):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        command(*flags)
    assert message in (capsys.readouterr().err.splitlines() or [str(error.value)])[-1]


def test_an_error_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "export.py"), "--student", "nowhere"], capture_output=True, text=True,
                            cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: nowhere: no such") and result.stderr.count("\n") == 1


def test_a_student_that_has_no_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'resample', shortcut 'rms' or head 'unpatchify' cannot be exported"):
        export.export(small("magihuman"), (64, 64), path=tmp_path / "x.mlpackage")


def test_without_coremltools_one_line_says_what_to_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ValueError, match="pip install coremltools"):
        export.export(tiny, (16, 16), 1, tmp_path / "student.mlpackage")


def test_wrong_arguments(tiny, tmp_path):
    for size, name, bits in (((0, 16), "a.mlpackage", None), ((16, 16), "a.mlmodel", None), ((16, 16), "a.mlpackage", 5)):
        with pytest.raises(ValueError):
            export.export(tiny, size, 1, tmp_path / name, bits)
    assert not list(tmp_path.iterdir())
