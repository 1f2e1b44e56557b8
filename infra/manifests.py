"""The registry's manifests: what is recorded about an adapter, a bundle and an alias, and how it is written.

A manifest is canonical JSON. Its `digest` is the SHA-256 of everything else in it, so a changed manifest
gives itself away; aliases and bundles hold the digest of what they point at, so a replaced one does too.
"""

import hashlib
import json
import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from infra.errors import IntegrityError, RegistryError, SchemaError

SCHEMA_VERSION = 2  # the newest that is read; see schema_version for what is written
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"

Kind = Literal["adapter", "bundle"]
# What a manifest says about how it came about, not about what it holds: the same content from another run is
# the same content.
PROVENANCE = frozenset(
    {"version", "digest", "content_sha256", "nonce", "created_at", "run_ids", "git_commit", "lockfile_sha256"}
)


def check_name(name: str, what: str = "name") -> str:
    """The name itself, or RegistryError saying what names look like."""
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN[1:-1], name):
        raise RegistryError(
            f"{what} {name!r} is not allowed: use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return name


def check_file_path(path: str) -> str:
    """A relative path inside a record's directory; ValueError for anything that could lead out of it."""
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts:
        raise ValueError(f"file path {path!r} must be relative, with '/' between plain names")
    return path


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Seed = Annotated[int, Field(ge=0)]


class Facts(BaseModel):
    """Base of everything written into the registry: frozen, and nothing but the fields that are declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Facts):
    """One file of a record; its bytes are the blob named by `sha256`."""

    path: Annotated[str, AfterValidator(check_file_path)]
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class BaseIdentity(Facts):
    """The base model: where it was found ("sprites", a directory, a Hub id) and its identifying hash."""

    source: Annotated[str, Field(min_length=1)]
    sha256: Sha256


class Metric(Facts):
    """A measured figure, its 95 % interval where one was computed, and the number of samples behind it."""

    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: int | None = None


class Range(Facts):
    """A closed interval."""

    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low > self.high:
            raise ValueError(f"range low {self.low} is above high {self.high}: swap them")
        return self


class Origin(Facts):
    """Where a record came from, and on what terms it may be used."""

    licence: str = "Apache-2.0"
    parent: str | None = None  # "name@version" this one was made from
    git_commit: str | None = None
    lockfile_sha256: Sha256 | None = None
    run_ids: dict[str, str] = {}  # for instance {"prefect": "...", "ray": "..."}
    metrics: dict[str, Metric] = {}


class AdapterFacts(Origin):
    """What its trainer knows about a basis adapter."""

    base: BaseIdentity
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: tuple[str, ...]
    reward: str
    reward_version: str
    reward_sha256: Sha256 | None = None  # of the reward model's weights; None for a formula
    # alpha in force at the end of training; None: not known, of an adapter that was trained elsewhere
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    # nats that training held the path KL at by moving alpha; None: alpha was fixed
    kl_target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Seed | None  # None: not known, likewise

    @model_serializer(mode="wrap")
    def _as_before_where_alpha_was_fixed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the field that earlier software does not know, where it says nothing."""
        fields: dict[str, Any] = write(self)
        if self.kl_target is None:
            fields.pop("kl_target", None)
        return fields


class BundleDefaults(Facts):
    """How the bundle is meant to be sampled unless a request says otherwise."""

    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5
    num_inference_steps: Annotated[int, Field(ge=1)] = 50
    method: str = "mpa"
    height: int | None = None
    width: int | None = None


class AdapterLink(Facts):
    """A bundle's hold on one adapter: the digest is what counts, name and version say where it lies."""

    name: Name
    version: Annotated[int, Field(ge=1)]
    digest: Sha256

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class BundleFacts(Origin):
    """A basis with its base: the unit that is served."""

    base: BaseIdentity
    adapters: Annotated[
        dict[Name, AdapterLink], Field(min_length=1)
    ]  # basis name -> adapter; kept in the order of the names
    defaults: BundleDefaults = BundleDefaults()
    weight_ranges: dict[str, Range] = {}  # basis name -> recommended weights
    lambda_range: Range = Range(low=0.0, high=1.5)

    @model_validator(mode="after")
    def _ranges_are_of_the_basis(self) -> "BundleFacts":
        unknown = sorted(set(self.weight_ranges) - set(self.adapters))
        if unknown:
            raise ValueError(f"weight_ranges names {unknown}, the basis is {sorted(self.adapters)}: use its names")
        return self


class Commit(Facts):
    """What the registry adds when a version is committed."""

    schema_version: Literal[1, 2] = 1
    name: Name
    version: Annotated[int, Field(ge=1)]
    content_sha256: Sha256  # over everything but PROVENANCE: equal content is one version
    nonce: str  # unique per attempt: tells one's own write from another's after a lost reply
    created_at: datetime
    digest: Sha256

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class AdapterRecord(AdapterFacts, Commit):
    """A published adapter."""

    kind: Literal["adapter"] = "adapter"
    files: tuple[FileEntry, ...]


class BundleRecord(BundleFacts, Commit):
    """A published bundle."""

    kind: Literal["bundle"] = "bundle"


Record = AdapterRecord | BundleRecord


class AliasEntry(Facts):
    """One move of an alias. `seq` counts the moves; `restores` is the seq that a rollback went back to."""

    schema_version: Literal[1] = 1
    version: Annotated[int, Field(ge=1)]
    digest: Sha256
    seq: Annotated[int, Field(ge=1)]
    actor: str
    reason: str
    restores: int | None = None
    nonce: str
    created_at: datetime
    checksum: Sha256  # of the rest of this entry; `digest` is that of the manifest it points at


def schema_version(fields: dict[str, Any]) -> int:
    """The oldest schema that can say this: before 2, an adapter's training was always known in full."""
    return 2 if any(fields.get(name, 0) is None for name in ("kl_weight", "seed")) else 1


def canonical(fields: dict[str, Any]) -> bytes:
    """The one way a manifest is written: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_sha256(fields: dict[str, Any]) -> str:
    """Identity of the content: equal for the same files and facts whoever publishes them, and whenever."""
    kept = {key: value for key, value in fields.items() if key not in PROVENANCE}
    return hashlib.sha256(canonical(kept)).hexdigest()


def seal(fields: dict[str, Any], key: str = "digest") -> bytes:
    """The manifest's bytes, with the SHA-256 of everything else filled in under `key`."""
    bare = {name: value for name, value in fields.items() if name != key}
    return canonical({**bare, key: hashlib.sha256(canonical(bare)).hexdigest()})


M = TypeVar("M", bound=Facts)


def unseal(model: type[M], data: bytes, where: str) -> M:
    """The manifest in `data`; IntegrityError naming `where` for changed bytes, SchemaError for newer ones."""
    try:
        fields = json.loads(data)
        schema = fields["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{where} is damaged: not a manifest. Restore it from a copy of the store") from None
    if not isinstance(schema, int) or schema > SCHEMA_VERSION:
        raise SchemaError(
            f"{where} has schema version {schema!r}, this software reads up to {SCHEMA_VERSION}: "
            "upgrade diffusion-blend"
        )
    if seal(fields, "checksum" if model is AliasEntry else "digest") != canonical(fields):
        raise IntegrityError(
            f"{where} is damaged: its content does not match its digest. Restore it from a copy of the store"
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise IntegrityError(
            f"{where} is damaged: {field}: {problem['msg']}. Restore it from a copy of the store"
        ) from None
