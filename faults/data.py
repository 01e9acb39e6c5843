"""Data that nobody means to train on: links, archives, headers, arrays, boxes, captions, paths.

Each case is a folder of 40 good images with something beside or instead of them, and a real command on it. The command
must refuse it in one sentence, or do its work and name in `skipped.jsonl` exactly what cannot be read. An audit hook
writes down every file that is opened in the folder `outside`, which no source names: there must be none.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from faults.harness import Done, Outcome, latelier, spread
from faults.junk import (
    IMAGES,
    TRAINING,
    array,
    captions,
    coco,
    image,
    link,
    maps,
    parquet,
    put,
    rows,
    split,
    tall_png,
    tar,
    wide_bmp,
    wide_tiff,
    yolo,
)  # fmt: skip

VMAE = {"dim": 32, "depth": 1, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
SHORT = {"images": 16, "batch": 8, "lr": 1e-3, "precision": "fp32", "ema": 0.9, "preview_every": 8}
RECIPE: dict[str, Any] = {
    "name": "it",
    "runs": "runs",
    "data": {"source": "images", "image_size": 32, "workers": 0, "max_skipped": 0.1},
    "tokenizer": {
        "kind": "vmae", "preset": "vmae-f8d16-tiny", "model": {**VMAE, "latent_channels": 4}, "perceptual_weight": 0,
        **SHORT,
    },
    "denoiser": {"size": "XS", "model": {"dim": 32, "depth": 1, "heads": 2}, "condition": "none", **SHORT},
    "sample": {"steps": 2, "count": 4, "batch": 4, "guidance": 1.0},
    "evaluate": {"samples": 8, "batch": 8, "metrics": ["psnr"]},
}  # fmt: skip
TEXT = {"kind": "text", "dim": 32, "layers": 1, "heads": 1, "vocabulary_size": 300}


class Expected(NamedTuple):
    """What the command is to do: its work, or to refuse it."""

    refused: str = ""  # words of the sentence
    says: str = ""  # words of a command that does its work
    skipped: tuple[str, ...] = ()  # ends of the names in skipped.jsonl


WORKS = Expected()


def refuses(words: str) -> Expected:
    return Expected(refused=words)


def skips(*names: str) -> Expected:
    return Expected(skipped=names)


Planted = tuple[str, Callable[[], object], Expected]  # its name, what is done in a folder with `images`, the outcome


@dataclass(frozen=True)
class Case:
    """One injection, and the command that meets it."""

    row: str
    what: str
    plant: Callable[[], object]
    expected: Expected
    changes: dict[str, Any] = field(default_factory=dict)  # of the recipe: {"data.source": ...}
    command: str = "check"
    seconds: float = 60  # it must take less


def group(row: str, cases: Sequence[Planted], changes: dict[str, Any] | None = None, **options: Any) -> list[Case]:
    """Cases of one row of the table with the same changes of the recipe."""
    return [Case(row, *case, changes or {}, **options) for case in cases]


def outcomes(sample: bool) -> list[Outcome]:
    """All cases, or every sixth."""
    return spread(_judge, cases()[::6] if sample else cases())


def _judge(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="latelier-faults-") as name:
        folder = Path(name)
        tree = json.loads(json.dumps(RECIPE))
        for key, value in case.changes.items():
            section, _, entry = key.partition(".")
            tree[section][entry] = value
        (folder / "it.yaml").write_text(yaml.safe_dump(tree))

        def prepare() -> None:
            Path("images").mkdir()
            Path("outside").mkdir()
            Path("outside", "secret.png").write_bytes(image(7))
            for i in range(IMAGES):
                Path("images", f"{i:02d}.png").write_bytes(image(i))
            case.plant()
            opened = os.open("opened", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            outside = os.path.realpath("outside")

            def watch(event: str, arguments: tuple) -> None:
                if event == "open" and isinstance(arguments[0], str | bytes):
                    path = os.path.realpath(os.fsdecode(arguments[0]))
                    if path.startswith(outside):
                        os.write(opened, f"{path}\n".encode())

            sys.addaudithook(watch)

        environment = {"HF_DATASETS_CACHE": str(folder / "cache")}
        done = latelier([case.command, "it.yaml"], folder, 2 * case.seconds, prepare=prepare, environment=environment)
        return Outcome(case.row, case.what, _failure(case, done, folder))


def _failure(case: Case, done: Done, folder: Path) -> str:
    expected = case.expected
    if outside := (folder / "opened").read_text():
        return f"read outside of the source: {outside.splitlines()[0]}"
    if done.seconds > case.seconds:
        return f"took {done.seconds:.0f} s"
    if expected.refused:
        late = "refused after the training" if (folder / "runs/it/tokenizer").exists() else ""
        other = "" if expected.refused in done.words else f"another sentence: {done.words[-300:]}"
        return done.refused() or late or other
    if wrong := done.clean():
        return wrong
    if expected.says not in done.words:
        return f"does not say {expected.says!r}: {done.words[:300]}"
    log = folder / "runs/it/skipped.jsonl"
    names = [json.loads(line)["name"] for line in log.read_text().splitlines()] if log.is_file() else []
    known = all(any(name.endswith(end) for name in names) for end in expected.skipped)
    return "" if known and len(names) == len(expected.skipped) else f"skipped {sorted(names)}"


# -- the cases ---------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [*_folders(), *_headers(), *_archives(), *_streams(), *_boxes(), *_captions(), *_paths(), *_held_out()]


def _folders() -> list[Case]:
    def table(text: str) -> Callable[[], None]:
        return lambda: put("images/metadata.jsonl", text)

    once = Expected(says=f"Data, training: {TRAINING} images")
    return group(
        "links and special files in a folder",
        [
            ("a loop of links", lambda: link("images/a/loop", ".."), once),
            ("folders that hold each other", lambda: (link("images/b", "../x/b"), link("x/b/a", "../../images")), once),
            ("a link to nothing", lambda: link("images/gone.png", "nothing.png"), skips("gone.png")),
            ("a link to itself", lambda: link("images/self.png", "self.png"), skips("self.png")),
            ("a link to /dev/zero", lambda: link("images/zero.png", "/dev/zero"), skips("zero.png")),
            ("a pipe", lambda: os.mkfifo("images/pipe.png"), skips("pipe.png")),
            ("a folder named like an image", lambda: Path("images/folder.png").mkdir(), WORKS),
            ("a terabyte of holes", lambda: [put("images/t.jpg"), os.truncate("images/t.jpg", 2**40)], skips("t.jpg")),
            ("metadata that is a link to nothing", lambda: link("images/metadata.jsonl", "gone"), WORKS),
            ("metadata that names files outside", table('{"file_name": "../outside/secret.png", "text": "a"}'), WORKS),
            ("metadata that is no table", table("[1, 2]"), refuses("needs a column `file_name`")),
        ],
    )  # fmt: skip


def _headers() -> list[Case]:
    def png(width: int, height: int) -> Callable[[], None]:
        return lambda: put("images/x.png", tall_png(width, height))

    def npy(*shape: int, kind: str = "|u1") -> Callable[[], None]:
        return lambda: array("images/x.npy", shape, kind)

    def junk(*names: str) -> Callable[[], object]:
        return lambda: [put(f"images/{name}.png", b"junk") for name in names]

    many, every = [f"x{i}" for i in range(9)], [f"{i:02d}" for i in range(IMAGES)]
    return group(
        "lying headers and odd arrays",
        [
            ("an array of 2.7 TiB", npy(999_999, 999_999, 3), skips("x.npy")),
            ("an array of objects", npy(2, kind="|O"), skips("x.npy")),
            ("a float array", npy(16, 16, 3, kind="<f4"), skips("x.npy")),
            ("an array of four channels", npy(16, 16, 4), skips("x.npy")),
            ("an array of negative size", npy(-4, 16, 3), skips("x.npy")),
            ("a zip file named .npy", lambda: put("images/x.npy", b"PK\3\4" + b"x" * 99), skips("x.npy")),
            ("a good array", npy(16, 16, 3), WORKS),
            ("a PNG of 2 thousand million pixels a side", png(2**31 - 1, 2**31 - 1), skips("x.png")),
            ("a PNG of 10,000 pixels a side, without them", png(10_000, 10_000), skips("x.png")),
            ("a PNG without width", png(0, 24), skips("x.png")),
            ("a PNG without a header", lambda: put("images/x.png", image(3)[:8]), skips("x.png")),
            ("a wide BMP", lambda: put("images/x.bmp", wide_bmp()), skips("x.bmp")),
            ("a wide TIFF", lambda: put("images/x.tif", wide_tiff()), skips("x.tif")),
            ("half an AVIF", lambda: put("images/x.avif", image(3, "AVIF")[:150]), skips("x.avif")),
            ("more junk than max_skipped", junk(*many), refuses("cannot be read, more than data.max_skipped")),
            ("nothing but junk", junk(*every), refuses("cannot be read")),
        ],
    )  # fmt: skip


def _archives() -> list[Case]:
    row, broken, last = "archives and tables", refuses("cannot be opened"), f"row {IMAGES} of x."
    members = {f"{i:02d}.png": image(i) for i in range(IMAGES)}
    outside = {**members, "../outside/b.png": image(3)}, {"c.png": "outside/secret.png"}
    texts = {"a.txt": b"words", "b.txt": b"words"}

    def named(path: str) -> Callable[[], None]:
        return lambda: parquet("x.parquet", rows({"bytes": None, "path": os.path.abspath(path)}))

    def plain(values: list[Any]) -> Callable[[], None]:
        return lambda: parquet("x.parquet", values, typed=False)

    shards: list[Planted] = [
        ("junk as .tar", lambda: put("x.tar", b"junk" * 999), broken),
        ("an empty .tar", lambda: put("x.tar"), broken),
        ("a .tar without images", lambda: tar("x.tar", texts), refuses("no column")),
        ("half a .tar", lambda: (tar("x.tar", members), os.truncate("x.tar", 20_000)), broken),
        ("a .tar with paths and links outside", lambda: tar("x.tar", *outside), WORKS),
        ("a .tar with a bad image", lambda: tar("x.tar", {**members, "bad.png": b"junk"}), skips(f"{last}tar")),
    ]
    tables: list[Planted] = [
        ("junk as .parquet", lambda: put("x.parquet", b"PAR1junkPAR1"), broken),
        ("an empty .parquet", lambda: put("x.parquet"), broken),
        ("half a .parquet", lambda: (parquet("x.parquet", rows()), os.truncate("x.parquet", 3000)), broken),
        ("a .parquet without rows", lambda: parquet("x.parquet", []), broken),
        ("a .parquet of numbers", plain([5] * IMAGES), refuses("cannot be read")),
        ("a row that names a file", named("outside/secret.png"), skips(f"{last}parquet")),
        ("a row that names a good image", named("images/03.png"), skips(f"{last}parquet")),
        ("a column of file names", plain(["outside/secret.png"] * IMAGES), refuses("names a file")),
        ("a row of nothing", lambda: parquet("x.parquet", rows(None)), skips(f"{last}parquet")),
        ("a column of plain bytes", plain(list(members.values())), WORKS),
    ]
    gap, unnamed = {"data.source": "x-{000..001}.tar"}, {"data.source": "x.parquet", "data.label_key": "kind"}
    lone = ("shards in braces", lambda: tar("x-000.tar", members), refuses("shards are named by a glob, 'x-*.tar'"))
    lacking = ("a column that is not there", lambda: parquet("x.parquet", rows()), refuses("is no column"))
    shard = "folder/x.tar"
    inside = lambda: (Path("folder").mkdir(), tar(shard, members))  # noqa: E731
    return [
        *group(row, shards, {"data.source": "x.tar"}),
        *group(row, tables, {"data.source": "x.parquet"}),
        *group(row, [lone], gap),
        *group(row, [lacking], unnamed),
        *group(row, [("a folder of shards", inside, refuses("='folder/*.tar'"))], {"data.source": "folder"}),
    ]


def _streams() -> list[Case]:
    row, last = "streams", f"row {IMAGES} of x.parquet"
    secret = {"bytes": None, "path": "outside/secret.png"}
    streamed = {
        "data.streaming": True,
        "data.length": IMAGES + 1,
        "data.val_source": "x.parquet",
        "data.source": "x.parquet",
    }
    return group(
        row,
        [
            ("junk", lambda: put("x.parquet", b"junk" * 999), refuses("cannot be opened")),
            ("a row that names a file", lambda: parquet("x.parquet", rows(secret)), skips(last)),
        ],
        streamed,
        command="run",
    )  # fmt: skip


def _boxes() -> list[Case]:
    row, file = "boxes and maps", refuses("no COCO annotation file")
    layout = {"kind": "layout", "dim": 32, "layers": 1, "heads": 1}
    counted = Expected(says="Data, training: 1 boxes have no area")

    def box(*numbers: Any) -> Callable[[], None]:
        return lambda: coco(lambda told: told["annotations"][5].update(bbox=list(numbers)))

    def told(key: str, **values: Any) -> Callable[[], None]:
        return lambda: coco(lambda told: told[key][5].update(values))

    in_pixels: list[Planted] = [
        ("NaN", box(float("nan"), 4, 12, 12), skips("05.png")),
        ("infinity", box(4, 4, float("inf"), 12), skips("05.png")),
        ("negative size", box(12, 12, -8, 8), counted),
        ("no size", box(12, 12, 0, 0), counted),
        ("outside of the image", box(100, 100, 8, 8), counted),
        ("over every edge", box(-1e30, -1e30, 3e30, 3e30), WORKS),
        ("a number beyond all floats", box(10**400, 0, 1, 1), refuses("four numbers")),
        ("three numbers", box(1, 2, 3), refuses("four numbers")),
        ("COCO: a name that leads outside", told("images", file_name="../outside/secret.png"), WORKS),
        ("COCO: a category in a list", told("annotations", category_id=[1]), refuses("class [1]")),
        ("COCO: a list", lambda: put("boxes.json", "[]"), file),
        ("COCO: 100,000 brackets", lambda: put("boxes.json", "[" * 100_000), file),
        ("COCO: a width in words", told("images", width="wide"), refuses("has no width and height")),
    ]
    in_text: list[Planted] = [
        ("YOLO: NaN", lambda: yolo("0 nan 0.5 0.5 0.5"), skips("05.png")),
        ("YOLO: bytes", lambda: yolo(b"\xff\xfe\x00"), skips("05.png")),
        ("YOLO: four numbers", lambda: yolo("0 0.5 0.5 0.5"), refuses("05.txt, line 1")),
    ]
    planes: list[Planted] = [
        ("a map that cannot be read", lambda: (maps(), put("depth/05.png", b"junk")), skips("05.png")),
        ("a map that is missing", lambda: (maps(), Path("depth/05.png").unlink()), refuses("has no file for the")),
    ]  # fmt: skip
    depth = {"kind": "map", "map_channels": 3}
    return [
        *group(row, in_pixels, {"data.boxes": "boxes.json", "denoiser.condition": layout}),
        *group(row, in_text, {"data.boxes": "yolo", "denoiser.condition": layout}),
        *group(row, planes, {"data.maps": "depth", "denoiser.condition": depth}),
    ]


def _captions() -> list[Case]:
    def long() -> None:
        captions()
        for i in range(10):
            put(f"images/{i:02d}.txt", "long words " * 110_000)

    row, text = "captions", {"denoiser.condition": TEXT}
    one = lambda: captions(without=5)  # noqa: E731
    read: list[Planted] = [
        ("one is missing", one, refuses(f"1 of {TRAINING} images have no caption, the first 05.png")),
        ("one is no text", lambda: (captions(), put("images/05.txt", b"\xff\xfe\x00\xd8")), skips("05.png")),
        ("there are none", lambda: None, refuses("needs 'caption'")),
    ]
    return [
        *group(row, read, text),
        *group(row, [("one is missing, which is allowed", one, WORKS)], {**text, "data.empty_captions": True}),
        *group(row, [("one is missing, and nothing reads them", one, WORKS)]),
        *group(row, [("ten of 1.2 MB", long, WORKS)], text, command="run", seconds=30),
    ]


def _paths() -> list[Case]:
    missing = "no such folder"
    wrong = {
        "./imagez": "did you mean 'images'", "imagez/a": "did you mean 'images/a'", "images/other": missing,
        "/nothing/at/all": missing, "x" * 5000: missing, "~nobody/x": missing, "x.tar": "no such file",
    }  # fmt: skip
    plant = lambda: put("images/a/x.png", image(3))  # noqa: E731
    return [
        case
        for path, words in wrong.items()
        for case in group("paths", [(path[:20], plant, refuses(words))], {"data.source": path}, seconds=8)
    ]


def _held_out() -> list[Case]:
    row, good = "held-out images", [f"a/{i}.png" for i in range(8)]
    text = {"denoiser.condition": TEXT}
    checked: list[Planted] = [
        ("all are unreadable", lambda: split("a/bad.png"), refuses("1 of 1 images cannot be read")),
        ("as many as there are classes", lambda: split("a/1.png", "b/2.png"), Expected(says="2 classes: a 1, b 1.")),
    ]
    run: list[Planted] = [
        ("of other classes", lambda: split("images/1.png"), refuses("class 'images', which the training images do")),
        ("one is unreadable", lambda: split(*good, "a/bad.png"), skips("a/bad.png")),
    ]
    told: list[Planted] = [
        ("one is unreadable, with captions", lambda: (split(*good, "a/bad.png"), captions()), skips("a/bad.png")),
        (
            "without captions",
            lambda: (split(*good), captions("images/train")),
            refuses("the held-out images of images"),
        ),
    ]
    other = [("a split that is not there", split, refuses("no other folder"))]
    return [
        *group(row, checked),
        *group(row, run, command="run"),
        *group(row, told, text, command="run"),
        *group(row, other, {"data.val_split": "dev"}),
    ]
