"""Write the README's claim and tables from the stored results: run after a new one.

python benchmarks/readme.py
"""

import json
import re
from pathlib import Path

from squeezed.cli.demo import table_row

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COLUMNS = (
    "question",
    "attention",
    "answer",
    "keys read",
    "KV read per token",
    "same tokens",
    "KL, nats",
    "first token",
    "per token",
)
INDEX_COLUMNS = (
    "keys and values",
    "index on top",
    "prefill",
    "clustering",
    "calibration",
)
DECODE_COLUMNS = (
    "context",
    "query / KV heads",
    "requests",
    "best dense, µs",
    "default, µs (10th–90th percentile)",
    "speed-up",
    "without summaries, µs (10th–90th percentile)",
    "speed-up",
    "limit, µs",
    "share of the limit",
)
DECODE = ("decode-8x4", "decode-32", "decode-shared")
PREFILL_COLUMNS = (
    "context",
    "user tokens",
    "query / KV heads",
    "best dense, µs",
    "default, µs",
    "speed-up",
    "without summaries, µs (10th–90th percentile)",
    "speed-up",
)
PREFILL = ("prefill", "prefill-8x4")


def stored(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def table(columns, sides, rows):
    """In Markdown; `sides` aligns the columns."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"|{sides}|", *lines[1:]])


def claim(record):
    squeezed = [row for row in record["asked"] if row["budget_asked"] < 1]
    tokens = sum(row["agreement"]["tokens"] for row in squeezed)
    same = sum(row["agreement"]["identical"] * row["agreement"]["tokens"] for row in squeezed)
    read = sum(row["bytes_per_token"] for row in squeezed) / len(squeezed)
    return (
        f"**A generated token reads {record['kv_bytes'] / read:.1f} times fewer bytes of the "
        f"document, and {same:.0f} of {tokens} tokens of\nthe dense answers are chosen again**: "
        f"SmolLM2-135M-Instruct, a manual of {record['tokens']:,} tokens, a tenth of its\nkeys "
        "read."
    )


def demo_table(record):
    rows = ([" ".join(cell.split()) for cell in table_row(row)] for row in record["asked"])
    lines = table(COLUMNS, "---|---|---|---:|---:|---:|---:|---:|---:", rows)
    machine, seconds = record["machine"], record["index_seconds"]
    once = table(
        INDEX_COLUMNS,
        "---:|---:|---:|---:|---:",
        [
            [
                f"{record['kv_bytes'] / 1e6:.1f} MB",
                f"{record['index_bytes'] / 1e6:.1f} MB",
                *(f"{seconds[phase]:.1f} s" for phase in ("prefill", "cluster", "calibrate")),
            ]
        ],
    )
    notes = (
        f"`squeezed demo`, {machine['threads']} threads of an {machine['processor']}, "
        f"{record['dtype']}; bytes are exact\n([`demo.json`](benchmarks/demo.json)). *Same "
        "tokens* is the share of the dense answer's tokens that are chosen again when\nall of it "
        "is computed in one pass. *KL* is the mean divergence from dense along that answer, 0 "
        "being equal. On a model this\nsmall the weights, not the context, take most of a "
        "token's time: `squeezed plan` says where that changes."
    )
    return f"{lines}\n\nDone once for the document:\n\n{once}\n\n{notes}"


def decode_table(records):
    """One line per case of several records: the default, with cluster summaries, and without."""
    lines, seen = [], set()
    for row in (row for record in records for row in record["rows"]):
        case = (row["tokens"], row["kv_heads"], row["batch"])
        if case in seen:
            continue
        seen.add(case)
        ours, default = (
            row["methods"][f"squeezed, far field {name}"] for name in ("none", "second_order")
        )
        cells = (
            f"{row['tokens']:,}",
            f"{row['heads']} / {row['kv_heads']}",
            f"{row['batch']}",
            f"{row['best_dense_us']:.0f} ({row['best_dense']})",
            f"{default['median_us']:.1f} ({default['low_us']:.1f}–{default['high_us']:.1f})",
            f"{row['best_dense_us'] / default['median_us']:.2f}",
            f"{ours['median_us']:.1f} ({ours['low_us']:.1f}–{ours['high_us']:.1f})",
            f"{row['speed_up']:.2f}",
            f"{row['physical_us']:.1f}",
            f"{row['share_of_limit']:.2f}",
        )
        lines.append(cells)
    return table(DECODE_COLUMNS, "---:|---|---:|---|---|---:|---|---:|---:|---:", lines)


def prefill_table(records):
    """One line per case of several records, the longest context first."""
    lines = []
    rows = [row for record in records for row in record["rows"]]
    for row in sorted(rows, key=lambda row: (-row["context"], -row["kv_heads"], row["rows"])):
        ours = row["methods"]["squeezed, far field none"]
        far = row["methods"]["squeezed, far field second_order"]["median_us"]
        cells = (
            f"{row['context']:,}",
            f"{row['rows']:,}",
            f"{row['heads']} / {row['kv_heads']}",
            f"{row['best_dense_us']:.0f} ({row['best_dense']})",
            f"{far:.0f}",
            f"{row['best_dense_us'] / far:.2f}",
            f"{ours['median_us']:.0f} ({ours['low_us']:.0f}–{ours['high_us']:.0f})",
            f"{row['speed_up']:.2f}",
        )
        lines.append(cells)
    return table(PREFILL_COLUMNS, "---:|---:|---|---|---:|---:|---|---:", lines)


def fill(text, mark, content):
    """Replace what lies between `<!-- mark -->` and `<!-- /mark -->`."""
    pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)"
    return re.sub(pattern, lambda found: found[1] + content + found[2], text, flags=re.DOTALL)


def filled(text):
    """The README's text with every marked part made anew."""
    demo = stored("demo.json")
    for mark, content in (
        ("claim", claim(demo)),
        ("table", demo_table(demo)),
        ("decode", decode_table([stored(f"h200/{name}.json") for name in DECODE])),
        ("prefill", prefill_table([stored(f"h200/{name}.json") for name in PREFILL])),
    ):
        text = fill(text, mark, content)
    return text


def main():
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
