"""The model card that travels with an adapter's weights, made from the facts of its training."""

from infra.manifests import AdapterFacts, Metric

_CARD = """---
license: {licence}
base_model: {source}
library_name: diffusers
tags: [lora, diffusion-blend]
---

# {name}

A basis adapter: a LoRA that steers its base model towards one reward. It is meant to be blended with others at
inference, by any preference and strength; alone, it is an ordinary LoRA.

| | |
|---|---|
| Base model | {source} (SHA-256 {sha256}) |
| Reward | {reward}, version {reward_version} |
| LoRA | rank {rank}, alpha {alpha:g}, on {targets} |
| KL weight in training | {kl_weight} |
| Seed | {seed} |
| Licence | {licence} |

{metrics}## Use

```python
pipe = DiffusionPipeline.from_pretrained(BASE_MODEL)
pipe.load_lora_weights(THIS_DIRECTORY)
```
"""


def adapter_card(name: str, facts: AdapterFacts) -> str:
    """Markdown with the front matter that model hubs read. Depends on nothing but its arguments."""
    rows = "".join(f"| {metric} | {_figure(value)} |\n" for metric, value in sorted(facts.metrics.items()))
    target = "" if facts.kl_target is None else f", moved to hold the path KL at {facts.kl_target:g} nats"
    return _CARD.format(
        name=name,
        licence=facts.licence,
        source=facts.base.source,
        sha256=facts.base.sha256,
        reward=facts.reward,
        reward_version=facts.reward_version,
        rank=facts.rank,
        alpha=facts.alpha,
        targets=", ".join(facts.target_modules),
        kl_weight="not known" if facts.kl_weight is None else f"{facts.kl_weight:g}{target}",
        seed="not known" if facts.seed is None else facts.seed,
        metrics=f"## Measured\n\n| Metric | Value |\n|---|---|\n{rows}\n" if rows else "",
    )


def _figure(metric: Metric) -> str:
    interval = f" ({metric.low:.4g} to {metric.high:.4g})" if None not in (metric.low, metric.high) else ""
    return f"{metric.value:.4g}{interval}" + (f", n = {metric.n}" if metric.n is not None else "")
