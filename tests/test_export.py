"""Files for phones: each computes what the student does, and a wrong one is found out."""
import asyncio
import inspect
import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export
from model import CONFIGS, OWN_FILE, SHIPPED, UPSAMPLING, TurboVAED, weights_hash

pytest.importorskip("coremltools")
IMAGE = ["--size", "14x16", "--latent-frames", "1"]
ROOT = Path(__file__).resolve().parent.parent
# one name for each structure: presets that differ in more than widths and numbers of resnets
STRUCTURES = list({replace(c, latent_channels=8, widths=(16,) * 5, resnets=(1,) * 5): name
                   for name, c in CONFIGS.items() if c.upsampling in UPSAMPLING}.values())


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


def convert(path, student, size, latent_frames=None):
    """A package as it is before its proof."""
    export.CoreML.write(path, student, export.Settings(size, latent_frames))
    return path


@pytest.fixture(scope="module")
def tiny():
    return TurboVAED.from_pretrained(SHIPPED).eval()


@pytest.fixture(scope="module")
def package(tiny, tmp_path_factory):
    return export.export(tiny, (32, 40), path=tmp_path_factory.mktemp("export") / "a.mlpackage")


@pytest.fixture(scope="module")
def image(tiny, tmp_path_factory):
    """The smallest that is worth it: one latent frame of 16x16 pixels, cropped."""
    return export.export(tiny, (14, 16), 1, tmp_path_factory.mktemp("export") / "a.mlpackage")


@pytest.fixture
def converted(monkeypatch):
    """Makes conversions give a copy of a package, and returns the list of their settings."""
    def give(package):
        calls = []
        monkeypatch.setattr(export.CoreML, "write", staticmethod(lambda path, student, settings: (
            calls.append(settings), shutil.copytree(package, path))))
        return calls
    return give


@pytest.fixture
def command(monkeypatch, tmp_path):
    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["export.py", *flags])
        export.main()
    return run


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


report = lambda package: export.read(package).report()
saved = lambda package: json.loads(package.with_suffix(".json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# the twin

@pytest.mark.parametrize("upsampling", UPSAMPLING)
@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_the_twin_computes_the_same_video(name, upsampling):
    model = small(name, upsampling=upsampling)
    before, twin = weights_hash(model), export.phone_twin(model)
    assert weights_hash(model) == before
    for t, h, w in ((1, 1, 1), (2, 2, 1), (4, 1, 1)):
        latents = torch.randn(1, 8, t, h, w)
        error = twin(export.frames_first(latents)) - export.frames_first(model(latents))
        assert error.abs().max() < 2e-5


def test_a_student_with_other_layers_is_refused():
    with pytest.raises(ValueError, match="Other has layers of its own"):
        export.phone_twin(type("Other", (TurboVAED,), {})(CONFIGS["tiny"]))


def test_ltx_at_full_size_keeps_within_its_operations(tmp_path):
    torch.manual_seed(0)
    path = convert(tmp_path / "ltx.mlpackage", TurboVAED(CONFIGS["ltx"]), (512, 512))
    r = report(path)
    assert sum(r["kinds"].values()) <= 596 and not r["off_engine_kinds"]
    weights, = path.rglob("*.bin")
    assert weights.stat().st_size == pytest.approx(2 * 41.9e6, rel=0.01)


def test_a_large_video_of_many_channels_stays_on_the_engine(tmp_path):
    """At the larger of the default sizes, by the structure with the most channels at full size. Narrow and with few
    resnets: more are more of the same."""
    path = convert(tmp_path / "a.mlpackage", small("cog", resnets=(1, 0, 0, 0, 0)), (720, 1280))
    function = export.read(path).function
    assert {len(v.shape) for op in export.operations(function) for v in op.outputs} == {4}
    assert tuple(function.outputs[0].shape) == (17, 3, 720, 1280) and not report(path)["off_engine_kinds"]


def test_what_keeps_off_the_engine_is_found(image, tmp_path):
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
        x = mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, 4, 4, 2])                    # allowed
        x = mb.pixel_shuffle(x=mb.concat(values=[x] * 25, axis=1), upscale_factor=5)
        return mb.gelu(x=x, name="video")

    path = tmp_path / "planted.mlpackage"
    package = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    package.user_defined_metadata["settings"] = '{"size": [8, 8]}'
    package.save(str(path))
    r = report(path)
    found = {reason: dict(kinds) for reason, kinds in r["off_engine_kinds"].items()}
    assert found == {"not known to run there": {"gather": 1, "transpose": 1, "gelu": 1},
                     "rank above 4": {"reshape": 2, "conv": 1}, "factor other than 2, 3, 4, 8": {"pixel_shuffle": 1}}
    assert "1 pixel_shuffle (factor other than 2, 3, 4, 8)" in export.text_of(json.dumps({**saved(image), **r}))


# ---------------------------------------------------------------------------------------------------------------------
# packages

def test_a_package_is_its_student(tiny, package):
    proof = saved(package)["proof"]
    assert proof["float32"]["worst_error"] < 0.005
    assert proof["fp16"]["worst_error"] < 0.01 and proof["fp16"]["psnr"] > 65
    assert export.verify(package, tiny) == pytest.approx(proof["fp16"]["worst_error"])


@torch.no_grad()
def test_unscaled_sums_of_squares_would_overflow(tiny, monkeypatch):
    def largest():
        squares, norm = [], export.rms_norm
        with monkeypatch.context() as patch:
            patch.setattr(export, "rms_norm", lambda x: squares.append(x.square().sum(1).max()) or norm(x))
            export.phone_twin(tiny)(torch.randn(4, 32, 4, 5, generator=torch.Generator().manual_seed(0)))
        return max(squares)

    assert largest() < 65504 / 4
    monkeypatch.setattr(export, "rescale", lambda twin: None)
    assert largest() > 65504 * 4


def test_the_package_says_what_it_is(tiny, package):
    import coremltools as ct
    spec = ct.utils.load_spec(str(package))
    metadata = export.read(package).metadata
    assert json.loads(metadata["config"])["latent_channels"] == 32
    assert json.loads(metadata["settings"])["size"] == [32, 40]
    assert metadata["weights_sha256"] == weights_hash(tiny)
    latents, = spec.description.input
    video, = spec.description.output
    assert latents.name == "latents" and list(latents.type.multiArrayType.shape) == [4, 32, 4, 5]
    assert list(video.type.multiArrayType.shape) == [16, 3, 32, 40]
    assert video.name == "video" and "[-1, 1]" in video.shortDescription and "MIT" in spec.description.metadata.license
    assert not list(package.parent.glob(".*"))          # nothing temporary is left


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in STRUCTURES),
                                           ("cog", dict(upsampling="interpolate"))])
def test_any_student_any_size(name, changes, tmp_path):
    """Each is cropped, and all but nearest neighbour stays on the engine."""
    model = small(name, resnets=(1, 0, 1, 0, 1), **changes)
    space = model.config.compression[1]
    size = 2 * space - space // 2, 2 * space
    path = export.export(model, size, 2, tmp_path / "student.mlpackage")
    function = export.read(path).function
    assert tuple(function.outputs[0].shape) == (model.config.frames(2), 3, *size)
    assert set(report(path)["off_engine_kinds"]) == ({"not known to run there"} if changes else set())


def test_the_smallest_video_of_the_shipped_student(tiny, tmp_path):
    """One latent, for which many slices take all and many splits give one."""
    path = export.export(tiny, (8, 8), 1, tmp_path / "a.mlpackage")
    assert tuple(export.read(path).function.outputs[0].shape) == (4, 3, 8, 8)


def test_palettised_weights(image, tmp_path, command):
    """Fewer bits are a smaller file and a coarser video, and the package is still proven to the last bit of fp16."""
    command("--student", str(SHIPPED), *IMAGE, "--bits", "4", "--out", ".")
    path = tmp_path / "tiny_student_4x14x16_engine_4bit.mlpackage"
    assert export.read(path).settings.bits == 4
    proof = saved(path)["proof"]
    assert proof["float32"]["worst_error"] < 1e-4 and proof["fp16"]["worst_error"] < 0.01
    assert 22 < proof["palettised"]["psnr"] < 40
    # tensors of less than 10,000 weights, a tenth of all, stay in fp16
    size = lambda package: next(package.rglob("*.bin")).stat().st_size
    assert 4 / 16 < size(path) / size(image) < 4 / 16 + 0.15


def test_damaged_palettised_weights_are_found(tiny, image, tmp_path):
    """Fewer weights than a screen's of text: what is left is still the student, in part."""
    export.export(tiny, (16, 16), 1, tmp_path / "a.mlpackage", bits=8)

    def damage(operations, weights):
        middle = len(weights) // 2
        weights[middle:middle + 512] = bytes(512)

    wrong = copy_of(tmp_path / "a.mlpackage", tmp_path / "wrong.mlpackage", damage)
    with pytest.raises(ValueError, match="not the student: worst error .* in palettised"):
        export.verify(wrong, tiny)


# ---------------------------------------------------------------------------------------------------------------------
# planted faults

def repeated(which):
    """The last of that concat's frames becomes one before it: of a convolution's windows, or of the video."""
    def change(operations, weights):
        frames = [o for o in operations if o.type == "concat"][which].inputs["values"].arguments
        frames[-1].name = frames[-3].name
    return change


def one_late(operations, weights):          # of the windows that a convolution takes as they lie in memory
    slices = [[constant(operations, op, key).immediateValue.tensor.ints.values for key in ("begin", "end")]
              for op in operations if op.type == "slice_by_index"]
    begin, end = [(begin, end) for begin, end in slices if (begin[0], end[0]) == (0, 15)][-1]
    begin[0], end[0] = 1, 16


def crop(operations, weights):              # keeps the last rows instead of the first
    op = [o for o in operations if o.type == "slice_by_index"][-1]
    begin, end, mask = (constant(operations, op, key).immediateValue.tensor for key in ("begin", "end", "end_mask"))
    begin.ints.values[2], end.ints.values[2] = 2, 16
    mask.bools.values[2] = True


def unknown(operations, weights):
    next(o for o in operations if o.type == "silu").type = "softsign"


def declared(operations, weights):
    next(o for o in operations if o.type == "conv").outputs[0].type.tensorType.dimensions[1].constant.size = 95


@pytest.mark.parametrize("which, change, message", [
    *(("package", change, "not the student: worst error .* in float32") for change in (
        repeated(0), repeated(-1), one_late)),
    ("image", crop, "not the student: worst error .* in float32"),
    ("image", unknown, "operation .*softsign.*not one of the operations known"),
    ("image", declared, "damaged, or not written by this program: .*types")])
def test_a_wrong_package_is_found(tiny, tmp_path, request, which, change, message):
    wrong = copy_of(request.getfixturevalue(which), tmp_path / "wrong.mlpackage", change)
    with pytest.raises(ValueError, match=message):
        export.verify(wrong, tiny)


def test_a_result_of_another_shape_than_declared_is_found(image, monkeypatch):
    function = export.read(image).function
    monkeypatch.setitem(export.MIL, "silu", lambda x: x[:, :1])
    with pytest.raises(ValueError, match="silu.*declared is"):
        export.run(function, torch.zeros(tuple(function.inputs["latents"].shape)), fp16=False)


@pytest.mark.parametrize("file", ["Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"])
def test_truncated_files_are_found(tiny, image, tmp_path, file):
    path = copy_of(image, tmp_path / "wrong.mlpackage")
    (path / file).write_bytes((path / file).read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged, or not"):
        export.verify(path, tiny)


def test_a_large_package_is_proven_at_a_smaller_height(tiny, tmp_path, monkeypatch, converted):
    """Also a cropped one; the two have the same operations, and a difference in any of them is found."""
    large = convert(tmp_path / "large.mlpackage", tiny, (188, 16), 1)
    lower = convert(tmp_path / "lower.mlpackage", tiny, (60, 16), 1)
    monkeypatch.setattr(export.CoreML, "limit", 0)
    calls = converted(lower)
    proof = export.prove(large, tiny)
    assert proof["run_at"] == "60x16" and calls == [export.Settings((60, 16), 1)]
    assert proof["float32"]["worst_error"] < 0.005 and proof["fp16"]["worst_error"] < 0.015

    def weight(operations, weights):        # one bit of one weight
        header = constant(operations, next(o for o in operations if o.type == "conv"), "weight").blobFileValue.offset
        weights[int.from_bytes(weights[header + 16:header + 24], "little")] ^= 1

    def wiring(operations, weights):        # adds another branch
        adds = [o for o in operations if o.type == "add"]
        adds[1].inputs["y"].arguments[0].name = adds[0].inputs["y"].arguments[0].name

    def alpha(operations, weights):         # of a norm
        op = next(o for o in operations if o.type == "linear_activation")
        constant(operations, op, "alpha").immediateValue.tensor.floats.values[0] *= 2

    for i, change in enumerate((weight, wiring, repeated(-1), alpha)):
        wrong = copy_of(large, tmp_path / f"{i}.mlpackage", change)
        with pytest.raises(ValueError, match="is not what it is at the smaller size"):
            export.prove(wrong, tiny)


def test_a_package_of_another_student_is_found(tiny, image, monkeypatch):
    torch.manual_seed(0)
    other = TurboVAED(tiny.config)
    same_weights = TurboVAED(replace(tiny.config, drop_first=True))
    same_weights.load_state_dict(tiny.state_dict())
    for student in (other, same_weights):
        with pytest.raises(ValueError, match="exported from other weights, or another configuration"):
            export.verify(image, student)
    metadata = export.read(image).metadata
    monkeypatch.setattr(export, "weights_hash", lambda model: metadata["weights_sha256"])
    with pytest.raises(ValueError, match="not the student"):        # also where the metadata lies
        export.verify(image, other)


def test_core_mls_own_prediction_is_compared_on_a_mac(tiny, image, monkeypatch):
    import coremltools as ct
    assert {"self", "data"} <= set(inspect.signature(ct.models.MLModel.predict).parameters)

    class MLModel:
        def __init__(self, model, compute_units):
            assert model == str(image)
            self.error = shift + (0.3 if compute_units == ct.ComputeUnit.CPU_AND_NE else 0)

        def predict(self, data):
            latents = data["latents"]
            assert latents.shape == (1, 32, 2, 2) and latents.dtype == "float16"
            with torch.no_grad():
                video = tiny(torch.from_numpy(latents).float().transpose(0, 1)[None])[..., :14, :] + self.error
            return {"video": export.frames_first(video).numpy()}

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ct.models, "MLModel", MLModel)
    shift = 0
    proof = export.prove(image, tiny)                   # the engine's is a figure, no bound
    assert proof["core_ml"]["worst_error"] < 0.01 < 0.2 < proof["neural_engine"]["worst_error"]
    shift = 0.1
    with pytest.raises(ValueError, match="in core_ml"):
        export.verify(image, tiny)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def test_the_newest_student_is_exported_proven_and_verified(tiny, image, tmp_path, command, converted, capsys):
    tiny.save_pretrained(tmp_path / "out/run", {"teacher": "tiny"})
    calls = converted(image)
    command(*IMAGE)
    said = capsys.readouterr().out
    assert "out/run/student.safetensors" in said and "proof, fp16: worst error" in said
    path = tmp_path / "out/run/run_4x14x16_engine.mlpackage"
    r = saved(path)
    assert r["proof"]["fp16"]["worst_error"] == pytest.approx(export.verify(path, tiny))
    assert r["operations"] == sum(r["kinds"].values()) and calls == [export.Settings((14, 16), 1)]
    command("--verify", str(path), "--student", str(SHIPPED))
    assert "proof, fp16: worst error" in capsys.readouterr().out


def test_a_package_that_fails_leaves_what_was_there(tiny, image, tmp_path, command, converted, monkeypatch):
    """Whether its proof fails or it cannot be written."""
    tiny.save_pretrained(tmp_path / "out/run", {"teacher": "tiny"})
    converted(image)
    command(*IMAGE)
    files = lambda: {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    good = files()
    with monkeypatch.context() as patch:
        patch.setitem(export.BOUNDS, "fp16", (0, 0))
        with pytest.raises(ValueError, match="the package is not the student"):
            command(*IMAGE)
    assert files() == good

    monkeypatch.setattr(export.CoreML, "write", lambda path, *_: path.mkdir() or (path / "x" / "y").touch())
    with pytest.raises(FileNotFoundError):
        command(*IMAGE)
    assert files() == good and not list((tmp_path / "out/run").glob(".*"))


def test_two_students_of_one_teacher_do_not_share_a_package(tiny, image, tmp_path, command, converted, capsys):
    converted(image)
    tiny.save_pretrained(tmp_path / "a.safetensors")
    tiny.save_pretrained(tmp_path / "out/b/best.safetensors", {"teacher": "a/teacher"})
    for path in ("a.safetensors", "out/b/best.safetensors"):
        command("--student", path, *IMAGE)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mlpackage")} == {
        "out/export/a_4x14x16_engine.mlpackage", "out/export/best_4x14x16_engine.mlpackage"}
    tiny.save_pretrained(tmp_path)
    command("--student", ".", *IMAGE)               # the folder's own name
    assert (tmp_path / f"{tmp_path.name}_4x14x16_engine.mlpackage").is_dir()
    torch.manual_seed(0)
    TurboVAED(tiny.config).save_pretrained(tmp_path / "a.safetensors")
    shutil.copytree(tmp_path / "out/export", tmp_path / "out/run")
    tiny.save_pretrained(tmp_path / "out/run")
    for out in ("out/export", "out/run"):           # also where these are a run's own
        with pytest.raises(ValueError, match="a_4x14x16_engine.mlpackage is another student's: name another folder"):
            command("--student", "a.safetensors", *IMAGE, "--out", out)


def test_a_stop_leaves_no_half_package(tmp_path):
    """SIGTERM, as schedulers send it, while a package is written."""
    code = ("import sys, time, export\n"
            "def slow(path, *_):\n"
            "    path.mkdir(); (path / 'half').touch(); print('saved', flush=True); time.sleep(60)\n"
            "export.CoreML.write = slow\n"
            "sys.argv = ['export.py', '--config', 'tiny', '--random', '--size', '16x16']\n"
            "export.run_command(export.main, '')")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "saved":
        assert process.poll() is None, process.stderr.read()
    assert list((tmp_path / "out/export").iterdir())
    process.terminate()
    assert process.wait(30) != 0 and process.stderr.read().splitlines()[-1] == "error: stopped"
    assert not list((tmp_path / "out/export").iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, command):
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="disk full"):
            command("--config", "tiny", "--random", *IMAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any((tmp_path / "out/export").iterdir())


def test_random_weights_say_so(tmp_path, command, capsys):
    command("--config", "tiny", "--random", *IMAGE, "--out", ".")
    assert "speed only" in export.read(tmp_path / "tiny_random_4x14x16_engine.mlpackage").settings.note
    said = capsys.readouterr().out
    assert "proof, fp16: worst error" in said and "kept off the Neural Engine: none" in said


@pytest.mark.parametrize("flags, message", [
    (["--size", "512x"], "HEIGHTxWIDTH"), (["--size", "0x512"], "HEIGHTxWIDTH"),
    (["--random"], "--config NAME goes with"), (["--config", "ltx"], "--config NAME goes with"),
    (["--latent-frames", "0"], "from 1"), (["--graph", "conv3d"], "invalid choice"),
    (["--stream", "2"], "--stream goes with"), (["--format", "coreai", "--bits", "8"], "--bits goes with"),
    (["--float32"], "--float32 goes without"),
    (["--format", "coreai", "--graph", "engine", "--stream", "2"], "--stream without --graph engine"),
    (["--verify", "x.zip"], "x.zip: a package for phones ends with .mlpackage, .aimodel or .pte"),
    (["--student", "nowhere"], "no such file or folder"),
    (["--config", "tiny", "--random", "--out", "/dev/null/x"], "/dev/null"),
    (["--verify", "nowhere/x.mlpackage"], "no such file or folder"),
    *((["--verify", "nowhere.mlpackage", *flag.split()], "takes the package as it is")
      for flag in ("--bits 4", "--size 512", "--latent-frames 1", "--out x")),
])
def test_wrong_input_says_what_is_wrong_at_once(command, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(export, "export", None)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        command(*flags)
    assert message in (capsys.readouterr().err.splitlines() or [str(error.value)])[-1]
    assert not list(tmp_path.iterdir())


def test_without_coremltools_one_line_says_what_to_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ImportError, match="pip install -r requirements.txt"):
        export.export(tiny, (16, 16), 1, tmp_path / "student.mlpackage")


# ---------------------------------------------------------------------------------------------------------------------
# Core AI and ExecuTorch, each by its own runtime

def settings(size, **more):
    return export.Settings((size, size), **{"latent_frames": 1, **more})


def core_ai(path, student, *arguments, **more):
    """An asset as it is before its proof."""
    pytest.importorskip("coreai_torch")
    export.CoreAI.write(path, student, settings(*arguments, **more))
    return export.read(path)


@pytest.fixture(scope="module")
def stream(tiny, tmp_path_factory):
    pytest.importorskip("coreai_torch")
    return export.export(tiny, (16, 16), 1, tmp_path_factory.mktemp("export") / "a.aimodel", stream=2, float32=True)


@pytest.fixture(scope="module")
def pte(tiny, tmp_path_factory):
    pytest.importorskip("executorch")
    return export.export(tiny, (14, 16), 2, tmp_path_factory.mktemp("export") / "a.pte", float32=True)


def played(asset, calls, states=None):
    return asyncio.run(export.read(asset).play(calls, {} if states is None else states))


@torch.no_grad()
def test_a_stream_gives_every_frame_of_clips_of_any_length(tiny, stream):
    ahead = tiny.reach(0) + 2
    for t in range(ahead, 3 * tiny.reach(0) + 1, 5):        # both remainders
        latents = torch.randn(1, 32, t, 2, 2)
        video = played(stream, export.stream_calls(latents, 2, ahead))
        assert (video - export.frames_first(tiny(latents))).abs().max() < 1e-4


@torch.no_grad()
def test_a_stream_of_a_student_whose_latents_come_in_groups(tmp_path):
    """Its steps are whole groups, so the place of a step's first latent in its group is always the same."""
    model = small("h3", resnets=(0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="groups of 5, and a step takes whole groups"):
        core_ai(tmp_path / "a.aimodel", model, 16, stream=3)
    core_ai(tmp_path / "a.aimodel", model, 16, stream=5, float32=True)
    ahead = model.reach(0) + 5
    for t in (ahead + 10, ahead + 13):
        latents = torch.randn(1, 8, t, 1, 1)
        video = played(tmp_path / "a.aimodel", export.stream_calls(latents, 5, ahead))
        expected = export.frames_first(model(latents))
        assert len(video) == len(expected) and (video - expected).abs().max() < 1e-4


def test_all_functions_share_one_set_of_weights_and_the_report_says_them(tiny, stream, tmp_path):
    core_ai(tmp_path / "one.aimodel", tiny, 16, float32=True)
    size = lambda path: (path / "main.mlirb").stat().st_size
    assert size(stream) < 1.1 * size(tmp_path / "one.aimodel")      # the programs of 2.3 MB of weights; 3 % where there are more
    r = saved(stream)
    assert list(r["functions"]) == ["clip", "begin", "step", "end_0", "end_1"]
    assert "latents" not in r["functions"]["end_0"] and len(r["functions"]["step"]) == 2 + 29
    assert r["proof"]["clip"]["psnr"] > 110 and r["proof"]["stream"]["psnr"] > 110


@torch.no_grad()
def test_a_step_run_twice_a_swapped_state_and_a_wrong_length_show(tiny, stream, monkeypatch):
    ahead = tiny.reach(0) + 2
    latents = torch.randn(1, 32, ahead + 4, 2, 2)
    calls = export.stream_calls(latents, 2, ahead)
    video = export.frames_first(tiny(latents))
    twice = played(stream, [*calls[:2], *calls[1:]])
    assert len(twice) != len(video) and not torch.allclose(twice[:len(video)], video, atol=0.01)
    with pytest.raises(Exception):
        played(stream, export.stream_calls(latents, 3, ahead))
    states = {}
    frames = played(stream, calls[:1], states)
    states["state_1"], states["state_2"] = states["state_2"], states["state_1"]         # of one shape
    frames = torch.cat([frames, played(stream, calls[1:], states)])
    assert not torch.allclose(frames, video, atol=0.01)


def test_a_damaged_asset_or_another_students_is_refused(tiny, stream, tmp_path, monkeypatch):
    other = small("tiny")
    with pytest.raises(ValueError, match="exported from other weights"):
        export.verify(stream, other)
    shutil.copytree(stream, tmp_path / "cut.aimodel")
    program = tmp_path / "cut.aimodel/main.mlirb"
    program.write_bytes(program.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged, or not written"):
        export.verify(program.parent, tiny)
    torch.manual_seed(1)                        # also where the metadata lies
    monkeypatch.setattr(export, "about", lambda student, settings: {})
    with pytest.raises(ValueError, match="not the student"):
        export.verify(stream, TurboVAED(tiny.config))


def test_the_engines_graph_is_float16_throughout(tiny, tmp_path):
    asset = core_ai(tmp_path / "a.aimodel", tiny, 256, graph="engine")
    assert export.about(tiny, asset.settings).items() <= asset.metadata.items()
    r = asset.report()
    assert not r["off_engine_kinds"] and not r["narrow"]


def test_two_sizes_are_one_program_and_other_weights_another(tiny, tmp_path, monkeypatch):
    a, b = (core_ai(tmp_path / f"{n}.aimodel", tiny, n, stream=1) for n in (16, 32))
    assert b.program() == a.program()
    i = next(i for i, line in enumerate(a.lines) if "broadcasting_sub" in line)
    a.lines[i] = re.sub(r"(%\w+), (%\w+)", r"\2, \1", a.lines[i])           # wired another way
    assert b.program() != a.program()
    other = core_ai(tmp_path / "c.aimodel", TurboVAED(CONFIGS["tiny"]), 16, stream=1)
    assert b.program() != other.program()
    monkeypatch.setattr(export.CoreAI, "limit", 0)
    proof = export.prove(tmp_path / "32.aimodel", tiny)
    assert proof["run_at"] == "16x16" and proof["stream"]["psnr"] > 60


def test_a_pte_is_its_student_in_one_delegate(tiny, pte, tmp_path):
    r = saved(pte)
    assert r["kinds"] == {"XNNPACK delegate": 1} and r["proof"]["clip"]["psnr"] > 110
    assert r["functions"]["forward"] == {"latents": "2x32x2x2xf32", "video": "8x3x14x16xf32"}
    assert export.verify(pte, tiny) == r["proof"]["clip"]["worst_error"]
    whole, cut = pte.read_bytes(), tmp_path / "cut.pte"
    for damaged in (whole[:5000], bytes(range(256)) * 20, b""):
        cut.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged, or not written"):
            export.verify(cut, tiny)
    middle = len(whole) // 2
    cut.write_bytes(whole[:middle] + bytes(512) + whole[middle + 512:])
    with pytest.raises(ValueError, match="not the student: worst error"):
        export.verify(cut, tiny)
    with pytest.raises(ValueError, match="exported from other weights"):
        export.verify(pte, small("tiny"))


def test_both_by_the_command_line(tmp_path, command, capsys):
    pytest.importorskip("coreai_torch")
    pytest.importorskip("executorch")
    command("--format", "coreai", "executorch", "--config", "tiny", "--random", *IMAGE, "--out", ".")
    said = capsys.readouterr().out
    assert "proof, clip: worst error" in said and "cat (XNNPACK joins no frame with itself" in said
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tiny_random_4x14x16_coreai_plain.aimodel", "tiny_random_4x14x16_executorch.pte"} <= names
    command("--verify", "tiny_random_4x14x16_executorch.pte", "--config", "tiny", "--random")


@torch.no_grad()
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_twin_for_cpus_computes_the_same_video(name):
    model = small(name)
    twin = export.phone_twin(model, cpu=True)
    for t in (1, 2, 3, 4):
        latents = torch.randn(1, 8, t, 2, 1)
        assert (twin(export.frames_first(latents)) - export.frames_first(model(latents))).abs().max() < 2e-5


def test_without_the_packages_one_line_says_what_to_do(monkeypatch, tmp_path, tiny):
    for name, file in (("coreai_torch", "a.aimodel"), ("executorch.exir", "a.pte")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="pip install .*-r requirements-phones.txt"):
            export.export(tiny, (16, 16), 1, tmp_path / file)
