"""Where prompts come from: a list, a named set of the embedded world, or a text file."""

from pathlib import Path

from blend.finetune.errors import ConfigError

NAMED_SETS = ("sprites-train", "sprites-test")


def load_prompts(source: tuple[str, ...] | str, *, key: str) -> tuple[str, ...]:
    """Distinct prompts of a source, in its order; ConfigError names the key and what is wrong with it."""
    if isinstance(source, tuple):
        prompts = [prompt.strip() for prompt in source]
    elif source in NAMED_SETS:
        from blend.sprites import captions

        prompts = captions.train_prompts() if source == "sprites-train" else captions.held_out_prompts()
    else:
        prompts = _read_lines(Path(source), key)
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not prompts:
        raise ConfigError(
            f"{key} is {source!r}: no prompts in it; give a list, a file with a prompt per line, "
            f"or one of {', '.join(NAMED_SETS)}"
        )
    return tuple(prompts)


def _read_lines(path: Path, key: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{key} is {str(path)!r}: cannot be read ({error.strerror}); give a list, a file with a prompt "
            f"per line, or one of {', '.join(NAMED_SETS)}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key} is {str(path)!r}: not UTF-8 text; give a file with a prompt per line") from None
    return [line.strip() for line in text.splitlines()]
