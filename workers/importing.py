"""Takes a LoRA that was trained elsewhere into the registry, with what is known of it."""

import re
import tempfile
from pathlib import Path

from blend.adapters import AdapterBank
from blend.lora_file import BASE_HASH_KEY, AdapterError, read_lora, write_lora
from blend.model import load_model, model_hash
from infra.artifact_files import check_content
from infra.errors import RegistryError
from infra.manifests import AdapterFacts, AdapterRecord, BaseIdentity
from infra.registry import Registry
from workers.bundles import resolve_base
from workers.loading import adapter_file
from workers.publishing import UNKNOWN_LICENCE

NOT_KNOWN = "not known"


def import_adapter(
    registry: Registry, name: str, path: str | Path, *, base: str, reward: str = NOT_KNOWN, licence: str | None = None
) -> AdapterRecord:
    """Publish the LoRA at `path` (diffusers', peft's or kohya's layout, a file or a directory) as an adapter of `base`.

    It is loaded into the base first, so that only what fits is published; rank, alpha and layers are read from the
    file. KL weight and seed stay unknown. Raises RegistryError, UnsafeFileError, FileNotFoundError, BundleError.
    """
    registry.check_writable()
    file = adapter_file(str(path))
    check_content(file)
    base_path = resolve_base(base)
    model, sha256 = load_model(base_path), model_hash(base_path)
    try:
        AdapterBank(model.unet, base_hash=sha256).load(name, file)
        found = read_lora(file, layers_per_block=model.unet.config.layers_per_block)
    except AdapterError as error:
        raise RegistryError(f"{file} cannot be an adapter of {base}: {error}") from error
    largest = max(found.layers.values(), key=lambda layer: layer.rank)
    facts = AdapterFacts(
        base=BaseIdentity(source=base_path if Path(base).is_dir() else base, sha256=sha256),
        rank=largest.rank,
        alpha=largest.alpha,
        target_modules=tuple(sorted({_module(layer) for layer in found.layers})),
        reward=reward,
        reward_version=NOT_KNOWN,
        kl_weight=None,
        seed=None,
        licence=licence or UNKNOWN_LICENCE,
    )
    with tempfile.TemporaryDirectory() as directory:
        write_lora(directory, found.layers, {BASE_HASH_KEY: sha256})
        return registry.publish_adapter(name, directory, facts)


def _module(layer: str) -> str:
    """What target_modules calls a layer: "to_q" of an attention block, else its whole name."""
    found = re.search(r"\.attn\d+\.(.+)$", layer)
    return found[1] if found else layer
