"""The JSON card beside a tokenizer: enough to size and check a model without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.json_text import parse_json

METADATA_FILE = "metadata.json"
# Kind of tokenizer -> the file that holds its model.
MODEL_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
# A directory with any of them holds a tokenizer.
TOKENIZER_FILES = (METADATA_FILE, *MODEL_FILES.values())

_ROLES = ("pad_id", "bos_id", "eod_id", "mask_id")


@dataclass(frozen=True)
class TokenizerMetadata:
    """What `metadata.json` of a tokenizer directory says. A tokenizer may lack any of the roles."""

    kind: str
    """A key of MODEL_FILES."""
    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eod_id: int | None
    """End of a document."""
    mask_id: int | None
    special_ids: tuple[int, ...]
    """Ids that stand for no text; encoding never gives them (but for the id of the unknown)."""
    sha256: str
    """Hash of the model file."""
    bytes_per_token: float | None
    """UTF-8 bytes per token, measured when the tokenizer was made; None if it was not."""
    normalization: str | None = None
    """"NFC": text is brought to this Unicode normal form before it is encoded; None: it is not."""

    def write(self, directory: Path) -> None:
        content = json.dumps(asdict(self), indent=1) + "\n"
        (directory / METADATA_FILE).write_text(content, encoding="utf-8")


def holds_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies there, with or without our card beside it."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer_metadata(directory: str) -> TokenizerMetadata:
    """Read and check `<directory>/metadata.json`; ValueError names the file and what is wrong."""
    path = Path(directory) / METADATA_FILE
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"data.tokenizer {directory}: cannot read {path} ({error.strerror}); "
            "make one with `megatron-dlm tokenizer` (a SentencePiece or Hugging Face tokenizer "
            "becomes one with --existing)"
        ) from None
    except ValueError:
        raise ValueError(f"data.tokenizer {directory}: {path} is not valid JSON") from None
    metadata = _from_json(values, path)
    special = metadata.special_ids
    for name in _ROLES:
        identifier = getattr(metadata, name)
        if identifier is None:
            continue
        if identifier not in special or not 0 <= identifier < metadata.vocab_size:
            raise ValueError(
                f"{path}: {name} is {identifier}; it must be one of special_ids {list(special)} "
                f"and below vocab_size {metadata.vocab_size}"
            )
    return metadata


def _from_json(values: Any, path: Path) -> TokenizerMetadata:
    names = TokenizerMetadata.__dataclass_fields__
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    missing = [name for name in names if name not in values and name != "normalization"]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; make the tokenizer again")
    known = {name: values[name] for name in names if name in values}
    given_roles = [known[name] for name in _ROLES if known[name] is not None]
    integers = [known["vocab_size"], *given_roles]
    special = known["special_ids"]
    if not isinstance(special, list) or not all(type(item) is int for item in integers + special):
        raise ValueError(f"{path}: vocab_size and all ids must be integers")
    for name, choices in (("kind", tuple(MODEL_FILES)), ("normalization", ("NFC", None))):
        if known.get(name) not in choices:
            expected = " or ".join(json.dumps(choice) for choice in choices)
            raise ValueError(f"{path}: {name} is {known[name]!r}; it must be {expected}")
    return TokenizerMetadata(**{**known, "special_ids": tuple(special)})
