"""What may enter the registry: safetensors and plain text, never a pickle, whatever it is called."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from infra.artifact_files import adapter_files, check_content
from infra.errors import RegistryError, UnsafeFileError
from infra.manifests import WEIGHTS_FILE, AdapterFacts
from infra.registry import Registry
from infra.storage import open_store


def header(tensors: dict, data: bytes = b"") -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_everything_a_trainer_writes_is_taken(adapter_dir: Callable[..., Path]):
    directory = adapter_dir()
    (directory / "README.md").write_text("# Card\n")
    (directory / "metrics.jsonl").write_text('{"reward": 1}\n')
    (directory / "logs").mkdir()
    (directory / "logs" / "run.toml").write_text("seed = 0\n")
    (directory / "curve.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 8)
    (directory / ".hidden.pt").write_bytes(b"left out")
    assert [file.path for file in adapter_files(directory)] == sorted(
        ["README.md", "metrics.jsonl", "logs/run.toml", "curve.png", WEIGHTS_FILE]
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16", "int64", "bool"])
def test_every_type_that_safetensors_writes_is_taken(tmp_path: Path, dtype: str):
    save_file({"a": np.ones((2, 3), dtype=dtype), "b": np.ones((), dtype=dtype)}, tmp_path / WEIGHTS_FILE)
    check_content(tmp_path / WEIGHTS_FILE)


def test_a_header_whose_length_looks_like_a_pickle_is_taken(tmp_path: Path):
    path = tmp_path / WEIGHTS_FILE
    lengths = set()
    for padding in range(260):
        save_file({"a": np.ones(2, np.float32)}, path, metadata={"note": "x" * padding})
        lengths.add(path.read_bytes()[0])
        check_content(path)
    assert 0x80 in lengths


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "a.pkl", "a.ckpt", "a.npz", "a.py", "noending"])
def test_other_kinds_of_files_are_refused_by_name(adapter_dir: Callable[..., Path], name: str):
    directory = adapter_dir()
    (directory / name).write_text("harmless")
    with pytest.raises(UnsafeFileError, match=rf"{name}: files of type .* are refused: weights are stored as"):
        adapter_files(directory)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "README.md", "curve.png", "x.json"])
@pytest.mark.parametrize("kind", ["torch", "pickle-2", "pickle-5"])
def test_pickles_are_refused_under_any_name(
    tmp_path: Path, adapter_dir: Callable[..., Path], facts: AdapterFacts, name: str, kind: str
):
    directory = adapter_dir()
    path = directory / name
    if kind == "torch":
        torch.save({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": 1}, protocol=int(kind[-1])))
    registry = Registry(open_store(str(tmp_path / "store")))
    with pytest.raises(UnsafeFileError, match=rf"{name}: the content is a pickle or an archive"):
        registry.publish_adapter("colour", directory, facts)
    assert registry.store.list("") == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "claims 0 bytes"),
        (b"short", "claims 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
        (struct.pack("<Q", 200) + b"{}", "claims 200 bytes in a file of 10"),
        (struct.pack("<Q", 9) + b"not json!", "unreadable header"),
        (header({}), "0 tensors"),
        (header({"a": {"dtype": "F32"}}), "unreadable header"),
        (header({"a": tensor(0, 8, dtype="PICKLE")}, b"\0" * 8), "unreadable header"),
        (header({"a": tensor(0, 8, shape=[3])}, b"\0" * 8), "does not fill"),
        (header({"a": tensor(4, 8)}, b"\0" * 8), "gap or overlap at byte 4"),
        (header({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12), "gap or overlap at byte 4"),
        (header({"a": tensor(0, 8)}, b"\0" * 4), "tensors end at byte 8, the data at byte 4"),
        (header({"a": tensor(0, 8)}, b"\0" * 9), "tensors end at byte 8, the data at byte 9"),
    ],
)
def test_what_only_claims_to_be_safetensors_is_refused(tmp_path: Path, content: bytes, problem: str):
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UnsafeFileError, match=f"not a safetensors file: .*{problem}"):
        check_content(tmp_path / WEIGHTS_FILE)


@pytest.mark.parametrize(("name", "content"), [("a.png", b"GIF89a"), ("a.txt", b"a\0b"), ("a.json", b"\xff\xfe")])
def test_content_must_match_the_suffix(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsafeFileError, match=f"{name}: the content is not"):
        check_content(tmp_path / name)


def test_directories_without_weights_links_and_floods_are_refused(tmp_path: Path, adapter_dir: Callable[..., Path]):
    with pytest.raises(RegistryError, match="does not exist"):
        adapter_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match=f"has no {WEIGHTS_FILE}"):
        adapter_files(tmp_path / "empty")
    (adapter_dir(1) / "link.txt").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeFileError, match=r"link\.txt is not a plain file"):
        adapter_files(adapter_dir(1))
    for number in range(101):
        (adapter_dir(2) / f"{number}.txt").write_text("")
    with pytest.raises(RegistryError, match="at most 100"):
        adapter_files(adapter_dir(2))
