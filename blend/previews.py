"""Pictures of samples that are still on their way: the predicted x_0, made visible cheaply.

A tiny decoder (AutoencoderTiny) is run as it is: a preview has the image's own size. Any other decoder is stood in for
by a linear map from a latent cell to its colour, one pixel per cell. The map has no constants of its own: it is
fitted by least squares to what this very model decoded, latent cells against the mean colour of the pixels they
became. Knows no engine; nothing here touches a sample.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from blend.model import DiffusionModel

MOST_IMAGES = 32  # decoded images that the fit listens to: thousands of cells for a handful of numbers
_RIDGE = 1e-6  # of the mean squared latent: keeps a fit to a flat image finite


class LinearDecoder:
    """rgb = W [latent, 1] for each latent cell; W [3, C + 1] is the least-squares fit to the pairs it was shown."""

    def __init__(self, channels: int) -> None:
        self.images = 0
        self._channels = channels
        self._moments: Tensor | None = None  # [C + 1, C + 1 + 3] sums of x x^T and x y^T over cells
        self._map: Tensor | None = None

    def observe(self, latents: Tensor, images: Tensor) -> None:
        """Learn from latents [B, C, h, w] and their images [B, 3, H, W]; after MOST_IMAGES images, nothing more.

        Only sums are kept, on the images' device: no copy to the CPU, no waiting for it.
        """
        room = MOST_IMAGES - self.images
        if room <= 0:
            return
        latents, images = latents[:room].to(images.device, torch.float32), images[:room].float()
        cells = _with_one(latents)
        colours = adaptive_avg_pool2d(images, (latents.shape[-2], latents.shape[-1]))
        seen = torch.cat([cells, colours], 1).movedim(1, -1).flatten(0, -2)  # [cells, C + 1 + 3]
        keep = seen.isfinite().all(1, keepdim=True)  # one broken image must not spoil the map
        seen = torch.where(keep, seen, torch.zeros_like(seen))
        sums = seen[:, : self._channels + 1].T @ seen
        self._moments = sums if self._moments is None else self._moments.to(sums.device) + sums
        self._map = None
        self.images += len(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return [B, 3, h, w] in [0, 1] for latents [B, C, h, w]; RuntimeError when it has seen no image yet."""
        if self._moments is None:
            raise RuntimeError("the linear decoder has seen no image: let it observe one first")
        fitted = self._map  # kept in hand: another thread that observes meanwhile drops the shared one
        if fitted is None:
            size = self._channels + 1
            sums = self._moments.double().cpu()
            ridge = _RIDGE * sums[:size, :size].diagonal().mean().clamp(min=_RIDGE)
            square = sums[:size, :size] + ridge * torch.eye(size, dtype=torch.float64)
            fitted = self._map = torch.linalg.solve(square, sums[:, size:]).T.float()
        return torch.einsum("rc,bchw->brhw", fitted.to(latents.device), _with_one(latents.float())).clamp(0, 1)


class Previewer:
    """Shows predicted x_0 latents of one model."""

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._linear = None if isinstance(model.vae, AutoencoderTiny) else LinearDecoder(model.latent_channels)

    def observe(self, latents: Tensor, images: Tensor) -> None:
        """Take note of what the model decoded: latents [B, C, h, w] -> images [B, 3, H, W]."""
        if self._linear is not None:
            self._linear.observe(latents, images)

    @torch.inference_mode()
    def show(self, origin: Tensor) -> Tensor:
        """Return an image in [0, 1] for a predicted x_0 [C, h, w].

        [3, H, W] through a tiny decoder, else [3, h, w]: one pixel per latent cell. The first picture of a model
        with a large decoder that has decoded nothing yet costs one whole decoding, to which the map is fitted.
        """
        latents = origin[None]
        if self._linear is None:
            return self._model.decode(latents)[0]
        if self._linear.images == 0:
            self.observe(latents, self._model.decode(latents))
        return self._linear.decode(latents)[0]


def _with_one(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
