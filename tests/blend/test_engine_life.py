"""The engine's life: samples join and leave, fail alone, are aborted, reported on and refused."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, DenoisingError, Output, Sample, SampleError
from blend.model import DiffusionModel
from blend.preference import Preference, PreferenceError


def prefer(kl_lambda: float = 1.0, method: str = "mpa", **weights: float) -> Preference:
    return Preference.parse(weights, kl_lambda, method, basis=("a", "b", "c"))


def sample_of(preference: Preference, **fields) -> Sample:
    return Sample(**{"prompt": "a car", "preference": preference, "seed": 3, "num_inference_steps": 4, **fields})


def latents_of(output: Output) -> torch.Tensor:
    assert output.error is None
    assert output.latents is not None
    return output.latents


def assert_same_in_company(a: torch.Tensor, b: torch.Tensor) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


def test_samples_join_and_leave_between_steps(engine):
    samples = [
        sample_of(prefer(a=1.0), seed=1),
        sample_of(prefer(0.5, a=0.2, b=0.8), seed=2, num_inference_steps=6, guidance_scale=1.0, prompt="a"),
        sample_of(prefer(1.5, c=1.0), seed=3, num_inference_steps=2, eta=0.0, negative_prompt="dull"),
        sample_of(prefer(0.7, "ls", a=0.5, c=0.5), seed=4, num_inference_steps=5),
        sample_of(prefer(b=1.0), seed=5, height=48, width=24),
    ]
    alone = {i: latents_of(engine.run([sample])[0]) for i, sample in enumerate(samples)}
    tickets, finished = {}, {}
    for i, sample in enumerate(samples):
        tickets[engine.submit(sample)] = i
        finished.update(engine.step())
    while not engine.idle:
        finished.update(engine.step())
    assert finished.keys() == tickets.keys()
    for ticket, output in finished.items():
        assert_same_in_company(latents_of(output), alone[tickets[ticket]])


def test_a_sample_gone_wrong_fails_alone(engine):
    good = sample_of(prefer(a=0.5, b=0.5))
    bad = replace(good, guidance_scale=1e38, seed=9)
    before, failed, after = engine.run([good, bad, replace(good, seed=4)])
    assert isinstance(failed.error, DenoisingError)
    assert failed.latents is None
    assert failed.steps < 4
    assert "seed 9" in str(failed.error)
    assert "guidance_scale (1e+38)" in str(failed.error)
    assert_same_in_company(latents_of(before), latents_of(engine.run([good])[0]))
    assert latents_of(after).isfinite().all()
    assert engine.idle


METHODS = ["mpa", "ls", "soup", "cached", "staged"]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("place", ["latents", "kept"])
def test_what_is_no_number_stays_with_its_sample(tiny_model, tiny_bank, place, solver):
    samples = [
        sample_of(prefer(1.0, method, a=0.3, b=0.7), seed=seed, num_inference_steps=8, solver=solver)
        for seed, method in enumerate(METHODS)
    ]
    engine = BlendEngine(tiny_model, tiny_bank)
    alone = [latents_of(engine.run([sample])[0]) for sample in samples]
    for bad, method in enumerate(METHODS):
        tickets, finished = [engine.submit(sample) for sample in samples], {}
        while not engine.idle:
            running = engine._active.get(tickets[bad])
            if running is not None and (running.step == 6 if place == "latents" else running.rows.reuse):
                setattr(running, place, torch.full_like(running.latents, float("nan")))
            finished.update(engine.step())
        error = finished[tickets[bad]].error
        # the other methods reuse nothing
        assert isinstance(error, DenoisingError) == (place == "latents" or method in ("cached", "staged"))
        for index, ticket in enumerate(tickets):
            if index != bad or error is None:
                assert_same_in_company(latents_of(finished[ticket]), alone[index])


def test_a_forward_that_fails_ends_its_samples_and_not_the_engine(engine, tiny_bank, monkeypatch):
    def out_of_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_bank, "forward", out_of_memory)
        output = engine.run([sample_of(prefer(a=1.0))])[0]
    assert "out of memory" in str(output.error)
    latents_of(engine.run([sample_of(prefer(a=1.0))])[0])


def test_abort_frees_rows_for_those_who_wait(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, max_rows=2)
    first, second, third = (engine.submit(sample_of(prefer(a=1.0), seed=seed)) for seed in (1, 2, 3))
    engine.step()
    assert [engine.progress(ticket) for ticket in (first, second)] == [(1, 4), (0, 4)]
    assert engine.abort(first)
    assert not engine.abort(first)
    assert engine.abort(third)
    with pytest.raises(KeyError, match=f"ticket {first}"):
        engine.progress(first)
    engine.step()
    assert engine.progress(second) == (1, 4)
    outputs = {}
    while not engine.idle:
        outputs.update(engine.step())
    assert outputs.keys() == {second}


def test_a_sample_larger_than_the_cap_still_runs(tiny_model, tiny_bank):
    engine = BlendEngine(tiny_model, tiny_bank, max_rows=1, tile_rows=1)
    latents_of(engine.run([sample_of(prefer(a=0.5, b=0.5))])[0])


def test_run_reports_every_step_and_needs_an_idle_engine(engine):
    seen = []
    samples = [sample_of(prefer(a=1.0)), sample_of(prefer(a=1.0), num_inference_steps=2)]
    engine.run(samples, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]
    ticket = engine.submit(samples[0])
    with pytest.raises(RuntimeError, match="idle"):
        engine.run(samples)
    assert engine.abort(ticket)


def test_run_interrupted_leaves_an_idle_engine(engine):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run([sample_of(prefer(a=1.0))], interrupt)
    assert engine.idle


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": "3"}, "guidance_scale"),
        ({"eta": 1.1}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": 0.0, "preference": prefer(a=0.5, b=0.5, method="ls")}, "eta"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),
        ({"height": 33}, "height"),
        ({"width": 0}, "width"),
        ({"prompt": None}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ],
)
def test_bad_samples_are_refused_before_any_work(engine, fields, param):
    with pytest.raises(SampleError) as caught:
        engine.submit(sample_of(**{"preference": prefer(a=1.0), **fields}))
    assert caught.value.param == param
    assert param in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).param == param
    assert engine.idle


def test_an_unknown_basis_name_is_refused_before_any_work(engine):
    good = sample_of(prefer(a=1.0))
    with pytest.raises(PreferenceError, match="'d': use one of a, b, c"):
        engine.run([good, sample_of(Preference(weights={"d": 1.0}))])
    assert engine.idle


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"tile_rows": 0}])
def test_impossible_caps_are_refused(tiny_model, tiny_bank, options):
    with pytest.raises(ValueError, match="integers >= 1"):
        BlendEngine(tiny_model, tiny_bank, **options)


@pytest.mark.parametrize(
    ("preference", "guidance_scale", "rows"),
    [
        (prefer(a=1.0), 3.0, 2),
        (prefer(a=0.5, b=0.5), 3.0, 4),
        (prefer(0.5, a=0.5, b=0.5), 3.0, 6),
        (prefer(0.5, a=0.5, b=0.5), 1.0, 3),
        (prefer(0.5, a=0.5, b=0.5), 0.0, 3),
        (prefer(0.0, a=0.5, b=0.5), 3.0, 2),
        (prefer(0.5, "soup", a=0.5, b=0.5), 3.0, 2),
        (prefer(0.5, "ls", a=0.5, b=0.5), 3.0, 2),
    ],
)
def test_rows_without_a_coefficient_never_run(tiny_model, tiny_bank, monkeypatch, preference, guidance_scale, rows):
    forward, ran = tiny_bank.forward, []
    monkeypatch.setattr(tiny_bank, "forward", lambda x, *args: ran.append(len(x)) or forward(x, *args))
    sample = sample_of(preference, guidance_scale=guidance_scale, num_inference_steps=2)
    output = BlendEngine(tiny_model, tiny_bank, tile_rows=64).run([sample])[0]
    assert ran == [rows, rows]
    assert (output.rows, output.steps) == (2 * rows, 2)


def test_images_do_not_depend_on_their_neighbours(engine):
    latents = [latents_of(output) for output in engine.run([sample_of(prefer(a=1.0), seed=s) for s in (1, 2)])]
    images = engine.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images[1:], engine.decode(latents[1:]))
