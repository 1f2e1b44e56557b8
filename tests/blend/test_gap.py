"""The gap between a blend and an oracle: where it is 0 and 1, what it adds up to, and that the path is the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from work_counter import counted

from blend.adapters import AdapterBank
from blend.engine import BlendEngine, DenoisingError, Sample, SampleError
from blend.gap import Gap, measure_gap
from blend.model import DiffusionModel, load_model
from blend.preference import Preference, PreferenceError

PROMPTS = ("A red colored car.", "A blue cup.")


def blend(weights: dict[str, float], kl_lambda: float = 1.0, method: str = "mpa") -> Preference:
    return Preference(weights=weights, kl_lambda=kl_lambda, method=method)


def samples(preference: Preference, **changes) -> list[Sample]:
    settings = {"num_inference_steps": 4, **changes}
    return [Sample(prompt, preference, seed, **settings) for seed, prompt in enumerate(PROMPTS)]


HALF = blend({"a": 0.5, "b": 0.5})


@pytest.fixture
def engine(tiny_model: DiffusionModel, tiny_bank: AdapterBank) -> BlendEngine:
    return BlendEngine(tiny_model, tiny_bank)


@pytest.fixture(scope="session")
def v_engine(tiny_sd_dir, adapter_dirs) -> BlendEngine:
    model = load_model(tiny_sd_dir)
    model.prediction_type = "v_prediction"
    bank = AdapterBank(model.unet)
    for name, path in adapter_dirs.items():
        bank.load(name, path)
    return BlendEngine(model, bank)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either_engine(request, engine, v_engine) -> BlendEngine:
    return engine if request.param == "epsilon" else v_engine


def assert_near(a: torch.Tensor, b: torch.Tensor, share: float = 2e-5) -> None:
    # random weights blow latents up to tens; rounding is judged against their size
    torch.testing.assert_close(a, b, rtol=0, atol=share * float(b.abs().max()), check_dtype=False)


@pytest.mark.parametrize("along", ["blend", "oracle"])
def test_an_oracle_that_is_the_adapter_has_no_gap(fresh_bank, tiny_sd_dir, adapter_dirs, along):
    fresh_bank.load("a", adapter_dirs["a"])
    fresh_bank.load("twin", adapter_dirs["a"])
    model = load_model(tiny_sd_dir)
    model.unet = fresh_bank.unet
    gap = measure_gap(BlendEngine(model, fresh_bank), samples(blend({"a": 1.0})), blend({"twin": 1.0}), along=along)
    assert float(gap.oracle_shift.min()) > 1e-2
    assert float(gap.relative.max()) < 1e-4
    assert float(gap.path_kl.max()) < 1e-6 * float(gap.base_path_kl.min())
    torch.testing.assert_close(gap.cosine, torch.ones_like(gap.cosine), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preference", [HALF, blend({"a": 0.2, "c": 0.8}, 0.5), blend({"a": 1.0}, 1.5)], ids=str)
def test_a_blend_has_no_gap_to_itself(either_engine, preference):
    gap = measure_gap(either_engine, samples(preference), preference)
    assert float(gap.relative.max()) == 0.0
    assert float(gap.path_kl.max()) == 0.0


def test_the_base_is_as_far_from_the_oracle_as_the_oracle_from_the_base(either_engine):
    gap = measure_gap(either_engine, samples(blend({"a": 0.5, "b": 0.5}, 0.0)), blend({"c": 1.0}))
    assert float(gap.blend_shift.max()) == 0.0
    torch.testing.assert_close(gap.relative, torch.ones_like(gap.relative), rtol=0, atol=0)
    assert gap.cosine.isnan().all()
    assert float(gap.base_path_kl.max()) == 0.0
    assert float(gap.path_kl.min()) > 0


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("preference", [HALF, blend({"a": 0.3, "b": 0.7}, 1.5), blend({"a": 0.5, "b": 0.5}, 1, "soup")])
def test_the_path_kl_to_the_base_is_the_engines(either_engine, preference, eta):
    asked = samples(preference, eta=eta)
    gap = measure_gap(either_engine, asked, Preference.base())
    outputs = either_engine.run([replace(sample, measure_kl=True) for sample in asked])
    expected = torch.tensor([output.path_kl * output.latents.numel() for output in outputs])
    torch.testing.assert_close(gap.path_kl.float(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(gap.path_kl, gap.base_path_kl, rtol=1e-6, atol=0)
    assert float(gap.oracle_shift.max()) == 0.0
    assert gap.relative.isinf().all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eta": 0.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "blue", "guidance_interval": (0.25, 0.75)},
        {"shared_unconditional": True},
        {"record": True, "reference_steps": (1,)},
    ],
    ids=str,
)
def test_paths_end_where_the_engines_do(either_engine, changes):
    oracle = blend({"c": 1.0})
    asked = samples(HALF, **changes)
    for along, walking in (("blend", asked), ("oracle", [replace(one, preference=oracle) for one in asked])):
        gap = measure_gap(either_engine, asked, oracle, along=along)
        assert_near(gap.latents, torch.stack([output.latents for output in either_engine.run(walking)]))


def test_the_base_kl_is_that_of_the_side_that_walks(engine):
    oracle = blend({"c": 1.0})
    gap = measure_gap(engine, samples(HALF), oracle, along="oracle")
    outputs = engine.run(samples(oracle, measure_kl=True))
    expected = torch.tensor([output.path_kl * output.latents.numel() for output in outputs])
    torch.testing.assert_close(gap.base_path_kl.float(), expected, rtol=1e-4, atol=0)


def test_sdxl_and_ls_walk_as_the_engine_does(tiny_sdxl_model, tiny_sdxl_bank, engine):
    sdxl, asked = BlendEngine(tiny_sdxl_model, tiny_sdxl_bank), samples(HALF)
    gap = measure_gap(sdxl, asked, blend({"a": 1.0}))
    assert_near(gap.latents, torch.stack([output.latents for output in sdxl.run(asked)]))

    drawn = samples(blend({"a": 0.5, "b": 0.5}, method="ls"))
    gap = measure_gap(engine, drawn, blend({"a": 1.0}))
    assert_near(gap.latents, torch.stack([output.latents for output in engine.run(drawn)]))
    # half of the steps are the oracle's own
    assert (gap.relative < 1e-5).sum(1).tolist() == [2, 2]


def test_distances_are_those_of_predictions_made_one_by_one(either_engine):
    """With one step from x_T, of which the engine's preview is the predicted x_0."""
    (asked, _), oracle = samples(HALF, num_inference_steps=1), blend({"c": 1.0})
    origins = [predicted_origin(either_engine, replace(asked, preference=p)) for p in (HALF, oracle, Preference.base())]
    gap = measure_gap(either_engine, [asked], oracle)
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, at the same x_t
    per_origin = (gap.alphas_cumprod[0] / (1 - gap.alphas_cumprod[0])) ** 0.5
    eps = [-per_origin * origin.double() for origin in origins]
    near = {"rtol": 1e-4, "atol": 0}
    for found, one, other in ((gap.distance, 0, 1), (gap.oracle_shift, 1, 2), (gap.blend_shift, 0, 2)):
        torch.testing.assert_close(found[0, 0], (eps[one] - eps[other]).pow(2).mean().sqrt(), **near)
    # the shifts are small and nearly at right angles: little is left of them
    inner = ((eps[0] - eps[2]) * (eps[1] - eps[2])).mean()
    torch.testing.assert_close(gap.inner[0, 0], inner, rtol=5e-3, atol=0)


def predicted_origin(engine: BlendEngine, sample: Sample) -> torch.Tensor:
    """The x_0 that a sample's first step predicts."""
    ticket = engine.submit(sample)
    running = engine._find(ticket)
    while not engine.idle:
        engine.step()
    assert running.origin is not None
    return running.origin


def test_the_numbers_of_a_step_belong_together(either_engine):
    gap = measure_gap(either_engine, samples(blend({"a": 0.6, "b": 0.4}, 1.5)), blend({"c": 1.0}))
    near = {"rtol": 1e-5, "atol": 1e-12}
    torch.testing.assert_close(gap.relative, gap.distance / gap.oracle_shift, **near)
    torch.testing.assert_close(gap.cosine, gap.inner / (gap.oracle_shift * gap.blend_shift), **near)
    law = gap.blend_shift**2 + gap.oracle_shift**2 - 2 * gap.inner
    torch.testing.assert_close(gap.distance**2, law, **near)
    # the mean of a DDIM step is linear in eps, whatever the model predicts: KL is the squared distance, scaled
    timesteps, prev_timesteps = either_engine.model.timesteps(4)
    schedule = either_engine.model.scheduler.alphas_cumprod.double()
    abar, prev = schedule[timesteps], schedule[prev_timesteps.clamp(min=0)]
    prev[-1] = either_engine.model.scheduler.final_alpha_cumprod
    variance = (1 - prev) / (1 - abar) * (1 - abar / prev)
    slope = (1 - prev - variance).clamp(min=0).sqrt() - (prev * (1 - abar) / abar).sqrt()
    expected = gap.latents[0].numel() * (slope * gap.distance) ** 2 / (2 * variance)
    torch.testing.assert_close(gap.kl, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(gap.path_kl, gap.kl.sum(1))
    torch.testing.assert_close(gap.alphas_cumprod, abar)
    assert torch.equal(gap.timesteps, timesteps)


def test_the_first_shift_of_a_blend_grows_with_lambda(engine):
    shifts = [
        measure_gap(engine, samples(blend({"a": 0.5, "b": 0.5}, dial)), blend({"c": 1.0})).blend_shift[:, 0]
        for dial in (0.5, 1, 2)
    ]
    torch.testing.assert_close(shifts[1], 2 * shifts[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(shifts[2], 4 * shifts[0], rtol=1e-4, atol=0)


def test_steps_without_noise_have_no_kl(tiny_model, engine, monkeypatch):
    gap = measure_gap(engine, samples(HALF, eta=0.0), blend({"c": 1.0}))
    assert gap.kl.isnan().all()
    assert gap.path_kl.isnan().all()
    # ends at alpha-bar 1: the last step is noiseless
    monkeypatch.setattr(tiny_model.scheduler, "final_alpha_cumprod", torch.tensor(1.0))
    gap = measure_gap(engine, samples(HALF), blend({"c": 1.0}))
    assert gap.kl.isnan().sum(1).tolist() == [1, 1]
    assert gap.kl[:, -1].isnan().all()
    assert gap.path_kl.isfinite().all()


def test_a_sample_does_not_depend_on_its_neighbours(engine):
    asked = [*samples(HALF), replace(samples(blend({"b": 1.0}, 0.5))[0], seed=7, negative_prompt="blue")]
    together = measure_gap(engine, asked, blend({"c": 1.0}), tile_rows=5)
    for place, sample in enumerate(asked):
        alone = measure_gap(engine, [sample], blend({"c": 1.0}))
        for name in per_sample(together):
            assert_near(getattr(together, name)[place], getattr(alone, name)[0], 1e-3)


def per_sample(gap: Gap) -> Sequence[str]:
    return [field.name for field in fields(gap) if field.name not in ("timesteps", "alphas_cumprod")]


def test_rows_that_two_sides_share_run_once(engine, tiny_model):
    for preference, oracle, sources in (
        (HALF, blend({"c": 1.0}), 4),
        (blend({"a": 0.5, "b": 0.5}, 0.5), blend({"c": 1.0}), 4),
        (HALF, blend({"a": 1.0}), 3),
        (HALF, Preference.base(), 3),
    ):
        with counted(tiny_model) as seen:
            measure_gap(engine, samples(preference), oracle)
        assert seen["rows"] == len(PROMPTS) * 4 * 2 * sources


def test_at_no_signal_eps_is_given_and_the_gap_still_defined(v_engine, monkeypatch):
    schedule = v_engine.model.scheduler.alphas_cumprod.clone()
    schedule[int(v_engine.model.timesteps(4)[0][0])] = 0.0
    monkeypatch.setattr(v_engine.model.scheduler, "alphas_cumprod", schedule)
    gap = measure_gap(v_engine, samples(HALF), blend({"c": 1.0}))
    assert float(gap.distance[:, 0].max()) == 0.0
    assert gap.relative.isfinite().all()
    assert float(gap.relative[:, 0].min()) > 0


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"solver": "dpmpp"}, SampleError, "ddim"),
        ({"preference": blend({"a": 0.5, "b": 0.5}, method="cached")}, SampleError, "use mpa"),
        ({"guidance_scale": 2.0}, SampleError, "different ways"),
        ({"preference": blend({"nobody": 1.0})}, PreferenceError, "nobody"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, changes, error, what):
    first, second = samples(HALF)
    with pytest.raises(error, match=what):
        measure_gap(engine, [first, replace(second, **changes)], blend({"c": 1.0}))


def test_other_refusals(engine, monkeypatch):
    with pytest.raises(PreferenceError, match="nobody"):
        measure_gap(engine, samples(HALF), blend({"nobody": 1.0}))
    with pytest.raises(ValueError, match="along"):
        measure_gap(engine, samples(HALF), blend({"c": 1.0}), along="base")
    with pytest.raises(ValueError, match="at least one"):
        measure_gap(engine, [], blend({"c": 1.0}))
    with pytest.raises(DenoisingError, match="seed 0"):
        measure_gap(engine, samples(HALF, guidance_scale=1e38), blend({"c": 1.0}))
