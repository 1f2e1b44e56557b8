"""What a person reads after a training run: the reward/KL curve, the sample sheet and the model card."""

import base64
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from blend.finetune.config import TrainConfig
from blend.finetune.trainer import Metrics

MARGIN = 4
SHEET_CELL = 128


def draw_curve(config: TrainConfig, history: Sequence[Metrics], path: Path) -> None:
    """Reward of rollouts and of the held-out set above, path KL below, per iteration."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    reward, kl = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rolled = [m for m in history if "reward_mean" in m]
    held = [m for m in history if "held_out_mean" in m]
    steps = [m["iteration"] for m in rolled]
    means = [m["reward_mean"] for m in rolled]
    margins = [m["reward_ci"] for m in rolled]
    reward.plot(steps, means, color="tab:blue", label="rollouts")
    low = [mean - margin for mean, margin in zip(means, margins, strict=True)]
    high = [mean + margin for mean, margin in zip(means, margins, strict=True)]
    reward.fill_between(steps, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    reward.errorbar(
        [m["iteration"] for m in held],
        [m["held_out_mean"] for m in held],
        yerr=[m["held_out_ci"] for m in held],
        color="tab:orange",
        marker="o",
        capsize=3,
        label="held out (95 % interval)",
    )
    reward.set_ylabel(config.reward)
    reward.set_title(f"{config.name}: {config.objective}, kl_weight {config.kl_weight:g}")
    reward.legend(loc="upper left")
    kl.plot(steps, [m["path_kl"] for m in rolled], color="tab:blue", label="rollouts")
    kl.plot(
        [m["iteration"] for m in held],
        [m["held_out_path_kl"] for m in held],
        "o",
        color="tab:orange",
        label="held out",
    )
    kl.set_ylabel("path KL to the base (nats)")
    kl.set_xlabel("iteration")
    for axis in (reward, kl):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_sheet(base: Tensor, tuned: Tensor, path: Path) -> None:
    """Two rows of the same prompts and seeds, base above and tuned below; uint8 [N, 3, H, W]."""
    count, _, height, width = base.shape
    scale = max(1, SHEET_CELL // width)
    cell_width, cell_height = width * scale + MARGIN, height * scale + MARGIN
    sheet = Image.new("RGB", (count * cell_width + MARGIN, 2 * cell_height + MARGIN), "white")
    for row, images in enumerate((base, tuned)):
        for column, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * cell_width, MARGIN + row * cell_height))
    sheet.save(path)


def markdown_report(config: TrainConfig, history: Sequence[Metrics], reference: str, curve: Path, samples: Path) -> str:
    """Gain, curve and sample sheet of a run as one self-contained markdown text."""
    base, tuned = history[0], [m for m in history if "held_out_mean" in m][-1]
    gain = (tuned["held_out_mean"] - base["held_out_mean"]) / max(base["held_out_std"], 1e-9)
    pictures = {name: base64.b64encode(path.read_bytes()).decode() for name, path in (("c", curve), ("s", samples))}
    return (
        f"# {reference}\n\n{config.reward} on held-out prompts: {base['held_out_mean']:.3f} -> "
        f"{tuned['held_out_mean']:.3f} ± {tuned['held_out_ci']:.3f}, {gain:+.2f} standard deviations of the base, "
        f"at a path KL of {tuned['held_out_path_kl']:.1f} nats.\n\n"
        f"![reward and KL](data:image/png;base64,{pictures['c']})\n\n"
        f"Base above, tuned below:\n\n![samples](data:image/png;base64,{pictures['s']})\n"
    )


CARD = """---
{licence}library_name: diffusers
base_model: {base_model}
tags: [lora, reinforcement-learning, diffusion-blend]
---
# {name}

A rank {rank} LoRA of `{base_model}`, fine-tuned toward the reward `{reward}` by policy
gradient ({objective}) with a KL to the base. Its licence is that of the base model.

| held out: {held_out_count} prompts, {held_out_images} images | reward | path KL (nats) |
|---|---|---|
| base | {base[held_out_mean]:.4f} ± {base[held_out_ci]:.4f} | 0 |
| tuned | {tuned[held_out_mean]:.4f} ± {tuned[held_out_ci]:.4f} | {tuned[held_out_path_kl]:.2f} |

The gain is {gain:+.2f} standard deviations of the base's reward ({base[held_out_std]:.4f}); intervals 95 %.
`kl_weight` is alpha in: reward / that standard deviation - alpha x path KL in nats.

![reward and KL](curve.png)

Base above, tuned below, same prompts and seeds:

![samples](samples.png)

```python
pipeline.load_lora_weights("this directory")  # a diffusers pipeline of the base model
```

## Settings (diffusion-blend {version})

| key | value |
|---|---|
{settings}

All randomness follows from `seed`. Training prompts:

{listed}
"""


def write_card(
    config: TrainConfig,
    prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    history: Sequence[Metrics],
    path: Path,
) -> None:
    """The model card beside the weights, in the layout the Hub reads."""
    base, tuned = history[0], [m for m in history if "held_out_mean" in m][-1]
    settings = config.model_dump(mode="json", exclude={"prompts", "held_out_prompts"})
    card = CARD.format(
        **{key: settings[key] for key in ("name", "base_model", "rank", "reward", "objective", "held_out_images")},
        licence="license: apache-2.0\n" if config.base_model == "sprites" else "",
        held_out_count=len(held_out_prompts),
        base=base,
        tuned=tuned,
        gain=(tuned["held_out_mean"] - base["held_out_mean"]) / max(base["held_out_std"], 1e-9),
        version=version("diffusion-blend"),
        settings="\n".join(f"| `{key}` | {value} |" for key, value in settings.items()),
        listed="\n".join(f"- {prompt}" for prompt in prompts),
    )
    path.write_text(card, encoding="utf-8")
