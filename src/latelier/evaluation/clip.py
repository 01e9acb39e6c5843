"""How well images fit their captions, as CLIP sees it (Hessel et al. 2021): 100 max(cos, 0) of the two features."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError
from latelier.images import to_uint8

# CLIP's own statistics of images in [0, 1] (Radford et al. 2021)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPScore:
    """A CLIP from the Hub or a folder.

    Args:
        name: of the model.
        device: where features are computed.

    Raises:
        LatelierError: if it cannot be loaded, or is no CLIP.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name = name
        self._model, self._words = _load(name)
        self._model.to(device)
        self._size = self._model.config.vision_config.image_size
        self._length = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"], captions: list[str]) -> Float[Tensor, " b"]:
        """The score of each image in [-1, 1] with its caption; captions that are too long are cut."""
        device = self._model.device
        tokens = self._words(
            captions, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )  # 2 x (b, n)
        with torch.autocast(device.type, enabled=False):
            output = self._model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=preprocess(images, self._size).to(device),
            )
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())  # (b,)
        return (100 * cosine.clamp(min=0)).cpu()

    def describe(self) -> dict[str, Any]:
        """What a receipt says of it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return {
            "clip": self.name, "weights_sha256": digest.hexdigest(), "caption_tokens": self._length,
            "preprocessing": f"rounded to 8 bit, bicubic (antialiased) to {self._size} pixels on the shorter side, "
            "centre crop, CLIP's mean and standard deviation",
            "settings": "100 max(cos, 0), mean over images",
        }  # fmt: skip


def preprocess(images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """Images in [-1, 1] as CLIP takes them: `size` pixels on the shorter side, centre crop; grey is repeated.

    Raises:
        LatelierError: for other than 1 or 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise LatelierError(f"CLIP looks at 1 or 3 channels, not {images.shape[1]}; take evaluate.clip out.")
    image_batches = to_uint8(images).float().expand(-1, 3, -1, -1) / 255  # (b, 3, h, w)
    height, width = (max(size, round(side * size / min(images.shape[2:]))) for side in images.shape[2:])
    resized = F.interpolate(image_batches, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    crop = resized[..., top : top + size, left : left + size]  # (b, 3, s, s)
    return (crop - crop.new_tensor(MEAN).view(3, 1, 1)) / crop.new_tensor(STD).view(3, 1, 1)


def _load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise LatelierError("evaluate.clip needs transformers; run `pip install 'latelier[text]'`.") from None
    try:
        kind = library.AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise LatelierError(f"evaluate.clip = {name!r} is a model of the kind {kind}; name a CLIP.")
        model, report = library.CLIPModel.from_pretrained(name, output_loading_info=True)
        words = library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LatelierError(
            f"evaluate.clip = {name!r} cannot be loaded ({first}); give a CLIP's name on the Hugging Face Hub when "
            "online, or a folder with its config, weights and tokenizer."
        ) from None
    if report["missing_keys"]:
        raise LatelierError(f"evaluate.clip = {name!r} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
    return model.float().requires_grad_(False).eval(), words
