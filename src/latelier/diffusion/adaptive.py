"""Sampling a flow by an adaptive solver: Dormand and Prince's method of order 5(4), known as dopri5 (SciPy's RK45).

dx/dt = v(x, t) from t = 1 to 0. The solver takes as many steps as its tolerances ask for, `steps` has no part in it.
Its error is measured over all images of a batch together, so an image depends a little on its neighbours: by about
the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latelier.errors import LatelierError

ADAPTIVE = "dopri5"
RELATIVE, ABSOLUTE = 1e-3, 1e-6  # tolerances of SiT and DC-AE


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Float[Tensor, "b c *grid"],
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b c *grid"]:
    """Latents of noise, float32.

    Args:
        velocity: `(x_t, t) -> dx/dt`, of the shape of `x_t`.
        noise: the state at t = 1.
        progress: called after each evaluation with how many are done, twice, since the total is not known.

    Raises:
        LatelierError: if the velocity is not finite, or the solver does not arrive.
    """
    from scipy.integrate import solve_ivp

    done = 0

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        nonlocal done
        x = torch.from_numpy(state).to(noise.device, torch.float32).view_as(noise)
        v = velocity(x, t).double().flatten().cpu().numpy()
        if not np.isfinite(v).all():  # the solver would look for a small enough step for ever
            raise LatelierError(f"sample.sampler = {ADAPTIVE}: the denoiser's velocity at t = {t:.4f} is not finite.")
        done += 1
        if progress is not None:
            progress(done, done)
        return v

    start = noise.double().flatten().cpu().numpy()
    solution = solve_ivp(slope, (1.0, 0.0), start, "RK45", t_eval=[0.0], rtol=RELATIVE, atol=ABSOLUTE)
    if not solution.success:
        raise LatelierError(f"sample.sampler = {ADAPTIVE} did not arrive ({solution.message}); use euler or heun.")
    return torch.from_numpy(solution.y[:, -1]).to(noise.device, torch.float32).view_as(noise)
