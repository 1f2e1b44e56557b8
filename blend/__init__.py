"""Diffusion Blend, the method: blends of reward-tuned diffusion adapters at inference (arXiv 2505.18547).

Names are imported on first use: torch and diffusers take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blend.adapters import AdapterBank as AdapterBank
    from blend.adapters import AdapterError as AdapterError
    from blend.bundle import ManifestError as ManifestError
    from blend.engine import BlendEngine as BlendEngine
    from blend.engine import Output as Output
    from blend.engine import Sample as Sample
    from blend.model import DiffusionModel as DiffusionModel
    from blend.model import ModelError as ModelError
    from blend.model import load_model as load_model
    from blend.pipeline import DiffusionBlendPipeline as DiffusionBlendPipeline
    from blend.preference import Preference as Preference
    from blend.preference import PreferenceError as PreferenceError

_HOMES = {
    "AdapterBank": "adapters",
    "AdapterError": "adapters",
    "BlendEngine": "engine",
    "DiffusionBlendPipeline": "pipeline",
    "DiffusionModel": "model",
    "ManifestError": "bundle",
    "ModelError": "model",
    "Output": "engine",
    "Preference": "preference",
    "PreferenceError": "preference",
    "Sample": "engine",
    "load_model": "model",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blend' has no attribute {name!r}")
    return getattr(importlib.import_module(f"blend.{_HOMES[name]}"), name)
