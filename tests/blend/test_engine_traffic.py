"""Random traffic through one engine: whoever joins, leaves or fails, each sample gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, DenoisingError, Sample
from blend.model import DiffusionModel
from blend.preference import METHODS, Preference

BASIS = ("a", "b", "c")

weights_of = st.sampled_from([(1, 0, 0), (1, 1, 0), (0, 1, 3), (1, 1, 1)]).map(
    lambda raw: {name: value / sum(raw) for name, value in zip(BASIS, raw, strict=True)}
)
preferences = st.builds(
    lambda weights, kl_lambda, method: Preference.parse(
        weights, min(kl_lambda, 1.0) if method == "ls" else kl_lambda, method, basis=BASIS
    ),
    weights_of,
    st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    st.sampled_from(METHODS),
)
samples = st.builds(
    Sample,
    prompt=st.sampled_from(["a cat", "a dog"]),
    preference=preferences,
    seed=st.integers(0, 3),
    num_inference_steps=st.integers(1, 3),
    guidance_scale=st.sampled_from([0.0, 1.0, 3.0]),
    eta=st.sampled_from([0.5, 1.0]),
    measure_kl=st.booleans(),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.3, 0.7)]),
    shared_unconditional=st.booleans(),
    refresh_every=st.integers(1, 2),
    row_budget=st.sampled_from([1.0, 2.0]),
)
# overflows in its second step at the latest
broken = st.builds(
    Sample,
    prompt=st.just("a cat"),
    preference=preferences,
    seed=st.integers(0, 3),
    num_inference_steps=st.just(3),
    guidance_scale=st.just(1e38),
)
# steps taken before a sample is submitted, the sample, and steps after which it is aborted (None: never)
events = st.tuples(
    st.integers(0, 2), st.one_of(samples, samples, samples, broken), st.sampled_from([None, None, None, 0, 1])
)


@pytest.fixture(scope="module")
def alone(tiny_model: DiffusionModel, tiny_bank: AdapterBank):
    """What a sample gives alone under a pinned tile; remembered, since examples repeat themselves."""
    engine = BlendEngine(tiny_model, tiny_bank, tile_rows=4, deterministic=True)
    known: dict[str, torch.Tensor | None] = {}

    def run(sample: Sample) -> torch.Tensor | None:
        key = repr(sample)
        if key not in known:
            known[key] = engine.run([sample])[0].latents
        return known[key]

    return run


# shrinking denoises hundreds of times over: the example as found must do
@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(st.lists(events, min_size=1, max_size=5), st.integers(1, 20), st.booleans(), st.integers(1, 7))
def test_each_sample_gets_what_it_gets_alone(tiny_model, tiny_bank, alone, traffic, max_rows, pinned, tile_rows):
    engine = BlendEngine(
        tiny_model, tiny_bank, max_rows=max_rows, tile_rows=4 if pinned else tile_rows, deterministic=pinned
    )
    asked, aborts, outputs, clock = {}, {}, {}, 0

    def tick() -> None:
        nonlocal clock
        outputs.update(engine.step())
        clock += 1
        for ticket in [ticket for ticket, due in aborts.items() if due <= clock]:
            del aborts[ticket]
            if ticket not in outputs:
                assert engine.abort(ticket)
                del asked[ticket]

    for wait, sample, patience in traffic:
        for _ in range(wait):
            tick()
        ticket = engine.submit(sample)
        asked[ticket] = sample
        if patience is not None:
            aborts[ticket] = clock + patience
    while not engine.idle:
        tick()

    assert outputs.keys() == asked.keys()
    for ticket, sample in asked.items():
        expected, output = alone(sample), outputs[ticket]
        if expected is None:
            assert isinstance(output.error, DenoisingError)
        elif pinned:
            assert torch.equal(output.latents, expected)
        else:
            torch.testing.assert_close(output.latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
