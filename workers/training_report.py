"""What a person reads after a training run: its outcome in words and tables, the model card, the flow's report."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blend.finetune.config import TrainConfig
from blend.finetune.held_out import Metrics, published
from workers.provenance import base_licence, git_commit, package_version

# a Prefect artifact is a row of a database: larger pictures go into it as JPEG
LARGEST_PNG = 300_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """The base's evaluation and that of the adapter which is published, and the alpha in force when it was made."""

    base: Metrics
    tuned: Metrics
    alpha: float
    stopped: str | None  # why the run ended early

    @classmethod
    def of(cls, config: TrainConfig, history: Sequence[Metrics]) -> "Outcome":
        tuned = published(history)
        return cls(history[0], tuned, tuned.get("kl_weight", config.kl_weight), history[-1].get("stopped"))

    @property
    def gain(self) -> float:
        """Of the held-out reward, in standard deviations of the base."""
        rise = self.tuned["held_out_mean"] - self.base["held_out_mean"]
        return float(rise / max(self.base["held_out_std"], 1e-9))

    @property
    def diversity(self) -> tuple[float, float] | None:
        """Of base and tuned, where it was measured."""
        pair = self.base.get("held_out_diversity"), self.tuned.get("held_out_diversity")
        return None if pair[0] is None or pair[1] is None else pair

    @property
    def watched(self) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
        """Figures {mean, std, ci} of base and tuned for each reward that was watched and not trained."""
        after = self.tuned.get("watched") or {}
        return {name: (figures, after[name]) for name, figures in (self.base.get("watched") or {}).items()}


def outcome_sentence(config: TrainConfig, history: Sequence[Metrics]) -> str:
    """Reward before and after, at which KL and alpha, and why the run ended if that was early."""
    outcome = Outcome.of(config, history)
    base, tuned = outcome.base, outcome.tuned
    controlled = "" if config.kl_target is None else f" (kl_target {config.kl_target:g}, alpha {outcome.alpha:.3g})"
    sentence = (
        f"{config.reward_label} on held-out prompts: {base['held_out_mean']:.3f} -> {tuned['held_out_mean']:.3f} "
        f"± {tuned['held_out_ci']:.3f} ({outcome.gain:+.2f} base standard deviations) at a path KL of "
        f"{tuned['held_out_path_kl']:.1f} nats{controlled}"
    )
    if outcome.stopped:
        sentence += f"; stopped early: {outcome.stopped}, the adapter of iteration {tuned['iteration']} is kept"
    elif tuned["iteration"] < history[-1]["iteration"]:
        sentence += f"; the adapter of iteration {tuned['iteration']} is kept, the best within the KL budget"
    return sentence


def outcome_table(config: TrainConfig, history: Sequence[Metrics]) -> str:
    """Base against tuned in markdown: the trained reward, path KL, diversity, watched rewards."""
    outcome = Outcome.of(config, history)
    base, tuned = outcome.base, outcome.tuned
    rows = [
        ("held out", "base", "tuned", "change in base standard deviations"),
        ("---",) * 4,
        (
            f"{config.reward_label} (trained)",
            f"{base['held_out_mean']:.4f} ± {base['held_out_ci']:.4f}",
            f"{tuned['held_out_mean']:.4f} ± {tuned['held_out_ci']:.4f}",
            f"{outcome.gain:+.2f}",
        ),
    ]
    for name, (before, after) in outcome.watched.items():
        change = (after["mean"] - before["mean"]) / max(before["std"], 1e-9)
        rows.append(
            (
                f"{name} (watched)",
                f"{before['mean']:.4f} ± {before['ci']:.4f}",
                f"{after['mean']:.4f} ± {after['ci']:.4f}",
                f"{change:+.2f}",
            )
        )
    rows.append(("path KL (nats)", "0", f"{tuned['held_out_path_kl']:.2f}", ""))
    if outcome.diversity is not None:
        rows.append(("diversity within a prompt", *(f"{value:.4f}" for value in outcome.diversity), ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_report(config: TrainConfig, history: Sequence[Metrics], reference: str, curve: Path, samples: Path) -> str:
    """Outcome, curve and sample sheet of a run as one self-contained markdown text."""
    return (
        f"# {reference}\n\n{outcome_sentence(config, history)}.\n\n{outcome_table(config, history)}\n\n"
        f"![reward and KL]({_embedded(curve)})\n\n"
        f"One row per held-out evaluation, the same prompts and seeds in each:\n\n![samples]({_embedded(samples)})\n"
    )


def _embedded(path: Path) -> str:
    data, kind = path.read_bytes(), "png"
    if len(data) > LARGEST_PNG:
        smaller = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(smaller, "JPEG", quality=80)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


CARD = """---
{front}library_name: diffusers
base_model: {base_model}
tags: [lora, reinforcement-learning, diffusion-blend]
---
# {name}

A rank {rank} LoRA of `{base_model}`, fine-tuned toward the reward `{reward}` by policy
gradient ({objective}) with a KL to the base. Licence: {licence}.

{table}

{held_out_images} images of fixed seeds, from {held_out_count} held-out prompts, guidance {eval_guidance_scale:g};
intervals 95 %. One standard deviation of the base's reward is {base_std:.4f}.

| training | |
|---|---|
{facts}

`kl_weight` is alpha in: reward / the base's standard deviation - alpha x path KL in nats.

![reward and KL](curve.png)

One row per held-out evaluation, the same prompts and seeds in each:

![samples](samples.png)

```python
pipeline.load_lora_weights("this directory")  # a diffusers pipeline of the base model
```

## Settings

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
    settings = config.model_dump(mode="json", exclude={"prompts", "held_out_prompts"})
    settings["reward"] = config.reward_label
    licence = base_licence(config.base_model)
    used = ("name", "base_model", "rank", "reward", "objective", "held_out_images", "eval_guidance_scale")
    card = CARD.format(
        **{key: settings[key] for key in used},
        front=f"license: {licence.lower()}\n" if licence else "",
        licence=f"{licence}, that of the base model" if licence else "that of the base model, see there",
        table=outcome_table(config, history),
        held_out_count=len(held_out_prompts),
        base_std=history[0]["held_out_std"],
        facts="\n".join(f"| {key} | {value} |" for key, value in training_facts(config, history, len(prompts)).items()),
        settings="\n".join(f"| `{key}` | {value} |" for key, value in settings.items()),
        listed="\n".join(f"- {prompt}" for prompt in prompts),
    )
    path.write_text(card, encoding="utf-8")


def training_facts(config: TrainConfig, history: Sequence[Metrics], prompts: int) -> dict[str, str]:
    """What decided the adapter, for a reader: how long, from how many images, under which alpha, by which code."""
    outcome = Outcome.of(config, history)
    made = outcome.tuned["iteration"]
    alpha = f"{outcome.alpha:.4g}"
    if config.kl_target is not None:
        alpha += f", raised from {config.kl_weight:g} to hold kl_target = {config.kl_target:g} nats"
    facts = {
        "iterations": f"{made} of {config.iterations}",
        "images": f"{made * config.batch_size:,} from {prompts} prompts, {config.images_per_prompt} of each at a time",
        "kl_weight (alpha) at the end": alpha,
        "seed": str(config.seed),
        "code": ", commit ".join(filter(None, (f"diffusion-blend {package_version()}", git_commit()))),
    }
    if outcome.stopped:
        facts["stopped early"] = outcome.stopped
    return facts
