"""ComfyUI nodes, "Load Turbo-VAED" and "Turbo-VAED Decode": a student in the place of a video model's VAE.

    mkdir ComfyUI/custom_nodes/turbo_vaed
    cp model.py ComfyUI/custom_nodes/turbo_vaed/
    cp examples/comfyui.py ComfyUI/custom_nodes/turbo_vaed/__init__.py

Students go where VAEs do, models/vae: a student.safetensors, or a published .pth. The node streams, one latent frame
at a time: a long clip needs no more of the GPU than a short one, and only its images need more memory.

What latents are between ComfyUI's nodes: its samplers end in a model's `process_out`, which for HunyuanVideo (1.0 and
1.5), CogVideoX, Wan and Qwen-Image undoes the diffusion model's scaling, so they are as the VAE's encoder gave them,
which is what a student wants. For LTX (all releases) `process_out` does nothing: latents stay normalised, and ComfyUI's
VAE undoes that by statistics from its own file, which a student's does not have. So LTX needs the VAE connected too.
"""
import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch

from .model import TurboVAED

WORK = 26       # memory that decoding takes, in outputs of the largest layer for one latent frame: measured on CPUs


class LoadTurboVAED:
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "loaders", "load", ("TURBO_VAED",), ("student",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": (folder_paths.get_filename_list("vae"),)}}

    def load(self, file):
        """The student, in the precision that ComfyUI takes for VAEs on its device, waiting beside it."""
        device = memory.vae_device()
        dtype = memory.vae_dtype(device, [torch.float16, torch.float32])
        student = TurboVAED.from_pretrained(folder_paths.get_full_path("vae", file)).to(device)
        return (student.optimize_for_inference(dtype, compile=False).to(memory.vae_offload_device()),)


class TurboVAEDDecode:
    CATEGORY, FUNCTION, RETURN_TYPES = "latent", "decode", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "student": ("TURBO_VAED",)}, "optional": {"vae": ("VAE",)}}

    @torch.no_grad()
    def decode(self, samples, student, vae=None):
        """Latents (B, C, t, h, w), or images' (B, C, h, w), to images (B T, H, W, 3) in [0, 1], float32, on the CPU.

        vae: the checkpoint's own, for LTX only. Raises ValueError where it is missing, or latents do not fit.
        """
        latents = samples["samples"]
        latents = latents.unbind()[0] if getattr(latents, "is_nested", False) else latents      # LTX-2: and sound
        latents = latents if latents.ndim == 5 else latents.unsqueeze(2)
        student.check(latents.to(next(student.parameters()).dtype))
        if student.config.compression == (8, 32, 32):
            if not hasattr(getattr(vae, "first_stage_model", None), "per_channel_statistics"):
                raise ValueError("LTX latents are normalised in ComfyUI: connect the VAE, which knows by what")
            latents = vae.first_stage_model.per_channel_statistics.un_normalize(latents)
        B, _, t, h, w = latents.shape
        _, d_h, d_w = student.config.compression
        images = torch.empty(B, student.config.frames(t), d_h * h, d_w * w, 3)
        progress = comfy.utils.ProgressBar(B * t)
        weights, device = next(student.parameters()), memory.vae_device()
        work = WORK * weights.element_size() * student.largest(1, h, w)
        memory.free_memory(work + sum(p.nbytes for p in student.parameters()), device)
        student.to(device)
        try:
            for clip, kept in zip(latents.split(1), images):
                done = 0
                for frames in student.stream(self.chunks(clip.to(device, weights.dtype), progress)):
                    kept[done:done + frames.shape[2]] = frames[0].movedim(0, -1).float().add(1).div(2).clamp(0, 1)
                    done += frames.shape[2]
        finally:
            student.to(memory.vae_offload_device())
        return (images.flatten(0, 1),)

    def chunks(self, clip, progress):
        for frame in clip.split(1, dim=2):
            memory.throw_exception_if_processing_interrupted()
            yield frame
            progress.update(1)


NODE_CLASS_MAPPINGS = {"LoadTurboVAED": LoadTurboVAED, "TurboVAEDDecode": TurboVAEDDecode}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadTurboVAED": "Load Turbo-VAED", "TurboVAEDDecode": "Turbo-VAED Decode"}
