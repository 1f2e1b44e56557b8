"""A real CLIPTokenizer whose vocabulary is the caption grammar: one token a word, other text falls back to bytes."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

from blend.sprites.captions import COLOURS, OBJECTS

MAX_TOKENS = 16  # the longest caption has 12 with its two end marks


def write_tokenizer(directory: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt of the grammar and return the tokenizer that reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    symbols = list(_byte_symbols())
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in _words():
        while len(parts := _segment(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
            vocabulary.append(parts[0] + parts[1])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(directory)
    return tokenizer


def _segment(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The byte-pair pieces of one word: the earliest merge that fits is applied first."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    for pair in merges:
        index = 0
        while index < len(parts) - 1:
            if (parts[index], parts[index + 1]) == pair:
                parts[index : index + 2] = ["".join(pair)]
            index += 1
    return parts


def _words() -> list[str]:
    words = {word for name in (*COLOURS, *OBJECTS) for word in name.split()}
    return sorted(words | {"a", "an", "and", "colored"})


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]
