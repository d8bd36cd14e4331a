"""Texts to sentences: Punkt (Kiss and Strunk, 2006) for languages with full stops, end marks for Chinese."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHINESE = ("chinese", "zh")
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
# Ideographic full stop, exclamation and question marks (full width and ASCII), ellipses; then what may close a quote.
ENDS = "\u3002\uff01\uff1f!?\u2026"
CLOSERS = "\"')\u201d\u2019\u300d\u300f\uff09\u3009\u300b\u3011\u3015\\]\\}"
CHINESE_SENTENCE = re.compile(f"[^{ENDS}\n]*(?:[{ENDS}]+[{CLOSERS}]*|\n|$)[^\\S\n]*", re.UNICODE)

Splitter = Callable[[str], list[str]]


def make_splitter(
    lang: str, keep_newlines: bool, punkt_model: str | None, training_texts: Callable[[], Sequence[str]]
) -> Splitter:
    """A splitter for a language.

    ``punkt_model`` is a ``punkt_tab`` folder of one language; without one Punkt learns from ``training_texts``. With
    ``keep_newlines`` the sentences put together are the text; without it, white space around them is left out. Raises
    ``ValueError`` for an unusable model.
    """
    spans: Callable[[str], list[tuple[int, int]]]
    if lang.lower() in CHINESE:
        spans = chinese_spans
    else:
        tokenizer = load_punkt(Path(punkt_model)) if punkt_model else train_punkt(training_texts())

        def spans(text: str) -> list[tuple[int, int]]:
            return list(tokenizer.span_tokenize(text))

    def split(text: str) -> list[str]:
        found = spans(text)
        if keep_newlines:
            begins = [0, *(begin for begin, _ in found[1:])]
            return [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)], strict=True)]
        return [text[begin:end] for begin, end in found]

    return split


def chinese_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence: up to its end marks and closing quotes, or the end of its line."""
    spans = []
    for match in CHINESE_SENTENCE.finditer(text):
        piece = match.group()
        begin = match.start() + len(piece) - len(piece.lstrip())
        end = match.start() + len(piece.rstrip())
        if begin < end:
            spans.append((begin, end))
    return spans


def load_punkt(folder: Path) -> Any:
    """Punkt with the parameters of a ``punkt_tab`` folder, read without the pickles of older releases."""
    missing = [name for name in PUNKT_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--punkt-model {folder}: holds no {missing[0]}; give a language's folder of punkt_tab")
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    lines = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in PUNKT_FILES}
    parameters = PunktParameters()
    try:
        parameters.abbrev_types = {line for line in lines["abbrev_types.txt"] if line}
        parameters.sent_starters = {line for line in lines["sent_starters.txt"] if line}
        pairs = [line.split("\t") for line in lines["collocations.tab"] if line]
        parameters.collocations = {(first, second) for first, second in pairs}
        for line in lines["ortho_context.tab"]:
            if line:
                word, context = line.split("\t")
                parameters.ortho_context[word] = int(context)
    except ValueError as error:
        raise ValueError(f"--punkt-model {folder}: not a punkt_tab folder: {error}") from error
    return PunktSentenceTokenizer(parameters)


def train_punkt(texts: Sequence[str]) -> Any:
    """Punkt with parameters learnt from texts, without any marked sentence ends."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    trainer = PunktTrainer()
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    return PunktSentenceTokenizer(trainer.get_params())
