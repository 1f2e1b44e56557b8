"""Evaluations come back as the tables they were, from a directory, the store and the package; or one clear error."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest

import workers.evaluation
from infra.errors import UnknownRecordError
from infra.storage import open_store
from workers.evaluation import EvaluateConfig, EvaluationError, evaluate, load_evaluation
from workers.evaluation.analysis import VERDICTS, analyse
from workers.evaluation.files import files_in, write_files
from workers.evaluation.grid import ORACLE
from workers.evaluation.reading import Table
from workers.evaluation.storing import prepare, upload

pytestmark = pytest.mark.usefixtures("coarse_figures")

README = Path(workers.evaluation.__file__).with_name("README.md").read_text()
CONFIG = EvaluateConfig(
    bundle="rivals@1",
    prompts=("A red colored car.", "A blue colored cup."),
    seeds=(3, 5),
    methods=("mpa", "soup"),
    pair_weights=(),
    num_workers=0,
    resamples=100,
    picture_prompts=1,
)


@pytest.fixture(scope="module")
def planned(rivals_store_url):
    return prepare(CONFIG, rivals_store_url)


@pytest.fixture(scope="module")
def result(planned, tmp_path_factory):
    return evaluate(planned, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def directory(result, tmp_path):
    for file in result.files:
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def store_url(rivals_store_url, tmp_path):
    """A store of its own with the bundle, without evaluations."""
    shutil.copytree(rivals_store_url.removeprefix("file://"), tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "evaluations", ignore_errors=True)
    return f"file://{tmp_path / 'store'}"


def put(planned, directory, store_url, *, digest: str, date: str):
    """Store the evaluation as another one of this digest and date."""
    summary = json.loads((directory / "summary.json").read_text())
    summary["facts"] |= {"digest": digest, "date": date}
    (directory / "summary.json").write_text(json.dumps(summary))
    store = open_store(store_url)
    for file in files_in(directory):
        store.create(f"evaluations/{planned.job.bundle.record.digest}/{digest}/{file.name}", file.read_bytes())


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("given", [Path, str])
def test_a_directory_gives_what_the_evaluation_returned(result, planned, directory, given):
    pd.testing.assert_frame_equal(load_evaluation(given(directory), table="samples"), result.frame)
    summary = load_evaluation(given(directory))
    pd.testing.assert_frame_equal(summary, result.summary)
    assert summary.attrs["digest"] == planned.digest
    assert summary.attrs["prompts"] == list(CONFIG.prompts)
    assert load_evaluation(directory, planned.digest[:8]).equals(summary)
    assert list(load_evaluation(directory, table="methods")["method"]) == ["mpa", "soup"]
    assert {"base", "adapters alone", "mpa"} <= set(load_evaluation(directory, table="hypervolumes")["front"])


def test_the_summary_is_the_same_without_its_parquet_file(result, directory):
    (directory / "summary.parquet").unlink()
    pd.testing.assert_frame_equal(load_evaluation(directory), result.summary, check_exact=False, rtol=1e-12)


def test_oracles_and_rivals_come_back_as_they_were_found(result, planned, tmp_path):
    """The samples of soup stand in for those of an oracle."""
    job = planned.job
    cells = [replace(cell, method=ORACLE) if cell.method == "soup" else cell for cell in job.cells]
    frame = result.frame.replace({"method": {"soup": ORACLE}})
    analysis = analyse(frame, cells, job.basis, job.objectives, job.rewards, planned.config)
    pixels = np.zeros((8, 8, 3), np.uint8)
    write_files(tmp_path, planned.config, result.facts, frame, analysis, {(0, 0): pixels}, [0])
    for table, expected in (("oracles", analysis.oracles), ("rivals", analysis.rivals)):
        assert list(expected["method"]) == ["mpa", ORACLE]
        read = load_evaluation(tmp_path, table=table)
        pd.testing.assert_frame_equal(read, expected, check_exact=False, rtol=1e-12)
        assert read.attrs["digest"] == planned.digest


@pytest.mark.parametrize(("table", "column"), [("oracles", "w_warm"), ("rivals", "difference_low")])
def test_evaluations_from_before_there_were_oracles_have_none(directory, table, column):
    new = load_evaluation(directory, table=table)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary.pop(table) == []
    (directory / "summary.json").write_text(json.dumps(summary))
    old = load_evaluation(directory, table=table)
    assert len(new) == len(old) == 0
    assert list(new) == list(old)
    assert column in old


def test_a_store_gives_the_same_tables(result, planned, directory, store_url):
    upload(planned, files_in(directory), open_store(store_url))
    for table, expected in (("samples", result.frame), ("summary", result.summary)):
        pd.testing.assert_frame_equal(load_evaluation("rivals@1", table=table, store_url=store_url), expected)


def test_the_newest_is_read_unless_a_digest_is_given(planned, directory, store_url):
    with pytest.raises(EvaluationError, match=r"rivals@1 was never evaluated: run `diffusion-blend evaluate RUN"):
        load_evaluation("rivals@1", store_url=store_url)
    for digest, date in (("aa01", "2026-01-02"), ("aa02", "2026-01-03"), ("bb03", "2026-01-01")):
        put(planned, directory, store_url, digest=digest, date=date)

    def read(digest=None):
        return load_evaluation("rivals@1", digest, store_url=store_url).attrs["digest"]

    assert (read(), read("b"), read("aa01")) == ("aa02", "bb03", "aa01")
    with pytest.raises(EvaluationError, match="no evaluation 'cc'; it has: aa02, aa01, bb03"):
        read("cc")
    with pytest.raises(EvaluationError, match="'aa' of rivals@1 is ambiguous"):
        read("aa")


def test_the_package_brings_one_without_samples(tmp_path):
    url = f"file://{tmp_path}"
    summary = load_evaluation("sprites@champion", store_url=url)
    assert {"share", "w_brightness", "brightness_gain"} <= set(summary)
    assert summary["path_kl"].dtype == float
    with pytest.raises(EvaluationError, match=r"of sprites@champion came without samples\.parquet"):
        load_evaluation("sprites@champion", table="samples", store_url=url)


def test_ones_own_evaluation_comes_before_that_of_the_package(tmp_path):
    url = f"file://{tmp_path}"
    shipped = load_evaluation(store_url=url).attrs
    source = next((Path(workers.__file__).parents[1] / "blend/sprites/registry").glob("evaluations/*/*"))
    own = tmp_path / "evaluations" / shipped["bundle_digest"] / "own"
    shutil.copytree(source, own)
    edit(own / "summary.json", facts={**shipped, "digest": "own"})
    assert load_evaluation(store_url=url).attrs["digest"] == "own"
    assert load_evaluation(digest=shipped["digest"], store_url=url).attrs["digest"] == shipped["digest"]


def test_what_cannot_be_read_is_one_clear_error(directory, tmp_path, rivals_store_url):
    with pytest.raises(EvaluationError, match="table 'images' is none of summary, samples"):
        load_evaluation(directory, table="images")
    with pytest.raises(UnknownRecordError, match="nowhere"):
        load_evaluation("nowhere@1", store_url=rivals_store_url)
    with pytest.raises(EvaluationError, match=r"gone holds no finished evaluation: summary\.json"):
        load_evaluation(tmp_path / "gone")
    with pytest.raises(EvaluationError, match=r"is evaluation .*, not 'ff'"):
        load_evaluation(directory, "ff")
    (directory / "samples.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(EvaluationError, match=r"samples\.parquet of .* is damaged"):
        load_evaluation(directory, table="samples")
    edit(directory / "summary.json", schema_version=2)
    with pytest.raises(EvaluationError, match="schema version 2, this software reads 1: update it"):
        load_evaluation(directory)
    (directory / "summary.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"summary\.json of .* is damaged: evaluate again"):
        load_evaluation(directory)


def documented(table: str) -> set[str]:
    """Names in the second column of the README's rows whose first column names the table."""
    found: set[str] = set()
    for line in README.splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and table in cells[0]:
            found |= set(cells[1])
    return found


@pytest.mark.parametrize("table", get_args(Table))
def test_every_column_is_documented_and_no_other(directory, table):
    names = {"REWARD": ("colourfulness", "compressibility"), "ADAPTER": ("warm", "small")}
    expected: set[str] = set()
    for column in documented(table):
        [stands] = [word for word in names if word in column] or [None]
        expected |= {column.replace(stands, name) for name in names[stands]} if stands else {column}
    if table in ("summary", "samples", "rivals"):
        judged = set(VERDICTS) if table != "rivals" else {"binding_right"}
        assert judged <= expected
        expected -= judged
    assert set(load_evaluation(directory, table=table).columns) == expected


def test_the_example_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_BLEND_STORE_URL", f"file://{tmp_path}")
    [example] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "share" in capsys.readouterr().out
