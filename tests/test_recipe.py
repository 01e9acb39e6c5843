"""Recipes: what is read, what is imported for it, and one sentence for everything that is wrong."""

import subprocess
import sys

import pytest
import yaml

from latelier.errors import LatelierError
from latelier.recipe import build_recipe, dump, find_recipe, load_recipe, parse_count, schema

TREE = {
    "name": "test",
    "data": {"source": "emoji", "image_size": 64},
    "tokenizer": {"kind": "vmae", "images": "64k", "batch": 64, "lr": "4e-4"},
    "denoiser": {"size": "S"},
}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


@pytest.mark.parametrize(
    ("text", "count"), [("2M", 2_000_000), ("64k", 64_000), ("1.5M", 1_500_000), ("1_000", 1000), (7, 7)]
)
def test_counts(text, count):
    assert parse_count(text) == count


def test_resolved_recipe_is_a_recipe(recipe_file):
    recipe = load_recipe(recipe_file, ["tokenizer.mask_ratio=0.75", "data.image_size=[32,64]"])
    assert recipe.tokenizer.mask_ratio == 0.75
    assert recipe.data.image_size == (32, 64)
    assert recipe.tokenizer.lr == 4e-4
    assert build_recipe(yaml.safe_load(dump(recipe))) == recipe


def test_images_become_whole_steps(recipe_file):
    assert load_recipe(recipe_file, ["tokenizer.images=100"]).tokenizer.images == 128


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer.lrr=3", ["tokenizer.lrr", "did you mean 'lr'"]),
        ("data.imagesize=3", ["data.imagesize", "did you mean 'image_size'"]),
        ("denoiser.process.knd=flow", ["denoiser.process.knd", "did you mean 'kind'"]),
        ("tokenizer.mask_ratio=2", ["tokenizer.mask_ratio = 2", "less than 1"]),
        ("tokenizer.images=many", ["tokenizer.images = 'many'"]),
        ("tokenizer.kind=foo", ["'foo'", "vmae"]),
        (
            "tokenizer.kind=null",
            ["tokenizer.kind = None is not known", "vmae, maetok, dcae, conv"],
        ),
        ("denoiser.kind=foo", ["denoiser.kind = 'foo' is not known", "unet"]),
        ("denoiser.condition=clas", ["denoiser.condition.0.kind = 'clas' is not known", "low-resolution"]),
        (
            "denoiser.condition=[{kind: layout, painted: 3}]",
            ["condition.0.painted", "mean 'layout_map_channels'"],
        ),
        ("data.grounds=plain", ["data.grounds", "did you mean 'backgrounds'"]),
        ("evaluate.metrics=[rfid]", ["evaluate.metrics.0 = 'rfid'", "use 'rfd'", "need not be Inception's"]),
        ("evaluate.metrics=[psn]", ["evaluate.metrics.0 = 'psn'", "did you mean 'psnr'"]),
        ("denoiser.process.kind=x", ["denoiser.process.kind = 'x'", "'flow' or 'ddpm'"]),
        ("no-equals-sign", ["key=value"]),
        ("name=..", ["name = '..'", "not dots alone"]),
        ("seed=9223372036854775808", ["seed = 9223372036854775808"]),
        ("tokenizer.lr=.nan", ["tokenizer.lr = nan", "a finite number"]),
        ("tokenizer.lr=[", ["tokenizer.lr=[", "not valid YAML"]),
        ("data.image_size=[32]", ["data.image_size = [32]", "height and width, or one number"]),
        ("data.image_size=0", ["data.image_size.0 = 0"]),
        ("data.channels=2", ["images of emoji have 1 or 3 or 4"]),
        ("data.label_key=foo", ["data.label_key is for folders and datasets"]),
        ("tokenizer.model.depth=-1", ["tokenizer.model.depth = -1", "from 0 on"]),
        ("tokenizer.model.heads=5", ["dim = 192 is not divisible by 5 heads", "change tokenizer.model"]),
        ("tokenizer.model.patch_size=0", ["patch_size = 0", "a whole number"]),
        ("denoiser.model.dim=50", ["dim = 50 is not divisible by 6 heads", "change denoiser.model"]),
        ("denoiser.process.prediction=v", ["is not for a flow"]),
        ("name.deep=1", ["'name' is a value"]),
    ],
)
def test_mistakes_are_one_sentence(recipe_file, override, words):
    with pytest.raises(LatelierError) as error:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n", b"name: caf\xe9", "name: x".encode("utf-16"), b"[" * 3000, b"&a {name: x, data: *a}",
     b"seed: 2024-99-99",
     ", ".join(f"&x{i} [{', '.join([f'*x{i - 1}' if i else 'x'] * 9)}]" for i in range(12)).join("[]").encode()],
)  # fmt: skip
def test_files_that_are_no_recipes(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(LatelierError, match="is not valid YAML"):
        load_recipe(tmp_path / "x.yaml")


def test_missing_file_and_nearest_name(tmp_path):
    with pytest.raises(LatelierError, match="no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(LatelierError, match="did you mean 'quickstart'"):
        load_recipe("quickstat")
    assert find_recipe("quickstart").name == "quickstart.yaml"


def test_schema_knows_every_section_of_every_kind():
    found = schema()
    assert {"data", "tokenizer", "denoiser", "sample", "evaluate"} <= set(found["properties"])
    kinds = [section["title"] for section in found["properties"]["tokenizer"]["oneOf"]]
    assert kinds == [f"{name}Section" for name in ("VMAE", "MAETok", "DCAE", "Conv", "RAE", "Identity", "Pretrained")]
    denoisers = found["properties"]["denoiser"]["anyOf"][0]["oneOf"]
    assert [section["title"] for section in denoisers] == ["DiTSection", "DDTSection", "UViTSection", "UNetSection"]
    assert len(denoisers[0]["properties"]["condition"]["items"]["oneOf"]) == 7


def test_nothing_heavy_is_imported_before_it_is_named():
    code = (
        "import sys, latelier.cli, latelier.recipe as r; r.recipe_files(); heavy = {'torch', 'diffusers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "r.load_recipe('quickstart')\n"
        "names = [f'latelier.{m}' for m in ('tokenizers.maetok', 'tokenizers.conv', 'denoisers.unet')]\n"
        "others = [name for name in names if name in sys.modules]\n"
        "assert not others, others"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_run_folder_that_was_moved(recipe_file, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.mkdir(parents=True)
    (moved / "recipe.yaml").write_text(dump(load_recipe(recipe_file)))
    assert load_recipe(moved).folder == moved
