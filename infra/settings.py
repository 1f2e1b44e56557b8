"""Where this machine keeps things: settings from the environment, and from nowhere else."""

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import SettingsError

ENV_PREFIX = "DIFFUSION_BLEND_"


def _user_dir(variable: str, fallback: str) -> Path:
    """A per-user directory by the XDG convention."""
    return Path(os.environ.get(variable) or Path.home() / fallback) / "diffusion-blend"


class Settings(BaseSettings):
    """One environment variable per field, named DIFFUSION_BLEND_ and the field in capitals."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    # Root of the registry: file:///directory or s3://bucket/prefix.
    store_url: str = Field(default_factory=lambda: f"file://{_user_dir('XDG_DATA_HOME', '.local/share')}")
    # Only for S3 servers other than AWS, for instance http://127.0.0.1:8333.
    s3_endpoint_url: str | None = None
    # Both unset: the usual AWS chain (environment, shared credentials file, instance role) is asked.
    s3_key: str | None = None
    s3_secret: SecretStr | None = None
    # Downloaded adapters, content-addressed; safe to delete at any time.
    cache_dir: Path = Field(default_factory=lambda: _user_dir("XDG_CACHE_HOME", ".cache"))
    # What of them is used least recently goes when there is more; those in use stay.
    cache_gb: float = Field(default=20.0, gt=0)
    # Where `serve` listens.
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    # Torch threads per process. More than one is slower on busy machines (OpenMP spins).
    num_threads: int = Field(default=1, ge=1)


def read_settings() -> Settings:
    """Settings of this process. Raises SettingsError, which names every variable that cannot be used."""
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{ENV_PREFIX}{str(problem['loc'][0]).upper()}={problem['input']!r}: {problem['msg']}"
            for problem in error.errors()
        )
        raise SettingsError(f"{problems}. Correct or unset the variable") from None
