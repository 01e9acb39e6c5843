"""Wrong command lines and recipes: each is refused in a sentence, and leaves no run behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.harness import Done, Outcome, latelier, spread

VMAE = {"dim": 32, "depth": 1, "heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
TINY: dict[str, Any] = {
    "name": "tiny",
    "runs": "runs",
    "data": {"source": "emoji", "image_size": 32, "length": 48},
    "tokenizer": {
        "kind": "vmae", "preset": "vmae-f8d16-tiny", "model": {**VMAE, "latent_channels": 4}, "images": 16, "batch": 8,
        "lr": 1e-3, "perceptual_weight": 0, "precision": "fp32", "ema": 0.9,
    },
    "denoiser": {
        "size": "XS", "model": {"dim": 32, "depth": 1, "heads": 2}, "images": 16, "batch": 8, "precision": "fp32",
        "ema": 0.9,
    },
    "sample": {"steps": 2, "count": 4, "batch": 4},
    "evaluate": {"samples": 16, "batch": 16, "metrics": ["psnr"]},
}  # fmt: skip
MAY_BE_ZERO = {  # all others may not
    "seed", "val_fraction", "max_skipped", "workers", "ignore_id", "crop_scale", "images", "betas", "weight_decay",
    "warmup", "final_lr", "ema", "log_every", "preview_every", "checkpoint_every", "perceptual_weight", "mask_ratio",
    "visible_weight", "kl_weight", "cosine_weight", "snapshots", "guidance", "guidance_interval", "last_step", "eta",
    "noise_levels", "weight", "start", "ahead", "lecam", "lecam_decay", "augment_share", "consistency", "full_share",
    "codebook_beta", "codebook_restart", "input_noise", "perceptual_warmup", "dropout", "low", "high", "mode", "fade",
}  # fmt: skip
MAY_BE_NEGATIVE = {"data.ignore_id", "sample.seed"}
SECTIONS = {  # of a recipe, by the overrides that make them
    "data": [], "tokenizer": [], "denoiser": [], "sample": [], "evaluate": [], "denoiser.process": [],
    "tokenizer.adversarial": ["tokenizer.adversarial={}"], "denoiser.prefixes": ["denoiser.prefixes={}"],
}  # fmt: skip
WITH: dict[str, dict[str, Any]] = {"tokenizer": {"adversarial": {}}, "denoiser": {"prefixes": {"lengths": [1]}}}
MODELS = """tokenizer.model.heads=5 tokenizer.model.dim=33 tokenizer.model.dim=34 tokenizer.model.heads=0
tokenizer.model.dim=0 tokenizer.model.dim=-32 tokenizer.model.depth=-1 tokenizer.model.patch_size=0
tokenizer.model.patch_size=64 tokenizer.model.latent_channels=0 tokenizer.model.latent_channels=-4
tokenizer.model.dim=wide tokenizer.model.dim=32.5 tokenizer.model.dim=.nan tokenizer.model.dim=.inf
tokenizer.model.dim=[32] tokenizer.model.dim=null tokenizer.model.decoder_heads=3 tokenizer.model.decoder_depth=-2
tokenizer.model.mlp_ratio=.nan tokenizer.model.mlp_ratio=-1 tokenizer.model.mlp_ratio=x tokenizer.model.mlp_ratio=1e308
tokenizer.model.width=3 tokenizer.model=5 tokenizer.model=[1] tokenizer.model={1:2} tokenizer.preset=vmae
denoiser.model.heads=5 denoiser.model.heads=0 denoiser.model.heads=-2 denoiser.model.dim=0 denoiser.model.dim=33
denoiser.model.dim=30 denoiser.model.depth=-1 denoiser.model.depth=x denoiser.model.mlp_ratio=.inf denoiser.patch=0
denoiser.patch=3 denoiser.model.norm=batch denoiser.model.mlp=relu denoiser.model.time_scale=.nan denoiser.size=XXL
denoiser.model.patch_size=-1 denoiser.model.foo=1 denoiser.model=x"""
OTHER_MODELS = {  # the words that choose a model, and its wrong arguments
    "tokenizer.kind=maetok tokenizer.preset=maetok-tiny-32 tokenizer.model": """latent_tokens=0 heads=3 dim=36
        positions=polar depth=-1 decoder_depth=-1 latent_channels=-1 decoder_drop_path=x""",
    "tokenizer.kind=conv tokenizer.preset=kl-f8c16-tiny tokenizer.model": """norm_num_groups=5 layers_per_block=-1
        layers_per_block=x block_out_channels=32 block_out_channels=[32,32,32,x] block_out_channels=[32]
        latent_channels=0 act_fn=sine down_block_types=[A,B,C,D] down_block_types=foo""",
    "tokenizer.kind=conv tokenizer.preset=vq-f8-small tokenizer.model": "num_vq_embeddings=-1 num_vq_embeddings=x",
    "tokenizer.kind=dcae tokenizer.preset=dcae15-f8c32-tiny tokenizer.model": """latent_channels=0
        encoder_block_out_channels=[1,2,3,4] encoder_block_types=Foo encoder_layers_per_block=[0,1]""",
    "denoiser.kind=uvit denoiser.model": "depth=3 dim=0 depth=-2 heads=7 dim=33 heads=x",
    "denoiser.kind=unet denoiser.size=tiny denoiser.model": """layers_per_block=-1 heads=5 block_out_channels=[1,2]
        norm_num_groups=7 attention_head_dim=0 block_out_channels=x""",
}
RECIPES = """name=.. name=. name= name=a/b name=../up name=... name=null name=5 name=[a] seed=-1
seed=99999999999999999999 seed=9223372036854775808 seed=x seed=1.5 seed=[ seed={ runs=/proc/nope runs=/dev/null
runs=[1] runs=null
data=5 data=null data.source=null data.source=nowhere data.source=./nowhere data.image_size=0 data.image_size=[32]
data.image_size=[32,32,32] data.image_size=[0,32] data.image_size=-8 data.image_size=100000000 data.image_size=36
data.image_size=x data.image_size=.nan data.channels=2 data.channels=0 data.channels=5 data.label_key=foo
data.caption_key=foo data.image_key=foo data.classes=[Dragons] data.classes=5 data.crop=round data.crop_scale=[2,3]
data.crop_scale=[0.5,0.4] data.crop_scale=[.nan,1] data.length=0 data.boxes=yolo data.streaming=true data.maps=m
data.backgrounds=plain data.flip=maybe tokenizer=null tokenizer=5 tokenizer={} tokenizer.kind=foo tokenizer.kind=[1]
tokenizer.kind=pretrained tokenizer.lr=[ tokenizer.lr=!!python/object:os.system tokenizer.lr=2024-99-99
tokenizer.train=nothing tokenizer.train=[foo] tokenizer.init=nowhere tokenizer.method=magic tokenizer.phases=[{}]
tokenizer.phases=[{"name":"a","images":-1}] tokenizer.phases=5 tokenizer.betas=[0.9] tokenizer.lrr=1
tokenizer.precision=fp8 denoiser.kind=foo denoiser.condition=clas denoiser.condition=5 denoiser.condition=[class,class]
denoiser.process.kind=x denoiser.process.prediction=v denoiser.snapshots=1000 denoiser.loss=l3
sample.sampler=foo sample.classes=5 sample.tile_stride=4 sample.guidance_interval=[0.5] evaluate.metrics=[foo]
evaluate.metrics=psnr,ssim evaluate.features=[] evaluate.metrics=[convergence] evaluate.modes=[0] evaluate.modes=5
evaluate.prefix_lengths=[-1] evaluate.features=[vgg99] noequals =5 .=5 a..b=1 name.deep=1 foo.bar=1"""
COMMANDS = """frobnicate
run
run nowhere
run {run}/nowhere
run p.png
run latin1.yaml
run utf16.yaml
run brackets.yaml
run list.yaml
run empty.yaml
run loop.yaml
run digits.yaml
run tags.yaml
run bytes.yaml
run .
run --foo tiny.yaml
train foo tiny.yaml
train denoiser tiny.yaml runs=elsewhere
encode nowhere
encode tiny.yaml runs=elsewhere
evaluate tiny.yaml runs=elsewhere
evaluate .
check nowhere
check p.png
check tiny.yaml denoiser.init=nowhere
check tiny.yaml tokenizer.init=nowhere
report
report nowhere
report emptyfolder
report p.png
recipe foo
recipe show
recipe show nowhere
recipe show p.png
recipe list foo
sample
sample nowhere
sample emptyfolder
sample p.png
sample {run} --size 0
sample {run} --size -8
sample {run} --size 33
sample {run} --size x
sample {run} --size 99999999
sample {run} --count 0
sample {run} --count -1
sample {run} --count x
sample {run} --steps 0
sample {run} --steps -3
sample {run} --guidance inf
sample {run} --guidance nan
sample {run} --guidance -1
sample {run} --guidance x
sample {run} --seed 1180591620717411303424
sample {run} --seed 9223372036854775807
sample {run} --seed x
sample {run} --seed -99999999999999999999
sample {run} --sampler foo
sample {run} --sampler ddim
sample {run} --classes Dragons
sample {run} --classes 99
sample {run} --classes -1
sample {run} --classes =
sample {run} --prompt cat
sample {run} --negative cat
sample {run} --layout owl
sample {run} --segmentation nowhere.png
sample {run} --map p.png
sample {run} --input foo
sample {run} --input foo=bar
sample {run} --input =
sample {run} --channels 0
sample {run} --channels 99
sample {run} --channels 2
sample {run} --tile 0
sample {run} --tile -1
sample {run} --tile 2 --tile-stride 3
sample {run} --tile-stride 1
sample {run} --preview 0
sample {run} --preview 99
sample {run} --preview 1 --preview-channels 0
sample {run} --preview 1 --preview-channels 99
sample {run} --out tiny.yaml
sample {run} --out tiny.yaml/below
sample {run} --foo
reconstruct
reconstruct {run}
reconstruct nowhere p.png
reconstruct emptyfolder p.png
reconstruct p.png p.png
reconstruct {run} nowhere.png --size 32
reconstruct {run} tiny.yaml --size 32
reconstruct {run} emptyfolder --size 32
reconstruct {run} p.png --size 0
reconstruct {run} p.png --size -8
reconstruct {run} p.png --size 33
reconstruct {run} p.png --size x
reconstruct {run} p.png --size 32 --out emptyfolder
reconstruct {run} p.png --size 32 --out tiny.yaml/below.png
reconstruct {run} p.png --size 32 --channels x
reconstruct {run} p.png --size 32 --channels 0
reconstruct {run} p.png --size 32 --channels 99
reconstruct {run} p.png --size 32 --channels ,
upscale
upscale p.png big.png
upscale p.png big.png --run nowhere
upscale p.png big.png --run {run}
upscale p.png big.png --run {run} --factor 0
upscale p.png big.png --run {run} --factor -2
upscale p.png big.png --run {run} --steps 0
upscale p.png big.png --run {run} --tile 0
upscale p.png emptyfolder --run {run}
inpaint
inpaint p.png p.png --run nowhere
inpaint p.png p.png --run {run}
inpaint p.png p.png --run {run} --guidance -1
inpaint p.png p.png --run {run} --seed x
inpaint p.png p.png --run {run} --out emptyfolder
inspect
inspect {run}
inspect nowhere --data emoji
inspect {run} --data nowhere --size 32 --out new
inspect {run} --data emoji --size 0 --out new
inspect {run} --data emoji --size -8 --out new
inspect {run} --data emoji --size 33 --out new
inspect {run} --data emoji --size 32 --samples 0 --out new
inspect {run} --data emoji --size 32 --samples -1 --out new
inspect {run} --data emoji --size 32 --samples x --out new
inspect {run} --data emoji --size 32 --out tiny.yaml
inspect {run} --data emoji --size 32 --out {run}
inspect {run} --data emoji --size 32 --out new evaluate.metrics=[foo]
inspect {run} --data emoji --size 32 --out new foo=1
inspect {run} --data emoji --size 32 --out new noequals
inspect {run} --data emoji --size 32 --out new data.label_key=foo
compare
compare {run} --data emoji
compare {run} {run} --data emoji --size 32 --out new
compare {run} nowhere --data emoji --size 0 --out new
compare {run} {run}/tokenizer --data emoji --size 32 --samples 0 --out new
compare {run} {run}/tokenizer --data nowhere --size 32 --out new
compare {run} {run}/tokenizer --data emoji --size 32 --name a --out new
compare {run} {run}/tokenizer --data emoji --size 32 --name a --name a --out new
compare {run} {run}/tokenizer --data emoji --size 32 --out tiny.yaml
compare {run} {run}/tokenizer --data emoji --size 33 --out new
compare nowhere elsewhere --data emoji --size 32 --out new
convert
convert nokind nowhere.ckpt new
convert nokind tiny.yaml new
convert vmae nowhere.ckpt new
convert vmae tiny.yaml new
convert vmae p.png new
convert vmae emptyfolder new
convert vmae bad.safetensors new
convert vmae {run}/tokenizer/diffusion_pytorch_model.safetensors new
convert vmae {run}/tokenizer/diffusion_pytorch_model.safetensors tiny.yaml
convert ldm {run}/tokenizer/diffusion_pytorch_model.safetensors new
convert dcae {run}/tokenizer/diffusion_pytorch_model.safetensors new --set heads=[
convert sit {run}/tokenizer/diffusion_pytorch_model.safetensors new --set heads
convert vmae tiny.yaml new --set =5
study
study nowhere
study p.png
study utf16.yaml
study list.yaml
study tiny.yaml
study ldmae_tokenizers --variant foo
study ldmae_tokenizers --only foo
study ldmae_tokenizers foo=1
study ldmae_tokenizers name=..
study ldmae_tokenizers budget.tokenizer.images=0"""


def outcomes(sample: bool) -> list[Outcome]:
    """Every wrong command, or a tenth of them."""
    folder = Path(tempfile.mkdtemp(prefix="latelier-commands-"))
    run = folder / "trained" / "tiny"
    _write_files(folder)
    made = latelier(["run", folder / "tiny.yaml", "runs=trained"], folder).clean()
    if made:
        return [Outcome("wrong commands", "the run that they are about", made)]

    def judge(case: tuple[int, str, list[str]]) -> Outcome:
        number, row, words = case
        words = [word.replace("{run}", str(run)) for word in words]
        place = folder / "places" / str(number)
        shutil.copytree(folder / "files", place)
        done = latelier(words, place, timeout=60)
        return Outcome(row, " ".join(words), done.refused() or _left(place, folder / "files", done))

    cases = [(number, row, words) for number, (row, words) in enumerate(_cases())]
    found = spread(judge, cases[:: len(cases) // 30] if sample else cases)
    shutil.rmtree(folder)
    return found


def _cases() -> Iterator[tuple[str, list[str]]]:
    for line in COMMANDS.splitlines():
        yield "wrong command line", line.split()
    for word in (RECIPES + " " + MODELS).split():
        yield "wrong recipe, run", ["run", "tiny.yaml", word]
    for chosen, wrong in OTHER_MODELS.items():
        for word in wrong.split():
            *words, model = chosen.split()
            yield "wrong recipe, run", ["run", "tiny.yaml", *words, f"{model}={{}}", f"{model}.{word}"]
    for overrides in _numbers():
        yield "wrong number in a recipe", ["recipe", "show", "tiny.yaml", *overrides]


def _numbers() -> Iterator[list[str]]:
    """Every key of a recipe that takes numbers, with what is none, infinite, negative or zero."""
    from latelier.recipe import build_recipe

    tokenizer, denoiser = ({**TINY[stage], **more} for stage, more in WITH.items())
    recipe = build_recipe({**TINY, "tokenizer": tokenizer, "denoiser": denoiser})
    for path, needed in SECTIONS.items():
        section: Any = recipe
        for part in path.split("."):
            section = getattr(section, part)
        for key, field in type(section).model_fields.items():
            kind = str(field.annotation)
            if not ("int" in kind or "float" in kind) or "str" in kind or "Literal" in kind:
                continue
            name, pair = f"{path}.{key}", "tuple" in kind
            wrong = ["word", ".nan", ".inf"]
            wrong += ["-1"] * (name not in MAY_BE_NEGATIVE) + ["0"] * (key not in MAY_BE_ZERO)
            for value in wrong:
                shown = f"[{value},{value}]" if pair else f"[{value}]" if "list" in kind else value
                yield [*needed, f"{name}={shown}"]


def _left(place: Path, files: Path, done: Done) -> str:
    """What a refused command has left behind."""
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    new = sorted(found - {str(path.relative_to(files)) for path in files.rglob("*")})
    return f"left {', '.join(new[:3])} behind; it said {done.words[-100:]}" if new else ""


def _write_files(folder: Path) -> None:
    """The files that commands are given, in `files`."""
    from PIL import Image

    files = folder / "files"
    (files / "emptyfolder").mkdir(parents=True)
    Image.new("RGB", (40, 40), (200, 100, 0)).save(files / "p.png")
    text = json.dumps(TINY, indent=1)
    for path in (files / "tiny.yaml", folder / "tiny.yaml"):
        path.write_text(text)
    (files / "latin1.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    (files / "utf16.yaml").write_bytes(text.encode("utf-16"))
    (files / "brackets.yaml").write_text("[" * 3000)
    (files / "list.yaml").write_text("[1, 2]")
    (files / "empty.yaml").write_text("")
    (files / "loop.yaml").write_text("&a {name: x, data: *a}")
    (files / "digits.yaml").write_text("seed: " + "9" * 9999)
    (files / "tags.yaml").write_text("name: !!python/object/apply:os.system ['touch executed']")
    (files / "bytes.yaml").write_bytes(b"\x00\x01\x02")
    (files / "bad.safetensors").write_bytes(b"\xff" * 100)
