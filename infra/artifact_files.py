"""Which files may enter the registry: safetensors for weights, and plain text or PNG beside them.

A pickle runs code when it is loaded, so none is taken, whatever its name. Every file must be what its suffix
says.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from infra.errors import RegistryError, UnsafeFileError
from infra.manifests import WEIGHTS_FILE, FileEntry, check_file_path

WEIGHT_SUFFIXES = (".safetensors",)
TEXT_SUFFIXES = (".csv", ".json", ".jsonl", ".md", ".toml", ".txt")
IMAGE_SUFFIXES = (".png",)
ALLOWED_SUFFIXES = WEIGHT_SUFFIXES + TEXT_SUFFIXES + IMAGE_SUFFIXES
# safetensors' own cap, and far more tensors than any LoRA has.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
MAX_TEXT_BYTES = 10_000_000
MAX_FILES = 100

_OTHERS = ", ".join(TEXT_SUFFIXES + IMAGE_SUFFIXES)
_REMEDY = f"weights are stored as safetensors ({WEIGHTS_FILE}); other files may be {_OTHERS}"
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


def adapter_files(directory: Path) -> list[FileEntry]:
    """Every file of an adapter directory, checked and hashed, sorted by path; hidden files are left out.

    Raises UnsafeFileError for a file that may not enter, RegistryError for a directory without weights.
    """
    if not directory.is_dir():
        raise RegistryError(f"adapter directory {str(directory)!r} does not exist: name the trainer's output")
    paths = [path for path in sorted(directory.rglob("*")) if _visible(path, directory)]
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UnsafeFileError(f"{path} is not a plain file: replace it by the file that it stands for")
    files = [path for path in paths if path.is_file()]
    if directory / WEIGHTS_FILE not in files:
        raise RegistryError(f"{directory} has no {WEIGHTS_FILE}: save the adapter in diffusers' LoRA layout")
    if len(files) > MAX_FILES:
        raise RegistryError(f"{directory} has {len(files)} files, at most {MAX_FILES} are allowed: remove the rest")
    return [entry(path, directory) for path in files]


def entry(path: Path, directory: Path) -> FileEntry:
    """A file's path, size and hash. Raises UnsafeFileError when it may not enter the registry."""
    check_content(path)
    name = check_file_path(path.relative_to(directory).as_posix())
    return FileEntry(path=name, size=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matches(path: Path, file: FileEntry) -> bool:
    """Whether a local file holds exactly the bytes that a manifest names."""
    return path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256


def check_content(path: Path, name: str | None = None) -> None:
    """Raise UnsafeFileError unless the file is what its suffix says, and the suffix is an allowed one.

    `name`: what it is called in the registry, where that is not the path's own.
    """
    suffix = Path(name or path).suffix.lower()
    if suffix not in ALLOWED_SUFFIXES:
        raise UnsafeFileError(f"{path}: files of type {suffix or 'none'!r} are refused: {_REMEDY}")
    with path.open("rb") as file:
        start = file.read(8)
    pickled = start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"
    # The length that opens a safetensors file may begin with the byte of a pickle: its structure decides first.
    problem = _safetensors_problem(path) if suffix in WEIGHT_SUFFIXES else None
    if pickled and (problem or suffix not in WEIGHT_SUFFIXES):
        raise UnsafeFileError(f"{path}: the content is a pickle or an archive, despite its name: {_REMEDY}")
    if problem:
        raise UnsafeFileError(f"{path}: not a safetensors file: {problem}. Save it again with safetensors")
    if suffix in IMAGE_SUFFIXES and start != b"\x89PNG\r\n\x1a\n":
        raise UnsafeFileError(f"{path}: the content is not a PNG image: {_REMEDY}")
    if suffix in TEXT_SUFFIXES:
        _check_text(path)


def _check_text(path: Path) -> None:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise UnsafeFileError(f"{path}: text files may have {MAX_TEXT_BYTES} bytes: shorten or remove it")
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        data = b"\0"
    if b"\0" in data:
        raise UnsafeFileError(f"{path}: the content is not UTF-8 text: {_REMEDY}")


def _safetensors_problem(path: Path) -> str | None:
    """The header must be small, be JSON, and account for every byte that follows: nothing hides behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            return f"the header claims {length} bytes in a file of {size}"
        raw = file.read(length)
    try:
        header = json.loads(raw)
        spans = [_span(header[name]) for name in header if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"unreadable header ({error})"
    if not 1 <= len(spans) <= MAX_TENSORS:
        return f"{len(spans)} tensors, allowed are 1 to {MAX_TENSORS}"
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            return f"tensors leave a gap or overlap at byte {begin}"
        end = stop
    if end != size - 8 - length:
        return f"tensors end at byte {end}, the data at byte {size - 8 - length}"
    return None


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """First and last byte of a tensor's data; ValueError when shape and type do not fill them."""
    begin, end = (int(offset) for offset in tensor["data_offsets"])
    bits = _DTYPE_BITS[tensor["dtype"]]
    for extent in tensor["shape"]:
        bits *= int(extent)
    if bits < 0 or (end - begin) * 8 != bits:
        raise ValueError(f"shape {tensor['shape']} does not fill bytes {begin} to {end}")
    return begin, end


def _visible(path: Path, directory: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(directory).parts)
