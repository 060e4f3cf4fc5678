"""The data sets of the commands: the digits of scikit-learn, and Fashion-MNIST from files."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .idx import DataError, read

__all__ = ["ClassificationData", "DataError", "load_digits", "load_fashion_mnist"]

_FASHION_MNIST_CLASSES = 10
_FASHION_MNIST_SIZE = 28
_WHERE = (
    "the four Fashion-MNIST files come from https://github.com/zalandoresearch/fashion-mnist or "
    "the Debian package dataset-fashion-mnist"
)


@dataclass(frozen=True, eq=False)
class ClassificationData:
    """A classification data set in memory, split into training and test samples.

    Attributes:
        name: The name of the data set.
        num_classes: The number of classes C.
        train_inputs: ``[N, ...]`` floating point.
        train_target: ``[N]`` int64, classes in [0, C).
        test_inputs: ``[M, ...]`` floating point.
        test_target: ``[M]`` int64, classes in [0, C).
    """

    name: str
    num_classes: int
    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor

    def to(self, device: torch.device | str) -> "ClassificationData":
        """The same data on ``device``."""
        return replace(
            self,
            train_inputs=self.train_inputs.to(device),
            train_target=self.train_target.to(device),
            test_inputs=self.test_inputs.to(device),
            test_target=self.test_target.to(device),
        )


def load_digits() -> ClassificationData:
    """Load the 1,797 images of handwritten digits of scikit-learn, 8 x 8 pixels each.

    The split is fixed and stratified, with 1,347 training and 450 test images. Every pixel is
    standardised by its mean and standard deviation over the training images. A pixel that is the
    same in all training images has no deviation, so only its mean is subtracted.

    Returns:
        Inputs ``[N, 1, 8, 8]`` float32, ten classes.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> from marginops.commands.data import load_digits
        >>> load_digits().train_inputs.shape
        torch.Size([1347, 1, 8, 8])
    """
    try:
        from sklearn import datasets, model_selection
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'load_digits needs scikit-learn; run pip install "marginops[demo]"',
            name=error.name,
        ) from error
    digits = datasets.load_digits()
    train_images, test_images, train_target, test_target = model_selection.train_test_split(
        digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    train_inputs, test_inputs = (
        torch.tensor(images, dtype=torch.float32).unsqueeze(1)
        for images in (train_images, test_images)
    )
    deviation, mean = torch.std_mean(train_inputs, dim=0, correction=0)
    deviation = torch.where(deviation == 0, 1, deviation)
    return ClassificationData(
        name="digits",
        num_classes=10,
        train_inputs=(train_inputs - mean) / deviation,
        train_target=torch.tensor(train_target, dtype=torch.int64),
        test_inputs=(test_inputs - mean) / deviation,
        test_target=torch.tensor(test_target, dtype=torch.int64),
    )


def load_fashion_mnist(data_dir: str | Path) -> ClassificationData:
    """Load Fashion-MNIST, or another data set with the same format, from its four idx files.

    All pixels are standardised by one mean and one standard deviation over all training images.

    Args:
        data_dir: Folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``. Each file may be plain or
            compressed as ``.gz``. If both are there, the plain file is read.

    Returns:
        Inputs ``[N, 1, 28, 28]`` float32, ten classes.

    Raises:
        DataError: A file is missing or cannot be read, is no regular file, has the wrong length,
            format or image size or more than a million samples, or the numbers of images and
            labels differ.

    Example:
        >>> from marginops.commands.data import load_fashion_mnist
        >>> load_fashion_mnist("/usr/share/datasets/fashion-mnist").name  # doctest: +SKIP
        'fashion-mnist'
    """
    train_images, train_target = _read_split(Path(data_dir), "train")
    test_images, test_target = _read_split(Path(data_dir), "t10k")
    train_inputs, test_inputs = train_images.float(), test_images.float()
    deviation, mean = torch.std_mean(train_inputs, correction=0)
    # If all pixels are equal, the deviation is 0. Then only the mean is subtracted.
    deviation = torch.where(deviation == 0, 1, deviation)
    return ClassificationData(
        name="fashion-mnist",
        num_classes=_FASHION_MNIST_CLASSES,
        train_inputs=train_inputs.sub_(mean).div_(deviation),
        train_target=train_target,
        test_inputs=test_inputs.sub_(mean).div_(deviation),
        test_target=test_target,
    )


def _read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] uint8 and labels [N] int64."""
    size = _FASHION_MNIST_SIZE
    image_path, images = read(folder, f"{split}-images-idx3-ubyte", (size, size), _WHERE)
    label_path, labels = read(folder, f"{split}-labels-idx1-ubyte", (), _WHERE)
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: expected {len(images)} labels, one for each image in "
            f"{image_path.name}, got {len(labels)}; take both files from the same source"
        )
    if labels.max() >= _FASHION_MNIST_CLASSES:
        raise DataError(
            f"{label_path}: expected labels from 0 to {_FASHION_MNIST_CLASSES - 1}, "
            f"got {labels.max().item()}; {_WHERE}"
        )
    return images.unsqueeze(1), labels.long()
