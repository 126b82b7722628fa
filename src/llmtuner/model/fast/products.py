"""Matrix products in the pieces that a CPU is fast at."""

from itertools import pairwise

import torch
from torch import Tensor

# oneDNN (3.x, two cores) multiplies on one thread only where there are some 350 to 1,300 rows and
# up to 800 columns, or 1,000 to 1,300 rows and up to 1,200 columns. Pieces of at most so many rows
# go to all threads; wider products and longer ones are fast whole.
_PIECE_ROWS = 320
_MOST_ROWS = 1536
_SLOW_FROM = ((800, _PIECE_ROWS), (1280, 1000))  # columns up to, rows from


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight, [M, K] @ [K, N] -> [M, N]; not for autograd."""
    rows, columns = len(x), weight.shape[1]
    is_slow = any(columns < most and rows > least for most, least in _SLOW_FROM)
    if rows >= _MOST_ROWS or not is_slow:
        return torch.mm(x, weight)
    y = x.new_empty(rows, columns)
    num_pieces = -(-rows // _PIECE_ROWS)
    borders = [rows * number // num_pieces for number in range(num_pieces + 1)]
    for start, end in pairwise(borders):
        torch.mm(x[start:end], weight, out=y[start:end])
    return y
