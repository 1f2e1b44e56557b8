"""The flow and the command on a tiny bundle: results in the store, artifacts in Prefect, nothing done twice."""

import asyncio
import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from tiny_evaluation import RUN

from flows.cli import main
from flows.evaluate_blend import evaluate_blend
from infra.errors import IntegrityError
from infra.storage import open_store
from workers.evaluation import EvaluationError

pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def answer(prefect, rivals_store_url, tmp_path_factory):
    return evaluate_blend(RUN, store_url=rivals_store_url, output_dir=str(tmp_path_factory.mktemp("flow")))


def stored(answer, rivals_store_url):
    store = open_store(rivals_store_url)
    return [path for path in store.list("evaluations") if answer["digest"] in path]


def artifacts():
    async def read():
        async with get_client() as client:
            return await client.read_artifacts()

    return {artifact.key: artifact for artifact in asyncio.run(read())}


@pytest.mark.slow
def test_files_lie_under_the_bundle_and_the_digest(answer, rivals_store_url):
    names = {Path(path).name for path in stored(answer, rivals_store_url)}
    assert names >= {"samples.parquet", "summary.csv", "pareto.png", "grid.png", "report.html", "summary.json"}
    assert answer["location"].endswith(answer["digest"])
    assert Path(answer["report"]).read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_artifacts_show_progress_tables_headline_and_link(answer):
    found = artifacts()
    assert found["evaluate-rivals-progress"].data == 100.0
    assert "rivals@1" in found["evaluate-rivals-report"].data
    cells = json.loads(found["evaluate-rivals-cells"].data)
    assert [cell["method"] for cell in cells] == ["base", "adapter", "adapter", "mpa"]
    assert json.loads(found["evaluate-rivals-hypervolumes"].data)
    assert "report.html" in found["evaluate-rivals-link"].data


@pytest.mark.slow
def test_the_same_evaluation_is_fetched_and_not_done_again(answer, rivals_store_url, tmp_path, monkeypatch):
    monkeypatch.setattr("workers.evaluation.evaluate", lambda *_: pytest.fail("generated again"))
    again = evaluate_blend(RUN, store_url=rivals_store_url, output_dir=str(tmp_path))
    assert again["location"] == answer["location"]
    assert Path(again["report"]).read_bytes() == Path(answer["report"]).read_bytes()


@pytest.mark.slow
def test_a_bad_run_fails_before_work(prefect, rivals_store_url, tmp_path):
    with pytest.raises(EvaluationError, match="unknown method 'best'"):
        evaluate_blend({**RUN, "methods": ["best"]}, store_url=rivals_store_url, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in RUN.items()))
    return path


def test_the_command_writes_the_report_and_says_where(run_file, rivals_store_url, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["evaluate", str(run_file), "--output", str(out), "--no-store", "--store-url", rivals_store_url]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert str(out / "report.html") in output
    assert "Not compared: no earlier evaluation of a champion of rivals asked the same." in output
    assert (out / "report.html").is_file()
    assert json.loads((out / "comparison.json").read_text())["verdict"] == "not compared"

    def damaged(*_):
        raise IntegrityError("summary.json is damaged")

    monkeypatch.setattr("workers.evaluation.comparison.compare_stored", damaged)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "Not compared with the champion: summary.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--bundle", "nowhere@1"], "nowhere"),
        (["--store-url", "ftp://host/path"], "ftp://host/path"),
    ],
)
def test_the_command_refuses_in_one_line(run_file, rivals_store_url, capsys, change, words):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run_file), "--store-url", rivals_store_url, *change])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error
