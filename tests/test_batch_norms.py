"""Running statistics of batch norms over two gloo processes: the same on both, and those of all data.

This file is also what each of the two processes runs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latelier.training.runtime import make_accelerator
from latelier.training.step import average_batch_norms
from latelier.training.tokenizer_loop import train_tokenizer
from tiny import DCAE, tiny_recipe

TOKENIZER = {  # batch norms in the decoder and in the discriminator
    "kind": "dcae", "preset": "dcae15-f8c32-tiny", "images": 16, "warmup": 0,
    "model": {**DCAE, "decoder_norm_types": ["batch_norm"] * 2 + ["rms_norm"] * 2},
    "adversarial": {"layers": 1, "channels": 8, "norm": "batch"},
}  # fmt: skip


def make_images() -> torch.Tensor:
    """Three batches `(3, b, c, h, w)`, whose halves differ in mean and spread."""
    x = torch.randn(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    return torch.cat([x[:, :4], 2 * x[:, 4:] + 1], dim=1)


def norms() -> nn.Sequential:
    """A batch norm that learns, and a frozen one whose statistics are not the same everywhere."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].eval()
    return model


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "running" in name}


def main(folder: Path) -> None:
    """One process: its half of known images through norms, then a tokenizer's training."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(folder, tokenizer=TOKENIZER, denoiser=None)
    accelerator = make_accelerator(recipe.tokenizer)
    rank = accelerator.process_index
    model = norms()
    model[1].running_mean.fill_(rank)
    for batch in make_images():
        model(batch.chunk(2)[rank])
        average_batch_norms(model, accelerator)
    save_file(statistics(model), folder / f"known-{rank}.safetensors")

    trained: list[nn.Module] = []  # modules in the order of their first use, discriminator included

    def remember(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.BatchNorm2d) and not any(module is one for one in trained):
            trained.append(module)

    handle = nn.modules.module.register_module_forward_hook(remember)
    train_tokenizer(recipe, accelerator)
    handle.remove()
    found = {f"{i}.{name}": value for i, norm in enumerate(trained) for name, value in statistics(norm).items()}
    save_file(found, folder / f"trained-{rank}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left."""
    here, place = Path(__file__), tmp_path_factory.mktemp("two")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(here), str(place)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_known_images_give_the_statistics_of_all_of_them(folder):
    a, b = (load_file(folder / f"known-{rank}.safetensors") for rank in (0, 1))
    whole = nn.BatchNorm2d(3)
    variance = torch.ones(3)
    for batch in make_images():
        whole(batch)
        within = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in batch.chunk(2)]).mean(0)
        variance = 0.9 * variance + 0.1 * within
    for found in (a, b):
        torch.testing.assert_close(found["0.running_mean"], whole.running_mean)
        torch.testing.assert_close(found["0.running_var"], variance)
    assert torch.equal(a["0.running_var"], b["0.running_var"])
    assert torch.equal(a["1.running_mean"], torch.zeros(3))  # frozen: left alone
    assert torch.equal(b["1.running_mean"], torch.ones(3))


def test_training_keeps_them_equal(folder):
    a, b = (load_file(folder / f"trained-{rank}.safetensors") for rank in (0, 1))
    assert set(a) == set(b)
    assert len(a) >= 2 * 2  # of the decoder and of the discriminator
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert not torch.equal(a[name], torch.full_like(a[name], float("var" in name))), name  # they have moved


if __name__ == "__main__":
    main(Path(sys.argv[1]))
