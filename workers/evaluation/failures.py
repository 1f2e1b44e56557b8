"""What a rival's image that is not finite counts.

An evaluation goes on over it: that a rival may fail is a finding about it. In place of the picture stands plain grey,
and that must not be scored like any other. A JPEG of grey is the smallest there is, so that its own score could be
the best; nor may the image be left out, for then a rival would be judged by what it manages alone. So in each reward a
failed image counts as the worst there is to compare it with: the lowest of the setting's own images, the grey one
among them, and of the base's images of the same prompt. Then no setting gains by failing: its mean is never above that
of the images that it did make, and a failed image never gains over the base. What other settings are measured makes no
difference. The judge finds everything wrong with it, and it adds no diversity. What it cost is counted as it was.

The product's own methods do not fail: an image of theirs that is not finite ends the evaluation with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workers.evaluation.verdicts import COLUMNS as VERDICTS

# Of every pixel of the picture that stands for a failed image, in [0, 1].
GREY = 0.5
Array = NDArray[np.float64]


def count_failures(samples: pd.DataFrame, rewards: Sequence[str]) -> pd.DataFrame:
    """The samples (cell 0 is the base; `failed` is 1 or 0) with the scores and verdicts that failed ones count."""
    failed = samples["failed"] == 1
    if not failed.any():
        return samples
    counted = samples.copy()
    for name in rewards:
        own = samples.groupby("cell")[name].transform("min")
        base = samples["prompt_index"].map(samples[samples["cell"] == 0].groupby("prompt_index")[name].min())
        counted[name] = samples[name].mask(failed, np.minimum(own, base))
    for name in (name for name in VERDICTS if name in samples):
        # of a prompt that the judge cannot read there is no verdict either way
        counted[name] = samples[name].mask(failed & samples[name].notna(), 0.0)
    return counted


def without_failures(diversity: Callable[[Array], Array], images: Array, failed: NDArray[np.bool_]) -> Array:
    """Diversity [N] of one prompt's images [N, 3, H, W]: of the sound ones among each other, 0 for failed ones."""
    if not failed.any():
        return diversity(images)
    spread = np.zeros(len(images))
    if not failed.all():
        spread[~failed] = diversity(images[~failed])
    return spread
