"""An evaluation with rivals and oracles: what each cell is, nothing is made twice, and a stopped one goes on."""

import pandas as pd
import pytest

from blend.engine import Sample
from blend.preference import Preference
from blend.rewards import load_reward
from blend.rewards.weighted import WeightedReward
from infra.manifests import AdapterFacts, Metric
from infra.registry import Registry
from infra.storage import open_store
from workers.bundles import load_engine
from workers.evaluation import EvaluateConfig, EvaluationError, evaluate
from workers.evaluation.ledger import Ledger
from workers.evaluation.rivals import parse_rival
from workers.evaluation.storing import prepare, ready

pytestmark = pytest.mark.usefixtures("coarse_figures")

PROMPTS = ("A red colored car.", "A blue colored cup.", "A green colored fish.")
RUN = """
name = "template"
reward = "colourfulness"
prompts = ["A red colored bear.", "A blue colored boat."]
held_out_prompts = ["A red colored apple."]
held_out_images = 2
rank = 2
iterations = 1
prompts_per_iteration = 2
images_per_prompt = 2
num_inference_steps = 2
train_steps_per_sample = 1
num_workers = 0
"""
RIVALS = ("best_of_4", "code_2_2", "switch", "composite")


@pytest.fixture(scope="module")
def store_url(rivals_store_url, tiny_adapters, tmp_path_factory):
    """A registry whose adapters state what their rewards were under the base."""
    url = f"file://{tmp_path_factory.mktemp('measured') / 'store'}"
    known, registry = Registry(open_store(rivals_store_url)), Registry(open_store(url))
    records = {}
    for name, directory in tiny_adapters.items():
        fields = {field: getattr(known.get_adapter(name), field) for field in AdapterFacts.model_fields}
        metrics = {"base_reward": Metric(value=0.5), "base_std": Metric(value=0.25)}
        records[name] = registry.publish_adapter(name, directory, AdapterFacts(**{**fields, "metrics": metrics}))
    bundle = known.get_bundle("rivals@1")
    registry.publish_bundle("rivals", bundle.base, records, defaults=bundle.defaults)
    return url


@pytest.fixture(scope="module")
def oracle_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "train_oracle.toml"
    path.write_text(RUN)
    return str(path)


@pytest.fixture(scope="module")
def config(oracle_run):
    return EvaluateConfig(
        bundle="rivals@1",
        prompts=PROMPTS,
        seeds=(3, 5),
        methods=("mpa",),
        pair_weights=(0.25,),
        kl_lambdas=(1.0,),
        rivals=RIVALS,
        oracle_weights=({"warm": 0.5, "small": 0.5},),
        oracle_lambdas={"small": (0.5,)},
        oracle_run=oracle_run,
        num_workers=0,
        batch_size=4,
        resamples=200,
        picture_prompts=1,
    )


@pytest.fixture(scope="module")
def planned(config, store_url):
    return ready(prepare(config, store_url), store_url)


@pytest.fixture(scope="module")
def result(planned, tmp_path_factory):
    return evaluate(planned, tmp_path_factory.mktemp("whole"))


def cell_of(frame, method, warm=0.5, kl_lambda=1.0):
    found = frame[(frame["method"] == method) & (frame["w_warm"] == warm) & (frame["kl_lambda"] == kl_lambda)]
    assert not found.empty
    return found.reset_index(drop=True)


def test_rivals_and_oracles_are_measured_where_oracles_are(planned):
    asked = [(cell.method, cell.weights, cell.kl_lambda) for cell in planned.job.cells]
    for rival in RIVALS:
        assert [cell for cell in asked if cell[0] == rival] == [(rival, (0.5, 0.5), 1.0)]
    small = tuple(float(name == "small") for name in planned.job.basis)
    assert [cell for cell in asked if cell[0] == "oracle"] == [("oracle", (0.5, 0.5), 1.0), ("oracle", small, 0.5)]
    # what stands in for the model retrained at half the strength
    assert ("mpa", small, 0.5) in asked


def test_an_oracle_is_its_own_adapter_in_the_engine(result, planned, config):
    oracle = next(oracle for cell, oracle in planned.job.oracles.items() if cell.kl_lambda == 1)
    engine = load_engine(planned.job.bundle)
    engine.bank.load(oracle.name, oracle.path)
    sample = Sample(PROMPTS[1], Preference(weights={oracle.name: 1.0}), 5, num_inference_steps=4, guidance_scale=2.0)
    image = engine.decode([engine.run([sample])[0].latents])
    row = cell_of(result.frame, "oracle").query("prompt_index == 1 and seed == 5").iloc[0]
    assert row["colourfulness"] == pytest.approx(float(load_reward("colourfulness")(image, [PROMPTS[1]])), abs=1e-3)
    assert row["rows"] == 4 * 2


def test_oracles_are_trained_once(planned, config, store_url):
    runs = planned.oracle_runs
    trained = Registry(open_store(store_url))
    assert {run.name for run in runs.values()} <= set(trained.names("adapter"))
    assert {run.reward_label for run in runs.values()} == {"0.5 compressibility + 0.5 colourfulness", "compressibility"}
    halved = next(run for cell, run in runs.items() if cell.kl_lambda == 0.5)
    assert halved.kl_weight == pytest.approx(2 * 0.01)
    started = []
    again = ready(prepare(config, store_url), store_url, lambda *args: started.append(args))
    assert not started
    assert again.job.oracles == planned.job.oracles
    assert again.digest == planned.digest


def test_other_settings_of_a_training_are_other_oracles_of_the_same_preferences(planned, config, store_url):
    other = prepare(config.model_copy(update={"oracle_settings": {"seed": 1, "kl_target": 40.0}}), store_url)
    assert other.job.cells == planned.job.cells
    assert other.digest != planned.digest
    for cell, run in other.oracle_runs.items():
        assert run.name != planned.oracle_runs[cell].name
        assert run.seed == 1
        assert run.model_copy(update={"seed": 0, "kl_target": None, "name": ""}).training_facts() == (
            planned.oracle_runs[cell].model_copy(update={"kl_target": None, "name": ""}).training_facts()
        )
    # at another strength its own path KL counts, where the adapter's manifest states one
    assert {cell.kl_lambda: run.kl_target for cell, run in other.oracle_runs.items()} == {1.0: 40.0, 0.5: 10.0}


def test_oracles_that_are_not_trained_are_named(config, store_url, tmp_path):
    with pytest.raises(EvaluationError, match=r"oracle-.* is not trained"):
        evaluate(prepare(config, store_url), tmp_path)


def test_the_best_of_four_is_no_worse_than_the_first_of_them(result, planned):
    base, best = cell_of(result.frame, "base", 0.0, 0.0), cell_of(result.frame, "best_of_4")
    names = {"warm": "colourfulness", "small": "compressibility"}
    weights = dict.fromkeys(names, 0.5)
    reward = WeightedReward(
        {one: load_reward(name) for one, name in names.items()}, weights, dict.fromkeys(names, (0.5, 0.25))
    )
    score = sum(0.5 * best[name] for name in names.values()) - sum(0.5 * base[name] for name in names.values())
    assert reward.weights == weights
    assert (score >= -1e-6).all()
    assert (score > 1e-6).any()
    assert set(best["rows"]) == {4 * 4 * 2}
    assert set(best["decodes"]) == {4}
    assert set(cell_of(result.frame, "code_2_2")["decodes"]) == {2 * 2}


def test_composite_at_equal_weights_is_the_blend_and_is_not_made_again(result):
    blend, composite = cell_of(result.frame, "mpa"), cell_of(result.frame, "composite")
    # the very same measurement: even its seconds
    unnamed = ["cell", "method"]
    pd.testing.assert_frame_equal(blend.drop(columns=unnamed), composite.drop(columns=unnamed))


def stop_after(images):
    def stop(progress):
        if progress.done >= images:
            raise KeyboardInterrupt

    return stop


def test_a_stopped_evaluation_goes_on_and_ends_bit_equal(planned, result, tmp_path):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        evaluate(planned, tmp_path, stop_after(20), Ledger(tmp_path / "ledger"))
    went_on = evaluate(planned, tmp_path, seen.append, Ledger(tmp_path / "ledger"))
    assert seen[-1].done == seen[-1].total < len(result.frame) - 18
    measured = ["seconds", "memory_mb"]
    pd.testing.assert_frame_equal(
        went_on.frame.drop(columns=measured), result.frame.drop(columns=measured), check_exact=True
    )
    # and a third time there is nothing to do
    evaluate(planned, tmp_path / "again", lambda progress: pytest.fail("made again"), Ledger(tmp_path / "ledger"))


def test_another_evaluation_makes_only_what_is_new(planned, config, store_url, tmp_path):
    ledger, seen = Ledger(tmp_path / "ledger"), []
    small = config.model_copy(update={"prompts": PROMPTS[:2], "oracle_weights": (), "oracle_lambdas": {}, "rivals": ()})
    first = evaluate(prepare(small, store_url), tmp_path / "one", None, ledger)
    more = small.model_copy(update={"prompts": PROMPTS})
    second = evaluate(prepare(more, store_url), tmp_path / "two", seen.append, ledger)
    assert seen[-1].total == len(second.frame) - len(first.frame)
    # another reward is another question: nothing of it is known
    seen.clear()
    evaluate(
        prepare(more.model_copy(update={"rewards": ("brightness",)}), store_url), tmp_path / "3", seen.append, ledger
    )
    assert seen[-1].total == len(second.frame)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rivals": ("best_of_0",)}, "best_of_N"),
        ({"rivals": ("codes",)}, "unknown rival 'codes'"),
        ({"oracle_lambdas": {"small": (1.0,)}}, "adapter itself"),
        ({"oracle_settings": {"reward": "brightness"}}, "oracle_settings.*reward is that of each oracle"),
    ],
)
def test_wrong_settings_are_named(values, words):
    with pytest.raises(EvaluationError, match=words):
        EvaluateConfig.parse(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"oracle_weights": ({"warm": 1.0},)}, r"oracle_weights\[0\]: one reward alone"),
        ({"oracle_weights": ({"gone": 1.0},)}, r"oracle_weights\[0\]"),
        ({"oracle_lambdas": {"gone": (0.5,)}}, "unknown adapter 'gone'"),
        ({"oracle_run": None}, "oracle_run"),
        ({"oracle_run": "nowhere.toml"}, "oracle_run"),
        ({"oracle_settings": {"seeds": 1}}, "oracle_settings: .*seeds"),
        ({"rivals": ("rgg_2",)}, "needs gradients"),
    ],
)
def test_what_this_bundle_cannot_be_asked_is_refused_before_work(config, store_url, values, words):
    with pytest.raises(EvaluationError, match=words):
        prepare(config.model_copy(update=values), store_url)


def test_searching_rivals_need_the_scales_of_the_rewards(config, rivals_store_url):
    with pytest.raises(EvaluationError, match="base_std"):
        prepare(config, rivals_store_url)


def test_names_say_what_a_rival_is():
    assert parse_rival("code_20_5").numbers == (20, 5)
    assert parse_rival("rgg_0.5").needs_gradients
    assert parse_rival("best_of_3").forecast(20) == 3
    assert parse_rival("code_20_5").forecast(20) == pytest.approx((1 + 20 * 19) / 20)
