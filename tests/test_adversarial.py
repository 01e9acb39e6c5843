"""The game with the discriminator: each side's gradients stay its own, and the weights have closed forms."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latelier.losses import adversarial
from latelier.losses.adversarial import PatchGAN, adaptive_weight, discriminator_loss, generator_loss
from latelier.losses.discriminator import CHANGES, add_adversarial_loss, augment, build_discriminator
from latelier.recipe import build_recipe
from latelier.tokenizers import build_objective, build_tokenizer, last_layer
from latelier.training import tokenizer_loop
from latelier.training.checkpoint import checkpoints
from latelier.training.runtime import Stage
from latelier.training.tokenizer_loop import train_tokenizer
from test_training import assert_same, newest, train_in_two_parts
from tiny import CONV, refused, tiny_recipe

GAME = {"layers": 1, "channels": 8}
SMALL = {"layers": 1, "width": 8}


def conv_recipe(folder, **changes):
    return build_recipe({**tiny_recipe(folder, denoiser=None).model_dump(), "tokenizer": {**CONV, **changes}})


@pytest.fixture
def objective(tmp_path):
    recipe = conv_recipe(tmp_path, adversarial=GAME)
    torch.manual_seed(0)
    return build_objective(recipe.tokenizer, 0, build_tokenizer(recipe.tokenizer, recipe.data))


@pytest.fixture(params=["patch", "dino"])
def discriminator(request, teacher):
    torch.manual_seed(1)
    if request.param == "patch":
        return build_discriminator(3, 0, **SMALL)
    return build_discriminator(3, 0, "dino", teacher=teacher, consistency=4.0, lecam=0.1)


def batch(seen=0):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": images, "sample_id": torch.arange(4), "seen": seen}


def generator_terms(objective, discriminator):
    """The tokenizer's loss terms once the game has started."""
    terms = objective(batch())
    add_adversarial_loss(terms, discriminator, last_layer(objective.tokenizer), batch()["sample_id"], 0.5)
    return terms


def spectral(model):
    """The vectors of power iterations."""
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("._u")}


def test_the_generator_step_leaves_the_discriminator_alone(objective, discriminator):
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    terms = generator_terms(objective, discriminator)
    terms.total.backward()
    assert "adversarial" in terms.losses
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    assert all(torch.equal(before[name], value) for name, value in discriminator.state_dict().items())
    assert all(m.training for m in discriminator.modules())
    assert objective.tokenizer.decoder.conv_out.weight.grad is not None
    assert not any("discriminator" in name for name, _ in objective.named_parameters())


def test_the_discriminator_step_leaves_the_tokenizer_alone(objective, discriminator):
    fake, before = objective(batch()).reconstruction.detach(), spectral(discriminator)
    discriminator(batch()["image"], fake, torch.arange(4)).total.backward()
    assert all(p.grad is None for p in objective.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())
    after = spectral(discriminator)
    assert all(not torch.equal(before[name], value) for name, value in after.items() if len(value) > 1)


def test_both_sides_begin_when_the_recipe_says(tmp_path, monkeypatch):
    recipe = conv_recipe(tmp_path, adversarial={**GAME, "start": 24, "ahead": 8})
    steps, fooled = [], []

    def clip(self, model, *name, original=Stage.clip):
        steps.append((type(model).__name__, self.images))
        original(self, model, *name)

    def fool(terms, *rest):
        fooled.append(len(steps))
        add_adversarial_loss(terms, *rest)

    monkeypatch.setattr(Stage, "clip", clip)
    monkeypatch.setattr(tokenizer_loop, "add_adversarial_loss", fool)
    train_tokenizer(recipe)
    assert [n for name, n in steps if name == "Discriminator"] == [16, 24]
    assert [n for name, n in steps if name == "ConvObjective"] == [0, 8, 16, 24]
    assert fooled == [4]  # in the last step only, after two steps of the tokenizer and one of both


def resumed(recipes, monkeypatch):
    """The newest checkpoints of two recipes, which are equal though the second one's training was interrupted."""
    train_tokenizer(recipes[0])
    train_in_two_parts(recipes[1], monkeypatch)
    files = [checkpoints(recipe.folder, "tokenizer")[-1] for recipe in recipes]
    assert_same(*([load_file(file / name) for name in ("model.safetensors", "model_1.safetensors")] for file in files))
    moments = [torch.load(file / "optimizer_1.bin", weights_only=True)["state"] for file in files]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert_same(*(newest(recipe.folder, "tokenizer") for recipe in recipes))
    return files


def test_resume_includes_the_discriminator_and_its_optimiser(tmp_path, monkeypatch):
    game = {**GAME, "start": 8, "lecam": 0.1, "augment": ["color", "translation", "cutout"]}
    resumed([conv_recipe(tmp_path / name, adversarial=game) for name in ("whole", "parts")], monkeypatch)


def test_adaptive_weight_has_its_closed_form():
    layer = torch.tensor([2.0, 0.0], requires_grad=True)
    reconstruction, adversarial = 3 * layer[0] + 4 * layer[1], 0.5 * layer[0]
    assert adaptive_weight(reconstruction, adversarial, layer).item() == pytest.approx(5 / (0.5 + 1e-4))
    assert adaptive_weight(reconstruction * 1e9, adversarial, layer).item() == 1e4


def test_adaptive_weight_balances_the_gradients(objective):
    terms = generator_terms(objective, build_discriminator(3, 0, **SMALL))
    last = objective.tokenizer.decoder.conv_out.weight
    rest = {k: v for k, v in terms.weights.items() if k != "adversarial"}
    ours = torch.autograd.grad(sum(w * terms.losses[k] for k, w in rest.items()), last, retain_graph=True)[0]
    theirs = torch.autograd.grad(terms.weights["adversarial"] * terms.losses["adversarial"], last)[0]
    assert theirs.norm().item() == pytest.approx(0.5 * ours.norm().item(), rel=1e-2)


def test_losses_have_their_closed_forms():
    real, fake = torch.full((2, 1, 2, 2), 0.25), torch.full((2, 1, 2, 2), -3.0)
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * 0.75)
    assert generator_loss(fake).item() == 3.0
    log2 = torch.log(torch.tensor(2.0)).item()
    assert discriminator_loss(real * 0, fake * 0, "non-saturating").item() == pytest.approx(log2)
    assert generator_loss(fake * 0, "non-saturating").item() == pytest.approx(log2)
    lecam = adversarial.lecam_loss(real, fake, torch.tensor(1.0), torch.tensor(-1.0))
    assert lecam.item() == pytest.approx(1.25**2 + 4.0**2)


def test_group_norm_does_not_mix_images():
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    network = PatchGAN(channels=8, layers=2)
    torch.testing.assert_close(network(images)[:2], network(images[:2]))
    mixing = PatchGAN(channels=8, layers=2, norm="batch")
    assert not torch.allclose(mixing(images)[:2], mixing(images[:2]))


def test_three_layers_judge_70_pixels():
    """One logit depends on 70 x 70 pixels (Isola et al. 2017)."""
    network = PatchGAN(channels=4, layers=3, norm="batch").eval()
    nn.init.constant_(network.head.weight, 1.0)
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    logits = network(image)
    logits[0, 0, 15, 15].backward()
    rows = image.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70
    assert sum(p.numel() for p in PatchGAN(norm="batch").parameters()) == 2_765_633


def test_augmentation_is_differentiable_and_the_same_for_both():
    images = (torch.rand(3, 3, 16, 16) * 2 - 1).requires_grad_()
    numbers = torch.rand(3, 7)
    changed = augment(images, ["color", "translation", "cutout"], numbers)
    assert torch.equal(changed, augment(images.detach(), ["color", "translation", "cutout"], numbers))
    changed.sum().backward()
    assert images.grad.isfinite().all()
    assert torch.equal(augment(images, [], numbers), images)


def test_augmentations_do_what_they_say():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    middle = torch.full((2, 7), 0.5)
    torch.testing.assert_close(augment(images, ["color", "translation"], middle), images)  # the neutral numbers
    up = middle.clone()
    up[:, 3] = 0.999  # two rows
    moved = augment(images, ["translation"], up)
    assert torch.equal(moved[:, :, :14], images[:, :, 2:])
    assert (moved[:, :, 14:] == 0).all()
    hole = augment(images, ["cutout"], middle)
    assert (hole[:, :, 4:13, 4:13] == 0).all()
    assert torch.equal(hole[:, :, :4], images[:, :, :4])


@pytest.mark.parametrize(("hole", "side"), [(0.5, 33), (0.2, 13)])
def test_cutouts_have_their_share_of_the_side(hole, side):
    images = torch.ones(1, 3, 64, 64)
    cut = augment(images, ["cutout"], torch.full((1, 7), 0.5), hole)
    assert (cut == 0).sum().item() == 3 * side**2


def test_changes_befall_the_chosen_images_only():
    images, numbers = torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(4, 7)
    chosen = torch.tensor([[True, True, True], [False, False, False], [False, True, False], [True, False, True]])
    some = augment(images, CHANGES, numbers, chosen=chosen)
    for row, policy in enumerate((CHANGES, [], ["translation"], ["color", "cutout"])):
        assert torch.equal(some[row], augment(images[row, None], policy, numbers[row, None])[0])


def test_the_share_of_augmented_images():
    images, numbers = torch.rand(400, 3, 8, 8) * 2 - 1, torch.arange(400)

    def augmented(share, policy, order=numbers):
        changes = build_discriminator(3, 0, **SMALL, augment=policy, augment_share=share)
        return changes.augmented(images[order], order)

    assert torch.equal(augmented(0.0, list(CHANGES)), images)
    always = augmented(1.0, list(CHANGES))
    assert torch.equal(always, build_discriminator(3, 0, **SMALL, augment=CHANGES).augmented(images, numbers))
    touched = torch.stack([(augmented(0.5, [name]) != images).flatten(1).any(1) for name in CHANGES]).float()
    assert (touched.mean(1) - 0.5).abs().max() < 0.1
    assert torch.corrcoef(touched).fill_diagonal_(0).abs().max() < 0.2  # each is drawn for itself
    half = augmented(0.5, list(CHANGES))
    assert torch.equal(augmented(0.5, list(CHANGES), numbers.flip(0)), half.flip(0))  # whatever else is in the batch


def test_consistency_has_its_closed_form():
    ones, threes = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    assert adversarial.consistency_loss([ones, ones], [threes, ones]).item() == 2.0  # (4 + 0) / 2
    flat = torch.zeros(4, 3, 32, 32)
    discriminator = build_discriminator(3, 0, **SMALL, consistency=4.0)
    nn.init.zeros_(discriminator.network.head.weight)  # whatever it sees, it says the same
    terms = discriminator(flat, flat, torch.arange(4))
    assert (terms.losses["d_consistency"].item(), terms.weights["d_consistency"]) == (0.0, 4.0)


def test_consistency_compares_with_all_changes_made():
    discriminator = build_discriminator(3, 0, **SMALL, consistency=1.0)
    real, numbers = batch()["image"], torch.arange(4)
    fake, loss = real.flip(0), nn.functional.mse_loss
    terms = discriminator(real, fake, numbers)
    expected = [
        loss(discriminator.logits(x, numbers, strong=True), discriminator.logits(x, numbers)) for x in (real, fake)
    ]
    torch.testing.assert_close(terms.losses["d_consistency"], sum(expected) / 2)
    assert torch.equal(discriminator.logits(real, numbers), discriminator.network(real))  # nothing is augmented
    assert min(expected) > 0
    torch.testing.assert_close(terms.total, terms.losses["d_loss"] + terms.losses["d_consistency"])


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_lecam_follows_the_logits_at_its_decay(decay):
    discriminator = build_discriminator(3, 0, **SMALL, lecam=0.1, lecam_decay=decay)
    real = batch()["image"]
    for step in range(1, 4):
        terms = discriminator(real, -real, torch.arange(4))
        means = torch.stack([terms.losses["d_real"], terms.losses["d_fake"]])
        torch.testing.assert_close(discriminator.averages, (1 - decay**step) * means)


def test_what_is_refused(tmp_path):
    """Settings of the other kind, a last layer that is frozen, images that are too small."""
    sections = {"layers": {"kind": "dino", "layers": 2}, "channels": {"kind": "dino", "channels": 8}}
    for key, section in {**sections, "teacher": {"teacher": "x"}}.items():
        message = f"tokenizer.adversarial.{key} means nothing to kind"
        refused(message, conv_recipe, tmp_path, adversarial=section)
    frozen = conv_recipe(tmp_path, adversarial=GAME, train=["encoder"])
    refused(r"last layer, which tokenizer.train = \['encoder'\] freezes", train_tokenizer, frozen)
    small = r"at least 32 pixels a side, not 16 x 16; lower tokenizer.adversarial"
    refused(small, PatchGAN(), torch.zeros(1, 3, 16, 16))
