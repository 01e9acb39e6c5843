"""Several conditions at once, what a user may ask of a model, and when guidance is possible."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from latelier.conditioning import DataSpec, build_conditioner, parts
from latelier.conditioning.asking import Asked
from latelier.conditioning.composite import CompositeConditioner, merge
from latelier.conditioning.condition import ClassConditioner, Condition
from latelier.conditioning.low_resolution import LowResolutionConditioner
from latelier.denoisers.objective import DenoiserSection
from latelier.errors import LatelierError

WORLD = DataSpec(["cat", "dog"], None, None, None, (4, 8, 8), 4, 3, 16, False, 0)


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
    c = merge([a, b, Condition(spatial=torch.ones(1, 2, 4, 4))])
    assert torch.equal(c.vector, 2 * torch.ones(1, 2))
    assert c.tokens[0, :, 0].tolist() == [0, 0, 1]
    assert c.mask.tolist() == [[True, True, False]]
    assert c.spatial[0, :, 0, 0].tolist() == [0, 1, 1]


def test_each_part_is_dropped_by_its_own_column():
    together = both()
    told = together(batch()).tokens
    drop = torch.tensor([[True, False], [False, True]])
    mixed = together(batch(), drop).tokens
    none = together(batch(), torch.tensor([True, True])).tokens
    assert torch.equal(mixed[0, 1], told[0, 1])
    assert torch.equal(mixed[0, 0], none[0, 0])
    assert torch.equal(mixed[1, 0], told[1, 0])
    assert torch.equal(mixed[1, 1], none[1, 1])
    assert not torch.equal(none, told)


def test_saved_and_loaded_whole(tmp_path):
    spec = WORLD
    section = DenoiserSection(condition=["class", {"kind": "low-resolution", "factor": 4}]).condition
    together = build_conditioner(section, spec)
    assert together.spatial_channels == 3
    assert together.token_width == 0
    together.save_pretrained(tmp_path)
    again = CompositeConditioner.from_pretrained(tmp_path)
    assert isinstance(again.parts["low_resolution"], LowResolutionConditioner)
    for name, tensor in together.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_sections_that_do_not_go_together():
    with pytest.raises(LatelierError, match="names a kind twice: class, class"):
        build_conditioner(DenoiserSection(condition=["class", "class"]).condition, WORLD)
    nothing = DataSpec(None, None, None, None, (4, 8, 8), 4, 3, 16, False, 0)
    with pytest.raises(LatelierError, match="the data has no classes"):
        build_conditioner(DenoiserSection().condition, nothing)


def test_what_cannot_be_asked():
    together = both()
    everything = {"classes": ["cat"], "prompts": ["a"]}
    with pytest.raises(LatelierError, match="maps = 1 cannot be asked of this model, which is told classes and prompt"):
        Asked({**everything, "maps": [1]}).check(together, 1.0, [])
    with pytest.raises(LatelierError, match="say which prompts to draw"):
        Asked({"classes": ["cat"]}).check(together, 1.0, [])
    with pytest.raises(LatelierError, match="never told nothing"):
        Asked(everything).check(together, 2.0, [])
    with pytest.raises(LatelierError, match="negative_prompts act through guidance"):
        Asked(everything, negative_prompts=["b"]).check(together, 1.0, ["prompts"])
    with pytest.raises(LatelierError, match="prompts = 'a' cannot be asked of this model, which is unconditional"):
        Asked({"prompts": ["a"]}).check(None, 1.0, [])
    assert Asked({"prompts": ["a"]}).check(together, 1.0, []).wanted["classes"] == [0, 1]


def test_guidance_leaves_out_only_what_was_dropped_in_training():
    together = both()
    asked = Asked({"classes": ["dog"], "prompts": ["abc"]}).check(together, 2.0, ["prompts"])
    told, null, _ = asked.conditions(together, [5, 6], 5, (8, 8), None, 2.0, ["prompts"])
    assert torch.equal(null.tokens[:, 0], told.tokens[:, 0])
    assert (null.tokens[:, 1] == 0).all()
    told, null, _ = asked.conditions(together, [5], 5, (8, 8), None, 1.0, ["prompts"])
    assert null is None


def test_negative_prompts_take_the_place_of_nothing():
    together = both()
    asked = Asked({"classes": ["dog"], "prompts": ["abc"]}, negative_prompts=["ab"])
    _, null, _ = asked.check(together, 2.0, ["prompts"]).conditions(
        together, [5], 5, (8, 8), None, 2.0, ["prompts", "classes"]
    )
    assert torch.equal(null.tokens[0, 1], 2 * torch.ones(8))
    assert torch.equal(null.tokens[0, 0], together.parts["classes"].null(1).tokens[0, 0])


def test_images_go_round_the_lists():
    asked = Asked({"classes": ["dog", "cat"]}).check(ClassConditioner(2, 8, names=["cat", "dog"]), 1.0, [])
    conditioner = ClassConditioner(2, 8, names=["cat", "dog"])
    told, _, _ = asked.conditions(conditioner, [12, 13, 14], 10, (8, 8), None, 1.0, [])
    expected = conditioner({"label": torch.tensor([1, 0, 1])})
    assert torch.equal(told.vector, expected.vector)
    assert len(asked) == 2
    assert list(parts(conditioner)) == ["classes"]
