"""Strategies that damage files: at random, and as somebody who wants harm would.

`draw` is that of hypothesis; each mutation takes it and the bytes of a file, and returns others.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import strategies as st

Mutation = Callable[[st.DrawFn, bytes], bytes]

ODD_SCALARS = (
    *(
        ".nan",
        "-.inf",
        "1e999",
        "-0",
        "1_0",
        "1:30",
        "0o17",
        "9" * 30,
        "9" * 5000,
        "0x" + "f" * 5000,
    ),
    *("true", "no", "~", "''", "2024-02-31", "2024-02-30T99:00:00Z", "2001-12-14t21:59:43.1-05:00"),
    *("[]", "{}", "[[[[1]]]]", "{a: {b: 1}}", "{? [1] : 2}", "[" * 500, "{a: " * 300, "- 1", "? x"),
    *("&a [*a]", "*nothing", "&a {<<: *a}", "{<<: 3}", "{<<: [1]}", "!!set {a}", "!!omap [a: 1]"),
    *("!!int x", "!!bool x", "!!float ''", "!!timestamp x", "!!binary '%'", "!!null x", "!!str []"),
    *("!!python/object/apply:os.system ['touch PLANTED']", "!!python/name:os.system", "!own x"),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\uffff"',
        "'",
        '"',
        "|",
        ">-2",
        "%YAML 9.9",
        "--- 1",
        "...",
        "\t",
        "@",
    ),
    *("../../x", "/", "~nobody/x", "n" * 300, "hf_" + "A1b2" * 8, "&x [&y {a: *x}, *y]"),
)
ALIAS_BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60)
)
HOSTILE_PICKLES = (
    b"cos\nsystem\n(X\x0d\x00\x00\x00touch PLANTEDtR.",
    b"c__builtin__\neval\n(X\x04\x00\x00\x001//0tR.",
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # 2**36 zeros
    b"ctorch\nTensor\n(\x8a\x05\x00\x00\x00\x00\x10tR.",
    b"X\xff\xff\xff\xff",  # text of 4 GB
    b"\x8a\xff",  # integer of 255 bytes
    b"r\xff\xff\xff\xff",  # entry 2**32 of the memo
    b"(((((((((((((((((((((((((((((((((((((",
    b"]" * 50_000 + b"a" * 49_999 + b".",  # lists in lists
)


def _place(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, max(0, len(content) - 1)))


def flip_bit(draw: st.DrawFn, content: bytes) -> bytes:
    """Change one bit."""
    place = _place(draw, content)
    byte = bytes(b ^ 1 << draw(st.integers(0, 7)) for b in content[place : place + 1])
    return content[:place] + byte + content[place + 1 :]


def delete(draw: st.DrawFn, content: bytes) -> bytes:
    """Leave out a part."""
    place = _place(draw, content)
    return content[:place] + content[place + draw(st.integers(1, 200)) :]


def insert(draw: st.DrawFn, content: bytes) -> bytes:
    """Put any bytes somewhere."""
    place = _place(draw, content)
    return content[:place] + draw(st.binary(min_size=1, max_size=20)) + content[place:]


def cut(draw: st.DrawFn, content: bytes) -> bytes:
    """Leave out the rest."""
    return content[: _place(draw, content)]


def zero(draw: st.DrawFn, content: bytes) -> bytes:
    """Zeros in place of a part, as a crash may leave them."""
    place = _place(draw, content)
    n = draw(st.integers(1, max(1, len(content) - place)))
    return content[:place] + bytes(n) + content[place + n :]


def number(draw: st.DrawFn, content: bytes) -> bytes:
    """An extreme number in place of eight bytes."""
    place = _place(draw, content)
    value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]))
    return content[:place] + value.to_bytes(8, "little") + content[place + 8 :]


DTYPES = ("F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "I64", "U16", "C64")
BYTE_MUTATIONS: tuple[Mutation, ...] = (flip_bit, delete, insert, cut, zero, number)


def double_line(draw: st.DrawFn, content: bytes) -> bytes:
    """A line twice."""
    lines = content.split(b"\n")
    line = draw(st.sampled_from(lines))
    lines.insert(draw(st.integers(0, len(lines))), line)
    return b"\n".join(lines)


def swap_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """Two lines in each other's place."""
    lines = content.split(b"\n")
    first, second = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def odd_value(draw: st.DrawFn, content: bytes) -> bytes:
    """Another value behind a key."""
    lines = content.split(b"\n")
    keyed = [index for index, line in enumerate(lines) if b":" in line]
    if not keyed:
        return content
    index = draw(st.sampled_from(keyed))
    key = lines[index].partition(b":")[0]
    lines[index] = key + b": " + draw(st.sampled_from(ODD_SCALARS)).encode()
    return b"\n".join(lines)


def alias_bomb(draw: st.DrawFn, content: bytes) -> bytes:
    """Few lines that mean 2**59 values."""
    return ALIAS_BOMB + content


YAML_MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bit, delete, insert, cut, double_line, swap_lines, alias_bomb),
    *(odd_value,) * 6,
)


def hostile_pickle(draw: st.DrawFn, content: bytes) -> bytes:
    """Opcodes that call, or ask for much memory, somewhere in a pickle."""
    place = _place(draw, content)
    return content[:place] + draw(st.sampled_from(HOSTILE_PICKLES)) + content[place:]


def in_member(draw: st.DrawFn, content: bytes) -> bytes:
    """A zip whose checksums are right, with a pickle, a tensor or a name in it changed."""
    changed = io.BytesIO()
    how = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w", how) as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = draw(st.sampled_from(pickles) | st.sampled_from(names))
        for name in names:
            member, new_name = old.read(name), name
            if name == chosen:
                member = mutate(draw, member, (*BYTE_MUTATIONS, hostile_pickle, hostile_pickle))
                new_name = draw(st.sampled_from([name, name, f"../../{name}", f"/{name}"]))
            new.writestr(new_name, member)
    return changed.getvalue()


def in_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header is as long as it says, but holds something else."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = draw(st.sampled_from(sorted(header)))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", ""]))
    numbers = st.sampled_from([-1, 0, 2, 3, 4, 2**31, 2**40, 2**63, 2**64 - 1, 1.5])
    odd = numbers | st.lists(numbers, max_size=9) | st.sampled_from([None, "x", {}, *DTYPES])
    header[name] = {**header[name], key: draw(odd)} if key else draw(odd)
    text = json.dumps(header).encode()
    if draw(st.booleans()):
        text = mutate(draw, text, BYTE_MUTATIONS)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def mutate(draw: st.DrawFn, content: bytes, mutations: Sequence[Mutation]) -> bytes:
    """`content` after one to three mutations."""
    for mutation in draw(st.lists(st.sampled_from(mutations), min_size=1, max_size=3)):
        content = mutation(draw, content)
    return content


@st.composite
def mutated(
    draw: st.DrawFn,
    content: bytes,
    mutations: Sequence[Mutation] = BYTE_MUTATIONS,
    inside: Mutation | None = None,
) -> bytes:
    """`content` after some `mutations` or, as often, after `inside`, which can read it."""
    if inside is not None and draw(st.booleans()):
        return inside(draw, content)
    return mutate(draw, content, mutations)


def planting(content: bytes, planted: Path) -> bytes:
    """`content`, whose code, if any of it were executed, would make a file."""
    name = str(planted).encode()
    command = b"X" + (len(name) + 6).to_bytes(4, "little") + b"touch " + name
    content = content.replace(b"X\x0d\x00\x00\x00touch PLANTED", command)
    return content.replace(b"PLANTED", name)
