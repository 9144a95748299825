"""The benchmark as a user runs it, on the smallest there is; Apple's part against a stand-in for the hardware."""
import inspect
import json
import re
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import bench as module
from conftest import run_script
from model import CONFIGS, SHIPPED, TurboVAED

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench.py's rows for these flags, in this process."""
    def run(*flags):
        small = ["bench.py", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", small + [str(flag) for flag in flags])
        module.main()
        return json.loads((tmp_path / "bench.json").read_text())["rows"]
    return run


def test_student_against_teacher(bench, tmp_path, capsys):
    student, optimized, teacher = bench("--size", "32x40", "--no-compile", "--decode", "--teacher")
    out = capsys.readouterr().out
    assert "the shipped one" in out and "TFLOP/s" in out and "32x40" in out
    assert (student["way"], teacher["way"]) == ("eager", "teacher") and student["frames"] == 16
    assert student["parameters"] < 0.6e6 < 2e6 < teacher["parameters"]
    assert student["flops"] < teacher["flops"] and student["bytes"] < teacher["bytes"]
    for row in (student, teacher):
        assert row["fps"] == pytest.approx(row["frames"] / row["milliseconds"] * 1000) and row["milliseconds"] > 0
        assert row["of_matrix_rate"] > 0 and row["of_copy_rate"] > 0 and row["copy_gb_per_s"] > 0
    assert teacher["speed_up"] == 1 and student["speed_up"] > 0 and optimized["compared_with"] == "teacher"
    assert optimized["flops"] == student["flops"] and optimized["parameters"] == student["parameters"]
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_a_pte_against_pytorch(bench, tmp_path):
    pytest.importorskip("executorch")
    from export import Settings, ExecuTorch
    student = TurboVAED.from_pretrained(SHIPPED)
    ExecuTorch.write(tmp_path / "a.pte", student, Settings((16, 16), 4, float32=True))
    flags = ("--student", SHIPPED, "--size", "16x16", "--no-compile", "--no-teacher", "--pte")
    eager, pte = bench(*flags, tmp_path / "a.pte")
    assert (pte["way"], pte["compared_with"], pte["frames"]) == ("ExecuTorch", "eager", 16) and pte["speed_up"] > 0
    assert pte["parameters"] == eager["parameters"] and pte["flops"] == eager["flops"]
    for more, message in ((["bench.json"], "damaged, or not written by this program"),
                          (["a.pte", "--dtype", "float16"], "takes torch.float32 of .*, not torch.float16"),
                          (["a.pte", "--frames", "4"], r"of \(4, .*, not .* of \(1, ")):
        with pytest.raises(ValueError, match=message):
            bench(*flags, tmp_path / more[0], *more[1:])
    with pytest.raises(ValueError, match="is not the student's: PSNR"):
        bench("--config", "tiny", *flags[2:], tmp_path / "a.pte")


def test_eager_against_compiled_and_without_a_compiler(bench, monkeypatch, capsys):
    compiled, real = [], torch.compile

    def no_compiler(latents):
        raise RuntimeError("no C++ compiler. Long advice")

    def compile(model, **how):
        compiled.append(how)
        return real(model, backend="eager", **how) if len(compiled) == 1 else no_compiler

    monkeypatch.setattr(torch, "compile", compile)
    rows = bench("--config", "tiny", "--size", "16x16", "24x24")
    assert [(row["way"], row["height"]) for row in rows] == [("eager", 16), ("compiled", 16), ("eager", 24)]
    assert compiled[0]["fullgraph"] and rows[0]["speed_up"] == 1 and rows[1]["compared_with"] == "eager"
    assert capsys.readouterr().err.strip() == "tiny does not compile here: RuntimeError: no C++ compiler"


def test_streamed_against_whole(bench, monkeypatch):
    stream = ("--config", "tiny", "--stream", "--rounds", "1")
    streamed, whole = bench(*stream, "--size", "64x64", "--lengths", "25", "--chunk", "2")
    assert [streamed["way"], whole["way"], streamed["latents"], streamed["frames"]] == ["streamed", "whole", 25, 100]
    assert streamed["delay"] == 13 and 0 < streamed["first_milliseconds"] < streamed["milliseconds"]
    assert streamed["speed_up"] > 0 and streamed["peak_gb"] < whole["peak_gb"]
    rows = bench(*stream, "--decode", "--no-compile", "--size", "16x16", "--lengths", "3", "2")
    assert [row["way"] for row in rows] == 2 * ["streamed", "streamed, optimized", "whole"]
    monkeypatch.setattr(module, "WORK", 10 ** 9)          # so much memory is nowhere
    assert [row["way"] for row in bench(*stream, "--size", "16x16", "--lengths", "3")] == ["streamed"]


def test_speed_ups_survive_a_busy_machine():
    """The neighbour who slows a turn slows all of it: twice as fast stays twice as fast."""
    busy = [1, 1, 7, 3, 1, 9, 4]
    seconds = {"teacher": [2 * n for n in busy], "eager": [1 * n for n in busy], "matrix": [0.5 * n for n in busy],
               "copy": busy}
    work = types.SimpleNamespace(flops=10, moved=3)
    row = module.timing_row(seconds, "eager", 16, "teacher", work, {"matrix": 20, "copy": 6})
    assert row["speed_up"] == 2 and row["milliseconds"] == 3000 and row["fps"] == pytest.approx(16 / 3)
    assert row["of_matrix_rate"] == pytest.approx(10 / 20 * 0.5) and row["of_copy_rate"] == pytest.approx(3 / 6)


def test_turns_alternate_and_stop_in_time():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = module.take_turns(runs, torch.device("cpu"), rounds=4)
    assert order == ["a", "b"] * (4 + module.WARM_UP) and all(len(spent) == 4 for spent in seconds.values())
    assert len(module.take_turns(runs, torch.device("cpu"), budget=0)["a"]) == 5
    assert len(module.take_turns(runs, torch.device("cpu"))["a"]) == 200


@pytest.mark.parametrize("name, shape, tflop, gigabytes", [
    ("ltx", (3, 16, 16), 0.813, 1.0), ("ltx", (3, 23, 40), 2.92, 3.4), ("dc", (4, 16, 16), 1.25, 1.4),
    ("dc", (4, 23, 40), 4.49, 4.7), ("hunyuan", (5, 64, 64), 6.60, 8.6), ("hunyuan", (5, 90, 160), 23.2, 30.2)])
def test_arithmetic_and_bytes_of_the_family_in_half_precision(name, shape, tflop, gigabytes):
    config = CONFIGS[name]
    with torch.device("meta"):
        student, latents = TurboVAED(config).half(), torch.empty(1, config.latent_channels, *shape, dtype=torch.half)
    work = module.count_work(lambda: student(latents))
    assert work.flops / 1e12 == pytest.approx(tflop, rel=0.005)
    assert work.moved / 1e9 == pytest.approx(gigabytes, rel=0.03)


@pytest.mark.skipif(sys.platform != "linux", reason="the process's high-water mark is read from /proc")
def test_peak_memory_counts_what_a_run_allocates_at_once():
    cpu = torch.device("cpu")
    one = lambda: torch.ones(80_000_000)                                    # 0.32 GB
    two, after_each_other = lambda: [one(), one()], lambda: [one().sum(), one().sum()]
    for run, weights, gigabytes in ((two, 0, 0.64), (one, 0, 0.32), (after_each_other, 0, 0.32), (one, 10 ** 9, 1.32)):
        assert module.peak_memory(run, cpu, weights)["peak_gb"] == pytest.approx(gigabytes, abs=0.02)


def test_latency_by_block_adds_up(bench, tmp_path):
    rows = bench("--blocks", "--config", "tiny", "--size", "32x32", "--rounds", "3")
    assert [row["way"] for row in rows] == ["decoupled", "pixel_shuffle_3d", "interpolate"]
    of_whole = []
    for row in rows:
        blocks = row["blocks"]
        parts = [blocks[part] for part in ("conv_in", "mid", "up0", "up1", "up2", "up3", "out")]
        assert min(parts) > 0 and sum(row["shares"][part] for part in module.PARTS) == pytest.approx(1)
        of_whole.append(sum(parts) / row["milliseconds"])
        upsamplers = {part: time for part, time in blocks.items() if part.endswith(" upsampler")}
        assert list(upsamplers) == ["up1 upsampler", "up2 upsampler", "up3 upsampler"]
        assert blocks["upsamplers"] == pytest.approx(sum(upsamplers.values())) and blocks["upsamplers"] < sum(parts)
    assert sorted(of_whole)[1] == pytest.approx(1, rel=0.4)         # one of three may meet a busy machine
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_marks_span_the_decode_in_order():
    student = TurboVAED(CONFIGS["ltx"])
    marks = module.mark_blocks(student, torch.device("cpu"))
    with torch.no_grad():
        student(torch.randn(1, 128, 1, 1, 1))
    parts, moments = zip(*marks)
    assert parts == ("start", "conv_in", "mid", "up0", "up1", "up1 upsampler", "up1", "up2", "up2 upsampler", "up2",
                     "up3", "up3 upsampler", "up3", "out") and list(moments) == sorted(moments)


def bench_after(statements, cwd, *flags):
    """`python bench.py FLAGS` by an interpreter that has run these statements."""
    code = (f"import resource, runpy, sys; {statements}; sys.path.insert(0, {str(ROOT)!r}); "
            f"runpy.run_path({str(ROOT / 'bench.py')!r}, run_name='__main__')")
    small = ("--rounds", "1", "--size", "16x16", "--device", "cpu", "--no-compile")
    return subprocess.run([sys.executable, "-c", code, *small, *flags], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["--config", "tiny", "ltx"], []])
def test_students_need_pytorch_alone_and_what_lacks_a_package_says_so(tmp_path, flags):
    names = {line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()} - {"torch"}
    names |= {"coremltools", "safetensors", "numpy", "PIL"}
    result = bench_after(f"sys.modules.update(dict.fromkeys({names}))", tmp_path, *flags)
    if flags:
        assert result.returncode == 0 and "no bench.png: matplotlib is not installed" in result.stdout, result.stderr
        rows = json.loads((tmp_path / "out/bench/bench.json").read_text())["rows"]
        assert [row["model"] for row in rows] == ["tiny", "ltx"]
    else:
        assert result.returncode == 1 and re.search(r"^error: .*safetensors.*\n\Z", result.stderr, re.M)


@pytest.mark.parametrize("name, limit", [("bench.json", 100), ("bench.png", 8000)])
def test_a_full_disk_is_one_line_and_leaves_all_that_was_there(tmp_path, name, limit):
    (tmp_path / "bench.json").write_text("old")
    full = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = bench_after(full, tmp_path, "--config", "tiny", "--out", ".")
    assert done.returncode == 1 and re.fullmatch(r"error: .*File too large\n", done.stderr), done.stderr
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("bench.json", "old")]


def test_the_student_asked_for_is_timed_and_labelled_by_what_is_decoded(bench, tmp_path, capsys):
    torch.save(TurboVAED(CONFIGS["wan21"]).state_dict(), tmp_path / "plain.pth")
    row, = bench("--student", tmp_path / "plain.pth", "--config", "wan21", "--no-teacher", "--no-compile",
                 "--size", "20x9", "--frames", "8")
    assert row["model"] == "wan21" and row["parameters"] == 20212771
    assert (row["frames"], row["height"], row["width"]) == (5, 24, 16) and "5x24x16" in capsys.readouterr().out
    streamed, _ = bench("--student", SHIPPED, "--config", "tiny", "--stream", "--lengths", "2", "--size", "20x9")
    assert (streamed["frames"], streamed["height"], streamed["width"]) == (8, 24, 16)


@pytest.mark.parametrize("flags, words", [
    (["--student", "x", "--config", "tiny", "dc"], "one --config"), (["--device", "mps"], "cuda"),
    (["--student", "x", "--blocks"], "without --blocks"),
    (["--blocks", "--decode"], "without --blocks"), (["--stream", "--frames", "9"], "--stream goes without"),
    (["--size", "0x9"], "HEIGHTxWIDTH"), (["--rounds", "0"], "from 1"), (["--frames", "0"], "from 1"),
    (["--iphone"], "--team"), (["--team", "x", "--mlpackage"], "--iphone and --team"),
    (["--chunk", "2"], "go with --stream"), (["--blocks", "--lengths", "2"], "go with --stream"),
    (["--stream", "--config", "tiny", "--teacher"], "--stream goes without"),
    (["--stream", "--blocks"], "without each other"), (["--blocks", "--mlpackage"], "without each other"),
    (["--pte", "x.pte", "--stream"], "without each other"), (["--pte", "x.pte", "--blocks"], "without each other")])
def test_wrong_flags_are_one_line(bench, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        bench(*flags)
    assert error.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags, words", [
    (["--frames", "3"], "--frames 3: tiny decodes 4 or more"), (["--device", "cuda:99"], "(NVIDIA|CUDA|cuda)"),
    (["--out", "file"], "File exists: 'file'"), (["--student", "nowhere"], "nowhere"),
    *((flags, "macOS.*Xcode.*iPhone.*export.py") for flags in
      (["--iphone", "--team", "ABC"], ["--mlpackage"], ["--mlpackage", "x.mlpackage"]) if sys.platform != "darwin")])
def test_what_cannot_be_measured_is_one_line(tmp_path, flags, words):
    (tmp_path / "file").touch()
    result = run_script("bench", "--size", "16", "--rounds", "1", "--device", "cpu", *flags, cwd=tmp_path)
    assert result.returncode == 1 and re.fullmatch(f"error: .*{words}.*\n", result.stderr), result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Apple hardware. The stand-in is the lowest layer that needs it: what loads a model and predicts, on this Mac or on a
# phone. coremltools' MLModelBenchmarker above it is the real one.

class Apple:
    """Puts itself in the place of Core ML and of a connected iPhone, with coremltools' signatures."""

    def __init__(self, monkeypatch):
        import coremltools
        from coremltools.models import compute_device, compute_plan
        from coremltools.models.ml_program.experimental import async_wrapper, remote_device
        self.coremltools, self.remote, self.monkeypatch = coremltools, remote_device, monkeypatch
        self.loaded, self.prepared, self.phones, self.crash_on, apple = [], [], [], None, self
        made = lambda kind: object.__new__(kind)            # outside macOS their constructors refuse
        self.units = {"tile": made(compute_device.MLNeuralEngineComputeDevice),
                      "cast": made(compute_device.MLCPUComputeDevice)}

        class Plan:
            def __init__(self, spec):
                plan, program = compute_plan, spec.mlProgram.functions["main"].block_specializations["CoreML7"]
                operations = [plan.MLModelStructureProgramOperation(
                    inputs={}, operator_name=op.type, blocks=[], __proxy__=None,
                    outputs=[plan.MLModelStructureProgramNamedValueType(name=o.name, type=None) for o in op.outputs])
                    for op in program.operations]
                block = plan.MLModelStructureProgramBlock(inputs=[], operations=operations, output_names=["video"])
                function = plan.MLModelStructureProgramFunction(inputs=[], block=block)
                program = plan.MLModelStructureProgram(functions={"main": function})
                self.model_structure = plan.MLModelStructure(neuralnetwork=None, program=program, pipeline=None)

            def get_compute_device_usage_for_mlprogram_operation(self, operation):
                unit = apple.units.get(operation.operator_name)
                return unit and compute_plan.MLComputePlanDeviceUsage(
                    preferred_compute_device=unit, supported_compute_devices=[unit])

            def get_estimated_cost_for_mlprogram_operation(self, operation):
                weight = {"tile": 0.6, "cast": 0.2}.get(operation.operator_name)        # of two casts; a constant: none
                return weight and compute_plan.MLComputePlanCost(weight=weight)

        class Wrapper(async_wrapper.MLModelAsyncWrapper):
            load_duration_in_nano_seconds = 5_000_000
            last_predict_duration_in_nano_seconds = None

            async def load(self):
                apple.loaded.append((self.compute_units.name, self.device))

            async def unload(self):
                pass

            async def predict(self, inputs, state=None):
                assert inputs["latents"].shape == (2, 32, 4, 5) and inputs["latents"].dtype == "float32"
                if self.compute_units.name == apple.crash_on:
                    if self.device:
                        self.device.session.alive = False
                    raise RuntimeError("out of memory. And more than one line\nof it")
                first = self.last_predict_duration_in_nano_seconds is None
                self.last_predict_duration_in_nano_seconds = 99_000_000 if first else 20_000_000    # the first warms up

            async def retrieve_compute_plan(self):
                return Plan(self.spec_or_path)

            def make_state_if_needed(self):
                return None

        class Session:
            alive = True

            def is_alive(self):
                return self.alive

        def from_spec_or_path(spec_or_path, weights_dir, compute_units=coremltools.ComputeUnit.ALL, function_name=None,
                              optimization_hints=None, device=None):
            wrapper = Wrapper(spec_or_path, weights_dir, compute_units, function_name, optimization_hints)
            wrapper.device = device
            return wrapper

        async def prepare_for_model_debugging(self, credentials=None, working_directory=None, clean=False):
            assert working_directory.is_dir()
            apple.prepared.append(credentials)
            return remote_device.Device(**{**vars(self), "session": Session()})

        for kind, real in ((Plan, compute_plan.MLComputePlan), (Wrapper, async_wrapper.RemoteMLModelAsyncWrapper),
                           (Wrapper, async_wrapper.LocalMLModelAsyncWrapper), (Session, remote_device._AppSession)):
            for name, function in vars(kind).items():
                if inspect.isfunction(function) and name != "__init__":
                    self.same_signature(function, getattr(real, name))
        self.put(async_wrapper.MLModelAsyncWrapper, "from_spec_or_path", from_spec_or_path, staticmethod)
        self.put(remote_device.Device, "get_connected_devices",
                 lambda device_type: [p for p in self.phones if p.type == device_type], staticmethod)
        self.put(remote_device.Device, "prepare_for_model_debugging", prepare_for_model_debugging)
        monkeypatch.setattr(remote_device._DeviceCtlRemoteService, "__init__",
                            remote_device._DeviceCtlRemoteService.__init__)  # put back
        monkeypatch.setattr(module, "sys", types.SimpleNamespace(platform="darwin", argv=["bench.py"]))

    def same_signature(self, ours, real):
        shape = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        assert shape(ours) == shape(real), f"coremltools' {real.__qualname__} has changed"
        assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(real)

    def put(self, owner, name, function, wrap=lambda f: f):
        self.same_signature(function, getattr(owner, name))
        self.monkeypatch.setattr(owner, name, wrap(function))

    def connect(self):
        remote = self.remote
        self.phones.append(remote.Device(
            name="Phone", type=remote.DeviceType.IPHONE, identifier="i", udid="u", os_version="18.1",
            os_build_number="b", developer_mode_state="enabled", state=remote.DeviceState.CONNECTED, session=None))


@pytest.fixture
def apple(monkeypatch):
    pytest.importorskip("coremltools")
    return Apple(monkeypatch)


def make_package(path, **metadata):
    """A package with the inputs and outputs that export.py gives: latents (2, 32, 4, 5) to video (8, 3, 32, 40)."""
    coremltools = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 32, 4, 5))], opset_version=coremltools.target.iOS17)
    def program(latents):
        return mb.tile(x=mb.slice_by_size(x=latents, begin=[0] * 4, size=[2, 3, 4, 5]), reps=[4, 1, 8, 8], name="video")

    model = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17, skip_model_load=True)
    model.user_defined_metadata.update(metadata)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("packages") / "tiny.mlpackage")


def test_a_package_on_every_compute_unit_of_a_mac(bench, apple, package, tmp_path, capsys):
    rows = bench("--mlpackage", str(package), "--rounds", "3")
    assert [row["way"] for row in rows] == ["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]
    assert {unit for unit, device in apple.loaded} == {unit.name for unit in apple.coremltools.ComputeUnit}
    assert all(device is None for _, device in apple.loaded) and not apple.prepared
    for row in rows:
        assert (row["frames"], row["height"], row["width"], row["rounds"]) == (8, 32, 40, 3)
        assert row["milliseconds"] == pytest.approx(20) and row["fps"] == pytest.approx(400)
        assert row["load_milliseconds"] == 5 and row["operations"] == 3
        assert row["units"] == {"NeuralEngine": pytest.approx(0.6), "CPU": pytest.approx(0.4)}
        assert [(op["operation"], op["unit"]) for op in row["slowest"]] == [
            ("tile", "NeuralEngine"), ("cast", "CPU"), ("cast", "CPU")]
    out = capsys.readouterr().out
    assert "NeuralEngine 60%, CPU 40%" in out and "tile video" in out and (tmp_path / "bench.png").exists()


def test_packages_stand_beside_the_papers_figures(bench, apple, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(module.PAPER["paper_iphone"], "ltx 32x40", 161.8)
    said = dict(config=json.dumps(asdict(CONFIGS["ltx"])))
    paths = [make_package(tmp_path / "a.mlpackage", **said), make_package(tmp_path / "b.mlpackage")]
    rows = bench("--mlpackage", *map(str, paths))
    assert [row.get("paper_iphone") for row in rows] == [161.8] * 4 + [None] * 4 and "paper_a100" not in rows[0]
    out = capsys.readouterr().out
    assert out.count("161.8") == 4 and "SnapGen-V 31.5, H3AE 38.1" in out and "195.4" not in out


@pytest.mark.parametrize("where, name, size, speed", [
    ("paper_iphone", "ltx", (720, 1280), 38.1), ("paper_a100", "dc", (512, 512), 552.5),
    ("paper_iphone", "cog", (512, 512), 10.6), ("paper_iphone", "cog", (720, 1280), None),
    ("paper_a100", "tiny", (512, 512), None)])
def test_the_papers_figures_are_those_of_its_tables(where, name, size, speed):
    assert module.paper_speed(where, name, *size) == ({where: speed} if speed else {})


def test_a_package_on_a_phone(bench, apple, package, tmp_path, monkeypatch):
    apple.connect()
    (tmp_path / "out/tiny").mkdir(parents=True)
    (tmp_path / "out/tiny/tiny.mlpackage").symlink_to(package)
    monkeypatch.chdir(tmp_path)
    rows = bench("--iphone", "--team", "TEAM123")
    assert [(row["fps"], row["device"]) for row in rows] == [(pytest.approx(400), "Phone, iOS 18.1")] * 4
    assert all(device.name == "Phone" and device.session for _, device in apple.loaded)
    credentials, = apple.prepared       # once for all
    assert credentials.development_team == "TEAM123" and "team123" in credentials.bundle_identifier
    assert inspect.signature(apple.remote._DeviceCtlRemoteService).parameters["max_attempts"].default == 200


def test_a_unit_that_fails_is_one_row_and_the_phone_is_prepared_again(bench, apple, package, tmp_path, capsys):
    apple.connect()
    apple.crash_on = "CPU_AND_NE"
    rows = bench("--iphone", "--team", "TEAM123", "--mlpackage", str(package))
    assert ["error" in row for row in rows] == [False, True, False, False] and len(apple.prepared) == 2
    assert rows[1]["error"] == "RuntimeError: out of memory" and rows[2]["fps"] == pytest.approx(400)
    assert "tiny.mlpackage on CPU_AND_NE" in capsys.readouterr().out


def test_what_keeps_a_package_from_being_timed_is_one_line(bench, apple, package, tmp_path, monkeypatch):
    for flags, words in ((["--mlpackage", "nowhere.mlpackage"], "nowhere.mlpackage: no such package"),
                         (["--iphone", "--team", "T", "--mlpackage", str(package)], "none is connected.*team T")):
        with pytest.raises((ValueError, OSError), match=words):
            bench(*flags)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="python export.py"):
        bench("--mlpackage")
    apple.crash_on = "ALL"
    monkeypatch.setattr(module, "UNITS", ("ALL",))
    with pytest.raises(ValueError, match="nothing could be measured; ALL: RuntimeError: out of memory"):
        bench("--mlpackage", str(package))


@pytest.mark.parametrize("script", ["results.bench_training", "results.family", "assets.findings",
                                    "assets.train_tiny_teacher", "examples.generate"])
def test_what_uses_the_program_from_outside_still_finds_its_parts(script):
    ran = run_script(script, "--help", cwd=ROOT)
    assert ran.returncode == 0 and "usage" in ran.stdout, ran.stderr
