"""The losses: each against its formula, the projection heads against an explicit loop, and the sum of stage 1."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from losses import HEADS, LPIPS, ProjectionHead, Stage1, distillation_loss, kl_loss, l1_loss, make_heads
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


# ---------------------------------------------------------------------------------------------------------------------
# L1 and KL.

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
    want = torch.distributions.kl_divergence(N(mean, (0.5 * logvar).exp()), N(0.0, 1.0)).sum((1, 2, 3, 4)).mean()
    torch.testing.assert_close(kl_loss(mean, logvar), want)
    assert kl_loss(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


def test_a_deterministic_encoder_has_no_kl():
    loss = kl_loss(noise(2, 4, 1, 2, 2), None)
    assert loss.shape == () and loss == 0


# ---------------------------------------------------------------------------------------------------------------------
# Projection heads.

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


@pytest.mark.parametrize("kind", HEADS)
def test_only_the_mlps_are_not_linear(kind):
    head = ProjectionHead(*PAIRS["hunyuan"][:2], kind)
    a, b = noise(*PAIRS["hunyuan"][0]), noise(*PAIRS["hunyuan"][0], seed=1)
    with torch.no_grad():
        gap = (head(a + b) - head(a) - head(b) + head(torch.zeros_like(a))).abs().max().item()
    assert (gap < 1e-4) != kind.startswith("mlp")


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


@pytest.mark.parametrize("kind", HEADS)
def test_the_kind_asked_for_is_the_kind_made(kind):
    made = make_heads({"mid": PAIRS["ltx"][0]}, {"mid": PAIRS["ltx"][1]}, kind)["mid"]
    assert str(made) == str(ProjectionHead(*PAIRS["ltx"][:2], kind))


@pytest.mark.parametrize("student, teacher", [
    ((1, 8, 4, 4, 4), (1, 8, 4, 6, 6)), ((1, 8, 4, 4, 4), (1, 8, 4, 2, 2)), ((1, 8, 4, 4, 4), (1, 8, 4, 8, 4)),
    ((1, 8, 4, 4, 4), (1, 8, 6, 4, 4)), ((1, 8, 4, 4, 4), (1, 8, 2, 4, 4)), ((1, 8, 5, 4, 4), (1, 8, 4, 4, 4)),
], ids=str)
def test_shapes_without_whole_factors_are_one_line(student, teacher):
    with pytest.raises(ValueError) as error:
        ProjectionHead(student, teacher)
    one_line(error, str(student), str(teacher))


def test_an_unknown_kind_is_one_line():
    with pytest.raises(ValueError) as error:
        ProjectionHead(*PAIRS["ltx"][:2], kind="mlp3")
    one_line(error, "'mlp3'", *HEADS)


# ---------------------------------------------------------------------------------------------------------------------
# Equation 4.

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
def test_normalized_distillation_does_not_depend_on_the_teachers_scale():
    student, teacher, heads = two_blocks()
    normal = distillation_loss(student, teacher, heads, normalize=True).item()
    _, loud, _ = two_blocks(scale=1000.0)
    assert distillation_loss(student, loud, heads, normalize=True).item() == pytest.approx(normal, rel=1e-4)
    assert distillation_loss(student, loud, heads).item() > 100 * distillation_loss(student, teacher, heads).item()
    by_hand = sum((heads[b](student[b]) - teacher[b] / teacher[b].std()).abs().mean().item() for b in teacher)
    assert normal == pytest.approx(by_hand, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS, with a stand-in for the network, whose weights are a download.

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
    """Its dropout would make the loss noise, and a training loop calls .train() on the whole of Stage1."""
    stage = Stage1(nn.Identity(), nn.ModuleDict(), lpips=perceptual).train()
    video, target = noise(1, 3, 2, 8, 8), noise(1, 3, 2, 8, 8, seed=1)
    assert stage.training and stage.student.training
    assert stage.lpips(video, target) == stage.lpips(video, target)


def test_lpips_that_cannot_be_downloaded_says_how_to_go_on(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("<urlopen error>\nno route to host")
    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(OSError) as error:
        LPIPS()
    one_line(error, "--lpips-weight 0", "vgg", "ConnectionError", torch.hub.get_dir())


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1.

def stage1(blocks=("mid", "up0"), **options):
    """A tiny student and what it is trained on: the module and its four inputs."""
    torch.manual_seed(0)
    student, latents = TurboVAED(CONFIGS["tiny"]), noise(2, 16, 1, 2, 2)
    shapes = {b: student.config.feature_shape(b, latents.shape) for b in blocks}
    features = {b: noise(s[0], s[1] + 8, *s[2:], seed=i) for i, (b, s) in enumerate(shapes.items())}
    heads = make_heads(shapes, {b: x.shape for b, x in features.items()})
    posterior = noise(2, 16, 1, 2, 2, seed=5), noise(2, 16, 1, 2, 2, seed=6)
    return Stage1(student, heads, **options), latents, noise(2, 3, 4, 16, 16, seed=7), features, posterior


def test_stage_1_is_the_weighted_sum_of_its_terms(perceptual):
    weights = {"lpips": 0.5, "distill": 3.0, "kl": 0.01}
    stage, *inputs = stage1(lpips=perceptual, **{f"{name}_weight": w for name, w in weights.items()})
    stage.eval()
    loss, terms = stage(*inputs)
    latents, video, features, posterior = inputs
    reconstruction, student_features = stage.student(latents, return_features=tuple(features))
    want = {"l1": l1_loss(reconstruction, video), "lpips": perceptual(reconstruction, video), "kl": kl_loss(*posterior),
            "distill": distillation_loss(student_features, features, stage.heads)}
    assert set(terms) == set(want)
    for name in want:
        torch.testing.assert_close(terms[name], want[name].detach())
        assert want[name] > 0 and not terms[name].requires_grad
    torch.testing.assert_close(loss, sum(weights.get(name, 1.0) * value for name, value in want.items()))


def test_weights_are_equation_5s_unless_said_otherwise(perceptual):
    stage, *inputs = stage1(lpips=perceptual)
    loss, terms = stage.eval()(*inputs)
    torch.testing.assert_close(loss.detach(), terms["l1"] + terms["lpips"] + terms["distill"] + 1e-7 * terms["kl"])


def test_terms_that_are_off_are_not_there():
    stage, latents, video, _, (mean, _) = stage1(blocks=())
    loss, terms = stage(latents, video, {}, (mean, None))
    assert set(terms) == {"l1", "kl"} and terms["kl"] == 0
    torch.testing.assert_close(loss.detach(), terms["l1"])


def test_normalize_reaches_the_distillation():
    distill = {}
    for normalize in (False, True):
        for scale in (1, 1000):
            stage, latents, video, features, posterior = stage1(normalize=normalize)
            features = {b: scale * x for b, x in features.items()}
            distill[normalize, scale] = stage(latents, video, features, posterior)[1]["distill"].item()
    assert distill[True, 1000] == pytest.approx(distill[True, 1], rel=1e-4)
    assert distill[False, 1000] > 100 * distill[False, 1]


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_reach_the_student_and_the_heads_and_nothing_else(perceptual, normalize):
    stage, latents, video, features, posterior = stage1(lpips=perceptual, normalize=normalize)
    loss, _ = stage(latents, video, features, posterior)
    loss.backward()
    for part in (stage.student, stage.heads):
        idle = [key for key, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert list(part.parameters()) and not idle
    assert all(x.grad is None and not x.requires_grad for x in (latents, video, *features.values(), *posterior))
    assert all(p.grad is None for p in stage.lpips.parameters())


def test_distillation_alone_trains_the_blocks_up_to_the_deepest_named():
    stage, latents, video, features, posterior = stage1(blocks=("mid",))
    student = stage.student
    distillation_loss(student(latents, return_features=("mid",))[1], features, stage.heads).backward()
    trained = {key.split(".")[0] for key, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"conv_in", "mid_block"}
    assert all(p.grad.abs().sum() > 0 for p in stage.heads.parameters())


def test_training_lowers_every_term():
    stage, latents, video, features, posterior = stage1(normalize=True)
    optimizer, history = torch.optim.AdamW(stage.parameters(), lr=2e-3), []
    for _ in range(15):
        loss, terms = stage(latents, video, features, posterior)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(terms)
    assert all(history[-1][name] < history[0][name] for name in ("l1", "distill"))
