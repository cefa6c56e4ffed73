"""What ``seamark run`` takes: names, and a file of operational parameters whose mistakes are told by file and field."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from seamark.protocol.messages import FailurePattern
from seamark.runtime_config import RuntimeConfig
from seamarkd.cli.main import cli
from seamarkd.cli.run import _runtime
from seamarkd.errors import StateError
from seamarkd.settings import SettingsError

TOML = """
oom_retries = 4

[[failure_patterns]]
regex = 'disk \\d+ is full$'
kind = "transient"
"""


def test_a_file_gives_parameters_and_patterns(tmp_path: Path) -> None:
    file = tmp_path / "retries.toml"
    file.write_text(TOML)
    runtime, patterns = _runtime(file)
    assert RuntimeConfig.from_dict(json.loads(runtime)) == RuntimeConfig(oom_retries=4)
    assert patterns == [FailurePattern(r"disk \d+ is full$", "transient")]
    file = tmp_path / "retries.json"
    file.write_text(json.dumps(RuntimeConfig(max_delay=5).to_dict()))
    assert json.loads(_runtime(file)[0])["max_delay"] == 5.0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("oom_retrys = 4", "did you mean oom_retries"),
        ("max_delay = -1\noom_retries = true", "max_delay: must be a number of seconds"),
        ("oom_retries = ", "Invalid value"),
        ("failure_patterns = 3", "must be a list of tables"),
        ("failure_patterns = 3\noom_retrys = 4", "did you mean oom_retries"),
        ("[[failure_patterns]]\nregex = '('\nkind = 'oom'", "is no regular expression"),
        ("[[failure_patterns]]\nregex = 'x'\nkind = 'zoom'", "is no kind of failure"),
        ("[[failure_patterns]]\nregexp = 'x'", "regexp"),
    ],
)
def test_what_can_not_be_used_is_named_with_its_file(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "retries.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        _runtime(file)
    assert why in str(caught.value)
    assert str(file) in str(caught.value)


MISTAKES = """
oom_retrys = 4

[[failure_patterns]]
regex = '('
kind = "zoom"

[[failure_patterns]]
regexp = "x"

[[failure_patterns]]
regex = "fine"
kind = "transient"

[[failure_patterns]]
regex = "y*"
kind = "transient"
"""


def test_of_several_mistakes_each_is_named_with_its_key_and_number(tmp_path: Path) -> None:
    file = tmp_path / "retries.toml"
    file.write_text(MISTAKES)
    with pytest.raises(SettingsError) as caught:
        _runtime(file)
    named = [line.removeprefix(f"--runtime-config {file}: ").split(": ")[0] for line in caught.value.problems]
    assert sorted(named) == [
        "'oom_retrys'",
        "failure_patterns[0].kind",
        "failure_patterns[0].regex",
        "failure_patterns[1]",
        "failure_patterns[3].regex",
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"retries.toml: No such file"):
        _runtime(tmp_path / "retries.toml")


@pytest.mark.parametrize("name", ["a" * 181, "é" * 91, "a" * 300])
def test_a_name_that_no_directory_or_rank_can_have_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Names of files end at 255 bytes, and a rank's has the job's in it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    script = tmp_path / "train.py"
    script.write_text("")
    for command in (["run", "--standalone", "--name", name, str(script)], ["run", "--name", name, str(script)]):
        with pytest.raises(click.UsageError, match="a name has 180 bytes at most"):
            cli.main(command, standalone_mode=False)
    for command in (["why", name], ["manifest", name], ["logs", name]):
        with pytest.raises(StateError, match="the name of a job has 180 bytes at most"):
            cli.main(command, standalone_mode=False)
