"""LangChain's and LlamaIndex's clients of OpenAI, as the page about them shows it."""

import importlib.util
import os
import subprocess
import sys

import pytest
from pages import ADDRESS, ROOT, blocks
from served import serving
from tiny import document, tiny_model, tiny_tokenizer

import squeezed

OWN = ROOT / "build" / "clients" / "bin" / "python"
CLIENTS = {"LangChain": "langchain_openai", "LlamaIndex": "llama_index.llms.openai_like"}


def interpreter(module):
    """A Python that has a client; skips the test where there is none."""
    if OWN.exists():
        return str(OWN)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"needs {module}: make clients")
    return sys.executable


@pytest.mark.parametrize("name", CLIENTS)
def test_client_gets_the_answer_whole_and_in_pieces(name, tmp_path):
    python = interpreter(CLIENTS[name])
    (block,) = (b for b in blocks("serve-frameworks", "python") if CLIENTS[name] in b)
    squeezed.index(tiny_model(), tiny_tokenizer(), document(600)).save(
        tmp_path / "contexts" / "manual.sqz"
    )
    with serving(tmp_path / "contexts", served_name="demo") as served:
        answer = served.openai().chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "How do I reset it?"}],
            max_tokens=32,
            temperature=0,
            extra_body={"context": "manual", "budget": 0.05},
        )
        done = subprocess.run(
            [python, "-c", block.replace(ADDRESS, served.base)],
            capture_output=True, timeout=120, cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": "", "no_proxy": "*"},
        )  # fmt: skip
        asked = served.server.metrics.hits.labels("name")._value.get()
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    expected = answer.choices[0].message.content
    assert done.stdout.decode() == f"{expected}\n{expected}"
    assert asked == 3
