"""Texts with their origin and hash."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from eckart.errors import InputError, unknown

PARTS = ("calibration", "evaluation")


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Texts to calibrate or to measure on."""

    texts: tuple[str, ...]
    """One sentence, line, record or file each; never blank."""
    name: str
    """Where they come from, as a report may say it."""
    sha256: str
    """Hash of these very texts, in hex: equal hashes mean equal data."""
    part: str
    """"calibration" or "evaluation"."""
    running: str | None = field(default=None, repr=False)
    """The text as it stood in its file, where that is one whole; None where the texts were never joined."""

    @classmethod
    def of(cls, texts: Iterable[str], *, part: str = "calibration", name: str = "texts in memory") -> TextData:
        """Texts in memory. Blank ones are dropped; raises InputError for none, and for what is not text."""
        if isinstance(texts, str):
            raise InputError("expected several texts, got one string. Put it into a list.")
        given = list(texts)
        strange = next((text for text in given if not isinstance(text, str)), None)
        if strange is not None:
            raise InputError(f"expected texts, got {type(strange).__name__} among them.")
        kept = tuple(text for text in given if text.strip())
        if not kept:
            raise InputError(f"{name}: expected at least one text that is not blank, got {len(given)} blank ones.")
        return cls(texts=kept, name=name, sha256=hash_texts(kept), part=check_part(part))

    @property
    def joined(self) -> str:
        """One running text, for language models: a file exactly as it is, else with blank lines between."""
        return "\n\n".join(self.texts) if self.running is None else self.running


def hash_texts(texts: Iterable[str]) -> str:
    """A sha256 over texts and where each ends, in hex."""
    digest = sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def check_part(part: str) -> str:
    """The part itself; raises InputError where it is neither calibration nor evaluation."""
    if part not in PARTS:
        raise InputError(unknown("part of the data", part, PARTS))
    return part
