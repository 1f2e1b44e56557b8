"""The ledger: what was scored is kept part by part, here and in the store, and never believed when damaged."""

from infra.errors import StoreError
from infra.storage import open_store
from workers.evaluation.ledger import Ledger

ROW = {"key": "a" * 64, "rows": 40, "colour@1": 0.5, "company": "0 1", "path_kl": float("nan"), "png": b"x"}


def test_rows_survive_the_process_and_empty_columns_stay_empty(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([ROW, {"key": "b" * 64, "company": "0 1", "rows": 80}])
    ledger.flush()
    again = Ledger(tmp_path)
    assert len(again) == 2
    assert again.get("a" * 64, "0 1") == {name: value for name, value in ROW.items() if name != "path_kl"}
    assert again.has("a" * 64, "0 1", ["colour@1", "png"])
    assert not again.has("a" * 64, "0 1", ["colour@2"])
    assert not again.has("a" * 64, "0 1 2", ["rows"])
    assert not again.has("b" * 64, "0 1", ["colour@1"])
    assert not again.has("c" * 64, "0 1", [])


def test_a_later_row_adds_to_what_its_key_has(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([ROW])
    ledger.flush()
    ledger.add([{"key": "a" * 64, "company": "0 1", "size@1": 2.0}])
    ledger.flush()
    for one in (ledger, Ledger(tmp_path)):
        assert one.has("a" * 64, "0 1", ["colour@1", "size@1"])


def test_what_is_not_flushed_is_not_written_and_flushing_twice_is_once(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([ROW])
    assert not list(tmp_path.iterdir())
    ledger.flush()
    ledger.flush()
    assert len(list(tmp_path.iterdir())) == 1


def test_long_runs_flush_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.evaluation.ledger.FLUSH_S", 0.0)
    monkeypatch.setattr("workers.evaluation.ledger.FLUSH_SHARE", 0.0)
    Ledger(tmp_path).add([ROW])
    assert len(Ledger(tmp_path)) == 1


def test_another_machine_finds_the_parts_in_the_store(tmp_path):
    store = open_store(f"file://{tmp_path / 'store'}")
    here = Ledger(tmp_path / "here", store, "evaluations/x/samples")
    here.add([ROW])
    here.flush()
    there = Ledger(tmp_path / "there", store, "evaluations/x/samples")
    assert there.has("a" * 64, "0 1", ["png"])
    # and what it adds comes back
    there.add([{"key": "b" * 64, "company": "0 1", "rows": 1}])
    there.flush()
    assert len(Ledger(tmp_path / "here", store, "evaluations/x/samples")) == 2


def test_an_outage_costs_nothing_once_the_store_is_back(tmp_path, monkeypatch):
    store = open_store(f"file://{tmp_path / 'store'}")
    ledger = Ledger(tmp_path / "here", store, "samples")
    monkeypatch.setattr("workers.evaluation.ledger.FLUSH_S", 0.0)
    monkeypatch.setattr("workers.evaluation.ledger.FLUSH_SHARE", 0.0)
    with monkeypatch.context() as outage:
        outage.setattr(store, "upload", lambda *_: (_ for _ in ()).throw(StoreError("down")))
        ledger.add([ROW])
    assert not store.list("samples")
    ledger.flush()
    assert len(Ledger(tmp_path / "there", store, "samples")) == 1


def test_a_part_cut_short_is_dropped(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([ROW])
    ledger.flush()
    [part] = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:-10])
    assert len(Ledger(tmp_path)) == 0
    assert not part.exists()


def test_a_sample_measured_among_other_seeds_is_another_row(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([ROW | {"diversity": 0.1}])
    ledger.add([ROW | {"company": "0 1 2 3", "diversity": 0.2}])
    ledger.flush()
    again = Ledger(tmp_path)
    assert [again.get("a" * 64, seeds)["diversity"] for seeds in ("0 1", "0 1 2 3")] == [0.1, 0.2]
