"""Trains a tiny text classifier with the Trainer of Transformers, mostly on texts near a boundary.

    python examples/transformers_text.py

takes half a minute on a CPU and learns of which module a docstring is. For your texts add --data
with a folder of text files for each class, or a .tab file with three lines of header and then
class, tab, text. Marked lines are those that an ordinary script lacks.
"""

import argparse
import os
import tempfile
import zlib

import scipy.stats
import torch
from sklearn import datasets, metrics
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback
from transformers import TrainingArguments as Arguments

from marginops.integrations.transformers import MarginTrainer  # marginops
from marginops.training import MarginSampler, TrainingDynamics  # marginops


def pairs_of_class_and_text(path):
    if path is None:
        modules = [(module, vars(module).values()) for module in (metrics, os, scipy.stats, torch)]
        named = {value.__doc__: module.__name__ for module, values in modules for value in values}
        yield from ((name, text) for text, name in named.items() if isinstance(text, str))
    elif path.endswith(".tab"):
        with open(path, encoding="utf8") as file:
            yield from (line.split("\t", 1) for line in file.readlines()[3:] if "\t" in line)
    else:
        files = datasets.load_files(path, encoding="utf8", decode_error="replace")
        yield from zip((files.target_names[t] for t in files.target), files.data, strict=True)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", help="a folder with a folder of texts for each class, or a .tab file")
pairs = [*pairs_of_class_and_text(parser.parse_args().data)]
classes = sorted({name for name, _ in pairs})
numbers = [[zlib.crc32(word.encode()) % 4096 for word in text.split() or "-"] for _, text in pairs]
labels = [classes.index(name) for name, _ in pairs]
items = [{"input_ids": (n * 64)[:64], "labels": y} for n, y in zip(numbers, labels, strict=True)]
train, test = [item for place, item in enumerate(items) if place % 5], items[::5]
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
config = BertConfig(vocab_size=4096, num_attention_heads=2, num_labels=len(classes), **sizes)
options = {"num_train_epochs": 10, "learning_rate": 5e-3, "per_device_train_batch_size": 32}
sampler = MarginSampler(TrainingDynamics(len(train)), num_epochs=10)  # marginops
trainer = MarginTrainer(  # marginops
    BertForSequenceClassification(config),
    Arguments(tempfile.mkdtemp(), report_to="none", disable_tqdm=True, **options),
    train_dataset=train,
    sampler=sampler,  # marginops
    compute_metrics=lambda result: {"accuracy": (result[0].argmax(1) == result[1]).mean()},
)
trainer.remove_callback(PrinterCallback)
trainer.train()
print(f"10 epochs visited {int(trainer.dynamics.count.sum())} texts; {len(train)} are there.")
print(f"Test accuracy: {100 * trainer.evaluate(test)['eval_accuracy']:.1f} %.")
