"""Files of strangers: runs, tokenizers, pipelines, checkpoints and recipes that are damaged or hostile.

Each is refused in a sentence, and nothing in them is executed: whatever could run would make a file.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from faults.commands import TINY
from faults.harness import Outcome, latelier, spread

TOKENIZER, PIPELINE = "tokenizer", "pipeline"
WEIGHTS, STATISTICS = "diffusion_pytorch_model.safetensors", "latent_statistics.json"
OPEN = {  # commands that open a part of the run `r`
    TOKENIZER: ["reconstruct r p.png --size 32 --out o.png", "inspect r --data emoji --size 32 --samples 8 --out o",
                "evaluate r"],
    PIPELINE: ["sample r --count 1 --steps 1 --out o", "evaluate r"],
}  # fmt: skip
PLACES = {TOKENIZER: ["r/tokenizer"], PIPELINE: ["r/pipeline/denoiser", "r/pipeline/conditioner"]}  # of weights
Change = Callable[[Path], None]


class Case(NamedTuple):
    """A hostile file, and the command that reads it."""

    row: str
    what: str
    change: Change  # of a folder that has a copy of the run, `r`
    command: str


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


STATISTICS_FILES = (
    "", "[", "null", "[]", "5", '"x"', "{}", '{"mean": [0, 0, 0, 0]}', '{"mean": [NaN, 0, 0, 0], "std": [1, 1, 1, 1]}',
    '{"mean": [0, 0, 0, 0], "std": [0, 1, 1, 1]}', '{"mean": [0, 0, 0, 0], "std": [-1, 1, 1, 1]}',
    '{"mean": [0, 0, 0, 0], "std": [1, Infinity, 1, 1]}', '{"mean": [0], "std": [1]}', '{"mean": 0, "std": 1}',
    '{"mean": ["a", "b", "c", "d"], "std": [1, 1, 1, 1]}', '{"mean": {"a": 1}, "std": [1, 1, 1, 1]}',
    '{"mean": [[0, 0, 0, 0]], "std": [[1, 1, 1, 1]]}', '{"mean": [1e999, 0, 0, 0], "std": [1, 1, 1, 1]}',
)  # fmt: skip
HUGE = 10**9
CONFIGS: list[tuple[str, Any]] = [
    *(("depth", value) for value in (-4, 0, 2, HUGE, 10**30, "x", None, [1], 1.5)),
    *(("dim", value) for value in (-32, 0, 33, 36, 64, HUGE, 10**5, 10**30, "x", None, [32], float("nan"))),
    *(("heads", value) for value in (-2, 0, 5, HUGE, "x", None)),
    *(("patch_size", value) for value in (-8, 0, 4, HUGE, "x", None)),
    *(("mlp_ratio", value) for value in (-1, 0.5, HUGE, 1e308, float("nan"), float("inf"), "x", None)),
    *(("in_channels", value) for value in (-3, 0, 5, HUGE, "x")),
]
CLASSES = ("", None, 5, [], ["VMAE"], {}, "logging", "os", "Foo", "__class__", "DiffusionPipeline", "DDPMScheduler",
           "AutoencoderKL", "AutoencoderDC", "UNet2DModel", "MAETok", "IdentityTokenizer")  # fmt: skip
ENTRIES: tuple[Any, ...] = (
    ["os", "system"], ["subprocess", "Popen"], ["builtins", "eval"], ["diffusers", "logging"], ["torch.nn", "Linear"],
    ["transformers", "BertModel"], ["diffusers", "StableDiffusionPipeline"], ["../../x", "Y"], ["evil", "Evil"],
    ["latelier.denoisers.dit"], ["latelier.denoisers.dit", "SIZES"], [["a"], ["b"]], [1, 2], [], None, 5, {"a": 1},
)  # fmt: skip
INDEX: list[tuple[str, Any]] = [
    *((name, entry) for name in ("tokenizer", "denoiser", "scheduler", "conditioner") for entry in ENTRIES),
    ("tokenizer", [None, None]), ("denoiser", [None, None]), ("scheduler", ["diffusers", "AutoencoderKL"]),
    ("_class_name", []), ("_class_name", ["evil", "Evil"]), ("_class_name", None),
    *(("statistics", json.loads(text)) for text in STATISTICS_FILES[3:] if text not in ("[]", "{}")),
    *((side, value) for side in ("height", "width") for value in (0, -8, 33, 1.5, HUGE, "x", None, [32])),
    *(("process", value) for value in ([1], "x", 5, {"kind": "x"}, {"shift": float("nan")}, {"shift": -1},
                                       {"kind": "ddpm", "beta_start": 5}, {"foo": 1}, {"kind": ["flow"]})),
    *(("dropped", value) for value in (5, "x", [1], {"a": 1})),
]  # fmt: skip
JSON = ("", "[", "[]", "null", '"x"', "5", "[" * 100_000, '{"_class_name": "VMAE"')
MANIFESTS = ("", "[", "5", '{"files": {"x": 3}}', '{"files": {"config.json": {}}}', '{"files": {"config.json": null}}',
             '{"files": {"nothere": {"size": 1, "sha256": "0"}}}', '{"files": {"config.json": {"size": 3}}}',
             '{"files": {"/etc/hostname": {"size": 1, "sha256": "0"}}}')  # fmt: skip
BOMB = ", ".join(f"&x{i} [{', '.join(['lol'] * 9 if i == 0 else [f'*x{i - 1}'] * 9)}]" for i in range(12))
RECIPES = {
    "python tags": "name: !!python/object/apply:os.system ['touch executed']",
    "python module": "name: !!python/module:evil",
    "a bomb of aliases": "name: x\nseed: [" + BOMB + "]",
    "a bomb in a model": json.dumps(TINY)[:-1] + ", x: [" + BOMB + "]}",
    "contains itself": "&a {name: x, data: *a}",
    "contains itself deeply": "name: x\ndata: &a {source: *a}",
    "a million brackets": "[" * 1_000_000,
    "merge keys of a number": "<<: 5\nname: x",
    "two documents": "name: x\n---\nname: y",
    "a list as a key": "? [a]\n: b",
    "null as a key": "~: 5",
    "numbers as keys": json.dumps({**TINY}).replace('"name"', "5"),
    "a date as a name": "name: 2020-01-01",
    "a path as a tokenizer": json.dumps({**TINY, "tokenizer": {"kind": "pretrained", "path": "/etc"}}),
    "traversal as a tokenizer": json.dumps({**TINY, "tokenizer": {"kind": "pretrained", "path": "../../../../etc"}}),
    "a folder of the system as data": json.dumps({**TINY, "data": {"source": "/etc/ssl"}}),
    "nul in a path": json.dumps({**TINY, "data": {"source": "a\0b"}}),
    "a long path": json.dumps({**TINY, "data": {"source": "a" * 5000}}),
    "a long name": json.dumps({**TINY, "name": "a" * 5000}),
}
NAMES = """patch_embed.proj.weight decoder_embed.weight from_latent.weight blocks.0.mlp.fc1.weight pos_embed
post_quant_conv.weight quant_conv.weight encoder.model.patch_embed.proj.weight encoder.latent_tokens
encoder.model.blocks.0.mlp.fc1.weight decoder_pred.weight x_embedder.proj.weight final_layer.linear.weight
y_embedder.embedding_table.weight quantize.embedding.weight encoder.down.0.block.0.conv1.weight
encoder.conv_in.weight decoder.conv_out.weight decoder.conv_in.weight encoder.conv_out.weight main.0.weight
main.8.weight betas scale_factor transformer.token_emb.weight transformer.pos_emb.emb.weight
transformer.attn_layers.layers.0.1.to_q.weight decoder.project_out.op_list.0.weight
encoder.project_in.conv.weight"""
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {  # of checkpoints to convert
    "vectors": dict.fromkeys(NAMES.split(), (3,)),
    "numbers in names": {"blocks.x.mlp.fc1.weight": (2, 2), "patch_embed.proj.weight": (8, 3, 8, 8),
                         "decoder_embed.weight": (8, 8), "from_latent.weight": (8, 4), "main.x.weight": (1,),
                         "main.0.weight": (8, 3, 4, 4), "x_embedder.proj.weight": (8, 4, 2, 2), "in_blocks.x.y": (1,),
                         "final_layer.linear.weight": (16, 8), "encoder.stages.x.y": (1,)},
    "block 10**9": {f"blocks.{HUGE}.mlp.fc1.weight": (2, 2), "patch_embed.proj.weight": (8, 3, 8, 8),
                    "decoder_embed.weight": (8, 8), "from_latent.weight": (8, 4),
                    "x_embedder.proj.weight": (8, 4, 2, 2), "final_layer.linear.weight": (16, 8),
                    "pos_embed": (1, 16, 8), f"main.{HUGE}.weight": (1, 1, 1, 1),
                    "main.0.weight": (8, 3, 4, 4), f"encoder.stages.{HUGE}.op_list.0.x": (1,)},
    "empty tensors": {"patch_embed.proj.weight": (0, 0, 0, 0), "decoder_embed.weight": (0, 0), "pos_embed": (0, 0, 0),
                      "x_embedder.proj.weight": (0, 0, 0, 0), "final_layer.linear.weight": (0, 0),
                      "from_latent.weight": (0, 0), "blocks.0.mlp.fc1.weight": (0, 0), "main.0.weight": (0, 0, 0, 0)},
}  # fmt: skip
KINDS = """vmae maetok rae sit lightning-dit maetok-sit dcae dcae-sit usit uvit ldm ldm-kl ldm-vq patchgan ldm-unet
ldm-text"""


def _safetensors(shapes: dict[str, tuple[int, ...]], numbers: bytes | None = None) -> bytes:
    """A file with tensors of zeros, or a header that claims these shapes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (bytes(offset) if numbers is None else numbers)


def _zipped(content: bytes, *others: str) -> bytes:
    """A file as `torch.save` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
            for name in others:
                archive.writestr(f"archive/{name}", b"\0" * 64)
        return path.read_bytes()


FILES = {
    "empty": b"", "zeros": bytes(1000), "noise": bytes(range(256)) * 9, "HTML": b"<html><body>404</body></html>" * 20,
    "code in a pickle": pickle.dumps(Evil()), "code in a dict": pickle.dumps({"state_dict": {"x": Evil()}}),
    "code in a zip": _zipped(pickle.dumps({"model": Evil()})), "half a pickle": pickle.dumps({"x": [1, 2, 3]})[:-4],
    "a pickle of text": pickle.dumps({"state_dict": {"a": "b"}}), "a zip of nothing": _zipped(b""),
    "TorchScript": _zipped(pickle.dumps({}), "constants.pkl"),
    "a header of 2**62 bytes": struct.pack("<Q", 2**62) + b"{}",
    "a header that is none": struct.pack("<Q", 8) + b"notjson!",
    "a deep header": struct.pack("<Q", 100_000) + b"[" * 100_000, "no tensors": _safetensors({}),
    "a shape of 10**12": _safetensors({"x": (10**6, 10**6)}, b""), "other tensors": _safetensors({"x": (2, 2)}),
}  # fmt: skip


def outcomes(sample: bool) -> list[Outcome]:
    """Every hostile file, or some of each kind."""
    folder = Path(tempfile.mkdtemp(prefix="latelier-strangers-"))
    (folder / "tiny.yaml").write_text(json.dumps({**TINY, "runs": str(folder)}))
    if made := latelier(["run", "tiny.yaml"], folder).clean():
        return [Outcome("files of strangers", "the run that they are made of", made)]
    for name in ("latents", "checkpoints", "previews", "tensorboard"):
        shutil.rmtree(folder / "tiny" / name)
    Image.new("RGB", (40, 40), (200, 100, 0)).save(folder / "p.png")

    def judge(numbered: tuple[int, Case]) -> Outcome:
        number, case = numbered
        place = folder / str(number)
        shutil.copytree(folder / "tiny", place / "r")
        shutil.copy(folder / "p.png", place)
        case.change(place)
        done = latelier(case.command.split(), place, timeout=60)
        ran = "something was executed" if list(place.rglob("executed")) else ""
        shutil.rmtree(place)
        return Outcome(case.row, f"{case.what}: {case.command}", ran or done.refused())

    cases = list(enumerate(_cases()))
    found = spread(judge, cases[:: len(cases) // 20] if sample else cases)
    shutil.rmtree(folder)
    return found


def _cases() -> Iterator[Case]:
    """All hostile files, each given to one of the commands that open it."""
    commands = {part: cycle(words) for part, words in OPEN.items()}

    def opened(row: str, what: str, part: str, change: Change) -> Case:
        return Case(row, what, change, next(commands[part]))

    for content in STATISTICS_FILES:
        yield opened("latent statistics", content, TOKENIZER, _write(f"r/tokenizer/{STATISTICS}", content.encode()))
    for key, value in CONFIGS:
        what = f"{key} = {str(value)[:40]}"
        yield opened("config", what, TOKENIZER, _set("r/tokenizer/config.json", key, value))
        yield opened("config", f"denoiser's, {what}", PIPELINE, _set("r/pipeline/denoiser/config.json", key, value))
    for name in CLASSES:
        yield opened("config", f"class {name}", TOKENIZER, _set("r/tokenizer/config.json", "_class_name", name))
    for key, value in INDEX:
        what = f"{key} = {str(value)[:60]}"
        yield opened("model_index.json", what, PIPELINE, _set("r/pipeline/model_index.json", key, value))
    for part, folders in PLACES.items():
        for folder in folders:
            for name, content in FILES.items():
                yield opened("weights", f"{folder}, {name}", part, _write(f"{folder}/{WEIGHTS}", content))
                yield opened("pickled weights", f"{folder}, {name}", part, _pickled(folder, content))
            for name, change in DAMAGES.items():
                yield opened("published folder", f"{folder}, {name}", part, change(f"{folder}/{WEIGHTS}"))
                yield opened("published folder", f"{folder} config, {name}", part, change(f"{folder}/config.json"))
            yield opened("weights", f"{folder}, not finite", part, _not_finite(f"{folder}/{WEIGHTS}"))
            yield opened("weights", f"{folder}, shards elsewhere", part, _shards(folder))
            for name, target in (("endless", "/dev/zero"), ("a folder", "/etc"), ("dangling", "/nowhere")):
                yield opened("links", f"{folder}, {name}", part, _link(f"{folder}/{WEIGHTS}", target))
                yield opened("links", f"{folder} config, {name}", part, _link(f"{folder}/config.json", target))
        for content in MANIFESTS:
            yield opened("manifest", content, part, _raw(f"r/{part}/manifest.json", content.encode()))
    for path in ("tokenizer/config.json", "pipeline/model_index.json", "pipeline/denoiser/config.json",
                 "pipeline/conditioner/config.json", "pipeline/scheduler/scheduler_config.json"):  # fmt: skip
        for content in JSON:
            change = _write(f"r/{path}", content.encode())
            yield opened("JSON", f"{path} is {content[:20]}", path.split("/")[0], change)
    for name, content in FILES.items():
        for kind, file in (("vmae", "c.ckpt"), ("ldm", "c.pth"), ("sit", "c.safetensors")):
            yield Case("checkpoint to convert", name, _raw(file, content), f"convert {kind} {file} o")
        yield Case("recipe of a run", name, _raw("r/recipe.yaml", content), "recipe show r")
        yield Case("recipe of a run", name, _raw("r/recipe.yaml", content), "sample r --count 1")
    for name, text in RECIPES.items():
        for command in ("recipe show x.yaml", "check x.yaml"):
            if "show" not in command or not text.startswith("{") or "a long name" in name or "keys" in name:
                yield Case("recipe", name, _raw("x.yaml", text.encode()), command)
    for kind in KINDS.split():
        what = f"a tokenizer of ours as {kind}"
        yield Case("checkpoint to convert", what, _nothing, f"convert {kind} r/tokenizer/{WEIGHTS} o")
        for name, shapes in SHAPES.items():
            change = _raw("c.safetensors", _safetensors(shapes))
            yield Case("checkpoint to convert", f"{name} as {kind}", change, f"convert {kind} c.safetensors o")


def _raw(path: str, content: bytes) -> Change:
    """A file with this content."""

    def change(place: Path) -> None:
        (place / path).write_bytes(content)

    return change


def _write(path: str, content: bytes) -> Change:
    """The same in a published folder, which is no longer one: it has no manifest."""

    def change(place: Path) -> None:
        (place / path).write_bytes(content)
        _unpublish(place)

    return change


def _unpublish(place: Path) -> None:
    for path in place.rglob("manifest.json"):
        path.unlink()


def _set(path: str, key: str, value: Any) -> Change:
    """Another value in a JSON file; beside a pipeline lies code that it may name."""

    def change(place: Path) -> None:
        _unpublish(place)
        tree = json.loads((place / path).read_text())
        (place / path).write_text(json.dumps({**tree, key: value}))
        for folder in (place, place / "r/pipeline", place / "r/pipeline/denoiser", place / "r/pipeline/tokenizer"):
            (folder / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")

    return change


def _pickled(folder: str, content: bytes) -> Change:
    """Weights that are a pickle, and no others."""

    def change(place: Path) -> None:
        _unpublish(place)
        (place / folder / WEIGHTS).unlink()
        (place / folder / "diffusion_pytorch_model.bin").write_bytes(content)

    return change


def _shards(folder: str) -> Change:
    """Weights in several files, which are somewhere else."""

    def change(place: Path) -> None:
        _unpublish(place)
        (place / folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {"x": "../../../../../../../../etc/hostname", "y": "/etc/hostname"}}
        (place / folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


def _link(path: str, target: str) -> Change:
    def change(place: Path) -> None:
        _unpublish(place)
        (place / path).unlink()
        (place / path).symlink_to(target)

    return change


def _not_finite(path: str) -> Change:
    def change(place: Path) -> None:
        _unpublish(place)
        content = (place / path).read_bytes()
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        (place / path).write_bytes(content[:begin] + b"\xff" * (len(content) - begin))

    return change


def _removed(path: str) -> Change:
    return lambda place: (place / path).unlink()


def _halved(path: str) -> Change:
    return lambda place: os.truncate(place / path, (place / path).stat().st_size // 2)


def _flipped(path: str) -> Change:
    def change(place: Path) -> None:
        content = bytearray((place / path).read_bytes())
        content[-20] ^= 1
        (place / path).write_bytes(content)

    return change


def _nothing(place: Path) -> None:
    """The file is as it was; the command is wrong."""


DAMAGES = {"missing": _removed, "half": _halved, "another bit": _flipped}
