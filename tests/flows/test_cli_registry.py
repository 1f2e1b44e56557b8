"""`diffusion-blend registry ...` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.manifests import WEIGHTS_FILE
from infra.registry import Registry
from infra.storage import open_store

Run = Callable[..., tuple[int, str, str]]


def test_list_shows_names_versions_and_aliases(run: Run, tiny_adapters: dict[str, str]):
    code, output, _ = run("list")
    assert code == 0
    row = next(line for line in output.splitlines() if "tiny " in line)
    assert "bundle" in row
    assert "champion -> 1" in row
    assert " 2 " in row
    assert all(any(name in line and "adapter" in line for line in output.splitlines()) for name in tiny_adapters)


def test_list_of_an_empty_store_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import blend.sprites

    monkeypatch.setattr(blend.sprites, "REGISTRY_PATH", tmp_path / "none", raising=False)
    assert "Nothing is stored" in run("list", "--store", f"file://{tmp_path}/empty")[1]


def test_show_prints_the_manifest_and_the_history(run: Run, store_url: str, tiny_adapters: dict[str, str]):
    registry = Registry(open_store(store_url))
    shown = json.loads(run("show", "tiny@champion")[1])
    assert shown["manifest"] == registry.get("tiny@champion").model_dump(mode="json")
    assert [entry["version"] for entry in shown["aliases"]["champion"]] == [1]
    adapter = next(iter(tiny_adapters))
    shown = json.loads(run("show", adapter, "--adapter")[1])
    assert shown["manifest"]["digest"] == registry.get_adapter(adapter).digest


def test_promote_and_rollback_move_the_alias(run: Run, store_url: str):
    registry = Registry(open_store(store_url))
    code, output, _ = run("promote", "tiny@2", "--reason", "looks better", "--actor", "me", "--force")
    assert (code, output) == (0, "tiny@champion is version 2 (move 2 by me: looks better; forced)\n")
    assert registry.get("tiny@champion").version == 2
    code, output, _ = run("rollback", "tiny", "--reason", "was not")
    assert code == 0
    assert "tiny@champion is version 1 (move 3 by" in output
    assert registry.get("tiny@champion").version == 1
    assert run("promote", "tiny", "--alias", "candidate", "--reason", "newest")[0] == 0
    assert registry.get("tiny@candidate").version == 2


def test_doctor_reports_a_sound_store_and_a_damaged_one(run: Run, store_url: str, tiny_adapters: dict[str, str]):
    code, output, _ = run("doctor")
    assert (code, output) == (0, f"{store_url} is sound.\n")
    record = Registry(open_store(store_url)).get_adapter(next(iter(tiny_adapters)))
    weights = next(file for file in record.files if file.path == WEIGHTS_FILE)
    Path(store_url.removeprefix("file://"), "blobs", "sha256", weights.sha256).write_bytes(b"damaged")
    code, output, errors = run("doctor")
    assert code == 2
    assert f"{WEIGHTS_FILE} of adapter {record.ref}" in output
    assert "1 problem(s)" in errors


def test_export_writes_lora_directories_that_diffusers_loads(
    run: Run, tmp_path: Path, tiny_sd_dir: Path, tiny_adapters: dict[str, str]
):
    from diffusers import StableDiffusionPipeline

    assert run("export", "tiny@1", str(tmp_path / "out"))[0] == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_dir, safety_checker=None)
    for name in tiny_adapters:
        pipeline.load_lora_weights(tmp_path / "out" / name, weight_name=WEIGHTS_FILE, adapter_name=name)
    assert sorted(pipeline.get_list_adapters()["unet"]) == sorted(tiny_adapters)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "tinny"], "no bundle 'tinny'"),
        (["show", "Tiny"], "bundle name 'Tiny' is not allowed"),
        (["promote", "tiny@9", "--reason", "x"], "versions are 1 to 2"),
        (["promote", "tiny@1"], "--reason"),
        (["rollback", "tiny", "--reason", "x"], "no version before 1"),
        (["export", "tiny", "."], "is not an empty directory"),
        (["list", "--store", "ftp://somewhere"], "store URL 'ftp://somewhere' is not understood"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(run: Run, words: list[str], message: str):
    code, output, errors = run(*words)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert output == ""


def test_bundle_joins_adapters_under_their_names_or_new_ones(run: Run, store_url: str, tiny_adapters: dict[str, str]):
    one, other = sorted(tiny_adapters)[:2]
    words = ("bundle", "mine", one, f"second={other}@1", "--guidance-scale", "2", "--steps", "7")
    assert run(*words) == (0, "Published mine@1\n", "")
    record = Registry(open_store(store_url)).get_bundle("mine@1")
    assert set(record.adapters) == {one, "second"}
    assert (record.defaults.guidance_scale, record.defaults.num_inference_steps) == (2, 7)
    assert run(*words)[1] == "Published mine@1\n", "the same adapters again are the version that is there"


def test_bundle_refuses_what_is_not_there_and_names_given_twice(run: Run, tiny_adapters: dict[str, str]):
    name = min(tiny_adapters)
    settings = ("--guidance-scale", "2", "--steps", "7")
    code, _, errors = run("bundle", "mine", "nowhere", *settings)
    assert (code, "nowhere" in errors) == (2, True)
    code, _, errors = run("bundle", "mine", name, f"{name}={name}@1", *settings)
    assert (code, "twice" in errors) == (2, True)
