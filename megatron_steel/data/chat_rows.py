"""Files of chat data to conversations, row by row, with the place of each; bad rows are told, never skipped.

Files are read as data/readers.py reads them. Lines without a character are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_steel.data.chat_formats import BadRow, RowFormat, read_record
from megatron_steel.data.pair_formats import read_judged, read_pair, row_keys
from megatron_steel.data.prompt_rows import ANSWER, read_prompt
from megatron_steel.data.raw_rows import RawRow, raw_rows
from megatron_steel.text.conversation import Conversation, Judged, Pair, Prompt

RowKind = Literal["chat", "pair", "judged", "prompt"]
ChatRow = Conversation | Pair | Judged | Prompt
BLANK = "blank line"


def read_chat(
    files: Sequence[Path], form: RowFormat, max_turn_bytes: int, row_kind: RowKind = "chat"
) -> Iterator[ChatRow | BadRow]:
    """One conversation, pair, judged answer or prompt, or bad row, for every row of the files in order.

    Places are "FILE:LINE"; rows of tables are counted.

    Raises ``ValueError`` for a file that cannot be read from some place on, or that has none of the columns.
    """
    for row in chat_values(files, form):
        yield read_row(row, form, max_turn_bytes, row_kind)


def read_row(row: RawRow, form: RowFormat, max_turn_bytes: int, row_kind: RowKind = "chat") -> ChatRow | BadRow:
    """What a row is."""
    if row.error is None:
        readers = {"chat": read_record, "pair": read_pair, "judged": read_judged, "prompt": read_prompt}
        return readers[row_kind](row.value, row.place, form, max_turn_bytes)
    known = row.error.startswith("malformed JSON:")
    return BadRow(row.place, row.error if known else f"unreadable: {row.error}")


def chat_values(files: Sequence[Path], form: RowFormat, what: str = "read") -> Iterator[RawRow]:
    """The rows of the files before anything is made of them."""
    for path in files:
        try:
            yield from (row for row in raw_rows([path], [*row_keys(form), ANSWER], what) if row.error != BLANK)
        except ValueError as error:
            # Readers name the option of preprocessing.
            hint = "say what the columns are in a dataset_info.json"
            raise ValueError(str(error).replace("choose with --json-keys", hint)) from error


def count_rows(files: Sequence[Path], form: RowFormat) -> int:
    """How many rows `read_chat` gives."""
    return sum(1 for _ in chat_values(files, form, "count rows of"))
