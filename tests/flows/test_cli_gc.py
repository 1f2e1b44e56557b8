"""`diffusion-blend registry gc` as a user types it, on a directory and on a real S3 server."""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stored_blobs import blobs, needed, orphan

from flows.cli import main
from infra.local_store import LocalStore
from infra.manifests import AdapterFacts, BaseIdentity
from infra.registry import Registry
from infra.storage import Store, open_store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The environment's store: one adapter is published, and two blobs are left over."""
    env = {"DIFFUSION_BLEND_STORE_URL": f"file://{tmp_path}/store"}
    if request.param == "s3":
        env = request.getfixturevalue("s3_server").env(secrets.token_hex(8))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    store = open_store()
    publish(store, tmp_path / "adapter")
    for data in (b"cut", b"short"):
        orphan(store, data)
    return store


def publish(store: Store, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    save_file({"unet.block.to_q.lora_A.weight": torch.ones(2, 8)}, directory / "pytorch_lora_weights.safetensors")
    facts = AdapterFacts(
        base=BaseIdentity(source="sprites", sha256="ab" * 32),
        rank=2,
        alpha=2.0,
        target_modules=("to_q",),
        reward="colourfulness",
        reward_version="1",
        kl_weight=0.1,
        seed=0,
    )
    Registry(store).publish_adapter("colour", directory, facts)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Factory (words) -> exit code, output, errors."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["registry", "gc", *words])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_it_shows_orphans_with_their_bytes_and_removes_them_only_when_asked(run: Run, store: Store):
    kept = needed(store)
    left = blobs(store) - kept
    assert len(left) == 2
    code, output, _ = run()
    assert code == 0
    assert "0 orphans of 0 bytes; 2 blobs are needed, 2 are held or younger than 1d." in output
    assert blobs(store) == kept | left
    code, output, _ = run("--grace", "0s")
    rows = [line.replace("│", " ").split() for line in output.splitlines() if "would be removed" in line]
    assert {row[0] for row in rows} == left
    assert [row[3] for row in rows] == ["5", "3"], "the largest first"
    assert "2 orphans of 8 bytes" in output
    assert "Nothing was removed: repeat with --delete." in output
    assert blobs(store) == kept | left
    code, output, _ = run("--grace", "0s", "--delete")
    assert code == 0
    assert "Removed 2 of 2 orphans of 8 bytes" in output
    assert "8 bytes, and aborted 0 unfinished uploads" in output
    assert sum(digest in line and " removed " in line for line in output.splitlines() for digest in left) == 2
    assert blobs(store) == kept
    assert "Removed 0 of 0 orphans" in run("--delete", "--store", store.url)[1]


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_grace_is_the_age_that_is_spared(run: Run, store: Store):
    assert isinstance(store, LocalStore)
    left = blobs(store) - needed(store)
    hours_ago = time.time() - 3 * 3600
    for digest in left:
        os.utime(store.root / "blobs" / "sha256" / digest, (hours_ago, hours_ago))
    for grace, found in (("4h", 0), ("1d", 0), ("200m", 0), ("2h", 2), ("170m", 2), ("9000s", 2)):
        assert f" has {found} orphans" in run("--grace", grace)[1]


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_long_table_is_cut_and_says_so(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flows.cli_gc.MAX_ROWS", 1)
    output = run("--grace", "0s")[1]
    assert output.count("would be removed") == 1
    assert "and 1 smaller ones" in output


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("grace", ["soon", "1w", "-1d", "1", "", "1.5h", "100000d"])
def test_a_grace_that_is_not_understood_is_refused(run: Run, store: Store, grace: str):
    before = blobs(store)
    code, output, errors = run(f"--grace={grace}", "--delete")
    assert (code, output) == (2, "")
    assert f"grace '{grace}' is not understood: write a number and s, m, h or d" in errors
    assert blobs(store) == before
