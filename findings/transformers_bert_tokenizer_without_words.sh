#!/usr/bin/env bash
# transformers 5.24.0: BertTokenizer(vocab_file=path) ignores the file and makes a tokenizer that knows no word.
#
# Expected: vocab_file= is the argument of this class in the releases before 5, the class still lists it in vocab_files_names, and its own
# docstring says that the vocabulary is loaded from `vocab_file` unless `vocab` is given. So the file is read, or the keyword is refused.
# What happens: the keyword is taken and ignored. The tokenizer has five tokens and turns every text into [UNK], without an error or a
# warning. The same path as the first argument without a keyword is read.
#
# Seen:
#     BertTokenizer(vocab_file=path):  5 tokens, 'a red dress' -> ['[UNK]', '[UNK]', '[UNK]']
#     BertTokenizer(path):             8 tokens, 'a red dress' -> ['a', 'red', 'dress']
#
# Why it matters here: BLIP and BLIP-2 in LAVIS, and code made of them, use BERT's tokenizer, often from a local vocabulary. All texts of
# the same number of words become the same ids: the model trains and answers without its text, and only the numbers tell.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
from transformers import BertTokenizer

with open("vocab.txt", "w") as file:
    file.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dress"]) + "\n")
keyword, positional = BertTokenizer(vocab_file="vocab.txt"), BertTokenizer("vocab.txt")
text = "a red dress"
print(f"BertTokenizer(vocab_file=path):  {len(keyword)} tokens, {text!r} -> {keyword.tokenize(text)}")
print(f"BertTokenizer(path):             {len(positional)} tokens, {text!r} -> {positional.tokenize(text)}")
assert (len(keyword), len(positional)) == (5, 8), "the behaviour has changed"
assert set(keyword.tokenize(text)) == {"[UNK]"} and positional.tokenize(text) == text.split(), "the behaviour has changed"
PY
