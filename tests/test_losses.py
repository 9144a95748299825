"""The losses: each against its formula, the projection heads against an explicit loop, and both stages' gradients
against one graph over everything."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from losses import (HEADS, KL_WEIGHT, LPIPS, NOISE, SMOOTHNESS, Objective, PatchDiscriminator, ProjectionHead,
                    StudentWithHeads, adaptive_weight, discriminator_loss, distillation_loss, kl_loss, l1_loss,
                    last_layer_gradients, make_heads, sharpness)
from model import CONFIGS, TurboVAED

lpips = pytest.importorskip("lpips")

# Student and teacher features of the four published pairs, narrowed: (student, teacher, (time, space) shuffled).
PAIRS = {
    "ltx": ((1, 16, 5, 4, 4), (1, 32, 5, 4, 4), (1, 1)),
    "hunyuan": ((1, 32, 5, 4, 4), (1, 32, 5, 8, 8), (1, 2)),
    "cog": ((1, 32, 5, 4, 4), (1, 32, 9, 8, 8), (2, 2)),
    "dc": ((1, 16, 4, 4, 4), (1, 32, 4, 4, 4), (1, 1)),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_line(error, *parts):
    """The message is one line and names all the parts."""
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_l1_is_the_mean_absolute_error():
    a, b = noise(2, 3, 4, 8, 8), noise(2, 3, 4, 8, 8, seed=1)
    assert l1_loss(a, b).item() == pytest.approx(np.abs(a.numpy() - b.numpy()).mean(), rel=1e-6)
    assert l1_loss(a, a) == 0


def test_l1_of_half_precision_is_taken_in_single():
    a = torch.full((1, 3, 4, 64, 64), 0.1, dtype=torch.bfloat16)
    loss = l1_loss(a, torch.zeros(a.shape))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(a[0, 0, 0, 0, 0].item(), rel=1e-5)


def test_kl_is_that_of_the_posterior_summed_over_latents():
    mean, logvar = noise(3, 4, 2, 3, 3), noise(3, 4, 2, 3, 3, seed=1)
    N = torch.distributions.Normal
    want = torch.distributions.kl_divergence(N(mean, (0.5 * logvar).exp()), N(0.0, 1.0)).sum((1, 2, 3, 4))
    torch.testing.assert_close(kl_loss(mean, logvar), want)
    assert kl_loss(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]
    assert kl_loss(noise(2, 4, 1, 2, 2), None).tolist() == [0, 0]           # a deterministic encoder has none


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("pair", PAIRS)
def test_leads_from_the_students_shape_to_the_teachers(pair, kind):
    student, teacher, factors = PAIRS[pair]
    head = ProjectionHead(student, teacher, kind)
    assert (head.time, head.space) == factors
    features = head(noise(2, *student[1:]))
    assert features.shape == (2, *teacher[1:])
    features.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("kind, layers", [("pointwise", "CC"), ("linear", "C"), ("mlp1", "CSC"), ("mlp2", "CSCSC")])
def test_layers_are_those_of_table_7(kind, layers):
    head = ProjectionHead(*PAIRS["cog"][:2], kind)
    modules = [m for m in head.modules() if not list(m.children())]
    assert "".join({nn.Conv3d: "C", nn.SiLU: "S"}[type(m)] for m in modules) == layers
    convs = [m for m in modules if isinstance(m, nn.Conv3d)]
    assert all(conv.kernel_size == (1, 1, 1) for conv in convs)
    assert convs[0].in_channels == 32 and convs[-1].out_channels == 32 * 8


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_shuffles_channels_to_time_and_space(pair):
    student, (_, C, T, H, W), (r, s) = PAIRS[pair]
    head = ProjectionHead(student, PAIRS[pair][1], "linear")
    x = noise(*student)
    y = head.layers(x)                                      # C·r·s² channels on the student's grid
    drop = r * student[2] - T                               # a causal teacher has no frames before its first
    want = torch.empty(1, C, T, H, W)
    for c in range(C):
        for t in range(T):
            for h in range(H):
                for w in range(W):
                    at = t + drop
                    channel = ((c * r + at % r) * s + h % s) * s + w % s
                    want[0, c, t, h, w] = y[0, channel, at // r, h // s, w // s]
    assert torch.equal(head(x), want)


def test_no_head_where_shapes_agree():
    same, other = (1, 16, 5, 4, 4), PAIRS["hunyuan"]
    heads = make_heads({"mid": same, "up0": other[0]}, {"mid": (7, *same[1:]), "up0": other[1]})
    x = noise(*same)
    assert heads["mid"](x) is x and not list(heads["mid"].parameters())
    assert isinstance(heads["up0"], ProjectionHead)
    assert isinstance(make_heads({"mid": same}, {"mid": (1, 17, 5, 4, 4)})["mid"], ProjectionHead)


@pytest.mark.parametrize("student, teacher", [
    ((1, 8, 4, 4, 4), (1, 8, 4, 6, 6)), ((1, 8, 4, 4, 4), (1, 8, 4, 2, 2)), ((1, 8, 4, 4, 4), (1, 8, 4, 8, 4)),
    ((1, 8, 4, 4, 4), (1, 8, 6, 4, 4)), ((1, 8, 4, 4, 4), (1, 8, 2, 4, 4)), ((1, 8, 5, 4, 4), (1, 8, 4, 4, 4)),
], ids=str)
def test_shapes_without_whole_factors_are_one_line(student, teacher):
    with pytest.raises(ValueError) as error:
        ProjectionHead(student, teacher)
    one_line(error, str(student), str(teacher))
    with pytest.raises(ValueError) as error:
        ProjectionHead(student, teacher, kind="mlp3")
    one_line(error, "'mlp3'", *HEADS)


def two_blocks(scale=1.0):
    """Student's features, teacher's, heads for an ltx-like mid and an identical up0."""
    torch.manual_seed(0)
    student = {"mid": noise(2, *PAIRS["ltx"][0][1:]), "up0": noise(2, 8, 5, 8, 8, seed=1)}
    teacher = {"mid": scale * noise(2, *PAIRS["ltx"][1][1:], seed=2), "up0": scale * 3 * noise(2, 8, 5, 8, 8, seed=3)}
    shapes = lambda features: {name: x.shape for name, x in features.items()}
    return student, teacher, make_heads(shapes(student), shapes(teacher))


@torch.no_grad()
def test_distillation_is_equation_4():
    student, teacher, heads = two_blocks()
    mid = np.abs(heads["mid"](student["mid"]).numpy() - teacher["mid"].numpy()).mean()
    up0 = np.abs(student["up0"].numpy() - teacher["up0"].numpy()).mean()
    assert distillation_loss(student, teacher, heads).item() == pytest.approx(mid + up0, rel=1e-5)


@torch.no_grad()
def test_distillation_is_nothing_for_a_perfect_student():
    student, _, heads = two_blocks()
    perfect = {name: heads[name](x) for name, x in student.items()}
    assert distillation_loss(student, perfect, heads) == 0


@torch.no_grad()
def test_normalized_distillation_does_not_depend_on_the_teachers_scale_or_on_how_a_batch_is_split():
    student, teacher, heads = two_blocks()
    loss = lambda teacher, clips=slice(None), normalize=True: distillation_loss(
        {b: x[clips] for b, x in student.items()}, {b: x[clips] for b, x in teacher.items()}, heads, normalize).item()
    _, loud, _ = two_blocks(scale=1000.0)
    assert loss(loud) == pytest.approx(loss(teacher), rel=1e-4)
    assert loss(loud, normalize=False) > 100 * loss(teacher, normalize=False)
    teacher = {b: x * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1, 1) for b, x in teacher.items()}
    halves = [loss(teacher, [i]) for i in range(2)]
    by_hand = [sum((heads[b](student[b])[i] - x[i] / x[i].std()).abs().mean().item() for b, x in teacher.items())
               for i in range(2)]
    assert halves == pytest.approx(by_hand, rel=1e-5) and loss(teacher) == pytest.approx(sum(halves) / 2, rel=1e-5)


class StandIn(nn.Module):
    """Called as lpips.LPIPS is; its distance is the mean squared error of each image, with a dropout as lpips has."""

    def __init__(self, net="alex", verbose=True, **kwargs):
        super().__init__()
        self.scale, self.drop, self.calls = nn.Parameter(torch.ones(())), nn.Dropout(0.5), []

    def forward(self, in0, in1, retPerLayer=False, normalize=False):
        assert in0.shape == in1.shape and in0.ndim == 4 and in0.shape[1] == 3 and not normalize
        self.calls.append((in0, in1))
        return self.scale * self.drop((in0 - in1).square()).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def perceptual(monkeypatch):
    monkeypatch.setattr(lpips, "LPIPS", StandIn)
    return LPIPS()


def test_lpips_averages_over_all_frames_of_all_clips(perceptual):
    video, target = noise(2, 3, 5, 8, 8), noise(2, 3, 5, 8, 8, seed=1)
    video[1] *= 3                                                # clips and frames that differ in how bad they are
    frames = [StandIn().eval()(video[i, :, t][None], target[i, :, t][None]).item() for i in range(2) for t in range(5)]
    loss = perceptual(video, target)
    assert loss.shape == () and loss.item() == pytest.approx(np.mean(frames), rel=1e-5)
    seen = torch.cat([a for a, _ in perceptual.net.calls])
    assert sorted(x.sum().item() for x in seen) == pytest.approx(
        sorted(video[i, :, t].sum().item() for i in range(2) for t in range(5)), abs=1e-3)


def test_lpips_is_frozen_but_lets_gradients_through(perceptual):
    assert not any(p.requires_grad for p in perceptual.parameters())
    video = noise(1, 3, 2, 8, 8).requires_grad_()
    perceptual(video, torch.zeros(1, 3, 2, 8, 8)).backward()
    assert (video.grad != 0).all()


def test_lpips_stays_in_evaluation_mode_when_the_student_trains(perceptual):
    """Its dropout would make the loss noise, and whatever holds it may be put to training."""
    whole = nn.ModuleList([nn.Identity(), perceptual]).train()
    video, target = noise(1, 3, 2, 8, 8), noise(1, 3, 2, 8, 8, seed=1)
    assert whole[0].training and perceptual(video, target) == perceptual(video, target)


def test_lpips_of_random_frames_is_the_mean_over_all_in_expectation(perceptual):
    """Every subset of two frames for each clip, drawn alike: their mean is the loss over all frames."""
    video, target = noise(2, 3, 4, 8, 8), noise(2, 3, 4, 8, 8, seed=1)
    video[1] *= 3
    pairs = [(i, j) for i in range(4) for j in range(i)]
    estimates = [perceptual(video, target, torch.tensor([a, b])).item() for a in pairs for b in pairs]
    assert np.mean(estimates) == pytest.approx(perceptual(video, target).item(), rel=1e-5) and np.std(estimates) > 0
    one = perceptual(video, target, torch.tensor([[3], [0]]))
    torch.testing.assert_close(one, ((video[0, :, 3] - target[0, :, 3]).square().mean()
                                     + (video[1, :, 0] - target[1, :, 0]).square().mean()) / 2)


def test_lpips_that_cannot_be_downloaded_says_how_to_go_on(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("<urlopen error>\nno route to host")
    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(OSError) as error:
        LPIPS()
    one_line(error, "--lpips-weight 0", "vgg", "ConnectionError", torch.hub.get_dir())


def parts(blocks=("mid", "up0"), normalize=False):
    """A tiny student with heads, and the inputs of one micro-batch: latents, features, target, KL divergence."""
    torch.manual_seed(0)
    student, latents = TurboVAED(CONFIGS["tiny"]), noise(2, 32, 1, 2, 2)
    shapes = {b: student.config.feature_shape(b, latents.shape) for b in blocks}
    features = {b: noise(s[0], s[1] + 8, *s[2:], seed=i) for i, (b, s) in enumerate(shapes.items())}
    heads = make_heads(shapes, {b: x.shape for b, x in features.items()})
    kl = kl_loss(noise(2, 32, 1, 2, 2, seed=5), noise(2, 32, 1, 2, 2, seed=6)).mean()
    return StudentWithHeads(student, heads, normalize), latents, features, noise(2, 3, 4, 16, 16, seed=7), kl


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_those_of_one_graph_over_equation_5(perceptual, stage):
    weights = {"lpips": 0.5, "distill": 3.0, "kl": KL_WEIGHT}
    model, latents, features, target, kl = parts()
    frames, extra = torch.tensor([[0, 2], [3, 1]]), noise(2, 3, 4, 16, 16, seed=9)
    objective = Objective(perceptual, weights["lpips"], weights["distill"])
    if stage == 2:
        objective.discriminator, objective.adversarial_weight = PatchDiscriminator(8), 0.2
    terms, (of_video, adversarial) = objective.backward(model, latents, features, target, kl, frames, extra,
                                                        scale=lambda loss: 4 * loss)
    got = gradients(model)

    model.zero_grad()
    video, distill = model(latents, features)
    want = {"l1": l1_loss(video, target), "lpips": perceptual(video, target, frames), "kl": kl, "distill": distill}
    loss = sum(weights.get(name, 1.0) * value for name, value in want.items())
    reconstruction, = torch.autograd.grad(4 * (want["l1"] + 0.5 * want["lpips"]), video, retain_graph=True)
    torch.testing.assert_close(of_video, reconstruction)
    if stage == 2:
        trained = gradients(objective.discriminator)
        objective.discriminator.zero_grad()
        want["adversarial"] = -objective.discriminator(video).mean()
        want["discriminator"], d_loss = discriminator_loss(objective.discriminator, target, video.detach(), extra)
        (4 * d_loss).backward()
        torch.testing.assert_close(trained, gradients(objective.discriminator))
    (4 * (loss + (0.2 * want["adversarial"] if stage == 2 else 0))).backward()
    torch.testing.assert_close(got, gradients(model), rtol=1e-4, atol=1e-6)
    assert set(got) == {name for name, _ in model.named_parameters()}
    assert terms.keys() == want.keys() | {"loss"} and (adversarial is not None) == (stage == 2)
    torch.testing.assert_close(terms, {name: value.detach() for name, value in (want | {"loss": loss}).items()})
    assert all(p.grad is None for p in perceptual.parameters())


def test_weights_are_equation_5s_unless_said_otherwise(perceptual):
    terms, _ = Objective(perceptual).backward(*parts())
    torch.testing.assert_close(terms["loss"], terms["l1"] + terms["lpips"] + terms["distill"] + 1e-7 * terms["kl"])


def test_terms_that_are_off_are_not_there():
    model, latents, features, target, kl = parts(blocks=())
    terms, _ = Objective().backward(model, latents, {}, target, torch.zeros(()))
    assert set(terms) == {"l1", "kl", "loss"}
    torch.testing.assert_close(terms["loss"], terms["l1"])


def test_normalize_reaches_the_distillation():
    distill = {}
    for normalize in (False, True):
        for scale in (1, 1000):
            model, latents, features, *rest = parts(normalize=normalize)
            features = {b: scale * x for b, x in features.items()}
            distill[normalize, scale] = Objective().backward(model, latents, features, *rest)[0]["distill"].item()
    assert distill[True, 1000] == pytest.approx(distill[True, 1], rel=1e-4)
    assert distill[False, 1000] > 100 * distill[False, 1]


def test_distillation_alone_trains_the_blocks_up_to_the_deepest_named():
    model, latents, features, *_ = parts(blocks=("mid",))
    model(latents, features)[1].backward()
    trained = {key.split(".")[0] for key, p in model.student.named_parameters()
               if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"conv_in", "mid_block"}
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())


def test_training_lowers_every_term():
    model, *inputs = parts(normalize=True)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        history.append(Objective().backward(model, *inputs)[0])
        optimizer.step()
    assert all(history[-1][name] < history[0][name] for name in ("l1", "distill"))


def test_the_discriminator_gives_a_logit_for_each_patch_and_knows_no_batch():
    torch.manual_seed(0)
    discriminator, video = PatchDiscriminator(8), noise(3, 3, 17, 64, 48)
    logits = discriminator(video)
    assert logits.shape == (3, 1, 5, 4, 3)
    torch.testing.assert_close(logits[1:2], discriminator(video[1:2]), rtol=1e-4, atol=1e-5)
    # weights, biases, norms
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 27 * 172_736 + 961 + 1792


def test_discriminator_loss_is_the_hinge_and_the_approximate_r1_penalty():
    logits = lambda video: video.mean((1, 2, 3, 4))              # real 3 and -1, fake -2 and 0.5
    fill = lambda *values: torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)
    real, fake, extra = fill(3.0, -1.0), fill(-2.0, 0.5), fill(1.0, 2.0)
    hinge, loss = discriminator_loss(logits, real, fake, extra)
    assert hinge.item() == pytest.approx((0 + 2) / 2 + (0 + 1.5) / 2)
    assert loss.item() == pytest.approx(hinge.item() + SMOOTHNESS * NOISE ** 2 * (1 + 4) / 2, rel=1e-4)


def test_the_adaptive_weight_is_the_ratio_of_norms_at_the_last_layer():
    model, latents, features, target, _ = parts()
    student, weight = model.student, model.student.conv_out.conv.weight
    video = student(latents)
    a, b = l1_loss(video, target), 5 * video.square().mean()
    on_video = [torch.autograd.grad(loss, video, retain_graph=True)[0] for loss in (a, b)]
    want = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (a, b)]
    got = last_layer_gradients(student, latents, *on_video)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert adaptive_weight(*got).item() == pytest.approx((want[0].norm() / (want[1].norm() + 1e-4)).item(), rel=1e-4)
    assert adaptive_weight(torch.full((3,), 1e9), torch.zeros(3)) == 1e4
    assert weight.grad is None


def test_sharpness_is_the_energy_above_a_quarter_of_a_cycle_per_pixel():
    y = torch.arange(32.0)[:, None].expand(32, 32)
    waves = torch.stack([torch.sin(2 * torch.pi * f * y) for f in (1 / 32, 7 / 32, 9 / 32, 15 / 32)])
    values = sharpness(waves[:, None, None].expand(-1, 3, 2, -1, -1))
    torch.testing.assert_close(values, torch.tensor([0, 0, 0.5, 0.5]), atol=1e-5, rtol=1e-4)
    video = noise(1, 3, 2, 32, 32)
    assert sharpness(torch.nn.functional.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1))) < 0.2 * sharpness(video)


