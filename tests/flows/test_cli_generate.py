"""generate, serve and deploy from the command line: one image, one clear line per error, a server until Ctrl-C."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from flows.cli import main
from workers.images import read_facts


@pytest.fixture
def source(tiny_sd_dir, tiny_adapters):
    return ["--base", str(tiny_sd_dir), *(f"--adapter={name}={path}" for name, path in tiny_adapters.items())]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def generate(*arguments: str) -> int:
    return run("generate", "a red car", "--steps", "3", *arguments)


def test_an_image_is_written_with_its_facts(source, tmp_path, capsys):
    path = tmp_path / "car.png"
    weights = ("-w", "warm=0.25", "-w", "small=0.75")
    assert generate(*weights, "--kl-lambda", "0.5", "--method", "soup", "--seed", "4", *source, "-o", str(path)) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(path)
    assert "seed 4" in err
    assert "warm=0.25" in err
    assert re.search(r"[0-9.]+ s", err)
    assert "3/3" in err, "the bar reaches its end"
    facts = read_facts(path)
    assert facts.weights == {"warm": 0.25, "small": 0.75}
    assert (facts.kl_lambda, facts.method, facts.seed, facts.num_inference_steps) == (0.5, "soup", 4, 3)
    assert (facts.prompt, facts.width, facts.height) == ("a red car", 32, 32)


def test_the_same_command_makes_the_same_image_and_a_knob_another(source, tmp_path):
    def image(*arguments: str) -> np.ndarray:
        path = tmp_path / "image.png"
        assert generate("-w", "warm=1", "--seed", "4", *source, "-o", str(path), *arguments) == 0
        return np.asarray(Image.open(path))

    first = image()
    assert np.array_equal(first, image())
    for knob in (
        ("--seed", "5"),
        ("--kl-lambda", "0.2"),
        ("--guidance-scale", "1"),
        ("--negative-prompt", "blue"),
        ("--steps", "4"),
    ):
        assert not np.array_equal(first, image(*knob)), knob
    assert image("--size", "64x32").shape == (32, 64, 3)
    assert np.array_equal(first, image("-w", "small=0", "--normalize"))


def test_a_bundle_of_the_registry_serves_with_its_own_defaults(tiny_store_url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bundle = ("--bundle", "tiny@champion", "--store-url", tiny_store_url)
    assert run("generate", "a red car", "-w", "warm=1", "--seed", "7", *bundle) == 0
    assert run("generate", "a red car", "-w", "warm=1", "--seed", "7", *bundle) == 0
    assert capsys.readouterr().out.split() == ["blend-7.png", "blend-7-2.png"]
    facts = read_facts(tmp_path / "blend-7.png")
    assert (facts.num_inference_steps, facts.guidance_scale, facts.bundle) == (4, 2.0, "tiny@1")


def test_one_adapter_needs_no_weights_and_several_do(source, tiny_adapters, tmp_path, capsys):
    one = ["--base", source[1], f"--adapter=warm={tiny_adapters['warm']}"]
    assert generate(*one, "-o", str(tmp_path / "one.png")) == 0
    assert "warm=1" in capsys.readouterr().err
    assert generate(*source, "-o", str(tmp_path / "two.png")) == 2
    assert "-w warm=" in capsys.readouterr().err
    assert not (tmp_path / "two.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-w", "foo=1"], ["foo", "warm", "small"]),
        (["-w", "warm=0.5"], ["sum", "0.5"]),
        (["-w", "warm=nan"], ["weights.warm"]),
        (["-w", "warm=x"], ["warm=x", "number"]),
        (["-w", "warm"], ["NAME=VALUE"]),
        (["-w", "warm=1", "-w", "warm=0"], ["warm", "twice"]),
        (["-w", "warm=1", "--kl-lambda", "9"], ["kl_lambda", "9"]),
        (["-w", "warm=1", "--kl-lambda", "1.5", "--method", "ls"], ["kl_lambda", "ls"]),
        (["-w", "warm=1", "--method", "magic"], ["method", "magic", "mpa"]),
        (["-w", "warm=1", "--size", "33x33"], ["size", "multiple"]),
        (["-w", "warm=1", "--steps", "0"], ["num_inference_steps"]),
        (["-w", "warm=1", "-o", "image.jpg"], ["image.jpg", ".png"]),
        (["-w", "warm=1", "-o", "nowhere/image.png"], ["nowhere"]),
        (["-w", "warm=1", "--adapter", "third=/nowhere"], ["/nowhere"]),
        (["-w", "warm=1", "--device", "tpu"], ["device", "tpu"]),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(source, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate(*source, *arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading ")]
    assert line.startswith("Error: ")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "/nowhere", "--adapter", "a=b"], ["/nowhere"]),
        (["--adapter", "a=b"], ["base"]),
        (["--bundle", "x@1", "--adapter", "a=b", "--base", "c"], ["not both"]),
        (["--url", "http://127.0.0.1:1"], ["http://127.0.0.1:1", "diffusion-blend serve"]),
        (["--url", "nonsense"], ["nonsense"]),
        (["--url", "http://127.0.0.1:1", "--bundle", "tiny"], ["--url"]),
    ],
)
def test_a_source_that_is_not_there_is_named(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate("-w", "a=1", *arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("verb", ["generate", "serve", "deploy"])
def test_help_loads_no_framework(verb):
    code = (
        f"import sys; from flows.cli import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'prefect', 'diffusers')))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 0
    assert "--bundle" in found.stdout


def test_a_taken_port_is_said_before_anything_starts(source, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("serve", *source, "--port", str(taken.getsockname()[1])) == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_serve_answers_until_it_is_interrupted(source, tmp_path, capsys):
    command = [sys.executable, "-m", "flows.cli", "serve", *source, "--port", "0"]
    with (tmp_path / "errors").open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1)
    try:
        line = read_line(server, 300)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + (tmp_path / "errors").read_text()
        image = tmp_path / "served.png"
        assert generate("-w", "warm=1", "--seed", "3", "--url", found[0], "-o", str(image)) == 0
        local = tmp_path / "local.png"
        assert generate("-w", "warm=1", "--seed", "3", *source, "-o", str(local)) == 0
        assert image.read_bytes() == local.read_bytes()
        capsys.readouterr()
        assert generate("-w", "foo=1", "--url", found[0]) == 2
        assert "foo" in capsys.readouterr().err
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert "curl" in server.stdout.read()
    finally:
        if server.poll() is None:
            os.kill(server.pid, signal.SIGTERM)
            server.wait(60)
        server.stdout.close()


def read_line(process: subprocess.Popen, seconds: float) -> str:
    """The first line that the process prints, or nothing when it ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1.0)[0]:
            return process.stdout.readline()
    return ""
