"""Settings: which source wins, and that every mistake is found, named and explained at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from seamarkd import settings
from seamarkd.settings import Settings, SettingsError, load

CONF = Path(__file__).parents[2] / "conf/seamark.toml"


@pytest.fixture(autouse=True)
def _no_system_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "SYSTEM_FILE", tmp_path / "none.toml")


def problems(config: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load(config, environ or {}, {name.replace("__", "."): value for name, value in flags.items()})
    assert str(raised.value).splitlines() == raised.value.problems
    return raised.value.problems


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "seamark.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_holds_every_key_with_its_default() -> None:
    assert tomllib.loads(CONF.read_text()) == msgspec.to_builtins(Settings())
    assert load(CONF, {}, {}) == load(None, {}, {}) == Settings()


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, '[log]\nlevel = "error"\nformat = "json"\n[agent]\nslots = 3\nnode = "n"\n')
    environ = {"SEAMARK_LOG_LEVEL": "debug", "SEAMARK_AGENT_SLOTS": "4"}
    found = load(path, environ, {"agent.slots": 5, "agent.node": None})
    assert (found.agent.slots, found.log.level, found.log.format, found.agent.node) == (5, "debug", "json", "n")
    assert found.slots == 5
    assert found.coordinator == Settings().coordinator


def test_the_file_is_the_option_s_else_the_environment_s_else_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for name in ("option", "environment", "system"):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(f'agent.node = "{name}"')
    environ = {"SEAMARK_CONFIG": str(files["environment"])}
    monkeypatch.setattr(settings, "SYSTEM_FILE", files["system"])
    assert load(files["option"], environ, {}).node == "option"
    assert load(None, environ, {}).node == "environment"
    assert load(None, {"SEAMARK_CONFIG": ""}, {}).node == "system"


def test_all_problems_are_listed_at_once_with_their_place(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[security]\nkeys = "here"\n'
        '[lighthose]\naddress = "x"\n[coordinator]\nadress = "y"\n[agent]\nslots = true\n[log]\nlevel = 3\n',
    )
    found = problems(path, {"SEAMARK_SECURITY_INSECURE": "maybe"}, paths__run="here", log__formt="text")
    assert found == [
        f"{path}: lighthose: no such section; did you mean lighthouse?",
        f"{path}: coordinator.adress: no such key; did you mean address?",
        "--log-formt: log.formt: no such setting; did you mean log.format?",
        f"{path}: agent.slots: must be a whole number, not True",
        "--paths-run: paths.run: must be an absolute path, not here",
        f"{path}: log.level: must be text in quotes, not 3",
        f"{path}: security.keys: must be an absolute path, not here",
        "SEAMARK_SECURITY_INSECURE: security.insecure: must be true or false, not 'maybe'",
    ]


@pytest.mark.parametrize("text", ["", "soon", "-5", "nan", "1e3", "0.5", "4000"])
def test_seconds_that_are_none_or_too_few_are_refused(text: str) -> None:
    (problem,) = problems(None, {"SEAMARK_LIGHTHOUSE_AGENT_GRACE": text})
    assert problem.startswith("SEAMARK_LIGHTHOUSE_AGENT_GRACE: lighthouse.agent_grace: must be ")


def test_whole_seconds_are_seconds(tmp_path: Path) -> None:
    assert load(written(tmp_path, "[lighthouse]\nagent_grace = 30\n"), {}, {}).lighthouse.agent_grace == 30.0


def test_a_file_that_is_not_toml_or_not_there_is_named(tmp_path: Path) -> None:
    assert "line 2" in problems(written(tmp_path, "[log]\nlevel = \n"))[0]
    assert "No such file" in problems(tmp_path / "absent.toml")[0]
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    assert "is not TOML" in problems(tmp_path / "binary.toml")[0]
    assert problems(written(tmp_path, 'log = "info"'))[0].endswith("log: is a section, to be written [log]")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:1",
        "http://127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://:1",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:65536",
        "tcp://::1:5",
        "tcp://127.0.0.1;127.0.0.1:5",
        "tcp://127.0.0.1:٣",
        "ipc://relative",
        "ipc:///" + "x" * 107,
        "tcp://127.0.0.1:1\n",
    ],
)
def test_a_bad_address_is_refused(address: str) -> None:
    found = problems(environ={"SEAMARK_COORDINATOR_ADDRESS": address})
    assert len(found) == 1
    assert found[0].startswith("SEAMARK_COORDINATOR_ADDRESS: coordinator.address: ")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:29710", "tcp://localhost:29710"])
def test_two_equal_addresses_are_refused(address: str) -> None:
    found = problems(environ={"SEAMARK_COORDINATOR_ADDRESS": address})
    assert len(found) == 1
    assert "same address as lighthouse.address" in found[0]


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "10.0.0.1", "head", "[::]", "[2001:db8::1]", "128.0.0.1"])
def test_off_loopback_needs_keys_or_insecure(host: str) -> None:
    environ = {"SEAMARK_COORDINATOR_ADDRESS": f"tcp://{host}:5"}
    found = problems(environ=environ)
    assert len(found) == 1
    assert "seamark keys init" in found[0]
    assert "--insecure" in found[0]
    assert load(None, environ, {"security.insecure": True}).security.insecure
    assert load(None, environ | {"SEAMARK_SECURITY_KEYS": "/etc/seamark/keys"}, {}).security.insecure is False
    assert load(None, environ | {"SEAMARK_SECURITY_INSECURE": "true"}, {}).coordinator.address.endswith(":5")


def test_the_agent_s_host_off_loopback_needs_insecure_too() -> None:
    assert "agent.host" in problems(agent__host="node-a")[0]
    assert "agent.host" in problems(agent__host="")[0]
    assert load(None, {}, {"agent.host": "node-a", "security.insecure": True}).agent.host == "node-a"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]"])
def test_loopback_needs_nothing(host: str) -> None:
    load(None, {"SEAMARK_COORDINATOR_ADDRESS": f"tcp://{host}:5"}, {})


def test_variables_that_name_no_setting_are_left_alone() -> None:
    assert load(None, {"SEAMARK_ADDRESS": "x", "SEAMARK_LOG": "/x", "SEAMARK_LOG_LEVLE": "x"}, {}) == Settings()


def test_directories_are_made_private(tmp_path: Path) -> None:
    found = load(None, {}, {"paths.run": str(tmp_path / "run"), "paths.state": str(tmp_path / "state")})
    made = [found.run_directory, found.state_directory, found.log_directory]
    assert made == [tmp_path / "run", tmp_path / "state", tmp_path / "state/log"]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}
