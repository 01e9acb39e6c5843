"""VMAE: masking, grids, and losses that stay on their patches."""

import pytest
import torch

from latelier.layers import resize_positions
from latelier.losses.reconstruction import gaussian_kl
from latelier.tokenizers.codec import Codec
from latelier.tokenizers.vmae import PRESETS, VMAE, VMAEObjective, VMAESection, build, visible_patches
from tiny import refused


@pytest.fixture
def model():
    return VMAE(
        (32, 32), 8, latent_channels=4, dim=32, depth=1, heads=2, decoder_dim=32, decoder_depth=1, decoder_heads=2
    ).eval()


def test_masked_patches_do_not_reach_the_encoder(model):
    images = torch.randn(2, 3, 32, 32)
    keep = visible_patches(torch.rand(2, 16), 0.75)
    assert keep.shape == (2, 4)
    visible = torch.zeros(2, 16).scatter(1, keep, 1.0).view(2, 1, 4, 4)
    visible = visible.repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(visible.bool(), images, torch.randn_like(images))
    assert torch.equal(model.moments(images, keep), model.moments(changed, keep))


def test_keeping_all_in_order_is_no_mask(model):
    images = torch.randn(2, 3, 32, 32)
    keep = torch.arange(16).repeat(2, 1)
    moments = model.moments(images, keep)
    torch.testing.assert_close(moments, model.moments(images))
    z = moments[..., :4]
    torch.testing.assert_close(model.decode_tokens(z, (4, 4), keep), model.decode_tokens(z, (4, 4)))


def test_order_of_visible_patches_does_not_matter(model):
    images = torch.randn(1, 3, 32, 32)
    keep = torch.tensor([[3, 9, 0, 12]])
    turned = keep.flip(1)
    torch.testing.assert_close(model.moments(images, keep), model.moments(images, turned).flip(1))
    z = torch.randn(1, 4, 4)
    torch.testing.assert_close(model.decode_tokens(z, (4, 4), keep), model.decode_tokens(z.flip(1), (4, 4), turned))


def test_losses_touch_only_their_own_patches(model):
    objective = VMAEObjective(model, seed=0, mask_ratio=0.5)
    images, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 8, 4)
    keep = torch.arange(8)[None]  # the upper half
    first = objective.terms(images, keep, noise)
    lower = images.clone()
    lower[:, :, 16:] += 1.0
    second = objective.terms(lower, keep, noise)
    assert torch.equal(first.losses["mse_visible"], second.losses["mse_visible"])
    assert not torch.equal(first.losses["mse_masked"], second.losses["mse_masked"])
    expected = (first.reconstruction.detach() - images)[:, :, :16].square().mean()
    torch.testing.assert_close(first.losses["mse_visible"], expected)


def test_randomness_is_addressed_by_the_image(model):
    objective = VMAEObjective(model, seed=3)
    images = torch.rand(4, 3, 32, 32)
    batch = {"image": images, "sample_id": torch.arange(4)}
    whole = objective(batch).reconstruction.detach()
    half = objective({"image": images[2:], "sample_id": torch.arange(2, 4)}).reconstruction.detach()
    torch.testing.assert_close(whole[2:], half)


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (64, 24)])
def test_other_grids_saved_and_opened(model, size, tmp_path):
    codec = Codec(model)
    images = torch.rand(1, 3, *size)
    latents = codec.encode(images)
    assert latents.shape[1:] == codec.latent_shape(*size) == (4, size[0] // 8, size[1] // 8)
    assert codec.decode(latents).shape == images.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(VMAE.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_positions_carried_over_keep_the_trained_grid(model):
    assert torch.equal(resize_positions(model.pos_embed, (4, 4), (4, 4)), model.pos_embed)
    larger = resize_positions(model.pos_embed, (4, 4), (8, 8))
    back = torch.nn.functional.avg_pool2d(larger.transpose(1, 2).unflatten(2, (8, 8)), 2).flatten(2).transpose(1, 2)
    assert (back - model.pos_embed)[0].view(4, 4, -1)[1:3, 1:3].abs().max() < 0.2


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    section = VMAESection(kind="vmae", preset=name, model={"depth": 1, "decoder_depth": 1})
    model = build(section, 1, (32, 32))
    assert model(torch.rand(1, 1, 32, 32)).sample.shape == (1, 1, 32, 32)


def test_unknown_preset_and_argument():
    refused("vmae-f8d16", build, VMAESection(kind="vmae", preset="vmae-f8"), 3, (64, 64))
    refused("did you mean 'depth'", build, VMAESection(kind="vmae", model={"depht": 1}), 3, (64, 64))


def test_kl_closed_forms():
    mean, logvar = torch.randn(1000), torch.randn(1000)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    for form, target in (
        ("standard", torch.distributions.Normal(0.0, 1.0)),
        ("free-mean", torch.distributions.Normal(mean, 1.0)),
        ("fixed-std", torch.distributions.Normal(mean, 0.1)),
    ):
        expected = torch.distributions.kl_divergence(posterior, target)
        torch.testing.assert_close(gaussian_kl(mean, logvar, form, 0.1), expected, rtol=1e-4, atol=1e-4)
