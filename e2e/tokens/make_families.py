"""Trains the tokenizers of the corpus: OUT/<family>/tokenizer.json and tokenizer_config.json.

usage: make_families.py OUT [family ...]

The trainers of `tokenizers` for Unigram and WordPiece do not give the same twice, so these two vocabularies are counted here.

One family per kind of tokenizer that real models have, small and made of nothing but `training_text.py`; the chat templates beside the
tokenizers are written by hand, in the style of the models that a family stands for. The same versions of this script and of `tokenizers`
give the same files.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import training_text

sys.path.append(str(Path(__file__).parent.parent / "vllm"))
import make_model

MAX_LEN = 16384
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    args = parser.parse_args()
    for family in args.families:
        tokenizer, config = FAMILIES[family]()
        directory = args.out / family
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LEN, "clean_up_tokenization_spaces": False, **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        print(family, tokenizer.get_vocab_size(), (directory / "tokenizer.json").stat().st_size)


def tiny():
    """The model of the harness itself; its chat template lies in its configuration."""
    return make_model.train_tokenizer(), make_model.tokenizer_config(MAX_LEN)


def llama3():
    """Byte-level BPE, split as Llama 3 splits; special tokens come last, and the post-processor adds the first one."""
    tokenizer = byte_level_bpe(LLAMA3_SPLIT, 3000, ignore_merges=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    tokenizer.add_special_tokens(special + ["<|eot_id|>", "<|python_tag|>"])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(tokenizer, "<|begin_of_text|> $A")])
    return tokenizer, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}


def qwen():
    """Byte-level BPE after NFC, single digits, no BOS; some added tokens are ordinary text to the chat template."""
    tokenizer = byte_level_bpe(QWEN_SPLIT, 3000)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>"])
    ordinary = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ordinary])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}


def mistral():
    """SentencePiece's BPE as converted: spaces are `▁`, one is put before every piece of text between special tokens, unknown characters
    fall back to bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(training_text.lines(), trainers.BpeTrainer(vocab_size=3000, min_frequency=3, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    special.append("[/TOOL_RESULTS]")
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(model["vocab"], key=model["vocab"].get)
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = template(tokenizer, "<s> $A")
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}


def unigram():
    """Unigram after NFKC with spaces run together, as T5 and XLM-R have it, under the special tokens of Gemma."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    counts = substrings(words(normalizer, pre_tokenizer), longest=12)
    total = sum(counts.values())
    chosen = most_frequent(counts, 2500)
    scores = [(piece, 0.0) for piece in special] + [(piece, round(math.log(counts[piece] / total), 5)) for piece in chosen]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = template(tokenizer, "<bos> $A")
    return tokenizer, {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "unk_token": "<unk>", "pad_token": "<pad>"}


def wordpiece():
    """BERT's: lower case without accents, WordPiece, [CLS] and [SEP] around a text. One added token eats the space before it, another one is
    looked for in the normalized text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = words(normalizer, pre_tokenizer)
    firsts = substrings(counts, longest=12, only="heads")
    others = {f"##{piece}": count for piece, count in substrings(counts, longest=12, only="rests").items()}
    pieces = special + most_frequent(firsts, 1300) + most_frequent(others, 1300)
    vocab = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True), "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("WarmRoute", normalized=True, single_word=True, special=False)])
    tokenizer.post_processor = template(tokenizer, "[CLS] $A [SEP]")
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return tokenizer, {**names, "eos_token": "<|im_end|>"}


def byte_level_bpe(split, vocab_size, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_text.lines(), trainer)
    return tokenizer


def words(normalizer, pre_tokenizer):
    """How often each word occurs."""
    texts = (normalizer.normalize_str(text) for text in training_text.lines())
    return Counter(word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))


def substrings(counts, longest, only="all"):
    """How often each part of a word occurs: all parts, those at its head, or those behind its first character."""
    found = Counter()
    for word, count in counts.items():
        starts = {"all": range(len(word)), "heads": range(1), "rests": range(1, len(word))}[only]
        for start in starts:
            for end in range(start + 1, min(len(word), start + longest) + 1):
                found[word[start:end]] += count
    return found


def most_frequent(counts, n):
    """All single characters, and the `n` parts that cover most text; in an order that follows from nothing but the text."""
    single = sorted(piece for piece in counts if len(piece.removeprefix("##")) == 1)
    longer = sorted(set(counts) - set(single), key=lambda piece: (-counts[piece] * len(piece), piece))
    return single + longer[:n]


def template(tokenizer, single):
    special = [piece for piece in single.split() if piece != "$A"]
    pair = single + " " + single.replace("$A", "$B")
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(piece, tokenizer.token_to_id(piece)) for piece in special])


FAMILIES = {"tiny": tiny, "llama3": llama3, "qwen": qwen, "mistral": mistral, "unigram": unigram, "wordpiece": wordpiece}


if __name__ == "__main__":
    main()
