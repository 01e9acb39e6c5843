"""Classifier-free guidance."""

from functools import partial

import pytest
import torch
from torch import nn

from latelier.conditioning.condition import Condition
from latelier.diffusion.cfg import guided
from tiny import refused


class Adder(nn.Module):
    """Predicts x + t + the condition's vector, and counts its calls and rows."""

    def __init__(self):
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, x_t, t, condition):
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t)
        shift = 0 if condition is None else condition.vector[:, :, None, None]
        return x_t + t[:, None, None, None] + shift


@pytest.fixture
def case():
    cond, uncond = Condition(torch.ones(2, 1)), Condition(torch.zeros(2, 1))
    return Adder(), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.3]), cond, uncond


def test_formula_in_one_forward_pass(case):
    model, x, t, cond, uncond = case
    torch.testing.assert_close(guided(model, cond, uncond, 4.0)(x, t), x + 0.3 + 4)
    assert (model.calls, model.rows) == (1, 4)
    torch.testing.assert_close(guided(model, cond, uncond, 0.0)(x, t), x + 0.3)


@pytest.mark.parametrize("off", ["scale", "interval", "uncond", "cond"])
def test_no_guidance_is_exactly_the_conditional_prediction(case, off):
    model, x, t, cond, uncond = case
    cond, uncond = (None if off == "cond" else cond), (None if off == "uncond" else uncond)
    interval = (0.5, 1.0) if off == "interval" else (0.0, 1.0)
    prediction = guided(model, cond, uncond, 1.0 if off == "scale" else 4.0, interval)(x, t)
    assert model.rows == 2
    assert torch.equal(prediction, model(x, t, cond))


def test_interval_acts_on_each_image(case):
    model, x, _, cond, uncond = case
    t = torch.tensor([0.3, 0.6])
    expected = x + t[:, None, None, None] + torch.tensor([4.0, 1.0])[:, None, None, None]
    torch.testing.assert_close(guided(model, cond, uncond, 4.0, (0.0, 0.5))(x, t), expected)


def test_autoguidance_is_one_pass_of_each_model_and_costs_nothing_at_one(case):
    model, x, _, cond, _ = case
    weak, asked = Adder(), torch.tensor([0.3, 0.6])
    away = partial(weak, condition=Condition(torch.full((2, 1), 3.0)))
    for told in (cond, None):  # an unconditional model can be guided too
        strong = model(x, asked, told)
        model.calls = model.rows = weak.calls = weak.rows = 0
        u = x + asked[:, None, None, None] + 3
        guidance = guided(model, told, None, 1.5, (0.5, 1.0), weak=away)(x, asked)
        torch.testing.assert_close(guidance[1], (u + 1.5 * (strong - u))[1])
        torch.testing.assert_close(guidance[0], strong[0])  # outside of the interval
        assert (model.calls, model.rows, weak.calls, weak.rows) == (1, 2, 1, 2)
        assert torch.equal(guided(model, told, None, 1.0, weak=away)(x, asked), strong)
        assert weak.calls == 1


def test_first_channels_only(case):
    model, x, t, cond, uncond = case
    prediction = guided(model, cond, uncond, 4.0, channels=2)(x, t)
    torch.testing.assert_close(prediction[:, :2], x[:, :2] + 4.3)
    assert torch.equal(prediction[:, 2:], model(x, t, cond)[:, 2:])
    refused(r"guidance_channels = 4.* 3 channels", guided(model, cond, uncond, 4.0, channels=4), x, t)


def test_all_injections_are_doubled():
    tokens, mask = torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.bool)
    seen = []

    class Spy(nn.Module):
        def forward(self, x_t, t, condition):
            seen.append(condition)
            return x_t

    cond = Condition(tokens=tokens, mask=mask, spatial=torch.ones(2, 1, 4, 4))
    uncond = Condition(tokens=0 * tokens, mask=mask, spatial=torch.zeros(2, 1, 4, 4))
    guided(Spy(), cond, uncond, 2.0)(torch.randn(2, 3, 4, 4), torch.full((2,), 0.5))
    assert torch.equal(seen[0].tokens, torch.cat([tokens, 0 * tokens]))
    assert seen[0].spatial.shape == (4, 1, 4, 4)
    assert seen[0].vector is None
