"""Counts what really runs, for costs that are only stated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blend.model import DiffusionModel


@contextmanager
def counted(model: DiffusionModel) -> Iterator[dict[str, int]]:
    """Count rows through the UNet, forward and backward ("gradients"), and latents through the decoder."""
    seen = {"rows": 0, "decodes": 0, "gradients": 0}

    def count(name, tensor):
        seen[name] += len(tensor)

    def row(_module, inputs, output):
        count("rows", inputs[0])
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: count("gradients", gradient))

    def image(_module, inputs, _output):
        count("decodes", inputs[0])

    hooks = [model.unet.register_forward_hook(row), model.vae.decoder.register_forward_hook(image)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
