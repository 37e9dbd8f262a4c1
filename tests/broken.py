"""Makers of broken inputs, as tables that tests run over: one line per kind, with the message that it must give.

`ROWS`: a source of which some rows are bad; the others must come through, and rejects.jsonl must hold the reason.
`SOURCES`: settings with which nothing can be done; one line for the user. Further kinds (config, checkpoint) may follow
in tables of their own, read by the tests of their own modules.
"""

import dataclasses
import io
import json
import os
import pathlib
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

GOOD = 2  # good examples in every source of ROWS


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of broken input.

    Attributes:
      make: Writes it into an empty folder; returns the source, or {setting: value}.
      message: What "reason: detail" (ROWS) or the one line for the user (SOURCES) must contain.
    """

    name: str
    make: Callable[[pathlib.Path], object]
    message: str


# ------------------------------------------------------------------------------------------------------------- pictures


def picture(seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """Return a smooth random picture."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


def encoded(kind: str = "png", seed: int = 0, **options) -> bytes:
    """Return a good picture file."""
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """Return a grey PNG that claims a size; `pixels` is its compressed data, None for no data chunk at all."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = b"" if pixels is None else chunk(b"IDAT", pixels)
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """Return `count` zero bytes, deflated a thousandfold."""
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(2**20)) for _ in range(count // 2**20)) + squeeze.flush()


def _tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "tiff")
    return buffer.getvalue()


def _scans(count: int) -> bytes:
    """Return a JPEG of 10,000 x 10,000 that claims many scans."""
    data = encoded("jpeg")
    frame = data.index(b"\xff\xc0")
    data = data[: frame + 5] + struct.pack(">HH", 10_000, 10_000) + data[frame + 9 :]
    return data + b"\xff\xda\0\0" * count


PICTURES = {
    "a truncated jpeg": (encoded("jpeg", quality=95)[:-300], "broken picture: OSError"),
    "a truncated png": (encoded("png")[:-200], "broken picture"),
    "a truncated webp": (encoded("webp", lossless=True)[:-100], "broken picture"),
    "a truncated gif": (encoded("gif")[:-500], "broken picture"),
    "an empty file": (b"", "empty picture file"),
    "a text file": (b"I am no picture", "starts with b'I am no '"),
    "an error page": (b"<!DOCTYPE html><h1>404", "not a picture"),
    "a vector picture": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "a PostScript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "not a picture"),
    "a jpeg head and noise": (encoded("jpeg")[:200] + bytes(range(256)) * 4, "broken picture"),
    "a claim of 2500 Mpx": (png(50_000, 50_000, zlib.compress(b"")), "picture too large"),
    "a bomb of 400 Mpx": (png(20_000, 20_000, _zeros(2**24)), "picture too large"),
    "150 Mpx": (png(15_000, 10_000, zlib.compress(b"")), "picture too large: 15000 x 10000 pixels, limit"),
    "a jpeg of a thousand scans": (_scans(1000), "in 1001 scans"),
    "a png with a wrong checksum": (encoded("png").replace(b"IHDR\0", b"IHDR\x01"), "not a picture"),
    "a png without pixels": (png(4, 4), "broken picture"),
    "a png with too few pixels": (png(400, 400, zlib.compress(bytes(9))), "broken picture"),
    "a png with broken deflate data": (png(40, 40, b"\x78\x9c" + b"\xff" * 40), "broken picture"),
    "a picture of no pixels": (png(0, 7, zlib.compress(b"")), "not a picture"),
    "floating-point pixels": (_tiff(np.ones((4, 4), np.float32)), "broken picture: floating-point pixels"),
    "negative pixels": (_tiff(np.full((4, 4), -7, np.int32)), "broken picture: values -7 to -7"),
}

# ------------------------------------------------------------------------------------------------ folders with metadata


def folder(root: pathlib.Path, *rows: dict | bytes) -> str:
    """Write GOOD good rows around the given rows (dicts, or raw lines) and return the source."""
    good = [json.dumps({"file_name": f"{i}.png", "text": f"good {i}"}).encode() for i in range(GOOD)]
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    for i in range(GOOD):
        (root / f"{i}.png").write_bytes(encoded(seed=i))
    (root / "metadata.jsonl").write_bytes(b"\n".join([good[0], *lines, *good[1:]]) + b"\n")
    return str(root)


def row(**values) -> Callable[[pathlib.Path], str]:
    """Return a maker of a folder with one further row; it shows a good picture unless told otherwise."""
    return lambda root: folder(root, {"file_name": "0.png", "text": "bad", **values})


def line(data: bytes) -> Callable[[pathlib.Path], str]:
    """Return a maker of a folder with one further raw line."""
    return lambda root: folder(root, data)


def _file(data: bytes) -> Callable[[pathlib.Path], str]:
    def make(root):
        (root / "bad.png").write_bytes(data)
        return row(file_name="bad.png")(root)

    return make


def _link(target: str) -> Callable[[pathlib.Path], str]:
    def make(root):
        (root / "bad.png").symlink_to(target)
        return row(file_name="bad.png")(root)

    return make


def _outside(root: pathlib.Path) -> str:
    """Link to a good picture outside of the folder, under a folder of links."""
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "a.png").write_bytes(encoded())
    (root / "inside").symlink_to(root.parent / "outside")
    return row(file_name="inside/a.png")(root)


def _pipe(root: pathlib.Path) -> str:
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    return row(file_name="pipe.png")(root)


def csv(*rows: bytes, header: bytes = b"file_name,text") -> Callable[[pathlib.Path], str]:
    """Return a maker of a folder with metadata.csv: good rows around the given raw lines."""

    def make(root):
        folder(root)
        (root / "metadata.jsonl").unlink()
        lines = [header, b"0.png,good", *rows, b'1.png,"good, on\ntwo ""lines"""']
        (root / "metadata.csv").write_bytes(b"\n".join(lines) + b"\n")
        return str(root)

    return make


FOLDERS = {
    "a path upwards": (row(file_name="../outside.png"), "path leaves the folder: ../outside.png"),
    "a path up and down": (row(file_name="a/../../0.png"), "path leaves the folder"),
    "an absolute path": (row(file_name="/etc/passwd"), "path leaves the folder: /etc/passwd"),
    "a link out of the folder": (_link("/etc/passwd"), "path leaves the folder: bad.png: a link to"),
    "a folder that is a link": (_outside, "path leaves the folder: inside/a.png: a link to"),
    "a link to itself": (_link("bad.png"), "unreadable file: 'bad.png'"),
    "a missing file": (row(file_name="none.png"), "missing file: none.png"),
    "a folder for a file": (row(file_name="."), "not a file: '.'"),
    "a pipe": (_pipe, "not a file: 'pipe.png'"),
    "a NUL in a name": (row(file_name="a\0b.png"), "unreadable file"),
    "half a surrogate in a name": (line(rb'{"file_name": "\ud800.png", "text": "a"}'), "unreadable file"),
    "a name too long": (row(file_name="a" * 5000), "unreadable file"),
    "a number for a name": (row(file_name=7), "missing file_name: 7"),
    "no name": (line(b'{"text": "a"}'), "missing file_name"),
    "no caption": (line(b'{"file_name": "0.png"}'), "missing caption: no 'text'"),
    "a null caption": (row(text=None), "missing caption"),
    "no caption in a list": (row(text=[]), "missing caption"),
    "an empty caption": (row(text=""), "empty caption"),
    "a blank caption": (row(text=" \n\t\u2003"), "empty caption"),
    "a number for a caption": (row(text=7), "caption is not text: 'text' is 7"),
    "a number among captions": (row(text=["a", 7]), "caption is not text: 'text' is 7"),
    "half a surrogate": (line(rb'{"file_name": "0.png", "text": "a\ud83d"}'), "lone surrogate: U+D83D at character 1"),
    "half a surrogate elsewhere": (
        line(rb'{"file_name": "0.png", "text": "a", "note": "\udc00"}'),
        "cannot be stored: UnicodeEncodeError",
    ),
    "half a surrogate in a group": (line(rb'{"file_name": "0.png", "text": "a", "group": "\udc00"}'), "lone surrogate"),
    "a caption of a megabyte": (row(text="a" * 1_000_001), "caption too long: 1000001 characters, limit 100000"),
    "bad UTF-8": (line(b'{"file_name": "0.png", "text": "caf\xe9"}'), "bad UTF-8: byte 0xe9 at 35"),
    "broken JSON": (line(b'{"file_name": "0.png", "text'), "broken metadata: not JSON: Unterminated string"),
    "a JSON list": (line(b'["0.png", "a"]'), "broken metadata: a JSON list, expected an object"),
    "JSON without end": (line(b'{"a":' * 100_000), "broken metadata: not JSON: maximum recursion depth"),
    "a line of 17 MB": (line(b'{"file_name": "' + b"a" * 17_000_000 + b'"}'), "broken metadata: line longer than"),
    "a number of 200 digits": (row(id=10**200), "cannot be stored: OverflowError"),
    "a list for a licence": (row(license=["CC0"]), "broken metadata: 'license' is ['CC0'], expected text"),
    "a split of odd letters": (row(split="../train"), "bad split: '../train'"),
    "a box in pixels": (row(regions=[{"box": [10, 10, 20, 20]}]), "bad region"),
    "a box inside out": (row(regions=[{"box": [0.5, 0.5, 0.1, 0.1]}]), "bad region"),
    "a box of text": (row(regions=[{"box": "all"}]), "bad region"),
    "a box on a caption": (row(regions=[{"box": [0, 0, 1, 1], "part": 0}]), "bad region: part 0 of 2 is no picture"),
    "regions that are none": (row(regions=5), "broken metadata: 'regions' is 5, expected a list"),
    "a document of nothing": (line(b'{"parts": []}'), "empty document"),
    "a number in a document": (line(b'{"parts": ["a", 5]}'), "bad part: 5"),
    "a sound in a document": (line(b'{"parts": [{"sound": "a.wav"}]}'), "bad part: {'sound': 'a.wav'}"),
    "a missing picture in a document": (line(b'{"parts": ["a", {"file_name": "x.png"}]}'), "missing file: x.png"),
    "an empty text in a document": (line(b'{"parts": [{"text": ""}, {"file_name": "0.png"}]}'), "empty caption"),
    "a csv quote never closed": (csv(b'0.png,"bad'), "broken metadata"),
    "a csv row too short": (csv(b"0.png"), "broken metadata: 1 columns, the header has 2"),
    "a csv row too long": (csv(b"0.png,a,b"), "broken metadata: 3 columns, the header has 2"),
    "a csv row in Latin-1": (csv(b"0.png,caf\xe9"), "bad UTF-8"),
    "a csv row without caption": (csv(b"0.png,"), "empty caption"),
    "letters after a csv quote": (csv(b'0.png,"a"b'), "broken metadata: not CSV"),
}

# ----------------------------------------------------------------------------------------------------------------- tars


def member(name: str, data: bytes, **values) -> bytes:
    """Return one tar member: its header and its padded data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in values.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def example(name: str, caption: bytes | None = b"good", image: bytes | None = None, **extra: bytes) -> bytes:
    """Return the members of one example; extra=(extension, data)."""
    image = encoded(seed=len(name)) if image is None else image
    members = {"png": image, "txt": caption, **extra}
    return b"".join(member(f"{name}.{kind}", data) for kind, data in members.items() if data is not None)


def tar(*pieces: bytes, end: bytes = bytes(1024)) -> Callable[[pathlib.Path], str]:
    """Return a maker of a tar with good examples around the given bytes."""

    def make(root):
        (root / "0.tar").write_bytes(example("a") + b"".join(pieces) + example("zz") + end)
        return str(root / "0.tar")

    return make


def _two(second: bytes) -> Callable[[pathlib.Path], str]:
    """Return a maker of a good tar, and of another file that calls itself a tar."""

    def make(root):
        tar()(root)
        (root / "1.tar").write_bytes(second)
        return str(root / "{0..1}.tar")

    return make


def _negative(size: int) -> bytes:
    """Return a member whose size is negative, which sends old tarfile back for ever (CVE-2025-8194)."""
    head = bytearray(member("bad.png", b""))
    head[124:136] = (size + (1 << 96)).to_bytes(12, "big")
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


TARS = {
    "a tar cut in a picture": (_two(example("a")[:700]), "unreadable tar member: a.png: unexpected end of data"),
    "a damaged header": (tar(b"\xff" * 100 + example("bad")[100:]), "missing file: no jpg"),
    "no tar at all": (_two(b"no tar " * 1000), "unreadable tar: no member in it"),
    "an empty tar file": (_two(b""), "unreadable tar: "),
    "a compressed tar": (_two(zlib.compress(example("a"), wbits=31)), "unreadable tar: no member in it"),
    "a caption in Latin-1": (tar(example("bad", b"caf\xe9")), "bad UTF-8: byte 0xe9 at 3"),
    "a tar caption of nothing": (tar(example("bad", b"")), "empty caption"),
    "no caption member": (tar(example("bad", None)), "missing caption: no 'caption'"),
    "no caption in the json": (tar(example("bad", None, json=b'{"caption": null}')), "missing caption"),
    "a broken json member": (tar(example("bad", json=b"{")), "broken metadata: not JSON"),
    "a json member that is a list": (tar(example("bad", json=b"[]")), "broken metadata: a JSON list"),
    "half a surrogate in json": (tar(example("bad", None, json=rb'{"caption": "\ud800"}')), "lone surrogate"),
    "no picture member": (tar(member("bad.txt", b"a")), "missing file: no jpg, jpeg, png, webp member"),
    "a broken picture member": (tar(example("bad", image=encoded()[:50])), "broken picture"),
    "a link for a picture": (
        tar(member("bad.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("bad.txt", b"a")),
        "unreadable tar member: bad.png: a link, device or sparse file",
    ),
    "a negative size": (tar(_negative(-4096), member("bad.txt", b"a")), "unreadable tar member: bad.png: -4096 bytes"),
    "a member of 20 GB": (_two(member("bad.png", b"", size=20 * 2**30)), "bytes, limit"),
}

ROWS = [Case(name, _file(data), message) for name, (data, message) in PICTURES.items()]
ROWS += [Case(name, make, message) for name, (make, message) in (FOLDERS | TARS).items()]

# -------------------------------------------------------------------------------------------------- nothing can be done


def _write(name: str, data: bytes) -> Callable[[pathlib.Path], str]:
    def make(root):
        (root / name).write_bytes(data)
        return str(root)

    return make


def _both(root: pathlib.Path) -> str:
    (root / "metadata.csv").write_bytes(b"file_name,text\n")
    return folder(root)


def setting(**values) -> Callable[[pathlib.Path], dict]:
    """Return a maker of a good folder and one bad setting."""
    return lambda root: {"source": folder(root), **values}


SOURCES = [
    Case("no source", lambda _: "", "source '': no such folder; a source is scenes:easy"),
    Case("no such folder", lambda root: str(root / "none"), "no such folder; a source is"),
    Case("a folder without metadata", str, "no metadata.jsonl or metadata.csv in it; write one line per picture"),
    Case("two kinds of metadata", _both, "holds both metadata.jsonl and metadata.csv; keep one"),
    Case("empty metadata", _write("metadata.jsonl", b"\n\n"), "holds no rows"),
    Case("no csv header", _write("metadata.csv", b""), "no column 'file_name'"),
    Case("a csv header without captions", _write("metadata.csv", b"file_name,label\n"), "no column 'text'"),
    Case("a csv header twice", _write("metadata.csv", b"file_name,text,text\n"), "two columns have the same name"),
    Case(
        "a csv header in UTF-16", _write("metadata.csv", "file_name,text\n".encode("utf-16")), "no CSV header in UTF-8"
    ),
    Case(
        "only bad rows", _write("metadata.jsonl", b"{}\n"), "none of 1 rows is usable; first: metadata.jsonl:1: missing"
    ),
    Case("the metadata file", lambda root: folder(root) + "/metadata.jsonl", "give the folder that it lies in"),
    Case("no such tar", lambda root: str(root / "a.tar"), "no such file"),
    Case("a gap in the tars", lambda root: tar()(root).replace("0.tar", "{0..2}.tar"), "(2 of 3 missing)"),
    Case("no tar matches", lambda root: str(root / "*.tar"), "no .tar file matches"),
    Case("braces that count down", lambda root: str(root / "{9..0}.tar"), "must count upwards"),
    Case("braces without end", lambda root: str(root / "{0..99999}-{0..99999}.tar"), "limit 100000"),
    Case("a compressed source", lambda root: str(root / "a.tar.gz"), "compressed; unpack it to .tar first"),
    Case("an address", lambda _: "https://example.com/a.tar", "download it first"),
    Case(
        "a level of scenes",
        lambda _: "scenes:hard",
        "use scenes:easy, scenes:full, scenes:rare, scenes:captions or scenes:tasks",
    ),
    Case("no tfds set", lambda root: {"source": "tfds:no_such_set", "tfds_dir": str(root)}, "tensorflow.org/datasets"),
    Case("a resolution of 0", setting(resolution=0), "prepare.resolution = 0: must be from 1 to 4096 pixels"),
    Case("a negative count", setting(count=-1), "prepare.count = -1: must be 0"),
    Case("shares over 1", setting(validation=0.6, test=0.5), "must be >= 0 and add up to < 1"),
]
