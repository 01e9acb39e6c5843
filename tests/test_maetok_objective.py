"""MAETok's objective: what each term sees, when it counts, and that every part runs once."""

import math

import pytest
import torch
from torch import nn

from latelier.losses.reconstruction import ReconstructionLoss, gaussian_kl
from latelier.tokenizers import build_objective, last_layer
from latelier.tokenizers.maetok import LinearReadout, MAETok, MAETokObjective, MAETokSection, auxiliary_decoder
from latelier.tokenizers.maetok_targets import MaskShare, Target, draw_mask
from tiny import MAETOK, refused


class Colours(Target):
    """Stands for a teacher: the mean colour of each patch."""

    dim = 3

    def __init__(self, name="colours", depth=1, weight=1.0):
        super().__init__(name, self.dim, weight, decoder=(16, depth, 2))
        self.calls, self.shift = 0, torch.zeros(())

    def tokens(self, grid):
        return grid

    def __call__(self, batch, grid):
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(batch["image"], grid).flatten(2).transpose(1, 2) + self.shift

    def error(self, prediction, target, mask):
        return (prediction - target).square().mean(-1)[mask].mean()


class Words(Colours):
    """Stands for a caption: four words out of five, the same for every image."""

    dim = 5

    def tokens(self, grid):
        return (1, 4)

    def __call__(self, batch, grid):
        self.calls += 1
        return torch.arange(4).repeat(len(batch["image"]), 1)

    def error(self, prediction, target, mask):
        return nn.functional.cross_entropy(prediction.flatten(0, 1), target.flatten())


class Brightness(nn.Module):
    """Stands for LPIPS."""

    def forward(self, x, y):
        return (x.mean((1, 2, 3)) - y.mean((1, 2, 3))).abs()


def make(targets=(), perceptual=None, variational=False, mask=None, perceptual_weight=0.0, every=1, **changes):
    """An objective on a tiny tokenizer for 64 px, 16 patches."""
    tokenizer = MAETok((64, 64), **MAETOK["model"], variational=variational)
    for block in tokenizer.decoder.blocks:  # zero at first, so that patches would not hear the latents
        nn.init.normal_(block.modulation.weight, std=0.1)
    loss = ReconstructionLoss("mse", perceptual, perceptual_weight, every)
    share = None if mask == NO_MASK else MaskShare(**(mask or {}))
    return MAETokObjective(tokenizer, loss, 0, share, targets, **changes)


def batch(n=3, seen=0, **more):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 64, 64, generator=generator) * 2 - 1
    return {"image": images, "sample_id": torch.arange(n), "index": torch.arange(n), "seen": seen, **more}


def spied_mask(monkeypatch):
    """The masks that are drawn from now on."""
    masks = []

    def draw(order, share):
        masks.append(draw_mask(order, share))
        return masks[-1]

    monkeypatch.setattr("latelier.tokenizers.maetok.draw_mask", draw)
    return masks


NO_MASK = {"low": 0.0, "high": 0.0, "mode": 0.0}


@pytest.mark.parametrize(
    ("targets", "changes", "names"),
    [
        ([], {"mask": NO_MASK}, {"mse"}),
        ([], {}, {"mse"}),
        ([Colours("hog"), Words("caption")], {}, {"mse", "hog", "caption"}),
        ([Colours("hog")], {"variational": True, "kl_weight": 1e-6}, {"mse", "hog", "kl"}),
        ([Colours("hog")], {"perceptual": Brightness(), "perceptual_weight": 1.0}, {"mse", "hog", "lpips"}),
    ],
)
def test_terms_and_weights(targets, changes, names):
    objective = make(targets, **changes)
    terms = objective(batch())
    assert set(terms.losses) == set(terms.weights) == names
    assert all(value.isfinite() and value.ndim == 0 for value in terms.losses.values())
    assert terms.weights["mse"] == 1.0
    assert terms.reconstruction.detach().shape == (3, 3, 64, 64)
    assert objective.tokenizer.mask_token.requires_grad == ("mask" not in changes)  # only where it is used


def test_pixels_count_everywhere_and_targets_have_their_weights():
    objective = make([Colours("hog", weight=0.25)])
    data = batch()
    terms = objective(data)
    torch.testing.assert_close(terms.losses["mse"], (terms.reconstruction.detach() - data["image"]).square().mean())
    assert terms.weights["hog"] == 0.25
    torch.testing.assert_close(terms.total, terms.losses["mse"] + 0.25 * terms.losses["hog"])


@pytest.mark.parametrize("depth", [0, 1])
def test_targets_count_at_masked_patches_only(monkeypatch, depth):
    masks, target = spied_mask(monkeypatch), Colours(depth=depth)
    objective = make([target])
    first = objective(batch()).losses["colours"]
    mask = masks[0]
    assert (mask.sum(1) == mask[0].sum()).all()
    assert 7 <= mask[0].sum() <= 10  # 0.4 to 0.6 of 16, rounded up
    target.shift = 5.0 * (~mask).float()[..., None]
    assert torch.equal(objective(batch()).losses["colours"], first)
    target.shift = 5.0 * mask.float()[..., None]
    assert objective(batch()).losses["colours"] > first + 1


def test_masked_patches_do_not_reach_the_latents(monkeypatch):
    masks = spied_mask(monkeypatch)
    objective = make([Colours()]).eval()
    data = batch()
    first = objective(data).reconstruction.detach()
    hidden = masks[0].view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, -data["image"], data["image"])
    assert torch.equal(objective({**data, "image": changed}).reconstruction.detach(), first)
    changed = torch.where(hidden, data["image"], -data["image"])
    assert not torch.equal(objective({**data, "image": changed}).reconstruction.detach(), first)


def test_every_part_runs_once():
    targets = [Colours("a"), Colours("b"), Words("c")]
    objective = make(targets)
    calls = []
    for name in ("moments", "decode_tokens"):
        original = getattr(objective.tokenizer, name)
        setattr(objective.tokenizer, name, lambda *x, f=original, n=name: (calls.append(n), f(*x))[1])
    for name, decoder in objective.auxiliary.items():
        decoder.register_forward_hook(lambda *_, n=name: calls.append(n))
    objective(batch())
    assert calls == ["moments", "decode_tokens", "a", "b", "c"]
    assert [target.calls for target in targets] == [1, 1, 1]


def test_perceptual_weight_rises():
    objective = make(perceptual=Brightness(), perceptual_weight=2.0, perceptual_warmup=1000)
    assert "lpips" not in objective(batch(seen=0)).losses
    weights = [objective(batch(seen=seen)).weights["lpips"] for seen in (250, 1000, 5000, math.inf)]
    assert weights == [0.5, 2.0, 2.0, 2.0]


def test_perceptual_judges_some_images():
    data = batch(seen=7)
    shown = []

    class Spy(Brightness):
        def forward(self, x, y):
            shown.append(y)
            return super().forward(x, y)

    make(perceptual=Spy(), perceptual_weight=1.0, every=2)(data)
    assert torch.equal(shown[0], data["image"][::2])
    odd = {**data, "sample_id": torch.tensor([1, 3, 5])}
    assert "lpips" not in make(perceptual=Spy(), perceptual_weight=1.0, every=2)(odd).losses


def test_kl_is_summed_over_a_latent_and_averaged_over_the_rest():
    objective = make(variational=True, kl_weight=0.5, mask=NO_MASK)
    data = batch()
    mean, logvar = objective.tokenizer.moments(data["image"]).chunk(2, dim=-1)  # (3, 6, 4)
    assert mean.shape == (3, 6, 4)
    terms = objective(data)
    expected = gaussian_kl(mean, logvar).sum() / (3 * 6)
    torch.testing.assert_close(terms.losses["kl"], expected)
    assert terms.weights["kl"] == 0.5
    refused(r"kl_weight = 0\.5 needs an encoder that gives a variance", make, kl_weight=0.5)


@pytest.mark.parametrize("variational", [False, True])
def test_randomness_is_addressed_by_the_image(variational):
    objective = make([Colours()], variational=variational).eval()
    data = batch(4, seen=512)
    whole = objective(data).reconstruction.detach()
    half = {**data, "image": data["image"][2:], "sample_id": torch.arange(2, 4)}
    torch.testing.assert_close(whole[2:], objective(half).reconstruction.detach())
    assert torch.equal(objective(data).reconstruction.detach(), whole)


def test_two_halves_of_a_batch_have_the_whole_ones_gradient():
    """As two processes or micro-batches have, which mask as many patches in the same step."""
    objective = make([Colours("a"), Words("b")], variational=True, kl_weight=0.1)
    data = batch(4, seen=512)
    halves = [{k: v[i : i + 2] if torch.is_tensor(v) else v for k, v in data.items()} for i in (0, 2)]
    gradients = []
    for parts in ([data], halves):
        objective.zero_grad()
        for part in parts:
            (objective(part).total / len(parts)).backward()
        gradients.append({k: p.grad for k, p in objective.named_parameters()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seen", [0, 10**9], ids=["masked", "faded"])
@pytest.mark.parametrize("variational", [False, True])
def test_every_trained_weight_has_a_gradient_at_every_step(seen, variational):
    """Where DDP waits for all of them, a step without masks, too."""
    objective = make([Colours("a"), Words("b"), Colours("c", depth=0)], variational=variational, mask={"fade": 1000})
    terms = objective(batch(seen=seen))
    assert ("a" in terms.losses) == (seen == 0)
    terms.total.backward()
    missing = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    if seen:
        assert all(not p.grad.any() for p in objective.auxiliary.parameters())


def test_faded_masks_are_no_masks():
    """At the end of fine-tuning the decoder sees what it will see in use."""
    objective = make(mask={"low": 0.0, "fade": 1000}).eval()
    data = batch(seen=1000)
    plain = objective.tokenizer.decode_tokens(objective.tokenizer.moments(data["image"]), (4, 4))
    torch.testing.assert_close(objective(data).reconstruction.detach(), plain)


def test_teachers_are_no_part_of_the_objective():
    class Teacher(Colours):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(7, 7)

    objective = make([Teacher()])
    assert not any(p.shape == (7, 7) for p in objective.state_dict().values())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"tokenizer", "auxiliary"}


@pytest.mark.parametrize("depth", [0, 1])
def test_auxiliary_decoders_read_the_latents(depth):
    """They come nearer to a target than whatever knows the patch but not the image."""
    decoder = auxiliary_decoder(make().tokenizer, Colours(depth=depth))
    assert isinstance(decoder, LinearReadout) == (depth == 0)
    z, wanted = torch.randn(2, 6, 4), torch.randn(2, 16, 3)
    blind = wanted.var(0, correction=0).mean()  # the error of the mean over images, patch by patch
    optimiser = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(300):
        loss = (decoder(z, (4, 4)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.8 * blind, loss / blind


def test_linear_readout_refuses_other_grids():
    decoder = LinearReadout(6, 4, (4, 4), 3)
    z = torch.randn(2, 6, 4)
    mixed = torch.einsum("nl,blc->bnc", decoder.mix.weight, z) + decoder.mix.bias[:, None]
    torch.testing.assert_close(decoder(z, (4, 4)), mixed @ decoder.head.weight.T + decoder.head.bias)
    refused(r"depth 0 is made for \(4, 4\) patches, but the image has \(2, 8\)", decoder, z, (2, 8))


def test_the_discriminator_weighs_against_the_image_not_the_targets():
    """Targets do not pass through the last layer, so its gradient is the same with and without them."""
    gradients = []
    for targets in ([], MAETOK["targets"]):
        torch.manual_seed(0)
        tokenizer = MAETok((64, 64), **MAETOK["model"])
        section = MAETokSection(kind="maetok", perceptual_weight=0, targets=targets)
        terms = build_objective(section, 0, tokenizer)(batch(seen=8))
        gradients.append(torch.autograd.grad(terms.total, last_layer(tokenizer))[0])
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)
