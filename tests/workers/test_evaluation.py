"""A whole evaluation of a tiny bundle with the real engine: samples, files, report, storage, Ray workers."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from blend.engine import Sample
from blend.preference import Preference
from blend.rewards import load_reward
from infra.errors import InfraError
from infra.storage import open_store
from workers.bundles import load_engine
from workers.evaluation import EvaluateConfig, EvaluationError, evaluate
from workers.evaluation.files import COMMIT, NAMES, files_in
from workers.evaluation.storing import folder, is_complete, prepare, restore, upload

PROMPTS = ("A red colored car.", "A <b>blue</b> cup & a green fish.")
BASIS = ("warm", "small")
CONFIG = EvaluateConfig(
    bundle="rivals@1",
    prompts=PROMPTS,
    seeds=(3, 5),
    pair_weights=(0.25,),
    kl_lambdas=(0.5,),
    num_workers=0,
    batch_size=4,
    resamples=200,
    picture_prompts=2,
    path_kl=True,
)


@pytest.fixture(scope="module")
def planned(rivals_store_url):
    return prepare(CONFIG, rivals_store_url)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def result(planned, directory, progress):
    return evaluate(planned, directory, progress.append)


@pytest.fixture
def coarse(result, monkeypatch):
    """The figures of further evaluations have few pixels: to draw them is most of the work."""
    monkeypatch.setattr("workers.evaluation.style.DPI", 50)


@pytest.fixture
def report(result, directory):
    return (directory / "report.html").read_text(encoding="utf-8")


def rows_of(frame, method, kl_lambda, warm):
    found = frame[(frame["method"] == method) & (frame["kl_lambda"] == kl_lambda) & (frame["w_warm"] == warm)]
    assert not found.empty
    return found


def test_every_setting_has_every_prompt_and_seed_once(result, planned):
    frame = result.frame
    assert len(frame) == len(planned.job.cells) * len(PROMPTS) * 2
    assert not frame.duplicated(["method", "w_warm", "w_small", "kl_lambda", "prompt", "seed"]).any()
    for _, samples in frame.groupby("cell"):
        assert list(samples["prompt"]) == [prompt for prompt in PROMPTS for _ in range(2)]
        assert list(samples["seed"]) == [3, 5] * len(PROMPTS)
    assert frame[["colourfulness", "compressibility", "diversity", "path_kl", "seconds"]].notna().all().all()


def test_steps_and_guidance_come_from_the_bundle_unless_given(planned, rivals_store_url):
    assert (planned.config.num_inference_steps, planned.config.guidance_scale) == (4, 2.0)
    given = prepare(CONFIG.model_copy(update={"num_inference_steps": 3, "guidance_scale": 1.0}), rivals_store_url)
    assert (given.config.num_inference_steps, given.config.guidance_scale) == (3, 1.0)


@pytest.mark.parametrize(
    ("method", "kl_lambda", "warm"), [("base", 0.0, 0.0), ("adapter", 1.0, 1.0), ("mpa", 0.5, 0.5), ("soup", 1.0, 0.75)]
)
def test_scores_are_those_of_the_engine_asked_directly(result, planned, method, kl_lambda, warm):
    engine = load_engine(planned.job.bundle)
    preference = Preference.base()
    if method != "base":
        name = "mpa" if method == "adapter" else method
        preference = Preference(weights={"warm": warm, "small": 1 - warm}, kl_lambda=kl_lambda, method=name)
    sample = Sample(PROMPTS[1], preference, 5, num_inference_steps=4, guidance_scale=2.0)
    image = engine.decode([engine.run([sample])[0].latents])
    rows = rows_of(result.frame, method, kl_lambda, warm)
    row = rows[(rows["prompt"] == PROMPTS[1]) & (rows["seed"] == 5)].iloc[0]
    for name in ("colourfulness", "compressibility"):
        assert row[name] == pytest.approx(float(load_reward(name)(image, [PROMPTS[1]])), abs=1e-3)


@pytest.mark.parametrize("path_kl", [False, True])
def test_rows_are_what_each_method_costs_whether_or_not_its_path_kl_is_measured(
    coarse, rivals_store_url, tmp_path, path_kl
):
    config = CONFIG.model_copy(update={"path_kl": path_kl, "prompts": PROMPTS[:1], "kl_lambdas": (0.5,)})
    frame = evaluate(prepare(config, rivals_store_url), tmp_path).frame
    one = 4 * 2  # steps x (with and without the prompt)
    for method, kl_lambda, warm, models in (
        ("base", 0.0, 0.0, 1),
        ("adapter", 1.0, 0.0, 1),
        ("mpa", 1.0, 0.5, 2),
        ("mpa", 0.5, 0.5, 3),
        ("ls", 1.0, 0.75, 1),
        ("soup", 1.0, 0.75, 1),
    ):
        assert set(rows_of(frame, method, kl_lambda, warm)["rows"]) == {models * one}
    assert frame["path_kl"].isna().all() != path_kl


def test_path_kl_grows_with_lambda_from_zero(result):
    kl = [float(rows_of(result.frame, "mpa", dial, 0.5)["path_kl"].mean()) for dial in (0.5, 1.0)]
    assert float(rows_of(result.frame, "base", 0.0, 0.0)["path_kl"].abs().max()) == 0
    assert 0 < kl[0] < kl[1]


def test_batches_do_not_change_scores(coarse, result, rivals_store_url, tmp_path):
    config = CONFIG.model_copy(update={"batch_size": 1, "methods": ("mpa",), "kl_methods": ()})
    other = evaluate(prepare(config, rivals_store_url), tmp_path).frame
    keys = ["method", "w_warm", "kl_lambda", "prompt", "seed"]
    both = other.merge(result.frame, on=keys, suffixes=("", "_batched"))
    assert len(both) == len(other)
    for name in ("colourfulness", "compressibility", "diversity"):
        assert np.allclose(both[name], both[f"{name}_batched"], atol=2e-3)


def test_progress_ends_at_the_total_with_nothing_left(result, progress):
    assert [step.done for step in progress] == sorted(step.done for step in progress)
    assert progress[-1].done == progress[-1].total == len(result.frame)
    assert progress[-1].seconds_left == pytest.approx(0, abs=1e-9)
    assert progress[0].seconds_left > 0


def test_files_hold_what_was_returned(result, directory):
    # adapters of random weights gain nothing, so that there are no shares to draw; nor are there oracles
    absent = {"shares.png", "cost.png", "retraining.png", "dial_retraining.png"}
    assert result.files == [directory / name for name in NAMES if name not in absent]
    assert {path.name for path in directory.iterdir()} == {path.name for path in result.files}
    assert result.files[-1].name == COMMIT
    pd.testing.assert_frame_equal(pd.read_parquet(directory / "samples.parquet"), result.frame)
    pd.testing.assert_frame_equal(pd.read_parquet(directory / "summary.parquet"), result.summary)
    assert len(pd.read_csv(directory / "summary.csv")) == len(result.summary)


def test_summary_json_is_strict_json_and_states_the_reference_point(result, directory, planned):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((directory / COMMIT).read_text(), parse_constant=refuse)
    assert summary["facts"]["digest"] == planned.digest
    assert set(summary["reference_point"]) == {"colourfulness", "compressibility"}
    scale = summary["scales"]["colourfulness"]
    assert summary["reference_point"]["colourfulness"] == pytest.approx(scale["mean"] - 2 * scale["sd"])
    assert len(summary["cells"]) == len(planned.job.cells)
    assert summary["cells"][0]["share"] is None


def test_the_image_grid_has_a_column_per_prompt_and_a_row_per_setting(result, directory, planned):
    from workers.evaluation.pictures import GAP, LABEL_WIDTH, MARGIN, TILE, pictured_cells

    grid = Image.open(directory / "grid.png")
    assert grid.width == 2 * MARGIN + LABEL_WIDTH + 2 * (TILE + GAP) - GAP
    rows = pictured_cells(planned.job.cells)
    assert grid.height > len(rows) * (TILE + GAP)
    methods = [planned.job.cells[row].method for row in rows]
    assert methods == ["base", "adapter", "mpa", "mpa", "adapter", "mpa", "staged", "ls", "soup"]


class Page(HTMLParser):
    """Collects what the report refers to and how its pictures and tables are described."""

    def __init__(self, html):
        super().__init__()
        self.references, self.images, self.headers, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.references += [values[key] for key in ("src", "href", "srcset", "data") if key in values]
        if tag == "img":
            self.images.append(values.get("alt", ""))
        if tag == "th":
            self.headers.append(values.get("scope"))
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_needs_nothing_but_itself(report):
    page = Page(report)
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert len(report) < 2_000_000
    assert "url(" not in report
    assert "@import" not in report


def test_the_report_is_accessible(report):
    page = Page(report)
    assert all(page.images)
    assert all(page.headers)
    assert '<html lang="en">' in report
    assert "prefers-color-scheme: dark" in report
    assert "@media print" in report


def test_the_report_says_what_was_evaluated_and_escapes_it(report, planned):
    text = " ".join(Page(report).text)
    for words in (*PROMPTS, planned.job.bundle.record.digest, planned.digest, "rivals@1", "warm", "small"):
        assert words in text
    assert "<b>blue</b>" not in report


def test_the_digest_names_the_question_not_the_way_it_is_answered(planned, rivals_store_url):
    def digest(**values):
        return prepare(CONFIG.model_copy(update=values), rivals_store_url).digest

    assert digest(num_workers=2, bundle="rivals") == planned.digest
    others = [digest(seeds=(1, 2)), digest(eta=0.5), digest(num_inference_steps=5), digest(methods=("mpa",))]
    assert len({planned.digest, *others}) == 5


def test_store_and_restore(result, planned, directory, tmp_path):
    store = open_store(f"file://{tmp_path / 'store'}")
    assert not restore(planned, tmp_path / "copy", store)
    location = upload(planned, files_in(directory), store)
    assert location.endswith(f"evaluations/{planned.job.bundle.record.digest}/{planned.digest}")
    assert restore(planned, tmp_path / "copy", store)
    assert is_complete(planned, tmp_path / "copy")
    assert [path.read_bytes() for path in files_in(tmp_path / "copy")] == [path.read_bytes() for path in result.files]


def test_an_unfinished_upload_is_written_over_and_a_finished_one_is_not(result, planned, directory, tmp_path):
    store = open_store(f"file://{tmp_path / 'store'}")
    path = f"{folder(planned)}/report.html"
    store.create(path, b"half an attempt")
    assert not restore(planned, tmp_path / "copy", store)
    upload(planned, files_in(directory), store)
    finished = store.read(path)
    assert finished == (directory / "report.html").read_bytes()
    (tmp_path / "report.html").write_text("another attempt")
    upload(planned, [tmp_path / "report.html"], store)
    assert store.read(path) == finished


def test_extra_rewards_are_watched_but_do_not_count(coarse, rivals_store_url, tmp_path):
    from workers.evaluation.planning import plan

    planned = prepare(
        CONFIG.model_copy(update={"rewards": ("compressibility",), "methods": ("mpa",)}), rivals_store_url
    )
    planned = plan(planned.config, planned.job.bundle, dict.fromkeys(BASIS, "colourfulness"))
    assert tuple(planned.job.rewards) == ("colourfulness", "compressibility")
    result = evaluate(planned, tmp_path)
    assert "compressibility_gain" in result.summary
    assert json.loads((tmp_path / COMMIT).read_text())["reference_point"].keys() == {"colourfulness"}
    # one objective has no pairs to trade
    assert not (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"bundle": "nowhere@1"}, InfraError, "nowhere"),
        ({"prompts": PROMPTS[:1], "seeds": (0,)}, EvaluationError, "says nothing"),
        ({"eta": 0.0}, EvaluationError, "ls needs eta > 0"),
        ({"weights": ({"colourfulness": 1.0},)}, EvaluationError, "use one of"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_work(rivals_store_url, values, error, words):
    with pytest.raises(error, match=words):
        prepare(CONFIG.model_copy(update=values), rivals_store_url)


class Broken:
    name, version, range, differentiable = "colourfulness", "1", (0.0, 1.0), False

    def __call__(self, images, prompts):
        return torch.full((len(prompts),), float("nan"))


def test_a_reward_that_is_not_a_number_stops_the_evaluation(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.evaluation.scoring.load_reward", lambda name: Broken())
    with pytest.raises(EvaluationError, match=r"compressibility gave \[nan"):
        evaluate(planned, tmp_path)
    assert not (tmp_path / COMMIT).exists()


@pytest.mark.slow
def test_ray_workers_score_exactly_as_this_process_does(coarse, cluster, result, rivals_store_url, tmp_path):
    config = CONFIG.model_copy(update={"num_workers": 2, "methods": ("mpa",), "kl_methods": ()})
    spread = evaluate(prepare(config, rivals_store_url), tmp_path).frame
    keys = ["method", "w_warm", "w_small", "kl_lambda", "prompt", "seed"]
    here = spread[keys].merge(result.frame, on=keys)[spread.columns]
    pd.testing.assert_frame_equal(
        spread.drop(columns=["seconds", "memory_mb", "cell"]),
        here.drop(columns=["seconds", "memory_mb", "cell"]),
        check_exact=True,
    )


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_one_clear_error(cluster, planned, tmp_path):
    bundle = replace(planned.job.bundle, base_path=tmp_path / "gone")
    config = planned.config.model_copy(update={"num_workers": 1})
    broken = replace(planned, job=replace(planned.job, bundle=bundle, config=config))
    with pytest.raises(EvaluationError, match="worker"):
        evaluate(broken, tmp_path)
