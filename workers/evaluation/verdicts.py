"""What the sprites judge, which is nobody's reward, says of images: are things and colours those of the prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

COLUMNS = ("colour_right", "object_right", "binding_right")
# Tells "judged, and nothing to say" from "not judged".
JUDGED = "judged"


def judge_images(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """COLUMNS, 1 for right and 0 for wrong, NaN where a prompt is no sprites caption; and JUDGED."""
    from blend.sprites.captions import parse_caption

    known = []
    for place, prompt in enumerate(prompts):
        try:
            parse_caption(prompt)
        except ValueError:
            continue
        known.append(place)
    columns: dict[str, list[Any]] = {name: [float("nan")] * len(prompts) for name in COLUMNS}
    if known:
        verdict = _judge().judge(images[known].float().cpu(), [prompts[place] for place in known])
        for name, values in zip(COLUMNS, (verdict.colours, verdict.objects, verdict.binding), strict=True):
            for place, value in zip(known, values.tolist(), strict=True):
                columns[name][place] = float(value)
    return {**columns, JUDGED: [True] * len(prompts)}


@cache
def _judge() -> Any:
    from blend.sprites.judge import load_judge

    return load_judge()
