"""A document to index, as requests of an engine say it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from squeezed.config import IndexConfig
from squeezed.context.prompt import PromptTemplate
from squeezed.context.text import check_text
from squeezed.errors import SqueezedError
from squeezed.hf.identity.vocabulary import tokenizer_fingerprint
from squeezed.indexing.probe import probe_question


@dataclass(frozen=True)
class Asked:
    """Document and probe.

    Attributes:
        file: name of the context's directory.
        prompt: ids of both, of which the first `document_tokens` are the document's.
        said: what a request says beside them.
    """

    file: str
    prompt: list[int]
    document_tokens: int
    said: dict[str, Any]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        file: str,
        text: str,
        keep_control_tokens: bool = False,
        finish: bool = True,
    ) -> Asked:
        """Raises `SqueezedError` for what is no text, or an empty one."""
        if not check_text("text", text).strip():
            raise SqueezedError("text: the document is empty; give at least one word")
        template = PromptTemplate.of(tokenizer, keep_control_tokens)
        document = template.document_ids(tokenizer, text).tolist()
        question = probe_question(text, IndexConfig().calibration.probe)
        prompt = document + template.question_ids(tokenizer, question).tolist()
        said = {
            "file": file,
            "tokens": len(prompt),
            "document_tokens": len(document),
            "template": asdict(template),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "finish": finish,
        }
        return cls(file, prompt, len(document), said)

    @property
    def argument(self) -> str:
        """Of requests that begin now (`capture.ARGUMENT`)."""
        return json.dumps(self.said | {"began": time.time()})

    def check(self, longest: int) -> None:
        """Raise `SqueezedError` unless an engine for `longest` tokens can read this."""
        if len(self.prompt) + 1 > longest:
            raise SqueezedError(
                f"text: {self.document_tokens:,} tokens, and those to calibrate with, are "
                f"{len(self.prompt) + 1:,}, and the engine takes {longest:,}; give a larger "
                "--max-model-len, or a shorter document"
            )


def fallback_in(said: Mapping[str, Any] | None) -> str | None:
    """Why a request was not served as asked, from the `kv_transfer_params` of its answer."""
    return ((said or {}).get("squeezed") or {}).get("fallback")
