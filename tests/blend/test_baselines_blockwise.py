"""CoDe: what it equals at its ends, what it keeps, what it costs; and that a plain walk is the engine's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from work_counter import counted

from blend.adapters import AdapterBank
from blend.baselines import blockwise
from blend.baselines.found import candidate_seeds
from blend.baselines.walk import Walk
from blend.engine import BlendEngine, Sample, SampleError
from blend.model import DiffusionModel, load_model
from blend.preference import Preference

PROMPT = "A red colored car."


def base(seed: int = 3, **fields) -> Sample:
    return Sample(
        **{"prompt": PROMPT, "preference": Preference.base(), "seed": seed, "num_inference_steps": 4, **fields}
    )


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    "fields",
    [{}, {"eta": 0.0}, {"guidance_scale": 1.0}, {"negative_prompt": "blue", "guidance_interval": (0.25, 0.75)}],
    ids=str,
)
def test_one_candidate_is_the_base(engine, redness, fields):
    (found,) = blockwise(engine, [base(**fields)], redness, n=1, block=3)
    assert_close(found.latents, engine.run([base(**fields)])[0].latents)


def test_one_candidate_is_the_base_of_sdxl_and_of_v_prediction(tiny_sdxl_model, tiny_sdxl_bank, tiny_sd_dir, redness):
    v_model = load_model(tiny_sd_dir)
    v_model.prediction_type = "v_prediction"
    for model, bank in ((tiny_sdxl_model, tiny_sdxl_bank), (v_model, AdapterBank(v_model.unet))):
        engine = BlendEngine(model, bank)
        expected = [output.latents for output in engine.run([base(3), base(4, prompt="A cup.")])]
        found = blockwise(engine, [base(3), base(4, prompt="A cup.")], redness, n=1, block=2)
        for one, latents in zip(found, expected, strict=True):
            assert_close(one.latents, latents)


def paths(engine: BlendEngine, sample: Sample, n: int, until: int) -> list[torch.Tensor]:
    """The base's states after `until` steps, from x_T of the sample under the noise of each candidate's seed."""
    ends = []
    for seed in candidate_seeds(sample.seed, n):
        walk = Walk(engine, [replace(sample, seed=seed)])
        latents = Walk(engine, [sample]).begin()
        for step in range(until):
            latents = walk.advance(walk.predict(latents, step), latents, step)
        ends.append(latents[0])
    return ends


@torch.no_grad()
def test_one_block_is_best_of_n_over_paths_from_one_start(engine, redness):
    ends = paths(engine, base(), 3, until=4)
    scores = redness(engine.decode(ends), [PROMPT] * 3)
    for block in (4, 9):
        (found,) = blockwise(engine, [base()], redness, n=3, block=block)
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
        assert_close(found.latents, ends[int(scores.argmax())])
        assert found.score >= scores[0]


@torch.no_grad()
def test_a_block_keeps_the_candidate_whose_predicted_image_is_best(engine, redness):
    ends = torch.stack(paths(engine, base(), 4, until=2))
    walk = Walk(engine, [base()])
    origins = walk.origin(walk.predict(ends, 2), ends, 2)
    best = int(redness(engine.decode(list(origins)), [PROMPT] * 4).argmax())

    seen = []

    class Watching(type(redness)):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            seen.append(scores)
            return scores

    (found,) = blockwise(engine, [base()], Watching(), n=4, block=2)
    assert len(seen) == 2
    assert int(seen[0].argmax()) == best
    # the second block's candidates all go on from there
    streams = [Walk(engine, [base(seed)]) for seed in candidate_seeds(3, 4)]
    for stream in streams:
        latents = stream.begin()
        for step in range(2):
            stream.advance(torch.zeros_like(latents), latents, step)
    expected = []
    for stream in streams:
        latents = ends[best : best + 1]
        for step in (2, 3):
            latents = stream.advance(stream.predict(latents, step), latents, step)
        expected.append(latents[0])
    torch.testing.assert_close(seen[1], redness(engine.decode(expected), [PROMPT] * 4), rtol=0, atol=1e-5)
    assert_close(found.latents, expected[int(seen[1].argmax())])


def test_a_sample_does_not_depend_on_its_neighbours(engine, redness):
    samples = [base(3), base(9, prompt="A green bird.", negative_prompt="blue"), base(4)]
    together = blockwise(engine, samples, redness, n=2, block=3, tile_rows=5)
    for sample, one in zip(samples, together, strict=True):
        (alone,) = blockwise(engine, [sample], redness, n=2, block=3)
        assert_close(one.latents, alone.latents)
        assert one.sample == sample
        assert one.cost == alone.cost


@pytest.mark.parametrize(("n", "block"), [(1, 1), (3, 2), (2, 3)])
def test_the_stated_cost_is_what_ran(engine, tiny_model, redness, n, block):
    with counted(tiny_model) as seen:
        found = blockwise(engine, [base(3), base(4)], redness, n=n, block=block)
    assert 2 * found[0].cost.rows == seen["rows"] == 2 * 2 * (1 + n * 3)
    assert 2 * found[0].cost.decodes == seen["decodes"] == 2 * n * -(-4 // block)
    assert found[0].cost.gradients == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"preference": Preference(weights={"a": 1.0})}, "preference"),
        ({"solver": "dpmpp"}, "solver"),
        ({"record": True}, "record"),
        ({"eta": 0.0}, "eta"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
    ],
)
def test_samples_it_cannot_steer_are_refused(engine, redness, fields, param):
    with pytest.raises(SampleError) as refusal:
        blockwise(engine, [base(**fields)], redness, n=2)
    assert refusal.value.param == param


def test_samples_that_go_different_ways_are_refused(engine, redness):
    with pytest.raises(SampleError, match="different ways"):
        blockwise(engine, [base(), base(eta=0.5)], redness, n=2)


@pytest.mark.parametrize("name", ["n", "block"])
def test_counts_below_one_are_refused(engine, redness, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        blockwise(engine, [base()], redness, **{name: 0})


def test_a_broken_sample_is_named(engine, redness):
    (found,) = blockwise(engine, [base(guidance_scale=1e38)], redness, n=2)
    assert found.latents is None
    assert "seed 3" in str(found.error)
