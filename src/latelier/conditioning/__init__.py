"""Conditioners: what a denoiser is conditioned on, beside `x_t` and `t`, from records or from a user's inputs.

A condition is one file and one line in `CONDITIONERS`. The file has

SECTIONS                the classes of its recipe sections: `Section` with `kind: Literal[...]` and `dropout`
`build(section, spec)`  the conditioner for a recipe's section and the data (`DataSpec`)
a conditioner           a `ModelMixin, ConfigMixin` class:
    input_name               the pipeline's argument by which users give the condition
    token_width              width of the tokens it makes, 0 for none
    spatial_channels         channels it concatenates to `x_t`, 0 for none; without both it makes a vector
    inputs(wanted, size)     a user's inputs, strings of the command line too -> record entries, as training has them
    prepare(batch, codec)    without gradients, before the step: degraded images, masks, token ids -> batch entries
    forward(batch, drop)     the learned part -> `Condition`; dropped rows get the unconditional one

This file imports no model, so that recipes and `--help` stay fast.
"""

from __future__ import annotations

CONDITIONERS = {
    "class": "latelier.conditioning.condition",
    "text": "latelier.conditioning.text",
    "layout": "latelier.conditioning.layout",
    "segmentation": "latelier.conditioning.spatial",
    "low-resolution": "latelier.conditioning.spatial",
    "inpainting": "latelier.conditioning.spatial",
    "map": "latelier.conditioning.spatial",
}
# What a latent cache holds beside latents; conditioners with any other input need the images' records.
CACHED = ("classes", "prompts")
