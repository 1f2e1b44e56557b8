"""From a request to samples for the engine, and from images to facts: what command line and endpoint share.

Here a request meets the bundle that will answer it; everything wrong with it is found before any work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blend.engine import BlendEngine, Sample
from blend.plans import plan_rows
from blend.preference import Preference, PreferenceError
from workers.api import MAX_SEED, GenerationRequest, Refusal, RequestError, bad_request, draw_seed, shorten
from workers.engine_args import EngineArgs
from workers.images import ImageFacts, encode_png, to_uint8
from workers.jobs import Forecast
from workers.model_card import ModelCard


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded engine, the card that describes it and what it was opened by; `tokenizer` may be used by any thread."""

    engine: BlendEngine
    card: ModelCard
    tokenizer: Any
    args: EngineArgs

    @property
    def basis(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.card.basis)


def plan(request: GenerationRequest, opened: Opened) -> list[Sample]:
    """One sample per image, seeds counting up. RequestError names the field that this bundle cannot serve."""
    card, defaults = opened.card, opened.card.defaults
    if request.model is not None and request.model not in card.accepted_names:
        message = f"there is no model {shorten(request.model)}; use one of {', '.join(card.accepted_names)}"
        raise RequestError(Refusal(status=404, message=message, type="not_found_error", param="model"))
    _check_prompt("prompt", request.prompt, opened)
    _check_prompt("negative_prompt", request.negative_prompt, opened)
    height, width = _size(request.size or "auto", card)
    first = request.seed if request.seed is not None else draw_seed()
    if first + request.n - 1 > MAX_SEED:
        raise bad_request("seed", f"seed: with n = {request.n} must be at most {MAX_SEED - request.n + 1}")
    preference = _preference(request, opened)
    steps, guidance = request.num_inference_steps, request.guidance_scale
    return [
        Sample(
            prompt=request.prompt,
            preference=preference,
            seed=first + index,
            negative_prompt=request.negative_prompt,
            num_inference_steps=defaults.num_inference_steps if steps is None else steps,
            guidance_scale=defaults.guidance_scale if guidance is None else guidance,
            eta=defaults.eta,
            height=height,
            width=width,
        )
        for index in range(request.n)
    ]


def _preference(request: GenerationRequest, opened: Opened) -> Preference:
    defaults = opened.card.defaults
    weights = request.weights if request.weights is not None else defaults.weights
    if weights is None:
        example = ", ".join(f'"{name}": {1 if i == 0 else 0}' for i, name in enumerate(opened.basis))
        raise bad_request("weights", f"weights: required, this bundle has no default; for example {{{example}}}")
    if len(request.weights or weights) == 0:
        raise bad_request("weights", f"weights: empty; name at least one of {', '.join(opened.basis)}")
    try:
        return Preference.parse(
            weights,
            defaults.kl_lambda if request.kl_lambda is None else request.kl_lambda,
            defaults.method if request.method is None else request.method,
            basis=opened.basis,
            normalize=request.normalize,
        )
    except PreferenceError as error:
        raise bad_request(error.param, str(error)) from None
    except ArithmeticError:
        raise bad_request("weights", "weights: too large to be summed; use numbers from 0 to 1") from None


def _check_prompt(param: str, prompt: str, opened: Opened) -> None:
    limit = opened.card.limits.max_prompt_tokens
    count = len(opened.tokenizer(prompt).input_ids)
    if count > limit:
        raise bad_request(param, f"{param}: {count} tokens, at most {limit} fit this model; shorten it")


def _size(size: str, card: ModelCard) -> tuple[int, int]:
    """(height, width) in pixels of "WIDTHxHEIGHT" or "auto"."""
    width, height = (int(side) for side in (card.defaults.size if size == "auto" else size).split("x"))
    limits = card.limits
    for side in (width, height):
        if side % limits.size_multiple or not limits.min_size <= side <= limits.max_size:
            raise bad_request(
                "size",
                f"size: {size} does not fit this model; each side must be a multiple of "
                f"{limits.size_multiple} from {limits.min_size} to {limits.max_size} (default {card.defaults.size})",
            )
    return height, width


def forecast(samples: Sequence[Sample], basis: Sequence[str]) -> Forecast:
    """UNet rows that the samples of one request will run."""
    plans = [plan_rows(sample, basis, sample.num_inference_steps, measured=False) for sample in samples]
    rows = sum(planned.rows_until(sample.num_inference_steps) for planned, sample in zip(plans, samples, strict=True))
    return Forecast(rows, max(planned.peak_rows for planned in plans))


def facts_of(sample: Sample, card: ModelCard) -> ImageFacts:
    """What the image of `sample` must carry so that it can be made again."""
    height, width = _size(card.defaults.size, card)
    version = "" if card.bundle.version is None else f"@{card.bundle.version}"
    return ImageFacts(
        prompt=sample.prompt,
        negative_prompt=sample.negative_prompt,
        seed=sample.seed,
        weights=sample.preference.weights,
        kl_lambda=sample.preference.kl_lambda,
        method=sample.preference.method,
        num_inference_steps=sample.num_inference_steps,
        guidance_scale=sample.guidance_scale,
        eta=sample.eta,
        width=sample.width or width,
        height=sample.height or height,
        bundle=card.bundle.name + version,
        bundle_digest=card.bundle.digest,
    )


def request_of(facts: ImageFacts) -> GenerationRequest:
    """The request that makes the image of `facts` again, from the bundle it names."""
    return GenerationRequest(
        prompt=facts.prompt,
        negative_prompt=facts.negative_prompt,
        seed=facts.seed,
        weights=facts.weights,
        kl_lambda=facts.kl_lambda,
        method=facts.method,
        num_inference_steps=facts.num_inference_steps,
        guidance_scale=facts.guidance_scale,
        size=f"{facts.width}x{facts.height}",
    )


def generate_png(
    samples: Sequence[Sample], opened: Opened, on_step: Callable[[int, int], None] | None = None
) -> list[bytes]:
    """Run `samples` to the end in this thread; one PNG each. `on_step` gets (steps done, steps in all)."""
    outputs = opened.engine.run(samples, on_step)
    for output in outputs:
        if output.error is not None:
            raise output.error
    images = opened.engine.decode([output.latents for output in outputs])
    pixels = to_uint8(images.float().cpu().numpy())
    return [encode_png(image, facts_of(sample, opened.card)) for sample, image in zip(samples, pixels, strict=True)]
