"""What can go wrong in fine-tuning; every class survives pickle, to cross from Ray workers to the driver."""


class FinetuneError(ValueError):
    """A training run that cannot start or must not go on."""


class ConfigError(FinetuneError):
    """A run file or setting that is wrong; the message names the key, its value and the remedy."""


class ResumeError(FinetuneError):
    """A checkpoint of another configuration; the message names the differing keys."""


class CheckpointError(FinetuneError):
    """A checkpoint could not be stored or read for so long that the run ended; the message says what is kept where."""


class NonFiniteError(FinetuneError):
    """NaN or infinity in a reward or a loss; the message names the step, the prompts and the seeds."""


class StoppedError(FinetuneError):
    """The run was asked to stop; the last checkpoint can be resumed."""
