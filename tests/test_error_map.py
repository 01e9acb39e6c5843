"""Error maps: the errors themselves, their colours, and that a run draws one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latelier import run
from latelier.errors import LatelierError
from latelier.evaluation.error_map import ERRORS, NARROWEST, draw_errors, heat, pixel_errors
from latelier.images import save_png
from latelier.recipe import build_recipe
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.conv import IdentityTokenizer
from test_one_dimensional import make_codec
from tiny import tiny_recipe

BLACK, WHITE = (0, 0, 4), (252, 255, 164)  # the ends of the scale


class Brighter(IdentityTokenizer):
    """Reconstructions are brighter in the left half."""

    by = 128.0

    def decode(self, z):
        z = z.clone()
        z[..., : z.shape[-1] // 2] += self.by / 127.5
        return super().decode(z)


def draw(codec, images, path):
    draw_errors(codec, [{"image": images}], path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int64)


def test_errors_are_8_bit_levels_averaged_over_colours():
    images = torch.zeros(1, 3, 2, 2)
    other = images.clone()
    other[:, 0, 0, 0] += 6 / 127.5
    other[:, :, 1, 1] = 9  # clamped
    errors = pixel_errors(other, images)
    assert errors[0, 0, 0] == pytest.approx(2)
    assert errors[0, 1, 1] == pytest.approx(127)
    assert errors[0, 0, 1] == 0


def test_colours_grow_with_the_error_up_to_a_fixed_end():
    colours = heat(torch.tensor([[0.0, 1.0, 4.0, 16.0, 64.0, 200.0]]))  # (3, 1, 6)
    assert colours.shape == (3, 1, 6)
    brightness = colours.mean(0)[0]
    assert (brightness.diff()[:4] > 0.05).all()
    assert torch.equal(colours[..., 4], colours[..., 5])
    assert ((colours[:, 0, 0] + 1) * 127.5).round().tolist() == list(BLACK)


def test_originals_reconstructions_and_errors_lie_below_each_other(tmp_path):
    pixels = draw(Codec(Brighter()), torch.full((2, 3, 20, 20), -1.0), tmp_path / "a" / ERRORS)
    size, gap = 20, 2
    rows = [pixels[i * (size + gap) : i * (size + gap) + size, :size] for i in range(3)]
    assert (rows[0] == 0).all()
    assert (rows[1][:, :10] == 128).all()
    assert (rows[1][:, 10:] == 0).all()
    assert (rows[2][:, :10] == WHITE).all()  # 128 levels are beyond the end of the scale
    assert (rows[2][:, 10:] == BLACK).all()
    scale = pixels[3 * size + 2 * gap :]
    assert scale.shape[1] == NARROWEST
    for end in (BLACK, WHITE):
        assert (np.abs(scale - end).max(-1) <= 2).any()


def test_small_errors_look_the_same_beside_large_ones(tmp_path):
    """The scale does not hang on what is drawn."""
    images = torch.full((2, 3, 20, 20), -1.0)
    tokenizer = Brighter()
    tokenizer.by = 8.0
    alone = draw(Codec(tokenizer), images, tmp_path / "small.png")[44:64, :20]
    assert (alone[:, :10] == ((heat(torch.tensor([[8.0]]))[:, 0, 0] + 1) * 127.5).round().numpy()).all()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_channels(tmp_path, channels):
    pixels = draw(Codec(Brighter(channels, channels)), torch.zeros(3, channels, 16, 16), tmp_path / ERRORS)
    assert (pixels[:16, :16] == 128).all()
    assert (pixels[36:52, 8:16] == BLACK).all()


def test_latents_in_a_row_and_at_most_eight_images(tmp_path):
    images = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert draw(make_codec(), images, tmp_path / ERRORS).shape[1] == 8 * 34 - 2


def test_no_images(tmp_path):
    for nothing in ([], [{"image": torch.zeros(0, 3, 8, 8)}]):
        with pytest.raises(LatelierError, match="no images to draw errors of"):
            draw_errors(Codec(IdentityTokenizer()), nothing, tmp_path / ERRORS)
    assert not (tmp_path / ERRORS).exists()


def test_a_run_measures_its_posterior_and_draws_its_errors(tmp_path):
    folder = tmp_path / "images"
    for i in range(6):
        noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        save_png(Image.fromarray(((noise[0].movedim(0, -1) + 1) * 127.5).byte().numpy()), folder / f"{i}.png")
    IdentityTokenizer().save_pretrained(tmp_path / "identity")
    data = {"source": str(folder), "val_source": str(folder), "image_size": 16, "length": None, "flip": False}
    tree = tiny_recipe(tmp_path, denoiser=None).model_dump() | {
        "data": data, "tokenizer": {"kind": "pretrained", "path": str(tmp_path / "identity")},
        "evaluate": {"metrics": ["psnr", "posterior", "equivariance", "codebook"], "samples": 6, "batch": 4},
    }  # fmt: skip
    recipe = build_recipe(tree)
    run.complete(recipe)
    numbers = json.loads((recipe.folder / "metrics.json").read_text())["latent space"]
    assert {"latent-std", "active-channels", "equivariance-shift", "psnr-after-scale"} <= set(numbers)
    assert not {"kl-bits-per-pixel", "codebook-usage"} & set(numbers)  # it has neither a posterior nor codes
    assert numbers["psnr-after-flip"]["value"] == 100
    with Image.open(recipe.folder / ERRORS) as image:
        assert image.width == NARROWEST
