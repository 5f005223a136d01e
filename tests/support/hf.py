"""Tiny random models of Hugging Face transformers, as their users train them."""

import pytest
import torch
from torch.utils.data import Dataset

from train import Ratio, Section, Task

VOCABULARY, LENGTH, PAD = 40, 12, 0
FAMILIES = ("gpt2", "llama", "bert", "t5")


class Tokens(Dataset):
    """Sequences in which each token depends on the one before; their length differs."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.first = torch.randint(1, VOCABULARY, (size,), generator=generator)

    def __len__(self):
        return len(self.first)

    def __getitem__(self, index):
        tokens = (self.first[index] + 7 * torch.arange(LENGTH)) % (VOCABULARY - 1) + 1
        tokens[LENGTH - index % 5 :] = PAD
        return {"tokens": tokens}


def build(family):
    """A model of two layers without pretrained weights."""
    hf = pytest.importorskip("transformers")
    small = {"vocab_size": VOCABULARY, "pad_token_id": PAD}
    if family == "gpt2":
        config = hf.GPT2Config(
            **small, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
            eos_token_id=1,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    if family == "llama":
        config = hf.LlamaConfig(
            **small, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )  # fmt: skip
        return hf.LlamaForCausalLM(config)
    if family == "bert":
        config = hf.BertConfig(
            **small, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=LENGTH,
        )  # fmt: skip
        return hf.BertForMaskedLM(config)
    config = hf.T5Config(
        **small, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=PAD, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


class HuggingFaceTask(Task):
    """Language modelling with a model whose own loss is a mean over tokens."""

    class Model(Section):
        family: str = "gpt2"
        """One of the families above."""

    unit = "tokens"

    def build_model(self):
        return build(self.config.model.family)

    def train_dataset(self):
        return Tokens(53)

    def eval_dataset(self):
        return Tokens(13)

    def count(self, batch):
        return int((self._labels(batch["tokens"]) != -100).sum())

    def loss(self, model, batch):
        tokens = batch["tokens"]
        labels, mask = self._labels(tokens), (tokens != PAD).long()
        count = (labels != -100).sum()
        if self.config.model.family in ("gpt2", "llama"):
            # These predict the next token: the labels are moved by their loss.
            labels = torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1]
        elif self.config.model.family == "bert":
            tokens = torch.where(torch.arange(LENGTH) % 4 == 1, 2, tokens)
        output = model(input_ids=tokens, attention_mask=mask, labels=labels)
        return Ratio(output.loss * count, count)

    def _labels(self, tokens):
        """The next tokens, -100 where there is none."""
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], PAD)], 1)
        return torch.where(following == PAD, -100, following)
