"""The facts in the header of an adapter's weight file."""

from importlib.metadata import version

from blend.finetune.config import TrainConfig
from blend.finetune.metadata import adapter_metadata

CONFIG = TrainConfig.parse({"name": "colour", "reward": "colourfulness", "kl_weight": 0.01, "seed": 3})
HISTORY = [
    {"iteration": 0, "held_out_path_kl": 0.0},
    {"iteration": 1, "path_kl": 5.0, "kl_weight": 0.02},
    {"iteration": 2, "path_kl": 9.0, "kl_weight": 0.04, "held_out_path_kl": 8.0},
    {"iteration": 3, "path_kl": 12.0, "kl_weight": 0.08},
    {"iteration": 4, "path_kl": 15.0, "kl_weight": 0.16, "held_out_path_kl": 14.0},
]


def test_facts_are_those_of_the_last_iteration():
    held = CONFIG.model_copy(update={"kl_target": 10.0, "objective": "dpok"})
    assert adapter_metadata(held, HISTORY) == {
        "reward": "colourfulness",
        "objective": "dpok",
        "kl_weight": "0.16",
        "kl_target": "10.0",
        "path_kl": "14.0",
        "iteration": "4",
        "seed": "3",
        "diffusion_blend_version": version("diffusion-blend"),
    }


def test_without_an_evaluation_the_rollouts_give_the_kl():
    facts = adapter_metadata(CONFIG, HISTORY[:4])
    assert (facts["iteration"], facts["path_kl"], facts["kl_weight"]) == ("3", "12.0", "0.08")
    assert "kl_target" not in facts


def test_an_early_stop_describes_the_adapter_it_went_back_to():
    facts = adapter_metadata(CONFIG, [*HISTORY[:4], {**HISTORY[4], "stopped": "path KL", "kept_iteration": 2}])
    assert (facts["iteration"], facts["path_kl"], facts["kl_weight"]) == ("2", "8.0", "0.04")


def test_before_the_first_iteration_settings_are_all_there_is():
    facts = adapter_metadata(CONFIG, [])
    assert (facts["iteration"], facts["kl_weight"], "path_kl" in facts) == ("0", "0.01", False)
