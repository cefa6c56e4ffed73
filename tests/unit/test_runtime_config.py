"""RuntimeConfig: what is refused, in which words; that dictionaries lose nothing."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seamark
from seamark import runtime_config
from seamark.runtime_config import FIELDS, LIMITS, RuntimeConfig

FLOATS = [name for name, field in FIELDS.items() if field.type is float]
INTS = [name for name, field in FIELDS.items() if field.type is int]
BOOLS = [name for name, field in FIELDS.items() if field.type is bool]

configs = st.builds(
    RuntimeConfig,
    **{name: st.floats(LIMITS[name][1], LIMITS[name][2]) for name in FLOATS},
    **{name: st.integers(int(LIMITS[name][1]), int(LIMITS[name][2])) for name in INTS},
    **{name: st.booleans() for name in BOOLS},
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert RuntimeConfig().to_dict() == {
        "schema_version": 1,
        "checkpoint_interval": 300.0,
        "attempt_timeout": 3600.0,
        "oom_retries": 3,
        "transient_retries": 3,
        "timeout_retries": 3,
        "unknown_retries": 3,
        "poison_attempts": 2,
        "poison_delay": 1.0,
        "max_delay": 60.0,
        "spot_poll_interval": 60.0,
        "monitor_interval": 5.0,
        "no_progress_cycles": 3,
        "elastic_redistribution": True,
        "min_batch_size_scale": 0.125,
    }


def test_every_number_has_limits() -> None:
    assert set(LIMITS) == set(FLOATS + INTS)


@given(configs)
def test_dictionaries_json_and_the_wire_lose_nothing(config: RuntimeConfig) -> None:
    assert RuntimeConfig.from_dict(config.to_dict()) == config
    assert RuntimeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=RuntimeConfig) == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert {type(getattr(config, name)) for name in FLOATS} == {float}


def test_neither_direction_changes_anything() -> None:
    config = RuntimeConfig(oom_retries=5)
    values = config.to_dict()
    before = dict(values)
    RuntimeConfig.from_dict(values)
    assert values == before
    values["oom_retries"] = 9
    assert config.oom_retries == 5
    with pytest.raises(AttributeError):
        config.oom_retries = 6  # type: ignore[misc]
    assert len({RuntimeConfig(), RuntimeConfig(), config}) == 2


def test_whole_seconds_are_seconds() -> None:
    config = RuntimeConfig(attempt_timeout=60)
    assert repr(config.attempt_timeout) == "60.0"
    assert config == RuntimeConfig(attempt_timeout=60.0)


# Python refuses to write a number of so many digits.
HUGE = 10**5_000
NUMBERS = [True, False, None, "3", [3], math.nan, math.inf, -math.inf, -1, -1e-9, HUGE, 1e300, 3j]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: "huge" if value is HUGE else str(value))
@pytest.mark.parametrize("name", FLOATS + INTS)
def test_what_is_no_number_within_the_limits_is_refused(name: str, value: Any) -> None:
    noun, least, most = LIMITS[name]
    allowed = f"{name}: must be {noun} from {least:g} to {most:.10g}, not "
    for made in (lambda: RuntimeConfig(**{name: value}), lambda: RuntimeConfig.from_dict({name: value})):
        with pytest.raises(ValueError, match=name) as raised:
            made()
        (line,) = str(raised.value).splitlines()
        assert line.startswith(allowed)
        assert len(line) < 200


@pytest.mark.parametrize("name", INTS)
def test_a_fraction_is_no_number_of_retries(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be a whole number"):
        RuntimeConfig(**{name: 2.0})


@pytest.mark.parametrize("name", FLOATS + INTS)
def test_the_limits_themselves_are_allowed_and_what_is_beyond_is_not(name: str) -> None:
    number = float if name in FLOATS else int
    for limit, beyond in zip(LIMITS[name][1:], (-math.inf, math.inf), strict=True):
        assert getattr(RuntimeConfig(**{name: number(limit)}), name) == limit
        with pytest.raises(ValueError, match=name):
            RuntimeConfig(
                **{name: math.nextafter(limit, beyond) if number is float else limit + (1 if beyond > 0 else -1)}
            )


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_switch_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match="elastic_redistribution: must be True or False, not "):
        RuntimeConfig(elastic_redistribution=value)


def test_all_mistakes_are_said_at_once_and_the_nearest_name_with_them() -> None:
    with pytest.raises(ValueError, match="oom_retrys") as raised:
        RuntimeConfig.from_dict({"oom_retrys": 3, "max_delay": math.nan, "colour": "red", 7: 1, "oom_retries": True})  # type: ignore[dict-item]
    lines = str(raised.value).splitlines()
    assert lines[0] == "'oom_retrys': no such field; did you mean oom_retries?"
    assert lines[1] == "max_delay: must be a number of seconds from 0 to 60, not nan"
    assert lines[2].startswith("'colour': no such field; there are checkpoint_interval, attempt_timeout, ")
    assert lines[3].startswith("7: no such field; ")
    assert lines[4:] == ["oom_retries: must be a whole number from 0 to 1000, not True"]


def test_an_older_version_is_read_with_defaults_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {"schema_version": 1, "oom_retries": 5}
    monkeypatch.setattr(runtime_config, "SCHEMA_VERSION", 2)
    assert RuntimeConfig.from_dict(older) == RuntimeConfig.from_dict({"oom_retries": 5}) == RuntimeConfig(oom_retries=5)
    assert RuntimeConfig.from_dict(older).to_dict()["schema_version"] == 2


@pytest.mark.parametrize("version", [2, 0, -1, True, "1", None, 1.0])
def test_a_newer_version_or_none_is_refused(version: Any) -> None:
    with pytest.raises(ValueError, match="schema_version: must be a whole number from 1 to 1, not .*newer Seamark"):
        RuntimeConfig.from_dict({"schema_version": version, "from_the_future": 1})


@given(
    st.dictionaries(st.sampled_from([*FIELDS, "schema_version"]) | st.text(max_size=9), anything, max_size=5) | anything
)
def test_whatever_is_read_is_a_configuration_or_a_value_error(values: Any) -> None:
    try:
        config = RuntimeConfig.from_dict(values)
    except ValueError as error:
        assert str(error)
    else:
        assert all(getattr(config, name) == value for name, value in values.items() if name != "schema_version")


def test_a_bad_value_on_the_wire_is_a_validation_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="poison_attempts: must be a whole number from 1 to 1000, not 0"):
        msgspec.json.decode(b'{"poison_attempts": 0}', type=RuntimeConfig)


def test_it_is_seamark_s_and_needs_neither_torch_nor_zeromq() -> None:
    assert seamark.RuntimeConfig is RuntimeConfig
    code = "import seamark, sys; seamark.RuntimeConfig(); print(sorted({'torch', 'zmq', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
