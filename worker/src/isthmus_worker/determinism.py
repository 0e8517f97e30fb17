"""What makes local training a function of (model, data, job spec, seed) alone."""

import os
import random

import numpy as np
import torch

# A model that an entry point compiles (torch.compile) is compiled alike every time; read when that part is imported.
os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")


def settle(seed: str, threads: int) -> None:
    """Set every generator and switch of the process as if no task had run here before.

    `seed` is the task's own: 64 hexadecimal digits. Its first 8 bytes seed the global generators (dropout, and whatever
    an entry-point model draws), its next 8 the order of the batches, see `batch_generator`.
    """
    # As torch.use_deterministic_algorithms(True), which also imports torch's compiler: a second, for nothing here.
    torch.set_deterministic_debug_mode("error")
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    first = int(seed[:16], 16)
    torch.default_generator.manual_seed(first)  # torch.manual_seed looks for accelerators, each time; we use none
    random.seed(first)
    np.random.seed(first % 2**32)


def batch_generator(seed: str) -> torch.Generator:
    """The generator of the order of batches: its own, so that a model that draws numbers does not change it."""
    return torch.Generator().manual_seed(int(seed[16:32], 16))
