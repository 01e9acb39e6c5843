"""A run folder belongs to one recipe and one process group."""

import os
import re
import subprocess
import sys

import pytest

from latelier.errors import LatelierError
from latelier.publish import publish
from latelier.recipe import load_recipe
from latelier.training.run_folder import claimed, digest, locked
from tiny import tiny_recipe


def begin(recipe, stage="tokenizer", images=64, export="tokenizer"):
    """As if a stage had been trained: a checkpoint, and an export if there is one."""
    for folder in (recipe.folder / "checkpoints" / f"{stage}-{images:012d}", export and recipe.folder / export):
        if folder:
            with publish(folder, images=images):
                pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": {"lr": 0.5}}, "tokenizer.lr 0.001 -> 0.5"),
        ({"seed": 9}, "seed 0 -> 9"),
        ({"data": {"length": 20}}, "data.length 48 -> 20"),
        ({"data": {"source": "emoji", "image_size": 64}}, r"data.image_size \[32, 32\] -> \[64, 64\]"),
    ],
)
@pytest.mark.parametrize("accept", [False, True])
def test_a_finished_stage_refuses_another_recipe(tmp_path, change, words, accept):
    recipe = tiny_recipe(tmp_path)
    with claimed(recipe):
        begin(recipe)
    before = (recipe.folder / "recipe.yaml").read_bytes()
    with pytest.raises(LatelierError, match=words), claimed(tiny_recipe(tmp_path, **change), accept):
        pass
    assert (recipe.folder / "recipe.yaml").read_bytes() == before


def test_what_does_not_reach_the_weights_may_change(tmp_path):
    with claimed(recipe := tiny_recipe(tmp_path)):
        begin(recipe)
    free = {"tokenizer": {"images": 128, "log_every": 16}, "sample": {"steps": 3}, "evaluate": {"samples": 8}}
    with claimed(tiny_recipe(tmp_path, **free, denoiser={"lr": 0.1})):  # the denoiser has not begun
        pass
    assert load_recipe(recipe.folder).denoiser.lr == 0.1
    begin(recipe, "denoiser", export=None)
    with pytest.raises(LatelierError, match=r"denoiser.lr 0.1 -> 0.001"), claimed(tiny_recipe(tmp_path)):
        pass


def test_changes_of_an_unfinished_stage_can_be_accepted_and_are_noted(tmp_path):
    with claimed(recipe := tiny_recipe(tmp_path)):
        begin(recipe, images=32, export=None)
    other = tiny_recipe(tmp_path, tokenizer={"lr": 0.5})
    with pytest.raises(LatelierError, match=r"add --accept-changes"), claimed(other):
        pass
    with claimed(other, accept_changes=True):
        pass
    with claimed(other):
        pass
    assert re.findall(r"# changed [\d: -]+: (.*)", (recipe.folder / "recipe.yaml").read_text()) == [
        "tokenizer.lr 0.001 -> 0.5"
    ]


def test_a_command_that_is_refused_later_leaves_the_recipe(tmp_path):
    with claimed(recipe := tiny_recipe(tmp_path)):
        begin(recipe)
    before = (recipe.folder / "recipe.yaml").read_bytes()
    with pytest.raises(LatelierError, match="later"), claimed(tiny_recipe(tmp_path, tokenizer={"images": 128})):
        raise LatelierError("refused later")
    assert (recipe.folder / "recipe.yaml").read_bytes() == before


def test_what_killed_commands_left_is_removed(tmp_path):
    recipe = tiny_recipe(tmp_path)
    (recipe.folder / "checkpoints" / ".tokenizer-000000000016.tmp").mkdir(parents=True)
    (recipe.folder / ".metrics.json.77.tmp").touch()
    with claimed(recipe):
        pass
    assert sorted(p.name for p in recipe.folder.rglob("*")) == [".lock", "checkpoints", "recipe.yaml"]


HOLD = "import sys; from pathlib import Path; from latelier.training.run_folder import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_another_process_is_told_who_holds_the_folder_until_it_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        who = rf"in use by process {holder.pid} on \S+ since [\d: -]+ \(Python\); wait until it ends"
        with pytest.raises(LatelierError, match=who), claimed(tiny_recipe(tmp_path.parent, name=tmp_path.name)):
            pass
        assert os.listdir(tmp_path) == [".lock"]
        holder.kill()
    with locked(tmp_path), locked(tmp_path):  # locks of one process nest
        pass


def test_the_digest_changes_with_what_reaches_the_weights(tmp_path):
    one = digest(tiny_recipe(tmp_path))
    assert one == digest(tiny_recipe(tmp_path / "moved", sample={"steps": 9}, tokenizer={"log_every": 16}))
    others = [{"seed": 1}, {"tokenizer": {"images": 128}}, {"denoiser": None}]
    assert len({one, *(digest(tiny_recipe(tmp_path, **change)) for change in others)}) == 4
