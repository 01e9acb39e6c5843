"""CONTRIBUTING is executed: its files are installed as printed, its lines enter their tables, and its recipe is run."""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import latelier
from latelier import Codec, LatentDiffusionPipeline, run
from latelier.analysis.sample import collect
from latelier.convert import from_official
from latelier.data.records import Source
from latelier.data.sources import hold_out
from latelier.evaluation.results import Result
from latelier.opening import open_codec
from latelier.recipe import build_recipe
from latelier.study.inspect import inspect
from latelier.tokenizers.conv import IdentityTokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the tests are not in a clone")
BLOCK = re.compile(r"^```(\w+)\n# (?:src/)?([\w/]+)\.(?:py|yaml)(?:, in (\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    """Blocks of a language whose first line names a file: its path without suffix, a table in it or "", the rest."""
    return [match.groups()[1:] for match in BLOCK.finditer(PAGE.read_text()) if match[1] == language]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The files of CONTRIBUTING are modules of latelier, and its lines are in their tables."""
    modules = [file.replace("/", ".") for file, table, _ in blocks("python") if not table]
    for module, (file, _, code) in zip(modules, (block for block in blocks("python") if not block[1])):
        path = tmp_path / "src" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        package = importlib.import_module(module.rpartition(".")[0])
        if str(path.parent) not in package.__path__:
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    importlib.invalidate_caches()
    for file, table, line in blocks("python"):
        if table:
            module = importlib.import_module(file.removesuffix("/__init__").replace("/", "."))
            for name, value in eval("{" + line + "}", vars(module)).items():
                assert name not in getattr(module, table)
                monkeypatch.setitem(getattr(module, table), name, value)
    yield {module.removeprefix("latelier."): importlib.import_module(module) for module in modules}
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def recipe(installed, tmp_path):
    """The recipe of CONTRIBUTING."""
    ((name, _, text),) = blocks("yaml")
    tree = yaml.safe_load(text)
    assert tree["name"] == name
    small = {"precision": "fp32"}
    return build_recipe({
        **tree, "runs": str(tmp_path / "runs"), "tokenizer": {**tree["tokenizer"], **small},
        "denoiser": {**tree["denoiser"], **small},
    })  # fmt: skip


def test_what_contributing_adds_is_one_file_and_one_line_each():
    tables = {table for _, table, _ in blocks("python") if table}
    assert tables == {"TOKENIZERS", "DENOISERS", "CONDITIONERS", "METRICS", "KINDS"}
    for _, table, line in blocks("python"):
        assert not table or line.count("\n") == 1


def test_the_recipe_of_contributing_runs(installed, recipe, tmp_path):
    assert [stage.images // stage.batch for stage in (recipe.tokenizer, recipe.denoiser)] == [2, 2]
    run.complete(recipe)
    metrics = yaml.safe_load((recipe.folder / "metrics.json").read_text())
    assert {"psnr"} <= set(metrics["reconstruction"])
    assert set(metrics["latent space"]) == {"kurtosis"}
    assert "kurtosis" in (recipe.folder / "report.html").read_text()

    codec = open_codec(recipe)
    assert isinstance(codec.tokenizer, installed["tokenizers.patches"].PatchAutoencoder)
    pipeline = LatentDiffusionPipeline.from_pretrained(recipe.folder / "pipeline")
    assert isinstance(pipeline.denoiser, installed["denoisers.convnet"].ConvNet)
    images = pipeline(colors=["1,0,0", (0, 0, 1)], count=3, steps=2, guidance=2.0, output_type="pt", progress=False)
    assert images.images.shape == (3, 3, 32, 32)
    with pytest.raises(latelier.LatelierError, match=r"colors has \[2.0, 0.0, 0.0\]; give 3 numbers from 0 to 1"):
        pipeline(colors=["2,0,0"], progress=False)

    options = ["evaluate.metrics=[psnr,kurtosis]"]
    inspect(str(recipe.folder), "emoji", 32, 32, tmp_path / "inspected", options)
    found = yaml.safe_load((tmp_path / "inspected" / "metrics.json").read_text())
    assert len(found["latent space"]["kurtosis"]["receipt"]["by_channel"]) == codec.channels == 8


def test_the_metric_of_contributing_has_its_closed_form(installed):
    images = torch.linspace(-1, 1, 4096).view(64, 1, 8, 8)
    sample = collect(Codec(IdentityTokenizer(1, 1)), [{"image": images}], 64)
    (result,) = installed["analysis.kurtosis"].kurtosis(sample).values()
    assert isinstance(result, Result)
    assert result.value == pytest.approx(-1.2, abs=0.01)  # of a uniform distribution


def test_the_source_of_contributing(installed, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((10, 32, 48, 3), dtype=np.uint8))
    source = installed["data.arrays"].ArraySource(tmp_path / "images.npy")
    assert isinstance(source, Source)
    assert source[3]["image"].shape == (32, 48, 3)
    assert len(hold_out(source, 0.3, "train")) + len(hold_out(source, 0.3, "val")) == 10


def test_the_converter_of_contributing(installed):
    module = installed["convert.convnet"]
    model = module.ConvNet(4, 8, 2)
    theirs = model.state_dict()
    for old, new in module.RENAMED.items():
        theirs = {name.replace(new, old, 1) if name.startswith(new) else name: t for name, t in theirs.items()}
    assert set(theirs) != set(model.state_dict())
    again, x_t, t = from_official("convnet", theirs).model, torch.randn(2, 4, 8, 8), torch.rand(2)
    assert torch.equal(again(x_t, t), model(x_t, t))


# -- names ------------------------------------------------------------------------------------------------------------


def names():
    """What is in backticks outside of blocks and names code: identifiers, dotted names, calls and paths."""
    text = re.sub(r"^```.*?^```", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return sorted({name for name in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[\w./-]+(\(.*\))?", name)})


def sources():
    """All code and recipes, and the blocks of the page."""
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("recipes/*.yaml"), *ROOT.glob("studies/*.yaml")]
    return "\n".join([path.read_text() for path in files] + [code for _, _, code in blocks("python")])


def exists(name, text):
    """Whether a name is a path, a module or what is in one, or a word of the code."""
    name = name.partition("(")[0]
    if "/" in name:
        written = {f"src/{file}.py" for file, _, _ in blocks("python")}
        return name in written or any((ROOT / start / name).exists() for start in ("", "src/latelier"))
    if name.startswith("latelier."):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
        return True
    return all(re.search(rf"\b{re.escape(word)}\b", text) for word in name.split("."))


def test_names_in_contributing_exist():
    text = sources()
    assert len(names()) > 40
    assert [name for name in names() if not exists(name, text)] == []


def test_names_that_do_not_exist_are_noticed():
    text = sources()
    for name in ("_evaluate_latent_spaces()", "objectives/vmae.py", "latelier.recipe.load_recipes", "asks_for"):
        assert not exists(name, text)
    for name in ("load_exactly", "evaluation/metrics.py", "latelier.recipe.load_recipe", "batch.sample_id"):
        assert exists(name, text)
