"""What a checkpoint holds beside weights and state: the tokenizer, and for conversations how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.converted import GENERATION_FILE
from megatron_steel.checkpoint.files import write_json, write_text
from megatron_steel.checkpoint.state import TOKENIZER_FOLDER
from megatron_steel.train.prepare import Prepared

TEMPLATE_FILE = "chat_template.jinja"


def write_extras(prepared: Prepared, folder: Path) -> None:
    """Write them into the directory of a checkpoint; the export takes them along."""
    prepared.tokenizer.save(folder / TOKENIZER_FOLDER)
    if prepared.template is not None:
        write_text(folder / TOKENIZER_FOLDER / TEMPLATE_FILE, prepared.template.jinja)
        write_json(folder / GENERATION_FILE, generation_config(prepared))


def generation_config(prepared: Prepared) -> dict[str, Any]:
    """What the model was published with for generation, ended by the tokens that end an answer of the template."""
    assert prepared.template is not None
    origin = prepared.checkpoint or prepared.hf_folder
    path = None if origin is None else origin / GENERATION_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    tokenizer, stops = prepared.tokenizer, list(prepared.template.stop_ids)
    own = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    values |= {name: value for name, value in own.items() if values.get(name) is None and value is not None}
    return values | {"eos_token_id": stops[0] if len(stops) == 1 else stops}
