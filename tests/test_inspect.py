"""Where an inspection may write: never over the tokenizer it inspects, nor over files of somebody else."""

import pytest

from latelier.errors import LatelierError
from latelier.study.inspect import inspect


@pytest.fixture
def weights(tmp_path):
    """`model/tokenizer`, without a recipe beside it."""
    folder = tmp_path / "model" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("out", [".", "tokenizer", "tokenizer/inspection", ".."])
@pytest.mark.parametrize("given", ["model", "model/tokenizer"])
def test_the_inspected_tokenizer_is_left_alone(weights, tmp_path, given, out):
    with pytest.raises(LatelierError, match=r"would overwrite .*, which is to be inspected; choose another one"):
        inspect(str(tmp_path / given), "emoji", 8, 4, weights.parent / out, [])
    assert (weights / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["tokenizer/config.json", "metrics.json", "report.html"])
def test_files_of_somebody_else_are_left_alone(weights, tmp_path, name):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(LatelierError, match=rf"has files that no inspection wrote \({name.partition('/')[0]}\)"):
        inspect(str(weights), "emoji", 8, 4, tmp_path / "mine", [])
    assert file.read_text() == "mine"
