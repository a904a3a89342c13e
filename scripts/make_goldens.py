"""Writes the golden models and logits of tests/golden with transformers: scripts/golden [--check].

Each case is a tiny random model in Hugging Face's own format, saved by transformers, and the logits
that transformers computes for one random prompt in float32 with eager attention. Norms and biases
are random as well, so that a forgotten one shows. `--check` compares instead of writing.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

FOLDER = Path(__file__).parent.parent / "tests" / "golden"
PROMPT_LEN = 48
PLAIN = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama31": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "smollm2": (
        "Llama",
        {"num_attention_heads": 6, "hidden_size": 48, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 10, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
SHARDED = "llama2"  # this one is saved in shards with an index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if check else FOLDER / name
            make(name, folder)
            if check:
                compare(FOLDER / name, folder)
        print(f"{name}: {'equal' if check else 'written'}")


def make(name: str, folder: Path) -> None:
    """Saves one model and what it says."""
    family, changes = CASES[name]
    number = list(CASES).index(name)
    torch.manual_seed(number)
    config = getattr(transformers, f"{family}Config")(**(PLAIN | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            spread = 0.3 if "norm" in key or "bias" in key else 2 / value.shape[-1] ** 0.5
            value.normal_(1.0 if "norm" in key else 0.0, spread)
    prompt = np.random.default_rng(number).integers(3, PLAIN["vocab_size"], PROMPT_LEN)
    with torch.no_grad():
        logits = model(torch.tensor(prompt)[None]).logits[0].numpy()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **({"max_shard_size": "40KB"} if name == SHARDED else {}))
    tokenizer().save(str(folder / "tokenizer.json"))
    np.savez_compressed(folder / "golden.npz", prompt=prompt.astype(np.int32), logits=logits)
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
    (folder / "made_with.json").write_text(json.dumps(made_with) + "\n")


def tokenizer() -> tokenizers.Tokenizer:
    """One token for each printable ASCII character, the least that a text model needs."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *map(chr, range(32, 127))]
    model = tokenizers.models.BPE({piece: place for place, piece in enumerate(pieces)}, [])
    model.unk_token = "<unk>"
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(specials)
    made.decoder = tokenizers.decoders.Fuse()
    return made


def compare(old: Path, new: Path) -> None:
    """Raises where a fresh golden differs from the one that is there."""
    before, after = np.load(old / "golden.npz"), np.load(new / "golden.npz")
    np.testing.assert_array_equal(before["prompt"], after["prompt"])
    np.testing.assert_allclose(before["logits"], after["logits"], atol=1e-5)


if __name__ == "__main__":
    main()
