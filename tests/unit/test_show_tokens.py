"""Which marks --inspect puts on which tokens."""

from __future__ import annotations

import numpy as np

from megatron_steel.text.conversation import IGNORED, EncodedChat, Round
from megatron_steel.text.show_tokens import COLORS, RESET, legend, show
from megatron_steel.text.tokenizer import NullTokenizer


class Bytes(NullTokenizer):
    """A token is a byte."""

    def decode(self, ids: object) -> str:  # type: ignore[override]
        return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


def encoded(text: str, labels: list[int], weights: list[float]) -> EncodedChat:
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    return EncodedChat(
        ids_T=ids,
        labels_T=np.array(labels, dtype=np.int32),
        weights_T=np.array(weights, dtype=np.float32),
        rounds=(Round(begin=0, answer=2, end=len(ids)),),
    )


def test_every_token_is_marked() -> None:
    text = "q:ab\nc"
    labels = [IGNORED, IGNORED, ord("a"), ord("b"), ord("\n"), ord("x")]
    chat = encoded(text, labels, [0, 0, 1, 0.5, 1, 1])
    lines = show(chat, Bytes(256), "rows.jsonl:3", color=False).split("\n")
    assert lines[0] == "rows.jsonl:3: 6 tokens, 4 trained (67%), 1 answers"
    assert "\n".join(lines[1:3]) == "q:[a]{b}[\\n\n]<c>"
    assert lines[3] == "  answer 1: prompt 0..2, answer 2..6"
    colored = show(chat, Bytes(256), "x", color=True)
    assert f"{COLORS['trained']}a{RESET}{COLORS['weighted']}b{RESET}" in colored and f"{COLORS['other']}c" in colored
    assert "[trained]" in legend(color=False) and RESET in legend(color=True)


def test_the_tokens_of_a_character_come_together() -> None:
    text = "\u4e2d!"
    ids = list(text.encode())
    chat = encoded(text, ids, [1.0] * 4)
    assert "[\u4e2d][!]" in show(chat, Bytes(256), "x", color=False)
    cut = encoded(text, ids, [1.0] * 4)
    cut = EncodedChat(ids_T=cut.ids_T[:2], labels_T=cut.labels_T[:2], weights_T=cut.weights_T[:2], rounds=())
    assert show(cut, Bytes(256), "x", color=False).count("\ufffd") == 1
