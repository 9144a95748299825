"""What the student is trained on: Equation 5's terms, stage 1.

    L = L_1 + α1 L_lpips + α2 L_distill + α3 L_kl        (α4 L_adv joins in stage 2)

Videos are (B, 3, T, H, W) in [-1, 1]; every term is a scalar.
"""
import torch
import torch.nn as nn

HEADS = ("pointwise", "linear", "mlp1", "mlp2")


def l1_loss(video, target):
    """Mean absolute error, Equation 5's L_1."""
    return (video.float() - target.float()).abs().mean()


def kl_loss(mean, logvar):
    """KL divergence of the posterior N(mean, exp(logvar)) from N(0, 1), summed over a clip's latents and averaged
    over clips: Equation 5's L_kl. Constant while the encoder is frozen; zero for a deterministic one (logvar None)."""
    if logvar is None:
        return mean.new_zeros(())
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


class LPIPS(nn.Module):
    """Equation 5's L_lpips: the perceptual distance (Zhang et al. 2018) on VGG features, averaged over all frames.

    The lpips package downloads torchvision's VGG16 weights on first use; where they cannot be had, OSError says so.
    """

    def __init__(self, net="vgg"):
        super().__init__()
        import lpips
        try:
            self.net = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
        except Exception as error:
            raise OSError(f"LPIPS needs torchvision's {net} weights, which could not be downloaded "
                          f"({type(error).__name__}); put them into {torch.hub.get_dir()}/checkpoints, "
                          f"or go on without the term: --lpips-weight 0") from None

    def train(self, mode=True):
        return super().train(False)     # the package's dropout would turn the loss into noise

    def forward(self, video, target):
        frames, targets = (v.transpose(1, 2).flatten(0, 1) for v in (video, target))
        return self.net(frames, targets).float().mean()


class ProjectionHead(nn.Module):
    """σ of Equation 4: maps a student's features (B, C_s, T, H, W) to the teacher's channels and grid.

    1x1x1 convolutions to C_t times the upsampling still missing, then a pixel shuffle. The kinds of Table 7:
    "pointwise" two convolutions with nothing between, "linear" one, "mlp1" and "mlp2" one and two hidden layers with
    SiLU. Raises ValueError where no whole factors of time and space lead from one shape to the other.
    """

    def __init__(self, student_shape, teacher_shape, kind="pointwise"):
        super().__init__()
        (_, c_in, t, h, w), (_, c_out, t_out, h_out, w_out) = student_shape, teacher_shape
        fits = [(r, drop) for r in (1, 2, 4, 8) for drop in (0, r - 1) if r * t - drop == t_out]
        if not fits or h_out % h or h_out // h * w != w_out:
            raise ValueError(f"no projection head from {tuple(student_shape)} to {tuple(teacher_shape)}")
        (self.time, self.drop), self.space = fits[0], h_out // h
        n = self.time * self.space ** 2
        if kind == "linear":
            layers = [(c_in, c_out * n)]
        elif kind in ("pointwise", "mlp1"):
            layers = [(c_in, c_out), (c_out, c_out * n)]
        elif kind == "mlp2":
            layers = [(c_in, c_out), (c_out, c_out), (c_out, c_out * n)]
        else:
            raise ValueError(f"a projection head is one of {', '.join(HEADS)}, not {kind!r}")
        layers = [nn.Conv3d(*channels, 1) for channels in layers]
        for i in range(len(layers) - 1 if kind.startswith("mlp") else 0, 0, -1):
            layers.insert(i, nn.SiLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        x = self.layers(x)
        b, _, t, h, w = x.shape
        r, s = self.time, self.space
        x = x.reshape(b, -1, r, s, s, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, -1, r * t, s * h, s * w)[:, :, self.drop:]


def make_heads(student_shapes, teacher_shapes, kind="pointwise"):
    """One head for each block of {name: shape}; none (the identity) where channels and grid agree already, as in the
    published code. Raises ValueError for an unknown kind."""
    if kind not in HEADS:
        raise ValueError(f"a projection head is one of {', '.join(HEADS)}, not {kind!r}")
    return nn.ModuleDict({name: nn.Identity() if tuple(student_shapes[name][1:]) == tuple(shape[1:])
                          else ProjectionHead(student_shapes[name], shape, kind)
                          for name, shape in teacher_shapes.items()})


def distillation_loss(student_features, teacher_features, heads, normalize=False):
    """Equation 4: the sum over blocks of the mean absolute difference between σ(student's features) and the
    teacher's. normalize divides each block's teacher features, and so the difference, by their standard deviation in
    the batch: needed where features are of a scale that would drown the other terms."""
    total = 0.0
    for name, target in teacher_features.items():
        target = target.float()
        scale = target.std().clamp_min(1e-6) if normalize else 1.0
        total = total + (heads[name](student_features[name]).float() - target / scale).abs().mean()
    return total


class Stage1(nn.Module):
    """Student, projection heads and Equation 5 without the adversarial term, as one module, so that one DDP wrapper
    sees every parameter that is trained."""

    def __init__(self, student, heads, lpips=None, lpips_weight=1.0, distill_weight=1.0, kl_weight=1e-7, normalize=False):
        super().__init__()
        self.student, self.heads, self.lpips = student, heads, lpips
        self.lpips_weight, self.distill_weight, self.kl_weight = lpips_weight, distill_weight, kl_weight
        self.normalize = normalize

    def forward(self, latents, video, teacher_features, posterior):
        """Returns (loss, {term: value, unweighted}). teacher_features: {block: tensor}; posterior: (mean, logvar)."""
        blocks = tuple(teacher_features)
        output = self.student(latents, return_features=blocks)
        reconstruction, features = output if blocks else (output, {})
        terms = {"l1": l1_loss(reconstruction, video), "kl": kl_loss(*posterior)}
        loss = terms["l1"] + self.kl_weight * terms["kl"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(reconstruction, video)
            loss = loss + self.lpips_weight * terms["lpips"]
        if blocks:
            terms["distill"] = distillation_loss(features, teacher_features, self.heads, self.normalize)
            loss = loss + self.distill_weight * terms["distill"]
        return loss, {name: value.detach() for name, value in terms.items()}
