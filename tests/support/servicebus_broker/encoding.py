"""Splits AMQP messages into sections and joins them again, without changing their bodies."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from proton import Data, symbol, timestamp, ulong

HEADER, ANNOTATIONS, APPLICATION_PROPERTIES = 0x70, 0x72, 0x74
_BODY = frozenset({0x75, 0x76, 0x77})  # data, sequence, value
_DATA = 0x75
_DESCRIBED = b"\x00\x53"  # starts every section; the section's code follows
# Durable, priority 4, no time to live, not the first acquirer. proton itself leaves out a delivery count of 0.
_HEADER = _DESCRIBED + b"\x70\xc0\x0b\x05\x41\x50\x04\x40\x42\x70"


@dataclass(frozen=True, slots=True)
class Sections:
    """The encoded sections of a message."""

    before: dict[int, bytes] = field(default_factory=dict)  # sections before the body, by code
    body: bytes = b""  # all sections of the body, and the footer

    def with_properties(self, properties: dict[str, str]) -> Sections:
        """Return the message with more application properties."""
        raw = self.before.get(APPLICATION_PROPERTIES)
        existing = _decoded(raw).value if raw else {}
        return Sections(
            self.before | {APPLICATION_PROPERTIES: _section(APPLICATION_PROPERTIES, existing | properties)}, self.body
        )

    def encode(self, delivery_count: int, annotations: dict[str, Any]) -> bytes:
        """Encode the message as the broker delivers it."""
        header = _HEADER + struct.pack(">I", delivery_count)
        raw = self.before.get(ANNOTATIONS)
        merged = (_decoded(raw).value if raw else {}) | {symbol(name): value for name, value in annotations.items()}
        kept = [section for code, section in sorted(self.before.items()) if code > ANNOTATIONS]
        return b"".join([header, _section(ANNOTATIONS, merged), *kept, self.body])


def split(raw: bytes) -> Sections:
    """Split a message into sections."""
    before: dict[int, bytes] = {}
    start = 0
    while start < len(raw) and raw[start + 2] not in _BODY:
        end = _end(raw, start)
        before[raw[start + 2]] = raw[start:end]
        start = end
    return Sections(before, raw[start:])


def unbatched(raw: bytes) -> list[bytes]:
    """Return the messages of a batch, or the only message.

    A batch has a message in each data section. proton does not expose the message format, so the bytes are inspected.
    """
    sections = split(raw)
    parts: list[bytes] = []
    start = 0
    while start < len(sections.body) and sections.body[start + 2] == _DATA:
        end = _end(sections.body, start)
        parts.append(sections.body[start + (5 if sections.body[start + 3] == 0xA0 else 8) : end])
        start = end
    is_batch = bool(parts) and all(part[:2] == _DESCRIBED and HEADER <= part[2] <= 0x78 for part in parts)
    return parts if is_batch else [raw]


def milliseconds(seconds: float) -> timestamp:
    return timestamp(int(seconds * 1000))


def _end(raw: bytes, start: int) -> int:
    """Return the end of the section that starts at `start`: its value is a list, a map or binary."""
    constructor = raw[start + 3]
    if constructor == 0x45:  # the empty list
        return start + 4
    if constructor in {0xA0, 0xC0, 0xC1}:
        return start + 5 + raw[start + 4]
    return start + 8 + int(struct.unpack_from(">I", raw, start + 4)[0])


def _section(code: int, value: dict[Any, Any]) -> bytes:
    data = Data()
    data.put_described()
    data.enter()
    data.put_ulong(ulong(code))
    data.put_object(value)
    data.exit()
    return bytes(data.encode())


def _decoded(raw: bytes) -> Any:
    data = Data()
    data.decode(raw)
    data.rewind()
    data.next()
    return data.get_object()
