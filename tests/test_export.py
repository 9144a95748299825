"""Core ML packages: the graph made for phones computes what the student does, and a wrong package is found out."""
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import export
from model import CONFIGS, UPSAMPLING, TurboVAED

pytest.importorskip("coremltools")
ROOT = Path(__file__).resolve().parent.parent
GRAPHS = ["engine", "conv3d"]
both = pytest.mark.parametrize("graph", GRAPHS)


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
def packages(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return {graph: export.export(tiny, (32, 40), path=folder / f"{graph}.mlpackage", graph=graph) for graph in GRAPHS}


@pytest.fixture
def package(packages):
    return packages["engine"]


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
def test_the_rewritten_graphs_compute_the_same_video(name, upsampling):
    model = small(name, upsampling=upsampling)
    twins = {graph: export.phone_twin(model, graph) for graph in GRAPHS}
    for t, h, w in ((1, 1, 1), (2, 2, 1), (4, 1, 1)):
        latents = torch.randn(1, 8, t, h, w)
        with torch.no_grad():
            video = model(latents)
            for graph, twin in twins.items():
                error = twin(export.for_graph(latents, graph)) - export.for_graph(video, graph)
                assert error.abs().max() < 2e-5


@both
def test_a_trained_student_keeps_its_video_and_its_weights(tiny, graph):
    before = export.weights_hash(tiny)
    twin, latents = export.phone_twin(tiny, graph), torch.randn(1, 32, 3, 4, 5)
    with torch.no_grad():
        video = twin(export.for_graph(latents, graph))
        assert (video - export.for_graph(tiny(latents), graph)).abs().max() < 1e-5
    assert export.weights_hash(tiny) == before


def test_ltx_at_full_size_keeps_within_its_operations(tmp_path):
    """The graph of 3D convolutions has 221, moves 4.56 GB and keeps 19 + 17 + 17 frames of up3 alive: hardly more, and
    no more, do here."""
    torch.manual_seed(0)
    path = export.export(TurboVAED(CONFIGS["ltx"]), (512, 512), path=tmp_path / "ltx.mlpackage")
    r = export.report(export.Program(path))
    assert r["operations"] <= 596 and r["operations"] - r["views"] <= 326
    assert r["flops"] == pytest.approx(0.813e12, rel=0.01) and r["bytes_moved"] < 1.2 * 4.563e9
    assert r["package_bytes"] == pytest.approx(2 * 41.9e6, rel=0.01)
    frame = 2 * 64 * 128 * 128
    assert r["peak_activation_bytes"] < frame * (19 + 17 + 17)
    assert r["largest_tensor"]["shape"] == (9, 512, 64, 64) and r["largest_bytes"] == 2 * 9 * 512 * 64 * 64
    assert r["parts"]["out"]["largest_bytes"] == frame * 17


def test_the_shipped_student_keeps_within_its_operations(packages):
    engine, conv3d = (export.report(export.Program(packages[graph])) for graph in GRAPHS)
    assert conv3d["operations"] <= 150 and "transpose" not in conv3d["kinds"] and conv3d["highest_rank"] == 5
    assert engine["operations"] - engine["views"] <= 217 and engine["flops"] == conv3d["flops"]
    # the last norm: its input and its output, 8 channels of 16 frames at 32x40, and their lengths
    assert conv3d["peak_activation_bytes"] == engine["peak_activation_bytes"] == 2 * 16 * 32 * 40 * (8 + 8 + 1)
    assert engine["bytes_moved"] < 1.4 * conv3d["bytes_moved"]


# ---------------------------------------------------------------------------------------------------------------------
# what keeps an operation off the Neural Engine

@pytest.mark.parametrize("name", {      # one network, one name
    c: name for name, c in CONFIGS.items() if c.head == "shuffle"}.values())
def test_the_engines_graph_has_nothing_that_keeps_off_the_engine(name, tmp_path):
    """Of every configuration, at the larger of the default sizes and with as many frames: the rules ask for kinds,
    ranks and sizes, of which the other size has the same and smaller. Narrow and with few resnets: more are more of the
    same."""
    config, model = CONFIGS[name], small(name, resnets=(1, 0, 0, 0, 0))
    program = export.Program(export.export(model, (720, 1280), path=tmp_path / "a.mlpackage"))
    assert {len(shape) for op in program.operations for _, shape, _ in op.outputs} == {4}
    r = export.report(program)
    assert program.operations[-1].outputs[0][1] == (config.frames(int(program.metadata["latent_frames"])), 3, 720, 1280)
    assert r["off_engine"] == 0 and not r["off_engine_kinds"] and "Neural Engine: none" in export.table(r)


def test_what_keeps_off_the_engine_is_found(tmp_path):
    import coremltools as ct
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(input_specs=[mb.TensorSpec(shape=(3, 4, 6, 20), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(latents):
        weight = lambda *shape: np.ones(shape, np.float16)
        x = mb.gather(x=latents, indices=[0, 2], axis=0)
        x = mb.transpose(x=x, perm=[1, 0, 3, 2])                                            # (4, 2, 20, 6)
        x = mb.conv(x=mb.reshape(x=x, shape=(1, 4, 2, 20, 6)), weight=weight(4, 4, 1, 3, 3))
        x = mb.reshape(x=x, shape=(2, 4, 4, 18))
        x = mb.conv(x=x, weight=weight(4, 4, 1, 14))                                        # (2, 4, 4, 5)
        x = mb.slice_by_index(x=x, begin=[0, 0, 0, 1], end=[2, 4, 4, 5])
        x = mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, 4, 4, 2])                    # allowed
        x = mb.pixel_shuffle(x=mb.concat(values=[x] * 25, axis=1), upscale_factor=5)
        x = mb.gelu(x=x)
        return mb.conv(x=mb.reshape(x=x, shape=(1, 1, 1, 800)), weight=weight(70000, 1, 1, 1), name="video")

    path = tmp_path / "planted.mlpackage"
    ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(str(path))
    r = export.report(export.Program(path))
    found = {reason: dict(kinds) for reason, kinds in r["off_engine_kinds"].items()}
    assert found == {"runs on the CPU or GPU only": {"gather": 1}, "rewrites memory": {"transpose": 1},
                     "rank above 4": {"reshape": 2}, "3D convolution": {"conv": 1}, "kernel wider than 13": {"conv": 1},
                     "slice of the last axis with an offset": {"slice_by_index": 1},
                     "factor other than 2, 3, 4, 8": {"pixel_shuffle": 1}, "not known to run there": {"gelu": 1},
                     "height or width above 16384, channels or frames above 65536": {"conv": 1}}
    assert r["off_engine"] == 10 and "1 gather (runs on the CPU or GPU only)" in export.table(r).splitlines()[-1]


def test_the_other_graph_has_its_3d_convolutions_named(packages):
    kinds = export.report(export.Program(packages["conv3d"]))["off_engine_kinds"]
    assert kinds["3D convolution"]["conv"] > 20 and kinds["runs on the CPU or GPU only"]["gather"] > 5


# ---------------------------------------------------------------------------------------------------------------------
# packages

@both
def test_a_package_is_its_student(tiny, packages, graph):
    results = export.compare(packages[graph], tiny)
    assert results["float32"]["worst_error"] < 0.005
    assert results["fp16"]["worst_error"] < 0.01 and results["fp16"]["psnr"] > 65
    assert export.verify(packages[graph], tiny) == results["fp16"]["worst_error"]


def test_unscaled_sums_of_squares_would_overflow(tiny, package, tmp_path, monkeypatch):
    assert export.compare(package, tiny)["fp16"]["largest_sum_of_squares"] < 65504 / 4
    monkeypatch.setattr(export, "rescale", lambda twin: None)
    unscaled = export.export(tiny, (32, 40), path=tmp_path / "unscaled.mlpackage")
    assert export.compare(unscaled, tiny)["fp16"]["largest_sum_of_squares"] > 65504 * 4


def test_the_package_says_what_it_is(tiny, package):
    import coremltools as ct
    spec = ct.utils.load_spec(str(package))
    said = export.Program(package).metadata
    assert json.loads(said["config"])["latent_channels"] == 32 and said["size"] == "32x40" and said["frames"] == "16"
    assert said["weights_sha256"] == export.weights_hash(tiny)
    latents, = spec.description.input
    video, = spec.description.output
    assert latents.name == "latents" and list(latents.type.multiArrayType.shape) == [4, 32, 4, 5]
    assert list(video.type.multiArrayType.shape) == [16, 3, 32, 40]
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
@pytest.mark.parametrize("graph, t", [("engine", 2), ("conv3d", 1)])
def test_any_size_any_student(name, changes, graph, t, tmp_path):
    model = small(name, resnets=(1, 0, 1, 0, 1), **changes)
    space = model.config.compression[1]
    size = 2 * space - space // 2, 2 * space        # a height to crop
    path = export.export(model, size, t, tmp_path / "student.mlpackage", graph=graph)
    shape = export.for_graph(torch.empty(1, 3, model.config.frames(t), *size, device="meta"), graph).shape
    assert export.Program(path).operations[-1].outputs[0][1] == tuple(shape)
    assert export.verify(path, model) < export.FP16_BOUND


def test_palettised_weights(tiny, package, tmp_path):
    """Fewer bits are a smaller file and a coarser video, and the graph is still proven to the last bit of fp16."""
    fp16 = export.report(export.Program(package))
    path = export.export(tiny, (32, 40), path=tmp_path / "tiny.mlpackage", bits=4)
    results, r = export.compare(path, tiny), export.report(export.Program(path))
    assert results["float32"]["worst_error"] < 1e-4 and results["fp16"]["worst_error"] < 0.01
    assert 22 < results["palettised"]["psnr"] < 40
    assert r["parameters"] == fp16["parameters"] and r["fp16_bytes"] == pytest.approx(fp16["package_bytes"], rel=0.02)
    # tensors of less than 10,000 weights, a tenth of all, stay in fp16
    assert 4 / 16 < r["weight_bytes"] / fp16["weight_bytes"] < 4 / 16 + 0.15


def test_damaged_palettised_weights_are_found():
    good = {"worst_error": 1e-3, "psnr": 80}
    export.check({"palettised": {"worst_error": 0.3, "psnr": 30}, "float32": good, "fp16": good})
    for psnr in (9.9, float("nan")):
        with pytest.raises(ValueError, match="palettised weights are not the student's"):
            export.check({"palettised": {"worst_error": 2.9, "psnr": psnr}, "float32": good, "fp16": good})


# ---------------------------------------------------------------------------------------------------------------------
# planted faults

@both
@pytest.mark.parametrize("which", [0, -1])
def test_a_wrong_frame_is_found(tiny, packages, tmp_path, graph, which):
    def indices(operations, weights):       # after its last frame a convolution sees the one before it
        value = constant(operations, [o for o in operations if o.type == "gather"][which], "indices")
        if value.WhichOneof("value") == "blobFileValue":        # a long list is in weight.bin, behind a header
            header = value.blobFileValue.offset
            start, size = (int.from_bytes(weights[header + i:header + i + 8], "little") for i in (16, 8))
            weights[start + size - 2] -= 1
        else:
            value.immediateValue.tensor.ints.values[-1] -= 1

    def order(operations, weights):         # the same, or the video's last frame is one before it
        frames = [o for o in operations if o.type == "concat"][which].inputs["values"].arguments
        frames[-1].name = frames[-3].name

    wrong = copy_of(packages[graph], tmp_path / "wrong.mlpackage", order if graph == "engine" else indices)
    with pytest.raises(ValueError, match="not the student: worst error .* in float32"):
        export.verify(wrong, tiny)


def test_frames_that_are_one_late_are_found(tiny, package, tmp_path):
    def change(operations, weights):        # of the windows that a convolution takes as they lie in memory
        op = next(o for o in operations if o.type == "slice_by_index" and o.outputs[0].name.startswith("out_"))
        begin, end = (constant(operations, op, key).immediateValue.tensor.ints.values for key in ("begin", "end"))
        assert (begin[0], end[0]) == (0, 15)
        begin[0], end[0] = 1, 16

    with pytest.raises(ValueError, match="not the student: worst error .* in float32"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


@both
def test_a_wrong_crop_is_found(tiny, tmp_path, graph):
    rows = 2 if graph == "engine" else 3

    def change(operations, weights):        # the crop keeps the last rows instead of the first
        op = [o for o in operations if o.type == "slice_by_index"][-1]
        begin, end, mask = (constant(operations, op, key).immediateValue.tensor for key in ("begin", "end", "end_mask"))
        begin.ints.values[rows], end.ints.values[rows] = 4, 32
        mask.bools.values[rows] = True

    package = export.export(tiny, (28, 32), 1, tmp_path / "right.mlpackage", graph=graph)
    with pytest.raises(ValueError, match="not the student: worst error .* in float32"):
        export.verify(copy_of(package, tmp_path / "wrong.mlpackage", change), tiny)


@both
def test_an_unknown_operation_is_no_pass(tiny, packages, tmp_path, graph):
    def change(operations, weights):
        next(o for o in operations if o.type == "silu").type = "gelu"

    with pytest.raises(ValueError, match="gelu mid_silu.*not one of the operations known"):
        export.verify(copy_of(packages[graph], tmp_path / "wrong.mlpackage", change), tiny)


@both
def test_a_wrong_declared_shape_is_found(tiny, packages, tmp_path, graph):
    def change(operations, weights):
        next(o for o in operations if o.type == "conv").outputs[0].type.tensorType.dimensions[1].constant.size = 95

    with pytest.raises(ValueError, match="conv conv_in.*declared is"):
        export.verify(copy_of(packages[graph], tmp_path / "wrong.mlpackage", change), tiny)


@pytest.mark.parametrize("file", ["Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"])
def test_truncated_files_are_found(tiny, package, tmp_path, file):
    path = copy_of(package, tmp_path / "wrong.mlpackage")
    (path / file).write_bytes((path / file).read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or damaged|damaged, or no"):
        export.verify(path, tiny)


@both
def test_a_large_package_is_the_small_one_but_for_its_height(tiny, tmp_path, graph):
    t = 2 if graph == "engine" else 4
    large = export.export(tiny, (192, 40), t, tmp_path / "large.mlpackage", graph=graph)
    results = export.prove_by_height(large, tiny)
    assert results["run_at"] == "64x40"
    assert results["float32"]["worst_error"] < 0.005 and results["fp16"]["worst_error"] < 0.015

    def weight(operations, weights):        # one bit of one weight
        header = constant(operations, next(o for o in operations if o.type == "conv"), "weight").blobFileValue.offset
        weights[int.from_bytes(weights[header + 16:header + 24], "little")] ^= 1

    def wiring(operations, weights):        # adds another branch
        adds = [o for o in operations if o.type == "add"]
        adds[1].inputs["y"].arguments[0].name = adds[0].inputs["y"].arguments[0].name

    def frame(operations, weights):
        if graph == "engine":
            frames = [o for o in operations if o.type == "concat"][-1].inputs["values"].arguments
            frames[-1].name = frames[-2].name
        else:
            last = [o for o in operations if o.type == "gather"][-1]
            header = constant(operations, last, "indices").blobFileValue.offset
            weights[int.from_bytes(weights[header + 16:header + 24], "little")] += 1

    def shape(operations, weights):         # frames for rows
        op = next(o for o in operations if o.type == "reshape")
        values = constant(operations, op, "shape").immediateValue.tensor.ints.values
        values[1], values[2] = values[2], values[1]

    small = export.Program(export.export(tiny, (64, 40), t, tmp_path / "small.mlpackage", graph=graph))
    export.same_but_for_height(export.Program(large), small)
    for change in (weight, wiring, frame, shape):
        wrong = export.Program(copy_of(large, tmp_path / f"{change.__name__}.mlpackage", change))
        with pytest.raises(ValueError, match="is not what it is at the smaller height"):
            export.same_but_for_height(wrong, small)


def test_a_cropped_package_is_not_proven_at_a_smaller_height(tiny, tmp_path):
    assert export.prove_by_height(export.export(tiny, (30, 40), 1, tmp_path / "cropped.mlpackage"), tiny) is None


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
            assert latents.shape == (4, 32, 4, 5) and latents.dtype == "float16"
            with torch.no_grad():
                video = tiny(torch.from_numpy(latents).float().transpose(0, 1)[None]) + self.error
            return {"video": export.for_graph(video, "engine").numpy()}

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
    path = tmp_path / "out/run/tiny_4x36x40_engine.mlpackage"
    saved = json.loads(path.with_suffix(".json").read_text())
    assert saved["proof"]["fp16"]["worst_error"] == pytest.approx(export.verify(path, tiny))
    assert (saved["operations"] == sum(part["operations"] for part in saved["parts"].values())
            == sum(saved["kinds"].values()))
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
    # by hand, so nothing is proven of it
    export.export(tiny, (16, 16), 1, tmp_path / "out/run/tiny_4x16x16_engine.mlpackage")
    assert not (tmp_path / "out/run/tiny_4x16x16_engine.json").exists() and not list((tmp_path / "out/run").glob(".*"))


def test_two_students_of_one_teacher_do_not_share_a_package(tiny, tmp_path, command, capsys):
    torch.manual_seed(0)
    other = TurboVAED(tiny.config)
    flags = ["--size", "16x16", "--latent-frames", "1"]
    tiny.save_pretrained(tmp_path / "a.safetensors")
    other.save_pretrained(tmp_path / "b.safetensors", {"teacher": "tiny"})
    for name in "ab":
        command("--student", f"{name}.safetensors", *flags)
    written = {path.name for path in (tmp_path / "out/export").glob("*.mlpackage")}
    assert written == {"tiny_a_4x16x16_engine.mlpackage", "tiny_b_4x16x16_engine.mlpackage"}
    other.save_pretrained(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="tiny_a_4x16x16_engine.mlpackage is another student's: name another folder"):
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
            f"ct.models.MLModel.save = slow; "
            f"sys.argv = ['export.py', '--config', 'tiny', '--random', '--size', '16x16']\n"
            f"runpy.run_path({str(ROOT / 'export.py')!r}, run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
    result = subprocess.run([sys.executable, str(ROOT / "export.py"), *flags],
                            capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "disk full" in result.stderr
    assert not any((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


def test_random_weights_say_so_and_both_graphs_are_written(tmp_path, command, capsys):
    command("--config", "tiny", "--random", "--size", "16x16", "--latent-frames", "1", "--out", ".", "--graph", *GRAPHS)
    for graph, rank in zip(GRAPHS, (4, 5)):
        program = export.Program(tmp_path / f"tiny_random_4x16x16_{graph}.mlpackage")
        assert "speed only" in program.metadata["note"] and program.metadata["graph"] == graph
        assert len(program.operations[-1].outputs[0][1]) == rank
    said = capsys.readouterr().out
    assert said.count("rounded to fp16: worst error") == 2
    assert "kept off the Neural Engine: none" in said and "(3D convolution)" in said


@pytest.mark.parametrize("flags, message", [
    (["--size", "512"], "HEIGHTxWIDTH"),
    (["--size", "0x512"], "HEIGHTxWIDTH"),
    (["--random"], "--random needs --config"),
    (["--config", "ltx"], "--config goes with"),
    (["--latent-frames", "0"], "at least 1"), (["--graph", "3d"], "invalid choice: '3d'"),
    (["--student", "nowhere"], "no such file or folder"),
    (["--verify", "nowhere.mlpackage"], "no such Core ML package"),
    (["--verify", "nowhere.mlpackage", "--bits", "4"], "takes the package as it is"),
])
def test_wrong_input_says_what_is_wrong(command, capsys, flags, message):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        command(*flags)
    assert message in (capsys.readouterr().err.splitlines() or [str(error.value)])[-1]


def test_an_error_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "export.py"), "--student", "nowhere"],
                            capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode == 1 and result.stderr.startswith("error: nowhere: no such")
            and result.stderr.count("\n") == 1)


def test_a_student_that_has_no_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'resample', shortcut 'rms' or head 'unpatchify' cannot be exported"):
        export.export(small("magihuman"), (64, 64), path=tmp_path / "x.mlpackage")


def test_without_coremltools_one_line_says_what_to_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ValueError, match="pip install coremltools"):
        export.export(tiny, (16, 16), 1, tmp_path / "student.mlpackage")


def test_wrong_arguments(tiny, tmp_path):
    for size, name, bits in (((0, 16), "a.mlpackage", None), ((16, 16), "a.mlmodel", None),
                             ((16, 16), "a.mlpackage", 5)):
        with pytest.raises(ValueError):
            export.export(tiny, size, 1, tmp_path / name, bits)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# streams

@pytest.fixture(scope="module")
def stream_package(tiny, tmp_path_factory):
    return export.export(tiny, (16, 16), path=tmp_path_factory.mktemp("stream") / "stream.mlpackage", stream=2)


def schedule(twin, chunk, config):
    """What `run_stream` reads of a package, for a twin whose steps take chunks of this shape."""
    probe = export.Step()
    twin(chunk, probe)
    when = {"first_frame": probe.first, "begins": [begin for (begin, _), _ in probe.places],
            "ends": [end for _, (end, _) in probe.places]}
    return types.SimpleNamespace(latent_frames=len(chunk),
                                 metadata={"stream": json.dumps(when), "config": json.dumps(asdict(config))},
                                 inputs={f"state_{i}": kept.shape for i, kept in enumerate(probe.keeps)})


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name, changes", [("ltx", {}), ("dc", {}), ("tiny", dict(upsampling="interpolate", kernel=7)),
                                           ("tiny", dict(drop_first=True, upsampling="pixel_shuffle_3d"))])
@torch.no_grad()
def test_steps_of_a_stream_decode_clips_of_any_length_exactly(name, changes, n):
    """From one step to more than the decoder's delay, with what is before and after each clip of no consequence."""
    model = small(name, resnets=(1, 1, 1, 1, 1), **changes)
    twin = export.phone_twin(model, "engine")
    package = schedule(twin, torch.zeros(n, 8, 1, 2), model.config)

    def call(function, given):
        step = export.Step([given[key] for key in package.inputs], given.get("edges"))
        return {"video": twin(given["latents"], step), **{f"next_state_{i}": x for i, x in enumerate(step.keeps)}}
    for length in (1, 2, export.stream_length(package, 2) // n):
        latents = torch.randn(length * n, 8, 1, 2)
        video, calls = export.run_stream(package, latents, call)
        want = export.for_graph(model(latents.transpose(0, 1)[None]), "engine")
        assert (video - want).abs().max() < 3e-5 and (length < 3 or calls["step"] >= 2)


def test_a_streams_package_is_its_student_and_stays_on_the_engine(tiny, stream_package):
    results = export.compare(stream_package, tiny)
    assert results["float32"]["worst_error"] < 5e-3 and results["fp16"]["psnr"] > 65 and results["calls"]["step"] == 10
    for function in ("step", "edge"):
        r = export.report(export.Program(stream_package, function))
        assert not r["off_engine"] and r["highest_rank"] == 4 and r["stream"] == 2
    step, edge = (export.Program(stream_package, function) for function in ("step", "edge"))
    assert step.stored.keys() and step.file_bytes < 1.9e6           # its two functions share their weights
    assert [*edge.inputs][:-1] == [*step.inputs] and [*edge.inputs][-1] == "edges"
    outputs = {name for name in step.outputs}           # each is written to memory of its own, a slice of a batch too
    state = sum(2 * math.prod(shape) for op in step.operations for name, shape, _ in op.outputs if name in outputs)
    assert export.report(step)["peak_activation_bytes"] < 3 * state


@pytest.mark.parametrize("key", ["begins", "ends", "first_frame"])
def test_a_stream_that_begins_or_ends_a_step_late_is_found(tiny, stream_package, tmp_path, key):
    path = Path(shutil.copytree(stream_package, tmp_path / "late.mlpackage"))
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    import coremltools as ct
    spec = ct.utils.load_spec(str(file))
    when = json.loads(spec.description.metadata.userDefined["stream"])
    if key == "first_frame":
        when[key] += 1
    else:
        when[key][5] += 1
    spec.description.metadata.userDefined["stream"] = json.dumps(when)
    file.write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match="is not the student"):
        export.verify(path, tiny)
    for function in ("step", "edge"):           # nor does a proof at a smaller height pass by what an app reads
        with pytest.raises(ValueError, match="names or metadata"):
            export.same_but_for_height(export.Program(path, function), export.Program(stream_package, function))


def test_a_streams_package_is_exported_proven_and_verified_by_command(tmp_path, command, capsys):
    assert command("--student", str(ROOT / "assets/tiny_student.safetensors"),
                   "--stream", "1", "--size", "20x16") is None
    path, = (tmp_path / "out/export").glob("*.mlpackage")
    assert path.name == "tiny_student_stream1x24x16_engine.mlpackage"
    r = json.loads(path.with_suffix(".json").read_text())
    assert r["proof"]["calls"]["step"] == 10 and r["edge"]["operations"] > r["operations"]
    assert export.Program(path).metadata["size"] == "24x16" and "10 steps in the middle" in capsys.readouterr().out
