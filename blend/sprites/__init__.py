"""The embedded sprites world: captions, art, scenes, and the models trained on them."""

from __future__ import annotations

from pathlib import Path

REGISTRY_PATH = Path(__file__).parent / "registry"  # the shipped, read-only registry with bundle sprites@champion


def base_model_path() -> Path:
    """The shipped base model: a Stable-Diffusion-style diffusers directory."""
    return Path(__file__).parent / "base"
