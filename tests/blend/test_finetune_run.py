"""A run as a whole: the reward rises, the KL is held, rules end it early, and what stops it leaves what was good."""

import copy
import math

import pytest
import torch

from blend.finetune.checkpoint import CheckpointFolder, read_state
from blend.finetune.errors import FinetuneError, NonFiniteError, StoppedError
from blend.finetune.held_out import published
from blend.finetune.loop import run_training
from blend.rewards import load_reward


def parameters_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


def test_checkpoint_every_skips_iterations_but_not_the_last(make_trainer):
    saved = []
    run_training(make_trainer(checkpoint_every=2), save=lambda trainer: saved.append(trainer.iteration))
    assert saved == [2, 3]


def test_eval_every_and_guidance_of_the_evaluation(make_trainer):
    trainer, guided = make_trainer(eval_every=1), make_trainer(eval_guidance_scale=7.0)
    run_training(trainer, save=lambda trainer: None)
    assert [m["iteration"] for m in trainer.history if "held_out_mean" in m] == [0, 1, 2, 3]
    assert guided.evaluate()["held_out_mean"] != trainer.history[0]["held_out_mean"]


def test_a_stop_between_micro_batches_leaves_the_adapter_as_it_was(make_trainer):
    trainer = make_trainer(micro_batch_rows=2)
    trainer.evaluate()
    before, learning = parameters_of(trainer), []
    unet = trainer.model.unet
    unet.register_forward_pre_hook(lambda *_: learning.append(None) if torch.is_grad_enabled() else None)
    trainer.should_stop = lambda: len(learning) == 2
    with pytest.raises(StoppedError, match="iteration 1"):
        trainer.iterate()
    assert len(learning) == 2
    for old, new in zip(before, trainer.parameters, strict=True):
        assert torch.equal(old, new)


def test_kl_target_holds_the_held_out_path_kl(make_trainer, redness):
    """Without it the same run goes more than twice as far."""
    kl = {}
    for target in (None, 2.0):
        trainer = make_trainer(
            redness, kl_weight=1e-4, kl_target=target, iterations=20, eval_every=5, learning_rate=0.01
        )
        run_training(trainer, save=lambda trainer: None)
        kl[target] = trainer.history[-1]["held_out_path_kl"]
    assert 2 * kl[2.0] < kl[None]
    assert trainer.control.weight > 1e-4


def test_the_best_within_the_budget_is_kept_and_gone_on_from(make_trainer, redness):
    changes = {"keep": "best", "kl_weight": 1e-9, "eval_every": 1, "learning_rate": 0.01, "iterations": 4}
    free = make_trainer(redness, **changes)
    run_training(free, save=lambda trainer: None)
    # a budget, with alpha too small to keep it, that only the adapters before the last are within
    changes["kl_target"] = free.history[3]["held_out_path_kl"]
    trainer, seen = make_trainer(redness, **changes), {}
    run_training(trainer, save=lambda trainer: seen.update({trainer.iteration: parameters_of(trainer)}))
    within = [m["iteration"] for m in trainer.history[1:] if m["held_out_path_kl"] <= 1.1 * changes["kl_target"]]
    last = trainer.history[-1]
    assert last["kept_iteration"] in within
    assert last["iteration"] not in within
    assert not trainer.finished
    assert "stopped" not in last
    state = trainer.state_dict()
    for kept, now in zip(seen[last["kept_iteration"]], parameters_of(trainer), strict=True):
        assert torch.equal(kept, now)
    longer = make_trainer(redness, **{**changes, "iterations": 5})
    longer.load_state_dict(state)
    run_training(longer, save=lambda trainer: None)
    assert longer.history[-1]["iteration"] == 5


def test_an_early_stop_goes_back_to_the_adapter_that_broke_no_rule(make_trainer, redness, tmp_path):
    changes = {"guard": {"kl": 0.5, "watch": {"compressibility": 50.0}}, "eval_every": 1, "kl_weight": 1e-4}
    watched = {"compressibility": load_reward("compressibility")}
    trainer = make_trainer(redness, watched=watched, learning_rate=0.004, iterations=20, **changes)
    seen = {}

    def save(trainer):
        seen[trainer.iteration] = (parameters_of(trainer), trainer.state_dict())

    run_training(trainer, save=save)
    last = trainer.history[-1]
    assert trainer.finished
    assert 1 < last["iteration"] < 20
    assert last["stopped"].startswith("path KL")
    assert last["kept_iteration"] == last["iteration"] - 1
    assert published(trainer.history)["held_out_path_kl"] <= 0.5 < last["held_out_path_kl"]
    assert set(last["watched"]) == {"compressibility"}
    for kept, now in zip(seen[last["kept_iteration"]][0], trainer.parameters, strict=True):
        assert torch.equal(kept, now)
    assert sorted(trainer.sheets) == list(range(last["iteration"] + 1))

    again = make_trainer(redness, watched=watched, learning_rate=0.004, iterations=20, **changes)
    again.load_state_dict(seen[last["iteration"]][1])
    run_training(again, save=save, on_metrics=lambda metrics: pytest.fail("trained on"))
    assert again.iteration == last["iteration"]


def test_a_rule_broken_at_once_has_nothing_to_go_back_to(make_trainer, redness):
    trainer = make_trainer(redness, guard={"kl": 1e-6}, eval_every=1, learning_rate=0.05)
    with pytest.raises(FinetuneError, match=r"first evaluation, in iteration \d \(path KL"):
        run_training(trainer, save=lambda trainer: None)


@pytest.mark.parametrize("objective", ["dpok", "ddpo", "grpo"])
def test_reward_rises(make_trainer, redness, objective):
    trainer = make_trainer(
        redness,
        objective=objective,
        kl_weight=0.0,
        iterations=8,
        images_per_prompt=12,
        held_out_images=24,
        learning_rate=0.1,
        train_steps_per_sample=3,
        eval_every=50,
        eval_guidance_scale=1.0,
    )
    run_training(trainer, save=lambda trainer: None)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["held_out_mean"] - first["held_out_mean"] > first["held_out_std"]
    assert last["held_out_path_kl"] > 0


def test_kl_weight_holds_the_policy_near_the_base(make_trainer, redness):
    kl = {}
    for kl_weight in (0.0, 0.5):
        trainer = make_trainer(redness, kl_weight=kl_weight, iterations=6, eval_every=50, learning_rate=0.1)
        run_training(trainer, save=lambda trainer: None)
        kl[kl_weight] = trainer.history[-1]["held_out_path_kl"]
    assert kl[0.5] < 0.5 * kl[0.0]


def test_nan_reward_stops_with_prompt_and_seed_and_keeps_the_checkpoint(make_trainer, redness, tmp_path):
    folder = CheckpointFolder(tmp_path)
    trainer = make_trainer(redness, iterations=2)
    run_training(trainer, save=folder.save)
    broken = "A red colored car."
    trainer.sampler.reward = lambda images, prompts: torch.tensor([math.nan if p == broken else 0.0 for p in prompts])
    trainer.config = trainer.config.model_copy(update={"iterations": 9})
    before = copy.deepcopy(folder.latest())
    with pytest.raises(NonFiniteError, match=r"iteration \d: .*'A red colored car\.' \(seed \d+\)"):
        run_training(trainer, save=folder.save)
    assert folder.latest() is not None
    assert folder.latest() >= before
    assert all(tensor.isfinite().all() for tensor in read_state(folder.latest())["parameters"])


def test_nan_loss_stops_before_the_step(make_trainer):
    trainer = make_trainer(iterations=2)
    trainer.evaluate()
    trainer.base = (0.0, float("nan"))
    before = parameters_of(trainer)
    with pytest.raises(NonFiniteError, match=r"step \d of '.*' \(seed \d+\)"):
        trainer.iterate()
    for one, other in zip(before, parameters_of(trainer), strict=True):
        assert torch.equal(one, other)
