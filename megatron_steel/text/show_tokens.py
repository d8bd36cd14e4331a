"""Encoded conversations as a reader sees them: tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_steel.text.conversation import IGNORED, EncodedChat
from megatron_steel.text.tokenizer import Tokenizer

# Trained tokens on green, those with another weight than 1 on yellow, those that are to be predicted as another on red.
COLORS = {"plain": "\x1b[2m", "trained": "\x1b[30;42m", "weighted": "\x1b[30;43m", "other": "\x1b[37;41m"}
RESET = "\x1b[0m"
BRACKETS = {"plain": ("", ""), "trained": ("[", "]"), "weighted": ("{", "}"), "other": ("<", ">")}
UNFINISHED = "\ufffd"
LONGEST = 4  # bytes of a character, and so tokens it may be spread over


def kind(token: int, label: int, weight: float) -> str:
    """What is done with a token: a key of :data:`COLORS`."""
    if label == IGNORED:
        return "plain"
    if label != token:
        return "other"
    return "trained" if weight == 1.0 else "weighted"


def pieces(encoded: EncodedChat, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(text, kind) of each token; the tokens of one character come together."""
    ids, labels, weights = encoded.ids_T.tolist(), encoded.labels_T.tolist(), encoded.weights_T.tolist()
    held: list[int] = []
    for token, label, weight in zip(ids, labels, weights, strict=True):
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith(UNFINISHED) and len(held) < LONGEST:
            continue
        yield text, kind(token, label, weight)
        held = []
    if held:
        yield tokenizer.decode(held), kind(token, label, weight)


def show(encoded: EncodedChat, tokenizer: Tokenizer, place: str, color: bool) -> str:
    """A conversation with each token marked by what is done with it, under a line of numbers."""
    trained = int((encoded.labels_T != IGNORED).sum())
    total = len(encoded.ids_T)
    lines = [
        f"{place}: {total} tokens, {trained} trained ({trained / max(total, 1):.0%}), {len(encoded.rounds)} answers"
    ]
    marked = []
    for text, state in pieces(encoded, tokenizer):
        shown = text.replace("\n", "\\n\n")
        if color:
            marked.append(f"{COLORS[state]}{shown}{RESET}")
        else:
            before, after = BRACKETS[state]
            marked.append(f"{before}{shown}{after}")
    lines.append("".join(marked))
    for number, turn in enumerate(encoded.rounds):
        lines.append(f"  answer {number + 1}: prompt {turn.begin}..{turn.answer}, answer {turn.answer}..{turn.end}")
    return "\n".join(lines)


def legend(color: bool) -> str:
    """What the marks mean."""
    meanings = {
        "plain": "not trained",
        "trained": "trained",
        "weighted": "trained with another weight than 1",
        "other": "another token is to be predicted here",
    }
    if color:
        return "  ".join(f"{COLORS[state]} {meaning} {RESET}" for state, meaning in meanings.items())
    return "  ".join("".join((before, meanings[state], after)) for state, (before, after) in BRACKETS.items())
