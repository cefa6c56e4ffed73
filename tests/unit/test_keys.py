"""Keys as files: what is taken, what is refused, and what a change of the directory changes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import zmq.utils.z85
from hypothesis import given
from hypothesis import strategies as st
from keyring import keyring, make

from seamark.protocol import zap
from seamark.protocol.keys import AllowList, Key, KeysError, client_key, own, read, revoke, write
from seamark.protocol.messages import Beat, StatusRequest
from seamark.protocol.sockets import new_pair

NOBODY = AllowList(Path("/nonexistent"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return keyring(tmp_path / "keys")


def test_a_key_is_written_private_and_read_back(directory: Path) -> None:
    key = make(directory, "node", "a")
    assert read(directory / "a.key") == key
    assert (directory / "a.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in directory.iterdir()) == ["a.key", "daemon.key"]


def test_a_key_is_never_overwritten(directory: Path) -> None:
    key = make(directory, "node", "a")
    public, secret = new_pair()
    assert not write(directory, Key("a", "node", public, secret, public))
    assert read(directory / "a.key") == key
    assert len(list(directory.iterdir())) == 2


def test_the_secret_half_is_in_no_text_of_a_key(directory: Path) -> None:
    key = make(directory, "node", "a")
    assert key.secret not in f"{key} {key!r}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no key"),
        ("name = ", "is no key"),
        ('name = "a"\nrole = "king"\n', "role"),
        ('name = "../a"\nrole = "node"\n', "name"),
        (b"\xff", "is no key"),
    ],
)
def test_what_is_no_key_is_named(directory: Path, text: str | bytes, said: str) -> None:
    path = directory / "a.key"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    with pytest.raises(KeysError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_files_and_directories_that_others_can_read_are_refused(directory: Path) -> None:
    make(directory, "node", "a")
    (directory / "a.key").chmod(0o640)
    with pytest.raises(KeysError, match=f"chmod 600 {directory}/a.key"):
        own(directory, "node", "a")
    (directory / "a.key").chmod(0o600)
    directory.chmod(0o755)
    with pytest.raises(KeysError, match=f"chmod 700 {directory}"):
        own(directory, "node", "a")
    directory.chmod(0o700)
    assert own(directory, "node", "a").name == "a"


def test_whose_key_is_mine(directory: Path) -> None:
    with pytest.raises(KeysError, match="there is no key of role operator: on the head, seamark keys add operator "):
        own(directory, "operator")
    make(directory, "operator", "alice")
    assert own(directory, "operator").name == "alice"
    make(directory, "operator", "bob")
    with pytest.raises(KeysError, match="which key of role operator\\? There are alice, bob"):
        own(directory, "operator")
    make(directory, "operator", "operator")
    assert own(directory, "operator").name == "operator"
    with pytest.raises(KeysError, match="there is no key b: on the head, seamark keys add b;"):
        own(directory, "node", "b")
    with pytest.raises(KeysError, match="has the role operator, not node"):
        own(directory, "node", "bob")
    with pytest.raises(KeysError, match="seamark keys init"):
        own(directory / "absent", "daemon")


def test_a_client_s_key_is_found_by_the_environment(directory: Path) -> None:
    assert client_key({}) is None
    with pytest.raises(KeysError, match="there is no key of role client"):
        client_key({"SEAMARK_SECURITY_KEYS": str(directory)})
    key = make(directory, "client", "client")
    assert client_key({"SEAMARK_SECURITY_KEYS": str(directory)}) == key


def test_added_and_revoked_keys_are_noticed(directory: Path) -> None:
    a = make(directory, "node", "a")
    allowed = AllowList(directory)
    assert allowed.find(a.public) == a
    assert not allowed.refresh()
    b = make(directory, "node", "b")
    assert allowed.find(b.public) is None
    assert not allowed.refresh()
    assert allowed.find(b.public) == b

    revoke(directory, "a")
    assert allowed.refresh() == ["a"]
    assert allowed.find(a.public) is None
    assert allowed.was_revoked(a.public) == "a"
    assert allowed.find(b.public) == b
    refused = allowed.refusal(a.public, Beat("a", "i", 1))
    assert refused is not None
    assert refused.reason == "revoked_key"
    assert "the key a is" in refused.sentence
    with pytest.raises(FileNotFoundError):
        revoke(directory, "a")


def test_a_name_that_is_given_again_gives_nothing_to_the_key_before(directory: Path) -> None:
    old = make(directory, "operator", "alice")
    allowed = AllowList(directory)
    revoke(directory, "alice")
    new = make(directory, "operator", "alice")
    assert allowed.refresh()
    assert allowed.find(old.public) is None
    assert allowed.refusal(new.public, StatusRequest(1)) is None
    assert own(directory, "operator") == new


def test_a_revoked_key_stays_revoked_where_its_file_comes_back(directory: Path) -> None:
    """As after a copy of an older directory over this one."""
    a = make(directory, "node", "a")
    kept = (directory / "a.key").read_bytes()
    revoke(directory, "a")
    (directory / "a.key").write_bytes(kept)
    (directory / "a.key").chmod(0o600)
    assert AllowList(directory).find(a.public) is None
    with pytest.raises(KeysError, match="was revoked"):
        own(directory, "node", "a")


def test_a_file_that_is_taken_away_counts_as_revoked(directory: Path) -> None:
    a = make(directory, "node", "a")
    allowed = AllowList(directory)
    (directory / "a.key").unlink()
    assert allowed.refresh()
    assert allowed.find(a.public) is None


def test_what_can_not_be_read_for_a_moment_throws_nobody_out(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = make(directory, "node", "a"), make(directory, "node", "b")
    allowed = AllowList(directory)
    half = directory / ".half"
    half.write_text('name = "a"\n')
    os.replace(half, directory / "a.key")
    with caplog.at_level(logging.WARNING):
        assert not allowed.refresh()
    assert "a.key" in caplog.text
    assert allowed.find(a.public) == a
    assert allowed.find(b.public) == b

    moved = directory.with_name("moved")
    directory.rename(moved)
    assert not allowed.refresh()
    assert allowed.find(b.public) == b
    shutil.copytree(moved, directory)
    assert not allowed.refresh()
    assert allowed.find(b.public) == b


def question(public: str, *, mechanism: bytes = b"CURVE") -> list[bytes]:
    key = zmq.utils.z85.decode(public)
    return [b"1.0", b"7", b"seamark", b"10.0.0.9", b"", mechanism, key]


def test_zap_lets_in_who_is_on_the_list(directory: Path) -> None:
    a = make(directory, "node", "a")
    allowed = AllowList(directory)
    assert zap.answer(question(a.public), allowed) == (
        [b"1.0", b"7", b"200", b"", a.public.encode(), b""],
        "",
        "",
        "",
    )


def test_zap_has_a_stranger_come_again_and_a_revoked_key_never(directory: Path) -> None:
    a = make(directory, "node", "a")
    allowed = AllowList(directory)
    stranger = zap.answer(question(new_pair()[0]), allowed)
    assert stranger.frames[2] == b"300"
    assert (stranger.reason, stranger.address) == ("unknown_key", "10.0.0.9")
    revoke(directory, "a")
    allowed.refresh()
    revoked = zap.answer(question(a.public), allowed)
    assert revoked.frames[2] == b"400"
    assert (revoked.reason, revoked.sentence) == ("revoked_key", "the key a was revoked")
    assert all(answer.frames[4] == b"" for answer in (stranger, revoked)), "who is refused is nobody"


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"1.0", b"7"],
        [b"1.0", b"7", b"seamark", b"10.0.0.9", b"", b"NULL"],
        [b"1.0", b"7", b"seamark", b"10.0.0.9", b"", b"PLAIN", b"user", b"password"],
        [b"1.0", b"7", b"seamark", b"10.0.0.9", b"", b"CURVE", b"short"],
        [b"2.0", b"7", b"seamark", b"10.0.0.9", b"", b"CURVE", b"x" * 32],
    ],
)
def test_zap_refuses_whatever_else(directory: Path, frames: list[bytes]) -> None:
    answer = zap.answer(frames, AllowList(directory))
    assert answer.frames[2] == b"400"
    assert answer.reason == "unknown_key"


@given(frames=st.lists(st.binary(max_size=64), max_size=9))
def test_zap_answers_whatever_it_is_asked(frames: list[bytes]) -> None:
    answer = zap.answer(frames, NOBODY)
    assert answer.frames[2] in (b"300", b"400")
    assert answer.reason == "unknown_key"


@given(content=st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_any_file_is_a_key_or_a_sentence(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:  # mode 0600
        file.write(content)
        file.flush()
        with contextlib.suppress(KeysError):
            read(Path(file.name))


@pytest.mark.parametrize("seed", range(20))
def test_a_key_as_text_is_zeromq_s(seed: int) -> None:
    raw = bytes((seed * 37 + at * 11) % 256 for at in range(32))
    assert zap.z85(raw) == zmq.utils.z85.encode(raw).decode()
