"""Which basis to load and how to run it, as typed arguments. Knows neither torch nor Ray."""

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from workers.bundles import DEFAULT_BUNDLE

# HTTP requests that are answered at once, waiting ones included, unless told otherwise.
MAX_CONCURRENT = 512


class EngineArgs(BaseModel):
    """Which basis to load and how to run it: a bundle from the registry, or a base with adapters by path."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # "name@7", "name@champion" or "name" for the latest; None without adapters: the one the package ships
    bundle: str | None = None
    # what the bundle was called before its version was written out; clients may go on using it as the model's name
    asked_as: str | None = None
    # any Stable-Diffusion-class diffusers directory or Hub id; with a bundle: where its base lies on this machine
    base: str | None = None
    # basis name -> directory or safetensors file in diffusers' own layout
    adapters: dict[str, str] = Field(default_factory=dict)
    # registry to look in; None: the one in the environment's settings
    store_url: str | None = None
    # "auto" takes a GPU when torch sees one
    device: str = "auto"
    # UNet rows in flight at once, and rows per forward
    max_rows: int = Field(64, ge=2)
    tile_rows: int = Field(24, ge=1)
    # on a CPU with one thread an image is bit for bit the same whatever runs beside it; every forward is then padded to
    # tile_rows, so choose that small (4 to 8)
    deterministic: bool = False
    # memory in 10^9 bytes that the rows of one forward may take; None: 90 % of a GPU's free memory, or half of the
    # machine's. Larger images run in smaller forwards, and those of which not one row fits are refused
    memory_gb: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if device not in ("auto", "cpu") and not device.startswith("cuda"):
            raise ValueError(f'got "{device}"; use "auto", "cpu" or "cuda" (or "cuda:N")')
        return device

    @model_validator(mode="after")
    def _one_source(self) -> "EngineArgs":
        if self.adapters and self.base is None:
            raise ValueError("adapters by path need the base they were tuned on: give base as well")
        if self.adapters and self.bundle is not None:
            raise ValueError("give either a bundle or a base with adapters, not both")
        if self.base is not None and not self.adapters and self.bundle is None:
            raise ValueError("a base needs adapters to blend (NAME=PATH), or the bundle that was made on it")
        return self

    @property
    def memory_bytes(self) -> int | None:
        """What `memory_gb` is for the engine."""
        return None if self.memory_gb is None else max(1, int(self.memory_gb * 1e9))

    @property
    def bundle_ref(self) -> str | None:
        """The bundle to open, or None for a base with adapters by path."""
        return None if self.adapters else self.bundle or DEFAULT_BUNDLE


class ServeArgs(EngineArgs):
    """Arguments of `workers.serving.build_app`; the `args` of an application in infra/serve.yaml."""

    # forecast seconds of work that may wait before requests are answered 429; one client may fill half of them
    max_queue_s: float = Field(20.0, gt=0, allow_inf_nan=False)
    # HTTP requests that are answered at once, waiting ones included
    max_concurrent: int = Field(MAX_CONCURRENT, ge=1)
    # file with the sha256 of bearer tokens (workers.tokens); None: whoever reaches the port may ask for images
    tokens: str | None = None
    # a bundle named by an alias is looked up again so often; 0: never
    follow_alias_s: float = Field(10.0, ge=0, allow_inf_nan=False)
    # replicas with an engine each; one per device
    num_replicas: int = Field(1, ge=1, le=64)
    # more than num_replicas: replicas are added while each has more than target_backlog_s of work waiting
    max_replicas: int | None = Field(None, ge=1, le=64)
    target_backlog_s: float = Field(5.0, gt=0, allow_inf_nan=False)
    # CPU threads of torch in each replica
    num_threads: int = Field(1, ge=1, le=256)
