"""Opens what is to be served: a bundle of the registry, or a base with adapters by path, as an engine with its card.

torch is imported when an engine is loaded, not before: checking that a bundle is there and whole needs none.
"""

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.settings import Settings, read_settings
from workers.bundles import LoadedBundle, Progress, load_engine, open_bundle, resolve_base
from workers.engine_args import EngineArgs
from workers.model_card import BasisCard, BundleName, Defaults, Limits, ModelCard

if TYPE_CHECKING:
    from blend.engine import BlendEngine
    from blend.model import DiffusionModel
    from workers.generation import Opened

# Larger sides cost memory and seconds without giving better images than the model's own size does.
LARGEST_SIDE = 2


def settings_of(args: EngineArgs) -> Settings:
    """The environment's settings with the registry that `args` names."""
    settings = read_settings()
    return settings.model_copy(update={"store_url": args.store_url}) if args.store_url else settings


def pin(args: EngineArgs, on_bytes: Progress | None = None) -> EngineArgs:
    """`args` with the bundle's version written out. Fetches and checks all files, so that errors come early."""
    if args.bundle_ref is not None:
        asked_as = args.asked_as or args.bundle_ref
        return args.model_copy(update={"bundle": _open(args, on_bytes).record.ref, "asked_as": asked_as})
    resolve_base(str(args.base))
    for path in args.adapters.values():
        adapter_file(path)
    return args


def open_engine(args: EngineArgs, on_bytes: Progress | None = None) -> "Opened":
    """Load the engine of `args`. Raises what is wrong with the bundle, the base or an adapter, before any work."""
    import torch

    from workers.generation import Opened

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bundle_ref is None:
        engine, card = _open_paths(args, device)
    else:
        bundle = _open(args, on_bytes)
        engine = load_engine(bundle, device=device, **_engine_options(args))
        card = _card_of_bundle(args, bundle, engine.model)
    # A fast tokenizer cannot be used by two threads at once, and the engine's thread has the original.
    return Opened(engine, card, copy.deepcopy(engine.model.text.tokenizers[0]), args)


def _engine_options(args: EngineArgs) -> dict[str, Any]:
    return {
        "max_rows": args.max_rows,
        "tile_rows": args.tile_rows,
        "deterministic": args.deterministic,
        "memory_bytes": args.memory_bytes,
    }


def _open(args: EngineArgs, on_bytes: Progress | None) -> LoadedBundle:
    return open_bundle(str(args.bundle_ref), settings_of(args), base=args.base, on_bytes=on_bytes)


def adapter_file(path: str) -> Path:
    """The safetensors file of an adapter given as a file or as a directory in diffusers' layout."""
    found = Path(path) / "pytorch_lora_weights.safetensors" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise FileNotFoundError(
            f"no adapter at {path}: give a directory with pytorch_lora_weights.safetensors, or such a file"
        )
    return found


def _open_paths(args: EngineArgs, device: str) -> "tuple[BlendEngine, ModelCard]":
    from blend.adapters import AdapterBank
    from blend.engine import BlendEngine, Sample
    from blend.model import load_model, model_hash

    base = resolve_base(str(args.base))
    files = {name: adapter_file(path) for name, path in args.adapters.items()}
    model, base_hash = load_model(base, device=device), model_hash(base)
    bank = AdapterBank(model.unet, base_hash=base_hash)
    digest = hashlib.sha256(base_hash.encode())
    for name, file in files.items():
        bank.load(name, file)
        digest.update(f"\n{name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    engine = BlendEngine(model, bank, **_engine_options(args))
    defaults = Sample.__dataclass_fields__
    card = _card(
        model,
        BundleName(name=Path(str(args.base)).resolve().name, version=None, digest=digest.hexdigest()),
        [BasisCard(name=name) for name in files],
        {
            "num_inference_steps": defaults["num_inference_steps"].default,
            "guidance_scale": defaults["guidance_scale"].default,
        },
    )
    return engine, card


def _card_of_bundle(args: EngineArgs, bundle: LoadedBundle, model: "DiffusionModel") -> ModelCard:
    record = bundle.record
    chosen = record.defaults
    basis = [
        BasisCard(
            name=name,
            adapter=adapter.ref,
            reward=adapter.reward,
            weight_range=(span.low, span.high) if (span := record.weight_ranges.get(name)) else None,
        )
        for name, adapter in bundle.adapter_records.items()
    ]
    settings = {
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "method": chosen.method,
    }
    if chosen.width and chosen.height:
        settings["size"] = f"{chosen.width}x{chosen.height}"
    name = BundleName(name=record.name, version=record.version, digest=record.digest)
    card = _card(model, name, basis, settings)
    return card.model_copy(
        update={
            "accepted_names": sorted({record.name, record.ref, args.asked_as or str(args.bundle_ref)}),
            "kl_lambda_recommended": (record.lambda_range.low, record.lambda_range.high),
        }
    )


def _card(model: "DiffusionModel", bundle: BundleName, basis: list[BasisCard], settings: dict[str, Any]) -> ModelCard:
    from blend.preference import KL_LAMBDA_RANGE, METHODS

    halvings = len(model.unet.config.down_block_types) - 1
    multiple = model.vae_scale_factor * 2**halvings
    own = max(model.default_width, model.default_height)
    return ModelCard(
        id=bundle.name,
        accepted_names=[bundle.name],
        bundle=bundle,
        basis=basis,
        methods=list(METHODS),
        kl_lambda_range=KL_LAMBDA_RANGE,
        kl_lambda_recommended=(0.0, 1.5),
        defaults=Defaults(
            # With one adapter there is nothing to prefer; with more the choice is the user's.
            weights={basis[0].name: 1.0} if len(basis) == 1 else None,
            **{"size": f"{model.default_width}x{model.default_height}", **settings},
        ),
        limits=Limits(
            size_multiple=multiple,
            min_size=multiple,
            max_size=LARGEST_SIDE * own,
            max_prompt_tokens=model.text.tokenizers[0].model_max_length,
        ),
    )
