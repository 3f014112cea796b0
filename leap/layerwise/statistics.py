"""Sums over calibration tokens that layer-wise methods need of a linear layer's inputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Bounds the full-precision copy of the inputs: 4096 tokens of 14336 features are 235 MB in fp32.
_CHUNK_TOKENS = 4096


class InputStatistics:
    """Running statistics of a layer's input X [tokens, in], summed in fp32 or fp64 whatever the input's dtype.

    Args:
        in_features: number of columns of X.
        needs: "norm" keeps the column norms only, [in]; "gram" keeps XᵀX, [in, in], from which the norms follow.
        dtype: of the sums.
        device: where the sums live; inputs must live there too.
    """

    def __init__(
        self,
        in_features: int,
        needs: Literal["norm", "gram"] = "norm",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.in_features = in_features
        self.needs = needs
        self.tokens = 0
        shape = (in_features, in_features) if needs == "gram" else (in_features,)
        self._sum = torch.zeros(shape, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds inputs ``x`` [..., in]; all leading dimensions count as tokens."""
        tokens = x.reshape(-1, self.in_features)
        self.tokens += len(tokens)
        for chunk in tokens.split(_CHUNK_TOKENS):
            chunk_TI = chunk.to(self._sum.dtype)
            if self.needs == "gram":
                self._sum.addmm_(chunk_TI.T, chunk_TI)
            else:
                self._sum += chunk_TI.square().sum(0)

    def merge(self, other: InputStatistics) -> None:
        """Adds the sums of ``other``, statistics of further tokens of the same layer.

        Raises:
            ValueError: the two keep different statistics.
        """
        if (self.needs, self.in_features) != (other.needs, other.in_features):
            raise ValueError(
                f"cannot add {other.needs} of {other.in_features} features to {self.needs} of {self.in_features}"
            )
        self._sum += other._sum
        self.tokens += other.tokens

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ of each column, [in]."""
        squares = self._sum.diagonal() if self.needs == "gram" else self._sum
        return squares.sqrt()

    @property
    def gram(self) -> Tensor:
        """XᵀX, [in, in]: the sums themselves, not a copy.

        Raises:
            ValueError: only norms were kept.
        """
        if self.needs != "gram":
            raise ValueError("these statistics hold column norms only; build them with needs='gram'")
        return self._sum
