"""The two nets. Both take RGB as (x / 255 - 0.5) / 0.5, `[n, 3, size, size]`, and return logits."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger's net with zero padding: widths base × (1, 2, 4, 8, 16). Logits `[n, classes, h, w]`."""

    def __init__(self, classes: int = 4, base: int = 16):
        super().__init__()
        widths = [base << level for level in range(5)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([3, *widths], widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(double_conv(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(base, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, conv in enumerate(self.down):
            x = conv(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for level in reversed(range(len(self.grow))):
            x = self.up[level](torch.cat([skips[level], self.grow[level](x)], 1))
        return self.head(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.training:  # the same sum, in one faster kernel
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # spelled out, so that the ONNX graph holds MatMul, Softmax, MatMul
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._sometimes(self.attn(self.norm1(x)))
        return x + self._sometimes(self.mlp(self.norm2(x)))

    def _sometimes(self, branch: torch.Tensor) -> torch.Tensor:
        """Stochastic depth: in training a branch is left out for some tiles."""
        if not self.training or self.drop == 0:
            return branch
        keep = 1 - self.drop
        return branch * torch.empty(branch.shape[0], 1, 1, device=branch.device).bernoulli_(keep) / keep


class ViT(nn.Module):
    """Class token, learned positions, pre-norm, as in timm. Logits `[n, classes]`."""

    def __init__(self, classes: int = 4, size: int = 96, patch: int = 8, width: int = 192, depth: int = 6, heads: int = 6):
        super().__init__()
        tokens = (size // patch) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, 0.1 * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Class token first, then one token a patch, row by row: `[n, 1 + tokens, width]`."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(x)[:, 0])
