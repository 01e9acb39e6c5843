"""The discriminator on a frozen ViT: the ViT stays a constant that nobody sees, the heads play and resume exactly."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latelier.losses.dino import DinoDiscriminator, Head, tapped, view
from latelier.losses.discriminator import build_discriminator
from test_adversarial import batch, conv_recipe, resumed, spectral
from tiny import refused

ALL = ["color", "translation", "cutout"]


@pytest.fixture
def discriminator(teacher):
    return DinoDiscriminator(teacher)


def game_recipe(folder, teacher, **changes):
    """A tiny autoencoder's recipe with a game against a small ViT."""
    return conv_recipe(folder, adversarial={"kind": "dino", "teacher": teacher, **changes})


def make_discriminator(teacher, **settings):
    torch.manual_seed(1)
    return build_discriminator(3, 0, "dino", teacher=teacher, **settings)


def pair():
    real = batch()["image"]
    return real, real.flip(0) * 0.5, torch.arange(4)


def test_taps_are_those_of_the_paper():
    """Before block 0, and after blocks 2, 5, 8, 11 (counted from 0)."""
    assert (tapped(12), tapped(24)) == ([0, 3, 6, 9, 12], [0, 6, 12, 18, 24])
    assert tapped(2) == [0, 1, 2]


def test_features_are_the_vits_patches_plus_its_class(discriminator):
    features, images = discriminator.features, torch.rand(2, 3, 24, 24) * 2 - 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # ImageNet's
    vit, seen = features.vit, []

    def note(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)  # transformers 4 and 5

    layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
    hooks = [layer.register_forward_hook(note) for layer in (vit.embeddings, *layers)]
    with torch.no_grad():
        vit(((images + 1) / 2 - mean) / std)
    for hook in hooks:
        hook.remove()
    taps = features(images)
    assert [tuple(tap.shape) for tap in taps] == [(2, 16, 16)] * 3
    for tap, tokens in zip(taps, seen, strict=True):
        torch.testing.assert_close(tap, (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2))


def test_gradients_reach_the_image_and_no_weight_of_the_vit(discriminator):
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    logits = discriminator(images, torch.full((2, 3), 0.6))
    assert logits.shape == (2, 1, 3 * 16)  # for every patch at every depth
    logits.sum().backward()
    assert (images.grad.abs().sum(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in discriminator.features.vit.parameters())
    assert not discriminator.features.vit.training
    assert all(p.grad is not None for p in discriminator.parameters())


def test_the_vit_is_seen_by_nobody(discriminator):
    for names in (discriminator.state_dict(), dict(discriminator.named_parameters())):
        assert {name.split(".")[0] for name in names} == {"heads"}
    assert not any(isinstance(m, type(discriminator.features.vit)) for m in discriminator.modules())
    discriminator.train().requires_grad_(True)
    assert not discriminator.features.vit.training
    assert not discriminator.features.vit.embeddings.cls_token.requires_grad


def test_gray_images_are_looked_at_in_three_channels(teacher):
    images = torch.rand(2, 1, 24, 24) * 2 - 1
    network = DinoDiscriminator(teacher, 1).eval()
    torch.testing.assert_close(network(images), network(images.expand(-1, 3, -1, -1)))
    refused(r"takes images of 1 or 3 channels, not 4; use kind: patch", DinoDiscriminator, teacher, 4)


def test_a_teacher_is_looked_for_in_the_weights_folder(teacher, tmp_path, monkeypatch):
    (tmp_path / "dino-vits16").symlink_to(teacher)
    monkeypatch.setenv("LATELIER_WEIGHTS", str(tmp_path))
    assert build_discriminator(3, 0, "dino").network.features.size == (24, 24)
    refused(r"Hub.*save_pretrained.*LATELIER_WEIGHTS", DinoDiscriminator, "nobody/no-such-vit")


def test_views_are_crops_and_shrunk_images():
    images = torch.rand(3, 3, 32, 48)
    numbers = torch.tensor([[0.49, 0.0, 0.999], [0.5, 0.0, 0.0], [0.0, 0.999, 0.0]])
    views = view(images, (16, 16), numbers)
    assert torch.equal(views[0], images[0, :, :16, 32:])
    torch.testing.assert_close(views[1], images[1].unflatten(1, (16, 2)).unflatten(3, (16, 3)).mean((2, 4)))
    assert torch.equal(views[2], images[2, :, 16:, :16])


def test_images_that_have_no_room_are_never_cropped():
    crop = torch.zeros(1, 3)
    image = torch.rand(1, 3, 16, 16)
    assert view(image, (16, 16), crop) is image
    assert view(image, (24, 24), crop).shape[2:] == (24, 24)
    flat = torch.full((1, 3, 12, 40), 0.3)
    torch.testing.assert_close(view(flat, (24, 24), crop), torch.full((1, 3, 24, 24), 0.3))


def test_images_and_reconstructions_share_their_views(teacher):
    discriminator = make_discriminator(teacher, augment=ALL, augment_share=0.5)
    images = batch()["image"]
    discriminator.eval()
    first, again, others = (discriminator.logits(images, torch.arange(n, n + 4)) for n in (0, 0, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, others)


def test_the_papers_heads_have_7_39_million_weights():
    with torch.device("meta"):
        heads = [Head(384, "batch") for _ in tapped(12)]
    per_head = (384 + 1) * 384 + (9 * 384 + 1) * 384 + 2 * 2 * 384 + 384 + 1
    assert sum(p.numel() for head in heads for p in head.parameters()) == 5 * per_head == 7_386_245


def test_weights_have_spectral_norm_one():
    head = Head(16).train()
    for _ in range(200):  # power iterations
        head(torch.rand(1, 16, 8))
    for layer in (head.first[0], head.second[0], head.logit):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1.0, rel=1e-4)


def test_a_head_looks_around_the_sequence():
    head = Head(16).eval()
    for layer in head.modules():
        if isinstance(layer, nn.GroupNorm):  # which looks at everything
            layer.forward = lambda x: x
    x = torch.rand(1, 16, 20, requires_grad=True)
    head(x)[0, 0, 1].backward()
    seen = x.grad.abs().sum((0, 1)).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 3, 4, 5, 17, 18, 19]


def test_group_norm_does_not_mix_images(teacher):
    images = torch.rand(4, 3, 24, 24) * 2 - 1
    for norm, mixes in (("group", False), ("batch", True)):
        network = DinoDiscriminator(teacher, norm=norm)
        for layer in network.modules():
            if nn.utils.parametrize.is_parametrized(layer):
                layer.parametrizations.eval()
        assert torch.allclose(network(images)[:2], network(images[:2]), atol=1e-5) is not mixes


def test_weights_are_normalised_in_float32_under_autocast(discriminator):
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    discriminator.eval()
    exact = discriminator(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = discriminator(images)
    assert (exact - rough).abs().max() < 0.1 * exact.std()


def test_power_iterations_move_on_once_for_a_batch(teacher):
    """However many images there are; so consistency does not change what the discriminator says of them."""
    states, logits = [], []
    for consistency in (0.0, 4.0):
        discriminator = make_discriminator(teacher, consistency=consistency)
        terms = discriminator(*pair())
        states.append(spectral(discriminator))
        logits.append(terms.losses["d_real"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*logits)


def test_resume_is_exact_and_checkpoints_hold_no_vit(tmp_path, teacher, monkeypatch):
    game = {"start": 8, "lecam": 0.1, "lecam_decay": 0.9, "consistency": 4.0, "augment": ALL, "augment_share": 0.5}
    files = resumed([game_recipe(tmp_path / name, teacher, **game) for name in ("whole", "parts")], monkeypatch)
    names = load_file(files[0] / "model_1.safetensors")
    assert any(name.endswith("._u") for name in names)
    assert {name.split(".")[0] for name in names} == {"averages", "network"}
    assert {name.split(".")[1] for name in names if name != "averages"} == {"heads"}
    learnt = torch.load(files[0] / "optimizer_1.bin", weights_only=True)["state"]
    assert len(learnt) == len(list(DinoDiscriminator(teacher).parameters()))


def test_preflight_tries_it(tmp_path, teacher):
    from latelier.preflight import try_tokenizer

    recipe = game_recipe(tmp_path, teacher, start=8, consistency=4.0)
    (trial,) = try_tokenizer(recipe)
    assert {"adversarial", "d_loss", "d_consistency"} <= trial.terms.keys()
