"""README and docs are executed: commands with small settings, Python code as written. Recipes and links are checked."""

import pkgutil
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from latelier.cli import app
from latelier.losses import perceptual
from latelier.recipe import build_recipe
from latelier.study.study import build_run, load_study

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the tests are not in a clone")

SMALL = [
    "data.image_size=32", "data.length=64", "data.val_fraction=0.25", "data.workers=0",
    "tokenizer.images=32", "tokenizer.batch=16",
    "tokenizer.model={dim: 32, depth: 1, heads: 2, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
    "denoiser.images=32", "denoiser.batch=16", "denoiser.model={dim: 32, depth: 1, heads: 2}",
    "sample.count=4", "sample.steps=2", "evaluate.samples=16",
]  # fmt: skip
FEW_METRICS, INSPECTIONS = ["evaluate.metrics=[psnr,spectrum,posterior]"], {"inspect", "compare"}
WITH_OVERRIDES = {"run", "train", "encode", "check", "evaluate"}  # commands that take overrides of the recipe


def blocks(file: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)


def commands(*files: str) -> list[list[str]]:
    """All command lines of bash blocks, as words."""
    lines = [line for file in files for block in blocks(file, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def parse(words: list[str]) -> None:
    """Read a latelier command line without running it; unknown commands and options are errors."""
    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    command.make_context(command.name, words)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with images in class folders and the README's recipe, after all commands of the README ran in it."""
    folder = tmp_path_factory.mktemp("readme")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(16):
            pixels = noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    for text in blocks("README.md", "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name, "the first line of a recipe in the README names its file"
        (folder / name[1]).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(perceptual, "load_lpips", cache(perceptual.load_lpips))  # read and hashed once, for speed
        for words in commands("README.md"):
            if words[0] == "latelier":
                small = SMALL if words[1] in WITH_OVERRIDES else FEW_METRICS if words[1] in INSPECTIONS else []
                app([*words[1:], *small], standalone_mode=False)
    return folder


def test_readme_commands(workspace):
    for run in ("quickstart", "photos"):
        for made in ("recipe.yaml", "tokenizer", "pipeline", "log.jsonl", "metrics.json", "samples", "report.html"):
            assert (workspace / "runs" / run / made).exists()
    drawn = {path.stem for path in (workspace / "runs" / "quickstart" / "samples").glob("0*.png")}
    assert {f"{7 + i:06d}" for i in range(16)} <= drawn
    assert (workspace / "pairs.png").is_file()


def test_readme_python(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    namespace = {}
    for i, code in enumerate(blocks("README.md", "python")):
        exec(compile(code, f"README.md, python block {i}", "exec"), namespace)
    assert len(namespace["samples"]) == 2
    assert namespace["distance"].shape == (2,)


def test_readme_reading_lists_are_short():
    section = (ROOT / "README.md").read_text().split("## For readers of the code")[1].split("\n## ")[0]
    to_loss, to_image = (re.findall(r"^\d+\. \[", part, re.MULTILINE) for part in section.split("From noise"))
    assert 1 <= len(to_loss) <= 10
    assert 1 <= len(to_image) <= 8


PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("file", PAGES)
def test_commands_exist(file):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r'^([a-z-]+) = \["', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for words in commands(file):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif words[0] == "pip":
            wanted = re.findall(r"\.\[([a-z,-]+)\]", " ".join(words))
            assert {extra for part in wanted for extra in part.split(",")} <= set(extras), words
        elif "-m" in words and words[words.index("-m") + 1] == "latelier":
            parse(words[words.index("-m") + 2 :])
            if words[:2] == ["accelerate", "launch"]:
                launch_command_parser().parse_args(words[2:])
        elif words[0] == "latelier":
            parse(words[1:])


@pytest.mark.parametrize("file", [page for page in PAGES if page != "CONTRIBUTING.md"])  # has a test of its own
def test_recipes_are_valid(file, tmp_path):
    for text in blocks(file, "yaml"):
        if "title" in yaml.safe_load(text):
            (tmp_path / "study.yaml").write_text(text)
            study = load_study(tmp_path / "study.yaml")
            assert all(build_run(study, name) for name in study.runs)
        else:
            rest = {"name": "page", "data": {"source": "emoji"}, "tokenizer": {"kind": "identity"}}
            build_recipe({**rest, **yaml.safe_load(text)})


def test_wrong_commands_are_noticed():
    with pytest.raises(AssertionError, match="there is no command 'fly'"):
        parse(["fly"])
    with pytest.raises(Exception, match="No such option: --colour"):
        parse(["sample", "runs/x", "--colour", "red"])


@pytest.mark.parametrize("file", PAGES)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / file).read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert ((ROOT / file).parent / target).exists(), target


def test_promises_are_tested():
    """Each line of the tables of docs/promises.md names tests that exist; `::name` is in the file before it."""
    rows = re.findall(r"^\| (?!promise|---).*$", (ROOT / "docs" / "promises.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)?::(\w+)`", row)
        assert named, row
        file = ""
        for path, name in named:
            file = path or file
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_names_of_the_python_page_exist():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 50
    for name in names:
        pkgutil.resolve_name(name)
