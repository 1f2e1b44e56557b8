"""Images per second of rollout and update, beside a plain DDPO loop on the same model, prompts and settings."""

import statistics
from pathlib import Path
from typing import Any

from finetuning_parts.ddpo_loop import DDPOLoop

from blend.finetune.config import TrainConfig
from blend.finetune.rollout import plan_requests
from blend.rewards import load_reward
from blend.sprites import base_model_path
from workers.training import TrainJob

RUN = Path(__file__).parents[3] / "infra" / "runs" / "train_colourfulness.toml"
USUAL_BATCH, OTHER_BATCHES = 8, (16, 32, 64)
OURS, USUAL, EVERY_STEP = "ours", f"ddpo, batch {USUAL_BATCH}", f"ddpo, batch {USUAL_BATCH}, every step"


def measure(rounds: int) -> dict[str, Any]:
    """Median seconds of an iteration of each contestant over `rounds`, taken by turns in this process.

    ratio_vs_ddpo_loop trains the same number of steps of each image and leaves the rival its usual batch; the other
    ratios give it the best of several batches, or have it train every step, as such loops do unless told otherwise.
    """
    settings = TrainConfig.from_toml(RUN).model_dump()
    config = TrainConfig.parse({**settings, "num_workers": 0, "held_out_images": 2, "guard": {}})
    job = TrainJob.prepare(config)
    trainer = job.trainer()
    trainer.evaluate()
    rival = DDPOLoop(
        str(base_model_path()),
        load_reward(config.reward),
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        rank=config.rank,
    )
    names = [OURS, USUAL, *(f"ddpo, batch {size}" for size in OTHER_BATCHES), EVERY_STEP]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rollouts: list[float] = []
    for turn in range(rounds):
        plan = plan_requests(config, job.prompts, turn)
        prompts, groups = [request.prompt for request in plan], [request.group for request in plan]
        for name in names:
            if name == OURS:
                metrics = trainer.iterate()
                rollouts.append(metrics["rollout_seconds"] / metrics["seconds"])
            else:
                rival.batch_size = int(name.split()[2].strip(","))
                trained = config.num_inference_steps - 1 if name == EVERY_STEP else config.train_steps_per_sample
                metrics = rival.iterate(prompts, groups, trained, seed=turn)
            seconds[name].append(metrics["seconds"])
            print(f"round {turn + 1}/{rounds} {name}: {metrics['seconds']:.1f} s", flush=True)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    best = min(median[name] for name in names[1:-1])
    return {
        "ratio_vs_ddpo_loop": median[USUAL] / median[OURS],
        "ratio_vs_ddpo_loop_best_batch": best / median[OURS],
        "ratio_vs_ddpo_loop_every_step": median[EVERY_STEP] / median[OURS],
        "images_per_second": {name: config.batch_size / value for name, value in median.items()},
        "rollout_share": statistics.median(rollouts),
        "trained_steps": f"{config.train_steps_per_sample} of {config.num_inference_steps}",
    }
