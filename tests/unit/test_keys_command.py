"""``seamark keys``: what it makes, what it never overwrites, what it says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seamark.protocol.keys import AllowList, read
from seamarkd.cli.keys import keys_group
from seamarkd.errors import StateError


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SEAMARK_AGENT_NODE", "head")
    monkeypatch.delenv("SEAMARK_SECURITY_KEYS", raising=False)
    return tmp_path / "keys"


def keys(directory: Path, *arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(keys_group, [*arguments, "--keys", str(directory)])
    assert done.exit_code == code, done.output
    return done


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_init_makes_a_suite_s_keys_once(directory: Path) -> None:
    first = keys(directory, "init").output
    assert first.count("made") == 4
    assert f'[security] keys = "{directory}"' in first
    made = contents(directory)
    assert sorted(made) == ["client.key", "daemon.key", "head.key", "operator.key"]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert len({read(directory / name).daemon for name in made}) == 1

    (directory / "client.key").unlink()
    again = keys(directory, "init").output
    assert (again.count("made"), again.count("kept")) == (1, 3)
    assert {name: text for name, text in contents(directory).items() if name != "client.key"} == {
        name: text for name, text in made.items() if name != "client.key"
    }


def test_by_default_they_are_in_the_state_directory(directory: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(keys_group, ["init"])
    assert done.exit_code == 0
    assert (tmp_path / "state/seamark/keys/daemon.key").exists()


def test_add_revoke_and_add_again(directory: Path) -> None:
    keys(directory, "init")
    keys(directory, "add", "gpu-07")
    first = read(directory / "gpu-07.key")
    assert first.role == "node"
    assert "kept" in keys(directory, "add", "gpu-07").output
    assert read(directory / "gpu-07.key") == first
    keys(directory, "revoke", "gpu-07")
    assert not (directory / "gpu-07.key").exists()
    keys(directory, "add", "gpu-07")
    second = read(directory / "gpu-07.key")
    assert second.public != first.public
    allowed = AllowList(directory)
    assert (allowed.find(first.public), allowed.find(second.public)) == (None, second)
    keys(directory, "revoke", "gpu-07")
    listed = keys(directory, "list").output
    assert first.public in listed
    assert second.public in listed
    assert listed.count("revoked") == 2
    assert first.secret not in listed
    assert second.secret not in listed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "../up"], "is no name for a key"),
        (["add", "a b"], "is no name for a key"),
        (["add", "-x"], "No such option"),
        (["add", "operator"], "there is a key operator of the role operator"),
        (["add", "x", "--role", "daemon"], "'daemon' is not one of"),
        (["revoke", "nobody"], "there are: client, daemon, head, operator"),
        (["revoke", "daemon"], "everybody knows the daemons by this key"),
    ],
)
def test_what_is_wrong_is_said(directory: Path, arguments: list[str], said: str) -> None:
    keys(directory, "init")
    before = contents(directory)
    assert said in keys(directory, *arguments, code=2).output  # seamark itself makes 64 of it
    assert contents(directory) == before


def test_a_directory_that_is_no_suite_s_or_open_to_others_is_refused(directory: Path) -> None:
    failed = CliRunner().invoke(keys_group, ["list", "--keys", str(directory)])
    assert isinstance(failed.exception, StateError)
    assert "make it with seamark keys init" in str(failed.exception)
    directory.mkdir(mode=0o755)
    for command in (["init"], ["add", "x"], ["list"]):
        failed = CliRunner().invoke(keys_group, [*command, "--keys", str(directory)])
        assert isinstance(failed.exception, StateError)
        assert f"chmod 700 {directory}" in str(failed.exception)
    directory.chmod(0o700)
    failed = CliRunner().invoke(keys_group, ["add", "x", "--keys", str(directory)])
    assert "seamark keys init, once" in str(failed.exception)
    assert list(directory.iterdir()) == []


def test_the_node_is_this_host_s_by_default(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAMARK_AGENT_NODE")
    keys(directory, "init")
    assert read(directory / f"{socket.gethostname()}.key").role == "node"


def test_help_teaches_a_set_up_of_two_hosts() -> None:
    text = CliRunner().invoke(keys_group, ["--help"]).output
    for word in ("seamark keys init", "seamark keys add gpu-07", "scp -p", "security", "Exit codes", "78"):
        assert word in text
    for command in ("init", "add", "list", "revoke"):
        assert "Example" in CliRunner().invoke(keys_group, [command, "--help"]).output
