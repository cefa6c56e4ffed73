"""Any bytes give a message or a ProtocolError with a reason; every message survives the round trip."""

from __future__ import annotations

import typing

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamark.protocol import messages
from seamark.protocol.codec import MAX_BODY, SMALL_BODY, ProtocolError, Reason, decode, encode
from seamark.protocol.messages import TYPES, VERSION, Beat, FailureEvent, Message
from seamark.protocol.messages.base import by_number

BEAT = encode(Beat(node="n0", incarnation="i", sequence=1))


def reason_of(frames: list[bytes]) -> Reason:
    with pytest.raises(ProtocolError) as caught:
        decode(frames)
    assert str(caught.value)
    return caught.value.reason


EXAMPLES = {
    Reason.FRAME_COUNT: [BEAT[0]],
    Reason.HEADER: [b"XX\x01\x04", BEAT[1]],
    Reason.VERSION: [b"SM" + bytes((VERSION + 1, 4)), BEAT[1]],
    Reason.UNKNOWN_TYPE: [b"SM" + bytes((VERSION, 255)), BEAT[1]],
    Reason.TOO_LARGE: [BEAT[0], b"\x00" * (MAX_BODY + 1)],
    Reason.MSGPACK: [BEAT[0], b"\xc1"],
    Reason.FIELDS: [BEAT[0], msgpack.packb({"node": "n0", "incarnation": "i", "sequence": -1})],
}


@pytest.mark.parametrize("reason", list(Reason))
def test_each_reason_has_an_example(reason: Reason) -> None:
    assert reason_of(EXAMPLES[reason]) is reason


def test_an_unknown_version_names_both() -> None:
    with pytest.raises(ProtocolError, match=rf"version {VERSION + 1}.*{VERSION}"):
        decode(EXAMPLES[Reason.VERSION])


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.__name__)
def test_each_message_says_its_direction_and_its_answers_exist(kind: type[Message]) -> None:
    assert "->" in kind.direction
    for answer in filter(None, kind.answer.split(" | ")):
        assert hasattr(messages, answer)


def test_a_number_is_one_messages() -> None:
    class Base(Message, frozen=True):
        pass

    class One(Base, frozen=True):
        type_id = 1

    class Between(Base, frozen=True):
        pass

    assert by_number(Base) == {1: One}

    class Other(Between, frozen=True):
        type_id = 1

    with pytest.raises(TypeError, match="Other and One share type 1"):
        by_number(Base)


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_any_frames_give_a_message_or_a_reason(frames: list[bytes]) -> None:
    try:
        assert isinstance(decode(frames), Message)
    except ProtocolError as error:
        assert error.reason in Reason


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(TYPES)), JSON)
def test_any_msgpack_body_gives_a_message_or_a_reason(type_id: int, body: object) -> None:
    try:
        decode([b"SM" + bytes((VERSION, type_id)), msgpack.packb(body)])
    except ProtocolError as error:
        assert error.reason in (Reason.MSGPACK, Reason.FIELDS)


@settings(max_examples=300)
@given(st.data())
def test_messages_survive_the_round_trip(data: st.DataObject) -> None:
    kind = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    message = data.draw(instances(kind))
    assert decode(encode(message)) == message


@settings(max_examples=200)
@given(st.data())
def test_a_field_of_another_type_is_refused_by_name(data: st.DataObject) -> None:
    kind = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    fields = msgspec.to_builtins(data.draw(instances(kind)))
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = b"bytes are no field's type"
    with pytest.raises(ProtocolError) as caught:
        decode([b"SM" + bytes((VERSION, kind.type_id)), msgpack.packb(fields)])
    assert caught.value.reason in (Reason.MSGPACK, Reason.FIELDS)


@settings(max_examples=300)
@given(st.data())
def test_one_pass_decodes_what_two_do_and_refuses_what_two_refuse(data: st.DataObject) -> None:
    kind = TYPES[data.draw(st.sampled_from(sorted(TYPES)))]
    fields = msgspec.to_builtins(data.draw(instances(kind)))
    if data.draw(st.booleans()):
        fields[data.draw(st.sampled_from([*sorted(fields), "unknown"]))] = data.draw(JSON)
    frames = [b"SM" + bytes((VERSION, kind.type_id)), msgpack.packb(fields)]
    found = []
    for small in (SMALL_BODY, -1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("seamark.protocol.codec.SMALL_BODY", small)
            try:
                found.append(decode(frames))
            except ProtocolError as error:
                found.append(error.reason)
    assert found[0] == found[1] or found[0] != found[0]


def test_environment_values_that_are_not_utf8_survive() -> None:
    value = b"\xff/bin".decode(errors="surrogateescape")
    message = Beat(node=value, incarnation="i", sequence=0)
    assert decode(encode(message)) == message


def test_a_planted_defect_makes_the_round_trip_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Beat(node="n0", incarnation="i", sequence=1)
    other = msgpack.packb({"node": "x", "incarnation": "i", "sequence": 1})
    monkeypatch.setattr("seamark.protocol.codec._encode_body", lambda m: other)
    assert decode(encode(message)) != message


def instances(kind: type) -> st.SearchStrategy[typing.Any]:
    """Valid instances of a message, derived from its annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: values(hints[field.name]) for field in msgspec.structs.fields(kind)}
    return st.fixed_dictionaries(fields).map(lambda drawn: kind(**drawn))


def values(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Values that a field's annotation admits."""
    limits: dict[str, typing.Any] = {}
    if typing.get_origin(hint) is typing.Annotated:
        hint, meta = typing.get_args(hint)
        limits = {
            name: value
            for name in ("ge", "le", "lt", "min_length", "max_length")
            if (value := getattr(meta, name)) is not None
        }
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return st.none() | st.one_of(values(one) for one in arguments if one is not type(None))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), min_size=limits.get("min_length", 0), max_size=2)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(limits.get("ge", -(2**63)), limits.get("le", limits.get("lt", 2**63) - 1))
    if hint is float:
        return st.floats(limits.get("ge"), limits.get("le"), allow_nan=False)
    if hint is str:
        return st.text(min_size=limits.get("min_length", 0), max_size=8)
    return instances(hint)


def test_a_time_that_is_not_a_number_is_refused() -> None:
    failure = {"kind": "lost", "member": "j/0", "incarnation": "i", "rank": 0, "node": "n", "iteration": 0}
    failure |= {
        "cause": {"kind": "node"},
        "occurred_at": float("nan"),
        "detected_at": 0.0,
        "published_at": 0.0,
        "detector": "",
    }
    body = {"job": "j", "group": "ranks", "epoch": 1, "sequence": 1, "failure": failure}
    assert reason_of([b"SM" + bytes((VERSION, FailureEvent.type_id)), msgpack.packb(body)]) is Reason.FIELDS
