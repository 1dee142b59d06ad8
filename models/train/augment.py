"""What scanners, stains and pens do to a tile: all on `[n, 3, h, w]` RGB in 0..1, on the batch's device."""

import torch
import torch.nn.functional as F

# Optical density of haematoxylin, eosin and a residual (Ruifrok and Johnston, 2001).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
INKS = torch.tensor([[0.05, 0.05, 0.06], [0.08, 0.12, 0.55], [0.10, 0.25, 0.75], [0.02, 0.40, 0.28], [0.70, 0.08, 0.15]])


def augment(tile: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the tile, its labels with covered cells removed, and the covered pixels `[n, h, w]` (bool)."""
    tile = restain(tile)
    n, _, h, w = tile.shape
    empty = uniform(n, 0, 1, tile) < 0.08
    torn = (uniform(n, 0, 1, tile) < 0.18) & ~empty
    glass_alpha = torch.where(empty, 1.0, torn * blobs(n, h, w, tile))
    tile = torch.lerp(tile, glass(n, h, w, tile), glass_alpha)
    inked = uniform(n, 0, 1, tile) < torch.where(empty, 0.5, 0.06)
    ink, ink_alpha = stroke(n, h, w, tile)
    ink_alpha = ink_alpha * inked
    tile = torch.where(uniform(n, 0, 1, tile) < 0.5, tile * (1 - ink_alpha * (1 - ink)), torch.lerp(tile, ink, ink_alpha))
    # A scanner paints what it did not scan in one colour, white or black.
    unscanned = empty & (uniform(n, 0, 1, tile) < 0.08)
    tile = torch.where(unscanned, (uniform(n, 0, 1, tile) < 0.5).float(), tile)
    covered = ((glass_alpha > 0.5) | (ink_alpha > 0.35)).squeeze(1)
    return camera(tile), labels.masked_fill(covered, 0), covered


def restain(tile: torch.Tensor) -> torch.Tensor:
    """Each stain's strength, offset and hue vary; white stays white but for the offset."""
    n = len(tile)
    stains = F.normalize(STAINS.to(tile), dim=1)
    density = -torch.log(tile.clamp_min(1 / 255))
    amounts = torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(stains))
    strength = torch.exp(normal(n, 3, 0.25, tile))
    amounts = amounts * strength + normal(n, 3, 0.02, tile)
    hues = F.normalize((stains + 0.06 * torch.randn(n, 3, 3, device=tile.device)).clamp_min(0.01), dim=2)
    return torch.exp(-torch.einsum("nshw,nsc->nchw", amounts, hues)).clamp(0, 1)


def camera(tile: torch.Tensor) -> torch.Tensor:
    """Focus, contrast, brightness, white balance, saturation, gamma, noise."""
    n = len(tile)
    line = torch.tensor([0.06, 0.24, 0.40, 0.24, 0.06], device=tile.device)
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(tile, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    tile = torch.lerp(tile, blurred, uniform(n, -0.6, 1.0, tile))  # below 0 sharpens
    grey = tile.mean(1, keepdim=True)
    tile = torch.lerp(grey, tile, uniform(n, 0.6, 1.3, tile))
    mean = tile.mean((1, 2, 3), keepdim=True)
    tile = (tile - mean) * uniform(n, 0.75, 1.25, tile) + mean * uniform(n, 0.88, 1.1, tile)
    tile = tile * (1 + normal(n, 3, 0.03, tile))
    tile = tile.clamp(0.001, 1) ** torch.exp(normal(n, 1, 0.15, tile))
    return (tile + torch.randn_like(tile) * uniform(n, 0, 0.03, tile)).clamp(0, 1)


def glass(n: int, h: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """Empty slide: near white, tinted, shaded, grainy, with dust and blurs out of focus."""
    tint = uniform(n, 0.78, 1.0, like) * (1 + normal(n, 3, 0.015, like))
    shade = 1 + clouds(n, h, w, 3, like) * uniform(n, 0, 0.03, like)
    tile = tint * shade + torch.randn(n, 3, h, w, device=like.device) * uniform(n, 0, 0.02, like)
    # 4 specks a tile: sharp dust or wide, faint blurs.
    x = torch.arange(w, device=like.device).view(1, 1, 1, w)
    y = torch.arange(h, device=like.device).view(1, 1, h, 1)
    cx, cy, kind = torch.rand(3, n, 4, 1, 1, device=like.device)
    radius = torch.where(kind < 0.6, 1 + 9 * kind, 10 + 60 * (kind - 0.6))
    distance = torch.sqrt((x - cx * w) ** 2 + (y - cy * h) ** 2)
    dark = torch.rand(n, 4, 1, 1, device=like.device) * torch.where(kind < 0.6, 0.7, 0.12)
    dark = dark * (torch.rand(n, 4, 1, 1, device=like.device) < 0.35)
    speck = (dark * torch.sigmoid((radius - distance) / (0.15 * radius + 0.5))).amax(1, keepdim=True)
    return (tile * (1 - speck * (1 + normal(n, 3, 0.1, like)))).clamp(0, 1)


def stroke(n: int, h: int, w: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A felt-tip pen's arc, from thin lines to ink wider than the tile: colour and opacity."""
    ink = INKS.to(like)[torch.randint(len(INKS), (n,), device=like.device)].view(n, 3, 1, 1)
    ink = (ink * uniform(n, 0.6, 1.5, like) + normal(n, 3, 0.04, like)).clamp(0.02, 0.95)
    x = torch.arange(w, device=like.device).view(1, 1, 1, w)
    y = torch.arange(h, device=like.device).view(1, 1, h, 1)
    bend = torch.exp(uniform(n, 4.5, 8.0, like))  # radius of the arc, px
    heading = uniform(n, 0, 6.2832, like)
    px, py = uniform(n, 0, w, like), uniform(n, 0, h, like)  # a point on the arc
    cx, cy = px + bend * torch.cos(heading), py + bend * torch.sin(heading)
    distance = (torch.sqrt((x - cx) ** 2 + (y - cy) ** 2) - bend).abs()
    half_width = torch.exp(uniform(n, 1.5, 6.2, like))  # 4 to 500 px
    alpha = torch.sigmoid((half_width - distance) / uniform(n, 0.5, 6, like))
    streaks = 1 + clouds(n, h, w, 1, like) * uniform(n, 0, 0.3, like)
    grain = 1 + torch.randn(n, 1, h, w, device=like.device) * uniform(n, 0, 0.15, like)
    return ink, (alpha * streaks * grain * uniform(n, 0.55, 1.0, like)).clamp(0, 1)


def blobs(n: int, h: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """Soft-edged islands covering some part of the tile, 0..1."""
    return torch.sigmoid((clouds(n, h, w, 1, like) + normal(n, 1, 0.6, like)) * uniform(n, 4, 30, like))


def clouds(n: int, h: int, w: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Smooth noise of about unit spread."""
    coarse = torch.randn(n, channels, 4, 4, device=like.device)
    return F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)


def uniform(n: int, low: float, high: float, like: torch.Tensor) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1, device=like.device)


def normal(n: int, channels: int, spread: float, like: torch.Tensor) -> torch.Tensor:
    return spread * torch.randn(n, channels, 1, 1, device=like.device)
