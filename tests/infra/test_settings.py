"""Settings come from the environment, and name the variable that cannot be used."""

from pathlib import Path

import pytest

from infra.errors import SettingsError
from infra.settings import ENV_PREFIX, Settings, read_settings
from infra.storage import open_store


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch):
    for field in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{field.upper()}", raising=False)


def test_defaults_lie_in_the_users_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = read_settings()
    assert settings.store_url == f"file://{tmp_path}/data/diffusion-blend"
    assert settings.cache_dir == tmp_path / "cache" / "diffusion-blend"
    assert settings.host == "127.0.0.1"
    open_store(settings=settings).create("x", b"1")
    assert (tmp_path / "data" / "diffusion-blend" / "x").read_bytes() == b"1"


def test_the_number_of_settings_stays_small():
    assert len(Settings.model_fields) <= 9


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("store_url", "s3://bucket/prefix", "s3://bucket/prefix"),
        ("s3_endpoint_url", "http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("s3_key", "me", "me"),
        ("cache_dir", "/somewhere", Path("/somewhere")),
        ("cache_gb", "0.5", 0.5),
        ("host", "0.0.0.0", "0.0.0.0"),
        ("port", "9000", 9000),
        ("num_threads", "4", 4),
    ],
)
def test_every_variable_is_read(monkeypatch: pytest.MonkeyPatch, field: str, text: str, value: object):
    monkeypatch.setenv(f"{ENV_PREFIX}{field.upper()}", text)
    assert getattr(read_settings(), field) == value


def test_the_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(f"{ENV_PREFIX}S3_SECRET", "do-not-show")
    settings = read_settings()
    assert settings.s3_secret is not None
    assert settings.s3_secret.get_secret_value() == "do-not-show"
    assert "do-not-show" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    ("field", "text"), [("port", "99999"), ("port", "http"), ("num_threads", "0"), ("cache_gb", "0")]
)
def test_a_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, field: str, text: str):
    monkeypatch.setenv(f"{ENV_PREFIX}{field.upper()}", text)
    with pytest.raises(SettingsError, match=f"DIFFUSION_BLEND_{field.upper()}='{text}'.*Correct or unset"):
        read_settings()
