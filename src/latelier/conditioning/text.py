"""Captions: tokens of a transformer that is trained along with the denoiser, or of a frozen text encoder.

trained   word pieces -> `TokenTransformer` -> tokens; padding is not masked (Rombach et al. 2022)
frozen    any text encoder of `transformers`, computed once for a batch and without gradients; padding is masked
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from latelier.conditioning.condition import Condition, DataSpec
from latelier.errors import LatelierError
from latelier.layers import MLP, attention
from latelier.sections import Section, Unit
from latelier.weights import quiet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHARACTERS = 1000  # that word pieces are made of, the most frequent ones
TEXT_HALF = {  # classes that hold only the text half of a model; other kinds are opened by AutoModel
    "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}  # fmt: skip
NOT_THE_ENCODER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class TextCondition(Section):
    """The image's caption, through a transformer that is trained with the denoiser, or a frozen one."""

    kind: Literal["text"]
    encoder: str = Field("trained", description="`trained`, or a text encoder's Hub name or folder, which stays frozen")
    vocabulary: str = Field("data", description="`data`: word pieces of the captions; or a tokenizer's name or folder")
    vocabulary_size: int = Field(8192, ge=300, description="of `vocabulary: data`, at most")
    length: int = Field(77, ge=1, description="tokens")
    dim: int = Field(640, ge=1)
    layers: int = Field(32, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    dropout: Unit = Field(0.1, description="share of images whose caption is empty, for classifier-free guidance")


class TextConditioner(ModelMixin, ConfigMixin):
    """Tokens of captions; dropped ones become the empty caption. `trained` and `frozen` make one.

    It holds all that it needs, the frozen encoder and the word pieces too: it opens without the encoder's folder.

    Args:
        vocabulary_bytes: length of the tokenizer's JSON, which is the buffer `vocabulary`.
        length: tokens of a caption; longer ones are cut, shorter ones are padded.
        encoder_class, encoder_config: the frozen encoder's class in `transformers`; None for the trained transformer.
    """

    input_name, spatial_channels = "prompts", 0
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, vocabulary_bytes: int, vocabulary_size: int, length: int = 77, dim: int = 640, layers: int = 32,
        heads: int = 8, head_dim: int = 64, encoder_class: str | None = None,
        encoder_config: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.token_width = dim
        self._words: Tokenizer | None = None
        self.register_buffer("vocabulary", torch.zeros(vocabulary_bytes, dtype=torch.uint8))
        self.register_buffer("null_tokens", torch.zeros(length, dtype=torch.int64))
        self.register_buffer("null_mask", torch.ones(length, dtype=torch.bool))
        self.encoder: nn.Module | None = None
        if encoder_class is None:
            self.transformer = TokenTransformer(vocabulary_size, length, dim, layers, heads, head_dim)
        else:
            self.encoder = _new_encoder(encoder_class, encoder_config or {})
            self.register_buffer("null_features", torch.zeros(length, dim))

    @classmethod
    def trained(cls, words: Tokenizer, length: int = 77, **sizes: int) -> TextConditioner:
        """A transformer with fresh weights over the tokens of `words`; `sizes` are dim, layers, heads, head_dim."""
        words = _framed(words, length)
        conditioner = cls(len(words.to_str().encode()), vocabulary_size(words), length, **sizes)
        conditioner._store(words)
        return conditioner

    @classmethod
    def frozen(cls, name: str, length: int = 77) -> TextConditioner:
        """A frozen text encoder of `transformers` with its tokenizer, by its Hub name or folder."""
        encoder, class_name, config = read_encoder(name)
        room = config.get("max_position_embeddings")
        if room is not None and length > room:
            raise LatelierError(f"condition.length = {length}, but {name} reads {room} tokens at most.")
        words = _framed(read_tokenizer(name), length)
        if vocabulary_size(words) > config["vocab_size"]:
            raise LatelierError(
                f"The tokenizer of {name} has {vocabulary_size(words)} tokens, its encoder {config['vocab_size']}; "
                "put the encoder's own tokenizer into the folder."
            )
        try:
            features = _features(encoder, *_encode(words, [""]))  # (1, n, d)
        except (TypeError, ValueError, AttributeError) as error:
            raise LatelierError(
                f"condition.encoder = {name!r} is a {class_name}, which does not read text alone ({_first(error)}); "
                "give a text encoder, such as the folder of a CLIP text model, a T5 or a BERT."
            ) from None
        with init_empty_weights():  # of the encoder, whose weights are here already
            about = {"encoder_class": class_name, "encoder_config": config, "dim": features.shape[-1]}
            conditioner = cls(len(words.to_str().encode()), vocabulary_size(words), length, **about)
        conditioner.encoder = encoder
        conditioner._store(words)
        conditioner.null_features.copy_(features[0])
        return conditioner

    def _store(self, words: Tokenizer) -> None:
        """Put the tokenizer and the empty caption into the buffers."""
        self.vocabulary.copy_(torch.frombuffer(bytearray(words.to_str().encode()), dtype=torch.uint8))
        tokens, mask = _encode(words, [""])  # (1, n)
        self.null_tokens.copy_(tokens[0])
        self.null_mask.copy_(mask[0])

    @property
    def words(self) -> Tokenizer:
        """The tokenizer in the buffer `vocabulary`."""
        if self._words is None:
            self._words = _library("tokenizers").Tokenizer.from_buffer(self.vocabulary.cpu().numpy().tobytes())
        return self._words

    def inputs(self, wanted: list[Any], size: tuple[int, int]) -> dict[str, list[str]]:
        """Prompts, one for each image, to `caption`."""
        for prompt in wanted:
            if not isinstance(prompt, str):
                raise LatelierError(f"prompts has {prompt!r}, which is no text; give one string for each image.")
        return {"caption": list(wanted)}

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Any], codec: Any = None) -> dict[str, Tensor]:
        """`text_tokens`, `text_mask` `(b, n)`, false in padding, and a frozen encoder's `text_features` `(b, n, d)`."""
        tokens, mask = (x.to(self.device) for x in _encode(self.words, batch["caption"]))  # (b, n)
        entries = {"text_tokens": tokens, "text_mask": mask}
        if self.encoder is not None:
            entries["text_features"] = _features(self.encoder, tokens, mask)  # (b, n, d)
        return entries

    def forward(self, batch: Mapping[str, Any], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Tokens `(b, n, d)` of what `prepare` made; rows where `drop` is true get those of the empty caption."""
        tokens, mask = (batch[name].to(self.device) for name in ("text_tokens", "text_mask"))  # (b, n)
        if drop is None:
            drop = torch.zeros(len(tokens), dtype=torch.bool)
        drop = drop.to(self.device)[:, None]  # (b, 1)
        if self.encoder is None:
            return Condition(tokens=self.transformer(torch.where(drop, self.null_tokens, tokens)))
        features = batch["text_features"].to(self.device)  # (b, n, d)
        features = torch.where(drop[..., None], self.null_features.to(features.dtype), features)
        return Condition(tokens=features, mask=torch.where(drop, self.null_mask, mask))

    def train(self, mode: bool = True) -> TextConditioner:
        """Training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._words = None  # the vocabulary may be another


class TokenTransformer(ModelMixin, ConfigMixin):
    """Token and position embeddings, pre-norm blocks, a last norm (Rombach et al. 2022, for captions and layouts)."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["TokenBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self, vocabulary: int = 30522, length: int = 77, dim: int = 640, layers: int = 32, heads: int = 8,
        head_dim: int = 64,
    ):  # fmt: skip
        super().__init__()
        self.token_embed = nn.Embedding(vocabulary, dim)
        self.pos_embed = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(TokenBlock(dim, heads, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.gradient_checkpointing = False
        for table in (self.token_embed, self.pos_embed):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Embeddings of all positions; `mask` is true where a token may be attended to: at least one in each row."""
        x = self.token_embed(tokens) + self.pos_embed.weight[: tokens.shape[1]]  # (b, n, d)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, mask)
        return self.norm(x)


class TokenBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with an MLP four times as wide."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Multi-head self-attention whose inner width need not be `dim`; queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (b, h, n, k)
        q, k, v = qkv.unbind(0)
        if mask is None:
            x = attention(q, k, v)  # (b, h, n, k)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (b, h, n, k)
        return self.out(x.transpose(1, 2).flatten(2))  # (b, n, d)


def train_words(captions: Callable[[], Iterator[str]], size: int) -> Tokenizer:
    """Word pieces (BERT's, lower case), `size` at most, of captions; the same captions give the same pieces."""
    library = _library("tokenizers")
    words = _word_pieces(library, {name: i for i, name in enumerate(SPECIAL)})
    counts = Counter(c for caption in captions() for c in words.normalizer.normalize_str(caption) if not c.isspace())
    if not counts:
        raise LatelierError("condition.vocabulary = 'data', but all captions are empty; name a tokenizer instead.")
    ranked = sorted(counts, key=lambda c: (-counts[c], c))[: min(CHARACTERS, size // 4)]
    alphabet = sorted(ranked)
    # The trainer numbers characters in the order of a hash table, another one in each process, and ties between
    # pieces are broken by number. Given as special tokens, in order, they are numbered already.
    first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet)]
    options = {"special_tokens": first, "initial_alphabet": alphabet, "limit_alphabet": len(alphabet)}
    trainer = library.trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, show_progress=False, **options)
    words.train_from_iterator(captions(), trainer)
    return _word_pieces(library, words.get_vocab())


def _word_pieces(library: Any, vocabulary: dict[str, int]) -> Tokenizer:
    """BERT's tokenizer, uncased, over a vocabulary: [CLS] caption [SEP]."""
    words = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    words.decoder = library.decoders.WordPiece()
    words.add_special_tokens(list(SPECIAL))
    frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    words.post_processor = library.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    words.enable_padding(pad_id=vocabulary["[PAD]"], pad_token="[PAD]")
    return words


def read_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by its name on the Hugging Face Hub, or from a folder; an error if it cannot be loaded."""
    library = _library("transformers")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(name)
        words = tokenizer.backend_tokenizer
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise LatelierError(_not_loaded("tokenizer", name, error, "`vocabulary: data`")) from None
    words = type(words).from_str(words.to_str())
    # Of a folder without a tokenizer's files, transformers makes one that knows no words but its special tokens.
    if len(words.get_vocab()) - len(words.get_added_tokens_decoder()) < 10:
        raise LatelierError(_not_loaded("tokenizer", name, OSError("it has no words"), "`vocabulary: data`"))
    pad = tokenizer.pad_token or tokenizer.eos_token  # language models were trained without padding
    if pad is None:
        raise LatelierError(f"The tokenizer {name} has no token for padding; choose another one.")
    words.enable_padding(pad_id=tokenizer.convert_tokens_to_ids(pad), pad_token=pad)
    return words


def vocabulary_size(words: Tokenizer) -> int:
    """How many rows an embedding of these tokens has."""
    return 1 + max(words.get_vocab().values())


def _framed(words: Tokenizer, length: int) -> Tokenizer:
    """A tokenizer whose encodings are all of one length."""
    marks = words.num_special_tokens_to_add(False)
    if length <= marks:
        raise LatelierError(f"condition.length = {length} leaves no room for words beside {marks} marks; enlarge it.")
    pad = words.padding
    assert pad is not None  # `train_words` and `read_tokenizer` enable it
    words = type(words).from_str(words.to_str())
    words.enable_truncation(length)
    words.enable_padding(pad_id=pad["pad_id"], pad_token=pad["pad_token"], length=length)
    return words


def _encode(words: Tokenizer, captions: list[str]) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Token ids, and a mask that is true where a token counts: at least the first, lest nothing could be attended."""
    encodings = words.encode_batch(captions)
    tokens = torch.tensor([encoding.ids for encoding in encodings])  # (b, n)
    mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()  # (b, n)
    mask[:, 0] = True
    return tokens, mask


def read_encoder(name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """A text encoder by its Hub name or folder, frozen, float32; its class in `transformers`; its config."""
    library = _library("transformers")
    try:
        kind = library.AutoConfig.from_pretrained(name).model_type
        cls = getattr(library, TEXT_HALF.get(kind, "AutoModel"))
        with quiet(library):  # about the other half's weights, which are left out
            model, report = cls.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise LatelierError(_not_loaded("encoder", name, error, "`encoder: trained`")) from None
    lacking = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # tokens are not pooled
    if lacking:
        raise LatelierError(f"{name} lacks weights of {type(model).__name__}: {', '.join(lacking[:3])}.")
    if model.config.is_encoder_decoder:
        raise LatelierError(f"{name} is a {type(model).__name__}, which has a decoder too; give a text encoder.")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in NOT_THE_ENCODER}
    return _stripped(model.float()), type(model).__name__, config


def _new_encoder(class_name: str, config: dict[str, Any]) -> nn.Module:
    """An encoder to load weights into."""
    library = _library("transformers")
    cls: Any = getattr(library, class_name, None)
    known = isinstance(cls, type) and issubclass(cls, library.PreTrainedModel)
    if not known:
        raise LatelierError(f"The conditioner's config names {class_name!r}, which is no model of transformers.")
    return _stripped(cls(cls.config_class.from_dict(dict(config))))


def _stripped(model: nn.Module) -> nn.Module:
    """Frozen; of T5 without the second name of its embedding, since files hold each tensor once."""
    model = model.encoder if type(model).__name__.endswith("T5EncoderModel") else model
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _features(encoder: nn.Module, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The encoder's last hidden state, float32."""
    return encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise LatelierError(f"Captions need the package {name}: pip install 'latelier[text]'.") from None


def _not_loaded(what: str, name: str, error: Exception, otherwise: str) -> str:
    return (
        f"The text {what} {name!r} cannot be loaded ({_first(error)}); give a name on the Hugging Face Hub when "
        f"online, a folder with config, weights and tokenizer, or choose {otherwise}, which needs neither."
    )


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def build(section: TextCondition, spec: DataSpec) -> TextConditioner:
    """The conditioner of a recipe's section; an error if the data have no captions."""
    if spec.captions is None:
        raise LatelierError(
            "denoiser.condition is text, but the data have no captions; name their column by data.caption_key."
        )
    if section.encoder != "trained":
        return TextConditioner.frozen(section.encoder, section.length)
    name = section.vocabulary
    words = train_words(spec.captions, section.vocabulary_size) if name == "data" else read_tokenizer(name)
    sizes = section.model_dump(include={"dim", "layers", "heads", "head_dim"})
    return TextConditioner.trained(words, section.length, **sizes)


SECTIONS = (TextCondition,)
