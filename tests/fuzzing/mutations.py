"""Damage to files, drawn from a seeded generator: to their bytes, to the tree of JSON or YAML, to archives."""

import copy
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable

import yaml

Mutation = Callable[[bytes, random.Random], bytes]

ODD_VALUES = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 1e-320, 0.5, float("nan"),
    float("inf"),
    "", "a", "no", "1e-4", "x" * 20_000, "\ud800", "\0", "\x1b[31m\n", "../evil", "../../evil.py", "/nowhere/at/all",
    "~/nowhere", ".", "..", "a\\b", "{{7*7}}", "<script>", "nan", "[]", [], {}, [[]], [None], [1, "a"], {"": {}},
    {"a": {"b": {"c": 1}}}, ["../evil", "Evil"], [0] * 5_000,
)  # fmt: skip
ODD_NAMES = ("", "a", "../evil", "__class__", "\ud800", "\0", "name", "path", "_class_name", "x" * 5_000, "1", "a.b")


# ------------------------------------------------------------------------------------------------- bytes


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_short(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.8 else b""


def leave_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 8, 100)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start : start + rng.choice((1, 16, 300))] * rng.choice((2, 50)) + data[start:]


def put_in(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    inserted = rng.choice(
        (rng.randbytes(20), b"\0" * 50, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\x1b[2J", b"\xed\xa0\x80")
    )
    return data[:start] + inserted + data[start:]


def blank(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + bytes(len(data[start : start + 200])) + data[start + 200 :]


def largest(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice((b"\xff" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8)) + data[start + 4 :]


BYTES: tuple[Mutation, ...] = (flip_bits, cut_short, leave_out, repeat, put_in, blank, largest)


# ------------------------------------------------------------------------------------------------- trees


def places(tree, found=None):
    """Every (container, key) of a tree of dicts and lists."""
    found = [] if found is None else found
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        found.append((tree, key))
        places(value, found)
    return found


def change_tree(tree, rng: random.Random):
    """One change of a tree: an entry deleted, doubled, renamed, swapped, or of another type, or of great depth."""
    tree = copy.deepcopy(tree)
    where = places(tree)
    if not where or rng.random() < 0.05:
        return rng.choice(ODD_VALUES)
    container, key = rng.choice(where)
    kind = rng.random()
    if kind < 0.2:
        del container[key]
    elif kind < 0.3 and isinstance(container, dict):
        container[rng.choice(ODD_NAMES)] = container.pop(key)
    elif kind < 0.4 and isinstance(container, dict):
        container[rng.choice(ODD_NAMES)] = copy.deepcopy(container[key])
    elif kind < 0.5:
        other, other_key = rng.choice(where)
        container[key] = copy.deepcopy(other[other_key])
    elif kind < 0.55:
        container[key] = nested(rng.choice((5, 60, 400)), rng)
    else:
        container[key] = rng.choice(ODD_VALUES)
    return tree


def nested(depth: int, rng: random.Random):
    value = rng.choice(ODD_VALUES[:10])
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def json_tree(data: bytes, rng: random.Random) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        tree = change_tree(tree, rng)
    return json.dumps(tree, indent=rng.choice((None, 2))).encode()


def json_text(data: bytes, rng: random.Random) -> bytes:
    """What no tree of Python holds: keys given twice, depth beyond recursion, digits without end."""
    at = data.find(b":", rng.randrange(len(data) + 1)) + 1
    value = rng.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"9" * 6_000,
            b"1e999",
            b"-NaN",
            b"01",
            b'"\\ud800"',
            b"[1" + b",1" * 9_999 + b"]",
        )
    )
    return rng.choice((
        data[:1] + b'"name": 1, "name": 2, "setting": 3,' + data[1:],
        data[:at] + value + b"," + data[at:],
        data + data,
        b"[" + data + b"]",
    ))  # fmt: skip


def lines(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON lines with one line changed, doubled, or lost."""
    rows = data.splitlines()
    index = rng.randrange(len(rows))
    change = rng.choice((json_tree, json_tree, json_text, lambda row, rng: b"", lambda row, rng: row + b"\n" + row))
    rows[index] = change(rows[index], rng)
    return b"\n".join(rows)


def yaml_tree(data: bytes, rng: random.Random) -> bytes:
    changed = change_tree(yaml.safe_load(data), rng)
    if rng.random() < 0.5:
        return json.dumps(changed).encode()
    try:
        return yaml.dump(changed).encode("utf-8", "surrogatepass")
    except RecursionError:  # too deep for the writer, too
        return json.dumps(changed).encode()


YAML_TEXTS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
    ),
    "a: &a {b: 1}\nc: {<<: [*a, *a]}\n", "&a [*a]\n", "a: &a {b: *a}\n", "? [1, 2]\n: 3\n", "? {a: b}\n: 3\n",
    "null: 1\n", "a: !!python/object/apply:os.system [touch evil]\n", "a: !!int x\n", "a: !!int ''\n",
    "a: !!bool maybe\n", "a: !!float x\n", "a: !!timestamp x\n", "a: 2020-99-99\n", "a: !!binary '===='\n",
    "a: !!set {b}\n", "a: !!omap [b]\n", "a: *b\n", "- 1\n", "a: " + "[" * 3_000 + "\n", "a: {" * 3_000 + "\n",
    "a: " + "9" * 6_000 + "\n", "a: 1\na: 2\n", "%YAML 9.9\n---\na: 1\n", "a: 1\n---\nb: 2\n", "a: \"\\ud800\"\n",
    "a: \"\\0\"\n", "\t- a\n", "a: 0x" + "f" * 500 + "\n", "a: 1:99999:99\n", "a: =\n",
)  # fmt: skip


def yaml_text(data: bytes, rng: random.Random) -> bytes:
    text = rng.choice(YAML_TEXTS).encode()
    return rng.choice((text + data, data + b"\n" + text, text))


# ---------------------------------------------------------------------------------------------- archives


def npy_header(rng: random.Random) -> bytes:
    """The beginning of an array whose header says something odd."""
    shape = rng.choice(
        (
            "(713 * 2**40,)",
            "(784041534537728,)",
            "(-1,)",
            "(10000000000000000000000,)",
            "()",
            "(2, 2",
            "(True,)",
            "(1.5,)",
            "'a'",
        )
    )
    descr = rng.choice(("|u1", "<f8", "|O", "<U9", ">i4", "x", "", "<M8[s]", "|V9"))
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(118 - 10) + "\n"
    length = rng.choice((len(text), 0, 65_535))
    return b"\x93NUMPY" + bytes((rng.choice((1, 2, 3, 9)), 0)) + struct.pack("<H", length) + text.encode()


def zip_members(data: bytes, rng: random.Random) -> bytes:
    """An archive whose members are lost, doubled, renamed, of another compression, or of another content."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    index = rng.randrange(len(members))
    name, content = members[index]
    kind = rng.randrange(6)
    if kind == 0:
        del members[index]
    elif kind == 1:
        members.append((name, content))
    elif kind == 2:
        members[index] = (
            rng.choice(("../evil.npy", "/evil.npy", "a/b.npy", "images", "labels.npy", "mu.npy", "\x1b[31m.npy")),
            content,
        )
    elif kind == 3:
        members[index] = (name, npy_header(rng) + content[128:])
    elif kind == 4:
        members[index] = (name, rng.choice(BYTES)(content, rng))
    else:
        other = rng.choice(members)[1]
        members[index] = (name, other)
    target = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return target.getvalue()


TAR_KINDS = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.DIRTYPE,
    tarfile.CONTTYPE,
    b"Z",
)


def tar_members(data: bytes, rng: random.Random) -> bytes:
    """A tar with one member renamed to lead outside, made a link or a pipe, of a wrong size, or damaged."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    index = rng.randrange(len(members))
    member, content = members[index]
    kind = rng.randrange(5)
    if kind == 0:
        member.name = rng.choice(
            ("../evil.png", "/evil.png", "a/../../b.png", "\ud800.png", "x" * 300 + ".png", ".png", "a")
        )
    elif kind == 1:
        member.type, member.linkname, member.size = rng.choice(TAR_KINDS), rng.choice(("../evil", member.name)), 0
        content = b""
    elif kind == 2:
        content = rng.choice(BYTES)(content, rng)
        member.size = len(content)
    elif kind == 3:
        members.append(members[index])
    else:
        del members[index]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", errors="surrogateescape", encoding="utf-8") as archive:
        for member, content in members:
            try:
                archive.addfile(member, io.BytesIO(content))
            except (UnicodeEncodeError, OSError):  # a name or a size that tarfile itself refuses
                continue
    return target.getvalue()


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """Weights whose JSON header is changed, with its length or without."""
    (length,) = struct.unpack("<Q", data[:8])
    header = (json_tree if rng.random() < 0.8 else json_text)(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header) if rng.random() < 0.9 else 2**60) + header + data[8 + length :]
