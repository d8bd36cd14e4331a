"""Everything besides tensors that a run needs to go on exactly: counters, data ledger, options, versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_steel import __version__
from megatron_steel.text.tokenizer import DESCRIPTION_FILE, Tokenizer, build_tokenizer

STATE_FILE = "state.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT = 1


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands after a number of optimizer steps."""

    iteration: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Samples drawn from the ledger."""
    consumed_tokens: int = 0
    """Tokens that counted in a loss."""
    consumed_tokens_by_source: dict[str, int] = field(default_factory=dict)
    """Tokens read from each source of the ledger, those that did not count in a loss too."""
    skipped_iterations: int = 0
    """Steps whose gradient was not finite and that left the weights alone."""
    ledger: dict[str, Any] = field(default_factory=dict)
    """The data order (``Ledger.to_json``)."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """What decides the learning-rate curve."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved options, flat."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Kind, fingerprint and vocabulary size of the tokenizer."""
    vocab_size: int = 0
    """Real rows of the embedding."""
    world_size: int = 1
    """Ranks that wrote the checkpoint."""
    has_optimizer: bool = True
    """Whether optimizer state is there, so that a run can go on from it."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the versions that wrote it."""
        versions = {name: version(name) for name in ("torch", "megatron-core")}
        return {"format": FORMAT, "versions": {"megatron_steel": __version__, **versions}, **asdict(self)}

    @staticmethod
    def from_json(values: dict[str, Any], origin: str) -> TrainState:
        """Read back; ``ValueError`` names the file for a format this version does not know."""
        if values.get("format") != FORMAT:
            raise ValueError(f"{origin}: checkpoint format {values.get('format')!r} is not {FORMAT}")
        known = {key: values[key] for key in asdict(TrainState()) if key in values}
        return TrainState(**known)


def read_state(checkpoint: Path) -> TrainState:
    """The state inside one ``iter_*`` directory; ``ValueError`` names a missing or broken file."""
    path = checkpoint / STATE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as checkpoint state ({error})") from error
    return TrainState.from_json(values, str(path))


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer inside a checkpoint; ``ValueError`` when it was saved or imported without one."""
    folder = checkpoint / TOKENIZER_FOLDER
    if not (folder / DESCRIPTION_FILE).is_file():
        raise ValueError(f"{checkpoint} holds no tokenizer; it was saved or imported without one")
    kind = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))["tokenizer_type"]
    return build_tokenizer(kind, str(folder))
