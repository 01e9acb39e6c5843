"""Several conditions at once, what a user may ask of a model, and when guidance is possible."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from latelier.conditioning import CONDITIONERS
from latelier.conditioning import condition as conditions
from latelier.conditioning.condition import ClassConditioner, CompositeConditioner, Condition, build_conditioner
from latelier.conditioning.inputs import Inputs
from latelier.conditioning.spatial import LowResolutionConditioner
from latelier.denoisers.objective import DenoiserSection
from latelier.sections import ByKind
from tiny import data_spec, refused, tiny_recipe

SPEC = data_spec(class_names=["cat", "dog"], vector_width=16, prefers_tokens=False)


class Toy(ModelMixin, ConfigMixin):
    """Tokens that are the caption's length."""

    input_name = "prompts"
    spatial_channels = 0

    @register_to_config
    def __init__(self, width: int = 8):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width))

    @property
    def token_width(self):
        return self.config["width"]

    def prepare(self, batch, codec):
        return {"lengths": torch.tensor([float(len(caption)) for caption in batch["caption"]])}

    def inputs(self, wanted, size):
        return {"caption": list(wanted)}

    def forward(self, batch, drop=None):
        lengths = batch["lengths"]
        if drop is not None:
            lengths = torch.where(drop, 0.0, lengths)
        return Condition(tokens=lengths[:, None, None] * self.scale)


def both():
    return CompositeConditioner.of([ClassConditioner(2, 8, names=["cat", "dog"], inject="tokens"), Toy()])


def batch(**more):
    return {"label": torch.tensor([0, 1]), "lengths": torch.tensor([2.0, 3.0]), "sample_id": torch.arange(2), **more}


def test_merge_adds_vectors_and_lines_up_the_rest():
    a = Condition(vector=torch.ones(1, 2), tokens=torch.zeros(1, 2, 3), spatial=torch.zeros(1, 1, 4, 4))
    b = Condition(vector=torch.ones(1, 2), tokens=torch.ones(1, 1, 3), mask=torch.tensor([[False]]))
    c = conditions.merge([a, b, Condition(spatial=torch.ones(1, 2, 4, 4))])
    assert torch.equal(c.vector, 2 * torch.ones(1, 2))
    assert c.tokens[0, :, 0].tolist() == [0, 0, 1]
    assert (c.mask.tolist(), c.spatial[0, :, 0, 0].tolist()) == ([[True, True, False]], [0, 1, 1])


def test_each_component_is_dropped_by_its_own_column():
    composite = both()
    cond = composite(batch()).tokens
    drop = torch.tensor([[True, False], [False, True]])
    mixed = composite(batch(), drop).tokens
    none = composite(batch(), torch.tensor([True, True])).tokens
    assert torch.equal(mixed[0, 1], cond[0, 1])
    assert torch.equal(mixed[0, 0], none[0, 0])
    assert torch.equal(mixed[1, 0], cond[1, 0])
    assert torch.equal(mixed[1, 1], none[1, 1])
    assert not torch.equal(none, cond)


@pytest.mark.parametrize("shape", [(2, 2, 1), (3,), (3, 2)])
def test_a_wrong_shape_of_the_dropped_rows_is_refused(shape):
    """By the types, which tests check: `drop` has a row for each image."""
    from jaxtyping import TypeCheckError

    drop, conditioner = torch.zeros(shape, dtype=torch.bool), both()
    with pytest.raises(TypeCheckError if len(shape) == 3 else (TypeCheckError, RuntimeError, IndexError)):
        conditioner(batch(), drop)


def test_saved_and_loaded_whole(tmp_path):
    spec = SPEC
    section = DenoiserSection(condition=["class", {"kind": "low-resolution", "factor": 4}]).condition
    composite = build_conditioner(section, spec)
    assert (composite.spatial_channels, composite.token_width) == (3, 0)
    composite.save_pretrained(tmp_path)
    again = CompositeConditioner.from_pretrained(tmp_path)
    assert isinstance(again.components["low_resolution"], LowResolutionConditioner)
    for name, tensor in composite.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_sections_that_do_not_go_composite():
    refused("names a kind twice: class, class", DenoiserSection, condition=["class", "class"])
    refused("the data has no classes", build_conditioner, DenoiserSection().condition, data_spec())


def test_the_table_of_conditions():
    """It is read without torch, and knows the section of every kind."""
    light = (
        "import sys, latelier.conditioning; print([m for m in ('torch', 'diffusers', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout.strip() == "[]"
    for kind in CONDITIONERS:
        section = ByKind("latelier.conditioning:CONDITIONERS").section(kind)(kind=kind)
        assert section.kind == kind
        assert 0 <= section.dropout < 1
    assert DenoiserSection(condition="none").condition == []
    for condition, message in (
        ("depth", "kind = 'depth' is not known; allowed: class, text, layout"),
        (
            {"kind": "text", "lenght": 9},
            "Unknown key 'denoiser.condition.0.lenght' in the recipe; did you mean 'length'",
        ),
        ({"kind": "text", "length": 0}, "denoiser.condition.0.length = 0 is not allowed"),
        ({"length": 9}, "kind = None is not known; allowed: class, text, layout"),
    ):
        refused(message, tiny_recipe, Path("runs"), denoiser={"condition": condition})


def test_inputs_that_a_model_does_not_take():
    composite, everything = both(), {"classes": ["cat"], "prompts": ["a"]}
    told, text = Inputs(everything), Inputs({"prompts": ["a"]})
    maps, negative = Inputs({**everything, "maps": [1]}), Inputs(everything, negative_prompts=["b"])
    refused(r"maps = 1 is no input of .* is conditioned on classes and prompts", maps.check, composite, 1.0, [])
    refused("give prompts, one or more", Inputs({"classes": ["cat"]}).check, composite, 1.0, [])
    refused("trained without dropping its conditions", told.check, composite, 2.0, [])
    refused("negative_prompts act through guidance", negative.check, composite, 1.0, ["prompts"])
    refused("prompts = 'a' is no input of this model, which is unconditional", text.check, None, 1.0, [])
    assert text.check(composite, 1.0, []).wanted["classes"] == [0, 1]


def test_guidance_leaves_out_only_what_was_dropped_in_training():
    composite = both()
    inputs = Inputs({"classes": ["dog"], "prompts": ["abc"]}).check(composite, 2.0, ["prompts"])
    cond, uncond, _ = inputs.conditions(composite, [5, 6], 5, (8, 8), None, ["prompts"])
    assert torch.equal(uncond.tokens[:, 0], cond.tokens[:, 0])
    assert (uncond.tokens[:, 1] == 0).all()
    cond, uncond, _ = inputs.conditions(composite, [5], 5, (8, 8), None, None)
    assert uncond is None


def test_negative_prompts_take_the_place_of_nothing():
    composite = both()
    inputs = Inputs({"classes": ["dog"], "prompts": ["abc"]}, negative_prompts=["ab"])
    _, uncond, _ = inputs.check(composite, 2.0, ["prompts"]).conditions(
        composite, [5], 5, (8, 8), None, ["prompts", "classes"]
    )
    assert torch.equal(uncond.tokens[0, 1], 2 * torch.ones(8))
    assert torch.equal(uncond.tokens[0, 0], composite.components["classes"].null(1).tokens[0, 0])


def test_images_go_round_the_lists():
    inputs = Inputs({"classes": ["dog", "cat"]}).check(ClassConditioner(2, 8, names=["cat", "dog"]), 1.0, [])
    conditioner = ClassConditioner(2, 8, names=["cat", "dog"])
    cond, _, _ = inputs.conditions(conditioner, [12, 13, 14], 10, (8, 8), None, None)
    expected = conditioner({"label": torch.tensor([1, 0, 1])})
    assert torch.equal(cond.vector, expected.vector)
    assert len(inputs) == 2
    assert list(conditions.components(conditioner)) == ["classes"]
