"""The contents of requests: read, or refused with a sentence."""

from __future__ import annotations

import json
import os
from typing import Any

from .worker import Worker

Message = dict[str, Any]

MAX_PACKET_BYTES = 1 << 20


class Refused(Exception):
    """A request that isn't carried out; code and sentence go back to the agent."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def parse(packet: bytes) -> Message:
    if len(packet) > MAX_PACKET_BYTES:
        raise Refused("too_large", f"a request may have {MAX_PACKET_BYTES} bytes")
    try:
        request = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"the packet is not one JSON object: {error}") from error
    if not isinstance(request, dict):
        raise Refused("malformed", "the packet is not one JSON object")
    return request


def integer(request: Message, name: str, least: int, most: int) -> int:
    value = request.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused("malformed", f"{name} must be an integer from {least} to {most}")
    return value


def is_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def text(request: Message, name: str) -> str:
    value = request.get(name)
    if not is_text(value) or not value:
        raise Refused("malformed", f"{name} must be a string, not empty and without NUL characters")
    return str(value)


def process_key(request: Message) -> tuple[str, str]:
    return text(request, "slot"), text(request, "incarnation")


def flag(request: Message, name: str, default: bool = False) -> bool:
    value = request.get(name, default)
    if not isinstance(value, bool):
        raise Refused("malformed", f"{name} must be true or false")
    return value


def environment(request: Message) -> dict[str, str]:
    env = request.get("env")
    if not isinstance(env, dict) or not all(
        is_text(name) and name and "=" not in name and is_text(value) for name, value in env.items()
    ):
        raise Refused("malformed", "env must map names to strings, without NUL characters")
    return dict(env)


def worker_task(request: Message) -> Worker:
    argv = request.get("argv")
    if not isinstance(argv, list) or not argv or not argv[0] or not all(map(is_text, argv)):
        raise Refused("malformed", "argv must be a list of strings: the script or module, then its arguments")
    cwd = text(request, "cwd")
    if not os.path.isdir(cwd):
        raise Refused("bad_cwd", f"the working directory {cwd} doesn't exist on this node")
    cpus = request.get("cpus", [])
    if not isinstance(cpus, list) or not all(type(cpu) is int and 0 <= cpu < 1 << 16 for cpu in cpus):
        raise Refused("malformed", "cpus must be a list of numbers of processors")
    return Worker(argv, flag(request, "module"), cwd, integer(request, "num_threads", 1, 1 << 16), cpus)


def request_id(request: Message) -> int | None:
    value = request.get("id")
    return value if isinstance(value, int) else None


def seconds(request: Message, name: str) -> float:
    value = request.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise Refused("malformed", f"{name} must be a number of seconds, 0 or more")
    return value
