"""Operations, bytes and expected times of each path of the loss head, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

FLOPS, BYTES = 790e12, 4.3e12  # a second, bf16 products and memory: what an H200 has reached
LOGIT, HALF = 4, 2  # bytes of a float32 number and of a bf16 one
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Work:
    """The rows that a path works on: labelled, with a gradient, and computed twice."""

    labelled: float
    active: float  # of these, with a coefficient
    recomputed: float  # whose logits are computed again
    multiplied: float  # whose gradient goes through both products
    held: float  # whose logits are in memory at a time
    num_chunks: float


def _work(path: str, labelled: float, active: float) -> Work:
    if path == "logits_logps":
        return Work(labelled, active, 0.0, labelled, labelled, -(-labelled // CHUNK_ROWS))
    return Work(
        labelled,
        active,
        recomputed=active if path == "linear_logps" else 0.0,
        multiplied=active,
        held=min(CHUNK_ROWS, labelled),
        num_chunks=-(-labelled // CHUNK_ROWS),
    )


def counts(shape: tuple[int, int, int], m: float, f: float) -> list[dict]:
    """Return one row of figures for each path, in bf16 with float32 logits.

    What caches save is left out. Per row and word: a product writes 4 bytes of logits, the
    statistics read them, the gradient reads 4 and writes 2, each of its products reads 2. Per
    chunk: the head is read by two products (2 bytes a number), and its float32 gradient is read
    and written. The products take the longer of their operations and their bytes, the rest its
    bytes.

    Args:
        shape: T, H, V.
        m: Share of rows without a label.
        f: Share of labelled rows without a gradient.
    """
    num_tokens, hidden_size, vocab_size = shape
    labelled = num_tokens * (1 - m)
    active = labelled * (1 - f)
    inputs = {"T": num_tokens, "H": hidden_size, "V": vocab_size, "m": m, "f": f}
    rows = []
    for path in ("linear_loss", "linear_logps", "logits_logps"):
        figures = _figures(_work(path, labelled, active), shape)
        rows.append({"path": path} | inputs | figures)
    return rows


def _figures(work: Work, shape: tuple[int, int, int]) -> dict[str, float]:
    num_tokens, hidden_size, vocab_size = shape
    head_size = hidden_size * vocab_size
    logits = work.labelled * vocab_size
    unit = 2 * work.labelled * hidden_size * vocab_size
    operations = unit * (1 + (work.recomputed + 2 * work.multiplied) / work.labelled)
    written = LOGIT * (logits + work.recomputed * vocab_size)
    read = 2 * HALF * work.active * vocab_size
    head_bytes = work.num_chunks * head_size * (2 * HALF + 2 * LOGIT)
    product_bytes = written + read + head_bytes
    row_bytes = LOGIT * logits + (LOGIT + HALF) * work.active * vocab_size
    seconds = max(operations / FLOPS, product_bytes / BYTES) + row_bytes / BYTES
    held_bytes = LOGIT * work.held * vocab_size + LOGIT * head_size
    three_units = 3 * 2 * num_tokens * head_size / FLOPS  # seconds
    return {
        "units": operations / unit,
        "tflop": operations / 1e12,
        "product_gb": product_bytes / 1e9,
        "row_gb": row_bytes / 1e9,
        "held_gib": held_bytes / 2**30,
        "ms": 1000 * seconds,
        "share_of_3_units": three_units / seconds,
    }


def line(row: dict) -> str:
    """Return a row of figures as a line of text."""
    words = []
    for name, value in row.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        words.append(f"{name} {shown}")
    return "  ".join(words)
