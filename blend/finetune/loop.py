"""The outer loop of a run: evaluate the base, iterate, save when due. Where things go is the caller's."""

from collections.abc import Callable

from blend.finetune.errors import StoppedError
from blend.finetune.held_out import Metrics
from blend.finetune.trainer import Trainer


def run_training(
    trainer: Trainer,
    *,
    save: Callable[[Trainer], object],
    on_metrics: Callable[[Metrics], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train to `config.iterations` or until the guard stops it; a loaded trainer goes on from where it was.

    Each line of metrics is announced after its checkpoint is safe, iteration 0 being the base. StoppedError
    when asked to stop, NonFiniteError from the trainer: either way the last saved checkpoint stays the newest.
    """
    config = trainer.config
    if trainer.base is None:
        metrics: Metrics = {"iteration": 0, "iterations": config.iterations, **trainer.evaluate()}
        trainer.history.append(metrics)
        on_metrics(metrics)
    while trainer.iteration < config.iterations and not trainer.finished:
        if should_stop():
            raise StoppedError(
                f"{config.name!r} was stopped after iteration {trainer.iteration}: run it again to resume"
            )
        metrics = trainer.iterate()
        last = trainer.iteration == config.iterations
        evaluated = last or trainer.iteration % config.eval_every == 0
        if evaluated:
            metrics |= trainer.evaluate()
        trainer.history.append(metrics)
        if evaluated:
            metrics |= trainer.guard()
        if last or trainer.finished or trainer.iteration % config.checkpoint_every == 0:
            save(trainer)
        on_metrics(metrics)
