"""SIGTERM and SIGINT end a command cleanly wherever it is, and the same command goes on from there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from latelier import cli
from latelier.data.latents import LatentCache
from latelier.recipe import dump
from latelier.terminal import handled_by, stop_now
from latelier.training.runtime import Stage
from tiny import tiny_recipe


@pytest.fixture
def leaving(monkeypatch):
    """The process would end here; the test goes on."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)


def test_a_signal_ends_what_is_running_and_the_handler_before_comes_back(leaving, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, handled_by(stop_now):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped by SIGTERM; what was finished is saved." in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_the_cache_is_written(tmp_path, monkeypatch, capfd, leaving, number):
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump(recipe))
    monkeypatch.setattr(sys, "argv", ["latelier", "run", str(tmp_path / "tiny.yaml")])

    def write(*args, **kwargs):
        signal.raise_signal(number)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "write", write)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0
    assert f"Stopped by {number.name}; what was finished is saved." in capfd.readouterr().err


def test_a_second_signal_does_not_wait_for_the_step(tmp_path, monkeypatch, leaving):
    from latelier.training.tokenizer_loop import train_tokenizer

    def advance(self):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(Stage, "advance", advance)
    with pytest.raises(SystemExit):
        train_tokenizer(tiny_recipe(tmp_path, denoiser=None))


def test_a_signal_in_the_last_step_is_heard(tmp_path, monkeypatch):
    from latelier.training.tokenizer_loop import train_tokenizer

    recipe = tiny_recipe(tmp_path, denoiser=None)

    def advance(self, original=Stage.advance):
        if self.images == 56:
            signal.raise_signal(signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "advance", advance)
        with pytest.raises(SystemExit):
            train_tokenizer(recipe)
    assert not (recipe.folder / "tokenizer").exists()
    train_tokenizer(recipe)
    assert (recipe.folder / "tokenizer" / "latent_statistics.json").is_file()


def test_a_real_command_stops_within_seconds(tmp_path):
    recipe = tiny_recipe(tmp_path, denoiser=None, tokenizer={"images": "10M"})
    (tmp_path / "tiny.yaml").write_text(dump(recipe))
    command = subprocess.Popen(
        [sys.executable, "-m", "latelier", "run", str(tmp_path / "tiny.yaml")],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log, deadline = recipe.folder / "log.jsonl", time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    _, told = command.communicate(timeout=20)
    assert command.returncode == 0
    assert "everything is saved" in " ".join(told.split())
    assert "Traceback" not in told
