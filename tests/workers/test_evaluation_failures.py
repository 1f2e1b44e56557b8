"""A rival's image that is not finite: the evaluation goes on, says so, and never counts it in the rival's favour."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from plugin_packages import on_path, put_package

from infra.manifests import AdapterFacts, Metric
from infra.registry import Registry
from infra.storage import open_store
from workers.evaluation import EvaluateConfig, EvaluationError, evaluate, load_evaluation
from workers.evaluation.failures import count_failures, without_failures
from workers.evaluation.job import Item
from workers.evaluation.ledger import Ledger
from workers.evaluation.scoring import Scorer
from workers.evaluation.storing import prepare

# A reward as somebody may write it: above the goal the slope of its root is no number, and 0 times that is none either.
ROOTED = """
import torch


class Rooted:
    name = "rooted"
    version = "1"
    range = (-1.0, 0.0)
    differentiable = True

    def __call__(self, images, prompts):
        lacking = GOAL - images.mean((1, 2, 3))
        return -torch.where(lacking > 0, lacking.sqrt(), 0.0)
"""
GOAL = 0.4535  # which one seed in four reaches
RIVAL = "rgg_0.3"
REWARDS = ["rooted", "brightness", "compressibility"]


@pytest.fixture(scope="module")
def store_url(rivals_store_url, tiny_adapters, tmp_path_factory):
    """A registry whose bundle is tuned for the rooted reward and for brightness; the plugin is installed."""
    site = tmp_path_factory.mktemp("site")
    put_package(site, "rooted", {"rooted": "rooted:Rooted"}, f"GOAL = {GOAL}\n{ROOTED}")
    url = f"file://{tmp_path_factory.mktemp('failing') / 'store'}"
    known, registry = Registry(open_store(rivals_store_url)), Registry(open_store(url))
    records = {}
    for (name, directory), reward in zip(tiny_adapters.items(), ("rooted", "brightness"), strict=True):
        fields = {field: getattr(known.get_adapter(name), field) for field in AdapterFacts.model_fields}
        fields |= {"reward": reward, "metrics": {"base_reward": Metric(value=0.5), "base_std": Metric(value=0.25)}}
        records[name] = registry.publish_adapter(name, directory, AdapterFacts(**fields))
    bundle = known.get_bundle("rivals@1")
    registry.publish_bundle("rivals", bundle.base, records, defaults=bundle.defaults)
    with on_path(site):
        yield url


@pytest.fixture(scope="module")
def config(store_url):
    return EvaluateConfig(
        bundle="rivals@1",
        prompts=("A red colored car.", "A blue colored cup."),
        seeds=(1, 2, 3, 4),
        methods=("mpa",),
        pair_weights=(),
        kl_lambdas=(1.0,),
        rivals=(RIVAL, "composite"),
        rewards=("compressibility",),
        num_workers=0,
        batch_size=8,
        resamples=100,
        picture_prompts=2,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("failing")


@pytest.fixture(scope="module")
def planned(config, store_url):
    return prepare(config, store_url)


@pytest.fixture(scope="module")
def result(planned, directory):
    return evaluate(planned, directory / "run", None, Ledger(directory / "ledger"))


@pytest.fixture
def failed(result):
    """The samples that failed: some of the rival's."""
    found = result.frame[result.frame["failed"] == 1]
    assert set(found["method"]) == {RIVAL}
    assert 0 < len(found) < 8
    return found


def test_a_failed_image_is_noted_and_counts_as_the_worst_of_its_setting_and_of_the_base(result, failed):
    frame = result.frame
    sound, base = frame[(frame["method"] == RIVAL) & (frame["failed"] == 0)], frame[frame["method"] == "base"]
    for _, row in failed.iterrows():
        of_base = base[base["prompt_index"] == row["prompt_index"]]
        assert (row[REWARDS] <= sound[REWARDS].min()).all()
        assert (row[REWARDS] <= of_base[REWARDS].min()).all()
        assert row["diversity"] == 0
        assert row["rows"] == row["gradients"] == 4 * 2
    assert (sound["diversity"] > 0).all()
    counts = result.summary.set_index("method")["failed"]
    assert counts[RIVAL] == len(failed)
    assert counts.sum() == len(failed)


def test_a_failed_image_lies_in_the_ledger_as_the_grey_picture_that_it_is(planned, result, failed, directory):
    row = failed.iloc[0]
    key = planned.job.key(int(row["cell"]), row["prompt"], int(row["seed"]))
    kept = Ledger(directory / "ledger").get(key, "1 2 3 4")
    # grey is the smallest JPEG there is: its own score would have been the best
    assert kept["compressibility@1"] > result.frame["compressibility"].max()
    assert kept["failed"] == 1


def test_the_report_says_who_failed_and_what_it_counts(result, failed, directory):
    page = (directory / "run" / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col">Failed images</th>' in page
    sentence = f"Reward guidance (RGG, scale 0.3) in {len(failed)} of 8 failed."
    assert sentence in page
    assert "A failed image, one that is not finite, is shown in grey" in page


def test_tables_are_read_with_their_failures(result, failed, directory):
    samples = load_evaluation(directory / "run", table="samples")
    assert samples["failed"].sum() == len(failed)
    summary = load_evaluation(directory / "run")
    assert summary["failed"].sum() == len(failed)


def test_what_was_scored_is_not_made_again_and_ends_bit_equal(planned, result, directory, tmp_path):
    again = evaluate(planned, tmp_path, lambda progress: pytest.fail("made again"), Ledger(directory / "ledger"))
    pd.testing.assert_frame_equal(again.frame, result.frame, check_exact=True)
    pd.testing.assert_frame_equal(again.summary, result.summary, check_exact=True)


def test_parts_from_before_failures_were_noted_hold_none(planned, result, directory, tmp_path):
    (tmp_path / "ledger").mkdir()
    for part in (directory / "ledger").glob("*.parquet"):
        data = io.BytesIO()
        pd.read_parquet(part).drop(columns="failed").to_parquet(data, index=False)
        name = hashlib.sha256(data.getvalue()).hexdigest()
        (tmp_path / "ledger" / f"{name}.parquet").write_bytes(data.getvalue())
    old = evaluate(planned, tmp_path, lambda progress: pytest.fail("made again"), Ledger(tmp_path / "ledger"))
    assert not old.frame["failed"].any()
    assert not old.summary["failed"].any()
    sound = result.frame["failed"] == 0
    pd.testing.assert_frame_equal(old.frame[sound], result.frame[sound], check_exact=True)
    assert "Failed images" not in Path(tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def broken(config, store_url):
    """A job none of whose images is finite."""
    changes = {"guidance_scale": 1e38, "rivals": ("switch", "composite"), "seeds": (1, 2)}
    return prepare(config.model_copy(update=changes), store_url)


def test_the_products_own_methods_do_not_fail(broken, tmp_path):
    with pytest.raises(EvaluationError, match=r"generation failed: .* not finite"):
        evaluate(broken, tmp_path)


def test_switch_may_fail_and_composite_which_is_the_blend_may_not(broken):
    scorer = Scorer(broken.job)
    methods = [cell.method for cell in broken.job.cells]
    scored = scorer.score(Item(methods.index("switch"), (0,), (1, 2), frozenset({0})))
    assert [row["failed"] for row in scored.rows] == [1, 1]
    assert [row["diversity"] for row in scored.rows] == [0, 0]
    picture = np.asarray(Image.open(io.BytesIO(scored.rows[0]["png"])))
    assert picture.shape == (32, 32, 3)
    assert set(picture.ravel()) == {128}
    with pytest.raises(EvaluationError, match="generation failed"):
        scorer.score(Item(methods.index("composite"), (0,), (1, 2)))


@pytest.mark.parametrize("grey", [-9.0, 9.0])
def test_no_setting_gains_by_failing(grey):
    scores = {0: [1.0, 2.0, 3.0, 4.0], 1: [5.0, -3.0, grey, 2.0], 2: [6.0, 7.0, grey, grey]}
    frame = pd.DataFrame(
        [
            {"cell": cell, "prompt_index": place // 2, "warm": score, "failed": int(score == grey)}
            for cell, row in scores.items()
            for place, score in enumerate(row)
        ]
    ).assign(binding_right=[1.0, np.nan, 1.0, np.nan] * 3)
    counted = count_failures(frame, ["warm"])
    worst = min(grey, -3.0), min(grey, 3.0)
    assert counted["warm"].tolist() == [*scores[0], 5.0, -3.0, worst[0], 2.0, 6.0, 7.0, worst[1], worst[1]]
    assert counted.loc[counted["failed"] == 1, "binding_right"].dropna().eq(0).all()
    assert counted.loc[counted["failed"] == 0, "binding_right"].equals(frame.loc[frame["failed"] == 0, "binding_right"])
    assert frame["warm"].tolist() == [score for row in scores.values() for score in row]


def test_failed_images_add_no_diversity():
    images = np.stack([np.zeros((3, 4, 4)), np.ones((3, 4, 4)), np.full((3, 4, 4), 0.5)])

    def spread(images):
        return np.full(len(images), float(len(images)))

    assert without_failures(spread, images, np.array([False, False, False])).tolist() == [3, 3, 3]
    assert without_failures(spread, images, np.array([False, False, True])).tolist() == [2, 2, 0]
    assert without_failures(spread, images, np.array([True, True, True])).tolist() == [0, 0, 0]
