"""The command line itself: what every verb shares."""

import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError

from flows import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    streams = capsys.readouterr()
    return int(stopped.value.code or 0), streams.out, streams.err


def test_no_argument_shows_the_help(capsys):
    code, out, err = run(capsys)
    assert code == 0
    assert "Usage" in out
    assert err == ""


@pytest.mark.parametrize("arguments", [("nonsense",), ("--nonsense",)])
def test_bad_usage_is_one_line_and_exit_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "nonsense" in err


def test_validation_errors_name_the_field():
    class Knob(BaseModel):
        rank: int

    with pytest.raises(ValidationError) as caught:
        Knob.model_validate({"rank": "many"})
    line = cli.error_line(caught.value)
    assert line.startswith("rank: ")
    assert "\n" not in line


def test_start_up_loads_no_framework():
    heavy = "{'torch', 'ray', 'prefect', 'diffusers', 'transformers', 'pandas', 'fastapi'}"
    program = f"import sys, flows.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
