"""Turn the training texts into token ids once, so that the training machine needs no tokenizer.

    python tools/distil_demo/prepare.py --dense DENSE.gguf --texts DIR --out tokens.npz

DIR holds NAME.train.txt.xz and NAME.eval.txt.xz; the result has one uint16 array per text, and
`prompts`, token ids of chat prompts (one row each, padded with 65535).
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np
from dense import read_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
REQUESTS = (
    "Write a short story about {}.",
    "Explain {} to a curious child.",
    "What is interesting about {}?",
    "Write a short poem about {}.",
    "Give me three facts about {}.",
    "Tell me about the history of {}.",
    "Describe {} in one paragraph.",
    "How does one learn more about {}?",
    "Write a friendly letter that mentions {}.",
    "What are the advantages and disadvantages of {}?",
    "Summarise what people should know about {}.",
    "Make a simple plan for a day devoted to {}.",
)
TOPICS = (
    "the sea", "trains", "bees", "a small theatre", "winter", "bread", "the moon", "computers",
    "a lost dog", "mountains", "music", "gardens", "old books", "rain", "friendship", "the city",
    "horses", "space travel", "cooking soup", "rivers", "lighthouses", "chess", "volcanoes",
    "painting", "a brave mouse", "forests", "football", "electricity", "tea", "whales", "bridges",
    "languages", "the stars", "bicycles", "farming", "clouds", "libraries", "dreams", "glass",
    "mathematics", "healthy food", "sleep", "paper", "kindness", "a robot", "the desert",
    "museums", "birds", "salt", "clocks", "ice cream", "travel", "photography", "the weather",
    "democracy", "water", "castles", "the human body", "trees", "dancing",
)  # fmt: skip


def tokenizer_of(dense: Path) -> Tokenizer:
    """The file's own byte-level BPE; `smollm` splits digits, then as GPT-2 does."""
    metadata, _ = read_gguf(dense)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        t for t, k in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if k == 3
    ]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return tokenizer


def prompts(tokenizer: Tokenizer) -> np.ndarray:
    """Every request x topic as one padded row (prompts, longest) uint16."""
    texts = [SYSTEM + r.format(t) + ANSWER for r in REQUESTS for t in TOPICS]
    rows = [tokenizer.encode(t).ids for t in [SYSTEM, *texts]]
    out = np.full((len(rows), max(map(len, rows))), 65535, np.uint16)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--dense", "--texts", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()
    tokenizer = tokenizer_of(args.dense)
    arrays = {"prompts": prompts(tokenizer)}
    for path in sorted(args.texts.glob("*.txt.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()  # encoded in pieces: memory stays small
        pieces = ["".join(lines[i : i + 2000]) for i in range(0, len(lines), 2000)]
        ids = [i for piece in pieces for i in tokenizer.encode(piece).ids]
        arrays[path.name.removesuffix(".txt.xz")] = np.array(ids, np.uint16)
        print(path.name, len(ids), "tokens")
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
