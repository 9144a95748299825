"""The ComfyUI nodes of examples/, installed as their file says, against a stand-in of what they touch of ComfyUI."""
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model import CONFIGS, TurboVAED

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The module as ComfyUI makes it of custom_nodes/turbo_vaed, and what it asked ComfyUI for."""
    asked = []
    parts = {name: ModuleType(name) for name in ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")}
    memory, utils, paths = parts["comfy.model_management"], parts["comfy.utils"], parts["folder_paths"]
    memory.vae_device = memory.vae_offload_device = lambda: torch.device("cpu")
    memory.vae_dtype = lambda device, allowed: torch.float32
    memory.free_memory = lambda size, device: asked.append(("free", size))
    memory.throw_exception_if_processing_interrupted = lambda: asked.append(("go on?",))
    utils.ProgressBar = lambda total: SimpleNamespace(update=lambda n: asked.append(("done", n, total)))
    paths.get_filename_list = lambda kind: [f.name for f in (tmp_path / kind).iterdir()]
    paths.get_full_path = lambda kind, name: str(tmp_path / kind / name)
    parts["comfy"].model_management, parts["comfy"].utils = memory, utils
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    folder, name = tmp_path / "custom_nodes" / "turbo_vaed", "custom_nodes/turbo_vaed"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "model.py", folder)
    shutil.copy(ROOT / "examples" / "comfyui.py", folder / "__init__.py")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    module.asked, module.folder = asked, tmp_path / "vae"
    yield module
    sys.modules.pop(f"{name}.model", None)


def student_of(name):
    torch.manual_seed(0)
    config = CONFIGS[name]
    widths = (8, 8, 8, 8, 4 * config.patch ** 2)
    model = TurboVAED(replace(config, latent_channels=4, widths=widths, resnets=(1, 1, 1, 1, 1))).eval()
    model.metadata["teacher"] = name
    return model


def through(nodes, model, latents, **more):
    """The workflow: the file that is listed is loaded, and decodes."""
    model.save_pretrained(nodes.folder / "mine.safetensors")
    load, decode = nodes.NODE_CLASS_MAPPINGS["LoadTurboVAED"], nodes.NODE_CLASS_MAPPINGS["TurboVAEDDecode"]
    (files,) = load.INPUT_TYPES()["required"]["file"]
    (student,) = getattr(load(), load.FUNCTION)(file=files[0])
    assert load.RETURN_TYPES == decode.INPUT_TYPES()["required"]["student"] and decode.RETURN_TYPES == ("IMAGE",)
    (images,) = getattr(decode(), decode.FUNCTION)(samples={"samples": latents}, student=student, **more)
    return images


def whole(model, latents):
    """What ComfyUI's own decode makes of a whole video: all clips' frames in a row, (H, W, 3) in [0, 1]."""
    with torch.no_grad():
        return model(latents).add(1).div(2).clamp(0, 1).movedim(1, -1).flatten(0, 1)


@pytest.mark.parametrize("name", ["wan21", "hunyuan15", "dc", "h3"])
@pytest.mark.parametrize("shape", [(1, 4, 7, 2, 3), (2, 4, 3, 1, 2), (1, 4, 1, 2, 2)])
def test_one_latent_frame_at_a_time_gives_the_images_of_the_whole(nodes, name, shape):
    model, latents = student_of(name), 3 * torch.randn(shape)
    images = through(nodes, model, latents)
    assert images.dtype == torch.float32 and images.device.type == "cpu" and images.min() >= 0 and images.max() <= 1
    assert len(images) == shape[0] * model.config.frames(shape[2])
    torch.testing.assert_close(images, whole(model, latents), atol=1e-5, rtol=0)


def test_no_more_than_one_latent_frame_is_decoded_at_a_time(nodes, monkeypatch):
    seen = []
    plain = nodes.TurboVAED.stream
    watched = lambda self, chunks: plain(self, (seen.append(x.shape) or x for x in chunks))
    monkeypatch.setattr(nodes.TurboVAED, "stream", watched)
    through(nodes, student_of("wan21"), torch.randn(2, 4, 6, 1, 2))
    assert seen == [(1, 4, 1, 1, 2)] * 12
    assert [a for a in nodes.asked if a[0] == "done"] == [("done", 1, 12)] * 12        # the progress bar
    assert sum(a == ("go on?",) for a in nodes.asked) == 12                            # may be stopped in between


def test_images_latents_have_no_time(nodes):
    """Qwen-Image's, say: a batch of pictures, each its own clip."""
    model, latents = student_of("qwen"), torch.randn(3, 4, 2, 3)
    images = through(nodes, model, latents)
    assert images.shape == (3, 16, 24, 3)
    torch.testing.assert_close(images, whole(model, latents.unsqueeze(2)), atol=1e-5, rtol=0)


class Statistics:
    mean, std = torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1), torch.linspace(0.5, 2, 4).view(1, 4, 1, 1, 1)

    def un_normalize(self, x):
        return x * self.std + self.mean


def test_ltx_latents_are_normalised_and_the_vae_undoes_it(nodes):
    model, latents, statistics = student_of("ltx23"), torch.randn(1, 4, 2, 1, 2), Statistics()
    vae = SimpleNamespace(first_stage_model=SimpleNamespace(per_channel_statistics=statistics))
    want = whole(model, statistics.un_normalize(latents))
    torch.testing.assert_close(through(nodes, model, latents, vae=vae), want, atol=1e-5, rtol=0)
    with_sound = SimpleNamespace(is_nested=True, unbind=lambda: (latents, torch.randn(1, 8, 5, 16)))
    torch.testing.assert_close(through(nodes, model, with_sound, vae=vae), want, atol=1e-5, rtol=0)
    for other in (None, SimpleNamespace(first_stage_model=SimpleNamespace())):
        with pytest.raises(ValueError, match="LTX latents are normalised in ComfyUI: connect"):
            through(nodes, model, latents, vae=other)


def test_other_latents_are_one_line(nodes):
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, t, h, w\), got \(1, 16, 2, 1, 1\)"):
        through(nodes, student_of("wan21"), torch.randn(1, 16, 2, 1, 1))


def test_a_stop_leaves_the_student_off_the_gpu(nodes, monkeypatch):
    student, moves = student_of("wan21"), []
    monkeypatch.setattr(type(student), "to", lambda self, *where: moves.append(where) or self)
    memory = sys.modules["comfy.model_management"]
    memory.vae_device, memory.vae_offload_device = lambda: "cpu", lambda: "meta"
    memory.throw_exception_if_processing_interrupted = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        nodes.TurboVAEDDecode().decode({"samples": torch.randn(1, 4, 2, 1, 1)}, student)
    assert moves == [("cpu",), ("meta",)]
