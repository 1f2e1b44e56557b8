"""What the engine's speed benchmark serves: the sprites bundle, its requests, and how ratios are summed up."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from blend.engine import BlendEngine, Sample
from blend.preference import Preference
from blend.sprites.captions import held_out_prompts
from infra.settings import read_settings
from workers.bundles import LoadedBundle, load_engine, open_bundle

GUIDANCE = 3.0


@dataclass(frozen=True, slots=True)
class Workload:
    """The shipped bundle, opened once: every contestant reads the same weights."""

    bundle: LoadedBundle
    engine: BlendEngine
    prompts: Sequence[str]

    @property
    def basis(self) -> tuple[str, ...]:
        return self.engine.bank.names

    @property
    def rows(self) -> int:
        """UNet rows of one guided sample and step: every adapter, conditional and not."""
        return 2 * len(self.basis)

    def sample(self, index: int, steps: int) -> Sample:
        """Request number `index`: weights over all adapters, prompt and noise follow from the number alone."""
        draws = random.Random(f"request-{index}")
        parts = [0.1 + draws.random() for _ in self.basis]
        weights = {name: part / sum(parts) for name, part in zip(self.basis, parts, strict=True)}
        return Sample(
            prompt=self.prompts[index % len(self.prompts)],
            preference=Preference(weights=weights),
            seed=index,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
        )

    def fresh_engine(self, max_rows: int) -> BlendEngine:
        """Another engine over the same model and adapters, with a row cap of its own."""
        return BlendEngine(self.engine.model, self.engine.bank, max_rows=max_rows)


def open_workload() -> Workload:
    bundle = open_bundle(settings=read_settings())
    workload = Workload(bundle, load_engine(bundle), held_out_prompts(16))
    # every side finds its prompts encoded: text encoding is not what is compared
    workload.engine.model.encode_prompts(["", *workload.prompts])
    workload.engine.run([workload.sample(index, 1) for index in range(len(workload.prompts))])
    return workload


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "p25": values[0], "p75": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "p25": round(low, 4), "p75": round(high, 4)}
