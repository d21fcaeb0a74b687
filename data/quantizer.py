"""Residual k-means over blocks of log-mel frames: 80 ms become one code of each codebook.

    log-mel [8 T, M] --8 frames stacked--> blocks [T, X] --minus mean, PCA--> points [T, D]
      --nearest centroid of codebook 0; what is left: of codebook 1; ...--> codes [G, T]

The codebooks are fitted one after the other on what those before leave over (Juang and Gray 1982, multiple stage
vector quantization), so the first q of them are a codec of q. Without the PCA the deepest ones are nearly empty.
Cost of a fit: 1.1 s of one core a codebook, for 40,000 blocks and 512 codes.

Letters: T blocks of an utterance, N blocks to fit, X values of a block, D dimensions, G codebooks, K codes of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.hashing import hashed, permutation
from data.vocoder import NUM_MELS

BLOCK_FRAMES = 8
BLOCK_VALUES = BLOCK_FRAMES * NUM_MELS
_ITERATIONS = 8
_ROWS = 4096  # points whose distances are held at a time


class Quantizer(NamedTuple):
    """What turns log-mel frames into codes and back."""

    mean_X: Tensor
    components_XD: Tensor  # orthonormal, by falling variance
    codebooks_GKD: Tensor

    def encode(self, mel_FM: Tensor) -> Tensor:
        """Codes int64 [G, T] of log-mel float32 [T * BLOCK_FRAMES, M]."""
        rest_TD = (mel_FM.reshape(-1, BLOCK_VALUES) - self.mean_X) @ self.components_XD
        codes_GT = torch.zeros(len(self.codebooks_GKD), len(rest_TD), dtype=torch.int64)
        for codes_T, book_KD in zip(codes_GT, self.codebooks_GKD, strict=True):
            codes_T.copy_(_nearest(rest_TD, book_KD))
            rest_TD = rest_TD - book_KD[codes_T]
        return codes_GT

    def decode(self, codes_GT: Tensor) -> Tensor:
        """Log-mel [T * BLOCK_FRAMES, M] of codes of the first codebooks, as many as there are rows."""
        points_TD = self.codebooks_GKD.new_zeros(codes_GT.shape[1], self.codebooks_GKD.shape[2])
        for codes_T, book_KD in zip(codes_GT, self.codebooks_GKD, strict=False):
            points_TD += book_KD[codes_T]
        return (points_TD @ self.components_XD.T + self.mean_X).reshape(-1, NUM_MELS)


def fit_quantizer(
    blocks_NX: Tensor, codebooks: int, codebook_size: int, dimensions: int, seed: int, done: Callable[[], object]
) -> Quantizer:
    """Fit to blocks float32 [N, X], at least `codebook_size` of them. Calls `done` after each codebook."""
    mean_X = blocks_NX.mean(0)
    rest_ND = blocks_NX - mean_X
    _, vectors_XX = torch.linalg.eigh(rest_ND.T @ rest_ND)  # by rising variance
    components_XD = vectors_XX[:, -dimensions:].flip(1).contiguous()
    rest_ND = rest_ND @ components_XD
    books = []
    for number in range(codebooks):
        books.append(_kmeans(rest_ND, codebook_size, seed, number))
        rest_ND = rest_ND - books[-1][_nearest(rest_ND, books[-1])]
        done()
    return Quantizer(mean_X, components_XD, torch.stack(books))


def perplexities(codes_GT: Tensor, codebook_size: int) -> list[float]:
    """How many codes of each codebook are in use, as the exponential of their entropy: 1 to `codebook_size`."""
    found = []
    for codes_T in codes_GT:
        shares_K = torch.bincount(codes_T, minlength=codebook_size).double() / len(codes_T)
        found.append(float(torch.special.entr(shares_K).sum().exp()))
    return found


def _kmeans(points_ND: Tensor, count: int, seed: int, number: int) -> Tensor:
    """Centroids [K, D] by Lloyd's algorithm from random points; a centroid without points moves to a random one."""
    total = len(points_ND)
    centroids_KD = points_ND[torch.from_numpy(permutation(total, seed, number)[:count])].clone()
    for iteration in range(_ITERATIONS):
        owners_N = _nearest(points_ND, centroids_KD)
        sizes_K = torch.bincount(owners_N, minlength=count)
        used_K = sizes_K > 0
        sums_KD = torch.zeros_like(centroids_KD).index_add_(0, owners_N, points_ND)
        centroids_KD[used_K] = sums_KD[used_K] / sizes_K[used_K, None]
        draws_K = hashed(seed, number, iteration, np.arange(count)) % np.uint64(total)
        fresh_K = torch.from_numpy(draws_K.astype(np.int64))
        centroids_KD[~used_K] = points_ND[fresh_K[~used_K]]
    return centroids_KD


def _nearest(points_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """Index [N] of the centroid with the smallest Euclidean distance."""
    squares_K = centroids_KD.square().sum(1)
    pieces = [(squares_K - 2.0 * piece @ centroids_KD.T).argmin(1) for piece in points_ND.split(_ROWS)]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
