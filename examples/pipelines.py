"""A student in the place of the decoder of a diffusers pipeline.

    from examples.pipelines import use_student      # or copy this file and model.py side by side
    use_student(pipe, student)                      # any pipeline of that VAE, modular ones too, or the VAE itself
    video = pipe("a cat").frames                    # decoded by the student
    use_student(pipe, None)                         # the pipeline's own decoder again
"""
import copy
import warnings

import torch

from model import TurboVAED, channels_last, check_fit

# diffusers' classes of the teachers' VAEs
VAES = {"AutoencoderKLLTXVideo": ("ltx", "ltx095"), "AutoencoderKLHunyuanVideo": ("hunyuan",),
        "AutoencoderKLCogVideoX": ("cog",), "AutoencoderKLWan": ("wan21", "wan22"),
        "AutoencoderKLLTX2Video": ("ltx2", "ltx23"), "AutoencoderKLHunyuanVideo15": ("hunyuan15",),
        "AutoencoderKLQwenImage": ("qwen",), "AutoencoderKLMiniMaxH3": ("h3",),
        "LTX2VideoDiffusionDecoderModel": ("ltx25",)}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean and standard deviation: H3's VAE gives such pixels


def teachers_of(vae):
    """Names of the teachers whose latents a diffusers VAE has; empty where it is not known here."""
    names = next((VAES[kind.__name__] for kind in type(vae).__mro__ if kind.__name__ in VAES), ())
    if "ltx" in names:          # one class, latents of one shape, two encoders: the second came with 0.9.5
        return names["LTXVideo095DownBlock3D" in vae.config.down_block_types:][:1]
    if "ltx2" in names:         # the same: LTX-2.3's decoder has a block more
        return names[len(vae.config.decoder_layers_per_block) > 4:][:1]
    if "wan21" in names:        # 2.2's alone has residual stages
        return names[bool(vae.config.is_residual):][:1]
    return names


def check_vae(student, vae):
    """Raise ValueError unless `student` decodes this diffusers VAE's latents; warn of what is not known."""
    config = vae.config
    facts = {**vars(vae), **{name: value for name, value in config.items() if value}}
    time = facts.get("scale_factor_temporal") or facts.get("temporal_compression_ratio")
    space = (facts.get("scale_factor_spatial") or facts.get("spatial_compression_ratio")
             or 2 ** (len(facts.get("block_out_channels", ())) - 1))            # CogVideoX's does not say
    channels = facts.get("latent_channels") or facts.get("z_dim")
    compression = (time, space, space) if time and space >= 1 else None
    images = facts.get("tokens_chunk_size", True)       # H3's
    assumed = check_fit(student, f"this {type(vae).__name__}", teachers_of(vae), channels, compression, images)
    if assumed:
        warnings.warn(assumed, stacklevel=3)
    if config.get("timestep_conditioning"):
        warnings.warn("this VAE's pipelines mix noise into the latents before decoding where decode_timestep or "
                      "decode_noise_scale is not 0, and the student does not take it out: call them with "
                      "decode_noise_scale=0.0", stacklevel=3)


def use_student(pipe_or_vae, student):
    """Put `student` in the place of the decoder of a diffusers pipeline or VAE, so that `pipe(...)` decodes through it.

    Only `decode` changes, that of `pipe.vae` and, in LTX-2.5, of `pipe.diffusion_decoder`: to a StudentDecoder with a
    copy of the student. student None puts back what decoded before. Returns pipe_or_vae.

    Raises ValueError if the student decodes other latents than this VAE's, TypeError if there is no VAE. Warns where
    the student's file does not say whose latents it decodes, and where the pipeline will mix noise into them.
    """
    student = getattr(student, "_orig_mod", student)        # under torch.compile; optimize_for_inference stays
    parts = [pipe_or_vae, *(getattr(pipe_or_vae, name, None) for name in ("vae", "diffusion_decoder"))]
    vaes = [getattr(part, "_orig_mod", part) for part in parts      # under torch.compile
            if hasattr(part, "decode") and hasattr(getattr(part, "config", None), "items")]
    if not vaes or not isinstance(student, TurboVAED | None):
        raise TypeError(f"takes a pipeline or VAE and a TurboVAED, or None for its own decoder; "
                        f"not a {type(pipe_or_vae).__name__} and a {type(student).__name__}")
    for vae in vaes if student else ():
        check_vae(student, vae)
    for vae in vaes:
        before = vars(vae).pop("decode", None)
        before = before.before if isinstance(before, StudentDecoder) else before
        if student or before:
            vae.decode = StudentDecoder(vae, student, before) if student else before
    return pipe_or_vae


class StudentDecoder:
    """A VAE's `decode` by a copy of a student. `before` is what another tool had put there.

    It decodes in the latents' own precision and on their device; after `vae.enable_tiling()` one latent frame at a
    time, which is exact too. Where the pipeline's models are offloaded, it takes part.
    """

    def __init__(self, vae, student, before):
        self.vae, self.before, self.teachers = vae, before, teachers_of(vae)
        self.student = self.placed = copy.deepcopy(student).eval()      # the caller's own keeps its precision and place

    @torch.no_grad()
    def __call__(self, z, *conditioning, return_dict=True, **more):     # a timestep, a generator: not needed
        h3, t, hook = "h3" in self.teachers, z.shape[2], getattr(self.vae, "_hf_hook", None)
        if h3:          # whose pipeline leaves precision to the VAE, and whose tiling is on from the beginning
            z = z.to(self.vae.post_quant_conv.weight.dtype)
        if "cog" in self.teachers and t % 2 == 0:
            warnings.warn(f"CogVideoX's VAE makes {4 * t} frames of {t} latents, its student {4 * t - 3}")
        if not torch.compiler.is_compiling():
            if hook:                            # as diffusers' own decode calls it
                hook.pre_forward(self.placed)
            if self.placed.dtype != z.dtype:    # always from the precision that it came in
                self.placed = copy.deepcopy(self.student).to(z.device, z.dtype)
            self.placed.to(z.device)
            if z.is_cuda:
                self.placed.channels_last()
        video = self.placed.decode(z, chunk=1 if getattr(self.vae, "use_tiling", False) and not h3 else None)
        if hook:
            self.placed.to("cpu")
        if h3:
            mean, std = video.new_tensor(IMAGENET).view(2, 3, 1, 1, 1)
            video = (video.add(1).div(2) - mean) / std
        if not return_dict or any(given is False for given in conditioning):
            return (video,)
        from diffusers.models.autoencoders.vae import DecoderOutput
        return DecoderOutput(sample=video)
