"""Writes adapters as single files with kohya's names, for ComfyUI, A1111 and their kin."""

import os
import secrets
import shutil
from pathlib import Path

from blend.lora_file import AdapterError, write_kohya
from infra.errors import RegistryError
from infra.export import MANIFEST_FILE, check_new
from infra.manifests import AdapterRecord, Record
from infra.registry import Registry

NOTE_FILE = "README.md"
_NOTE = """# {ref} as single-file LoRAs

{files}

Each file is one adapter, at strength 1 the one that was trained. **Stacking them only approximates the blend**: a
stack of LoRAs adds up weights once, Diffusion Blend mixes the noise predictions of the adapters at every denoising
step. Strengths that sum to 1 come nearest; `diffusion-blend generate` and `serve` make the blend itself.

Base model: {base} (SHA-256 {base_hash}). Licence: {licence}.
"""
_LABEL = "one adapter of a blend: stacking LoRAs only approximates blending their predictions"


def export_kohya(registry: Registry, record: Record, directory: Path) -> Path:
    """NAME.safetensors for an adapter, one file per basis name for a bundle, with a note and the manifest.

    All or nothing. Raises RegistryError when the directory holds something already, or kohya has no name for a layer.
    """
    check_new(directory)
    adapters = {record.name: record} if isinstance(record, AdapterRecord) else registry.adapters_of(record)
    staging = directory.parent / f".{directory.name}-{secrets.token_hex(8)}"
    staging.mkdir(parents=True)
    try:
        for basis, adapter in adapters.items():
            source = registry.fetch(adapter, staging / ".source" / basis)
            header = {
                "modelspec.title": f"{adapter.ref} ({adapter.reward})",
                "modelspec.description": _LABEL,
                "modelspec.license": adapter.licence,
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(adapter.rank),
                "ss_network_alpha": f"{adapter.alpha:g}",
                "ss_base_model": adapter.base.source,
            }
            write_kohya(source, staging / f"{basis}.safetensors", header)
        shutil.rmtree(staging / ".source")
        lines = (
            f"- `{basis}.safetensors`: {adapter.ref}, reward {adapter.reward}" for basis, adapter in adapters.items()
        )
        note = _NOTE.format(
            ref=record.ref,
            files="\n".join(lines),
            base=record.base.source,
            base_hash=record.base.sha256,
            licence=record.licence,
        )
        (staging / NOTE_FILE).write_text(note, encoding="utf-8")
        (staging / MANIFEST_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.rename(staging, directory)
    except AdapterError as error:
        raise RegistryError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory
