"""Fixtures shared by all rooms: a tiny model of the real classes, and adapters for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's default of 15 lets every other test go first, and the tests that wait for Ray wait
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch
from hypothesis import settings

# two threads on two busy cores spin: a forward gets thirty times slower
torch.set_num_threads(1)

# busy machines make deadlines flaky; the same examples on every machine make failures repeatable
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")

# tests/helpers is on the path: see pyproject.toml
pytest_plugins = ["s3_servers", "sharing"]


@pytest.fixture(scope="session")
def tiny_sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline with random weights under a seed: 8 x 8 latents, 32 x 32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )
        tokenizer = _byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    directory = tmp_path_factory.mktemp("tiny_sd")
    pipeline.save_pretrained(directory)
    return directory


def _byte_tokenizer(directory: Path):
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=77)


@pytest.fixture(scope="session")
def tiny_lora(tiny_sd_dir: Path) -> Callable[..., Path]:
    """Factory (directory, seed=0, rank=4, strength=0.2) -> directory with pytorch_lora_weights.safetensors, B not 0."""
    from safetensors.torch import load_file, save_file

    names = [
        key.removesuffix(".weight")
        for key in load_file(tiny_sd_dir / "unet" / "diffusion_pytorch_model.safetensors")
        if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    ]
    weights = load_file(tiny_sd_dir / "unet" / "diffusion_pytorch_model.safetensors")

    def make(path: str | Path, seed: int = 0, rank: int = 4, strength: float = 0.2) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name in names:
            out_features, in_features = weights[f"{name}.weight"].shape
            down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            up = torch.randn(out_features, rank, generator=generator) * strength
            tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = down, up
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_adapters(tiny_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two different adapters of the tiny model: basis name -> directory."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(tiny_lora(root / name, seed)) for seed, name in enumerate(("warm", "small"), start=1)}


@pytest.fixture(scope="session")
def tiny_store_url(
    tiny_sd_dir: Path, tiny_adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A registry on disk whose bundle tiny@champion holds the tiny model and both adapters, and a cache of its own."""
    from blend.model import model_hash
    from infra.manifests import AdapterFacts, BaseIdentity, BundleDefaults
    from infra.registry import Registry
    from infra.storage import open_store

    root = tmp_path_factory.mktemp("registry")
    url = f"file://{root / 'store'}"
    registry = Registry(open_store(url))
    base = BaseIdentity(source=str(tiny_sd_dir), sha256=model_hash(tiny_sd_dir))
    records = {}
    for seed, (name, directory) in enumerate(tiny_adapters.items(), start=1):
        facts = AdapterFacts(
            base=base,
            rank=4,
            alpha=4.0,
            target_modules=("to_q", "to_k", "to_v", "to_out.0"),
            reward="colourfulness",
            reward_version="1",
            kl_weight=0.1,
            seed=seed,
        )
        records[name] = registry.publish_adapter(name, directory, facts)
    defaults = BundleDefaults(guidance_scale=2.0, num_inference_steps=4)
    bundle = registry.publish_bundle("tiny", base, records, defaults=defaults)
    registry.promote("tiny", bundle.version, actor="tests", reason="first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSION_BLEND_CACHE_DIR", str(root / "cache"))
        yield url


@pytest.fixture(scope="session")
def rivals_store_url(
    tiny_store_url: str, tiny_adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A registry on disk whose bundle rivals@1 holds the tiny adapters as tuned for two different rewards."""
    from infra.manifests import AdapterFacts
    from infra.registry import Registry
    from infra.storage import open_store

    url = f"file://{tmp_path_factory.mktemp('rivals') / 'store'}"
    tiny, registry = Registry(open_store(tiny_store_url)), Registry(open_store(url))
    records = {}
    for (name, directory), reward in zip(tiny_adapters.items(), ("colourfulness", "compressibility"), strict=True):
        known = tiny.get_adapter(name)
        facts = {field: getattr(known, field) for field in AdapterFacts.model_fields} | {"reward": reward}
        records[name] = registry.publish_adapter(name, directory, AdapterFacts(**facts))
    base, defaults = tiny.get_bundle("tiny@champion").base, tiny.get_bundle("tiny@champion").defaults
    registry.publish_bundle("rivals", base, records, defaults=defaults)
    return url


@pytest.fixture(scope="module")
def coarse_figures() -> Iterator[None]:
    """Figures of evaluations have few pixels: to draw them is most of the work of an evaluation of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.evaluation.style.DPI", 50)
        yield
