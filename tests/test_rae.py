"""Representation autoencoders: frozen encoders, the decoder, noise, training."""

import json
from pathlib import Path

import numpy as np
import pytest
import synth
import torch

from latelier.tokenizers.rae import PRESETS, RAE

GOLDEN = Path(__file__).parent / "golden" / "rae_decoder_small"
