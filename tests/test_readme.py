"""The README is true: its commands exist, their options are known, what can be run at once is run."""

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from blend.finetune.config import TrainConfig
from flows import cli
from infra.settings import ENV_PREFIX, Settings
from workers.client import TOKEN_VARIABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPT = Path(sys.executable).parent / "diffusion-blend"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """Lines of the bash blocks that begin with a program, and its mentions in code spans."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    spans = re.findall(rf"`({program} [^`\n]+)`", README)
    return sorted({line for line in lines if line.startswith(f"{program} ")} | set(spans))


def test_the_first_command_stands_early():
    assert "make demo" in README.splitlines()[:25]


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command):
    done = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("diffusion-blend"))
def test_commands_and_their_options_exist(command, capsys):
    words = shlex.split(command)[1:]
    verb = words[:2] if words[0] == "registry" else words[:1]
    if verb == ["VERB"]:
        return
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is not in the help of {verb}"


def test_every_verb_is_documented():
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    verbs |= {group.name or group.typer_instance.info.name for group in cli.app.registered_groups}
    documented = set(re.findall(r"`diffusion-blend ([a-z]+)", README))
    assert verbs == documented


def test_every_registry_verb_is_documented():
    [registry] = [group.typer_instance for group in cli.app.registered_groups]
    verbs = {command.name or command.callback.__name__.strip("_") for command in registry.registered_commands}
    [row] = [line for line in README.splitlines() if line.startswith("| `diffusion-blend registry list`")]
    assert verbs == {"list", *re.findall(r"`([a-z]+)`", row)}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b((?:infra|blend|tests|flows|workers)/[\w./*-]*)", README))))
def test_paths_exist(path):
    assert list(ROOT.glob(path.rstrip("./"))), path


@pytest.mark.parametrize("variable", sorted(set(re.findall(rf"{ENV_PREFIX}([A-Z0-9_]+)", README))))
def test_environment_variables_are_settings(variable):
    assert variable.lower() in Settings.model_fields or f"{ENV_PREFIX}{variable}" == TOKEN_VARIABLE


@pytest.mark.parametrize("block", blocks("toml"))
def test_run_files_are_valid(block):
    assert TrainConfig.parse(tomllib.loads(block))


def own_environment(directory: Path) -> dict[str, str]:
    places = {"STORE_URL": f"file://{directory / 'store'}", "CACHE_DIR": str(directory / "cache")}
    return {**os.environ, **{f"{ENV_PREFIX}{name}": value for name, value in places.items()}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands("diffusion-blend") if "generate" in line and "-o" in line]
)
def test_generate_makes_the_image(command, tmp_path):
    words = shlex.split(command)
    done = subprocess.run(
        [str(SCRIPT), *words[1:]],
        cwd=tmp_path,
        env=own_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / words[words.index("-o") + 1]).size == (64, 64)


@pytest.mark.parametrize("block", [block for block in blocks("python") if "openai" not in block])
def test_python_draws_the_picture_that_is_shown(block, tmp_path, monkeypatch):
    assert len(block.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    for name, value in own_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    exec(compile(block, "README.md", "exec"), {})
    [drawn] = tmp_path.glob("*.png")
    [shown] = [ROOT / path for path in re.findall(r"!\[.*\]\((.*)\)", README) if Path(path).name == drawn.name]
    assert shown.stat().st_size < 200_000
    with Image.open(drawn) as mine, Image.open(shown) as theirs:
        assert mine.size == theirs.size
        # of 255; other machines round otherwise
        assert max(ImageStat.Stat(ImageChops.difference(mine, theirs)).mean) < 2


@pytest.mark.slow
@pytest.mark.long
def test_serve_answers_what_the_examples_ask(tmp_path):
    [curl] = [block for block in blocks("bash") if block.startswith("curl")]
    [python] = [block for block in blocks("python") if "openai" in block]
    assert len(python.splitlines()) <= 20
    generate = next(line for line in commands("diffusion-blend") if "--url" in line)
    words = shlex.split(curl)
    url, body = next(word for word in words if word.startswith("http")), json.loads(words[words.index("-d") + 1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [str(SCRIPT), "serve", "--port", str(port)],
            cwd=tmp_path,
            env=own_environment(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        while server.poll() is None and "is ready at" not in (tmp_path / "serve.log").read_text():
            time.sleep(0.5)
        assert server.poll() is None, (tmp_path / "serve.log").read_text()
        answer = httpx.post(url.replace(":8000", f":{port}"), json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["seed"] == body["seed"]
        environment = {**own_environment(tmp_path), "BLEND_URL": f"http://127.0.0.1:{port}"}
        shell = {
            "cwd": tmp_path,
            "env": environment,
            "capture_output": True,
            "text": True,
            "timeout": 120,
            "check": True,
        }
        told = subprocess.run([sys.executable, "-c", python], **shell).stdout
        assert told.splitlines()[-1] == "step 20 of 20"
        made = (tmp_path / "car.png").read_bytes()
        assert base64.b64encode(made).decode() == answer.json()["data"][0]["b64_json"]
        words = [word.replace(":8000", f":{port}") for word in shlex.split(generate)[1:]]
        drawn = subprocess.run([str(SCRIPT), *words], **shell).stdout.strip()
        assert Image.open(tmp_path / drawn).size == (64, 64)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
