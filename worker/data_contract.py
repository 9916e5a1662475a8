"""Opens a body that .NET's DataContractSerializer wrapped in binary XML, as older clients of Service Bus do.

The format is [MS-NBFX]: https://learn.microsoft.com/openspecs/windows_protocols/mc-nbfx
"""

from __future__ import annotations

import re

_HEAD = re.compile(rb"@(?:\x06string|\x0cbase64Binary)\x08\x33http://schemas\.microsoft\.com/2003/10/Serialization/")
_END = 0x01
_LENGTH_BYTES = {0x98: 1, 0x9A: 2, 0x9C: 4, 0x9E: 1, 0xA0: 2, 0xA2: 4}  # by kind of text; odd: the last text


def unwrap(body: bytes) -> bytes:
    """Return the text or the bytes in a wrapped body, and any other body unchanged. Raises ValueError."""
    head = _HEAD.match(body)
    if head is None:
        return body
    texts, position, is_last = [], head.end(), False
    while not is_last and body[position : position + 1] != bytes([_END]):
        kind = int.from_bytes(body[position : position + 1])
        start = position + 1 + _LENGTH_BYTES.get(kind & ~1, 0)
        length = int.from_bytes(body[position + 1 : start], "little")
        if start == position + 1 or start + length > len(body):
            raise ValueError("expected texts in binary XML")
        texts.append(body[start : start + length])
        position, is_last = start + length, bool(kind & 1)
    return b"".join(texts)
