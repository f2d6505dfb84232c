"""Random numbers that are the same for every device and dtype."""

import torch
from torch import Tensor


class Draw:
    """Random numbers, and the sizes of one problem: T tokens, K in-features, N out-features, rank
    r.
    """

    def __init__(self, T: int, K: int, N: int, r: int, seed: int) -> None:
        self.T, self.K, self.N, self.r = T, K, N, r
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers in float64 on the CPU: the same for every device and
        dtype.
        """
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A `[r, K]` with rows of length about 1, and B `[N, r]` with entries as large as
        the weight's.
        """
        return self.normal(self.r, self.K) / self.K**0.5, self.normal(self.N, self.r) / self.K**0.5
