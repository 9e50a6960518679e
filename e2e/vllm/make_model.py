"""Makes the tiny model that the harness serves: OUT/tiny and its LoRA adapter OUT/lora-a.

usage: make_model.py OUT [--max-len N] [--tokenizer DIR]

A two-layer Llama whose weights vLLM draws at random (`--load-format dummy`), so only its configuration and its tokenizer are files. What
matters for routing is real: a trained byte-level BPE tokenizer whose post-processor adds a BOS token (so `add_special_tokens` shows),
and a chat template that renders tools and heeds `enable_thinking`. The same arguments give the same tokenizer and adapter. With --tokenizer
the model speaks with the tokenizer and the chat template in DIR instead.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEED = 7
N_LAYERS = 2
N_HEADS = 2
HIDDEN_SIZE = 64
LORA_RANK = 8
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
WORDS = (
    "the quick brown fox jumps over lazy dog router cache block prefix token hash envoy engine prompt system user assistant weather city "
    "tool call function paris london tokyo please tell me about history science music and then some because when where what who how many "
    "large small red green blue one two three four five six seven eight nine ten question answer because summary document"
).split()
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n<|tool|>"
    "{%- for t in tools %}{{ t | tojson }}\n{%- endfor %}<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{%- if m.get('tool_calls') %}{{ m['tool_calls'] | tojson }}{%- endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>\n{%- endif %}"
    "{%- endif %}"
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-len", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    make_model(args.out / "tiny", args.max_len, args.tokenizer)
    make_lora(args.out / "lora-a")


def make_model(out, max_len, tokenizer_dir):
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir:
        tokenizer, config = copy_tokenizer(tokenizer_dir, out)
    else:
        tokenizer, config = train_tokenizer(), tokenizer_config(max_len)
        tokenizer.save(str(out / "tokenizer.json"))
        write_json(out / "tokenizer_config.json", config)
    names = {"bos_token_id": config.get("bos_token"), "eos_token_id": config["eos_token"]}
    ids = {name: tokenizer.token_to_id(token) for name, token in names.items() if token}
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_HEADS,
            "head_dim": HIDDEN_SIZE // N_HEADS,
            "hidden_act": "silu",
            "max_position_embeddings": max_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            **ids,
        },
    )
    write_json(out / "generation_config.json", ids)


def copy_tokenizer(directory, out):
    for path in directory.iterdir():
        if path.name in TOKENIZER_FILES:
            shutil.copyfile(path, out / path.name)
    return Tokenizer.from_file(str(out / "tokenizer.json")), json.loads((out / "tokenizer_config.json").read_text())


def tokenizer_config(max_len):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]),
        ]
    )
    return tokenizer


def corpus():
    rng = random.Random(SEED)
    lines = [" ".join(rng.choices(WORDS, k=30)) + "." for _ in range(2000)]
    lines += [json.dumps(TOOL)] * 20
    lines += ["Émile says: naïve café – 日本語 テスト 你好 世界 🙂"] * 20
    return lines


def make_lora(out):
    out.mkdir(parents=True, exist_ok=True)
    rng = numpy.random.default_rng(SEED)
    targets = ["q_proj", "v_proj"]
    tensors = {}
    for layer in range(N_LAYERS):
        for target in targets:
            base = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for name, shape in (("lora_A", (LORA_RANK, HIDDEN_SIZE)), ("lora_B", (HIDDEN_SIZE, LORA_RANK))):
                tensors[f"{base}.{name}.weight"] = rng.normal(0, 0.02, shape).astype(numpy.float32)
    save_file(tensors, out / "adapter_model.safetensors")
    write_json(
        out / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": LORA_RANK,
            "lora_alpha": 16,
            "target_modules": targets,
            "lora_dropout": 0.0,
            "bias": "none",
            "base_model_name_or_path": "tiny",
        },
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
