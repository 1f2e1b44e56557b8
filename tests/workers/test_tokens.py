"""Token files: who is let in, what a wrong line is told, and that a token can be taken back at once."""

import hmac
import os

import pytest
from endpoints import token_file

from workers.tokens import TokenFileError, Tokens


def test_a_token_is_found_by_its_hash_and_nothing_else_is(tmp_path):
    path = token_file(tmp_path / "tokens", alice=("images", "secret-a"), ops=("images,admin", "secret-b"))
    tokens = Tokens(path)
    assert (tokens.find("secret-a").name, tokens.find("secret-a").scopes) == ("alice", {"images"})
    assert tokens.find("secret-b").scopes == {"images", "admin"}
    for wrong in ("", "secret-", "SECRET-A", "secret-a ", path.read_text().split()[-1]):
        assert tokens.find(wrong) is None
    assert "secret" not in path.read_text()


def test_every_entry_is_compared_in_constant_time(tmp_path, monkeypatch):
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    tokens = Tokens(token_file(tmp_path / "t", **{f"n{i}": ("images", f"s{i}") for i in range(5)}))
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert tokens.find("s0").name == "n0"
    assert len(compared) == 5, "the first match does not end it"


def test_a_token_is_taken_back_without_a_restart_and_a_broken_file_changes_nothing(tmp_path):
    path = token_file(tmp_path / "tokens", alice=("images", "a"), bob=("images", "b"))
    tokens = Tokens(path)
    token_file(path, alice=("images", "a"))
    os.utime(path, ns=(1, 1))
    assert tokens.find("b") is None
    path.write_text("half a line")
    os.utime(path, ns=(2, 2))
    assert tokens.find("a").name == "alice"
    path.unlink()
    assert tokens.find("a").name == "alice"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice images", "NAME SCOPES SHA256"),
        ("alice root " + "0" * 64, "images or admin"),
        ("alice images my-actual-token", "never write the token itself"),
        ("# nothing", "no entry"),
    ],
)
def test_a_wrong_file_is_told_with_its_remedy(line, words, tmp_path):
    path = tmp_path / "tokens"
    path.write_text(line + "\n")
    with pytest.raises(TokenFileError, match=words):
        Tokens(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenFileError, match="nowhere"):
        Tokens(tmp_path / "nowhere")
