"""The bar appears when something moves, tells how much of how much, and only then."""

import pytest

from flows.transfer_bar import transfer_bar


def test_bytes_are_shown_once_something_moves(capsys: pytest.CaptureFixture[str]):
    with transfer_bar("Fetching") as moved:
        assert capsys.readouterr().err == ""
        moved(1 << 20, 4 << 20)
        moved(3 << 20, 4 << 20)
    shown = capsys.readouterr().err
    assert "Fetching" in shown
    assert "/4.00M" in shown
    with transfer_bar("Fetching"):
        pass
    assert capsys.readouterr().err == ""
