"""MarginTrainer before SFTTrainer of TRL."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers is not installed")
pytest.importorskip("datasets")

import datasets
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from marginops.integrations.transformers import MarginTrainer


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_the_last_token_of_a_text_is_its_class(tmp_path):
    trl = pytest.importorskip("trl", exc_type=ImportError, reason="no TRL for this transformers")

    class MarginSFTTrainer(MarginTrainer, trl.SFTTrainer):
        def logits_and_target(self, inputs, outputs):
            return outputs.logits[:, -2], inputs["labels"][:, -1]

    words = {f"w{number}": number for number in range(40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        **{"pad_token": "w0", "unk_token": "w0", "eos_token": "w1"},
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16},
    )
    model = LlamaForCausalLM(config)
    rows = [
        {"input_ids": [2 + row % 30, 5, 2 + row % 2], "completion_mask": [0, 0, 1]}
        for row in range(20)
    ]
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, 1]
    trainer = MarginSFTTrainer(
        model,
        trl.SFTConfig(
            **{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "disable_tqdm": True},
            **{"num_train_epochs": 1, "per_device_train_batch_size": 5, "learning_rate": 0.0},
            **{"save_strategy": "no", "report_to": "none", "gradient_checkpointing": False},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    target = ids[:, 2:]
    others = logits.scatter(1, target, -torch.inf).amax(1)
    margin = logits.gather(1, target)[:, 0] - others
    torch.testing.assert_close(trainer.dynamics.margin, margin, rtol=1e-4, atol=1e-5)
