"""daVinci-MagiHuman's decoder: a student of Wan 2.2's latents that others trained, also MAGI-2's.

    from magihuman import MagiHuman                       # beside model.py, or with both folders on PYTHONPATH
    student = MagiHuman.from_pretrained("checkpoint-340000.ckpt")
    video = student(latents)                              # as a TurboVAED: stream, decode, use_student ...

It is a TurboVAED with parts of its own: an upsampler as in Wan's VAEs, a shortcut whose norm learns nothing, and a head
that makes each patch of pixels at once. Its checkpoint loads as it is shipped.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import WHOLE, Conv3d, Resnet, TurboVAED, TurboVAEDConfig, pad_time, rms_norm

CONFIG = TurboVAEDConfig(
    latent_channels=48, widths=(512, 512, 256, 128, 64), resnets=(3, 3, 2, 2, 2), up=((2, 2), (2, 2), (1, 2), None),
    patch=2, drop_first=True, separable=())


class Resampler(nn.Module):
    """The upsampler of Wan's VAEs, not causal here.

    Time: a convolution along it to r_t times the channels, in order (frame, channel). Space: nearest neighbour and a 2D
    convolution.
    """

    def __init__(self, width, factors, drop_first):
        super().__init__()
        self.factors, self.drop = factors, factors[0] - 1 if drop_first else 0
        if factors[0] > 1:
            self.time_conv = nn.Module()
            self.time_conv.conv = nn.Conv3d(width, width * factors[0], (3, 1, 1))
        self.resample = nn.Sequential(nn.Upsample(scale_factor=factors[1]), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x, context=WHOLE):
        B, r_t = x.shape[0], self.factors[0]
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
        if r_t > 1:
            x = self.time_conv.conv(pad_time(x, 1, context))
            x = x.unflatten(1, (r_t, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = x[:, :, self.drop:] if context.first else x
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)
        return x.contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)

    def reach(self, r, axis):
        r = -(-(r + axis) // self.factors[axis])        # the 2D convolution looks one pixel further
        return r + 1 if axis == 0 and self.factors[0] > 1 else r


class ChannelRMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x, eps=1e-6)


class MagiHuman(TurboVAED):
    def __init__(self, config=CONFIG):
        super().__init__(config)
        for block, width, factors in zip(self.up_blocks, config.widths[1:], config.up):
            if factors:
                block.upsamplers[0] = Resampler(width, factors, config.drop_first)
            if isinstance(block.conv_in, Resnet):
                block.conv_in.norm3 = ChannelRMSNorm()
        for name in [name for name, _ in self.named_children() if name.startswith("upsampler2d")]:
            delattr(self, name)
        self.conv_out = Conv3d(config.widths[-1], 3 * config.patch ** 2)

    def out(self, x, context=WHOLE):
        """The last block's features to video; conv_out's channels are in order (C, column, row)."""
        p = self.config.patch
        x = super().out(x, context).unflatten(1, (3, p, p)).transpose(2, 3).flatten(1, 3)
        return F.pixel_shuffle(x.transpose(1, 2), p).transpose(1, 2)

    @classmethod
    def from_pretrained(cls, path, config=CONFIG):
        student = super().from_pretrained(path, config)
        student.metadata.setdefault("teacher", "wan22")
        return student
