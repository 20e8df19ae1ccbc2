"""What all tests share; that this file is here also puts `tests` on the import path."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
