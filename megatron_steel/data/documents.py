"""Where documents begin in the rows of a micro-batch, and what follows from it: attention bounds and positions.

The end-of-document token belongs to the document it ends; the next token begins another one. A row begins one too.
Shapes: B rows, S tokens of a row, B * S tokens of all rows joined end to end.
"""

from __future__ import annotations

import numpy as np
import torch


def document_bounds(tokens_BS: np.ndarray, eod_id: int) -> np.ndarray:
    """Where each document of the joined rows begins, and B * S: int32 (documents + 1,), strictly increasing."""
    begins = np.ones(tokens_BS.shape, dtype=bool)
    begins[:, 1:] = tokens_BS[:, :-1] == eod_id
    return np.append(np.flatnonzero(begins), tokens_BS.size).astype(np.int32)


def row_bounds(rows: int, length: int) -> np.ndarray:
    """The bounds when each row is one document: int32 (rows + 1,)."""
    return np.arange(rows + 1, dtype=np.int32) * np.int32(length)


def positions_from(bounds: torch.Tensor, tokens: int) -> torch.Tensor:
    """Position of each of ``tokens`` tokens in its document, int64 (tokens,), on the device of ``bounds``."""
    begins = bounds[:-1].long()
    # The size is given because asking the device for it would wait for the device.
    begin_of_token = torch.repeat_interleave(begins, bounds.diff().long(), output_size=tokens)
    return torch.arange(tokens, device=bounds.device) - begin_of_token
