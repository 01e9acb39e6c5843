"""A folder of JPEG photographs as training batches: our loader against plain PIL, both with two workers."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import seconds
from latelier.data.loader import ImageDataset
from latelier.data.sources import open_source
from latelier.recipe import Data

IMAGES, SHAPE, BATCH, WORKERS = 400, (500, 375), 40, 2
SIZES = (64, 128, 256)


class PlainFolder(Dataset):
    """Open, decode, resize the shorter side, cut out the centre, scale to [-1, 1]."""

    def __init__(self, folder: Path, size: int):
        self.paths, self.size = sorted(folder.glob("*.jpg")), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


def run() -> list[tuple[str, float]]:
    """How many times faster one pass over the folder is, at several sizes; workers are started in each pass."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder)
        for size in SIZES:
            data = Data(source=name, image_size=(size, size), in_memory=False, workers=WORKERS, val_fraction=0)
            ours = ImageDataset(open_source(data), data)
            plain = DataLoader(PlainFolder(folder, size), BATCH, shuffle=True, num_workers=WORKERS)
            times = seconds({"ours": lambda d=ours: _exhaust(d.once(BATCH)), "plain": lambda p=plain: _exhaust(p)})
            rows.append((f"JPEG folder at {size} px, images/s", IMAGES / times["ours"]))
            rows.append((f"JPEG folder at {size} px / plain PIL (aim 2)", times["plain"] / times["ours"]))
    return rows


def write_photographs(folder: Path) -> None:
    """JPEG files with noise at all scales, as photographs have it."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        layers = [rng.normal(0, 128 / 2**k, (2 + 3**k, 2 + 3**k, 3)) for k in range(5)]
        total = sum(_enlarge(layer) for layer in layers)
        Image.fromarray((128 + 0.7 * total).clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)


def _enlarge(layer: np.ndarray) -> np.ndarray:
    bands = [
        Image.fromarray(band.astype(np.float32)).resize(SHAPE, Image.Resampling.BICUBIC)
        for band in layer.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(band) for band in bands], -1)


def _exhaust(batches) -> None:
    for _ in batches:
        pass


if __name__ == "__main__":
    for label, value in run():
        print(f"{label}: {value:.2f}")
