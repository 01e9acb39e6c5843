"""Files that nobody means to train on, written into the working directory; `images` in it has good images."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGES, TRAINING = 40, 37  # how many good images there are; the others are held out


def image(shade: int, form: str = "PNG", size: tuple[int, int] = (24, 24)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, (6 * shade % 256, shade, 90)).save(file, form)
    return file.getvalue()


def put(name: str, content: bytes | str = b"") -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def link(name: str, target: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(target)


def array(name: str, shape: tuple[int, ...], kind: str = "|u1", content: bytes = b"\1" * 3072) -> None:
    """An array file whose header says what it likes."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    put(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content)


def tall_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes with a header of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 300)), (b"IEND", b""))
    body = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def wide_bmp() -> bytes:
    """A BMP whose header claims a width of two thousand million."""
    content = bytearray(image(3, "BMP"))
    struct.pack_into("<i", content, 18, 2_000_000_000)
    return bytes(content)


def wide_tiff() -> bytes:
    """A TIFF whose tag 256 claims the same."""
    content = bytearray(image(3, "TIFF"))
    where = next(i for kind in (3, 4) if (i := content.find(struct.pack("<HHI", 256, kind, 1))) >= 0)
    struct.pack_into("<HHII", content, where, 256, 4, 1, 2_000_000_000)
    return bytes(content)


def tar(name: str, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    with tarfile.open(name, "w") as file:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for member, target in (links or {}).items():
            info = tarfile.TarInfo(member)
            info.type, info.linkname = tarfile.SYMTYPE, target
            file.addfile(info)


def parquet(name: str, rows: list[Any], typed: bool = True, **columns: list[Any]) -> None:
    """Rows of `image`, as bytes or dicts, and other columns."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = datasets.Features(image=datasets.Image()).arrow_schema if typed else None
    table = pa.Table.from_pylist([{"image": row} for row in rows], schema)
    for key, values in columns.items():
        table = table.append_column(key, pa.array(values))
    pq.write_table(table, name)


def rows(*more: Any) -> list[Any]:
    """Those of all images, and others."""
    return [{"bytes": image(i), "path": None} for i in range(IMAGES)] + list(more)


def coco(change: Callable[[dict[str, Any]], object]) -> None:
    """A COCO file of a box in each image, changed."""
    told: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i:02d}.png", "width": 24, "height": 24} for i in range(IMAGES)],
        "annotations": [{"image_id": i, "bbox": [4, 4, 12, 12], "category_id": 1} for i in range(IMAGES)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    change(told)
    put("boxes.json", json.dumps(told))


def captions(folder: str = "images", without: int | None = None) -> None:
    """A text file beside each image below a folder."""
    for i, path in enumerate(sorted(Path(folder).rglob("*.png"))):
        if i != without:
            put(str(path.with_suffix(".txt")), f"the image number {i} of a few")


def yolo(text: str | bytes) -> None:
    """Text files beside the images; one has this text."""
    for i in range(IMAGES):
        put(f"images/{i:02d}.txt", "0 0.5 0.5 0.5 0.5\n")
    put("images/classes.txt", "thing\n")
    put("images/05.txt", text)


def maps() -> None:
    for i in range(IMAGES):
        put(f"depth/{i:02d}.png", image(i))


def split(*val: str) -> None:
    """The images as `train` of two classes, and others as `val`."""
    for i in range(IMAGES):
        put(f"images/train/{'ab'[i % 2]}/{i:02d}.png", Path(f"images/{i:02d}.png").read_bytes())
        Path(f"images/{i:02d}.png").unlink()
    for i, name in enumerate(val):
        put(f"images/val/{name}", image(i) if "bad" not in name else b"junk")
