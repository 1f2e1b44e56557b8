"""CoDe, blockwise control: best-of-N again and again, among the continuations of what was kept.

arXiv 2502.00968, with hard selection. Every B steps, N candidates go B steps from the same x_t with different noise:
x_{t-B} = argmax_n V(x_{t-B}^n), V(x_s) = r(x_0-hat(x_s)), x_0-hat Tweedie's prediction, decoded. With B = T it is
best-of-N from one x_T, with B = 1 it selects at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blend.baselines.found import Cost, Found, check_count, failure, score_images
from blend.baselines.walk import Walk
from blend.engine import BlendEngine, Sample, SampleError
from blend.rewards import Reward


@torch.no_grad()
def blockwise(
    engine: BlendEngine,
    samples: Sequence[Sample],
    reward: Reward,
    *,
    n: int = 20,
    block: int = 5,
    tile_rows: int = 24,
) -> list[Found]:
    """Return CoDe's image for each sample of the base model.

    n candidates for every `block` steps; the last block is shorter where they do not divide the steps. Candidate 0
    takes the noise of the sample's own seed. A prediction at a state is run once: it scores a candidate and, if that
    is kept, all of the next block start from it. So an image takes 1 + n (T - 1) predictions and n decodes a block.
    A sample none of whose last candidates is finite has an error in place of latents. Samples must be alike but for
    prompts and seeds (see Walk). Raises SampleError, and ValueError for n or block < 1.
    """
    check_count(n, "n")
    check_count(block, "block")
    if not samples:
        return []
    if n > 1 and samples[0].eta == 0:
        raise SampleError("eta is 0: candidates differ in their noise alone; use eta > 0, or best_of_n", "eta")
    walk = Walk(engine, samples, copies=n, tile_rows=tile_rows)
    rows, decodes = walk.rows(0), 0
    latents = walk.begin()
    noise_pred = walk.predict(latents, 0)
    scores = torch.empty(0)
    for step in range(walk.total):
        if step % block == 0:
            latents, noise_pred = latents.repeat_interleave(n, 0), noise_pred.repeat_interleave(n, 0)
        latents, after = walk.advance(noise_pred, latents, step), step + 1
        origin = latents
        if after < walk.total:
            noise_pred = walk.predict(latents, after)
            rows += n * walk.rows(after)
            origin = walk.origin(noise_pred, latents, after)
        if after % block == 0 or after == walk.total:
            images = engine.decode(list(origin))
            decodes += n
            scores = score_images(reward, images, walk.prompts(len(images))).view(-1, n)
            kept = _places(scores).to(latents.device)
            latents, noise_pred = latents[kept], noise_pred[kept]
    return [_found(*one, Cost(rows, decodes)) for one in zip(samples, latents, scores, strict=True)]


def _found(sample: Sample, latents: Tensor, scores: Tensor, cost: Cost) -> Found:
    error = failure(scores, sample.seed)
    return Found(sample, None if error else latents, scores, cost, error)


def _places(scores: Tensor) -> Tensor:
    """Return [S] where each sample's best, the first among equals, stands among all candidates; scores: [S, n]."""
    n = scores.shape[1]
    return torch.tensor([i * n + int(one.argmax()) for i, one in enumerate(scores)])
