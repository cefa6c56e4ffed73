"""Every message of the suite: its fields, who sends it to whom, and what answers it.

The one door: messages are imported from here; each stands in the module of those who exchange it.
"""

from __future__ import annotations

from seamark.protocol.messages.answers import *
from seamark.protocol.messages.base import *
from seamark.protocol.messages.base import Message, by_number
from seamark.protocol.messages.events import *
from seamark.protocol.messages.jobs import *
from seamark.protocol.messages.nodes import *
from seamark.protocol.messages.operators import *
from seamark.protocol.messages.ranks import *
from seamark.protocol.messages.replicas import *
from seamark.protocol.messages.shards import *
from seamark.protocol.messages.workers import *

TYPES: dict[int, type[Message]] = by_number(Message)
"""Message types by the number that stands in the header."""
