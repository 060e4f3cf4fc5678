"""Fine-tunes a tiny language model without logits, and watches its tokens.

    python examples/finetune_tokens.py

takes a few seconds on one CPU. The model is made from a configuration, and its tokens are bytes. It
learns the manual of Python first, and is then fine-tuned on Python code.
"""

import argparse
import inspect
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import marginops


def rows_of(text: str) -> torch.Tensor:
    """The bytes of a text, 64 in a row, in random order."""
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    return rows[torch.randperm(len(rows))]


def train(rows: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        tokens = rows[torch.randint(len(rows), (16,))]
        hidden = model.base_model(tokens).last_hidden_state
        head = model.lm_head.weight
        loss = -marginops.linear_log_prob(hidden[:, :-1], head, tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def describe(when: str) -> None:
    hidden, head = model.base_model(unseen).last_hidden_state, model.lm_head.weight
    seen = marginops.linear_sample_statistics(hidden[:, :-1], head, unseen[:, 1:])
    log_prob, right, entropy = -seen.mean_loss(), 100 * seen.correct.float().mean(), seen.entropy
    print(f"{when}, the mean log-probability of a byte of unseen code is {log_prob:.2f}.")
    print(f"  {right:.0f} % have the largest logit, and the entropy is {entropy.mean():.2f} nats.")


torch.manual_seed(0)
manual, code = rows_of("".join(topics.values())), rows_of(inspect.getsource(argparse))
code, unseen = code[:-100], code[-100:]
sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
train(manual, steps=80)
describe("Before fine-tuning")
train(code, steps=80)
describe("After fine-tuning")
expected = model(unseen, labels=unseen).loss
hidden = model.base_model(unseen).last_hidden_state
ours = -marginops.linear_log_prob(hidden[:, :-1], model.lm_head.weight, unseen[:, 1:]).mean()
print(f"The loss of Transformers with logits differs by {abs(expected - ours):.0e}.")
