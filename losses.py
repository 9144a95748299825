"""What the student is trained on: Equation 5's terms.

    L = L_1 + α1 L_lpips + α2 L_distill + α3 L_kl + α4 L_adv        (L_adv in stage 2 only)

α3 is KL_WEIGHT. Videos are (B, 3, T, H, W) in [-1, 1]; every term is a scalar.
"""
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

KL_WEIGHT = 1e-7    # the encoder is frozen, so the term has no gradient: it only shows in the loss
NOISE = 0.05        # standard deviation of the noise that the discriminator must not mind, in units of video
SMOOTHNESS = 10.0   # weight of the discriminator's approximate R1 penalty
HEADS = {"pointwise": 1, "linear": 0, "mlp1": 1, "mlp2": 2}     # Table 7's projection heads: their hidden layers


def l1_loss(video, target):
    """Mean absolute error, Equation 5's L_1."""
    return (video.float() - target.float()).abs().mean()


def kl_loss(mean, logvar):
    """KL divergence of each clip's posterior N(mean, exp(logvar)) from N(0, 1), summed over its latents: (B,). The mean
    over clips is Equation 5's L_kl. Zero for a deterministic encoder (logvar None)."""
    if logvar is None:
        return mean.new_zeros(len(mean))
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class LPIPS(nn.Module):
    """Equation 5's L_lpips: the perceptual distance (Zhang et al. 2018) on VGG features, averaged over frames.

    frames (B, k) says which k of each clip's frames; drawn at random, they make an unbiased estimate of the mean over
    all, at k / T of the price. Differentiable in `video` only: `target` and the network pass without a graph. The lpips
    package downloads torchvision's VGG16 weights on first use; where they cannot be had, OSError says so. random=True
    leaves them random: for speed, without the download.
    """

    def __init__(self, net="vgg", random=False):
        super().__init__()
        import lpips
        try:
            self.net = lpips.LPIPS(
                net=net, verbose=False, pnet_rand=random, pretrained=not random).eval().requires_grad_(False)
        except Exception as error:
            raise OSError(f"LPIPS needs torchvision's {net} weights, which could not be downloaded "
                          f"({type(error).__name__}); put them into {torch.hub.get_dir()}/checkpoints, "
                          f"or go on without the term: --lpips-weight 0") from None

    def train(self, mode=True):
        return super().train(False)     # the package's dropout would turn the loss into noise

    def forward(self, video, target, frames=None):
        video, target = video.transpose(1, 2), target.transpose(1, 2)
        if frames is not None:
            clip = torch.arange(len(video), device=video.device)[:, None]
            video, target = video[clip, frames], target[clip, frames]
        return self.net(*(v.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                          for v in (video, target))).float().mean()


class ProjectionHead(nn.Module):
    """σ of Equation 4: maps a student's features (B, C_s, T, H, W) to the teacher's channels and grid.

    1x1x1 convolutions to C_t times the upsampling still missing, then a pixel shuffle. The kinds of Table 7:
    "pointwise" two convolutions with nothing between, "linear" one, "mlp1" and "mlp2" one and two hidden layers with
    SiLU. ValueError where no whole factors of time and space lead from one shape to the other.
    """

    def __init__(self, student_shape, teacher_shape, kind="pointwise"):
        super().__init__()
        if kind not in HEADS:
            raise ValueError(f"a projection head is one of {', '.join(HEADS)}, not {kind!r}")
        (_, c_in, t, h, w), (_, c_out, t_out, h_out, w_out) = student_shape, teacher_shape
        fits = [(r, drop) for r in (1, 2, 4, 8) for drop in (0, r - 1) if r * t - drop == t_out]
        if not fits or h_out % h or h_out // h * w != w_out:
            raise ValueError(f"no projection head from {tuple(student_shape)} to {tuple(teacher_shape)}")
        (self.time, self.drop), self.space = fits[0], h_out // h
        self.layers = nn.Sequential()
        for _ in range(HEADS[kind]):
            self.layers.append(nn.Conv3d(c_in, c_out, 1))
            if kind.startswith("mlp"):
                self.layers.append(nn.SiLU())
            c_in = c_out
        self.layers.append(nn.Conv3d(c_in, c_out * self.time * self.space ** 2, 1))

    def forward(self, x):
        x = self.layers(x)
        b, _, t, h, w = x.shape
        r, s = self.time, self.space
        x = x.reshape(b, -1, r, s, s, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, -1, r * t, s * h, s * w)[:, :, self.drop:]


def make_heads(student_shapes, teacher_shapes, kind="pointwise"):
    """One head for each block of {name: shape}; none (the identity) where channels and grid agree already, as in the
    published code."""
    return nn.ModuleDict({name: nn.Identity() if tuple(student_shapes[name][1:]) == tuple(shape[1:])
                          else ProjectionHead(student_shapes[name], shape, kind)
                          for name, shape in teacher_shapes.items()})


def distillation_loss(student_features, teacher_features, heads, normalize=False):
    """Equation 4: the sum over blocks of the mean absolute difference between σ(student's features) and the
    teacher's. normalize divides each clip's teacher features, and so the difference, by their standard deviation:
    needed where features are of a scale that would drown the other terms."""
    total = 0.0
    for name, target in teacher_features.items():
        target = target.float()
        if normalize:                   # by the clip, so that a loss does not depend on how a batch is split
            target = target / target.std((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
        total = total + (heads[name](student_features[name]).float() - target).abs().mean()
    return total


class StudentWithHeads(nn.Module):
    """Student, projection heads and Equation 4 as one module, so that one DDP wrapper sees all trained parameters."""

    def __init__(self, student, heads, normalize=False):
        super().__init__()
        self.student, self.heads, self.normalize = student, heads, normalize

    def forward(self, latents, teacher_features):
        """Returns (video, distillation loss or None); teacher_features: {block: tensor}, empty for none."""
        if not teacher_features:
            return self.student(latents), None
        video, features = self.student(latents, return_features=tuple(teacher_features))
        return video, distillation_loss(features, teacher_features, self.heads, self.normalize)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2.

class PatchDiscriminator(nn.Module):
    """3D PatchGAN (Isola et al. 2017): (B, 3, T, H, W) -> a logit for each patch, (B, 1, t, h, w); positive means real.
    `width` is a multiple of 4.

    Strided 3x3x3 convolutions of width, 2, 4 and 8 times it, halving space four times and time twice. Normalised within
    a clip, not over the batch: a clip's logits must not depend on which others share its micro-batch or process.
    """

    def __init__(self, width=64):
        super().__init__()
        layers, c_in = [], 3
        for i in range(4):
            c_out = width * 2 ** i
            norm = [nn.GroupNorm(8, c_out)] if i else []
            layers += self.conv(c_in, c_out, (2 if i < 2 else 1, 2, 2)) + norm + [nn.LeakyReLU(0.2)]
            c_in = c_out
        self.layers = nn.Sequential(*layers, *self.conv(c_in, 1, 1))

    @staticmethod
    def conv(c_in, c_out, stride):
        # Time is padded in a layer of its own: where the convolution pads it, PyTorch 2.15's bfloat16 weight gradient
        # of short clips is wrong on CPUs with AVX512.
        return [nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), nn.Conv3d(c_in, c_out, 3, stride, (0, 1, 1))]

    def forward(self, video):
        return self.layers(video)


def generator_loss(discriminator, video):
    """Equation 5's L_adv, hinge form: minus the mean logit of what the student made."""
    return -discriminator(video).float().mean()


def discriminator_loss(discriminator, real, fake, noise):
    """Hinge loss plus SMOOTHNESS times the approximate R1 penalty (Lin et al. 2025). Returns (hinge, loss).

    The penalty is the mean squared change of the logits when NOISE times `noise`, of unit variance, is added to real
    video. Without it the discriminator separates real and fake perfectly, and what it tells the student is arbitrary.
    """
    a, b = discriminator(real).float(), discriminator(fake).float()
    hinge = F.relu(1 - a).mean() + F.relu(1 + b).mean()
    change = discriminator(real + NOISE * noise).float() - a
    return hinge, hinge + SMOOTHNESS * change.square().mean()


class Objective:
    """Equation 5's terms, and their gradients, for one micro-batch.

    The terms on the video (L_1, LPIPS, the discriminator) have graphs of their own. These end at the decoded video and
    are freed before the student's backward pass begins, which takes less memory than one graph for all. It also gives
    the gradients of reconstruction and discriminator apart, as the adaptive weight needs them.
    """

    def __init__(self, lpips=None, lpips_weight=1.0, distill_weight=1.0):
        self.lpips, self.lpips_weight, self.distill_weight = lpips, lpips_weight, distill_weight
        self.discriminator, self.adversarial_weight = None, 0.0     # stage 2's: α4 times VQGAN's adaptive weight

    def backward(self, model, latents, features, target, kl, frames=None, noise=None, scale=lambda loss: loss,
                 autocast=nullcontext):
        """Adds the gradients of the loss to those of `model` (a StudentWithHeads, under DDP or not).

        In stage 2, also adds those of the discriminator's loss to the discriminator's. kl: a scalar; frames: for LPIPS;
        noise: like target, for the discriminator; scale multiplies a loss before its backward pass.

        Returns ({term: value}, gradients on the video). The terms are unweighted; "loss" is their weighted sum without
        L_adv. The gradients are a pair: reconstruction's, and L_adv's, which is None in stage 1.
        """
        with autocast():
            decoded, distill = model(latents, features)
            video = decoded.detach().float().requires_grad_()
            terms = {"l1": l1_loss(video, target), "kl": kl}
            loss = terms["l1"]
            if self.lpips is not None:
                terms["lpips"] = self.lpips(video, target, frames)
                loss = loss + self.lpips_weight * terms["lpips"]
        reconstruction, = torch.autograd.grad(scale(loss), video)
        total, adversarial = reconstruction, None
        loss = loss.detach() + KL_WEIGHT * kl
        if self.discriminator is not None:
            with autocast():
                terms["adversarial"] = generator_loss(self.discriminator, video)
            adversarial, = torch.autograd.grad(scale(terms["adversarial"]), video)
            with autocast():
                terms["discriminator"], d_loss = discriminator_loss(
                    self.discriminator, target, video.detach(), noise)
            scale(d_loss).backward()
            total = reconstruction + self.adversarial_weight * adversarial
        roots = [(decoded, total.to(decoded.dtype))]
        if distill is not None:
            terms["distill"] = distill
            loss = loss + self.distill_weight * distill.detach()
            roots.append((scale(self.distill_weight * distill), None))
        torch.autograd.backward(*zip(*roots))
        terms["loss"] = loss
        return {name: value.detach() for name, value in terms.items()}, (reconstruction, adversarial)


def last_layer_gradients(student, latents, *gradients, autocast=nullcontext):
    """The last convolution's weight gradient, for each of the gradients on the decoded video."""
    with autocast():
        video = student.forward(latents)            # never compiled: that would be another graph for this alone
    weight = student.conv_out.conv.weight
    return [torch.autograd.grad(video, weight, g.to(video.dtype), retain_graph=True)[0].float() for g in gradients]


def adaptive_weight(reconstruction, adversarial):
    """VQGAN's adaptive weight (Esser et al. 2021): the ratio of the loss terms' gradient norms at the last layer, at
    most 10,000."""
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(max=1e4)


def sharpness(video):
    """Energy of each clip above a quarter of a cycle per pixel, half of Nyquist's: the mean square of what an ideal
    high-pass filter leaves of its frames. (B, 3, T, H, W) -> (B,). No loss term optimises it."""
    spectrum = torch.fft.fft2(video.float(), norm="ortho").abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=video.device) for n in video.shape[-2:])
    return (spectrum * (torch.hypot(fy[:, None], fx[None]) > 0.25)).flatten(1).mean(1)
