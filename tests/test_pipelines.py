"""A student in the place of the decoder of diffusers' pipelines and VAEs, of small random parts."""
import copy
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import CONFIGS, TurboVAED

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from pipelines import use_student                                                       # noqa: E402
from test_model import (MICRO, graphs, narrow, no_gradients, on_meta, one_line, published,     # noqa: E402, F401
                        seeded)


def tiny_pipeline(name):
    """(a diffusers pipeline of tiny random parts, what to call it with, a student of its VAE's latents)."""
    pytest.importorskip("transformers")
    import diffusers
    torch.manual_seed(0)
    common = dict(num_inference_steps=2, output_type="pt", prompt_embeds=torch.randn(1, 4, 16), num_frames=9,
                  prompt_attention_mask=torch.ones(1, 4, dtype=torch.bool))
    parts = dict(text_encoder=None, tokenizer=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    if name == "LTX-Video":
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)
        vae.latents_mean.normal_(), vae.latents_std.uniform_(0.5, 2)
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=1, caption_channels=16)
        pipe = diffusers.LTXPipeline(vae=vae, transformer=transformer, **parts)
        config = replace(MICRO, latent_channels=8, up=(None, (2, 2), (2, 2), (2, 2)), patch=4,
                         widths=(32, 32, 32, 32, 64))
        return pipe, common | dict(height=64, width=96, guidance_scale=1.0), TurboVAED(config)
    vae = diffusers.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
                                              norm_num_groups=4)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))
    pipe = diffusers.HunyuanVideoPipeline(vae=vae, transformer=transformer,
                                          text_encoder_2=None, tokenizer_2=None, **parts)
    config = replace(MICRO, latent_channels=4, up=(None, (2, 2), (2, 2), (1, 2)), patch=1)
    return pipe, common | dict(height=64, width=96, pooled_prompt_embeds=torch.randn(1, 8)), TurboVAED(config)


@pytest.mark.parametrize("name", ["LTX-Video", "HunyuanVideo"])
def test_a_pipeline_decodes_through_the_student_and_back(name):
    pipe, call, student = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    generate = lambda: pipe(**call, generator=torch.Generator().manual_seed(3)).frames
    given, original = [], pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: given.append(z) or original(z, *args, **kwargs)
    own = generate()
    del pipe.vae.decode

    chunks = []
    student.conv_in.register_forward_hook(lambda module, inputs, output: chunks.append(inputs[0].shape[2]))
    assert use_student(pipe, student) is pipe                   # a copy of it, hook and all
    by_hand = pipe.video_processor.postprocess_video(student(given[0]), output_type="pt")
    for tiling in (False, True):
        pipe.vae.enable_tiling() if tiling else pipe.vae.disable_tiling()
        chunks.clear()
        frames = generate()
        t = given[0].shape[2]
        assert chunks == ([2] + [1] * (t - 2) if tiling else [t])       # the first layer begins when it has two
        assert frames.shape == own.shape == (1, 9, 3, 64, 96)
        torch.testing.assert_close(frames, by_hand, atol=1e-5, rtol=0)
        assert not torch.allclose(frames, own, atol=1e-2)
        torch.testing.assert_close(pipe.vae.decode(given[0]).sample, student(given[0]), atol=1e-5, rtol=0)

    # accelerate's hooks around it, though nothing can move without a GPU
    if name == "LTX-Video":
        pipe.enable_model_cpu_offload(device=torch.device("cpu"))
        assert torch.equal(generate(), frames) and torch.equal(generate(), frames)
        pipe.remove_all_hooks()
    use_student(pipe.vae, None)
    pipe.vae.disable_tiling()
    assert torch.equal(generate(), own)


def test_a_student_of_other_latents_is_refused_in_one_line():
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    with torch.device("meta"):
        ltx = AutoencoderKLLTXVideo()
    hunyuan = on_meta(CONFIGS["hunyuan"])
    hunyuan.metadata["teacher"] = "hunyuan"
    for target, student, parts in (
            (vae, on_meta(CONFIGS["ltx"]), ("128", "AutoencoderKLWan", "16", "(8, 32, 32)", "(4, 8, 8)")),
            (vae, hunyuan, ("hunyuan", "not wan21")),                             # of the very same shape
            (vae, on_meta(CONFIGS["tiny"]), ("keeps first frames", "24 frames, not 21")),
            (ltx, on_meta(CONFIGS["dc"]), ("AutoencoderKLLTXVideo", "(4, 32, 32), not (8, 32, 32)"))):
        with one_line(ValueError, *parts):
            use_student(target, student)
        assert "decode" not in vars(target)
    with one_line(TypeError, "TurboVAED"):          # it has a decode of its own
        use_student(hunyuan, hunyuan)
    with one_line(TypeError, "object"):
        use_student(object(), on_meta(CONFIGS["ltx"]))


def test_what_was_assumed_of_a_student_is_said(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLWan
    vae, student = (AutoencoderKLWan(base_dim=8, num_res_blocks=1),
                    seeded(replace(CONFIGS["wan21"], widths=(8, 8, 8, 8, 8), resnets=(0,) * 5)))
    with pytest.warns(UserWarning, match="does not say whose latents"):
        use_student(vae, student)
    student.metadata["teacher"] = "wan21"
    student = TurboVAED.from_pretrained(student.save_pretrained(tmp_path))             # what a file says is kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_student(vae, student)
    torch.save(student.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError):                                                    # of a size that no preset has
        TurboVAED.from_pretrained(tmp_path / "plain.pth", "wan21")
    for name in ("hunyuan", "cog"):
        assert TurboVAED.from_pretrained(published(name, tmp_path)).metadata["teacher"] == name
    stranger, student = SimpleNamespace(decode=None, config={"latent_channels": 16}), on_meta(CONFIGS["hunyuan"])
    student.metadata["teacher"] = "hunyuan"
    with pytest.warns(UserWarning, match="was made for latents of hunyuan: assumed are those of this SimpleNamespace"):
        use_student(stranger, student)


@pytest.mark.parametrize("kind, config, fits, others", [
    ("AutoencoderKLQwenImage", "qwen", ("qwen", "wan21"), ("hunyuan",)),
    ("AutoencoderKLWan", "wan21", ("wan21",), ("qwen", "hunyuan")),
    ("AutoencoderKLHunyuanVideo15", "hunyuan15", ("hunyuan15",), ("wan22",)),
    ("AutoencoderKLLTXVideo", "ltx", ("ltx",), ("ltx095",)), ("AutoencoderKLLTXVideo", "ltx095", ("ltx095",), ("ltx",)),
    ("AutoencoderKLLTX2Video", "ltx2", ("ltx2",), ("ltx23", "ltx25")),
    ("AutoencoderKLLTX2Video", "ltx23", ("ltx23", "ltx25"), ("ltx2", "ltx")),
    ("LTX2VideoDiffusionDecoderModel", "ltx25", ("ltx25", "ltx23"), ("ltx2",)),
    ("AutoencoderKLMiniMaxH3", "h3", ("h3",), ("wan22",))])
def test_a_vae_takes_students_of_its_own_latents_only(kind, config, fits, others):
    """Latents of one shape, and for LTX-2 and 2.3 of one class, from different encoders. Qwen-Image's encoder is Wan
    2.1's, so Wan's students decode its images; a student trained on images has never seen motion."""
    diffusers = pytest.importorskip("diffusers")
    from teachers import CONFIGURATIONS
    with torch.device("meta"):
        vae = getattr(diffusers, kind)(**CONFIGURATIONS.get(config, {}) if "Decoder" not in kind else {})
    student = on_meta(CONFIGS[config])
    for teacher in fits:
        student.metadata["teacher"] = teacher
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "this VAE's pipelines mix noise")     # ltx095's
            assert use_student(vae, student) is vae
    for teacher in others:
        student.metadata["teacher"] = teacher
        with pytest.raises(ValueError, match=f"was made for latents of {teacher}, not {fits[0]}"):
            use_student(vae, student)


def test_a_refusal_and_none_leave_what_was_there():
    vae, student = small_vae()
    vae.decode = theirs = lambda z: z                                   # another tool's
    before = vars(use_student(use_student(vae, student), student))["decode"]
    for other in (on_meta(CONFIGS["dc"]), "out/ltx", vae):
        with one_line((ValueError, TypeError)):
            use_student(vae, other)
    assert vars(vae)["decode"] is before
    for _ in range(2):
        use_student(vae, None)
        assert vars(vae)["decode"] is theirs
    del vae.decode
    use_student(use_student(vae, student), None)
    assert "decode" not in vars(vae)


def small_vae(**options):
    """(an LTX VAE of random weights with 8 latent channels, a student of its latents)."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKLLTXVideo
    vae = AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                                layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, **options)
    student = seeded(replace(MICRO, latent_channels=8, up=(None, (2, 2), (2, 2), (2, 2)), patch=4,
                             widths=(32, 32, 32, 32, 16)))
    student.metadata["teacher"] = "ltx"
    return vae, student


def test_a_vae_with_a_student_is_copied_pickled_and_compiled_with_it():
    vae, student = small_vae()
    latents, video = torch.randn(1, 8, 2, 1, 2), torch.randn(1, 3, 9, 32, 64)
    own, want = vae.eval().decode(latents).sample, student(latents)
    for twin in (copy.deepcopy(use_student(vae, student)), pickle.loads(pickle.dumps(vae))):
        whole = []
        twin.decode.student.register_forward_hook(lambda *_: whole.append(True))
        twin.enable_tiling()                                            # a flag of its own
        torch.testing.assert_close(twin.decode(latents).sample, want, atol=1e-5, rtol=0)
        assert not whole and not vae.use_tiling
        use_student(twin, None).disable_tiling()
        assert torch.equal(twin.decode(latents).sample, own) and torch.equal(vae.decode(latents).sample, want)
    for given in ((False,), (None, False), (latents, None, False)):
        assert isinstance(vae.decode(latents, *given), tuple)
    through = vae(video).sample
    for before in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(vae, fullgraph=True, backend="eager")
        use_student(compiled if before else vae, student)
        torch.testing.assert_close(compiled(video).sample, through)
        torch.testing.assert_close(torch.compile(vae.decode, fullgraph=True, backend="eager")(latents).sample, want)
        use_student(compiled, None)
        assert "decode" not in vars(vae)
        torch.testing.assert_close(compiled(video).sample, vae(video).sample)
        torch.testing.assert_close(vae.decode(latents).sample, own)


# (modular pipeline, its decode block, teacher, shape of the latents that it takes, what else)
SIZES = dict(height=64, width=64, num_frames=17, dtype=torch.float32)
BLOCKS_THAT_DECODE = [("wan", "WanVaeDecoderStep", "wan21", (1, 4, 3, 2, 2), {}),
                      ("hunyuan_video1_5", "HunyuanVideo15VaeDecoderStep", "hunyuan15", (1, 4, 3, 2, 2), {}),
                      ("ltx", "LTXVaeDecoderStep", "ltx", (1, 8, 3, 2, 2), SIZES),
                      ("ltx2", "LTX2VaeDecoderStep", "ltx23", (1, 12, 8), SIZES),
                      ("ltx2", "LTX2DiffusionVaeDecoderStep", "ltx25", (1, 12, 8), SIZES),
                      ("minimax_h3", "MiniMaxH3VideoDecodeStep", "h3", (1, 4, 7, 2, 2), {})]


def modular(pipeline, block, name, **managed):
    """(the block as a pipeline with small random parts, what it decodes with, a student of its latents)."""
    pytest.importorskip("diffusers")
    from importlib import import_module

    from test_teachers import diffusion_decoder, small_vae
    block = getattr(import_module(f"diffusers.modular_pipelines.{pipeline}.decoders"), block)()
    pipe = block.init_pipeline(**managed)
    part = "diffusion_decoder" if name == "ltx25" else "vae"
    decoder = diffusion_decoder() if name == "ltx25" else small_vae(name, **(
        dict(latents_mean=(0.1, 0.2, -0.1, 0.5), latents_std=(1.0, 2.0, 0.5, 1.5)) if name in ("wan21", "h3") else {}))
    pipe.update_components(**{part: decoder.eval()})
    config = CONFIGS[name]
    student = seeded(replace(config, latent_channels=8 if "ltx" in name else 4, resnets=(1,) * 5,
                             widths=(8, 8, 8, 8, 4 * config.patch ** 2)))
    student.metadata["teacher"] = name
    return pipe, decoder, student


@pytest.mark.parametrize("pipeline, block, name, shape, more", BLOCKS_THAT_DECODE)
def test_modular_pipelines_decode_through_the_student_and_back(pipeline, block, name, shape, more):
    pipe, decoder, student = modular(pipeline, block, name)
    latents, videos = torch.randn(shape), []
    given = lambda: {"generator": torch.Generator().manual_seed(0)} if name == "ltx25" else {}
    run = lambda: pipe(latents=latents, output_type="pt", output="videos", **more, **given())
    own = run()
    student.register_forward_hook(lambda module, inputs, video: videos.append(video))
    assert use_student(pipe, student) is pipe
    frames = run()
    (video,) = videos
    torch.testing.assert_close(frames, video.add(1).div(2).clamp(0, 1).transpose(1, 2), atol=1e-6, rtol=0)
    assert frames.shape == own.shape and not torch.allclose(frames, own, atol=1e-2)
    use_student(pipe, None)
    assert torch.equal(run(), own) and "decode" not in vars(decoder)


@pytest.mark.parametrize("with_vae", [True, False])
def test_the_pipeline_of_the_diffusion_decoder_decodes_through_the_student(with_vae):
    diffusers = pytest.importorskip("diffusers")
    _, decoder, student = modular(*BLOCKS_THAT_DECODE[4][:3])
    vae = modular(*BLOCKS_THAT_DECODE[3][:3])[1] if with_vae else None
    pipe = diffusers.LTX2VideoDiffusionDecodePipeline(diffusion_decoder=decoder, vae=vae, scheduler=None)
    latents = torch.randn(1, 8, 3, 2, 2)
    frames = use_student(pipe, student)(latents, output_type="pt", denormalize=False).frames
    torch.testing.assert_close(frames, pipe.video_processor.postprocess_video(student(latents), output_type="pt"))
    assert not with_vae or torch.equal(vae.decode(latents).sample, student(latents))
    use_student(pipe, None)
    assert not any("decode" in vars(part) for part in (decoder, vae) if part)


def test_a_components_manager_makes_room_for_the_student_and_it_leaves(monkeypatch):
    """Without a GPU: the other model claims to be on the device where the student runs."""
    pytest.importorskip("accelerate")
    _, decoder, student = modular(*BLOCKS_THAT_DECODE[4][:3])
    from diffusers.modular_pipelines.components_manager import custom_offload_with_hook
    asked, moved = [], []

    def strategy(hooks, model_id, model, execution_device):
        asked.append((model_id, type(model), model.get_memory_footprint(), [hook.model_id for hook in hooks]))
        return hooks
    hook = custom_offload_with_hook("decoder", decoder, "cpu", offload_strategy=strategy)       # a name, so never equal
    other = SimpleNamespace(device="cpu", modules=list)
    hook.add_other_hook(SimpleNamespace(model=other, model_id="other", offload=lambda: moved.append("other")))
    use_student(decoder, student)
    to = TurboVAED.to
    monkeypatch.setattr(TurboVAED, "to", lambda self, *where: moved.append(str(where[0])) or to(self, *where))
    decoder.decode(torch.randn(1, 8, 3, 2, 2))
    assert asked == [("decoder", TurboVAED, sum(p.nbytes for p in student.parameters()), ["other"])]
    assert moved == ["other", "cpu", "cpu", "cpu"]             # by the hook, to the latents, and off


def test_cogvideox_with_an_even_number_of_latents_is_told():
    pytest.importorskip("diffusers")
    from test_teachers import small_vae
    student = seeded(narrow("cog"))
    student.metadata["teacher"] = "cog"
    vae = use_student(small_vae("cog"), student)
    with pytest.warns(UserWarning, match="makes 8 frames of 2 latents, its student 5") as told:
        assert [vae.decode(torch.randn(1, 4, t, 1, 1)).sample.shape[2] for t in (1, 2, 3)] == [1, 5, 9]
    assert len(told) == 1


def test_the_callers_own_student_keeps_its_precision():
    vae, student = small_vae()
    z = torch.randn(1, 8, 1, 2, 2)
    before = student(z)
    use_student(vae, student).decode(z.bfloat16())
    assert student.conv_in.conv.weight.dtype == torch.float32 and torch.equal(student(z), before)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_accelerates_offloading_moves_the_student_as_it_moves_the_vae(how, monkeypatch):
    """Without a GPU: the model that ran before lies on the meta device, so only where it is asked to go can be seen."""
    accelerate = pytest.importorskip("accelerate")
    vae, student = small_vae()
    ran_before, moved, z = torch.nn.Linear(1, 1, device="meta"), [], torch.randn(1, 8, 1, 2, 2)
    expected = student(z)
    monkeypatch.setattr(ran_before, "to", lambda device: moved.append(("before", str(device))))
    if how == "model":
        _, hook = accelerate.cpu_offload_with_hook(torch.nn.Linear(1, 1), "cpu")
        hook.model = ran_before
        accelerate.cpu_offload_with_hook(vae, "cpu", prev_module_hook=hook)
    else:
        accelerate.cpu_offload(vae, "cpu")
    use_student(vae, student)
    to = TurboVAED.to
    monkeypatch.setattr(TurboVAED, "to",
                        lambda self, *where: moved.append(("student", str(where[0]))) or to(self, *where))
    assert torch.equal(vae.decode(z).sample, expected)
    assert moved[0] == ("before", "cpu") if how == "model" else True
    assert moved[-2:] == [("student", "cpu")] * 2       # to the latents, and off


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_leaves_nothing_on_the_gpu():
    accelerate = pytest.importorskip("accelerate")
    vae, student = small_vae()
    ran_before, hook = accelerate.cpu_offload_with_hook(torch.nn.Linear(1, 1), "cuda")
    ran_before(torch.ones(1, 1))
    held = torch.cuda.memory_allocated()
    accelerate.cpu_offload_with_hook(vae, "cuda", prev_module_hook=hook)
    video = use_student(vae, student).decode(torch.randn(1, 8, 1, 2, 2, device="cuda")).sample
    assert (video.is_cuda and ran_before.weight.device.type == "cpu"
            and torch.cuda.memory_allocated() <= held + video.nbytes)


def test_a_pipeline_that_adds_noise_before_decoding_is_told():
    vae, student = small_vae(timestep_conditioning=True)
    with pytest.warns(UserWarning, match="decode_noise_scale=0.0"):
        use_student(vae, student)


def test_in_a_pipeline_what_is_optimized_stays_compiled(graphs):
    pipe, _, student = tiny_pipeline("LTX-Video")
    latents = torch.randn(1, 8, 2, 2, 3)
    want = student(latents)
    use_student(pipe, torch.compile(student))           # as it was before that
    torch.testing.assert_close(pipe.vae.decode(latents).sample, want, atol=1e-5, rtol=0)
    assert graphs() == 0
    use_student(pipe, student.optimize_for_inference())
    torch.testing.assert_close(pipe.vae.decode(latents).sample, want, atol=1e-5, rtol=0)
    assert graphs() == 1
    pipe.vae.decode(latents.bfloat16())         # its precision is that of the latents, and no loss
    torch.testing.assert_close(pipe.vae.decode(latents).sample, want, atol=1e-5, rtol=0)
