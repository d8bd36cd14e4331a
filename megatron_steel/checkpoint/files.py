"""The directory side of checkpoints: names, manifest, atomic publication, retention.

A checkpoint is written under a temporary name, its files are synced and listed with sizes and hashes in
``manifest.json``, the directory is renamed, and only then the tracker file is replaced by a rename. At every moment
the newest published checkpoint is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_steel.text import files as text_files
from megatron_steel.text.files import sync

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
CHUNK_BYTES = 16 << 20


def checkpoint_directory(root: Path, iteration: int) -> Path:
    """``ROOT/iter_0000100``, Megatron-LM's name."""
    return root / f"iter_{iteration:07d}"


def temporary_directory(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return root / f"iter_{iteration:07d}.tmp"


def replaced_directory(root: Path, iteration: int) -> Path:
    """Where a checkpoint of the same iteration stays until its successor has the name."""
    return root / f"iter_{iteration:07d}.old"


def stored_directory(root: Path, iteration: int) -> Path:
    """The directory that holds an iteration: a save killed between its two renames leaves only the replaced one."""
    final, replaced = checkpoint_directory(root, iteration), replaced_directory(root, iteration)
    return replaced if replaced.is_dir() and not final.is_dir() else final


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(directory: Path) -> int:
    """Free bytes of the disk that a directory is on, or will be on when it does not exist yet."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; its new name, too, is on the disk afterwards."""
    text_files.write_text(path, text, sync_folder=True)


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file like a text file."""
    text_files.write_json(path, values, indent=1, sync_folder=True)


def list_files(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint but the manifest, in a fixed order."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)


def describe_files(checkpoint: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of files, synced to disk first."""
    facts = {}
    for path in files:
        sync(path)
        facts[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    return facts


def publish(root: Path, iteration: int, facts: dict[str, dict[str, Any]]) -> Path:
    """Write the manifest, give the directory its final name and point the tracker at it."""
    temporary, final = temporary_directory(root, iteration), checkpoint_directory(root, iteration)
    write_json(temporary / MANIFEST, {"files": facts})
    for directory in sorted({path.parent for path in list_files(temporary)} | {temporary}):
        sync(directory)
    replaced = replaced_directory(root, iteration)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync(root)
    write_text(root / TRACKER, f"{iteration}")
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def problem_with(checkpoint: Path, hashes: bool) -> str | None:
    """What is wrong with a published checkpoint, naming the file; None when it is whole.

    Sizes are always compared; ``hashes`` reads every byte as well.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST} cannot be read ({error})"
    if not expected:
        return f"{checkpoint / MANIFEST} lists no file"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if hashes and file_hash(path) != digest:
            return f"{path} has changed since it was written (hash differs)"
    return None


def published(root: Path) -> list[int]:
    """Iterations with a published directory, ascending; see :func:`stored_directory` for where each lies."""
    matches = (re.fullmatch(r"iter_(\d{7,})(\.old)?", path.name) for path in root.iterdir() if path.is_dir())
    return sorted({int(match.group(1)) for match in matches if match})


def tracked(root: Path, iterations: list[int]) -> tuple[int | None, str]:
    """The iteration the tracker names, None when it names none of ``iterations``; and its text."""
    tracker = root / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    named = [iteration for iteration in iterations if text.isascii() and text.lstrip("0") == str(iteration).lstrip("0")]
    return (named[0] if named and text else None), text


def find_checkpoint(root: Path, step: int | None, fall_back: bool = False) -> tuple[Path, list[str]]:
    """The checkpoint to load and warnings about what was passed over.

    Raises ``ValueError`` naming the path when nothing fits. The tracker decides; when it is missing, unreadable or
    points nowhere, the newest complete checkpoint is taken and a warning says so. ``fall_back`` also passes over a
    newest checkpoint whose files are not all there.
    """
    if not root.is_dir():
        raise ValueError(f"--load {root}: no such directory")
    iterations = published(root)
    if not iterations:
        raise ValueError(f"--load {root}: holds no checkpoint (iter_* directory)")
    if step is not None:
        if step not in iterations:
            raise ValueError(f"--ckpt-step {step}: {root} holds iterations {', '.join(map(str, iterations))}")
        return stored_directory(root, step), []
    warnings: list[str] = []
    named, text = tracked(root, iterations)
    wanted = iterations[-1] if named is None else named
    if named is None:
        warnings.append(f"{root / TRACKER} names no checkpoint ({text[:40]!r}); looking for the newest complete one")
    candidates = [wanted] if not (fall_back or warnings) else [i for i in reversed(iterations) if i <= wanted]
    for iteration in candidates:
        directory = stored_directory(root, iteration)
        problem = problem_with(directory, hashes=False)
        if problem is None:
            return directory, warnings
        warnings.append(problem)
    others = [str(i) for i in iterations if i != wanted]
    hint = f"; --ckpt-step loads another: {', '.join(others)}" if others else ""
    raise ValueError(f"--load {root}: {warnings[-1]}{hint}")


def remove_old(root: Path, keep: int | None) -> None:
    """Remove complete checkpoints but for the newest ``keep``; what is incomplete is left for a person to look at.

    A run that went back to an earlier iteration finds newer checkpoints of the run it replaces: the tracker tells them
    apart, they do not count and stay.
    """
    if keep is None:
        return
    iterations = published(root)
    current, _ = tracked(root, iterations)
    mine = [i for i in iterations if current is None or i <= current]
    whole = [i for i in mine if problem_with(stored_directory(root, i), hashes=False) is None]
    for iteration in whole[:-keep]:
        shutil.rmtree(stored_directory(root, iteration))


def remove_leftovers(root: Path) -> None:
    """Delete directories of saves that were interrupted; a replaced one without its successor gets its name back."""
    for path in root.glob("iter_*"):
        if not path.is_dir() or path.suffix not in (".tmp", ".old"):
            continue
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)
