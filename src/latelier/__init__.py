"""latelier: the workshop for the latent space of image generators.

Public names are imported when they are first used, so that `import latelier` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Codec": "latelier.tokenizers.codec",
    "VMAE": "latelier.tokenizers.vmae",
    "MAETok": "latelier.tokenizers.maetok",
    "DiT": "latelier.denoisers.dit",
    "UViT": "latelier.denoisers.uvit",
    "UNet": "latelier.denoisers.unet",
    "CrossAttentionUNet": "latelier.denoisers.unet",
    "Condition": "latelier.conditioning.condition",
    "ClassConditioner": "latelier.conditioning.condition",
    "TextConditioner": "latelier.conditioning.text",
    "LayoutConditioner": "latelier.conditioning.layout",
    "SegmentationConditioner": "latelier.conditioning.spatial",
    "LowResolutionConditioner": "latelier.conditioning.spatial",
    "InpaintingConditioner": "latelier.conditioning.spatial",
    "MapConditioner": "latelier.conditioning.spatial",
    "Flow": "latelier.diffusion.process",
    "DDPM": "latelier.diffusion.process",
    "LPIPS": "latelier.losses.perceptual",
    "LatentDiffusionPipeline": "latelier.pipeline",
    "LossGuidance": "latelier.diffusion.loss_guidance",
    "upscale": "latelier.run",
    "inpaint": "latelier.run",
    "inspect": "latelier.study.inspect",
    "compare": "latelier.study.compare",
    "LatentCache": "latelier.data.latents",
    "LatelierError": "latelier.errors",
    "Recipe": "latelier.recipe",
    "load_recipe": "latelier.recipe",
    "from_official": "latelier.convert",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'latelier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
