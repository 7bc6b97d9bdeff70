"""The frame layer: header, limits, known and advisory types, and which JSON is a payload."""

from __future__ import annotations

import json

import pytest

from frelay.errors import LocalProtocolError, RemoteProtocolError
from frelay.protocol.frames import HEADER_SIZE, MAX_PAYLOAD, Frame, FrameDecoder, FrameType, encode_frame

KNOWN = {
    "JOIN": 0x01,
    "PONG": 0x02,
    "LEAVE": 0x03,
    "WAITING": 0x11,
    "PING": 0x12,
    "PAIRED": 0x13,
    "REFUSED": 0x14,
    "DRAINING": 0x15,
}


def decode(data: bytes) -> list[Frame]:
    decoder = FrameDecoder()
    decoder.feed(data)
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


def wire(code: int, body: bytes, *, reserved: int = 0, length: int | None = None) -> bytes:
    return bytes([code, reserved]) + (len(body) if length is None else length).to_bytes(2, "big") + body


# --- the header ----------------------------------------------------------------------------------------------------


def test_a_frame_on_the_wire_is_type_zero_length_and_compact_json() -> None:
    assert encode_frame(FrameType.PING, {"n": 7}) == b"\x12\x00\x00\x07" + b'{"n":7}'
    assert decode(b"\x12\x00\x00\x07" + b'{"n":7}') == [Frame(FrameType.PING, {"n": 7})]


def test_the_types_are_those_of_the_contract() -> None:
    assert {type_.name: type_.value for type_ in FrameType} == KNOWN


@pytest.mark.parametrize("code", sorted(KNOWN.values()))
def test_every_known_type_is_read(code: int) -> None:
    assert decode(wire(code, b"{}")) == [Frame(FrameType(code), {})]


@pytest.mark.parametrize("code", sorted(set(range(0x80)) - set(KNOWN.values())))
def test_an_unknown_type_below_0x80_is_an_error(code: int) -> None:
    """TESTPLAN 21: even with a payload that would be valid, and before the payload has arrived."""
    for data in (wire(code, b"{}"), wire(code, b"", length=2)):
        with pytest.raises(RemoteProtocolError, match=f"{code:#04x}"):
            decode(data)


@pytest.mark.parametrize("code", range(0x80, 0x100))
def test_an_unknown_type_from_0x80_on_is_skipped(code: int) -> None:
    """TESTPLAN 21: with any payload; the frame after it is read."""
    data = wire(code, b"\xff not JSON") + wire(code, b"") + wire(0x02, b'{"n":1}')
    assert decode(data) == [Frame(FrameType.PONG, {"n": 1})]


def test_skipped_frames_are_counted() -> None:
    decoder = FrameDecoder()
    decoder.feed(wire(0x80, b"") * 3 + wire(0x03, b""))
    assert decoder.next_frame() == Frame(FrameType.LEAVE, {})
    assert decoder.advisory_skipped == 3


@pytest.mark.parametrize("code", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("reserved", [1, 0x80, 0xFF])
def test_the_second_byte_is_zero(code: int, reserved: int) -> None:
    with pytest.raises(RemoteProtocolError, match="not 0"):
        decode(wire(code, b"{}", reserved=reserved))


@pytest.mark.parametrize("code", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 0xFFFF])
def test_an_oversized_frame_is_refused_by_its_header_alone(code: int, length: int) -> None:
    """TESTPLAN 21: also an advisory frame, and before a byte of its payload is kept."""
    with pytest.raises(RemoteProtocolError, match=str(length)):
        decode(wire(code, b"", length=length))


def test_4096_bytes_of_payload_are_taken() -> None:
    body = b'{"x":"' + b"y" * (MAX_PAYLOAD - 8) + b'"}'
    assert len(body) == MAX_PAYLOAD
    assert decode(wire(0x01, body)) == [Frame(FrameType.JOIN, {"x": "y" * (MAX_PAYLOAD - 8)})]


def test_4096_bytes_of_payload_are_made_and_not_one_more() -> None:
    fits = encode_frame(FrameType.JOIN, {"x": "y" * (MAX_PAYLOAD - 8)})
    assert len(fits) == HEADER_SIZE + MAX_PAYLOAD
    with pytest.raises(LocalProtocolError, match="4097"):
        encode_frame(FrameType.JOIN, {"x": "y" * (MAX_PAYLOAD - 7)})


def test_the_limit_counts_bytes_and_not_characters() -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(FrameType.JOIN, {"x": "ä" * 2048})


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "\ud800", {1, 2}, b"bytes"], ids=["nan", "inf", "surrogate", "set", "bytes"]
)
def test_what_is_no_json_cannot_be_sent(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(FrameType.JOIN, {"x": value})


def test_an_incomplete_frame_waits_for_its_rest() -> None:
    decoder = FrameDecoder()
    data = wire(0x12, b'{"n":7}')
    for position, byte in enumerate(data, 1):
        assert decoder.next_frame() is None
        decoder.feed(bytes([byte]))
        assert len(decoder) == position
    assert decoder.next_frame() == Frame(FrameType.PING, {"n": 7})
    assert len(decoder) == 0


# --- the payload ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{}", b" {\n} "])
def test_leave_has_no_payload_or_an_empty_object(body: bytes) -> None:
    assert decode(wire(0x03, body)) == [Frame(FrameType.LEAVE, {})]


@pytest.mark.parametrize("code", sorted(set(KNOWN.values()) - {0x03}))
def test_every_other_type_has_an_object(code: int) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(wire(code, b""))


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"true",
        b"7",
        b'"text"',
        b"{",
        b"{}{}",
        b"{} x",
        b"{'n':1}",
        b'{"n":1,}',
        b'{"n":01}',
        b'{"n":+1}',
        b'{"n":0x1}',
        b'{"n":.5}',
        b'{"n":NaN}',
        b'{"n":Infinity}',
        b'{"n":-Infinity}',
        b'{"n":1,"n":1}',
        b'{"n":1,"\\u006e":2}',
        b'{"x":{"n":1,"n":2}}',
        b'{"n":"\n"}',
        b'{"n":"\x00"}',
        b'{"n":"\\x41"}',
        b"\xef\xbb\xbf{}",
        b'{"n":"\xff"}',
        b'{"n":"\xed\xa0\x80"}',
        b'{"n":"\xc0\xaf"}',
        '{"n":1}'.encode("utf-16"),
        b"{\x00}",
    ],
)
def test_what_is_not_one_json_object_is_an_error(body: bytes) -> None:
    """TESTPLAN 21: duplicate keys (in any spelling), NaN, other encodings, and anything but one object."""
    for code in (0x01, 0x12):
        with pytest.raises(RemoteProtocolError):
            decode(wire(code, body))


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    """TESTPLAN 21: as many open brackets as fit in one frame."""
    for opening in (b"[", b'{"a":'):
        with pytest.raises(RemoteProtocolError):
            decode(wire(0x01, b'{"x":' + opening * ((MAX_PAYLOAD - 5) // len(opening))))
    depth = (MAX_PAYLOAD - 6) // 2
    closed = b'{"x":' + b"[" * depth + b"]" * depth + b"}"
    try:
        [frame] = decode(wire(0x01, closed))
    except RemoteProtocolError:
        return
    # The parser of another Python may accept this depth; then the value must be right.
    assert json.dumps(frame.payload, separators=(",", ":")).encode() == closed


def test_numbers_as_long_as_a_frame_are_read_or_refused() -> None:
    """TESTPLAN 21: 4,000 digits neither take quadratic time nor raise another exception."""
    [frame] = decode(wire(0x02, b'{"n":' + b"9" * 4000 + b"}"))
    assert frame.payload["n"] == 10**4000 - 1
    [frame] = decode(wire(0x02, b'{"n":1e' + b"9" * 4000 + b"}"))
    assert frame.payload["n"] == float("inf")


def test_the_error_of_one_frame_does_not_take_those_before_it() -> None:
    decoder = FrameDecoder()
    decoder.feed(wire(0x12, b'{"n":1}') + wire(0x12, b"[]"))
    assert decoder.next_frame() == Frame(FrameType.PING, {"n": 1})
    with pytest.raises(RemoteProtocolError):
        decoder.next_frame()
