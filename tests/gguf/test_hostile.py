"""Damaged and malicious files: one clear error, quickly, with little memory."""

import contextlib
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.errors import GreenroomError, ModelFileError
from greenroom.gguf import GGMLType, GGUFFile, TensorSpec, Typed, ValueType, write_gguf
from greenroom.gguf.formats import DECODERS
from greenroom.gguf.header import MAX_ITEMS, MAX_TENSORS, read_header
from greenroom.gguf.metadata import Metadata

QUICK = 20.0  # seconds of CPU time; tenths of one were measured, however slow a machine is
# Sizes that overflow 32 or 64 bits, alone or after multiplication.
HUGE = [1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(value: bytes) -> bytes:
    return u64(len(value)) + value


def head(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(keys)


def tensor(name: bytes, ne: list[int], type: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(ne)) + b"".join(map(u64, ne)) + u32(type) + u64(offset)


def array(type: int, count: int, payload: bytes = b"") -> bytes:
    return string(b"key") + u32(9) + u32(type) + u64(count) + payload


def number(key: bytes, type: int, payload: bytes) -> bytes:
    return string(key) + u32(type) + payload


ALIGNMENT = b"general.alignment"
ROOM = bytes(256)
HOSTILE = {
    "empty": (b"", "0 bytes are too few"),
    "short": (b"GGUF", "4 bytes are too few"),
    "not gguf": (b"PK\3\4" + ROOM, "not a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (head(0, 0, 1), "version 1 cannot be read"),
    "version 4": (head(0, 0, 4), "version 4 cannot be read"),
    "version 0": (head(0, 0, 0), "version 0 cannot be read"),
    "tensor count": (head(MAX_TENSORS + 1, 0) + ROOM, "claims 65537 tensors"),
    "tensor count beyond the file": (head(60000, 0) + ROOM, "a list of 60000 tensors"),
    "tensor count 2^64-1": (head((1 << 64) - 1, 0) + ROOM, "claims 18446744073709551615 tensors"),
    "key count": (head(0, 1 << 40) + ROOM, "claims 1099511627776 metadata keys"),
    "key count beyond the file": (head(0, 16000) + ROOM, "a list of 16000 metadata keys"),
    "key length": (head(0, 1) + u64(1 << 62) + ROOM, "a metadata key has"),
    "key empty": (head(0, 1) + u64(0) + ROOM, "a metadata key has 0 bytes"),
    "key not utf-8": (head(0, 1) + number(b"\xff\xfe", 0, b"\0"), "not UTF-8"),
    "key twice": (head(0, 2) + number(b"k", 0, b"\0") * 2, "'k' is there twice"),
    "value type": (head(0, 1) + number(b"k", 13, ROOM), "'k' has the unknown value type 13"),
    "value missing": (head(0, 1) + number(b"kkkkkkk", 10, b"\0"), "needs 8 bytes"),
    "string length": (head(0, 1) + number(b"k", 8, u64(1 << 63)), "is a string of"),
    "string past the end": (head(0, 1) + number(b"k", 8, u64(1 << 20)), "needs 1048576 bytes"),
    "array type": (head(0, 1) + array(77, 1, ROOM), "elements of metadata 'key'.*type 77"),
    "array length": (head(0, 1) + array(4, 1 << 62, ROOM), "with 4611686018427387904 elements"),
    "array of doubles, overflow": (head(0, 1) + array(12, 1 << 61, ROOM), "needs 184467440737"),
    "strings": (head(0, 1) + array(8, 1 << 60, ROOM), "of 1152921504606846976 elements"),
    "strings past the end": (head(0, 1) + array(8, 2, u64(9) + ROOM[:10]), "passes the end"),
    "string in array": (head(0, 1) + array(8, 2, u64((1 << 64) - 1) + ROOM), "passes the end"),
    "arrays in arrays": (
        head(0, 1) + array(9, 1, (u32(9) + u64(1)) * 50 + u32(0) + u64(0)),
        "nests arrays deeper than 4",
    ),
    "many arrays": (
        head(0, 1) + array(9, MAX_ITEMS // 8, (u32(0) + u64(0)) * (MAX_ITEMS // 8)),
        "more than 4194304",
    ),
    "alignment 0": (head(0, 1) + number(ALIGNMENT, 4, u32(0)), "general.alignment is 0"),
    "alignment 48": (head(0, 1) + number(ALIGNMENT, 4, u32(48)), "general.alignment is 48"),
    "alignment 2^21": (head(0, 1) + number(ALIGNMENT, 4, u32(1 << 21)), "alignment is 2097152"),
    "alignment 2^63": (head(0, 1) + number(ALIGNMENT, 10, u64(1 << 63)), "alignment is 9223"),
    "alignment negative": (head(0, 1) + number(ALIGNMENT, 5, b"\xe0\xff\xff\xff"), "is -32"),
    "alignment text": (head(0, 1) + number(ALIGNMENT, 8, string(b"32")), "of type STRING"),
    "alignment bool": (head(0, 1) + number(ALIGNMENT, 7, b"\1"), "of type BOOL"),
    "dimensions": (head(1, 0) + tensor(b"t", [1] * 5) + ROOM, "'t' has 5 dimensions"),
    "dimensions 2^32-1": (
        head(1, 0) + string(b"t") + u32((1 << 32) - 1) + ROOM,
        "has 4294967295 dimensions",
    ),
    "dimension 0": (head(1, 0) + tensor(b"t", [4, 0]) + ROOM, "dimension of 0"),
    "size overflow": (head(1, 0) + tensor(b"t", [1 << 32, 1 << 32]) + ROOM, "ends at byte"),
    "size wraps to small": (
        head(1, 0) + tensor(b"t", [1 << 62, 4, 1, 1], type=24) + ROOM,
        "ends at byte",
    ),
    "offset overflow": (
        head(1, 0) + tensor(b"t", [4], offset=(1 << 64) - 32) + ROOM,
        "ends at byte",
    ),
    "offset crooked": (head(1, 0) + tensor(b"t", [4], offset=7) + ROOM, "not at a multiple of 32"),
    "past the end": (head(1, 0) + tensor(b"t", [400]) + ROOM, "truncated"),
    "unknown type": (head(1, 0) + tensor(b"t", [32], type=99) + ROOM, "unknown type number 99"),
    "removed type": (head(1, 0) + tensor(b"t", [32], type=31) + ROOM, "removed type Q4_0_4_4"),
    "type 2^32-1": (head(1, 0) + tensor(b"t", [32], type=(1 << 32) - 1) + ROOM, "4294967295"),
    "half a block": (head(1, 0) + tensor(b"t", [48], type=2) + ROOM, "Q4_0's block of 32"),
    "name twice": (head(2, 0) + tensor(b"t", [1]) * 2 + ROOM, "'t' is there twice"),
    "name length": (head(1, 0) + u64(1 << 20) + ROOM, "a tensor's name has 1048576 bytes"),
    "name not utf-8": (head(1, 0) + tensor(b"\xc0", [1]) + ROOM, "not UTF-8"),
    "overlap": (
        head(2, 0) + tensor(b"a", [16]) + tensor(b"b", [1], offset=32) + ROOM,
        "'a' and 'b' overlap",
    ),
    "control characters": (
        head(2, 0) + tensor(b"\x1b[2J\n\xc2\x9b" * 20, [1]) * 2 + ROOM,
        r"\\x1b\[2J\\n.*\.\.\..* is there twice",
    ),
}


@contextlib.contextmanager
def bounded(size: int, spare: int = 1 << 20) -> Iterator[None]:
    """Asserts that the block is quick and allocates less than `size` bytes and a little."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        taken = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < QUICK
    assert peak < size + spare


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with bounded(len(content)), pytest.raises(ModelFileError, match=message) as caught:
        GGUFFile(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("model.gguf: ")
    assert len(str(caught.value)) < 300


def test_things_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path, "directory"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "none.gguf", "No such file"),
        ("\0", "cannot be opened"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            GGUFFile(path)


@pytest.mark.parametrize("good", [True, False])
def test_the_largest_headers_are_quick(good: bool) -> None:
    # The most of everything that is accepted, refused (if at all) at the very end.
    last = [MAX_TENSORS - 1 if good else 1]
    lines = [tensor(b"%d" % i, [1, 1, 1, 1], 0, 32 * i) for i in range(MAX_TENSORS - 1)]
    lines.append(tensor(b"last", [1], 0, 32 * last[0]))
    many_tensors = head(MAX_TENSORS, 0) + b"".join(lines) + bytes(32 * MAX_TENSORS)
    many_strings = head(0, 1) + array(8, MAX_ITEMS, bytes(8 * MAX_ITEMS - (not good)))
    keys = [number(b"%d" % (i if good else i // 2), 0, b"\0") for i in range(1 << 14)]
    many_keys = head(0, 1 << 14) + b"".join(keys)
    for content in (many_tensors, many_strings, many_keys):
        start = time.process_time()
        with contextlib.nullcontext() if good else pytest.raises(ModelFileError):
            read_header(content, "model.gguf")
        assert time.process_time() - start < QUICK
        # Python's objects for one tensor or key take up to 400 bytes, hence the allowance.
        tracemalloc.start()
        with contextlib.suppress(ModelFileError):
            read_header(content, "model.gguf")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < len(content) + (32 << 20)


def test_a_sparse_file_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, message in [
        (head(0, 1) + array(8, MAX_ITEMS + 1), "more than 4194304"),
        (head(0, 1) + array(0, 1 << 30), "a header could have only"),
        (head(0, 1) + number(b"k", 8, u64(1 << 27)), "is a string of 134217728 bytes"),
        (head(0, 1) + array(8, 2, u64(1 << 30)), "passes the end"),
    ]:
        path.write_bytes(content)
        os.truncate(path, 1 << 36)
        with bounded(len(content)), pytest.raises(ModelFileError, match=message):
            GGUFFile(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value and several types of tensors."""
    path = tmp_path_factory.mktemp("sound") / "model.gguf"
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "flag": True,
        "wide": 1 << 40,
        "real": 0.5,
        "double": Typed(ValueType.F64, 0.5),
        "tokens": ["a", "bc", "☃"],
        "scores": np.arange(3, dtype=np.float32),
        "flags": [True, False],
    }
    types = [GGMLType.F32, GGMLType.Q4_0, GGMLType.MXFP4, GGMLType.Q4_K]
    tensors = [
        TensorSpec(type.name, type, (2, type.block_size), np.zeros(2 * type.block_bytes, "u1"))
        for type in types
    ]
    write_gguf(path, metadata, tensors)
    return path.read_bytes()


def read_all(content: bytes) -> bool:
    """Reads everything without hanging; True if the file was accepted."""
    start = time.process_time()
    try:
        return read_all_untimed(content)
    finally:
        assert time.process_time() - start < QUICK


def read_all_untimed(content: bytes) -> bool:
    try:
        header = read_header(content, "model.gguf")
    except ModelFileError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.isprintable()
        assert len(message) < 400
        return False
    metadata = Metadata(content, header.entries)
    for key in metadata:
        repr(metadata[key])
        metadata.raw(key)
    end = header.data_start
    for entry in sorted(header.tensors, key=lambda entry: entry.offset):
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
        raw = np.frombuffer(content, np.uint8, entry.nbytes, entry.offset)
        if entry.type in DECODERS:
            DECODERS[entry.type](raw.reshape(-1, entry.type.block_bytes))
    assert end <= len(content) or not header.tensors
    return True


def mutants(sound: bytes) -> Iterator[bytes]:
    """Every truncation, flips of every byte, every field replaced by a huge number, noise."""
    header = read_header(sound, "sound").data_start
    for length in range(0, len(sound), 1):
        yield sound[:length]
    for at in range(header):
        for value in (0, 1, 0x7F, 0x80, 0xFF, sound[at] ^ 1, sound[at] ^ 0x20):
            yield sound[:at] + bytes([value]) + sound[at + 1 :]
        for value in HUGE:
            yield sound[:at] + u64(value) + sound[at + 8 :]
            yield sound[:at] + u32(value & 0xFFFFFFFF) + sound[at + 4 :]
    rng = np.random.default_rng(0)
    for _ in range(4000):
        mutant = bytearray(sound)
        for _ in range(rng.integers(1, 12)):
            mutant[rng.integers(4, header)] = rng.integers(256)
        yield bytes(mutant)
    for _ in range(2000):  # pieces repeated, moved or left out
        a, b, c = sorted(rng.integers(8, header, 3).tolist())
        yield sound[:a] + sound[b:c] + sound[a:]
        yield sound[:a] + sound[b:]


def test_mutation_fuzzer(sound: bytes) -> None:
    assert read_all(sound)
    accepted = count = 0
    tracemalloc.start()
    for mutant in mutants(sound):
        accepted += read_all(mutant)
        count += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 20_000
    # Most flips hit names and values, which may be anything; the rest must be refused.
    assert 0.05 * count < accepted < 0.9 * count
    assert peak < 2 << 20


def test_mutants_as_files(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rng = np.random.default_rng(1)
    for _ in range(300):
        mutant = bytearray(sound)
        for at in rng.integers(8, 700, 3):
            mutant[at] = rng.integers(256)
        path.write_bytes(mutant[: rng.integers(len(sound) // 2, len(sound) + 1)])
        with contextlib.suppress(GreenroomError), GGUFFile(path) as file:
            for info in file.tensors.values():
                info.dequantize()


numbers = st.one_of(st.integers(0, 64), st.sampled_from(HUGE), st.integers(0, (1 << 64) - 1))
names = st.one_of(st.binary(max_size=12), st.sampled_from([ALIGNMENT, b"split.count", b"k"]))
scalars = st.builds(lambda type, raw: u32(type) + raw, st.integers(0, 14), st.binary(max_size=9))
strings = st.builds(lambda length, raw: u64(length) + raw, numbers, st.binary(max_size=9))
arrays = st.recursive(
    st.builds(lambda t, n, raw: u32(t) + u64(n) + raw, st.integers(0, 13), numbers, st.binary()),
    lambda inner: st.builds(lambda n, raw: u32(9) + u64(n) + raw, numbers, inner),
    max_leaves=6,
)
values = st.one_of(
    scalars,
    st.builds(lambda raw: u32(8) + raw, strings),
    st.builds(lambda raw: u32(9) + raw, arrays),
)
keys = st.builds(lambda name, value: string(name) + value, names, values)
infos = st.builds(
    tensor,
    names,
    st.lists(numbers, max_size=6),
    st.one_of(st.integers(0, 45), st.integers(0, (1 << 32) - 1)),
    st.one_of(st.integers(0, 8).map(lambda n: 32 * n), numbers),
)


@settings(max_examples=1500, deadline=None)
@given(
    version=st.sampled_from([2, 3, 3, 3]),
    counts=st.one_of(st.none(), st.tuples(numbers, numbers)),
    keys=st.lists(keys, max_size=5),
    infos=st.lists(infos, max_size=5),
    tail=st.binary(max_size=600),
)
def test_made_up_headers(
    version: int,
    counts: tuple[int, int] | None,
    keys: list[bytes],
    infos: list[bytes],
    tail: bytes,
) -> None:
    n_tensors, n_keys = counts or (len(infos), len(keys))
    read_all(head(n_tensors, n_keys, version) + b"".join(keys) + b"".join(infos) + tail)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000))
def test_noise_after_the_magic(noise: bytes) -> None:
    read_all(b"GGUF" + u32(3) + noise)
