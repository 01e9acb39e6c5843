"""The commands of conditional models, on tiny ones: what they write, and one sentence for what they cannot do."""

import numpy as np
import pytest
from PIL import Image

from latelier.recipe import dump, load_recipe
from latelier.run import next_commands, sample_to_folder
from latelier.training.denoiser_loop import train_denoiser
from latelier.training.tokenizer_loop import train_tokenizer
from test_cli import call
from tiny import refused, tiny_recipe

SHORT = {"images": 16, "warmup": 0}
SCENES = {"source": "scenes", "image_size": 32, "length": 24, "flip": False, "classes": ["owl", "key"]}
TEXT = {"kind": "text", "length": 12, "vocabulary_size": 300, "dim": 32, "layers": 1, "heads": 2, "head_dim": 16}
LAYOUT = {"kind": "layout", "objects": 3, "tokens": 256, "dim": 32, "layers": 1, "heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that is told captions, boxes and label maps at once, one that enlarges, and one that fills holes."""
    folder = tmp_path_factory.mktemp("runs")
    conditions = {"several": [TEXT, LAYOUT, "segmentation"], "enlarge": "low-resolution", "fill": "inpainting"}
    for name, condition in conditions.items():
        told = {"denoiser": {"images": 16, "condition": condition}, "sample": {"guidance": 1.0}}
        recipe = tiny_recipe(folder / name, name="run", data=SCENES, tokenizer=SHORT, **told)
        train_tokenizer(recipe)
        train_denoiser(recipe)
        (recipe.folder / "recipe.yaml").write_text(dump(recipe))
    return {name: str(folder / name / "run") for name in conditions}


def save(path, size, mode="RGB", value=None):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (*size, 3), np.uint8) if value is None else np.full(size, value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return str(path)


def opened(path):
    with Image.open(path) as image:
        return image.copy()


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_several_conditions_at_once(monkeypatch, capsys, runs, tmp_path):
    labels = save(tmp_path / "labels.png", (32, 32), "L", 1)
    inputs = ["--prompt", "an owl", "--layout", "owl 0 0 0.5 0.5; key 0.5 0.5 1 1", "--segmentation", labels]
    out = tmp_path / "out"
    code, _, err = call(
        monkeypatch, capsys, "sample", runs["several"], *inputs, "--count", "2", "--out", str(out), "--guidance", "2",
        "--negative", "a key", "--sampler", "heun", "--tile", "2",
    )  # fmt: skip
    assert code == 0, err
    assert size_of(out / "000001.png") == (32, 32)
    assert (out / "grid.png").is_file()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["--prompt", "an owl", "--segmentation", "{labels}", "--layout", "cow 0 0 1 1"], "cow"),
        (["--prompt", "an owl", "--segmentation", "{labels}", "--layout", "owl 0.5 0 1.5 1"], "1.5"),
        (
            ["--prompt", "an owl", "--segmentation", "{labels}", "--layout", "owl 0 0 1"],
            "is not a class and four numbers",
        ),
        (["--prompt", "an owl", "--classes", "owl"], "classes = 'owl' is no input of this model"),
        (["--prompt", "an owl"], "give layouts, one or more"),
        (["--input", "maps"], "--input 'maps' is not NAME=VALUE"),
        (["--input", "maps=nowhere.png"], "maps = 'nowhere.png' is no input of this model"),
        (["--prompt", "an owl", "--layout", "owl 0 0 1 1", "--segmentation", "{beyond}"], "id 7"),
        (["--map", "nowhere.png"], "maps = 'nowhere.png' is no input of this model"),
    ],
)
def test_wrong_inputs_are_one_sentence(monkeypatch, capsys, runs, tmp_path, inputs, words):
    maps = {name: save(tmp_path / f"{name}.png", (32, 32), "L", i) for name, i in (("labels", 1), ("beyond", 7))}
    inputs = [text.format(**maps) for text in inputs]
    code, _, err = call(monkeypatch, capsys, "sample", runs["several"], "--count", "1", *inputs)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_a_prompt_on_a_model_without_text(monkeypatch, capsys, runs):
    code, _, err = call(monkeypatch, capsys, "sample", runs["fill"], "--prompt", "an owl")
    assert code == 2
    assert "prompts = 'an owl' is no input of this model, which is conditioned on inpainting" in err


def test_upscale(monkeypatch, capsys, runs, tmp_path):
    small, large = save(tmp_path / "small.png", (9, 14)), tmp_path / "large.png"
    code, _, err = call(monkeypatch, capsys, "upscale", small, str(large), "--run", runs["enlarge"], "--steps", "2")
    assert code == 0, err
    assert size_of(large) == (56, 36)
    code, _, err = call(monkeypatch, capsys, "upscale", small, str(large), "--run", runs["enlarge"], "--factor", "8")
    assert code == 2
    assert "this model enlarges 4 times" in err
    code, _, err = call(monkeypatch, capsys, "upscale", small, str(large), "--run", runs["fill"])
    assert code == 2
    assert "not trained to enlarge images" in err


def test_inpaint(monkeypatch, capsys, runs, tmp_path):
    image = save(tmp_path / "image.png", (40, 35))
    mask = Image.new("L", (35, 40))
    mask.paste(255, (5, 6, 20, 22))
    mask.save(tmp_path / "mask.png")
    arguments = ["inpaint", image, str(tmp_path / "mask.png"), "--run", runs["fill"], "--out", str(tmp_path / "o.png")]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    before, after = (np.asarray(opened(p)).astype(int) for p in (image, tmp_path / "o.png"))
    changed = (before != after).any(2)
    assert changed[6:22, 5:20].any()
    changed[6:22, 5:20] = False
    assert not changed.any()
    Image.new("L", (30, 40), 255).save(tmp_path / "mask.png")
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "The mask is 40 x 30 (height x width), but the image 40 x 35" in err


def test_samples_of_held_out_images(monkeypatch, capsys, runs, tmp_path):
    code, _, err = call(monkeypatch, capsys, "sample", runs["several"], "--count", "3", "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert size_of(tmp_path / "out" / "000002.png") == (32, 32)


@pytest.mark.parametrize(("name", "does"), [("several", "sample"), ("enlarge", "upscale"), ("fill", "inpaint")])
def test_what_a_run_suggests_can_be_done(monkeypatch, capsys, runs, tmp_path, name, does):
    for file, mode in (("small.png", "RGB"), ("photo.png", "RGB"), ("mask.png", "L")):
        save(tmp_path / file, (8, 8), mode, value=200 if mode == "L" else None)
    *commands, _ = next_commands(load_recipe(runs[name]))
    assert commands[-1].startswith(f"latelier {does} ")
    assert ("--guidance" in commands[0]) == (name == "several")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = command.replace("--count 64", "--count 2").split()[1:]
        assert call(monkeypatch, capsys, *words, "--steps", "2")[0] == 0


def test_streamed_captions_are_drawn_in_previews_and_samples(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = [Image.new("RGB", (32, 32), (20 * i, 100, 0)) for i in range(8)]
    captions = ["an owl" if i % 2 else "a key" for i in range(8)]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_dict({"image": images, "caption": captions}, features).to_parquet(tmp_path / "t.parquet")
    source = str(tmp_path / "t.parquet")
    data = {"source": source, "val_source": source, "streaming": True, "length": 8, "flip": False}
    denoiser = {"images": 16, "condition": TEXT, "cache": False, "preview_every": 8}
    recipe = tiny_recipe(tmp_path, data=data, tokenizer=SHORT, denoiser=denoiser)
    train_tokenizer(recipe)
    pipeline = train_denoiser(recipe)
    (recipe.folder / "recipe.yaml").write_text(dump(recipe))
    assert len(list((recipe.folder / "previews").glob("denoiser-*.png"))) == 2
    assert size_of(sample_to_folder(pipeline.parent)) == (66, 66)  # the recipe's four, whose guidance is 2


def test_guidance_that_cannot_be_is_refused_before_training(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer=SHORT, denoiser={"condition": "none"}, sample={"guidance": 2.0})
    train_tokenizer(recipe)
    refused(r"guidance = 2.0, but this denoiser is trained without dropping its", train_denoiser, recipe)
    assert not (recipe.folder / "latents").exists()
