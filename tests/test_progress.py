"""Progress where the output is no terminal: plain lines, soon and then seldom, without control characters."""

import re

import pytest

from latelier import pipeline, terminal
from latelier.terminal import Lines, counted, images_bar
from latelier.training import runtime
from latelier.training.tokenizer_loop import train_tokenizer
from test_pipeline import draw, make
from tiny import tiny_recipe


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass when told to."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_once_then_seldom(clock, capsys):
    lines = Lines("tokenizer", 64_000, done=1_000)
    for second in range(1, 101):
        clock[0] = second
        lines.update(100, "loss 0.5")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "tokenizer: 1,000 of 64,000 images"
    assert told[1] == "tokenizer: 2,000 of 64,000 images, 100.0 a second, 0:10:20 left, loss 0.5"
    assert [line.split()[1] for line in told] == ["1,000", "2,000", "5,000", "8,000", "11,000"]


def test_quick_work_says_nothing(clock, capsys):
    batches = [{"image": [0, 1]}, {"image": [2]}]
    assert list(counted("reconstructing", batches, 3)) == batches
    assert capsys.readouterr().err == ""
    for _ in counted("reconstructing", batches, 3):
        clock[0] += 6
    assert capsys.readouterr().err.startswith("reconstructing: 2 of 3 images, 0.3 a second")


def test_processes_beside_the_main_one_are_silent(capsys):
    with images_bar("encoding", 10, shown=False) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_training_tells_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime.Lines, "update", lambda self, more, words="": print(self.title, more, words))
    train_tokenizer(tiny_recipe(tmp_path, denoiser=None))
    captured = capsys.readouterr()
    assert re.match(r"tokenizer 0 \n(decoding 0 \n)?tokenizer 8 loss \d", captured.out)
    assert captured.out.count("tokenizer 8 loss") == 8
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", captured.err)


@pytest.mark.parametrize("screen", [True, False])
def test_sampling_tells_where_it_is(monkeypatch, capsys, screen):
    monkeypatch.setattr(pipeline, "is_screen", lambda: screen)
    monkeypatch.setattr(pipeline, "PATIENCE", 0.0)
    drawing = make()
    drawing.set_progress_bar_config(disable=False)
    draw(drawing, count=4, batch=2, steps=4, progress=True)
    told = capsys.readouterr().err
    assert ("8/8" in told) == ("\r" in told) == screen
    assert ("sampling: " in told) == (not screen)
