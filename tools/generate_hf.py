"""Asks an exported model a question through transformers alone: `generate_hf.py RELEASE_DIR QUESTION`."""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: str, question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{question}\n{tokenizer.decode(output)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
