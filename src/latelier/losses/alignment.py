"""Alignment of latents with the features of a frozen teacher, position by position (VA-VAE, Yao & Wang 2025).

With z'_i a linear map of the latent at position i, F_i the teacher's feature there, m1 and m2 margins:

    cosine  mean over i of relu(1 - m1 - cos(z'_i, F_i))
    matrix  mean over all pairs i, j of relu(|cos(z'_i, z'_j) - cos(F_i, F_j)| - m2)^power
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from latelier.losses.teachers import Features


def cosine_loss(
    projected: Float[Tensor, "b n d"], features: Float[Tensor, "b n d"], margin: float = 0.0
) -> Float[Tensor, ""]:
    """Marginal cosine similarity: positions whose cosine is above 1 - margin are left alone."""
    return F.relu(1 - margin - F.cosine_similarity(projected, features, dim=-1)).mean()


def matrix_loss(
    latents: Float[Tensor, "b n k"], features: Float[Tensor, "b n d"], margin: float = 0.0, power: float = 1.0
) -> Float[Tensor, ""]:
    """Marginal distance of the matrices of cosines within an image; power 2 without margin compares Gram matrices."""
    ours, theirs = (u @ u.transpose(1, 2) for u in (F.normalize(latents, dim=-1), F.normalize(features, dim=-1)))
    return F.relu((ours - theirs).abs() - margin).pow(power).mean()  # of (b, n, n)


class Alignment(nn.Module):
    """Both terms, and the projection, which is trained with the tokenizer and no part of it.

    Args:
        teacher: gives features on the latents' grid; it is not registered, so neither trained nor saved.
        channels: of the latents.
        cosine, matrix: weights of the two terms.
        cosine_margin, matrix_margin, power: m1, m2 and the power.
        matrix_of: whether the matrix is of the `projection` (VA-VAE's code) or of the `latents` (its paper).
    """

    def __init__(
        self,
        teacher: Features,
        channels: int,
        cosine: float = 1.0,
        matrix: float = 1.0,
        cosine_margin: float = 0.0,
        matrix_margin: float = 0.0,
        power: float = 1.0,
        matrix_of: str = "projection",
    ):
        super().__init__()
        self.teacher, self.cosine, self.matrix, self.matrix_of = teacher, cosine, matrix, matrix_of
        self.cosine_margin, self.matrix_margin, self.power = cosine_margin, matrix_margin, power
        self.project = nn.Linear(channels, teacher.dim, bias=False)

    def forward(
        self,
        z: Float[Tensor, "b d *grid"],
        images: Float[Tensor, "b c h w"],
        grid: tuple[int, int],
        keep: Int[Tensor, "b k"] | None = None,
    ) -> dict[str, Tensor]:
        """The term `align`, and its parts for the log.

        Args:
            z: latents on the grid, or of the visible positions only, `(b, c, k)`.
            images: in [-1, 1], what was encoded.
            grid: rows and columns of all latents.
            keep: raster indices of the visible positions; None: all.
        """
        features = self.teacher(images, grid)  # (b, n, d)
        if keep is not None:
            features = features.gather(1, keep[..., None].expand(-1, -1, features.shape[2]))  # (b, k, d)
        latents = z.flatten(2).transpose(1, 2).float()  # (b, n, c)
        projected = self.project(latents).float()  # (b, n, d)
        compared = projected if self.matrix_of == "projection" else latents
        cosine = cosine_loss(projected, features, self.cosine_margin)
        matrix = matrix_loss(compared, features, self.matrix_margin, self.power)
        return {"align": self.cosine * cosine + self.matrix * matrix, "align_cosine": cosine, "align_matrix": matrix}
